"""``gradients=on_demand``: whatever a program does after a backward call, a gradient that was put
off is the one that the call would have given, to the last bit."""

from __future__ import annotations

import copy
import gc
import os
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.autograd.graph import register_multi_grad_hook
from torch.nn import functional as F
from torch.nn.utils import parametrizations
from torch.utils.checkpoint import checkpoint

from flatout import knobs
from flatout.intercept.gradients import stored_gradient
from flatout.intercept.host import Host
from tests.hosts import host_in

STEPS, ROWS, WIDTH = 5, 16, 8


@pytest.fixture
def host(tmp_path: Path) -> Iterator[Host]:
    made = host_in(tmp_path)
    made.hooks.install(live=False)
    yield made
    made.hooks.remove()
    assert not made.applied.failures


class Recurrent(nn.Module):
    """A layer whose graph has views, and tensors that are saved in lists."""

    def __init__(self) -> None:
        super().__init__()
        self.unit = nn.GRU(2, WIDTH, batch_first=True)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        output, _ = self.unit(x.view(len(x), -1, 2))
        return output[:, -1]  # type: ignore[no-any-return]


class Attending(nn.Module):
    """A layer whose weights are views of one, beside an index and a product of masks."""

    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(WIDTH, 2, batch_first=True)
        self.table = nn.Embedding(5, WIDTH)
        self.order = torch.arange(WIDTH).flip(0)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        pieces = x.view(-1, 2, WIDTH) + self.table(torch.tensor([1, 3]))
        output, _ = self.attention(pieces, pieces, pieces, need_weights=False)
        return output.reshape(x.shape)[:, self.order]  # type: ignore[no-any-return]


