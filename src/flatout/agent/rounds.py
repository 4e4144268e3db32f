"""Timing groups of calls in rounds, in which all settings take turns."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

from flatout.agent.bench import Bench
from flatout.agent.groups import Group
from flatout.agent.standins import Prepared, size_bytes
from flatout.wire.replay import BARE, Replayed, ReplayedCall, label

VISIT_MS = 0.2
"""A shorter call is made several times in a row."""

FEWEST_ROUNDS, MOST_ROUNDS = 3, 10
"""The number of rounds that are timed. One round before them warms up."""

Times = Mapping[str, tuple[float, ...]]


class _Variant(NamedTuple):
    """Settings under which calls are timed.

    Attributes:
        settings: all of them.
        changing: the label of those that act inside modules.
    """

    settings: dict[str, str]
    changing: str


def time_groups(bench: Bench, groups: Sequence[Group]) -> Replayed:
    """Time groups of calls, the first ones, for which there is time.

    Calls on which no setting acts are not timed again: their exploration has told their time.
    """
    changed = [group for group in groups if len(_find_variants(bench, group)) > 1]
    unchanged = [group for group in groups if len(_find_variants(bench, group)) == 1]
    timed = _choose(bench, changed)
    rounds = int(1e3 * bench.left_s / max(sum(_round_ms(bench, g) for g in timed), 1e-3)) - 1
    rounds = min(max(rounds, FEWEST_ROUNDS), MOST_ROUNDS)
    times: list[Times] = []
    while len(times) < len(timed):
        part = _take_part(bench, timed[len(times) :])
        times += _time_part(bench, part, rounds)
    counting = [dict([setting]) for setting in bench.counting]
    times += [{BARE: (group.ms,)} for group in unchanged]
    return Replayed(
        settings=tuple(
            name
            for name in map(label, [*bench.changing[1:], *counting])
            if name not in bench.failed
        ),
        calls=tuple(
            ReplayedCall(group.keys[BARE].form.name, group.calls, of_group)
            for group, of_group in zip([*timed, *unchanged], times, strict=True)
            if BARE in of_group
        ),
        untimed_ms=sum(group.step_ms for group in changed[len(timed) :]),
        skipped=dict(bench.skipped),
        failed=bench.failed,
        seconds=bench.spent_s,
    )


def _choose(bench: Bench, groups: Sequence[Group]) -> Sequence[Group]:
    """Choose the first groups for which there is time, at least one."""
    round_ms = 0.0
    for count, group in enumerate(groups):
        round_ms += _round_ms(bench, group)
        if count and (FEWEST_ROUNDS + 1) * round_ms > 1e3 * bench.left_s:
            return groups[:count]
    return groups


def _round_ms(bench: Bench, group: Group) -> float:
    """Return about how long a round takes for a group."""
    return len(_find_variants(bench, group)) * max(group.ms, VISIT_MS)


def _find_variants(bench: Bench, group: Group) -> dict[str, _Variant]:
    """Return the settings under which a group is timed, by label."""
    variants: dict[str, _Variant] = {}
    for changing in bench.changing:
        if label(changing) in group.keys:
            for settings in (changing, *({**changing, n: s} for n, s in group.acting)):
                variants[label(settings)] = _Variant(dict(settings), label(changing))
    return variants


def _take_part(bench: Bench, groups: Sequence[Group]) -> Sequence[Group]:
    """Return the first groups, whose tensors fit into memory together."""
    used_bytes = 0.0
    for count, group in enumerate(groups):
        used_bytes += len(group.keys) * size_bytes(group.keys[BARE].form)
        if count and not bench.has_memory_for(used_bytes):
            return groups[:count]
    return groups


def _time_part(bench: Bench, groups: Sequence[Group], rounds: int) -> list[Times]:
    """Time groups whose tensors are kept meanwhile."""
    visits: dict[str, tuple[dict[str, str], list[tuple[int, str]]]] = {}
    for number, group in enumerate(groups):
        for name, variant in _find_variants(bench, group).items():
            visits.setdefault(name, (variant.settings, []))[1].append((number, variant.changing))
    prepared: dict[tuple[int, str], Prepared] = {}
    times: list[dict[str, list[float]]] = [{} for _ in groups]
    for turn in range(rounds + 1):
        for name, (settings, places) in list(visits.items())[:: 1 if turn % 2 else -1]:
            with bench.applied(settings) as inside:
                for number, changing in places:
                    key = groups[number].keys[changing]
                    if (number, changing) not in prepared:
                        prepared[number, changing] = bench.prepare(key)
                    repeats = max(1, round(VISIT_MS / max(groups[number].ms, 1e-3)))
                    taken_ms = bench.visit(key, prepared[number, changing], inside, repeats)
                    if turn:
                        times[number].setdefault(name, []).append(taken_ms)
            failure = bench.find_failure(settings)
            if failure is not None:
                bench.failed[name] = failure
    return [
        {name: tuple(taken_ms) for name, taken_ms in of_group.items() if name not in bench.failed}
        for of_group in times
    ]
