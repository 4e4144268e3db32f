"""Prints a diagnosis on the terminal."""

from __future__ import annotations

from typing import IO

from rich.console import Console, Group
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from flatout.doctor import Diagnosis
from flatout.doctor.case import Case
from flatout.doctor.findings import Finding
from flatout.doctor.ranks import RANK_PHASES, Ranks
from flatout.tune.formatting import NOT_MEASURED, milliseconds
from flatout.wire.disturbance import Stretch
from flatout.wire.lines import SharedWork
from flatout.wire.turns import PHASES

OPERATORS_SHOWN, OPERATORS_SHOWN_VERBOSE = 5, 20
FINDINGS_SHOWN, FINDINGS_EXPLAINED = 5, 2
"""How many findings are printed, and how many with their evidence, unless ``verbose``."""

FEW_STEPS = 5
"""Fewest timed steps of which a stall of the machine cannot be the larger part."""

_BAR_WIDTH = 24
_WIDTH = 100
"""Columns of a report that does not go to a terminal."""


def print_diagnosis(diagnosis: Diagnosis, file: IO[str], verbose: bool = False) -> None:
    """Print a diagnosis: findings first, then the phases, operators and figures behind them.

    Args:
        diagnosis: what is printed.
        file: where to.
        verbose: print the evidence for every finding, and more operators.
    """
    console = Console(file=file, highlight=False, width=None if file.isatty() else _WIDTH)
    with console.capture() as capture:
        _print(console, diagnosis, verbose)
    for line in capture.get().splitlines():  # rich fills lines up with blanks
        print(line.rstrip(), file=file)


def _print(console: Console, diagnosis: Diagnosis, verbose: bool) -> None:
    case = diagnosis.case
    console.print(Text(_headline(case), style="bold"))
    if diagnosis.findings:
        console.print(
            Text("Findings", style="bold"), Text("(no remedy can save more than the share given)")
        )
    else:
        console.print(Text("Findings: none.", style="bold"), Text(_why_none(case)))
    shown = diagnosis.findings if verbose else diagnosis.findings[:FINDINGS_SHOWN]
    for number, finding in enumerate(shown, 1):
        _print_finding(console, number, finding, verbose or number <= FINDINGS_EXPLAINED)
    if len(diagnosis.findings) > FINDINGS_EXPLAINED and not verbose:
        console.print(Text(f"   (-v shows all {len(diagnosis.findings)} with their evidence)"))
    console.print(_phases(case))
    if case.ranks is not None:
        console.print(_ranks(case.ranks, case.process.shared_work))
    if case.operators:
        operators_shown = OPERATORS_SHOWN_VERBOSE if verbose else OPERATORS_SHOWN
        console.print(_operators(case, operators_shown))
    console.print(_figures(case))
    for note in notes(diagnosis):
        console.print(Text(f"Note: {note}"))


def notes(diagnosis: Diagnosis) -> list[str]:
    """What could not be measured, and why, one sentence each."""
    case = diagnosis.case
    said = [
        f"{event.subject}: {event.why}"
        for event in case.process.events
        if event.what == "failed" or (event.what == "skipped" and event.subject == "profile")
    ]
    if case.process.profile is None and not said:
        said.append(
            f"the program ended after {len(case.process.loop_steps)} steps, before its operators "
            "could be profiled; use fewer --steps"
        )
    if len(case.steps) < FEW_STEPS:
        has_ended = case.process.end is not None and case.process.end.reason == "exit"
        more = "a longer run of the program" if has_ended else "a longer --budget"
        said.append(f"only {len(case.steps)} steps were timed; {more} would tell more")
    if not case.other_work.is_quiet:
        said += _describe_other_work(case.other_work)
    if case.ceilings is not None and case.ceilings.is_disturbed:
        said.append(
            f"others took {case.ceilings.others_share:.0%} of the CPUs while this machine's rates "
            "were measured: they are too low, and are not kept"
        )
    if case.ceilings is None:
        said.append("without this machine's rates, MFU and the cost of page faults are not known")
    return said


def _describe_other_work(found: Stretch) -> list[str]:
    """What other processes took of the CPUs while steps were timed; nothing if it is not known."""
    if found.taken is None:
        return []
    said = f"others took {found.taken:.0%} of the CPUs that this program may use"
    if not found.is_disturbed:
        return [f"{said}, and hardly delayed it"]
    return [
        f"{said}, and its threads waited for them for {min(found.lost or 0, 1):.0%} of the time: "
        "on a quiet machine its step takes less, and the shares differ"
    ]


def _headline(case: Case) -> str:
    kind = "steps" if case.process.trains else "inference steps"
    text = f"{case.process.header.program}: {len(case.steps)} {kind}, mean "
    text += f"{milliseconds(case.mean_step_ms)}, median {milliseconds(case.step_ms)}"
    warmup = case.warmup_steps
    if warmup:
        seconds = sum(step.step_ms for step in warmup) / 1e3
        text += f" (without the first {len(warmup)}, which warm up in {seconds:.3g} s)"
    micro_batches = case.process.micro_batches
    if micro_batches > 1:
        text += f"; each is a micro-batch, {micro_batches} to an optimizer step"
    return text


