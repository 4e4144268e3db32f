"""Runs a job as a child process that a shell cannot tell from the bare command.

The job stays in flatout's process group and on its terminal, so Ctrl-C, Ctrl-Z and the terminal
itself reach it as they would without flatout. Signals to flatout's own process are passed on:

- A signal from the terminal has already reached the job, so it is not passed on.
- A signal to the whole process group has already reached the job as well. A *sentinel*, a small
  process in the same group, reports every signal that it gets, which tells such a signal from one
  to flatout alone.
- If the job stops, flatout stops; if a signal kills the job, flatout kills itself by the same one.

The sentinel also kills the job when flatout is killed. If the job is contained, the sentinel then
kills every process that the job has started.
"""

from __future__ import annotations

import contextlib
import math
import os
import resource
import select
import shutil
import signal
import sys
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass

from flatout.errors import UserError
from flatout.launch import interruption
from flatout.wire.request import RUN_VARIABLE

_FROM_KERNEL = 0x80
"""``si_code`` of a signal from the kernel, such as one of the terminal (sigaction(2))."""

_IGNORED_BY_PYTHON = [signal.SIGPIPE, signal.SIGXFSZ]
"""CPython ignores these signals when it starts; the job gets their default handlers back."""

_WATCHED = {
    signal.SIGINT,
    signal.SIGTERM,
    signal.SIGHUP,
    signal.SIGQUIT,
    signal.SIGUSR1,
    signal.SIGUSR2,
    signal.SIGALRM,
    signal.SIGWINCH,
    signal.SIGTSTP,
    signal.SIGTTIN,
    signal.SIGTTOU,
    signal.SIGCONT,
    signal.SIGCHLD,
}
_PASSED_ON = _WATCHED - {signal.SIGCHLD, signal.SIGCONT}

_SENTINEL_WAIT_S = 0.05
"""How long to wait until the sentinel reports the same signal: the kernel sends it to the whole
group at once, but the sentinel has to be scheduled."""

_SENTINEL_LONGEST_S = 5.0
"""How long to wait at most as long as the sentinel waits for a CPU."""

_GRACE_S = 5.0
"""Time between SIGTERM and SIGKILL for a job that must end."""

_INTERRUPTED_GRACE_S = 2.0
"""Time between SIGTERM and SIGKILL for a trial, while its user waits for flatout to end."""

_KILLED_WAIT_S = 0.05
"""Time after which killed processes are gone, and the processes that they had just started show."""
_KILLED_LOOKS = 100
"""Number of attempts after which the remaining processes count as unkillable."""

TICK_S = 0.5


@dataclass(frozen=True)
class Exit:
    """How a job ended.

    Attributes:
        returncode: its exit status; if negative, the signal that killed it.
        seconds: how long it ran.
        timed_out: whether it was killed because its time was over.
        was_interrupted: whether a signal that asks for an end has come while it ran.
    """

    returncode: int
    seconds: float
    timed_out: bool = False
    was_interrupted: bool = False


def run(
    command: Sequence[str],
    environment: Mapping[str, str],
    *,
    output: int | None = None,
    timeout_seconds: float | None = None,
    contained: bool = False,
    run_directories: Sequence[str] = (),
    tick: Callable[[], bool | None] | None = None,
    processors: Collection[int] | None = None,
    spared: int | None = None,
) -> Exit:
    """Run a command to its end.

    Args:
        command: program and arguments, as a shell would pass them.
        environment: its whole environment.
        output: file descriptor for its standard output and error; ``None``: flatout's own.
        timeout_seconds: kill it after this time.
        contained: kill every process that it leaves behind, as for a trial; otherwise they live
            on, as they would without flatout.
        run_directories: the run directories of a contained job, which identify its processes
            (``RUN_VARIABLE``).
        tick: called every ``TICK_S`` while the job runs. The job is ended once it returns true.
        processors: numbers of those that the job may run on; ``None``: those of flatout.
        spared: id of a process that was started before a contained job; it and what it has started
            are not killed.

    Raises:
        UserError: the program does not exist or cannot be executed.
        KeyboardInterrupt: a contained job was interrupted or told to end.
    """
    if contained:
        _adopt_orphans()
    before = signal.pthread_sigmask(signal.SIG_BLOCK, _WATCHED)
    started_s = time.monotonic()
    interrupted = False
    asked: set[int] = set()
    try:
        if contained:
            interruption.check()
        with _on_processors(processors):
            pid = _spawn(command, environment, before, output)
        sentinel = _Sentinel(pid, started_by=os.getpid(), run_directories=run_directories)
        try:
            status, timed_out, interrupted = _wait(
                pid, sentinel, timeout_seconds, started_s, tick, contained, asked
            )
        finally:
            sentinel.end()
            if contained:
                _end_descendants(_INTERRUPTED_GRACE_S if interrupted else _GRACE_S, spared)
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
    if contained and interrupted:
        raise KeyboardInterrupt
    returncode, seconds = os.waitstatus_to_exitcode(status), time.monotonic() - started_s
    return Exit(returncode, seconds, timed_out, not asked.isdisjoint(interruption.SIGNALS))


