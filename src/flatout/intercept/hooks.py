"""What torch does, noted in a log: fetches, root forwards, backwards, optimizer steps.

Nothing here hangs on a module, an optimizer or a loader object: classes and namespaces get watches
(``_watch.c``), optimizers torch's own global step hooks. ``nn.Module`` itself is never touched and
no global forward hook is used, since both take every submodule off its fast path. And nothing here
keeps an object or a class of the program alive.

Which modules are *roots* (called outermost, whatever their place in the module tree) is only known
once they are called. So every class that owns parameters or submodules is watched for a short
while, until a turn is over, and stays watched if an instance of it was called outermost.
"""

from __future__ import annotations

import contextlib
import functools
import sys
import weakref
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any, Generic, Protocol, TypeVar

from flatout.intercept import _watch, objects
from flatout.intercept.capture import is_capturing, is_traced
from flatout.intercept.containment import (
    Failed,
    around,
    attempt,
    call_module,
    contained,
    without_our_frames,
)
from flatout.intercept.identity import WeakIdentitySet
from flatout.intercept.losses import abandon
from flatout.intercept.place import Undo, stand_before
from flatout.wire.turns import BACKWARD, DATA, FORWARD, NOTE, OPTIMIZER_BUILT, TRANSFER, Turns
from flatout.wire.writer import FLUSH_SECONDS

if TYPE_CHECKING:
    import torch

Call = Callable[..., Any]

_CALLS_ONLY = -1
"""The phase of a watch that notes nothing."""

_FIRST_TURNS = 3
"""Turns after which the first search for roots ends; the first may only be a sanity check."""

_LOOKS = 3
"""Times that a module without parameters is looked at anew as it is called: some make their layers
in their first call."""


BackwardWrapper = Call
"""Called around each call of the function of torch that leads into the engine of autograd
(``torch.autograd._engine_run_backward``), as ``wrapper(call, outputs, gradients, *args, **kwargs)``
in place of ``call(outputs, gradients, *args, **kwargs)``."""


class ForwardWrapper(Protocol):
    """Called around an outermost module call, in place of ``call(module, *args, **kwargs)``."""

    def __call__(self, call: Call, module: Any, args: tuple[Any, ...], kwargs: Any) -> Any: ...


C = TypeVar("C")


class Callbacks(Generic[C]):
    """An ordered set of callbacks; the watches call none while it is empty."""

    def __init__(self, changed: Callable[[], None]) -> None:
        self._callbacks: list[tuple[C, Failed | None]] = []
        self._changed = changed

    def append(self, callback: C, failed: Failed | None = None) -> Undo:
        """Add a callback behind the others: around them, if it wraps a call.

        Args:
            callback: what is called.
            failed: told when it has failed; by default, the knob that it belongs to is withdrawn.
        """
        self._callbacks.append((callback, failed))
        self._changed()
        return functools.partial(self.remove, callback)

    def remove(self, callback: C) -> None:
        """Take a callback out again, if it is there."""
        # A list of its own: a callback may take itself out while all are called.
        self._callbacks = [entry for entry in self._callbacks if entry[0] != callback]
        self._changed()

    def __iter__(self) -> Iterator[C]:
        return (callback for callback, _ in self._callbacks)

    def with_failed(self) -> list[tuple[C, Failed | None]]:
        """Each with who is told when it has failed."""
        return list(self._callbacks)

    def __contains__(self, callback: object) -> bool:
        return any(callback == other for other, _ in self._callbacks)

    def __len__(self) -> int:
        return len(self._callbacks)


