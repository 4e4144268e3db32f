"""The plan: which settings a job runs with, and the evidence for them. It is TOML, never code.

version = 2

[plan]                      # knob = "setting"; the only table that is required
precision = "bf16"

[job]                       # the job that was measured
command = ["python", "train.py"]
folder = "."                # where it was started, relative to the main script's folder
arguments = ["python", "train.py"]      # the command with its paths relative to that folder
inputs = ["float32[64,784]"]      # inputs of the first outermost module call, * where a size varies
environment = {DATA = "..."}      # digests of the variables that its source names

[machine]                   # fingerprint, as ``flatout machine`` knows it, and torch's version

[learned]                   # instead of [evidence] in a plan of flatout run --tune, never proven
state = "unproven"
measured = "in-process"
ratios = {optimizer = 1.4}  # knob = ratio inside the training process

[evidence]
settings = {precision = "bf16"}   # what was proven; a plan with other settings is unproven
ratio = 1.61                # bare step time over the plan's, from fresh processes
ratio_low, ratio_high       # 95 % confidence interval
pairs = 4
others_share, quiet_share   # how quiet it was, see ``Evidence``
bare_step_ms, plan_step_ms  # means, see ``Side.step_ms`` of ``tune.document``
[evidence.reference]        # what a later run is compared with, see ``Reference``
[evidence.in_process]       # knob = ratio of its setting inside one process
[[evidence.losses]]         # for each backward call of a step, with both curves
[[evidence.checks]]         # what was compared, with which result, and why
[[evidence.verified]]       # further proofs, added by flatout verify

[program."net.py"]          # digests of each file of the program, see ``plan/program.py``
bytes = "..."               # the file as it is; the others ignore comments and layout
module = "..."              # everything outside of its functions
"Net.forward()" = "..."

A file of version 1 has the digest of one file only (``job.program_sha256``). It is read, and its
program counts as unknown.
"""

from __future__ import annotations

import math
import os
import re
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

from flatout import knobs
from flatout.errors import UserError
from flatout.knob import UnknownSettingError
from flatout.plan import program as programs
from flatout.plan.program import Digests, Program
from flatout.text import one_line
from flatout.wire import codec
from flatout.wire.codec import (
    OMIT_NONE,
    TOML,
    Count,
    MismatchError,
    MissingKeyError,
    NotNegative,
    Positive,
    decode,
    encode,
    stored_as,
)

PLAN_VERSION = 2
_READ_VERSIONS = (1, 2)
PLAN_FILE = "flatout.toml"

Fact = str | int | float | bool


class PlanError(UserError):
    """A plan cannot be read or written; the message names file, line and key."""


@dataclass(frozen=True)
class LossEvidence:
    """The losses of one backward call of the step, bare against plan.

    Attributes:
        bare_final, plan_final: mean over the last quarter of the steps and over all seeds.
        difference: mean paired difference, plan minus bare, where it is largest.
        margin: largest mean difference that passes: one standard deviation of bare.
        margin_source: what that standard deviation is taken over: ``"seeds"``, ``"batches"``
            (steps, if the program sets its own seed), or ``"runs"`` (if the program does not
            repeat itself).
        bare_curve, plan_curve: the losses from the first step to the last; each point is a mean
            over some steps and over all seeds.
    """

    bare_final: float
    plan_final: float
    difference: float
    margin: NotNegative
    margin_source: str = field(metadata=stored_as("yardstick"))
    bare_curve: tuple[float, ...] = ()
    plan_curve: tuple[float, ...] = ()


Result = Literal["passed", "failed", "open"]
"""Result of a check; ``open``: it could not be told."""


@dataclass(frozen=True)
class Check:
    """One of the checks that a proof consists of, see ``flatout.tune.proof``.

    Attributes:
        name: what was compared.
        result: whether it passed.
        why: the reason with its figures, one clause.
        measurements: the measured values and limits by which the check was judged, by name.
        undecided: whether it failed only for lack of certainty.
    """

    name: str
    result: Result
    why: str
    measurements: Mapping[str, float] = field(default_factory=dict, metadata=stored_as("figures"))
    undecided: bool = False


@dataclass(frozen=True)
class Verified:
    """A further proof of the same settings that passed, and covers less in some way.

    Attributes:
        steps, seeds, verdict: as in ``Evidence``.
        first_seed: seed of the first pair; the others count up from it.
        checks: names of the checks that passed.
    """

    steps: Count
    seeds: Count
    verdict: str
    first_seed: Count
    checks: tuple[str, ...] = ()


