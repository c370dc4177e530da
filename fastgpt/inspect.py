"""Look inside: what a model does with a text, and where its memory and time go.

python -m fastgpt.inspect attention out --text "The with statement" --output page.html
python -m fastgpt.inspect memory --preset gpt2 --fit 8GiB
python -m fastgpt.inspect profile --preset cpu
python -m fastgpt.inspect machine
"""

import importlib
import sys
from collections.abc import Sequence
from typing import NamedTuple

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
    of_work = issubclass(view.config, WorkConfig)
    preset, given = cli.read(
        view.config,
        rest,
        prog=f"python -m fastgpt.inspect {name}",
        description=f"{view.text[0].upper()}{view.text[1:]}.",
        presets={preset: view.config.of(config) for preset, config in PRESETS.items()} if of_work else None,
        unnamed=("src",),
        shares=TrainConfig if of_work else None,
    )
    # Only now, as they import PyTorch, which takes a second that --help and a mistyped flag do not wait for.
    module = importlib.import_module(f"fastgpt.inspection.{view.module}")
    if not of_work:
        return module.show(cli.change(view.config(), given))
    from fastgpt.inspection import subject

    return module.show(*subject.complete(view.config, preset, given))


def _listing() -> str:
    width = max(map(len, VIEWS))
    lines = [f"  {name:{width}}  {view.text}" for name, view in VIEWS.items()]
    usage = "usage: python -m fastgpt.inspect VIEW [SRC] [--flag value ...]"
    return "\n".join([usage, "", *lines, "", "python -m fastgpt.inspect VIEW --help shows a view's flags"])


if __name__ == "__main__":
    barriers.choose(sys.argv)  # before PyTorch is imported
    raise SystemExit(cli.run(main))
