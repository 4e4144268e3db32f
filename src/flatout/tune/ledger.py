"""What a tune was asked for, what it has tried, and what came of each setting.

The ledger is the one object that all stages of a tune share and write to. It tells whoever watches
the tune of every change.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from flatout.doctor.findings import Finding
from flatout.knob import Exactness
from flatout.plan import Evidence
from flatout.plan.program import Program
from flatout.tune import memory
from flatout.tune.candidates import Candidate
from flatout.tune.document import Stage, State
from flatout.tune.pairs import Pace, Pairs
from flatout.tune.progress import Phase
from flatout.tune.proof import Verdict
from flatout.wire import signature
from flatout.wire.header import Header
from flatout.wire.ratios import Ratio


@dataclass(frozen=True)
class Options:
    """What the user asks for.

    Attributes:
        budget_seconds: how long the tune may take, roughly.
        steps: steps that the proof covers; ``None``: as many as the budget allows, see
            ``bare.USUAL_STEPS``.
        seed: seed of the first pair of runs; each later pair has the next one.
        isolate: whether every trial runs in a copy-on-write view of the file system.
        knobs: names of the knobs to try; ``None``: all.
        exactness: classes of the settings that may be tried; ``None``: all.
        memory: peak memory that is allowed, as a multiple of the bare program's.
    """

    budget_seconds: float = 300.0
    steps: int | None = None
    seed: int = 0
    isolate: bool = True
    knobs: Collection[str] | None = None
    exactness: Collection[Exactness] | None = None
    memory: float = memory.ALLOWED


@dataclass
class LedgerArm:
    """An arm: settings that are tried as one, and what has become of them; see ``document.Arm``."""

    settings: Mapping[str, str]
    stage: Stage = "inside one process"
    ratio: Ratio | None = None
    state: State = "not tried"
    why: str = ""
    bound: float | None = None


@dataclass
class Outcome:
    """What a tune has found so far, and in the end.

    Attributes:
        settings: settings of the plan; empty when nothing helps.
        why: one sentence: why this plan, or why none.
        evidence: evidence for the plan, ``None`` when there is none.
        arms: what was tried or might have been, in the order in which it was found.
        gain_on_top: for each knob of a stack of settings, how many times faster the stack is with
            it than without it.
        refused: knobs that are no candidates, with the reason.
        findings: what limits the bare program.
        pairs: the pairs behind the plan, ``None`` when there is no plan.
        verdict: the verdict of the last proof.
        pace: pace of the bare program.
        phases_ms: the parts of a step of the bare program; ``None``: not measured.
        header: header of the first run's record: interpreter, torch and so on.
        inputs: what went into the first outermost module call of every run, see
            ``wire.signature``; ``None`` if all runs have nothing in common.
        program: files and variables of the program at its first run; ``None``: it has not run.
        modules: files that the runs have imported.
        job_steps: how many steps the whole job has, ``None``: not known.
        interrupted: whether the user has ended the tune.
        seconds: how long the tune took.
        phase: what is being done now; ``None``: nothing has begun.
    """

    settings: dict[str, str] = field(default_factory=dict)
    why: str = ""
    evidence: Evidence | None = None
    arms: list[LedgerArm] = field(default_factory=list)
    gain_on_top: dict[str, Ratio] = field(default_factory=dict)
    refused: dict[str, str] = field(default_factory=dict)
    findings: list[Finding] = field(default_factory=list)
    pairs: Pairs | None = None
    verdict: Verdict | None = None
    pace: Pace | None = None
    phases_ms: Mapping[str, float | None] = field(default_factory=dict)
    header: Header = field(default_factory=Header)
    inputs: tuple[str, ...] | None = None
    program: Program | None = None
    modules: frozenset[str] = frozenset()
    job_steps: int | None = None
    interrupted: bool = False
    seconds: float = 0.0
    phase: Phase | None = None

    def find_ratio_alone(self, knob: str) -> Ratio | None:
        """The ratio of a knob alone inside one process, ``None``: not measured."""
        return self._ratio(knob, "inside one process")

    def find_gain_on_top(self, knob: str) -> Ratio | None:
        """How many times faster the stack is with a knob than without, ``None``: not measured."""
        return self.gain_on_top.get(knob) or self._ratio(knob, "fresh processes")

    def _ratio(self, knob: str, stage: Stage) -> Ratio | None:
        for arm in self.arms:
            if set(arm.settings) == {knob} and arm.stage == stage and arm.ratio is not None:
                return arm.ratio
        return None


class Ledger:
    """The record of one tune while it goes on.

    Args:
        budget_s: how long the tune may take, in seconds.
        read_spent_s: returns how long it has taken so far, in seconds.
        say: is called with each line of progress.
        show: is called with the outcome so far and the seconds left in its phase, whenever the
            phase or an arm has changed.

    Attributes:
        outcome: what has been found so far.
        say: see above.
    """

    def __init__(
        self,
        budget_s: float,
        read_spent_s: Callable[[], float],
        say: Callable[[str], None],
        show: Callable[[Outcome, float], None],
    ) -> None:
        self.outcome = Outcome()
        self.say = say
        self._budget_s = budget_s
        self._read_spent_s = read_spent_s
        self._show = show

    @property
    def left_s(self) -> float:
        """Seconds of the budget that are left; negative when more has been spent."""
        return self._budget_s - self._read_spent_s()

    def find(self, settings: Mapping[str, str]) -> LedgerArm:
        """Find the arm of some settings; only the methods of this class change it.

        Raises:
            KeyError: these settings were never entered.
        """
        for arm in self.outcome.arms:
            if arm.settings == settings:
                return arm
        raise KeyError(dict(settings))

    def has_no_gain(self, settings: Mapping[str, str]) -> bool:
        """Whether these settings were tried, and gained nothing."""
        return any(arm.settings == settings and arm.state == "no gain" for arm in self.outcome.arms)

    def enter(self, candidates: Iterable[Candidate]) -> None:
        """Enter what may be tried."""
        self.outcome.arms += [
            LedgerArm(candidate.settings, bound=candidate.bound) for candidate in candidates
        ]
        self.tell()

    def start(self, candidates: Iterable[Candidate], stage: Stage) -> None:
        """Note that candidates are being tried."""
        for candidate in candidates:
            arm = self.find(candidate.settings)
            arm.stage, arm.state = stage, "running"
        self.tell()

    def note_ratio(self, candidate: Candidate, ratio: Ratio | None, why: str = "") -> None:
        """Note a candidate's measured ratio, and what is to be said of it; it is judged later."""
        arm = self.find(candidate.settings)
        arm.ratio, arm.why = ratio, why

    def accept(self, settings: Mapping[str, str], why: str = "") -> None:
        """Note that settings are faster; without a reason, what was said of them stays."""
        arm = self.find(settings)
        arm.state, arm.why = "won", why or arm.why
        self.tell()

    def reject(self, settings: Mapping[str, str], why: str = "") -> None:
        """Note that settings gain nothing, and the reason if it is another than the ratio."""
        arm = self.find(settings)
        arm.state, arm.why = "no gain", why
        self.tell()

    def reject_without_effect(self, settings: Mapping[str, str], why: str) -> None:
        """Reject settings that did nothing, whatever their ratio is: it is noise."""
        self.say(f"{format_settings(settings)} has no effect: {why}")
        self.reject(settings, f"it has no effect: {why}")

    def fail(self, settings: Mapping[str, str], why: str) -> None:
        """Note that settings cannot be used: they or the program fail."""
        arm = self.find(settings)
        arm.state, arm.why = "failed", why
        self.say(f"{format_settings(settings)} is dropped: {why}")
        self.tell()

    def skip(self, settings: Mapping[str, str], stage: Stage, why: str) -> None:
        """Note that settings are not tried, or not judged, and in which stage."""
        arm = self.find(settings)
        arm.stage, arm.state, arm.why = stage, "not tried", why
        self.say(f"{format_settings(settings)} is not tried: {why}")
        self.tell()

    def leave_out(self, settings: Mapping[str, str], why: str) -> None:
        """Note that settings do not become part of the plan although they may be faster.

        They need not have been entered: a gentler setting of a knob may not have been.
        """
        self.say(f"{format_settings(settings)} is left out: {why}")
        for arm in self.outcome.arms:
            if arm.settings == settings:
                arm.state, arm.why = "left out", why
        self.tell()

    def note_on_top(self, knob: str, ratio: Ratio) -> None:
        """Note how many times faster the stack is with a knob than without it."""
        self.outcome.gain_on_top[knob] = ratio
        self.say(f"{knob} on top of the others: {ratio} inside one process")

    def note_runs(self, pairs: Pairs) -> None:
        """Note what runs were given and have imported.

        The plan names the inputs that all runs have in common, and the files that any has imported.
        """
        outcome = self.outcome
        for done in (*pairs.baseline_runs, *pairs.variant_runs):
            outcome.inputs = _merge_inputs(outcome.inputs, done.process.inputs)
            outcome.modules |= done.modules

    def begin(
        self,
        what: str,
        pair: int | None = None,
        pairs: int | None = None,
        lasts_s: float | None = None,
    ) -> None:
        """Note that a phase begins; see ``Phase``.

        Args:
            what: what is being done.
            pair: which pair of runs is being made; ``None``: it makes no pairs.
            pairs: how many pairs it will make; ``None``: not known.
            lasts_s: how long it should take; ``None``: it may take the rest of the budget.
        """
        ends_s = self._budget_s if lasts_s is None else self._read_spent_s() + lasts_s
        self.outcome.phase = Phase(what, pair, pairs, ends_s)
        self.tell()

    def follow_pairs(
        self, what: str, expected: int, pair_s: float, is_enough: Callable[[Pairs], bool]
    ) -> Callable[[Pairs], bool]:
        """Wrap ``is_enough``: it also updates the shown phase before each pair.

        Args:
            what: what the pairs are for.
            expected: how many it should take, as far as that is known before.
            pair_s: how long one of them takes, in seconds.
            is_enough: is asked before each pair.
        """

        def is_over(made: Pairs) -> bool:
            if is_enough(made):
                return True
            left = expected - made.count
            if left > 0:
                self.begin(what, made.count + 1, expected, left * pair_s)
            else:
                self.begin(what, made.count + 1)
            return False

        return is_over

    def tell(self) -> None:
        """Show what has been found so far."""
        phase = self.outcome.phase
        ends_s = self._budget_s if phase is None else phase.ends_s
        self._show(self.outcome, max(ends_s - self._read_spent_s(), 0.0))


def format_settings(settings: Mapping[str, str]) -> str:
    """Settings as they are written on the command line, separated by commas."""
    return ", ".join(f"{name}={setting}" for name, setting in settings.items())


def _merge_inputs(one: Sequence[str] | None, other: Sequence[str] | None) -> tuple[str, ...] | None:
    return None if one is None or other is None else signature.merge(tuple(one), tuple(other))
