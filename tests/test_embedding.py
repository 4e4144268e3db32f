"""The knob ``embedding``: gradients of embedding bags by a kernel of its own."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch.nn import functional as F

from flatout import kernels, knobs
from flatout.intercept import dispatch
from flatout.knob import Facts
from flatout.knobs import embedding
from flatout.knobs.embedding import cpu

pytestmark = pytest.mark.skipif(kernels.find_compiler() is None, reason="there is no compiler")

ROWS, WIDTH, BAGS = 4000, 24, 50


def raising(error: Exception) -> None:
    raise error


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[bool]]:
    """Whether the kernel has done it, call by call."""
    done: list[bool] = []
    own = cpu._gradient

    def noted(*args: Any, **kwargs: Any) -> torch.Tensor | None:
        found = own(*args, **kwargs)
        done.append(found is not None)
        return found

    monkeypatch.setattr(cpu, "_gradient", noted)
    undo = cpu.install(dispatch.load_kernel("embedding", "torch's own"), raising)
    yield done
    undo()


def lookups(seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Rows, popular ones many times, and where each bag starts; one bag is empty."""
    draw = torch.Generator().manual_seed(seed)
    lengths = torch.randint(1, 40, (BAGS,), generator=draw)
    lengths[7] = 0
    rows = (ROWS * torch.rand(int(lengths.sum()), generator=draw) ** 4).long()
    return rows, lengths.cumsum(0) - lengths


def gradient(dtype: torch.dtype = torch.float32, **options: Any) -> torch.Tensor:
    """Of the table, for outer gradients that are no whole numbers."""
    draw = torch.Generator().manual_seed(1)
    table = torch.randn(ROWS, WIDTH, generator=draw).to(dtype).requires_grad_()
    outer = torch.randn(BAGS, WIDTH, generator=draw).to(dtype)
    if "per_sample_weights" in options:
        options["per_sample_weights"] = options["per_sample_weights"].to(dtype)
    rows, starts = lookups()
    F.embedding_bag(rows, table, starts, **options).backward(outer)
    assert table.grad is not None
    return table.grad


CASES: dict[str, dict[str, Any]] = {
    "sum": {"mode": "sum"},
    "mean": {"mode": "mean"},
    "padding": {"mode": "mean", "padding_idx": 3},
    "padding counted from the end": {"mode": "sum", "padding_idx": 5 - ROWS},
    "weighted": {"mode": "sum", "per_sample_weights": torch.rand(len(lookups()[0]))},
}


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("case", CASES)
def test_gradients_are_those_of_float64(calls: list[bool], case: str, threads: int) -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        found = gradient(**CASES[case])
    finally:
        torch.set_num_threads(before)
    expected = gradient(torch.float64, **CASES[case])
    assert calls == [True, False]
    torch.testing.assert_close(found, expected.float(), rtol=1e-5, atol=1e-5)
    assert torch.equal(found == 0, expected == 0)


def test_sums_do_not_depend_on_the_number_of_threads(calls: list[bool]) -> None:
    found = []
    before = torch.get_num_threads()
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        found.append(gradient(mode="mean"))
    torch.set_num_threads(before)
    assert all(torch.equal(found[0], other) for other in found[1:])


@pytest.mark.parametrize(
    "options", [{"mode": "max"}, {"mode": "sum", "scale_grad_by_freq": True}], ids=str
)
def test_the_rest_is_left_to_torch(calls: list[bool], options: dict[str, Any]) -> None:
    found = gradient(**options)
    assert True not in calls
    torch.testing.assert_close(found, gradient(torch.float64, **options).float())


def test_other_inputs(calls: list[bool]) -> None:
    table = torch.randn(ROWS, WIDTH, requires_grad=True)
    rows, starts = lookups()
    outer = torch.randn(WIDTH, BAGS).T  # not contiguous
    F.embedding_bag(rows, table, starts, mode="sum").backward(outer)
    assert table.grad is not None
    expected = torch.zeros(ROWS, WIDTH, dtype=torch.float64)
    bags = torch.bucketize(torch.arange(len(rows)), starts, right=True) - 1
    expected.index_add_(0, rows, outer.double()[bags])
    torch.testing.assert_close(table.grad, expected.float(), rtol=1e-5, atol=1e-5)
    table.grad = None
    F.embedding_bag(rows.int(), table, starts.int(), mode="sum").backward(outer)
    torch.testing.assert_close(table.grad, expected.float(), rtol=1e-5, atol=1e-5)
    nothing = F.embedding_bag(rows[:0], table, torch.zeros(2, dtype=torch.long), mode="mean")
    table.grad = None
    nothing.sum().backward()
    assert table.grad is not None
    assert not table.grad.any()
    assert calls == [True, False, True]


def test_bags_of_all_forms(calls: list[bool]) -> None:
    draw = torch.Generator().manual_seed(2)
    rows = torch.randint(ROWS, (20, 30), generator=draw)
    starts = torch.arange(0, 601, 30)
    weights = torch.rand(20, 30, generator=draw, dtype=torch.float64)
    forms: dict[str, tuple[Any, ...]] = {
        "two dimensions": (rows, None, {"mode": "mean"}),
        "last offset": (rows.flatten(), starts, {"mode": "mean", "include_last_offset": True}),
        "only padding": (torch.full((20, 30), 9), None, {"mode": "mean", "padding_idx": 9}),
        "weights": (rows, None, {"mode": "sum"}),
    }
    for name, (looked_up, offsets, options) in forms.items():
        found = []
        for dtype in (torch.float32, torch.float64):
            table = torch.ones(ROWS, WIDTH, dtype=dtype, requires_grad=True)
            factors = weights.to(dtype).requires_grad_() if name == "weights" else None
            bags = F.embedding_bag(looked_up, table, offsets, per_sample_weights=factors, **options)
            outer = torch.arange(bags.numel(), dtype=dtype).view(bags.shape) / 7
            bags.backward(outer)
            found.append(table.grad)
        assert calls.pop() is False, name
        assert calls.pop() is True, name
        torch.testing.assert_close(found[0], found[1].float(), rtol=1e-4, atol=1e-4, msg=name)


def test_a_failure_is_reported_and_torch_does_it(monkeypatch: pytest.MonkeyPatch) -> None:
    expected = gradient(mode="mean")
    failures: list[Exception] = []
    undo = cpu.install(dispatch.load_kernel("embedding", "torch's own"), failures.append)
    monkeypatch.setattr(cpu, "Bags", None)
    found = gradient(mode="mean")
    undo()
    assert len(failures) == 1
    assert torch.equal(found, expected)


def test_it_is_offered_where_there_are_such_gradients() -> None:
    operators = {"aten::_embedding_bag_dense_backward": 0.1, "aten::sort": 0.05, "aten::mm": 0.3}
    match = embedding.KNOB.offer(Facts("cpu", operators=operators))
    assert match.settings == ("direct",)
    assert match.share == pytest.approx(0.15)
    assert not embedding.KNOB.offer(Facts("cpu", operators={"aten::mm": 0.3})).settings
    assert knobs.get("embedding") is embedding.KNOB
