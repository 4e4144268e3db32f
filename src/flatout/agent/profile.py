"""A short profiled window after the timed steps, aggregated in process.

``steps`` turns under torch's profiler; then, if they cause many page faults, some with a
measurement of what a fault costs in between, at the same speed of the machine; then one under the
FLOP counter. All is entered and left at step boundaries. The record gets one line; times and counts
are means over the profiled turns, without the quickest and the slowest (a stall of the machine
falls into one of few), and the profiler has slowed them down::

    {"kind": "profile", "steps": 10, "step_ms": 12.3,
     "operators": [{"name": "aten::mm", "phase": "backward", "within": null, "calls": 4.0,
                    "self_ms": 1.5, "device_self_ms": null}, ..],   # largest first
     "operators_total_ms": 10.1, "operators_total_calls": 321.0,    # of all, listed or not
     "device_total_ms": null,                                       # all kernels of the accelerator
     "minor_faults": 120.0, "minor_faults_of_thread": 70.0,         # of all threads; of this one
     "page_fault_us": 0.5, "page_fault_step_ms": 11.9,              # one fault; the steps around it
     "flops_by_dtype": {"float32": 1200000000},
     "counted": {"aten::mm": 4}, "uncountable": {"aten::x": "why"},  # calls with a formula
     "facts": {..}}                                                 # see facts.py

An operator's ``phase`` is ``optimizer``, ``backward`` or null (anything else); ``within`` is
``attention`` for what ``scaled_dot_product_attention`` does, forwards and backwards, where it has
no fused kernel. What could not be profiled is missing; an event says why.
"""

from __future__ import annotations

import contextlib
import os
import statistics
import time
import traceback
from bisect import bisect_right
from collections.abc import Callable, Iterable, Sequence
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import torch
from torch._C._autograd import DeviceType

from flatout.agent import facts
from flatout.agent.flops import FlopCounter
from flatout.intercept import device
from flatout.wire.record import MANY_FAULTS
from flatout.wire.turns import Turn

if TYPE_CHECKING:
    from flatout.intercept.host import Host

FEWEST_STEPS = 3
ENOUGH_SECONDS = 1.0
"""The window ends after so many steps once it is that long, lest its events fill the memory."""

LISTED_OPERATORS = 100
"""The rest is some thousandths of a step, and in the totals."""

_SPARE_BYTES = 256 * 2**20
"""What large activations may need anew in a window; freed at once."""

_FRESH_BYTES = 48 * 2**20
"""Beyond every size up to which glibc keeps freed memory by itself (mallopt(3): 32 MiB)."""
_SERIAL_ELEMENTS = 32768
"""Of operations on so few elements torch makes one thread's work (``at::internal::GRAIN_SIZE``)."""
_FEWEST_FAULTS = 8
"""Huge pages make few faults of so much memory; fewer than that, it was at hand already."""

_FAULT_COSTS = 24
_WEIGHING_SECONDS = 4.0
"""How often the cost of a page fault is measured, single ones spread by a tenth; after so long they
are as many as they are."""

_BACKWARD_NODE = "autograd::engine::evaluate_function"
_OPTIMIZER_STEP = "Optimizer.step#"
_UNFUSED_ATTENTION = "aten::_scaled_dot_product_attention_math"
_BEGIN = "flatout::begin"
_ANNOTATIONS = (
    *(_OPTIMIZER_STEP, "Optimizer.zero_grad#", "ProfilerStep#", "enumerate(DataLoader)#"),
    _BEGIN,
)
"""Ranges that only annotate: their own time is Python's, not an operator's."""


