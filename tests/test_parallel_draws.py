"""Draws of random numbers in shards against those of one process."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import CheckpointFunction, _CheckpointFrame, checkpoint

from flatout import kernels
from flatout.intercept import dispatch
from flatout.knobs.random import cpu as fast_random
from flatout.parallel import draws, interior, shards
from flatout.parallel.placement import Draw, Placement, Rows, UnshareableError, place
from tests.rank_processes import Rank, Ranks, installed


@pytest.fixture(scope="module", params=[2, 3])
def ranks(request: Any, tmp_path_factory: Any) -> Iterator[Ranks]:
    found = Ranks(request.param, tmp_path_factory.mktemp("ranks"))
    yield found
    found.close()


class DropConnect(nn.Linear):
    """Drops weights; there are as many rows of them as samples in a shard of three."""

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, F.dropout(self.weight, 0.4), self.bias)


class Attention(nn.Module):
    def __init__(self, **kwargs: Any) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(4, 2, dropout=0.3, **kwargs)
        self.needs_weights = True

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.attention(x, x, x, need_weights=self.needs_weights)[0]
        return result


class Recurrent(nn.Module):
    def __init__(self, kind: Any, **kwargs: Any) -> None:
        super().__init__()
        self.layers = kind(4, 4, num_layers=3, dropout=0.4, **kwargs)

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.layers(x)[0]
        return result


class Checkpointed(nn.Module):
    def __init__(self, reentrant: bool) -> None:
        super().__init__()
        self.inner = nn.Sequential(nn.Linear(4, 4), nn.Dropout(0.3), nn.Tanh())
        self.outer = nn.Sequential(nn.Dropout(0.2), nn.Linear(4, 4), nn.AlphaDropout(0.3))
        self.reentrant = reentrant

    def forward(self, x: Tensor) -> Tensor:
        x = F.dropout(x, 0.1)
        x = checkpoint(self._compute, x, use_reentrant=self.reentrant)
        x = checkpoint(self.inner, x, use_reentrant=self.reentrant)
        return x + torch.rand_like(x)

    def _compute(self, x: Tensor) -> Tensor:
        x = self.outer(x)
        result: Tensor = checkpoint(self.inner, x, use_reentrant=self.reentrant)
        return result


class Differentiating(nn.Module):
    """Returns gradients of a part that is computed again in the forward pass, after other draws."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Sequential(nn.Linear(4, 4), nn.Dropout(0.3), nn.Tanh(), nn.Linear(4, 4))

    def forward(self, x: Tensor) -> Tensor:
        with torch.enable_grad():
            y = x.detach().requires_grad_() + torch.rand_like(x)
            energy = checkpoint(self.inner, y, use_reentrant=False)
            (force,) = torch.autograd.grad(F.dropout(energy, 0.2).sum(), y, create_graph=True)
        return force * F.dropout(x, 0.4)


class Of(nn.Module):
    """A module without parameters."""

    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x)


def _fill(x: Tensor, *dims: int) -> Tensor:
    """Add random numbers whose memory is ordered in another way than their dimensions."""
    size = [x.shape[dim] for dim in dims]
    other = torch.empty(size, dtype=x.dtype).normal_().permute([dims.index(0), dims.index(1)])
    return x + other + torch.empty_like(other).uniform_()


def _toss_coins(x: Tensor) -> Tensor:
    return x if torch.rand(()) < 2 else x * torch.rand(1) * torch.rand(1, 1)


def _sample(x: Tensor) -> Tensor:
    weights = x.softmax(1)
    one = torch.multinomial(weights, 1) + torch.multinomial(weights, 2)[:, :1]
    return x + one + torch.distributions.Normal(x, weights).rsample()


