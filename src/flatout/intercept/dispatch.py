"""Overriding operators of torch at a dispatch key, for example by compiled kernels."""

from __future__ import annotations

import contextlib
import ctypes
import functools
import itertools
import warnings
from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import Any, NamedTuple, Protocol, TypeVar

import torch
from torch.autograd import forward_ad

from flatout import kernels
from flatout.errors import RefusedError
from flatout.intercept import handled_calls
from flatout.intercept.arrays import EXACT_TENSOR_TYPES
from flatout.intercept.containment import OnFailure, attempt, report, was_raised_by_flatout
from flatout.intercept.patch import Undo

T = TypeVar("T")


def load_kernel(name: str, fallback: str) -> ctypes.CDLL:
    """Load the library of a compiled kernel that is to override an operator.

    Args:
        name: the name of the kernel.
        fallback: the code that torch uses without the kernel: a plural noun phrase for the message,
            such as "torch's own kernels", which is inserted before "stay: ...".

    Raises:
        RefusedError: the kernel cannot be built or loaded, or this version of torch has no
            ``torch.library.get_kernel``, which gives access to torch's own kernel.
    """
    try:
        library = kernels.load(name)
    except kernels.KernelError as error:
        raise RefusedError(f"{fallback} stay: {error}") from error
    if not hasattr(torch.library, "get_kernel"):
        raise RefusedError(
            f"{fallback} stay: torch {torch.__version__} has no torch.library.get_kernel"
        )
    return library


def may_use_kernel(*tensors: torch.Tensor) -> bool:
    """Whether a kernel may compute a call in place of torch's operator.

    All tensors must be strided tensors on the CPU, of no subclass. And the call must not be
    observed by a function transform (``torch.func``), forward-mode AD, a dispatch mode or a tracer
    (``jit.trace``, ``make_fx``), because these must see torch's operators.
    """
    return (
        all(
            type(x) in EXACT_TENSOR_TYPES
            and x.is_cpu
            and x.layout is torch.strided
            and not x.is_nested
            for x in tensors
        )
        and not torch._C._are_functorch_transforms_active()
        and not torch._C._len_torch_dispatch_stack()
        and torch._C._get_tracing_state() is None
        and forward_ad._current_level < 0
    )


class DeferredCall(NamedTuple):
    """Returned by an override to say: make this call instead, outside containment.

    The call may save tensors for autograd, which calls the program's saved-tensor hooks. An
    exception that such a hook raises is the program's.

    Attributes:
        function: the function to call.
        args, kwargs: its arguments.
    """

    function: Callable[..., Any]
    args: tuple[Any, ...]
    kwargs: Mapping[str, Any] = MappingProxyType({})


Override = Callable[..., Any]
"""Called as ``override(below, *args, **kwargs)`` with the arguments of the operator; ``below`` is
the next override or torch's own kernel, and takes the same arguments.

An override returns the operator's result, a ``DeferredCall``, or ``None``, in which case ``below``
is called. It runs below autograd and autocast, and the program's modes do not see it."""


class Entry(NamedTuple):
    """An override of one operator at one dispatch key.

    Attributes:
        override: the override.
        on_failure: called when it has failed.
        knob: the knob that it belongs to.
        may_rest: see ``override_operators``.
    """

    override: Override
    on_failure: OnFailure
    knob: str | None
    may_rest: bool


def override_operators(
    overrides: Mapping[str, Override], *keys: str, on_failure: OnFailure, may_rest: bool = False
) -> Undo:
    """Override operators, on top of the overrides that other knobs have for them.

    Args:
        overrides: a map from the name of an operator, without ``aten::``, to its override.
        keys: the names of the dispatch keys at which the operators are overridden.
        on_failure: called when an override has failed; ``below`` is then called instead.
        may_rest: whether the overrides only save time, and may be taken out for as long as they
            handle no call (``intercept/resting.py``).

    Returns:
        The undo. It leaves the overrides of other knobs in place.
    """
    added: list[tuple[str, str, Entry]] = []

    def undo() -> None:
        while added:
            name, key, entry = added.pop()
            operator = _overridden[name, key]
            operator.overrides.remove(entry)
            if not operator.overrides:
                _overridden.pop((name, key)).restore()

    with contextlib.ExitStack() as on_error:
        on_error.callback(undo)
        for (name, override), key in itertools.product(overrides.items(), keys):
            if (name, key) not in _overridden:
                _overridden[name, key] = OverriddenOperator(name, key)
            entry = Entry(override, on_failure, knob_being_applied, may_rest)
            added.append((name, key, entry))
            _overridden[name, key].overrides.append(entry)
            _overridden[name, key].wake()
        on_error.pop_all()
    return undo


