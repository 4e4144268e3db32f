"""A run with several ranks prints, writes and ends as the program alone, and leaves nothing."""

from __future__ import annotations

import contextlib
import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from flatout import cli
from flatout.launch import companions, isolation
from flatout.machine import cores
from flatout.wire.record import read_run
from flatout.wire.request import RUN_VARIABLE, Request

RUNS_RANKS = pytest.mark.skipif(
    isolation.unavailable_reason() is not None, reason=str(isolation.unavailable_reason())
)


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder for records; the working folder is another."""
    monkeypatch.setenv("FLATOUT_HOME", str(tmp_path / "home"))
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")
    return tmp_path / "home"


def flatout(program: str, ranks: int = 2, *arguments: str) -> list[str]:
    """A command line that runs a program, with arguments of its own."""
    Path("program.py").write_text(program)
    own = ["run", "--ranks", str(ranks), "--"]
    return [sys.executable, "-m", "flatout", *own, sys.executable, "program.py", *arguments]


def ended(
    program: str, ranks: int = 2, *arguments: str, **options: object
) -> subprocess.CompletedProcess[str]:
    return subprocess.run(  # type: ignore[call-overload, no-any-return]
        flatout(program, ranks, *arguments),
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
        **options,
    )


def run_directory(home: Path) -> Path:
    [directory] = (home / "runs").iterdir()
    return directory


def output(home: Path, rank: int = 1) -> str:
    return companions.output_file(run_directory(home), rank).read_text()


def left(home: Path) -> list[int]:
    """The processes of the runs in a folder that still exist."""
    found = []
    for name in os.listdir("/proc"):
        if name.isdigit():
            with contextlib.suppress(OSError):
                environment = Path(f"/proc/{name}/environ").read_bytes().split(b"\0")
                of_run = f"{RUN_VARIABLE}={home}/".encode()
                if any(entry.startswith(of_run) for entry in environment):
                    found.append(int(name))
    return found


def wait_until_gone(home: Path, timeout_s: float = 10) -> None:
    deadline_s = time.monotonic() + timeout_s
    while left(home):
        assert time.monotonic() < deadline_s, left(home)
        time.sleep(0.02)


PROGRAM = """
import os, random, sys
os.mkdir("made")
print("numbers", random.random(), hash("word"), sys.argv[1:])
print("stdin", sys.stdin.read())
with open("log.txt", "a") as file:
    file.write("a line\\n")
print("read back", open("log.txt").read())
print("to stderr", file=sys.stderr)
sys.exit(int(sys.argv[1]))
"""


@RUNS_RANKS
@pytest.mark.parametrize("status", [0, 3])
@pytest.mark.parametrize("ranks", [2, 3])
def test_rank_0_is_the_program(status: int, ranks: int, home: Path) -> None:
    Path("data.txt").write_text("typed")
    with open("data.txt") as data:
        done = ended(PROGRAM, ranks, str(status), stdin=data)
    assert done.returncode == status
    assert done.stdout.splitlines()[1:] == ["stdin typed", "read back a line", ""]
    assert done.stderr.splitlines()[0] == "to stderr"
    assert all(line.startswith("flatout: ") for line in done.stderr.splitlines()[1:])
    assert "rank" not in done.stderr.replace(str(home), "")
    assert Path("log.txt").read_text() == "a line\n"
    assert sorted(os.listdir()) == ["data.txt", "log.txt", "made", "program.py"]
    for rank in range(1, ranks):
        assert sorted(output(home, rank).splitlines()) == sorted(
            [*done.stdout.splitlines(), "to stderr"]
        )
    assert not left(home)


WAITING = """
import os, signal, subprocess, sys, time
nowhere = subprocess.DEVNULL
started = subprocess.Popen(["sleep", "600"], start_new_session=True, stdout=nowhere, stderr=nowhere)
try:
    print(os.getpid(), started.pid, flush=True)
    time.sleep(600)
except KeyboardInterrupt:
    if sys.argv[1:] != ["handles"]:
        raise
    print("saved", flush=True)
    sys.exit(5)
