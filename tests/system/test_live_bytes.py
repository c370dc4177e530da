"""Live bytes are those that a count by hand gives, of real tensors and of fake ones."""

from collections import Counter
from collections.abc import Hashable

import torch

from fastgpt.system.live_bytes import LiveBytes, Peak
from fastgpt.system.torch_private import fake_tensors

CPU = torch.device("cpu")


def test_live_bytes_by_hand():
    with LiveBytes(CPU) as memory:
        memory.phase = "first"
        a = torch.zeros(1000)
        b = a[10:20]  # a view: nothing new
        assert memory.live == 4000
        del a
        assert memory.live == 4000  # b refers to it
        memory.phase = "second"
        c = b * 2
        assert memory.live == 4040
        del b, c
        assert memory.live == 0
    assert memory.peak == 4040
    assert memory.series == [(0, 4000), (1, 4000), (2, 4040)]
    assert memory.phases == [("first", 0), ("second", 2)]


def test_live_bytes_of_a_backward_pass():
    w = torch.randn(100, 100, requires_grad=True)
    with LiveBytes(CPU) as memory:
        memory.hold([w])
        loss = (w @ w).relu().sum()
        loss.backward()
        del loss
        assert memory.live == 2 * w.nbytes  # the weight and its gradient
        w.grad = None
        assert memory.live == w.nbytes
    assert memory.peak >= 4 * w.nbytes


def test_labels_and_phases_by_hand():
    w = torch.zeros(100)
    with LiveBytes(CPU) as memory:
        memory.hold([w, w[:5]], "weights")
        memory.phase, memory.label = "forward", "activations"
        a = w + 1
        b = a + 1
        memory.phase, memory.label = "backward", None
        del a
        c = b[:50] + 1
        memory.relabel(c, "gradients")
        d = c + 1
    forward: Counter[Hashable] = Counter({"weights": 400, "activations": 800})
    assert memory.peaks["forward"] == Peak(1200, forward)
    held: Counter[Hashable] = Counter({"weights": 400, "activations": 400, "gradients": 200, None: 200})
    assert memory.peaks["backward"] == Peak(1200, held)
    del b, d
    assert {label: size for label, size in memory.held.items() if size} == {"weights": 400, "gradients": 200}


def test_fake_tensors_take_nothing_and_count_as_real_ones():
    def work(memory: LiveBytes) -> int:
        with memory:
            w = torch.ones(1000, 1000, requires_grad=True)
            loss = (w @ w).relu().sum()
            loss.backward()
            assert loss <= 3  # a number that the host reads
        return memory.peak

    with fake_tensors():
        huge = torch.empty(1 << 40)  # 4 TiB
        assert huge.sum().item() == 1.0
        assert torch.zeros((), dtype=torch.int64).item() == 1
        found = work(LiveBytes(CPU, fake=True))

    def real(memory: LiveBytes) -> int:
        with memory:
            w = torch.ones(1000, 1000, requires_grad=True)
            (w @ w).relu().sum().backward()
        return memory.peak

    assert found == real(LiveBytes(CPU))
