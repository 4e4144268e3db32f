"""The progress of a tune: a live table on a terminal, plain lines elsewhere."""

from __future__ import annotations

import contextlib
import sys
import time
from collections.abc import Sequence
from types import TracebackType
from typing import TYPE_CHECKING, TextIO

from flatout.text import printable
from flatout.tune import figures
from flatout.tune.document import Arm

if TYPE_CHECKING:
    from rich.console import RenderableType
    from rich.live import Live

_SHOWN_EVERY_S = 0.2
_INTERVAL_WIDTH, _STATE_WIDTH = 72, 40
"""Columns of a terminal from which on there is room for the interval, and for the state."""

_GAP = 2
"""Blanks after a column."""

_LINES_AROUND = 5
"""Of a terminal, that are not arms: heading, what is hidden, time left, and two lines said."""

_STYLES = {"won": "green", "failed": "red", "running": "bold"}


class LiveTable:
    """Context manager around a tune. A live table of arms stands below the lines that are said.

    It starts no thread (the controller forks) and never hides the cursor (a killed flatout could
    not show it again).

    Args:
        quiet: say and show nothing.
        file: where to, by default ``sys.stderr``; the table appears only if it is a terminal.
    """

    def __init__(self, *, quiet: bool = False, file: TextIO | None = None) -> None:
        self._quiet = quiet
        self._file = sys.stderr if file is None else file
        self._live: Live | None = None
        self._arms: tuple[Arm, ...] = ()
        self._shown_at_s = -float("inf")

    def __enter__(self) -> LiveTable:
        if self._quiet or not self._file.isatty():
            return self
        from rich.console import Console
        from rich.live import Live

        console = Console(file=self._file, highlight=False, markup=False, emoji=False)
        if console.is_dumb_terminal or not console.is_terminal:
            return self
        self._live = Live(
            console=console,
            auto_refresh=False,
            transient=True,
            redirect_stdout=False,
            redirect_stderr=False,
        )
        self._live.start()
        console.show_cursor(True)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        live, self._live = self._live, None
        if live is not None:
            with contextlib.suppress(OSError):  # the terminal may be gone
                live.stop()

    def say(self, line: str) -> None:
        """Print a line, above the table."""
        if self._quiet:
            return
        text = f"flatout: {printable(line)}"
        if self._live is None:
            print(text, file=self._file, flush=True)
        else:
            self._live.console.print(text, soft_wrap=True)

    def show(self, arms: Sequence[Arm], left_seconds: float | None) -> None:
        """Show the arms as they are now; cheap enough to be called several times a second.

        Args:
            arms: in the order in which they are shown, as far as there is room.
            left_seconds: until the tune should be over, ``None`` if not known.
        """
        arms = tuple(arms)
        now_s = time.monotonic()
        has_changed = arms != self._arms
        self._arms = arms
        if self._live is not None and (has_changed or now_s - self._shown_at_s > _SHOWN_EVERY_S):
            self._shown_at_s = now_s
            size = self._live.console.size
            self._live.update(_table(arms, left_seconds, size.width, size.height), refresh=True)


def _table(arms: Sequence[Arm], left_s: float | None, width: int, height: int) -> RenderableType:
    from rich.table import Table
    from rich.text import Text

    left = "" if left_s is None else f"{figures.duration(max(left_s, 0))} left"
    if not arms:
        return Text(left, "dim")
    with_interval, with_state = width >= _INTERVAL_WIDTH, width >= _STATE_WIDTH
    rows = [("settings", "ratio", "95 % interval", "state")]
    shown = _of_most_interest(arms, max(height - _LINES_AROUND, 1))
    for arm in shown:
        ratio = interval = ""
        if arm.ratio is not None:
            ratio = f"{arm.ratio.value:.2f}x"
            interval = f"{arm.ratio.low:.2f} to {arm.ratio.high:.2f}"
        rows.append((printable(arm.label), ratio, interval, arm.state))
    is_shown = (True, True, with_interval, with_state)
    columns = [
        cells for cells, wanted in zip(zip(*rows, strict=True), is_shown, strict=True) if wanted
    ]
    others = sum(max(map(len, cells)) + _GAP for cells in columns[1:])
    table = Table(box=None, padding=(0, _GAP, 0, 0), header_style="dim", caption=Text(left, "dim"))
    table.caption_justify = "left"
    for number, (heading, *_) in enumerate(columns):
        table.add_column(heading, no_wrap=True, justify="right" if number == 1 else "left")
    table.columns[0].max_width = max(width - others - _GAP, 1)
    for arm, row in zip(shown, list(zip(*columns, strict=True))[1:], strict=True):
        table.add_row(*map(Text, row), style=_STYLES.get(arm.state))
    if len(arms) > len(shown):
        table.add_row(Text(f"and {len(arms) - len(shown)} more", "dim"))
    return table


def _of_most_interest(arms: Sequence[Arm], room: int) -> list[Arm]:
    """As many arms as there is room for, in their order: those that run, then those with a ratio,
    then the rest."""
    by_interest = sorted(
        range(len(arms)), key=lambda n: (arms[n].state != "running", arms[n].ratio is None, n)
    )
    return [arms[n] for n in sorted(by_interest[:room])]
