"""The profiled window inside a program: operators, FLOPs, facts; the program does not notice."""

from __future__ import annotations

import math
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import forking
import pytest

from flatout import launch
from flatout.doctor.case import MATMUL_OPERATORS, PRODUCTS_WITHIN
from flatout.wire.facts import OptimizerFacts, ParameterFacts
from flatout.wire.profile import OperatorTimes
from flatout.wire.record import ProcessRecord, read_run
from flatout.wire.request import RUN_VARIABLE, Request

torch = pytest.importorskip("torch")

from torch import nn  # noqa: E402
from torch.nn import functional as F  # noqa: E402
from torch.utils.checkpoint import checkpoint  # noqa: E402

from flatout.agent.flops import FlopCounter  # noqa: E402
from flatout.agent.profile import _weigh_steps, aggregate  # noqa: E402


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(0)


# FLOPs


def counted(work: Callable[[], object]) -> FlopCounter:
    counter = FlopCounter()
    with counter:
        work()
    return counter


def test_flops_of_linear_layers_with_and_without_autograd() -> None:
    linear, x = nn.Linear(64, 32), torch.randn(8, 64)
    forward = 2 * 8 * 64 * 32
    assert counted(lambda: linear(x).sum().backward()).flops_by_dtype == {"float32": 2 * forward}
    with torch.inference_mode():
        assert counted(lambda: linear(x)).flops_by_dtype == {"float32": forward}


def test_flops_of_convolutions() -> None:
    convolution, x = nn.Conv2d(3, 8, 3), torch.randn(2, 3, 16, 16)
    forward = 2 * (2 * 14 * 14) * 8 * (3 * 3 * 3)
    assert counted(lambda: convolution(x)).flops_by_dtype == {"float32": forward}
    work = lambda: convolution(x).sum().backward()  # noqa: E731
    assert counted(work).flops_by_dtype == {"float32": 2 * forward}


def test_flops_of_attention_are_the_models_fused_or_not() -> None:
    """Two products forward, four backward, whatever a kernel computes again."""
    q = torch.randn(2, 4, 32, 16, requires_grad=True)
    forward = 2 * (2 * 2 * 4 * 32 * 32 * 16)
    for dropout in (0.0, 0.1):
        count = counted(
            lambda p=dropout: F.scaled_dot_product_attention(q, q, q, dropout_p=p).sum().backward()
        )
        assert count.flops_by_dtype == {"float32": 3 * forward}, count.counted


def test_flops_of_an_lstm() -> None:
    lstm, x = nn.LSTM(16, 32, batch_first=True), torch.randn(4, 10, 16)
    forward = 2 * (4 * 10) * (16 + 32) * (4 * 32)
    with torch.no_grad():
        assert counted(lambda: lstm(x)).flops_by_dtype == {"float32": forward}
    assert counted(lambda: lstm(x)[0].sum().backward()).flops_by_dtype == {"float32": 3 * forward}


def test_flops_of_transformer_layers_are_the_same_by_their_fast_path() -> None:
    layer = nn.TransformerEncoderLayer(32, 4, 64, batch_first=True).eval()
    attention = nn.MultiheadAttention(32, 4, batch_first=True).eval()
    x = torch.randn(3, 10, 32)
    padding = torch.arange(10) >= torch.tensor([[10], [4], [7]])
    calls = {
        "aten::_transformer_encoder_layer_fwd": lambda: layer(x, src_key_padding_mask=padding),
        "aten::_native_multi_head_attention": lambda: attention(x, x, x, need_weights=False),
    }
    for name, call in calls.items():
        with torch.no_grad():
            fast = counted(call)
            torch.backends.mha.set_fastpath_enabled(False)
            try:
                expected = counted(call).flops_by_dtype
            finally:
                torch.backends.mha.set_fastpath_enabled(True)
            products = [o for o in profiled(call) if o.name in MATMUL_OPERATORS]
        assert fast.flops_by_dtype == expected
        assert sum(fast.counted.values()) == fast.counted[name] == 1
        assert sum(o.calls for o in products) == PRODUCTS_WITHIN[name]


def test_flops_of_vectors() -> None:
    a, v = torch.randn(3, 4), torch.randn(4)
    assert counted(lambda: (a @ v, v @ v)).flops_by_dtype == {"float32": 2 * 12 + 2 * 4}


