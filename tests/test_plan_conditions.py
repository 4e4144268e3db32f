"""A plan holds where it was proven: elsewhere only its bitwise settings apply, and it is said."""

from __future__ import annotations

import dataclasses
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from flatout import machine, plan, signature
from flatout.plan import Evidence, Plan

PROGRAM = """
import sys, gc
import torch
from torch import nn
torch.manual_seed(0)
net = nn.Sequential(nn.Linear(8, 64), nn.Tanh(), nn.Linear(64, 1))
dtypes = set()
net[0].register_forward_hook(lambda module, inputs, output: dtypes.add(str(output.dtype)))
optimizer = torch.optim.AdamW(net.parameters(), lr=0.01)
for number in range(10):
    loss = net(torch.randn(int(sys.argv[1]), 8)).square().mean()
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    print(loss.item())
print(*dtypes, gc.get_threshold()[0])
"""

SETTINGS = {"precision": "bf16", "gc": "seldom"}

EVIDENCE = Evidence(
    settings=SETTINGS,
    ratio=1.6,
    ratio_low=1.5,
    ratio_high=1.7,
    pairs=4,
    bare_step_ms=1.6,
    plan_step_ms=1.0,
    steps=60,
    seeds=4,
    bare_repeats=True,
    verdict="non-inferior",
)


@pytest.fixture
def program(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("FLATOUT_HOME", str(tmp_path / "home"))
    script = tmp_path / "program.py"
    script.write_text(PROGRAM)
    return script


def proven(program: Path) -> Plan:
    """A plan whose proof is for this machine, torch, program and inputs."""
    command = (sys.executable, str(program), "16")
    return Plan(
        settings=SETTINGS,
        command=command,
        program_sha256=plan.program_sha256(command),
        inputs=("float32[16,8]",),
        machine={**machine.fingerprint(), "torch": torch.__version__},
        evidence=EVIDENCE,
    )


def run(made: Plan, program: Path, *options: str, batch: int = 16) -> tuple[str, str]:
    """The last line on stdout, and stderr."""
    path = program.with_name("flatout.toml")
    made.write(path)
    completed = subprocess.run(
        [
            *(sys.executable, "-m", "flatout", "run", "--plan", str(path), *options, "--"),
            *(sys.executable, str(program), str(batch)),
        ],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert completed.returncode == 0, completed.stderr
    return completed.stdout.splitlines()[-1], completed.stderr


WHOLE, BITWISE = "torch.bfloat16 50000", "torch.float32 50000"


def test_where_it_was_proven_all_of_it_applies(program: Path) -> None:
    last, said = run(proven(program), program)
    assert last == WHOLE
    assert len(said.splitlines()) == 1


CHANGES = {
    "machine": ({"machine": {"cpu": "Z80"}}, "cpu was Z80, is "),
    "program": ({"program_sha256": "0" * 64}, "the program's file has changed"),
    "torch": ({"machine": {"torch": "2.9.0"}}, "proven with torch 2.9.0, this is "),
    "shape": (
        {"inputs": ("float32[32,8]",)},
        "proven with inputs float32[32,8], these are float32[16,8]",
    ),
    "number of inputs": ({"inputs": ("float32[16,8]", "int64[16]")}, "these are float32[16,8]"),
}


@pytest.mark.parametrize("change", CHANGES)
def test_elsewhere_only_what_is_bitwise_applies(program: Path, change: str) -> None:
    fields, message = CHANGES[change]
    base = proven(program)
    machine_facts = {**base.machine, **fields.get("machine", {})}  # type: ignore[dict-item]
    changed = dataclasses.replace(base, **{**fields, "machine": machine_facts})  # type: ignore[arg-type]
    last, said = run(changed, program)
    assert last == BITWISE
    assert message in said
    assert "precision" in said.splitlines()[0]
    assert run(changed, program, "--trust")[0] == WHOLE
    assert run(changed, program, "--set", "precision=bf16")[0] == WHOLE


def test_a_size_that_varied_in_the_proof_may_vary(program: Path) -> None:
    varying = dataclasses.replace(proven(program), inputs=("float32[*,8]",))
    assert run(varying, program, batch=5)[0] == WHOLE
    assert run(proven(program), program, batch=5)[0] == BITWISE


def test_a_plan_by_hand_applies_as_it_stands(program: Path) -> None:
    assert run(Plan(settings=SETTINGS), program)[0] == WHOLE
    edited = dataclasses.replace(proven(program), settings={"precision": "bf16"})
    last, said = run(edited, program)
    assert last.startswith("torch.bfloat16 ")
    assert "is not what was proven" in said


def test_a_knob_that_does_not_apply_is_named(program: Path) -> None:
    program.write_text("import gc\ngc.disable()\n" + PROGRAM)
    last, said = run(Plan(settings=SETTINGS), program)
    assert last.startswith("torch.bfloat16 ")
    assert said.splitlines()[0] == (
        "flatout: gc=seldom not applied: the program has decided on garbage collection itself"
    )


def test_signatures() -> None:
    assert signature.merged(("float32[8,3]",), ("float32[8,5]",)) == ("float32[8,*]",)
    assert signature.merged(("float32[8,3]",), ("int64[8,3]",)) is None
    assert signature.merged(("float32[8]",), ("float32[8,3]",)) is None
    assert signature.merged(("float32[]",), ("float32[]",)) == ("float32[]",)
    assert signature.matches(("float32[*,3]", "int64[]"), ("float32[9,3]", "int64[]"))
    assert not signature.matches(("float32[*,3]",), ("float32[9,4]",))
    assert not signature.matches(("float32[9,3]",), ("float32[*,3]",))
