"""``loader=batched`` on datasets that programs write: the batches are those that torch collates."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils.data import ConcatDataset, DataLoader, Dataset, Subset, TensorDataset

from flatout import knobs
from flatout.intercept import handled_calls
from flatout.intercept.host import Host
from flatout.knobs import loader as knob
from flatout.knobs.loader import recipe
from flatout.knobs.loader.batched import CHECKED_BATCHES, can_be_batched
from flatout.knobs.loader.recipe import Group, Number, Row

ROWS = 50


class Kept(Dataset[Any]):
    """Arrays of every kind."""

    def __init__(self) -> None:
        generator = torch.Generator().manual_seed(0)
        self.x = torch.randn(ROWS, 3, 5, generator=generator)
        self.half = torch.randn(ROWS, 4, generator=generator).bfloat16()
        self.y = torch.randint(10, (ROWS,), generator=generator)
        numbers = np.random.default_rng(0)
        self.a = numbers.standard_normal((ROWS, 7))
        self.columns = np.asfortranarray(numbers.standard_normal((ROWS, 7), dtype=np.float32))
        self.scalars = {
            name: (100 * numbers.standard_normal(ROWS)).astype(name)
            for name in ("float64", "float32", "int64", "int32", "int16", "int8", "uint8", "bool")
        }
        self.doubles, self.singles = self.scalars["float64"], self.scalars["float32"]
        self.counts, self.bytes = self.scalars["int64"], self.scalars["uint8"]
        self.shorts, self.bits = self.scalars["int16"], self.scalars["bool"]
        self.names = [f"sample {number}" for number in range(ROWS)]
        self.labels = list(range(ROWS))
        self.prices = [0.1 * number for number in range(ROWS)]
        self.ragged = [torch.full((3,), float(number)) for number in range(ROWS)]
        self.length, self.horizon = 4, 2
        self.transform = None
        self.augments = False

    def __len__(self) -> int:
        return ROWS - 8


class Tensors(Kept):
    def __getitem__(self, index: int) -> Any:
        return self.x[index], self.half[index], self.y[index]


class Arrays(Kept):
    def __getitem__(self, i: int) -> Any:
        return [self.a[i], self.columns[i]]


class Scalars(Kept):
    def __getitem__(self, i: int) -> Any:
        return (
            (self.doubles[i], self.singles[i], self.counts[i]),
            (self.bytes[i], self.shorts[i], self.bits[i]),
        )


class Lists(Kept):
    def __getitem__(self, i: int) -> Any:
        return self.names[i], self.labels[i], self.prices[i], self.ragged[i], i


class Named(Kept):
    def __getitem__(self, i: int) -> Any:
        image = self.x[i]
        label = self.y[i]
        return {"image": image, "label": label, "of": {"name": self.names[i]}}


class Alone(Kept):
    def __getitem__(self, i: int) -> Any:
        return self.a[i]


class Swapped(Kept):
    def __getitem__(self, i: int) -> Any:
        x, y = self.y[i], self.x[i]
        return x, y


class Windows(Kept):
    def __getitem__(self, i: int) -> Any:
        past = self.a[i : i + self.length]
        future = self.columns[i + self.length : i + self.length + self.horizon]
        return past, future, self.y[i + self.length - 1], self.x[i : i + 1]


class Made(Kept):
    def __getitem__(self, i: int) -> Any:
        x = torch.from_numpy(self.a[i]).float()
        y = torch.tensor(self.counts[i], dtype=torch.float32)
        z = torch.as_tensor(self.columns[i], dtype=torch.float64)
        return x, y, z, torch.tensor(self.doubles[i]), self.y[i].float(), self.bytes[i]


class MadeOfLists(Kept):
    def __getitem__(self, i: int) -> Any:
        return torch.tensor(self.labels[i], dtype=torch.long), torch.tensor(self.prices[i])


class Optional(Kept):
    def __getitem__(self, i: Any) -> Any:
        if torch.is_tensor(i):
            i = i.tolist()
        image = self.x[i]
        if self.transform is not None:
            image = self.transform(image)
        if self.augments:
            image = image.flip(0)
        return image, self.y[i]


class ToWhole(Kept):
    """A float64 that is no number becomes some integer or other."""

    def __getitem__(self, i: int) -> Any:
        return torch.from_numpy(self.a[i]).long(), self.y[i]


class Computes(Kept):
    def __getitem__(self, i: int) -> Any:
        return 2 * self.x[i], self.y[i]


class Draws(Kept):
    def __getitem__(self, i: int) -> Any:
        return self.x[i], torch.randn(3)


class Loops(Kept):
    def __getitem__(self, i: int) -> Any:
        return [self.x[i] for _ in range(2)]


class Wraps(Kept):
    """Rows of something that may do anything."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = Draws()

    def __getitem__(self, i: int) -> Any:
        return self.inner[i], self.y[i]


