"""Facts in sections, as a report for people or as JSON, without what only concerns the machine's owner."""

import getpass
import re
import socket
import textwrap
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

WIDTH = 80  # columns of the report
# Two parts at least: a unit such as GFLOP/s and a pair such as AMD/Intel are no paths.
PATH = re.compile(r"(?<![\w/.])(?:~|[A-Za-z]:)?(?:[/\\][\w.+@~-]+){2,}[/\\]?")

REST = r"""[^\s"',;:()]*"""  # of a path whose beginning is known


class Fact(NamedTuple):
    """A fact with one form for people and another for JSON; one that is alike in both is a plain text."""

    text: str
    value: Any


Section = Mapping[str, str | Fact]


def report(sections: Mapping[str, Section]) -> str:
    """The sections under their titles, a fact a line; longer ones go on below."""
    width = max(len(name) for section in sections.values() for name in section)
    lines = []
    for title, section in sections.items():
        lines += ["", title] if lines else [title]
        for name, fact in section.items():
            text = fact.text if isinstance(fact, Fact) else fact
            first, rest = f"  {name:<{width}}  ", " " * (width + 4)
            lines += textwrap.wrap(text, WIDTH, initial_indent=first, subsequent_indent=rest, break_on_hyphens=False)
    return "\n".join(lines)


def values(sections: Mapping[str, Section]) -> dict[str, dict[str, Any]]:
    """The sections as JSON values; names are in lower case, with underscores."""
    return {
        _key(title): {_key(name): fact.value if isinstance(fact, Fact) else fact for name, fact in section.items()}
        for title, section in sections.items()
    }


def _key(name: str) -> str:
    return re.sub(r"\W+", "_", name).strip("_").lower()


def without_names(sections: Mapping[str, Section]) -> dict[str, Section]:
    """The sections without paths and without the names of the user and the host, in whatever text they stand."""
    hide = hider()

    def hidden(value: Any) -> Any:
        if isinstance(value, str):
            return hide(value)
        if isinstance(value, Fact):
            return Fact(hide(value.text), hidden(value.value))
        if isinstance(value, Mapping):
            return {name: hidden(one) for name, one in value.items()}
        return [hidden(one) for one in value] if isinstance(value, list) else value

    return {title: hidden(section) for title, section in sections.items()}


def hider() -> Callable[[str], str]:
    """A function that replaces paths and names in a text by what they are, such as <path>."""
    home, host = _home(), socket.gethostname()
    places = [str(place) for place in (home, Path.cwd()) if place and len(str(place)) > 1]
    names = {host: "<host>", host.partition(".")[0]: "<host>", _user(): "<user>", home.name if home else "": "<user>"}
    hidden = [(re.compile(rf"{re.escape(place)}{REST}", re.IGNORECASE), "<path>") for place in places]
    hidden.append((PATH, "<path>"))
    hidden += [(_named(name), word) for name, word in names.items() if name]

    def hide(text: str) -> str:
        for pattern, word in hidden:
            text = pattern.sub(word, text)
        return text

    return hide


def _named(name: str) -> re.Pattern[str]:
    """A name in a text: a short one as a word of its own, as it may be part of any other."""
    escaped = re.escape(name)
    return re.compile(escaped if len(name) >= 4 else rf"(?<!\w){escaped}(?!\w)", re.IGNORECASE)


def _home() -> Path | None:
    try:
        return Path.home()
    except RuntimeError:  # the system knows none
        return None


def _user() -> str:
    try:
        return getpass.getuser()
    except (OSError, KeyError, ImportError):  # the user has no name
        return ""


def first_line(error: Exception) -> str:
    """The first line of an error's message, or the name of its kind if it has none."""
    lines = str(error).strip().splitlines()
    return lines[0][:200] if lines else type(error).__name__
