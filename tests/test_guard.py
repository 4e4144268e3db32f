"""The guard: what is not finite does not reach the weights, and what caused it is withdrawn."""

from __future__ import annotations

import copy
import dataclasses
import io
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import pytest
import torch
from torch import nn

from flatout import kernels
from flatout.agent import guard, snapshot, weight_guard
from flatout.agent.guard import Guard
from flatout.agent.loss_watch import LossWatch
from flatout.agent.session import Session
from flatout.intercept import finite, hooks, losses
from flatout.intercept.host import Host
from flatout.plan import Evidence, LossEvidence, Plan
from flatout.plan.program import observed
from flatout.wire.request import GuardRequest, ProvenLoss, Ranks, Request

Start = Callable[..., Host]


@pytest.fixture
def start(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Start]:
    """Begin a host with these settings and the guard; every event of torch is seen at once."""
    monkeypatch.setattr(hooks, "FLUSH_SECONDS", 0.0)
    started: list[tuple[Host, Guard | None]] = []

    def start(guarded: bool = True, **settings: str) -> Host:
        folder = tmp_path / str(len(started))
        folder.mkdir()
        session = Session(Request(settings=settings), folder)
        host = session.host
        host.hooks.install(live=False)
        for name, setting in settings.items():
            host.applied.apply(name, setting)
        if guarded:
            session._guard = Guard(host, GuardRequest())
            session._guard.install()
        started.append((host, session._guard))
        return host

    yield start
    for host, installed in reversed(started):
        if installed is not None:
            installed.remove()
        for name in list(host.applied.names):
            host.applied.undo(name)
        host.hooks.remove()


def events(host: Host) -> list[tuple[str, str, str]]:
    """What, subject and why of each event."""
    host.record.flush()
    if not host.record.path.exists():
        return []
    lines = map(json.loads, host.record.path.read_text().splitlines())
    return [(e["what"], e["subject"], e["why"]) for e in lines if e["kind"] == "event"]


