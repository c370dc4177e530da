"""The Markdown documents and their commands, and a runner for these commands.

    python -m tests.helpers.documents            # runs the commands of README and docs/ in a fresh clone
    python -m tests.helpers.documents kernels    # README's first commands, then those of docs/kernels.md

A block of commands is a fenced ```bash block. The line above it may be `<!-- ci: NAME -->`, which .ci/run reads, or
`<!-- not run: REASON -->`.
"""

import os
import re
import shlex
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[2]
README = ROOT / "README.md"
DOCS = sorted((ROOT / "docs").glob("*.md"))
DOCUMENTS = [README, ROOT / "CONTRIBUTING.md", *DOCS]
BLOCK = re.compile(
    r"(?:^<!-- (?P<mark>ci|not run): (?P<text>[^\n]*) -->\n)?^```bash\n(?P<commands>.*?)^```$", re.M | re.S
)
ENVIRONMENT = re.compile(r"[A-Z_]+=\S*")
NEEDED = ("train", "generate")  # README's blocks that the others build on
CHORES = ("lint", "test")  # README's blocks that are no use of the engine


@dataclass(frozen=True)
class Block:
    """Commands that stand together.

    Attributes:
        line: where the block begins, counted from 1.
        name: of `<!-- ci: NAME -->`.
        not_run: the reason of `<!-- not run: REASON -->`.
    """

    document: Path
    line: int
    text: str
    name: str | None = None
    not_run: str | None = None

    @property
    def place(self) -> str:
        return f"{self.document.name}:{self.line}"

    def commands(self) -> Iterator[list[str]]:
        """Each command's words, without variables before it, comments, and what follows a redirection."""
        for line in self.text.replace("\\\n", " ").splitlines():
            lexer = shlex.shlex(line, posix=True, punctuation_chars="|&>;")
            lexer.whitespace_split = True
            words: list[str] = []
            for word in [*lexer, ";"]:
                if word not in ("|", "&&", ";"):
                    words.append(word)
                    continue
                while words and ENVIRONMENT.fullmatch(words[0]):
                    words.pop(0)
                if words:
                    yield words[: words.index(">")] if ">" in words else words
                words = []


def blocks(document: Path) -> list[Block]:
    """The blocks of commands of a document."""
    text, found = document.read_text(encoding="utf-8"), []
    for match in BLOCK.finditer(text):
        line = text.count("\n", 0, match.start("commands")) + 1
        said = {"ci": "name", "not run": "not_run"}.get(match["mark"] or "")
        found.append(Block(document, line, match["commands"], **({said: match["text"]} if said else {})))
    return found


def run(block: Block, folder: Path) -> bool:
    """Run a block in a clone of the repository, and print how it went. False if it failed."""
    # The clone is on the path; to install it would replace the user's own installation.
    text = block.text.replace("pip install -e . && ", "")
    path = os.pathsep.join([str(folder), str(folder / "kernels")])
    env = os.environ | {"PYTHONPATH": path, "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"}
    began = time.monotonic()
    done = subprocess.run(
        ["bash", "-euo", "pipefail", "-c", text], cwd=folder, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    )
    print(
        f"{'ok    ' if done.returncode == 0 else 'FAILED'} {time.monotonic() - began:6.1f} s  {block.place}", flush=True
    )
    if done.returncode:
        print(done.stdout.decode(errors="replace")[-4000:])
    return done.returncode == 0


def main(names: Sequence[str]) -> int:
    documents = [path for path in (README, *DOCS) if not names or path.stem in names]
    chosen = [block for block in blocks(README) if block.name in NEEDED]
    chosen += [block for path in documents for block in blocks(path) if block.name not in (*NEEDED, *CHORES)]
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch) / "fastgpt"
        subprocess.run(["git", "clone", "-q", str(ROOT), str(folder)], check=True)
        failed = 0
        for block in chosen:
            if block.not_run is None:
                failed += not run(block, folder)
            else:
                print(f"not run            {block.place}: {block.not_run}")
    return min(failed, 1)


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
