"""Requests that an engine has taken and not finished, and what each of their continuations has given out so far."""

import time
from collections.abc import Sequence
from dataclasses import dataclass, field

from fastgpt.config.generation import SamplingParams
from fastgpt.generation.candidates import Candidate
from fastgpt.generation.plan import Sample
from fastgpt.generation.request import Completion, Piece, Prompt, Stats, Timings
from fastgpt.generation.sampler import NOT_DRAWN, Drawn, not_numbers
from fastgpt.tokenizer.detokenizer import Detokenizer


@dataclass(eq=False, slots=True)
class Sink:
    """Collects the pieces of requests that were given together; `open`: their continuations that are not finished."""

    pieces: list[Piece] = field(default_factory=list)
    open: int = 0

    def take(self) -> list[Piece]:
        """The pieces that came since the last call."""
        pieces, self.pieces = self.pieces, []
        return pieces


@dataclass(eq=False)
class Request:
    """A prompt with its continuations that are under way."""

    number: int  # in the order of submission
    index: int  # what its pieces and completions are called
    sink: Sink
    prompt: Prompt
    params: SamplingParams
    submitted: float
    samples: dict[Sample, None] = field(default_factory=dict)  # those that are not finished
    started: float | None = None
    first_token: float | None = None

    def timings(self, now: float) -> Timings:
        since = [None if moment is None else moment - self.submitted for moment in (self.started, self.first_token)]
        return Timings(*since, finished=now - self.submitted)

    def refuse(self, sample: int, error: str) -> None:
        """Give out that the prompt cannot be continued, as the completion of one continuation."""
        waited = Timings(None, None, time.perf_counter() - self.submitted)
        completion = Completion(self.index, sample, self.prompt, "", [], "error", waited, error)
        self.sink.pieces.append(Piece(self.index, sample, "", [], completion))


@dataclass(eq=False, slots=True)
class Output:
    """The continuation of one sample: what of it was given out, and what has not been yet.

    Attributes:
        length: of prompt and continuation, at which it ends.
        text, tokens: what has come since the last piece.
    """

    request: Request
    number: int  # of the continuation
    length: int
    stop_tokens: Sequence[int]
    detokenizer: Detokenizer | None
    logprobs: list[tuple[float, list[tuple[int, float]]]] | None
    candidates: list[list[Candidate]] | None
    first_token: float | None = None
    text: str = ""
    tokens: list[int] = field(default_factory=list)

    def append(self, sample: Sample, drawn: Drawn, stats: Stats) -> str | None:
        """Add a token to the sample and to what is to be given out; why the continuation ends with it, or None."""
        token, logprob, top, candidates = drawn
        if token == NOT_DRAWN:
            return "error"
        if self.first_token is None:
            self.first_token, request = time.perf_counter(), self.request
            if request.first_token is None:
                request.first_token = self.first_token
                stats.first_token_seconds.append(request.first_token - request.submitted)
        if token in self.stop_tokens:
            return "stop"
        sample.tokens.append(token)
        self.tokens.append(token)
        if logprob is not None and self.logprobs is not None:
            self.logprobs.append((logprob, top or []))
        if candidates is not None and self.candidates is not None:
            self.candidates.append(candidates)
        if detokenizer := self.detokenizer:
            self.text += detokenizer.push(token)
            if detokenizer.stopped:
                return "stop"
        return "length" if len(sample.tokens) >= self.length else None

    def finish(self, sample: Sample, reason: str, stats: Stats) -> None:
        """Give out the last piece, with the completion."""
        request, now = self.request, time.perf_counter()
        if self.detokenizer:
            self.text += self.detokenizer.finish()
        if self.first_token is not None and sample.generated > 1:
            stats.token_seconds.append((now - self.first_token) / (sample.generated - 1))
        completion = Completion(
            request.index,
            self.number,
            request.prompt,
            self.detokenizer.text if self.detokenizer else "",
            sample.tokens[sample.prompt_length :],
            reason,
            request.timings(now),
            not_numbers(len(sample.tokens)) if reason == "error" else None,
            logprobs=self.logprobs,
            candidates=self.candidates,
        )
        request.sink.pieces.append(Piece(request.index, self.number, self.text, self.tokens, completion))
        request.sink.open -= 1
        del request.samples[sample]
