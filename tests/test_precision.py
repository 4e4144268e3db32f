"""Half precision that keeps what training needs: safe operators, loss scaling."""

from __future__ import annotations

import copy
import io
import json
import pickle
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from flatout import knobs
from flatout.intercept.host import Host
from flatout.intercept.patch import Undo
from flatout.knob import Facts
from flatout.knobs.precision import scaling
from flatout.knobs.precision.operators import FLOAT32, HEADS
from tests.hosts import host_in

Turn = Callable[[str], Undo]


@pytest.fixture
def host(tmp_path: Path) -> Iterator[Host]:
    host = host_in(tmp_path)
    host.hooks.install(live=False)
    yield host
    host.hooks.remove()


@pytest.fixture
def turn(host: Host) -> Iterator[Turn]:
    undos = []

    def turn(setting: str) -> Undo:
        undo = knobs.get("precision").apply(host, setting)
        undos.append(undo)

        def undo_now() -> None:
            undos.remove(undo)
            undo()

        return undo_now

    yield turn
    for undo in undos:
        undo()


def events(host: Host) -> list[dict[str, Any]]:
    host.record.flush()
    if not host.record.path.exists():
        return []
    lines = host.record.path.read_text().splitlines()
    return [line for line in map(json.loads, lines) if line["kind"] == "event"]


class Operators(TorchDispatchMode):
    """Notes each operator, with what it was given first."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[str, torch.Tensor]] = []

    def __torch_dispatch__(
        self, function: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        tensors = [a for a in args if isinstance(a, torch.Tensor)]
        if tensors:
            # A linear layer is a product with its bias first.
            given = tensors[1] if "addmm" in str(function) else tensors[0]
            self.calls.append((function.overloadpacket.__name__, given))
        return function(*args, **(kwargs or {}))

    def dtypes(self, *names: str) -> list[torch.dtype]:
        """Of what operators of these names were given, in the order of the calls."""
        return [given.dtype for name, given in self.calls if name in names]


PRODUCT_OPERATORS = ("addmm", "mm", "convolution", "mkldnn_rnn_layer", "bmm")


class Probability(nn.Module):
    """Two layers and a sigmoid, as in a discriminator."""

    def __init__(self) -> None:
        super().__init__()
        self.hidden, self.head = nn.Linear(4, 8), nn.Linear(8, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.sigmoid(self.head(torch.relu(self.hidden(x))))


def sure(logit: float) -> tuple[Probability, torch.Tensor]:
    """A net whose probability has this logit."""
    net = Probability()
    with torch.no_grad():
        net.head.weight.zero_()
        net.head.bias.fill_(logit)
    return net, torch.ones(2, 4)


def test_the_sigmoid_of_a_sure_net_is_not_rounded_to_one(turn: Turn) -> None:
    net, x = sure(8.0)
    bare = net(x).detach()
    undo = turn("bf16")
    net(x)  # which shows what it is made of
    assert net(x).unique().item() == 1.0
    undo()
    turn("safe")
    assert net(x).dtype == torch.float32
    torch.testing.assert_close(net(x).detach(), bare, rtol=1e-6, atol=0)
    loss = nn.functional.binary_cross_entropy(net(x), torch.zeros(2, 1))
    loss.backward()
    assert loss.item() == pytest.approx(8.0, abs=1e-3)
    assert net.head.bias.grad is not None
    assert net.head.bias.grad.item() == pytest.approx(1.0, abs=1e-3)


class Normed(nn.Module):
    """A convolution, a norm and two linear layers."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm = nn.Conv2d(1, 4, 3), nn.GroupNorm(1, 4)
        self.second, self.head = nn.Linear(16, 8), nn.Linear(8, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.second(self.norm(self.first(x)).flatten(1))
        return self.head(x).softmax(-1).log()


def test_products_are_in_bfloat16_the_head_norms_and_softmax_are_not(turn: Turn) -> None:
    torch.manual_seed(0)
    net, x = Normed(), torch.randn(3, 1, 4, 4)
    reference = copy.deepcopy(net).double()(x.double())
    turn("safe")
    outputs = [net(x) for _ in range(3)]
    with Operators() as operators:
        net(x)
    half, whole = torch.bfloat16, torch.float32
    assert operators.dtypes(*PRODUCT_OPERATORS) == [half, half, whole]
    assert operators.dtypes("native_group_norm", "_softmax", "log") == [whole] * 3
    for output in outputs:  # bfloat16 has 8 bits: 2**-8 for each of two products
        torch.testing.assert_close(output.double(), reference, rtol=0.02, atol=0.02)


def test_a_head_that_is_a_transposed_convolution(turn: Turn) -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.ConvTranspose2d(4, 8, 3), nn.ReLU(), nn.ConvTranspose2d(8, 1, 3))
    x = torch.randn(2, 4, 5, 5)
    turn("safe")
    net(x)
    with Operators() as operators:
        net(x)
    assert operators.dtypes("convolution") == [torch.bfloat16, torch.float32]


