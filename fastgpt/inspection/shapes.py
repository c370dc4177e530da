"""The shapes of tensors on their way through one block, as a forward pass had them.

Each step names the line of fastgpt/model/gpt.py that makes the tensor (that of the weights is in
fastgpt_kernels/reference.py), and its shape in the letters of that file.
"""

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import torch

from fastgpt.config.model import ModelConfig
from fastgpt.model.gpt import GPT, Block
from fastgpt.ops.table import Ops

Size = tuple[int, ...]
Pair = tuple[torch.Tensor, torch.Tensor]


class Step(NamedTuple):
    """A tensor, or several of one shape: `numbers` is what `letters` stands for in this pass."""

    name: str
    code: str
    letters: str
    numbers: str


class ShapeRecorder:
    """Keeps the shapes of tensors by name, of the first block and of what lies around the blocks.

    Attributes:
        found: each shape by its name.
    """

    def __init__(self) -> None:
        self.found: dict[str, Size] = {}

    def note(self, **tensors: torch.Tensor) -> None:
        """Keep the shapes of tensors by these names; those of the first block come first, and stay."""
        for name, tensor in tensors.items():
            self.found.setdefault(name, tuple(tensor.shape))

    def watch_norms(self, ops: Ops) -> Ops:
        """The same operations, of which those that normalize are noted: the first of each is in the first block."""

        def alone(norm: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
            def noted(x: torch.Tensor, *rest: Any, **options: Any) -> torch.Tensor:
                y = norm(x, *rest, **options)
                self.note(ln_1=y)
                return y

            return noted

        def after_sum(norm: Callable[..., Pair]) -> Callable[..., Pair]:
            def noted(x: torch.Tensor, *rest: Any, **options: Any) -> Pair:
                total, y = norm(x, *rest, **options)
                self.note(ln_2=y)
                return total, y

            return noted

        return dataclasses.replace(
            ops,
            layer_norm=alone(ops.layer_norm),
            rms_norm=alone(ops.rms_norm),
            add_layer_norm=after_sum(ops.add_layer_norm),
            add_rms_norm=after_sum(ops.add_rms_norm),
        )

    def watch_modules(self, model: GPT) -> None:
        """Note the tensors between the modules of the first block, and the embeddings."""
        first = model.h[0]
        assert isinstance(first, Block)
        first.register_forward_pre_hook(lambda module, inputs: self.note(stream=inputs[0]))
        first.attn.c_proj.register_forward_pre_hook(lambda module, inputs: self.note(joined=inputs[0]))
        first.mlp.c_proj.register_forward_pre_hook(lambda module, inputs: self.note(gated=inputs[0]))
        for name, module in {
            "wte": model.wte,
            "c_attn": first.attn.c_attn,
            "attn": first.attn,
            "c_fc": first.mlp.c_fc,
            "mlp": first.mlp,
        }.items():
            module.register_forward_hook(self._noting(name))

    def _noting(self, name: str) -> Callable[[torch.nn.Module, tuple, torch.Tensor], None]:
        return lambda module, inputs, output: self.note(**{name: output})

    def steps(self, config: ModelConfig) -> list[Step]:
        """The steps of a whole pass whose logits were noted as well, in the order of the code."""
        return [
            Step(name, code, letters, f"{count} x {self._shown(key)}" if count else self._shown(key))
            for name, code, letters, key, count in _described(config)
        ]

    def _shown(self, key: str) -> str:
        return f"({', '.join(map(str, self.found[key]))})"


def _described(config: ModelConfig) -> list[tuple[str, str, str, str, int]]:
    """Of each step: its name, its code, its letters, the recorder's name for its tensor, how many there are or 0."""
    split = "q, k, v = heads.split([self.H, self.Hkv, self.Hkv], dim=2)"
    if config.kv_heads == config.n_head:
        heads = [("queries, keys, values", split, "3 x (B, T, H, D)", "q", 3)]
    else:
        heads = [
            ("queries", split, "(B, T, H, D)", "q", 0),
            ("keys, values, each for H / Hkv heads", split, "2 x (B, T, Hkv, D)", "k", 2),
        ]
    if config.qk_norm:
        heads.append(("queries and keys, normalized", "q, k = self.normalize_heads(q, k)", "(B, T, H, D)", "q", 0))
    if config.position == "rotary":
        turned = "q, k = rotate(q, rotation), rotate(k, rotation)"
        heads.append(("queries and keys, turned by position", turned, "(B, T, H, D)", "q", 0))
    code = "self.activation(self.c_fc(x))"
    inside = [("MLP, inside", code, "(B, T, inner)", "c_fc", 0)]
    if config.mlp == "swiglu":
        inside = [
            ("MLP's gate and values, in one product", code, "(B, T, 2 * inner)", "c_fc", 0),
            ("values times the gate's SiLU", code, "(B, T, inner)", "gated", 0),
        ]
    attention = "y = self.ops.causal_attention(q, k, v, dropout_p=dropout_p, seed=seed, doc_ids=doc_ids)"
    scores = 'scores = torch.einsum("bihd,bjhd->bhij", q, k) * (D**-0.5 if scale is None else scale)'
    return [
        ("token ids", "x = self.hidden(tokens, doc_ids, cache)", "(B, T)", "tokens", 0),
        ("token embeddings", "x = self.wte(tokens)", "(B, T, C)", "wte", 0),
        ("residual stream, with positions", "x, rotation = self.embed(tokens, here)", "(B, T, C)", "stream", 0),
        ("normalized", "x, y = add_norm(self.ops, x, branch, self.ln_1)", "(B, T, C)", "ln_1", 0),
        ("all heads in one product", "heads = self.c_attn(x)", "(B, T, (H + 2 * Hkv) * D)", "c_attn", 0),
        *heads,
        ("attention weights: the maps", scores, "(B, H, T, T)", "weights", 0),
        ("values, mixed by the weights", attention, "(B, T, H, D)", "mixed", 0),
        ("heads side by side", "y.reshape(B, T, self.H * self.D)", "(B, T, H * D)", "joined", 0),
        ("attention's output", "return self.c_proj(y.reshape(B, T, self.H * self.D))", "(B, T, C)", "attn", 0),
        ("added to the stream, normalized", "x, y = add_norm(self.ops, x, branch, self.ln_2)", "(B, T, C)", "ln_2", 0),
        *inside,
        ("MLP's output", "return self.c_proj(self.activation(self.c_fc(x)))", "(B, T, C)", "mlp", 0),
        (
            "after the last block, normalized",
            "return add_norm(self.ops, x, branch, self.ln_f)[1]",
            "(B, T, C)",
            "hidden",
            0,
        ),
        (
            "logits",
            "scores = self.output_layer.scores(x)[..., : self.config.vocab_size]",
            "(B, T, V)",
            "logits",
            0,
        ),
    ]
