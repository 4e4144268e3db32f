"""Sharing out the root calls of the program over the ranks.

A call that cannot be shared out is computed whole by every rank, which is always right. So is one
that turns out not to have gone the same way on all ranks, after what it has changed is put back.
"""

from __future__ import annotations

import collections
import functools
import sys
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from flatout.intercept import objects
from flatout.intercept.events import EventLog
from flatout.intercept.graph import leaf_of
from flatout.intercept.identity import WeakIdentityDict
from flatout.parallel import cutting, kinds, shards
from flatout.parallel.averaging import Leaves
from flatout.parallel.balance import Exchange, Graph, Phase
from flatout.parallel.changes import Changes
from flatout.parallel.crossing import Crossing, flags, gather_anchored, is_flagged, scatter
from flatout.parallel.header import Header, Meeting, digest
from flatout.parallel.kinds import Kind, Refusal, Rule, find_opaque, structure_of
from flatout.parallel.placement import UnshareableError
from flatout.parallel.sameness import (
    GeneratorStates,
    content_digest,
    state_digest,
    structure_digest,
)
from flatout.parallel.team import PARTED, Team

_FAILED, _IS_CHANGED = 1, 2
"""Outcomes of a shard: it cannot be used, and what it has changed cannot be put back."""

FindRule = Callable[[Any, tuple[Any, ...], dict[str, Any], int, "Rule | None"], Rule | Refusal]
"""Finds the rule of a call's kind, given the module, its arguments, the number of ranks and, if the
rule was tested before, that rule; returns the same on every rank, and leaves module, inputs and
random generators as they were."""

MOST_KINDS = 16
"""Kinds of calls of a module that are tested; further ones are computed whole."""

MOST_TESTS = 8
"""How often a kind is tested that is refused only for now."""

USELESS_CALLS = 32
"""Sharing is useless if none of so many calls could be shared out: a program may begin with a few
of another kind."""

CHECKED_CALLS = frozenset(8**exponent for exponent in range(1, 17))
"""Shared calls of a kind before which its rule is tested again."""

BUFFER_CALLS = 3
"""First shared calls of a kind in which all buffers are copied; later, large ones that have never
changed are not."""

COMPARED_STEPS = frozenset(8**exponent for exponent in range(8))
"""Optimizer steps after which the ranks compare parameters and optimizer states."""


@dataclass
class KindState:
    """What is known of the calls of a kind.

    Attributes:
        digest: of the kind.
        rule: how they are shared out; ``None``: not at all.
        reason: why not.
        may_be_tested: whether a rule is looked for at the next call.
        tests: how often one was looked for.
        calls: how many were shared out.
        checked: the number of calls at the last test.
        changed: paths of the buffers that they have changed.
        changes: of the module's attributes by the program, before the last test.
        retests: how often it was tested again because of such changes.
    """

    digest: int
    rule: Rule | None = None
    reason: str = ""
    may_be_tested: bool = True
    tests: int = 0
    calls: int = 0
    checked: int = 0
    changed: set[str] = field(default_factory=set)
    changes: int = 0
    retests: int = 0

    def refuse(self, reason: str, is_lasting: bool = True) -> None:
        """Compute calls of this kind whole from now on."""
        self.rule = None
        self.reason = reason
        self.may_be_tested = not is_lasting and self.tests < MOST_TESTS


@dataclass
class ModuleState:
    """What is known of a root module.

    Attributes:
        name: of its class.
        number: of the module, in the order of the first calls.
        calls: how often it was called.
        kinds: what is known of its calls.
        scalars: its attributes after the last call (see ``kinds.scalars_of``).
        changes: how often the program has changed them between two calls.
    """

    name: str
    number: int
    calls: int = 0
    kinds: dict[Kind, KindState] = field(default_factory=dict)
    scalars: list[dict[str, Any]] | None = None
    changes: int = 0


@dataclass(frozen=True)
class _Call:
    """One root call.

    Attributes:
        team: the ranks.
        state, kind: what is known of the module and of calls like this one.
        module, args, kwargs, leaves: what is called, with what, and the tensors therein.
        tree, parameters: the modules in it, and their parameters.
        what: the call in words, for a sentence about this rank.
    """

    team: Team
    state: ModuleState
    kind: KindState
    module: Any
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    leaves: list[torch.Tensor]
    tree: objects.Tree
    parameters: list[torch.nn.Parameter]
    what: str


