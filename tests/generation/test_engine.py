"""The engine's calls: what they give out, where a continuation ends, and that a request's trouble is its own."""

import dataclasses
import itertools
import sys

import pytest
import torch
from torch._dynamo.utils import counters

from fastgpt.config.generation import SamplingParams
from fastgpt.errors import UsageError
from fastgpt.generation.engine import Engine
from fastgpt.generation.generator import TextGenerator
from fastgpt.generation.in_flight import Output
from fastgpt.generation.request import Completion
from fastgpt.generation.runner import Runner
from fastgpt.generation.sampler import Sampled, Sampler
from fastgpt.generation.scheduler import Scheduler
from fastgpt.generation.single import Generation
from fastgpt.system.units import counted
from tests.helpers.engines import answer, check, pages, watched
from tests.helpers.untrained import fresh

BLOCK = 32
PROMPTS = ["a", "abc", "jihgfedcba", "abcabcabc", "\n\n", ""]
DRAWN = SamplingParams(max_new_tokens=12, temperature=1.5, seed=5)
GREEDY = SamplingParams(max_new_tokens=12, temperature=0)


@pytest.fixture(scope="module")
def generator() -> TextGenerator:
    return fresh(block_size=BLOCK)


@pytest.fixture
def engine(generator: TextGenerator) -> Engine:
    return watched(generator.engine(kv_memory=pages(generator, 200)))


def alone(generator: TextGenerator, prompt: str, params: SamplingParams) -> str:
    """The text that the dense cache gives."""
    settings = {field.name: getattr(params, field.name) for field in dataclasses.fields(params)}
    return generator.generate(prompt, **settings | {"num_samples": 1})


def samples(generator: TextGenerator, prompt: str, params: SamplingParams) -> list[str]:
    """The texts of all continuations, each by itself on the dense cache."""
    parts = generator.model, generator.tokenizer
    return ["".join(Generation(*parts, prompt, params, sample=n)) for n in range(params.num_samples)]


def run(engine: Engine) -> list[Completion]:
    """The completions of all that was submitted, in order."""
    done = []
    while engine.busy:
        done += [piece.completion for piece in engine.step() if piece.completion]
    return sorted(done, key=lambda one: (one.index, one.sample))


def texts(completions: list[Completion]) -> list[str]:
    return [one.text for one in completions]


# What comes out


@pytest.mark.parametrize("params", [GREEDY, DRAWN])
def test_generate_gives_each_prompts_text_in_order(generator: TextGenerator, engine: Engine, params: SamplingParams):
    found = answer(engine, PROMPTS, params)
    assert texts(found) == [alone(generator, prompt, params) for prompt in PROMPTS]
    assert [(one.index, one.sample, one.prompt) for one in found] == [(i, 0, p) for i, p in enumerate(PROMPTS)]
    for one in found:
        assert (one.finish_reason, one.error, one.logprobs, len(one.tokens)) == ("length", None, None, 12)
        assert 0 <= one.timings.started <= one.timings.first_token <= one.timings.finished


def test_each_prompt_may_have_its_own_settings(generator: TextGenerator, engine: Engine):
    params = [dataclasses.replace(DRAWN, seed=i, max_new_tokens=i) for i in range(6)]
    wanted = [alone(generator, *one) for one in zip(PROMPTS, params, strict=True)]
    assert texts(answer(engine, PROMPTS, params)) == wanted
    with pytest.raises(UsageError, match="5 settings for 6 prompts"):
        engine.generate(PROMPTS, params[:5])
    with pytest.raises(UsageError, match=r"pass \[prompt\]"):
        engine.generate("a", GREEDY)
    with pytest.raises(UsageError, match="`temperature` -1"):
        engine.generate(PROMPTS, [*params[:5], SamplingParams(temperature=-1.0)])
    assert not engine.busy


@pytest.mark.parametrize("kind", [list, tuple, torch.tensor])
def test_without_a_tokenizer_prompts_and_answers_are_tokens(generator: TextGenerator, kind):
    engine = watched(Engine(generator.model, kv_memory=pages(generator, 50)))
    (wanted,) = generator.engine().generate(["abc"], GREEDY)
    found = engine.generate([kind([1, 2, 3]), "abc", []], GREEDY)
    assert (found[0].tokens, found[0].text) == (wanted.tokens, "")
    assert [one.finish_reason for one in found[1:]] == ["error", "error"]
    assert "tokenizer" in found[1].error
    assert "tokenizer" in found[2].error


