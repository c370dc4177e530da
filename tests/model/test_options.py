"""The options of the model: each one's formula, and that any two of them work together."""

import dataclasses
import math

import pytest
import torch
import torch.nn.functional as F

from fastgpt.config.model import ModelConfig
from fastgpt.errors import UsageError
from fastgpt.model.facts import count_parameters, parameter_shapes
from fastgpt.model.gpt import GPT
from fastgpt.model.int8 import quantize_model
from fastgpt.model.kv_cache import DenseCache
from fastgpt.model.positions import position_table
from fastgpt.ops import table

V, T = 31, 12

options = [
    pytest.mark.parametrize(
        "norm", [{}, {"norm": "rmsnorm"}, {"norm": "rmsnorm", "norm_gain": False, "norm_eps": 1e-6}]
    ),
    pytest.mark.parametrize("mlp", [{}, {"mlp": "relu2"}, {"mlp": "swiglu"}, {"mlp": "swiglu", "n_inner": 20}]),
    pytest.mark.parametrize(
        "bias", [{}, {"bias": False}, {"bias": False, "attention_bias": True}, {"mlp_bias": False}]
    ),
    pytest.mark.parametrize("qk_norm", [{}, {"qk_norm": True}]),
    pytest.mark.parametrize("heads", [{}, {"head_size": 6}, {"n_kv_head": 2, "head_size": 8}]),
    pytest.mark.parametrize("position", [{}, {"position": "rotary", "rope_theta": 500.0, "rope_factor": 8.0}]),
    pytest.mark.parametrize("head", [{}, {"tie": False}, {"logit_softcap": 5.0}, {"tie": False, "logit_softcap": 9.0}]),
    pytest.mark.covering_array(2),
]


def every_pair_of_options(test):
    """Run the test on a covering array of all options, with `slow` on the whole grid."""
    for mark in options:
        test = mark(test)
    return test


def made(backend="torch", dtype=torch.float32, **changes):
    """A tiny model with weights five times as large as GPT-2's, and gains and biases that are not 1 and 0."""
    torch.manual_seed(0)
    shape = {"vocab_size": V, "block_size": T, "n_layer": 2, "n_head": 4, "n_embd": 16, **changes}
    model = GPT(ModelConfig(**shape), table.resolve(backend)).to(dtype)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 2:
                parameter.mul_(5)
            else:
                parameter.add_(0.3 * torch.randn_like(parameter))
    return model


def tokens_of(B=3, length=T):
    return torch.randint(V, (B, length), generator=torch.Generator().manual_seed(1))


def loss_and_gradients(model):
    loss = model(tokens_of(), tokens_of().roll(-1, 1))
    return [loss.detach(), *torch.autograd.grad(loss, list(model.parameters()))]


@every_pair_of_options
def test_backends_agree_and_caches_give_the_logits_of_one_pass(norm, mlp, bias, qk_norm, heads, position, head):
    settings = norm | mlp | bias | qk_norm | heads | position | head
    model, exact = (made(backend, torch.float64, **settings) for backend in ("torch", "reference"))
    exact.load_state_dict(model.state_dict())
    for ours, theirs in zip(loss_and_gradients(model), loss_and_gradients(exact), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-7, atol=1e-9)
    with torch.no_grad():
        expected, cache = model(tokens_of()), DenseCache(model.config, B=3, dtype=torch.float64)
        parts = [model(part, cache=cache) for part in tokens_of().split([5, 1, 3, 2, 1], dim=1)]
    torch.testing.assert_close(torch.cat(parts, dim=1), expected, rtol=1e-9, atol=1e-9)


@every_pair_of_options
def test_shapes_and_counts_are_those_of_the_model(norm, mlp, bias, qk_norm, heads, position, head):
    model = made(**norm, **mlp, **bias, **qk_norm, **heads, **position, **head)
    shapes = {name: tuple(tensor.shape) for name, tensor in model.weights().items()}
    assert parameter_shapes(model.config) == shapes
    numbers = sum(map(math.prod, shapes.values()))
    assert count_parameters(model.config) == model.num_parameters() == numbers


@every_pair_of_options
def test_int8_matrices_move_logits_a_little(norm, mlp, bias, qk_norm, heads, position, head):
    model = made(**norm, **mlp, **bias, **qk_norm, **heads, **position, **head)
    with torch.no_grad():
        before = model(tokens_of())
        quantize_model(model)
        after = model(tokens_of())
    assert not [name for name, p in model.named_parameters() if p.dim() == 2 and name != "wpe.weight"]
    assert 0 < (after - before).norm() < 0.1 * before.norm()
    assert (model.dtype, model.device.type) == (torch.float32, "cpu")


