"""What comes out: continuations, piece by piece and whole, and what the time went into."""

from dataclasses import dataclass, field
from typing import NamedTuple

from fastgpt.prompt import Prompt


@dataclass(frozen=True)
class Timings:
    """Seconds from the submission of a request; None for what did not happen."""

    started: float | None  # its first tokens were computed
    first_token: float | None
    finished: float


@dataclass(frozen=True)
class Completion:
    """A finished continuation.

    Attributes:
        index: the prompt's place among those given together; of `Engine.submit`, the number of the request.
        sample: number of the continuation, below `SamplingParams.num_samples`.
        text: the continuation, without the prompt, the stop text and all behind it; empty without a tokenizer.
        tokens: the generated tokens, with the one that completed a stop text, without a stop token.
        finish_reason: "stop" (a stop text or token), "length" (max_new_tokens, or the end of block_size),
            "cancelled" or "error".
        error: with "error", what is wrong and what to do. A prompt that cannot be continued has one completion; logits
            that are not numbers end only the continuation that met them.
        logprobs: with `SamplingParams.logprobs`, for each token its log-probability and those of the likeliest
            tokens by id, in nats, under the model itself: before penalties, temperature and filters.
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

    @property
    def refused(self) -> bool:
        """Whether the prompt cannot be continued at all: there is no other completion of it."""
        return self.error is not None and self.timings.started is None


class Piece(NamedTuple):
    """What was added to a continuation; the last one of each carries its `completion`."""

    index: int
    sample: int
    text: str
    tokens: list[int]
    completion: Completion | None = None


@dataclass
class Stats:
    """Counts and times so far. A step's seconds are shared between prefill and decode by the tokens it computed."""

    steps: int = 0
    prefill_tokens: int = 0  # computed to read prompts, or to read again after a preemption
    prefill_seconds: float = 0.0
    decode_tokens: int = 0  # generated, but for those that a prefill yields: the first, and one after a preemption
    decode_seconds: float = 0.0
    proposed: int = 0  # guesses
    accepted: int = 0  # right ones
    first_token_seconds: list[float] = field(default_factory=list)  # of each request, from its submission
    token_seconds: list[float] = field(default_factory=list)  # of each continuation, a token's average after the first
