"""Override the functions by which torch's optimizers update one tensor after the other.

The classes of ``torch.optim`` collect what a step needs in lists, create the state, and pass both
to a function of their module, such as ``_single_tensor_adam``. Only these functions are replaced,
so torch still handles everything that a program or a checkpoint sees: state, hooks, step counters,
parameter groups, and ``foreach=True`` or ``fused=True`` chosen by the program.

A replacement calls torch's function unless there is an override, either for every optimizer of the
process (``override_all``) or for the one that is stepping in this context (``override_context``). A
replacement is installed once, and not for the duration of a step, so nested steps, steps in several
threads and steps that raise an exception cannot leave a wrong function behind.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import importlib
import inspect
import itertools
import operator
from array import array
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any, Protocol

import torch

from flatout.intercept import arrays
from flatout.intercept.containment import attempt
from flatout.optim.prepared import StepOfGroup, is_noting, note

SERIAL_BELOW = 32768
"""Groups with fewer elements are stepped on one thread: waking the others takes as long."""

SLOTS = 6
"""How many addresses the kernel gets for each tensor: parameter, gradient, three for state, and
step counter."""

GetOptions = Callable[[Mapping[str, Any]], tuple[float, ...]]
Column = Sequence[torch.Tensor]
Step = Callable[..., None]


@dataclass(frozen=True)
class Form:
    """How one kind of optimizer is stepped.

    Attributes:
        name: the name of its module in ``torch.optim`` and of the kernel's function.
        state: the names of the lists of state tensors, in the kernel's order. An empty list means
            that a parameter group does not have this state.
        options: returns the numbers that the kernel expects, given the arguments of torch's
            function by name.
        scalars: the lists in ``state`` that hold a single number for each parameter.
        counts_steps: whether there is a step counter.
    """

    name: str
    state: tuple[str, ...]
    options: GetOptions
    scalars: tuple[str, ...] = ()
    counts_steps: bool = True


def _common_options(a: Mapping[str, Any]) -> tuple[float, ...]:
    return a["lr"], a["weight_decay"], a.get("decoupled_weight_decay", False), a["maximize"]


FORMS = (
    Form(
        "sgd",
        ("momentum_buffer_list",),
        lambda a: (*_common_options(a), a["momentum"], a["dampening"], a["nesterov"]),
        counts_steps=False,
    ),
    Form(
        "adam",
        ("exp_avgs", "exp_avg_sqs", "max_exp_avg_sqs"),
        lambda a: (*_common_options(a), a["beta1"], a["beta2"], a["eps"], a["amsgrad"]),
    ),
    Form(
        "rmsprop",
        ("square_avgs", "grad_avgs", "momentum_buffer_list"),
        lambda a: (*_common_options(a), a["alpha"], a["eps"], a["momentum"], a["centered"]),
    ),
    Form("adagrad", ("state_sums",), lambda a: (*_common_options(a), a["lr_decay"], a["eps"])),
    Form(
        "adadelta",
        ("square_avgs", "acc_deltas"),
        lambda a: (*_common_options(a), a["rho"], a["eps"]),
    ),
    Form(
        "adamax",
        ("exp_avgs", "exp_infs"),
        lambda a: (*_common_options(a), a["beta1"], a["beta2"], a["eps"]),
    ),
    Form(
        "nadam",
        ("exp_avgs", "exp_avg_sqs", "mu_products"),
        lambda a: (*_common_options(a), a["beta1"], a["beta2"], a["eps"], a["momentum_decay"]),
        scalars=("mu_products",),
    ),
    Form(
        "radam",
        ("exp_avgs", "exp_avg_sqs"),
        lambda a: (*_common_options(a), a["beta1"], a["beta2"], a["eps"]),
    ),
)

_UNSUPPORTED = ("capturable", "differentiable", "has_complex", "has_sparse_grad")
"""If one of these arguments of torch's functions is set, torch steps the whole group."""

_NOT_ALIKE = (
    "it has parameters, gradients or state that are not float32 on the CPU, that differ in memory "
    "format, or that share memory"
)


class Stepper(Protocol):
    """Steps the parameters of an optimizer in torch's stead."""

    def refusal(self, form: Form, options: Sequence[float]) -> str | None:
        """Why it cannot step this kind of optimizer with these options, ``None`` if it can."""

    def step(self, form: Form, arguments: Mapping[str, Any], options: Sequence[float]) -> bool:
        """Step all parameters; returns whether it has, and otherwise has written nothing.

        Args:
            form: the kind of optimizer.
            arguments: the arguments of torch's function, by name. Parameters, gradients and state
                are float32 on the CPU, have the same strides, and share no memory.
            options: the numbers that ``form.options`` returns.
        """


