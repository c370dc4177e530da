"""README, docs/ and CONTRIBUTING: links lead somewhere, commands have flags that exist, quoted output was printed."""

import argparse
import ast
import importlib
import importlib.util
import re
import runpy
import shutil
import signal
import subprocess
import sys
import tomllib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

from fastgpt import cli
from tests.helpers.documents import DOCS, DOCUMENTS, README, ROOT, Block, blocks

EVERY_TEXT = [*DOCUMENTS, ROOT / "CHANGELOG.md", ROOT / "bench" / "results" / "NOTES.md"]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
CHANGES = (
    "a learning-rate schedule",
    "a sampler setting",
    "a tokenizer",
    "a logger",
    "an optimizer",
    "a normalisation",
    "a kernel backend",
    "a command",
    "a format of models",
    "a dataset source",
    "a measurement",
    "a kind of file with documents",
    "a preset",
)
SHELL = ("cd", "echo", "git", "printf", "pre-commit", "pyright", "ruff", "source")  # not ours to check
by_name = pytest.mark.parametrize("document", EVERY_TEXT, ids=lambda path: path.name)


class Parsed(Exception):
    """Raised once the flags of a command are accepted, before it does anything."""


def without_code(text: str) -> str:
    return re.sub(r"```.*?```|`[^`\n]*`", "", text, flags=re.S)


def anchors(document: Path) -> set[str]:
    """The names that GitHub gives to a document's headings."""
    titles = re.findall(r"^#+ (.+)$", document.read_text(encoding="utf-8"), re.M)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


@by_name
def test_links_lead_somewhere(document: Path):
    text, broken = without_code(document.read_text(encoding="utf-8")), []
    for target in re.findall(r"(?<=\]\()[^)\s]+(?=\))|(?<=src=\")[^\"]+", text):
        path, _, anchor = target.partition("#")
        found = document.parent / path if path else document
        if "://" not in path and (not found.exists() or (anchor and anchor not in anchors(found))):
            broken.append(target)
    assert broken == []


def test_every_document_is_linked_from_readme():
    text = README.read_text(encoding="utf-8")
    assert all(f"](docs/{path.name})" in text for path in DOCS)


@pytest.mark.parametrize("document", [README, ROOT / "docs" / "training.md"], ids=lambda path: path.name)
def test_quoted_output_was_printed(document: Path):
    text = document.read_text(encoding="utf-8")
    (record,) = set(re.findall(r"\]\(([^)]*first-run\.txt)\)", text))
    printed = (document.parent / record).read_text(encoding="utf-8").splitlines()
    (quoted,) = re.findall(r"^```text\n(.*?best val loss.*?)^```$", text, re.M | re.S)
    missing = [line for line in quoted.splitlines() if not any(line.strip() == p.strip() for p in printed)]
    assert missing == []


