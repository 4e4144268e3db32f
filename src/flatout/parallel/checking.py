"""Finding by test how the calls of a kind may be shared out, or why they may not.

A rule names the dimension that counts samples, in each input and each output. It holds if a call on
some of the rows gives these rows of the output, and nothing else is different afterwards. That is
tested on copies of the module, in the mode of the program's call:

- A shard has the outputs that the rule says, and leaves the module in the same state.
- Outputs of a sample keep their bits if all other samples are replaced, in a call of the same
  shape, so by the same kernels. This also finds samples that are mixed with a weight of 1e-6. If
  bits differ, the test is made again in float64, where rounding is told from mixing.
- The same holds, in float64 where the module can compute in it, with noise on all parameters: a
  mixture whose factor is zero at first is found too.
- The same holds for what is added up over samples (see ``sums``), where this makes a rule hold. The
  tests go on with the sums of the whole call, and follow what else is computed from samples: no
  output without rows may be among it.
- Random numbers are drawn, in all of these calls, from the same state of the generators, and in
  shards at the places of the whole batch's (see ``placement``). Afterwards the generators are in
  the state of the whole call.
- Batch norms of a part take the statistics of the whole call (see ``replaying``), so that samples
  are independent in spite of them. What all shards would have added up makes the sums of the whole
  call. So, one batch norm after the other, shards that add up have its statistics.
- The gradients of two shards, whose outputs' gradients are multiplied by two, average to the
  gradients of the whole call.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.autograd.graph import _engine_run_backward as run_backward

from flatout.intercept import device, objects
from flatout.intercept.arrays import EXACT_TENSOR_TYPES
from flatout.intercept.nested import tensors_in
from flatout.machine import system
from flatout.parallel import cutting, shards
from flatout.parallel.comparing import (
    SEED,
    Dims,
    are_close,
    draw_normal,
    have_equal_bits,
    largest_magnitude,
    or_zeros,
    replace_others,
    root_mean_square,
    rounding_of,
    storage_address,
    sum_present,
    take_rows,
    tolerance_of,
)
from flatout.parallel.copying import CannotCopyError, Copier
from flatout.parallel.kinds import (
    GLOBAL_HOOKS,
    HOOKS,
    Refusal,
    Rule,
    find_opaque,
    has_numbers,
    leaves,
    structure_of,
    tensors_of_output,
)
from flatout.parallel.neutral import (
    Generators,
    Observer,
    release_kept,
    scalars_kept,
    seed_generators,
    unnoticed,
)
from flatout.parallel.placement import Draw, Placement, Rows, UnshareableError, place
from flatout.parallel.replaying import PartSums, WholeSums, have_sums_of_whole

MOST_CANDIDATES = 16
"""Greatest number of rules that are tested for a kind."""

_NOISE = 0.02
"""Noise on a parameter, relative to its root mean square."""

_FEW, _TEST_SHARDS = 5, 2
"""Numbers of samples and of shards in tests with noise. A shard of a single row could be broadcast
where it should not be, and five rows do not divide by two."""

_GRADIENT_FLOOR = 1e-3
"""Gradients are compared relative to their largest element, and at least to this part of the
largest of all: some, as that of a bias before a norm, are nothing but rounding errors."""

_MIXES_OR_ROUNDS = "gives other outputs for a sample if other samples change"

_EMBEDDINGS = (torch.nn.Embedding, torch.nn.EmbeddingBag)

_BUILTIN_HOOKS = ("torch.", "flatout.")
"""Packages whose hooks keep no activations."""

_Context = contextlib.AbstractContextManager[shards.Shard]
"""Around a call, for its batch norms, draws and sums (see ``shards``)."""


class _RefusedError(Exception):
    """Raised with the reason where a rule does not hold.

    Args:
        reason: a clause.
        progress: how far the test came; of several rules, the reason of the one that came farthest
            is told.
    """

    def __init__(self, reason: str, progress: int) -> None:
        super().__init__(reason)
        self.reason = reason
        self.progress = progress


def find_rule(
    module: Any,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    size: int,
    known: Rule | None = None,
) -> Rule | Refusal:
    """Find by test how calls of a kind may be shared out.

    The module, its arguments and the generators of random numbers are as before, and nothing is
    printed. Every rank comes to the same result. It costs about ten forward passes, or four where
    the known rule holds.

    Args:
        module: which is called.
        args, kwargs: with which it is called.
        size: number of ranks.
        known: the rule that was found before, with other weights. If it holds with the present
            ones, nothing else is tested.
    """
    try:
        with scalars_kept(module):
            return _test_rules(module, args, kwargs, size, known)
    except Exception as error:  # noqa: BLE001 - a call that cannot be tested is computed whole
        name = objects.class_name(module)
        return Refusal(f"{name} cannot be tested: {type(error).__name__}: {error}")


def _test_rules(
    module: Any, args: tuple[Any, ...], kwargs: dict[str, Any], size: int, known: Rule | None
) -> Rule | Refusal:
    """Find a rule as ``find_rule`` does, but for numbers outside of the module."""
    name = objects.class_name(module)
    why = _find_obstacle(module, args, kwargs)
    if why is not None:
        return Refusal(f"{name} {why}")
    if any(isinstance(p, torch.nn.UninitializedParameter) for p in objects.parameters(module)):
        return Refusal(f"{name} creates parameters in its first call", is_lasting=False)
    if _lacks_memory(module, size):
        return Refusal(f"there is no memory for a copy of {name} to test")
    with unnoticed(), _without_inference_mode():
        search = _Search(module, args, kwargs, size)
        try:
            return search.find(known)
        except CannotCopyError as error:
            return Refusal(f"{name} has a {error.args[0].__name__}, which cannot be copied")
        except torch.OutOfMemoryError:
            return Refusal(f"there is no memory to test {name}", is_lasting=False)
        except _RaisedError as error:
            return Refusal(f"{name} raises {error}", is_lasting=False)
        except UnshareableError as error:
            search.release_kept()
            return Refusal(f"{name} {error}")
        except _RefusedError as error:
            search.release_kept()
            return Refusal(f"{name} {error.reason}")


@contextlib.contextmanager
def _without_inference_mode() -> Iterator[None]:
    """A context in which a program's inference mode is replaced by one without gradients, because
    tensors made in inference mode cannot be watched."""
    gradients = torch.is_grad_enabled()
    with torch.inference_mode(False), torch.set_grad_enabled(gradients):
        yield


def _find_obstacle(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> str | None:
    """Return why calls cannot be tested, ``None`` if they can."""
    containers: list[Any] = []
    given = list(tensors_in((args, kwargs), containers))
    if any(isinstance(value, torch.nn.utils.rnn.PackedSequence) for value in containers):
        return "gets a PackedSequence, which cannot be cut"
    opaque = find_opaque((args, kwargs))
    if opaque is not None:
        return f"gets a {opaque.__name__}, which cannot be cut"
    if not all(_is_plain(tensor) for tensor in given):
        return "gets a tensor that cannot be cut"
    tensors: list[Any] = [*objects.parameters(module), *objects.buffers(module)]
    if not all(_is_plain(t) for t in tensors if not _is_lazy(t)):
        return "has parameters that are not plain tensors"
    for part in objects.modules(module):
        if isinstance(part, torch.jit.ScriptModule):
            return "is compiled by torch.jit"
        held = objects.attributes(part)
        if held.get("_compiled_call_impl") is not None or _is_made_by(part, "torch._dynamo"):
            return "is compiled by torch.compile"
        if _is_made_by(part, "torch.distributed", "torch.nn.parallel") and not (
            type(part) is torch.nn.DataParallel and len(held.get("device_ids", ())) < 2
        ):  # on one device, or on CPUs, DataParallel only calls its module
            return "is parallel itself"
        if held.get("max_norm") is not None and isinstance(part, _EMBEDDINGS):
            return "renormalises rows of an embedding in its forward pass"
        if _has_foreign_hook(held.get(hooks) for hooks in HOOKS):
            where = "" if part is module else f" on its {objects.class_name(part)}"
            return f"has a hook of the program{where}"
    if _has_foreign_hook(getattr(torch.nn.modules.module, hooks, None) for hooks in GLOBAL_HOOKS):
        return "has a hook that the program put on all modules"
    return None


def _is_plain(tensor: torch.Tensor) -> bool:
    return (
        type(tensor) in EXACT_TENSOR_TYPES
        and tensor.layout is torch.strided
        and not (tensor.is_nested or tensor.is_quantized)
    )


def _is_lazy(tensor: Any) -> bool:
    return isinstance(tensor, (torch.nn.UninitializedParameter, torch.nn.UninitializedBuffer))


def _is_made_by(module: Any, *packages: str) -> bool:
    defined_in = objects.inherited(type(module), "__module__")
    return isinstance(defined_in, str) and defined_in.startswith(packages)


def _has_foreign_hook(registries: Iterable[Any]) -> bool:
    for hook in itertools.chain.from_iterable(dict.values(found) for found in registries if found):
        defined_in = objects.attribute(hook, "__module__")
        if not isinstance(defined_in, str):
            defined_in = getattr(hook, "__module__", None)
        if not str(defined_in).startswith(_BUILTIN_HOOKS):
            return True
    return False


def _lacks_memory(module: Any, size: int) -> bool:
    """Whether less than twice the size of the module, in float64, is free for each rank, all of
    which may be on this host; of an accelerator, this is found out when it fails."""
    tensors = [*objects.parameters(module), *objects.buffers(module)]
    needed = sum(8 * t.numel() for t in tensors if t.device.type == "cpu")
    available = system.available_bytes()
    return available is not None and 2 * needed * size > available


class _RaisedError(Exception):
    """Raised with the name of an exception that the module has raised."""


@contextlib.contextmanager
def _refusing() -> Iterator[None]:
    """A context that turns what a module raises into an error of a test."""
    try:
        yield
    except UnshareableError as error:
        raise _RefusedError(str(error), 3) from None
    except Exception as error:  # noqa: BLE001 - whatever the program's module raises
        raise _RaisedError(type(error).__name__) from None


class _Outcome:
    """What a call has left.

    Args:
        output: of the module.
        state: of the module afterwards (see ``Copier.state``).
        generators: of random numbers afterwards.
        shard: as which the call was made.

    Attributes:
        structure: of the output.
        tensors: in the output.
        state: of the module.
        generators: as given.
        draws, additions: of random numbers and of what operators add up, if they were observed.
        terms: what was added up over samples, and where they are in it.
        kept: addresses of storages that the program still holds.
        followed: for each tensor, whether it was computed from what was followed.
        reads_followed: whether a number was read from what was followed.
    """

    def __init__(
        self,
        output: Any,
        state: list[tuple[str, Any]],
        generators: Generators,
        shard: shards.Shard,
    ) -> None:
        opaque = find_opaque(output, is_output=True)
        if opaque is not None:
            raise _RefusedError(f"returns a {opaque.__name__}, which cannot be joined", 2)
        found = tensors_of_output(output)
        if not all(_is_plain(tensor) for tensor in found):
            raise _RefusedError("returns a tensor that cannot be joined", 2)
        self.structure = structure_of(output, is_output=True)
        self.tensors = [tensor.detach().clone() for tensor in found]
        self.state = _detached(state)
        self.generators = generators
        observed = shard if isinstance(shard, shards.Observer) else None
        self.draws: Sequence[Draw] = observed.draws if observed else ()
        self.additions: Sequence[Draw] = observed.additions if observed else ()
        self.terms = shard.terms or []
        self.kept: set[int] = set()
        self.followed: list[bool] = []
        self.reads_followed = False


class _Whole:
    """The call of the whole batch, to which others are compared.

    Args:
        subject: the module.
        observer: of the operators.
        rule: by which shards add up; ``None``: operators add up what they are given.
        batch: number of samples.
        changes_sums: whether the call goes on with other sums than it has.

    Attributes:
        outcome: of the call.
        sums: of its batch norms, and of what it adds up over samples.
    """

    def __init__(
        self,
        subject: _Subject,
        observer: Observer | None = None,
        rule: Rule | None = None,
        batch: int = 0,
        changes_sums: bool = False,
    ) -> None:
        self.sums = sums = WholeSums()
        self._rule, self._batch = rule, batch
        sum_terms = sums.add_up_and_change if changes_sums else None
        context = self._context(sums.add_up, sums.add_up, sum_terms)
        self.outcome = subject.call(subject.leaves, context, observer)

    def observing(self) -> _Context:
        """Return a context for a call without shards that takes the statistics of this one."""
        sums = PartSums(self.sums)
        return self._context(sums.add_up, sums.add_up_gradients)

    def _context(
        self,
        add_up: shards.SumOverRanks,
        add_up_gradients: shards.SumOverRanks,
        sum_terms: shards.SumOverRanks | None = None,
    ) -> _Context:
        if self._rule is None:
            return shards.observing(add_up, add_up_gradients)
        functions = add_up, add_up_gradients, sum_terms
        return _enter(self._rule, 0, self._batch, self._batch, *functions)


def _enter(
    rule: Rule,
    start: int,
    stop: int,
    batch: int,
    add_up: shards.SumOverRanks,
    add_up_gradients: shards.SumOverRanks,
    sum_terms: shards.SumOverRanks | None = None,
) -> _Context:
    """Return a context for a call of a shard, which may have all samples."""
    placed = rule.placements, add_up_gradients, rule.sums
    return shards.shard(start, stop, batch, add_up, *placed, sum_terms, keeps_terms=True)


@dataclass(frozen=True)
class _Recorded:
    """A call that is followed by a backward call.

    Attributes:
        outputs: the tensors in the output.
        bases: the leaves that were given to the module.
        state: returns the state of the module (see ``Copier.state``).
    """

    outputs: list[torch.Tensor]
    bases: list[torch.Tensor]
    state: Callable[[], list[tuple[str, Any]]]


class _Subject:
    """The module with one set of weights.

    Args:
        module: of the program.
        args, kwargs: of the program's call.
        given: the leaves to start from.
        noise: a generator of noise for the weights, ``None`` for the module's own weights. With
            noise, other random numbers are drawn too.
        in_float64: whether to compute in float64.

    Attributes:
        leaves: to start from.
        is_noisy: whether the weights have noise.
        weights: for the identity of each parameter, the one that takes its place.
        kept: addresses of all storages that the program still holds after calls.
        has_rounding: whether outputs of a sample have had other bits beside other samples.
    """

    def __init__(
        self,
        module: Any,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        given: Sequence[torch.Tensor],
        noise: torch.Generator | None = None,
        in_float64: bool = False,
    ) -> None:
        self.in_float64 = in_float64
        self.leaves = [self._convert(leaf.detach()) for leaf in given]
        self.weights: dict[int, torch.Tensor] = {}
        for parameter in objects.parameters(module):
            value = self._convert(parameter.detach().clone())
            if noise is not None and value.is_floating_point():
                value += _NOISE * (root_mean_square(value) or 1.0) * draw_normal(value, noise)
            self.weights[id(parameter)] = torch.nn.Parameter(value, parameter.requires_grad)
        self.kept: set[int] = set()
        self.has_rounding = False
        self.is_noisy = noise is not None
        self._generators = Generators()
        self._module, self._args, self._kwargs = module, args, kwargs
        self._originals = leaves(args, kwargs)

    def _convert(self, tensor: torch.Tensor) -> torch.Tensor:
        return tensor.double() if self.in_float64 and tensor.is_floating_point() else tensor

    def call(
        self,
        given: Sequence[torch.Tensor],
        context: _Context,
        observer: Observer | None = None,
        dims: Dims = (),
    ) -> _Outcome:
        """Call a copy of the module, and look at what it leaves.

        Args:
            given: the leaves; they are left as they are.
            context: for batch norms and draws.
            observer: of the operators.
            dims: of the leaves. What is computed from those that count samples is followed.

        Raises:
            _RaisedError: the module raises.
            _RefusedError: the call does what no shared call may do.
        """
        observer = observer or Observer()
        outcome = self._call(given, context, observer, dims)
        values: list[Any] = [value for _, value in (*outcome.state, *outcome.terms)]
        tensors = (value for value in values if isinstance(value, torch.Tensor))
        outcome.kept = observer.find_kept(set(map(storage_address, tensors)))
        self.kept |= outcome.kept
        return outcome

    def _call(
        self, given: Sequence[torch.Tensor], context: _Context, observer: Observer, dims: Dims
    ) -> _Outcome:
        copier, module, args, kwargs, bases = self._prepare(given)
        self._start_generators()
        inputs = leaves(args, kwargs)
        observer.follow(t for t, dim in zip(inputs, dims, strict=False) if dim is not None)
        versions = [tensor._version for tensor in inputs]
        structure = structure_of((args, kwargs))
        before = Generators()
        try:
            with observer, _refusing(), context as shard:
                output = module(*args, **kwargs)
        finally:
            draws_from_own = observer.restore_generators() or copier.draws()
        after = Generators()
        if draws_from_own:
            raise _RefusedError("draws random numbers from a generator of its own", 3)
        if observer.draws_unseen and not after.equal_on_device(before):
            raise _RefusedError("draws random numbers on an accelerator", 3)
        if observer.normalises_over_batch:
            raise _RefusedError("normalises over the batch on an accelerator", 3)
        if (
            versions != [tensor._version for tensor in inputs]
            or not all(map(have_equal_bits, bases, given))
            or structure_of((args, kwargs)) != structure
        ):
            raise _RefusedError("changes its arguments", 3)
        outcome = _Outcome(output, copier.state(module), after, shard)
        outcome.followed = [observer.is_followed(tensor) for tensor in tensors_of_output(output)]
        outcome.reads_followed = observer.reads_followed
        return outcome

    def record(self, given: Sequence[torch.Tensor], context: _Context) -> _Recorded:
        """Call a copy of the module, to be followed by a backward call.

        Args:
            given: the leaves; they are left as they are.
            context: for batch norms and draws.

        Gradients are accumulated in ``weights`` and in the leaves that were given to the module.
        """
        copier, module, args, kwargs, bases = self._prepare(given)
        self._start_generators()
        with _refusing(), context:
            output = module(*args, **kwargs)
        return _Recorded(tensors_of_output(output), bases, functools.partial(copier.state, module))

    def _start_generators(self) -> None:
        self._generators.restore()
        if self.is_noisy:
            seed_generators(SEED)

    def _prepare(
        self, given: Sequence[torch.Tensor]
    ) -> tuple[Copier, Any, tuple[Any, ...], dict[str, Any], list[torch.Tensor]]:
        """Return the copier, the copied module, its arguments, and the leaves of the graph behind
        them."""
        bases = [leaf.clone() for leaf in given]
        inputs = []
        for base, original in zip(bases, self._originals, strict=True):
            base.requires_grad_(original.requires_grad)
            inputs.append(base if original.is_leaf else base.clone())
        args, kwargs = cutting.rebuild(self._args, self._kwargs, inputs)
        copier = Copier(self._module, self.weights, self.in_float64)
        for tensor in inputs:
            copier.keep(tensor)
        return copier, copier.copy_module(), copier.copy(args), copier.copy(kwargs), bases


class _Search:
    """Tests rules until one holds.

    Args:
        module: of the program.
        args, kwargs: of the program's call.
        size: number of ranks.
    """

    def __init__(
        self, module: Any, args: tuple[Any, ...], kwargs: dict[str, Any], size: int
    ) -> None:
        self._module, self._args, self._kwargs = module, args, kwargs
        self._leaves = leaves(args, kwargs)
        self._size = max(size, 2)
        self._subjects: list[_Subject] = []

    def release_kept(self) -> None:
        """Take out of the program's containers what the tests have put there."""
        kept = set().union(*(subject.kept for subject in self._subjects))
        if kept:
            release_kept(kept)

    def find(self, known: Rule | None) -> Rule:
        """Return the first rule that holds.

        Args:
            known: see ``find_rule``.

        Raises:
            _RaisedError: the module raises in the whole call.
            _RefusedError: none holds.
        """
        own = _Subject(self._module, self._args, self._kwargs, self._leaves)
        self._subjects.append(own)
        observer = Observer()
        whole = _Whole(own, observer)
        weights = zip(objects.parameters(self._module), own.weights.values(), strict=True)
        if observer.has_seen(objects.parameters(self._module)):
            raise _RefusedError("cannot be copied", 3)
        if not all(have_equal_bits(parameter, copied) for parameter, copied in weights):
            raise _RefusedError("changes its parameters in its forward pass", 3)
        if known is not None and self._holds(known, own, whole):
            return known
        refused = "gets no tensor with as many rows as ranks", 0
        for dims, batch in self._candidates():
            try:
                bounds = cutting.bounds(batch, self._size)
                own.has_rounding = False
                rule = _examine(own, whole, dims, bounds)
                if own.has_rounding:
                    self._test_in_float64(dims, bounds)
                self._test_with_noise(dims, batch, rule.outputs, own.has_rounding)
                return rule
            except _RefusedError as error:
                if error.progress > refused[1]:
                    refused = error.reason, error.progress
        raise _RefusedError(*refused)

    def _holds(self, known: Rule, own: _Subject, whole: _Whole) -> bool:
        """Return whether a rule holds for the module's own weights, without rounding."""
        batch = cutting.batch_size(known, self._leaves)
        if batch is None or batch < self._size:
            return False
        try:
            found = _examine(own, whole, known.inputs, cutting.bounds(batch, self._size))
        except _RefusedError:
            return False
        return found == known and not own.has_rounding

    def _candidates(self) -> Iterator[tuple[Dims, int]]:
        """Yield the dimensions that may count samples, and the number of samples: first for the
        first dimension, and first those by which most tensors are cut."""
        places = [(dim, leaf) for leaf in self._leaves for dim in range(leaf.dim())]
        sizes = [leaf.shape[dim] for dim, leaf in sorted(places, key=lambda place: place[0])]
        found = 0
        for batch in dict.fromkeys(size for size in sizes if size >= self._size):
            options: list[Dims] = [
                (*(dim for dim, size in enumerate(leaf.shape) if size == batch), None)
                for leaf in self._leaves
            ]
            choices = itertools.islice(itertools.product(*map(range, map(len, options))), 256)
            for choice in sorted(choices, key=sum):
                dims = tuple(option[i] for option, i in zip(options, choice, strict=True))
                if any(dim is not None for dim in dims):
                    found += 1
                    if found > MOST_CANDIDATES:
                        return
                    yield dims, batch

    def _test_in_float64(self, dims: Dims, bounds: Sequence[tuple[int, int]]) -> None:
        """Test a rule where rounding differs with the other samples."""
        subject = _Subject(self._module, self._args, self._kwargs, self._leaves, in_float64=True)
        self._subjects.append(subject)
        try:
            whole = _Whole(subject)
        except _RaisedError:
            raise _RefusedError(_MIXES_OR_ROUNDS, 5) from None
        _examine(subject, whole, dims, bounds)

    def _test_with_noise(self, dims: Dims, batch: int, outputs: Dims, has_rounding: bool) -> None:
        """Test a rule with noise on the weights and few samples.

        Args:
            dims: of the inputs.
            batch: number of samples of the program's call.
            outputs: dimensions of the outputs, as they were found.
            has_rounding: whether only float64 tells rounding from mixing.
        """
        rows = torch.arange(_FEW) * batch // _FEW
        given = take_rows(self._leaves, dims, rows)
        for in_float64 in (True, False):
            noise = torch.Generator().manual_seed(SEED)
            subject = _Subject(self._module, self._args, self._kwargs, given, noise, in_float64)
            self._subjects.append(subject)
            bounds = cutting.bounds(_FEW, _TEST_SHARDS)
            try:
                whole = _Whole(subject)
            except _RaisedError as error:
                if in_float64:  # the module computes in one dtype only
                    continue
                raise _RefusedError(f"raises {error} with another number of samples", 2) from None
            found = _examine(subject, whole, dims, bounds)
            if (has_rounding or subject.has_rounding) and not in_float64:
                raise _RefusedError(_MIXES_OR_ROUNDS, 5)
            if found.outputs != outputs:
                raise _RefusedError("returns other shapes with another number of samples", 2)
            if torch.is_grad_enabled():
                _test_gradients(subject, found, bounds)
            return


