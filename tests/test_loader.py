"""The knob ``loader``: the same batches in the same order, from elsewhere."""

from __future__ import annotations

import dataclasses
import gc
import math
import os
import random
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
    Subset,
    TensorDataset,
    WeightedRandomSampler,
)
from torch.utils.data._utils.fetch import _MapDatasetFetcher

from flatout import knobs
from flatout.agent.session import Session
from flatout.knobs import loader as knob
from flatout.knobs.loader import cache as caching
from flatout.knobs.loader import workers as working
from flatout.knobs.loader.cache import SampleCache
from flatout.request import Request

Said = list[tuple[str, str]]


class Point(NamedTuple):
    place: torch.Tensor
    name: str


class Samples(Dataset[Any]):
    """Samples made by a function of the index; counts how often it was asked."""

    def __init__(self, make: Callable[[int], Any], size: int = 96) -> None:
        self.make = make
        self.size = size
        self.asked = 0

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, index: int) -> Any:
        self.asked += 1
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
def cache(said: Said) -> Iterator[SampleCache]:
    made = SampleCache(lambda *words: said.append(words), raising, 1 << 20)
    undo = made.install()
    yield made
    undo()


@pytest.fixture
def session(tmp_path: Path) -> Session:
    return Session(Request(), tmp_path)


def loader_of(dataset: Any, **options: Any) -> DataLoader[Any]:
    torch.manual_seed(0)
    return DataLoader(dataset, batch_size=10, shuffle=True, **options)


def equal(one: Any, other: Any) -> bool:
    return len(one) == len(other) and all(map(caching.same, one, other))


KINDS: dict[str, Callable[[int], Any]] = {
    "tensors and numbers": plain,
    "dicts": lambda i: {"x": np.arange(3) + i, "y": np.float32(i), "text": str(i)},
    "named tuples": lambda i: Point(torch.full((2, 2), i), "p"),
    "not a number": lambda i: (torch.tensor([math.nan, i]), math.nan),
    "half precision": lambda i: torch.full((3,), i).bfloat16(),
    "transposed": lambda i: torch.arange(6).view(2, 3).T + i,
}


@pytest.mark.parametrize("kind", KINDS)
def test_the_cache_gives_the_same_batches(said: Said, kind: str) -> None:
    bare = batches(loader_of(Samples(KINDS[kind])), 4)
    state = torch.get_rng_state()
    undo = SampleCache(lambda *words: said.append(words), raising, 1 << 20).install()
    dataset = Samples(KINDS[kind])
    cached = batches(loader_of(dataset), 4)
    undo()
    assert equal(cached, bare)
    assert torch.equal(torch.get_rng_state(), state)
    assert said == [("noticed", "samples of Samples come from memory from now on")]
    assert dataset.asked < 96 * 2 + 2 * 10 + 96 / 2


def test_undone_nothing_comes_from_memory(session: Session) -> None:
    dataset = Samples(plain)
    undo = knobs.get("loader").apply(session, "cache")
    batches(loader_of(dataset), 3)
    undo()
    dataset.asked = 0
    batches(loader_of(dataset), 2)
    assert dataset.asked == 2 * 96
    undo = knobs.get("loader").apply(session, "cache")
    batches(loader_of(dataset), 2)
    undo()
    assert dataset.asked == 2 * 96 + 2 * 10  # it goes on from what it knew


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
    session: Session, make: Callable[[int], Any], setting: str
) -> None:
    seed()
    bare = batches(loader_of(Samples(make)))
    after = torch.rand(1), np.random.rand(), random.random()
    seed()
    undo = knobs.get("loader").apply(session, setting)
    dataset = Samples(make)
    found = batches(loader_of(dataset))
    undo()
    assert equal(found, bare)
    assert equal((torch.rand(1), np.random.rand(), random.random()), after)
    assert dataset.asked == 3 * 96


def test_a_generator_of_its_own_is_found_out_in_the_second_epoch(said: Said) -> None:
    def make() -> Samples:
        generator = np.random.default_rng(0)
        return Samples(lambda index: generator.random(2))

    bare = batches(loader_of(make()))
    undo = SampleCache(lambda *words: said.append(words), raising, 1 << 20).install()
    found = batches(loader_of(make()))
    undo()
    assert equal(found, bare)
    why = "the samples of Samples are not kept: the same index gave another sample"
    assert said == [("skipped", why)]


