"""A peer in a process of its own, which sleeps while it is not asked.

Two programs that use OpenMP in one process make each other several times slower on a CPU: libgomp counts the threads
of both, finds more than there are cores, and lets them sleep at every barrier instead of waiting for a moment. Which
of them a benchmark then flatters is chance. For the same reason PyTorch has one thread in the peer's process.
"""

import multiprocessing
import weakref
from collections.abc import Callable, Sequence
from multiprocessing.connection import Connection
from typing import Any

import numpy as np
import torch

from fastgpt import dispatch
from fastgpt.config import ModelConfig
from fastgpt.model import GPT

Tokens = Sequence[int]
Peer = Callable[[Sequence[Tokens], int], list[list[int]]]
Maker = Callable[..., Peer]


class Apart:
    """`make(model, threads, *kind)` in another process, on the CPU, with as many threads as PyTorch has here.

    Raises:
        RuntimeError: the peer could not be made, failed, or its process ended.
    """

    def __init__(self, make: Maker, model: GPT, *kind: str):
        """make: a function or class that can be imported by its name."""
        self.name = " ".join([make.__name__, *kind])
        context = multiprocessing.get_context("spawn")
        self._pipe, theirs = context.Pipe()
        weights = {name: tensor.cpu().float().numpy() for name, tensor in model.weights().items()}
        given = (theirs, make, kind, model.config, weights, torch.get_num_threads())
        process = context.Process(target=_serve, args=given, daemon=True)
        process.start()
        theirs.close()  # so that the end of the process is the end of the pipe
        self.close = weakref.finalize(self, _end, process, self._pipe)
        self._answer()

    def __call__(self, prompts: Sequence[Tokens], new_tokens: int) -> list[list[int]]:
        self._pipe.send(([list(prompt) for prompt in prompts], new_tokens))
        return self._answer()

    def facts(self) -> dict[str, Any]:
        """What the peer says of itself, where it says anything."""
        self._pipe.send(None)
        return self._answer()

    def _answer(self) -> Any:
        try:
            answer = self._pipe.recv()
        except EOFError:
            raise RuntimeError(f"the process of {self.name} ended") from None
        if isinstance(answer, str):
            raise RuntimeError(f"{self.name}: {answer}")
        return answer


def _end(process: multiprocessing.process.BaseProcess, pipe: Connection) -> None:
    pipe.close()
    process.terminate()
    process.join()


def _serve(
    pipe: Connection,
    make: Maker,
    kind: tuple[str, ...],
    config: ModelConfig,
    weights: dict[str, np.ndarray],
    threads: int,
) -> None:
    """Make the peer, and answer until the pipe ends; an answer that is text is what went wrong."""
    torch.set_num_threads(1)
    try:
        device = torch.device("cpu")
        tensors = {name: torch.from_numpy(array) for name, array in weights.items()}
        model = GPT.from_weights(config, dispatch.resolve("auto", device), tensors, device, torch.float32)
        peer = make(model, threads, *kind)
        pipe.send([])
        while True:
            asked = pipe.recv()
            pipe.send(getattr(peer, "facts", dict)() if asked is None else peer(*asked))
    except EOFError:
        return
    except Exception as error:
        pipe.send(f"{type(error).__name__}: {error}")