@dataclass(frozen=True)
class Override:
    """A stepper that replaces torch's functions, and callbacks.

    Attributes:
        stepper: steps the parameters.
        on_failure: called with the exception when a step could not be prepared; unless this
            raises, torch does the step.
        on_skip: called with the name of a kind of optimizer, and why torch steps some of its
            parameters.
        on_step: called after ``stepper`` has stepped some parameters.
    """

    stepper: Stepper
    on_failure: Callable[[Exception], None]
    on_skip: Callable[[str, str], None] = lambda name, why: None
    on_step: Callable[[], None] = lambda: None


_for_all: list[Override] = []
"""The overrides for every optimizer of the process; the last one is in force."""

_for_context: ContextVar[Override | None] = ContextVar("override", default=None)
"""The override for the optimizer that is stepping in this context."""

_replacements: dict[str, Any] = {}
"""The functions that replace torch's, by the name of the form."""

_permanent: set[str] = set()
"""Names of forms whose replacement stays installed, because ``override_context`` needs it."""


def override_all(override: Override) -> tuple[Callable[[], None], list[str]]:
    """Let every optimizer of the process step with this override from now on.

    Returns:
        The undo, which also puts back torch's functions; and the names of the forms whose function
        the program has replaced, which are left alone.
    """
    missing = [form.name for form in FORMS if not install(form)]
    _for_all.append(override)

    def undo() -> None:
        _for_all.remove(override)
        if not _for_all:
            for form in FORMS:
                if form.name not in _permanent:
                    _uninstall(form)

    return undo, missing


@contextlib.contextmanager
def override_context(name: str, override: Override) -> Iterator[None]:
    """Let the optimizer that steps in this context use this override.

    Args:
        name: the name of the optimizer's form.
        override: the override to use.
    """
    if name not in _permanent:
        install(next(form for form in FORMS if form.name == name))
        _permanent.add(name)
    token = _for_context.set(override)
    try:
        yield
    finally:
        _for_context.reset(token)


def install(form: Form) -> bool:
    """Replace torch's function for a form; returns whether it is replaced now.

    A function that the program has installed there is left alone.
    """
    module, attribute = _location(form)
    present: Any = vars(module).get(attribute)
    replacement = _replacements.get(form.name)
    if replacement is not None and present is replacement:
        return True
    if getattr(present, "__module__", None) != module.__name__:
        return False
    if replacement is None or replacement.__wrapped__ is not present:
        replacement = _replacements[form.name] = _make_replacement(form, present)
    setattr(module, attribute, replacement)
    return True


def _uninstall(form: Form) -> None:
    """Put torch's function back, unless the program has installed another one meanwhile."""
    module, attribute = _location(form)
    replacement = _replacements.get(form.name)
    is_installed = getattr(module, attribute, None) is replacement
    if replacement is not None and is_installed:
        setattr(module, attribute, replacement.__wrapped__)


def _location(form: Form) -> tuple[Any, str]:
    """The module and the name of torch's function for a form."""
    return importlib.import_module(f"torch.optim.{form.name}"), f"_single_tensor_{form.name}"


def _make_replacement(form: Form, original: Any) -> Step:
    """A function that steps with the override that is in force, or else with ``original``."""
    names = tuple(inspect.signature(original).parameters)

    @functools.wraps(original)
    def step(*args: Any, **kwargs: Any) -> None:
        done: list[bool] = []
        override = None if torch.compiler.is_compiling() else _override_in_force()
        if override is not None:
            done, why = attempt(
                override.on_failure, _step, form, override.stepper, names, args, kwargs
            ) or ([], None)
            if why is not None:
                attempt(override.on_failure, override.on_skip, form.name, why)
            if any(done):
                attempt(override.on_failure, override.on_step)
        if not any(done):
            original(*args, **kwargs)
        elif not all(done):
            _step_rest(original, args, kwargs, done)

    step.__prepare_scriptable__ = lambda: original  # type: ignore[attr-defined] # torch.jit.script
    return step


def _override_in_force() -> Override | None:
    """The override for the optimizer that is stepping now."""
    return _for_context.get() or (_for_all[-1] if _for_all else None)


