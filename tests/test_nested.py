"""Tensors in nested containers, whatever a program makes of these."""

from __future__ import annotations

import dataclasses
from collections import OrderedDict, UserDict, UserList, defaultdict, deque, namedtuple
from collections.abc import Callable, Iterator, Mapping
from types import MappingProxyType, SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from flatout.intercept import nested
from flatout.intercept.nested import map_tensors, tensors_in

TENSORS = [torch.zeros(size) for size in (1, 2, 3)]
WIDE = {id(tensor): tensor.double() for tensor in TENSORS}


class ProgramError(Exception):
    """Raised by whatever the program wrote, when it is called."""


def refuse(*args: Any, **kwargs: Any) -> Any:
    raise ProgramError


HOSTILE = (
    *("__iter__", "__len__", "__getitem__", "__contains__", "__eq__", "__bool__", "__copy__"),
    *("__deepcopy__", "__reduce__", "__reduce_ex__", "__getattr__", "__setattr__", "__setitem__"),
    *("keys", "values", "items", "copy", "get", "__reversed__", "__hash__", "__repr__"),
)


class HostileMeta(type):
    """A class that cannot be asked for anything."""

    __getattribute__ = __setattr__ = __eq__ = __hash__ = refuse
    __instancecheck__ = __subclasscheck__ = refuse


def hostile(*bases: type, **more: Any) -> Any:
    """A class with these bases all of whose methods raise."""
    methods = {**dict.fromkeys(HOSTILE, refuse), "__class__": property(refuse), **more}
    return HostileMeta("Hostile", bases, methods)


@dataclasses.dataclass
class Pair:
    one: Any
    two: Any


@dataclasses.dataclass(frozen=True, slots=True)
class FrozenPair:
    one: Any
    two: Any


Point = namedtuple("Point", "x y")
HostileDict, HostileList, HostileTuple = (hostile(base) for base in (dict, list, tuple))
HostileOrdered, HostilePair = hostile(OrderedDict), hostile(Pair)
HostileMapping = type("HostileMapping", (Mapping,), dict.fromkeys(HOSTILE, refuse))
HostilePlain = hostile(object)


def filled_dict(items: list[Any]) -> Any:
    """A hostile dict with these values."""
    made = dict.__new__(HostileDict)
    for number, item in enumerate(items):
        dict.__setitem__(made, number, item)
    return made


def filled_list(items: list[Any]) -> Any:
    """A hostile list of these."""
    made = list.__new__(HostileList)
    list.extend(made, items)
    return made


def filled_ordered(items: list[Any]) -> Any:
    """A hostile ordered dict with these values."""
    made = OrderedDict.__new__(HostileOrdered)
    for number, item in enumerate(items):
        OrderedDict.__setitem__(made, number, item)
    return made


def filled_pair(items: list[Any]) -> Any:
    """A hostile dataclass with one field set, if there is something to set it to."""
    made = object.__new__(HostilePair)
    if items:
        vars(Pair)["__dict__"].__get__(made)["two"] = items[0]
    return made


def filled_factory(items: list[Any]) -> Any:
    """A dict with a factory that raises."""
    made = defaultdict(refuse)
    made.update(enumerate(items))
    return made


CONTAINERS: list[Callable[[list[Any]], Any]] = [
    list,
    tuple,
    lambda items: dict(enumerate(items)),
    lambda items: OrderedDict(enumerate(items)),
    lambda items: UserDict(enumerate(items)),
    UserList,
    lambda items: Pair(items, items[:1]),
    lambda items: FrozenPair(items[:1], tuple(items)),
    lambda items: Point(items, items[-1:]),
    lambda items: SimpleNamespace(items=items),
    lambda items: MappingProxyType(dict(enumerate(items))),
    deque,
    filled_dict,
    filled_list,
    filled_ordered,
    filled_pair,
    filled_factory,
    lambda items: tuple.__new__(HostileTuple, items),
]
LEAVES: list[Any] = [*TENSORS, None, 1, "text", b"bytes", 2.0, object(), Pair, HostileMapping()]
LEAVES += [object.__new__(HostilePlain), HostilePlain, (number for number in [1]), refuse]


def built(recipe: bytes) -> Any:
    """Containers, each in four bytes: its kind, and three things that it holds, each a leaf or a
    container made before. Its lists hold one another in circles too."""
    made: list[Any] = []
    for at in range(0, len(recipe), 4):
        kind, *held = recipe[at : at + 4]
        parts = [(LEAVES + made[-9:])[which % (len(LEAVES) + len(made[-9:]))] for which in held]
        made.append(CONTAINERS[kind % len(CONTAINERS)](parts))
    lists = [item for item in made if type(item) is list]
    for item, other in zip(lists, reversed(lists), strict=True):
        item.append(other)
    return made[-1]


def widened(tensor: torch.Tensor) -> torch.Tensor:
    return WIDE[id(tensor)]


