"""What the ranks exchange, over gloo and through shared memory, and how they end when one dies.

Most tests have the ranks in threads of one process, which share memory as processes do.
"""

from __future__ import annotations

import itertools
import os
import random
import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from types import SimpleNamespace
from typing import Any, NoReturn, TypeVar

import pytest
import torch
from torch import Tensor

from flatout.parallel import memory
from flatout.parallel.channel import Channel, Group
from flatout.parallel.memory import Memory
from flatout.parallel.team import Team

T = TypeVar("T")

KINDS = ("memory", "gloo")
SIZES = (2, 3, 4)

ONE_ROUND, PIECE, CHUNK = 1 << 14, 1 << 15, 1 << 19
"""As in ``exchange.c``, in bytes."""


class LostError(Exception):
    """What a channel does in place of ending its process."""


def lost(error: Exception) -> NoReturn:
    raise LostError(str(error))


def memories(size: int, news: Callable[[], str | None] = lambda: None) -> list[Memory]:
    """Channels through one memory."""
    file = os.memfd_create("test")
    os.ftruncate(file, memory.mapping_bytes(size))
    found = [Memory(file, {}, rank, size, lost, news) for rank in range(size)]
    os.close(file)
    return found


def gloos(size: int) -> list[Group]:
    """Channels over one group of gloo."""
    store = torch.distributed.HashStore()

    def make(rank: int) -> Group:
        group = torch.distributed.ProcessGroupGloo(store, rank, size, timedelta(minutes=1))
        return Group(group, rank, size, lost)

    with ThreadPoolExecutor(size) as pool:
        return list(pool.map(make, range(size)))


def make_channels(kind: str, size: int) -> list[Any]:
    return memories(size) if kind == "memory" else gloos(size)


def together(channels: list[Any], function: Callable[[Any], T]) -> list[T]:
    """Call a function of each channel at the same time; returns the results by rank."""
    with ThreadPoolExecutor(len(channels)) as pool:
        return list(pool.map(function, channels))


@pytest.fixture(autouse=True)
def waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    """A rank that is not woken looks too late."""
    monkeypatch.setattr(memory, "LOOK_SECONDS", 60.0)
    monkeypatch.setattr(memory, "MEETING_SECONDS", 30.0)


@pytest.fixture
def looks_often(waiting: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "LOOK_SECONDS", 1e-3)


@pytest.fixture(scope="module", params=list(itertools.product(KINDS, SIZES)), ids=str)
def channels(request: pytest.FixtureRequest) -> Iterator[list[Channel]]:
    made = make_channels(*request.param)
    yield made
    together(made, lambda channel: channel.close())


@pytest.fixture(scope="module", params=SIZES)
def shared(request: pytest.FixtureRequest) -> Iterator[list[Memory]]:
    made = memories(request.param)
    yield made
    together(made, lambda channel: channel.close())


# Numbers


def draw(elements: int, dtype: torch.dtype, rank: int) -> Tensor:
    generator = torch.Generator().manual_seed(100 * elements + rank)
    return torch.randn(elements, generator=generator, dtype=torch.float64).to(dtype)


