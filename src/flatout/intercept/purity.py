"""Find out whether a sample is a function of its index and of data that can be compared.

The bytecode that fetches a sample is analysed: ``__getitem__`` of the dataset, and everything that
it may call. A dataset is rejected if its code has side effects, or does anything that is not known
to have none. The analysis follows the names that code looks up in objects, globals and closures.
They refer to functions, which are analysed in turn, and to data, on which the sample depends. The
data are digested; those that are read only at the sample's index (``self.x[index]``) row by row.

If two digests are equal, the samples are equal. Digests are computed anew each time, because a
program can replace a function or data at any time.
"""

from __future__ import annotations

import abc
import builtins
import dis
import enum
import functools
import hashlib
import re
import sys
import types
import weakref
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import PosixPath
from typing import Any, NamedTuple

import torch
from torch.utils import data
from torch.utils.data._utils import collate
from torch.utils.data._utils.collate import default_collate

from flatout.intercept.harmless import (
    ATTRIBUTES,
    BASES,
    HARMLESS_INSTRUCTIONS,
    KEYWORDS,
    LIFE,
    MAKE_TEXT,
    READING_ATTRIBUTES,
    REASONS,
    TEXTS,
    WITHOUT_EFFECT,
    known_function,
    register_modules,
)

MOST_BYTES = 1 << 20
"""Maximum size of the data that may be read other than at the sample's index; digesting them takes
1 ms."""

MOST_VALUES = 2_000
"""Maximum number of Python objects among these data; visiting them takes about 1 ms."""

Row = tuple[tuple["MapIndices", ...], Any]
"""Data that are read at a sample's index, and the functions that map the index before."""

MapIndices = Callable[[Sequence[int]], Sequence[int]]
"""Maps indices of a dataset such as a subset to indices of the dataset inside of it."""


class ImpureError(Exception):
    """A sample may depend on more than its index and data; the message is a clause that says
    why."""


class Account(NamedTuple):
    """What the samples of a dataset depend on.

    Attributes:
        draws: whether they may draw random numbers.
        opens: whether they may read files.
        seal: the digest of everything that all samples depend on.
        rows: the data of which each sample depends only on the row at its index.
    """

    draws: bool
    opens: bool
    seal: bytes
    rows: tuple[Row, ...]

    def digest(self, indices: Sequence[int]) -> bytes:
        """The digest of everything that the samples at ``indices`` depend on.

        Raises:
            ImpureError: there are no data at an index, or data that cannot be digested.
        """
        analysis = _Analysis()
        analysis.digest_text(self.seal, *indices)
        for maps, source in self.rows:
            mapped = indices
            try:
                for map_indices in maps:
                    mapped = map_indices(mapped)
                _digest_rows(analysis, source, mapped)
            except (IndexError, KeyError, TypeError, ValueError) as error:
                raise ImpureError("there is no data at an index") from error
        if analysis.functions or analysis._objects:
            raise ImpureError("there are functions or objects in its lists")
        return analysis.hash.digest()


def examine(dataset: Any, collate_fn: Any) -> Account:
    """Find out what the samples of a map-style dataset depend on.

    Args:
        dataset: the dataset.
        collate_fn: the loader's function that collates samples into a batch.

    Raises:
        ImpureError: they are not known to be functions of their index and of data.
    """
    if collate_fn is not default_collate:
        raise ImpureError("its loader has a collate_fn")
    if not is_torchs_own():
        raise ImpureError("the program has changed torch's datasets, or how torch collates samples")
    register_modules()
    analysis = _Analysis()
    analysis.digest_text(*_global_state())
    analysis.dataset(dataset, ())
    analysis.finish()
    digest = analysis.hash.digest()
    return Account(analysis.draws, analysis.opens, digest, tuple(analysis.rows))


_COLLATE = dict(collate.default_collate_fn_map)
_DATASETS = {
    kind: dict(vars(kind)) for kind in (data.TensorDataset, data.Subset, data.ConcatDataset)
}