class Property(Kept):
    taken = 0

    @property
    def x(self) -> torch.Tensor:
        Property.taken += 1
        return self.__dict__["x"]

    @x.setter
    def x(self, value: torch.Tensor) -> None:
        self.__dict__["x"] = value

    def __getitem__(self, i: int) -> Any:
        return self.x[i], self.y[i]


class Warns(Kept):
    """Torch warns of such calls, so it has to make each of them."""

    def __getitem__(self, i: int) -> Any:
        return torch.tensor(self.x[i]), self.y[i]


class Guarded(Kept):
    def __getattribute__(self, name: str) -> Any:
        return object.__getattribute__(self, name)

    def __getitem__(self, i: int) -> Any:
        return self.x[i], self.y[i]


BATCHED = (
    *(Tensors, Arrays, Scalars, Lists, Named, Alone, Swapped, Windows, Made, MadeOfLists),
    Optional,
)
FOR_TORCH = (Computes, Draws, Loops, Wraps, Property, Guarded)


def loader_of(dataset: Dataset[Any], batch_size: int = 8) -> DataLoader[Any]:
    return DataLoader(dataset, batch_size=batch_size, shuffle=True)


def take(dataset: Dataset[Any], epochs: int = 2) -> list[Any]:
    torch.manual_seed(5)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        found = [batch for _ in range(epochs) for batch in loader_of(dataset)]
    return [*found, [str(one.message) for one in said]]


def leaves(value: Any) -> Any:
    """What tells two batches apart: types, keys, data types, strides and bytes."""
    if isinstance(value, torch.Tensor):
        data = value.contiguous().view(-1).view(torch.uint8).tolist()
        return value.dtype, value.shape, value.stride(), data
    if isinstance(value, dict):
        return [(key, leaves(one)) for key, one in value.items()]
    if isinstance(value, (list, tuple)):
        return type(value), [leaves(one) for one in value]
    return type(value), value


@pytest.fixture
def host(tmp_path: Any) -> Host:
    from tests.hosts import host_in

    return host_in(tmp_path)


@pytest.mark.parametrize("kind", [*BATCHED, *FOR_TORCH, ToWhole, Warns])
def test_batches_are_those_that_torch_collates(host: Host, kind: type[Kept]) -> None:
    bare = take(kind())
    undo = knobs.get("loader").apply(host, "batched")
    before = handled_calls.counts["loader"]
    found = take(kind())
    handled = handled_calls.counts["loader"] - before
    undo()
    assert leaves(found) == leaves(bare)
    assert not host.applied.failures
    if kind in BATCHED:
        assert handled == len(bare) - 1
    if kind in FOR_TORCH:
        assert handled == 0


@pytest.mark.parametrize("kind", BATCHED)
def test_samples_are_no_longer_fetched_one_by_one(
    host: Host, kind: type[Kept], monkeypatch: pytest.MonkeyPatch
) -> None:
    dataset, calls = kind(), [0]
    monkeypatch.setattr(kind, "__len__", lambda _: 40)
    undo = knobs.get("loader").apply(host, "batched")
    list(loader_of(dataset))
    code = kind.__getitem__.__code__

    def count(frame: Any, event: str, _: Any) -> None:
        calls[0] += event == "call" and frame.f_code is code

    sys.setprofile(count)
    try:
        assert len(list(loader_of(dataset))) == 5
    finally:
        sys.setprofile(None)
    undo()
    assert CHECKED_BATCHES < 5
    assert calls == [0]


def test_parts_of_datasets(host: Host) -> None:
    def parts() -> Dataset[Any]:
        first, second = Tensors(), Tensors()
        second.x = second.x + 1
        return Subset(
            ConcatDataset([first, Subset(second, list(range(30, 5, -1))), Tensors()]),
            list(range(0, 100, 3)),
        )

    bare = take(parts())
    undo = knobs.get("loader").apply(host, "batched")
    before = handled_calls.counts["loader"]
    assert leaves(take(parts())) == leaves(bare)
    undo()
    assert handled_calls.counts["loader"] - before == len(bare) - 1


