"""Finds a model by its name on Hugging Face's hub, such as gpt2 or openai-community/gpt2, in the user's own cache.

The library huggingface_hub finds it, and downloads it where that is asked for. Only settings, safetensors and the
tokenizer are fetched, no code and no pickle.
"""

from pathlib import Path

from fastgpt.errors import UsageError, shown

CONFIG = "config.json"
FILES = ["*.json", "*.safetensors", "merges.txt"]


def folder(name: str, download: bool, setting: str) -> Path:
    """The folder of a model in the cache. `setting` is the argument that gave the name.

    Raises:
        UsageError: it is not there and may not be, or cannot be, downloaded, or huggingface_hub is not installed.
    """
    try:
        import huggingface_hub
        from huggingface_hub import constants
        from huggingface_hub.errors import HfHubHTTPError
    except ImportError:
        raise UsageError(
            f"`{setting}` {name} is no file or folder here; to look for a model of that name in Hugging Face's cache, "
            "pip install 'fastgpt-engine[hf]'"
        ) from None
    try:
        found = Path(huggingface_hub.snapshot_download(name, allow_patterns=FILES, local_files_only=not download))
        if not download and not ((found / CONFIG).exists() and any(found.glob("*.safetensors"))):
            raise FileNotFoundError("only a part of the model is there")
        return found
    except (OSError, ValueError, HfHubHTTPError) as error:
        if not download:
            raise UsageError(
                f"`{setting}` {name} is no file or folder here, and {constants.HF_HUB_CACHE} has no such model "
                "in safetensors; fetch it with `download=True`, or name a path"
            ) from None
        reason = next(iter(str(error).splitlines()), type(error).__name__)
        raise UsageError(
            f"`{setting}` {name} cannot be downloaded to {constants.HF_HUB_CACHE}: {shown(reason)}; "
            "download it elsewhere and name its folder"
        ) from None
