"""Makes the environment of a job: one entry of the module path, the run directory, the plan's
variables."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

from flatout.wire.request import (
    ADDRESS_VARIABLE,
    DISABLE_VARIABLE,
    RANK_VARIABLE,
    RANKS_VARIABLE,
    RUN_VARIABLE,
    SEED_VARIABLE,
)

NOT_ATTACHED = (
    "flatout could not attach: no Python process of this command loaded its agent (python -I, "
    "sudo, a container, or no Python at all?)"
)
"""Why there is no record of a command that has ended."""

HOOK_DIRECTORY = Path(__file__).parent / "hook"


def is_disabled() -> bool:
    """Whether the user has disabled the agent."""
    return os.environ.get(DISABLE_VARIABLE) == "1"


def job_environment(
    run_directory: Path | None, plan_variables: Mapping[str, str]
) -> dict[str, str]:
    """The environment in which the job starts.

    Args:
        run_directory: where the agent records; ``None``: the job runs without the agent.
        plan_variables: the variables that the plan sets.
    """
    environment = {**os.environ, **plan_variables}
    for name in (RANK_VARIABLE, RANKS_VARIABLE, SEED_VARIABLE, ADDRESS_VARIABLE):
        environment.pop(name, None)  # of a run whose program is this flatout
    if run_directory is None or is_disabled():
        return environment
    hook = str(HOOK_DIRECTORY)
    others = [
        entry for entry in environment.get("PYTHONPATH", "").split(os.pathsep) if entry != hook
    ]
    path = os.pathsep.join(others)
    environment["PYTHONPATH"] = f"{hook}{os.pathsep}{path}" if path else hook
    environment[RUN_VARIABLE] = str(run_directory)
    return environment
