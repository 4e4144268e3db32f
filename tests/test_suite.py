"""``benchmarks/suite``: what is written into the programs, what is made of the measurements."""

from __future__ import annotations

import ast
import dataclasses
import itertools
import math
from pathlib import Path
from typing import Any

import pytest

from benchmarks.outside import Results
from benchmarks.suite import arms, measure, publish, table
from benchmarks.suite.cases import CASES

HELD_OUT = {"vae", "diffusion", "classify_folder"}


@pytest.mark.parametrize("name", CASES)
def test_every_arm_is_written_into_every_program_that_can_have_it(name: str) -> None:
    case = CASES[name]
    plain = case.script.read_text()
    for arm in arms.ARMS:
        try:
            text = arms.edited(case, arm)
        except arms.NotApplicableError:
            continue
        ast.parse(text)
        assert "flatout" not in text
        assert (text.split() == plain.split()) == (arm == "bare")


def test_held_out_programs_are_three() -> None:
    assert {name for name, case in CASES.items() if case.is_held_out} == HELD_OUT


def test_an_experts_lines_are_where_an_expert_puts_them() -> None:
    lines = [line.strip() for line in arms.edited(CASES["dcgan"], "all").splitlines()]
    built = lines.index("net_g.compile()")
    assert lines[built - 1].startswith("optimizer_g = torch.optim.Adam(net_g")
    assert lines[built - 1].endswith("fused=True)")
    assert lines[built + 1] == "net_d.compile()"
    context = 'with torch.autocast("cpu", torch.bfloat16):'
    under = [line for before, line in itertools.pairwise(lines) if before == context]
    assert [line.split()[0] for line in under] == ["fake", "loss_d", "loss_g"]
    text = arms.edited(CASES["gpt"], "accelerate")
    assert "model, optimizer = accelerator.prepare(model, optimizer)" in text
    assert "accelerator.backward(loss)" in text
    assert "loss.backward()" not in text


def test_the_last_quarter_of_what_is_printed_counts() -> None:
    lines = [(step, f"D {step / 10} G nan") for step in range(8)]
    first, second = measure.last_quarter(lines)
    assert first == pytest.approx(0.65)
    assert math.isnan(second)
    assert measure.last_quarter([(0, "[3, 5]")]) == [3, 5]


SEEDS = [[2.0], [2.2], [1.8], [2.1]]


@pytest.mark.parametrize(
    ("own", "why"),
    [
        (SEEDS, None),
        ([[2.2], [1.8], [2.1], [2.0]], None),  # other random numbers
        ([[loss + 0.1] for (loss,) in SEEDS], None),  # worse, within the spread between seeds
        ([[loss + 0.3] for (loss,) in SEEDS], "loss 2.325 instead of 2.025"),
        ([[loss - 0.3] for (loss,) in SEEDS], None),
        ([*SEEDS[:3], [math.nan]], "not finite"),
    ],
)
def test_losses_are_right_unless_they_are_certainly_worse(
    own: list[list[float]], why: str | None
) -> None:
    assert table.wrong(SEEDS, own, trains=True) == why


def test_outputs_are_right_if_they_are_the_same_to_two_percent() -> None:
    bare = [[100.0, 300.0]] * 2
    assert table.wrong(bare, [[101.0, 299.0]] * 2, trains=False) is None
    assert table.wrong(bare, [[100.0, 300.0], [90.0, 310.0]], trains=False) is not None


def of(step_s: float, loss: float = 2.0) -> dict[str, Any]:
    return {"step_s": step_s, "ran_s": 100 * step_s, "peak_bytes": 2**28, "last": [loss]}


def a_run(path: Path, name: str, flatout_s: float) -> Results:
    """Four rounds in which ``accelerate`` is fast on the even ones, ``fused`` on all."""
    results = Results(path)
    claim = {"value": 1.9, "low": 1.8, "high": 2.0, "pairs": 9}
    tune = {"settings": {"precision": "bf16"}, "claim": claim, "why": "", "plan": "x"}
    results.add(name, "tune", seconds=200.0, **tune)
    results.add(name, "not applicable", arm="all", why="it has no images")
    results.add(name, "first", arm="compile", failure="Boom", ran_s=3.0)
    for number, drift in enumerate((1.0, 1.3, 0.9, 1.1)):
        loss = 2.0 + 0.1 * number
        times = {
            "bare": of(drift, loss),
            "fused": of(0.6 * drift, loss),
            "accelerate": of((0.5 if number % 2 == 0 else 0.9) * drift, loss),
            "autocast": of(0.1 * drift, loss + 1),
            "flatout": of(flatout_s * drift, loss),
        }
        results.add(name, "round", number=number, steps=100, arms=times)
    return results


def test_the_best_peer_is_chosen_on_one_half_and_scored_on_the_other(tmp_path: Path) -> None:
    result = table.judged("gpt", a_run(tmp_path / "results.jsonl", "gpt", 0.3))
    assert result is not None
    assert result.arms["flatout"].ratio.value == pytest.approx(1 / 0.3)
    assert result.arms["autocast"].wrong is not None  # so it is fast, and no peer
    assert result.best_peer == "accelerate"
    assert result.over_peer is not None
    assert result.over_peer.value == pytest.approx(3.0)  # 0.9 on the odd rounds
    assert result.out == {"all": "it has no images", "compile": "fails: Boom"}