def test_pieces_join_to_the_completions(engine: Engine):
    said: dict[tuple[int, int], list] = {}
    ended = []
    for piece in engine.stream(PROMPTS, dataclasses.replace(DRAWN, num_samples=2, stop=("ab",))):
        key = piece.index, piece.sample
        assert key not in ended, "something came after the end"
        text, tokens = said.setdefault(key, ["", []])
        said[key] = [text + piece.text, tokens + piece.tokens]
        if piece.completion:
            assert said[key] == [piece.completion.text, piece.completion.tokens]
            ended.append(key)
    assert sorted(ended) == [(i, n) for i in range(6) for n in range(2)]
    assert not engine.busy


def test_a_stream_tells_every_token_as_it_comes(engine: Engine):
    pieces = list(engine.stream(["abc"], GREEDY))
    assert [len(piece.tokens) for piece in pieces] == [1] * 12
    assert engine.stats.steps == 12
    assert (engine.stats.prefill_tokens, engine.stats.decode_tokens) == (3, 11)


def test_streams_beside_each_other_each_get_all_of_their_own(generator: TextGenerator, engine: Engine):
    streams = [engine.stream([prompt], GREEDY) for prompt in PROMPTS[:3]]
    said = ["", "", ""]
    for pieces in itertools.zip_longest(*streams):
        for i, piece in enumerate(pieces):
            said[i] += piece.text if piece else ""
    assert said == [alone(generator, prompt, GREEDY) for prompt in PROMPTS[:3]]


def test_streams_after_each_other_each_get_all_of_their_own(engine: Engine):
    first, second = (engine.stream([prompt], dataclasses.replace(DRAWN, num_samples=2)) for prompt in ("a", "b"))
    for stream in (first, second):
        assert sum(piece.completion is not None for piece in stream) == 2
    assert not engine.busy


@pytest.mark.parametrize("begun", [True, False])
def test_a_stream_that_is_closed_cancels_its_own_requests_alone(generator: TextGenerator, engine: Engine, begun: bool):
    index = engine.submit("b", GREEDY)
    stream = engine.stream(["abc", "a"], GREEDY)
    if begun:
        next(stream)
    stream.close()
    (found,) = run(engine)
    assert (found.index, found.text) == (index, alone(generator, "b", GREEDY))


# Where it ends


def test_a_stop_text_ends_before_it_and_says_so(generator: TextGenerator, engine: Engine):
    whole = alone(generator, "abc", DRAWN)
    stop = whole[5:7]
    (found,) = answer(engine, ["abc"], dataclasses.replace(DRAWN, stop=("absent", stop)))
    assert (found.text, found.finish_reason) == (whole[: whole.index(stop)], "stop")
    assert generator.tokenizer.decode(found.tokens) == whole[: whole.index(stop)] + stop


def test_a_stop_token_ends_and_is_not_told(generator: TextGenerator, engine: Engine):
    (whole,) = answer(engine, ["abc"], DRAWN)
    token = whole.tokens[6]
    (found,) = answer(engine, ["abc"], dataclasses.replace(DRAWN, stop_tokens=(99, token), logprobs=0))
    assert found.tokens == whole.tokens[: whole.tokens.index(token)]
    assert (found.finish_reason, len(found.logprobs)) == ("stop", len(found.tokens))


@pytest.mark.parametrize("samples", [1, 3])
def test_no_new_tokens_are_an_empty_continuation_of_each(engine: Engine, samples: int):
    found = answer(engine, ["abc", "a"], SamplingParams(max_new_tokens=0, num_samples=samples))
    assert [(one.index, one.sample) for one in found] == [(i, n) for i in range(2) for n in range(samples)]
    assert {(one.text, *one.tokens, one.finish_reason) for one in found} == {("", "length")}
    assert engine.stats.steps == 0


def test_logprobs_are_the_models_own(generator: TextGenerator, engine: Engine):
    params = dataclasses.replace(DRAWN, logprobs=3, top_k=2, frequency_penalty=1.0)
    (found,) = answer(engine, ["abc"], params)
    assert found.tokens == answer(engine, ["abc"], dataclasses.replace(params, logprobs=None))[0].tokens
    tokens = [1, 2, 3, *found.tokens]
    with torch.no_grad():
        wanted = generator.model(torch.tensor([tokens])).log_softmax(-1)[0, 2:-1]
    assert len(found.logprobs) == len(wanted) == 12
    for (own, top), token, row in zip(found.logprobs, found.tokens, wanted, strict=True):
        assert own == pytest.approx(row[token].item(), abs=1e-3)
        assert [p for _, p in top] == pytest.approx(row.topk(3).values.tolist(), abs=1e-3)


# Several continuations of a prompt


