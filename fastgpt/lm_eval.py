"""Run EleutherAI's lm-evaluation-harness on a model of ours: its own command line, which knows `--model fastgpt` here.

    python -m fastgpt.lm_eval --model fastgpt --model_args pretrained=out --tasks hellaswag

Needs the extra `eval`. lm_eval finds no plug-ins by itself, so its own command does not know this model.
"""

import importlib.util
import sys
from collections.abc import Sequence

from fastgpt import cli
from fastgpt.errors import UsageError
from fastgpt.system import barriers


def main(argv: Sequence[str] | None = None) -> int:
    words = list(sys.argv[1:] if argv is None else argv)
    if importlib.util.find_spec("lm_eval") is None:
        raise UsageError("fastgpt.lm_eval needs lm-evaluation-harness; pip install 'fastgpt-engine[eval]'")
    from lm_eval.__main__ import cli_evaluate  # pyright: ignore[reportMissingImports]

    from fastgpt.generation import lm_eval_model

    lm_eval_model.register()
    before, sys.argv = sys.argv, ["lm_eval", *words]  # where its command line looks
    try:
        cli_evaluate()
    finally:
        sys.argv = before
    return 0


if __name__ == "__main__":
    barriers.choose(sys.argv)  # before PyTorch is imported
    raise SystemExit(cli.run(main, sys.argv[1:]))
