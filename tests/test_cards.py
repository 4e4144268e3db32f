"""What is said of the knobs: the verb ``knobs`` and the pages under ``docs/knobs``."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from flatout import knobs, machine
from flatout.cli import main
from flatout.report import card

PAGES = Path(__file__).parent.parent / "docs" / "knobs"


def test_the_pages_are_those_of_the_knobs() -> None:
    assert {page.stem for page in PAGES.glob("*.md")} == {"index", *knobs.registry()}
    for name, knob in knobs.registry().items():
        assert (PAGES / f"{name}.md").read_text("utf-8") == card.markdown(knob), "run: make docs"


def test_pages_of_knobs_that_are_gone_are_removed(tmp_path: Path) -> None:
    (tmp_path / "warp.md").write_text("faster than light")
    card.write_pages(tmp_path)
    assert {page.stem for page in tmp_path.iterdir()} == set(knobs.registry())


@pytest.mark.parametrize("name", knobs.registry())
def test_the_card_of_a_knob(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["knobs", name]) == 0
    shown = " ".join(capsys.readouterr().out.split())
    for setting in knobs.get(name).settings:
        assert f"{name}={setting}" in shown
    for heading in ("What it does", "When it helps", "When it hurts", "By hand", "Sources"):
        assert heading in shown


def test_a_knob_that_is_not_there(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["knobs", "warp"]) == 2
    assert "there is no knob 'warp' (known: allocator, " in capsys.readouterr().err


def test_the_list_says_what_may_help_here(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    rates = {"float32": 2e11, "bfloat16": 1e10}
    ceilings = machine.Ceilings(
        python=sys.executable,
        torch="2.13.0",
        threads=2,
        matmul_flops_per_s=rates,
        memory_bytes_per_s=None,
        page_fault_us=None,
        devices={"cpu": {"matmul_flops_per_s": rates}, "cuda": {"matmul_flops_per_s": {}}},
        measured_at_unix_s=0.0,
        fingerprint={},
    )
    monkeypatch.setattr(machine, "known_ceilings", lambda python: ceilings)
    monkeypatch.setenv("COLUMNS", "250")
    assert main(["knobs"]) == 0
    rows = [" ".join(line.split()) for line in capsys.readouterr().out.splitlines()]
    assert any(row.startswith("random fast") and row.endswith("cpu may help") for row in rows)
    assert any(row.startswith("random paired") and "by hand only" in row for row in rows)
    assert any(row.startswith("precision bf16") and "10 GFLOP/s" in row for row in rows)
    assert any(row.startswith("optimizer fused") and "not for cuda" in row for row in rows)
