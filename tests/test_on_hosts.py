"""Ranks on two and four hosts, which are network namespaces: they print what the program prints
alone, and end together. ``make hosts`` runs them."""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from flatout.launch import isolation
from tests import launched, namespaces

REASON = isolation.unavailable_reason() or namespaces.unavailable_reason()

pytestmark = [
    pytest.mark.hosts,
    pytest.mark.skipif(REASON is not None, reason=str(REASON)),
]

PORT = 29500
ENDLESS = 10**9

MakeHosts = Callable[[int], namespaces.Hosts]


@pytest.fixture
def make_hosts() -> Iterator[MakeHosts]:
    """Makes hosts, which are removed."""
    with contextlib.ExitStack() as until_end:

        def make(count: int) -> namespaces.Hosts:
            return until_end.enter_context(contextlib.closing(namespaces.Hosts(count)))

        yield make


class Run:
    """Ranks of the program, one on each host, in one folder that all hosts share.

    Args:
        hosts: they run on.
        folder: for what they leave.
        words: of ``flatout run`` on a host, or of what starts it.
        variables: returns what the launcher tells a rank.
        steps, status: of the program.
    """

    def __init__(
        self,
        hosts: namespaces.Hosts,
        folder: Path,
        words: Callable[[int], list[str]],
        variables: Callable[[int], dict[str, str]] = lambda rank: {},
        *,
        steps: int = launched.STEPS,
        status: int = 0,
    ) -> None:
        self._folder = folder
        work = folder / "work"
        work.mkdir()
        program = launched.program(folder, steps, status)
        self.processes = []
        for rank in reversed(range(len(hosts.addresses))):
            variables_here = launched.environment(
                FLATOUT_HOME=str(self.home(rank)), **variables(rank)
            )
            command = [*words(rank), "--", *program]
            self.processes.insert(0, hosts.start(rank, command, work, variables_here))

    def home(self, rank: int) -> Path:
        """The folder for the records of a rank."""
        return self._folder / f"home-{rank}"

    def wait(self) -> list[launched.Ended]:
        """Wait for the end of all; returns how they have ended, by rank."""
        return [launched.wait(process) for process in self.processes]

    def wait_for_a_loss(self) -> None:
        """Wait until rank 0 has made a step."""
        output = self.processes[0].stdout
        assert output is not None
        while not (line := output.readline())[:1].isdigit():
            assert line, self.wait()

    def find_program(self, rank: int) -> int:
        """Return the id of the process in which a rank runs the program."""
        script = str(self._folder / "program.py")
        of_rank = f"FLATOUT_HOME={self.home(rank)}".encode()
        for name in filter(str.isdigit, os.listdir("/proc")):
            with contextlib.suppress(OSError):
                entries = Path(f"/proc/{name}/environ").read_bytes().split(b"\0")
                found = Path(f"/proc/{name}/cmdline").read_bytes().decode().split("\0")
                if of_rank in entries and found[1:2] == [script]:
                    return int(name)
        raise AssertionError(script)

    def left(self) -> list[str]:
        """The command lines of processes of the run that still exist."""
        found = []
        for name in filter(str.isdigit, os.listdir("/proc")):
            with contextlib.suppress(OSError):
                entries = Path(f"/proc/{name}/environ").read_bytes()
                if f"FLATOUT_HOME={self._folder}/".encode() in entries:
                    found.append(Path(f"/proc/{name}/cmdline").read_bytes().decode())
        return found


def by_hand(hosts: namespaces.Hosts, address: str, **more: str) -> dict[str, Any]:
    """What ``Run`` needs for ranks whose places are set by hand."""
    size = len(hosts.addresses)
    return {
        "words": lambda rank: launched.flatout("--ranks", "env"),
        "variables": lambda rank: launched.place(rank, size, address, PORT) | more,
    }


def on_nodes(hosts: namespaces.Hosts, rendezvous: str) -> dict[str, Any]:
    """What ``Run`` needs for ``--nodes``."""
    count = str(len(hosts.addresses))
    words = launched.flatout("--nodes", count, "--rendezvous", rendezvous, "--ranks", "1")
    return {"words": lambda rank: words}


@pytest.mark.parametrize("count", [2, 4])
def test_places_set_by_hand(count: int, make_hosts: MakeHosts, tmp_path: Path) -> None:
    alone = launched.run_alone(tmp_path)
    hosts = make_hosts(count)
    rank_0, *others = Run(hosts, tmp_path, **by_hand(hosts, hosts.addresses[0])).wait()
    rank_0.check_is(alone, count)
    for rank, other in enumerate(others, 1):
        other.check_is_another(0, rank, count)


@pytest.mark.parametrize("version", [4, 6])
def test_nodes(version: int, make_hosts: MakeHosts, tmp_path: Path) -> None:
    alone = launched.run_alone(tmp_path, 3)
    hosts = make_hosts(2)
    address = hosts.addresses[0] if version == 4 else f"[{hosts.addresses_v6[0]}]"
    run = Run(hosts, tmp_path, **on_nodes(hosts, f"{address}:{PORT}"), status=3)
    rank_0, other = run.wait()
    rank_0.check_is(alone, 2)
    other.check_is_another(3, 1, 2)
    assert not [line for one in (rank_0, other) for line in one.stderr.splitlines()
                if not line.startswith(("flatout: ", "hash "))]  # fmt: skip
    assert not run.left()


