"""Programs with a planted bottleneck: doctor names it, and its share within five points.

Each program times the planted part itself and prints it at every step. Run alone on the machine::

    python -m pytest -m measured benchmarks/test_findings.py -s
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

PLANTED = Path(__file__).with_name("planted")
STEPS = 60
TOLERANCE = 0.05


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the machine's ceilings are kept, so that it is measured once."""
    return tmp_path_factory.mktemp("home")


@pytest.mark.measured
@pytest.mark.parametrize(
    ("program", "kind"),
    [
        ("input_wait", "input-bound"),
        ("optimizer", "unfused-optimizer"),
        ("dropout_attention", "slow-random-numbers"),
        ("python_between", "python-between-steps"),
        ("evaluation_under_grad", "gradient-in-evaluation"),
        ("page_faults", "page-fault-bound"),
        ("recomputed", "recomputation"),
        ("scattered", "scattered-rows"),
        ("packed", "packed-sequences"),
        ("restarted", "workers-restarted"),
    ],
)
def test_the_planted_bottleneck_is_the_first_finding(home: Path, program: str, kind: str) -> None:
    pytest.importorskip("torch")
    script = PLANTED / f"{program}.py"
    document_path = home / f"{program}.json"
    options = ["--in-place", f"--steps={STEPS}", f"--json={document_path}"]
    completed = subprocess.run(
        [sys.executable, "-m", "flatout", "doctor", *options, "--", sys.executable, str(script)],
        env={**os.environ, "FLATOUT_HOME": str(home / "own"), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )
    assert completed.returncode == 0, completed.stderr
    document = json.loads(document_path.read_text())
    # On a machine with bfloat16 units, float32 is a finding of its own in every program.
    found = [one for one in document["findings"] if one["kind"] != "compute-bound-wrong-dtype"]
    first = found[0]
    planted = planted_share(completed.stdout, document["warmup_steps"])
    print(f"\n{program}: planted {planted:.1%}, found {first['share']:.1%} {first['kind']}")
    assert first["kind"] == kind, completed.stdout
    assert first["share"] == pytest.approx(planted, abs=TOLERANCE)


def planted_share(output: str, warmup_steps: int) -> float:
    """The planted part of the timed steps, from what the program printed. Before it prints the last
    of them, the profiler has begun."""
    rows = [line.split()[1:] for line in output.splitlines() if line.startswith("planted ")]
    timed = [(float(part), float(step)) for part, step in rows[warmup_steps : STEPS - 1]]
    assert len(rows) > STEPS
    return sum(part for part, _ in timed) / sum(step for _, step in timed)
