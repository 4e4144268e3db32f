"""The controller's request to the agent: one JSON file, ``request.json``, in the run directory.

The controller writes it before the job starts. The agent of every process of the job reads it when
torch is imported. This file imports only the standard library and ``flatout.text``, because both
halves load it.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from flatout.text import one_line
from flatout.wire import codec

REQUEST_VERSION = 1
REQUEST_FILE = "request.json"

RUN_VARIABLE = "FLATOUT_RUN"
"""The environment variable that names the run directory to the agent."""
DISABLE_VARIABLE = "FLATOUT_DISABLE"
"""The environment variable that switches the agent off if it is ``1``."""
RANK_VARIABLE = "FLATOUT_RANK"
"""The environment variable that gives a process of a run with ``--ranks`` its rank."""
RANKS_VARIABLE = "FLATOUT_RANKS"
"""The environment variable that gives such a process the number of ranks."""
SEED_VARIABLE = "FLATOUT_SEED"
"""The environment variable by which the hook seeds ``random`` alike on all ranks."""
ADDRESS_VARIABLE = "FLATOUT_ADDRESS"
"""The environment variable that gives such a process the address of its host, if ranks may be on
others."""


class RequestError(ValueError):
    """A request cannot be read: it is not JSON, has another version, or a value does not fit."""


@dataclass(frozen=True)
class Comparison:
    """A comparison inside one process: its arms alternate in blocks of steps (A B A B ...).

    Attributes:
        arms: a map from knobs to settings for each arm; the first arm is the baseline (usually
            empty).
        block_steps: the number of steps in a block, including the discarded steps.
        discard_steps: the number of steps after each switch that are not measured; 0 if blocks are
            whole cycles of the program.
        warmup_steps: the number of steps before the first block, under the baseline.
        first_steps: the number of steps that an arm makes before the rounds begin, if it has a
            setting that no arm before it has, so that allocation and compilation are not measured.
        rounds: the maximum number of blocks per arm.
        decide: the condition that ends the comparison before all ``rounds``, checked after every
            second round. ``None``: there is no condition. ``"arms"``: an arm that gains less than
            ``worthwhile``, beyond noise, is dropped; the comparison ends when all other arms are
            faster than the baseline, beyond noise. ``"fastest"``: an arm that is slower than the
            leading arm, beyond noise, is dropped as well; the comparison ends when one arm is left.
            ``"settings"``: no arm is dropped; the comparison ends when it is clear for each setting
            whether it gains ``worthwhile`` (for the combinations of ``tune.design``).
        worthwhile: the least ratio that is worth having, above 1.
        most_seconds: the time after which the comparison ends, once it has made the fewest rounds;
            ``None``: no limit. It counts from the first block on, with the time that it takes to
            switch. An arm may be slower than the program without it.
        fewest_rounds: the number of rounds that are made in any case.
    """

    arms: tuple[dict[str, str], ...]
    block_steps: int = 8
    discard_steps: int = 2
    warmup_steps: int = 3
    first_steps: int = 3
    rounds: int = 8
    decide: Literal["arms", "fastest", "settings"] | None = None
    worthwhile: float = 1.02
    most_seconds: float | None = None
    fewest_rounds: int = 0

    @property
    def arms_with_first_steps(self) -> list[int]:
        """The numbers of the arms that make some steps before the rounds begin."""
        seen = set(self.arms[0].items())
        numbers = []
        for number, arm in enumerate(self.arms):
            if self.first_steps and not seen.issuperset(arm.items()):
                numbers.append(number)
                seen.update(arm.items())
        return numbers

    @property
    def longest_steps(self) -> int:
        """The number of steps of the comparison if it is not ended early."""
        first = self.first_steps * len(self.arms_with_first_steps)
        return self.warmup_steps + first + len(self.arms) * self.rounds * self.block_steps


@dataclass(frozen=True)
class Relay:
    """Two runs that alternate in blocks of steps, see ``agent/relay.py``.

    Attributes:
        folder: the path of a folder in which both runs create the files that they wait for.
        place: 0 for the run that begins, 1 for the other run.
        block_steps: the number of steps in a block, including the discarded steps.
        discard_steps: the number of steps after each wait that are not measured.
        warmup_steps: the number of steps before the first block, at least 1; the second run makes
            its warm-up steps after the first run has made its own.
        blocks: the number of blocks of each run.
    """

    folder: str
    place: int
    block_steps: int = 3
    discard_steps: int = 1
    warmup_steps: int = 3
    blocks: int = 8


@dataclass(frozen=True)
class Replay:
    """A replay of the calls of one step after the profile, see ``agent/replay.py``.

    The replay may take the time of ``steps`` steps, within two limits.

    Attributes:
        settings: the settings that may be tried, each as ``KNOB=SETTING``.
        steps: the number of steps.
        least_seconds, most_seconds: the limits.
    """

    settings: tuple[str, ...]
    steps: float = 8.0
    least_seconds: float = 6.0
    most_seconds: float = 25.0


@dataclass(frozen=True)
class ProvenConditions:
    """The conditions under which some settings were proven. They are applied only under these.

    Attributes:
        knobs: the names of the knobs whose settings need these conditions.
        torch: the version of torch.
        inputs: the signature of the first outermost module call (``wire/signature.py``); ``None``:
            any inputs.
        files: the paths of the files that the program may consist of; ``None``: any files.
    """

    knobs: tuple[str, ...]
    torch: str | None
    inputs: tuple[str, ...] | None
    files: tuple[str, ...] | None = None


@dataclass(frozen=True)
class Inspection:
    """What the agent should record for a proof; see ``agent/inspection.py``.

    Attributes:
        gradient_steps: the number of optimizer steps of each parameter whose gradients are
            recorded.
        state: whether to record the state of the modules at the end, and the outputs of forward
            calls outside training.
        outputs: the number of these forward calls that are recorded in every detail.
        only_in_warmup: whether no gradients are recorded after the warm-up of a relay, because
            reading them takes time.
    """

    gradient_steps: int = 0
    state: bool = False
    outputs: int = 0
    only_in_warmup: bool = False


@dataclass(frozen=True)
class ProvenLoss:
    """The loss of one backward call of the step, in the proof of the plan.

    Attributes:
        final: the mean over the last quarter of the proof's steps: the larger one of the means
            under the baseline and under the plan.
        margin: one seed-to-seed standard deviation of the baseline.
    """

    final: float
    margin: float


@dataclass(frozen=True)
class GuardRequest:
    """The losses of a proof, with which the guard compares the losses of a run.

    Attributes:
        steps: the number of steps from the start of the program that the proof covers; 0: there is
            no proof.
        losses: one entry for each backward call of a step.
    """

    steps: int = 0
    losses: tuple[ProvenLoss, ...] = ()


@dataclass(frozen=True)
class Ranks:
    """Several processes that each run the whole command, as one program (``launch/companions.py``).

    Attributes:
        size: how many, at least 2.
        seed: for the generators that the program does not seed: all ranks draw the same numbers.
        hash_seed: ``PYTHONHASHSEED`` of all ranks where the user has set none: sets of strings have
            the same order.
        processors: the numbers of the processors that the ranks share.
        threads: the number of threads that the user's environment sets; ``None``: it sets none.
        goes_alone: whether rank 0 goes on alone where the ranks cannot go on together and its state
            is whole; otherwise it stops.
        gives_up: whether rank 0 goes on alone where the ranks cost more time than they can save.
    """

    size: int
    seed: int
    hash_seed: int
    processors: tuple[int, ...] = ()
    threads: int | None = None
    goes_alone: bool = False
    gives_up: bool = False


@dataclass(frozen=True)
class Request:
    """The request to the agent for one run.

    Attributes:
        settings: a map from knobs to settings, applied from the first step to the last.
        stop_steps: the number of steps after which the program is stopped; ``None``: no limit.
        stop_seconds: the time since the end of the first step after which the program is stopped at
            the next step boundary, even if ``stop_steps`` has not been reached; ``None``: no limit.
        least_steps: the number of steps that are timed even after ``stop_seconds``.
        profile_steps: the number of steps to profile after the timed steps; the FLOPs of one more
            step are counted. 0: no profile.
        replay: the replay of calls after the profile; ``None``: no replay.
        comparison: the comparison of arms inside the process; ``None``: no comparison.
        learn: whether the program continues after the comparison, with the settings that were
            faster. Each arm then has one setting.
        relay: the other run to alternate with; the program is stopped after the last block.
        seed: the seed for torch, ``random`` and NumPy, set before the program's own code runs. The
            run's seed, times a constant, is also added to every seed that the program sets
            (``agent/seeds.py``). ``None``: no seeds are changed.
        proof: the conditions under which some of the settings apply; ``None``: all settings apply.
        inspection: what the agent should record for a proof; ``None``: nothing.
        guard: the losses for the guard; ``None``: there is no guard.
        ranks: the processes that share the work; ``None``: the program is one process.
    """

    settings: dict[str, str] = field(default_factory=dict)
    stop_steps: int | None = None
    stop_seconds: float | None = None
    least_steps: int = 0
    profile_steps: int = 0
    replay: Replay | None = None
    comparison: Comparison | None = None
    learn: bool = False
    relay: Relay | None = None
    seed: int | None = None
    proof: ProvenConditions | None = None
    inspection: Inspection | None = None
    guard: GuardRequest | None = None
    ranks: Ranks | None = None

    def write(self, run_directory: Path) -> None:
        """Write ``request.json`` into the directory of a run."""
        document = {"version": REQUEST_VERSION, **codec.encode(self)}
        (run_directory / REQUEST_FILE).write_text(json.dumps(document, indent=1) + "\n")

    @classmethod
    def read(cls, run_directory: Path) -> Request:
        """Read ``request.json`` from the directory of a run.

        Raises:
            RequestError: the file is not a request of this version.
            OSError: the file cannot be read.
        """
        path = run_directory / REQUEST_FILE
        try:
            document = json.loads(path.read_text())
            version = document.pop("version", None) if isinstance(document, dict) else None
            if version != REQUEST_VERSION:
                raise RequestError(
                    f"request version {one_line(version)}, expected {REQUEST_VERSION}"
                )
            return codec.decode(cls, document, codec.STRICT_JSON)
        except RequestError:
            raise
        except (ValueError, RecursionError) as error:
            raise RequestError(f"{path} is not a request: {one_line(error)}") from error
