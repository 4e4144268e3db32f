"""Whether early gradients agree: honest rounding on real models passes, a wrong factor does not."""

from __future__ import annotations

import contextlib
import functools
import importlib.util
import random
import sys
from array import array
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType

import pytest
import torch

from flatout.agent import flows
from flatout.agent.tensors import norm, sample
from flatout.plan import Check
from flatout.tune import gradients
from flatout.wire.lines import Gradient

EXAMPLES = Path(__file__).parents[1] / "examples"
UPDATES, SEEDS = 3, 3

Recorded = dict[str, list[Gradient]]


@functools.cache
def example(name: str, module: str) -> ModuleType:
    path = EXAMPLES / name / f"{module}.py"
    spec = importlib.util.spec_from_file_location(f"example_{name}_{module}", path)
    assert spec is not None
    assert spec.loader is not None
    found = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = found  # dataclasses look their module up
    spec.loader.exec_module(found)
    return found


def built(name: str) -> tuple[torch.nn.Module, Callable[[], torch.Tensor], int]:
    """A model, what draws its inputs, and the number of its classes."""
    if name == "gpt":
        language = example("language", "model")
        config = language.Config(vocabulary=96, context=32, layers=4, heads=4, width=64)
        return language.GPT(config), lambda: torch.randint(96, (4, 32)), 96
    model = example("image", "models").MODELS[name]()
    return model, lambda: torch.rand(16, 1, 28, 28), 10


@contextlib.contextmanager
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def train(name: str, seed: int, bf16: bool, dropout_seed: int) -> Recorded:
    """The gradients of the first updates by Adam."""
    torch.manual_seed(seed)
    model, draw, classes = built(name)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    data = [(x := draw(), torch.randint(classes, _labels(x, name))) for _ in range(UPDATES)]
    torch.manual_seed(dropout_seed)
    recorded: Recorded = {}
    for inputs, labels in data:
        with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
            logits = model(inputs)
        loss = torch.nn.functional.cross_entropy(logits.float().flatten(0, -2), labels.flatten())
        optimizer.zero_grad()
        loss.backward()
        for parameter_name, parameter in model.named_parameters():
            assert parameter.grad is not None
            recorded.setdefault(parameter_name, []).append(taken(parameter.grad))
        optimizer.step()
    return recorded


def _labels(inputs: torch.Tensor, name: str) -> tuple[int, ...]:
    return tuple(inputs.shape) if name == "gpt" else (len(inputs),)


def taken(grad: torch.Tensor) -> Gradient:
    sampled = array("f", sample(grad, 512).tolist())
    return Gradient(float(grad.norm(dtype=torch.float64)), grad.numel(), sampled)


@functools.cache
def runs(name: str, bf16: bool = False, dropout: int = 0) -> list[Recorded]:
    with one_thread():
        return [train(name, seed, bf16, dropout_seed=dropout + seed) for seed in range(SEEDS)]


def judge(bare: list[Recorded], plan: list[Recorded], exactness: str) -> Check:
    return gradients.judge(bare, plan, {exactness})  # type: ignore[arg-type]


MODELS = ("cnn", "vit", "gpt")
SMALL = {"cnn": "blocks.1.norm1.bias", "vit": "head.bias", "gpt": "blocks.2.norm1.weight"}
"""Parameters of each whose gradient is a small part of the whole."""


def scaled(plan: list[Recorded], name: str, factor: float) -> list[Recorded]:
    """As if the gradients of one parameter were wrong by a constant factor."""
    return [
        {
            other: [
                Gradient(g.norm * factor, g.elements, array("f", [x * factor for x in g.sample]))
                if other == name and g.sample is not None
                else g
                for g in given
            ]
            for other, given in run.items()
        }
        for run in plan
    ]


@pytest.mark.parametrize("name", MODELS)
def test_bfloat16_passes_and_a_wrong_factor_in_one_gradient_does_not(name: str) -> None:
    bare, bf16 = runs(name), runs(name, bf16=True)
    honest = judge(bare, bf16, "reduced")
    assert honest.result == "passed", honest.why
    assert honest.measurements["parameters"] == len(bare[0])
    assert judge(bare, bf16, "reordered").result == "failed"
    for factor in (1.25, 0.8):
        check = judge(bare, scaled(bf16, SMALL[name], factor), "reduced")
        assert check.result == "failed"
        assert check.why.startswith(f"the gradient norm of {SMALL[name]} is ")
        assert check.measurements["factor"] == pytest.approx(factor, rel=0.1)


@pytest.mark.parametrize("name", ["vit", "gpt"])
def test_other_dropout_masks_pass_and_a_wrong_factor_in_one_gradient_does_not(name: str) -> None:
    bare, other = runs(name), runs(name, dropout=50)
    honest = judge(bare, other, "resampled")
    assert honest.result == "passed", honest.why
    check = judge(bare, scaled(other, SMALL[name], 2.0), "resampled")
    assert check.result == "failed"
    assert SMALL[name] in check.why
    assert check.why.endswith("relative to the median of all parameters")
    for parameter in other[0]:
        other = scaled(other, parameter, 2.0)
    check = judge(bare, other, "resampled")
    assert check.result == "failed"
    assert check.why.startswith("gradient norms are")
    assert check.why.endswith("in the median of all parameters")