class Profiler:
    """The window; ``at_boundary`` moves it on.

    Args:
        host: of this process.
        steps: turns to profile at most.
    """

    def __init__(self, host: Host, steps: int) -> None:
        self._host = host
        self._steps = steps
        self._left = 0
        self._boundaries_ns: list[int] = []
        self._faults: tuple[int, int] | None = None
        self._fault_costs_us: list[float] = []
        self._fault_steps_ms: list[float] = []
        self._profiler: Any = None
        self._flops: FlopCounter | None = None
        self._result: dict[str, Any] = {"kind": "profile", "steps": 0}
        self._next: Callable[[], bool] = self._start

    def at_boundary(self, turn: Turn) -> bool:
        """A turn has closed; returns whether the window is over."""
        if not self._host.counts_as_step(turn):
            if self._flops is not None:
                self._flops.restart()
            return False  # an evaluation pass in between
        self._boundaries_ns.append(time.perf_counter_ns())
        self._left -= 1
        if self._profiler is not None and self._is_long_enough():
            self._left = 0
        return self._left <= 0 and self._next()

    def close(self) -> None:
        """End what is under way: torch's profiler does not outlive the interpreter."""
        if self._profiler is not None:
            self._profiler.stop()
            self._profiler = None
        if self._next == self._finish and self._flops is not None:
            self._flops.__exit__(None, None, None)

    def _is_long_enough(self) -> bool:
        return len(self._boundaries_ns) > FEWEST_STEPS and self._has_taken(ENOUGH_SECONDS)

    def _has_taken(self, seconds: float) -> bool:
        return self._boundaries_ns[-1] - self._boundaries_ns[0] >= seconds * 1e9

    def _start(self) -> bool:
        self._host.mark = "profiled"
        if torch.autograd.profiler._is_profiler_enabled:
            self._host.events.add("skipped", "profile", "the program has a profiler of its own on")
            return self._count()
        # Between the profiler's events, large tensors find no room where they had it: an allocator
        # that keeps its memory then takes fresh one, whose faults, those of huge pages above all,
        # would count as time of the operators that meet them.
        with contextlib.suppress(RuntimeError):  # there is no more memory
            torch.empty(_SPARE_BYTES, dtype=torch.uint8, device="cpu").fill_(0)
        try:
            self._profiler = _new_profiler()
            self._profiler.start()
        except Exception as error:  # noqa: BLE001 - recorded with its traceback
            self._profiler = None
            self._failed("profile", error)
            return self._count()
        self._left = self._steps
        self._next = self._stop
        self._faults = _minor_faults()
        self._boundaries_ns = [time.perf_counter_ns()]
        with torch.profiler.record_function(_BEGIN):  # tells the profiler's clock from ours
            return False

    def _stop(self) -> bool:
        faults = _minor_faults()
        try:
            self._profiler.stop()
            events = self._profiler.events()
            begin = next(event for event in events if event.name == _BEGIN)
            first_ns = self._boundaries_ns[0]
            boundaries_us = [
                begin.time_range.start + (at_ns - first_ns) / 1e3 for at_ns in self._boundaries_ns
            ]
            self._result.update(aggregate(events, boundaries_us))
        except Exception as error:  # noqa: BLE001 - recorded with its traceback
            self._failed("profile", error)
        self._profiler = None
        if self._faults is not None and faults is not None:
            steps = len(self._boundaries_ns) - 1
            self._result["minor_faults"] = (faults[0] - self._faults[0]) / steps
            self._result["minor_faults_of_thread"] = (faults[1] - self._faults[1]) / steps
            if self._result["minor_faults"] >= MANY_FAULTS:
                self._boundaries_ns = self._boundaries_ns[-1:]
                return self._weigh_fault()
        return self._count()

    def _weigh_fault(self) -> bool:
        if len(self._boundaries_ns) > 1:
            self._fault_steps_ms.append((self._boundaries_ns[-1] - self._boundaries_ns[-2]) / 1e6)
        cost_us = page_fault_cost_us()
        if cost_us is not None:
            self._fault_costs_us.append(cost_us)
        weighed = len(self._fault_steps_ms)
        if (
            cost_us is None
            or weighed == _FAULT_COSTS
            or (weighed and self._has_taken(_WEIGHING_SECONDS))
        ):
            if cost_us is not None:
                self._result["page_fault_us"] = _middle_mean(self._fault_costs_us)
                self._result["page_fault_step_ms"] = _middle_mean(self._fault_steps_ms)
            return self._count()
        self._next = self._weigh_fault
        self._left = 2  # the first finds its caches full of what was filled here
        return False

    def _count(self) -> bool:
        self._flops = FlopCounter()
        self._flops.__enter__()
        self._left = 1
        self._next = self._finish
        return False

    def _finish(self) -> bool:
        assert self._flops is not None
        self._flops.__exit__(None, None, None)
        self._next = self._start
        self._result["flops_by_dtype"] = dict(self._flops.flops_by_dtype)
        self._result["counted"] = dict(self._flops.counted)
        self._result["uncountable"] = self._flops.uncountable
        self._host.mark = None
        try:
            self._result["facts"] = facts.collect(self._host)
        except Exception as error:  # noqa: BLE001 - recorded with its traceback
            self._failed("facts", error)
        self._host.record.write(self._result)
        return True

    def _failed(self, subject: str, error: Exception) -> None:
        why = f"{type(error).__name__}: {error}"
        self._host.events.add("failed", subject, why, traceback.format_exc())


def _middle_mean(values: list[float]) -> float:
    """Mean without the lowest and the highest quarter: a stall of the machine falls into one."""
    trimmed = len(values) // 4
    return statistics.fmean(sorted(values)[trimmed : len(values) - trimmed])


