"""Replaying the calls of a step one by one, as they are and under settings.

One step is described call by call (``calls.py``). Each distinct call is then made again on tensors
of the same form, with its backward pass, bare and under each setting that acts on it. A setting may
change the dtype or the memory layout of what a call returns (``Knob.inside``). These changes are
passed on from call to call as in the step, so a ReLU behind a convolution in bfloat16 is replayed
in bfloat16, and each cast is made where the program would make it. Other settings act on the calls
that they count (``Knob.waits_for_calls``).

All settings take turns: a round makes the calls bare, then under each setting, and the next round
goes through them in reverse order. The caches are thus as cold as in a step.

Replayed calls leave out what happens between calls: Python, the accumulation of gradients, the
memory that a step holds between its calls, and the data that the call before has left in the
caches.
"""

from __future__ import annotations

import sys
import time
import traceback
import warnings
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch

from flatout import knobs
from flatout.agent import ensemble
from flatout.agent.bench import Bench
from flatout.agent.calls import CallLog, restored_randomness
from flatout.agent.groups import find_groups
from flatout.agent.rounds import time_groups
from flatout.intercept import device, handled_calls
from flatout.intercept.modes import without_autocast
from flatout.knob import Facts
from flatout.knobs import fastpath
from flatout.wire.replay import Replayed
from flatout.wire.request import Replay
from flatout.wire.turns import Turn

if TYPE_CHECKING:
    from flatout.intercept.host import Host
    from flatout.wire.profile import Profile

ALTERNATIVES = 2
"""The number of settings of a knob that are replayed, as many as a tune may try."""


class Replayer:
    """The stage that describes a step and replays its calls at the boundary after it.

    Args:
        host: the host of this process.
        request: what may be replayed.
        read_profile: returns the profile; ``None``: there is none.
    """

    def __init__(
        self, host: Host, request: Replay, read_profile: Callable[[], Profile | None]
    ) -> None:
        self._host = host
        self._request = request
        self._read_profile = read_profile
        self._log: CallLog | None = None
        self._began_ns = 0

    def at_boundary(self, turn: Turn) -> bool:
        """Begin the step that is described, or replay it; return whether this is over."""
        host = self._host
        if self._log is None:
            refusal = self._find_refusal()
            if refusal is not None:
                host.events.add("skipped", "replay", refusal)
                return True
            self._log = CallLog(host)
            host.mark = "profiled"
            self._begin()
            return False
        if not host.counts_as_step(turn):
            self._begin()  # an evaluation pass between two steps
            return False
        step_s = (time.perf_counter_ns() - self._began_ns) / 1e9
        self._log.close()
        host.mark = None
        try:
            host.record.write(self._replay(self._log, step_s))
        except Exception as error:  # noqa: BLE001 - recorded with its traceback
            why = f"{type(error).__name__}: {error}"[:300]
            host.events.add("failed", "replay", why, traceback.format_exc())
        return True

    def _begin(self) -> None:
        assert self._log is not None
        self._log.open()
        self._began_ns = time.perf_counter_ns()

    def _find_refusal(self) -> str | None:
        """Return the reason why nothing can be replayed, as a clause."""
        profile = self._read_profile()
        if profile is None or not profile.operators:
            return "there is no profile"
        if ensemble.find(self._host.roots) is not None:
            return "other processes would wait for this one"
        if any(o.name.removeprefix("aten::") in fastpath.OPERATORS for o in profile.operators):
            return "torch runs transformer layers by its fast path, which no mode can see"
        if _is_compiled():
            return "parts of the program are compiled"
        return None

    def _replay(self, log: CallLog, step_s: float) -> Replayed:
        request = self._request
        limit_s = min(max(request.steps * step_s, request.least_seconds), request.most_seconds)
        settings = choose_settings(request.settings, self._read_profile())
        with self._host.hooks.asleep():
            return replay(log, settings, limit_s)


def replay(
    log: CallLog,
    settings: Sequence[tuple[str, str]],
    limit_s: float,
    now_ns: Callable[[], int] = time.perf_counter_ns,
) -> Replayed:
    """Replay the calls of a step.

    Random states and modes are left as they were. The program's hooks are not called, because no
    module, parameter or optimizer of the program takes part.

    Args:
        log: the description of the step.
        settings: the knobs and settings under which calls are replayed.
        limit_s: the time that this may take, in seconds.
        now_ns: the clock.
    """
    handled = handled_calls.counts.copy()
    with (
        restored_randomness(),
        warnings.catch_warnings(),
        torch.inference_mode(False),
        without_autocast(),
    ):
        warnings.simplefilter("ignore")
        bench = Bench(log, settings, limit_s, now_ns)
        replayed = time_groups(bench, find_groups(bench))
    handled_calls.counts.clear()
    handled_calls.counts.update(handled)
    return replayed


def _is_compiled() -> bool:
    """Whether the program has compiled anything: a mode would make it compile again."""
    dynamo: Any = sys.modules.get("torch._dynamo.utils")
    return dynamo is not None and bool(dynamo.counters["frames"])


def choose_settings(allowed: Sequence[str], profile: Profile | None) -> list[tuple[str, str]]:
    """Choose the settings that a tune would try, as far as the profile tells."""
    names = [o.name for o in (profile.operators if profile else None) or ()]
    accelerator = device.accelerator_in_use()
    facts = Facts(
        "cpu" if accelerator is None else accelerator.type,
        operators=dict.fromkeys(names, 1.0),
        unfused_attention_share=1.0,
    )
    chosen = []
    for name, knob in knobs.registry().items():
        if knob.is_replayable:
            offered = [s for s in knob.offer(facts).settings if f"{name}={s}" in allowed]
            chosen += [(name, setting) for setting in offered[:ALTERNATIVES]]
    return chosen
