"""From a working program to a proven plan, or to the sentence that says why there is none.

1. One bare run shows how many steps there are, how long they take, what takes the time, and
   whether the program trains at all (``bare.py``).
2. The candidates are the settings that fit this profile and have something to gain
   (``candidates.py``).
3. Hot candidates can be applied and undone between two steps. They are compared inside one process,
   and the winners become a stack: settings that are applied together (``screen.py``).
4. Cold candidates need a fresh process. Each is tried on top of the stack (``cold.py``).
5. The plan is put to the proof: bare and plan run in pairs of fresh processes, one pair for each
   seed. The pairs give the claimed ratio, and the losses for the proof (``prover.py``).
6. If the proof fails, its culprit is found and replaced by a gentler setting or dropped, and step 5
   is repeated.

What is tried is entered in the ledger (``ledger.py``). Everything that is decided depends on the
trials' results and on the time they took, and both are in the journal, so a tune that was killed
can resume (``journal.py``).
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence

from flatout import knobs
from flatout.machine import Ceilings
from flatout.tune import bare, candidates, evidence, figures, search, statistics
from flatout.tune.bare import BareRun
from flatout.tune.candidates import Survey
from flatout.tune.cold import ColdTrials
from flatout.tune.journal import Journal
from flatout.tune.ledger import Ledger, Options, Outcome, format_settings
from flatout.tune.pairs import Pairs
from flatout.tune.prover import ProofAttempt, Prover
from flatout.tune.screen import Screening
from flatout.tune.trial import Trials

MAXIMUM_PROOFS = 4
"""Most plans that are put to the proof one after the other, each gentler than the one before."""


class Tuner:
    """One tune of one job.

    Args:
        command: command line of the user's program.
        options: what the user asks for.
        journal: journal of this tune.
        say: is called with each line of progress.
        show: is called with the outcome so far and the seconds left in its phase, whenever the
            phase or what is known of a candidate has changed, and twice a second while a trial
            runs.
        measure_ceilings: given the path of the Python interpreter, returns the machine's peak
            rates; ``None``: they are not known.
    """

    def __init__(
        self,
        command: Sequence[str],
        options: Options,
        journal: Journal,
        say: Callable[[str], None],
        show: Callable[[Outcome, float], None],
        measure_ceilings: Callable[[str], Ceilings | None],
    ) -> None:
        self._command = command
        self._options = options
        self._journal = journal
        self._ledger = Ledger(options.budget_seconds, lambda: journal.spent_s, say, show)
        self._trials = Trials(command, journal, options.isolate, tick=self._ledger.tell)
        self._measure_ceilings = measure_ceilings

    def run(self) -> Outcome:
        """Tune; after an interruption, the outcome is what was proven until then.

        Raises:
            UserError: the program fails, never trains, or takes too few steps.
        """
        outcome = self._ledger.outcome
        try:
            self._tune()
        except KeyboardInterrupt:
            outcome.interrupted = True
        if outcome.interrupted and outcome.evidence is None:
            outcome.why = "it was interrupted before a plan was proven"
        outcome.seconds = self._journal.spent_s
        return outcome

    def verify(self, settings: Mapping[str, str], count: int) -> Outcome:
        """Put a plan to the proof; the outcome has evidence if it passes, however fast it is.

        Args:
            settings: settings of the plan.
            count: number of pairs, each with a seed of its own.

        Raises:
            UserError: the program fails, never trains, or takes too few steps.
        """
        outcome = self._ledger.outcome
        try:
            first = self._run_bare()
            prover = Prover(self._trials, self._ledger, first, self._options)
            attempt = prover.prove(settings, count)
            outcome.interrupted = attempt.pairs.interrupted
            outcome.verdict = attempt.verdict
            for name, why in attempt.pairs.without_effect().items():
                self._ledger.say(f"{name}={settings[name]} has no effect: {why}")
            if attempt.refusal is None:
                self._accept(settings, attempt)
            else:
                outcome.why = f"{format_settings(settings)} is not proven: {attempt.refusal}"
        except KeyboardInterrupt:
            outcome.interrupted = True
            outcome.why = "it was interrupted before there was a proof"
        outcome.seconds = self._journal.spent_s
        return outcome

    def _tune(self) -> None:
        """Go through the stages, and fill in the outcome.

        Raises:
            KeyboardInterrupt: the user ends the tune.
            UserError: see ``run``.
        """
        first = self._run_bare()
        survey = self._survey(first)
        shared = (self._trials, self._ledger, first, self._options)
        screening, cold_trials, prover = Screening(*shared), ColdTrials(*shared), Prover(*shared)
        stack = screening.find_stack([one for one in survey.candidates if one.is_hot])
        cold = [one for one in survey.candidates if not one.is_hot]
        settings = cold_trials.extend(stack, cold)
        if not settings:
            self._ledger.outcome.why = "no setting is faster than the bare program, beyond noise"
            return
        for number in range(MAXIMUM_PROOFS):
            attempt = self._prove(prover, settings)
            if attempt.refusal is None:
                self._decide(settings, attempt)
                return
            if attempt.pairs.interrupted or number == MAXIMUM_PROOFS - 1:
                return
            gentler = self._replace_culprits(
                settings, prover.find_culprits(settings, attempt), attempt.refusal, survey
            )
            if _hid_gains(settings.keys() - gentler.keys()):
                useless = [one for one in cold if self._ledger.has_no_gain(one.settings)]
                gentler = cold_trials.extend(gentler, useless, again=True)
            settings = gentler
            if not settings:
                return

    def _run_bare(self) -> BareRun:
        """Run the bare program, and fill in what that shows.

        Raises:
            JournalError: the program has changed since this tune began.
            UserError: see ``run``.
        """
        self._ledger.begin("running the bare program")
        first = bare.run(self._command, self._options, self._trials, self._ledger.say)
        self._journal.hold(first.program)
        outcome = self._ledger.outcome
        outcome.header, outcome.inputs = first.process.header, first.process.inputs
        outcome.program, outcome.modules = first.program, first.modules
        outcome.pace, outcome.phases_ms = first.pace, first.phases_ms
        outcome.job_steps = first.job_steps
        return first

    def _survey(self, first: BareRun) -> Survey:
        """Find the candidates, and enter them in the ledger."""
        found = candidates.survey(
            first.process,
            self._measure_ceilings(first.process.header.executable),
            self._options.knobs,
            self._options.exactness,
        )
        outcome = self._ledger.outcome
        outcome.findings, outcome.refused = found.findings, found.refused
        for name, why in found.refused.items():
            self._ledger.say(f"{name} is not tried: {why}")
        self._ledger.enter(found.candidates)
        return found

    def _prove(self, prover: Prover, settings: Mapping[str, str]) -> ProofAttempt:
        """Put settings to the proof; if they are refused, say why."""
        outcome = self._ledger.outcome
        outcome.verdict = None
        attempt = prover.prove(settings)
        outcome.verdict, outcome.interrupted = attempt.verdict, attempt.pairs.interrupted
        if attempt.refusal is not None:
            self._ledger.say(f"{format_settings(settings)}: {attempt.refusal}")
            outcome.why = f"{format_settings(settings)} is not proven: {attempt.refusal}"
        return attempt

    def _replace_culprits(
        self, settings: Mapping[str, str], culprits: Mapping[str, str], why: str, survey: Survey
    ) -> dict[str, str]:
        """Replace each culprit by a gentler setting of its knob, or drop it.

        Args:
            settings: settings that were not proven.
            culprits: those among them that made the proof fail.
            why: the reason, one clause.
            survey: tells which settings make sense for this program.
        """
        left = dict(settings)
        for name, setting in culprits.items():
            self._ledger.leave_out({name: setting}, why)
            gentler = search.find_gentler(name, setting, survey.offered.get(name))
            if gentler is None or self._ledger.has_no_gain({name: gentler}):
                del left[name]
            else:
                left[name] = gentler
                self._ledger.say(f"{name}={gentler} takes its place")
        return left

    def _decide(self, proven: Mapping[str, str], attempt: ProofAttempt) -> None:
        """Decide whether a proven plan is written: only if it saves time; else say why not."""
        settings, outcome = dict(proven), self._ledger.outcome
        for name, why in attempt.pairs.without_effect().items():
            self._ledger.leave_out({name: settings.pop(name)}, f"it has no effect: {why}")
        if not settings:
            outcome.why = f"{format_settings(proven)} has no effect on this program"
            return
        no_gain = _explain_no_gain(attempt.pairs, outcome.job_steps)
        if no_gain is None:
            self._accept(settings, attempt)
        else:
            outcome.why = f"{format_settings(settings)} gives {no_gain}"

    def _accept(self, settings: Mapping[str, str], attempt: ProofAttempt) -> None:
        """Fill in a plan that is proven, with its evidence."""
        outcome, verdict = self._ledger.outcome, attempt.verdict
        assert verdict is not None  # there is no proof without one
        outcome.settings = dict(settings)
        outcome.pairs = attempt.pairs
        outcome.why = f"{format_settings(settings)} gives {attempt.pairs.ratio}, and {verdict.why}"
        ratio_alone = {name: outcome.find_ratio_alone(name) for name in settings}
        outcome.evidence = evidence.make_evidence(settings, attempt.pairs, verdict, ratio_alone)


def _hid_gains(dropped: Collection[str]) -> bool:
    return any(knobs.get(name).hides_gains for name in dropped)


def _explain_no_gain(made: Pairs, job_steps: int | None) -> str | None:
    """Why the plan of these pairs saves no time, one clause that begins with its ratio; ``None``:
    it saves time.

    Args:
        made: pairs of the bare program and the plan.
        job_steps: length of the job in steps, ``None``: not known.
    """
    if not statistics.is_gain(made.ratio):
        return f"{made.ratio} in fresh processes: {figures.faster_or_slower(made.ratio)}"
    if made.whole_ratio <= 1:
        return (
            f"{made.ratio} in a usual step, but {made.whole_ratio:.2f}x once every step is counted"
        )
    bare_cost, plan_cost = made.costs
    if job_steps is not None and plan_cost.job_s(job_steps) >= bare_cost.job_s(job_steps):
        return (
            f"{made.ratio} a step, but the whole job has only {job_steps}: "
            f"{plan_cost.job_s(job_steps):.1f} s against {bare_cost.job_s(job_steps):.1f} s"
        )
    return None
