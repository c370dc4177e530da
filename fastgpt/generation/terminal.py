"""What generation prints: continuations on stdout, progress and speed on stderr."""

import sys
import time
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np
from rich.console import Console
from rich.live import Live
from rich.text import Text

from fastgpt.config.generation import SamplingParams
from fastgpt.errors import RunFailed, UsageError
from fastgpt.generation.request import Stats, prompt_tokens
from fastgpt.generation.single import Generation
from fastgpt.system.device import synchronize
from fastgpt.system.units import counted

if TYPE_CHECKING:
    from fastgpt.generation.answers import Answers
    from fastgpt.generation.engine import Engine

LIVE_INTERVAL, PLAIN_INTERVAL = 0.1, 5.0  # seconds between lines of progress, on a terminal and elsewhere


def print_heading(sample: int, samples: int) -> None:
    if samples > 1:
        print(f"--- sample {sample + 1} of {samples}")


def _warn_of_sliding(prompt_tokens: int, params: SamplingParams, block: int) -> None:
    if prompt_tokens + params.max_new_tokens - 1 > block:
        print(
            f"[past {counted(block, 'token')} the window slides, and each token costs a prefill of {block}]",
            file=sys.stderr,
        )


def print_samples(engine: "Engine", prompt: str, params: SamplingParams) -> None:
    """The continuations to stdout, one after the other, the first as it comes; how it went to stderr."""
    tokens = prompt_tokens(prompt, engine.tokenizer, engine.vocab_size)
    _warn_of_sliding(len(tokens), params, engine.block_size)
    texts, shown = ["" for _ in range(params.num_samples)], 0
    ended, errors = [False for _ in range(params.num_samples)], {}

    def begin(sample: int) -> None:
        print_heading(sample, params.num_samples)
        print(prompt, end="", flush=True)

    begin(0)
    for piece in engine.stream([tokens], params):
        if piece.completion and piece.completion.refused:
            print(flush=True)
            raise UsageError(piece.completion.error)
        if piece.completion and piece.completion.error:
            errors[piece.sample] = piece.completion.error
        texts[piece.sample] += piece.text
        ended[piece.sample] = piece.completion is not None
        while shown < params.num_samples:
            print(texts[shown], end="", flush=True)
            texts[shown] = ""
            if not ended[shown]:
                break
            print(flush=True)
            shown += 1
            if shown < params.num_samples:
                begin(shown)
    stats = engine.stats
    line = speed_line(stats.prefill_tokens, stats.prefill_seconds, stats.decode_tokens, stats.decode_seconds)
    guesses = f", {acceptance(stats)}" if engine.speculate != "none" else ""
    print(f"[{line}{guesses}]", file=sys.stderr)
    if errors:
        raise RunFailed(errors[min(errors)])


def print_sample(generation: Generation, prompt: str) -> None:
    """Stream one continuation to stdout, and its speed to stderr."""
    _warn_of_sliding(len(generation.prompt), generation.params, generation.model.config.block_size)
    print(prompt, end="", flush=True)
    for piece in generation:
        print(piece, end="", flush=True)
    print(flush=True)
    synchronize(generation.model.device)
    line = speed_line(
        generation.prefill_tokens, generation.prefill_seconds, generation.decode_tokens, generation.decode_seconds
    )
    print(f"[{line}]", file=sys.stderr)


def speed_line(prefill: int, prefill_seconds: float, decode: int, decode_seconds: float) -> str:
    """Tokens and tokens/s of prefill and decode, apart."""
    parts = [f"prefill {counted(prefill, 'token')}"]
    if prefill_seconds:
        parts[0] += f" at {prefill / prefill_seconds:,.0f} tokens/s"
    if decode:
        parts.append(f"decode {counted(decode, 'token')} at {decode / decode_seconds:,.0f} tokens/s")
    return ", ".join(parts)


class Progress:
    """Running, waiting and done on stderr: a live line on a terminal, now and then a plain one elsewhere."""

    def __init__(self, answers: "Answers", engine: "Engine | None", *, live: bool = True):
        self.answers, self.engine = answers, engine
        self.console = Console(stderr=True)
        self.live = Live(console=self.console, transient=True) if live and self.console.is_terminal else None
        self.began = self.shown = time.perf_counter()

    def __enter__(self) -> "Progress":
        if self.live:
            self.live.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self.live:
            self.live.stop()

    def show(self) -> None:
        now = time.perf_counter()
        if now - self.shown < (LIVE_INTERVAL if self.live else PLAIN_INTERVAL):
            return
        self.shown = now
        if self.live:
            self.live.update(Text(self._line(now)))
        else:
            self.console.print(self._line(now), highlight=False, soft_wrap=True)

    def _line(self, now: float) -> str:
        told = f"{self.answers.done:,} of {self.answers.total:,} done"
        if self.engine is None:
            return told
        scheduler, stats = self.engine.scheduler, self.engine.stats
        allocator = scheduler.allocator
        speed = (stats.prefill_tokens + stats.decode_tokens) / (now - self.began)
        return (
            f"{len(scheduler.running):,} running, {self.engine.queued:,} waiting, {told}  "
            f"{speed:,.0f} tokens/s  {allocator.used:,} of {counted(allocator.pages, 'page')}"
        )


def summary(engine: "Engine") -> str:
    """What the engine did, a line each."""
    stats, scheduler = engine.stats, engine.scheduler
    facts: Mapping[str, str] = {
        "prefill": _speed(stats.prefill_tokens, stats.prefill_seconds),
        "decode": _speed(stats.decode_tokens, stats.decode_seconds),
        "time to first token": _percentiles(stats.first_token_seconds),
        "time per token": _percentiles(stats.token_seconds),
        "pages": f"peak {scheduler.allocator.peak:,} of {scheduler.allocator.pages:,}",
        "prefix hits": counted(scheduler.hits, "token"),
        "preemptions": f"{scheduler.preemptions:,}",
    }
    if engine.speculate != "none":
        facts = {**facts, "speculation": acceptance(stats)}
    width = max(map(len, facts))
    return "\n".join(f"{name:<{width}}  {value}" for name, value in facts.items())


def acceptance(stats: Stats) -> str:
    """How many guesses were right."""
    share = f" ({stats.accepted / stats.proposed:.0%})" if stats.proposed else ""
    return f"{stats.accepted:,} of {counted(stats.proposed, 'guess')} accepted{share}"


def _speed(tokens: int, seconds: float) -> str:
    return counted(tokens, "token") + (f" at {tokens / seconds:,.0f} tokens/s" if seconds else "")


def _percentiles(seconds: Sequence[float]) -> str:
    if not seconds:
        return "-"
    half, nearly_all = np.percentile(seconds, [50, 99]) * 1e3
    return f"p50 {half:,.1f} ms, p99 {nearly_all:,.1f} ms"
