"""The forms of a text that names a model: a path, a step's folder, a name on Hugging Face's hub."""

import os
import re
from pathlib import Path

HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]{0,95}(/[\w.-]{1,96})?", re.ASCII)
STEP_NAME = re.compile(r"step-(\d{6}|[1-9]\d{6,17})", re.ASCII)  # of a checkpoint's folder


def exists(path: str | Path) -> bool:
    """Whether there is such a file or folder, as far as this process may see."""
    try:
        return Path(path).exists()
    except (OSError, ValueError):  # too long for a name, or a folder that may not be entered
        return False


def is_step_in(path: str, out_dir: str) -> bool:
    """Whether a path is that of a step's folder in a run's folder."""
    folder, name = os.path.split(os.path.normpath(path))
    return STEP_NAME.fullmatch(name) is not None and os.path.realpath(folder) == os.path.realpath(out_dir)


def could_be_hub_name(source: str) -> bool:
    """Whether a text that is no path has the form of a model's name on the hub, such as gpt2 or owner/name."""
    named = HUB_NAME.fullmatch(source) is not None and not source.endswith((".pt", ".gguf"))
    return named and not exists(source) and not ("/" in source and exists(source.partition("/")[0]))
