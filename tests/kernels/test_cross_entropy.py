"""Linear cross-entropy: parity with float64 and stock PyTorch, guarded and poisoned, in every layout and chunk size."""

import itertools
import math

import pytest
import torch
from hypothesis import strategies as st

from fastgpt_kernels import cross_entropy, reference, torch_ops
from fastgpt_kernels.cross_entropy import linear_cross_entropy
from tests.helpers.covering import some
from tests.helpers.cross_entropy_cases import (
    chunks_of,
    dtypes,
    grad_of,
    inputs_of,
    labels,
    plain,
    reductions,
)
from tests.helpers.parity import (
    DEVICE,
    LAYOUTS,
    assert_op_agrees,
    assert_parity,
    outputs_and_gradients,
    relative_errors,
    same_bits,
)
from tests.helpers.random_cases import random_cases

OP = "linear_cross_entropy"


# Of very few columns or channels gradients are small differences now and then, so these have a test of their own.
VOCABULARIES = st.one_of(st.integers(5, 90), st.sampled_from([127, 128, 129, 1007, 1009, 1023, 1024, 1025, 2999]))
CHANNELS = st.one_of(st.integers(2, 30).map(lambda n: 2 * n + 1), st.sampled_from([8, 64, 129]))


@random_cases(
    3,
    40,
    data=st.data(),
    lead=st.lists(st.integers(0, 4), max_size=3),
    C=CHANNELS,
    V=VOCABULARIES,
    seed=st.integers(0, 99),
)
@reductions
@dtypes
@pytest.mark.covering_array(1)
def test_agrees_at_any_shape_layout_and_chunk_size(dtype, reduction, data, lead, C, V, seed):
    torch.manual_seed(seed)
    if dtype == torch.float16:  # in a few numbers stock PyTorch's roundings are small by luck now and then
        lead, C, V = [*lead[:2], 8], C + 32, V + 64
    layout = st.sampled_from([*LAYOUTS])
    strided = ["dense", "gapped", "swapped", "transposed", *(["expanded"] if dtype == torch.float32 else [])]
    valid_vocab = data.draw(st.one_of(st.none(), st.integers(5, V), st.just(V)), "valid_vocab")
    ignore_index = data.draw(st.sampled_from([-100, -1, 0, 1, V + 3, 2**31 - 1]), "ignore_index")
    targets = labels(
        lead,
        valid_vocab or V,
        ignored=data.draw(st.sampled_from([0.0, 0.3, 1.0]), "ignored"),
        ignore_index=ignore_index,
        dtype=data.draw(st.sampled_from([torch.int64, torch.int32]), "targets"),
    )
    dense_weight = st.sampled_from(["dense", "gapped", "transposed"])
    layouts = data.draw(st.sampled_from(strided), "x"), data.draw(dense_weight, "weight")
    rows = data.draw(st.sampled_from([1, 2, 3, 5, 1000]), "rows")
    softcap = data.draw(st.sampled_from([None, 2.0, 30.0]), "softcap")
    grad_layout = data.draw(layout, "grad_out") if reduction == "none" and lead else "dense"

    inputs, options = inputs_of(lead, C, V, dtype, layouts), {"layout": grad_layout, "plain": plain}
    arguments = {"targets": targets, "ignore_index": ignore_index, "valid_vocab": valid_vocab, "softcap": softcap}
    with chunks_of(rows, V, dtype):
        assert_op_agrees(linear_cross_entropy, OP, inputs, reduction=reduction, **options, **arguments)


EDGES = [
    # (V, valid_vocab): on either side of a tile of 1024 or 4096 columns, of the table's first row, of the alignment
    *((V, None) for V in (15, 16, 17, 1008, 1009, 1024, 1025, 4095, 4096, 4097, 8193)),
    *((1024, 1023), (1040, 1024), (1040, 1025), (4112, 4096), (4097, 3), (8200, 4097), (5003, 4995)),
]


@dtypes
@pytest.mark.parametrize(("V", "valid_vocab"), some(6, EDGES))
@pytest.mark.covering_array(1)
def test_agrees_around_every_tile_and_alignment(V, valid_vocab, dtype):
    torch.manual_seed(0)
    targets = torch.tensor([0, (valid_vocab or V) - 1, -100, 1, 2], device=DEVICE)
    for reduction in ("sum", "none"):
        inputs = inputs_of((5,), 33, V, dtype)
        with chunks_of(2, V, dtype):
            assert_op_agrees(
                linear_cross_entropy, OP, inputs, targets=targets, valid_vocab=valid_vocab, reduction=reduction
            )


