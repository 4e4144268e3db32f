"""How ranks end: as the program alone would, or with one sentence where they part."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from tests import side_by_side

TRAIN = """
import os, random, signal, subprocess, time, threading
import numpy
from torch import nn
from flatout.parallel.place import place

torch.manual_seed(0)
here = place()
rank = here.rank if here else 0
model = nn.Linear(4, 3)
optimizer = torch.optim.SGD(model.parameters(), 0.1)

def step(x):
    optimizer.zero_grad()
    loss = model(x).square().mean()
    loss.backward()
    optimizer.step()
    return loss.item()

"""

ENDS = {
    "the last line": ("print(step(torch.randn(7, 4)))", 0),
    "sys.exit": ("print(step(torch.randn(7, 4))); sys.exit(3)", 3),
    "an exception": ("print(step(torch.randn(7, 4))); raise ValueError('no')", 1),
    "os._exit": ("print(step(torch.randn(7, 4)), flush=True); os._exit(4)", 4),
    "a reference at the end": ("sys.kept = model(torch.randn(7, 4)); sys.loop = [sys.kept]", 0),
    "a signal": ("step(torch.randn(7, 4)); os.kill(os.getpid(), signal.SIGTERM)", -15),
    "no call": ("print(1)", 0),
    "a thread": (
        "thread = threading.Thread(target=step, args=(torch.randn(7, 4),)); thread.start();"
        "thread.join(); step(torch.ones(5, 4))",
        0,
    ),
    "an exit in a thread": (
        "step(torch.ones(5, 4)); threading.Thread(target=time.sleep, args=(0.05,)).start()",
        0,
    ),
    "a child of fork": (
        """
print(step(torch.randn(7, 4)), flush=True)
child = os.fork()
value = step(torch.randn(6, 4))
if child:
    print(value, os.waitpid(child, 0)[1], open("of_child").read())
else:
    with open("of_child", "w") as file:
        file.write(str(value))
    print(step(torch.randn(6, 4)))
""",
        0,
    ),
    "a child before the first call": (
        """
child = os.fork()
value = step(torch.randn(6, 4))
if child:
    print(value, os.waitpid(child, 0)[1], open("of_child").read())
else:
    with open("of_child", "w") as file:
        file.write(str(value))
""",
        0,
    ),
    "workers": (
        """
class Data(torch.utils.data.Dataset):
    def __len__(self):
        return 12
    def __getitem__(self, i):
        with torch.no_grad():
            return model(torch.full((2, 4), float(i))).sum() * torch.ones(4)
for x in torch.utils.data.DataLoader(Data(), 5, num_workers=2):
    print(step(x), flush=True)
""",
        0,
    ),
    "spawned workers": (
        """
class Data(torch.utils.data.Dataset):
    def __len__(self):
        return 4
    def __getitem__(self, i):
        with torch.no_grad():
            return nn.Linear(4, 4)(torch.full((2, 4), float(i))).sum() * torch.zeros(4)
if __name__ == "__main__":
    for x in torch.utils.data.DataLoader(
        Data(), 2, num_workers=2, multiprocessing_context="spawn"
    ):
        print(step(x), flush=True)
""",
        0,
    ),
    "two programs": (
        """
print(step(torch.randn(7, 4)), flush=True)
if len(sys.argv) == 1:
    subprocess.run([sys.executable, __file__, "again"], check=True)
    print(step(torch.randn(6, 4)), flush=True)
""",
        0,
    ),
    "a group of its own": (
        """
