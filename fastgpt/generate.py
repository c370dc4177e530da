"""Generate text from a model: one continuation at a time, or many at once.

    python -m fastgpt.generate --prompt "The with statement"
    python -m fastgpt.generate --prompts prompts.txt --output answers.jsonl

Python: `fastgpt.load("out").generate("The with statement")`, or `.engine()` for many prompts.
"""

import sys
from collections.abc import Sequence

from fastgpt import cli
from fastgpt.config.generation import GenerateConfig
from fastgpt.errors import UsageError
from fastgpt.system import barriers


def main(argv: Sequence[str] | None = None) -> int:
    _, given = cli.read(
        GenerateConfig, argv, prog="python -m fastgpt.generate", description="Generate text from a model."
    )
    if given.get("model") is not None and "out_dir" in given:
        raise UsageError(f"--out_dir {given['out_dir']} and --model {given['model']} exclude each other; pass only one")
    config = cli.change(GenerateConfig(), given)
    # Only now, as it imports PyTorch, which takes a second that --help and a mistyped flag do not wait for.
    from fastgpt.generation.writing import write

    return write(config)


if __name__ == "__main__":
    barriers.choose(sys.argv)  # before PyTorch is imported
    raise SystemExit(cli.run(main))
