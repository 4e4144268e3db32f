"""Other steps of optimizers in the place of torch's functions for single tensors.

``torch.optim`` classes gather what a step needs into lists, create the state, and hand both to a
function of their module, such as ``_single_tensor_adam``. Taking the place of these functions, and
of nothing else, leaves everything that a program or a checkpoint sees to torch: state, hooks, step
counters, parameter groups, choices of ``foreach=True`` or ``fused=True`` made by the program.

A function that has taken such a place calls torch's own until somebody wants other steps: for
every optimizer of the process (``turn``), or for the one that is stepping in this context
(``stepping``). It is put there once and not around a step: so steps within steps, steps in several
threads and steps that raise find everything as it should be.
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

SERIAL_BELOW = 32768
"""Elements of a group below which one thread does it: waking the others takes as long."""

SLOTS = 6
"""Addresses for each tensor: parameter, gradient, three of state, step counter."""

Options = Callable[[Mapping[str, Any]], tuple[float, ...]]
Column = Sequence[torch.Tensor]
Step = Callable[..., None]


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
"""Options that only torch's own functions know; they then do the whole group."""

_UNLIKE = (
    "it has parameters, gradients or state that are not of float32 on the CPU, are in another "
    "memory format than each other, or share memory"
)


class Way(Protocol):
    """A way to step, other than torch's for single tensors."""

    def refusal(self, form: Form, options: Sequence[float]) -> str | None:
        """Why it does not step optimizers of this form with these options, ``None`` if it does."""

    def step(self, form: Form, arguments: Mapping[str, Any], options: Sequence[float]) -> bool:
        """Step all parameters; returns whether that was done, else nothing has been written.

        Args:
            form: the optimizer.
            arguments: of torch's function, by name. Parameters, gradients and state are in float32
                on the CPU, laid out alike, and share no memory.
            options: numbers, as ``form`` has them.
        """


@dataclass(frozen=True)
class User:
    """Who wants other steps.

    Attributes:
        way: in which way.
        on_failure: called when a step could not be prepared; unless it raises, torch does the step.
        on_rest: called with the name of an optimizer, and why some of its parameters are left to
            torch.
        on_step: called as parameters have been stepped in this way.
    """

    way: Way
    on_failure: Callable[[Exception], None]
    on_rest: Callable[[str, str], None] = lambda name, why: None
    on_step: Callable[[], None] = lambda: None


_turned: list[User] = []
"""Who wants them of every optimizer; the last one gets them."""

_stepping: ContextVar[User | None] = ContextVar("stepping", default=None)
"""Who wants them of the optimizer that steps in this context."""

_stand_ins: dict[str, Any] = {}
"""The functions that were put in the place of torch's, by the name of the optimizer."""

_kept: set[str] = set()
"""Of which of them ``stepping`` will go on to need."""


def turn(user: User) -> tuple[Callable[[], None], list[str]]:
    """Let every optimizer step in another way from now on.

    Returns:
        What ends that, and leaves the places as they were; and names of optimizers whose function
        is not torch's own here: these are left alone.
    """
    missing = [form.name for form in FORMS if not place(form)]
    _turned.append(user)

    def undo() -> None:
        _turned.remove(user)
        if not _turned:
            for form in FORMS:
                if form.name not in _kept:
                    _give_back(form)

    return undo, missing


@contextlib.contextmanager
def stepping(name: str, user: User) -> Iterator[None]:
    """Let the optimizer that steps in this context do it in another way.

    Args:
        name: of its form.
        user: who wants it.
    """
    if name not in _kept:
        place(next(form for form in FORMS if form.name == name))
        _kept.add(name)
    token = _stepping.set(user)
    try:
        yield
    finally:
        _stepping.reset(token)


def place(form: Form) -> bool:
    """Put a function of ours in the place of torch's; returns whether it is there now.

    Where the program has put one of its own there, that stays.
    """
    module, attribute = _place_of(form)
    own: Any = vars(module).get(attribute)
    stand_in = _stand_ins.get(form.name)
    if stand_in is not None and own is stand_in:
        return True
    if getattr(own, "__module__", None) != module.__name__:
        return False
    if stand_in is None or stand_in.__wrapped__ is not own:
        stand_in = _stand_ins[form.name] = _stand_in(form, own)
    setattr(module, attribute, stand_in)
    return True


def _give_back(form: Form) -> None:
    """Put torch's function back, unless the program has put another one there meanwhile."""
    module, attribute = _place_of(form)
    stand_in = _stand_ins.get(form.name)
    is_there = getattr(module, attribute, None) is stand_in
    if stand_in is not None and is_there:
        setattr(module, attribute, stand_in.__wrapped__)