def test_an_rms_norm_has_no_bias_and_may_have_no_gain():
    with_gain, without = made(norm="rmsnorm", qk_norm=True), made(norm="rmsnorm", qk_norm=True, norm_gain=False)
    gains = {"ln_1.weight", "ln_2.weight", "attn.q_norm.weight", "attn.k_norm.weight"}
    removed = {f"h.{layer}.{name}" for layer in range(2) for name in gains} | {"ln_f.weight"}
    assert with_gain.weights().keys() - without.weights().keys() == removed
    assert not any("ln_" in name and name.endswith("bias") for name in with_gain.weights())


def test_queries_and_keys_are_normalized_before_they_are_turned():
    model = made(norm="rmsnorm", norm_gain=False, norm_eps=1e-12, qk_norm=True, position="rotary", bias=False)
    with torch.no_grad():
        before = model(tokens_of())
        model.h[0].attn.c_attn.weight[: 2 * 16] *= 3  # queries and keys, whose size is taken out again
        torch.testing.assert_close(model(tokens_of()), before, rtol=1e-4, atol=1e-4)
        model.h[0].attn.c_attn.weight[2 * 16 :] *= 3
        assert not torch.allclose(model(tokens_of()), before, rtol=1e-2)


def test_swiglu_gates_the_second_half_by_the_silu_of_the_first():
    mlp, x = made(mlp="swiglu", n_inner=20).h[1].mlp, torch.randn(2, 3, 16)
    gate, values = F.linear(x, mlp.c_fc.weight, mlp.c_fc.bias).split(20, dim=-1)
    expected = F.linear(gate * torch.sigmoid(gate) * values, mlp.c_proj.weight, mlp.c_proj.bias)
    torch.testing.assert_close(mlp(x), expected)


def test_relu2_is_the_square_of_the_positive_part():
    mlp, x = made(mlp="relu2").h[0].mlp, torch.randn(2, 3, 16)
    hidden = F.linear(x, mlp.c_fc.weight, mlp.c_fc.bias)
    torch.testing.assert_close(mlp(x), F.linear(hidden.clamp(min=0) ** 2, mlp.c_proj.weight, mlp.c_proj.bias))


@pytest.mark.parametrize(
    ("n_embd", "mlp", "inner"), [(768, "gelu", 3072), (768, "swiglu", 2048), (576, "swiglu", 1536), (16, "swiglu", 64)]
)
def test_a_gated_mlp_has_two_thirds_of_the_width(n_embd, mlp, inner):
    assert ModelConfig(n_embd=n_embd, mlp=mlp).inner == inner


def test_an_output_layer_of_its_own_has_its_own_gradient():
    tied, apart = made(), made(tie=False)
    assert apart.weights().keys() - tied.weights().keys() == {"lm_head.weight"}
    loss = apart(tokens_of(), tokens_of())
    loss.backward()
    assert apart.lm_head is not None
    unseen = sorted(set(range(V)) - set(tokens_of().flatten().tolist()))
    assert unseen
    assert apart.wte.weight.grad[unseen].abs().max() == 0  # only looked up, and these were not
    assert apart.lm_head.weight.grad[unseen].abs().min() > 0


def test_logits_are_bounded_smoothly():
    model = made(logit_softcap=1.0)
    with torch.no_grad():
        bounded = model(tokens_of())
        model.config = dataclasses.replace(model.config, logit_softcap=None)
        plain = model(tokens_of())
    assert plain.abs().max() > 1
    torch.testing.assert_close(bounded, torch.tanh(plain))


def test_with_zero_init_each_block_begins_as_the_identity():
    torch.manual_seed(0)
    model = GPT(ModelConfig(vocab_size=V, block_size=T, n_layer=3, n_head=4, n_embd=16, zero_init=True))
    x, _ = model.embed(tokens_of(), slice(0, T))
    with torch.no_grad():
        torch.testing.assert_close(model.hidden(tokens_of()), F.layer_norm(x, (16,)), rtol=0, atol=1e-6)
    loss = model(tokens_of(), tokens_of())
    gradient = torch.autograd.grad(loss, model.h[0].mlp.c_proj.weight)[0]
    assert gradient.abs().max() > 0


