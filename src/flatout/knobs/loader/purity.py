"""Whether a sample is a function of its index and of data that can be compared, and why not.

The code that makes a sample is walked as bytecode: ``__getitem__`` of the dataset, and all that it
may call. Operations that change anything, and everything that is not known to leave the world as
it is, speak against it. So the walk ends at what it finds by name in objects, globals and closures:
at functions, which it walks in their turn, and at data. The data are what a sample depends on; they
are digested, those that are read at the sample's index alone (``self.x[index]``) row by row.

Two equal digests say that a sample would come out the same. They are made anew each time, as a
program can put another function or other data in place at any time.
"""

from __future__ import annotations

import abc
import builtins
import dis
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

from flatout.knobs.loader.harmless import (
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
    meet_modules,
)

MOST_BYTES = 1 << 20
"""Of data that are read otherwise than at the sample's index: digesting them takes about 1 ms."""

MOST_VALUES = 2_000
"""Python objects among these: walking them takes about 1 ms."""

Row = tuple[tuple["Chosen", ...], Any]
"""Data that are read at a sample's index, and what that index goes through before."""

Chosen = Callable[[Sequence[int]], Sequence[int]]
"""What indices become in the dataset that a subset, say, chooses from."""


class ImpureError(Exception):
    """A sample is more than a function of its index and of data, or may be; a part of a sentence:
    why."""


class Account(NamedTuple):
    """What the samples of a dataset are made of.

    Attributes:
        draws: whether they may draw random numbers.
        opens: whether they may read files.
        seal: digest of all that each of them is made of.
        rows: what besides depends on the index.
    """

    draws: bool
    opens: bool
    seal: bytes
    rows: tuple[Row, ...]

    def digest(self, indices: Sequence[int]) -> bytes:
        """Of all that the samples at ``indices`` are made of.

        Raises:
            ImpureError: what lies at an index is not known, or not there.
        """
        walk = _Walk()
        walk.note(self.seal, *indices)
        for chosen, source in self.rows:
            at = indices
            try:
                for choose in chosen:
                    at = choose(at)
                _note_rows(walk, source, at)
            except (IndexError, KeyError, TypeError, ValueError) as error:
                raise ImpureError("there is no data at an index") from error
        if walk.functions or walk._objects:
            raise ImpureError("there are functions or objects in its lists")
        return walk.hash.digest()


def examine(dataset: Any, collate_fn: Any) -> Account:
    """What the samples of a map-style dataset are made of, put together by ``collate_fn``.

    Raises:
        ImpureError: they are not known to be functions of their index and of data.
    """
    if collate_fn is not default_collate:
        raise ImpureError("its samples are put together by a function of the program")
    if not is_torchs_own():
        raise ImpureError("the program has changed how torch gets samples, or puts them together")
    meet_modules()
    walk = _Walk()
    walk.note(*_world())
    walk.dataset(dataset, ())
    walk.finish()
    return Account(walk.draws, walk.opens, walk.hash.digest(), tuple(walk.rows))


_COLLATE = dict(collate.default_collate_fn_map)
_DATASETS = {kind: dict(vars(kind)) for kind in (data.TensorDataset, data.Subset)}


def is_torchs_own() -> bool:
    """Whether torch's datasets and its ``default_collate`` do what torch has written."""
    return collate.default_collate_fn_map == _COLLATE and all(
        vars(kind) == own for kind, own in _DATASETS.items()
    )


def _world() -> tuple[Any, ...]:
    """The state of torch and others that any function may depend on.

    Raises:
        ImpureError: a mode of the program looks at each operation.
    """
    if torch._C._len_torch_function_stack() or torch._C._len_torch_dispatch_stack():
        raise ImpureError("a mode of torch is on that looks at each operation")
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
    """Something that code finds by name.

    Attributes:
        root: ``"global"``, ``"free"`` (of a closure) or ``"first"`` (the first argument).
        name: of a global or free variable.
        attributes: of it, one of the other.
        use: ``"row"``: what lies there at the second argument; ``"len"``: its length; else
            ``"whole"``.
    """

    root: str
    name: str
    attributes: tuple[str, ...]
    use: str


