"""Which knobs of a plan make its proof fail, and what to turn them to instead. Pure functions."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence

from flatout import knobs

PAIRED = "paired"
"""Setting of a knob that draws other random numbers and leaves the generator as without it."""


def paired(settings: Mapping[str, str]) -> dict[str, str]:
    """The settings with those that draw other random numbers in the form made for proofs.

    Under it the default generator goes on as with torch's own numbers, so that the same data come
    in the same order. What has no such form stays as it is.

    Raises:
        UnknownSettingError: there is no such knob.
    """
    found = {}
    for name, setting in settings.items():
        knob = knobs.get(name)
        draws = knob.exactness[setting] in ("resampled", "reshuffled")
        found[name] = PAIRED if draws and PAIRED in knob.settings else setting
    return found


def gentler(name: str, setting: str, offered: Collection[str] | None = None) -> str | None:
    """The next setting towards the gentlest, ``None`` if there is none.

    Args:
        name: of the knob.
        setting: that it has.
        offered: settings that make sense here (see ``Match``); ``None``: all.

    Raises:
        UnknownSettingError: there is no such knob, or setting.
    """
    knobs.check(name, setting)
    settings = knobs.get(name).settings
    for other in reversed(settings[: settings.index(setting)]):
        if other != PAIRED and (offered is None or other in offered):
            return other
    return None


def culprits(
    settings: Mapping[str, str], passes: Callable[[Mapping[str, str]], bool]
) -> dict[str, str]:
    """A smallest part of the settings that fails: without any one of them it passes.

    The delta debugging of Zeller and Hildebrandt (Simplifying and isolating failure-inducing input,
    IEEE Transactions on Software Engineering 28, 2002): halves are tried, then their complements,
    then smaller parts. One culprit among n knobs takes about ``2 log2(n)`` trials. No part is tried
    twice; the whole is taken to fail, and bare to pass.

    Args:
        settings: that fail together.
        passes: whether a part of them passes; called with at least one knob.
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
