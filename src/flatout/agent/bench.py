"""The surroundings of replayed calls: settings, memory, clock."""

from __future__ import annotations

import contextlib
import functools
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch

from flatout import knobs
from flatout.agent.calls import CallLog, Form, StepForm, TensorForm, copy_state
from flatout.agent.standins import Prepared, prepare, prepare_step, size_bytes
from flatout.intercept.host import Host
from flatout.kernels import extensions
from flatout.knob import Inside
from flatout.wire.request import Request

MEMORY_SHARE = 0.2
"""The share of the free memory that tensors of replayed calls may take."""

Settings = Mapping[str, str]


class Key(NamedTuple):
    """A call under settings that may have changed the forms of its tensors.

    Attributes:
        form: the call as the program makes it.
        tensors: the forms of its tensors.
        is_head: whether it is the last matmul or convolution of its outermost module.
    """

    form: Form | StepForm
    tensors: tuple[TensorForm, ...] = ()
    is_head: bool = False


class Bench:
    """Makes replayed calls under settings, and takes their time.

    Args:
        log: the description of the step.
        settings: the knobs and settings under which calls are replayed.
        limit_s: the time that the replay may take, in seconds.
        now_ns: the clock.

    Attributes:
        log: see above.
        changing: the settings that act by the way outermost modules are called (``Knob.inside``):
            none of them, each alone, and the first of all such knobs together.
        counting: the other settings, which count the calls that they act on.
        skipped, failed: see ``wire.replay.Replayed``.
    """

    def __init__(
        self,
        log: CallLog,
        settings: Sequence[tuple[str, str]],
        limit_s: float,
        now_ns: Callable[[], int] = time.perf_counter_ns,
    ) -> None:
        inside = [s for s in settings if knobs.get(s[0]).inside is not None]
        together = dict(reversed(inside))
        self.log = log
        self.changing: list[dict[str, str]] = [{}, *({name: s} for name, s in inside)]
        if len(together) > 1:
            self.changing.append(together)
        self.counting = [s for s in settings if knobs.get(s[0]).inside is None]
        self.skipped: Counter[str] = Counter(log.skipped)
        self.failed: dict[str, str] = {}
        self._limit_s = limit_s
        self._now_ns = now_ns
        self._began_ns = now_ns()
        self._host = Host(Request(), _Unrecorded(), knobs.apply)  # type: ignore[arg-type]
        devices = {tensor.device for call in log.calls for tensor in call.form.tensors}
        self._devices = [found for found in devices if found.type != "cpu"]

    @property
    def spent_s(self) -> float:
        """The time that the replay has taken so far, in seconds."""
        return (self._now_ns() - self._began_ns) / 1e9

    @property
    def left_s(self) -> float:
        """The time that is left, in seconds, at least a third of all for taking times."""
        return max(self._limit_s - self.spent_s, self._limit_s / 3)

    @property
    def is_half_over(self) -> bool:
        """Whether half of the time is over."""
        return self.spent_s > self._limit_s / 2

    @contextlib.contextmanager
    def applied(self, settings: Settings) -> Iterator[Inside]:
        """Apply settings to the calls that are made in this context.

        Raises:
            RefusedError: one of them cannot be applied.
        """
        with contextlib.ExitStack() as stack:
            parts = []
            for name, setting in settings.items():
                inside = knobs.get(name).inside
                if inside is None:
                    with extensions.built_only():  # no call of an operator needs one
                        self._host.applied.apply(name, setting)
                    stack.callback(self._host.applied.undo, name)
                else:
                    parts.append(inside(self._host, setting))
                    stack.callback(parts[-1].undo)
            yield _compose(parts)

    def find_failure(self, settings: Settings) -> str | None:
        """Return the error of a knob that has failed in use; ``None``: none has."""
        failures = self._host.applied.failures
        return next((failures[name] for name in settings if name in failures), None)

    def prepare(self, key: Key) -> Prepared:
        """Prepare a call.

        Raises:
            MemoryError: it needs too much memory.
        """
        if not self.has_memory_for(size_bytes(key.form)):
            raise MemoryError("there is too little free memory")
        if isinstance(key.form, StepForm):
            reference, gradients = self.log.optimizers[key.form]
            optimizer = reference()
            state = [] if optimizer is None else copy_state(optimizer)
            return prepare_step(key.form, gradients, state)
        return prepare(key.form, key.tensors, self.log.values[key.form])

    def has_memory_for(self, needed_bytes: float) -> bool:
        """Whether replayed calls may take this much memory, as far as that is known."""
        free_bytes = free_memory_bytes(self._devices)
        return free_bytes is None or needed_bytes <= MEMORY_SHARE * free_bytes

    def visit(self, key: Key, prepared: Prepared, inside: Inside, repeats: int = 1) -> float:
        """Make a call several times, and return the mean of its times in milliseconds."""
        run, renew, now_ns = prepared.run, prepared.renew, self._now_ns
        taken_ns = 0
        with _surroundings(key, prepared, inside):
            if renew is None:
                self._synchronize()
                begin_ns = now_ns()
                for _ in range(repeats):
                    run(inside)
                self._synchronize()
                taken_ns = now_ns() - begin_ns
            else:
                for _ in range(repeats):
                    renew()
                    self._synchronize()
                    begin_ns = now_ns()
                    run(inside)
                    self._synchronize()
                    taken_ns += now_ns() - begin_ns
        return taken_ns / 1e6 / repeats

    def outputs(self, key: Key, prepared: Prepared, inside: Inside) -> tuple[TensorForm, ...]:
        """Make a call once, and return the forms of what it returns."""
        with _surroundings(key, prepared, inside):
            if prepared.renew is not None:
                prepared.renew()
            return tuple(TensorForm.of(tensor.detach()) for tensor in prepared.run(inside))

    def _synchronize(self) -> None:
        for found in self._devices:
            getattr(torch, found.type).synchronize(found)