def test_targets_are_missed_by_name(tmp_path: Path) -> None:
    results = a_run(tmp_path / "results.jsonl", "gpt", 1.25)
    result = table.judged("gpt", results)
    assert result is not None
    assert "gpt: 0.80x over bare, asked: 1.0x" in table.missed({"gpt": result})
    shares = {"a": 0.1, "b": 0.3, "c": 0.2, "d": 0.0}
    operators = [{"name": name, "share": share} for name, share in shares.items()]
    rest = {"data_share": 0.25, "operators": operators, "operators_share": 0.6}
    result = dataclasses.replace(result, floor=table.Floor(800.0, 2.0), rest=rest)
    says = table.missed({"gpt": result})
    why = (
        " (a step takes 1312 ms, its floor is 802 ms; 25% of it waits for data; b 30%, c 20%, "
        "a 10%)"
    )
    assert f"gpt: 0.80x over bare, asked: 1.0x{why}" in says
    assert f"gpt: 0.72x over accelerate, asked: 0.98x{why}" in says
    limit = " (with every step at its floor it would be 1.31x)"
    assert f"training over bare: geometric mean 0.80x, asked: 3.0x{limit}" in says
    assert "cnn: not measured" in says
    asked = table.missed({"gpt": result}, ["gpt", "vit"])
    assert "vit: not measured" in asked
    assert f"gpt: 0.80x over bare, asked: 1.0x{why}" in asked
    assert not [line for line in asked if "cnn" in line or "mean" in line]
    shown = "\n".join(table.markdown({"gpt": result}))
    assert "**broken**: loss 3.15 instead of 2.15" in shown
    assert "compile: fails: Boom" in shown
    assert "| 1.90x (1.80-2.00) |" in shown


def test_what_takes_the_time_of_flatouts_step_is_told(tmp_path: Path) -> None:
    results = a_run(tmp_path / "results.jsonl", "gpt", 0.5)
    operators = [{"name": "aten::mm", "share": 0.5}, {"name": "aten::add", "share": 0.001}]
    for data_share in (0.9, 0.3):
        results.add(
            "gpt",
            "rest",
            step_ms=20.0,
            data_share=data_share,
            operators_share=0.75,
            operators=operators,
        )
    result = table.judged("gpt", results)
    assert result is not None
    shown = "\n".join(table.markdown({"gpt": result}))
    assert "under the plan): aten::mm 50%, outside of operators 25%. It waits for data 30%" in shown
    assert [
        line["data_share"] for line in publish.latest(results.lines) if "data_share" in line
    ] == [0.3]


def test_the_floor_is_arithmetic_and_the_optimizers_memory() -> None:
    line = {
        "machine": {"matmul_flops_per_s": {"bfloat16": 1e11}, "memory_bytes_per_s": 1e10},
        "diagnosis": {"flops_per_step": 1e9},
        "optimizers": [{"class": "Adam", "elements": 1_000_000}],
    }
    floor = table._floor([line])
    assert floor is not None
    assert floor.compute_ms == pytest.approx(10)
    assert floor.optimizer_ms == pytest.approx(2.8)
    line["machine"]["matmul_flops_per_s"] = {"float32": 1e11}  # type: ignore[index]
    assert table._floor([line]) is None


def test_what_is_published_comes_from_the_measured_figures() -> None:
    results = Results(publish.MEASURED)
    assert publish.MARKDOWN.read_text("utf-8") == publish.markdown(results)
    page = publish.TABLE.read_text("utf-8")
    assert publish.with_table(page, results) == page
    assert publish.latest(results.lines) == results.lines


def test_what_is_published_says_nothing_of_the_machine_but_what_the_tables_say(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    results = a_run(tmp_path / "results.jsonl", "gpt", 0.5)
    machine = {
        "cpu": "Z80",
        "usable_cores": 1,
        "memory_bytes": 2**16,
        "torch": "2.13.0",
        "matmul_flops_per_s": {"float32": 1e3},
        "memory_bytes_per_s": 1e6,
        "python": "/secret",
    }
    diagnosis = {"flops_per_step": 1e9, "operators": ["secret"]}
    measured = {"machine": machine, "diagnosis": diagnosis, "optimizers": [], "peers": []}
    for flops in (2e9, 1e9):
        results.add(
            "gpt", "floor", **{**measured, "diagnosis": {**diagnosis, "flops_per_step": flops}}
        )
    results.add("gpt", "first", arm="all", failure=f"{publish.ROOT}/x.py fails", ran_s=1.23456789)
    for name in ("MEASURED", "MARKDOWN", "PAGE", "TABLE"):
        monkeypatch.setattr(publish, name, tmp_path / name)
    (tmp_path / "TABLE").write_text(f"Before\n{publish.BEGIN}\nold\n{publish.END}\nafter\n")
    publish.publish(results)
    again = Results(tmp_path / "MEASURED")
    assert (tmp_path / "MARKDOWN").read_text() == publish.markdown(again)
    text = (tmp_path / "MEASURED").read_text()
    assert "secret" not in text
    assert '"x.py fails"' in text
    assert [line["diagnosis"]["flops_per_step"] for line in again.of("gpt", "floor")] == [1e9]
    page = (tmp_path / "TABLE").read_text()
    assert page.startswith(f"Before\n{publish.BEGIN}\n| program |")
    assert "| gpt | 2.00x" in page
    assert page.endswith(f"{publish.END}\nafter\n")
