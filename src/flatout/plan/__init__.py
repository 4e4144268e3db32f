"""The plan: which settings a job runs with, and the evidence for it. A TOML file, never code.

version = 2

[plan]                      # knob = "setting"; the only table that is required
precision = "bf16"

[job]                       # what it was measured on
command = ["python", "train.py"]
folder = "."                # where it was started, relative to the main script's folder
arguments = ["python", "train.py"]      # the command with its paths relative to that folder
inputs = ["float32[64,784]"]      # of the first outermost module call, * where a size varies
environment = {DATA = "..."}      # digests of the variables that its source names

[machine]                   # fingerprint, as ``flatout machine`` knows it, and torch's version

[learned]                   # of flatout run --tune, in the place of [evidence]: nothing is proven
state = "unproven"
measured = "in-process"
ratios = {optimizer = 1.4}  # knob = ratio inside the training process

[evidence]
settings = {precision = "bf16"}   # what was proven; another [plan] is unproven
ratio = 1.61                # bare step time over the plan's, from fresh processes
ratio_low, ratio_high       # 95 % confidence interval
pairs = 4
bare_step_ms, plan_step_ms  # means, see ``Side.step_ms`` of ``tune.document``
[evidence.in_process]       # knob = ratio of that knob alone, inside one process
[[evidence.losses]]         # one for each backward call of a step, with both curves
[[evidence.checks]]         # what was compared, with which result, and why
[[evidence.verified]]       # further proofs, by flatout verify

[program."net.py"]          # digests of each file of the program, see ``flatout.program``
bytes = "..."               # as it is; the others are without comments and layout
module = "..."              # what is outside of its functions
"Net.forward()" = "..."

A file of version 1 knew the digest of one file only (``job.program_sha256``): it is read, and its
program counts as unknown.
"""

from __future__ import annotations

import dataclasses
import math
import os
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, NoReturn, get_args

from flatout import knobs
from flatout.errors import UserError
from flatout.knob import UnknownSettingError
from flatout.plan import program as programs
from flatout.plan.program import Program
from flatout.text import one_line

PLAN_VERSION = 2
_READ_VERSIONS = (1, 2)
PLAN_FILE = "flatout.toml"

_PROGRAM = "program"
_JOB = ("command", "folder", "arguments", "inputs", "environment")
_LEARNED = {"state": "unproven", "measured": "in-process"}

Fact = str | int | float | bool


class PlanError(UserError):
    """A plan that cannot be read; the message names file, line and key."""


@dataclass(frozen=True)
class LossEvidence:
    """The losses of one backward call of the step, bare against plan.

    Attributes:
        bare_final, plan_final: mean over the last quarter of the steps and over all seeds.
        difference: mean paired difference, plan minus bare, where it is largest.
        margin: largest mean difference that passes: one standard deviation of bare's own spread.
        yardstick: ``"seeds"`` (spread between seeds), ``"batches"`` (scatter between steps, where
            the program sets its own seed), or ``"runs"`` (spread between runs, where the program
            does not repeat itself).
        bare_curve, plan_curve: the losses from the first step to the last, in some points, means
            over the steps of each and over all seeds.
    """

    bare_final: float
    plan_final: float
    difference: float
    margin: float
    yardstick: str
    bare_curve: tuple[float, ...] = ()
    plan_curve: tuple[float, ...] = ()


Result = Literal["passed", "failed", "open"]
"""Of a check; ``open``: it could not be told."""


@dataclass(frozen=True)
class Check:
    """One of the checks that a proof consists of, see ``flatout.tune.proof``.

    Attributes:
        name: what was compared.
        result: one of ``Result``.
        why: one clause, with its figures.
        figures: by their names.
        undecided: it failed only for want of certainty.
    """

    name: str
    result: Result
    why: str
    figures: Mapping[str, float] = field(default_factory=dict)
    undecided: bool = False


@dataclass(frozen=True)
class Verified:
    """A further proof of the same settings that passed, beside one that covers more in some way.

    Attributes:
        steps, seeds, verdict: as those of ``Evidence``.
        first_seed: of the pairs; the others count up from it.
        checks: names of those that passed.
    """

    steps: int
    seeds: int
    verdict: str
    first_seed: int
    checks: tuple[str, ...] = ()


