"""Draw the curves of one or more runs, which may still be training: a page, or a picture.

python -m fastgpt.plot out
python -m fastgpt.plot out-a out-b --output compared.png
"""

from collections.abc import Sequence

from fastgpt import cli
from fastgpt.config.curves import PlotConfig


def main(argv: Sequence[str] | None = None) -> int:
    config = cli.parse(
        PlotConfig,
        argv,
        prog="python -m fastgpt.plot",
        description="Draw the curves of one or more runs: loss, learning rate, gradient norm and speed.",
        unnamed=("runs",),
    )
    # Only now, as it imports NumPy, which --help and a mistyped flag do not wait for.
    from fastgpt.inspection import plotting

    plotting.plot(config)
    return 0


if __name__ == "__main__":
    raise SystemExit(cli.run(main))
