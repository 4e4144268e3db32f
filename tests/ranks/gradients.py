"""Small trainings; each returns the losses and gradients that it has seen, by name.

Their modules are shared out by the rules of ``give_rules``.
"""

from __future__ import annotations

import contextlib
import copy
import itertools
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from flatout.parallel import checking, kinds

Results = dict[str, torch.Tensor]

CASES: dict[str, Callable[[], Results]] = {}


def case(function: Callable[[], Results]) -> Callable[[], Results]:
    CASES[function.__name__] = function
    return function


def give_rules() -> None:
    """Have modules shared out by the rule in their attribute ``rule``: by default, the first
    dimension of all inputs and of the only output counts samples. A text refuses."""

    def find_rule(
        module: object, args: tuple[object, ...], kwargs: dict[str, object], *_: object
    ) -> kinds.Rule | kinds.Refusal:
        rule = getattr(module, "rule", None)
        if isinstance(rule, str):
            return kinds.Refusal(rule)
        if rule is None:
            rule = (0,) * len(kinds.leaves(args, kwargs)), (0,)
        return kinds.Rule(*rule)

    checking.find_rule = find_rule  # type: ignore[assignment]


def net(*widths: int) -> nn.Sequential:
    layers: list[nn.Module] = []
    for width, following in itertools.pairwise(widths):
        layers += [nn.Linear(width, following), nn.Tanh()]
    return nn.Sequential(*layers[:-1])


def gradients(*modules: nn.Module, prefix: str = "") -> Results:
    return {
        f"{prefix}{number}.{name}": parameter.grad.clone()
        for number, module in enumerate(modules)
        for name, parameter in module.named_parameters()
        if parameter.grad is not None
    }


def run(name: str) -> Results:
    torch.manual_seed(len(name))
    return {key: value.detach().clone() for key, value in CASES[name]().items()}


@case
def plain() -> Results:
    model, x, y = net(4, 8, 3), torch.randn(7, 4), torch.randn(7, 3)
    loss = F.mse_loss(model(x), y)
    loss.backward()
    return {"loss": loss, **gradients(model)}


@case
def generator_through_discriminator() -> Results:
    generator, discriminator = net(3, 8, 4), net(4, 8, 1)
    fake = generator(torch.randn(6, 3))
    loss = F.softplus(-discriminator(fake)).mean()
    loss.backward()
    return {"loss": loss, **gradients(generator, discriminator)}


@case
def discriminator_on_detached() -> Results:
    generator, discriminator = net(3, 8, 4), net(4, 8, 1)
    fake = generator(torch.randn(6, 3))
    loss = F.softplus(discriminator(fake.detach())).mean()
    loss = loss + F.softplus(-discriminator(torch.randn(5, 4))).mean()
    loss.backward()
    other = F.softplus(-discriminator(fake)).mean()
    other.backward()
    return {"loss": loss, "other": other, **gradients(generator, discriminator)}


@case
def root_of_a_mean() -> Results:
    model = net(4, 8, 3)
    loss = model(torch.randn(7, 4)).square().mean().sqrt()
    loss.backward()
    return {"loss": loss, **gradients(model)}


@case
def l1_outside_of_calls() -> Results:
    generator, discriminator = net(3, 8, 4), net(4, 8, 1)
    fake = generator(torch.randn(6, 3))
    loss = discriminator(fake).mean() + 0.3 * fake.abs().mean()
    loss.backward()
    return {"loss": loss, **gradients(generator, discriminator)}


@case
def learned_loss_weight() -> Results:
    model, weight = net(4, 8, 2), nn.Parameter(torch.tensor([0.3, -0.2]))
    out = model(torch.randn(7, 4))
    loss = (out.square().mean(0) * torch.exp(-weight) + weight).sum()
    loss.backward()
    assert weight.grad is not None
    return {"loss": loss, "weight": weight.grad, **gradients(model)}


@case
def penalty_over_parameters() -> Results:
    model = net(4, 8, 3)
    loss = model(torch.randn(7, 4)).square().mean()
    loss = loss + 0.1 * sum((p.square().sum() for p in model.parameters()), torch.zeros(()))
    loss.backward()
    return {"loss": loss, **gradients(model)}


@case
def accumulation() -> Results:
    model = net(4, 8, 3)
    found: Results = {}
    for number in range(3):
        (model(torch.randn(5, 4)).square().mean() / 3).backward()
        found |= gradients(model, prefix=f"{number} ")
    return found


