"""What the hooks must leave alone in torch, in a process of their own under ``flatout run``."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

HOLDER = """
import torch
from torch import nn

holder = nn.Module()  # a container without a class of its own
holder.linear = nn.Linear(2, 2)

class Net(nn.Module):  # its class is seen after the container's
    def __init__(self):
        super().__init__()
        self.linear = holder.linear
    def forward(self, x):
        return self.linear(x)

print(tuple(Net()(torch.ones(1, 2)).shape), type(vars(nn.Module)["__call__"]).__name__)
"""


def test_a_plain_module_as_container_does_not_put_a_watch_on_every_module(tmp_path: Path) -> None:
    (tmp_path / "program.py").write_text(HOLDER)
    done = subprocess.run(
        [sys.executable, "-m", "flatout", "run", "--", sys.executable, "program.py"],
        cwd=tmp_path,
        env={**os.environ, "FLATOUT_HOME": str(tmp_path / "flatout-home"), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout == "(1, 2) function\n"


RETRACE = """
import torch.fx as fx
from torch import nn

class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner = fx.symbolic_trace(nn.Sequential(nn.Linear(8, 4), nn.ReLU()))
    def forward(self, x):
        return self.inner(x)

class Tracer(fx.Tracer):
    def is_leaf_module(self, module, name):
        return isinstance(module, fx.GraphModule) or super().is_leaf_module(module, name)

print([(node.op, str(node.target)) for node in Tracer().trace(Net()).nodes])
"""


def test_a_traced_graph_is_traced_again_as_bare(tmp_path: Path) -> None:
    (tmp_path / "program.py").write_text(RETRACE)
    bare = [sys.executable, "program.py"]
    outputs = [
        subprocess.run(
            command,
            cwd=tmp_path,
            env={**os.environ, "FLATOUT_HOME": str(tmp_path / "flatout-home")},
            capture_output=True,
            text=True,
            timeout=120,
            check=True,
        ).stdout
        for command in (bare, [sys.executable, "-m", "flatout", "run", "--", *bare])
    ]
    assert outputs[0] == outputs[1]
    assert "call_module" in outputs[0]
