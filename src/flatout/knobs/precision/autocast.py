"""Autocast around the outermost modules, as a forward wrapper."""

from __future__ import annotations

import itertools
import sys
import traceback
from collections import deque
from collections.abc import Callable, Iterator, MutableMapping
from contextlib import AbstractContextManager, nullcontext
from types import FrameType
from typing import TYPE_CHECKING, Any

import torch
from torch.nn.modules import module as nn_module
from torch.utils.hooks import RemovableHandle

from flatout import kernels
from flatout.errors import RefusedError
from flatout.intercept import engagement, objects
from flatout.intercept.identity import WeakIdentityDict
from flatout.intercept.nested import map_tensors
from flatout.knobs.precision import packed
from flatout.knobs.precision.operators import Float32Operators, RoundedOperators
from flatout.knobs.precision.scout import HALVES, Scout

if TYPE_CHECKING:
    from flatout.intercept.host import Host
    from flatout.knobs.precision.scaling import LossScaling

SCOUTED = frozenset(8**power for power in range(12))
"""Which passes of a module, of each kind, are computed in float32 and looked at. Later ones as
well, since a program may begin to keep something later; they cost less and less."""

MOST_LOOKED_AT = 64
"""Items of a list or a dict on a module that are looked at, from the end."""

HOOKED = "it has hooks"

_WITHOUT_AUTOCAST = tuple(
    f"{torch.__path__[0]}/{part}"
    for part in (
        *("jit/_trace.py", "onnx/", "export/_trace.py", "fx/_symbolic_trace.py"),
        *("fx/experimental/proxy_tensor.py", "utils/checkpoint.py"),
    )
)
"""Files of torch. What they call is written down as a program of its own, or, if it is called
outermost, computed again in backward, where it is not seen."""


class Known:
    """What is known of a module; it holds whatever the setting, and as often as it is turned on.

    Attributes:
        passes: so far, by their kind.
        rounded: why its operators return float32, ``None`` if they need not.
        head: the identity and shape of the weight of its head.
        handles: registered so far in this process when its hooks were looked at last.
        states: namespaces of the modules in it that are not torch's own.
    """

    def __init__(self) -> None:
        self.passes: dict[Any, int] = {}
        self.rounded: str | None = None
        self.head: tuple[int, torch.Size] | None = None
        self.handles = -1
        self.states: list[MutableMapping[str, Any]] = []


_known: WeakIdentityDict[Any, Known] = WeakIdentityDict()


