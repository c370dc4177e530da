"""What every test shares: no network but loopback, its own cache, one thread, and `gpu` tests skipped without one."""

import os
import socket
from pathlib import Path

import pytest
import torch

LOOPBACK = ("127.", "localhost", "::1")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    wanted = config.getoption("-m")
    for item in items:
        if item.get_closest_marker("gpu") and not torch.cuda.is_available():
            item.add_marker(pytest.mark.skip(reason="needs a CUDA GPU"))
        if item.get_closest_marker("slow") and "slow" not in wanted:
            item.add_marker(pytest.mark.skip(reason="slow: run with -m slow"))


@pytest.fixture(autouse=True)
def no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    """Refuse every connection and look-up that leaves this machine."""
    connect, look_up = socket.socket.connect, socket.getaddrinfo

    def guarded_connect(self, address, *rest):
        if self.family != socket.AF_UNIX and not str(address[0]).startswith(LOOPBACK):
            raise OSError(f"the tests may not reach the network, and something called {address}")
        return connect(self, address, *rest)

    def guarded_look_up(host, *rest, **more):
        if host is not None and not str(host).startswith(LOOPBACK):
            raise socket.gaierror(f"the tests may not reach the network, and something looked up {host}")
        return look_up(host, *rest, **more)

    monkeypatch.setattr(socket.socket, "connect", guarded_connect)
    monkeypatch.setattr(socket, "getaddrinfo", guarded_look_up)


@pytest.fixture(autouse=True, scope="session")
def one_thread() -> None:
    """Toy sizes run fastest on one thread, and a second one only waits for a busy core."""
    torch.set_num_threads(1)
    os.environ["OMP_NUM_THREADS"] = "1"  # for the processes that tests start


@pytest.fixture(autouse=True)
def cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache folder, so that no test sees or fills the user's."""
    folder = tmp_path_factory.mktemp("cache")
    monkeypatch.setenv("FASTGPT_CACHE", str(folder))
    return folder
