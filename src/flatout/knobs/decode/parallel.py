"""The images of a batch, decoded by other processes while the program is at the first of them."""

from __future__ import annotations

import contextlib
import json
import mmap
import os
import select
import socket
import subprocess
import sys
import tempfile
import threading
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import PIL
from PIL import Image, ImageFile
from torch.utils import data
from torch.utils.data import dataloader

from flatout.intercept import engagement
from flatout.intercept.identity import WeakIdentityDict
from flatout.intercept.openmp import release_threads
from flatout.intercept.patch import Undo, wrap_function
from flatout.knobs.decode import decoder, images
from flatout.knobs.decode.foresight import Foresight
from flatout.knobs.decode.images import finish, identity, is_small, path_of

MOST_PROCESSES = 16

PLACES = 3
"""Images of a process that are being decoded, are to be, or wait for the program."""

PLACE_BYTES = 1 << 25
"""For one image, of which it takes what it needs: eight million pixels of four bytes."""

BATCHES_KEPT = 4
"""Batches that a loader may be asked for before the files of the first are given up: a thread that
fetches ahead asks for some."""

MOST_OPENED = 4096
"""Files that a batch may open, for it to teach which ones its samples do."""

JUDGED_AFTER = 256
"""Files decoded for a dataset, after which most of them must have been of use."""

IDLE_S = 30.0
"""After which the processes end when they are not in use any more; a comparison soon wants them
again."""

STALLED_S = 10.0
"""After which a process that owes an answer is given up, and the knob with it."""

NOT_INHERITED = ("LD_PRELOAD", "GLIBC_TUNABLES")
"""Variables that are meant for the program alone."""

