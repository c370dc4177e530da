"""The peers of training: a plain GPT in stock PyTorch, as one writes it first, and transformers' GPT-2.

The plain GPT's settings are nanoGPT's (pre-LayerNorm, GELU, tied output, 0.02 initialisation, SDPA, AdamW with decay on
the matrices); the code is ours, and it takes no part of the engine.
"""

import importlib.util
import math
from collections.abc import Callable, Iterable, Mapping

import torch
import torch.nn as nn
import torch.nn.functional as F

Batch = tuple[torch.Tensor, torch.Tensor]  # inputs and targets, each int64 (B, T)


class PlainAttention(nn.Module):
    def __init__(self, C: int, H: int, dropout: float, bias: bool):
        super().__init__()
        self.H, self.dropout = H, dropout
        self.qkv, self.out = nn.Linear(C, 3 * C, bias), nn.Linear(C, C, bias)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        B, T, C = x.shape
        q, k, v = self.qkv(x).view(B, T, 3, self.H, C // self.H).permute(2, 0, 3, 1, 4)
        rate = self.dropout if self.training else 0.0
        y = F.scaled_dot_product_attention(q, k, v, dropout_p=rate, is_causal=True)
        return F.dropout(self.out(y.transpose(1, 2).reshape(B, T, C)), self.dropout, self.training)


class PlainBlock(nn.Module):
    def __init__(self, C: int, H: int, dropout: float, bias: bool):
        super().__init__()
        self.norm_1, self.norm_2 = nn.LayerNorm(C, bias=bias), nn.LayerNorm(C, bias=bias)
        self.attention = PlainAttention(C, H, dropout, bias)
        self.mlp = nn.Sequential(nn.Linear(C, 4 * C, bias), nn.GELU(), nn.Linear(4 * C, C, bias), nn.Dropout(dropout))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x + self.attention(self.norm_1(x))
        return x + self.mlp(self.norm_2(x))


class PlainGPT(nn.Module):
    """tokens (B, T) -> logits (B, T, V); with targets, the mean loss."""

    def __init__(self, V: int, T: int, L: int, H: int, C: int, dropout: float = 0.0, bias: bool = True):
        super().__init__()
        self.token, self.position = nn.Embedding(V, C), nn.Embedding(T, C)
        self.blocks = nn.ModuleList(PlainBlock(C, H, dropout, bias) for _ in range(L))
        self.norm, self.head = nn.LayerNorm(C, bias=bias), nn.Linear(C, V, bias=False)
        self.head.weight = self.token.weight
        self.drop = nn.Dropout(dropout)
        for name, p in self.named_parameters():
            if p.dim() == 2:
                residual = name.endswith(("out.weight", "mlp.2.weight"))
                nn.init.normal_(p, 0.0, 0.02 / math.sqrt(2 * L) if residual else 0.02)

    def forward(self, tokens: torch.Tensor, targets: torch.Tensor | None = None) -> torch.Tensor:
        place = torch.arange(tokens.shape[1], device=tokens.device)
        x = self.drop(self.token(tokens) + self.position(place))
        for block in self.blocks:
            x = block(x)
        logits = self.head(self.norm(x))
        if targets is None:
            return logits
        return F.cross_entropy(logits.flatten(0, 1), targets.flatten())

    @torch.no_grad()
    def load(self, weights: Mapping[str, torch.Tensor]) -> None:
        """Copy in the weights of the same GPT by GPT-2's names, each linear weight (outputs, inputs)."""
        names = {
            "wte": "token",
            "wpe": "position",
            "h.": "blocks.",
            "ln_1": "norm_1",
            "ln_2": "norm_2",
            "attn.c_attn": "attention.qkv",
            "attn.c_proj": "attention.out",
            "mlp.c_fc": "mlp.0",
            "mlp.c_proj": "mlp.2",
            "ln_f": "norm",
        }
        own = dict(self.named_parameters())
        for name, weight in weights.items():
            for theirs, ours in names.items():
                name = name.replace(theirs, ours)
            own.pop(name).copy_(weight)
        if own:
            raise ValueError(f"no weights for {', '.join(own)}")


def plain_optimizer(
    model: nn.Module, lr: float, betas: tuple[float, float], *, fused: bool | None = None
) -> torch.optim.AdamW:
    """AdamW with decay on the matrices alone; by default as PyTorch chooses it, which on a CPU is not fused."""
    matrices = [p for p in model.parameters() if p.dim() >= 2]
    vectors = [p for p in model.parameters() if p.dim() < 2]
    groups = [{"params": matrices, "weight_decay": 0.1}, {"params": vectors, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=lr, betas=betas, fused=fused)


def plain_step(
    model: nn.Module,
    loss: Callable[[torch.Tensor, torch.Tensor], torch.Tensor],
    optimizer: torch.optim.Optimizer,
    batches: Iterable[Batch],
    *,
    clip: float = 1.0,
    autocast: torch.dtype | None = None,
) -> Callable[[], torch.Tensor]:
    """One optimizer step a call, on the next batch, in float32 or under autocast; returns the loss on its device."""
    turn = iter(batches)

    def step() -> torch.Tensor:
        x, y = next(turn)
        with torch.autocast(x.device.type, autocast, enabled=autocast is not None):
            mean = loss(x, y)
        mean.backward()
        nn.utils.clip_grad_norm_(model.parameters(), clip)
        optimizer.step()
        optimizer.zero_grad()
        return mean.detach()

    return step


def has_transformers() -> bool:
    return importlib.util.find_spec("transformers") is not None


def transformers_gpt2(V: int, T: int, L: int, H: int, C: int, dropout: float) -> nn.Module:
    """transformers' GPT2LMHeadModel with SDPA and random weights, in training mode."""
    from transformers import GPT2Config, GPT2LMHeadModel

    config = GPT2Config(
        vocab_size=V,
        n_positions=T,
        n_layer=L,
        n_head=H,
        n_embd=C,
        resid_pdrop=dropout,
        embd_pdrop=dropout,
        attn_pdrop=dropout,
        bos_token_id=0,
        eos_token_id=0,
        use_cache=False,
    )
    return GPT2LMHeadModel(config).train()
