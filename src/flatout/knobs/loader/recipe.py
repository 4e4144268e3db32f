"""Reads from the bytecode of ``__getitem__`` how a dataset makes a sample from rows of its arrays.

Many datasets do nothing but ``return self.x[index], self.y[index]``. The instructions are followed
with symbols in place of values. The result is a recipe: which row of which attribute stands at
which place of the sample. If the code does anything else, there is no recipe. The branch that a
condition takes must be known beforehand: from an attribute that is ``None``, ``True`` or ``False``
(``if self.transform:``), or because the index is no tensor (``if torch.is_tensor(index):``).

Source: documentation of the module ``dis``, for the instructions of CPython 3.10 to 3.14.
"""

from __future__ import annotations

import dis
import inspect
import sys
import types
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch

_MOST_INSTRUCTIONS = 500
"""The most instructions that are followed."""

CASTS: dict[str, torch.dtype] = {
    "float": torch.float32,
    "double": torch.float64,
    "long": torch.int64,
    "int": torch.int32,
}
"""The methods of a tensor that are followed."""

MAKERS = ("from_numpy", "tensor", "as_tensor")
"""The functions of torch that are followed."""


@dataclass(frozen=True)
class Number:
    """A whole number that depends on the index of the sample: a sum.

    Attributes:
        times: how often the index is in the sum.
        constant: the constants in it, added up.
        plus, minus: the names of the dataset's attributes that are added and subtracted.
    """

    times: int = 0
    constant: int = 0
    plus: tuple[str, ...] = ()
    minus: tuple[str, ...] = ()

    def add(self, other: Number) -> Number:
        """Return the sum of two numbers."""
        return Number(
            self.times + other.times,
            self.constant + other.constant,
            self.plus + other.plus,
            self.minus + other.minus,
        )

    def negate(self) -> Number:
        """Return the number with the opposite sign."""
        return Number(-self.times, -self.constant, self.minus, self.plus)

    def evaluate(self, attributes: Mapping[str, Any], index: Any) -> Any:
        """Return the number for an index, or for an array of indices."""
        plus, minus = (sum(attributes[name] for name in names) for names in (self.plus, self.minus))
        return self.times * index + (self.constant + plus - minus)


INDEX = Number(times=1)


class Made(NamedTuple):
    """A call that makes a tensor, or casts one: a name in ``MAKERS`` or ``CASTS``, and the data
    type that it is called with."""

    name: str
    dtype: torch.dtype | None = None


@dataclass(frozen=True)
class Row:
    """One row of an attribute, or several that follow each other.

    Attributes:
        attribute: the name of the dataset's attribute.
        first: the number of the row, or of the first of several.
        end: the number of the row after the last; ``None``: it is one row.
        made: the calls that the row goes through, in order.
    """

    attribute: str
    first: Number
    end: Number | None = None
    made: tuple[Made, ...] = ()


@dataclass(frozen=True)
class Group:
    """A tuple, list or dict of the parts of a sample; ``keys`` are those of a dict."""

    kind: type
    parts: tuple[Any, ...]
    keys: tuple[Any, ...] = ()


@dataclass(frozen=True)
class Recipe:
    """How a dataset makes a sample.

    Attributes:
        code: the code that it was read from.
        sample: a ``Row``, a ``Group`` of such, or a ``Number``, which is the index itself.
        rows: the attributes of which rows are taken.
        numbers: the attributes that must be whole numbers.
        flags: the attributes that must be ``None``, ``True`` or ``False``, with their values.
        globals: the global variables that the code reads, with their values.
        functions: the functions and data types of torch that it uses, by name.
    """

    code: types.CodeType
    sample: Any
    rows: frozenset[str]
    numbers: frozenset[str]
    flags: Mapping[str, Any]
    globals: Mapping[str, Any]
    functions: Mapping[str, Any]

    def holds(self, dataset: Any, attributes: Mapping[str, Any], function: Any) -> bool:
        """Return whether the recipe is still that of a dataset.

        Args:
            dataset: the dataset.
            attributes: its attributes.
            function: its ``__getitem__``.
        """
        return (
            getattr(function, "__code__", None) is self.code
            and all(type(attributes.get(name)) is int for name in self.numbers)
            and all(name in attributes for name in self.rows)
            and all(attributes.get(name, self) is value for name, value in self.flags.items())
            and all(function.__globals__.get(n) is value for n, value in self.globals.items())
            and all(vars(torch).get(name) is value for name, value in self.functions.items())
        )


