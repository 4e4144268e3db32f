"""The knob ``cross_entropy``: held against float64, and what it leaves to torch."""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn import functional as F

from flatout import kernels, knobs
from flatout.intercept.host import Host
from flatout.knobs.cross_entropy import cpu
from tests.hosts import host_in

pytestmark = pytest.mark.skipif(kernels.find_compiler() is None, reason="there is no compiler")

ROWS, CLASSES = 37, 1234


@pytest.fixture
def host(tmp_path: Path) -> Host:
    return host_in(tmp_path)


@pytest.fixture(autouse=True)
def any_size(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu, "FEWEST_LOGITS", 1)


@pytest.fixture
def fused(host: Host) -> Iterator[None]:
    undo = knobs.get("cross_entropy").apply(host, "fused")
    yield
    undo()
    assert not host.applied.failures


def made(rows: int = ROWS, classes: int = CLASSES) -> tuple[torch.Tensor, torch.Tensor]:
    torch.manual_seed(0)
    return 5 * torch.randn(rows, classes), torch.randint(classes, (rows,))


def results(
    logits: torch.Tensor, targets: torch.Tensor, **options: Any
) -> tuple[torch.Tensor, torch.Tensor]:
    """The loss, and the gradient of the logits for a factor of 0.5."""
    logits = logits.detach().requires_grad_()
    loss = F.cross_entropy(logits, targets, **options)
    (gradient,) = torch.autograd.grad(0.5 * loss.sum(), logits)
    return loss, gradient


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"reduction": "sum"},
        {"reduction": "none"},
        {"label_smoothing": 0.1},
        {"label_smoothing": 0.1, "reduction": "none", "ignore_index": 3},
        {"ignore_index": 3},
    ],
    ids=str,
)
@pytest.mark.parametrize("shape", [(ROWS, CLASSES), (1, 2), (5, 512), (300, 7)])
def test_as_in_float64(fused: None, options: dict[str, Any], shape: tuple[int, int]) -> None:
    logits, targets = made(*shape)
    if "ignore_index" in options and shape[0] > 1:
        targets[::4] = options["ignore_index"]
    found = results(logits, targets, **options)
    expected = results(logits.double(), targets, **options)
    for one, right in zip(found, expected, strict=True):
        size = right.abs().max().item()
        torch.testing.assert_close(one.double(), right, atol=1e-6 * size, rtol=1e-5)


def test_under_autocast_the_loss_is_that_of_the_rounded_logits(fused: None) -> None:
    logits, targets = made()
    rounded = logits.bfloat16()
    with torch.autocast("cpu", torch.bfloat16):
        loss, gradient = results(rounded, targets)
    right_loss, right_gradient = results(rounded.double(), targets)
    assert loss.dtype == torch.float32
    assert gradient.dtype == torch.bfloat16
    torch.testing.assert_close(loss.double(), right_loss, atol=0, rtol=1e-6)
    torch.testing.assert_close(gradient.double(), right_gradient, atol=1e-9, rtol=2**-8)


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_what_is_not_finite_comes_out_as_such(fused: None, value: float) -> None:
    logits, targets = made()
    logits[3, 5] = value
    losses, gradient = results(logits, targets, reduction="none")
    assert losses.isfinite().sum() == ROWS - 1
    assert gradient.isfinite().all(1).sum() == ROWS - 1
    logits[3, 5] = -torch.inf
    assert all(x.isfinite().all() for x in results(logits, targets))


@pytest.mark.parametrize("offset", [30.0, 1e4])
def test_large_logits_lose_nothing(fused: None, offset: float) -> None:
    logits, targets = made()
    logits = (logits + offset).bfloat16().float()  # so that the offset itself rounds nothing
    found, expected = results(logits, targets), results(logits.double(), targets)
    for one, right in zip(found, expected, strict=True):
        torch.testing.assert_close(one.double(), right, atol=1e-9, rtol=1e-4)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_whatever_the_default_dtype(fused: None, dtype: torch.dtype) -> None:
    logits, targets = made()
    expected = results(logits, targets)
    torch.set_default_dtype(dtype)
    try:
        found = results(logits, targets)
    finally:
        torch.set_default_dtype(torch.float32)
    assert all(torch.equal(one, other) for one, other in zip(found, expected, strict=True))


def test_a_factor_is_not_rounded_before_it_is_used(fused: None) -> None:
    logits, targets = made()
    rounded = logits.bfloat16().requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        loss = F.cross_entropy(rounded, targets)
    (gradient,) = torch.autograd.grad(loss / 3, rounded)
    exact = rounded.detach().double().requires_grad_()
    (right,) = torch.autograd.grad(F.cross_entropy(exact, targets) / 3, exact)
    # Those of the targets are all alike, and so is their rounding.
    others = torch.ones_like(right, dtype=torch.bool).scatter_(1, targets[:, None], False)
    found, expected = (x.double()[others].sum().item() for x in (gradient, right))
    assert found == pytest.approx(expected, rel=5e-4)


def test_a_gradient_that_the_program_changes_is_its_own(fused: None) -> None:
    logits, targets = made()
    loss = F.cross_entropy(logits.requires_grad_(), targets)
    (gradient,) = torch.autograd.grad(loss, logits, retain_graph=True)
    expected = gradient.clone()
    gradient /= gradient.norm()
    loss.backward()
    torch.testing.assert_close(logits.grad, expected)


