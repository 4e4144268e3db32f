"""Unpacks the events that ``intercept/_watch.c`` has packed into a record."""

from __future__ import annotations

from collections.abc import Iterator

from flatout.wire.turns import DATA, FORWARD, NOTE, OPTIMIZER, USAGE, TorchEvent

_TIME_INDEX, _NOTE_INDEX, _USAGE_INDEX = 8, 9, 10
"""Indices into ``_last``, which holds the previous value of each kind for delta decoding. Indices 0
to 6 hold the last object id of each phase."""

_LARGEST_SHIFT = 63
"""The shift of the last byte of a 64-bit value in LEB128."""


class Unpacker:
    """Unpacks the events of one process, from one header to the next."""

    def __init__(self) -> None:
        self._last = [0] * (_USAGE_INDEX + 3)

    def events(self, packed: bytes) -> Iterator[TorchEvent]:
        """Yield the next events.

        Args:
            packed: the packed events, see ``lines.PackedTrace``.

        Raises:
            ValueError: a value has more than 64 bits.
            IndexError: the last event is incomplete.
        """
        last, position, size = self._last, 0, len(packed)
        values = [0, 0, 0]
        while position < size:
            header_byte = packed[position]
            position += 1
            kind, phase = header_byte & 3, header_byte >> 2 & 7
            for number in range(_value_count(kind, phase)):
                rest, shift = 0, 0
                while True:
                    if shift > _LARGEST_SHIFT:
                        raise ValueError("a value of more than 64 bits")
                    byte = packed[position]
                    position += 1
                    rest |= (byte & 127) << shift
                    if byte < 128:
                        break
                    shift += 7
                if kind == USAGE:
                    index = _USAGE_INDEX + number
                elif kind == NOTE:
                    index = _NOTE_INDEX
                else:
                    index = phase if number else _TIME_INDEX
                last[index] += rest >> 1 ^ -(rest & 1)
                values[number] = last[index]
            yield kind, phase, header_byte >> 5, values[0], values[1], values[2]


def _value_count(kind: int, phase: int) -> int:
    """Return the number of values of an event, as ``intercept/_watch.c`` does."""
    if kind == USAGE:
        return 3
    return 2 if kind != NOTE and phase in (DATA, FORWARD, OPTIMIZER) else 1
