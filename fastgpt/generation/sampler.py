"""Draws tokens from logits, on the device: one vectorised draw for many requests, each with its own settings.

`Sampler` holds the requests' settings and penalties by slot. `Sampled` is what one call drew; its `to_host` brings the
tokens to the host in one copy, as `Drawn`. `penalize`, `ranks`, `least_kept` and `draw` do the arithmetic.

Among equal scores the lowest id always comes first. So top-k keeps exactly k tokens, and top-k of 1 draws the greedy
token. `torch.topk` leaves the order of equal numbers open, so it is given distinct ones. Min-p is a threshold on
probabilities, which all tokens of the same score pass or fail together.

A row's token depends on its logits, its settings and one number in [0, 1). That number depends only on the key of the
continuation and the token's place in it (`random_stream`). All rows walk the vocabulary in the same order, whichever
filters are on. So a request draws the same tokens whatever else is in the batch, after a preemption, and under
speculation.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch

from fastgpt.config.generation import SamplingParams
from fastgpt.generation.candidates import COUNT, Candidate, Candidates
from fastgpt.generation.random_stream import prompt_digest, stream_key, uniform

FLOAT32 = torch.finfo(torch.float32)
INT32, INT64 = torch.iinfo(torch.int32), torch.iinfo(torch.int64)
INF = float("inf")
NOT_DRAWN = -1  # the token of a row from which none can be drawn


class Drawn(NamedTuple):
    """A token on the host. `top`: (id, log-probability) of the likeliest tokens, in that order.

    `candidates`: as in `candidates.Candidates.to_host`; None where the request asks for none.
    """

    token: int  # NOT_DRAWN where the logits are not numbers
    logprob: float | None = None
    top: list[tuple[int, float]] | None = None
    candidates: list[Candidate] | None = None


@dataclass(frozen=True)
class Sampled:
    """The tokens that one call drew, on the device; K is the most log-probabilities that a row asks for."""

    tokens: torch.Tensor  # int64 (R,), NOT_DRAWN where the logits are not numbers
    logprobs: torch.Tensor | None  # float32 (R,); None where no row asks
    top_logprobs: torch.Tensor | None  # float32 (R, K)
    top_ids: torch.Tensor | None  # int64 (R, K)
    asked: tuple[int | None, ...]  # `SamplingParams.logprobs` of each row
    candidates: Candidates | None = None  # None where no row asks

    def to_host(self) -> list[Drawn]:
        """Each row's token and what it asks for; `top` is at most the vocabulary."""
        drawn = self._with_logprobs()
        if self.candidates is None:
            return drawn
        return [one._replace(candidates=own) for one, own in zip(drawn, self.candidates.to_host(), strict=True)]

    def _with_logprobs(self) -> list[Drawn]:
        """Each row's token and log-probabilities, in one copy."""
        if self.logprobs is None or self.top_logprobs is None or self.top_ids is None:
            return [Drawn(token) for token in self.tokens.cpu().tolist()]
        columns = (self.tokens[:, None], self.top_ids, self.logprobs[:, None], self.top_logprobs)
        # Floats travel as their bits, so that one tensor holds all.
        packed = torch.cat([c.view(torch.int32) if c.is_floating_point() else c.int() for c in columns], 1).cpu()
        width = 1 + self.top_ids.shape[1]
        ids, logprobs = packed[:, :width].tolist(), packed[:, width:].view(torch.float32).tolist()
        return [
            Drawn(i[0]) if n is None else Drawn(i[0], p[0], list(zip(i[1 : n + 1], p[1 : n + 1], strict=True)))
            for n, i, p in zip(self.asked, ids, logprobs, strict=True)
        ]


@dataclass(frozen=True)
class _Request:
    """The settings of a slot's request, on the host."""

    key: bytes  # of its random stream
    logprobs: int | None
    candidates: bool
    greedy: bool
    penalized: bool
    columns: int  # how many of the likeliest tokens its filters need in order; 0: none
    top_p: bool
    min_p: bool
    settings: tuple[float, ...]  # the first of `_Settings.NAMES`, in their order