def is_torchs_own() -> bool:
    """Whether the program has left torch's datasets and its ``default_collate`` unchanged."""
    return collate.default_collate_fn_map == _COLLATE and all(
        vars(kind) == originals for kind, originals in _DATASETS.items()
    )


def _global_state() -> tuple[Any, ...]:
    """The settings of torch, NumPy and Pillow that any function may depend on.

    Raises:
        ImpureError: a mode of the program observes each operator.
    """
    if torch._C._len_torch_function_stack() or torch._C._len_torch_dispatch_stack():
        raise ImpureError("a torch function or dispatch mode is active")
    numpy, image, file = map(sys.modules.get, ("numpy", "PIL.Image", "PIL.ImageFile"))
    return (
        *(torch.get_default_dtype(), torch.is_grad_enabled(), torch.is_inference_mode_enabled()),
        *(torch.is_autocast_enabled("cpu"), torch.get_autocast_dtype("cpu")),
        torch.are_deterministic_algorithms_enabled(),
        numpy and sorted(numpy.geterr().items()),
        image and image.MAX_IMAGE_PIXELS,
        file and file.LOAD_TRUNCATED_IMAGES,
    )


# Code

_RENAMED = {
    "LOAD_METHOD": "LOAD_ATTR",
    "LOAD_FAST_BORROW": "LOAD_FAST",
    "LOAD_FAST_CHECK": "LOAD_FAST",
    "LOAD_FAST_AND_CLEAR": "LOAD_FAST",
    "LOAD_FAST_LOAD_FAST": "LOAD_FAST",
    "LOAD_FAST_BORROW_LOAD_FAST_BORROW": "LOAD_FAST",
}


class _Name(NamedTuple):
    """A name that code looks up, with a chain of attributes, such as ``self.data.x``.

    Attributes:
        root: ``"global"``, ``"free"`` (a closure's variable) or ``"first"`` (the first argument).
        name: the name of the variable.
        attributes: the chain of attributes.
        use: ``"row"``: it is indexed by the second argument; ``"len"``: only its length is used;
            else ``"whole"``.
    """

    root: str
    name: str
    attributes: tuple[str, ...]
    use: str


class _Code(NamedTuple):
    """What the analysis of a code object has shown.

    Attributes:
        digest: the digest of its bytecode and constants.
        lookups: the names that it looks up.
        attributes: the names of attributes that it uses of other values.
        inner: the code of functions that it creates.
        refusal: the first thing it does that has side effects; ``None``: there is none.
    """

    digest: bytes
    lookups: tuple[_Name, ...]
    attributes: frozenset[str]
    inner: tuple[types.CodeType, ...]
    refusal: str | None


def _instructions(code: types.CodeType) -> Iterator[tuple[str, Any, str]]:
    """The name, argument and argument text of each instruction, for all versions of CPython."""
    for instruction in dis.get_instructions(code):
        name, value = instruction.opname, instruction.argval
        if name in WITHOUT_EFFECT:
            continue
        if name == "BINARY_OP" and instruction.argrepr == "[]":
            name = "BINARY_SUBSCR"
        if name in ("STORE_FAST_LOAD_FAST", "STORE_FAST_STORE_FAST"):
            first, second = value
            yield "STORE_FAST", first, ""
            yield name.removeprefix("STORE_FAST_"), second, ""
            continue
        name = _RENAMED.get(name, name)
        for part in value if name == "LOAD_FAST" and type(value) is tuple else (value,):
            yield name, part, instruction.argrepr


_analysed: weakref.WeakKeyDictionary[types.CodeType, _Code] = weakref.WeakKeyDictionary()


def _analyse(code: types.CodeType) -> _Code:
    """The analysis of a code object, from a cache."""
    if code not in _analysed:
        _analysed[code] = _analyse_anew(code)
    return _analysed[code]


