"""Tells a lack of memory from other errors, and lets a program go on after one."""

import re
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from fastgpt.errors import RunFailed

MESSAGES = re.compile(
    "DefaultCPUAllocator|MPS backend out of memory|CUDA error: out of memory|std::bad_alloc|"
    "could not (create|execute) a (primitive|memory)"
)


class Lack:
    """Whether memory ran out, and what was raised then.

    Attributes:
        reason: the exception's text; None where there was enough.
    """

    reason: str | None = None

    def __bool__(self) -> bool:
        return self.reason is not None


@contextmanager
def caught() -> Iterator[Lack]:
    """End the block where memory runs out; other errors pass.

    with caught() as lack:
        loss = model(x, y)
    if lack:
        ...  # the exception is gone, and with it the tensors that its traceback held
    """
    lack = Lack()
    try:
        yield lack
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        lack.reason = str(error)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an exception says that the device, or the machine, has no memory left."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    if isinstance(error, RunFailed):  # our own message, which may quote one
        return False
    # PyTorch has no class of its own for those of CPUs, of Apple GPUs, and of making a CUDA graph ready.
    return isinstance(error, RuntimeError) and MESSAGES.search(str(error)) is not None
