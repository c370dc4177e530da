"""The GPT, built from the table's operations.

GPT-2 as published (Radford et al., 2019): token and position embeddings, L pre-LayerNorm blocks, GELU in its
tanh form, a final LayerNorm, and an output layer tied to the token embedding. Parameters carry GPT-2's names.
`ModelConfig` says what may differ; docs/models.md has the formula and the source of each option.

Letters, here and everywhere: B batch, T time (tokens), C channels (n_embd), H heads, D head size,
V vocabulary, L layers, S cache slots, P page size.
"""

import math
from collections.abc import Mapping
from typing import Protocol

import torch
import torch.nn as nn
import torch.nn.functional as F

from fastgpt.config.model import ModelConfig
from fastgpt.errors import CorruptCheckpoint
from fastgpt.model.activations import activation
from fastgpt.model.linear import Embedding, Linear, store_by_columns
from fastgpt.model.positions import position_table, positions_in_documents, rotate
from fastgpt.ops import table
from fastgpt.ops.table import Ops
from fastgpt_kernels.reference import capped

VOCABULARY = ("wte.weight", "lm_head.weight")  # parameters with a row for each token, padded to a multiple of 128


class Cache(Protocol):
    """Keys and values of the tokens so far; see `fastgpt.model.kv_cache`."""

    def positions(self, T: int) -> slice | torch.Tensor: ...

    def attend(self, ops: Ops, layer: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor: ...

    def advance(self, tokens: int) -> None: ...


class Norm(nn.Module):
    """The gain, bias and epsilon of a norm over some channels; the operation itself comes from the table.

    Attributes:
        weight, bias: (channels,) each, or None. An RMS norm has no bias.
    """

    def __init__(self, config: ModelConfig, channels: int, kind: str):
        super().__init__()
        self.kind, self.eps = kind, config.norm_eps
        self.weight = nn.Parameter(torch.ones(channels)) if config.norm_gain else None
        self.bias = nn.Parameter(torch.zeros(channels)) if config.bias and kind == "layernorm" else None


class Attention(nn.Module):
    """Causal self-attention with H query heads that share Hkv key and value heads."""

    def __init__(self, config: ModelConfig, ops: Ops, layer: int):
        super().__init__()
        C, self.H, self.Hkv, self.D = config.n_embd, config.n_head, config.kv_heads, config.head_dim
        self.ops, self.layer, self.dropout = ops, layer, config.attention_rate
        self.c_attn = Linear(C, (self.H + 2 * self.Hkv) * self.D, bias=config.has_attention_bias)
        self.c_attn.parts = (self.H * self.D, self.Hkv * self.D, self.Hkv * self.D)  # q, k, v
        self.c_proj = Linear(self.H * self.D, C, bias=config.has_attention_bias)
        self.qk_norm = config.qk_norm
        if self.qk_norm:
            self.q_norm, self.k_norm = Norm(config, self.D, "rmsnorm"), Norm(config, self.D, "rmsnorm")

    def forward(
        self,
        x: torch.Tensor,  # (B, T, C)
        rotation: torch.Tensor | None,
        seed: torch.Tensor | None,
        doc_ids: torch.Tensor | None,
        cache: Cache | None,
    ) -> torch.Tensor:
        B, T, _ = x.shape
        heads = self.c_attn(x).view(B, T, self.H + 2 * self.Hkv, self.D)
        q, k, v = heads.split([self.H, self.Hkv, self.Hkv], dim=2)  # each (B, T, heads, D)
        if self.qk_norm:
            q, k = self.normalize_heads(q, k)
        if rotation is not None:
            q, k = rotate(q, rotation), rotate(k, rotation)
        if cache is not None:
            y = cache.attend(self.ops, self.layer, q, k, v)
        else:
            dropout_p = self.dropout if self.training else 0.0
            y = self.ops.causal_attention(q, k, v, dropout_p=dropout_p, seed=seed, doc_ids=doc_ids)
        return self.c_proj(y.reshape(B, T, self.H * self.D))

    def normalize_heads(self, q: torch.Tensor, k: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Queries and keys (B, T, heads, D), each scaled to a root mean square of 1, times its gain."""
        return normalize(self.ops, q, self.q_norm), normalize(self.ops, k, self.k_norm)


class MLP(nn.Module):
    """Two linear layers around an activation. That of SwiGLU halves the width, so the first is twice as wide."""

    def __init__(self, config: ModelConfig, ops: Ops):
        super().__init__()
        parts = (config.inner, config.inner) if config.mlp == "swiglu" else (config.inner,)
        self.c_fc = Linear(config.n_embd, sum(parts), bias=config.has_mlp_bias)
        self.c_fc.parts = parts
        self.c_proj = Linear(config.inner, config.n_embd, bias=config.has_mlp_bias)
        self.activation = activation(config.mlp, ops)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.c_proj(self.activation(self.c_fc(x)))


class Block(nn.Module):
    """Attention and MLP, each after a norm that first adds the output of the branch before it."""

    def __init__(self, config: ModelConfig, ops: Ops, layer: int):
        super().__init__()
        self.ops, self.dropout = ops, config.dropout
        self.ln_1, self.ln_2 = (Norm(config, config.n_embd, config.norm) for _ in range(2))
        self.attn, self.mlp = Attention(config, ops, layer), MLP(config, ops)

    def forward(
        self,
        x: torch.Tensor,
        branch: torch.Tensor | None,
        rotation: torch.Tensor | None,
        seed: torch.Tensor | None,
        doc_ids: torch.Tensor | None,
        cache: Cache | None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """(residual stream, branch still to be added) -> the same after this block; each (B, T, C)."""
        x, y = add_norm(self.ops, x, branch, self.ln_1)
        branch = F.dropout(self.attn(y, rotation, seed, doc_ids, cache), self.dropout, self.training)
        x, y = add_norm(self.ops, x, branch, self.ln_2)
        return x, F.dropout(self.mlp(y), self.dropout, self.training)


class GPT(nn.Module):
    """A GPT of the given shape whose operations come from `ops` (default: PyTorch's own)."""

    def __init__(self, config: ModelConfig, ops: Ops | None = None):
        super().__init__()
        self.config = config.architecture()
        self.ops = ops or table.resolve("torch")
        C, block = config.n_embd, config.block_size
        self.wte = Embedding(config.padded_vocab, C)
        self.wpe = Embedding(block, C) if config.position == "learned" else None
        self.h = nn.ModuleList(Block(config, self.ops, layer) for layer in range(config.n_layer))
        self.ln_f = Norm(config, C, config.norm)
        self.lm_head = None if config.tie else Embedding(config.padded_vocab, C)
        self.register_buffer("table", position_table(config), persistent=False)
        self.table: torch.Tensor | None
        if not self.wte.weight.is_meta:
            self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Draw the weights as GPT-2 did: N(0, 0.02), residual projections by 0.02 / sqrt(2L), biases 0.

        With `zero_init`, residual projections are 0, so that each block begins as the identity, and so is an output
        layer of its own, so that all tokens begin as likely.
        """
        zeros, residual = self.config.zero_init, 0.02 / math.sqrt(2 * self.config.n_layer)
        for name, parameter in self.named_parameters():
            if parameter.dim() == 2:
                last = name.endswith("c_proj.weight")
                parameter.normal_(0.0, residual if last else 0.02)
                if zeros and (last or name == "lm_head.weight"):
                    parameter.zero_()
            elif name.endswith("bias"):
                parameter.zero_()
        for name, parameter in self.named_parameters():
            if name in VOCABULARY:
                parameter[self.config.vocab_size :].zero_()  # padding: never read, and so never trained

    def num_parameters(self) -> int:
        """The number of trained numbers. A tied output layer counts once, the vocabulary's padding not at all."""
        padding = (self.config.padded_vocab - (self.config.vocab_size or 0)) * self.config.n_embd
        return sum(p.numel() - (padding if name in VOCABULARY else 0) for name, p in self.named_parameters())

    @property
    def device(self) -> torch.device:
        return self.wte.weight.device

    @property
    def dtype(self) -> torch.dtype:
        """The dtype that it computes in without autocast; its matrices may be int8."""
        return self.wte.dtype

    @property
    def output_layer(self) -> Embedding:
        """The layer of the logits: the token embedding, unless it has a matrix of its own."""
        return self.wte if self.lm_head is None else self.lm_head

    def weights(self) -> dict[str, torch.Tensor]:
        """Every parameter by GPT-2's name, without the vocabulary's padding."""
        return {name: self.unpad(name, p.detach()) for name, p in self.named_parameters()}

    @classmethod
    def from_weights(
        cls,
        config: ModelConfig,
        ops: Ops,
        weights: Mapping[str, torch.Tensor],
        device: torch.device,
        dtype: torch.dtype,
    ) -> "GPT":
        """A model ready to evaluate, its parameters in `dtype`, without drawing weights first.

        Raises:
            CorruptCheckpoint: the weights' names or shapes are not this model's.
        """
        with torch.device("meta"):
            model = cls(config, ops)
        # `Module.to_empty` would import sympy: half a second until the first token.
        model.load_state_dict(
            {name: torch.empty(p.shape, dtype=dtype, device=device) for name, p in model.named_parameters()},
            assign=True,
        )
        with device:
            model.table = position_table(config)  # float32 in every dtype, as in training
        model.load_weights(weights)
        store_by_columns(model)
        return model.eval()

    @torch.no_grad()
    def load_weights(self, weights: Mapping[str, torch.Tensor]) -> None:
        """Copy the weights that the method `weights` gave, one after another.

        Raises:
            CorruptCheckpoint: a name or a shape differs.
        """
        own = self.weights()
        if missing := own.keys() ^ weights.keys():
            raise CorruptCheckpoint(f"the checkpoint's weights are not this model's: {', '.join(sorted(missing))}")
        for name, parameter in self.named_parameters():
            tensor = weights[name]
            if not tensor.is_floating_point():
                raise CorruptCheckpoint(f"the checkpoint's {name} is of type {tensor.dtype}")
            if tensor.shape != own[name].shape:
                raise CorruptCheckpoint(
                    f"the checkpoint's {name} is {tuple(tensor.shape)}, and the run's configuration and "
                    f"vocabulary need {tuple(own[name].shape)}"
                )
            parameter[: len(tensor)].copy_(tensor)
            parameter[len(tensor) :].zero_()  # the vocabulary's padding

    def unpad(self, name: str, tensor: torch.Tensor) -> torch.Tensor:
        """A parameter's tensor without the vocabulary's padding, which only `VOCABULARY` has."""
        return tensor[: self.config.vocab_size].contiguous() if name in VOCABULARY else tensor

    def pad(self, name: str, tensor: torch.Tensor) -> torch.Tensor:
        """The inverse of `unpad`, with zeros."""
        if name not in VOCABULARY:
            return tensor
        return F.pad(tensor, (0, 0, 0, self.config.padded_vocab - len(tensor)))

    def forward(
        self,
        tokens: torch.Tensor,
        targets: torch.Tensor | None = None,
        *,
        doc_ids: torch.Tensor | None = None,
        cache: Cache | None = None,
        last_only: bool = False,
    ) -> torch.Tensor:
        """Logits of the next token, or the mean loss of predicting the targets.

        Args:
            tokens: int64 (B, T); with a cache, the tokens that follow those in it.
            targets: int64 (B, T), -100 where a position does not count.
            doc_ids: integer (B, T), one number for the tokens of a document, which lie together. Each document is
                computed as if it were alone: attention stays within it, and positions restart. Not with a cache.
            cache: keys and values of earlier tokens; extended in place.
            last_only: logits of the last position alone.

        Returns:
            A scalar in nats with targets, otherwise logits (B, T or 1, V); float32, float64 for float64 weights.

        Raises:
            ValueError: more tokens than block_size, or doc_ids together with a cache.
        """
        if doc_ids is not None and cache is not None:
            raise ValueError("doc_ids cannot go with a cache, which does not keep the documents of earlier tokens")
        x = self.hidden(tokens, doc_ids, cache)
        if targets is not None:
            return self.ops.linear_cross_entropy(
                x,
                self.output_layer.weight,
                targets,
                valid_vocab=self.config.vocab_size,
                softcap=self.config.logit_softcap,
            )
        return self.logits(x[:, -1:] if last_only else x)

    def logits(self, x: torch.Tensor) -> torch.Tensor:
        """Scores of each token of the vocabulary as the next one: hidden states (..., C) -> (..., V), float32.

        They stay float32 in every dtype: rounded to 16 bits, the likeliest tokens would tie.
        """
        scores = self.output_layer.scores(x)[..., : self.config.vocab_size]
        return capped(scores, self.config.logit_softcap)

    def hidden(
        self, tokens: torch.Tensor, doc_ids: torch.Tensor | None = None, cache: Cache | None = None
    ) -> torch.Tensor:
        """The last layer's normalized states, (B, T) -> (B, T, C)."""
        T = tokens.shape[1]
        if cache is None and self.config.block_size < T:
            raise ValueError(f"{T} tokens do not fit in block_size {self.config.block_size}")
        if doc_ids is not None:
            here = positions_in_documents(doc_ids)
        else:
            here = slice(0, T) if cache is None else cache.positions(T)
        x, rotation = self.embed(tokens, here)
        x = F.dropout(x, self.config.dropout, self.training)
        dropping = self.training and self.config.attention_rate > 0
        seeds = torch.randint(2**31 - 1, (len(self.h),), device=x.device) if dropping else None
        branch = None
        for layer, block in enumerate(self.h):
            seed = seeds[layer] if seeds is not None else None
            x, branch = block(x, branch, rotation, seed, doc_ids, cache)
        if cache is not None:
            cache.advance(T)
        return add_norm(self.ops, x, branch, self.ln_f)[1]

    def embed(self, tokens: torch.Tensor, here: slice | torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Tokens (B, T) at the positions `here`, (T,) or (B, T) -> (B, T, C), and the rotation of rotary positions."""
        x = self.wte(tokens)
        if self.wpe is not None:
            return x + (self.wpe.weight[here] if isinstance(here, slice) else self.wpe(here)), None
        if self.table is None:
            return x, None
        if self.config.position == "sinusoidal":
            return x + self.table[here].to(x.dtype), None
        return x, self.table[here]


def normalize(ops: Ops, x: torch.Tensor, norm: Norm) -> torch.Tensor:
    """The norm of x over its last dimension: (..., channels) -> the same."""
    if norm.kind == "rmsnorm":
        return ops.rms_norm(x, norm.weight, eps=norm.eps)
    return ops.layer_norm(x, norm.weight, norm.bias, eps=norm.eps)


def add_norm(ops: Ops, x: torch.Tensor, branch: torch.Tensor | None, norm: Norm) -> tuple[torch.Tensor, torch.Tensor]:
    """Add the branch to the residual stream, if there is one, and normalize: (stream, its norm)."""
    if branch is None:
        return x, normalize(ops, x, norm)
    if norm.kind == "rmsnorm":
        return ops.add_rms_norm(x, branch, norm.weight, eps=norm.eps)
    return ops.add_layer_norm(x, branch, norm.weight, norm.bias, eps=norm.eps)