class _Shard:
    """How the own shard of a call went.

    Attributes:
        result: what the module returned.
        outputs: the tensors in it.
        anchor: see ``crossing.scatter``.
        graph: of what the ranks compute together in this call.
        begin: number of the first autograd node that it may make.
        reason: why the call cannot be shared out; empty: it can.
    """

    def __init__(self, graph: Graph) -> None:
        self.graph = graph
        self.result: Any = None
        self.outputs: list[torch.Tensor] = []
        self.anchor: torch.Tensor | None = None
        self.begin = 0
        self.reason = ""


class Sharing:
    """Called around each outermost module call.

    Args:
        events: where it is noted what is shared out and what is not.
        leaves: gets the leaves whose gradients become partial.
        form_team: meets the other ranks, at the first call.
        find_rule: see ``FindRule``.
        program: returns the root modules and the optimizers of the program.

    Attributes:
        is_in_shard: whether a shard is computed or a rule looked for.
        has_shared: whether a call was shared out.
        shared, whole: numbers of calls by the name of the module, and by name and reason.
        compares_state: whether parameters and optimizer states are compared at the next call.
    """

    def __init__(
        self,
        events: EventLog,
        leaves: Leaves,
        form_team: Callable[[], Team],
        find_rule: FindRule,
        program: Callable[[], tuple[list[Any], list[Any]]],
    ) -> None:
        self.is_in_shard = False
        self.has_shared = False
        self.shared: collections.Counter[str] = collections.Counter()
        self.whole: collections.Counter[tuple[str, str]] = collections.Counter()
        self.compares_state = False
        self._events = events
        self._leaves = leaves
        self._form_team = form_team
        self._find_rule = find_rule
        self._program = program
        self._team: Team | None = None
        self._modules: WeakIdentityDict[Any, ModuleState] = WeakIdentityDict()
        self._numbers = 0

    @property
    def team(self) -> Team | None:
        """The ranks, ``None`` while nothing has been shared out."""
        return self._team if self.has_shared else None

    @property
    def is_useless(self) -> bool:
        """Whether all of the first calls were computed whole, by every rank."""
        return not self.has_shared and sum(self.whole.values()) >= USELESS_CALLS

    def __call__(
        self, call: Callable[..., Any], module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        """Make a root call."""
        if self.is_in_shard or not _is_plain():
            return call(module, *args, **kwargs)
        team = self.meet_ranks()
        team.thread = threading.get_ident()
        with team.balance.spend(Phase.COMPARISON):
            current = self._meet(team, module, args, kwargs)
            try:
                return self._make(current, call)
            finally:
                current.state.scalars = kinds.scalars_of(objects.Tree(module))
                if not torch.is_grad_enabled():
                    team.balance.end_lap()

    def meet_ranks(self) -> Team:
        """Return the ranks, after a first meeting if there was none."""
        if self._team is None:
            self._team = self._form_team()
        return self._team

    def _make(self, current: _Call, call: Callable[..., Any]) -> Any:
        """Make a root call about which the ranks have met."""
        kind = current.kind
        self._test(current)
        batch = None
        if kind.rule is not None:
            batch = cutting.batch_size(kind.rule, current.leaves)
        if kind.rule is None or batch is None or batch < current.team.size:
            return self._compute_whole(current, call, kind.reason or "the batch is too small")
        if any(parameter.grad_fn is not None for parameter in current.parameters):
            return self._compute_whole(current, call, "its parameters are computed from others")
        self._leaves.add(current.parameters)
        if torch.is_grad_enabled() and self._leaves.have_hooks():
            return self._compute_whole(current, call, "a parameter has a hook")
        return self._share(current, call, kind.rule, batch)

    # Meetings

    def _meet(
        self, team: Team, module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> _Call:
        """Compare a call with that of the other ranks."""
        state = self._modules.get(module)
        compared = self._program() if self.compares_state else ([], [])
        if state is None:
            compared[0].append(module)
            self._modules[module] = state = ModuleState(objects.class_name(module), self._numbers)
            self._numbers += 1
        state.calls += 1
        tree = objects.Tree(module)
        if state.scalars is not None and state.scalars != kinds.scalars_of(tree):
            state.changes += 1
        found = kinds.kind_of(tree, args, kwargs)
        kind = state.kinds.get(found)
        if kind is None:
            kind = KindState(digest(found))
            if len(state.kinds) >= MOST_KINDS:
                kind.refuse("it is called in too many ways")
            else:
                state.kinds[found] = kind
        leaves = kinds.leaves(args, kwargs)
        what = f"makes call {state.calls} of {state.name}"
        parameters = state_digest(*compared) if any(compared) else 0
        self.compares_state = False
        header = Header(
            0,
            Meeting.CALL,
            subject=digest((state.number, state.name, state.calls)),
            structure=kind.digest ^ structure_digest(leaves),
            content=digest((content_digest(leaves), structure_of((args, kwargs)))),
            generators=GeneratorStates().digest(),
            parameters=parameters,
        )
        with team.ending.between_calls():
            team.meet(header, what)
        parameters_now = tree.parameters()
        return _Call(team, state, kind, module, args, kwargs, leaves, tree, parameters_now, what)

    def _test(self, call: _Call) -> None:
        """Look for the rule of a kind of calls, if that is due."""
        kind, team = call.kind, call.team
        is_checked = kind.rule is not None and kind.calls in CHECKED_CALLS - {kind.checked}
        is_outdated = kind.rule is not None and kind.changes != call.state.changes
        kind.changes = call.state.changes
        if is_outdated:
            kind.retests += 1
            if kind.retests > MOST_TESTS:
                kind.refuse("the program changes its attributes between calls")
                return
        if not (kind.may_be_tested or is_checked or is_outdated):
            return
        kind.checked = kind.calls
        kind.may_be_tested = False
        kind.tests += 1
        self.is_in_shard = True
        try:
            with team.balance.spend(Phase.TESTING):
                known = None if is_outdated else kind.rule
                found = self._find_rule(call.module, call.args, call.kwargs, team.size, known)
        finally:
            self.is_in_shard = False
        header = Header(0, Meeting.RULE, content=digest(found))
        headers = team.meet(header, call.what, ("sequence", "meeting"))
        if len({other.content for other in headers}) > 1:
            kind.refuse(f"{call.state.name} is not judged alike on all ranks")
        elif isinstance(found, Rule):
            kind.rule = found
        else:
            kind.refuse(found.reason, found.is_lasting)

    # Whole calls

    def _compute_whole(self, current: _Call, call: Callable[..., Any], reason: str) -> Any:
        """Compute a call whole, as every rank does."""
        subject = current.state.name, reason
        if subject not in self.whole:
            self._events.add("skipped", "sharing", f"{subject[0]} is not shared out: {reason}")
        self.whole[subject] += 1
        with current.team.balance.spend(Phase.PROGRAM):
            return call(current.module, *current.args, **current.kwargs)

    # Shared calls

    def _share(self, current: _Call, call: Callable[..., Any], rule: Rule, batch: int) -> Any:
        """Compute the own shard of a call, and return the output of the whole batch."""
        kind, team = current.kind, current.team
        copies_all = kind.calls < BUFFER_CALLS
        changes = Changes(current.module, current.tree, kind.changed, copies_all)
        shard = self._compute_shard(current, call, rule, batch)
        foreign: list[torch.Tensor] = []
        if not shard.reason:
            foreign = _find_foreign(current, shard)
        header = Header(
            0,
            Meeting.OUTPUTS,
            outcome=bool(shard.reason) * _FAILED + (not changes.can_be_undone()) * _IS_CHANGED,
            structure=_structure(rule, shard) if not shard.reason else 0,
            content=digest((changes.digest(), _digest_whole(rule, shard))),
            generators=GeneratorStates().digest(),
            subject=structure_digest(foreign),
            bits=flags([tensor.requires_grad for tensor in shard.outputs]),
        )
        headers = team.meet(header, current.what, ("sequence",))
        while any(other.meeting is Meeting.STATISTICS for other in headers):
            # These ranks wait for this one in a batch norm. They learn now that it is over, and
            # come here too.
            headers = team.meet(header, current.what, ("sequence",))
        reason = self._find_disagreement(team, shard, headers)
        if reason:
            kind.refuse(f"in shards, {reason}")
            if any(other.outcome & _IS_CHANGED for other in headers):
                team.ending.stop(
                    f"{current.state.name} changes parameters or large buffers in its forward "
                    f"pass, and is not the same on all ranks: {reason}"
                )
            changes.undo()
            return self._compute_whole(current, call, kind.reason)
        self._leaves.add(foreign)
        team.balance.count(Exchange.CALL)
        team.balance.count(Exchange.ROW, batch)
        kind.calls += 1
        kind.changed.update(changes.changed_buffers)
        if current.state.name not in self.shared:
            self._events.add("applied", "sharing", f"{current.state.name} is shared out")
        self.shared[current.state.name] += 1
        self.has_shared = True
        recorded = 0
        for other in headers:
            recorded |= other.bits
        return _join(current, shard, rule, batch, recorded)

    def _compute_shard(
        self, current: _Call, call: Callable[..., Any], rule: Rule, batch: int
    ) -> _Shard:
        """Call the module with the own rows of its inputs."""
        shard = _Shard(current.team.graphs.open())
        inputs, shard.anchor = _cut(current, shard, rule, batch)
        shard.begin = _next_node_number()
        rows = cutting.bounds(batch, current.team.size)[current.team.rank]
        self.is_in_shard = True
        try:
            args, kwargs = cutting.rebuild(current.args, current.kwargs, inputs)
            with (
                current.team.balance.spend(Phase.SHARD),
                shards.shard(*rows, batch, self._add_up, rule.placements, sums=rule.sums) as state,
            ):
                state.graph = shard.graph
                shard.result = call(current.module, *args, **kwargs)
            shard.outputs = kinds.tensors_of_output(shard.result)
        except UnshareableError as error:
            shard.reason = str(error)
        except Exception as error:  # noqa: BLE001 - the whole call raises it again, if it does
            shard.reason = f"it raises {type(error).__name__}"
        finally:
            self.is_in_shard = False
        if not shard.reason and len(shard.outputs) != len(rule.outputs):
            shard.reason = "its output has another number of tensors"
        if not shard.reason and not _fits(rule, shard.outputs, rows[1] - rows[0]):
            shard.reason = "its outputs have other sizes"
        if not shard.reason and find_opaque(shard.result, is_output=True) is not None:
            shard.reason = "its output holds what cannot be compared"
        return shard

    def _add_up(self, tensors: list[torch.Tensor]) -> list[torch.Tensor]:
        """Return the sums over the ranks of what shards add up."""
        assert self._team is not None
        return self._team.add_up(tensors, is_in_forward=self.is_in_shard)

    def _find_disagreement(self, team: Team, shard: _Shard, headers: Sequence[Header]) -> str:
        """Return why a call must be computed whole, an empty string if it need not."""
        if any(header.outcome & _FAILED for header in headers):
            texts = [text.decode() for text in team.channel.exchange(shard.reason.encode())]
            reasons = [text for text in texts if text]
            # A rank that only followed another one does not know why.
            return next((reason for reason in reasons if reason != PARTED), PARTED)
        own = headers[0]
        for header in headers:
            if header.structure != own.structure:
                return "its outputs differ in structure"
            if header.content != own.content:
                return "it changes the module, or returns tensors without rows, by its samples"
            if header.generators != own.generators:
                return "it draws other random numbers on some ranks"
            if header.subject != own.subject:
                return "it reaches other tensors that require gradients"
        return ""


def _find_foreign(current: _Call, shard: _Shard) -> list[torch.Tensor]:
    """Return the leaves that a shard's output depends on and that are no parameters of the module.

    If it depends on other tensors that were computed outside, the shard gets the reason why the
    call cannot be shared out: their gradients would be partial.
    """
    known = set(map(id, current.parameters))
    entry = None if shard.anchor is None else shard.anchor.grad_fn
    pending: list[Any] = [output.grad_fn for output in shard.outputs]
    # A leaf among the outputs has no node.
    leaves = [output for output in shard.outputs if output.requires_grad and output.is_leaf]
    seen = {entry, None}
    while pending:
        node = pending.pop()
        if node in seen:
            continue
        seen.add(node)
        leaf = leaf_of(node)
        if leaf is not None:
            # Nobody sees the gradient of one that the module has made in this call.
            if sys.getrefcount(leaf) > _references_to_unheld_leaf():
                leaves.append(leaf)
        elif node._sequence_nr() < shard.begin and not _is_cast(node, known):
            shard.reason = "it uses tensors that were computed before, with gradients"
            return []
        pending += [following for following, _ in node.next_functions]
    found = {id(leaf): leaf for leaf in leaves if id(leaf) not in known}
    return list(found.values())


def _is_cast(node: Any, known: set[int]) -> bool:
    """Whether a node has only cast a parameter, as autocast does, which keeps the result for later
    calls."""
    following = node.next_functions
    leaf = leaf_of(following[0][0]) if node.name() == "ToCopyBackward0" else None
    return leaf is not None and id(leaf) in known


@functools.cache
def _references_to_unheld_leaf() -> int:
    """Return how many references ``sys.getrefcount`` counts where only a graph holds a leaf."""
    with torch.enable_grad():
        node: Any = torch.zeros(1, device="cpu", requires_grad=True).neg().grad_fn
    leaf = leaf_of(node.next_functions[0][0])
    return sys.getrefcount(leaf)


def _next_node_number() -> int:
    """Return a number that the autograd nodes that this thread makes from now on have at least."""
    if not torch.is_grad_enabled():
        return 0
    node: Any = torch.empty(0, device="cpu", requires_grad=True).view(0).grad_fn
    return int(node._sequence_nr())


def _cut(
    current: _Call, shard: _Shard, rule: Rule, batch: int
) -> tuple[list[torch.Tensor], torch.Tensor | None]:
    """Return the own rows of a call's inputs, and the anchor of those that require gradients."""
    rows = cutting.bounds(batch, current.team.size)[current.team.rank]
    is_recorded = torch.is_grad_enabled()
    crossing = [is_recorded and leaf.requires_grad for leaf in current.leaves]
    plain = [leaf for leaf, crosses in zip(current.leaves, crossing, strict=True) if not crosses]
    others = tuple(dim for dim, crosses in zip(rule.inputs, crossing, strict=True) if not crosses)
    cut = iter(cutting.cut(Rule(others, ()), plain, *rows))
    if not any(crossing):
        return list(cut), None
    where = Crossing(current.team, batch, rule.inputs, shard.graph).select(crossing)
    through = [leaf for leaf, crosses in zip(current.leaves, crossing, strict=True) if crosses]
    *scattered, anchor = scatter(where, through)
    crossed = iter(scattered)
    return [next(crossed) if crosses else next(cut) for crosses in crossing], anchor


def _digest_whole(rule: Rule, shard: _Shard) -> int:
    """Return a digest of the outputs without rows, which each rank has whole."""
    pairs = zip(rule.outputs, shard.outputs, strict=False)
    return content_digest(tensor for dim, tensor in pairs if dim is None)


def _fits(rule: Rule, outputs: Sequence[torch.Tensor], rows: int) -> bool:
    """Whether outputs have as many dimensions as when the rule was tested, and a row for each
    sample."""
    dims = rule.output_dims or [tensor.dim() for tensor in outputs]
    return all(
        tensor.dim() == expected and (dim is None or (dim < expected and tensor.shape[dim] == rows))
        for dim, expected, tensor in zip(rule.outputs, dims, outputs, strict=True)
    )


def _structure(rule: Rule, shard: _Shard) -> int:
    """Return a digest of a shard's output that does not depend on its rows: of what is in it,
    but for tensors, of which only the sizes count."""
    found: list[object] = [structure_of(shard.result, is_output=True)]
    for dim, tensor in zip(rule.outputs, shard.outputs, strict=True):
        shape = list(tensor.shape)
        is_recorded = dim is None and tensor.requires_grad
        if dim is not None:
            del shape[dim]
        found.append((shape, tensor.dtype, tensor.device.type, tensor.layout, is_recorded))
    return digest(found)


def _join(current: _Call, shard: _Shard, rule: Rule, batch: int, recorded: int) -> Any:
    """Return what the module would have returned for the whole batch."""
    is_cut = [dim is not None for dim in rule.outputs]
    bits = flags([is_flagged(recorded, i) for i, is_joined in enumerate(is_cut) if is_joined])
    where = Crossing(current.team, batch, rule.outputs, shard.graph).select(is_cut)
    parts = [t for t, is_joined in zip(shard.outputs, is_cut, strict=True) if is_joined]
    joined = iter(gather_anchored(where, parts, bits, shard.anchor)) if parts else iter(())
    outputs = [
        next(joined) if is_joined else tensor
        for tensor, is_joined in zip(shard.outputs, is_cut, strict=True)
    ]
    return cutting.rebuild_output(shard.result, outputs)


def _is_plain() -> bool:
    """Whether nothing is active that sees the operations of a call, or transforms them, and no
    backward call is being made: that would not average the gradients of a first shared call."""
    autograd: Any = torch._C._autograd
    functorch: Any = torch._C._functorch
    return (
        autograd._top_saved_tensors_default_hooks(True) is None
        and functorch.maybe_current_level() is None
        and torch.autograd.forward_ad._current_level < 0
        and not any(map(_is_mode_of_program, range(torch._C._len_torch_dispatch_stack())))
        and torch._C._current_graph_task_id() < 0
    )


def _is_mode_of_program(position: int) -> bool:
    """Whether a mode on the stack of those that see all operators is not flatout's own."""
    stack_at: Any = torch._C._get_dispatch_stack_at
    made_in = objects.inherited(type(stack_at(position)), "__module__")
    return not str(made_in).startswith("flatout.")