def _examine(
    subject: _Subject, whole: _Whole, dims: Dims, bounds: Sequence[tuple[int, int]]
) -> Rule:
    """Test a rule with one set of weights.

    Args:
        subject: the module.
        whole: the whole call.
        dims: of the inputs.
        bounds: of all shards.

    Returns:
        The rule, with the dimensions of the outputs that count samples and the places of draws and
        sums.

    Raises:
        _RefusedError: the rule does not hold.
    """
    refused = "", -1
    for option in _find_placements(subject, whole, dims, bounds):
        try:
            return _test(subject, whole, option, bounds)
        except _RefusedError as error:
            if error.progress > refused[1]:
                refused = error.reason, error.progress
    raise _RefusedError(*refused)


def _test(subject: _Subject, whole: _Whole, rule: Rule, bounds: Sequence[tuple[int, int]]) -> Rule:
    """Test a rule without its outputs, and return it with them."""
    if rule.sums:
        whole = _add_up_over_samples(subject, whole, rule, bounds)
    found = _test_shards(subject, whole, rule, bounds)
    for (start, stop), nearest in ((bounds[0], False), (bounds[-1], True)):
        _test_independence(subject, whole, found, start, stop, nearest)
    return found


def _add_up_over_samples(
    subject: _Subject, whole: _Whole, rule: Rule, bounds: Sequence[tuple[int, int]]
) -> _Whole:
    """Return the whole call as shards compute it that add up over samples, after a test that it
    gives the same as torch's own operators."""
    batch = bounds[-1][1]
    found = _Whole(subject, rule=rule, batch=batch)
    rounding = max((tolerance_of(terms) for _, terms in found.outcome.terms), default=0.0)
    for tensor, other in zip(whole.outcome.tensors, found.outcome.tensors, strict=True):
        if not are_close(tensor, other, max(tolerance_of(tensor), rounding)):
            raise _RefusedError("adds up over samples in a way that cannot be shared out", 3)
    return _Whole(subject, rule=rule, batch=batch, changes_sums=True) if subject.is_noisy else found


