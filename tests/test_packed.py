"""Weights that are packed once for inference: what they give, and what happens when they change."""

from __future__ import annotations

import ctypes
import gc
import json
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils.flop_counter import FlopCounterMode

from flatout import kernels, knobs
from flatout.intercept.host import Host
from flatout.knobs.precision import autocast, packed
from flatout.knobs.precision.packed import FEWEST_ROWS, MOST_CHANGES, PackedLinear
from tests.hosts import host_in

ROWS = 2 * FEWEST_ROWS

needs_bf16 = pytest.mark.skipif(
    not packed.is_available(), reason="oneDNN multiplies no bfloat16 here"
)


@pytest.fixture
def host(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Host]:
    monkeypatch.setattr(autocast, "SCOUTED", frozenset())  # the passes in float32
    host = host_in(tmp_path)
    host.hooks.install(live=False)
    undo = knobs.get("precision").apply(host, "bf16")
    yield host
    undo()
    host.hooks.remove()


@pytest.fixture
def packings(monkeypatch: pytest.MonkeyPatch) -> list[torch.Tensor]:
    """What was used in the place of weights."""
    used: list[torch.Tensor] = []
    own = packed._packed_linear

    def product(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        used.append(weight)
        return own(x, weight, bias)

    monkeypatch.setattr(packed, "_packed_linear", product)
    return used


def in_bf16(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.detach().to(torch.bfloat16).double()


def assert_right(found: torch.Tensor, net: nn.Linear, x: torch.Tensor) -> None:
    """Against the product of what bfloat16 makes of the factors, rounded once."""
    expected = in_bf16(x) @ in_bf16(net.weight).T
    if net.bias is not None:
        expected += in_bf16(net.bias)
    torch.testing.assert_close(found.double(), expected, rtol=2**-8, atol=1e-5)


@needs_bf16
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("inputs", [(ROWS, 24), (4, ROWS, 24), (3, 2, ROWS, 24)])
@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_products_are_as_exact_as_bfloat16(
    host: Host,
    packings: list[torch.Tensor],
    bias: bool,
    inputs: tuple[int, ...],
    mode: Callable[[], torch.no_grad],
) -> None:
    net, x = nn.Linear(24, 40, bias=bias), torch.randn(inputs)
    with mode():
        for _ in range(2):
            found = net(x)
            assert found.shape == (*inputs[:-1], 40)
            assert_right(found, net, x)
        across = net(x.transpose(0, -2))
        assert_right(across, net, x.transpose(0, -2))
    assert len(packings) == 3
    assert packings[0] is packings[1] is packings[2]


def through_data(net: nn.Linear) -> None:
    net.weight.data.mul_(3)


def signs(net: nn.Linear) -> None:
    net.weight.data.neg_()


def exchanged(net: nn.Linear) -> None:
    net.weight.data = torch.randn(48, 24)
    net.bias.data = torch.randn(48)


def loaded(net: nn.Linear) -> None:
    net.load_state_dict(nn.Linear(24, 40).state_dict())


def by_numpy(net: nn.Linear) -> None:
    net.weight.detach().numpy()[7, 3] += 1


def swapped(net: nn.Linear) -> None:
    weight = net.weight.data
    weight[0], weight[1] = weight[1].clone(), weight[0].clone()


@needs_bf16
@pytest.mark.parametrize("change", [through_data, signs, exchanged, loaded, by_numpy, swapped])
def test_a_weight_that_has_changed_is_packed_again(
    host: Host, packings: list[torch.Tensor], change: Callable[[nn.Linear], None]
) -> None:
    net, x = nn.Linear(24, 40), torch.randn(ROWS, 24)
    with torch.no_grad():
        net(x)
        change(net)
        assert_right(net(x), net, x)
    assert packings[0] is not packings[1]


@needs_bf16
def test_a_weight_that_changes_all_the_time_is_left_to_torch(
    host: Host, packings: list[torch.Tensor]
) -> None:
    net, x = nn.Linear(24, 40), torch.randn(ROWS, 24)
    with torch.no_grad():
        for _ in range(3 * MOST_CHANGES):
            assert_right(net(x), net, x)
            net.weight.data += 1.0
    assert len(packings) == MOST_CHANGES + 1


@needs_bf16
def test_training_is_not_touched(host: Host, packings: list[torch.Tensor]) -> None:
    net, x = nn.Linear(24, 40), torch.randn(ROWS, 24)
    with torch.no_grad():
        net(x)  # as if it only inferred
    assert len(packings) == 1
    net(x).sum().backward()
    assert net.weight.grad is not None
    with torch.no_grad():
        net(x)  # an evaluation pass of a program that trains
        with torch.autocast("cpu", torch.bfloat16):
            net(x)
    assert len(packings) == 1


@needs_bf16
def test_what_it_cannot_take_is_left_to_torch(
    host: Host, packings: list[torch.Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    class Made(nn.Module):
        """Its weight is computed in each pass."""

        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.randn(40, 24))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return nn.functional.linear(x, self.weight / self.weight.norm())

    few, x = torch.randn(FEWEST_ROWS - 1, 24), torch.randn(ROWS, 24)
    net, scattered, to_nothing = nn.Linear(24, 40), nn.Linear(24, 40), nn.Linear(24, 0)
    scattered.weight.data = scattered.weight.data.T.contiguous().T  # rows are not adjacent
    rows = nn.Linear(24, 40, bias=False)
    expected = x @ rows.weight.detach().T
    rows.weight = nn.Parameter(rows.weight.detach().to_sparse_csr())
    nested = torch.nested.nested_tensor([torch.randn(ROWS, 24), torch.randn(3, 24)])
    with torch.no_grad():
        assert_right(net(few), net, few)
        assert_right(scattered(x), scattered, x)
        assert Made()(x).shape == (ROWS, 40)
        assert to_nothing(x).shape == (ROWS, 0)
        assert [len(part) for part in net(nested).unbind()] == [ROWS, 3]
        monkeypatch.setattr(autocast, "SCOUTED", frozenset([1]))
        for _ in range(2):
            torch.testing.assert_close(rows(x), expected, rtol=0.02, atol=0.02)
        with pytest.raises(RuntimeError):
            net(torch.randn(ROWS, 23))
    assert not packings
    assert not host.record.path.exists() or "skipped" not in host.record.path.read_text()


@needs_bf16
def test_what_looks_at_operators_finds_torchs_own(host: Host, packings: list[torch.Tensor]) -> None:
    net, x = nn.Linear(24, 40), torch.randn(ROWS, 24)
    with torch.no_grad():
        net(x)
        with FlopCounterMode(display=False) as counter:
            net(x)
        assert counter.get_total_flops() == 2 * ROWS * 24 * 40
        graph = make_fx(net)(x)
        before = graph(x)
        net.weight.data.mul_(2)
        net.bias.data.zero_()
        assert not torch.equal(graph(x), before)
    assert len(packings) == 1


@needs_bf16
def test_one_packed_weight_serves_other_modes_rows_and_owners(
    host: Host, packings: list[torch.Tensor]
) -> None:
    net, other = nn.Linear(24, 40), nn.Linear(24, 40, bias=False)
    other.weight = net.weight
    for mode in (torch.inference_mode, torch.no_grad):
        for rows in (FEWEST_ROWS, 1000, FEWEST_ROWS + 1):
            x = torch.randn(rows, 24)
            with mode():
                assert_right(net(x), net, x)
                assert_right(other(x), other, x)
    assert len(packings) == 12
    assert len({id(weight) for weight in packings}) == 1


@needs_bf16
def test_weights_can_be_exchanged_by_torch(host: Host) -> None:
    net, x = nn.Linear(24, 40), torch.randn(ROWS, 24)
    torch.__future__.set_swap_module_params_on_conversion(True)
    try:
        with torch.no_grad():
            net(x)
            net.load_state_dict(nn.Linear(24, 40).state_dict())
            assert_right(net(x), net, x)
            net.double()
        assert net.weight.dtype is torch.float64
    finally:
        torch.__future__.set_swap_module_params_on_conversion(False)


@needs_bf16
def test_packed_weights_go_with_their_owners(packings: list[torch.Tensor]) -> None:
    linear = PackedLinear(pytest.fail)
    net, x = nn.Linear(24, 40), torch.randn(ROWS, 24)
    try:
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
            net(x)
            first = weakref.ref(packings.pop())
            net = nn.Linear(24, 48)
            net(x)
            second = weakref.ref(packings.pop())
    finally:
        gc.disable()
        linear.remove()
    try:
        assert first() is None
        assert second() is None
    finally:
        gc.enable()


@needs_bf16
def test_a_traced_module_keeps_its_weights_apart(host: Host) -> None:
    net, x = nn.Sequential(nn.Linear(24, 40)), torch.randn(ROWS, 24)
    with torch.no_grad():
        net(x)
        traced = torch.jit.trace(net, x)
    assert "mkldnn" not in str(traced.inlined_graph)


@needs_bf16
def test_undone_it_leaves_nothing(tmp_path: Path, packings: list[torch.Tensor]) -> None:
    host = host_in(tmp_path)
    host.hooks.install(live=False)
    try:
        net, x = nn.Linear(24, 40), torch.randn(ROWS, 24)
        with torch.no_grad():
            before = net(x)
            undo = knobs.get("precision").apply(host, "bf16")
            net(x)  # which shows what it is made of
            net(x)
            undo()
            assert len(packings) == 1
            assert torch.equal(net(x), before)
            with torch.autocast("cpu", torch.bfloat16):
                net(x)
            assert len(packings) == 1
    finally:
        host.hooks.remove()


@needs_bf16
def test_a_failure_goes_torchs_way_and_leaves_precision_on(
    host: Host, monkeypatch: pytest.MonkeyPatch
) -> None:
    own = packed._packed_linear
    monkeypatch.setattr(packed, "_packed_linear", lambda x, *rest: own(x[:, 1:], *rest))
    net, x = nn.Linear(24, 40), torch.randn(ROWS, 24)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        expected = net(x).float()
    with torch.no_grad():
        for _ in range(3):
            assert torch.equal(net(x), expected)
    assert not host.applied.failures
    host.record.flush()
    lines = map(json.loads, host.record.path.read_text().splitlines())
    *_, event = (line for line in lines if line["kind"] == "event")
    assert event["what"] == "skipped"
    assert "weights are cast in each call: RuntimeError: " in event["why"]
    assert "Traceback" in event["traceback"]


@needs_bf16
def test_without_a_compiler_weights_are_cast(
    host: Host, packings: list[torch.Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    def load(name: str) -> ctypes.CDLL:
        raise kernels.KernelError("there is no C compiler")

    monkeypatch.setattr(kernels, "load", load)
    net, x = nn.Linear(24, 40), torch.randn(ROWS, 24)
    with torch.no_grad():
        assert_right(net(x), net, x)
    host.record.flush()
    why = "weights are cast in each call: there is no C compiler"
    assert why in host.record.path.read_text()
    assert not packings


SIZES = [0, 1, 7, 8, 255, 256, 257, 65_535, 65_536, 65_537, 1_000_003]


@pytest.fixture(scope="module")
def fingerprint() -> Callable[[torch.Tensor, int], int]:
    function = kernels.load("fingerprint").fingerprint
    function.restype = ctypes.c_uint64
    function.argtypes = [ctypes.c_void_p, ctypes.c_int64, ctypes.c_int]
    return lambda memory, threads: function(memory.data_ptr(), memory.numel(), threads)


@pytest.mark.parametrize("size", SIZES)
def test_a_fingerprint_tells_every_byte(
    fingerprint: Callable[[torch.Tensor, int], int], size: int
) -> None:
    memory = torch.randint(256, (size,), dtype=torch.uint8)
    first = fingerprint(memory, 1)
    assert fingerprint(memory, 2) == fingerprint(memory.clone(), 3) == first
    seen = {first}
    places = {0, size // 3, size // 2, size - 1} if size else set()
    for place in places:
        for bit in range(8):
            memory[place] ^= 1 << bit
            seen.add(fingerprint(memory, 2))
            memory[place] ^= 1 << bit
    assert len(seen) == 1 + 8 * len(places)
    assert fingerprint(memory, 2) == first


def test_a_fingerprint_tells_changes_that_would_cancel(
    fingerprint: Callable[[torch.Tensor, int], int],
) -> None:
    weight = torch.zeros(4096)
    weight[::3] = 1.0
    changed = [weight, weight.neg(), weight.roll(1), weight.flip(0), weight[:-1].clone()]
    for stride in (1, 2, 32, 64, 128, 512):  # signs, the highest bits of words
        for count in (2, 3, 4):
            changed.append(weight.clone())
            changed[-1][1 : 1 + count * stride : stride] *= -1.0
    contents = {one.numpy().tobytes() for one in changed}
    assert len({fingerprint(one.view(torch.uint8), 1) for one in changed}) == len(contents)
