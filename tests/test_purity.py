"""Whether a sample is a function of its index and of data, as the code of its dataset tells."""

from __future__ import annotations

import collections
import enum
import functools
import itertools
import random
import sqlite3
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from torch.utils.data import Dataset, Subset, TensorDataset, default_collate, get_worker_info

from flatout.intercept.purity import ImpureError, examine

SIZE = 40


class Filter(enum.IntEnum):
    NEAREST = 0
    LINEAR = 2


class Counted(enum.Enum):
    ONE = 1

    @property
    def value(self) -> int:
        SEEN.append(1)
        return 1


class Pair(NamedTuple):
    left: Any
    right: Any


class Settings:
    size = 3

    def __init__(self, factor: float) -> None:
        self.factor = factor


class Scale:
    def __init__(self, factor: float) -> None:
        self.factor = factor

    def __call__(self, value: Any) -> Any:
        return value * self.factor

    def __repr__(self) -> str:
        return f"{self.__class__.__name__}({self.factor})"


class Chain:
    def __init__(self, *steps: Callable[[Any], Any]) -> None:
        self.steps = list(steps)

    def __call__(self, value: Any) -> Any:
        for step in self.steps:
            value = step(value)
        return value


class Counting(Scale):
    calls = 0

    def __call__(self, value: Any) -> Any:
        type(self).calls = self.calls + 1
        return value


class Spelled(Scale):
    def __str__(self) -> str:
        self.factor = self.factor + 1
        return "spelled"


class Touchy:
    @property
    def shape(self) -> int:
        SEEN.append(1)
        return 3


SEEN: list[int] = []
TABLE = torch.arange(12.0)
counter = itertools.count()


def doubled(value: Any) -> Any:
    return value * 2


def noted(value: Any) -> Any:
    SEEN.append(1)
    return value


class Data(Dataset[Any]):
    """Has of everything something."""

    def __init__(self) -> None:
        self.x = torch.arange(SIZE * 3.0).view(SIZE, 3)
        self.y = torch.zeros(SIZE, dtype=torch.long)
        self.array = np.arange(SIZE * 2.0).reshape(SIZE, 2)
        self.items = [(f"{number}.jpg", number) for number in range(SIZE)]
        self.by_number = {number: number * 2 for number in range(SIZE)}
        self.order = list(range(SIZE))
        self.epoch = 0
        self.settings = Settings(2.0)
        self.transform: Any = None
        self.noise = torch.zeros(3)
        self.log: list[int] = []
        self.buffer = torch.zeros(3)
        self.local = threading.local()
        self.lock = threading.Lock()
        self.generator = torch.Generator()
        self.random = random.Random(0)
        self.connection = sqlite3.connect(":memory:")
        self.net = torch.nn.Linear(3, 1)
        self.touchy = Touchy()
        self.queue: collections.deque[int] = collections.deque(range(SIZE))
        self.weight = torch.ones(3, requires_grad=True)

    def __len__(self) -> int:
        return SIZE

    def row(self, number: int) -> Any:
        return self.x[number]

    @property
    def shift(self) -> int:
        return self.epoch + 1

    @staticmethod
    def halved(value: Any) -> Any:
        return value / 2


def dataset_of(get: Callable[[Any, int], Any], **attributes: Any) -> Any:
    made = type("Made", (Data,), {"__getitem__": get})()
    vars(made).update(attributes)
    return made


def with_default(self: Any, i: int, factor: float = 2.0) -> Any:
    return self.x[i] * factor


def with_comprehension(self: Any, i: int) -> Any:
    return {name: [self.x[i] + k for k in range(3)] for name in ("a", "b")}


def with_branch(self: Any, i: int) -> Any:
    try:
        name, number = self.items[i]
    except IndexError:
        raise KeyError(i) from None
    value = torch.full((3,), float(number))
    if self.transform is not None:
        value = self.transform(value)
    return value, len(self.items), name.upper()


def with_generator_of_its_own(self: Any, i: int) -> Any:
    return torch.randn(3, generator=torch.Generator().manual_seed(i))