@dataclass(frozen=True)
class Reference:
    """What a later run is compared with (``plan/today.py``).

    Attributes:
        bare_median_ms, plan_median_ms: the median step times of all runs behind the ratio. A median
            leaves out what happens only at some steps, which a later run may do more often.
        threads: the number of torch's intra-op threads in the runs with the plan, when torch was
            imported; ``None``: not known.
        fixed_work_us: the time of the fixed piece of work (``lines.FixedWork``) in the runs with
            the plan, a low quantile; ``None``: not measured.
    """

    bare_median_ms: Positive
    plan_median_ms: Positive
    threads: Count | None = field(default=None, metadata=codec.OMIT_NONE)
    fixed_work_us: Positive | None = field(default=None, metadata=codec.OMIT_NONE)


@dataclass(frozen=True)
class Evidence:
    """Why a plan was written; see the format above.

    Attributes:
        settings: what was proven.
        ratio, ratio_low, ratio_high: bare step time over the plan's, with its 95 % interval.
        pairs: pairs of fresh processes behind the ratio; 0 if other work made it not measurable.
        bare_step_ms, plan_step_ms: geometric means of the runs; their quotient is the ratio.
        steps: how many steps from the start the proof covers.
        seeds: how many seeds the proof was repeated with, as far as they changed anything (1: the
            program seeds itself).
        bare_repeats: whether bare gave identical losses twice.
        verdict: ``"bitwise"``, ``"non-inferior"``, or ``"inconclusive"`` (no loss has fallen, and
            all other checks passed).
        in_process: the ratio of each knob's setting inside one process, see
            ``document.KnobResult.in_process``.
        losses: one entry for each backward call of the step.
        checks: the checks that the proof consists of.
        verified: further proofs, added by ``flatout verify``.
        reference: what a later run is compared with; ``None`` in older plans.
        others_share: the share of the CPUs that other processes took in the blocks of steps behind
            the ratio; ``None``: not measured.
        quiet_share: the share of the blocks that were undisturbed, which alone count; ``None``: the
            plan was written before this was measured.
    """

    settings: Mapping[str, str]
    ratio: Positive
    ratio_low: Positive
    ratio_high: Positive
    pairs: Count
    bare_step_ms: Positive
    plan_step_ms: Positive
    steps: Count
    seeds: Count
    bare_repeats: bool
    verdict: str
    in_process: Mapping[str, Positive] = field(default_factory=dict)
    losses: tuple[LossEvidence, ...] = ()
    checks: tuple[Check, ...] = ()
    verified: tuple[Verified, ...] = ()
    reference: Reference | None = field(default=None, metadata=codec.OMIT_NONE)
    others_share: NotNegative | None = field(default=None, metadata=OMIT_NONE)
    quiet_share: NotNegative | None = field(default=None, metadata=OMIT_NONE)

    def check(self) -> None:
        """Raise ``MismatchError`` for a ratio outside of its interval."""
        if not self.ratio_low <= self.ratio <= self.ratio_high:
            raise MismatchError("must lie between ratio_low and ratio_high", "ratio")