class Probability(nn.Module):
    """In bfloat16 a sure probability is exactly 1."""

    def __init__(self) -> None:
        super().__init__()
        self.hidden, self.head = nn.Linear(4, 8), nn.Linear(8, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.sigmoid(self.head(torch.relu(self.hidden(x))))


X = torch.ones(2, 4)


def make_sure(net: Probability, logit: float) -> None:
    with torch.no_grad():
        net.head.weight.zero_()
        net.head.bias.fill_(logit)


def loss_of(net: nn.Module) -> torch.Tensor:
    """Finite in float32, but log(0) where the probability of a sure net is rounded to 1."""
    return -(1 - net(X)).log().mean()


def weights(net: nn.Module) -> list[torch.Tensor]:
    return [p.detach().clone() for p in net.parameters()]


def step(net: nn.Module, optimizer: torch.optim.Optimizer, factor: float = 1.0) -> None:
    optimizer.zero_grad()
    (factor * loss_of(net)).backward()
    optimizer.step()


def are_equal(first: Sequence[torch.Tensor], second: Sequence[torch.Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


# Gradients


def test_a_step_that_lower_precision_breaks_is_left_out_and_the_knob_turned_back(
    start: Start,
) -> None:
    host = start(precision="bf16")
    torch.manual_seed(0)
    net = Probability()
    optimizer = torch.optim.Adam(net.parameters(), lr=1e-3)
    for _ in range(3):
        step(net, optimizer)
    make_sure(net, 8.0)
    before, state = weights(net), copy.deepcopy(optimizer.state_dict())
    step(net, optimizer)
    assert are_equal(weights(net), before)
    assert str(optimizer.state_dict()) == str(state)
    assert net.head.bias.grad is not None
    assert not net.head.bias.grad.isfinite().all()  # what the program sees is what was computed
    for _ in range(3):
        step(net, optimizer)
    assert not are_equal(weights(net), before)
    assert all(p.isfinite().all() for p in net.parameters())
    assert [event[:2] for event in events(host)] == [
        ("failed", "precision"),
        ("undone", "precision"),
    ]
    assert "gradients of Adam were not finite" in events(host)[0][2]


def test_what_is_not_finite_with_nothing_turned_is_left_to_the_program(start: Start) -> None:
    host = start(precision="bf16", optimizer="fused")
    torch.manual_seed(0)
    net = Probability()
    optimizer = torch.optim.Adam(net.parameters(), lr=1e-3)
    step(net, optimizer)
    before = weights(net)
    for _ in range(12):
        step(net, optimizer, factor=float("inf"))
        if not are_equal(weights(net), before):
            break
    assert not net.head.bias.isfinite().all()
    said = events(host)
    assert [subject for what, subject, _ in said if what == "failed"] == ["precision", "optimizer"]
    (own,) = (why for what, subject, why in said if subject == "guard")
    assert "the program's own" in own
    step(net, optimizer)
    assert len(events(host)) == len(said)


def test_a_closure_is_kept_from_updating(start: Start) -> None:
    host = start(precision="bf16")
    torch.manual_seed(0)
    net = Probability()
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)

    def closure() -> float:
        optimizer.zero_grad()
        loss = loss_of(net)
        loss.backward()
        return loss.item()

    optimizer.step(closure)
    make_sure(net, 8.0)
    before = weights(net)
    optimizer.step(closure)
    assert are_equal(weights(net), before)
    for _ in range(3):
        optimizer.step(closure)
    assert not are_equal(weights(net), before)
    assert all(p.isfinite().all() for p in net.parameters())
    assert [subject for what, subject, _ in events(host) if what == "failed"] == ["precision"]


def test_an_update_by_hand_finds_zeros(start: Start) -> None:
    host = start(precision="bf16")
    torch.manual_seed(0)
    net = Probability()

    def update() -> None:
        net.zero_grad()
        loss_of(net).backward()
        with torch.no_grad():
            for parameter in net.parameters():
                assert parameter.grad is not None
                parameter -= 0.1 * parameter.grad

    for _ in range(3):
        update()
    make_sure(net, 8.0)
    before = weights(net)
    update()
    assert are_equal(weights(net), before)
    for _ in range(3):
        update()
    assert not are_equal(weights(net), before)
    assert [event[:2] for event in events(host)] == [
        ("failed", "precision"),
        ("undone", "precision"),
    ]


@pytest.mark.parametrize("fused", [None, True])
def test_a_grad_scaler_of_the_program_is_not_interfered_with(
    start: Start, fused: bool | None
) -> None:
    host = start(optimizer="onepass")
    torch.manual_seed(0)
    net = Probability()
    optimizer = torch.optim.Adam(net.parameters(), lr=1e-3, fused=fused)
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    before = weights(net)
    for factor in (float("inf"), 1.0):
        optimizer.zero_grad()
        scaler.scale(factor * loss_of(net)).backward()
        scaler.step(optimizer)
        scaler.update()
        assert are_equal(weights(net), before) == (factor != 1.0)
    assert scaler.get_scale() == 2.0
    assert events(host) == []


def test_loss_scaling_is_not_checked_again(start: Start, monkeypatch: pytest.MonkeyPatch) -> None:
    host = start(precision="fp16")
    torch.manual_seed(0)
    net = Probability()
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    step(net, optimizer)  # in float32, and not scaled
    monkeypatch.setattr(guard, "are_finite", None)  # calling it would switch the guard off
    for _ in range(3):
        step(net, optimizer)
    assert events(host) == []


def test_loss_scaling_gives_up_where_no_scale_helps(start: Start) -> None:
    host = start(precision="fp16")
    torch.manual_seed(0)
    net = Probability()
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    step(net, optimizer)
    before = weights(net)
    for _ in range(19):
        step(net, optimizer, factor=float("nan"))
        if not are_equal(weights(net), before):
            break
    said = [(what, subject) for what, subject, _ in events(host)]
    assert said.count(("noticed", "precision")) == 16  # from 2**16 down to 1
    assert said[16:] == [("failed", "precision"), ("undone", "precision")]
    assert not net.head.bias.isfinite().all()  # the program's own


@pytest.mark.parametrize("fused", [None, True])
def test_a_device_is_not_waited_for(
    start: Start, monkeypatch: pytest.MonkeyPatch, fused: bool | None
) -> None:
    """The way of accelerators, on the CPU: the flag gates the update, and is read later."""
    monkeypatch.setattr(guard, "HOST_DEVICES", ())
    monkeypatch.setattr(losses, "_POLLS_BEFORE_WAIT", 2)
    host = start(precision="bf16")
    torch.manual_seed(0)
    net = Probability()
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1, fused=fused)
    step(net, optimizer)
    make_sure(net, 8.0)
    before = weights(net)
    step(net, optimizer)
    assert events(host) == []
    assert are_equal(weights(net), before)
    assert not hasattr(optimizer, "found_inf")
    for _ in range(8):
        step(net, optimizer)
    assert not are_equal(weights(net), before)
    assert all(p.isfinite().all() for p in net.parameters())
    assert [event[:2] for event in events(host)] == [
        ("failed", "precision"),
        ("undone", "precision"),
    ]


def trained(start: Start, guarded: bool, monkeypatch: pytest.MonkeyPatch) -> list[torch.Tensor]:
    """Losses and weights of a small training."""
    monkeypatch.setattr(weight_guard, "SNAPSHOT_PERIOD_S", 0.0)
    host = start(guarded, precision="bf16", optimizer="onepass")
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(8, 32), nn.BatchNorm1d(32), nn.Dropout(0.5), nn.Linear(32, 1))
    optimizer = torch.optim.AdamW(net.parameters(), lr=0.01)
    found = []
    for _ in range(10):
        loss = net(torch.randn(16, 8)).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        found.append(loss.detach())
    buffer = io.BytesIO()
    torch.save([net, optimizer.state_dict()], buffer)
    assert b"flatout" not in buffer.getvalue()
    assert events(host) == []
    for name in list(host.applied.names):
        host.applied.undo(name)
    return [*found, *weights(net), *net.buffers()]


