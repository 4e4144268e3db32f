"""Optimizer steps by the compiled kernels, in the place of torch's functions for single tensors.

``torch.optim`` classes gather what a step needs into lists, create the state, and hand both to a
function of their module, such as ``_single_tensor_adam``. Taking the place of these functions, and
of nothing else, leaves everything that a program or a checkpoint sees to torch: state, hooks, step
counters, choices of ``foreach`` or ``fused`` made by the program.
"""

from __future__ import annotations

import contextlib
import ctypes
import importlib
import inspect
from array import array
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import torch

from flatout import kernels

SERIAL_BELOW = 32768
"""Elements of a group below which one thread does it: waking the others takes as long."""

SLOTS = 6
"""Addresses for each tensor: parameter, gradient, three of state, step counter."""

Options = Callable[[Mapping[str, Any]], tuple[float, ...]]


@dataclass(frozen=True)
class Form:
    """One optimizer.

    Attributes:
        name: of its module in ``torch.optim`` and of the function of the kernel.
        state: names of the lists with the tensors of state, in the order of the kernel; an empty
            list stands for state that this group does not have.
        scalars: those of them that hold one number for each parameter.
        options: the numbers that the kernel expects, from the arguments of torch's function.
        counts: whether there is a step counter.
    """

    name: str
    state: tuple[str, ...]
    options: Options
    scalars: tuple[str, ...] = ()
    counts: bool = True


def _common(a: Mapping[str, Any]) -> tuple[float, ...]:
    return a["lr"], a["weight_decay"], a.get("decoupled_weight_decay", False), a["maximize"]


FORMS = (
    Form(
        "sgd",
        ("momentum_buffer_list",),
        lambda a: (*_common(a), a["momentum"], a["dampening"], a["nesterov"]),
        counts=False,
    ),
    Form(
        "adam",
        ("exp_avgs", "exp_avg_sqs", "max_exp_avg_sqs"),
        lambda a: (*_common(a), a["beta1"], a["beta2"], a["eps"], a["amsgrad"]),
    ),
    Form(
        "rmsprop",
        ("square_avgs", "grad_avgs", "momentum_buffer_list"),
        lambda a: (*_common(a), a["alpha"], a["eps"], a["momentum"], a["centered"]),
    ),
    Form("adagrad", ("state_sums",), lambda a: (*_common(a), a["lr_decay"], a["eps"])),
    Form("adadelta", ("square_avgs", "acc_deltas"), lambda a: (*_common(a), a["rho"], a["eps"])),
    Form(
        "adamax",
        ("exp_avgs", "exp_infs"),
        lambda a: (*_common(a), a["beta1"], a["beta2"], a["eps"]),
    ),
    Form(
        "nadam",
        ("exp_avgs", "exp_avg_sqs", "mu_products"),
        lambda a: (*_common(a), a["beta1"], a["beta2"], a["eps"], a["momentum_decay"]),
        scalars=("mu_products",),
    ),
    Form(
        "radam",
        ("exp_avgs", "exp_avg_sqs"),
        lambda a: (*_common(a), a["beta1"], a["beta2"], a["eps"]),
    ),
)

_REFUSED = ("capturable", "differentiable", "has_complex", "has_sparse_grad")
"""Options that the kernels do not know; torch's own function then does the whole group."""