"""


class Running:
    """A run of ``WAITING`` that has begun on all ranks.

    Attributes:
        flatout: its process, which is the leader of a group of its own.
        pids: process id of each rank.
        started: process id of what each rank has started in the background.
    """

    def __init__(self, home: Path, ranks: int, *arguments: str) -> None:
        self.flatout = subprocess.Popen(
            flatout(WAITING, ranks, *arguments),
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )
        assert self.flatout.stdout is not None
        lines = [self.flatout.stdout.readline()]
        for rank in range(1, ranks):
            while not (line := output(home, rank)).endswith("\n"):
                assert self.flatout.poll() is None
                time.sleep(0.01)
            lines.append(line)
        self.pids, self.started = zip(*(map(int, line.split()) for line in lines), strict=True)

    def wait(self) -> tuple[int, str, list[str]]:
        """Wait for the end; returns exit status, standard output, and what flatout has said."""
        out, err = self.flatout.communicate(timeout=20)
        lines = [line for line in err.splitlines() if line.startswith("flatout: ")]
        return self.flatout.returncode, out, lines


@pytest.fixture
def no_process_left(home: Path) -> Iterator[None]:
    """End what a failed test has left behind."""
    yield
    for pid in left(home):
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)


KILLED = pytest.mark.usefixtures("no_process_left")


def survivors(home: Path, running: Running) -> None:
    """Check that rank 0 alone leaves its background process, as it would without ranks; end it."""
    deadline_s = time.monotonic() + 5
    while left(home) != [running.started[0]]:
        assert time.monotonic() < deadline_s, (left(home), running.pids, running.started)
        time.sleep(0.02)
    os.kill(running.started[0], signal.SIGKILL)


@RUNS_RANKS
@KILLED
@pytest.mark.parametrize(("ranks", "killed"), [(2, 0), (2, 1), (3, 2)])
def test_a_rank_that_is_killed_ends_all(ranks: int, killed: int, home: Path) -> None:
    running = Running(home, ranks)
    began_s = time.monotonic()
    os.kill(running.pids[killed], signal.SIGKILL)
    status, out, said = running.wait()
    assert time.monotonic() - began_s < 10
    assert (status, out) == ((-signal.SIGKILL if killed == 0 else 1), "")
    [sentence] = [line for line in said if "rank" in line.replace(str(home), "")]
    assert sentence.startswith(f"flatout: rank {killed} has died: killed by SIGKILL")
    survivors(home, running)


@RUNS_RANKS
@KILLED
def test_nothing_of_the_companions_outlives_flatout(home: Path) -> None:
    running = Running(home, 3)
    running.flatout.kill()
    survivors(home, running)


@RUNS_RANKS
@KILLED
def test_all_end_if_the_stage_of_the_companions_is_killed(home: Path) -> None:
    running = Running(home, 3)
    stage = int(Path(f"/proc/{running.pids[1]}/stat").read_text().rpartition(")")[2].split()[1])
    assert b"companion_stage.py" in Path(f"/proc/{stage}/cmdline").read_bytes()
    os.kill(stage, signal.SIGKILL)
    status, _, said = running.wait()
    assert status == 1
    assert "the process that runs the other ranks has died: killed by SIGKILL" in said[0]
    survivors(home, running)


@RUNS_RANKS
@KILLED
@pytest.mark.parametrize("handles", [False, True])
def test_ctrl_c_reaches_rank_0_alone(handles: bool, home: Path) -> None:
    running = Running(home, 2, *["handles"] * handles)
    os.killpg(running.flatout.pid, signal.SIGINT)
    status, out, said = running.wait()
    assert (status, out) == ((5, "saved\n") if handles else (-signal.SIGINT, ""))
    assert "rank" not in "".join(said).replace(str(home), "")
    assert "KeyboardInterrupt" not in output(home)
    survivors(home, running)


@RUNS_RANKS
@KILLED
def test_a_signal_to_flatout_reaches_rank_0(home: Path) -> None:
    running = Running(home, 2)
    running.flatout.terminate()
    assert running.wait()[0] == -signal.SIGTERM
    survivors(home, running)


@RUNS_RANKS
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_a_program_that_a_signal_of_its_own_ends(number: signal.Signals, home: Path) -> None:
    done = ended(f"import os; print('last', flush=True); os.kill(os.getpid(), {number:d})")
    assert (done.returncode, done.stdout) == (-number, "last\n")
    assert not left(home)


@RUNS_RANKS
def test_a_companion_that_fails_is_named_and_rank_0_goes_on(home: Path) -> None:
    done = ended("import os\nif os.environ['FLATOUT_RANK'] == '1': raise OSError('port is used')")
    assert done.returncode == 0
    how = 'exit status 1, its last line is "OSError: port is used" (output: '
    assert f"flatout: rank 1 has died: {how}" in done.stderr.replace("'", '"')


@RUNS_RANKS
def test_there_is_no_such_program() -> None:
    words = [sys.executable, "-m", "flatout", "run", "--ranks", "2", "--", "no-such-program"]
    done = subprocess.run(words, capture_output=True, text=True, timeout=60, check=False)
    assert (done.returncode, done.stderr) == (
        127,
        "flatout: there is no program 'no-such-program'\n",
    )


TRAINING = """
import os, random, torch
import numpy
print(torch.rand(2), numpy.random.rand(2), random.random(), torch.get_num_threads())
net = torch.nn.Linear(4, 2)
optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
for step in range(3):
    loss = net(torch.randn(8, 4)).square().mean()
    optimizer.zero_grad(); loss.backward(); optimizer.step()
    print(loss.item())
