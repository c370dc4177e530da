"""A model with its tokenizer: text in, text out."""

from collections.abc import Callable
from typing import TYPE_CHECKING, Unpack

import torch

from fastgpt.config.fields import check_names
from fastgpt.config.generation import CACHES
from fastgpt.errors import RunFailed, UsageError
from fastgpt.generation.compiled_decoder import CompiledDecoder
from fastgpt.generation.paged_text import PagedText
from fastgpt.generation.request import Prompt
from fastgpt.generation.settings import EngineOptions, SamplingSettings, sampling
from fastgpt.generation.single import Generation
from fastgpt.model.gpt import GPT
from fastgpt.tokenizer.base import Tokenizer

if TYPE_CHECKING:
    from fastgpt.generation.engine import Engine


SINGLE_CACHES = ("none", "dense")


class TextGenerator:
    """A model and its tokenizer: text in, text out.

    Attributes:
        packed: the model was trained with attention within documents only.
    """

    def __init__(self, model: GPT, tokenizer: Tokenizer, packed: bool = False):
        self.model, self.tokenizer, self.packed = model, tokenizer, packed
        self.decoder: CompiledDecoder | None = None
        self._idle: list[PagedText] = []  # paged caches of streams that have ended

    def compile(self, announce: Callable[[str], None] | None = None) -> None:
        """Decode with a `CompiledDecoder` from now on: it is compiled, or loaded where an earlier run compiled it.

        It serves single continuations on a CPU: with the dense cache, and in engines while only one is running.

        Args:
            announce: called with a sentence before compiling begins.

        Raises:
            CannotCompile: the model is not on a CPU, or there is no compiler.
        """
        self.decoder = self.decoder or CompiledDecoder(self.model, announce)

    def generate(self, prompt: Prompt = "", *, cache: str = "auto", **settings: Unpack[SamplingSettings]) -> str:
        """The continuation of the prompt, without the prompt itself. See `stream`.

        Raises:
            RunFailed: the model's logits are not numbers.
        """
        made = self.stream(prompt, cache=cache, **settings)
        text = "".join(made)
        if made.error is not None:
            raise RunFailed(made.error)
        return text

    def stream(self, prompt: Prompt = "", *, cache: str = "auto", **settings: Unpack[SamplingSettings]) -> Generation:
        """The continuation piece by piece, as it comes: an iterator of texts.

        Args:
            prompt: any text, or token ids; an empty one starts at the tokenizer's start token.
            cache: "dense" keeps keys and values in a buffer, "paged" in pages, "none" computes them again for every
                token. "auto" is "paged" on CUDA, where each token is then the replay of a CUDA graph, and "dense"
                elsewhere.
            settings: fields of `SamplingParams`.

        Raises:
            UsageError: an unknown setting or one outside its limits, more than one sample, or a character that the
                tokenizer does not know.
        """
        params = sampling(settings)
        if cache not in CACHES:
            raise UsageError(f"cache {cache!r} is not one of {', '.join(CACHES)}")
        if cache == "auto":
            cache = single_cache(self.model.device)
        if params.num_samples > 1:
            raise UsageError(f"num_samples {params.num_samples}: a stream is one continuation; use engine()")
        return Generation(self.model, self.tokenizer, prompt, params, cache, self.decoder, idle=self._idle)

    def engine(self, **options: Unpack[EngineOptions]) -> "Engine":
        """An engine for many prompts at once; see `fastgpt.generation.engine.Engine` for its options.

        Raises:
            UsageError: an unknown option, or one outside its limits.
        """
        from fastgpt.generation.engine import Engine

        check_names(options, EngineOptions.__annotations__)
        return Engine(self.model, self.tokenizer, **{"decoder": self.decoder, **options})


def single_cache(device: torch.device) -> str:
    """The fastest cache for one continuation: paged with CUDA graphs, where there are any."""
    return "paged" if device.type == "cuda" else "dense"
