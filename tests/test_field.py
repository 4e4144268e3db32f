"""``benchmarks/field``: what its programs say of themselves, and what the page says of them."""

from __future__ import annotations

import ast
from pathlib import Path
from typing import Any

import pytest

from benchmarks.field import page
from benchmarks.field.program import Installed, Program, read_program, read_programs
from benchmarks.outside import Results

PROGRAM = Program(
    name="tried",
    dependencies=(),
    title="tried",
    command=("{python}", "{file}", "{seed}"),
    result=r"loss ([\d.]+), accuracy ([\d.]+)",
    clock=r"took ([\d.]+) min",
    clock_unit_s=60.0,
)

NAMES = (
    "ctc_speech",
    "hf_trainer",
    "hogwild",
    "lightning_gan",
    "nhits",
    "peft_lora",
    "pinn_deepxde",
    "pyg_gat",
    "sb3_dqn",
    "sb3_ppo",
    "sentence_embeddings",
    "smp_unet",
    "tabnet",
    "timm_train",
    "ultralytics_detect",
    "word_language_model",
)


@pytest.mark.parametrize("name", NAMES)
def test_a_program_of_the_field_is_complete(name: str, tmp_path: Path) -> None:
    program = read_programs()[name]
    installed = Installed(program, tmp_path / "bin" / "python", tmp_path)
    command = installed.command(3)
    assert not any("{" in word for word in (*command, *installed.environment().values()))
    assert installed.command(4) != command
    assert program.read_result("nothing") is None
    source = program.file.read_text("utf-8")
    ast.parse(source)
    assert "flatout" not in source  # nor does a program know of it
    own = {"benchmarks"}
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.ImportFrom):
            assert (node.module or "").partition(".")[0] not in own


def test_every_file_of_the_field_is_a_program() -> None:
    assert tuple(read_programs()) == NAMES


def test_a_file_without_metadata_is_named(tmp_path: Path) -> None:
    file = tmp_path / "bare.py"
    file.write_text("print()\n")
    with pytest.raises(ValueError, match=r"bare\.py has no metadata"):
        read_program(file)


def test_the_last_result_that_is_printed_counts() -> None:
    output = "loss 3.5, accuracy 0.1\ntook 1.5 min\nloss 2.5, accuracy 0.7\n"
    assert PROGRAM.read_result(output) == [2.5, 0.7]
    assert PROGRAM.read_clock_s(output) == 90
    assert PROGRAM.read_clock_s("") is None


# What is made of the measurements


def run(result: list[float] | None, seconds: float = 10.0, **fields: Any) -> dict[str, Any]:
    return {"result": result, "seconds": seconds, "clock_s": None, "failure": None, **fields}


def measured(
    path: Path,
    bare: list[list[float]],
    watched: list[float],
    plan: list[list[float]],
    plan_s: float = 5.0,
) -> Results:
    results = Results(path / "field.jsonl")
    for seed, result in enumerate(bare):
        results.add("tried", "bare", seed=seed, **run(result))
    results.add("tried", "watched", **run(watched))
    for result in plan:
        pair = {"bare": run(bare[0]), "plan": run(result, plan_s)}
        results.add("tried", "pair", **pair)
    return results


BARE = [[2.50, 0.70], [2.40, 0.72], [2.60, 0.68]]


@pytest.mark.parametrize(
    ("watched", "plan", "same", "is_right"),
    [
        ([2.50, 0.70], [[2.50, 0.70]] * 2, "equal", True),
        ([2.50, 0.70], [[2.51, 0.70]] * 2, "within the seeds", True),
        ([2.50, 0.70], [[4.50, 0.70]] * 2, "**no**: 4.5 with the plan", False),
        ([2.50, 0.70], [], "equal", True),
        ([2.51, 0.70], [[2.50, 0.70]] * 2, "**no**: it differs when flatout only watches", False),
    ],
)
def test_results_are_compared_with_the_spread_of_seeds(
    watched: list[float], plan: list[list[float]], same: str, is_right: bool, tmp_path: Path
) -> None:
    verdict = page.judge(PROGRAM, measured(tmp_path, BARE, watched, plan))
    assert verdict.same.startswith(same)
    assert (not verdict.faults) == is_right


def test_a_program_that_does_not_repeat_itself_may_differ_when_it_is_watched(
    tmp_path: Path,
) -> None:
    results = measured(tmp_path, BARE, [2.51, 0.70], [])
    results.add("tried", "pair", bare=run([2.49, 0.70]), plan=run([2.52, 0.71]))
    results.add("tried", "pair", bare=run([2.52, 0.70]), plan=run([2.51, 0.71]))
    verdict = page.judge(PROGRAM, results)
    assert verdict.same == "within the seeds"
    assert not verdict.faults


def test_a_slower_program_is_a_fault(tmp_path: Path) -> None:
    results = measured(tmp_path, BARE, BARE[0], [BARE[0]] * 3, plan_s=12.0)
    verdict = page.judge(PROGRAM, results)
    assert verdict.outside is not None
    assert verdict.outside.value == pytest.approx(10 / 12)
    assert any(fault.startswith("slower under its plan") for fault in verdict.faults)


def test_a_failure_is_in_the_table(tmp_path: Path) -> None:
    results = Results(tmp_path / "field.jsonl")
    results.add("tried", "doctor", failure="exit code 1: killed\nby a signal", seconds=1.0)
    results.add("tried", "tune", failure="exit code 3: no step", plan=None, seconds=2.0)
    table = page.table([page.judge(PROGRAM, results)])
    assert "- tried: doctor: exit code 1: killed ..." in table
    assert "- tried: tune: exit code 3: no step" in table
    assert table.count("not measured") >= 3


def test_the_page_is_made_from_the_measurements() -> None:
    results = Results(page.MEASURED)
    assert page.PAGE.read_text("utf-8") == page.markdown(results)