def flags_of(main: Callable[[Sequence[str]], Any], words: Sequence[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Call a command of fastgpt up to the point where its flags are read. Raises `UsageError`."""
    read, parse = cli.read, cli.parse

    def stop(*args: Any, **named: Any) -> Any:
        read(*args, **named)
        raise Parsed

    def stop_later(*args: Any, **named: Any) -> Any:
        monkeypatch.setattr(cli, "read", read)  # which `parse` calls before it checks the whole configuration
        parse(*args, **named)
        raise Parsed

    monkeypatch.setattr(cli, "read", stop)
    monkeypatch.setattr(cli, "parse", stop_later)
    saving = getattr(signal, "SIGUSR1", None)  # train ignores it from its first line on
    before = saving and signal.getsignal(saving)
    try:
        with pytest.raises((Parsed, SystemExit)) as ended:
            main(words)
        assert ended.type is Parsed or "--help" in words
    finally:
        monkeypatch.undo()
        if saving:
            signal.signal(saving, before)


def flags_of_tool(main: Callable[[Sequence[str]], Any], words: Sequence[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """The same for a tool whose flags argparse reads."""
    parse = argparse.ArgumentParser.parse_known_args

    def stop(self: argparse.ArgumentParser, *args: Any, **named: Any) -> Any:
        _, unknown = parse(self, *args, **named)
        assert unknown == []
        raise Parsed

    monkeypatch.setattr(argparse.ArgumentParser, "parse_known_args", stop)
    with pytest.raises(Parsed):
        main(words)
    monkeypatch.undo()


def check_python(words: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """A command that begins with `python`, without that word."""
    if words[0] == "-m":
        module, rest = words[1], words[2:]
        if module == "pytest":
            check_pytest(rest)
        elif module == "fastgpt":
            check_fastgpt(rest, monkeypatch)
        elif module == "fastgpt.lm_eval":  # whose flags are another program's
            assert importlib.util.find_spec(module)
        elif module.startswith("fastgpt."):
            flags_of(importlib.import_module(module).main, rest, monkeypatch)
        elif module.startswith("fastgpt_kernels."):
            flags_of_tool(importlib.import_module(module).main, rest, monkeypatch)
        else:
            assert importlib.util.find_spec(module), module
    else:
        file, rest = ROOT / words[0], words[1:]
        monkeypatch.syspath_prepend(file.parent)
        main = runpy.run_path(str(file))["main"]
        check = flags_of if file.parent.name == "data" else flags_of_tool
        check(main, rest, monkeypatch)


def check_fastgpt(words: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """A command of the console script, without the script's name."""
    if words != ["--help"]:
        flags_of(importlib.import_module(f"fastgpt.{words[0]}").main, words[1:], monkeypatch)


def check_pytest(words: Sequence[str]) -> None:
    markers = {marker.partition(":")[0] for marker in PROJECT["tool"]["pytest"]["ini_options"]["markers"]}
    for word, following in zip(words, [*words[1:], ""], strict=True):
        if word == "-m":
            assert set(re.findall(r"\w+", following)) - {"or", "and", "not"} <= markers
        elif "/" in word:
            assert (ROOT / word.partition("::")[0]).exists(), word


def check_pip(words: Sequence[str]) -> None:
    for extras in re.findall(r"\.\[(.*?)\]", " ".join(words)):
        assert set(extras.split(",")) <= set(PROJECT["project"]["optional-dependencies"]), extras


def check_nox(words: Sequence[str]) -> None:
    functions = ast.parse((ROOT / "noxfile.py").read_text(encoding="utf-8")).body
    sessions = {function.name for function in functions if isinstance(function, ast.FunctionDef)}
    for word, following in zip(words, [*words[1:], ""], strict=True):
        assert word != "-s" or following in sessions, following


def check(words: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    program, rest = words[0], words[1:]
    if program == "python":
        check_python(rest, monkeypatch)
    elif program == "fastgpt":
        check_fastgpt(rest, monkeypatch)
    elif program == "pytest":
        check_pytest(rest)
    elif program == "pip":
        check_pip(rest)
    elif program == "nox":
        check_nox(rest)
    elif "/" in program:
        assert (ROOT / program).exists(), program
    else:
        assert program in SHELL, f"teach this test to check {program}"


ALL_BLOCKS = [block for document in DOCUMENTS for block in blocks(document)]


@pytest.mark.parametrize("block", ALL_BLOCKS, ids=lambda block: block.place)
def test_commands_have_flags_that_exist(block: Block, monkeypatch):
    commands = list(block.commands())
    assert commands
    for words in commands:
        check(words, monkeypatch)


def test_ci_finds_its_commands():
    named = {block.name for block in blocks(README)}
    used = set(re.findall(r"\$\(readme (\w+)\)", (ROOT / ".ci" / "run").read_text(encoding="utf-8")))
    assert used <= named


@pytest.mark.parametrize(
    ("command", "error"),
    [
        ("python -m fastgpt.train --no_such_flag 1", cli.UsageError),
        ("python -m fastgpt.train --max_iters many", cli.UsageError),
        ("python bench/report.py --no_such_flag", AssertionError),
        ("python -m fastgpt_kernels.aot --no_such_flag", (SystemExit, AssertionError)),
        ("python -m no_such_module", AssertionError),
        ("pytest -m no_such_marker", AssertionError),
        ("pytest no/such/file.py", AssertionError),
        ('pip install -e ".[no_such_extra]"', AssertionError),
        ("nox -s no_such_chore", AssertionError),
        ("no_such_program", AssertionError),
    ],
)
def test_the_check_finds_what_does_not_exist(command: str, error, monkeypatch):
    (words,) = Block(README, 1, command).commands()
    with pytest.raises(error):
        check(words, monkeypatch)


def test_commands_are_split_as_a_shell_does():
    text = "A=1 python -m x --a 'b c' \\\n  --d && y  # comment\n# only a comment\necho '{\"a\": 1}' > f | z\n"
    found = list(Block(README, 1, text).commands())
    assert found == [["python", "-m", "x", "--a", "b c", "--d"], ["y"], ["echo", '{"a": 1}'], ["z"]]


def test_the_walks_name_files_that_exist_and_at_most_three():
    text = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
    section = text[text.index("\n## To change something\n") :]
    rows = dict(re.findall(r"^\| ([^|]+?) \| (.*) \|$", section, re.M))
    files = {change: re.findall(r"\]\(([^)]+)\)", rows[change]) for change in CHANGES}
    assert {change for change, named in files.items() if not 1 <= len(named) <= 3} == set()
    assert [file for named in files.values() for file in named if not (ROOT / "docs" / file).is_file()] == []


def test_the_workflow_is_one():
    tool = Path(sys.executable).with_name("check-jsonschema")
    found = tool if tool.exists() else shutil.which("check-jsonschema")
    if not found:
        pytest.skip("needs check-jsonschema, of the extra dev")
    workflow = ROOT / ".github" / "workflows" / "ci.yml"
    schema = ["--builtin-schema", "vendor.github-workflows"]
    done = subprocess.run([str(found), *schema, str(workflow)], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "bash .ci/run" in workflow.read_text(encoding="utf-8")
