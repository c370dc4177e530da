"""Runs nanoGPT's own model.py, to compare its logits with ours.

nanoGPT is no package: it is read from a checkout that the user names. Importing its model.py runs that file.
"""

import contextlib
import importlib.util
import io
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import torch

from fastgpt.errors import UsageError

MODEL = "model.py"
MODULE = "_fastgpt_nanogpt_model"  # no name that an import could mean


def load(ckpt: Path, checkout: Path) -> Callable[[torch.Tensor], torch.Tensor]:
    """Open a checkpoint of ours as nanoGPT's sample.py does.

    Args:
        ckpt: a ckpt.pt that `interchange.nanogpt_export` wrote.
        checkout: a folder with nanoGPT's model.py, which is run.

    Returns:
        A function from token ids (B, T) to logits (B, T, V), float32 on the CPU.

    Raises:
        UsageError: the checkout has no model.py, or another one.
    """
    module = _module(checkout)
    content = torch.load(ckpt, map_location="cpu", weights_only=True)
    try:
        with contextlib.redirect_stdout(io.StringIO()):  # it prints its size
            model = module.GPT(module.GPTConfig(**content["model_args"]))
        model.load_state_dict(content["model"])
        model.eval()
    except Exception as error:  # the code is the user's, and may raise anything
        raise _other(checkout, error) from None

    @torch.no_grad()
    def logits(ids: torch.Tensor) -> torch.Tensor:
        return model(ids, targets=ids)[0].float()  # without targets it gives those of the last position alone

    return logits


def _module(checkout: Path) -> ModuleType:
    path = checkout / MODEL
    if not path.is_file():
        raise UsageError(f"`nanogpt` {checkout} has no {MODEL}; name a checkout of github.com/karpathy/nanoGPT")
    spec = importlib.util.spec_from_file_location(MODULE, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            spec.loader.exec_module(module)
    except Exception as error:
        raise _other(checkout, error) from None
    return module


def _other(checkout: Path, error: Exception) -> UsageError:
    reason = (str(error).splitlines() or [""])[0]
    return UsageError(
        f"`nanogpt` {checkout}: its {MODEL} is not nanoGPT's: {type(error).__name__} {reason:.200}; "
        "name a checkout of github.com/karpathy/nanoGPT"
    )
