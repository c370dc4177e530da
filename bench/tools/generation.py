"""Our side of the generation benchmarks: models, continuations, what these must move and compute, where the time goes.

How a model is made ready, in which dtype, quantized, compiled or not, is said in `generator_of` alone.
"""

import contextlib
import dataclasses
import statistics
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import torch
from torch.autograd import DeviceType  # pyright: ignore[reportPrivateImportUsage]
from torch.profiler import ProfilerActivity, profile, record_function

from fastgpt.config.model import ModelConfig
from fastgpt.config.training import PRESETS
from fastgpt.generation.engine import Engine
from fastgpt.generation.generator import TextGenerator
from fastgpt.generation.request import Prompt
from fastgpt.generation.single import Generation
from fastgpt.model import workloads
from fastgpt.model.gpt import GPT
from fastgpt.model.int8 import quantize_model
from fastgpt.model.kv_cache import page_bytes
from fastgpt.ops import autotune, table
from fastgpt.system.device import synchronize
from fastgpt.tokenizer.byte import ByteTokenizer

VOCABULARY = {"baby": 256}  # of a corpus of bytes; the others have GPT-2's


class ManyTokens(ByteTokenizer):
    """Bytes, and names for the other ids of a larger vocabulary: texts do not matter here."""

    def __init__(self, vocab_size: int):
        super().__init__()
        self.vocab_size = vocab_size

    def token_bytes(self, id: int) -> bytes:
        return bytes([id % 256])


def untrained(preset: str, device: torch.device) -> GPT:
    """A model of a preset's shape with random weights in float32, always the same."""
    torch.manual_seed(0)
    config = dataclasses.replace(PRESETS[preset], vocab_size=VOCABULARY.get(preset, 50257))
    with device:
        return GPT(config).eval()


def generator_of(
    model: GPT,
    dtype: torch.dtype = torch.float32,
    *,
    quantize: str = "none",
    kernels: str = "auto",
    compiled: bool = False,
    batch: int = 1,
) -> TextGenerator:
    """The same weights ready to generate: in `dtype`, or with `quantize` int8.

    compiled: its decode step is, on a CPU; elsewhere its engine compiles. `kernels` "auto" takes on a GPU what is
    fastest then, for so many sequences side by side.
    """
    planned = workloads.generation(model.config, dtype, batch, int8=quantize == "int8", compile=compiled)
    ops = table.resolve(kernels, model.device, choose=autotune.chooser(planned))
    ours = GPT.from_weights(model.config, ops, model.weights(), model.device, dtype)
    if quantize == "int8":
        quantize_model(ours)
    generator = TextGenerator(ours, ManyTokens(model.config.vocab_size or 0))
    if compiled and model.device.type == "cpu":
        generator.compile()
    return generator


def continuation(
    generator: TextGenerator, prompt: Prompt, new_tokens: int, *, cache: str = "dense", **settings: Any
) -> Generation:
    """One whole continuation, which knows its tokens and times; settings as `TextGenerator.stream` takes them."""
    stream = generator.stream(prompt, cache=cache, max_new_tokens=new_tokens, **settings)
    for _ in stream.tokens():
        pass
    return stream


def random_tokens(count: int, seed: int, vocab_size: int) -> list[int]:
    return torch.randint(vocab_size, (count,), generator=torch.Generator().manual_seed(seed)).tolist()


def weight_bytes(model: GPT, dtype: torch.dtype, quantize: str = "none") -> int:
    """Bytes of what a decode step reads of the weights: all but the other positions' embeddings.

    With int8, matrices have a byte an element and a float32 scale an output, and the vectors are in `dtype`.
    """
    total = 0
    for name, weight in model.weights().items():
        if name == "wpe.weight":
            total += weight.shape[1] * dtype.itemsize
        elif weight.dim() == 2 and quantize == "int8":
            total += weight.numel() + 4 * len(weight)
        else:
            total += weight.numel() * dtype.itemsize
    return total


def work(
    model: GPT,
    dtype: torch.dtype,
    prompts: Sequence[int],
    new_tokens: int,
    *,
    cached: bool = True,
    quantize: str = "none",
) -> dict[str, float]:
    """Operations and bytes that continuing prompts of these lengths takes at the least, side by side.

    Bytes: each step reads the weights once for all, and with a cache writes a position of each sequence and reads those
    before it. Operations: two for each weight and token, and the output layer's for the last token alone.
    """
    config = model.config
    position = page_bytes(config, 1, dtype)
    moved = new_tokens * weight_bytes(model, dtype, quantize)
    matrices = sum(weight.numel() for name, weight in model.weights().items() if name.endswith("weight"))
    head = model.wte.weight[: config.vocab_size].numel()
    body = matrices - head - (0 if model.wpe is None else model.wpe.weight.numel())
    computed = 0.0
    for length in prompts:
        contexts = range(length, length + new_tokens)
        computed += 2 * head * new_tokens
        computed += 2 * body * (contexts[-1] if cached else sum(contexts))
        if cached:
            moved += position * (sum(contexts) + contexts[-1])
    return {"flops": computed, "bytes": float(moved)}


