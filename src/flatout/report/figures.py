"""Figures as people read them, the same in the terminal and on the page."""

from __future__ import annotations

import math

NOT_MEASURED = "not measured"


def milliseconds(ms: float | None) -> str:
    """A short time, to three digits."""
    if ms is None or not math.isfinite(ms):
        return NOT_MEASURED
    if ms >= 1e4:
        return f"{_three_digits(ms / 1e3)} s"
    return f"{_three_digits(ms)} ms" if ms >= 1 else f"{_three_digits(ms * 1e3)} us"


def duration(seconds: float | None) -> str:
    """A time of any length, in its two largest units."""
    if seconds is None or not math.isfinite(seconds):
        return NOT_MEASURED
    if seconds < 100:
        return f"{seconds:.1f} s"
    minutes = round(seconds) // 60
    if minutes < 60:
        return f"{minutes} min {round(seconds) % 60} s"
    minutes = round(seconds / 60)
    if minutes < 48 * 60:
        return f"{minutes // 60} h {minutes % 60} min"
    hours = round(seconds / 3600)
    return f"{hours // 24} d {hours % 24} h"


def memory(size_bytes: float | None) -> str:
    """An amount of memory."""
    if size_bytes is None or not math.isfinite(size_bytes):
        return NOT_MEASURED
    if size_bytes >= 10 * 2**30:
        return f"{_three_digits(size_bytes / 2**30)} GiB"
    return f"{size_bytes / 2**20:,.0f} MiB"


def change(bare: float | None, plan: float | None) -> str:
    """How much more or less the plan takes than the bare program; empty where it is not known."""
    return f"{plan / bare - 1:+.0%}" if bare and plan is not None else ""


def longer(bare_s: float | None, plan_s: float | None) -> str:
    """How many seconds more or less the plan takes; empty where it is not known."""
    return "" if bare_s is None or plan_s is None else f"{plan_s - bare_s:+.1f} s"


def loss(value: float) -> str:
    """A loss, to six digits; in words when it has diverged."""
    return f"{value:.6g}" if math.isfinite(value) else "not finite"


def signed(value: float) -> str:
    """A difference, to two digits; in words when it is none."""
    return f"{value:+.2g}" if math.isfinite(value) else "not finite"


def count(number: int, one: str) -> str:
    """``number`` things, in words: ``1 step``, ``2 steps``."""
    return f"{number:,} {one}{'' if number == 1 else 's'}"


def _three_digits(value: float) -> str:
    return f"{value:.3g}" if abs(value) < 999.5 else f"{value:,.0f}"
