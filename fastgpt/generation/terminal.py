"""All that generation prints: continuations on stdout; notes, progress and speed on stderr."""

import sys
import time
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np
from rich.console import Console
from rich.progress import Progress, TextColumn

from fastgpt.config.generation import SamplingParams
from fastgpt.errors import RunFailed, UsageError
from fastgpt.generation.candidates_table import print_candidates
from fastgpt.generation.request import Completion, Stats, prompt_tokens
from fastgpt.generation.single import Generation
from fastgpt.system.device import synchronize
from fastgpt.system.units import counted

if TYPE_CHECKING:
    from fastgpt.generation.answers import Answers
    from fastgpt.generation.engine import Engine

LIVE_INTERVAL, PLAIN_INTERVAL = 0.1, 5.0  # seconds between lines of progress, on a terminal and elsewhere


def note(text: str) -> None:
    """A remark about what happens, in brackets on stderr."""
    print(f"[{text}]", file=sys.stderr, flush=True)


def error(text: str) -> None:
    """An error after which the command goes on, on stderr."""
    print(f"error: {text}", file=sys.stderr)


def show(piece: str) -> None:
    """A piece of a continuation on stdout, at once."""
    print(piece, end="", flush=True)


def end_line() -> None:
    """The end of a continuation on stdout."""
    print(flush=True)


# One prompt


def print_samples(engine: "Engine", prompt: str, params: SamplingParams) -> None:
    """Print the engine's continuations one after the other, the first as it comes; then their speed.

    Raises:
        UsageError: the prompt cannot be continued.
        RunFailed: the model's logits are not numbers.
    """
    tokens = prompt_tokens(prompt, engine.tokenizer, engine.vocab_size)
    _warn_of_sliding(len(tokens), params, engine.block_size)
    texts, shown = ["" for _ in range(params.num_samples)], 0
    ended: list[Completion | None] = [None for _ in range(params.num_samples)]
    errors = {}
    _begin(0, params.num_samples, prompt)
    for piece in engine.stream([tokens], params):
        if piece.completion and piece.completion.refused:
            end_line()
            raise UsageError(piece.completion.error)
        if piece.completion and piece.completion.error:
            errors[piece.sample] = piece.completion.error
        texts[piece.sample] += piece.text
        ended[piece.sample] = piece.completion
        while shown < params.num_samples:
            show(texts[shown])
            texts[shown] = ""
            if (whole := ended[shown]) is None:
                break
            end_line()
            if whole.candidates is not None and engine.tokenizer is not None:
                print_candidates(whole.tokens, whole.candidates, engine.tokenizer, params)
            ended[shown] = None
            shown += 1
            if shown < params.num_samples:
                _begin(shown, params.num_samples, prompt)
    guesses = f", {acceptance(engine.stats)}" if engine.speculate != "none" else ""
    note(f"{speed_line(engine.stats)}{guesses}")
    if errors:
        raise RunFailed(errors[min(errors)])


def print_one_by_one(generations: Iterable[Generation], prompt: str, params: SamplingParams) -> None:
    """Print `num_samples` continuations, each as it comes, with its speed.

    Raises:
        RunFailed: the model's logits are not numbers.
    """
    errors = []
    for sample, generation in enumerate(generations):
        _print_heading(sample, params.num_samples)
        _warn_of_sliding(len(generation.prompt), params, generation.model.config.block_size)
        show(prompt)
        for piece in generation:
            show(piece)
        end_line()
        if params.candidates:
            tokens = [one.token for one in generation.drawn]
            print_candidates(tokens, generation.candidates, generation.tokenizer, params)
        synchronize(generation.model.device)
        note(speed_line(generation))
        errors += [generation.error] if generation.error is not None else []
    if errors:
        raise RunFailed(errors[0])


def _begin(sample: int, samples: int, prompt: str) -> None:
    _print_heading(sample, samples)
    show(prompt)