def _step(
    form: Form,
    stepper: Stepper,
    names: Sequence[str],
    args: Sequence[Any],
    kwargs: Mapping[str, Any],
) -> tuple[list[bool], str | None]:
    """Step the parameters that the stepper supports.

    Args:
        form: the kind of optimizer.
        stepper: steps the parameters.
        names: the names of the parameters of torch's function.
        args, kwargs: the arguments that torch's function was called with.

    Returns:
        For each parameter, whether it was stepped (an empty list: none was); and why some were not,
        if the user should know.
    """
    arguments: dict[str, Any] = {**dict(zip(names, args, strict=False)), **kwargs}
    if any(arguments.get(name) for name in _UNSUPPORTED):
        return [], "it is differentiable or capturable, or has complex or sparse tensors"
    if arguments.get("grad_scale") is not None or arguments.get("found_inf") is not None:
        return [], "its gradients are given with a scale"
    options = form.options(arguments)
    if not all(isinstance(option, (int, float)) for option in options):
        return [], "one of its options is a tensor"
    if torch._C._are_functorch_transforms_active():
        return [], "it is transformed by torch.func"
    why = stepper.refusal(form, options)
    if why is not None:
        return [], why
    column_names = _column_names(form, arguments)
    scalar_names = {*form.scalars, "state_steps"}
    columns: list[Column] = [arguments[name] for name in column_names]
    named_columns = list(zip(column_names, columns, strict=True))
    tensors = [column for name, column in named_columns if name not in scalar_names]
    scalars = [column for name, column in named_columns if name in scalar_names]
    written = itertools.chain(*(column for name, column in named_columns if name != "grads"))
    if _are_plain(tensors, scalars) and arrays.share_no_memory(list(written), arguments["grads"]):
        done = [True] * len(columns[0])
    else:
        done = _find_supported(tensors, scalars)
        rows = list(itertools.compress(zip(*columns, strict=True), done))
        is_written = [name != "grads" for name in column_names]
        shares_memory = iter(arrays.find_rows_sharing_memory(rows, is_written))
        done = [is_done and not next(shares_memory) for is_done in done]
        arguments = {name: _select(value, done) for name, value in arguments.items()}
        has_no_state_yet = [any(x is None for x in row) for row in zip(*columns, strict=True)]
        if not all(map(operator.or_, done, has_no_state_yet)):
            why = _NOT_ALIKE
    if any(done) and not stepper.step(form, arguments, options):
        return [], "its options lead to a coefficient that is not finite"
    return done, why


def _column_names(form: Form, arguments: Mapping[str, Any]) -> list[str]:
    """Names of the lists that a step reads or writes: parameters, gradients, state, step counters.

    State that this group does not have is left out.
    """
    has_momentum = form.name != "sgd" or bool(arguments["momentum"])
    state = [name for name in form.state if arguments[name] and has_momentum]
    return ["params", "grads", *state, *(["state_steps"] if form.counts_steps else [])]


def _select(value: Any, is_selected: Sequence[bool]) -> Any:
    """The selected elements of a list; a value that is no list, or an empty list, is returned."""
    if not isinstance(value, list) or not value:
        return value
    return list(itertools.compress(value, is_selected))


def _step_rest(
    original: Step, args: tuple[Any, ...], kwargs: Mapping[str, Any], done: Sequence[bool]
) -> None:
    """Let torch step the parameters that have not been stepped."""
    is_left = [not is_done for is_done in done]
    indices = list(itertools.compress(range(len(done)), is_left))
    selected_args = [_select(value, is_left) for value in args]
    original(*selected_args, **kwargs)
    for whole, selected in zip(args, selected_args, strict=True):
        if selected is not whole:
            for i, value in zip(indices, selected, strict=True):
                whole[i] = value  # SGD creates its momentum buffers in this list


