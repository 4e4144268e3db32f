"""Decides whether a plan brings today what it promised, and if not, why.

The functions are pure. They get the steps of a run with the plan, in *stretches* of about a second,
and what is known of the machine meanwhile; ``cli/watching.py`` collects both.

A message that comes for no reason is worse than none, so all of this must hold:

- The run is the job of the plan: the same program, with arguments that change its length or its
  seed at most. Steps that are built otherwise than the first ones (another loop, another model) do
  not count, nor do evaluation passes, nor does the warm-up.
- There are enough steps and stretches, and nearly all stretches are slow: a low quantile over
  stretches is judged, because other work on the machine, saving and logging only lengthen steps.
- More than half of the gain is lost (on a logarithmic scale), and steps are at least
  ``NOTICEABLE`` times as long as promised.
- There is a cause: one that was observed, or, without one, steps that are slower than the bare
  program's were from the start of the run, by more than a shared machine drifts.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from statistics import median

from flatout.plan import Fact, Plan
from flatout.wire import signature
from flatout.wire.turns import Turn

WARMUP_STEPS = 3
"""The number of steps at the start of a run that do not count, as in the measurement."""

STRETCH_S = 1.0
"""The least duration of a stretch."""

STRETCH_STEPS = 3
"""The least number of steps of a stretch: its median must not be that of one slow step."""

LEAST_STRETCHES = 12
"""With fewer stretches nothing is judged."""

LEAST_STEPS = 40
"""With fewer steps nothing is judged."""

JUDGED_STRETCHES = 60
"""The most recent stretches that are judged."""

LOW = 0.2
"""The quantile over stretches that is judged: four in five are slower."""

NOTICEABLE = 1.25
"""Steps that are at most this many times as long as promised are no news on a shared machine."""

UNEXPLAINED = 1.5
"""The same where no cause is seen, and the fixed piece of work shows that the processor is as fast
as it was. What it does not show, such as other programs' use of the memory, costs less."""

DRIFT = 2.0
"""The same where no cause is seen and the speed of the processor is not known. Shared machines
drift by this much within minutes."""

BUSY_CPUS = 0.5
"""Other programs are a cause if they use this many CPUs, or ``BUSY_SHARE`` of those allowed."""

BUSY_SHARE = 0.1

THROTTLED_SHARE = 0.05
"""A CPU quota is a cause if it stops the job for this share of the time."""

SLOWER_WORK = 1.15
"""The machine itself is slower if the fixed piece of work takes this many times as long."""


def low_quantile(values: Collection[float]) -> float:
    """Return the ``LOW`` quantile of some values, at least one: what disturbance cannot lower."""
    ordered = sorted(values)
    return ordered[int(LOW * (len(ordered) - 1))]


@dataclass(frozen=True)
class Stretch:
    """Some successive steps.

    Attributes:
        start_ns, end_ns: the time from the first to the last, as ``time.perf_counter_ns`` readings.
        step_ms: the median time of a step.
        steps: the number of steps.
    """

    start_ns: int
    end_ns: int
    step_ms: float
    steps: int


class Stretches:
    """Divides the steps of a process into stretches.

    Args:
        proven_steps: the number of steps from the start of the program that the proof covers. Only
            steps that are built like one of these are timed.

    Attributes:
        done: the stretches that are complete.
    """

    def __init__(self, proven_steps: int) -> None:
        self._proven_steps = max(proven_steps, LEAST_STEPS)
        self._start("")

    def _start(self, kind: str) -> None:
        self.done: list[Stretch] = []
        self._kind = kind
        self._known: set[object] = set()
        self._times_ms: list[float] = []
        self._start_ns = 0

    def add(self, turn: Turn) -> None:
        """Add the next turn of the process."""
        if not self._kind or (turn.kind == "step" and self._kind != "step"):
            self._start(turn.kind)  # what came before the first training step was a check
        if turn.kind != self._kind or turn.index < WARMUP_STEPS or turn.mark is not None:
            return
        built = (turn.forwards, turn.backwards, turn.updates, turn.fetched, turn.roots)
        if turn.index < self._proven_steps:
            self._known.add(built)
        elif built not in self._known:
            return
        if not self._times_ms:
            self._start_ns = turn.start_ns
        self._times_ms.append((turn.end_ns - turn.start_ns) / 1e6)
        is_long = turn.end_ns - self._start_ns >= STRETCH_S * 1e9
        if is_long and len(self._times_ms) >= STRETCH_STEPS:
            times_ms, self._times_ms = self._times_ms, []
            self.done.append(Stretch(self._start_ns, turn.end_ns, median(times_ms), len(times_ms)))


