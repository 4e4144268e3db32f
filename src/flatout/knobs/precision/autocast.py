"""Forward wrappers that run the outermost modules under autocast."""

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
from torch.utils._pytree import tree_map
from torch.utils.hooks import RemovableHandle

from flatout import kernels
from flatout.errors import RefusedError
from flatout.intercept import handled_calls, objects
from flatout.intercept.containment import attempt
from flatout.intercept.identity import WeakIdentityDict
from flatout.intercept.nested import map_tensors
from flatout.knobs.precision import packed
from flatout.knobs.precision.operators import Float32Operators, RoundedOperators
from flatout.knobs.precision.scout import HALVES, Scout

if TYPE_CHECKING:
    from flatout.intercept.host import Host
    from flatout.knobs.precision.scaling import LossScaling

SCOUTED = frozenset(8**power for power in range(12))
"""The passes of a module, counted for each kind of pass, that run in float32 and are inspected.
Later passes are inspected as well, because a program may begin to keep tensors later; they are ever
rarer, so they cost less and less."""

MOST_INSPECTED = 64
"""Number of items of a list or dict of a module that are inspected, from the end."""

HOOKED = "it has hooks"

_WITHOUT_AUTOCAST = tuple(
    f"{torch.__path__[0]}/{part}"
    for part in (
        *("jit/_trace.py", "onnx/", "export/_trace.py", "fx/_symbolic_trace.py"),
        *("fx/experimental/proxy_tensor.py", "utils/checkpoint.py"),
    )
)
"""Files of torch whose callees are left alone: they are traced or exported, or, under an outermost
activation checkpoint, recomputed in backward, where the wrapper is not called."""


class Inspected:
    """What inspected passes have shown about a module, for all settings of the knob.

    Attributes:
        passes: how many passes there were, by their kind.
        float32_reason: why its operators must return float32, ``None`` if they need not.
        head: the identity and shape of the weight of its last matmul or convolution.
        hook_count: how many hooks had been registered in this process when its hooks were last
            inspected.
        states: the namespaces of its submodules that are not torch's own.
    """

    def __init__(self) -> None:
        self.passes: dict[Any, int] = {}
        self.float32_reason: str | None = None
        self.head: tuple[int, torch.Size] | None = None
        self.hook_count = -1
        self.states: list[MutableMapping[str, Any]] = []


_inspected: WeakIdentityDict[Any, Inspected] = WeakIdentityDict()


