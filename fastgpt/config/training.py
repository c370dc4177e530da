"""Settings of a training run, and the presets. Field names are nanoGPT's."""

from dataclasses import dataclass
from typing import Any

from fastgpt.config.choices import DTYPES, KERNELS, TOKENIZERS
from fastgpt.config.fields import option
from fastgpt.config.model import ModelConfig
from fastgpt.config.sources import could_be_hub_name, exists, is_step_in
from fastgpt.errors import UsageError, nearest, shown

USUAL_WARMUP = 2000  # steps
OPTIMIZERS = ("adamw", "muon")
ADJUSTMENTS = ("original", "match_rms_adamw")
METHODS = ("newton_schulz", "polar_express")


@dataclass(frozen=True)
class TrainConfig(ModelConfig):
    """A training run."""

    out_dir: str = option("out", "folder of the run", path=True, group="Checkpoints")
    init_from: str = option(
        "scratch",
        "scratch: start anew; resume: continue the run in `out_dir`; or the path of a step's folder in `out_dir`, to "
        "continue from there; or another model, to start from its weights: a run or a step, a Hugging Face folder or "
        "name, a .gguf file, nanoGPT's ckpt.pt",
        path=True,
    )
    download: bool = option(False, "fetch the model that `init_from` names from Hugging Face's hub")
    overwrite: bool = option(False, "delete the run that `out_dir` holds and start anew")
    dry_run: bool = option(
        False, "print parameters, memory, steps and time, measured in three micro-batches, and write nothing"
    )
    dataset: str = option(
        "pydocs", "pydocs, shakespeare, or a path: a text file, a folder of text, tokens", path=True, group="Data"
    )
    corpus_file: str | None = option(None, "a local copy of tiny Shakespeare for `dataset` shakespeare", path=True)
    data_dir: str = option("data", "where prepared corpora are kept", path=True)
    tokenizer: str = option("char", "characters, UTF-8 bytes, GPT-2's, or a BPE trained here", choices=TOKENIZERS)
    gpt2_vocab: str | None = option(None, "folder with GPT-2's vocab.bpe and encoder.json", path=True)
    pack: bool | None = option(
        None, "keep attention within documents, and restart positions at each; auto: for document shards", auto=True
    )
    allow_data_change: bool = option(False, "resume although the text changed since the run began")

    max_iters: int = option(600_000, "optimizer steps", low=1, group="Optimisation")
    max_minutes: float | None = option(None, "stop, evaluate and save after this many minutes", above=0)
    batch_size: int = option(12, "sequences in a micro-batch", low=1)
    gradient_accumulation_steps: int = option(40, "micro-batches in a step", low=1)
    seed: int = option(1337, "seed of the weights, the data order and dropout", low=0, high=2**63 - 1)

    # Optimizer
    optimizer: str = option(
        "adamw", "adamw, or muon on the matrices of blocks with AdamW on the rest", choices=OPTIMIZERS
    )
    learning_rate: float = option(6e-4, "peak learning rate", above=0)
    schedule: str = option("cosine", "shape of the learning rate", choices=("cosine", "linear", "constant", "wsd"))
    decay_lr: bool = option(True, "follow the schedule; off is the same as `schedule` constant")
    warmup_iters: int | None = option(
        None, "steps of linear warm-up; where not given, a preset's or 2000, but at most a tenth of `max_iters`", low=0
    )
    lr_decay_iters: int | None = option(None, "step at which `min_lr` is reached; default `max_iters`", low=1)
    min_lr: float | None = option(None, "final learning rate; default `learning_rate` / 10", low=0)
    weight_decay: float = option(0.1, "decay of the matrices, none on biases and gains", low=0)
    muon_lr: float = option(0.02, "Muon's peak learning rate; it follows `schedule` as `learning_rate` does", above=0)
    muon_momentum: float = option(0.95, "Muon's momentum", low=0, below=1)
    muon_momentum_warmup: int = option(300, "steps in which Muon's momentum rises from 0.85", low=0)
    muon_adjust_lr: str = option(
        "original", "how Muon's learning rate depends on a matrix's sizes, as in PyTorch", choices=ADJUSTMENTS
    )
    muon_method: str = option(
        "polar_express",
        "how Muon orthogonalizes: three iterations, or the five Newton-Schulz ones of PyTorch's Muon",
        choices=METHODS,
    )
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
    log_stats: bool = option(
        False, "record norms, updates, activations and dead units of each layer in metrics.jsonl, at `log_interval`"
    )
    sample_interval: int = option(0, "steps between printed samples; 0: only at the end", low=0)
    preview: bool = option(
        False, "at steps 0, 50, 100, 250, 500, 1000, ... print a line in which the model continues the same words"
    )

    keep_last: int = option(3, "checkpoints that are kept beside the best", low=1, group="Checkpoints")
    keep_every: int = option(
        0, "keep the checkpoints of steps that this divides for good, and write one at each; 0: none", low=0
    )
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
    kernels: str = option("auto", "backend of each operation", choices=KERNELS)

    @property
    def resuming(self) -> bool:
        """Whether it continues a run instead of starting one."""
        return self.init_from == "resume" or is_step_in(self.init_from, self.out_dir)

    @property
    def imports(self) -> bool:
        """Whether it starts from the weights of another model."""
        return self.init_from != "scratch" and not self.resuming

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

    def check(self) -> None:
        super().check()
        if self.final_lr > self.learning_rate:
            raise UsageError(f"`min_lr` {self.final_lr} is above `learning_rate` {self.learning_rate}; lower it")
        starts = ("scratch", "resume")
        meant = nearest(self.init_from, starts)
        known = self.init_from in starts or exists(self.init_from)
        if not known and (meant or not could_be_hub_name(self.init_from)):
            raise UsageError(
                f"`init_from` {shown(self.init_from)} is not one of {', '.join(starts)}, nor the path of a "
                f"step's folder or of another model{meant}"
            )
        if self.download and not self.imports:
            raise UsageError("`download` fetches the model that `init_from` names; name one, such as gpt2")
        if self.download and self.dry_run:
            raise UsageError(
                f"`download` fetches {self.init_from}, and `dry_run` writes nothing; leave one of them out (python -m "
                f"fastgpt.generate --model {self.init_from} --download fetches it too)"
            )
        if self.overwrite and self.resuming:
            raise UsageError(
                f"`overwrite` deletes the run that `init_from` {self.init_from} would continue; pass only one"
            )


