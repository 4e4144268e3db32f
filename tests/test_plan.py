"""Plans survive the way to the file and back, and say where they are wrong."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest

from flatout import plan
from flatout.plan import Check, Evidence, LossEvidence, Plan, PlanError
from flatout.plan.program import Program

PLAN = Plan(
    settings={"precision": "bf16", "optimizer": "fused"},
    command=("python", "train.py", "--name", 'a "quoted" one'),
    program=Program(
        files={
            "train.py": {"bytes": "ab" * 6, "module": "cd" * 6, "Net.forward()": "ef" * 6},
            "../conf/a b.yaml": {"bytes": "12" * 6},
        },
        environment={"MODEL": "unset"},
        folder="..",
        arguments=("python", "train.py", "--name", 'a "quoted" one'),
    ),
    machine={"cpu": "Some CPU", "cores": 2, "torch": "2.13.0+cpu"},
    evidence=Evidence(
        settings={"precision": "bf16", "optimizer": "fused"},
        ratio=1.61,
        ratio_low=1.55,
        ratio_high=1.67,
        pairs=4,
        bare_step_ms=161.0,
        plan_step_ms=100.0,
        steps=60,
        seeds=4,
        bare_repeats=True,
        verdict="non-inferior",
        in_process={"precision": 1.5, "optimizer": 1.1},
        losses=(
            LossEvidence(1.25, 1.26, 0.01, 0.02, "seeds", (2.0, 1.25), (2.0, 1.26)),
            LossEvidence(0.5, 0.5, 0.0, 0.1, "seeds"),
        ),
        checks=(
            Check("losses", "passed", "the loss exceeds bare's by at most 0.01", {"limit": 0.01}),
            Check("state", "open", "the weights at the end were not recorded"),
        ),
    ),
)


def test_a_plan_comes_back_as_it_was_written(tmp_path: Path) -> None:
    path = tmp_path / "flatout.toml"
    PLAN.write(path)
    assert plan.read(path) == PLAN
    assert plan.read(path).proven
    assert [entry.name for entry in tmp_path.iterdir()] == ["flatout.toml"]
    assert "flatout run --plan flatout.toml" in path.read_text()


def test_a_plan_by_hand_needs_its_settings_only(tmp_path: Path) -> None:
    path = tmp_path / "mine.toml"
    path.write_text('[plan]\noptimizer = "fused"\n')
    read = plan.read(path)
    assert read == Plan(settings={"optimizer": "fused"})
    assert not read.proven


def test_an_edited_plan_is_no_longer_proven(tmp_path: Path) -> None:
    path = tmp_path / "flatout.toml"
    PLAN.write(path)
    lines = path.read_text().splitlines()
    first = next(line for line in lines if line.startswith("precision"))
    path.write_text("\n".join(line for line in lines if line != first))
    assert plan.read(path).settings == {"optimizer": "fused"}
    assert not plan.read(path).proven


MISTAKES = {
    "not TOML": ("[plan]\nprecision = \n", r"line 2: this is not TOML"),
    "no plan": ("version = 1\n", r"has no table \[plan\]"),
    "unknown knob": ('[plan]\nspeed = "up"\n', r"line 2: plan.speed is not possible: .*'speed'"),
    "unknown setting": (
        '[plan]\noptimizer = "fused"\nprecision = "int3"\n',
        r"line 3: plan.precision is not possible: .*'int3'.*bf16",
    ),
    "not a string": ("[plan]\nprecision = 16\n", r"line 2: plan.precision must be a string"),
    "unknown table": ("[plan]\n[planned]\n", r"line 2: planned is not known"),
    "unknown key": ('[plan]\n[job]\nname = "x"\n', r"line 3: job.name is not known"),
    "plan is no table": ("plan = 3\n", r"line 1: plan must be a table"),
    "command": ('[plan]\n[job]\ncommand = "x"\n', r"line 3: job.command must be a list"),
    "machine": ("[plan]\n[machine]\ncores = [1]\n", r"line 3: machine.cores must be"),
    "version": ("version = 3\n[plan]\n", r"line 1: version is 3, this flatout reads 1 and 2"),
    "version is no number": ("version = true\n[plan]\n", r"line 1: version is True, this"),
    "nested too deeply": (f"a = {'[' * 500}{']' * 500}", "nested"),
    "control characters": ('[plan]\n"\\u001b[2Jgc" = "seldom"\n', r"plan.\\x1b\[2Jgc is not"),
    "not finite": ("[plan]\n[machine]\ncores = nan\n", r"machine.cores must be .* finite number"),
    "negative": ("[plan]\n[machine]\ncores = -1\n", r"machine.cores must be .* not negative"),
    "ratio learned": ("[plan]\n[learned]\nratios = {gc = -1.0}\n", "gc must be a positive number"),
    "old key": ("version = 2\n[plan]\n[job]\nprogram_sha256 = ''\n", "program_sha256 is not known"),
    "folder": ("[plan]\n[job]\nfolder = 3\n", r"line 3: job.folder must be a string"),
    "program": ('[plan]\n[program]\n"a.py" = "x"\n', r"line 3: program.a.py must be a table"),
    "digest": ('[plan]\n[program."a.py"]\nbytes = 3\n', r"program.a.py.bytes must be a string"),
    "evidence lacks a key": ("[plan]\n[evidence]\nratio = 2.0\n", r"\[evidence\] has no key"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_mistakes_are_named_with_their_place(tmp_path: Path, mistake: str) -> None:
    text, message = MISTAKES[mistake]
    path = tmp_path / "flatout.toml"
    path.write_text(text)
    with pytest.raises(PlanError, match=message) as caught:
        plan.read(path)
    assert str(caught.value).startswith(str(path))
    assert "\n" not in str(caught.value)


def test_types_in_the_evidence_are_checked(tmp_path: Path) -> None:
    path = tmp_path / "flatout.toml"
    PLAN.write(path)
    good = path.read_text()
    for line, wrong in (
        ("ratio = 1.61", 'ratio = "much"'),
        ("pairs = 4", "pairs = 4.5"),
        ("pairs = 4", "pairs = -4"),
        ("ratio = 1.61", "ratio = nan"),
        ("ratio = 1.61", "ratio = 1.7"),
        ("ratio_high = 1.67", "ratio_high = inf"),
        ("plan_step_ms = 100.0", "plan_step_ms = -100.0"),
        ("margin = 0.02", "margin = -0.02"),
        ("bare_final = 1.25", "bare_final = nan"),
        ("plan_curve = [2.0, 1.26]", "plan_curve = [2.0, inf]"),
        ("limit = 0.01", "limit = nan"),
        ("optimizer = 1.1", "optimizer = 0.0"),
        ("bare_repeats = true", "bare_repeats = 1"),
        ("margin = 0.02", 'margin = "small"'),
        ("bare_curve = [2.0, 1.25]", 'bare_curve = ["a"]'),
        ('result = "open"', 'result = "perhaps"'),
    ):
        assert line in good
        path.write_text(good.replace(line, wrong, 1))
        key = line.partition(" ")[0]
        with pytest.raises(PlanError, match=rf"evidence\..*{key} must"):
            plan.read(path)


def test_what_is_not_finite_is_left_out_of_the_file(tmp_path: Path) -> None:
    """Not known is not zero, and a plan that was written can be read."""
    assert PLAN.evidence is not None
    figures = {"limit": float("inf"), "error": 0.5}
    checks = (Check("outputs", "passed", "they agree", figures),)
    losses = (LossEvidence(1.0, 1.0, 0.0, 0.1, "seeds", (2.0, float("nan"), 1.0), (2.0, 1.0)),)
    evidence = dataclasses.replace(PLAN.evidence, checks=checks, losses=losses)
    dataclasses.replace(PLAN, evidence=evidence).write(tmp_path / "flatout.toml")
    read = plan.read(tmp_path / "flatout.toml").evidence
    assert read is not None
    assert read.checks[0].measurements == {"error": 0.5}
    assert read.losses[0].bare_curve == (2.0, 1.0)


def test_a_plan_of_version_1_is_read_and_its_program_is_not_known(tmp_path: Path) -> None:
    path = tmp_path / "flatout.toml"
    path.write_text(
        'version = 1\n[plan]\ngc = "seldom"\n[job]\ncommand = ["python", "train.py"]\n'
        'program_sha256 = "1546d62b"\n'
    )
    read = plan.read(path)
    assert read.program is None
    (difference,) = read.differences(["python", "train.py"], {})
    assert difference.startswith("the plan does not say which files")


def test_a_missing_file_and_a_folder_are_one_sentence(tmp_path: Path) -> None:
    with pytest.raises(PlanError, match="cannot be read: No such file"):
        plan.read(tmp_path / "nothing.toml")
    with pytest.raises(PlanError, match="cannot be read: Is a directory"):
        plan.read(tmp_path)
    with pytest.raises(PlanError, match="cannot be written"):
        PLAN.write(tmp_path / "no folder" / "flatout.toml")
