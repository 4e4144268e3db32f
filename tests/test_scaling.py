"""The model of ``flatout scale`` against a simulation of the ranks, message by message."""

from __future__ import annotations

import io
import itertools
import json
import math
import os
import subprocess
import sys
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from flatout.errors import UserError
from flatout.launch import isolation
from flatout.report.scaling import conclusions, print_forecast
from flatout.scaling import here, measured, model, networks
from flatout.scaling.maximum import expected_maximum
from flatout.scaling.measured import MeasuredRun
from flatout.scaling.networks import Network, Software
from flatout.wire.lines import Lap
from tests import shared_laps

Array = npt.NDArray[np.float64]

NETWORK = Network("made up", 2e-4, 1e-8, 0.0)
SOFTWARE = Software(5e-4, 2e-5, 0.0)
NO_SOFTWARE = Software(0.0, 0.0, 0.0)


# The simulation


def pass_around(ready_s: Array, size_bytes: float, rounds: int, network: Network) -> Array:
    """Let every rank send a message to the next one, and again when it has got one itself.

    Returns:
        When each rank is done.
    """
    message_s = network.latency_s + size_bytes * network.seconds_per_byte
    for _ in range(rounds):
        ready_s = np.maximum(ready_s, np.roll(ready_s, 1)) + message_s
    return ready_s


def gather(ready_s: Array, size_bytes: float, network: Network) -> Array:
    ranks = len(ready_s)
    return pass_around(ready_s, size_bytes / ranks, ranks - 1, network)


def add_up(ready_s: Array, size_bytes: float, network: Network) -> Array:
    ranks = len(ready_s)
    return pass_around(ready_s, size_bytes / ranks, 2 * (ranks - 1), network)


def exchange_with_partners(ready_s: Array, sizes: Iterable[float], network: Network) -> Array:
    """Let ranks exchange messages with those at the distances 1, 2, 4, ..., in this order."""
    for number, size_bytes in enumerate(sizes):
        distance = 2 ** (number % int(math.log2(len(ready_s))))
        partner = np.arange(len(ready_s)) ^ distance
        both_s = np.maximum(ready_s, ready_s[partner])
        ready_s = both_s + network.latency_s + size_bytes * network.seconds_per_byte
    return ready_s


