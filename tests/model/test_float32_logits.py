"""Logits are float32 in every dtype and backend: they do not tie by rounding, and log-probabilities are right."""

import pytest
import torch

from fastgpt.config.generation import SamplingParams
from fastgpt.config.model import ModelConfig
from fastgpt.generation.sampler import Sampler
from fastgpt.model.gpt import GPT
from fastgpt.model.int8 import QuantizedEmbedding, quantize_model
from fastgpt.model.linear import Embedding
from fastgpt.ops import table
from fastgpt_kernels import float32_product as module
from fastgpt_kernels import reference, torch_ops
from fastgpt_kernels.float32_product import float32_product, product_by_pieces

HALVES = [torch.bfloat16, torch.float16]
halves = pytest.mark.parametrize("dtype", HALVES, ids=["bfloat16", "float16"])
V = 50_257


def relative_error(a: torch.Tensor, truth: torch.Tensor) -> float:
    return float((a.double() - truth).norm() / truth.norm())


def head(dtype: torch.dtype, C: int = 48) -> tuple[torch.Tensor, Embedding]:
    """A hidden state (1, C), and an output layer whose logits lie around -90, a few apart."""
    torch.manual_seed(0)
    x = torch.ones(1, C) + 0.1 * torch.randn(1, C)
    embedding = Embedding(V, C)
    embedding.weight.data = -90 / C + 0.3 * torch.randn(V, C)
    return x.to(dtype), embedding.to(dtype)


@pytest.mark.parametrize("quantized", [False, True], ids=["", "int8"])
@halves
def test_logprobs_of_a_large_vocabulary_are_those_of_float64(dtype: torch.dtype, quantized: bool):
    x, embedding = head(dtype)
    weight = embedding.weight.detach().double()
    if quantized:
        embedding = QuantizedEmbedding(embedding, table.resolve("torch"))
        weight = embedding.weight.double() * embedding.scale.double()[:, None]
    with torch.inference_mode():
        logits = embedding.scores(x)
    exact = x.double() @ weight.t()
    assert exact.mean() == pytest.approx(-90, abs=1)
    sampler = Sampler(1, V)
    sampler.begin(0, SamplingParams(temperature=0, logprobs=20), [])
    drawn = sampler(logits, [0], [0]).to_host()[0]
    wanted = exact.log_softmax(-1)[0].topk(20)
    assert drawn.top is not None
    assert drawn.token == drawn.top[0][0]
    assert [token for token, _ in drawn.top] == wanted.indices.tolist()
    assert [p for _, p in drawn.top] == pytest.approx(wanted.values.tolist(), abs=1e-4)


@pytest.mark.parametrize("dtype", [*HALVES, torch.float32, torch.float64], ids=str)
def test_on_the_meta_device_a_product_has_its_shape_and_dtype(dtype: torch.dtype):
    x, weight = torch.ones(2, 3, 8, dtype=dtype), torch.ones(5, 8, dtype=dtype)
    found, real = float32_product(x.to("meta"), weight.to("meta")), float32_product(x, weight)
    assert (found.shape, found.dtype) == (real.shape, real.dtype)


@pytest.mark.parametrize("quantized", [False, True], ids=["", "int8"])
@pytest.mark.parametrize("kernels", ["torch", "reference"])
@halves
def test_a_model_gives_float32_logits(kernels: str, dtype: torch.dtype, quantized: bool):
    config = ModelConfig(n_layer=1, n_head=2, n_embd=32, block_size=8, vocab_size=100)
    model = GPT(config, table.resolve(kernels)).to(dtype).eval()
    if quantized:
        quantize_model(model)
    with torch.inference_mode():
        hidden = model.hidden(torch.tensor([[1, 2, 3]]))
        logits = model.logits(hidden)
    weight = model.wte.weight.detach().double()
    if quantized:
        weight *= model.get_buffer("wte.scale").double()[:, None]
    assert hidden.dtype == dtype
    assert logits.dtype == torch.float32
    assert relative_error(logits, hidden.double() @ weight[:100].t()) < 1e-6


@pytest.mark.parametrize("backend", [reference, torch_ops], ids=["reference", "torch"])
@halves
def test_the_loss_is_of_float32_logits(backend, dtype: torch.dtype):
    """Evaluated at any size, and trained up to a size on a CPU."""
    x, embedding = head(dtype)
    targets = torch.tensor([7])
    for weight, trained in ((embedding.weight.detach(), False), (embedding.weight[:2000].detach(), True)):
        exact = reference.linear_cross_entropy(x.double(), weight.double(), targets)
        loss = backend.linear_cross_entropy(x, weight.requires_grad_(trained), targets)
        assert (loss.dtype, loss.requires_grad) == (torch.float32, trained)
        assert float(loss) == pytest.approx(float(exact), abs=1e-4)