class OverriddenOperator:
    """The overrides of one operator at one dispatch key, each on top of the ones before it.

    Args:
        name: the name of the operator, without ``aten::``.
        key: the name of the dispatch key.

    Attributes:
        overrides: the overrides. The last one is called first.
        idle_calls: the number of outermost module calls in a row, without gradients, in which no
            override has handled a call; counted by ``intercept/resting.py``.
    """

    def __init__(self, name: str, key: str) -> None:
        self.overrides: list[Entry] = []
        self.idle_calls = 0
        self._name, self._key = name, key
        self._torch_kernel = _torch_kernel(name, key)
        self._library: torch.library.Library | None = None
        self._register()

    def _register(self) -> None:
        self._library = torch.library.Library("aten", "IMPL")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch warns about every overridden kernel
            self._library.impl(self._name, self._call, self._key, with_keyset=True)

    def restore(self) -> None:
        """Register torch's own kernel again, unless it is."""
        library, self._library = self._library, None
        if library is not None:
            library._destroy()

    def rest(self) -> None:
        """Call torch's own kernel until ``wake``, if all overrides may rest."""
        if self._may_rest():
            self.restore()

    def _may_rest(self) -> bool:
        return all(entry.may_rest for entry in self.overrides)

    def wake(self) -> None:
        """Call the overrides again, if there are any."""
        self.idle_calls = 0
        if self._library is None and self.overrides:
            self._register()

    def _call(self, keyset: Any, *args: Any, **kwargs: Any) -> Any:
        below: Callable[..., Any] = functools.partial(self._torch_kernel, keyset)
        for entry in self.overrides:
            below = functools.partial(_call_override, self, entry, below)
        result = below(*args, **kwargs)
        is_inference = not torch.is_grad_enabled() and torch._C._current_graph_task_id() == -1
        if is_inference and ask_for_rest is not None and self._may_rest():
            ask_for_rest(self)
        return result


def is_override(below: Callable[..., Any]) -> bool:
    """Whether ``below``, as an override gets it, is another override and not torch's kernel."""
    return getattr(below, "func", None) is _call_override


def _torch_kernel(name: str, key: str) -> Callable[..., Any]:
    """Return torch's kernel for a dispatch key, or a function that redispatches to the next key if
    there is none."""
    qualified = f"aten::{name}"
    has_kernel = torch._C._dispatch_has_kernel_for_dispatch_key(qualified, key)
    if has_kernel or not key.startswith("Autocast"):
        kernel: Callable[..., Any] = torch.library.get_kernel(qualified, key).call_boxed
        return kernel
    packet, _, overload = name.partition(".")
    operator = getattr(getattr(torch.ops.aten, packet), overload or "default")
    excluded = torch._C.DispatchKeySet(getattr(torch._C.DispatchKey, key))

    def redispatch(keyset: Any, *args: Any, **kwargs: Any) -> Any:
        with torch._C._ExcludeDispatchKeyGuard(excluded):
            return operator(*args, **kwargs)

    return redispatch


_overridden: dict[tuple[str, str], OverriddenOperator] = {}

knob_being_applied: str | None = None
"""The knob to which new overrides belong."""

ask_for_rest: Callable[[OverriddenOperator], None] | None = None
"""Called with an operator that may rest, after each of its calls without gradients and outside of
backward; ``None``: none ever rests."""


