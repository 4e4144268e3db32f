"""The results of a profiled window: operator times, page faults and FLOP counts of a step."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import ClassVar

from flatout.wire.codec import OMIT_NONE
from flatout.wire.facts import ProgramFacts

MANY_FAULTS = 256
"""Fewer minor page faults per step than this (1 MiB) are negligible."""


@dataclass(frozen=True)
class OperatorTimes:
    """The times of an operator in one part of the step. All numbers are means over profiled steps.

    Attributes:
        name: the operator's name in torch's profiler, such as ``aten::mm``.
        phase: ``optimizer``, ``backward``, or ``None`` for any other phase.
        within: the work that the operator is called for; ``None`` for any other work.
            ``attention``: ``scaled_dot_product_attention`` without a fused kernel, in forward and
            backward. ``recurrent``: ``aten::lstm``, ``aten::gru`` and simple recurrent networks, in
            forward and backward, where they call an operator for each time step.
            ``second_order``: backward passes that autograd records
            (``create_graph=True``), and the backward of what was recorded there.
            ``recomputation``: forward passes that are computed again in backward
            (``torch.utils.checkpoint``). In the phase ``optimizer``: the name of the optimizer's
            class.
        calls: the number of calls per step.
        self_ms: the host self time per step (excluding called operators).
        device_self_ms: the self time per step on the accelerator; ``None``: the program uses no
            accelerator.
    """

    name: str
    phase: str | None
    within: str | None
    calls: float
    self_ms: float
    device_self_ms: float | None


@dataclass(frozen=True)
class Profile:
    """A profiled window. A field that could not be measured is ``None``, and an event says why.

    The profiler slows steps down. Times and counts are means over the profiled steps without the
    fastest and the slowest quarter of them.

    Attributes:
        steps: the number of steps in the means.
        step_ms: the time of a profiled step.
        operators: the operators with the largest times, largest first; and those that tell what a
            program does, however short they are.
        operators_total_ms, operators_total_calls: the self time and the calls per step of all
            operators, listed or not.
        device_total_ms: the time per step of all kernels on the accelerator; ``None`` also if the
            program uses no accelerator.
        minor_faults, minor_faults_of_thread: the minor page faults per step, of all threads and of
            the main thread.
        page_fault_us: the cost of a minor page fault in this process.
        page_fault_step_ms: the step time while the page-fault cost was being measured.
        flops_by_dtype: a map from the name of a dtype to the floating-point operations per step in
            it.
        counted: a map from an operator to the number of its calls per step for which FLOPs were
            counted.
        uncountable: a map from an operator to the reason why its FLOPs could not be counted.
        facts: the facts about the program, collected after the window.
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
