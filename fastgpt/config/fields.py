"""Fields of a configuration: each carries its own help text and limits.

A configuration is a frozen dataclass that derives from `Settings`; `option` makes its fields. `fastgpt.cli` turns a
field into a flag, and `validate` checks every limit.
"""

import dataclasses
import math
import types
import typing
from collections.abc import Collection, Iterable, Mapping
from typing import Any

from fastgpt.errors import UsageError, nearest, shown

LEAST, MOST = -(2**63), 2**63 - 1  # what 64 bits hold: whole numbers end up in tensors and files


def option(
    default: Any,
    help: str,
    *,
    choices: tuple[str, ...] | None = None,
    low: float | None = None,
    high: float | None = None,
    above: float | None = None,
    below: float | None = None,
    alias: tuple[str, ...] = (),
    path: bool = False,
    auto: bool = False,
    group: str | None = None,
) -> Any:
    """A dataclass field with its help text and its limits (low <= value <= high, above < value < below).

    `path`: its text is, or may be, the name of a file or folder. `auto`: None is written auto. `group`: the title
    under which the help shows this field and those after it.
    """
    limits = {"low": low, "high": high, "above": above, "below": below}
    metadata = {"help": help, "choices": choices, "alias": alias, "path": path, "auto": auto, "group": group}
    return dataclasses.field(default=default, metadata=metadata | limits)


class Settings:
    """The base of every configuration. Keeps each setting as a plain Python value, however it was given."""

    def __post_init__(self) -> None:
        for field in dataclasses.fields(typing.cast(Any, self)):
            given = getattr(self, field.name)
            value = _plain(given, several=typing.get_origin(field.type) is tuple)
            if value is not given:
                object.__setattr__(self, field.name, value)

    def check(self) -> None:
        """Check what concerns several fields, each of which is valid by itself. Raises `UsageError`."""


def argument_names() -> set[str]:
    """The names of all settings. A message names one in backticks, and `fastgpt.cli` shows its flag instead."""
    kinds: list[type] = [Settings]
    for kind in kinds:
        kinds += kind.__subclasses__()
    return {"preset", *(field.name for kind in kinds[1:] for field in dataclasses.fields(kind))}


def _plain(value: Any, several: bool = False) -> Any:
    """A number of NumPy or PyTorch as Python's; where a setting has `several` values, a tuple of a list or of one."""
    if hasattr(value, "tolist"):
        value = value.tolist()
    if not several or value == ():
        return value
    if isinstance(value, list | tuple):
        return tuple(map(_plain, value))
    return (value,) if isinstance(value, str | int) else value


def validate(config: Settings) -> None:
    """Check each field's type, choices and limits, then what concerns several fields. Raises `UsageError`."""
    validate_fields(type(config), vars(config))
    config.check()


def validate_fields(kind: type, values: Mapping[str, Any]) -> None:
    """Check the values that were given for some of a dataclass's fields, each by itself."""
    hints = typing.get_type_hints(kind)
    for field in dataclasses.fields(kind):
        if field.name in values:
            _check_field(field, hints[field.name], values[field.name])


def _check_field(field: dataclasses.Field, hint: Any, value: Any) -> None:
    argument, meta = f"`{field.name}`", field.metadata
    allowed = typing.get_args(hint) if isinstance(hint, types.UnionType) else (hint,)
    if value is None and type(None) in allowed:
        return
    accepted = tuple(typing.get_origin(t) or t for t in allowed)
    if tuple in accepted:
        item = typing.get_args(hint)[0]
        if not (isinstance(value, tuple) and all(type(v) is item for v in value)):
            raise UsageError(f"{argument} {shown(value)} is not a list of {'text' if item is str else 'whole numbers'}")
    number = isinstance(value, int) and not isinstance(value, bool)
    fits = isinstance(value, accepted) and (not isinstance(value, bool) or bool in accepted)
    if not fits and not (number and float in accepted):
        wanted = next(t for t in accepted if t is not type(None)).__name__
        raise UsageError(f"{argument} {shown(value)} is not of type {wanted}")
    if isinstance(value, float) and not math.isfinite(value):
        raise UsageError(f"{argument} {value} is not a finite number")
    if meta.get("choices") and value not in meta["choices"]:
        raise UsageError(
            f"{argument} {shown(value)} is not one of {', '.join(meta['choices'])}"
            f"{nearest(str(value), meta['choices'])}"
        )
    for path in value if isinstance(value, tuple) else (value,):
        if meta.get("path") and isinstance(path, str):
            _check_path(argument, path)
    bounds = {
        "low": (lambda x, limit: x >= limit, "at least"),
        "above": (lambda x, limit: x > limit, "above"),
        "high": (lambda x, limit: x <= limit, "at most"),
        "below": (lambda x, limit: x < limit, "below"),
    }
    for name, (holds, words) in bounds.items():
        limit = meta.get(name)
        if limit is not None and not holds(value, limit):
            raise UsageError(f"{argument} {shown(value)} must be {words} {limit}")
    for one in value if isinstance(value, tuple) else (value,):
        if isinstance(one, int) and not LEAST <= one <= MOST:
            words = f"at most {MOST}" if one > 0 else f"at least {LEAST}"
            raise UsageError(f"{argument} {shown(one)} must be {words}")


def _check_path(argument: str, value: str) -> None:
    if not value:
        raise UsageError(f"{argument} '' is empty; name a file or folder, or leave it out")
    if "\0" in value:
        raise UsageError(f"{argument} {shown(value)} holds a NUL character, which no file's name can hold")
    try:
        value.encode()
    except UnicodeEncodeError:  # a run's config.json, which names it, is UTF-8
        raise UsageError(f"{argument} {shown(value)} is not UTF-8; rename it") from None


def check_names(given: Iterable[str], known: Collection[str]) -> None:
    """Raise `UsageError` for a name that is not known, with the one that is most like it."""
    for name in given:
        if name not in known:
            raise UsageError(f"unknown setting {name!r}{nearest(name, known)}")
