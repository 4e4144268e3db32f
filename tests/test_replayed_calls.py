"""Describing the calls of a step, and replaying them; the program does not notice."""

from __future__ import annotations

import itertools
import os
import random
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import forking
import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.optim.optimizer import register_optimizer_step_pre_hook

from flatout import knobs
from flatout.agent import calls
from flatout.agent.bench import Bench, Key
from flatout.agent.calls import CallLog, TensorForm, find_values, freeze, thaw
from flatout.agent.replay import choose_settings, replay
from flatout.agent.standins import make_tensor, prepare_step
from flatout.intercept import handled_calls
from flatout.intercept.host import Host
from flatout.knob import Inside
from flatout.wire.profile import OperatorTimes, Profile
from flatout.wire.record import read_run
from flatout.wire.replay import BARE, Replayed
from flatout.wire.request import RUN_VARIABLE, Replay, Request
from tests.hosts import host_in

PRECISION = ("precision", "bf16")
LAYOUT = ("memory_format", "channels_last")


@pytest.fixture
def host(tmp_path: Path) -> Iterator[Host]:
    made = host_in(tmp_path)
    made.hooks.install(live=False)
    yield made
    made.hooks.remove()


def described(host: Host, step: Callable[[], object], *, before: int = 1) -> CallLog:
    """The calls of a step, which is made a few times before."""
    for _ in range(before):
        step()
    log = CallLog(host)
    log.open()
    step()
    log.close()
    return log


@pytest.fixture(autouse=True)
def all_calls(monkeypatch: pytest.MonkeyPatch) -> None:
    """By the clock of these tests, all calls take as long."""
    monkeypatch.setattr("flatout.agent.groups.ENOUGH_SHARE", 2.0)


def clock() -> Callable[[], int]:
    """A clock that goes on by a millisecond whenever it is read."""
    ticks = itertools.count(0, 1_000_000)
    return lambda: next(ticks)


def replayed(log: CallLog, *settings: tuple[str, str]) -> Replayed:
    found = replay(log, settings, 1e9, clock())
    assert not found.failed, found.failed
    return found


def labels(found: Replayed, name: str) -> set[str]:
    """The settings that act on the calls of a function."""
    return {label for call in found.calls if call.name == name for label in call.times_ms} - {BARE}


def names(found: Replayed) -> dict[str, int]:
    counts: dict[str, int] = {}
    for call in found.calls:
        counts[call.name] = counts.get(call.name, 0) + call.count
    return counts


def test_arguments_are_the_same_after_freezing() -> None:
    x, y = torch.ones(2), torch.zeros(3, dtype=torch.long)
    arguments = ((x, [y, 1, True, 1.5], slice(None, 3)), {"dim": -1, "dtype": torch.float32})
    tensors: list[torch.Tensor] = []
    frozen = freeze(arguments, tensors)
    assert hash(frozen) == hash(freeze(arguments, []))
    assert frozen != freeze(((x, [y, 1, 1, 1.5], slice(None, 3)), arguments[1]), [])
    assert thaw(frozen, tensors) == arguments
    with pytest.raises(calls.NotReplayableError, match="Generator"):
        freeze((torch.Generator(),), [])


@pytest.mark.parametrize(
    "tensor",
    [
        torch.randn(3, 4),
        torch.randn(2, 3, 4, 4).contiguous(memory_format=torch.channels_last),
        torch.randn(5, 1).expand(5, 4),
        torch.randn(8)[::2],
        torch.randn((), requires_grad=True),
        torch.rand(10),
        torch.randn(6, dtype=torch.complex64),
        torch.randint(3, 9, (4, 5)),
        torch.rand(4, 4) > 0.5,
        nn.Parameter(torch.randn(2, 2)),
        torch.empty(0, 3),
        torch.tensor([0.0, float("-inf")]),
    ],
)
def test_a_stand_in_has_the_form_of_the_tensor(tensor: torch.Tensor) -> None:
    form, values = TensorForm.of(tensor), find_values(tensor)
    made = make_tensor(form, values)
    assert TensorForm.of(made) == form
    if not tensor.is_floating_point() and not tensor.is_complex():
        assert torch.equal(made, tensor)
    if tensor.is_floating_point() and values.copy is None and tensor.numel():
        assert torch.isin(made, tensor).all()  # probabilities stay probabilities, zeros zeros


