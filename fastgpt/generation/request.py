"""Prompts, which are checked, and their continuations with the times that they took."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from fastgpt.errors import UsageError
from fastgpt.generation.candidates import Candidate
from fastgpt.system.units import counted
from fastgpt.tokenizer.base import Tokenizer

Prompt = str | Sequence[int]  # text, or token ids


@dataclass(frozen=True)
class Timings:
    """Seconds from the submission of a request; None for what did not happen."""

    started: float | None  # when its first tokens were computed
    first_token: float | None
    finished: float


@dataclass(frozen=True)
class Completion:
    """A finished continuation.

    Attributes:
        index: the prompt's place among those given together; of `Engine.submit`, the number of the request.
        sample: number of the continuation, below `SamplingParams.num_samples`.
        text: the continuation, without the prompt and without the stop text and what follows it; empty without a
            tokenizer.
        tokens: the generated tokens; the one that completed a stop text is among them, a stop token is not.
        finish_reason: "stop" (a stop text or token), "length" (max_new_tokens, or the end of block_size),
            "cancelled" or "error".
        error: with "error", what is wrong and what to do. A prompt that cannot be continued has one completion; logits
            that are not numbers end only the continuation that met them.
        logprobs: with `SamplingParams.logprobs`, for each token its log-probability and those of the likeliest
            tokens by id, in nats, under the model itself: before penalties, temperature and filters.
        candidates: with `SamplingParams.candidates`, for each token the five likeliest under the model, in that order,
            then the token itself where it is not among them.
    """

    index: int
    sample: int
    prompt: Prompt
    text: str
    tokens: list[int]
    finish_reason: str
    timings: Timings
    error: str | None = None
    logprobs: list[tuple[float, list[tuple[int, float]]]] | None = None
    candidates: list[list[Candidate]] | None = None

    @property
    def refused(self) -> bool:
        """Whether the prompt cannot be continued at all: there is no other completion of it."""
        return self.error is not None and self.timings.started is None


class Piece(NamedTuple):
    """New tokens and text of a continuation; the last piece of each carries its `completion`."""

    index: int
    sample: int
    text: str
    tokens: list[int]
    completion: Completion | None = None


@dataclass
class Stats:
    """Counts and times so far.

    The seconds of a forward pass are shared between prefill and decode in proportion to the tokens of each.
    """

    steps: int = 0  # forward passes
    prefill_tokens: int = 0  # computed to read prompts, or to read a text again after a preemption
    prefill_seconds: float = 0.0
    decode_tokens: int = 0  # generated; not those that a prefill yields: the first, and one after a preemption
    decode_seconds: float = 0.0
    proposed: int = 0  # guesses
    accepted: int = 0  # guesses that were right
    first_token_seconds: list[float] = field(default_factory=list)  # of each request, from its submission
    token_seconds: list[float] = field(default_factory=list)  # of each continuation, a token's average after the first


def prompt_tokens(prompt: Prompt, tokenizer: Tokenizer | None, vocab_size: int) -> list[int]:
    """The ids of a prompt, at least one: an empty one begins with the tokenizer's start token.

    Raises:
        UsageError: neither text nor ids, an id outside the vocabulary, or a character that the tokenizer does not
            know; without a tokenizer also text, or an empty prompt.
    """
    if isinstance(prompt, str):
        if tokenizer is None:
            raise UsageError("a prompt of text needs a tokenizer; pass token ids instead")
        tokens = tokenizer.encode(prompt).tolist()
    else:
        tokens = _whole_numbers(prompt)
        unknown = next((token for token in tokens if not 0 <= token < vocab_size), None)
        if unknown is not None:
            raise UsageError(f"token {unknown} is outside the vocabulary of {counted(vocab_size, 'token')}")
    if tokens:
        return tokens
    if tokenizer is None:
        raise UsageError("an empty prompt needs a tokenizer, which knows what to start from; pass a token id")
    return [tokenizer.start_token]


def _whole_numbers(prompt: Sequence[int]) -> list[int]:
    try:
        return [token.__index__() for token in prompt]
    except (AttributeError, TypeError):
        raise UsageError(f"a prompt is text or a list of token ids, not {prompt!r:.60}") from None
