"""A program that notes what is done with its tensors notes what it does itself."""
# flatout run

from __future__ import annotations

import collections
from typing import Any

import torch
from torch import nn

BATCH = torch.ones(2, 4)


class Logged(torch.Tensor):
    """Notes what is done with it."""

    seen: list[str] = []

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        cls.seen.append(getattr(func, "__name__", str(func)))
        return super().__torch_function__(func, types, args, kwargs or {})


class Noted(torch.overrides.TorchFunctionMode):
    """Counts every function of torch."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: collections.Counter[str] = collections.Counter()

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.seen[getattr(func, "__name__", str(func))] += 1
        return func(*args, **(kwargs or {}))


def train(given: torch.Tensor, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    layer = nn.Linear(4, 4)
    optimizer = torch.optim.SGD(layer.parameters(), 0.01)
    for _ in range(4):
        optimizer.zero_grad()
        layer(given).sum().to(dtype).backward()
        optimizer.step()


train(BATCH.as_subclass(Logged), torch.float32)
print(collections.Counter(Logged.seen))
with Noted() as noted:
    train(BATCH, torch.float32)
    train(BATCH, torch.bfloat16)
print(sorted(noted.seen.items()))