@pytest.mark.parametrize("options", [{}, {"max_batch": 2}, {"max_batch": 1}, {"max_batch_tokens": 4}], ids=str)
@pytest.mark.parametrize("prefix", [True, False])
@pytest.mark.covering_array(1)
def test_each_continuation_draws_for_itself(generator: TextGenerator, options: dict, prefix: bool):
    engine = watched(generator.engine(kv_memory=pages(generator, 60, 4), page_size=4, prefix_cache=prefix, **options))
    params = dataclasses.replace(DRAWN, num_samples=5, frequency_penalty=0.5)
    found = answer(engine, ["abcdefghij", "b"], params)
    assert texts(found) == [text for prompt in ("abcdefghij", "b") for text in samples(generator, prompt, params)]
    assert len(set(texts(found))) > 5


def test_a_prompt_is_computed_once_for_all_its_continuations(generator: TextGenerator):
    engine = watched(generator.engine(kv_memory=pages(generator, 60, 4), page_size=4, prefix_cache=False))
    answer(engine, ["abcdefghij"], dataclasses.replace(DRAWN, num_samples=6, max_new_tokens=3))
    assert engine.stats.prefill_tokens == 10
    assert engine.stats.decode_tokens == 6 * 2
    assert engine.scheduler.allocator.peak == 2 + 6  # two full pages shared, and one of each's own
    assert len(engine.stats.first_token_seconds) == 1


def test_continuations_in_a_pool_for_one_of_them(generator: TextGenerator):
    engine = watched(generator.engine(kv_memory=pages(generator, 6, 4), page_size=4))
    params = dataclasses.replace(DRAWN, num_samples=4)
    found = answer(engine, ["abcdefghij"], params)
    assert texts(found) == samples(generator, "abcdefghij", params)
    assert engine.scheduler.preemptions > 0


def test_one_that_gets_a_page_and_loses_all_in_the_same_step():
    """In windows that end within a page the order in which pages are full is not that of age."""
    generator = fresh(block_size=9)
    engine = watched(generator.engine(kv_memory=pages(generator, 7, 4), page_size=4, max_batch=8, slide=True))
    params = [SamplingParams(max_new_tokens=2, num_samples=4), SamplingParams(max_new_tokens=17, num_samples=3)]
    found = answer(engine, [[0], [1, 0, 1, 0, 0]], params)
    assert [len(one.tokens) for one in found] == [2] * 4 + [17] * 3


# Sizes