def read(dataset: Any) -> Recipe | None:
    """Return the recipe of a dataset; ``None`` if there is none."""
    kind = type(dataset)
    function = inspect.getattr_static(kind, "__getitem__", None)
    if (
        not isinstance(function, types.FunctionType)
        or any("__getattribute__" in vars(base) for base in kind.__mro__[:-1])
        or function.__closure__
        or function.__code__.co_flags & (inspect.CO_VARARGS | inspect.CO_VARKEYWORDS)
        or function.__code__.co_flags & (inspect.CO_GENERATOR | inspect.CO_COROUTINE)
        or function.__code__.co_argcount != 2
        or function.__code__.co_kwonlyargcount
    ):
        return None
    try:
        recipe = _Reader(getattr(dataset, "__dict__", {}), function).read()
    except _UnreadableError:
        return None
    used = {*recipe.rows, *recipe.numbers, *recipe.flags}
    if any(hasattr(kind, name) for name in used):
        return None  # a property or another descriptor may stand for the attribute
    return recipe


class _UnreadableError(Exception):
    """The code does something that recipes cannot say."""


@dataclass(frozen=True)
class _Self:
    """The dataset itself."""


@dataclass(frozen=True)
class _Attribute:
    """An attribute of the dataset."""

    name: str


@dataclass(frozen=True)
class _Constant:
    value: Any


@dataclass(frozen=True)
class _Slice:
    first: Any
    end: Any


@dataclass(frozen=True)
class _Method:
    """A method of something."""

    of: Any
    name: str


_NOTHING = object()
"""Stands beside the function of a call where the interpreter wants an empty place."""

_IGNORED = frozenset(["RESUME", "NOP", "CACHE", "EXTENDED_ARG", "PRECALL", "NOT_TAKEN", "TO_BOOL"])

_ALIASES = {
    **dict.fromkeys(("LOAD_FAST_BORROW", "LOAD_FAST_CHECK", "LOAD_FAST_LOAD_FAST"), "LOAD_FAST"),
    "LOAD_FAST_BORROW_LOAD_FAST_BORROW": "LOAD_FAST",
    "STORE_FAST_STORE_FAST": "STORE_FAST",
    "LOAD_SMALL_INT": "LOAD_CONST",
    "LOAD_METHOD": "LOAD_ATTR",
    "BUILD_LIST": "BUILD_TUPLE",
    "ROT_TWO": "SWAP",
    **dict.fromkeys(("BINARY_ADD", "BINARY_SUBTRACT"), "BINARY_OP"),
    **dict.fromkeys(("CALL_KW", "CALL_FUNCTION", "CALL_METHOD", "CALL_FUNCTION_KW"), "CALL"),
}
"""Instructions that are followed like others."""

_PUSHES_NOTHING_GLOBALLY = sys.version_info >= (3, 11)
"""Whether the lowest bit of ``LOAD_GLOBAL`` says that a place for a call is left empty."""

_PUSHES_NOTHING = sys.version_info >= (3, 12)
"""Whether the lowest bit of ``LOAD_ATTR`` says that a method is called."""