@dtypes
@reductions
@pytest.mark.parametrize("softcap", [1.5, 15.0])
@pytest.mark.covering_array(1)
def test_logits_are_capped_also_beside_padding(softcap, reduction, dtype):
    torch.manual_seed(0)
    inputs, targets = inputs_of((5,), 33, 1030, dtype), torch.tensor([0, 1024, -100, 1, 2], device=DEVICE)
    with chunks_of(2, 1030, dtype):
        arguments = {"targets": targets, "valid_vocab": 1025, "reduction": reduction, "softcap": softcap}
        assert_op_agrees(linear_cross_entropy, OP, inputs, **arguments)


def test_a_capped_logit_of_any_size_is_the_cap():
    x, weight = torch.tensor([[1e30, 0.0]], device=DEVICE), torch.tensor([[1.0, 0.0], [-1.0, 0.0]], device=DEVICE)
    loss = linear_cross_entropy(x, weight, torch.tensor([1], device=DEVICE), softcap=3.0)
    assert loss.item() == pytest.approx(math.log(1 + math.exp(6.0)), rel=1e-6)


@reductions
@pytest.mark.parametrize("lead", [(), (1,), (3, 2)])
@pytest.mark.parametrize(("C", "V"), [(1, 2), (1, 3), (2, 2), (3, 4), (3, 17)])
@pytest.mark.covering_array(1)
def test_agrees_on_a_few_columns_and_channels(C, V, lead, reduction):
    torch.manual_seed(0)
    arguments = {"targets": labels(lead, V), "reduction": reduction, "plain": plain}
    assert_op_agrees(linear_cross_entropy, OP, inputs_of(lead, C, V), **arguments)


@dtypes
@reductions
@pytest.mark.covering_array(1)
def test_one_valid_column_has_no_loss_and_no_gradient(reduction, dtype):
    torch.manual_seed(0)
    for V, valid_vocab in ((1, None), (20, 1)):
        inputs, targets = inputs_of((4,), 5, V, dtype), labels((4,), 1)
        assert_op_agrees(
            linear_cross_entropy, OP, inputs, targets=targets, valid_vocab=valid_vocab, reduction=reduction
        )


@reductions
@dtypes
@pytest.mark.covering_array(1)
def test_ignored_rows_count_for_nothing(dtype, reduction):
    torch.manual_seed(0)
    x, weight = inputs_of((6,), 5, 20, dtype)
    targets = torch.tensor([3, -1, -1, 0, 19, -1], device=DEVICE)
    grad = torch.rand((6,) if reduction == "none" else (), device=DEVICE) + 1

    def results(*inputs, targets, grad=grad):
        arguments = {"targets": targets, "ignore_index": -1, "reduction": reduction}
        return outputs_and_gradients(linear_cross_entropy, inputs, [grad], **arguments)

    loss, dx, dweight = results(x, weight, targets=targets)
    kept = targets >= 0
    assert not dx[~kept].any()
    alone = results(x[kept], weight, targets=targets[kept], grad=grad[kept] if reduction == "none" else grad)
    assert_parity([loss[kept] if reduction == "none" else loss, dx[kept]], alone[:2], [t.double() for t in alone[:2]])
    assert max(relative_errors(dweight, alone[2].double())) < torch.finfo(dtype).eps
    for t in results(x, weight, targets=torch.full_like(targets, -1)):
        assert not t.any()  # and so not NaN
        assert t.isfinite().all()


@reductions
@dtypes
@pytest.mark.covering_array(1)
def test_padding_changes_nothing_whatever_it_holds(dtype, reduction):
    torch.manual_seed(0)
    x, weight = inputs_of((3, 2), 5, 23, dtype)
    arguments = {"targets": labels((3, 2), 19), "valid_vocab": 19, "reduction": reduction}
    grad = grad_of(reduction, (3, 2))
    results = {}
    for number in (0.0, torch.finfo(dtype).max, -torch.finfo(dtype).max, math.nan):
        weight[19:] = number
        results[number] = outputs_and_gradients(linear_cross_entropy, [x, weight], [grad], **arguments)
        assert not results[number][2][19:].any()
    for number, (loss, dx, dweight) in results.items():
        assert torch.equal(loss, results[0.0][0])
        assert torch.equal(dweight, results[0.0][2])
        assert math.isnan(number) or torch.equal(dx, results[0.0][1])  # NaN times a gradient of zero is NaN


