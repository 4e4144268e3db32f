"""The codec for everything that flatout keeps in a file: it converts dataclasses to JSON values and
back.

``encode`` converts an instance to dicts, lists, strings, numbers, booleans and ``None``. ``decode``
converts these values back to an instance, and checks every value against the type hint of its
field. Plans, documents, journals, requests and the lines of a record are all read and written this
way.

A type hint may be ``str``, ``int``, ``float``, ``bool``, ``Any``, ``bytes``, a ``Literal``, a
dataclass, a ``NamedTuple``, ``tuple[X, ...]``, ``list[X]``, ``Mapping[K, V]``, ``X | None``, a
union of scalars, or any of these in ``Annotated`` with a ``Constraint`` or a ``Packed``. In the
file,

- a key is the name of its field, without a trailing underscore (``class_`` is ``class``), unless
  the field's metadata names another (``stored_as``);
- a field that is missing has its default;
- bytes and arrays are written in base64, arrays in little-endian order;
- a number that is not finite may also be written as one of the strings ``"NaN"``, ``"Infinity"``
  and ``"-Infinity"``, as in the JSON mapping of Protocol Buffers
  (https://protobuf.dev/programming-guides/json/).

If a dataclass has a method ``check``, it is called after each decoding. It raises ``MismatchError``
if the values of several fields contradict each other.

This file imports only the standard library, because the agent loads it inside the user's program.
"""

from __future__ import annotations

import base64
import binascii
import dataclasses
import functools
import math
import sys
import types
import typing
from array import array
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any, Literal, TypeVar, Union

T = TypeVar("T")

OMIT_NONE: Mapping[str, bool] = {"omit_none": True}
"""Metadata of a dataclass field that is left out of the file while it is ``None``."""


def stored_as(key: str) -> Mapping[str, str]:
    """Return the metadata of a dataclass field whose key in the file is not its name."""
    return {"key": key}


class MismatchError(ValueError):
    """A value does not fit the type hint of its field.

    Args:
        what: a clause that follows the path of the value, such as ``must be a string``.
        keys: the path from the outermost value to this one: keys of mappings, indices of lists.
    """

    def __init__(self, what: str, *keys: str | int) -> None:
        super().__init__(what, *keys)
        self.what = what
        self.keys = keys

    @property
    def path(self) -> str:
        """The path as text, such as ``arms[1].ratio.low``; it is empty for the outermost value."""
        return "".join(f"[{k}]" if isinstance(k, int) else f".{k}" for k in self.keys).lstrip(".")

    def inside(self, key: str | int) -> MismatchError:
        """Return the same mismatch, with ``key`` put in front of the path."""
        return type(self)(self.what, key, *self.keys)

    def __str__(self) -> str:
        return f"{self.path or 'it'} {self.what}"


class MissingKeyError(MismatchError):
    """A key without a default is missing. It is the last of ``keys``; ``what`` is empty."""

    def __str__(self) -> str:
        return f"it has no {self.path}"


@dataclass(frozen=True)
class Format:
    """What differs between the kinds of file.

    Attributes:
        mapping: the noun phrase for a mapping in messages.
        refuses_unknown: whether a key that is no field is a mismatch; otherwise the key is ignored.
        is_finite: whether every float must be finite.
    """

    mapping: str = "an object"
    refuses_unknown: bool = False
    is_finite: bool = False


JSON = Format()
STRICT_JSON = Format(refuses_unknown=True)
TOML = Format("a table", refuses_unknown=True, is_finite=True)


@dataclass(frozen=True)
class Constraint:
    """Metadata of ``Annotated``: a condition on a value besides its type.

    Attributes:
        test: returns whether a decoded value is allowed.
        meaning: a noun phrase for allowed values, such as ``a positive number``.
    """

    test: Callable[[Any], bool]
    meaning: str


@dataclass(frozen=True)
class Packed:
    """Metadata of ``Annotated``: the value is an ``array``, written in base64.

    Attributes:
        code: the type code of the array.
    """

    code: Literal["d", "f", "i"]


