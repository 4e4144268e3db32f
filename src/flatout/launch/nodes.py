"""Runs a command as ranks on several hosts, started on each of them, through torch's launcher.

torchrun finds the other hosts and starts the ranks of this one, each as
``flatout run --ranks env`` (``hosts.py``). It would make 1 of any exit status, and answer a signal
with reports on what it ends. So each flatout that it starts ends with 0 and leaves the exit status
in a file; and signals go past torchrun, which is in a session of its own, to these flatouts.

Sources: documentation of torchrun, and ``torch/distributed/elastic/rendezvous`` for what its option
``--rdzv-conf`` and ``TORCH_DISABLE_SHARE_RDZV_TCP_STORE`` do.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path

from flatout.errors import UserError
from flatout.launch import companions, lines

_FOLDER_VARIABLE = "FLATOUT_NODE"
"""The environment variable that names a folder to the flatouts that torchrun has started for
another flatout. There they leave their ids, and the exit status of rank 0."""

_STARTED_PREFIX = "started-"
_STATUS_FILE = "status"
_VARIABLES_FILE = "variables.json"

_FOR_TORCHRUN = {
    # Else its own store is at the port at which rank 0 is to be met.
    "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1",
    # Else it sets this for all ranks, and says so at length.
    "OMP_NUM_THREADS": "1",
    # It warns of hosts without names, and of the end of its store, which comes with that of a host.
    "TORCH_CPP_LOG_LEVEL": "ERROR",
    "LOGLEVEL": "CRITICAL",
}
"""Environment variables of torchrun, which are not for the program."""

_TIMES = "read_timeout=600,join_timeout=600"
"""In seconds: hosts may be allotted one after the other."""

_PASSED_ON = (
    signal.SIGINT,
    signal.SIGTERM,
    signal.SIGHUP,
    signal.SIGQUIT,
    signal.SIGUSR1,
    signal.SIGUSR2,
)

_PR_SET_PDEATHSIG = 1
"""From linux/prctl.h."""


def run(
    command: Sequence[str], python: str, nodes: int, rendezvous: str, ranks: int, restarts: int = 0
) -> int:
    """Run a command on several hosts to its end.

    Args:
        command: of flatout for each rank, after its name.
        python: an interpreter with torch.
        nodes: number of hosts.
        rendezvous: address and port, ``HOST:PORT``, by which the hosts find each other; one of them
            is HOST.
        ranks: number of ranks on each host.
        restarts: how often torchrun may start all ranks again.

    Returns exit status of rank 0; if negative, the signal that killed it.

    Raises:
        UserError: HOST is no address or name, or the hosts cannot reach each other at it, or
            torchrun has failed.
    """
    host, port = parse_rendezvous(rendezvous)
    address = lines.resolve(host)
    if nodes > 1 and lines.is_of_this_host_only(address):
        raise UserError(
            f"--rendezvous: {host} is {address} on this host, at which other hosts cannot reach "
            "it: give its address in their network"
        )
    own = address if lines.is_own(address) else lines.own_address_towards(address, port)
    launcher = [
        *(python, "-m", "torch.distributed.run", "--no-python"),
        *("--nnodes", str(nodes), "--nproc-per-node", str(ranks), "--rdzv-backend", "c10d"),
        *("--rdzv-endpoint", f"{address}:{port}", "--rdzv-id", "flatout", "--local-addr", own),
        *("--max-restarts", str(restarts)),
        *("--rdzv-conf", f"is_host={own == address},{_TIMES}".lower()),
    ]
    with tempfile.TemporaryDirectory(prefix="flatout-") as name:
        folder = Path(name)
        started = subprocess.Popen(
            [*launcher, sys.executable, "-m", "flatout", *command],
            env=_change_environment(ranks, folder),
            start_new_session=True,
            preexec_fn=_end_with_parent,
        )
        with _passing_signals_on(started, folder):
            returncode = started.wait()
        with contextlib.suppress(FileNotFoundError):
            return int((folder / _STATUS_FILE).read_text())
    raise UserError("torchrun has not run the ranks to their end", max(returncode, 1))


def enter() -> Path | None:
    """Return the folder of the flatout that has started torchrun, ``None`` if there is none; let it
    know of this one, and put the environment back as it was there."""
    name = os.environ.pop(_FOLDER_VARIABLE, None)
    if name is None:
        return None
    folder = Path(name)
    for variable, value in json.loads((folder / _VARIABLES_FILE).read_text()).items():
        os.environ.pop(variable, None)
        if value is not None:
            os.environ[variable] = value
    (folder / f"{_STARTED_PREFIX}{os.getpid()}").touch()
    return folder


def leave(folder: Path, returncode: int) -> None:
    """Leave the exit status of rank 0 for the flatout that has started torchrun."""
    new = folder / f"{_STATUS_FILE}-{os.getpid()}"
    new.write_text(str(returncode))
    new.replace(folder / _STATUS_FILE)


def _change_environment(ranks: int, folder: Path) -> dict[str, str]:
    """Return the environment of torchrun, and note what it changes for the ranks to put back."""
    changed = _FOR_TORCHRUN.keys()
    ours = companions.divide_threads(os.environ, ranks)
    (folder / _VARIABLES_FILE).write_text(json.dumps({name: ours.get(name) for name in changed}))
    return {**ours, **_FOR_TORCHRUN, _FOLDER_VARIABLE: str(folder)}


@contextlib.contextmanager
def _passing_signals_on(started: subprocess.Popen[bytes], folder: Path) -> Iterator[None]:
    """A context in which signals go to the flatouts that torchrun has started, or else to it."""

    def pass_on(number: int, _: object) -> None:
        pids = [
            int(path.name.removeprefix(_STARTED_PREFIX))
            for path in folder.glob(f"{_STARTED_PREFIX}*")
        ]
        for pid in pids or [started.pid]:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, number)

    before = {number: signal.signal(number, pass_on) for number in _PASSED_ON}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _end_with_parent() -> None:
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM, 0, 0, 0)


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