class _Settings:
    """The settings of R rows on the device by name, float32 (R, 1) each. One copy brings all of them.

    Each is looked up when it is needed: for a small vocabulary, looking up all would take longer than the draw.
    """

    NAMES = (
        *("slot", "repetition", "presence", "frequency", "temperature", "top_k", "top_p", "min_p"),
        "number",  # of `uniform`; inf where greedy
        "order",  # row numbers, in the order in which `Sampler._least` wants them
    )

    def __init__(self, columns: torch.Tensor):
        """columns: (names, R, 1)."""
        self._columns = columns

    def __getitem__(self, name: str) -> torch.Tensor:
        return self._columns[self.NAMES.index(name)]


@dataclass(frozen=True)
class _Texts:
    """The tokens in each slot's text, for the penalties."""

    counts: torch.Tensor  # float32 (slots, V): how often its request generated a token
    prompted: torch.Tensor  # bool (slots, V): its prompt holds the token

    def penalized(self, scores: torch.Tensor, s: _Settings) -> torch.Tensor:
        """The scores (R, V) of rows after their penalties."""
        _, place = self._slots(s)
        told = self.counts[place], self.prompted[place]
        return penalize(scores, *told, s["repetition"], s["presence"], s["frequency"])

    def count(self, tokens: torch.Tensor, s: _Settings) -> None:
        """Add to each row's text the token that it drew, tokens int64 (R,)."""
        slot, place = self._slots(s)
        self.counts.view(-1).index_add_(0, place * self.counts.shape[1] + tokens, (place == slot).float())

    def _slots(self, s: _Settings) -> tuple[torch.Tensor, torch.Tensor]:
        """Each row's slot, int64 (R,), and its row in `counts`: the last where the slot has none, being unpenalized."""
        slot = s["slot"][:, 0].long()
        return slot, slot.clamp(max=len(self.counts) - 1)


