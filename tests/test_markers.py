"""The marks of tests that are slow, or need a GPU, or a GPU of their own."""

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from tests import conftest


class Item:
    """A test with these markers, which remembers why it is skipped."""

    def __init__(self, *markers: str):
        self.markers, self.skipped, self.path = markers, None, Path("test_some.py")

    def get_closest_marker(self, name: str) -> str | None:
        return name if name in self.markers else None

    def add_marker(self, marker: pytest.MarkDecorator) -> None:
        self.skipped = marker.kwargs["reason"]


@pytest.mark.parametrize(
    ("markers", "wanted", "here", "why"),
    [
        ((), "", False, None),
        (("gpu",), "", False, "needs a CUDA GPU"),
        (("gpu_large",), "gpu_large", False, "needs a CUDA GPU"),
        (("gpu",), "", True, None),
        (("gpu_large",), "", True, "takes tens of GiB of a GPU: run with -m gpu_large"),
        (("gpu", "gpu_large"), "gpu", True, "takes tens of GiB of a GPU: run with -m gpu_large"),
        (("gpu_large",), "gpu_large", True, None),
    ],
)
def test_a_gpu_is_needed_and_a_large_one_has_to_be_asked_for(monkeypatch, markers, wanted, here, why):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: here)
    item, hook = Item(*markers), SimpleNamespace(pytest_deselected=lambda items: None)
    config = SimpleNamespace(getoption=lambda name: wanted, hook=hook)
    conftest.pytest_collection_modifyitems(config, [item])
    assert item.skipped == why


@pytest.mark.parametrize(("wanted", "left"), [("", [0, 2]), ("gpu", [0, 2]), ("slow", [0, 1, 2, 3])])
def test_slow_tests_have_to_be_asked_for(wanted, left):
    items, told = [Item(), Item("slow"), Item("gpu"), Item("slow", "gpu")], []
    hook = SimpleNamespace(pytest_deselected=lambda items: told.extend(items))
    config, kept = SimpleNamespace(getoption=lambda name: wanted, hook=hook), [*items]
    conftest.pytest_collection_modifyitems(config, kept)
    assert kept == [items[i] for i in left]
    assert told == [item for item in items if item not in kept]


def test_processes_share_the_gpus_memory(monkeypatch):
    given = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "set_per_process_memory_fraction", given.append)
    for workers, markers in ((1, ["gpu"]), (12, []), (12, ["gpu"])):
        monkeypatch.setattr(conftest, "WORKERS", workers)
        conftest.pytest_runtest_setup(Item(*markers))
    (share,) = given
    assert 0.07 < share < 1 / 12