def assert_logits_agree(logits, targets, dtype, grad=None, **arguments):
    """Parity with weight and x such that these are the logits, exactly: each row of x chooses a column of weight."""
    x, weight = torch.eye(len(logits), device=DEVICE).to(dtype), logits.t().contiguous().to(dtype)
    targets = torch.tensor(targets, device=DEVICE)
    grad = torch.ones(targets.shape, device=DEVICE) if grad is None else grad
    for reduction, g in (("none", grad), ("sum", grad[0])):
        run = {"targets": targets, "reduction": reduction, **arguments}
        ours, plain, (loss, _, dweight) = (
            outputs_and_gradients(function, [t.to(wide) for t in (x, weight)], [g.to(out)], **run)
            for function, wide, out in (
                (linear_cross_entropy, dtype, torch.float32),
                (torch_ops.linear_cross_entropy, dtype, torch.float32),
                (reference.linear_cross_entropy, torch.float64, torch.float64),
            )
        )
        # Not dx = dz @ weight: at large weights it is a small difference of large numbers, whatever computes it.
        assert_parity([ours[0], ours[2]], [plain[0], plain[2]], [loss, dweight])


@pytest.mark.parametrize(
    ("dtype", "offset"),
    [
        *((torch.float32, offset) for offset in (0.0, -30.0, 100.0, -100.0, 1e3, 1e4, -1e4)),
        *((torch.float16, offset) for offset in (0.0, -30.0, 512.0, -1024.0)),
    ],
)
def test_an_offset_of_all_logits_costs_no_accuracy(dtype, offset):
    logits = torch.tensor([[0.0, -1.0, -2.0, -1.5]]).repeat(4, 1) + offset
    assert_logits_agree(logits.to(DEVICE), [0, 1, 2, 3], dtype)


@pytest.mark.parametrize(("dtype", "large"), [(torch.float32, 1e4), (torch.float16, 6e4), (torch.float16, -6e4)])
def test_large_logits_stay_finite_and_near(dtype, large):
    logits = torch.tensor([[large, large, -large, 0], [large] * 4, [-large, 0, 0, 0], [0, 0, 1, 2]], device=DEVICE)
    assert_logits_agree(logits, [0, 3, 1, 2], dtype)  # the nearest
    assert_logits_agree(logits, [2, 1, 0, 0], dtype)  # the farthest


@dtypes
def test_targets_that_are_all_but_certain_or_all_but_impossible(dtype):
    logits = torch.tensor([[20.0, 0, -5], [8, -8, -8], [0, 0, 30], [0.5, 0, 0]], device=DEVICE)
    assert_logits_agree(logits, [0, 0, 2, 1], dtype)
    assert_logits_agree(logits, [2, 1, 0, 1], dtype)
    # Losses that are all tiny have lost digits in the sum of exponentials, which is close to 1 in float32.
    x, targets = torch.eye(2, device=DEVICE).to(dtype), torch.tensor([0, 2], device=DEVICE)
    weight = logits[::2].t().to(dtype)
    losses = linear_cross_entropy(x, weight, targets, reduction="none")
    expected = reference.linear_cross_entropy(x.double(), weight.double(), targets, reduction="none")
    assert (losses >= 0).all()
    assert (losses - expected).abs().max() <= torch.finfo(torch.float32).eps


@dtypes
def test_rows_and_weights_of_zeros(dtype):
    torch.manual_seed(0)
    x, weight = inputs_of((4,), 5, 20, dtype)
    x[1] = 0
    assert_op_agrees(linear_cross_entropy, OP, [x, weight], targets=labels((4,), 20), reduction="none")
    loss, dx, dweight = outputs_and_gradients(
        linear_cross_entropy, [x, weight * 0], [torch.ones((), device=DEVICE)], targets=labels((4,), 20)
    )
    assert loss.item() == pytest.approx(math.log(20), rel=1e-6)
    assert not dx.any()
    assert dweight.any()


GRADS = {
    "zero": [0.0, 0.0, 0.0, 0.0, 0.0],
    "some zero": [0.0, 1.0, 0.0, -2.0, 0.0],
    "negative": [-1.0, -0.3, -7.0, -1e-3, -2.0],
    "all large": [3e4, -2e4, 1e4, 4e4, 5e3],
    "all small": [3e-7, -2e-7, 1e-7, 4e-8, 1e-7],
    "powers of two": [1.0, 2.0, 0.5, 0.25, 4.0],
    "of different size": [1e4, 1e-4, 1.0, -1e-2, 1e2],
}