class Made(nn.Module):
    """A head whose hyperbolic tangent is returned, or is made a probability of."""

    def __init__(self, is_returned: bool) -> None:
        super().__init__()
        self.hidden, self.head, self.is_returned = nn.Linear(4, 8), nn.Linear(8, 3), is_returned

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        made = torch.tanh(self.head(torch.tanh(self.hidden(x))))
        return made if self.is_returned else (10 * made).log_softmax(-1)


@pytest.mark.parametrize("is_returned", [True, False])
def test_a_head_that_makes_data_is_none(turn: Turn, is_returned: bool) -> None:
    net, x = Made(is_returned), torch.randn(5, 4)
    turn("safe")
    net(x).sum().backward()
    with Operators() as operators:
        net(x)
    assert operators.dtypes("addmm")[-1] is (torch.bfloat16 if is_returned else torch.float32)


def test_batch_norm_loses_no_statistics_under_autocast(turn: Turn) -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.Conv2d(8, 2, 3))
    x = torch.randn(16, 3, 9, 9) * 3 + 10
    turn("safe")
    net(x)  # the first pass shows the head
    norm = net[1]
    norm.reset_running_stats()
    with Operators() as operators:
        net(x)
    (given,) = (tensor for name, tensor in operators.calls if name.endswith("batch_norm"))
    assert given.dtype == torch.bfloat16
    exact = given.double()
    mean, variance = exact.mean((0, 2, 3)), exact.transpose(0, 1).flatten(1).var(1)
    close = {"rtol": 1e-6, "atol": 1e-6}
    torch.testing.assert_close(norm.running_mean.double(), 0.1 * mean, **close)
    torch.testing.assert_close(norm.running_var.double(), 0.9 + 0.1 * variance, **close)


@pytest.mark.parametrize("options", [{}, {"bias": False}, {"stride": 3}, {"padding": 1}], ids=str)
def test_a_head_as_large_as_its_images(turn: Turn, options: dict[str, Any]) -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 2, 5, **options))
    x = torch.randn(4, 3, 7, 7)
    turn("safe")
    net(x)
    with Operators() as operators:
        output = net(x)
    (given,) = (tensor for name, tensor in operators.calls if name == "relu")
    assert given.dtype == torch.bfloat16
    exact = copy.deepcopy(net[2]).double()(given.relu().double())
    torch.testing.assert_close(output.double(), exact, rtol=1e-5, atol=1e-5)


def test_a_net_with_one_product_is_all_head(turn: Turn) -> None:
    torch.manual_seed(0)
    net, x = nn.Linear(4, 3), torch.randn(5, 4)
    bare = net(x).detach()
    turn("safe")
    for _ in range(3):
        torch.testing.assert_close(net(x).detach(), bare, rtol=0, atol=0)


