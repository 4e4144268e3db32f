"""The knob ``ranks``: where it is tried, what its trials measure, and what a plan with it does."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from flatout import cli, knobs, machine
from flatout.knob import Facts
from flatout.knobs import ranks
from flatout.launch import companions, isolation
from flatout.machine import cores
from flatout.tune import candidates, pairs, trial
from flatout.tune.bare import BareRun
from flatout.tune.budget import ProofSize
from flatout.tune.candidates import Candidate
from flatout.tune.cold import ColdTrials
from flatout.tune.ledger import Ledger, Options
from flatout.tune.pairs import Pairs
from flatout.tune.trial import Trial, TrialFailedError
from flatout.wire.header import Header
from flatout.wire.lines import AgentEvent
from flatout.wire.record import ProcessRecord, read_process, read_run
from flatout.wire.request import RUN_VARIABLE, ProvenConditions, Ranks, Request
from tests import side_by_side

RUNS_RANKS = pytest.mark.skipif(
    isolation.unavailable_reason() is not None or ranks.find_refusal("2") is not None,
    reason="there is no copy-on-write view, or only one core",
)

GOES_ALONE = Request(seed=0, ranks=Ranks(2, 1, 1, tuple(cores.allowed_processors()), None, True))


# Where it is tried


@pytest.fixture
def nodes(monkeypatch: pytest.MonkeyPatch) -> list[cores.Node]:
    """The NUMA nodes of the machine, which a test may change: two with four cores each."""
    found = [[[0], [1], [2], [3]], [[4], [5], [6], [7]]]
    monkeypatch.setattr(cores, "nodes", lambda processors: found)
    monkeypatch.setattr(machine, "usable_cores", lambda: float(sum(map(len, found))))
    return found


TRAINS = Facts("cpu", step_ms=100.0, module_share=0.8, calls_modules=True, is_distributed=False)


def test_the_cores_suggest_the_numbers(nodes: list[cores.Node]) -> None:
    offer = knobs.get("ranks").offer
    assert offer(TRAINS).settings == ("per_node",)
    nodes.append([[8], [9], [10], [11]])
    assert offer(TRAINS).settings == ("per_node", "2")
    assert ranks.number("per_node") == 3
    nodes[:] = [[[0], [1]]]
    assert offer(TRAINS).settings == ("2",)
    nodes[:] = [[[0, 1]]]
    assert offer(TRAINS).refusal == "2 ranks need 2 cores, and 1 may be used"


def test_accelerators_suggest_one_rank_each(
    nodes: list[cores.Node], monkeypatch: pytest.MonkeyPatch
) -> None:
    offer = knobs.get("ranks").offer
    on_gpu = dataclasses.replace(TRAINS, device="cuda")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,3,GPU-8932f937")
    assert offer(on_gpu).settings == ("per_gpu",)
    assert ranks.number("per_gpu") == 3
    assert offer(TRAINS).settings == ("per_node",)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0")
    assert offer(on_gpu).refusal == "there is one GPU at most"


def test_the_bound_is_the_share_of_forward_and_backward(nodes: list[cores.Node]) -> None:
    nodes[:] = [[[0], [1]]]
    listed, _ = candidates.find(TRAINS, ("ranks",), None)
    # Half of 80 % less 1 ms of 100: 1 / (1 - 0.39).
    assert [(str(c), c.is_hot, round(c.bound or 0, 4)) for c in listed] == [
        ("ranks=2", False, 1.6393)
    ]


@pytest.mark.parametrize(
    ("known", "why"),
    [
        ({"is_distributed": True}, "the program consists of several processes already"),
        ({"calls_modules": False}, "the program calls no module"),
        ({"isolation_refusal": "Not here."}, "all ranks would write to your files: Not here."),
        (
            {"spare_memory_bytes": 150e6},
            "each further rank needs more memory than --memory allows a plan",
        ),
        ({"step_ms": 1.5}, "its forward and backward passes take 1.2 ms a step, too little"),
        ({"device": "mps"}, "it is for cpu, cuda, xpu"),
    ],
)
def test_it_is_not_tried_in_vain(
    known: dict[str, object], why: str, nodes: list[cores.Node]
) -> None:
    listed, refused = candidates.find(
        Facts(**{**vars(TRAINS), **known}),  # type: ignore[arg-type]
        ("ranks",),
        None,
    )
    assert not listed
    assert refused["ranks"].startswith(why)


def test_it_is_not_combined_with_what_chooses_gradients() -> None:
    with pytest.raises(knobs.ConflictError, match="the choice of gradients"):
        knobs.check_claims(["gradients", "ranks"])


# Trials

PROGRAM = """
import os, sys, torch
from torch import nn
torch.manual_seed(0)
class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(8, 3)
    def forward(self, x):
        return self.layer(x - x.mean(0) if "mixes" in sys.argv else x)
