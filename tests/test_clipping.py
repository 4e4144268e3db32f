"""The knob ``clipping``: the same norm and the same gradients, in one pass."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn.utils import clip_grad_norm_, clip_grads_with_norm_, get_total_norm

from flatout import kernels, knobs
from flatout.intercept.host import Host
from flatout.knob import Facts
from flatout.knobs import clipping
from tests.hosts import host_in

pytestmark = pytest.mark.skipif(kernels.find_compiler() is None, reason="there is no compiler")

SHAPES = ((300, 400), (7,), (1,), (64, 3, 3, 3), (0,), (100_003,))


@pytest.fixture
def host(tmp_path: Path) -> Host:
    return host_in(tmp_path)


@pytest.fixture
def onepass(host: Host) -> Iterator[None]:
    undo = knobs.get("clipping").apply(host, "onepass")
    yield
    undo()
    assert not host.applied.failures


def parameters(dtype: torch.dtype = torch.float32) -> list[torch.nn.Parameter]:
    generator = torch.Generator().manual_seed(0)
    made = [torch.nn.Parameter(torch.zeros(shape, dtype=dtype)) for shape in SHAPES]
    for parameter in made[:-1]:
        parameter.grad = torch.randn(parameter.shape, generator=generator).to(dtype)
    return made


def calls_of(run: Callable[[], Any]) -> set[str]:
    activities = [torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=activities) as profiled:
        run()
    return {event.key for event in profiled.key_averages()}


def clipped(gradients: Callable[[], list[torch.Tensor]], **options: Any) -> list[Any]:
    """The norm and the gradients, or the error."""
    made = [torch.nn.Parameter(torch.zeros(grad.shape)) for grad in gradients()]
    for parameter, grad in zip(made, gradients(), strict=True):
        parameter.grad = grad
    try:
        norm = clip_grad_norm_(made, **options)
    except RuntimeError as error:
        return [str(error)]
    return [norm, *(parameter.grad for parameter in made if parameter.grad is not None)]


def spoiled(value: float) -> list[torch.Tensor]:
    grads = [torch.ones(300, 300), torch.ones(7)]
    grads[0][3, 3] = value
    return grads


@pytest.mark.parametrize("error_if_nonfinite", [False, True])
@pytest.mark.parametrize("limit", [1.0, 0.0, -1.0, 1e9, torch.inf, torch.nan])
@pytest.mark.parametrize("value", [1.0, torch.inf, -torch.inf, torch.nan, 1e18, 1e20, 1e-25, 3e38])
def test_norms_that_are_not_finite_or_overflow_are_torchs(
    host: Host, value: float, limit: float, error_if_nonfinite: bool
) -> None:
    options = {"max_norm": limit, "error_if_nonfinite": error_if_nonfinite}
    expected = clipped(lambda: spoiled(value), **options)
    undo = knobs.get("clipping").apply(host, "onepass")
    found = clipped(lambda: spoiled(value), **options)
    undo()
    assert not host.applied.failures
    assert len(found) == len(expected)
    for mine, theirs in zip(found, expected, strict=True):
        if isinstance(theirs, str):
            assert mine == theirs
        else:
            torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=0.0, equal_nan=True)
            assert (mine._version > 0) == (theirs._version > 0)


@pytest.mark.parametrize("kind", ["the same", "in part", "a lazy sign"])
def test_gradients_that_are_not_their_memory_alone_are_torchs(host: Host, kind: str) -> None:
    def gradients() -> list[torch.Tensor]:
        flat = torch.arange(150_000.0)
        if kind == "a lazy sign":
            return [torch.tensor([1.0 + 2.0j]).conj().imag, flat]
        return [flat, flat] if kind == "the same" else [flat[:100_000], flat[50_000:]]

    def shared() -> list[Any]:
        grads = gradients()
        return clipped(lambda: grads, max_norm=1.0)

    expected = shared()
    undo = knobs.get("clipping").apply(host, "onepass")
    found = shared()
    undo()
    for mine, theirs in zip(found, expected, strict=True):
        if isinstance(theirs, str):
            assert mine == theirs
        else:
            torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=0.0)


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("limit", [1.0, 1e6])
def test_norm_and_gradients_as_in_float64(onepass: None, limit: float, threads: int) -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    made, exact = parameters(), parameters(torch.float64)
    for single, double in zip(made, exact, strict=True):
        if single.grad is not None:
            double.grad = single.grad.double()
    versions = [p.grad._version for p in made if p.grad is not None]
    try:
        norm = clip_grad_norm_((p for p in made), limit)
    finally:
        torch.set_num_threads(before)
    expected = clip_grad_norm_(exact, limit)
    assert norm.dtype == torch.float32
    assert norm.item() == pytest.approx(expected.item(), rel=1e-6)
    for single, double in zip(made, exact, strict=True):
        if single.grad is not None and double.grad is not None:
            torch.testing.assert_close(single.grad.double(), double.grad, rtol=1e-6, atol=0)
    is_newer = [p.grad._version > v for p, v in zip(made, versions, strict=False)]
    assert all(is_newer)  # as by torch, whether or not the factor is 1


def test_by_the_public_halves(onepass: None) -> None:
    made = parameters()
    norm = get_total_norm(p.grad for p in made if p.grad is not None)
    clip_grads_with_norm_(made, 0.5, norm)
    after = get_total_norm(p.grad for p in made if p.grad is not None)
    assert after.item() == pytest.approx(0.5, rel=1e-4)


def test_it_is_one_call(host: Host) -> None:
    def run() -> None:
        clip_grad_norm_(parameters(), 1e6)

    assert "aten::linalg_vector_norm" in calls_of(run)
    undo = knobs.get("clipping").apply(host, "onepass")
    assert "aten::linalg_vector_norm" not in calls_of(run)
    undo()
    assert "aten::linalg_vector_norm" in calls_of(run)


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_what_is_not_finite_spreads_as_it_does_in_torch(host: Host, value: float) -> None:
    def run(**options: Any) -> list[torch.Tensor]:
        made = parameters()
        assert made[1].grad is not None
        made[1].grad[2] = value
        norm = clip_grad_norm_(made, 1.0, **options)
        return [norm, *(p.grad for p in made if p.grad is not None)]

    own = run()
    undo = knobs.get("clipping").apply(host, "onepass")
    found = run()
    with pytest.raises(RuntimeError, match="non-finite"):
        run(error_if_nonfinite=True)
    undo()
    for ours, theirs in zip(found, own, strict=True):
        torch.testing.assert_close(ours, theirs, equal_nan=True)
    assert not host.applied.failures


def test_a_gradient_that_is_there_twice_is_scaled_twice(host: Host) -> None:
    def run() -> torch.Tensor:
        made = parameters()
        clip_grad_norm_([made[0], made[1], made[0]], 0.3)
        assert made[0].grad is not None
        return made[0].grad

    own = run()
    undo = knobs.get("clipping").apply(host, "onepass")
    found = run()
    undo()
    torch.testing.assert_close(found, own, rtol=1e-5, atol=0)


LEFT_ALONE: dict[str, Callable[[], Any]] = {
    "no gradients": lambda: clip_grad_norm_([torch.nn.Parameter(torch.ones(2))], 1.0),
    "the largest": lambda: clip_grad_norm_(parameters()[:4], 0.3, norm_type=math.inf),
    "float64": lambda: clip_grad_norm_(parameters(torch.float64), 0.3),
    "bfloat16": lambda: clip_grad_norm_(parameters(torch.bfloat16), 0.3),
    "a transpose": lambda: get_total_norm([torch.arange(6.0).view(2, 3).T]),
    "a tensor": lambda: get_total_norm(torch.arange(6.0)),
}


@pytest.mark.parametrize("case", LEFT_ALONE)
def test_left_to_torch(host: Host, case: str) -> None:
    own = LEFT_ALONE[case]()
    undo = knobs.get("clipping").apply(host, "onepass")
    found = LEFT_ALONE[case]()
    undo()
    assert found.dtype == own.dtype
    assert torch.equal(found, own)
    assert not host.applied.failures


def test_compiled_it_is_torchs(host: Host) -> None:
    undo = knobs.get("clipping").apply(host, "onepass")
    made = parameters()[:2]
    found = torch.compile(lambda: clip_grad_norm_(made, 0.3), backend="aot_eager")()
    undo()
    assert found.item() == pytest.approx(clip_grad_norm_(parameters()[:2], 0.3).item())


def test_a_failure_of_ours_leaves_it_to_torch(host: Host, monkeypatch: pytest.MonkeyPatch) -> None:
    own = clip_grad_norm_(parameters(), 0.3)
    undo = knobs.get("clipping").apply(host, "onepass")
    monkeypatch.setattr(clipping, "math", None)
    found = clip_grad_norm_(parameters(), 0.3)
    monkeypatch.undo()
    undo()
    assert torch.equal(found, own)
    assert list(host.applied.failures) == ["clipping"]


def test_it_is_tried_where_norms_are_taken() -> None:
    offer = knobs.get("clipping").offer
    taken = {"aten::linalg_vector_norm": 0.02, "aten::mul_": 0.03, "aten::mul": 0.5}
    assert offer(Facts("cpu", operators=taken)).share == pytest.approx(0.05)
    assert not offer(Facts("cpu", operators={"aten::mul_": 0.03})).settings
