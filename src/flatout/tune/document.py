"""What a tune found, as one JSON document: for machines, for ``flatout report`` and its page.

Null is "not measured", never 0. A number that is not finite (a loss that has diverged) is one of
the strings ``"NaN"``, ``"Infinity"`` and ``"-Infinity"``, as in the JSON mapping of Protocol
Buffers (https://protobuf.dev/programming-guides/json/), since JSON has no such numbers. Keys that
are not known are ignored.
"""

from __future__ import annotations

import dataclasses
import json
import math
import types
import typing
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple, Union

from flatout.doctor.findings import Finding
from flatout.errors import UserError
from flatout.plan import Fact, LossEvidence
from flatout.text import one_line
from flatout.wire.ratios import Ratio
from flatout.wire.turns import PHASES

DOCUMENT_VERSION = 1
DOCUMENT_FILE = "result.json"

PARTS = (*PHASES, "evaluation")
"""Of a step as a document has it: its phases, and its share of the evaluation passes between the
steps."""

Stage = Literal["inside one process", "fresh processes"]
State = Literal["won", "no gain", "failed", "not tried", "left out", "running"]


class DocumentError(UserError):
    """A file that holds no result of a tune; the message names the file and the place in it."""


@dataclass(frozen=True)
class Side:
    """The bare program, or the program with the plan.

    Attributes:
        step_ms: the step, the one statistic of step times in a document: the mean over a run after
            its warm-up, with its share of the evaluation passes between the steps; of several runs,
            their geometric mean, so that bare over plan is the claimed ratio. See
            ``tune.pairs.paired_ms``.
        startup_s: from the start of the process to the first step.
        warmup_s: compilation and first steps: what they took beyond as many later steps.
        peak_rss_bytes: most memory of the main process, median of the runs, as in
            ``tune.memory.refusal``.
        peak_device_bytes: most memory that torch had allocated on the accelerator, likewise.
        job_s: projected time of the whole job: start-up, compilation, steps, evaluation.
        phases_ms: of each of ``PARTS`` in a step; they sum to ``step_ms``.
    """

    step_ms: float | None = None
    startup_s: float | None = None
    warmup_s: float | None = None
    peak_rss_bytes: int | None = None
    peak_device_bytes: int | None = None
    job_s: float | None = None
    phases_ms: Mapping[str, float | None] = dataclasses.field(default_factory=dict)


@dataclass(frozen=True)
class Arm:
    """Settings that were compared with the bare program, or might have been.

    Attributes:
        settings: ``knob -> setting``.
        label: in a few words, as ``precision=bf16, optimizer=onepass``.
        stage: how they were compared.
        ratio: bare step time over theirs.
        state: what came of it.
        why: the reason of the state, one sentence; may be empty.
        bound: largest ratio that the profile allows: ``1 / (1 - share)`` of what they speed up
            (Amdahl 1967).
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
        summary, by_hand: of its card; ``by_hand`` is Markdown.
        exactness: what the setting may change, in the words of ``EXACTNESS``.
        alone: bare step time over that with this knob alone.
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
    """One check of the proof; ``passed`` is ``None`` where it could not be made.

    Attributes:
        name: what is checked, in a few words.
        why: the verdict in one sentence.
        figures: what it was judged by.
    """

    name: str
    passed: bool | None
    why: str
    figures: Mapping[str, Fact | None] = dataclasses.field(default_factory=dict)


class CurvePoint(NamedTuple):
    """A point of a loss curve: mean over the seeds, with the spread between them."""

    step: int
    mean: float | None
    low: float | None
    high: float | None


@dataclass(frozen=True)
class Curves:
    """The losses of one backward call of the step, in words ``site``; points in order of steps."""

    site: str
    bare: tuple[CurvePoint, ...]
    plan: tuple[CurvePoint, ...]


@dataclass(frozen=True)
class Proof:
    """Whether the plan computes the same.

    Attributes:
        passed: the verdict; ``None``: inconclusive, since no loss has fallen over these steps, so
            that only what else was checked has passed.
        kind: which claim was checked.
        why: the verdict in one sentence.
        steps: horizon: how many steps from the start it covers.
        seeds: how many seeds it was repeated with.
        bare_repeats: whether bare gave identical losses twice; ``None``: not tried.
        checks: what it consists of.
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
        torch: version.
        machine: facts about the machine.
        seconds: how long the whole tune took.
        finished_unix_s: when it ended.
        plan: file of the plan, ``None`` when none was written.
        settings: of the plan, ``knob -> setting``.
        why: one sentence: why this plan, or why none.
        baseline, with_plan: the program without and with the plan.
        claim: bare step time over the plan's, from fresh processes in alternation.
        break_even_steps: steps after which the plan has made up for the tune and its longer start.
        arms: everything that was compared, or left out with a reason.
        knobs: of the plan.
        proof: of the plan, or of the last that was refused.
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
    arms: tuple[Arm, ...]
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
            return _dataclass(document, cls, "")  # type: ignore[no-any-return]
        except _MismatchError as mismatch:
            why = one_line(mismatch)
            raise DocumentError(f"{path} is not a result of flatout tune: {why}") from mismatch

    def to_json(self) -> str:
        """The document as it is kept in a file."""
        return json.dumps(_finite(dataclasses.asdict(self)), indent=1, allow_nan=False) + "\n"


