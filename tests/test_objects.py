"""Reading the program's objects past what it has written for them."""

from __future__ import annotations

import gc
from typing import Any

import pytest
import torch
from torch import nn

from flatout.intercept import objects
from flatout.intercept.identity import WeakIdentityDict, WeakIdentitySet


class Tree(nn.Module):
    """Shares a module and a parameter, has an unnamed child, and a buffer that is not saved."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2))
        self.second = nn.ModuleDict({"shared": self.first[0], "own": nn.Linear(2, 2)})
        self.second["own"].weight = self.first[0].weight
        self.none = None
        self.register_module("missing", None)
        self.register_parameter("absent", None)
        self.register_buffer("mask", torch.ones(2), persistent=False)
        self.lazy = nn.LazyLinear(3)


MODULES = {
    "tree": Tree,
    "script": lambda: torch.jit.script(nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2))),
    "parametrized": lambda: torch.nn.utils.parametrizations.weight_norm(nn.Linear(2, 2)),
    "recurrent": lambda: nn.LSTM(2, 2),
}


@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::DeprecationWarning")
@pytest.mark.parametrize("kind", MODULES)
def test_what_is_registered_is_found_as_torch_finds_it(kind: str) -> None:
    root = MODULES[kind]()

    def identified(found: Any) -> list[tuple[str, int]]:
        return [(name, id(value)) for name, value in found]

    is_script = isinstance(root, torch.jit.ScriptModule)  # which makes its tensors anew each time
    for own, theirs in (
        (objects.named_modules(root), root.named_modules()),
        (objects.named_parameters(root), root.named_parameters()),
        (objects.named_buffers(root), root.named_buffers()),
    ):
        mine, others = identified(own), identified(theirs)
        assert [name for name, _ in mine] == [name for name, _ in others]
        assert is_script or mine == others
    assert [id(m) for m in objects.children(root)] == [id(m) for m in root.children()]
    for mode in (True, False):
        root.train(mode)
        assert objects.is_training(root) == mode


def test_modules_that_contain_themselves_come_once() -> None:
    inner = nn.Linear(2, 2)
    root = nn.Sequential(inner)
    inner.outer = root  # type: ignore[assignment]
    assert list(map(id, objects.modules(root))) == [id(root), id(inner)]


def test_attributes_are_read_where_they_are_kept() -> None:
    class Slotted:
        __slots__ = ("given", "unset")

    class Computing:
        @property
        def given(self) -> None:
            raise ZeroDivisionError

        def __getattribute__(self, name: str) -> Any:
            raise ZeroDivisionError

    slotted = Slotted()
    slotted.given = 1
    assert objects.attribute(slotted, "given") == 1
    assert objects.attribute(slotted, "unset", "nothing") == "nothing"
    assert objects.attribute(Computing(), "given", "nothing") == "nothing"
    assert objects.attributes(object()) == {}
    assert objects.class_name(Computing()).endswith("Computing")


class Equal:
    """Equal to all of its kind, and without a hash."""

    __hash__ = None  # type: ignore[assignment]

    def __eq__(self, other: object) -> bool:
        return True

    def __len__(self) -> int:
        raise ZeroDivisionError


def test_what_is_known_of_objects_goes_by_identity_and_ends_with_them() -> None:
    one, other, third = Equal(), Equal(), Equal()
    known: WeakIdentityDict[Equal, int] = WeakIdentityDict()
    known[one] = 1
    known[other] = 2
    known[one] = 3
    assert (known[one], known.get(other), known.get(third), len(known)) == (3, 2, None, 2)
    assert known.keys() == [one, other]
    assert known.pop(other) == 2
    assert other not in known
    with pytest.raises(KeyError):
        known[other]
    members = WeakIdentitySet([one, other, one])
    assert len(members) == 2
    members.discard(one)
    assert [member is other for member in members] == [True]
    del one, other
    gc.collect()
    assert len(known) == len(members) == 0
    known[third] = 4
    assert known[third] == 4
