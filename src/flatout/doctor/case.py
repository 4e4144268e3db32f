"""A recorded run prepared for diagnosis: medians, shares, operators. Pure; no torch."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from flatout.machine import Ceilings
from flatout.record import PHASES, ProcessRecord, Step

WARMUP_STEPS = 3
"""Steps left out at the beginning: allocator, thread pools, kernels and compilation warm up."""

COMPUTE_PHASES = ("forward", "loss", "backward", "optimizer")
"""Phases whose time is spent in operators."""

MATMUL_OPERATORS = (
    *("aten::mm", "aten::addmm", "aten::bmm", "aten::baddbmm", "aten::_addmm_activation"),
    *("aten::mkldnn_linear", "mkldnn::_linear_pointwise", "aten::mv", "aten::addmv", "aten::dot"),
)
CONVOLUTION_OPERATORS = (
    *("aten::mkldnn_convolution", "aten::convolution_backward", "aten::thnn_conv2d"),
    *("aten::_slow_conv2d_forward", "aten::_slow_conv2d_backward", "aten::slow_conv3d_forward"),
    *("aten::cudnn_convolution", "aten::miopen_convolution", "aten::_conv_depthwise2d"),
)
ARITHMETIC = ("mm", "conv", "linear", "attention", "rnn", "lstm", "gru", "fft", "matmul", "cdist")
"""Parts of names of operators that compute more than they move."""

UNCOUNTED_SHARE = 0.05
"""An arithmetic operator with no FLOP formula and more than this share of the operators' time makes
the FLOPs of the step unknown: below, the error is within the noise of the rates."""


@dataclass(frozen=True)
class Case:
    """One process of a run, with the ceilings of its machine.

    Attributes:
        process: its record.
        ceilings: of its machine, ``None`` when they could not be measured.
        usable_cores: cores that the job could use.
    """

    process: ProcessRecord
    ceilings: Ceilings | None
    usable_cores: float | None = None

    @cached_property
    def steps(self) -> list[Step]:
        """The timed steps: neither warming up nor slowed down by the profiler."""
        timed = [step for step in self.process.turns if step.mark is None]
        return timed[min(WARMUP_STEPS, max(0, len(timed) - 1)) :]

    @cached_property
    def step_ms(self) -> float:
        """Median step."""
        return statistics.median(step.step_ms for step in self.steps)

    @cached_property
    def phases_ms(self) -> dict[str, float | None]:
        """Mean time of each phase in a step; ``None`` where it was not measured."""
        means: dict[str, float | None] = {}
        for phase in PHASES:
            values = [ms for s in self.steps if (ms := s.phases_ms[phase]) is not None]
            means[phase] = statistics.fmean(values) if values else None
        return means

    @cached_property
    def mean_step_ms(self) -> float:
        """Mean step, which the phases sum to."""
        return statistics.fmean(step.step_ms for step in self.steps)

    def phase_share(self, phase: str) -> float | None:
        """Share of a phase in the step."""
        ms = self.phases_ms[phase]
        return None if ms is None else ms / self.mean_step_ms

    @property
    def profile(self) -> Mapping[str, Any]:
        """The profiled window; empty when there was none."""
        return self.process.profile or {}

    @property
    def facts(self) -> Mapping[str, Any]:
        """What the agent saw of the program; empty when it could not look."""
        return self.profile.get("facts") or {}

    @property
    def on_accelerator(self) -> bool:
        """Whether the machine has an accelerator that torch can use."""
        return self.process.header.get("accelerator") is not None

    @cached_property
    def operators(self) -> list[dict[str, Any]]:
        """The operators of a step with their ``share`` of it, largest first.

        The profiler slows small operators down. So times are scaled to what the timed steps left
        for operators (their compute phases), and never scaled up.
        """
        operators = self.profile.get("operators") or []
        total_ms = self.profile.get("operators_total_ms")
        if not operators or not total_ms:
            return []
        compute_ms = sum(self.phases_ms[phase] or 0.0 for phase in COMPUTE_PHASES)
        scale = min(1.0, compute_ms / total_ms) / self.mean_step_ms
        return [{**o, "share": o["self_ms"] * scale} for o in operators]

    def operators_share(self, wanted: Callable[[str], bool]) -> float:
        """Share of the step spent in the operators with a wanted name."""
        return float(sum(o["share"] for o in self.operators if wanted(o["name"])))

    @cached_property
    def uncounted_operators(self) -> list[str]:
        """Operators that make the FLOPs of the step unknown."""
        counted = {*self.profile.get("counted", ()), *MATMUL_OPERATORS, *CONVOLUTION_OPERATORS}
        total_ms = self.profile.get("operators_total_ms") or 1.0
        return [
            o["name"]
            for o in self.operators
            if o["self_ms"] / total_ms > UNCOUNTED_SHARE
            and o["name"] not in counted
            and any(part in o["name"].lower() for part in ARITHMETIC)
        ]

    @property
    def flops_per_step(self) -> int | None:
        """Floating point operations of a step; ``None`` when not known."""
        by_dtype = self.profile.get("flops_by_dtype")
        if not by_dtype or self.uncounted_operators:
            return None
        return int(sum(by_dtype.values()))

    @property
    def main_dtype(self) -> str | None:
        """The dtype in which most of the operations are done."""
        by_dtype = self.profile.get("flops_by_dtype")
        return max(by_dtype, key=by_dtype.get) if by_dtype else None

    @property
    def mfu(self) -> float | None:
        """Model FLOP/s over the measured ceiling of the dtype in use (Chowdhery et al. 2022,
        "PaLM", section 4.1, with a measured in place of a stated peak)."""
        if self.flops_per_step is None or self.ceilings is None or self.main_dtype is None:
            return None
        ceiling = self.ceilings.matmul_flops_per_s.get(self.main_dtype)
        if not ceiling:
            return None
        return self.flops_per_step / (self.step_ms / 1e3) / ceiling
