"""Recording the inputs of the program's outermost module calls.

A proof holds for the inputs of the first calls, so these are compared with the inputs in the proof.
The sizes of the inputs of all calls show how much work a step has.
"""

from __future__ import annotations

import os
import weakref
from collections.abc import Callable
from itertools import islice
from typing import TYPE_CHECKING, Any

import torch

from flatout.agent.imported_files import imported_files, write_imported_files
from flatout.intercept.nested import tensors_in
from flatout.wire.lines import Inputs
from flatout.wire.signature import VARYING, matches, merge
from flatout.wire.turns import ELEMENTS, ROWS

if TYPE_CHECKING:
    from flatout.intercept.host import Host
    from flatout.wire.request import ProvenConditions


MOST_DESCRIBED = 1000
"""The largest number of tensors of one call that are described. Further tensors are not compared
with the proof."""

WATCHED_CALLS = 16
"""The number of module calls that are described. These are enough calls for sizes that vary from
batch to batch, and too few to reach the last batch of an epoch, which may be smaller than all
others."""


class FirstInputs:
    """A forward wrapper for the first calls of the module that is called first.

    It records the dtype and the shape of each input tensor, with a placeholder for sizes that
    differ from call to call. If the inputs of the first call differ from those of the proof, it
    undoes the settings that were proven with other inputs.

    Args:
        host: the host of this process.
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
            self._record(tuple(describe((args, kwargs))))
            write_imported_files(self._host.record)
            self._undo_unproven()
        elif self._module() is module:
            both = merge(self._seen, tuple(describe((args, kwargs))))
            if both is not None and both != self._seen:
                self._record(both)
        return call(module, *args, **kwargs)

    def _record(self, seen: tuple[str, ...]) -> None:
        self._seen = seen
        self._host.record.write(Inputs(seen))

    def _undo_unproven(self) -> None:
        """Undo the settings that were proven under other conditions, before the first call is
        made."""
        host, proof = self._host, self._host.request.proof
        why = None if proof is None else self._describe_difference(proof)
        if proof is None or why is None:
            return
        undone = [knob for knob in proof.knobs if host.applied.undo(knob)]
        for knob in undone:
            host.events.add("undone", knob, why)
            host.events.add("skipped", knob, why)

    def _describe_difference(self, proof: ProvenConditions) -> str | None:
        """Return a clause about how the inputs or the imported files differ from those of the
        proof; ``None`` if they do not differ."""
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
    """A forward wrapper that records the size of the inputs: the first dimension of the first
    tensor, and the number of elements of all tensors.

    Args:
        host: the host of this process.
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
            self._host.hooks.append_note(ROWS, shapes[0][0])
            self._host.hooks.append_note(ELEMENTS, sum(shape.numel() for shape in shapes))
        return call(module, *args, **kwargs)


def describe(value: Any) -> list[str]:
    """Return the word of ``wire.signature`` for each tensor in nested containers."""
    with torch._C.DisableTorchFunction():  # no __torch_function__ of the program is called
        return [_describe_tensor(tensor) for tensor in islice(tensors_in(value), MOST_DESCRIBED)]


def _describe_tensor(tensor: torch.Tensor) -> str:
    dtype = str(_dtype(tensor)).removeprefix("torch.")
    sizes = VARYING if _is_nested(tensor) else ",".join(map(str, _shape(tensor)))
    return f"{dtype}[{sizes}]"


_tensor: Any = torch._C.TensorBase
_shape: Callable[[torch.Tensor], torch.Size] = _tensor.shape.__get__
_dtype: Callable[[torch.Tensor], torch.dtype] = _tensor.dtype.__get__
_is_nested: Callable[[torch.Tensor], bool] = _tensor.is_nested.__get__
"""A nested tensor has no shape."""