@case
def accumulation_into_zeros() -> Results:
    model = net(4, 8, 3)
    optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9)
    for _ in range(3):
        optimizer.zero_grad(set_to_none=False)
        model(torch.randn(5, 4)).square().mean().backward()
        optimizer.step()
    return {**gradients(model), **dict(model.named_parameters())}


@case
def gradient_penalty() -> Results:
    critic = net(4, 8, 1)
    x = torch.randn(6, 4, requires_grad=True)
    score = critic(x)
    (slope,) = torch.autograd.grad(score.sum(), x, create_graph=True)
    loss = score.mean() + 10 * (slope.norm(dim=1) - 1).square().mean()
    loss.backward()
    assert x.grad is not None
    return {"loss": loss, "slope": slope, "x": x.grad, **gradients(critic)}


@case
def penalty_of_interpolated_generator() -> Results:
    generator, critic = net(3, 8, 4), net(4, 8, 1)
    fake = generator(torch.randn(6, 3))
    mixed = 0.4 * fake + 0.6 * torch.randn(6, 4)
    (slope,) = torch.autograd.grad(critic(mixed).sum(), mixed, create_graph=True)
    loss = (slope.norm(dim=1) - 1).square().mean() + critic(fake).mean()
    loss.backward()
    return {"loss": loss, "slope": slope, **gradients(generator, critic)}


@case
def norm_of_gradients() -> Results:
    model = net(4, 8, 3)
    loss = model(torch.randn(7, 4)).square().mean()
    slopes = torch.autograd.grad(loss, list(model.parameters()), create_graph=True)
    total = loss + sum((slope.square().sum() for slope in slopes), torch.zeros(()))
    total.backward()
    return {"total": total, "slope": slopes[0], **gradients(model)}


@case
def backward_with_graph() -> Results:
    model = net(4, 8, 3)
    model(torch.randn(7, 4)).square().mean().backward(create_graph=True)
    first = gradients(model, prefix="first ")
    graph = [parameter.grad for parameter in model.parameters()]
    total = sum((g.square().sum() for g in graph if g is not None), torch.zeros(()))
    for parameter in model.parameters():
        parameter.grad = None
    total.backward()
    return {**first, "total": total, **gradients(model)}


@case
def inner_step() -> Results:
    model = net(4, 8, 3)
    names = [name for name, _ in model.named_parameters()]
    x, y = torch.randn(7, 4), torch.randn(5, 4)
    inner = model(x).square().mean()
    slopes = torch.autograd.grad(inner, list(model.parameters()), create_graph=True)
    pairs = zip(names, model.parameters(), slopes, strict=True)
    fast = {name: parameter - 0.1 * slope for name, parameter, slope in pairs}
    outer = torch.func.functional_call(model, fast, (y,)).square().mean()
    outer.backward()
    return {"outer": outer, **gradients(model)}


