"""What the controller asks of the agent: one JSON file, ``request.json``, in the run directory.

The controller writes it before the job starts; the agent of every process of the job reads it when
torch is imported. Standard library only: both halves load this file.
"""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

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
        rounds: how often every arm gets its turn.
    """

    arms: tuple[dict[str, str], ...]
    block_steps: int = 8
    discard_steps: int = 2
    warmup_steps: int = 3
    rounds: int = 8


@dataclass(frozen=True)
class Proof:
    """What some of the settings were proven with; where the program differs, they are left out.

    Attributes:
        knobs: whose settings hold only there.
        torch: its version.
        inputs: of the first outermost module call, in the words of ``flatout.signature``; ``None``
            where they are not known.
    """

    knobs: tuple[str, ...]
    torch: str | None
    inputs: tuple[str, ...] | None


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
        stop_seconds: stop at the first step boundary after this many seconds since torch was
            imported, even when ``stop_steps`` has not been reached.
        profile_steps: after the timed steps, profile this many more (and count the FLOPs of one).
        comparison: arms to compare inside the process.
        seed: seed set for torch, ``random`` and NumPy before the program's own code runs.
        proof: under which conditions some of the settings apply.
        guard: have the guard watch over what the settings change, with these losses in mind.
    """

    settings: dict[str, str] = field(default_factory=dict)
    stop_steps: int | None = None
    stop_seconds: float | None = None
    profile_steps: int = 0
    comparison: Comparison | None = None
    seed: int | None = None
    proof: Proof | None = None
    guard: Envelope | None = None

    def write(self, run_directory: Path) -> None:
        """Write ``request.json`` into ``run_directory``."""
        document = {"version": REQUEST_VERSION, **dataclasses.asdict(self)}
        (run_directory / REQUEST_FILE).write_text(json.dumps(document, indent=1) + "\n")

    @classmethod
    def read(cls, run_directory: Path) -> Request:
        """Read ``request.json`` from ``run_directory``.

        Raises:
            RequestError: the file is not a request of this version.
            OSError: the file cannot be read.
        """
        try:
            document: dict[str, Any] = json.loads((run_directory / REQUEST_FILE).read_text())
            version = document.pop("version", None)
            if version != REQUEST_VERSION:
                raise RequestError(f"request version {version}, expected {REQUEST_VERSION}")
            comparison = document.pop("comparison", None)
            if comparison is not None:
                comparison["arms"] = tuple(comparison["arms"])
                comparison = Comparison(**comparison)
            proof = document.pop("proof", None)
            if proof is not None:
                inputs = proof["inputs"] if proof["inputs"] is None else tuple(proof["inputs"])
                proof = Proof(tuple(proof["knobs"]), proof["torch"], inputs)
            guard = document.pop("guard", None)
            if guard is not None:
                losses = tuple(ProvenLoss(**loss) for loss in guard["losses"])
                guard = Envelope(guard["steps"], losses)
            return cls(comparison=comparison, proof=proof, guard=guard, **document)
        except (json.JSONDecodeError, TypeError, KeyError, AttributeError) as error:
            raise RequestError(
                f"{run_directory / REQUEST_FILE} is not a request: {error}"
            ) from error
