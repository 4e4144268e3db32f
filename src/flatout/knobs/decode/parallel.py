"""The images of a batch, decoded by other processes while the program is at the first of them."""

from __future__ import annotations

import contextlib
import json
import mmap
import os
import select
import subprocess
import sys
import tempfile
import threading
import weakref
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import PIL
from PIL import Image, ImageFile
from torch.utils import data
from torch.utils.data import dataloader

from flatout.agent.openmp import let_threads_rest
from flatout.agent.place import take_place
from flatout.knobs import Undo
from flatout.knobs.decode import decoder, images
from flatout.knobs.decode.foresight import Foresight
from flatout.knobs.decode.images import finish, identity, path_of

MOST_PROCESSES = 16

PLACES = 3
"""Images of a process that are being decoded, are to be, or wait for the program."""

PLACE_BYTES = 1 << 25
"""For one image, of which it takes what it needs: eight million pixels of four bytes."""

BATCHES_KEPT = 4
"""Batches that a loader may be asked for before the files of the first are given up: a thread that
fetches ahead asks for some."""

JUDGED_AFTER = 256
"""Files decoded for a dataset, after which most of them must have been of use."""

IDLE_S = 30.0
"""After which the processes end when they are not in use any more; a comparison soon wants them
again."""

NOT_INHERITED = ("LD_PRELOAD", "GLIBC_TUNABLES")
"""Variables that are meant for the program alone."""


class Job:
    """A file that will be opened.

    Attributes:
        path: of the file.
        known: what is known of the dataset that it is for.
        process: that it was given to; ``None``: none yet.
        place: in the memory of that process.
        made: by the process, see ``decoder.py``; ``None``: nothing, or not yet.
        is_over: whether the process has said what it made.
        is_wanted: whether the program may still ask for it.
    """

    def __init__(self, path: str, known: Known) -> None:
        self.path = path
        self.known = known
        self.process: Process | None = None
        self.place = 0
        self.made: tuple[str, str, Any] | None = None
        self.is_over = False
        self.is_wanted = True


class Known:
    """What is known of the dataset of a loader.

    Args:
        dataset: the dataset.

    Attributes:
        foresight: of its files.
        used, wasted: files decoded beforehand that were of use, and others.
        indices: of its last batch.
        opened: files opened since that was asked for.
    """

    def __init__(self, dataset: Any) -> None:
        self.foresight = Foresight(dataset)
        self.used = self.wasted = 0
        self.indices: Sequence[int] = ()
        self.opened: list[str] = []

    @property
    def is_worthwhile(self) -> bool:
        return self.used + self.wasted < JUDGED_AFTER or self.used > self.wasted