ELEMENTWISE: dict[str, Callable[[Tensor], Tensor]] = {
    "functional": lambda x: F.dropout(x, 0.3),
    "in place": lambda x: F.dropout(x.clone(), 0.3, inplace=True),
    "no dropout": lambda x: F.dropout(F.dropout(F.dropout(x, 0.0), 0.3, False), 1.0),
    "alpha": lambda x: F.alpha_dropout(x, 0.3, True),
    "native": lambda x: torch.native_dropout(x, 0.3, True)[0],
    "rand_like": lambda x: x * torch.rand_like(x) + torch.randn_like(x),
    "randint_like": lambda x: x + torch.randint_like(x, 1000) + torch.randint_like(x, -9, 9),
    "rand": lambda x: x + torch.rand(x.shape[0], 1) + torch.randn(len(x), x.shape[1]),
    "transposed": lambda x: x + torch.rand(3, x.shape[0])[1].unsqueeze(1),
    "randint": lambda x: x + torch.randint(7, (x.shape[0], 1)),
    "bernoulli": lambda x: x * torch.bernoulli(x.sigmoid()) + torch.bernoulli(x.detach(), 0.5),
    "probabilities": lambda x: torch.empty_like(x).bernoulli_(x[:, :1].sigmoid()) + x,
    "normal": lambda x: (
        torch.normal(x, 0.3) + torch.normal(1.0, x.abs()) + torch.normal(x, x.exp())
    ),
    "broadcast": lambda x: torch.normal(x[:, :1], torch.ones(5).double()),
    "exponential": lambda x: x + torch.empty_like(x).exponential_() + x.clone().cauchy_(),
    "geometric": lambda x: x + torch.empty_like(x).geometric_(0.3) + x.clone().log_normal_(),
    "random": lambda x: x + torch.empty_like(x).random_(10) + x.clone().random_(3, 9),
    "ordered": lambda x: _fill(x, 1, 0),
    "sliced": lambda x: x + torch.zeros(len(x), 9, dtype=x.dtype)[:, : x.shape[1]].normal_(),
    "expanded": lambda x: x + F.dropout(x[:, :1].expand_as(x), 0.4),
    "coins": _toss_coins,
    "common noise": lambda x: x + torch.randn(x.shape[1]) + torch.randperm(x.shape[1]),
    "sample": _sample,
    "own generator": lambda x: (
        x + torch.rand(len(x), 1, generator=torch.Generator().manual_seed(7))
    ),
}

MODULES: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...], int]] = {
    **{
        name: (functools.partial(Of, function), (7, 5), 0) for name, function in ELEMENTWISE.items()
    },
    "large": (lambda: nn.Dropout(0.3), (7, 999), 0),
    "wide": (lambda: Of(torch.randn_like), (7, 999), 0),
    "channels": (lambda: nn.Dropout2d(0.5), (7, 4, 3, 3), 0),
    "feature alpha": (lambda: nn.FeatureAlphaDropout(0.5), (7, 4, 3, 3), 0),
    "drop connect": (lambda: DropConnect(4, 3), (9, 4), 0),
    "lstm": (lambda: Recurrent(nn.LSTM, batch_first=True), (7, 5, 4), 0),
    "sequence first": (lambda: Recurrent(nn.LSTM), (5, 7, 4), 1),
    "gru": (lambda: Recurrent(nn.GRU, bidirectional=True, batch_first=True), (7, 7, 4), 0),
    "attention": (lambda: Attention(batch_first=True), (7, 5, 4), 0),
    "attention, sequence first": (Attention, (5, 7, 4), 1),
    "encoder": (lambda: nn.TransformerEncoderLayer(4, 2, 8, 0.2, batch_first=True), (7, 5, 4), 0),
    "sdpa": (
        lambda: Of(lambda x: F.scaled_dot_product_attention(x, x, x, dropout_p=0.3)),
        (7, 2, 5, 4),
        0,
    ),
    "checkpoint": (lambda: Checkpointed(False), (7, 4), 0),
    "reentrant": (lambda: Checkpointed(True), (7, 4), 0),
    "differentiating": (Differentiating, (7, 4), 0),
}


def _learn(module: nn.Module, x: Tensor, dim: int, **kwargs: Any) -> tuple[Placement, ...]:
    """Find the placements as the test of a rule does, with one row less than half."""
    state, batch = torch.get_rng_state(), x.shape[dim]
    module = copy.deepcopy(module)
    rows = batch // 2 - 1
    with shards.observing() as whole:
        module(x)
    with shards.observing() as part:
        module(x.narrow(dim, 0, rows).contiguous())
    torch.set_rng_state(state)
    return place(whole.draws, part.draws, batch, rows, **kwargs)


def _train(module: nn.Module, call: Callable[[Tensor], Tensor], x: Tensor, average: Any) -> Any:
    found = []
    torch.manual_seed(3)
    for _ in range(2):
        module.zero_grad()
        inputs = x.clone().requires_grad_()
        output = call(inputs)
        if output.requires_grad:
            output.square().sum().backward()
        average(module)
        found += [output.detach(), inputs.grad, *(p.grad for p in module.parameters())]
    return found, torch.get_rng_state()


