"""Every knob on real torch objects, watched by a real host inside this process."""

from __future__ import annotations

import dataclasses
import json
import pickle
import subprocess
import sys
from collections import OrderedDict, namedtuple
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from flatout import knobs
from flatout.cli import main
from flatout.intercept.host import Host
from flatout.knob import MATMUL_OPERATORS, Facts, UnknownSettingError
from flatout.knobs.precision.autocast import in_float32
from tests.hosts import host_in


@pytest.fixture
def host(tmp_path: Path) -> Iterator[Host]:
    host = host_in(tmp_path)
    host.hooks.install(live=False)
    yield host
    host.hooks.remove()


def events(host: Host) -> list[dict[str, Any]]:
    host.record.flush()
    if not host.record.path.exists():
        return []
    lines = host.record.path.read_text().splitlines()
    return [line for line in map(json.loads, lines) if line["kind"] == "event"]


def test_the_registry_finds_both_and_checks_names() -> None:
    assert set(knobs.registry()) >= {"precision", "optimizer"}
    for knob in knobs.registry().values():
        assert set(knob.exactness) == set(knob.settings)
    knobs.check("precision", "bf16")
    with pytest.raises(UnknownSettingError, match="no knob 'speed'"):
        knobs.check("speed", "bf16")
    with pytest.raises(UnknownSettingError, match=r"'int3'.*bf16"):
        knobs.check("precision", "int3")


def test_a_knob_is_not_offered_on_a_device_it_is_not_for() -> None:
    offer = knobs.get("optimizer").offer(Facts("cuda"))
    assert offer.settings == ()
    assert offer.refusal == "it is for cpu, not for cuda"


def test_the_controller_reads_the_registry_without_torch() -> None:
    program = "import sys, flatout.knobs as k; k.registry(); sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", program], check=False).returncode == 0


# precision


