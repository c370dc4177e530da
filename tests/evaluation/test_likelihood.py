"""The likelihood of continuations: equal to plain forward passes, and a shared context is computed once."""

import pytest
import torch

from fastgpt.errors import RunFailed, UsageError
from fastgpt.evaluation.likelihood import Request, encode_pair, is_cut, log_likelihoods
from fastgpt.model import kv_cache
from fastgpt.model.kv_cache import page_bytes
from tests.helpers.corpora import needs_gpt2
from tests.helpers.untrained import BLOCK, fresh

POSITIONS = ("learned", "rotary")
SHARED = [Request((1, 2, 3), own) for own in ((4,), (5, 6, 7), (4, 4), (8,))]
OTHER = [Request((9, 2, 3), own) for own in ((1, 1), (2,))]  # of the same length
SINGLE = [Request((7,), (1, 2)), Request((1, 2, 3, 4, 5), (6,)), Request((3,) * 20, (1, 2, 3))]
ALL = [*SHARED[:2], SINGLE[0], *OTHER, *SHARED[2:], *SINGLE[1:]]


def plain(model, request: Request) -> tuple[float, bool]:
    ids = torch.tensor([*request.context, *request.continuation])[-(BLOCK + 1) :]
    with torch.no_grad():
        logs = model(ids[None, :-1])[0].double().log_softmax(-1)[-len(request.continuation) :]
    targets = ids[-len(request.continuation) :]
    return logs.gather(1, targets[:, None]).sum().item(), bool((logs.argmax(-1) == targets).all())


def computed(model, monkeypatch) -> list[tuple[int, int]]:
    """The shapes of the tokens that go through the model from now on."""
    shapes, hidden = [], model.hidden
    monkeypatch.setattr(model, "hidden", lambda x, *rest, **named: shapes.append(x.shape) or hidden(x, *rest, **named))
    return shapes


@pytest.mark.parametrize("position", POSITIONS)
@pytest.mark.parametrize("batch_size", [1, 2, 3, None])
def test_likelihoods_are_those_of_plain_forward_passes(position: str, batch_size: int | None):
    model = fresh(position).model
    found = log_likelihoods(model, ALL, batch_size=batch_size)
    for request, own in zip(ALL, found, strict=True):
        nats, greedy = plain(model, request)
        assert own.nats == pytest.approx(nats, rel=1e-5)
        assert own.greedy is greedy


def test_a_continuation_of_the_likeliest_tokens_is_greedy():
    generator, ids = fresh(), [1, 2, 3]
    for _ in range(3):
        with torch.no_grad():
            ids.append(int(generator.model(torch.tensor([ids]))[0, -1].argmax()))
    other = (*ids[3:5], (ids[5] + 1) % 11)
    found = log_likelihoods(generator.model, [Request((1, 2, 3), tuple(ids[3:])), Request((1, 2, 3), other)])
    assert [own.greedy for own in found] == [True, False]


def test_a_shared_context_is_computed_once(monkeypatch):
    generator = fresh()
    shapes = computed(generator.model, monkeypatch)
    log_likelihoods(generator.model, SHARED)
    assert shapes == [(1, 3), (4, 2)]  # the context, and of each continuation what comes before its last token
    shapes.clear()
    log_likelihoods(generator.model, [*SHARED[:2], *OTHER, *SHARED[2:]])
    assert shapes == [(2, 3), (6, 2)]  # contexts of one length together, wherever their continuations stand
    shapes.clear()
    log_likelihoods(generator.model, SHARED, batch_size=2)
    assert shapes == [(1, 3), (2, 2), (2, 1)]
    shapes.clear()
    log_likelihoods(generator.model, [SHARED[0], SHARED[3]])
    assert shapes == [(1, 3)]  # one token each: the context says all


