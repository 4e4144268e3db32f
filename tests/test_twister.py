"""Bernoulli numbers of torch's own generator, drawn many at once, against torch's kernel."""

from __future__ import annotations

import threading
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from flatout.intercept import twister

pytestmark = pytest.mark.skipif(
    not twister.agrees(), reason="torch draws by MKL here, or there is no C compiler"
)


def drawn_by_torch(like: torch.Tensor, p: float, before: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Numbers of torch's kernel after some other draws, and what it draws next."""
    torch.manual_seed(7)
    torch.rand(before)
    return torch.empty_like(like).bernoulli_(p), torch.rand(3)


@pytest.mark.parametrize("before", [0, 1, 17, 623, 624, 625])
@pytest.mark.parametrize("p", [0.0, 1e-12, 0.3, 0.5, 0.9, 1 - 1e-16, 1.0])
def test_numbers_and_what_is_drawn_next(before: int, p: float) -> None:
    parts = [(count, 0, count) for count in (0, 1, 2, 311, 312, 313, 1000, 20_011)]
    parts += [(1000, 333, 750), (20_011, 6670, 15_009)]
    for count, start, stop in parts:
        expected, following = drawn_by_torch(torch.empty(count), p, before)
        torch.manual_seed(7)
        torch.rand(before)
        found = torch.empty(stop - start)
        twister.fill(found, p, count=count, start=start)
        assert torch.equal(found, expected[start:stop])
        assert torch.equal(torch.rand(3), following)


@pytest.mark.parametrize("dtype", twister.ONES)
def test_dtypes_and_orders_in_memory(dtype: torch.dtype) -> None:
    shape = (4, 3, 5, 7)
    for like in (
        torch.empty(shape, dtype=dtype),
        torch.empty(shape, dtype=dtype).to(memory_format=torch.channels_last),
        torch.empty(shape, dtype=dtype).transpose(0, 3),
    ):
        expected, _ = drawn_by_torch(like, 0.4, 3)
        torch.manual_seed(7)
        torch.rand(3)
        found = torch.empty_like(like)
        assert twister.can_fill(found, 0.4)
        twister.fill(found, 0.4)
        assert torch.equal(found, expected)


def test_what_it_leaves_to_torch() -> None:
    assert not twister.can_fill(torch.empty(4, 6)[:, ::2], 0.5)
    assert not twister.can_fill(torch.empty(4, dtype=torch.complex64), 0.5)
    assert not twister.can_fill(torch.empty(4), 1.5)


def test_a_generator_of_the_program() -> None:
    expected = torch.empty(9000).bernoulli_(0.2, generator=torch.Generator().manual_seed(5))
    generator, before = torch.Generator().manual_seed(5), torch.get_rng_state()
    found = torch.empty(9000)
    twister.fill(found, 0.2, generator)
    assert torch.equal(found, expected)
    assert torch.equal(torch.get_rng_state(), before)


def test_two_threads_draw_no_number_twice() -> None:
    torch.manual_seed(0)
    masks: list[bytes] = []

    def draw() -> None:
        for _ in range(60):
            found = torch.empty(40_000, dtype=torch.bool)
            if not twister.fill(found, 0.5):
                found.bernoulli_(0.5)
            masks.append(found.numpy().tobytes())

    threads = [threading.Thread(target=draw) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(set(masks)) == len(masks) == 120


def test_a_generator_of_another_kind_and_a_state_made_by_hand() -> None:
    tensor = torch.empty(9)
    other: Any = SimpleNamespace(device=torch.device("cuda"))
    assert not twister.can_fill(tensor, 0.5, other)
    generator = torch.Generator().manual_seed(1)
    state = generator.get_state()
    state[8] = 5  # words that are left, with the index of the first unchanged
    generator.set_state(state)
    assert not twister.fill(tensor, 0.5, generator)
    assert torch.equal(generator.get_state(), state)
