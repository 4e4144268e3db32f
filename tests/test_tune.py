"""``flatout tune`` on real programs: what it finds, what it refuses, and what it says."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from flatout import plan
from flatout.cli import main
from flatout.machine import Ceilings
from flatout.tune import journal, prover, screen, statistics
from flatout.tune import predicted as predicted_screen
from flatout.tune.budget import ProofSize
from flatout.tune.candidates import Candidate
from flatout.tune.ledger import Ledger, Options, Outcome
from flatout.tune.pairs import Pace, Pairs
from flatout.tune.proof import Run
from flatout.tune.prover import Prover
from flatout.tune.quiet import Quietness
from flatout.tune.tuner import Tuner


def machine_with(**flops_per_s: float) -> Ceilings:
    return Ceilings(
        python=sys.executable,
        torch="",
        threads=1,
        matmul_flops_per_s=flops_per_s,
        memory_bytes_per_s=None,
        page_fault_us=None,
        devices={"cpu": {"matmul_flops_per_s": flops_per_s}},
        measured_at_unix_s=0.0,
        fingerprint={},
    )


SLOW_BF16 = machine_with(bfloat16=1e10, float32=1e11)
"""A machine on which precision is not tried."""

MANY_TENSORS = """
import sys
import torch
from torch import nn
torch.set_num_threads(1)

class Net(nn.Module):
    \"\"\"Many small tensors, so that the optimizer takes most of the step.\"\"\"
    def __init__(self):
        super().__init__()
        self.parts = nn.ParameterList(nn.Parameter(0.1 * torch.randn(16)) for _ in range(400))
    def forward(self, x):
        w = torch.stack(list(self.parts)).sum(0)
        z = torch.nn.functional.linear(x, w[None])
        if not torch.is_autocast_enabled("cpu"):
            BEFORE
        return torch.sigmoid(z)

net = Net()
optimizer = torch.optim.AdamW(net.parameters(), lr=1e-3)
for step in range(STEPS):
    x = 4 * torch.randn(256, 16)
    y = (x[:, :1] > 0).float()
    y = torch.where(torch.rand(256, 1) < 0.03, 1 - y, y)
    p = net(x)
    loss = -torch.where(y > 0, p, 1 - p).clamp(min=1e-30).log().mean()
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
"""


AMPLE_BUDGET_S = 500
"""More than these tunes take on a machine of a quarter of the usual speed: none ends by it."""


def write(tmp_path: Path, program: str, before: str = "pass", steps: int = 1000) -> list[str]:
    script = tmp_path / "program.py"
    script.write_text(program.replace("BEFORE", before).replace("STEPS", str(steps)))
    return [sys.executable, str(script)]


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    path = tmp_path / "home"
    monkeypatch.setenv("FLATOUT_HOME", str(path))
    return path


@pytest.fixture
def two_pairs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fewer runs than a claim needs, enough for what these tests look at."""
    monkeypatch.setattr(statistics, "MINIMUM_PAIRS", 2)
    monkeypatch.setattr(prover, "MAXIMUM_PAIRS", 2)


def tune(command: list[str], ceilings: Ceilings | None, steps: int) -> Outcome:
    options = Options(
        budget_seconds=AMPLE_BUDGET_S, steps=steps, isolate=False, knobs=("precision", "optimizer")
    )
    opened = journal.begin("tune", command)
    try:
        made = Tuner(
            command, options, opened, lambda line: None, lambda arms, s: None, lambda _: ceilings
        )
        return made.run()
    finally:
        opened.close()


def said_of(outcome: Outcome, knob: str) -> str:
    """Why a knob is not in the plan."""
    if knob in outcome.refused:
        return outcome.refused[knob]
    return " ".join(entry.why for entry in outcome.entries if knob in entry.settings)


def find_compared(outcome: Outcome) -> set[str]:
    """The knobs of which a setting has a ratio inside one process."""
    return {
        knob
        for entry in outcome.entries
        for knob, setting in entry.settings.items()
        if outcome.find_ratio_in_process(knob, setting) is not None
    }


