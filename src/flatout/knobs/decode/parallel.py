"""Decode the images of a batch in other processes while the program opens them one by one."""

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

from flatout.intercept import handled_calls
from flatout.intercept.identity import WeakIdentityDict
from flatout.intercept.openmp import release_threads
from flatout.intercept.patch import Undo, wrap_function
from flatout.knobs.decode import decoder, images
from flatout.knobs.decode.foresight import Foresight
from flatout.knobs.decode.images import finish, identity, is_small, path_of

MOST_PROCESSES = 16

SLOTS = 3
"""Maximum number of images that each process decodes or keeps ready for the program."""

SLOT_BYTES = 1 << 25
"""The address space for one image, 8 million pixels of four bytes; memory is used only as
needed."""

BATCHES_KEPT = 4
"""The files of a batch are given up once this many later batches have been requested; a thread that
prefetches requests some."""

MOST_OPENED = 4096
"""Maximum number of files of a batch from which it is learned which files its samples open."""

JUDGED_AFTER = 256
"""Once this many files of a dataset have been decoded in advance, most of them must have been
used."""

IDLE_S = 30.0
"""Unused processes end after this time; they are kept for a while because a comparison applies and
undoes the knob repeatedly."""

STALLED_S = 10.0
"""A process that does not answer for this long is given up, and the knob is withdrawn."""

NOT_INHERITED = ("LD_PRELOAD", "GLIBC_TUNABLES")
"""Environment variables that the processes do not get."""

_NO_SIGNAL = getattr(socket, "MSG_NOSIGNAL", 0)
"""Without this flag, writing to a process that has ended would kill the program by SIGPIPE."""


class Job:
    """A file to be decoded in advance.

    Attributes:
        path: the path of the file.
        dataset: the dataset whose samples will open it.
        process: the process that decodes it; ``None``: none yet.
        slot: the slot in that process's shared memory.
        result: the process's answer, see ``decoder.py``; ``None``: no image, or no answer yet.
        is_answered: whether the process has answered.
        is_wanted: whether the program may still open the file.
    """

    def __init__(self, path: str, dataset: DatasetState) -> None:
        self.path = path
        self.dataset = dataset
        self.process: Process | None = None
        self.slot = 0
        self.result: tuple[str, str, Any] | None = None
        self.is_answered = False
        self.is_wanted = True