class Images(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm = nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8)
        self.second, self.head = nn.Conv2d(8, 8, 3, padding=1), nn.Linear(8, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = F.relu(self.norm(self.first(x)), inplace=True)
        x = self.second(x) + x
        output: torch.Tensor = self.head(F.relu(x).mean((2, 3)))
        return output


def image_step() -> Callable[[], object]:
    net, x, y = Images(), torch.randn(4, 3, 8, 8), torch.tensor([0, 3, 1, 2])
    optimizer = torch.optim.AdamW(net.parameters())

    def step() -> None:
        optimizer.zero_grad()
        F.cross_entropy(net(x), y).backward()
        nn.utils.clip_grad_norm_(net.parameters(), 1.0)
        optimizer.step()

    return step


def test_all_calls_of_a_step_are_there(host: Host) -> None:
    found = replayed(described(host, image_step()))
    once = ("batch_norm", "add", "mean", "linear", "cross_entropy", "AdamW.step")
    clipping = ("_get_total_norm", "_clip_grads_with_norm_")
    expected = {"conv2d": 2, "relu": 2, **dict.fromkeys((*once, *clipping), 1)}
    assert expected.items() <= names(found).items()
    assert not found.skipped
    assert all(len(call.times_ms[BARE]) == 1 for call in found.calls)


def test_only_calls_on_which_a_setting_acts_are_timed_again(host: Host) -> None:
    found = replayed(described(host, image_step()), ("optimizer", "fused"))
    for call in found.calls:
        rounds = {len(times) for times in call.times_ms.values()}
        if call.name == "AdamW.step":
            assert rounds != {1}
        else:
            assert rounds == {1}


def test_what_a_setting_changes_is_passed_on_from_call_to_call(host: Host) -> None:
    log = described(host, image_step())
    found = replayed(log, PRECISION, LAYOUT)
    precision, layout, both = "precision=bf16", "memory_format=channels_last", ""
    both = f"{layout},{precision}"
    for name in ("conv2d", "batch_norm", "relu", "add"):
        assert labels(found, name) == {precision, layout, both}, name
    assert precision in labels(found, "leave")  # the cast back to float32
    for name in ("cross_entropy", "AdamW.step", "_get_total_norm"):
        assert not labels(found, name), name


def test_settings_act_on_the_calls_that_they_count(host: Host) -> None:
    found = replayed(
        described(host, image_step()), ("optimizer", "fused"), ("clipping", "onepass"), PRECISION
    )
    assert labels(found, "AdamW.step") == {"optimizer=fused"}
    assert labels(found, "_get_total_norm") == {"clipping=onepass"}
    assert labels(found, "conv2d") == {"precision=bf16"}
    assert set(found.settings) == {"precision=bf16", "optimizer=fused", "clipping=onepass"}


def test_an_optimizer_is_replayed_from_its_state_and_gradients(host: Host) -> None:
    """Tiny numbers take longer; zeros do not."""
    weight = nn.Parameter(torch.ones(300, 40))
    optimizer = torch.optim.Adam([weight], lr=0.1)

    def step() -> None:
        optimizer.zero_grad()
        (weight[:100] * 1e-30).sum().backward()
        optimizer.step()

    log = described(host, step, before=2)
    ((form, (_, gradients)),) = log.optimizers.items()
    assert set(gradients[0].sample.unique().tolist()) == {0.0, float(torch.tensor(1e-30))}
    copied = calls.copy_state(optimizer)
    prepare_step(form, gradients, copied).run(Inside())
    assert copied[0]["step"] == 4
    assert optimizer.state[weight]["step"] == 3
    assert copied[0]["exp_avg"].shape == weight.shape


def attention_step() -> Callable[[], object]:
    q = torch.randn(2, 2, 64, 16, requires_grad=True)

    def step() -> None:
        mask = torch.ones(64, 64, dtype=torch.bool).tril()
        F.scaled_dot_product_attention(q, q, q, mask, dropout_p=0.1).sum().backward()

    return step


def function_step(function: Callable[..., torch.Tensor], *args: Any) -> Callable[[], object]:
    def step() -> None:
        function(*args).float().sum().backward()

    return step


def test_each_kind_of_knob_acts_on_its_calls(host: Host) -> None:
    large = torch.randn(256, 256, requires_grad=True)
    logits = torch.randn(600, 500, requires_grad=True)
    weight = torch.randn(2000, 32, requires_grad=True)
    indices, offsets = torch.randint(2000, (64,)), torch.arange(0, 64, 4)
    gru = nn.GRU(8, 16, batch_first=True)
    sequence = torch.randn(4, 10, 8)
    spread = nn.ConvTranspose2d(8, 3, 4, stride=2, padding=1)
    small = torch.randn(4, 8, 8, 8)
    cases: list[tuple[tuple[str, str], str, Callable[[], object]]] = [
        (("attention", "fast"), "scaled_dot_product_attention", attention_step()),
        (("random", "fast"), "dropout", function_step(F.dropout, large, 0.1)),
        (("elementwise", "fast"), "tanh", function_step(torch.tanh, large)),
        (
            ("cross_entropy", "fused"),
            "cross_entropy",
            function_step(F.cross_entropy, logits, torch.randint(500, (600,))),
        ),
        (
            ("embedding", "direct"),
            "embedding_bag",
            function_step(F.embedding_bag, indices, weight, offsets),
        ),
        (("recurrent", "fused"), "gru", lambda: gru(sequence)[0].sum().backward()),
        (("convolution", "recast"), "conv_transpose2d", lambda: spread(small).sum().backward()),
    ]
    for setting, name, step in cases:
        found = replayed(described(host, step), setting)
        assert labels(found, name) == {"=".join(setting)}, (setting, found)
        assert not found.skipped


def test_a_lowered_call_is_only_lowered_inside_a_module(host: Host) -> None:
    net, x = nn.Linear(8, 8), torch.randn(4, 8)

    def step() -> None:
        (F.linear(net(x), net.weight).sum()).backward()

    found = replayed(described(host, step), PRECISION)
    inside, outside = (call for call in found.calls if call.name == "linear")
    if BARE in inside.times_ms and len(inside.times_ms) == 1:
        inside, outside = outside, inside
    assert set(inside.times_ms) == {BARE, "precision=bf16"}
    assert set(outside.times_ms) == {BARE}


def test_the_head_stays_in_float32_under_safe(host: Host) -> None:
    first, head, x = nn.Linear(8, 8), nn.Linear(8, 8), torch.randn(4, 8)
    net = nn.Sequential(first, nn.ReLU(), head)
    log = described(host, lambda: net(x).sum().backward())
    heads = [call.is_head for call in log.calls if call.form.name == "linear"]
    assert heads == [False, True]
    assert labels(replayed(log, ("precision", "safe")), "linear") == {"precision=safe"}


def state_of(net: nn.Module, optimizer: torch.optim.Optimizer) -> list[torch.Tensor]:
    tensors = [*net.parameters(), *net.buffers(), *(p.grad for p in net.parameters())]
    for kept in optimizer.state.values():
        tensors += [x for x in kept.values() if isinstance(x, torch.Tensor)]
    return [x.detach().clone() for x in tensors if x is not None]


def test_medium_acts_on_matmuls_and_changes_no_dtype(host: Host) -> None:
    found = replayed(described(host, image_step()), ("precision", "medium"))
    assert labels(found, "conv2d") == labels(found, "linear") == {"precision=medium"}
    assert not labels(found, "relu")


def test_the_program_does_not_notice(host: Host) -> None:
    net, x = Images(), torch.randn(4, 3, 8, 8)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9)
    fired: list[str] = []

    def step() -> None:
        optimizer.zero_grad(set_to_none=False)
        F.dropout(net(x), 0.5).sum().backward()
        optimizer.step()

    step()
    net.first.register_forward_hook(lambda *_: fired.append("forward"))
    net.head.weight.register_hook(lambda gradient: fired.append("gradient"))
    handle = register_optimizer_step_pre_hook(lambda *_: fired.append("step"))
    log = described(host, step, before=0)
    events = list(fired)
    before = state_of(net, optimizer)
    states = torch.get_rng_state(), random.getstate(), handled_calls.counts.copy()
    host.hooks.take_packed()
    with torch.autocast("cpu", torch.bfloat16), torch.no_grad(), host.hooks.asleep():
        replayed(log, PRECISION, LAYOUT, ("optimizer", "fused"), ("random", "fast"))
        assert torch.is_autocast_enabled("cpu")
        assert not torch.is_grad_enabled()
    handle.remove()
    assert fired == events
    assert not host.hooks.take_packed()
    assert len(host.optimizers) == 1
    assert torch.equal(states[0], torch.get_rng_state())
    assert states[1:] == (random.getstate(), handled_calls.counts)
    for old, new in zip(before, state_of(net, optimizer), strict=True):
        assert torch.equal(old, new)
    assert not host.forward_wrappers
    assert not host.before_optimizer_step
    assert torch.overrides._get_current_function_mode() is None


