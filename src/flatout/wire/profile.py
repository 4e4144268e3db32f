"""What a profiled window has measured: the operators of a step, page faults, operations."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import ClassVar

from flatout.wire.codec import OMIT_NONE
from flatout.wire.facts import ProgramFacts

MANY_FAULTS = 256
"""Minor page faults of a step (1 MiB of memory) below which they cannot matter."""


@dataclass(frozen=True)
class OperatorTimes:
    """An operator in one part of the step; all figures are means over the profiled steps.

    Attributes:
        name: as torch's profiler has it, such as ``aten::mm``.
        phase: ``optimizer``, ``backward``, or ``None`` for any other.
        within: ``attention`` for what ``scaled_dot_product_attention`` does where it has no fused
            kernel, in both directions; otherwise ``None``.
        calls: calls in a step.
        self_ms: time of a step on the host, without operators that it calls.
        device_self_ms: the same on the accelerator; ``None``: the program uses none.
    """

    name: str
    phase: str | None
    within: str | None
    calls: float
    self_ms: float
    device_self_ms: float | None


@dataclass(frozen=True)
class Profile:
    """A profiled window; what could not be measured is ``None``, and an event says why.

    The profiler slows steps down. Times and counts are means over the profiled steps without the
    fastest and the slowest quarter of them.

    Attributes:
        steps: steps that the means are over.
        step_ms: time of a profiled step.
        operators: the largest operators, largest first.
        operators_total_ms, operators_total_calls: self time and calls of all operators in a step,
            listed or not.
        device_total_ms: time of all kernels of the accelerator in a step; ``None`` also where the
            program uses none.
        minor_faults, minor_faults_of_thread: minor page faults in a step, of all threads and of
            the main thread.
        page_fault_us: what one of them costs this process.
        page_fault_step_ms: time of the steps between the measurements of that cost.
        flops_by_dtype: name of a dtype -> floating-point operations of a step in it.
        counted: operator -> its calls in a step whose operations were counted.
        uncountable: operator -> why its operations could not be counted.
        facts: what was seen of the program after the window.
    """

    kind: ClassVar[str] = "profile"

    steps: int = 0
    step_ms: float | None = field(default=None, metadata=OMIT_NONE)
    operators: tuple[OperatorTimes, ...] | None = field(default=None, metadata=OMIT_NONE)
    operators_total_ms: float | None = field(default=None, metadata=OMIT_NONE)
    operators_total_calls: float | None = field(default=None, metadata=OMIT_NONE)
    device_total_ms: float | None = None
    minor_faults: float | None = field(default=None, metadata=OMIT_NONE)
    minor_faults_of_thread: float | None = field(default=None, metadata=OMIT_NONE)
    page_fault_us: float | None = field(default=None, metadata=OMIT_NONE)
    page_fault_step_ms: float | None = field(default=None, metadata=OMIT_NONE)
    flops_by_dtype: Mapping[str, int] | None = field(default=None, metadata=OMIT_NONE)
    counted: Mapping[str, int] = field(default_factory=dict)
    uncountable: Mapping[str, str] = field(default_factory=dict)
    facts: ProgramFacts | None = field(default=None, metadata=OMIT_NONE)
