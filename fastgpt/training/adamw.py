"""AdamW (Loshchilov & Hutter, 2019), and what every optimizer of this project offers."""

from collections.abc import Sequence
from typing import Any

import torch

from fastgpt.system.torch_private import add_param_group, add_to_each, fused_adamw


class Optimizer(torch.optim.Optimizer):
    """An optimizer whose steps the guard can skip without waiting for the device.

    Its state is complete from the start: for each parameter float32 scalars and tensors of its own shape. Checkpoints
    hold these under their names, and `fastgpt.model.moments` counts them.

    Attributes:
        found_inf: a float32 scalar on the device; where it is 1 and not 0, a step changes nothing.
    """

    found_inf: torch.Tensor | None = None

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        add_param_group(self, param_group)

    def reset(self) -> None:
        """Set the state back to that before the first step."""
        for state in self.state.values():
            for value in state.values():
                value.zero_()


class AdamW(Optimizer, torch.optim.AdamW):
    """`torch.optim.AdamW` in its fused form, with less Python in a step, which matters for small models.

    Every parameter needs a gradient in every step.
    """

    def __init__(self, groups: list[dict[str, Any]], lr: float, betas: tuple[float, float]):
        super().__init__(groups, lr=lr, betas=betas, fused=True)
        self.adam_groups: Sequence[dict[str, Any]] = self.param_groups
        for group in self.param_groups:
            for p in group["params"]:
                self.state[p] = {
                    "step": torch.zeros((), device=p.device),
                    "exp_avg": torch.zeros_like(p),
                    "exp_avg_sq": torch.zeros_like(p),
                }

    @torch.no_grad()
    def step(self, closure: None = None) -> None:
        if self.found_inf is not None and self.found_inf.device.type == "mps" and self.found_inf.item():
            return  # PyTorch's kernel for Apple GPUs ignores it, so the host has to wait for it and skip the step
        taken = 1 if self.found_inf is None else 1 - self.found_inf
        for group in self.adam_groups:
            params = group["params"]
            states = [self.state[p] for p in params]
            steps = [state["step"] for state in states]
            add_to_each(steps, taken)
            fused_adamw(
                params,
                [p.grad for p in params],
                [state["exp_avg"] for state in states],
                [state["exp_avg_sq"] for state in states],
                steps,
                lr=group["lr"],
                beta1=group["betas"][0],
                beta2=group["betas"][1],
                weight_decay=group["weight_decay"],
                eps=group["eps"],
                amsgrad=False,
                maximize=False,
                found_inf=self.found_inf,
            )