def _new_profiler() -> Any:
    # Kineto would write of its start and stop to the program's stderr; it reads this when used.
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")
    activities = [torch.profiler.ProfilerActivity.CPU]
    accelerator = device.accelerator_in_use()
    if accelerator is not None and accelerator.type in ("cuda", "xpu"):
        activities.append(getattr(torch.profiler.ProfilerActivity, accelerator.type.upper()))
    # Without acc_events torch warns at every start that events of earlier ones are gone.
    return torch.profiler.profile(activities=activities, acc_events=True)


def _minor_faults() -> tuple[int, int] | None:
    """Minor page faults of the process and of this thread so far, where the system tells."""
    try:
        import resource
    except ImportError:  # Windows
        return None
    thread = getattr(resource, "RUSAGE_THREAD", None)  # Linux
    if thread is None:
        return None
    of_process = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    return of_process, resource.getrusage(thread).ru_minflt


def page_fault_cost_us() -> float | None:
    """What a minor page fault costs this process now, with its allocator and its huge pages: how
    much longer fresh memory takes to fill and to hand back than memory at hand, over the faults
    there. ``None``: the allocator causes no faults, or the system does not tell.
    """
    before = _minor_faults()
    times_ns = [time.perf_counter_ns()]
    memory = torch.empty(_FRESH_BYTES // 8, dtype=torch.float64)  # a few large parts
    for value in (1.0, 2.0):
        for part in memory.split(_SERIAL_ELEMENTS):
            part.fill_(value)
        times_ns.append(time.perf_counter_ns())
    del memory, part
    times_ns.append(time.perf_counter_ns())
    after = _minor_faults()
    if before is None or after is None or after[1] - before[1] < _FEWEST_FAULTS:
        return None
    fresh, again, free = (b - a for a, b in pairwise(times_ns))
    return max(0.0, (fresh - again + free) / 1e3 / (after[1] - before[1]))


def aggregate(events: Iterable[Any], boundaries_us: Sequence[float]) -> dict[str, Any]:
    """Self times by operator, means over the steps that count.

    Args:
        events: what ``torch.profiler.profile.events()`` gives, in the order of their starts.
        boundaries_us: where steps end and begin, by the clock of the events; at least two.
    """
    durations_us = [b - a for a, b in pairwise(boundaries_us)]
    by_duration = sorted(range(len(durations_us)), key=durations_us.__getitem__)
    trimmed = len(by_duration) // 4
    counting = set(by_duration[trimmed : len(by_duration) - trimmed])
    steps = len(counting)
    has_device = device.accelerator_in_use() is not None
    operators: dict[tuple[str, str | None, str | None], dict[str, Any]] = {}
    places: dict[int, tuple[str | None, str | None]] = {}
    attention_nodes: set[int] = set()
    device_us = 0.0
    for event in events:
        counts = bisect_right(boundaries_us, event.time_range.start) - 1 in counting
        if event.device_type != DeviceType.CPU:
            if counts and not event.is_user_annotation:
                device_us += event.time_range.elapsed_us()
            continue
        name = event.name
        parent = event.cpu_parent
        phase, within = places[id(parent)] if parent is not None else (None, None)
        node = event.sequence_nr  # of autograd, shared by what made it and what evaluates it
        if name.startswith(_OPTIMIZER_STEP):
            phase = "optimizer"
        elif name.startswith(_BACKWARD_NODE):
            phase = "backward"
            if node in attention_nodes:
                within = "attention"
        elif phase != "backward":
            if name.startswith(_UNFUSED_ATTENTION):
                within = "attention"
            if within is not None:
                attention_nodes.add(node)
            else:  # an operator without a node of its own shows the next one's number
                attention_nodes.discard(node)
            attention_nodes.discard(-1)
        places[id(event)] = (phase, within)
        if not counts or name.startswith(_ANNOTATIONS):
            continue
        operator = operators.setdefault(
            (name, phase, within),
            {
                "name": name,
                "phase": phase,
                "within": within,
                "calls": 0.0,
                "self_ms": 0.0,
                "device_self_ms": 0.0 if has_device else None,
            },
        )
        operator["calls"] += 1 / steps
        operator["self_ms"] += event.self_cpu_time_total / 1e3 / steps
        if has_device:
            operator["device_self_ms"] += event.self_device_time_total / 1e3 / steps
    ordered = sorted(
        operators.values(),
        key=lambda o: max(o["self_ms"], o["device_self_ms"] or 0.0),
        reverse=True,
    )
    return {
        "steps": steps,
        "step_ms": sum(durations_us[step] for step in counting) / 1e3 / steps,
        "operators": ordered[:LISTED_OPERATORS],
        "operators_total_ms": sum(o["self_ms"] for o in ordered),
        "operators_total_calls": sum(o["calls"] for o in ordered),
        "device_total_ms": device_us / 1e3 / steps if has_device else None,
    }
