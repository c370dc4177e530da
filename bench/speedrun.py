"""The speedruns: how fast a recipe gets to a loss that is fixed beforehand, or how far in a fixed time.

    python bench/speedrun.py shakespeare --corpus_file FILE     # time to a val loss of 1.88, beside nanoGPT's recipe
    python bench/speedrun.py pydocs                             # bits per byte after a minute of the first run's recipe
    python bench/speedrun.py fineweb --dataset DIR              # time to 3.28 with 124M parameters, for a GPU
    ... --leave_one_out --seeds 3                               # what each ingredient of the recipe is worth

The recipes are recipes/speedrun-*.toml and the preset modern-cpu. Each run has a process of its own; the entrants take
turns, seed by seed. Only steps are timed: neither the evaluation at the end nor the preparation. What the first step
takes longer is shown apart, compiling anew and with cached code. A board counts a recipe if the mean over its seeds is
below the mark with p < 0.01 (one-sided t-test), the rule of https://github.com/KellerJordan/modded-nanogpt. What is
printed is the result file; the runs go to a .jsonl beside it.
"""

import dataclasses
import json
import math
import os
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import mean
from typing import Any

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parents[1])  # the repository, where modules are named bench.*

from bench.tools.command_line import ROOT, Parser, count
from bench.tools.machine import cpu_instructions
from bench.tools.progress import commit_of
from bench.tools.race import Run, Settings, apart, mean_and_spread, p_below, table, train_engine
from fastgpt import cli
from fastgpt.config.training import PRESETS, TrainConfig
from fastgpt.errors import UsageError
from fastgpt.system import barriers

PROGRAM = "python bench/speedrun.py"
MOST_P = 0.01
SEED = 1337  # of the first run
PEER = "nanoGPT's recipe, plain PyTorch"
ENTRANTS: dict[str, Settings] = {"eager": {"compile": False}, "compiled": {"compile": True}}


@dataclass(frozen=True)
class Board:
    """A board of records.

    Attributes:
        recipe: a preset, or a file of recipes/.
        settings: what the board itself fixes.
        mark: the val loss to reach; None where the lowest bits per byte count.
        seconds: the most that the steps may take; None where the time itself counts.
        ingredients: what the recipe has, and the settings without it.
    """

    recipe: str
    settings: Settings
    ingredients: Mapping[str, Settings]
    mark: float | None = None
    seconds: float | None = None


TWO_THREADS = {"device": "cpu", "threads": 2}
# What both small recipes have. A replacement has about as many parameters, and AdamW the rate that served it best.
SHARED: dict[str, Settings] = {
    "Muon": {"optimizer": "adamw", "learning_rate": 2e-3},
    "the Polar Express": {"muon_method": "newton_schulz"},
    "rotary positions": {"position": "learned"},
    "query and key norms": {"qk_norm": False},
    "SwiGLU": {"mlp": "gelu", "n_inner": 384},
    "zero-initialised projections": {"zero_init": False},
    "a linear decay to zero": {"schedule": "cosine", "min_lr": None},
}
BOARDS = {
    "shakespeare": Board(
        "recipes/speedrun-shakespeare.toml",
        {"dataset": "shakespeare", **TWO_THREADS},
        {
            **SHARED,
            "an untied output layer": {"tie": True},
            "a momentum of 0.9": {"muon_momentum": 0.95, "muon_momentum_warmup": 60},
            "two layers, not four": {"n_layer": 4},
        },
        mark=1.88,
    ),
    "pydocs": Board(
        "modern-cpu",
        {"dataset": "pydocs", "max_iters": 1_000, **TWO_THREADS},
        {
            **SHARED,
            "a BPE": {"tokenizer": "char", "vocab_size": None},
            "dropout": {"dropout": 0.0},
            "weight decay": {"weight_decay": 0.0},
            "a tied output layer": {"tie": False},
        },
        seconds=60,
    ),
    "fineweb": Board("recipes/speedrun-fineweb.toml", {}, {}, mark=3.28),
}


