"""Settings of the commands that measure models: `fastgpt evaluate` and `fastgpt compare`."""

from dataclasses import dataclass

from fastgpt.config.choices import DTYPES, KERNELS
from fastgpt.config.fields import Settings, option
from fastgpt.config.generation import QUANTIZATION
from fastgpt.errors import UsageError

SPLITS = ("train", "val", "all")


@dataclass(frozen=True)
class MeasureConfig(Settings):
    """A model, a text, and the way in which the model reads it."""

    src: str = option(
        "out",
        "the model: a run's or a step's folder, a Hugging Face folder or name, a .gguf file, nanoGPT's ckpt.pt; the "
        "flag's name may be left out",
        path=True,
    )
    download: bool = option(False, "fetch a model that is named from Hugging Face's hub")
    dataset: str | None = option(
        None, "pydocs, shakespeare, a text file, a folder of texts, or a prepared folder", path=True, group="Text"
    )
    split: str | None = option(
        None, "the part of the text: its first 90% (train), the rest (val, the default), or all", choices=SPLITS
    )
    stride: int | None = option(
        None, "tokens between the starts of two windows, at most block_size, the default; fewer: more context", low=1
    )
    pack: bool | None = option(
        None, "attention stays within documents, as in packed training; auto: for a run that was packed", auto=True
    )
    data_dir: str = option("data", "folder of prepared folders that `dataset` may name; not written to", path=True)
    corpus_file: str | None = option(None, "local copy of tiny Shakespeare, for `dataset` shakespeare", path=True)
    gpt2_vocab: str | None = option(
        None, "folder with GPT-2's vocab.bpe and encoder.json, for a folder that nanoGPT prepared", path=True
    )
    batch_size: int | None = option(
        None,
        "windows, or choices, that run at once; the results stay the same; auto: some 8,192 tokens, or 64 choices",
        low=1,
        high=65_536,
        auto=True,
        group="Measurement",
    )
    json: bool = option(False, "print one JSON object instead of a table")
    device: str = option("auto", "auto, cpu, mps, cuda or cuda:N", group="Device")
    threads: int | None = option(
        None, "CPU threads; auto: one for each core that this process may use", low=1, high=4096, auto=True
    )
    dtype: str = option("auto", "weights and arithmetic; auto: float32 on a CPU, else bfloat16", choices=DTYPES)
    quantize: str = option("none", "weights in 8 bits, a scale for each row", choices=QUANTIZATION)
    kernels: str = option("auto", "backend of each operation", choices=KERNELS)


@dataclass(frozen=True)
class EvaluateConfig(MeasureConfig):
    """The loss of a model on a text, or its accuracy in multiple-choice questions."""

    choices: str | None = option(
        None, "JSON lines with context, choices and answer, instead of `dataset`", path=True, group="Multiple choice"
    )
    delimiter: str = option(" ", "text between a context and a choice; its default is a space")

    def check(self) -> None:
        if (self.dataset is None) == (self.choices is None):
            both = "both are given" if self.dataset is not None else "neither is given"
            raise UsageError(f"`dataset` TEXT or `choices` FILE: {both}; give one of them")
        for name in ("split", "stride", "pack", "corpus_file", "gpt2_vocab"):
            if self.choices is not None and (value := getattr(self, name)) is not None:
                raise UsageError(f"`{name}` {value} is for `dataset`, and `choices` is given; leave one of them out")


@dataclass(frozen=True)
class CompareConfig(MeasureConfig):
    """Two models on one text."""

    other: str | None = option(
        None, "the model to compare with; the flag's name may be left out", path=True, group="Second model"
    )
    other_dtype: str | None = option(None, "its `dtype`, if that is another", choices=DTYPES)
    other_quantize: str | None = option(None, "its `quantize`, if that is another", choices=QUANTIZATION)

    def check(self) -> None:
        if self.other is None:
            raise UsageError("`other` is missing; give two models, as in: fastgpt compare out-a out-b")
        if self.dataset is None:
            raise UsageError("`dataset` is missing; name a text, such as `dataset` pydocs")