@dataclass(frozen=True)
class Promise:
    """What a plan's evidence promises.

    Attributes:
        settings: what was proven.
        bare_ms, plan_ms: the median step times then, or the means in older plans.
        spread: the upper end of the ratio's interval over the ratio: how far the bare step time is
            known.
        steps: how many steps the proof covers.
        inputs: ``Plan.inputs``.
        threads: the number of torch's threads then; ``None``: not known.
        torch: the version of torch then; ``None``: not known.
        fixed_work_us: the time of the fixed piece of work then; ``None``: not measured.
    """

    settings: Mapping[str, str]
    bare_ms: float
    plan_ms: float
    spread: float = 1.0
    steps: int = 0
    inputs: tuple[str, ...] | None = None
    threads: int | None = None
    torch: str | None = None
    fixed_work_us: float | None = None

    @property
    def least_factor(self) -> float:
        """How many times longer than promised steps are where half of the gain is lost."""
        return max(NOTICEABLE, math.sqrt(self.bare_ms / self.plan_ms))


def promise_of(plan: Plan, command: Sequence[str]) -> Promise | None:
    """Return what a plan promises for a job; ``None`` if it has no evidence for these settings, or
    if the job is another one."""
    evidence = plan.evidence
    if evidence is None or not plan.proven or plan.program_changes(command):
        return None
    reference = evidence.reference
    bare_ms, plan_ms = evidence.bare_step_ms, evidence.plan_step_ms
    if reference is not None:
        bare_ms, plan_ms = reference.bare_median_ms, reference.plan_median_ms
    if bare_ms <= plan_ms:
        return None
    return Promise(
        settings=evidence.settings,
        bare_ms=bare_ms,
        plan_ms=plan_ms,
        spread=evidence.ratio_high / evidence.ratio,
        steps=evidence.steps,
        inputs=plan.inputs,
        threads=None if reference is None else reference.threads,
        torch=plan.torch,
        fixed_work_us=None if reference is None else reference.fixed_work_us,
    )


@dataclass(frozen=True)
class Today:
    """A run with the plan, so far.

    Attributes:
        stretches: the stretches of its main process.
        inputs: the inputs of the first outermost module calls (``wire/signature.py``); ``None``:
            not known.
        threads: the number of torch's threads; ``None``: not known.
        torch: the version of torch; ``None``: not known.
        machine_causes: what ``find_machine_causes`` returns.
        left_out: knob -> why its setting is not in effect.
        cpus: the number of CPUs that the job may use.
        others_cpus: how many of these other programs use, on average over the judged stretches;
            ``None``: not measured.
        throttled_share: the share of the time for which a CPU quota stops the job, likewise.
        fixed_work_us: the time of the fixed piece of work, likewise, a low quantile.
    """

    stretches: Sequence[Stretch]
    inputs: tuple[str, ...] | None = None
    threads: int | None = None
    torch: str | None = None
    machine_causes: tuple[str, ...] = ()
    left_out: Mapping[str, str] = field(default_factory=dict)
    cpus: float = 1.0
    others_cpus: float | None = None
    throttled_share: float | None = None
    fixed_work_us: float | None = None


@dataclass(frozen=True)
class Shortfall:
    """A plan does not bring what it promised.

    Attributes:
        step_ms: the time of a step today.
        plan_ms, bare_ms: the times of a step then.
        causes: why, a clause each; none if that is not known.
    """

    step_ms: float
    plan_ms: float
    bare_ms: float
    causes: tuple[str, ...]

    def __str__(self) -> str:
        why = "; ".join(self.causes) or (
            "no cause is visible; 'flatout verify --speed' measures both sides again"
        )
        return (
            "the plan does not bring today what it promised: "
            f"{_milliseconds(self.step_ms)} a step, {_milliseconds(self.plan_ms)} when it was "
            f"measured ({_milliseconds(self.bare_ms)} bare): {why}"
        )


def judged(stretches: Sequence[Stretch]) -> Sequence[Stretch] | None:
    """Return the stretches that are to be judged; ``None`` if there are too few."""
    recent = stretches[-JUDGED_STRETCHES:]
    if len(recent) < LEAST_STRETCHES or sum(one.steps for one in recent) < LEAST_STEPS:
        return None
    return recent


def find_shortfall(promise: Promise, today: Today) -> Shortfall | None:
    """Return how a plan falls short of its promise, ``None`` if it does not, or if that cannot be
    told."""
    recent = judged(today.stretches)
    larger = _compare_inputs(promise.inputs, today.inputs)
    if recent is None or larger is None:
        return None
    step_ms = low_quantile([one.step_ms for one in recent])
    factor = step_ms / (promise.plan_ms * larger)
    if factor <= promise.least_factor:
        return None
    causes = _find_causes(promise, today, factor)
    if not causes and not _is_clear(promise, today, factor):
        return None
    return Shortfall(step_ms, promise.plan_ms, promise.bare_ms, tuple(causes))


