"""Prepares a run: its settings become data, device, operations and model, and its folder is opened."""

import dataclasses
import functools
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from fastgpt.checkpoint import run_folder, store
from fastgpt.checkpoint.source import Source, open_model
from fastgpt.config.training import TrainConfig
from fastgpt.data import corpus, loader, packing
from fastgpt.data.corpus import Corpus, Unprepared
from fastgpt.data.loader import Loader, MicroBatches
from fastgpt.errors import UsageError
from fastgpt.evaluation import loss as evaluation_loss
from fastgpt.evaluation.loss import EvaluationSet
from fastgpt.model import memory, workloads
from fastgpt.ops import autotune, table
from fastgpt.ops.table import Ops
from fastgpt.system import threads
from fastgpt.system.device import resolve_device, resolve_dtype
from fastgpt.tokenizer.base import Tokenizer
from fastgpt.training.log import RunLog
from fastgpt.training.state import TrainingState


@dataclass(frozen=True)
class Machine:
    """The device, the arithmetic and the threads of a run.

    Attributes:
        dtype: of the matrix products.
        threads: CPU threads that compute.
        resolve: `table.resolve` for this device.
    """

    device: torch.device
    dtype: torch.dtype
    threads: int
    resolve: Callable[..., Ops]


@dataclass(frozen=True)
class Setup:
    """The parts of a run.

    Attributes:
        config: its settings, with the vocabulary's size and the choice of `pack`.
        asked: the settings that config.json records: as they were given, with absolute paths.
        dtype: of the matrix products.
        threads: CPU threads that compute.
        own_vocabulary: the text is read with the run's vocabulary, not its own: it was allowed to change, or the
            vocabulary came with the weights that the run started from.
        reading: the rules by which the text is read, see `corpus.READING`.
        evaluation: the part of the val split that evaluations read.
        state: the model, what trains it, and the progress.
        started_from: the model whose weights the run began with, by the name that was given; None for random ones.
    """

    config: TrainConfig
    asked: TrainConfig
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
    started_from: str | None

    @property
    def out_dir(self) -> Path:
        return Path(self.config.out_dir)

    def save(self) -> None:
        """Write config.json and tokenizer.json into the run's folder."""
        run_folder.save(
            self.out_dir,
            self.asked,
            self.data.tokenizer,
            {
                "columns": self.state.model.ops.backends,
                "device": self.device.type,
                "dtype": str(self.dtype).removeprefix("torch."),
                "threads": self.threads,
                "pack": self.config.pack,
                "corpus": {
                    "name": self.data.name,
                    "source_sha256": self.data.source_sha256,
                    "own_vocabulary": self.own_vocabulary,
                    "reading": self.reading,
                },
                "evaluation": {"windows": self.evaluation.windows, "batch_size": self.evaluation.batch_size},
                "torch": torch.__version__,
                **({run_folder.STARTED_FROM: self.started_from} if self.started_from else {}),
            },
        )


def prepare(config: TrainConfig, source: Source | None = None) -> Setup:
    """Make what the run needs, without writing into its folder; a resumed run keeps the choices that it recorded.

    Args:
        source: the model that `init_from` names, if it is open already.

    Raises:
        UsageError: the settings, the data, the machine or the folder make the run impossible.
    """
    resolve_device(config.device)  # a wrong one is refused before the folder is looked at
    saved, about = _record(config)
    if config.resuming:
        config = run_folder.relocated(Path(config.out_dir), config)
    asked = run_folder.anchored(config)
    machine = choose_machine(config, about)
    source = open_source(config, source)
    vocabulary = _own_vocabulary(config, about, source)
    reading = run_folder.reading(about) if config.resuming else corpus.READING
    data = corpus.prepare(**data_settings(config), vocabulary=vocabulary, reading=reading)
    config = _resumed(config, data, about) if config.resuming else fitted(config, data, source)
    train_loader, val_loader = loader.loaders(data, config, machine.device)
    memory.check_training(config, machine.device)
    ops = machine.resolve(choose=autotune.chooser(workloads.training(config, machine.dtype)))
    evaluation, unnamed = _evaluation_set(config, data, saved, about.get("evaluation", {}))
    return Setup(
        config,
        asked,
        machine.device,
        machine.dtype,
        machine.threads,
        data,
        vocabulary is not None,
        reading,
        MicroBatches(train_loader, config.batch_size, config.gradient_accumulation_steps),
        val_loader,
        evaluation,
        TrainingState(config, ops, data, machine.device, machine.dtype, evaluation.identity, unnamed, source),
        config.init_from if config.imports else about.get(run_folder.STARTED_FROM),
    )


