"""Train a GPT.

    python -m fastgpt.train                                       # fits the machine, about a minute on a CPU
    python -m fastgpt.train --preset baby --dataset shakespeare
    python -m fastgpt.train --init_from resume --max_iters 4000

The run itself is in `fastgpt.run`.
"""

import dataclasses
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

if __name__ == "__main__":
    from fastgpt import barriers

    barriers.choose(sys.argv)  # before PyTorch is imported

from fastgpt import checkpoint, cli, foreign, memory_need, run_folder, signals, threads
from fastgpt.config import PRESETS, USUAL_WARMUP, TrainConfig, validate, validate_fields
from fastgpt.device import is_out_of_memory, resolve_device
from fastgpt.errors import RunFailed, UsageError
from fastgpt.report import RunSummary
from fastgpt.run import Run
from fastgpt.signals import Signals


def train(config: TrainConfig) -> RunSummary:
    """Train, or continue, the run that the configuration describes.

    Raises:
        UsageError: anything in the flags, the data or the folder that makes the run impossible; nothing was lost.
        RunFailed: the run cannot go on; what it had saved is there.
    """
    validate_fields(TrainConfig, vars(config))
    if config.resuming:
        run_folder.mend(Path(config.out_dir))
    validate(config)
    if config.warmup_iters is None:
        config = with_warmup(config)
    run_folder.check_free(Path(config.out_dir))
    try:
        with threads.restored(), Signals(patient=False) as noted:
            run = Run(config)
            with run_folder.locked(run.out_dir):
                run.open()
                return run.train(noted)
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        # In an update, for one, and then half of the weights may have changed: nothing is saved.
        raise RunFailed(memory_need.lacking("outside of forward and backward passes", config, error)) from None


def starting_point(preset: str | None, given: Mapping[str, object]) -> tuple[TrainConfig, str]:
    """The configuration that the given flags change, and why it is this one.

    A run that is continued keeps its own settings; otherwise it is the named preset, or the one that fits the device.
    """
    init_from = str(given.get("init_from", "scratch"))
    asked = TrainConfig(init_from=init_from)
    if asked.resuming:
        by_path = init_from != "resume"
        out_dir = str(given.get("out_dir", Path(init_from).parent if by_path else "out"))
        run_folder.check_free(Path(out_dir))
        run_folder.mend(Path(out_dir))
        validate(asked)
        if preset is not None:
            raise UsageError(f"--preset {preset}: --init_from {init_from} keeps the run's own settings; leave it out")
        if by_path:
            run_folder.named_step(Path(out_dir), init_from)
        checkpoint.require(Path(out_dir))
        saved, _ = run_folder.load(Path(out_dir))
        why = f"resume: the settings of the run in {out_dir}, changed by what was given"
        return dataclasses.replace(saved, out_dir=out_dir), why
    kind = resolve_device(str(given.get("device", "auto"))).type
    fitting = "baby" if kind == "cuda" else "cpu"
    why = f"preset {preset}" if preset else f"preset {fitting}: it fits a {kind} device (others: --preset NAME)"
    config = PRESETS[preset or fitting]
    if asked.imports:
        shape = foreign.load(init_from).shape
        config = dataclasses.replace(config, **vars(shape) | {"vocab_size": None})
        why += f"; the model's shape is that of {init_from}"
    # Another tokenizer than the preset's brings its own vocabulary.
    return (dataclasses.replace(config, vocab_size=None) if "tokenizer" in given else config), why


def with_warmup(config: TrainConfig) -> TrainConfig:
    """Cap a warm-up that nobody asked for at a tenth of the run, and say so.

    The number becomes a part of the run's settings, so that a resume has the same schedule.
    """
    usual = USUAL_WARMUP if config.warmup_iters is None else config.warmup_iters
    steps = min(usual, config.max_iters // 10)
    if steps < usual:
        print(
            f"the warm-up takes {steps} of the {config.max_iters} steps, a tenth, and not {usual}; "
            "--warmup_iters sets another number",
            file=sys.stderr,
        )
    return dataclasses.replace(config, warmup_iters=steps)


def main(argv: Sequence[str] | None = None) -> int:
    signals.ignore_saving()
    preset, given = cli.read(
        TrainConfig, argv, prog="python -m fastgpt.train", description="Train a GPT on text.", presets=PRESETS
    )
    start, why = starting_point(preset, given)
    config = cli.change(start, given)
    print(why, file=sys.stderr)
    if not config.resuming and "warmup_iters" not in given:
        config = with_warmup(config)
    summary = train(config)
    if summary.failures:
        return 1
    return 0 if summary.stopped_by is None else 128 + summary.stopped_by


if __name__ == "__main__":
    raise SystemExit(cli.run(main))
