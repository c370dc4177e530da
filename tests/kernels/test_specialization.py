"""Compilations of Triton's kernels: batch sizes and lengths, which change all the time, must not compile a kernel anew.

A model decodes with every kernel's launch replaced by Triton's own look-up of a compiled kernel, whose key is all that
it would compile for. So this needs no GPU and compiles nothing.
"""

import json
import os
import subprocess
import sys

import pytest

pytest.importorskip("triton")

SCRIPT = """
import json
from collections import defaultdict

import torch
import triton
from triton import knobs

from fastgpt.ops.table import resolve
from fastgpt.config.model import ModelConfig
from fastgpt.model.kv_cache import DenseCache, PagedBatch, Sequences
from fastgpt.model.gpt import GPT
from fastgpt_kernels import activation, aot, cross_entropy, launch, norm_backward
from fastgpt_kernels.machine_code import CHIPS

P, BATCHES, LENGTHS = 16, (1, 2, 3, 4, 5, 7, 8, 9, 12, 15, 16, 17, 24, 32, 48, 64), range(1, 65)
torch.set_num_threads(1)
CHIP = CHIPS["sm_90"].compiler
keys = defaultdict(set)
triton.runtime.driver.set_active(aot.Driver(CHIP))


def look_up(self):
    def found_nothing(key, **_):
        keys[self.name].add(key)
        self.kernel.device_caches[str(CHIP)][0][key] = "compiled"
        return True  # instead of compiling

    knobs.runtime.jit_cache_hook = found_nothing
    self.kernel.warmup(*self.args, grid=self.grid, **self.constants)


launch.Launch.__call__ = look_up
launch.INTERPRETED = True  # tensors on a CPU will do
ops = resolve("triton")
config = ModelConfig(n_layer=1, n_head=2, n_embd=32, block_size=256, vocab_size=96, dropout=0.0)
model = GPT(config, ops).eval()
weight, scale = torch.zeros(96, 32, dtype=torch.int8), torch.zeros(96)


def table(B, M):  # lengths and pages in one, as the engine sends them
    both = torch.ones(B, 1 + M, dtype=torch.int32)
    both[:, 0] = 100
    return both[:, 1:], both[:, 0]


def paged(decoding, reading):
    N = len(decoding.lengths) + (int(reading.starts[-1]) if reading else 0)
    tokens, at, slots = torch.zeros(3, N, dtype=torch.int64)
    pages = (torch.zeros(8, P, 2, 16),)
    model.hidden(tokens[None], cache=PagedBatch(pages, pages, at, slots, decoding, reading))


with torch.inference_mode():
    for B in BATCHES:
        dense = DenseCache(config, B)
        for length in LENGTHS:
            dense.attend(ops, 0, *torch.zeros(B, 1, 3, 2, 16).unbind(2))
            dense.advance(1)
            if length % P == 1:  # lengths in pages are the device's business, and their number of pages is not
                paged(Sequences(*table(B, 8 + length // P)), None)
            if length in BATCHES:
                starts = torch.tensor([0, 1, 1 + length, 3 + length]).int()
                paged(Sequences(*table(B, 16)), Sequences(*table(3, 17), starts))
                ops.linear_int8(torch.zeros(B, length, 32), weight, scale)
        model.hidden(torch.zeros(B, 1, dtype=torch.int64), cache=DenseCache(config, B))
        ops.linear_int8(torch.zeros(B, 1, 32), weight, scale)
    for length in LENGTHS:
        model.hidden(torch.zeros(1, length, dtype=torch.int64), cache=DenseCache(config))
for R in LENGTHS:  # of a training step
    for C in (32, 9008):
        x, weight, statistic = aot.empty(R, C), aot.empty(C), aot.empty(R)
        tuning = launch.Tuning("sm_90", "float32")
        cross_entropy.scale_launch(x, x, aot.empty(), tuning)()
        rest = (None, weight, None, None, x, x, statistic, statistic, weight, tuning)
        for one in norm_backward.backward_launches(x, *rest):
            one()
        for one in norm_backward.backward_launches(x, None, None, None, None, x, x, None, statistic, None, tuning):
            one()
        halves = aot.empty(R, 2 * C)
        activation.swiglu_forward_launch(x, halves, tuning)()
        activation.swiglu_backward_launch(halves, x, halves, tuning)()
        activation.relu2_launch(x, None, x, tuning)()
        activation.relu2_launch(x, x, x, tuning)()
print(json.dumps({name: len(found) for name, found in sorted(keys.items())}))
"""

EXPECTED = {
    "attention_forward": 1,
    "int8_product": 1,
    "int8_rows": 1,
    "kv_write": 1,
    "norm_backward": 2,  # rows held whole and rows gone over in tiles
    "norm_forward": 2,  # with the residual's addition and without
    "norm_weight_partials": 1,
    "paged_decode": 4,  # batches of up to 16, 32 and 64, as each program reads all lengths; and where none is split
    "paged_merge": 3,
    "paged_prefill": 1,
    "relu2_backward": 1,
    "relu2_forward": 1,
    "rms_norm_backward": 2,
    "scale": 1,  # it specializes on the product of R and C, a multiple of 16 as C is
    "sum_partials": 1,
    "swiglu_backward": 2,  # C that is a multiple of 16 has a row of the table to itself
    "swiglu_forward": 2,
}


@pytest.mark.slow
def test_decoding_compiles_for_no_batch_and_no_length():
    """16 batch sizes times 64 lengths, with the dense and the paged cache."""
    outside = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run([sys.executable, "-c", SCRIPT], capture_output=True, text=True, env=outside, check=False)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == EXPECTED