def test_a_batch_of_factors(fused: None) -> None:
    logits, targets = made(4, 6)
    losses = F.cross_entropy(logits.requires_grad_(), targets, reduction="none")
    total = F.cross_entropy(logits, targets)
    found = torch.autograd.grad(losses, logits, torch.eye(4), is_grads_batched=True)[0]
    again = torch.autograd.grad(total, logits, torch.tensor([1.0, 3.0]), is_grads_batched=True)[0]
    exact = logits.detach().double().requires_grad_()
    (right,) = torch.autograd.grad(F.cross_entropy(exact, targets), exact)
    torch.testing.assert_close(found.sum(0).double(), 4 * right, atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(again[1].double(), 3 * right, atol=1e-6, rtol=1e-5)


def test_what_is_kept_of_a_loss_holds_no_logits(fused: None) -> None:
    head, targets = torch.nn.Linear(8, CLASSES), torch.randint(CLASSES, (ROWS,))
    logits = head(torch.randn(ROWS, 8))
    is_there = weakref.ref(logits)
    loss = F.cross_entropy(logits, targets)
    del logits
    loss.backward()
    assert is_there() is None


def test_a_batch_of_ignored_targets_has_no_mean(fused: None) -> None:
    logits, targets = made()
    loss, gradient = results(logits, targets.fill_(-100))
    assert loss.isnan()
    assert not gradient.any()


def test_a_target_that_is_no_class_is_torchs_error(fused: None) -> None:
    logits, targets = made()
    targets[2] = CLASSES
    with pytest.raises(IndexError, match=f"Target {CLASSES} is out of bounds"):
        F.cross_entropy(logits, targets)


def test_gradients_of_gradients(fused: None) -> None:
    logits, targets = made(4, 6)

    def penalty(logits: torch.Tensor) -> torch.Tensor:
        logits = logits.detach().requires_grad_()
        loss = F.cross_entropy(logits, targets, label_smoothing=0.1)
        (gradient,) = torch.autograd.grad(loss, logits, create_graph=True)
        (second,) = torch.autograd.grad(gradient.square().sum(), logits)
        return second

    torch.testing.assert_close(penalty(logits).double(), penalty(logits.double()))


def test_backward_twice_gives_the_same(fused: None) -> None:
    logits, targets = made()
    logits.requires_grad_()
    loss = F.cross_entropy(logits, targets)
    loss.backward(retain_graph=True)
    assert logits.grad is not None
    first = logits.grad.clone()
    loss.backward()
    torch.testing.assert_close(logits.grad, 2 * first)


def test_the_gradient_is_gone_when_the_backward_pass_is_over(fused: None) -> None:
    logits, targets = made()
    loss = F.cross_entropy(logits.requires_grad_(), targets)
    loss.backward()
    with pytest.raises(RuntimeError, match="backward through the graph a second time"):
        loss.backward()


def test_logits_may_be_changed_after_the_loss(fused: None) -> None:
    logits, targets = made()
    expected = results(logits, targets)[1]
    head = logits.clone().requires_grad_()
    again = head * 1
    loss = F.cross_entropy(again, targets)
    with torch.no_grad():
        again.zero_()
    (gradient,) = torch.autograd.grad(0.5 * loss, head)
    torch.testing.assert_close(gradient, expected)


LEFT = {
    "class weights": lambda logits, targets: F.cross_entropy(
        logits, targets, weight=torch.linspace(0.1, 1, CLASSES)
    ),
    "probabilities as targets": lambda logits, _: F.cross_entropy(logits, logits.softmax(1)),
    "float64": lambda logits, targets: F.cross_entropy(logits.double(), targets),
    "images": lambda logits, targets: F.cross_entropy(logits[None].transpose(1, 2), targets[None]),
    "bfloat16 without autocast": lambda logits, targets: F.cross_entropy(
        logits.bfloat16(), targets
    ),
}


@pytest.mark.parametrize("what", LEFT)
def test_left_to_torch(host: Host, what: str) -> None:
    logits, targets = made()
    expected = LEFT[what](logits, targets)
    undo = knobs.get("cross_entropy").apply(host, "fused")
    found = LEFT[what](logits, targets)
    undo()
    assert torch.equal(found, expected)
    assert not host.applied.failures


def test_it_is_used_and_undone(host: Host) -> None:
    logits, targets = made()
    logits.requires_grad_()

    def node() -> str:
        return str(F.cross_entropy(logits, targets).grad_fn)

    own = node()
    undo = knobs.get("cross_entropy").apply(host, "fused")
    assert "CrossEntropy" in node()
    undo()
    assert node().split()[0] == own.split()[0]


def test_small_matrices_are_left_to_torch(host: Host, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu, "FEWEST_LOGITS", ROWS * CLASSES + 1)
    logits, targets = made()
    undo = knobs.get("cross_entropy").apply(host, "fused")
    loss = F.cross_entropy(logits.requires_grad_(), targets)
    undo()
    assert "CrossEntropy" not in str(loss.grad_fn)


def test_torch_takes_over_when_it_fails(host: Host, monkeypatch: pytest.MonkeyPatch) -> None:
    logits, targets = made()
    expected = F.cross_entropy(logits, targets)
    undo = knobs.get("cross_entropy").apply(host, "fused")
    monkeypatch.setattr(cpu, "KernelArguments", None)
    found = F.cross_entropy(logits, targets)
    undo()
    assert torch.equal(found, expected)
    assert "not callable" in host.applied.failures["cross_entropy"]
