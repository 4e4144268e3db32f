"""The registry of knobs: each module or package in this folder is one knob and defines ``KNOB``.

The controller reads ``KNOB`` to decide what to try, and the agent applies it. The controller has no
torch, so no knob imports torch at its top level.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import pkgutil
from collections.abc import Callable, Collection, Iterable, Mapping
from types import MappingProxyType
from typing import TYPE_CHECKING

from flatout import kernels
from flatout.errors import UserError
from flatout.kernels import extensions
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
    # The name of a module tells the knob that a failure belongs to (``containment.knob_of``).
    modules = (importlib.import_module(f"{__name__}.{name}") for name in names)
    return MappingProxyType({module.KNOB.name: module.KNOB for module in modules})


def get(name: str) -> Knob:
    """The knob with this name.

    Raises:
        UnknownSettingError: there is no such knob.
    """
    try:
        return registry()[name]
    except KeyError:
        hint = did_you_mean(name, registry()) or f" (known: {', '.join(registry())})"
        raise UnknownSettingError(f"there is no knob {name!r}{hint}") from None


def apply(name: str, host: Host, setting: str) -> Undo:
    """Apply a setting of a knob to a process; returns the undo.

    Raises:
        RefusedError: the knob can do nothing in this process.
        UnknownSettingError: there is no such knob.
    """
    return get(name).apply(host, setting)


def check(name: str, setting: str) -> None:
    """Check that a knob has a setting.

    Raises:
        UnknownSettingError: there is no such setting, or no such knob.
    """
    settings = get(name).settings
    if setting not in settings:
        hint = did_you_mean(setting, settings) or f" (it has: {', '.join(settings)})"
        raise UnknownSettingError(f"knob {name!r} has no setting {setting!r}{hint}")


def parse_settings(words: Iterable[str]) -> dict[str, str]:
    """Parse ``KNOB=SETTING`` arguments into settings by knob; the last one for a knob counts.

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
    """Whether a setting leaves all results bit by bit the same, and so needs no proof."""
    return get(name).exactness[setting] == "bitwise"


def check_claims(names: Iterable[str]) -> None:
    """Check that no two knobs of a plan change the same thing.

    Raises:
        ConflictError: two do.
    """
    claimed: dict[str, str] = {}
    for name in names:
        for claim in get(name).claims:
            other = claimed.setdefault(claim, name)
            if other != name:
                raise ConflictError(
                    f"the knobs {other} and {name} cannot be used together: both change {claim}"
                )


def find_conflict(name: str, names: Iterable[str]) -> str | None:
    """Return the first of some knobs that cannot be used together with a knob; ``None`` if each can
    be, or is the same knob."""
    claims = {*get(name).claims}
    return next((one for one in names if one != name and claims & {*get(one).claims}), None)


def build_extensions(
    names: Collection[str], python: str, torch_version: str, on_begin: Callable[[], None]
) -> None:
    """Build the extensions of knobs with the job's interpreter, before the job is timed with them.

    Args:
        names: of the knobs.
        python: the path of the interpreter.
        torch_version: of its torch.
        on_begin: called if something has to be built.
    """
    needed = {extension for name in names for extension in get(name).extensions}
    extensions.build_with(python, torch_version, needed, on_begin)


def prepare(request: Request, environment: Mapping[str, str]) -> dict[str, str]:
    """Build the kernels that a job needs; returns the variables to add to its environment.

    A kernel that cannot be built is no error here: the agent meets the same error and records it.

    Args:
        request: the settings of the job, and those that it compares.
        environment: the environment variables that the job would start with.

    Raises:
        ConflictError: two knobs that would be applied together change the same thing.
    """
    arms = request.comparison.arms if request.comparison is not None else ({},)
    for arm in arms:
        check_claims({**request.settings, **arm})
    used_knobs = {name for plan in (request.settings, *arms) for name in plan}
    if request.replay is not None:
        used_knobs |= {setting.partition("=")[0] for setting in request.replay.settings}
    needed_kernels = {kernel for name in used_knobs for kernel in get(name).kernels}
    if request.guard is not None:
        needed_kernels.add("finite")
    for kernel in sorted(needed_kernels):
        with contextlib.suppress(kernels.KernelError):
            kernels.build(kernel)
    variables: dict[str, str] = {}
    for name, setting in request.settings.items():
        variables_of = get(name).variables
        if variables_of is not None:
            variables.update(variables_of(setting, {**environment, **variables}))
    return variables
