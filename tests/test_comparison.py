"""The comparison of two diagnoses, and the diagnosis of a record."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from flatout import cli
from flatout.doctor import comparison
from flatout.errors import UserError

BEFORE: dict[str, Any] = {
    "program": "train.py",
    "torch": "2.13.0",
    "threads": 2,
    "usable_cores": 2.0,
    "dtype": "float32",
    "step_ms": 10.0,
    "mean_step_ms": 10.0,
    "phases_ms": {"data": None, "forward": 4.0, "loss": 0.0, "backward": 6.0, "optimizer": None},
    "operators": [{"name": "aten::mm", "share": 0.5}, {"name": "aten::add", "share": 0.1}],
    "minor_faults_per_step": None,
    "peak_rss_bytes": 2**30,
    "lost_share": 0.0,
    "findings": [{"kind": "unfused-optimizer"}, {"kind": "memory-bound"}],
}
NOW = BEFORE | {
    "step_ms": 12.0,
    "mean_step_ms": 12.5,
    "phases_ms": {"data": 2.5, "forward": 4.0, "loss": 0.0, "backward": 6.0, "optimizer": None},
    "operators": [{"name": "aten::mm", "share": 0.4}, {"name": "aten::copy_", "share": 0.2}],
    "findings": [{"kind": "memory-bound"}, {"kind": "input-bound"}],
}


def write(folder: Path, **documents: dict[str, Any]) -> list[str]:
    files = []
    for name, document in documents.items():
        files.append(str(folder / f"{name}.json"))
        Path(files[-1]).write_text(json.dumps(document))
    return files


def test_what_takes_longer_is_named() -> None:
    found = comparison.compare(BEFORE, NOW)
    assert found.step_ms.ratio == pytest.approx(1.25)
    assert {one.name: (one.before, one.now) for one in found.phases_ms} == {
        "data": (None, 2.5),
        "forward": (4.0, 4.0),
        "backward": (6.0, 6.0),
    }
    assert [(one.name, one.before, one.now) for one in found.operators_ms] == [
        ("aten::copy_", 0.0, 2.5),
        ("aten::add", 1.0, 0.0),
        ("aten::mm", 5.0, 5.0),
    ]
    assert (found.appeared, found.gone) == (("input-bound",), ("unfused-optimizer",))
    assert found.unlike == ()


def test_runs_that_are_not_alike_are_said() -> None:
    now = NOW | {"torch": "2.14.1", "threads": 1, "lost_share": 0.4}
    assert comparison.compare(BEFORE, now).unlike == (
        "torch 2.13.0 before, 2.14.1 now",
        "threads 2 before, 1 now",
        "other processes took 40% of the step's time now",
    )


@pytest.mark.parametrize(("options", "status"), [([], 1), (["--at-most", "1.3"], 0)])
def test_the_status_is_for_scripts(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], options: list[str], status: int
) -> None:
    files = write(tmp_path, before=BEFORE, now=NOW)
    written = tmp_path / "comparison.json"
    assert cli.main(["compare", *options, "--json", str(written), *files]) == status
    output = capsys.readouterr()
    lines = output.out.splitlines()
    assert lines[0] == "train.py: a step takes 12.5 ms, 10 ms before: 1.25x as long"
    assert any(line.split() == ["data", "not", "measured", "2.5", "ms"] for line in lines)
    assert any(line.split() == ["forward", "4", "ms", "4", "ms", "="] for line in lines)
    assert "found only now: input-bound" in lines
    assert ("--at-most" in output.err) == (status == 1)
    assert json.loads(written.read_text())["step_ratio"] == pytest.approx(1.25)
    assert cli.main(["compare", files[0], files[0]]) == 0
    assert "as long" in capsys.readouterr().out


@pytest.mark.parametrize("content", ["", "[]", "{}", '{"mean_step_ms": null}'])
def test_what_is_no_diagnosis_is_refused(tmp_path: Path, content: str) -> None:
    path = tmp_path / "other.json"
    path.write_text(content)
    with pytest.raises(UserError, match=r"other\.json is neither what 'flatout doctor --json"):
        comparison.read(path)
    with pytest.raises(UserError, match="missing"):
        comparison.read(tmp_path / "missing.json")
    with pytest.raises(UserError):
        comparison.read(tmp_path)


def test_a_record_is_diagnosed_and_compared_without_a_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("torch")
    monkeypatch.setenv("FLATOUT_HOME", str(tmp_path / "home"))
    monkeypatch.setattr("flatout.cli.verbs.doctor._ceilings", lambda python: None)
    program = tmp_path / "program.py"
    program.write_text(
        "import torch\n"
        "model = torch.nn.Linear(4, 4)\n"
        "optimizer = torch.optim.SGD(model.parameters(), lr=0.1)\n"
        "for _ in range(20):\n"
        "    optimizer.zero_grad()\n"
        "    model(torch.randn(2, 4)).sum().backward()\n"
        "    optimizer.step()\n"
    )
    words = [sys.executable, "-m", "flatout", "run", "--", sys.executable, str(program)]
    subprocess.run(words, check=True, capture_output=True)
    [folder] = (tmp_path / "home" / "runs").iterdir()
    assert cli.main(["doctor", "--json", str(tmp_path / "found.json"), str(folder)]) == 0
    assert "program.py: 17 steps" in capsys.readouterr().out
    assert cli.main(["compare", str(tmp_path / "found.json"), str(folder)]) == 0
    assert "as long" in capsys.readouterr().out
