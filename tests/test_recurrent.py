"""The knob ``recurrent``: held against float64, and what it leaves to torch."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn.utils.rnn import pack_padded_sequence

from flatout import kernels, knobs
from flatout.intercept import graph
from flatout.intercept.host import Host
from flatout.knobs.recurrent import cpu
from tests.hosts import host_in

pytestmark = pytest.mark.skipif(kernels.find_compiler() is None, reason="there is no compiler")

Tensors = list[torch.Tensor]


@pytest.fixture
def host(tmp_path: Path) -> Host:
    return host_in(tmp_path)


@pytest.fixture
def fused(host: Host) -> Iterator[None]:
    undo = knobs.get("recurrent").apply(host, "fused")
    yield
    undo()
    assert not host.applied.failures


def made(**options: Any) -> nn.GRU:
    torch.manual_seed(0)
    return nn.GRU(**{"input_size": 5, "hidden_size": 7, **options})


def results(unit: nn.GRU, sequence: torch.Tensor, first: torch.Tensor | None = None) -> Tensors:
    """Outputs, last states and all gradients."""
    torch.manual_seed(1)
    sequence = sequence.detach().requires_grad_()
    inputs = [sequence]
    if first is not None:
        first = first.detach().requires_grad_()
        inputs.append(first)
    output, last = unit(sequence, first)
    loss = output.square().sum() + (3 * last).sin().sum()
    return [output, last, *torch.autograd.grad(loss, [*inputs, *unit.parameters()])]


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"bidirectional": True},
        {"num_layers": 3, "bidirectional": True},
        {"bias": False},
        {"batch_first": True},
        {"hidden_size": 64},
        {"hidden_size": 130, "num_layers": 2},
    ],
    ids=str,
)
@pytest.mark.parametrize("batch", [1, 6, 9])
def test_as_in_float64(fused: None, options: dict[str, Any], batch: int) -> None:
    unit = made(**options)
    sequence = 3 * torch.randn(11, batch, 5)
    if unit.batch_first:
        sequence = sequence.transpose(0, 1)
    directions = 2 if unit.bidirectional else 1
    first = torch.randn(unit.num_layers * directions, batch, unit.hidden_size)
    found = results(unit, sequence, first)
    expected = results(made(**options).double(), sequence.double(), first.double())
    for one, right in zip(found, expected, strict=True):
        size = right.abs().max().item()
        torch.testing.assert_close(one.double(), right, atol=3e-6 * max(1, size), rtol=1e-5)


def test_from_saturated_to_tiny_numbers(fused: None) -> None:
    for scale in (1e-6, 1e-2, 1e2, 1e5):
        unit = made()
        sequence = scale * torch.randn(9, 4, 5)
        found, expected = results(unit, sequence), results(made().double(), sequence.double())
        for one, right in zip(found, expected, strict=True):
            size = max(1.0, right.abs().max().item())
            torch.testing.assert_close(one.double(), right, atol=1e-5 * size, rtol=1e-3)


def test_what_is_not_a_number_comes_out_as_such(fused: None) -> None:
    sequence = torch.zeros(4, 2, 5)
    sequence[2, 1, 0] = torch.nan
    output, _ = made()(sequence)
    assert output[:, 0].isfinite().all()
    assert output[:2, 1].isfinite().all()
    assert output[2:, 1].isnan().all()


def test_it_is_used_and_undone(host: Host) -> None:
    unit, sequence = made(), torch.randn(4, 2, 5)

    def node() -> str:
        return " ".join(str(node) for node, _ in graph.edges([unit(sequence)[0]]))

    own = node()
    undo = knobs.get("recurrent").apply(host, "fused")
    assert "Recurrence" in node()
    undo()
    assert "Recurrence" not in own + node()


def test_dropout_between_layers_draws_as_torch_does(host: Host) -> None:
    unit = made(num_layers=3, dropout=0.4)
    sequence = torch.randn(6, 4, 5)
    expected = results(unit, sequence), torch.rand(2)
    undo = knobs.get("recurrent").apply(host, "fused")
    found = results(unit, sequence), torch.rand(2)
    undo()
    assert torch.equal(found[1], expected[1])
    for one, other in zip(found[0], expected[0], strict=True):
        torch.testing.assert_close(one, other, atol=1e-5, rtol=1e-4)


def test_the_same_with_any_number_of_threads(fused: None) -> None:
    def run(threads: int) -> Tensors:
        before = torch.get_num_threads()
        torch.set_num_threads(threads)
        try:
            return results(made(), torch.randn(6, 9, 5, generator=torch.manual_seed(2)))
        finally:
            torch.set_num_threads(before)

    for one, two in zip(run(1), run(2), strict=True):
        torch.testing.assert_close(one, two, atol=1e-6, rtol=1e-5)


def test_under_autocast_it_computes_in_float32_and_returns_what_torch_would(
    host: Host,
) -> None:
    unit = made()
    sequence = torch.randn(6, 4, 5).bfloat16()
    exact = unit(sequence.float())[0]
    with torch.autocast("cpu", torch.bfloat16):
        dtypes = [x.dtype for x in unit(sequence)]
        undo = knobs.get("recurrent").apply(host, "fused")
        output, last = unit(sequence)
    output.float().sum().backward()
    undo()
    assert [output.dtype, last.dtype] == dtypes
    torch.testing.assert_close(output.float(), exact, atol=5e-3, rtol=1e-2)


def test_inference(fused: None) -> None:
    unit, sequence = made(bidirectional=True), torch.randn(6, 4, 5)
    expected = unit(sequence)[0].detach()
    with torch.no_grad():
        assert torch.equal(unit(sequence)[0], expected)
    with torch.inference_mode():
        assert torch.equal(unit(sequence)[0], expected)


def test_a_gradient_of_the_gradient(host: Host) -> None:
    def penalty() -> torch.Tensor:
        unit = made()
        sequence = torch.randn(4, 3, 5, generator=torch.manual_seed(2)).requires_grad_()
        (gradient,) = torch.autograd.grad(unit(sequence)[0].sum(), sequence, create_graph=True)
        found = torch.autograd.grad(gradient.square().sum(), list(unit.parameters())[:2])
        return torch.cat([x.flatten() for x in found])

    expected = penalty()
    undo = knobs.get("recurrent").apply(host, "fused")
    found = penalty()
    undo()
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-4)


LEFT: dict[str, Callable[[], Any]] = {
    "packed": lambda: made()(pack_padded_sequence(torch.ones(4, 2, 5), [4, 3]))[0].data,
    "float64": lambda: made().double()(torch.ones(4, 2, 5).double())[0],
    "wide": lambda: made(hidden_size=513)(torch.ones(4, 2, 5))[0],
    "an empty batch": lambda: made()(torch.ones(4, 0, 5))[0],
    "torch.func": lambda: torch.func.grad(lambda x: made()(x)[0].sum())(torch.ones(4, 2, 5)),
}


@pytest.mark.parametrize("case", LEFT)
def test_left_to_torch(host: Host, monkeypatch: pytest.MonkeyPatch, case: str) -> None:
    expected = LEFT[case]()
    undo = knobs.get("recurrent").apply(host, "fused")
    monkeypatch.setattr(cpu, "gru", None)
    found = LEFT[case]()
    undo()
    assert torch.equal(found, expected)


def test_mistakes_are_reported_by_torch(fused: None) -> None:
    with pytest.raises(RuntimeError, match="input_size"):
        made()(torch.ones(4, 2, 6))
    with pytest.raises(RuntimeError, match="Expected hidden size"):
        made()(torch.ones(4, 2, 5), torch.ones(1, 3, 7))


def test_a_failure_in_the_backward_pass_is_reported_and_the_gradients_are_there(
    host: Host, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = results(made(), torch.ones(4, 2, 5))
    undo = knobs.get("recurrent").apply(host, "fused")
    monkeypatch.setattr(cpu, "_gradients", None)
    found = results(made(), torch.ones(4, 2, 5))
    undo()
    assert "TypeError" in host.applied.failures["recurrent"]
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, atol=1e-6, rtol=1e-5)
