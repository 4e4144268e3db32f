"""Puts experiment trackers offline for trials, so that a trial leaves nothing outside the machine.

Each tracker has its own environment variables for that. Most trackers prefer what the program says
in its code, which is not changed. TensorBoard only writes files. Uploads to the Hugging Face Hub
cannot be told from the downloads that a program may need, so they are not stopped.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from urllib.parse import urlsplit


@dataclass(frozen=True)
class Switch:
    """One environment variable.

    Attributes:
        variable: its name.
        value: the value that it is set to.
        respected: values in lower case that are not replaced, because they forbid as much or more.
        source: where the variable is documented.
    """

    variable: str
    value: str
    respected: frozenset[str]
    source: str


SWITCHES = (
    # Offline, not disabled, because then the tracker does the same work in a step.
    Switch(
        "WANDB_MODE",
        "offline",
        frozenset({"offline", "dryrun", "disabled"}),
        "https://docs.wandb.ai/models/support/run_wandb_offline",
    ),
    # Only comet_ml.start() reads it; an Experiment made in another way would have to be disabled.
    Switch(
        "COMET_START_ONLINE",
        "0",
        frozenset({"0", "false"}),
        "https://huggingface.co/docs/transformers/main_classes/callback (CometCallback)",
    ),
    Switch(
        "COMET_AUTO_LOG_DISABLE",
        "1",
        frozenset({"1", "true"}),
        "https://www.comet.com/docs/v2/guides/experiment-management/configure-sdk/",
    ),
    Switch(
        "CLEARML_OFFLINE_MODE",
        "1",
        frozenset({"1", "true"}),
        "https://clear.ml/docs/latest/docs/clearml_sdk/task_sdk/ (offline mode)",
    ),
    Switch(
        "NEPTUNE_MODE",
        "offline",
        frozenset({"offline", "debug", "disabled", "read-only"}),
        "https://docs.neptune.ai/logging/modes/",
    ),
    Switch(
        "SWANLAB_MODE",
        "offline",
        frozenset({"offline", "local", "disabled"}),
        "https://docs.swanlab.cn/en/api/cli-swanlab-offline.html",
    ),
    Switch(
        "DVC_STUDIO_OFFLINE",
        "true",
        frozenset({"true"}),
        "https://dvc.org/doc/user-guide/project-structure/configuration#studio",
    ),
)

_MLFLOW_STORES = ("MLFLOW_TRACKING_URI", "MLFLOW_REGISTRY_URI")
_MLFLOW_NAMES = ("MLFLOW_RUN_ID", "MLFLOW_EXPERIMENT_ID")
"""Names of things on the server, which a store on this machine does not know."""


def offline(environment: Mapping[str, str]) -> dict[str, str]:
    """A copy of ``environment`` in which every tracker is offline.

    MLflow has no variable for that, but writes to the working folder if it has no address of a
    server (https://mlflow.org/docs/latest/tracking.html), so the address is removed.
    """
    changed = dict(environment)
    for switch in SWITCHES:
        if changed.get(switch.variable, "").lower() not in switch.respected:
            changed[switch.variable] = switch.value
    for variable in _MLFLOW_STORES:
        if not _is_here(changed.get(variable, "")):
            del changed[variable]
            for name in _MLFLOW_NAMES:
                changed.pop(name, None)
    return changed


def _is_here(uri: str) -> bool:
    """Whether MLflow finds this store on the machine: a path, a ``file:`` or ``sqlite:`` address.

    ``databricks``, alone or with a profile, is a server, and any other database may be on one.
    """
    scheme = urlsplit(uri).scheme
    return scheme in ("", "file", "sqlite") and not uri.startswith("databricks")