class Modulated(nn.Module):
    """Uses a tensor that was computed outside, and keeps a state from call to call."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = net(4, 4)
        self.outside: list[torch.Tensor] = []
        self.keeps = False

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out = torch.tanh(self.inner(x) * sum(self.outside, torch.ones(())))
        if self.keeps:
            self.outside = [out.mean()]
        return out


@case
def tensors_computed_outside() -> Results:
    source, model = net(4, 4), Modulated()
    model.outside = [source(torch.randn(5, 4)).mean(0)]
    model(torch.randn(7, 4)).square().mean().backward()
    found = gradients(source, model, prefix="outside ")
    model.outside = []
    for _ in range(3):
        model.keeps = not model.keeps
        loss = model(torch.randn(7, 4)).square().mean()
        found |= {f"loss {len(found)}": loss}
    loss.backward()
    return {**found, **gradients(model)}


@case
def gradients_by_hand() -> Results:
    model = net(4, 8, 3)
    found: Results = {}
    for step in range(3):
        loss = model(torch.randn(7, 4)).square().mean()
        slopes = torch.autograd.grad(loss, list(model.parameters()))
        with torch.no_grad():
            for parameter, slope in zip(model.parameters(), slopes, strict=True):
                parameter -= 0.1 * slope
        found[f"loss {step}"] = loss
    return {**found, **dict(model.named_parameters())}


@case
def update_by_hand() -> Results:
    model = net(4, 8, 3)
    for _ in range(3):
        model(torch.randn(8, 4)).square().mean().backward()
        with torch.no_grad():
            for parameter in model.parameters():
                assert parameter.grad is not None
                parameter -= 0.1 * parameter.grad
                parameter.grad.zero_()
    return dict(model.named_parameters())


@case
def uneven_and_tiny_batches() -> Results:
    model = net(4, 8, 3)
    optimizer = torch.optim.Adam(model.parameters(), 0.01)
    found: Results = {}
    for batch in (1, 2, 3, 4, 5, 8, 1, 11):
        optimizer.zero_grad()
        loss = model(torch.randn(batch, 4)).square().mean()
        loss.backward()
        found[f"loss of {batch}"] = loss
        found |= gradients(model, prefix=f"{batch} ")
        optimizer.step()
    return {**found, **dict(model.named_parameters())}


@case
def evaluation() -> Results:
    model = net(4, 8, 3)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    found: Results = {}
    for epoch in range(2):
        model(torch.randn(7, 4)).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        model.eval()
        with torch.no_grad():
            found[f"output {epoch}"] = model(torch.randn(5, 4))
        with torch.inference_mode():
            found[f"inferred {epoch}"] = model(torch.randn(5, 4)).clone()
        model.train()
    return found


class Experts(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.experts = nn.ModuleList([net(4, 3) for _ in range(3)])

    def forward(self, x: torch.Tensor, choice: torch.Tensor) -> torch.Tensor:
        out = torch.zeros(x.shape[0], 3)
        for number, expert in enumerate(self.experts):
            rows = (choice == number).nonzero()[:, 0]
            if len(rows):
                out = out.index_add(0, rows, expert(x[rows]))
        return out


@case
def experts_on_one_rank_only() -> Results:
    model = Experts()
    choice = torch.tensor([0, 0, 0, 1, 1, 1])
    model(torch.randn(6, 4), choice).square().mean().backward()
    first = gradients(model, prefix="first ")
    loss = model(torch.randn(6, 4), torch.tensor([2, 2, 2, 1, 1, 1])).square().mean()
    slopes = torch.autograd.grad(loss, list(model.parameters()), allow_unused=True)
    present = {f"slope {i}": slope for i, slope in enumerate(slopes) if slope is not None}
    return {**first, **present, "loss": loss}


class Sometimes(nn.Module):
    """Rows may have no gradient at all."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = net(4, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.inner(x) if bool((x[:, 0] > 0).any()) else torch.zeros(len(x), 3)


@case
def no_gradient_on_one_rank() -> Results:
    model = Sometimes()
    x = torch.randn(6, 4)
    x[:, 0] = torch.tensor([-1.0, -1, -1, -1, 1, 1])
    with torch.no_grad():
        model.inner[0].bias.zero_()
    x.requires_grad_()
    loss = (model(x)[4:]).square().mean()
    loss.backward()
    assert x.grad is not None
    return {"loss": loss, "x": x.grad, **gradients(model)}


@case
def frozen_parts() -> Results:
    model = net(4, 8, 8, 3)
    for parameter in model[0].parameters():
        parameter.requires_grad_(False)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], 0.1)
    for step in range(4):
        if step == 2:
            model[0].requires_grad_(True)
        optimizer.zero_grad()
        model(torch.randn(7, 4)).square().mean().backward()
        optimizer.step()
    return {**gradients(model), **dict(model.named_parameters())}


@case
def clipping() -> Results:
    model = net(4, 8, 3)
    optimizer = torch.optim.SGD(model.parameters(), 0.5)
    found: Results = {}
    for step in range(3):
        optimizer.zero_grad()
        model(torch.randn(7, 4)).square().sum().backward()
        found[f"norm {step}"] = torch.nn.utils.clip_grad_norm_(model.parameters(), 0.1)
        optimizer.step()
    return {**found, **dict(model.named_parameters())}


@case
def backward_twice() -> Results:
    model = net(4, 8, 3)
    out = model(torch.randn(7, 4))
    out.square().mean().backward(retain_graph=True)
    first = gradients(model, prefix="first ")
    out.abs().mean().backward()
    return {**first, **gradients(model)}


@case
def several_graphs_in_one_backward() -> Results:
    first, second = net(4, 8, 3), net(3, 8, 1)
    x = torch.randn(7, 4)
    (first(x).square().mean() + second(first(x).detach()).mean()).backward()
    torch.autograd.backward([first(x).sum(), second(first(x)).sum()])
    return gradients(first, second)


