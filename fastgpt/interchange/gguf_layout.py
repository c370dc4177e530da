"""The names of a GPT-2's weights in GGUF files, and the library that knows the types of their tensors.

(https://github.com/ggml-org/ggml, docs/gguf.md, and the converter of https://github.com/ggml-org/llama.cpp.)
"""

import re
from typing import Any

from fastgpt.errors import UsageError

ARCHITECTURE = "gpt2"
EMBEDDING, HEAD = "token_embd.weight", "output.weight"
PARTS = {
    "wte": "token_embd",
    "wpe": "position_embd",
    "ln_1": "attn_norm",
    "attn.c_attn": "attn_qkv",
    "attn.c_proj": "attn_output",
    "ln_2": "ffn_norm",
    "mlp.c_fc": "ffn_up",
    "mlp.c_proj": "ffn_down",
    "ln_f": "output_norm",
    "lm_head": "output",
}
OURS = {theirs: ours for ours, theirs in PARTS.items()}


def gguf_name(name: str) -> str:
    """GPT-2's name of a parameter in GGUF's words: h.3.attn.c_attn.bias -> blk.3.attn_qkv.bias."""
    part, kind = name.rsplit(".", 1)
    if layer := re.match(r"h\.(\d+)\.", part):
        return f"blk.{layer[1]}.{PARTS[part[layer.end() :]]}.{kind}"
    return f"{PARTS[part]}.{kind}"


def our_name(name: str) -> str:
    """The inverse of `gguf_name`; a name that is not known stays."""
    part, _, kind = name.rpartition(".")
    if (layer := re.match(r"blk\.(\d+)\.", part)) and (inner := part[layer.end() :]) in OURS:
        return f"h.{layer[1]}.{OURS[inner]}.{kind}"
    return f"{OURS[part]}.{kind}" if part in OURS else name


def library() -> Any:
    """The package gguf. Raises `UsageError` where it is not installed."""
    try:
        import gguf
        import gguf.quants
    except ImportError:
        raise UsageError("GGUF files need the gguf library; pip install 'fastgpt-engine[gguf]'") from None
    return gguf
