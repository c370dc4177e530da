"""Configuration: frozen dataclasses whose fields carry their own help and limits, and the presets.

`ModelConfig` is what `GPT` reads, `TrainConfig` adds what a run needs and `GenerateConfig` is what generation
takes. Field names are nanoGPT's. `fastgpt.cli` turns a field into a flag; `validate` checks every limit.
"""

import dataclasses
import math
import types
import typing
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fastgpt.errors import UsageError, nearest, shown
from fastgpt.escapes import unescaped

DTYPES = ("auto", "float32", "bfloat16", "float16")
CACHES = ("none", "dense", "paged", "auto")
SPECULATION = ("none", "ngram")
ORDERS = ("input", "completion")
QUANTIZATION = ("none", "int8")
KERNELS = ("auto", "torch", "reference", "triton")
USUAL_WARMUP = 2000  # steps
LEAST, MOST = -(2**63), 2**63 - 1  # what 64 bits hold: whole numbers end up in tensors and files


def option(
    default: Any,
    help: str,
    *,
    choices: tuple[str, ...] | None = None,
    low: float | None = None,
    high: float | None = None,
    above: float | None = None,
    below: float | None = None,
    alias: tuple[str, ...] = (),
    path: bool = False,
    auto: bool = False,
    group: str | None = None,
) -> Any:
    """A dataclass field with its help text and its limits (low <= value <= high, above < value < below).

    `path`: its text is, or may be, the name of a file or folder. `auto`: None is written auto. `group`: the title
    under which the help shows this field and those after it.
    """
    limits = {"low": low, "high": high, "above": above, "below": below}
    metadata = {"help": help, "choices": choices, "alias": alias, "path": path, "auto": auto, "group": group}
    return dataclasses.field(default=default, metadata=metadata | limits)


class _Plain:
    """Keeps each setting as a plain Python value, however it was given."""

    def __post_init__(self) -> None:
        for field in dataclasses.fields(typing.cast(Any, self)):
            given = getattr(self, field.name)
            value = _plain(given, several=typing.get_origin(field.type) is tuple)
            if value is not given:
                object.__setattr__(self, field.name, value)


def _plain(value: Any, several: bool = False) -> Any:
    """A number of NumPy or PyTorch as Python's; where a setting has `several` values, a tuple of a list or of one."""
    if hasattr(value, "tolist"):
        value = value.tolist()
    if not several or value == ():
        return value
    if isinstance(value, list | tuple):
        return tuple(map(_plain, value))
    return (value,) if isinstance(value, str | int) else value


