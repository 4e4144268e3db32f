"""Writing the record of a process, except its agent events."""

from __future__ import annotations

import os
import platform
import sys
import time
from typing import TYPE_CHECKING

from flatout import knobs
from flatout.agent.fixed_work import FixedWorkTimer
from flatout.intercept import handled_calls
from flatout.intercept.containment import attempt, unreported
from flatout.intercept.device import peak_device_bytes
from flatout.intercept.losses import abandon, arrived_losses
from flatout.wire.header import ENVIRONMENT_NAMES, Header
from flatout.wire.lines import End
from flatout.wire.request import RANK_VARIABLE, RANKS_VARIABLE
from flatout.wire.writer import RecordWriter

if TYPE_CHECKING:
    from flatout.intercept.host import Host


class Recorder:
    """Writes the header, the events of torch, the losses and the last lines of a record.

    Args:
        host: the host of this process.
    """

    def __init__(self, host: Host) -> None:
        self._host = host
        self._record = host.record
        self._fixed_work = FixedWorkTimer()

    def write_header(self) -> None:
        """Write the first line of the record."""
        self._record.begin(_make_header(self._record))

    def write_events(self, wait: bool) -> list[float]:
        """Write the events of torch and the losses that have been copied to the host.

        Args:
            wait: whether to wait for the losses that are still being copied from an accelerator.

        Returns:
            The losses that were written.
        """
        hooks = self._host.hooks
        self._record.write_events(hooks.take_packed())
        arrived = attempt(self._drop_losses, arrived_losses, hooks.losses, wait)
        if arrived:
            self._record.write_losses(arrived, peak_device_bytes())
        return arrived or []

    def write_fixed_work(self) -> None:
        """Do the fixed piece of work and write its time, if it is due."""
        done = self._fixed_work.measure_if_due()
        if done is not None:
            self._record.write(done)

    def write_unused(self) -> None:
        """Add an event for each applied knob that has had no effect because it handled no call."""
        applied = self._host.applied
        for name in sorted(
            applied.ever_applied - handled_calls.counts.keys() - applied.failures.keys()
        ):
            if knobs.get(name).waits_for_calls:
                self._host.events.add("unused", name, "the program made no call that it handles")

    def write_unreported(self) -> None:
        """Add events for the failures that could not be reported when they occurred."""
        while unreported:
            self._host.events.add_failure("agent", unreported.pop(0))

    def write_end(self, reason: str) -> None:
        """Write the last line of the record."""
        at_s = round(self._record.seconds(time.perf_counter_ns()), 6)
        self._record.write(End(at_s, reason, peak_device_bytes()))

    def _drop_losses(self, error: Exception) -> None:
        """Drop the unread losses, because nothing can be read from a device after an error of
        it."""
        hooks = self._host.hooks
        abandon(hooks.losses)
        hooks.losses = []
        self._host.events.add_failure("loss", error)


def _make_header(record: RecordWriter) -> Header:
    import torch

    from flatout.intercept import device

    accelerator = device.accelerator()
    return Header(
        pid=os.getpid(),
        parent_pid=os.getppid(),
        rank=_read_environment_int(RANK_VARIABLE, "RANK"),
        world_size=_read_environment_int(RANKS_VARIABLE, "WORLD_SIZE"),
        started_unix_s=round(time.time(), 3),
        started_ns=record.started_ns,
        program=_program_name(),
        executable=sys.executable,
        python=platform.python_version(),
        torch=str(torch.__version__),
        threads=torch.get_num_threads(),
        cpu_capability=torch.backends.cpu.get_cpu_capability(),
        accelerator=accelerator.type if accelerator is not None else None,
        environment={name: os.environ[name] for name in ENVIRONMENT_NAMES if name in os.environ},
    )


def _read_environment_int(*names: str) -> int | None:
    """Return the value of the first of these variables that is a number."""
    values = (os.environ.get(name, "") for name in names)
    return next((int(value) for value in values if value.isdigit()), None)


def _program_name() -> str:
    """Return the base name of the script, or the name of the module after ``-m``. CPython puts the
    path of the module into ``sys.argv`` only once it has found the module."""
    name = os.path.basename(sys.argv[0]) if sys.argv else ""
    if name == "-m" and "-m" in sys.orig_argv[:-1]:
        return sys.orig_argv[sys.orig_argv.index("-m") + 1]
    return name
