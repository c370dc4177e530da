"""Paths of the repository."""

from pathlib import Path

ROOT = Path(__file__).parents[2]
GOLDEN = ROOT / "tests" / "golden"
SHAKESPEARE = ROOT.parent / "shared" / "data" / "tinyshakespeare.txt"  # not part of the repository