@pytest.mark.parametrize("slide", [True, False])
def test_prompts_of_every_size(generator: TextGenerator, slide: bool):
    sizes = [0, 1, BLOCK - 1, BLOCK, BLOCK + 1, 1_000_000]
    prompts = [("abcdefghij" * (size // 10 + 1))[:size] for size in sizes]
    engine = watched(generator.engine(kv_memory=pages(generator, 8), slide=slide))
    found = answer(engine, prompts, GREEDY)
    for size, prompt, one in zip(sizes, prompts, found, strict=True):
        if size > BLOCK and not slide:
            assert (one.finish_reason, one.tokens) == ("error", [])
            assert f"the prompt has {size:,} tokens, and the model's context (block_size) {BLOCK}" in one.error
            continue
        room = 12 if slide else min(12, BLOCK + 1 - max(size, 1))
        assert (one.finish_reason, one.text) == ("length", alone(generator, prompt, GREEDY)[:room])


@pytest.mark.parametrize("page_size", [1, 8, 16, 64])
def test_a_pool_too_small_for_one_request_is_that_requests_error(generator: TextGenerator, page_size: int):
    """Of 32 positions in a few pages all but one request can run."""
    room = max(1, 16 // page_size)
    engine = watched(generator.engine(kv_memory=pages(generator, room, page_size), page_size=page_size))
    prompts = ["abc", "abcdefghij" * 3, "b", "c"]
    found = answer(engine, prompts, GREEDY)
    fits = page_size == 64
    assert [one.finish_reason for one in found] == ["length", "length" if fits else "error", "length", "length"]
    if not fits:
        assert f"pages of {counted(page_size, 'token')}, and the cache has {room}" in found[1].error
        assert "`kv_memory`" in found[1].error
    for prompt, one in zip(prompts, found, strict=True):
        assert one.error or alone(generator, prompt, GREEDY).startswith(one.text)


def test_a_request_that_just_fits_a_pool_runs(generator: TextGenerator):
    engine = watched(generator.engine(kv_memory=pages(generator, 4, 4), page_size=4, speculate="ngram"))
    found = answer(engine, ["abcde", "abcdef", "abcdefg"], [dataclasses.replace(GREEDY, max_new_tokens=12)] * 3)
    assert [one.finish_reason for one in found] == ["length", "error", "error"]  # 5 + 12 - 1 = 16 positions
    assert found[0].text == alone(generator, "abcde", GREEDY)


def test_a_pool_without_a_page_is_refused(generator: TextGenerator):
    with pytest.raises(UsageError, match="`kv_memory` 100"):
        generator.engine(kv_memory=100)


@pytest.mark.parametrize("wrong", [{"max_batch": 0}, {"max_batch_tokens": 0}, {"page_size": 0}, {"speculate": "n"}])
def test_an_engines_settings_have_limits(generator: TextGenerator, wrong: dict):
    with pytest.raises(UsageError, match=f"`{next(iter(wrong))}`"):
        generator.engine(**wrong)


@pytest.mark.slow
def test_5000_requests_wait_their_turn(generator: TextGenerator):
    engine = generator.engine(kv_memory=pages(generator, 100), max_batch=100)
    prompts = [PROMPTS[i % 6] for i in range(5000)]
    params = [dataclasses.replace(DRAWN, max_new_tokens=2, seed=i // 6) for i in range(5000)]
    found = engine.generate(prompts, params)
    assert texts(found[::41]) == [alone(generator, *each) for each in zip(prompts[::41], params[::41], strict=True)]
    assert max(one.timings.started for one in found[:100]) < min(one.timings.started for one in found[-100:])
    check(engine.scheduler)


class Nothing:
    """Stands for a `Runner`: every logit is 0."""

    def __init__(self, engine: Engine):
        self.device, self.vocab_size = engine.runner.device, engine.vocab_size

    def __call__(self, plan) -> torch.Tensor:
        return torch.zeros(plan.rows, self.vocab_size)


def events(generator: TextGenerator, count: int, closing: bool) -> int:
    """How many functions are called to answer so many prompts, or to begin and cancel them."""
    engine = generator.engine(kv_memory=pages(generator, 100), max_batch=4)
    engine.runner = Nothing(engine)
    params, total = dataclasses.replace(GREEDY, max_new_tokens=1), 0

    def counted(*_) -> None:
        nonlocal total
        total += 1

    stream = engine.stream([[i % 11, i // 11 % 11] * 4 for i in range(count)], params)
    next(stream)  # whatever is done once, such as imports
    sys.setprofile(counted)
    try:
        stream.close() if closing else [engine.queued for _ in stream]
    finally:
        sys.setprofile(None)
    return total


@pytest.mark.parametrize("closing", [False, True])
def test_a_prompts_cost_does_not_grow_with_their_number(generator: TextGenerator, closing: bool):
    """Counted in calls."""
    few, many = (events(generator, count, closing) / count for count in (100, 800))
    assert many < 1.1 * few


# Trouble


def test_a_prompt_that_cannot_be_continued_is_told_alone(generator: TextGenerator, engine: Engine):
    bad = ["a¿", [1, 11], [-1], "\ud800", "a" * (BLOCK + 1)]
    found = answer(engine, ["abc", *bad, "b"], dataclasses.replace(GREEDY, num_samples=2))
    errors = [one for one in found if one.error]
    assert [(one.index, one.sample, one.text, one.tokens) for one in errors] == [(i, 0, "", []) for i in range(1, 6)]
    for one, words in zip(errors, ["U+00BF", "token 11", "token -1", "surrogate", "33 tokens"], strict=True):
        assert words in one.error
        assert one.timings.started is None
    wanted = [alone(generator, prompt, GREEDY) for prompt in ("abc", "abc", "b", "b")]
    assert [one.text for one in found if not one.error] == wanted


@pytest.mark.parametrize("prompt", [None, [None], ["a"], [1.5], 7], ids=str)
def test_what_is_no_prompt_at_all_leaves_the_engine_as_it_was(generator: TextGenerator, engine: Engine, prompt):
    """Whether it is raised or told, nothing of its neighbours stays behind."""
    try:
        found = engine.generate(["abc", prompt, "b"], GREEDY)
    except (UsageError, TypeError, ValueError):
        assert not engine.busy
    else:
        assert [one.finish_reason for one in found] == ["length", "error", "length"]
    assert texts(answer(engine, ["a"], GREEDY)) == [alone(generator, "a", GREEDY)]


def test_cancelling_ends_a_request_wherever_it_is(generator: TextGenerator):
    engine = watched(generator.engine(kv_memory=pages(generator, 50), max_batch=2))
    running, forked, waiting, last = (
        engine.submit("abc", dataclasses.replace(GREEDY, num_samples=n)) for n in (1, 3, 2, 1)
    )
    pieces = [*engine.step(), *engine.step()]
    for index in (running, forked, waiting, waiting, 99, -1):
        engine.cancel(index)
    found = run(engine)
    assert [(one.index, one.finish_reason) for one in found] == [
        *[(running, "cancelled")],
        *[(forked, "cancelled")] * 3,
        *[(waiting, "cancelled")] * 2,
        *[(last, "length")],
    ]
    said = [piece.text for piece in pieces if piece.index == running]
    assert found[0].text == "".join(said) == alone(generator, "abc", GREEDY)[:2]
    assert (found[-2].text, found[-1].text) == ("", alone(generator, "abc", GREEDY))
    engine.cancel(last)
    assert engine.step() == []


def fail_once(monkeypatch, place: type, name: str, error: BaseException, *, call: int = 1, after: bool = False) -> None:
    """Let one call of a method raise: before it does anything, or after all."""
    method, count = getattr(place, name), 0

    def failing(*args, **kwargs):
        nonlocal count
        count += 1
        if count == call and not after:
            raise error
        result = method(*args, **kwargs)
        if count == call:
            raise error
        return result

    monkeypatch.setattr(place, name, failing)


FAILURES = [
    (Runner, "__call__", 1, False),
    (Runner, "__call__", 4, True),
    (Sampler, "begin", 3, False),
    (Sampler, "__call__", 2, False),
    (Sampled, "to_host", 3, False),  # the penalties have counted the tokens that are drawn again
    (Scheduler, "plan", 1, True),
    (Scheduler, "plan", 3, True),
    (Scheduler, "_chunk", 2, False),
    (Output, "append", 2, False),
]


@pytest.mark.parametrize(("place", "name", "call", "after"), FAILURES)
@pytest.mark.parametrize("error", [torch.OutOfMemoryError("no memory"), KeyboardInterrupt()], ids=["memory", "Ctrl-C"])
def test_after_an_exception_in_a_step_every_request_goes_on(
    monkeypatch, generator: TextGenerator, place: type, name: str, call: int, after: bool, error: BaseException
):
    params = dataclasses.replace(DRAWN, num_samples=2, frequency_penalty=1.0, max_new_tokens=8)
    wanted = samples(generator, "abcdefghij", params) * 2
    engine = generator.engine(kv_memory=pages(generator, 50, 4), page_size=4, max_batch=5)
    for _ in range(2):
        engine.submit("abcdefghij", params)
    fail_once(monkeypatch, place, name, error, call=call, after=after)
    done, raised = [], 0
    for _ in range(60):
        try:
            done += [piece.completion for piece in engine.step() if piece.completion]
        except (torch.OutOfMemoryError, KeyboardInterrupt):
            raised += 1
        check(engine.scheduler)
    assert raised == 1
    assert not engine.busy
    assert texts(sorted(done, key=lambda one: (one.index, one.sample))) == wanted


@pytest.mark.parametrize(("place", "name", "call", "after"), FAILURES)
def test_after_an_exception_in_generate_nothing_of_it_is_found(
    monkeypatch, generator: TextGenerator, place: type, name: str, call: int, after: bool
):
    """Above all no page of a step that was not computed: it holds anything, here NaN."""
    engine = generator.engine(kv_memory=pages(generator, 50))
    prompts = ["abcdefghij" * 3, "jihgfedcba" * 2, "a"]
    fail_once(monkeypatch, place, name, RuntimeError("a kernel failed"), call=call, after=after)
    with pytest.raises(RuntimeError, match="a kernel failed"):
        engine.generate(prompts, GREEDY)
    assert (engine.busy, engine.scheduler.allocator.used) == (False, 0)
    if call == 1 or place is Scheduler:
        for pool in (*engine.cache.keys, *engine.cache.values):
            pool.fill_(float("nan"))
    found = answer(engine, prompts, GREEDY)
    assert [one.text for one in found] == [alone(generator, p, GREEDY)[: BLOCK + 1 - len(p)] for p in prompts]


@pytest.mark.slow
def test_compiled_it_gives_the_same_tokens_from_a_few_kinds_of_steps(generator: TextGenerator):
    """However many sequences, tokens and pages a step has."""
    counters.clear()
    for batch_tokens in (16, 5, 100):
        engine = generator.engine(kv_memory=pages(generator, 50), compile=True, max_batch_tokens=batch_tokens)
        for count in range(1, 1 + len(PROMPTS)):
            found = answer(watched(engine), PROMPTS[:count], GREEDY)
            assert texts(found) == [alone(generator, prompt, GREEDY) for prompt in PROMPTS[:count]]
    assert 1 <= counters["stats"]["unique_graphs"] <= 3 * 4