PURE: dict[str, Any] = {
    "rows": dataset_of(lambda self, i: (self.x[i], self.y[i], self.array[i], i)),
    "of a list, a dict, a global": dataset_of(
        lambda self, i: (self.items[i], self.by_number[i], TABLE[i % 12])
    ),
    "a default": dataset_of(with_default),
    "a comprehension": dataset_of(with_comprehension),
    "branches": dataset_of(with_branch, transform=Scale(2)),
    "steps": dataset_of(with_branch, transform=Chain(Scale(2), doubled, lambda v: v + 1)),
    "partial": dataset_of(with_branch, transform=functools.partial(doubled)),
    "methods": dataset_of(lambda self, i: self.halved(self.row(i)) + self.shift),
    "attributes": dataset_of(lambda self, i: self.x[i] * self.settings.factor + self.settings.size),
    "a named tuple": dataset_of(lambda self, i: Pair(self.x[i], self.array[i].astype(np.float32))),
    "in another order": dataset_of(lambda self, i: self.x[self.order[i]].clone() + self.noise),
    "a member of an enumeration": dataset_of(
        lambda self, i: self.x[i] * Filter.LINEAR + Filter.NEAREST.value
    ),
    "bytes of its own": dataset_of(
        lambda self, i: torch.frombuffer(bytearray(self.array[i].tobytes()), dtype=torch.uint8)
    ),
    "a subset": Subset(dataset_of(lambda self, i: self.x[i]), list(range(3, SIZE))),
    "tensors": TensorDataset(torch.arange(SIZE * 1.0), torch.zeros(SIZE)),
}


@pytest.mark.parametrize("kind", PURE)
def test_functions_of_index_and_data(kind: str) -> None:
    account = examine(PURE[kind], default_collate)
    assert not account.draws
    assert not account.opens
    assert account.digest([3, 4]) == examine(PURE[kind], default_collate).digest([3, 4])
    assert account.digest([3, 4]) != account.digest([4, 3])


def sets_a_local_of_another(self: Any, i: int) -> Any:
    count = 0

    def inside() -> int:
        nonlocal count
        count += 1
        return count

    return inside()


def sets_a_global(self: Any, i: int) -> Any:
    global TABLE
    TABLE = self.x
    return i


def counts_visits(self: Any, i: int) -> Any:
    self.log[0] += 1
    return i


def changes_in_place(self: Any, i: int) -> Any:
    value = self.x[i]
    value += 1
    return value


def deletes(self: Any, i: int) -> Any:
    del self.log[0]
    return i


def imports(self: Any, i: int) -> Any:
    import os

    return os.getpid()


def sets_epoch(self: Any, i: int) -> Any:
    self.epoch = i
    return i


def locks(self: Any, i: int) -> Any:
    with self.lock:
        return self.x[i]


def calls_super(self: Any, i: int) -> Any:
    return super(Data, self).__getitem__(i)


IMPURE: dict[str, Callable[[Any, int], Any]] = {
    "sets an attribute": sets_epoch,
    "sets one by another way": lambda self, i: object.__setattr__(self, "epoch", i),
    "sets one by setattr": lambda self, i: setattr(self, "epoch", i),
    "sets a global": sets_a_global,
    "sets a variable of another function": sets_a_local_of_another,
    "counts": counts_visits,
    "changes in place": changes_in_place,
    "changes by a method": lambda self, i: self.x[i].mul_(2),
    "appends": lambda self, i: self.log.append(i),
    "takes from a queue": lambda self, i: self.queue.popleft(),
    "deletes": deletes,
    "writes into a buffer": lambda self, i: torch.add(self.x[i], 1, out=self.buffer),
    "counts by an iterator": lambda self, i: next(counter),
    "asks for an attribute by name": lambda self, i: getattr(self, "epoch"),  # noqa: B009
    "asks for its dict": lambda self, i: self.__dict__["epoch"],
    "imports": imports,
    "prints": lambda self, i: print(i),
    "asks for the time": lambda self, i: time.time(),
    "draws from a generator that lasts": lambda self, i: torch.rand(3, generator=self.generator),
    "draws from Python's": lambda self, i: self.random.random(),
    "asks a thread's own": lambda self, i: self.local.value,
    "locks": locks,
    "asks a database": lambda self, i: self.connection.execute("select 1").fetchone(),
    "asks the model": lambda self, i: self.net(self.x[i]),
    "trained data": lambda self, i: self.x[i] * self.weight,
    "multiplies matrices": lambda self, i: self.x[i] @ self.noise,
    "calls super": calls_super,
    "a property that does more": lambda self, i: self.touchy.shape,
    "evaluates": lambda self, i: eval("self.x[i]"),
    "an enumeration that does more": lambda self, i: Counted.ONE.value,
    "a member that is not there": lambda self, i: Filter.CUBIC,  # type: ignore[attr-defined]
    "opens a file": lambda self, i: open("x").read(),  # noqa: SIM115
    "calls a function that writes": lambda self, i: noted(self.x[i]),
}


