"""Steps and phases of real torch programs, each run unedited, and recorded.

Every program prints what it really did (``json`` on its last line); the record must say the same.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import forking
import pytest

from flatout.launch.environment import job_environment
from flatout.wire.record import ProcessRecord, Step, read_run
from flatout.wire.request import Request

PREAMBLE = """
import json, os, sys
os.environ.setdefault("OMP_NUM_THREADS", "1")
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

torch.manual_seed(0)

class Net(nn.Module):
    def __init__(self, width=16):
        super().__init__()
        self.body = nn.Sequential(nn.Linear(8, width), nn.ReLU(), nn.Linear(width, width))
        self.head = nn.Linear(width, 2)
    def forward(self, x):
        return self.head(self.body(x))

x, y = torch.randn(48, 8), torch.randint(0, 2, (48,))
data = TensorDataset(x, y)
loss_function = nn.CrossEntropyLoss()
losses = []
"""


def run(tmp_path: Path, program: str) -> tuple[dict[str, object], ProcessRecord]:
    """Run a program that is recorded: what it printed last, and the record of its process.

    There is one record, for a worker leaves none.
    """
    script = tmp_path / "program.py"
    script.write_text(PREAMBLE + program)
    run_directory = tmp_path / "run"
    run_directory.mkdir()
    Request().write(run_directory)
    completed = forking.run([sys.executable, script], env=job_environment(run_directory, {}))
    assert completed.returncode == 0, completed.stderr
    (process,) = read_run(run_directory).processes
    assert not [event for event in process.events if event.what == "failed"]
    return json.loads(completed.stdout.splitlines()[-1]), process


def counts(steps: list[Step]) -> list[tuple[int, int, int]]:
    return [(step.forwards, step.backwards, step.updates) for step in steps]


def check_times(process: ProcessRecord) -> None:
    for step in process.steps + process.evaluations:
        assert sum(ms for ms in step.phases_ms.values() if ms is not None) == pytest.approx(
            step.step_ms, abs=1e-4
        )
        assert step.step_ms > 0


TRAINING = {
    "one model, one optimizer": (
        """
net, epochs = Net(), 3
optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
for epoch in range(epochs):
    net.train()
    for a, b in DataLoader(data, batch_size=16, shuffle=True):
        optimizer.zero_grad()
        loss = loss_function(net(a), b)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    net.eval()
    with torch.no_grad():
        for a, b in DataLoader(data, batch_size=24):
            net(a)
print(json.dumps({"losses": losses, "evaluations": 2 * epochs}))
""",
        (1, 1, 1),
    ),
    "evaluation under grad": (
        """
net = Net()
optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
for epoch in range(2):
    net.train()
    for a, b in DataLoader(data, batch_size=16):
        loss = loss_function(net(a), b)
        optimizer.zero_grad(); loss.backward(); optimizer.step()
        losses.append(loss.item())
    net.eval()
    for a, b in DataLoader(data, batch_size=16):
        loss_function(net(a), b)
print(json.dumps({"losses": losses, "evaluations": 6, "grad": True}))
""",
        (1, 1, 1),
    ),
    "two optimizers, three backward calls": (
        """
generator, critic = nn.Sequential(nn.Linear(4, 8), nn.Tanh()), Net()
g = torch.optim.Adam(generator.parameters()); d = torch.optim.Adam(critic.parameters())
for a, b in DataLoader(data, batch_size=8):
    d.zero_grad()
    real = loss_function(critic(a), b); real.backward()
    fake = generator(torch.randn(8, 4))
    false = loss_function(critic(fake.detach()), 1 - b); false.backward()
    d.step()
    g.zero_grad()
    fooled = loss_function(critic(fake), b); fooled.backward()
    g.step()
    losses += [real.item(), false.item(), fooled.item()]
print(json.dumps({"losses": losses, "evaluations": 0}))
""",
        (4, 3, 2),
    ),
    "gradient accumulation": (
        """
net = Net()
optimizer = torch.optim.AdamW(net.parameters())
for epoch in range(2):
    net.train()
    for i, (a, b) in enumerate(DataLoader(data, batch_size=4)):
        loss = loss_function(net(a), b) / 3
        loss.backward()
        losses.append(loss.item())
        if i % 5 == 4 or i == 11:
            optimizer.step(); optimizer.zero_grad()
    net.eval()
    with torch.no_grad():
        for a, b in DataLoader(data, batch_size=24):
            net(a)
print(json.dumps({"losses": losses, "evaluations": 4}))
""",
        [
            *[(5, 5, 1), *[(1, 1, 0)] * 4, (1, 1, 1), (1, 1, 0), (1, 1, 1)],
            *[*[*[(1, 1, 0)] * 4, (1, 1, 1)] * 2, (1, 1, 0), (1, 1, 1)],
        ],
    ),
    "gradient accumulation over batches that are fetched together": (
        """
