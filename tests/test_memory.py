"""What counts as more memory than the bare program's, on made-up peaks."""

from __future__ import annotations

from dataclasses import replace

from flatout.tune import memory
from flatout.wire.record import Step
from flatout.wire.turns import PHASES

MIB = 2**20

STEP = Step(
    index=0,
    at_s=0.0,
    step_ms=1.0,
    phases_ms=dict.fromkeys(PHASES, 0.0),
    losses=(),
    forwards=1,
    backwards=1,
    updates=1,
    minor_faults=None,
    major_faults=None,
    peak_rss_bytes=None,
    peak_device_bytes=None,
    arm=None,
    mark=None,
    grad=True,
)


def run(*mib: float | None) -> list[Step]:
    return [replace(STEP, peak_rss_bytes=None if m is None else round(m * MIB)) for m in mib]


FLAT = run(*[400.0] * 40)
LARGE = run(*[4000.0] * 40)


def test_a_tenth_more_is_allowed_and_no_more() -> None:
    assert memory.refusal([LARGE] * 2, [run(*[4350.0] * 40)] * 2, 1.1) is None
    why = memory.refusal([LARGE] * 2, [run(*[4500.0] * 40)] * 2, 1.1)
    assert why is not None
    assert why.startswith("its peak memory is 1.12 times bare's (4,500 MiB against 4,000 MiB; ")
    assert why.endswith("--memory 1.2 would allow it)")
    assert memory.refusal([LARGE] * 2, [run(*[4500.0] * 40)] * 2, 1.2) is None


def test_what_the_compiler_takes_once_is_allowed_unless_the_user_says_less() -> None:
    with_compiler = run(*[640.0] * 40)
    assert memory.refusal([FLAT] * 2, [with_compiler] * 2, 1.1) is None
    assert memory.refusal([FLAT] * 2, [with_compiler] * 2, 1.05) is not None
    assert memory.refusal([FLAT] * 2, [run(*[670.0] * 40)] * 2, 1.1) is not None


def test_a_peak_above_the_allowance_must_be_seen_in_two_pairs() -> None:
    high = run(*[670.0] * 40)
    assert memory.refusal([FLAT], [high], 1.1) is None
    assert memory.refusal([FLAT] * 2, [FLAT, run(*[900.0] * 40)], 1.1) is None
    assert memory.refusal([FLAT] * 3, [high, FLAT, high], 1.1) is not None


def test_what_was_not_measured_refuses_nothing() -> None:
    assert memory.refusal([FLAT] * 2, [run(*[None] * 40)] * 2, 1.1) is None
    assert memory.peak_rss_bytes([run(None)]) is None


def test_on_an_accelerator_its_memory_counts() -> None:
    on_device = [replace(step, peak_device_bytes=100 * MIB) for step in FLAT]
    more = [replace(step, peak_device_bytes=120 * MIB) for step in FLAT]
    assert "1.20 times" in str(memory.refusal([on_device] * 2, [more] * 2, 1.1))


def test_settings_that_need_more_memory_by_design_are_known() -> None:
    plan = {"precision": "bf16", "allocator": "keep", "loader": "cache", "decode": "parallel"}
    assert memory.find_costly(plan) == {"allocator": "keep", "loader": "cache"}
