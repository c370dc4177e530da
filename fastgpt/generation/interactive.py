"""Interactive writing: each typed line is added to the text, and the model continues it. The cache is kept."""

import sys
from codecs import BOM_UTF8

from fastgpt.config.generation import SamplingParams
from fastgpt.errors import UsageError
from fastgpt.generation import terminal
from fastgpt.generation.engine import Engine
from fastgpt.system.files import decode_utf8
from fastgpt.system.signals import noted
from fastgpt.system.text_encoding import BOM
from fastgpt.system.units import counted
from fastgpt.tokenizer.base import Tokenizer


def run(engine: Engine, tokenizer: Tokenizer, params: SamplingParams, text: str) -> int:
    """Read lines from stdin until its end, and let the model continue after each; `text` comes before the first.

    A line is added with its line break if the vocabulary has one; \\r\\n counts as one line break. Ctrl-C stops the
    model's turn, and between turns the program.

    Returns:
        1 where a turn ended because the model's logits were not numbers, else 0.
    """
    tokens = tokenizer.encode(text).tolist() if text else []
    if sys.stdin.isatty():
        terminal.note("type a line, and the model goes on; Ctrl-C stops it, Ctrl-D ends")
    breaks_lines, code = knows(tokenizer, "\n"), 0
    for number, line in enumerate(iter(sys.stdin.buffer.readline, b"")):
        try:
            typed = decode_utf8(line, "the line").replace("\r\n", "\n")
            if number and line.startswith(BOM_UTF8):  # a mark only at the beginning of the input, else a character
                typed = BOM + typed
            tokens += tokenizer.encode(typed if breaks_lines else typed.rstrip("\n")).tolist()
        except UsageError as error:
            terminal.error(str(error))
            continue
        tokens = cut(tokens, engine.block_size)
        reused = engine.scheduler.hits
        said, failed = take_turn(engine, tokens, params)
        code = max(code, int(failed))
        terminal.end_line()
        terminal.note(f"{engine.scheduler.hits - reused:,} of {counted(len(tokens), 'token')} in the cache")
        tokens += said
    if engine.speculate != "none":
        terminal.note(terminal.acceptance(engine.stats))
    return code


def knows(tokenizer: Tokenizer, text: str) -> bool:
    """Whether the vocabulary can spell a text."""
    try:
        tokenizer.encode(text)
    except UsageError:
        return False
    return True


def cut(tokens: list[int], block_size: int) -> list[int]:
    """The text; if it has outgrown the context, its end, which fills half of it and leaves room for more turns."""
    if len(tokens) <= block_size:
        return tokens
    kept = max(1, block_size // 2)
    terminal.note(f"the text has outgrown the context of {counted(block_size, 'token')}: its last {kept:,} count")
    return tokens[-kept:]


def take_turn(engine: Engine, tokens: list[int], params: SamplingParams) -> tuple[list[int], bool]:
    """Print the continuation as it comes; returns its tokens, and whether the logits were not numbers."""
    index, said, failed = engine.submit(tokens, params), [], False
    with noted("SIGINT") as signals:
        while engine.busy:
            if signals:
                engine.cancel(index)
            for piece in engine.step():
                terminal.show(piece.text)
                said += piece.tokens
                if piece.completion and piece.completion.error:
                    terminal.error(piece.completion.error)
                    failed = not piece.completion.refused
    return said, failed
