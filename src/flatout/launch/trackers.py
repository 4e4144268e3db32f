"""Experiment trackers, put offline for trials: a trial leaves nothing outside the machine.

Each tracker is told by its own environment variables. What a program says in its code counts more
with most of them, and is not changed. TensorBoard only writes files. Uploads to the Hugging Face
Hub cannot be told from the downloads that a program may need, so they are left as they are.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from urllib.parse import urlsplit


@dataclass(frozen=True)
class Switch:
    """One variable.

    Attributes:
        variable: its name.
        value: what it is set to.
        respected: values in lower case that say as much or more, and stay.
        source: where it is documented.
    """

    variable: str
    value: str
    respected: frozenset[str]
    source: str


SWITCHES = (
    # Offline rather than disabled: the work that it does in the step is the same.
    Switch(
        "WANDB_MODE",
        "offline",
        frozenset({"offline", "dryrun", "disabled"}),
        "https://docs.wandb.ai/models/support/run_wandb_offline",
    ),
    # Of comet_ml.start() alone; an Experiment made in another way is only off when it is disabled.
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
"""Of things on the server, which a store on this machine does not know."""


def offline(environment: Mapping[str, str]) -> dict[str, str]:
    """``environment`` with every tracker offline that was not so already.

    MLflow has no such switch: without the address of a server it writes to the working folder
    (https://mlflow.org/docs/latest/tracking.html), so the address is taken out.
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

    ``databricks``, alone or with a profile, is a server; a database may be one.
    """
    scheme = urlsplit(uri).scheme
    return scheme in ("", "file", "sqlite") and not uri.startswith("databricks")
