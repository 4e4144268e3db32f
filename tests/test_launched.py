"""A process that a launcher has started as one of several ranks."""

from __future__ import annotations

import socket
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from flatout import __version__, cli
from flatout.errors import UserError
from flatout.launch import hosts, isolation, launcher, lines, meeting, nodes, notes
from flatout.launch.launcher import Launched
from flatout.launch.lines import Line
from flatout.wire import codec
from tests import launched

RUNS_RANKS = pytest.mark.skipif(
    isolation.unavailable_reason() is not None, reason=str(isolation.unavailable_reason())
)

TORCHRUN = launched.place(1, 4, "10.0.0.1", 29500) | {
    "TORCHELASTIC_RUN_ID": "none",
    "TORCHELASTIC_RESTART_COUNT": "0",
    "TORCHELASTIC_USE_AGENT_STORE": "True",
}
SLURM = {
    "SLURM_PROCID": "3",
    "SLURM_NTASKS": "8",
    "SLURM_LOCALID": "1",
    "SLURM_NODELIST": "gpu[03-05,9],login",
    "SLURM_JOB_ID": "123456",
    "SLURM_STEP_ID": "2",
}


@pytest.fixture
def port() -> int:
    """A free port."""
    with socket.create_server(("", 0)) as server:
        return int(server.getsockname()[1])


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder for records; the working folder is another."""
    monkeypatch.setenv("FLATOUT_HOME", str(tmp_path / "home"))
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")
    return tmp_path / "home"


def start(words: list[str], rank: int, port: int, size: int = 2) -> subprocess.Popen[str]:
    return subprocess.Popen(
        launched.flatout("--ranks", "env", "--", *words),
        env=launched.environment(**launched.place(rank, size, "127.0.0.1", port)),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


@RUNS_RANKS
def test_ranks_of_one_host_are_the_program(home: Path, tmp_path: Path, port: int) -> None:
    alone = launched.run_alone(tmp_path, 3)
    words = launched.program(tmp_path, launched.STEPS, 3)
    started = [start(words, rank, port) for rank in (1, 0)]  # both in one folder
    other, rank_0 = map(launched.wait, started)
    rank_0.check_is(alone, 2)
    other.check_is_another(3, 1, 2)
    assert [path.name for path in Path.cwd().iterdir()] == ["made"]
    printed = launched.output_of_rank(home, 1).splitlines()
    assert "sees [] None" in printed
    [hash_of_word] = [line for line in rank_0.stderr.splitlines() if line.startswith("hash ")]
    assert hash_of_word in printed
    assert [line for line in printed if line[0].isdigit()] == rank_0.stdout.splitlines()[1:]


@RUNS_RANKS
@pytest.mark.parametrize("lacking", [0, 1])
def test_all_ranks_say_why_one_cannot_be_run(lacking: int, home: Path, port: int) -> None:
    commands = ["no-such-program" if rank == lacking else "true" for rank in range(2)]
    started = [start([commands[rank]], rank, port) for rank in (1, 0)]
    ended = [launched.wait(process) for process in started]
    assert [one.stderr.count("\n") for one in ended] == [1, 1]
    assert all("there is no program 'no-such-program'" in one.stderr for one in ended)
    assert all(one.status for one in ended)
    of_rank_1, of_rank_0 = ended
    assert f"rank {lacking}" in (of_rank_1 if lacking == 0 else of_rank_0).stderr


def test_one_rank_of_a_launcher_is_a_run_without_ranks(home: Path, port: int) -> None:
    program = "import os; print(sorted({'RANK', 'WORLD_SIZE', 'FLATOUT_RANK'} & set(os.environ)))"
    words = launched.program(home.parent)[:1]
    ended = launched.wait(start([*words, "-c", program], 0, port, size=1))
    assert (ended.status, ended.stdout) == (0, "[]\n")


def test_the_place_that_torchrun_gives() -> None:
    run = "TORCHELASTIC_RUN_ID=none"
    assert launcher.read(TORCHRUN) == Launched(1, 4, "10.0.0.1", 29500, True, run)


def test_the_place_that_srun_gives() -> None:
    place = launcher.read(SLURM)
    assert (place.rank, place.size, place.address) == (3, 8, "gpu03")
    assert not place.has_agent_store
    assert 20000 <= place.port < 30000
    assert launcher.read({**SLURM, "SLURM_PROCID": "0"}).port == place.port
    assert launcher.read({**SLURM, "SLURM_STEP_ID": "3"}).port != place.port
    by_hand = launcher.read({**SLURM, "MASTER_ADDR": "a", "MASTER_PORT": "5"})
    assert (by_hand.address, by_hand.port) == ("a", 5)


def test_the_place_of_a_launcher_inside_of_srun() -> None:
    assert launcher.read({**SLURM, **TORCHRUN}) == launcher.read(
        {**TORCHRUN, "SLURM_JOB_ID": "123456", "SLURM_STEP_ID": "2"}
    )


@pytest.mark.parametrize(
    ("nodes", "first"),
    [
        ("gpu[03-05,9],login", "gpu03"),
        ("login,gpu[03-05]", "login"),
        ("a", "a"),
        ("rack[1,3]n[07-09]-ib,b", "rack1n07-ib"),
    ],
)
def test_the_first_host_of_slurms_list(nodes: str, first: str) -> None:
    assert launcher.first_host(nodes) == first


@pytest.mark.parametrize(
    ("variables", "said"),
    [
        ({}, "neither RANK nor SLURM_PROCID is set"),
        ({"RANK": "0"}, "has set no WORLD_SIZE"),
        ({"RANK": "zero", "WORLD_SIZE": "2"}, "RANK is 'zero', which is not a number"),
        ({"RANK": "2", "WORLD_SIZE": "2"}, "rank 2 is not one of 2 ranks"),
        ({"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "a"}, "has set no MASTER_PORT"),
        ({**TORCHRUN, "MASTER_PORT": "70000"}, "MASTER_PORT is 70000, which is not a port"),
    ],
)
def test_places_that_make_no_sense(variables: dict[str, str], said: str) -> None:
    with pytest.raises(UserError, match=said):
        launcher.read(variables)


def test_only_what_tells_of_other_ranks_is_taken_out() -> None:
    kept = {"SLURM_JOB_ID": "1", "SLURM_CPUS_PER_TASK": "2", "RANKING": "3", "PATH": "/bin"}
    told = {"PMI_RANK": "1", "OMPI_COMM_WORLD_SIZE": "2", "PET_NNODES": "2", "GROUP_RANK": "0"}
    place = {name: "1" for name in SLURM if name in ("SLURM_PROCID", "SLURM_NTASKS")}
    assert launcher.without_ranks({**TORCHRUN, **told, **place, **kept}) == kept


def test_a_name_that_does_not_resolve(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(lines, "RESOLVE_SECONDS", 0)
    for name, value in launched.place(1, 2, "no-such-host.invalid", 29500).items():
        monkeypatch.setenv(name, value)
    assert cli.main(["run", "--ranks", "env", "--", "true"]) == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1
    assert "'no-such-host.invalid', and this host finds no address of that name" in said


def test_a_port_that_is_in_use(
    port: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name, value in launched.place(0, 2, "127.0.0.1", port).items():
        monkeypatch.setenv(name, value)
    with socket.create_server(("", port)):
        assert cli.main(["run", "--ranks", "env", "--", "true"]) == 2
    said = capsys.readouterr().err
    assert f"rank 0 cannot listen on port {port}: " in said
    assert "give all ranks another MASTER_PORT" in said


@pytest.mark.parametrize(
    "words",
    [
        ["--nodes", "2"],
        ["--rendezvous", "a:1"],
        ["--nodes", "2", "--rendezvous", "a:1", "--ranks", "env"],
    ],
)
def test_nodes_and_rendezvous_belong_together(
    words: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["run", *words, "--", "true"]) == 2
    assert "--nodes M and --rendezvous HOST:PORT belong together" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("node0:29500", ("node0", 29500)),
        ("10.0.0.1:1", ("10.0.0.1", 1)),
        ("[fd00::1]:29500", ("fd00::1", 29500)),
    ],
)
def test_addresses_of_a_rendezvous(text: str, found: tuple[str, int]) -> None:
    assert nodes.parse_rendezvous(text) == found


def test_a_rendezvous_that_other_hosts_cannot_reach(capsys: pytest.CaptureFixture[str]) -> None:
    words = ["--nodes", "2", "--rendezvous", "localhost:29500"]
    assert cli.main(["run", *words, "--", "true"]) == 2
    said = capsys.readouterr().err
    assert "on this host, at which other hosts cannot reach it" in said
    assert said.count("\n") == 1


@pytest.mark.parametrize("text", ["node0", "node0:", "fd00::1:29500", "a:70000", "a:0", ":5"])
def test_what_is_no_rendezvous(text: str) -> None:
    with pytest.raises(UserError, match="is not HOST:PORT, such as"):
        nodes.parse_rendezvous(text)


def told(rank: int, address: str = "", kernel: str = "a", run: str = "") -> meeting.Introduction:
    """What a rank of three tells; each host has two processors and two GPUs."""
    gpus = {"CUDA_VISIBLE_DEVICES": ["2", "5"]}
    return meeting.Introduction(__version__, run, rank, 3, address, kernel, [[[0], [1]]], gpus)


def test_strangers_do_not_disturb_the_meeting(port: int) -> None:
    place = Launched(0, 3, "127.0.0.1", port, False, "")
    found: list[object] = []
    host = meeting.Host(place, sys.executable, found.append)
    waits = threading.Thread(target=lambda: found.extend(host.wait_for_all()))
    waits.start()
    connected = [lines.connect("127.0.0.1", port) for _ in range(4)]
    of_another_run, stranger, one, two = [line for line in connected if line is not None]
    of_another_run.send(**codec.encode(told(1, run="another")))
    stranger._socket.sendall(b"GET / HTTP/1.1\n\n")
    one.send(**codec.encode(told(1)))
    two.send(**codec.encode(told(2)))
    waits.join(60)
    assert found == [1, 2]
    assert of_another_run.receive() == [{"refusal": "rank 0 belongs to another run"}]
    stranger.receive()
    assert stranger.is_lost
    assert not one.is_lost


def test_a_rank_that_is_there_already_is_refused(port: int) -> None:
    host = meeting.Host(Launched(0, 3, "127.0.0.1", port, False, ""), sys.executable, print)
    first, second = lines.connect("127.0.0.1", port), lines.connect("127.0.0.1", port)
    assert first is not None
    assert second is not None
    for line in (first, second):
        line.send(**codec.encode(told(1)))
    with pytest.raises(UserError, match="not the only one that was told to be this rank"):
        host.wait_for_all()
    assert "refusal" in second.receive()[0]


class _Reached(Line):
    """A connection that has reached rank 0 at an address."""

    def __init__(self, own_address: str) -> None:
        self.own_address = own_address


@pytest.mark.parametrize(
    ("kernels", "expected", "gpus"),
    [
        (["a", "a", "a"], [[0], [1], [0]], "252"),
        (["a", "b", "b"], [[0], [0], [1]], "225"),
        (["a", "b", "c"], [[0, 1], [0, 1], [0, 1]], "222"),
    ],
)
def test_ranks_of_one_host_share_out_its_processors_and_gpus(
    kernels: list[str], expected: list[list[int]], gpus: str
) -> None:
    others = {
        rank: (_Reached("127.0.0.1" if rank == 1 else "10.0.0.1"), told(rank, kernel=kernels[rank]))
        for rank in (2, 1)
    }
    address, shares = meeting.assign(told(0, kernel=kernels[0]), others)
    assert address == "10.0.0.1"
    assert [share.processors for share in shares] == expected
    assert "".join(share.variables["CUDA_VISIBLE_DEVICES"] for share in shares) == gpus


def test_a_rank_that_must_end_does_not_wait_for_rank_0_for_ever(
    port: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(hosts, "INTERRUPTED_S", 0)
    with lines.listen(port):
        line = lines.connect("127.0.0.1", port)
        assert line is not None
        membership = hosts._Membership(line, notes.Notes(tmp_path), "", tmp_path)
        said: list[str] = []
        assert hosts._wait_for_rank_0(membership, [15], said.append) == -15
        assert len(said) == 1


def test_notes_are_files_of_run_directories_only(tmp_path: Path) -> None:
    board = notes.Notes(tmp_path)
    assert board.add("died-1", "killed\n-9\n")
    assert not board.add("died-1", "again\n-9\n")
    for name in ("../died-1", "request.json", "died-", "died-1/2", "record-1.jsonl"):
        assert not board.add(name, "")
    (tmp_path / "ended-0-0").touch()
    (tmp_path / "record-1.jsonl").touch()
    assert board.take_new() == {"ended-0-0": ""}
    assert board.take_new() == {}
    assert (tmp_path / "died-1").read_text() == "killed\n-9\n"
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "died-1",
        "ended-0-0",
        "record-1.jsonl",
    ]
