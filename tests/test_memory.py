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


def test_a_tenth_more_is_allowed_and_no_more() -> None:
    assert memory.refusal([FLAT], [run(*[435.0] * 40)], 1.1) is None
    why = memory.refusal([FLAT], [run(*[450.0] * 40)], 1.1)
    assert why is not None
    assert why.startswith("its peak memory is 1.12 times bare's (450 MiB against 400 MiB; ")
    assert why.endswith("--memory 1.2 would allow it)")
    assert memory.refusal([FLAT], [run(*[450.0] * 40)], 1.2) is None


def test_a_leak_is_refused_while_it_is_still_small() -> None:
    leaking = run(*(400 + 0.1 * number for number in range(40)))
    assert memory.refusal([FLAT] * 3, [leaking] * 3, 1.1) == (
        "its memory grows by 102 KiB a step more than bare's, and does not stop"
    )


def test_growth_is_added_to_the_memory_that_the_plan_needs_already() -> None:
    growing = [430 + 0.01 * number for number in range(40)]
    assert memory.refusal([FLAT], [run(*[430.0] * 40)], 1.1) is None
    assert memory.refusal([FLAT], [run(*growing)], 1.1) == (
        "its memory grows by 10 KiB a step more than bare's, and does not stop"
    )


def test_a_cache_that_fills_up_is_no_leak() -> None:
    filling = run(*(400 + min(number, 20) for number in range(40)))
    assert memory.refusal([FLAT], [filling], 1.1) is None


def test_a_program_that_grows_by_itself_is_its_own_yardstick() -> None:
    growing = run(*(400 + number for number in range(40)))
    assert memory.refusal([growing], [growing], 1.1) is None


def test_what_was_not_measured_refuses_nothing() -> None:
    assert memory.refusal([FLAT], [run(*[None] * 40)], 1.1) is None
    assert memory.peak_rss_bytes([run(None)]) is None


def test_on_an_accelerator_its_memory_counts() -> None:
    on_device = [replace(step, peak_device_bytes=100 * MIB) for step in FLAT]
    more = [replace(step, peak_device_bytes=120 * MIB) for step in FLAT]
    assert "1.20 times" in str(memory.refusal([on_device], [more], 1.1))


def test_on_an_accelerator_the_growth_of_its_memory_counts() -> None:
    """The host's memory may grow by more than the accelerator's small peak."""
    on_device = [replace(step, peak_device_bytes=10 * MIB) for step in FLAT]
    host_grows = [
        replace(step, peak_rss_bytes=round((400 + 0.01 * number) * MIB))
        for number, step in enumerate(on_device)
    ]
    assert memory.refusal([on_device], [host_grows], 1.1) is None
    device_grows = [
        replace(step, peak_device_bytes=round((10 + 0.01 * number) * MIB))
        for number, step in enumerate(on_device)
    ]
    why = memory.refusal([on_device], [device_grows], 1.1)
    assert why == "its memory grows by 10 KiB a step more than bare's, and does not stop"