def test_the_programs_own_autocast_is_as_it_was(host: Host, turn: Turn) -> None:
    net, x = sure(8.0)
    turn("safe")
    net(x)
    with torch.autocast("cpu", torch.bfloat16):
        output = net(x)
    assert output.dtype == torch.bfloat16
    assert output.unique().item() == 1.0
    assert "the program uses autocast already" in events(host)[0]["why"]


def test_safe_is_undone(turn: Turn) -> None:
    def kernels() -> list[bool]:
        return [
            torch._C._dispatch_has_kernel_for_dispatch_key(f"aten::{name}", "AutocastCPU")
            for name in (*FLOAT32, *HEADS)
        ]

    before = kernels()
    undo = turn("safe")
    assert all(kernels())
    undo()
    assert kernels() == before
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.sigmoid(torch.ones(2).bfloat16()).dtype == torch.bfloat16
        assert nn.Linear(2, 2)(torch.ones(2)).dtype == torch.bfloat16


@pytest.mark.parametrize("setting", ["safe", "fp16"])
def test_nothing_of_it_is_in_the_module(turn: Turn, setting: str) -> None:
    net = Probability()
    optimizer = torch.optim.Adam(net.parameters())
    turn(setting)
    net(torch.ones(2, 4)).sum().backward()
    optimizer.step()
    buffer = io.BytesIO()
    torch.save([net, optimizer.state_dict()], buffer)
    assert b"flatout" not in buffer.getvalue()
    assert b"flatout" not in pickle.dumps(net)
    copy.deepcopy(net)


def test_a_recomputed_forward_pass_is_the_same(turn: Turn) -> None:
    """A checkpoint runs parts of the forward pass again while backward runs."""
    from torch.utils.checkpoint import checkpoint

    class Checkpointed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.part, self.head = Probability(), nn.Linear(1, 1)

        def forward(self, x: torch.Tensor) -> Any:
            return self.head(checkpoint(self.part, x, use_reentrant=False))

    torch.manual_seed(0)
    net, x = Checkpointed(), torch.randn(8, 4)
    net(x).square().sum().backward()
    reference = [p.grad.clone() for p in net.parameters() if p.grad is not None]
    turn("safe")
    for _ in range(2):
        net.zero_grad()
        net(x).square().sum().backward()
        for parameter, grad in zip(net.parameters(), reference, strict=True):
            assert parameter.grad is not None
            torch.testing.assert_close(parameter.grad, grad, rtol=0.05, atol=0.05)


# What else could see half precision


