"""Knobs: one file each, found by looking into this folder.

A knob's file defines ``KNOB``, a ``Knob``. The controller reads it to know what can be tried, the
agent to do it, so no knob imports torch at its top level.
"""

from __future__ import annotations

import functools
import importlib
import pkgutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import TYPE_CHECKING, Literal

from flatout.errors import UserError

if TYPE_CHECKING:
    from flatout.agent.session import Session

Exactness = Literal["bitwise", "reordered", "reduced", "resampled", "reshuffled"]
"""What a setting may change: nothing; the order of the same arithmetic; the precision; the stream
of random numbers; the order of the data. It decides what proof is asked for."""

Undo = Callable[[], None]


@dataclass(frozen=True)
class Facts:
    """What is known about job and machine before anything is tried.

    Attributes:
        device: type of the device that the job computes on (``"cpu"``, ``"cuda"``, ...).
        matmul_flops_per_s: measured matrix product rate of the device for each dtype name; ``None``
            or missing where it was not measured.
        updates: whether optimizer objects step in the job's loop.
    """

    device: str
    matmul_flops_per_s: Mapping[str, float | None] = field(default_factory=dict)
    updates: bool = True


@dataclass(frozen=True)
class Match:
    """Which settings are worth a trial; ``refusal`` says why when there is none."""

    settings: tuple[str, ...]
    refusal: str | None = None


@dataclass(frozen=True)
class Knob:
    """One thing that can be turned.

    Attributes:
        name: as in a plan.
        summary: one sentence: what it does.
        settings: from the gentlest to the boldest.
        exactness: of each setting.
        hot: whether it can be applied and undone between two steps of a living process.
        match: which settings to try, given the facts.
        apply: sets it, in the user's process, at a step boundary or before the first step; returns
            what undoes it at a later step boundary. It leaves alone what it can't do or what the
            program has already chosen, and says so by a ``skipped`` event.
    """

    name: str
    summary: str
    settings: tuple[str, ...]
    exactness: Mapping[str, Exactness]
    hot: bool
    match: Callable[[Facts], Match]
    apply: Callable[[Session, str], Undo]


class UnknownSettingError(UserError):
    """A knob, or a setting of a knob, that does not exist."""


@functools.cache
def registry() -> Mapping[str, Knob]:
    """All knobs by name, in alphabetical order."""
    names = sorted(info.name for info in pkgutil.iter_modules(__path__))
    modules = (importlib.import_module(f"{__name__}.{name}") for name in names)
    return MappingProxyType({module.KNOB.name: module.KNOB for module in modules})


def get(name: str) -> Knob:
    """The knob of this name.

    Raises:
        UnknownSettingError: there is none.
    """
    try:
        return registry()[name]
    except KeyError:
        known = ", ".join(registry())
        raise UnknownSettingError(f"there is no knob {name!r} (known: {known})") from None


def check(name: str, setting: str) -> None:
    """Check that a knob has a setting.

    Raises:
        UnknownSettingError: it has not, or there is no such knob.
    """
    settings = get(name).settings
    if setting not in settings:
        raise UnknownSettingError(
            f"knob {name!r} has no setting {setting!r} (it has: {', '.join(settings)})"
        )
