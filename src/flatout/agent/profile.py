"""Profiling a short window of steps after the timed steps, with the results aggregated in process.

The window has three parts, which begin and end at step boundaries: some steps under torch's
profiler; if these cause many page faults, some steps between which the cost of a page fault is
measured; and one step under the FLOP counter. The record gets one line, whose fields are in
``wire/profile.py``. Its times and counts are means over the profiled steps, without the fastest and
the slowest quarter; the profiler slows these steps down. Where steps are micro-batches, the window
contains the last one of a cycle, which has the optimizer step, and it counts once in a cycle. A
field that could not be measured is missing, and an event gives the reason.
"""

from __future__ import annotations

import contextlib
import os
import statistics
import time
import traceback
from bisect import bisect_right
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import torch
from torch._C._autograd import DeviceType

from flatout.agent import facts
from flatout.agent.flops import FlopCounter
from flatout.intercept import device
from flatout.wire.profile import MANY_FAULTS, OperatorTimes, Profile
from flatout.wire.turns import Turn

if TYPE_CHECKING:
    from flatout.intercept.host import Host

FEWEST_STEPS = 3
ENOUGH_SECONDS = 1.0
"""The profiler is stopped once it has run for this many steps and this time, because its events
take memory."""

LISTED_OPERATORS = 100
"""The number of operators that are listed. The other operators take some thousandths of a step; the
totals include them."""

_ALWAYS_LISTED = frozenset({"aten::_pack_padded_sequence"})
"""Operators that are listed however short they are, because they tell what a program does."""

_SPARE_BYTES = 256 * 2**20
"""The size of the memory that is allocated and freed before the profiler starts, so that large
activations find memory; see ``Profiler._start``."""

_FRESH_BYTES = 48 * 2**20
"""The size of the memory for measuring the cost of a page fault. It is larger than any freed memory
that glibc keeps (mallopt(3): M_MMAP_THRESHOLD, 32 MiB at most)."""
_SERIAL_ELEMENTS = 32768
"""Torch uses one thread for an operation on this many elements (``at::internal::GRAIN_SIZE``)."""
_FEWEST_FAULTS = 8
"""Even with huge pages, ``_FRESH_BYTES`` of fresh memory cause more faults than this. If there are
fewer faults, the memory was not fresh."""

_FAULT_MEASUREMENTS = 24
_FAULT_SECONDS = 4.0
"""The largest number of measurements of the cost of a page fault (single measurements scatter by a
tenth), and the time after which no further measurement begins."""

_BACKWARD_NODE = "autograd::engine::evaluate_function"
_OPTIMIZER_STEP = "Optimizer.step#"
_ATTENTION = "aten::_scaled_dot_product_attention_math"
_WORK = {
    **dict.fromkeys((_ATTENTION, f"{_ATTENTION}_for_mps"), "attention"),
    **dict.fromkeys(("aten::lstm", "aten::gru", "aten::rnn_tanh", "aten::rnn_relu"), "recurrent"),
}
"""Operators whose work is told apart in forward and backward, with the name that it has in
``OperatorTimes``."""

_BEGIN = "flatout::begin"
_CLOCK_READINGS = 3
"""The number of events that relate the profiler's clock to ``time.perf_counter``. The last one
counts: the first takes a hundred microseconds, and a step that begins with a forward call leaves no
such time between its boundary and its first operator."""
_ANNOTATIONS = (
    _OPTIMIZER_STEP,
    "Optimizer.zero_grad#",
    "ProfilerStep#",
    "enumerate(DataLoader)#",
    _BEGIN,
)
"""The prefixes of the names of annotations. The self time of an annotation is spent in Python, not
in an operator."""