_NO_SIGNAL = getattr(socket, "MSG_NOSIGNAL", 0)
"""A process that has ended must not end the program, which may have SIGPIPE at its default."""


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
        self.free = list(range(PLACES))
        self._jobs: dict[int, Job] = {}
        self._count = 0
        self._said = b""
        folders = [str(Path(__file__).parent), str(Path(PIL.__file__).parents[1])]
        self._line, other = socket.socketpair()
        with _shared_file(PLACES * PLACE_BYTES) as descriptor, other:
            self._memory = memoryview(mmap.mmap(descriptor, 0))
            passed = other.fileno(), descriptor
            self._process = subprocess.Popen(
                [
                    *(sys.executable, "-I", "-S", decoder.__file__),
                    *map(str, (*passed, PLACE_BYTES, images.SETTLED_S, *folders)),
                ],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
                pass_fds=passed,
                env={k: v for k, v in os.environ.items() if k not in NOT_INHERITED},
            )
        self._poll = select.poll()
        self._poll.register(self._line, select.POLLIN)

    def take(self, job: Job) -> None:
        """Let it decode a file.

        Raises:
            OSError: it has ended.
        """
        self._count += 1
        asked = self._count, self.free.pop(), os.path.abspath(job.path)
        job.process, job.place = self, asked[1]
        self._jobs[self._count] = job
        line = json.dumps((*asked, bool(ImageFile.LOAD_TRUNCATED_IMAGES))) + "\n"
        self._line.sendall(line.encode(), _NO_SIGNAL)

    def listen(self, *, wait: bool) -> None:
        """Note what it has made, and wait for one, if asked to.

        Raises:
            EOFError: it has ended.
            TimeoutError: it does not answer.
        """
        while self._jobs and self._poll.poll(1e3 * STALLED_S if wait else 0):
            part = self._line.recv(1 << 16)
            if not part:
                raise EOFError("a process that decodes images has ended")
            *lines, self._said = (self._said + part).split(b"\n")
            for line in lines:
                number, made = json.loads(line)
                job = self._jobs.pop(number)
                job.made, job.is_over = made and (made[0], made[1], tuple(made[2])), True
                if not job.is_wanted:
                    self.free.append(job.place)
                wait = False
        if wait and self._jobs:
            raise TimeoutError(f"a process that decodes images has not answered for {STALLED_S} s")

    def pixels(self, job: Job) -> Any:
        """A copy of what it has made, as Pillow has it."""
        assert job.made is not None
        _, mode, size = job.made
        at = job.place * PLACE_BYTES
        count = size[0] * size[1] * (1 if mode == "L" else 4)
        memory = self._memory[at : at + count]
        return Image.frombytes(mode, size, memory, "raw", decoder.MAPPED[mode]).im

    def end(self) -> None:
        """Let it end, and see to it that it does."""
        with contextlib.suppress(OSError):
            self._line.shutdown(socket.SHUT_RDWR)  # a fork may have the line as well
        self._line.close()
        try:
            self._process.wait(1.0)
        except subprocess.TimeoutExpired:
            self._process.kill()
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
        self._decode: Callable[[Any], Any] = ImageFile.ImageFile.load
        self._known: WeakIdentityDict[Any, Known] = WeakIdentityDict()
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
        self._decode = ImageFile.ImageFile.load
        self._last = None
        self._is_installed = True
        iterator = dataloader._BaseDataLoaderIter
        with contextlib.ExitStack() as undo:
            undo.callback(self._stop)
            undo.callback(wrap_function(ImageFile.ImageFile, "load", self._on_failure, self.load))
            undo.callback(wrap_function(iterator, "_next_index", self._on_failure, self.next_index))
            return undo.pop_all().close

    def _stop(self) -> None:
        """Nothing is asked for any more; the processes end if that lasts."""
        if self._pid != os.getpid():
            return
        with self._lock:
            for jobs in self._batches:
                self._give_up(jobs)
            self._forget_all()
            self._is_installed = False
        if self._processes:
            timer = threading.Timer(IDLE_S, self._end)
            timer.daemon = True
            timer.start()

    def _end(self) -> None:
        """End the processes, unless they are in use again."""
        with self._lock:
            idle = [] if self._is_installed else self._processes
            self._processes = [] if idle else self._processes
        for process in idle:
            process.end()

    # A batch is asked for

    def next_index(self, own: Callable[[Any], Any], iterator: Any) -> Any:
        """The indices of a loader's next batch, by torch's method ``own``."""
        index = own(iterator)
        if (
            self._is_installed
            and type(iterator) is dataloader._SingleProcessDataLoaderIter
            and iterator._dataset_kind == dataloader._DatasetKind.Map
            and data.get_worker_info() is None
            and self._pid == os.getpid()
        ):
            with self._lock:
                self._begin(iterator._dataset, index if iterator._auto_collation else [index])
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
        if not files:
            return
        jobs = [Job(path, known) for path in files]
        self._batches.append(jobs)
        for job in jobs:
            self._by_path.setdefault(job.path, deque()).append(job)
        self._waiting.extend(jobs)
        while len(self._processes) < min(self._most, len(jobs)):
            self._processes.append(Process())
        release_threads()
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

    def load(self, own: Callable[[Any], Any], image: Any) -> Any:
        """Decode an image by Pillow's method ``own``, or take the pixels that are there."""
        if (
            self._is_installed
            and type(image) is self._kind
            and image.tile
            and self._pid == os.getpid()
        ):
            with self._lock:
                self._take(image)
        return own(image)

    def _take(self, image: Any) -> None:
        path = path_of(image)
        if path is None:
            return
        if self._last is not None and len(self._last.opened) < MOST_OPENED:
            self._last.opened.append(path)
        if path not in self._by_path:
            return
        release_threads()  # they may have been called by the last sample
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
        engagement.calls["decode"] += not image.tile
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
                if key is None or not is_small(image, PLACE_BYTES):
                    return None
                self._decode(image)
                return repr(key), image.im
        except Exception:  # noqa: BLE001 - the program meets it when it opens the file itself
            return None