class Net(nn.Module):
    """Keeps what its inner layer saw."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Linear(8, 8)
        self.b = nn.Linear(8, 4)
        self.seen: list[torch.dtype] = []

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        hidden = self.a(x)
        self.seen.append(hidden.dtype)
        return self.b(hidden)


def test_precision_is_bfloat16_inside_and_float32_outside(host: Host) -> None:
    net, x = Net(), torch.randn(2, 8)
    bare = net(x)
    undo = knobs.get("precision").apply(host, "bf16")
    net(x)  # which shows that the program asks for a type inside
    output = net(x)
    output.sum().backward()
    assert net.seen[-1] == torch.float32
    assert output.dtype == torch.float32
    assert not torch.equal(output, bare)
    torch.testing.assert_close(output, bare, rtol=0.02, atol=0.02)
    assert net.a.weight.grad is not None
    assert net.a.weight.grad.dtype == torch.float32
    with torch.no_grad():
        torch.testing.assert_close(net(x), bare, rtol=0, atol=0)
    undo()
    torch.testing.assert_close(net(x), bare, rtol=0, atol=0)
    (event,) = events(host)
    assert event["why"] == "operators of Net return float32: it reads the dtype of a tensor"


def test_precision_leaves_alone_what_the_program_has_decided(host: Host) -> None:
    knobs.get("precision").apply(host, "bf16")
    net = Net()
    with torch.autocast("cpu", torch.bfloat16):
        assert net(torch.randn(2, 8)).dtype == torch.bfloat16
    double = Net().double()
    double(torch.randn(2, 8).double())
    double(torch.randn(2, 8).double())
    assert double.seen[-1] == torch.float64
    reasons = [event["why"] for event in events(host)]
    assert len(reasons) == 2
    assert "autocast already" in reasons[0]
    assert "float64" in reasons[1]


class NotInBfloat16(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        output = torch.zeros(4, 4)
        output[torch.arange(4)] = self.linear(x)  # the dtypes must match
        return output


def test_operators_return_float32_where_bfloat16_is_not_implemented(host: Host) -> None:
    torch.manual_seed(0)
    net, x = NotInBfloat16(), torch.randn(4, 4)
    with torch.no_grad():
        bare = net(x)
    knobs.get("precision").apply(host, "bf16")
    torch.testing.assert_close(net(x), bare, rtol=0, atol=0)
    for _ in range(2):
        torch.testing.assert_close(net(x), bare, rtol=0.02, atol=0.02)
    (event,) = events(host)
    assert event["what"] == "noticed"
    assert "__setitem__ is not known to give the same result in half precision" in event["why"]


def test_precision_lets_the_programs_own_errors_through(host: Host) -> None:
    knobs.get("precision").apply(host, "bf16")
    with pytest.raises(RuntimeError, match="mat1 and mat2"):
        Net()(torch.randn(2, 9))
    assert events(host) == []


Pair = namedtuple("Pair", ["first", "second"])


@dataclasses.dataclass
class Output:
    logits: torch.Tensor
    cache: object = None


def test_outputs_in_containers_come_back_in_float32() -> None:
    low, count = torch.ones(2, dtype=torch.bfloat16), torch.arange(2)
    cache = object()
    output = in_float32(
        OrderedDict(a=[low, count], b=(low, None), c=Pair(low, 1), d=Output(low, cache), e=cache)
    )
    assert isinstance(output, OrderedDict)
    assert output["a"][0].dtype == torch.float32
    assert output["a"][1] is count
    assert output["b"][0].dtype == torch.float32
    assert isinstance(output["c"], Pair)
    assert output["c"].first.dtype == torch.float32
    assert isinstance(output["d"], Output)
    assert output["d"].logits.dtype == torch.float32
    assert output["d"].cache is cache
    assert output["e"] is cache
    same = {"x": torch.ones(2), "y": [count]}
    assert in_float32(same) is same
    assert in_float32(torch.ones(1, dtype=torch.float64)).dtype == torch.float64


def test_precision_is_not_tried_where_the_machine_multiplies_bfloat16_slower() -> None:
    match = knobs.get("precision").match
    assert match(Facts("cpu")).settings[0] == "bf16"
    assert match(Facts("cpu", {"bfloat16": 2e12, "float32": 1e12})).settings[0] == "bf16"
    half = match(Facts("cuda", {"float16": 3e12, "bfloat16": 1e12, "float32": 1e11}))
    assert half.settings[0] == "fp16"  # only the first two are tried
    upsampling = Facts("cpu", operators={"aten::upsample_bilinear2d": 0.9})
    assert upsampling.share(*MATMUL_OPERATORS) == 0
    slow = match(Facts("cpu", {"bfloat16": 1e10, "float32": 2e11}))
    assert slow.settings == ()
    assert slow.refusal is not None
    assert "10 GFLOP/s" in slow.refusal
    assert "200 GFLOP/s" in slow.refusal


# optimizer

OPTIMIZERS = {
    "Adam": lambda p: torch.optim.Adam(p, lr=0.01, weight_decay=0.1),
    "AdamW": lambda p: torch.optim.AdamW(p, lr=0.01),
    "SGD": lambda p: torch.optim.SGD(p, lr=0.01, momentum=0.9, nesterov=True),
    "plain SGD": lambda p: torch.optim.SGD(p, lr=0.01),
    "Adagrad": lambda p: torch.optim.Adagrad(p, lr=0.01, lr_decay=0.1),
}


def train(net: nn.Module, optimizer: torch.optim.Optimizer, steps: int) -> None:
    for number in range(steps):
        torch.manual_seed(number)
        optimizer.zero_grad()
        net(torch.randn(4, 3, 8, 8)).square().mean().backward()
        optimizer.step()


def conv_net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 4, 1))


@pytest.fixture
def fused_calls(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Counts the calls of torch's fused kernels, which still run."""
    calls: list[str] = []
    for name in ("_fused_adam_", "_fused_adamw_", "_fused_sgd_", "_fused_adagrad_"):
        kernel = getattr(torch, name)

        def counted(*args: Any, _name: str = name, _kernel: Any = kernel, **kwargs: Any) -> Any:
            calls.append(_name)
            return _kernel(*args, **kwargs)

        monkeypatch.setattr(torch, name, counted)
    return calls


