"""Train a GPT.

    python -m fastgpt.train                                       # fits the machine, about a minute on a CPU
    python -m fastgpt.train --preset baby --dataset shakespeare
    python -m fastgpt.train --init_from resume --max_iters 4000
    python -m fastgpt.train --config recipes/gpt2-124m.toml --dry_run      # what it takes; writes nothing

The run itself is in `fastgpt.training.run`, a dry run in `fastgpt.training.dry_run`.
"""

import sys
from collections.abc import Sequence

from fastgpt import cli
from fastgpt.config.training import PRESETS, TrainConfig
from fastgpt.system import barriers, signals


def main(argv: Sequence[str] | None = None) -> int:
    signals.ignore_saving()
    preset, given = cli.read(
        TrainConfig, argv, prog="python -m fastgpt.train", description="Train a GPT on text.", presets=PRESETS
    )
    # Only now, as they import PyTorch, which takes a second that --help and a mistyped flag do not wait for.
    from fastgpt.generation.sample import sample
    from fastgpt.training.dry_run import dry_run
    from fastgpt.training.run import train
    from fastgpt.training.start import complete

    config, source = complete(preset, given)
    if config.dry_run:
        dry_run(config, source)
        return 0
    summary = train(config, sample, source=source)
    if summary.failures:
        return 1
    return 0 if summary.stopped_by is None else 128 + summary.stopped_by


if __name__ == "__main__":
    barriers.choose(sys.argv)  # before PyTorch is imported
    raise SystemExit(cli.run(main))