net = Net()
optimizer = torch.optim.AdamW(net.parameters())
batches = iter(DataLoader(data, batch_size=4))
for cycle in range(3):
    for a, b in [next(batches) for _ in range(4)]:
        loss = loss_function(net(a), b) / 4
        loss.backward()
        losses.append(loss.item())
    optimizer.step(); optimizer.zero_grad()
print(json.dumps({"losses": losses, "evaluations": 0}))
""",
        [(4, 4, 1), *[*[(1, 1, 0)] * 3, (1, 1, 1)] * 2],
    ),
    "gradient accumulation without a loader": (
        """
net = Net()
optimizer = torch.optim.AdamW(net.parameters())
for cycle in range(3):
    for i in range(6):
        loss = loss_function(net(x[8 * i:8 * i + 8]), y[8 * i:8 * i + 8]) / 6
        loss.backward()
        losses.append(loss.item())
    optimizer.step(); optimizer.zero_grad()
print(json.dumps({"losses": losses, "evaluations": 0}))
""",
        [(6, 6, 1), *[*[(1, 1, 0)] * 5, (1, 1, 1)] * 2],
    ),
    "a loss for each of two loaders": (
        """
net = Net()
optimizer = torch.optim.AdamW(net.parameters())
for epoch in range(3):
    for one, other in zip(DataLoader(data, batch_size=16), DataLoader(data, batch_size=8)):
        for a, b in (one, other):
            loss = loss_function(net(a), b)
            loss.backward()
            losses.append(loss.item())
        optimizer.step(); optimizer.zero_grad()
print(json.dumps({"losses": losses, "evaluations": 0}))
""",
        (2, 2, 1),
    ),
    "closure": (
        """
net = Net()
optimizer = torch.optim.LBFGS(net.parameters(), max_iter=3, tolerance_grad=0, tolerance_change=0)
for a, b in DataLoader(data, batch_size=16):
    def closure():
        optimizer.zero_grad()
        loss = loss_function(net(a), b)
        loss.backward()
        losses.append(loss.item())
        return loss
    optimizer.step(closure)
print(json.dumps({"losses": losses, "evaluations": 0}))
""",
        (3, 3, 1),
    ),
    "update by hand": (
        """
net = Net()
for i in range(6):
    a, b = x[i * 8:i * 8 + 8], y[i * 8:i * 8 + 8]
    net.zero_grad()
    loss = loss_function(net(a), b)
    loss.backward()
    for p in net.parameters():
        p.data.add_(p.grad, alpha=-0.1)
    losses.append(loss.item())
print(json.dumps({"losses": losses, "evaluations": 0}))
""",
        (1, 1, 0),
    ),
    "several forward calls, teacher without gradients": (
        """
net, teacher = Net(), Net().eval()
optimizer = torch.optim.RMSprop(net.parameters())
for a, b in DataLoader(data, batch_size=8):
    with torch.no_grad():
        target = teacher(a)
    loss = nn.functional.mse_loss(net(a), target) + nn.functional.mse_loss(net(a + 1), target)
    optimizer.zero_grad(); loss.backward(); optimizer.step()
    losses.append(loss.item())
print(json.dumps({"losses": losses, "evaluations": 0}))
""",
        (3, 1, 1),
    ),
    "modules called one by one": (
        """
encoder, decoder = nn.Linear(8, 4), nn.Linear(4, 8)
optimizer = torch.optim.SGD([*encoder.parameters(), *decoder.parameters()], lr=0.1)
for a, b in DataLoader(data, batch_size=8):
    loss = nn.functional.mse_loss(decoder(torch.tanh(encoder(a))), a)
    optimizer.zero_grad(); loss.backward(); optimizer.step()
    losses.append(loss.item())
print(json.dumps({"losses": losses, "evaluations": 0}))
""",
        (2, 1, 1),
    ),
    "model built late": (
        """
net = Net()
optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
for _ in range(2):
    for a, b in DataLoader(data, batch_size=8):
        loss = loss_function(net(a), b)
        optimizer.zero_grad(); loss.backward(); optimizer.step()
        losses.append(loss.item())
    class Late(Net):
        pass
    net = Late(32)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
print(json.dumps({"losses": losses, "evaluations": 0}))
""",
        (1, 1, 1),
    ),
    "copied model": (
        """
import copy
net = copy.deepcopy(Net())
optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
for a, b in DataLoader(data, batch_size=8):
    loss = loss_function(net(a), b)
    optimizer.zero_grad(); loss.backward(); optimizer.step()
    losses.append(loss.item())
