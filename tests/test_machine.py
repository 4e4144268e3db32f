"""What the machine is and can do: quotas, the cache of figures, what cannot be measured."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from flatout import machine
from flatout.cli import main
from flatout.errors import UserError
from flatout.machine import probe as machine_probe
from flatout.machine import usage

REPORT = {
    "torch": "2.13.0",
    "threads": 2,
    "cpu_capability": "AVX2",
    "page_fault_us": None,
    "devices": {
        "cpu": {
            "reported": {},
            "matmul_flops_per_s": {"float32": 1.5e11, "bfloat16": None},
            "memory_bytes_per_s": 2e10,
        },
        "cuda": {
            "reported": {"name": "a device", "count": 1},
            "matmul_flops_per_s": {"float32": 1e13, "bfloat16": 1e14},
            "memory_bytes_per_s": 1e12,
        },
    },
    "no_accelerator": None,
}


@pytest.fixture
def measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Stands for the measurement, which takes seconds; the list tells how often it was made."""
    monkeypatch.delenv("FLATOUT_CACHE")
    monkeypatch.setenv("FLATOUT_HOME", str(tmp_path))
    made: list[str] = []
    run = subprocess.run

    def probe(command: list[str], **options: object) -> subprocess.CompletedProcess[str]:
        if not command[-1].endswith("machine/probe.py"):
            return run(command, **options)  # type: ignore[call-overload,no-any-return]
        made.append(command[0])
        return subprocess.CompletedProcess(command, 0, json.dumps(REPORT), "")

    monkeypatch.setattr(subprocess, "run", probe)
    return made


def test_measured_once_and_again_on_request(measured: list[str]) -> None:
    first = machine.ceilings(sys.executable)
    assert machine.ceilings(sys.executable) == first
    assert len(measured) == 1
    machine.ceilings(sys.executable, refresh=True)
    assert len(measured) == 2
    assert first.matmul_flops_per_s["bfloat16"] == 1e14  # the accelerator's
    assert first.page_fault_us is None


def test_an_accelerator_is_measured_with_matrices_that_fill_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    largest, tried = {"cuda": 4096, "cpu": 2048}, []

    def product(m: int, k: int, n: int, device: torch.device, dtype: torch.dtype) -> object:
        tried.append(n)
        return None if n > largest[device.type] else lambda: None  # no memory for it

    monkeypatch.setattr(machine_probe, "prepare_matmul", product)
    monkeypatch.setattr(machine_probe, "best_time_s", lambda *_: 1e-3)
    of = machine_probe.matmul_flops_per_s
    assert of(torch.device("cuda"), torch.float32) == pytest.approx(2e3 * 4096**3)
    assert max(tried) == 8192
    tried.clear()
    assert of(torch.device("cpu"), torch.float32) == pytest.approx(2e3 * 2048**3)
    assert max(tried) == 2048
    largest["cuda"] = 0
    assert of(torch.device("cuda"), torch.float32) is None


def test_one_interpreter_has_one_entry_whatever_it_is_called(
    measured: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    machine.ceilings(sys.executable)
    monkeypatch.chdir(Path(sys.executable).parent)
    machine.ceilings(f"./{Path(sys.executable).name}")
    assert len(measured) == 1


@pytest.mark.parametrize("damage", ["", "{", '{"version": 3, "entries": [{}]}', "[]"])
def test_a_damaged_cache_is_measured_anew(
    measured: list[str], damage: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "cache").mkdir()
    (tmp_path / "cache" / "machine.json").write_text(damage)
    machine.ceilings(sys.executable)
    assert len(measured) == 1
    assert "the machine is measured again" in capsys.readouterr().err


def test_what_was_not_measured_is_said(
    measured: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["machine", "--python", sys.executable]) == 0
    shown = " ".join(capsys.readouterr().out.split())
    assert "page fault not measured" in shown
    assert "cpu: float32 matmul 150 GFLOP/s" in shown
    assert "cpu: bfloat16 matmul not measured" in shown
    assert "cuda: name a device" in shown


def test_rates_that_were_measured_beside_other_work_are_not_kept(
    measured: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    readings = [usage.Usage(0, 2, 0.0, None, None, 0.0, None, None, None)]

    def read_after(seconds: float, others: float | None) -> usage.Usage:
        """Take two CPUs, of which others use some, and this job one."""
        before = readings[-1]
        idle_s = None if others is None else (before.idle_s or 0) + (1 - others) * seconds
        readings.append(
            before._replace(
                at_ns=before.at_ns + round(seconds * 1e9),
                own_s=before.own_s + seconds,
                idle_s=idle_s,
            )
        )
        return readings[-1]

    def measure(seconds: float, others: float | None) -> machine.Ceilings:
        both = iter([readings[-1], read_after(seconds, others)])
        monkeypatch.setattr(usage, "read", lambda: next(both))
        return machine.ceilings(sys.executable)

    busy = measure(9.0, others=0.6)
    assert (busy.others_share, busy.is_disturbed) == (pytest.approx(0.3), True)
    assert machine.known_ceilings(sys.executable) is None
    assert main_with(monkeypatch, iter([readings[-1], read_after(9.0, 0.6)])) == 0
    shown = " ".join(capsys.readouterr().out.split())
    assert "others took 30% of the CPUs: the rates are too low, and are not kept" in shown
    quiet = measure(9.0, others=0.04)
    assert quiet.others_share == pytest.approx(0.02)
    assert machine.known_ceilings(sys.executable) == quiet
    assert len(measured) == 3


@pytest.mark.parametrize(("seconds", "idle_s"), [(0.1, 0.0), (9.0, None)])
def test_where_others_are_not_measured_rates_are_kept(
    measured: list[str], monkeypatch: pytest.MonkeyPatch, seconds: float, idle_s: float | None
) -> None:
    before = usage.Usage(0, 2, 0.0, None, None, idle_s, None, None, None)
    both = iter([before, before._replace(at_ns=round(seconds * 1e9))])
    monkeypatch.setattr(usage, "read", lambda: next(both))
    assert machine.ceilings(sys.executable).others_share is None
    assert machine.known_ceilings(sys.executable) is not None


def main_with(monkeypatch: pytest.MonkeyPatch, readings: Iterator[usage.Usage]) -> int:
    """The exit status of ``flatout machine`` with these readings."""
    monkeypatch.setattr(usage, "read", lambda: next(readings))
    return main(["machine", "--python", sys.executable])


def test_an_interpreter_without_torch_is_one_sentence(tmp_path: Path) -> None:
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", tmp_path / "v"], check=True)
    with pytest.raises(UserError, match="has no torch to measure with"):
        machine.ceilings(str(tmp_path / "v" / "bin" / "python"))


def test_an_interpreter_on_path_without_torch_is_passed_over(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", tmp_path / "v"], check=True)
    monkeypatch.setenv("PATH", str(tmp_path / "v" / "bin"))
    assert machine.default_python() == sys.executable
