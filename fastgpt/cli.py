"""The command line: a dataclass becomes flags, an error becomes one line and an exit code.

Presets come first, then `--config file.toml`, then flags; the later wins. `run` calls a main function and
turns what it raises into exit codes: 0 done, 1 failed, 2 bad usage or input, 130 and 143 stopped by a signal.

The library knows arguments, not flags. Its messages name an argument in backticks: "`n_head` 5 does not divide `n_embd`
384". While a command runs, its stderr shows the flags instead: "--n_head 5 does not divide --n_embd 384".
"""

import argparse
import contextlib
import dataclasses
import errno
import functools
import io
import os
import re
import sys
import tomllib
import types
import typing
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

from fastgpt.config import fields as configuration
from fastgpt.errors import LONGEST_SHOWN, RunFailed, UsageError, UsageErrors, nearest, shown
from fastgpt.system import streams
from fastgpt.system.files import decode_utf8

Config = TypeVar("Config")
TRUE, FALSE, AUTO = ("true", "yes", "on", "1"), ("false", "no", "off", "0"), "auto"
MARK = "="  # before every value: argparse would take one that begins with a dash for a flag, and drop one that is --
_NAMED = r"`(?P<name>\w+)(?:=(?P<value>True|False))?`"
# A value as Python writes it. An apostrophe within a word, as in GPT-2's, opens none.
_QUOTED = r"""(?<!\w)(?:'(?:\\.|[^'\\\n])*'|"(?:\\.|[^"\\\n])*")(?!\w)"""


def parse(
    kind: type[Config],
    argv: Sequence[str] | None = None,
    *,
    prog: str,
    description: str,
    presets: Mapping[str, Config] | None = None,
    unnamed: Sequence[str] = (),
) -> Config:
    """A configuration of the given dataclass: its defaults or a preset, changed by what was given. See `read`."""
    preset, given = read(kind, argv, prog=prog, description=description, presets=presets, unnamed=unnamed)
    return change(kind() if preset is None or presets is None else presets[preset], given)


def read(
    kind: type,
    argv: Sequence[str] | None = None,
    *,
    prog: str,
    description: str,
    presets: Mapping[str, Any] | None = None,
    unnamed: Sequence[str] = (),
    shares: type | None = None,
) -> tuple[str | None, dict[str, Any]]:
    """The named preset, and the fields that `--config file.toml` or flags give, each within its own limits.

    Args:
        kind: a frozen dataclass whose fields were made by `config.option`.
        argv: the arguments, without the program's name; default `sys.argv[1:]`.
        presets: named starting points, which add `--preset` and `--config`.
        unnamed: the fields whose flags may be left out, in the order of their values: `a --json b` gives two. A list
            takes all values that are left.
        shares: a dataclass whose TOML files may be given too; what is in them for that one alone is left out.

    Raises:
        UsageError: an unknown flag or key (the nearest is named) or a value outside its limits.
    """
    parser, flags = _parser(kind, prog, description, presets)
    lists = [name for name, hint in typing.get_type_hints(kind).items() if typing.get_origin(hint) is tuple]
    given = _parse(parser, flags, sys.argv[1:] if argv is None else argv, unnamed, lists)
    file = given.pop("config", None)
    given = (_read_toml(Path(file), kind, shares or kind) if file is not None else {}) | given
    preset = given.pop("preset", None)
    if preset is not None and preset not in (presets or {}):
        known = presets or {}
        raise UsageError(f"--preset {shown(preset)} is not one of {', '.join(known)}{nearest(preset, known)}")
    given = {name: tuple(value) if isinstance(value, list) else value for name, value in given.items()}
    configuration.validate_fields(kind, given)
    for field in dataclasses.fields(kind):
        value = given.get(field.name)
        for path in value if isinstance(value, tuple) else (value,):
            if field.metadata["path"] and isinstance(path, str):
                _check_reachable(field.name, path)
    return preset, given