@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_fused_steps_are_not_told_to_hooks_closures_schedulers_and_checkpoints(
    host: Host, kind: str, fused_calls: list[str]
) -> None:
    def seen_by(optimizer: torch.optim.Optimizer, net: nn.Module) -> list[str]:
        seen: list[str] = []

        def look(*args: Any) -> None:
            saved = pickle.loads(pickle.dumps(optimizer))
            seen.append(f"{optimizer!r} {saved!r} {optimizer.state_dict()['param_groups']}")

        optimizer.register_step_pre_hook(look)
        optimizer.register_step_post_hook(look)
        schedule = torch.optim.lr_scheduler.StepLR(optimizer, 2, 0.5)

        def closure() -> torch.Tensor:
            look()
            optimizer.zero_grad()
            loss: torch.Tensor = net(torch.ones(4, 3, 8, 8)).square().mean()
            loss.backward()
            return loss

        for _ in range(4):
            optimizer.step(closure)  # type: ignore[arg-type]
            schedule.step()
            look()
        return seen

    bare_net, net = conv_net(), conv_net()
    bare = OPTIMIZERS[kind](bare_net.parameters())
    expected = seen_by(bare, bare_net)
    assert not fused_calls
    optimizer = OPTIMIZERS[kind](net.parameters())
    undo = knobs.get("optimizer").apply(host, "fused")
    assert seen_by(optimizer, net) == expected
    undo()
    assert len(fused_calls) == (3 if kind == "SGD" else 4)  # whose first step makes the momentum
    train(net, optimizer, 2)
    assert len(fused_calls) <= 4

    reference = bare.state_dict()["state"]
    saved = optimizer.state_dict()
    assert saved["state"].keys() == reference.keys()
    for number, state in saved["state"].items():
        for key, value in state.items():
            expected_value = reference[number][key]
            if isinstance(expected_value, torch.Tensor):
                assert (value.dtype, value.device, value.stride()) == (
                    expected_value.dtype,
                    expected_value.device,
                    expected_value.stride(),
                )
    assert vars(optimizer).keys() == vars(bare).keys()
    assert events(host) == []


def test_the_same_number_of_fused_steps_gives_the_same_weights(host: Host) -> None:
    for make in OPTIMIZERS.values():
        bare_net, net = conv_net(), conv_net()
        train(bare_net, make(bare_net.parameters()), 5)
        undo = knobs.get("optimizer").apply(host, "fused")
        train(net, make(net.parameters()), 5)
        undo()
        for mine, other in zip(net.parameters(), bare_net.parameters(), strict=True):
            torch.testing.assert_close(mine, other, rtol=1e-5, atol=1e-6)


def test_weights_that_change_their_memory_format_are_not_stepped_fused(
    host: Host, monkeypatch: pytest.MonkeyPatch
) -> None:
    fused: list[int] = []
    kernel = torch._fused_adamw_

    def counted(params: Any, *args: Any, **kwargs: Any) -> Any:
        fused.append(len(params))
        return kernel(params, *args, **kwargs)

    monkeypatch.setattr(torch, "_fused_adamw_", counted)
    results = []
    for with_knob in (False, True):
        net = conv_net()
        optimizer = torch.optim.AdamW(net.parameters(), lr=0.01)
        undo = knobs.get("optimizer").apply(host, "fused") if with_knob else None
        train(net, optimizer, 3)
        net.to(memory_format=torch.channels_last)
        train(net, optimizer, 3)
        if undo is not None:
            undo()
        results.append([p.detach().clone() for p in net.parameters()])
    for bare, mine in zip(*results, strict=True):
        torch.testing.assert_close(mine, bare, rtol=1e-4, atol=1e-5)
    assert fused == [4] * 3 + [3] * 3  # all but the one whose state has other strides
    (event,) = events(host)
    assert "memory format" in event["why"]


