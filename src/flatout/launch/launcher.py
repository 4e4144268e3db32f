"""Reads what a launcher of processes (torchrun, srun, a Kubernetes PyTorchJob) has told this one.

Sources: documentation of torchrun, "Environment Variables"; srun(1), "OUTPUT ENVIRONMENT
VARIABLES"; documentation of Kubeflow's PyTorchJob.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from flatout import machine
from flatout.errors import UserError

AGENT_STORE_VARIABLE = "TORCHELASTIC_USE_AGENT_STORE"
"""``True`` if torchrun itself serves its store at ``MASTER_ADDR`` and ``MASTER_PORT``."""

_SLURM_PORTS = range(20000, 30000)
"""Below those that Linux gives to outgoing connections."""

_TOLD_TO_RANKS = re.compile(
    r"(LOCAL_|GROUP_|ROLE_)?(RANK|WORLD_SIZE)|ROLE_NAME|MASTER_(ADDR|PORT)"
    r"|TORCH_DISABLE_SHARE_RDZV_TCP_STORE"
    r"|(TORCHELASTIC|PET|PMI|PMI2|PMIX|OMPI_COMM_WORLD|MV2_COMM_WORLD)_\w+"
    r"|SLURM_(PROCID|LOCALID|NODEID|GTIDS|NTASKS|NPROCS|NNODES|JOB_NUM_NODES|NTASKS_PER_NODE"
    r"|TASKS_PER_NODE|STEP_NUM_TASKS|STEP_NUM_NODES|STEP_TASKS_PER_NODE)"
)
"""What programs and frameworks take as a sign that they are one of several processes."""


@dataclass(frozen=True)
class Launched:
    """The place of this process among those that were launched together.

    Attributes:
        rank: from 0.
        size: number of ranks.
        address: name or address of the host of rank 0.
        port: the one at which rank 0 can be met there.
        has_agent_store: whether torchrun's store is at this port.
        run: the same for all ranks of one run, and probably another in any other run.
        restarts: how often torchrun has started the ranks again.
    """

    rank: int
    size: int
    address: str
    port: int
    has_agent_store: bool
    run: str
    restarts: int = 0


def read(variables: Mapping[str, str]) -> Launched:
    """Return the place of this process.

    Args:
        variables: its environment.

    Raises:
        UserError: no launcher has told it its place, or only a part of it.
    """
    if "RANK" in variables:
        rank, size = _number(variables, "RANK"), _number(variables, "WORLD_SIZE")
    elif "SLURM_PROCID" in variables:
        is_step = "SLURM_STEP_NUM_TASKS" in variables
        rank = _number(variables, "SLURM_PROCID")
        size = _number(variables, "SLURM_STEP_NUM_TASKS" if is_step else "SLURM_NTASKS")
        variables = {**_address_of_slurm(variables), **variables}
    else:
        raise UserError(
            "--ranks env needs a launcher that sets RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT, "
            "such as torchrun or a PyTorchJob, or srun; neither RANK nor SLURM_PROCID is set"
        )
    if rank >= size:
        raise UserError(f"--ranks env: rank {rank} is not one of {size} ranks, which start at 0")
    names = ("TORCHELASTIC_RUN_ID", "SLURM_JOB_ID", "SLURM_STEP_ID")
    has_agent_store = variables.get(AGENT_STORE_VARIABLE) == "True"
    is_single = size == 1 and not variables.get("MASTER_ADDR")
    return Launched(
        rank,
        size,
        "" if is_single else _text(variables, "MASTER_ADDR"),
        0 if is_single else _port(variables),
        has_agent_store,
        " ".join(f"{name}={variables[name]}" for name in names if name in variables),
        int(variables.get("TORCHELASTIC_RESTART_COUNT", "0")),
    )


def without_ranks(variables: Mapping[str, str]) -> dict[str, str]:
    """Return an environment without what tells a program that it is one of several processes."""
    return {name: v for name, v in variables.items() if not _TOLD_TO_RANKS.fullmatch(name)}


def forget() -> None:
    """Take this out of the environment of this process."""
    for name in os.environ.keys() - without_ranks(os.environ).keys():
        del os.environ[name]


def interpreter(command: Sequence[str]) -> str:
    """Return the Python interpreter of a command, or the one that it most likely uses."""
    is_python = os.path.basename(command[0]).startswith("python")
    return command[0] if is_python else machine.default_python()


def first_host(nodes: str) -> str:
    """Return the first name of a list of hosts of Slurm's, such as ``gpu[03-05,9],login``."""
    first = re.match(r"(?:[^,\[]|\[[^\]]*\])*", nodes)
    assert first is not None
    return re.sub(r"\[([^\],-]*)[^\]]*\]", r"\1", first.group())


def _address_of_slurm(variables: Mapping[str, str]) -> dict[str, str]:
    """Where rank 0 is by what srun says, which names no port: one that follows from the job."""
    names = ("SLURM_STEP_NODELIST", "SLURM_NODELIST", "SLURM_JOB_NODELIST")
    nodes = next((variables[name] for name in names if variables.get(name)), "")
    job, step = (variables.get(name, "0") for name in ("SLURM_JOB_ID", "SLURM_STEP_ID"))
    number = sum(int(text) for text in (job, step) if text.isdecimal())
    port = _SLURM_PORTS[number % len(_SLURM_PORTS)]
    return {"MASTER_ADDR": first_host(nodes), "MASTER_PORT": str(port)}


def _text(variables: Mapping[str, str], name: str) -> str:
    value = variables.get(name, "")
    if not value:
        raise UserError(f"--ranks env: the launcher has set no {name}, which all ranks must know")
    return value


def _number(variables: Mapping[str, str], name: str) -> int:
    value = _text(variables, name)
    if not value.isdecimal():
        raise UserError(f"--ranks env: {name} is {value!r}, which is not a number")
    return int(value)


def _port(variables: Mapping[str, str]) -> int:
    port = _number(variables, "MASTER_PORT")
    if not 0 < port < 2**16:
        raise UserError(f"--ranks env: MASTER_PORT is {port}, which is not a port")
    return port
