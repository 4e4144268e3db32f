"""The knob ``random``: dropout's numbers from the kernel, seeds and states as ever."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader

from flatout import knobs
from flatout.agent.session import Session
from flatout.request import Request


@pytest.fixture
def session(tmp_path: Path) -> Session:
    return Session(Request(), tmp_path)


@pytest.fixture
def fast(session: Session) -> Iterator[None]:
    undo = knobs.get("random").apply(session, "fast")
    yield
    undo()


def masks(count: int = 3, size: int = 1000) -> torch.Tensor:
    return torch.stack([nn.functional.dropout(torch.ones(size), 0.4) for _ in range(count)])


def test_seeds_and_saved_states_mean_what_they_meant(fast: None) -> None:
    torch.manual_seed(3)
    first = masks()
    state = torch.get_rng_state()
    second = masks()
    assert not torch.equal(first, second)
    torch.manual_seed(3)
    assert torch.equal(masks(), first)
    torch.set_rng_state(state)
    assert torch.equal(masks(), second)
    torch.manual_seed(4)
    assert not torch.equal(masks(), first)


def test_a_generator_of_ones_own_is_drawn_from(fast: None) -> None:
    default = torch.get_rng_state()
    generator = torch.Generator().manual_seed(5)
    first = torch.empty(100).bernoulli_(0.5, generator=generator)
    second = torch.empty(100).bernoulli_(0.5, generator=generator)
    assert not torch.equal(first, second)
    again = torch.empty(100).bernoulli_(0.5, generator=torch.Generator().manual_seed(5))
    assert torch.equal(first, again)
    assert torch.equal(torch.get_rng_state(), default)


def test_on_and_off(session: Session) -> None:
    def drawn() -> torch.Tensor:
        torch.manual_seed(0)
        return masks()

    bare = drawn()
    for setting in ("fast", "paired"):
        undo = knobs.get("random").apply(session, setting)
        assert not torch.equal(drawn(), bare)
        undo()
        assert torch.equal(drawn(), bare)


def test_dropout_scales_and_passes_gradients(fast: None) -> None:
    x = torch.ones(4, 8, 6, 6, requires_grad=True)
    for y in (
        nn.functional.dropout(x, 0.25),
        nn.functional.dropout(x.to(memory_format=torch.channels_last), 0.25),
        nn.functional.dropout2d(x, 0.25),
        nn.functional.dropout(x.bfloat16(), 0.25).float(),
    ):
        values = y.detach().unique()
        torch.testing.assert_close(values, torch.tensor([0, 4 / 3]), rtol=0.01, atol=0)
        (gradient,) = torch.autograd.grad(y.sum(), x)
        torch.testing.assert_close(gradient, y.detach(), rtol=0.01, atol=0)


def test_what_it_does_not_take_is_torchs_own(session: Session) -> None:
    def drawn() -> list[torch.Tensor]:
        torch.manual_seed(0)
        return [
            torch.empty(10, 8)[:, ::2].bernoulli_(0.5),
            torch.empty(10).bernoulli_(torch.full((10,), 0.5)),
            torch.rand(10),
        ]

    bare = drawn()
    undo = knobs.get("random").apply(session, "fast")
    mine = drawn()
    with pytest.raises(RuntimeError, match="bernoulli_ expects p to be in"):
        torch.empty(3).bernoulli_(1.5)
    undo()
    assert all(torch.equal(a, b) for a, b in zip(mine, bare, strict=True))


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(4, 64), nn.Dropout(0.3), nn.Linear(64, 1))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = self.layers(x)
        return out


def order(epochs: int = 2) -> tuple[list[list[float]], torch.Tensor, float]:
    """The batches a shuffled loop saw, the generator's state after it, and its last loss."""
    torch.manual_seed(0)
    net = Net()
    optimizer = torch.optim.SGD(net.parameters(), lr=0.01)
    seen = []
    for _ in range(epochs):
        for x in DataLoader(torch.arange(32.0).view(8, 4), batch_size=2, shuffle=True):
            seen.append(x[:, 0].tolist())
            loss = net(x / 32).square().mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    return seen, torch.get_rng_state(), loss.item()


def test_paired_leaves_the_generator_as_torch_would(session: Session) -> None:
    bare, bare_state, bare_loss = order()
    undo = knobs.get("random").apply(session, "paired")
    paired, paired_state, paired_loss = order()
    undo()
    assert paired == bare
    assert torch.equal(paired_state, bare_state)
    assert paired_loss != bare_loss
    undo = knobs.get("random").apply(session, "fast")
    fast, _, _ = order()
    undo()
    assert fast != bare  # what the card says


def test_without_a_compiler_torchs_own_stays(
    session: Session, monkeypatch: pytest.MonkeyPatch
) -> None:
    from flatout import kernels

    monkeypatch.setattr(kernels, "find_compiler", lambda: None)
    kernels.load.cache_clear()
    with pytest.raises(knobs.RefusedError, match="no C compiler"):
        knobs.get("random").apply(session, "fast")
    kernels.load.cache_clear()


def test_paired_is_never_offered() -> None:
    assert knobs.get("random").offer(knobs.Facts("cpu")).settings == ("fast",)
    refusal = knobs.get("random").offer(knobs.Facts("cuda")).refusal
    assert refusal is not None
    assert "not for cuda" in refusal
