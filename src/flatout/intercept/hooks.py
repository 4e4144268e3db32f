"""Watching torch: data fetches, outermost forward calls, backward calls and optimizer steps.

Classes and modules get watches (``_watch.c``), which note each call in a log, and optimizers get
torch's global step hooks. No attribute is set on any module, optimizer or loader object.
``nn.Module`` itself is not watched and no global forward hook is registered, because both slow down
the call of every submodule. No object and no class of the program is kept alive.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from flatout.intercept import _watch
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
"""The phase of a watch that notes no events."""


class Hooks:
    """Installs and removes everything that watches torch in this process.

    Args:
        new_turns: makes the state machine that finds the steps in the events; called with whether
            the program has built an optimizer already.
        may_read: called when the log may be read by ``read``.
        read_loss: called with a loss tensor that is not on the CPU; returns what ``losses`` keeps.
        on_skip: called with a subject and a reason when something cannot be watched.
        on_failure: called with a subject and the exception when watching has failed.
        on_callback_failure: called with a callback (see ``callbacks``) and its exception.

    Attributes:
        turns: the state machine; it gets no events while ``tracks_steps`` is off.
        losses: those read since the record last took them.
        callbacks: what is called around the program's calls.
        root_search: finds the modules that are called outermost.
        optimizers, loaders: the living ones that were built or iterated over so far.
        optimizer_exists: whether the program has built an optimizer.
    """

    def __init__(
        self,
        new_turns: Callable[[bool], Turns],
        may_read: Callable[[], None],
        read_loss: Callable[[torch.Tensor], object],
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
        self._may_read = self._contain(may_read)
        self._read_loss = contain(functools.partial(on_failure, "loss"), read_loss)
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
            live: pass every event to ``turns`` at once, so that callbacks for a closed step run
                exactly at the step boundary; else in batches.
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
        log.reader = self._may_read
        self.root_search.prepare()
        log.is_grad_enabled = torch.is_grad_enabled
        log.tensor_type = torch.Tensor
        log.script_type = torch.jit.ScriptModule
        log.set_exchange_api(
            getattr(torch.Tensor, "__dlpack_c_exchange_api__", None)
        )  # torch 2.10 or later
        log.disable_modes = torch._C.DisableTorchFunction
        log.read_loss = self._read_loss
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
        loader_begins = self._contain(self._loader_begins)
        restored = self._contain(self.root_search.module_restored)
        built = self._contain(self._optimizer_built)
        watches: list[ClassWatch | FunctionWatch] = [
            ClassWatch(log, iterator, "__next__", DATA),
            ClassWatch(log, dataloader.DataLoader, "__iter__", DATA, loader_begins),
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

        registered = self._contain(self.root_search.child_registered)
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
        """Start again in the child of a fork, without the events and losses of the parent."""
        self._log.reset()
        abandon((self._log.losses, self.losses))
        self._log.losses = []
        self.losses = []
        self._log.keeps_events = False
        self.tracks_steps = True
        if self.optimizer_exists:
            self._log.note(NOTE, OPTIMIZER_BUILT, 0, 0)

    def note(self, which: int, value: int) -> None:
        """Add a note of the agent (see ``wire.turns.TorchEvent``) to the events."""
        self._log.note(NOTE, which, 0, value)

    def pack(self) -> bytes:
        """Return the events since the last call, packed for the record."""
        return self._log.pack()

    def read(self) -> None:
        """Collect the losses read since the last call, and pass the events to ``turns`` if
        ``tracks_steps`` is on."""
        log = self._log
        losses, log.losses = log.losses, []
        self.losses += losses
        if log.keeps_events:
            self.turns.tell(log.take(), iter(losses))

    def _track_steps(self) -> None:
        self.tracks_steps = True

    def _optimizer_built(self, optimizer: Any) -> None:
        if not self.optimizer_exists:
            self.optimizer_exists = True
            self.note(OPTIMIZER_BUILT, 0)
        self.optimizers.add(optimizer)

    def _loader_begins(self, loader: Any) -> None:
        self.loaders.add(loader)
        self.root_search.resume()
