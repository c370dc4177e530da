"""The log-likelihood of continuations, where a context that several of them share is computed once.

    requests = [Request(*encode_pair(tokenizer, "The sky is", " blue")), ...]
    results = log_likelihoods(model, requests)

Boundaries between context and continuation are those of EleutherAI's lm-evaluation-harness, so that results equal its
own: spaces at the end of a context move to the continuation, both are encoded together, and the continuation is what
follows as many tokens as the context alone has. A context that is too long is cut on the left. A context of no text is
the vocabulary's start token.
"""

import itertools
import math
from collections import defaultdict
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch

from fastgpt.errors import RunFailed, UsageError
from fastgpt.evaluation.token_scores import token_scores
from fastgpt.model.gpt import GPT
from fastgpt.model.kv_cache import DenseCache
from fastgpt.system import out_of_memory
from fastgpt.system.bars import Advance
from fastgpt.system.device import send
from fastgpt.system.units import counted
from fastgpt.tokenizer.base import Tokenizer

BATCH_SIZE = 64  # continuations that run at once
Ids = tuple[int, ...]


class Request(NamedTuple):
    """Token ids of a context and of its continuation, neither of them empty."""

    context: Ids
    continuation: Ids


class Likelihood(NamedTuple):
    """The log-probability of a continuation, and whether each of its tokens is the likeliest one."""

    nats: float
    greedy: bool


class _Numbered(NamedTuple):
    """A continuation, and the number of its request."""

    number: int
    continuation: Ids


def encode_pair(tokenizer: Tokenizer, context: str, continuation: str) -> Request:
    """The tokens of a context and of the continuation after it.

    Raises:
        UsageError: a character that the vocabulary lacks, or a continuation without a token of its own.
    """
    stripped = context.rstrip()
    continuation = context[len(stripped) :] + continuation
    before = _ids(tokenizer, stripped)
    if before:
        after = _ids(tokenizer, stripped + continuation)[len(before) :]
    else:
        before, after = (tokenizer.start_token,), _ids(tokenizer, continuation)
        if after[:1] == before:
            after = after[1:]
    if not after:
        raise UsageError(f"{continuation!r:.60} has no token of its own after its context; give it more text")
    return Request(before, after)


def _ids(tokenizer: Tokenizer, text: str) -> Ids:
    return tuple(tokenizer.encode(text).tolist()) if text else ()


def is_cut(request: Request, block_size: int) -> bool:
    """Whether the context is too long to be read whole."""
    return len(request.context) + len(request.continuation) > block_size + 1


@torch.no_grad()
def log_likelihoods(
    model: GPT,
    requests: Sequence[Request],
    *,
    batch_size: int | None = None,
    advance: Advance = lambda done: None,
) -> list[Likelihood]:
    """The log-likelihood of each request.

    Contexts with one continuation are computed with it, several in a padded batch. Keys and values of a context with
    several continuations are computed once, together with those of other contexts of its length, and continuations
    are batches over copies of them.

    Args:
        batch_size: contexts or continuations that run at once; default 64. A batch that does not fit in memory is
            computed in halves.

    Raises:
        UsageError: a continuation longer than block_size.
        RunFailed: a likelihood is not a number, or the memory is too small for a single context.
    """
    model.eval()
    alone, shared = _groups(requests, model.config.block_size)
    scores: dict[int, Likelihood] = {}
    B = batch_size or BATCH_SIZE
    try:
        for scored in itertools.chain(_alone(model, alone, B), _shared(model, shared, B)):
            scores.update(scored)
            advance(len(scored))
    except out_of_memory.DoesNotFit:
        raise RunFailed("the keys and values of a single context do not fit into the memory; free some") from None
    return [scores[number] for number in range(len(requests))]


Group = tuple[Ids, list[_Numbered]]  # a context, and what continues it
Scored = list[tuple[int, Likelihood]]


def _groups(requests: Sequence[Request], block_size: int) -> tuple[list[Group], list[Group]]:
    """The continuations by their contexts, as far as those are read: of contexts with one, and with several."""
    groups: defaultdict[Ids, list[_Numbered]] = defaultdict(list)
    for number, (context, continuation) in enumerate(requests):
        if len(continuation) > block_size:
            raise UsageError(
                f"a continuation of {counted(len(continuation), 'token')} is longer than the model's block_size "
                f"{block_size}; shorten it"
            )
        kept = context[-(block_size + 1 - len(continuation)) :]
        groups[kept].append(_Numbered(number, continuation))
    several = [group for group in groups.items() if len(group[1]) > 1]
    return [group for group in groups.items() if len(group[1]) == 1], several


