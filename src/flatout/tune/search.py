"""Finds the settings of a plan that make its proof fail, and the settings that take their place.

The functions are pure. A callback tells whether a subset of a plan's settings passes the proof.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence

from flatout import knobs
from flatout.knob import Exactness

MOST_INVASIVE_FIRST: tuple[Exactness, ...] = (
    "reshuffled",
    "resampled",
    "reduced",
    "reordered",
    "bitwise",
)
"""Exactness classes, from the one that changes most to the one that changes nothing."""


def use_proof_settings(settings: Mapping[str, str]) -> dict[str, str]:
    """Replace each setting that draws other random numbers by its knob's ``proof_setting``.

    Under these replacements, torch's default generator advances as in the bare program, so the same
    data come in the same order. If a knob has no ``proof_setting``, its setting stays.

    Raises:
        UnknownSettingError: there is no such knob.
    """
    found = {}
    for name, setting in settings.items():
        knob = knobs.get(name)
        draws = knob.exactness[setting] in ("resampled", "reshuffled")
        found[name] = knob.proof_setting if draws and knob.proof_setting else setting
    return found


def find_gentler(name: str, setting: str, offered: Collection[str] | None = None) -> str | None:
    """Return the next gentler setting of a knob; ``None`` if there is none.

    ``Knob.settings`` is ordered from the gentlest to the strongest setting.

    Args:
        name: the name of the knob.
        setting: the knob's current setting.
        offered: the settings that make sense for this program (see ``Match``); ``None`` for all.

    Raises:
        UnknownSettingError: there is no such knob, or setting.
    """
    knobs.check(name, setting)
    knob = knobs.get(name)
    for other in reversed(knob.settings[: knob.settings.index(setting)]):
        if other != knob.proof_setting and (offered is None or other in offered):
            return other
    return None


def find_most_invasive(settings: Mapping[str, str]) -> dict[str, str]:
    """Find those settings whose exactness class is the most invasive one among the given settings.

    The order of the classes is ``MOST_INVASIVE_FIRST``.

    Raises:
        UnknownSettingError: there is no such knob.
    """
    kinds = {name: knobs.get(name).exactness[setting] for name, setting in settings.items()}
    most = min(kinds.values(), key=MOST_INVASIVE_FIRST.index)
    return {name: setting for name, setting in settings.items() if kinds[name] == most}


def find_culprits(
    settings: Mapping[str, str], passes: Callable[[Mapping[str, str]], bool]
) -> dict[str, str]:
    """Find a subset of the settings that fails, but passes if any one of its settings is removed.

    This is the delta debugging of Zeller and Hildebrandt (Simplifying and isolating
    failure-inducing input, IEEE Transactions on Software Engineering 28, 2002). It tries halves,
    then smaller subsets and their complements. To find one culprit among n knobs takes about
    ``2 log2(n)`` trials. No subset is tried twice.

    Args:
        settings: the settings that fail together; the bare program is assumed to pass.
        passes: tells whether a subset of the settings passes; called with at least one knob.
    """
    tried: dict[frozenset[str], bool] = {}

    def fails(names: Sequence[str]) -> bool:
        key = frozenset(names)
        if not key:
            return False
        if key not in tried:
            tried[key] = not passes({name: settings[name] for name in settings if name in key})
        return tried[key]

    names = list(settings)
    parts = 2
    while len(names) > 1:
        size = -(-len(names) // parts)
        chunks = [names[start : start + size] for start in range(0, len(names), size)]
        complements = [[name for name in names if name not in chunk] for chunk in chunks]
        smaller = next(filter(fails, chunks), None)
        if smaller is not None:
            names, parts = smaller, 2
            continue
        smaller = next(filter(fails, complements), None) if len(chunks) > 2 else None
        if smaller is not None:
            names, parts = smaller, max(parts - 1, 2)
        elif parts < len(names):
            parts = min(2 * parts, len(names))
        else:
            break
    return {name: settings[name] for name in settings if name in names}