def test_when_nothing_happens_nothing_changes(
    start: Start, monkeypatch: pytest.MonkeyPatch
) -> None:
    bare = trained(start, False, monkeypatch)
    assert are_equal(trained(start, True, monkeypatch), bare)
    monkeypatch.setattr(guard, "HOST_DEVICES", ())
    assert are_equal(trained(start, True, monkeypatch), bare)


# Weights


class Normed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm, self.out = nn.BatchNorm1d(4), nn.Linear(4, 1)
        self.register_buffer("mask", torch.tensor([0.0, -torch.inf]))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.out(self.norm(x))


def train(net: nn.Module, optimizer: torch.optim.Optimizer, x: torch.Tensor) -> None:
    optimizer.zero_grad()
    net(x).square().mean().backward()
    optimizer.step()


def test_weights_that_are_lost_are_set_back_in_place(
    start: Start, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(weight_guard, "SNAPSHOT_PERIOD_S", 0.0)
    monkeypatch.setattr(weight_guard, "SNAPSHOT_SHARE", 1e9)
    host = start(precision="bf16")
    torch.manual_seed(0)
    net, x = Normed(), torch.randn(8, 4)
    optimizer = torch.optim.Adam(net.parameters(), lr=1e-3)
    for _ in range(6):
        train(net, optimizer, x)
    addresses = [p.data_ptr() for p in net.parameters()]
    kept = weights(net)
    with torch.no_grad():
        net.out.weight.fill_(torch.nan)
    for _ in range(6):
        train(net, optimizer, x)
    assert [p.data_ptr() for p in net.parameters()] == addresses
    assert all(p.isfinite().all() for p in net.parameters())
    for parameter, old in zip(net.parameters(), kept, strict=True):
        torch.testing.assert_close(parameter.detach(), old, rtol=0, atol=0.02)
    said = events(host)
    assert ("noticed", "guard", "weights were not finite: restored from their last copy") in said
    assert [subject for what, subject, _ in said if what == "failed"] == ["precision"]


def test_one_of_several_ranks_restores_no_weights(
    start: Start, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each rank copies its weights by its own clock, so the copies are of different steps."""
    monkeypatch.setattr(weight_guard, "SNAPSHOT_PERIOD_S", 0.0)
    monkeypatch.setattr(weight_guard, "SNAPSHOT_SHARE", 1e9)
    host = start(precision="bf16")
    host.request = dataclasses.replace(host.request, ranks=Ranks(2, seed=0, hash_seed=0))
    net, x = Normed(), torch.randn(8, 4)
    optimizer = torch.optim.Adam(net.parameters(), lr=1e-3)
    for _ in range(6):
        train(net, optimizer, x)
    with torch.no_grad():
        net.out.weight.fill_(torch.nan)
    for _ in range(6):
        train(net, optimizer, x)
    assert net.out.weight.isnan().all()
    why = "weights are not finite, and one of several processes cannot restore them alone"
    assert ("noticed", "guard", why) in events(host)


def test_buffers_that_an_overflow_has_reached_are_set_back(
    start: Start, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(weight_guard, "SNAPSHOT_PERIOD_S", 0.0)
    monkeypatch.setattr(weight_guard, "SNAPSHOT_SHARE", 1e9)
    host = start(precision="bf16")
    torch.manual_seed(0)
    net, x = Normed(), torch.randn(8, 4)
    optimizer = torch.optim.SGD(net.parameters(), lr=1e-3)
    for _ in range(6):
        train(net, optimizer, x)
    train(net, optimizer, torch.full_like(x, torch.inf))
    for _ in range(6):
        train(net, optimizer, x)
    assert net.norm.running_mean.isfinite().all()  # type: ignore[union-attr]
    assert net.mask[1] == -torch.inf  # type: ignore[index]
    assert any("buffers were not finite" in why for _, _, why in events(host))


def test_no_copy_where_memory_is_short(start: Start, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(weight_guard, "SNAPSHOT_PERIOD_S", 0.0)
    monkeypatch.setattr(weight_guard, "SNAPSHOT_SHARE", 1e9)
    monkeypatch.setattr(snapshot, "_free_bytes", lambda device: 3 * 2**10)
    host = start(precision="bf16")
    net = nn.Linear(256, 1)
    optimizer = torch.optim.SGD(net.parameters(), lr=1e-3)
    for _ in range(6):
        train(net, optimizer, torch.randn(8, 256))
    assert [event[:2] for event in events(host)] == [("skipped", "guard")]
    with torch.no_grad():
        net.weight.fill_(torch.nan)
    for _ in range(6):
        train(net, optimizer, torch.randn(8, 256))
    assert any("no copy to restore" in why for _, _, why in events(host))


def test_a_pause_brings_no_copy_nearer() -> None:
    running = weight_guard.RunningTime()
    now_s = running._last_sign_s
    for gap_s in [0.25] * 40 + [3600.0] + [0.25] * 40:
        now_s += gap_s
        running.add_sign_of_life(now_s)
    assert running.s == pytest.approx(10 + weight_guard.PAUSE_S + 10)


def test_the_time_of_slow_steps_counts() -> None:
    running = weight_guard.RunningTime()
    now_s = running._last_sign_s
    for _ in range(20):
        now_s += 60.0
        running.add_sign_of_life(now_s)
    assert running.s > 0.7 * 20 * 60


def test_a_copy_keeps_nothing_alive() -> None:
    net, kept = nn.Linear(4, 4), snapshot.Snapshot()
    assert kept.take([net], []) is None
    reference = kept._copies[0][0]
    del net
    assert reference() is None
    assert kept.restore()


# What is finite


@pytest.fixture(params=["kernel", "torch"])
def check(
    request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> Callable[[Sequence[torch.Tensor]], bool]:
    if request.param == "torch":
        monkeypatch.setattr(finite, "_kernel", lambda: None)
    elif kernels.find_compiler() is None:
        pytest.skip("no C compiler")
    return finite.are_finite


TENSORS = {
    "small": torch.zeros(3),
    "one": torch.tensor(torch.finfo().max),
    "large": torch.full((3, 70001), -torch.finfo().max),
    "tiny": torch.full((33,), torch.finfo().tiny / 8),
    "strided": torch.zeros(8, 8)[:, ::2],
    "channels_last": torch.zeros(2, 3, 4, 5).to(memory_format=torch.channels_last),
    "double": torch.full((5,), torch.finfo(torch.float64).max, dtype=torch.float64),
    "half": torch.full((40,), 65504.0, dtype=torch.float16),
    "bfloat16": torch.full((40,), torch.finfo(torch.bfloat16).max, dtype=torch.bfloat16),
    "sparse": torch.sparse_coo_tensor(
        torch.tensor([[0, 2]]), torch.ones(2, 4), (5, 4), check_invariants=True
    ),
    "empty": torch.empty(0),
}


def test_finite(check: Callable[[Sequence[torch.Tensor]], bool]) -> None:
    assert check([])
    assert check(list(TENSORS.values()))


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("name", [name for name in TENSORS if name != "empty"])
def test_not_finite(
    check: Callable[[Sequence[torch.Tensor]], bool], name: str, value: float
) -> None:
    for place in (0, -1):
        tensors = {key: tensor.clone() for key, tensor in TENSORS.items()}
        values = finite.values_of(tensors[name])
        values[(place,) * values.dim()] = value
        assert not check(list(tensors.values()))
        assert not check([tensors[name]])


# Losses


def envelope(*finals: float) -> GuardRequest:
    return GuardRequest(8, tuple(ProvenLoss(final, margin=0.1) for final in finals))


def test_losses_within_the_envelope_are_no_news() -> None:
    watch = LossWatch(envelope(2.0))
    assert watch.add([9.0] * 6 + [2.9, 2.9]) is None
    assert watch.add([99.0] * 20) is None


@pytest.mark.parametrize("last", [3.2, float("nan"), float("inf")])
def test_losses_far_above_the_proven_ones_are_said_once(last: float) -> None:
    watch = LossWatch(envelope(1.0, 2.0))
    assert watch.add([1.0, 2.0] * 7) is None
    said = watch.add([1.0, last + 2.0])
    assert said is not None
    assert "the loss of backward call 2 over steps 6 to 8" in said
    assert watch.add([1.0, last]) is None


def test_without_a_proof_losses_are_not_compared() -> None:
    assert LossWatch(GuardRequest()).add([float("nan")]) is None


# As a user sees it

PROGRAM = """
import torch
from torch import nn
torch.manual_seed(0)
net = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 1), nn.Sigmoid())
optimizer = torch.optim.Adam(net.parameters(), lr=1e-3)
for number in range(30):
    if number == 20:
        with torch.no_grad():
            net[2].weight.zero_()
            net[2].bias.fill_(8.0)
    loss = -(1 - net(torch.ones(2, 4))).log().mean()
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
print(all(p.isfinite().all() for p in net.parameters()))
"""

EVIDENCE = Evidence(
    settings={"precision": "bf16"},
    ratio=1.6,
    ratio_low=1.5,
    ratio_high=1.7,
    pairs=4,
    bare_step_ms=1.6,
    plan_step_ms=1.0,
    steps=16,
    seeds=4,
    bare_repeats=True,
    verdict="non-inferior",
    losses=(LossEvidence(0.01, 0.02, 0.0, 0.001, "seeds"),),
)


@pytest.mark.parametrize("words", [(), ("--epochs", "30")])
def test_run_says_what_the_guard_has_done(tmp_path: Path, words: tuple[str, ...]) -> None:
    script, made = tmp_path / "program.py", tmp_path / "flatout.toml"
    script.write_text(PROGRAM)
    command = (sys.executable, str(script))
    Plan(
        settings={"precision": "bf16"},
        command=command,
        program=observed(command),
        machine={"torch": torch.__version__},
        evidence=EVIDENCE,
    ).write(made)
    completed = subprocess.run(
        [sys.executable, "-m", "flatout", "run", "--plan", str(made), "--", *command, *words],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
        env={**os.environ, "FLATOUT_HOME": str(tmp_path / "home"), "OMP_NUM_THREADS": "1"},
    )
    assert completed.returncode == 0, completed.stderr
    assert completed.stdout == "True\n"
    said = completed.stderr.splitlines()
    if words:
        assert said.pop(0).endswith(
            "precision proven with another length or seed: --epochs 30 is new"
        )
    assert said[0].startswith("flatout: precision=bf16 failed: withdrawn: NotFiniteError")
    of_losses = [line for line in said if line.startswith("flatout: guard: the loss over")]
    if words:
        assert of_losses == []  # a run of another length has losses of its own
    else:
        assert of_losses == [said[1]]
        assert said[1].startswith("flatout: guard: the loss over steps 12 to 16 is 0.")
    assert "30 steps" in said[-1]
