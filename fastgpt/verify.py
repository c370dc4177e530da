"""Check every checkpoint of a run, byte by byte.

    python -m fastgpt.verify out

Exit code 0: all are whole; 1: one is not, or `latest` or `best` names none, or config.json is damaged; 2: there is no
run, or no vocabulary to read it by.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from fastgpt import cli
from fastgpt.config.fields import Settings, option


@dataclass(frozen=True)
class VerifyConfig(Settings):
    """The run to check."""

    out_dir: str = option("out", "folder of the run; the flag's name may be left out", path=True)


def main(argv: Sequence[str] | None = None) -> int:
    config = cli.parse(
        VerifyConfig,
        argv,
        prog="python -m fastgpt.verify",
        description="Check every checkpoint of a run.",
        unnamed=("out_dir",),
    )
    # Only now, as it imports PyTorch, which takes a second that --help and a mistyped flag do not wait for.
    from fastgpt.checkpoint.verification import verify

    return 0 if verify(Path(config.out_dir)) else 1


if __name__ == "__main__":
    raise SystemExit(cli.run(main))