@dataclass(frozen=True)
class Evidence:
    """What a plan was written for; see the format above.

    Attributes:
        settings: what was proven.
        ratio, ratio_low, ratio_high: bare step time over the plan's, with its 95 % interval.
        pairs: pairs of fresh processes behind it.
        bare_step_ms, plan_step_ms: geometric means of the runs; the ratio is that of the two.
        steps: horizon: how many steps from the start the proof covers.
        seeds: how many seeds that changed anything it was repeated with (1: the program seeds
            itself).
        bare_repeats: whether bare gave identical losses twice.
        verdict: ``"bitwise"``, ``"non-inferior"``, or ``"inconclusive"``: no loss has fallen, and
            what else was checked passed.
        in_process: ratio of each knob alone, compared inside one process.
        losses: one entry for each backward call of the step.
        checks: those that the proof consists of.
        verified: what ``flatout verify`` has added.
    """

    settings: Mapping[str, str]
    ratio: float
    ratio_low: float
    ratio_high: float
    pairs: int
    bare_step_ms: float
    plan_step_ms: float
    steps: int
    seeds: int
    bare_repeats: bool
    verdict: str
    in_process: Mapping[str, float] = field(default_factory=dict)
    losses: tuple[LossEvidence, ...] = ()
    checks: tuple[Check, ...] = ()
    verified: tuple[Verified, ...] = ()


