"""Programs on an accelerator that share out their calls. It is main memory by another name, so what
is tested is all but the accelerator's own kernels and NCCL."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

from tests import side_by_side

pytestmark = [
    pytest.mark.ranks,
    pytest.mark.skipif(shutil.which("g++") is None, reason="there is no C++ compiler"),
]

BEGIN = """
import os, torch, torch.nn as nn, torch.nn.functional as F
from flatout import agent
from tests.ranks import pretend
pretend.register(LIBRARY)
torch.manual_seed(0)
torch.set_default_dtype(torch.float64)
shown = []
def show(*values):
    shown.append(" ".join(f"{float(value):.10f}" for value in values))
def finish():
    parallel = agent._session._parallel
    shared = sum(parallel._sharing.shared.values()) if parallel else 0
    print("\\n".join(shown), "shared", bool(shared), sep="\\n")
    if parallel and parallel._sharing.whole:
        print(*parallel._sharing.whole)
"""

GROUPS = """
import datetime
from flatout.parallel import devices, overlapping
begun = []
class Group:
    # As NCCL's, over gloo.
    class Options: pass
    def __init__(self, store, rank, size, options):
        gloo = torch.distributed.ProcessGroupGloo
        self.gloo = gloo(store, rank, size, datetime.timedelta(minutes=1))
    def allreduce(self, tensors):
        self.check(tensors)
        own = [tensor.cpu() for tensor in tensors]
        self.gloo.allreduce(own).wait()
        for tensor, found in zip(tensors, own): tensor.copy_(found)
        return self
    def _allgather_base(self, rows, own):
        self.check([rows, own])
        found = rows.cpu()
        self.gloo._allgather_base(found, own.cpu()).wait()
        rows.copy_(found)
        return self
    def check(self, tensors):
        assert all(tensor.device.type == "pretend" for tensor in tensors)
    def wait(self): pass
    def shutdown(self): self.gloo.shutdown()
devices._group_class = lambda type_: Group
begin = overlapping.Overlap._begin
def begin_noted(overlap):
    begun.append(overlap)
    begin(overlap)
overlapping.Overlap._begin = begin_noted
"""

TRAIN = """
model.to("pretend")
optimizer = torch.optim.AdamW(model.parameters(), 1e-3)
for step in range(6):
    given = [x.to("pretend") for x in draw()]
    optimizer.zero_grad()
    loss = compute(*given)
    loss.backward()
    optimizer.step()
    show(loss, sum(p.grad.abs().sum() for p in model.parameters() if p.grad is not None))
show(*(buffer.double().sum() for buffer in model.buffers()))
show(torch.rand(()))
finish()
"""

PROGRAMS = {
    "convolutions, batch norm and dropout": """
model = nn.Sequential(
    *(nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6), nn.ReLU(), nn.Dropout(0.3), nn.Conv2d(6, 6, 3)),
    *(nn.BatchNorm2d(6), nn.Dropout2d(0.2), nn.Flatten(), nn.Linear(96, 5)),
)
def draw(): return torch.randn(9, 3, 8, 8), torch.randint(5, (9,))
def compute(x, y): return F.cross_entropy(model(x), y)
""",
    "a loss inside of the module": """
class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(6, 20), nn.Tanh(), nn.Dropout(0.2), nn.Linear(20, 4))
    def forward(self, x, y):
        found = self.layers(x)
        return F.cross_entropy(found, y, ignore_index=0) + found.square().mean(), found
model = Model()
def draw(): return torch.randn(10, 6), torch.randint(4, (10,))
def compute(x, y): return model(x, y)[0]
""",
    "attention, and noise of its own": """
class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(20, 8)
        self.layer = nn.TransformerEncoderLayer(8, 2, 16, 0.0, batch_first=True)
        self.head = nn.Linear(8, 20)
    def forward(self, x):
        h = self.embedding(x)
        return self.head(self.layer(h + 0.1 * torch.randn_like(h)))
model = Model()
def draw(): return torch.randint(20, (6, 7)), torch.randint(20, (6, 7))
def compute(x, y): return F.cross_entropy(model(x).flatten(0, 1), y.flatten())
""",
    "a generator and a discriminator": """
class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.make = nn.Sequential(nn.Linear(4, 12), nn.ReLU(), nn.Linear(12, 6))
        self.judge = nn.Sequential(nn.Linear(6, 12), nn.ReLU(), nn.Linear(12, 1))
model = Model()
def draw(): return (torch.randn(8, 4),)
def compute(z):
    fake = model.make(z)
    return F.softplus(-model.judge(fake)).mean().sqrt() + fake.abs().mean()
""",
}

WHOLE = {
    "attention that drops": """
class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.MultiheadAttention(8, 2, 0.3, batch_first=True)
    def forward(self, x):
        return self.layer(x, x, x, need_weights=False)[0]
model = Model()
def draw(): return (torch.randn(6, 7, 8),)
def compute(x): return model(x).square().mean()
""",
    "a batch-wise softmax": """
class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(8, 8)
    def forward(self, x):
        return self.layer(x).softmax(0)
model = Model()
def draw(): return (torch.randn(6, 8),)
def compute(x): return model(x).square().mean()
""",
}


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from torch.utils import cpp_extension

    built = tmp_path_factory.mktemp("pretend") / "libpretend.so"
    source = Path(__file__).with_name("ranks") / "pretend.cpp"
    folders = cpp_extension.library_paths()
    subprocess.run(
        [
            *("g++", "-std=c++20", "-O1", "-fPIC", "-shared", str(source), "-o", str(built)),
            *(f"-I{folder}" for folder in cpp_extension.include_paths()),
            *(f"-L{folder}" for folder in folders),
            *("-ltorch", "-ltorch_cpu", "-lc10"),
        ],
        check=True,
    )
    return built


def lines(outcome: side_by_side.Outcome) -> list[str]:
    assert outcome.status == 0, outcome.stderr
    return [line for line in outcome.stdout.splitlines() if "[Gloo]" not in line]


def numbers(shown: list[str]) -> list[float]:
    return [float(number) for line in shown for number in line.split()]


@pytest.mark.parametrize("groups", ["", GROUPS], ids=["one_device", "own_devices"])
@pytest.mark.parametrize("name", PROGRAMS)
def test_losses_are_those_of_one_process(
    name: str, groups: str, library: Path, tmp_path: Path
) -> None:
    program = f"LIBRARY = {str(library)!r}\n{BEGIN}{PROGRAMS[name]}{TRAIN}"
    (alone,) = side_by_side.run(program, 1, tmp_path)
    expected = lines(alone)[:-2]
    says = "print(bool(begun))" if groups else ""
    for size in (2, 3):
        for outcome in side_by_side.run(f"{groups}{program}{says}", size, tmp_path):
            found = lines(outcome)
            assert numbers(found[: len(expected)]) == pytest.approx(numbers(expected), rel=1e-8)
            assert found[len(expected) :] == ["shared", "True"] + ["True"] * bool(groups)


@pytest.mark.parametrize("name", WHOLE)
def test_what_cannot_be_shared_out(name: str, library: Path, tmp_path: Path) -> None:
    program = f"LIBRARY = {str(library)!r}\n{BEGIN}{WHOLE[name]}{TRAIN}"
    (alone,) = side_by_side.run(program, 1, tmp_path)
    for outcome in side_by_side.run(program, 2, tmp_path):
        found = lines(outcome)
        assert numbers(found[:-3]) == pytest.approx(numbers(lines(alone)[:-2]), rel=1e-8)
        assert found[-2] == "False"