@dataclass
class Program:
    """A program whose steps are simulated: it calls a module and then goes backward.

    Attributes:
        batch: its rows.
        alike_s: what every rank does alike, in each half of a step.
        comparison_s: what a rank does in each half if there are others.
        fixed_s, row_s: of each of the two passes of a shard.
        noise: the mean of the exponential part of a pass, over the rest of it.
        gathered_bytes, summed_bytes: of a step.
    """

    batch: int = 256
    alike_s: float = 0.002
    comparison_s: float = 0.003
    fixed_s: float = 0.004
    row_s: float = 0.0008
    noise: float = 0.1
    gathered_bytes: float = 4e5
    summed_bytes: float = 2e6

    def simulate(self, ranks: int, steps: int, seed: int = 0) -> tuple[Array, list[list[Lap]]]:
        """Return the time of each step, and the laps of each rank."""
        generator = np.random.default_rng(seed)
        laps: list[list[Lap]] = [[] for _ in range(ranks)]
        now_s = np.zeros(ranks)
        times_s = []
        for number in range(steps):
            began_s, shard_s = now_s.copy(), np.zeros(ranks)
            for is_forward in (True, False):
                now_s = now_s + self.alike_s + self.comparison_s * (ranks > 1)
                if is_forward and ranks > 1:
                    now_s = self._meet(now_s)
                usual_s = self.fixed_s + self.row_s * math.ceil(self.batch / ranks)
                pass_s = usual_s * (1 + self.noise * generator.exponential(size=ranks))
                shard_s += pass_s
                now_s = now_s + pass_s
                if ranks > 1:
                    now_s = self._meet(now_s) + SOFTWARE.call_s
                    if is_forward:
                        now_s = gather(now_s, self.gathered_bytes, NETWORK)
                    else:
                        now_s = add_up(now_s, self.summed_bytes, NETWORK)
            times_s.append(float(np.mean(now_s - began_s)))
            for rank in range(ranks):
                rest_s = now_s[rank] - began_s[rank] - shard_s[rank]
                waiting_s = rest_s - 2 * (self.alike_s + self.comparison_s)
                laps[rank].append(self._lap(number, now_s[rank], shard_s[rank], waiting_s))
        return np.array(times_s), laps

    def _meet(self, now_s: Array) -> Array:
        ranks = len(now_s)
        header_s = SOFTWARE.call_s + SOFTWARE.header_s * ranks
        said_bytes = 64 + min(1024, 65536 // ranks // 8 * 8)
        return gather(now_s, said_bytes * ranks, NETWORK) + header_s

    def _lap(self, number: int, end_s: float, shard_s: float, waiting_s: float) -> Lap:
        return shared_laps.lap(
            number,
            end_s,
            program_s=2 * self.alike_s,
            comparison_s=2 * self.comparison_s,
            shard_s=shard_s,
            waiting_s=waiting_s,
            calls=1,
            rows=self.batch,
            backwards=1,
            meetings=3,
            gathers=1,
            gathered_bytes=self.gathered_bytes,
            sums=1,
            summed_bytes=self.summed_bytes,
        )

    def record(self, ranks: int, steps: int = 203, seed: int = 0) -> MeasuredRun:
        """Return what flatout measures in a run."""
        times_s, laps = self.simulate(ranks, steps, seed)
        starts_s = np.concatenate([[0.0], np.cumsum(times_s)])
        records = []
        for number, time_s in enumerate(times_s):
            one = shared_laps.step(number, float(starts_s[number]), time_s * 1e3)
            if ranks == 1:
                both_s = laps[0][number].shard_s
                one.phases_ms.update(forward=both_s * 500, backward=both_s * 500)
            records.append(one)
        processes = [
            shared_laps.process(rank, ranks, laps[rank] if ranks > 1 else [], records)
            for rank in range(ranks)
        ]
        for process in processes:
            process.inputs = (f"float32[{self.batch},8]",)
        if ranks == 1:
            return measured.measure_alone(processes[0])
        return measured.measure_ranks(shared_laps.run(*processes), ranks)


# The parts of the model


@pytest.mark.parametrize("ranks", [2, 3, 7, 16])
@pytest.mark.parametrize("size_bytes", [64.0, 1e6])
def test_a_ring_takes_what_its_messages_take(ranks: int, size_bytes: float) -> None:
    number, size = np.array([float(ranks)]), np.array([size_bytes])
    start_s = np.zeros(ranks)
    gathered_s = gather(start_s, size_bytes, NETWORK).max()
    summed_s = add_up(start_s, size_bytes, NETWORK).max()
    assert networks.gather_s(NETWORK, number, size, "ring") == pytest.approx(gathered_s)
    assert networks.sum_s(NETWORK, number, size, "ring") == pytest.approx(summed_s)


@pytest.mark.parametrize("ranks", [2, 8, 64])
@pytest.mark.parametrize("size_bytes", [64.0, 1e5, 1e9])
def test_the_best_algorithm_is_the_fastest_of_those_simulated(
    ranks: int, size_bytes: float
) -> None:
    number, size = np.array([float(ranks)]), np.array([size_bytes])
    start_s = np.zeros(ranks)
    rounds = int(math.log2(ranks))
    halves = [size_bytes / 2**k for k in range(1, rounds + 1)]
    doubling_s = exchange_with_partners(start_s, [size_bytes] * rounds, NETWORK).max()
    halving_s = exchange_with_partners(start_s, [*halves, *halves[::-1]], NETWORK).max()
    ring_s = add_up(start_s, size_bytes, NETWORK).max()
    fastest_s = min(doubling_s, halving_s, ring_s)
    assert networks.sum_s(NETWORK, number, size, "best") == pytest.approx(fastest_s)
    gathered_s = exchange_with_partners(start_s, halves[::-1], NETWORK).max()
    assert networks.gather_s(NETWORK, number, size, "best") == pytest.approx(gathered_s)


def test_the_best_algorithm_is_never_slower_than_a_ring() -> None:
    ranks = np.arange(2.0, 300)
    for size_bytes in (1.0, 1e4, 1e6, 1e9):
        size = np.full(len(ranks), size_bytes)
        for time_s in (networks.gather_s, networks.sum_s):
            best_s, ring_s = (time_s(NETWORK, ranks, size, name) for name in ("best", "ring"))
            assert (best_s <= ring_s * (1 + 1e-12)).all()


def test_all_ranks_wait_for_the_last_one_in_a_ring() -> None:
    late_s = np.zeros(9)
    late_s[4] = 1.0
    assert add_up(late_s, 1e6, NETWORK) == pytest.approx(
        1.0 + float(networks.sum_s(NETWORK, np.array([9.0]), np.array([1e6]), "ring")[0])
    )


DISTRIBUTIONS: dict[str, Callable[[np.random.Generator, Any], Array]] = {
    "exponential": lambda generator, size: generator.exponential(2.0, size),
    "normal": lambda generator, size: generator.normal(5.0, 1.0, size),
    "with outliers": lambda generator, size: (
        generator.normal(0.0, 1.0, size) + 20 * (generator.random(size) < 0.05)
    ),
}


@pytest.mark.parametrize("name", DISTRIBUTIONS)
@pytest.mark.parametrize("ranks", [2, 4, 16, 64])
def test_the_expected_maximum_is_that_of_draws(name: str, ranks: int) -> None:
    generator = np.random.default_rng(0)
    draw = DISTRIBUTIONS[name]
    values = draw(generator, 4000)
    expected = draw(generator, (20_000, ranks)).max(axis=1).mean()
    found = expected_maximum(values, np.array([float(ranks)]))[0]
    assert found - values.mean() == pytest.approx(
        expected - values.mean(), rel=0.2 if name == "with outliers" else 0.12
    )


def test_beyond_the_measurements_the_tail_is_exponential() -> None:
    """The expected maximum of exponential times is their mean times a harmonic number."""
    values = np.random.default_rng(0).exponential(1.0, 300)
    ranks = np.array([256.0, 1024.0, 4096.0])
    harmonic = [sum(1 / k for k in range(1, int(n) + 1)) for n in ranks]
    assert expected_maximum(values, ranks) == pytest.approx(harmonic, rel=0.2)
    assert expected_maximum(values, ranks)[-1] > values.max()


def test_one_rank_waits_for_nobody() -> None:
    values = np.random.default_rng(0).normal(size=50)
    assert expected_maximum(values, np.array([1.0])) == pytest.approx(values.mean())


@pytest.mark.parametrize("ranks", [2, 4])
def test_deviations_are_those_of_single_ranks(ranks: int) -> None:
    """What all ranks have in common is no deviation, and few ranks show them in full."""
    generator = np.random.default_rng(0)
    common = generator.normal(10.0, 3.0, (4000, 1))
    own_s = common + generator.normal(0.0, 0.5, (4000, ranks))
    deviations = measured.find_deviations(own_s)
    assert len(deviations) == 4000 * ranks
    assert deviations.std() * own_s.mean() == pytest.approx(0.5, rel=0.05)
    assert abs(deviations.mean()) < 1e-9


@pytest.mark.parametrize(
    ("points", "fixed_s", "row_s"),
    [
        ([(10, 3.0), (20, 5.0)], 1.0, 0.2),
        ([(10, 3.0), (20, 5.0), (40, 9.0)], 1.0, 0.2),
        ([(10, 3.0), (10, 3.0)], 0.75, 0.225),  # one size: the share that is given
        ([(10, 3.0), (11, 9.0)], 1.5, 9 / 21),  # sizes that are too close
        ([(10, 2.0), (20, 5.0)], 0.0, 0.24),  # the fixed part would be negative
        ([(10, 3.0), (20, 2.0)], 2.5, 0.0),  # a row would be
    ],
)
def test_the_fixed_part_and_the_rows_of_a_shard(
    points: list[tuple[float, float]], fixed_s: float, row_s: float
) -> None:
    assert model.fit_shard(points, 0.25) == pytest.approx((fixed_s, row_s))


# The whole model


@pytest.mark.parametrize("ranks", [3, 4, 16, 64])
def test_a_step_takes_what_the_simulation_of_the_ranks_takes(ranks: int) -> None:
    program = Program()
    runs = [program.record(2), program.record(1)]
    forecast = model.forecast(runs, NETWORK, SOFTWARE, [ranks])
    simulated_s = program.simulate(ranks, 300, seed=1)[0].mean()
    (found,) = forecast.predictions
    assert found.step_s.value == pytest.approx(simulated_s, rel=0.06)
    assert found.step_s.low < simulated_s < found.step_s.high
    alone_s = program.simulate(1, 300, seed=2)[0].mean()
    assert forecast.alone_s.value == pytest.approx(alone_s, rel=0.05)
    assert found.efficiency.value == pytest.approx(alone_s / simulated_s / ranks, rel=0.08)
    assert sum(found.shares.values()) == pytest.approx(1, abs=0.02)


@pytest.mark.parametrize("ranks", [2, 4, 16, 64, 256])
def test_without_noise_a_step_takes_exactly_what_the_simulation_takes(
    ranks: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(model, "RUN_ERROR", 0.0)
    program = Program(noise=0.0)
    runs = [program.record(2, 30), program.record(1, 30)]
    (found,) = model.forecast(runs, NETWORK, SOFTWARE, [ranks]).predictions
    simulated_s = program.simulate(ranks, 3)[0].mean()
    assert found.step_s.value == pytest.approx(simulated_s, rel=1e-3)
    assert found.step_s.high - found.step_s.low < 1e-3 * simulated_s
    assert found.shares["comparison"] * simulated_s == pytest.approx(0.006, rel=1e-3)
    assert found.shares["alike"] * simulated_s == pytest.approx(0.004, rel=1e-3)
    assert found.shares["waiting"] < 1e-3


@pytest.mark.parametrize("ranks", [4, 16])
def test_the_slowest_rank_makes_the_others_wait_after_each_pass(
    ranks: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(model, "RUN_ERROR", 0.0)
    program = Program(noise=0.3)
    quiet = Network("quiet", 1e-9, 1e-15, 0.0)
    runs = [program.record(2, 603), program.record(1, 603)]
    (found,) = model.forecast(runs, quiet, NO_SOFTWARE, [ranks]).predictions
    pass_s = program.fixed_s + program.row_s * program.batch / ranks
    # Of n exponential times, the largest exceeds the mean by their mean times 1/2 + ... + 1/n.
    expected_s = 2 * pass_s * program.noise * sum(1 / k for k in range(2, ranks + 1))
    assert found.shares["waiting"] * found.step_s.value == pytest.approx(expected_s, rel=0.2)


def test_intervals_hold_for_runs_that_differ() -> None:
    """Each run is slower or faster as a whole, as processes are."""
    generator = np.random.default_rng(0)
    held = []
    for number in range(30):
        factors = np.exp(model.RUN_ERROR * generator.standard_normal(3))
        alone, pair, four = (
            replace(program, alike_s=0.002 * f, fixed_s=0.004 * f, row_s=0.0008 * f)
            for program, f in zip([Program()] * 3, factors, strict=True)
        )
        runs = [pair.record(2, 43, seed=number), alone.record(1, 43, seed=number)]
        found = model.forecast(runs, NETWORK, SOFTWARE, [4], seed=number).predictions[0].step_s
        held.append(found.low < four.simulate(4, 43, seed=99)[0].mean() < found.high)
    assert 0.8 <= np.mean(held) <= 1.0


def test_from_one_run_the_fixed_part_is_not_known() -> None:
    """All between no fixed part and nothing else is possible."""
    program = Program(noise=0.01)
    forecast = model.forecast([program.record(2)], NETWORK, SOFTWARE, [64])
    step_s = forecast.predictions[0].step_s
    shard_s = 2 * (program.fixed_s + program.row_s * 128)
    all_rows = program.simulate(64, 20)[0].mean() - 2 * program.fixed_s * (1 - 4 / 128)
    assert step_s.low == pytest.approx(all_rows + 0.05 * shard_s, rel=0.3)
    assert step_s.high - step_s.low > 0.7 * shard_s
    assert not forecast.knows_fixed_time
    assert any(line.startswith("Not measured: which part") for line in conclusions(forecast))


def test_every_number_of_ranks_is_looked_at_but_for_some_large_ones() -> None:
    looked_at = list(model.ranks_looked_at([2, 100, 4096, 3001]))
    assert looked_at[:127] == list(range(2, 129))
    assert looked_at == sorted(set(looked_at))
    assert {3001, 4096} <= set(looked_at)
    assert all(b <= a * 1.02 for a, b in itertools.pairwise(looked_at[126:]))


def test_the_number_of_ranks_that_is_too_many() -> None:
    program = Program(noise=0.02)
    runs = [program.record(2), program.record(1)]
    forecast = model.forecast(runs, NETWORK, SOFTWARE, [2])
    alone_s = program.simulate(1, 100)[0].mean()
    simulated = next(
        ranks
        for ranks in range(2, 64)
        if alone_s / ranks / program.simulate(ranks, 60)[0].mean() < model.LEAST_EFFICIENCY
    )
    limit = forecast.inefficient_from
    assert limit.low <= simulated <= limit.high
    assert abs(limit.value - simulated) <= 2


def test_more_ranks_than_rows_compute_the_whole_batch() -> None:
    program = Program(batch=6, row_s=0.03)
    runs = [program.record(2), program.record(1)]
    four, six, eight = model.forecast(runs, NETWORK, SOFTWARE, [4, 6, 8]).predictions
    assert (four.is_whole, six.is_whole, eight.is_whole) == (False, False, True)
    row_s = 2 * program.row_s * (1 + program.noise)
    assert four.step_s.value - six.step_s.value == pytest.approx(row_s, rel=0.2)  # 2 rows and 1
    assert eight.step_s.value > 6 * row_s


def test_a_gather_has_room_for_the_largest_shard_of_each_rank() -> None:
    """Two ranks exchange 2 + 2 rows of a batch of 3, three ranks 1 + 1 + 1."""
    exchanges = measured.Exchanges(1, 3, 1, 0, 1, 4e6, 0, 0)
    work = model.Work(0.0, 0.0, 0.0, 0.0, np.zeros(0), exchanges, 2)
    quiet = Network("quiet", 0.0, 1e-8, 0.0)
    ranks = np.array([2.0, 3.0])
    found = model.compute_exchange_s(work, quiet, NO_SOFTWARE, ranks, "ring")
    assert found == pytest.approx([1 / 2 * 4e-2, 2 / 3 * 3e-2])


def test_ranks_that_share_the_processors_of_a_host_take_turns() -> None:
    program = Program(noise=0.0)
    runs = [program.record(2), program.record(1)]
    quiet = Network("here", 1e-9, 1e-15, 0.0, processors=2)
    two, four = model.forecast(runs, quiet, NO_SOFTWARE, [2, 4]).predictions
    alike_s = program.alike_s + program.comparison_s
    own_s = 2 * (alike_s + program.fixed_s + program.row_s * program.batch / 4)
    assert four.step_s.value == pytest.approx(2 * own_s, rel=0.06)
    own_s += 2 * program.row_s * program.batch / 4
    assert two.step_s.value == pytest.approx(own_s, rel=0.06)


def test_runs_that_do_not_fit_together_are_refused() -> None:
    pair, alone = Program().record(2), Program().record(1)
    with pytest.raises(UserError, match="none of these runs has several ranks"):
        model.forecast([alone], NETWORK, SOFTWARE, [4])
    with pytest.raises(UserError, match=r"computes with 1 threads in .* and with 2 in"):
        model.forecast([pair, replace(alone, threads=2)], NETWORK, SOFTWARE, [4])
    other = replace(alone, header=replace(alone.header, program="other.py"))
    with pytest.raises(UserError, match=r"run is a run of other\.py, and run one of train\.py"):
        model.forecast([pair, other], NETWORK, SOFTWARE, [4])
    with pytest.raises(UserError, match="2 calls a step are made in run, and 1 are shared out"):
        model.forecast([pair, replace(alone, forwards=2.0)], NETWORK, SOFTWARE, [4])
    with pytest.raises(UserError, match="the inputs of run differ"):
        model.forecast([pair, Program(batch=64).record(1)], NETWORK, SOFTWARE, [4])


def test_runs_with_several_ranks_may_have_different_batches() -> None:
    program = Program()
    runs = [program.record(2), Program(batch=64).record(2)]
    forecast = model.forecast(runs, NETWORK, SOFTWARE, [8])
    simulated_s = program.simulate(8, 300, seed=1)[0].mean()
    assert forecast.predictions[0].step_s.value == pytest.approx(simulated_s, rel=0.06)
    assert set(forecast.measured_s) == {2}


# What is measured


def test_a_run_is_refused_that_does_not_tell_enough() -> None:
    _, laps = Program().simulate(2, 20)
    steps = [shared_laps.step(n, lap.end_s - 0.2, 200.0) for n, lap in enumerate(laps[0])]

    def measure(*own: list[Lap]) -> MeasuredRun:
        processes = [shared_laps.process(rank, 2, o, steps) for rank, o in enumerate(own)]
        return measured.measure_ranks(shared_laps.run(*processes), 2)

    assert measure(*laps).ranks == 2
    with pytest.raises(UserError, match="rank 1 of run has recorded no steps"):
        measure(laps[0], [])
    with pytest.raises(UserError, match="too few steps of which every rank"):
        measure(laps[0], laps[1][:6])
    unshared = [[lap._replace(calls=0, rows=0) for lap in of_rank] for of_rank in laps]
    with pytest.raises(UserError, match="nothing was shared out in run"):
        measure(*unshared)


def test_no_record_is_one_sentence(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="is not a run directory"):
        measured.read(tmp_path / "nothing")
    with pytest.raises(UserError, match="too few steps: at least 8"):
        measured.read(tmp_path)


@pytest.mark.parametrize(("call_s", "latency_s", "rate"), [(1e-4, 5e-5, 1e9), (0.0, 3e-4, 5e8)])
def test_the_figures_of_this_host_follow_from_exchanges_of_known_sizes(
    call_s: float, latency_s: float, rate: float
) -> None:
    generator = np.random.default_rng(0)
    laps = []
    for gathered, summed in ((32, 0), (8 << 20, 0), (32, 16), (8 << 20, 16), (32, 8 << 20)):
        messages = 1 + 2 * (summed > 0)
        usual_s = call_s * (1 + (summed > 0)) + latency_s * messages
        usual_s += (gathered / 2 + summed) / rate
        for number in range(40):
            time_s = usual_s * (1 + 0.02 * generator.standard_normal()) * (5 if number < 5 else 1)
            fields = {"gathers": 1, "gathered_bytes": gathered, "summed_bytes": summed}
            lap = shared_laps.lap(
                number, 0.0, communication_s=time_s, sums=int(summed > 0), **fields
            )
            laps.append(lap)
    network, software = here.fit(here.split(laps), 2e-6, 2)
    assert software.call_s == pytest.approx(call_s, rel=0.15, abs=1e-5)
    assert network.latency_s == pytest.approx(latency_s, rel=0.15)
    assert 1 / network.seconds_per_byte == pytest.approx(rate, rel=0.05)
    assert (software.header_s, network.processors) == (2e-6, 2)


@pytest.mark.parametrize(
    ("text", "latency_s", "bytes_per_s"),
    [
        ("10gbe", 21e-6, 1.177e9),
        ("HDR", 4e-6, 23.44e9),
        ("NVLink", 1.9e-6, 422e9),
        ("25us,1.2GB/s", 25e-6, 1.2e9),
        ("0.5ms,100Mb/s", 5e-4, 12.5e6),
    ],
)
def test_a_network_has_a_name_or_figures(text: str, latency_s: float, bytes_per_s: float) -> None:
    found = networks.parse(text)
    assert found is not None
    assert found.latency_s == pytest.approx(latency_s)
    assert 1 / found.seconds_per_byte == pytest.approx(bytes_per_s, rel=1e-3)
    assert found.error > 0


@pytest.mark.parametrize("text", ["ethernet", "25us", "0us,1GB/s", "25us,0GB/s", "1.2.3us,1GB/s"])
def test_what_is_no_network_is_refused(text: str) -> None:
    with pytest.raises(UserError, match="is no network"):
        networks.parse(text)


# The report


def test_the_report_says_what_it_rests_on() -> None:
    runs = [Program().record(2), Program().record(1)]
    forecast = model.forecast(runs, networks.PRESETS["100gbe"], None, [2, 4, 256, 512])
    text = io.StringIO()
    print_forecast(forecast, text)
    report = text.getvalue()
    assert "train.py, batches of 256, threads: 1 a rank, over 100GbE (21 us, 11.8 GB/s)" in report
    assert "Beyond 256 ranks each computes the whole batch" in report
    assert "Not verified beyond 2 ranks" in report
    assert "Not measured: what an exchange takes beside the network" in report
    assert "Not measured: which part" not in report
    rows = [line.split()[0] for line in report.splitlines() if "%" in line and "x" in line]
    assert rows[-3:] == ["2", "4", "256"]


def test_a_limit_that_is_not_reached_is_no_number() -> None:
    forecast = model.forecast([Program().record(2)], NETWORK, SOFTWARE, [2])
    beyond = model.Interval(4097, 4097, 4097)
    (first, *_) = conclusions(replace(forecast, inefficient_from=beyond))
    assert first == "Efficiency stays at 80% or more up to 4,096 ranks."
    partly = model.Interval(300, 200, 4097)
    (first, *_) = conclusions(replace(forecast, inefficient_from=partly))
    assert first.endswith("at 300 ranks (90% interval: 200 to more than 4,096).")


# The verb

PROGRAM = """
import torch
from torch import nn
torch.manual_seed(0)
model = nn.Sequential(nn.Linear(64, 256), nn.ReLU(), nn.Linear(256, 8))
optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
x, y = torch.randn(32, 64), torch.randint(0, 8, (32,))
for step in range(100_000):
    loss = nn.functional.cross_entropy(model(x), y)
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
"""


@pytest.mark.skipif(
    isolation.unavailable_reason() is not None, reason=str(isolation.unavailable_reason())
)
def test_scale_predicts_from_what_doctor_has_recorded(tmp_path: Path) -> None:
    (tmp_path / "train.py").write_text(PROGRAM)

    def flatout(*words: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "-m", "flatout", *words],
            env={**os.environ, "FLATOUT_HOME": str(tmp_path / "home"), "OMP_NUM_THREADS": "2"},
            cwd=tmp_path,
            capture_output=True,
            text=True,
            timeout=240,
            check=False,
        )

    job = ["--", sys.executable, "train.py"]
    done = flatout("doctor", "--quiet", "--ranks", "2", "--steps", "25", *job)
    assert done.returncode == 0, done.stderr
    [record] = (tmp_path / "home" / "runs").iterdir()
    assert f"flatout scale --network 100GbE {record}" in done.stderr
    done = flatout("scale", "--network", "here", "--json", "scale.json", str(record))
    assert done.returncode == 0, done.stderr
    assert "Not verified beyond 2 ranks" in done.stdout
    document = json.loads((tmp_path / "scale.json").read_text())
    assert [one["ranks"] for one in document["predictions"]] == [2**k for k in range(1, 13)]
    assert document["batch"] == 32
    assert document["network"]["processors"] == len(os.sched_getaffinity(0))
    assert document["measured_s"]["2"] > 0
    for one in document["predictions"]:
        step_s = one["step_s"]
        assert 0 < step_s["low"] < step_s["value"] < step_s["high"]
    assert [one["is_whole"] for one in document["predictions"][:6]] == [False] * 5 + [True]
    refused = flatout("scale", "--network", "carrier-pigeon", str(record))
    assert refused.returncode == 2
    assert "is no network" in refused.stderr
