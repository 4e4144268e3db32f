"""Blocks that are computed again in backward: about 25 %."""

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint
from truth import Truth

torch.manual_seed(0)
truth = Truth()


class Block(nn.Module):
    """Times itself where it is called in backward."""

    def __init__(self):
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(512, 512), nn.Tanh(), nn.Linear(512, 512))

    def forward(self, x, in_backward):
        if not in_backward[0]:
            return self.layers(x)
        with truth.part():
            return self.layers(x)


blocks = nn.ModuleList(Block() for _ in range(6))
optimizer = torch.optim.SGD(blocks.parameters(), lr=1e-3)
in_backward = [False]
for _ in range(100_000):
    optimizer.zero_grad()
    x = torch.randn(256, 512, requires_grad=True)
    for block in blocks:
        x = x + checkpoint(block, x, in_backward, use_reentrant=True)
    in_backward[0] = True
    x.square().mean().backward()
    in_backward[0] = False
    optimizer.step()
    truth.step()
