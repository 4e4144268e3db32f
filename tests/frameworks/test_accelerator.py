"""Programs on a GPU: the same under ``flatout run``, diagnosed for what they are, and tuned.

The interpreter that the programs run with, and whose torch finds the device, is named by
``FLATOUT_TEST_ACCELERATOR_PYTHON``; without an accelerator everything here is skipped.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from compare import compare

from flatout import machine
from flatout import plan as plans
from flatout.wire.record import read_run

PROGRAMS = Path(__file__).parent / "accelerator"
PYTHON = os.environ.get("FLATOUT_TEST_ACCELERATOR_PYTHON", sys.executable)

pytestmark = pytest.mark.accelerator


@pytest.fixture(scope="module", autouse=True)
def device() -> str:
    """Type of the accelerator."""
    code = "import torch; print(torch.accelerator.current_accelerator() or '')"
    found = subprocess.run([PYTHON, "-c", code], capture_output=True, text=True, check=False)
    if not found.stdout.strip():
        why = f"the torch of {PYTHON} finds no accelerator: {found.stderr[-200:]}"
        pytest.skip(why) if sys.executable == PYTHON else pytest.fail(why)
    return found.stdout.strip()


@pytest.fixture
def template(tmp_path: Path) -> Path:
    folder = tmp_path / "template"
    shutil.copytree(PROGRAMS, folder, ignore=shutil.ignore_patterns("__pycache__"))
    return folder


def flatout(*arguments: str | Path, home: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "flatout", *map(str, arguments)],
        cwd=PROGRAMS,
        env=os.environ | {"FLATOUT_HOME": str(home)},
        capture_output=True,
        text=True,
        check=False,
    )


def diagnosis(program: str, tmp_path: Path) -> dict[str, Any]:
    file = tmp_path / "diagnosis.json"
    done = flatout("doctor", "--json", file, "--", PYTHON, program, home=tmp_path / "home")
    assert done.returncode == 0, done.stderr
    assert "Warning" not in done.stderr
    return dict(json.loads(file.read_text()))


# What the program's own is: bare, of several runs, and what flatout saw of it.
SAME = {
    "plain": ("gpt.py --deterministic --steps 60", 60),
    "evaluated": ("cnn.py --deterministic --epochs 3", 57),
    "forked": ("cnn.py --deterministic --epochs 3 --workers 2", 57),
    "scaled": ("amp.py", 160),
    "compiled": ("compiled.py", 120),
    "inferring": ("infer.py --batches 50", 50),
}


@pytest.mark.parametrize("name", SAME)
def test_it_prints_the_same(name: str, device: str, template: Path, tmp_path: Path) -> None:
    command, count = SAME[name]
    own, record = compare([PYTHON, *command.split()], template, tmp_path, Path(PYTHON), bare_runs=1)
    assert own.returncode == 0, own.stderr
    assert record.main is not None
    assert len(record.main.steps if record.main.trains else record.main.loop_steps) == count
    assert not [event for event in record.main.events if event.what == "failed"]
    assert device == "mps" or record.main.loop_steps[-1].peak_device_bytes


def test_a_step_that_is_captured_whole(device: str, template: Path, tmp_path: Path) -> None:
    """What flatout does beside a step must not become part of the program's graph."""
    if device != "cuda":
        pytest.skip("CUDA graphs are CUDA's")
    own, record = compare([PYTHON, "graphs.py"], template, tmp_path, Path(PYTHON), bare_runs=1)
    assert own.returncode == 0, own.stderr
    assert "Traceback" not in own.stderr
    assert record.main is not None
    assert not [event for event in record.main.events if event.what == "failed"]
    printed = own.stdout
    for verb, *options in (("run", "--set", "precision=fp16"), ("doctor", "--steps", "3")):
        done = flatout(verb, *options, "--", PYTHON, "graphs.py", home=tmp_path / "home")
        assert done.returncode == 0, done.stderr
        assert "Traceback" not in done.stderr
        if verb == "run":
            assert [*map(words_only, (done.stdout, printed))] == [words_only(printed)] * 2


@pytest.mark.parametrize("program", ["gpt.py --deterministic --steps 20", "amp.py"])
def test_ranks_print_the_same(program: str, device: str, tmp_path: Path) -> None:
    """With one GPU the ranks share it, and exchange through main memory; with several, each has its
    own, and they exchange by NCCL, RCCL or XCCL."""
    if device == "mps":
        pytest.skip("ranks are for Linux")
    alone = flatout("run", "--", PYTHON, *program.split(), home=tmp_path / "home")
    assert alone.returncode == 0, alone.stderr
    together = flatout(
        "run", "--ranks", "2", "--", PYTHON, *program.split(), home=tmp_path / "home"
    )
    assert together.returncode == 0, together.stderr
    assert "were shared out" in together.stderr, together.stderr
    pairs = zip(numbers_in(together.stdout), numbers_in(alone.stdout), strict=True)
    assert all(found == pytest.approx(own, rel=1e-2) for found, own in pairs)