@pytest.mark.parametrize("late", [*RANDOM, lambda index: torch.tensor([0.5, 0.5])])
def test_what_starts_late_is_noticed_before_a_batch_goes_out(
    said: Said, late: Callable[[int], Any]
) -> None:
    def run() -> list[Any]:
        seed()
        dataset = Samples(lambda index: torch.full((2,), float(index)))
        loader = loader_of(dataset)
        found = batches(loader, 3)
        for number, batch in enumerate(loader):
            found.append(batch)
            if number == 4:
                dataset.make = late
        return found + batches(loader, 2)

    bare = run()
    undo = SampleCache(lambda *words: said.append(words), raising, 1 << 20).install()
    found = run()
    undo()
    assert equal(found, bare)
    assert [what for what, _ in said] == ["noticed", "skipped"]
    assert "has begun to return other samples" in said[1][1]


def test_a_collate_function_may_do_with_samples_what_it_likes(cache: SampleCache) -> None:
    def collate(samples: list[Any]) -> Any:
        labels = [sample.pop("y") for sample in samples]
        for sample in samples:
            sample["x"] += 1
        return torch.stack([sample["x"] for sample in samples]), labels

    dataset = Samples(lambda i: {"x": torch.full((2,), float(i)), "y": i})
    loader = loader_of(dataset, collate_fn=collate)
    for x, labels in batches(loader, 5):
        assert torch.equal(x, (torch.tensor(labels) + 1.0)[:, None].expand(-1, 2))
    assert dataset.asked < 96 * 4


def test_without_automatic_batches(cache: SampleCache) -> None:
    dataset = Samples(lambda i: torch.full((2,), float(i)), 70)
    loader = DataLoader(dataset, batch_size=None)
    for _ in range(4):
        for i, sample in enumerate(loader):
            assert torch.equal(sample, torch.full((2,), float(i)))
            sample += 1  # it is the program's own
    assert all((store.samples[3] == 3).all() for store in cache._stores.values())


def test_a_dataset_that_gets_many_at_once(cache: SampleCache) -> None:
    class Many(Samples):
        def __getitems__(self, indices: list[int]) -> list[Any]:
            return [self[index] for index in indices]

    dataset = Many(plain)
    found = batches(loader_of(dataset), 4)
    assert dataset.asked < 96 * 3
    assert equal(found, batches(loader_of(Many(plain)), 4))


def test_the_budget_is_kept_and_what_is_over_it_fetched(said: Said) -> None:
    dataset = Samples(lambda i: torch.full((250,), float(i)))
    bare = batches(loader_of(dataset), 4)
    cache = SampleCache(lambda *words: said.append(words), raising, 80 * 1256)
    undo = cache.install()
    dataset.asked = 0
    found = batches(loader_of(dataset), 5)
    (store,) = cache._stores.values()
    undo()
    assert equal(found[:40], bare)
    assert len(store.samples) == 80
    assert 96 * 2 + 3 * 16 < dataset.asked < 96 * 5 - 100
    assert ("noticed", "memory for samples is used up by those of Samples") in said


def test_memory_is_given_back_with_the_dataset(cache: SampleCache) -> None:
    before = cache._left_bytes
    dataset = Samples(plain)
    batches(loader_of(dataset), 1)
    assert cache._left_bytes < before
    del dataset
    gc.collect()
    assert cache._left_bytes == before
    assert not cache._stores


def test_what_cannot_be_compared_is_not_kept(cache: SampleCache, said: Said) -> None:
    dataset = Samples(lambda i: object())
    batches(loader_of(dataset, collate_fn=len), 2)
    assert said[0][1].endswith("they hold a object, which cannot be compared")
    assert dataset.asked == 2 * 96


