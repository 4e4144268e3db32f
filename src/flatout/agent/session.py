"""The agent of one process, which watches torch, writes the record, and applies and measures
settings.

A failure of the agent is written to the record with its traceback, and the user's program continues
as it would without flatout.
"""

from __future__ import annotations

import atexit
import contextlib
import functools
import multiprocessing.util
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from flatout import knobs
from flatout.agent.imported_files import write_imported_files
from flatout.agent.inputs import FirstInputs
from flatout.agent.recorder import Recorder
from flatout.agent.stages import Stages
from flatout.agent.usage import UsageLog
from flatout.errors import RefusedError
from flatout.intercept import handled_calls
from flatout.intercept.capture import is_capturing
from flatout.intercept.containment import attempt, contain
from flatout.intercept.host import Host
from flatout.intercept.losses import abandon
from flatout.parallel import place as ranks
from flatout.wire.request import Request
from flatout.wire.turns import Turn
from flatout.wire.writer import RecordWriter

if TYPE_CHECKING:
    from flatout.agent.guard import Guard
    from flatout.agent.inspection import Inspector
    from flatout.parallel import Parallel


class Session:
    """The agent of one process, from ``import torch`` to the end of the process.

    A child process that is forked, or started by ``multiprocessing``, writes no record before its
    first step, so the worker processes of data loaders write no record at all.

    Args:
        request: the controller's request.
        run_directory: the directory to which the record is written.

    Attributes:
        request: the controller's request.
        record: the record of this process.
        host: the interface of knobs and stages to this process.
        hooks: the hooks of ``host``.
    """

    def __init__(self, request: Request, run_directory: Path) -> None:
        self.request = request
        self.record = RecordWriter(run_directory, os.getpid())
        self.host = Host(
            request,
            self.record,
            knobs.apply,
            on_step=self._end_step,
            on_readable=self._read,
            on_watch_failure=self._end_after_watch_failure,
        )
        self.hooks = self.host.hooks
        self._recorder = Recorder(self.host)
        self._usage = UsageLog(self.record, self.host.events.on_failure_of("CPU times"))
        self._stages = Stages(self.host, self._stop, self._usage)
        self._guard: Guard | None = None
        self._inspector: Inspector | None = None
        self._parallel: Parallel | None = None
        self._is_over = False
        self._waits_for_step = _is_child_of_multiprocessing()

    # Start and end of the process

    def start(self) -> None:
        """Start watching. torch must have been imported."""
        request, host = self.request, self.host
        if not self._waits_for_step:
            self._begin_record()
        if request.ranks is not None:
            from flatout.agent import seeds

            seeds.seed_alike(request.ranks.seed)
        if request.seed is not None:
            from flatout.agent import seeds

            seeds.set_seeds(request.seed)
        place = ranks.place()
        if place is None or place.rank == 0:  # the others end with rank 0, see ``_stop``
            self._stages.add_requested()
        try:
            self.hooks.install(live=bool(self._stages.pending))
        except BaseException:
            self.hooks.remove()
            raise
        self._apply_settings()
        if place is not None and not self._waits_for_step:
            self._join_ranks(place)
        if request.inspection is not None:
            from flatout.agent.inspection import Inspector

            self._inspector = Inspector(host, request.inspection)
        if request.guard is not None:
            from flatout.agent.guard import Guard

            self._guard = Guard(host, request.guard)
            self._guard.install()
        host.forward_wrappers.append(FirstInputs(host))
        self._register_process_hooks()
        if not self._waits_for_step:
            self.record.flush()

    def _join_ranks(self, place: ranks.Place) -> None:
        """Share out root calls from now on, inside of all wrappers that are added later."""
        from flatout import parallel

        self._parallel = parallel.install(self.host, place, self.finish)
        if "ranks" in self.request.settings.keys() - self.host.applied.names:
            parallel.leave()

    def _register_process_hooks(self) -> None:
        on_failure_of = self.host.events.on_failure_of
        atexit.register(contain(on_failure_of("exit"), self.finish), "exit")
        os.register_at_fork(after_in_child=contain(on_failure_of("fork"), self._restart_after_fork))
        multiprocessing.util.register_after_fork(
            self, contain(on_failure_of("fork"), _finish_with_multiprocessing)
        )

    def finish(self, reason: str) -> None:
        """Write the rest of the record when the program exits or is stopped.

        Args:
            reason: ``exit`` or ``stopped``, see ``lines.End``.
        """
        if self._is_over:
            return
        self._stages.pending.clear()
        for subject, part in self._last_parts(reason):
            attempt(self.host.events.on_failure_of(subject), part)
        self._is_over = True

    def _last_parts(self, reason: str) -> Iterator[tuple[str, Callable[[], object]]]:
        """Yield the functions to call at the end, each with the subject for its failures. If one
        fails, the others are still called."""
        if reason == "exit":
            yield "profile", self._stages.close_profiler
        yield "watch", self.hooks.read
        yield "watch", self.hooks.turns.finish
        if self._inspector is not None:
            is_wanted = not self._waits_for_step
            yield "inspection", self._inspector.close if is_wanted else self._inspector.stop
        if self._guard is not None:
            yield "guard", self._guard.finish
        if self._parallel is not None:
            yield "ranks", self._parallel.close
        yield "watch", self._remove
        if not self._waits_for_step:
            yield "knobs", self._recorder.write_unused
            yield "record", functools.partial(self._write_events, wait=True)
            yield "record", self._usage.note
            yield "record", self._recorder.write_unreported
            yield "record", functools.partial(write_imported_files, self.record)
            yield "record", functools.partial(self._recorder.write_end, reason)
            yield "record", self.record.flush

    def _stop(self, turn: Turn) -> bool:
        """End the process. This is the last stage."""
        self.host.events.add("stopped", "program", "all the steps asked for have been recorded")
        if self._parallel is not None:
            self._parallel.dismiss()
        self.finish("stopped")
        for stream in (sys.stdout, sys.stderr):
            with contextlib.suppress(OSError, ValueError, AttributeError):
                stream.flush()
        os._exit(0)

    def _end_without_record(self) -> None:
        """Stop watching for good, and write nothing more."""
        if self._inspector is not None:
            self._inspector.stop()
        self._is_over = True
        self._stages.pending.clear()
        self._remove()

    def _remove(self) -> None:
        if self._guard is not None:
            self._guard.remove()
        self.hooks.remove()

    def _restart_after_fork(self) -> None:
        """Start the agent of a new process, the child of a fork."""
        # Stages and the state machine may hold losses that only the parent may release.
        abandon((tuple(self._stages.pending), self.hooks.turns))
        self._stages.pending.clear()
        self._stages.forget_profiler()
        self.record.restart(os.getpid())
        self._usage.restart()
        handled_calls.counts.clear()
        self.hooks.restart()
        if self._parallel is not None:
            self._parallel.forget()
        if self._guard is not None:
            self._guard.restart()
        self._waits_for_step = True

    def _end_after_watch_failure(self, subject: str, error: Exception) -> None:
        """Record that watching has failed, and stop watching."""
        self.host.events.add_failure(subject, error)
        if self._waits_for_step:
            self._begin_record()
        self._write_events(wait=False)
        self.record.flush()
        self._end_without_record()

    # Settings

    def _apply_settings(self) -> None:
        if not self.request.settings:
            return
        import torch

        proof = self.request.proof
        for name, setting in self.request.settings.items():
            if proof is not None and name in proof.knobs and proof.torch != torch.__version__:
                why = f"proven with torch {proof.torch}, this is {torch.__version__}"
                self.host.events.add("skipped", name, why)
                continue
            on_failure = self.host.events.on_failure_of(name)
            if attempt(on_failure, self._apply_setting, name, setting):
                self.host.events.add("applied", name, f"set to {setting} by the plan")

    def _apply_setting(self, name: str, setting: str) -> bool:
        """Apply a setting of the plan; return false if the knob refuses it."""
        try:
            self.host.applied.apply(name, setting)
        except RefusedError as refusal:
            self.host.events.add("skipped", name, str(refusal))
            return False
        return True

    # The record

    def _begin_record(self) -> None:
        self._waits_for_step = False
        self._recorder.write_header()
        self._usage.note()

    def _read(self) -> None:
        """Read the log of the hooks, and write it to the record if that is due."""
        if is_capturing():
            return  # losses must not be read during a capture; the log keeps its events
        self.hooks.read()
        is_due = not self._stages.pending or self.record.is_due()
        if is_due and not self._waits_for_step and not self._is_over:
            self._write_events(wait=False)
            self._recorder.write_fixed_work()
            self._usage.note_if_due(bool(self._stages.pending))
            self.record.flush()

    def _write_events(self, wait: bool) -> None:
        losses = self._recorder.write_events(wait)
        if self._guard is not None:
            self._guard.add_losses(losses)

    # Step boundaries

    def _end_step(self, turn: Turn) -> None:
        if self._is_over:
            return
        if self._waits_for_step:
            if _is_loader_worker():
                self._end_without_record()
                return
            self._begin_record()
        if self._guard is not None:
            self._guard.at_boundary()
        applied = self.host.applied
        if applied.has_withdrawn:
            applied.undo_withdrawn(turn)
        if self._stages.pending:
            self._stages.run(turn)
        is_live = bool(self._stages.pending) or applied.has_withdrawn
        self.hooks.live = is_live
        self.hooks.tracks_steps = self.hooks.root_search.is_active or is_live


def _is_child_of_multiprocessing() -> bool:
    """Whether ``multiprocessing`` started this process, which may still be importing modules."""
    return multiprocessing.parent_process() is not None or getattr(
        multiprocessing.current_process(), "_inheriting", False
    )


def _finish_with_multiprocessing(session: Session) -> None:
    """Call ``finish`` at the end of a child of ``multiprocessing``, which may end without
    ``atexit``."""
    multiprocessing.util.Finalize(None, session.finish, ("exit",), exitpriority=-1)


def _is_loader_worker() -> bool:
    """Whether this is a worker process of a data loader."""
    from torch.utils.data import _utils, get_worker_info

    # torch 2.14 clears the worker info before the worker ends, so the target is checked as well.
    target = getattr(multiprocessing.current_process(), "_target", None)
    return get_worker_info() is not None or target is _utils.worker._worker_loop
