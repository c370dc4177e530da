"""The text of launch_table.toml with one row changed, and every other line and comment as it was.

    replace(text, kernel, target, kind, width, row) -> text

A row gets a tile of its own in the section of its kernel and kind, which takes the place of one that is given for all
targets or kinds. It goes again when the row becomes what it is for all. So a row that is set back gives the text as it
was.
"""

import re
from dataclasses import dataclass, field
from itertools import zip_longest

from fastgpt_kernels.launch import ANY, COLUMNS, SECTIONS, TABLE_FILE, Config, read_table


@dataclass
class Line:
    """The tiles of one width: `128 = { all = "8x128 w4 s1", gfx942 = "8x128 w2 s1" }  # a comment`."""

    width: str
    tiles: dict[str, str]
    comments: list[str] = field(default_factory=list)  # the lines above it
    note: str = ""  # the comment behind it

    def __str__(self) -> str:
        tiles = ", ".join(f'{column} = "{self.tiles[column]}"' for column in COLUMNS if column in self.tiles)
        note = f"  # {self.note}" if self.note else ""
        return "\n".join([*self.comments, f"{self.width} = {{ {tiles} }}{note}"])


@dataclass
class Section:
    """The lines below a header, narrowest width first. One without a header holds comments alone."""

    comments: list[str]  # the lines above the header
    header: tuple[str, str] | None = None  # kernel, section
    lines: list[Line] = field(default_factory=list)

    def __str__(self) -> str:
        header = [f"[{'.'.join(self.header)}]"] if self.header else []
        return "\n".join([*self.comments, *header, *map(str, sorted(self.lines, key=lambda line: number(line.width)))])


def number(width: str) -> int:
    return ANY if width == "any" else int(width)


def parse(text: str) -> list[Section]:
    """The sections of a table, of which each begins after an empty line.

    Raises:
        ValueError: the text is not as `render` writes it, from which line on.
    """
    sections = []
    for block in text.removesuffix("\n").split("\n\n"):
        section, above = Section([]), []
        for line in block.split("\n"):
            if header := re.fullmatch(r"\[(\w+)\.([\w-]+)\]", line):
                section.comments, section.header, above = above, (header[1], header[2]), []
            elif row := re.fullmatch(r"(\w+) = \{ (.*) \}(?:  # (.*))?", line):
                tiles = dict(re.findall(r'(\w+) = "([^"]*)"', row[2]))
                section.lines.append(Line(row[1], tiles, above, row[3] or ""))
                above = []
            elif line.startswith("#"):
                above.append(line)
            else:
                raise ValueError(f"{TABLE_FILE.name}: {line!r} is neither a [KERNEL.KIND], a row nor a comment")
        if section.header is None:
            section.comments, above = above, []
        if above:
            raise ValueError(f"{TABLE_FILE.name}: {above[0]!r} stands above no row")
        sections.append(section)
    for given, written in zip_longest(text.splitlines(), render(sections).splitlines()):
        if given != written:
            raise ValueError(f"{TABLE_FILE.name}: {given!r} would be written {written!r}")
    return sections


def render(sections: list[Section]) -> str:
    return "\n\n".join(map(str, sections)) + "\n"


def replace(text: str, kernel: str, target: str, kind: str, width: int, row: Config) -> str:
    """The text with this row of the table changed; `width` is one of the table's.

    Raises:
        LookupError: the table holds no such row.
        ValueError: the text is not as `render` writes it.
    """
    wanted = read_table(text)
    if width not in wanted.get(kernel, {}).get((target, kind), {}):
        raise LookupError(f"the launch table holds no row {kernel} {target} {kind} {width}")
    if wanted[kernel][target, kind][width] == row:
        return text
    wanted[kernel][target, kind][width] = row
    for change in (_leave_to_all, _give_its_own):
        sections = parse(text)
        section = _section(sections, kernel, kind)
        change(section, _line(section, "any" if width == ANY else str(width)), target, row)
        changed = render([one for one in sections if one.lines or one.comments])
        if read_table(changed) == wanted:
            return changed
    raise AssertionError(f"{kernel} {target} {kind} {width} did not become {row}")


def _leave_to_all(section: Section, line: Line, target: str, row: Config) -> None:
    """Take the target's own tile away, and its line with it, unless a comment tells of it."""
    if not (line.comments or line.note):
        line.tiles.pop(target, None)
        if not line.tiles:
            section.lines.remove(line)


def _give_its_own(section: Section, line: Line, target: str, row: Config) -> None:
    line.tiles[target] = str(row)


def _section(sections: list[Section], kernel: str, kind: str) -> Section:
    """The section of a kernel and kind; a new one stands behind those of the kernel that SECTIONS has before it."""
    order, before = list(SECTIONS), 0
    for place, section in enumerate(sections, start=1):
        if section.header == (kernel, kind):
            return section
        if section.header and section.header[0] == kernel and order.index(section.header[1]) < order.index(kind):
            before = place
    new = Section([], (kernel, kind))
    sections.insert(before, new)
    return new


def _line(section: Section, width: str) -> Line:
    """The line of a width, a new one if there is none."""
    for line in section.lines:
        if line.width == width:
            return line
    section.lines.append(Line(width, {}))
    return section.lines[-1]
