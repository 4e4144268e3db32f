"""A module class, and what its closure holds, are freed as soon as nobody has them any more."""
# flatout run

import gc
import weakref

import torch
from torch import nn


def trained_once() -> weakref.ref[type]:
    """Train a net whose class lives in this call alone."""

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(4, 4)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.layer(x)

    net = Net()
    optimizer = torch.optim.SGD(net.parameters(), 0.01)
    for _ in range(6):
        optimizer.zero_grad()
        net(torch.ones(2, 4)).sum().backward()
        optimizer.step()
    return weakref.ref(Net)


classes = [trained_once() for _ in range(12)]
gc.collect()
print("alive:", sum(reference() is not None for reference in classes))
