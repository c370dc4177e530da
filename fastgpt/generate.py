"""Generate text from a trained run: one continuation at a time, or many at once.

    python -m fastgpt.generate --prompt "The with statement"
    python -m fastgpt.generate --prompts prompts.txt --output answers.jsonl

Python: `fastgpt.load("out").generate("The with statement")`, or `.engine()` for many prompts.
"""

import sys
from collections.abc import Sequence

from fastgpt import cli
from fastgpt.config.generation import GenerateConfig
from fastgpt.system import barriers


def main(argv: Sequence[str] | None = None) -> int:
    config = cli.parse(
        GenerateConfig,
        argv,
        prog="python -m fastgpt.generate",
        description="Generate text from a trained run.",
    )
    # Only now, as it imports PyTorch, which takes a second that --help and a mistyped flag do not wait for.
    from fastgpt.generation.writing import write

    return write(config)


if __name__ == "__main__":
    barriers.choose(sys.argv)  # before PyTorch is imported
    raise SystemExit(cli.run(main))
