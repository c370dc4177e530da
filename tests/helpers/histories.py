"""Made records of runs: curves such as a healthy run has, which tests change, in the folder of a run."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from fastgpt.config.training import TrainConfig
from fastgpt.inspection.history import History

STEPS = np.arange(10, 1501, 10)
SETTINGS = {"learning_rate": 1e-3, "grad_clip": 1.0, "max_iters": 1500, "warmup_iters": 100, "n_layer": 6}
Change = Callable[[np.ndarray], np.ndarray]


def healthy(**changes: Change | np.ndarray) -> list[dict[str, Any]]:
    """The records of a run like one of tiny Shakespeare: 150 with a train loss, and a val loss at every 15th.

    Args:
        changes: other values of a curve (150,): an array, or a function of its steps (150,); NaN leaves a record out.
    """
    noise = np.random.default_rng(5)
    fall = 1.45 + 0.75 * np.exp(-STEPS / 700) + 1.5 * np.exp(-STEPS / 40)
    rate = np.where(STEPS < 100, STEPS / 100, 0.55 + 0.45 * np.cos(np.pi * (STEPS - 100) / 1400)) * 1e-3
    curves = {
        "loss": fall + noise.normal(0, 0.03, STEPS.size),
        "val_loss": np.where(STEPS % 150 == 0, fall + 0.1, np.nan),
        "lr": rate,
        "grad_norm": noise.uniform(0.75, 1.3, STEPS.size),
        "tokens_per_second": noise.normal(6400, 150, STEPS.size),
    }
    curves |= {key: change(STEPS) if callable(change) else change for key, change in changes.items()}
    records = []
    for at, step in enumerate(STEPS.tolist()):
        record = {key: float(curve[at]) for key, curve in curves.items() if key != "val_loss"}
        place = {"step": step, "tokens": step * 2048, "seconds": step * 0.33}
        records.append(place | {k: v for k, v in record.items() if v == v} | {"ms": 2048e3 / 6400})
        if not np.isnan(curves["val_loss"][at]):
            records.append(place | {"val_loss": float(curves["val_loss"][at])})
    return records


def history(records: list[dict[str, Any]], **settings: Any) -> History:
    """The records as a run with the usual settings, changed by some."""
    return History(Path("made"), records, SETTINGS | settings)


def write(folder: Path, records: list[dict[str, Any]], **settings: Any) -> Path:
    """A run's folder with these records and settings, and nothing else."""
    folder.mkdir(parents=True)
    known = {"out_dir": str(folder), "dataset": TrainConfig.dataset} | SETTINGS | settings
    (folder / "config.json").write_text(json.dumps({"format": 1, "config": known}), encoding="utf-8")
    (folder / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    return folder