@dataclass(frozen=True)
class Plan:
    """Settings of knobs, the job that they were chosen for, and why.

    Attributes:
        settings: ``knob -> setting``.
        command: the job; empty in a plan written by hand.
        program: files and variables that the job consists of; ``None``: not known.
        inputs: inputs of the first outermost module call, in the words of ``wire/signature.py``.
        machine: fingerprint of the machine, and torch's version.
        evidence: why the plan was written; ``None`` in a plan written by hand.
        learned: knob -> ratio inside one process, in a plan that was learned while training and is
            not proven; ``None`` in any other.
    """

    settings: Mapping[str, str]
    command: tuple[str, ...] = ()
    program: Program | None = None
    inputs: tuple[str, ...] | None = None
    machine: Mapping[str, Fact] = field(default_factory=dict)
    evidence: Evidence | None = None
    learned: Mapping[str, float] | None = None

    @property
    def proven(self) -> bool:
        """Whether the evidence is for exactly these settings."""
        return self.evidence is not None and dict(self.evidence.settings) == dict(self.settings)

    @property
    def torch(self) -> str | None:
        """Version of torch that the plan was proven with; ``None``: not known."""
        version = self.machine.get("torch")
        return version if isinstance(version, str) else None

    def differences(
        self, command: Sequence[str], fingerprint: Mapping[str, Fact]
    ) -> tuple[str, ...]:
        """List what has changed since the plan was proven, as far as it shows before the start.

        Args:
            command: the job.
            fingerprint: the fingerprint of this machine.

        Returns:
            A clause for each change.
        """
        return (*self.machine_changes(fingerprint), *self.program_changes(command))

    def machine_changes(self, fingerprint: Mapping[str, Fact]) -> tuple[str, ...]:
        """List what has changed of the machine; for argument and result see ``differences``."""
        return tuple(
            f"{key} was {self.machine[key]}, is {here}"
            for key, here in fingerprint.items()
            if self.machine.get(key, here) != here
        )

    def program_changes(self, command: Sequence[str]) -> tuple[str, ...]:
        """List what has changed of the job; for argument and result see ``differences``."""
        if self.program is None:
            changes: tuple[str, ...] = (
                "the plan does not say which files its program was made of, as older ones did not",
            )
        else:
            changes = tuple(self.program.changes(command))
        return (*changes, *self.argument_changes(command).others)

    def argument_changes(self, command: Sequence[str]) -> programs.ArgumentChanges:
        """Compare the arguments of a job with those of the plan's job."""
        return programs.argument_changes(self.command, self.program, command)

    def write(self, path: Path) -> None:
        """Write the plan; an existing file is replaced.

        Raises:
            PlanError: the file cannot be written.
        """
        import tomlkit

        document = tomlkit.document()
        learned = self.learned is not None
        verb = "run --tune, and not proven" if learned else "tune"
        document.add(tomlkit.comment(f"Written by flatout {verb}. Apply it with:"))
        document.add(tomlkit.comment(f"  flatout run --plan {path.name} -- COMMAND"))
        document.add("version", tomlkit.item(PLAN_VERSION))
        settings = tomlkit.table()
        for name, setting in self.settings.items():
            settings.add(name, setting)
            settings[name].comment(knobs.get(name).summary)
        document.add("plan", settings)
        job: dict[str, Any] = {}
        if self.command:
            job["command"] = list(self.command)
        if self.program is not None:
            job["folder"] = self.program.folder
            job["arguments"] = list(self.program.arguments)
        if self.inputs is not None:
            job["inputs"] = list(self.inputs)
        if self.program is not None and self.program.environment:
            job["environment"] = tomlkit.inline_table()
            job["environment"].update(self.program.environment)
        if job:
            document.add("job", tomlkit.item(job))
        if self.machine:
            document.add("machine", tomlkit.item(dict(self.machine)))
        if self.learned is not None:
            document.add("learned", tomlkit.item(_round(encode(_Learned(ratios=self.learned)))))
        if self.evidence is not None:
            document.add("evidence", tomlkit.item(_round(encode(self.evidence))))
        if self.program is not None:
            document.add("program", tomlkit.item(encode(self.program.files)))
        partial = path.with_name(f"{path.name}.{os.getpid()}.partial")
        try:
            partial.write_text(tomlkit.dumps(document), "utf-8")
            partial.replace(path)
        except OSError as error:
            raise PlanError(f"{path} cannot be written: {error.strerror}") from error


def _is_plain_fact(fact: Fact) -> bool:
    return isinstance(fact, (str, bool)) or 0 <= fact <= sys.float_info.max


_MachineFact = Annotated[
    Fact,
    codec.Constraint(
        _is_plain_fact,
        "a string, a finite number that is not negative, or true or false",
    ),
]
_FilePath = Annotated[str, codec.Constraint(lambda path: "\0" not in path, "the path of a file")]
_FolderPath = Annotated[
    str, codec.Constraint(lambda path: "\0" not in path, "a string, the path of a folder")
]


@dataclass(frozen=True)
class _Job:
    """The table ``[job]``."""

    command: tuple[str, ...] = ()
    folder: _FolderPath = "."
    arguments: tuple[str, ...] = ()
    inputs: tuple[str, ...] | None = None
    environment: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class _Learned:
    """The table ``[learned]``."""

    state: Literal["unproven"] = "unproven"
    measured: Literal["in-process"] = "in-process"
    ratios: Mapping[str, Positive] = field(default_factory=dict)


@dataclass(frozen=True)
class _File:
    """A whole file."""

    plan: Mapping[str, str]
    version: int = PLAN_VERSION
    job: _Job = field(default_factory=_Job)
    machine: Mapping[str, _MachineFact] = field(default_factory=dict)
    learned: _Learned | None = None
    evidence: Evidence | None = None
    program: Mapping[_FilePath, Digests] | None = None


