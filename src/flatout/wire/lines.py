"""The lines of a record after its header, each with its ``kind`` in the file.

``sample`` fields hold a tensor's values at fixed positions, equal in every run (``None``: not
recorded).
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar, NamedTuple, Protocol

from flatout.wire.codec import OMIT_NONE, Doubles, Floats, Ints

AGENT_EVENT_KINDS = ("applied", "undone", "skipped", "failed", "noticed", "stopped", "unused")
"""The values of ``AgentEvent.what``."""


class Line(Protocol):
    """A dataclass that is a line of a record."""

    kind: ClassVar[str]


@dataclass(frozen=True)
class PackedTrace:
    """The events of torch since the previous line of this kind.

    Attributes:
        packed: the events one after the other. An event (``turns.TorchEvent``) is one byte,
            kind + 4 * phase + 32 * flags, followed by its values. Each value is stored as the
            difference to the previous value of its kind (times; modules; optimizers; each of the
            three usages; notes; all start from 0 at a header), zigzag-encoded and in LEB128.
    """

    kind: ClassVar[str] = "trace"

    packed: bytes


@dataclass(frozen=True)
class Losses:
    """The next losses from which backward calls started. Losses on an accelerator are read late.

    Attributes:
        packed: the losses in the order of the calls.
        peak_device_bytes: the largest amount of memory that torch has had allocated on the
            accelerator so far.
    """

    kind: ClassVar[str] = "losses"

    packed: Doubles
    peak_device_bytes: int | None = None


@dataclass(frozen=True)
class CpuUsage:
    """A reading of how much CPU time this job, and everything else on its CPUs, has used so far.

    Attributes:
        at_s: the time of the reading in seconds since the header was written.
        cpus, own_s, waited_s, preemptions, idle_s, stolen_s, pressure_s, throttled_s: see
            ``machine.usage.Usage``; ``None``: not measured.
        work_us: see ``machine.usage.fixed_work_us``.
    """

    kind: ClassVar[str] = "cpu"

    at_s: float
    cpus: int
    own_s: float
    waited_s: float | None = field(default=None, metadata=OMIT_NONE)
    preemptions: int | None = field(default=None, metadata=OMIT_NONE)
    idle_s: float | None = field(default=None, metadata=OMIT_NONE)
    stolen_s: float | None = field(default=None, metadata=OMIT_NONE)
    pressure_s: float | None = field(default=None, metadata=OMIT_NONE)
    throttled_s: float | None = field(default=None, metadata=OMIT_NONE)
    work_us: float | None = field(default=None, metadata=OMIT_NONE)


@dataclass(frozen=True)
class Inputs:
    """The inputs of the first calls of the outermost module.

    If the sizes of later calls differ, another line of this kind replaces this one.

    Attributes:
        tensors: one word of ``wire/signature.py`` for each tensor.
    """

    kind: ClassVar[str] = "inputs"

    tensors: tuple[str, ...]


@dataclass(frozen=True)
class ImportedFiles:
    """The Python files that the program has imported so far.

    There is one such line at the first outermost module call, and one at the end.

    Attributes:
        files: the paths of the files, except for the standard library and installed packages.
    """

    kind: ClassVar[str] = "imported_files"

    files: tuple[str, ...]


@dataclass(frozen=True)
class AgentEvent:
    """Something that the agent did, skipped or failed to do.

    Attributes:
        at_s: the time of the event in seconds since the header was written.
        what: one of ``AGENT_EVENT_KINDS``.
        subject: the subject of the event: a knob, ``KNOB=SETTING``, ``profile``, and so on.
        why: the reason, in one sentence.
        traceback: the traceback of a failure; ``None``: the event is no failure.
    """

    kind: ClassVar[str] = "event"

    at_s: float
    what: str
    subject: str
    why: str
    traceback: str | None = None


@dataclass(frozen=True)
class Captured:
    """A knob has captured or compiled a part of the program; the current step does not include it.

    Attributes:
        seconds: how long that took.
        at_s: the time of its end in seconds since the header was written.
    """

    kind: ClassVar[str] = "captured"

    seconds: float
    at_s: float = 0.0


@dataclass(frozen=True)
class FixedWork:
    """The time of a fixed piece of work (``agent/fixed_work.py``), measured about once a second.

    Attributes:
        cpu_us: the CPU time of the thread that did the work. Waiting for a CPU is not part of it; a
            lower clock and a busy sibling of the core lengthen it.
    """

    kind: ClassVar[str] = "fixed_work"

    cpu_us: float


@dataclass(frozen=True)
class Gradient:
    """The gradient that one optimizer step used for a parameter, before any clipping.

    Attributes:
        norm: the Euclidean norm over all elements.
        elements: the number of elements.
        sample: the values of some elements.
        roundoff: the unit roundoff of the arithmetic that computed the gradient; ``None``: not
            observed.
        noise: the gradient norm that rounding errors alone could produce (``agent/flows.py``);
            ``None``: not known, for example for matrix-shaped parameters.
    """

    norm: float
    elements: int
    sample: Floats | None
    roundoff: float | None = None
    noise: float | None = None


@dataclass(frozen=True)
class NamedGradient(Gradient):
    """A gradient with the name of its parameter.

    Attributes:
        name: the name of the parameter.
    """

    name: str = field(kw_only=True)


@dataclass(frozen=True)
class Gradients:
    """The gradients that one optimizer step used.

    Attributes:
        parameters: the gradient of each parameter that the step updates.
    """

    kind: ClassVar[str] = "gradients"

    parameters: tuple[NamedGradient, ...]


@dataclass(frozen=True)
class OutputTensor:
    """A floating-point tensor that a forward pass returned.

    Attributes:
        shape: the shape of the tensor; a loss has one element.
        mean, rms: the mean and the root mean square over all elements.
        sample: the values of some elements.
        top1: for some rows (along the last dimension), the index of the largest element.
        lead: for the same rows, the difference between the largest and the second largest element.
    """

    shape: tuple[int, ...]
    mean: float
    rms: float
    sample: Floats | None
    top1: Ints | None
    lead: Floats | None


@dataclass(frozen=True)
class Output:
    """An outermost forward call outside training (evaluation or inference).

    Attributes:
        root: the name of the module, which is that of its class.
        inputs: the SHA-256 of all input tensors; ``None``: not recorded.
        digest: the SHA-256 of all output tensors; ``None``: not recorded.
        tensors: the first floating-point output tensors.
    """

    kind: ClassVar[str] = "outputs"

    root: str
    inputs: str | None
    digest: str | None
    tensors: tuple[OutputTensor, ...]


@dataclass(frozen=True)
class BufferState:
    """A floating-point buffer of a module, such as the running mean of batch norm.

    Attributes:
        name: the name of the buffer.
        mean, rms: the mean and the root mean square over all elements.
    """

    name: str
    mean: float
    rms: float


@dataclass(frozen=True)
class RootState:
    """The state of an outermost module when the run ended.

    Attributes:
        root: the name of the module, which is that of its class.
        digest: the SHA-256 of all its parameters and buffers.
        non_finite: the number of elements of these that are not finite.
        buffers: the floating-point buffers of the module.
        probability_count: the number of inspected elements of outputs in training, if all of them
            lie in [0, 1] (they look like probabilities), else 0.
        saturated_count: the number of these elements that are exactly 1.
    """

    root: str
    digest: str
    non_finite: int
    buffers: tuple[BufferState, ...]
    probability_count: int = 0
    saturated_count: int = 0


@dataclass(frozen=True)
class State:
    """The state of the outermost modules when the run ended.

    Attributes:
        roots: the state of each outermost module.
    """

    kind: ClassVar[str] = "state"

    roots: tuple[RootState, ...]


@dataclass(frozen=True)
class Learned:
    """The result of comparing a setting with the baseline during the real training.

    Attributes:
        knob, setting: the knob and its setting.
        kept: whether the setting stays applied after the comparison.
        value, low, high, pairs: the fields of the speedup, see ``ratios.Ratio``.
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
    """The results of a comparison during the real training.

    Attributes:
        settings: the result for each setting.
    """

    kind: ClassVar[str] = "learned"

    settings: tuple[Learned, ...]


