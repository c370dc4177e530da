"""The shape of a model, as `GPT` reads it. Field names are nanoGPT's."""

import dataclasses
from dataclasses import dataclass
from typing import Self

from fastgpt.config.fields import Settings, option
from fastgpt.errors import UsageError

GATED_MULTIPLE = 64  # the default width of a gated MLP is rounded up to it


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
    attention_dropout: float | None = option(
        None, "dropout rate of attention's weights alone, which is slow on a CPU; default `dropout`", low=0, below=1
    )
    bias: bool = option(True, "biases in the linear layers and LayerNorms, as GPT-2 has them")
    attention_bias: bool | None = option(None, "biases in attention's linear layers; default `bias`")
    mlp_bias: bool | None = option(None, "biases in the MLP's linear layers; default `bias`")
    position: str = option("learned", "how positions enter", choices=("learned", "sinusoidal", "rotary", "none"))
    rope_theta: float = option(10_000.0, "base of rotary positions; the larger, the slower the slow pairs turn", low=1)
    rope_factor: float | None = option(
        None, "Llama 3's stretched rotary positions: slow pairs turn so many times slower; default: none do", low=1
    )
    rope_low_freq_factor: float = option(
        1.0, "with `rope_factor`: pairs with fewer turns in `rope_original_context` tokens are slow", above=0
    )
    rope_high_freq_factor: float = option(
        4.0, "with `rope_factor`: pairs with more turns in `rope_original_context` tokens stay as they are", above=0
    )
    rope_original_context: int = option(8192, "with `rope_factor`: the context before it was stretched", low=1)
    head_size: int | None = option(None, "width of an attention head; default `n_embd` / `n_head`", low=1, high=65_536)
    qk_norm: bool = option(False, "RMS norm of each head's queries and keys, before rotary positions")
    norm: str = option("layernorm", "normalization", choices=("layernorm", "rmsnorm"))
    norm_gain: bool = option(True, "learned gains in the norms; without them only `norm` rmsnorm")
    norm_eps: float = option(1e-5, "added to the variance, or to the mean square, in a norm", above=0, below=1)
    mlp: str = option(
        "gelu",
        "activation of the MLP: GPT-2's tanh form of GELU, the exact GELU (nanoGPT's), ReLU, its square, or SwiGLU",
        choices=("gelu", "gelu_exact", "relu", "relu2", "swiglu"),
    )
    n_inner: int | None = option(
        None,
        "width of the MLP; default 4 x `n_embd`, with `mlp` swiglu, which has three matrices, two thirds of it",
        low=1,
        high=4 * 65_536,
    )
    tie: bool = option(True, "the output layer is the token embedding; off: it has a matrix of its own")
    logit_softcap: float | None = option(
        None, "bound the logits smoothly to this size, as Gemma 2 does; default: no bound", above=0
    )
    zero_init: bool = option(
        False, "begin with zeros in the last layers of attention and of the MLP, and in an untied output layer"
    )

    @property
    def head_dim(self) -> int:
        """Width of a head."""
        return self.head_size or self.n_embd // self.n_head

    @property
    def kv_heads(self) -> int:
        return self.n_kv_head or self.n_head

    @property
    def inner(self) -> int:
        """Width of the MLP, after the gate where it has one."""
        if self.n_inner or self.mlp != "swiglu":
            return self.n_inner or 4 * self.n_embd
        return -(-8 * self.n_embd // (3 * GATED_MULTIPLE)) * GATED_MULTIPLE

    @property
    def attention_rate(self) -> float:
        """Dropout rate of attention's weights."""
        return self.dropout if self.attention_dropout is None else self.attention_dropout

    @property
    def has_attention_bias(self) -> bool:
        return self.bias if self.attention_bias is None else self.attention_bias

    @property
    def has_mlp_bias(self) -> bool:
        return self.bias if self.mlp_bias is None else self.mlp_bias

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
        if self.head_size is None and c % h:
            nearest = min((n for n in range(1, c + 1) if c % n == 0), key=lambda n: (abs(n - h), n))
            raise UsageError(f"`n_head` {h} does not divide `n_embd` {c}; try `n_head` {nearest}")
        if h % kv:
            nearest = min((n for n in range(1, h + 1) if h % n == 0), key=lambda n: (abs(n - kv), n))
            raise UsageError(f"`n_kv_head` {kv} does not divide `n_head` {h}; try `n_kv_head` {nearest}")
        if self.position == "rotary" and self.head_dim % 2:
            size, other = f"the head size `n_embd` {c} / `n_head` {h} =", "n_head"
            if self.head_size:
                size, other = "`head_size`", "head_size"
            raise UsageError(
                f"`position` rotary turns pairs, and {size} {self.head_dim} is odd; choose another `{other}`"
            )
        if self.position == "sinusoidal" and c % 2:
            raise UsageError(f"`position` sinusoidal needs an even `n_embd`, not {c}; try {c + 1}")
        if not self.norm_gain and self.norm == "layernorm":
            raise UsageError("`norm_gain` off is for `norm` rmsnorm, and `norm` is layernorm; change one of them")
        self._check_rotary()

    def _check_rotary(self) -> None:
        """Raise `UsageError` for settings of rotary positions that do not apply, or not together."""
        default = type(self)
        for name in ("rope_theta", "rope_factor"):
            if self.position != "rotary" and getattr(self, name) != getattr(default, name):
                raise UsageError(
                    f"`{name}` {getattr(self, name)} is for `position` rotary, and `position` is {self.position}; "
                    "change one of them"
                )
        for name in ("rope_low_freq_factor", "rope_high_freq_factor", "rope_original_context"):
            if self.rope_factor is None and getattr(self, name) != getattr(default, name):
                raise UsageError(
                    f"`{name}` {getattr(self, name)} applies with `rope_factor`; set that, or leave it out"
                )
        low, high = self.rope_low_freq_factor, self.rope_high_freq_factor
        if low >= high:
            raise UsageError(
                f"`rope_low_freq_factor` {low} must be below `rope_high_freq_factor` {high}: slow pairs turn less"
            )

    def architecture(self) -> "ModelConfig":
        """The model's part of a larger configuration."""
        return ModelConfig(**{f.name: getattr(self, f.name) for f in dataclasses.fields(ModelConfig)})

    def filled(self) -> Self:
        """The same with the values that None stands for, so that two can be compared."""
        return dataclasses.replace(
            self,
            n_kv_head=self.kv_heads,
            head_size=self.head_dim,
            n_inner=self.inner,
            attention_bias=self.has_attention_bias,
            mlp_bias=self.has_mlp_bias,
        )