def _record(config: TrainConfig) -> tuple[TrainConfig, dict[str, Any]]:
    """The settings and the config.json of the run that is resumed; for a new run, its own settings and nothing.

    Raises:
        UsageError: there is no such run or checkpoint, or the folder of a new run is taken.
    """
    out_dir = Path(config.out_dir)
    if not config.resuming:
        run_folder.claim(out_dir, config.overwrite)
        return config, {}
    store.require(out_dir)
    run_folder.named_step(out_dir, config.init_from)
    return run_folder.load(out_dir)


def open_source(config: TrainConfig, opened: Source | None = None) -> Source | None:
    """The model whose weights a new run starts from; None for random ones, and for a resume.

    Args:
        opened: the same, if it is open already: its weights' hashes are not checked again.

    Raises:
        UsageError: there is no such model, or `overwrite` would delete it.
    """
    if not config.imports:
        return None
    source = opened or open_model(config.init_from, download=config.download, setting="init_from")
    if source.step and source.path.resolve() == Path(config.out_dir).resolve():  # rollbacks may read it again
        raise UsageError(
            f"`overwrite` deletes the run that `init_from` {config.init_from} starts from; name another `out_dir`"
        )
    return source


def data_settings(config: TrainConfig) -> dict[str, Any]:
    """The settings by which `corpus.prepare` and `corpus.find` look for the data."""
    names = ("dataset", "tokenizer", "vocab_size", "corpus_file", "gpt2_vocab", "data_dir")
    return {name: getattr(config, name) for name in names}


def fitted(config: TrainConfig, data: Corpus | Unprepared, source: Source | None) -> TrainConfig:
    """The settings of a new run with its vocabulary's size and the choice of `pack`.

    For a text that is not tokenized yet, everything is checked that its statistics tell.

    Raises:
        UsageError: the data does not fit the settings, or the model that the run starts from.
    """
    if isinstance(data, Unprepared):
        data.check_characters()
    elif source and source.tokenizer not in (None, data.tokenizer):
        raise UsageError(
            f"`dataset` {config.dataset}: its vocabulary is not that of `init_from` {config.init_from}; "
            "give `dataset` the text itself"
        )
    size = data.vocab_size if isinstance(data, Unprepared) else data.tokenizer.vocab_size
    config = dataclasses.replace(config, vocab_size=size, pack=packing.chosen(config.pack, data))
    if source:
        source.weights(config)
    loader.check_length(data, config.block_size)
    return config


def _own_vocabulary(config: TrainConfig, about: Mapping[str, Any], source: Source | None) -> Tokenizer | None:
    """The vocabulary by which the text is read instead of its own; None where there is none."""
    if source:
        return source.tokenizer
    if config.resuming and (config.allow_data_change or about.get("corpus", {}).get("own_vocabulary")):
        return run_folder.vocabulary(Path(config.out_dir))
    return None


def _resumed(config: TrainConfig, data: Corpus, about: Mapping[str, Any]) -> TrainConfig:
    """The settings of a resumed run with its vocabulary's size and its choice of `pack`. Raises as `check_resume`."""
    run_folder.check_resume(Path(config.out_dir), config, data)
    return dataclasses.replace(config, vocab_size=data.tokenizer.vocab_size, pack=run_folder.packed(about))