class _Code(NamedTuple):
    """What a code object does, whoever runs it.

    Attributes:
        digest: of its text.
        found: by name.
        names: of attributes of other values.
        inner: code of functions that it makes.
        refusal: what it does that no sample may do.
    """

    digest: bytes
    found: tuple[_Name, ...]
    names: frozenset[str]
    inner: tuple[types.CodeType, ...]
    refusal: str | None


def _instructions(code: types.CodeType) -> Iterator[tuple[str, Any, str]]:
    """Name, argument and its text of each instruction, alike in all versions of CPython."""
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


_known: weakref.WeakKeyDictionary[types.CodeType, _Code] = weakref.WeakKeyDictionary()


def _read(code: types.CodeType) -> _Code:
    if code not in _known:
        _known[code] = _read_anew(code)
    return _known[code]


def _read_anew(code: types.CodeType) -> _Code:
    instructions = list(_instructions(code))
    arguments = code.co_varnames[: code.co_argcount]
    stored = {value for name, value, _ in instructions if name in ("STORE_FAST", "DELETE_FAST")}
    stored |= {value for name, value, _ in instructions if name == "STORE_DEREF"}
    first = arguments[0] if arguments and arguments[0] not in stored else None
    second = arguments[1] if len(arguments) > 1 and arguments[1] not in stored else None
    found: list[_Name] = []
    names: set[str] = set()
    refusal = None
    for value in code.co_consts:
        if type(value) is tuple and not KEYWORDS.isdisjoint(map(str, value)):
            refusal = "passes an argument by which functions change something"
    at = 0
    while at < len(instructions):
        name, value, text = instructions[at]
        refusal = refusal or _objection(code, name, value, text)
        at += 1
        if name == "LOAD_GLOBAL":
            root = "global"
        elif name in ("LOAD_FAST", "LOAD_DEREF") and value == first:
            root = "first"
        elif name == "LOAD_DEREF" and value in code.co_freevars:
            root = "free"
        else:
            if name == "LOAD_ATTR":
                names.add(value)
            continue
        begin = at
        while at < len(instructions) and instructions[at][0] == "LOAD_ATTR":
            at += 1
        attributes = tuple(value for _, value, _ in instructions[begin:at])
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
        found.append(_Name(root, value, attributes, use))
    if _makes_text(code, instructions):
        names |= TEXTS
    inner = tuple(const for const in code.co_consts if isinstance(const, types.CodeType))
    digest = hashlib.blake2b(code.co_code, digest_size=16)
    consts = [c for c in code.co_consts if not isinstance(c, types.CodeType)]
    for part in (consts, code.co_names, code.co_varnames, code.co_freevars, code.co_cellvars):
        digest.update(repr(part).encode(errors="surrogatepass"))
    return _Code(digest.digest(), tuple(found), frozenset(names), inner, refusal)


def _makes_text(code: types.CodeType, instructions: list[tuple[str, Any, str]]) -> bool:
    """Whether code may ask an object for the text that it is printed as."""
    return (
        any(name.startswith("FORMAT") for name, _, _ in instructions)
        or not MAKE_TEXT.isdisjoint(code.co_names)
        or any(isinstance(const, str) and "%" in const for const in code.co_consts)
    )


def _objection(code: types.CodeType, name: str, value: Any, text: str) -> str | None:
    """What an instruction does that no sample may do."""
    if name == "BINARY_OP" and text.endswith("="):
        return "changes a value in place"
    if name == "BINARY_OP" and text == "@":
        return "multiplies matrices"
    if name == "STORE_DEREF" and (value in code.co_freevars or value in code.co_varnames):
        return "sets a variable of another function"
    if name == "LOAD_GLOBAL" and value == "super":
        return "calls super()"
    if name not in HARMLESS_INSTRUCTIONS:
        return REASONS.get(name, f"does what is not known to be harmless ({name})")
    return None


# The walk

_PLAIN = (int, float, complex, bool, str, bytes, type(None), type(Ellipsis))
_UNKNOWN = object()


