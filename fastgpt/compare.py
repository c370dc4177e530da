"""Compare two models on a text: losses, and how far their next-token distributions are apart.

python -m fastgpt.compare out-a out-b --dataset pydocs
"""

import sys
from collections.abc import Sequence

from fastgpt import cli
from fastgpt.config.evaluation import CompareConfig
from fastgpt.system import barriers


def main(argv: Sequence[str] | None = None) -> int:
    config = cli.parse(
        CompareConfig,
        argv,
        prog="python -m fastgpt.compare",
        description="Compare two models on a text.",
        unnamed=("src", "other"),
    )
    # Only now, as they import PyTorch, which takes a second that --help and a mistyped flag do not wait for.
    from fastgpt.evaluation import measuring
    from fastgpt.generation.load import load

    return measuring.compare(config, load)


if __name__ == "__main__":
    barriers.choose(sys.argv)  # before PyTorch is imported
    raise SystemExit(cli.run(main))
