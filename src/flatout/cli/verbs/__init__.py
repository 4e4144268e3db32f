"""The verbs of the command line: one module for each, found by looking into this folder.

A verb's module imports what is heavy inside its functions, so that ``flatout --help`` answers at
once.
"""

from __future__ import annotations

import argparse
import functools
import importlib
import pkgutil
from collections.abc import Mapping
from types import MappingProxyType
from typing import Protocol, cast


class Verb(Protocol):
    """What the module of a verb holds.

    Attributes:
        SUMMARY: what it does, in one line.
        EXAMPLES: commands that its help shows, complete and ready to be typed.
        TAKES_JOB: whether it runs a command, which stands at its end.
        ARGUMENT: its own argument as the usage line shows it; empty where it has none.
    """

    @property
    def SUMMARY(self) -> str: ...  # noqa: N802
    @property
    def EXAMPLES(self) -> tuple[str, ...]: ...  # noqa: N802
    @property
    def TAKES_JOB(self) -> bool: ...  # noqa: N802
    @property
    def ARGUMENT(self) -> str: ...  # noqa: N802

    def add_arguments(self, parser: argparse.ArgumentParser) -> None:
        """Add its options and its own argument."""

    def execute(self, arguments: argparse.Namespace) -> int:
        """Run it; returns the exit status. The command is in ``arguments.command``."""
        ...


@functools.cache
def verbs() -> Mapping[str, Verb]:
    """The verbs by name."""
    names = sorted(module.name for module in pkgutil.iter_modules(__path__))
    return MappingProxyType(
        {name: cast(Verb, importlib.import_module(f"{__name__}.{name}")) for name in names}
    )
