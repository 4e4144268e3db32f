"""A plan holds where it was proven: elsewhere only its bitwise settings apply, and it is said."""

from __future__ import annotations

import dataclasses
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from flatout import machine
from flatout.launch import environment
from flatout.plan import Evidence, Plan
from flatout.plan.program import Program, observe_program
from flatout.wire import signature
from flatout.wire.record import read_run
from flatout.wire.request import Request

PROGRAM = """
import gc
from pathlib import Path
import torch
from torch import nn
torch.manual_seed(0)
class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(8, 64), nn.Tanh(), nn.Linear(64, 1))
    def forward(self, x):
        global autocast
        autocast = torch.is_autocast_enabled("cpu")
        return self.layers(x)
net = Net()
batch = int(Path(__file__).with_name("batch").read_text())
optimizer = torch.optim.AdamW(net.parameters(), lr=0.01)
for number in range(10):
    loss = net(torch.randn(batch, 8)).square().mean()
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    print(loss.item())
print("bfloat16" if autocast else "float32", gc.get_threshold()[0])
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
    command = (sys.executable, str(program))
    return Plan(
        settings=SETTINGS,
        command=command,
        program=observe_program(command),
        inputs=("float32[16,8]",),
        machine={**machine.fingerprint(), "torch": torch.__version__},
        evidence=EVIDENCE,
    )


def run(made: Plan, program: Path, *options: str, batch: int = 16) -> tuple[str, str]:
    """The last line on stdout, and stderr."""
    path = program.with_name("flatout.toml")
    made.write(path)
    program.with_name("batch").write_text(str(batch))
    completed = subprocess.run(
        [
            *(sys.executable, "-m", "flatout", "run", "--plan", str(path), *options, "--"),
            *(sys.executable, str(program)),
        ],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert completed.returncode == 0, completed.stderr
    return completed.stdout.splitlines()[-1], completed.stderr


WHOLE, BITWISE = "bfloat16 50000", "float32 50000"


def test_where_it_was_proven_all_of_it_applies(program: Path) -> None:
    last, said = run(proven(program), program)
    assert last == WHOLE
    assert len(said.splitlines()) == 1


CHANGES = {
    "machine": ({"machine": {"cpu": "Z80"}}, "cpu was Z80, is "),
    "program": (
        {"program": Program({"program.py": {"bytes": "0"}, "net.py": {"bytes": "0"}})},
        "net.py is gone",
    ),
    "arguments": (
        {"program": Program(arguments=("python", "program.py", "--lr", "1"))},
        "--lr 1 is not given",
    ),
    "modules": ({"program": Program()}, "proven without program.py, which is imported now"),
    "an older plan": ({"program": None}, "does not say which files its program was made of"),
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
    if change in ("program", "shape"):  # which show before the start, and only afterwards
        assert run(changed, program, "--trust")[0] == WHOLE
        assert run(changed, program, "--set", "precision=bf16")[0] == WHOLE


def test_a_changed_module_of_an_unchanged_script(program: Path) -> None:
    """What a run has recorded of itself is its program; comments in it may change."""
    net = program.with_name("net.py")
    net.write_text("def scale(x):\n    return x\n")
    program.write_text(PROGRAM.replace("import torch\n", "import torch\nimport net as own\n", 1))
    directory = program.with_name("record")
    program.with_name("batch").write_text("16")
    command = (sys.executable, str(program))
    directory.mkdir()
    Request().write(directory)
    subprocess.run(command, env=environment.job_environment(directory, {}), check=True)
    record = read_run(directory)
    assert record.imported_files == {str(program), str(net)}
    made = dataclasses.replace(
        proven(program), program=observe_program(command, record.imported_files)
    )
    net.write_text("def scale(x):\n    # as it is\n    return x\n")
    last, said = run(made, program)
    assert (last, len(said.splitlines())) == (WHOLE, 1)
    net.write_text("def scale(x):\n    return 2 * x\n")
    last, said = run(made, program)
    assert last == BITWISE
    assert said.splitlines()[0] == (
        "flatout: precision left out, proven under other conditions: net.py: scale has changed. "
        "'flatout verify' proves the plan again, 'flatout tune' finds another, and --trust applies "
        "it as it is"
    )


def test_a_longer_run_is_the_same_program_and_named(program: Path) -> None:
    made = proven(program)
    words = (*made.command, "--epochs", "3")
    longer = dataclasses.replace(made, command=words, program=observe_program(words))
    last, said = run(longer, program)
    assert last == WHOLE
    assert said.splitlines()[0] == (
        "flatout: precision proven with another length or seed: --epochs 3 is not given"
    )


def test_a_size_that_varied_in_the_proof_may_vary(program: Path) -> None:
    varying = dataclasses.replace(proven(program), inputs=("float32[*,8]",))
    assert run(varying, program, batch=5)[0] == WHOLE
    assert run(proven(program), program, batch=5)[0] == BITWISE


def test_a_plan_by_hand_applies_as_it_stands(program: Path) -> None:
    assert run(Plan(settings=SETTINGS), program)[0] == WHOLE
    edited = dataclasses.replace(proven(program), settings={"precision": "bf16"})
    last, said = run(edited, program)
    assert last.startswith("bfloat16 ")
    assert "differs from its proof" in said


def test_a_knob_that_does_not_apply_is_named(program: Path) -> None:
    program.write_text("import gc\ngc.disable()\n" + PROGRAM)
    last, said = run(Plan(settings=SETTINGS), program)
    assert last.startswith("bfloat16 ")
    assert said.splitlines()[0] == (
        "flatout: gc=seldom not applied: the program configures garbage collection itself"
    )


def test_signatures() -> None:
    assert signature.merge(("float32[8,3]",), ("float32[8,5]",)) == ("float32[8,*]",)
    assert signature.merge(("float32[8,3]",), ("int64[8,3]",)) is None
    assert signature.merge(("float32[8]",), ("float32[8,3]",)) is None
    assert signature.merge(("float32[]",), ("float32[]",)) == ("float32[]",)
    assert signature.matches(("float32[*,3]", "int64[]"), ("float32[9,3]", "int64[]"))
    assert not signature.matches(("float32[*,3]",), ("float32[9,4]",))
    assert not signature.matches(("float32[9,3]",), ("float32[*,3]",))