class Failing(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> torch.Tensor:
        raise ArithmeticError


@case
def backward_that_fails() -> Results:
    first, second = net(4, 8, 3), net(3, 8, 1)
    apply: Any = Failing.apply
    with contextlib.suppress(ArithmeticError):
        second(apply(first(torch.randn(7, 4)))).mean().backward()
    found = gradients(first, second, prefix="failed ")
    second(first(torch.randn(7, 4))).mean().backward()
    return {**found, **gradients(first, second)}


@case
def closure() -> Results:
    model, x = net(4, 8, 3), torch.randn(7, 4)
    optimizer = torch.optim.LBFGS(model.parameters(), max_iter=5)

    def evaluate() -> float:
        optimizer.zero_grad()
        loss = model(x).square().mean()
        loss.backward()
        return loss  # type: ignore[return-value]

    loss = optimizer.step(evaluate)
    return {"loss": torch.as_tensor(loss), **dict(model.named_parameters())}


@case
def shared_weights() -> Results:
    first, second = net(4, 4), net(4, 4, 1)
    second[0].weight = first[0].weight
    second(first(torch.randn(7, 4)).tanh()).mean().backward()
    return gradients(first, second)


@case
def moving_average() -> Results:
    model = net(4, 8, 3)
    average = copy.deepcopy(model).requires_grad_(False)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    for _ in range(3):
        optimizer.zero_grad()
        x = torch.randn(7, 4)
        F.mse_loss(model(x), average(x + 0.1)).backward()
        optimizer.step()
        with torch.no_grad():
            for mean, new in zip(average.parameters(), model.parameters(), strict=True):
                mean.lerp_(new, 0.1)
    return {**gradients(model), **dict(average.named_parameters())}


class Prompted(nn.Module):
    def __init__(self, prompt: torch.Tensor) -> None:
        super().__init__()
        self.inner = net(4, 8, 3)
        self.held = [prompt]  # no parameter of this module

    def forward(self, x: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
        return self.inner(x + self.held[0]) * scale

    rule = (0, None), (0,)


@case
def leaf_of_no_module_and_whole_input() -> Results:
    prompt = torch.randn(4, requires_grad=True)
    source = torch.randn(3, requires_grad=True)
    model = Prompted(prompt)
    loss = model(torch.randn(7, 4), source.exp()).square().mean()
    loss.backward()
    assert prompt.grad is not None
    assert source.grad is not None
    return {"loss": loss, "prompt": prompt.grad, "source": source.grad, **gradients(model)}


class Sequences(nn.Module):
    """Sequence first, with a state, and samples first, in strides of their own."""

    rule = (1, 1), (1, 1, 0)

    def __init__(self) -> None:
        super().__init__()
        self.rnn = nn.LSTM(4, 5)

    def forward(self, x: torch.Tensor, h: torch.Tensor) -> dict[str, object]:
        out, (last, _) = self.rnn(x, (h, h))
        return {"out": out, "states": [last], "first": out.transpose(0, 1).contiguous(), "n": 3}


@case
def sequence_first() -> Results:
    model = Sequences()
    h = torch.randn(1, 5, 5, requires_grad=True)
    found = model(torch.randn(3, 5, 4), h)
    loss = found["out"].square().mean() + found["states"][0].sum() + found["first"].abs().mean()
    loss.backward()
    assert h.grad is not None
    shape = torch.tensor(found["out"].stride() + found["first"].shape)
    return {"loss": loss, "h": h.grad, "shape": shape, "out": found["out"], **gradients(model)}


@case
def images_in_channels_last() -> Results:
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 2, 3))
    model.to(memory_format=torch.channels_last)
    out = model(torch.randn(5, 3, 8, 8).to(memory_format=torch.channels_last))
    out.square().mean().backward()
    return {"strides": torch.tensor(out.stride()), "out": out, **gradients(model)}


@case
def activation_checkpoints() -> Results:
    from torch.utils.checkpoint import checkpoint

    model, other = net(4, 8, 3), net(4, 8, 3)
    x = torch.randn(7, 4, requires_grad=True)
    checkpoint(model, x, use_reentrant=False).square().mean().backward()
    checkpoint(other, x, use_reentrant=True).square().mean().backward()
    assert x.grad is not None
    return {"x": x.grad, **gradients(model, other)}