class _Walk:
    """Over all that a sample may reach."""

    def __init__(self) -> None:
        self.hash = hashlib.blake2b(digest_size=16)
        self.draws = self.opens = False
        self.rows: list[Row] = []
        self.functions = 0
        self._names: set[str] = set()
        self._objects: list[Any] = []
        self._seen: set[tuple[Any, ...]] = set()
        self._kept: list[Any] = []  # so that no identity is given to another object meanwhile
        self._values = 0
        self._bytes = 0

    def note(self, *values: Any) -> None:
        """Let values count that are known by their text."""
        for value in values:
            self.hash.update(repr(value).encode(errors="surrogatepass") + b"\0")

    def finish(self) -> None:
        """Follow the names of attributes that are used of values that are not known."""
        done: set[tuple[int, str]] = set()
        while True:
            left = [
                (value, name)
                for value in self._objects
                for name in sorted(self._names)
                if (id(value), name) not in done
            ]
            if not left:
                break
            for value, name in left:
                done.add((id(value), name))
                if name in vars(value) or _of_class(value, name) is not _UNKNOWN:
                    self.follow(value, (name,), "whole", ())
        for name in sorted(self._names):
            if name in READING_ATTRIBUTES:
                self.opens = True
            elif name not in ATTRIBUTES | TEXTS:
                raise ImpureError(f"it uses {name!r} of a value that is not known")

    def dataset(self, dataset: Any, chosen: tuple[Chosen, ...]) -> None:
        """A dataset that is asked for the sample at the index that ``chosen`` makes of one."""
        kind = type(dataset)
        self.note(kind.__module__, kind.__qualname__)
        if kind in _DATASETS and "__getitems__" in vars(dataset):
            raise ImpureError("it gets batches whole, by __getitems__")
        if kind is data.TensorDataset:
            for tensor in _tuple(dataset.tensors):
                self.row(tensor, chosen)
        elif kind is data.Subset:
            indices = dataset.indices
            self.row(indices, chosen)
            self.dataset(
                dataset.dataset, (*chosen, lambda at: [_integer(indices[index]) for index in at])
            )
        elif kind in (list, tuple, dict):
            self.row(dataset, chosen)
        else:
            self._object(dataset)
            if hasattr(kind, "__getitems__") or "__getitems__" in vars(dataset):
                raise ImpureError("it gets batches whole, by __getitems__")
            method = _of_class(dataset, "__getitem__")
            if type(method) is not types.FunctionType:
                raise ImpureError(f"{kind.__qualname__}.__getitem__ is no function")
            self.function(method, dataset, chosen)

    def row(self, source: Any, chosen: tuple[Chosen, ...]) -> None:
        """What lies in ``source`` at the index that ``chosen`` makes of one."""
        kind = type(source)
        if kind is torch.Tensor:
            self._tensor(source)
        elif _is_array(source):
            self._array(source)
        elif isinstance(source, data.Dataset):
            key = ("dataset", id(source), *map(id, chosen))
            if key not in self._seen:
                self._seen.add(key)
                self.dataset(source, chosen)
            return
        elif kind not in (list, tuple, dict, range):
            self.value(source)
            return
        if (kind is torch.Tensor and not source.dim()) or (_is_array(source) and not source.ndim):
            raise ImpureError("it takes a row of a single number")
        self.note(kind.__qualname__, len(source))
        self.rows.append((chosen, source))

    # Code

    def function(
        self, function: types.FunctionType, first: Any, chosen: tuple[Chosen, ...] | None
    ) -> None:
        """A function that is called; ``first``: its first argument, if that is known; ``chosen``:
        what its second one is made of the index by, if that is known."""
        self.functions += 1
        key = (id(function), id(first), chosen is not None, *map(id, chosen or ()))
        if key in self._seen:
            return
        self._seen.add(key)
        self._kept.append((function, first, chosen))
        for default in function.__defaults__ or ():
            self.value(default)
        for name, default in (function.__kwdefaults__ or {}).items():
            self.note(name)
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
            function.__code__, function.__qualname__, function.__globals__, cells, first, chosen
        )

    def _code(
        self,
        code: types.CodeType,
        name: str,
        variables: Mapping[str, Any],
        cells: Mapping[str, Any],
        first: Any,
        chosen: tuple[Chosen, ...] | None,
    ) -> None:
        read = _read(code)
        if read.refusal is not None:
            raise ImpureError(f"{name} {read.refusal}")
        self.hash.update(read.digest)
        self._names |= read.names
        for found in read.found:
            if found.root == "first":
                value = first
            elif found.root == "free":
                value = cells[found.name]
            elif found.name in variables:
                value = variables[found.name]
            elif hasattr(builtins, found.name):
                value = getattr(builtins, found.name)
            else:
                raise ImpureError(f"{name} uses {found.name!r}, which is not set")
            use = "whole" if found.use == "row" and chosen is None else found.use
            self.follow(value, found.attributes, use, chosen or ())
        arguments = code.co_varnames[: code.co_argcount]
        own = {
            variable: first if arguments[:1] == (variable,) else _UNKNOWN
            for variable in code.co_cellvars
        }
        for inner in read.inner:
            given = {
                variable: own.get(variable, cells.get(variable, _UNKNOWN))
                for variable in inner.co_freevars
            }
            self._code(inner, name, variables, given, _UNKNOWN, None)

    def follow(
        self, value: Any, attributes: tuple[str, ...], use: str, chosen: tuple[Chosen, ...]
    ) -> None:
        """What code gets as an attribute of an attribute ... of a value."""
        for at, name in enumerate(attributes):
            rest = attributes[at + 1 :]
            if value is _UNKNOWN:
                self._names |= {name, *rest}
                return
            if isinstance(value, types.ModuleType):
                self.note(value.__name__, name)
                if name not in vars(value) and value.__name__ == "numpy":
                    getattr(value, name, None)  # it imports parts of it when they are asked for
                    meet_modules()
                if name not in vars(value):
                    raise ImpureError(f"{value.__name__} has no {name!r}")
                value = vars(value)[name]
            elif isinstance(value, type) and known_function(value) is None:
                value = self._of_a_class(value, name)
            elif _is_object(value):
                value = self._of_an_object(value, name)
            else:
                if name == "resize" and _is_array(value):
                    raise ImpureError("it resizes an array in place")
                self.value(value)
                self._names |= {name, *rest}
                return
        if value is _UNKNOWN:
            return
        if use == "row":
            self.row(value, chosen)
        elif use == "len" and type(value) in (list, tuple, dict, range, torch.Tensor):
            self.note(len(value))
        else:
            self.value(value)

    def _of_a_class(self, kind: type, name: str) -> Any:
        if type(kind) not in (type, abc.ABCMeta):
            raise ImpureError(f"{kind.__qualname__} is a class of another kind")
        for base in kind.__mro__:
            if name in vars(base):
                value = vars(base)[name]
                value = value.__func__ if isinstance(value, staticmethod) else value
                if hasattr(type(value), "__get__") and type(value) is not types.FunctionType:
                    break
                return value
        raise ImpureError(f"{kind.__qualname__}.{name} is not known")

    def _of_an_object(self, value: Any, name: str) -> Any:
        self._object(value)
        self.note(name)
        of_class = _of_class(value, name)
        if isinstance(of_class, property):
            if type(of_class.fget) is not types.FunctionType:
                raise ImpureError(f"{name!r} of {type(value).__qualname__} is not known")
            self.function(of_class.fget, value, None)
            return _UNKNOWN
        if hasattr(type(of_class), "__set__"):
            raise ImpureError(f"{name!r} of {type(value).__qualname__} is not known")
        if name in vars(value):
            return vars(value)[name]
        if type(of_class) is types.FunctionType:
            self.function(of_class, value, None)
            return _UNKNOWN
        if isinstance(of_class, staticmethod):
            return of_class.__func__
        if of_class is _UNKNOWN or hasattr(type(of_class), "__get__"):
            raise ImpureError(f"{name!r} of {type(value).__qualname__} is not known")
        return of_class

    # Values

    def value(self, value: Any) -> None:
        """A value that a sample may do with as it likes, except for what code is refused for."""
        kind = type(value)
        self._values += 1
        if self._values > MOST_VALUES:
            raise ImpureError("it has too many data to compare them for each batch")
        if value is _UNKNOWN:
            return
        if kind in _PLAIN:
            self.note(kind.__name__, value)
            self._count(sys.getsizeof(value))
        elif kind in _TEXTS or _is_numpys(value):
            self.note(kind.__name__, value, value.tobytes() if hasattr(value, "tobytes") else b"")
        elif (known := known_function(value)) is not None:
            self.functions += 1
            self.draws |= known.draws
            self.opens |= known.opens
            self.note(known.name)
        elif (key := ("value", id(value))) in self._seen:
            self.note("again", self._kept_at(value))
        else:
            self._seen.add(key)
            self._kept.append(value)
            self._compound(value, kind)

    def _kept_at(self, value: Any) -> int:
        return next(at for at, kept in enumerate(self._kept) if kept is value)

    def _compound(self, value: Any, kind: type) -> None:
        if kind is torch.Tensor:
            self._tensor(value)
            self._count(value.nbytes)
            self.hash.update(_bytes(value))
        elif _is_array(value):
            self._array(value)
            self._count(value.nbytes)
            self.hash.update(value.tobytes())
        elif kind in (list, tuple) or _is_named_tuple(kind):
            self.note(kind.__qualname__, len(value))
            for part in value:
                self.value(part)
        elif kind in (dict, OrderedDict):
            self.note(kind.__name__, len(value))
            for name, part in dict.items(value):
                self.value(name)
                self.value(part)
        elif kind in (set, frozenset):
            if not all(type(part) in _PLAIN for part in value):
                raise ImpureError("it has a set of objects")
            self.note(kind.__name__, sorted(map(repr, value)))
            self._count(64 * len(value))
        elif kind is re.Pattern:
            self.note(value.pattern, value.flags)
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
            self.note(value.__name__)
        elif kind in (type, abc.ABCMeta):
            if not _is_named_tuple(value):
                raise ImpureError(f"it makes objects of the class {value.__qualname__}")
            self.note(value.__qualname__)
        elif kind in _DATASETS:
            self._of_dataset(value)
        elif kind.__module__.startswith("torchvision.transforms"):
            self.functions += 1
            self.draws = True
            self.note(kind.__module__, kind.__qualname__)
            if isinstance(value, torch.nn.Module) and value.state_dict():
                raise ImpureError("it has a module with weights")
            for name, part in vars(value).items():
                self.note(name)
                self.value(part)
        elif _is_object(value):
            self._whole_object(value)
        else:
            raise ImpureError(f"it has a {kind.__qualname__}, of which nothing is known")

    def _of_dataset(self, value: Any) -> None:
        for name, part in vars(value).items():
            self.note(name)
            self.value(part)
        self._seen.discard(("dataset", id(value)))

    def _count(self, size_bytes: int) -> None:
        self._bytes += size_bytes
        if self._bytes > MOST_BYTES:
            raise ImpureError("it reads too many data to compare them for each batch")

    def _tensor(self, tensor: torch.Tensor) -> None:
        if tensor.requires_grad:
            raise ImpureError("it has tensors that are trained")
        if tensor.device.type != "cpu" or tensor.layout is not torch.strided or tensor.is_quantized:
            raise ImpureError("it has tensors on a device, or sparse or quantized ones")
        self.note(tensor.dtype, tuple(tensor.shape), tensor.is_inference())

    def _array(self, array: Any) -> None:
        if array.dtype.hasobject:
            raise ImpureError("it has arrays of objects")
        self.note(array.dtype, array.shape, array.strides, array.flags.writeable)

    def _object(self, value: Any) -> None:
        """An object of which attributes are used."""
        if not _is_object(value):
            raise ImpureError(f"it has a {type(value).__qualname__}, of which nothing is known")
        if not any(value is known for known in self._objects):
            self._objects.append(value)
            self.note(type(value).__module__, type(value).__qualname__)

    def _whole_object(self, value: Any) -> None:
        """An object with which a sample may do anything, call it, say."""
        self._object(value)
        if isinstance(value, torch.nn.Module):
            raise ImpureError("it has a module")
        names = {
            name
            for kind in type(value).__mro__[:-1]
            if kind.__module__ not in BASES
            for name, method in vars(kind).items()
            if name.startswith("__") and name.endswith("__") and name not in LIFE
            if type(method) is types.FunctionType
        }
        for name in sorted(names):
            method = _of_class(value, name)
            if type(method) is not types.FunctionType:
                raise ImpureError(f"{name!r} of {type(value).__qualname__} is not known")
            self.function(method, value, None)


