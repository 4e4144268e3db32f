"""``flatout knobs``: what can be turned, on this machine; and the card of one knob."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

from flatout.knob import EXACTNESS, Facts

if TYPE_CHECKING:
    from flatout.knob import Knob

SUMMARY = "list what can be turned, or show one knob's card"
TAKES_JOB = False


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("name", nargs="?", metavar="KNOB", help="show the card of this one")
    parser.add_argument(
        "--python", metavar="PATH", help="interpreter of the jobs (default: the one on PATH)"
    )


def execute(arguments: argparse.Namespace) -> int:
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

    ceilings = machine.ceilings(python or machine.default_python())
    table = Table(box=None, padding=(0, 2, 0, 0))
    for heading in ("knob", "setting", "may change", "on"):
        table.add_column(heading)
    table.add_column("here")
    for device, figures in ceilings.devices.items():
        facts = Facts(device, figures["matmul_flops_per_s"], huge_pages=machine.huge_pages())
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
    console.print(
        "\nMore of one: flatout knobs KNOB. By hand: flatout run --set KNOB=SETTING -- ..."
    )