class Autocast:
    """The forward wrapper; it leaves evaluation passes of a program that trains alone.

    The first pass of a module runs without autocast and shows whether anything other than torch's
    operators would see half-precision tensors. If so, the module's operators return float32;
    otherwise half-precision tensors are passed from operator to operator.

    Args:
        host: the process that is tuned.
        knob: the name of the knob, for the record.
        dtype: the dtype of matmuls and convolutions.
    """

    def __init__(self, host: Host, knob: str, dtype: torch.dtype) -> None:
        self._host = host
        self._knob = knob
        self._dtype = dtype
        self._devices: WeakIdentityDict[Any, str | None] = WeakIdentityDict()
        self._rounded: dict[str, RoundedOperators] = {}
        self._reported: set[str] = set()
        self._trains = False

    def close(self) -> None:
        """Put torch's operators back."""
        while self._rounded:
            self._rounded.popitem()[1].remove()

    def __call__(
        self,
        call: Callable[..., Any],
        module: Any,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
    ) -> Any:
        if not torch.is_grad_enabled() and (self._trains or self._host.hooks.optimizer_exists):
            self._host.forward_wrappers.leave_inference(self)
            return call(module, *args, **kwargs)
        if _is_traced():
            return call(module, *args, **kwargs)
        if torch.is_grad_enabled():
            self._note_training()
        if self._knob in self._host.applied.failures:
            return call(module, *args, **kwargs)
        device = self._device(module)
        if device is None or torch.is_autocast_enabled(device):
            if device is not None:
                self._note_programs_autocast(module)
            return call(module, *args, **kwargs)
        return self._run(device, call, module, args, kwargs)

    def _run(
        self,
        device: str,
        call: Callable[..., Any],
        module: Any,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
    ) -> Any:
        """Run a forward pass under autocast, or without it if the pass is to be inspected."""
        inspected = _inspected.setdefault(module, Inspected())
        if inspected.float32_reason is None and inspected.hook_count != RemovableHandle.next_id:
            inspected.hook_count = RemovableHandle.next_id
            inspected.float32_reason = _find_hooks(module)
        kind = _kind(module, args, kwargs)
        passes = inspected.passes[kind] = inspected.passes.get(kind, 0) + 1
        # The first pass is needed to find the head. Later ones would show nothing new about a
        # module whose operators return float32 already.
        if passes in SCOUTED and (inspected.float32_reason is None or passes == 1):
            return self._inspect(inspected, call, module, args, kwargs)
        self._before_autocast(inspected)
        handled_calls.counts[self._knob] += 1
        if inspected.float32_reason is not None:
            if not self._can_return_float32(device, module, inspected.float32_reason):
                return call(module, *args, **kwargs)
            blames = self._host.applied.withdraw_on_torch_error(self._knob)
            with blames, torch.autocast(device, self._dtype, cache_enabled=False):
                return call(module, *args, **kwargs)
        on_failure = self._host.applied.on_failure_of(self._knob)
        with (
            self._host.applied.withdraw_on_torch_error(self._knob),
            torch.autocast(device, self._dtype),
        ):
            output = call(module, *args, **kwargs)
        # The program must not see half precision in any case: where our walk over the output fails,
        # torch's own does it, which knows the usual containers.
        cast = attempt(on_failure, lambda: (in_float32(output),))
        if cast is not None:
            (output,) = cast
        else:
            output = tree_map(
                lambda x: x.float() if isinstance(x, torch.Tensor) and x.dtype in HALVES else x,
                output,
            )
        if attempt(on_failure, _cast_kept_tensors, inspected.states):
            inspected.float32_reason = "it has begun to keep results of operators"
        return output

    def _before_autocast(self, inspected: Inspected) -> None:
        """Called before each pass of a module under autocast."""

    def _inspect(
        self,
        inspected: Inspected,
        call: Callable[..., Any],
        module: Any,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
    ) -> Any:
        """Run a forward pass without autocast, and note what it shows about the module."""
        scout = Scout((args, kwargs), self._host.applied.on_failure_of(self._knob))
        with _eager(), scout:
            output = call(module, *args, **kwargs)
        if scout.weight is not None and not scout.returned_tanh(output):
            inspected.head = id(scout.weight), scout.weight.shape
        if inspected.float32_reason is None:
            inspected.states = list(_find_states(module))
            inspected.float32_reason = scout.why or scout.find_kept(output)
            if any(_find_halves(state) for state in inspected.states):
                inspected.float32_reason = "it keeps tensors in half precision itself"
        return output

    def _can_return_float32(self, device: str, module: Any, why: str) -> bool:
        """Replace the operators of a device type by ones that return float32; whether they act."""
        if device not in self._rounded:
            try:
                self._rounded[device] = RoundedOperators(
                    device, self._host.applied.on_failure_of(self._knob)
                )
            except RefusedError as error:
                self._leave_alone(module, f"{why}, and {error}")
                return False
        name = objects.class_name(module)
        if name + why not in self._reported:
            self._reported.add(name + why)
            message = f"operators of {name} return float32: {why}"
            self._host.events.add("noticed", self._knob, message)
        return self._rounded[device].is_active

    def _note_training(self) -> None:
        """Note that a pass records gradients; passes that do not are evaluation from now on."""
        self._trains = True

    def _note_programs_autocast(self, module: Any) -> None:
        """Note that the program itself has entered autocast, and stop changing its operators."""
        for operators in self._rounded.values():
            operators.is_active = False
        self._leave_alone(module, "the program uses autocast already")

    def _device(self, module: Any) -> str | None:
        """The device type on which a module runs under autocast, ``None`` to leave it alone."""
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
        if name + why not in self._reported:
            self._reported.add(name + why)
            self._host.events.add("skipped", self._knob, f"{name} is left alone: {why}")


class PackingAutocast(Autocast):
    """Autocast with packed weights in programs that only infer on the CPU; see ``packed.py``."""

    def __init__(self, host: Host, knob: str, dtype: torch.dtype) -> None:
        super().__init__(host, knob, dtype)
        self._uninstall: Callable[[], None] | None = None

    def _note_training(self) -> None:
        super()._note_training()
        self._release_weights()

    def _before_autocast(self, inspected: Inspected) -> None:
        super()._before_autocast(inspected)
        if self._uninstall is None and not torch.is_grad_enabled():
            self._uninstall = self._install()

    def _install(self) -> Callable[[], None]:
        if not packed.is_available():
            return lambda: None
        try:
            return packed.PackedLinear(self._report_failure).remove
        except kernels.KernelError as error:
            self._host.events.add("skipped", self._knob, f"weights are cast in each call: {error}")
            return lambda: None

    def _report_failure(self, error: Exception) -> None:
        why = f"weights are cast in each call: {type(error).__name__}: {error}"
        trace = "".join(traceback.format_exception(error))
        self._host.events.add("skipped", self._knob, why, trace)

    def close(self) -> None:
        super().close()
        self._release_weights()

    def _release_weights(self) -> None:
        if self._uninstall is not None:
            self._uninstall()
            self._uninstall = None


