"""Prepares a recorded run for diagnosis: medians, shares, operators.

All functions are pure, and nothing imports torch.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property

from flatout.doctor.ranks import Ranks
from flatout.machine import Ceilings
from flatout.wire.disturbance import NOT_MEASURED, History, Stretch
from flatout.wire.facts import ProgramFacts
from flatout.wire.profile import Profile
from flatout.wire.record import ProcessRecord, Step
from flatout.wire.turns import PHASES

MATMUL_OPERATORS = frozenset(
    {
        *("aten::mm", "aten::addmm", "aten::bmm", "aten::baddbmm", "aten::_addmm_activation"),
        *("aten::mkldnn_linear", "mkldnn::_linear_pointwise", "mkl::_mkl_linear"),
        *("aten::mv", "aten::addmv", "aten::dot"),
    }
)
PRODUCTS_WITHIN = {
    "aten::_transformer_encoder_layer_fwd": 6,
    "aten::_native_multi_head_attention": 4,
}
"""How many matmuls each of these operators calls. Such an operator has a FLOP formula of its own,
and the profiler sees its matmuls as well."""

WITHIN_COUNTED = {"aten::_transformer_encoder_layer_fwd": "aten::_native_multi_head_attention"}
"""Operators that the profiler lists on their own, and whose FLOPs are counted in their caller."""

CONVOLUTION_OPERATORS = frozenset(
    {
        *("aten::mkldnn_convolution", "aten::convolution_backward", "aten::thnn_conv2d"),
        *("aten::_slow_conv2d_forward", "aten::_slow_conv2d_backward", "aten::slow_conv3d_forward"),
        *("aten::cudnn_convolution", "aten::miopen_convolution", "aten::_conv_depthwise2d"),
        *("aten::convolution", "aten::_convolution", "aten::convolution_overrideable"),
        *("mkldnn::_convolution_pointwise", "aten::mkldnn_convolution_backward"),
    }
)
_ARITHMETIC = (
    *("attention", "rnn", "lstm", "gru", "fft", "linalg", "cdist", "trilinear", "conv", "matmul"),
    *("mm", "linear", "cholesky", "svd", "solve", "embedding_bag"),
)
"""Parts of the names of operators that may compute more than they move. All other operators
(elementwise, reductions, norms, random numbers, indexing, copies) have too few FLOPs to count."""

UNCOUNTED_SHARE = 0.05
"""Share of the operators' time above which an arithmetic operator without a FLOP formula makes the
FLOPs of the step unknown. Below it, the error is smaller than that of the measured rates."""

HIDDEN_CALLS = 1.5
"""Ratio of matmuls profiled to matmuls counted above which another operator must hide some of them
from the FLOP counter. Batches whose shapes change move this ratio a little."""

PROFILER_US = 2.0
"""The most that torch's profiler adds to an operator: on an EPYC it added 0.4 microseconds when
warm, and 1 in a real step. Any further difference is a change of the machine's speed."""

LARGE_US = 20.0
"""Mean time of an operator above which its kernel takes most of it: Python, autograd and dispatch
cost some 5 to 10 microseconds a call."""


@dataclass(frozen=True)
class Operator:
    """An operator of a step, with what it costs.

    Attributes:
        name, calls, self_ms, device_self_ms: as in ``OperatorTimes`` of ``wire/profile.py``.
        work_ms: time that its work takes, on the accelerator if the profile has its times.
        share: share of the step that its work takes.
        host_share: share of the step that the host spends on it.
    """

    name: str
    calls: float
    self_ms: float
    device_self_ms: float | None
    work_ms: float
    share: float
    host_share: float

    @property
    def is_large(self) -> bool:
        """Whether its kernel is the larger part of a call."""
        return self.work_ms * 1e3 > LARGE_US * self.calls

    @property
    def is_arithmetic(self) -> bool:
        """Whether it is a matmul or a convolution."""
        return self.name in MATMUL_OPERATORS or self.name in CONVOLUTION_OPERATORS

    def plus(self, other: Operator) -> Operator:
        """Both together, under the name of this one."""
        device_ms = [ms for ms in (self.device_self_ms, other.device_self_ms) if ms is not None]
        return Operator(
            self.name,
            self.calls + other.calls,
            self.self_ms + other.self_ms,
            sum(device_ms) if device_ms else None,
            self.work_ms + other.work_ms,
            self.share + other.share,
            self.host_share + other.host_share,
        )