@pytest.fixture(autouse=True)
def no_waiting_for_others(monkeypatch: pytest.MonkeyPatch) -> None:
    """Other tests run beside these."""
    monkeypatch.setattr("flatout.tune.neighbours.WAIT_SHARE", 0.0)


@pytest.mark.tunes
@pytest.mark.usefixtures("two_pairs")
def test_a_faster_and_wrong_setting_is_turned_back_and_the_rest_tried(tmp_path: Path) -> None:
    """Autocast spares the program work, so it wins, and breaks a sigmoid before BCE loss."""
    work = "for _ in range(8): torch.ones(400, 400) @ torch.ones(400, 400)"
    outcome = tune(write(tmp_path, MANY_TENSORS, work), None, steps=40)
    assert "precision" in find_compared(outcome)
    assert "optimizer" in find_compared(outcome)
    assert set(outcome.settings) <= {"optimizer", "precision"}
    assert outcome.settings.get("precision") != "bf16"
    if outcome.evidence is None:
        assert "measurable" in outcome.why  # no gain, or a machine that others use
    else:
        assert outcome.evidence.ratio_low > 1
        assert outcome.evidence.losses[0].margin_source == "seeds"
        assert {check.name for check in outcome.evidence.checks} >= {"gradients", "losses", "state"}


@pytest.mark.tunes
@pytest.mark.usefixtures("two_pairs")
def test_a_short_program_is_profiled_and_compared_in_fresh_processes(tmp_path: Path) -> None:
    """It ends before a comparison in one process, and before its steps are profiled."""
    command = write(tmp_path, MANY_TENSORS, steps=47)
    options = Options(
        budget_seconds=AMPLE_BUDGET_S, isolate=False, knobs=("optimizer", "clipping", "attention")
    )
    opened = journal.begin("tune", command)
    made = Tuner(command, options, opened, lambda _: None, lambda *_: None, lambda _: None)
    outcome = made.run()
    opened.close()
    assert outcome.job_steps == 47
    assert not find_compared(outcome)
    tried = {knob for entry in outcome.entries for knob in entry.settings if entry.ratio}
    assert tried == {"optimizer"}
    assert {"clipping", "attention"} <= outcome.refused.keys()
    assert set(outcome.settings) <= {"optimizer"}


SLOW = """
import torch
from torch import nn
torch.set_num_threads(1)
torch.manual_seed(0)
net = nn.Sequential(nn.Linear(1024, 4096), nn.Dropout(0.1), nn.Tanh(), nn.Linear(4096, 1024))
optimizer = torch.optim.AdamW(net.parameters(), lr=1e-4)
x = torch.randn(1024, 1024)
for step in range(1000):
    loss = (net(x) - x).square().mean()
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
"""


@pytest.mark.measured
@pytest.mark.usefixtures("two_pairs")
@pytest.mark.long
def test_slow_steps_are_not_compared_for_what_a_replay_predicts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for module in (predicted_screen, screen):  # on a fast machine these steps are slow as well
        monkeypatch.setattr(module, "SLOW_STEP_S", 0.05)
    options = Options(
        budget_seconds=150,
        isolate=False,
        knobs=("elementwise", "random", "optimizer", "clipping", "cross_entropy"),
    )
    opened = journal.begin("tune", write(tmp_path, SLOW))
    lines: list[str] = []
    made = Tuner(
        write(tmp_path, SLOW), options, opened, lines.append, lambda *_: None, lambda _: None
    )
    outcome = made.run()
    opened.close()
    assert {"clipping", "cross_entropy"} <= outcome.refused.keys()
    predicted = {knob for entry in outcome.entries for knob in entry.settings if entry.predicted}
    assert predicted == {"elementwise", "random", "optimizer"}
    assert not find_compared(outcome)
    assert not any("comparing inside one process" in line for line in lines), lines
    assert any("on top of the others" in line for line in lines), lines


def test_nothing_to_try_is_a_result(tmp_path: Path) -> None:
    program = """
import torch
w = torch.zeros(4, requires_grad=True)
net = torch.nn.Linear(4, 1)
for step in range(1000):
    loss = (net(torch.randn(8, 4)) ** 2).mean()
    loss.backward()
    with torch.no_grad():
        for p in net.parameters():
            p -= 0.1 * p.grad
            p.grad = None
"""
    outcome = tune(write(tmp_path, program), SLOW_BF16, steps=20)
    assert outcome.settings == {}
    assert outcome.evidence is None
    assert outcome.why.startswith("no setting is faster")
    assert "no optimizer object" in said_of(outcome, "optimizer")
    assert "10 GFLOP/s" in said_of(outcome, "precision")