class Process:
    """A process of ``decoder.py``.

    Raises:
        OSError: it cannot be started.
    """

    def __init__(self) -> None:
        self.jobs: deque[Job] = deque()
        self.free = list(range(PLACES))
        self._said = b""
        with _shared_file(PLACES * PLACE_BYTES) as descriptor:
            self._memory = memoryview(mmap.mmap(descriptor, 0))
            folders = [str(Path(PIL.__file__).parents[1]), str(Path(__file__).parent)]
            self._process = subprocess.Popen(
                [
                    *(sys.executable, "-I", "-S", decoder.__file__),
                    *map(str, (descriptor, PLACE_BYTES, images.SETTLED_S, *folders)),
                ],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                pass_fds=(descriptor,),
                bufsize=0,
                env={k: v for k, v in os.environ.items() if k not in NOT_INHERITED},
            )
        assert self._process.stdout is not None
        self._poll = select.poll()
        self._poll.register(self._process.stdout, select.POLLIN)

    def take(self, job: Job) -> None:
        """Let it decode a file."""
        assert self._process.stdin is not None
        job.process, job.place = self, self.free.pop()
        self.jobs.append(job)
        asked = json.dumps((job.place, os.path.abspath(job.path))) + "\n"
        self._process.stdin.write(asked.encode())

    def listen(self, *, wait: bool) -> None:
        """Note what it has made, and wait for one, if asked to.

        Raises:
            EOFError: it has ended.
        """
        assert self._process.stdout is not None
        while self.jobs and (wait or self._poll.poll(0)):
            part = os.read(self._process.stdout.fileno(), 1 << 16)
            if not part:
                raise EOFError("a process that decodes images has ended")
            *lines, self._said = (self._said + part).split(b"\n")
            for line in lines:
                job = self.jobs.popleft()
                made = json.loads(line)
                job.made, job.is_over = made and (made[0], made[1], tuple(made[2])), True
                if not job.is_wanted:
                    self.free.append(job.place)
                wait = False

    def pixels(self, job: Job) -> Any:
        """A copy of what it has made, as Pillow has it."""
        assert job.made is not None
        _, mode, size = job.made
        at = job.place * PLACE_BYTES
        count = size[0] * size[1] * (1 if mode == "L" else 4)
        memory = self._memory[at : at + count]
        return Image.frombytes(mode, size, memory, "raw", decoder.MAPPED[mode]).im

    def end(self) -> None:
        """Let it end."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.close()
        self._process.stdout.close()
        self._process.wait()


@contextlib.contextmanager
def _shared_file(size: int) -> Any:
    """The descriptor of a file in memory, closed in the end; what maps it goes on having it."""
    if hasattr(os, "memfd_create"):
        descriptor = os.memfd_create("flatout-decode")
    else:
        descriptor, path = tempfile.mkstemp(prefix="flatout-decode-")
        os.unlink(path)
    try:
        os.ftruncate(descriptor, size)
        yield descriptor
    finally:
        os.close(descriptor)


class Decoders:
    """Stands in for ``ImageFile.load`` of Pillow and ``_next_index`` of torch's loaders.

    As a loader without workers fetches a batch, processes decode the files that its samples will
    open. The program opens each file as ever; for its pixels it takes those that are there, decodes
    what no one has begun with, and where it has to wait, decodes another one meanwhile.

    Args:
        processes: at most, besides the program's own.
        kind: the class whose images are decoded beforehand, no class derived from it.
        on_failure: called when something here failed; the image is decoded as ever.
    """

    def __init__(
        self, processes: int, kind: type[Any], on_failure: Callable[[Exception], None]
    ) -> None:
        self._most = min(processes, MOST_PROCESSES)
        self._kind = kind
        self._on_failure = on_failure
        self._own_load: Callable[[Any], Any] = ImageFile.ImageFile.load
        self._own_next: Callable[[Any], Any] = dataloader._BaseDataLoaderIter._next_index
        self._known: weakref.WeakKeyDictionary[Any, Known] = weakref.WeakKeyDictionary()
        self._last: Known | None = None
        self._lock = threading.RLock()  # a thread may fetch what another has asked for
        self._pid = os.getpid()
        self._processes: list[Process] = []
        self._is_installed = False
        self._forget_all()

    def _forget_all(self) -> None:
        self._waiting: deque[Job] = deque()
        self._by_path: dict[str, deque[Job]] = {}
        self._batches: deque[list[Job]] = deque()
        self._ahead: dict[Job, tuple[str, Any]] = {}

    def install(self) -> Undo:
        """Take the place of both; returns what ends that."""
        self._own_load = ImageFile.ImageFile.load
        self._own_next = dataloader._BaseDataLoaderIter._next_index
        self._last = None
        self._is_installed = True
        undos = [
            take_place(ImageFile.ImageFile, "load", lambda image: self.load(image)),
            take_place(
                dataloader._BaseDataLoaderIter, "_next_index", lambda loads: self.next_index(loads)
            ),
        ]

        def undo() -> None:
            for give_back in undos:
                give_back()
            with self._lock:
                for jobs in self._batches:
                    self._give_up(jobs)
                self._forget_all()
                self._is_installed = False
            if self._processes and self._pid == os.getpid():
                timer = threading.Timer(IDLE_S, self._end)
                timer.daemon = True
                timer.start()

        return undo

    def _end(self) -> None:
        """End the processes, unless they are in use again."""
        with self._lock:
            while self._processes and not self._is_installed:
                self._processes.pop().end()

    # A batch is asked for

    def next_index(self, iterator: Any) -> Any:
        """The indices of a loader's next batch."""
        index = self._own_next(iterator)
        try:
            if (
                type(iterator) is dataloader._SingleProcessDataLoaderIter
                and iterator._dataset_kind == dataloader._DatasetKind.Map
                and data.get_worker_info() is None
                and self._pid == os.getpid()
            ):
                with self._lock:
                    self._begin(iterator._dataset, index if iterator._auto_collation else [index])
        except Exception as error:  # noqa: BLE001 - reported
            self._on_failure(error)
        return index

    def _begin(self, dataset: Any, indices: Any) -> None:
        if self._last is not None:
            self._last.foresight.learn(self._last.indices, self._last.opened)
            self._last = None
        try:
            known = self._known.get(dataset) or self._known.setdefault(dataset, Known(dataset))
        except TypeError:
            return  # a list: what is in it is in memory
        if type(indices) is not list or not all(type(index) is int for index in indices):
            return
        known.indices, known.opened = indices, []
        self._last = known
        while len(self._batches) >= BATCHES_KEPT:
            self._give_up(self._batches.popleft())
        if not known.is_worthwhile:
            return
        files = known.foresight.files(indices)
        if not self._by_path:
            files = files[1:]  # the program is at the first one before any process is
        jobs = [Job(path, known) for path in files]
        self._batches.append(jobs)
        for job in jobs:
            self._by_path.setdefault(job.path, deque()).append(job)
        self._waiting.extend(jobs)
        while len(self._processes) < min(self._most, len(jobs)):
            self._processes.append(Process())
        let_threads_rest()
        self._hand_out()

    def _give_up(self, jobs: Iterable[Job]) -> None:
        """Forget what no one has asked for."""
        for job in jobs:
            if job.is_wanted:
                job.known.wasted += 1
                self._forget(job)
                self._free(job)

    def _forget(self, job: Job) -> None:
        job.is_wanted = False
        left = self._by_path[job.path]
        left.remove(job)
        if not left:
            del self._by_path[job.path]

    def _free(self, job: Job) -> None:
        """The program has no more use of a place."""
        self._ahead.pop(job, None)
        if job.process is not None and job.is_over:
            job.process.free.append(job.place)

    def _hand_out(self) -> None:
        """Give files to the processes that have places for them."""
        for process in self._processes:
            process.listen(wait=False)
        for least in range(PLACES, 0, -1):
            for process in self._processes:
                if len(process.free) >= least and (job := self._next()) is not None:
                    process.take(job)

    def _next(self) -> Job | None:
        """One that no one has begun with."""
        while self._waiting:
            job = self._waiting.popleft()
            if job.is_wanted:
                return job
        return None

    # An image is to be decoded

    def load(self, image: Any) -> Any:
        """Decode an image, or take the pixels that are there."""
        if type(image) is self._kind and image.tile and self._pid == os.getpid():
            try:
                with self._lock:
                    self._take(image)
            except Exception as error:  # noqa: BLE001 - reported
                self._on_failure(error)
        return self._own_load(image)

    def _take(self, image: Any) -> None:
        path = path_of(image)
        if path is None:
            return
        let_threads_rest()  # they may have been called by the last sample
        if self._last is not None:
            self._last.opened.append(path)
        if path not in self._by_path:
            return
        job = self._by_path[path][0]
        if job.process is not None:
            while not job.is_over:
                self._use_the_wait(job.process)
        found = self._ahead.get(job)
        key = repr(identity(image))
        if job.process is not None and job.made is not None and job.made[0] == key:
            finish(image, job.process.pixels(job))
        elif found is not None and found[0] == key:
            finish(image, found[1])
        job.known.used += not image.tile
        job.known.wasted += bool(image.tile and (job.made or found))
        self._forget(job)
        self._free(job)
        self._hand_out()

    def _use_the_wait(self, process: Process) -> None:
        """Decode another file while a process is at the one that is wanted."""
        self._hand_out()
        other = self._next() if len(self._ahead) < PLACES else None
        if other is None:
            process.listen(wait=True)
        elif (made := self._decoded(other.path)) is not None:
            self._ahead[other] = made

    def _decoded(self, path: str) -> tuple[str, Any] | None:
        """What a file is decoded to, here and now, and its identity."""
        try:
            with open(path, "rb") as file:
                image = self._kind(file)
                key = identity(image)
                if key is None:
                    return None
                self._own_load(image)
                return repr(key), image.im
        except Exception:  # noqa: BLE001 - the program meets it when it opens the file itself
            return None