def _phases(case: Case) -> Padding:
    table = Table(box=None, padding=(0, 2, 0, 0))
    table.add_column("phase")
    table.add_column("mean", justify="right")
    table.add_column("share", justify="right")
    table.add_column("")
    for phase in PHASES:
        ms = case.phases_ms[phase]
        if ms is not None:
            share = ms / case.mean_step_ms
            table.add_row(phase, milliseconds(ms), f"{share:.1%}", "█" * round(share * _BAR_WIDTH))
    if case.evaluations:
        total_ms = sum(turn.step_ms for turn in case.evaluations)
        each_ms = total_ms / len(case.evaluations)
        passes = f"{len(case.evaluations)} passes, not part of a step"
        table.add_row("evaluation", milliseconds(each_ms), "", passes)
    return Padding(table, (1, 0, 1, 2), expand=False)


def _ranks(ranks: Ranks, work: SharedWork | None) -> Padding:
    """The shares of a step that each rank spends on what."""
    table = Table(box=None, padding=(0, 2, 0, 0))
    table.add_column("rank", justify="right")
    table.add_column("step", justify="right")
    for name in _RANK_PHASE_NAMES:
        table.add_column(name, justify="right")
    for rank, times in enumerate(ranks.times):
        if times is None:
            table.add_row(str(rank), NOT_MEASURED)
        else:
            shares = (f"{times.share(phase):.1%}" for phase in RANK_PHASES)
            table.add_row(str(rank), milliseconds(times.step_ms), *shares)
    lines = [_describe_bound(ranks), *([] if work is None else _describe_work(work))]
    return Padding(Group(table, *map(Text, lines)), (0, 0, 1, 2), expand=False)


def _describe_work(work: SharedWork) -> list[str]:
    """What was shared out, and what was not with the reason."""
    shared = [f"{count} calls of {module} were shared out" for module, count in work.shared.items()]
    whole = [f"{c.count} calls of {c.module} were not shared out: {c.why}" for c in work.whole]
    return shared + whole


def _describe_bound(ranks: Ranks) -> str:
    if ranks.bound is None:
        return f"{ranks.size} ranks; how much faster they can be is {NOT_MEASURED}"
    return f"{ranks.size} ranks give at most {ranks.bound:.1f}x, because of what all do alike"


_RANK_PHASE_NAMES = ("shard", "alike", "waiting", "communication", "comparing")
"""The heads of the columns of ``RANK_PHASES``."""


def _operators(case: Case, shown: int) -> Padding:
    on_device = any(o.device_self_ms is not None for o in case.operators)
    table = Table(box=None, padding=(0, 2, 0, 0))
    table.add_column("operator")
    for name in ["calls", "share", *(["on the device"] if on_device else [])]:
        table.add_column(name, justify="right")
    for operator in case.operators_by_name[:shown]:
        row = [operator.name, f"{operator.calls:.3g}", f"{operator.share:.1%}"]
        if on_device:
            device_ms = operator.device_self_ms
            row.append("" if device_ms is None else milliseconds(device_ms))
        table.add_row(*row)
    return Padding(table, (0, 0, 1, 2), expand=False)


def _figures(case: Case) -> Padding:
    table = Table(show_header=False, box=None, padding=(0, 2, 0, 0))
    table.add_row("arithmetic", _arithmetic(case))
    if case.device_share is not None:
        busy = f"busy for {case.device_share:.0%} of a step; the phases are host times"
        table.add_row("accelerator", busy)
    faults = case.minor_faults_per_step
    if faults is not None:
        table.add_row("page faults", f"{faults:,.0f} minor faults a step")
    peak = [("memory", case.steps[-1].peak_rss_bytes)]
    peak.append(("device memory", case.peak_device_bytes))
    for name, value in peak:
        if value is not None:
            table.add_row(name, f"{value / 2**20:,.0f} MiB at the peak")
    if case.process.threads is not None:
        cores = "" if case.usable_cores is None else f" on {case.usable_cores:g} cores"
        table.add_row("threads", f"{case.process.threads}{cores}")
    taken = case.other_work.taken
    others = NOT_MEASURED if taken is None else f"others took {taken:.1%} of the CPUs"
    table.add_row("other work", others)
    return Padding(table, (0, 0, 1, 2), expand=False)


def _arithmetic(case: Case) -> str:
    if case.uncounted_operators:
        return f"not known: flatout has no FLOP formula for {', '.join(case.uncounted_operators)}"
    if case.flops_per_step is None:
        return "not measured"
    text = f"{case.flops_per_step / 1e9:.3g} GFLOP a step"
    if case.main_dtype is not None:
        text += f", in {case.main_dtype}"
    if case.mfu is not None:
        text += f"; MFU {case.mfu:.1%} of the measured matmul rate"
    return text


def _print_finding(console: Console, number: int, finding: Finding, explained: bool) -> None:
    share = "share not known" if finding.share is None else f"at most {finding.share:.0%} of a step"
    console.print(
        Text(f"{number}. "), Text(finding.kind, style="bold"), Text(f"- {finding.title}: {share}")
    )
    for line in finding.evidence if explained else ():
        console.print(Padding(Text(line), (0, 0, 0, 3), expand=False))
    console.print(Padding(Text(finding.remedy, style="green"), (0, 0, 0, 3), expand=False))


def _why_none(case: Case) -> str:
    if case.mfu is not None:
        return (
            f"The step reaches {case.mfu:.0%} of the machine's matmul rate, and nothing stands out."
        )
    return "Nothing stands out."