def _place_of(form: Form) -> tuple[Any, str]:
    return importlib.import_module(f"torch.optim.{form.name}"), f"_single_tensor_{form.name}"


def _stand_in(form: Form, own: Any) -> Step:
    """What does for torch's function ``own`` whatever somebody wants."""
    names = tuple(inspect.signature(own).parameters)

    @functools.wraps(own)
    def step(*args: Any, **kwargs: Any) -> None:
        done: list[bool] = []
        user = None if torch.compiler.is_compiling() else _wanted()
        if user is not None:
            done, why = attempt(user.on_failure, _step, form, user.way, names, args, kwargs) or (
                [],
                None,
            )
            if why is not None:
                attempt(user.on_failure, user.on_rest, form.name, why)
            if any(done):
                attempt(user.on_failure, user.on_step)
        if not any(done):
            own(*args, **kwargs)
        elif not all(done):
            _leave_rest(own, args, kwargs, done)

    step.__prepare_scriptable__ = lambda: own  # type: ignore[attr-defined] # for torch.jit.script
    return step


def _wanted() -> User | None:
    """Who wants other steps of the optimizer that steps now."""
    return _stepping.get() or (_turned[-1] if _turned else None)


def _step(
    form: Form, way: Way, names: Sequence[str], args: Sequence[Any], kwargs: Mapping[str, Any]
) -> tuple[list[bool], str | None]:
    """Step what can be stepped.

    Args:
        form: the optimizer.
        way: of stepping.
        names: of the parameters of torch's function.
        args, kwargs: what that would get.

    Returns:
        Of each parameter whether it was, or nothing; and why some are left, if it can be said.
    """
    arguments: dict[str, Any] = {**dict(zip(names, args, strict=False)), **kwargs}
    if any(arguments.get(name) for name in _REFUSED):
        return [], "it is differentiable or capturable, or has complex or sparse tensors"
    if arguments.get("grad_scale") is not None or arguments.get("found_inf") is not None:
        return [], "it is given a scale of its gradients"
    options = form.options(arguments)
    if not all(isinstance(option, (int, float)) for option in options):
        return [], "an option of it is a tensor"
    if torch._C._are_functorch_transforms_active():
        return [], "it is transformed by torch.func"
    why = way.refusal(form, options)
    if why is not None:
        return [], why
    lists = _lists(form, arguments)
    numbers = {*form.scalars, "state_steps"}
    columns: list[Column] = [arguments[name] for name in lists]
    tensors = [column for name, column in zip(lists, columns, strict=True) if name not in numbers]
    singles = [column for name, column in zip(lists, columns, strict=True) if name in numbers]
    written = itertools.chain(*(arguments[name] for name in lists if name != "grads"))
    if _are_plain(tensors, singles) and arrays.share_no_memory(list(written), arguments["grads"]):
        done = [True] * len(columns[0])
    else:
        done = _eligible(tensors, singles)
        rows = list(itertools.compress(zip(*columns, strict=True), done))
        tangled = iter(arrays.find_rows_sharing_memory(rows, [name != "grads" for name in lists]))
        done = [is_done and not next(tangled) for is_done in done]
        arguments = {name: _part(value, done) for name, value in arguments.items()}
        has_no_state_yet = [any(x is None for x in row) for row in zip(*columns, strict=True)]
        if not all(map(operator.or_, done, has_no_state_yet)):
            why = _UNLIKE
    if any(done) and not way.step(form, arguments, options):
        return [], "what follows from its options is not finite"
    return done, why


def _lists(form: Form, arguments: Mapping[str, Any]) -> list[str]:
    """Names of the lists that a step goes through: parameters, gradients, state, step counters.

    An empty list stands for state that this group does not have.
    """
    has_momentum = form.name != "sgd" or bool(arguments["momentum"])
    state = [name for name in form.state if arguments[name] and has_momentum]
    return ["params", "grads", *state, *(["state_steps"] if form.counts else [])]


def _part(value: Any, is_chosen: Sequence[bool]) -> Any:
    """Of a list, what is chosen."""
    if not isinstance(value, list) or not value:
        return value
    return list(itertools.compress(value, is_chosen))


def _leave_rest(
    own: Step, args: tuple[Any, ...], kwargs: Mapping[str, Any], done: Sequence[bool]
) -> None:
    """Let torch step the parameters that could not be."""
    is_left = [not is_done for is_done in done]
    rest = list(itertools.compress(range(len(done)), is_left))
    parts = [_part(value, is_left) for value in args]
    own(*parts, **kwargs)
    for whole, chosen in zip(args, parts, strict=True):
        if chosen is not whole:
            for i, value in zip(rest, chosen, strict=True):
                whole[i] = value  # SGD makes its momentum


