"""Writes aot.json beside this file: the registers of every compiled launch-table row, for the installed Triton.

    python tests/golden/make.py             compile now
    python tests/golden/make.py rows.json   take what `python -m fastgpt_kernels.aot --json > rows.json` wrote

    {"versions": ["3.6.0", ...], "TARGET KERNEL": {"CONFIG": [registers with 3.6.0, ...]}}

Numbers of other Triton versions stay as they are, null where a row is new to them; rows that are no longer in the
table go. Look at what changed (git diff) before committing it.
"""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import triton

FILE = Path(__file__).with_name("aot.json")


def merged(golden: dict[str, Any], version: str, rows: list[dict[str, Any]]) -> dict[str, Any]:
    """The file's content with this version's numbers replaced, or added."""
    old = golden.get("versions", [])
    versions = sorted({*old, version}, key=lambda name: [int(part) for part in name.split(".")])
    content: dict[str, Any] = {"versions": versions}
    for row in sorted(rows, key=lambda row: (row["target"], row["kernel"], row["config"])):
        group, config = f"{row['target']} {row['kernel']}", row["config"]
        known = dict(zip(old, golden.get(group, {}).get(config, []), strict=False))
        known[version] = row["registers"]
        content.setdefault(group, {})[config] = [known.get(name) for name in versions]
    return content


def text(content: dict[str, Any]) -> str:
    """JSON with a line for each row."""
    groups = [f'"versions": {json.dumps(content["versions"])}']
    for group, rows in content.items():
        if group != "versions":
            lines = ",\n".join(f" {json.dumps(config)}: {json.dumps(numbers)}" for config, numbers in rows.items())
            groups.append(f"{json.dumps(group)}: {{\n{lines}\n}}")
    return "{\n" + ",\n".join(groups) + "\n}\n"


def main(rows: Path | None) -> None:
    if rows is None:
        command = [sys.executable, "-m", "fastgpt_kernels.aot", "--json"]
        report = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True).stdout
    else:
        report = rows.read_text(encoding="utf-8")
    golden = json.loads(FILE.read_text(encoding="utf-8")) if FILE.exists() else {}
    FILE.write_text(text(merged(golden, triton.__version__, json.loads(report))), encoding="utf-8")


if __name__ == "__main__":
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else None)
