"""The file of choices: what it survives, and the hash that tells one version of the kernels from another."""

import json
import multiprocessing
import sys

import pytest
import torch

from fastgpt.ops.timed_choices import FORMAT, Choice, ChoiceFile, Environment, environment_of, source_hash
from fastgpt.ops.workload import Calls, Workload
from fastgpt.system.files import temporary_sibling

HERE = Environment("A GPU", "2.13.0", "3.7.1", "0123456789abcdef", "ieee")
WORKLOAD = Workload("training", torch.float32, record=lambda: Calls({}, {}))
CHOICE = Choice("triton", {"torch": 2e-3, "triton": 1e-3}, {})


@pytest.fixture
def path(tmp_path):
    return tmp_path / "folder" / "choices.json"


def test_gives_back_what_was_added_and_nothing_else(path):
    left_out = Choice("torch", {"torch": 1e-3}, {"triton": 'RuntimeError: "ptxas" failed'})
    ChoiceFile(path).add(HERE, WORKLOAD, {"layer_norm": CHOICE})
    ChoiceFile(path).add(HERE, WORKLOAD, {"causal_attention": left_out})
    assert ChoiceFile(path).read(HERE, WORKLOAD) == {"layer_norm": CHOICE, "causal_attention": left_out}
    assert [*path.parent.iterdir()] == [path]


def test_a_file_that_is_not_there_holds_nothing(path):
    assert ChoiceFile(path).read(HERE, WORKLOAD) == {}


def test_of_a_choice_that_may_change_only_the_operation_is_kept(path):
    ChoiceFile(path).add(HERE, WORKLOAD, {"layer_norm": Choice("triton", lasting=False), "kv_write": CHOICE})
    assert ChoiceFile(path).read(HERE, WORKLOAD) == {"layer_norm": None, "kv_write": CHOICE}


def table(**changes) -> bytes:
    choice = {"backend": "triton", "seconds": {"torch": 1.0}, "left_out": {}} | changes
    return json.dumps({"format": FORMAT, "choices": {str(HERE): {str(WORKLOAD): {"layer_norm": choice}}}}).encode()


DAMAGED = [
    b"",
    b'{"format": 4, "choices": {"A GPU',
    b"\xff\xfe",
    b"[]",
    b"{}",
    b'{"format": 4, "choices": []}',
    b'{"format": 4, "choices": {"A GPU": 1}}',
    table(backend="cuda"),
    table(backend=["triton"]),
    table(seconds=1.0),
    table(seconds={"torch": "fast"}),
    table(left_out=["triton"]),
    table(more=1),
]


@pytest.mark.parametrize("content", DAMAGED)
def test_a_damaged_file_is_one_warning_and_then_as_if_absent(path, content):
    path.parent.mkdir()
    path.write_bytes(content)
    with pytest.warns(UserWarning, match=r"choices\.json cannot be read and is made anew") as caught:
        assert ChoiceFile(path).read(HERE, WORKLOAD) == {}
    assert len(caught) == 1
    assert "\n" not in str(caught[0].message)


@pytest.mark.parametrize("content", DAMAGED)
def test_what_is_added_takes_a_damaged_files_place(path, content):
    path.parent.mkdir()
    path.write_bytes(content)
    ChoiceFile(path).add(HERE, WORKLOAD, {"layer_norm": CHOICE})
    assert ChoiceFile(path).read(HERE, WORKLOAD) == {"layer_norm": CHOICE}


def test_the_table_that_the_damage_is_made_from_is_whole(path):
    path.parent.mkdir()
    path.write_bytes(table())
    assert ChoiceFile(path).read(HERE, WORKLOAD) == {"layer_norm": Choice("triton", {"torch": 1.0})}


def test_a_file_of_another_format_is_read_as_empty(path):
    path.parent.mkdir()
    path.write_text('{"format": 2, "backends": {}}')
    assert ChoiceFile(path).read(HERE, WORKLOAD) == {}


def test_where_nothing_can_be_written_one_warning_says_what_to_do(path):
    temporary_sibling(path).mkdir(parents=True)  # stands in the way, also of root
    with pytest.warns(UserWarning, match="timed at every start; set FASTGPT_CACHE") as caught:
        ChoiceFile(path).add(HERE, WORKLOAD, {"layer_norm": CHOICE})
    assert len(caught) == 1
    assert ChoiceFile(path).read(HERE, WORKLOAD) == {}


@pytest.mark.skipif(sys.platform == "win32", reason="needs fork")
@pytest.mark.filterwarnings("error::UserWarning")  # of a file that cannot be read
def test_two_processes_at_once_leave_a_whole_file(path):
    def write(name: str) -> None:
        for number in range(20):
            ChoiceFile(path).add(HERE, WORKLOAD, {f"{name} {number}": CHOICE})

    context = multiprocessing.get_context("fork")
    writers = [context.Process(target=write, args=(name,)) for name in ("a", "b")]
    for writer in writers:
        writer.start()
    while any(writer.is_alive() for writer in writers):
        assert all(choice == CHOICE for choice in ChoiceFile(path).read(HERE, WORKLOAD).values())
    assert [writer.exitcode for writer in writers] == [0, 0]
    names = ChoiceFile(path).read(HERE, WORKLOAD).keys()
    assert names & {"a 19", "b 19"}
    assert [*path.parent.iterdir()] == [path]


def test_the_hash_of_the_kernels_changes_with_any_of_their_files(tmp_path):
    found = set()
    for name, text in [("a.py", "1"), ("a.py", "2"), ("b.py", ""), ("c.txt", "3"), ("d.toml", "4")]:
        (tmp_path / name).write_text(text)
        found.add(source_hash(tmp_path))
    assert len(found) == 4  # c.txt is not one of them
    (tmp_path / "b.py").rename(tmp_path / "e.py")
    assert source_hash(tmp_path) not in found


def test_the_environment_is_what_is_found_here(monkeypatch):
    triton = pytest.importorskip("triton")
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: f"a GPU named {device}")
    found = environment_of(torch.device("cuda:1"))
    assert (found.gpu, found.torch, found.triton) == ("a GPU named cuda:1", torch.__version__, triton.__version__)
    assert (len(found.kernels), found.products) == (16, "ieee")
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high")
    try:
        assert environment_of(torch.device("cuda:1")).products == "tf32"
    finally:
        torch.set_float32_matmul_precision(before)