def choose_machine(config: TrainConfig, about: Mapping[str, Any] | None = None) -> Machine:
    """The device, the arithmetic and the threads of the settings; from here on this process computes with the threads.

    Args:
        about: the config.json of a resumed run, whose choices are kept.

    Raises:
        UsageError: this machine lacks one of them.
    """
    device, about = resolve_device(config.device), about or {}
    choices = about if about.get("device") == device.type else {}  # those of another device do not apply
    count = _use_threads(config, device, choices.get("threads"))
    resolve = functools.partial(table.resolve, config.kernels, device, recorded=choices.get("columns"))
    asked = choices.get("dtype", "auto") if config.dtype == "auto" else config.dtype
    dtype = resolve_dtype(asked, device, interpreted=resolve().interpreted)
    return Machine(device, dtype, count, resolve)


def open_folder(setup: Setup, log: RunLog) -> None:
    """Take the run's folder, which this process owns by now: restore what is resumed, or make room for a new run.

    Raises:
        UsageError: there is nothing to resume, or the folder cannot be written.
    """
    out_dir, config, state = setup.out_dir, setup.config, setup.state
    resumed = _restore(setup) if config.resuming else None
    if not resumed:
        run_folder.claim(out_dir, config.overwrite)
    run_folder.check_disk(out_dir, config, state.model.num_parameters(), state.progress.step)
    if config.overwrite:
        run_folder.delete(out_dir)
    with run_folder.explained(out_dir):
        if resumed:
            store.point_best(out_dir, state.progress.best_step)  # a crash may have come before `latest` was written
            store.point(out_dir, "latest", resumed)  # newer checkpoints no longer count
        log.start(state.progress)


def _restore(setup: Setup) -> Path:
    """Load the newest whole checkpoint, or the one that `init_from` names; its folder."""
    out_dir, config, state = setup.out_dir, setup.config, setup.state
    folder = run_folder.named_step(out_dir, config.init_from)
    if folder is None:
        folder = store.newest_intact(out_dir, functools.partial(print, file=sys.stderr))
    else:
        store.verify(folder)
    state.load(folder)
    step = state.progress.step
    if step > config.max_iters or state.is_finished:
        raise UsageError(
            f"`max_iters` {config.max_iters}: {out_dir} is already at step {step}; "
            f"continue with a larger one, such as `max_iters` {2 * step}"
        )
    return folder


def _use_threads(config: TrainConfig, device: torch.device, recorded: int | None) -> int:
    """Compute with as many threads as `threads` says.

    Args:
        recorded: how many the run had on this device before.
    """
    count = threads.use(config.threads, recorded)
    if device.type == "cpu" and recorded not in (None, count):
        print(
            f"going on with `threads` {count}, where the run had {recorded}: floats are summed in another order, "
            "so bits may differ",
            file=sys.stderr,
        )
    return count


def _evaluation_set(
    config: TrainConfig, data: Corpus, saved: TrainConfig, recorded: Mapping[str, Any]
) -> tuple[EvaluationSet, str]:
    """The recorded evaluation set or, if its settings changed, that of the new ones.

    Args:
        saved: the settings that the record was made with.

    Returns:
        The set, and the identity of that of checkpoints that do not name theirs, which older versions wrote.
    """
    chosen = EvaluationSet.of(config, data, recorded.get("batch_size", saved.batch_size))
    if "windows" in recorded and saved.eval_iters == config.eval_iters:
        chosen = dataclasses.replace(chosen, windows=recorded["windows"])
    # Older versions drew their windows at random, except of the whole split.
    whole = not recorded and not evaluation_loss.plan(saved.eval_iters, data.val_tokens)
    return chosen, dataclasses.replace(chosen, windows=0).identity if whole else "windows drawn at random"