print(json.dumps({"losses": losses, "evaluations": 0}))
""",
        (1, 1, 1),
    ),
    "data parallel wrapper called through": (
        """
import torch.distributed as dist
dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
net = nn.parallel.DistributedDataParallel(Net())
optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
for epoch in range(2):
    net.train()
    for a, b in DataLoader(data, batch_size=16):
        loss = loss_function(net(a), b)
        optimizer.zero_grad(); loss.backward(); optimizer.step()
        losses.append(loss.item())
    net.eval()
    with torch.no_grad():
        for a, b in DataLoader(data, batch_size=16):
            net.module(a)
print(json.dumps({"losses": losses, "evaluations": 6}))
""",
        (1, 1, 1),
    ),
}


LOADER_WORKERS = """
extract = nn.Linear(8, 8)
class Extracted(TensorDataset):
    def __getitem__(self, index):
        a, b = super().__getitem__(index)
        with torch.no_grad():
            return extract(a), b
if __name__ == "__main__":
    net = Net()
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    for a, b in DataLoader(Extracted(x, y), 8, num_workers=2, multiprocessing_context="METHOD"):
        loss = loss_function(net(a), b)
        optimizer.zero_grad(); loss.backward(); optimizer.step()
        losses.append(loss.item())
    print(json.dumps({"losses": losses, "evaluations": 0}))
"""
TRAINING |= {
    f"loader workers by {method}": (LOADER_WORKERS.replace("METHOD", method), (1, 1, 1))
    for method in ("fork", "spawn", "forkserver")
}


@pytest.mark.parametrize("name", TRAINING)
def test_training(name: str, tmp_path: Path) -> None:
    program, expected = TRAINING[name]
    truth, process = run(tmp_path, program)
    check_times(process)
    recorded = [loss for step in process.steps for loss in step.losses]
    assert recorded == truth["losses"]
    of_steps = expected if isinstance(expected, list) else [expected] * len(process.steps)
    assert counts(process.steps) == of_steps
    assert len(process.evaluations) == truth["evaluations"]
    assert all(step.grad == truth.get("grad", False) for step in process.evaluations)
    with_loader = "DataLoader" in program
    for step in process.steps:
        assert (step.phases_ms["data"] is not None) == with_loader
        assert step.phases_ms["transfer"] is None  # no accelerator here: not measured
        assert step.phases_ms["forward"] > 0
        assert step.phases_ms["backward"] > 0
        assert (step.phases_ms["optimizer"] is not None) == (name != "update by hand")


INFERENCE = {
    "loader": "for a, b in DataLoader(data, batch_size=8): net(a)",
    "no loader": "for i in range(6): net(x)",
    "saved and loaded whole": """
import io
buffer = io.BytesIO(); torch.save(net, buffer); buffer.seek(0)
net = torch.load(buffer, weights_only=False)
for i in range(6): net(x)""",
    "scripted": "net = torch.jit.script(net)\nfor i in range(6): net(x)",
}


WITHOUT_GRADIENTS = "with torch.no_grad():"


@pytest.mark.parametrize(
    ("name", "mode"),
    [
        *((name, WITHOUT_GRADIENTS) for name in INFERENCE),
        ("no loader", "with torch.inference_mode():"),
        ("no loader", "if True:"),
        ("loader", "if True:"),
    ],
)
def test_inference_steps_are_root_forwards(name: str, mode: str, tmp_path: Path) -> None:
    body = "\n".join("    " + line for line in INFERENCE[name].splitlines())
    program = f"net = Net().eval()\n{mode}\n{body}\nprint(json.dumps({{}}))"
    _, process = run(tmp_path, program)
    assert not process.trains
    assert counts(process.loop_steps) == [(1, 0, 0)] * 6
    check_times(process)


def test_a_child_that_trains_is_recorded(tmp_path: Path) -> None:
    program = """
import torch.multiprocessing as mp
def train(rank):
    net = Net()
    for i in range(3):
        loss_function(net(x), y).backward()
if __name__ == "__main__":
    mp.spawn(train, nprocs=1)
    mp.start_processes(train, nprocs=1, start_method="fork")
"""
    script = tmp_path / "program.py"
    script.write_text(PREAMBLE + program)
    home = tmp_path / "flatout-home"
    subprocess.run(
        [sys.executable, "-m", "flatout", "run", "--", sys.executable, str(script)],
        env={**os.environ, "FLATOUT_HOME": str(home)},
        timeout=120,
        check=True,
    )
    (run_directory,) = (home / "runs").iterdir()
    *children, parent = read_run(run_directory).processes
    assert [counts(child.steps) for child in children] == [[(1, 1, 0)] * 3] * 2
    assert not parent.loop_steps
