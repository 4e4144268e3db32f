"""What a knob is: what it says of itself, what it is told, and what it does.

The controller reads a knob to know what can be tried, the agent applies it. So nothing here, and
nothing at the top of a knob's file, imports torch.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal

from flatout.errors import UserError

if TYPE_CHECKING:
    from flatout.intercept.host import Host
    from flatout.intercept.place import Undo

Exactness = Literal["bitwise", "reordered", "reduced", "resampled", "reshuffled"]
"""What a setting may change, at most. It decides what proof is asked for."""

EXACTNESS: Mapping[Exactness, str] = {
    "bitwise": "nothing changes",
    "reordered": "the same arithmetic in another order",
    "reduced": "lower precision",
    "resampled": "other random numbers of the same distribution",
    "reshuffled": "other random numbers, and with them another order of the data",
}
"""What each class means."""

MATMUL_OPERATORS = ("mm", "linear", "matmul", "conv", "attention", "lstm", "gru", "rnn")
"""Parts of the names of operators that multiply matrices or convolve."""


@dataclass(frozen=True)
class Facts:
    """What is known about job and machine before anything is tried.

    Attributes:
        device: type of the device that the job computes on (``"cpu"``, ``"cuda"``, ...).
        matmul_flops_per_s: measured matrix product rate of the device for each dtype name; ``None``
            or missing where it was not measured.
        updates: whether optimizer objects step in the job's loop.
        optimizers: how many optimizers there are; ``None``: not known.
        huge_pages: state of transparent huge pages (``always``, ``madvise``, ``never``).
        threads: how many threads torch takes for an operator.
        main_dtype: in which most of the arithmetic is done; ``None``: not known.
        operators: share of the step that each of torch's operators takes, by name; ``None``: not
            measured.
        optimizer_share, data_share, page_fault_share: of the step's time, in steps of optimizers,
            waiting for data, and for page faults; ``None``: not measured.
        unfused_attention_share: in attention that torch has no fused kernel for; ``None``: not
            measured.
        loader_settings: settings of the knob ``loader`` that one of the job's loaders can take;
            ``None``: not known.
        opens_images: whether the job's main process has opened an image by Pillow; ``None``: not
            known.
        overhead_share: in Python and dispatch around operators; ``None``: not measured.
    """

    device: str
    matmul_flops_per_s: Mapping[str, float | None] = field(default_factory=dict)
    updates: bool = True
    optimizers: int | None = None
    huge_pages: str | None = None
    threads: int | None = None
    main_dtype: str | None = None
    operators: Mapping[str, float] | None = None
    optimizer_share: float | None = None
    data_share: float | None = None
    page_fault_share: float | None = None
    unfused_attention_share: float | None = None
    overhead_share: float | None = None
    loader_settings: tuple[str, ...] | None = None
    opens_images: bool | None = None

    def lack(self, *words: str) -> bool:
        """Whether it is known that no operator with one of these words in its name is called."""
        operators = self.operators
        return operators is not None and not any(w in name for name in operators for w in words)

    def share(self, *words: str) -> float | None:
        """Of the step, in operators with one of these words in their name; ``None``: unknown."""
        if self.operators is None:
            return None
        named = (
            share for name, share in self.operators.items() if any(word in name for word in words)
        )
        return min(1.0, math.fsum(named))


@dataclass(frozen=True)
class Card:
    """What a user should know about a knob, in Markdown.

    Attributes:
        what: what it does.
        helps: when it helps.
        hurts: when it hurts.
        by_hand: how to do the same in one's own code.
        sources: documentation, papers, issues.
    """

    what: str
    helps: str
    hurts: str
    by_hand: str
    sources: tuple[str, ...]


@dataclass(frozen=True)
class Match:
    """Which settings are worth a trial.

    Attributes:
        settings: the most promising first.
        refusal: why there is none.
        share: of the step, what they can save at most (Amdahl 1967: a gain of 1 / (1 - share));
            ``None``: not known.
    """

    settings: tuple[str, ...]
    refusal: str | None = None
    share: float | None = None

    @property
    def bound(self) -> float | None:
        """The speed-up that cannot be exceeded; ``None``: not known."""
        return None if self.share is None else 1 / max(1 - self.share, 1e-3)


@dataclass(frozen=True)
class Knob:
    """One thing that can be turned.

    Attributes:
        name: as in a plan.
        summary: one sentence: what it does.
        settings: from the gentlest to the boldest.
        exactness: of each setting.
        hot: whether it can be applied and undone between two steps of a living process.
        platforms: device types it is for.
        card: what a user should know about it.
        match: which settings to try, given the facts, on a device of its platforms.
        apply: sets it, in the user's process, at a step boundary or before the first step; returns
            what undoes it at a later step boundary. Raises ``RefusedError`` where it can do
            nothing, or where the program has chosen already; what it leaves alone later, it says
            by a ``skipped`` event.
        claims: what it takes into its own hands, in words; two knobs of a plan must not claim the
            same.
        slow_start: whether the first steps under it take longer than a comparison inside one
            process does, so that it is tried in processes of its own.
        kernels: what it needs of ``flatout.kernels``; built before the job starts.
        waits_for_calls: whether it does nothing until a call comes that it takes; it counts these
            (``intercept/engagement.py``), and where none came, the record says that it had no
            effect.
        variables: of a cold knob: environment variables that the job must start with, given the
            setting and the environment as it is; none where the user has chosen already.
    """

    name: str
    summary: str
    settings: tuple[str, ...]
    exactness: Mapping[str, Exactness]
    hot: bool
    platforms: tuple[str, ...]
    card: Card
    match: Callable[[Facts], Match]
    apply: Callable[[Host, str], Undo]
    claims: tuple[str, ...] = ()
    slow_start: bool = False
    kernels: tuple[str, ...] = ()
    waits_for_calls: bool = False
    variables: Callable[[str, Mapping[str, str]], Mapping[str, str]] | None = None

    def offer(self, facts: Facts) -> Match:
        """Which settings to try, given the facts."""
        if facts.device not in self.platforms:
            return Match((), f"it is for {', '.join(self.platforms)}, not for {facts.device}")
        return self.match(facts)


class ConflictError(UserError):
    """Two knobs that take the same thing into their hands."""


class UnknownSettingError(UserError):
    """A knob, or a setting of a knob, that does not exist."""