class _Reader:
    """Follows the instructions of one function.

    Args:
        attributes: the attributes of the dataset.
        function: its ``__getitem__``.
    """

    def __init__(self, attributes: Mapping[str, Any], function: types.FunctionType) -> None:
        self._attributes = attributes
        self._function = function
        code = function.__code__
        self._locals: dict[str, Any] = {code.co_varnames[0]: _Self(), code.co_varnames[1]: INDEX}
        self._stack: list[Any] = []
        self._keywords: tuple[str, ...] = ()
        self._rows: set[str] = set()
        self._numbers: set[str] = set()
        self._flags: dict[str, Any] = {}
        self._globals: dict[str, Any] = {}
        self._functions: dict[str, Any] = {}

    def read(self) -> Recipe:
        """Return the recipe.

        Raises:
            _UnreadableError: there is none.
        """
        instructions = list(dis.get_instructions(self._function))
        places = {one.offset: place for place, one in enumerate(instructions)}
        place = 0
        for _ in range(_MOST_INSTRUCTIONS):
            one = instructions[place]
            if one.opname in ("RETURN_VALUE", "RETURN_CONST"):
                return self._finish(one)
            goes_on = self._follow(one)
            place = place + 1 if goes_on else places[one.argval]
        raise _UnreadableError

    def _finish(self, last: dis.Instruction) -> Recipe:
        if last.opname == "RETURN_CONST":
            raise _UnreadableError
        sample = self._to_part(self._stack.pop())
        if isinstance(sample, Number) or not self._rows:
            raise _UnreadableError
        return Recipe(
            self._function.__code__,
            sample,
            frozenset(self._rows),
            frozenset(self._numbers),
            self._flags,
            self._globals,
            self._functions,
        )

    def _follow(self, one: dis.Instruction) -> bool:
        """Follow an instruction; return whether the next one follows, and not its jump target."""
        if "JUMP" in one.opname:
            return self._follow_jump(one)
        if one.opname in _IGNORED:
            return True
        follow = getattr(self, f"_on_{_ALIASES.get(one.opname, one.opname).lower()}", None)
        if follow is None:
            raise _UnreadableError
        follow(one)
        return True

    def _follow_jump(self, one: dis.Instruction) -> bool:
        name = one.opname.replace("_FORWARD", "")
        if name == "JUMP":
            return False
        if not name.startswith("POP_JUMP_IF_") or one.argval <= one.offset:
            raise _UnreadableError
        value = self._decide(self._pop())
        jumps = {
            "TRUE": bool(value),
            "FALSE": not value,
            "NONE": value is None,
            "NOT_NONE": value is not None,
        }
        return not jumps[name.removeprefix("POP_JUMP_IF_")]

    def _decide(self, value: Any) -> Any:
        """Return the value that a condition has for now and for good."""
        if isinstance(value, _Constant):
            return value.value
        if isinstance(value, _Attribute):
            found = self._attributes.get(value.name, value)
            if found is None or found is True or found is False:
                self._flags[value.name] = found
                return found
        raise _UnreadableError

    # Variables and constants

    def _on_load_fast(self, one: dis.Instruction) -> None:
        names = one.argval if isinstance(one.argval, tuple) else (one.argval,)
        for name in names:
            if name not in self._locals:
                raise _UnreadableError
            self._stack.append(self._locals[name])

    def _on_store_fast(self, one: dis.Instruction) -> None:
        names = one.argval if isinstance(one.argval, tuple) else (one.argval,)
        for name in names:
            self._locals[name] = self._pop()

    def _on_store_fast_load_fast(self, one: dis.Instruction) -> None:
        stored, loaded = one.argval
        self._locals[stored] = self._pop()
        if loaded not in self._locals:
            raise _UnreadableError
        self._stack.append(self._locals[loaded])

    def _on_swap(self, one: dis.Instruction) -> None:
        depth = one.arg if one.opname == "SWAP" and one.arg else 2
        stack = self._stack
        stack[-1], stack[-depth] = stack[-depth], stack[-1]

    def _on_is_op(self, one: dis.Instruction) -> None:
        second, first = self._pop(), self._pop()
        if not isinstance(second, _Constant) or second.value is not None:
            raise _UnreadableError
        self._stack.append(_Constant((self._decide(first) is None) != bool(one.arg)))

    def _on_load_const(self, one: dis.Instruction) -> None:
        self._stack.append(_Constant(one.argval))

    def _on_load_global(self, one: dis.Instruction) -> None:
        value = self._function.__globals__.get(one.argval)
        if value is not torch:
            raise _UnreadableError
        self._globals[one.argval] = value
        if _PUSHES_NOTHING_GLOBALLY and (one.arg or 0) & 1:
            self._stack.append(_NOTHING)
        self._stack.append(_Constant(value))

    def _on_push_null(self, _: dis.Instruction) -> None:
        self._stack.append(_NOTHING)

    def _on_load_attr(self, one: dis.Instruction) -> None:
        self._stack.append(self._get_attribute(self._pop(), one.argval))
        if one.opname == "LOAD_METHOD" or (_PUSHES_NOTHING and (one.arg or 0) & 1):
            self._stack.append(_NOTHING)

    def _get_attribute(self, value: Any, name: str) -> Any:
        if isinstance(value, _Self):
            if name not in self._attributes:
                raise _UnreadableError
            return _Attribute(name)
        if isinstance(value, _Constant) and value.value is torch:
            found = vars(torch).get(name)
            if name not in (*MAKERS, "is_tensor") and not isinstance(found, torch.dtype):
                raise _UnreadableError
            self._functions[name] = found
            return _Constant(found) if isinstance(found, torch.dtype) else _Method(value, name)
        return _Method(value, name)

    # Operators

    def _on_binary_subscr(self, _: dis.Instruction) -> None:
        index, container = self._pop(), self._pop()
        self._stack.append(self._take(container, index))

    def _on_binary_slice(self, _: dis.Instruction) -> None:
        end, first, container = self._pop(), self._pop(), self._pop()
        self._stack.append(self._take(container, _Slice(first, end)))

    def _on_build_slice(self, one: dis.Instruction) -> None:
        if one.arg != 2:
            raise _UnreadableError
        end, first = self._pop(), self._pop()
        self._stack.append(_Slice(first, end))

    def _take(self, container: Any, index: Any) -> Row:
        if not isinstance(container, _Attribute):
            raise _UnreadableError
        self._rows.add(container.name)
        if isinstance(index, _Slice):
            first, end = self._to_number(index.first), self._to_number(index.end)
            return Row(container.name, first, end)
        return Row(container.name, self._to_number(index))

    def _on_binary_op(self, one: dis.Instruction) -> None:
        if one.argrepr == "[]":
            self._on_binary_subscr(one)
            return
        second, first = self._to_number(self._pop()), self._to_number(self._pop())
        if one.argrepr == "+" or one.opname == "BINARY_ADD":
            self._stack.append(first.add(second))
        elif one.argrepr == "-" or one.opname == "BINARY_SUBTRACT":
            self._stack.append(first.add(second.negate()))
        else:
            raise _UnreadableError

    def _to_number(self, value: Any) -> Number:
        if isinstance(value, Number):
            return value
        if isinstance(value, _Constant) and type(value.value) is int:
            return Number(constant=value.value)
        if isinstance(value, _Attribute):
            if type(self._attributes.get(value.name)) is not int:
                raise _UnreadableError
            self._numbers.add(value.name)
            return Number(plus=(value.name,))
        raise _UnreadableError

    # Samples

    def _to_part(self, value: Any) -> Any:
        """Return a value as a part of a sample."""
        if isinstance(value, (Row, Group)) or value == INDEX:
            return value
        raise _UnreadableError

    def _on_build_tuple(self, one: dis.Instruction) -> None:
        kind = tuple if one.opname == "BUILD_TUPLE" else list
        self._stack.append(Group(kind, tuple(map(self._to_part, self._pop_many(one.arg)))))

    def _on_build_map(self, one: dis.Instruction) -> None:
        flat = self._pop_many(2 * (one.arg or 0))
        self._add_dict(flat[::2], flat[1::2])

    def _on_build_const_key_map(self, one: dis.Instruction) -> None:
        keys = self._pop()
        assert isinstance(keys, _Constant)
        self._add_dict([_Constant(key) for key in keys.value], self._pop_many(one.arg))

    def _add_dict(self, keys: list[Any], values: list[Any]) -> None:
        names = tuple(key.value for key in keys if isinstance(key, _Constant))
        if len({*names}) < len(keys):
            raise _UnreadableError
        self._stack.append(Group(dict, tuple(map(self._to_part, values)), names))

    # Calls

    def _on_kw_names(self, one: dis.Instruction) -> None:
        self._keywords = self._function.__code__.co_consts[one.arg or 0]

    def _on_call(self, one: dis.Instruction) -> None:
        if one.opname in ("CALL_KW", "CALL_FUNCTION_KW"):
            names = self._pop()
            assert isinstance(names, _Constant)
            self._keywords = names.value
        arguments = self._pop_many(one.arg)
        function = self._pop()
        if not one.opname.startswith("CALL_FUNCTION"):
            beside = self._pop()
            function = beside if function is _NOTHING else function
        keywords, self._keywords = self._keywords, ()
        count = len(arguments) - len(keywords)
        named = dict(zip(keywords, arguments[count:], strict=True))
        self._stack.append(self._call(function, arguments[:count], named))

    def _call(self, function: Any, arguments: list[Any], named: dict[str, Any]) -> Any:
        """Return the result of a call that makes a tensor of a row, or casts it."""
        if not isinstance(function, _Method):
            raise _UnreadableError
        of_torch = isinstance(function.of, _Constant)
        if of_torch and function.name == "is_tensor" and arguments == [INDEX]:
            return _Constant(False)
        row = arguments[0] if of_torch and arguments else function.of
        if not isinstance(row, Row) or len(arguments) != of_torch or named.keys() - {"dtype"}:
            raise _UnreadableError
        dtype = named["dtype"].value if isinstance(named.get("dtype"), _Constant) else None
        known = MAKERS if of_torch else CASTS
        if function.name not in known or (named and dtype is None):
            raise _UnreadableError
        if named and (function.name == "from_numpy" or not of_torch):
            raise _UnreadableError
        made = (*row.made, Made(function.name, dtype))
        return Row(row.attribute, row.first, row.end, made)

    # The stack

    def _pop(self) -> Any:
        return self._stack.pop()

    def _pop_many(self, count: int | None) -> list[Any]:
        taken = self._stack[len(self._stack) - (count or 0) :]
        del self._stack[len(self._stack) - len(taken) :]
        return taken
