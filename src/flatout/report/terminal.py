"""Diagnoses on a terminal."""

from __future__ import annotations

from rich.console import Console
from rich.markup import escape
from rich.padding import Padding
from rich.table import Table

from flatout.doctor import Diagnosis
from flatout.doctor.case import WARMUP_STEPS, Case
from flatout.record import PHASES

LISTED_OPERATORS = 8
BAR_WIDTH = 30
NOT_MEASURED = "not measured"


def print_diagnosis(diagnosis: Diagnosis, console: Console) -> None:
    """Print the phases, the operators, the figures and the findings."""
    case = diagnosis.case
    kind = "training" if case.process.trains else "inference"
    console.print(
        f"[bold]{escape(case.process.header['program'])}[/]: {len(case.steps)} {kind} steps, "
        f"median [bold]{case.step_ms:.4g} ms[/] (the first {WARMUP_STEPS} left out: warm-up)"
    )
    console.print(Padding(_phases(case), (1, 0, 0, 2)))
    if case.operators:
        console.print(Padding(_operators(case), (1, 0, 0, 2)))
    console.print(Padding(_figures(diagnosis), (1, 0, 0, 2)))
    console.print()
    if not diagnosis.findings:
        console.print("Nothing stands out: no finding explains a share of the step worth a remedy.")
    for number, finding in enumerate(diagnosis.findings, 1):
        share = "" if finding.share is None else f", at most {finding.share:.0%} of the step"
        console.print(f"[bold]{number}. {escape(finding.title)}[/]{share}  ({finding.kind})")
        for sentence in finding.evidence:
            console.print(f"   {escape(sentence)}")
        console.print(f"   -> {escape(finding.remedy)}")


def _phases(case: Case) -> Table:
    table = _table("phase", "ms", "share", "")
    for phase in PHASES:
        ms, share = case.phases_ms[phase], case.phase_share(phase)
        if ms is None or share is None:
            table.add_row(phase, NOT_MEASURED, "", "")
        else:
            table.add_row(phase, f"{ms:.4g}", f"{share:.0%}", "#" * round(share * BAR_WIDTH))
    return table


def _operators(case: Case) -> Table:
    table = _table("operator", "ms", "share", "calls")
    for operator in case.operators[:LISTED_OPERATORS]:
        table.add_row(
            escape(operator["name"]),
            f"{operator['share'] * case.mean_step_ms:.4g}",
            f"{operator['share']:.0%}",
            f"{operator['calls']:.4g}",
        )
    return table


def _figures(diagnosis: Diagnosis) -> Table:
    case = diagnosis.case
    document = diagnosis.document()
    table = Table(show_header=False, box=None, padding=(0, 2, 0, 0))
    flops = case.flops_per_step
    table.add_row(
        "operations a step", NOT_MEASURED if flops is None else f"{flops / 1e9:.4g} GFLOP"
    )
    if case.uncounted_operators:
        table.add_row("", f"no formula for {', '.join(case.uncounted_operators)}")
    if case.mfu is not None and case.ceilings is not None and case.main_dtype is not None:
        ceiling = case.ceilings.matmul_flops_per_s[case.main_dtype] or 0.0
        table.add_row(
            "MFU",
            f"{case.mfu:.0%} of the {ceiling / 1e9:.4g} GFLOP/s measured for "
            f"{case.main_dtype} matrix products",
        )
    else:
        table.add_row("MFU", NOT_MEASURED)
    faults = document["minor_faults_per_step"]
    table.add_row("page faults a step", NOT_MEASURED if faults is None else f"{faults:,.0f}")
    cores = NOT_MEASURED if case.usable_cores is None else f"{case.usable_cores:g}"
    table.add_row("threads, cores", f"{document['threads']}, {cores}")
    peak = document["peak_rss_bytes"]
    table.add_row("peak memory", NOT_MEASURED if peak is None else f"{peak / 2**20:,.0f} MiB")
    if case.on_accelerator:
        peak = document["peak_device_bytes"]
        shown = NOT_MEASURED if peak is None else f"{peak / 2**20:,.0f} MiB"
        table.add_row("peak device memory", shown)
        table.add_row("", "phases are host times: the device works on behind them")
    return table


def _table(*columns: str) -> Table:
    table = Table(box=None, padding=(0, 2, 0, 0), header_style="bold")
    for number, column in enumerate(columns):
        table.add_column(column, justify="right" if 0 < number < 3 or column == "calls" else "left")
    return table