def test_a_wide_head_is_trained_in_16_bits_on_a_cpu(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(torch_ops, "NARROW_HEAD", 50)
    made = []
    monkeypatch.setattr(
        torch_ops, "float32_product", lambda x, weight, _: (made.append(len(weight)), x @ weight.t())[1]
    )
    for V, trained in ((50, True), (51, True), (51, False)):
        weight = torch.randn(V, 4, dtype=torch.bfloat16, requires_grad=trained)
        torch_ops.linear_cross_entropy(torch.randn(3, 4).bfloat16(), weight, torch.tensor([1, 2, 3]))
    assert made == [50, 51]


@pytest.mark.parametrize("compiled", [False, True], ids=["", "compiled"])
@pytest.mark.parametrize("mixed", [False, True], ids=["", "autocast"])
@halves
def test_the_product_and_its_gradients(dtype: torch.dtype, mixed: bool, compiled: bool):
    torch.manual_seed(0)
    factors = [torch.randn(2, 3, 20), torch.randn(30, 20)]
    narrow, grad = [t.to(dtype) for t in factors], torch.randn(2, 3, 30)
    function = torch.compile(float32_product, fullgraph=True, backend="aot_eager") if compiled else float32_product

    def results(function, factors, grad):
        leaves = [t.clone().requires_grad_() for t in factors]
        y = function(*leaves)
        return y.detach(), *torch.autograd.grad(y, leaves, grad)

    truth = results(lambda x, weight: x @ weight.t(), [t.double() for t in narrow], grad.double())
    with torch.autocast("cpu", dtype, enabled=mixed):
        y, *gradients = results(function, factors if mixed else narrow, grad)
        with torch.no_grad():
            assert torch.equal(function(*narrow), y)
    assert y.dtype == torch.float32
    assert relative_error(y, truth[0]) < 1e-6
    for a, b in zip(gradients, truth[1:], strict=True):
        assert a.dtype == (torch.float32 if mixed else dtype)
        assert relative_error(a, b) < torch.finfo(dtype).eps


@pytest.mark.parametrize("compiled", [False, True], ids=["", "compiled"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_logits_of_padding_take_no_part_in_a_loss(dtype: torch.dtype, compiled: bool):
    """As for a GPU, whose products have the padded width."""
    torch.manual_seed(0)
    factors, targets = [torch.randn(6, 20).to(dtype), torch.randn(30, 20).to(dtype)], torch.randint(27, (6,))

    def loss(x, weight, outputs):
        return torch.nn.functional.cross_entropy(float32_product(x, weight, outputs), targets)

    def results(function, *arguments):
        leaves = [t.clone().requires_grad_() for t in factors]
        value = function(*leaves, *arguments)
        return value.detach(), *torch.autograd.grad(value, leaves)

    padded = torch.compile(loss, fullgraph=True, backend="aot_eager") if compiled else loss
    value, dx, dweight = results(padded, 27)
    expected, expected_dx, expected_dweight = results(lambda x, weight: loss(x, weight[:27], None))
    assert float(value) == pytest.approx(float(expected), abs=1e-6)
    assert relative_error(dx, expected_dx.double()) < 2 * torch.finfo(dtype).eps
    assert relative_error(dweight, expected_dweight.double()) < 2 * torch.finfo(dtype).eps
    assert not dweight[27:].any()
    assert (float32_product(*factors, 27)[:, 27:] == -torch.inf).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_wider_factors_stay_as_they_are(dtype: torch.dtype):
    x, weight = torch.randn(2, 5, dtype=dtype), torch.randn(7, 5, dtype=dtype)
    assert torch.equal(float32_product(x, weight), torch.nn.functional.linear(x, weight))


@pytest.mark.parametrize("rows", [1, module.FEW_ROWS + 1])
def test_pieces_make_one_product(rows: int):
    torch.manual_seed(0)
    inputs = 96 if rows == 1 else 1500
    x, weight = torch.randn(rows, inputs), torch.randn(3000, inputs).bfloat16()
    assert relative_error(product_by_pieces(x, weight), x.double() @ weight.double().t()) < 1e-6
    assert product_by_pieces(x, weight[:0]).shape == (rows, 0)
    assert product_by_pieces(x[:0], weight).shape == (0, 3000)