def test_settings_that_exclude_each_other_share_a_factor() -> None:
    names = ("precision=bf16", "precision=safe", "optimizer=onepass", "gc=seldom")
    of = [Candidate(*name.split("="), is_hot=True, bound=None) for name in names]
    assert screen.group_exclusive(of) == [
        [("precision", "bf16"), ("precision", "safe")],
        [("optimizer", "onepass")],
        [("gc", "seldom")],
    ]


@pytest.mark.tunes
@pytest.mark.usefixtures("two_pairs")
def test_an_arm_that_ends_a_short_program_is_dropped_with_its_reason(tmp_path: Path) -> None:
    work = "for _ in range(8): torch.ones(400, 400) @ torch.ones(400, 400)"
    ends = f"{work}\n            return torch.sigmoid(z)\n        sys.exit(3)"
    command = write(tmp_path, MANY_TENSORS, ends, 80)
    outcome = tune(command, None, steps=80)
    assert "exit code 3" in said_of(outcome, "precision")
    assert find_compared(outcome) == {"optimizer"}


def flatout(*words: str, folder: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "flatout", "tune", "--in-place", *words],
        cwd=folder,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=200,
        check=False,
    )


INFERS = """
import torch
from torch import nn
torch.set_num_threads(1)
torch.manual_seed(0)
net = nn.Sequential(nn.Linear(512, 2048), nn.ReLU(), nn.Linear(2048, 10)).eval()
with torch.inference_mode():
    for number in range(2000):
        net(torch.randn(256, 512)).argmax(1)
"""


@pytest.mark.tunes
@pytest.mark.usefixtures("two_pairs")
def test_a_program_that_only_infers_is_proven_by_its_outputs(tmp_path: Path) -> None:
    options = Options(budget_seconds=AMPLE_BUDGET_S, steps=40, isolate=False, knobs=("precision",))
    opened = journal.begin("tune", command := write(tmp_path, INFERS))
    tuner_of = Tuner(command, options, opened, lambda line: None, lambda *_: None, lambda _: None)
    outcome = tuner_of.run()
    opened.close()
    assert outcome.verdict is not None
    assert outcome.verdict.passed, outcome.verdict.why
    outputs = next(check for check in outcome.verdict.checks if check.name == "outputs")
    assert 0 < outputs.measurements["relative_error"] < outputs.measurements["error_limit"]
    assert outputs.measurements["top1_agreement"] > 0.9
    if outcome.evidence is None:
        assert "measurable" in outcome.why  # no gain, or a machine that others use
    else:
        assert outcome.evidence.losses == ()


