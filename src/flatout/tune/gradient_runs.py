"""Obtains the gradients of the first updates under bare and plan, for the proof of the plan.

If the two runs of a pair alternate and have enough steps, they record their gradients while they
warm up. There is one exception: a setting that draws other random numbers than bare may change the
order of the data. If its knob has a stand-in that keeps bare's order
(``search.use_proof_settings``), the plan's gradients are recorded with the stand-in, in short runs
of their own. If runs do not alternate or have too few steps, the gradients of both bare and plan
are recorded in short runs of their own. ``gradients.py`` judges the recorded gradients.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence

from flatout.plan import Check
from flatout.tune import gradients, pairs, proof, search
from flatout.tune.bare import BareRun
from flatout.tune.budget import GRADIENT_SEEDS, GRADIENT_STEPS, count_gradient_steps
from flatout.tune.gradients import Recorded
from flatout.tune.ledger import Ledger, Options, format_settings
from flatout.tune.pairs import Pairs
from flatout.tune.stage import TuneStage
from flatout.tune.trial import TrialFailedError, Trials
from flatout.wire.request import Inspection

ACTIVITY = "proving the plan: comparing its gradients with the bare program's"


class GradientRuns(TuneStage):
    """The gradients of bare and of the plans of one tune.

    Attributes:
        check: the result of the latest comparison of gradients.
    """

    def __init__(self, trials: Trials, ledger: Ledger, bare: BareRun, options: Options) -> None:
        super().__init__(trials, ledger, bare, options)
        self.check = Check("gradients", "open", "no gradients were recorded")
        self._bare_gradients: list[Recorded] = []
        self._plan_gradients: list[Recorded] | None = None

    @property
    def inspection(self) -> Inspection:
        """What the two runs of a pair record if they alternate."""
        if not self._bare.proof.shares_gradients:
            return pairs.PROOF_INSPECTION
        return dataclasses.replace(
            pairs.PROOF_INSPECTION, gradient_steps=GRADIENT_STEPS, only_in_warmup=True
        )

    def begin(self, finished: Pairs, seeds: int) -> str | None:
        """Make the short runs that a plan needs before its pairs, if any.

        Args:
            finished: the pairs of the plan; none of them has run yet.
            seeds: the number of seeds for which gradients are compared.

        Returns the reason why the plan does not pass; ``None`` if nothing speaks against it so far.

        Raises:
            UserError: the program fails without any settings.
        """
        settings = finished.variant
        if not self._is_shared(finished):
            return self.compare(settings, seeds)
        self._plan_gradients = None
        stand_in = search.use_proof_settings(settings)
        if stand_in != dict(settings):
            self._ledger.begin(ACTIVITY)
            try:
                self._plan_gradients = self._record_all(stand_in, seeds)
            except TrialFailedError as failure:
                return f"it fails in a fresh process: {failure}"
        return None

    def is_wrong(self, finished: Pairs, seeds: int) -> bool:
        """Return whether the gradients that the pairs have recorded so far speak against the plan.

        The gradients are judged at most twice (after two pairs and after the last seed), because
        every judgment is one more chance of a false alarm.
        """
        if finished.count not in (min(GRADIENT_SEEDS, seeds), seeds):
            return False
        return self._is_shared(finished) and self._judge(finished, seeds).result == "failed"

    def end(self, finished: Pairs, seeds: int) -> str | None:
        """Judge the gradients of a plan after its pairs, if ``begin`` has not done so.

        Returns and raises: see ``begin``.
        """
        if not self._bare.proof.shares_gradients or not finished.began_in_relay:
            return None  # ``begin`` has compared them
        if finished.failure is not None or not finished.count:
            return None
        if not finished.in_relay:  # runs cannot alternate after all
            return self.compare(finished.variant, seeds)
        self.check = self._judge(finished, seeds)
        return self._tell(finished.variant)

    def compare(self, settings: Mapping[str, str], seeds: int) -> str | None:
        """Record gradients of bare and plan in short runs of their own, and compare them.

        Settings that draw other random numbers are replaced (``search.use_proof_settings``).

        Args:
            settings: the settings of the plan.
            seeds: the number of seeds.

        Returns the reason why the plan does not pass; ``None`` if no gradient speaks against it.

        Raises:
            UserError: the program fails without any settings.
        """
        if not self._bare.process.trains:
            return None
        self._ledger.begin(ACTIVITY)
        settings = search.use_proof_settings(settings)
        try:
            while len(self._bare_gradients) < seeds:
                self._bare_gradients.append(self._record({}, len(self._bare_gradients)))
        except TrialFailedError as failure:
            message = "the program fails when it runs again"
            raise pairs.to_user_error(message, failure) from failure
        try:
            plan = self._record_all(settings, seeds)
        except TrialFailedError as failure:
            return f"it fails in a fresh process: {failure}"
        self.check = gradients.judge(
            self._bare_gradients[:seeds], plan, proof.collect_exactness(settings)
        )
        return self._tell(settings)

    def estimate_s(self) -> float:
        """Return the time that ``compare`` takes, in seconds."""
        runs = 2 * self._bare.proof.gradient_seeds
        return runs * self._bare.pace.seconds(count_gradient_steps(self._bare.pace))

    def _is_shared(self, finished: Pairs) -> bool:
        """Return whether the runs of these pairs record gradients."""
        return finished.in_relay and self._bare.proof.shares_gradients

    def _judge(self, finished: Pairs, seeds: int) -> Check:
        """Judge the gradients that pairs have recorded."""
        count = min(seeds, finished.count)
        bare = [done.process.gradients for done in finished.baseline_runs[:count]]
        if count > len(self._bare_gradients):
            self._bare_gradients = list(bare)
        settings = finished.variant
        if self._plan_gradients is None:
            plan: Sequence[Recorded] = [
                done.process.gradients for done in finished.variant_runs[:count]
            ]
        else:
            plan = self._plan_gradients[:count]
            settings = search.use_proof_settings(settings)
        return gradients.judge(bare, plan, proof.collect_exactness(settings))

    def _tell(self, settings: Mapping[str, str]) -> str | None:
        """Print the result of the check; return why the plan does not pass, or ``None``."""
        self._ledger.print_line(f"first gradients of {format_settings(settings)}: {self.check.why}")
        return self.check.why if self.check.result == "failed" else None

    def _record_all(self, settings: Mapping[str, str], seeds: int) -> list[Recorded]:
        """Record gradients in short runs, one run for each seed.

        Raises:
            TrialFailedError: the program fails.
        """
        return [self._record(settings, number) for number in range(seeds)]

    def _record(self, settings: Mapping[str, str], number: int) -> Recorded:
        pace, size = self._bare.pace, self._bare.proof
        steps = count_gradient_steps(pace)
        if size.shares_gradients:
            # The pairs record bare's gradients while they warm up, so this run is as long as that.
            relay = pairs.size_relay(size.steps, pace.step_s, pace.cycle_steps, size.warmup_steps)
            steps = relay.warmup_steps
        done = pairs.run_once(
            self._trials,
            settings,
            pace=self._bare.pace,
            steps=min(steps, self._bare.job_steps or steps),
            seed=self._options.seed + number,
            inspection=Inspection(gradient_steps=GRADIENT_STEPS),
        )
        return done.process.gradients


def estimate_s(bare: BareRun, settings: Mapping[str, str] | None) -> float:
    """Return the time of the runs that only record gradients, in seconds.

    Args:
        bare: the results of the first run.
        settings: the settings of the plan; ``None`` if they are not known yet.
    """
    if not bare.process.trains:
        return 0.0
    sides = 2
    if bare.proof.shares_gradients:
        has_stand_in = settings is not None and search.use_proof_settings(settings) != settings
        sides = 1 if has_stand_in else 0
    steps = count_gradient_steps(bare.pace)
    return sides * bare.proof.gradient_seeds * bare.pace.seconds(steps)
