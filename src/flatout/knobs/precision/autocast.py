"""Autocast around the outermost modules, as a forward wrapper."""

from __future__ import annotations

import traceback
import weakref
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch

from flatout import kernels
from flatout.agent.nested import mapped
from flatout.knobs.precision import packed

if TYPE_CHECKING:
    from flatout.agent.session import Session
    from flatout.knobs.precision.operators import Float32Operators
    from flatout.knobs.precision.scaling import LossScaling


class Autocast:
    """The forward wrapper. Evaluation passes of a program that trains are left as they are.

    Args:
        session: of this process.
        knob: name under which it speaks in the record.
        dtype: of matrix products and convolutions.

    """

    def __init__(self, session: Session, knob: str, dtype: torch.dtype) -> None:
        self._session = session
        self._knob = knob
        self._dtype = dtype
        self._devices: weakref.WeakKeyDictionary[Any, str | None] = weakref.WeakKeyDictionary()
        self._said: set[str] = set()
        self._trains = False

    def __call__(
        self,
        call: Callable[..., Any],
        module: Any,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
    ) -> Any:
        if torch.is_grad_enabled():
            self._see_training()
        elif self._trains or self._session.hooks.optimizer_exists:
            return call(module, *args, **kwargs)
        if self._knob in self._session.failed_knobs:
            return call(module, *args, **kwargs)
        device = self._device(module)
        if device is None or torch.is_autocast_enabled(device):
            if device is not None:
                self._under_another(module)
            return call(module, *args, **kwargs)
        with self._session.blames(self._knob):
            output = self._under(device, call, module, args, kwargs)
        return in_float32(output)

    def _under(
        self,
        device: str,
        call: Callable[..., Any],
        module: Any,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
    ) -> Any:
        """The forward pass, under autocast."""
        with torch.autocast(device, self._dtype):
            return call(module, *args, **kwargs)

    def _see_training(self) -> None:
        """A pass records gradients: those that do not are evaluation from now on."""
        self._trains = True

    def _under_another(self, module: Any) -> None:
        """The program has turned autocast on itself."""
        self._leave_alone(module, "the program uses autocast already")

    def _device(self, module: Any) -> str | None:
        """The device type to autocast on, ``None`` to leave the module alone."""
        if module not in self._devices:
            self._devices[module] = self._find_device(module)
        return self._devices[module]

    def _find_device(self, module: Any) -> str | None:
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
        self._leave_alone(module, why)
        return None

    def _leave_alone(self, module: Any, why: str) -> None:
        name = type(module).__qualname__
        if name + why not in self._said:
            self._said.add(name + why)
            self._session.event("skipped", self._knob, f"{name} is left alone: {why}")


class PackingAutocast(Autocast):
    """With packed weights in programs that only infer on the CPU, see ``packed.py``."""

    def __init__(self, session: Session, knob: str, dtype: torch.dtype) -> None:
        super().__init__(session, knob, dtype)
        self._remove: Callable[[], None] | None = None

    def _see_training(self) -> None:
        super()._see_training()
        self.close()

    def _under(
        self,
        device: str,
        call: Callable[..., Any],
        module: Any,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
    ) -> Any:
        if self._remove is None and device == "cpu" and not torch.is_grad_enabled():
            self._remove = self._install()
        return super()._under(device, call, module, args, kwargs)

    def _install(self) -> Callable[[], None]:
        if not packed.is_available():
            return lambda: None
        try:
            return packed.PackedLinear(self._has_failed).remove
        except kernels.KernelError as error:
            self._session.event("skipped", self._knob, f"weights are cast in each call: {error}")
            return lambda: None

    def _has_failed(self, error: Exception) -> None:
        why = f"weights are cast in each call: {type(error).__name__}: {error}"
        self._session.event("skipped", self._knob, why, "".join(traceback.format_exception(error)))

    def close(self) -> None:
        """Put torch's own operators back."""
        if self._remove is not None:
            self._remove()
            self._remove = None


class SafeAutocast(Autocast):
    """With operators that keep float32.

    The first pass of each module is as it would be without it, and shows which weight is the head.

    Args:
        operators: to be told of the passes.
    """

    def __init__(
        self, session: Session, knob: str, dtype: torch.dtype, operators: Float32Operators
    ) -> None:
        super().__init__(session, knob, dtype)
        self._operators = operators
        self._heads_known: weakref.WeakSet[Any] = weakref.WeakSet()

    def _under(
        self,
        device: str,
        call: Callable[..., Any],
        module: Any,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
    ) -> Any:
        if module in self._heads_known:
            return super()._under(device, call, module, args, kwargs)
        self._heads_known.add(module)
        with self._operators.finding_head() as products:
            products.output = output = call(module, *args, **kwargs)
        return output

    def _under_another(self, module: Any) -> None:
        self._operators.is_wanted = False
        super()._under_another(module)


class ScaledAutocast(Autocast):
    """With loss scaling, from the first pass on.

    Args:
        scaling: to be switched on.
    """

    def __init__(
        self, session: Session, knob: str, dtype: torch.dtype, scaling: LossScaling
    ) -> None:
        super().__init__(session, knob, dtype)
        self._scaling = scaling

    def _under(
        self,
        device: str,
        call: Callable[..., Any],
        module: Any,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
    ) -> Any:
        output = super()._under(device, call, module, args, kwargs)
        self._scaling.is_wanted = True
        return output


def in_float32(output: Any) -> Any:
    """``output`` with every bfloat16 or float16 tensor in it as float32."""

    def exact(tensor: torch.Tensor) -> torch.Tensor:
        return tensor.float() if tensor.dtype in (torch.bfloat16, torch.float16) else tensor

    return mapped(exact, output)
