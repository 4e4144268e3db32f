"""``flatout knobs``: lists the settings that may help here, or shows the card of one knob."""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from typing import TYPE_CHECKING

from flatout.cli import options
from flatout.knob import EXACTNESS, Facts

if TYPE_CHECKING:
    from flatout.knob import Knob

SUMMARY = "list the settings that flatout can apply, or explain one knob"
EXAMPLES = ("flatout knobs", "flatout knobs precision")
TAKES_JOB = False
ARGUMENT = "[KNOB]"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of ``flatout knobs``."""
    parser.add_argument("name", nargs="?", metavar="KNOB", help="show the card of this knob")
    options.add_python(parser)


def execute(arguments: argparse.Namespace) -> int:
    """List the knobs, or show one."""
    from flatout import knobs

    if arguments.name is not None:
        _show(knobs.get(arguments.name))
    else:
        _list(arguments.python)
    return 0


def _show(knob: Knob) -> None:
    from rich.console import Console
    from rich.markdown import Markdown

    from flatout.report.card import markdown

    Console(highlight=False).print(Markdown(markdown(knob)))


def _list(python: str | None) -> None:
    from rich.console import Console
    from rich.table import Table

    from flatout import knobs, machine

    ceilings = machine.known_ceilings(python or machine.default_python())
    rates: dict[str, Mapping[str, float | None]] = {"cpu": {}}
    if ceilings is not None:
        rates = {name: own["matmul_flops_per_s"] for name, own in ceilings.devices.items()}
    table = Table(box=None, padding=(0, 2, 0, 0))
    for heading in ("knob", "setting", "may change", "on", "here"):
        table.add_column(heading)
    for device, flops_per_s in rates.items():
        facts = Facts(device, flops_per_s, huge_pages=machine.huge_pages())
        for name, knob in knobs.registry().items():
            offer = knob.offer(facts)
            for setting in knob.settings:
                table.add_row(
                    name,
                    setting,
                    EXACTNESS[knob.exactness[setting]],
                    device,
                    "may help" if setting in offer.settings else offer.refusal or "by hand only",
                )
    console = Console(highlight=False)
    console.print(table)
    if ceilings is None:
        console.print("\nThis machine has not been measured yet: 'flatout machine' does that.")
    console.print(
        "\nOne knob: flatout knobs KNOB. By hand: flatout run --set KNOB=SETTING COMMAND ..."
    )
