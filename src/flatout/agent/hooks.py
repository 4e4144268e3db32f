"""What torch does, told to ``turns.Turns``: fetches, root forwards, backwards, optimizer steps.

Nothing here hangs on a module, an optimizer or a loader object: classes and namespaces get probes
(``probe.py``), optimizers torch's own global step hooks. ``nn.Module`` itself is never touched and
no global forward hook is used, since both take every submodule off its fast path.

Which modules are *roots* (called outermost, whatever their place in the module tree) is only known
once they are called. So every class that owns parameters or submodules is watched for a short
while, until a turn is over, and stays watched if an instance of it was called outermost.
"""

from __future__ import annotations

import functools
import sys
import threading
import time
import weakref
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from flatout.agent import probe
from flatout.agent.probe import ClassProbe, FunctionProbe
from flatout.agent.turns import BACKWARD, DATA, FORWARD, Turns

if TYPE_CHECKING:
    import torch

Call = Callable[..., Any]

clock_ns = time.perf_counter_ns

_FIRST_TURNS = 3
"""Turns after which the first search for roots ends; the first may only be a sanity check."""


class Hooks:
    """Installs and removes everything that watches torch in this process.

    Args:
        turns: where the events go.
        read_loss: turns a loss tensor into what is kept of it (called before backward).
        on_trouble: called with a subject and a reason when something cannot be watched.
        on_failure: called with a subject and the error when something of ours has failed.
    """

    def __init__(
        self,
        turns: Turns,
        read_loss: Callable[[torch.Tensor], object],
        on_trouble: Callable[[str, str], None],
        on_failure: Callable[[str, BaseException], None],
    ) -> None:
        self.forward_wrappers: list[Callable[..., Any]] = []
        self.before_optimizer_step: list[Callable[[Any], None]] = []
        self.after_optimizer_step: list[Callable[[Any], None]] = []
        self.optimizers: weakref.WeakSet[Any] = weakref.WeakSet()
        self.loaders: weakref.WeakSet[Any] = weakref.WeakSet()
        self.data_seen = False
        self.transfer_seen = False
        self.update_seen = False
        self.turns = turns
        self._read_loss = read_loss
        self._on_trouble = on_trouble
        probe.report_to(on_failure)
        self._thread: int | None = None
        self._roots: dict[int, weakref.ref[Any]] = {}
        self._watched: dict[type, ClassProbe | None] = {}
        self._root_classes: set[type] = set()
        self._searching = True
        self._turns_searched = 0
        self._updating: list[int] = []
        self._probes: list[ClassProbe | FunctionProbe] = []
        self._handles: list[Any] = []

    @property
    def roots(self) -> list[Any]:
        """The living modules that were called outermost and have parameters."""
        modules = (reference() for reference in self._roots.values())
        return [module for module in modules if module is not None]

    def install(self) -> None:
        """Start to watch. torch must be imported."""
        import torch
        from torch.nn.modules import module as nn_module
        from torch.optim import optimizer as torch_optimizer
        from torch.utils.data import dataloader

        self._backward_code = torch.autograd.backward.__code__
        self._is_grad_enabled = torch.is_grad_enabled
        self._probes = [
            ClassProbe(
                dataloader._BaseDataLoaderIter, "__next__", self._fetch_begins, self._fetch_ends
            ),
            ClassProbe(dataloader.DataLoader, "__iter__", self._iter_begins, self._fetch_ends),
            ClassProbe(torch.nn.Module, "__setstate__", self._module_restored, _nothing),
            FunctionProbe(
                torch.autograd, "_engine_run_backward", self._backward_begins, self._backward_ends
            ),
        ]
        if torch.accelerator.is_available():
            for name in ("to", "cuda"):
                self._probes.append(
                    ClassProbe(torch.Tensor, name, self._transfer_begins, self._transfer_ends)
                )
        for watching in self._probes:
            watching.install()
        self._handles = [
            nn_module.register_module_module_registration_hook(self._module_registered),
            nn_module.register_module_parameter_registration_hook(self._parameter_registered),
            torch_optimizer.register_optimizer_step_pre_hook(self._update_begins),
            torch_optimizer.register_optimizer_step_post_hook(self._update_ends),
        ]
        self._watch(torch.jit.ScriptModule)  # its instances are never registered

    def remove(self) -> None:
        """Stop to watch and leave torch as it was found."""
        for handle in self._handles:
            handle.remove()
        for watching in [*self._probes, *self._watched.values()]:
            if watching is not None:
                watching.remove()
        self._handles, self._probes, self._watched = [], [], {}

    def turn_closed(self) -> None:
        """A turn is over: end the search for roots when it has gone on long enough."""
        if not self._searching:
            return
        self._turns_searched += 1
        if self._turns_searched >= _FIRST_TURNS:
            self._searching = False
            for watched, watching in self._watched.items():
                if watching is not None and watched not in self._root_classes:
                    watching.remove()
                    self._watched[watched] = None

    def search_roots(self) -> None:
        """Look for new roots for a while: the program has begun something new."""
        self._searching = True
        self._turns_searched = _FIRST_TURNS - 1
        for watched, watching in list(self._watched.items()):
            if watching is None:
                self._watch(watched)

    def restart(self, turns: Turns) -> None:
        """In the child of a fork: begin anew."""
        self.turns = turns
        self._thread = None
        self._updating.clear()

    def finish(self) -> None:
        """The program ends: close the last turn and stop to watch."""
        self.turns.finish()
        self.remove()

    def _foreign_thread(self) -> bool:
        """Whether this is another thread than the one that trains (or infers)."""
        thread = threading.get_ident()
        if self._thread is None:
            self._thread = thread
        return thread != self._thread

    # Roots

    def _watch(self, module_class: type) -> None:
        watching = ClassProbe(module_class, "__call__", self._forward_begins, self._forward_ends)
        try:
            watching.install()
        except TypeError as error:
            self._on_trouble(f"forward of {module_class.__qualname__}", str(error))
        self._watched[module_class] = watching

    def _module_registered(self, parent: Any, name: str, child: Any) -> None:
        if type(parent) not in self._watched:
            self._new_class(type(parent))

    def _parameter_registered(self, parent: Any, name: str, parameter: Any) -> None:
        if type(parent) not in self._watched:
            self._new_class(type(parent))

    def _module_restored(self, module: Any, original: Call) -> None:
        """A module was unpickled or copied: its children were never registered."""
        if type(module) not in self._watched:
            self._new_class(type(module))

    def _new_class(self, module_class: type) -> None:
        self._watch(module_class)
        if not self._searching:
            self.search_roots()

    # Events. The ``_begins`` of probes have the signature of ``probe.BeginCall``.

    def _forward_begins(self, module: Any, original: Call) -> Call | None:
        turns = self.turns
        if turns.inside(FORWARD) or turns.inside(DATA) or turns.inside(BACKWARD):
            return None
        if self._foreign_thread():
            return None
        root = id(module)
        reference = self._roots.get(root)
        if reference is None or reference() is not module:
            if next(module.parameters(), None) is None:
                return None
            self._roots[root] = weakref.ref(module)
            self._root_classes.add(type(module))
        turns.forward_begins(clock_ns(), root, self._is_grad_enabled(), module.training)
        for wrapper in self.forward_wrappers:
            original = functools.partial(_call_wrapped, wrapper, original)
        return original

    def _forward_ends(self) -> None:
        self.turns.forward_ends(clock_ns())

    def _iter_begins(self, loader: Any, original: Call) -> Call | None:
        self.loaders.add(loader)
        if not self._searching:
            self.search_roots()
        return self._fetch_begins(loader, original)

    def _fetch_begins(self, source: Any, original: Call) -> Call | None:
        if self.turns.inside(DATA) or self._foreign_thread():
            return None
        self.data_seen = True
        self.turns.fetch_begins(clock_ns())
        return original

    def _fetch_ends(self) -> None:
        self.turns.fetch_ends(clock_ns())

    def _transfer_begins(self, tensor: Any, original: Call) -> Call | None:
        if tensor.device.type != "cpu" or self.turns.inside(DATA) or self._foreign_thread():
            return None
        self.transfer_seen = True
        self.turns.transfer_begins(clock_ns())
        return original

    def _transfer_ends(self) -> None:
        self.turns.transfer_ends(clock_ns())

    def _backward_begins(self, _: None, original: Call) -> Call | None:
        if self.turns.inside(BACKWARD) or self._foreign_thread():
            return None
        loss = None
        caller = sys._getframe(2)  # past probe.py, the function that calls the engine
        if caller.f_code is self._backward_code:
            tensors = caller.f_locals["tensors"]
            if len(tensors) == 1 and tensors[0].numel() == 1:
                loss = self._read_loss(tensors[0])
        self.turns.backward_begins(clock_ns(), loss)
        return original

    def _backward_ends(self) -> None:
        self.turns.backward_ends(clock_ns())

    def _update_begins(self, optimizer: Any, args: Any, kwargs: Any) -> None:
        if self._foreign_thread():
            return
        try:
            if id(optimizer) in self._updating:  # its last step was left by an exception
                self._updating.clear()
                self.turns.abandon()
            self._updating.append(id(optimizer))
            if not self.update_seen or optimizer not in self.optimizers:
                self.update_seen = True
                self.optimizers.add(optimizer)
            self.turns.update_begins(clock_ns())
            for callback in self.before_optimizer_step:
                callback(optimizer)
        except Exception as error:  # noqa: BLE001 - reported, or raised on
            self._contain("optimizer step", error)

    def _update_ends(self, optimizer: Any, args: Any, kwargs: Any) -> None:
        if id(optimizer) not in self._updating:
            return
        try:
            for callback in self.after_optimizer_step:
                callback(optimizer)
            self._updating.remove(id(optimizer))
            self.turns.update_ends(clock_ns(), id(optimizer))
        except Exception as error:  # noqa: BLE001 - reported, or raised on
            self._contain("optimizer step", error)

    def _contain(self, subject: str, error: Exception) -> None:
        """Report an error of ours; raise on what a signal handler of the program has raised."""
        if not probe.is_ours(error):
            raise error
        probe.report(subject, error)


def optimizer_exists() -> bool:
    """Whether an optimizer object was ever built: torch then has hooked its class's ``step``."""
    from torch.optim import Optimizer

    classes = [Optimizer]
    while classes:
        subclass = classes.pop()
        if getattr(subclass.__dict__.get("step"), "hooked", False):
            return True
        classes.extend(subclass.__subclasses__())
    return False


def _nothing() -> None:
    """The end of a call that nobody waits for."""


def _call_wrapped(
    wrapper: Callable[..., Any],
    original: Call,
    module: Any,
    *args: Any,
    **kwargs: Any,
) -> Any:
    return wrapper(original, module, args, kwargs)
