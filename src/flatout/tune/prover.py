"""Proves plans for ``flatout tune`` and ``flatout verify``, and finds settings that make a proof
fail.

The bare program (without any setting) and the plan run in pairs of fresh processes. The pairs give
the claimed ratio, and the losses that are compared. The gradients of the first updates are compared
as well (``gradient_runs.py``). The prover makes the runs; ``proof.py``, ``gradients.py``,
``memory.py`` and ``growth.py`` check their records, and the prover combines the verdicts.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from flatout.knob import Exactness
from flatout.tune import (
    formatting,
    gradient_runs,
    growth,
    memory,
    pairs,
    proof,
    quiet,
    search,
    statistics,
)
from flatout.tune.bare import BareRun
from flatout.tune.gradient_runs import GradientRuns
from flatout.tune.growth import GrowthCheck
from flatout.tune.ledger import Ledger, Options, format_settings
from flatout.tune.pairs import Pairs
from flatout.tune.proof import Run, Verdict
from flatout.tune.stage import TuneStage
from flatout.tune.trial import Trial, TrialFailedError, Trials, is_due_to_others
from flatout.wire.record import ProcessRecord

PROOF_ACTIVITY = "proving the plan"

MAXIMUM_PAIRS = 24
"""Maximum number of pairs behind a claim, unless the user gives a number of pairs."""

REPEATS = 2
"""Number of additional bare runs from one seed, made before a plan is refused because it is not
identical to bare. If threads race, the results of a program may differ in only some of its runs."""

COARSE_DTYPES = ("bfloat16", "float16")
"""If a program itself computes in one of these coarse dtypes, mere reordering causes errors as
large as a lower precision would."""

COARSE_SHARE = 0.01
"""A program's arithmetic counts as coarse if more than this share of its FLOPs is in
``COARSE_DTYPES``."""


@dataclass(frozen=True)
class ProofAttempt:
    """The result of one proof of a plan.

    Attributes:
        pairs: the pairs of the bare program and the plan; there are none if the plan was refused
            before its pairs began (``GradientRuns.begin``).
        refusal: the reason why the plan cannot be used, as a clause; ``None`` if the plan is
            proven.
        verdict: the verdict on the pairs; ``None`` if the pairs were not judged.
        part_passes: returns whether a subset of the settings passes the check that the whole plan
            failed.
    """

    pairs: Pairs
    refusal: str | None
    verdict: Verdict | None
    part_passes: Callable[[Mapping[str, str]], bool]

    @property
    def is_undecided(self) -> bool:
        """Whether the plan was refused because the pairs leave open if it is worse than bare."""
        return self.refusal is not None and self.verdict is not None and self.verdict.undecided

    @property
    def pairs_to_decide(self) -> int:
        """How many more pairs an undecided proof probably needs.

        The distance of a confidence limit from the mean is inversely proportional to the square
        root of the number of pairs.
        """
        assert self.verdict is not None
        factors = [1.0]
        for check in self.verdict.checks:
            if (
                check.result == "failed"
                and {"limit", "difference", "margin"} <= check.measurements.keys()
            ):
                limit, difference, margin = (
                    check.measurements[name] for name in ("limit", "difference", "margin")
                )
                factors.append(((limit - difference) / max(margin - difference, margin / 10)) ** 2)
        return max(1, math.ceil(self.pairs.count * (max(factors) - 1)))


class Prover(TuneStage):
    """Proves plans of one job."""

    def __init__(self, trials: Trials, ledger: Ledger, bare: BareRun, options: Options) -> None:
        super().__init__(trials, ledger, bare, options)
        self._repeats = [Run.of(bare.process)]
        self._gradients = GradientRuns(trials, ledger, bare, options)
        self._growth_check = GrowthCheck(trials, ledger, bare, options)

    def prove(self, settings: Mapping[str, str], count: int | None = None) -> ProofAttempt:
        """Put a plan to the proof.

        Args:
            settings: the settings of the plan.
            count: the number of pairs, each with a seed of its own; ``None`` for as many as the
                claim and the losses need, if the budget has time for them.

        Raises:
            KeyboardInterrupt: the user ends the tune before there are pairs.
            UserError: the program fails without any settings.
        """
        in_relay = self._bare.can_relay_under(settings)
        finished = Pairs({}, dict(settings), in_relay=in_relay, unwatched=self._bare.unwatched)
        seeds = count or self._bare.proof.gradient_seeds
        refusal = self._gradients.begin(finished, seeds)
        if refusal is not None:
            return ProofAttempt(finished, refusal, None, self._gradients_pass)
        steps = self._bare.proof.steps
        self._ledger.print_line(
            f"{format_settings(settings)} against bare in fresh processes, {steps} steps each"
        )

        def is_over(done: Pairs) -> bool:
            is_enough = self._is_enough(done) if count is None else done.count >= count
            return is_enough or self._gradients.is_wrong(done, seeds)

        pairs.run(
            self._trials,
            finished,
            pace=self._bare.pace,
            steps=steps,
            seed=self._options.seed,
            is_enough=self._ledger.follow_pairs(
                PROOF_ACTIVITY,
                self._bare.proof.pairs if count is None else count,
                self._pair_s,
                is_over,
                may_exceed=count is None,
            ),
            print_line=self._ledger.print_line,
            warmup_steps=self._bare.proof.warmup_steps,
            inspection=self._gradients.inspection,
        )
        self._ledger.note_runs(finished)
        refusal = self._gradients.end(finished, seeds)
        if refusal is not None:
            return ProofAttempt(finished, refusal, None, self._gradients_pass)
        verdict = self._judge_pairs(finished)
        refusal = self._find_refusal(finished, verdict)
        if refusal is None and verdict is not None:
            verdict, refusal = self._growth_check.check(finished, verdict)
        part_passes = functools.partial(self._passes, finished)
        return ProofAttempt(finished, refusal, verdict, part_passes)

    def find_culprits(self, settings: Mapping[str, str], attempt: ProofAttempt) -> dict[str, str]:
        """Find the settings of a plan that made its proof fail.

        If the verdict is undecided, no subset would fail clearly, so the most invasive settings are
        taken as the culprits. If the plan was refused only because of its memory, the culprits are
        the settings that need more memory by design; if the plan has no such setting and memory was
        shown to grow, they are the most invasive settings. In all other cases, the culprits are
        searched for; if there is no time for a search, the most invasive settings are taken.

        Args:
            settings: the settings of the plan.
            attempt: the result of its proof.
        """
        if attempt.is_undecided:
            return search.find_most_invasive(settings)
        if attempt.verdict is not None and attempt.verdict.passed:  # memory is the only reason
            costly = memory.find_costly(settings)
            if costly or growth.was_shown(attempt.verdict):
                return costly or search.find_most_invasive(settings)
        part_s = self._bare.proof.pairs * self._pair_s / 2
        search_s = 2 * math.log2(2 * len(settings)) * part_s
        if attempt.verdict is None and attempt.pairs.failure is None:  # the gradients are wrong
            search_s = 2 * math.log2(2 * len(settings)) * self._gradients.estimate_s() / 2
        if not self._ledger.has_time_for(search_s + estimate_least_s(self._bare)):
            return search.find_most_invasive(settings)
        self._ledger.begin("looking for the setting that makes the proof fail")
        self._ledger.print_line("looking for the setting that makes the proof fail")
        return search.find_culprits(settings, attempt.part_passes)

    def _judge_pairs(self, finished: Pairs) -> Verdict | None:
        """Judge a plan by its pairs and by its gradients.

        The gradients must already have been compared. If a first verdict shows that more runs are
        needed, they are made. The result is ``None`` if the plan has failed to run, or if there are
        too few pairs.
        """
        if finished.failure is not None or finished.count < 2:
            return None
        verdict = self._judge_without_gradients(finished)
        try:
            is_repeatable = not finished.interrupted and self._ledger.has_time_for(
                REPEATS * self._pair_s / 2
            )
            if _needs_repeats(verdict) and len(self._repeats) == 1 and is_repeatable:
                self._repeat_bare()
                verdict = self._judge_without_gradients(finished)
            is_undecided = verdict.undecided and not finished.interrupted
            if is_undecided and self._has_other_data_order(finished):
                again_s = finished.count * self._pair_s / 2
                if self._ledger.has_time_for(again_s):
                    verdict = self._judge_with_same_data(finished, again_s) or verdict
        except KeyboardInterrupt:
            finished.interrupted = True
        if self._bare.process.trains:
            verdict = dataclasses.replace(verdict, checks=(self._gradients.check, *verdict.checks))
        return verdict

    def _find_refusal(self, finished: Pairs, verdict: Verdict | None) -> str | None:
        """Return the reason why the plan of these pairs cannot be used; ``None`` if it can."""
        if finished.failure is not None:
            if is_due_to_others(finished.failure):
                return finished.failure
            return f"it fails in a fresh process: {finished.failure}"
        if verdict is None:
            return "it was interrupted before two pairs were complete"
        if not verdict.passed:
            return verdict.why
        bare = finished.steps(finished.baseline_runs)
        plan = finished.steps(finished.variant_runs)
        return memory.refusal(bare, plan, self._options.memory)

    @property
    def _pair_s(self) -> float:
        """The expected time of a pair of runs of a proof, in seconds."""
        return self._bare.pace.pair_s(self._bare.proof.steps)

    def _is_enough(self, finished: Pairs) -> bool:
        """Return whether the claim is precise enough and the losses decide, or the time is over.

        As long as the losses do not decide, more pairs are run. But time is kept for the proof of a
        gentler plan, if there is one: a smaller gain is better than none. If bare and plan see
        their data in a different order, no more pairs are run for the losses, because these can be
        compared again in the same order (``_judge_with_same_data``).
        """
        if finished.count < min(statistics.FEWEST_PAIRS, statistics.MINIMUM_PAIRS):
            return False
        pair_s = max(self._pair_s, finished.last_pair_s)
        if finished.count >= MAXIMUM_PAIRS or not self._ledger.has_time_for(pair_s):
            return True
        if not quiet.is_enough(finished.quietness, finished.log_ratios, MAXIMUM_PAIRS):
            return False
        if self._has_other_data_order(finished):
            return True
        if not self._judge_without_gradients(finished).undecided:
            return True
        is_last_plan = search.find_most_invasive(finished.variant) == finished.variant
        reserved_s = 0.0 if is_last_plan else estimate_least_s(self._bare)
        if not self._ledger.has_time_for(reserved_s):
            reserved_s = 0.0
        return not self._ledger.has_time_for(pair_s + reserved_s)

    def _passes(self, finished: Pairs, part: Mapping[str, str]) -> bool:
        """Return whether ``part``, a subset of a plan's settings, passes the proof.

        The program runs under ``part`` and is compared with the bare runs of the plan's pairs. An
        undecided verdict counts as passed.
        """
        bare = finished.baseline_runs[: self._bare.proof.pairs]
        try:
            runs = [self._run(part, number) for number in range(len(bare))]
        except TrialFailedError:
            return False
        excess = memory.refusal(
            [done.process.loop_steps for done in bare],
            [done.process.loop_steps for done in runs],
            self._options.memory,
        )
        verdict = self._judge(part, bare, runs)
        return (verdict.passed or verdict.undecided) and excess is None

    def _gradients_pass(self, part: Mapping[str, str]) -> bool:
        """Return whether ``part``, a subset of a plan's settings, has the gradients of bare."""
        return self._gradients.compare(part, self._bare.proof.gradient_seeds) is None

    def _has_other_data_order(self, finished: Pairs) -> bool:
        """Return whether the plan saw its data in a different order than bare, and proof settings
        (``search.use_proof_settings``) can restore bare's order.
        """
        if search.use_proof_settings(finished.variant) == dict(finished.variant):
            return False
        return not all(
            proof.have_same_data(Run.of(one.process), Run.of(other.process))
            for one, other in zip(finished.baseline_runs, finished.variant_runs, strict=True)
        )

    def _judge_without_gradients(self, finished: Pairs) -> Verdict:
        """Judge the pairs, but not their gradients."""
        return self._judge(finished.variant, finished.baseline_runs, finished.variant_runs)

    def _judge_with_same_data(self, finished: Pairs, lasts_s: float) -> Verdict | None:
        """Judge a plan again, with bare's order of the data.

        Each setting that draws other random numbers is replaced by its knob's ``proof_setting``, a
        slower stand-in that keeps bare's order of the data. Without a stand-in, the data may come
        in a different order. The losses of bare and plan from one seed then differ as much as those
        of two seeds, so that a decision takes many seeds.

        Args:
            finished: the pairs of the plan.
            lasts_s: the expected time of the new runs, in seconds.

        Returns the new verdict; ``None`` if no setting of the plan has a stand-in, or if the
        program fails under the stand-ins.
        """
        settings = search.use_proof_settings(finished.variant)
        if settings == dict(finished.variant):
            return None
        self._ledger.print_line(
            "the losses do not decide, because this plan changes the order of the data; comparing "
            f"them again in bare's order ({format_settings(settings)}), about "
            f"{formatting.duration(lasts_s)}"
        )
        try:
            runs = [self._run(settings, number) for number in range(finished.count)]
        except TrialFailedError:
            return None
        verdict = self._judge(settings, finished.baseline_runs, runs)
        self._ledger.print_line(verdict.why)
        return verdict

    def _judge(
        self, settings: Mapping[str, str], bare: Sequence[Trial], plan: Sequence[Trial]
    ) -> Verdict:
        # Gradients are judged separately, sometimes from runs with other settings: see
        # ``GradientRuns``.
        of_bare, of_plan = (
            [dataclasses.replace(Run.of(done.process), gradients={}) for done in runs]
            for runs in (bare, plan)
        )
        return proof.judge(
            of_bare,
            of_plan,
            self._repeats,
            self._collect_exactness(settings),
        )

    def _collect_exactness(self, settings: Mapping[str, str]) -> frozenset[Exactness]:
        """Collect the exactness classes of settings, given the program's own precision.

        If the program's own arithmetic is coarse (``COARSE_DTYPES``), ``reduced`` is added, because
        mere reordering then changes results as much as a lower precision would. Nothing is added if
        all settings are ``bitwise``.
        """
        found = proof.collect_exactness(settings)
        if found <= {"bitwise"} or not _is_coarse(self._bare.process):
            return found
        return found | {"reduced"}

    def _repeat_bare(self) -> None:
        """Run the bare program again, to find out whether its results repeat."""
        self._ledger.print_line(
            "the plan is not identical to bare; running bare again, to see whether bare repeats "
            "itself"
        )
        for _ in range(REPEATS):
            try:
                self._repeats.append(Run.of(self._run({}, 0).process))
            except TrialFailedError as failure:
                message = "the program fails when it runs again"
                raise pairs.to_user_error(message, failure) from failure

    def _run(self, settings: Mapping[str, str], number: int) -> Trial:
        """Run the program once, with as many steps as a proof and the seed of pair ``number``.

        Pairs are counted from 0.

        Raises:
            TrialFailedError: the program fails.
        """
        return pairs.run_once(
            self._trials,
            settings,
            pace=self._bare.pace,
            steps=self._bare.proof.steps,
            seed=self._options.seed + number,
        )


