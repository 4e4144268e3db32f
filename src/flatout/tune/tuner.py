"""Makes a proven plan for a working program, or finds the reason why there is none.

*Bare* is the program without any setting. Each *trial* runs the program once, for some steps, with
flatout's code inside its process: the *agent*, which applies settings and records steps. The
``loop_steps`` of a recorded process are the steps of its training loop, or of its inference loop if
it does not train.

1. One bare run shows how many steps there are, how long they take, what takes the time, and
   whether the program trains at all (``bare.py``).
2. The candidates are the settings that fit this profile and have something to gain
   (``candidates.py``).
3. Hot candidates can be applied and undone between two steps. They are compared inside one process,
   and the winners become a stack: settings that are applied together (``screen.py``).
4. Cold candidates need a fresh process, or many steps before they are fast. Each is tried on top of
   the stack (``cold.py``).
5. The stack is now the plan, and is put to the proof: bare and plan run in pairs of fresh
   processes, one pair for each seed. The pairs give the claimed speedup, and the losses for the
   proof (``prover.py``).
6. If the proof fails, the setting that makes it fail is found. It is replaced by a gentler setting
   of the same knob, or dropped. Step 5 is then repeated.

The ledger holds the settings that were tried and what came of them (``ledger.py``). The journal
keeps the results of the trials and the time that they took, so that a tune that was killed can be
resumed (``journal.py``).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping, Sequence

from flatout import knobs
from flatout.doctor.case import Case
from flatout.machine import Ceilings
from flatout.tune import (
    bare,
    candidates,
    evidence,
    formatting,
    gradient_runs,
    pairs,
    predicted,
    prediction,
    quiet,
    search,
    statistics,
)
from flatout.tune.bare import BareRun
from flatout.tune.budget import OVERDRAFT, UNKNOWN_BUDGET_S, extend_budget_s, fit_steps
from flatout.tune.candidates import Survey
from flatout.tune.cold import ColdTrials
from flatout.tune.journal import Journal
from flatout.tune.ledger import Ledger, Options, Outcome, format_settings
from flatout.tune.neighbours import Neighbours
from flatout.tune.pairs import Pairs
from flatout.tune.prover import ProofAttempt, Prover, estimate_least_s
from flatout.tune.trial import Trials
from flatout.wire.disturbance import is_little

MAXIMUM_PROOFS = 4
"""Maximum number of plans that are put to the proof. After a failed proof, the next plan lacks the
settings that made the proof fail (the culprits), or has gentler settings in their place."""


class Tuner:
    """One tune of one job.

    Args:
        command: the command line of the job. The job is the user's program, run to its own end;
            most trials stop the program earlier.
        options: the options that the user gave.
        journal: journal of this tune.
        print_line: prints a line of progress.
        refresh: shows the outcome so far and the seconds left in the current activity. It is called
            when the state of a setting or the activity changes, and twice a second while a trial
            runs.
        measure_ceilings: returns the machine's peak rates, given the path of the program's Python
            interpreter; ``None`` if the rates are not known.
        warn: prints a line that the user should see at once. ``None``: ``print_line`` prints it.
    """

    def __init__(
        self,
        command: Sequence[str],
        options: Options,
        journal: Journal,
        print_line: Callable[[str], None],
        refresh: Callable[[Outcome, float], None],
        measure_ceilings: Callable[[str], Ceilings | None],
        warn: Callable[[str], None] | None = None,
    ) -> None:
        self._command = command
        self._options = options
        self._journal = journal
        self._ledger = Ledger(
            options.budget_seconds or UNKNOWN_BUDGET_S,
            lambda: journal.spent_s,
            print_line,
            refresh,
            lambda: journal.counted_s,
        )
        self._neighbours = Neighbours(
            options.budget_seconds or UNKNOWN_BUDGET_S, warn or print_line
        )
        self._trials = Trials(
            command,
            journal,
            options.isolate,
            tick=self._ledger.notify,
            neighbours=self._neighbours,
        )
        self._measure_ceilings = measure_ceilings

    def run(self) -> Outcome:
        """Tune the job.

        Returns the outcome; after an interruption, the outcome so far.

        Raises:
            UserError: the program fails, never calls a model, or makes too few steps.
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
        """Put a plan to the proof.

        Args:
            settings: the settings of the plan.
            count: the number of pairs, each with a seed of its own.

        Returns the outcome. It has evidence if the plan passes the proof, even if the plan is not
        faster.

        Raises:
            UserError: the program fails, never calls a model, or makes too few steps.
        """
        outcome = self._ledger.outcome
        try:
            first = self._run_bare()
            self._ledger.budget_s += 3 * count * first.pace.pair_s(first.proof.steps)
            prover = Prover(self._trials, self._ledger, first, self._options)
            attempt = prover.prove(settings, count)
            outcome.interrupted = attempt.pairs.interrupted
            outcome.verdict = attempt.verdict
            for name, why in attempt.pairs.without_effect().items():
                self._ledger.print_line(f"{name}={settings[name]} has no effect: {why}")
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
        """Run the stages in order, and fill in the outcome.

        Raises:
            KeyboardInterrupt: the user ends the tune.
            UserError: see ``run``.
        """
        first = self._run_bare()
        survey = self._survey(first)
        shared = (self._trials, self._ledger, first, self._options)
        kind = predicted.choose_screening(first.pace.step_s, survey.candidates)
        screening, cold_trials, prover = kind(*shared), ColdTrials(*shared), Prover(*shared)
        stack = screening.find_stack([one for one in survey.candidates if one.is_hot])
        cold = [one for one in survey.candidates if not one.is_hot]
        cold = [*screening.not_compared, *cold]
        settings = cold_trials.extend(stack, cold)
        if not settings:
            self._ledger.outcome.why = self._explain_nothing_faster()
            return
        for number in range(MAXIMUM_PROOFS):
            if not self._has_time_to_prove(settings, first):
                return
            attempt = self._prove(prover, settings)
            if attempt.refusal is None:
                self._decide(settings, attempt)
                return
            if attempt.pairs.interrupted or number == MAXIMUM_PROOFS - 1:
                return
            culprits = prover.find_culprits(settings, attempt)
            why = attempt.refusal
            if attempt.is_undecided:
                why = self._note_undecided(attempt)
            gentler = self._replace_culprits(settings, culprits, why, survey)
            if _may_have_hidden_gains(settings.keys() - gentler.keys()):
                useless = [one for one in cold if self._ledger.has_no_gain(one.settings)]
                gentler = cold_trials.extend(gentler, useless, again=True)
            settings = gentler
            if not settings:
                return

    def _run_bare(self) -> BareRun:
        """Run the bare program, and enter in the outcome what the run shows.

        Raises:
            JournalError: the program has changed since this tune began.
            UserError: see ``run``.
        """
        self._ledger.begin("running the bare program")
        first = bare.run(self._command, self._options, self._trials, self._ledger.print_line)
        self._journal.record_or_check_program(first.program)
        ceilings = self._measure_ceilings(first.process.header.executable)
        first = bare.compare_unwatched(first, self._trials, ceilings, self._ledger.print_line)
        outcome = self._ledger.outcome
        outcome.header, outcome.inputs = first.process.header, first.process.inputs
        outcome.program, outcome.modules = first.program, first.modules
        outcome.pace, outcome.phases_ms = first.pace, first.phases_ms
        outcome.startup_s = pairs.startup_s(first.process)
        outcome.job_steps, outcome.unlike_s = first.job_steps, first.unlike_s
        self._ledger.budget_s = first.budget_s
        return first

    def _survey(self, first: BareRun) -> Survey:
        """Find the candidates, and enter them in the ledger."""
        found = candidates.survey(
            first.process,
            self._measure_ceilings(first.process.header.executable),
            self._options.knobs,
            self._options.exactness,
            self._options.memory,
        )
        found, hopeless = prediction.sort_out(
            found,
            first.process.replayed,
            step_ms=first.pace.step_s * 1e3,
            operators_share=Case(first.process).all_operators_share,
        )
        outcome = self._ledger.outcome
        outcome.findings, outcome.refused = found.findings, found.refused
        for name, why in found.refused.items():
            self._ledger.print_line(f"{name} is not tried: {why}")
        self._ledger.enter([*found.candidates, *hopeless])
        for candidate in found.candidates:
            if candidate.predicted is not None:
                self._ledger.print_line(f"{candidate}: predicted {candidate.predicted}")
        for candidate, why in hopeless.items():
            self._ledger.print_line(f"{candidate} is not tried: {why}")
            self._ledger.reject(candidate.settings, why)
        header = first.process.header
        names = {knob for candidate in found.candidates for knob in candidate.settings}
        what = "compiling extensions (once for this version of torch; not taken from the budget)"
        with self._journal.uncounted():
            knobs.build_extensions(
                names, header.executable, header.torch, lambda: self._ledger.begin(what)
            )
        return found

    def _has_time_to_prove(self, settings: Mapping[str, str], first: BareRun) -> bool:
        """Return whether the budget has time for the shortest proof.

        A budget that flatout chose is extended a little if that is enough. If there is still time
        only for fewer steps than planned, the proof covers these fewer steps, unless the user chose
        the number of steps. If there is no time for a proof, the reason is added to the outcome.
        """
        needed_s = estimate_least_s(first, settings)
        self._ledger.budget_s = extend_budget_s(
            self._ledger.budget_s,
            self._journal.counted_s + needed_s,
            is_named=self._options.budget_seconds is not None,
        )
        if self._ledger.has_time_for(needed_s):
            return True
        steps = None
        if self._options.steps is None:
            pairs_s = OVERDRAFT * self._ledger.budget_s - self._journal.counted_s
            pairs_s -= gradient_runs.estimate_s(first, settings)
            steps = fit_steps(first.proof, first.pace, pairs_s)
        if steps is not None:
            self._ledger.print_line(
                f"time is short: the proof covers {steps} steps a run, not {first.proof.steps}"
            )
            first.proof.steps = steps
            return True
        outcome = self._ledger.outcome
        wanted_s = self._journal.counted_s + needed_s
        outcome.why += (
            f"{'; ' if outcome.why else ''}the budget is too short to prove "
            f"{format_settings(settings)}; a --budget of {math.ceil(wanted_s / 60)}m is long enough"
        )
        return False

    def _explain_nothing_faster(self) -> str:
        """Return the reason why there are no settings to prove."""
        entries = self._ledger.outcome.entries
        for entry in entries:
            if entry.state == "not tried" and entry.why.startswith(quiet.NOT_MEASURABLE):
                return entry.why
        if entries and all(entry.state == "not tried" for entry in entries):
            budget = formatting.duration(self._ledger.budget_s)
            return f"the budget of {budget} is too short to try a setting"
        taken = self._neighbours.mean_taken
        was_compared = any(entry.ratio is not None for entry in entries)
        if was_compared and taken is not None and not is_little(taken):
            return (
                f"{quiet.NOT_MEASURABLE}: no setting is faster beyond the noise, and "
                f"{quiet.describe_others(taken)}"
            )
        return "no setting is faster than the bare program, beyond noise"

    def _prove(self, prover: Prover, settings: Mapping[str, str]) -> ProofAttempt:
        """Put settings to the proof. If they are refused, enter the reason in the outcome."""
        outcome = self._ledger.outcome
        outcome.verdict = None
        attempt = prover.prove(settings)
        outcome.verdict, outcome.interrupted = attempt.verdict, attempt.pairs.interrupted
        if attempt.refusal is not None:
            self._ledger.print_line(f"{format_settings(settings)}: {attempt.refusal}")
            outcome.why = f"{format_settings(settings)} is not proven: {attempt.refusal}"
        return attempt

    def _note_undecided(self, attempt: ProofAttempt) -> str:
        """Enter in the outcome that the pairs do not show whether a plan is worse than bare.

        Args:
            attempt: the undecided proof of the plan.

        Returns the reason for leaving out the culprits, as a clause.
        """
        outcome = self._ledger.outcome
        more = attempt.pairs_to_decide
        wanted_s = self._journal.counted_s + attempt.pairs.last_pair_s * more
        why = (
            f"not decided by {attempt.pairs.count} pairs: {attempt.refusal}; about {more} more "
            f"pairs should decide it, for which --budget {math.ceil(wanted_s / 60)}m is long enough"
        )
        outcome.why = (
            f"{format_settings(attempt.pairs.variant)} is neither proven nor refuted: {why}"
        )
        return why

    def _replace_culprits(
        self, settings: Mapping[str, str], culprits: Mapping[str, str], why: str, survey: Survey
    ) -> dict[str, str]:
        """Replace each culprit by a gentler setting of its knob, or drop it.

        Args:
            settings: the settings that were not proven.
            culprits: those of ``settings`` that made the proof fail.
            why: the reason why the proof failed, as a clause.
            survey: the survey that tells which settings make sense for this program.
        """
        left = dict(settings)
        for name, setting in culprits.items():
            self._ledger.leave_out({name: setting}, why)
            gentler = search.find_gentler(name, setting, survey.offered.get(name))
            if gentler is None or self._ledger.has_no_gain({name: gentler}):
                del left[name]
            else:
                left[name] = gentler
                self._ledger.print_line(f"{name}={gentler} takes the place of {name}={setting}")
        return left

    def _decide(self, proven: Mapping[str, str], attempt: ProofAttempt) -> None:
        """Accept a proven plan if it saves time; if not, enter the reason in the outcome."""
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
        """Enter a proven plan and its evidence in the outcome."""
        outcome, verdict = self._ledger.outcome, attempt.verdict
        assert verdict is not None  # a proven plan has a verdict
        outcome.settings = dict(settings)
        outcome.pairs = attempt.pairs
        not_measurable = attempt.pairs.quietness.why_not_measurable
        gain = f"gives {attempt.pairs.ratio}" if not_measurable is None else not_measurable
        outcome.why = f"{format_settings(settings)} {gain}, and {verdict.why}"
        in_process = {
            name: outcome.find_ratio_in_process(name, setting) for name, setting in settings.items()
        }
        outcome.evidence = evidence.make_evidence(settings, attempt.pairs, verdict, in_process)