class OnePass:
    """All tensors of a group in one pass over memory, by ``kernels/optimizers.c``.

    Args:
        library: of that source.

    Raises:
        flatout.kernels.KernelError: it lacks a function.
    """

    def __init__(self, library: ctypes.CDLL) -> None:
        self._kernels = {form.name: getattr(library, form.name) for form in FORMS}
        for kernel in self._kernels.values():
            pointer = ctypes.c_void_p
            kernel.restype = ctypes.c_int
            kernel.argtypes = [pointer, pointer, ctypes.c_int64, pointer, ctypes.c_int]

    def refusal(self, form: Form, options: Sequence[float]) -> str | None:
        """It steps all but plain gradient descent."""
        if form.name == "sgd" and not any(options[1:]):
            return "without momentum and decay one operation of torch does it as well"
        return None

    def step(self, form: Form, arguments: Mapping[str, Any], options: Sequence[float]) -> bool:
        """By the kernel; what follows from an option that is not finite is left to torch.

        Raises:
            MemoryError: there is none left.
        """
        names = _lists(form, arguments)
        columns: list[Column] = [arguments[name] for name in names]
        places = {"params": 0, "grads": 1, "state_steps": SLOTS - 1}
        places.update({name: 2 + index for index, name in enumerate(form.state)})
        count = len(columns[0])
        addresses = array("Q", bytes(8 * SLOTS * count))
        for name, column in zip(names, columns, strict=True):
            addresses[places[name] :: SLOTS] = array("Q", map(torch.Tensor.data_ptr, column))
        sizes = array("q", map(torch.Tensor.numel, columns[0]))
        threads = torch.get_num_threads() if sum(sizes) >= SERIAL_BELOW else 1
        passed = array("d", options)
        torch.autograd.graph.increment_version(itertools.chain(columns[0], *columns[2:]))
        failed: int = self._kernels[form.name](
            addresses.buffer_info()[0],
            sizes.buffer_info()[0],
            count,
            passed.buffer_info()[0],
            threads,
        )
        if failed < 0:
            raise MemoryError
        return not failed


class Fused:
    """By torch's fused functions, which are not told to anybody: no group is flagged."""

    def __init__(self) -> None:
        functions = {
            form.name: getattr(_place_of(form)[0], f"_fused_{form.name}", None) for form in FORMS
        }
        self._functions = {name: step for name, step in functions.items() if step is not None}

    def refusal(self, form: Form, options: Sequence[float]) -> str | None:
        """It steps those that torch has such a function for."""
        if form.name not in self._functions:
            return "torch has no fused step for it"
        if form.name == "adam" and options[-1]:
            return "torch's fused step forgets what is not a number with amsgrad"
        return None

    def step(self, form: Form, arguments: Mapping[str, Any], options: Sequence[float]) -> bool:
        """By torch's function, which does not count the versions of what it writes."""
        written: list[Column] = [arguments[name] for name in _lists(form, arguments)]
        torch.autograd.graph.increment_version(itertools.chain(written[0], *written[2:]))
        self._functions[form.name](**arguments)
        return True


def _are_plain(tensors: Sequence[Column], numbers: Sequence[Column]) -> bool:
    """Whether a way may take all of them; columns at once, since this is what a step costs."""
    return (
        all(map(arrays.are_contiguous_float32, (*tensors, *numbers)))
        and _have_same_sizes(tensors)
        and all(set(map(torch.Tensor.numel, column)) == {1} for column in numbers)
    )


def _have_same_sizes(columns: Sequence[Column]) -> bool:
    sizes = list(map(torch.Tensor.numel, columns[0]))
    return all(list(map(torch.Tensor.numel, column)) == sizes for column in columns[1:])


def _eligible(tensors: Sequence[Column], numbers: Sequence[Column]) -> list[bool]:
    """Of each parameter, whether a way may take what belongs to it."""
    return [
        _alike(row) and all(arrays.is_dense_float32(x) and x.numel() == 1 for x in single)
        for row, single in itertools.zip_longest(
            zip(*tensors, strict=True), zip(*numbers, strict=True), fillvalue=()
        )
    ]


def _alike(tensors: Sequence[torch.Tensor]) -> bool:
    """Whether they may be gone through side by side; a momentum that torch makes yet is none."""
    if not all(map(arrays.is_dense_float32, tensors)):
        return False
    first, *others = tensors
    return all(x.numel() == first.numel() for x in others) and (
        all(x.is_contiguous() for x in tensors)
        or all(x.shape == first.shape and x.stride() == first.stride() for x in others)
    )