MISTAKES = {
    "no step": ("import torch", "never calls a model"),
    "no torch": ("print('hello')", "imported torch"),
    "crashes": (
        "import torch\nprint('loading')\nraise KeyError('my data')",
        "failed with exit code 1; its last lines:",
    ),
    "shorter than --steps": (
        MANY_TENSORS.replace("BEFORE", "pass").replace("STEPS", "7"),
        "ends after 7 steps, so its proof cannot cover the 20 steps that --steps asks for",
    ),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_programs_that_cannot_be_tuned_are_one_sentence(tmp_path: Path, mistake: str) -> None:
    program, message = MISTAKES[mistake]
    command = write(tmp_path, program)
    # Of a short budget, little is spent on waiting for a machine that other tests leave alone.
    words = ("--quiet", "--budget", "30s", "--steps", "20", "--")
    completed = flatout(*words, *command, folder=tmp_path)
    assert completed.returncode == 2
    assert completed.stdout == ""
    assert completed.stderr.startswith("flatout: ")
    assert message in completed.stderr
    assert "flatout/" not in completed.stderr  # no traceback of ours
    assert ("KeyError: 'my data'" in completed.stderr) == (mistake == "crashes")
    assert not (tmp_path / "flatout.toml").exists()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--budget", "soon", "--", "x"], "is not a time such as"),
        (["--steps", "0", "--", "x"], "is not a positive integer"),
        (["--steps", "5", "--", "x"], "must be at least 20"),
        (["--knobs", "gc,warp", "--", "x"], "there is no knob 'warp' (known: "),
        (
            ["--knobs", "gc,precison", "--", "x"],
            "there is no knob 'precison'; did you mean precision?",
        ),
        (["--memory", "0.9", "--", "x"], "is less than 1"),
        (["--plan", "nowhere/p.toml", "--", "x"], "there is no folder nowhere"),
        (["--in-place", "--", "no-such-program-anywhere"], "no-such-program-anywhere"),
    ],
)
def test_bad_options_are_one_sentence(
    words: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    try:
        code = main(["tune", *words])
    except SystemExit as exit_:  # argparse
        code = int(exit_.code or 0)
    assert code != 0
    assert message in capsys.readouterr().err


@pytest.mark.tunes
@pytest.mark.usefixtures("two_pairs")
def test_plan_report_and_document_agree(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    command = write(tmp_path, MANY_TENSORS)
    monkeypatch.chdir(tmp_path)
    options = [
        "--in-place",
        "--budget",
        f"{AMPLE_BUDGET_S}s",
        "--steps",
        "30",
        "--json",
        "found.json",
    ]
    options += ["--knobs", "precision,optimizer"]
    assert main(["tune", *options, "--", *command]) == 0
    said = capsys.readouterr()
    assert said.out == ""
    found = json.loads((tmp_path / "found.json").read_text())
    tried = {knob for arm in found["arms"] for knob in arm["settings"] or [arm["label"]]}
    assert tried == {"precision", "optimizer"}
    if found["plan"] is None:  # the machine was too noisy for two pairs
        assert not (tmp_path / "flatout.toml").exists()
        assert f"no plan written: {found['why']}" in said.err
        return
    written = plan.read(tmp_path / "flatout.toml")
    assert written.proven
    assert dict(written.settings) == found["settings"]
    assert written.command == tuple(command)
    assert written.inputs == ("float32[256,16]",)
    assert written.evidence is not None
    assert written.evidence.ratio == pytest.approx(found["claim"]["value"], rel=1e-5)
    assert written.evidence.ratio_low > 1
    assert f"next: flatout run --plan flatout.toml -- {' '.join(command)}" in said.err


@pytest.mark.tunes
@pytest.mark.usefixtures("two_pairs")
def test_a_tune_that_was_interrupted_goes_on_where_it_was(tmp_path: Path) -> None:
    command = write(tmp_path, MANY_TENSORS)
    options = Options(budget_seconds=AMPLE_BUDGET_S, steps=30, isolate=False, knobs=("optimizer",))
    said: list[str] = []

    def say(line: str) -> None:
        said.append(line)
        if line.startswith("pair 1: ") and len(said) < 100:
            raise KeyboardInterrupt

    def tuner_of(opened: journal.Journal, say: Callable[[str], None]) -> Tuner:
        return Tuner(command, options, opened, say, lambda *_: None, lambda _: None)

    opened = journal.begin("tune", command)
    outcome = tuner_of(opened, say).run()
    opened.close()
    assert outcome.interrupted
    assert outcome.why == "it was interrupted before a plan was proven"
    before = journal.read(opened.path)
    again = journal.resume("tune", command)
    outcome = tuner_of(again, said.append).run()
    again.close()
    assert not outcome.interrupted
    assert outcome.evidence is not None or "measurable" in outcome.why
    after = journal.read(again.path)
    assert after[: len(before)] == before
    assert len(after) > len(before)
    begins = said.index("running the bare program to see how long its steps take", 1)
    once, again_said = (
        [line for line in lines if line.endswith("inside one process")]
        for lines in (said[:begins], said[begins:])
    )
    assert once == again_said != []


@pytest.mark.tunes
@pytest.mark.usefixtures("two_pairs")
def test_a_plan_is_verified_and_a_wrong_one_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    command = write(tmp_path, MANY_TENSORS)
    monkeypatch.chdir(tmp_path)
    options = ["--in-place", "--steps", "25", "--seeds", "2", "--", *command]
    right, wrong = tmp_path / "right.toml", tmp_path / "wrong.toml"
    plan.Plan({"optimizer": "onepass"}).write(right)
    plan.Plan({"precision": "bf16"}).write(wrong)
    assert main(["verify", "--plan", "right.toml", *options]) == 0
    assert "proof: passed (non-inferior) over 25 steps, 2 seeds" in capsys.readouterr().err
    proven = plan.read(right)
    assert proven.proven
    assert proven.evidence is not None
    assert proven.evidence.steps == 25
    assert main(["verify", "--plan", "wrong.toml", *options]) == 1
    assert "precision=bf16 is not proven: " in capsys.readouterr().err
    assert plan.read(wrong).evidence is None


class Clock:
    """A budget of which each pair of runs takes some seconds."""

    def __init__(self, budget_s: float) -> None:
        self.spent_s = 0.0
        self.ledger = Ledger(budget_s, lambda: self.spent_s, lambda _: None, lambda *_: None)


@pytest.mark.parametrize(
    ("budget_s", "variant", "is_decided", "count"),
    [
        (1000.0, {"precision": "safe"}, True, 5),  # its interval is narrow
        (1000.0, {"precision": "safe"}, False, 24),  # as many as there may be
        (200.0, {"precision": "safe"}, False, 10),  # the budget ends it, 5 % over at most
        (200.0, {"precision": "safe", "optimizer": "onepass"}, False, 7),  # time for the rest
        (30.0, {"precision": "safe"}, True, 3),
    ],
)
def test_a_proof_without_a_decision_goes_on_for_as_long_as_the_budget_allows(
    monkeypatch: pytest.MonkeyPatch,
    budget_s: float,
    variant: dict[str, str],
    is_decided: bool,
    count: int,
) -> None:
    clock = Clock(budget_s)
    infers = SimpleNamespace(trains=False)
    bare: Any = SimpleNamespace(pace=Pace(0.0, 1.0), proof=ProofSize(10, 5, 1), process=infers)
    monkeypatch.setattr(Run, "of", lambda _: None)
    prover = Prover(None, clock.ledger, bare, Options())  # type: ignore[arg-type]
    undecided = SimpleNamespace(undecided=not is_decided)
    monkeypatch.setattr(prover, "_judge_without_gradients", lambda _: undecided)
    monkeypatch.setattr(prover, "_has_other_data_order", lambda _: False)
    monkeypatch.setattr(Pairs, "log_ratios", property(lambda self: [0.5] * self.count))
    quiet = property(lambda self: Quietness(self.count, self.count, 0.0, 0.0, 1.0))
    monkeypatch.setattr(Pairs, "quietness", quiet)
    pairs = Pairs({}, variant)
    while not prover._is_enough(pairs):
        run: Any = SimpleNamespace(seconds=10.0)
        pairs.baseline_runs.append(run)
        pairs.variant_runs.append(run)
        clock.spent_s += 20.0
    assert pairs.count == count
    assert clock.spent_s <= max(1.05 * budget_s, 60.0)


def test_a_proof_that_was_interrupted_does_not_blame_the_time() -> None:
    """Only Ctrl-C ends a proof before its second pair: the budget never does."""
    interrupted = Pairs({}, {"gc": "seldom"}, interrupted=True)
    why = Prover._find_refusal(SimpleNamespace(), interrupted, None)  # type: ignore[arg-type]
    assert why == "it was interrupted before two pairs were complete"


@pytest.mark.long
def test_a_budget_that_is_too_short_for_a_trial_is_said_in_one_sentence(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "program.py").write_text(
        "import torch\nnet, x = torch.nn.Linear(2000, 2000), torch.randn(4000, 2000)\n"
        "for _ in range(1000):\n    net(x).sum().backward()\n"
    )
    words = ["tune", "--in-place", "--knobs", "threads,gc,allocator", "--budget", "1s"]
    assert main([*words, "--", sys.executable, "program.py"]) == 0
    assert "the budget of 1.0 s is too short to try a setting" in capsys.readouterr().err
    assert not (tmp_path / "flatout.toml").exists()