class Hooks:
    """Installs and removes everything that watches torch in this process.

    Args:
        new_turns: makes what is told of the events where that is needed, knowing whether an
            optimizer exists already.
        offered: called when the log may be read, by ``read``.
        read_loss: turns a loss tensor that is not on the CPU into what is kept of it.
        on_skip: called with a subject and a reason when something cannot be watched.
        on_failure: called with a subject and the error when what watches has failed.
        on_callback_failure: called with one of the callbacks below and the error when it has
            failed; the program's call has been made, or left, without it.

    Attributes:
        turns: as far as they have been told; behind, or empty, while ``told`` is off.
        losses: those kept since the record last took them.
    """

    def __init__(
        self,
        new_turns: Callable[[bool], Turns],
        offered: Callable[[], None],
        read_loss: Callable[[torch.Tensor], object],
        on_skip: Callable[[str, str], None],
        on_failure: Callable[[str, Exception], None],
        on_callback_failure: Callable[[Any, Exception], None],
    ) -> None:
        self.turns = new_turns(False)
        self.losses: list[object] = []
        changed = self._callbacks_changed
        self.forward_wrappers: Callbacks[ForwardWrapper] = Callbacks(changed)
        self.backward_wrappers: Callbacks[BackwardWrapper] = Callbacks(self._wrap_backward)
        self._unwrap_backward: Undo | None = None
        self.before_optimizer_step: Callbacks[Callable[[Any], None]] = Callbacks(changed)
        self.after_optimizer_step: Callbacks[Callable[[Any], None]] = Callbacks(changed)
        self.optimizers: WeakIdentitySet[Any] = WeakIdentitySet()
        self.loaders: WeakIdentitySet[Any] = WeakIdentitySet()
        self.optimizer_exists = False
        self.searching = True
        self._said_capture = False
        self._turns_searched = 0
        self._new_turns = new_turns
        self._offered = offered
        self._on_skip = on_skip
        self._on_failure = on_failure
        self._on_callback_failure = on_callback_failure
        self._read_loss = read_loss
        self._called: dict[int, weakref.ref[Any]] = {}
        self._looks: dict[int, int] = {}
        self._plain_module: type | None = None
        self._module_classes: dict[int, _ModuleClass] = {}
        self._watches: list[_ClassWatch | _FunctionWatch] = []
        self._handles: list[Any] = []
        self._watch_failed = functools.partial(on_failure, "watch")
        self._wrap_forward = around(self._watch_failed, self._forward, call_module)
        self._before = contained(self._watch_failed, self._before_update)
        self._after = contained(self._watch_failed, self._after_update)
        self._log = _watch.Log()
        self._log.reset()

    @property
    def roots(self) -> list[Any]:
        """The living modules that were called outermost and have parameters."""
        are_roots = self._log.roots
        modules = (ref() for identity, ref in list(self._called.items()) if are_roots.get(identity))
        return [module for module in modules if module is not None]

    def install(self, live: bool) -> None:
        """Start to watch. torch must be imported.

        Args:
            live: tell ``turns`` of every event at once, so that what is done at a boundary is done
                between two turns.
        """
        import torch
        from torch.nn.modules import module as nn_module
        from torch.optim import optimizer as torch_optimizer
        from torch.utils.data import dataloader

        from flatout.intercept import device

        self._plain_module = torch.nn.Module
        log = self._log
        watches = functools.partial(contained, self._watch_failed)
        log.live = live
        log.told = True  # to search for roots
        log.patience_ns = round(FLUSH_SECONDS * 1e9)
        log.reader = watches(self._offered)
        log.new_root = watches(self._new_root)
        log.roots = {}
        log.is_grad_enabled = torch.is_grad_enabled
        log.tensor_type = torch.Tensor
        log.script_type = torch.jit.ScriptModule
        log.look_by(getattr(torch.Tensor, "__dlpack_c_exchange_api__", None))  # torch 2.10 or later
        log.aside = torch._C.DisableTorchFunction
        log.read_loss = contained(functools.partial(self._on_failure, "loss"), self._read_loss)
        log.losses = []
        log.strip = without_our_frames
        self._callbacks_changed()
        optimizer, loader = torch.optim.Optimizer, dataloader.DataLoader
        iterator: type = dataloader._BaseDataLoaderIter
        self._watches = [
            _ClassWatch(log, iterator, "__next__", DATA),
            _ClassWatch(log, loader, "__iter__", DATA, watches(self._loader_begins)),
            _ClassWatch(
                log, torch.nn.Module, "__setstate__", _CALLS_ONLY, watches(self._module_restored)
            ),
            _ClassWatch(log, optimizer, "__init__", _CALLS_ONLY, watches(self._optimizer_built)),
            _ClassWatch(
                log, optimizer, "__setstate__", _CALLS_ONLY, watches(self._optimizer_built)
            ),
            _FunctionWatch(log, torch.autograd, "_engine_run_backward", BACKWARD),
        ]
        if device.accelerator() is not None:
            self._watches += [
                _ClassWatch(log, torch.Tensor, name, TRANSFER) for name in ("to", "cuda")
            ]
        for watch in self._watches:
            watch.install()
        self._handles = [
            nn_module.register_module_module_registration_hook(watches(self._child_registered)),
            nn_module.register_module_parameter_registration_hook(watches(self._child_registered)),
            torch_optimizer.register_optimizer_step_pre_hook(_watch.Mark(log, False)),
            torch_optimizer.register_optimizer_step_post_hook(_watch.Mark(log, True)),
        ]
        self._watch_module(torch.jit.ScriptModule)  # its instances are never registered
        log.awake = True

    def remove(self) -> None:
        """Stop to watch and leave torch as it was found."""
        self._log.awake = False
        for handle in self._handles:
            handle.remove()
        for watch in self._watches:
            watch.remove()
        for known in list(self._module_classes.values()):
            known.watch.remove()
        self._handles, self._watches, self._module_classes = [], [], {}

    @property
    def told(self) -> bool:
        """Whether ``turns`` is told of what happens."""
        return self._log.told

    @told.setter
    def told(self, told: bool) -> None:
        if told and not self._log.told:
            self.turns = self._new_turns(self.optimizer_exists)
        self._log.told = told

    @property
    def live(self) -> bool:
        """Whether ``turns``, if it is told, is told of every event at once."""
        return self._log.live

    @live.setter
    def live(self, live: bool) -> None:
        self._log.live = live

    def restart(self) -> None:
        """In the child of a fork: begin anew."""
        self._log.reset()
        abandon((self._log.losses, self.losses))
        self._log.losses = []
        self.losses = []
        self._log.told = False
        self.told = True
        if self.optimizer_exists:
            self._log.note(NOTE, OPTIMIZER_BUILT, 0, 0)

    def note(self, which: int, value: int) -> None:
        """Add a note of the agent (see ``turns.TorchEvent``) to the events."""
        self._log.note(NOTE, which, 0, value)

    def pack(self) -> bytes:
        """The events since the last time, for the record."""
        return self._log.pack()

    def _callbacks_changed(self) -> None:
        log = self._log
        log.wrap_forward = self._wrap_forward if self.forward_wrappers else None
        log.before_update = self._before if self.before_optimizer_step else None
        log.after_update = self._after if self.after_optimizer_step else None

    def _wrap_backward(self) -> None:
        """Keep one function of ours in the place of torch's as long as it is wrapped."""
        import torch

        if not self.backward_wrappers:
            if self._unwrap_backward is not None:
                self._unwrap_backward()
            self._unwrap_backward = None
        elif self._unwrap_backward is None:
            is_in_place = [True]  # the program may put a function of its own on top of it for good
            with contextlib.ExitStack() as undo:
                function = functools.partial(self._backward, is_in_place)
                undo.callback(
                    stand_before(
                        torch.autograd, "_engine_run_backward", self._watch_failed, function
                    )
                )
                undo.callback(is_in_place.clear)
                self._unwrap_backward = undo.pop_all().close

    # Roots

    def turn_closed(self) -> None:
        """A turn of the search for roots is over; end it when it has gone on long enough."""
        self._turns_searched += 1
        if self._turns_searched >= _FIRST_TURNS:
            self.searching = False
            for known in list(self._module_classes.values()):
                if not known.has_roots:
                    known.watch.remove()

    def _search_roots(self) -> None:
        """Look for new roots for a while: the program has begun something new."""
        self.searching = True
        self.told = True
        self._turns_searched = _FIRST_TURNS - 1
        for known in list(self._module_classes.values()):
            self._install(known)

    def _watch_module(self, module_class: type) -> None:
        identity, classes = id(module_class), self._module_classes

        def forget(gone: weakref.ref[type]) -> None:
            known = classes.get(identity)
            if known is not None and known.reference is gone:
                del classes[identity]

        watch = _ClassWatch(self._log, module_class, "__call__", FORWARD)
        classes[identity] = known = _ModuleClass(weakref.ref(module_class, forget), watch)
        self._install(known)

    def _install(self, known: _ModuleClass) -> None:
        if known.is_refused:
            return
        why = known.watch.install()
        if why is not None:
            known.is_refused = True
            self._on_skip(f"forward of {known.watch.of}", why)

    def _module_class_seen(self, module_class: type) -> None:
        if module_class is self._plain_module or id(module_class) in self._module_classes:
            return  # a watch on a bare container's class would be one on every module
        fx = sys.modules.get("torch.fx.graph_module")
        if fx is not None and issubclass(module_class, fx.GraphModule):
            return  # it makes a __call__ of its own from the one its class has, once and for all
        self._watch_module(module_class)
        if not self.searching:
            self._search_roots()

    def _child_registered(self, parent: Any, name: str, child: Any) -> None:
        self._module_class_seen(type(parent))

    def _module_restored(self, module: Any) -> None:
        """A module was unpickled or copied: its children were never registered."""
        self._module_class_seen(type(module))

    def _new_root(self, module: Any) -> bool:
        identity = id(module)
        is_root = next(objects.parameters(module), None) is not None
        if identity not in self._called:
            called, looks, roots = self._called, self._looks, self._log.roots

            def forget(_: object) -> None:
                for known in (called, looks, roots):
                    known.pop(identity, None)

            called[identity] = weakref.ref(module, contained(self._watch_failed, forget))
        self._looks[identity] = self._looks.get(identity, 0) + 1
        if is_root or self._looks[identity] == _LOOKS:
            self._log.roots[identity] = is_root
        if is_root and id(type(module)) in self._module_classes:
            self._module_classes[id(type(module))].has_roots = True
        return is_root

    # Callbacks of the log

    def _optimizer_built(self, optimizer: Any) -> None:
        if not self.optimizer_exists:
            self.optimizer_exists = True
            self.note(OPTIMIZER_BUILT, 0)
        self.optimizers.add(optimizer)

    def _loader_begins(self, loader: Any) -> None:
        self.loaders.add(loader)
        if not self.searching:
            self._search_roots()

    def _forward(
        self, theirs: Call, call: Call, module: Any, args: tuple[Any, ...], kwargs: Any
    ) -> Any:
        """In the place of a ``call`` of a module, which ``theirs`` is to make."""

        def wrapped(module: Any, *args: Any, **kwargs: Any) -> Any:
            return theirs(call, module, args, kwargs)

        if is_traced():
            return wrapped(module, *args, **kwargs)
        if not is_capturing():
            for wrapper in self.forward_wrappers:
                wrapped = self._wrapped(wrapper, wrapped)
        elif not self._said_capture:
            self._said_capture = True
            why = "what is turned on does not become part of a graph that the program captures"
            self._on_skip("capture", why)
        return wrapped(module, *args, **kwargs)

    def _wrapped(self, wrapper: ForwardWrapper, call: Call) -> Call:
        def ours(theirs: Call, module: Any, *args: Any, **kwargs: Any) -> Any:
            if wrapper not in self.forward_wrappers:
                return theirs(module, *args, **kwargs)  # one further out has taken it away
            return wrapper(theirs, module, args, kwargs)

        return around(functools.partial(self._on_callback_failure, wrapper), ours, call)

    def _backward(self, is_in_place: list[bool], theirs: Call, *args: Any, **kwargs: Any) -> Any:
        """In the place of a backward call, which ``theirs`` is to make."""
        call = theirs
        if is_in_place and not is_capturing():
            for wrapper, failed in self.backward_wrappers.with_failed():
                failed = failed or functools.partial(self._on_callback_failure, wrapper)
                call = around(failed, wrapper, call)
        return call(*args, **kwargs)

    def _before_update(self, optimizer: Any) -> None:
        self._call(self.before_optimizer_step, optimizer)

    def _after_update(self, optimizer: Any) -> None:
        self._call(self.after_optimizer_step, optimizer)

    def _call(self, callbacks: Callbacks[Callable[[Any], None]], optimizer: Any) -> None:
        if not is_capturing():
            for callback in callbacks:
                failed = functools.partial(self._on_callback_failure, callback)
                attempt(failed, callback, optimizer)

    def read(self) -> None:
        """Collect the losses kept since the last time, and tell ``turns`` if it is to be told."""
        log = self._log
        losses, log.losses = log.losses, []
        self.losses += losses
        if log.told:
            self.turns.tell(log.take(), iter(losses))


