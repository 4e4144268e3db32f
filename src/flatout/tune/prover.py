"""The one prover: every plan that is proven, by tune, by verify or in the search for the culprit.

What is checked of the recorded runs is in ``proof.py``, ``gradients.py`` and ``memory.py``; here
the runs are made that these need, and their verdicts are put together.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence

from flatout.knob import Exactness
from flatout.plan import Check
from flatout.tune import gradients, memory, pairs, proof, search, statistics
from flatout.tune.pairs import Pace, Pairs
from flatout.tune.proof import Run, Verdict
from flatout.tune.trial import Trial, TrialFailedError, Trials
from flatout.wire.lines import Gradient
from flatout.wire.record import ProcessRecord
from flatout.wire.request import Inspection

GRADIENT_SEEDS, GRADIENT_STEPS = 2, 4
"""For which the gradients are compared, before anything else is, unless more are asked for. Some
settings leave the first step as it is."""

REPEATS = 2
"""Bare runs more from one seed, before a plan is refused for not being identical: threads that
meet in another order change some programs in some of their runs only."""

COARSE = ("bfloat16", "float16")
"""Dtypes of a program's own arithmetic in which another order changes as much as precision does."""


class Prover:
    """Proves plans of one job.

    Args:
        trials: of this tune.
        first: the first bare run.
        pace: of bare.
        steps: horizon of a proof.
        seed: of the first pair; the others count up from it.
        memory: peak memory that is allowed, as a multiple of bare's.
        say: called with each line of progress.

    Attributes:
        verdict: of the last plan that ``refusal`` was asked about; ``None``: it gave none.
    """

    def __init__(
        self,
        trials: Trials,
        first: Trial,
        *,
        pace: Pace,
        steps: int,
        seed: int,
        memory: float,
        say: Callable[[str], None],
    ) -> None:
        self._trials = trials
        self._first = first
        self._pace = pace
        self._steps = steps
        self._seed = seed
        self._memory = memory
        self._say = say
        self._repeats = [Run.of(first.process)]
        self._bare_gradients: list[Mapping[str, Sequence[Gradient]]] = []
        self._gradients = Check("gradients", "open", "no gradients were recorded")
        self.verdict: Verdict | None = None

    def refusal(self, made: Pairs) -> str | None:
        """Why the plan of these pairs cannot be had, ``None``: it can.

        Its gradients must have been compared by ``gradients_refusal``.
        """
        self.verdict = None
        if made.failure is not None:
            return f"it fails in a fresh process: {made.failure}"
        if made.count < 2:
            return "there was no time for two pairs"
        verdict = self.judge(made)
        try:
            if _is_not_identical(verdict) and len(self._repeats) == 1 and not made.interrupted:
                self._repeat()
                verdict = self.judge(made)
            if verdict.undecided and self.is_reordered(made) and not made.interrupted:
                verdict = self._judge_paired(made) or verdict
        except KeyboardInterrupt:
            made.interrupted = True
        if self._first.process.trains:
            others = (c for c in verdict.checks if c.name != self._gradients.name)
            verdict = dataclasses.replace(verdict, checks=(self._gradients, *others))
        self.verdict = verdict
        if not verdict.passed:
            return verdict.why
        return memory.refusal(made.steps(made.firsts), made.steps(made.seconds), self._memory)

    def judge(self, made: Pairs) -> Verdict:
        """What the pairs say, gradients apart."""
        return self._judge(made.second, made.firsts, made.seconds)

    def passes(self, made: Pairs, part: Mapping[str, str]) -> bool:
        """Whether a part of the settings passes, held against bare runs that there are already."""
        bare = made.firsts[: statistics.MINIMUM_PAIRS]
        try:
            runs = [self._run(part, number) for number in range(len(bare))]
        except TrialFailedError:
            return False
        too_much = memory.refusal(
            [done.process.turns for done in bare],
            [done.process.turns for done in runs],
            self._memory,
        )
        verdict = self._judge(part, bare, runs)
        return (verdict.passed or verdict.undecided) and too_much is None

    def is_reordered(self, made: Pairs) -> bool:
        """Whether other random numbers have given the plan its data in another order."""
        if search.paired(made.second) == dict(made.second):
            return False
        return not all(
            proof.have_same_data(Run.of(one.process), Run.of(other.process))
            for one, other in zip(made.firsts, made.seconds, strict=True)
        )

    def gradients_refusal(
        self, settings: Mapping[str, str], seeds: int = GRADIENT_SEEDS
    ) -> str | None:
        """Why the plan's first gradients are not bare's, ``None``: they are, or cannot be had.

        Args:
            settings: of the plan.
            seeds: for how many.

        Raises:
            UserError: the program fails without any settings.
        """
        if not self._first.process.trains:
            return None
        paired = search.paired(settings)
        while len(self._bare_gradients) < seeds:
            number = len(self._bare_gradients)
            try:
                self._bare_gradients.append(self._first_gradients({}, number))
            except TrialFailedError as failure:
                raise pairs.said("the program fails when it runs again", failure) from failure
        try:
            plan = [self._first_gradients(paired, number) for number in range(seeds)]
        except TrialFailedError as failure:
            return f"it fails in a fresh process: {failure}"
        check = self._gradients = gradients.judge(
            self._bare_gradients[:seeds], plan, proof.exactness(paired)
        )
        self._say(f"first gradients of {in_words(paired)}: {check.why}")
        return check.why if check.result == "failed" else None

    def gradients_pass(self, part: Mapping[str, str]) -> bool:
        """Whether a part of the settings passes ``gradients_refusal``."""
        return self.gradients_refusal(part) is None

    def _judge(
        self, settings: Mapping[str, str], bare: Sequence[Trial], plan: Sequence[Trial]
    ) -> Verdict:
        return proof.judge(
            [Run.of(done.process) for done in bare],
            [Run.of(done.process) for done in plan],
            self._repeats,
            self._exactness(settings),
        )

    def _exactness(self, settings: Mapping[str, str]) -> frozenset[Exactness]:
        """What the settings may change in this program's own arithmetic."""
        found = proof.exactness(settings)
        if found <= {"bitwise"} or not _is_coarse(self._first.process):
            return found
        return found | {"reduced"}

    def _judge_paired(self, made: Pairs) -> Verdict | None:
        """The verdict on the plan with its random numbers in the form made for proofs.

        Where a plan draws other random numbers, its data come in another order, and the losses of a
        pair differ as those of two seeds do: that takes many seeds to decide. In the paired form
        the data are the same. ``None``: there is no such form, or it fails.
        """
        paired = search.paired(made.second)
        if paired == dict(made.second):
            return None
        self._say(
            f"the losses decide nothing yet, as the data come in another order; with the same data "
            f"({in_words(paired)}):"
        )
        try:
            runs = [self._run(paired, number) for number in range(made.count)]
        except TrialFailedError:
            return None
        verdict = self._judge(paired, made.firsts, runs)
        self._say(verdict.why)
        return verdict

    def _repeat(self) -> None:
        """Find out whether bare repeats itself, before a plan is blamed for it."""
        self._say("the plan is not identical; running bare again, to see whether bare itself is")
        for _ in range(REPEATS):
            try:
                self._repeats.append(Run.of(self._run({}, 0).process))
            except TrialFailedError as failure:
                raise pairs.said("the program fails when it runs again", failure) from failure

    def _run(self, settings: Mapping[str, str], number: int) -> Trial:
        """One run of the proof's length.

        Raises:
            TrialFailedError: it fails.
        """
        return pairs.one_run(
            self._trials,
            settings,
            pace=self._pace,
            steps=self._steps,
            seed=self._seed + number,
        )

    def _first_gradients(
        self, settings: Mapping[str, str], number: int
    ) -> Mapping[str, Sequence[Gradient]]:
        """Of one short run.

        Raises:
            TrialFailedError: it fails.
        """
        done = pairs.one_run(
            self._trials,
            settings,
            pace=self._pace,
            steps=GRADIENT_STEPS + 1,
            seed=self._seed + number,
            inspection=Inspection(gradient_steps=GRADIENT_STEPS),
        )
        return done.process.gradients


def in_words(settings: Mapping[str, str]) -> str:
    """Settings as they are said."""
    return ", ".join(f"{name}={setting}" for name, setting in settings.items())


def _is_not_identical(verdict: Verdict) -> bool:
    return any(c.name == "identity" and c.result == "failed" for c in verdict.checks)


def _is_coarse(process: ProcessRecord) -> bool:
    """Whether a good part of a program's own arithmetic is in half precision."""
    by_dtype = (None if process.profile is None else process.profile.flops_by_dtype) or {}
    coarse = sum(by_dtype.get(name, 0) for name in COARSE)
    return bool(coarse > COARSE_SHARE * sum(by_dtype.values()))


COARSE_SHARE = 0.01
"""Of the operations, from which on they count."""