def _compare_with_one_process(rank: Rank, name: str) -> None:
    torch.manual_seed(0)
    make, shape, dim = MODULES[name]
    module, x = make().double(), torch.randn(shape, dtype=torch.float64)
    if x.dim() == 4 and name == "channels":
        x = x.to(memory_format=torch.channels_last)
    expected = _train(module, module, x, lambda module: None)
    with installed():
        placements = _learn(module, x, dim)
        found = _train(
            module, lambda inputs: rank.call(module, inputs, placements, dim), x, rank.average
        )
    torch.testing.assert_close(found[0], expected[0], rtol=1e-12, atol=1e-12)
    assert torch.equal(found[1], expected[1])
    assert rank.sums == 0


@pytest.mark.parametrize("name", MODULES)
def test_one_process(ranks: Ranks, name: str) -> None:
    assert ranks.find_failures(_compare_with_one_process, name) == ""


def _compare_flattened(rank: Rank) -> None:
    """Length times batch, of which the batch is the inner part."""
    x = torch.randn(5, 7, 4)

    def flatten(x: Tensor) -> Tensor:
        flat = x.reshape(-1, 4)
        flat = F.dropout(flat, 0.3) + torch.rand_like(flat)
        return (flat + torch.bernoulli(flat.sigmoid()) + torch.normal(flat, 0.1)).view_as(x)

    module = Of(flatten)
    torch.manual_seed(1)
    expected = module(x)
    with installed():
        for is_outer in (True, False):
            placements = _learn(module, x, 1, is_outer=is_outer)
            torch.manual_seed(1)
            found = rank.call(module, x, placements, 1)
            assert torch.equal(found, expected) is not is_outer


def test_samples_inside_of_a_flattened_dimension(ranks: Ranks) -> None:
    assert ranks.find_failures(_compare_flattened) == ""


def _compare_with_fast_random(rank: Rank) -> None:
    def fail(error: Exception) -> None:
        raise error

    undo = fast_random.install(kernels.load("bernoulli"), False, fail)
    module, x = nn.Sequential(nn.Dropout(0.3), nn.Dropout1d(0.5)), torch.randn(7, 40, 30)
    torch.manual_seed(1)
    expected = module(x), torch.get_rng_state()
    with installed():
        placements = _learn(module, x, 0)
        torch.manual_seed(1)
        found = rank.call(module, x, placements), torch.get_rng_state()
    undo()
    torch.testing.assert_close(found, expected)
    assert torch.equal(found[0] == 0, expected[0] == 0)


def test_fast_random_numbers_have_the_same_positions(ranks: Ranks) -> None:
    assert ranks.find_failures(_compare_with_fast_random) == ""


