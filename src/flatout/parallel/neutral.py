"""Calling a module for a test, so that the program does not notice, and watching what it does."""

from __future__ import annotations

import contextlib
import gc
import logging
import random
import sys
import threading
import types
import warnings
from collections.abc import Collection, Iterable, Iterator, Mapping
from typing import Any

import torch
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode

from flatout.intercept import device, objects
from flatout.intercept.nested import tensors_in
from flatout.parallel import devices, shards
from flatout.parallel.kinds import SCALARS

_SIZES_ONLY = ("empty_like", "zeros_like", "ones_like", "full_like", "new_")
"""Beginnings of the names of operators that read only the sizes of what they are given."""

_IGNORE_ALL = ("ignore", None, Warning, None, 0)
"""An entry of ``warnings.filters``."""


@contextlib.contextmanager
def unnoticed() -> Iterator[None]:
    """A context in which this thread prints nothing and warns of nothing, float32 is computed as
    such, and after which the generators of random numbers are as they were."""
    generators = Generators()
    is_cache_enabled = torch.is_autocast_cache_enabled()
    with _silenced(), devices.exact_matmuls():
        # The cache would keep the copies' weights in half precision.
        torch.set_autocast_cache_enabled(False)
        try:
            yield
        finally:
            torch.set_autocast_cache_enabled(is_cache_enabled)
            generators.restore()


class _Stream:
    """Stands for a stream of the program, and drops what one thread writes."""

    def __init__(self, stream: Any) -> None:
        self._stream = stream
        self._thread = threading.get_ident()

    def write(self, text: str) -> Any:
        if threading.get_ident() == self._thread:
            return len(text)
        return self._stream.write(text)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


@contextlib.contextmanager
def _silenced() -> Iterator[None]:
    """A context in which this thread prints nothing and warns of nothing.

    What is warned of only once is warned of afterwards. ``warnings.catch_warnings`` would make
    Python forget which warnings it has shown.
    """
    streams = sys.stdout, sys.stderr
    warns_always = torch.is_warn_always_enabled()
    disabled_level = logging.root.manager.disable
    sys.stdout, sys.stderr = map(_Stream, streams)
    warnings.filters.insert(0, _IGNORE_ALL)  # type: ignore[attr-defined]
    torch.set_warn_always(True)  # a warning that is shown once is not used up then
    logging.root.manager.disable = logging.CRITICAL
    try:
        yield
    finally:
        logging.root.manager.disable = disabled_level
        torch.set_warn_always(warns_always)
        warnings.filters.remove(_IGNORE_ALL)  # type: ignore[attr-defined]
        sys.stdout, sys.stderr = streams


class Generators:
    """The states of the global generators of random numbers when this was made."""

    def __init__(self) -> None:
        self._torch = torch.get_rng_state()
        self._python = random.getstate()
        self._numpy: Any = sys.modules.get("numpy.random")
        self._numpy_state = None if self._numpy is None else self._numpy.get_state()
        accelerator = device.accelerator_in_use()
        self._device = None if accelerator is None else torch.get_device_module(accelerator)
        self._device_states = [] if self._device is None else self._device.get_rng_state_all()

    def equal(self, other: Generators) -> bool:
        """Whether the states are those of ``other``."""
        return (
            torch.equal(self._torch, other._torch)
            and self._python == other._python
            and (self._numpy is None or repr(self._numpy_state) == repr(other._numpy_state))
            and self.equal_on_device(other)
        )

    def equal_on_device(self, other: Generators) -> bool:
        """Whether the states of the accelerator's generators are those of ``other``."""
        return all(map(torch.equal, self._device_states, other._device_states))

    def restore(self) -> None:
        """Put the states back."""
        torch.set_rng_state(self._torch)
        random.setstate(self._python)
        if self._numpy is not None:
            self._numpy.set_state(self._numpy_state)
        if self._device is not None:
            self._device.set_rng_state_all(self._device_states)


def seed_generators(seed: int) -> None:
    """Seed the global generators of the CPU."""
    torch.default_generator.manual_seed(seed)
    random.seed(seed)
    if "numpy.random" in sys.modules:
        sys.modules["numpy.random"].seed(seed)


