"""What a tune found, as one JSON document: for programs, for ``flatout report`` and its page.

Null means "not measured"; 0 never does. A number that is not finite (a loss that has diverged) is
one of the strings that ``wire/codec.py`` names, since JSON has no such numbers. Unknown keys are
ignored.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, NamedTuple

from flatout.doctor.findings import Finding
from flatout.errors import UserError
from flatout.plan import Fact, LossEvidence
from flatout.text import one_line
from flatout.wire import codec
from flatout.wire.ratios import Ratio
from flatout.wire.turns import PHASES

DOCUMENT_VERSION = 1
DOCUMENT_FILE = "result.json"

PARTS = (*PHASES, "evaluation")
"""The parts of a step in a document: its phases, and its share of the evaluation passes between the
steps."""

Stage = Literal["inside one process", "fresh processes"]
State = Literal["won", "no gain", "failed", "not tried", "left out", "running"]


class DocumentError(UserError):
    """A file holds no result of a tune; the message names the file and the place in it."""


@dataclass(frozen=True)
class Side:
    """The bare program, or the program with the plan.

    Attributes:
        step_ms: time of a step, the only statistic of step times in a document. It is the mean
            over a run after its warm-up, with the step's share of the evaluation passes between
            the steps. Over several runs it is the geometric mean, so that bare over plan is the
            claimed ratio. See ``tune.pairs.paired_ms``.
        startup_s: time from the start of the process to the first step.
        warmup_s: what compilation and the first steps took beyond as many later steps.
        peak_rss_bytes: most memory of the main process, median of the runs, as in
            ``tune.memory.refusal``.
        peak_device_bytes: most memory that torch had allocated on the accelerator, median of the
            runs.
        job_s: projected time of the whole job: start-up, compilation, steps, evaluation.
        phases_ms: time of each of ``PARTS`` in a step; they sum to ``step_ms``.
    """

    step_ms: float | None = None
    startup_s: float | None = None
    warmup_s: float | None = None
    peak_rss_bytes: int | None = None
    peak_device_bytes: int | None = None
    job_s: float | None = None
    phases_ms: Mapping[str, float | None] = dataclasses.field(default_factory=dict)


@dataclass(frozen=True)
class TriedSettings:
    """Settings that were compared with the bare program, or might have been.

    Attributes:
        settings: ``knob -> setting``.
        label: the settings in a few words, such as ``precision=bf16, optimizer=onepass``.
        stage: how they were compared.
        ratio: bare step time over theirs.
        state: the outcome.
        why: the reason of the state, one sentence; may be empty.
        bound: largest ratio that the profile allows: ``1 / (1 - share)``, with the share of a step
            that they speed up (Amdahl 1967).
    """

    settings: Mapping[str, str]
    label: str
    stage: Stage
    ratio: Ratio | None
    state: State
    why: str = ""
    bound: float | None = None


@dataclass(frozen=True)
class KnobResult:
    """A knob of the plan.

    Attributes:
        knob, setting: as in the plan.
        summary: what the knob does, one sentence.
        by_hand: how to do the same in one's own code, in Markdown.
        exactness: what the setting may change, in the words of ``EXACTNESS``.
        alone: bare step time over the step time with this knob alone.
        without_it: step time of the plan without this knob over that of the whole plan.
    """

    knob: str
    setting: str
    summary: str
    exactness: str
    by_hand: str
    alone: Ratio | None = None
    without_it: Ratio | None = None


@dataclass(frozen=True)
class Check:
    """One check of the proof.

    Attributes:
        name: what is checked, in a few words.
        passed: the verdict; ``None``: the check could not be made.
        why: the verdict in one sentence.
        measurements: the measured values and limits by which it was judged, by name.
    """

    name: str
    passed: bool | None
    why: str
    measurements: Mapping[str, Fact | None] = dataclasses.field(
        default_factory=dict, metadata=codec.stored_as("figures")
    )


class CurvePoint(NamedTuple):
    """A point of a loss curve: the mean over the seeds, and the mean less and plus their spread."""

    step: int
    mean: float | None
    low: float | None
    high: float | None


@dataclass(frozen=True)
class Curves:
    """The losses of one backward call of the step.

    Attributes:
        site: names the backward call, such as ``loss 1``.
        bare, plan: points of both curves, in order of steps.
    """

    site: str
    bare: tuple[CurvePoint, ...]
    plan: tuple[CurvePoint, ...]


@dataclass(frozen=True)
class Proof:
    """Whether the plan computes the same.

    Attributes:
        passed: the verdict; ``None``: inconclusive, since no loss has fallen over these steps and
            only the other checks have passed.
        kind: the claim that was checked.
        why: the verdict in one sentence.
        steps: how many steps from the start the proof covers.
        seeds: how many seeds it was repeated with.
        bare_repeats: whether bare gave identical losses twice; ``None``: not tried.
        checks: the checks that it consists of.
        curves, losses: one entry for each backward call of the step.
    """

    passed: bool | None
    kind: Literal["bitwise", "non-inferior"]
    why: str
    steps: int
    seeds: int
    bare_repeats: bool | None
    checks: tuple[Check, ...] = ()
    curves: tuple[Curves, ...] = ()
    losses: tuple[LossEvidence, ...] = ()


@dataclass(frozen=True)
class Document:
    """A finished tune.

    Attributes:
        command: the job.
        program: base name of its script.
        torch: version of torch.
        machine: facts about the machine.
        seconds: how long the whole tune took.
        finished_unix_s: when the tune ended.
        plan: file of the plan; ``None``: none was written.
        settings: ``knob -> setting`` of the plan.
        why: why this plan was chosen, or why there is none, one sentence.
        baseline, with_plan: the program without and with the plan.
        claim: bare step time over the plan's, from fresh processes in alternation.
        break_even_steps: steps after which the plan has made up for the tune and its longer start.
        tried: all settings that were compared, or left out with a reason.
        knobs: the knobs of the plan.
        proof: the proof of the plan, or of the last plan that was refused.
        findings: what limits the bare program, largest share first.
        next_command: what to run now, ready for a shell.
    """

    command: tuple[str, ...]
    program: str
    torch: str | None
    machine: Mapping[str, Fact | None]
    seconds: float | None
    finished_unix_s: float | None
    plan: str | None
    settings: Mapping[str, str]
    why: str
    baseline: Side
    with_plan: Side | None
    claim: Ratio | None
    break_even_steps: int | None
    tried: tuple[TriedSettings, ...] = dataclasses.field(metadata=codec.stored_as("arms"))
    knobs: tuple[KnobResult, ...]
    proof: Proof | None
    findings: tuple[Finding, ...]
    next_command: str | None
    version: int = DOCUMENT_VERSION

    @classmethod
    def read(cls, path: Path) -> Document:
        """Read and check a document.

        Raises:
            DocumentError: the file cannot be read, or holds something else.
        """
        try:
            document = json.loads(path.read_text("utf-8"))
        except OSError as error:
            raise DocumentError(f"{path} cannot be read: {error.strerror}") from error
        except (ValueError, RecursionError) as error:
            raise DocumentError(f"{path} is not JSON") from error
        if not isinstance(document, dict) or "arms" not in document:
            raise DocumentError(f"{path} is not a result of flatout tune")
        version = document.get("version")
        if version != DOCUMENT_VERSION:
            raise DocumentError(
                f"{path} is a result of version {one_line(version)}, this flatout reads "
                f"{DOCUMENT_VERSION}"
            )
        try:
            return codec.decode(cls, document)
        except codec.MismatchError as mismatch:
            why = one_line(mismatch)
            raise DocumentError(f"{path} is not a result of flatout tune: {why}") from mismatch

    def check(self) -> None:
        """Raise ``MismatchError`` for a time that no calendar knows."""
        if self.finished_unix_s is not None and not 0 <= self.finished_unix_s < _YEAR_10000_UNIX_S:
            raise codec.MismatchError("is no time of this age", "finished_unix_s")

    def to_json(self) -> str:
        """The document as it is kept in a file."""
        plain = codec.encode(self, non_finite_as_strings=True)
        return json.dumps(plain, indent=1, allow_nan=False) + "\n"


_YEAR_10000_UNIX_S = 253402300800
"""Begin of the year 10000, from which on ``datetime`` has no dates."""
