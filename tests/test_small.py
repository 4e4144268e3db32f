"""``benchmarks/small``: what is written into the programs, what is made of the measurements."""

from __future__ import annotations

import ast
from pathlib import Path
from typing import Any

import pytest

from benchmarks.outside import Results
from benchmarks.small import table
from benchmarks.small.cases import ARMS, CASES, JAX_PROGRAMS, PROGRAMS, edited


@pytest.mark.parametrize("name", CASES)
def test_every_arm_is_written_into_every_program(name: str) -> None:
    plain = (PROGRAMS / f"{name}.py").read_text("utf-8")
    for arm, how in ARMS.items():
        text = edited(name, how)
        if text is None:
            assert (name, arm) == ("rows", "fused")  # it does not train
            continue
        ast.parse(text)
        assert "flatout" not in text
        assert (text == plain) == (arm == "bare")


def test_programs_and_cases_are_the_same() -> None:
    assert {path.stem for path in PROGRAMS.glob("*.py")} == set(CASES)
    assert {path.stem for path in JAX_PROGRAMS.glob("*.py")} == {"tabular", "gru", "pinn", "rows"}


def round_of(number: int, **step_ms: float) -> dict[str, Any]:
    arms = {}
    for arm, ms in step_ms.items():
        loss = 0.5 + 0.01 * number + (1.0 if arm == "compile" else 0.0)
        arms[arm] = {"step_s": ms / 1e3, "ran_s": 1.0, "peak_bytes": 1, "last": [loss]}
    return {"number": number, "steps": 10, "arms": arms}


@pytest.fixture
def results(tmp_path: Path) -> Results:
    found = Results(tmp_path / "results.jsonl")
    found.add("tabular", "tune", seconds=75.0, settings={"replay": "operators"}, plan="")
    for number in range(4):
        times = {"bare": 1.2, "fused": 0.8, "compile": 0.1, "jax": 0.2, "flatout": 0.4}
        found.add("tabular", "round", **round_of(number, **times))
    return found


def test_a_wrong_arm_is_no_peer_and_jax_is_none(results: Results) -> None:
    found = table.judged("tabular", results)
    assert found is not None
    assert found.best_peer == "fused"
    assert found.over_peer is not None
    assert found.over_peer.value == pytest.approx(2.0)
    assert found.over_jax is not None
    assert found.over_jax.value == pytest.approx(2.0)
    assert set(found.wrong) == {"compile"}
    assert "**broken**, 12.00x" in table.markdown(results)


def test_missed_targets_are_named(results: Results) -> None:
    says = table.missed(results, ["tabular", "gru"])
    assert says == [
        "gru: not measured",
        "tabular: 2.00 times JAX's step, asked: 1.5",
        "tabular: its tune took 75 s, asked: 60 s",
    ]


def test_what_was_not_measured_is_said(results: Results) -> None:
    for number in range(2):
        results.add("gat", "round", **round_of(number, bare=2.0))
    row = next(line for line in table.markdown(results).splitlines() if "| gat |" in line)
    assert row.count("not measured") == 3
    assert "gat: flatout: not measured" in table.missed(results, ["gat"])
