"""What goes into the program's outermost module calls.

Those of the first are part of what a proof holds for; the sizes of all tell how much work a step
is.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

from flatout.agent.nested import tensors_in
from flatout.signature import VARYING, matches
from flatout.turns import ELEMENTS, ROWS

if TYPE_CHECKING:
    from flatout.agent.session import Session


class FirstInputs:
    """A forward wrapper for one call: records the inputs, and holds them against the proof's.

    Args:
        session: of this process.
    """

    def __init__(self, session: Session) -> None:
        self._session = session

    def __call__(
        self,
        call: Callable[..., Any],
        module: Any,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
    ) -> Any:
        session = self._session
        session.forward_wrappers.remove(self)
        seen = list(described((args, kwargs)))
        session.record.write({"kind": "inputs", "tensors": seen})
        proof = session.request.proof
        if proof is None or proof.inputs is None or matches(proof.inputs, seen):
            return call(module, *args, **kwargs)
        turned_off = [knob for knob in proof.knobs if session.turn_off(knob)]
        if not turned_off:
            return call(module, *args, **kwargs)
        for knob in turned_off:
            session.event(
                "skipped",
                knob,
                f"proven with inputs {', '.join(proof.inputs)}, these are {', '.join(seen)}",
            )
        return module(*args, **kwargs)  # past the wrappers of what was turned off


class InputSizes:
    """A forward wrapper that notes how large the inputs are: the rows of the first tensor, and the
    elements of all of them.

    Args:
        session: of this process.
    """

    def __init__(self, session: Session) -> None:
        self._session = session

    def __call__(
        self,
        call: Callable[..., Any],
        module: Any,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
    ) -> Any:
        found = [t for t in tensors_in((args, kwargs)) if not t.is_nested]  # those have no shape
        shapes = [tensor.shape for tensor in found if tensor.dim()]
        if shapes:
            self._session.hooks.note(ROWS, shapes[0][0])
            self._session.hooks.note(ELEMENTS, sum(shape.numel() for shape in shapes))
        return call(module, *args, **kwargs)


def described(value: Any) -> Iterator[str]:
    """The tensors in nested containers, in the words of ``flatout.signature``."""
    for tensor in tensors_in(value):
        dtype = str(tensor.dtype).removeprefix("torch.")
        sizes = VARYING if tensor.is_nested else ",".join(map(str, tensor.shape))
        yield f"{dtype}[{sizes}]"
