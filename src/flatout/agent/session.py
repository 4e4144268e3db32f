"""The agent of one process: reads the request, watches, records, and does what was asked.

Whatever goes wrong in here is written to the record with its traceback, and the user's program goes
on as if flatout were not there.
"""

from __future__ import annotations

import atexit
import contextlib
import functools
import multiprocessing.util
import os
import platform
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from flatout import knobs
from flatout.agent.inputs import FirstInputs
from flatout.agent.modules import write_modules
from flatout.errors import RefusedError
from flatout.intercept import engagement
from flatout.intercept.capture import is_capturing
from flatout.intercept.containment import attempt, contain, unreported
from flatout.intercept.host import Host
from flatout.intercept.losses import abandon, arrived_losses, peak_device_bytes
from flatout.wire.record import ENVIRONMENT_NAMES, RECORD_VERSION, RecordWriter
from flatout.wire.request import Request
from flatout.wire.turns import Turn

if TYPE_CHECKING:
    from flatout.agent.guard import Guard
    from flatout.agent.inspection import Inspector


class Session:
    """One process under flatout, from ``import torch`` to its end.

    Args:
        request: what the controller asks for.
        run_directory: where the record is written.

    Attributes:
        host: what knobs and stages use of this process.

    A child process that is forked or made by ``multiprocessing`` is quiet: it leaves no record
    before the first step of its own, so that data loader workers leave none.
    """

    def __init__(self, request: Request, run_directory: Path) -> None:
        self.request = request
        self.record = RecordWriter(run_directory, os.getpid())
        self.host = Host(
            request,
            self.record,
            knobs.apply,
            step_closed=self._step_closed,
            may_read=self._read,
            watch_failed=self._watch_failed,
        )
        self.hooks = self.host.hooks
        self._guard: Guard | None = None
        self._stages: list[Callable[[Turn], bool]] = []
        self._timed_from_ns: int | None = None
        self._steps_timed = 0
        self._close_profiler: Callable[[], None] = lambda: None
        self._inspector: Inspector | None = None
        self._asleep = False
        self._is_quiet = _is_worker()

    # Life

    def start(self) -> None:
        """Begin to watch; torch has just been imported."""
        request = self.request
        if not self._is_quiet:
            self._speak()
        if request.seed is not None:
            from flatout.agent import seeds

            seeds.sow(request.seed)
        if request.comparison is not None:
            from flatout.agent.learning import Learner
            from flatout.agent.switch import Switch

            compares = Learner if request.learn else Switch
            self._stages.append(compares(self.host, request.comparison).at_boundary)
        elif request.relay is not None:
            from flatout.agent.relay import Runner

            self._stages.append(Runner(self.host, request.relay).at_boundary)
        elif request.stop_steps is not None or request.stop_seconds is not None:
            self._stages.append(self._timed)
        if request.profile_steps:
            from flatout.agent.profile import Profiler

            profiler = Profiler(self.host, request.profile_steps)
            self._stages.append(profiler.at_boundary)
            self._close_profiler = profiler.close
        if self._stages and not request.learn:
            self._stages.append(self._stop)
        try:
            self.hooks.install(live=bool(self._stages))
        except BaseException:
            self.hooks.remove()
            raise
        self._apply_settings()
        if request.inspection is not None:
            from flatout.agent.inspection import Inspector

            self._inspector = Inspector(self.host, request.inspection)
        if request.guard is not None:
            from flatout.agent.guard import Guard

            self._guard = Guard(self.host, request.guard)
            self._guard.install()
        self.host.forward_wrappers.append(FirstInputs(self.host))
        atexit.register(contain(self.host.events.on_failure_of("exit"), self.finish), "exit")
        os.register_at_fork(
            after_in_child=contain(self.host.events.on_failure_of("fork"), self._forked)
        )
        multiprocessing.util.register_after_fork(
            self, contain(self.host.events.on_failure_of("fork"), _finish_at_its_end)
        )
        if not self._is_quiet:
            self.record.flush()

    def finish(self, reason: str) -> None:
        """Write the rest of the record; called at the exit or at the stop."""
        if self._asleep:
            return
        self._stages.clear()
        for subject, part in self._last_parts(reason):
            attempt(self.host.events.on_failure_of(subject), part)
        self._asleep = True

    def _last_parts(self, reason: str) -> Iterator[tuple[str, Callable[[], object]]]:
        """What is done at the end; each may fail without the others."""
        if reason == "exit":
            yield "profile", self._close_profiler
        yield "watch", self.hooks.read
        yield "watch", self.hooks.turns.finish
        if self._inspector is not None:
            yield "inspection", self._inspector.stop if self._is_quiet else self._inspector.close
        if self._guard is not None:
            yield "guard", self._guard.finish
        yield "watch", self._remove
        if not self._is_quiet:
            yield "knobs", self._write_unused
            yield "record", functools.partial(self._write_events, wait=True)
            yield "record", self._write_unreported
            yield "record", functools.partial(write_modules, self.record)
            yield "record", functools.partial(self._write_end, reason)
            yield "record", self.record.close

    def _write_unused(self) -> None:
        """Say which knobs have had no effect: none of the calls that they wait for came."""
        applied = self.host.applied
        for name in sorted(applied.ever - engagement.calls.keys() - applied.failures.keys()):
            if knobs.get(name).waits_for_calls:
                self.host.events.add("unused", name, "no call came that it takes")

    def _write_unreported(self) -> None:
        while unreported:
            self.host.events.add_failure("agent", unreported.pop(0))

    def _write_end(self, reason: str) -> None:
        self.record.write(
            {
                "kind": "end",
                "at_s": self._at_s(time.perf_counter_ns()),
                "reason": reason,
                "peak_device_bytes": peak_device_bytes(),
            }
        )

    def _timed(self, turn: Turn) -> bool:
        if self.host.counts_as_step(turn):
            self._steps_timed += 1
        limit = self.request.stop_steps
        return limit is not None and self._steps_timed >= limit

    def _stop(self, turn: Turn) -> bool:
        self.host.events.add("stopped", "program", "all the steps asked for have been recorded")
        self.finish("stopped")
        for stream in (sys.stdout, sys.stderr):
            with contextlib.suppress(OSError, ValueError, AttributeError):
                stream.flush()
        os._exit(0)

    def _sleep(self) -> None:
        if self._inspector is not None:
            self._inspector.stop()
        self._asleep = True
        self._stages.clear()
        self._remove()

    def _remove(self) -> None:
        if self._guard is not None:
            self._guard.remove()
        self.hooks.remove()

    def _forked(self) -> None:
        """In the child of a fork."""
        abandon((tuple(self._stages), self.hooks.turns))  # which hold losses on their way
        self._stages.clear()
        self._close_profiler = lambda: None
        self.record.restart(os.getpid())
        engagement.calls.clear()
        self.hooks.restart()
        if self._guard is not None:
            self._guard.restart()
        self._is_quiet = True

    def _watch_failed(self, subject: str, error: Exception) -> None:
        """What watches has failed: say so in the record and leave the program alone."""
        self.host.events.add_failure(subject, error)
        if self._is_quiet:
            self._speak()
        self._write_events(wait=False)
        self.record.flush()
        self._sleep()

    def _apply_settings(self) -> None:
        if not self.request.settings:
            return
        import torch

        proof = self.request.proof
        for name, setting in self.request.settings.items():
            if proof is not None and name in proof.knobs and proof.torch != torch.__version__:
                self.host.events.add(
                    "skipped",
                    name,
                    f"proven with torch {proof.torch}, this is {torch.__version__}",
                )
                continue
            if attempt(self.host.events.on_failure_of(name), self._applied, name, setting):
                self.host.events.add("applied", name, f"set to {setting} by the plan")

    def _applied(self, name: str, setting: str) -> bool:

        try:
            self.host.applied.apply(name, setting)
        except RefusedError as refusal:
            self.host.events.add("skipped", name, str(refusal))
            return False
        return True

    # The record

    def _speak(self) -> None:
        """Begin the record."""
        self._is_quiet = False
        self.record.begin(_header(self.record))

    def _at_s(self, at_ns: int) -> float:
        return round(self.record.seconds(at_ns), 6)

    def _read(self) -> None:
        """The log may be read: act on it, and write it down when that is due."""
        if is_capturing():
            return  # what has been queued must not be asked for now; the log keeps its events
        self.hooks.read()
        is_wanted = not self._stages or self.record.is_due()
        if is_wanted and not self._is_quiet and not self._asleep:
            self._write_events(wait=False)
            self.record.flush()

    def _write_events(self, wait: bool) -> None:
        self.record.write_events(self.hooks.pack())
        arrived = attempt(self._losses_failed, arrived_losses, self.hooks.losses, wait)
        if arrived:
            self.record.write_losses(arrived, peak_device_bytes())
        if self._guard is not None:
            self._guard.losses_arrived(arrived or [])

    def _losses_failed(self, error: Exception) -> None:
        """Such as an error of the device, after which nothing can be read from it."""
        abandon(self.hooks.losses)
        self.hooks.losses = []
        self.host.events.add_failure("loss", error)

    def _step_closed(self, turn: Turn) -> None:
        if self._asleep:
            return
        if self._is_quiet:
            if _is_loader_worker():
                self._sleep()
                return
            self._speak()
        if self._guard is not None:
            self._guard.at_boundary()
        if self.host.applied.failures:
            self.host.applied.undo_withdrawn()
        if self._stages:
            self._run_stages(turn)
        self.hooks.live = bool(self._stages)
        self.hooks.tracks_steps = self.hooks.root_search.is_active or bool(self._stages)

    def _run_stages(self, turn: Turn) -> None:
        limit_s = self.request.stop_seconds
        if self._timed_from_ns is None:
            self._timed_from_ns = turn.end_ns
        late = limit_s is not None and turn.end_ns - self._timed_from_ns > limit_s * 1e9
        while self._stages:
            stage = self._stages[0]
            failed = self.host.events.on_failure_of(getattr(stage, "__qualname__", repr(stage)))
            done = attempt(failed, stage, turn) is not False
            if not done and not (late and len(self._stages) > 1 and stage == self._timed):
                return
            self._stages.pop(0)