def change(start: Config, given: Mapping[str, Any]) -> Config:
    """The starting point with the given fields, validated as a whole. Raises `UsageError`."""
    result = dataclasses.replace(typing.cast(Any, start), **given)
    configuration.validate(result)
    return result


def run(main: Callable[[Sequence[str] | None], int], argv: Sequence[str] | None = None) -> int:
    """Call `main(argv)` and return its exit code; an error that the user can mend is one line on stderr."""
    missing = streams.open_missing()
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")  # a terminal that lacks a character is no reason to stop
    product = streams.Product(sys.stdout, closed="stdout" in missing)
    with (
        contextlib.redirect_stderr(typing.cast(typing.IO[str], _Messages(sys.stderr, argv))),
        contextlib.redirect_stdout(typing.cast(typing.IO[str], product)),
    ):
        return _exit_code(main, argv)


class _Messages(streams.Lasting):
    """Stderr, which shows the flag of an argument that a message names in backticks."""

    def __init__(self, stream: Any, argv: Sequence[str] | None):
        super().__init__(stream)
        words = sys.argv[1:] if argv is None else argv
        self.given = [word.partition("=")[2] or word for word in words if "`" in word]

    def write(self, text: str) -> int:
        super().write(with_flags(text, self.given))
        return len(text)


def with_flags(text: str, given: Sequence[str] = ()) -> str:
    """The text with --n_head for `n_head`, --compile for `compile=True` and --no-compile for `compile=False`.

    What the user wrote stays: what stands in quotes, and the words that are `given`, such as paths. A message begins
    with the name of an argument, also where the same word was given.
    """
    words = [rf"(?<!^)(?<!error: )(?:{'|'.join(map(re.escape, given))})"] if given else []

    def flag(match: re.Match[str]) -> str:
        if match["name"] not in configuration.argument_names():
            return match[0]
        return f"--no-{match['name']}" if match["value"] == "False" else f"--{match['name']}"

    return re.sub("|".join([_QUOTED, *words, _NAMED]), flag, text)


