"""A plan that is proven once more: its evidence grows, and is never replaced by weaker."""

from __future__ import annotations

import dataclasses
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from test_memory import STEP

from flatout import plan
from flatout.plan import Check, Evidence, Plan, Reference
from flatout.tune import evidence
from flatout.tune.pairs import Pairs
from flatout.tune.trial import Trial
from flatout.wire.header import Header
from flatout.wire.record import ProcessRecord

NAMES = ("gradients", "losses", "spikes", "state")


def proven(
    steps: int,
    seeds: int,
    names: tuple[str, ...] = NAMES,
    verdict: str = "non-inferior",
    pairs: int | None = None,
) -> Evidence:
    return Evidence(
        settings={"gc": "seldom"},
        ratio=1.0 + steps / 1e4,
        ratio_low=1.0,
        ratio_high=2.0,
        pairs=seeds if pairs is None else pairs,
        bare_step_ms=2.0,
        plan_step_ms=1.0,
        steps=steps,
        seeds=seeds,
        bare_repeats=True,
        verdict=verdict,
        in_process={"gc": 1.1},
        checks=tuple(Check(name, "passed", "") for name in names),
    )


def test_a_shorter_proof_stands_beside_the_longer_one_and_its_pairs_count() -> None:
    made, how = evidence.merge(proven(2000, 5), proven(40, 9), first_seed=3)
    assert (made.steps, made.seeds) == (2000, 5)
    assert how == "the new proof is stored beside the old one, which covers 2,000 steps and 5 seeds"
    (further,) = made.verified
    assert (further.steps, further.seeds, further.first_seed) == (40, 9, 3)
    assert (made.ratio, made.pairs) == (1.004, 9)
    again, _ = evidence.merge(made, proven(60, 9), first_seed=3)
    assert [one.steps for one in again.verified] == [60], "it covers what was added before"
    again, _ = evidence.merge(made, proven(30, 9), first_seed=100)
    assert [one.first_seed for one in again.verified] == [3, 100]


def trial(threads: int, *step_ms: float, work_us: tuple[float, ...] = ()) -> Trial:
    steps = [replace(STEP, step_ms=ms) for ms in step_ms]
    header = Header(threads=threads)
    process = ProcessRecord(Path(), header, steps=steps, fixed_work_us=list(work_us))
    return Trial(process, 1.0, ended=False)


def test_what_a_later_run_is_compared_with_are_medians_of_all_runs() -> None:
    warm_up = (90, 90, 90)
    bare = [trial(2, *warm_up, *[10, 12, 500] * 3), trial(2, *warm_up, *[11, 13, 14] * 3)]
    plan_runs = [
        trial(1, *warm_up, *[5, 6, 7] * 3, work_us=(40.0, 41.0, 90.0)),
        trial(1, *warm_up, *[6, 6, 400] * 3, work_us=(42.0, 43.0)),
        trial(1, *[1] * 12),  # its partner was interrupted
    ]
    made = evidence.make_reference(Pairs({}, {"threads": "one"}, bare, plan_runs))
    assert made == Reference(12.5, 6.0, threads=1, fixed_work_us=40.0)
    alone = evidence.make_reference(Pairs({}, {}, bare, bare))
    assert alone.fixed_work_us is None


def test_a_proof_that_covers_another_takes_its_place() -> None:
    made, how = evidence.merge(proven(200, 5), proven(400, 5), first_seed=0)
    assert (made.steps, made.verified) == (400, ())
    assert how == "the new proof replaces the old one, which covers 200 steps and 5 seeds"
    assert made.in_process == {"gc": 1.1}
    for weaker in (
        proven(400, 5, names=("losses", "spikes", "state")),  # it never looked at gradients
        proven(400, 5, verdict="inconclusive"),
    ):
        made, _ = evidence.merge(proven(200, 5), weaker, first_seed=0)
        assert (made.steps, made.verdict) == (200, "non-inferior")
        assert made.verified[0].steps == 400


def test_pairs_beside_other_work_prove_and_do_not_time() -> None:
    """The new proof counts in full, and the ratio stays that of the quiet pairs."""
    quiet = dataclasses.replace(proven(200, 5), others_share=0.02, quiet_share=1.0)
    busy = dataclasses.replace(
        proven(400, 5, pairs=0), ratio=2.0, others_share=0.6, quiet_share=0.0
    )
    made, _ = evidence.merge(quiet, busy, first_seed=0)
    assert made.steps == 400
    assert (made.ratio, made.pairs) == (1.02, 5)
    assert (made.others_share, made.quiet_share) == (0.02, 1.0)


def test_a_plan_says_how_quiet_it_was(tmp_path: Path) -> None:
    quiet = dataclasses.replace(proven(200, 5), others_share=0.02, quiet_share=0.875)
    Plan({"gc": "seldom"}, evidence=quiet).write(tmp_path / "plan.toml")
    read = plan.read(tmp_path / "plan.toml").evidence
    assert read is not None
    assert (read.others_share, read.quiet_share) == (0.02, 0.875)
    Plan({"gc": "seldom"}, evidence=proven(200, 5)).write(tmp_path / "older.toml")
    older = plan.read(tmp_path / "older.toml").evidence
    assert older is not None
    assert (older.others_share, older.quiet_share) == (None, None)


PROOFS = st.builds(
    proven,
    st.integers(20, 400),
    st.integers(2, 9),
    st.sets(st.sampled_from(NAMES)).map(lambda names: tuple(sorted(names))),
    st.sampled_from(("non-inferior", "inconclusive", "bitwise")),
)


@given(st.lists(st.tuples(PROOFS, st.integers(0, 5)), min_size=1, max_size=6), PROOFS)
def test_nothing_that_was_proven_is_lost(
    later: list[tuple[Evidence, int]], first: Evidence
) -> None:
    made = first
    for new, seed in later:
        before = made
        made, _ = evidence.merge(made, new, seed)
        assert made.pairs == max(before.pairs, new.pairs)
        for steps, seeds, checks in [
            (e.steps, e.seeds, {c.name for c in e.checks}) for e in (before, new)
        ]:
            assert any(
                one.steps >= steps and one.seeds >= seeds and names >= checks
                for one, names in (
                    (made, {c.name for c in made.checks}),
                    *((one, set(one.checks)) for one in made.verified),
                )
            )


def test_what_was_added_is_in_the_plans_file(tmp_path: Path) -> None:
    made, _ = evidence.merge(proven(2000, 5), proven(40, 9), first_seed=3)
    path = tmp_path / "plan.toml"
    Plan({"gc": "seldom"}, evidence=made).write(path)
    assert plan.read(path).evidence == made
    path.write_text(path.read_text().replace("first_seed = 3", 'first_seed = "x"'))
    with pytest.raises(plan.PlanError, match=r"first_seed must be an integer"):
        plan.read(path)
