"""Makes whole steps of optimizers in one call of C++, once torch's own code has made one.

``functional`` replaces the function by which torch's step ends. What comes before it, in Python,
takes longer than the step of a small network: collecting the tensors, looking up their state, and
the checks. ``kernels/steps.cpp`` compares all of it with what the last step has found, and goes
straight to the kernel if nothing is different.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextvars import ContextVar
from types import ModuleType
from typing import Any, NamedTuple

import torch
from torch.optim import optimizer as torch_optimizer

from flatout.intercept import _watch
from flatout.intercept.containment import OnFailure, attempt
from flatout.intercept.identity import WeakIdentityDict
from flatout.intercept.patch import Undo, add_attribute, wrap_function

MOST_PREPARED = 8
"""An optimizer that was something else after so many prepared steps is prepared no more: what it
holds changes at each step."""


class StepOfGroup(NamedTuple):
    """What a kernel was given for all parameters of a group that have gradients.

    Attributes:
        kernel: the address of its function.
        slots: for each slot of the kernel, the tensors of all rows; ``None``: it has none.
        numbers: the slots whose tensors hold one number.
        options: the numbers that the kernel was given.
        read_options: returns these numbers, given the arguments of torch's function by name.
    """

    kernel: int
    slots: Sequence[Sequence[torch.Tensor] | None]
    numbers: Sequence[int]
    options: Sequence[float]
    read_options: Callable[[Mapping[str, Any]], tuple[float, ...]]


_made: ContextVar[list[StepOfGroup] | None] = ContextVar("made", default=None)
"""The steps of groups that were made in this context, if they are to be told."""


def note(step: StepOfGroup) -> None:
    """Tell of the step of a group."""
    made = _made.get()
    if made is not None:
        made.append(step)


def is_noting() -> bool:
    """Whether the steps of groups are to be told."""
    return _made.get() is not None


_CLASSES = ("SGD", "Adam", "AdamW", "RMSprop", "Adagrad", "Adadelta", "Adamax", "NAdam", "RAdam")

_DECIDED_BY_TORCH = ("capturable", "differentiable", "foreach", "fused")
"""If one of these options of a group is set, torch steps it."""


class PreparedSteps:
    """Replaces the steps of torch's optimizers.

    Args:
        native: the extension ``kernels/steps.cpp``.
        serial_below: groups with fewer elements in all are stepped on one thread.
        on_failure: called with an exception of flatout; torch then does the step.
        on_step: called after each step that was made.
    """

    def __init__(
        self,
        native: ModuleType,
        serial_below: int,
        on_failure: OnFailure,
        on_step: Callable[[], None],
    ) -> None:
        self._native = native
        self._serial_below = serial_below
        self._on_failure = on_failure
        self._on_step = on_step
        self._prepared: WeakIdentityDict[Any, Any] = WeakIdentityDict()
        self._counts: WeakIdentityDict[Any, int] = WeakIdentityDict()
        self._classes = frozenset(getattr(torch.optim, name) for name in _CLASSES)

    def install(self) -> Undo:
        """Replace the steps of the classes; returns the undo."""
        with contextlib.ExitStack() as undo:
            for name in _CLASSES:
                owner = getattr(torch.optim, name)
                _add_hooks(owner)
                if "step" in owner.__dict__:
                    unhooked = owner.__dict__["step"].__wrapped__
                    step = functools.partial(self._step, unhooked)
                    undo.callback(wrap_function(owner, "step", self._on_failure, step))
                if "zero_grad" not in owner.__dict__:
                    # Not on the base class: other knobs replace it there, and may undo that first.
                    undo.callback(add_attribute(owner, "zero_grad", self._make_zero_grad()))
            return undo.pop_all().close

    def _make_zero_grad(self) -> Callable[..., None]:
        of_torch = torch.optim.Optimizer.zero_grad

        @functools.wraps(of_torch)
        def zero_grad(optimizer: Any, *args: Any, **kwargs: Any) -> None:
            now = torch.optim.Optimizer.zero_grad  # unless a knob or the program replaces it
            if now is not of_torch or torch.compiler.is_compiling():
                now(optimizer, *args, **kwargs)
            else:
                self._zero_grad(now, optimizer, *args, **kwargs)

        return zero_grad

    def _zero_grad(self, original: Any, optimizer: Any, *args: Any, **kwargs: Any) -> None:
        """Set the gradients of an optimizer to ``None``, or let torch do so.

        Args:
            original: torch's method.
            optimizer, args, kwargs: what the program calls it with.
        """
        is_plain = not (
            args
            or kwargs
            or type(optimizer) not in self._classes
            or "_zero_grad_profile_name" not in optimizer.__dict__
            or torch._C._autograd._profiler_enabled()
            or torch._C._len_torch_function_stack()
            or torch._C._len_torch_dispatch_stack()
            or "grad" in torch.nn.Parameter.__dict__
        )
        drop = self._native.drop_gradients
        if not (is_plain and attempt(self._on_failure, drop, optimizer.param_groups)):
            original(optimizer, *args, **kwargs)

    def _step(self, unhooked: Any, original: Any, optimizer: Any, *args: Any, **kwargs: Any) -> Any:
        """Step an optimizer, or let torch do so and see how.

        Args:
            unhooked: the method of the class that ``original`` calls between its hooks.
            original: the method of the class, see ``containment.wrap``.
            optimizer, args, kwargs: what the program calls it with.
        """
        if args or kwargs or type(optimizer) not in self._classes or not _is_plain(optimizer):
            return original(optimizer, *args, **kwargs)
        prepared = self._prepared.get(optimizer)
        if prepared is None:
            return self._step_and_prepare(original, optimizer)
        for hook in list(torch_optimizer._global_optimizer_pre_hooks.values()):
            hook(optimizer, (optimizer,), {})
        if attempt(self._on_failure, prepared.step, optimizer.param_groups, optimizer.state):
            self._on_step()
        else:
            self._prepared.pop(optimizer)
            original.call_part(unhooked, optimizer)  # the hooks have been called
        for hook in list(torch_optimizer._global_optimizer_post_hooks.values()):
            hook(optimizer, (optimizer,), {})
        return None

    def _step_and_prepare(self, original: Any, optimizer: Any) -> Any:
        count = self._counts.get(optimizer, 0) or 0
        if count >= MOST_PREPARED:
            return original(optimizer)
        made: list[StepOfGroup] = []
        token = _made.set(made)
        try:
            result = original(optimizer)
        finally:
            _made.reset(token)
        prepared = attempt(self._on_failure, self._prepare, optimizer, made)
        if prepared is not None:
            self._prepared[optimizer] = prepared
            self._counts[optimizer] = count + 1
        return result

    def _prepare(self, optimizer: Any, steps: Sequence[StepOfGroup]) -> Any:
        """Return a prepared step that makes the steps that were made; ``None``: there is none."""
        groups = optimizer.param_groups
        if type(groups) is not list or len(steps) != len(groups):
            return None
        if not steps or len({step.kernel for step in steps}) != 1:
            return None
        read_options = functools.partial(_read_options, steps[0].read_options)
        state = optimizer.state
        if not all(type(of_parameter) is dict for of_parameter in state.values()):
            return None
        prepared = self._native.PreparedStep(
            groups, state, steps[0].kernel, read_options, self._serial_below
        )
        for group, step in zip(groups, steps, strict=True):
            parameters = [one for one in group["params"] if one.grad is not None]
            stepped = step.slots[0] or ()
            is_whole = len(parameters) == len(stepped) and all(
                one is other for one, other in zip(parameters, stepped, strict=True)
            )
            if not is_whole or type(group) is not dict or type(group["params"]) is not list:
                return None
            if read_options(group) != list(step.options):
                return None
            columns = (column or itertools.repeat(None) for column in step.slots)
            rows = [list(row) for row, _ in zip(zip(*columns, strict=False), stepped, strict=False)]
            if not _are_state_of(rows, state):
                return None
            prepared.add_group(group, list(step.options), rows, list(step.numbers))
        return prepared


def _are_state_of(rows: Sequence[Sequence[Any]], state: Mapping[Any, Any]) -> bool:
    """Whether all state tensors of the rows are in the optimizer's state."""
    for parameter, _, *tensors in rows:
        own = [id(value) for value in state.get(parameter, {}).values()]
        if any(tensor is not None and id(tensor) not in own for tensor in tensors):
            return False
    return True


