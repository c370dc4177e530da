"""Names the folder where downloads, timing choices and compiled code are cached."""

import os
from pathlib import Path

from fastgpt.errors import UsageError


def cache_dir() -> Path:
    """$FASTGPT_CACHE, else ~/.cache/fastgpt. The folder may not exist.

    Raises:
        UsageError: it lies in the home folder, and the system knows none.
    """
    folder = os.environ.get("FASTGPT_CACHE") or "~/.cache/fastgpt"
    try:
        return Path(folder).expanduser()
    except RuntimeError:
        raise UsageError(
            f"the cache {folder} lies in a home folder, and there is none; set FASTGPT_CACHE to a folder, or HOME"
        ) from None