class OwnStep(torch.optim.SGD):
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        super().step(closure)


class NoStep(torch.optim.AdamW):
    pass


def test_optimizers_that_must_be_left_alone(host: Host, fused_calls: list[str]) -> None:
    undo = knobs.get("optimizer").apply(host, "fused")
    embedding = nn.Embedding(10, 4, sparse=True)
    optimizer: torch.optim.Optimizer = torch.optim.SGD(embedding.parameters(), lr=0.1)
    for _ in range(3):
        embedding(torch.tensor([1, 2])).sum().backward()
        optimizer.step()
    for make in (
        lambda p: torch.optim.AdamW(p, foreach=True),
        lambda p: torch.optim.RMSprop(p),
        lambda p: torch.optim.AdamW(p, lr=torch.tensor(0.01)),
        lambda p: torch.optim.AdamW(p, amsgrad=True),
    ):
        net = conv_net()
        train(net, make(net.parameters()), 3)
    net = conv_net().to(torch.float64)
    optimizer = torch.optim.Adam(net.parameters())
    for _ in range(3):
        net(torch.randn(2, 3, 8, 8, dtype=torch.float64)).sum().backward()
        optimizer.step()
    undo()
    assert fused_calls == []
    said = events(host)
    assert all(event["what"] == "skipped" for event in said)
    assert [event["why"].split()[0] for event in said] == ["sgd", "rmsprop", "adam", "adam", "adam"]


def test_subclasses_are_stepped_fused(host: Host, fused_calls: list[str]) -> None:
    undo = knobs.get("optimizer").apply(host, "fused")
    for make in (NoStep, lambda p: OwnStep(p, lr=0.1)):
        net = conv_net()
        train(net, make(net.parameters()), 3)
    undo()
    assert len(fused_calls) == 6


def test_two_knobs_that_claim_the_same_are_not_turned_together(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    rival = dataclasses.replace(knobs.get("gc"), name="rival", claims=knobs.get("random").claims)
    registry = {**knobs.registry(), "rival": rival}
    monkeypatch.setattr(knobs, "registry", lambda: registry)
    started = tmp_path / "started"
    command = [sys.executable, "-c", f"open({str(started)!r}, 'w')"]
    assert main(["run", "--set", "rival=seldom", "--set", "random=fast", "--", *command]) == 2
    assert "the knobs rival and random cannot be used together" in capfd.readouterr().err
    assert not started.exists()


@pytest.mark.parametrize(
    ("name", "needed"),
    [
        ("random", ["aten::bernoulli_"]),
        ("attention", ["aten::scaled_dot_product_attention"]),
        ("recurrent", ["aten::gru"]),
        ("memory_format", ["aten::mkldnn_convolution"]),
    ],
)
def test_a_knob_whose_operators_are_not_in_the_step_is_not_tried(
    name: str, needed: list[str]
) -> None:
    offer = knobs.get(name).offer
    assert offer(Facts("cpu")).settings
    assert offer(Facts("cpu", operators=dict.fromkeys(needed, 0.1))).settings
    for missing in needed:
        others = dict.fromkeys({*needed, "aten::mm"} - {missing}, 0.1)
        refused = offer(Facts("cpu", operators=others))
        assert refused.settings == ()
        assert refused.refusal


def test_a_loader_that_nothing_waits_for_is_not_turned() -> None:
    offer = knobs.get("loader").offer
    assert offer(Facts("cpu")).settings == ("cache", "prefetch", "workers")
    assert offer(Facts("cpu", data_share=0.3)).settings
    assert offer(Facts("cpu", data_share=0.001)).refusal == (
        "steps wait for data only 0.1% of their time"
    )