def check_program(program: str) -> None:
    """Check that ``run`` would find a program.

    Raises:
        UserError: the program does not exist or cannot be executed.
    """
    if shutil.which(program) is not None:
        return
    if os.sep in program and os.path.exists(program):
        raise UserError(f"{program!r} cannot be executed: it is not an executable file", 126)
    raise UserError(f"there is no program {program!r}", 127)


def exit_like(returncode: int) -> int:
    """End this process as the job ended: by the same signal or with the same status."""
    if returncode >= 0:
        return returncode
    number = -returncode
    resource.setrlimit(resource.RLIMIT_CORE, (0, resource.getrlimit(resource.RLIMIT_CORE)[1]))
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError):
            stream.flush()
    if number not in (signal.SIGKILL, signal.SIGSTOP):
        signal.signal(number, signal.SIG_DFL)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {number})
    os.kill(os.getpid(), number)
    return 128 + number  # by default, this signal does not end a process


@contextlib.contextmanager
def _on_processors(processors: Collection[int] | None) -> Iterator[None]:
    """Run this thread on some processors, which a process that it starts inherits."""
    if processors is None:
        yield
        return
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, processors)
    try:
        yield
    finally:
        os.sched_setaffinity(0, before)


def _spawn(
    command: Sequence[str],
    environment: Mapping[str, str],
    mask: Collection[int],
    output: int | None,
) -> int:
    actions = []
    if output is not None:
        actions = [(os.POSIX_SPAWN_DUP2, output, 1), (os.POSIX_SPAWN_DUP2, output, 2)]
    try:
        return os.posix_spawnp(
            command[0],
            list(command),
            dict(environment),
            file_actions=actions,
            setsigmask=mask,
            setsigdef=_IGNORED_BY_PYTHON,
        )
    except FileNotFoundError:
        raise UserError(f"there is no program {command[0]!r}", 127) from None
    except (PermissionError, OSError) as error:
        raise UserError(f"{command[0]!r} cannot be executed: {error.strerror}", 126) from None


def _wait(
    pid: int,
    sentinel: _Sentinel,
    timeout_seconds: float | None,
    started_s: float,
    tick: Callable[[], bool | None] | None,
    contained: bool,
    received_numbers: set[int],
) -> tuple[int, bool, bool]:
    """Wait for the job's end and pass signals on.

    A contained job that survives the signal that interrupts it gets SIGTERM and then SIGKILL,
    because its user waits for flatout to end. ``received_numbers`` gets the signals that come.

    Returns the wait status, whether the job timed out, and whether it was interrupted.
    """
    timed_out = interrupted = ended_by_tick = False
    deadline_s = None if timeout_seconds is None else started_s + timeout_seconds
    endings = [signal.SIGTERM, signal.SIGKILL]
    while True:
        done, status = os.waitpid(pid, os.WNOHANG | os.WUNTRACED)
        if done == pid and os.WIFSTOPPED(status):
            os.kill(os.getpid(), signal.SIGSTOP)  # like the job, so that the shell takes over
            os.kill(pid, signal.SIGCONT)
            continue
        if done == pid:
            late = _take_late_signals()
            received_numbers |= late
            if contained and any(map(interruption.note, late)):
                interrupted, ended_by_tick = True, False
            return status, timed_out, interrupted and not ended_by_tick
        wait_s = math.inf if deadline_s is None else max(0.0, deadline_s - time.monotonic())
        if tick is not None or contained:
            wait_s = min(wait_s, TICK_S)
        received: signal.struct_siginfo | None
        if wait_s == math.inf:
            received = signal.sigwaitinfo(_WATCHED)
        else:
            received = signal.sigtimedwait(_WATCHED, wait_s)
        if tick is not None and tick() and not interrupted:
            interrupted = ended_by_tick = True
            deadline_s = time.monotonic()
        if contained and not interrupted and interruption.is_noted():
            interrupted = True  # another thread got the signal
            deadline_s = time.monotonic() + _INTERRUPTED_GRACE_S
        if received is None:
            if deadline_s is None or time.monotonic() < deadline_s:
                continue
            timed_out = timed_out or not interrupted
            ending = endings.pop(0)
            os.kill(pid, ending)
            grace_s = _INTERRUPTED_GRACE_S if interrupted else _GRACE_S
            deadline_s = time.monotonic() + grace_s if endings else None
        elif received.si_signo in _PASSED_ON:
            received_numbers.add(received.si_signo)
            if contained and interruption.note(received.si_signo):
                ended_by_tick = False
                if not interrupted:
                    interrupted = True
                    deadline_s = time.monotonic() + _INTERRUPTED_GRACE_S
            to_all = received.si_code == _FROM_KERNEL or sentinel.got(received.si_signo)
            if not to_all:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, received.si_signo)


