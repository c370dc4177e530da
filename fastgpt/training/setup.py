"""Prepares a run: its settings, data, backends and state, before anything is written into its folder.

corpus -> loaders -> backends -> model and optimizer
"""

import dataclasses
import functools
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from fastgpt.checkpoint import run_folder, store
from fastgpt.checkpoint.progress import Progress
from fastgpt.config.training import TrainConfig
from fastgpt.data import corpus, loader
from fastgpt.data.loader import Loader, MicroBatches
from fastgpt.data.prepared import Corpus
from fastgpt.errors import UsageError
from fastgpt.evaluation import loss as evaluation_loss
from fastgpt.evaluation.loss import EvaluationSet
from fastgpt.loggers.jsonl import MetricsFile
from fastgpt.model import memory
from fastgpt.ops import autotune, table
from fastgpt.ops.workload import Workload
from fastgpt.system import threads
from fastgpt.system.device import resolve_device, resolve_dtype
from fastgpt.system.files import regular
from fastgpt.training.state import TrainingState


@dataclass(frozen=True)
class Setup:
    """What a run is made of.

    Attributes:
        config: its settings, with the size of its vocabulary.
        asked: its settings as they are saved: as they were given, with absolute paths.
        own_vocabulary: the text changed, and is read with the run's vocabulary.
        reading: how files become a text; see `corpus.READING`.
    """

    config: TrainConfig
    asked: TrainConfig
    out_dir: Path
    device: torch.device
    dtype: torch.dtype
    threads: int
    data: Corpus
    own_vocabulary: bool
    reading: int
    micro_batches: MicroBatches
    val_loader: Loader
    evaluation: EvaluationSet
    state: TrainingState

    @property
    def progress(self) -> Progress:
        return self.state.progress

    def save(self) -> None:
        """Write what the run is made of into its folder, for a resume and for generation."""
        about: dict[str, Any] = {
            "columns": self.state.ops.backends,  # the name that the first version gave them
            "device": self.device.type,
            "dtype": str(self.dtype).removeprefix("torch."),
            "threads": self.threads,
            "corpus": {
                "name": self.data.name,
                "source_sha256": self.data.source_sha256,
                "own_vocabulary": self.own_vocabulary,
                "reading": self.reading,
            },
            "evaluation": {"windows": self.evaluation.windows, "batch_size": self.evaluation.batch_size},
            "torch": torch.__version__,
        }
        run_folder.save(self.out_dir, self.asked, self.data.tokenizer, about)


def prepare(config: TrainConfig) -> Setup:
    """Make all that the run needs. A run that is continued keeps what it recorded: threads, dtype, backends, text.

    Raises:
        UsageError: the settings, the data, the machine or the folder make the run impossible.
    """
    resuming, out_dir, device = config.resuming, Path(config.out_dir), resolve_device(config.device)
    if resuming:
        store.require(out_dir)
        run_folder.named_step(out_dir, config.init_from)
    else:
        run_folder.claim(out_dir, config.overwrite)
    saved, about = run_folder.load(out_dir) if resuming else (config, {})
    if resuming:
        config = run_folder.relocated(out_dir, config)
    asked = run_folder.anchored(config)
    recorded = about if about.get("device") == device.type else {}  # on another device the choices are made anew
    thread_count = _use_threads(asked.threads, recorded.get("threads"), device)
    resolve = functools.partial(table.resolve, config.kernels, device, recorded=recorded.get("columns"))
    dtype = recorded.get("dtype", "auto") if config.dtype == "auto" else config.dtype
    dtype = resolve_dtype(dtype, device, interpreted=resolve().interpreted)
    # A text that was allowed to change is read with the run's vocabulary, from then on.
    changed = config.allow_data_change or about.get("corpus", {}).get("own_vocabulary")
    own_vocabulary = bool(resuming and changed)
    reading = run_folder.reading(about) if resuming else corpus.READING
    data = corpus.prepare(
        config.dataset,
        tokenizer=config.tokenizer,
        vocab_size=config.vocab_size,
        corpus_file=config.corpus_file,
        gpt2_vocab=config.gpt2_vocab,
        vocabulary=run_folder.vocabulary(out_dir) if own_vocabulary else None,
        data_dir=config.data_dir,
        reading=reading,
    )
    if resuming:
        run_folder.check_resume(out_dir, config, data)
    config = dataclasses.replace(config, vocab_size=data.tokenizer.vocab_size)
    train_loader, val_loader = loader.loaders(data, config, device)
    memory.check_training(config, device)
    ops = resolve(choose=autotune.chooser(Workload.of_training(config, dtype)))
    evaluation, unnamed = _evaluation_set(config, data, saved, about.get("evaluation", {}))
    return Setup(
        config=config,
        asked=asked,
        out_dir=out_dir,
        device=device,
        dtype=dtype,
        threads=thread_count,
        data=data,
        own_vocabulary=own_vocabulary,
        reading=reading,
        micro_batches=MicroBatches(train_loader, config.batch_size, config.gradient_accumulation_steps),
        val_loader=val_loader,
        evaluation=evaluation,
        state=TrainingState(config, ops, data, device, dtype, evaluation.identity, unnamed),
    )