class Sampler:
    """Draws the next token of R rows, each with the settings of the request in its slot.

    The order is: repetition penalty (Keskar et al., 2019), presence and frequency penalties (OpenAI's API),
    temperature, top-k (Fan et al., 2018), top-p (Holtzman et al., 2020), min-p (Nguyen et al., 2024), draw.
    """

    def __init__(self, slots: int, vocab_size: int, device: torch.device | str = "cpu"):
        self.slots, self.vocab_size, self.device = slots, vocab_size, torch.device(device)
        self._requests: dict[int, _Request] = {}
        self._texts: _Texts | None = None  # until a request has penalties
        self._falling = torch.arange(vocab_size - 1, -1, -1, device=self.device)  # for `ranks`

    def begin(
        self,
        slot: int,
        params: SamplingParams,
        prompt: Sequence[int],
        said: Sequence[int] = (),
        *,
        key: bytes | None = None,
    ) -> None:
        """Give a slot to a request; the request before is forgotten.

        Args:
            said: the tokens that it has generated already, after a preemption or a fork.
            key: of its random stream; default: that of the first continuation of this prompt.

        Raises:
            IndexError: the sampler does not have the slot.
        """
        if not 0 <= slot < self.slots:
            raise IndexError(f"slot {slot} of a sampler with {self.slots}")
        key = key or stream_key(prompt_digest(prompt), params.seed)
        request = self._requests[slot] = self._request(slot, params, key)
        if not request.penalized:
            return
        self._make_room(slot)
        assert self._texts is not None
        self._texts.counts[slot] = self._send(self._count(said))
        self._texts.prompted[slot] = self._send(self._count(prompt) > 0)

    def _make_room(self, slot: int) -> None:
        """Have texts up to a slot. Their number doubles when they run out, because a large batch may never be full."""
        known = 0 if self._texts is None else len(self._texts.counts)
        if slot < known:
            return
        size = min(max(slot + 1, 2 * known), self.slots)
        counts = torch.zeros(size, self.vocab_size, dtype=torch.float32, device=self.device)
        prompted = torch.zeros_like(counts, dtype=torch.bool)
        if self._texts is not None:
            counts[:known], prompted[:known] = self._texts.counts, self._texts.prompted
        self._texts = _Texts(counts, prompted)

    @torch.no_grad()
    def __call__(self, logits: torch.Tensor, slots: Sequence[int], indices: Sequence[int]) -> Sampled:
        """Row r of logits (R, V) draws token number indices[r] (0: the first new one) of the request in slots[r].

        Log-probabilities are those of the model: log_softmax of the logits in float32, before penalties, temperature
        and filters. Several rows may have the same slot, unless its request has penalties, which count the tokens that
        are drawn here. Any float dtype is computed in float32. A row that holds NaN or +inf, or only -inf, draws
        NOT_DRAWN. Raises `ValueError` on another shape, `KeyError` on a slot without a request.
        """
        if logits.shape != (len(slots), self.vocab_size) or len(indices) != len(slots):
            raise ValueError(
                f"logits {tuple(logits.shape)} for {len(slots)} slots and {len(indices)} indices, "
                f"where ({len(slots)}, {self.vocab_size}) and as many indices are needed"
            )
        requests = [self._requests[slot] for slot in slots]
        greedy = all(q.greedy for q in requests)
        texts = self._texts if any(q.penalized for q in requests) else None
        if greedy and texts is None:
            return self._with_details(logits.argmax(-1), logits, None, requests)

        # Full sorts are slow, so rows with top-k, which need only its columns in order, are handled separately.
        short = [r for r, q in enumerate(requests) if 0 < q.columns < self.vocab_size]
        whole = [r for r, q in enumerate(requests) if q.columns == self.vocab_size]
        s = self._settings(requests, indices, short + whole)
        scores = logits.float()
        if texts is not None:
            scores = texts.penalized(scores, s)
        weights = None
        if greedy:
            tokens = scores.argmax(-1)
        else:
            # Only differences count. Those from the maximum cannot overflow, however low the temperature.
            weights = scores - scores.amax(-1, keepdim=True)
            weights.div_(s["temperature"]).exp_()  # (R, V), 1 for the likeliest
            if short or whole:
                ranked = ranks(scores, self._falling)
                weights.masked_fill_(ranked < self._least(ranked, weights, requests, s, short, whole), 0)
            if any(q.min_p for q in requests):
                weights.masked_fill_(weights < s["min_p"], 0)
            tokens = draw(scores, weights, s["number"])
        if texts is not None:
            texts.count(tokens, s)
        return self._with_details(tokens, logits, weights, requests)

    def _least(
        self,
        ranked: torch.Tensor,
        weights: torch.Tensor,
        requests: list[_Request],
        s: _Settings,
        short: list[int],
        whole: list[int],
    ) -> torch.Tensor:
        """`least_kept` of each row, (R, 1); a number below every rank where a row has neither top-k nor top-p.

        `ranked`: the `ranks` of the scores. `short`, `whole`: the rows that need some or all of their columns in order,
        as in s["order"].
        """
        groups = [group for group in (short, whole) if group]
        columns = [max(requests[r].columns for r in group) for group in groups]
        top_p = [s["top_p"] if any(requests[r].top_p for r in group) else None for group in groups]
        if len(groups[0]) == len(requests):
            top_k = None if all(q.columns == columns[0] for q in requests) else s["top_k"].long()
            return least_kept(ranked, weights, columns[0], top_k, top_p[0])
        least, order = torch.full_like(ranked[:, :1], INT64.min), s["order"][:, 0].long()
        for group, most, p in zip(groups, columns, top_p, strict=True):
            rows, order = order[: len(group)], order[len(group) :]
            p = None if p is None else p[rows]
            least[rows] = least_kept(ranked[rows], weights[rows], most, s["top_k"][rows].long(), p)
        return least

    def _with_details(
        self, tokens: torch.Tensor, logits: torch.Tensor, weights: torch.Tensor | None, requests: list[_Request]
    ) -> Sampled:
        """The tokens, with the log-probabilities and the candidates that rows ask for.

        weights: (R, V), from which rows that are not greedy drew; None where all are greedy.
        """
        asked = tuple(q.logprobs for q in requests)
        most = max((n for n in asked if n is not None), default=None)
        # argmax and topk take NaN for the largest number, and -inf is drawn only where there is nothing else.
        drawn = tokens.where(logits.gather(1, tokens[:, None])[:, 0].isfinite(), NOT_DRAWN)
        told = self._candidates(tokens, logits, weights, requests) if any(q.candidates for q in requests) else None
        if most is None:
            return Sampled(drawn, None, None, None, asked, told)
        logprobs, ids = logits.float().log_softmax(-1), self._likeliest(logits, most)
        return Sampled(drawn, logprobs.gather(1, tokens[:, None])[:, 0], logprobs.gather(1, ids), ids, asked, told)

    def _candidates(
        self, tokens: torch.Tensor, logits: torch.Tensor, weights: torch.Tensor | None, requests: list[_Request]
    ) -> Candidates:
        greedy = self._send(torch.tensor([q.greedy for q in requests]))
        wanted = tuple(q.candidates for q in requests)
        return Candidates.of(tokens, self._likeliest(logits, COUNT), logits, weights, greedy, wanted)

    def _likeliest(self, logits: torch.Tensor, count: int) -> torch.Tensor:
        """The ids of the likeliest tokens of each row, int64 (R, K), K at most the vocabulary."""
        return ranks(logits.float(), self._falling).topk(min(count, self.vocab_size)).indices

    def _request(self, slot: int, params: SamplingParams, key: bytes) -> _Request:
        greedy = params.temperature == 0
        top_k = min(params.top_k or self.vocab_size, self.vocab_size)
        top_p = INF if params.top_p is None or params.top_p >= 1 else params.top_p
        min_p = params.min_p or 0.0
        repetition, presence, frequency = params.repetition_penalty, params.presence_penalty, params.frequency_penalty
        # Within float32's limits, so that no score multiplied or divided by them becomes infinite or NaN.
        repetition = min(max(repetition, 1e-30), 1e30)
        temperature = min(max(params.temperature, FLOAT32.tiny), FLOAT32.max)
        return _Request(
            key=key,
            logprobs=params.logprobs,
            candidates=params.candidates,
            greedy=greedy,
            penalized=params.penalizes,
            columns=top_k if not greedy and (top_k < self.vocab_size or top_p < 1) else 0,
            top_p=top_p < 1,
            min_p=not greedy and min_p > 0,
            settings=(slot, repetition, presence, frequency, temperature, top_k, top_p, min_p),
        )

    def _settings(self, requests: list[_Request], indices: Sequence[int], order: list[int]) -> _Settings:
        rows = [
            (*q.settings, INF if q.greedy else uniform(q.key, index), number)
            for q, index, number in zip(requests, indices, order + [0] * (len(requests) - len(order)), strict=True)
        ]
        values = [value for column in zip(*rows, strict=True) for value in column]  # PyTorch reads a flat list faster
        return _Settings(self._send(torch.tensor(values, dtype=torch.float32)).view(-1, len(rows), 1))

    def _count(self, tokens: Sequence[int]) -> torch.Tensor:
        """The count of each token, int64 (V,), on the host."""
        return torch.bincount(torch.tensor(tokens, dtype=torch.int64), minlength=self.vocab_size)

    def _send(self, tensor: torch.Tensor) -> torch.Tensor:
        """A host tensor on the device. The host does not wait, and pinned memory stays until the copy is done."""
        if self.device.type == "cpu":
            return tensor  # `to` would return the same, and take a few microseconds
        if self.device.type != "cuda":
            return tensor.to(self.device)
        return tensor.pin_memory().to(self.device, non_blocking=True)


