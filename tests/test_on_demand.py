"""The knob ``gradients``: what is dropped is not computed, and nobody can tell."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeVar

import pytest
import torch
from torch import nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils.checkpoint import checkpoint

from flatout import knobs
from flatout.errors import RefusedError
from flatout.intercept.gradients import stored_gradient
from flatout.intercept.host import Host
from flatout.knob import Facts
from flatout.knobs import gradients
from flatout.knobs.gradients.on_demand import CALLS_WITHOUT_USE
from flatout.wire.request import Request
from tests.hosts import host_in

STEPS = 12

T = TypeVar("T")


@pytest.fixture
def host(tmp_path: Path) -> Iterator[Host]:
    made = host_in(tmp_path)
    made.hooks.install(live=False)
    yield made
    made.hooks.remove()
    assert not made.applied.failures


@pytest.fixture
def on_demand(host: Host) -> Iterator[None]:
    undo = knobs.get("gradients").apply(host, "on_demand")
    yield
    undo()


@pytest.fixture
def said(host: Host, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Why the knob has left things alone."""
    whys: list[str] = []
    monkeypatch.setattr(host.events, "add", lambda what, subject, why: whys.append(why))
    return whys


def with_and_without(host: Host, train: Callable[[], T]) -> tuple[T, T]:
    """What training gives under the knob, and without it."""
    expected = train()
    undo = knobs.get("gradients").apply(host, "on_demand")
    found = train()
    undo()
    return found, expected


class Gan:
    """A generator and a discriminator, and what is done with them.

    Args:
        acts: called with this and the number of the step, by the place in the step.
    """

    def __init__(self, **acts: Callable[[Gan, int], None]) -> None:
        torch.manual_seed(0)
        self.generator = nn.Sequential(nn.Linear(4, 16), nn.ReLU(), nn.Linear(16, 8))
        self.discriminator = nn.Sequential(
            nn.Linear(8, 16), nn.BatchNorm1d(16), nn.LeakyReLU(0.2), nn.Linear(16, 1), nn.Sigmoid()
        )
        self.optimizer_d = torch.optim.Adam(self.discriminator.parameters(), lr=0.01)
        self.optimizer_g = torch.optim.Adam(self.generator.parameters(), lr=0.01)
        self.set_to_none = True
        self.criterion = nn.BCELoss()
        self.noted: list[Any] = []
        self.acts = acts

    def act(self, place: str, step: int) -> None:
        if place in self.acts:
            self.acts[place](self, step)

    def train(self, steps: int = STEPS) -> Gan:
        torch.manual_seed(1)
        ones, zeros = torch.ones(32, 1), torch.zeros(32, 1)
        for step in range(steps):
            fake = self.generator(torch.randn(32, 4))
            self.act("before zero_grad", step)
            self.optimizer_d.zero_grad(set_to_none=self.set_to_none)
            self.act("after zero_grad", step)
            real = self.discriminator(torch.randn(32, 8))
            loss = self.criterion(real, ones)
            loss = loss + self.criterion(self.discriminator(fake.detach()), zeros)
            loss.backward()
            self.optimizer_d.step()
            self.optimizer_g.zero_grad()
            self.loss_g = self.criterion(self.discriminator(fake), ones)
            self.act("before backward", step)
            self.loss_g.backward()
            self.act("after backward", step)
            self.optimizer_g.step()
            self.act("end", step)
        return self

    def weights(self) -> list[torch.Tensor]:
        modules = (self.generator, self.discriminator)
        return [t.clone() for module in modules for t in module.state_dict().values()]

    def kept(self) -> list[torch.Tensor | None]:
        """The discriminator's gradients as torch keeps them."""
        found = [stored_gradient.__get__(p) for p in self.discriminator.parameters()]
        return [None if grad is None else grad.clone() for grad in found]


def same(one: list[Any], other: list[Any]) -> bool:
    return len(one) == len(other) and all(
        a is b if a is None or b is None else torch.equal(a, b)
        for a, b in zip(one, other, strict=True)
    )


def note_kept(gan: Gan, step: int) -> None:
    gan.noted.append(gan.kept())


