"""Which root calls may be shared out, found by test: by what rule, or why not."""

from __future__ import annotations

import copy
import dataclasses
import functools
import gc
import random
import warnings
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from flatout.intercept import objects
from flatout.parallel import cutting, interior
from flatout.parallel.checking import find_rule
from flatout.parallel.kinds import Refusal, Rule, kind_of, leaves

B, T, D = 6, 5, 8


@pytest.fixture(autouse=True)
def prepared() -> Iterator[None]:
    torch.manual_seed(0)
    undo = interior.install()
    yield
    undo()


def rule(module: nn.Module, *args: Any, size: int = 2, **kwargs: Any) -> Rule:
    found = find_rule(module, args, kwargs, size)
    assert isinstance(found, Rule), found
    return found


def reason(module: nn.Module, *args: Any, size: int = 2, **kwargs: Any) -> str:
    found = find_rule(module, args, kwargs, size)
    assert isinstance(found, Refusal), found
    assert type(module).__name__ in found.reason
    return found.reason


class Calls(nn.Module):
    """A linear layer, and a function of its output and the further arguments."""

    def __init__(self, function: Callable[..., Any]) -> None:
        super().__init__()
        self.linear = nn.Linear(D, D)
        self.function = function

    def forward(self, x: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        return self.function(self.linear(x), *args, **kwargs)


def identity(h: torch.Tensor) -> torch.Tensor:
    return h


ENCODER = functools.partial(nn.TransformerEncoderLayer, D, 2, 16, dropout=0.0)
CAUSAL = torch.triu(torch.full((T, T), float("-inf")), 1)


# What may be shared out


@pytest.mark.parametrize("size", [2, 3, 6])
def test_batch_first(size: int) -> None:
    module = nn.Sequential(nn.Linear(D, 4), nn.ReLU(), nn.Linear(4, 2))
    assert rule(module, torch.randn(B, D), size=size) == Rule((0,), (0,))


def test_convolutions() -> None:
    module = nn.Sequential(
        nn.Conv2d(3, 4, 3), nn.GroupNorm(2, 4), nn.InstanceNorm2d(4), nn.ReLU(), nn.Flatten()
    )
    images = torch.randn(B, 3, 6, 6)
    assert rule(module, images) == Rule((0,), (0,))
    channels_last = images.to(memory_format=torch.channels_last)
    assert rule(module, channels_last) == Rule((0,), (0,))


def test_sequence_first_with_states() -> None:
    states = torch.zeros(2, B, D), torch.zeros(2, B, D)
    assert rule(nn.LSTM(D, D, 2), torch.randn(T, B, D), states) == Rule((1, 1, 1), (1, 1, 1))


def test_states_with_as_many_layers_as_samples() -> None:
    states = torch.zeros(B, B, D)
    assert rule(nn.GRU(D, D, B), torch.randn(T, B, D), states) == Rule((1, 1), (1, 1))


def test_batch_first_recurrent_layer() -> None:
    module = nn.GRU(D, D, 2, batch_first=True)
    assert rule(module, torch.randn(B, T, D)) == Rule((0,), (0, 1))


@pytest.mark.parametrize("batch", [2, T, B])
def test_a_mask_stays_whole(batch: int) -> None:
    module = ENCODER(batch_first=True)
    assert rule(module, torch.randn(batch, T, D), CAUSAL) == Rule((0, None), (0,))


def test_a_mask_of_zeros_for_as_many_tokens_as_samples() -> None:
    """A shard of one row could be broadcast."""
    module = ENCODER(batch_first=True)
    assert rule(module, torch.randn(2, 2, D), torch.zeros(2, 2)) == Rule((0, None), (0,))


def test_a_padding_mask_is_cut() -> None:
    padding = torch.zeros(B, T, dtype=torch.bool)
    padding[:, -1] = True
    found = rule(ENCODER(batch_first=True), torch.randn(B, T, D), src_key_padding_mask=padding)
    assert found == Rule((0, 0), (0,))


def test_tokens() -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embedding = nn.Embedding(11, D)
            self.encoder = ENCODER(batch_first=True)
            self.register_buffer("mask", CAUSAL)

        def forward(self, tokens: torch.Tensor) -> Any:
            return self.encoder(self.embedding(tokens), self.mask) @ self.embedding.weight.T

    assert rule(Model(), torch.randint(11, (B, T))) == Rule((0,), (0,))


def test_sorted_lengths_for_packing_inside() -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.lstm = nn.LSTM(D, D, batch_first=True)

        def forward(self, x: torch.Tensor, lengths: torch.Tensor) -> Any:
            packed = nn.utils.rnn.pack_padded_sequence(x, lengths, batch_first=True)
            out, _ = nn.utils.rnn.pad_packed_sequence(
                self.lstm(packed)[0], batch_first=True, total_length=x.shape[1]
            )
            return out

    lengths = torch.tensor([5, 5, 4, 3, 2, 1])
    assert rule(Model(), torch.randn(B, T, D), lengths) == Rule((0, 0), (0,))


def test_keywords_and_nested_arguments() -> None:
    module = Calls(lambda h, pair, scale, extra: {"sum": h + pair[0] * scale, "extra": extra})
    found = rule(
        module, torch.randn(B, D), ({"a": torch.randn(B, D)}["a"], None), extra=torch.randn(B, 1),
        scale=2.0,
    )  # fmt: skip
    assert found == Rule((0, 0, 0), (0, 0))


@dataclasses.dataclass
class Output:
    logits: torch.Tensor
    hidden: tuple[torch.Tensor, ...] | None = None
    name: str = "output"


class Named(NamedTuple):
    logits: torch.Tensor
    rest: Any


@pytest.mark.parametrize(
    ("make", "outputs"),
    [
        (lambda h: (h, None, h.sum(1)), (0, 0)),
        (lambda h: {"logits": h, "nothing": None}, (0,)),
        (lambda h: Output(h, (h.T, h)), (0, 1)),
        (lambda h: Named(h, [h * 2, {"three": 3}]), (0, 0)),
        (lambda h: (h, torch.arange(4.0)), (0, None)),
        (lambda h: (h.argmax(1), h > 0), (0, 0)),
    ],
)
def test_structures_of_outputs(make: Callable[..., Any], outputs: tuple[int | None, ...]) -> None:
    assert rule(Calls(make), torch.randn(B, D)) == Rule((0,), outputs)


def test_an_output_that_depends_on_the_weights_alone() -> None:
    class Model(nn.Linear):
        def forward(self, x: torch.Tensor) -> Any:
            return super().forward(x), self.weight.square().sum()

    assert rule(Model(D, D), torch.randn(B, D)) == Rule((0,), (0, None))


def test_without_gradients_and_in_inference_mode() -> None:
    module = ENCODER(batch_first=True).eval()
    x = torch.randn(B, T, D)
    with torch.no_grad():
        assert rule(module, x) == Rule((0,), (0,))
    with torch.inference_mode():
        assert rule(module, torch.randn(B, T, D)) == Rule((0,), (0,))
    assert rule(module, x) == Rule((0,), (0,))


def test_batch_norm_and_dropout_that_are_switched_off() -> None:
    module = nn.Sequential(nn.Linear(D, D), nn.BatchNorm1d(D), nn.Dropout(0.5)).eval()
    assert rule(module, torch.randn(B, D)) == Rule((0,), (0,))
    module.train()
    module[1].eval()
    module[2].p = 0.0
    assert rule(module, torch.randn(B, D)) == Rule((0,), (0,))


def test_autocast() -> None:
    with torch.autocast("cpu", torch.bfloat16):
        assert rule(ENCODER(batch_first=True), torch.randn(B, T, D)) == Rule((0,), (0,))


def test_a_module_that_computes_in_float32_only() -> None:
    module = Calls(lambda h: h.float() @ torch.ones(D, 2))
    assert rule(module, torch.randn(B, D)) == Rule((0,), (0,))


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_checkpoints_inside(use_reentrant: bool) -> None:
    from torch.utils.checkpoint import checkpoint

    layer = nn.Linear(D, D)
    module = Calls(lambda h: checkpoint(torch.tanh, h, use_reentrant=use_reentrant))
    assert rule(nn.Sequential(layer, module), torch.randn(B, D)) == Rule((0,), (0,))


class Reverse(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> torch.Tensor:
        return -gradient


class Sign(Reverse):
    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> torch.Tensor:
        return gradient.sign()


class Centre(Reverse):
    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> torch.Tensor:
        return gradient - gradient.mean(0)


def test_gradients_of_the_programs_own() -> None:
    x = torch.randn(B, D)
    assert rule(Calls(Reverse.apply), x) == Rule((0,), (0,))
    for function in (Sign, Centre):
        assert "backward pass" in reason(Calls(function.apply), x)


def clamped(h: torch.Tensor) -> torch.Tensor:
    h = h * 1
    if h.requires_grad:
        h.register_hook(lambda gradient: gradient.clamp(-1, 1))
    return h


def test_a_hook_on_an_inner_tensor() -> None:
    assert "backward pass" in reason(Calls(clamped), torch.randn(B, D))


def test_inputs_that_need_gradients() -> None:
    made = nn.Linear(4, D)(torch.randn(B, 4))
    assert rule(Calls(identity), made) == Rule((0,), (0,))
    assert rule(Calls(identity), torch.randn(B, D, requires_grad=True)) == Rule((0,), (0,))
    prompt = torch.randn(D, requires_grad=True)
    assert rule(Calls(torch.add), torch.randn(B, D), prompt) == Rule((0, None), (0,))


def test_a_cache_that_the_module_fills() -> None:
    """A table that depends on sizes other than the number of samples is the same on all ranks."""

    class Model(nn.Linear):
        table: torch.Tensor | None = None

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            if self.table is None or self.table.shape[0] != x.shape[1]:
                self.table = torch.arange(x.shape[1], dtype=x.dtype)[:, None]
            return super().forward(x) + self.table

    module = Model(D, D)
    assert rule(module, torch.randn(B, T, D)) == Rule((0,), (0,))
    assert module.table is None


def test_a_cache_outside_of_the_module() -> None:
    @functools.cache
    def table(size: int) -> torch.Tensor:
        return torch.arange(float(size))

    module = Calls(lambda h: h + table(h.shape[-1]))
    assert rule(module, torch.randn(B, D)) == Rule((0,), (0,))


def test_a_module_that_counts_its_calls() -> None:
    class Model(nn.Linear):
        calls = 0
        seen = 0

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            self.calls += 1
            return super().forward(x)

    module = Model(D, D)
    assert rule(module, torch.randn(B, D)) == Rule((0,), (0,))
    assert module.calls == 0


def test_a_forward_function_in_the_instance() -> None:
    """Accelerate wraps forward in this way."""
    module = nn.Linear(D, D)
    original = module.forward

    class Wrapped:
        def __init__(self, call: Any) -> None:
            self.call = call

        def __call__(self, x: torch.Tensor) -> Any:
            return self.call(x)

    Wrapped.__module__ = "other"
    wrapped = Wrapped(original)
    module.forward = lambda x: wrapped(x)  # type: ignore[method-assign]
    assert rule(module, torch.randn(B, D)) == Rule((0,), (0,))


def test_a_module_that_is_reached_through_a_foreign_object() -> None:
    """A copy would call the program's own module."""

    class Helper:
        def __init__(self, layer: nn.Module) -> None:
            self.layer = layer

        def run(self, x: torch.Tensor) -> Any:
            return self.layer(x)

    Helper.__module__ = "other"
    module = Calls(identity)
    helper = Helper(module.linear)
    module.function = functools.partial(lambda helper, h: helper.run(h), helper)
    assert "cannot be copied" in reason(module, torch.randn(B, D))


def test_old_weight_norm() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        module = nn.utils.weight_norm(nn.Linear(D, D))
    module(torch.randn(B, D))
    assert rule(module, torch.randn(B, D)) == Rule((0,), (0,))


def test_spectral_norm() -> None:
    module = nn.utils.parametrizations.spectral_norm(nn.Linear(D, D))
    assert rule(module, torch.randn(B, D)) == Rule((0,), (0,))


# What mixes samples


class Attention(nn.Module):
    """Attends to the other samples, with a gate."""

    def __init__(self, gate: float, learned: bool = True) -> None:
        super().__init__()
        value = torch.tensor(gate)
        self.gate = nn.Parameter(value) if learned else value
        self.linear = nn.Linear(D, D)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = self.linear(x)
        return h + self.gate * (torch.softmax(h @ h.T, 1) @ h)


@pytest.mark.parametrize("gradients", [True, False])
@pytest.mark.parametrize("gate", [1.0, 0.0, 1e-6])
def test_attention_to_other_samples(gate: float, gradients: bool) -> None:
    with torch.set_grad_enabled(gradients):
        assert "mixes samples" in reason(Attention(gate), torch.randn(B, D))


@pytest.mark.parametrize("gate", [1.0, 1e-6, 1e-9])
def test_attention_with_a_fixed_factor(gate: float) -> None:
    assert "mixes samples" in reason(Attention(gate, learned=False), torch.randn(B, D))


@pytest.mark.parametrize("gate", [1.0, 0.0])
def test_weak_mixing_in_a_module_that_computes_in_float32_only(gate: float) -> None:
    class Model(Attention):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            h = self.linear(x) @ torch.eye(D)
            return h + 1e-4 * self.gate * (torch.softmax(h @ h.T, 1) @ h)

    with torch.no_grad():
        assert "if other samples change" in reason(Model(gate), torch.randn(B, D))


def test_equal_samples_do_not_hide_that_they_are_mixed() -> None:
    for value in (torch.zeros(B, D), torch.ones(B, D)):
        assert "mixes samples" in reason(Attention(1.0), value)


def minibatch_deviation(h: torch.Tensor) -> torch.Tensor:
    deviation = h.std(0).mean().expand(h.shape[0], 1)
    return torch.cat([h, deviation], 1)


@pytest.mark.parametrize("gradients", [True, False])
@pytest.mark.parametrize(
    "function",
    [
        minibatch_deviation,
        lambda h: h.softmax(0),
        lambda h: h.cumsum(0),
        lambda h: h - h.mean(0),
        lambda h: h / h.shape[0],
        lambda h: h.flip(0),
        lambda h: torch.cat([h, h[-1:]])[1:],
        lambda h: h / h.abs().amax(),
        lambda h: (h - h.detach().amax()).exp(),
        lambda h: (h, h[0]),
        lambda h: h @ h.T,
    ],
)
def test_functions_that_mix_samples(function: Callable[..., Any], gradients: bool) -> None:
    with torch.set_grad_enabled(gradients):
        why = reason(Calls(function), torch.randn(B, D))
    assert "mixes samples" in why or "has the shape" in why


@pytest.mark.parametrize(
    ("function", "words"),
    [
        (lambda h: (h, h.shape[0]), "something else"),
        (lambda h: (h, h.std().item()), "something else"),
        (lambda h: (h, torch.distributions.Normal(h, 1.0)), "Normal"),
        (lambda h: torch.ones(3), "nothing with a row"),
        (lambda h: (h, h.mean(0)), "depends on the samples"),
        (lambda h: (h, (h.abs() > 1e-3).nonzero()), "depend"),
        (lambda h: torch.cat([h, h]), "sizes that depend"),
        (lambda h: h.to_sparse(), "cannot be joined"),
    ],
)
def test_outputs_that_cannot_be_joined(function: Callable[..., Any], words: str) -> None:
    assert words in reason(Calls(function), torch.randn(B, D))


# What does something else besides


def test_changed_arguments() -> None:
    x, collected = torch.randn(B, D), []
    module = Calls(lambda h, y: y.mul_(2) + h)
    other = torch.randn(B, D)
    before = other.clone()
    assert "changes its arguments" in reason(module, x, other)
    assert torch.equal(other, before)
    assert other._version == 0
    unseen = Calls(lambda h, y: y.data.mul_(2) + h)
    assert "changes its arguments" in reason(unseen, x, other)
    assert torch.equal(other, before)
    appends = Calls(lambda h, into: into.append(h) or h)
    assert "changes its arguments" in reason(appends, x, collected)
    assert not collected


class Keeps(nn.Linear):
    def __init__(self, into: str) -> None:
        super().__init__(D, D)
        self.into = into
        self.kept: list[torch.Tensor] = []
        self.last: torch.Tensor | None = None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = super().forward(x)
        if self.into == "attribute":
            self.last = h
        else:
            self.kept.append(h * 2)
        return h * 3


def test_the_first_sample_is_kept() -> None:
    """The first shard's is that of the whole batch."""

    class Model(nn.Linear):
        first: torch.Tensor | None = None

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            self.first = x[0].detach() * 2
            return super().forward(x)

    with torch.no_grad():
        assert "'first'" in reason(Model(D, D), torch.randn(B, D))


@pytest.mark.parametrize("into", ["attribute", "list"])
def test_kept_activations(into: str) -> None:
    module = Keeps(into)
    assert "depends on the samples" in reason(module, torch.randn(B, D))
    assert module.last is None
    assert not module.kept


def test_activations_in_a_list_or_dictionary_of_the_program() -> None:
    activations: list[torch.Tensor] = [torch.ones(1)]
    by_name: dict[str, torch.Tensor] = {}

    class Model(nn.Linear):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            h = super().forward(x)
            activations.append(h * 2)
            by_name["h"] = h * 4
            return h * 3

    assert "keeps tensors" in reason(Model(D, D), torch.randn(B, D))
    assert len(activations) == 1
    assert not by_name

    def keep(h: torch.Tensor) -> torch.Tensor:
        activations.append(h * 2)
        return h * 3

    assert "'function'" in reason(Calls(keep), torch.randn(B, D))
    assert len(activations) == 1


def test_a_hook_of_the_program() -> None:
    activations: list[Any] = []
    module = nn.Sequential(nn.Linear(D, D), nn.ReLU())
    handle = module[1].register_forward_hook(lambda *args: activations.append(args[2]))
    assert "has a hook of the program on its ReLU" in reason(module, torch.randn(B, D))
    assert not activations
    handle.remove()
    assert rule(module, torch.randn(B, D)) == Rule((0,), (0,))
    handle = nn.modules.module.register_module_forward_hook(lambda *args: None)
    assert "all modules" in reason(module, torch.randn(B, D))
    handle.remove()


class Codebook(nn.Module):
    """Moves its codes towards the samples."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(D, D)
        self.register_buffer("codes", torch.randn(4, D))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = self.linear(x)
        nearest = torch.cdist(h, self.codes).argmin(1)
        chosen = self.codes[nearest]
        if self.training:
            with torch.no_grad():
                self.codes.index_add_(0, nearest, 0.1 * (h - chosen))
        return h + (chosen - h).detach()


def test_buffers_that_follow_the_samples() -> None:
    module = Codebook()
    before = module.codes.clone()
    assert "'codes'" in reason(module, torch.randn(B, D))
    assert torch.equal(module.codes, before)
    assert rule(module.eval(), torch.randn(B, D)) == Rule((0,), (0,))


def test_a_count_of_samples() -> None:
    class Model(nn.Linear):
        seen = 0

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            self.seen += x.shape[0]
            return super().forward(x)

    module = Model(D, D)
    assert "'seen'" in reason(module, torch.randn(B, D))
    assert module.seen == 0


def test_parameters_that_the_first_call_sets() -> None:
    class Model(nn.Linear):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            self.bias.data.copy_(x.mean(0))
            return super().forward(x)

    module = Model(D, D)
    before = module.bias.detach().clone()
    assert "changes its parameters" in reason(module, torch.randn(B, D))
    assert torch.equal(module.bias, before)


class Draws(nn.Linear):
    def __init__(self, draw: Callable[[torch.Tensor], Any]) -> None:
        super().__init__(D, D)
        self.draw = draw

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.draw(x)
        return super().forward(x)


def states() -> Any:
    numpy = pytest.importorskip("numpy")
    return random.getstate(), repr(numpy.random.get_state()), torch.get_rng_state().tolist()


def placed(module: nn.Module, *args: Any) -> list[tuple[str, int | None, bool]]:
    found = rule(module, *args).placements
    return [(placement.operator, placement.dim, placement.is_outer) for placement in found]


def test_draws_that_have_places() -> None:
    numpy = pytest.importorskip("numpy")
    x = torch.randn(B, D)
    draws: dict[Callable[[torch.Tensor], Any], list[tuple[str, int | None, bool]]] = {
        F.dropout: [("dropout", 0, True)],
        torch.randn_like: [("normal_", 0, True)],
        lambda x: torch.rand(3): [("uniform_", None, True)],
        lambda x: random.random(): [],
        lambda x: numpy.random.rand(): [],
    }
    for draw, places in draws.items():
        module = Draws(draw)
        before = states()
        assert placed(module, x) == places
        assert states() == before
    assert placed(Calls(lambda h: F.dropout(h, 0.3) + torch.rand_like(h)), x) == [
        ("dropout", 0, True),
        ("uniform_", 0, True),
    ]


def test_draws_for_samples_that_share_a_dimension() -> None:
    """Shapes alone do not tell how."""
    x = torch.randn(B, T, D)

    def tokens(x: torch.Tensor) -> torch.Tensor:
        return F.dropout(x.flatten(0, 1)).view(x.shape)

    assert placed(Calls(tokens), x) == [("dropout", 0, True)]
    assert placed(Calls(lambda h: tokens(h.mT.permute(2, 0, 1)).permute(1, 0, 2)), x) == [
        ("dropout", 0, False)
    ]


def test_draws_that_have_no_places() -> None:
    numpy = pytest.importorskip("numpy")
    generator = torch.Generator()
    own = numpy.random.default_rng(0)
    draws: list[Callable[[torch.Tensor], Any]] = [
        lambda x: numpy.random.rand(x.shape[0]),
        lambda x: random.sample(range(x.shape[0]), x.shape[0]),
        lambda x: torch.randperm(x.shape[0]),
        lambda x: torch.rand(x.shape[0] + 1),
        lambda x: torch.poisson(x.abs()),
        lambda x: torch.randn(3, generator=generator),
    ]
    before, given = states(), generator.get_state()
    for draw in draws:
        assert "draws random numbers" in reason(Draws(draw), torch.randn(B, D))
        torch.manual_seed(0)
        assert states() == before
    assert torch.equal(generator.get_state(), given)
    module = Draws(identity)
    module.own = own
    module.draw = functools.partial(lambda module, x: module.own.random(), module)
    state = own.bit_generator.state
    assert "draws random numbers" in reason(module, torch.randn(B, D))
    assert own.bit_generator.state == state


def test_mixing_beside_draws_is_found() -> None:
    x = torch.randn(B, D)
    for function in (
        lambda h: F.dropout(h, 0.3) - h.mean(0),
        lambda h: h * torch.rand_like(h).amax(),
        lambda h: h + 1e-6 * F.dropout(h, 0.5).sum(0),
        lambda h: h[torch.rand(h.shape[0]).argsort()],
    ):
        found = find_rule(Calls(function), (x,), {}, 2)
        assert isinstance(found, Refusal), found


# Batch norm


def normalized(h: torch.Tensor) -> torch.Tensor:
    return F.batch_norm(h, None, None, training=True)


@pytest.mark.parametrize("gradients", [True, False])
@pytest.mark.parametrize("size", [2, 3])
def test_batch_norm_in_training(gradients: bool, size: int) -> None:
    module = nn.Sequential(
        *(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 4, 3)),
        *(nn.BatchNorm2d(4), nn.InstanceNorm2d(4, track_running_stats=True), nn.Dropout(0.2)),
        *(nn.Flatten(), nn.LazyLinear(5), nn.BatchNorm1d(5)),
    )
    images = torch.randn(B, 3, 8, 8)
    copy.deepcopy(module)(images)
    module(images)
    before = copy.deepcopy(module.state_dict())
    with torch.set_grad_enabled(gradients):
        found = rule(module, images, size=size)
        again = rule(copy.deepcopy(module).double(), images.double(), size=size)
    assert found == again
    assert (found.inputs, found.outputs) == ((0,), (0,))
    assert all(torch.equal(value, before[name]) for name, value in module.state_dict().items())


def test_batch_norms_whose_gradients_are_rounding_errors() -> None:
    norms = nn.BatchNorm1d(D), nn.BatchNorm1d(D)
    module = nn.Sequential(nn.Linear(D, D), *norms, nn.Linear(D, D))
    assert rule(module, torch.randn(B, D)).outputs == (0,)


def test_batch_norm_before_integers() -> None:
    module = nn.Sequential(nn.Linear(D, D), nn.BatchNorm1d(D), Calls(lambda h: h.argmax(1)))
    assert rule(module, torch.randn(B, D)).outputs == (0,)


def test_batch_norm_under_autocast() -> None:
    module = nn.Sequential(nn.Conv1d(3, 4, 3), nn.BatchNorm1d(4), nn.ReLU(), nn.Conv1d(4, 4, 3))
    with torch.autocast("cpu", torch.bfloat16):
        assert rule(module, torch.randn(B, 3, 12)).outputs == (0,)


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_batch_norm_that_is_computed_again(use_reentrant: bool) -> None:
    from torch.utils.checkpoint import checkpoint

    block = nn.Sequential(nn.Linear(D, D), nn.BatchNorm1d(D), nn.Dropout(0.3), nn.Linear(D, D))

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first = nn.Linear(D, D)
            self.block = block

        def forward(self, x: torch.Tensor) -> Any:
            h = self.first(x)
            return checkpoint(self.block, h, use_reentrant=use_reentrant)

    assert rule(Model(), torch.randn(B, D)).outputs == (0,)


@pytest.mark.parametrize(
    "function",
    [
        lambda h: normalized(h) - h.mean(0),
        lambda h: normalized(h - h.mean(0)),
        lambda h: normalized(h + 1e-3 * h.flip(0)),
        lambda h: h + normalized(h.T).T,
        lambda h: h + normalized(torch.eye(D) + h[:1, :1] * 0)[0],
        lambda h: h + normalized(torch.randn(4, D))[0],
        lambda h: normalized(h / h.shape[0]),
    ],
)
def test_batch_norm_of_something_else(function: Callable[..., Any]) -> None:
    with torch.no_grad():
        found = find_rule(Calls(function), (torch.randn(B, D),), {}, 2)
    assert isinstance(found, Refusal), found


# What cannot be tested


def test_compiled_modules() -> None:
    script = torch.jit.script(nn.Linear(D, D))
    found = find_rule(script, (torch.randn(B, D),), {}, 2)
    assert isinstance(found, Refusal)
    assert "torch.jit" in found.reason
    holder = nn.Sequential(script)
    assert "torch.jit" in reason(holder, torch.randn(B, D))


def test_arguments_that_cannot_be_cut() -> None:
    packed = nn.utils.rnn.pack_sequence([torch.randn(3, D), torch.randn(2, D)])
    assert "PackedSequence" in reason(nn.LSTM(D, D), packed)

    class Cache:
        pass

    assert "Cache" in reason(Calls(lambda h, cache: h), torch.randn(B, D), Cache())
    assert "cannot be cut" in reason(Calls(identity), torch.randn(B, D).to_sparse())


def test_what_may_be_tested_again() -> None:
    x = torch.randn(B, D)
    lazy = find_rule(nn.LazyLinear(4), (x,), {}, 2)
    assert isinstance(lazy, Refusal)
    assert not lazy.is_lasting
    raising = find_rule(nn.Linear(D + 1, 2), (x,), {}, 2)
    assert raising == Refusal("Linear raises RuntimeError", is_lasting=False)


def test_fewer_rows_than_ranks() -> None:
    assert "as many rows as ranks" in reason(nn.Linear(2, 2), torch.randn(2, 2), size=3)


# What the program can see of a test


def test_a_test_leaves_no_trace(capfd: pytest.CaptureFixture[str]) -> None:
    class Loud(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(D, D)
            self.register_buffer("count", torch.zeros(()))
            self.history = {"calls": [0]}
            self.other = nn.Linear(D, D)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            print("forward")
            warnings.warn("loud", stacklevel=1)
            self.count += 1
            self.history["calls"].append(1)
            self.history["calls"][0] += 1
            return self.other(torch.relu(self.linear(x)))

    module = Loud()
    x = torch.randn(B, D, requires_grad=True)
    module(x.detach()).sum().backward()
    capfd.readouterr()
    kept = copy.deepcopy(module.state_dict())
    gradients = [parameter.grad.clone() for parameter in module.parameters()]
    versions = [parameter._version for parameter in module.parameters()]
    attributes = {name: id(value) for name, value in vars(module).items()}
    before, filters, values = states(), list(warnings.filters), x.detach().clone()
    assert rule(module, x) == Rule((0,), (0,))
    assert capfd.readouterr() == ("", "")
    assert states() == before
    assert warnings.filters == filters
    assert all(torch.equal(value, kept[name]) for name, value in module.state_dict().items())
    assert [parameter._version for parameter in module.parameters()] == versions
    for parameter, gradient in zip(module.parameters(), gradients, strict=True):
        assert torch.equal(parameter.grad, gradient)
    assert module.history == {"calls": [1, 1]}
    assert {name: id(value) for name, value in vars(module).items()} == attributes
    assert torch.equal(x, values)
    assert x.grad is None
    with pytest.warns(UserWarning, match="loud"):
        module(x)


def test_a_warning_that_is_shown_once_is_not_used_up() -> None:
    module = Calls(lambda h: h + h[None].T.sum(-1).T)  # torch warns of .T once in a process
    x = torch.randn(B, D)
    assert rule(module, x) == Rule((0,), (0,))
    with pytest.warns(UserWarning, match=r"\.T"):
        module(x)
    assert not torch.is_warn_always_enabled()


@pytest.mark.parametrize("gate", [None, 1.0])
def test_nothing_of_a_test_lives_on(gate: float | None) -> None:
    module = ENCODER(batch_first=True) if gate is None else Attention(gate)
    x = torch.randn(B, T, D) if gate is None else torch.randn(B, D)
    find_rule(module, (x,), {}, 2)
    gc.collect()

    def living() -> int:
        kinds = torch.Tensor, nn.Module
        return sum(issubclass(type(found), kinds) for found in gc.get_objects())

    before = living()
    gc.disable()
    try:
        find_rule(module, (x,), {}, 2)
        assert living() == before
    finally:
        gc.enable()


def test_a_module_that_begins_to_mix_samples() -> None:
    class Model(nn.Linear):
        calls = 0

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            self.calls += 1
            h = super().forward(x)
            return h - h.mean(0) if self.calls > 4 else h

    module, x = Model(D, D), torch.randn(B, D)
    for _ in range(4):
        assert rule(module, x) == Rule((0,), (0,))
        module(x)
    assert "mixes samples" in reason(module, x)


def test_experts_that_get_other_numbers_of_samples() -> None:
    """Products of other sizes are rounded in other ways, which is no mixing."""

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.choose = nn.Linear(64, 3)
            self.experts = nn.ModuleList(nn.Linear(64, 64) for _ in range(3))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            chosen = self.choose(x).argmax(1)
            out = torch.zeros_like(x)
            for number, expert in enumerate(self.experts):
                rows = (chosen == number).nonzero()[:, 0]
                out = out.index_add(0, rows, expert(x[rows]))
            return out

    assert rule(Model(), torch.randn(64, 64)) == Rule((0,), (0,))


def test_the_same_result_in_every_run() -> None:
    module, x = ENCODER(batch_first=True), torch.randn(B, T, D)
    assert len({find_rule(module, (x,), {}, 3) for _ in range(3)}) == 1


# Kinds and cutting


def test_kinds() -> None:
    module = nn.Sequential(nn.Linear(D, D), nn.Dropout())
    x, y = torch.randn(B, D), torch.randn(B + 1, D)

    def kind(*args: Any, **kwargs: Any) -> Any:
        return kind_of(objects.Tree(module), args, kwargs)

    first = kind(x, (1, 0.5), mode="a")
    assert first == kind(y, (1, 0.25), mode="a")
    assert hash(first) == hash(kind(y, (1, 0.25), mode="a"))
    others = [
        kind(x, (2, 0.5), mode="a"),
        kind(x, (1, 0.0), mode="a"),
        kind(x, (1, 0.5), mode="b"),
        kind(x, [1, 0.5], mode="a"),
        kind(x.double(), (1, 0.5), mode="a"),
        kind(x[None], (1, 0.5), mode="a"),
        kind(x[:1], (1, 0.5), mode="a"),
    ]
    with torch.no_grad():
        others.append(kind(x, (1, 0.5), mode="a"))
    module[1].eval()
    others.append(kind(x, (1, 0.5), mode="a"))
    module[1].train()
    module[0].register_forward_hook(lambda *args: None)
    others.append(kind(x, (1, 0.5), mode="a"))
    assert first not in others
    assert kind(x, x) != kind(x, y)


@pytest.mark.parametrize("batch", [1, 2, 3, 7, 8])
@pytest.mark.parametrize("size", [1, 2, 3])
def test_shards_join_to_the_whole(batch: int, size: int) -> None:
    args = (torch.randn(T, batch, D), {"mask": CAUSAL, "labels": torch.randn(batch)})
    cut_by = Rule((1, None, 0), (1, None, 0))
    found = leaves(args, {})
    assert cutting.batch_size(cut_by, found) == batch
    shards = cutting.bounds(batch, size)
    assert shards[0][0] == 0
    assert shards[-1][1] == batch
    rows = [stop - start for start, stop in shards]
    assert max(rows) - min(rows) <= 1
    pieces = [cutting.cut(cut_by, found, start, stop) for start, stop in shards]
    assert all(piece.is_contiguous() for shard in pieces for piece in shard)
    joined = cutting.join(cut_by, pieces)
    (again, rest), _ = cutting.rebuild(args, {}, joined)
    assert torch.equal(again, args[0])
    assert torch.equal(rest["labels"], args[1]["labels"])
    assert rest["mask"] is CAUSAL


def test_sizes_that_disagree() -> None:
    assert cutting.batch_size(Rule((0, 0), (0,)), [torch.ones(3), torch.ones(4)]) is None
    assert cutting.batch_size(Rule((0, 1), (0,)), [torch.ones(3), torch.ones(3)]) is None


def test_data_parallel_without_several_devices_is_its_module() -> None:
    parallel = nn.DataParallel(nn.Linear(D, D))
    assert rule(parallel, torch.randn(B, D)) == Rule((0,), (0,))
    parallel.device_ids = [0, 1]
    assert reason(parallel, torch.randn(B, D)) == "DataParallel is parallel itself"


class Counting(nn.Module):
    """Counts its passes over copies; mixes samples once it is told to."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(D, D)
        self.mixes = False

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        passes.append(len(x))
        y: torch.Tensor = self.linear(x)
        return y - y.mean(0) if self.mixes else y


passes: list[int] = []


def test_a_known_rule_is_tested_with_the_present_weights_alone() -> None:
    module, x = Counting(), torch.randn(B, D)
    passes.clear()
    found = rule(module, x)
    full = len(passes)
    passes.clear()
    assert find_rule(module, (x,), {}, 2, found) == found
    assert len(passes) <= full // 2
    module.mixes = True
    refused = find_rule(module, (x,), {}, 2, found)
    assert isinstance(refused, Refusal)
    assert "mixes samples" in refused.reason
    other = Rule((None,), (None,))
    assert find_rule(nn.Linear(D, D), (x,), {}, 2, other) == Rule((0,), (0,))
