"""Prints the candidates of a continuation on stdout: a row for each token that was drawn."""

from collections.abc import Iterator, Sequence

from rich.cells import cell_len
from rich.console import Console
from rich.table import Table
from rich.text import Text

from fastgpt.config.generation import SamplingParams
from fastgpt.generation.candidates import COUNT, Candidate
from fastgpt.tokenizer.base import Tokenizer

HEADINGS = ("drawn", "likeliest", "2nd", "3rd", "4th", "5th")
DRAWN = "*"  # marks the drawn token among the likeliest
Cell = tuple[str, str]  # a token's text, and its probabilities
# The settings that change probabilities, and the values that leave them as they are.
SETTINGS = {
    "repetition_penalty": (1.0,),
    "presence_penalty": (0.0,),
    "frequency_penalty": (0.0,),
    "temperature": (1.0,),
    "top_k": (None, 0),
    "top_p": (None, 1.0),
    "min_p": (None, 0.0),
}


def print_candidates(
    drawn: Sequence[int], candidates: Sequence[Sequence[Candidate]], tokenizer: Tokenizer, params: SamplingParams
) -> None:
    """Print the table of a continuation.

    A cell has one line where the terminal is wide enough, else two. A very narrow one shows fewer candidates.

    Args:
        drawn: its tokens.
        candidates: those of each token, as in `Completion`.
    """
    rows = [_row(token, own, tokenizer) for token, own in zip(drawn, candidates, strict=True)]
    if not rows:
        return
    console = Console(highlight=False, markup=False, emoji=False)
    columns = list(zip(*rows, strict=True))
    widths = [max(len(title), *(cell_len(" ".join(cell)) for cell in column)) for title, column in _titled(columns)]
    between, gap = " ", 2
    if _needed(widths, gap) > console.width:
        between, gap = "\n", 1
        widths = _narrow(columns, gap, console.width)
    table = Table(box=None, pad_edge=False, padding=(0, gap, 0, 0))
    for heading, width in zip(HEADINGS, widths, strict=False):
        table.add_column(heading, no_wrap=True, max_width=width)
    for row in rows:
        table.add_row(*(Text.assemble(text, between, (shares, "dim")) for text, shares in row[: len(widths)]))
    console.print()
    console.print(f"probability by the model -> after {_settings(params)}; {DRAWN} drawn")
    console.print(table)


def _narrow(columns: Sequence[Sequence[Cell]], gap: int, width: int) -> list[int]:
    """The widths of as many columns as have room for their probabilities, at least two; what is left is shared."""
    widths = [max(len(title), *(len(shares) for _, shares in column)) for title, column in _titled(columns)]
    while len(widths) > 2 and _needed(widths, gap) > width:
        widths.pop()
    spare = max(0, width - _needed(widths, gap)) // len(widths)
    return [own + spare for own in widths]


def _titled(columns: Sequence[Sequence[Cell]]) -> Iterator[tuple[str, Sequence[Cell]]]:
    yield from zip(HEADINGS, columns, strict=False)


def _needed(widths: Sequence[int], gap: int) -> int:
    return sum(widths) + gap * (len(widths) - 1)


def shown(token: int, tokenizer: Tokenizer) -> str:
    """A token in quotes, its whitespace visible; its bytes, if they are not whole characters."""
    content = tokenizer.token_bytes(token)
    try:
        return repr(content.decode())
    except UnicodeDecodeError:
        return repr(content)


def _row(token: int, candidates: Sequence[Candidate], tokenizer: Tokenizer) -> list[Cell]:
    """The text and the probabilities of each cell: of the drawn token, then of the likeliest ones."""
    own = next(one for one in candidates if one.token == token)
    cells = [(shown(token, tokenizer), _shares(own))]
    for one in candidates[:COUNT]:
        mark = DRAWN if one.token == token else ""
        cells.append((mark + shown(one.token, tokenizer), _shares(one)))
    return cells


def _shares(one: Candidate) -> str:
    return f"{_percent(one.before)} -> {_percent(one.after)}"


def _percent(share: float) -> str:
    """Two digits, in at most 4 characters: "0%", "~0%", "4.5%", "45%", ">99%", "100%"."""
    if 0 < share < 0.0005:
        return "~0%"
    if 0.995 <= share < 1:
        return ">99%"
    return f"{share:.1%}" if 0 < share < 0.0995 else f"{share:.0%}"


def _settings(params: SamplingParams) -> str:
    """The settings that change probabilities. With temperature 0 only the penalties matter beside it."""
    values = {name: getattr(params, name) for name, neutral in SETTINGS.items() if getattr(params, name) not in neutral}
    if params.temperature == 0:
        values = {name: value for name, value in values.items() if name not in ("top_k", "top_p", "min_p")}
    return ", ".join(f"{name} {value:g}" for name, value in values.items()) or "no setting that changes it"