class SafeAutocast(Autocast):
    """Autocast with operators and heads that run in float32.

    Args:
        operators: the replaced operators; they are given the heads.
    """

    def __init__(
        self, host: Host, knob: str, dtype: torch.dtype, operators: Float32Operators
    ) -> None:
        super().__init__(host, knob, dtype)
        self._operators = operators

    def _before_autocast(self, inspected: Inspected) -> None:
        super()._before_autocast(inspected)
        if inspected.head is not None:
            self._operators.add_head(inspected.head)

    def _note_programs_autocast(self, module: Any) -> None:
        self._operators.is_active = False
        super()._note_programs_autocast(module)

    def close(self) -> None:
        super().close()
        self._operators.remove()


class ScaledAutocast(Autocast):
    """Autocast with loss scaling, from the first pass under autocast on.

    Args:
        scaling: the loss scaling; it is switched on by the first such pass.
    """

    def __init__(self, host: Host, knob: str, dtype: torch.dtype, scaling: LossScaling) -> None:
        super().__init__(host, knob, dtype)
        self._scaling = scaling

    def _before_autocast(self, inspected: Inspected) -> None:
        super()._before_autocast(inspected)
        if inspected.float32_reason == HOOKED:
            self._scaling.refuse("hooks of the program see scaled gradients inside the graph")
        else:
            self._scaling.is_wanted = True


def in_float32(output: Any) -> Any:
    """Cast every bfloat16 or float16 tensor in ``output`` to float32, each distinct tensor once."""
    casts: dict[int, torch.Tensor] = {}

    def cast(tensor: torch.Tensor) -> torch.Tensor:
        if tensor.dtype not in HALVES:
            return tensor
        if id(tensor) not in casts:
            casts[id(tensor)] = tensor.float()
        return casts[id(tensor)]

    return map_tensors(cast, output)


def _is_traced() -> bool:
    """Whether the module's computation is being traced, exported, transformed or recomputed."""
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
    """What decides which code a forward pass runs: modes, booleans, and the types of arguments."""
    return (
        torch.is_grad_enabled(),
        objects.is_training(module),
        tuple(map(_bool_or_type, args)),
        tuple((name, _bool_or_type(value)) for name, value in kwargs.items()),
    )


def _bool_or_type(value: Any) -> Any:
    return value if type(value) is bool else objects.class_name(value)


def _eager() -> AbstractContextManager[Any]:
    """A context in which compiled modules run eagerly, operator by operator."""
    if "torch._dynamo" not in sys.modules:
        return nullcontext()  # nothing has been compiled, and importing dynamo takes a second
    stance: AbstractContextManager[Any] = torch.compiler.set_stance("force_eager")
    return stance


def _find_hooks(module: Any) -> str | None:
    """``HOOKED`` if hooks of the program would see half-precision tensors, else ``None``."""
    global_hooks = (
        nn_module._global_forward_hooks,
        nn_module._global_forward_pre_hooks,
        nn_module._global_backward_hooks,
        nn_module._global_backward_pre_hooks,
    )
    module_hooks = (
        hooks
        for submodule in objects.modules(module)
        for hooks in (
            submodule._forward_hooks,
            submodule._forward_pre_hooks,
            submodule._backward_hooks,
            submodule._backward_pre_hooks,
        )
    )
    for hooks in itertools.chain(global_hooks, module_hooks):
        for hook in hooks.values():
            if not str(getattr(hook, "__module__", "")).startswith("torch."):
                return HOOKED
    return None


def _find_states(module: Any) -> Iterator[MutableMapping[str, Any]]:
    """The attributes and buffers of each submodule that is not torch's own."""
    for submodule in objects.modules(module):
        if not type(submodule).__module__.startswith("torch."):
            yield (attributes := objects.attributes(submodule))
            yield attributes["_buffers"]


def _find_halves(value: Any) -> list[tuple[Any, torch.Tensor]]:
    """The half-precision tensors in a dict or list, with their keys or indices."""
    items: Any
    if isinstance(value, dict):
        items = itertools.islice(reversed(value.items()), MOST_INSPECTED)
    else:
        first = max(0, len(value) - MOST_INSPECTED)
        items = zip(itertools.count(first), itertools.islice(value, first, None), strict=False)
    return [(k, v) for k, v in items if isinstance(v, torch.Tensor) and v.dtype in HALVES]


def _cast_kept_tensors(states: list[MutableMapping[str, Any]]) -> bool:
    """Cast half-precision tensors that modules keep to float32; returns whether there were any."""
    containers: list[Any] = [*states]
    for state in states:
        containers += [v for v in state.values() if type(v) in (dict, list, deque) and v]
    is_found = False
    for container in containers:
        for key, tensor in _find_halves(container):
            container[key] = tensor.float()
            is_found = True
    return is_found