class OnePass:
    """Stands in for torch's function for one optimizer.

    Args:
        form: the optimizer.
        library: of ``kernels/optimizers.c``.
        on_failure: called when a step could not be prepared; torch's own function has done it then.

    Attributes:
        name: of the optimizer.
    """

    def __init__(
        self, form: Form, library: ctypes.CDLL, on_failure: Callable[[Exception], None]
    ) -> None:
        self.name = form.name
        self._form = form
        self._on_failure = on_failure
        self._module: ModuleType = importlib.import_module(f"torch.optim.{form.name}")
        self._attribute = f"_single_tensor_{form.name}"
        self._own: Callable[..., None] = getattr(self._module, self._attribute)
        self._names = tuple(inspect.signature(self._own).parameters)
        self._kernel = getattr(library, form.name)
        self._kernel.restype = ctypes.c_int
        self._kernel.argtypes = [
            *(ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int64, ctypes.c_void_p, ctypes.c_int)
        ]
        self._function = self._step  # one bound method, to be known again

    def install(self) -> None:
        """Take the place of torch's function, or of what stands there."""
        self._own = getattr(self._module, self._attribute)
        setattr(self._module, self._attribute, self._function)

    def remove(self) -> None:
        """Put torch's function back, unless the program has put another one there meanwhile."""
        if getattr(self._module, self._attribute) is self._function:
            setattr(self._module, self._attribute, self._own)

    def _step(self, *args: Any, **kwargs: Any) -> None:
        try:
            arguments = dict(zip(self._names, args, strict=False)) | kwargs
            done = self._run(arguments)
        except Exception as error:  # noqa: BLE001 - reported
            self._on_failure(error)
            done = []
        if not done:
            self._own(*args, **kwargs)
        elif not all(done):
            self._leave_rest(args, kwargs, done)

    def _run(self, arguments: Mapping[str, Any]) -> list[bool]:
        """Step what can be stepped; returns of each parameter whether it was, or nothing."""
        form = self._form
        if any(arguments.get(name) for name in _REFUSED) or torch.compiler.is_compiling():
            return []
        if arguments.get("grad_scale") is not None or arguments.get("found_inf") is not None:
            return []
        options = form.options(arguments)
        if not all(isinstance(option, (int, float)) for option in options):
            return []  # a tensor
        params: list[torch.Tensor] = arguments["params"]
        gradients: list[torch.Tensor] = arguments["grads"]
        state = [arguments[name] for name in form.state if self._has(name, arguments)]
        slots = [
            arguments[name] if name in form.scalars or self._has(name, arguments) else None
            for name in form.state
        ]
        numbers = [arguments[name] for name in form.scalars]
        if form.counts:
            numbers.append(arguments["state_steps"])
        rows, sizes = array("Q"), array("q")
        done, written = [], []
        for i, param in enumerate(params):
            tensors = [values[i] for values in state]
            single = [values[i] for values in numbers]
            usable = _alike(param, gradients[i], tensors) and all(map(_is_number, single))
            done.append(usable)
            if not usable:
                continue
            addresses = [0] * SLOTS
            addresses[0], addresses[1] = param.data_ptr(), gradients[i].data_ptr()
            for slot, values in enumerate(slots, 2):
                if values is not None:
                    addresses[slot] = values[i].data_ptr()
            if form.counts:
                addresses[-1] = single[-1].data_ptr()
            rows.extend(addresses)
            sizes.append(param.numel())
            written += [param, *tensors, *single]
        if not sizes:
            return []
        threads = torch.get_num_threads() if sum(sizes) >= SERIAL_BELOW else 1
        torch.autograd.graph.increment_version(written)
        numbers_passed = array("d", options)
        failed = self._kernel(
            rows.buffer_info()[0],
            sizes.buffer_info()[0],
            len(sizes),
            numbers_passed.buffer_info()[0],
            threads,
        )
        if failed:
            raise MemoryError
        return done

    def _has(self, name: str, arguments: Mapping[str, Any]) -> bool:
        """Whether this group has state of this name, one tensor as large as each parameter."""
        return (
            bool(arguments[name])
            and name not in self._form.scalars
            and not (self._form.name == "sgd" and not arguments["momentum"])
        )

    def _leave_rest(
        self, args: tuple[Any, ...], kwargs: Mapping[str, Any], done: Sequence[bool]
    ) -> None:
        """Let torch step the parameters that could not be."""
        rest = [i for i, is_done in enumerate(done) if not is_done]

        def part(value: Any) -> Any:
            if not isinstance(value, list) or not value:
                return value
            return [value[i] for i in rest]

        parts = [part(value) for value in args]
        self._own(*parts, **kwargs)
        for whole, chosen in zip(args, parts, strict=True):
            if chosen is not whole:
                for i, value in zip(rest, chosen, strict=True):
                    whole[i] = value  # SGD makes its momentum


def load(on_failure: Callable[[Exception], None]) -> list[OnePass]:
    """A stand-in for each optimizer that this torch has.

    Raises:
        flatout.kernels.KernelError: the kernels cannot be had.
    """
    library = kernels.load("optimizers")
    found = []
    for form in FORMS:
        with contextlib.suppress(ModuleNotFoundError, AttributeError):
            found.append(OnePass(form, library, on_failure))
    return found


@contextlib.contextmanager
def installed(stand_in: OnePass) -> Iterator[None]:
    """In place of torch's function for a while."""
    stand_in.install()
    try:
        yield
    finally:
        stand_in.remove()


_PLAIN = (torch.Tensor, torch.nn.Parameter)


def _alike(
    param: torch.Tensor, gradient: torch.Tensor, state: Sequence[torch.Tensor | None]
) -> bool:
    """Whether the kernel may go through them side by side: float32 on the CPU, laid out alike."""
    tensors: list[torch.Tensor] = []
    count = param.numel()
    for tensor in (param, gradient, *state):
        if (
            tensor is None  # a momentum that torch makes at the first step
            or type(tensor) not in _PLAIN
            or tensor.dtype is not torch.float32
            or not tensor.is_cpu
            or tensor.layout is not torch.strided
            or tensor.numel() != count
        ):
            return False
        tensors.append(tensor)
    if all(tensor.is_contiguous() for tensor in tensors):
        return True
    strides = param.stride()
    return (
        all(tensor.stride() == strides for tensor in tensors)
        and all(tensor.shape == param.shape for tensor in tensors)
        and bool(torch.ops.aten.is_non_overlapping_and_dense.default(param))
    )


def _is_number(tensor: torch.Tensor) -> bool:
    return (
        type(tensor) is torch.Tensor
        and tensor.dtype is torch.float32
        and tensor.is_cpu
        and tensor.numel() == 1
    )