@dtypes
@pytest.mark.parametrize("grads", GRADS.values(), ids=GRADS)
@pytest.mark.covering_array(1)
def test_gradients_of_single_losses_of_any_size(grads, dtype):
    torch.manual_seed(0)
    inputs, arguments = inputs_of((5,), 9, 33, dtype), {"targets": labels((5,), 33), "reduction": "none"}
    inputs[1] /= 4 if max(grads) > 1e4 else 1  # so that float16 holds the gradients
    grad = torch.tensor(grads, device=DEVICE)
    truth = outputs_and_gradients(
        reference.linear_cross_entropy, [t.double() for t in inputs], [grad.double()], **arguments
    )
    plain = outputs_and_gradients(torch_ops.linear_cross_entropy, inputs, [grad], **arguments)
    assert_parity(outputs_and_gradients(linear_cross_entropy, inputs, [grad], **arguments), plain, truth)


@pytest.mark.parametrize("size", [1e-30, 1e30])
def test_float32_gradients_keep_their_accuracy_at_extreme_sizes(size):
    torch.manual_seed(0)
    inputs, arguments = inputs_of((5,), 9, 33), {"targets": labels((5,), 33), "reduction": "none"}
    grad = torch.randn(5, device=DEVICE) * size
    truth = outputs_and_gradients(
        reference.linear_cross_entropy, [t.double() for t in inputs], [grad.double()], **arguments
    )
    got = outputs_and_gradients(linear_cross_entropy, inputs, [grad], **arguments)
    for a, b in zip(got, truth, strict=True):
        assert max(relative_errors(a, b)) < 1e-5


@dtypes
@reductions
@pytest.mark.covering_array(1)
def test_the_chunk_size_changes_no_loss_and_hardly_a_gradient(reduction, dtype):
    torch.manual_seed(0)
    # small whole numbers: their products are exact in any order, so that only the kernel could differ
    x, weight = (torch.randint(-2, 3, shape, device=DEVICE).to(dtype) for shape in ((11, 6), (37, 6)))
    targets, grad = labels((11,), 37, ignored=0.2), grad_of(reduction, (11,))

    def results(rows):
        with chunks_of(rows, 37, dtype):
            return outputs_and_gradients(
                linear_cross_entropy, [x, weight], [grad], targets=targets, reduction=reduction
            )

    whole = results(1000)
    for rows in (1, 2, 3, 4, 10, 11):
        got = results(rows)
        assert torch.equal(got[0], whole[0])
        for a, b in zip(got[1:], whole[1:], strict=True):
            assert max(relative_errors(a, b.double())) <= (1e-6 if dtype == torch.float32 else 2**-10)  # an ulp


def test_float16_gradients_of_a_mean_over_many_rows_do_not_underflow():
    """The sum over a few rows times 1 / 65,536 takes the factor where a mean over 65,536 rows does."""
    torch.manual_seed(0)
    inputs, factor = inputs_of((64,), 33, 50, torch.float16), torch.tensor(2.0**-16, device=DEVICE)
    arguments = {"targets": labels((64,), 50), "reduction": "sum"}
    assert_many_rows_agree(inputs, factor, **arguments)


def assert_many_rows_agree(inputs, grad, **arguments):
    truth = outputs_and_gradients(
        reference.linear_cross_entropy, [t.double() for t in inputs], [grad.double()], **arguments
    )
    plain = outputs_and_gradients(torch_ops.linear_cross_entropy, inputs, [grad], **arguments)
    ours = outputs_and_gradients(linear_cross_entropy, inputs, [grad], **arguments)
    assert_parity(ours, plain, truth)
    for a, b, c in zip(ours[1:], plain[1:], truth[1:], strict=True):
        assert relative_errors(a, c)[0] < relative_errors(b, c)[0] / 2  # stock's has underflown
        assert a[c.abs() > 2**-23].all()


