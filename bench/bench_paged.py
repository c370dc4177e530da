"""On a GPU: the decode kernel against the memory's own speed and its best split, GPT-2 against its peers."""

import dataclasses
import statistics
from collections.abc import Callable

import pytest
import torch

from fastgpt import dispatch
from fastgpt.config import PRESETS, SamplingParams
from fastgpt.generate import TextGenerator
from fastgpt.model import GPT
from fastgpt.tokenizer import ByteTokenizer

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")

H, D, P = 12, 64, 16  # GPT-2's heads, in bfloat16
BATCHES, CONTEXTS = (1, 2, 4, 8, 16, 32, 64), (128, 512, 2048, 8192, 32768)
LARGE = 64 * 2**20  # bytes of keys and values from which on the memory is the limit
CHUNKS = (128, 256, 512, 1024, 2048, 4096, 8192, 16384, 32768)
COPY_BYTES = 2**30
NEW_TOKENS = 256


def seconds(run: Callable[[], object], rounds: int = 20) -> float:
    """The median time of a call on the GPU, by its events."""
    for _ in range(3):
        run()
    times = []
    for _ in range(rounds):
        began, ended = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        began.record()
        run()
        ended.record()
        ended.synchronize()
        times.append(began.elapsed_time(ended) * 1e-3)
    return statistics.median(times)


def decode_step(B: int, context: int) -> tuple[Callable[[int], torch.Tensor], int]:
    """A decode step of B sequences whose pages are mixed, by the keys of a split (0: chosen), and the bytes it reads.

    The calls go round several copies of keys and values, so that the GPU's cache holds none of them.
    """
    M = context // P
    size = 2 * B * context * H * D * 2
    copies = max(1, LARGE * 4 // size)
    pools = [torch.randn(2, B * M, P, H, D, device="cuda").bfloat16() for _ in range(copies)]
    q = torch.randn(B, H, D, device="cuda").bfloat16()
    table = torch.randperm(B * M, device="cuda").int().view(B, M)
    lengths = torch.full((B,), context, dtype=torch.int32, device="cuda")
    dispatch.implementation("paged_attention", "triton")  # registers the op
    turn = iter(range(10**9))

    def step(chunk: int) -> torch.Tensor:
        keys, values = pools[next(turn) % copies]
        return torch.ops.fastgpt.paged_decode(q, keys, values, table, lengths, D**-0.5, chunk)

    return step, size


@pytest.mark.parametrize("context", CONTEXTS)
@pytest.mark.parametrize("B", BATCHES)
def test_decode_kernel(benchmark, B: int, context: int):
    step, size = decode_step(B, context)
    source, target = (torch.empty(COPY_BYTES, dtype=torch.uint8, device="cuda") for _ in range(2))
    bandwidth = 2 * COPY_BYTES / seconds(lambda: target.copy_(source))
    own = seconds(lambda: step(0))
    swept = {chunk: seconds(lambda c=chunk: step(c)) for chunk in CHUNKS if chunk <= context}
    best = min(swept, key=swept.__getitem__)
    benchmark.pedantic(lambda: (step(0), torch.cuda.synchronize()), rounds=20)
    benchmark.extra_info |= {
        "bytes": size,
        "gigabytes_per_second": size / own * 1e-9,
        "copy_gigabytes_per_second": bandwidth * 1e-9,
        "share_of_copy": size / own / bandwidth,
        "aim_share": 0.85 if size >= LARGE else "none",
        "best_chunk": best,
        "slower_than_best_split": own / swept[best],
        "aim_slower_below": 1.15,
    }


@pytest.fixture(scope="module")
def gpt2() -> GPT:
    torch.manual_seed(0)
    config = dataclasses.replace(PRESETS["gpt2"], vocab_size=50257)
    return GPT(config)


@pytest.mark.parametrize("kernels", ["torch", "triton"])
def test_gpt2_paged_against_dense_at_batch_1(against, gpt2: GPT, kernels: str):
    generator = on_gpu(gpt2, kernels)
    engine, params = generator.engine(prefix_cache=False), SamplingParams(max_new_tokens=NEW_TOKENS)
    against(
        lambda: engine.generate(["a"], params),
        lambda: generator.generate("a", max_new_tokens=NEW_TOKENS),
        rounds=5,
        units=NEW_TOKENS,
        peer_name="dense cache",
        aim=0.97,
    )


def test_gpt2_against_transformers(against, gpt2: GPT):
    transformers = pytest.importorskip("transformers")
    engine = on_gpu(gpt2, "triton").engine(prefix_cache=False)
    peer = transformers.GPT2LMHeadModel(transformers.GPT2Config()).bfloat16().cuda().eval()
    prompt = torch.tensor([[97]], device="cuda")
    settings = {"max_new_tokens": NEW_TOKENS, "min_new_tokens": NEW_TOKENS, "do_sample": False, "pad_token_id": 0}
    params = SamplingParams(max_new_tokens=NEW_TOKENS, temperature=0)

    def generate() -> None:
        peer.generate(prompt, attention_mask=torch.ones_like(prompt), **settings)
        torch.cuda.synchronize()

    against(
        lambda: engine.generate([[97]], params),
        generate,
        rounds=5,
        units=NEW_TOKENS,
        peer_name="transformers, eager",
        aim=10,
    )


def on_gpu(model: GPT, kernels: str) -> TextGenerator:
    """The same weights in bfloat16; texts do not matter, so a byte vocabulary stands for GPT-2's."""
    device = torch.device("cuda")
    ops = dispatch.resolve(kernels, device)
    return TextGenerator(GPT.from_weights(model.config, ops, model.weights(), device, torch.bfloat16), Bytes(model))


class Bytes(ByteTokenizer):
    """Bytes, with names for the other ids of a larger vocabulary."""

    def __init__(self, model: GPT):
        super().__init__()
        self.vocab_size = model.config.vocab_size or 0

    def token_bytes(self, id: int) -> bytes:
        return bytes([id % 256])
