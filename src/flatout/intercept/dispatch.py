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
from flatout.intercept import engagement
from flatout.intercept.arrays import PLAIN
from flatout.intercept.containment import OnFailure, attempt, report, was_raised_by_flatout
from flatout.intercept.patch import Undo

T = TypeVar("T")


def load_kernel(name: str, fallback: str) -> ctypes.CDLL:
    """Load the library of a compiled kernel that is to override an operator.

    Args:
        name: of the kernel.
        fallback: what torch uses without it, as the subject of a sentence in the plural.

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


def are_plain(*tensors: torch.Tensor) -> bool:
    """Whether all tensors are dense ones on the CPU, of no subclass, and the call is not observed.

    It is observed if a function transform (``torch.func``), forward-mode AD or a dispatch mode is
    active, or if the program is being traced (``jit.trace``, ``make_fx``): these must see torch's
    operators.
    """
    return (
        all(
            type(x) in PLAIN and x.is_cpu and x.layout is torch.strided and not x.is_nested
            for x in tensors
        )
        and not torch._C._are_functorch_transforms_active()
        and not torch._C._len_torch_dispatch_stack()
        and torch._C._get_tracing_state() is None
        and forward_ad._current_level < 0
    )


class DeferredCall(NamedTuple):
    """A call that an override returns, to be made in its place.

    The call is made outside of the override's containment. So it may save tensors, which calls the
    program's saved-tensor hooks, and an exception that these raise is the program's.
    """

    function: Callable[..., Any]
    args: tuple[Any, ...]
    kwargs: Mapping[str, Any] = MappingProxyType({})


Override = Callable[..., Any]
"""Called as ``override(below, *args, **kwargs)`` with the arguments of the operator; ``below`` is
the override underneath or torch's own kernel and takes the same arguments.

It returns the operator's result, a ``DeferredCall``, or ``None``: ``below`` is called then. It runs
below autograd and autocast, and is not seen by the program's modes."""


def override_operators(
    overrides: Mapping[str, Override], *keys: str, on_failure: OnFailure
) -> Undo:
    """Override operators, on top of the overrides that other knobs have for them.

    Args:
        overrides: by the operator's name without ``aten::``.
        keys: names of the dispatch keys at which the operators are overridden.
        on_failure: called when an override has failed; ``below`` is called in its place.

    Returns:
        The undo; it leaves the overrides of other knobs in place.
    """
    added: list[tuple[str, str, Any]] = []

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
            entry = (override, on_failure, knob_being_applied)
            added.append((name, key, entry))
            _overridden[name, key].overrides.append(entry)
        on_error.pop_all()
    return undo


class OverriddenOperator:
    """The overrides of one operator at one dispatch key, each on top of the ones before it.

    Args:
        name: of the operator, without ``aten::``.
        key: name of the dispatch key.

    Attributes:
        overrides: each with the callback for its failures and the name of its knob; the last one is
            called first.
        restore: registers torch's own kernel again.
    """

    def __init__(self, name: str, key: str) -> None:
        self.overrides: list[tuple[Override, OnFailure, str | None]] = []
        self._torch_kernel = _torch_kernel(name, key)
        library = torch.library.Library("aten", "IMPL")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch warns of every overridden kernel
            library.impl(name, self._call, key, with_keyset=True)
        self.restore: Undo = library._destroy

    def _call(self, keyset: Any, *args: Any, **kwargs: Any) -> Any:
        below: Callable[..., Any] = functools.partial(self._torch_kernel, keyset)
        for override, on_failure, knob in self.overrides:
            below = functools.partial(_call_override, on_failure, knob, override, below)
        return below(*args, **kwargs)


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


def _call_override(
    on_failure: OnFailure,
    knob: str | None,
    override: Override,
    below: Callable[..., Any],
    *args: Any,
    **kwargs: Any,
) -> Any:
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
    if knob is not None:
        engagement.calls[knob] += 1
    return result


def attempt_below_autograd(
    on_failure: OnFailure, function: Callable[..., T], *args: Any, **kwargs: Any
) -> T | None:
    """Call ``function`` by ``attempt``, below autograd, autocast and the program's modes."""
    return attempt(on_failure, _call_below_autograd, function, *args, **kwargs)


def _call_below_autograd(function: Callable[..., T], *args: Any, **kwargs: Any) -> T:
    with torch._C.DisableTorchFunction(), torch._C._ExcludeDispatchKeyGuard(_KEYS_ABOVE_KERNELS):
        return function(*args, **kwargs)


def _key_set(*keys: str) -> Any:
    key_set = torch._C.DispatchKeySet(getattr(torch._C.DispatchKey, keys[0]))
    for key in keys[1:]:
        key_set = key_set.add(getattr(torch._C.DispatchKey, key))
    return key_set


_KEYS_ABOVE_KERNELS = _key_set(
    *("AutogradFunctionality", "AutogradOther", "AutogradNestedTensor"),
    *("AutocastCPU", "Python", "PythonTLSSnapshot"),
)


# Recording an override's result in the autograd graph


class GradientRule(Protocol):
    """How the gradients of an override's result are computed."""

    @property
    def on_failure(self) -> OnFailure:
        """Called when ``gradients`` has failed; ``fallback_gradients`` is called in its place."""

    def gradients(self, saved: Any, needed: Sequence[bool], gradient: torch.Tensor) -> Any:
        """Return the gradient of each input, computed by flatout's kernel.

        Args:
            saved: the saved tensors.
            needed: for each input, whether its gradient is needed.
            gradient: of the output; plain in the sense of ``are_plain``.
        """

    def fallback_gradients(self, saved: Any, needed: Sequence[bool], gradient: torch.Tensor) -> Any:
        """Return the same, computed by differentiable operators of torch."""


class RecordedFunction(torch.autograd.Function):
    """A node of the autograd graph for an output that is computed already; see
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
        if not torch.is_grad_enabled() and are_plain(gradient):
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
        rule: how its gradients are computed.
        output: the output, computed below autograd; nothing else may refer to it yet.
        saved: tensors to save for backward; inputs and the output may be among them.
        inputs: the tensors whose gradients ``rule`` computes.
    """
    # The output is passed inside a tuple: autograd would return a view of a tensor argument.
    recorded: torch.Tensor = node.apply(rule, (output, saved), *inputs)
    return recorded