def test_parts_that_do_not_go_together_are_torchs(host: Host) -> None:
    """Torch stacks float32 and float64 to float64."""
    whole = TensorDataset(torch.arange(8.0))

    def parts() -> Dataset[Any]:
        return ConcatDataset([whole, TensorDataset(torch.arange(8.0, dtype=torch.float64))])

    try:
        bare: Any = leaves(take(parts()))
    except RuntimeError as error:
        bare = str(error)
    undo = knobs.get("loader").apply(host, "batched")
    try:
        found: Any = leaves(take(parts()))
    except RuntimeError as error:
        found = str(error)
    undo()
    assert found == bare


def change_data(dataset: Any) -> None:
    dataset.x = dataset.x * 2


def change_in_place(dataset: Any) -> None:
    dataset.y += 1


def transform(dataset: Any) -> None:
    dataset.transform = lambda image: image + 1


def augment(dataset: Any) -> None:
    dataset.augments = True


def to_arrays(dataset: Any) -> None:
    dataset.x = dataset.x.numpy()


def to_lists(dataset: Any) -> None:
    dataset.y = dataset.y.tolist()


def other_method(dataset: Any) -> None:
    type(dataset).__getitem__ = lambda self, i: (self.y[i], -self.x[i])


@pytest.mark.parametrize(
    "change",
    [change_data, change_in_place, transform, augment, to_arrays, to_lists, other_method],
)
def test_what_a_program_changes_between_batches_counts(
    host: Host, change: Callable[[Any], None]
) -> None:
    def run() -> list[Any]:
        class Own(Optional):
            pass

        Own.__getitem__ = Optional.__getitem__  # type: ignore[method-assign]
        dataset = Own()
        found = take(dataset)
        change(dataset)
        return [*found, *take(dataset)]

    bare = run()
    undo = knobs.get("loader").apply(host, "batched")
    assert leaves(run()) == leaves(bare)
    undo()
    assert not host.applied.failures


@pytest.mark.parametrize("kind", [Tensors, Windows, Lists])
def test_a_row_that_is_not_there_is_the_programs_error(host: Host, kind: type[Kept]) -> None:
    def fetch(indices: list[int]) -> Any:
        try:
            return leaves(next(iter(DataLoader(kind(), batch_size=9, sampler=indices))))
        except (IndexError, RuntimeError) as error:
            return type(error), str(error)

    wanted = [[1, 2, ROWS], [1, -2, 3], [ROWS - 3, 1]]
    bare = [fetch(indices) for indices in wanted]
    undo = knobs.get("loader").apply(host, "batched")
    assert [fetch(indices) for indices in wanted] == bare
    undo()
    assert not host.applied.failures


def test_a_read_only_array_is_torchs(host: Host) -> None:
    """Torch warns of tensors that share read-only memory."""

    def dataset() -> Alone:
        made = Alone()
        made.a.flags.writeable = False
        return made

    *bare, _ = take(dataset())
    undo = knobs.get("loader").apply(host, "batched")
    before = handled_calls.counts["loader"]
    *found, _ = take(dataset())
    undo()
    assert leaves(found) == leaves(bare)
    assert handled_calls.counts["loader"] == before


def test_recipes() -> None:
    known = recipe.read(Windows())
    assert known is not None
    assert known.sample == Group(
        tuple,
        (
            Row("a", Number(1), Number(1, plus=("length",))),
            Row("columns", Number(1, plus=("length",)), Number(1, plus=("length", "horizon"))),
            Row("y", Number(1, -1, plus=("length",))),
            Row("x", Number(1), Number(1, 1)),
        ),
    )
    assert known.numbers == {"length", "horizon"}
    assert all(recipe.read(kind()) is not None for kind in BATCHED)
    assert all(recipe.read(kind()) is None for kind in FOR_TORCH if kind is not Wraps)


@pytest.mark.parametrize("kind", BATCHED)
def test_the_setting_is_offered_where_it_can_hold(kind: type[Kept]) -> None:
    assert "batched" in knob.possible(vars(DataLoader(kind())))
    assert can_be_batched(kind(), DataLoader(kind()).collate_fn)


@pytest.mark.parametrize("kind", FOR_TORCH)
def test_the_setting_is_not_offered_where_it_cannot_hold(kind: type[Kept]) -> None:
    assert not can_be_batched(kind(), DataLoader(kind()).collate_fn)
