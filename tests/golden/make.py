"""Writes aot.json beside this file: the registers of every compiled launch-table row, for the installed Triton.

    python tests/golden/make.py             compile now
    python tests/golden/make.py rows.json   take what `python -m fastgpt_kernels.aot --json > rows.json` wrote

Other Triton versions in the file stay as they are. Look at what changed (git diff) before committing it.
"""

import json
import subprocess
import sys
from pathlib import Path

import triton

FILE = Path(__file__).with_name("aot.json")


def main(rows: Path | None) -> None:
    if rows is None:
        command = [sys.executable, "-m", "fastgpt_kernels.aot", "--json"]
        text = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True).stdout
    else:
        text = rows.read_text(encoding="utf-8")
    versions = json.loads(FILE.read_text(encoding="utf-8")) if FILE.exists() else {}
    versions[triton.__version__] = {
        f"{row['target']} {row['kernel']} {row['config']}": row["registers"] for row in json.loads(text)
    }
    FILE.write_text(json.dumps(versions, indent=0, sort_keys=True) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else None)