def test_a_failure_of_ours_is_reported_and_the_batch_is_there(
    session: Session, monkeypatch: pytest.MonkeyPatch
) -> None:
    undo = knobs.get("loader").apply(session, "cache")
    loader = loader_of(Samples(plain))
    batches(loader, 2)
    monkeypatch.setattr(caching, "same", None)
    found = batches(loader, 1)
    undo()
    monkeypatch.undo()
    assert sorted(int(i) for batch in found for i in batch[1]) == list(range(96))
    assert "TypeError" in session.failed_knobs["loader"]


class Broken(Samples):
    def __getitem__(self, index: int) -> Any:
        if index == 50:
            raise KeyError("fifty")
        return super().__getitem__(index)


@pytest.mark.parametrize("setting", ["cache", "prefetch", "workers"])
def test_an_error_of_the_dataset_is_the_programs(session: Session, setting: str) -> None:
    undo = knobs.get("loader").apply(session, setting)
    seen = []
    iterator = iter(DataLoader(Broken(plain), batch_size=10))
    for _ in range(5):
        seen += next(iterator)[1].tolist()
    with pytest.raises(KeyError, match="fifty"):
        next(iterator)
    undo()
    assert seen == list(range(50))
    assert not session.failed_knobs


def calm_batches(session: Session, setting: str, epochs: int = 3) -> list[Any]:
    loader = loader_of(Samples(plain))
    if setting:
        undo = knobs.get("loader").apply(session, setting)
    found = []
    for _ in range(epochs):
        for batch in loader:
            found.append((batch, torch.rand(2)))  # the program draws between the batches
    if setting:
        undo()
    return [*found, torch.rand(3)]


@pytest.mark.parametrize("setting", ["batched", "cache", "prefetch", "workers"])
def test_order_and_random_stream_of_a_deterministic_dataset(session: Session, setting: str) -> None:
    bare = calm_batches(session, "")
    assert equal(calm_batches(session, setting), bare)
    assert equal(calm_batches(session, ""), bare)


def test_prefetch_fetches_ahead_and_in_another_thread(session: Session) -> None:
    import threading

    threads = set()

    def make(index: int) -> Any:
        threads.add(threading.current_thread().name.rstrip("0123456789_"))
        return torch.tensor(index)

    dataset = Samples(make)
    undo = knobs.get("loader").apply(session, "prefetch")
    iterator = iter(DataLoader(dataset, batch_size=10))
    found = [next(iterator) for _ in range(5)]
    undo()
    found += list(iterator)  # under way when it was undone
    assert torch.equal(torch.cat(found), torch.arange(96))
    assert threads == {"MainThread", "flatout-prefetch"}
    threads.clear()
    batches(DataLoader(dataset, batch_size=10), 1)
    assert threads == {"MainThread"}


def test_prefetch_keeps_the_gradient_mode_of_the_loop(session: Session) -> None:
    weight = torch.ones(2, requires_grad=True)
    undo = knobs.get("loader").apply(session, "prefetch")
    with torch.no_grad():
        found = batches(DataLoader(Samples(lambda i: weight * i), batch_size=10), 1)
    undo()
    assert not any(batch.requires_grad for batch in found)


def test_prefetch_in_a_forked_child(session: Session) -> None:
    undo = knobs.get("loader").apply(session, "prefetch")
    loader = DataLoader(Samples(plain), batch_size=10)
    batches(loader, 1)
    child = os.fork()
    if child == 0:
        os._exit(0 if len(batches(loader, 1)) == 10 else 1)
    assert os.waitpid(child, 0)[1] == 0
    undo()


def process(index: int) -> Any:
    return torch.tensor(os.getpid())


def test_workers_live_on_unless_the_dataset_is_set(session: Session) -> None:
    dataset = Samples(process)
    loader = DataLoader(dataset, batch_size=10)
    undo = knobs.get("loader").apply(session, "workers")
    pids = [{int(pid) for batch in batches(loader, 1) for pid in batch} for _ in range(2)]
    assert pids[0] == pids[1]
    assert os.getpid() not in pids[0]
    dataset.epoch = 1
    assert {int(pid) for batch in batches(loader, 1) for pid in batch} != pids[0]
    assert (loader.num_workers, loader.persistent_workers, loader.prefetch_factor) == (
        0,
        False,
        None,
    )
    undo()
    assert {int(pid) for batch in batches(loader, 1) for pid in batch} == {os.getpid()}


