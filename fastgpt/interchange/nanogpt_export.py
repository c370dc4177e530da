"""Writes nanoGPT's ckpt.pt and, for a vocabulary of characters, its meta.pkl.

nanoGPT's sample.py generates from the folder, and its train.py resumes training there. Both files hold tensors and
plain data alone, so `torch.load` reads the checkpoint with its default, `weights_only=True`.

sample.py looks for data/DATASET/meta.pkl, where DATASET is the name that the checkpoint gives. An absolute path there
leads out of data/, so the checkpoint gives its own folder, and nothing need be copied into nanoGPT's. If the folder is
moved, sample.py no longer finds meta.pkl there and takes GPT-2's tokens instead: write the folder anew at its new
place, or leave a link to it at the old one. fastgpt also finds the meta.pkl beside a checkpoint.
"""

import pickle
from pathlib import Path
from typing import Any

import torch

from fastgpt.config.model import ModelConfig
from fastgpt.interchange.exported import DTYPES, RELUS, ExportedModel, beyond_gpt2
from fastgpt.interchange.nanogpt_vocabulary import META
from fastgpt.interchange.nanogpt_weights import CHECKPOINT, EMBEDDING, HEAD, PREFIX, SHAPE
from fastgpt.system import files
from fastgpt.tokenizer.base import Tokenizer
from fastgpt.tokenizer.char import CharTokenizer
from fastgpt.tokenizer.gpt2 import Gpt2Tokenizer

NORM_EPS = 1e-5
VOCABULARIES = (CharTokenizer.kind, Gpt2Tokenizer.kind)
NO_LOSS = 1e9  # nanoGPT's best_val_loss before its first evaluation
# Defaults of nanoGPT's train.py.
LEARNING_RATE, BETAS, WEIGHT_DECAY = 6e-4, (0.9, 0.95), 0.1


def limit(config: ModelConfig, tokenizer: Tokenizer) -> str | None:
    """The parts of a model that nanoGPT cannot hold, as one phrase; None where it can hold all.

    Positions that are added to the embedding are no such part: they fit into its table of positions.
    """
    parts = {
        f"ReLU (`mlp` {config.mlp})": config.mlp in RELUS,
        "an output layer of its own (`tie` off)": not config.tie,
        "biases in some layers alone (`attention_bias`, `mlp_bias`)": (
            {config.has_attention_bias, config.has_mlp_bias} != {config.bias}
        ),
        f"another width of the MLP than 4 x `n_embd` (`n_inner` {config.n_inner})": config.inner != 4 * config.n_embd,
        f"another epsilon than {NORM_EPS} (`norm_eps` {config.norm_eps})": config.norm_eps != NORM_EPS,
        f"a {tokenizer.kind} vocabulary (it has char and gpt2)": tokenizer.kind not in VOCABULARIES,
    }
    return ", ".join([*beyond_gpt2(config), *(part for part, there in parts.items() if there)]) or None


def write(model: ExportedModel, folder: Path, dtype: str, final: Path) -> None:
    """Write ckpt.pt and, for a char vocabulary, meta.pkl.

    Args:
        model: of which `limit` is None. Its `step` and `val_loss` become nanoGPT's.
        folder: where the files are written.
        dtype: of the weights; one of `exported.DTYPES`. nanoGPT computes in float32 or under autocast all the same.
        final: the place that the folder will have, which the checkpoint names.

    Raises:
        OSError: the files cannot be written.
    """
    weights = {PREFIX + name: _stored(tensor, DTYPES[dtype]) for name, tensor in model.tensors.items()}
    weights[HEAD] = weights[PREFIX + EMBEDDING]  # the same tensor, which is saved once
    content = {
        "model": weights,
        "optimizer": _optimizer(model),
        "model_args": {name: getattr(model.config, name) for name in (*SHAPE, "dropout")},
        "iter_num": model.step,
        "best_val_loss": NO_LOSS if model.val_loss is None else model.val_loss,
        "config": {"dataset": files.absolute(final)},
    }
    with (folder / CHECKPOINT).open("wb") as file:
        torch.save(content, file)
    files.sync(folder / CHECKPOINT)
    if isinstance(model.tokenizer, CharTokenizer):
        files.write(folder / META, [pickle.dumps(_meta(model.tokenizer))])


def _stored(tensor: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """A copy on the CPU. torch.save would write all of a storage of which a tensor is a part."""
    return torch.empty(tensor.shape, dtype=dtype).copy_(tensor.detach())


def _meta(tokenizer: CharTokenizer) -> dict[str, Any]:
    return {
        "vocab_size": tokenizer.vocab_size,
        "itos": dict(enumerate(tokenizer.chars)),
        "stoi": {char: id for id, char in enumerate(tokenizer.chars)},
    }


def _optimizer(model: ExportedModel) -> dict[str, Any]:
    """The state of nanoGPT's AdamW before its first step, without which its train.py does not resume."""
    parameters = [torch.empty(tensor.shape, device="meta", requires_grad=True) for tensor in model.tensors.values()]
    groups = [
        {"params": [p for p in parameters if p.dim() >= 2], "weight_decay": WEIGHT_DECAY},
        {"params": [p for p in parameters if p.dim() < 2], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=LEARNING_RATE, betas=BETAS).state_dict()