def _find_placements(
    subject: _Subject, whole: _Whole, dims: Dims, bounds: Sequence[tuple[int, int]]
) -> list[Rule]:
    """Return how the draws of a call, and what it adds up, may be placed: values tell which of them
    is right. Sums are taken over all samples first: a shard's own may be right by chance, where
    they are 0."""
    if not whole.outcome.draws and not whole.outcome.additions:
        return [Rule(dims, ())]
    start, stop = bounds[0]
    sizes = bounds[-1][1], stop - start
    try:
        part = subject.call(_cut(subject, dims, start, stop), whole.observing())
        draws = [
            place(whole.outcome.draws, part.draws, *sizes, is_outer=is_outer)
            for is_outer in (True, False)
        ]
    except _RaisedError as error:
        raise _RefusedError(f"raises {error} on a part of the batch", 1) from None
    except UnshareableError as error:
        raise _RefusedError(str(error), 3) from None
    sums: list[tuple[Placement, ...]] = []
    with contextlib.suppress(UnshareableError):
        for is_outer in (True, False):
            found = place(whole.outcome.additions, part.additions, *sizes, is_outer=is_outer)
            if any(placement.dim is not None for placement in found):
                sums.append(found)
    pairs = itertools.product(dict.fromkeys([*sums, ()]), dict.fromkeys(draws))
    return [Rule(dims, (), of_draws, sums=of_sums) for of_sums, of_draws in pairs]