torch.save(net.state_dict(), "net.pt")
"""


@RUNS_RANKS
def test_ranks_that_train_draw_the_same_numbers_and_record_their_rank(home: Path) -> None:
    done = ended(TRAINING)
    assert done.returncode == 0
    assert output(home) == done.stdout
    assert sorted(os.listdir()) == ["net.pt", "program.py"]
    headers = [process.header for process in read_run(run_directory(home)).processes]
    assert [(header.rank, header.world_size) for header in headers] == [(0, 2), (1, 2)]
    assert headers[0].environment["FLATOUT_RANK"] == "0"
    assert "3 steps" in done.stderr
    ranks = Request.read(run_directory(home)).ranks
    assert ranks is not None
    assert ranks.size == 2


@RUNS_RANKS
def test_ranks_with_different_views_of_the_files_share_memory(home: Path) -> None:
    program = TRAINING + (
        "from flatout import agent\nprint(type(agent._session._parallel._team.channel).__name__)\n"
    )
    done = ended(program, 3)
    assert done.stdout.splitlines()[-1] == "Memory"
    assert output(home) == output(home, 2) == done.stdout


@RUNS_RANKS
def test_what_the_program_seeds_before_torch_stays_its_own(home: Path) -> None:
    program = """
import random, numpy
random.seed(1); numpy.random.seed(1)
import torch
torch.manual_seed(1)
print(random.random(), numpy.random.rand(), torch.rand(1))
"""
    done = ended(program)
    alone = subprocess.run(
        [sys.executable, "program.py"], capture_output=True, text=True, check=True
    )
    assert done.stdout == alone.stdout == output(home)


@RUNS_RANKS
def test_a_rank_that_is_slow_to_import_torch_finds_no_file_of_rank_0(home: Path) -> None:
    done = ended(
        "import os, time\n"
        "if os.environ['FLATOUT_RANK'] == '1': time.sleep(1)\n"
        "import torch\n"
        "os.mkdir('made')"
    )
    assert (done.returncode, output(home)) == (0, "")


@RUNS_RANKS
def test_what_rank_0_has_said_is_not_said_again(home: Path) -> None:
    program = """
import os, signal, sys, time
import torch
from flatout import agent
if os.environ["FLATOUT_RANK"] == "1":
    os.kill(os.getpid(), signal.SIGKILL)
while not os.path.exists(os.path.join(os.environ["FLATOUT_RUN"], "died-1")):
    time.sleep(0.01)