class Convolving(nn.Module):
    """Images, and what a pooling layer saves."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(1, 4, 3, padding=1)
        self.norm = nn.InstanceNorm2d(4, affine=True, track_running_stats=True)
        self.last = nn.ConvTranspose2d(4, 1, 2, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        images = self.norm(self.first(x.view(-1, 1, 4, WIDTH // 4)))
        return self.last(F.max_pool2d(F.leaky_relu(images, 0.1), 2)).flatten(1).repeat(1, 1)  # type: ignore[no-any-return]


BODIES: dict[str, Callable[[], nn.Module]] = {
    "batch norm": lambda: nn.Sequential(nn.BatchNorm1d(WIDTH, momentum=0.5), nn.ReLU()),
    "layer norm": lambda: nn.Sequential(nn.LayerNorm(WIDTH), nn.GELU()),
    "spectral norm": lambda: parametrizations.spectral_norm(nn.Linear(WIDTH, WIDTH)),
    "weight norm": lambda: parametrizations.weight_norm(nn.Linear(WIDTH, WIDTH)),
    "dropout": lambda: nn.Sequential(nn.Dropout(0.3), nn.Linear(WIDTH, WIDTH), nn.PReLU()),
    "recurrent": Recurrent,
    "attention": Attending,
    "convolution": Convolving,
    "group norm": lambda: nn.Sequential(nn.Unflatten(1, (4, -1)), nn.GroupNorm(2, 4), nn.Flatten()),
}


class Pair:
    """A network that learns through another one, whose gradients are dropped.

    Args:
        body: a name in ``BODIES``.
        is_eval: whether the other one is in ``eval()`` while the first learns.
    """

    def __init__(self, body: str, is_eval: bool) -> None:
        torch.manual_seed(0)
        self.learner = nn.Linear(WIDTH, WIDTH)
        self.other = nn.Sequential(
            *(nn.Linear(WIDTH, WIDTH), BODIES[body](), nn.Tanh(), nn.Linear(WIDTH, 1))
        )
        self.is_eval = is_eval
        self.memory = np.zeros((ROWS, WIDTH), dtype=np.float32)
        self.inputs = torch.from_numpy(self.memory)
        self.optimizer = torch.optim.SGD(self.learner.parameters(), 0.05)
        self.optimizer_of_other = torch.optim.Adam(self.other.parameters(), 0.05)
        self.targets = torch.zeros(ROWS, 1)

    def pass_forward(self) -> torch.Tensor:
        self.other.train(not self.is_eval)
        self.middle = self.learner(self.inputs)
        return F.mse_loss(self.other(self.middle), self.targets)

    def train(self, change: Callable[[Pair], object]) -> list[torch.Tensor | None]:
        """The gradients of the other one, read after the change in the last step."""
        for step in range(STEPS):
            self.memory[:] = np.random.default_rng(step).normal(size=self.memory.shape)
            self.other.zero_grad()
            self.optimizer.zero_grad()
            self.loss = self.pass_forward()
            self.loss.backward()
            self.optimizer.step()
            if step == STEPS - 1:
                self.was_put_off = stored_gradient.__get__(next(self.other.parameters())) is None
                parameters = list(self.other.parameters())
                change(self)
                return [None if p.grad is None else p.grad.clone() for p in parameters]
        raise AssertionError


def trains_on(pair: Pair) -> None:
    pair.other.train()
    with torch.no_grad():
        for _ in range(2):
            pair.other(5 * torch.randn(4 * ROWS, WIDTH) + 3)


def writes_past_the_counters(pair: Pair) -> None:
    for tensor in (*pair.other.parameters(), *pair.learner.parameters(), *pair.other.buffers()):
        tensor.data.mul_(2)
    pair.middle.data.zero_()
    pair.loss.data.zero_()


def writes(pair: Pair) -> None:
    with torch.no_grad():
        for tensor in (*pair.other.parameters(), *pair.other.buffers()):
            tensor.add_(1)
        pair.middle.zero_()
        pair.targets.fill_(3)


def clips_weights(pair: Pair) -> None:
    for p in pair.other.parameters():
        p.data.clamp_(-0.01, 0.01)


def reuses_its_inputs(pair: Pair) -> None:
    pair.memory[:] = 7


def loads_a_state(pair: Pair) -> None:
    state = copy.deepcopy(pair.other).state_dict()
    pair.other.load_state_dict({name: value * 3 for name, value in state.items()})


def steps_with_others(pair: Pair) -> None:
    parameters = list(pair.other.parameters())
    torch.optim.SGD(parameters[:1], 0.5).step()


def exchanges_memory(pair: Pair) -> None:
    for p in pair.other.parameters():
        p.data = torch.ones_like(p)


def goes_to_double_and_back(pair: Pair) -> None:
    pair.other.double()
    pair.other.float()


def forgets_everything(pair: Pair) -> None:
    del pair.loss, pair.middle
    gc.collect()
    torch.randn(1 << 16)


def changes_the_mode_of_modules(pair: Pair) -> None:
    pair.other.train(pair.is_eval)
    pair.other.requires_grad_(False)


def evaluates(pair: Pair) -> None:
    pair.other.eval()
    with torch.inference_mode():
        pair.other(torch.randn(ROWS, WIDTH))


CHANGES = (
    *(trains_on, writes_past_the_counters, writes, clips_weights, reuses_its_inputs),
    *(loads_a_state, steps_with_others, exchanges_memory, goes_to_double_and_back),
    *(forgets_everything, changes_the_mode_of_modules, evaluates),
)


def compare(host: Host, train: Callable[[], tuple[list[Any], bool]]) -> bool:
    """Hold what a program gets under the knob against what it gets bare.

    Args:
        host: with which the knob is applied.
        train: the program: what it gets, and whether gradients were put off.

    Returns:
        Whether gradients were put off under the knob.
    """
    expected, was_bare_put_off = train()
    undo = knobs.get("gradients").apply(host, "on_demand")
    found, was_put_off = train()
    undo()
    assert not was_bare_put_off
    assert len(found) == len(expected) > 0
    for a, b in zip(found, expected, strict=True):
        if isinstance(a, torch.Tensor) and isinstance(b, torch.Tensor):
            assert a.stride() == b.stride()
            assert torch.equal(a, b)
        else:
            assert a == b
    return was_put_off


@pytest.mark.parametrize(
    ("body", "is_eval"),
    [*((body, True) for body in BODIES), ("batch norm", False), ("spectral norm", False)],
)
def test_what_was_put_off_is_what_the_call_would_have_given(
    host: Host, body: str, is_eval: bool
) -> None:
    for change in CHANGES:

        def train(change: Callable[[Pair], object] = change) -> tuple[list[Any], bool]:
            pair = Pair(body, is_eval)
            return pair.train(change), pair.was_put_off

        assert compare(host, train), change


def fewer_threads() -> Callable[[], object]:
    before = torch.get_num_threads()
    torch.set_num_threads(1 if before > 1 else 2)
    return lambda: torch.set_num_threads(before)


def flushing() -> Callable[[], object]:
    torch.set_flush_denormal(True)
    return lambda: torch.set_flush_denormal(False)


def deterministic() -> Callable[[], object]:
    torch.use_deterministic_algorithms(True)
    return lambda: torch.use_deterministic_algorithms(False)


def in_double() -> Callable[[], object]:
    torch.set_default_dtype(torch.float64)
    return lambda: torch.set_default_dtype(torch.float32)


def without_onednn() -> Callable[[], object]:
    torch._C._set_mkldnn_enabled(False)
    return lambda: torch._C._set_mkldnn_enabled(True)


def in_low_precision() -> Callable[[], object]:
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("medium")
    return lambda: torch.set_float32_matmul_precision(before)


@pytest.mark.parametrize(
    "turn",
    [fewer_threads, flushing, deterministic, in_double, without_onednn, in_low_precision],
)
def test_the_state_of_torch_is_that_of_the_call(
    host: Host, turn: Callable[[], Callable[[], object]]
) -> None:
    class Long(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.randn(WIDTH, WIDTH))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            tall = x.repeat(4096, 1) @ self.weight  # long sums, in which the order shows
            return tall.view(4096, *x.shape).mean(0) * 1e-30 * 1e-8  # and denormal numbers

    def train() -> tuple[list[Any], bool]:
        pair = Pair("batch norm", is_eval=True)
        pair.other[1] = Long()
        pair.other[2] = nn.Identity()
        undos: list[Callable[[], object]] = []
        try:
            found = pair.train(lambda pair: undos.append(turn()))
        finally:
            undos[0]()
        return [*found, torch.get_num_threads(), torch.get_default_dtype()], pair.was_put_off

    assert compare(host, train)


def read_in_thread(parameters: list[Any]) -> list[Any]:
    found: list[Any] = []
    reader = threading.Thread(target=lambda: found.extend(p.grad.clone() for p in parameters))
    reader.start()
    reader.join()
    return found


def read_in_child(parameters: list[Any]) -> list[Any]:
    out, into = os.pipe()
    child = os.fork()
    if not child:
        with os.fdopen(into, "w") as file:
            file.write(repr([p.grad.tolist() for p in parameters]))
        os._exit(0)
    os.close(into)
    with os.fdopen(out) as file:
        said = file.read()
    os.waitpid(child, 0)
    return [said]


@pytest.mark.parametrize("read", [read_in_thread, read_in_child])
def test_who_reads_from_elsewhere(host: Host, read: Callable[[list[Any]], list[Any]]) -> None:
    def train() -> tuple[list[Any], bool]:
        pair, found = Pair("batch norm", is_eval=True), []
        pair.train(lambda pair: found.extend(read(list(pair.other.parameters()))))
        return found, pair.was_put_off

    assert compare(host, train)


def again(pair: Pair) -> object:
    return pair.loss.backward()


def again_from_the_middle(pair: Pair) -> object:
    return pair.middle.sum().backward() or pair.learner(pair.middle).sum().backward()


def again_after_reading(pair: Pair) -> object:
    assert all(p.grad is not None for p in pair.other.parameters())
    return pair.loss.backward()


def again_after_dropping(pair: Pair) -> object:
    pair.other.zero_grad()
    return pair.loss.backward()


@pytest.mark.parametrize("act", [again, again_after_reading, again_after_dropping])
def test_a_second_backward_pass_fails_as_without(host: Host, act: Callable[[Pair], object]) -> None:
    def train() -> tuple[list[Any], bool]:
        pair = Pair("dropout", is_eval=True)
        pair.other[1] = nn.Sigmoid()  # saves its output
        said = []

        def change(pair: Pair) -> None:
            with pytest.raises(RuntimeError) as failure:
                act(pair)
            said.append(str(failure.value))

        pair.train(change)
        return said, pair.was_put_off

    assert compare(host, train)


@pytest.mark.parametrize("what", ["weight", "output"])
def test_what_was_written_before_the_call_fails_in_the_call(host: Host, what: str) -> None:
    """Also where only gradients that are dropped lie behind it."""

    class Shifted(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.scale, self.weight = nn.Parameter(torch.ones(WIDTH)), nn.Parameter(torch.ones(1))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            self.output = self.scale.sigmoid()
            return x + self.output * self.weight

    def train() -> tuple[list[Any], bool]:
        pair = Pair("layer norm", is_eval=False)
        pair.other[1] = shifted = Shifted()
        forward, count, said = pair.pass_forward, iter(range(STEPS)), []

        def pass_forward() -> torch.Tensor:
            loss = forward()
            if next(count) == STEPS - 2:
                with torch.no_grad():
                    getattr(shifted, what).mul_(2)
                with pytest.raises(RuntimeError) as failure:
                    loss.backward()
                said.append(str(failure.value).partition("[")[0])
                loss = forward()
            return loss

        pair.pass_forward = pass_forward  # type: ignore[method-assign]
        pair.train(lambda pair: None)
        return said, pair.was_put_off

    compare(host, train)


class Scaled(torch.autograd.Function):
    """Its backward reads what lies on a module."""

    owner: Any = None

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
        return x * Scaled.owner.scale

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> torch.Tensor:
        return gradient * Scaled.owner.scale


class Scaling(nn.Module):
    scale = 2.0

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        Scaled.owner = self
        return Scaled.apply(x)  # type: ignore[no-any-return]


class WritingInPlace(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = x * 1
        y[:, 0] = 0
        y[:, 1:].mul_(2)
        return y


class Checkpointed(nn.Module):
    def __init__(self, reentrant: bool) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.BatchNorm1d(WIDTH), nn.Linear(WIDTH, WIDTH), nn.Dropout(0.5))
        self.reentrant = reentrant

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return checkpoint(self.body, x, use_reentrant=self.reentrant)  # type: ignore[no-any-return]


@pytest.mark.parametrize(
    "body",
    [Scaling, WritingInPlace, lambda: Checkpointed(True), lambda: Checkpointed(False)],
    ids=["function", "in place", "reentrant", "checkpoint"],
)
def test_what_reads_more_than_its_saved_tensors_is_not_put_off(
    host: Host, body: Callable[[], nn.Module]
) -> None:
    def change(pair: Pair) -> None:
        trains_on(pair)
        if isinstance(pair.other[1], Scaling):
            pair.other[1].scale = 3.0

    def train() -> tuple[list[Any], bool]:
        pair = Pair("batch norm", is_eval=False)
        pair.other[1] = body()
        found: list[Any] = pair.train(change)
        found += [*pair.other.buffers(), torch.randn(1)]
        return found, pair.was_put_off

    assert not compare(host, train)


def hang_on_node(pair: Pair, note: Callable[..., None]) -> None:
    pair.loss.grad_fn.register_hook(note)  # type: ignore[union-attr]


def hang_before_node(pair: Pair, note: Callable[..., None]) -> None:
    pair.loss.grad_fn.register_prehook(note)  # type: ignore[union-attr]


def hang_on_accumulation(pair: Pair, note: Callable[..., None]) -> None:
    p = next(pair.other.parameters())
    node = p.expand_as(p).grad_fn.next_functions[0][0]  # type: ignore[union-attr]
    node.register_hook(note)
    pair.kept_alive = node  # type: ignore[attr-defined]


def hang_on_several(pair: Pair, note: Callable[..., None]) -> None:
    register_multi_grad_hook(list(pair.other.parameters()), note)


def hang_on_middle(pair: Pair, note: Callable[..., None]) -> None:
    pair.middle.register_hook(note)


HANGS = (hang_on_node, hang_before_node, hang_on_accumulation, hang_on_several, hang_on_middle)


@pytest.mark.parametrize("when", ["before backward", "after backward"])
@pytest.mark.parametrize("hang", HANGS)
def test_hooks_are_called_as_often_as_without(
    host: Host, hang: Callable[[Pair, Callable[..., None]], None], when: str
) -> None:
    def train() -> tuple[list[Any], bool]:
        pair = Pair("layer norm", is_eval=False)
        calls: list[Any] = [0]

        def note(*args: Any) -> None:
            calls[0] += 1

        if when == "after backward":
            calls += pair.train(lambda pair: hang(pair, note))
            return calls, False
        pair.train(lambda pair: None)
        for _ in range(3):
            pair.other.zero_grad()
            pair.loss = pair.pass_forward()
            if not calls[0]:
                hang(pair, note)
            pair.loss.backward()
        return calls, False

    compare(host, train)


def test_anomalies_are_found_in_the_call(host: Host) -> None:
    class Rooted(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.shift = nn.Parameter(torch.ones(1))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x + 0 * (self.shift - self.shift.detach()).sqrt()  # type: ignore[no-any-return]

    def train() -> tuple[list[Any], bool]:
        pair, said = Pair("layer norm", is_eval=False), []
        pair.other[1] = Rooted()
        pair.train(lambda pair: None)
        with torch.autograd.detect_anomaly(check_nan=True):
            loss = pair.pass_forward()
            try:
                loss.backward()
            except RuntimeError as error:
                said.append(str(error))
        return said, False

    with pytest.warns(UserWarning, match="Anomaly"):
        compare(host, train)


def test_only_what_others_could_write_is_copied() -> None:
    from flatout.knobs.gradients import kept

    x = torch.randn(64, 64)
    weight, other = (torch.randn(64, 64, requires_grad=True) for _ in range(2))
    held = (x @ weight).relu()
    loss = (held.exp().tanh() @ other).sum()
    nodes, left = [], [loss.grad_fn]
    while left:
        node = left.pop()
        nodes.append(node)
        left += [following for following, _ in node.next_functions if following]  # type: ignore[union-attr]
    before = {
        value.data_ptr()
        for node in nodes
        for _, value in kept._saved(node)
        if value.data_ptr() not in (x.data_ptr(), other.data_ptr(), held.data_ptr())
    }
    del node, left
    saved = kept.SavedTensors()
    saved.take(nodes, ())
    after = {tensor.data_ptr() for tensor in saved._tensors}
    assert len(before) == 2
    assert before < after
    assert after.isdisjoint({x.data_ptr(), other.data_ptr(), held.data_ptr()})


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int64, torch.bool])
def test_a_copy_begins_where_its_original_does(dtype: torch.dtype) -> None:
    from flatout.knobs.gradients.kept import copy_where_shared

    memory = torch.randint(2, (4, 6, 8)).to(dtype)
    views = [
        *(memory, memory[1], memory[:, 1:3, 5], memory.mT, memory[0, 0, 3], memory[:0]),
        *(memory[:1, :, 3:4].expand(4, 6, 8), memory[..., ::3], memory.unfold(2, 3, 1)),
    ]
    copies = [view.detach() for view in views]
    copy_where_shared(copies)
    expected = [view.clone() for view in views]
    memory.zero_()
    for found, view, then in zip(copies, views, expected, strict=True):
        assert torch.equal(found, then)
        assert found.stride() == view.stride()
        assert not then.numel() or (found.data_ptr() - view.data_ptr()) % 64 == 0
