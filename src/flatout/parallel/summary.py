"""What the ranks have shared out: for the user, and for the record."""

from __future__ import annotations

from typing import TYPE_CHECKING

from flatout.wire.lines import Lap, SharedWork, WholeCalls

if TYPE_CHECKING:
    from flatout.parallel.sharing import Sharing
    from flatout.parallel.team import Team


def count_calls(sharing: Sharing) -> list[str]:
    """Return clauses on how many calls were shared out, and how many were not, and why."""
    parts = [f"{count} calls of {name} were shared out" for name, count in sharing.shared.items()]
    whole = sharing.whole.items()
    return parts + [f"{count} calls of {name} were not: {why}" for (name, why), count in whole]


def describe(sharing: Sharing, is_forked: bool) -> str:
    """Return in one sentence what was shared out until the end of the program.

    Args:
        sharing: of this process.
        is_forked: whether it is the child of a fork, which shares out nothing.
    """
    parts = count_calls(sharing)
    if not sharing.has_shared:
        parts.insert(0, "nothing was shared out, each rank has computed everything")
        if is_forked:
            parts.append("the child of a fork computes by itself")
        elif len(parts) == 1:
            parts.append("the program has called no module")
    return "; ".join(parts)


def work_of(sharing: Sharing, team: Team, started_ns: int) -> SharedWork:
    """Return what was shared out and what the time was spent on.

    Args:
        sharing: of this process.
        team: the ranks.
        started_ns: when the record begins, by the clock of the balance.
    """
    seconds = team.balance.seconds if team.balance.is_measured else {}
    return SharedWork(
        team.size,
        dict(sharing.shared),
        tuple(WholeCalls(name, why, count) for (name, why), count in sharing.whole.items()),
        {phase.value: of_phase for phase, of_phase in seconds.items()},
        tuple(_rounded(lap, started_ns / 1e9) for lap in team.balance.laps),
    )


def _rounded(lap: Lap, started_s: float) -> Lap:
    """Return a lap as it is recorded: times in tenths of microseconds, from the header on."""
    moved = lap._replace(end_s=lap.end_s - started_s)
    return Lap._make(round(value, 7) for value in moved)