def noise(norm: float, draw: random.Random) -> Gradient:
    values = [draw.gauss(0, norm / 10) for _ in range(100)]
    return Gradient(sum(v * v for v in values) ** 0.5, 100, array("f", values))


def test_gradients_that_are_nothing_but_rounding_are_not_held_against_a_plan() -> None:
    """Of a bias before batch norm, say: zero in exact arithmetic."""
    draw = random.Random(1)
    weights = [[noise(1.0, draw) for _ in range(3)] for _ in range(4)]

    def with_bias(norm: float) -> list[Recorded]:
        return [{"weight": w, "bias": [noise(norm, draw) for _ in range(3)]} for w in weights]

    bare = with_bias(1e-8)
    assert judge(bare, with_bias(1e-4), "reduced").result == "passed"
    assert judge(bare, with_bias(1e-7), "resampled").result == "passed"
    check = judge(bare, with_bias(0.1), "reduced")
    assert check.why.startswith("the gradient norm of bias is")


def test_a_gradient_that_points_elsewhere_is_refused_in_whichever_update_it_begins() -> None:
    draw = random.Random(4)
    same = [{"a": [noise(1.0, draw) for _ in range(3)]} for _ in range(3)]
    for begins in (0, 1):
        other = [
            {"a": [*run["a"][:begins], *(noise(1.0, draw) for _ in range(3 - begins))]}
            for run in same
        ]
        check = judge(same, other, "reduced")
        assert check.why.startswith("the first gradient of a is off by 1.")
    assert judge(same, same, "reordered").measurements["error"] == 0.0


def test_gradients_that_are_missing_or_not_finite_are_named() -> None:
    draw = random.Random(2)
    run = {"a": [noise(1.0, draw)], "b": [noise(1.0, draw)]}
    without = {"a": run["a"]}
    assert judge([run], [without], "reduced").why == "the plan gives no gradient to b"
    assert judge([without], [run], "reduced").why == "only the plan gives a gradient to b"
    broken = {**run, "b": [Gradient(float("nan"), 100, None)]}
    assert "b is not finite under the plan" in judge([run], [broken], "reduced").why
    assert judge([broken], [broken], "reduced").result == "passed"
    assert judge([{}], [{}], "reduced").result == "open"


def test_a_gradient_of_which_only_the_norm_is_known_is_held_to_its_norm() -> None:
    draw = random.Random(3)
    bare = [{"a": [noise(1.0, draw)], "words": [Gradient(0.5, 40, None)]} for _ in range(4)]
    for factor, result in ((1.0, "passed"), (1.002, "passed"), (1.25, "failed")):
        words = [Gradient(0.5 * factor, 40, None)]
        plan = [{**run, "words": words} for run in bare]
        assert judge(bare, plan, "reordered").result == result


def known(norm: float, draw: random.Random, roundoff: float, noise_norm: float | None) -> Gradient:
    made = noise(norm, draw)
    return Gradient(made.norm, made.elements, made.sample, roundoff, noise_norm)


@pytest.mark.parametrize("roundoff", [2.0**-8, 2.0**-11, 2.0**-24, 2.0**-53])
@pytest.mark.parametrize("exactness", ["reordered", "reduced", "resampled"])
def test_rounding_is_known_by_what_a_gradient_is_summed_from(
    roundoff: float, exactness: str
) -> None:
    """Whatever part of all gradients it is, which is a large one where inputs are small."""
    draw = random.Random(7)
    scale = 64 * roundoff  # of the gradient of a bias before batch norm, relative to the weights'

    def run(bias: float, weight: Gradient, factor: float = 1.0) -> Recorded:
        assert weight.sample is not None
        return {
            "weight": [
                Gradient(
                    weight.norm * factor,
                    100,
                    array("f", [factor * x for x in weight.sample]),
                    roundoff,
                )
            ],
            "bias": [known(bias, draw, roundoff, 2 * scale)],
        }

    weights = [noise(1.0, draw) for _ in range(4)]
    bare = [run(scale, weight) for weight in weights]
    plan = [run(1.7 * scale, weight) for weight in weights]
    assert judge(bare, plan, exactness).result == "passed"
    wrong = [run(1.7 * scale, weight, factor=1.5) for weight in weights]
    if exactness != "resampled":  # of two gradients, all are 1.5 times bare's
        check = judge(bare, wrong, exactness)
        assert check.why.startswith("the gradient norm of weight is 1.5 times bare's")
    large = max(40 * scale, 0.01)
    real = [run(large, weight) for weight in weights]
    assert judge(real, [run(4 * large, w) for w in weights], exactness).result == "failed"