class Observer(TorchDispatchMode):
    """Watches the operators of a call.

    Attributes:
        normalises_over_batch: whether a batch norm took its statistics from the batch, without
            that ``norms`` has seen it.
        draws_unseen: whether an operator may have drawn from a generator of an accelerator, without
            that ``draws`` has seen it.
        reads_followed: whether a number was read from a tensor that is followed.
    """

    def __init__(self) -> None:
        super().__init__()
        self.normalises_over_batch = False
        self.draws_unseen = False
        self.reads_followed = False
        self._followed: set[int] = set()
        self._generators: dict[int, tuple[torch.Generator, torch.Tensor]] = {}
        self._given: dict[int, StorageWeakRef] = {}
        self._made: dict[int, StorageWeakRef] = {}

    def dispatch(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        """Call an operator for torch, and note what it does."""
        kwargs = kwargs or {}
        generator = kwargs.get("generator")
        if isinstance(generator, torch.Generator) and id(generator) not in self._generators:
            self._generators[id(generator)] = generator, generator.get_state()
        if "batch_norm" in func.__name__ and _takes_statistics(func, args, kwargs):
            self.normalises_over_batch = True
        given = list(tensors_in((args, kwargs)))
        for tensor in given:
            self._note(tensor, self._given, self._made)
        shard = shards.current()
        drawn = 0 if shard is None else shard.drawn
        result = func(*args, **kwargs)
        made = list(tensors_in(result))
        may_draw = torch.Tag.nondeterministic_seeded in func.tags
        if may_draw and shard is not None and shard.drawn == drawn:
            self.draws_unseen |= not all(tensor.is_cpu for tensor in (*given, *made))
        for tensor in made:
            self._note(tensor, self._made, self._given)
        if self._followed and any(map(self.is_followed, given)):
            self.reads_followed |= func is torch.ops.aten._local_scalar_dense.default
            if not func.__name__.startswith(_SIZES_ONLY):
                self.follow(made or given)
        return result

    def follow(self, tensors: Iterable[torch.Tensor]) -> None:
        """Follow what is computed from some tensors."""
        self._followed.update(t.untyped_storage()._cdata for t in tensors if _has_storage(t))

    def is_followed(self, tensor: torch.Tensor) -> bool:
        """Whether a tensor was computed from those that are followed."""
        return _has_storage(tensor) and tensor.untyped_storage()._cdata in self._followed

    def restore_generators(self) -> bool:
        """Put generators back that operators were given; returns whether they had advanced."""
        advanced = [
            (generator, state)
            for generator, state in self._generators.values()
            if not torch.equal(generator.get_state(), state)
        ]
        for generator, state in advanced:
            generator.set_state(state)
        return bool(advanced)

    def has_seen(self, tensors: Iterable[torch.Tensor]) -> bool:
        """Whether an operator was given one of some tensors of the program."""
        return any(tensor.untyped_storage()._cdata in self._given for tensor in tensors)

    def find_kept(self, known: Collection[int] = ()) -> set[int]:
        """Return the addresses of the storages that operators have made and that still live, after
        all results were released.

        Args:
            known: addresses that are left out.
        """
        found = {address: made for address, made in self._made.items() if address not in known}
        if not all(made.expired() for made in found.values()):
            gc.collect()
        return {address for address, made in found.items() if not made.expired()}

    @staticmethod
    def _note(
        tensor: torch.Tensor, into: dict[int, StorageWeakRef], others: dict[int, StorageWeakRef]
    ) -> None:
        if _has_storage(tensor):
            storage = tensor.untyped_storage()
            if storage._cdata not in into and storage._cdata not in others:
                # A weak reference keeps the address from being used again.
                into[storage._cdata] = StorageWeakRef(storage)


# Torch would wrap a method of this name in the class, and import its compiler to call it.
Observer.__torch_dispatch__ = Observer.dispatch  # type: ignore[assignment]


def _has_storage(tensor: torch.Tensor) -> bool:
    return tensor.layout is torch.strided and not tensor.is_nested


def _takes_statistics(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    """Whether a batch norm computes mean and variance over samples. Instance norm, which runs a
    batch norm with the samples as channels, has a batch of 1."""
    is_part = any(word in func.__name__ for word in ("backward", "update_stats"))
    if is_part or args[0].shape[0] == 1:
        return False
    names = [argument.name for argument in func._schema.arguments]
    given = {**dict(zip(names, args, strict=False)), **kwargs}
    return bool(given.get("training", given.get("train", True)))


@contextlib.contextmanager
def scalars_kept(root: Any) -> Iterator[None]:
    """A context after which numbers and texts have the values that they had before, in the classes
    of a module tree and in the namespaces of the packages that these come from."""
    classes = {
        base
        for module in objects.modules(root)
        for base in objects.mro(type(module))
        if not _is_of_torch(objects.namespace(base).get("__module__"))
    }
    packages = {
        str(objects.namespace(base).get("__module__")).partition(".")[0] for base in classes
    }
    namespaces = [
        vars(found)
        for name, found in list(sys.modules.items())
        if name.partition(".")[0] in packages and type(found) is types.ModuleType
    ]
    of_classes = [(base, _scalars(objects.namespace(base))) for base in classes]
    of_namespaces = [(namespace, _scalars(namespace)) for namespace in namespaces]
    try:
        yield
    finally:
        for namespace, before in of_namespaces:
            namespace.update(_changed(namespace, before))
        for base, before in of_classes:
            for name, value in _changed(objects.namespace(base), before).items():
                type.__setattr__(base, name, value)


def _is_of_torch(defined_in: Any) -> bool:
    return str(defined_in).partition(".")[0] in ("torch", "flatout", "builtins", "typing", "abc")


def _scalars(namespace: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in list(namespace.items()) if type(value) in SCALARS}


def _changed(namespace: Mapping[str, Any], before: dict[str, Any]) -> dict[str, Any]:
    """Return the values before of the names that have another value now."""
    return {
        name: value for name, value in before.items() if namespace.get(name, before) is not value
    }


def release_kept(addresses: set[int]) -> None:
    """Take tensors out of lists and dictionaries of the program that a test has put there.

    Args:
        addresses: of the storages (see ``Observer.find_kept``).
    """

    def is_kept(value: Any) -> bool:
        return (
            issubclass(type(value), torch.Tensor)
            and value.layout is torch.strided
            and value.untyped_storage()._cdata in addresses
        )

    for container in gc.get_objects():
        if type(container) is list and any(map(is_kept, container)):
            container[:] = [value for value in container if not is_kept(value)]
        elif type(container) is dict and any(map(is_kept, list(container.values()))):
            for key in [key for key, value in container.items() if is_kept(value)]:
                del container[key]