def _analyse_anew(code: types.CodeType) -> _Code:
    instructions = list(_instructions(code))
    refusal = None
    for constant in code.co_consts:
        if type(constant) is tuple and not KEYWORDS.isdisjoint(map(str, constant)):
            refusal = "passes an argument that gives functions side effects"
    for name, value, text in instructions:
        refusal = refusal or _objection(code, name, value, text)
    lookups, attributes = _find_names(code, instructions)
    if _makes_text(code, instructions):
        attributes |= TEXTS
    inner = tuple(const for const in code.co_consts if isinstance(const, types.CodeType))
    digest = hashlib.blake2b(code.co_code, digest_size=16)
    consts = [c for c in code.co_consts if not isinstance(c, types.CodeType)]
    for part in (consts, code.co_names, code.co_varnames, code.co_freevars, code.co_cellvars):
        digest.update(repr(part).encode(errors="surrogatepass"))
    return _Code(digest.digest(), tuple(lookups), frozenset(attributes), inner, refusal)


def _find_names(
    code: types.CodeType, instructions: list[tuple[str, Any, str]]
) -> tuple[list[_Name], set[str]]:
    """The names that code looks up, and the attributes that it uses of other values."""
    arguments = code.co_varnames[: code.co_argcount]
    stored = {value for name, value, _ in instructions if name in ("STORE_FAST", "DELETE_FAST")}
    stored |= {value for name, value, _ in instructions if name == "STORE_DEREF"}
    first = arguments[0] if arguments and arguments[0] not in stored else None
    second = arguments[1] if len(arguments) > 1 and arguments[1] not in stored else None
    lookups: list[_Name] = []
    attributes: set[str] = set()
    at = 0
    while at < len(instructions):
        name, value, _ = instructions[at]
        at += 1
        if name == "LOAD_GLOBAL":
            root = "global"
        elif name in ("LOAD_FAST", "LOAD_DEREF") and value == first:
            root = "first"
        elif name == "LOAD_DEREF" and value in code.co_freevars:
            root = "free"
        else:
            if name == "LOAD_ATTR":
                attributes.add(value)
            continue
        begin = at
        while at < len(instructions) and instructions[at][0] == "LOAD_ATTR":
            at += 1
        chain = tuple(value for _, value, _ in instructions[begin:at])
        after = [(name, value) for name, value, _ in instructions[at : at + 2]]
        before = instructions[begin - 2][:2] if begin > 1 else None
        use = "whole"
        if second and after == [("LOAD_FAST", second), ("BINARY_SUBSCR", after[-1][1])]:
            use = "row"
        elif before == ("LOAD_GLOBAL", "len") and after[:1] in (
            [("CALL", 1)],
            [("CALL_FUNCTION", 1)],
        ):
            use = "len"
        lookups.append(_Name(root, value, chain, use))
    return lookups, attributes


def _makes_text(code: types.CodeType, instructions: list[tuple[str, Any, str]]) -> bool:
    """Whether code may convert an object to text."""
    return (
        any(name.startswith("FORMAT") for name, _, _ in instructions)
        or not MAKE_TEXT.isdisjoint(code.co_names)
        or any(isinstance(const, str) and "%" in const for const in code.co_consts)
    )


def _objection(code: types.CodeType, name: str, value: Any, text: str) -> str | None:
    """What an instruction does, in words, if it may have side effects."""
    if name == "BINARY_OP" and text.endswith("="):
        return "changes a value in place"
    if name == "BINARY_OP" and text == "@":
        return "multiplies matrices"
    if name == "STORE_DEREF" and (value in code.co_freevars or value in code.co_varnames):
        return "sets a variable of another function"
    if name == "LOAD_GLOBAL" and value == "super":
        return "calls super()"
    if name not in HARMLESS_INSTRUCTIONS:
        return REASONS.get(name, f"runs an instruction that may have side effects ({name})")
    return None


# The analysis

_PLAIN = (int, float, complex, bool, str, bytes, type(None), type(Ellipsis))
_UNKNOWN = object()
"""Stands for a value that the analysis does not know."""


