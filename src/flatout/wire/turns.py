"""Grouping timed events into turns.

A *turn* is an iteration of the training loop, or a forward pass that no backward call follows.
Where gradients accumulate over micro-batches, each micro-batch is a turn, and the last one of a
cycle has the optimizer step. The state machine in this file is pure: it has no torch and no clock
of its own, and gets the events that ``intercept/_watch.c`` records. The reader of a record passes
all events to it (``wire/record.py``); the agent does so while something is to be done at the
boundary between two turns. The machine answers three questions about any loop, without the user's
help:

*Where does a turn begin?*  It begins at the first loader fetch after an optimizer step. Without a
loader, it begins at the end of the step of the optimizer that closes the cycle (the second
optimizer of a GAN). Without an optimizer object, it begins at the first forward call after a
backward call. A forward pass that no backward call follows (the model is in evaluation mode, or
gradients are off) is a turn of another kind, so that evaluation is kept apart from training.

*Which backward calls are those of micro-batches?*  Those before an optimizer step, if as many
batches (or half as many, ...) have come from one loader; without a loader, if there are at least
``CERTAIN_PASSES`` of them, one for each call of the only module. Other backward calls before an
optimizer step are those of different losses, such as the two of a GAN's discriminator, and belong
to one turn. After the first such cycle, a turn also begins at the fetch of the next micro-batch, or
at its forward call if several batches were fetched together or none.

*What did the program do during a turn?*  Times are exclusive: inside an optimizer's closure,
forward and backward calls count as forward and backward. The gap between the last forward call and
backward counts as loss. A gap between two forward calls counts as forward (functional operations
between two modules). Any other gap counts as other Python code.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

PHASES = ("data", "transfer", "forward", "loss", "backward", "optimizer", "other")
DATA, TRANSFER, FORWARD, LOSS, BACKWARD, OPTIMIZER, OTHER = range(len(PHASES))

BEGIN, END, USAGE, NOTE = range(4)
"""The kinds of events: a phase begins, a phase ends, the resource usage of the process, a note of
the agent."""

OPTIMIZER_BUILT, ARM, MARK, ROWS, ELEMENTS, PAUSE = range(6)
"""The notes of the agent: an optimizer object exists; turns that close from here on belong to an
arm, and to a new block of it; turns that close from here on have a mark; the rows and the elements
of the inputs of an outermost module call; the agent has held up the program for some ns."""

MARKS = (None, "switched", "profiled", "first")
"""The marks of steps whose time is not a usual one: steps after a switch of settings or a wait,
profiled steps, and the first steps of an arm or a run."""

TorchEvent = tuple[int, int, int, int, int, int]
"""An event: its kind; its phase or note; its flags; three values.

At the beginning of a forward call, the flags are 1 (gradients are recorded) and 2 (the module is in
training mode). At the beginning of a backward call, the flag is 1 (the loss was recorded). At the
end of a fetch, the flag is 1 if it raised an exception, as it does when the loader is exhausted.
The values of a phase are the time in ns and the id of the loader, module or optimizer. The values
of ``USAGE`` are minor page faults, major page faults, and the peak resident set in bytes. The value
of a note is a number: for ``ARM`` its number or -1 (no arm), for ``MARK`` an index into
``MARKS``."""

CYCLE_LIMIT = 32
"""The number of optimizer steps after which a turn is closed in any case.

