"""Train a GPT.

    python -m fastgpt.train                                       # fits the machine, about a minute on a CPU
    python -m fastgpt.train --preset baby --dataset shakespeare
    python -m fastgpt.train --init_from resume --max_iters 4000

This reads the flags; the training loop is in `fastgpt.training.run`.
"""

import sys
from collections.abc import Sequence

if __name__ == "__main__":
    from fastgpt.system import barriers

    barriers.choose(sys.argv)  # before PyTorch is imported

from fastgpt import cli
from fastgpt.config.training import PRESETS, TrainConfig
from fastgpt.generation.sample import sample
from fastgpt.system import signals
from fastgpt.training.run import train
from fastgpt.training.start import complete


def main(argv: Sequence[str] | None = None) -> int:
    signals.ignore_saving()
    preset, given = cli.read(
        TrainConfig, argv, prog="python -m fastgpt.train", description="Train a GPT on text.", presets=PRESETS
    )
    summary = train(complete(preset, given), sample)
    if summary.failures:
        return 1
    return 0 if summary.stopped_by is None else 128 + summary.stopped_by


if __name__ == "__main__":
    raise SystemExit(cli.run(main))
