"""The prover: it proves every plan, for tune, for verify and in the search for a culprit.

A plan is put to the proof in two parts. First its gradients of the first updates are compared with
the bare program's, in short runs. Then bare and plan run in pairs of fresh processes, which give
the claimed ratio and the losses that are compared. ``proof.py``, ``gradients.py`` and ``memory.py``
check the records; the prover makes the runs that they need, and puts their verdicts together.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from flatout.knob import Exactness
from flatout.plan import Check
from flatout.tune import gradients, memory, pairs, proof, search, statistics
from flatout.tune.bare import BareRun
from flatout.tune.ledger import Ledger, Options, format_settings
from flatout.tune.pairs import Pairs
from flatout.tune.proof import Run, Verdict
from flatout.tune.stage import TuneStage
from flatout.tune.trial import Trial, TrialFailedError, Trials
from flatout.wire.lines import Gradient
from flatout.wire.record import ProcessRecord
from flatout.wire.request import Inspection

PROOF_PHASE = "proving the plan"
GRADIENTS_PHASE = f"{PROOF_PHASE}: comparing its gradients with the bare program's"

GRADIENT_SEEDS = 2
"""Seeds for which gradients are compared, unless another number of pairs is asked for."""

GRADIENT_STEPS = 4
"""Updates of each run whose gradients are compared: several, as some settings leave the first step
as it is."""

USUAL_PAIRS = 8
"""Pairs behind a claim for which time is reserved."""

MAXIMUM_PAIRS = 24
"""Most pairs behind a claim."""

REPEATS = 2
"""Additional bare runs from one seed before a plan is refused for not being identical. With thread
races, a program may differ from itself in only some runs."""

COARSE_DTYPES = ("bfloat16", "float16")
"""Dtypes of a program's own arithmetic that are so coarse that mere reordering causes errors as
large as lower precision would."""

COARSE_SHARE = 0.01
"""Share of a program's operations in ``COARSE_DTYPES`` above which its arithmetic is coarse."""


@dataclass(frozen=True)
class ProofAttempt:
    """What came of putting a plan to the proof.

    Attributes:
        pairs: its pairs with the bare program; none, if its gradients were refused.
        refusal: why the plan cannot be used, one clause; ``None``: it is proven.
        verdict: the verdict on its losses; ``None``: it did not come to one.
        part_passes: returns whether a subset of the settings passes the check that the whole plan
            failed.
    """

    pairs: Pairs
    refusal: str | None
    verdict: Verdict | None
    part_passes: Callable[[Mapping[str, str]], bool]