if TYPE_CHECKING:
    Doubles = array[float]
    Floats = array[float]
    Ints = array[int]
else:  # an array takes no type argument before Python 3.12
    Doubles = Annotated[array, Packed("d")]
    Floats = Annotated[array, Packed("f")]
    Ints = Annotated[array, Packed("i")]

_LARGEST = sys.float_info.max

Count = Annotated[int, Constraint(lambda n: 0 <= n <= _LARGEST, "an integer that is not negative")]
Positive = Annotated[float, Constraint(lambda x: x > 0, "a positive number")]
NotNegative = Annotated[float, Constraint(lambda x: not x < 0, "a number that is not negative")]

_NOT_FINITE = {"NaN": math.nan, "Infinity": math.inf, "-Infinity": -math.inf}

_Decoder = Callable[[Any, Format], Any]


def decode(kind: type[T], value: object, format: Format = JSON) -> T:
    """Convert JSON or TOML values to an instance.

    Args:
        kind: a dataclass.
        value: the value that ``json`` or ``tomlkit`` has read.
        format: the kind of file.

    Raises:
        MismatchError: the value does not fit; the error names the first path that does not.
    """
    hint: Any = kind
    decoded: T = _get_decoder(hint)(value, format)
    return decoded


def encode(value: object, non_finite_as_strings: bool = False) -> Any:
    """Convert an instance, a container or a scalar to JSON values.

    Args:
        value: the value to convert; values of unsupported types are returned unchanged.
        non_finite_as_strings: whether numbers that are not finite become strings, for a file that
            must be strict JSON.
    """
    kind: Any = type(value)
    if value is None or kind in (str, int, bool):
        return value
    if isinstance(value, float):
        if non_finite_as_strings and not math.isfinite(value):
            return "NaN" if math.isnan(value) else f"{'-' if value < 0 else ''}Infinity"
        return value
    if dataclasses.is_dataclass(value):
        encoded = {}
        for name, key, omits_none in _written_fields(kind):
            item = getattr(value, name)
            if item is not None or not omits_none:
                encoded[key] = encode(item, non_finite_as_strings)
        return encoded
    if isinstance(value, Mapping):
        return {key: encode(item, non_finite_as_strings) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [encode(item, non_finite_as_strings) for item in value]
    if isinstance(value, array):
        return base64.b64encode(_swap_endianness(value).tobytes()).decode()
    if isinstance(value, bytes):
        return base64.b64encode(value).decode()
    return value


@functools.cache
def _written_fields(kind: type) -> tuple[tuple[str, str, bool], ...]:
    """Return for each field of a dataclass its name, its key, and whether ``None`` is omitted."""
    return tuple(
        (field.name, _key(field), "omit_none" in field.metadata)
        for field in dataclasses.fields(kind)
    )


def _key(field: dataclasses.Field[Any]) -> str:
    key: str = field.metadata.get("key", field.name.rstrip("_"))
    return key


def _swap_endianness(values: array[Any]) -> array[Any]:
    """Convert between native and little-endian order (its own inverse)."""
    if sys.byteorder == "big":
        values = values[:]
        values.byteswap()
    return values


# A decoder is created once for each type hint; the decoder of a dataclass, when it is first needed.


@functools.cache
def _get_decoder(kind: Any) -> _Decoder:
    """Return the function that decodes values of a type hint."""
    origin, parameters = typing.get_origin(kind), typing.get_args(kind)
    if kind in _SCALARS:
        return _SCALARS[kind]
    if origin is Annotated:
        return _make_annotated_decoder(parameters[0], parameters[1:])
    if origin in (Union, types.UnionType):
        return _make_union_decoder(parameters)
    if origin is Literal:
        return _make_literal_decoder(parameters)
    if origin in (tuple, list):
        return _make_sequence_decoder(origin, parameters)
    if origin is not None and issubclass(origin, Mapping):
        return _make_mapping_decoder(*parameters)
    if dataclasses.is_dataclass(kind):
        return _decode_dataclass_lazily(kind)
    if issubclass(kind, tuple) and hasattr(kind, "_fields"):
        return _make_named_tuple_decoder(kind)
    raise TypeError(f"no value of type {kind} can be decoded")


def _decode_any(value: Any, format: Format) -> Any:
    return value


def _decode_text(value: Any, format: Format) -> str:
    if not isinstance(value, str):
        raise MismatchError("must be a string")
    return value


def _decode_bool(value: Any, format: Format) -> bool:
    if not isinstance(value, bool):
        raise MismatchError("must be true or false")
    return value


def _decode_integer(value: Any, format: Format) -> int:
    if not isinstance(value, int) or isinstance(value, bool):
        raise MismatchError("must be an integer")
    if abs(value) > _LARGEST:  # no measurement is, and as a float it would raise
        raise MismatchError("is larger than any number")
    return value


def _decode_number(value: Any, format: Format) -> float:
    if isinstance(value, str):
        value = _NOT_FINITE.get(value)
    if not isinstance(value, (int, float)) or isinstance(value, bool):
        raise MismatchError("must be a number")
    try:
        number = float(value)
    except OverflowError:
        raise MismatchError("is larger than any number") from None
    if format.is_finite and not math.isfinite(number):
        raise MismatchError("must be a finite number")
    return number


def _decode_bytes(value: Any, format: Format) -> bytes:
    try:
        return base64.b64decode(_decode_text(value, format), validate=True)
    except (binascii.Error, ValueError) as error:
        raise MismatchError("must be base64") from error


_SCALARS: dict[Any, _Decoder] = {
    Any: _decode_any,
    str: _decode_text,
    bool: _decode_bool,
    int: _decode_integer,
    float: _decode_number,
    bytes: _decode_bytes,
}

_NAMES = {str: "a string", float: "a number", int: "an integer", bool: "true or false"}


def _make_annotated_decoder(kind: Any, metadata: tuple[Any, ...]) -> _Decoder:
    (extra,) = metadata
    if isinstance(extra, Packed):
        return functools.partial(_decode_array, extra.code)
    base = _get_decoder(kind)

    def decode(value: Any, format: Format) -> Any:
        try:
            decoded = base(value, format)
        except MismatchError as error:
            if error.keys:
                raise
            decoded = error
        if isinstance(decoded, MismatchError) or not extra.test(decoded):
            raise MismatchError(f"must be {extra.meaning}")
        return decoded

    return decode


def _decode_array(code: str, value: Any, format: Format) -> array[Any]:
    values: array[Any] = array(code)
    try:
        values.frombytes(_decode_bytes(value, format))
    except ValueError as error:
        raise MismatchError("must be an array in base64") from error
    return _swap_endianness(values)


def _make_union_decoder(members: tuple[Any, ...]) -> _Decoder:
    """Return the decoder for a type or ``None``, or for one of several scalar types."""
    others = [member for member in members if member is not type(None)]
    only = (
        _get_decoder(others[0]) if len(others) == 1 else _make_scalar_union_decoder(tuple(others))
    )
    if len(others) == len(members):
        return only
    return lambda value, format: None if value is None else only(value, format)


def _make_scalar_union_decoder(kinds: tuple[Any, ...]) -> _Decoder:
    named = [name for kind, name in _NAMES.items() if kind in kinds]
    if float in kinds and int in kinds:
        named.remove(_NAMES[int])
    meaning = f"{', '.join(named[:-1])}, or {named[-1]}"

    def decode(value: Any, format: Format) -> Any:
        # In a file, unlike in Python, a bool is no int. tomlkit returns subclasses of these types.
        kind = next((kind for kind in (bool, int, float, str) if isinstance(value, kind)), None)
        if kind is int and int not in kinds:
            kind = float
        if kind not in kinds:
            raise MismatchError(f"must be {meaning}")
        return _SCALARS[kind](value, format)

    return decode


def _make_literal_decoder(members: tuple[Any, ...]) -> _Decoder:
    is_single = len(members) == 1
    options_text = f'"{members[0]}"' if is_single else f"one of: {', '.join(map(str, members))}"

    def decode(value: Any, format: Format) -> Any:
        if not any(type(value) is type(member) and value == member for member in members):
            raise MismatchError(f"must be {options_text}")
        return value

    return decode


def _make_sequence_decoder(kind: type, parameters: tuple[Any, ...]) -> _Decoder:
    if kind is tuple and parameters[1:] != (Ellipsis,):
        raise TypeError("a tuple in a file has any number of items of one type")
    item = _get_decoder(parameters[0])
    is_annotated = typing.get_origin(parameters[0]) is Annotated
    items_have_paths = item not in _SCALARS.values() and not is_annotated

    def decode(value: Any, format: Format) -> Any:
        if not isinstance(value, list):
            raise MismatchError("must be a list")
        index = 0
        decoded = []
        try:
            for index, plain in enumerate(value):  # noqa: B007 - the error names it
                decoded.append(item(plain, format))
        except MismatchError as error:
            if items_have_paths:
                raise error.inside(index) from None
            what = error.what.removeprefix("must be ")
            raise MismatchError(f"must be a list, and its item {index} must be {what}") from None
        return kind(decoded)

    return decode


def _make_mapping_decoder(key_kind: Any, value_kind: Any) -> _Decoder:
    key, item = _get_decoder(key_kind), _get_decoder(value_kind)

    def decode(value: Any, format: Format) -> dict[Any, Any]:
        if not isinstance(value, dict):
            raise MismatchError(f"must be {format.mapping}")
        decoded = {}
        for name, plain in value.items():
            try:
                decoded[key(name, format)] = item(plain, format)
            except MismatchError as error:
                raise error.inside(name) from None
        return decoded

    return decode


def _make_named_tuple_decoder(kind: Any) -> _Decoder:
    hints = typing.get_type_hints(kind, include_extras=True)
    items = [(name, _get_decoder(hints[name])) for name in kind._fields]

    def decode(value: Any, format: Format) -> Any:
        if not isinstance(value, list) or len(value) != len(items):
            raise MismatchError(f"must be a list of {', '.join(kind._fields)}")
        decoded = []
        for (name, item), plain in zip(items, value, strict=True):
            try:
                decoded.append(item(plain, format))
            except MismatchError as error:
                raise error.inside(name) from None
        return kind(*decoded)

    return decode


def _decode_dataclass_lazily(kind: Any) -> _Decoder:
    return lambda value, format: _make_dataclass_decoder(kind)(value, format)


@functools.cache
def _make_dataclass_decoder(kind: Any) -> _Decoder:
    hints = typing.get_type_hints(kind, include_extras=True)
    fields = []
    for field in dataclasses.fields(kind):
        missing = dataclasses.MISSING
        is_required = field.default is missing and field.default_factory is missing
        fields.append((field.name, _key(field), _get_decoder(hints[field.name]), is_required))
    known = {key for _, key, _, _ in fields}
    check = getattr(kind, "check", None)

    def decode(value: Any, format: Format) -> Any:
        if not isinstance(value, dict):
            raise MismatchError(f"must be {format.mapping}")
        if format.refuses_unknown and not known.issuperset(value):
            unknown = next(key for key in value if key not in known)
            known_text = ", ".join(key for _, key, _, _ in fields)
            raise MismatchError(f"is not known (known: {known_text})", unknown)
        decoded = {}
        for name, key, item, is_required in fields:
            if key in value:
                try:
                    decoded[name] = item(value[key], format)
                except MismatchError as error:
                    raise error.inside(key) from None
            elif is_required:
                raise MissingKeyError("", key)
        instance = kind(**decoded)
        if check is not None:
            check(instance)
        return instance

    return decode