def _may_have_hidden_gains(dropped: Collection[str]) -> bool:
    """Return whether any of the dropped knobs may have hidden the gains of others.

    A setting that makes a part of the step short leaves little there for other settings to gain. If
    that setting is dropped, other settings that were rejected deserve a second trial.
    """
    return any(knobs.get(name).hides_gains for name in dropped)


def _explain_no_gain(finished_pairs: Pairs, job_steps: int | None) -> str | None:
    """Return the reason why a plan saves no time; ``None`` if the plan does save time.

    The reason is a clause. It begins with the plan's ratio or, if the ratio is not measurable, with
    ``no claim``.

    Args:
        finished_pairs: the pairs of the bare program and the plan.
        job_steps: the number of steps of the whole job; ``None`` if it is not known.
    """
    not_measurable = finished_pairs.quietness.why_not_measurable
    if not_measurable is not None:
        return f"no claim: {not_measurable}"
    ratio = finished_pairs.ratio
    if not statistics.is_gain(ratio):
        return f"{ratio} in fresh processes: {formatting.describe_ratio(ratio)}"
    if finished_pairs.whole_ratio <= 1:
        return f"{ratio} without outlier steps, but {finished_pairs.whole_ratio:.2f}x with them"
    bare_cost, plan_cost = finished_pairs.costs
    if job_steps is not None and plan_cost.job_s(job_steps) >= bare_cost.job_s(job_steps):
        return (
            f"{ratio} a step, but the job has only {job_steps} steps, too few to make up for the "
            f"plan's longer start: {plan_cost.job_s(job_steps):.1f} s with the plan, "
            f"{bare_cost.job_s(job_steps):.1f} s bare"
        )
    return None
