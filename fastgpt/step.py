"""One optimizer step: micro-batches forward and backward, clipping, AdamW.

    step = TrainStep(model, config, device, torch.bfloat16)
    loss, norm, rate = step(0, [(x, y)])

`fastgpt.train` runs it in its loop, and bench/bench_train.py measures it.
"""

from collections.abc import Iterable
from typing import Any

import torch

from fastgpt.config import TrainConfig
from fastgpt.device import autocast
from fastgpt.errors import UsageError
from fastgpt.loader import Batch
from fastgpt.model import GPT
from fastgpt.optim import clip, learning_rate, make_optimizer, set_learning_rate


class TrainStep:
    """The model with what trains it: AdamW, the scaler of float16 and, with --compile, the compiled model.

    Weights, moments and gradients are float32 whatever `dtype` the matrix products are in.
    """

    def __init__(self, model: GPT, config: TrainConfig, device: torch.device, dtype: torch.dtype):
        self.model, self.config, self.device, self.dtype = model, config, device, dtype
        self.parameters = list(model.parameters())
        self.optimizer = make_optimizer(model, config)
        self.scaler = torch.amp.GradScaler(device.type, enabled=dtype == torch.float16)
        # On a CPU Inductor's own random numbers are slower than PyTorch's, and are other ones than without --compile.
        options: dict[str, Any] = {"fallback_random": device.type == "cpu"}
        # Nothing changes the modules of PyTorch in the model, so that need not be checked in every step.
        options["guard_filter_fn"] = torch.compiler.skip_guard_on_inbuilt_nn_modules_unsafe
        self.compiled = torch.compile(model, options=options) if config.compile else model

    def __call__(self, number: int, batches: Iterable[Batch]) -> tuple[torch.Tensor, torch.Tensor, float]:
        """Take step `number`, counted from 0, over its micro-batches, each (inputs, targets) int64 (B, T).

        Returns:
            The mean loss of the micro-batches and the gradients' norm before clipping, scalars on the device that
            nothing has waited for yet, and the learning rate.

        Raises:
            UsageError: the model cannot be compiled.
        """
        config = self.config
        # Dropout is a pure function of (seed, step), so a resumed run repeats it.
        torch.manual_seed((config.seed + (number + 1) * 0x9E3779B97F4A7C15) % 2**64)
        rate = learning_rate(number, config)
        set_learning_rate(self.optimizer, rate)
        total = torch.zeros((), device=self.device)
        with autocast(self.device, self.dtype):  # around all micro-batches: the weights are cast once
            for x, y in batches:
                loss = self._loss(x, y) / config.gradient_accumulation_steps
                self.scaler.scale(loss).backward()
                total += loss.detach()
        self.scaler.unscale_(self.optimizer)
        norm = clip(self.parameters, config.grad_clip)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad(set_to_none=True)
        return total, norm, rate

    def _loss(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        if not self.config.compile:
            return self.model(x, y)
        from torch._dynamo.exc import TorchDynamoException  # slow to import, so only with --compile

        try:
            return self.compiled(x, y)
        except TorchDynamoException as error:
            reason = next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)
            raise UsageError(f"--compile failed: {reason}; mend that, or pass --no-compile") from error
