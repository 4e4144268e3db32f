"""The prover on made-up runs: which runs it makes, and what it decides from them."""

from __future__ import annotations

import itertools
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from test_memory import STEP
from test_proof import check

from flatout.plan import Check
from flatout.tune.budget import ProofSize
from flatout.tune.ledger import Ledger, Options
from flatout.tune.pairs import Pace, Pairs
from flatout.tune.proof import Verdict
from flatout.tune.prover import ProofAttempt, Prover
from flatout.tune.trial import Trial
from flatout.tune.tuner import Tuner
from flatout.wire.header import Header
from flatout.wire.lines import Output, OutputTensor
from flatout.wire.record import ProcessRecord
from flatout.wire.request import Request


def infer(value: float | None) -> Trial:
    """A run that only infers; its calls return this value, ``None`` if they were not recorded."""
    calls = [replace(STEP, backwards=0, updates=0, grad=False)] * 20
    outputs = []
    if value is not None:
        tensor = OutputTensor((), value, abs(value), None, None, None)
        outputs = [Output("Net", "same", repr(value), (tensor,))] * 3
    return Trial(
        ProcessRecord(Path(), Header(), evaluations=calls, outputs=outputs), 1.0, ended=False
    )


class Repeats:
    """The runner of trials of a bare program whose runs return these values in turn."""

    def __init__(self, *values: float) -> None:
        self.values = itertools.cycle(values)
        self.requests: list[Request] = []

    def run(self, request: Request, limit_s: float) -> Trial:
        self.requests.append(request)
        return infer(next(self.values))


@pytest.mark.parametrize(
    ("plan", "repeats", "result", "runs"),
    [
        (1.0, (1.0,), "passed", 0),
        (1.0001, (1.0,), "failed", 2),
        (1.0001, (1.0, 1.1), "open", 2),
    ],
)
def test_outputs_that_are_not_identical_are_refused_if_bare_repeats_itself(
    plan: float, repeats: tuple[float, ...], result: str, runs: int
) -> None:
    ledger = Ledger(60.0, lambda: 0.0, lambda line: None, lambda *_: None)
    trials: Any = Repeats(*repeats)
    bare: Any = SimpleNamespace(
        process=infer(None).process, pace=Pace(0.0, 0.01), proof=ProofSize(20, 5, 2), job_steps=None
    )
    prover = Prover(trials, ledger, bare, Options())
    finished = Pairs({}, {"gc": "seldom"}, [infer(1.0)] * 2, [infer(plan)] * 2)
    verdict = prover._judge_pairs(finished)
    assert verdict is not None
    assert check(verdict, "identity").result == result
    assert verdict.passed == (result != "failed")
    assert len(trials.requests) == runs
    assert all(request.inspection.outputs for request in trials.requests)


def test_an_undecided_proof_says_how_many_pairs_would_decide_it() -> None:
    figures = {"limit": 0.3, "difference": 0.1, "margin": 0.2}
    losses = Check("losses", "failed", "the loss may exceed bare's by up to 0.3", figures, True)
    verdict = Verdict(False, losses.why, "non-inferior", 30, True, (), (losses,))
    runs = [replace(infer(1.0), seconds=10.0)] * 5
    pairs = Pairs({}, {"precision": "bf16"}, runs, runs)
    attempt = ProofAttempt(pairs, losses.why, verdict, lambda _: True)
    assert attempt.is_undecided
    assert attempt.pairs_to_decide == 15
    ledger = Ledger(300.0, lambda: 250.0, lambda line: None, lambda *_: None)
    tuner: Any = SimpleNamespace(_ledger=ledger, _journal=SimpleNamespace(counted_s=250.0))
    why = Tuner._note_undecided(tuner, attempt)
    assert why.startswith("not decided by 5 pairs: the loss may exceed bare's")
    assert "--budget 10m" in why  # 250 s so far, and 15 pairs of 20 s
    assert ledger.outcome.why.startswith(
        "precision=bf16 is neither proven nor refuted: not decided"
    )
    failed = replace(losses, undecided=False)
    refuted = replace(attempt, verdict=replace(verdict, checks=(failed,)))
    assert not refuted.is_undecided