_METHOD_DESCRIPTOR = 1 << 17
"""Of a type (``Py_TPFLAGS_METHOD_DESCRIPTOR``): found in a class, it is called with the instance
before the other arguments. A property or a static method is not."""


class _ClassWatch:
    """A watch in the place of the special method ``name`` of ``owner``.

    The class is known by a weak reference, and holds the watch itself, with what the watch stands
    for. It is written past a ``__setattr__`` of its metaclass.

    Attributes:
        of: the name of the class.
    """

    def __init__(
        self, log: _watch.Log, owner: type, name: str, phase: int, before: Call | None = None
    ) -> None:
        self.of = objects.qualified_name(owner)
        self._log = log
        self._owner = weakref.ref(owner)
        self._name = name
        self._phase = phase
        self._before = before
        self._watch: Callable[[], _watch.Watch | None] = lambda: None

    def install(self) -> str | None:
        """Put it there, unless it is there; returns why it cannot be, ``None`` if it can."""
        owner = self._owner()
        if owner is None:
            return None
        own = objects.namespace(owner).get(self._name)
        if own is not None and own is self._watch():
            return None
        if isinstance(own, _watch.Watch):
            own = own.own  # the namespace is a copy of that of another class
        method = own
        if own is None:
            method = objects.inherited(owner, self._name, after=True)
        if not objects.flags(type(method)) & _METHOD_DESCRIPTOR:
            return f"its {self._name} is of the type {objects.class_name(method)}"
        watch = _watch.Watch(self._log, self._phase, own, owner, self._name, self._before)
        try:
            type.__setattr__(owner, self._name, watch)
        except TypeError as error:  # immutable, or of a metaclass that is not written in Python
            return str(error)
        self._watch = weakref.ref(watch)
        return None

    def remove(self) -> None:
        """Give the class back what the watch stands for, unless something else is there now."""
        owner, watch = self._owner(), self._watch()
        if owner is None or watch is None:
            return
        there: Any = objects.namespace(owner).get(self._name)
        if there is not watch:
            return  # the program has put something else there
        if watch.own is not None:
            type.__setattr__(owner, self._name, watch.own)
        else:
            type.__delattr__(owner, self._name)


class _ModuleClass:
    """A class of modules that is watched, or was while roots were searched for.

    Args:
        reference: to the class.
        watch: on its ``__call__``.
    """

    def __init__(self, reference: weakref.ref[type], watch: _ClassWatch) -> None:
        self.reference = reference
        self.watch = watch
        self.has_roots = False
        self.is_refused = False


class _FunctionWatch:
    """A watch in the place of the function ``name`` of a module."""

    def __init__(self, log: _watch.Log, namespace: Any, name: str, phase: int) -> None:
        self._namespace = namespace
        self._name = name
        self._own = getattr(namespace, name)
        self._watch = _watch.Watch(log, phase, self._own, None, name, None)

    def install(self) -> None:
        setattr(self._namespace, self._name, self._watch)

    def remove(self) -> None:
        if getattr(self._namespace, self._name, None) is self._watch:
            setattr(self._namespace, self._name, self._own)
