"""The shape of a model, as `GPT` reads it. Field names are nanoGPT's."""

import dataclasses
from dataclasses import dataclass

from fastgpt.config.fields import Settings, option
from fastgpt.errors import UsageError


@dataclass(frozen=True)
class ModelConfig(Settings):
    """The shape of a GPT.

    The defaults are GPT-2's smallest size.
    """

    vocab_size: int | None = option(
        None, "tokens in the vocabulary; with `tokenizer` bpe its size, otherwise the tokenizer's", low=1, group="Model"
    )
    block_size: int = option(1024, "longest context, in tokens", low=1)
    n_layer: int = option(12, "transformer blocks", low=1)
    n_head: int = option(12, "attention heads; must divide `n_embd`", low=1)
    n_kv_head: int | None = option(
        None, "key and value heads (grouped queries); must divide `n_head`; default `n_head`", low=1
    )
    n_embd: int = option(768, "width of the residual stream", low=1, high=65_536)
    dropout: float = option(0.0, "dropout rate of embeddings, attention and residuals", low=0, below=1)
    bias: bool = option(True, "biases in the linear layers and LayerNorms, as GPT-2 has them")
    position: str = option("learned", "how positions enter", choices=("learned", "sinusoidal", "rotary", "none"))
    mlp: str = option(
        "gelu",
        "activation of the MLP: GPT-2's tanh form of GELU, the exact GELU (nanoGPT's), or ReLU",
        choices=("gelu", "gelu_exact", "relu"),
    )
    n_inner: int | None = option(None, "width of the MLP; default 4 x `n_embd`", low=1, high=4 * 65_536)
    norm_eps: float = option(1e-5, "added to the variance in a norm", above=0, below=1)

    @property
    def head_size(self) -> int:
        return self.n_embd // self.n_head

    @property
    def kv_heads(self) -> int:
        return self.n_kv_head or self.n_head

    @property
    def inner(self) -> int:
        """Width of the MLP."""
        return self.n_inner or 4 * self.n_embd

    @property
    def padded_vocab(self) -> int:
        """vocab_size rounded up to a multiple of 128, the width of the embedding inside the model."""
        return -(-self.known_vocab // 128) * 128

    @property
    def known_vocab(self) -> int:
        """vocab_size. Raises `UsageError` where it is not set."""
        if self.vocab_size is None:
            raise UsageError("vocab_size is not set: take it from the tokenizer, or pass one")
        return self.vocab_size

    def check(self) -> None:
        h, c, kv = self.n_head, self.n_embd, self.kv_heads
        if c % h:
            nearest = min((n for n in range(1, c + 1) if c % n == 0), key=lambda n: (abs(n - h), n))
            raise UsageError(f"`n_head` {h} does not divide `n_embd` {c}; try `n_head` {nearest}")
        if h % kv:
            nearest = min((n for n in range(1, h + 1) if h % n == 0), key=lambda n: (abs(n - kv), n))
            raise UsageError(f"`n_kv_head` {kv} does not divide `n_head` {h}; try `n_kv_head` {nearest}")
        if self.position == "rotary" and self.head_size % 2:
            raise UsageError(
                f"`position` rotary turns pairs, and the head size n_embd / n_head = {self.head_size} is odd; "
                "choose another `n_head`"
            )
        if self.position == "sinusoidal" and c % 2:
            raise UsageError(f"`position` sinusoidal needs an even `n_embd`, not {c}; try {c + 1}")

    def architecture(self) -> "ModelConfig":
        """The model's part of a larger configuration."""
        return ModelConfig(**{f.name: getattr(self, f.name) for f in dataclasses.fields(ModelConfig)})