def test_flops_by_dtype_under_autocast() -> None:
    linear, x = nn.Linear(64, 32), torch.randn(8, 64)
    with torch.autocast("cpu", torch.bfloat16):
        assert counted(lambda: linear(x)).flops_by_dtype == {"bfloat16": 2 * 8 * 64 * 32}


def test_a_formula_that_fails_is_told_and_the_program_goes_on(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from torch.utils import flop_counter

    def broken(*_: object, **__: object) -> int:
        raise ValueError("unexpected shape")

    monkeypatch.setitem(flop_counter.flop_registry, torch.ops.aten.mm, broken)
    a = torch.ones(2, 2)
    results = []
    counter = counted(lambda: results.append(a @ a))
    assert results[0].tolist() == [[2, 2], [2, 2]]
    assert counter.uncountable == {"aten::mm": "ValueError: unexpected shape"}


# Operators


def profiled(work: Callable[[], object]) -> tuple[OperatorTimes, ...]:
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profiler:
        work()
    result = aggregate(profiler.events(), [-math.inf, math.inf])
    assert result.operators is not None
    assert result.operators_total_calls is not None
    assert result.operators_total_calls >= sum(o.calls for o in result.operators)
    return result.operators


def test_operators_belong_to_the_phase_that_calls_them() -> None:
    model = nn.Linear(8, 8)
    optimizer = torch.optim.AdamW(model.parameters())

    def step() -> None:
        model(torch.randn(4, 8)).pow(2).sum().backward()
        optimizer.step()

    phases = {(o.name, o.phase) for o in profiled(step)}
    assert {("aten::addmm", None), ("aten::mm", "backward")} <= phases
    assert ("aten::addcdiv_", "optimizer") in phases
    assert not any("#" in name for name, _ in phases)


def test_attention_is_told_from_what_surrounds_it_in_both_directions() -> None:
    """A product after the attention is not the attention's; one inside is."""
    q = torch.randn(2, 4, 32, 16, requires_grad=True)
    other = torch.randn(1, 16, 16, requires_grad=True)

    def step() -> None:
        out = F.scaled_dot_product_attention(q, q, q, dropout_p=0.1)
        torch.bmm(out.reshape(1, -1, 16), other).sum().backward()

    calls = {(o.phase, o.within): round(o.calls) for o in profiled(step) if o.name == "aten::bmm"}
    assert calls == {
        (None, "attention"): 2,
        ("backward", "attention"): 4,
        (None, None): 1,
        ("backward", None): 2,
    }


def test_fused_attention_is_none_of_it() -> None:
    q = torch.randn(2, 4, 32, 16, requires_grad=True)
    operators = profiled(lambda: F.scaled_dot_product_attention(q, q, q).sum().backward())
    assert all(o.within is None for o in operators)


def times_within(work: Callable[[], object]) -> dict[tuple[str | None, str | None], set[str]]:
    """The names of the operators by their phase and the work that they are called for."""
    found: dict[tuple[str | None, str | None], set[str]] = {}
    for o in profiled(work):
        found.setdefault((o.phase, o.within), set()).add(o.name)
    return found


def test_gradients_of_gradients_are_told_from_plain_backward_passes() -> None:
    model = nn.Sequential(nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 1))
    x = torch.randn(4, 8, requires_grad=True)

    def step() -> None:
        [gradient] = torch.autograd.grad(model(x).sum(), x, create_graph=True)
        gradient.square().sum().backward()

    found = times_within(lambda: [step() for _ in range(2)])
    assert {"aten::mm", "aten::tanh_backward"} <= found["backward", "second_order"]
    assert "aten::add_" in found["backward", None]  # accumulated into the parameters
    assert not any(within == "recomputation" for _, within in found)


def test_a_recurrent_network_is_told_from_what_surrounds_it() -> None:
    lstm, head = nn.LSTM(8, 8), nn.Linear(8, 1)
    packed = nn.utils.rnn.pack_sequence([torch.randn(5, 8), torch.randn(3, 8)])

    def step() -> None:
        output, _ = nn.utils.rnn.pad_packed_sequence(lstm(packed)[0])
        head(output).sum().backward()

    calls = {(o.phase, o.within): o.calls for o in profiled(step) if o.name == "aten::addmm"}
    assert calls[None, "recurrent"] > 4
    assert calls[None, None] == 1
    assert "aten::sigmoid_backward" in times_within(step)["backward", "recurrent"]