def _cut(subject: _Subject, dims: Dims, start: int, stop: int) -> list[torch.Tensor]:
    return [
        leaf if dim is None else cutting.cut_tensor(leaf, dim, start, stop)
        for leaf, dim in zip(subject.leaves, dims, strict=True)
    ]


def _test_shards(
    subject: _Subject, whole: _Whole, rule: Rule, bounds: Sequence[tuple[int, int]]
) -> Rule:
    """Test that shards have the outputs of the whole call, and leave the same state.

    One shard is enough where there is no batch norm, since samples are independent.

    Args:
        subject: the module.
        whole: the whole call.
        rule: without its outputs.
        bounds: of all shards.
    """
    batch = bounds[-1][1]
    outputs: Dims | None = None
    parts: list[PartSums] = []
    needs_all = whole.sums.values or rule.placements or rule.sums
    for start, stop in bounds if needs_all else bounds[:1]:
        parts.append(PartSums(whole.sums))
        try:
            context = _shard(parts[-1], rule, start, stop, batch)
            shard = subject.call(_cut(subject, rule.inputs, start, stop), context)
        except _RaisedError as error:
            raise _RefusedError(f"raises {error} on a part of the batch", 1) from None
        if outputs is None:
            outputs = _find_output_dims(whole.outcome, shard, rule, batch, stop - start)
        elif outputs != _find_output_dims(whole.outcome, shard, rule, batch, stop - start):
            raise _RefusedError("returns other shapes for another part of the batch", 2)
        _compare_terms(whole.outcome, shard, start, stop, batch)
        _compare_rows(whole.outcome, shard, outputs, start, stop)
        _compare_states(whole.outcome, shard)
    assert outputs is not None
    _compare_sums(whole, parts, whole.outcome.tensors)
    output_dims = tuple(tensor.dim() for tensor in whole.outcome.tensors)
    return Rule(rule.inputs, outputs, rule.placements, output_dims, rule.sums)


