"""The GPT: its sizes, its start, what a token may see, its dropout, and that its operations come from the table."""

import dataclasses
import math
from collections import Counter

import pytest
import torch
import torch.nn.functional as F

from fastgpt.config.model import ModelConfig
from fastgpt.config.training import PRESETS
from fastgpt.errors import CorruptCheckpoint, UsageError
from fastgpt.model.gpt import GPT
from fastgpt.model.positions import position_table, rotate
from fastgpt.ops.table import TABLE, resolve
from tests.helpers.covering import some

V, T = 61, 12  # tokens and context of the tiny model; the embedding has 128 rows
POSITIONS = ("learned", "sinusoidal", "rotary", "none")
positions = pytest.mark.parametrize("position", POSITIONS)
backends = pytest.mark.parametrize("backend", ["reference", "torch"])


LAYER = ("ln_1", "attn.c_attn", "attn.c_proj", "ln_2", "mlp.c_fc", "mlp.c_proj")


def tiny(backend="torch", **changes):
    """A model of two layers with weights five times as large as GPT-2's, so that attention is far from even."""
    shape = {"vocab_size": V, "block_size": T, "n_layer": 2, "n_head": 4, "n_embd": 16, **changes}
    torch.manual_seed(0)
    model = GPT(ModelConfig(**shape), resolve(backend))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(5 if parameter.dim() == 2 else 1)
    return model


def batch(B=3):
    generator = torch.Generator().manual_seed(1)
    return torch.randint(V, (2, B, T), generator=generator).unbind()


def loss_and_gradients(model, **arguments):
    model.zero_grad()
    loss = model(*batch(), **arguments)
    loss.backward()
    return [loss.detach(), *(p.grad for p in model.parameters())]


def relative(a, b):
    return ((a - b).norm() / b.norm()).item()


@pytest.mark.parametrize(
    ("preset", "vocab_size", "count"),
    [
        ("mini", 65, 12 * 4 * 64**2 + 13 * 4 * 64 + 2 * 64 + (128 + 65) * 64),
        ("mini", 50257, 12 * 4 * 64**2 + 13 * 4 * 64 + 2 * 64 + (128 + 50257) * 64),
        ("cpu", 65, 809_856),
        ("cpu", 96, 809_856 + 31 * 128),
        ("baby", 65, 10_770_816),
        ("gpt2", 50257, 124_439_808),
        ("gpt2-medium", 50257, 354_823_168),
        ("gpt2-large", 50257, 774_030_080),
        ("gpt2-xl", 50257, 1_557_611_200),
    ],
)
def test_parameters_are_counted_once_and_without_padding(preset, vocab_size, count):
    with torch.device("meta"):
        model = GPT(dataclasses.replace(PRESETS[preset], vocab_size=vocab_size))
    assert model.num_parameters() == count


def test_weights_carry_gpt2s_names():
    layer = [f"{module}.{kind}" for module in LAYER for kind in ("weight", "bias")]
    expected = {"wte.weight", "wpe.weight", "ln_f.weight", "ln_f.bias"}
    expected |= {f"h.{i}.{name}" for i in range(2) for name in layer}
    assert set(dict(tiny().named_parameters())) == expected
    assert set(tiny().state_dict()) == expected
    assert not any(name.endswith("bias") for name in tiny(bias=False).state_dict())


def test_weights_travel_without_the_padding():
    source, target = tiny(), tiny()
    with torch.no_grad():
        for parameter in target.parameters():
            parameter.fill_(7.0)
    assert source.weights()["wte.weight"].shape == (V, 16)
    target.load_weights(source.weights())
    assert torch.equal(target(batch()[0]), source(batch()[0]))
    assert not target.wte.weight[V:].any()


@pytest.mark.parametrize(("changes", "named"), [({"n_layer": 1}, "h.1.attn"), ({"n_embd": 20}, "wte.weight")])
def test_weights_of_another_shape_are_refused(changes, named):
    with pytest.raises(CorruptCheckpoint, match=named):
        tiny().load_weights(tiny(**changes).weights())