@dataclass(frozen=True)
class PlacedOperator(Operator):
    """An operator in one part of the step; ``phase`` and ``within`` are those of the profile."""

    phase: str | None
    within: str | None


@dataclass(frozen=True)
class TimedSteps:
    """The steps of one process that tell its usual time, and what follows from them alone.

    Attributes:
        process: the record of the process, which has steps.
    """

    process: ProcessRecord

    @cached_property
    def steps(self) -> list[Step]:
        """The steady steps; of a program that ends while it warms up, its last timed step."""
        return self.process.steady_steps or self.process.timed_steps[-1:]

    @cached_property
    def other_work(self) -> Stretch:
        """What other processes took of the CPUs while these steps were timed."""
        if not self.steps:
            return NOT_MEASURED
        history = History(self.process.usage, self.process.usage_beside)
        return history.between(self.steps[0].at_s, self.steps[-1].end_s)

    @cached_property
    def warmup_steps(self) -> list[Step]:
        """The first steps, which are left out."""
        first = self.steps[0].at_s if self.steps else float("inf")
        return [step for step in self.process.loop_steps if step.at_s < first]

    @cached_property
    def evaluations(self) -> list[Step]:
        """Evaluation passes between the timed steps of training."""
        return self.process.evaluations_before(self.steps)

    @cached_property
    def step_ms(self) -> float:
        """The median time of a step, in milliseconds."""
        return statistics.median(step.step_ms for step in self.steps)

    @cached_property
    def mean_step_ms(self) -> float:
        """The mean time of a step, in milliseconds; the mean phases sum to it."""
        return statistics.fmean(step.step_ms for step in self.steps)

    @cached_property
    def phases_ms(self) -> dict[str, float | None]:
        """The mean time of each phase of a step, in milliseconds; ``None``: not measured."""
        means: dict[str, float | None] = {}
        for phase in PHASES:
            values = [ms for s in self.steps if (ms := s.phases_ms[phase]) is not None]
            means[phase] = statistics.fmean(values) if values else None
        return means

    def phase_share(self, *phases: str) -> float:
        """The share of the step that these phases take; an unmeasured phase counts as 0."""
        return sum(self.phases_ms[phase] or 0.0 for phase in phases) / self.mean_step_ms

    @property
    def minor_faults_per_step(self) -> float | None:
        """The minor page faults of all threads in a step; ``None``: not measured."""
        faults = [step.minor_faults for step in self.steps if step.minor_faults is not None]
        return statistics.fmean(faults) if faults else None

    @property
    def peak_device_bytes(self) -> int | None:
        """The most memory allocated on the accelerator; ``None``: not measured, or none is used."""
        return (
            max((step.peak_device_bytes or 0 for step in self.process.loop_steps), default=0)
            or None
        )