@dataclass(frozen=True)
class Plan:
    """Knob settings, what they were made for, and why.

    Attributes:
        settings: ``knob -> setting``.
        command: the job it was made for; empty in a plan written by hand.
        program: files and variables that the job is made of; ``None``: not known.
        inputs: of the first outermost module call, in the words of ``flatout.signature``.
        machine: fingerprint of the machine, and torch's version.
        evidence: ``None`` in a plan written by hand.
        learned: knob -> ratio inside one process, of a plan that was learned while training and is
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
        """Whether the evidence is for these very settings."""
        return self.evidence is not None and dict(self.evidence.settings) == dict(self.settings)

    @property
    def torch(self) -> str | None:
        """Version of torch that it was proven with."""
        version = self.machine.get("torch")
        return version if isinstance(version, str) else None

    def differences(
        self, command: Sequence[str], fingerprint: Mapping[str, Fact]
    ) -> tuple[str, ...]:
        """What is not as it was when the plan was proven, as far as it shows before the start.

        Args:
            command: the job.
            fingerprint: of this machine.
        """
        found = [
            f"{key} was {self.machine[key]}, is {here}"
            for key, here in fingerprint.items()
            if self.machine.get(key, here) != here
        ]
        if self.program is None:
            found.append(
                "the plan does not say which files its program was made of, as older ones did not"
            )
        else:
            found += self.program.changes(command)
        return (*found, *self.argument_changes(command).others)

    def argument_changes(self, command: Sequence[str]) -> programs.ArgumentChanges:
        """How the arguments of a job differ from those of the plan's."""
        return programs.argument_changes(self.command, self.program, command)

    def write(self, path: Path) -> None:
        """Write the plan, replacing a file that is there.

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
            document.add("learned", tomlkit.item(_LEARNED | {"ratios": _rounded(self.learned)}))
        if self.evidence is not None:
            document.add("evidence", tomlkit.item(_rounded(dataclasses.asdict(self.evidence))))
        if self.program is not None:
            document.add(
                _PROGRAM, tomlkit.item({k: dict(v) for k, v in self.program.files.items()})
            )
        partial = path.with_name(f"{path.name}.{os.getpid()}.partial")
        try:
            partial.write_text(tomlkit.dumps(document), "utf-8")
            partial.replace(path)
        except OSError as error:
            raise PlanError(f"{path} cannot be written: {error.strerror}") from error


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
        # tomlkit raises these where it is given what is not TOML in an unusual way.
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
            self._fail((), "version", f"is {one_line(repr(version))}, this flatout reads {known}")
        tables = ("plan", "job", "machine", "learned", "evidence", _PROGRAM)
        self._known((), document, ("version", *tables))
        for table in tables:
            if not isinstance(document.get(table, {}), dict):
                self._fail((), table, "must be a table")
        if "plan" not in document:
            raise PlanError(f"{self._path} has no table [plan]")
        settings = document["plan"]
        self._settings(("plan",), settings)
        job = document.get("job", {})
        of_old = ("program_sha256",) * (version == 1)
        self._known(("job",), job, (*_JOB, *of_old))
        command, inputs = (self._words(job, key) for key in ("command", "inputs"))
        machine = document.get("machine", {})
        for key, value in machine.items():
            if not isinstance(value, Fact) or (_is_number(value) and not _is_amount(value)):
                self._fail(
                    ("machine",),
                    key,
                    "must be a string, a finite number that is not negative, or true or false",
                )
        evidence, learned = document.get("evidence"), document.get("learned")
        return Plan(
            settings=settings,
            command=command or (),
            program=self._program(job, document.get(_PROGRAM)),
            inputs=inputs,
            machine=machine,
            evidence=None if evidence is None else self._evidence(evidence),
            learned=None if learned is None else self._learned(learned),
        )

    def _program(self, job: dict[str, Any], files: dict[str, Any] | None) -> Program | None:
        folder, environment = job.get("folder", "."), job.get("environment", {})
        if not isinstance(folder, str) or "\0" in folder:
            self._fail(("job",), "folder", "must be a string, the path of a folder")
        self._digests(("job",), "environment", environment)
        arguments = self._words(job, "arguments") or ()
        if files is None:
            return None
        for name, digests in files.items():
            if "\0" in name:
                self._fail((_PROGRAM,), name, "is not the path of a file")
            self._digests((_PROGRAM,), name, digests)
        return Program(files, environment, folder, arguments)

    def _digests(self, where: tuple[str, ...], key: str, table: Any) -> None:
        if not isinstance(table, dict):
            self._fail(where, key, "must be a table")
        for name, digest in table.items():
            if not isinstance(digest, str):
                self._fail((*where, key), name, "must be a string")

    def _learned(self, table: dict[str, Any]) -> Mapping[str, float]:
        where = ("learned",)
        self._known(where, table, (*_LEARNED, "ratios"))
        for key, only in _LEARNED.items():
            if table.get(key, only) != only:
                self._fail(where, key, f'must be "{only}"')
        found = table.get("ratios", {})
        if not isinstance(found, dict):
            self._fail(where, "ratios", "must be a table")
        self._ratios((*where, "ratios"), found)
        return found

    def _ratios(self, where: tuple[str, ...], table: dict[str, Any]) -> None:
        for knob, ratio in table.items():
            if not _is_positive(ratio):
                self._fail(where, knob, "must be a positive number")

    def _words(self, job: dict[str, Any], key: str) -> tuple[str, ...] | None:
        words = job.get(key)
        if words is None:
            return None
        if not isinstance(words, list) or not all(isinstance(word, str) for word in words):
            self._fail(("job",), key, "must be a list of strings")
        return tuple(words)

    def _evidence(self, table: dict[str, Any]) -> Evidence:
        where = ("evidence",)
        checked = dict(self._fields(where, table, Evidence))
        self._settings((*where, "settings"), checked["settings"])
        self._ratios((*where, "in_process"), checked.get("in_process", {}))
        self._ratios(where, {key: checked[key] for key in _POSITIVE})
        if not checked["ratio_low"] <= checked["ratio"] <= checked["ratio_high"]:
            self._fail(where, "ratio", "must lie between ratio_low and ratio_high")
        checked["losses"] = tuple(self._loss(entry) for entry in checked.get("losses", []))
        checked["checks"] = tuple(self._check(entry) for entry in checked.get("checks", []))
        checked["verified"] = tuple(self._verified(entry) for entry in checked.get("verified", []))
        return Evidence(**checked)

    def _verified(self, entry: Any) -> Verified:
        where = ("evidence", "verified")
        checked = dict(self._fields(where, entry, Verified))
        checked["checks"] = tuple(checked.get("checks", ()))
        if not all(isinstance(name, str) for name in checked["checks"]):
            self._fail(where, "checks", "must be a list of strings")
        return Verified(**checked)

    def _loss(self, entry: Any) -> LossEvidence:
        where = ("evidence", "losses")
        checked = dict(self._fields(where, entry, LossEvidence))
        for key in ("bare_curve", "plan_curve"):
            checked[key] = tuple(checked.get(key, ()))
            if not all(map(_is_finite, checked[key])):
                self._fail(where, key, "must be a list of finite numbers")
        if checked["margin"] < 0:
            self._fail(where, "margin", "must not be negative")
        return LossEvidence(**checked)

    def _check(self, entry: Any) -> Check:
        where = ("evidence", "checks")
        checked = self._fields(where, entry, Check)
        if checked["result"] not in get_args(Result):
            self._fail(where, "result", f"must be one of {', '.join(get_args(Result))}")
        for key, figure in checked.get("figures", {}).items():
            if not _is_finite(figure):
                self._fail((*where, "figures"), key, "must be a finite number")
        return Check(**checked)

    def _settings(self, where: tuple[str, ...], table: dict[str, Any]) -> None:
        for name, setting in table.items():
            if not isinstance(setting, str):
                self._fail(where, name, "must be a string, the setting of a knob")
            try:
                knobs.check(name, setting)
            except UnknownSettingError as error:
                self._fail(where, name, f"is not possible: {one_line(error)}")

    def _fields(self, where: tuple[str, ...], table: Any, kind: type) -> dict[str, Any]:
        """Check keys and types of a table against the fields of a dataclass."""
        if not isinstance(table, dict):
            self._fail(where[:-1], where[-1], "must hold tables")
        fields = {f.name: f for f in dataclasses.fields(kind)}
        self._known(where, table, tuple(fields))
        for name, described in fields.items():
            if name not in table:
                if (
                    described.default is dataclasses.MISSING
                    and described.default_factory is dataclasses.MISSING
                ):
                    raise PlanError(f"{self._path}: [{'.'.join(where)}] has no key {name!r}")
                continue
            test, meaning = _TYPES[str(described.type).partition("[")[0]]
            if not test(table[name]):
                self._fail(where, name, f"must be {meaning}")
        return table

    def _known(self, where: tuple[str, ...], table: dict[str, Any], known: tuple[str, ...]) -> None:
        for key in table:
            if key not in known:
                self._fail(where, key, f"is not known (known: {', '.join(known)})")

    def _fail(self, where: tuple[str, ...], key: str, what: str) -> NoReturn:
        line = self._line(where, key)
        place = f"{self._path} line {line}" if line is not None else str(self._path)
        raise PlanError(f"{place}: {one_line('.'.join((*where, key)))} {what}")

    def _line(self, where: tuple[str, ...], key: str) -> int | None:
        """Number of the line on which a key stands: under its table's header, or in a header."""
        name = re.escape(".".join(where))
        here = not where
        quoted = rf"""["']?{re.escape(key)}["']?"""
        for number, line in enumerate(self._lines, 1):
            if re.match(r"\s*\[", line):
                here = bool(re.match(rf"\s*\[+\s*{name}\s*\]", line)) if where else False
                path = rf"{name}\." if where else ""
                if re.match(rf"\s*\[+\s*{path}{quoted}\s*[\].]", line):
                    return number
            elif here and re.match(rf"\s*{quoted}\s*[=.]", line):
                return number
        return None


