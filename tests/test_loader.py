"""The knob ``loader``: the same batches in the same order, from elsewhere."""

from __future__ import annotations

import contextlib
import gc
import math
import os
import random
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from torch.utils.data import (
    DataLoader,
    Dataset,
    IterableDataset,
    Sampler,
    Subset,
    TensorDataset,
    WeightedRandomSampler,
)
from torch.utils.data._utils.fetch import _MapDatasetFetcher

from flatout import knobs
from flatout.intercept.host import Host
from flatout.knob import Facts
from flatout.knobs import loader as knob
from flatout.knobs.loader import ahead as fetching
from flatout.knobs.loader import cache as caching
from flatout.knobs.loader import processes
from flatout.knobs.loader.ahead import Ahead
from flatout.knobs.loader.cache import SampleCache
from tests.hosts import host_in

Said = list[tuple[str, str]]


class Point(NamedTuple):
    place: torch.Tensor
    name: str


class Samples(Dataset[Any]):
    """Samples made by a function of the index."""

    def __init__(self, make: Callable[[int], Any], size: int = 96) -> None:
        self.make = make
        self.size = size

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, index: int) -> Any:
        return self.make(index)


def plain(index: int) -> Any:
    return torch.full((3,), float(index)), index


def batches(loader: DataLoader[Any], epochs: int = 3) -> list[Any]:
    return [batch for _ in range(epochs) for batch in loader]


def raising(error: Exception) -> None:
    raise error


