"""Shared by the tests of resumes: the run that is resumed, and refusals that lose nothing."""

import json
from pathlib import Path

from fastgpt.checkpoint import store
from tests.helpers.runs import contents, resume, run

HARDER = (
    "--dropout 0.2 --batch_size 2 --gradient_accumulation_steps 3 --warmup_iters 5 --lr_decay_iters 40 "
    "--eval_interval 10 --log_interval 4"
)


def start(flags: str, out_dir: str = "out") -> Path:
    return run(f"{HARDER} {flags}", out_dir)


def state_of(out_dir: Path) -> tuple:
    """Everything a run is, to the bit: weights, moments, state, and the losses of metrics.jsonl."""
    folder = store.find(out_dir, "latest")
    files = [(folder / name).read_bytes() for name in (store.MODEL, store.OPTIMIZER, store.STATE)]
    lines = [json.loads(line) for line in (out_dir / "metrics.jsonl").read_text().splitlines()]
    values = [
        (r["step"], key, r[key].hex()) for r in lines for key in ("loss", "grad_norm", "lr", "val_loss") if key in r
    ]
    return folder.name, files, values


def refused(capsys, flags: str = "--max_iters 9", *words: str) -> None:
    """A resume exits 2 with one line that has the words, and leaves the folder as it was."""
    before = contents(Path("out"))
    capsys.readouterr()
    assert resume(flags) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.count("error: ") == 1
    last = captured.err.splitlines()[-1]
    assert last.startswith("error: ")
    assert "Traceback" not in captured.err
    assert [word for word in words if word not in last] == [], last
    assert contents(Path("out")) == before