class Prover(TuneStage):
    """Proves plans of one job."""

    def __init__(self, trials: Trials, ledger: Ledger, bare: BareRun, options: Options) -> None:
        super().__init__(trials, ledger, bare, options)
        self._repeats = [Run.of(bare.process)]
        self._bare_gradients: list[Mapping[str, Sequence[Gradient]]] = []
        self._gradients = Check("gradients", "open", "no gradients were recorded")

    def prove(self, settings: Mapping[str, str], count: int | None = None) -> ProofAttempt:
        """Put a plan to the proof.

        Args:
            settings: settings of the plan.
            count: number of pairs, each with a seed of its own; ``None``: as many as the claim
                needs and the budget allows.

        Raises:
            KeyboardInterrupt: the user ends the tune before there are pairs.
            UserError: the program fails without any settings.
        """
        in_relay = self._bare.can_relay_under(settings)
        made = Pairs({}, dict(settings), in_relay=in_relay)
        refusal = self._compare_gradients(settings, count or GRADIENT_SEEDS)
        if refusal is not None:
            return ProofAttempt(made, refusal, None, self._gradients_pass)
        steps = self._bare.proof_steps
        self._ledger.say(
            f"{format_settings(settings)} against bare in fresh processes, {steps} steps each"
        )
        is_enough = self._is_enough if count is None else lambda made: made.count >= count
        pairs.run(
            self._trials,
            made,
            pace=self._bare.pace,
            steps=steps,
            seed=self._options.seed,
            is_enough=self._ledger.follow_pairs(
                PROOF_PHASE,
                statistics.MINIMUM_PAIRS if count is None else count,
                2 * self._bare.pace.seconds(steps),
                is_enough,
            ),
            say=self._ledger.say,
        )
        self._ledger.note_runs(made)
        verdict = self._judge_pairs(made)
        refusal = self._find_refusal(made, verdict)
        return ProofAttempt(made, refusal, verdict, functools.partial(self._passes, made))

    def find_culprits(self, settings: Mapping[str, str], attempt: ProofAttempt) -> dict[str, str]:
        """Find the settings of a plan that made its proof fail.

        If the losses are inconclusive, no subset fails clearly; the most invasive settings are then
        blamed.

        Args:
            settings: settings of the plan.
            attempt: what came of its proof.
        """
        if attempt.verdict is not None and attempt.verdict.undecided:
            return search.find_most_invasive(settings)
        self._ledger.begin("looking for the setting that makes the proof fail")
        self._ledger.say("looking for the setting that makes the proof fail")
        return search.find_culprits(settings, attempt.part_passes)

    def _compare_gradients(self, settings: Mapping[str, str], seeds: int) -> str | None:
        """Compare the gradients of the first updates with the bare program's.

        Args:
            settings: settings of the plan.
            seeds: number of seeds.

        Returns why they are not the same; ``None``: they are, or there are none.

        Raises:
            UserError: the program fails without any settings.
        """
        if not self._bare.process.trains:
            return None
        self._ledger.begin(GRADIENTS_PHASE)
        settings = search.use_proof_settings(settings)
        while len(self._bare_gradients) < seeds:
            number = len(self._bare_gradients)
            try:
                self._bare_gradients.append(self._record_gradients({}, number))
            except TrialFailedError as failure:
                message = "the program fails when it runs again"
                raise pairs.to_user_error(message, failure) from failure
        try:
            plan = [self._record_gradients(settings, number) for number in range(seeds)]
        except TrialFailedError as failure:
            return f"it fails in a fresh process: {failure}"
        check = self._gradients = gradients.judge(
            self._bare_gradients[:seeds], plan, proof.collect_exactness(settings)
        )
        self._ledger.say(f"first gradients of {format_settings(settings)}: {check.why}")
        return check.why if check.result == "failed" else None

    def _judge_pairs(self, made: Pairs) -> Verdict | None:
        """The verdict on a plan from its pairs and its gradients, which must have been compared.

        Runs that the verdict turns out to need are made. ``None``: there are too few pairs.
        """
        if made.failure is not None or made.count < 2:
            return None
        verdict = self._judge_losses(made)
        try:
            if _is_not_identical(verdict) and len(self._repeats) == 1 and not made.interrupted:
                self._repeat_bare()
                verdict = self._judge_losses(made)
            if verdict.undecided and self._has_other_data_order(made) and not made.interrupted:
                verdict = self._judge_with_same_data(made) or verdict
        except KeyboardInterrupt:
            made.interrupted = True
        if self._bare.process.trains:
            others = (c for c in verdict.checks if c.name != self._gradients.name)
            verdict = dataclasses.replace(verdict, checks=(self._gradients, *others))
        return verdict

    def _find_refusal(self, made: Pairs, verdict: Verdict | None) -> str | None:
        """Why the plan of these pairs cannot be used, ``None``: it can."""
        if made.failure is not None:
            return f"it fails in a fresh process: {made.failure}"
        if verdict is None:
            return "there was no time for two pairs"
        if not verdict.passed:
            return verdict.why
        bare, plan = made.steps(made.baseline_runs), made.steps(made.variant_runs)
        return memory.refusal(bare, plan, self._options.memory)

    def _is_enough(self, made: Pairs) -> bool:
        """Whether the claim is precise enough, or the budget is spent."""
        if made.count < statistics.MINIMUM_PAIRS:
            return False
        if 2 * self._bare.pace.seconds(self._bare.proof_steps) > self._ledger.left_s:
            return self._is_overtime_over(made)
        if not statistics.enough_pairs(made.log_ratios, MAXIMUM_PAIRS):
            return False
        if made.count >= MAXIMUM_PAIRS or self._has_other_data_order(made):
            return True
        return not self._judge_losses(made).undecided

    def _is_overtime_over(self, made: Pairs) -> bool:
        """Whether pairs beyond the budget are of no use any more.

        If the losses are inconclusive, up to ``MINIMUM_PAIRS`` more pairs are made: the cost of
        trying a gentler plan, which would gain less.
        """
        is_decided = not self._judge_losses(made).undecided
        if is_decided or made.count >= MAXIMUM_PAIRS or self._has_other_data_order(made):
            return True
        if made.overtime_from is None:
            made.overtime_from = made.count
            self._ledger.say(
                "the budget is spent, and the loss comparison is still inconclusive: at most "
                f"{statistics.MINIMUM_PAIRS} more pairs"
            )
        return made.count >= made.overtime_from + statistics.MINIMUM_PAIRS

    def _passes(self, made: Pairs, part: Mapping[str, str]) -> bool:
        """Whether a part of a plan passes, compared with the bare runs of the plan's pairs."""
        bare = made.baseline_runs[: statistics.MINIMUM_PAIRS]
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
        """Whether a part of a plan has the bare program's gradients."""
        return self._compare_gradients(part, GRADIENT_SEEDS) is None

    def _has_other_data_order(self, made: Pairs) -> bool:
        """Whether the plan saw its data in another order, since it draws other random numbers."""
        if search.use_proof_settings(made.variant) == dict(made.variant):
            return False
        return not all(
            proof.have_same_data(Run.of(one.process), Run.of(other.process))
            for one, other in zip(made.baseline_runs, made.variant_runs, strict=True)
        )

    def _judge_losses(self, made: Pairs) -> Verdict:
        """The verdict on the pairs, gradients apart."""
        return self._judge(made.variant, made.baseline_runs, made.variant_runs)

    def _judge_with_same_data(self, made: Pairs) -> Verdict | None:
        """The verdict on a plan under its knobs' ``proof_setting``, with the data in bare's order.

        Where a plan draws other random numbers, its data come in another order, and the losses of
        a pair differ as much as those of two seeds, so that it takes many seeds to decide.
        ``None``: the plan has no such settings, or it fails under them.
        """
        settings = search.use_proof_settings(made.variant)
        if settings == dict(made.variant):
            return None
        self._ledger.say(
            "loss comparison inconclusive: this plan changes the order of the data; checking again "
            f"with the same order ({format_settings(settings)})"
        )
        try:
            runs = [self._run(settings, number) for number in range(made.count)]
        except TrialFailedError:
            return None
        verdict = self._judge(settings, made.baseline_runs, runs)
        self._ledger.say(verdict.why)
        return verdict

    def _judge(
        self, settings: Mapping[str, str], bare: Sequence[Trial], plan: Sequence[Trial]
    ) -> Verdict:
        return proof.judge(
            [Run.of(done.process) for done in bare],
            [Run.of(done.process) for done in plan],
            self._repeats,
            self._collect_exactness(settings),
        )

    def _collect_exactness(self, settings: Mapping[str, str]) -> frozenset[Exactness]:
        """What the settings may change, given the precision of the program's own arithmetic."""
        found = proof.collect_exactness(settings)
        if found <= {"bitwise"} or not _is_coarse(self._bare.process):
            return found
        return found | {"reduced"}

    def _repeat_bare(self) -> None:
        """Find out whether bare repeats itself, before a plan is blamed for not being identical."""
        self._ledger.say(
            "the plan is not identical to bare; running bare again, to see whether it repeats "
            "itself"
        )
        for _ in range(REPEATS):
            try:
                self._repeats.append(Run.of(self._run({}, 0).process))
            except TrialFailedError as failure:
                message = "the program fails when it runs again"
                raise pairs.to_user_error(message, failure) from failure

    def _run(self, settings: Mapping[str, str], number: int) -> Trial:
        """Run the program once for as long as a proof, with the seed of a pair.

        Raises:
            TrialFailedError: it fails.
        """
        return pairs.run_once(
            self._trials,
            settings,
            pace=self._bare.pace,
            steps=self._bare.proof_steps,
            seed=self._options.seed + number,
        )

    def _record_gradients(
        self, settings: Mapping[str, str], number: int
    ) -> Mapping[str, Sequence[Gradient]]:
        """Record the gradients of one short run, with the seed of a pair.

        Raises:
            TrialFailedError: it fails.
        """
        done = pairs.run_once(
            self._trials,
            settings,
            pace=self._bare.pace,
            steps=GRADIENT_STEPS + 1,
            seed=self._options.seed + number,
            inspection=Inspection(gradient_steps=GRADIENT_STEPS),
        )
        return done.process.gradients


def estimate_s(bare: BareRun) -> float:
    """The time that the proof of a plan usually takes, in seconds."""
    claim_s = 2 * USUAL_PAIRS * bare.pace.seconds(bare.proof_steps)
    gradients_s = 2 * GRADIENT_SEEDS * bare.pace.seconds(GRADIENT_STEPS + 1)
    return claim_s + gradients_s


def _is_not_identical(verdict: Verdict) -> bool:
    return any(c.name == "identity" and c.result == "failed" for c in verdict.checks)


def _is_coarse(process: ProcessRecord) -> bool:
    """Whether a good part of the program's own arithmetic is in half precision."""
    by_dtype = (None if process.profile is None else process.profile.flops_by_dtype) or {}
    coarse = sum(by_dtype.get(name, 0) for name in COARSE_DTYPES)
    return bool(coarse > COARSE_SHARE * sum(by_dtype.values()))