def not_numbers(tokens: int) -> str:
    """The error message where no token can be drawn after so many tokens of prompt and continuation."""
    return (
        f"the model's logits after {tokens:,} tokens are not numbers (NaN or infinite); "
        "check the weights with python -m fastgpt.verify, and in 16 bits try `dtype` float32"
    )


def penalize(
    scores: torch.Tensor,
    counts: torch.Tensor,
    prompted: torch.Tensor,
    repetition: torch.Tensor,
    presence: torch.Tensor,
    frequency: torch.Tensor,
) -> torch.Tensor:
    """Scores (R, V) after the three penalties, each (R, 1).

    Repetition divides a positive score and multiplies a negative one, for each token of prompt and output (Keskar
    et al., 2019). Presence and frequency are subtracted for output tokens only, as OpenAI's API defines them.
    counts: float32 (R, V), of the output; prompted: bool (R, V).
    """
    said = counts > 0
    repeated = torch.where(scores > 0, scores / repetition, scores * repetition)
    return torch.where(said | prompted, repeated, scores) - frequency * counts - presence * said


def ranks(scores: torch.Tensor, falling: torch.Tensor) -> torch.Tensor:
    """Distinct numbers in the order of the scores, int64 (R, V). Among equal scores the lowest id has the largest rank.

    scores: float32 (R, V); falling: int64 (V,), V - 1 to 0. The upper half of a rank is the bits of the score as an
    integer. For positive floats their order is that of the floats. For negative floats it is the reverse, so all their
    bits but the sign are flipped. The lower half is `falling`.
    """
    bits = (scores + 0.0).view(torch.int32)  # adding 0.0 makes -0.0 and 0.0 the same
    return torch.add(falling, (bits >> 31).bitwise_and_(INT32.max).bitwise_xor_(bits), alpha=1 << 32)