@pytest.mark.parametrize("kind", IMPURE)
def test_what_does_more(kind: str) -> None:
    with pytest.raises(ImpureError):
        examine(dataset_of(IMPURE[kind]), default_collate)


@pytest.mark.parametrize(
    "transform",
    [noted, Counting(1), Chain(Scale(2), noted), functools.partial(noted), SEEN.append, print],
)
def test_a_transform_that_does_more(transform: Any) -> None:
    with pytest.raises(ImpureError):
        examine(dataset_of(with_branch, transform=transform), default_collate)


def test_what_an_object_does_when_it_is_printed() -> None:
    with pytest.raises(ImpureError):
        examine(
            dataset_of(lambda self, i: f"{self.transform}", transform=Spelled(1)), default_collate
        )


class Many(Data):
    def __getitem__(self, i: int) -> Any:
        return self.x[i]

    def __getitems__(self, indices: list[int]) -> Any:
        return self.x[indices]


class Hooked(Data):
    def __getattr__(self, name: str) -> Any:
        SEEN.append(1)
        raise AttributeError(name)

    def __getitem__(self, i: int) -> Any:
        return self.x[i]


class Tensors(TensorDataset):
    def __getitem__(self, i: int) -> Any:
        SEEN.append(i)
        return super().__getitem__(i)


@pytest.mark.parametrize("dataset", [Many(), Hooked(), Tensors(TABLE), Subset(Many(), [1, 2])])
def test_datasets_that_are_asked_in_another_way(dataset: Any) -> None:
    with pytest.raises(ImpureError):
        examine(dataset, default_collate)


def test_a_collate_function_of_the_program() -> None:
    with pytest.raises(ImpureError, match="collate_fn"):
        examine(PURE["rows"], lambda samples: samples)


def test_random_numbers_and_files_are_said(tmp_path: Path) -> None:
    from PIL import Image

    drawing = [
        lambda self, i: self.x[i] + torch.randn(3),
        lambda self, i: self.x[i] + np.random.rand(),
        lambda self, i: self.x[i] if random.random() < 0.5 else -self.x[i],
        with_generator_of_its_own,
    ]
    for get in drawing:
        assert examine(dataset_of(get), default_collate).draws
    files = dataset_of(lambda self, i: np.asarray(Image.open(self.items[i][0]).convert("RGB")))
    assert examine(files, default_collate).opens
    paths = dataset_of(lambda self, i: len(self.folder.joinpath("x").read_bytes()), folder=tmp_path)
    assert examine(paths, default_collate).opens


def test_a_function_of_the_program_in_the_place_of_torchs(monkeypatch: pytest.MonkeyPatch) -> None:
    dataset = dataset_of(lambda self, i: torch.stack([self.x[i]]))
    examine(dataset, default_collate)
    monkeypatch.setattr(torch, "stack", lambda tensors: noted(tensors[0]))
    with pytest.raises(ImpureError):
        examine(dataset, default_collate)


def set_code(dataset: Any) -> None:
    type(dataset).__getitem__ = lambda self, i: self.x[i] + 1


