"""What every setting of every knob promises, on one real program each: exactness, checkpoints."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from flatout import knobs
from flatout.knobs import kernels
from flatout.wire.record import read_run
from flatout.wire.request import RUN_VARIABLE, Request

STEPS = 20

PROGRAM = """
import sys
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Conv2d(3, 16, 3, padding=1), nn.Conv2d(16, 16, 3, padding=1)
        self.norm, self.drop = nn.BatchNorm2d(16), nn.Dropout(0.1)
        self.qkv, self.head = nn.Linear(16, 48), nn.Linear(16, 10)

    def forward(self, x):
        x = F.relu(self.norm(self.first(x)))
        x = F.max_pool2d(F.relu(self.second(x)), 2)
        tokens = x.flatten(2).transpose(1, 2)
        q, k, v = self.qkv(tokens).view(len(x), -1, 3, 2, 8).permute(2, 0, 3, 1, 4)
        tokens = tokens + F.scaled_dot_product_attention(
            q, k, v, dropout_p=0.1 if self.training else 0.0
        ).transpose(1, 2).flatten(2)
        return self.head(self.drop(tokens.mean(1)))

torch.manual_seed(0)
x = torch.randn(128, 3, 8, 8)
y = (x.mean((2, 3)) @ torch.randn(3, 10)).argmax(1)
net = Net()
optimizer = torch.optim.AdamW(net.parameters(), lr=0.003)
if sys.argv[2]:
    saved = torch.load(sys.argv[2])
    net.load_state_dict(saved["net"])
    optimizer.load_state_dict(saved["optimizer"])
    torch.set_rng_state(saved["rng"])
losses, step = [], 0
while step < STEPS:
    for images, labels in DataLoader(TensorDataset(x, y), batch_size=32, shuffle=True):
        loss = F.cross_entropy(net(images), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
        step += 1
net.eval()
with torch.no_grad():
    losses.append(F.cross_entropy(net(x), y).item())
torch.save(
    {
        "net": net.state_dict(),
        "optimizer": optimizer.state_dict(),
        "rng": torch.get_rng_state(),
        "losses": losses,
    },
    sys.argv[1],
)
""".replace("STEPS", str(STEPS))

ELSEWHERE = {"flash", "cudnn", "efficient", "reduce-overhead"}
"""Settings for CUDA of knobs that are for the CPU as well."""

TESTED_ALONE = {"regional", "dynamic", "max-autotune"}
"""Compiling takes long: one way of it is enough here."""

ALL = [
    (name, setting)
    for name, knob in knobs.registry().items()
    for setting in knob.settings
    if "cpu" in knob.platforms and setting not in ELSEWHERE | TESTED_ALONE
]


def train(
    folder: Path, settings: dict[str, str], resumed: Path | None = None
) -> tuple[dict[str, Any], list[str]]:
    """What the program saves, and the knobs that did not apply."""
    folder.mkdir()
    request = Request(settings=settings)
    request.write(folder)
    script = folder / "program.py"
    script.write_text(PROGRAM)
    hook = Path(knobs.__file__).parents[1] / "launch" / "hook"
    environment = {**os.environ, RUN_VARIABLE: str(folder)}
    if "threads" in settings:
        environment.pop("OMP_NUM_THREADS", None)
    else:
        environment["OMP_NUM_THREADS"] = "1"
    environment |= knobs.prepare(request, environment)
    environment["PYTHONPATH"] = os.pathsep.join(
        [str(hook), *filter(None, [os.environ.get("PYTHONPATH")])]
    )
    completed = subprocess.run(
        [sys.executable, str(script), str(folder / "saved.pt"), str(resumed or "")],
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert completed.returncode == 0, completed.stderr
    process = read_run(folder).main
    assert process is not None
    failed = [event for event in process.events if event.what == "failed"]
    assert not failed, failed[0].traceback
    assert len(process.steps) == STEPS
    skipped = [event.subject for event in process.events if event.what == "skipped"]
    return torch.load(folder / "saved.pt"), skipped


@pytest.fixture(scope="module")
def bare(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder with what bare saves, and in ``continued`` what it saves when it goes on."""
    folder = tmp_path_factory.mktemp("bare")
    train(folder / "first", {})
    train(folder / "continued", {}, folder / "first" / "saved.pt")
    return folder


def layout(state: Any) -> Any:
    """Keys, dtypes and shapes of what was saved; numbers have none."""
    if isinstance(state, dict):
        return {key: layout(value) for key, value in state.items()}
    if isinstance(state, (list, tuple)):
        return [layout(value) for value in state]
    if isinstance(state, torch.Tensor):
        return state.dtype, tuple(state.shape)
    return None if isinstance(state, float) else state


@pytest.mark.parametrize(("name", "setting"), ALL)
def test_a_setting_keeps_its_promises(tmp_path: Path, bare: Path, name: str, setting: str) -> None:
    if knobs.get(name).kernels and kernels.find_compiler() is None:
        pytest.skip("there is no compiler")
    of_bare = torch.load(bare / "continued" / "saved.pt")
    of_knob, skipped = train(tmp_path / "knob", {name: setting}, bare / "first" / "saved.pt")
    if name in skipped:
        pytest.skip(f"{name}={setting} does not apply here")
    assert layout(of_knob) == layout(of_bare)
    if knobs.is_bitwise(name, setting):
        assert of_knob["losses"] == of_bare["losses"]
        assert torch.equal(of_knob["rng"], of_bare["rng"])
        for key, weights in of_bare["net"].items():
            assert torch.equal(of_knob["net"][key], weights), key
    assert of_knob["losses"][-1] == pytest.approx(of_bare["losses"][-1], abs=0.25)

    bare_goes_on, _ = train(tmp_path / "bare", {}, tmp_path / "knob" / "saved.pt")
    assert layout(bare_goes_on) == layout(of_bare)
    assert bare_goes_on["losses"][-1] < of_knob["losses"][0]
