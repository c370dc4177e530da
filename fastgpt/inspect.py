"""Look inside: what a model does with a text, and where its memory and time go.

python -m fastgpt.inspect attention out --text "The with statement" --output page.html
python -m fastgpt.inspect memory --preset gpt2 --fit 8GiB
python -m fastgpt.inspect profile --preset cpu
python -m fastgpt.inspect machine
"""

import importlib
import sys
from collections.abc import Sequence
from typing import Any, NamedTuple

from fastgpt import cli
from fastgpt.config.fields import Settings
from fastgpt.config.inspection import AttentionConfig, MachineConfig, MemoryConfig, ProfileConfig, WorkConfig
from fastgpt.config.training import PRESETS, TrainConfig
from fastgpt.errors import UsageError, nearest, shown
from fastgpt.system import barriers


class View(NamedTuple):
    """One thing to look at: its settings, the module of fastgpt/inspection whose function `show` shows it, its help."""

    config: type[Settings]
    module: str
    text: str


VIEWS = {
    "attention": View(AttentionConfig, "attention_view", "a page of attention maps, next tokens and the logit lens"),
    "memory": View(MemoryConfig, "memory_view", "the bytes that a training step and a generation hold"),
    "profile": View(ProfileConfig, "profile_view", "the time of a training step or a generation, by operation"),
    "machine": View(MachineConfig, "machine_view", "what runs on this machine, and why; for bug reports"),
}


def main(argv: Sequence[str] | None = None) -> int:
    words = list(sys.argv[1:] if argv is None else argv)
    if not words or words[0] in ("-h", "--help"):
        print(_listing())
        return 0
    name, *rest = words
    if name not in VIEWS:
        raise UsageError(f"unknown view {shown(name)}{nearest(name, VIEWS)}; the views are {', '.join(VIEWS)}")
    view = VIEWS[name]
    kind, prog, description = view.config, f"python -m fastgpt.inspect {name}", f"{view.text.capitalize()}."
    # PyTorch is imported only once the flags are read: --help and a mistyped flag do not wait a second for it.
    if not issubclass(kind, WorkConfig):
        config = cli.parse(kind, rest, prog=prog, description=description, unnamed=("src",))
        return _module(view.module).show(config)
    presets = {preset: kind.of(config) for preset, config in PRESETS.items()}
    preset, given = cli.read(
        kind, rest, prog=prog, description=description, presets=presets, unnamed=("src",), shares=TrainConfig
    )
    return _module(view.module).show(*_module("subject").complete(kind, preset, given))


def _module(name: str) -> Any:
    return importlib.import_module(f"fastgpt.inspection.{name}")


def _listing() -> str:
    width = max(map(len, VIEWS))
    lines = [f"  {name:{width}}  {view.text}" for name, view in VIEWS.items()]
    usage = "usage: python -m fastgpt.inspect VIEW [SRC] [--flag value ...]"
    return "\n".join([usage, "", *lines, "", "python -m fastgpt.inspect VIEW --help shows a view's flags"])


if __name__ == "__main__":
    barriers.choose(sys.argv)  # before PyTorch is imported
    raise SystemExit(cli.run(main))