def _shard(sums: PartSums, rule: Rule, start: int, stop: int, batch: int) -> _Context:
    return _enter(rule, start, stop, batch, sums.add_up, sums.add_up_gradients)


def _compare_terms(whole: _Outcome, shard: _Outcome, start: int, stop: int, batch: int) -> None:
    """Test that what a shard adds up over samples are the rows of what the whole call adds up."""
    if len(whole.terms) != len(shard.terms):
        raise _RefusedError("adds up something else for another part of the batch", 3)
    rows = Rows(start, stop, batch)
    for (placement, terms), (_, part) in zip(whole.terms, shard.terms, strict=True):
        if not are_close(placement.take(terms, rows), part, tolerance_of(part)):
            raise _RefusedError("mixes samples in what it adds up over them", 4)


def _compare_rows(whole: _Outcome, shard: _Outcome, outputs: Dims, start: int, stop: int) -> None:
    """Test that a shard's outputs are the rows of the whole call's."""
    for index, (tensor, part, dim) in enumerate(
        zip(whole.tensors, shard.tensors, outputs, strict=True)
    ):
        rows = tensor if dim is None else tensor.narrow(dim, start, stop - start)
        if not are_close(rows, part, tolerance_of(rows)):
            raise _RefusedError(
                f"mixes samples: its output{_number(index, whole)} depends on the number of "
                "samples",
                4,
            )