agent._session.host.events.add("stopped", "ranks", "rank 1 has died")
agent._session.finish("stopped")
print("flatout: rank 1 has died", file=sys.stderr, flush=True)
os._exit(1)
"""
    done = ended(program)
    assert done.returncode == 1
    assert done.stderr.count("has died") == 1


@RUNS_RANKS
def test_a_program_that_ends_early_on_another_rank_is_not_waited_for() -> None:
    done = ended(
        "import os, torch\n"
        "if os.environ['FLATOUT_RANK'] == '0': torch.nn.Linear(2, 1)(torch.ones(4, 2))"
    )
    assert done.returncode == 1
    assert "the program has ended on rank 1 and has called no module there" in done.stderr


def test_one_rank_is_a_run_without_ranks(home: Path) -> None:
    done = ended("import os; print(sorted(n for n in os.environ if n.startswith('FLATOUT_R')))", 1)
    assert done.stdout == f"['{RUN_VARIABLE}']\n"
    assert Request.read(run_directory(home)).ranks is None


@pytest.mark.parametrize(
    ("number", "said"),
    [
        ("0", "--ranks: '0' is not a positive integer"),
        ("-2", "--ranks: '-2' is not a positive integer"),
        ("two", "--ranks: 'two' is not a positive integer"),
        ("9", "--ranks 9 is too many for 2 processors: at most 8 ranks"),
    ],
)
def test_numbers_of_ranks_that_make_no_sense(
    number: str, said: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(cores, "allowed_processors", lambda: [0, 1])
    assert cli.main(["run", "--ranks", number, "--", "true"]) == 2
    assert said in capsys.readouterr().err


def test_without_a_view_the_ranks_are_refused(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(isolation, "unavailable_reason", lambda: "Not on this system.")
    assert cli.main(["run", "--ranks", "2", "--", "touch", "made"]) == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1
    assert "--ranks needs a copy-on-write view of the files" in said
    assert "Not on this system." in said
    assert not os.listdir()


@pytest.mark.parametrize("words", [["--tune"], ["--set", "gradients=on_demand"]])
def test_what_each_rank_would_decide_for_itself_is_refused(
    words: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["run", "--ranks", "2", *words, "--", "true"]) == 2
    assert "cannot be " in capsys.readouterr().err


@RUNS_RANKS
def test_numbers_of_threads_are_divided(monkeypatch: pytest.MonkeyPatch, home: Path) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "4")
    monkeypatch.setenv("MKL_NUM_THREADS", "1")
    monkeypatch.setenv("OPENBLAS_NUM_THREADS", "many")
    program = (
        "import os; print([os.environ[f'{n}_NUM_THREADS'] for n in ('OMP', 'MKL', 'OPENBLAS')])"
    )
    assert ended(program).stdout == output(home) == "['2', '1', 'many']\n"


def machine(root: Path, node_sizes: list[int], threads: int) -> Path:
    """Describe a machine as the kernel does: all first threads of cores, then all second ones."""
    count = sum(node_sizes)
    first = 0
    for node, size in enumerate(node_sizes):
        folder = root / f"node/node{node}"
        folder.mkdir(parents=True)
        ranges = [f"{first + t * count}-{first + t * count + size - 1}" for t in range(threads)]
        (folder / "cpulist").write_text(",".join(ranges) + "\n")
        first += size
    for processor in range(count * threads):
        folder = root / f"cpu/cpu{processor}/topology"
        folder.mkdir(parents=True)
        siblings = [str(processor % count + t * count) for t in range(threads)]
        (folder / "thread_siblings_list").write_text(",".join(siblings) + "\n")
    return root


@pytest.mark.parametrize(
    ("node_sizes", "threads", "ranks", "expected"),
    [
        ([1], 1, 2, [[0], [0]]),
        ([2], 1, 1, [[0, 1]]),
        ([2], 1, 2, [[0], [1]]),
        ([2], 1, 3, [[0], [1], [0]]),
        ([5], 1, 2, [[0, 1], [2, 3]]),
        ([4, 4], 1, 2, [[0, 1, 2, 3], [4, 5, 6, 7]]),
        ([4, 4], 1, 3, [[0, 1], [2, 3], [4, 5]]),
        ([3, 3], 1, 2, [[0, 1, 2], [3, 4, 5]]),
        ([5, 5], 1, 3, [[0, 1, 2], [5, 6, 7], [3, 4, 8]]),
        ([2, 2], 2, 2, [[0, 4, 1, 5], [2, 6, 3, 7]]),
        ([2, 2], 2, 4, [[0, 4], [1, 5], [2, 6], [3, 7]]),
        ([2], 2, 3, [[0, 2], [1, 3], [0, 2]]),
    ],
)
def test_cores_are_shared_out(
    node_sizes: list[int], threads: int, ranks: int, expected: list[list[int]], tmp_path: Path
) -> None:
    root = machine(tmp_path / "devices", node_sizes, threads)
    found = cores.nodes(range(sum(node_sizes) * threads), root)
    assert cores.share_out(found, ranks) == expected


def test_only_allowed_cores_are_shared_out(tmp_path: Path) -> None:
    root = machine(tmp_path / "devices", [4, 4], 2)
    found = cores.nodes([1, 2, 9, 5], root)
    assert found == [[[1, 9], [2]], [[5]]]
    assert cores.share_out(found, 2) == [[1], [2]]
    assert cores.nodes([0, 3], tmp_path / "nothing") == [[[0], [3]]]


@RUNS_RANKS
def test_ranks_run_on_their_shares(home: Path) -> None:
    allowed = cores.allowed_processors()
    shares = cores.share_out(cores.nodes(allowed), 2)
    done = ended("import os; print(sorted(os.sched_getaffinity(0)))")
    assert [done.stdout, output(home)] == [f"{sorted(share)}\n" for share in shares]


@RUNS_RANKS
def test_each_rank_sees_one_gpu(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3,5")
    done = ended("import os; print(os.environ['CUDA_VISIBLE_DEVICES'])")
    assert [done.stdout, output(home)] == ["3\n", "5\n"]


@RUNS_RANKS
def test_a_run_inside_of_a_rank_is_a_run_of_its_own(home: Path) -> None:
    inner = "import os; print([n for n in os.environ if n.startswith('FLATOUT_RANK')])"
    words = [sys.executable, "-m", "flatout", "run", "--", sys.executable, "-c", inner]
    done = ended(f"import subprocess; subprocess.run({words!r})")
    assert done.stdout == "[]\n"


@RUNS_RANKS
@pytest.mark.parametrize("closed", ["<&-", ">&-", "2>&-", "<&- >&- 2>&-"])
def test_the_status_is_the_programs_without_standard_streams(closed: str) -> None:
    words = shlex.join([sys.executable, "-m", "flatout", "run", "--ranks", "2", "--"])
    done = subprocess.run(["sh", "-c", f"{words} sh -c 'exit 7' {closed}"], timeout=60, check=False)
    assert done.returncode == 7


COUNTS = """
import pathlib, signal, sys
signal.signal(signal.SIGINT, lambda *_: sys.exit(4))
counted = pathlib.Path("counted")
number = len(counted.read_text()) if counted.exists() else 0
counted.write_text("x" * (number + 1))
print("run", number, flush=True)
if sys.argv[1] == "waits":
    signal.pause()