class Autocast:
    """The forward wrapper. Evaluation passes of a program that trains are left as they are.

    The first pass of a module is as it would be without it, and shows whether anything but
    operators of torch would meet results in half precision. If so, its operators return float32;
    otherwise what is in half precision stays so from operator to operator.

    Args:
        host: of this process.
        knob: name under which it speaks in the record.
        dtype: of matrix products and convolutions.

    """

    def __init__(self, host: Host, knob: str, dtype: torch.dtype) -> None:
        self._host = host
        self._knob = knob
        self._dtype = dtype
        self._devices: WeakIdentityDict[Any, str | None] = WeakIdentityDict()
        self._rounded: dict[str, RoundedOperators] = {}
        self._said: set[str] = set()
        self._trains = False

    def close(self) -> None:
        """Put torch's own operators back."""
        while self._rounded:
            self._rounded.popitem()[1].remove()

    def __call__(
        self,
        call: Callable[..., Any],
        module: Any,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
    ) -> Any:
        if _is_traced():
            return call(module, *args, **kwargs)
        if torch.is_grad_enabled():
            self._see_training()
        elif self._trains or self._host.hooks.optimizer_exists:
            return call(module, *args, **kwargs)
        if self._knob in self._host.applied.failures:
            return call(module, *args, **kwargs)
        device = self._device(module)
        if device is None or torch.is_autocast_enabled(device):
            if device is not None:
                self._under_another(module)
            return call(module, *args, **kwargs)
        return self._under(device, call, module, args, kwargs)

    def _under(
        self,
        device: str,
        call: Callable[..., Any],
        module: Any,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
    ) -> Any:
        """The forward pass, under autocast if that is known not to be seen."""
        known = _known.setdefault(module, Known())
        if known.rounded is None and known.handles != RemovableHandle.next_id:
            known.handles = RemovableHandle.next_id
            known.rounded = _hooks(module)
        kind = _kind(module, args, kwargs)
        passes = known.passes[kind] = known.passes.get(kind, 0) + 1
        # A head is known after the first pass; a module whose operators round has nothing to hide.
        if passes in SCOUTED and (known.rounded is None or passes == 1):
            return self._scouted(known, call, module, args, kwargs)
        self._begin(known)
        engagement.calls[self._knob] += 1
        if known.rounded is not None:
            if not self._can_round(device, module, known.rounded):
                return call(module, *args, **kwargs)
            withdraw_on_torch_error = self._host.applied.withdraw_on_torch_error(self._knob)
            with withdraw_on_torch_error, torch.autocast(device, self._dtype, cache_enabled=False):
                return call(module, *args, **kwargs)
        with (
            self._host.applied.withdraw_on_torch_error(self._knob),
            torch.autocast(device, self._dtype),
        ):
            output = call(module, *args, **kwargs)
        output = in_float32(output)
        if _widen(known.states):
            known.rounded = "it has begun to keep results of operators"
        return output

    def _begin(self, known: Known) -> None:
        """A pass of a module under autocast begins."""

    def _scouted(
        self,
        known: Known,
        call: Callable[..., Any],
        module: Any,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
    ) -> Any:
        """The forward pass as it is without autocast; what it shows is known from then on."""
        scout = Scout((args, kwargs), self._host.applied.on_failure_of(self._knob))
        with _eager(), scout:
            output = call(module, *args, **kwargs)
        if scout.weight is not None and not scout.makes_data(output):
            known.head = id(scout.weight), scout.weight.shape
        if known.rounded is None:
            known.states = list(_states(module))
            known.rounded = scout.why or scout.kept(output)
            if any(_halves_in(state) for state in known.states):
                known.rounded = "it keeps tensors in half precision itself"
        return output

    def _can_round(self, device: str, module: Any, why: str) -> bool:
        if device not in self._rounded:
            try:
                self._rounded[device] = RoundedOperators(
                    device, self._host.applied.on_failure_of(self._knob)
                )
            except RefusedError as error:
                self._leave_alone(module, f"{why}, and {error}")
                return False
        name = objects.class_name(module)
        if name + why not in self._said:
            self._said.add(name + why)
            said = f"operators of {name} return float32: {why}"
            self._host.events.add("noticed", self._knob, said)
        return self._rounded[device].is_wanted

    def _see_training(self) -> None:
        """A pass records gradients: those that do not are evaluation from now on."""
        self._trains = True

    def _under_another(self, module: Any) -> None:
        """The program has turned autocast on itself."""
        for operators in self._rounded.values():
            operators.is_wanted = False
        self._leave_alone(module, "the program uses autocast already")

    def _device(self, module: Any) -> str | None:
        """The device type to autocast on, ``None`` to leave the module alone."""
        if module not in self._devices:
            self._devices[module] = self._find_device(module)
        return self._devices[module]

    def _find_device(self, module: Any) -> str | None:
        floating = [p for p in objects.parameters(module) if p.is_floating_point()]
        others = {p.dtype for p in floating if p.dtype != torch.float32}
        device: str = floating[0].device.type if floating else "integers"
        if issubclass(type(module), torch.jit.ScriptModule):
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
        name = objects.class_name(module)
        if name + why not in self._said:
            self._said.add(name + why)
            self._host.events.add("skipped", self._knob, f"{name} is left alone: {why}")


class PackingAutocast(Autocast):
    """With packed weights in programs that only infer on the CPU, see ``packed.py``."""

    def __init__(self, host: Host, knob: str, dtype: torch.dtype) -> None:
        super().__init__(host, knob, dtype)
        self._remove: Callable[[], None] | None = None

    def _see_training(self) -> None:
        super()._see_training()
        self._let_go()

    def _begin(self, known: Known) -> None:
        super()._begin(known)
        if self._remove is None and not torch.is_grad_enabled():
            self._remove = self._install()

    def _install(self) -> Callable[[], None]:
        if not packed.is_available():
            return lambda: None
        try:
            return packed.PackedLinear(self._has_failed).remove
        except kernels.KernelError as error:
            self._host.events.add("skipped", self._knob, f"weights are cast in each call: {error}")
            return lambda: None

    def _has_failed(self, error: Exception) -> None:
        why = f"weights are cast in each call: {type(error).__name__}: {error}"
        trace = "".join(traceback.format_exception(error))
        self._host.events.add("skipped", self._knob, why, trace)

    def close(self) -> None:
        super().close()
        self._let_go()

    def _let_go(self) -> None:
        if self._remove is not None:
            self._remove()
            self._remove = None


