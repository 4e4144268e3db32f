"""Loading each sample once: what every rank would fetch, the ranks of one host share out.

Two kinds of loaders are shared out; all others fetch whole batches on every rank:

- *Without workers*, each rank fetches and collates its own rows of a batch, and gets those of the
  others. Samples must be functions of their index, of data and of random numbers
  (``purity.examine``), each must draw as many of these, and they must be collated by torch's
  ``default_collate``, which treats each row alike. It is done once fetching has proven to take
  longer than sharing it out.
- *With workers*, those of rank 0 fetch, and its process passes their batches on. The other ranks
  have workers that fetch nothing, so that torch's loader draws the same indices and random numbers
  as without ranks.

Batches are exchanged through shared memory alone, so not between hosts.
"""

from __future__ import annotations

import contextlib
import io
import itertools
import pickle
import statistics
import time
import weakref
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch.utils.data import dataloader, get_worker_info
from torch.utils.data._utils import fetch

from flatout.intercept.containment import OnFailure
from flatout.intercept.events import EventLog
from flatout.intercept.identity import WeakIdentityDict
from flatout.intercept.patch import Undo, replace_function, wrap_function
from flatout.intercept.purity import examine
from flatout.parallel import cutting
from flatout.parallel.balance import Phase
from flatout.parallel.ending import Ending, PartedError
from flatout.parallel.header import Header, Meeting, digest
from flatout.parallel.sameness import GeneratorStates
from flatout.parallel.skipping import NONE, Positions
from flatout.parallel.team import Team

TIMED_BATCHES = 4
"""Batches that every rank fetches whole and times, before rank 0 decides. The first one counts for
nothing: files are read, and libraries imported."""

WORTH_S = 2e-3
"""Time that sharing out a batch must save: two meetings and the exchange of a batch of 1 MB take
0.5 ms on two cores, and the analysis of a dataset up to 1 ms."""

MOST_FAILURES = 3
"""Batches of a dataset that could not be joined, after which its batches are fetched whole."""

_IS_WORTH, _FAILED = 1, 2
"""Outcomes of a meeting about a batch."""

_fetch_whole = fetch._MapDatasetFetcher.__dict__["fetch"]


