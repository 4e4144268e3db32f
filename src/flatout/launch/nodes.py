"""Runs a command as ranks on several hosts, started on each of them, through torch's launcher.

torchrun finds the other hosts and starts the ranks of this one, each as ``flatout run --ranks env``
(``hosts.py``). It would make 1 of any exit status, and report on the processes that it has ended;
so each flatout that it starts ends with 0, and leaves the exit status in a file.

Sources: documentation of torchrun, and ``torch/distributed/elastic/rendezvous`` for what its option
``--rdzv-conf`` and ``TORCH_DISABLE_SHARE_RDZV_TCP_STORE`` do.
"""

from __future__ import annotations

import contextlib
import os
import re
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from flatout import machine
from flatout.errors import UserError
from flatout.launch import companions, lines, process
from flatout.machine import cores

STATUS_VARIABLE = "FLATOUT_STATUS"
"""The environment variable that names the file for the exit status to a flatout that torchrun has
started for another flatout."""


def run(command: Sequence[str], nodes: int, rendezvous: str, ranks: int) -> int:
    """Run a command on several hosts to its end.

    Args:
        command: of flatout for each rank, after its name.
        nodes: number of hosts.
        rendezvous: address and port, ``HOST:PORT``, by which the hosts find each other; one of them
            is HOST.
        ranks: number of ranks on each host.

    Returns exit status of rank 0; if negative, the signal that killed it.

    Raises:
        UserError: HOST is no address or name, or cannot be reached.
    """
    host, port = parse_rendezvous(rendezvous)
    address = lines.resolve(host)
    own = address if lines.is_own(address) else lines.own_address_towards(address, port)
    launcher = [
        *(machine.default_python(), "-m", "torch.distributed.run", "--no-python"),
        *("--nnodes", str(nodes), "--nproc-per-node", str(ranks), "--rdzv-backend", "c10d"),
        *("--rdzv-endpoint", f"{address}:{port}", "--rdzv-id", "flatout", "--local-addr", own),
        *("--rdzv-conf", f"is_host={own == address}".lower()),
    ]
    with tempfile.TemporaryDirectory(prefix="flatout-") as folder:
        status_file = Path(folder, "status")
        exited = process.run(
            [*launcher, sys.executable, "-m", "flatout", *command],
            _variables(ranks, status_file),
        )
        with contextlib.suppress(FileNotFoundError):
            return int(status_file.read_text())
    return exited.returncode


def leave_status(returncode: int) -> bool:
    """Leave an exit status for the flatout that has started torchrun, and return whether there is
    one."""
    path = os.environ.get(STATUS_VARIABLE)
    if path is None:
        return False
    new = Path(f"{path}-{os.getpid()}")
    new.write_text(str(returncode))
    new.replace(path)
    return True


def parse_rendezvous(text: str) -> tuple[str, int]:
    """Split ``HOST:PORT``; an IPv6 address stands in brackets.

    Raises:
        UserError: it has another form.
    """
    found = re.fullmatch(r"(?:\[([^\]]+)\]|([^:\[\]]+)):(\d+)", text)
    if found is None or not 0 < int(found[3]) < 2**16:
        raise UserError(
            f"--rendezvous {text!r} is not HOST:PORT, such as node0:29500, 10.0.0.1:29500 or "
            "[fd00::1]:29500"
        )
    return found[1] or found[2], int(found[3])


def _variables(ranks: int, status_file: Path) -> dict[str, str]:
    """The environment of torchrun. Several ranks of a host share out its threads; torchrun would
    give one to each."""
    variables = companions.divide_threads(os.environ, ranks)
    if ranks > 1 and not variables.get("OMP_NUM_THREADS"):
        share = max(1, len(cores.allowed_processors()) // ranks)
        variables["OMP_NUM_THREADS"] = str(share)
    return {
        **variables,
        STATUS_VARIABLE: str(status_file),
        # Else torchrun's own store is at the port at which rank 0 is to be met.
        "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1",
    }
