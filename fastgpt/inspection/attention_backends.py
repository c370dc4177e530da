"""Tries each backend of PyTorch's scaled dot-product attention (SDPA) on the shapes of a model.

A model's attention is PyTorch's where the table's torch column computes it. That column multiplies matrices itself in
some cases; its own rule is asked, not repeated here.
"""

import math
import re
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from fastgpt.config.inspection import WorkConfig
from fastgpt.inspection.facts import Fact, Section
from fastgpt.ops.ceilings import dtype_name
from fastgpt.system import torch_private
from fastgpt.system.units import counted, format_bytes
from fastgpt_kernels import torch_ops

BACKENDS = {
    "flash": SDPBackend.FLASH_ATTENTION,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
    "cudnn": SDPBackend.CUDNN_ATTENTION,
    "math": SDPBackend.MATH,
}
ON_CPU = ("flash", "math")
# A trial is as large as the model, up to these: which backends there are does not depend on more.
MOST_TOKENS = 4096
LARGEST = 256 << 20  # bytes of the scores, all of which the math backend holds
# Lines that PyTorch writes around a reason: titles, and the backends that the trial itself left out.
NO_REASON = re.compile(r"not used because:$|runtime disabled|No (available|viable)", re.IGNORECASE)
TRIGGERED = re.compile(r"\s*\(Triggered internally at .*\)")


class Trial:
    """Attention of one sequence at a model's shapes: queries (1, H, T, D), keys and values (1, Hkv, T, D).

    Of many heads over a long context only those are tried that share a key.
    """

    def __init__(self, config: WorkConfig, device: torch.device, dtype: torch.dtype, gradients: bool):
        H, kv, T, D = config.n_head, config.kv_heads, min(config.block_size, MOST_TOKENS), config.head_dim
        if H * T * T * 4 > LARGEST:
            H, kv = H // kv, 1
        self.gradients, self.scores = gradients, H * T * T * 4
        shape = {"q": (1, T, H, D), "k": (1, T, kv, D), "v": (1, T, kv, D)}
        laid = {name: torch.zeros(sizes, device=device, dtype=dtype) for name, sizes in shape.items()}
        self.q, self.k, self.v = (x.transpose(1, 2).requires_grad_(gradients) for x in laid.values())
        mask = torch.ones(1, 1, T, T, dtype=torch.bool, device=device).tril() if config.pack else None
        self.settings = {"attn_mask": mask, "is_causal": mask is None, "enable_gqa": kv != H}

    def choice(self) -> str:
        """The backend that PyTorch takes."""
        taken = torch_private.sdpa_choice(
            self.q, self.k, self.v, scale=1 / math.sqrt(self.q.shape[-1]), **self.settings
        )
        return next((name for name, backend in BACKENDS.items() if backend.value == taken), "none")

    def refusal(self, name: str) -> str | None:
        """The reason why a backend does not compute this, with its gradients if they are asked for; None if it does."""
        if name == "math" and self.scores > LARGEST:
            return f"not tried, as its scores take {format_bytes(self.scores)}"
        with _collected() as said:
            try:
                with sdpa_kernel([BACKENDS[name]]):
                    out = F.scaled_dot_product_attention(self.q, self.k, self.v, **self.settings)
                if self.gradients:
                    torch.autograd.grad(out, (self.q, self.k, self.v), torch.ones_like(out))
            except RuntimeError as error:
                return reason([*said, str(error)])
        return None


def reason(lines: list[str]) -> str:
    """The reason in PyTorch's warnings and the error after them."""
    lines = [TRIGGERED.sub("", line).strip() for text in lines for line in text.splitlines()]
    told = [line for line in lines if line and not NO_REASON.search(line)]
    return told[0] if told else "PyTorch has none for this call, and gives no reason"


@contextmanager
def _collected() -> Iterator[list[str]]:
    """The warnings of the block, at its end or at an exception."""
    said: list[str] = []
    with warnings.catch_warnings():
        warnings.simplefilter("always")
        warnings.showwarning = lambda message, *_, **__: said.append(str(message))
        yield said


def attention(config: WorkConfig, device: torch.device, dtype: torch.dtype) -> Section:
    """The backends of SDPA for this model, forward and with gradients, and what the table's torch column computes."""
    forward, backward = (Trial(config, device, dtype, gradients) for gradients in (False, True))
    (_, H, T, D), kv = forward.q.shape, forward.k.shape[1]
    heads = counted(H, "head") + (f" ({kv} of keys)" if kv != H else "")
    masked = "mask of documents" if config.pack else "causal"
    name = dtype_name(dtype)
    facts: dict[str, str | Fact] = {
        "tried": Fact(
            f"1 sequence, {heads}, {T:,} tokens, head size {D}, {name}, {masked}",
            {"heads": H, "kv_heads": kv, "tokens": T, "head_size": D, "dtype": name, "mask": masked},
        ),
        "PyTorch takes": _pair(forward.choice(), backward.choice()),
    }
    for backend in ON_CPU if device.type == "cpu" else BACKENDS:
        facts[backend] = _trials(forward.refusal(backend), backward.refusal(backend))
    facts["torch column"] = _column(config, forward, backward)
    return facts


def _pair(forward: str, gradients: str) -> Fact:
    both = {"forward": forward, "gradients": gradients}
    return Fact(forward if forward == gradients else f"{forward}; with gradients {gradients}", both)


def _trials(forward: str | None, gradients: str | None) -> Fact:
    value = {"forward": forward or "runs", "gradients": gradients or "runs"}
    if forward == gradients:
        return Fact(f"refused: {forward}" if forward else "runs, also with gradients", value)
    texts = (f"refused: {why}" if why else "runs" for why in (forward, gradients))
    return Fact("; with gradients ".join(texts), value)


def _column(config: WorkConfig, forward: Trial, backward: Trial) -> Fact:
    """The way of `torch_ops.causal_attention` at these shapes: SDPA, or matrix products."""
    return _pair(
        _computes(forward, config.block_size, 0.0), _computes(backward, config.block_size, config.attention_rate)
    )


def _computes(trial: Trial, tokens: int, dropout: float) -> str:
    if dropout > 0:
        return f"matrix products, as dropout is {dropout:g}"
    if torch_ops.prefers_products(trial.q, tokens):
        return "matrix products, which are faster here"
    return f"SDPA, {trial.choice()}"