class Profiler:
    """The stage that profiles a window of steps.

    Args:
        host: the host of this process.
        steps: the largest number of steps to profile.
    """

    def __init__(self, host: Host, steps: int) -> None:
        self._host = host
        self._steps = steps
        self._steps_left = 0
        self._steps_waited = 0
        self._begin_ns = 0
        self._boundaries_ns: list[int] = []
        self._updates: list[bool] = []
        self._faults: tuple[int, int] | None = None
        self._fault_costs_us: list[float] = []
        self._fault_steps_ms: list[float] = []
        self._profiler: Any = None
        self._flops: FlopCounter | None = None
        self._result = Profile()
        self._is_written = False
        self._next_part: Callable[[], bool] = self._start

    @property
    def result(self) -> Profile:
        """What has been measured so far."""
        return self._result

    def at_boundary(self, turn: Turn) -> bool:
        """Count a step that has ended, and begin the next part of the window if it is due.

        Returns:
            Whether the window is over.
        """
        if not self._host.counts_as_step(turn):
            if self._flops is not None:
                self._flops.restart()
            return False  # an evaluation pass between two steps
        self._boundaries_ns.append(time.perf_counter_ns())
        self._updates.append(turn.updates > 0)
        self._steps_left -= 1
        if self._profiler is not None and self._is_long_enough():
            self._steps_left = 0
        return self._steps_left <= 0 and self._next_part()

    def close(self) -> None:
        """Stop torch's profiler or the FLOP counter, which must not outlive the interpreter. What
        was measured before the program has ended is recorded."""
        if self._profiler is not None and len(self._boundaries_ns) > 1:
            self._aggregate()  # a program that ends this early has few other steps to profile
        elif self._profiler is not None:
            self._profiler.stop()
            self._profiler = None
        if self._next_part == self._finish and self._flops is not None:
            self._flops.__exit__(None, None, None)
        if self._result.operators and not self._is_written:
            self._write()

    def _is_long_enough(self) -> bool:
        return len(self._boundaries_ns) > FEWEST_STEPS and self._has_taken(ENOUGH_SECONDS)

    def _has_taken(self, seconds: float) -> bool:
        return self._boundaries_ns[-1] - self._boundaries_ns[0] >= seconds * 1e9

    def _start(self) -> bool:
        if self._awaits_update():
            return False
        self._host.mark = "profiled"
        if torch.autograd.profiler._is_profiler_enabled:
            self._host.events.add("skipped", "profile", "the program runs a profiler itself")
            return self._count_flops()
        # The profiler's events fragment the memory: large tensors no longer fit where they were,
        # and an allocator that keeps freed memory then takes fresh memory, whose page faults would
        # count as time of the operators that cause them. So the allocator gets spare memory
        # beforehand.
        with contextlib.suppress(RuntimeError):  # out of memory
            torch.empty(_SPARE_BYTES, dtype=torch.uint8, device="cpu").fill_(0)
        try:
            self._profiler = _new_profiler()
            self._profiler.start()
        except Exception as error:  # noqa: BLE001 - recorded with its traceback
            self._profiler = None
            self._add_failure("profile", error)
            return self._count_flops()
        self._steps_left = self._steps
        self._next_part = self._stop
        self._faults = _minor_faults()
        self._updates = []
        for _ in range(_CLOCK_READINGS):
            before_ns = time.perf_counter_ns()
            with torch.profiler.record_function(_BEGIN):
                after_ns = time.perf_counter_ns()
        self._begin_ns = (before_ns + after_ns) // 2
        self._boundaries_ns = [time.perf_counter_ns()]
        return False

    def _awaits_update(self) -> bool:
        """Whether a window from here on would contain no optimizer step, because more micro-batches
        come before it."""
        turns = self._host.hooks.turns
        self._steps_waited += 1
        steps_to_update = turns.micro_batches - turns.micro_batches_done
        is_irregular = self._steps_waited > 2 * turns.micro_batches
        is_due = steps_to_update == min(2, self._steps)
        return turns.micro_batches > 1 and not is_due and not is_irregular

    def _aggregate(self) -> None:
        """Stop torch's profiler, and aggregate its events."""
        try:
            self._profiler.stop()
            events = self._profiler.events()
            begin_us = max(e.time_range.start for e in events if e.name == _BEGIN)
            boundaries_us = [
                begin_us + (at_ns - self._begin_ns) / 1e3 for at_ns in self._boundaries_ns
            ]
            micro_batches = self._host.hooks.turns.micro_batches
            self._result = aggregate(events, boundaries_us, self._updates, micro_batches)
        except Exception as error:  # noqa: BLE001 - recorded with its traceback
            self._add_failure("profile", error)
        self._collect_facts()  # at the end of the program, its objects may be gone
        self._profiler = None

    def _stop(self) -> bool:
        faults = _minor_faults()
        self._aggregate()
        if self._faults is not None and faults is not None:
            steps = len(self._boundaries_ns) - 1
            minor_faults = (faults[0] - self._faults[0]) / steps
            self._result = replace(
                self._result,
                minor_faults=minor_faults,
                minor_faults_of_thread=(faults[1] - self._faults[1]) / steps,
            )
            if minor_faults >= MANY_FAULTS:
                self._boundaries_ns = self._boundaries_ns[-1:]
                return self._measure_fault()
        return self._count_flops()

    def _measure_fault(self) -> bool:
        if len(self._boundaries_ns) > 1:
            self._fault_steps_ms.append((self._boundaries_ns[-1] - self._boundaries_ns[-2]) / 1e6)
        cost_us = page_fault_cost_us()
        if cost_us is not None:
            self._fault_costs_us.append(cost_us)
        measured = len(self._fault_steps_ms)
        if (
            cost_us is None
            or measured == _FAULT_MEASUREMENTS
            or (measured and self._has_taken(_FAULT_SECONDS))
        ):
            if cost_us is not None:
                self._result = replace(
                    self._result,
                    page_fault_us=_middle_mean(self._fault_costs_us),
                    page_fault_step_ms=_middle_mean(self._fault_steps_ms),
                )
            return self._count_flops()
        self._next_part = self._measure_fault
        self._steps_left = 2  # the first step finds the caches filled by the measurement
        return False

    def _count_flops(self) -> bool:
        self._flops = FlopCounter()
        self._flops.__enter__()
        self._steps_left = 1
        self._next_part = self._finish
        return False

    def _finish(self) -> bool:
        assert self._flops is not None
        self._flops.__exit__(None, None, None)
        self._next_part = self._start
        self._result = replace(
            self._result,
            flops_by_dtype=dict(self._flops.flops_by_dtype),
            counted=dict(self._flops.counted),
            uncountable=self._flops.uncountable,
        )
        self._host.mark = None
        self._collect_facts()
        self._write()
        return True

    def _collect_facts(self) -> None:
        try:
            self._result = replace(self._result, facts=facts.collect(self._host))
        except Exception as error:  # noqa: BLE001 - recorded with its traceback
            self._add_failure("facts", error)

    def _write(self) -> None:
        self._host.record.write(self._result)
        self._is_written = True

    def _add_failure(self, subject: str, error: Exception) -> None:
        why = f"{type(error).__name__}: {error}"
        self._host.events.add("failed", subject, why, traceback.format_exc())