@pytest.mark.parametrize("reentrant", [False, True])
def test_what_a_checkpoint_computes_again_is_told_from_backward(reentrant: bool) -> None:
    model = nn.Sequential(nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 1))
    x = torch.randn(4, 8, requires_grad=True)

    def step() -> None:
        checkpoint(model, x, use_reentrant=reentrant).sum().backward()

    found = times_within(lambda: [step() for _ in range(3)])
    assert {"aten::addmm", "aten::tanh"} <= found["backward", "recomputation"]
    assert {"aten::mm", "aten::tanh_backward"} <= found["backward", None]
    assert "aten::tanh_backward" not in found["backward", "recomputation"]
    assert not any(within == "second_order" for _, within in found)


# In programs


PREAMBLE = """
import os, sys, torch
from torch import nn
torch.manual_seed(0)
def steps(model, optimizer, number=10):
    for step in range(number):
        loss = model(torch.randn(8, 16)).pow(2).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        yield step
"""


def run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, program: str, steps: int = 4
) -> tuple[ProcessRecord, launch.Finished]:
    script = tmp_path / "program.py"
    script.write_text(PREAMBLE + program)
    monkeypatch.setenv("FLATOUT_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    finished = launch.start(
        [sys.executable, str(script)],
        Request(stop_steps=steps, profile_steps=2),
        output="capture",
    )
    assert finished.returncode == 0, finished.output
    process = read_run(finished.run_directory).main
    assert process is not None
    return process, finished