@case
def hook_on_a_parameter() -> Results:
    model = net(4, 8, 3)
    model[0].weight.register_hook(lambda grad: grad.clamp(-0.01, 0.01))
    model(torch.randn(7, 4)).square().sum().backward()
    return gradients(model)


@case
def optimizer_in_backward() -> Results:
    model = net(4, 8, 3)

    def step(parameter: torch.Tensor) -> None:
        assert parameter.grad is not None
        with torch.no_grad():
            parameter -= 0.1 * parameter.grad
        parameter.grad = None

    for parameter in model.parameters():
        parameter.register_post_accumulate_grad_hook(step)
    for _ in range(2):
        model(torch.randn(7, 4)).square().sum().backward()
    return dict(model.named_parameters())


class Forces(nn.Module):
    rule = (0,), (0, 0)

    def __init__(self) -> None:
        super().__init__()
        self.inner = net(3, 8, 1)

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        x = x.detach().requires_grad_()
        energy = self.inner(x)
        (force,) = torch.autograd.grad(energy.sum(), x, create_graph=True)
        return energy, -force


@case
def forces_inside_of_forward() -> Results:
    model = Forces()
    energy, force = model(torch.randn(7, 3))
    loss = energy.square().mean() + force.square().mean()
    loss.backward()
    return {"loss": loss, "force": force, **gradients(model)}


