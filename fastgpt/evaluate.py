"""Measure a model: its loss on a text, or its accuracy in multiple-choice questions.

python -m fastgpt.evaluate out --dataset pydocs
python -m fastgpt.evaluate out --choices questions.jsonl --json
"""

import sys
from collections.abc import Sequence

from fastgpt import cli
from fastgpt.config.evaluation import EvaluateConfig
from fastgpt.system import barriers


def main(argv: Sequence[str] | None = None) -> int:
    config = cli.parse(
        EvaluateConfig,
        argv,
        prog="python -m fastgpt.evaluate",
        description="Measure a model: its loss on a text, or its accuracy in multiple-choice questions.",
        unnamed=("src",),
    )
    # Only now, as they import PyTorch, which takes a second that --help and a mistyped flag do not wait for.
    from fastgpt.evaluation import measuring
    from fastgpt.generation.load import load

    return measuring.evaluate(config, load)


if __name__ == "__main__":
    barriers.choose(sys.argv)  # before PyTorch is imported
    raise SystemExit(cli.run(main))
