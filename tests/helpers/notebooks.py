"""An output as a notebook shows it."""


def as_a_notebook_shows(text: str) -> list[str]:
    """The lines of an output in which a carriage return goes back to the start of a line, and nothing is deleted."""
    shown = []
    for line in text.split("\n"):
        cells: list[str] = []
        for part in line.split("\r"):
            cells[: len(part)] = part
        shown.append("".join(cells).rstrip())
    return shown
