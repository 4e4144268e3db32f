"""The knob ``random``: dropout's numbers from the kernel, seeds and states as ever."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader

from flatout import knobs, machine
from flatout.errors import RefusedError
from flatout.intercept import twister
from flatout.intercept.host import Host
from flatout.knob import Facts
from flatout.knobs.random import cpu
from tests.hosts import host_in


@pytest.fixture
def host(tmp_path: Path) -> Host:
    return host_in(tmp_path)


@pytest.fixture
def fast(host: Host) -> Iterator[None]:
    undo = knobs.get("random").apply(host, "fast")
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


def test_on_and_off(host: Host) -> None:
    def drawn() -> torch.Tensor:
        torch.manual_seed(0)
        return masks()

    bare = drawn()
    for setting in ("fast", "paired"):
        undo = knobs.get("random").apply(host, setting)
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


LARGE = (4, 16, 40, 40)
LAYOUTS = {
    "contiguous": lambda x: x,
    "channels last": lambda x: x.to(memory_format=torch.channels_last),
    "bfloat16": lambda x: x.bfloat16(),
    "transposed": lambda x: x.transpose(0, 2),
    "a size that fills no block": lambda x: x.flatten()[:-7],
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_large_dropout_is_one_operation_and_has_its_gradient(fast: None, layout: str) -> None:
    torch.manual_seed(0)
    x = LAYOUTS[layout](torch.randn(LARGE)).requires_grad_()
    y = nn.functional.dropout(x, 0.25)
    assert "Dropout" in str(y.grad_fn)
    assert y.stride() == x.stride()
    kept = y != 0
    assert kept.float().mean().item() == pytest.approx(0.75, abs=0.005)
    right = x.detach().double() * kept / 0.75
    torch.testing.assert_close(y.detach().double(), right, rtol=2**-8, atol=0)
    outer = torch.randn(x.shape).to(x.dtype)
    (gradient,) = torch.autograd.grad(y, x, outer)
    right = outer.double() * kept / 0.75
    torch.testing.assert_close(gradient.double(), right, rtol=2**-8, atol=0)


def test_large_dropout_is_the_same_for_any_number_of_threads(fast: None) -> None:
    threads = torch.get_num_threads()
    found = []
    for count in (1, 2, 3):
        torch.set_num_threads(count)
        torch.manual_seed(7)
        found.append(nn.functional.dropout(torch.ones(LARGE), 0.5))
    torch.set_num_threads(threads)
    assert all(torch.equal(one, found[0]) for one in found)


def test_bits_of_neighbours_and_of_calls_are_independent(fast: None) -> None:
    torch.manual_seed(0)
    drawn = [nn.functional.dropout(torch.ones(400_000), 0.3) != 0 for _ in range(3)]
    one, other = drawn[0].double(), drawn[1].double()
    for shifted in (1, 2, 15, 16, 32, 64, 127, 128, 129):
        together = torch.corrcoef(torch.stack([one[shifted:], one[:-shifted]]))[0, 1]
        assert abs(together.item()) < 5 / 400_000**0.5
    assert abs(torch.corrcoef(torch.stack([one, other]))[0, 1].item()) < 5 / 400_000**0.5
    for mask in drawn:
        assert mask.double().mean().item() == pytest.approx(0.7, abs=5 * (0.21 / 400_000) ** 0.5)


def test_gradients_of_the_gradients_of_dropout(fast: None) -> None:
    x = torch.randn(LARGE, requires_grad=True)
    y = nn.functional.dropout(x, 0.5)
    kept = (y != 0).float()
    (gradient,) = torch.autograd.grad(y.square().sum(), x, create_graph=True)
    torch.testing.assert_close(gradient, 8 * x * kept)
    (second,) = torch.autograd.grad(gradient.sum(), x)
    torch.testing.assert_close(second, 8 * kept)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_when_it_fails_in_the_backward_pass_the_gradient_is_right(
    host: Host, monkeypatch: pytest.MonkeyPatch, layout: str
) -> None:
    undo = knobs.get("random").apply(host, "fast")
    x = LAYOUTS[layout](torch.randn(LARGE)).requires_grad_()
    y = nn.functional.dropout(x, 0.5)
    monkeypatch.setattr(cpu.Bernoulli, "drop", None)
    (gradient,) = torch.autograd.grad(y.sum(), x)
    undo()
    torch.testing.assert_close(gradient, 2.0 * (y != 0).to(x.dtype))
    assert "not callable" in host.applied.failures["random"]


def test_dropped_numbers_that_are_not_finite_stay_visible_as_in_torch(fast: None) -> None:
    y = nn.functional.dropout(torch.full(LARGE, torch.inf), 0.5)
    assert (y.isnan() | y.isinf()).all()
    assert y.isnan().any()


def test_dropout_that_is_off_is_torchs_own(fast: None) -> None:
    x = torch.randn(LARGE)
    before = torch.get_rng_state()
    assert nn.functional.dropout(x, 0.0) is not None
    assert torch.equal(nn.functional.dropout(x, 0.5, training=False), x)
    assert torch.equal(torch.get_rng_state(), before)
    assert not nn.functional.dropout(x, 1.0).any()


def test_what_it_does_not_take_is_torchs_own(host: Host) -> None:
    def drawn() -> list[torch.Tensor]:
        torch.manual_seed(0)
        return [
            torch.empty(10, 8)[:, ::2].bernoulli_(0.5),
            torch.empty(10).bernoulli_(torch.full((10,), 0.5)),
            torch.rand(10),
        ]

    bare = drawn()
    undo = knobs.get("random").apply(host, "fast")
    mine = drawn()
    with pytest.raises(RuntimeError, match="bernoulli_ expects p to be in"):
        torch.empty(3).bernoulli_(1.5)
    undo()
    assert all(torch.equal(a, b) for a, b in zip(mine, bare, strict=True))


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(4, 20_000), nn.Dropout(0.3), nn.Linear(20_000, 1))

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


def test_paired_leaves_the_generator_as_torch_would(host: Host) -> None:
    bare, bare_state, bare_loss = order()
    undo = knobs.get("random").apply(host, "paired")
    paired, paired_state, paired_loss = order()
    undo()
    assert paired == bare
    assert torch.equal(paired_state, bare_state)
    assert paired_loss != bare_loss
    undo = knobs.get("random").apply(host, "fast")
    fast, _, _ = order()
    undo()
    assert fast != bare  # what the card says


@pytest.mark.skipif(not twister.agrees(), reason="torch draws by MKL here")
def test_same_draws_torchs_own_numbers(host: Host) -> None:
    def train() -> list[torch.Tensor]:
        torch.manual_seed(1)
        x = torch.randn(64, 300, requires_grad=True)
        y = torch.nn.functional.dropout(x, 0.3) + torch.nn.functional.dropout1d(x, 0.2)
        with torch.no_grad():
            z = torch.nn.functional.alpha_dropout(x, 0.1, training=True)
        y.square().sum().backward()
        assert x.grad is not None
        return [y, z, x.grad, torch.bernoulli(torch.full((9,), 0.5)), torch.randn(5)]

    expected = train()
    undo = knobs.get("random").apply(host, "same")
    found = train()
    undo()
    assert all(map(torch.equal, found, expected))
    assert knobs.get("random").exactness["same"] == "bitwise"


def test_without_a_compiler_torchs_own_stays(host: Host, monkeypatch: pytest.MonkeyPatch) -> None:
    from flatout import kernels

    monkeypatch.setattr(kernels, "find_compiler", lambda: None)
    kernels.load.cache_clear()
    with pytest.raises(RefusedError, match="no C compiler"):
        knobs.get("random").apply(host, "fast")
    kernels.load.cache_clear()


@pytest.mark.parametrize(
    ("vendor", "settings"),
    [("AuthenticAMD", ("same", "fast")), ("GenuineIntel", ("fast",)), (None, ("same", "fast"))],
)
def test_what_is_offered(
    vendor: str | None, settings: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(machine, "cpu_vendor", lambda: vendor)
    assert knobs.get("random").offer(Facts("cpu")).settings == settings
    refusal = knobs.get("random").offer(Facts("cuda")).refusal
    assert refusal is not None
    assert "not for cuda" in refusal