def test_a_torchrun_of_the_user(make_hosts: MakeHosts, tmp_path: Path) -> None:
    alone = launched.run_alone(tmp_path)
    hosts = make_hosts(2)

    def torchrun(rank: int) -> list[str]:
        where = ["--master-addr", hosts.addresses[0], "--master-port", str(PORT)]
        size = ["--nnodes", "2", "--nproc-per-node", "1", "--node-rank", str(rank)]
        launcher = [sys.executable, "-m", "torch.distributed.run", "--no-python", *size, *where]
        return [*launcher, *launched.flatout("--ranks", "env")]

    rank_0, other = Run(hosts, tmp_path, torchrun).wait()
    rank_0.check_is(alone, 2)
    other.check_is_another(0, 1, 2)


def test_the_interface_that_the_user_names(make_hosts: MakeHosts, tmp_path: Path) -> None:
    alone = launched.run_alone(tmp_path)
    hosts = make_hosts(2)
    address = hosts.addresses[0]
    run = Run(hosts, tmp_path, **by_hand(hosts, address, GLOO_SOCKET_IFNAME="eth0"))
    run.wait()[0].check_is(alone, 2)
    (tmp_path / "work").rename(tmp_path / "first")
    run = Run(hosts, tmp_path, **by_hand(hosts, address, GLOO_SOCKET_IFNAME="eth7"))
    rank_0, _ = run.wait()
    assert rank_0.status == 1
    assert "flatout: --ranks has failed: " in rank_0.stderr
    assert "eth7" in rank_0.stderr


@pytest.mark.parametrize(
    ("killed", "status", "sentence"),
    [
        ("program of 1", 1, "rank 1 has ended: killed by SIGKILL (on 10.77.0.2, output: "),
        ("flatout of 1", 1, "rank 1 has ended: the connection to 10.77.0.2 is lost"),
        ("program of 0", -9, "rank 0 has died: killed by SIGKILL, so the other ranks were ended"),
        ("flatout of 0", -9, None),
    ],
)
def test_a_rank_that_is_killed_ends_all(
    killed: str, status: int, sentence: str | None, make_hosts: MakeHosts, tmp_path: Path
) -> None:
    hosts = make_hosts(2)
    run = Run(hosts, tmp_path, **by_hand(hosts, hosts.addresses[0]), steps=ENDLESS)
    run.wait_for_a_loss()
    what, _, rank = killed.partition(" of ")
    find = run.find_program if what == "program" else lambda rank: run.processes[rank].pid
    os.kill(find(int(rank)), signal.SIGKILL)
    began_s = time.monotonic()
    rank_0, other = run.wait()
    assert time.monotonic() - began_s < 10
    assert rank_0.status == status
    assert other.status
    if sentence is not None:
        assert f"flatout: {sentence}" in rank_0.stderr
        assert rank_0.stderr.count("flatout: rank") == 1
    elif status == -9:
        assert "flatout: rank 0 has died: the connection to 10.77.0.1 is lost" in other.stderr
    assert not run.left()


def test_a_host_that_falls_silent_ends_all(make_hosts: MakeHosts, tmp_path: Path) -> None:
    hosts = make_hosts(2)
    run = Run(hosts, tmp_path, **by_hand(hosts, hosts.addresses[0]), steps=ENDLESS)
    run.wait_for_a_loss()
    hosts.cut_off(1)
    rank_0, other = run.wait()
    assert (rank_0.status, other.status) == (1, 1)
    assert "rank 1 has died: the connection to 10.77.0.2 is lost, so rank 0" in rank_0.stderr
    assert "rank 0 has died: the connection to 10.77.0.1 is lost" in other.stderr
    assert not run.left()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_to_rank_0_of_nodes_ends_all(
    number: signal.Signals, make_hosts: MakeHosts, tmp_path: Path
) -> None:
    hosts = make_hosts(2)
    words = on_nodes(hosts, f"{hosts.addresses[0]}:{PORT}")
    run = Run(hosts, tmp_path, **words, steps=ENDLESS)
    run.wait_for_a_loss()
    os.killpg(run.processes[0].pid, number)
    rank_0, other = run.wait()
    assert (rank_0.status, other.status) == (-number, -number)
    assert "torch/distributed/elastic" not in rank_0.stderr + other.stderr
    assert not run.left()


def test_a_signal_to_another_rank_lets_rank_0_decide(make_hosts: MakeHosts, tmp_path: Path) -> None:
    hosts = make_hosts(2)
    run = Run(hosts, tmp_path, **by_hand(hosts, hosts.addresses[0]), steps=ENDLESS)
    run.wait_for_a_loss()
    run.processes[1].terminate()
    error = run.processes[1].stderr
    assert error is not None
    lines = [error.readline(), error.readline()]
    assert "rank 0, on 10.77.0.1, decides" in lines[1]
    run.processes[0].terminate()
    rank_0, other = run.wait()
    assert (rank_0.status, other.status) == (-signal.SIGTERM, 128 + signal.SIGTERM)
    assert not run.left()


def test_no_other_host_comes(make_hosts: MakeHosts, tmp_path: Path) -> None:
    hosts = make_hosts(2)
    run = Run(hosts, tmp_path, **by_hand(hosts, "10.77.0.9"), steps=ENDLESS)
    error = run.processes[1].stderr
    assert error is not None
    assert error.readline() == f"flatout: waiting for rank 0 at 10.77.0.9, port {PORT}\n"
    for process in run.processes:
        process.terminate()
    assert [ended.status for ended in run.wait()] == [-signal.SIGTERM] * 2
