"""Whether a job had its CPUs for itself: decisions on made-up readings."""

from __future__ import annotations

import dataclasses

import pytest

from flatout.wire.disturbance import History, Stretch, drop_disturbed, is_little, mean_taken
from flatout.wire.lines import CpuUsage
from flatout.wire.ratios import Block
from flatout.wire.record import UsageBeside

CPUS = 4


def readings(
    own: float,
    waited: float | None = 0.0,
    others: float | None = 0.0,
    seconds: float = 4.0,
    start_s: float = 0.0,
    **more: float,
) -> list[CpuUsage]:
    """Readings every quarter of a second, of a job and others at constant rates.

    Args:
        own: the CPUs that the job uses.
        waited: how long its threads wait, per second; ``None``: not measured.
        others: the CPUs that others use; ``None``: not measured.
        seconds: the time that the readings cover.
        start_s: the time of the first reading.
        more: further totals, per second.
    """
    found = []
    for number in range(round(4 * seconds) + 1):
        at_s = number / 4
        found.append(
            CpuUsage(
                start_s + at_s,
                CPUS,
                own_s=100 + own * at_s,
                waited_s=None if waited is None else 7 + waited * at_s,
                idle_s=None if others is None else 1000 + (CPUS - own - others) * at_s,
                **{key: 3 + rate * at_s for key, rate in more.items()},
            )
        )
    return found


def middle(usage: list[CpuUsage], *beside: UsageBeside) -> Stretch:
    """What happened in a tenth of a second."""
    return History(usage, beside).between(2.0, 2.1)


def test_a_quiet_machine() -> None:
    found = middle(readings(own=2.0, waited=0.001))
    assert found.taken == pytest.approx(0, abs=1e-9)
    assert found.is_quiet
    assert not found.is_disturbed


def test_others_for_whom_the_job_waits() -> None:
    found = middle(readings(own=3.0, waited=0.8, others=1.0))
    assert found.taken == pytest.approx(0.25)
    assert found.lost == pytest.approx(0.8)
    assert found.is_disturbed
    assert not found.is_quiet


def test_others_on_cpus_that_the_job_leaves_idle_do_not_disturb() -> None:
    """Such as a job of idle priority; but beside it, fewer threads prove little."""
    found = middle(readings(own=1.0, waited=0.01, others=2.0))
    assert not found.is_disturbed
    assert not found.is_quiet


def test_a_job_with_too_many_threads_waits_for_itself() -> None:
    found = middle(readings(own=4.0, waited=12.0, others=0.0))
    assert not found.is_disturbed
    beside_little = middle(readings(own=3.97, waited=12.0, others=0.03))
    assert beside_little.lost == pytest.approx(0.01)
    assert not beside_little.is_disturbed


def test_what_a_kernel_always_takes_adds_up_on_many_cpus_and_disturbs_nothing() -> None:
    many = [
        CpuUsage(at_s, 64, 63.7 * at_s, 0.3 * at_s, idle_s=0.0) for at_s in (0.0, 1.0, 2.0, 3.0)
    ]
    assert not History(many).between(1.0, 2.0).is_disturbed
    competitor = [
        CpuUsage(at_s, 64, 63.2 * at_s, 0.8 * at_s, idle_s=0.0) for at_s in (0.0, 1.0, 2.0, 3.0)
    ]
    assert History(competitor).between(1.0, 2.0).is_disturbed


def test_time_that_the_host_takes_is_lost() -> None:
    """A guest's own clocks of waiting stand still meanwhile."""
    found = middle(readings(own=2.0, waited=0.0, others=0.4, stolen_s=0.4))
    assert found.lost == pytest.approx(0.38)


def test_a_cpu_that_is_slower_than_before_disturbs() -> None:
    """A lower clock, a hyper-thread beside it: a fixed piece of work shows it."""
    usage = [
        dataclasses.replace(one, work_us=195.0 if 2.0 <= one.at_s < 2.5 else 70 + number % 3)
        for number, one in enumerate(readings(own=2.0))
    ]
    history = History(usage)
    slow = history.between(2.05, 2.15)
    assert slow.slowness == pytest.approx(195 / 70, rel=0.02)
    assert slow.is_disturbed
    assert not history.between(1.55, 1.65).is_disturbed
    assert not history.between(2.55, 2.65).is_disturbed


def test_a_quota_is_not_others() -> None:
    found = middle(readings(own=1.0, waited=1.5, others=2.0, throttled_s=1.5))
    assert found.lost == pytest.approx(0)


def test_without_the_threads_of_the_job_the_pressure_tells() -> None:
    found = middle(readings(own=3.0, waited=None, others=1.0, pressure_s=0.2))
    assert found.lost == pytest.approx(0.2)
    neither = middle(readings(own=3.0, waited=None, others=1.0))
    assert neither.lost == pytest.approx(0.98)


@pytest.mark.parametrize(
    "usage",
    [
        readings(own=1.0, others=None),  # macOS, a sandbox
        readings(own=1.0)[:1],
        [],
    ],
)
def test_what_is_not_measured_is_neither_quiet_nor_disturbed(usage: list[CpuUsage]) -> None:
    found = middle(usage)
    assert found == Stretch(None, None)
    assert not found.is_disturbed
    assert not found.is_quiet
    assert not is_little(None)


def test_a_process_that_runs_while_this_one_waits_is_no_other() -> None:
    """The partner of a relay, or the companions of a run on several ranks."""
    usage = readings(own=0.5, others=2.0)
    alone, together = middle(usage), middle(usage, UsageBeside(-3.0, readings(2.0, seconds=9.0)))
    assert alone.taken == pytest.approx(0.5)
    assert together.taken == pytest.approx(0, abs=1e-9)


def test_a_short_stretch_sees_others_over_half_a_second() -> None:
    """The time of idleness comes in steps of 10 ms a CPU: in 20 ms it tells nothing."""
    usage = readings(own=2.0, waited=0.5, others=1.0)
    stepped = [
        CpuUsage(one.at_s, CPUS, one.own_s, one.waited_s, idle_s=round(one.idle_s or 0, 2))
        for one in usage
    ]
    found = History(stepped).between(2.01, 2.03)
    assert found.taken == pytest.approx(0.25, abs=0.03)
    assert found.lost == pytest.approx(0.5)


def test_time_outside_of_the_readings_is_not_known() -> None:
    history = History(readings(own=1.0))
    assert history.between(4.5, 5.0) == Stretch(None, None)
    assert history.between(3.9, 5.0).taken is not None


def test_a_burst_disturbs_the_blocks_that_it_meets() -> None:
    quiet = readings(own=2.0, seconds=2.0)
    last = quiet[-1]
    burst = [
        CpuUsage(
            last.at_s + one.at_s,
            CPUS,
            last.own_s + one.own_s - 100,
            (last.waited_s or 0) + (one.waited_s or 0) - 7,
            idle_s=(last.idle_s or 0) + (one.idle_s or 0) - 1000,
        )
        for one in readings(own=2.0, waited=0.9, others=2.0, seconds=2.0)[1:]
    ]
    history = History([*quiet, *burst])
    blocks = [Block(0, [1.0], start_s=at / 2, end_s=at / 2 + 0.5) for at in range(8)]
    unknown = Block(0, [1.0])
    assert drop_disturbed([*blocks, unknown], history) == [*blocks[:4], unknown]
    assert mean_taken(blocks, history) == pytest.approx(0.25, abs=0.01)
    assert mean_taken([unknown], history) is None
