"""What a program passes to its modules may be anything, and nobody but the program reads it."""
# flatout run
# flatout run --set precision=bf16

from __future__ import annotations

import collections
import dataclasses
import enum
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn

BATCH = torch.ones(2, 4)


class Head(nn.Module):
    """A layer behind what finds the batch in its input."""

    def __init__(self, get: Callable[[Any], torch.Tensor]) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 4)
        self.get = get

    def forward(self, given: Any) -> torch.Tensor:
        return self.layer(self.get(given))


def train(name: str, given: Any, get: Callable[[Any], torch.Tensor]) -> None:
    """Some steps, and how often the layer was called."""
    torch.manual_seed(0)
    head = Head(get)
    calls = []
    head.layer.register_forward_hook(lambda *_: calls.append(1))
    optimizer = torch.optim.SGD(head.parameters(), 0.01)
    for _ in range(4):
        optimizer.zero_grad()
        head(given).sum().backward()
        optimizer.step()
    print(name, len(calls))


@dataclasses.dataclass
class Unset:
    x: torch.Tensor
    cache: Any = dataclasses.field(init=False)


@dataclasses.dataclass
class Computed:
    reads: int = 0
    x: Any = None

    def __getattribute__(self, name: str) -> Any:
        if name == "x":
            self.reads += 1
            return BATCH
        return object.__getattribute__(self, name)


@dataclasses.dataclass(eq=False)
class Node:
    x: torch.Tensor
    parent: Node | None = None
    children: list[Node] = dataclasses.field(default_factory=list)


class Lazy(collections.abc.Mapping):
    """Counts its reads, and has parts that are not there."""

    reads = 0

    def __getitem__(self, key: str) -> torch.Tensor:
        if key != "x":
            raise OSError("this part of the batch is not there")
        Lazy.reads += 1
        return BATCH

    def __iter__(self) -> Iterator[str]:
        return iter(["x", "mask"])

    def __len__(self) -> int:
        raise OSError("nobody knows")


class Blocks(tuple):
    def __iter__(self) -> Iterator[Any]:
        raise RuntimeError("iterate by blocks()")

    def __len__(self) -> int:
        raise RuntimeError("how many is not known")


class Rows(list):
    def __iter__(self) -> Iterator[Any]:
        raise RuntimeError("iterate by rows()")


class Table(dict):
    def values(self) -> Any:
        raise RuntimeError("read by columns")

    items = keys = __iter__ = values


class Liar:
    """Says that it is a tensor, and breaks when asked for anything else."""

    def __init__(self, x: torch.Tensor) -> None:
        self.__dict__["x"] = x

    @property
    def __class__(self) -> type:
        return torch.Tensor

    def __getattr__(self, name: str) -> Any:
        raise ZeroDivisionError(name)


class Broken:
    """Its class cannot even be asked for."""

    x = BATCH

    @property
    def __class__(self) -> type:
        raise ZeroDivisionError("__class__")

    def __eq__(self, other: object) -> bool:
        raise ZeroDivisionError("__eq__")

    __hash__ = None  # type: ignore[assignment]


class Kind(enum.Enum):
    TRAIN = (BATCH, "train")


class Meta(type):
    """Its classes have no hash, are equal to nothing, and show no attributes."""

    __hash__ = None  # type: ignore[assignment]

    def __eq__(cls, other: object) -> bool:
        raise ZeroDivisionError("__eq__")

    def __getattribute__(cls, name: str) -> Any:
        raise ZeroDivisionError(name)


class Guarded(metaclass=Meta):
    x = BATCH


train("unset", Unset(BATCH), lambda batch: batch.x)
computed = Computed()
train("computed", computed, lambda batch: batch.x)
print("reads", computed.reads)
root = Node(BATCH)
root.children += [Node(BATCH, root) for _ in range(3)]
train("tree", root, lambda node: node.x + sum(child.x for child in node.children))
cyclic: dict[str, Any] = {"x": BATCH}
cyclic["self"] = cyclic
train("cyclic", cyclic, lambda batch: batch["x"])
shared: dict[str, Any] = {"x": BATCH}
for _ in range(40):
    shared = {"x": BATCH, "left": shared, "right": shared}
train("shared", shared, lambda batch: batch["x"])
deep: dict[str, Any] = {"x": BATCH}
for _ in range(5000):
    deep = {"x": BATCH, "inner": deep}
train("deep", deep, lambda batch: batch["x"])
train("lazy", Lazy(), lambda batch: batch["x"])
print("reads", Lazy.reads)
train("blocks", Blocks((BATCH,)), lambda batch: tuple.__getitem__(batch, 0))
train("rows", Rows([BATCH]), lambda batch: batch[0])
train("table", Table(x=BATCH), lambda batch: batch["x"])
train("liar", Liar(BATCH), lambda batch: batch.__dict__["x"])
train("broken", Broken(), lambda batch: batch.x)
train("enumeration", Kind.TRAIN, lambda batch: batch.value[0])
train("guarded", Guarded(), lambda batch: type.__getattribute__(Guarded, "x"))
train("generator", (BATCH for _ in range(4)), next)