def _call_override(
    operator: OverriddenOperator,
    entry: Entry,
    below: Callable[..., Any],
    *args: Any,
    **kwargs: Any,
) -> Any:
    override, on_failure, knob, _ = entry
    result = attempt_below_autograd(on_failure, override, below, *args, **kwargs)
    is_handled = result is not None
    if type(result) is DeferredCall:
        try:
            result = result.function(*result.args, **result.kwargs)
        except Exception as error:
            if not was_raised_by_flatout(error):
                raise
            report(on_failure, error)
            is_handled = False
    if not is_handled:
        return below(*args, **kwargs)
    operator.idle_calls = 0
    if knob is not None:
        handled_calls.counts[knob] += 1
    return result


def attempt_below_autograd(
    on_failure: OnFailure, function: Callable[..., T], *args: Any, **kwargs: Any
) -> T | None:
    """Call ``attempt`` for a function that runs below autograd, autocast and the program's
    modes."""
    return attempt(on_failure, _call_below_autograd, function, *args, **kwargs)


def _call_below_autograd(function: Callable[..., T], *args: Any, **kwargs: Any) -> T:
    with torch._C.DisableTorchFunction(), torch._C._ExcludeDispatchKeyGuard(_KEYS_ABOVE_KERNELS):
        return function(*args, **kwargs)


def _key_set(*keys: str) -> Any:
    key_set = torch._C.DispatchKeySet(getattr(torch._C.DispatchKey, keys[0]))
    for key in keys[1:]:
        key_set = key_set.add(getattr(torch._C.DispatchKey, key))
    return key_set


# fmt: off
_KEYS_ABOVE_KERNELS = _key_set(
    "AutogradFunctionality", "AutogradOther", "AutogradNestedTensor",
    "AutocastCPU", "AutocastCUDA", "AutocastXPU", "AutocastPrivateUse1",
    "Python", "PythonTLSSnapshot",
)
# fmt: on


# Recording an override's result in the autograd graph


class GradientRule(Protocol):
    """Computes the gradients of an override's result."""

    @property
    def on_failure(self) -> OnFailure:
        """Called when ``gradients`` has failed; ``fallback_gradients`` is then called instead."""

    def gradients(self, saved: Any, needed: Sequence[bool], gradient: torch.Tensor) -> Any:
        """Return the gradient of each input, computed by flatout's kernel.

        Args:
            saved: the tensors that were saved for backward.
            needed: for each input, whether its gradient is needed.
            gradient: the gradient of the output; ``may_use_kernel`` is true for it.
        """

    def fallback_gradients(self, saved: Any, needed: Sequence[bool], gradient: torch.Tensor) -> Any:
        """Return the gradient of each input, computed by differentiable operators of torch."""


class RecordedFunction(torch.autograd.Function):
    """A node of the autograd graph for an output that has been computed already; see
    ``record_in_graph``."""

    @staticmethod
    def forward(
        ctx: Any,
        rule: GradientRule,
        output_and_saved: tuple[torch.Tensor, Sequence[torch.Tensor | None]],
        *inputs: torch.Tensor | None,
    ) -> torch.Tensor:
        """Save the tensors and return the output."""
        output, saved = output_and_saved
        ctx.save_for_backward(*saved)
        ctx.rule = rule
        return output

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        """Return the gradients of the inputs."""
        rule, saved, needed = ctx.rule, ctx.saved_tensors, ctx.needs_input_grad[2:]
        gradients = None
        if not torch.is_grad_enabled() and may_use_kernel(gradient):
            gradients = attempt_below_autograd(
                rule.on_failure, rule.gradients, saved, needed, gradient
            )
        if gradients is None:
            gradients = rule.fallback_gradients(saved, needed, gradient)
        return None, None, *gradients


def record_in_graph(
    node: type[RecordedFunction],
    rule: GradientRule,
    output: torch.Tensor,
    saved: Sequence[torch.Tensor | None],
    *inputs: torch.Tensor | None,
) -> torch.Tensor:
    """Record in the autograd graph that ``output`` is a function of ``inputs``.

    Args:
        node: the class of the new node.
        rule: computes the gradients of ``inputs``.
        output: the output, computed below autograd; nothing else may refer to it yet.
        saved: the tensors to save for backward; inputs and the output may be among them.
        inputs: the tensors whose gradients ``rule`` computes.
    """
    # The output is passed inside a tuple: autograd would return a view of a tensor argument.
    recorded: torch.Tensor = node.apply(rule, (output, saved), *inputs)
    return recorded