def _rounded(value: Any) -> Any:
    """``value`` for TOML, every float in it to six significant digits and none that is not finite:
    what is not known is left out."""
    if isinstance(value, Mapping):
        return {key: _rounded(item) for key, item in value.items() if _is_known(item)}
    if isinstance(value, (list, tuple)):
        return [_rounded(item) for item in value if _is_known(item)]
    return float(f"{value:.6g}") if isinstance(value, float) else value


def _is_known(value: object) -> bool:
    return not isinstance(value, float) or math.isfinite(value)


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _is_finite(value: object) -> bool:
    """Whether it is a number that a float can hold."""
    return _is_number(value) and abs(value) <= sys.float_info.max  # type: ignore[arg-type]


def _is_amount(value: object) -> bool:
    return _is_finite(value) and value >= 0  # type: ignore[operator]


def _is_positive(value: object) -> bool:
    return _is_finite(value) and value > 0  # type: ignore[operator]


def _is_count(value: object) -> bool:
    return isinstance(value, int) and _is_amount(value)


_POSITIVE = ("ratio", "ratio_low", "ratio_high", "bare_step_ms", "plan_step_ms")

_TYPES: dict[str, tuple[Callable[[object], bool], str]] = {
    "str": (lambda value: isinstance(value, str), "a string"),
    "Result": (lambda value: isinstance(value, str), "a string"),
    "bool": (lambda value: isinstance(value, bool), "true or false"),
    "int": (_is_count, "an integer that is not negative"),
    "float": (_is_finite, "a finite number"),
    "Mapping": (lambda value: isinstance(value, dict), "a table"),
    "tuple": (lambda value: isinstance(value, list), "a list"),
}
"""How the type of a dataclass's field is checked in TOML, by the start of its annotation."""