def _take_late_signals() -> set[int]:
    """Return the signals that came while the job was ending: its exit status answers them."""
    numbers = set()
    while (received := signal.sigtimedwait(_WATCHED, 0)) is not None:
        numbers.add(received.si_signo)
    return numbers


class _Sentinel:
    """A process in the same group that reports the signals that the group gets.

    Args:
        job: the process to kill when flatout's process is gone.
        started_by: flatout's process.
        run_directories: values of ``RUN_VARIABLE``; processes with one of them are killed as well.
    """

    def __init__(self, job: int, started_by: int, run_directories: Sequence[str]) -> None:
        self._told, tell = os.pipe()
        self._pid = os.fork()
        if self._pid == 0:
            try:
                os.close(self._told)
                _stand_sentinel(tell, job, started_by, run_directories)
            finally:
                os._exit(0)
        os.close(tell)

    def got(self, number: int) -> bool:
        """Whether the sentinel got this signal as well."""
        begin_s, wait_s = time.monotonic(), _SENTINEL_WAIT_S
        while True:
            if not select.select([self._told], [], [], wait_s)[0]:
                if wait_s == 0:
                    return False
                is_late = time.monotonic() - begin_s > _SENTINEL_LONGEST_S
                if is_late or not self._waits_for_cpu():
                    wait_s = 0  # it may have reported meanwhile
                continue
            told = os.read(self._told, 1)
            if not told:
                return False
            if told[0] == number:
                return True

    def _waits_for_cpu(self) -> bool:
        """Whether the sentinel is ready to run, as far as the system tells (proc(5), Linux)."""
        try:
            with open(f"/proc/{self._pid}/stat") as file:
                stat = file.read()
        except OSError:
            return False
        return stat.rpartition(")")[2].split()[:1] == ["R"]

    def end(self) -> None:
        """End the sentinel."""
        os.close(self._told)
        with contextlib.suppress(ProcessLookupError):
            os.kill(self._pid, signal.SIGKILL)
        with contextlib.suppress(ChildProcessError):
            os.waitpid(self._pid, 0)


def _stand_sentinel(tell: int, job: int, started_by: int, run_directories: Sequence[str]) -> None:
    """Run the sentinel. Signals were blocked before the fork."""
    null = os.open(os.devnull, os.O_RDWR)
    for descriptor in (0, 1, 2):  # a pipe that others read must close when the job ends
        os.dup2(null, descriptor)
    while True:
        received = signal.sigtimedwait(_WATCHED, 0.5)
        if os.getppid() != started_by:
            _kill(job)
            for _ in range(_KILLED_LOOKS):
                left = _started_for(run_directories)
                if not left:
                    return
                for pid in left:
                    _kill(pid)
                time.sleep(_KILLED_WAIT_S)
            return
        if received is not None and received.si_signo in _PASSED_ON:
            os.write(tell, bytes([received.si_signo]))


def _kill(pid: int) -> None:
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.kill(pid, signal.SIGKILL)


def _started_for(run_directories: Sequence[str]) -> list[int]:
    """The processes whose environment has one of these run directories (proc(5), Linux)."""
    entries = {f"{RUN_VARIABLE}={directory}".encode() for directory in run_directories}
    found = []
    for name in os.listdir("/proc") if os.path.isdir("/proc/self") else ():
        if name.isdigit():
            with contextlib.suppress(OSError), open(f"/proc/{name}/environ", "rb") as file:
                if entries & set(file.read().split(b"\0")):
                    found.append(int(name))
    return found


def _adopt_orphans() -> None:
    """Become the parent of the processes that the job leaves behind (prctl(2), Linux)."""
    if not sys.platform.startswith("linux"):
        return
    import ctypes

    pr_set_child_subreaper = 36  # linux/prctl.h
    ctypes.CDLL(None, use_errno=True).prctl(pr_set_child_subreaper, 1, 0, 0, 0)


def _end_descendants(grace_s: float, spared: int | None) -> None:
    import psutil

    children = [child for child in psutil.Process().children() if child.pid != spared]
    descendants = list(children)
    for child in children:
        with contextlib.suppress(psutil.NoSuchProcess):
            descendants += child.children(recursive=True)
    for process in descendants:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.terminate()
    _, alive = psutil.wait_procs(descendants, timeout=grace_s)
    for process in alive:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.kill()
    psutil.wait_procs(alive, timeout=_GRACE_S)
