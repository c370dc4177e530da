"""One optimizer step: micro-batches forward and backward, clipping, the guard's verdict, the update.

    step = TrainStep(model, config, device, torch.bfloat16)
    loss, norm, rate = step(0, [(x, y)])

`fastgpt.training.run` runs it in its loop, and bench/bench_train.py measures it.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch

from fastgpt.config.training import TrainConfig
from fastgpt.data.loader import Batch
from fastgpt.data.packing import document_ids
from fastgpt.errors import UsageError
from fastgpt.model.gpt import GPT
from fastgpt.system.device import autocast, ordered_sums, seed
from fastgpt.system.torch_private import GROWTH_TRACKER, compile_error
from fastgpt.training.guard import Guard
from fastgpt.training.optimizer import clip, make_optimizer
from fastgpt.training.schedule import learning_rate, momentum, set_learning_rate, set_momentum
from fastgpt.training.statistics import Statistics

FACTORS = ("scale", "growth_factor", "backoff_factor")  # of float16's scaler
COUNTS = ("growth_interval", GROWTH_TRACKER)
EAGER_SHARE = 4  # a compiled step computes one sequence in so many again, for its statistics: 1% at the preset baby


class TrainStep:
    """The model with what trains it: optimizer, guard, float16's loss scaler and, with `compile`, the compiled model.

    Weights, moments and gradients are float32; only matrix products are in `dtype`.

    Args:
        end_token: of a packed run, see `fastgpt.data.packing`.

    Attributes:
        statistics: of the step that was taken last; None where `log_stats` does not measure it.
    """

    def __init__(
        self,
        model: GPT,
        config: TrainConfig,
        device: torch.device,
        dtype: torch.dtype,
        end_token: int | None = None,
    ):
        self.model, self.config, self.device, self.dtype = model, config, device, dtype
        self.end_token = end_token
        self.parameters = list(model.parameters())
        self.optimizer = make_optimizer(model, config)
        self.guard = Guard(device, config.rollback_after, config.skip_loss_sigma)
        self.scaler = self._make_scaler()
        self.statistics: Statistics | None = None
        # On a CPU Inductor's random numbers are slower than PyTorch's, and differ from those without `compile`.
        options: dict[str, Any] = {"fallback_random": device.type == "cpu"}
        # Nothing replaces PyTorch's modules in the model, so no step needs to check them.
        options["guard_filter_fn"] = torch.compiler.skip_guard_on_inbuilt_nn_modules_unsafe
        self.compiled = torch.compile(model, options=options) if config.compile else model

    def __call__(self, number: int, batches: Sequence[Batch]) -> tuple[torch.Tensor, torch.Tensor, float]:
        """Take step `number`, counted from 0, over its micro-batches, each (inputs, targets) int64 (B, T).

        Returns:
            The mean loss of the micro-batches, the gradients' norm before clipping, and the learning rate. The first
            two are scalars on the device, which may still be computing them.

        Raises:
            UsageError: the model cannot be compiled.
        """
        loss = self.accumulate(number, batches)
        assert loss is not None  # nothing stops it
        return loss, *self.update(number, loss)

    def accumulate(
        self, number: int, batches: Sequence[Batch], stopping: Callable[[int], bool] = lambda done: False
    ) -> torch.Tensor | None:
        """The first half of a step, which needs most of the memory: forward and backward.

        Args:
            stopping: called after each micro-batch with the number that are done; true leaves out the others.

        Returns:
            The mean loss; None if the step was cut short, and must be abandoned.
        """
        self.statistics = Statistics(self.model) if self._is_measured(number) else None
        watching = self._watching(number, batches)
        ordered = ordered_sums() if self.config.compile and self.device.type == "cpu" else nullcontext()
        # Dropout is a pure function of (seed, step), so a resumed run repeats it.
        self._seed(number)
        total = torch.zeros((), device=self.device)
        # Autocast is around all micro-batches: the weights are cast once.
        with watching, ordered, autocast(self.device, self.dtype):
            for done, (x, y) in enumerate(batches, 1):
                loss = self._loss(x, y) / len(batches)
                self.scaler.scale(loss).backward()
                total += loss.detach()
                if stopping(done) and done < len(batches):
                    return None
        return total

    def update(self, number: int, loss: torch.Tensor) -> tuple[torch.Tensor, float]:
        """The second half: clip, judge, update. Returns the gradients' norm and the learning rate."""
        rate = learning_rate(number, self.config)
        set_learning_rate(self.optimizer, rate)
        set_momentum(self.optimizer, momentum(number, self.config))
        self.scaler.unscale_(self.optimizer)
        if self.statistics:
            self.statistics.before_update()
        norm = clip(self.parameters, self.config.grad_clip)
        scale = self.scaler.scale(torch.ones_like(loss)) if self.scaler.is_enabled() else None
        self.optimizer.found_inf = self.guard.judge(loss, norm, scale)
        self.optimizer.step()
        if self.statistics:
            self.statistics.after_update()
        self._update_scale(loss, scale)
        self.model.zero_grad(set_to_none=True)  # the optimizer's own imports PyTorch's compiler
        return norm, rate

    def abandon(self) -> None:
        """Drop the gradients of a step that was cut short, so that it can be taken again."""
        self.statistics = None
        self.model.zero_grad(set_to_none=True)

    def state(self) -> dict[str, Any]:
        """The state that a resumed run needs beside weights and moments, for JSON; waits for the device."""
        return {"guard": self.guard.state_dict(), "scaler": self.scaler.state_dict()}

    def load_state(self, state: Mapping[str, Any]) -> None:
        """Restore what `state` gave. Raises KeyError, TypeError or ValueError for anything else."""
        self.guard.load_state_dict(state["guard"])
        scaler = state["scaler"]
        if scaler:  # empty if the run was not in float16 before
            factors, counts = {name: float(scaler[name]) for name in FACTORS}, {name: scaler[name] for name in COUNTS}
            wrong = [name for name, value in factors.items() if not 0 < value < math.inf]
            wrong += [name for name, value in counts.items() if type(value) is not int or not 0 <= value < 2**31]
            if wrong:
                raise ValueError(f"the scaler's {wrong[0]} is {scaler[wrong[0]]}")
            self.scaler.load_state_dict(factors | counts)

    def reset(self) -> None:
        """Set all but the weights back to the state before the first step."""
        self.optimizer.reset()
        self.guard.load_state_dict({})
        self.scaler = self._make_scaler()

    def _seed(self, number: int) -> None:
        seed((self.config.seed + (number + 1) * 0x9E3779B97F4A7C15) % 2**64, self.device)

    def _is_measured(self, number: int) -> bool:
        return self.config.log_stats and (number + 1) % self.config.log_interval == 0

    def _watching(self, number: int, batches: Sequence[Batch]) -> AbstractContextManager[None]:
        """A context that measures the activations of a step's forward passes, where they are measured.

        Hooks would break the graph of a compiled model, so the eager one computes a part beforehand, without gradients.
        """
        if not self.statistics:
            return nullcontext()
        if not self.config.compile:
            return self.statistics.watching()
        x = batches[0][0]
        part = x[: max(1, len(batches) * len(x) // EAGER_SHARE)]
        self._seed(number)
        with self.statistics.watching(), torch.no_grad(), autocast(self.device, self.dtype):
            self.model.hidden(part, document_ids(part, self.end_token))
        return nullcontext()

    def _make_scaler(self) -> torch.amp.GradScaler:
        return torch.amp.GradScaler(self.device.type, enabled=self.dtype == torch.float16)

    def _update_scale(self, loss: torch.Tensor, before: torch.Tensor | None) -> None:
        """Let the scaler adapt to the gradients, unless the loss itself was not finite, which no scale can help."""
        if before is None:
            return
        self.scaler.update()
        after = self.scaler.scale(torch.ones_like(loss))
        self.scaler.update(torch.where(torch.isfinite(loss), after, before))

    def _loss(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        doc_ids = document_ids(x, self.end_token)
        if not self.config.compile:
            return self.model(x, y, doc_ids=doc_ids)
        try:
            return self.compiled(x, y, doc_ids=doc_ids)
        except compile_error() as error:
            reason = next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)
            raise UsageError(f"`compile` failed: {reason}; correct that, or pass `compile=False`") from error
