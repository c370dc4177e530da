"""Nothing that the tests do reaches the network, neither here nor in the processes that they start."""

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from tests.helpers.offline.sitecustomize import is_loopback

ELSEWHERE = "192.0.2.1"  # of a block that nobody has (RFC 5737)
PROBES = {
    "connect": f"socket.socket().connect(({ELSEWHERE!r}, 9))",
    "connect_ex": f"socket.socket().connect_ex(({ELSEWHERE!r}, 9))",
    "connect6": "socket.socket(socket.AF_INET6).connect(('2001:db8::1', 9, 0, 0))",
    "sendto": f"socket.socket(type=socket.SOCK_DGRAM).sendto(b'', ({ELSEWHERE!r}, 9))",
    "sendto with flags": f"socket.socket(type=socket.SOCK_DGRAM).sendto(b'', 0, ({ELSEWHERE!r}, 9))",
    "getaddrinfo": "socket.getaddrinfo('fastgpt.invalid', 80)",
    "create_connection": f"socket.create_connection(({ELSEWHERE!r}, 9), 1)",
    "urlopen": f"__import__('urllib.request').request.urlopen('http://{ELSEWHERE}/')",
}
LOOPBACK = """
import socket
with socket.create_server(("127.0.0.1", 0)) as server:
    with socket.create_connection(("localhost", server.getsockname()[1])) as client:
        client.sendall(b"x")
        assert server.accept()[0].recv(1) == b"x"
    assert socket.socket().connect_ex(server.getsockname()) == 0
with socket.socket(type=socket.SOCK_DGRAM) as receiver:
    receiver.bind(("127.0.0.1", 0))
    socket.socket(type=socket.SOCK_DGRAM).sendto(b"y", receiver.getsockname())
    assert receiver.recv(1) == b"y"
assert socket.getaddrinfo(None, 80)
left, right = socket.socketpair()
left.sendall(b"z")
assert right.recv(1) == b"z"
"""


def child(code: str, *paths: Path) -> subprocess.CompletedProcess:
    """Run Python code in a process of its own, with more folders at the end of its path."""
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([os.environ["PYTHONPATH"], *map(str, paths)])}
    command = [sys.executable, "-c", f"import socket\n{code}"]
    return subprocess.run(command, capture_output=True, text=True, env=environment, timeout=60, check=False)


@pytest.mark.parametrize("name", PROBES)
def test_nothing_here_reaches_out(name: str):
    with pytest.raises(OSError, match="the tests may not reach the network"):
        exec(PROBES[name], {"socket": socket})


def test_nothing_in_a_process_that_a_test_starts_reaches_out():
    code = "".join(f"try: {probe}\nexcept OSError as error: print({name!r}, error)\n" for name, probe in PROBES.items())
    lines = child(code).stdout.splitlines()
    assert len(lines) == len(PROBES)
    for line, name in zip(lines, PROBES, strict=True):
        assert line.startswith(name)
        assert "the tests may not reach the network" in line


def test_loopback_works_here_and_there():
    exec(LOOPBACK, {})
    done = child(LOOPBACK)
    assert (done.returncode, done.stderr) == (0, "")


def test_the_environments_own_sitecustomize_runs_as_well(tmp_path: Path):
    (tmp_path / "sitecustomize.py").write_text("import os\nos.environ['THEIRS'] = __name__\n")
    done = child(f"import os\nprint(os.environ.get('THEIRS'))\n{PROBES['getaddrinfo']}", tmp_path)
    assert done.stdout == "sitecustomize\n"
    assert "the tests may not reach the network" in done.stderr


@pytest.mark.parametrize("host", ["127.0.0.1", "127.8.9.1", "::1", "localhost", b"localhost", None, ""])
def test_this_machine_is_loopback(host):
    assert is_loopback(host)


@pytest.mark.parametrize("host", ["127.evil.example", "localhost.example", "0x7f.1.example", "10.0.0.1", "::2", b"a.b"])
def test_another_machine_is_not(host):
    assert not is_loopback(host)