class _Analysis:
    """Visits everything that a sample may depend on, and computes its digest.

    Attributes:
        hash: the digest so far.
        draws: whether a function that may draw random numbers has been found.
        opens: whether a function that may read files has been found.
        rows: see ``Account``.
        functions: how many functions have been found.
    """

    def __init__(self) -> None:
        self.hash = hashlib.blake2b(digest_size=16)
        self.draws = self.opens = False
        self.rows: list[Row] = []
        self.functions = 0
        self._names: set[str] = set()
        self._objects: list[Any] = []
        self._seen: set[tuple[Any, ...]] = set()
        self._alive: list[Any] = []  # keeps objects alive, so that identities stay unique
        self._values = 0
        self._bytes = 0

    def digest_text(self, *values: Any) -> None:
        """Add values to the digest that are determined by their ``repr``."""
        for value in values:
            self.hash.update(repr(value).encode(errors="surrogatepass") + b"\0")

    def finish(self) -> None:
        """Follow attributes of values of unknown type in all objects that they may belong to."""
        done: set[tuple[int, str]] = set()
        while True:
            remaining = [
                (value, name)
                for value in self._objects
                for name in sorted(self._names)
                if (id(value), name) not in done
            ]
            if not remaining:
                break
            for value, name in remaining:
                done.add((id(value), name))
                if name in vars(value) or _class_attribute(value, name) is not _UNKNOWN:
                    self.follow(value, (name,), "whole", ())
        for name in sorted(self._names):
            if name in READING_ATTRIBUTES:
                self.opens = True
            elif name not in ATTRIBUTES | TEXTS:
                raise ImpureError(f"it uses {name!r} of a value that is not known")

    def dataset(self, dataset: Any, maps: tuple[MapIndices, ...]) -> None:
        """Visit a dataset that is indexed after the index has been mapped by ``maps``."""
        kind = type(dataset)
        self.digest_text(kind.__module__, kind.__qualname__)
        if kind in _DATASETS and "__getitems__" in vars(dataset):
            raise ImpureError("it fetches whole batches by __getitems__")
        if kind is data.TensorDataset:
            for tensor in _check_tuple(dataset.tensors):
                self.row(tensor, maps)
        elif kind is data.Subset:
            indices = dataset.indices
            self.row(indices, maps)
            self.dataset(
                dataset.dataset, (*maps, lambda at: [_to_int(indices[index]) for index in at])
            )
        elif kind in (list, tuple, dict):
            self.row(dataset, maps)
        else:
            self._object(dataset)
            if hasattr(kind, "__getitems__") or "__getitems__" in vars(dataset):
                raise ImpureError("it fetches whole batches by __getitems__")
            method = _class_attribute(dataset, "__getitem__")
            if type(method) is not types.FunctionType:
                raise ImpureError(f"{kind.__qualname__}.__getitem__ is no function")
            self.function(method, dataset, maps)

    def row(self, source: Any, maps: tuple[MapIndices, ...]) -> None:
        """Visit data of which only the row at the mapped index is read."""
        kind = type(source)
        if kind is torch.Tensor:
            self._tensor(source)
        elif _is_array(source):
            self._array(source)
        elif isinstance(source, data.Dataset):
            key = ("dataset", id(source), *map(id, maps))
            if key not in self._seen:
                self._seen.add(key)
                self.dataset(source, maps)
            return
        elif kind not in (list, tuple, dict, range):
            self.value(source)
            return
        if (kind is torch.Tensor and not source.dim()) or (_is_array(source) and not source.ndim):
            raise ImpureError("it indexes a tensor or an array without dimensions")
        self.digest_text(kind.__qualname__, len(source))
        self.rows.append((maps, source))

    # Code

    def function(
        self, function: types.FunctionType, first: Any, maps: tuple[MapIndices, ...] | None
    ) -> None:
        """Visit a function that is called.

        Args:
            function: the function.
            first: its first argument, or ``_UNKNOWN``.
            maps: maps the sample's index to its second argument; ``None``: that is not known.
        """
        self.functions += 1
        key = (id(function), id(first), maps is not None, *map(id, maps or ()))
        if key in self._seen:
            return
        self._seen.add(key)
        self._alive.append((function, first, maps))
        for default in function.__defaults__ or ():
            self.value(default)
        for name, default in (function.__kwdefaults__ or {}).items():
            self.digest_text(name)
            self.value(default)
        cells: dict[str, Any] = {}
        for name, cell in zip(
            function.__code__.co_freevars, function.__closure__ or (), strict=True
        ):
            try:
                cells[name] = cell.cell_contents
            except ValueError:
                raise ImpureError(f"{name!r} of {function.__qualname__} is not set") from None
        self._code(
            function.__code__, function.__qualname__, function.__globals__, cells, first, maps
        )

    def _code(
        self,
        code: types.CodeType,
        name: str,
        global_variables: Mapping[str, Any],
        cells: Mapping[str, Any],
        first: Any,
        maps: tuple[MapIndices, ...] | None,
    ) -> None:
        analysed = _analyse(code)
        if analysed.refusal is not None:
            raise ImpureError(f"{name} {analysed.refusal}")
        self.hash.update(analysed.digest)
        self._names |= analysed.attributes
        for lookup in analysed.lookups:
            if lookup.root == "first":
                value = first
            elif lookup.root == "free":
                value = cells[lookup.name]
            elif lookup.name in global_variables:
                value = global_variables[lookup.name]
            elif hasattr(builtins, lookup.name):
                value = getattr(builtins, lookup.name)
            else:
                raise ImpureError(f"{name} uses {lookup.name!r}, which is not set")
            use = "whole" if lookup.use == "row" and maps is None else lookup.use
            self.follow(value, lookup.attributes, use, maps or ())
        arguments = code.co_varnames[: code.co_argcount]
        own_cells = {
            variable: first if arguments[:1] == (variable,) else _UNKNOWN
            for variable in code.co_cellvars
        }
        for inner in analysed.inner:
            inner_cells = {
                variable: own_cells.get(variable, cells.get(variable, _UNKNOWN))
                for variable in inner.co_freevars
            }
            self._code(inner, name, global_variables, inner_cells, _UNKNOWN, None)

    def follow(
        self, value: Any, attributes: tuple[str, ...], use: str, maps: tuple[MapIndices, ...]
    ) -> None:
        """Visit the attribute of an attribute ... of a value; see ``_Name.use`` for ``use``."""
        for at, name in enumerate(attributes):
            rest = attributes[at + 1 :]
            if value is _UNKNOWN:
                self._names |= {name, *rest}
                return
            if isinstance(value, types.ModuleType):
                self.digest_text(value.__name__, name)
                if name not in vars(value) and value.__name__ == "numpy":
                    getattr(value, name, None)  # NumPy imports its submodules at first use
                    register_modules()
                if name not in vars(value):
                    raise ImpureError(f"{value.__name__} has no {name!r}")
                value = vars(value)[name]
            elif type(value) is enum.EnumMeta:
                self._member(value, name, rest)
                return
            elif isinstance(value, type) and known_function(value) is None:
                value = self._attribute_of_class(value, name)
            elif _is_object(value):
                value = self._attribute_of_object(value, name)
            else:
                if name == "resize" and _is_array(value):
                    raise ImpureError("it resizes an array in place")
                self.value(value)
                self._names |= {name, *rest}
                return
        if value is _UNKNOWN:
            return
        if use == "row":
            self.row(value, maps)
        elif use == "len" and type(value) in (list, tuple, dict, range, torch.Tensor):
            self.digest_text(len(value))
        else:
            self.value(value)

    def _member(self, kind: enum.EnumMeta, name: str, attributes: tuple[str, ...]) -> None:
        """Visit a member of an enumeration, or its name or value."""
        own = [value for value in vars(kind).values() if type(value) is types.FunctionType]
        member: Any = kind.__members__.get(name)
        if (
            member is None
            or attributes not in ((), ("value",), ("name",))
            or any(function.__module__ != "enum" for function in own)
            or not {"name", "value"}.isdisjoint(vars(kind))
            or not all(base.__module__ in ("enum", "builtins") for base in kind.__mro__[1:])
        ):
            raise ImpureError(f"{kind.__qualname__}.{name} is not known")
        self.digest_text(kind.__qualname__, name)
        self.value(member._value_)

    def _attribute_of_class(self, kind: type, name: str) -> Any:
        if type(kind) not in (type, abc.ABCMeta):
            raise ImpureError(f"{kind.__qualname__} has a metaclass")
        for base in kind.__mro__:
            if name in vars(base):
                value = vars(base)[name]
                value = value.__func__ if isinstance(value, staticmethod) else value
                if hasattr(type(value), "__get__") and type(value) is not types.FunctionType:
                    break
                return value
        raise ImpureError(f"{kind.__qualname__}.{name} is not known")

    def _attribute_of_object(self, value: Any, name: str) -> Any:
        self._object(value)
        self.digest_text(name)
        attribute = _class_attribute(value, name)
        if isinstance(attribute, property):
            if type(attribute.fget) is not types.FunctionType:
                raise ImpureError(f"{name!r} of {type(value).__qualname__} is not known")
            self.function(attribute.fget, value, None)
            return _UNKNOWN
        if hasattr(type(attribute), "__set__"):
            raise ImpureError(f"{name!r} of {type(value).__qualname__} is not known")
        if name in vars(value):
            return vars(value)[name]
        if type(attribute) is types.FunctionType:
            self.function(attribute, value, None)
            return _UNKNOWN
        if isinstance(attribute, staticmethod):
            return attribute.__func__
        if attribute is _UNKNOWN or hasattr(type(attribute), "__get__"):
            raise ImpureError(f"{name!r} of {type(value).__qualname__} is not known")
        return attribute

    # Values

    def value(self, value: Any) -> None:
        """Visit a value that code may use in any way without side effects."""
        kind = type(value)
        self._values += 1
        if self._values > MOST_VALUES:
            raise ImpureError("it reads too many objects to compare them for each batch")
        if value is _UNKNOWN:
            return
        if kind in _PLAIN:
            self.digest_text(kind.__name__, value)
            self._count(sys.getsizeof(value))
        elif kind in _TEXTS or _is_numpy_scalar_or_dtype(value):
            content = value.tobytes() if hasattr(value, "tobytes") else b""
            self.digest_text(kind.__name__, value, content)
        elif (known := known_function(value)) is not None:
            self.functions += 1
            self.draws |= known.draws
            self.opens |= known.opens
            self.digest_text(known.name)
        elif (key := ("value", id(value))) in self._seen:
            self.digest_text("again", self._position(value))
        else:
            self._seen.add(key)
            self._alive.append(value)
            self._compound(value, kind)

    def _position(self, value: Any) -> int:
        return next(at for at, visited in enumerate(self._alive) if visited is value)

    def _compound(self, value: Any, kind: type) -> None:
        if kind is torch.Tensor:
            self._tensor(value)
            self._count(value.nbytes)
            self.hash.update(_to_bytes(value))
        elif _is_array(value):
            self._array(value)
            self._count(value.nbytes)
            self.hash.update(value.tobytes())
        elif kind in (list, tuple) or _is_named_tuple(kind):
            self.digest_text(kind.__qualname__, len(value))
            for part in value:
                self.value(part)
        elif kind in (dict, OrderedDict):
            self.digest_text(kind.__name__, len(value))
            for name, part in dict.items(value):
                self.value(name)
                self.value(part)
        elif kind in (set, frozenset):
            if not all(type(part) in _PLAIN for part in value):
                raise ImpureError("it has a set of objects other than numbers and text")
            self.digest_text(kind.__name__, sorted(map(repr, value)))
            self._count(64 * len(value))
        elif kind is re.Pattern:
            self.digest_text(value.pattern, value.flags)
        elif kind is types.FunctionType:
            self.function(value, _UNKNOWN, None)
        elif kind is types.MethodType and type(value.__func__) is types.FunctionType:
            self._object(value.__self__)
            self.function(value.__func__, value.__self__, None)
        elif kind is functools.partial:
            self.functions += 1
            for part in (value.func, value.args, value.keywords):
                self.value(part)
        elif kind is type and issubclass(value, BaseException) and value.__module__ == "builtins":
            self.digest_text(value.__name__)
        elif kind in (type, abc.ABCMeta):
            if not _is_named_tuple(value):
                raise ImpureError(f"it creates objects of the class {value.__qualname__}")
            self.digest_text(value.__qualname__)
        elif kind in _DATASETS:
            self._whole_dataset(value)
        elif kind.__module__.startswith("torchvision.transforms"):
            self.functions += 1
            self.draws = True
            self.digest_text(kind.__module__, kind.__qualname__)
            if isinstance(value, torch.nn.Module) and value.state_dict():
                raise ImpureError("it has a module with weights")
            for name, part in vars(value).items():
                self.digest_text(name)
                self.value(part)
        elif _is_object(value):
            self._whole_object(value)
        else:
            raise ImpureError(f"it has a {kind.__qualname__}, which is an unknown type")

    def _whole_dataset(self, value: Any) -> None:
        for name, part in vars(value).items():
            self.digest_text(name)
            self.value(part)
        self._seen.discard(("dataset", id(value)))

    def _count(self, size_bytes: int) -> None:
        self._bytes += size_bytes
        if self._bytes > MOST_BYTES:
            raise ImpureError("it reads too much data to compare them for each batch")

    def _tensor(self, tensor: torch.Tensor) -> None:
        if tensor.requires_grad:
            raise ImpureError("it has tensors that require gradients")
        if tensor.device.type != "cpu" or tensor.layout is not torch.strided or tensor.is_quantized:
            raise ImpureError("it has tensors on an accelerator, or sparse or quantized ones")
        self.digest_text(tensor.dtype, tuple(tensor.shape), tensor.is_inference())

    def _array(self, array: Any) -> None:
        if array.dtype.hasobject:
            raise ImpureError("it has arrays of objects")
        self.digest_text(array.dtype, array.shape, array.strides, array.flags.writeable)

    def _object(self, value: Any) -> None:
        """Visit an object whose attributes are used."""
        if not _is_object(value):
            raise ImpureError(f"it has a {type(value).__qualname__}, which is an unknown type")
        if not any(value is known for known in self._objects):
            self._objects.append(value)
            self.digest_text(type(value).__module__, type(value).__qualname__)

    def _whole_object(self, value: Any) -> None:
        """Visit an object that code may use in any way, for example call."""
        self._object(value)
        if isinstance(value, torch.nn.Module):
            raise ImpureError("it has an nn.Module")
        names = {
            name
            for kind in type(value).__mro__[:-1]
            if kind.__module__ not in BASES
            for name, method in vars(kind).items()
            if name.startswith("__") and name.endswith("__") and name not in LIFE
            if type(method) is types.FunctionType
        }
        for name in sorted(names):
            method = _class_attribute(value, name)
            if type(method) is not types.FunctionType:
                raise ImpureError(f"{name!r} of {type(value).__qualname__} is not known")
            self.function(method, value, None)


