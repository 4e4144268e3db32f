"""The calls of a step that were replayed one by one, bare and under settings."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import ClassVar

OPTIMIZER_SUFFIX = ".step"
"""How the names of calls end that are steps of optimizers."""

BARE = ""
"""The label of the calls as they are, without any setting."""


def label(settings: Mapping[str, str]) -> str:
    """Return the label of settings: ``KNOB=SETTING``, separated by commas, by name."""
    return ",".join(f"{knob}={setting}" for knob, setting in sorted(settings.items()))


def parse_label(text: str) -> frozenset[str]:
    """Return the settings of a label, each as ``KNOB=SETTING``."""
    return frozenset(filter(None, text.split(",")))


@dataclass(frozen=True)
class ReplayedCall:
    """Calls of one of torch's functions with the same arguments, but for the values of tensors.

    Attributes:
        name: the name of the function, or of the class of the optimizer that steps.
        count: the number of these calls in a step.
        times_ms: for each label the time of one call with its backward pass, in each round. Bare
            and all settings take turns in a round. A label is missing if its settings, or some of
            them, do not act on the call: the label with the others tells its time. A call on which
            no setting acts is timed once.
    """

    name: str
    count: int
    times_ms: Mapping[str, tuple[float, ...]]


@dataclass(frozen=True)
class Replayed:
    """The replayed calls of one step.

    Attributes:
        settings: the labels of the settings under which calls were replayed, without effect or not.
        calls: the calls; those on which no setting acts come last.
        untimed_ms: the time per step of the calls for which no time was left; they were run once.
        skipped: the calls that could not be replayed: the number of calls for each reason.
        failed: the settings that were not replayed, each with the reason.
        seconds: the time that the replay took.
    """

    kind: ClassVar[str] = "replay"

    settings: tuple[str, ...] = ()
    calls: tuple[ReplayedCall, ...] = ()
    untimed_ms: float = 0.0
    skipped: Mapping[str, int] = field(default_factory=dict)
    failed: Mapping[str, str] = field(default_factory=dict)
    seconds: float = 0.0