class DatasetState:
    """What has been learned about the dataset of a loader.

    Args:
        dataset: the dataset.

    Attributes:
        foresight: predicts its files.
        used, wasted: how many files that were decoded in advance were used, and were not.
        indices: the indices of its last batch.
        opened: the files opened since that batch was requested.
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
    """A running ``decoder.py``.

    Attributes:
        free_slots: the slots of its shared memory that are not in use.

    Raises:
        OSError: the process cannot be started.
    """

    def __init__(self) -> None:
        self.free_slots = list(range(SLOTS))
        self._jobs: dict[int, Job] = {}
        self._count = 0
        self._partial_line = b""
        folders = [str(Path(__file__).parent), str(Path(PIL.__file__).parents[1])]
        self._socket, other = socket.socketpair()
        with _shared_file(SLOTS * SLOT_BYTES) as descriptor, other:
            self._memory = memoryview(mmap.mmap(descriptor, 0))
            descriptors = other.fileno(), descriptor
            self._process = subprocess.Popen(
                [
                    *(sys.executable, "-I", "-S", decoder.__file__),
                    *map(str, (*descriptors, SLOT_BYTES, images.SETTLED_S, *folders)),
                ],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
                pass_fds=descriptors,
                env={k: v for k, v in os.environ.items() if k not in NOT_INHERITED},
            )
        self._poll = select.poll()
        self._poll.register(self._socket, select.POLLIN)

    def start(self, job: Job) -> None:
        """Let the process decode a file into a free slot.

        Raises:
            OSError: the process has ended.
        """
        self._count += 1
        request = self._count, self.free_slots.pop(), os.path.abspath(job.path)
        job.process, job.slot = self, request[1]
        self._jobs[self._count] = job
        line = json.dumps((*request, bool(ImageFile.LOAD_TRUNCATED_IMAGES))) + "\n"
        self._socket.sendall(line.encode(), _NO_SIGNAL)

    def read_answers(self, *, wait: bool) -> None:
        """Read the answers that have arrived; with ``wait``, wait for at least one.

        Raises:
            EOFError: the process has ended.
            TimeoutError: it does not answer.
        """
        while self._jobs and self._poll.poll(1e3 * STALLED_S if wait else 0):
            part = self._socket.recv(1 << 16)
            if not part:
                raise EOFError("a process that decodes images has ended")
            *lines, self._partial_line = (self._partial_line + part).split(b"\n")
            for line in lines:
                number, result = json.loads(line)
                job = self._jobs.pop(number)
                job.result = result and (result[0], result[1], tuple(result[2]))
                job.is_answered = True
                if not job.is_wanted:
                    self.free_slots.append(job.slot)
                wait = False
        if wait and self._jobs:
            raise TimeoutError(f"a process that decodes images has not answered for {STALLED_S} s")

    def pixels(self, job: Job) -> Any:
        """A copy of the decoded pixels of a job, as a Pillow core image."""
        assert job.result is not None
        _, mode, size = job.result
        begin = job.slot * SLOT_BYTES
        count = size[0] * size[1] * (1 if mode == "L" else 4)
        memory = self._memory[begin : begin + count]
        return Image.frombytes(mode, size, memory, "raw", decoder.MAPPED[mode]).im

    def end(self) -> None:
        """Close the connection, so that the process ends; kill it if it does not within 1 s."""
        with contextlib.suppress(OSError):
            self._socket.shutdown(socket.SHUT_RDWR)  # a forked process may have the socket as well
        self._socket.close()
        try:
            self._process.wait(1.0)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()


@contextlib.contextmanager
def _shared_file(size: int) -> Any:
    """The descriptor of a new file in memory, which is closed at the end; mappings stay valid."""
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
    """Replaces ``ImageFile.load`` of Pillow and ``_next_index`` of torch's loaders.

    When a loader without workers fetches a batch, processes decode the files that its samples will
    open. The program opens each file as before, and uses the pixels that a process has decoded. It
    decodes a file itself if no process has begun with it. If a process has begun with it, the
    program decodes another file while it waits.

    Args:
        processes: the most processes to start, besides the program's own.
        kind: the class of images that are decoded in advance, without its subclasses.
        on_failure: called with the exception if this fails; Pillow then decodes the image.
    """

    def __init__(
        self, processes: int, kind: type[Any], on_failure: Callable[[Exception], None]
    ) -> None:
        self._most_processes = min(processes, MOST_PROCESSES)
        self._kind = kind
        self._on_failure = on_failure
        self._pillow_load: Callable[[Any], Any] = ImageFile.ImageFile.load
        self._datasets: WeakIdentityDict[Any, DatasetState] = WeakIdentityDict()
        self._last: DatasetState | None = None
        self._lock = threading.RLock()  # one thread may fetch a batch that another has requested
        self._pid = os.getpid()
        self._processes: list[Process] = []
        self._is_installed = False
        self._clear_jobs()

    def _clear_jobs(self) -> None:
        self._waiting: deque[Job] = deque()
        self._by_path: dict[str, deque[Job]] = {}
        self._batches: deque[list[Job]] = deque()
        self._decoded_here: dict[Job, tuple[str, Any]] = {}

    def install(self) -> Undo:
        """Replace both methods; returns the undo."""
        self._pillow_load = ImageFile.ImageFile.load
        self._last = None
        self._is_installed = True
        iterator = dataloader._BaseDataLoaderIter
        with contextlib.ExitStack() as undo:
            undo.callback(self._stop)
            undo.callback(wrap_function(ImageFile.ImageFile, "load", self._on_failure, self.load))
            undo.callback(wrap_function(iterator, "_next_index", self._on_failure, self.next_index))
            return undo.pop_all().close

    def _stop(self) -> None:
        """Give up all jobs, and end the processes later if they are not used again."""
        if self._pid != os.getpid():
            return
        with self._lock:
            for jobs in self._batches:
                self._give_up(jobs)
            self._clear_jobs()
            self._is_installed = False
        if self._processes:
            timer = threading.Timer(IDLE_S, self._end_idle)
            timer.daemon = True
            timer.start()

    def _end_idle(self) -> None:
        """End the processes, unless they are in use again."""
        with self._lock:
            idle = [] if self._is_installed else self._processes
            self._processes = [] if idle else self._processes
        for process in idle:
            process.end()

    # A loader requests a batch

    def next_index(self, original: Callable[[Any], Any], iterator: Any) -> Any:
        """Get the indices of a loader's next batch from torch, and start to decode its files."""
        index = original(iterator)
        if (
            self._is_installed
            and type(iterator) is dataloader._SingleProcessDataLoaderIter
            and iterator._dataset_kind == dataloader._DatasetKind.Map
            and data.get_worker_info() is None
            and self._pid == os.getpid()
        ):
            with self._lock:
                self._start_batch(iterator._dataset, index if iterator._auto_collation else [index])
        return index

    def _start_batch(self, dataset: Any, indices: Any) -> None:
        if self._last is not None:
            self._last.foresight.learn(self._last.indices, self._last.opened)
            self._last = None
        try:
            state = self._datasets.get(dataset)
            state = state or self._datasets.setdefault(dataset, DatasetState(dataset))
        except TypeError:
            return  # it is a list, whose samples are in memory
        if type(indices) is not list or not all(type(index) is int for index in indices):
            return
        state.indices, state.opened = indices, []
        self._last = state
        while len(self._batches) >= BATCHES_KEPT:
            self._give_up(self._batches.popleft())
        if not state.is_worthwhile:
            return
        files = state.foresight.files(indices)
        if not self._by_path:
            files = files[1:]  # the program opens the first one before any process could
        if not files:
            return
        jobs = [Job(path, state) for path in files]
        self._batches.append(jobs)
        for job in jobs:
            self._by_path.setdefault(job.path, deque()).append(job)
        self._waiting.extend(jobs)
        while len(self._processes) < min(self._most_processes, len(jobs)):
            self._processes.append(Process())
        release_threads()
        self._distribute()

    def _give_up(self, jobs: Iterable[Job]) -> None:
        """Forget the jobs whose files the program has not opened."""
        for job in jobs:
            if job.is_wanted:
                job.dataset.wasted += 1
                self._forget(job)
                self._free_slot(job)

    def _forget(self, job: Job) -> None:
        job.is_wanted = False
        remaining = self._by_path[job.path]
        remaining.remove(job)
        if not remaining:
            del self._by_path[job.path]

    def _free_slot(self, job: Job) -> None:
        """Free the memory of a job that the program does not need any more."""
        self._decoded_here.pop(job, None)
        if job.process is not None and job.is_answered:
            job.process.free_slots.append(job.slot)

    def _distribute(self) -> None:
        """Give waiting jobs to the processes, first to those with the most free slots."""
        for process in self._processes:
            process.read_answers(wait=False)
        for least in range(SLOTS, 0, -1):
            for process in self._processes:
                if len(process.free_slots) >= least and (job := self._next_job()) is not None:
                    process.start(job)

    def _next_job(self) -> Job | None:
        """The next job that has not been started; ``None`` if there is none."""
        while self._waiting:
            job = self._waiting.popleft()
            if job.is_wanted:
                return job
        return None

    # The program decodes an image

    def load(self, original: Callable[[Any], Any], image: Any) -> Any:
        """Use the pixels that a process has decoded, or decode an image with Pillow's method."""
        if (
            self._is_installed
            and type(image) is self._kind
            and image.tile
            and self._pid == os.getpid()
        ):
            with self._lock:
                self._finish_if_decoded(image)
        return original(image)

    def _finish_if_decoded(self, image: Any) -> None:
        path = path_of(image)
        if path is None:
            return
        if self._last is not None and len(self._last.opened) < MOST_OPENED:
            self._last.opened.append(path)
        if path not in self._by_path:
            return
        release_threads()  # the last sample may have woken OpenMP's threads
        job = self._by_path[path][0]
        if job.process is not None:
            while not job.is_answered:
                self._work_while_waiting(job.process)
        decoded_here = self._decoded_here.get(job)
        key = repr(identity(image))
        if job.process is not None and job.result is not None and job.result[0] == key:
            finish(image, job.process.pixels(job))
        elif decoded_here is not None and decoded_here[0] == key:
            finish(image, decoded_here[1])
        job.dataset.used += not image.tile
        handled_calls.counts["decode"] += not image.tile
        job.dataset.wasted += bool(image.tile and (job.result or decoded_here))
        self._forget(job)
        self._free_slot(job)
        self._distribute()

    def _work_while_waiting(self, process: Process) -> None:
        """Decode another file, or wait for the process if there is no other."""
        self._distribute()
        other = self._next_job() if len(self._decoded_here) < SLOTS else None
        if other is None:
            process.read_answers(wait=True)
        elif (decoded := self._decode_here(other.path)) is not None:
            self._decoded_here[other] = decoded

    def _decode_here(self, path: str) -> tuple[str, Any] | None:
        """Decode a file in this process; returns its identity and its pixels."""
        try:
            with open(path, "rb") as file:
                image = self._kind(file)
                key = identity(image)
                if key is None or not is_small(image, SLOT_BYTES):
                    return None
                self._pillow_load(image)
                return repr(key), image.im
        except Exception:  # noqa: BLE001 - the program gets it when it opens the file itself
            return None
