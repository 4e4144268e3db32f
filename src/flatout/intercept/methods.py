"""Finding methods of modules, other than ``forward``, that compute what the loss is made of.

A policy's ``evaluate_actions`` calls some of its layers and returns tensors of which the training
loop computes the loss: it is the forward pass, although the module itself is not called. Such a
method is found when one of the layers is called outermost, by the frames around this call. It is
accepted if it returns tensors with gradients and no loss, which is a scalar.
"""

from __future__ import annotations

import inspect
import sys
import types
from collections.abc import Collection
from typing import Any, NamedTuple

from flatout.intercept import objects
from flatout.intercept.containment import is_of_flatout

_EFFECTS = frozenset(
    ("backward", "manual_backward", "step", "zero_grad", "log", "log_dict", "print", "save")
)
"""Names of what a forward pass does not call. A method whose code has one of them does more."""

_MOST_FRAMES = 20
"""The number of frames that are looked at."""

_MOST_LEAVES = 64
"""The number of values of a result that are looked at."""

_REFERENCES_OF_OUR_OWN = 3
"""The references to the variables of a frame that nobody else reads: of the frame, of the function
that reads them, and of the call that counts."""


class Method(NamedTuple):
    """A method of a module class.

    Attributes:
        owner: the class that defines it.
        name: its name.
        function: the function.
    """

    owner: type
    name: str
    function: types.FunctionType


def find_around(module: Any, refused: Collection[types.CodeType]) -> Method | None:
    """Return the outermost method of a larger module that is running and has called a module.

    Args:
        module: the module, which is being called.
        refused: the code of methods that do not count.
    """
    found = None
    frame: types.FrameType | None = sys._getframe(1)
    for _ in range(_MOST_FRAMES):
        if frame is None:
            break
        if not (is_of_flatout(frame) or frame.f_code.co_name.startswith("<")):
            around = _find_instance(frame, module)
            if around is None:
                break
            method = _find_method(type(around), frame.f_code)
            if method is not None and frame.f_code not in refused:
                found = method
        frame = frame.f_back
    return found


def _find_instance(frame: types.FrameType, module: Any) -> Any:
    """Return the module whose method runs in a frame, if it has ``module`` as a part."""
    import torch

    code = frame.f_code
    if not code.co_argcount:
        return None
    first = _read_first_argument(frame)
    if not isinstance(first, torch.nn.Module) or first is module:
        return None
    return first if any(part is module for part in objects.modules(first)) else None


def _read_first_argument(frame: types.FrameType) -> Any:
    """Return the first argument of the function that runs in a frame.

    Until Python 3.13 (PEP 667), ``f_locals`` copies the variables into a dictionary that the frame
    keeps, and so keeps what the function drops. What was copied is removed again, unless somebody
    else has the dictionary.
    """
    code, variables = frame.f_code, frame.f_locals
    first = variables.get(code.co_varnames[0])
    if sys.version_info < (3, 13) and sys.getrefcount(variables) <= _REFERENCES_OF_OUR_OWN:
        for name in (*code.co_varnames, *code.co_cellvars, *code.co_freevars):
            variables.pop(name, None)
    return first


def _find_method(module_class: type, code: types.CodeType) -> Method | None:
    for owner in objects.mro(module_class):
        function = objects.namespace(owner).get(code.co_name)
        if function is not None:
            break
    else:
        return None
    is_plain = isinstance(function, types.FunctionType) and function.__code__ is code
    if (
        not is_plain
        or code.co_name == "forward"
        or code.co_name.startswith("__")
        or function.__module__.partition(".")[0] == "torch"
        or not _EFFECTS.isdisjoint(code.co_names)
        or code.co_flags & (inspect.CO_GENERATOR | inspect.CO_COROUTINE)
    ):
        return None
    return Method(owner, code.co_name, function)


def is_forward_pass(result: Any) -> bool:
    """Return whether a result has tensors with gradients, of which none is a scalar."""
    import torch
    from torch.utils._pytree import tree_leaves

    leaves = tree_leaves(result)
    if len(leaves) > _MOST_LEAVES:
        return False
    tensors = [leaf for leaf in leaves if isinstance(leaf, torch.Tensor) and leaf.requires_grad]
    return bool(tensors) and all(tensor.dim() for tensor in tensors)