def _print_heading(sample: int, samples: int) -> None:
    if samples > 1:
        print(f"--- sample {sample + 1} of {samples}")


def _warn_of_sliding(prompt_tokens: int, params: SamplingParams, block: int) -> None:
    if prompt_tokens + params.max_new_tokens - 1 > block:
        note(f"past {counted(block, 'token')} the window slides, and each token costs a prefill of {block}")


# Many prompts


class PromptsDisplay:
    """Shows how many continuations run, wait and are done, on stderr.

    On a terminal that is a live line, elsewhere a plain line every few seconds.
    """

    def __init__(self, answers: "Answers", engine: "Engine | None", *, live: bool = True):
        self.answers, self.engine = answers, engine
        self.console = Console(stderr=True)
        self.live = live and self.console.is_terminal
        line = TextColumn("{task.description}", markup=False)
        self.progress = Progress(line, console=self.console, transient=True, disable=not self.live)
        self.task = self.progress.add_task("")
        self.began = self.shown = time.perf_counter()

    def __enter__(self) -> "PromptsDisplay":
        self.progress.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.progress.stop()

    def show(self) -> None:
        """Bring the display up to date, if that is due."""
        now = time.perf_counter()
        if now - self.shown < (LIVE_INTERVAL if self.live else PLAIN_INTERVAL):
            return
        self.shown = now
        if self.live:
            self.progress.update(self.task, description=self._line(now))
        else:
            self.console.print(self._line(now), highlight=False, soft_wrap=True)

    def _line(self, now: float) -> str:
        done = f"{self.answers.done:,} of {self.answers.total:,} done"
        if self.engine is None:
            return done
        scheduler, stats = self.engine.scheduler, self.engine.stats
        allocator = scheduler.allocator
        speed = (stats.prefill_tokens + stats.decode_tokens) / (now - self.began)
        return (
            f"{len(scheduler.running):,} running, {self.engine.queued:,} waiting, {done}  "
            f"{speed:,.0f} tokens/s  {allocator.used:,} of {counted(allocator.pages, 'page')}"
        )


def print_summary(engine: "Engine") -> None:
    """Print the engine's counts and times, a line each."""
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
    for name, value in facts.items():
        print(f"{name:<{width}}  {value}", file=sys.stderr)


def print_outcome(answers: "Answers", prompts: int, stopped: bool) -> None:
    """Print how many prompts could not be continued, and how many answers are written where a signal stopped it."""
    if failed := len(answers.failed):
        print(f"{failed:,} of {counted(prompts, 'prompt')} could not be continued; see their error", file=sys.stderr)
    if stopped:
        more = "" if answers.on_stdout else "; `resume=True` goes on"
        print(f"stopped with {answers.done:,} of {counted(answers.total, 'answer')} written{more}", file=sys.stderr)


# Figures


def speed_line(spent: Stats | Generation) -> str:
    """Tokens and tokens/s of prefill, and of decode if there was any."""
    line = f"prefill {_speed(spent.prefill_tokens, spent.prefill_seconds)}"
    return f"{line}, decode {_speed(spent.decode_tokens, spent.decode_seconds)}" if spent.decode_tokens else line


def acceptance(stats: Stats) -> str:
    """The number and share of accepted guesses, for people."""
    share = f" ({stats.accepted / stats.proposed:.0%})" if stats.proposed else ""
    return f"{stats.accepted:,} of {counted(stats.proposed, 'guess')} accepted{share}"


def _speed(tokens: int, seconds: float) -> str:
    return counted(tokens, "token") + (f" at {tokens / seconds:,.0f} tokens/s" if seconds else "")


def _percentiles(seconds: Sequence[float]) -> str:
    if not seconds:
        return "-"
    half, nearly_all = np.percentile(seconds, [50, 99]) * 1e3
    return f"p50 {half:,.1f} ms, p99 {nearly_all:,.1f} ms"
