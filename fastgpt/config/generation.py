"""Settings of generation: of the sampling, and of the command `python -m fastgpt.generate`."""

import dataclasses
from dataclasses import dataclass
from pathlib import Path

from fastgpt.config.choices import DTYPES, KERNELS
from fastgpt.config.escapes import unescaped
from fastgpt.config.fields import Settings, option

CACHES = ("none", "dense", "paged", "auto")
SPECULATION = ("none", "ngram")
ORDERS = ("input", "completion")
QUANTIZATION = ("none", "int8")


@dataclass(frozen=True)
class SamplingParams(Settings):
    """Settings that say how a continuation is drawn, and where it ends.

    `stop` and `stop_tokens` take one value or a list of values. Numbers may be NumPy's.
    """

    max_new_tokens: int = option(500, "tokens in a continuation", low=0, group="Sampling")
    temperature: float = option(0.8, "0 takes the likeliest token; higher is more varied", low=0)
    top_k: int | None = option(200, "sample among the k likeliest tokens, of equals the lowest ids; 0: all", low=0)
    top_p: float | None = option(None, "sample among the likeliest tokens of this total probability", above=0, high=1)
    min_p: float | None = option(None, "drop tokens below this share of the likeliest one's probability", low=0, high=1)
    repetition_penalty: float = option(1.0, "above 1: lower the scores of tokens in the text, prompt included", above=0)
    presence_penalty: float = option(0.0, "lower the score of each token that was generated", low=-100, high=100)
    frequency_penalty: float = option(0.0, "the same, for each time that it was generated", low=-100, high=100)
    stop: tuple[str, ...] = option((), "end before this text; may be given several times")
    stop_tokens: tuple[int, ...] = option((), "end before this token id; may be given several times")
    logprobs: int | None = option(
        None, "give each token's log-probability, and those of as many of the likeliest", low=0, high=20
    )
    candidates: bool = option(
        False, "show the likeliest tokens beside each drawn one, with probabilities before and after these settings"
    )
    num_samples: int = option(1, "continuations of each prompt, drawn independently", low=1, high=65_536)
    seed: int = option(1337, "the same seed gives the same prompt the same continuation", low=0, high=2**63 - 1)

    @property
    def penalizes(self) -> bool:
        """Whether earlier tokens change the scores that the model gives."""
        return self.repetition_penalty != 1 or self.presence_penalty != 0 or self.frequency_penalty != 0


@dataclass(frozen=True)
class GenerateConfig(SamplingParams):
    """Generation from a model."""

    out_dir: str = option("out", "folder of the run", path=True, group="Model")
    checkpoint: str = option("best", "best, latest, or a step's folder name such as step-000500", path=True)
    model: str | None = option(
        None,
        "instead of a run: a step's folder, a Hugging Face folder or name, a .gguf file, nanoGPT's ckpt.pt",
        path=True,
    )
    download: bool = option(False, "fetch the model that `model` names from Hugging Face's hub")
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
    order: str = option("input", "order of the answers: that of the prompts, or as they finish", choices=ORDERS)
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
    prefix_cache: bool = option(True, "compute the common beginning of prompts only once")
    max_batch: int = option(64, "continuations that run at once", low=1, high=65_536)
    max_batch_tokens: int = option(2048, "tokens of one forward pass; longer prompts are read in chunks", low=1)
    speculate: str = option("none", "guess tokens from the text itself and check them at once", choices=SPECULATION)
    device: str = option("auto", "auto, cpu, mps, cuda or cuda:N", group="Device")
    threads: int | None = option(
        None, "CPU threads; auto: one for each core that this process may use", low=1, high=4096, auto=True
    )
    dtype: str = option("auto", "weights and arithmetic; auto: float32 on a CPU, else bfloat16", choices=DTYPES)
    quantize: str = option("none", "weights in 8 bits, a scale for each row: less memory, faster", choices=QUANTIZATION)
    compile: bool | None = option(
        None,
        "machine code for the model, made once for its shape; auto: for `interactive` and `prompts`, if it pays",
        auto=True,
    )
    kernels: str = option("auto", "backend of each operation", choices=KERNELS)

    @property
    def source(self) -> str | Path:
        """The model to load: a text may be a name on the hub, and the folder of a run is always a path."""
        return self.model if self.model is not None else Path(self.out_dir)

    def sampling(self) -> SamplingParams:
        """The settings of sampling. Raises `UsageError` for an unknown escape in a stop text."""
        params = SamplingParams(**{f.name: getattr(self, f.name) for f in dataclasses.fields(SamplingParams)})
        if not self.stop_escapes:
            return params
        return dataclasses.replace(params, stop=tuple(unescaped(text, "`stop`") for text in params.stop))