def test_plain_nets_stay_in_bfloat16_between_their_layers(turn: Turn) -> None:
    """What lies between products is given bfloat16, and no product's input is cast twice."""

    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm, self.qkv, self.proj = nn.LayerNorm(8), nn.Linear(8, 24), nn.Linear(8, 8)
            self.up, self.down = nn.Linear(8, 32), nn.Linear(32, 8)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            batch, length, _ = x.shape
            parts = self.qkv(self.norm(x)).split(8, -1)
            q, k, v = (part.view(batch, length, 2, 4).transpose(1, 2) for part in parts)
            attended = nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
            x = x + self.proj(attended.transpose(1, 2).reshape(batch, length, 8))
            return x + self.down(nn.functional.gelu(self.up(x)))

    class Residual(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = (nn.Conv2d(4, 4, 3, padding=1) for _ in range(2))
            self.norm = nn.BatchNorm2d(4)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            x += self.second(torch.relu(self.norm(self.first(x))))
            return torch.relu(x)

    torch.manual_seed(0)
    gpt = nn.Sequential(nn.Embedding(9, 8), Block(), Block(), nn.Linear(8, 9))
    images = nn.Sequential(nn.Conv2d(3, 4, 3), Residual(), nn.Flatten(), nn.Linear(64, 2))
    words = nn.LSTM(4, 4, batch_first=True)
    turn("bf16")
    nets = (gpt, torch.randint(9, (2, 5))), (images, torch.randn(2, 3, 6, 6))
    for net, given in (*nets, (words, torch.randn(2, 3, 4))):
        net(given)
        with Operators() as operators:
            net(given)
        assert set(operators.dtypes(*PRODUCT_OPERATORS)) == {torch.bfloat16}
        assert set(operators.dtypes("gelu", "relu", "native_batch_norm")) <= {torch.bfloat16}
        assert not operators.dtypes("_to_copy").count(torch.bfloat16) > 3  # outputs, and states


def test_a_leak_that_begins_later_is_put_right(host: Host, turn: Turn) -> None:
    class Late(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear, self.keeps = nn.Linear(4, 4), False
            self.kept: Any = None
            self.all: list[torch.Tensor] = []

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            x = self.linear(x)
            if self.keeps:
                self.kept = x.detach()
                self.all.append(x)
            return torch.relu(x)

    net, x = Late(), torch.randn(3, 4)
    turn("bf16")
    for _ in range(3):
        net(x)
    net.keeps = True
    net(x)
    net(x)
    assert {t.dtype for t in (net.kept, *net.all)} == {torch.float32}
    assert "begun to keep" in events(host)[-1]["why"]
    net.all[0].sum().backward()
    assert net.linear.weight.grad is not None


@pytest.mark.parametrize("setting", ["bf16", "safe"])
@pytest.mark.parametrize("is_reentrant", [True, False])
def test_a_recomputation_sees_what_the_first_pass_saw(
    turn: Turn, setting: str, is_reentrant: bool
) -> None:
    """Inside of a forward pass, with operators of every kind, and called from no forward pass."""
    from torch.utils.checkpoint import checkpoint

    seen: list[Operators] = []

    class Part(nn.Module):
        def __init__(self, rounds: bool) -> None:
            super().__init__()
            self.up, self.down, self.rounds = nn.Linear(4, 8), nn.Linear(8, 4), rounds

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            with Operators() as operators:
                seen.append(operators)
                x = self.down(torch.sigmoid(self.up(x)))
                return x + torch.lgamma(x.abs() + 1) if self.rounds else x

    class Outer(nn.Module):
        def __init__(self, rounds: bool) -> None:
            super().__init__()
            self.part, self.head = Part(rounds), nn.Linear(4, 1)

        def forward(self, x: torch.Tensor) -> Any:
            return self.head(checkpoint(self.part, x, use_reentrant=is_reentrant))

    torch.manual_seed(0)
    x = torch.randn(8, 4, requires_grad=True)
    turn(setting)
    for net in (Outer(rounds=False), Outer(rounds=True)):
        for call in (net, lambda x, net=net: checkpoint(net.part, x, use_reentrant=is_reentrant)):
            for _ in range(3):
                seen.clear()
                call(x).square().sum().backward()
                names = (*PRODUCT_OPERATORS, "sigmoid", "lgamma")
                first, again = (operators.dtypes(*names) for operators in seen)
                assert len(again) >= 2  # it ends when it has what backward needs
                assert first[: len(again)] == again


def test_what_is_exported_is_the_program(turn: Turn, recwarn: pytest.WarningsRecorder) -> None:
    from torch import fx
    from torch.fx.experimental.proxy_tensor import make_fx

    torch.manual_seed(0)
    net, x = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2)), torch.randn(5, 4)
    exact = net(x).detach()
    turn("bf16")
    for _ in range(2):
        net(x).sum().backward()
    assert not torch.equal(net(x), exact)
    net.eval()
    exported = torch.export.export(net, (x,))
    assert "autocast" not in str(exported.graph)
    for made in (
        torch.jit.trace(net, x),
        exported.module(),
        make_fx(net)(x),
        fx.symbolic_trace(net),
        torch.func.vmap(net),
        torch.compile(net, backend="eager"),
    ):
        assert made(x).dtype is torch.float32
    assert torch.equal(torch.jit.trace(net, x)(x), exact)
    assert torch.equal(exported.module()(x), exact)
    assert torch.equal(make_fx(net)(x)(x), exact)
    _, tangent = torch.func.jvp(net, (x,), (x,))
    assert tangent.dtype is torch.float32


