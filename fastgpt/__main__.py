"""Lists the commands and runs one of them: `fastgpt train ...` is `python -m fastgpt.train ...`.

fastgpt
fastgpt train --preset mini
fastgpt --version
"""

import importlib
import sys
from collections.abc import Sequence

from fastgpt import __version__, cli
from fastgpt.errors import UsageError, nearest, shown
from fastgpt.system import barriers

COMMANDS = {  # each is the module of that name in this folder, with a function `main`
    "train": "train a GPT on text, or continue a run",
    "generate": "continue prompts with a trained run",
    "prepare": "tokenize text before training, many documents in several processes",
    "convert": "write a model in another program's format, or another's in ours",
    "verify": "check every checkpoint of a run, byte by byte",
    "evaluate": "measure a model on a text, or on multiple-choice questions",
    "compare": "compare two models on a text",
    "inspect": "look inside: attention, memory, time, this machine",
    "plot": "draw the curves of runs: loss, learning rate, norms, speed",
    "explain": "say in words what is wrong with a run, and which flag to change",
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command that the first word names, with the words after it."""
    words = list(sys.argv[1:] if argv is None else argv)
    if not words or words[0] in ("-h", "--help"):
        print(_listing())
        return 0
    if words[0] == "--version":
        print(f"fastgpt {__version__}")
        return 0
    name, *rest = words
    if name not in COMMANDS:
        raise UsageError(
            f"unknown command {shown(name)}{nearest(name, COMMANDS)}; the commands are {', '.join(COMMANDS)}"
        )
    barriers.choose(rest)  # before PyTorch is imported
    return importlib.import_module(f"fastgpt.{name}").main(rest)


def _listing() -> str:
    width = max(map(len, COMMANDS))
    lines = [f"  {name:{width}}  {text}" for name, text in COMMANDS.items()]
    return "\n".join(
        ["usage: fastgpt COMMAND [--flag value ...]", "", *lines, "", "fastgpt COMMAND --help shows a command's flags"]
    )


def run() -> int:
    """The console script `fastgpt`."""
    return cli.run(main)


if __name__ == "__main__":
    raise SystemExit(run())
