"""Planning: which sequences a forward pass computes, in what order, within which budget; pages are never lost."""

import random

import pytest

from fastgpt.config.generation import SamplingParams
from fastgpt.generation.ngram import NgramProposer
from fastgpt.generation.plan import Plan, Sample
from fastgpt.generation.scheduler import Scheduler
from fastgpt.model.kv_cache import PagedCache
from tests.helpers.engines import BLOCK, CONFIG, P, check, check_plan, watched
from tests.helpers.untrained import fresh


def scheduler(*, count: int = 100, batch: int = 8, tokens: int = 64, prefix: bool = True, drafts: int = 0) -> Scheduler:
    cache = PagedCache(CONFIG, count, P, prefix_cache=prefix)
    return Scheduler(cache, BLOCK, max_batch=batch, max_batch_tokens=tokens, drafts=drafts)


def add(planner: Scheduler, *lengths: int, new: int = 8, seed: int = 0) -> list[Sample]:
    """Put prompts of random tokens at the end of the queue."""
    rng = random.Random(seed)
    params = SamplingParams(max_new_tokens=new)
    samples = []
    for n, length in enumerate(lengths):
        samples.append(Sample((n, 0), rng.choices(range(11), k=length), length, params))
        planner.add(samples[-1])
    return samples


def advance(planner: Scheduler) -> dict[int, int]:
    """Plan a forward pass and carry it out; how many tokens each request computed."""
    return carry_out(planner, planner.plan())


def carry_out(planner: Scheduler, plan: Plan) -> dict[int, int]:
    """Give every sequence that predicts its next token; how many tokens each request computed."""
    check_plan(planner, plan)
    for chunk in plan.chunks:
        if chunk.rows:
            chunk.sample.tokens.append(chunk.sample.generated % 11)
            planner.allocator.truncate(chunk.sample.table, len(chunk.sample.tokens) - chunk.sample.start - 1)
            if chunk.sample.generated == chunk.sample.params.max_new_tokens:
                planner.drop(chunk.sample)
    check(planner)
    return {chunk.sample.order[0]: len(chunk.tokens) for chunk in plan.chunks}


def test_a_prompt_is_read_in_chunks_beside_those_that_decode():
    planner = scheduler(tokens=10)
    add(planner, 3, 20, 5)
    assert advance(planner) == {0: 3, 1: 7}
    assert advance(planner) == {0: 1, 1: 9}
    assert advance(planner) == {0: 1, 1: 4, 2: 5}
    assert advance(planner) == {0: 1, 1: 1, 2: 1}


def test_sequences_that_decode_stay_a_batch_until_one_comes_or_goes():
    """Also where pages end, which only their own sequences notice."""
    planner = scheduler()
    samples = add(planner, 2, 3, 7, new=30)
    batches = []
    for _ in range(12):
        plan = planner.plan()
        batches.append(plan.batch)
        carry_out(planner, plan)
    assert batches[0] is None  # prompts are read
    assert batches[2] is not None
    assert set(batches[2:]) == {batches[2]}
    planner.drop(samples[1])
    plan = planner.plan()
    assert plan.batch is not None
    assert plan.batch.samples == [samples[0], samples[2]]
    carry_out(planner, plan)
    planner.add(Sample((9, 0), [1, 2], 2, SamplingParams(max_new_tokens=9)))
    plan = planner.plan()
    assert plan.batch is None
    assert carry_out(planner, plan) == {0: 1, 2: 1, 9: 2}


def test_a_finished_sequences_place_is_taken_in_the_next_iteration():
    planner = scheduler(batch=2)
    first, *_ = add(planner, 2, 2, 2, 2, new=3)
    first.params = SamplingParams(max_new_tokens=1)
    assert advance(planner) == {0: 2, 1: 2}
    assert advance(planner) == {1: 1, 2: 2}
    assert advance(planner) == {1: 1, 2: 1}
    assert advance(planner) == {2: 1, 3: 2}


def test_more_sequences_than_the_budget_has_tokens_still_all_end_oldest_first():
    planner = scheduler(tokens=2)
    samples = add(planner, *[3] * 6, new=4)
    ended: list[int] = []
    for _ in range(200):
        if not advance(planner):
            break
        ended += [s.order[0] for s in samples if s.generated == 4 and s.order[0] not in ended]
    assert ended == list(range(6))


def test_nobody_overtakes_a_prompt_that_has_no_room_yet():
    planner = scheduler(count=8, prefix=False)
    add(planner, 12, 20, 1, new=2)
    assert advance(planner) == {0: 12}  # 3 pages, and 5 for the second would leave none for the first to grow
    assert advance(planner) == {0: 1}
    assert advance(planner) == {1: 20, 2: 1}


def test_the_youngest_gives_its_pages_to_older_ones_and_is_computed_anew():
    planner = scheduler(count=8, prefix=False)
    oldest, middle, youngest = add(planner, 7, 7, 7, new=12)
    assert advance(planner) == {0: 7, 1: 7, 2: 7}  # 6 pages of 8
    assert advance(planner) == {0: 1, 1: 1, 2: 1}  # full to the last place
    said = list(youngest.tokens)
    assert advance(planner) == {0: 1, 1: 1}
    assert (planner.preemptions, list(planner.waiting), youngest.tokens) == (1, [youngest], said)
    for _ in range(30):
        before = oldest.generated, middle.generated
        if not advance(planner):
            break
        assert oldest.generated == min(12, before[0] + 1), "the oldest waits for nobody"
    assert [s.generated for s in (oldest, middle, youngest)] == [12, 12, 12]


