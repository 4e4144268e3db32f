"""What goes into the program's outermost module calls.

Those of the first are part of what a proof holds for; the sizes of all tell how much work a step
is.
"""

from __future__ import annotations

import os
import weakref
from collections.abc import Callable
from itertools import islice
from typing import TYPE_CHECKING, Any

import torch

from flatout.agent.modules import imported_files, write_modules
from flatout.intercept.nested import tensors_in
from flatout.wire.lines import Inputs
from flatout.wire.signature import VARYING, matches, merged
from flatout.wire.turns import ELEMENTS, ROWS

if TYPE_CHECKING:
    from flatout.intercept.host import Host
    from flatout.wire.request import Proof


MOST_DESCRIBED = 1000
"""Tensors of one call; what a program passes beyond them is not held against a proof."""

WATCHED_CALLS = 16
"""Calls of all modules that are looked at. In so many, sizes that differ from batch to batch show;
few enough to end before an epoch does, whose last batch may be smaller than all others."""


class FirstInputs:
    """A forward wrapper for the first calls of the module that is called first.

    It records what goes in, as one word for each tensor, in which sizes that differ from call to
    call are open. What goes into the first call is held against the proof's.

    Args:
        host: of this process.
    """

    def __init__(self, host: Host) -> None:
        self._host = host
        self._module: weakref.ref[Any] | None = None
        self._seen: tuple[str, ...] = ()
        self._calls = 0

    def __call__(
        self,
        call: Callable[..., Any],
        module: Any,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
    ) -> Any:
        self._calls += 1
        if self._calls == WATCHED_CALLS:
            self._host.forward_wrappers.remove(self)
        if self._module is None:
            self._module = weakref.ref(module)
            self._record(tuple(described((args, kwargs))))
            write_modules(self._host.record)
            self._turn_off()
        elif self._module() is module:
            both = merged(self._seen, tuple(described((args, kwargs))))
            if both is not None and both != self._seen:
                self._record(both)
        return call(module, *args, **kwargs)

    def _record(self, seen: tuple[str, ...]) -> None:
        self._seen = seen
        self._host.record.write(Inputs(seen))

    def _turn_off(self) -> None:
        """Turn off what was proven otherwise, for this call already."""
        host, proof = self._host, self._host.request.proof
        why = None if proof is None else self._difference(proof)
        if proof is None or why is None:
            return
        turned_off = [knob for knob in proof.knobs if host.applied.undo(knob)]
        for knob in turned_off:
            host.events.add("skipped", knob, why)

    def _difference(self, proof: Proof) -> str | None:
        """What shows only now: other inputs, or modules that the proof has not seen."""
        if proof.inputs is not None and not matches(proof.inputs, self._seen):
            return (
                f"proven with inputs {', '.join(proof.inputs)}, these are {', '.join(self._seen)}"
            )
        if proof.files is not None:
            new = [path for path in imported_files() if path not in proof.files]
            if new:
                more = f" and {len(new) - 1} more" * (len(new) > 1)
                return f"proven without {os.path.basename(new[0])}{more}, which is imported now"
        return None


class InputSizes:
    """A forward wrapper that notes how large the inputs are: the rows of the first tensor, and the
    elements of all of them.

    Args:
        host: of this process.
    """

    def __init__(self, host: Host) -> None:
        self._host = host

    def __call__(
        self,
        call: Callable[..., Any],
        module: Any,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
    ) -> Any:
        with torch._C.DisableTorchFunction():
            found = [t for t in tensors_in((args, kwargs)) if not _is_nested(t)]
            shapes = [shape for tensor in found if (shape := _shape(tensor))]
        if shapes:
            self._host.hooks.note(ROWS, shapes[0][0])
            self._host.hooks.note(ELEMENTS, sum(shape.numel() for shape in shapes))
        return call(module, *args, **kwargs)


def described(value: Any) -> list[str]:
    """The tensors in nested containers, in the words of ``flatout.signature``."""
    with torch._C.DisableTorchFunction():  # the program's subclasses and modes are not asked
        return [_word(tensor) for tensor in islice(tensors_in(value), MOST_DESCRIBED)]


def _word(tensor: torch.Tensor) -> str:
    dtype = str(_dtype(tensor)).removeprefix("torch.")
    sizes = VARYING if _is_nested(tensor) else ",".join(map(str, _shape(tensor)))
    return f"{dtype}[{sizes}]"


_tensor: Any = torch._C.TensorBase
_shape: Callable[[torch.Tensor], torch.Size] = _tensor.shape.__get__
_dtype: Callable[[torch.Tensor], torch.dtype] = _tensor.dtype.__get__
_is_nested: Callable[[torch.Tensor], bool] = _tensor.is_nested.__get__
"""A nested tensor has no shape."""
