"""Knobs: one file each, found by looking into this folder.

A knob's file defines ``KNOB``, a ``Knob``. The controller reads it to know what can be tried, the
agent to do it, so no knob imports torch at its top level.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import pkgutil
from collections.abc import Iterable, Mapping
from types import MappingProxyType
from typing import TYPE_CHECKING

from flatout import kernels
from flatout.errors import UserError
from flatout.knob import ConflictError, Knob, UnknownSettingError
from flatout.text import did_you_mean

if TYPE_CHECKING:
    from flatout.intercept.host import Host
    from flatout.intercept.patch import Undo
    from flatout.wire.request import Request


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
        hint = did_you_mean(name, registry()) or f" (known: {', '.join(registry())})"
        raise UnknownSettingError(f"there is no knob {name!r}{hint}") from None


def apply(name: str, host: Host, setting: str) -> Undo:
    """Apply a knob; returns the undo.

    Raises:
        RefusedError: it can do nothing here.
    """
    return get(name).apply(host, setting)


def check(name: str, setting: str) -> None:
    """Check that a knob has a setting.

    Raises:
        UnknownSettingError: it has not, or there is no such knob.
    """
    settings = get(name).settings
    if setting not in settings:
        hint = did_you_mean(setting, settings) or f" (it has: {', '.join(settings)})"
        raise UnknownSettingError(f"knob {name!r} has no setting {setting!r}{hint}")


def parsed(words: Iterable[str]) -> dict[str, str]:
    """Settings by knob, from words as ``--set`` takes them; of two for a knob, the last.

    Raises:
        UserError: a word is not ``KNOB=SETTING``, or there is no such knob or setting.
    """
    settings = {}
    for word in words:
        name, separator, setting = word.partition("=")
        if not separator:
            raise UserError(f"--set takes KNOB=SETTING, not {word!r}")
        check(name, setting)
        settings[name] = setting
    return settings


def is_bitwise(name: str, setting: str) -> bool:
    """Whether a setting changes nothing, and so needs no proof of its own."""
    return get(name).exactness[setting] == "bitwise"


def check_claims(names: Iterable[str]) -> None:
    """Check that no two knobs of a plan claim the same.

    Raises:
        ConflictError: two do.
    """
    claimed: dict[str, str] = {}
    for name in names:
        for claim in get(name).claims:
            other = claimed.setdefault(claim, name)
            if other != name:
                raise ConflictError(
                    f"the knobs {other} and {name} cannot be turned together: both take {claim} "
                    "into their hands"
                )


def prepare(request: Request, environment: Mapping[str, str]) -> dict[str, str]:
    """Do what must be done before a job starts; returns the variables to add to ``environment``.

    A kernel that cannot be built is no error: the agent finds that out again, and records it.

    Raises:
        ConflictError: two knobs that would be turned together claim the same.
    """
    arms = request.comparison.arms if request.comparison is not None else ({},)
    for arm in arms:
        check_claims({**request.settings, **arm})
    turned = {name for plan in (request.settings, *arms) for name in plan}
    needed = {kernel for name in turned for kernel in get(name).kernels}
    if request.guard is not None:
        needed.add("finite")
    for kernel in sorted(needed):
        with contextlib.suppress(kernels.KernelError):
            kernels.build(kernel)
    variables: dict[str, str] = {}
    for name, setting in request.settings.items():
        ask = get(name).variables
        if ask is not None:
            variables.update(ask(setting, {**environment, **variables}))
    return variables