_LAST_UNIX_S = 253402300800
"""Begin of the year 10000, which no calendar knows."""

_NOT_FINITE = {"NaN": math.nan, "Infinity": math.inf, "-Infinity": -math.inf}


def _finite(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return "NaN" if math.isnan(value) else f"{'-' if value < 0 else ''}Infinity"
    return value


class _MismatchError(Exception):
    """Which value is not of its type; one clause."""


def _value(value: Any, kind: Any, where: str) -> Any:
    """``value`` as an instance of the type ``kind``."""
    origin, parameters = typing.get_origin(kind), typing.get_args(kind)
    if origin in (Union, types.UnionType):
        if value is None and type(None) in parameters:
            return None
        members = [member for member in parameters if member is not type(None)]
        if len(members) == 1:
            return _value(value, members[0], where)
        if not isinstance(value, (str, int, float)):
            raise _MismatchError(f"{where} must be a string, a number, or true or false")
        return value
    if origin is Literal:
        if value not in parameters:
            raise _MismatchError(f"{where} must be one of: {', '.join(parameters)}")
        return value
    if origin is Mapping:
        if not isinstance(value, dict):
            raise _MismatchError(f"{where} must be an object")
        return {k: _value(item, parameters[1], f"{where}.{k}") for k, item in value.items()}
    if origin in (tuple, list):
        if not isinstance(value, list):
            raise _MismatchError(f"{where} must be a list")
        return origin(_value(v, parameters[0], f"{where}[{n}]") for n, v in enumerate(value))
    if kind is CurvePoint:
        return _curve_point(value, where)
    if dataclasses.is_dataclass(kind):
        return _dataclass(value, kind, where)
    return _scalar(value, kind, where)


def _dataclass(value: Any, kind: Any, where: str) -> Any:
    if not isinstance(value, dict):
        raise _MismatchError(f"{where} must be an object")
    hints = typing.get_type_hints(kind)
    values = {}
    for described in dataclasses.fields(kind):
        place = f"{where}.{described.name}" if where else described.name
        if described.name not in value:
            raise _MismatchError(f"it has no {place}")
        values[described.name] = _value(value[described.name], hints[described.name], place)
    made = kind(**values)
    if isinstance(made, Ratio) and not (made.value > 0 and 0 < made.low <= made.high):
        raise _MismatchError(f"{where} must be positive, with an interval from low to high")
    is_finished = isinstance(made, Document) and made.finished_unix_s is not None
    if is_finished and not 0 <= made.finished_unix_s < _LAST_UNIX_S:
        raise _MismatchError("finished_unix_s is no time of this age")
    return made


def _curve_point(value: Any, where: str) -> CurvePoint:
    if not isinstance(value, list) or len(value) != len(CurvePoint._fields):
        raise _MismatchError(f"{where} must be a list of {', '.join(CurvePoint._fields)}")
    hints = typing.get_type_hints(CurvePoint)
    named = zip(hints.items(), value, strict=True)
    return CurvePoint(*(_value(item, kind, f"{where}.{name}") for (name, kind), item in named))


def _scalar(value: Any, kind: Any, where: str) -> Any:
    if kind is float:
        number = _NOT_FINITE.get(value, value) if isinstance(value, str) else value
        if isinstance(number, (int, float)) and not isinstance(number, bool):
            try:
                return float(number)
            except OverflowError:
                raise _MismatchError(f"{where} is larger than any number") from None
        raise _MismatchError(f"{where} must be a number")
    if not isinstance(value, kind) or (kind is int and isinstance(value, bool)):
        meaning = {str: "a string", int: "an integer", bool: "true or false"}[kind]
        raise _MismatchError(f"{where} must be {meaning}")
    return value
