"""Generates one continuation at a time, with its own cache or none, in a plain loop over the model."""

import time
from collections.abc import Iterator

import torch

from fastgpt.config.generation import SamplingParams
from fastgpt.generation.candidates import Candidate
from fastgpt.generation.compiled_decoder import CompiledDecoder, DenseDecoder
from fastgpt.generation.paged_text import PagedText
from fastgpt.generation.random_stream import prompt_digest, stream_key
from fastgpt.generation.request import Completion, Prompt, Timings, prompt_tokens
from fastgpt.generation.sampler import NOT_DRAWN, Drawn, Sampler, not_numbers
from fastgpt.model.gpt import GPT
from fastgpt.model.kv_cache import DenseCache
from fastgpt.tokenizer.base import Tokenizer
from fastgpt.tokenizer.detokenizer import Detokenizer


class Generation(Iterator[str]):
    """One continuation under way: an iterator of its pieces of text. Its attributes are up to date at every piece.

    Past block_size the window slides: every further token costs a prefill of the last block_size tokens.

    Attributes:
        prefill_tokens, prefill_seconds: for the prompt, or for its last block_size tokens.
        decode_tokens, decode_seconds: for the new tokens after the first, which the prefill yields.
        drawn: the new tokens with their log-probabilities and candidates, without a stop token.
        finish_reason, error: as in `Completion`, once it has ended.
    """

    def __init__(
        self,
        model: GPT,
        tokenizer: Tokenizer,
        prompt: Prompt,
        params: SamplingParams,
        cache: str = "dense",
        decoder: CompiledDecoder | None = None,
        *,
        idle: list[PagedText] | None = None,
        occurrence: int = 0,
        sample: int = 0,
    ):
        """
        Args:
            cache: "dense", "paged" or "none".
            decoder: the compiled model, for the dense cache.
            idle: paged caches that no continuation uses. One is taken, or made where there is none, and put back later.
            occurrence, sample: which of the random streams of this prompt and seed; see `random_stream.stream_key`.
        """
        self.decoder, self.idle, self.paged = decoder, [] if idle is None else idle, cache == "paged"
        self.model, self.tokenizer, self.params, self.text = model, tokenizer, params, prompt
        self.cached = cache == "dense"
        self.prompt = prompt_tokens(prompt, tokenizer, tokenizer.vocab_size)
        self.key = stream_key(prompt_digest(self.prompt), params.seed, occurrence, sample)
        self.prefill_tokens, self.prefill_seconds = min(len(self.prompt), model.config.block_size), 0.0
        self.decode_tokens, self.decode_seconds = 0, 0.0
        self.drawn: list[Drawn] = []
        self.finish_reason: str | None = None
        self.error: str | None = None
        self._detokenizer = Detokenizer(tokenizer, params.stop, self.prompt)
        self._pieces = self._read()

    def __next__(self) -> str:
        return next(self._pieces)

    @property
    def candidates(self) -> list[list[Candidate]]:
        """Those of each new token so far, as in `Completion`; each list is empty without the setting `candidates`."""
        return [one.candidates or [] for one in self.drawn]

    def tokens(self) -> Iterator[int]:
        """The new tokens, one by one, up to a stop token; stop texts are ignored."""
        for one in self._draw():
            yield one.token

    def completion(self, index: int, sample: int, waited: float = 0.0) -> Completion:
        """Generate the rest, and return the whole continuation; `waited`: seconds from its submission to its start."""
        for _ in self:
            pass
        spent = self.prefill_seconds + self.decode_seconds
        first = waited + self.prefill_seconds if self.prefill_seconds else None
        asked = self.params.logprobs is not None
        return Completion(
            index,
            sample,
            self.text,
            self._detokenizer.text,
            [one.token for one in self.drawn],
            self.finish_reason or "length",
            Timings(None if first is None else waited, first, waited + spent),
            self.error,
            logprobs=[(one.logprob or 0.0, one.top or []) for one in self.drawn] if asked else None,
            candidates=self.candidates if self.params.candidates else None,
        )

    def _draw(self) -> Iterator[Drawn]:
        if not self.paged:
            yield from self._draw_with(None)
            return
        pages = self.idle.pop() if self.idle else PagedText(self.model)
        pages.begin()
        try:
            yield from self._draw_with(pages)
        finally:
            self.idle.append(pages)

    def _draw_with(self, pages: PagedText | None) -> Iterator[Drawn]:
        device = self.model.device
        text, latest = self.prompt.copy(), None
        sampler = Sampler(1, self.tokenizer.vocab_size, device)
        sampler.begin(0, self.params, self.prompt, key=self.key)
        cache = DenseCache(self.model.config, device=device, dtype=self.model.dtype) if self.cached else None
        decoder = DenseDecoder(self.decoder, cache) if self.decoder and cache else None
        for i in range(self.params.max_new_tokens):
            began = time.perf_counter()
            with torch.inference_mode():
                sampled = sampler(self._logits(text, latest, pages or cache, decoder), [0], [i])
            (one,) = sampled.to_host()
            self._count(i, time.perf_counter() - began)
            if one.token == NOT_DRAWN:
                self.finish_reason, self.error = "error", not_numbers(len(text))
                return
            if one.token in self.params.stop_tokens:
                self.finish_reason = "stop"
                return
            text.append(one.token)
            latest = sampled.tokens
            self.drawn.append(one)
            yield one
        self.finish_reason = "length"

    def _logits(
        self,
        text: list[int],
        latest: torch.Tensor | None,
        cache: DenseCache | PagedText | None,
        decoder: DenseDecoder | None,
    ) -> torch.Tensor:
        """The next token's logits (1, V), from the last block_size tokens; `latest` (1,) is the newest of them."""
        if isinstance(cache, PagedText):
            return cache(text)
        block = self.model.config.block_size
        if cache is None or latest is None or cache.length == block:
            if cache is not None:  # as the window slides every token's position changes, so nothing cached is valid
                cache.clear()
            window = torch.tensor([text[-block:]], device=self.model.device)
            return self.model(window, cache=cache, last_only=True)[:, -1]
        if decoder is not None:
            return decoder(latest)
        return self.model(latest[None], cache=cache, last_only=True)[:, -1]

    def _count(self, index: int, seconds: float) -> None:
        if index == 0:
            self.prefill_seconds = seconds
        else:
            self.decode_tokens += 1
            self.decode_seconds += seconds

    def _read(self) -> Iterator[str]:
        """The text in whole characters, up to a stop text."""
        detokenizer = self._detokenizer
        for token in self.tokens():
            if piece := detokenizer.push(token):
                yield piece
            if detokenizer.stopped:
                self.finish_reason = "stop"
                return
        if piece := detokenizer.finish():
            yield piece
