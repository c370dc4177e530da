"""What a checkpoint holds of a run: the model, what trains it, and how far they are."""

import dataclasses
from pathlib import Path

import torch

from fastgpt import checkpoint, foreign, progress
from fastgpt.checkpoint import Snapshot
from fastgpt.config import TrainConfig
from fastgpt.corpus import Corpus
from fastgpt.dispatch import Ops
from fastgpt.errors import CorruptCheckpoint
from fastgpt.model import GPT
from fastgpt.progress import Progress
from fastgpt.step import TrainStep


class TrainingState:
    """Model, training step and progress, which are saved, loaded and reset as one.

    Attributes:
        model, step: the same objects for the whole run, whatever is loaded.
        progress: another one after each loading.
    """

    def __init__(self, config: TrainConfig, ops: Ops, data: Corpus, device: torch.device, dtype: torch.dtype):
        self.config, self.ops, self.data, self.device = config, ops, data, device
        self.model = self._make_model()
        self.step = TrainStep(self.model, config, device, dtype)
        self.progress = Progress()

    def snapshot(self) -> Snapshot:
        """All of it as it is now, for a checkpoint; waits for the device."""
        state = {
            "progress": dataclasses.asdict(self.progress),
            **self.step.state(),
            "vocabulary": self.data.tokenizer.sha256(),
            "text": self.data.source_sha256,
        }
        return checkpoint.capture(self.progress.step, self.model, self.step.optimizer, state)

    def load(self, folder: Path) -> None:
        """Become what was saved there. Raises `CorruptCheckpoint`."""
        state = checkpoint.load_state(folder)
        checkpoint.check_vocabulary(folder, self.data.tokenizer)
        self.progress = progress.read(state, folder / checkpoint.STATE)
        changed = state.get("text", self.data.source_sha256) != self.data.source_sha256
        if changed or not checkpoint.folder_of(folder.parent, self.progress.best_step).is_dir():
            self.progress.forget_best()  # it is of another text, or was deleted for a better one of a time now undone
        with checkpoint.naming(folder / checkpoint.MODEL):
            self.model.load_weights(checkpoint.load_weights(folder))
        checkpoint.load_optimizer(folder, self.model, self.step.optimizer)
        try:
            self.step.load_state(state)
        except (AttributeError, KeyError, TypeError, ValueError, OverflowError) as error:
            raise CorruptCheckpoint(f"{folder / checkpoint.STATE} is not what a run saves: {error!r:.80}") from None

    def reset(self) -> None:
        """Become what it was before the first step."""
        self.model.load_weights(self._make_model().weights())
        self.step.reset()
        self.progress = Progress()

    def _make_model(self) -> GPT:
        torch.manual_seed(self.config.seed)
        with self.device:
            model = GPT(self.config, self.ops)
        if self.config.imports:
            with checkpoint.naming(Path(self.config.init_from)):
                model.load_weights(foreign.load(self.config.init_from).weights(self.data.tokenizer.vocab_size))
        return model