def _middle_mean(values: list[float]) -> float:
    """Return the mean without the lowest and the highest quarter, which contain stalls."""
    trimmed = len(values) // 4
    return statistics.fmean(sorted(values)[trimmed : len(values) - trimmed])


def _new_profiler() -> Any:
    # Otherwise Kineto writes to the program's stderr when it starts and stops.
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")
    activities = [torch.profiler.ProfilerActivity.CPU]
    accelerator = device.accelerator_in_use()
    if accelerator is not None and accelerator.type in ("cuda", "xpu"):
        activities.append(getattr(torch.profiler.ProfilerActivity, accelerator.type.upper()))
    # Without acc_events torch warns at each start that the events of earlier windows are dropped.
    return torch.profiler.profile(activities=activities, acc_events=True)


def _minor_faults() -> tuple[int, int] | None:
    """Return the numbers of minor page faults of the process and of this thread so far; ``None`` if
    unknown."""
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
    """Measure the cost of a minor page fault in this process, with its allocator and huge pages.

    The cost is the time for filling fresh memory and freeing it, minus the time for filling the
    same memory again, divided by the number of page faults.

    Returns:
        The cost in microseconds; ``None`` if the allocator causes no faults, or if the system does
        not count them.
    """
    before = _minor_faults()
    times_ns = [time.perf_counter_ns()]
    memory = torch.empty(_FRESH_BYTES // 8, dtype=torch.float64)  # in few large mappings
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


@dataclass
class _Sum:
    """The sums over all calls of an operator, each with the weight of its step.

    Attributes:
        calls: the number of calls.
        self_us: the self time on the host.
        device_self_us: the self time on the accelerator.
    """

    calls: float = 0.0
    self_us: float = 0.0
    device_self_us: float = 0.0


def aggregate(
    events: Iterable[Any],
    boundaries_us: Sequence[float],
    updates: Sequence[bool] = (),
    micro_batches: int = 1,
) -> Profile:
    """Aggregate the profiler's events by operator, as means over the steps that count.

    Args:
        events: the result of ``torch.profiler.profile.events()``, in the order of their starts.
        boundaries_us: the step boundaries, by the clock of the events; at least two.
        updates: for each step, whether it had an optimizer step.
        micro_batches: the number of steps from one optimizer step to the next.
    """
    durations_us = [b - a for a, b in pairwise(boundaries_us)]
    weights = _weigh_steps(durations_us, updates, micro_batches)
    has_device = device.accelerator_in_use() is not None
    sums: dict[tuple[str, str | None, str | None], _Sum] = {}
    events = list(events)
    labels = _EventLabels(_find_second_order_nodes(events))
    device_us = 0.0
    for event in events:
        weight = weights.get(bisect_right(boundaries_us, event.time_range.start) - 1)
        if event.device_type != DeviceType.CPU:
            if weight is not None and not event.is_user_annotation:
                device_us += weight * event.time_range.elapsed_us()
            continue
        name = event.name
        phase, within = labels.add(event)
        if weight is None or name.startswith(_ANNOTATIONS):
            continue
        total = sums.setdefault((name, phase, within), _Sum())
        total.calls += weight
        total.self_us += weight * event.self_cpu_time_total
        if has_device:
            total.device_self_us += weight * event.self_device_time_total
    operators = _to_times(sums, has_device)
    return Profile(
        steps=len(weights),
        step_ms=sum(weight * durations_us[step] for step, weight in weights.items()) / 1e3,
        operators=(
            *operators[:LISTED_OPERATORS],
            *(o for o in operators[LISTED_OPERATORS:] if o.name in _ALWAYS_LISTED),
        ),
        operators_total_ms=sum(o.self_ms for o in operators),
        operators_total_calls=sum(o.calls for o in operators),
        device_total_ms=device_us / 1e3 if has_device else None,
    )


def _weigh_steps(
    durations_us: Sequence[float], updates: Sequence[bool], micro_batches: int
) -> dict[int, float]:
    """Return the weights of those steps that count in the mean; they sum to 1.

    The steps with an optimizer step and those without are trimmed apart from each other, and have
    the weight that they have in a cycle of ``micro_batches`` steps.
    """
    kinds: dict[bool, list[int]] = {}
    for step in sorted(range(len(durations_us)), key=durations_us.__getitem__):
        kinds.setdefault(micro_batches > 1 and updates[step], []).append(step)
    weights = {}
    for is_last, steps in kinds.items():
        trimmed = len(steps) // 4
        counting = steps[trimmed : len(steps) - trimmed]
        share = 1.0
        if len(kinds) > 1:
            share = 1 / micro_batches if is_last else 1 - 1 / micro_batches
        weights.update(dict.fromkeys(counting, share / len(counting)))
    return weights


def _to_times(
    sums: Mapping[tuple[str, str | None, str | None], _Sum], has_device: bool
) -> list[OperatorTimes]:
    """Return the operators, the largest first."""
    operators = [
        OperatorTimes(
            *place,
            calls=total.calls,
            self_ms=total.self_us / 1e3,
            device_self_ms=total.device_self_us / 1e3 if has_device else None,
        )
        for place, total in sums.items()
    ]
    return sorted(operators, key=lambda o: max(o.self_ms, o.device_self_ms or 0.0), reverse=True)


_Node = tuple[int, int]
"""An autograd node: the sequence number of the operator that created it, and the number of the
thread in which the operator was called."""


def _find_second_order_nodes(events: Iterable[Any]) -> set[_Node]:
    """Find the nodes that were created in a backward pass, and evaluated in a later one.

    The nodes that a checkpoint creates when it computes a forward pass again are none of them: they
    are evaluated in the same backward pass, or never.

    Args:
        events: the profiler's events, in the order of their starts.
    """
    in_backward: set[int] = set()
    created: set[_Node] = set()
    found: set[_Node] = set()
    for event in events:
        if event.device_type != DeviceType.CPU:
            continue
        is_nested = event.cpu_parent is not None and id(event.cpu_parent) in in_backward
        is_node = event.name.startswith(_BACKWARD_NODE)
        if is_nested or is_node:
            in_backward.add(id(event))
        if is_node and not is_nested:
            node = event.sequence_nr, event.fwd_thread
            if node in created:
                found.add(node)
        elif is_nested and _is_recorded(event):
            created.add((event.sequence_nr, event.thread))
        elif not is_nested:  # an operator that creates no node has the number of the next node
            created.discard((event.sequence_nr, event.thread))
    return found


def _is_recorded(event: Any) -> bool:
    """Whether an event of a backward pass is an operator that autograd records. (The call of a node
    has the node's own number.)"""
    parent = event.cpu_parent
    of_node = parent.name.startswith(_BACKWARD_NODE) and parent.sequence_nr == event.sequence_nr
    return event.sequence_nr >= 0 and not of_node and not event.name.startswith(_BACKWARD_NODE)


class _EventLabels:
    """Determines ``phase`` and ``within`` (see ``OperatorTimes``) of the profiler's events on the
    CPU.

    Args:
        second_order_nodes: the result of ``_find_second_order_nodes``.
    """

    def __init__(self, second_order_nodes: set[_Node]) -> None:
        self._labels: dict[int, tuple[str | None, str | None]] = {}
        self._work_of_node: dict[int, str] = {}
        self._second_order_nodes = second_order_nodes
        self._recorded = "second_order" if second_order_nodes else "recomputation"

    def add(self, event: Any) -> tuple[str | None, str | None]:
        """Return ``phase`` and ``within`` of the next event, which are inherited from its
        parent."""
        name, parent = event.name, event.cpu_parent
        phase, within = self._labels[id(parent)] if parent is not None else (None, None)
        # An autograd node has the same number as the operator that creates it.
        node = event.sequence_nr
        if name.startswith(_OPTIMIZER_STEP):
            phase, within = "optimizer", name.removeprefix(_OPTIMIZER_STEP).partition(".")[0]
        elif name.startswith(_BACKWARD_NODE):
            phase = "backward"
            if node in self._work_of_node:
                within = self._work_of_node[node]
            elif (node, event.fwd_thread) in self._second_order_nodes:
                within = "second_order"
        elif phase == "backward":
            if within is None and _is_recorded(event):
                within = self._recorded
        else:
            within = within or _WORK.get(name)
            if within is not None:
                self._work_of_node[node] = within
            else:  # an operator that creates no node has the number of the next node
                self._work_of_node.pop(node, None)
            self._work_of_node.pop(-1, None)
        self._labels[id(event)] = (phase, within)
        return phase, within
