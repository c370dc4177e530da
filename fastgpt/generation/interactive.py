"""Writing in turns: what is typed is added to the text, the model goes on, and its cache is kept in between."""

import sys
from codecs import BOM_UTF8

from fastgpt.config.generation import SamplingParams
from fastgpt.errors import UsageError
from fastgpt.generation.engine import Engine
from fastgpt.generation.terminal import acceptance
from fastgpt.system.files import decode_utf8
from fastgpt.system.signals import noted
from fastgpt.system.text_encoding import BOM
from fastgpt.system.units import counted
from fastgpt.tokenizer.base import Tokenizer


def run(engine: Engine, tokenizer: Tokenizer, params: SamplingParams, text: str) -> int:
    """Read lines from stdin until its end, and let the model go on after each; `text` stands before the first.

    A line is added with its line break, if the vocabulary has one; \\r\\n counts as one too. Ctrl-C stops the model's
    turn, and between turns the program.

    Returns:
        1 where a turn ended as the model's logits were no numbers, else 0.
    """
    tokens = tokenizer.encode(text).tolist() if text else []
    if sys.stdin.isatty():
        print("[type a line, and the model goes on; Ctrl-C stops it, Ctrl-D ends]", file=sys.stderr)
    breaks_lines, code = knows(tokenizer, "\n"), 0
    for number, line in enumerate(iter(sys.stdin.buffer.readline, b"")):
        try:
            typed = decode_utf8(line, "the line").replace("\r\n", "\n")
            if number and line.startswith(BOM_UTF8):  # a mark only where the input begins, elsewhere a character
                typed = BOM + typed
            tokens += tokenizer.encode(typed if breaks_lines else typed.rstrip("\n")).tolist()
        except UsageError as error:
            print(f"error: {error}", file=sys.stderr)
            continue
        tokens = cut(tokens, engine.block_size)
        reused = engine.scheduler.hits
        said, failed = take_turn(engine, tokens, params)
        code = max(code, int(failed))
        print(flush=True)
        print(f"[{engine.scheduler.hits - reused:,} of {counted(len(tokens), 'token')} in the cache]", file=sys.stderr)
        tokens += said
    if engine.speculate != "none":
        print(f"[{acceptance(engine.stats)}]", file=sys.stderr)
    return code


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


def take_turn(engine: Engine, tokens: list[int], params: SamplingParams) -> tuple[list[int], bool]:
    """Print the continuation as it comes; its tokens, and whether the logits were no numbers."""
    index, said, failed = engine.submit(tokens, params), [], False
    with noted("SIGINT") as signals:
        while engine.busy:
            if signals:
                engine.cancel(index)
            for piece in engine.step():
                print(piece.text, end="", flush=True)
                said += piece.tokens
                if piece.completion and piece.completion.error:
                    print(f"error: {piece.completion.error}", file=sys.stderr)
                    failed = not piece.completion.refused
    return said, failed