sys.exit(3 if number < 2 else 0)
"""


@RUNS_RANKS
@pytest.mark.parametrize(("restarts", "runs", "status"), [(1, 2, 3), (5, 3, 0)])
def test_a_run_that_has_failed_is_started_again(
    restarts: int, runs: int, status: int, home: Path
) -> None:
    command = flatout(COUNTS, 2, "ends")
    command.insert(command.index("--ranks"), f"--restarts={restarts}")
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == status
    assert done.stdout.splitlines() == [f"run {number}" for number in range(runs)]
    assert f"it has failed (exit status 3): restart 1 of {restarts}" in done.stderr
    assert done.stderr.count("it has failed") == runs - 1


@RUNS_RANKS
def test_a_run_that_was_told_to_end_is_not_started_again(home: Path) -> None:
    command = flatout(COUNTS, 2, "waits")
    command.insert(command.index("--ranks"), "--restarts=2")
    running = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert running.stdout is not None
    assert running.stdout.readline() == "run 0\n"
    running.send_signal(signal.SIGINT)
    rest, stderr = running.communicate(timeout=30)
    assert (running.returncode, rest) == (4, ""), stderr


def test_restarts_need_ranks(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["run", "--restarts", "2", "--", "true"]) == 2
    assert "--restarts needs --ranks" in capsys.readouterr().err
