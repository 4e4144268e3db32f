"""What a program may do with the tensors that went into an operator, or came out of it, it may do
under the knobs that replace the operator as well, with the right gradients."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn import functional as F

from flatout import knobs
from flatout.intercept.host import Host
from flatout.kernels import find_compiler
from tests.hosts import host_in

pytestmark = pytest.mark.skipif(find_compiler() is None, reason="there is no C compiler")

Operator = Callable[[dict[str, torch.Tensor]], torch.Tensor]


def leaves(**shapes: tuple[int, ...]) -> dict[str, torch.Tensor]:
    """Random tensors that require gradients."""
    generator = torch.Generator().manual_seed(0)
    return {
        name: torch.randn(shape, generator=generator).requires_grad_()
        for name, shape in shapes.items()
    }


def attention(p: float, rows: int, mask: bool = False) -> tuple[Operator, dict[str, torch.Tensor]]:
    """Attention of heads that are views of rows, as of ``nn.MultiheadAttention``."""

    def operator(given: dict[str, torch.Tensor]) -> torch.Tensor:
        heads = [given[name].unflatten(2, (2, 8)).transpose(1, 2) for name in "qkv"]
        return F.scaled_dot_product_attention(*heads, given.get("mask"), dropout_p=p)

    given = leaves(**dict.fromkeys("qkv", (2, rows, 16)))
    if mask:
        given["mask"] = torch.randn(rows, rows, generator=torch.Generator().manual_seed(1))
    return operator, given


def recurrent(
    bidirectional: bool, batch_first: bool, layers: int
) -> tuple[Operator, dict[str, torch.Tensor]]:
    torch.manual_seed(0)
    unit = torch.nn.GRU(6, 8, layers, batch_first=batch_first, bidirectional=bidirectional)
    given = leaves(x=(5, 5, 6), first=((1 + bidirectional) * layers, 5, 8))
    given |= dict(unit.named_parameters())

    def operator(given: dict[str, torch.Tensor]) -> torch.Tensor:
        weights = [given[name] for name, _ in unit.named_parameters()]
        options = (True, layers, 0.0, True, bidirectional, batch_first)
        return torch.gru(given["x"], given["first"], weights, *options)[0]

    return operator, given


def dropout(given: dict[str, torch.Tensor]) -> torch.Tensor:
    return F.dropout(given["x"], 0.3, True)


def tanh(given: dict[str, torch.Tensor]) -> torch.Tensor:
    return torch.tanh(given["x"])


def gelu(given: dict[str, torch.Tensor]) -> torch.Tensor:
    return F.gelu(given["x"], approximate="tanh")


def cross_entropy(given: dict[str, torch.Tensor]) -> torch.Tensor:
    return F.cross_entropy(given["x"], given["targets"], reduction="none")


def convolution(transposed: bool) -> tuple[Operator, dict[str, torch.Tensor]]:
    def operator(given: dict[str, torch.Tensor]) -> torch.Tensor:
        if transposed:
            return F.conv_transpose2d(given["x"], given["weight"], None, 2, 1)
        return F.conv2d(given["x"], given["weight"])

    return operator, leaves(x=(2, 4, 4, 4), weight=(4, 3, 4, 4) if transposed else (3, 4, 4, 4))


CASES: dict[str, tuple[str, tuple[Operator, dict[str, torch.Tensor]]]] = {
    "attention": ("attention=fast", attention(0.0, 24)),
    "attention with dropout": ("attention=fast", attention(0.25, 24)),
    "attention with dropout and mask": ("attention=fast", attention(0.25, 24, mask=True)),
    "long attention with dropout": ("attention=fast", attention(0.25, 520)),
    "gru": ("recurrent=fused", recurrent(False, False, 1)),
    "gru, batch first": ("recurrent=fused", recurrent(False, True, 2)),
    "gru, both directions": ("recurrent=fused", recurrent(True, True, 1)),
    "dropout": ("random=fast", (dropout, leaves(x=(64, 520)))),
    "tanh": ("elementwise=fast", (tanh, leaves(x=(64, 520)))),
    "gelu": ("elementwise=fast", (gelu, leaves(x=(64, 520)))),
    "cross entropy": (
        "cross_entropy=fused",
        (cross_entropy, leaves(x=(64, 4100)) | {"targets": torch.arange(64)}),
    ),
    "convolution": ("convolution=recast", convolution(False)),
    "transposed convolution": ("convolution=recast", convolution(True)),
}

OF_OUTPUT: dict[str, Callable[[torch.Tensor], torch.Tensor | None]] = {
    "nothing": lambda out: None,
    "add": lambda out: out.add_(1),
    "relu": lambda out: F.relu(out, inplace=True),
    "mul": lambda out: out.mul_(2),
    "masked_fill": lambda out: out.masked_fill_(torch.zeros_like(out, dtype=torch.bool), 0.0),
    "part": lambda out: out[..., -1].zero_() * 0 + 1,
    "data": lambda out: out.data.mul_(3) * 0 + 1,
    "transpose": lambda out: out.transpose_(0, -1),
}
"""What is done with the output; the mean of the result, if any, is multiplied into the loss."""


@pytest.fixture
def host(tmp_path: Path) -> Host:
    return host_in(tmp_path)


def turned(host: Host, setting: str) -> Callable[[], object]:
    name, _, value = setting.partition("=")
    return knobs.get(name).apply(host, value)


def gradients(
    operator: Operator, given: dict[str, torch.Tensor], act: Callable[..., Any], on: str
) -> list[torch.Tensor] | str:
    """The output and the gradients of a program, or the error that it gets."""
    torch.manual_seed(3)
    own = {
        name: (value * 1 if value.is_floating_point() else value.clone())
        for name, value in given.items()
    }
    out = operator(own)
    try:
        done = act(out) if on == "output" else act(own[on])
        is_output = done is None or done is out or on != "output"
        result = out if is_output else out * done.mean().detach()
        wanted = [value for value in given.values() if value.requires_grad]
        loss = (result * torch.linspace(0.5, 1.5, result.numel()).view(result.shape)).sum()
        return [out.detach().clone(), *torch.autograd.grad(loss, wanted)]
    except RuntimeError as error:
        if "inplace" not in str(error):
            raise
        return "modified"


@pytest.mark.parametrize("case", CASES)
def test_outputs_may_be_written(host: Host, case: str) -> None:
    setting, (operator, given) = CASES[case]
    has_dropout = "dropout" in case
    for name, act in OF_OUTPUT.items():
        bare = gradients(operator, given, act, "output")
        undo = turned(host, setting)
        try:
            found = gradients(operator, given, act, "output")
        finally:
            undo()
        if bare == "modified":
            continue
        assert found != "modified", name
        assert isinstance(found, list)
        assert isinstance(bare, list)
        if not has_dropout:
            for a, b in zip(found, bare, strict=True):
                torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4, msg=name)
        elif name in ("add", "data", "masked_fill"):  # which leave the gradients as they are
            undo = turned(host, setting)
            untouched = gradients(operator, given, lambda out: None, "output")
            undo()
            assert all(torch.equal(a, b) for a, b in zip(found[1:], untouched[1:], strict=True))  # type: ignore[arg-type]


@pytest.mark.parametrize("case", CASES)
def test_inputs_may_be_written_where_torch_does_not_read_them_again(host: Host, case: str) -> None:
    setting, (operator, given) = CASES[case]
    for name in given:
        bare = gradients(operator, given, lambda x: x.zero_(), name)
        undo = turned(host, setting)
        try:
            found = gradients(operator, given, lambda x: x.zero_(), name)
            untouched = gradients(operator, given, lambda out: None, "output")
        finally:
            undo()
        if bare == "modified":
            continue
        assert found != "modified", name
        for a, b in zip(found, untouched, strict=True):
            assert torch.equal(a, b), name  # type: ignore[arg-type]


def traits(out: torch.Tensor) -> dict[str, Any]:
    return {
        "shape": out.shape,
        "strides": out.stride(),
        "offset": out.storage_offset(),
        "elements": out.untyped_storage().nbytes(),
        "type": out.dtype,
        "is a view": out._is_view(),
        "requires a gradient": out.requires_grad,
        "is a leaf": out.is_leaf,
    }


@pytest.mark.parametrize("case", CASES)
def test_outputs_are_as_those_of_torch(host: Host, case: str) -> None:
    setting, (operator, given) = CASES[case]

    def look() -> list[Any]:
        torch.manual_seed(3)
        found: list[Any] = []
        out = operator(given)
        found.append(traits(out))
        found.append(out.clone().detach_().requires_grad)
        out.retain_grad()
        seen: list[int] = []
        out.register_hook(lambda gradient: seen.append(gradient.numel()))
        out.sum().backward()
        found += [seen, out.grad is not None and out.grad.stride()]
        out = operator(given)
        out.detach_()
        found.append(traits(out))
        with torch.no_grad():
            first, second = operator(given), operator(given)
            found += [traits(first), first.data_ptr() == second.data_ptr()]
            kept = first.clone()
            second.zero_()
            found.append(torch.equal(first, kept))
        for value in given.values():
            value.grad = None
        return found

    bare = look()
    undo = turned(host, setting)
    try:
        found = look()
    finally:
        undo()
    assert found == bare


def test_the_second_derivative_of_a_loss_whose_logits_are_gone_is_an_error(
    host: Host,
) -> None:
    undo = turned(host, "cross_entropy=fused")
    try:
        x = torch.randn(64, 4100, requires_grad=True)
        logits = x * 1
        loss = F.cross_entropy(logits, torch.arange(64))
        logits.zero_()
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            torch.autograd.grad(loss, x, create_graph=True)
    finally:
        undo()
