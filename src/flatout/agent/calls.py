"""Describing the calls of torch's functions in a step, without keeping the tensors.

A call is what the program's Python code calls: ``F.linear``, ``Tensor.view``, ``F.cross_entropy``.
What these call themselves belongs to them, and so does the backward pass that autograd records.
Steps of optimizers and the two parts of clipping are one call each.
"""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Callable, Hashable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch.nn.utils import clip_grad
from torch.overrides import TorchFunctionMode, _get_current_function_mode

from flatout.intercept.containment import attempt
from flatout.intercept.nested import tensors_in
from flatout.intercept.patch import wrap_function
from flatout.knob import MATMUL_OPERATORS
from flatout.wire.replay import OPTIMIZER_SUFFIX

if TYPE_CHECKING:
    from flatout.intercept.host import Host

MOST_CALLS = 20_000
"""A step with more calls is not described; its time is that of Python."""

MOST_COPIED = 1 << 20
"""Indices and masks (of integers, booleans, or with values that are not finite) are copied if they
have at most this many elements."""

SAMPLED = 4096
"""The largest number of elements of a sample of a tensor's values."""

_Options = tuple[tuple[str, Any], ...]
_PLAIN = (torch.Tensor, torch.nn.Parameter)
_CONSTANTS = (
    *(type(None), bool, int, float, complex, str, type(Ellipsis), torch.dtype, torch.device),
    *(torch.layout, torch.memory_format),
)
_CLIPPING = ("_get_total_norm", "_clip_grads_with_norm_")

_UNTIMED = frozenset(
    (
        *("_record_function_enter_new", "_record_function_exit._RecordFunction"),
        *("backward", "grad", "requires_grad_", "retain_grad", "register_hook", "__set__"),
        *("__setitem__", "__delitem__", "__reduce_ex__", "__deepcopy__", "share_memory_"),
        *("pin_memory", "__setstate__", "detach_", "set_", "resize_", "untyped_storage"),
    )
)
"""Functions that start a backward pass, or that change what the program holds."""


class NotReplayableError(Exception):
    """A call cannot be replayed; the message says why."""


@dataclass(frozen=True)
class TensorForm:
    """All of a tensor but its values.

    Attributes:
        shape, strides, dtype, device: those of the tensor.
        requires_grad: whether autograd computes its gradient.
        is_parameter: whether it is an ``nn.Parameter``.
    """

    shape: tuple[int, ...]
    strides: tuple[int, ...]
    dtype: torch.dtype
    device: torch.device
    requires_grad: bool
    is_parameter: bool

    @classmethod
    def of(cls, tensor: torch.Tensor) -> TensorForm:
        """Return the form of a tensor.

        Raises:
            NotReplayableError: it is not a plain strided tensor.
        """
        if type(tensor) not in _PLAIN or tensor.layout is not torch.strided or tensor.is_nested:
            raise NotReplayableError(
                "a tensor of a subclass or a sparse one is among its arguments"
            )
        return cls(
            tuple(tensor.shape),
            tuple(tensor.stride()),
            tensor.dtype,
            tensor.device,
            tensor.requires_grad,
            type(tensor) is torch.nn.Parameter,
        )


class Values(NamedTuple):
    """What is known about the values of a tensor.

    Attributes:
        sample: some of the elements, one-dimensional; of complex numbers both parts.
        copy: a copy of the tensor; ``None``: the sample stands for it.
    """

    sample: torch.Tensor
    copy: torch.Tensor | None = None


class Slot(NamedTuple):
    """The place of a tensor among the arguments of a call.

    Attributes:
        number: the number of the tensor, in the order of the arguments.
    """

    number: int


@dataclass(frozen=True)
class Form:
    """Everything about a call that its time may depend on, but for the values of tensors.

    Attributes:
        function: the function.
        arguments: the arguments, with a ``Slot`` for each tensor; see ``freeze``.
        tensors: the form of each tensor.
        is_recorded: whether autograd records the call, so that it has a backward pass.
        is_grad_enabled: whether gradients were enabled.
        written: the numbers of the tensors that the call changes.
        autocast: the device type and dtype of the program's own autocast; ``None``: it has none.
        is_inside: whether an outermost module makes the call.
    """

    function: Callable[..., Any]
    arguments: Hashable
    tensors: tuple[TensorForm, ...]
    is_recorded: bool
    is_grad_enabled: bool
    written: tuple[int, ...]
    autocast: tuple[str, torch.dtype] | None
    is_inside: bool

    @property
    def name(self) -> str:
        """The name of the function."""
        return str(getattr(self.function, "__name__", self.function))