# Loss scaling


def test_each_gradient_is_divided_once_wherever_it_lies(turn: Turn) -> None:
    """Views of one memory, one parameter in two places, hooks, and calls that add up."""

    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = nn.Linear(4, 4), nn.Linear(4, 4)
            self.second.weight = self.first.weight
            self.words = nn.Embedding(5, 4, sparse=True)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.second(torch.tanh(self.first(x))) + self.words(torch.arange(4))

    def gradients_of(net: nn.Module, x: torch.Tensor) -> tuple[list[torch.Tensor], list[float]]:
        flat = nn.Parameter(torch.zeros(24, dtype=x.dtype))
        flat.grad = torch.zeros_like(flat)
        parts = [p for p in net.parameters() if p is not net.words.weight]
        optimizer = torch.optim.SGD([flat, net.words.weight], lr=0.0)
        for part, memory in zip(parts, flat.grad.split([p.numel() for p in parts]), strict=True):
            part.grad = memory.view_as(part)
        hooked: list[float] = []
        parts[0].register_hook(lambda grad: hooked.append(grad.abs().sum().item()))
        found = []
        for _step in range(3):
            flat.grad.zero_()
            for _ in range(2):
                output = net(x)
                (output.mean() + output[0].sum() * 0.1).backward()
            found += [flat.grad.clone(), net.words.weight.grad.to_dense()]
            nn.utils.clip_grad_norm_([flat], 0.5)
            found.append(flat.grad.clone())
            optimizer.step()
            net.words.weight.grad = None
        return found, hooked

    torch.manual_seed(0)
    net, x = Tied(), torch.randn(4, 4)
    exact = gradients_of(copy.deepcopy(net).double(), x.double())
    turn("fp16")
    found = gradients_of(net, x)
    for mine, right in zip(found[0], exact[0], strict=True):
        torch.testing.assert_close(mine.double(), right, rtol=0.02, atol=0.01)
    assert found[1] == pytest.approx(exact[1], rel=0.05)