def test_dropped_gradients_are_not_computed_and_weights_are_the_same(host: Host) -> None:
    turned, bare = with_and_without(
        host, lambda: Gan(**{"before backward": note_kept, "after backward": note_kept}).train()
    )
    turned.optimizer_d.zero_grad()
    assert same(turned.weights(), bare.weights())
    computed = [
        not same(before, after)
        for before, after in zip(turned.noted[::2], turned.noted[1::2], strict=True)
    ]
    assert computed == [True] * 2 + [False] * (STEPS - 2)
    assert "grad" not in nn.Parameter.__dict__
    assert "retain_grad" not in torch.Tensor.__dict__


@pytest.mark.parametrize("place", ["after backward", "end", "before zero_grad"])
def test_who_reads_a_gradient_gets_it(host: Host, place: str) -> None:
    def read(gan: Gan, step: int) -> None:
        if step == 8:
            gan.noted += [p.grad.clone() for p in gan.discriminator.parameters()]  # type: ignore[union-attr]

    turned, bare = with_and_without(host, lambda: Gan(**{place: read}).train())
    assert len(bare.noted) == 6
    assert same(turned.noted, bare.noted)
    assert same(turned.weights(), bare.weights())


def test_what_was_read_once_is_not_put_off_again(on_demand: None) -> None:
    def look(gan: Gan, step: int) -> None:
        before = gan.noted.pop()
        gan.noted.append([step, *(not same([a], [b]) for a, b in zip(before, gan.kept()))])  # noqa: B905
        if step == 6:
            assert gan.discriminator[0].weight.grad is not None

    gan = Gan(**{"before backward": note_kept, "after backward": look}).train()
    assert gan.noted[5] == [5] + [False] * 6
    assert gan.noted[8] == [8, True] + [False] * 5


def test_a_step_without_zero_grad_finds_what_is_owed(host: Host) -> None:
    def step_again(gan: Gan, step: int) -> None:
        if step in (5, 9):
            gan.optimizer_d.step()

    turned, bare = with_and_without(host, lambda: Gan(end=step_again).train())
    assert same(turned.weights(), bare.weights())


def test_clipping_finds_what_is_owed(host: Host) -> None:
    def clip(gan: Gan, step: int) -> None:
        if step == 7:
            gan.noted.append(nn.utils.clip_grad_norm_(gan.discriminator.parameters(), 1e-3))

    turned, bare = with_and_without(host, lambda: Gan(end=clip).train())
    assert same(turned.noted, bare.noted)


@pytest.mark.parametrize("turned", [False, True])
def test_zeros_are_zeros(host: Host, turned: bool) -> None:
    def look(gan: Gan, step: int) -> None:
        if step:
            for p in gan.discriminator.parameters():
                assert p.grad is not None
                assert not p.grad.any()

    def drop(gan: Gan, step: int) -> None:
        for p in gan.discriminator.parameters():
            p.grad = None

    undo = knobs.get("gradients").apply(host, "on_demand") if turned else None
    gan = Gan(**{"after zero_grad": look, "before backward": drop, "after backward": note_kept})
    gan.set_to_none = False
    gan.train()
    if undo is not None:
        undo()
    assert (gan.noted[-1][0] is None) == turned


@pytest.mark.parametrize("setter", ["assign", "delete"])
def test_another_gradient_takes_the_place_of_what_is_owed(host: Host, setter: str) -> None:
    def replace(gan: Gan, step: int) -> None:
        if step == 8:
            for p in gan.discriminator.parameters():
                if setter == "assign":
                    p.grad = torch.ones_like(p)
                else:
                    del p.grad
            gan.noted += [p.grad for p in gan.discriminator.parameters()]

    turned, bare = with_and_without(host, lambda: Gan(end=replace).train())
    assert same(turned.noted, bare.noted)
    assert same(turned.weights(), bare.weights())


def test_undone_between_two_steps_leaves_gradients_as_without(host: Host) -> None:
    def note_gradients(gan: Gan, step: int) -> None:
        gan.noted.append([p.grad.clone() for p in gan.discriminator.parameters()])  # type: ignore[union-attr]

    bare = Gan(end=note_gradients).train(6)
    undo = knobs.get("gradients").apply(host, "on_demand")
    turned = Gan().train(6)
    undo()
    found = [p.grad for p in turned.discriminator.parameters()]
    assert same(found, bare.noted[-1])