net = Net()
optimizer = torch.optim.SGD(net.parameters(), 0.1)
kept = torch.zeros(2**23 if "keeps" in sys.argv else 1).fill_(1.0)
is_companion = os.environ.get("FLATOUT_RANK") == "1"
if "fails" in sys.argv and is_companion:
    raise OSError("port is used")
for number in range(10**9):
    x = torch.randn(6, 8)
    if "parts" in sys.argv and is_companion and number == 4:
        x += 1
    loss = net(x).square().mean()
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
"""


@pytest.fixture
def job(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The command line of ``PROGRAM``."""
    monkeypatch.setenv("FLATOUT_HOME", str(tmp_path / "home"))
    monkeypatch.chdir(tmp_path)
    Path("program.py").write_text(PROGRAM)
    return [sys.executable, "program.py"]


def tried(command: list[str], **asked: object) -> Trial:
    request = Request(settings={"ranks": "2"}, seed=0, **asked)  # type: ignore[arg-type]
    return trial.run(command, request, isolate=True, timeout_seconds=60)


def left() -> list[int]:
    """The processes of runs that still exist."""
    found = []
    for name in filter(str.isdigit, os.listdir("/proc")):
        with contextlib.suppress(OSError):
            of_run = f"{RUN_VARIABLE}={os.environ['FLATOUT_HOME']}".encode()
            if of_run in Path(f"/proc/{name}/environ").read_bytes():
                found.append(int(name))
    return found


@RUNS_RANKS
@pytest.mark.parametrize("limit", [{"stop_steps": 30}, {"stop_seconds": 0.0, "stop_steps": 10**9}])
def test_rank_0_decides_when_a_trial_ends(limit: dict[str, object], job: list[str]) -> None:
    done = tried(job, **limit)
    assert not done.ended
    steps = len(done.process.loop_steps)
    assert steps == 30 if "stop_seconds" not in limit else 1 <= steps < 30
    by_plan, calls, spent = [e.why for e in done.process.events if e.subject == "ranks"]
    assert by_plan == "set to 2 by the plan"
    assert calls == f"{steps} calls of Net were shared out"
    assert spent.startswith("rank 0 has spent ")
    directory = done.process.path.parent
    companion = read_run(directory).processes[1]
    assert trial.collect_reasons(companion, "stopped") == {
        "ranks": "rank 0 goes on alone: it stops before the program does"
    }
    assert not list(directory.glob("died-*"))
    assert not left()


@RUNS_RANKS
def test_memory_is_that_of_all_ranks(job: list[str]) -> None:
    request = Request(stop_steps=20, settings={"ranks": "2"})
    done = trial.run([*job, "keeps"], request, isolate=True, timeout_seconds=60)
    of_ranks = []
    for path in done.process.path.parent.glob("record-*.jsonl"):
        last = read_process(path).loop_steps[-1]
        assert last.peak_rss_bytes is not None
        assert last.peak_rss_bytes > 4 * 2**23
        of_ranks.append(last.peak_rss_bytes)
    assert len(of_ranks) == 2
    together = done.process.loop_steps[-1].peak_rss_bytes
    assert together == pytest.approx(sum(of_ranks), rel=0.1)


@RUNS_RANKS
@pytest.mark.parametrize(
    ("word", "why"),
    [
        ("parts", "rank 0 and rank 1 have parted in step 5, where rank 0 makes call 5 of Net: its"),
        ("fails", "rank 1 has ended: exit status 1, its last line is 'OSError: port is used'"),
    ],
)
def test_a_trial_whose_ranks_part_has_failed_with_one_sentence(
    word: str, why: str, job: list[str]
) -> None:
    with pytest.raises(TrialFailedError) as raised:
        tried([*job, word], stop_steps=30)
    assert str(raised.value).startswith(why)
    assert "\n" not in str(raised.value)
    assert not left()


