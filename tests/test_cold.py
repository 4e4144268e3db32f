"""Trials of cold settings on top of others: which are made at all."""

from __future__ import annotations

from typing import Any

import pytest

from flatout.tune import pairs
from flatout.tune.bare import BareRun
from flatout.tune.budget import ProofSize
from flatout.tune.candidates import Candidate
from flatout.tune.cold import ColdTrials
from flatout.tune.ledger import Ledger, Options
from flatout.tune.pairs import Pairs


def test_what_cannot_be_used_with_the_stack_is_not_tried(monkeypatch: pytest.MonkeyPatch) -> None:
    tried: list[dict[str, str]] = []

    def run(trials: object, of: Pairs, **options: object) -> None:
        tried.append(dict(of.variant))
        of.failure = "it was not run"

    monkeypatch.setattr(pairs, "run", run)
    nothing: Any = None
    first = BareRun(
        nothing,
        frozenset(),
        nothing,
        pairs.Pace(1.0, 0.1),
        {},
        3000.0,
        ProofSize(50, 5, 2),
        None,
        True,
    )
    ledger = Ledger(3000.0, lambda: 0.0, lambda line: None, lambda *_: None)
    cold = [Candidate(*one, False, None) for one in (("compile", "default"), ("mkl", "avx512"))]
    ledger.enter(cold)
    stage = ColdTrials(nothing, ledger, first, Options())
    monkeypatch.setattr(stage, "_spare_s", lambda _: 2000.0)
    assert stage.extend({"replay": "operators"}, cold) == {"replay": "operators"}
    assert tried == [{"replay": "operators", "mkl": "avx512"}]
    assert "cannot be used together with replay=operators" in ledger.find(cold[0].settings).why