class OnePass:
    """Steps all tensors of a group in one pass over memory, with ``kernels/optimizers.c``.

    Args:
        library: compiled from that source.

    Raises:
        flatout.kernels.KernelError: the library lacks a function.
    """

    def __init__(self, library: ctypes.CDLL) -> None:
        self._kernels = {form.name: getattr(library, form.name) for form in FORMS}
        for kernel in self._kernels.values():
            pointer = ctypes.c_void_p
            kernel.restype = ctypes.c_int
            kernel.argtypes = [pointer, pointer, ctypes.c_int64, pointer, ctypes.c_int]

    def refusal(self, form: Form, options: Sequence[float]) -> str | None:
        """Refuse nothing."""
        return None

    def step(self, form: Form, arguments: Mapping[str, Any], options: Sequence[float]) -> bool:
        """Step with the kernel, unless one of its coefficients is not finite.

        Raises:
            MemoryError: the kernel could not allocate memory.
        """
        names = _column_names(form, arguments)
        columns: list[Column] = [arguments[name] for name in names]
        slots = {"params": 0, "grads": 1, "state_steps": SLOTS - 1}
        slots.update({name: 2 + index for index, name in enumerate(form.state)})
        count = len(columns[0])
        addresses = array("Q", bytes(8 * SLOTS * count))
        for name, column in zip(names, columns, strict=True):
            addresses[slots[name] :: SLOTS] = array("Q", map(torch.Tensor.data_ptr, column))
        sizes = array("q", map(torch.Tensor.numel, columns[0]))
        threads = torch.get_num_threads() if sum(sizes) >= SERIAL_BELOW else 1
        option_array = array("d", options)
        torch.autograd.graph.increment_version(itertools.chain(columns[0], *columns[2:]))
        kernel = self._kernels[form.name]
        status: int = kernel(
            addresses.buffer_info()[0],
            sizes.buffer_info()[0],
            count,
            option_array.buffer_info()[0],
            threads,
        )
        if status < 0:
            raise MemoryError
        if is_noting() and not status:
            by_slot = {slots[name]: column for name, column in zip(names, columns, strict=True)}
            note(
                StepOfGroup(
                    ctypes.cast(kernel, ctypes.c_void_p).value or 0,
                    [by_slot.get(slot) for slot in range(SLOTS)],
                    [slots[name] for name in (*form.scalars, "state_steps") if name in slots],
                    options,
                    form.options,
                )
            )
        return not status


class Fused:
    """Steps with torch's fused functions; no parameter group is marked ``fused=True``."""

    def __init__(self) -> None:
        functions = {
            form.name: getattr(_location(form)[0], f"_fused_{form.name}", None) for form in FORMS
        }
        self._functions = {name: step for name, step in functions.items() if step is not None}

    def refusal(self, form: Form, options: Sequence[float]) -> str | None:
        """Refuse optimizers for which torch has no fused function, or an incorrect one."""
        if form.name not in self._functions:
            return "torch has no fused step for it"
        if form.name == "adam" and options[-1]:
            return "torch's fused step ignores NaNs in the maximum that amsgrad keeps"
        return None

    def step(self, form: Form, arguments: Mapping[str, Any], options: Sequence[float]) -> bool:
        """Step with torch's function, which itself does not increment version counters."""
        written: list[Column] = [arguments[name] for name in _column_names(form, arguments)]
        torch.autograd.graph.increment_version(itertools.chain(written[0], *written[2:]))
        self._functions[form.name](**arguments)
        return True


def _are_plain(tensors: Sequence[Column], scalars: Sequence[Column]) -> bool:
    """Whether a stepper supports all of these tensors.

    Whole columns are checked at once, because this check is most of a step's overhead.
    """
    return (
        all(map(arrays.are_contiguous_float32, (*tensors, *scalars)))
        and _have_same_sizes(tensors)
        and all(set(map(torch.Tensor.numel, column)) == {1} for column in scalars)
    )


def _have_same_sizes(columns: Sequence[Column]) -> bool:
    sizes = list(map(torch.Tensor.numel, columns[0]))
    return all(list(map(torch.Tensor.numel, column)) == sizes for column in columns[1:])


def _find_supported(tensors: Sequence[Column], scalars: Sequence[Column]) -> list[bool]:
    """For each parameter, whether a stepper supports it, its gradient and its state."""
    return [
        _are_alike(row) and all(arrays.is_dense_float32(x) and x.numel() == 1 for x in scalar_row)
        for row, scalar_row in itertools.zip_longest(
            zip(*tensors, strict=True), zip(*scalars, strict=True), fillvalue=()
        )
    ]


def _are_alike(tensors: Sequence[torch.Tensor]) -> bool:
    """Whether the tensors can be read element by element in the order of memory.

    They cannot if one is ``None``, such as a momentum buffer that torch has yet to create.
    """
    if not all(map(arrays.is_dense_float32, tensors)):
        return False
    first, *others = tensors
    return all(x.numel() == first.numel() for x in others) and (
        all(x.is_contiguous() for x in tensors)
        or all(x.shape == first.shape and x.stride() == first.stride() for x in others)
    )
