"""What goes into the program's first outermost module call: part of what a proof holds for."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING, Any

import torch

from flatout.signature import matches

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


def described(value: Any) -> Iterator[str]:
    """The tensors in nested sequences and mappings, in the words of ``flatout.signature``."""
    if isinstance(value, torch.Tensor):
        dtype = str(value.dtype).removeprefix("torch.")
        yield f"{dtype}[{','.join(map(str, value.shape))}]"
    elif isinstance(value, Mapping):
        for item in value.values():
            yield from described(item)
    elif isinstance(value, (tuple, list)):
        for item in value:
            yield from described(item)