If one batch is reused for more optimizer steps than this (PPO epochs), each further optimizer step
closes a turn of its own. A longer cycle of several optimizers counts as separate stages of
training.
"""

CERTAIN_PASSES = 4
"""The number of equal forward and backward passes before an optimizer step that are micro-batches
where no loader shows it. Fewer can be the losses of a GAN, or an adversarial example."""


class Turn:
    """A closed turn.

    Attributes:
        kind: ``"step"`` (with a backward call or an optimizer step) or ``"evaluation"``.
        index: the number of turns of this kind before this one.
        start_ns, end_ns: the beginning and the end, as ``time.perf_counter_ns`` readings.
        phases_ns: the exclusive times in the order of ``PHASES``; their sum is the duration.
        losses: the losses that ``backward_begins`` got, in order.
        forwards, backwards, updates: the number of outermost module calls, of backward calls and of
            optimizer steps.
        fetched: whether a loader was asked for a batch.
        grad: whether autograd recorded any forward call of the turn.
        arm, mark: the arm and the mark that were set when the turn closed.
        block: the number of times that an arm was set before the turn closed.
        minor_faults, major_faults: the page faults of the process per turn, averaged over the turns
            since the previous ``USAGE`` event (not every short turn has one). ``None``: there was
            no such event in this turn, or none before it.
        peak_rss_bytes: the peak resident set of the process in the last ``USAGE`` event.
        roots: the ids of the modules that were called outermost.
        rows, elements: the sums over the inputs of the outermost module calls; ``None``: not
            recorded.
    """

    __slots__ = (
        "arm",
        "backwards",
        "block",
        "elements",
        "end_ns",
        "fetched",
        "forwards",
        "grad",
        "index",
        "kind",
        "losses",
        "major_faults",
        "mark",
        "minor_faults",
        "peak_rss_bytes",
        "phases_ns",
        "roots",
        "rows",
        "start_ns",
        "updates",
    )

    def __init__(self, start_ns: int) -> None:
        self.kind = "step"
        self.index = 0
        self.start_ns = start_ns
        self.end_ns = start_ns
        self.phases_ns = [0] * len(PHASES)
        self.losses: list[object] = []
        self.forwards = 0
        self.backwards = 0
        self.updates = 0
        self.fetched = False
        self.grad = False
        self.arm: int | None = None
        self.block = 0
        self.mark: str | None = None
        self.minor_faults: float | None = None
        self.major_faults: float | None = None
        self.peak_rss_bytes: int | None = None
        self.roots: frozenset[int] = frozenset()
        self.rows: int | None = None
        self.elements: int | None = None


@dataclass(frozen=True)
class _Accumulation:
    """How gradients accumulate over micro-batches.

    Attributes:
        backwards: the number of backward calls of a micro-batch.
        by_loader: whether the micro-batches are those of a loader.
    """

    backwards: int
    by_loader: bool

    def has_next_batch(self, cycle: _Cycle) -> bool:
        """Whether a forward call after a backward call begins the next micro-batch: its batch was
        fetched together with the one before, or no batches are fetched."""
        batches = max(cycle.batches.values(), default=0)
        if not self.by_loader:
            return batches == 0
        return batches * self.backwards > cycle.backwards


class _Cycle:
    """What happened since the last optimizer step, outside of optimizer steps and evaluation.

    Attributes:
        batches: the number of batches from each loader.
        forwards, roots: the number of outermost module calls that autograd recorded, and the ids of
            these modules.
        backwards: the number of backward calls.
    """

    __slots__ = ("backwards", "batches", "forwards", "roots")

    def __init__(self) -> None:
        self.batches: dict[int, int] = {}
        self.forwards = 0
        self.roots: set[int] = set()
        self.backwards = 0

    def accumulation(self) -> _Accumulation | None:
        """How gradients have accumulated in this cycle; ``None``: they have not, or it is not
        certain."""
        batches = max(self.batches.values(), default=0)
        if batches >= 2 and self.backwards and self.backwards % batches == 0:
            return _Accumulation(self.backwards // batches, by_loader=True)
        is_alike = self.backwards == self.forwards and len(self.roots) == 1
        if batches == 0 and self.backwards >= CERTAIN_PASSES and is_alike:
            return _Accumulation(1, by_loader=False)
        return None


class Turns:
    """The state machine. All times are ``time.perf_counter_ns`` readings and must not decrease.

    Args:
        on_close: called with every closed turn, at the boundary between two turns.
        optimizer_exists: whether the program has built an optimizer object already. If an optimizer
            exists but has not stepped yet, several backward calls are gradient accumulation;
            without one, they are manual parameter updates.

    Attributes:
        active: the phases that have begun and not ended, innermost last.
        seen: all phases that have begun so far.
        micro_batches: the number of steps from one optimizer step to the next in the last cycle; 1
            if gradients do not accumulate.
        micro_batches_done: the number of steps since the last optimizer step.
    """

    def __init__(self, on_close: Callable[[Turn], None], optimizer_exists: bool = False) -> None:
        self._on_close = on_close
        self._optimizer_exists = optimizer_exists
        self.seen: set[int] = set()
        self._arm: int | None = None
        self._block = 0
        self._mark: str | None = None
        self._turn: Turn | None = None
        self.active: list[int] = []
        self._last_ns = 0
        self._previous = OTHER  # the outermost phase that ended most recently
        self._roots: dict[int, bool] = {}  # root -> was it called with gradients in training mode
        self._training_forwards = 0
        self._evaluation_forwards = 0
        self._updated_inside_backward = False
        self._trained: set[int] = set()  # roots that were called in training mode before an update
        self._counts = {"step": 0, "evaluation": 0}
        self._backward_seen = False
        self._update_seen = False
        self._updating: list[int] = []
        self._usage: tuple[int, int, int] | None = None
        self._usage_before: tuple[int, int, int] | None = None
        self._turns_since_usage = 0
        self._first_optimizer: int | None = None
        self._previous_optimizer: int | None = None
        self._closing_optimizer: int | None = None
        self._cycle = _Cycle()
        self._loaders: set[int] = set()  # of this turn
        self._accumulation: _Accumulation | None = None
        self.micro_batches = 1
        self.micro_batches_done = 0

    # Events

    def tell(self, events: Iterable[TorchEvent], losses: Iterator[object]) -> None:
        """Process the next events, in order.

        Args:
            events: the events.
            losses: yields the loss of each backward call whose loss was recorded.
        """
        for kind, phase, flags, first, second, third in events:
            if kind == USAGE:
                self.store_usage(first, second, third)
            elif kind == NOTE:
                self.process_note(phase, first)
            elif phase == FORWARD:
                if kind == BEGIN:
                    self.forward_begins(first, second, bool(flags & 1), bool(flags & 2))
                else:
                    self.forward_ends(first)
            elif phase == BACKWARD:
                if kind == BEGIN:
                    self.backward_begins(first, next(losses) if flags else None)
                else:
                    self.backward_ends(first)
            elif phase == OPTIMIZER:
                if kind == BEGIN:
                    self.update_begins(first, second)
                else:
                    self.update_ends(first, second)
            elif phase == DATA:
                if kind == BEGIN:
                    self.fetch_begins(first, second)
                else:
                    self.fetch_ends(first, second, bool(flags & 1))
            elif kind == BEGIN:
                self.transfer_begins(first)
            else:
                self.transfer_ends(first)

    def store_usage(self, minor_faults: int, major_faults: int, peak_rss_bytes: int) -> None:
        """Store the cumulative resource usage; it arrives just before the event recorded at the
        same time."""
        self._usage = (minor_faults, major_faults, peak_rss_bytes)

    def process_note(self, which: int, value: int) -> None:
        """Process a note of the agent; ``which`` is the note, such as ``ARM``."""
        if which == OPTIMIZER_BUILT:
            self._optimizer_exists = True
        elif which == ARM:
            self._arm = None if value < 0 else value
            self._block += 1
        elif which == MARK:
            self._mark = MARKS[value]
        elif which == PAUSE:
            self._skip(value)
        elif self._turn is not None and which == ROWS:
            self._turn.rows = (self._turn.rows or 0) + value
        elif self._turn is not None:
            self._turn.elements = (self._turn.elements or 0) + value

    def _skip(self, pause_ns: int) -> None:
        """Take a pause, which has just ended, out of the times of the open turn."""
        if self._turn is not None:
            self._turn.start_ns += pause_ns
            self._last_ns += pause_ns

    def fetch_begins(self, now_ns: int, loader: int = 0) -> None:
        """A loader is asked for a batch (or for its iterator); ``loader`` is its id."""
        if not self.active and self._closes_at_fetch():
            self._close(now_ns)
        self._enter(DATA, now_ns).fetched = True
        self._loaders.add(loader)
        self._cycle.batches[loader] = self._cycle.batches.get(loader, 0) + 1

    def fetch_ends(self, now_ns: int, loader: int = 0, raised: bool = False) -> None:
        """The loader has returned a batch, or has raised an exception: it is exhausted."""
        self._leave(DATA, now_ns)
        if raised and self._cycle.batches.get(loader):
            self._cycle.batches[loader] -= 1

    def transfer_begins(self, now_ns: int) -> None:
        """A copy of a tensor from the host to an accelerator begins."""
        self._enter(TRANSFER, now_ns)

    def transfer_ends(self, now_ns: int) -> None:
        """The copy has ended, or is queued on the device."""
        self._leave(TRANSFER, now_ns)

    def forward_begins(self, now_ns: int, root: int, grad: bool, training: bool) -> None:
        """An outermost module is called.

        Args:
            now_ns: the time of the event.
            root: the id of the module.
            grad: whether autograd records the call.
            training: whether the module is in training mode.
        """
        trains = grad and (training or root not in self._trained)
        evaluates = not training and root in self._trained
        if not self.active and self._closes_at_forward(root, trains, evaluates):
            self._close(now_ns)
        if grad and not self.active:
            self._cycle.forwards += 1
            self._cycle.roots.add(root)
        turn = self._enter(FORWARD, now_ns)
        turn.forwards += 1
        turn.grad |= grad
        self._roots[root] = self._roots.get(root, False) or (grad and training)
        self._training_forwards += trains
        self._evaluation_forwards += evaluates

    def forward_ends(self, now_ns: int) -> None:
        """The outermost module has returned or raised."""
        self._leave(FORWARD, now_ns)

    def backward_begins(self, now_ns: int, loss: object = None) -> None:
        """A backward call begins; ``loss`` is stored in the turn unless it is ``None``."""
        turn = self._enter(BACKWARD, now_ns)
        if loss is not None:
            turn.losses.append(loss)

    def backward_ends(self, now_ns: int) -> None:
        """A backward call has returned or raised."""
        turn = self._leave(BACKWARD, now_ns)
        if turn is None or BACKWARD in self.active:
            return
        turn.backwards += 1
        if not self.active:
            self._cycle.backwards += 1
        self._backward_seen = True
        if self._updated_inside_backward and not self.active:
            self._updated_inside_backward = False
            self._end_update(now_ns, None)

    def update_begins(self, now_ns: int, optimizer: int) -> None:
        """An optimizer's step begins; ``optimizer`` is its id."""
        if optimizer in self._updating:  # an exception has ended the previous step
            self.abandon()
        self._updating.append(optimizer)
        self._enter(OPTIMIZER, now_ns)

    def update_ends(self, now_ns: int, optimizer: int) -> None:
        """An optimizer's step has ended; ``optimizer`` is its id."""
        if optimizer in self._updating:
            self._updating.remove(optimizer)
        turn = self._leave(OPTIMIZER, now_ns)
        if turn is None or OPTIMIZER in self.active:
            return
        turn.updates += 1
        self._update_seen = True
        if BACKWARD in self.active:
            self._updated_inside_backward = True
        elif not self.active:
            self._end_update(now_ns, optimizer)

    def abandon(self) -> None:
        """Forget the active phases, which an exception has ended that the program caught."""
        self.active.clear()
        self._updating.clear()

    def finish(self) -> None:
        """Close the last turn at its last event, if it is complete."""
        turn = self._turn
        if turn is None or self.active:
            return
        is_micro_batch = self._accumulation is not None and bool(turn.backwards)
        if turn.updates or is_micro_batch or self._is_manual_update() or self._is_evaluation():
            self._close(self._last_ns)

    # The rules for closing a turn

    def _closes_at_fetch(self) -> bool:
        turn = self._turn
        if turn is None:
            return False
        if turn.updates or self._is_manual_update() or self._is_evaluation():
            return True
        accumulation = self._accumulation
        return accumulation is not None and turn.backwards >= accumulation.backwards

    def _closes_at_forward(self, root: int, trains: bool, evaluates: bool) -> bool:
        turn = self._turn
        if turn is None:
            return False
        if turn.updates:
            # The next training iteration begins at a fetch, or has begun when the cycle of
            # optimizers was closed. So only an evaluation pass closes the turn here.
            return evaluates
        if turn.backwards:
            if evaluates or (not turn.fetched and self._is_manual_update()):
                return True
            accumulation = self._accumulation
            return (
                accumulation is not None
                and root in self._roots
                and turn.backwards >= accumulation.backwards
                and accumulation.has_next_batch(self._cycle)
            )
        if not turn.forwards:
            return False
        if self._training_forwards:
            # A program that does not train calls the same root again for its next input.
            return root in self._roots and not self.may_train()
        # An evaluation pass ends when its root is called again, or when training begins.
        return root in self._roots or (trains and self._evaluation_forwards > 0)

    def _end_update(self, now_ns: int, optimizer: int | None) -> None:
        assert self._turn is not None
        self._trained.update(root for root, trained in self._roots.items() if trained)
        self._accumulation = self._cycle.accumulation() or self._accumulation
        self._cycle = _Cycle()
        if optimizer is not None:
            self._learn_cycle(optimizer)
        full = self._turn.updates >= CYCLE_LIMIT
        if full:
            self._closing_optimizer = None
        if full or (not self._turn.fetched and self._closing_optimizer in (None, optimizer)):
            self._close(now_ns)

    def _learn_cycle(self, optimizer: int) -> None:
        if self._first_optimizer is None:
            self._first_optimizer = optimizer
        elif optimizer == self._first_optimizer and self._previous_optimizer != optimizer:
            self._closing_optimizer = self._previous_optimizer
        self._previous_optimizer = optimizer

    def _is_manual_update(self) -> bool:
        assert self._turn is not None
        return bool(self._turn.backwards) and not self._update_seen and not self._optimizer_exists

    def _is_evaluation(self) -> bool:
        turn = self._turn
        if turn is None or not turn.forwards or turn.backwards:
            return False
        return not self._training_forwards or not self.may_train()

    def may_train(self) -> bool:
        """Whether the program trains, as far as is known; if not, it does inference."""
        return self._backward_seen or self._update_seen or self._optimizer_exists

    # Times

    def _enter(self, phase: int, now_ns: int) -> Turn:
        turn = self._turn
        if turn is None:
            turn = self._open(now_ns)
        active = self.active
        if active:
            turn.phases_ns[active[-1]] += now_ns - self._last_ns
        elif self._previous == FORWARD and phase == BACKWARD:
            turn.phases_ns[LOSS] += now_ns - self._last_ns
        elif self._previous == FORWARD and phase == FORWARD:
            turn.phases_ns[FORWARD] += now_ns - self._last_ns
        else:
            turn.phases_ns[OTHER] += now_ns - self._last_ns
        self._last_ns = now_ns
        active.append(phase)
        self.seen.add(phase)
        return turn

    def _leave(self, phase: int, now_ns: int) -> Turn | None:
        active = self.active
        if phase not in active:
            return None  # the phase began before the agent started, or was abandoned
        assert self._turn is not None
        while True:
            left = active.pop()
            self._turn.phases_ns[left] += now_ns - self._last_ns
            self._last_ns = now_ns
            if left == phase:
                break
        if not active:
            self._previous = phase
        return self._turn

    def _open(self, now_ns: int) -> Turn:
        self._turn = Turn(now_ns)
        self._last_ns = now_ns
        self._previous = OTHER
        self._roots = {}
        self._loaders.clear()
        self._training_forwards = 0
        self._evaluation_forwards = 0
        return self._turn

    def _close(self, now_ns: int) -> None:
        turn = self._turn
        assert turn is not None
        turn.phases_ns[OTHER] += now_ns - self._last_ns
        turn.end_ns = now_ns
        turn.arm, turn.block, turn.mark = self._arm, self._block, self._mark
        turn.roots = frozenset(self._roots)
        self._account_usage(turn)
        if not turn.updates and not turn.backwards:
            turn.kind = "evaluation"
            for loader in self._loaders:
                self._cycle.batches.pop(loader, None)
        elif not turn.updates:  # a manual update
            self._trained.update(root for root, trained in self._roots.items() if trained)
        turn.index = self._counts[turn.kind]
        self._counts[turn.kind] += 1
        if turn.kind == "step":
            self.micro_batches_done += 1
            if turn.updates:
                self.micro_batches, self.micro_batches_done = self.micro_batches_done, 0
        self._open(now_ns)
        self._on_close(turn)

    def _account_usage(self, turn: Turn) -> None:
        self._turns_since_usage += 1
        usage, before = self._usage, self._usage_before
        if usage is not None:
            if before is not None:
                turn.minor_faults = (usage[0] - before[0]) / self._turns_since_usage
                turn.major_faults = (usage[1] - before[1]) / self._turns_since_usage
            self._usage, self._usage_before, self._turns_since_usage = None, usage, 0
        if self._usage_before is not None:
            turn.peak_rss_bytes = self._usage_before[2]