def _compare_sums(
    whole: _Whole, parts: Sequence[PartSums], tensors: Sequence[torch.Tensor]
) -> None:
    """Test that what shards add up for their batch norms makes the sums of the whole call.

    Args:
        whole: the whole call.
        parts: of all shards.
        tensors: by whose types rounding is judged.
    """
    if whole.sums.values and not have_sums_of_whole(parts, _tolerance_of_sums(tensors)):
        raise _RefusedError("adds up over more than the samples", 4)


def _tolerance_of_sums(outputs: Iterable[torch.Tensor]) -> float:
    """Return the relative difference that rounding may make in sums over samples."""
    found = [tensor for tensor in outputs if tensor.is_floating_point()]
    accelerator = device.accelerator_in_use()
    types = ["cpu"] if accelerator is None else ["cpu", accelerator.type]
    if any(map(torch.is_autocast_enabled, types)):
        found.append(torch.empty(0, dtype=torch.bfloat16, device="cpu"))
    return max(map(tolerance_of, found or [torch.empty(0, dtype=torch.float32, device="cpu")]))


def _find_output_dims(whole: _Outcome, shard: _Outcome, rule: Rule, batch: int, rows: int) -> Dims:
    """Return the dimensions of the outputs that count samples."""
    if whole.structure != shard.structure:
        raise _RefusedError("returns something else for a part of the batch", 2)
    found: list[int | None] = []
    for tensor, part in zip(whole.tensors, shard.tensors, strict=True):
        pairs = list(zip(tensor.shape, part.shape, strict=False))
        unlike = [dim for dim, (size, of_part) in enumerate(pairs) if size != of_part]
        if tensor.dim() != part.dim() or len(unlike) > 1:
            shapes = f"{tuple(tensor.shape)} for {batch} samples and {tuple(part.shape)} for {rows}"
            raise _RefusedError(f"mixes samples: its output has the shape {shapes}", 2)
        if unlike and pairs[unlike[0]] != (batch, rows):
            raise _RefusedError("returns sizes that depend on the samples", 2)
        if not unlike and not have_equal_bits(tensor, part):
            what = "a scalar" if tensor.numel() == 1 else "a tensor without a row for each sample"
            raise _RefusedError(f"returns {what} that depends on the samples", 3)
        found.append(unlike[0] if unlike else None)
    if not rule.sums and not any(dim is not None for dim in found):
        raise _RefusedError("returns nothing with a row for each sample", 2)
    return tuple(found)


