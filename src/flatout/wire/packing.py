"""Unpacks the events that ``intercept/_watch.c`` has packed into a record."""

from __future__ import annotations

from collections.abc import Iterator

from flatout.wire.turns import FORWARD, NOTE, OPTIMIZER, USAGE, TorchEvent

_TIME_PLACE, _NOTE_PLACE, _USAGE_PLACE = 8, 9, 10
"""Places of the last time, the last note and the last usage; the last module or optimizer of a
phase is at the number of that phase."""

_LONGEST_SHIFT = 63
"""Shift of the last byte that a value of 64 bits has in LEB128."""


class Unpacker:
    """Unpacks the events of one process, from one header to the next."""

    def __init__(self) -> None:
        self._last = [0] * (_USAGE_PLACE + 3)

    def events(self, packed: bytes) -> Iterator[TorchEvent]:
        """Yield the next events.

        Args:
            packed: their packed form, see ``lines.PackedTrace``.

        Raises:
            ValueError: a value has more than 64 bits.
            IndexError: the last event is not whole.
        """
        last, at, size = self._last, 0, len(packed)
        values = [0, 0, 0]
        while at < size:
            what = packed[at]
            at += 1
            kind, phase = what & 3, what >> 2 & 7
            for number in range(_value_count(kind, phase)):
                rest, shift = 0, 0
                while True:
                    if shift > _LONGEST_SHIFT:
                        raise ValueError("a value of more than 64 bits")
                    byte = packed[at]
                    at += 1
                    rest |= (byte & 127) << shift
                    if byte < 128:
                        break
                    shift += 7
                if kind == USAGE:
                    place = _USAGE_PLACE + number
                elif kind == NOTE:
                    place = _NOTE_PLACE
                else:
                    place = phase if number else _TIME_PLACE
                last[place] += rest >> 1 ^ -(rest & 1)
                values[number] = last[place]
            yield kind, phase, what >> 5, values[0], values[1], values[2]


def _value_count(kind: int, phase: int) -> int:
    """How many values an event has; the same in ``intercept/_watch.c``."""
    if kind == USAGE:
        return 3
    return 2 if kind != NOTE and phase in (FORWARD, OPTIMIZER) else 1