@pytest.fixture
def said() -> Said:
    return []


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Indices that the cache has asked datasets for."""
    found: list[int] = []
    own = SampleCache._keep

    def keep(cache: Any, store: Any, index: int, digest: bytes, sample: Any) -> None:
        found.append(index)
        own(cache, store, index, digest, sample)

    monkeypatch.setattr(SampleCache, "_keep", keep)
    return found


@pytest.fixture
def cache(said: Said) -> Iterator[SampleCache]:
    made = SampleCache(lambda *words: said.append(words), raising, 1 << 20)
    undo = made.install()
    yield made
    undo()


@pytest.fixture
def host(tmp_path: Path) -> Host:
    return host_in(tmp_path)


def ahead(said: Said, *, count: int = 2, may_draw: bool = True) -> Ahead:
    return Ahead(count, lambda *words: said.append(words), raising, may_draw=may_draw)


def loader_of(dataset: Any, **options: Any) -> DataLoader[Any]:
    torch.manual_seed(0)
    return DataLoader(dataset, batch_size=10, shuffle=True, **options)


def equal(one: Any, other: Any) -> bool:
    return len(one) == len(other) and all(map(same, one, other))


def same(one: Any, other: Any) -> bool:
    """Whether two batches are equal to the last bit, in memory of the same layout."""
    if type(one) is not type(other):
        return False
    if isinstance(one, torch.Tensor):
        return (
            (one.dtype, one.shape, one.stride()) == (other.dtype, other.shape, other.stride())
            and one.is_shared() == other.is_shared()
            and torch.equal(one.nan_to_num(7.5), other.nan_to_num(7.5))
        )
    if isinstance(one, dict):
        return list(one) == list(other) and all(same(one[key], other[key]) for key in one)
    if isinstance(one, (list, tuple)):
        return equal(one, other)
    return bool(one == other)


KINDS: dict[str, Callable[[int], Any]] = {
    "tensors and numbers": plain,
    "dicts": lambda i: {"x": np.arange(3) + i, "y": np.float32(i), "text": str(i)},
    "named tuples": lambda i: Point(torch.full((2, 2), i), "p"),
    "not a number": lambda i: (torch.tensor([math.nan, i]), math.nan),
    "half precision": lambda i: torch.full((3,), i).bfloat16(),
    "transposed": lambda i: torch.arange(6).view(2, 3).T + i,
    "channels last": lambda i: (torch.arange(24.0).view(2, 3, 4) + i).permute(2, 0, 1),
    "nothing in them": lambda i: (torch.zeros(0), torch.tensor(i)),
    "sets": lambda i: [frozenset(()) if i < 0 else i, bytes(i)],
}


@pytest.mark.parametrize("kind", KINDS)
def test_the_same_batches_from_memory(said: Said, asked: list[int], kind: str) -> None:
    bare = batches(loader_of(Samples(KINDS[kind])), 3)
    state = torch.get_rng_state()
    undo = SampleCache(lambda *words: said.append(words), raising, 1 << 20).install()
    cached = batches(loader_of(Samples(KINDS[kind])), 3)
    undo()
    assert equal(cached, bare)
    assert torch.equal(torch.get_rng_state(), state)
    assert said == [("noticed", "samples of Samples are kept in memory")]
    assert sorted(asked) == list(range(96))


@pytest.mark.parametrize("kind", KINDS)
def test_the_same_batches_from_processes(said: Said, kind: str) -> None:
    bare = batches(loader_of(Samples(KINDS[kind])), 2)
    state = torch.get_rng_state()
    undo = ahead(said).install()
    found = batches(loader_of(Samples(KINDS[kind])), 2)
    undo()
    assert equal(found, bare)
    assert torch.equal(torch.get_rng_state(), state)
    assert said == [("noticed", "batches of Samples are prefetched")]


def test_tensors_that_do_not_fit_into_shared_memory(
    said: Said, monkeypatch: pytest.MonkeyPatch
) -> None:
    bare = batches(loader_of(Samples(KINDS["transposed"])), 1)
    monkeypatch.setattr(processes, "SLOT_BYTES", 1 << 6)
    monkeypatch.setattr(processes.mmap, "mmap", lambda *_: bytearray(1 << 7))
    undo = ahead(said).install()
    assert equal(batches(loader_of(Samples(KINDS["transposed"])), 1), bare)
    undo()


def test_undone_nothing_comes_from_memory(host: Host, asked: list[int]) -> None:
    dataset = Samples(plain)
    undo = knobs.get("loader").apply(host, "cache")
    batches(loader_of(dataset), 3)
    undo()
    batches(loader_of(dataset), 2)
    undo = knobs.get("loader").apply(host, "cache")
    batches(loader_of(dataset), 2)
    undo()
    assert len(asked) == 96  # it goes on from what it knew


def draws_torch(index: int) -> Any:
    return torch.rand(2)


def draws_numpy(index: int) -> Any:
    return np.random.rand(2)


def draws_python(index: int) -> Any:
    return torch.tensor(random.random())


def draws_for_nothing(index: int) -> Any:
    random.random()
    return torch.tensor(index)


RANDOM = (draws_torch, draws_numpy, draws_python, draws_for_nothing)


def seed() -> None:
    np.random.seed(0)
    random.seed(0)


@pytest.mark.parametrize("setting", ["cache", "prefetch"])
@pytest.mark.parametrize("make", RANDOM)
def test_a_dataset_that_draws_random_numbers_is_as_without(
    host: Host, make: Callable[[int], Any], setting: str
) -> None:
    seed()
    bare = batches(loader_of(Samples(make)))
    after = torch.rand(1), np.random.rand(), random.random()
    seed()
    undo = knobs.get("loader").apply(host, setting)
    found = batches(loader_of(Samples(make)))
    undo()
    assert equal(found, bare)
    assert equal((torch.rand(1), np.random.rand(), random.random()), after)


def test_workers_draw_other_random_numbers_from_the_same_seed(said: Said) -> None:
    undo = ahead(said).install()
    one, other = (batches(loader_of(Samples(draws_torch)), 1) for _ in range(2))
    undo()
    assert equal(one, other)
    assert len({float(value) for batch in one for value in batch.flatten()}) == 2 * 96


@pytest.mark.parametrize("late", [*RANDOM, lambda index: torch.tensor([0.5, 0.5])])
@pytest.mark.parametrize("setting", ["cache", "prefetch"])
def test_another_function_in_the_middle_of_an_epoch(
    host: Host, setting: str, late: Callable[[int], Any]
) -> None:
    def run() -> list[Any]:
        seed()
        dataset = Samples(lambda index: torch.full((2,), float(index)))
        loader = loader_of(dataset)
        found = batches(loader, 2)
        for number, batch in enumerate(loader):
            found.append(batch)
            if number == 4:
                dataset.make = late
        return found + batches(loader, 1)

    bare = run()
    undo = knobs.get("loader").apply(host, setting)
    found = run()
    undo()
    assert equal(found, bare)


def test_what_a_loader_has_made_of_samples_is_the_programs_own(cache: SampleCache) -> None:
    loader = loader_of(Samples(lambda i: {"x": torch.full((2,), float(i)), "y": i}))
    for batch in batches(loader, 3):
        assert torch.equal(batch["x"], batch["y"].float()[:, None].expand(-1, 2))
        batch["x"] += 1
        batch["y"] += 1


def test_the_budget_is_kept_and_what_is_over_it_fetched(said: Said, asked: list[int]) -> None:
    dataset = Samples(lambda i: torch.full((250,), float(i)))
    bare = batches(loader_of(dataset), 3)
    cache = SampleCache(lambda *words: said.append(words), raising, 80 * 1256)
    undo = cache.install()
    found = batches(loader_of(dataset), 3)
    (store,) = cache._stores.values()
    undo()
    assert equal(found, bare)
    assert len(store.samples) == 80
    assert len(asked) == 96 + 2 * 16
    assert (
        said.count(("noticed", "the memory for samples is full; not all of Samples are kept")) == 1
    )


def test_memory_is_given_back_with_the_dataset(cache: SampleCache) -> None:
    before = cache._left_bytes
    dataset = Samples(plain)
    batches(loader_of(dataset), 1)
    assert cache._left_bytes < before
    del dataset
    gc.collect()
    assert cache._left_bytes == before
    assert not len(cache._stores)


def test_a_failure_of_ours_is_reported_and_the_batch_is_there(
    host: Host, monkeypatch: pytest.MonkeyPatch
) -> None:
    for setting, module in (("cache", caching), ("prefetch", fetching)):
        undo = knobs.get("loader").apply(host, setting)
        monkeypatch.setattr(module, "examine", None)
        found = batches(loader_of(Samples(plain)), 1)
        undo()
        assert sorted(int(i) for batch in found for i in batch[1]) == list(range(96))
        assert "TypeError" in host.applied.failures.pop("loader")


class Broken(Samples):
    def __getitem__(self, index: int) -> Any:
        if index == 50:
            raise KeyError("fifty")
        return self.make(index)


@pytest.mark.parametrize("setting", ["cache", "prefetch", "workers"])
def test_an_error_of_the_dataset_is_the_programs(host: Host, setting: str) -> None:
    undo = knobs.get("loader").apply(host, setting)
    seen = []
    iterator = iter(DataLoader(Broken(plain), batch_size=10))
    for _ in range(5):
        seen += next(iterator)[1].tolist()
    with pytest.raises(KeyError, match=r"^'fifty'$"):
        next(iterator)
    seen += next(iterator)[1].tolist()
    undo()
    assert seen == [*range(50), *range(60, 70)]
    assert not host.applied.failures


def calm_batches(host: Host, setting: str, epochs: int = 3) -> list[Any]:
    loader = loader_of(Samples(plain))
    if setting:
        undo = knobs.get("loader").apply(host, setting)
    found = []
    for _ in range(epochs):
        for batch in loader:
            found.append((batch, torch.rand(2)))  # the program draws between the batches
    if setting:
        undo()
    return [*found, torch.rand(3)]


@pytest.mark.parametrize("setting", ["batched", "cache", "prefetch", "workers"])
def test_order_and_random_stream_of_a_deterministic_dataset(host: Host, setting: str) -> None:
    bare = calm_batches(host, "")
    assert equal(calm_batches(host, setting), bare)
    assert equal(calm_batches(host, ""), bare)


def test_turned_off_in_the_middle_of_an_epoch(said: Said) -> None:
    bare = batches(loader_of(Samples(plain)), 2)
    loader = loader_of(Samples(plain))
    undo = ahead(said).install()
    iterator = iter(loader)
    found = [next(iterator) for _ in range(4)]
    undo()
    found += [*iterator, *loader]
    assert equal(found, bare)


def test_in_a_forked_child(said: Said) -> None:
    undo = ahead(said).install()
    loader = DataLoader(Samples(plain), batch_size=10)
    iterator = iter(loader)
    found = [next(iterator) for _ in range(3)]
    child = os.fork()
    if child == 0:
        whole = found + list(iterator)
        os._exit(0 if equal(whole, batches(loader, 1)) and len(whole) == 10 else 1)
    assert os.waitpid(child, 0)[1] == 0
    assert len(list(iterator)) == 7
    undo()


def test_a_program_that_waits_for_all_its_children_waits_for_none(said: Said) -> None:
    undo = ahead(said).install()
    iterator = iter(DataLoader(Samples(plain), batch_size=10))
    next(iterator)
    with pytest.raises(ChildProcessError):
        os.wait()
    undo()


def descendants() -> set[int]:
    """Processes that have the same command line as this one."""
    found = set()
    own = Path("/proc/self/cmdline").read_bytes()
    for folder in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            if (folder / "cmdline").read_bytes() == own:
                found.add(int(folder.name))
    return found - {os.getpid()}


def test_a_process_that_is_killed_is_no_matter(said: Said) -> None:
    bare = batches(DataLoader(Samples(plain), batch_size=10), 1)
    before = descendants()
    undo = ahead(said).install()
    iterator = iter(DataLoader(Samples(plain), batch_size=10))
    found = [next(iterator) for _ in range(3)]
    for pid in descendants() - before:
        os.kill(pid, signal.SIGKILL)
    found += list(iterator)
    undo()
    assert equal(found, bare)
    assert said[-1][0] == "skipped"


def test_a_process_that_does_not_answer_is_given_up(
    said: Said, monkeypatch: pytest.MonkeyPatch
) -> None:
    bare = batches(DataLoader(Samples(plain), batch_size=10), 1)
    monkeypatch.setattr(processes, "STALLED_S", 0.0)
    monkeypatch.setattr(processes, "_serve", lambda line, *_: all(iter(line.recv, None)))
    undo = ahead(said).install()
    found = batches(DataLoader(Samples(plain), batch_size=10), 1)
    undo()
    assert equal(found, bare)
    assert said[-1][1].endswith("a process has not answered for 0.0 s")


class Files(Dataset[Any]):
    def __init__(self, folder: Path) -> None:
        self.paths = [folder / f"{number}.txt" for number in range(12)]

    def __len__(self) -> int:
        return 12

    def __getitem__(self, index: int) -> Any:
        return int(self.paths[index].read_text())


@pytest.mark.parametrize("are_settled", [True, False])
def test_files_that_change_in_the_middle_of_an_epoch(
    said: Said, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, are_settled: bool
) -> None:
    monkeypatch.setattr(processes, "SETTLED_S", -1.0 if are_settled else 3600.0)
    dataset = Files(tmp_path)
    for number, path in enumerate(dataset.paths):
        path.write_text(f"{number}")
    undo = ahead(said).install()
    found = []
    for number, batch in enumerate(DataLoader(dataset, batch_size=2)):
        found += batch.tolist()
        if number == 1:
            for path in dataset.paths:
                path.write_text("100")
    undo()
    assert found == [0, 1, 2, 3] + [100] * 8
    assert said == [("noticed", "batches of Files are prefetched")]


class Shifting(Samples):
    shift = 0

    def __getitem__(self, index: int) -> Any:
        return index + self.shift


def test_data_that_change_in_every_step_are_left_alone(said: Said) -> None:
    dataset = Shifting(plain)
    undo = ahead(said).install()
    found = []
    for batch in DataLoader(dataset, batch_size=10):
        found.append(int(batch[0]))
        dataset.shift += 1
    undo()
    assert found == [10 * number + number for number in range(10)]
    assert said[-1] == (
        "skipped",
        "Shifting is not prefetched: its data change again and again while it is read",
    )


class Ordered(Sampler[int]):
    """Takes what the training wants next."""

    def __init__(self) -> None:
        self.following = 0

    def __iter__(self) -> Iterator[int]:
        for _ in range(20):
            yield self.following

    def __len__(self) -> int:
        return 20


def test_a_sampler_that_decides_late_is_asked_late(said: Said) -> None:
    sampler = Ordered()
    loader = DataLoader(Samples(plain), batch_size=2, sampler=sampler)
    undo = ahead(said).install()
    found = []
    for _, index in loader:
        found += index.tolist()
        sampler.following += 1
    undo()
    assert found == [number // 2 for number in range(20)]
    assert [what for what, _ in said] == ["skipped"]


def test_workers_of_the_programs_own_are_left_alone(host: Host) -> None:
    def process(index: int) -> Any:
        return torch.tensor(os.getpid())

    loader = DataLoader(Samples(process), batch_size=48, num_workers=1)
    undo = knobs.get("loader").apply(host, "workers")
    pids = [{int(pid) for batch in batches(loader, 1) for pid in batch} for _ in range(2)]
    undo()
    assert pids[0].isdisjoint(pids[1])


class Stream(IterableDataset[Any]):
    def __iter__(self) -> Iterator[Any]:
        return iter(range(25))


@pytest.mark.parametrize("setting", ["batched", "cache", "prefetch", "workers"])
def test_iterable_datasets_are_left_alone(host: Host, setting: str) -> None:
    undo = knobs.get("loader").apply(host, setting)
    found = batches(DataLoader(Stream(), batch_size=10), 2)
    undo()
    assert torch.cat(found).tolist() == [*range(25), *range(25)]


@pytest.mark.parametrize("setting", ["batched", "cache", "prefetch", "workers"])
def test_a_list_and_a_tensor_dataset(host: Host, setting: str) -> None:
    undo = knobs.get("loader").apply(host, setting)
    for dataset in (list(range(96)), TensorDataset(torch.arange(96))):
        found = batches(DataLoader(dataset, batch_size=10), 3)
        flat = torch.cat([torch.as_tensor(b[0] if isinstance(b, list) else b) for b in found])
        assert flat.tolist() == list(range(96)) * 3
    undo()


def tensors(*, rows: int = 96) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [
        torch.randn(rows, 3, 5, generator=generator),
        torch.randn(rows, 4, generator=generator).bfloat16(),
        torch.randint(10, (rows,), generator=generator),
    ]


class Doubled(TensorDataset):
    """Rows are what its own method makes of them."""

    def __getitem__(self, index: Any) -> Any:
        return tuple(2 * tensor for tensor in super().__getitem__(index))


def of_tensors(kind: str) -> DataLoader[Any]:
    whole = TensorDataset(*tensors())
    part = Subset(whole, list(range(90, 6, -1)))
    datasets = {
        "subset of a subset": Subset(part, list(range(0, 80, 2))),
        "indices from behind": Subset(whole, [-1, -2, -3, 5, 6]),
        "transposed": TensorDataset(torch.arange(192.0).view(2, 96).T),
        "of another class": Doubled(*tensors()),
        "a subset of another class": Chosen(whole, [1, 2]),
        "a subset of one": Subset(Doubled(*tensors()), [1, 2]),
        "of numbers": TensorDataset(torch.arange(6), torch.arange(6.0).requires_grad_()),
    }
    if kind == "weights":
        sampler = WeightedRandomSampler(torch.ones(96), 96)
        return DataLoader(whole, batch_size=10, sampler=sampler)
    if kind == "a collate function":
        return loader_of(whole, collate_fn=lambda rows: [row[2] for row in rows])
    if kind == "single samples":
        return DataLoader(whole, batch_size=None, shuffle=True)
    if kind == "workers":
        return loader_of(whole, num_workers=1)
    return loader_of(datasets.get(kind, whole))


class Chosen(Subset[Any]):
    """A subset that chooses otherwise."""

    def __getitems__(self, indices: list[int]) -> Any:
        return [(torch.full((2,), float(index)),) for index in indices]


BATCHED = ("all of them", "subset of a subset", "weights")
NOT_BATCHED = (
    *("indices from behind", "transposed", "of another class", "a collate function"),
    *("single samples", "workers", "a subset of another class", "a subset of one", "of numbers"),
)


@pytest.mark.parametrize("kind", [*BATCHED, *NOT_BATCHED])
def test_whole_batches_are_those_of_single_samples(
    host: Host, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(3)
    bare = batches(of_tensors(kind), 2)
    if kind in BATCHED:
        monkeypatch.setattr(_MapDatasetFetcher, "fetch", None)  # torch's way is not gone
    undo = knobs.get("loader").apply(host, "batched")
    torch.manual_seed(3)
    assert equal(batches(of_tensors(kind), 2), bare)
    undo()
    assert not host.applied.failures


def test_what_the_program_has_changed_about_samples_counts(
    host: Host, monkeypatch: pytest.MonkeyPatch
) -> None:
    undo = knobs.get("loader").apply(host, "batched")
    rows = TensorDataset.__getitem__
    monkeypatch.setattr(TensorDataset, "__getitem__", lambda s, i: (2 * rows(s, i)[0],))
    (found,) = batches(DataLoader(TensorDataset(torch.arange(3)), batch_size=3), 1)
    undo()
    assert found[0].tolist() == [0, 2, 4]


@pytest.mark.parametrize("kind", ["conjugated", "negated", "a column", "empty rows", "large"])
def test_rows_of_odd_tensors(host: Host, kind: str) -> None:
    torch.manual_seed(4)
    z = torch.randn(8, 3, dtype=torch.complex64)
    tensor = {
        "conjugated": z.conj(),
        "negated": torch._neg_view(torch.randn(8, 3)),
        "a column": torch.arange(8),
        "empty rows": torch.empty(8, 0),
        "large": torch.randn(8, 20_000),
    }[kind]
    loader = DataLoader(TensorDataset(tensor, torch.arange(8)), batch_size=4)
    bare = batches(loader, 1)
    undo = knobs.get("loader").apply(host, "batched")
    assert equal(batches(loader, 1), bare)
    undo()
    assert not host.applied.failures


def test_a_row_that_is_not_there_is_the_programs_error(host: Host) -> None:
    undo = knobs.get("loader").apply(host, "batched")
    with pytest.raises(IndexError):
        batches(DataLoader(TensorDataset(torch.arange(9)), batch_size=4, sampler=[1, 2, 9]))
    undo()
    assert not host.applied.failures


@pytest.mark.parametrize(
    ("loader", "settings"),
    [
        (DataLoader(TensorDataset(*tensors())), ("batched", "cache", "prefetch", "workers")),
        (DataLoader(Samples(plain)), ("cache", "prefetch", "workers")),
        (DataLoader(Samples(draws_torch)), ("workers",)),
        (DataLoader(Samples(plain), sampler=Ordered()), ("cache",)),
        (DataLoader(Samples(plain), collate_fn=len), ()),
        (DataLoader(Samples(print)), ()),
        (DataLoader(Samples(plain), num_workers=1), ()),
        (DataLoader(Stream()), ()),
        (DataLoader([1, 2]), ()),
    ],
)
def test_only_settings_that_can_hold_are_tried(
    loader: DataLoader[Any], settings: tuple[str, ...]
) -> None:
    assert knob.possible(vars(loader)) == settings
    match = knob.match(Facts("cpu", data_share=0.3, loader_settings=settings))
    assert match.settings == settings
    assert settings or match.refusal


def test_how_many_workers() -> None:
    assert [knob.worker_count(cores) for cores in (0.5, 1, 2, 4, 64)] == [1, 1, 1, 3, 8]
