"""The result of a tune as one JSON document, which programs and ``flatout report`` can read.

A number that was not measured is null, never 0. Where null means something else, the attribute says
so. A number that is not finite, such as a loss that has diverged, is stored as one of the strings
that ``wire/codec.py`` names, since JSON has no such numbers. Unknown keys are ignored.
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
"""The parts into which a document splits the time of a step: its phases, such as data, forward and
backward, and its share of the evaluation passes between the steps."""

Stage = Literal["inside one process", "fresh processes"]
State = Literal["won", "no gain", "failed", "not tried", "left out", "running"]


class DocumentError(UserError):
    """A file does not hold the result of a tune; the message names the file and the place in it."""


@dataclass(frozen=True)
class Side:
    """The bare program, or the program with the plan.

    Attributes:
        step_ms: the time of a step, from which the claimed ratio is computed. For one run, it is
            the mean after the warm-up, and includes the step's share of the evaluation passes
            between the steps. For several runs, it is the geometric mean of their times, so that
            the bare program's step time divided by the plan's is the claimed ratio. See
            ``tune.pairs.Pairs.times_ms``.
        median_step_ms: the median step time of a run, without evaluation passes. For several runs,
            it is the geometric mean of their medians.
        startup_s: the time from the import of torch to the first step.
        warmup_s: the extra time of the first steps: their total time minus the time of the same
            number of later steps. Compilation is included.
        peak_rss_bytes: the peak memory of the main process or, under the knob ``ranks``, of all
            ranks together; the median of the runs. See ``tune.memory.refusal``.
        peak_device_bytes: the peak of the memory that torch had allocated on the accelerator; the
            median of the runs.
        job_s: the projected time of the whole job: start-up, compilation, steps, evaluation.
        phases_ms: the time of each of ``PARTS`` in a step; these times sum to ``step_ms``.
    """

    step_ms: float | None = None
    median_step_ms: float | None = None
    startup_s: float | None = None
    warmup_s: float | None = None
    peak_rss_bytes: int | None = None
    peak_device_bytes: int | None = None
    job_s: float | None = None
    phases_ms: Mapping[str, float | None] = dataclasses.field(default_factory=dict)


@dataclass(frozen=True)
class TriedSettings:
    """Settings that were tried, or considered and not tried.

    Attributes:
        settings: the setting of each knob. If no setting of a knob was tried, it is empty, and
            ``label`` is the name of the knob.
        label: the settings in a few words, such as ``precision=bf16, optimizer=onepass``.
        stage: how the settings were compared.
        ratio: the step time without the settings divided by the step time with them. The stage
            decides how the ratio is measured. In fresh processes, the stack (the settings chosen so
            far, applied together) is compared with and without these settings. Inside one process,
            the ratio usually comes from a factorial comparison (``tune.design``), with two
            exceptions. If the program crashed under a combination, or if the knob's settings are
            always compared alone (``Knob.is_compared_alone``), the program under these settings and
            no others is compared with the bare program. If predictions choose the stack
            (``tune.predicted``), the stack is compared with and without these settings.
        state: the result.
        why: the reason for the state, in one sentence; it may be empty.
        bound: the largest ratio that the profile allows: ``1 / (1 - share)``, where ``share`` is
            the part of a step that the settings speed up (Amdahl 1967).
        predicted: the ratio to the bare program, predicted from calls of a step that were replayed
            one by one (``tune.prediction``). Its ``pairs`` is the number of rounds of the replay.
    """

    settings: Mapping[str, str]
    label: str
    stage: Stage
    ratio: Ratio | None
    state: State
    why: str = ""
    bound: float | None = None
    predicted: Ratio | None = None


@dataclass(frozen=True)
class KnobResult:
    """A knob of the plan.

    Attributes:
        knob, setting: the names of the knob and its setting.
        summary: what the knob does, in one sentence.
        by_hand: how to do the same in one's own code, in Markdown.
        exactness: what the setting may change, in the words of ``EXACTNESS``.
        in_process: the ratio of this setting inside one process, see ``TriedSettings.ratio``. A
            factorial comparison gives the mean effect of the setting over its combinations with
            other settings.
        gain_on_top: how many times faster this setting made the stack: the step time without the
            knob divided by the step time with this setting. The stack is the settings that were
            applied together when this gain was measured. Other settings may have joined or left the
            stack before the stack became the plan.
        predicted: see ``TriedSettings.predicted``.
    """

    knob: str
    setting: str
    summary: str
    exactness: str
    by_hand: str
    in_process: Ratio | None = dataclasses.field(default=None, metadata=codec.stored_as("alone"))
    gain_on_top: Ratio | None = dataclasses.field(
        default=None, metadata=codec.stored_as("without_it")
    )
    predicted: Ratio | None = None


@dataclass(frozen=True)
class CheckResult:
    """One check of the proof.

    Attributes:
        name: the property that is checked, in a few words.
        passed: whether the check passed; ``None`` if the result is open, because the check could
            not be made or proves little.
        why: the verdict in one sentence.
        measurements: a map from names to the measured values and limits that decide the check.
    """

    name: str
    passed: bool | None
    why: str
    measurements: Mapping[str, Fact | None] = dataclasses.field(
        default_factory=dict, metadata=codec.stored_as("figures")
    )


class CurvePoint(NamedTuple):
    """A point of a loss curve: the mean over the seeds, and this mean minus and plus the standard
    deviation between seeds."""

    step: int
    mean: float | None
    low: float | None
    high: float | None


@dataclass(frozen=True)
class Curves:
    """The losses of one backward call of the step.

    Attributes:
        site: the name of the backward call, such as ``loss 1``.
        bare, plan: the points of bare's curve and of the plan's, in the order of the steps.
    """

    site: str
    bare: tuple[CurvePoint, ...]
    plan: tuple[CurvePoint, ...]


@dataclass(frozen=True)
class ProofResult:
    """The result of a proof: whether the plan computes the same as the bare program.

    Attributes:
        passed: whether the proof passed; ``None`` if it is inconclusive: no check has failed, but
            no loss has fallen over these steps, so that only the other checks prove something.
        kind: ``bitwise`` if everything that was compared is identical, otherwise ``non-inferior``.
        why: the verdict in one sentence.
        steps: the number of steps that the proof covers, from the start of the program.
        seeds: the number of seeds from which bare and plan were run.
        bare_repeats: whether the bare program gave identical results in two runs from one seed;
            ``None`` if this was not tried.
        checks: the checks of which the proof consists.
        curves: the loss curves of each backward call of the step.
        losses: the evidence from the losses of each backward call of the step.
    """

    passed: bool | None
    kind: Literal["bitwise", "non-inferior"]
    why: str
    steps: int
    seeds: int
    bare_repeats: bool | None
    checks: tuple[CheckResult, ...] = ()
    curves: tuple[Curves, ...] = ()
    losses: tuple[LossEvidence, ...] = ()


@dataclass(frozen=True)
class QuietnessResult:
    """How far other processes have disturbed the pairs of runs behind a claim.

    Attributes:
        others_share: the share of the job's CPUs (those that it may use) that other processes took
            during all pairs, on average.
        quiet_share: the share of the blocks that count. A block consists of consecutive steps of
            one run of a pair and the same steps of the other run. It counts if other processes did
            not disturb it (``tune.quiet``).
        pairs: the number of pairs.
        counted: the number of pairs that count, because enough of their blocks do.
        floors: bare's floors divided by the plan's floors, for the blocks that count. The same
            block of steps is timed in every pair. Its floor on one side is a low quantile of these
            times, because other processes can only make a block slower. ``None``: there are too few
            blocks.
        why_not_measurable: why no speedup can be claimed, as a clause; ``None`` if a speedup can be
            claimed.
    """

    others_share: float | None
    quiet_share: float
    pairs: int
    counted: int
    floors: Ratio | None = None
    why_not_measurable: str | None = None


@dataclass(frozen=True)
class Document:
    """A finished tune.

    Attributes:
        command: the command line of the job.
        program: the base name of the job's script.
        torch: the version of torch.
        machine: facts about the machine.
        seconds: the time that the whole tune took.
        finished_unix_s: the time at which the tune ended.
        plan: the path of the plan's file; ``None`` if no plan was written.
        settings: the setting of each knob of the plan.
        why: the reason why this plan was chosen, or why there is none, in one sentence.
        baseline, with_plan: the program without and with the plan; ``with_plan`` is ``None`` if
            there is no plan.
        claim: the bare program's step time divided by the plan's, from alternating runs of both in
            fresh processes; ``None`` if there is no plan, or if no speedup can be claimed.
        unwatched_factor: the bare program's step time without flatout's agent (its code inside the
            job) divided by its step time with the agent, estimated from page faults
            (``tune.unwatched``). ``claim`` and ``baseline`` use the step time without the agent.
        unlike_s: the time of the whole job in steps unlike those that were compared, in seconds
            (``pairs.find_unlike_s``). ``job_s`` of both sides contains it, unchanged.
        break_even_steps: the number of steps after which the plan has made up for the time of the
            tune and for the plan's longer start; ``None`` if it never does, or if there is no plan.
        tried: all settings that were compared, or left out with a reason.
        knobs: the knobs of the plan.
        proof: the proof of the plan or, without a plan, of the last settings that were put to the
            proof; ``None`` if there was no proof, or if it was not completed.
        findings: the findings about what limits the bare program; those that concern the largest
            share of a step come first.
        next_command: the command to run next, ready for a shell.
        quietness: how far other processes have disturbed the pairs of runs behind the claim;
            ``None`` if there are no pairs.
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
    proof: ProofResult | None
    findings: tuple[Finding, ...]
    next_command: str | None
    unwatched_factor: float | None = None
    unlike_s: float = 0.0
    quietness: QuietnessResult | None = None
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
        """Raise ``MismatchError`` if ``finished_unix_s`` lies before 1970 or after 9999."""
        if self.finished_unix_s is not None and not 0 <= self.finished_unix_s < _YEAR_10000_UNIX_S:
            raise codec.MismatchError("is not a valid date", "finished_unix_s")

    def to_json(self) -> str:
        """Return the text of the document's file."""
        plain = codec.encode(self, non_finite_as_strings=True)
        return json.dumps(plain, indent=1, allow_nan=False) + "\n"


_YEAR_10000_UNIX_S = 253402300800
"""The beginning of the year 10000. ``datetime`` has no dates from then on."""
