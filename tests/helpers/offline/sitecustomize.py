"""Keeps Python off the network: only loopback may be looked up, connected to or sent to.

On PYTHONPATH, Python imports this at every start, and so the processes that tests start are kept off too. It stands
before a `sitecustomize` of the environment, which runs after it. Code in C that opens its own sockets is not seen.
"""

import importlib.machinery
import importlib.util
import ipaddress
import socket
import sys
from pathlib import Path
from typing import Any


def is_loopback(host: Any) -> bool:
    """Whether a host, as socket functions take it, is this machine; None and "" are."""
    name = host.decode() if isinstance(host, bytes) else str(host or "localhost")
    try:
        return ipaddress.ip_address(name).is_loopback
    except ValueError:  # a name
        return name == "localhost"


def guard() -> None:
    """Refuse, from now on and with an OSError, whatever leaves this machine."""
    look_up = socket.getaddrinfo

    def guarded_look_up(host, *rest, **more):
        if not is_loopback(host):
            raise socket.gaierror(f"the tests may not reach the network, and something looked up {host}")
        return look_up(host, *rest, **more)

    def guarded(name: str):
        reach = getattr(socket.socket, name)

        def wrapped(self, *arguments):  # the address comes last
            if self.family in (socket.AF_INET, socket.AF_INET6) and not is_loopback(arguments[-1][0]):
                raise OSError(f"the tests may not reach the network, and something called {arguments[-1]}")
            return reach(self, *arguments)

        return wrapped

    socket.getaddrinfo = guarded_look_up
    for name in ("connect", "connect_ex", "sendto"):
        setattr(socket.socket, name, guarded(name))


def run_the_next() -> None:
    """Run the `sitecustomize` that this one stands before, if there is one."""
    here = Path(__file__).parent
    others = [path for path in sys.path if Path(path).resolve() != here.resolve()]
    spec = importlib.machinery.PathFinder.find_spec("sitecustomize", others)
    if spec is not None and spec.loader is not None:
        spec.loader.exec_module(importlib.util.module_from_spec(spec))


if __name__ == "sitecustomize":
    guard()
    run_the_next()