def find_machine_causes(plan: Plan, fingerprint: Mapping[str, Fact]) -> tuple[str, ...]:
    """Return what of the machine has changed so that steps may be slower, a clause each.

    Args:
        plan: the plan.
        fingerprint: the fingerprint of this machine.
    """
    then, here = plan.machine, fingerprint
    causes = []
    if "cpu" in then and here.get("cpu", then["cpu"]) != then["cpu"]:
        causes.append(
            f"it was measured on another machine (cpu was {then['cpu']}, is {here['cpu']})"
        )
    cores, cores_here = then.get("cores"), here.get("cores")
    if isinstance(cores, (int, float)) and isinstance(cores_here, (int, float)):
        causes += [f"usable cores were {cores:g}, are {cores_here:g}"] * (cores_here < cores)
    return tuple(causes)


def _find_causes(promise: Promise, today: Today, factor: float) -> list[str]:
    """Return the causes that were observed, a clause each.

    Args:
        promise, today: see ``find_shortfall``.
        factor: how many times longer than promised a step is.
    """
    causes = [
        f"{name}={promise.settings[name]} is not in effect ({why})"
        for name, why in today.left_out.items()
        if name in promise.settings
    ]
    if _have_other_sizes(promise.inputs, today.inputs):
        assert promise.inputs is not None
        assert today.inputs is not None
        causes.append(f"inputs were {', '.join(promise.inputs)}, are {', '.join(today.inputs)}")
    causes += today.machine_causes
    if promise.torch is not None and today.torch not in (None, promise.torch):
        causes.append(f"torch was {promise.torch}, is {today.torch}")
    if promise.threads is not None and (today.threads or promise.threads) < promise.threads:
        causes.append(f"torch's threads were {promise.threads}, are {today.threads}")
    others = today.others_cpus
    if others is not None and others >= min(BUSY_CPUS, BUSY_SHARE * today.cpus):
        causes.append(
            f"the machine is busy: other programs use {others:.1f} of {today.cpus:.3g} CPUs "
            f"({others / today.cpus:.0%})"
        )
    throttled = today.throttled_share
    if throttled is not None and throttled >= THROTTLED_SHARE:
        causes.append(f"a CPU quota stops threads of the job for {throttled:.0%} of the time")
    slower = _slower_machine(promise, today)
    if slower is not None and slower >= SLOWER_WORK:
        rest = "" if factor / slower <= promise.least_factor else ", which does not explain all"
        causes.append(
            f"the machine itself is slower: a fixed piece of work takes {slower:.2g} times as long "
            f"as then{rest}"
        )
    return causes


def _is_clear(promise: Promise, today: Today, factor: float) -> bool:
    """Return whether steps are so slow, and slow from the start, that it is worth saying although
    no cause was observed."""
    is_from_start = len(today.stretches) <= JUDGED_STRETCHES
    varies = any("*" in word for word in (*(promise.inputs or ()), *(today.inputs or ())))
    if not is_from_start or varies:
        return False
    first = low_quantile([one.step_ms for one in today.stretches[:LEAST_STRETCHES]])
    if first <= promise.bare_ms:
        return False
    is_known = _slower_machine(promise, today) is not None
    is_slower_than_bare = factor * promise.plan_ms > promise.bare_ms * promise.spread
    return is_slower_than_bare and factor >= (UNEXPLAINED if is_known else DRIFT)


def _slower_machine(promise: Promise, today: Today) -> float | None:
    """Return how many times as long the fixed piece of work takes; ``None``: not measured."""
    if promise.fixed_work_us is None or today.fixed_work_us is None:
        return None
    return today.fixed_work_us / promise.fixed_work_us


def _have_other_sizes(proven: Sequence[str] | None, seen: Sequence[str] | None) -> bool:
    return proven is not None and seen is not None and not signature.matches(proven, seen)


def _compare_inputs(proven: Sequence[str] | None, seen: Sequence[str] | None) -> float | None:
    """Return how many times more work a step may have than in the proof, at least 1, by the sizes
    of its inputs. The result is ``None`` if that is not known: sizes vary that did not, or more
    than sizes differs.

    The first size counts once (the batch), any other twice (attention is quadratic in its length).
    Smaller inputs count as equal ones: a small step need not be shorter.
    """
    if proven is None or seen is None:
        return 1.0
    if signature.merge(proven, seen) is None:
        return None
    most = 1.0
    for old, new in zip(proven, seen, strict=True):
        factor = 1.0
        for place, (size, other) in enumerate(
            zip(signature.sizes(old), signature.sizes(new), strict=True)
        ):
            if size is not None and other is None:
                return None
            if size and other:
                factor *= (other / size) ** (1 if place == 0 else 2)
        most = max(most, factor)
    return most


def _milliseconds(ms: float) -> str:
    return f"{ms:.3g} ms" if ms < 1e3 else f"{ms / 1e3:.3g} s"
