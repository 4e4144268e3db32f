"""Modules, optimizers and loaders may answer as they like, and nobody but the program asks them."""
# flatout run
# flatout run --set precision=bf16
# flatout run --set optimizer=fused --set gradients=on_demand

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn

BATCH = torch.ones(2, 4)
ASKED: list[str] = []


class Plain(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layer(x)


def train(net: Any, call: Callable[[Any], torch.Tensor] = lambda net: net(BATCH)) -> None:
    """Some steps, and what the program was asked meanwhile."""
    optimizer = Equal(net.layer.parameters(), 0.01)
    calls = []
    net.layer.register_forward_hook(lambda *_: calls.append(1))
    for _ in range(4):
        optimizer.zero_grad()
        call(net).sum().backward()
        optimizer.step()
    print(len(calls), ASKED)
    ASKED.clear()


class Equal(torch.optim.SGD):
    """Every one of them is equal to all, and has no hash."""

    def __eq__(self, other: object) -> bool:
        return True

    __hash__ = None  # type: ignore[assignment]


class Counted(Plain):
    """Counts who asks."""

    def parameters(self, recurse: bool = True) -> Iterator[nn.Parameter]:
        ASKED.append("parameters")
        return super().parameters(recurse)

    def named_parameters(self, *args: Any, **kwargs: Any) -> Iterator[tuple[str, nn.Parameter]]:
        ASKED.append("named_parameters")
        return super().named_parameters(*args, **kwargs)

    def modules(self) -> Iterator[nn.Module]:
        ASKED.append("modules")
        return super().modules()

    def buffers(self, recurse: bool = True) -> Iterator[torch.Tensor]:
        ASKED.append("buffers")
        return super().buffers(recurse)

    def __eq__(self, other: object) -> bool:
        ASKED.append("__eq__")
        return self is other

    def __hash__(self) -> int:
        ASKED.append("__hash__")
        return id(self)


class Refusing(Plain):
    """Has other parameters for each purpose, and no attribute that says whether it trains."""

    def parameters(self, group: str) -> list[nn.Parameter]:  # type: ignore[override]
        raise RuntimeError("call the model once first")

    modules = named_parameters = buffers = parameters  # type: ignore[assignment]

    @property
    def training(self) -> bool:  # type: ignore[override]
        raise ZeroDivisionError

    @training.setter
    def training(self, mode: bool) -> None:
        pass


class Late(nn.Module):
    """Makes its layer in its first call."""

    layer: nn.Linear

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if "layer" not in self._modules:
            self.layer = nn.Linear(4, 4)
        return self.layer(x)


class Frozen(type):
    def __setattr__(cls, name: str, value: Any) -> None:
        raise AttributeError("classes are frozen")

    def __delattr__(cls, name: str) -> None:
        raise AttributeError("classes are frozen")

    def __getattribute__(cls, name: str) -> Any:
        if name in ("__qualname__", "__dict__", "__call__"):
            ASKED.append(name)
        return super().__getattribute__(name)

    def mro(cls) -> list[type]:
        return super().mro()

    def __eq__(cls, other: object) -> bool:
        ASKED.append("__eq__ of a class")
        return cls is other

    __hash__ = None  # type: ignore[assignment]


class OfFrozen(Plain, metaclass=Frozen):
    pass


class Property(Plain):
    @property
    def __call__(self) -> Any:  # type: ignore[override]
        ASKED.append("property")
        return super().__call__


class Static(Plain):
    @staticmethod
    def __call__(x: torch.Tensor) -> torch.Tensor:  # type: ignore[override]
        return net_of_static.forward(x)


class Left(Plain):
    pass


class Right(Plain):
    def __call__(self, *args: Any) -> Any:
        ASKED.append("Right.__call__")
        return super().__call__(*args)


class Diamond(Left, Right):
    pass


@dataclasses.dataclass(eq=False)
class Fields(nn.Module):
    width: int = 4

    def __post_init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(self.width, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layer(x)


class Loader(torch.utils.data.DataLoader):
    def __len__(self) -> int:
        raise RuntimeError("how many is not known")

    def __eq__(self, other: object) -> bool:
        raise RuntimeError("not to be compared")

    __hash__ = None  # type: ignore[assignment]


for kind in (Plain, Counted, Refusing, OfFrozen, Property, Left, Diamond, Fields):
    torch.manual_seed(0)
    train(kind())
net_of_static = Static()
train(net_of_static)
late = Late()
late(BATCH)
train(late)

# A class that is watched already gets methods of its own, or its base does, and loses them again.
net = Left()
train(net)
original = nn.Module.__call__


def noted(self: Any, *args: Any) -> Any:
    ASKED.append("noted")
    return original(self, *args)


Plain.__call__ = noted
train(net)
Left.__call__ = lambda self, x: self.forward(x)
train(net)
del Left.__call__
train(net)
del Plain.__call__
train(net)

data = torch.utils.data.TensorDataset(torch.arange(8.0).reshape(2, 4))
net = Plain()
for _ in range(3):
    for (rows,) in Loader(data):
        train(net, lambda net, rows=rows: net(rows))
