"""The plan of one forward pass, which the `Scheduler` makes and the `Runner` computes."""

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field
from operator import itemgetter

import numpy as np

from fastgpt.config.generation import SamplingParams
from fastgpt.generation.ngram import NgramProposer
from fastgpt.model.pages import BlockTable


@dataclass(eq=False, slots=True)
class Sample:
    """One continuation under way: its tokens, and while it runs its pages and its slot.

    Attributes:
        order: place in the queue: (number of the request, number of the continuation).
        tokens: prompt and continuation.
        start: the first token of the window; 0 until the window slides.
        slot: its place in the batch, -1 while it waits.
        decoding: its chunk in every iteration that decodes it.
        granted: positions below it lie in pages that it shares with nobody, so decoding goes on there without a check.
        siblings: continuations of the same prompt that wait until this one has read it.
        key: of its random stream.
    """

    order: tuple[int, int]
    tokens: list[int]
    prompt_length: int
    params: SamplingParams
    start: int = 0
    slot: int = -1
    table: BlockTable | None = None
    decoding: "LastToken | None" = None
    granted: int = 0
    proposer: NgramProposer | None = None
    siblings: list["Sample"] = field(default_factory=list)
    key: bytes = b""

    @property
    def generated(self) -> int:
        return len(self.tokens) - self.prompt_length


@dataclass(slots=True)
class Chunk:
    """Tokens that a forward pass computes for one sequence; the last ones, `draft`, are guesses."""

    sample: Sample
    first: int  # position of the first one in the window
    tokens: list[int]
    draft: list[int]
    reading: bool  # a prompt, or the text so far after a preemption
    rows: int  # of its last tokens that predict: 0 before the end of a prompt, else 1 and one for each guess


@dataclass(eq=False, slots=True)
class LastToken:
    """The chunk of a sequence that decodes, for all of its iterations: it reads the sequence's present end."""

    sample: Sample
    draft: list[int] = field(default_factory=list)
    reading: bool = False
    rows: int = 1

    @property
    def first(self) -> int:
        assert self.sample.table is not None
        return self.sample.table.length - 1

    @property
    def tokens(self) -> list[int]:
        return self.sample.tokens[-1:]


class DecodeBatch:
    """Running sequences that all decode, kept from one iteration to the next until a sequence comes or goes.

    Each iteration is the one before, moved by one position. So only sequences at the end of their pages need a look.

    Attributes:
        chunks, samples, tables, slots: one of each for each sequence, oldest first.
        longs: int64 (3, B): the tokens of the forward pass, their positions and their places in the pages.
        ints: int32 (2, B): slots, and lengths with the token of this forward pass.
        iteration: counts them from 0.
        full: by iteration, the indices of the sequences whose pages are full when it begins.
    """

    def __init__(self, chunks: list[LastToken], page_size: int):
        """The first iteration, whose tokens the block tables already count."""
        self.chunks = chunks
        self.samples = [chunk.sample for chunk in chunks]
        self.tables = [sample.table for sample in self.samples if sample.table is not None]
        self.slots = [sample.slot for sample in self.samples]
        lengths = [table.length for table in self.tables]
        pages = [table.pages[(table.length - 1) // page_size] for table in self.tables]
        self._texts = [sample.tokens for sample in self.samples]
        self._prompts = np.array([sample.prompt_length for sample in self.samples], np.int32)
        self.longs, self.ints = np.array([pages, lengths, pages], np.int64), np.array([self.slots, lengths], np.int32)
        self.longs[1] -= 1
        self.longs[2] = self.longs[2] * page_size + self.longs[1] % page_size
        self.iteration = 0
        self.full: defaultdict[int, list[int]] = defaultdict(list)
        for i, (sample, length) in enumerate(zip(self.samples, lengths, strict=True)):
            self.full[sample.granted - length + 1].append(i)
        self._read()

    def advance(self) -> None:
        """Move to the next iteration; the places in new pages are left to the caller."""
        self.iteration += 1
        self.longs[1:] += 1
        self.ints[1] += 1
        self._read()

    @property
    def generated(self) -> list[int]:
        """`Sample.generated` of each, before this forward pass."""
        return (self.ints[1] - self._prompts).tolist()

    def _read(self) -> None:
        self.longs[0] = np.fromiter(map(itemgetter(-1), self._texts), np.int64, len(self._texts))


@dataclass(slots=True)
class Plan:
    """One forward pass. It is valid until the next plan, which may use its chunks again.

    Attributes:
        chunks: first those of one token, then the longer ones; each kind oldest first.
        decoding: how many chunks have one token.
        rows: how many tokens predict.
        tokens, read: how many tokens are computed, and how many of those belong to prompts or preempted sequences.
        changed: the sequences whose pages may have changed since the plan before, and all that have just got a slot.
        batch: all chunks, where every running sequence decodes.
    """

    chunks: Sequence[Chunk | LastToken] = ()
    decoding: int = 0
    rows: int = 0
    tokens: int = 0
    read: int = 0
    changed: list[Sample] = field(default_factory=list)
    batch: DecodeBatch | None = None