def settings_of(board: Board, flags: Sequence[str]) -> dict[str, Any]:
    """All settings of a run on the board: the recipe's, the board's own, and those of the flags."""
    from fastgpt.training.start import of_preset

    start = ["--config", str(ROOT / board.recipe)] if board.recipe.endswith(".toml") else ["--preset", board.recipe]
    preset, given = cli.read(TrainConfig, [*start, *flags], prog=PROGRAM, description="", presets=PRESETS)
    given = {**board.settings, **given}
    return dict(vars(cli.change(of_preset(preset, given)[0], given)))


def entrants(board: Board, whole: Settings, leave_one_out: bool) -> dict[str, Settings]:
    """The settings of each of ours, by name."""
    if leave_one_out:
        without = {f"without {name}": {**whole, **less} for name, less in board.ingredients.items()}
        return {"the recipe": whole, **without}
    return {name: {**whole, **settings} for name, settings in ENTRANTS.items()}


def train_peer(seed: int, settings: Settings) -> Run:
    """nanoGPT's recipe on tiny Shakespeare, on as many threads."""
    import torch

    from bench.peers import nanogpt_recipe
    from fastgpt.data import corpus

    torch.set_num_threads(settings["threads"])
    names = ("dataset", "corpus_file", "data_dir")
    data = corpus.prepare(tokenizer="char", **{name: settings[name] for name in names if name in settings})
    done = nanogpt_recipe.train(data.train(), data.val(), data.tokenizer.vocab_size, seed)
    return Run(PEER, seed, done.steps, done.tokens, done.seconds, 0.0, done.val_loss)


def runs(board: Board, ours: Mapping[str, Settings], seeds: Sequence[int], peer: Settings | None) -> Iterator[Run]:
    """Every entrant's run, seed by seed."""
    for seed in seeds:
        for name, settings in ours.items():
            yield apart(train_engine, name, settings, seed)
        if peer is not None:
            yield apart(train_peer, seed, peer)


@dataclass(frozen=True)
class Standing:
    """An entrant's runs, in the order in which they ran."""

    board: Board
    runs: Sequence[Run]

    @property
    def scores(self) -> list[float]:
        """Of each run, the val loss, or bits per byte where the board has no mark."""
        return [run.val_loss if self.board.mark else run.bits_per_byte or math.nan for run in self.runs]

    @property
    def p(self) -> float | None:
        """The p-value of the mean val loss being below the mark."""
        return p_below(self.scores, self.board.mark) if self.board.mark else None

    @property
    def seconds(self) -> float:
        """In steps, on average."""
        return mean([run.seconds for run in self.runs])

    @property
    def compiling(self) -> float:
        """Seconds of the first step in the first run, which finds nothing compiled."""
        return self.runs[0].first

    @property
    def cached(self) -> float:
        """Seconds of the first step in the later runs, which find what the first one compiled."""
        return mean([run.first for run in self.runs[1:]] or [self.compiling])


def report(board: Board, found: Sequence[Run]) -> str:
    """The table of the entrants, and what it means for the board."""
    names = dict.fromkeys(run.entrant for run in found)
    standings = {name: Standing(board, [run for run in found if run.entrant == name]) for name in names}
    first, rows = next(iter(standings.values())), []
    for name, one in standings.items():
        score, spread = mean_and_spread(one.scores)
        rows.append(
            [
                name,
                f"{one.runs[0].steps:,}",
                f"{one.runs[0].tokens:,}",
                f"{score:.4f} ± {spread:.4f}",
                f"{score - mean(first.scores):+.4f}",
                "" if one.p is None else f"{one.p:.2g}",
                *(f"{seconds:.1f}" for seconds in (one.seconds, one.compiling, one.cached, one.seconds + one.cached)),
            ]
        )
    what = "val loss" if board.mark else "bits per byte"
    times = ["s in steps", "s compiling", "s cached", "s together"]
    head = ["entrant", "steps", "tokens", what, "against first", "p", *times]
    return "\n\n".join([table(head, rows), *conclusions(board, standings)])


