"""Writing in turns: what is typed is added to the text, the model goes on, and its cache is kept in between."""

import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager

from fastgpt.batch import acceptance
from fastgpt.config import SamplingParams
from fastgpt.engine import Engine
from fastgpt.errors import UsageError
from fastgpt.files import decode_utf8
from fastgpt.tokenizer import Tokenizer
from fastgpt.units import counted


def run(engine: Engine, tokenizer: Tokenizer, params: SamplingParams, text: str) -> None:
    """Read lines from stdin until its end, and let the model go on after each; `text` stands before the first.

    A line is added with its line break, if the vocabulary has one. Ctrl-C stops the model's turn, and between turns the
    program.
    """
    tokens = tokenizer.encode(text).tolist() if text else []
    if sys.stdin.isatty():
        print("[type a line, and the model goes on; Ctrl-C stops it, Ctrl-D ends]", file=sys.stderr)
    breaks_lines = knows(tokenizer, "\n")
    while line := sys.stdin.buffer.readline():
        try:
            typed = decode_utf8(line, "the line")
            tokens += tokenizer.encode(typed if breaks_lines else typed.rstrip("\n")).tolist()
        except UsageError as error:
            print(f"error: {error}", file=sys.stderr)
            continue
        tokens = cut(tokens, engine.block_size)
        reused = engine.scheduler.hits
        said = take_turn(engine, tokens, params)
        print(flush=True)
        print(f"[{engine.scheduler.hits - reused:,} of {counted(len(tokens), 'token')} in the cache]", file=sys.stderr)
        tokens += said
    if engine.speculate != "none":
        print(f"[{acceptance(engine.stats)}]", file=sys.stderr)


def knows(tokenizer: Tokenizer, text: str) -> bool:
    """Whether the vocabulary can spell a text."""
    try:
        tokenizer.encode(text)
    except UsageError:
        return False
    return True


def cut(tokens: list[int], block_size: int) -> list[int]:
    """The text, or where it has outgrown the context its last half, which leaves room for the turns to come."""
    if len(tokens) <= block_size:
        return tokens
    kept = max(1, block_size // 2)
    print(
        f"[the text has outgrown the context of {counted(block_size, 'token')}: its last {kept:,} count]",
        file=sys.stderr,
    )
    return tokens[-kept:]


def take_turn(engine: Engine, tokens: list[int], params: SamplingParams) -> list[int]:
    """Print the continuation as it comes; its tokens."""
    index, said = engine.submit(tokens, params), []
    with interrupted() as signals:
        while engine.busy:
            if signals:
                engine.cancel(index)
            for piece in engine.step():
                print(piece.text, end="", flush=True)
                said += piece.tokens
                if piece.completion and piece.completion.error:
                    print(f"error: {piece.completion.error}", file=sys.stderr)
    return said


@contextmanager
def interrupted() -> Iterator[list[int]]:
    """Collects SIGINT instead of raising it, so that a step is never left half done."""
    caught: list[int] = []
    before = signal.signal(signal.SIGINT, lambda number, frame: caught.append(number))
    try:
        yield caught
    finally:
        signal.signal(signal.SIGINT, before)