_TEXTS = (
    *(torch.dtype, torch.device, torch.Size, torch.memory_format, torch.layout, range, slice),
    PosixPath,
)


def _check_tuple(value: Any) -> tuple[Any, ...]:
    if type(value) is not tuple:
        raise ImpureError("its tensors are not in a tuple")
    return value


def _to_int(value: Any) -> int:
    if type(value) is int:
        return value
    if type(value) is torch.Tensor or _is_array(value) or hasattr(value, "tobytes"):
        return int(value)
    raise TypeError


def _is_array(value: Any) -> bool:
    numpy = sys.modules.get("numpy")
    return numpy is not None and type(value) is getattr(numpy, "ndarray", None)


def _is_numpy_scalar_or_dtype(value: Any) -> bool:
    numpy = sys.modules.get("numpy")
    return numpy is not None and (
        (isinstance(value, numpy.generic) and not isinstance(value, (numpy.void, numpy.object_)))
        or isinstance(value, numpy.dtype)
    )


_NAMED_TUPLE_METHODS = frozenset(
    ["__new__", "_make", "_replace", "__replace__", "__repr__", "_asdict", "__getnewargs__"]
)


def _is_named_tuple(kind: type) -> bool:
    """Whether a class is a named tuple without methods of the program."""
    return (
        kind.__bases__ == (tuple,)
        and "_fields" in vars(kind)
        and "__new__" in vars(kind)
        and kind.__new__.__code__.co_filename == "<string>"
        and not any(
            isinstance(value, (types.FunctionType, property, staticmethod, classmethod))
            and name not in _NAMED_TUPLE_METHODS
            for name, value in vars(kind).items()
        )
    )


