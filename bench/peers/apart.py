"""A peer in a process of its own, which sleeps while it is not asked.

Two programs that use OpenMP in one process make each other several times slower on a CPU: libgomp counts the threads
of both, finds more than there are cores, and lets them sleep at every barrier instead of waiting for a moment. Which
of them a benchmark then flatters is chance. For the same reason PyTorch has one thread in the peer's process.
"""

import contextlib
import multiprocessing
import weakref
from collections.abc import Callable, Sequence
from multiprocessing.connection import Connection
from typing import Any

import numpy as np
import torch

from fastgpt.config.model import ModelConfig
from fastgpt.model.gpt import GPT
from fastgpt.ops import table

Tokens = Sequence[int]
Peer = Callable[[Sequence[Tokens], int], list[list[int]]]
Maker = Callable[..., Peer]


class Apart:
    """`make(model, threads, *kind)` in another process, on the CPU, with as many threads as PyTorch has here.

    Every method raises `RuntimeError`, with the reason, where the peer could not be made, failed, or has ended.
    """

    def __init__(self, name: str, make: Maker, model: GPT, *kind: str):
        """make: a function or class that can be imported by its name."""
        self.name = name
        context = multiprocessing.get_context("spawn")
        self._pipe, theirs = context.Pipe()
        weights = {name: tensor.cpu().float().numpy() for name, tensor in model.weights().items()}
        given = (theirs, make, kind, model.config, weights, torch.get_num_threads())
        process = context.Process(target=_serve, args=given, daemon=True)
        process.start()
        theirs.close()  # so that the end of the process is the end of the pipe
        weakref.finalize(self, _end, process, self._pipe)
        self._answer()

    def __call__(self, prompts: Sequence[Tokens], new_tokens: int) -> list[list[int]]:
        return self._ask(([list(prompt) for prompt in prompts], new_tokens))

    def facts(self) -> dict[str, Any]:
        """The settings that the peer reports, if any."""
        return self._ask(None)

    def _ask(self, question: tuple[list[list[int]], int] | None) -> Any:
        with contextlib.suppress(ConnectionError):  # it has ended, as the missing answer says too
            self._pipe.send(question)
        return self._answer()

    def _answer(self) -> Any:
        try:
            answer = self._pipe.recv()
        except (EOFError, ConnectionError):
            raise RuntimeError(f"the process of {self.name} has ended") from None
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
        peer = make(_model(config, weights), threads, *kind)
    except Exception as error:
        pipe.send(f"{type(error).__name__}: {error}")
        return
    pipe.send([])
    with contextlib.suppress(EOFError):
        while True:
            asked = pipe.recv()
            try:
                answer = getattr(peer, "facts", dict)() if asked is None else peer(*asked)
            except Exception as error:
                answer = f"{type(error).__name__}: {error}"
            pipe.send(answer)


def _model(config: ModelConfig, weights: dict[str, np.ndarray]) -> GPT:
    """The model with these weights, which are dropped: the peer has its own."""
    device = torch.device("cpu")
    tensors = {name: torch.from_numpy(array) for name, array in weights.items()}
    weights.clear()
    return GPT.from_weights(config, table.resolve("auto", device), tensors, device, torch.float32)
