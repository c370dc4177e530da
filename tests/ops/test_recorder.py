"""The recorder's notes of a call, by a function that calls operations as a model would."""

import pytest
import torch
import torch.nn.functional as F

from fastgpt.ops.recorder import Recorder
from fastgpt.ops.table import TABLE

META = torch.device("meta")
BFLOAT16 = torch.bfloat16


def parameter(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.empty(shape, dtype=dtype, device=META, requires_grad=True)


def test_an_output_is_read_in_the_dtype_of_the_product_that_reads_it():
    recorder = Recorder(BFLOAT16)
    x, gain, weight = parameter(2, 3, 8), parameter(8), parameter(8, 8)
    with recorder:
        y = recorder.ops.layer_norm(x, gain, None)
        branch = F.linear(y.view(6, 8), weight).view(2, 3, 8)
        x, y = recorder.ops.add_layer_norm(x, branch, gain)
        loss = recorder.ops.linear_cross_entropy(y, weight, torch.zeros(2, 3, dtype=torch.int64))
    norm, add, last = recorder.calls()
    assert branch.dtype == BFLOAT16
    assert norm.outputs == (((2, 3, 8), BFLOAT16),)
    assert norm.inputs[-1] is None
    assert add.outputs == (((2, 3, 8), torch.float32), ((2, 3, 8), BFLOAT16))
    assert [t and t.dtype for t in add.inputs] == [torch.float32, BFLOAT16, torch.float32]
    assert [t and t.dtype for t in last.inputs] == [BFLOAT16, torch.float32, torch.int64]
    assert [t and t.requires_grad for t in last.inputs] == [True, True, False]
    assert last.outputs == (((), torch.float32),)
    assert loss.requires_grad
    assert norm.autocast == add.autocast == last.autocast == BFLOAT16


@pytest.mark.parametrize(("op", "inputs"), [("rms_norm", 1), ("add_rms_norm", 2), ("swiglu", 1), ("relu2", 1)])
def test_what_stands_for_results_is_like_them(op, inputs):
    """Of operations that no workload of the tests has; see `recorder.RESULTS`."""
    x = torch.zeros(2, 3, 8, dtype=BFLOAT16)
    real, recorded = TABLE[op].torch(*[x] * inputs), getattr(Recorder().ops, op)(*[x.to(META)] * inputs)
    for a, b in zip(*(out if isinstance(out, tuple) else (out,) for out in (real, recorded)), strict=True):
        assert (a.shape, a.dtype) == (b.shape, b.dtype)


@pytest.mark.parametrize(
    "product",
    [
        F.linear,
        torch.matmul,
        lambda x, weight: x @ weight,
        lambda x, weight: torch.einsum("ij,jk->ik", x, weight),
        lambda x, weight: F.linear(input=x, weight=weight),
        lambda x, weight: torch.addmm(weight[0], x, weight),
    ],
)
def test_products_are_in_autocasts_dtype_and_nothing_else_is(product):
    recorder, x, weight = Recorder(BFLOAT16), parameter(4, 8), parameter(8, 8)
    with recorder:
        y = recorder.ops.layer_norm(x, weight[0], None)
        assert product(y, weight).dtype == BFLOAT16
        assert F.gelu(y).dtype == torch.float32
    (call,) = recorder.calls()
    assert call.outputs == (((4, 8), BFLOAT16),)


def test_views_share_a_storage_wherever_they_lie_in_it():
    recorder, packed = Recorder(), torch.empty(3, 2, 5, 6, 8, device=META)
    with torch.no_grad():
        for layer in packed:
            q, k, v = layer.split([2, 2, 2], dim=2)
            recorder.ops.causal_attention(q, k, v.clone(), dropout_p=0.0, seed=None)
    first, *others = recorder.calls()
    assert others == [first] * 2
    assert [(t.storage, t.offset, t.strides) for t in first.inputs if t] == [
        (0, 0, (240, 48, 8, 1)),
        (0, 16, (240, 48, 8, 1)),
        (1, 0, (80, 16, 8, 1)),
    ]
    assert first.arguments == (("dropout_p", 0.0), ("seed", None))
    assert first.outputs is None


def test_content_is_known_of_what_is_not_on_the_meta_device():
    recorder = Recorder()
    table, lengths = torch.tensor([[3, 1, 9], [0, 2, 8]], dtype=torch.int32).split([2, 1], dim=1)
    q, pages = torch.empty(2, 1, 4, device=META), torch.empty(4, 2, 1, 4, device=META)
    recorder.ops.paged_attention(q, pages, pages, table, lengths[:, 0])
    recorder.ops.kv_write(q, q, pages, pages, torch.tensor([3, -1]))
    attention, write = (call.case(torch.device("cpu")) for call in recorder.calls())
    assert [t.tolist() for t in attention.inputs[3:] if t is not None] == [[[3, 1], [0, 2]], [9, 8]]
    assert [t.tolist() for t in write.inputs[4:] if t is not None] == [[3, -1]]
    assert (attention.writes, write.writes) == ((), (2, 3))


def test_weights_in_16_bits_stay_so_without_autocast():
    recorder = Recorder()
    x, weight = parameter(2, 8, dtype=BFLOAT16), torch.empty(4, 8, dtype=torch.int8, device=META)
    with torch.no_grad(), recorder:
        y = recorder.ops.linear_int8(F.linear(x, parameter(8, 8, dtype=BFLOAT16)), weight, weight[:, 0].float())
        logits = recorder.ops.linear_int8(x, weight, weight[:, 0].float(), out_dtype=torch.float32)
    assert (y.shape, y.dtype, logits.dtype) == ((2, 4), BFLOAT16, torch.float32)