def test_turned_on_again_it_goes_on_from_what_it_knows(host: Host) -> None:
    gan = Gan(**{"before backward": note_kept, "after backward": note_kept})
    for _ in range(2):
        undo = knobs.get("gradients").apply(host, "on_demand")
        gan.noted.clear()
        gan.train(5)
        undo()
    assert same(gan.noted[0], gan.noted[1])


def hang_on_parameters(gan: Gan, called: list[int]) -> None:
    for p in gan.discriminator.parameters():
        p.register_hook(lambda grad: called.append(1))


def hang_on_accumulation(gan: Gan, called: list[int]) -> None:
    for p in gan.discriminator.parameters():
        p.register_post_accumulate_grad_hook(lambda p: called.append(1))


def hang_on_modules(gan: Gan, called: list[int]) -> None:
    for module in list(gan.discriminator)[1:]:
        module.register_full_backward_hook(lambda module, i, o: called.append(1))


@pytest.mark.parametrize("hang", [hang_on_parameters, hang_on_accumulation, hang_on_modules])
def test_hooks_are_called_as_often_as_without(
    host: Host, hang: Callable[[Gan, list[int]], None]
) -> None:
    counts = []
    for turned in (False, True):
        undo = knobs.get("gradients").apply(host, "on_demand") if turned else None
        called: list[int] = []
        gan = Gan()
        gan.discriminator[2] = nn.LeakyReLU(0.2)
        hang(gan, called)
        gan.train()
        counts.append(len(called))
        if undo is not None:
            undo()
    assert counts[0] == counts[1] > 0