def test_a_prompt_that_many_share_is_computed_once_even_in_one_step():
    planner = scheduler()
    (first,) = add(planner, 14)
    for n in range(1, 5):
        planner.add(Sample((n, 0), list(first.tokens), 14, first.params))
    assert advance(planner) == {0: 14, 1: 2, 2: 2, 3: 2, 4: 2}  # 3 full pages of 4 are shared
    assert planner.hits == 4 * 12
    assert planner.allocator.used == 3 + 5


def test_without_prefix_reuse_it_is_computed_by_each():
    planner = scheduler(prefix=False)
    (first,) = add(planner, 14)
    planner.add(Sample((1, 0), list(first.tokens), 14, first.params))
    assert advance(planner) == {0: 14, 1: 14}
    assert planner.hits == 0


def test_only_what_is_computed_is_shared():
    planner = scheduler(tokens=10)
    (first,) = add(planner, 14)
    planner.add(Sample((1, 0), list(first.tokens), 14, first.params))
    assert advance(planner) == {0: 10}
    assert advance(planner) == {0: 4, 1: 2}


def test_the_continuations_of_a_prompt_fork_where_there_is_room():
    planner = scheduler(batch=3)
    (leader,) = add(planner, 6)
    siblings = [Sample((0, n), list(leader.tokens), 6, leader.params) for n in (1, 2, 3)]
    advance(planner)
    assert [planner.fork(leader, sibling) for sibling in siblings] == [True, True, False]
    for sibling in siblings[:2]:
        sibling.tokens.append(sibling.order[1])
    planner.put_back(siblings[2:])
    assert planner.allocator.used == 2
    assert advance(planner) == {0: 1}  # of three sequences of one request
    assert planner.allocator.used == 4  # the second page is now each one's own
    assert list(planner.waiting) == siblings[2:]


def test_a_window_that_slides_is_read_anew_in_its_budget():
    planner = scheduler(tokens=20)
    (sample,) = add(planner, BLOCK + 5, new=3)
    counts = []
    while counted := advance(planner):
        counts.append(counted[0])
    assert counts == [20, 12] * 3
    assert (sample.generated, sample.start) == (3, 7)


def test_nobody_loses_pages_for_a_guess():
    """The last free page is for the older one's; the younger one's is left out."""
    planner = scheduler(count=5, prefix=False, drafts=1)
    for sample in add(planner, 7, 7):
        sample.tokens[:], sample.proposer = [0] * 7, NgramProposer()
    first = advance(planner)
    assert first == {0: 7, 1: 7}
    second = advance(planner)
    assert second[0] > 1 == second[1]
    assert planner.preemptions == 0


def test_the_least_recently_used_pages_are_given_up_first():
    planner = scheduler(count=7, batch=1)
    a, b, _ = (sample.tokens for sample in add(planner, 9, 9, 17, new=1))  # two full pages, two, four
    *_, last = planner.waiting
    planner.drop(last)
    last.order = (3, 0)
    planner.add(Sample((2, 0), list(a[:9]), 9, SamplingParams(max_new_tokens=1)))
    planner.add(last)
    assert [advance(planner) for _ in range(4)] == [{0: 9}, {1: 9}, {2: 1}, {3: 17}]
    for n, (tokens, computed) in enumerate([(a, 1), (b, 9)], 4):
        planner.add(Sample((n, 0), list(tokens[:9]), 9, SamplingParams(max_new_tokens=1)))
        assert advance(planner) == {n: computed}


def test_dropped_sequences_leave_nothing_behind():
    planner = scheduler(batch=2)
    samples = add(planner, 6, 6, 6)
    advance(planner)
    for sample in (samples[2], samples[0], samples[0]):
        planner.drop(sample)
    assert planner.running == [samples[1]]
    assert not planner.waiting
    planner.drop(samples[1])
    assert planner.allocator.used == 0
    assert advance(planner) == {}


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("prefix", [True, False])
def test_whatever_comes_the_books_balance_and_all_end(seed: int, prefix: bool):
    rng = random.Random(seed)
    planner = scheduler(
        count=rng.randint(8, 14), batch=rng.randint(1, 6), tokens=rng.choice([1, 3, 7, 40]), prefix=prefix, drafts=0
    )
    samples = add(planner, *[rng.randint(1, 20) for _ in range(12)], new=rng.randint(1, 12), seed=seed)
    for sample in samples[::3]:  # some begin alike
        sample.tokens[: min(9, len(sample.tokens))] = samples[0].tokens[: min(9, len(sample.tokens))]
    cancelled = set()
    for step in range(2000):
        if step % 17 == 16 and (alive := [s for s in samples if s.generated < s.params.max_new_tokens]):
            cancelled.add(victim := rng.choice(alive))
            planner.drop(victim)
        if not advance(planner):
            break
    assert all((s.generated == s.params.max_new_tokens) != (s in cancelled) for s in samples)
    assert planner.allocator.used == 0


def test_an_engine_without_work_does_nothing():
    engine = watched(fresh().engine(max_batch=2))
    assert (engine.step(), engine.busy, engine.stats.steps) == ([], False, 0)


def test_preempted_requests_stand_in_the_order_in_which_they_came():
    """Also behind continuations that wait for a place: request 0 came before request 1."""
    planner = scheduler(count=6, batch=3, prefix=False)
    leader, other = add(planner, 4, 4, new=20)
    waiting = [Sample((0, n), list(leader.tokens), 4, leader.params) for n in (1, 2)]
    advance(planner)
    assert planner.fork(leader, waiting[0])
    waiting[0].tokens.append(0)
    planner.put_back(waiting[1:])
    while not planner.preemptions:
        advance(planner)
    assert [sample.order for sample in planner.waiting][-1] == other.order
