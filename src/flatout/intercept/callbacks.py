"""Callbacks of knobs and of the agent around the calls that a step of the training loop makes."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable
from typing import Any, Generic, Protocol, TypeVar

from flatout.intercept import _watch
from flatout.intercept.capture import is_capturing, is_traced
from flatout.intercept.containment import OnFailure, attempt, call_module, contain, wrap
from flatout.intercept.patch import Undo, wrap_function

Call = Callable[..., Any]

BackwardWrapper = Call
"""Called around each call of ``torch.autograd._engine_run_backward``, which starts the autograd
engine, as ``wrapper(call, outputs, gradients, *args, **kwargs)`` in place of
``call(outputs, gradients, *args, **kwargs)``."""


class ForwardWrapper(Protocol):
    """Called around an outermost module call, in place of ``call(module, *args, **kwargs)``."""

    def __call__(self, call: Call, module: Any, args: tuple[Any, ...], kwargs: Any) -> Any: ...


OptimizerCallback = Callable[[Any], None]
"""Called with the optimizer before or after its step."""

C = TypeVar("C")


class Entry(Generic[C]):
    """A callback in a ``CallbackList``. One callback may have several entries.

    Attributes:
        callback: the callback.
        on_failure: called when the callback has failed; ``None``: the knob that the callback
            belongs to is withdrawn.
        in_inference: whether the callback is also called for calls that record no gradients.
    """

    def __init__(self, callback: C, on_failure: OnFailure | None) -> None:
        self.callback = callback
        self.on_failure = on_failure
        self.in_inference = True


class CallbackList(Generic[C]):
    """An ordered list of callbacks.

    Args:
        on_change: called whenever callbacks are added or removed.

    Attributes:
        entries: the callbacks, in the order in which they were added.
    """

    def __init__(self, on_change: Callable[[], None]) -> None:
        self.entries: tuple[Entry[C], ...] = ()
        self._on_change = on_change

    def append(self, callback: C, on_failure: OnFailure | None = None) -> Undo:
        """Add a callback after the others; a wrapper is called around the earlier ones.

        Args:
            callback: the callback.
            on_failure: called when the callback has failed; by default, the knob that the callback
                belongs to is withdrawn.

        Returns:
            The undo. It removes this entry only, even if the callback was added several times.
        """
        entry = Entry(callback, on_failure)
        self._set((*self.entries, entry))

        def undo() -> None:
            self._set(tuple(other for other in self.entries if other is not entry))

        return undo

    def leave_inference(self, callback: C) -> None:
        """From now on, do not call a callback for calls that record no gradients. Such calls may be
        as short as the callback."""
        for entry in self.entries:
            if entry.callback == callback:
                entry.in_inference = False
        self._on_change()

    def remove(self, callback: C) -> None:
        """Remove all entries of a callback."""
        self._set(tuple(entry for entry in self.entries if entry.callback != callback))

    def _set(self, entries: tuple[Entry[C], ...]) -> None:
        self.entries = entries
        self._on_change()

    def __contains__(self, callback: object) -> bool:
        return any(callback == entry.callback for entry in self.entries)

    def __len__(self) -> int:
        return len(self.entries)


class StepCallbacks:
    """Calls the callbacks around forward calls, backward calls and optimizer steps.

    If there are no callbacks, the original is called directly. No callback is called while a CUDA
    graph is captured, and no wrapper while the program is traced.

    Args:
        log: the event log that the watches write to. The watches call the functions that this class
            installs in it.
        on_skip: called with a subject and a reason when callbacks are left out.
        on_watch_failure: called with the exception when this class itself has failed.
        on_callback_failure: called with a callback and its exception when the callback has failed;
            the program gets the result of the original call.

    Attributes:
        forward_wrappers: the wrappers around outermost module calls.
        backward_wrappers: the wrappers around backward calls.
        before_optimizer_step, after_optimizer_step: the callbacks around optimizer steps.
        called: the function that the program has called outermost and that has not returned:
            ``__call__`` of a module class, or a method that is a forward pass (``methods.py``).
            ``None`` outside of such a call.
    """

    def __init__(
        self,
        log: _watch.Log,
        on_skip: Callable[[str, str], None],
        on_watch_failure: OnFailure,
        on_callback_failure: Callable[[Any, Exception], None],
    ) -> None:
        self.forward_wrappers: CallbackList[ForwardWrapper] = CallbackList(self.connect)
        self.backward_wrappers: CallbackList[BackwardWrapper] = CallbackList(self._patch_backward)
        self.before_optimizer_step: CallbackList[OptimizerCallback] = CallbackList(self.connect)
        self.after_optimizer_step: CallbackList[OptimizerCallback] = CallbackList(self.connect)
        self.called: Call | None = None
        self._log = log
        self._on_skip = on_skip
        self._on_watch_failure = on_watch_failure
        self._on_callback_failure = on_callback_failure
        self._has_reported_capture = False
        self._unpatch_backward: Undo | None = None
        self._contained_forward = wrap(on_watch_failure, self._call_forward, call_module)
        self._contained_before = contain(on_watch_failure, self._call_before_optimizer_step)
        self._contained_after = contain(on_watch_failure, self._call_after_optimizer_step)

    def connect(self) -> None:
        """Install an entry point in the log for each kind of callback that is registered, and clear
        the others."""
        log = self._log
        log.wrap_forward = self._choose_forward()
        log.wraps_inference = any(entry.in_inference for entry in self.forward_wrappers.entries)
        log.before_optimizer_step = self._contained_before if self.before_optimizer_step else None
        log.after_optimizer_step = self._contained_after if self.after_optimizer_step else None

    def _choose_forward(self) -> Call | None:
        """Return what the watches call in place of an outermost module."""
        entries = self.forward_wrappers.entries
        if len(entries) == 1:  # with fewer calls than for several, which small networks notice
            (entry,) = entries
            call_lone = functools.partial(self._call_lone, entry)
            return wrap(self._choose_on_failure(entry), call_lone, call_module)
        return self._contained_forward if entries else None

    def _call_lone(
        self,
        entry: Entry[ForwardWrapper],
        original: Call,
        call: Call,
        module: Any,
        args: tuple[Any, ...],
        kwargs: Any,
    ) -> Any:
        """Make an outermost module call with the one wrapper that there is."""
        is_left_out = not entry.in_inference and not self._log.is_grad_enabled()
        if is_left_out or is_traced() or is_capturing():
            return self._call_wrapped(original, call, module, args, kwargs)

        def wrapped(module: Any, *args: Any, **kwargs: Any) -> Any:
            return original(call, module, args, kwargs)

        self.called = call
        try:
            return entry.callback(wrapped, module, args, kwargs)
        finally:
            self.called = None  # it may hold a class that the program drops

    def _patch_backward(self) -> None:
        """Patch torch's backward function as long as there are backward wrappers."""
        import torch

        if not self.backward_wrappers:
            if self._unpatch_backward is not None:
                self._unpatch_backward()
            self._unpatch_backward = None
        elif self._unpatch_backward is None:
            # The program may keep its own wrapper around the patched function, so the patch cannot
            # be removed. `is_active` is emptied on undo; the patch then only forwards the call.
            is_active = [True]
            with contextlib.ExitStack() as undo:
                function = functools.partial(self._call_backward, is_active)
                undo.callback(
                    wrap_function(
                        torch.autograd, "_engine_run_backward", self._on_watch_failure, function
                    )
                )
                undo.callback(is_active.clear)
                self._unpatch_backward = undo.pop_all().close

    def _call_forward(
        self, original: Call, call: Call, module: Any, args: tuple[Any, ...], kwargs: Any
    ) -> Any:
        """Make an outermost module call.

        Args:
            original: ``containment.call_module``.
            call: the function that the program calls; see ``called``.
            module, args, kwargs: the arguments of the program's call.
        """
        self.called = call
        try:
            return self._call_wrapped(original, call, module, args, kwargs)
        finally:
            self.called = None  # it may hold a class that the program drops

    def _call_wrapped(
        self, original: Call, call: Call, module: Any, args: tuple[Any, ...], kwargs: Any
    ) -> Any:
        def wrapped(module: Any, *args: Any, **kwargs: Any) -> Any:
            return original(call, module, args, kwargs)

        if is_traced():
            return wrapped(module, *args, **kwargs)
        if not is_capturing():
            is_inference = not self._log.is_grad_enabled()
            for entry in self.forward_wrappers.entries:
                if entry.in_inference or not is_inference:
                    wrapped = self._wrap_forward(entry, wrapped)
        elif not self._has_reported_capture:
            self._has_reported_capture = True
            why = "no setting takes effect inside a CUDA graph that the program captures"
            self._on_skip("capture", why)
        return wrapped(module, *args, **kwargs)

    def _wrap_forward(self, entry: Entry[ForwardWrapper], call: Call) -> Call:
        def forward(original: Call, module: Any, *args: Any, **kwargs: Any) -> Any:
            if entry not in self.forward_wrappers.entries:
                return original(module, *args, **kwargs)  # an outer wrapper has just removed it
            return entry.callback(original, module, args, kwargs)

        return wrap(self._choose_on_failure(entry), forward, call)

    def _wrap_backward(self, entry: Entry[BackwardWrapper], call: Call) -> Call:
        def backward(original: Call, *args: Any, **kwargs: Any) -> Any:
            if entry not in self.backward_wrappers.entries:
                return original(*args, **kwargs)  # an outer wrapper has just removed it
            return entry.callback(original, *args, **kwargs)

        return wrap(self._choose_on_failure(entry), backward, call)

    def _choose_on_failure(self, entry: Entry[Any]) -> OnFailure:
        """Return the function to call when the callback of an entry has failed."""
        return entry.on_failure or functools.partial(self._on_callback_failure, entry.callback)

    def _call_backward(
        self, is_active: list[bool], original: Call, *args: Any, **kwargs: Any
    ) -> Any:
        """Make a backward call; ``original`` is torch's function."""
        call = original
        if is_active and not is_traced() and not is_capturing():
            for entry in self.backward_wrappers.entries:
                call = self._wrap_backward(entry, call)
        return call(*args, **kwargs)

    def _call_before_optimizer_step(self, optimizer: Any) -> None:
        self._call_each(self.before_optimizer_step, optimizer)

    def _call_after_optimizer_step(self, optimizer: Any) -> None:
        self._call_each(self.after_optimizer_step, optimizer)

    def _call_each(self, callbacks: CallbackList[OptimizerCallback], optimizer: Any) -> None:
        if not is_capturing():
            for entry in callbacks.entries:
                attempt(self._choose_on_failure(entry), entry.callback, optimizer)