def _read_options(
    read: Callable[[Mapping[str, Any]], tuple[float, ...]], group: Mapping[str, Any]
) -> list[float] | None:
    """Return the numbers that the kernel expects for a group; ``None``: torch has to step it.

    Args:
        read: returns these numbers, given the arguments of torch's function by name.
        group: the group.
    """
    if any(group.get(name) for name in _DECIDED_BY_TORCH):
        return None
    named = dict(group)
    if "betas" in named:
        named["beta1"], named["beta2"] = named["betas"]
    options = read(named)
    are_numbers = all(isinstance(option, (int, float)) for option in options)
    return list(map(float, options)) if are_numbers else None


def _is_plain(optimizer: Any) -> bool:
    """Whether nothing but the step itself is asked for: no hook of the program, no profile."""
    own = optimizer.__dict__
    return not (
        any(type(hook) is not _watch.StepHook for hook in _global_hooks())
        or own.get("_optimizer_step_pre_hooks")
        or own.get("_optimizer_step_post_hooks")
        or own.get("grad_scale") is not None
        or own.get("found_inf") is not None
        or torch._C._autograd._profiler_enabled()
        or torch._C._are_functorch_transforms_active()
        or "grad" in torch.nn.Parameter.__dict__
    )


def _global_hooks() -> Iterator[Any]:
    yield from torch_optimizer._global_optimizer_pre_hooks.values()
    yield from torch_optimizer._global_optimizer_post_hooks.values()


def _add_hooks(owner: Any) -> None:
    """Let a class call its hooks at each step, as torch does when the first optimizer is made."""
    if not getattr(owner.step, "hooked", False):
        owner.step = torch.optim.Optimizer.profile_hook_step(owner.step)
        owner.step.hooked = True