class _Unrecorded:
    """Stands for the record of a process: what happens in a replay is no event of the program."""

    def seconds(self, at_ns: int) -> float:
        return 0.0

    def write(self, line: object) -> None:
        pass


def _compose(parts: Sequence[Inside]) -> Inside:
    """Return several settings as one."""
    if len(parts) == 1:
        return parts[0]

    @contextlib.contextmanager
    def context(weight: Any) -> Iterator[None]:
        with contextlib.ExitStack() as stack:
            for part in parts:
                stack.enter_context(part.context(weight))
            yield

    def convert(function: Any, args: tuple[Any, ...]) -> tuple[Any, ...]:
        return functools.reduce(lambda given, part: part.convert(function, given), parts, args)

    def leave(outputs: Any) -> Any:
        return functools.reduce(lambda given, part: part.leave(given), parts, outputs)

    is_everywhere = any(part.is_everywhere for part in parts)
    return Inside(context=context, convert=convert, leave=leave, is_everywhere=is_everywhere)


@contextlib.contextmanager
def _surroundings(key: Key, prepared: Prepared, inside: Inside) -> Iterator[None]:
    """The modes in which the program makes a call, and what settings add to them."""
    form = key.form
    with contextlib.ExitStack() as stack:
        stack.enter_context(torch.enable_grad())
        if isinstance(form, Form):
            stack.enter_context(torch.set_grad_enabled(form.is_grad_enabled))
            if form.autocast is not None:
                kind, dtype = form.autocast
                stack.enter_context(torch.autocast(kind, dtype))
            elif form.is_inside:
                stack.enter_context(inside.context(prepared.weight if key.is_head else None))
        yield


def free_memory_bytes(devices: Sequence[torch.device]) -> int | None:
    """Return the free memory of the computer or of its accelerators, whichever is less; ``None``:
    not known."""
    free = [torch.cuda.mem_get_info(found)[0] for found in devices if found.type == "cuda"]
    with contextlib.suppress(OSError, ValueError, IndexError):
        with open("/proc/meminfo") as file:
            available = next(line for line in file if line.startswith("MemAvailable:"))
        free.append(int(available.split()[1]) * 1024)
    return min(free, default=None)
