"""What the ranks tell each other each time they meet: 64 bytes, which are to be the same."""

from __future__ import annotations

import dataclasses
import enum
import operator
import struct
import zlib
from collections.abc import Sequence
from dataclasses import dataclass


class Meeting(enum.IntEnum):
    """What the ranks meet for."""

    CALL = 2
    RULE = 3
    OUTPUTS = 4
    CROSSING = 5
    GRADIENTS = 6
    STATISTICS = 7
    BATCH = 8


@dataclass(frozen=True)
class Header:
    """What a rank says when the ranks meet. All numbers are unsigned; digests have 64 bits.

    Attributes:
        sequence: number of the meeting, from 0.
        meeting: what for.
        outcome: how a shard went; 0: well, else bits.
        subject: digest of what the meeting is about.
        structure: digest of structure, dtypes and sizes.
        content: digest of the content of tensors.
        generators: digest of the states of the random generators.
        parameters: digest of parameters and optimizer states, 0 where they are not compared.
        bits: one bit for each tensor.
    """

    sequence: int
    meeting: Meeting
    outcome: int = 0
    subject: int = 0
    structure: int = 0
    content: int = 0
    generators: int = 0
    parameters: int = 0
    bits: int = 0

    def pack(self, sequence: int) -> bytes:
        """Return the header as 64 bytes, with another number of the meeting."""
        return _FORMAT.pack(sequence, *_fields_but_the_first(self))

    @classmethod
    def unpack(cls, data: bytes) -> Header:
        """Return the header from 64 bytes."""
        sequence, meeting, *rest = _FORMAT.unpack(data)
        return cls(sequence, Meeting(meeting), *rest)


_FORMAT = struct.Struct("<QII6Q")

_fields_but_the_first = operator.attrgetter(*[f.name for f in dataclasses.fields(Header)][1:])

BYTES = _FORMAT.size

MOST_ATTACHED_BYTES = 8 << 10
MOST_ATTACHED_BYTES_OVER_NETWORKS = 1 << 10
MOST_ATTACHED_BYTES_OF_ALL = 64 << 10
"""Most bytes that a rank adds to its header, and all ranks together: statistics of a batch norm
with 511 channels need no exchange of their own then (63 over networks)."""


def attached_bytes(size: int, is_fast: bool) -> int:
    """Return how many bytes each rank adds to its header.

    Args:
        size: number of ranks.
        is_fast: whether the ranks share memory.
    """
    most = MOST_ATTACHED_BYTES if is_fast else MOST_ATTACHED_BYTES_OVER_NETWORKS
    return min(most, MOST_ATTACHED_BYTES_OF_ALL // size // 8 * 8)


def first_difference(headers: Sequence[Header], names: Sequence[str]) -> tuple[str, int] | None:
    """Return the first field in which a rank differs from rank 0, and this rank; ``None`` if the
    headers agree.

    Args:
        headers: by rank.
        names: of the fields to compare, the most telling first.
    """
    for name in names:
        values = [getattr(header, name) for header in headers]
        for rank, value in enumerate(values):
            if value != values[0]:
                return name, rank
    return None


def digest(value: object) -> int:
    """Return a digest of what ``repr`` shows, which is the same in every process."""
    data = repr(value).encode("utf-8", "backslashreplace")
    return zlib.crc32(data) << 32 | zlib.adler32(data)
