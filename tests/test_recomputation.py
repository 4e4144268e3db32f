"""Checkpoints run parts of a forward pass again while backward runs: under every knob, as bare.

A checkpoint without reentrance stops what it computes again by an exception, raised as a tensor is
saved; and it holds what is saved against the first pass: how many tensors, their shapes and types.
What is drawn again must be what was drawn before.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.autograd.graph import save_on_cpu, saved_tensors_hooks
from torch.nn import functional as F
from torch.utils import checkpoint as torchs

from flatout import knobs
from flatout.errors import RefusedError
from flatout.intercept.host import Host
from flatout.knobs import compile as compiling
from flatout.knobs.cross_entropy import cpu as cross_entropy
from flatout.knobs.elementwise import cpu as elementwise
from flatout.knobs.embedding import cpu as embedding
from flatout.knobs.random import cpu as random
from tests.hosts import host_in

ELSEWHERE = {"flash", "cudnn", "efficient", "reduce-overhead"}
"""Settings for CUDA of knobs that are for the CPU as well."""

COMPILED = {"regional", "dynamic", "max-autotune"}
"""One way of compiling is enough here."""

SETTINGS = [
    (name, setting)
    for name, knob in knobs.registry().items()
    if knob.hot and "cpu" in knob.platforms
    for setting in knob.settings
    if setting not in ELSEWHERE | COMPILED
]


@pytest.fixture
def host(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Host]:
    """Of a process whose small tensors go through our kernels as well."""
    for module, name in (
        (random, "SERIAL_BELOW"),
        (elementwise, "FEWEST"),
        (embedding, "FEWEST"),
        (cross_entropy, "FEWEST_LOGITS"),
    ):
        monkeypatch.setattr(module, name, 1)
    monkeypatch.setattr(compiling, "OPTIONS", {"default": {"backend": "eager"}})
    made = host_in(tmp_path)
    made.hooks.install(live=False)
    made.hooks.root_search.is_active = False
    yield made
    made.hooks.remove()


class Block(nn.Module):
    """Convolutions, attention, a recurrent layer and activations; it ends in dropout."""

    def __init__(self, drop: float) -> None:
        super().__init__()
        self.norm, self.first = nn.BatchNorm2d(4), nn.Conv2d(4, 8, 3, padding=1)
        self.last = nn.ConvTranspose2d(8, 4, 4, stride=2, padding=1)
        self.qkv, self.gru = nn.Linear(16, 48), nn.GRU(16, 16, batch_first=True)
        self.drop = drop

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        images = F.gelu(self.first(self.norm(x)), approximate="tanh")
        rows = torch.tanh(self.last(F.max_pool2d(images, 2))).flatten(2)
        q, k, v = self.qkv(rows).view(len(x), 4, 3, 2, 8).permute(2, 0, 3, 1, 4)
        seen = F.scaled_dot_product_attention(q, k, v, dropout_p=self.drop)
        rows = rows + self.gru(seen.transpose(1, 2).flatten(2))[0]
        return F.dropout(x + rows.view_as(x), self.drop, True)


class Net(nn.Module):
    def __init__(self, drop: float) -> None:
        super().__init__()
        self.look_up = nn.EmbeddingBag(50, 64)
        self.blocks = nn.Sequential(*(Block(drop) for _ in range(2)))
        self.head = nn.Linear(64, 20)

    def start(self, bags: torch.Tensor) -> torch.Tensor:
        return self.look_up(bags).view(-1, 4, 4, 4)

    def loss(self, x: torch.Tensor, classes: torch.Tensor) -> torch.Tensor:
        return F.cross_entropy(self.head(x.flatten(1)), classes)

    def forward(self, bags: torch.Tensor, classes: torch.Tensor) -> torch.Tensor:
        return self.loss(self.blocks(self.start(bags)), classes)


Pass = Callable[[Net, torch.Tensor, torch.Tensor], torch.Tensor]


def method(net: Net, bags: torch.Tensor, classes: torch.Tensor, again: Any) -> torch.Tensor:
    """Not by ``forward`` of the whole: each block is called outermost."""
    x = net.start(bags)
    for block in net.blocks:
        x = again(block, x)
    return net.loss(x, classes)


class Whole(nn.Module):
    """A module whose pass forward is another one of a net."""

    def __init__(self, net: Net, way: Callable[..., torch.Tensor], again: Any) -> None:
        super().__init__()
        self.net, self.way, self.again = net, way, again

    def forward(self, bags: torch.Tensor, classes: torch.Tensor) -> torch.Tensor:
        return self.way(self.net, bags, classes, self.again)


def head_and_loss(net: Net, bags: torch.Tensor, classes: torch.Tensor, again: Any) -> torch.Tensor:
    return again(net.loss, net.blocks(net.start(bags)), classes)


def nested(net: Net, bags: torch.Tensor, classes: torch.Tensor, again: Any) -> torch.Tensor:
    def all_blocks(x: torch.Tensor) -> torch.Tensor:
        for block in net.blocks:
            x = again(block, x)
        return x

    return net.loss(again(all_blocks, net.start(bags)), classes)


def sequential(net: Net, bags: torch.Tensor, classes: torch.Tensor, again: Any) -> torch.Tensor:
    x = net.start(bags)
    if again is plainly:
        return net.loss(net.blocks(x), classes)
    x = torchs.checkpoint_sequential(net.blocks, 2, x, **again.keywords)
    return net.loss(x, classes)


WAYS = (method, head_and_loss, nested, sequential)


def plainly(function: Callable[..., torch.Tensor], *args: torch.Tensor) -> torch.Tensor:
    return function(*args)


def gradients(
    net: Net, call: Pass, around: contextlib.AbstractContextManager[Any]
) -> list[torch.Tensor]:
    """Of all parameters."""
    dtype = next(net.parameters()).dtype
    torch.manual_seed(3)
    for norm in (block.norm for block in net.blocks):
        norm.reset_running_stats()
    net.zero_grad()
    with around:
        bags = torch.arange(48).view(8, 6) * 3 % 50
        call(net, bags, torch.arange(8) % 5).backward()
    found = [p.grad for p in net.parameters()]
    assert all(gradient is not None and gradient.dtype is dtype for gradient in found)
    return [g.clone() for g in found if g is not None]


def net_with(drop: float, dtype: torch.dtype = torch.float32) -> Net:
    torch.manual_seed(0)
    return Net(drop).to(dtype)


def contexts() -> Iterator[contextlib.AbstractContextManager[Any]]:
    yield contextlib.nullcontext()
    yield save_on_cpu()
    yield saved_tensors_hooks(lambda x: [x.detach().clone()], lambda kept: kept[0])
    yield torchs.set_checkpoint_early_stop(False)


def as_said(
    net: Net, *args: torch.Tensor, way: Callable[..., Any], by_method: bool, again: Any
) -> torch.Tensor:
    """The loss, by a function of the program or by a module's pass forward."""
    found: torch.Tensor = way(net, *args, again) if by_method else Whole(net, way, again)(*args)
    return found


