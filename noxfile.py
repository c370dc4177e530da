"""The project's chores, each the command that README or docs/ has: `nox --list`, `nox -s tests`.

They run in the environment that is active, and words after `--` are added to a command: `nox -s tests -- -x`.
"""

import re
import shlex
from pathlib import Path

import nox

nox.options.default_venv_backend = "none"
nox.options.sessions = ["lint", "tests"]


def readme(name: str) -> str:
    """The commands that follow the marker <!-- ci: NAME --> in README.md."""
    text = Path("README.md").read_text(encoding="utf-8")
    block = re.search(rf"<!-- ci: {name} -->\n```bash\n(.*?)```", text, re.DOTALL)
    if block is None:
        raise ValueError(f"README.md has no commands marked {name}")
    return block[1].strip()


def shell(session: nox.Session, command: str) -> None:
    words = shlex.join(session.posargs)
    session.run("bash", "-euo", "pipefail", "-c", f"{command} {words}", external=True)


@nox.session
def tests(session: nox.Session) -> None:
    """The default tests: README's command."""
    shell(session, readme("test"))


@nox.session
def slow(session: nox.Session) -> None:
    """The tests that take long."""
    shell(session, "pytest -n auto --dist loadfile -m slow")


@nox.session
def peers(session: nox.Session) -> None:
    """The tests against other libraries, which it installs."""
    session.run("pip", "install", "-e", ".[peers]", external=True)
    shell(session, "pytest -n auto --dist loadfile -m peers")


@nox.session
def gate(session: nox.Session) -> None:
    """Compiles every row of the launch table and checks what came out."""
    shell(session, 'pytest -n auto --dist loadfile -m "slow or not slow" -k test_aot')


@nox.session
def lint(session: nox.Session) -> None:
    """The linters: README's command."""
    shell(session, readme("lint"))


@nox.session
def bench(session: nox.Session) -> None:
    """The benchmarks, against the peers that are installed."""
    shell(session, "pytest bench/ --benchmark-only")


@nox.session
def docs(session: nox.Session) -> None:
    """Runs every command of README and docs/ in a fresh clone."""
    shell(session, "python -m tests.helpers.documents")