def test_workers_when_an_epoch_is_left_early_or_two_run_at_once(session: Session) -> None:
    loader = DataLoader(Samples(plain), batch_size=10)
    undo = knobs.get("loader").apply(session, "workers")
    first = next(iter(loader))
    pairs = list(zip(loader, loader, strict=True))
    undo()
    assert len(pairs) == 10
    assert all(equal(one, other) for one, other in pairs)
    assert equal(first, pairs[0][0])


def test_what_has_workers_keeps_their_number(session: Session) -> None:
    loader = DataLoader(Samples(process), batch_size=10, num_workers=2)
    undo = knobs.get("loader").apply(session, "workers")
    pids = {int(pid) for batch in batches(loader, 2) for pid in batch}
    undo()
    assert len(pids) == 2


class Stream(IterableDataset[Any]):
    def __iter__(self) -> Iterator[Any]:
        return iter(range(25))


@pytest.mark.parametrize("setting", ["batched", "cache", "prefetch", "workers"])
def test_iterable_datasets_are_left_alone(session: Session, setting: str) -> None:
    undo = knobs.get("loader").apply(session, setting)
    found = batches(DataLoader(Stream(), batch_size=10), 2)
    undo()
    assert torch.cat(found).tolist() == [*range(25), *range(25)]


@pytest.mark.parametrize("setting", ["batched", "cache", "prefetch", "workers"])
def test_a_list_and_a_tensor_dataset(session: Session, setting: str) -> None:
    undo = knobs.get("loader").apply(session, setting)
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


BATCHED = ("all of them", "subset of a subset", "weights")
NOT_BATCHED = (
    *("indices from behind", "transposed", "of another class", "a collate function"),
    *("single samples", "workers"),
)


@pytest.mark.parametrize("kind", [*BATCHED, *NOT_BATCHED])
def test_whole_batches_are_those_of_single_samples(
    session: Session, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(3)
    bare = batches(of_tensors(kind), 2)
    if kind in BATCHED:
        monkeypatch.setattr(_MapDatasetFetcher, "fetch", None)  # torch's way is not gone
    undo = knobs.get("loader").apply(session, "batched")
    torch.manual_seed(3)
    assert equal(batches(of_tensors(kind), 2), bare)
    undo()
    assert not session.failed_knobs


def test_what_the_program_has_changed_about_samples_counts(
    session: Session, monkeypatch: pytest.MonkeyPatch
) -> None:
    undo = knobs.get("loader").apply(session, "batched")
    rows = TensorDataset.__getitem__
    monkeypatch.setattr(TensorDataset, "__getitem__", lambda s, i: (2 * rows(s, i)[0],))
    (found,) = batches(DataLoader(TensorDataset(torch.arange(3)), batch_size=3), 1)
    undo()
    assert found[0].tolist() == [0, 2, 4]


def test_a_row_that_is_not_there_is_the_programs_error(session: Session) -> None:
    undo = knobs.get("loader").apply(session, "batched")
    with pytest.raises(IndexError):
        batches(DataLoader(TensorDataset(torch.arange(9)), batch_size=4, sampler=[1, 2, 9]))
    undo()
    assert not session.failed_knobs


def test_batches_of_tensors_are_tried_where_there_are_some() -> None:
    known = knobs.Facts("cpu", data_share=0.3, datasets=("TensorDataset",))
    assert "batched" in knob.match(known).settings
    assert (
        "batched" not in knob.match(dataclasses.replace(known, datasets=("ImageFolder",))).settings
    )


def test_how_many_workers() -> None:
    assert [knob.worker_count(cores) for cores in (0.5, 1, 2, 4, 64)] == [1, 1, 1, 3, 8]


def test_the_state_of_a_dataset() -> None:
    dataset = Samples(plain)
    before = working.state_of(dataset)
    assert working.state_of(dataset) == before
    dataset.size = 97
    assert working.state_of(dataset) != before
    assert working.state_of([1]) == {}