def _test_independence(
    subject: _Subject, whole: _Whole, rule: Rule, start: int, stop: int, nearest: bool
) -> None:
    """Test that some rows of the output keep their bits if all other samples are replaced.

    Args:
        subject: the module.
        whole: the whole call.
        rule: to be tested.
        start, stop: the first row that is kept and the row after the last.
        nearest: replace the others by the nearest row that is kept, which keeps rows in an order
            that they have; else by others with noise where the module accepts those.
    """
    given = subject.leaves
    batch = cutting.batch_size(rule, given)
    assert batch is not None
    try:
        if nearest:
            raise _RaisedError
        replaced = replace_others(given, rule.inputs, start, stop)
        other = subject.call(replaced, whole.observing(), dims=rule.inputs)
    except _RaisedError:
        nearest_rows = torch.arange(batch).clamp(start, stop - 1)
        try:
            taken = take_rows(given, rule.inputs, nearest_rows)
            other = subject.call(taken, whole.observing(), dims=rule.inputs)
        except _RaisedError as error:
            raise _RefusedError(f"raises {error} if other samples change", 1) from None
    if other.kept:  # the whole call had the same shapes, so this is not the filling of a cache
        raise _RefusedError("keeps tensors of its forward pass", 5)
    if other.structure != whole.outcome.structure:
        raise _RefusedError("returns something else if other samples change", 4)
    for is_followed, dim in zip(other.followed, rule.outputs, strict=True):
        if is_followed and dim is None:
            raise _RefusedError(
                "mixes samples: it returns a tensor without a row for each of them", 3
            )
    if other.reads_followed and has_numbers(other.structure):
        raise _RefusedError("reads numbers from samples and returns numbers", 3)
    for index, (tensor, changed, dim) in enumerate(
        zip(whole.outcome.tensors, other.tensors, rule.outputs, strict=True)
    ):
        before, after = tensor, changed
        if tensor.shape == changed.shape and dim is not None:
            before, after = (t.narrow(dim, start, stop - start) for t in (tensor, changed))
        what = f"its output{_number(index, whole.outcome)} for a sample differs"
        _compare_bits(subject, before, after, what)
    if len(other.terms) != len(whole.outcome.terms):
        raise _RefusedError("adds up something else if other samples change", 4)
    for (placement, terms), (_, changed) in zip(whole.outcome.terms, other.terms, strict=True):
        rows = Rows(start, stop, batch)
        before, after = (placement.take(found, rows) for found in (terms, changed))
        _compare_bits(subject, before, after, "what it adds up for a sample differs")
    _compare_states(whole.outcome, other)


def _compare_bits(subject: _Subject, before: torch.Tensor, after: torch.Tensor, what: str) -> None:
    """Test that the rows of some samples are equal but for rounding if other samples change, and
    note whether there was any."""
    if not have_equal_bits(before, after):
        subject.has_rounding = True
    if not are_close(before, after, rounding_of(before)):
        raise _RefusedError(f"mixes samples: {what} if other samples change", 5)


def _compare_states(whole: _Outcome, other: _Outcome) -> None:
    """Test that two calls leave the module and the generators in the same state."""
    if not whole.generators.equal(other.generators):
        raise _RefusedError("draws random numbers that depend on the samples", 3)
    _compare_values(whole.state, other.state)


def _compare_values(state: list[tuple[str, Any]], other: list[tuple[str, Any]]) -> None:
    """Test that two states of the module are the same (see ``Copier.state``)."""
    for (name, value), (other_name, other_value) in zip(state, other, strict=False):
        if name != other_name or not _is_same_value(value, other_value):
            raise _RefusedError(f"keeps in '{name}' what depends on the samples", 4)
    if len(state) != len(other):
        raise _RefusedError("keeps what depends on the samples", 4)


def _is_same_value(value: Any, other: Any) -> bool:
    if isinstance(value, torch.Tensor) and isinstance(other, torch.Tensor):
        return have_equal_bits(value.detach(), other.detach())
    return type(value) is type(other) and (value == other or repr(value) == repr(other))