_TEXTS = (
    *(torch.dtype, torch.device, torch.Size, torch.memory_format, torch.layout, range, slice),
    PosixPath,
)


def _tuple(value: Any) -> tuple[Any, ...]:
    if type(value) is not tuple:
        raise ImpureError("its tensors are not in a tuple")
    return value


def _integer(value: Any) -> int:
    if type(value) is int:
        return value
    if type(value) is torch.Tensor or _is_array(value) or hasattr(value, "tobytes"):
        return int(value)
    raise TypeError


def _is_array(value: Any) -> bool:
    numpy = sys.modules.get("numpy")
    return numpy is not None and type(value) is getattr(numpy, "ndarray", None)


def _is_numpys(value: Any) -> bool:
    """Whether it is a number of numpy's, or a dtype."""
    numpy = sys.modules.get("numpy")
    return numpy is not None and (
        (isinstance(value, numpy.generic) and not isinstance(value, (numpy.void, numpy.object_)))
        or isinstance(value, numpy.dtype)
    )


_OF_NAMED_TUPLES = frozenset(
    ["__new__", "_make", "_replace", "__replace__", "__repr__", "_asdict", "__getnewargs__"]
)


def _is_named_tuple(kind: type) -> bool:
    """Whether instances of a class are tuples with names, without methods of the program."""
    return (
        kind.__bases__ == (tuple,)
        and "_fields" in vars(kind)
        and "__new__" in vars(kind)
        and kind.__new__.__code__.co_filename == "<string>"
        and not any(
            isinstance(value, (types.FunctionType, property, staticmethod, classmethod))
            and name not in _OF_NAMED_TUPLES
            for name, value in vars(kind).items()
        )
    )