def read(path: Path) -> Plan:
    """Read and check a plan.

    Raises:
        PlanError: the file cannot be read, is not TOML, or holds what no plan holds.
    """
    import tomlkit
    from tomlkit.exceptions import ParseError, TOMLKitError

    try:
        text = path.read_text("utf-8")
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is not UTF-8 text"
        raise PlanError(f"{path} cannot be read: {reason}") from error
    try:
        document = tomlkit.parse(text).unwrap()
    except ParseError as error:
        raise PlanError(f"{path} line {error.line}: this is not TOML: {one_line(error)}") from error
    except RecursionError:
        raise PlanError(f"{path} is not a plan: it is nested too deeply") from None
    except (TOMLKitError, ValueError, TypeError, LookupError) as error:
        # tomlkit raises these for some files that are not TOML.
        raise PlanError(f"{path}: this is not TOML: {one_line(error)}") from error
    return _Reader(path, text).plan(document)


class _Reader:
    """Turns a parsed document into a plan; every error names file, line and key."""

    def __init__(self, path: Path, text: str) -> None:
        self._path = path
        self._lines = text.splitlines()

    def plan(self, document: dict[str, Any]) -> Plan:
        version = document.get("version", PLAN_VERSION)
        if type(version) is not int or version not in _READ_VERSIONS:
            known = " and ".join(map(str, _READ_VERSIONS))
            what = f"is {one_line(repr(version))}, this flatout reads {known}"
            raise self._error(MismatchError(what, "version"))
        if version == 1 and isinstance(document.get("job"), dict):
            document["job"].pop("program_sha256", None)
        try:
            file = decode(_File, document, TOML)
            self._check_settings(file.plan, "plan")
            if file.evidence is not None:
                self._check_settings(file.evidence.settings, "evidence", "settings")
        except MismatchError as mismatch:
            raise self._error(mismatch) from mismatch
        job = file.job
        program = None
        if file.program is not None:
            program = Program(file.program, job.environment, job.folder, job.arguments)
        return Plan(
            settings=file.plan,
            command=job.command,
            program=program,
            inputs=job.inputs,
            machine=file.machine,
            evidence=file.evidence,
            learned=None if file.learned is None else file.learned.ratios,
        )

    def _check_settings(self, settings: Mapping[str, str], *keys: str) -> None:
        for name, setting in settings.items():
            try:
                knobs.check(name, setting)
            except UnknownSettingError as error:
                raise MismatchError(f"is not possible: {one_line(error)}", *keys, name) from error

    def _error(self, mismatch: MismatchError) -> PlanError:
        *tables, key = [key for key in mismatch.keys if isinstance(key, str)]
        if isinstance(mismatch, MissingKeyError):
            if not tables:
                return PlanError(f"{self._path} has no table [{key}]")
            return PlanError(f"{self._path}: [{one_line('.'.join(tables))}] has no key {key!r}")
        line = self._line(tables, key)
        place = f"{self._path} line {line}" if line is not None else str(self._path)
        return PlanError(f"{place}: {one_line(mismatch.path)} {mismatch.what}")

    def _line(self, tables: Sequence[str], key: str) -> int | None:
        """Number of the line of a key, under its table's header or in one; ``None``: not found."""
        name = re.escape(".".join(tables))
        here = not tables
        quoted = rf"""["']?{re.escape(key)}["']?"""
        for number, line in enumerate(self._lines, 1):
            if re.match(r"\s*\[", line):
                here = bool(re.match(rf"\s*\[+\s*{name}\s*\]", line)) if tables else False
                path = rf"{name}\." if tables else ""
                if re.match(rf"\s*\[+\s*{path}{quoted}\s*[\].]", line):
                    return number
            elif here and re.match(rf"\s*{quoted}\s*[=.]", line):
                return number
        return None


def _round(value: Any) -> Any:
    """``value`` for TOML: floats have six significant digits, and those that are not finite, which
    means that they are not known, are left out."""
    if isinstance(value, Mapping):
        return {key: _round(item) for key, item in value.items() if _is_known(item)}
    if isinstance(value, (list, tuple)):
        return [_round(item) for item in value if _is_known(item)]
    return float(f"{value:.6g}") if isinstance(value, float) else value


def _is_known(value: object) -> bool:
    return not isinstance(value, float) or math.isfinite(value)