@pytest.mark.parametrize(("name", "setting"), SETTINGS)
def test_what_is_computed_again_is_what_was_computed(host: Host, name: str, setting: str) -> None:
    exact = gradients(net_with(0.0, torch.float64), Net.forward, contextlib.nullcontext())
    bare = gradients(net_with(0.0), Net.forward, contextlib.nullcontext())
    try:
        undo = knobs.get(name).apply(host, setting)
    except RefusedError as refusal:
        pytest.skip(str(refusal))
    try:
        plain = net_with(0.0)
        optimizers = [torch.optim.SGD(plain.parameters())]  # without one, fp16 is not applied
        found = gradients(plain, lambda net, *args: net(*args), contextlib.nullcontext())
        exactness = knobs.get(name).exactness[setting]
        for mine, one, right in zip(found, bare, exact, strict=True):
            if exactness == "bitwise":
                assert torch.equal(mine, one)
            else:
                loose = 0.2 if exactness == "reduced" else 1e-4
                torch.testing.assert_close(
                    mine.double(), right, rtol=loose, atol=loose * float(right.abs().max())
                )
        net = net_with(0.3)
        optimizers.append(torch.optim.SGD(net.parameters()))
        for way, by_method in itertools.product(WAYS, (True, False)):
            run = functools.partial(as_said, way=way, by_method=by_method)
            nothing = contextlib.nullcontext()
            expected = gradients(net, functools.partial(run, again=plainly), nothing)
            for reentrant in (True, False):
                again = functools.partial(torchs.checkpoint, use_reentrant=reentrant)
                for around in contexts() if way is method and not reentrant else [nothing]:
                    found = gradients(net, functools.partial(run, again=again), around)
                    for one, other in zip(found, expected, strict=True):
                        # Under autocast a checkpoint that is no part of a module is in float32.
                        off = 0.1 * float(other.abs().max()) if exactness == "reduced" else 1e-6
                        torch.testing.assert_close(one, other, rtol=1e-5, atol=off)
        fresh = functools.partial(torchs.checkpoint, use_reentrant=False, preserve_rng_state=False)
        run = functools.partial(as_said, way=method, by_method=False, again=fresh)
        assert all(g.isfinite().all() for g in gradients(net, run, contextlib.nullcontext()))
        # With reentrance, gradients go to leaves of torch's, which no scaling may meet.
        assert not host.applied.failures or setting == "fp16"
    finally:
        undo()
