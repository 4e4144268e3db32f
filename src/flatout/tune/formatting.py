"""Formats numbers for the terminal and for the page of ``flatout report`` alike."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING, NamedTuple, TypeGuard

if TYPE_CHECKING:
    from flatout.wire.ratios import Ratio

NOT_MEASURED = "not measured"


class Formatted(NamedTuple):
    """A number as it is printed.

    Attributes:
        text: the number with its unit.
        value: the number, rounded as in the text, in the unit in which it was passed. Differences
            between printed numbers are computed from these values, so that a reader who subtracts
            the printed numbers gets the printed difference.
    """

    text: str
    value: float


Formatter = Callable[[float], Formatted]
"""A function that formats milliseconds, seconds or bytes."""


def format_milliseconds(ms: float) -> Formatted:
    """Format a short time to three digits, or to four if it is between 1,000 and 9,999 ms."""
    unit, size = ("s", 1e3) if ms >= 1e4 else ("ms", 1.0) if ms >= 1 else ("us", 1e-3)
    number = _three_digits(ms / size)
    return Formatted(f"{number} {unit}", _number(number) * size)


def format_duration(seconds: float) -> Formatted:
    """Format a time of any length.

    A time below 99.95 s is given to a tenth of a second. A longer time is given in two units:
    minutes and seconds, hours and minutes, or days and hours.
    """
    if abs(seconds) < 99.95:
        return Formatted(f"{seconds:.1f} s", round(seconds, 1))
    whole = round(seconds)
    if whole < 3600:
        return Formatted(f"{whole // 60} min {whole % 60} s", float(whole))
    minutes = round(seconds / 60)
    if minutes < 48 * 60:
        return Formatted(f"{minutes // 60} h {minutes % 60} min", 60.0 * minutes)
    hours = round(seconds / 3600)
    return Formatted(f"{hours // 24} d {hours % 24} h", 3600.0 * hours)


def format_memory(size_bytes: float) -> Formatted:
    """Format an amount of memory, in MiB or GiB."""
    if size_bytes >= 10 * 2**30:
        number = _three_digits(size_bytes / 2**30)
        return Formatted(f"{number} GiB", _number(number) * 2**30)
    number = f"{size_bytes / 2**20:,.0f}"
    return Formatted(f"{number} MiB", _number(number) * 2**20)


def text(formatter: Formatter, value: float | None) -> str:
    """Return the text of a number, or ``NOT_MEASURED`` if it is not known."""
    return formatter(value).text if _is_known(value) else NOT_MEASURED


def milliseconds(ms: float | None) -> str:
    """Return the text of a short time."""
    return text(format_milliseconds, ms)


def duration(seconds: float | None) -> str:
    """Return the text of a time of any length."""
    return text(format_duration, seconds)


def memory(size_bytes: float | None) -> str:
    """Return the text of an amount of memory."""
    return text(format_memory, size_bytes)


def change(formatter: Formatter, bare: float | None, plan: float | None) -> str:
    """Return how much more or less the plan takes than bare, in percent.

    The text is empty if this is not known.
    """
    if not (_is_known(bare) and _is_known(plan) and (of := formatter(bare).value)):
        return ""
    return _unsigned_zero(f"{formatter(plan).value / of - 1:+.0%}")


def seconds_change(formatter: Formatter, bare_s: float | None, plan_s: float | None) -> str:
    """Return how many seconds more or less the plan takes than bare.

    The text is empty if this is not known.
    """
    if not (_is_known(bare_s) and _is_known(plan_s)):
        return ""
    return _unsigned_zero(f"{formatter(plan_s).value - formatter(bare_s).value:+.1f} s")


def describe_ratio(ratio: Ratio) -> str:
    """Return "faster", "slower" or "no measurable gain"; see ``statistics.is_gain``."""
    if ratio.low > 1:
        return "faster"
    return "slower" if ratio.high < 1 else "no measurable gain"


def loss(value: float) -> str:
    """Return the text of a loss, to six digits; ``not finite`` if the loss has diverged."""
    return f"{value:.6g}" if math.isfinite(value) else "not finite"


def signed(value: float) -> str:
    """Return the text of a difference with its sign, to two digits; see ``loss``."""
    return f"{value:+.2g}" if math.isfinite(value) else "not finite"


def count(number: int, one: str) -> str:
    """Return the text of a number of things: ``1 step``, ``2 steps``."""
    return f"{number:,} {one}{'' if number == 1 else 's'}"


def _three_digits(value: float) -> str:
    return f"{value:.3g}" if abs(value) < 999.5 else f"{value:,.0f}"


def _is_known(value: float | None) -> TypeGuard[float]:
    return value is not None and math.isfinite(value)


def _number(text: str) -> float:
    return float(text.replace(",", ""))


def _unsigned_zero(text: str) -> str:
    """Remove the sign of a number that is printed as zero."""
    return text if any(c in "123456789" for c in text) else text.lstrip("+-")
