"""The state of a run, which checkpoints hold: the model, what trains it, and the progress."""

import dataclasses
from pathlib import Path

import torch

from fastgpt.checkpoint import progress, store
from fastgpt.checkpoint.progress import Progress
from fastgpt.checkpoint.source import Source
from fastgpt.checkpoint.store import Snapshot
from fastgpt.config.training import TrainConfig
from fastgpt.data import packing
from fastgpt.data.prepared import Corpus
from fastgpt.errors import CorruptCheckpoint
from fastgpt.model.gpt import GPT
from fastgpt.ops.table import Ops
from fastgpt.system.device import seed
from fastgpt.training.step import TrainStep


class TrainingState:
    """Model, training step and progress, which are saved, loaded and reset as one.

    Attributes:
        model, step: the same objects for the whole run, whatever is loaded.
        progress: replaced by `load` and `reset`; after `load` its `val_set` is that of the checkpoint.

    Args:
        val_set: identity of the run's evaluation set.
        unnamed: identity of the evaluation set of checkpoints that do not name theirs, which older versions wrote.
        source: the model whose weights it starts from, instead of random ones.
    """

    def __init__(
        self,
        config: TrainConfig,
        ops: Ops,
        data: Corpus,
        device: torch.device,
        dtype: torch.dtype,
        val_set: str,
        unnamed: str = "",
        source: Source | None = None,
    ):
        self.config, self.ops, self.data, self.device = config, ops, data, device
        self.val_set, self.unnamed, self.source = val_set, unnamed, source
        self.model = make_model(config, ops, device, source)
        self.step = TrainStep(self.model, config, device, dtype, packing.end_token(config, data))
        self.progress = Progress(val_set=val_set)

    @property
    def is_finished(self) -> bool:
        """Whether all steps are taken, and the last one was evaluated."""
        return self.progress.step >= self.config.max_iters and not self.owes_evaluation

    @property
    def owes_evaluation(self) -> bool:
        """Whether the last step is to be evaluated and was not, because a signal cut that short."""
        step, config = self.progress.step, self.config
        due = step == config.max_iters or step % config.eval_interval == 0
        return due and step > 0 and self.progress.evaluated_step != step

    def snapshot(self) -> Snapshot:
        """The state as it is now, for a checkpoint; waits for the device."""
        state = {
            "progress": dataclasses.asdict(self.progress),
            **self.step.state(),
            "vocabulary": self.data.tokenizer.sha256(),
            "text": self.data.source_sha256,
        }
        return store.capture(self.progress.step, self.model, self.step.optimizer, state)

    def load(self, folder: Path) -> None:
        """Take the state that a checkpoint holds. Raises `CorruptCheckpoint`."""
        state = store.load_state(folder)
        store.check_vocabulary(folder, self.data.tokenizer)
        self.progress = progress.read(state, folder / store.STATE)
        if self.progress.val_set is None:
            same = state.get("text", self.data.source_sha256) == self.data.source_sha256
            self.progress.val_set = self.unnamed if same else "another text"
        changed = self.progress.val_set != self.val_set
        if changed or not store.folder_of(folder.parent, self.progress.best_step).is_dir():
            self.progress.forget_best()  # judged on another evaluation set, or its folder was pruned after a rollback
        with store.naming(folder / store.MODEL):
            self.model.load_weights(store.load_weights(folder))
        store.load_optimizer(folder, self.model, self.step.optimizer)
        try:
            self.step.load_state(state)
        except (AttributeError, KeyError, TypeError, ValueError, OverflowError) as error:
            raise CorruptCheckpoint(f"{folder / store.STATE} is not what a run saves: {error!r:.80}") from None

    def reset(self) -> None:
        """Take the state that it had before the first step."""
        self.model.load_weights(make_model(self.config, self.ops, self.device, self.source).weights())
        self.step.reset()
        self.progress = Progress(val_set=self.val_set)


def make_model(config: TrainConfig, ops: Ops, device: torch.device, source: Source | None) -> GPT:
    """The model of a run before its first step: with the weights of the source, or random ones that the seed gives.

    Raises:
        UsageError: the source's weights are not of this shape, or not finite.
    """
    seed(config.seed, device)
    with device:
        model = GPT(config, ops)
    if source:
        with store.naming(source.file):
            model.load_weights(source.weights(model.config))
    return model
