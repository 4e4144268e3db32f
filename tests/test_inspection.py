"""What the agent records for a proof: the program's own gradients, outputs and weights."""

from __future__ import annotations

import json
import os
import random
import sys
from pathlib import Path
from typing import Any

import forking
import pytest
import torch

from flatout.wire.record import ProcessRecord, read_run
from flatout.wire.request import RUN_VARIABLE, Inspection, Request

BEGIN = """
import json
import torch
from flatout.agent import activate
activate()
from torch import nn
torch.set_num_threads(1)
shown = []
def show(name, value):
    shown.append([name, value])
"""

END = """
print(json.dumps(shown))
"""

TRAINING = """
class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(nn.Linear(6, 40), nn.BatchNorm1d(40), nn.ReLU(), nn.Dropout(0.3))
        self.head = nn.Linear(40, 3)
    def forward(self, x, y=None):
        logits = self.head(self.body(x))
        loss = None if y is None else nn.functional.cross_entropy(logits, y)
        return {"loss": loss, "logits": logits}
net = Net()
optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
for step in range(6):
    for _ in range(2):  # gradients are accumulated
        x, y = torch.randn(16, 6), torch.randint(3, (16,))
        loss = net(x, y)["loss"] / 2
        loss.backward()
        show("loss", loss.item())
    show("norms", [p.grad.norm().item() for p in net.parameters()])
    show("first", net.head.weight.grad.flatten().tolist())
    nn.utils.clip_grad_norm_(net.parameters(), 1e-3)
    optimizer.step()
    optimizer.zero_grad()
    if step % 3 == 2:
        net.eval()
        with torch.no_grad():
            out = net(x, y)
        show("evaluated", [out["loss"].item(), out["logits"].mean().item()])
        net.train()
show("running", net.body[1].running_mean.mean().item())
show("weights", sum(p.double().sum().item() for p in net.parameters()))
"""

ALL = Inspection(gradient_steps=3, state=True, outputs=2)


def run(
    folder: Path, program: str, request: Request | None
) -> tuple[list[tuple[str, Any]], ProcessRecord | None]:
    """What the program showed, and what was recorded; ``None``: without flatout."""
    folder.mkdir()
    environment = {**os.environ, "OMP_NUM_THREADS": "1", RUN_VARIABLE: str(folder)}
    begin = BEGIN
    if request is None:
        begin = BEGIN.replace("\nactivate()\n", "\ntorch.manual_seed(3)\n")
    else:
        request.write(folder)
    script = folder / "program.py"
    script.write_text(begin + program + END)
    completed = forking.run([sys.executable, script], env=environment)
    assert completed.returncode == 0, completed.stderr
    assert completed.stderr == ""
    shown = [(name, value) for name, value in json.loads(completed.stdout.splitlines()[-1])]
    return shown, None if request is None else read_run(folder).main


def inspected(
    folder: Path, program: str, inspection: Inspection = ALL, **request: Any
) -> tuple[list[tuple[str, Any]], ProcessRecord]:
    shown, process = run(folder, program, Request(inspection=inspection, **request))
    assert process is not None
    return shown, process


def values(shown: list[tuple[str, Any]], name: str) -> list[Any]:
    return [value for other, value in shown if other == name]


