"""Say in words what is wrong with a run, which may still be training, and which flag to change.

python -m fastgpt.explain out
python -m fastgpt.explain out --no-sample --json
"""

import sys
from collections.abc import Sequence

from fastgpt import cli
from fastgpt.config.curves import ExplainConfig
from fastgpt.system import barriers


def main(argv: Sequence[str] | None = None) -> int:
    config = cli.parse(
        ExplainConfig,
        argv,
        prog="python -m fastgpt.explain",
        description="Say in words what is wrong with a run, and which flag to change.",
        unnamed=("out_dir",),
    )
    # Only now, as it imports NumPy, which --help and a mistyped flag do not wait for.
    from fastgpt.inspection import explaining

    explaining.explain(config, cli.with_flags)
    return 0


if __name__ == "__main__":
    barriers.choose(sys.argv)  # before PyTorch is imported
    raise SystemExit(cli.run(main))
