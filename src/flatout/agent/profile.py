"""A short profiled window after the timed steps, aggregated in process.

``steps`` turns under torch's profiler, then one under the FLOP counter. Both are entered and left
at step boundaries. The record gets one line::

    {"kind": "profile", "steps": 5, "step_ms": 12.3,
     "operators": [{"name", "calls", "self_ms", "device_self_ms"}, ..],  # per step, largest first
     "operators_total_ms": 10.1, "operators_total_calls": 321.0,         # of all, listed or not
     "flops_by_dtype": {"float32": 1.2e9}, "counted": ["aten::mm", ..],  # those with a formula
     "facts": {..}}                                                      # see facts.py

``step_ms`` here is that of the profiled steps, which the profiler slows down.
"""

from __future__ import annotations

import os
import time
import traceback
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch

from flatout.agent import facts
from flatout.agent.flops import FlopCounter
from flatout.agent.turns import Turn

if TYPE_CHECKING:
    from flatout.agent.session import Session

LISTED_OPERATORS = 60

_DEVICE_ACTIVITIES = {
    "cuda": "CUDA",
    "xpu": "XPU",
}


class Profiler:
    """The window; ``at_boundary`` moves it on.

    Args:
        session: the session of this process.
        steps: turns to profile.
    """

    def __init__(self, session: Session, steps: int) -> None:
        self._session = session
        self._steps = steps
        self._left = 0
        self._started_ns = 0
        self._profiler: Any = None
        self._flops: FlopCounter | None = None
        self._result: dict[str, Any] = {"kind": "profile", "steps": steps}
        self._next: Callable[[], bool] = self._start

    def at_boundary(self, turn: Turn) -> bool:
        """A turn has closed; returns whether the window is over."""
        if turn.kind != "step" and self._session.hooks.turns.may_train():
            return False  # an evaluation pass in between
        self._left -= 1
        return self._left <= 0 and self._next()

    def _start(self) -> bool:
        self._session.mark = "profiled"
        activities = [torch.profiler.ProfilerActivity.CPU]
        accelerator = torch.accelerator.current_accelerator()
        if accelerator is not None and accelerator.type in _DEVICE_ACTIVITIES:
            name = _DEVICE_ACTIVITIES[accelerator.type]
            activities.append(getattr(torch.profiler.ProfilerActivity, name))
        if torch.autograd.profiler._is_profiler_enabled:
            self._session.event("skipped", "profile", "the program has a profiler of its own on")
            return self._count()
        os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # it would write to the program's stderr
        self._profiler = torch.profiler.profile(activities=activities)
        self._profiler.start()
        self._started_ns = time.perf_counter_ns()
        self._left = self._steps
        self._next = self._stop
        return False

    def _stop(self) -> bool:
        window_ns = time.perf_counter_ns() - self._started_ns
        self._profiler.stop()
        self._result["step_ms"] = window_ns / 1e6 / self._steps
        self._result.update(_operators(self._profiler, self._steps))
        self._profiler = None
        return self._count()

    def _count(self) -> bool:
        self._flops = FlopCounter()
        self._flops.__enter__()
        self._left = 1
        self._next = self._finish
        return False

    def _finish(self) -> bool:
        assert self._flops is not None
        self._flops.__exit__(None, None, None)
        self._result["flops_by_dtype"] = dict(self._flops.flops_by_dtype)
        self._result["counted"] = sorted(self._flops.counted)
        self._session.mark = None
        try:
            self._result["facts"] = facts.collect(self._session)
        except Exception as error:  # noqa: BLE001 - recorded with its traceback
            self._result["facts"] = None
            why = f"{type(error).__name__}: {error}"
            self._session.event("failed", "facts", why, traceback.format_exc())
        self._session.record.write(self._result)
        return True


def _operators(profiler: Any, steps: int) -> dict[str, Any]:
    """Self times by operator; ranges that only annotate (``Optimizer.step#..``) are left out."""
    averages = [
        event
        for event in profiler.key_averages()
        if "#" not in event.key and not event.key.startswith("ProfilerStep")
    ]
    has_device = torch.accelerator.is_available()
    operators = [
        {
            "name": event.key,
            "calls": event.count / steps,
            "self_ms": event.self_cpu_time_total / 1e3 / steps,
            "device_self_ms": event.self_device_time_total / 1e3 / steps if has_device else None,
        }
        for event in averages
    ]
    operators.sort(key=lambda o: max(o["self_ms"], o["device_self_ms"] or 0.0), reverse=True)
    return {
        "operators": operators[:LISTED_OPERATORS],
        "operators_total_ms": sum(o["self_ms"] for o in operators),
        "operators_total_calls": sum(o["calls"] for o in operators),
    }
