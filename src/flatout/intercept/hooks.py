"""Watching torch: data fetches, outermost forward calls, backward calls and optimizer steps.

Watches (``_watch.c``) on classes and Python modules record each call in a log; optimizer steps are
recorded by torch's global step hooks. No attribute is set on any module, optimizer or loader
object. ``nn.Module`` itself is not watched and no global forward hook is registered, because both
slow down the call of every submodule. Objects and classes of the program are referred to weakly
only.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

from flatout.intercept import _watch, capture
from flatout.intercept.callbacks import StepCallbacks
from flatout.intercept.containment import contain, strip_frames
from flatout.intercept.identity import WeakIdentitySet
from flatout.intercept.losses import abandon
from flatout.intercept.roots import RootSearch
from flatout.intercept.watches import ClassWatch, FunctionWatch
from flatout.wire.turns import BACKWARD, DATA, NOTE, OPTIMIZER_BUILT, TRANSFER, Turns
from flatout.wire.writer import FLUSH_SECONDS

if TYPE_CHECKING:
    import torch

_NO_PHASE = -1
"""The phase of a watch that records no events."""


class Hooks:
    """Installs and removes everything that watches torch in this process.

    Args:
        new_turns: returns a new state machine that finds the steps in the events; called with
            whether the program has built an optimizer already.
        on_readable: called when ``read`` may be called.
        start_loss_copy: called with a loss tensor that is not on the CPU; the result is appended to
            ``losses``.
        on_skip: called with a subject and a reason when something cannot be watched.
        on_failure: called with a subject and the exception when watching has failed.
        on_callback_failure: called with a callback of ``callbacks`` and its exception when the
            callback has failed.

    Attributes:
        turns: the state machine; it gets no events while ``tracks_steps`` is off.
        losses: the losses read since they were last written to the record.
        callbacks: the callbacks of knobs and of the agent around the program's calls.
        root_search: finds the modules that are called outermost.
        optimizers: the optimizers that were built so far and are still alive.
        loaders: the data loaders that were iterated over so far and are still alive.
        optimizer_exists: whether the program has built an optimizer.
    """

    def __init__(
        self,
        new_turns: Callable[[bool], Turns],
        on_readable: Callable[[], None],
        start_loss_copy: Callable[[torch.Tensor], object],
        on_skip: Callable[[str, str], None],
        on_failure: Callable[[str, Exception], None],
        on_callback_failure: Callable[[Any, Exception], None],
    ) -> None:
        self.turns = new_turns(False)
        self.losses: list[object] = []
        self.optimizers: WeakIdentitySet[Any] = WeakIdentitySet()
        self.loaders: WeakIdentitySet[Any] = WeakIdentitySet()
        self.optimizer_exists = False
        self._new_turns = new_turns
        self._on_watch_failure = functools.partial(on_failure, "watch")
        self._contain = functools.partial(contain, self._on_watch_failure)
        self._on_readable = self._contain(on_readable)
        self._start_loss_copy = contain(functools.partial(on_failure, "loss"), start_loss_copy)
        self._watches: list[ClassWatch | FunctionWatch] = []
        self._handles: list[Any] = []
        self._log = _watch.Log()
        self._log.reset()
        self.callbacks = StepCallbacks(
            self._log, on_skip, self._on_watch_failure, on_callback_failure
        )
        self.root_search = RootSearch(self._log, self._track_steps, on_skip, self._on_watch_failure)

    def install(self, live: bool) -> None:
        """Start watching. torch must be imported.

        Args:
            live: whether every event is passed to ``turns`` at once, so that callbacks for a closed
                turn run exactly at the step boundary. Otherwise events are passed in batches.
        """
        self._prepare_log(live)
        self._watches = self._new_watches()
        for watch in self._watches:
            watch.install()
        self._register_torch_hooks()
        self.root_search.watch_script_modules()
        self._log.awake = True

    def _prepare_log(self, live: bool) -> None:
        import torch

        log = self._log
        log.live = live
        log.keeps_events = True  # the search for roots needs the steps
        log.read_period_ns = round(FLUSH_SECONDS * 1e9)
        log.reader = self._on_readable
        self.root_search.prepare()
        log.is_grad_enabled = torch.is_grad_enabled
        log.is_traced = capture.is_traced
        log.tensor_type = torch.Tensor
        log.script_type = torch.jit.ScriptModule
        log.set_exchange_api(
            getattr(torch.Tensor, "__dlpack_c_exchange_api__", None)
        )  # torch 2.10 or later
        log.disable_modes = torch._C.DisableTorchFunction
        log.start_loss_copy = self._start_loss_copy
        log.losses = []
        log.strip_frames = strip_frames
        self.callbacks.connect()

    def _new_watches(self) -> list[ClassWatch | FunctionWatch]:
        import torch
        from torch.utils.data import dataloader

        from flatout.intercept import device

        log = self._log
        module, optimizer = torch.nn.Module, torch.optim.Optimizer
        iterator: type = dataloader._BaseDataLoaderIter
        iterated = self._contain(self._add_loader)
        restored = self._contain(self.root_search.add_restored_module)
        built = self._contain(self._add_optimizer)
        watches: list[ClassWatch | FunctionWatch] = [
            ClassWatch(log, iterator, "__next__", DATA),
            ClassWatch(log, dataloader.DataLoader, "__iter__", DATA, iterated),
            ClassWatch(log, module, "__setstate__", _NO_PHASE, restored),
            ClassWatch(log, optimizer, "__init__", _NO_PHASE, built),
            ClassWatch(log, optimizer, "__setstate__", _NO_PHASE, built),
            FunctionWatch(log, torch.autograd, "_engine_run_backward", BACKWARD),
        ]
        if device.accelerator() is not None:
            watches += [ClassWatch(log, torch.Tensor, name, TRANSFER) for name in ("to", "cuda")]
        return watches

    def _register_torch_hooks(self) -> None:
        from torch.nn.modules import module as nn_module
        from torch.optim import optimizer as torch_optimizer

        registered = self._contain(self.root_search.add_parent)
        self._handles = [
            nn_module.register_module_module_registration_hook(registered),
            nn_module.register_module_parameter_registration_hook(registered),
            torch_optimizer.register_optimizer_step_pre_hook(_watch.StepHook(self._log, False)),
            torch_optimizer.register_optimizer_step_post_hook(_watch.StepHook(self._log, True)),
        ]

    def remove(self) -> None:
        """Stop watching, and leave torch as it was before ``install``."""
        self._log.awake = False
        for handle in self._handles:
            handle.remove()
        for watch in self._watches:
            watch.remove()
        self.root_search.remove()
        self._handles, self._watches = [], []

    @contextlib.contextmanager
    def asleep(self) -> Iterator[None]:
        """A context in which calls are not recorded: those of flatout itself."""
        before, self._log.awake = self._log.awake, False
        try:
            yield
        finally:
            self._log.awake = before

    @property
    def tracks_steps(self) -> bool:
        """Whether events are passed to ``turns``; if not, only the record gets them."""
        return self._log.keeps_events

    @tracks_steps.setter
    def tracks_steps(self, tracks_steps: bool) -> None:
        if tracks_steps and not self._log.keeps_events:
            self.turns = self._new_turns(self.optimizer_exists)
        self._log.keeps_events = tracks_steps

    @property
    def live(self) -> bool:
        """Whether each event is passed to ``turns`` at once, while ``tracks_steps`` is on."""
        return self._log.live

    @live.setter
    def live(self, live: bool) -> None:
        self._log.live = live

    def restart(self) -> None:
        """Discard the events and losses of the parent, in the child of a fork."""
        self._log.reset()
        abandon((self._log.losses, self.losses))
        self._log.losses = []
        self.losses = []
        self._log.keeps_events = False
        self.tracks_steps = True
        if self.optimizer_exists:
            self._log.append(NOTE, OPTIMIZER_BUILT, 0, 0)

    def append_note(self, which: int, value: int) -> None:
        """Append an event of the kind ``NOTE`` (see ``wire.turns.TorchEvent``).

        Args:
            which: the note, such as ``turns.ARM``.
            value: the value of the note.
        """
        self._log.append(NOTE, which, 0, value)

    def take_packed(self) -> bytes:
        """Return the events since the last call, packed for the record."""
        return self._log.take_packed()

    def read(self) -> None:
        """Collect the losses read since the last call, and pass the events to ``turns`` if
        ``tracks_steps`` is on."""
        log = self._log
        losses, log.losses = log.losses, []
        self.losses += losses
        if log.keeps_events:
            self.turns.tell(log.take_events(), iter(losses))

    def _track_steps(self) -> None:
        self.tracks_steps = True

    def _add_optimizer(self, optimizer: Any) -> None:
        if not self.optimizer_exists:
            self.optimizer_exists = True
            self.append_note(OPTIMIZER_BUILT, 0)
        self.optimizers.add(optimizer)

    def _add_loader(self, loader: Any) -> None:
        self.loaders.add(loader)
        self.root_search.resume()