def test_a_window_follows_the_timed_steps(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    process, finished = run(
        tmp_path,
        monkeypatch,
        """
model = nn.Linear(16, 4)
optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
for step in steps(model, optimizer, 1000):
    print(step)
""",
    )
    assert finished.output is not None
    assert [step.mark for step in process.steps] == [None] * 4 + ["profiled"] * 3
    assert finished.output.split() == [str(step) for step in range(6)]  # and nothing else
    profile = process.profile
    assert profile is not None
    assert profile.flops_by_dtype == {"float32": 2 * 2 * 8 * 16 * 4}
    assert profile.operators is not None
    calls = {o.name: o.calls for o in profile.operators if o.phase != "optimizer"}
    assert calls["aten::addmm"] == calls["aten::mm"] == 1
    assert profile.facts is not None
    assert profile.facts.optimizers == (
        OptimizerFacts(class_="SGD", tensors=2, elements=68, fused=False, can_fuse=True),
    )
    assert profile.facts.parameters == ParameterFacts(
        elements_by_dtype={"float32": 68},
        elements_by_device={"cpu": 68},
        denormal_share=0.0,
        unoptimized_elements=0,
    )
    assert [event.what for event in process.events] == ["stopped"]


def test_an_optimizer_step_counts_once_for_all_its_micro_batches(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    process, _ = run(
        tmp_path,
        monkeypatch,
        """
model = nn.Linear(16, 4)
optimizer = torch.optim.Adam(model.parameters(), foreach=True)
for number in range(1000):
    model(torch.randn(8, 16)).sum().backward()
    if number % 5 == 4:
        optimizer.step()
        optimizer.zero_grad()
""",
    )
    assert process.micro_batches == 5
    profile = process.profile
    assert profile is not None
    assert profile.operators is not None
    calls = {o.name: o.calls for o in profile.operators}
    assert calls["aten::addmm"] == pytest.approx(1)
    assert calls["aten::_foreach_addcdiv_"] == pytest.approx(1 / 5)


@pytest.mark.parametrize(
    ("updates", "weights"),
    [
        ([False, True, False, False, False], {1: 1 / 8, 2: 7 / 16, 3: 7 / 16}),
        ([False, False, False, False], {1: 1 / 2, 2: 1 / 2}),
        ([True, True], {0: 1 / 2, 1: 1 / 2}),
    ],
)
def test_steps_with_and_without_an_optimizer_step_are_trimmed_apart(
    updates: list[bool], weights: dict[int, float]
) -> None:
    durations_us = [1.0, 50.0, 2.0, 3.0, 4.0][: len(updates)]
    if not any(updates):
        durations_us[1] = 2.5
    assert _weigh_steps(durations_us, updates, 8) == pytest.approx(weights)


def test_evaluation_in_the_window_is_not_counted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    process, _ = run(
        tmp_path,
        monkeypatch,
        """
model = nn.Linear(16, 4)
optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
for step in steps(model, optimizer, 1000):
    model.eval()
    with torch.no_grad():
        model(torch.randn(64, 16))
    model.train()
""",
    )
    assert process.profile is not None
    assert process.profile.flops_by_dtype == {"float32": 2 * 2 * 8 * 16 * 4}


def test_a_program_with_a_profiler_of_its_own_keeps_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    process, _ = run(
        tmp_path,
        monkeypatch,
        """
model = nn.Linear(16, 4)
optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]):
    for step in steps(model, optimizer, 1000):
        pass
""",
    )
    assert [e.subject for e in process.events if e.what == "skipped"] == ["profile"]
    assert process.profile is not None
    assert process.profile.operators is None
    assert process.profile.flops_by_dtype == {"float32": 2 * 2 * 8 * 16 * 4}


def test_a_compiled_program_is_counted_in_full(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    process, _ = run(
        tmp_path,
        monkeypatch,
        """
model = torch.compile(nn.Linear(16, 4), backend="aot_eager")
optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
for step in steps(model, optimizer, 1000):
    pass
""",
    )
    assert not [event for event in process.events if event.what == "failed"]
    assert process.profile is not None
    assert process.profile.flops_by_dtype == {"float32": 2 * 2 * 8 * 16 * 4}


def test_facts_of_a_convolutional_program(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    process, _ = run(
        tmp_path,
        monkeypatch,
        """
from torch.utils.data import DataLoader, TensorDataset
class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 4, 3), nn.Conv2d(4, 4, 3, groups=4)
        self.head = nn.Linear(4, 2)
    def forward(self, x):
        return self.head(self.b(self.a(x)).mean((2, 3)))
model = Net().to(memory_format=torch.channels_last)
with torch.no_grad():
    model.head.weight.fill_(1e-40)
optimizer = torch.optim.RMSprop(model.parameters(), lr=1e-50)
loader = DataLoader(TensorDataset(torch.randn(64, 3, 8, 8)), batch_size=2)
for epoch in range(100):
    for (x,) in loader:
        optimizer.zero_grad()
        model(x).sum().backward()
        optimizer.step()
""",
    )
    assert process.profile is not None
    facts = process.profile.facts
    assert facts is not None
    assert facts.modules.roots == ("Net",)
    assert facts.modules.kinds["Conv2d"] == 2
    assert facts.modules.convolutions_channels_last == 1
    assert facts.modules.convolutions_grouped == 1
    assert facts.optimizers is not None
    assert facts.optimizers[0].can_fuse is False
    assert facts.parameters.denormal_share == pytest.approx(8 / 162)
    assert facts.loaders is not None
    (loader,) = facts.loaders
    assert loader.dataset == "TensorDataset"
    assert (loader.workers, loader.batch_size) == (0, 2)
    assert loader.settings == ("batched", "cache", "prefetch", "workers")


def test_the_window_writes_nothing_to_the_programs_stderr(tmp_path: Path) -> None:
    script = tmp_path / "program.py"
    script.write_text(
        PREAMBLE
        + """
model = nn.Linear(16, 4)
for step in steps(model, torch.optim.SGD(model.parameters(), lr=0.1), 1000):
    pass
"""
    )
    Request(stop_steps=2, profile_steps=2).write(tmp_path)
    completed = subprocess.run(
        [sys.executable, "-c", _START + f"import runpy; runpy.run_path({str(script)!r})"],
        env={**os.environ, "FLATOUT_RUN": str(tmp_path)},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert (completed.returncode, completed.stdout, completed.stderr) == (0, "", "")
    process = read_run(tmp_path).main
    assert process is not None
    assert process.profile is not None


_START = "import torch, flatout.agent; flatout.agent.activate(); "


@pytest.mark.parametrize("steps", range(6, 13))
def test_a_program_that_ends_within_the_window_ends_as_ever(tmp_path: Path, steps: int) -> None:
    program = f"""
import torch
from flatout.agent import activate
activate()
net = torch.nn.Linear(4, 4)
for _ in range({steps}):
    net(torch.randn(2, 4)).sum().backward()
    net.zero_grad()
print("over")
"""
    Request(stop_steps=6, profile_steps=3).write(tmp_path)
    script = tmp_path / "program.py"
    script.write_text(program)
    completed = forking.run(
        [sys.executable, script], env={**os.environ, RUN_VARIABLE: str(tmp_path)}
    )
    assert (completed.returncode, completed.stderr) == (0, "")
    assert completed.stdout in ("over\n", "")