def test_another_order_of_half_precision_is_held_to_what_half_precision_gives() -> None:
    draw = random.Random(3)
    for roundoff, result in ((2.0**-8, "passed"), (2.0**-24, "failed")):
        bare: list[Recorded] = []
        plan: list[Recorded] = []
        for _ in range(3):
            values = [draw.gauss(0, 1) for _ in range(100)]
            off = [value + draw.gauss(0, 0.02) for value in values]
            for side, numbers in ((bare, values), (plan, off)):
                norm = sum(v * v for v in numbers) ** 0.5
                side.append({"a": [Gradient(norm, 100, array("f", numbers), roundoff)]})
        assert judge(bare, plan, "reordered").result == result


ZERO = ("conv.bias", "k.bias", "shift")
"""Before a norm, before a softmax over the keys, of all logits; ``g`` would be another but for the
norm's epsilon."""


class ZeroGradients(torch.nn.Module):
    """Parameters whose exact gradient is zero, and others beside them."""

    def __init__(self, norm: Callable[[int], torch.nn.Module]) -> None:
        super().__init__()
        self.conv = torch.nn.Conv2d(2, 8, 3)
        self.g = torch.nn.Parameter(torch.ones(1, 8, 1, 1))
        self.norm = norm(8)
        self.q, self.k, self.v = (torch.nn.Linear(8, 8) for _ in range(3))
        self.head = torch.nn.Linear(8, 10)
        self.shift = torch.nn.Parameter(torch.zeros(1))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.norm(self.g * self.conv(x)).relu().flatten(2).transpose(1, 2)
        x = torch.nn.functional.scaled_dot_product_attention(self.q(x), self.k(x), self.v(x))
        logits: torch.Tensor = self.head(x.mean(1)) + self.shift
        return logits


@pytest.mark.parametrize("dtype", ["float32", "autocast", "bfloat16", "float64"])
@pytest.mark.parametrize("inputs", [1.0, 0.1])
def test_zero_gradients_are_below_their_rounding_and_others_are_above(
    dtype: str, inputs: float
) -> None:
    torch.manual_seed(1)
    with one_thread():
        for norm in (
            lambda c: torch.nn.BatchNorm2d(c),
            lambda c: torch.nn.InstanceNorm2d(c, affine=True),
        ):
            net = ZeroGradients(norm)
            x = inputs * torch.rand(16, 2, 12, 12)
            if dtype != "autocast":
                net, x = net.to(getattr(torch, dtype)), x.to(getattr(torch, dtype))
            with torch.autocast("cpu", torch.bfloat16, enabled=dtype == "autocast"):
                logits = net(x)
            target = torch.randint(10, (16,))
            upcast = logits.float() if logits.dtype is torch.bfloat16 else logits
            loss = torch.nn.functional.cross_entropy(upcast, target)
            watched = flows.Flows(lambda function, *args: function(*args))
            watched.watch([loss])
            loss.backward()
            watched.remove_hooks()
            for name, parameter in net.named_parameters():
                flow = watched.take(parameter)
                assert flow is not None, name
                assert parameter.grad is not None
                if not flows.is_sum_of_terms(parameter):
                    continue
                size = float(parameter.grad.double().norm())
                if name in ZERO:
                    assert size <= flow.noise, (name, size, flow.noise)
                elif inputs == 1.0 and name != "g":
                    assert size > flow.noise, (name, size, flow.noise)
            assert watched.take(net.shift) is None


def test_updates_that_a_setting_leaves_as_they_are_do_not_hide_a_factor() -> None:
    """Some begin with the second step, having looked at the first."""
    draw = random.Random(5)
    bare = [{name: [noise(1.0, draw) for _ in range(4)] for name in "abc"} for _ in range(2)]
    plan = [
        {
            name: [
                given[0],
                *(
                    scaled([{name: [g]}], name, 1.25 if name == "b" else 1.003)[0][name][0]
                    for g in given[1:]
                ),
            ]
            for name, given in run.items()
        }
        for run in bare
    ]
    check = judge(bare, plan, "reduced")
    assert check.why.startswith("the gradient norm of b is 1.25 times bare's")
    assert judge(bare, bare, "reduced").result == "passed"


def test_a_parameter_that_the_first_seed_does_not_use_is_judged_as_well() -> None:
    """Programs that draw which of their blocks they run give other parameters to other seeds."""
    used = [Gradient(1.0, 4, None)] * UPDATES
    wrong = [Gradient(2.0, 4, None)] * UPDATES
    bare = [{"always": used}, {"always": used, "sometimes": used}]
    plan = [{"always": used}, {"always": used, "sometimes": wrong}]
    check = judge(bare, plan, "reduced")
    assert check.result == "failed"
    assert check.why.startswith("the gradient norm of sometimes is 2 times bare's")


@pytest.mark.parametrize("order", [1.0, 2.0])
@pytest.mark.parametrize("shape", [(), (5,), (3, 2**20 + 7), (2**21 + 3, 2), (2, 3, 2**19)])
def test_the_norm_of_parts_is_that_of_the_whole(shape: tuple[int, ...], order: float) -> None:
    values = torch.randn(shape)
    expected = torch.linalg.vector_norm(values.double(), ord=order)
    assert torch.allclose(norm(values, order), expected, rtol=1e-12)
    assert norm(values, order).dtype == torch.float64
    assert torch.allclose(norm(values.T, order), expected, rtol=1e-12) if len(shape) == 2 else True