import torch.distributed as dist
print(step(torch.randn(7, 4)), dist.is_initialized(), flush=True)
dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
x = torch.ones(3)
dist.all_reduce(x)
print(x, step(torch.randn(7, 4)))
dist.destroy_process_group()
""",
        0,
    ),
}


@pytest.mark.parametrize("name", ENDS)
def test_ends_as_alone(name: str, tmp_path: Path) -> None:
    program, status = ENDS[name]
    program = TRAIN + program.strip()
    (alone,) = side_by_side.run(program, 1, tmp_path)
    assert alone.status == status, alone.stderr
    for outcome in side_by_side.run(program, 2, tmp_path):
        assert outcome.status == status, outcome.stderr
        assert _numbers(outcome.stdout) == pytest.approx(_numbers(alone.stdout), rel=1e-9)
        assert _words(outcome.stdout) == _words(alone.stdout)
        assert _words(outcome.stderr) == _words(alone.stderr)


def _numbers(text: str) -> list[float]:
    return [float(number) for number in _NUMBER.findall(text)]


def _words(text: str) -> str:
    return _NUMBER.sub("number", text).replace(_folders(text), "")


def _folders(text: str) -> str:
    found = re.search(r'File "(.*)program.py"', text)
    return found[1] if found else "no folder"


_NUMBER = re.compile(r"\d+\.?\d*(?:e[+-]\d+)?")

PARTINGS = {
    "data": (
        "rng = numpy.random.default_rng()\n"
        "for _ in range(5): step(torch.as_tensor(rng.normal(size=(7, 4))))",
        "in step 1, where rank 0 makes call 1 of Linear: its inputs differ; a likely cause is a",
    ),
    "sizes": (
        "for i in range(5): step(torch.ones(7 + (rank == 1 and i == 2), 4))",
        "in step 3, where rank 0 makes call 3 of Linear: sizes or types of its inputs differ",
    ),
    "order": (
        "other = nn.Linear(4, 2)\nstep(torch.ones(7, 4))\n"
        "(other if rank else model)(torch.ones(7, 4))",
        "in step 2: rank 0 makes call 2 of Linear, rank 1 makes call 1 of Linear; the program",
    ),
    "backward": (
        "out = model(torch.ones(7, 4)).sum()\nif rank: out.backward()\nstep(torch.ones(7, 4))",
        "in step 1: rank 0 makes call 2 of Linear, rank 1 makes a backward call; the program",
    ),
    "generators": (
        "for i in range(5):\n    if rank: random.random()\n    step(torch.ones(7, 4))",
        "in step 1, where rank 0 makes call 1 of Linear: the random generators are in different",
    ),
    "parameters": (
        "for i in range(5):\n    step(torch.ones(7, 4))\n    model.bias.data += 1e-9 * rank",
        "in step 2, where rank 0 makes call 2 of Linear: parameters or optimizer states differ",
    ),
    "an early end": (
        "for i in range(5):\n    step(torch.ones(7, 4))\n    if rank: break",
        "the program has ended on rank 1 and goes on on rank 0",
    ),
    "arguments": ("sys.argv.append(str(rank)); step(torch.ones(7, 4))", "run different programs"),
}


@pytest.mark.parametrize("name", PARTINGS)
def test_ranks_that_part_stop_with_one_sentence(name: str, tmp_path: Path) -> None:
    program, sentence = PARTINGS[name]
    outcomes = side_by_side.run(TRAIN + program + "\nprint('end')", 2, tmp_path)
    first = outcomes[0]
    assert (first.status, first.stdout) == (1, "")
    assert first.stderr.startswith("flatout: ")
    assert first.stderr.count("\n") == 1
    assert sentence in first.stderr
    if name != "an early end":
        assert outcomes[1] == first


def test_a_rank_that_dies_ends_the_others(tmp_path: Path) -> None:
    program = TRAIN + (
        "for i in range(50):\n    step(torch.ones(7, 4))\n"
        "    if rank and i == 20: os.kill(os.getpid(), signal.SIGKILL)"
    )
    first, second = side_by_side.run(program, 2, tmp_path)
    assert second.status == -9
    assert first.status == 1
    assert first.stderr.startswith("flatout: the connection to the other ranks is lost")


def test_what_is_not_supported_is_refused_by_name(tmp_path: Path) -> None:
    program = TRAIN + (
        "x = torch.ones(7, 4)\nout = model(x).sum(0)\n"
        "torch.autograd.grad(out, model.weight, torch.eye(3), is_grads_batched=True)"
    )
    for outcome in side_by_side.run(program, 2, tmp_path):
        assert outcome.status == 1
        assert "inside of vmap" in outcome.stderr


def test_a_failure_of_its_own_stops_the_program(tmp_path: Path) -> None:
    program = TRAIN + (
        "from flatout.parallel import team\n"
        "team.Team.average = int  # which takes no list\nstep(torch.ones(7, 4))\nprint('end')"
    )
    for outcome in side_by_side.run(program, 2, tmp_path):
        assert (outcome.status, outcome.stdout) == (1, "")
        assert outcome.stderr.startswith("flatout: --ranks has failed: TypeError: ")


def test_a_shard_that_raises_in_its_backward_pass_beside_batch_norms(tmp_path: Path) -> None:
    program = (
        TRAIN
        + """
class Raise(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x.clone()
    @staticmethod
    def backward(ctx, gradient):
        x, = ctx.saved_tensors
        if x[0, 0] > 90:
            raise ValueError("a shard begins with a large number")
        return gradient

class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.first = nn.Linear(4, 3)
        self.norm = nn.BatchNorm1d(3)
    def forward(self, x):
        h = self.norm(self.first(x))
        return h if x.shape[1] == 4 and not large else Raise.apply(x[:, :3]) + h

large = False
model = Model()
x = torch.randn(6, 4)
model(x).sum().backward()
large = True
x[3] = 100.0
model(x.requires_grad_()).square().sum().backward()
print("end")
"""
    )
    for outcome in side_by_side.run(program, 2, tmp_path):
        assert (outcome.status, outcome.stdout) == (1, "")
        assert "adds up over all samples" in outcome.stderr


def test_a_program_of_several_processes_is_refused_by_name(tmp_path: Path) -> None:
    program = TRAIN + "os.environ['WORLD_SIZE'] = '2'\nstep(torch.ones(7, 4))"
    for outcome in side_by_side.run(program, 2, tmp_path):
        assert outcome.status == 1
        assert "this one trains in 2 that share out its batches already" in outcome.stderr