@dataclass(frozen=True)
class WholeCalls:
    """Calls that every rank has computed whole.

    Attributes:
        module: the class of the module.
        why: the reason, as a clause.
        count: how many.
    """

    module: str
    why: str
    count: int


class Lap(NamedTuple):
    """What a rank has done since the lap before. A lap ends with an optimizer step, or with a root
    call that records no gradients.

    Attributes:
        number: of the lap, from 0; the same on all ranks.
        end_s: its end, in seconds since the header was written.
        program_s, testing_s, shard_s, waiting_s, communication_s, comparison_s: time by phase, see
            ``parallel.balance.Phase``.
        calls, rows: the number of calls that were shared out, and of their samples.
        backwards: the number of backward calls of shards.
        meetings: how often the ranks have compared headers.
        gathers, gathered_bytes: how often tensors were gathered, and the size of what all ranks
            have got.
        sums, summed_bytes: how often tensors were added up over the ranks, and their size.
    """

    number: int
    end_s: float
    program_s: float
    testing_s: float
    shard_s: float
    waiting_s: float
    communication_s: float
    comparison_s: float
    calls: int
    rows: int
    backwards: int
    meetings: int
    gathers: int
    gathered_bytes: int
    sums: int
    summed_bytes: int


@dataclass(frozen=True)
class SharedWork:
    """What a rank has shared out with the others, and what it has spent its time on, until the end
    of the program or until rank 0 went on alone.

    Attributes:
        ranks: their number.
        shared: the number of calls that were shared out, by the class of the module.
        whole: those that were not.
        seconds: time by phase, see ``parallel.balance.Phase``.
        laps: the last ones, in order.
    """

    kind: ClassVar[str] = "ranks"

    ranks: int
    shared: dict[str, int]
    whole: tuple[WholeCalls, ...]
    seconds: dict[str, float]
    laps: tuple[Lap, ...] = ()


@dataclass(frozen=True)
class End:
    """The last line of a process that ended in an orderly way.

    Attributes:
        at_s: the time of the end in seconds since the header was written.
        reason: ``exit`` or ``stopped``.
        peak_device_bytes: the same as in ``Losses``; it is recorded even if no loss was read.
    """

    kind: ClassVar[str] = "end"

    at_s: float
    reason: str
    peak_device_bytes: int | None = None