def test_training_is_seen_as_it_is_and_left_as_it_is(tmp_path: Path) -> None:
    bare, _ = run(tmp_path / "bare", TRAINING, None)
    shown, process = inspected(tmp_path / "run", TRAINING, seed=3)
    assert shown == bare, "the inspection has changed the program"
    assert [event for event in process.events if event.what == "failed"] == []

    # accumulated over both backward calls, and not clipped
    names = [f"body.{n}" for n in ("0.weight", "0.bias", "1.weight", "1.bias")]
    names = [f"Net.{name}" for name in (*names, "head.weight", "head.bias")]
    assert list(process.gradients) == names
    for update, norms in enumerate(values(shown, "norms")[:3]):
        recorded = [process.gradients[name][update] for name in names]
        assert [gradient.norm for gradient in recorded] == pytest.approx(norms, rel=1e-5)
    assert {len(gradients) for gradients in process.gradients.values()} == {3}
    head = process.gradients["Net.head.weight"][0]
    assert head.elements == 120
    assert head.sample is not None
    assert head.sample.tolist() == pytest.approx(values(shown, "first")[0], rel=1e-6)

    loss, logits = process.outputs[0].tensors
    assert len(process.outputs) == 2
    assert (loss.shape, logits.shape) == ((), (16, 3))
    assert [loss.mean, logits.mean] == pytest.approx(values(shown, "evaluated")[0], rel=1e-5)

    assert process.state is not None
    (root,) = process.state
    assert (root.root, root.non_finite) == ("Net", 0)
    assert [buffer.name for buffer in root.buffers] == ["body.1.running_mean", "body.1.running_var"]
    assert root.buffers[0].mean == pytest.approx(values(shown, "running")[0], rel=1e-5)

    _, again = inspected(tmp_path / "again", TRAINING, seed=3)
    assert again.state == process.state
    assert again.outputs == process.outputs


DISCRIMINATOR = """
net = nn.Sequential(nn.Linear(4, 1), nn.Sigmoid())
logits = nn.Linear(4, 1)
optimizer = torch.optim.SGD([*net.parameters(), *logits.parameters()], lr=0.0)
with torch.no_grad():
    net[0].weight.fill_(1.0)
    net[0].bias.zero_()
for step in range(6):
    x = torch.tensor([[0.0, 0, 0, 0], [0, 0, 0, 8], [9, 9, 9, 9], [-9, -9, -9, -9]])
    loss = net(x).mean() + logits(x).mean()
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
"""


def test_probabilities_are_told_from_other_outputs_and_those_that_are_1_counted(
    tmp_path: Path,
) -> None:
    # Of two a pass, one is not rounded to 1 in the first one, which is in float32.
    for settings, ones in (({}, 6), ({"precision": "bf16"}, 11)):
        _, process = inspected(tmp_path / str(ones), DISCRIMINATOR, settings=settings)
        assert process.state is not None
        found = {
            root.root: (root.probability_count, root.saturated_count) for root in process.state
        }
        assert found == {"Sequential": (24, ones), "Linear": (0, 0)}


TWO_OPTIMIZERS = """
class D(nn.Linear): pass
class G(nn.Linear): pass
d, g = D(4, 1), G(2, 4)
ds, gs = torch.optim.Adam(d.parameters()), torch.optim.Adam(g.parameters())
line = nn.Linear(3, 1)
search = torch.optim.LBFGS(line.parameters())
table = nn.Parameter(torch.randn(5))
rest = torch.optim.SGD([table], lr=0.1)
words = nn.Embedding(50, 4, sparse=True)
sparse = torch.optim.SGD(words.parameters(), lr=0.1)
for step in range(5):
    ds.zero_grad()
    (d(torch.randn(8, 4)) - 1).square().mean().backward()
    d(g(torch.randn(8, 2)).detach()).square().mean().backward()
    show("d", d.weight.grad.norm().item())
    ds.step()
    gs.zero_grad()
    (d(g(torch.randn(8, 2))) - 1).square().mean().backward()
    show("g", g.weight.grad.norm().item())
    gs.step()
# by a closure
x = torch.randn(8, 3)
def closure():
    search.zero_grad()
    loss = (line(x) - 1).square().mean()
    loss.backward()
    if len(norms) < 1:
        norms.append(line.weight.grad.norm().item())
    return loss
for _ in range(3):
    norms = []
    search.step(closure)
    show("line", norms[0])
# in the middle of backward, of a parameter that is in no module
def update(parameter):
    show("table", parameter.grad.norm().item())
    rest.step()
    rest.zero_grad()
table.register_post_accumulate_grad_hook(update)
for _ in range(3):
    table.square().sum().backward()
# sparse
for _ in range(3):
    sparse.zero_grad()
    words(torch.tensor([3, 3, 7])).square().sum().backward()
    show("words", words.weight.grad.to_dense().norm().item())
    sparse.step()
"""