def test_weights_start_as_gpt2s_did():
    torch.manual_seed(0)
    model = GPT(ModelConfig(vocab_size=V, block_size=64, n_layer=8, n_head=4, n_embd=128))
    assert not model.wte.weight[V:].any()  # the padding
    for name, p in model.named_parameters():
        if name.endswith("bias"):
            assert not p.any(), name
        elif p.dim() == 1:
            assert torch.equal(p, torch.ones_like(p)), name
        else:
            p = p[:V] if name == "wte.weight" else p
            expected = 0.02 / math.sqrt(2 * 8) if "c_proj" in name else 0.02
            assert abs(p.std().item() / expected - 1) < 4 / math.sqrt(2 * p.numel()), name
            assert abs(p.mean().item()) < 4 * expected / math.sqrt(p.numel()), name


@positions
def test_untrained_loss_is_that_of_a_guess(position):
    torch.manual_seed(0)
    model = GPT(ModelConfig(vocab_size=V, block_size=T, n_layer=2, n_head=4, n_embd=16, position=position))
    assert model(*batch(B=32)).item() == pytest.approx(math.log(V), rel=0.02)


@backends
def test_vocabulary_padding_is_never_seen(backend):
    model, (tokens, targets) = tiny(backend), batch()
    assert model.wte.weight.shape[0] == 128
    logits, before = model(tokens), loss_and_gradients(model)
    assert logits.shape == (3, T, V)
    assert relative(before[0], F.cross_entropy(logits.flatten(0, 1), targets.flatten())) < 1e-6
    assert not model.wte.weight.grad[V:].any()
    with torch.no_grad():
        model.wte.weight[V:] = 100.0
    assert torch.equal(model(tokens), logits)
    assert torch.equal(model(tokens, targets), before[0])


def test_ignored_targets_do_not_count():
    model, (tokens, targets) = tiny(), batch()
    targets[:, 5:] = -100
    expected = F.cross_entropy(model(tokens)[:, :5].flatten(0, 1), targets[:, :5].flatten())
    torch.testing.assert_close(model(tokens, targets), expected)


@backends
@positions
@pytest.mark.parametrize("n_kv_head", [None, 1])
def test_a_token_changes_its_own_logits_and_later_ones_alone(backend, position, n_kv_head):
    model, (tokens, _) = tiny(backend, position=position, n_kv_head=n_kv_head), batch()
    before = model(tokens)
    for t in (1, 7, T - 1):
        changed = tokens.clone()
        changed[:, t] = (changed[:, t] + 1) % V
        after = model(changed)
        assert torch.equal(after[:, :t], before[:, :t])
        assert not torch.isclose(after[:, t:], before[:, t:]).all(-1).any()


def test_logits_of_the_last_position_alone():
    model, (tokens, _) = tiny(), batch()
    torch.testing.assert_close(model(tokens, last_only=True), model(tokens)[:, -1:])


def test_only_without_positions_is_order_forgotten():
    tokens = batch()[0]
    swapped = tokens[:, [1, 0, *range(2, T)]]
    for position in POSITIONS:
        model = tiny(position=position, n_layer=1)
        assert torch.allclose(model(tokens)[:, 2:], model(swapped)[:, 2:], atol=1e-5) == (position == "none")


