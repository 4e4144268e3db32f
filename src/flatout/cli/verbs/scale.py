"""``flatout scale``: predicts the time of a step with more ranks, over a network."""

from __future__ import annotations

import argparse
import json
import shutil
import sys
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING

from flatout.cli import options
from flatout.cli.streams import say

if TYPE_CHECKING:
    from flatout.scaling.networks import Network, Software

SUMMARY = "predict how a program scales to more ranks, from records of runs with few"
EXAMPLES = (
    "flatout scale --network 100GbE runs/TWO-RANKS runs/ALONE",
    "flatout scale --network 25us,1.2GB/s --json scale.json runs/TWO-RANKS",
    "flatout scale --network here runs/TWO-RANKS runs/ALONE",
)
TAKES_JOB = False
ARGUMENT = "RUN ..."

_RANKS = tuple(2**exponent for exponent in range(1, 13))


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of ``flatout scale``."""
    parser.add_argument(
        "runs",
        nargs="+",
        type=Path,
        metavar="RUN",
        help="the folder of a record that 'flatout doctor --ranks 2' or 'flatout run' has made: "
        "one with several ranks, and better a second one, with another number of ranks, another "
        "batch size or without ranks, which tells what a call takes however small its share of the "
        "batch is; each rank must have had the same number of threads (OMP_NUM_THREADS is shared "
        "out)",
    )
    parser.add_argument(
        "--network",
        required=True,
        metavar="NET",
        help="the network between the ranks, each of which has processors of its own: 10GbE, "
        "25GbE, 100GbE, HDR, NDR (InfiniBand) or NVLink; a latency and a rate such as "
        "25us,1.2GB/s; or here, which measures this host, whose processors all ranks share",
    )
    parser.add_argument(
        "--algorithm",
        choices=("ring", "best"),
        default="ring",
        metavar="NAME",
        help="how tensors are gathered and added up: ring, as --ranks does over a network, or "
        "best, the fastest that other libraries have (default: ring)",
    )
    options.add_python(parser, "that of the first run with several ranks")
    options.add_json(parser)


def execute(arguments: argparse.Namespace) -> int:
    """Predict, and print the predictions."""
    from flatout import paths
    from flatout.errors import UserError
    from flatout.report import scaling
    from flatout.scaling import measured, model, networks

    if arguments.json is not None:
        paths.check_writable(arguments.json)
    named = networks.parse(arguments.network)
    runs = [measured.read(directory) for directory in arguments.runs]
    base = model.choose_base(runs)
    model.shard_sizes(runs, base)  # refuses runs that do not fit together, before this takes time
    network, software = _measure(named, arguments.python or base.header.executable)
    forecast = model.forecast(runs, network, software, _RANKS, arguments.algorithm)
    if arguments.json is not None:
        document = asdict(forecast) | {"runs": [str(run.directory) for run in runs]}
        try:
            arguments.json.write_text(json.dumps(document, indent=1) + "\n")
        except OSError as error:
            raise UserError(f"{arguments.json} cannot be written: {error.strerror}") from None
    scaling.print_forecast(forecast, sys.stdout)
    return 0


def _measure(named: Network | None, python: str) -> tuple[Network, Software | None]:
    """Measure what an exchange takes on this host.

    The latency between two processes of this host is the work of its cores, which is to be done on
    any other network as well.

    Args:
        named: the network that is asked for; ``None``: this host's.
        python: the interpreter of the runs, which may be another host's.

    Returns:
        The network, and what its exchanges take beside it; ``None``: not measured.

    Raises:
        UserError: the network of this host is asked for, and cannot be measured.
    """
    from flatout import machine
    from flatout.errors import UserError
    from flatout.scaling import here

    say("measuring what an exchange between two ranks takes on this host")
    try:
        python = shutil.which(python) or machine.default_python()
        found, software = here.measure(python, over_gloo=named is not None)
    except UserError as error:
        if named is None:
            raise
        say(str(error))
        return named, None
    if named is None:
        return found, software
    return named, replace(software, call_s=software.call_s + found.latency_s)