REFUSED: dict[str, tuple[Callable[[Tensor], Tensor], str]] = {
    "poisson": (lambda x: torch.poisson(x.exp()), "poisson"),
    "gamma": (lambda x: torch.distributions.Gamma(x.exp(), x.exp()).rsample(), "_standard_gamma"),
    "rrelu": (lambda x: F.rrelu(x, training=True), "rrelu_with_noise"),
    "permutation": (lambda x: x[torch.randperm(len(x))], "randperm"),
    "replacement": (lambda x: torch.multinomial(x.exp(), 3, True).double(), "multinomial"),
    "pairs": (lambda x: x + torch.rand(len(x), len(x)).sum(), "another form"),
    "class token": (lambda x: torch.rand(len(x) + 1).sum() + x, "count does not grow"),
    "each sample": (lambda x: torch.stack([F.dropout(row) for row in x]), "other random numbers"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_draws_that_cannot_be_shared_out(name: str) -> None:
    function, reason = REFUSED[name]
    with installed(), pytest.raises(UnshareableError, match=reason):
        _learn(Of(function), torch.randn(8, 4), 0)


def test_a_call_that_draws_otherwise_than_in_the_test() -> None:
    x = torch.randn(8, 4)
    with installed():
        (placed,) = _learn(nn.Dropout(), x, 0)
        for placements, reason in (
            ((), "more random numbers"),
            ((placed, placed), "fewer random numbers"),
            ((Placement("uniform_", 2, 0),), "other random numbers"),
            ((Placement("dropout", 3, 0),), "other random numbers"),
        ):
            with (
                pytest.raises(UnshareableError, match=reason),
                shards.shard(0, 4, 8, lambda tensors: tensors, placements),
            ):
                F.dropout(x[:4])
        with (
            pytest.raises(UnshareableError, match="other random numbers"),
            shards.shard(0, 3, 8, lambda tensors: tensors, (placed,)),
        ):
            F.dropout(x[:4])


def test_attention_by_a_kernel_with_numbers_of_its_own_is_refused() -> None:
    def attend(below: Callable[..., Any], *args: Any, **kwargs: Any) -> Tensor:
        torch.empty((), dtype=torch.int64).random_()
        result: Tensor = below(*args, **kwargs)
        return result

    undo = dispatch.override_operators(
        {"scaled_dot_product_attention": attend},
        *("AutogradCPU", "CPU"),
        on_failure=shards.raise_failure,
    )
    module = Of(lambda x: F.scaled_dot_product_attention(x, x, x, dropout_p=0.5))
    with installed(), pytest.raises(UnshareableError, match="scaled_dot_product_attention"):
        _learn(module, torch.randn(8, 2, 4, 4), 0)
    undo()


def test_no_draw_is_overlooked() -> None:
    """Every operator that draws on the CPU is overridden, or calls others that are."""
    handled = {
        *(*draws.FILLS, *draws.NORMALS, *draws.INDIVISIBLE),
        *("bernoulli_.Tensor", "dropout", "scaled_dot_product_attention"),
    }
    calls_others = {
        *("bernoulli.out", "native_dropout"),
        "_fused_sdp_choice",  # draws nothing
        "_scaled_dot_product_flash_attention_for_cpu",  # has no dropout
    }
    drawing = set()
    for qualified in torch._C._dispatch_get_all_op_names():
        namespace, _, name = qualified.partition("::")
        packet, _, overload = name.partition(".")
        if namespace != "aten" or not hasattr(torch.ops.aten, packet):
            continue
        operator = getattr(getattr(torch.ops.aten, packet), overload or "default", None)
        if (
            operator is not None
            and torch.Tag.nondeterministic_seeded in operator.tags
            and torch._C._dispatch_has_kernel_for_dispatch_key(qualified, "CPU")
        ):
            drawing.add(name)
    assert drawing - handled == calls_others


def test_undo_leaves_no_trace() -> None:
    before = _CheckpointFrame.__init__, CheckpointFunction.__dict__["forward"]
    overridden = dict(dispatch._overridden)
    with installed():
        torch.manual_seed(1)
        inside = F.dropout(torch.ones(8))
    after = _CheckpointFrame.__init__, CheckpointFunction.__dict__["forward"]
    assert after == before
    assert dispatch._overridden == overridden
    torch.manual_seed(1)
    assert torch.equal(F.dropout(torch.ones(8)), inside)


def test_observing_records_and_changes_nothing() -> None:
    x = torch.randn(6, 4)
    torch.manual_seed(1)
    expected = F.dropout(x), torch.rand(2), torch.get_rng_state()
    with installed(), shards.observing() as found:
        torch.manual_seed(1)
        result = F.dropout(x), torch.rand(2), torch.get_rng_state()
    assert all(map(torch.equal, result, expected))
    assert found.draws == [Draw("dropout", (6, 4)), Draw("uniform_", (2,))]


@pytest.mark.parametrize("rows", [(2, 4), (5, 6), (0, 6)])
@pytest.mark.parametrize(
    ("shape", "order", "dim"),
    [
        ((6, 5, 4), (0, 1, 2), 0),
        ((5, 6, 4), (0, 1, 2), 1),
        ((6, 5, 4), (1, 0, 2), 1),
        ((1, 6, 4), (0, 1, 2), 1),
        ((6, 4, 3, 2), (0, 3, 1, 2), 0),
    ],
)
def test_dropout_of_a_few_samples_in_any_order_of_memory(
    shape: tuple[int, ...], order: tuple[int, ...], dim: int, rows: tuple[int, int]
) -> None:
    ones = torch.ones(shape).permute(order)
    torch.manual_seed(0)
    whole, following = F.dropout(ones, 0.4), torch.rand(1)
    placement = Placement("dropout", whole.dim(), dim)
    undo = interior.install()
    try:
        torch.manual_seed(0)
        with shards.shard(*rows, 6, list, (placement,)):
            part = F.dropout(ones.narrow(dim, rows[0], rows[1] - rows[0]), 0.4)
        assert torch.equal(torch.rand(1), following)
    finally:
        undo()
    assert torch.equal(part, placement.take(whole, Rows(*rows, 6)))