_python_classes: weakref.WeakSet[type] = weakref.WeakSet()
"""Classes that are known to be written in Python, including all of their bases."""


def _is_object(value: Any) -> bool:
    """Whether an object is determined by its attributes and those of its class."""
    kind = type(value)
    if type(kind) not in (type, abc.ABCMeta) or isinstance(value, type):
        return False
    if kind not in _python_classes:
        in_c = types.WrapperDescriptorType, types.MethodDescriptorType, types.MemberDescriptorType
        if any(isinstance(v, in_c) for base in kind.__mro__[:-1] for v in vars(base).values()):
            return False
        _python_classes.add(kind)
    return (
        getattr(kind, "__new__") is object.__new__  # noqa: B009 - mypy thinks that it cannot be
        and getattr(kind, "__getattribute__") is object.__getattribute__  # noqa: B009
        and not hasattr(kind, "__getattr__")
        and type(getattr(value, "__dict__", None)) is dict
    )


def _class_attribute(value: Any, name: str) -> Any:
    """An attribute of the class of an object, without binding; ``_UNKNOWN`` if there is none."""
    for kind in type(value).__mro__[:-1]:
        if name in vars(kind):
            return vars(kind)[name]
    return _UNKNOWN


def _digest_rows(analysis: _Analysis, source: Any, indices: Sequence[int]) -> None:
    """Add rows of a tensor, array or container to the digest.

    Raises:
        ImpureError: a row contains something that cannot be digested.
    """
    if type(source) is torch.Tensor:
        analysis._tensor(source)
        rows = torch.tensor(_make_positive(indices, len(source)), dtype=torch.int64, device="cpu")
        analysis.hash.update(_to_bytes(source.index_select(0, rows)))
    elif _is_array(source):
        analysis._array(source)
        analysis.hash.update(source[_make_positive(indices, len(source))].tobytes())
    else:
        for index in indices:
            analysis._values = analysis._bytes = 0
            analysis.value(source[index])


def _make_positive(indices: Sequence[int], length: int) -> list[int]:
    """Convert negative indices to the equivalent positive ones.

    Raises:
        IndexError: there is no such row.
    """
    if any(not -length <= index < length for index in indices):
        raise IndexError
    return [index % length for index in indices]


def _to_bytes(tensor: torch.Tensor) -> bytes:
    """The elements of a tensor as bytes."""
    flat = tensor.detach().resolve_conj().resolve_neg().contiguous().flatten()
    if not flat.numel():
        return b""
    elements = flat.view(torch.uint8)
    if "numpy" in sys.modules:
        return elements.numpy().tobytes()
    return bytes(elements.tolist())