@RUNS_RANKS
def test_a_trial_in_which_nothing_is_shared_out_has_no_effect(job: list[str]) -> None:
    done = tried([*job, "mixes"], stop_steps=5)
    why = trial.collect_reasons(done.process, "unused")["ranks"]
    assert why.startswith("nothing was shared out, each rank has computed everything; 5 calls of")
    assert "Net mixes samples" in why


def of(*events: AgentEvent) -> Trial:
    """A made-up trial."""
    return Trial(ProcessRecord(Path(), Header(), events=list(events)), 1.0, False)


def test_one_pair_without_effect_is_enough() -> None:
    candidate = Candidate("ranks", "2", False, None)
    without = of(AgentEvent(0.0, "unused", "ranks", "nothing was shared out", None))
    tried_once = Pairs({}, candidate.settings, [of()], [without])
    stage: Any = SimpleNamespace(_pair_s=1.0, _spare_s=lambda stack: 100.0)
    assert ColdTrials._is_ranked(stage, candidate, {}, tried_once)
    nothing = Pairs({}, candidate.settings)
    assert not ColdTrials._is_ranked(stage, candidate, {}, nothing)


def test_a_candidate_with_other_processes_is_not_tried_in_a_relay(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    seen = {}

    def run(trials: object, tried: Pairs, **options: object) -> None:
        seen[tuple(tried.variant)] = tried.in_relay
        tried.failure = "it was not run"

    monkeypatch.setattr(pairs, "run", run)
    nothing: Any = None
    first = BareRun(
        nothing,
        frozenset(),
        nothing,
        pairs.Pace(1.0, 0.1),
        {},
        60.0,
        ProofSize(50, 5, 2),
        None,
        True,
    )
    ledger = Ledger(60.0, lambda: 0.0, lambda line: None, lambda *_: None)
    stage = ColdTrials(nothing, ledger, first, Options())
    for name, setting in (("ranks", "2"), ("mkl", "avx512")):
        candidate = Candidate(name, setting, False, None)
        ledger.enter([candidate])
        assert not stage._try(candidate, {})
    assert seen == {("ranks",): False, ("mkl",): True}


# Runs with a plan


@RUNS_RANKS
def test_a_run_with_the_setting_is_one_with_ranks(job: list[str]) -> None:
    program = PROGRAM.replace("10**9", "5") + "print(loss.item())"
    Path("program.py").write_text(program)
    words = [sys.executable, "-m", "flatout", "run", "--set", "ranks=2", "--set", "gc=seldom"]
    done = subprocess.run([*words, "--", *job], capture_output=True, text=True, check=False)
    alone = subprocess.run(job, capture_output=True, text=True, check=True)
    assert (done.returncode, done.stderr.count("flatout: ranks: ")) == (0, 2)
    assert "flatout: ranks: 5 calls of Net were shared out" in done.stderr
    assert float(done.stdout) == pytest.approx(float(alone.stdout), rel=1e-5)
    (directory,) = Path("home/runs").iterdir()
    processes = read_run(directory).processes
    assert [process.header.rank for process in processes] == [0, 1]
    for process in processes:  # the other settings apply on all ranks
        assert ("applied", "gc") in [(event.what, event.subject) for event in process.events]


ALONE = {
    "data": ("x += torch.randn(6, 8, generator=unseeded)", "rank 0 and rank 1 have parted in st"),
    "a kill": (
        "if number == 3 and is_companion: os.kill(os.getpid(), 9)",
        "rank 1 has ended: killed by SIGKILL",
    ),
    "an early end": (
        "if number == 0 and is_companion: sys.exit()",
        "the program has ended on rank 1 and has called no module there",
    ),
}


@RUNS_RANKS
@pytest.mark.parametrize("name", ALONE)
def test_a_run_that_goes_on_alone_has_all_cores(name: str, job: list[str]) -> None:
    line, why = ALONE[name]
    program = (
        PROGRAM.replace("10**9", "8").replace(
            "x = torch.randn(6, 8)", f"x = torch.ones(6, 8)\n    {line}"
        )
        + "print(sorted(os.sched_getaffinity(0)), torch.get_num_threads())"
    ).replace("net = Net()", "net = Net(); unseeded = torch.Generator(); unseeded.seed()")
    Path("program.py").write_text(program)
    words = [sys.executable, "-m", "flatout", "run", "--set", "ranks=2", "--", *job]
    done = subprocess.run(words, capture_output=True, text=True, check=False, timeout=120)
    alone = subprocess.run(job, capture_output=True, text=True, check=True)
    assert (done.returncode, done.stdout) == (0, alone.stdout), done.stderr
    (said,) = [text for text in done.stderr.splitlines() if "rank" in text]
    assert said.startswith(f"flatout: ranks: rank 0 goes on alone: {why}")
    assert not left()


@pytest.mark.parametrize("reason", ["no view", "one core", "launched"])
def test_what_is_known_before_is_said_and_the_program_runs(
    reason: str,
    job: list[str],
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(machine, "usable_cores", lambda: 1.0 if reason == "one core" else 2.0)
    monkeypatch.setattr(cores, "nodes", lambda processors: [[[0], [1]]])
    if reason == "no view":
        monkeypatch.setattr(isolation, "unavailable_reason", lambda: "Not on this system.")
    if reason == "launched":
        monkeypatch.setenv("WORLD_SIZE", "2")
    program = "import os; print([n for n in os.environ if n.startswith('FLATOUT_RANK')])"
    Path("program.py").write_text(program)
    assert cli.main(["run", "--set", "ranks=2", "--", *job]) == 0
    printed = capfd.readouterr()
    assert printed.out == "[]\n"
    assert "flatout: ranks=2 not applied: " in printed.err


def test_the_command_line_overrides_the_plan(
    job: list[str], monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    program = "import os; print([n for n in os.environ if n.startswith('FLATOUT_RANK')])"
    Path("program.py").write_text(program)
    assert cli.main(["run", "--set", "ranks=2", "--ranks", "1", "--", *job]) == 0
    assert capfd.readouterr().out == "[]\n"


TRAIN = """
import os, torch
from torch import nn
from flatout.parallel.place import place

torch.manual_seed(0)
here = place()
rank = here.rank if here else 0
model = nn.Linear(4, 3)
optimizer = torch.optim.SGD(model.parameters(), 0.1)

def step(x):
    optimizer.zero_grad()
    loss = model(x).square().mean()
    loss.backward()
    optimizer.step()
    print(loss.item(), flush=True)

"""

GO_ON = {
    "data without a seed": "for i in range(3): step(torch.ones(7, 4) + rank * i + rank)",
    "initial weights": (
        "with torch.no_grad(): model.bias += rank\nfor i in range(3): step(torch.ones(7, 4))"
    ),
    "data later on": "for i in range(6): step(torch.ones(7, 4) + rank * (i > 2))",
    "the clock": "for i in range(6):\n    if rank and i == 3: break\n    step(torch.ones(7, 4))",
    "a failure before": (  # the stage of companions notes it
        "if rank:\n    (here.run_directory / 'died-1').write_text('exit status 1\\n1\\n')\n"
        "    raise OSError('port is used')\nstep(torch.ones(7, 4))"
    ),
    "a failure later on": (
        "for i in range(6):\n    if rank and i == 3: os._exit(1)\n    step(torch.ones(7, 4))"
    ),
    "mixing": "model = nn.Sequential(nn.Softmax(0), model)\n"
    "for i in range(40): step(torch.ones(7, 4))",
}


@pytest.mark.parametrize("name", GO_ON)
def test_rank_0_goes_on_alone_where_its_state_is_whole(name: str, tmp_path: Path) -> None:
    program = TRAIN + GO_ON[name] + "\nprint(len(os.sched_getaffinity(0)), rank)"
    (alone,) = side_by_side.run(program, 1, tmp_path)
    first, _ = side_by_side.run(program, 2, tmp_path, request=GOES_ALONE)
    assert (first.status, first.stderr) == (0, "")
    assert _numbers(first.stdout) == pytest.approx(_numbers(alone.stdout), rel=1e-9)
    record = read_run(tmp_path / "run-2").main
    assert record is not None
    said = [e.why for e in record.events if (e.what, e.subject) == ("noticed", "ranks")]
    assert len(said) == 1
    assert said[0].startswith("rank 0 goes on alone: ")


def _numbers(text: str) -> list[float]:
    return [float(number) for number in re.findall(r"\d+\.?\d*(?:e[+-]\d+)?", text)]


STOP = {
    "weights that differ": (
        "for i in range(6):\n    step(torch.ones(7, 4) + rank * (i > 3))\n"
        "    if i == 2: model.bias.data += 1e-9 * rank",
        "; what the ranks have computed together differs too",
    ),
    "weights that differ at the end": (
        "for i in range(6):\n    if rank and i == 3:\n        model.bias.data += 1e-9\n"
        "        break\n    step(torch.ones(7, 4))",
        "the program has ended on rank 1 and goes on on rank 0",
    ),
    "a backward call through shards": (
        "step(torch.ones(7, 4))\nout = model(torch.ones(7, 4))\n"
        "model(torch.ones(7, 4) + rank)\nout.sum().backward()",
        "rank 0 goes on alone and then makes a backward call through what the ranks have computed",
    ),
    "a death in the backward pass": (
        "step(torch.ones(7, 4))\nout = model(torch.ones(7, 4))\n"
        "if rank: os._exit(1)\nout.sum().backward()",
        "the connection to the other ranks is lost",
    ),
}


@pytest.mark.parametrize("name", STOP)
def test_rank_0_stops_where_its_state_may_be_wrong(name: str, tmp_path: Path) -> None:
    program, sentence = STOP[name]
    program = TRAIN + program + "\nprint('end')"
    first, _ = side_by_side.run(program, 2, tmp_path, request=GOES_ALONE)
    assert first.status == 1
    assert "end" not in first.stdout
    assert sentence in first.stderr
    assert first.stderr.count("\n") == 1


def test_weights_of_an_inference_that_differ_are_noticed(tmp_path: Path) -> None:
    program = TRAIN + "model.bias.data += rank\nprint(model(torch.ones(7, 4)).sum().item())"
    for outcome in side_by_side.run(program, 2, tmp_path):
        assert (outcome.status, outcome.stdout) == (1, "")
        assert "parameters or optimizer states differ" in outcome.stderr


def test_a_setting_that_is_proven_elsewhere_leaves_rank_0_alone(tmp_path: Path) -> None:
    for number, proof in enumerate(
        (ProvenConditions(("ranks",), "1.0", None), ProvenConditions(("ranks",), None, ("x",)))
    ):
        folder = tmp_path / str(number)
        folder.mkdir()
        request = Request(
            {"ranks": "2"}, seed=0, proof=proof, ranks=GOES_ALONE.ranks, stop_steps=None
        )
        program = TRAIN + "step(torch.ones(7, 4))\nprint(len(os.sched_getaffinity(0)))"
        first, second = side_by_side.run(program, 2, folder, request=request)
        assert (first.status, second.status) == (0, 0)
        assert first.stdout.splitlines()[1] == str(len(cores.allowed_processors()))
        assert second.stdout == ""
        record = read_run(folder / "run-2").main
        assert record is not None
        assert "ranks" in trial.collect_reasons(record, "skipped")


def test_threads_are_those_of_the_program_alone() -> None:
    program = """
import os, torch
from flatout.parallel import processors
from flatout.wire.request import Ranks
everything = sorted(os.sched_getaffinity(0))
for threads, now, set_to in ((None, 1, 1), (2, 1, 1), (None, 1, 3)):
    os.sched_setaffinity(0, everything[:1])
    torch.set_num_threads(now)
    torch.set_num_threads(set_to)
    processors.use_all(Ranks(2, 0, 0, tuple(everything), threads), now)
    print(torch.get_num_threads(), sorted(os.sched_getaffinity(0)) == everything)
"""
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True
    )
    count = len(cores.allowed_processors())
    assert done.stdout == f"{count} True\n2 True\n3 True\n"


def test_numbers_of_threads_of_the_environment_are_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(isolation, "unavailable_reason", lambda: None)
    monkeypatch.setenv("OMP_NUM_THREADS", "6")
    assert companions.make_ranks(2).threads == 6