def estimate_s(bare: BareRun, settings: Mapping[str, str] | None = None) -> float:
    """Return the expected time of the proof of a plan, in seconds.

    Args:
        bare: the results of the first run.
        settings: the settings of the plan; ``None`` if they are not known yet.
    """
    return _estimate_s(bare, bare.proof.pairs, settings)


def estimate_least_s(bare: BareRun, settings: Mapping[str, str] | None = None) -> float:
    """Return the expected time of the smallest proof of a plan, in seconds.

    The smallest proof has ``statistics.FEWEST_PAIRS`` pairs. See ``estimate_s`` for the arguments.
    """
    least = min(statistics.FEWEST_PAIRS, statistics.MINIMUM_PAIRS)
    return _estimate_s(bare, least, settings)


def _estimate_s(bare: BareRun, pairs_of_runs: int, settings: Mapping[str, str] | None) -> float:
    claim_s = pairs_of_runs * bare.pace.pair_s(bare.proof.steps)
    return claim_s + gradient_runs.estimate_s(bare, settings)


def _needs_repeats(verdict: Verdict) -> bool:
    """Return whether bare must be run again, because the plan should be identical to bare but is
    not.

    If the program trains, the first run of the tune (``bare.run``) already serves as a repeat of
    the first pair's bare run. If the program only infers, the first run of the tune has recorded no
    outputs, so it cannot serve as a repeat: ``bare_repeats`` is then ``None``, and the check is
    open.
    """
    return any(
        check.name == "identity"
        and (check.result == "failed" or (check.result == "open" and verdict.bare_repeats is None))
        for check in verdict.checks
    )


def _is_coarse(process: ProcessRecord) -> bool:
    """Return whether the program's own arithmetic is coarse, see ``COARSE_SHARE``."""
    by_dtype = (None if process.profile is None else process.profile.flops_by_dtype) or {}
    coarse = sum(by_dtype.get(name, 0) for name in COARSE_DTYPES)
    return bool(coarse > COARSE_SHARE * sum(by_dtype.values()))
