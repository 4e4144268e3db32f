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
import traceback
from collections.abc import Callable, Iterator, Set
from pathlib import Path
from typing import TYPE_CHECKING, Any

from flatout.agent.capture import is_capturing
from flatout.agent.containment import (
    attempt,
    began_in_torch,
    contained,
    knob_of,
    report,
    unreported,
)
from flatout.agent.hooks import Hooks
from flatout.agent.identity import WeakIdentitySet
from flatout.agent.inputs import FirstInputs
from flatout.agent.losses import abandon, arrived_losses, peak_device_bytes, read_loss
from flatout.agent.modules import imported_files
from flatout.record import (
    ENVIRONMENT_NAMES,
    EVENTS,
    RECORD_VERSION,
    RecordWriter,
)
from flatout.request import Request
from flatout.turns import ARM, MARK, MARKS, Turn, Turns

if TYPE_CHECKING:
    from flatout.agent.guard import Guard
    from flatout.agent.inspection import Inspector
    from flatout.knobs import Undo


class Session:
    """One process under flatout.

    Attributes:
        request: what the controller asks for.
        record: the record writer; ``event`` is the way to add to the event log.
        forward_wrappers: called around each outermost module call, as
            ``wrapper(call, module, args, kwargs)``; the way for a knob to act on the forward pass.
        before_optimizer_step, after_optimizer_step: called with the optimizer around each step.
        failed_knobs: why each knob that has failed in use did so.
        checked_gradients: optimizers about to step whose gradients a knob has found to be finite.

    A child process that is forked or made by ``multiprocessing`` is quiet: it leaves no record
    before the first step of its own, so that data loader workers leave none.
    """

    def __init__(self, request: Request, run_directory: Path) -> None:
        self.request = request
        self.run_directory = run_directory
        self.hooks = Hooks(
            lambda optimizer_exists: Turns(self._turn_closed, optimizer_exists),
            self._read,
            read_loss,
            on_skip=lambda subject, why: self.event("skipped", subject, why),
            on_failure=self._failed,
            on_callback_failure=self._callback_failed,
        )
        self.forward_wrappers = self.hooks.forward_wrappers
        self.before_optimizer_step = self.hooks.before_optimizer_step
        self.after_optimizer_step = self.hooks.after_optimizer_step
        self.record = RecordWriter(run_directory, os.getpid())
        self.failed_knobs: dict[str, str] = {}
        self.checked_gradients: WeakIdentitySet[Any] = WeakIdentitySet()
        self._guard: Guard | None = None
        self._undos: dict[str, Undo] = {}
        self._ever_turned: set[str] = set()
        self._arm: int | None = None
        self._mark: str | None = None
        self._stages: list[Callable[[Turn], bool]] = []
        self._timed_from_ns: int | None = None
        self._steps_timed = 0
        self._close_profiler: Callable[[], None] = lambda: None
        self._inspector: Inspector | None = None
        self._asleep = False
        self._is_quiet = _is_worker()

    # What stages and knobs use

    @property
    def roots(self) -> list[Any]:
        """Living modules that were called outermost so far."""
        return self.hooks.roots

    @property
    def optimizers(self) -> list[Any]:
        """Living optimizers that have stepped so far."""
        return list(self.hooks.optimizers)

    @property
    def loaders(self) -> list[Any]:
        """Living data loaders that were iterated over so far."""
        return list(self.hooks.loaders)

    @property
    def arm(self) -> int | None:
        """The arm that the turns closing from now on belong to."""
        return self._arm

    @arm.setter
    def arm(self, arm: int | None) -> None:
        self._arm = arm
        self.hooks.note(ARM, -1 if arm is None else arm)

    @property
    def mark(self) -> str | None:
        """The mark (one of ``turns.MARKS``) of the turns closing from now on."""
        return self._mark

    @mark.setter
    def mark(self, mark: str | None) -> None:
        self._mark = mark
        self.hooks.note(MARK, MARKS.index(mark))

    def event(self, what: str, subject: str, why: str, traceback: str | None = None) -> None:
        """Add to the event log.

        Args:
            what: one of ``record.EVENTS``.
            subject: what it is about (a knob, ``"profile"``, ...).
            why: one sentence.
            traceback: for failures.
        """
        assert what in EVENTS
        self.record.write(
            {
                "kind": "event",
                "at_s": self._at_s(time.perf_counter_ns()),
                "what": what,
                "subject": subject,
                "why": why,
                "traceback": traceback,
            }
        )

    def counts(self, turn: Turn) -> bool:
        """Whether a turn is a step of the program: of its training, or, if none, of inference."""
        return turn.kind == "step" or not self.hooks.turns.may_train()

    # Knobs

    @property
    def turned(self) -> Set[str]:
        """Knobs that are in place."""
        return self._undos.keys()

    def ask_for_boundary(self) -> None:
        """Stop at the next boundary between two steps, for what is waiting to be done there."""
        self.hooks.told = self.hooks.live = True

    def turn(self, knob: str, setting: str) -> None:
        """Apply a setting; called at a step boundary or before the first step.

        Raises:
            knobs.RefusedError: the knob can do nothing here.
        """
        from flatout import knobs
        from flatout.agent import dispatch

        dispatch.turning = knob
        try:
            self._undos[knob] = knobs.get(knob).apply(self, setting)
        finally:
            dispatch.turning = None
        self._ever_turned.add(knob)

    def turn_off(self, knob: str) -> bool:
        """Undo what ``turn`` did; returns whether there was anything to undo."""
        undo = self._undos.pop(knob, None)
        if undo is not None:
            undo()
        return undo is not None

    def turn_back(self, knob: str, error: Exception) -> None:
        """A knob has failed in use: it is recorded, and undone at the next step boundary.

        Until then the knob itself leaves everything to the program.
        """
        if knob in self.failed_knobs:
            return
        self.failed_knobs[knob] = f"{type(error).__name__}: {error}"
        self.ask_for_boundary()
        self._note_failure(knob, error, "turned back: ")

    def turns_back(self, knob: str) -> Callable[[Exception], None]:
        """``turn_back`` of a knob, for ``containment``."""
        return functools.partial(self.turn_back, knob)

    def blames(self, knob: str) -> Blame:
        """Around the program's own pass under a knob: an exception goes through as it is, and if it
        began in torch, the knob is turned back for what follows.
        """
        return Blame(self, knob)

    def _callback_failed(self, callback: Any, error: Exception) -> None:
        """A wrapper around forward calls, or a callback around optimizer steps, has failed."""
        for callbacks in (
            self.forward_wrappers,
            self.before_optimizer_step,
            self.after_optimizer_step,
        ):
            callbacks.remove(callback)
        knob = knob_of(callback)
        if knob is not None:
            self.turn_back(knob, error)
        else:
            subject = getattr(callback, "__qualname__", type(callback).__qualname__)
            self._note_failure(subject, error)

    def _undo_failed(self) -> None:
        for knob in self.failed_knobs:
            if knob in self._undos and attempt(
                functools.partial(self._not_undone, knob), self.turn_off, knob
            ):
                self.event("undone", knob, "it has failed")

    def _not_undone(self, knob: str, error: Exception) -> None:
        self._note_failure(knob, error, "not undone: ")

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
            self._stages.append(compares(self, request.comparison).at_boundary)
        elif request.relay is not None:
            from flatout.agent.relay import Runner

            self._stages.append(Runner(self, request.relay).at_boundary)
        elif request.stop_steps is not None or request.stop_seconds is not None:
            self._stages.append(self._timed)
        if request.profile_steps:
            from flatout.agent.profile import Profiler

            profiler = Profiler(self, request.profile_steps)
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

            self._inspector = Inspector(self, request.inspection)
        if request.guard is not None:
            from flatout.agent.guard import Guard

            self._guard = Guard(self, request.guard)
            self._guard.install()
        self.forward_wrappers.append(FirstInputs(self))
        atexit.register(contained(self._fails("exit"), self.finish), "exit")
        os.register_at_fork(after_in_child=contained(self._fails("fork"), self._forked))
        multiprocessing.util.register_after_fork(
            self, contained(self._fails("fork"), _finish_at_its_end)
        )
        if not self._is_quiet:
            self.record.flush()

    def finish(self, reason: str) -> None:
        """Write the rest of the record; called at the exit or at the stop."""
        if self._asleep:
            return
        self._stages.clear()
        for subject, part in self._last_parts(reason):
            attempt(self._fails(subject), part)
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
            yield "record", self.write_modules
            yield "record", functools.partial(self._write_end, reason)
            yield "record", self.record.close

    def write_modules(self) -> None:
        """Write down what the program has imported of its own by now."""
        self.record.write({"kind": "modules", "files": imported_files()})

    def _write_unused(self) -> None:
        """Say which knobs have had no effect: none of the calls that they wait for came."""
        from flatout import knobs
        from flatout.agent import dispatch

        for name in sorted(self._ever_turned - dispatch.used - self.failed_knobs.keys()):
            if knobs.get(name).behind_operators:
                self.event("unused", name, "no operator was called that it computes otherwise")

    def _write_unreported(self) -> None:
        while unreported:
            self._note_failure("agent", unreported.pop(0))

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
        if self.counts(turn):
            self._steps_timed += 1
        limit = self.request.stop_steps
        return limit is not None and self._steps_timed >= limit

    def _stop(self, turn: Turn) -> bool:
        self.event("stopped", "program", "all the steps asked for have been recorded")
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
        self.record = RecordWriter(self.run_directory, os.getpid())
        self.hooks.restart()
        if self._guard is not None:
            self._guard.restart()
        self._is_quiet = True

    def _fails(self, subject: str) -> Callable[[Exception], None]:
        return functools.partial(self._note_failure, subject)

    def _failed(self, subject: str, error: Exception) -> None:
        """What watches has failed: say so in the record and leave the program alone."""
        self._note_failure(subject, error)
        if self._is_quiet:
            self._speak()
        self._write_events(wait=False)
        self.record.flush()
        self._sleep()

    def _note_failure(self, subject: str, error: Exception, what: str = "") -> None:
        trace = "".join(traceback.format_exception(type(error), error, error.__traceback__))
        self.event("failed", subject, f"{what}{type(error).__name__}: {error}", trace)

    def _apply_settings(self) -> None:
        if not self.request.settings:
            return
        import torch

        proof = self.request.proof
        for name, setting in self.request.settings.items():
            if proof is not None and name in proof.knobs and proof.torch != torch.__version__:
                self.event(
                    "skipped",
                    name,
                    f"proven with torch {proof.torch}, this is {torch.__version__}",
                )
                continue
            if attempt(self._fails(name), self._applied, name, setting):
                self.event("applied", name, f"set to {setting} by the plan")

    def _applied(self, name: str, setting: str) -> bool:
        from flatout import knobs

        try:
            self.turn(name, setting)
        except knobs.RefusedError as refusal:
            self.event("skipped", name, str(refusal))
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
        self._note_failure("loss", error)

    def _turn_closed(self, turn: Turn) -> None:
        if self._asleep:
            return
        if self._is_quiet:
            if _is_loader_worker():
                self._sleep()
                return
            self._speak()
        if self.hooks.searching:
            self.hooks.turn_closed()
        if self._guard is not None:
            self._guard.at_boundary()
        if self.failed_knobs:
            self._undo_failed()
        if self._stages:
            self._run_stages(turn)
        self.hooks.live = bool(self._stages)
        self.hooks.told = self.hooks.searching or bool(self._stages)

    def _run_stages(self, turn: Turn) -> None:
        limit_s = self.request.stop_seconds
        if self._timed_from_ns is None:
            self._timed_from_ns = turn.end_ns
        late = limit_s is not None and turn.end_ns - self._timed_from_ns > limit_s * 1e9
        while self._stages:
            stage = self._stages[0]
            failed = self._fails(getattr(stage, "__qualname__", repr(stage)))
            done = attempt(failed, stage, turn) is not False
            if not done and not (late and len(self._stages) > 1 and stage == self._timed):
                return
            self._stages.pop(0)


class Blame:
    """A context in which a knob is turned back where torch fails under it.

    Args:
        session: of this process.
        knob: its name.
    """

    def __init__(self, session: Session, knob: str) -> None:
        self._session = session
        self._knob = knob

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        if isinstance(error, Exception) and attempt(self._failed, began_in_torch, error):
            report(self._failed, error)

    def _failed(self, error: Exception) -> None:
        self._session.turn_back(self._knob, error)


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

    from flatout.agent import device

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
