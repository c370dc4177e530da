"""The loss on a text: equal to a plain loop over windows, whatever the batch size, the stride and the weights' form."""

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from fastgpt.errors import RunFailed, UsageError
from fastgpt.evaluation import token_scores
from fastgpt.evaluation.sliding_window import Windows, measure, predicted_bytes
from fastgpt.model.int8 import quantize_model
from fastgpt.tokenizer.byte import ByteTokenizer
from tests.helpers.untrained import BLOCK, fresh

GENERATOR = fresh()
TOKENS = np.random.default_rng(0).integers(0, 11, 101).astype(np.uint16)


def plain(model, tokens: np.ndarray, stride: int) -> float:
    """Nats a token: each token but the first by the first window that reaches it, one window at a time."""
    text, total, predicted, start = torch.from_numpy(tokens.astype(np.int64)), 0.0, 1, 0
    while predicted < len(text):
        window = text[start : start + BLOCK + 1]
        with torch.no_grad():
            losses = F.cross_entropy(model(window[None, :-1])[0].double(), window[1:], reduction="none")
        fresh_ones = losses[predicted - start - 1 :]
        total, predicted, start = total + fresh_ones.sum().item(), start + len(window), start + stride
    return total / (len(text) - 1)


@pytest.mark.parametrize("stride", [BLOCK, 5, 1])
@pytest.mark.parametrize("count", [101, 2, BLOCK, BLOCK + 1, BLOCK + 2])
def test_the_loss_is_that_of_a_plain_loop_over_windows(count: int, stride: int):
    found = measure(GENERATOR.model, GENERATOR.tokenizer, TOKENS[:count], stride=stride, batch_size=3)
    assert found.loss == pytest.approx(plain(GENERATOR.model, TOKENS[:count], stride), rel=1e-6)
    assert (found.tokens, found.bytes, found.stride, found.block_size) == (count - 1, count - 1, stride, BLOCK)
    assert found.perplexity == pytest.approx(math.exp(found.loss))
    assert found.bits_per_byte == pytest.approx(found.loss / math.log(2))


def test_windows_end_to_end_are_the_default():
    found = measure(GENERATOR.model, GENERATOR.tokenizer, TOKENS)
    assert found.stride == BLOCK
    assert found.loss == pytest.approx(plain(GENERATOR.model, TOKENS, BLOCK), rel=1e-6)


@pytest.mark.parametrize("stride", [BLOCK, 3])
def test_the_loss_does_not_depend_on_the_batch_size(stride: int):
    losses = [
        measure(GENERATOR.model, GENERATOR.tokenizer, TOKENS, stride=stride, batch_size=batch_size).loss
        for batch_size in (1, 2, 7, 64, None)
    ]
    assert losses == pytest.approx([losses[0]] * len(losses), rel=1e-6)


@pytest.mark.parametrize(("count", "stride"), [(2, 4), (9, 4), (10, 4), (40, 8), (41, 1), (44, 3)])
def test_every_token_but_the_first_is_a_target_once_with_as_much_context_as_promised(count: int, stride: int):
    windows = Windows(np.arange(count), BLOCK, stride)
    targets = []
    for x, y in windows.batches(2, torch.device("cpu")):
        assert x.shape == y.shape
        for inputs, wanted in zip(x, y, strict=True):
            for at in (wanted >= 0).nonzero()[:, 0].tolist():
                assert wanted[at] == inputs[at] + 1
                assert at + 1 >= min(int(wanted[at]), BLOCK - stride)
                targets.append(int(wanted[at]))
    assert targets == list(range(1, count))
    assert windows.targets == count - 1


def test_few_logits_are_held_at_once(monkeypatch):
    whole = measure(GENERATOR.model, GENERATOR.tokenizer, TOKENS).loss
    monkeypatch.setattr(token_scores, "LOGITS", 50)  # 4 rows of a vocabulary of 11
    rows = []
    logits = GENERATOR.model.logits
    monkeypatch.setattr(GENERATOR.model, "logits", lambda x: rows.append(len(x)) or logits(x))
    assert measure(GENERATOR.model, GENERATOR.tokenizer, TOKENS).loss == pytest.approx(whole, rel=1e-6)
    assert rows == [4] * 25


def test_a_batch_that_does_not_fit_is_halved(monkeypatch):
    hidden, sizes = GENERATOR.model.hidden, []

    def short_of_memory(x, *rest, **named):
        sizes.append(len(x))
        if len(x) > 3:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return hidden(x, *rest, **named)

    whole = measure(GENERATOR.model, GENERATOR.tokenizer, TOKENS).loss
    monkeypatch.setattr(GENERATOR.model, "hidden", short_of_memory)
    done = []
    halved = measure(GENERATOR.model, GENERATOR.tokenizer, TOKENS, batch_size=8, advance=done.append)
    assert halved.loss == pytest.approx(whole, rel=1e-6)
    assert sizes == [8, 4, 2, 2, 4, 2, 2, 5, 2, 3]
    assert sum(done) == 100


def test_int8_weights_have_a_loss_too():
    generator = fresh()
    quantize_model(generator.model)
    found = measure(generator.model, generator.tokenizer, TOKENS, stride=3)
    assert found.loss == pytest.approx(plain(generator.model, TOKENS, 3), rel=1e-6)


def test_bits_per_byte_count_the_text_and_no_end_of_text():
    bytes_of = ByteTokenizer(ends=True)
    assert predicted_bytes(bytes_of, np.array([104, 256, 195, 169, 256])) == 2
    assert predicted_bytes(fresh(chars="aé한").tokenizer, np.array([0, 1, 2, 2])) == 2 + 3 + 3


def test_bits_per_byte_compare_across_tokenizers():
    """Two models that guess uniformly, one among 256 bytes and one among 4 characters of 2 bytes."""
    text, found = "éàüö" * 30, {}
    for chars in (None, "éàüö"):
        generator = fresh(chars=chars)
        with torch.no_grad():
            generator.model.wte.weight.zero_()
        measured = measure(generator.model, generator.tokenizer, generator.tokenizer.encode(text))
        found[chars] = measured.bits_per_byte
        assert measured.loss == pytest.approx(math.log(generator.tokenizer.vocab_size))
    assert found == {None: pytest.approx(8.0), "éàüö": pytest.approx(1.0)}  # of 8 bits, and of 2 bits for 2 bytes


def test_a_text_without_bytes_has_no_bits_per_byte():
    generator = fresh(chars=None)
    generator.tokenizer.end_token = 10
    assert measure(generator.model, generator.tokenizer, np.array([1, 10])).bits_per_byte is None


def test_a_stride_above_the_window_is_refused():
    with pytest.raises(UsageError, match="`stride` 9 is above block_size 8"):
        measure(GENERATOR.model, GENERATOR.tokenizer, TOKENS, stride=9)


def test_weights_that_are_not_numbers_are_an_error():
    generator = fresh()
    with torch.no_grad():
        generator.model.ln_f.weight.fill_(math.nan)
    with pytest.raises(RunFailed, match="loss is nan"):
        measure(generator.model, generator.tokenizer, TOKENS)
