"""Shared by every test: no network but loopback, its own cache, one thread, signals as a terminal has them, and `gpu`
tests skipped without one.

Without a GPU the kernels run in Triton's interpreter. On one, `pytest -m gpu -n 12` compiles them in twelve processes,
which share Triton's and torch.compile's caches on disk, and have an equal share of the GPU's memory each.
"""

import importlib.util
import itertools
import os
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.helpers import covering
from tests.helpers.offline import sitecustomize as offline

# Where tests run in several processes, torch.compile starts no more of them in each.
WORKERS = int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1"))
if WORKERS > 1:
    os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", "1")
# These run first: their few tests are long, and at the end one process would wait for them.
EARLY = ("test_aot.py", "test_train_triton.py", "test_killed.py", "test_crash.py")
OF_THE_GPU = 0.9  # what the processes share; each also has a context of half a GiB, beside PyTorch's memory


def pytest_configure(config: pytest.Config) -> None:
    """Give files to processes in the tests' order; xdist's own begins with the files that have the most tests."""
    if hasattr(config.option, "loadscopereorder"):
        config.option.loadscopereorder = False


def pytest_collectstart() -> None:
    """Choose Triton's interpreter where there is no GPU, before a test file imports Triton, which reads that."""
    if "TRITON_INTERPRET" not in os.environ and not has_gpu():
        os.environ["TRITON_INTERPRET"] = "1"


def has_gpu() -> bool:
    """Whether PyTorch finds a CUDA GPU. It is imported here: xdist's first process, which runs no test, needs none."""
    import torch

    return torch.cuda.is_available()


@pytest.hookimpl(tryfirst=True)  # before pytest deselects by markers
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    items.sort(key=lambda item: item.path.name not in EARLY)
    covering.mark_the_rest_slow(items)
    wanted = config.getoption("-m")
    if "slow" not in wanted:
        leave_out_slow(config, items)
    for item in items:
        large = item.get_closest_marker("gpu_large")
        if (large or item.get_closest_marker("gpu")) and not has_gpu():
            item.add_marker(pytest.mark.skip(reason="needs a CUDA GPU"))
        elif large and "gpu_large" not in wanted:
            item.add_marker(pytest.mark.skip(reason="takes tens of GiB of a GPU: run with -m gpu_large"))


def leave_out_slow(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Deselect slow tests, as `-m "not slow"` does: to skip some 2,000 takes seconds, and as many reports."""
    slow, rest = [], []
    for item in items:
        (slow if item.get_closest_marker("slow") else rest).append(item)
    config.hook.pytest_deselected(items=slow)
    items[:] = rest


def pytest_report_header(config: pytest.Config) -> str | None:
    """Say what is left out."""
    return None if "slow" in config.getoption("-m") else "slow tests are deselected: run them with -m slow"


def pytest_runtest_setup(item: pytest.Item) -> None:
    """Let no process of several take the GPU's memory from the others; what it has cached makes room first."""
    if WORKERS > 1 and item.get_closest_marker("gpu") and has_gpu():
        import torch

        torch.cuda.set_per_process_memory_fraction(OF_THE_GPU / WORKERS)


@pytest.fixture(autouse=True, scope="session")
def no_network() -> None:
    """Refuse every connection and look-up that leaves this machine, here and in the processes that tests start."""
    offline.guard()
    others = os.environ.get("PYTHONPATH")
    os.environ["PYTHONPATH"] = os.pathsep.join([str(Path(offline.__file__).parent), *([others] if others else [])])


@pytest.fixture(autouse=True, scope="session")
def one_thread() -> None:
    """Toy sizes run fastest on one thread, and a second one only waits for a busy core."""
    import torch

    torch.set_num_threads(1)
    os.environ["OMP_NUM_THREADS"] = "1"  # for the processes that tests start


@pytest.fixture(autouse=True, scope="session")
def no_wait_for_the_disk() -> None:
    """Sync no file in this process: what was written outlives a process, though not the machine."""
    os.fsync = lambda descriptor: None


@pytest.fixture(autouse=True, scope="session")
def quick_interpreter() -> None:
    """Make Triton's interpreter faster, where kernels run in it."""
    if os.environ.get("TRITON_INTERPRET") == "1" and importlib.util.find_spec("triton"):
        from tests.helpers import interpreter

        interpreter.make_quick()


@pytest.fixture(autouse=True, scope="session")
def usual_signals() -> None:
    """Hear the signals that nohup, or a shell's &, has left ignored: processes that tests start inherit that."""
    signal.signal(signal.SIGINT, signal.default_int_handler)
    if hasattr(signal, "SIGHUP"):
        signal.signal(signal.SIGHUP, signal.SIG_DFL)


@pytest.fixture(scope="session")
def caches(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Names of folders for `cache`, all in one: for a new name in the folder of all tests, pytest would list that."""
    parent = tmp_path_factory.mktemp("caches")
    return (parent / str(number) for number in itertools.count())


@pytest.fixture(autouse=True)
def cache(caches: Iterator[Path], monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache folder, so that no test sees or fills the user's."""
    folder = next(caches)
    folder.mkdir()
    monkeypatch.setenv("FASTGPT_CACHE", str(folder))
    return folder


@pytest.fixture(autouse=True)
def no_picture(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Leave out the picture of a run's curves, which takes longer than the steps of a small run."""
    if not request.node.get_closest_marker("picture"):
        monkeypatch.setattr("fastgpt.loggers.curves.plot_loss", lambda out_dir: out_dir / "plots" / "loss.png")


@pytest.fixture
def workplace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A working folder of the test's own, with text.txt in it; samples are short, and what was spawned ends with it."""
    from fastgpt.generation import sample
    from tests.helpers import runs

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sample, "SAMPLE_TOKENS", 5)
    (tmp_path / "text.txt").write_text(runs.TEXT, encoding="utf-8")
    yield tmp_path
    while runs.SPAWNED:
        runs.SPAWNED.pop().kill()
