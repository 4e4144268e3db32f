"""Keeps what a tune was asked for, which settings it has tried, and what came of each.

The ledger is the one object that all stages of a tune share and write to. It shows the
outcome so far (``refresh``) when a setting or an activity changes.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from flatout.doctor.findings import Finding
from flatout.knob import Exactness
from flatout.plan import Evidence
from flatout.plan.program import Program
from flatout.tune import memory
from flatout.tune.budget import OVERDRAFT
from flatout.tune.candidates import Candidate
from flatout.tune.document import Stage, State
from flatout.tune.pairs import Pace, Pairs
from flatout.tune.progress import Activity
from flatout.tune.proof import Verdict
from flatout.wire import signature
from flatout.wire.header import Header
from flatout.wire.ratios import Ratio


@dataclass(frozen=True)
class Options:
    """The options of a tune that the user gave.

    Attributes:
        budget_seconds: the time that the tune may take; ``None`` if ``budget.choose_budget_s``
            chooses it.
        steps: the number of steps that the proof covers; ``None`` if ``budget.size_proof`` chooses
            it.
        seed: the seed of the first pair of runs; each later pair has the next seed.
        isolate: whether every trial runs in a copy-on-write view of the file system.
        knobs: the names of the knobs to try; ``None`` for all.
        exactness: the exactness classes of the settings that may be tried; ``None`` for all.
        memory: the peak memory that is allowed, as a multiple of the bare program's.
    """

    budget_seconds: float | None = None
    steps: int | None = None
    seed: int = 0
    isolate: bool = True
    knobs: Collection[str] | None = None
    exactness: Collection[Exactness] | None = None
    memory: float = memory.ALLOWED


@dataclass
class LedgerEntry:
    """A setting, and its result so far.

    See ``document.TriedSettings`` for the attributes.
    """

    settings: Mapping[str, str]
    stage: Stage = "inside one process"
    ratio: Ratio | None = None
    state: State = "not tried"
    why: str = ""
    bound: float | None = None
    predicted: Ratio | None = None


@dataclass
class Outcome:
    """What a tune has found: so far while it runs, and everything when it has ended.

    Attributes:
        settings: the settings of the plan; empty if nothing helps.
        why: the reason why this plan was chosen, or why there is none, in one sentence.
        evidence: the evidence for the plan; ``None`` if there is no plan.
        entries: the settings that were tried or are to be tried, in the order in which they were
            found.
        gain_on_top: for each knob and setting, how many times faster the setting made the stack
            (the settings that are applied together), see ``find_gain_on_top``.
        refused: the wanted knobs that have no candidates, each with the reason.
        findings: the findings about what limits the bare program.
        pairs: the pairs behind the plan; ``None`` if there is no plan.
        verdict: the verdict of the last proof.
        pace: the times from which the duration of a run of the bare program is estimated.
        startup_s: the time of the bare program from the import of torch to the first step.
        phases_ms: the time of each phase of a step of the bare program; ``None`` if it was not
            measured.
        header: the header of the first run's record: interpreter, torch and so on.
        inputs: the dtype and shape of each input tensor of the first outermost module call, with
            ``*`` for sizes that differ between runs (``wire.signature``); ``None`` if the runs
            differ in more than sizes.
        program: the program as it was at its first run: its files, and the environment variables
            that they name. ``None`` if the program has not run.
        modules: the files that the runs have imported.
        job_steps: the number of steps of the whole job; ``None`` if it is not known.
        unlike_s: the time of the job in steps unlike those that are compared, in seconds.
        interrupted: whether the user has ended the tune.
        seconds: the time that the tune took.
        activity: what the tune does now; ``None`` before its first activity.
    """

    settings: dict[str, str] = field(default_factory=dict)
    why: str = ""
    evidence: Evidence | None = None
    entries: list[LedgerEntry] = field(default_factory=list)
    gain_on_top: dict[tuple[str, str], Ratio] = field(default_factory=dict)
    refused: dict[str, str] = field(default_factory=dict)
    findings: list[Finding] = field(default_factory=list)
    pairs: Pairs | None = None
    verdict: Verdict | None = None
    pace: Pace | None = None
    startup_s: float | None = None
    phases_ms: Mapping[str, float | None] = field(default_factory=dict)
    header: Header = field(default_factory=Header)
    inputs: tuple[str, ...] | None = None
    program: Program | None = None
    modules: frozenset[str] = frozenset()
    job_steps: int | None = None
    unlike_s: float = 0.0
    interrupted: bool = False
    seconds: float = 0.0
    activity: Activity | None = None

    def find_ratio_in_process(self, knob: str, setting: str) -> Ratio | None:
        """Return a setting's ratio inside one process, see ``document.KnobResult.in_process``.

        The result is ``None`` if it was not measured.
        """
        return self._find_ratio(knob, setting, "inside one process")

    def find_prediction(self, knob: str, setting: str) -> Ratio | None:
        """Return the gain that replayed calls predict for a setting; ``None`` if there is no
        prediction."""
        found = (entry for entry in self.entries if entry.settings == {knob: setting})
        return next((entry.predicted for entry in found), None)

    def find_gain_on_top(self, knob: str, setting: str) -> Ratio | None:
        """Return how many times faster a setting made the stack.

        The gain is the step time without the knob divided by the step time with this setting. The
        stack is the settings that were applied together when the gain was measured. The result is
        ``None`` if it was not measured.
        """
        on_top = self.gain_on_top.get((knob, setting))
        return on_top or self._find_ratio(knob, setting, "fresh processes")

    def _find_ratio(self, knob: str, setting: str, stage: Stage) -> Ratio | None:
        for entry in self.entries:
            if entry.settings == {knob: setting} and entry.stage == stage:
                return entry.ratio
        return None


class Ledger:
    """The record of one tune while it runs.

    Args:
        budget_s: the time that the tune may take, in seconds.
        read_spent_s: returns the time that the tune has taken so far, in seconds, for the display.
        print_line: prints a line of progress.
        refresh: shows the outcome so far and the seconds left in the current activity.
        read_counted_s: returns the time that the tune had taken when the last trial ended, in
            seconds, for decisions; by default ``read_spent_s``.

    Attributes:
        outcome: the outcome so far.
        print_line, budget_s: see above.
    """

    def __init__(
        self,
        budget_s: float,
        read_spent_s: Callable[[], float],
        print_line: Callable[[str], None],
        refresh: Callable[[Outcome, float], None],
        read_counted_s: Callable[[], float] | None = None,
    ) -> None:
        self.outcome = Outcome()
        self.print_line = print_line
        self.budget_s = budget_s
        self._read_spent_s = read_spent_s
        self._read_counted_s = read_counted_s or read_spent_s
        self._refresh = refresh

    @property
    def left_s(self) -> float:
        """The time of the budget that is left, in seconds; negative if more has been spent."""
        return self.budget_s - self._read_counted_s()

    def has_time_for(self, needed_s: float) -> bool:
        """Return whether something that takes ``needed_s`` seconds ends within the budget, or soon
        after it (``budget.OVERDRAFT``)."""
        return self._read_counted_s() + needed_s <= OVERDRAFT * self.budget_s

    def find(self, settings: Mapping[str, str]) -> LedgerEntry:
        """Find the entry of some settings. Only the methods of this class may change the entry.

        Raises:
            KeyError: these settings were never entered.
        """
        for entry in self.outcome.entries:
            if entry.settings == settings:
                return entry
        raise KeyError(dict(settings))

    def has_no_gain(self, settings: Mapping[str, str]) -> bool:
        """Return whether these settings were tried, and gained nothing."""
        return any(
            entry.settings == settings and entry.state == "no gain"
            for entry in self.outcome.entries
        )

    def is_settled(self, settings: Mapping[str, str]) -> bool:
        """Return whether these settings have a ratio, or a reason why they have none."""
        entry = self.find(settings)
        return entry.ratio is not None or (entry.state != "running" and bool(entry.why))

    def enter(self, candidates: Iterable[Candidate]) -> None:
        """Add an entry for each candidate."""
        self.outcome.entries += [
            LedgerEntry(one.settings, bound=one.bound, predicted=one.predicted)
            for one in candidates
        ]
        self.notify()

    def start(self, candidates: Iterable[Candidate], stage: Stage) -> None:
        """Mark candidates as being tried."""
        for candidate in candidates:
            entry = self.find(candidate.settings)
            entry.stage, entry.state = stage, "running"
        self.notify()

    def note_ratio(self, candidate: Candidate, ratio: Ratio | None, why: str = "") -> None:
        """Enter a candidate's measured ratio with a remark. The candidate is judged later."""
        entry = self.find(candidate.settings)
        entry.ratio, entry.why = ratio, why

    def accept(self, settings: Mapping[str, str], why: str = "") -> None:
        """Mark settings as faster. If ``why`` is empty, the earlier reason is kept."""
        entry = self.find(settings)
        entry.state, entry.why = "won", why or entry.why
        self.notify()

    def reject(self, settings: Mapping[str, str], why: str = "") -> None:
        """Mark settings as having no gain. ``why`` is empty if the ratio itself is the reason."""
        entry = self.find(settings)
        entry.state, entry.why = "no gain", why
        self.notify()

    def reject_without_effect(self, settings: Mapping[str, str], why: str) -> None:
        """Reject settings that did nothing. A ratio that was measured for them is only noise."""
        self.print_line(f"{format_settings(settings)} has no effect: {why}")
        self.reject(settings, f"it has no effect: {why}")

    def fail(self, settings: Mapping[str, str], why: str) -> None:
        """Mark settings as unusable, because they fail or the program fails under them."""
        entry = self.find(settings)
        entry.state, entry.why = "failed", why
        self.print_line(f"{format_settings(settings)} is dropped: {why}")
        self.notify()

    def skip(self, settings: Mapping[str, str], stage: Stage, why: str) -> None:
        """Mark settings as not tried in a stage, or as not judged although they were compared."""
        entry = self.find(settings)
        what = "judged" if entry.state == "running" else "tried"
        entry.stage, entry.state, entry.why = stage, "not tried", why
        self.print_line(f"{format_settings(settings)} is not {what}: {why}")
        self.notify()

    def leave_out(self, settings: Mapping[str, str], why: str) -> None:
        """Mark settings as left out of the plan although they may be faster.

        The settings need not have an entry. A setting that made a proof fail is replaced by a
        gentler one, and the gentler one may never have been a candidate.
        """
        self.print_line(f"{format_settings(settings)} is left out: {why}")
        for entry in self.outcome.entries:
            if entry.settings == settings:
                entry.state, entry.why = "left out", why
        self.notify()

    def note_on_top(self, knob: str, setting: str, ratio: Ratio) -> None:
        """Enter how many times faster a setting makes the stack; see ``Outcome.gain_on_top``."""
        self.outcome.gain_on_top[knob, setting] = ratio
        self.print_line(f"{knob} on top of the others: {ratio} inside one process")

    def note_runs(self, pairs: Pairs) -> None:
        """Enter the inputs and the imported files of runs.

        The plan names the inputs that all runs have in common, and the files that any of the runs
        has imported.
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
        may_exceed_pairs: bool = False,
    ) -> None:
        """Begin an activity; see ``Activity``.

        Args:
            what: the activity in words.
            pair: the number of the pair of runs that is being made; ``None`` if the activity makes
                no pairs.
            pairs: the number of pairs that the activity will make; ``None`` if it is not known.
            lasts_s: the time that the activity should take, in seconds; ``None`` for the rest of
                the budget.
            may_exceed_pairs: whether more than ``pairs`` pairs are made if the results are not
                clear after these.
        """
        ends_s = self.budget_s if lasts_s is None else self._read_spent_s() + lasts_s
        self.outcome.activity = Activity(what, pair, pairs, ends_s, may_exceed_pairs)
        self.notify()

    def follow_pairs(
        self,
        what: str,
        expected: int,
        pair_s: float,
        is_enough: Callable[[Pairs], bool],
        may_exceed: bool,
    ) -> Callable[[Pairs], bool]:
        """Return a function that does the same as ``is_enough``, and also updates the activity
        before each pair.

        Args:
            what: the activity in words.
            expected: the number of pairs that the activity should make.
            pair_s: the time of one pair, in seconds.
            is_enough: tells before each pair whether the finished pairs are enough.
            may_exceed: whether more than ``expected`` pairs are made if the results are not clear
                after these.
        """

        def is_over(finished_pairs: Pairs) -> bool:
            if is_enough(finished_pairs):
                return True
            number = finished_pairs.count + 1
            if number <= expected:
                left_s = (expected - number + 1) * pair_s
                self.begin(what, number, expected, left_s, may_exceed)
            else:
                self.begin(what, number)
            return False

        return is_over

    def notify(self) -> None:
        """Show the outcome so far."""
        activity = self.outcome.activity
        ends_s = self.budget_s if activity is None else activity.ends_s
        self._refresh(self.outcome, max(ends_s - self._read_spent_s(), 0.0))


def format_settings(settings: Mapping[str, str]) -> str:
    """Return settings as they are written on the command line, separated by commas."""
    return ", ".join(f"{name}={setting}" for name, setting in settings.items())


def _merge_inputs(one: Sequence[str] | None, other: Sequence[str] | None) -> tuple[str, ...] | None:
    return None if one is None or other is None else signature.merge(tuple(one), tuple(other))