@pytest.mark.parametrize("how", ["register_hook", "retain_grad", "module hook", "function"])
def test_gradients_on_their_way_are_not_scaled(host: Host, turn: Turn, how: str) -> None:
    class Doubled(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
            return 2 * x

        @staticmethod
        def backward(ctx: Any, *grads: torch.Tensor) -> torch.Tensor:
            seen.append(grads[0].abs().max().item())
            return 2 * grads[0]

    seen: list[float] = []
    net, _, x = small()
    turn("fp16")
    net(x).sum().backward()
    if how == "module hook":
        net.first.register_full_backward_hook(
            lambda module, given, grads: seen.append(grads[0].abs().max().item())
        )
    output = net(x)
    if how == "register_hook":
        output.register_hook(lambda grad: seen.append(grad.abs().max().item()))
    if how == "retain_grad":
        output.retain_grad()
    if how == "function":
        output = Doubled.apply(output)
    output.sum().backward()
    if how == "retain_grad":
        seen.append(output.grad.abs().max().item())
    assert max(seen) <= 2.0
    assert host.applied.failures


class Small(nn.Module):
    """Gradients that float16 takes for zero: below 6e-8."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(4, 4), nn.Linear(4, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.second(torch.tanh(self.first(x)))


def gradients(net: nn.Module) -> list[torch.Tensor]:
    return [p.grad.double().clone() for p in net.parameters() if p.grad is not None]


def small() -> tuple[Small, torch.optim.Optimizer, torch.Tensor]:
    torch.manual_seed(0)
    net = Small()
    return net, torch.optim.SGD(net.parameters(), lr=1.0, momentum=0.9), torch.randn(16, 4)


def small_loss(net: nn.Module, x: torch.Tensor) -> torch.Tensor:
    output: torch.Tensor = net(x)
    return 1e-8 * output.mean()


def assert_gradients_are_right(net: nn.Module, reference: list[torch.Tensor], times: int) -> None:
    for mine, exact in zip(gradients(net), reference, strict=True):
        # float16 has 11 bits; what is added up in it, some of them less
        torch.testing.assert_close(mine, times * exact, rtol=0.02, atol=1e-11)


def reference_gradients(net: nn.Module, x: torch.Tensor) -> list[torch.Tensor]:
    exact = copy.deepcopy(net).double()
    small_loss(exact, x.double()).backward()
    return gradients(exact)


def test_small_gradients_survive(turn: Turn) -> None:
    net, _, x = small()
    reference = reference_gradients(net, x)
    with torch.autocast("cpu", torch.float16):
        small_loss(net, x).backward()
    assert not gradients(net)[0].any()  # what would happen without scaling
    net.zero_grad()
    turn("fp16")
    net(x)
    small_loss(net, x).backward()
    assert_gradients_are_right(net, reference, times=1)


def test_gradients_are_accumulated_and_clipped_at_their_size(turn: Turn) -> None:
    net, _, x = small()
    reference = reference_gradients(net, x)
    turn("fp16")
    for _ in range(3):
        small_loss(net, x).backward()
    assert_gradients_are_right(net, reference, times=3)
    norm = nn.utils.clip_grad_norm_(net.parameters(), 1.0)
    exact = torch.stack([g.norm() for g in reference]).norm()
    assert norm.item() == pytest.approx(3 * exact.item(), rel=0.02)


def test_a_step_with_gradients_that_are_not_finite_is_left_out(host: Host, turn: Turn) -> None:
    torch.manual_seed(0)
    net = Small()
    optimizer = torch.optim.Adam(net.parameters(), lr=0.1)
    x = torch.randn(16, 4)
    turn("fp16")
    (0.01 * net(x).mean()).backward()
    optimizer.step()
    before = [p.detach().clone() for p in net.parameters()]
    state = copy.deepcopy(optimizer.state_dict())
    optimizer.zero_grad()
    (1e6 * net(x).mean()).backward()  # times the scale it overflows
    assert not gradients(net)[0].isfinite().all()
    optimizer.step()
    for parameter, old in zip(net.parameters(), before, strict=True):
        torch.testing.assert_close(parameter.detach(), old, rtol=0, atol=0)
        assert parameter.grad is not None
    assert str(optimizer.state_dict()) == str(state)
    (event,) = (e for e in events(host) if e["what"] == "noticed")
    assert event["why"].endswith("loss scale is now 32768")
    optimizer.zero_grad()
    (0.01 * net(x).mean()).backward()
    optimizer.step()
    assert any(
        not torch.equal(parameter.detach(), old)
        for parameter, old in zip(net.parameters(), before, strict=True)
    )


def test_only_the_optimizer_whose_gradients_are_not_finite_waits(turn: Turn) -> None:
    torch.manual_seed(0)
    one, other, x = Small(), Small(), torch.randn(8, 4)
    optimizers = [torch.optim.SGD(net.parameters(), lr=0.1) for net in (one, other)]
    turn("fp16")
    for net in (one, other):
        net(x)
    before = [net.second.bias.detach().clone() for net in (one, other)]
    (1e7 * one(x).mean() + 0.01 * other(x).mean()).backward()
    for optimizer in optimizers:
        optimizer.step()
    assert torch.equal(one.second.bias, before[0])
    assert not torch.equal(other.second.bias, before[1])


def test_the_scale_grows_again(turn: Turn, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scaling, "GROWTH_INTERVAL", 3)
    seen: list[float] = []
    init = scaling.LossScaling.__init__

    def remembered(self: scaling.LossScaling, *args: Any) -> None:
        init(self, *args)
        made.append(self)

    made: list[scaling.LossScaling] = []
    monkeypatch.setattr(scaling.LossScaling, "__init__", remembered)
    net, optimizer, x = small()
    turn("fp16")
    net(x)
    for _ in range(7):
        small_loss(net, x).backward()
        optimizer.step()
        seen.append(made[0].scale)
    assert [s / 2**16 for s in seen] == [1, 1, 2, 2, 2, 4, 4]


def test_a_closure_is_stopped_too(turn: Turn) -> None:
    torch.manual_seed(0)
    net, x = Small(), torch.randn(8, 4)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    turn("fp16")
    size = 1.0

    def closure() -> float:
        optimizer.zero_grad()
        loss = size * net(x).square().mean()
        loss.backward()
        return loss.item()

    optimizer.step(closure)
    before = [p.detach().clone() for p in net.parameters()]
    size = 1e9
    optimizer.step(closure)
    assert all(map(torch.equal, net.parameters(), before))
    size = 1.0
    optimizer.step(closure)
    assert not all(map(torch.equal, net.parameters(), before))


def test_leaves_of_the_program_turn_it_back(host: Host, turn: Turn) -> None:
    net, _, x = small()
    x.requires_grad_()
    exact, exact_x = copy.deepcopy(net), x.detach().clone().requires_grad_()
    exact(exact_x).sum().backward()
    turn("fp16")
    net(x)
    net(x).sum().backward()
    assert x.grad is not None
    assert exact_x.grad is not None
    torch.testing.assert_close(x.grad, exact_x.grad, rtol=0.02, atol=0.02)
    (event,) = events(host)
    assert event["what"] == "failed"
    assert "belongs to no module and no optimizer" in event["why"]


def test_a_program_without_an_optimizer_is_left_alone(host: Host, turn: Turn) -> None:
    net, x = Small(), torch.randn(8, 4)
    turn("fp16")
    net(x)
    net(x).mean().backward()
    assert "cannot be skipped" in events(host)[0]["why"]


def test_autograd_grad_is_as_it_was(turn: Turn) -> None:
    net, _, x = small()
    turn("fp16")
    (grad,) = torch.autograd.grad(net(x).mean(), [net.second.bias])
    assert grad.item() == pytest.approx(1.0, rel=1e-3)
    assert all(p.grad is None for p in net.parameters())


def test_fp16_is_undone(turn: Turn) -> None:
    own = torch.autograd._engine_run_backward  # type: ignore[attr-defined]
    net, _, x = small()
    undo = turn("fp16")
    small_loss(net, x).backward()
    undo()
    assert torch.autograd._engine_run_backward is own  # type: ignore[attr-defined]
    assert net(x).dtype == torch.float32


def test_what_is_offered_depends_on_the_rates() -> None:
    def offered(device: str, **rates: float) -> tuple[str, ...]:
        return knobs.get("precision").offer(Facts(device, rates)).settings

    assert offered("cpu", float32=1e11, bfloat16=2e11) == ("bf16", "safe", "medium")
    assert offered("cpu", float32=1e11, bfloat16=1e10) == ()
    turing = {"float32": 8e12, "float16": 5e13, "bfloat16": 4e12}
    assert offered("cuda", **turing) == ("fp16",)

    def offered_for(loss: str) -> tuple[str, ...]:
        operators = {"aten::addmm": 0.5, f"aten::{loss}": 0.001}
        return knobs.get("precision").offer(Facts("cpu", operators=operators)).settings

    assert offered_for("binary_cross_entropy_with_logits")[0] == "bf16"
    assert offered_for("binary_cross_entropy") == ("safe", "medium")
    ampere = {"float32": 1.9e13, "float16": 2.6e14, "bfloat16": 2.5e14}
    assert offered("cuda", **ampere) == ("bf16", "safe", "medium")