def take_folder(setup: Setup) -> MetricsFile:
    """Make a locked folder ready for the run: load what is resumed, or make room for what is new.

    Raises:
        UsageError: it is another run's, it is finished, or the disk has no room.
    """
    config, out_dir = setup.config, setup.out_dir
    metrics = out_dir / "metrics.jsonl"
    with run_folder.explained(out_dir):
        regular(metrics)  # before anything changes: to open a pipe would take for ever
    resumed = _resume(setup) if config.resuming else None
    if not resumed:
        run_folder.claim(out_dir, config.overwrite)
    run_folder.check_disk(out_dir, config, setup.state.model.num_parameters(), setup.progress.step)
    if config.overwrite:
        run_folder.delete(out_dir)
    with run_folder.explained(out_dir):
        if resumed:
            store.point_best(out_dir, setup.progress.best_step)  # a crash may have come before `latest`
            store.point(out_dir, "latest", resumed)  # newer checkpoints no longer count
        return MetricsFile(metrics, setup.progress)


def _resume(setup: Setup) -> Path:
    """Load the newest checkpoint that is whole, or the one that `init_from` names; its folder."""
    config, out_dir = setup.config, setup.out_dir
    folder = run_folder.named_step(out_dir, config.init_from)
    if folder is None:
        folder = store.newest_intact(out_dir, functools.partial(print, file=sys.stderr))
    else:
        store.verify(folder)
    setup.state.load(folder)
    step = setup.progress.step
    if step > config.max_iters or setup.state.is_finished():
        raise UsageError(
            f"`max_iters` {config.max_iters}: {out_dir} is already at step {step}; "
            f"continue with a larger one, such as `max_iters` {2 * step}"
        )
    return folder


def _use_threads(asked: int | None, recorded: int | None, device: torch.device) -> int:
    """Compute with as many threads as were asked for, or as the run did on this device so far."""
    count = threads.use(asked, recorded)
    if device.type == "cpu" and recorded not in (None, count):
        print(
            f"going on with `threads` {count}, where the run had {recorded}: floats are summed in another order, "
            "so bits may differ",
            file=sys.stderr,
        )
    return count


def _evaluation_set(
    config: TrainConfig, data: Corpus, saved: TrainConfig, recorded: Mapping[str, int]
) -> tuple[EvaluationSet, str]:
    """The recorded evaluation set, or that of new settings; and the identity of one that an older version had.

    Args:
        saved: the configuration that the record was made with.
    """
    chosen = EvaluationSet.of(config, data, recorded.get("batch_size", saved.batch_size))
    if "windows" in recorded and saved.eval_iters == config.eval_iters:
        chosen = dataclasses.replace(chosen, windows=recorded["windows"])
    # Those of older versions drew their windows at random, except of the whole split.
    whole = not recorded and not evaluation_loss.plan(saved.eval_iters, data.val_tokens)
    return chosen, dataclasses.replace(chosen, windows=0).identity if whole else "windows drawn at random"
