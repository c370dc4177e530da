"""Writes the answers to many prompts as lines of JSON, each whole or not at all.

A line is an object with `index` (the place of the prompt in its file, from 0), `sample`, `prompt`, `text`, `tokens`,
`finish_reason` and `timings` (seconds), and if there are any also `logprobs`, `candidates` and `error`. A
log-probability of minus infinity is null, because JSON has no infinity.
"""

import codecs
import dataclasses
import errno
import json
import math
import os
import stat
import sys
from collections import deque
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

from fastgpt.config.generation import SamplingParams
from fastgpt.errors import RunFailed, UsageError
from fastgpt.generation.request import Completion, Prompt
from fastgpt.system import lock, streams
from fastgpt.system.units import counted

BEGINNING = b'{"index": '  # the beginning of every line
Job = tuple[Prompt, SamplingParams]
Place = tuple[int, int]  # of an answer: the numbers of its prompt and its continuation


def check_output(output: str | None, resume: bool = False) -> None:
    """Raise `UsageError` if the file is not empty or cannot be made, before any work is done."""
    if output is None:
        return
    path = Path(output)
    if path.is_dir():
        raise UsageError(f"`output` {output} is a folder; name a file in it")
    if path.exists():
        regular = path.is_file()
        if resume and not regular:
            raise UsageError(f"`resume` needs a file of answers, and `output` {output} is none; leave one of them out")
        if regular and not resume and path.stat().st_size:
            raise UsageError(
                f"`output` {output} exists; go on with it by `resume=True`, delete it, or name another file"
            )
        if not os.access(path, os.W_OK):
            raise UsageError(f"`output` {output} cannot be written to; name another file")
        return
    if not path.parent.is_dir():
        raise UsageError(f"`output` {output}: there is no folder {path.parent}; make it, or name another file")
    if not os.access(path.parent, os.W_OK):
        raise UsageError(f"`output` {output}: {path.parent} cannot be written to; name another file")


class Answers:
    """Takes completions as they finish, and writes each as a line: `with Answers(...) as answers`.

    The end of the block writes the completions that were held back to keep the order, whatever ended it. It deletes a
    file without a line, so that the same command can be given again.

    Attributes:
        wanted: for each prompt, the numbers of the continuations that are still to be made.
        total, done: numbers of continuations, with those of refused prompts.
        failed: the indices of the prompts that could not be continued to their end.
    """

    def __init__(
        self,
        output: str | None,
        jobs: Sequence[Job],
        *,
        resume: bool = False,
        order: str = "input",
    ):
        """
        Args:
            output: the name of the file; None is stdout.
            jobs: the prompts with their settings.
            resume: keep the lines that the file holds, and go on after them. A last line that is incomplete is cut off.
            order: "input" is that of the prompts, "completion" that in which their continuations finish.

        Raises:
            UsageError: the file is not empty and `resume` is not set; its lines are no answers to these prompts;
                another process is writing it; or it cannot be made.
        """
        self.in_order = order == "input"
        self.prompts, self.samples = [prompt for prompt, _ in jobs], [params.num_samples for _, params in jobs]
        self.failed: set[int] = set()
        self.on_stdout = output is None
        self.file = _stdout() if output is None else _File(output)
        self._held: dict[Place, Completion] = {}
        finished: set[Place] = set()
        try:
            if isinstance(self.file, _File) and self.file.size:
                if not resume:
                    raise UsageError(f"`output` {output} cannot be made: {os.strerror(errno.EEXIST)}")
                finished = self._read(self.file)
        except BaseException:
            self.file.close()
            raise
        self.wanted = [[n for n in range(count) if (i, n) not in finished] for i, count in enumerate(self.samples)]
        self._places = deque((i, n) for i, numbers in enumerate(self.wanted) for n in numbers)
        self.total = sum(self.samples)
        self.done = self.total - len(self._places)

    def __enter__(self) -> "Answers":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None):
        try:
            if not isinstance(error, _Refused | BrokenPipeError):
                for place in sorted(self._held):
                    self._write(self._held[place])
        finally:
            self.file.close()

    def add(self, completion: Completion) -> None:
        """Write a completion now, or when all before it are written.

        Raises:
            RunFailed: the file cannot be written to; it ends with the last whole line.
        """
        self.done += len(self.wanted[completion.index]) if completion.refused else 1
        if not self.in_order:
            self._write(completion)
            return
        self._held[completion.index, completion.sample] = completion
        while self._places and (ready := self._held.pop(self._places[0], None)):
            self._write(ready)
            index, _ = self._places.popleft()
            while ready.refused and self._places and self._places[0][0] == index:
                self._places.popleft()

    def _write(self, completion: Completion) -> None:
        if completion.finish_reason == "error":
            self.failed.add(completion.index)
        self.file.write(to_line(completion, escaped=self.file.escaped))

    def _read(self, file: "_File") -> set[Place]:
        """The places of an earlier run's answers. Raises `UsageError` for a line that is no answer to these prompts."""
        finished: set[Place] = set()
        *lines, rest = file.path.read_bytes().split(b"\n")
        half = rest.startswith(BEGINNING[: len(rest)]) and not _is_json(rest)  # an incomplete answer
        if not half:
            lines.append(rest)
        for number, line in enumerate(lines, 1):
            where = f"{file.name}, line {number}"
            try:
                record = json.loads(line)
                place = record["index"], record["sample"]
                prompt, reason, began = record["prompt"], record["finish_reason"], record["timings"]["started"]
            except (ValueError, KeyError, TypeError, RecursionError):
                raise UsageError(f"{where} is no answer; name the file that `resume` is to go on with") from None
            index, sample = place
            known = type(index) is type(sample) is int and 0 <= index < len(self.prompts)
            if not known or not 0 <= sample < self.samples[index] or prompt != self.prompts[index]:
                raise UsageError(
                    f"{where} is no answer to these prompts; give the same `prompts` and `num_samples`, or another "
                    "`output`"
                )
            if place in finished:
                raise UsageError(f"{where} answers prompt {index} again; delete one of the two lines")
            finished.add(place)
            if reason == "error":
                self.failed.add(index)
                if began is None:  # the only answer to its prompt
                    finished.update((index, n) for n in range(self.samples[index]))
        if half:
            file.cut(file.size - len(rest), len(lines))
        else:
            file.cut(file.size, len(lines) - 1)
            file.write("")  # the missing line break
        return finished