class Tuned(nn.Module):
    """A body that no optimizer has, and a head that one has."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.head = nn.Linear(8, 16), nn.Linear(16, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.body(x).relu())  # type: ignore[no-any-return]


def tune(net: Tuned, optimizer: torch.optim.Optimizer, steps: int = 8) -> list[bool]:
    """Whether the body has got a gradient in each step."""
    torch.manual_seed(2)
    got = []
    for _ in range(steps):
        net.zero_grad()
        net(torch.randn(32, 8)).square().mean().backward()
        optimizer.step()
        got.append(stored_gradient.__get__(net.body.weight) is not None)
    return got


def tuned() -> tuple[Tuned, torch.optim.Optimizer]:
    torch.manual_seed(0)
    net = Tuned()
    return net, torch.optim.SGD(net.head.parameters(), lr=0.1)


def test_a_gradient_that_needs_a_weight_about_to_change_is_computed_from_it(
    host: Host,
) -> None:
    def train() -> list[bool]:
        net, optimizer = tuned()
        got = tune(net, optimizer)
        gradients.append(net.body.weight.grad)
        return got

    gradients: list[torch.Tensor | None] = []
    got, _ = with_and_without(host, train)
    assert got == [True] * 3 + [False] * 5
    assert same(gradients[:1], gradients[1:])


@pytest.mark.parametrize("hook", ["register_hook", "retain_grad", "none"])
def test_hooks_on_the_way_to_such_gradients_only_are_called(
    host: Host, on_demand: None, said: list[str], hook: str
) -> None:
    kept: list[torch.Tensor] = []

    class Shifted(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.shift, self.net = nn.Linear(2, 8), Gan().discriminator

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            shift = self.shift(torch.ones(1, 2))
            if hook == "retain_grad":
                shift.retain_grad()
                kept.append(shift)
            elif hook == "register_hook":
                shift.register_hook(kept.append)
            return self.net(x + shift)  # type: ignore[no-any-return]

    gan = Gan(**{"before backward": note_kept, "after backward": note_kept})
    gan.discriminator = Shifted()  # type: ignore[assignment]
    gan.optimizer_d = torch.optim.Adam(gan.discriminator.parameters(), lr=0.01)
    gan.train()
    assert same(gan.noted[-2], gan.noted[-1]) == (hook == "none")
    assert len(said) == (hook != "none")
    if hook != "none":
        assert len(kept) == 3 * STEPS
        found = kept if hook == "register_hook" else [shift.grad for shift in kept]
        assert all(grad is not None and grad.any() for grad in found)


def test_gradients_that_nobody_zeroes_add_up_as_without(host: Host) -> None:
    def train() -> Gan:
        gan = Gan()
        gan.optimizer_d.zero_grad = lambda set_to_none=True: None  # type: ignore[method-assign]
        return gan.train()

    turned, bare = with_and_without(host, train)
    assert same(turned.weights(), bare.weights())


def test_gradients_add_up_in_the_order_of_the_program(host: Host) -> None:
    def train() -> Gan:
        gan = Gan()
        own, count = gan.optimizer_d.zero_grad, iter(range(100))
        gan.optimizer_d.zero_grad = (  # type: ignore[method-assign]
            lambda set_to_none=True: None if next(count) % 4 == 3 else own(set_to_none)
        )
        return gan.train()

    turned, bare = with_and_without(host, train)
    assert same(turned.weights(), bare.weights())


def test_gradients_held_by_the_program_are_added_to(host: Host) -> None:
    def hold(gan: Gan, step: int) -> None:
        gan.noted = [p.grad for p in gan.discriminator.parameters()]

    def look(gan: Gan, step: int) -> None:
        if step == STEPS - 1:
            gan.noted = [grad.clone() for grad in gan.noted]

    turned, bare = with_and_without(
        host, lambda: Gan(**{"before backward": hold, "after backward": look}).train()
    )
    assert same(turned.noted, bare.noted)


@pytest.mark.parametrize("alias", ["view", "data", "numpy"])
def test_memory_of_gradients_held_by_the_program_is_added_to(host: Host, alias: str) -> None:
    held: list[Any] = []

    def hold(gan: Gan, step: int) -> None:
        if step == 0:
            for p in gan.discriminator.parameters():
                p.grad = torch.zeros_like(p)
            grads = [p.grad for p in gan.discriminator.parameters()]
            ways: dict[str, Callable[[Any], Any]] = {
                "view": lambda grad: grad.view(-1),
                "data": lambda grad: grad.data,
                "numpy": lambda grad: grad.numpy(),
            }
            held[:] = map(ways[alias], grads)

    def look(gan: Gan, step: int) -> None:
        gan.noted.append([torch.as_tensor(part).clone() for part in held])

    def build() -> Gan:
        gan = Gan(**{"before zero_grad": hold, "after backward": look})
        gan.set_to_none = False
        return gan

    turned, bare = with_and_without(host, lambda: build().train())
    assert all(same(a, b) for a, b in zip(turned.noted, bare.noted, strict=True))


def change_the_loss(gan: Gan, step: int) -> None:
    with torch.no_grad():
        gan.loss_g /= 4


def detach_the_loss(gan: Gan, step: int) -> None:
    gan.loss_g.detach_()


@pytest.mark.parametrize("change", [change_the_loss, detach_the_loss])
def test_losses_that_are_changed_after_backward(
    host: Host, change: Callable[[Gan, int], None]
) -> None:
    def read(gan: Gan, step: int) -> None:
        if step == 8:
            gan.noted = [p.grad.clone() for p in gan.discriminator.parameters()]  # type: ignore[union-attr]

    acts = {"after backward": change, "end": read}
    turned, bare = with_and_without(host, lambda: Gan(**acts).train())
    assert same(turned.noted, bare.noted)


def test_a_first_gradient_that_was_overwritten_since(host: Host) -> None:
    first = torch.ones(())
    own = torch.Tensor.backward

    class Loss(nn.BCELoss):
        def forward(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
            loss = super().forward(x, y)
            loss.backward = lambda: own(loss, first)  # type: ignore[method-assign,misc]
            return loss

    def read(gan: Gan, step: int) -> None:
        if step == 8:
            first.data.zero_()
            gan.noted = [p.grad.clone() for p in gan.discriminator.parameters()]  # type: ignore[union-attr]
            first.fill_(1)

    def build() -> Gan:
        gan = Gan(end=read)
        gan.criterion = Loss()
        return gan

    turned, bare = with_and_without(host, lambda: build().train())
    assert same(turned.noted, bare.noted)


def test_the_other_name_of_a_gradient(host: Host) -> None:
    def read(gan: Gan, step: int) -> None:
        gan.noted = [p._grad.clone() for p in gan.discriminator.parameters()]  # type: ignore[union-attr]

    turned, bare = with_and_without(host, lambda: Gan(end=read).train())
    assert same(turned.noted, bare.noted)


def test_a_payment_that_is_interrupted_is_an_error_to_the_next_reader(
    host: Host, monkeypatch: pytest.MonkeyPatch
) -> None:
    from flatout.knobs.gradients import on_demand

    def interrupted(*args: Any, **kwargs: Any) -> None:
        raise KeyboardInterrupt

    def read(gan: Gan, step: int) -> None:
        if step == 8:
            with monkeypatch.context() as patch:
                patch.setattr(on_demand, "run_backward", interrupted)
                with pytest.raises(KeyboardInterrupt):
                    assert gan.discriminator[0].weight.grad is not None
            with pytest.raises(RuntimeError, match="cannot be computed any more"):
                assert gan.discriminator[0].weight.grad is not None

    undo = knobs.get("gradients").apply(host, "on_demand")
    turned = Gan(end=read).train()
    undo()
    assert same(turned.weights(), Gan().train().weights())


@pytest.mark.parametrize("kind", ["register_hook", "register_post_accumulate_grad_hook"])
def test_a_hook_is_called_for_later_gradients_only(host: Host, kind: str) -> None:
    def hang(gan: Gan, step: int) -> None:
        if step == 8:
            for p in gan.discriminator.parameters():
                getattr(p, kind)(lambda grad: gan.noted.append(1))

    turned, bare = with_and_without(host, lambda: Gan(end=hang).train())
    assert len(turned.noted) == len(bare.noted) > 0
    assert same(turned.weights(), bare.weights())


def test_a_hook_that_reads_other_gradients_sees_them_whole(host: Host) -> None:
    def hang(gan: Gan, step: int) -> None:
        if step == 0:
            last = gan.generator[0].weight

            def look(_: torch.Tensor) -> None:
                grads = [p.grad for p in gan.discriminator.parameters()]
                gan.noted.append([None if grad is None else grad.clone() for grad in grads])

            last.register_post_accumulate_grad_hook(look)

    turned, bare = with_and_without(host, lambda: Gan(**{"before zero_grad": hang}).train())
    assert len(turned.noted) == STEPS
    assert all(same(a, b) for a, b in zip(turned.noted, bare.noted, strict=True))


def test_two_parameters_with_one_gradient(host: Host) -> None:
    def train() -> list[torch.Tensor]:
        gan, other = Gan(), Gan().discriminator
        for p, q in zip(gan.discriminator.parameters(), other.parameters(), strict=True):
            p.grad = q.grad = torch.zeros_like(p)
        optimizer = torch.optim.SGD(other.parameters(), lr=0.1)
        torch.manual_seed(3)
        for _ in range(9):
            gan.discriminator.zero_grad(set_to_none=False)
            gan.optimizer_g.zero_grad()
            gan.discriminator(gan.generator(torch.randn(32, 4))).mean().backward()
            gan.optimizer_g.step()
            optimizer.step()
        return [p.detach().clone() for p in other.parameters()]

    turned, bare = with_and_without(host, train)
    assert same(turned, bare)


def test_scaled_losses_end_it(host: Host, on_demand: None, said: list[str]) -> None:
    gan = Gan()
    scaler = torch.amp.GradScaler("cpu")
    loss = gan.criterion(gan.discriminator(torch.randn(32, 8)), torch.ones(32, 1))
    scaler.scale(loss).backward()
    scaler.step(gan.optimizer_d)
    scaler.update()
    assert said == ["the program scales its losses"]


def test_many_calls_between_two_drops_are_soon_left_alone(host: Host) -> None:
    def train() -> list[torch.Tensor | None]:
        gan = Gan()
        for _ in range(8):
            gan.optimizer_d.zero_grad()
            for _ in range(4):
                fake = gan.generator(torch.ones(32, 4))
                gan.criterion(gan.discriminator(fake), torch.ones(32, 1)).backward()
            gan.optimizer_g.step()
            gan.optimizer_g.zero_grad()
        return gan.kept()

    turned, bare = with_and_without(host, train)
    assert same(turned, bare)  # nothing is owed


@pytest.mark.parametrize("until", ["read", "end"])
def test_parameters_frozen_after_the_forward_pass(host: Host, until: str) -> None:
    def freeze(gan: Gan, step: int) -> None:
        gan.discriminator.requires_grad_(False)

    def thaw(gan: Gan, step: int) -> None:
        if step == 8 and until == "read":
            gan.noted = [p.grad.clone() for p in gan.discriminator.parameters()]  # type: ignore[union-attr]
        gan.discriminator.requires_grad_(True)

    acts = {"before backward": freeze, "end": thaw}
    turned, bare = with_and_without(host, lambda: Gan(**acts).train())
    assert same(turned.noted, bare.noted)
    assert same(turned.weights(), bare.weights())


def test_a_gradient_is_paid_to_a_parameter_frozen_since(host: Host) -> None:
    def read(gan: Gan, step: int) -> None:
        if step == 8:
            gan.discriminator.requires_grad_(False)
            gan.noted = [p.grad.clone() for p in gan.discriminator.parameters()]  # type: ignore[union-attr]
            assert not any(p.requires_grad for p in gan.discriminator.parameters())
            gan.discriminator.requires_grad_(True)

    turned, bare = with_and_without(host, lambda: Gan(end=read).train())
    assert same(turned.noted, bare.noted)


@pytest.mark.parametrize(
    "mode",
    [lambda: torch.autocast("cpu", torch.bfloat16), torch.inference_mode],
    ids=["autocast", "inference"],
)
def test_a_gradient_is_paid_whatever_mode_its_reader_is_in(host: Host, mode: Any) -> None:
    def read(gan: Gan, step: int) -> None:
        if step == 8:
            with mode():
                gan.noted = [p.grad for p in gan.discriminator.parameters()]
            assert not any(grad.is_inference() for grad in gan.noted)
            gan.noted = [grad.clone() for grad in gan.noted]

    turned, bare = with_and_without(host, lambda: Gan(end=read).train())
    assert same(turned.noted, bare.noted)


def test_a_part_that_is_read_is_not_stepped_before_the_rest_is_paid(host: Host) -> None:
    def build() -> Gan:
        def act(gan: Gan, step: int) -> None:
            weights = [p for p in gan.discriminator.parameters() if p.dim() == 2]
            if step == 5:
                gan.noted = [p.grad.clone() for p in weights]  # type: ignore[union-attr]
            if step == 9:
                gan.optimizer_d.step()

        gan = Gan(end=act)
        parameters = list(gan.discriminator.parameters())
        groups = [
            {"params": [p for p in parameters if p.dim() == 2]},
            {"params": [p for p in parameters if p.dim() != 2]},
        ]
        gan.optimizer_d = torch.optim.Adam(groups, lr=0.01)
        return gan

    turned, bare = with_and_without(host, lambda: build().train())
    assert same(turned.noted, bare.noted)
    assert same(turned.weights(), bare.weights())


def test_old_debts_are_paid_and_their_graphs_go(on_demand: None) -> None:
    gan = Gan()
    gan.discriminator[4] = sigmoid = Noted()
    gan.train()
    del gan.loss_g
    assert sigmoid.is_saved()
    net, optimizer = tuned()
    tune(net, optimizer, 10)
    assert not sigmoid.is_saved()
    assert gan.discriminator[0].weight.grad is not None
    again = Gan(**{"before backward": note_kept, "after backward": note_kept}).train()
    assert same(again.noted[-2], again.noted[-1])


def test_a_penalty_on_gradients_is_left_alone(host: Host) -> None:
    def penalise(gan: Gan, step: int) -> None:
        x = torch.randn(4, 8, requires_grad=True)
        (found,) = torch.autograd.grad(gan.discriminator(x).sum(), x, create_graph=True)
        found.square().mean().backward()
        gan.noted.append(gan.discriminator[0].weight.grad.clone())  # type: ignore[union-attr]

    turned, bare = with_and_without(host, lambda: Gan(**{"after zero_grad": penalise}).train())
    assert same(turned.noted, bare.noted)
    assert same(turned.weights(), bare.weights())


def test_checkpoints_end_it(host: Host, on_demand: None, said: list[str]) -> None:
    gan = Gan()
    own = gan.discriminator.forward
    gan.discriminator.forward = lambda x: checkpoint(own, x, use_reentrant=False)  # type: ignore[method-assign]
    gan.train()
    assert len(said) == 1
    assert "checkpoints" in said[0]


def test_it_refuses_where_gradients_are_scaled(tmp_path: Path) -> None:
    host = host_in(tmp_path, Request(settings={"precision": "fp16"}))
    with pytest.raises(RefusedError, match="fp16"):
        knobs.get("gradients").apply(host, "on_demand")


def test_zero_grad_of_a_module_takes_the_parameters_that_it_names(host: Host) -> None:
    class Part(nn.Sequential):
        def parameters(self, recurse: bool = True) -> Iterator[nn.Parameter]:
            return self[0].parameters(recurse)

    def drop(gan: Gan, step: int) -> None:
        if step == 8:
            gan.discriminator.zero_grad()
            gan.noted = [p.grad for _, p in gan.discriminator.named_parameters()]

    def build() -> Gan:
        gan = Gan(end=drop)
        gan.discriminator = Part(*gan.discriminator)
        gan.optimizer_d = torch.optim.Adam(
            [p for _, p in gan.discriminator.named_parameters()], lr=0.01
        )
        return gan

    turned, bare = with_and_without(host, lambda: build().train())
    assert same(turned.noted, bare.noted)


class Noted(nn.Sigmoid):
    """Knows whether what it saved for backward still lives."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        found = super().forward(x)
        self.saved = StorageWeakRef(found.untyped_storage())
        return found

    def is_saved(self) -> bool:
        gc.collect()
        return not self.saved.expired()


