"""The least work of each operation of a profile: its calls, what they compute and the bytes that they must move.

Bytes are counted as if every product's inputs were in the dtype of the arithmetic already. What stays float32 in every
dtype is counted so: the residual stream with its norms, the embedding, gradients and weights in the update.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import torch

from fastgpt.config.model import ModelConfig
from fastgpt.config.training import TrainConfig
from fastgpt.inspection.scopes import BACKWARD, FORWARD, QK_NORM, UPDATE
from fastgpt.model.activations import ACTIVATIONS
from fastgpt.model.gpt import GPT
from fastgpt.model.matrices import hidden_matrices, hidden_weights
from fastgpt.model.moments import count_hidden
from fastgpt.ops.ceilings import Ceilings, Limit, dtype_name
from fastgpt.ops.counts import Count, count
from fastgpt.training.orthogonalize import METHODS, product_flops

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

    heads = {"H": H, "D": config.head_dim, "Hkv": config.kv_heads}
    attention = trained(L, "causal_attention", dtype.itemsize, B=B, T=T, **heads)
    if config.pack:  # the documents, which nobody knows before the data, decide how much is seen
        attention = Work(L, {way: Count(0, one.bytes) for way, one in attention.counts.items()})
    linears = {op: trained(L, "linear", dtype.itemsize, N=N, **shape) for op, shape in _linears(config).items()}
    norm = _norm(config)
    works = {
        "embedding": trained(1, "embedding", FLOAT32, N=N, **_table(config, T)),
        norm: trained(1, norm, FLOAT32, N=N, C=C),
        f"add_{norm}": trained(2 * L, f"add_{norm}", FLOAT32, N=N, C=C),
        "causal_attention": attention,
        **linears,
        "activation": trained(L, _activation(config), dtype.itemsize, N=N, C=config.inner),
        "linear_cross_entropy": trained(1, "linear_cross_entropy", dtype.itemsize, N=N, C=C, V=config.known_vocab),
        "clip": updated("gradient_norm"),
        "optimizer": Work(1, {UPDATE: _update(config, parameters)}),
    }
    if config.qk_norm:
        works[QK_NORM] = trained(L, "rms_norm", dtype.itemsize, N=N * (H + config.kv_heads), C=config.head_dim)
    if config.dropout:
        works["dropout"] = trained(2 * L + 1, "dropout", dtype.itemsize, N=N, C=C)
    return works


def of_tokens(config: ModelConfig, cached: int, T: int, device: torch.device, dtype: torch.dtype) -> Works:
    """Those of computing T tokens of one sequence after those in the cache, and the logits of the last."""
    L, C, size, name = config.n_layer, config.n_embd, dtype.itemsize, products(device, dtype)

    def forward(calls: int, op: str, **shape: int) -> Work:
        return Work(calls, {FORWARD: count(op, FORWARD, shape, size)}, name if op in PRODUCTS else "float32")

    heads = {"H": config.n_head, "D": config.head_dim, "Hkv": config.kv_heads}
    linears = {op: forward(L, "linear", N=T, **shape) for op, shape in _linears(config).items()}
    norm = _norm(config)
    works = {
        "embedding": forward(1, "embedding", N=T, **_table(config, T)),
        norm: forward(1, norm, N=T, C=C),
        f"add_{norm}": forward(2 * L, f"add_{norm}", N=T, C=C),
        "cache": forward(L, "kv_write", N=T, H=config.kv_heads, D=config.head_dim),
        "causal_attention": forward(L, "causal_attention", B=1, T=T, cached=cached, **heads),
        **linears,
        "activation": forward(L, _activation(config), N=T, C=config.inner),
        "logits": forward(1, "linear", N=1, C=C, out=config.known_vocab),
    }
    if config.qk_norm:
        heads = config.n_head + config.kv_heads
        works[QK_NORM] = forward(L, "rms_norm", N=T * heads, C=config.head_dim)
    return works


def _update(config: TrainConfig, parameters: int) -> Count:
    """All of an optimizer's step."""
    if config.optimizer != "muon":
        return count("adamw", FORWARD, {"P": parameters}, FLOAT32)
    weights, operations = (count_hidden(config, measure) for measure in (hidden_weights, _muon_products))
    others = count("adamw", FORWARD, {"P": parameters - weights}, FLOAT32)
    return others + count("muon", FORWARD, {"P": weights, "products": operations}, FLOAT32)


def _muon_products(model: GPT) -> int:
    """Operations of the default method's products for all matrices."""
    sizes = [(rows, weight.shape[1]) for weight, parts in hidden_matrices(model).items() for rows in parts]
    return sum(product_flops(min(size), max(size), METHODS[TrainConfig.muon_method]) for size in sizes)


def products(device: torch.device, dtype: torch.dtype) -> str:
    """The arithmetic of matrix products, by the name that `Ceilings.matmul` has for it."""
    tf32 = device.type == "cuda" and dtype == torch.float32 and torch.backends.cuda.matmul.fp32_precision == "tf32"
    return "tf32" if tf32 else dtype_name(dtype)


def _linears(config: ModelConfig) -> dict[str, dict[str, int]]:
    """The shapes of a layer's linear layers: inputs, outputs, and whether there is a bias."""
    C, D, inner = config.n_embd, config.head_dim, config.inner
    attention, mlp = int(config.has_attention_bias), int(config.has_mlp_bias)
    return {
        "qkv": {"C": C, "out": (config.n_head + 2 * config.kv_heads) * D, "bias": attention},
        "attention projection": {"C": config.n_head * D, "out": C, "bias": attention},
        "MLP up": {"C": C, "out": 2 * inner if config.mlp == "swiglu" else inner, "bias": mlp},
        "MLP down": {"C": inner, "out": C, "bias": mlp},
    }


def _norm(config: ModelConfig) -> str:
    """The table's operation for a norm of the residual stream."""
    return "rms_norm" if config.norm == "rmsnorm" else "layer_norm"


def _activation(config: ModelConfig) -> str:
    """The operation that the activation is counted as."""
    return "activation" if config.mlp in ACTIVATIONS else config.mlp


def _table(config: ModelConfig, T: int) -> dict[str, int]:
    """The shape of the embedding, with the positions that are learned."""
    return {"C": config.n_embd, "V": config.known_vocab, "positions": T if config.position == "learned" else 0}