CHANGES: dict[str, Callable[[Any], Any]] = {
    "a row": lambda d: d.x[3].add_(1),
    "a row by .data": lambda d: d.x.data[3].zero_(),
    "a row by numpy": lambda d: d.x.numpy().__setitem__(3, 7.0),
    "a label": lambda d: d.y.__setitem__(3, 1),
    "an array": lambda d: d.array.__setitem__(3, 7.0),
    "a list": lambda d: d.items.__setitem__(3, ("other", 3)),
    "a dict": lambda d: d.by_number.__setitem__(3, 7),
    "a number": lambda d: setattr(d, "epoch", 1),
    "an attribute of an attribute": lambda d: setattr(d.settings, "factor", 3.0),
    "the tensor": lambda d: setattr(d, "x", d.x + 1),
    "its dtype": lambda d: setattr(d, "x", d.x.double()),
    "the transform": lambda d: setattr(d, "transform", Scale(3)),
    "a step of the transform": lambda d: d.transform.steps.append(Scale(1)),
    "a number of a step": lambda d: setattr(d.transform.steps[0], "factor", 5),
    "what is read whole": lambda d: d.noise.data.fill_(1),
    "the class of the settings": lambda d: setattr(d.settings, "size", 4),
    "the code": set_code,
}


def of_everything(self: Any, i: int) -> Any:
    value = self.x[i] * self.settings.factor + self.shift + self.noise + self.settings.size
    return self.transform(value), self.y[i], self.array[i], self.items[i], self.by_number[i]


@pytest.mark.parametrize("kind", CHANGES)
def test_any_change_shows_at_the_sample_that_it_changes(kind: str) -> None:
    dataset = dataset_of(of_everything, transform=Chain(Scale(2.0)))
    before = examine(dataset, default_collate).digest([2, 3])
    CHANGES[kind](dataset)
    assert examine(dataset, default_collate).digest([2, 3]) != before


@pytest.mark.parametrize(
    "world",
    [
        torch.no_grad,
        torch.inference_mode,
        functools.partial(torch.autocast, "cpu", dtype=torch.bfloat16),
        functools.partial(np.errstate, divide="raise"),
    ],
)
def test_the_world_counts(world: Callable[[], Any]) -> None:
    before = examine(PURE["rows"], default_collate).digest([1])
    with world():
        assert examine(PURE["rows"], default_collate).digest([1]) != before
    assert examine(PURE["rows"], default_collate).digest([1]) == before


def test_a_default_device_is_a_mode_and_left_alone() -> None:
    with torch.device("meta"), pytest.raises(ImpureError, match="mode"):
        examine(PURE["rows"], default_collate)


def test_what_lies_elsewhere_does_not_count() -> None:
    dataset = dataset_of(lambda self, i: self.x[i])
    before = examine(dataset, default_collate).digest([3])
    dataset.x[4] += 1
    dataset.log.append(1)
    dataset.items.clear()
    assert examine(dataset, default_collate).digest([3]) == before


def test_too_much_to_compare() -> None:
    large = torch.zeros(1 << 19)
    rows = dataset_of(lambda self, i: self.large[i], large=large)
    examine(rows, default_collate).digest([5])
    for get in (lambda self, i: self.large[i + 1], lambda self, i: self.many[i // 2]):
        with pytest.raises(ImpureError, match="to compare"):
            examine(
                dataset_of(get, large=large, many=[(i, i) for i in range(9999)]), default_collate
            )


def test_a_list_with_functions_or_objects_in_it() -> None:
    for entries in ([noted] * SIZE, [Scale(1)] * SIZE, [Touchy()] * SIZE):
        account = examine(
            dataset_of(lambda self, i: self.entries[i], entries=entries), default_collate
        )
        with pytest.raises(ImpureError):
            account.digest([3])


def test_an_index_that_is_not_there() -> None:
    with pytest.raises(ImpureError, match="no data"):
        examine(PURE["rows"], default_collate).digest([SIZE])


def test_it_is_asked_in_a_process_of_its_own() -> None:
    """What is not there in the program is not there in its forks either."""
    assert examine(dataset_of(lambda self, i: get_worker_info()), default_collate)
