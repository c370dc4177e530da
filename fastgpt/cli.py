"""The command line: a dataclass becomes flags, an error becomes one line and an exit code.

Presets come first, then `--config file.toml`, then flags; the later wins. `run` calls a main function and
turns what it raises into exit codes: 0 done, 1 failed, 2 bad usage or input, 130 and 143 stopped by a signal.
"""

import argparse
import contextlib
import dataclasses
import errno
import io
import os
import sys
import tomllib
import types
import typing
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

from fastgpt.config import fields as configuration
from fastgpt.errors import LONGEST_SHOWN, RunFailed, UsageError, UsageErrors, nearest, shown
from fastgpt.system import streams
from fastgpt.system.files import decode_utf8

Config = TypeVar("Config")
TRUE, FALSE, AUTO = ("true", "yes", "on", "1"), ("false", "no", "off", "0"), "auto"


def parse(
    kind: type[Config],
    argv: Sequence[str] | None = None,
    *,
    prog: str,
    description: str,
    presets: Mapping[str, Config] | None = None,
) -> Config:
    """A configuration of the given dataclass: its defaults or a preset, changed by what was given. See `read`."""
    preset, given = read(kind, argv, prog=prog, description=description, presets=presets)
    return change(kind() if preset is None or presets is None else presets[preset], given)


def read(
    kind: type,
    argv: Sequence[str] | None = None,
    *,
    prog: str,
    description: str,
    presets: Mapping[str, Any] | None = None,
) -> tuple[str | None, dict[str, Any]]:
    """The named preset, and the fields that `--config file.toml` or flags give, each within its own limits.

    Args:
        kind: a frozen dataclass whose fields were made by `config.option`.
        argv: the arguments, without the program's name; default `sys.argv[1:]`.
        presets: named starting points, which add `--preset` and `--config`.

    Raises:
        UsageError: an unknown flag or key (the nearest is named) or a value outside its limits.
    """
    words = _normalize(sys.argv[1:] if argv is None else argv, kind, presets)
    if "--help" in words:
        print(_helper(kind, prog, description, presets).format_help(), end="")
        raise SystemExit(0)
    given = _values(words, kind)
    file = given.pop("config", None)
    given = (_read_toml(Path(file), kind) if file is not None else {}) | given
    preset = given.pop("preset", None)
    if preset is not None and preset not in (presets or {}):
        known = presets or {}
        raise UsageError(f"--preset {shown(preset)} is not one of {', '.join(known)}{nearest(preset, known)}")
    given = {name: tuple(value) if isinstance(value, list) else value for name, value in given.items()}  # TOML's
    configuration.validate_fields(kind, given)
    for field in dataclasses.fields(kind):
        if field.metadata["path"] and isinstance(path := given.get(field.name), str):
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
        contextlib.redirect_stderr(typing.cast(typing.IO[str], streams.Lasting(sys.stderr))),
        contextlib.redirect_stdout(typing.cast(typing.IO[str], product)),
    ):
        return _exit_code(main, argv)


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


def _flags(kind: type) -> dict[str, dataclasses.Field]:
    """Every spelling of every flag, without the dashes."""
    spelled = {}
    for field in dataclasses.fields(kind):
        for name in (field.name, *field.metadata["alias"]):
            spelled[name] = field
    return spelled


def _helper(kind: type, prog: str, description: str, presets: Mapping[str, Any] | None) -> argparse.ArgumentParser:
    """What prints the help; argparse reads no flags here, as it drops a value that is --."""
    parser = argparse.ArgumentParser(prog=prog, usage=f"{prog} [--flag value ...]", description=description)
    if presets is not None:
        parser.add_argument("--preset", metavar="NAME", help=f"starting point: {', '.join(presets)}")
        parser.add_argument("--config", metavar="FILE.toml", help="a TOML file of these flags")
    hints = typing.get_type_hints(kind)
    for title, fields in _groups(kind):
        group = parser.add_argument_group(title)
        for field in fields:
            base = _base_type(hints[field.name])
            metavar = "NAME" if field.metadata["choices"] else {bool: "", str: "TEXT"}.get(base, base.__name__.upper())
            group.add_argument(
                *(f"--{name}" for name in (field.name, *field.metadata["alias"])),
                metavar=metavar,
                help=_help(field, base is bool, presets),
            )
    return parser


def _groups(kind: type) -> Iterator[tuple[str, list[dataclasses.Field]]]:
    """The dataclasses that `kind` inherits from, and itself: the first line about each, and its own fields."""
    known: set[str] = set()
    for part in reversed([c for c in kind.__mro__ if dataclasses.is_dataclass(c)]):
        own = [field for field in dataclasses.fields(part) if field.name not in known]
        known.update(field.name for field in own)
        yield (part.__doc__ or part.__name__).splitlines()[0].rstrip("."), own