class Call(NamedTuple):
    """A call of the step.

    Attributes:
        form: its form.
        inputs: the number of the tensor in each slot; a tensor has one number in the whole step.
        outputs: the numbers of the tensors that it returns.
        is_head: whether it is the last matmul or convolution with a weight of its outermost module.
    """

    form: Form
    inputs: tuple[int, ...]
    outputs: tuple[int, ...]
    is_head: bool = False


def leave(*outputs: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """Stands for the end of an outermost module call that returns these tensors."""
    return outputs


@dataclass(frozen=True)
class ClippingPart:
    """One of the two functions of which clipping consists, whatever replaces it meanwhile.

    Attributes:
        __name__: its name in ``torch.nn.utils.clip_grad``.
    """

    __name__: str

    def __call__(self, gradients: list[torch.Tensor], *args: Any) -> Any:
        """Call the function; the parameters that clipping takes only hold their gradients."""
        function = vars(clip_grad)[self.__name__]
        if self.__name__ == "_get_total_norm":
            return function(gradients, *args)
        return function([_Holder(gradient) for gradient in gradients], *args)


class _Holder:
    __slots__ = ("grad",)

    def __init__(self, grad: torch.Tensor) -> None:
        self.grad = grad


@dataclass(frozen=True)
class StepForm:
    """A step of one of torch's optimizers.

    Attributes:
        optimizer: its class.
        groups: for each parameter group its options, and the forms of parameters and gradients.
    """

    optimizer: type
    groups: tuple[
        tuple[tuple[tuple[str, Any], ...], tuple[tuple[TensorForm, TensorForm], ...]], ...
    ]
    is_inside = False

    @property
    def name(self) -> str:
        """The name of the class."""
        return f"{self.optimizer.__name__}{OPTIMIZER_SUFFIX}"


def freeze(value: Any, tensors: list[torch.Tensor]) -> Hashable:
    """Return arguments in a form that can be compared; ``thaw`` is the inverse.

    Args:
        value: the arguments.
        tensors: the tensors among them are appended.

    Raises:
        NotReplayableError: there is an argument that may change, or that may be the program's.
    """
    if isinstance(value, torch.Tensor):
        tensors.append(value)
        return Slot(len(tensors) - 1)
    if type(value) in _CONSTANTS:
        return ("constant", type(value), value)
    if isinstance(value, torch.Size) or type(value) in (tuple, list):
        kind = list if type(value) is list else tuple
        return (kind, *(freeze(item, tensors) for item in value))
    if type(value) is dict:
        return (dict, *((key, freeze(item, tensors)) for key, item in value.items()))
    if type(value) is slice:
        return (slice, *(freeze(x, tensors) for x in (value.start, value.stop, value.step)))
    raise NotReplayableError(f"a {type(value).__name__} is among its arguments")


def thaw(frozen: Any, tensors: list[torch.Tensor]) -> Any:
    """Return the arguments from which ``freeze`` made ``frozen``, with these tensors."""
    if type(frozen) is Slot:
        return tensors[frozen.number]
    kind, *items = frozen
    if kind == "constant":
        return items[1]
    if kind is dict:
        return {key: thaw(item, tensors) for key, item in items}
    if kind is slice:
        return slice(*(thaw(item, tensors) for item in items))
    return kind(thaw(item, tensors) for item in items)


def find_values(tensor: torch.Tensor) -> Values:
    """Take a sample of a tensor's values, or copy it if it is an index or a mask."""
    detached = tensor.detach()
    is_number = tensor.is_floating_point() or tensor.is_complex()
    part = torch.view_as_real(detached.resolve_conj()) if tensor.is_complex() else detached
    if part.is_contiguous():
        part = part.reshape(-1)[:: part.numel() // SAMPLED | 1]
    while part.dim() and part.numel() > SAMPLED:
        part = part[part.shape[0] // 2]
    sample = part.clone(memory_format=torch.contiguous_format).reshape(-1)[:SAMPLED]
    is_mask = not is_number or not (tensor.requires_grad or bool(torch.isfinite(sample).all()))
    return Values(sample, detached.clone() if is_mask and tensor.numel() <= MOST_COPIED else None)


class CallLog(TorchFunctionMode):
    """Describes the calls of a step, from ``open`` to ``close``.

    Args:
        host: the host of this process.

    Attributes:
        calls: the calls in order; optimizers' steps are in ``steps``.
        values: what is known about the tensors of each form, from its first call.
        steps: the steps of optimizers, each with its number of calls.
        optimizers: for each of these the optimizer, and samples of its gradients.
        skipped: the calls that cannot be replayed: their number for each reason.
    """

    def __init__(self, host: Host) -> None:
        super().__init__()
        self.calls: list[Call] = []
        self.values: dict[Form, tuple[Values, ...]] = {}
        self.steps: dict[StepForm, int] = {}
        self.optimizers: dict[StepForm, tuple[weakref.ref[Any], list[Values]]] = {}
        self.skipped: dict[str, int] = {}
        self._host = host
        self._on_failure = host.events.on_failure_of("replay")
        self._numbers: dict[int, tuple[weakref.ref[torch.Tensor], int]] = {}
        self._next_number = 0
        self._is_open = False
        self._is_inside = False
        self._is_stepping = False
        self._undo = contextlib.ExitStack()

    def open(self) -> None:
        """Begin a step, and forget what came before."""
        parts = (self.calls, self.values, self.steps, self.optimizers, self.skipped, self._numbers)
        for kept in parts:
            kept.clear()
        if self._is_open:
            return
        self._is_open = True
        host, undo = self._host, self._undo
        undo.callback(host.forward_wrappers.append(self._run_module, self._on_failure))
        undo.callback(host.before_optimizer_step.append(self._begin_step, self._on_failure))
        undo.callback(host.after_optimizer_step.append(self._end_step, self._on_failure))
        for name in _CLIPPING:
            if name in vars(clip_grad):
                part = ClippingPart(name)
                undo.callback(wrap_function(clip_grad, name, self._on_failure, self._clip(part)))
        self.__enter__()

    def close(self) -> None:
        """End the step. A mode that the program has entered meanwhile stays entered."""
        self._is_open = False
        self._undo.close()
        if _get_current_function_mode() is self:
            self.__exit__(None, None, None)
        self._numbers.clear()

    def __torch_function__(
        self, function: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        if not self._is_open or self._is_stepping or len(self.calls) >= MOST_CALLS:
            return function(*args, **kwargs)
        described = attempt(self._on_failure, self._describe, function, args, kwargs)
        result = function(*args, **kwargs)
        if described is not None:
            attempt(self._on_failure, self._add, function, described, result)
        return result

    # Descriptions

    def _describe(
        self, function: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[Hashable, list[torch.Tensor], list[TensorForm], list[int]] | None:
        """Describe the arguments before the call, which may change them."""
        if getattr(function, "__name__", "") in _UNTIMED or _gets_gradient(function):
            return None
        tensors: list[torch.Tensor] = []
        try:
            arguments = freeze((args, kwargs), tensors)
            forms = [TensorForm.of(tensor) for tensor in tensors]
        except NotReplayableError as why:
            self._skip(f"{getattr(function, '__name__', function)}: {why}")
            return None
        return arguments, tensors, forms, [tensor._version for tensor in tensors]

    def _add(self, function: Any, described: Any, result: Any) -> None:
        results = list(tensors_in(result))
        arguments, tensors, forms, versions = described
        written = tuple(
            n
            for n, (tensor, version) in enumerate(zip(tensors, versions, strict=True))
            if tensor._version != version
        )
        if not results and not written:
            return
        form = Form(
            function=function,
            arguments=arguments,
            tensors=tuple(forms),
            is_recorded=any(tensor.requires_grad for tensor in results)
            and any(form.requires_grad for form in forms),
            is_grad_enabled=torch.is_grad_enabled(),
            written=written,
            autocast=_programs_autocast(),
            is_inside=self._is_inside,
        )
        if form not in self.values:
            self.values[form] = tuple(map(find_values, tensors))
        inputs = tuple(map(self._number, tensors))
        self.calls.append(Call(form, inputs, tuple(map(self._number, results))))

    def _number(self, tensor: torch.Tensor) -> int:
        reference, number = self._numbers.get(id(tensor), (None, -1))
        if reference is None or reference() is not tensor:
            number = self._next_number
            self._next_number += 1
            self._numbers[id(tensor)] = weakref.ref(tensor), number
        return number

    def _skip(self, why: str) -> None:
        self.skipped[why] = self.skipped.get(why, 0) + 1

    # What the program calls

    def _run_module(
        self, call: Callable[..., Any], module: Any, args: tuple[Any, ...], kwargs: Any
    ) -> Any:
        """The forward wrapper."""
        first, self._is_inside = len(self.calls), True
        try:
            output = call(module, *args, **kwargs)
        finally:
            self._is_inside = False
        with torch._C.DisableTorchFunction():
            attempt(self._on_failure, self._leave_module, first, output)
        return output

    def _leave_module(self, first: int, output: Any) -> None:
        for place in reversed(range(first, len(self.calls))):
            if _is_head(self.calls[place].form):
                self.calls[place] = self.calls[place]._replace(is_head=True)
                break
        outputs = [x for x in tensors_in(output) if x.is_floating_point()]
        if outputs and self._is_open:
            versions = [tensor._version for tensor in outputs]
            forms = [TensorForm.of(tensor) for tensor in outputs]
            slots = (tuple, *(Slot(n) for n in range(len(outputs))))
            arguments = (tuple, slots, (dict,))
            self._add(leave, (arguments, outputs, forms, versions), outputs)

    def _clip(self, part: ClippingPart) -> Callable[..., Any]:
        def clip(original: Callable[..., Any], tensors: Any, *args: Any, **kwargs: Any) -> Any:
            described = None
            if self._is_open and isinstance(tensors, (list, tuple)) and not kwargs:
                gradients = list(tensors)
                if part.__name__ != "_get_total_norm":
                    gradients = [p.grad for p in tensors if p.grad is not None]
                with torch._C.DisableTorchFunction():
                    described = self._describe(part, (gradients, *args), {})
            before, self._is_stepping = self._is_stepping, True
            try:
                result = original(tensors, *args, **kwargs)
            finally:
                self._is_stepping = before
            if described is not None:
                with torch._C.DisableTorchFunction():
                    attempt(self._on_failure, self._add, part, described, result)
            return result

        return clip

    def _begin_step(self, optimizer: Any) -> None:
        self._is_stepping = True
        try:
            with torch._C.DisableTorchFunction():
                form = describe_step(optimizer)
                if form not in self.optimizers:
                    values = list(map(find_values, _gradients(optimizer)))
                    self.optimizers[form] = weakref.ref(optimizer), values
        except NotReplayableError as why:
            self._skip(str(why))
        else:
            self.steps[form] = self.steps.get(form, 0) + 1

    def _end_step(self, optimizer: Any) -> None:
        self._is_stepping = False


def describe_step(optimizer: Any) -> StepForm:
    """Describe the step that an optimizer is about to make.

    Raises:
        NotReplayableError: it is not one of torch's.
    """
    kind = type(optimizer)
    if not kind.__module__.startswith("torch.optim.") or "capturable" in kind.__module__:
        raise NotReplayableError(f"{kind.__name__} is not an optimizer of torch")
    groups = []
    for group in optimizer.param_groups:
        options = tuple(
            (name, float(value) if isinstance(value, torch.Tensor) else value)
            for name, value in group.items()
            if name != "params" and (name in optimizer.defaults or name == "lr")
        )
        members = tuple(
            (TensorForm.of(p), TensorForm.of(p.grad)) for p in group["params"] if p.grad is not None
        )
        if members:
            groups.append((options, members))
    if not groups:
        raise NotReplayableError("an optimizer steps without gradients")
    return StepForm(kind, tuple(groups))


def _gradients(optimizer: Any) -> Iterator[torch.Tensor]:
    """Yield the gradients that an optimizer's step uses."""
    for group in optimizer.param_groups:
        yield from (p.grad for p in group["params"] if p.grad is not None)


def copy_state(optimizer: Any) -> list[dict[str, Any]]:
    """Copy the state of each parameter that an optimizer's last step has updated."""
    state = [
        optimizer.state.get(p, {}) for group in optimizer.param_groups for p in group["params"]
    ]
    return [
        {k: v.detach().clone() if isinstance(v, torch.Tensor) else v for k, v in kept.items()}
        for kept in state
        if kept
    ]


def _programs_autocast() -> tuple[str, torch.dtype] | None:
    for device in ("cpu", "cuda", "xpu", "mps"):
        if torch.is_autocast_enabled(device):
            return device, torch.get_autocast_dtype(device)
    return None


def _gets_gradient(function: Any) -> bool:
    owner = getattr(function, "__self__", None)
    return getattr(owner, "__name__", "") in ("grad", "_grad", "data")


def _is_head(form: Form) -> bool:
    """Whether a call is a matmul or a convolution with a parameter."""
    name = f"aten::{form.name}"
    is_matmul = any(part in name for part in MATMUL_OPERATORS)
    return is_matmul and any(tensor.is_parameter for tensor in form.tensors[1:3])


@contextlib.contextmanager
def restored_randomness() -> Iterator[None]:
    """A context that leaves the random states of torch, ``random`` and NumPy as they were."""
    import random
    import sys

    numpy: Any = sys.modules.get("numpy")
    pythons = random.getstate()
    numpys = None if numpy is None else numpy.random.get_state()
    with torch.random.fork_rng():
        try:
            yield
        finally:
            random.setstate(pythons)
            if numpy is not None and numpys is not None:
                numpy.random.set_state(numpys)