def numbers_in(text: str) -> list[float]:
    return list(map(float, re.findall(r"-?\d+\.\d+", text)))


def words_only(text: str) -> list[str]:
    """The words of each line: the warm-up runs in half precision, what follows it as captured."""
    return re.findall(r"[a-z]+", text)


def test_workers_fork_in_the_middle_of_a_comparison(tmp_path: Path) -> None:
    command = (PYTHON, "cnn.py", "--epochs", "40", "--workers", "2")
    options = ("--budget", "40s", "--knobs", "precision", "--plan", tmp_path / "plan.toml")
    tuned = flatout("tune", *options, "--", *command, home=tmp_path / "home")
    assert "precision=bf16: " in tuned.stderr, tuned.stderr
    assert "Aborted" not in tuned.stderr


def test_ceilings_are_those_of_the_device(device: str) -> None:
    measured = machine.ceilings(PYTHON).devices
    on_device, on_host = (measured[name]["matmul_flops_per_s"] for name in (device, "cpu"))
    assert on_device["float32"] > on_host["float32"]
    assert measured[device]["memory_bytes_per_s"] > measured["cpu"]["memory_bytes_per_s"]


def test_waiting_for_the_device_is_not_taken_for_python(tmp_path: Path) -> None:
    found = diagnosis("infer.py", tmp_path)
    kinds = [finding["kind"] for finding in found["findings"]]
    assert found["phases_ms"]["other"] > 0.3 * found["step_ms"]  # where the host waits for it
    assert kinds == ["compute-bound-wrong-dtype"]
    assert found["mfu"] > 0.3
    assert found["peak_device_bytes"]


def test_a_program_on_the_host_of_an_accelerator(tmp_path: Path) -> None:
    code = (
        "import torch; m = torch.nn.Linear(2048, 2048)\n"
        "o = torch.optim.SGD(m.parameters(), lr=0.1)\n"
        "for _ in range(400):\n"
        "    m(torch.randn(1024, 2048)).square().mean().backward(); o.step(); o.zero_grad()"
    )
    (tmp_path / "host.py").write_text(code)
    found = diagnosis(str(tmp_path / "host.py"), tmp_path)
    assert found["peak_device_bytes"] is None
    assert found["mfu"] > 0.1  # of the host's rate, not the device's


SETTINGS = {
    "gpt.py --steps 60": (
        *("precision=medium", "precision=safe", "precision=bf16", "precision=fp16"),
        *("attention=flash", "attention=cudnn", "attention=efficient"),
        *("compile=default", "compile=reduce-overhead"),
    ),
    "cnn.py --epochs 3": (
        *("memory_format=channels_last", "cudnn=benchmark", "cuda_allocator=expandable"),
        *("loader=batched", "loader=cache", "loader=prefetch", "loader=workers", "gc=seldom"),
    ),
}


@pytest.mark.parametrize(
    ("program", "setting"),
    [(p, setting) for p, settings in SETTINGS.items() for setting in settings],
)
def test_a_setting_is_applied_and_trains_on(program: str, setting: str, tmp_path: Path) -> None:
    bare = subprocess.run(
        [PYTHON, *program.split()], cwd=PROGRAMS, capture_output=True, text=True, check=True
    )
    done = flatout("run", "--set", setting, "--", PYTHON, *program.split(), home=tmp_path / "home")
    assert done.returncode == 0, done.stderr
    (run,) = (tmp_path / "home/runs").iterdir()
    main = read_run(run).main
    assert main is not None
    knob = setting.partition("=")[0]
    told = [(event.what, event.why) for event in main.events if event.subject == knob]
    assert {what for what, _ in told} <= {"applied", "noticed"}, told
    assert "applied" in {what for what, _ in told}
    own, expected = (last_loss(text) for text in (done.stdout, bare.stdout))
    assert own == pytest.approx(expected, abs=0.25)  # from 1.5 or 5 in the first step


def last_loss(stdout: str) -> float:
    return float(re.findall(r"loss (\S+)", stdout)[-1])


def test_a_plan_is_found_proven_and_applied(tmp_path: Path) -> None:
    plan, home = tmp_path / "plan.toml", tmp_path / "home"
    command = (PYTHON, "infer.py", "--batches", "1000")
    tuned = flatout("tune", "--budget", "90s", "--plan", plan, "--", *command, home=home)
    assert tuned.returncode == 0, tuned.stderr
    assert "proof: passed" in tuned.stderr
    assert plans.read(plan).settings["precision"] == "bf16"
    applied = flatout("run", "--plan", plan, "--", *command, home=home)
    assert applied.returncode == 0, applied.stderr
    assert "counts [" in applied.stdout
    assert "skipped" not in applied.stderr