def _help(field: dataclasses.Field, switch: bool, presets: Mapping[str, Any] | None) -> str:
    text, choices = field.metadata["help"].replace("%", "%%"), field.metadata["choices"]
    if choices:
        text += f" ({', '.join(choices)})"
    if switch:
        text += f"; or --no-{field.name}"
    if len({getattr(preset, field.name) for preset in (presets or {}).values()}) > 1:
        return text + " [by preset]"
    default = AUTO if field.metadata["auto"] else field.default
    return text + (f" [{default}]" if default not in (None, (), "") else "")


def _base_type(hint: Any) -> type:
    """int for `int | None`, str for `tuple[str, ...]`."""
    if isinstance(hint, types.UnionType):
        hint = next(t for t in typing.get_args(hint) if t is not type(None))
    return typing.get_args(hint)[0] if typing.get_origin(hint) is tuple else hint


def _values(words: Sequence[str], kind: type) -> dict[str, Any]:
    """What normalized flags give: of one that is repeated the last, or where it has several values all."""
    spelled, hints = _flags(kind), typing.get_type_hints(kind)
    given: dict[str, Any] = {}
    for word in words:
        name, _, text = word[2:].partition("=")
        if name not in spelled:  # --preset and --config
            given[name] = text
            continue
        field = spelled[name]
        hint = hints[field.name]
        value = None if _is_auto(field, text) else _convert(field.name, hint, text)
        several = typing.get_origin(hint) is tuple
        given[field.name] = (*given.get(field.name, ()), value) if several else value
    return given


def _is_auto(field: dataclasses.Field, value: Any) -> bool:
    return field.metadata["auto"] and isinstance(value, str) and value.lower() == AUTO


def _convert(name: str, hint: Any, text: str) -> Any:
    """The value of a flag from its text. Raises `UsageError`."""
    kind, optional = _base_type(hint), type(None) in typing.get_args(hint)
    if optional and text.lower() == "none":
        return None
    if kind is bool:
        if text.lower() in TRUE + FALSE:
            return text.lower() in TRUE
        raise UsageError(f"--{name} {shown(text)} is neither true nor false; pass --{name} or --no-{name}")
    try:
        return kind(text)
    except ValueError:
        what = {int: "a whole number", float: "a number"}.get(kind, f"a {kind.__name__}")
        raise UsageError(f"--{name} {shown(text)} is not {what}") from None


def _normalize(argv: Sequence[str], kind: type, presets: Mapping[str, Any] | None) -> list[str]:
    """Spell every flag as --its_name, switches as --name=true|false, and name the nearest of an unknown one."""
    spelled, hints = _flags(kind), typing.get_type_hints(kind)
    switches = [name for name, field in spelled.items() if _base_type(hints[field.name]) is bool]
    known = [*spelled, *(f"no_{name}" for name in switches), "help"]
    known += ["preset", "config"] if presets is not None else []
    result, words = [], list(argv)
    while words:
        word = words.pop(0)
        if word == "-h":
            word = "--help"
        if not word.startswith("--"):
            raise UsageError(f"{shown(word)} is not a flag; every value follows a flag such as --{known[0]}")
        name, equals, value = word[2:].partition("=")
        name = name.replace("-", "_")
        if name.startswith("no_") and name[3:] in switches:
            if equals:
                raise UsageError(f"{word!r}: --no-{name[3:]} takes no value; pass --{name[3:]}={value}")
            result.append(f"--{name[3:]}=false")
        elif name not in known:
            raise UsageError(f"unknown flag --{name[:LONGEST_SHOWN]}{nearest('--' + name, [f'--{k}' for k in known])}")
        elif name == "help":
            result.append("--help")
        elif equals:
            result.append(f"--{name}={value}")
        elif name in switches:
            taken = bool(words) and words[0].lower() in (*TRUE, *FALSE, AUTO)
            result.append(f"--{name}={words.pop(0) if taken else 'true'}")
        elif not words:
            raise UsageError(f"--{name} needs a value")
        elif words[0].startswith("--") and words[0][2:].partition("=")[0].replace("-", "_") in known:
            raise UsageError(f"--{name} needs a value, and {words[0]} is the next flag; write --{name}=VALUE")
        else:
            result.append(f"--{name}={words.pop(0)}")
    return result


def _read_toml(path: Path, kind: type) -> dict[str, Any]:
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
    spelled = _flags(kind)
    for key in table:
        if key not in spelled and key != "preset":
            raise UsageError(f"--config {path}: unknown key {key!r}{nearest(key, spelled)}")
    if not isinstance(table.get("preset", ""), str):
        raise UsageError(f"--config {path}: preset {table['preset']!r} is not a preset's name")
    given = {}
    for key, value in table.items():
        field = spelled.get(key)  # None for the preset
        given[field.name if field else key] = None if field and _is_auto(field, value) else value
    return given