class _Refused(RunFailed):
    """The output cannot be written to."""


class _Lines:
    """Writes lines to a descriptor, each whole or not at all.

    There is no buffer, so that nothing is left to be written after a failure.

    Attributes:
        size: bytes that a regular file held at the start.
        count: lines so far.
    """

    escaped = False
    place = "stdout"  # or a path

    def __init__(self, descriptor: int, name: str, way_out: str):
        """Takes over the descriptor. `name`, `way_out`: for the message of a failure."""
        self.descriptor, self.name, self.way_out = descriptor, name, way_out
        self.regular = stat.S_ISREG(os.fstat(descriptor).st_mode)
        self.size = os.fstat(descriptor).st_size if self.regular else 0
        self.count = 0

    def write(self, line: str) -> None:
        # UTF-8 has no lone surrogates, so they become escapes of JSON.
        left = (line + "\n").encode("ascii" if self.escaped else "utf-8", errors="backslashreplace")
        end = os.lseek(self.descriptor, 0, os.SEEK_END) if self.regular else 0
        try:
            sys.audit("fastgpt.write", self.place, len(left))
            while left:
                left = left[os.write(self.descriptor, left) :]
        except BaseException as error:
            if self.regular:
                os.ftruncate(self.descriptor, end)  # removes the part of the line that was written
            if not isinstance(error, OSError) or error.errno == errno.EPIPE:
                raise
            whole = counted(self.count, "whole line")
            raise _Refused(f"{self.name} takes no more: {error.strerror}; it holds {whole}; {self.way_out}") from None
        self.count += 1

    def close(self) -> None:
        os.close(self.descriptor)


class _File(_Lines):
    """The file that `output` names, locked against other processes."""

    def __init__(self, path: str):
        self.path = Path(path)
        self.place = str(self.path.absolute())
        try:
            descriptor = os.open(path, os.O_RDWR | os.O_CREAT | getattr(os, "O_BINARY", 0), 0o666)
        except OSError as error:
            raise UsageError(f"`output` {path} cannot be made: {error.strerror}") from None
        super().__init__(descriptor, f"`output` {path}", "make room, and go on with `resume=True`")
        if self.regular and not lock.claim(descriptor):
            self.close()
            raise UsageError(f"`output` {path} is being written by another process; wait for its end")

    def cut(self, size: int, lines: int) -> None:
        """Keep the first `size` bytes, which are `lines` lines, and go on after them."""
        os.ftruncate(self.descriptor, size)
        self.count = lines

    def close(self) -> None:
        if self.regular and os.fstat(self.descriptor).st_size == 0:
            self.path.unlink(missing_ok=True)
        super().close()


class _Text:
    """A stdout without a descriptor."""

    escaped = False

    def __init__(self, stream: Any):
        self.stream = stream

    def write(self, line: str) -> None:
        self.stream.write(line + "\n")
        self.stream.flush()

    def close(self) -> None:
        pass


def _stdout() -> "_Lines | _Text":
    """Stdout, in ASCII if it cannot hold all of Unicode. Raises `streams.StreamLost` if it was closed."""
    stream = sys.stdout
    if isinstance(stream, streams.Product):
        stream.check()
    stream.flush()
    try:
        lines = _Lines(os.dup(stream.fileno()), "stdout", "make room, or write to another file by `output`")
    except (OSError, ValueError):
        lines = _Text(stream)
    lines.escaped = codecs.lookup(stream.encoding or "utf-8").name != "utf-8"
    return lines


def to_line(completion: Completion, *, escaped: bool = False) -> str:
    """A completion as a line of JSON; `escaped`: in ASCII."""
    record: dict[str, Any] = {
        "index": completion.index,
        "sample": completion.sample,
        "prompt": completion.prompt,
        "text": completion.text,
        "tokens": completion.tokens,
        "finish_reason": completion.finish_reason,
        "timings": {
            name: None if seconds is None else round(seconds, 6)
            for name, seconds in dataclasses.asdict(completion.timings).items()
        },
    }
    if completion.logprobs is not None:
        record["logprobs"] = [
            {"logprob": _finite(own), "top": [(id, _finite(one)) for id, one in top]}
            for own, top in completion.logprobs
        ]
    if completion.candidates is not None:
        record["candidates"] = [[one._asdict() for one in own] for own in completion.candidates]
    if completion.error is not None:
        record["error"] = completion.error
    return json.dumps(record, ensure_ascii=escaped, allow_nan=False)


def _is_json(line: bytes) -> bool:
    try:
        json.loads(line)
    except (ValueError, RecursionError):
        return False
    return True


def _finite(logprob: float) -> float | None:
    return logprob if math.isfinite(logprob) else None