@dataclass(frozen=True)
class ModelConfig(_Plain):
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

    @property
    def head_size(self) -> int:
        return self.n_embd // self.n_head

    @property
    def kv_heads(self) -> int:
        return self.n_kv_head or self.n_head

    @property
    def padded_vocab(self) -> int:
        """vocab_size rounded up to a multiple of 128, the width of the embedding inside the model."""
        return -(-self._known_vocab // 128) * 128

    @property
    def num_parameters(self) -> int:
        """`GPT.num_parameters` without a model: the vocabulary's padding does not count."""
        C, biases = self.n_embd, int(self.bias)
        norm = C + biases * C
        heads = (self.n_head + 2 * self.kv_heads) * self.head_size
        attention = (C + biases) * heads + (C + biases) * C
        mlp = (C + biases) * 4 * C + (4 * C + biases) * C
        positions = self.block_size if self.position == "learned" else 0
        return (self._known_vocab + positions) * C + self.n_layer * (2 * norm + attention + mlp) + norm

    @property
    def _known_vocab(self) -> int:
        if self.vocab_size is None:
            raise UsageError("vocab_size is not set: take it from the tokenizer, or pass one")
        return self.vocab_size

    def architecture(self) -> "ModelConfig":
        """The model's part of a larger configuration."""
        return ModelConfig(**{f.name: getattr(self, f.name) for f in dataclasses.fields(ModelConfig)})


@dataclass(frozen=True)
class TrainConfig(ModelConfig):
    """A training run."""

    out_dir: str = option("out", "folder of the run", path=True, group="Checkpoints")
    init_from: str = option(
        "scratch",
        "scratch: start anew; resume: continue the run in `out_dir`; or the path of a step's folder, to continue from "
        "there, or of nanoGPT's ckpt.pt, to start from its weights",
        path=True,
    )
    overwrite: bool = option(False, "delete the run that `out_dir` holds and start anew")
    dataset: str = option(
        "pydocs", "pydocs, shakespeare, or a path: a text file, a folder of text, tokens", path=True, group="Data"
    )
    corpus_file: str | None = option(None, "a local copy of tiny Shakespeare for `dataset` shakespeare", path=True)
    data_dir: str = option("data", "where prepared corpora are kept", path=True)
    tokenizer: str = option(
        "char",
        "characters, UTF-8 bytes, GPT-2's, or a BPE trained here",
        choices=("char", "byte", "gpt2", "bpe"),
    )
    gpt2_vocab: str | None = option(None, "folder with GPT-2's vocab.bpe and encoder.json", path=True)
    allow_data_change: bool = option(False, "resume although the text changed since the run began")

    max_iters: int = option(600_000, "optimizer steps", low=1, group="Optimisation")
    max_minutes: float | None = option(None, "stop, evaluate and save after this many minutes", above=0)
    batch_size: int = option(12, "sequences in a micro-batch", low=1)
    gradient_accumulation_steps: int = option(40, "micro-batches in a step", low=1)
    seed: int = option(1337, "seed of the weights, the data order and dropout", low=0, high=2**63 - 1)

    learning_rate: float = option(6e-4, "peak learning rate", above=0)
    schedule: str = option("cosine", "shape of the learning rate", choices=("cosine", "linear", "constant", "wsd"))
    decay_lr: bool = option(True, "follow the schedule; off is the same as `schedule` constant")
    warmup_iters: int | None = option(
        None, "steps of linear warm-up; where not given, a preset's or 2000, but at most a tenth of `max_iters`", low=0
    )
    lr_decay_iters: int | None = option(None, "step at which `min_lr` is reached; default `max_iters`", low=1)
    min_lr: float | None = option(None, "final learning rate; default `learning_rate` / 10", low=0)
    weight_decay: float = option(0.1, "decay of the matrices, none on biases and gains", low=0)
    beta1: float = option(0.9, "AdamW's first moment decay", low=0, below=1)
    beta2: float = option(0.95, "AdamW's second moment decay", low=0, below=1)
    grad_clip: float = option(1.0, "largest gradient norm; 0 clips nothing", low=0)

    eval_interval: int = option(
        2000, "steps between evaluations, each followed by a checkpoint", low=1, group="Evaluation and logging"
    )
    eval_iters: int | None = option(
        None,
        "an evaluation reads this times the run's first `batch_size` windows, evenly spaced over the val split; "
        "0: all of it; none: all of it up to 1M tokens",
        low=0,
    )
    log_interval: int = option(10, "steps between log lines", low=1)
    sample_interval: int = option(0, "steps between printed samples; 0: only at the end", low=0)

    keep_last: int = option(3, "checkpoints that are kept beside the best", low=1, group="Checkpoints")
    async_save: bool = option(False, "go on training while a checkpoint is written, at the price of a copy in memory")
    skip_loss_sigma: float = option(
        0.0,
        "skip a step whose loss is this many standard deviations above its running mean; 0: none",
        low=0,
        group="Optimisation",
    )
    rollback_after: int = option(
        5,
        "skipped steps in a row after which the run goes back to its last good checkpoint and skips the data",
        low=1,
        group="Checkpoints",
    )
    max_rollbacks: int = option(3, "returns to the same checkpoint before the run gives up", low=0)

    device: str = option("auto", "auto, cpu, mps, cuda or cuda:N", group="Device")
    threads: int | None = option(
        None,
        "CPU threads; auto: one for each core that this process may use; resuming on another number may change bits",
        low=1,
        high=4096,
        auto=True,
    )
    dtype: str = option("auto", "arithmetic; auto: bfloat16 where the chip has it", choices=DTYPES)
    compile: bool = option(False, "compile the model with torch.compile")
    kernels: str = option("auto", "the table's column: see fastgpt/dispatch.py", choices=KERNELS)

    @property
    def resuming(self) -> bool:
        """Whether it continues a run instead of starting one."""
        return self.init_from != "scratch" and not self.imports

    @property
    def imports(self) -> bool:
        """Whether it starts from the weights of another program's file."""
        return self.init_from.endswith(".pt")

    @property
    def tokens_per_step(self) -> int:
        return self.gradient_accumulation_steps * self.batch_size * self.block_size

    @property
    def warmup(self) -> int:
        """Steps of warm-up; where none were asked for, at most a tenth of the run, or it would never reach its rate."""
        return min(USUAL_WARMUP, self.max_iters // 10) if self.warmup_iters is None else self.warmup_iters

    @property
    def final_lr(self) -> float:
        return self.learning_rate / 10 if self.min_lr is None else self.min_lr

    @property
    def decay_iters(self) -> int:
        return self.max_iters if self.lr_decay_iters is None else self.lr_decay_iters


@dataclass(frozen=True)
class SamplingParams(_Plain):
    """How a continuation is drawn, and where it ends.

    `stop` and `stop_tokens` may be given as one value or as a list, and any number as NumPy's.
    """

    max_new_tokens: int = option(500, "tokens in a continuation", low=0, group="Sampling")
    temperature: float = option(0.8, "0 takes the likeliest token; higher is more varied", low=0)
    top_k: int | None = option(200, "sample among the k likeliest tokens, of equals the lowest ids; 0: all", low=0)
    top_p: float | None = option(None, "sample among the likeliest tokens that hold this share", above=0, high=1)
    min_p: float | None = option(None, "drop tokens below this share of the likeliest one's", low=0, high=1)
    repetition_penalty: float = option(1.0, "above 1: lower the score of what the text holds, prompt included", above=0)
    presence_penalty: float = option(0.0, "lower the score of each token that was generated", low=-100, high=100)
    frequency_penalty: float = option(0.0, "the same, for each time that it was generated", low=-100, high=100)
    stop: tuple[str, ...] = option((), "end before this text; may be given several times")
    stop_tokens: tuple[int, ...] = option((), "end before this token id; may be given several times")
    logprobs: int | None = option(
        None, "give each token's log-probability, and those of as many of the likeliest", low=0, high=20
    )
    num_samples: int = option(1, "continuations of a prompt, each drawn for itself", low=1, high=65_536)
    seed: int = option(1337, "the same seed continues the same prompt by the same text", low=0, high=2**63 - 1)

    @property
    def penalizes(self) -> bool:
        """Whether the odds of a token depend on those before it in more than the model's own way."""
        return self.repetition_penalty != 1 or self.presence_penalty != 0 or self.frequency_penalty != 0


@dataclass(frozen=True)
class GenerateConfig(SamplingParams):
    """Generation from a trained run."""

    out_dir: str = option("out", "folder of the run", path=True, group="Checkpoints")
    checkpoint: str = option("best", "best, latest, or a step's folder name such as step-000500", path=True)
    prompt: str = option(
        "", "text to continue; FILE:path reads a file, - reads stdin", alias=("start",), group="Prompts and answers"
    )
    prompts: str | None = option(
        None,
        "a file of prompts, a line each, or .jsonl with settings of their own; - reads lines from stdin",
        path=True,
    )
    output: str | None = option(None, "file for the JSON lines that `prompts` writes; default stdout", path=True)
    resume: bool = option(False, "go on with the answers that the file of `output` holds, given the same flags")
    order: str = option("input", "order of the answers: that of the prompts, or as they are finished", choices=ORDERS)
    stop_escapes: bool = option(False, r"read \n, \t, \\, \x41 and \u00e9 in `stop` as the characters they mean")
    interactive: bool = option(False, "write in turns with the model")
    cache: str = option(
        "auto",
        "keys and values of earlier tokens; auto: dense for one continuation without a CUDA GPU, else paged",
        choices=CACHES,
        group="Cache and batches",
    )
    kv_memory: str | None = option(
        None, "memory of the paged cache, such as 2GiB or 50%; default 80% of a GPU's free memory, 25% elsewhere"
    )
    page_size: int = option(16, "tokens in a page", low=1, high=65_536)
    prefix_cache: bool = option(True, "compute prompts that begin alike only once")
    max_batch: int = option(64, "continuations that run at once", low=1, high=65_536)
    max_batch_tokens: int = option(2048, "tokens of one forward pass; longer prompts are read in chunks", low=1)
    speculate: str = option("none", "guess tokens from the text itself and check them in one pass", choices=SPECULATION)
    device: str = option("auto", "auto, cpu, mps, cuda or cuda:N", group="Device")
    threads: int | None = option(
        None, "CPU threads; auto: one for each core that this process may use", low=1, high=4096, auto=True
    )
    dtype: str = option("auto", "weights and arithmetic; auto: float32 on a CPU, else bfloat16", choices=DTYPES)
    quantize: str = option("none", "weights in 8 bits, one scale a row: less memory, faster", choices=QUANTIZATION)
    compile: bool | None = option(
        None,
        "machine code for the model, made once for its shape; auto: for `interactive` and `prompts`, if it pays",
        auto=True,
    )
    kernels: str = option("auto", "the table's column: see fastgpt/dispatch.py", choices=KERNELS)

    def sampling(self) -> SamplingParams:
        """The part that says how to draw. Raises `UsageError` for an escape in a stop text that is none."""
        params = SamplingParams(**{f.name: getattr(self, f.name) for f in dataclasses.fields(SamplingParams)})
        if not self.stop_escapes:
            return params
        return dataclasses.replace(params, stop=tuple(unescaped(text, "`stop`") for text in params.stop))


def _preset(L: int, H: int, C: int, block: int, batch: int, lr: float, iters: int, **rest: Any) -> TrainConfig:
    sizes = {"n_layer": L, "n_head": H, "n_embd": C, "block_size": block, "batch_size": batch}
    return TrainConfig(**sizes, learning_rate=lr, max_iters=iters, **rest)


_SMALL = {"gradient_accumulation_steps": 1, "warmup_iters": 100, "eval_interval": 250}
_GPT2 = {"vocab_size": 50257, "tokenizer": "gpt2", "eval_iters": 200}

PRESETS: dict[str, TrainConfig] = {
    "mini": _preset(4, 4, 64, 128, 16, 1e-3, 1_000, beta2=0.99, sample_interval=500, **_SMALL),
    "cpu": _preset(4, 4, 128, 64, 12, 1e-3, 2_000, beta2=0.99, sample_interval=500, **_SMALL),
    "baby": _preset(6, 6, 384, 256, 64, 1e-3, 5_000, beta2=0.99, dropout=0.2, sample_interval=1000, **_SMALL),
    "gpt2": _preset(12, 12, 768, 1024, 12, 6e-4, 600_000, **_GPT2),
    "gpt2-medium": _preset(24, 16, 1024, 1024, 12, 3e-4, 600_000, **_GPT2),
    "gpt2-large": _preset(36, 20, 1280, 1024, 12, 2.5e-4, 600_000, **_GPT2),
    "gpt2-xl": _preset(48, 25, 1600, 1024, 12, 2e-4, 600_000, **_GPT2),
}


def validate(config: Any) -> None:
    """Check each field's type, choices and limits, then what concerns several fields. Raises `UsageError`."""
    validate_fields(type(config), vars(config))
    if isinstance(config, ModelConfig):
        _check_heads(config)
    if isinstance(config, TrainConfig):
        _check_training(config)


def validate_fields(kind: type, values: Mapping[str, Any]) -> None:
    """Check the values that were given for some of a dataclass's fields, each by itself."""
    hints = typing.get_type_hints(kind)
    for field in dataclasses.fields(kind):
        if field.name in values:
            _check_field(field, hints[field.name], values[field.name])


def _check_field(field: dataclasses.Field, hint: Any, value: Any) -> None:
    argument, meta = f"`{field.name}`", field.metadata
    allowed = typing.get_args(hint) if isinstance(hint, types.UnionType) else (hint,)
    if value is None and type(None) in allowed:
        return
    accepted = tuple(typing.get_origin(t) or t for t in allowed)
    if tuple in accepted:
        item = typing.get_args(hint)[0]
        if not (isinstance(value, tuple) and all(type(v) is item for v in value)):
            raise UsageError(f"{argument} {shown(value)} is not a list of {'text' if item is str else 'whole numbers'}")
    number = isinstance(value, int) and not isinstance(value, bool)
    fits = isinstance(value, accepted) and (not isinstance(value, bool) or bool in accepted)
    if not fits and not (number and float in accepted):
        wanted = next(t for t in accepted if t is not type(None)).__name__
        raise UsageError(f"{argument} {shown(value)} is not of type {wanted}")
    if isinstance(value, float) and not math.isfinite(value):
        raise UsageError(f"{argument} {value} is not a finite number")
    if meta.get("choices") and value not in meta["choices"]:
        raise UsageError(
            f"{argument} {shown(value)} is not one of {', '.join(meta['choices'])}"
            f"{nearest(str(value), meta['choices'])}"
        )
    if meta.get("path") and isinstance(value, str):
        _check_path(argument, value)
    bounds = {
        "low": (lambda x, limit: x >= limit, "at least"),
        "above": (lambda x, limit: x > limit, "above"),
        "high": (lambda x, limit: x <= limit, "at most"),
        "below": (lambda x, limit: x < limit, "below"),
    }
    for name, (holds, words) in bounds.items():
        limit = meta.get(name)
        if limit is not None and not holds(value, limit):
            raise UsageError(f"{argument} {shown(value)} must be {words} {limit}")
    for one in value if isinstance(value, tuple) else (value,):
        if isinstance(one, int) and not LEAST <= one <= MOST:
            words = f"at most {MOST}" if one > 0 else f"at least {LEAST}"
            raise UsageError(f"{argument} {shown(one)} must be {words}")


def _check_path(argument: str, value: str) -> None:
    if not value:
        raise UsageError(f"{argument} '' is empty; name a file or folder, or leave it out")
    if "\0" in value:
        raise UsageError(f"{argument} {shown(value)} holds a NUL character, which no file's name can hold")
    try:
        value.encode()
    except UnicodeEncodeError:  # a run's config.json, which names it, is UTF-8
        raise UsageError(f"{argument} {shown(value)} is not UTF-8; rename it") from None


def _check_heads(config: ModelConfig) -> None:
    h, c, kv = config.n_head, config.n_embd, config.kv_heads
    if c % h:
        nearest = min((n for n in range(1, c + 1) if c % n == 0), key=lambda n: (abs(n - h), n))
        raise UsageError(f"`n_head` {h} does not divide `n_embd` {c}; try `n_head` {nearest}")
    if h % kv:
        nearest = min((n for n in range(1, h + 1) if h % n == 0), key=lambda n: (abs(n - kv), n))
        raise UsageError(f"`n_kv_head` {kv} does not divide `n_head` {h}; try `n_kv_head` {nearest}")
    if config.position == "rotary" and config.head_size % 2:
        raise UsageError(
            f"`position` rotary turns pairs, and the head size n_embd / n_head = {config.head_size} is odd; "
            "choose another `n_head`"
        )
    if config.position == "sinusoidal" and c % 2:
        raise UsageError(f"`position` sinusoidal needs an even `n_embd`, not {c}; try {c + 1}")


def _check_training(config: TrainConfig) -> None:
    if config.final_lr > config.learning_rate:
        raise UsageError(f"`min_lr` {config.final_lr} is above `learning_rate` {config.learning_rate}; lower it")
    starts = ("scratch", "resume")
    if config.init_from not in starts and not _exists(config.init_from):
        raise UsageError(
            f"`init_from` {shown(config.init_from)} is not one of {', '.join(starts)}, nor the path of a step's folder "
            f"or of a .pt file{nearest(config.init_from, starts)}"
        )
    if config.overwrite and config.resuming:
        raise UsageError(
            f"`overwrite` deletes the run that `init_from` {config.init_from} would continue; pass only one"
        )


def _exists(path: str) -> bool:
    try:
        return Path(path).exists()
    except (OSError, ValueError):  # too long for a name, or a folder that may not be entered
        return False
