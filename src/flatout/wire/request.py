"""What the controller asks of the agent: one JSON file, ``request.json``, in the run directory.

The controller writes it before the job starts. The agent of every process of the job reads it when
torch is imported. This file imports only the standard library, because both halves load it.
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
"""Environment variable that names the run directory to the agent."""
DISABLE_VARIABLE = "FLATOUT_DISABLE"
"""Environment variable that switches the agent off when it is ``1``."""
RANK_VARIABLE = "FLATOUT_RANK"
"""Environment variable that gives a process of a run with ``--ranks`` its rank."""
RANKS_VARIABLE = "FLATOUT_RANKS"
"""Environment variable that gives such a process the number of ranks."""
SEED_VARIABLE = "FLATOUT_SEED"
"""Environment variable by which the hook seeds ``random`` alike on all ranks."""


class RequestError(ValueError):
    """A request cannot be read: it is not JSON, or of another version, or a value does not fit."""


@dataclass(frozen=True)
class Comparison:
    """A comparison inside one process: its arms alternate in blocks of steps (A B A B ...).

    Attributes:
        arms: a ``knob -> setting`` map for each arm; the first arm is the baseline (usually empty).
        block_steps: steps of a block, including the discarded ones.
        discard_steps: steps after each switch that are left out of the ratio.
        warmup_steps: steps before the first block, under the baseline.
        first_steps: steps that an arm makes before the rounds begin, if it has a setting that no
            arm before it has; allocation and compilation belong to no ratio.
        rounds: the maximum number of blocks of each arm.
        decide: what ends the comparison before all ``rounds``; it is looked at after every second
            round. ``None``: nothing does. ``"arms"``: an arm that gains less than ``worthwhile``,
            beyond noise, leaves; the comparison ends when all others are faster than the baseline,
            beyond noise. ``"fastest"``: an arm that is slower than the leading one, beyond noise,
            leaves as well; the comparison ends when one arm is left. ``"settings"``: no arm leaves;
            the comparison ends when it is clear for each setting whether it gains ``worthwhile``
            (for the stacks of ``tune.design``).
        worthwhile: the least ratio that is worth having, above 1.
    """

    arms: tuple[dict[str, str], ...]
    block_steps: int = 8
    discard_steps: int = 2
    warmup_steps: int = 3
    first_steps: int = 3
    rounds: int = 8
    decide: Literal["arms", "fastest", "settings"] | None = None
    worthwhile: float = 1.02

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
        """Steps that the comparison takes when nothing ends it early."""
        first = self.first_steps * len(self.arms_with_first_steps)
        return self.warmup_steps + first + len(self.arms) * self.rounds * self.block_steps


@dataclass(frozen=True)
class Relay:
    """Two runs that alternate in blocks of steps, see ``agent/relay.py``.

    Attributes:
        folder: path of a folder that both runs know; the baton lies there.
        place: 0 for the run that begins, 1 for the other.
        block_steps: steps of a block, including the discarded ones.
        discard_steps: steps after each wait that are left out of the ratio, at least 1.
        warmup_steps: steps before the first block, at least 1; the second run makes its own after
            the first has made them.
        blocks: blocks of each run.
    """

    folder: str
    place: int
    block_steps: int = 3
    discard_steps: int = 1
    warmup_steps: int = 3
    blocks: int = 8


@dataclass(frozen=True)
class Proof:
    """The conditions under which some settings were proven; elsewhere they are not applied.

    Attributes:
        knobs: the knobs whose settings hold only under these conditions.
        torch: the version of torch.
        inputs: the inputs of the first outermost module call, in the words of
            ``wire/signature.py``; ``None``: not known.
        files: paths of the files that the program may consist of; ``None``: not known.
    """

    knobs: tuple[str, ...]
    torch: str | None
    inputs: tuple[str, ...] | None
    files: tuple[str, ...] | None = None


@dataclass(frozen=True)
class Inspection:
    """What a proof has recorded of what the program computes; see ``agent/inspection.py``.

    Attributes:
        gradient_steps: how many updates of each parameter have their gradients recorded.
        state: whether the parameters and buffers at the end are recorded, and the outputs of
            forward passes that do not train.
        outputs: how many of these forward passes are recorded in every detail.
    """

    gradient_steps: int = 0
    state: bool = False
    outputs: int = 0


@dataclass(frozen=True)
class ProvenLoss:
    """The loss of one backward call of the step, as the proof of the plan has seen it.

    Attributes:
        final: mean over the last quarter of the proof's steps; the larger of bare's and the plan's.
        margin: one seed-to-seed standard deviation of bare.
    """

    final: float
    margin: float


@dataclass(frozen=True)
class GuardRequest:
    """Turns on the guard, and gives the losses that it compares those of the run with.

    Attributes:
        steps: how many steps from the start of the program the proof covers; 0: there is no proof.
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
    """

    size: int
    seed: int
    hash_seed: int


@dataclass(frozen=True)
class Request:
    """What the agent shall do in this run.

    Attributes:
        settings: ``knob -> setting``, applied from the first step to the last.
        stop_steps: steps after which the program is stopped; ``None``: it runs to its end.
        stop_seconds: seconds since the end of the first step after which the program is stopped at
            the next step boundary, even when ``stop_steps`` has not been reached.
        profile_steps: steps to profile after the timed ones; the operations of one more step are
            counted.
        comparison: arms to compare inside the process.
        learn: whether the program goes on, after the comparison, under the settings that were
            faster; the arms are then single settings.
        relay: another run to alternate with; the program is stopped when all blocks are over.
        seed: seed for torch, ``random`` and NumPy, set before the program's own code runs. Unless
            it is 0, it also moves the seeds that the program sets itself (``agent/seeds.py``).
        proof: the conditions under which some of the settings apply.
        inspection: what to record beside times and losses.
        guard: turns on the guard; ``None``: there is no guard.
        ranks: the processes that share the work; ``None``: the program is one process.
    """

    settings: dict[str, str] = field(default_factory=dict)
    stop_steps: int | None = None
    stop_seconds: float | None = None
    profile_steps: int = 0
    comparison: Comparison | None = None
    learn: bool = False
    relay: Relay | None = None
    seed: int | None = None
    proof: Proof | None = None
    inspection: Inspection | None = None
    guard: GuardRequest | None = None
    ranks: Ranks | None = None

    def write(self, run_directory: Path) -> None:
        """Write ``request.json`` into ``run_directory``."""
        document = {"version": REQUEST_VERSION, **codec.encode(self)}
        (run_directory / REQUEST_FILE).write_text(json.dumps(document, indent=1) + "\n")

    @classmethod
    def read(cls, run_directory: Path) -> Request:
        """Read ``request.json`` from ``run_directory``.

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