@settings(max_examples=10_000, deadline=None, derandomize=True, database=None)
@given(st.binary(min_size=4, max_size=48))
def test_nothing_is_raised_for_whatever_is_passed(recipe: bytes) -> None:
    value = built(recipe)
    found = list(tensors_in(value))
    assert map_tensors(lambda tensor: tensor, value) is value
    wide = map_tensors(widened, value)
    assert type(wide) is type(value)
    assert [id(tensor) for tensor in tensors_in(wide)] == [id(widened(t)) for t in found]
    assert [id(tensor) for tensor in tensors_in(value)] == [id(tensor) for tensor in found]
    assert (wide is value) == (not found)


def test_a_container_is_looked_into_once_and_one_object_stays_one() -> None:
    shared: Any = {"x": TENSORS[0]}
    for _ in range(60):
        shared = {"x": TENSORS[0], "left": shared, "right": shared}
    assert len(list(tensors_in(shared))) == 61
    wide = map_tensors(widened, shared)
    assert wide["left"] is wide["right"]
    assert wide["x"] is wide["left"]["x"]
    assert wide["x"].dtype == torch.float64


def test_what_holds_itself_is_copied_with_its_circles() -> None:
    inner: list[Any] = []
    circle = (TENSORS[0], {"inner": inner})
    inner.append(circle)
    wide = map_tensors(widened, circle)
    assert wide is not circle
    assert wide[1]["inner"][0] is wide
    assert inner[0] is circle


@dataclasses.dataclass
class Node:
    x: torch.Tensor
    parent: Any = None
    cache: Any = dataclasses.field(init=False)


def test_fields_that_are_not_set_and_links_to_a_parent() -> None:
    parent = Node(TENSORS[0])
    child = Node(TENSORS[1], parent)
    parent.parent = child
    assert [t.shape[0] for t in tensors_in(parent)] == [1, 2]
    wide = map_tensors(widened, parent)
    assert wide.parent.parent is wide
    assert wide.parent.x.dtype == torch.float64
    assert not hasattr(wide, "cache")


@pytest.mark.parametrize("look", [lambda v: list(tensors_in(v)), lambda v: map_tensors(widened, v)])
def test_there_is_a_limit_to_what_is_looked_at(
    look: Callable[[Any], Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(nested, "LIMIT", 5000)
    deep: Any = [TENSORS[0]]
    for _ in range(nested.LIMIT + 1000):
        deep = [deep]
    look(deep)  # the tensor lies beyond the limit
    many = [TENSORS[0], *([0] * nested.LIMIT), TENSORS[1]]
    assert [t.shape[0] for t in tensors_in(many)] == [1]
    wide = map_tensors(widened, many)
    assert wide[0].dtype == torch.float64
    assert wide[1:] == many[1:]


class Output(OrderedDict):  # type: ignore[type-arg]
    """Keeps its values as attributes as well, like the outputs of transformers."""

    def __init__(self, **values: Any) -> None:
        super().__init__(**values)
        self.__dict__.update(values)


def test_copies_are_of_the_same_class_and_hold_the_same_besides() -> None:
    output = map_tensors(widened, Output(loss=TENSORS[0], note="text"))
    assert type(output) is Output
    assert output.loss is output["loss"]
    assert output.loss.dtype == torch.float64
    assert output.note == "text"
    table = map_tensors(widened, defaultdict(list, x=TENSORS[0]))
    assert table["new"] == []
    ordered = OrderedDict(x=TENSORS[0], y=1)
    ordered.move_to_end("x")
    assert list(map_tensors(widened, ordered)) == ["y", "x"]
    best = map_tensors(torch.Tensor.double, torch.max(torch.ones(2, 2), 0))
    assert type(best) is torch.return_types.max
    assert best.values.dtype == torch.float64
    packed = torch.nn.utils.rnn.pack_sequence([torch.ones(2)])
    assert map_tensors(torch.Tensor.double, packed).data.dtype == torch.float64


def test_modules_and_enumerations_are_never_copied() -> None:
    import enum

    class Kind(Pair, enum.Enum):
        ONE = (TENSORS[0], None)

    @dataclasses.dataclass(eq=False)
    class Net(torch.nn.Module):
        x: torch.Tensor

        def __new__(cls, x: torch.Tensor) -> Net:
            made = super().__new__(cls)
            torch.nn.Module.__init__(made)
            return made

    for value in (Kind.ONE, Net(TENSORS[0])):
        assert list(tensors_in([value])) == []
        assert map_tensors(widened, [value])[0] is value


def test_a_mapping_of_another_kind_is_not_read() -> None:
    class Counting(Mapping):  # type: ignore[type-arg]
        reads = 0

        def __getitem__(self, key: str) -> torch.Tensor:
            Counting.reads += 1
            return TENSORS[0]

        def __iter__(self) -> Iterator[str]:
            Counting.reads += 1
            return iter("x")

        def __len__(self) -> int:
            return 1

    assert list(tensors_in(Counting())) == []
    assert Counting.reads == 0