def test_a_batch_that_does_not_fit_is_halved(monkeypatch):
    model = fresh().model
    whole, hidden = log_likelihoods(model, ALL), model.hidden

    def short_of_memory(x, *rest, **named):
        if len(x) > 1:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return hidden(x, *rest, **named)

    monkeypatch.setattr(model, "hidden", short_of_memory)
    done = []
    halved = log_likelihoods(model, ALL, advance=done.append)
    assert [own.nats for own in halved] == pytest.approx([own.nats for own in whole], rel=1e-5)
    assert sum(done) == len(ALL)


def test_a_cache_that_does_not_fit_is_halved(monkeypatch):
    model = fresh().model
    whole, room = log_likelihoods(model, ALL), page_bytes(model.config, 2 * BLOCK, torch.float32)
    monkeypatch.setattr(kv_cache, "free_memory", lambda device: room)
    assert [own.nats for own in log_likelihoods(model, ALL)] == pytest.approx([own.nats for own in whole], rel=1e-5)
    monkeypatch.setattr(kv_cache, "free_memory", lambda device: 0)
    with pytest.raises(RunFailed, match="a single context do not fit into the memory"):
        log_likelihoods(model, ALL)


def test_no_requests_have_no_likelihoods():
    assert log_likelihoods(fresh().model, []) == []


def test_a_context_that_is_too_long_is_cut_on_the_left():
    assert not is_cut(Request((1,) * 6, (2,) * 3), BLOCK)
    assert is_cut(Request((1,) * 7, (2,) * 3), BLOCK)
    model = fresh().model
    long, short = log_likelihoods(model, [Request((9, *[4] * 7), (5, 6)), Request((4,) * 7, (5, 6))])
    assert long == short


def test_a_continuation_longer_than_the_window_is_refused():
    with pytest.raises(UsageError, match="9 tokens is longer than the model's block_size 8"):
        log_likelihoods(fresh().model, [Request((1,), (2,) * 9)])


def test_likelihoods_that_are_not_numbers_are_an_error():
    model = fresh().model
    with torch.no_grad():
        model.ln_f.weight.fill_(float("nan"))
    with pytest.raises(RunFailed, match="not finite"):
        log_likelihoods(model, SHARED)


@pytest.mark.parametrize(
    ("context", "continuation", "expected"),
    [
        ("ab", "c", ("ab", "c")),
        ("ab ", "c", ("ab", " c")),
        ("ab \n", " c", ("ab", " \n c")),
        ("", "cd", ("\n", "cd")),
        ("", "\ncd", ("\n", "cd")),  # the start token is not given twice
        (" ", "cd", ("\n", " cd")),
    ],
)
def test_spaces_at_the_end_of_a_context_belong_to_the_continuation(context, continuation, expected):
    tokenizer = fresh(chars="\n abcd").tokenizer
    assert encode_pair(tokenizer, context, continuation) == tuple(
        tuple(tokenizer.encode(text).tolist()) for text in expected
    )


@needs_gpt2
def test_a_word_keeps_the_space_before_it():
    from fastgpt.tokenizer.gpt2 import Gpt2Tokenizer

    tokenizer = Gpt2Tokenizer.from_files()
    request = encode_pair(tokenizer, "The sky is ", "blue")
    assert [tokenizer.decode(ids) for ids in request] == ["The sky is", " blue"]
    assert len(request.continuation) == 1
    with pytest.raises(UsageError, match="no token of its own"):
        encode_pair(tokenizer, "abc", "")


@pytest.mark.peers
@needs_gpt2
def test_boundaries_are_those_of_lm_eval():
    model = pytest.importorskip("lm_eval.api.model", reason="needs the extra eval")
    from fastgpt.tokenizer.gpt2 import Gpt2Tokenizer

    tokenizer = Gpt2Tokenizer.from_files()

    class Stub:
        backend = "causal"

        def tok_encode(self, text: str) -> list[int]:
            return tokenizer.encode(text).tolist()

    for context in ("The sky is", "The sky is ", "x\n\n", "1 + 1 =", "안녕 "):
        for continuation in (" blue", "blue", "\n", "2", " 하늘"):
            theirs = model.TemplateLM._encode_pair(Stub(), context, continuation)
            assert encode_pair(tokenizer, context, continuation) == tuple(map(tuple, theirs))
