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
import itertools
import operator
from array import array
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import torch

from flatout import kernels
from flatout.agent.containment import attempt

SERIAL_BELOW = 32768
"""Elements of a group below which one thread does it: waking the others takes as long."""

SLOTS = 6
"""Addresses for each tensor: parameter, gradient, three of state, step counter."""

Options = Callable[[Mapping[str, Any]], tuple[float, ...]]
Column = Sequence[torch.Tensor]


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
        done = attempt(self._on_failure, self._run, args, kwargs)
        if not done:
            self._own(*args, **kwargs)
        elif not all(done):
            self._leave_rest(args, kwargs, done)

    def _run(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[bool]:
        """Step what can be stepped; returns of each parameter whether it was, or nothing."""
        arguments = dict(zip(self._names, args, strict=False)) | kwargs
        form = self._form
        if any(arguments.get(name) for name in _REFUSED) or torch.compiler.is_compiling():
            return []
        if arguments.get("grad_scale") is not None or arguments.get("found_inf") is not None:
            return []
        options = form.options(arguments)
        if not all(isinstance(option, (int, float)) for option in options):
            return []  # a tensor
        if form.name == "sgd" and not any(options[1:]):
            return []  # one operation of torch does it as well
        names = [name for name in form.state if self._has(name, arguments)]
        tensors: list[Column] = [arguments[name] for name in ("params", "grads", *names)]
        numbers: list[Column] = [arguments[name] for name in form.scalars]
        slots = [0, 1, *(2 + form.state.index(name) for name in (*names, *form.scalars))]
        if form.counts:
            numbers.append(arguments["state_steps"])
            slots.append(SLOTS - 1)
        if _are_plain(tensors, numbers):
            done = [True] * len(tensors[0])
        else:
            done = [
                _alike(row) and _are_numbers(single)
                for row, single in itertools.zip_longest(
                    zip(*tensors, strict=True), zip(*numbers, strict=True), fillvalue=()
                )
            ]
            tensors = [list(itertools.compress(column, done)) for column in tensors]
            numbers = [list(itertools.compress(column, done)) for column in numbers]
        count = len(tensors[0])
        if not count:
            return []
        addresses = array("Q", bytes(8 * SLOTS * count))
        for slot, column in zip(slots, (*tensors, *numbers), strict=True):
            addresses[slot::SLOTS] = array("Q", map(torch.Tensor.data_ptr, column))
        sizes = array("q", map(torch.Tensor.numel, tensors[0]))
        threads = torch.get_num_threads() if sum(sizes) >= SERIAL_BELOW else 1
        written = itertools.chain(tensors[0], *tensors[2:], *numbers)
        torch.autograd.graph.increment_version(written)
        numbers_passed = array("d", options)
        failed = self._kernel(
            addresses.buffer_info()[0],
            sizes.buffer_info()[0],
            count,
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


_PLAIN = {torch.Tensor, torch.nn.Parameter}  # None stands for a momentum that torch makes yet
_KINDS = {(torch.float32, True, torch.strided)}
_kind = operator.attrgetter("dtype", "is_cpu", "layout")


def _are_plain(tensors: Sequence[Column], numbers: Sequence[Column]) -> bool:
    """Whether the kernel may take all of them; columns at once, since this is what a step costs."""
    sizes = list(map(torch.Tensor.numel, tensors[0]))
    return (
        all(_PLAIN.issuperset(map(type, column)) for column in (*tensors, *numbers))
        and all(set(map(_kind, column)) == _KINDS for column in (*tensors, *numbers))
        and all(all(map(torch.Tensor.is_contiguous, column)) for column in tensors)
        and all(list(map(torch.Tensor.numel, column)) == sizes for column in tensors[1:])
        and all(set(map(torch.Tensor.numel, column)) == {1} for column in numbers)
    )


def _alike(tensors: Sequence[torch.Tensor]) -> bool:
    """Whether the kernel may go through them side by side: float32 on the CPU, laid out alike."""
    if not all(type(tensor) in _PLAIN and _kind(tensor) in _KINDS for tensor in tensors):
        return False
    first = tensors[0]
    if all(tensor.is_contiguous() for tensor in tensors):
        return all(tensor.numel() == first.numel() for tensor in tensors)
    return (
        all(tensor.stride() == first.stride() for tensor in tensors)
        and all(tensor.shape == first.shape for tensor in tensors)
        and bool(torch.ops.aten.is_non_overlapping_and_dense.default(first))
    )


def _are_numbers(tensors: Sequence[torch.Tensor]) -> bool:
    return all(
        type(tensor) in _PLAIN and _kind(tensor) in _KINDS and tensor.numel() == 1
        for tensor in tensors
    )
