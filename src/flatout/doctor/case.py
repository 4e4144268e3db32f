"""Prepares a recorded run for diagnosis: medians, shares, operators.

All functions are pure, and nothing imports torch.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from flatout.machine import Ceilings
from flatout.wire.record import ProcessRecord, Step
from flatout.wire.turns import PHASES

WARMUP_STEPS = 3
"""The first steps are left out: compilation, allocator, thread pools and caches warm up in them."""

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
class TimedSteps:
    """The steps of one process that tell its usual time, and what follows from them alone.

    Attributes:
        process: the record of the process, which has steps.
    """

    process: ProcessRecord

    @cached_property
    def steps(self) -> list[Step]:
        """The timed steps, without the warm-up and without those that the profiler slows down."""
        timed = [step for step in self.process.turns if step.mark is None]
        return timed[min(WARMUP_STEPS, max(0, len(timed) - 1)) :]

    @cached_property
    def warmup_steps(self) -> list[Step]:
        """The first steps, which are left out."""
        first = self.steps[0].at_s if self.steps else float("inf")
        return [step for step in self.process.turns if step.at_s < first]

    @cached_property
    def evaluations(self) -> list[Step]:
        """Evaluation passes between the timed steps of training."""
        if not self.process.trains:
            return []
        first, last = self.steps[0], self.steps[-1]
        return [
            turn
            for turn in self.process.evaluations
            if turn.mark is None and first.at_s <= turn.at_s <= last.at_s
        ]

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
        return max((step.peak_device_bytes or 0 for step in self.process.turns), default=0) or None


@dataclass(frozen=True)
class Case(TimedSteps):
    """One process of a run, with what its machine can do at most.

    Attributes:
        ceilings: the measured rates of its machine, ``None`` if not known.
        usable_cores: how many cores the job could use, ``None`` if not known.
    """

    ceilings: Ceilings | None = None
    usable_cores: float | None = None

    # The profiled window

    @property
    def profile(self) -> Mapping[str, Any]:
        """What the profiler saw; empty where no step was profiled."""
        return self.process.profile or {}

    @property
    def facts(self) -> Mapping[str, Any]:
        """What the agent saw of the program; empty where it could not look."""
        return self.profile.get("facts") or {}

    @property
    def device(self) -> str:
        """The type of the device that the program computes on: the accelerator, if the program was
        seen to use it, or else the CPU."""
        accelerator = self.process.header.get("accelerator")
        has_used = (
            self.profile.get("device_total_ms")
            or accelerator in self.facts.get("parameters", {}).get("elements_by_device", {})
            or self.peak_device_bytes
        )
        return str(accelerator) if accelerator is not None and has_used else "cpu"

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
        """The share of a profiled step in which the accelerator was busy, ``None`` without one."""
        device_ms = self.profile.get("device_total_ms")
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
        """What the profiler added to a step, in milliseconds."""
        longer_ms = max(0.0, float(self.profile["step_ms"]) - self.step_ms)
        return min(longer_ms, float(self.profile["operators_total_calls"]) * PROFILER_US / 1e3)

    @property
    def _profiled_step_ms(self) -> float:
        """The time of a profiled step without what the profiler added, in milliseconds."""
        return float(self.profile["step_ms"]) - self._profiler_ms

    @cached_property
    def page_fault_share(self) -> float | None:
        """The share of the step that page faults take, ``None`` if not known."""
        faults, cost_us = self.minor_faults_per_step, self.page_fault_us
        if faults is None or cost_us is None:
            return None
        step_ms = self.profile.get("page_fault_step_ms") or self.mean_step_ms
        return min(1.0, faults * self.main_thread_faults * cost_us / 1e3 / step_ms)

    @property
    def page_fault_us(self) -> float | None:
        """The time of a minor page fault, measured in the job or else by ``flatout machine``."""
        in_job: float | None = self.profile.get("page_fault_us")
        if in_job is None and self.ceilings is not None:
            return self.ceilings.page_fault_us
        return in_job

    @property
    def main_thread_faults(self) -> float:
        """The share of the page faults that the step waits for: those of the main thread, because
        threads that compute together fault together."""
        all_threads = self.profile.get("minor_faults")
        return float(self.profile["minor_faults_of_thread"] / all_threads) if all_threads else 1.0

    @cached_property
    def operators(self) -> list[dict[str, Any]]:
        """The operators of a step, the largest first.

        Each has ``work_ms``, the time that its work takes (on the accelerator, if the profile has
        times of it), ``share``, its share of the step, and ``host_share``, the share that the host
        spends on it.

        The profiler adds about the same time to each call. That time is estimated as the difference
        between the profiled steps and the median timed step, divided by the calls, at most
        ``PROFILER_US``; it is subtracted from each operator and from the profiled step.
        """
        calls = self.profile.get("operators_total_calls")
        if not calls:
            return []
        added_ms = self._profiler_ms / calls
        found = []
        for o in self.profile["operators"]:
            host_ms = max(0.0, o["self_ms"] - o["calls"] * added_ms)
            on_device = self.device_share is not None
            found.append(
                {
                    **o,
                    "work_ms": (o["device_self_ms"] or 0.0) if on_device else o["self_ms"],
                    "share": (o["device_self_ms"] or 0.0 if on_device else host_ms)
                    / self._profiled_step_ms,
                    "host_share": host_ms / self._profiled_step_ms,
                }
            )
        return found

    @property
    def all_operators_share(self) -> float | None:
        """The share of the step spent in all operators, listed or not; ``None``: not measured."""
        total_ms = self.profile.get("operators_total_ms")
        if total_ms is None:
            return None
        return float(min(1.0, max(0.0, total_ms - self._profiler_ms) / self._profiled_step_ms))

    def operators_share(self, wanted: Callable[[Mapping[str, Any]], bool]) -> float:
        """The share of the step spent in the wanted operators."""
        return min(1.0, float(sum(o["share"] for o in self.operators if wanted(o))))

    @property
    def operators_by_name(self) -> list[dict[str, Any]]:
        """The operators with one entry for each name, the largest first, whoever calls them."""
        merged: dict[str, dict[str, Any]] = {}
        for operator in self.operators:
            known = merged.setdefault(
                operator["name"],
                {"name": operator["name"], "calls": 0.0, "self_ms": 0.0, "device_self_ms": None}
                | {"work_ms": 0.0, "share": 0.0, "host_share": 0.0},
            )
            for key in ("calls", "self_ms", "device_self_ms", "work_ms", "share", "host_share"):
                if operator[key] is not None:
                    known[key] = (known[key] or 0.0) + operator[key]
        ordered = sorted(merged.values(), key=lambda o: o["host_share"], reverse=True)
        return sorted(ordered, key=lambda o: o["share"], reverse=True)

    # FLOPs

    @cached_property
    def uncounted_operators(self) -> list[str]:
        """The operators whose FLOPs are not known, and with them those of the step."""
        counted = self.profile.get("counted", {})
        total_ms = self.profile.get("operators_total_ms")
        if self.device_share is not None:
            total_ms = self.profile["device_total_ms"]
        if not total_ms:
            return []
        products = [o for o in self.operators if o["name"] in MATMUL_OPERATORS]
        products_counted = sum(counted.get(name, 0) for name in MATMUL_OPERATORS)
        products_counted += sum(n * counted.get(name, 0) for name, n in PRODUCTS_WITHIN.items())
        is_same_work = not any(turn.mark for turn in self.process.evaluations)
        hidden = is_same_work and (
            sum(o["calls"] for o in products) > HIDDEN_CALLS * products_counted
        )
        known = {*counted, *(part for whole, part in WITHIN_COUNTED.items() if whole in counted)}
        if not hidden:
            known |= MATMUL_OPERATORS
        if any("conv" in name for name in counted):
            known |= CONVOLUTION_OPERATORS
        heavy = [o for o in self.operators_by_name if o["work_ms"] > UNCOUNTED_SHARE * total_ms]
        uncounted = {o["name"] for o in heavy if _is_arithmetic(o["name"])} - known
        return sorted(uncounted | self.profile.get("uncountable", {}).keys())

    @property
    def flops_per_step(self) -> int | None:
        """The floating point operations of a step; ``None`` if not known."""
        by_dtype = self.profile.get("flops_by_dtype")
        return None if by_dtype is None or self.uncounted_operators else sum(by_dtype.values())

    @property
    def main_dtype(self) -> str | None:
        """The dtype of most floating point operations; ``None`` if not known."""
        by_dtype = self.profile.get("flops_by_dtype")
        return max(by_dtype, key=by_dtype.get) if by_dtype else None

    @property
    def mfu(self) -> float | None:
        """Model FLOP/s utilisation: the time that the step's operations need at the measured matmul
        rates of their dtypes, divided by the time of the step (Chowdhery et al. 2022, "PaLM",
        section 4.1, with measured rates for the stated peak); ``None`` if not known."""
        if self.flops_per_step is None:
            return None
        seconds = 0.0
        for dtype, flops in self.profile["flops_by_dtype"].items():
            ceiling = self.matmul_flops_per_s.get(dtype)
            if not ceiling:
                return None
            seconds += flops / ceiling
        return seconds / (self.mean_step_ms / 1e3)


def is_large(operator: Mapping[str, Any]) -> bool:
    """Whether an operator's kernel takes most of the time of a call."""
    return bool(operator["work_ms"] * 1e3 > LARGE_US * operator["calls"])


def is_arithmetic(operator: Mapping[str, Any]) -> bool:
    """Whether an operator is a matmul or a convolution."""
    return operator["name"] in MATMUL_OPERATORS or operator["name"] in CONVOLUTION_OPERATORS


def _is_arithmetic(name: str) -> bool:
    library, _, operator = name.partition("::")
    return library in ("aten", "mkldnn", "mkl", "onednn", "xpu") and any(
        part in operator.lower() for part in _ARITHMETIC
    )
