"""Measures what an exchange between two ranks takes on this host, by a run of a small program."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt

from flatout import launch
from flatout.doctor import ranks as laps_of_ranks
from flatout.errors import UserError
from flatout.launch import companions
from flatout.machine import cores
from flatout.scaling.networks import HERE, Network, Software
from flatout.wire.lines import Lap
from flatout.wire.request import Request

_SIZES = ((4, 4), (1 << 20, 4), (4, 2 << 20), (1 << 18, 1 << 19))
"""Columns of the output and elements of the parameter, with two rows of float32: next to nothing;
8 MiB to be gathered; 8 MiB to be added up; a quarter of both."""

_WARMUP_LAPS = 10
"""First laps of each size that do not count: the rule of the call is tested in the first and the
eighth."""

_TIMEOUT_S = 120.0

_LEAST_LATENCY_S = 1e-6
_LEAST_SECONDS_PER_BYTE = 1e-11
"""What no two processes fall below: a transfer between caches, and 100 GB/s."""


def measure(python: str, *, over_gloo: bool = False) -> tuple[Network, Software]:
    """Measure this host with two ranks. It takes some ten seconds.

    Args:
        python: an interpreter with torch.
        over_gloo: whether the ranks exchange as those of several hosts do, not by shared memory.

    Raises:
        UserError: ranks cannot be run here, or the program has failed.
    """
    program = Path(__file__).with_name("exchanging.py")
    sizes = ("x".join(map(str, of_exchange)) for of_exchange in _SIZES)
    command = [python, str(program), *(["gloo"] if over_gloo else []), *sizes]
    request = Request(ranks=companions.make_ranks(2))
    finished = launch.start(
        command, request, isolate=True, output="capture", timeout_seconds=_TIMEOUT_S
    )
    lines = (finished.output or "").splitlines()
    if finished.returncode != 0 or not lines:
        reason = finished.rank_failure or next(iter(lines[-1:]), "it has printed nothing")
        raise UserError(f"exchanges between two ranks cannot be measured here: {reason}")
    run = finished.read_record()
    processes = laps_of_ranks.processes_of_ranks(run)
    laps = laps_of_ranks.laps_of(processes[0])
    return fit(split(laps), float(lines[-1]), len(cores.allowed_processors()))


def split(laps: Sequence[Lap]) -> list[list[Lap]]:
    """Sort laps by what was exchanged; those that warm up are left out."""
    found: dict[tuple[int, int], list[Lap]] = {}
    for lap in laps:
        found.setdefault((lap.gathered_bytes, lap.summed_bytes), []).append(lap)
    return [of_size[_WARMUP_LAPS:] for of_size in found.values() if len(of_size) > _WARMUP_LAPS]


def fit(
    sizes: Sequence[Sequence[Lap]], header_s: float, processors: int
) -> tuple[Network, Software]:
    """Return network and software that explain the times of exchanges between two ranks.

    With two ranks, a gather is one message and a sum two, half of the bytes in each. What an
    exchange takes beside its messages follows from the difference. Each equation is divided by the
    time that it explains, so that short exchanges count as much as long ones.

    Args:
        sizes: laps with exchanges of one size each.
        header_s: to read the header of one rank.
        processors: of this host.
    """
    rows, errors = [], []
    for laps in sizes:
        first = laps[0]
        times_s = [lap.communication_s for lap in laps]
        time_s = statistics.fmean(times_s)
        messages = first.gathers + 2 * first.sums
        sent = first.gathered_bytes / 2 + first.summed_bytes
        rows.append([(first.gathers + first.sums) / time_s, messages / time_s, sent / time_s])
        quartiles = statistics.quantiles(times_s, n=4)
        errors.append((quartiles[2] - quartiles[0]) / 1.35 / time_s / len(laps) ** 0.5)
    call_s, latency_s, byte_s = _solve(np.array(rows))
    error = max(0.1, statistics.fmean(errors))
    network = Network(
        HERE,
        max(latency_s, _LEAST_LATENCY_S),
        max(byte_s, _LEAST_SECONDS_PER_BYTE),
        error,
        processors,
    )
    return network, Software(max(0.0, call_s), header_s, error)


def _solve(rows: npt.NDArray[np.float64]) -> tuple[float, float, float]:
    """Return the figures that are not negative and come closest to a time of 1 in each row."""
    from scipy.optimize import nnls  # type: ignore[import-untyped]

    scale = rows.max(axis=0)
    solution, _ = nnls(rows / scale, np.ones(len(rows)))
    call_s, latency_s, byte_s = (float(x) for x in solution / scale)
    return call_s, latency_s, byte_s