@pytest.mark.slow
def test_float16_gradients_of_a_mean_over_64k_rows_do_not_underflow(monkeypatch):
    """In the interpreter, which takes minutes for that many programs, the rows of a chunk repeat its first 32."""
    torch.manual_seed(0)
    R, distinct, call = 65536, 32, cross_entropy.Launch.__call__

    def first_rows_only(self):
        if self.name != "cross_entropy":
            return call(self)
        call(self._replace(grid=(distinct,)))
        for t in self.args[:3]:  # logits or their gradient, losses, statistics
            t.unflatten(0, (-1, distinct))[1:] = t[:distinct]

    if DEVICE == "cpu":
        monkeypatch.setattr(cross_entropy.Launch, "__call__", first_rows_only)
    x, weight = inputs_of((distinct,), 5, 40, torch.float16)
    x, targets = (t.repeat(R // distinct, *[1] * (t.dim() - 1)).contiguous() for t in (x, labels((distinct,), 40)))
    with chunks_of(8192, 40, torch.float16):
        assert_many_rows_agree([x, weight], torch.ones((), device=DEVICE), targets=targets)


@pytest.mark.parametrize("reduction", some(1, ["mean", "sum", "none"]))
def test_weight_gradients_in_16_bits_are_summed_in_float32_over_chunks(reduction):
    """Logits are zero and so dz is -1/2 and 1/2: float16 would lose each 1/2 that is added to 1024."""
    R = 201
    x = torch.ones(R, 1, device=DEVICE, dtype=torch.float16)
    x[0] = 2048
    weight, targets = torch.zeros(2, 1, device=DEVICE, dtype=torch.float16), labels((R,), 1)
    grad = torch.ones((R,) if reduction == "none" else (), device=DEVICE) * (R if reduction == "mean" else 1)
    with chunks_of(1, 2, torch.float16):
        *_, dweight = outputs_and_gradients(
            linear_cross_entropy, [x, weight], [grad], targets=targets, reduction=reduction
        )
    assert dweight.flatten().tolist() == [-1124.0, 1124.0]


@reductions
def test_repeated_runs_give_the_same_bits(reduction):
    torch.manual_seed(0)
    inputs, grad = inputs_of((7,), 9, 40), grad_of(reduction, (7,))
    arguments = {"targets": labels((7,), 40, ignored=0.2), "reduction": reduction}
    with chunks_of(2, 40):
        first, *others = (outputs_and_gradients(linear_cross_entropy, inputs, [grad], **arguments) for _ in range(3))
    assert all(same_bits(first, other) for other in others)


@pytest.mark.parametrize("target", [-1, -101, 19, 22, 23, 10**6, 2**40, -(2**40)])
def test_the_kernel_itself_gives_nan_for_a_target_out_of_range(target, monkeypatch):
    monkeypatch.setattr(cross_entropy, "_check_targets", lambda *args: None)
    torch.manual_seed(0)
    inputs, targets = inputs_of((4,), 5, 23), labels((4,), 19)
    expected = linear_cross_entropy(*inputs, targets, valid_vocab=19, reduction="none")
    targets[2] = target
    got = linear_cross_entropy(*inputs, targets, valid_vocab=19, reduction="none")
    assert got[2].isnan()
    others = [0, 1, 3]
    assert torch.equal(got[others], expected[others])
    for reduction, trained in itertools.product(("mean", "sum"), (False, True)):
        leaves = [t.clone().requires_grad_(trained) for t in inputs]
        loss = linear_cross_entropy(*leaves, targets, valid_vocab=19, reduction=reduction)
        assert loss.isnan()
        if trained:  # and a gradient that a loss scaler or a norm notices
            dx, dweight = torch.autograd.grad(loss, leaves)
            assert dx[2].isnan().all()
            assert dx[others].isfinite().all()
            assert dweight[:19].isnan().all()


TARGETS = {
    "every other": lambda: torch.arange(10, device=DEVICE)[::2],
    "a column": lambda: torch.arange(10, device=DEVICE).view(5, 2)[:, 1:],
    "one for all": lambda: torch.tensor(3, device=DEVICE).expand(5),
}


@reductions
@pytest.mark.parametrize("layout", TARGETS)
@pytest.mark.covering_array(1)
def test_targets_may_lie_apart(layout, reduction):
    torch.manual_seed(0)
    targets = TARGETS[layout]()
    inputs = inputs_of(targets.shape, 7, 12)
    grad = grad_of(reduction, targets.shape)
    got, expected = (
        outputs_and_gradients(linear_cross_entropy, inputs, [grad], targets=t, reduction=reduction)
        for t in (targets, targets.clone(memory_format=torch.contiguous_format))
    )
    assert same_bits(got, expected)
