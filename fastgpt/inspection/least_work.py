"""The least work of each operation of a profile: its calls, what they compute and the bytes that they must move.

Bytes are counted as if every product's inputs were in the dtype of the arithmetic already. What stays float32 in every
dtype is counted so: the residual stream with its norms, the embedding, gradients and weights in the update.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import torch

from fastgpt.config.model import ModelConfig
from fastgpt.config.training import TrainConfig
from fastgpt.inspection.scopes import BACKWARD, FORWARD, UPDATE
from fastgpt.ops.ceilings import Ceilings, Limit, dtype_name
from fastgpt.ops.counts import Count, count

FLOAT32 = 4  # bytes
PRODUCTS = ("linear", "causal_attention", "linear_cross_entropy")  # computed in the dtype of the arithmetic


@dataclass(frozen=True)
class Work:
    """All calls of an operation.

    Attributes:
        counts: of one call, by direction.
        arithmetic: what its products are computed in.
    """

    calls: int
    counts: Mapping[str, Count]
    arithmetic: str = "float32"

    def limit(self, ceilings: Ceilings) -> Limit:
        """The least time of all calls, and which ceiling sets most of it."""
        each = [
            ceilings.limit(bytes=one.bytes, flops=one.flops, arithmetic=self.arithmetic) for one in self.counts.values()
        ]
        return Limit(max(each, key=lambda one: one.seconds).by, self.calls * sum(one.seconds for one in each))


Works = dict[str, Work]  # by the names of operations


def of_training(config: TrainConfig, parameters: int, device: torch.device, dtype: torch.dtype) -> Works:
    """Those of a step with one micro-batch.

    Args:
        parameters: the numbers that are trained, the vocabulary's padding included.
    """
    B, T, L, C, H = config.batch_size, config.block_size, config.n_layer, config.n_embd, config.n_head
    N, name = B * T, products(device, dtype)

    def trained(calls: int, op: str, itemsize: int, **shape: int) -> Work:
        counts = {way: count(op, way, shape, itemsize) for way in (FORWARD, BACKWARD)}
        return Work(calls, counts, name if op in PRODUCTS else "float32")

    def updated(op: str) -> Work:
        return Work(1, {UPDATE: count(op, FORWARD, {"P": parameters}, FLOAT32)})

    heads = {"H": H, "D": config.head_size, "Hkv": config.kv_heads}
    attention = trained(L, "causal_attention", dtype.itemsize, B=B, T=T, **heads)
    if config.pack:  # the documents, which nobody knows before the data, decide how much is seen
        attention = Work(L, {way: Count(0, one.bytes) for way, one in attention.counts.items()})
    linears = {
        op: trained(L, "linear", dtype.itemsize, N=N, C=inputs, out=out, bias=int(config.bias))
        for op, (inputs, out) in _linears(config).items()
    }
    works = {
        "embedding": trained(1, "embedding", FLOAT32, N=N, **_table(config, T)),
        "layer_norm": trained(1, "layer_norm", FLOAT32, N=N, C=C),
        "add_layer_norm": trained(2 * L, "add_layer_norm", FLOAT32, N=N, C=C),
        "causal_attention": attention,
        **linears,
        "activation": trained(L, "activation", dtype.itemsize, N=N, C=config.inner),
        "linear_cross_entropy": trained(1, "linear_cross_entropy", dtype.itemsize, N=N, C=C, V=config.known_vocab),
        "clip": updated("gradient_norm"),
        "optimizer": updated("adamw"),
    }
    if config.dropout:
        works["dropout"] = trained(2 * L + 1, "dropout", dtype.itemsize, N=N, C=C)
    return works


def of_tokens(config: ModelConfig, cached: int, T: int, device: torch.device, dtype: torch.dtype) -> Works:
    """Those of computing T tokens of one sequence after those in the cache, and the logits of the last."""
    L, C, size, name = config.n_layer, config.n_embd, dtype.itemsize, products(device, dtype)

    def forward(calls: int, op: str, **shape: int) -> Work:
        return Work(calls, {FORWARD: count(op, FORWARD, shape, size)}, name if op in PRODUCTS else "float32")

    heads = {"H": config.n_head, "D": config.head_size, "Hkv": config.kv_heads}
    linears = {
        op: forward(L, "linear", N=T, C=inputs, out=out, bias=int(config.bias))
        for op, (inputs, out) in _linears(config).items()
    }
    return {
        "embedding": forward(1, "embedding", N=T, **_table(config, T)),
        "layer_norm": forward(1, "layer_norm", N=T, C=C),
        "add_layer_norm": forward(2 * L, "add_layer_norm", N=T, C=C),
        "cache": forward(L, "kv_write", N=T, H=config.kv_heads, D=config.head_size),
        "causal_attention": forward(L, "causal_attention", B=1, T=T, cached=cached, **heads),
        **linears,
        "activation": forward(L, "activation", N=T, C=config.inner),
        "logits": forward(1, "linear", N=1, C=C, out=config.known_vocab),
    }


def products(device: torch.device, dtype: torch.dtype) -> str:
    """The arithmetic of matrix products, by the name that `Ceilings.matmul` has for it."""
    tf32 = device.type == "cuda" and dtype == torch.float32 and torch.backends.cuda.matmul.fp32_precision == "tf32"
    return "tf32" if tf32 else dtype_name(dtype)


def _linears(config: ModelConfig) -> dict[str, tuple[int, int]]:
    """Inputs and outputs of a layer's linear layers."""
    C, heads = config.n_embd, config.n_head + 2 * config.kv_heads
    return {
        "qkv": (C, heads * config.head_size),
        "attention projection": (C, C),
        "MLP up": (C, config.inner),
        "MLP down": (config.inner, C),
    }


def _table(config: ModelConfig, T: int) -> dict[str, int]:
    """The shape of the embedding, with the positions that are learned."""
    return {"C": config.n_embd, "V": config.known_vocab, "positions": T if config.position == "learned" else 0}
