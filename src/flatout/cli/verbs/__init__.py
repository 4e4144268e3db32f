"""The verbs of the command line: one module for each, found by looking into this folder.

A verb's module has ``SUMMARY`` (one line), ``add_arguments(parser)``, ``execute(arguments) -> int``
and ``TAKES_JOB``: whether a command stands after ``--``. Only the module of the verb that is run
imports anything heavy, inside its functions: ``flatout --help`` answers at once.
"""

from __future__ import annotations

import functools
import importlib
import pkgutil
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any


@functools.cache
def verbs() -> Mapping[str, Any]:
    """The verbs' modules by name."""
    names = sorted(module.name for module in pkgutil.iter_modules(__path__))
    return MappingProxyType({n: importlib.import_module(f"{__name__}.{n}") for n in names})
