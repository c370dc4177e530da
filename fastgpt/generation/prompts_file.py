"""Reads prompts: the one that `prompt` names, or the many of the file that `prompts` names.

A line of that file is a prompt. In a .jsonl file it is an object with `prompt` (text) or `tokens` (ids), and any field
of `SamplingParams` that is to differ from the command line's; blank lines are skipped there. The answers are described
in `fastgpt.generation.answers`.
"""

import sys
from collections.abc import Sequence
from pathlib import Path

from fastgpt.config.generation import SamplingParams
from fastgpt.errors import UsageError, UsageErrors, shown
from fastgpt.generation.answers import Job
from fastgpt.generation.settings import sampling
from fastgpt.system.files import decode_utf8
from fastgpt.system.json_files import parse_object
from fastgpt.tokenizer.base import check_unicode

MOST_ERRORS = 50  # lines of a file that are reported as wrong


def read_prompt(text: str, setting: str = "prompt") -> str:
    """The prompt that a setting names: the text itself, FILE:path, or - for stdin. Each \\r\\n becomes \\n."""
    if text == "-":
        return decode_utf8(sys.stdin.buffer.read(), f"`{setting}`: stdin").replace("\r\n", "\n")
    if not text.startswith("FILE:"):
        return check_unicode(text, f"`{setting}`")
    path = Path(text.removeprefix("FILE:"))
    try:
        content = path.read_bytes()
    except (OSError, ValueError) as error:  # ValueError: a name that no file can have
        raise UsageError(f"`{setting}` {shown(text)} cannot be read: {getattr(error, 'strerror', error)}") from None
    return decode_utf8(content, f"`{setting}`: {path}").replace("\r\n", "\n")


def read_prompts(name: str, defaults: SamplingParams) -> list[Job]:
    """The prompts of a file, or of stdin if its name is -, and the settings of each.

    Raises:
        UsageError: the file cannot be read, or lines of it, which are named, are no prompts.
    """
    try:
        content = sys.stdin.buffer.read() if name == "-" else Path(name).read_bytes()
    except OSError as error:
        raise UsageError(f"`prompts` {name} cannot be read: {error.strerror}") from None
    lines = decode_utf8(content, f"`prompts`: {name}").split("\n")
    if lines[-1] == "":
        lines.pop()
    lines = [line.removesuffix("\r") for line in lines]
    objects = name.endswith(".jsonl")
    if not lines or (objects and not any(map(str.strip, lines))):
        raise UsageError(f"`prompts` {name} is empty; write a prompt a line into it")
    return _read_objects(name, lines, defaults) if objects else [(line, defaults) for line in lines]


def _read_objects(name: str, lines: Sequence[str], defaults: SamplingParams) -> list[Job]:
    jobs, errors = [], []
    for i, line in enumerate(lines, 1):
        if line.strip():
            try:
                jobs.append(_read_object(f"`prompts` {name}, line {i}", line, defaults))
            except UsageError as error:
                errors.append(error)
    if len(errors) > MOST_ERRORS:
        more = len(errors) - MOST_ERRORS
        errors[MOST_ERRORS:] = [UsageError(f"`prompts` {name} has {more:,} more lines that are no requests")]
    if errors:
        raise UsageErrors(errors)
    return jobs


def _read_object(where: str, line: str, defaults: SamplingParams) -> Job:
    wanted = ' with either "prompt" or "tokens"'
    try:
        fields = parse_object(line, wanted)
    except ValueError as error:
        raise UsageError(f"{where} {error}") from None
    if ("prompt" in fields) == ("tokens" in fields):
        raise UsageError(f"{where} is not an object{wanted}")
    if "prompt" in fields:
        prompt = fields.pop("prompt")
        fits = isinstance(prompt, str)
    else:
        prompt = fields.pop("tokens")
        fits = isinstance(prompt, list) and all(type(token) is int for token in prompt)
    if not fits:
        raise UsageError(f"{where}: prompt must be text, and tokens a list of token ids, not {prompt!r:.40}")
    try:
        return prompt, sampling(fields, defaults)
    except UsageError as error:
        raise UsageError(f"{where}: {error}") from None