BY_HAND = """
net = nn.Linear(4, 1)
for _ in range(5):
    net(torch.randn(8, 4)).square().mean().backward()
    show("net", net.weight.grad.norm().item())
    with torch.no_grad():
        for p in net.parameters():
            p -= 0.1 * p.grad
            p.grad = None
"""

PLACES = {
    "d": "D.weight",
    "g": "G.weight",
    "line": "Linear.weight",
    "table": "parameter 1 in no module",
    "words": "Embedding.weight",
    "net": "Linear.weight",
}


@pytest.mark.parametrize("program", [TWO_OPTIMIZERS, BY_HAND])
def test_each_way_to_update_gives_the_first_gradients(tmp_path: Path, program: str) -> None:
    shown, process = inspected(tmp_path / "run", program, Inspection(gradient_steps=3))
    assert [event for event in process.events if event.what == "failed"] == []
    for name in dict.fromkeys(name for name, _ in shown):
        recorded = process.gradients[PLACES[name]]
        expected = values(shown, name)[:3]
        assert [gradient.norm for gradient in recorded] == pytest.approx(expected, rel=1e-5), name
        assert all((gradient.sample is None) == (name == "words") for gradient in recorded)
    assert process.state is None, "it was not asked for"
    assert process.outputs == []


INFERENCE = """
class Classifier(nn.Linear): pass
net = Classifier(5, 9).eval()
with torch.inference_mode():
    for _ in range(4):
        x = torch.randn(30, 5)
        y = net(x)
        show("top", y.argmax(-1).tolist())
        show("sample", y.flatten().tolist())
        best = y.topk(2).values
        show("lead", (best[:, 0] - best[:, 1]).tolist())
"""


def test_inference_is_recorded_in_detail_for_as_many_calls_as_asked(tmp_path: Path) -> None:
    shown, process = inspected(tmp_path / "run", INFERENCE, seed=1)
    assert len(process.outputs) == 2
    for number, output in enumerate(process.outputs):
        (tensor,) = output.tensors
        assert output.root == "Classifier"
        assert tensor.shape == (30, 9)
        assert tensor.top1 is not None
        assert tensor.top1.tolist() == values(shown, "top")[number]
        assert tensor.sample is not None
        assert sorted(tensor.sample) == pytest.approx(sorted(values(shown, "sample")[number]))
        assert tensor.lead is not None
        assert tensor.lead.tolist() == pytest.approx(values(shown, "lead")[number])
    _, other = inspected(tmp_path / "other", INFERENCE, seed=2)
    ours, theirs = ({o.inputs for o in p.outputs} for p in (process, other))
    assert len(ours) == 2
    assert not ours & theirs


def test_a_failure_ends_the_inspection_and_not_the_program(tmp_path: Path) -> None:
    broken = (
        "from flatout.agent import gradient_inspection as module\nmodule.stored_values = None\n"
        + TRAINING
    )
    shown, process = inspected(tmp_path / "run", broken, seed=3)
    assert len(values(shown, "loss")) == 12
    (failed,) = [event for event in process.events if event.what == "failed"]
    assert failed.subject == "inspection"
    assert "'NoneType' object is not callable" in failed.why
    assert failed.traceback is not None
    assert len(process.steps) == 6
    assert process.gradients == {}


SEEDS_ITSELF = """
import random
torch.manual_seed(11)
random.seed(11)
show("drawn", [torch.rand(()).item(), random.random()])
torch.manual_seed(seed=11)
show("drawn", [torch.rand(()).item(), 0.0])
"""


def test_a_program_that_seeds_itself_follows_the_seeds_of_a_proof(tmp_path: Path) -> None:
    drawn = {}
    for name, seed in (("0", 0), ("1", 1), ("1 again", 1)):
        shown, _ = inspected(tmp_path / name, SEEDS_ITSELF, seed=seed)
        drawn[name] = values(shown, "drawn")
    torch.manual_seed(11)
    assert drawn["0"][0] == [torch.rand(()).item(), random.Random(11).random()]
    assert drawn["1"] == drawn["1 again"]
    assert drawn["1"][0][0] == drawn["1"][1][0]
    assert all(one != other for one, other in zip(drawn["0"][0], drawn["1"][0], strict=True))
