"""Running out of memory: the errors that say so, and a block that may end in one.

    with out_of_memory.caught() as shortage:
        return model(x, y).item()
    print(f"out of memory: {shortage.reason}")  # reached only where the memory ran out

What to do instead comes after the block, and not in an except clause: there the exception would keep every tensor of
the frames that it came through. `in_halves` computes a batch in parts where the whole does not fit.
"""

import re
from collections.abc import Callable
from types import TracebackType
from typing import Any, TypeVar

import torch

from fastgpt.errors import RunFailed, UsageError

Result = TypeVar("Result")

# oneDNN, which multiplies matrices on a CPU, names what it could not make: a scratchpad, or the code of a product.
MESSAGES = re.compile(
    "DefaultCPUAllocator|MPS backend out of memory|CUDA error: out of memory|std::bad_alloc|"
    "could not (create|execute) a (primitive|memory)"
)


class DoesNotFit(UsageError, MemoryError):
    """A request for more memory than is free, refused before it is allocated."""


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an exception says that the device, or the machine, has no memory left."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    if isinstance(error, RunFailed):  # our own message, which may quote one
        return False
    # PyTorch has no class of its own for those of CPUs, of Apple GPUs, and of making a CUDA graph ready.
    return isinstance(error, RuntimeError) and MESSAGES.search(str(error)) is not None


def in_halves(compute: Callable[..., Result], *inputs: Any) -> list[Result]:
    """The results of `compute(*inputs)`, or of the halves of the inputs as often as the memory is too small for them.

    Args:
        inputs: tensors or lists of one length, which are cut alike. A single row is never cut: its error passes.
    """
    if len(inputs[0]) == 1:
        return [compute(*inputs)]
    with caught():
        return [compute(*inputs)]
    middle = len(inputs[0]) // 2
    halves = ([part[half] for part in inputs] for half in (slice(middle), slice(middle, None)))
    return [result for half in halves for result in in_halves(compute, *half)]


class caught:
    """Ends a block that runs out of memory without an exception; other exceptions pass.

    Attributes:
        reason: the message of the exception, which may be empty; None where the memory was enough.
    """

    def __init__(self) -> None:
        self.reason: str | None = None

    def __enter__(self) -> "caught":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> bool:
        if error is None or not is_out_of_memory(error):
            return False
        self.reason = str(error)
        return True