def least_kept(
    ranked: torch.Tensor, weights: torch.Tensor, columns: int, top_k: torch.Tensor | None, top_p: torch.Tensor | None
) -> torch.Tensor:
    """The smallest rank that top-k, and then top-p, keep in each row, int64 (R, 1).

    ranked: the `ranks` of the scores, (R, V). weights: (R, V), not normalised. top_k: int64 (R, 1), V where off, or
    None where it is `columns` in every row; top_p: (R, 1), inf where off, or None. `columns`: the largest top_k; no
    more columns are sorted.
    """
    ordered, ids = ranked.topk(columns)  # (R, columns)
    least = ordered[:, -1:] if top_k is None else ordered.gather(1, top_k - 1)
    if top_p is None:
        return least
    total = weights.masked_fill(ranked < least, 0).sum(-1, keepdim=True)
    shares = weights.gather(1, ids)
    before = shares.cumsum(-1) - shares
    # A token is dropped if the tokens before it hold top_p; the likeliest always stays.
    kept = ordered.where(before < top_p * total, ordered[:, :1])
    return kept.amin(-1, keepdim=True).maximum(least)


def draw(scores: torch.Tensor, weights: torch.Tensor, number: torch.Tensor) -> torch.Tensor:
    """Tokens, int64 (R,), by inverse CDF: the first at which the running sum of weights passes number's share.

    scores, weights: (R, V), the weights not normalised; number: (R, 1) in [0, 1), or inf for the highest score.
    """
    mass = weights.cumsum(-1)
    # A parallel scan rounds each sum differently, so a sum can pass at a token without weight. Such a token is skipped.
    # Where no other is left, or the weights are not numbers, the highest score is drawn.
    reached = (mass > number * mass[:, -1:]) & (weights > 0)
    return scores.masked_fill(reached, INF).argmax(-1)  # the first of equals