class Loading:
    """Replaces the functions of torch's loaders that fetch batches.

    Args:
        events: where it is noted what is shared out.
        find_team: returns the ranks if this process may meet them now, ``None`` if it may not: it
            is alone, or not at a point to which all ranks come alike. Its argument tells whether
            the ranks may meet for the first time.
        leave: lets rank 0 go on alone, for a reason.
        ending: stops this process.
        lend_processors: returns a context in which this process runs on those of all ranks, as its
            workers do then.
        fetches_rows: whether loaders without workers are shared out, because no knob changes how
            they fetch.
    """

    def __init__(
        self,
        events: EventLog,
        find_team: Callable[[bool], Team | None],
        leave: Callable[[str], None],
        ending: Ending,
        lend_processors: Callable[[], contextlib.AbstractContextManager[None]],
        *,
        fetches_rows: bool,
    ) -> None:
        self.is_over = False
        self._events = events
        self._find_team = find_team
        self._leave = leave
        self._ending = ending
        self._lend_processors = lend_processors
        self._fetches_rows = fetches_rows
        self._datasets: WeakIdentityDict[Any, _Dataset] = WeakIdentityDict()
        self._numbers = 0
        self._passed_on: weakref.WeakKeyDictionary[Any, int] = weakref.WeakKeyDictionary()

    def install(self, on_failure: OnFailure) -> Undo:
        """Replace torch's functions; returns the undo.

        Args:
            on_failure: called if this fails.
        """
        workers = dataloader._MultiProcessingDataLoaderIter
        with contextlib.ExitStack() as undo:
            for owner, name, wrapper in (
                (fetch._MapDatasetFetcher, "fetch", self._fetch),
                (workers, "__init__", self._begin),
                (workers, "_next_data", self._next),
                (dataloader.DataLoader, "check_worker_number_rationality", self._advise),
            ):
                undo.callback(wrap_function(owner, name, on_failure, wrapper))
            return undo.pop_all().close

    # Loaders without workers

    def _fetch(self, original: Callable[..., Any], fetcher: Any, index: Any) -> Any:
        """Fetch a batch, in a worker or without."""
        batch = None
        if self._fetches_rows and not self.is_over and get_worker_info() is None:
            try:
                batch = self._fetch_together(original, fetcher, index)
            except PartedError as parted:
                self._leave(str(parted))
        return original(fetcher, index) if batch is None else batch.value

    def _fetch_together(
        self, original: Callable[..., Any], fetcher: Any, index: Any
    ) -> _Joined | None:
        """Return a batch that the ranks share out, ``None`` if they do not."""
        if not fetcher.auto_collation or type(index) is not list:
            return None
        team = self._find_team(False)
        if team is None or not team.channel.is_fast or len(index) < team.size:
            return None
        dataset = self._get_dataset(fetcher.dataset)
        if dataset is None:
            return None
        dataset.batches += 1
        if dataset.is_shared is None and dataset.batches <= TIMED_BATCHES:
            start_s = time.perf_counter()
            try:
                return _Joined(original(fetcher, index))
            finally:
                dataset.seconds.append(time.perf_counter() - start_s)
        with team.balance.spend(Phase.COMPARISON), team.ending.between_calls():
            if dataset.is_shared is None:
                self._decide(team, dataset, fetcher, index)
            return _fetch_rows(team, dataset, fetcher, index) if dataset.is_shared else None

    def _get_dataset(self, dataset: Any) -> _Dataset | None:
        """Return what is known of a dataset; ``None``: it is a list or the like, in memory."""
        try:
            known = self._datasets.get(dataset)
            if known is None:
                self._numbers += 1
                known = _Dataset(self._numbers, type(dataset).__qualname__)
                self._datasets[dataset] = known
        except TypeError:
            return None
        return known

    def _decide(self, team: Team, dataset: _Dataset, fetcher: Any, index: list[Any]) -> None:
        """Share out the batches of a dataset from now on, or never."""
        saved_s = statistics.median(dataset.seconds[1:]) * (1 - 1 / team.size)
        is_worth = saved_s > WORTH_S and _are_pure(fetcher)
        header = Header(0, Meeting.BATCH, outcome=is_worth * _IS_WORTH, subject=dataset.subject)
        alike = ("sequence", "meeting", "subject")
        headers = team.meet(header, f"loads {dataset.name}", alike)
        dataset.is_shared = bool(headers[0].outcome & _IS_WORTH)
        if dataset.is_shared:
            dataset.draws = _find_draws(fetcher, index) if _are_pure(fetcher) else NONE
            self._events.add("applied", "loading", f"batches of {dataset.name} are shared out")

    # Loaders with workers

    def _begin(self, original: Callable[..., Any], iterator: Any, loader: Any) -> Any:
        """Make the iterator of a loader with workers, which do nothing on other ranks than 0."""
        team = None
        if not self.is_over and _forks_for_samples(loader):
            try:
                team = self._meet_about_workers(loader)
            except PartedError as parted:
                self._leave(str(parted))
        with contextlib.ExitStack() as undo:
            if not self.is_over:
                undo.enter_context(self._lend_processors())
            if team is not None and team.rank:  # the workers are forks, which keep this function
                kinds = dataloader._DatasetKind
                create: Any = _idle_in_workers(kinds.create_fetcher)
                undo.callback(replace_function(kinds, "create_fetcher", create))
            result = original(iterator, loader)
        if team is not None:
            self._passed_on[iterator] = self._numbers
        return result

    def _advise(self, original: Callable[..., Any], loader: Any) -> Any:
        """Compare the number of workers with that of all processors."""
        with contextlib.nullcontext() if self.is_over else self._lend_processors():
            return original(loader)

    def _meet_about_workers(self, loader: Any) -> Team | None:
        """Return the ranks if those of rank 0 shall load for all, ``None`` if not."""
        team = self._find_team(True)
        if team is None or not team.channel.is_fast:
            return None
        self._numbers += 1
        name = type(loader.dataset).__qualname__
        subject = digest((self._numbers, name, loader.num_workers))
        with team.balance.spend(Phase.COMPARISON), team.ending.between_calls():
            header = Header(0, Meeting.BATCH, subject=subject)
            team.meet(header, f"loads {name}", ("sequence", "meeting", "subject"))
        if not self._passed_on:
            self._events.add("applied", "loading", f"the workers of rank 0 load {name} for all")
        return team

    def _next(self, original: Callable[..., Any], iterator: Any) -> Any:
        """Return the next batch of a loader with workers."""
        if self.is_over or iterator not in self._passed_on:
            return original(iterator)
        team = self._find_team(True)
        if team is None and self.is_over:
            return original(iterator)
        if team is None:
            try:
                with self._ending.between_calls():
                    self._ending.stop(
                        "--ranks does not support a loader with workers that is read inside of a "
                        "module's forward pass, or in another thread than the one that calls the "
                        "modules"
                    )
            except PartedError as parted:
                self._leave(str(parted))
                return original(iterator)
        error: Exception | None = None
        batch = None
        try:
            batch = original(iterator)
        except Exception as raised:  # noqa: BLE001 - it is raised below, on all ranks
            error = raised
        try:
            with team.balance.spend(Phase.COMPARISON), team.ending.between_calls():
                batch, error = _pass_on(team, self._passed_on[iterator], batch, error)
        except PartedError as parted:
            self._leave(str(parted))
        if error is not None:
            original.raised = error  # type: ignore[attr-defined]  # it is the program's
            raise error
        return batch