_of_python: weakref.WeakSet[type] = weakref.WeakSet()
"""Classes that are known to be written in Python, as all of their bases."""


def _is_object(value: Any) -> bool:
    """Whether all that an object is lies in its attributes, and in those of its class."""
    kind = type(value)
    if type(kind) not in (type, abc.ABCMeta) or isinstance(value, type):
        return False
    if kind not in _of_python:
        in_c = types.WrapperDescriptorType, types.MethodDescriptorType, types.MemberDescriptorType
        if any(isinstance(v, in_c) for base in kind.__mro__[:-1] for v in vars(base).values()):
            return False
        _of_python.add(kind)
    return (
        getattr(kind, "__new__") is object.__new__  # noqa: B009 - mypy thinks that it cannot be
        and getattr(kind, "__getattribute__") is object.__getattribute__  # noqa: B009
        and not hasattr(kind, "__getattr__")
        and type(getattr(value, "__dict__", None)) is dict
    )


def _of_class(value: Any, name: str) -> Any:
    """An attribute as the class of an object has it."""
    for kind in type(value).__mro__[:-1]:
        if name in vars(kind):
            return vars(kind)[name]
    return _UNKNOWN


def _note_rows(walk: _Walk, source: Any, at: Sequence[int]) -> None:
    """Let rows count, whatever they are.

    Raises:
        ImpureError: it is not known what they are.
    """
    if type(source) is torch.Tensor:
        walk._tensor(source)
        rows = torch.tensor(_inside(at, len(source)), dtype=torch.int64, device="cpu")
        walk.hash.update(_bytes(source.index_select(0, rows)))
    elif _is_array(source):
        walk._array(source)
        walk.hash.update(source[_inside(at, len(source))].tobytes())
    else:
        for index in at:
            walk._values = walk._bytes = 0
            walk.value(source[index])


def _inside(at: Sequence[int], length: int) -> list[int]:
    """Indices counted from the front.

    Raises:
        IndexError: there is no such row.
    """
    if any(not -length <= index < length for index in at):
        raise IndexError
    return [index % length for index in at]


def _bytes(tensor: torch.Tensor) -> bytes:
    """Of the elements of a tensor."""
    flat = tensor.detach().resolve_conj().resolve_neg().contiguous().flatten()
    if not flat.numel():
        return b""
    whole = flat.view(torch.uint8)
    if "numpy" in sys.modules:
        return whole.numpy().tobytes()
    return bytes(whole.tolist())