def _preset(L: int, H: int, C: int, block: int, batch: int, lr: float, iters: int, **rest: Any) -> TrainConfig:
    sizes = {"n_layer": L, "n_head": H, "n_embd": C, "block_size": block, "batch_size": batch}
    return TrainConfig(**sizes, learning_rate=lr, max_iters=iters, **rest)


_SMALL = {"gradient_accumulation_steps": 1, "warmup_iters": 100, "eval_interval": 250}
_GPT2 = {"vocab_size": 50257, "tokenizer": "gpt2", "eval_iters": 200}

# What wins the speedruns (docs/models.md): Muon, and a model whose every option earned its place there.
_MODERN = {
    **{"position": "rotary", "norm": "rmsnorm", "qk_norm": True, "mlp": "swiglu", "bias": False, "zero_init": True},
    **{"optimizer": "muon", "schedule": "linear", "min_lr": 0.0},
}

PRESETS: dict[str, TrainConfig] = {
    "modern-cpu": _preset(
        *(4, 4, 128, 64, 12, 5e-3, 1_300),
        **_MODERN | _SMALL | {"warmup_iters": 10, "eval_interval": 325, "dtype": "float32", "n_inner": 256},
        **{"muon_lr": 0.015, "muon_momentum": 0.9, "muon_momentum_warmup": 0, "logit_softcap": 15.0},
        # The text of the first run is small, so it is regularised.
        **{"tokenizer": "bpe", "vocab_size": 640, "dropout": 0.15, "attention_dropout": 0.0, "weight_decay": 0.4},
        preview=True,
    ),
    "modern-baby": _preset(
        *(6, 6, 384, 256, 64, 5e-3, 1_500),
        **_MODERN | _SMALL | {"tie": False, "dropout": 0.2, "preview": True},
    ),
    "modern-124m": _preset(
        *(12, 6, 768, 1024, 16, 6e-3, 4_000),
        **_MODERN | _GPT2 | {"gradient_accumulation_steps": 32, "warmup_iters": 100, "logit_softcap": 15.0},
    ),
    "mini": _preset(4, 4, 64, 128, 16, 1e-3, 1_000, beta2=0.99, sample_interval=500, **_SMALL),
    "cpu": _preset(4, 4, 128, 64, 12, 1e-3, 2_000, beta2=0.99, sample_interval=500, **_SMALL),
    "baby": _preset(6, 6, 384, 256, 64, 1e-3, 5_000, beta2=0.99, dropout=0.2, sample_interval=1000, **_SMALL),
    "gpt2": _preset(12, 12, 768, 1024, 12, 6e-4, 600_000, **_GPT2),
    "gpt2-medium": _preset(24, 16, 1024, 1024, 12, 3e-4, 600_000, **_GPT2),
    "gpt2-large": _preset(36, 20, 1280, 1024, 12, 2.5e-4, 600_000, **_GPT2),
    "gpt2-xl": _preset(48, 25, 1600, 1024, 12, 2e-4, 600_000, **_GPT2),
}
