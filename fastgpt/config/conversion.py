"""Settings of the command `python -m fastgpt.convert`."""

from dataclasses import dataclass

from fastgpt.config.fields import Settings, option
from fastgpt.errors import UsageError

FORMATS = ("huggingface", "gguf", "nanogpt", "fastgpt")
WEIGHTS = ("float32", "float16", "bfloat16", "q8_0")


@dataclass(frozen=True)
class ConvertConfig(Settings):
    """A model to convert, and what to."""

    src: str | None = option(
        None,
        "the model: a run's or a step's folder, a Hugging Face folder or name, a .gguf file, nanoGPT's ckpt.pt; "
        "the flag's name may be left out",
        path=True,
        group="Source",
    )
    checkpoint: str = option("best", "of a run: best, latest, or a step's folder name such as step-000500", path=True)
    download: bool = option(False, "fetch the model that `src` names from Hugging Face's hub")
    dst: str | None = option(
        None, "the folder or, for gguf, the file to write; the flag's name may be left out", path=True, group="Target"
    )
    format: str | None = option(None, "what to write", choices=FORMATS)
    dtype: str = option("float32", "type of the matrices; q8_0, 8 bits, is for gguf", choices=WEIGHTS)
    overwrite: bool = option(False, "replace what an earlier conversion wrote to `dst`")
    approximate: bool = option(False, "where the format has only the other form of GELU, take that one")
    verify: bool | None = option(
        None,
        "load the result in the program that it is for and compare; auto: where that is installed",
        auto=True,
        group="Proof",
    )
    nanogpt: str | None = option(None, "a checkout of nanoGPT, whose model.py verifies `format` nanogpt", path=True)

    def check(self) -> None:
        for name, what in (("src", "the model to convert"), ("dst", "where to write it"), ("format", "what to write")):
            if getattr(self, name) is None:
                raise UsageError(f"`{name}` is missing: {what}; convert SRC DST `format` huggingface")
        if self.dtype == "q8_0" and self.format != "gguf":
            raise UsageError(f"`dtype` q8_0 is for `format` gguf, not {self.format}; use float32, float16 or bfloat16")