def _alone(model: GPT, groups: list[Group], batch_size: int) -> Iterator[Scored]:
    """Contexts with one continuation: rows of tokens, the longest first, so that little is padding."""

    def compute(part: list[tuple[Ids, _Numbered]]) -> Scored:
        x = _padded([(*context, *own.continuation[:-1]) for context, own in part], model.device)
        hidden = model.hidden(x)
        rows = [hidden[row, len(context) - 1 :][: len(own.continuation)] for row, (context, own) in enumerate(part)]
        return _scored(model, rows, [own for _, own in part])

    rows = [(context, own) for context, (own,) in groups]
    rows.sort(key=lambda row: -len(row[0]) - len(row[1].continuation))
    for first in range(0, len(rows), batch_size):
        yield from out_of_memory.in_halves(compute, rows[first : first + batch_size])


def _shared(model: GPT, groups: list[Group], batch_size: int) -> Iterator[Scored]:
    """Contexts with several continuations: first the contexts of one length, then what continues them."""
    by_length: defaultdict[int, list[Group]] = defaultdict(list)
    for group in groups:
        by_length[len(group[0])].append(group)
    for length in sorted(by_length, reverse=True):
        same = by_length[length]
        most = max(1, batch_size // max(len(own) for _, own in same))
        for first in range(0, len(same), most):
            parts = out_of_memory.in_halves(
                lambda part: list(_continued(model, part, batch_size)), same[first : first + most]
            )
            for part in parts:
                yield from part


def _continued(model: GPT, groups: list[Group], batch_size: int) -> Iterator[Scored]:
    """Contexts of one length, each computed once, and their continuations in batches."""
    length = len(groups[0][0])
    cache = DenseCache(model.config, len(groups), capacity=length, device=model.device, dtype=model.dtype)
    last = model.hidden(_padded([context for context, _ in groups], model.device), cache=cache)[:, -1:]  # (B, 1, C)

    def compute(part: list[tuple[int, _Numbered]]) -> Scored:
        which = send(torch.tensor([row for row, _ in part]), model.device)
        hidden, room = last[which], max(len(own.continuation) for _, own in part) - 1
        if room:
            x = _padded([own.continuation[:-1] for _, own in part], model.device)
            hidden = torch.cat([hidden, model.hidden(x, cache=cache.fork(which, room))], dim=1)
        return _scored(
            model,
            [hidden[row, : len(own.continuation)] for row, (_, own) in enumerate(part)],
            [own for _, own in part],
        )

    rows = [(row, own) for row, (_, owns) in enumerate(groups) for own in owns]
    for first in range(0, len(rows), batch_size):
        yield from out_of_memory.in_halves(compute, rows[first : first + batch_size])


def _padded(rows: Sequence[Sequence[int]], device: torch.device) -> torch.Tensor:
    """Rows of ids as int64 (B, T), with zeros after the shorter ones, which no earlier token attends to."""
    x = torch.zeros(len(rows), max(map(len, rows)), dtype=torch.int64)
    for at, row in zip(x, rows, strict=True):
        at[: len(row)] = torch.tensor(row, dtype=torch.int64)
    return send(x, device)


def _scored(model: GPT, hidden: Sequence[torch.Tensor], owns: Sequence[_Numbered]) -> Scored:
    """The likelihoods of continuations by the hidden states (tokens, C) before each of their tokens."""
    targets = send(torch.tensor([id for own in owns for id in own.continuation]), model.device)
    scores = token_scores(model, torch.cat(list(hidden)), targets)
    lengths = [len(own.continuation) for own in owns]
    found: Scored = []
    for own, losses, greedy in zip(owns, scores.losses.split(lengths), scores.greedy.split(lengths), strict=True):
        nats = -losses.sum().item()
        if not math.isfinite(nats):
            raise RunFailed(f"a log-likelihood is {nats}: the model's logits are not finite; try `dtype` float32")
        found.append((own.number, Likelihood(nats, bool(greedy.all()))))
    return found
