"""A knob's interface: its description, the facts that decide whether it is tried, and how it is
applied.

The controller reads a knob's description to decide which settings to try, and the agent applies the
knob in the user's process. The controller has no torch, so neither this file nor the top level of a
knob's file may import torch.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

from flatout.errors import UserError

if TYPE_CHECKING:
    from flatout.intercept.host import Host
    from flatout.intercept.patch import Undo

Exactness = Literal["bitwise", "reordered", "reduced", "resampled", "reshuffled"]
"""The class of a setting: the most that it may change about a program's results. The class decides
which proof is needed."""

EXACTNESS: Mapping[Exactness, str] = {
    "bitwise": "nothing changes",
    "reordered": "the same arithmetic in another order",
    "reduced": "lower precision",
    "resampled": "other random numbers of the same distribution",
    "reshuffled": "other random numbers, and with them another order of the data",
}
"""The meaning of each class, as a phrase for the user."""

MATMUL_OPERATORS = (
    "mm",
    "::linear",
    "mkldnn_linear",
    "matmul",
    "conv",
    "attention",
    "lstm",
    "gru",
    "rnn",
)
"""Substrings of the names of operators that consist of matmuls or convolutions."""


OPTIMIZER_STEP = "Optimizer.step"
"""Stands among operators for the steps of optimizer objects, which are known without a profile."""


@dataclass(frozen=True)
class Facts:
    """The facts about job and machine that are known before any setting is tried.

    A share is a fraction of the step time, from 0 to 1. ``None`` means that a fact is not known.

    Attributes:
        device: the type of the device that the job computes on (``"cpu"``, ``"cuda"``, ...).
        matmul_flops_per_s: a map from the name of a dtype to the measured matmul rate of the
            device; a rate that was not measured is ``None`` or missing.
        has_optimizer_steps: whether the steps of the job's loop contain steps of optimizer objects.
        optimizers: the number of optimizers.
        huge_pages: the setting of transparent huge pages (``always``, ``madvise``, ``never``).
        threads: the number of torch's intra-op threads.
        main_dtype: the name of the dtype in which most of the arithmetic is done.
        operators: a map from the name of each of torch's operators to its share.
        optimizer_share: the share of optimizer steps.
        data_share: the share of waiting for data.
        page_fault_share: the share of page faults.
        unfused_attention_share: the share of attention for which torch has no fused kernel.
        overhead_share: the share of Python and dispatch around operators.
        loader_settings: the settings of the knob ``loader`` that apply to at least one of the job's
            loaders.
        opens_images: whether the job's main process has imported Pillow's JPEG plugin, as opening
            an image with Pillow does.
        step_ms: the time of a step.
        module_share: the share of forward and backward passes.
        calls_modules: whether the job calls modules.
        is_distributed: whether the job consists of several processes that train together.
        isolation_refusal: the reason why jobs cannot run in a copy-on-write view of the files;
            ``None``: they can, or it is not known.
        spare_memory_bytes: how much more memory than the job alone a plan may need.
    """

    device: str
    matmul_flops_per_s: Mapping[str, float | None] = field(default_factory=dict)
    has_optimizer_steps: bool = True
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
    step_ms: float | None = None
    module_share: float | None = None
    calls_modules: bool | None = None
    is_distributed: bool | None = None
    isolation_refusal: str | None = None
    spare_memory_bytes: float | None = None

    def lack(self, *words: str) -> bool:
        """Whether it is known that a step calls no operator with any of these words in its name."""
        operators = self.operators
        return operators is not None and not any(w in name for name in operators for w in words)

    def share(self, *words: str) -> float | None:
        """Return the share of all operators with any of these words in their name; ``None``:
        unknown."""
        if self.operators is None:
            return None
        shares = (
            share for name, share in self.operators.items() if any(word in name for word in words)
        )
        return min(1.0, math.fsum(shares))


@dataclass(frozen=True)
class Card:
    """The documentation of a knob for users, in Markdown.

    Attributes:
        what: what the knob does to the program.
        helps: which programs the knob makes faster.
        hurts: which programs the knob makes slower or worse.
        by_hand: how to do the same without flatout, in the program's code.
        sources: the documentation, papers and issues that this is based on.
    """

    what: str
    helps: str
    hurts: str
    by_hand: str
    sources: tuple[str, ...]


@dataclass(frozen=True)
class Match:
    """The settings of a knob that are worth a trial.

    Attributes:
        settings: the settings, the most promising first.
        refusal: the reason why there is no setting to try, as a clause for the user.
        share: the largest share of the step time that the settings can save; ``None``: not known.
    """

    settings: tuple[str, ...]
    refusal: str | None = None
    share: float | None = None

    @property
    def bound(self) -> float | None:
        """The largest possible speedup, 1 / (1 - share) (Amdahl 1967); ``None``: not known."""
        return None if self.share is None else 1 / max(1 - self.share, 1e-3)


def _keep_arguments(function: Any, args: tuple[Any, ...]) -> tuple[Any, ...]:
    return args


def _keep_outputs(outputs: Any) -> Any:
    return outputs


@dataclass(frozen=True)
class Inside:
    """What a setting does inside outermost module calls, for single calls of torch's functions that
    are replayed outside of the program (``agent/replay.py``).

    Attributes:
        undo: undoes what was applied to the whole process.
        context: returns the context in which one call is made, given the weight if the call is the
            last matmul or convolution of its module, else ``None``.
        convert: returns the arguments of a call, given torch's function and its arguments.
        leave: converts what the outermost module returns.
        is_everywhere: whether it acts on all operators of ``Knob.replaces``, in a way that no
            result shows.
    """

    undo: Undo = lambda: None
    context: Callable[[Any], AbstractContextManager[Any]] = lambda weight: nullcontext()
    convert: Callable[[Any, tuple[Any, ...]], tuple[Any, ...]] = _keep_arguments
    leave: Callable[[Any], Any] = _keep_outputs
    is_everywhere: bool = False


@dataclass(frozen=True)
class Knob:
    """One change to how a program runs, with one or more settings.

    Attributes:
        name: the name of the knob in plans and on the command line.
        summary: an imperative clause that says what the knob does.
        settings: the names of the knob's settings, from the gentlest to the boldest.
        exactness: a map from each setting to its class.
        hot: whether the knob can be applied and undone between two steps of a running process.
        platforms: the device types that the knob supports.
        card: the documentation for users.
        match: returns the settings to try, given the facts; called only if the device is one of
            ``platforms``.
        apply: applies a setting in the user's process, at a step boundary or before the first step,
            and returns a function that undoes this at a later step boundary. It raises
            ``RefusedError`` if the knob can do nothing, or if the program has made this choice
            itself. It adds ``skipped`` events for parts of the program that it leaves alone.
        claims: names for the things that the knob changes. Two knobs with a common claim are never
            combined in one plan.
        slow_start: whether the first steps with the knob take longer than a comparison inside one
            process; the knob is then tried in fresh processes.
        kernels: the names of the kernels (``flatout.kernels``) that the knob needs. They are built
            before the job starts.
        extensions: the names of the extensions (``flatout.kernels.extensions``) that it uses. Only
            the job itself can build them, which takes up to a minute, once.
        waits_for_calls: whether the knob acts only on certain calls. It then counts the calls that
            it handles (``intercept/handled_calls.py``). If it handles none, the record says that it
            had no effect.
        variables: only for a knob that is not hot: returns the environment variables that the job
            must start with, given the setting and the present environment. The result is empty if
            the user has made this choice already.
        proof_setting: for a setting of class ``resampled``: a slower stand-in used only in proofs.
            It draws the same other random numbers, but advances torch's generator exactly as the
            original would, so the data order stays equal to the baseline's. ``None``: the knob has
            no such setting.
        background_settings: the settings that start other processes. These keep using cores while
            the run is paused, so such runs cannot be interleaved with others.
        memory_settings: the settings that need more memory by design, as the card says. If a plan
            needs too much memory, they are left out first.
        hides_gains: whether the knob makes the step so much shorter, or so different, that settings
            which gain nothing beside it may gain without it. They are tried again if the knob is
            dropped.
        replaces: parts of the names of the operators that the knob replaces or changes, or
            ``OPTIMIZER_STEP``; empty: it stands behind no operators. The gain of such a knob is
            predicted by replaying calls (``agent/replay.py``), if it is hot.
        inside: only for a knob that acts by the way outermost modules are called: applies a setting
            to calls that are replayed; ``None``: ``apply`` acts on these as well.
        shares_cpus: whether the knob decides how many threads or processes work at the same time.
            What such a setting gains depends on the others of this kind, by far more than a factor
            (one thread is fast beside a process that prefetches, and slow alone), so each is
            compared without the others.
        slow_switch: whether it takes tens of milliseconds to apply the knob or to undo it. Beside
            others, such a setting would be switched at every second block of a comparison, so it is
            compared without the others.
        needs_quiet: whether the knob decides how many CPUs the program uses. Beside other work,
            fewer threads look better than they are, so its gain counts only where other processes
            are known to have left the CPUs alone.
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
    extensions: tuple[str, ...] = ()
    waits_for_calls: bool = False
    variables: Callable[[str, Mapping[str, str]], Mapping[str, str]] | None = None
    proof_setting: str | None = None
    background_settings: tuple[str, ...] = ()
    memory_settings: tuple[str, ...] = ()
    hides_gains: bool = False
    replaces: tuple[str, ...] = ()
    inside: Callable[[Host, str], Inside] | None = None
    shares_cpus: bool = False
    slow_switch: bool = False
    needs_quiet: bool = False

    @property
    def is_compared_alone(self) -> bool:
        """Whether its settings are compared with bare, each without any other."""
        return self.shares_cpus or self.slow_switch

    @property
    def is_replayable(self) -> bool:
        """Whether its settings can be applied to single calls that are replayed."""
        return bool(self.replaces) and self.hot and not self.slow_start

    def offer(self, facts: Facts) -> Match:
        """Return the settings to try, given the facts; none on a device that is not supported."""
        if facts.device not in self.platforms:
            return Match((), f"it is for {', '.join(self.platforms)}, not for {facts.device}")
        return self.match(facts)


class ConflictError(UserError):
    """Two knobs of a plan change the same thing."""


class UnknownSettingError(UserError):
    """A knob, or a setting of a knob, does not exist."""
