"""Convert a model: ours to another program's format, or another program's to ours.

    python -m fastgpt.convert out gpt-folder --format huggingface
    python -m fastgpt.convert out model.gguf --format gguf --dtype q8_0

Exit code 0: written and, where the other program is installed, proven to compute the same; 1: it does not, and nothing
was written; 2: bad usage or input.
"""

from collections.abc import Sequence

from fastgpt import cli
from fastgpt.config.conversion import ConvertConfig


def main(argv: Sequence[str] | None = None) -> int:
    config = cli.parse(
        ConvertConfig,
        argv,
        prog="python -m fastgpt.convert",
        description="Convert a model to another program's format, or to ours.",
        unnamed=("src", "dst"),
    )
    # Only now, as it imports PyTorch, which takes a second that --help and a mistyped flag do not wait for.
    from fastgpt.conversion.convert import convert

    convert(config)
    return 0


if __name__ == "__main__":
    raise SystemExit(cli.run(main))