def stream_facts(runs: Sequence[Generation]) -> dict[str, float]:
    """Speeds of continuations made one at a time, their medians."""
    median = statistics.median
    return {
        "first_token_seconds": median(run.prefill_seconds for run in runs),
        "token_seconds": median(run.decode_seconds / run.decode_tokens for run in runs),
        "prefill_tokens_per_second": median(run.prefill_tokens / run.prefill_seconds for run in runs),
        "decode_tokens_per_second": median(run.decode_tokens / run.decode_seconds for run in runs),
    }


def engine_facts(engine: Engine) -> dict[str, float]:
    """Speeds of what the engine has done so far; the time to a token is that of one sequence among all."""
    stats = engine.stats
    return {
        "first_token_seconds": statistics.median(stats.first_token_seconds),
        "token_seconds": statistics.median(stats.token_seconds),
        "prefill_tokens_per_second": stats.prefill_tokens / stats.prefill_seconds,
        "decode_tokens_per_second": stats.decode_tokens / stats.decode_seconds,
    }


def cache_bytes(
    config: ModelConfig, dtype: torch.dtype, cache: str, lengths: Sequence[int], page_size: int = 16
) -> int:
    """Memory that the keys and values of sequences of these lengths occupy at their end."""
    if cache == "none":
        return 0
    if cache == "dense":
        return len(lengths) * page_bytes(config, config.block_size, dtype)
    return sum(-(-length // page_size) for length in lengths) * page_bytes(config, page_size, dtype)


@contextlib.contextmanager
def _named_functions(generator: TextGenerator) -> Iterator[None]:
    """The compiled functions of a generator's decode step, where it has one, under names that the profiler shows."""
    step = generator.decoder
    if step is None:
        yield
        return
    functions = {"embedding": step.embedding, "layer": step.layer, "head": step.head}

    def named(name: str, function: Callable[[list], list]) -> Callable[[list], list]:
        def run(tensors: list) -> list:
            with record_function(f"compiled {name}"):
                return function(tensors)

        return run

    for name, function in functions.items():
        setattr(step, name, named(name, function))
    try:
        yield
    finally:
        for name, function in functions.items():
            setattr(step, name, function)


def own_times(rows: Iterable[Any], on_gpu: bool) -> dict[str, float]:
    """The microseconds of each operation itself, of a profile's rows; on a GPU of each kernel.

    There the rows of operations repeat the times of the kernels that they have launched, and ranges those within them.
    """
    if not on_gpu:
        return {row.key: row.self_cpu_time_total for row in rows}
    kernels = (row for row in rows if row.device_type != DeviceType.CPU and not row.is_user_annotation)
    return {row.key: row.self_device_time_total for row in kernels}


def profile_step(generator: TextGenerator, prompt: Prompt, steps: int) -> list[dict[str, Any]]:
    """The parts of an average decode step's time with the dense cache, the largest first.

    [{"op": name, "microseconds": its own time}].

    The steps are timed without the profiler first, which slows them down; what is left of that time beside the
    operations (Python, and machine code that the profiler does not know) is "between operations".
    """
    device = generator.model.device
    draws = generator.stream(prompt, cache="dense", max_new_tokens=2 + 2 * steps, temperature=0.0).tokens()
    for _ in range(2):  # the prefill, and a step to warm up
        next(draws)
    synchronize(device)
    began = time.perf_counter()
    for _ in range(steps):
        next(draws)
    synchronize(device)
    whole = (time.perf_counter() - began) / steps * 1e6
    on_gpu = device.type == "cuda"
    with (
        _named_functions(generator),
        profile(activities=[ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if on_gpu else [])]) as profiled,
    ):
        for _ in range(steps):
            next(draws)
        synchronize(device)
    spent = {name: time / steps for name, time in own_times(profiled.key_averages(), on_gpu).items()}
    spent["between operations"] = max(0.0, whole - sum(spent.values()))
    ranked = sorted(spent.items(), key=lambda item: item[1], reverse=True)
    return [{"op": op, "microseconds": microseconds} for op, microseconds in ranked if microseconds > 0]