def draw_all(name: str, dtype: torch.dtype, rank: int) -> list[Tensor]:
    if name == "0-dim":
        return [draw(1, dtype, rank)[0]]
    return [draw(size // dtype.itemsize, dtype, rank) for size in BYTES[name]]


def mean_in_order(parts: Sequence[Tensor]) -> Tensor:
    """The mean, added up in the order of the ranks, with the rounding of the types."""
    wide = torch.promote_types(parts[0].dtype, torch.float32)
    total = parts[0].to(wide)
    for part in parts[1:]:
        total = total + part.to(wide)
    return (total * (1 / len(parts))).to(parts[0].dtype)


BYTES = {
    "none": [0],
    "one round": [ONE_ROUND - 8],
    "at most one round": [ONE_ROUND],
    "more than one round": [ONE_ROUND + 8],
    "less than a chunk": [CHUNK - 8],
    "a chunk": [CHUNK],
    "more than a chunk": [CHUNK + 8],
    "chunks": [3 * CHUNK + 1000],
    "small ones": [8, 0, 24, 8000],
    "many": [0, CHUNK - 56, 8, 0, 0, 120, PIECE, CHUNK + 8, 8, 0],
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", [*BYTES, "0-dim"])
def test_sums_and_means(channels: list[Channel], name: str, dtype: torch.dtype) -> None:
    def run(channel: Channel) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
        given = draw_all(name, dtype, channel.rank)
        means = [torch.full_like(x, 7) for x in given]
        sums = [x.clone() for x in given]
        channel.average(given, means)
        assert all(map(torch.equal, given, sums))
        channel.average(given, given)
        if dtype in (torch.float32, torch.float64):
            channel.sum(sums)
        return means, given, sums

    results = together(channels, run)
    drawn = [draw_all(name, dtype, rank) for rank in range(len(channels))]
    spacing = torch.finfo(dtype).eps
    close = {"rtol": 4 * spacing, "atol": 16 * spacing, "check_dtype": False}
    for i, parts in enumerate(zip(*drawn, strict=True)):
        exact = torch.stack([part.double() for part in parts]).sum(0)
        for means, in_place, sums in results:
            assert torch.equal(means[i], results[0][0][i])
            assert torch.equal(in_place[i], means[i])
            if isinstance(channels[0], Memory):
                assert torch.equal(means[i], mean_in_order(parts))
            torch.testing.assert_close(means[i], exact / len(channels), **close)
            if dtype in (torch.float32, torch.float64):
                assert torch.equal(sums[i], results[0][2][i])
                torch.testing.assert_close(sums[i], exact, **close)


def test_special_values(shared: list[Memory]) -> None:
    values = torch.tensor([torch.inf, -torch.inf, torch.nan, 3e38, 1e-45, -0.0, 0.0] * 3000)

    def run(channel: Channel) -> Tensor:
        mine = values.roll(channel.rank // 2)
        channel.sum([mine])
        return mine.view(torch.int32)

    results = together(shared, run)
    expected = values.clone()
    for rank in range(1, len(shared)):
        expected += values.roll(rank // 2)
    assert all(torch.equal(result, results[0]) for result in results)
    torch.testing.assert_close(
        results[0].view(torch.float32), expected, rtol=0, atol=0, equal_nan=True
    )


def test_several_threads_compute_the_same(
    shared: list[Memory], monkeypatch: pytest.MonkeyPatch
) -> None:
    count = 3 * CHUNK // 4 + 77

    def run(channel: Channel) -> list[Tensor]:
        mean, rows = torch.empty(count), [[torch.empty(count)] for _ in shared]
        own = draw(count, torch.float32, channel.rank)
        channel.average([own], [mean])
        channel.gather([own], rows)
        return [mean, *(row[0] for row in rows)]

    expected = together(shared, run)
    monkeypatch.setattr(memory.torch, "get_num_threads", lambda: 3)
    for found, as_before in zip(together(shared, run), expected, strict=True):
        assert all(map(torch.equal, found, as_before))
    assert torch.equal(expected[0][1], draw(count, torch.float32, 0))


def test_two_ranks_get_the_bits_of_gloo() -> None:
    both = gloos(2), memories(2)

    def run(channel: Channel) -> Tensor:
        mean = draw(100_001, torch.float32, channel.rank)
        channel.average([mean], [mean])
        return mean

    results = [together(made, run)[0] for made in both]
    assert torch.equal(*results)
    together(both[0], lambda channel: channel.close())


# Bytes


def test_messages(channels: list[Channel]) -> None:
    def run(channel: Channel) -> tuple[list[bytes], ...]:
        rank = channel.rank
        long = bytes([rank]) * (CHUNK * rank + 3)
        return channel.meet(bytes([rank] * 64)), channel.exchange(long), channel.exchange(b"")

    ranks = range(len(channels))
    expected = (
        [bytes([rank] * 64) for rank in ranks],
        [bytes([rank]) * (CHUNK * rank + 3) for rank in ranks],
        [b"" for rank in ranks],
    )
    assert together(channels, run) == [expected] * len(channels)


def rows_of(rank: int) -> int:
    return [3, 1, 0, 2][rank]


TENSORS: dict[str, tuple[Callable[[int], Tensor], int]] = {
    "rows": (lambda rows: torch.randn(rows, 5), 0),
    "columns": (lambda rows: torch.randn(4, rows, 3), 1),
    "large": (lambda rows: torch.randn(rows, CHUNK // 4 + 9), 0),
    "a view": (lambda rows: torch.randn(5, rows).t(), 0),
    "channels last": (
        lambda rows: torch.randn(rows, 3, 4, 4).to(memory_format=torch.channels_last),
        0,
    ),
    "bool": (lambda rows: torch.randn(rows, 7) > 0, 0),
    "bytes": (lambda rows: torch.randint(255, (rows, 3), dtype=torch.uint8), 0),
    "half": (lambda rows: torch.randn(rows, 3).half(), 0),
    "complex": (lambda rows: torch.randn(rows, 3, dtype=torch.complex64), 0),
    "conjugated": (lambda rows: torch.randn(rows, 3, dtype=torch.complex128).conj(), 0),
    "negated": (lambda rows: torch.randn(rows, 3, dtype=torch.complex128).conj().imag, 0),
    "no elements": (lambda rows: torch.randn(rows, 0, 3), 0),
}


def test_gathered_tensors(channels: list[Channel]) -> None:
    size = len(channels)
    rows = [rows_of(rank) for rank in range(size)]
    dims = [dim for _, dim in TENSORS.values()]

    def draw_shard(rank: int) -> list[Tensor]:
        with torch.random.fork_rng():
            torch.manual_seed(rank)
            return [make(rows[rank]) for make, _ in TENSORS.values()]

    shards = [draw_shard(rank) for rank in range(size)]
    results = together(
        channels, lambda channel: team(channel).gather(shards[channel.rank], dims, rows)
    )
    for i, (name, dim) in enumerate(zip(TENSORS, dims, strict=True)):
        expected = torch.cat([shard[i] for shard in shards], dim).resolve_conj().resolve_neg()
        for joined in results:
            assert torch.equal(joined[i], expected), name
            assert joined[i].dtype is expected.dtype
    for joined, shard in zip(results, shards, strict=True):
        if rows[0] and shard is shards[0]:
            assert joined[4].is_contiguous(memory_format=torch.channels_last)


def team(channel: Channel) -> Team:
    ending: Any = SimpleNamespace()
    return Team(channel, ending)


def test_averaged_tensors(channels: list[Channel]) -> None:
    size = len(channels)

    def draw_gradients(rank: int) -> list[Tensor]:
        generator = torch.Generator().manual_seed(rank)

        def randn(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
            return torch.randn(shape, generator=generator, dtype=dtype)

        strided = randn(6, 4).t() if rank % 2 else randn(4, 6)  # strides may differ between ranks
        indices = torch.tensor([[0, 3, 3][: 1 + rank % 3]])
        sparse = torch.sparse_coo_tensor(
            indices, randn(indices.shape[1], 2), (5, 2), check_invariants=True
        )
        return [
            *(randn(3, 5), strided, sparse, randn(7).half(), randn(3, dtype=torch.float64)),
            *(randn(4, dtype=torch.complex64), randn(4, dtype=torch.complex64).conj()),
            *(randn(3, 2, 2, 2).to(memory_format=torch.channels_last), randn(0), randn()),
        ]

    def run(channel: Channel) -> tuple[list[Tensor], list[Tensor], list[Tensor], list[int]]:
        given = draw_gradients(channel.rank)
        means = team(channel).average(given)
        unchanged = list(map(Tensor.clone, given))
        versions = [x._version for x in given]
        in_place = team(channel).average(given, in_place=True)
        changes = [x._version - before for x, before in zip(given, versions, strict=True)]
        pairs = zip(given, in_place, strict=True)
        found = [mean if mean.is_sparse else changed for changed, mean in pairs]
        assert [x.stride() for x in means if not x.is_sparse] == [
            x.stride() for x in unchanged if not x.is_sparse
        ]
        return means, found, unchanged, changes

    results = together(channels, run)
    drawn = [draw_gradients(rank) for rank in range(size)]
    for i in range(len(drawn[0])):
        parts = [gradients[i].to_dense() for gradients in drawn]
        mean = torch.stack([part.to(torch.complex128) for part in parts]).sum(0) / size
        for rank, (means, in_place, unchanged, changes) in enumerate(results):
            assert torch.equal(unchanged[i].to_dense(), parts[rank])
            tolerance = 1e-3 if parts[0].dtype is torch.float16 else 1e-6
            for found in (means[i].to_dense(), in_place[i].to_dense()):
                close = {"rtol": tolerance, "atol": tolerance, "check_dtype": False}
                torch.testing.assert_close(found.to(torch.complex128), mean, **close)
                assert torch.equal(found, results[0][0][i].to_dense())
            assert changes[i] == 0


def test_exchanges_in_any_order(shared: list[Memory]) -> None:
    """No rank reads what another has written for a later exchange, or before."""
    draws = random.Random(0)
    limits = (8, ONE_ROUND, PIECE, CHUNK, 3 * CHUNK)
    plan = [
        (draws.choice(["meet", "gather", "sum"]), draws.randrange(1, draws.choice(limits) // 4))
        for _ in range(150)
    ]
    size = len(shared)

    def run(channel: Memory) -> None:
        for number, (what, count) in enumerate(plan):
            own = torch.full((count,), float(number * size + channel.rank))
            if what == "meet":
                message = bytes([number, channel.rank]) * count
                assert channel.meet(message) == [bytes([number, r]) * count for r in range(size)]
            elif what == "gather":
                rows = torch.empty(size, count)
                channel.gather([own], [[row] for row in rows])
                for rank, row in enumerate(rows):
                    assert (row == number * size + rank).all()
            else:
                channel.sum([own])
                assert (own == number * size**2 + size * (size - 1) / 2).all()

    together(shared, run)


# What must not be


def test_tensors_that_cannot_be_added_up_in_place_are_refused() -> None:
    channel = memories(2)[0]
    with pytest.raises(TypeError, match="cannot add up"):
        channel.sum([torch.ones(3), torch.ones(3, dtype=torch.float64)])
    with pytest.raises(TypeError, match="cannot add up"):
        channel.sum([torch.ones(3, dtype=torch.int64)])
    with pytest.raises(ValueError, match="not contiguous"):
        channel.sum([torch.ones(3, 4).t()])
    with pytest.raises(ValueError, match="differ"):
        channel.gather([torch.ones(3)], [[torch.ones(4)], [torch.ones(4)]])


@pytest.mark.parametrize(
    "exchanges",
    [
        (
            lambda channel: channel.sum([torch.ones(3)]),
            lambda channel: channel.sum([torch.ones(4)]),
        ),
        (lambda channel: channel.sum([torch.ones(16)]), lambda channel: channel.meet(bytes(64))),
        (
            lambda channel: channel.gather([torch.ones(3)], [[torch.ones(3)], [torch.ones(4)]]),
            lambda channel: channel.gather([torch.ones(3)], [[torch.ones(4)], [torch.ones(3)]]),
        ),
    ],
    ids=["sizes", "kinds", "rows"],
)
def test_ranks_that_exchange_different_data_are_told(
    exchanges: list[Callable[[Channel], object]],
) -> None:
    def run(channel: Channel) -> None:
        with pytest.raises(LostError, match="exchange different data"):
            exchanges[channel.rank](channel)

    together(memories(2), run)


def test_a_rank_that_leaves_is_noticed_after_its_last_exchange() -> None:
    channels = memories(3)

    def run(channel: Channel) -> list[bytes]:
        met = channel.meet(bytes([channel.rank]))
        if channel.rank == 1:
            channel.close()
        else:
            with pytest.raises(LostError, match="another rank has left"):
                channel.meet(b"x")
        return met

    assert together(channels, run) == [[b"\0", b"\1", b"\2"]] * 3


def test_a_channel_that_was_closed_or_forgotten_is_not_used() -> None:
    first, second = memories(2)
    first.close()
    second.forget()
    for channel in (first, second):
        with pytest.raises(RuntimeError, match="was interrupted"):
            channel.meet(b"x")
        channel.close()


@pytest.mark.usefixtures("looks_often")
def test_the_time_to_wait_is_limited(monkeypatch: pytest.MonkeyPatch) -> None:
    now_s = itertools.count(0.0, 400.0)
    monkeypatch.setattr(memory, "MEETING_SECONDS", 1800.0)
    monkeypatch.setattr(memory, "time", SimpleNamespace(monotonic=lambda: next(now_s)))
    with pytest.raises(LostError, match="another rank has not answered within 1800 s"):
        memories(2)[0].meet(b"x")
    assert next(now_s) == 2400.0  # it has looked at 400, 800, 1200, 1600 and 2000 s


@pytest.mark.usefixtures("looks_often")
def test_news_of_a_failure_end_the_waiting() -> None:
    with pytest.raises(LostError, match="rank 1 has ended: killed"):
        memories(2, lambda: "rank 1 has ended: killed")[0].meet(b"x")


@pytest.mark.usefixtures("looks_often")
def test_what_a_rank_has_answered_before_it_died_counts() -> None:
    answered = threading.Event()
    channels: list[Memory] = []

    def news() -> str:
        with ThreadPoolExecutor(1) as pool:
            pool.submit(answer).result()
        return "rank 1 has died"

    def answer() -> None:
        channels[1]._news = lambda: "not asked"
        if not answered.is_set():
            answered.set()
            channels[1].meet(b"y")

    channels += memories(2, news)
    assert channels[0].meet(b"x") == [b"x", b"y"]
    with pytest.raises(LostError, match="rank 1 has died"):
        channels[0].meet(b"x")


# Signals


@pytest.mark.usefixtures("looks_often")
def test_an_exchange_is_done_before_a_handler_ends_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """So the ranks still exchange the same afterwards, as they do over gloo."""
    looks = itertools.count()
    others: list[threading.Thread] = []
    answers: list[list[bytes]] = []

    def answer() -> None:
        for message in (b"a", b"b"):
            answers.append(second.meet(message))

    def interrupt() -> None:
        look = next(looks)
        if look == 0:
            signal.raise_signal(signal.SIGINT)
        elif look == 1:
            others.append(threading.Thread(target=answer))
            others[0].start()

    first, second = memories(2)
    first._news = interrupt
    with pytest.raises(KeyboardInterrupt):
        first.meet(b"1")
    assert first.meet(b"2") == [b"2", b"b"]
    others[0].join()
    assert answers == [[b"1", b"a"], [b"2", b"b"]]


@pytest.mark.usefixtures("looks_often")
def test_a_handler_ends_an_exchange_that_cannot_be_done(monkeypatch: pytest.MonkeyPatch) -> None:
    looks = itertools.count()
    monkeypatch.setattr(memory, "INTERRUPTED_SECONDS", 0.0)

    def interrupt() -> None:
        if next(looks) == 0:
            signal.raise_signal(signal.SIGINT)

    first, second = memories(2)
    first._news = interrupt
    own = torch.zeros(5)
    with pytest.raises(KeyboardInterrupt):
        first.sum([own])
    with pytest.raises(RuntimeError, match="was interrupted"):
        first.sum([own])
    first.close()
    second.sum([torch.ones(5)])
    with pytest.raises(LostError, match="another rank has left"):
        second.meet(b"x")
    assert not own.any()


@pytest.mark.usefixtures("looks_often")
def test_a_handler_may_close_the_channel() -> None:
    first, _ = memories(2)
    first._news = first.close
    with pytest.raises(RuntimeError, match="was closed in the middle"):
        first.meet(b"x")
