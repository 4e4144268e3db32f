"""The lines of a record after its header, each with the ``kind`` that it has in the file.

A sample is the values of some elements, the same ones in every run; ``None`` means that it was not
taken.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar, Protocol

from flatout.wire.codec import Doubles, Floats, Ints

AGENT_EVENT_KINDS = ("applied", "undone", "skipped", "failed", "noticed", "stopped", "unused")


class Line(Protocol):
    """A dataclass that is a line of a record."""

    kind: ClassVar[str]


@dataclass(frozen=True)
class PackedTrace:
    """What torch did since the line before.

    Attributes:
        packed: the events one after the other. An event (``turns.TorchEvent``) is one byte,
            kind + 4 * phase + 32 * flags, then its values. Each value is the difference to the
            last one of its kind in the file (times; modules; optimizers; each of the three usages;
            notes; all start from 0 at a header), zigzag-encoded and in LEB128.
    """

    kind: ClassVar[str] = "trace"

    packed: bytes


@dataclass(frozen=True)
class Losses:
    """The next losses that backward calls started from; those of an accelerator arrive late.

    Attributes:
        packed: the losses in the order of the calls.
        peak_device_bytes: most memory that torch had allocated on the accelerator so far.
    """

    kind: ClassVar[str] = "losses"

    packed: Doubles
    peak_device_bytes: int | None = None


@dataclass(frozen=True)
class Inputs:
    """What goes into the first calls of outermost modules.

    Another such line takes its place when later calls differ in sizes.

    Attributes:
        tensors: each tensor in the words of ``wire/signature.py``.
    """

    kind: ClassVar[str] = "inputs"

    tensors: tuple[str, ...]


@dataclass(frozen=True)
class ImportedFiles:
    """The files that the program has imported by the first outermost module call, and by the end.

    Attributes:
        files: their paths, without those of the standard library and of installed packages.
    """

    kind: ClassVar[str] = "imported_files"

    files: tuple[str, ...]


@dataclass(frozen=True)
class AgentEvent:
    """What the agent did, skipped or failed to do.

    Attributes:
        at_s: seconds since the header was written.
        what: one of ``AGENT_EVENT_KINDS``.
        subject: what it is about: a knob, ``profile``, and so on.
        why: one sentence.
        traceback: of a failure.
    """

    kind: ClassVar[str] = "event"

    at_s: float
    what: str
    subject: str
    why: str
    traceback: str | None = None


@dataclass(frozen=True)
class Gradient:
    """What one update of a parameter was made from, before any clipping.

    Attributes:
        norm: Euclidean norm over all elements.
        elements: how many elements there are.
        sample: some of them.
        roundoff: unit roundoff of the arithmetic that computed it; ``None``: not seen.
        noise: norm that rounding alone can give it; ``None``: not known, as of a matrix
            (``agent/flows.py``).
    """

    norm: float
    elements: int
    sample: Floats | None
    roundoff: float | None = None
    noise: float | None = None


@dataclass(frozen=True)
class NamedGradient(Gradient):
    """A gradient with the name of its parameter."""

    name: str = field(kw_only=True)


@dataclass(frozen=True)
class Gradients:
    """The gradients that one update is made from."""

    kind: ClassVar[str] = "gradients"

    parameters: tuple[NamedGradient, ...]


@dataclass(frozen=True)
class OutputTensor:
    """A floating-point tensor that a forward pass returned.

    Attributes:
        shape: its sizes; a loss has one element.
        mean, rms: over all elements.
        sample: some of them.
        top1: index of the largest element of some rows (along the last dimension).
        lead: difference between the largest and the second largest element of these rows.
    """

    shape: tuple[int, ...]
    mean: float
    rms: float
    sample: Floats | None
    top1: Ints | None
    lead: Floats | None


@dataclass(frozen=True)
class Output:
    """A call of an outermost module that does not train.

    Attributes:
        root: the module, by its class.
        inputs: SHA-256 of all tensors that went in; ``None``: not taken.
        digest: SHA-256 of all tensors that came out; ``None``: not taken.
        tensors: the first floating-point tensors that came out.
    """

    kind: ClassVar[str] = "outputs"

    root: str
    inputs: str | None
    digest: str | None
    tensors: tuple[OutputTensor, ...]


@dataclass(frozen=True)
class BufferState:
    """A floating-point buffer of a module, such as the running mean of batch norm."""

    name: str
    mean: float
    rms: float


@dataclass(frozen=True)
class RootState:
    """An outermost module at the end.

    Attributes:
        root: the module, by its class.
        digest: SHA-256 of all its parameters and buffers.
        non_finite: how many of their elements are not finite.
        buffers: its floating-point buffers.
        probabilities: how many of its outputs in training were looked at, if all of them are
            between 0 and 1; otherwise 0.
        ones: how many of these were exactly 1.
    """

    root: str
    digest: str
    non_finite: int
    buffers: tuple[BufferState, ...]
    probabilities: int = 0
    ones: int = 0


@dataclass(frozen=True)
class State:
    """The outermost modules at the end."""

    kind: ClassVar[str] = "state"

    roots: tuple[RootState, ...]


@dataclass(frozen=True)
class Learned:
    """What a comparison in the real training has shown of a setting.

    Attributes:
        knob, setting: what was compared with the bare program.
        kept: whether it is on from then on.
        value, low, high, pairs: the ratio, see ``ratios.Ratio``.
    """

    knob: str
    setting: str
    kept: bool
    value: float
    low: float
    high: float
    pairs: int


@dataclass(frozen=True)
class LearnedSettings:
    """What a comparison in the real training has shown."""

    kind: ClassVar[str] = "learned"

    settings: tuple[Learned, ...]


@dataclass(frozen=True)
class End:
    """The last line of a process that ended in an orderly way.

    Attributes:
        at_s: seconds since the header was written.
        reason: ``exit`` or ``stopped``.
        peak_device_bytes: as in ``Losses``, also where no loss was read.
    """

    kind: ClassVar[str] = "end"

    at_s: float
    reason: str
    peak_device_bytes: int | None = None
