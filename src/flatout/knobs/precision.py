"""Lower precision of matrix products and convolutions: autocast around the outermost modules.

What it does: each outermost module call that records gradients runs under ``torch.autocast``; what
it returns comes back in float32, so losses outside the module are computed as before. Parameters,
gradients and optimizer state stay in float32.

When it helps: matrix products and convolutions dominate, and the device multiplies bfloat16 faster
than float32 (AMX, AVX512-BF16, tensor cores).

When it hurts: a probability computed inside the module (Sigmoid before ``BCELoss``) rounds to
exactly 1; small shapes, where the casts cost more than they save.

By hand: ``with torch.autocast(device_type, torch.bfloat16): output = model(input)``, and the loss
outside on ``output.float()``.

Source: https://docs.pytorch.org/docs/stable/amp.html
"""

from __future__ import annotations

import copy
import dataclasses
import traceback
import weakref
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from flatout.knobs import Facts, Knob, Match, Undo

if TYPE_CHECKING:
    from flatout.agent.session import Session

NAME = "precision"


def match(facts: Facts) -> Match:
    """Refuses only where the machine was measured to multiply bfloat16 slower than float32."""
    bf16 = facts.matmul_flops_per_s.get("bfloat16")
    float32 = facts.matmul_flops_per_s.get("float32")
    if bf16 is not None and float32 is not None and bf16 < float32:
        return Match(
            (),
            f"this machine multiplies bfloat16 matrices at {bf16 / 1e9:.3g} GFLOP/s, float32 at "
            f"{float32 / 1e9:.3g} GFLOP/s",
        )
    return Match(("bf16",))


def apply(session: Session, setting: str) -> Undo:
    """Turn autocast on around the outermost modules."""
    autocast = _Autocast(session)
    session.forward_wrappers.append(autocast)

    def undo() -> None:
        session.forward_wrappers.remove(autocast)

    return undo


class _Autocast:
    """The forward wrapper. Evaluation passes are left as they are: no proof covers them."""

    def __init__(self, session: Session) -> None:
        self._session = session
        self._devices: weakref.WeakKeyDictionary[Any, str | None] = weakref.WeakKeyDictionary()
        self._said: set[str] = set()
        self._failed = False

    def __call__(
        self,
        call: Callable[..., Any],
        module: Any,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
    ) -> Any:
        import torch

        if self._failed or not torch.is_grad_enabled():
            return call(module, *args, **kwargs)
        device = self._device(module)
        if device is None or torch.is_autocast_enabled(device):
            if device is not None:
                self._skip(module, "the program uses autocast already")
            return call(module, *args, **kwargs)
        try:
            with torch.autocast(device, torch.bfloat16):
                output = call(module, *args, **kwargs)
        except Exception as error:  # noqa: BLE001 - raised again below unless it is autocast's own
            failure = error
        else:
            return in_float32(output)
        output = call(module, *args, **kwargs)  # raises again what was the program's own error
        self._failed = True
        self._session.event(
            "failed",
            NAME,
            f"turned off, {type(module).__qualname__} does not run under autocast: "
            f"{type(failure).__name__}: {failure}",
            "".join(traceback.format_exception(failure)),
        )
        return output

    def _device(self, module: Any) -> str | None:
        """The device type to autocast on, ``None`` to leave the module alone."""
        if module not in self._devices:
            self._devices[module] = self._find_device(module)
        return self._devices[module]

    def _find_device(self, module: Any) -> str | None:
        import torch

        floating = [p for p in module.parameters() if p.is_floating_point()]
        others = {p.dtype for p in floating if p.dtype != torch.float32}
        device: str = floating[0].device.type if floating else "integers"
        if isinstance(module, torch.jit.ScriptModule):
            why = "it is a TorchScript module"
        elif others:
            names = ", ".join(sorted(str(dtype).removeprefix("torch.") for dtype in others))
            why = f"it has parameters in {names}"
        elif not floating or not torch.amp.is_autocast_available(device):
            why = f"torch has no autocast for {device}"
        else:
            return device
        self._skip(module, why)
        return None

    def _skip(self, module: Any, why: str) -> None:
        name = type(module).__qualname__
        if name + why not in self._said:
            self._said.add(name + why)
            self._session.event("skipped", NAME, f"{name} is left alone: {why}")


def in_float32(output: Any) -> Any:
    """``output`` with every bfloat16 tensor in it as float32.

    Looks into tuples, lists, dicts and dataclasses (and so into the outputs of Hugging Face
    models). A container is copied only where a tensor in it changes; others are returned as such.
    """
    import torch

    if isinstance(output, torch.Tensor):
        return output.float() if output.dtype == torch.bfloat16 else output
    if isinstance(output, (tuple, list)):
        items = [in_float32(item) for item in output]
        if all(new is old for new, old in zip(items, output, strict=True)):
            return output
        kind: Any = type(output)
        return kind(*items) if hasattr(output, "_fields") else kind(items)
    if isinstance(output, dict):
        values = {key: in_float32(value) for key, value in output.items()}
        changed = {key: value for key, value in values.items() if value is not output[key]}
        if changed:
            output = copy.copy(output)
            for key, value in changed.items():
                output[key] = value
        return output
    if dataclasses.is_dataclass(output) and not isinstance(output, type):
        fields = {f.name: getattr(output, f.name) for f in dataclasses.fields(output)}
        values = {name: in_float32(value) for name, value in fields.items()}
        if any(values[name] is not fields[name] for name in fields):
            output = copy.copy(output)
            for name, value in values.items():
                object.__setattr__(output, name, value)
        return output
    return output


KNOB = Knob(
    name=NAME,
    summary="matrix products and convolutions of the training pass in bfloat16 (autocast)",
    settings=("bf16",),
    exactness={"bf16": "reduced"},
    hot=True,
    match=match,
    apply=apply,
)