def conclusions(board: Board, standings: Mapping[str, Standing]) -> Iterator[str]:
    """Sentences on each entrant that the board judges: a recipe without an ingredient is none."""
    peer = standings.get(PEER)
    for name, one in standings.items():
        if name not in ENTRANTS:
            continue
        if board.mark:
            counts = one.p is not None and one.p < MOST_P
            yield f"{name}: {'counts' if counts else 'does not count'}: mean below {board.mark} with p < {MOST_P}"
        if board.seconds:
            yield f"{name}: {one.seconds:.1f} s of at most {board.seconds:g} s in steps"
        if peer:
            yield (
                f"{name}: {peer.seconds / one.seconds:.2f}x less time in steps than {PEER}, "
                f"{peer.seconds / (one.seconds + one.cached):.2f}x with the first step of cached code, "
                f"{peer.runs[0].tokens / one.runs[0].tokens:.2f}x fewer tokens"
            )


def facts(found: Iterable[Run]) -> str:
    """The machine, the versions and the day."""
    import torch

    from fastgpt.system.device import describe, resolve_device

    device = resolve_device("auto")
    return (
        f"{describe(device)}, {cpu_instructions()}; torch {torch.__version__}; "
        f"{time.strftime('%Y-%m-%d')}, commit {commit_of(ROOT)}; seeds {sorted({run.seed for run in found})}"
    )


def main(argv: Sequence[str] | None = None) -> int:
    parser = Parser(prog=PROGRAM, description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("board", choices=BOARDS)
    parser.add_argument("--seeds", type=count, default=5, help="runs of each entrant; default 5")
    parser.add_argument("--leave_one_out", action="store_true", help="the recipe without each of its ingredients")
    parser.add_argument("--only", metavar="NAME", help="one entrant: eager, compiled, or an ingredient left out")
    parser.add_argument("--no_peer", action="store_true", help="without nanoGPT's recipe")
    parser.add_argument("--out", metavar="DIR", type=Path, help="write the result files there; default: print alone")
    flags, rest = parser.parse_known_args(argv)
    board = BOARDS[flags.board]
    whole = settings_of(board, rest)
    ours = entrants(board, whole, flags.leave_one_out)
    if flags.only:
        if flags.only not in ours:
            raise UsageError(f"--only {flags.only!r} is not one of {', '.join(ours)}")
        ours = {flags.only: ours[flags.only]}
    with_peer = flags.board == "shakespeare" and not (flags.no_peer or flags.leave_one_out)
    found: list[Run] = []
    with tempfile.TemporaryDirectory() as folder:
        os.environ["TORCHINDUCTOR_CACHE_DIR"] = folder  # so that the first compiled run compiles
        for run in runs(board, ours, range(SEED, SEED + flags.seeds), whole if with_peer else None):
            found.append(run)
            (score,) = Standing(board, [run]).scores
            print(f"{run.entrant}, seed {run.seed}: {score:.4f} in {run.seconds:.1f} s", file=sys.stderr, flush=True)
    text = f"{flags.board}: {facts(found)}\n\n{report(board, found)}\n"
    print(text, end="")
    if flags.out:
        write(flags.out, flags.board + ("-leave-one-out" if flags.leave_one_out else ""), text, found)
    return 0


def write(folder: Path, name: str, text: str, found: Iterable[Run]) -> None:
    """Write the printed text, and every run as a line of JSON."""
    stem = folder / f"{time.strftime('%Y-%m-%d')}-{commit_of(ROOT)}-speedrun-{name}"
    stem.with_suffix(".txt").write_text(text, encoding="utf-8")
    lines = "".join(json.dumps(dataclasses.asdict(run)) + "\n" for run in found)
    stem.with_suffix(".jsonl").write_text(lines, encoding="utf-8")


if __name__ == "__main__":
    barriers.choose(sys.argv)  # before PyTorch is imported, here and in the processes that inherit the environment
    raise SystemExit(cli.run(main))