@dataclass
class _Dataset:
    """What is known of a dataset.

    Attributes:
        number: of the dataset, in the order of the first batches.
        name: of its class.
        batches: how many the program has asked for.
        seconds: what it took to fetch the first ones.
        is_shared: whether batches are shared out; ``None``: that is not decided.
        failures: how many could not be.
        draws: the random numbers of each sample.
    """

    number: int
    name: str
    batches: int = 0
    seconds: list[float] = field(default_factory=list)
    is_shared: bool | None = None
    failures: int = 0
    draws: Positions = NONE

    @property
    def subject(self) -> int:
        """What a meeting about the present batch is about."""
        return digest((self.number, self.name, self.batches))


class _Joined(NamedTuple):
    """A batch, which may be any object."""

    value: Any


def _idle_in_workers(create_fetcher: Callable[..., Any]) -> Callable[..., Any]:
    """Return a function that creates fetchers that do nothing in workers, and torch's in the
    program, whose samplers may read other loaders."""

    def create(*args: Any) -> Any:
        return create_fetcher(*args) if get_worker_info() is None else _IdleFetcher()

    return create


class _IdleFetcher:
    """Fetches nothing: the batch comes from rank 0."""

    def fetch(self, index: Any) -> None:
        """Return a stand-in for a batch."""


def _are_pure(fetcher: Any) -> bool:
    """Whether samples are functions of their index, of data and of random numbers."""
    try:
        examine(fetcher.dataset, fetcher.collate_fn)
    except Exception:  # noqa: BLE001 - whatever the reason, it is not known
        return False
    return True


def _find_draws(fetcher: Any, index: list[Any]) -> Positions:
    """Return which random numbers a sample of a batch draws."""
    before, start = GeneratorStates(), Positions.now()
    with contextlib.suppress(Exception):  # fetching the batch raises it again
        _fetch_whole(fetcher, index[:1])
    draws = Positions.now().since(start)
    before.restore()
    return draws


def _forks_for_samples(loader: Any) -> bool:
    """Whether the workers of a loader are forks, and fetch samples by their indices."""
    if loader._dataset_kind != dataloader._DatasetKind.Map:
        return False
    context = loader.multiprocessing_context or torch.multiprocessing
    return bool(context.get_start_method() == "fork")