def _test_gradients(subject: _Subject, rule: Rule, bounds: Sequence[tuple[int, int]]) -> None:
    """Test that gradients of shards, scaled by their number, average to those of the whole call."""
    noise = torch.Generator().manual_seed(SEED)
    sums = WholeSums()
    batch = bounds[-1][1]
    context = _enter(rule, 0, batch, batch, sums.add_up, sums.add_up)
    recorded = subject.record(subject.leaves, context)
    gradients = [draw_normal(tensor, noise) for tensor in recorded.outputs]
    weights = list(subject.weights.values())
    expected = _backward_without_traces(subject, recorded, gradients)
    state = _detached(recorded.state())
    del recorded
    totals: list[torch.Tensor | None] = [None] * len(weights)
    whole_dims: Dims = (None,) * len(weights)
    of_bases: list[list[torch.Tensor | None]] = []
    parts: list[PartSums] = []
    for start, stop in bounds:
        parts.append(PartSums(sums))
        context = _shard(parts[-1], rule, start, stop, batch)
        part = subject.record(_cut(subject, rule.inputs, start, stop), context)
        parts[-1].scale = len(bounds)
        scaled = [
            gradient if dim is None else len(bounds) * gradient.narrow(dim, start, stop - start)
            for gradient, dim in zip(gradients, rule.outputs, strict=True)
        ]
        found = _backward(part.outputs, scaled, [*weights, *part.bases])
        _compare_values(state, part.state())
        totals = [sum_present(pair) for pair in zip(totals, found, strict=False)]
        of_bases.append(found[len(weights) :])
    if sums.values and not have_sums_of_whole(parts, _tolerance_of_sums(part.outputs)):
        raise _RefusedError("has a backward pass that mixes samples in its sums over them", 6)
    for dim, *pieces in zip(rule.inputs, *of_bases, strict=True):
        present = [piece for piece in pieces if piece is not None]
        joined = torch.cat(present, dim) if present and dim is not None else sum_present(pieces)
        totals.append(joined)
    _compare_gradients(expected, totals, (*whole_dims, *rule.inputs), len(bounds))


def _backward_without_traces(
    subject: _Subject, recorded: _Recorded, gradients: Sequence[torch.Tensor]
) -> list[torch.Tensor | None]:
    """Make the backward call of a whole call, and test that it neither keeps gradients nor reads
    them, as a hook on an inner tensor may. Returns the gradients of the weights and of the
    leaves."""
    observer = Observer()
    observer.follow(gradients)
    wanted = [*subject.weights.values(), *recorded.bases]
    with observer:
        found = _backward(recorded.outputs, gradients, wanted)
    recorded.outputs.clear()
    in_use = [*found, *(value for _, value in recorded.state() if isinstance(value, torch.Tensor))]
    kept = observer.find_kept() - {storage_address(t) for t in in_use if t is not None}
    subject.kept |= kept
    if kept or observer.reads_followed:
        raise _RefusedError("keeps or reads gradients in its backward pass", 6)
    return found


def _detached(state: Iterable[tuple[str, Any]]) -> list[tuple[str, Any]]:
    """Return the state of a module without the graphs behind it."""
    return [
        (name, value.detach() if isinstance(value, torch.Tensor) else value)
        for name, value in state
    ]


def _compare_gradients(
    expected: Sequence[torch.Tensor | None],
    totals: Sequence[torch.Tensor | None],
    dims: Dims,
    count: int,
) -> None:
    """Test that gradients agree.

    Args:
        expected: of the whole call.
        totals: sums over ``count`` shards; of inputs that were cut, the rows of all shards.
        dims: along which inputs were cut.
        count: number of shards.
    """
    largest = max((largest_magnitude(gradient) for gradient in expected), default=0.0)
    for gradient, total, _ in zip(expected, totals, dims, strict=True):
        if gradient is None and total is None:
            continue
        mean = None if total is None else total / count
        one, other = (or_zeros(a, b) for a, b in ((gradient, mean), (mean, gradient)))
        bound = tolerance_of(one) * max(largest_magnitude(one), _GRADIENT_FLOOR * largest)
        if one.shape != other.shape or not largest_magnitude(one - other) <= bound:
            raise _RefusedError("has a backward pass that is not linear or mixes samples", 6)


def _backward(
    outputs: Sequence[torch.Tensor], gradients: Sequence[torch.Tensor], wanted: list[torch.Tensor]
) -> list[torch.Tensor | None]:
    """Make a backward call that nothing watches, and take the gradients of some leaves.

    Gradients are accumulated, because checkpoints that recompute with a backward call of their own
    need that.
    """
    pairs = [(t, g) for t, g in zip(outputs, gradients, strict=True) if t.requires_grad]
    if pairs:
        tensors, given = zip(*pairs, strict=True)
        try:
            with shards.tested_backward():
                run_backward(tensors, given, False, False, (), True, accumulate_grad=True)
        except UnshareableError as error:
            raise _RefusedError(str(error), 6) from None
        except Exception as error:  # noqa: BLE001 - whatever the program's functions raise
            name = type(error).__name__
            raise _RefusedError(f"raises {name} in its backward pass", 6) from None
    found = [
        leaf.grad.to_dense() if leaf.grad is not None and leaf.grad.is_sparse else leaf.grad
        for leaf in wanted
    ]
    for leaf in wanted:
        leaf.grad = None
    return found


def _number(index: int, outcome: _Outcome) -> str:
    return f" {index}" if len(outcome.tensors) > 1 else ""