def _exit_code(main: Callable[[Sequence[str] | None], int], argv: Sequence[str] | None) -> int:
    try:
        try:
            return main(argv)
        finally:
            sys.stdout.flush()  # now, while a full disk can still be told of
    except UsageErrors as several:
        for error in several.errors:
            print("error:", *str(error).splitlines(), file=sys.stderr)
        return 2
    except UsageError as error:
        print(f"error: {_printable(error)}", file=sys.stderr)
        return 2
    except RunFailed as error:
        print(f"error: {_printable(error)}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("stopped", file=sys.stderr)
        return 130
    except (streams.StreamLost, BrokenPipeError) as error:
        if error.errno != errno.EPIPE:  # who reads no further knows why
            print(f"error: stdout takes no more: {error.strerror}", file=sys.stderr)
        return 1


def _printable(error: Exception) -> str:
    """A message on one line, in which a control character, as files may hold, is shown and does nothing."""
    line = " ".join(str(error).splitlines())
    return "".join(char if char.isprintable() else char.encode("unicode_escape").decode() for char in line)


def _check_reachable(name: str, path: str) -> None:
    """Raise `UsageError` for a name that this system cannot look up, or a folder that may not be entered."""
    try:
        os.stat(os.path.join(path, "."))  # noqa: PTH116, PTH118 - pathlib drops the dot, which asks for the folder's inside
    except (FileNotFoundError, NotADirectoryError):
        return
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise UsageError(f"--{name} {shown(path)} cannot be looked up: {reason}; name another") from None


def _parser(
    kind: type, prog: str, description: str, presets: Mapping[str, Any] | None
) -> tuple[argparse.ArgumentParser, dict[str, argparse.Action]]:
    """The parser of a dataclass's flags, and what it does at each of them."""
    parser = argparse.ArgumentParser(
        prog=prog,
        usage=f"{prog} [--flag value ...]",
        description=description,
        allow_abbrev=False,
        add_help=False,
        exit_on_error=False,
        argument_default=argparse.SUPPRESS,  # what was not given is absent
    )
    groups, title, actions = {None: parser.add_argument_group("options")}, None, []
    hints = typing.get_type_hints(kind)
    for field in dataclasses.fields(kind):
        title = field.metadata["group"] or title
        if title not in groups:
            groups[title] = parser.add_argument_group(title)
        actions += _add(groups[title], field, hints[field.name], presets)
    add = groups[None].add_argument
    actions.append(add("-h", "--help", action=_Help, nargs=0, help="show this help and exit"))
    if presets is not None:
        names = f"starting point: {', '.join(presets)}"
        actions.append(add("--preset", metavar="NAME", type=_unmarked, help=names))
        actions.append(add("--config", metavar="FILE.toml", type=_unmarked, help="a TOML file of these flags"))
    return parser, {flag: action for action in actions for flag in action.option_strings}


class _Help(argparse.Action):
    """Argparse's own hides that stdout takes no more."""

    def __call__(self, parser: argparse.ArgumentParser, *_: object) -> None:
        print(parser.format_help(), end="")
        raise SystemExit(0)


def _add(group: Any, field: dataclasses.Field, hint: Any, presets: Mapping[str, Any] | None) -> list[argparse.Action]:
    """Add the flag of a field to a group of the help; where it is a switch, the one that turns it off too."""
    base, names = _base_type(hint), [f"--{name}" for name in (field.name, *field.metadata["alias"])]
    convert = functools.partial(_convert, field, hint)
    text = _help(field, base is bool, presets)
    if base is bool:
        return [
            group.add_argument(*names, nargs="?", const=True, type=convert, metavar="BOOL", help=text),
            group.add_argument(
                f"--no_{field.name}", dest=field.name, action="store_const", const=False, help=argparse.SUPPRESS
            ),
        ]
    metavar = "NAME" if field.metadata["choices"] else {str: "TEXT"}.get(base, base.__name__.upper())
    action = "append" if typing.get_origin(hint) is tuple else "store"
    return [group.add_argument(*names, action=action, dest=field.name, type=convert, metavar=metavar, help=text)]


def _parse(
    parser: argparse.ArgumentParser,
    flags: Mapping[str, argparse.Action],
    argv: Sequence[str],
    unnamed: Sequence[str],
    lists: Sequence[str],
) -> dict[str, Any]:
    """Parse the words into a value for each field that they give. Raises `UsageError`."""
    try:
        return vars(parser.parse_args(_marked(argv, flags, unnamed, lists)))
    except argparse.ArgumentError as error:
        raise UsageError(error.message) from None


def _marked(
    argv: Sequence[str], flags: Mapping[str, argparse.Action], unnamed: Sequence[str], lists: Sequence[str]
) -> list[str]:
    """The words, flags spelled as the parser knows them and values marked. Raises `UsageError` for what is neither.

    A bare word is the value of the first of the `unnamed` fields that has none yet, or is one of the `lists`.
    """
    words: list[str] = []
    missing = list(unnamed)
    for word in argv:
        before = flags.get(words[-1]) if words else None  # the flag that this word may be the value of
        wanted = before is not None and before.nargs is None
        typed, equals, value = word.partition("=")
        flag = "--" + typed[2:].replace("-", "_") if typed.startswith("--") else typed
        if flag in flags and not (wanted and word == "-h"):
            if wanted:
                raise UsageError(f"{words[-1]} needs a value, and {word} is the next flag; write {words[-1]}=VALUE")
            if equals and flags[flag].nargs == 0:
                raise UsageError(f"{shown(word)}: {typed} takes no value; write {typed} alone")
            words.append(f"{flag}={MARK}{value}" if equals else flag)
            missing = [name for name in missing if name != flags[flag].dest or name in lists]
        elif wanted or (before is not None and before.nargs == "?" and word.lower() in (*TRUE, *FALSE, AUTO)):
            words.append(MARK + word)
        elif word.startswith("--"):
            raise UsageError(f"unknown flag {flag[: LONGEST_SHOWN + 2]}{nearest(flag, flags)}")
        elif missing and not word.startswith("-"):
            words.append(f"--{missing[0]}={MARK}{word}")
            missing = missing if missing[0] in lists else missing[1:]
        else:
            raise UsageError(f"{shown(word)} is not a flag; every value follows a flag such as {next(iter(flags))}")
    if words and words[-1] in flags and flags[words[-1]].nargs is None:
        raise UsageError(f"{words[-1]} needs a value")
    return words


def _help(field: dataclasses.Field, switch: bool, presets: Mapping[str, Any] | None) -> str:
    text, choices = with_flags(field.metadata["help"]).replace("%", "%%"), field.metadata["choices"]
    if choices:
        text += f" ({', '.join(choices)})"
    if switch:
        text += f"; or --no-{field.name}"
    if len({getattr(preset, field.name) for preset in (presets or {}).values()}) > 1:
        return text + " [by preset]"
    default = AUTO if field.metadata["auto"] else field.default
    default = " ".join(map(str, default)) if isinstance(default, tuple) else default
    return text + (f" [{default}]" if default not in (None, "") else "")


def _base_type(hint: Any) -> type:
    """int for `int | None`, str for `tuple[str, ...]`."""
    if isinstance(hint, types.UnionType):
        hint = next(t for t in typing.get_args(hint) if t is not type(None))
    return typing.get_args(hint)[0] if typing.get_origin(hint) is tuple else hint


def _unmarked(word: str) -> str:
    return word.removeprefix(MARK)


def _convert(field: dataclasses.Field, hint: Any, word: str) -> Any:
    """The value of a flag from its marked text."""
    text, kind = _unmarked(word), _base_type(hint)
    if _is_auto(field, text) or (type(None) in typing.get_args(hint) and text.lower() == "none"):
        return None
    if kind is bool:
        if text.lower() in TRUE + FALSE:
            return text.lower() in TRUE
        flag = f"--{field.name}"
        raise argparse.ArgumentTypeError(
            f"{flag} {shown(text)} is neither true nor false; pass {flag} or --no-{field.name}"
        )
    try:
        return kind(text)
    except ValueError:
        what = {int: "a whole number", float: "a number"}.get(kind, f"a {kind.__name__}")
        raise argparse.ArgumentTypeError(f"--{field.name} {shown(text)} is not {what}") from None


def _is_auto(field: dataclasses.Field, value: Any) -> bool:
    return field.metadata["auto"] and isinstance(value, str) and value.lower() == AUTO


def _read_toml(path: Path, kind: type, written_for: type) -> dict[str, Any]:
    try:
        content = path.read_bytes()
    except (OSError, ValueError) as error:  # ValueError: a name that no file can have
        reason = getattr(error, "strerror", None) or error
        raise UsageError(f"--config {path} cannot be read: {reason}; name a TOML file") from None
    text = decode_utf8(content, f"--config {path}")
    try:
        table = tomllib.loads(text)
    except (ValueError, RecursionError) as error:  # TOML's, and those of a hostile nesting or number
        raise UsageError(f"--config {path} is not TOML: {error}") from None
    spelled, known = _spellings(kind), _spellings(written_for)
    for key in table:
        if key not in {*spelled, *known, "preset"}:
            raise UsageError(f"--config {path}: unknown key {key!r}{nearest(key, spelled)}")
    if not isinstance(table.get("preset", ""), str):
        raise UsageError(f"--config {path}: preset {table['preset']!r} is not a preset's name")
    given = {spelled[key].name: None if _is_auto(spelled[key], v) else v for key, v in table.items() if key in spelled}
    return given | {key: value for key, value in table.items() if key == "preset"}


def _spellings(kind: type) -> dict[str, dataclasses.Field]:
    """A dataclass's fields by their names and aliases."""
    return {name: field for field in dataclasses.fields(kind) for name in (field.name, *field.metadata["alias"])}