def _fetch_rows(team: Team, dataset: _Dataset, fetcher: Any, index: list[Any]) -> _Joined | None:
    """Fetch the own rows of a batch, and return the whole batch; ``None`` if it must be fetched
    whole, because it cannot be joined."""
    bounds = cutting.bounds(len(index), team.size)
    start, stop = bounds[team.rank]
    part: _Part | None = None
    before = GeneratorStates()
    dataset.draws.skip(start)
    try:
        if _are_pure(fetcher):
            with team.balance.spend(Phase.SHARD):
                part = _Part(_fetch_whole(fetcher, index[start:stop]), stop - start)
    except Exception:  # noqa: BLE001 - fetching the whole batch raises it again
        part = None
    after = GeneratorStates().digest()
    before.restore()
    dataset.draws.skip(stop)
    if GeneratorStates().digest() != after:
        part = None
    header = Header(
        0,
        Meeting.BATCH,
        outcome=_FAILED * (part is None),
        subject=dataset.subject,
        structure=0 if part is None else digest(part.form),
        content=digest(index),
    )
    headers = team.meet(header, f"loads {dataset.name}", ("sequence", "meeting", "subject"))
    found = {(other.outcome, other.structure, other.content) for other in headers}
    if part is None or found != {(0, header.structure, header.content)}:
        before.restore()
        dataset.failures += 1
        dataset.is_shared = dataset.failures < MOST_FAILURES
        return None
    dataset.draws.skip(len(index) - stop)
    rows = [stop - start for start, stop in bounds]
    tensors = team.gather(part.tensors, [0] * len(part.tensors), rows) if part.tensors else []
    texts = part.texts
    if texts:
        of_ranks = [pickle.loads(m) for m in team.channel.exchange(pickle.dumps(texts))]
        texts = [list(itertools.chain(*columns)) for columns in zip(*of_ranks, strict=True)]
    return _Joined(part.join(iter(tensors), iter(texts)))


class _Part:
    """Some rows of a batch that ``default_collate`` has made.

    Args:
        batch: of these rows.
        rows: their number.

    Attributes:
        tensors: in it; their first dimension counts rows.
        texts: the lists of texts in it, one text for each row.
        form: of the whole batch, without the number of rows.

    Raises:
        TypeError: the batch contains something else.
    """

    def __init__(self, batch: Any, rows: int) -> None:
        self.tensors: list[torch.Tensor] = []
        self.texts: list[Sequence[str | bytes]] = []
        self._rows = rows
        self._batch = batch
        self.form = self._take(batch)

    def _take(self, value: Any) -> Any:
        if type(value) is torch.Tensor and value.layout is torch.strided and value.is_cpu:
            if value.shape[:1] != (self._rows,) or value.requires_grad:
                raise TypeError("a tensor has not one row for each sample")
            self.tensors.append(value)
            return value.dtype, tuple(value.shape[1:])
        if _are_texts(value):
            if len(value) != self._rows:
                raise TypeError("a list has not one text for each sample")
            self.texts.append(value)
            return type(value)
        if type(value) is dict:
            return [(key, self._take(item)) for key, item in value.items()]
        if type(value) is list or isinstance(value, tuple):
            return type(value).__qualname__, [self._take(item) for item in value]
        raise TypeError(f"a {type(value).__qualname__} cannot be joined")

    def join(self, tensors: Iterator[torch.Tensor], texts: Iterator[Sequence[str | bytes]]) -> Any:
        """Return the whole batch.

        Args:
            tensors, texts: those of all rows.
        """

        def join(value: Any) -> Any:
            if isinstance(value, torch.Tensor):
                return next(tensors)
            if _are_texts(value):
                return type(value)(next(texts))
            if isinstance(value, dict):
                return {key: join(item) for key, item in value.items()}
            items = [join(item) for item in value]
            return type(value)(*items) if hasattr(value, "_fields") else type(value)(items)

        return join(self._batch)