def test_a_call_that_cannot_be_replayed_is_told_and_the_rest_is_replayed(host: Host) -> None:
    generator = torch.Generator()
    x = torch.randn(8, 8, requires_grad=True)

    def step() -> None:
        noise = torch.randn(8, 8).normal_(generator=generator)
        (torch.tanh(x) * noise).sum().backward()

    found = replayed(described(host, step))
    assert "tanh" in names(found)
    assert any("Generator" in why for why in found.skipped), found.skipped


def test_a_call_without_memory_for_it_is_left_out(
    host: Host, monkeypatch: pytest.MonkeyPatch
) -> None:
    log = described(host, image_step())
    monkeypatch.setattr("flatout.agent.bench.free_memory_bytes", lambda devices: 8000)
    found = replay(log, (), 1e9, clock())
    assert any("MemoryError" in why for why in found.skipped)


def test_some_calls_are_left_out_when_time_is_short(host: Host) -> None:
    """Calls on which no setting acts are there: they are not timed."""
    log = described(host, image_step())
    found = replay(log, (PRECISION, ("optimizer", "fused"), ("clipping", "onepass")), 1e-4, clock())
    timed = [call for call in found.calls if len(call.times_ms) > 1]
    assert len(timed) == 1
    assert found.untimed_ms > 0
    assert names(found)["conv2d"] == 2
    assert found.failed == {"precision=bf16": "there was no time left"}