def test_what_a_debt_needs_lives_no_longer_than_it(on_demand: None) -> None:
    def look(gan: Gan, step: int) -> None:
        gan.noted.append(gan.noted_sigmoid.is_saved())  # type: ignore[attr-defined]

    def forget(gan: Gan, step: int) -> None:
        del gan.loss_g

    gan = Gan(**{"end": forget, "before zero_grad": look, "after zero_grad": look})
    gan.discriminator[4] = gan.noted_sigmoid = Noted()  # type: ignore[attr-defined]
    gan.noted_sigmoid(torch.zeros(1))  # type: ignore[attr-defined]
    gan.train()
    assert gan.noted[6:] == [True, False] * (STEPS - 3)


def test_a_graph_that_is_kept_is_left_alone(on_demand: None) -> None:
    gan = Gan(**{"before backward": note_kept, "after backward": note_kept})
    own = torch.Tensor.backward

    class Loss(nn.BCELoss):
        def forward(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
            loss = super().forward(x, y)
            loss.backward = lambda: own(loss, retain_graph=True)  # type: ignore[method-assign,misc]
            return loss

    gan.criterion = Loss()
    gan.train()
    assert not same(gan.noted[-2], gan.noted[-1])


def test_a_function_of_the_program_is_called(host: Host) -> None:
    class Counted(torch.autograd.Function):
        calls = 0

        @staticmethod
        def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
            return x.clone()

        @staticmethod
        def backward(ctx: Any, grad: torch.Tensor) -> torch.Tensor:
            Counted.calls += 1
            return grad

    class Counting(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.shift, self.net = nn.Linear(2, 8), Gan().discriminator

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.net(x + Counted.apply(self.shift(torch.ones(1, 2))))  # type: ignore[no-any-return]

    undo = knobs.get("gradients").apply(host, "on_demand")
    gan = Gan()
    gan.discriminator = Counting()  # type: ignore[assignment]
    gan.optimizer_d = torch.optim.Adam(gan.discriminator.parameters(), lr=0.01)
    gan.train()
    undo()
    assert Counted.calls == 3 * STEPS


def test_a_program_that_drops_nothing_is_left_alone_after_a_while(
    said: list[str], on_demand: None
) -> None:
    net, _ = tuned()
    tune(net, torch.optim.SGD(net.parameters(), lr=0.1), CALLS_WITHOUT_USE)
    assert said == [f"nothing could be deferred in {CALLS_WITHOUT_USE} backward calls"]
    assert "grad" not in nn.Parameter.__dict__


@pytest.mark.parametrize(
    ("facts", "is_offered"),
    [
        (Facts("cpu", optimizers=2), True),
        (Facts("cpu"), True),
        (Facts("cpu", optimizers=1), False),
        (Facts("cpu", has_optimizer_steps=False), False),
    ],
)
def test_it_is_offered_where_gradients_may_be_dropped(facts: Facts, is_offered: bool) -> None:
    assert bool(gradients.KNOB.offer(facts).settings) == is_offered
