"""Batches are a pure function of (seed, step), and the whole split is read exactly once."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fastgpt.data.loader import IGNORED, Loader, MicroBatches
from fastgpt.errors import UsageError

CPU = torch.device("cpu")


def make(count: int = 500, block_size: int = 8, *, vocab_size: int = 500, seed: int = 1) -> Loader:
    """A loader over the tokens 0, 1, 2, ..., so that a token tells its place."""
    tokens = np.arange(count, dtype=np.uint16)
    return Loader(tokens, block_size, vocab_size, seed=seed, device=CPU, name="the text")


def global_batch(loader: Loader, step: int, micros: int, batch_size: int) -> torch.Tensor:
    return torch.cat([loader.batch(step, micro, micros, batch_size)[0] for micro in range(micros)])


@settings(deadline=None, max_examples=30)
@given(step=st.integers(0, 2**40), micros=st.sampled_from([1, 2, 3, 6, 12]))
def test_a_steps_data_do_not_depend_on_how_it_is_cut(step: int, micros: int):
    whole = global_batch(make(), step, 1, 12)
    assert torch.equal(global_batch(make(), step, micros, 12 // micros), whole)


def test_a_batch_does_not_depend_on_what_was_drawn_before():
    used = make()
    for step in range(5):
        used.batch(step, 0, 1, 4)
    list(used.windows(8, 4))
    assert torch.equal(used.batch(7, 0, 1, 4)[0], make().batch(7, 0, 1, 4)[0])


def test_the_micro_batches_of_a_step_are_gathered_one_by_one_and_drawn_once(monkeypatch):
    loader, drawn = make(), []
    philox = np.random.Philox
    monkeypatch.setattr(np.random, "Philox", lambda **named: drawn.append(named["counter"]) or philox(**named))
    batches = MicroBatches(loader, 2, 6).of_step(3)
    assert (len(batches), drawn) == (6, [])
    assert torch.equal(torch.cat([x for x, _ in batches]), global_batch(make(), 3, 1, 12))
    assert drawn == [[0, 0, 0, 3]] * 2  # here, and by the other loader


def test_steps_and_seeds_see_different_data():
    drawn = [make().batch(step, 0, 1, 8)[0] for step in range(4)]
    drawn += [make(seed=2).batch(0, 0, 1, 8)[0]]
    assert len({tuple(x[:, 0].tolist()) for x in drawn}) == len(drawn)


def test_targets_are_the_next_tokens():
    x, y = make().batch(3, 0, 1, 16)
    assert x.shape == y.shape == (16, 8)
    assert x.dtype == y.dtype == torch.int64
    assert torch.equal(y, x + 1)
    assert torch.equal(x, x[:, :1] + torch.arange(8))


def test_every_window_is_drawn_the_last_one_too():
    starts = {int(x) for step in range(40) for x in make(count=20).batch(step, 0, 1, 8)[0][:, 0]}
    assert starts == set(range(20 - 8))


def test_a_text_of_one_window_is_enough():
    x, y = make(count=9).batch(0, 0, 1, 2)
    assert x.tolist() == [list(range(8))] * 2
    assert y.tolist() == [list(range(1, 9))] * 2


@settings(deadline=None, max_examples=40)
@given(count=st.integers(1, 60), batch_size=st.integers(1, 7), tokens=st.integers(9, 300), seed=st.integers(0, 9))
def test_windows_reach_from_the_first_token_to_the_last_at_even_distances(count, batch_size, tokens, seed):
    found = list(make(tokens, seed=seed).windows(count, batch_size))
    assert [len(x) for x, _, _ in found[:-1]] == [batch_size] * (len(found) - 1)
    assert all(counted == y.numel() and torch.equal(y, x + 1) for x, y, counted in found)
    starts = np.concatenate([x[:, 0].numpy() for x, _, _ in found])
    assert (len(starts), starts[0]) == (count, 0)
    if count > 1:
        assert starts[-1] == tokens - 9
        distances = np.diff(starts)
        assert distances.max() - distances.min() <= 1


@settings(deadline=None)
@given(count=st.integers(9, 200), batch_size=st.integers(1, 7))
def test_the_whole_split_has_every_token_but_the_first_as_a_target_once(count: int, batch_size: int):
    targets = []
    for x, y, counted in make(count=count).whole(batch_size):
        assert x.shape == y.shape == (batch_size, 8)
        counts = y != IGNORED
        assert counts.sum() == counted
        assert torch.equal(y[counts], x[counts] + 1)
        targets += y[counts].tolist()
    assert targets == list(range(1, count))


@pytest.mark.parametrize(("count", "fix"), [(8, "`block_size` 7"), (2, "`block_size` 1"), (1, "a longer text")])
def test_a_short_text_is_refused_with_a_way_out(count: int, fix: str):
    with pytest.raises(UsageError, match=f"the text holds {count} tokens?, .*`block_size` 8.*try {fix}"):
        make(count=count)


def test_a_token_outside_the_vocabulary_is_named():
    with pytest.raises(UsageError, match="the text holds token 9, but its vocabulary has 9"):
        make(count=10, vocab_size=9).batch(0, 0, 1, 64)
