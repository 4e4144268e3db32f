"""``flatout machine``: measures what this machine can do at most."""

from __future__ import annotations

import argparse
import dataclasses
import json
import time
from collections.abc import Mapping
from typing import Any

from flatout.cli import options
from flatout.errors import UserError

SUMMARY = "measure what this machine can do at most"
EXAMPLES = ("flatout machine", "flatout machine --refresh --json machine.json")
TAKES_JOB = False
ARGUMENT = ""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of ``flatout machine``."""
    options.add_python(parser)
    parser.add_argument(
        "--refresh", action="store_true", help="measure again, though there are figures already"
    )
    options.add_json(parser)


def execute(arguments: argparse.Namespace) -> int:
    """Measure, or read what was measured, and print it."""
    from flatout import machine, paths

    if arguments.json is not None:
        paths.check_writable(arguments.json)
    python = arguments.python or machine.default_python()
    ceilings = machine.ceilings(python, arguments.refresh)
    facts = {
        "cpu": machine.cpu_model(),
        "instruction_sets": machine.cpu_flags(),
        "usable_cores": machine.usable_cores(),
        "memory_bytes": machine.memory_limit_bytes(),
        "huge_pages": machine.huge_pages(),
        "allocator": machine.allocator(),
        "compiler": machine.compiler(),
        **dataclasses.asdict(ceilings),
        "is_disturbed": ceilings.is_disturbed,
    }
    if arguments.json is not None:
        try:
            arguments.json.write_text(json.dumps(facts, indent=1) + "\n")
        except OSError as error:
            raise UserError(f"{arguments.json} cannot be written: {error.strerror}") from None
    _print(facts)
    return 0


def _print(facts: Mapping[str, Any]) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(show_header=False, box=None, padding=(0, 2, 0, 0))
    measured = time.strftime("%Y-%m-%d %H:%M", time.localtime(facts["measured_at_unix_s"]))
    rows = [
        ("processor", facts["cpu"]),
        ("instruction sets", " ".join(facts["instruction_sets"]) or "not known"),
        ("usable cores", f"{facts['usable_cores']:g}"),
        ("memory", f"{facts['memory_bytes'] / 2**30:.3g} GiB"),
        ("huge pages", facts["huge_pages"] or "not known"),
        ("allocator", facts["allocator"]),
        ("C++ compiler", facts["compiler"] or "none that can build an extension"),
        ("torch", f"{facts['torch']}, {facts['threads']} threads ({facts['python']})"),
        ("page fault", _unit(facts["page_fault_us"], 1, "us")),
    ]
    for device, figures in facts["devices"].items():
        rows += [(f"{device}: {name}", str(v)) for name, v in figures["reported"].items()]
        for dtype, rate in figures["matmul_flops_per_s"].items():
            rows.append((f"{device}: {dtype} matmul", _unit(rate, 1e9, "GFLOP/s")))
        rows.append((f"{device}: copy", _unit(figures["memory_bytes_per_s"], 1e9, "GB/s")))
    if facts["no_accelerator"] is not None:
        rows.append(("accelerator", facts["no_accelerator"]))
    rows.append(("other work", _other_work(facts)))
    rows.append(("measured", measured))
    for name, value in rows:
        table.add_row(name, value)
    Console(highlight=False).print(table)


def _other_work(facts: Mapping[str, Any]) -> str:
    share = facts["others_share"]
    if share is None:
        return "not measured"
    said = f"others took {share:.0%} of the CPUs"
    if facts["is_disturbed"]:
        said += ": the rates are too low, and are not kept"
    return said


def _unit(value: float | None, unit: float, name: str) -> str:
    return "not measured" if value is None else f"{value / unit:.4g} {name}"