class SafeAutocast(Autocast):
    """With operators that keep float32, and heads.

    Args:
        operators: to be told of the heads.
    """

    def __init__(
        self, host: Host, knob: str, dtype: torch.dtype, operators: Float32Operators
    ) -> None:
        super().__init__(host, knob, dtype)
        self._operators = operators

    def _begin(self, known: Known) -> None:
        super()._begin(known)
        if known.head is not None:
            self._operators.keep(known.head)

    def _under_another(self, module: Any) -> None:
        self._operators.is_wanted = False
        super()._under_another(module)

    def close(self) -> None:
        super().close()
        self._operators.remove()


class ScaledAutocast(Autocast):
    """With loss scaling, from the first pass under autocast on.

    Args:
        scaling: to be switched on.
    """

    def __init__(self, host: Host, knob: str, dtype: torch.dtype, scaling: LossScaling) -> None:
        super().__init__(host, knob, dtype)
        self._scaling = scaling

    def _begin(self, known: Known) -> None:
        super()._begin(known)
        if known.rounded == HOOKED:
            self._scaling.refuse("hooks of the program see gradients on their way")
        else:
            self._scaling.is_wanted = True


def in_float32(output: Any) -> Any:
    """``output`` with every bfloat16 or float16 tensor in it as float32, the same one for each."""
    made: dict[int, torch.Tensor] = {}

    def exact(tensor: torch.Tensor) -> torch.Tensor:
        if tensor.dtype not in HALVES:
            return tensor
        if id(tensor) not in made:
            made[id(tensor)] = tensor.float()
        return made[id(tensor)]

    return map_tensors(exact, output)


def _is_traced() -> bool:
    """Whether something writes down or transforms what the module computes."""
    if (
        torch._C._get_tracing_state() is not None
        or torch._C._are_functorch_transforms_active()
        or torch.compiler.is_compiling()
        or torch._C._current_graph_task_id() != -1
    ):
        return True
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        if frame.f_code.co_filename.startswith(_WITHOUT_AUTOCAST):
            return True
        frame = frame.f_back
    return False


def _kind(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """What a forward pass may depend on otherwise than by the values of tensors and numbers."""
    return (
        torch.is_grad_enabled(),
        objects.is_training(module),
        tuple(map(_switch, args)),
        tuple((name, _switch(value)) for name, value in kwargs.items()),
    )


def _switch(value: Any) -> Any:
    return value if type(value) is bool else objects.class_name(value)


def _eager() -> AbstractContextManager[Any]:
    """Where nothing is compiled, and what is runs operator by operator."""
    if "torch._dynamo" not in sys.modules:
        return nullcontext()  # nothing can have been compiled, and the import takes a second
    stance: AbstractContextManager[Any] = torch.compiler.set_stance("force_eager")
    return stance


def _hooks(module: Any) -> str | None:
    """Why hooks of the program would see half precision, ``None`` if there are none."""
    everywhere = (
        nn_module._global_forward_hooks,
        nn_module._global_forward_pre_hooks,
        nn_module._global_backward_hooks,
        nn_module._global_backward_pre_hooks,
    )
    own = (
        hooks
        for part in objects.modules(module)
        for hooks in (
            part._forward_hooks,
            part._forward_pre_hooks,
            part._backward_hooks,
            part._backward_pre_hooks,
        )
    )
    for hooks in itertools.chain(everywhere, own):
        for hook in hooks.values():
            if not str(getattr(hook, "__module__", "")).startswith("torch."):
                return HOOKED
    return None


def _states(module: Any) -> Iterator[MutableMapping[str, Any]]:
    """Where the modules in it that are not torch's own may keep something."""
    for part in objects.modules(module):
        if not type(part).__module__.startswith("torch."):
            yield (held := objects.attributes(part))
            yield held["_buffers"]


def _halves_in(value: Any) -> list[tuple[Any, torch.Tensor]]:
    """The tensors in half precision in a namespace, or in a list or dict in it, with their keys."""
    items: Any
    if isinstance(value, dict):
        items = itertools.islice(reversed(value.items()), MOST_LOOKED_AT)
    else:
        first = max(0, len(value) - MOST_LOOKED_AT)
        items = zip(itertools.count(first), itertools.islice(value, first, None), strict=False)
    return [(k, v) for k, v in items if isinstance(v, torch.Tensor) and v.dtype in HALVES]


def _widen(states: list[MutableMapping[str, Any]]) -> bool:
    """Put float32 where modules keep something in half precision; whether there was anything."""
    places: list[Any] = [*states]
    for state in states:
        places += [v for v in state.values() if type(v) in (dict, list, deque) and v]
    is_found = False
    for place in places:
        for key, tensor in _halves_in(place):
            place[key] = tensor.float()
            is_found = True
    return is_found