def test_the_programs_own_autocast_is_replayed(host: Host) -> None:
    net, x = nn.Linear(8, 8), torch.randn(4, 8)

    def step() -> None:
        with torch.autocast("cpu", torch.bfloat16):
            loss = net(x).float().sum()
        loss.backward()

    log = described(host, step)
    forms = [call.form for call in log.calls if call.form.name == "linear"]
    assert [form.autocast for form in forms] == [("cpu", torch.bfloat16)]
    assert labels(replayed(log, PRECISION), "float") == set()


def test_the_clock_is_read_when_an_accelerator_is_ready(
    host: Host, monkeypatch: pytest.MonkeyPatch
) -> None:
    log = described(host, function_step(torch.tanh, torch.randn(4, requires_grad=True)))
    order: list[str] = []
    bench = Bench(log, (), 1.0, lambda: len(order) if order.append("clock") is None else 0)
    order.clear()
    monkeypatch.setattr(bench, "_devices", [torch.device("cuda", 0)])
    monkeypatch.setattr(torch.cuda, "synchronize", lambda found: order.append("ready"))
    monkeypatch.setattr("flatout.agent.bench.free_memory_bytes", lambda devices: None)
    call = next(call for call in log.calls if call.form.name == "tanh")
    key = Key(call.form, call.form.tensors)
    bench.visit(key, bench.prepare(key), Inside(), repeats=3)
    assert order == ["ready", "clock", "ready", "clock"]


def test_a_knob_whose_calls_are_replayed_says_on_which_it_acts() -> None:
    for knob in knobs.registry().values():
        if knob.is_replayable:
            assert knob.inside is not None or knob.waits_for_calls, knob.name


@pytest.mark.parametrize(
    ("operators", "expected"),
    [
        (("aten::mm",), {"precision", "optimizer"}),
        (("aten::mm", "aten::bernoulli_"), {"precision", "optimizer", "random"}),
        (("aten::convolution",), {"precision", "optimizer", "memory_format"}),
    ],
)
def test_only_settings_that_fit_the_profile_are_replayed(
    operators: Sequence[str], expected: set[str]
) -> None:
    times = tuple(OperatorTimes(name, None, None, 1.0, 1.0, None) for name in operators)
    allowed = ("precision=bf16", "optimizer=fused", "random=fast", "memory_format=channels_last")
    chosen = choose_settings(allowed, Profile(operators=times))
    assert {name for name, _ in chosen} == expected


PROGRAM = """
import torch
from flatout.agent import activate
activate()
from torch import nn
torch.manual_seed(0)
net = nn.Sequential(nn.Linear(64, 64), nn.Dropout(0.5), nn.Linear(64, 8))
optimizer = torch.optim.AdamW(net.parameters())
x = torch.randn(32, 64)
for number in range(1000):
    loss = net(x).square().mean()
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
"""


def test_a_run_replays_the_step_after_its_profile(tmp_path: Path) -> None:
    settings = ("precision=bf16", "random=fast", "optimizer=fused", "memory_format=channels_last")
    request = Request(
        stop_steps=5, profile_steps=3, replay=Replay(settings, least_seconds=0.5, most_seconds=0.5)
    )
    request.write(tmp_path)
    script = tmp_path / "program.py"
    script.write_text(PROGRAM)
    completed = forking.run(
        [sys.executable, script],
        env={**os.environ, RUN_VARIABLE: str(tmp_path), "OMP_NUM_THREADS": "1"},
    )
    assert completed.returncode == 0, completed.stderr
    process = read_run(tmp_path).main
    assert process is not None
    assert not [event for event in process.events if event.traceback]
    assert process.replayed is not None
    assert {"linear", "AdamW.step"} & {call.name for call in process.replayed.calls}
    assert not any("memory_format" in label for label in process.replayed.settings)
    assert len(process.timed_steps) == 5
