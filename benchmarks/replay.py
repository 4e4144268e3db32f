"""Recorded step times, replayed through the decisions of ``flatout tune``.

    python -m benchmarks.replay                       # 1,000 replays a program and scenario
    python -m benchmarks.replay --replays 100 gan mlp
    python -m benchmarks.replay --beside              # only pairs beside other work

What ``record_steps.py`` has recorded of real programs is cut into pieces and put together anew, so
that drift and stalls are those of a real machine, and knobs of known effect are turned on and off
in it: the comparison inside one process (``agent/switch.py``, with what a real switch left behind
in the steps after it), the stack of winners, the pass that drops one after the other, and the claim
from fresh processes (``tune/statistics.py``), within 1,000 steps in all. Of each scenario the
share of replays with a claim is printed, with its 95 % interval. Exits with 1 when it is not as
asked: a claim without a gain in more than 6.5 % of the replays, or a gain of 5 % or 20 % found in
fewer than 90 %.

Then claims beside other work are replayed (``beside.py``). Of those that are made, the interval
must hold the quiet truth in 90 %; a gain may be claimed for settings without one in at most 2 % of
the replays, and never for ``threads=one`` where it is slower.

The recorded programs (see ``record_steps.py``) ran on a shared virtual machine with two cores that
did nothing else.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import gzip
import json
import math
import multiprocessing
import os
import random
import sys
from collections import deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean, median
from typing import Any, NamedTuple, cast

from benchmarks import beside
from flatout.agent.switch import Switch
from flatout.intercept.host import Host
from flatout.tune import design, statistics
from flatout.tune.pairs import RELAY_BLOCK_STEPS
from flatout.wire.ratios import Block, Ratio, Size, estimate_arm_ratios, estimate_setting_ratios
from flatout.wire.request import Comparison, Relay
from flatout.wire.turns import Turn

RECORDED = Path(__file__).parent / "steps"

STEPS = 1000
FIRST_RUN_STEPS = 30
WARMUP_STEPS = 3
DUMMIES = 20

SCREEN_BLOCK_STEPS, SCREEN_DISCARD_STEPS, SCREEN_ROUNDS = 3, 1, 2
DROP_BLOCK_STEPS, DROP_ROUNDS = 3, 6
RUN_STEPS = 10
"""Of each fresh process, where they run one after the other."""
RELAY = Relay("", 0, block_steps=RELAY_BLOCK_STEPS, blocks=5)
"""How two fresh processes take turns."""
RELAY_STEPS = RELAY.warmup_steps + RELAY.blocks * RELAY.block_steps

PROCESS_SPREAD = 0.01
"""Standard deviation between ratios of two processes that outlasts drift (memory layout)."""

PIECE_STEPS = 200
"""Mean length of the pieces of the long run, of geometric distribution (stationary bootstrap,
Politis and Romano 1994)."""

CARRY_STEPS = 6
NO_CARRY = {True: [1.0] * CARRY_STEPS, False: [1.0] * CARRY_STEPS}


class Scenario(NamedTuple):
    """What the knobs other than the dummies bring, and how often a claim is asked for."""

    gains: tuple[float, ...]
    least: float
    most: float


SCENARIOS = {
    "dummies": Scenario((), 0.0, 0.065),
    "5 % gain": Scenario((1.05,), 0.9, 1.0),
    "20 % gain": Scenario((1.2,), 0.9, 1.0),
    "3 % slower": Scenario((0.97,), 0.0, 0.065),
}


@dataclass(frozen=True)
class Recorded:
    """What was recorded of one program.

    Attributes:
        long_ms: step times of the long run.
        long_sizes: of its steps.
        startup_steps: as many steps as a start of the program takes time.
        relay_ms: of pairs of runs that took turns, the steps that count; where none were recorded,
            turns are cut out of the long run.
        relay_block_steps: steps that count of each turn.
        carry: what a step takes more, as a factor, by its place after a switch that turned
            something on, and after one that turned it off; nothing where no switch was recorded.
    """

    long_ms: list[float]
    long_sizes: list[Size | None]
    startup_steps: int
    relay_ms: list[list[list[float]]]
    relay_block_steps: int
    carry: dict[bool, list[float]]


def recorded_programs() -> list[str]:
    """Names of the programs that were recorded."""
    return sorted(path.name.removesuffix(".json.gz") for path in RECORDED.glob("*.json.gz"))


def load(name: str) -> Recorded:
    """Read what was recorded of a program."""
    document = json.loads(gzip.decompress((RECORDED / f"{name}.json.gz").read_bytes()))
    long_ms = document["long_ms"]
    return Recorded(
        long_ms,
        [size and Size(*size) for size in document["long_sizes"]],
        round(document["startup_s"] * 1e3 / median(long_ms)),
        document["relay_ms"],
        document["relay_block_steps"],
        _carry(document["switched"]) if document["switched"] else NO_CARRY,
    )


def _carry(switched: dict[str, Any]) -> dict[bool, list[float]]:
    size = switched["block_steps"]
    excess: dict[bool, list[list[float]]] = {True: [], False: []}
    last = None
    seen = set()
    logs = _of_one_size(switched)
    for start in range(0, len(logs) - size + 1, size):
        arm = switched["arms"][start]
        block = logs[start : start + size]
        usual = median(block[CARRY_STEPS:])
        if arm != last and arm in seen:
            excess[arm != 0].append([value - usual for value in block[:CARRY_STEPS]])
        last = arm
        seen.add(arm)
    return {
        turned_on: [math.exp(_beyond_noise(place)) for place in zip(*blocks, strict=True)]
        for turned_on, blocks in excess.items()
    }


def _of_one_size(switched: dict[str, Any]) -> list[float]:
    """Logarithms of the step times, less what steps of the same elements usually take."""
    logs = [math.log(step_ms) for step_ms in switched["steps_ms"]]
    elements = [size and size[1] for size in switched["sizes"]]
    usual = {
        size: median(log for log, other in zip(logs, elements, strict=True) if other == size)
        for size in set(elements)
    }
    return [log - usual[size] for log, size in zip(logs, elements, strict=True)]


def _beyond_noise(values: Sequence[float]) -> float:
    """Their median, 0 where it may be noise; its standard error is that of normal values."""
    centre = median(values)
    deviation = median(abs(value - centre) for value in values) / 0.6745
    return centre if abs(centre) > 2 * 1.2533 * deviation / math.sqrt(len(values)) else 0.0


class Machine:
    """Replays a program: the host that a ``Switch`` sees, and a place to start new runs.

    Args:
        recorded: the program.
        gains: speed-up of each knob; of none for those that are missing.
        seed: of the replay.
    """

    def __init__(self, recorded: Recorded, gains: dict[str, float], seed: int) -> None:
        self._recorded = recorded
        self._gains = gains
        self._draw = random.Random(seed)
        self._at = self._draw.randrange(len(recorded.long_ms))
        self._pairs: deque[tuple[list[float], list[float]]] = deque()
        self.arm: int | None = None
        self.mark: str | None = None
        self.failures: dict[str, str] = {}
        self.forward_wrappers: list[object] = []
        self.roots: list[object] = []
        self.steps = 0
        self._on: dict[str, str] = {}
        self._before: dict[str, str] = {}
        self._since_switch = CARRY_STEPS

    # What a switch calls

    @property
    def record(self) -> Machine:
        return self

    applied = events = record

    def flush(self) -> None:
        pass

    def add_pause(self, since_ns: int) -> None:
        """Recorded steps have no pauses."""

    def counts_as_step(self, turn: Turn) -> bool:
        return True

    def apply(self, knob: str, setting: str) -> None:
        """A knob is turned on."""
        self._on[knob] = setting

    def undo(self, knob: str) -> None:
        """It is turned off."""
        self._on.pop(knob, None)

    def add(self, what: str, subject: str, why: str, traceback: str | None = None) -> None:
        """Nobody reads this."""

    # Runs

    def compare(self, comparison: Comparison) -> list[Block]:
        """One process with a comparison."""
        switch = Switch(cast(Host, self), comparison)
        self._at = self._draw.randrange(len(self._recorded.long_ms))
        is_over, now_ns = False, 0
        while not is_over:
            turn = Turn(now_ns)
            self._advance()
            size = self._recorded.long_sizes[self._at]
            turn.rows, turn.elements = size or (None, None)
            now_ns += round(self._step_ms() * 1e6)
            turn.end_ns = now_ns
            is_over = switch.at_boundary(turn)
        size = comparison.block_steps - comparison.discard_steps
        return [block for block in switch.blocks if len(block.times_ms) >= size]

    def _advance(self) -> None:
        """Go on to the next step, now and then to that of another piece."""
        steps = len(self._recorded.long_ms)
        if self._draw.random() < 1 / PIECE_STEPS:
            self._at = self._draw.randrange(steps)
        self._at = (self._at + 1) % steps

    def _step_ms(self) -> float:
        self.steps += 1
        recorded = self._recorded
        step_ms = recorded.long_ms[self._at] / self._gain(self._on)
        if self._on != self._before:
            self._carry = recorded.carry[len(self._on) > len(self._before)]
            self._before = dict(self._on)
            self._since_switch = 0
        if self._since_switch < CARRY_STEPS:
            step_ms *= self._carry[self._since_switch]
            self._since_switch += 1
        return step_ms

    def _gain(self, settings: dict[str, str]) -> float:
        return math.prod(self._gains.get(knob, 1.0) for knob in settings)

    def pair(self, settings: dict[str, str], in_relay: bool) -> float:
        """A pair of fresh processes, bare and with settings; the logarithm of the ratio."""
        if in_relay:
            self.steps += 2 * RELAY_STEPS
            bare, plan = self._two_in_turns()
        else:
            self.steps += 2 * RUN_STEPS
            bare, plan = self._two_runs()
        difference = self._draw.gauss(0, PROCESS_SPREAD)
        [(bare_ms, plan_ms)] = statistics.paired_means_ms([list(zip(bare, plan, strict=False))])
        return math.log(bare_ms / plan_ms * self._gain(settings)) + difference

    def _two_in_turns(self) -> list[list[float]]:
        """Bare and plan, each the first to begin in half of the cases."""
        timed = RELAY.block_steps - RELAY.discard_steps
        relays, long_ms = self._recorded.relay_ms, self._recorded.long_ms
        runs: list[list[float]] = [[], []]
        if relays:
            both = self._draw.choice(relays)
            block = self._recorded.relay_block_steps
            count = RELAY.blocks * timed
            start = self._draw.randrange(0, len(both[0]) - count + 1, block)
            runs = [run[start : start + count] for run in both]
        else:
            start = self._draw.randrange(len(long_ms))
            for block in range(2 * RELAY.blocks):
                first = start + block * RELAY.block_steps + RELAY.discard_steps
                runs[block % 2] += [long_ms[n % len(long_ms)] for n in range(first, first + timed)]
        return runs if self._draw.random() < 0.5 else runs[::-1]

    def _two_runs(self) -> tuple[list[float], list[float]]:
        """Bare and plan; of two pairs, the second the other way round."""
        if not self._pairs:
            long_ms = self._recorded.long_ms
            start = self._draw.randrange(len(long_ms))
            runs = []
            for _ in range(4):
                places = range(start + WARMUP_STEPS, start + RUN_STEPS)
                runs.append([long_ms[place % len(long_ms)] for place in places])
                start += self._recorded.startup_steps + RUN_STEPS
            self._pairs.extend([(runs[0], runs[1]), (runs[3], runs[2])])
        return self._pairs.popleft()


class Outcome(NamedTuple):
    """Of one replay: the stack, its claim, whether it is one; the ratios inside one process."""

    settings: dict[str, str]
    ratio: Ratio | None
    is_claimed: bool
    in_process: dict[tuple[str, str], Ratio]


def drop(machine: Machine, settings: dict[str, str]) -> dict[str, str]:
    """The stack without what it does not need."""
    parts = list(settings)
    without = [{knob: settings[knob] for knob in parts if knob != part} for part in parts]
    found = machine.compare(
        Comparison(
            arms=(settings, *without),
            block_steps=DROP_BLOCK_STEPS,
            discard_steps=SCREEN_DISCARD_STEPS,
            rounds=DROP_ROUNDS,
        )
    )
    ratios = {parts[arm - 1]: ratio for arm, ratio in estimate_arm_ratios(found).items()}
    spare = statistics.find_redundant(ratios)[: len(parts) - 1]
    return {knob: setting for knob, setting in settings.items() if knob not in spare}


def tune(machine: Machine, knobs: list[str], in_relay: bool, most_steps: int) -> Outcome:
    """All the decisions of a tune, in the order of ``flatout tune``."""
    machine.steps = FIRST_RUN_STEPS
    arms = design.build_arms([[(knob, "on")] for knob in knobs])
    found = machine.compare(
        Comparison(
            arms=arms,
            block_steps=SCREEN_BLOCK_STEPS,
            discard_steps=SCREEN_DISCARD_STEPS,
            rounds=SCREEN_ROUNDS,
            decide="settings",
            worthwhile=statistics.WORTHWHILE,
        )
    )
    in_process = estimate_setting_ratios(found, arms)
    settings = dict(statistics.pick_winners(in_process))
    if not settings:
        return Outcome({}, None, False, in_process)
    if len(settings) > 1:
        settings = drop(machine, settings)
    pair_steps = 2 * (RELAY_STEPS if in_relay else RUN_STEPS)
    most = max((most_steps - machine.steps) // pair_steps, statistics.MINIMUM_PAIRS)
    logs: list[float] = []
    while len(logs) < most and not statistics.has_enough_pairs(logs, most):
        logs.append(machine.pair(settings, in_relay))
    ratio = statistics.estimate_ratio(logs)
    return Outcome(settings, ratio, statistics.is_gain(ratio), in_process)


def replay(
    name: str,
    scenario: Scenario,
    seeds: Iterable[int],
    in_relay: bool = True,
    most_steps: int = STEPS,
) -> list[Outcome]:
    """A program and a scenario, with one replay for each seed."""
    recorded = load(name)
    gains = {f"real{number}": gain for number, gain in enumerate(scenario.gains)}
    knobs = [*gains, *(f"dummy{number}" for number in range(DUMMIES))]
    return [tune(Machine(recorded, gains, seed), knobs, in_relay, most_steps) for seed in seeds]


def share(claims: int, replays: int) -> Ratio:
    """Share of replays with its exact 95 % interval (Clopper and Pearson 1934)."""
    from scipy import stats  # type: ignore[import-untyped]

    interval = stats.binomtest(claims, replays).proportion_ci(0.95)
    return Ratio(claims / replays, float(interval.low), float(interval.high), replays)


MOST_FALSE_GAINS, LEAST_COVERED = 0.02, 0.9
"""What is asked of claims beside other work."""


def replay_beside(names: Sequence[str], replays: int, pool: concurrent.futures.Executor) -> bool:
    """Replay claims beside other work, and print a line for each kind of it.

    Returns whether they are as asked.
    """
    is_as_asked = True
    cores = os.cpu_count() or 1
    seeds = [range(first, replays, cores) for first in range(cores)]
    for kind in beside.KINDS:
        print(f"beside other work: {kind}")
        for name in names:
            truth = beside.load(name)[kind].truth
            for work in beside.WORK:
                parts = [pool.submit(beside.tally, name, kind, work, part) for part in seeds]
                found = beside.Tally(*map(sum, zip(*(p.result() for p in parts), strict=True)))
                if not found.replays:
                    print(f"  {name:8} {work:7} nothing recorded")
                    continue
                is_covered = found.holds >= LEAST_COVERED * found.measured
                is_false = truth <= 1 and found.gains > (
                    0 if kind == "threads" else MOST_FALSE_GAINS * found.replays
                )
                is_as_asked &= is_covered and not is_false
                covered = f"{found.holds / found.measured:.1%}" if found.measured else "-"
                print(
                    f"  {name:8} {work:7} truth {truth:.3f}, measurable "
                    f"{found.measured / found.replays:6.1%}, interval holds the truth {covered}, "
                    f"gain claimed {found.gains / found.replays:.1%}"
                    f"{'' if is_covered and not is_false else '  NOT AS ASKED'}",
                    flush=True,
                )
    return is_as_asked


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    names = recorded_programs()
    parser.add_argument("programs", nargs="*", metavar="PROGRAM", help=f"of {', '.join(names)}")
    parser.add_argument("--replays", type=int, default=1000)
    parser.add_argument("--steps", type=int, default=STEPS, help="at most, of a tune")
    parser.add_argument(
        "--one-after-the-other",
        action="store_true",
        help="fresh processes run one after the other instead of taking turns",
    )
    parser.add_argument(
        "--beside", action="store_true", help="replay only claims beside other work"
    )
    arguments = parser.parse_args()
    is_as_asked = True
    cores = os.cpu_count() or 1
    pool = concurrent.futures.ProcessPoolExecutor(cores, multiprocessing.get_context("spawn"))
    chosen = [name for name in beside.recorded_programs() if name in (arguments.programs or names)]
    is_as_asked &= replay_beside(chosen, arguments.replays, pool)
    for title, scenario in () if arguments.beside else SCENARIOS.items():
        print(f"{title} and {DUMMIES} dummies")
        for name in arguments.programs or names:
            parts = [
                pool.submit(
                    replay,
                    name,
                    scenario,
                    range(first, arguments.replays, cores),
                    not arguments.one_after_the_other,
                    arguments.steps,
                )
                for first in range(cores)
            ]
            outcomes = [outcome for part in parts for outcome in part.result()]
            claims = share(sum(outcome.is_claimed for outcome in outcomes), len(outcomes))
            is_as_asked &= claims.high >= scenario.least and claims.low <= scenario.most
            kept = fmean("real0" in outcome.settings for outcome in outcomes)
            covered = fmean(
                ratio.low <= 1 <= ratio.high
                for outcome in outcomes
                for (knob, _), ratio in outcome.in_process.items()
                if knob.startswith("dummy")
            )
            stack = fmean(len(outcome.settings) for outcome in outcomes)
            pairs = [outcome.ratio.pairs for outcome in outcomes if outcome.ratio is not None]
            print(
                f"  {name:10} claimed {claims.value:6.1%} ({claims.low:.1%} to {claims.high:.1%}), "
                f"in the stack {kept:.1%}, knobs in it {stack:.1f}, "
                f"pairs {fmean(pairs) if pairs else 0:.1f}, "
                f"intervals inside one process cover {covered:.1%}",
                flush=True,
            )
    return 0 if is_as_asked else 1


if __name__ == "__main__":
    sys.exit(main())