def test_sinusoidal_positions_are_those_of_the_paper():
    table = position_table(ModelConfig(block_size=50, n_head=1, n_embd=6, position="sinusoidal"))
    for place in (0, 1, 49):
        for channel in range(6):
            angle = place / 10000 ** (channel // 2 * 2 / 6)
            expected = math.sin(angle) if channel % 2 == 0 else math.cos(angle)
            assert table[place, channel].item() == pytest.approx(expected, abs=1e-5)


def test_rotary_turns_each_pair_by_its_angle():
    table = position_table(ModelConfig(block_size=50, n_head=1, n_embd=6, position="rotary"))
    x = torch.randn(1, 50, 1, 6)
    turned = rotate(x, table)
    for place in (0, 1, 49):
        for i in range(3):
            pair = complex(x[0, place, 0, i], x[0, place, 0, i + 3])
            angle = place / 10000 ** (2 * i / 6)
            expected = pair * complex(math.cos(angle), math.sin(angle))
            assert turned[0, place, 0, i].item() == pytest.approx(expected.real, abs=1e-4)
            assert turned[0, place, 0, i + 3].item() == pytest.approx(expected.imag, abs=1e-4)


def test_rotary_scores_depend_on_the_distance_alone():
    table = position_table(ModelConfig(block_size=64, n_head=1, n_embd=8, position="rotary"))
    q, k = torch.randn(2, 1, 1, 1, 8).expand(2, 1, 64, 1, 8)
    q, k = rotate(q, table)[0, :, 0], rotate(k, table)[0, :, 0]
    scores = q @ k.t()
    for distance in (0, 3, 20):
        diagonal = scores.diagonal(-distance)
        torch.testing.assert_close(diagonal, diagonal[:1].expand_as(diagonal), rtol=1e-4, atol=1e-4)
    assert not torch.isclose(scores[3, 0], scores[20, 0])


@positions
@pytest.mark.parametrize("n_kv_head", [None, 2])
@pytest.mark.parametrize("dropout", [0.0, 0.25])
def test_reference_and_torch_columns_agree(position, n_kv_head, dropout):
    results = []
    for backend in ("reference", "torch"):
        model = tiny(backend, position=position, n_kv_head=n_kv_head, dropout=dropout)
        torch.manual_seed(2)
        results.append(loss_and_gradients(model))
    for a, b in zip(*results, strict=True):
        assert relative(a, b) < 1e-5


@backends
def test_dropout_follows_the_seed_in_training_and_is_off_in_evaluation(backend):
    model, tokens_and_targets = tiny(backend, dropout=0.25), batch()

    def loss(seed):
        torch.manual_seed(seed)
        return model(*tokens_and_targets).item()

    assert loss(1) == loss(1)
    assert loss(1) != loss(2)
    model.eval()
    assert loss(1) == loss(2) == tiny(backend)(*tokens_and_targets).item()


def counting(backend="torch"):
    """A backend whose functions note (op, keyword arguments) before they run."""
    calls, row_ops = [], resolve(backend)

    def noting(op):
        def call(*inputs, **arguments):
            calls.append((op, arguments))
            return getattr(row_ops, op)(*inputs, **arguments)

        return call

    return dataclasses.replace(row_ops, **{op: noting(op) for op in TABLE}), calls


@backends
def test_dropout_acts_on_embedding_attention_and_both_residual_branches(backend, monkeypatch):
    ops, calls = counting(backend)
    shapes = []

    def noted(x, p, training):
        assert p == 0.25
        shapes.append((tuple(x.shape), training))
        return x

    monkeypatch.setattr("fastgpt.model.gpt.F.dropout", noted)
    model = GPT(dataclasses.replace(tiny().config, dropout=0.25), ops)
    model(*batch())
    attention = [arguments for op, arguments in calls if op == "causal_attention"]
    assert shapes == [((3, T, 16), True)] * (1 + 2 * 2)
    assert [arguments["dropout_p"] for arguments in attention] == [0.25, 0.25]
    assert attention[0]["seed"] != attention[1]["seed"]
    calls.clear()
    model.eval()(*batch())
    assert [arguments["dropout_p"] for op, arguments in calls if op == "causal_attention"] == [0.0, 0.0]
    assert shapes[5:] == [((3, T, 16), False)] * 5


@backends
@pytest.mark.parametrize(("dropout", "training"), [(0.0, True), (0.25, False)])
def test_without_dropout_no_random_number_is_drawn(backend, dropout, training):
    model = tiny(backend, dropout=dropout).train(training)
    before = torch.get_rng_state()
    loss_and_gradients(model)
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("n_layer", [1, 3])
def test_the_model_is_built_from_the_tables_operations(n_layer):
    ops, calls = counting()
    model = GPT(dataclasses.replace(tiny().config, n_layer=n_layer), ops)
    model(*batch())
    expected = {"layer_norm": 1, "add_layer_norm": 2 * n_layer, "causal_attention": n_layer, "linear_cross_entropy": 1}
    assert Counter(op for op, _ in calls) == expected
    calls.clear()
    model(batch()[0])
    assert "linear_cross_entropy" not in dict(calls)


@pytest.mark.parametrize("backend", some(1, ["torch", "reference"]))
def test_compiled_model_gives_the_same_loss_and_gradients(backend):
    model = tiny(backend, position="rotary", n_kv_head=2)
    eager = loss_and_gradients(model)
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    model.zero_grad()
    loss = compiled(*batch())
    loss.backward()
    for a, b in zip([loss, *(p.grad for p in model.parameters())], eager, strict=True):
        assert relative(a, b) < 1e-6


def test_more_tokens_than_block_size_are_an_error_with_both_numbers():
    with pytest.raises(ValueError, match=f"{T + 1} tokens do not fit in block_size {T}"):
        tiny()(torch.zeros(1, T + 1, dtype=torch.long))


def test_a_model_without_a_vocabulary_is_an_error():
    with pytest.raises(UsageError, match="vocab_size is not set"):
        GPT(ModelConfig())