def _are_texts(value: Any) -> bool:
    is_list = type(value) in (list, tuple)
    return is_list and bool(value) and all(type(text) in (str, bytes) for text in value)


# Passing batches on


def _pass_on(
    team: Team, number: int, batch: Any, error: Exception | None
) -> tuple[Any, Exception | None]:
    """Return the batch of rank 0, or the error that its loader has raised.

    Args:
        team: the ranks.
        number: of the iterator.
        batch, error: of this rank.
    """
    header = Header(0, Meeting.BATCH, subject=number)
    team.meet(header, f"loads a batch of loader {number}", ("sequence", "meeting", "subject"))
    packer = _Packer()
    message = packer.pack((batch, _passable(error))) if team.rank == 0 else b""
    content = team.channel.exchange(message)[0]
    if not content:
        name = type(batch).__qualname__
        team.ending.stop(f"the workers of rank 0 load a {name} that cannot be sent to other ranks")
    unpacker = _Unpacker(content)
    if team.rank:
        batch, error = unpacker.load()
    sent = packer.tensors if team.rank == 0 else unpacker.tensors
    nothing = [tensor.new_empty(0) for tensor in sent]
    if sent:
        with team.balance.spend(Phase.COMMUNICATION):
            team.channel.gather(
                nothing if team.rank else sent, [sent, *[nothing] * (team.size - 1)]
            )
    return batch, error


def _passable(error: Exception | None) -> Exception | None:
    """Return an error that another process can make from its pickle."""
    try:
        pickle.loads(pickle.dumps(error))
    except Exception:  # noqa: BLE001 - whatever the program's classes raise
        return RuntimeError(f"{type(error).__name__}: {error}")
    return error


class _Packer(pickle.Pickler):
    """Pickles a batch but for the memory of its tensors.

    Attributes:
        tensors: the bytes of each storage.
    """

    def __init__(self) -> None:
        self._file = io.BytesIO()
        self._numbers: dict[int, int] = {}
        self.tensors: list[torch.Tensor] = []
        super().__init__(self._file, pickle.HIGHEST_PROTOCOL)

    def pack(self, value: Any) -> bytes:
        """Return the pickle of a value; nothing if it has none."""
        try:
            self.dump(value)
        except Exception:  # noqa: BLE001 - whatever the program's classes raise
            self.tensors.clear()
            return b""
        return self._file.getvalue()

    def persistent_id(self, value: Any) -> Any:
        """Return the storage of a tensor, by its number and size, and where the tensor is in it."""
        if type(value) is not torch.Tensor or not (value.is_cpu and value.layout is torch.strided):
            return None
        if value.requires_grad or value.is_conj() or value.is_neg():
            return None
        storage = value.untyped_storage()
        number = self._numbers.setdefault(storage._cdata, len(self.tensors))
        if number == len(self.tensors):
            self.tensors.append(_bytes_of(storage))
        where = value.storage_offset(), tuple(value.shape), value.stride()
        return number, storage.nbytes(), value.dtype, where


class _Unpacker(pickle.Unpickler):
    """Makes a batch with tensors whose memory has no content yet.

    Attributes:
        tensors: the bytes of each storage, in the order of ``_Packer``.
    """

    def __init__(self, content: bytes) -> None:
        super().__init__(io.BytesIO(content))
        self.tensors: list[torch.Tensor] = []

    def persistent_load(self, persistent_id: Any) -> torch.Tensor:
        """Return a tensor in the storage of this number."""
        number, size, dtype, where = persistent_id
        if number == len(self.tensors):
            self.tensors.append(torch.empty(size, dtype=torch.uint8, device="cpu"))
        empty = torch.empty(0, dtype=dtype, device="cpu")
        return empty.set_(self.tensors[number].untyped_storage(), *where)


def _bytes_of(storage: torch.UntypedStorage) -> torch.Tensor:
    return torch.empty(0, dtype=torch.uint8, device="cpu").set_(storage)