def _is_worker() -> bool:
    """Whether ``multiprocessing`` made this process, also while it still imports what it needs."""
    return multiprocessing.parent_process() is not None or getattr(
        multiprocessing.current_process(), "_inheriting", False
    )


def _finish_at_its_end(session: Session) -> None:
    """In a child made by ``multiprocessing``, which may end without ``atexit``."""
    multiprocessing.util.Finalize(None, session.finish, ("exit",), exitpriority=-1)


def _is_loader_worker() -> bool:
    """Whether a data loader made this process; torch 2.14 knows no more of it at its end."""
    from torch.utils.data import _utils, get_worker_info

    target = getattr(multiprocessing.current_process(), "_target", None)
    return get_worker_info() is not None or target is _utils.worker._worker_loop


def _header(record: RecordWriter) -> dict[str, Any]:
    import torch

    from flatout.intercept import device

    accelerator = device.accelerator()
    return {
        "kind": "header",
        "version": RECORD_VERSION,
        "pid": os.getpid(),
        "parent_pid": os.getppid(),
        "rank": _environment_int("RANK"),
        "world_size": _environment_int("WORLD_SIZE"),
        "started_unix_s": round(time.time(), 3),
        "started_ns": record.started_ns,
        "program": _program(),
        "executable": sys.executable,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "accelerator": accelerator.type if accelerator is not None else None,
        "environment": {name: os.environ[name] for name in ENVIRONMENT_NAMES if name in os.environ},
    }


def _environment_int(name: str) -> int | None:
    value = os.environ.get(name, "")
    return int(value) if value.isdigit() else None


def _program() -> str:
    """The script, or the module after ``-m``, whose name stands in ``argv`` only later."""
    name = os.path.basename(sys.argv[0]) if sys.argv else ""
    if name == "-m" and "-m" in sys.orig_argv[:-1]:
        return sys.orig_argv[sys.orig_argv.index("-m") + 1]
    return name
