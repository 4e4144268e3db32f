"""What the controller asks of the agent: one JSON file, ``request.json``, in the run directory.

The controller writes it before the job starts; the agent of every process of the job reads it when
torch is imported. Standard library only: both halves load this file.
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


class RequestError(ValueError):
    """A request that cannot be read: not JSON, another version, or an unknown key."""


@dataclass(frozen=True)
class Comparison:
    """A comparison inside one process: arms take turns in blocks of steps (A B A B ...).

    Attributes:
        arms: one ``knob -> setting`` map an arm; the first is the baseline (usually empty).
        block_steps: steps an arm keeps its turn, the discarded ones included.
        discard_steps: steps left out of the ratio after each switch.
        warmup_steps: steps before the first block, under the baseline.
        first_steps: steps of a turn before the rounds for each arm that has a setting which no arm
            before it has: allocation and compilation belong to no ratio.
        rounds: how often every arm gets its turn, at most.
        decide: what ends it before ``rounds`` are over, looked at after every second round;
            ``None``: nothing does. ``"arms"``: an arm that, beyond noise, gains less than
            ``worthwhile`` leaves, and it ends when the others are, beyond noise, faster than the
            baseline. ``"fastest"``: so too an arm that is, beyond noise, slower than the leading
            one leaves, and it ends when one is left. ``"settings"``: no arm leaves, and it ends
            when for each setting it is clear whether it gains ``worthwhile``; for the stacks of
            ``tune.design``.
        worthwhile: a ratio above 1.
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
    def first_turns(self) -> list[int]:
        """The arms that have a turn before the rounds."""
        seen = set(self.arms[0].items())
        turns = []
        for number, arm in enumerate(self.arms):
            if self.first_steps and not seen.issuperset(arm.items()):
                turns.append(number)
                seen.update(arm.items())
        return turns

    @property
    def longest_steps(self) -> int:
        """Steps that it takes when nothing ends it before."""
        first = self.first_steps * len(self.first_turns)
        return self.warmup_steps + first + len(self.arms) * self.rounds * self.block_steps


@dataclass(frozen=True)
class Relay:
    """Two runs that take turns in blocks of steps, see ``agent/relay.py``.

    Attributes:
        folder: known to both, where the baton lies.
        place: 0 for the one that begins, else 1.
        block_steps: steps of a turn, the discarded ones included.
        discard_steps: steps left out of the ratio after each wait, at least 1.
        warmup_steps: steps before the first block, at least 1; the second makes them when the first
            has made its own.
        blocks: turns of each.
    """

    folder: str
    place: int
    block_steps: int = 3
    discard_steps: int = 1
    warmup_steps: int = 3
    blocks: int = 8


@dataclass(frozen=True)
class Proof:
    """What some of the settings were proven with; where the program differs, they are left out.

    Attributes:
        knobs: whose settings hold only there.
        torch: its version.
        inputs: of the first outermost module call, in the words of ``flatout.signature``; ``None``
            where they are not known.
        files: that the program may be made of; ``None`` where they are not known.
    """

    knobs: tuple[str, ...]
    torch: str | None
    inputs: tuple[str, ...] | None
    files: tuple[str, ...] | None = None


@dataclass(frozen=True)
class Inspection:
    """What a proof wants to see of what the program computes; see ``agent/inspection.py``.

    Attributes:
        gradient_steps: of each parameter, the gradients of its first so many updates.
        state: parameters and buffers at the end, and what passes forward without training give.
        outputs: so many of the first passes forward without training in every detail.
    """

    gradient_steps: int = 0
    state: bool = False
    outputs: int = 0


@dataclass(frozen=True)
class ProvenLoss:
    """The loss of one backward call of the step, as the proof of the plan has seen it.

    Attributes:
        final: mean over the last quarter of the proof's steps, of bare or plan, what is larger.
        margin: one standard deviation of bare's own spread.
    """

    final: float
    margin: float


@dataclass(frozen=True)
class Envelope:
    """What the guard compares losses with.

    Attributes:
        steps: from the start of the program, which the proof covers; 0: there is no proof.
        losses: one for each backward call of a step.
    """

    steps: int = 0
    losses: tuple[ProvenLoss, ...] = ()


@dataclass(frozen=True)
class Request:
    """What the agent shall do in this run.

    Attributes:
        settings: ``knob -> setting``, applied from the first step to the last.
        stop_steps: stop the program after this many steps, ``None``: run to its end.
        stop_seconds: stop at the first step boundary after this many seconds since the first step
            was over, even when ``stop_steps`` has not been reached.
        profile_steps: after the timed steps, profile this many more (and count the FLOPs of one).
        comparison: arms to compare inside the process.
        learn: after the comparison, whose arms are single settings, the program goes on under
            those that were faster.
        relay: another run to take turns with; the program is stopped when all turns are over.
        seed: seed set for torch, ``random`` and NumPy before the program's own code runs; unless
            it is 0, it also moves the seeds that the program sets itself (``agent/seeds.py``).
        proof: under which conditions some of the settings apply.
        inspection: what to record beyond times and losses.
        guard: have the guard watch over what the settings change, with these losses in mind.
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
    guard: Envelope | None = None

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
