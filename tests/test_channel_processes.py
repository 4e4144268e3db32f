"""How processes come to share memory, and how they end when one of them dies."""

from __future__ import annotations

import itertools
import os
import signal
from pathlib import Path

import pytest

from tests import side_by_side
from tests.test_channel import CHUNK, SIZES

JOIN = """
import os, signal, time
from flatout import agent
from flatout.parallel import handover, joining, memory
from flatout.parallel.place import place

here = place()
ending = agent._session._parallel._ending

def die():
    # As the launcher of the ranks does.
    (here.run_directory / f"died-{here.rank}").write_text("killed by SIGKILL\\n-9\\n")
    os.kill(os.getpid(), signal.SIGKILL)

def wait_for_all():
    # Over gloo, one that is still in its last exchange loses the connection to one that ends.
    (here.run_directory / f"done-{here.rank}").touch()
    while len(list(here.run_directory.glob("done-*"))) < here.size:
        time.sleep(0.01)

"""
"""Processes that join without a training."""


@pytest.mark.parametrize("ranks", SIZES)
def test_ranks_share_memory_and_leave_nothing(ranks: int, tmp_path: Path) -> None:
    program = (
        JOIN
        + """
def find_open():
    links = [os.path.join("/proc/self/fd", name) for name in os.listdir("/proc/self/fd")]
    names = [os.readlink(link) for link in links if os.path.islink(link)]
    return {name for name in names if any(x in name for x in ("memfd", "pidfd", "socket"))}

open_before = find_open()
channel = joining.join(here, ending).channel
print(type(channel).__name__, channel.exchange(str(here.rank).encode()))
x = torch.full((10**6,), 1.0 + here.rank)
channel.sum([x])
print(x.unique().tolist(), len(find_open() - open_before))  # of memory and of processes
channel.close()
print(find_open() - open_before, "flatout-ranks" in open("/proc/self/maps").read())
"""
    )
    messages = [str(rank).encode() for rank in range(ranks)]
    total = float(sum(range(1, ranks + 1)))
    for outcome in side_by_side.run(program, ranks, tmp_path):
        assert outcome.stderr == ""
        assert outcome.stdout == f"Memory {messages}\n[{total}] 2\nset() False\n"
    left = {path.name.partition("-")[0] for path in (tmp_path / f"run-{ranks}").iterdir()}
    assert left <= {"port", "ticket", "request.json", "record"}
    assert not [name for name in os.listdir("/dev/shm") if "flatout" in name]


HINDRANCES = {
    "no compiler": "handover.mapping_bytes = lambda size: fail(kernels.KernelError('none'))",
    "no pidfd_open": "os.pidfd_open = lambda pid: fail(OSError('none'))",
    "no memfd_create": "del os.memfd_create",
    "no memory": "os.posix_fallocate = lambda *given: fail(OSError('full'))",
    "no address space": "memory.mmap.mmap = lambda *given: fail(OSError('full'))",
    "another user": "os.geteuid = lambda: 12345; handover._ANSWER_SECONDS = 0.1",
}


@pytest.mark.parametrize("hindered", [0, 1])
@pytest.mark.parametrize("name", HINDRANCES)
def test_all_use_gloo_if_one_cannot_share_memory(name: str, hindered: int, tmp_path: Path) -> None:
    program = JOIN + (
        "from flatout import kernels\n"
        "def fail(error): raise error\n"
        f"if here.rank == {hindered}: {HINDRANCES[name]}\n"
        "channel = joining.join(here, ending).channel\n"
        "print(type(channel).__name__, channel.exchange(str(here.rank).encode()))\n"
        "wait_for_all()\n"
    )
    is_asked = hindered == 0 or name != "no memory"
    expected = "Group" if is_asked else "Memory"  # only rank 0 makes it
    for outcome in side_by_side.run(program, 2, tmp_path):
        assert outcome.stdout == f"{expected} [b'0', b'1']\n", outcome.stderr


JOINING = (
    "handover._is_possible",
    "handover._listen",
    "handover._reach",
    "handover._hand_out",
    "handover._take",
    "handover.socket.send_fds",
    "handover.socket.recv_fds",
    "memory.mmap.mmap",
    "memory.Memory.meet",
)


@pytest.mark.parametrize(("function", "killed"), list(itertools.product(JOINING, [0, 1])))
def test_a_rank_that_dies_while_it_joins(function: str, killed: int, tmp_path: Path) -> None:
    program = JOIN + (
        f"if here.rank == {killed}: {function} = lambda *given, **named: die()\n"
        "channel = joining.join(here, ending).channel\n"
        "channel.meet(b'x')\n"
        f"if here.rank == {killed}: die()\n"
        "channel.meet(b'x')\n"
    )
    outcomes = side_by_side.run(program, 3, tmp_path)
    assert outcomes[killed].status == -signal.SIGKILL
    for outcome in outcomes[:killed] + outcomes[killed + 1 :]:
        assert outcome.status == 1, outcome.stderr


@pytest.mark.parametrize("rounds", range(6))
@pytest.mark.parametrize("killed", [0, 2])
def test_a_rank_that_dies_in_an_exchange(killed: int, rounds: int, tmp_path: Path) -> None:
    program = JOIN + (
        "channel = joining.join(here, ending).channel\n"
        "class Dying:\n"
        "    def advance(self, exchange):\n"
        f"        while exchange.round < {rounds}:\n"
        "            exchange.wait_ns = 0\n"
        "            memory.load_kernel().advance(exchange)\n"
        "        os.kill(os.getpid(), signal.SIGKILL)\n"
        f"if here.rank == {killed}: channel._kernel = Dying()\n"
        f"channel.sum([torch.zeros(4 * {CHUNK // 8})])\n"
        "channel.meet(b'x')\n"
    )
    outcomes = side_by_side.run(program, 3, tmp_path)
    assert outcomes[killed].status == -signal.SIGKILL
    for outcome in outcomes[:killed] + outcomes[killed + 1 :]:
        assert outcome.status == 1
        assert outcome.stderr == (
            f"flatout: the connection to the other ranks is lost: rank {killed} has died\n"
        )


@pytest.mark.parametrize("is_shared", [False, True], ids=["gloo", "memory"])
def test_a_training_is_the_same(is_shared: bool, tmp_path: Path) -> None:
    program = """
from torch import nn
from flatout import agent
from flatout.parallel import joining
if not SHARED:
    joining.share_memory = lambda *given: None
torch.manual_seed(0)
model = nn.Sequential(nn.Conv2d(3, 5, 3), nn.BatchNorm2d(5), nn.Flatten(), nn.Linear(20, 2))
optimizer = torch.optim.SGD(model.parameters(), 0.1)
for rows in (7, 4, 5):
    optimizer.zero_grad()
    loss = model(torch.randn(rows, 3, 4, 4)).square().mean()
    loss.backward()
    optimizer.step()
    print(loss.item())
team = agent._session._parallel._team if agent._session._parallel else None
print(team and type(team.channel).__name__, file=sys.stderr)
""".replace("SHARED", str(is_shared))
    (alone,) = side_by_side.run(program, 1, tmp_path)
    assert alone.status == 0
    for outcome in side_by_side.run(program, 3, tmp_path):
        assert outcome.stderr.splitlines()[-1] == ("Memory" if is_shared else "Group")
        expected = [float(line) for line in alone.stdout.split()]
        assert [float(x) for x in outcome.stdout.split()] == pytest.approx(expected, rel=1e-10)