@dataclass(frozen=True)
class Case(TimedSteps):
    """One process of a run, with what its machine can do at most.

    Attributes:
        ceilings: the measured rates of its machine, ``None`` if not known.
        usable_cores: how many cores the job could use, ``None`` if not known.
        ranks: what the ranks have spent their time on; ``None``: there are none, or it was not
            measured.
        processes: how many processes of the job made steps at the same time as this one, which is
            counted too.
    """

    ceilings: Ceilings | None = None
    usable_cores: float | None = None
    ranks: Ranks | None = None
    processes: int = 1

    # The profiled window

    @property
    def profile(self) -> Profile:
        """The profiled window; an empty one when there was none."""
        return self.process.profile or Profile()

    @property
    def facts(self) -> ProgramFacts:
        """What the agent saw of the program; nothing when it could not look."""
        return self.profile.facts or ProgramFacts()

    @property
    def device(self) -> str:
        """Type of the device that the program computes on; that of the machine's accelerator only
        where the program was seen to use it."""
        accelerator = self.process.header.accelerator
        has_used = (
            self.profile.device_total_ms
            or accelerator in self.facts.parameters.elements_by_device
            or self.peak_device_bytes
        )
        return accelerator if accelerator is not None and has_used else "cpu"

    @property
    def on_accelerator(self) -> bool:
        """Whether the program computes on an accelerator."""
        return self.device != "cpu"

    @property
    def matmul_flops_per_s(self) -> Mapping[str, float | None]:
        """The measured matmul rate of the program's device, by dtype; empty: not known."""
        if self.ceilings is None:
            return {}
        rates = self.ceilings.devices.get(self.device, {}).get("matmul_flops_per_s", {})
        return dict(rates)

    @property
    def device_share(self) -> float | None:
        """Share of a profiled step in which the accelerator was busy, ``None`` without one."""
        device_ms = self.profile.device_total_ms
        return min(1.0, device_ms / self._profiled_step_ms) if device_ms else None

    def host_share(self, *phases: str) -> float:
        """The largest share of the step that less work on the host could save in these phases.

        On an accelerator it is no more than the share in which the accelerator is idle, since the
        host cannot shorten the rest; it is 0 where that share is not known.
        """
        idle = 1.0 - (self.device_share or 0.0)
        if self.on_accelerator and self.device_share is None:
            idle = 0.0
        return min(self.phase_share(*phases), idle)

    @property
    def _profiler_ms(self) -> float:
        """What the profiler has added to a step."""
        longer_ms = max(0.0, (self.profile.step_ms or 0.0) - self.step_ms)
        return min(longer_ms, (self.profile.operators_total_calls or 0.0) * PROFILER_US / 1e3)

    @property
    def _profiled_step_ms(self) -> float:
        """The profiled step, less what the profiler has added."""
        return (self.profile.step_ms or 0.0) - self._profiler_ms

    @cached_property
    def page_fault_share(self) -> float | None:
        """The share of the step that page faults take, ``None`` if not known."""
        faults, cost_us = self.minor_faults_per_step, self.page_fault_us
        if faults is None or cost_us is None:
            return None
        step_ms = self.profile.page_fault_step_ms or self.mean_step_ms
        return min(1.0, faults * self.main_thread_faults * cost_us / 1e3 / step_ms)

    @property
    def page_fault_us(self) -> float | None:
        """Cost of a minor fault: as measured in the job, else by ``flatout machine``."""
        in_job = self.profile.page_fault_us
        if in_job is None and self.ceilings is not None:
            return self.ceilings.page_fault_us
        return in_job

    @property
    def main_thread_faults(self) -> float:
        """Which part of the page faults the step waits for. Threads that compute together fault
        together, so it is the main thread's part."""
        all_threads = self.profile.minor_faults
        in_thread = self.profile.minor_faults_of_thread
        return in_thread / all_threads if all_threads and in_thread is not None else 1.0

    @cached_property
    def operators(self) -> list[PlacedOperator]:
        """The operators of a step, largest first.

        Each has ``work_ms``, the time that its work takes (on the accelerator, if the profile has
        times of it), ``share``, its share of the step, and ``host_share``, the share that the host
        spends on it.

        The profiler adds about the same time to each call. That time is estimated as the difference
        between the profiled steps and the median timed step, divided by the calls, at most
        ``PROFILER_US``; it is subtracted from each operator and from the profiled step.
        """
        calls = self.profile.operators_total_calls
        if not calls:
            return []
        added_ms = self._profiler_ms / calls
        on_device = self.device_share is not None
        found = []
        for o in self.profile.operators or ():
            host_ms = max(0.0, o.self_ms - o.calls * added_ms)
            device_ms = o.device_self_ms or 0.0
            found.append(
                PlacedOperator(
                    name=o.name,
                    calls=o.calls,
                    self_ms=o.self_ms,
                    device_self_ms=o.device_self_ms,
                    work_ms=device_ms if on_device else o.self_ms,
                    share=(device_ms if on_device else host_ms) / self._profiled_step_ms,
                    host_share=host_ms / self._profiled_step_ms,
                    phase=o.phase,
                    within=o.within,
                )
            )
        return found

    @property
    def all_operators_share(self) -> float | None:
        """Share of the step spent in operators, those that are not listed as well; ``None``: not
        measured."""
        total_ms = self.profile.operators_total_ms
        if total_ms is None:
            return None
        return min(1.0, max(0.0, total_ms - self._profiler_ms) / self._profiled_step_ms)

    def operators_share(self, wanted: Callable[[PlacedOperator], bool]) -> float:
        """Share of the step spent in the wanted operators."""
        return min(1.0, sum(o.share for o in self.operators if wanted(o)))

    @property
    def operators_by_name(self) -> list[Operator]:
        """Operators with one entry a name, whatever part of the step they are called from."""
        merged: dict[str, Operator] = {}
        for operator in self.operators:
            none = Operator(operator.name, 0.0, 0.0, None, 0.0, 0.0, 0.0)
            merged[operator.name] = merged.get(operator.name, none).plus(operator)
        ordered = sorted(merged.values(), key=lambda o: o.host_share, reverse=True)
        return sorted(ordered, key=lambda o: o.share, reverse=True)

    # FLOPs

    @cached_property
    def uncounted_operators(self) -> list[str]:
        """Operators that make the FLOPs of the step unknown."""
        counted = self.profile.counted
        total_ms = self.profile.operators_total_ms
        if self.device_share is not None:
            total_ms = self.profile.device_total_ms
        if not total_ms:
            return []
        products = [o for o in self.operators if o.name in MATMUL_OPERATORS]
        products_counted = sum(counted.get(name, 0) for name in MATMUL_OPERATORS)
        products_counted += sum(n * counted.get(name, 0) for name, n in PRODUCTS_WITHIN.items())
        is_same_work = not any(turn.mark for turn in self.process.evaluations)
        hidden = is_same_work and (sum(o.calls for o in products) > HIDDEN_CALLS * products_counted)
        known = {*counted, *(part for whole, part in WITHIN_COUNTED.items() if whole in counted)}
        if not hidden:
            known |= MATMUL_OPERATORS
        if any("conv" in name for name in counted):
            known |= CONVOLUTION_OPERATORS
        heavy = [o for o in self.operators_by_name if o.work_ms > UNCOUNTED_SHARE * total_ms]
        uncounted = {o.name for o in heavy if _may_compute(o.name)} - known
        return sorted(uncounted | self.profile.uncountable.keys())

    @property
    def flops_per_step(self) -> int | None:
        """Floating point operations of a step; ``None`` when not known."""
        by_dtype = self.profile.flops_by_dtype
        return None if by_dtype is None or self.uncounted_operators else sum(by_dtype.values())

    @property
    def main_dtype(self) -> str | None:
        """The dtype in which most of the operations are done."""
        by_dtype = self.profile.flops_by_dtype
        return max(by_dtype, key=by_dtype.__getitem__) if by_dtype else None

    @property
    def mfu(self) -> float | None:
        """Model FLOP/s utilisation: the time that the step's operations need at the measured matmul
        rates of their dtypes, divided by the time of the step (Chowdhery et al. 2022, "PaLM",
        section 4.1, with measured rates for the stated peak); ``None`` if not known."""
        if self.flops_per_step is None:
            return None
        seconds = 0.0
        for dtype, flops in (self.profile.flops_by_dtype or {}).items():
            ceiling = self.matmul_flops_per_s.get(dtype)
            if not ceiling:
                return None
            seconds += flops / ceiling
        return seconds / (self.mean_step_ms / 1e3)


def _may_compute(name: str) -> bool:
    """Whether an operator of this name may compute more than it moves."""
    library, _, operator = name.partition("::")
    return library in ("aten", "mkldnn", "mkl", "onednn", "xpu") and any(
        part in operator.lower() for part in _ARITHMETIC
    )