class Eager(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = net(3, 8, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out = self.inner(x)
        out.square().mean().backward()
        return out.detach()


@case
def backward_inside_of_forward() -> Results:
    model = Eager()
    return {"out": model(torch.randn(7, 3)), **gradients(model)}


@case
def sparse_gradients() -> Results:
    model = nn.Sequential(nn.Embedding(20, 4, sparse=True), nn.Linear(4, 2))
    indices = torch.randint(20, (7, 3))
    for _ in range(2):
        model(indices).square().mean().backward()
    return {
        name: parameter.grad.to_dense()
        for name, parameter in model.named_parameters()
        if parameter.grad is not None
    }


@case
def output_changed_in_place() -> Results:
    model = net(4, 8, 3)
    out = model(torch.randn(7, 4))
    out += 1
    out.relu_()
    loss = out.square().mean()
    loss.backward()
    return {"loss": loss, **gradients(model)}


class Mixed(nn.Module):
    """Integers, booleans, the input itself and a constant among the outputs."""

    rule = (0,), (0, 0, 0, 0, None)

    def __init__(self) -> None:
        super().__init__()
        self.inner = net(4, 8, 3)
        self.register_buffer("constant", torch.arange(3.0))

    def forward(self, x: torch.Tensor) -> tuple[object, ...]:
        out = self.inner(x)
        return out, out.argmax(1), out > 0, x, self.constant, None


@case
def outputs_of_many_kinds() -> Results:
    model = Mixed()
    out, best, positive, x, constant, nothing = model(torch.randn(7, 4))
    assert nothing is None
    loss = (out * positive).sum() + (out[:, 0] * best).mean() + constant.sum() * x.mean()
    loss.backward()
    return {"loss": loss, "best": best, "positive": positive, **gradients(model)}


class Complex(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(4, 3, dtype=torch.complex128))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return (x @ self.weight).conj()


@case
def complex_numbers() -> Results:
    model = Complex()
    loss = model(torch.randn(7, 4, dtype=torch.complex128)).abs().mean()
    loss.backward()
    return {"loss": loss, **{k: torch.view_as_real(v) for k, v in gradients(model).items()}}


class Counting(nn.Module):
    """Changes a buffer by its samples, draws numbers, or fails, each of which ends sharing out."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.inner = net(4, 3)
        self.how = how
        self.register_buffer("mean", torch.zeros(4))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.how == "buffer":
            self.mean.lerp_(x.mean(0), 0.1)
            x = x - self.mean
        if self.how == "numbers":
            x = F.dropout(x)
        if self.how == "fails" and bool((x > 10).any()):
            raise ValueError(f"too large among {len(x)}")
        if self.how == "sizes":
            return self.inner(x)[:, : int(x[0, 0].abs() * 3) + 1]
        return self.inner(x)


@case
def calls_that_differ_between_shards() -> Results:
    found: Results = {}
    for how in ("buffer", "numbers", "fails", "sizes"):
        model = Counting(how)
        for step in range(3):
            x = torch.randn(6, 4)
            if how == "fails":
                x[5, 0] = 11.0 if step == 1 else 0
            try:
                out = model(x)
            except ValueError as error:
                found[f"failed among {str(error)[-1]}"] = torch.tensor(step)
                continue
            out.square().mean().backward()
            found[f"{how} {step}"] = out
        found |= gradients(model, prefix=how)
        found[f"mean of {how}"] = model.mean
    found["state"] = torch.get_rng_state()
    return found


@case
def refused() -> Results:
    model = net(4, 8, 3)
    model.rule = "mixes samples"  # type: ignore[assignment]
    model(torch.randn(7, 4)).square().mean().backward()
    return gradients(model)


class Logits(nn.Module):
    """Logits (batch, time, classes) of words."""

    def __init__(self) -> None:
        super().__init__()
        self.words, self.head = nn.Embedding(11, 6), nn.Linear(6, 11)

    def forward(self, words: torch.Tensor) -> torch.Tensor:
        logits: torch.Tensor = self.head(torch.tanh(self.words(words)))
        return logits


@case
def losses_of_logits() -> Results:
    model, words = Logits(), torch.randint(11, (7, 5))
    targets = torch.randint(11, (7, 5))
    padded = targets.clone()
    padded[3:] = -100
    weight = torch.rand(11)
    found: Results = {}
    for number, options in enumerate(
        (
            {},
            {"reduction": "sum"},
            {"label_smoothing": 0.2},
            {"weight": weight, "ignore_index": 4},
            {"weight": weight, "label_smoothing": 0.1, "reduction": "sum"},
            {"reduction": "none"},
        )
    ):
        model.zero_grad()
        logits = model(words)
        wanted = targets if "ignore_index" in options else padded
        loss = F.cross_entropy(logits.flatten(0, 1), wanted.flatten(), **options)  # type: ignore[arg-type]
        loss.sum().backward()
        found |= {f"{number}.loss": loss, **gradients(model, prefix=f"{number}.")}
    return found


@case
def losses_of_images() -> Results:
    model, x = nn.Sequential(nn.Linear(4, 12), nn.Unflatten(1, (3, 2, 2))), torch.randn(7, 4)
    target, positive = torch.rand(7, 3, 2, 2), torch.rand(3, 2, 2)
    found: Results = {}
    functions: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
        "mse": lambda y: F.mse_loss(y, target),
        "sum": lambda y: F.mse_loss(y.flatten(1), target.flatten(1), reduction="sum") / 7,
        "huber": lambda y: F.huber_loss(y, target, delta=0.3),
        "bce": lambda y: F.binary_cross_entropy_with_logits(y, target, pos_weight=positive),
        "weighted": lambda y: F.binary_cross_entropy_with_logits(y, target, weight=target),
        "broadcast": lambda y: F.smooth_l1_loss(y, target[:1].expand_as(target)),
        "scaled": lambda y: F.mse_loss(2 * y, target),
        "transposed": lambda y: F.mse_loss(y.transpose(0, 1), target.transpose(0, 1)),
        "part": lambda y: F.mse_loss(y[1:5], target[1:5]),
        "twice": lambda y: F.mse_loss(y, target) * F.huber_loss(y, target) + y.square().mean(),
        "itself": lambda y: F.mse_loss(y, y.detach() + 1),
    }
    for name, function in functions.items():
        model.zero_grad()
        loss = function(model(x))
        loss.backward(retain_graph=True)
        loss.backward()
        found |= {f"{name}.loss": loss, **gradients(model, prefix=f"{name}.")}
    return found


@case
def penalty_on_the_gradient_of_a_loss() -> Results:
    model, x, y = net(4, 8, 3), torch.randn(7, 4), torch.randn(7, 3)
    loss = F.mse_loss(model(x), y).sqrt()
    first = torch.autograd.grad(loss, list(model.parameters()), create_graph=True)
    penalty = loss + sum(g.square().sum() for g in first)
    penalty.backward()
    return {"loss": loss, "penalty": penalty, **gradients(model)}


@case
def loss_of_what_depends_on_inputs() -> Results:
    model, judge = net(4, 8, 3), net(3, 5, 2)
    x, y = torch.randn(7, 4, requires_grad=True), torch.randint(2, (7,))
    fake = model(x)
    loss = F.cross_entropy(judge(fake), y)
    loss.backward()
    assert x.grad is not None
    return {"loss": loss, "x": x.grad, **gradients(model, judge)}