def test_with_zero_init_an_output_layer_of_its_own_gives_all_tokens_one_chance():
    model = GPT(ModelConfig(vocab_size=V, block_size=T, n_layer=1, n_head=4, n_embd=16, zero_init=True, tie=False))
    assert model(tokens_of(), tokens_of()).item() == pytest.approx(math.log(V), rel=1e-6)


def test_rope_theta_is_the_base_of_the_angles():
    config = ModelConfig(block_size=9, n_head=1, n_embd=6, position="rotary", rope_theta=500_000.0)
    rotation = position_table(config)
    assert rotation is not None
    for position in (1, 8):
        for pair in range(3):
            angle = position * 500_000.0 ** (-2 * pair / 6)
            expected = torch.tensor([math.cos(angle), math.sin(angle)])
            torch.testing.assert_close(rotation[position, pair], expected, rtol=1e-5, atol=1e-6)


def test_stretched_rotary_positions_are_those_of_llama_3():
    stretch = {"rope_factor": 8.0, "rope_original_context": 64, "rope_theta": 1000.0}
    plain, stretched = (
        position_table(ModelConfig(block_size=2, n_head=1, n_embd=16, position="rotary", **settings))
        for settings in ({"rope_theta": 1000.0}, stretch)
    )
    assert plain is not None
    assert stretched is not None
    before, after = (torch.atan2(*t[1].double().flip(-1).unbind(-1)) for t in (plain, stretched))
    turns = 64 * before / (2 * math.pi)  # 10.2, 4.3, 1.8, 0.76, ...
    ratio = after / before
    torch.testing.assert_close(ratio[turns > 4], torch.ones_like(ratio[turns > 4]), rtol=1e-5, atol=0)
    torch.testing.assert_close(ratio[turns < 1], torch.full_like(ratio[turns < 1], 1 / 8), rtol=1e-4, atol=0)
    between = (turns > 1) & (turns < 4)
    assert between.sum() == 1
    kept = (turns[between] - 1) / 3
    torch.testing.assert_close(ratio[between], kept + (1 - kept) / 8, rtol=1e-4, atol=0)


BAD = [
    ({"norm_gain": False}, "`norm_gain` off is for `norm` rmsnorm, and `norm` is layernorm; change one of them"),
    ({"rope_theta": 5e5}, "`rope_theta` 500000.0 is for `position` rotary, and `position` is learned; change one of"),
    ({"position": "none", "rope_factor": 2.0}, "`rope_factor` 2.0 is for `position` rotary, and `position` is none"),
    ({"position": "rotary", "rope_original_context": 9}, "`rope_original_context` 9 applies with `rope_factor`; set"),
    (
        {"position": "rotary", "rope_factor": 8.0, "rope_low_freq_factor": 4.0},
        "`rope_low_freq_factor` 4.0 must be below `rope_high_freq_factor` 4.0",
    ),
    ({"position": "rotary", "head_size": 5}, "`position` rotary turns pairs, and `head_size` 5 is odd; choose another"),
    ({"n_head": 5, "n_kv_head": 2, "head_size": 4}, "`n_kv_head` 2 does not divide `n_head` 5"),
]


@pytest.mark.parametrize(("settings", "message"), BAD)
def test_settings_that_do_not_go_together_are_named(settings, message):
    with pytest.raises(UsageError) as error:
        ModelConfig(**settings).check()
    assert str(error.value).startswith(message)


def test_attention_may_have_a_dropout_rate_of_its_own():
    seen: list[float] = []

    def attention(q: torch.Tensor, *rest: torch.Tensor, dropout_p: float, **more: object) -> torch.Tensor:
        seen.append(dropout_p)
        return torch.zeros_like(q)

    ops = dataclasses.replace(table.resolve("torch"), causal_attention=attention)
    cases = [({}, False, 0.0), ({"dropout": 0.5, "attention_dropout": 0.0}, True, 0.0)]
    for changes, drops, rate in [*cases, ({"attention_dropout": 0.25}, False, 0.25), ({"dropout": 0.5}, True, 0.5)]:
        model = GPT(ModelConfig(vocab_size=V, block_size=T, n_layer=2, n_head=4, n_embd=16, **changes), ops)
        first, second = (model.hidden(tokens_of()) for _ in range(2))
        assert torch.equal(first, second) is not drops
        assert seen == [rate] * 4
        seen.clear()


def test_head_size_frees_the_number_of_heads_from_the_width():
    ModelConfig(n_embd=768, n_head=5, head_size=64).check()
    with pytest.raises(UsageError, match="`n_head` 5 does not divide `n_embd` 768"):
        ModelConfig(n_embd=768, n_head=5).check()
