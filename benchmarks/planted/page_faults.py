"""A forward pass whose memory the allocator hands back and faults in again at every step."""

import time
from itertools import pairwise

import torch
from torch import nn
from truth import Truth

torch.manual_seed(0)
truth = Truth()
ELEMENTS = 16 * 2**20
"""64 MiB: beyond every threshold up to which glibc keeps freed memory (mallopt(3): 32 MiB)."""


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.head = nn.Linear(64, 8)

    def forward(self, x):
        times_s = [time.perf_counter()]
        memory = torch.empty(ELEMENTS)
        for value in (1.0, 2.0):  # the same work, without and with the memory at hand
            memory.fill_(value)
            times_s.append(time.perf_counter())
        del memory
        times_s.append(time.perf_counter())
        fresh_s, again_s, free_s = (b - a for a, b in pairwise(times_s))
        truth.add(fresh_s - again_s + free_s)
        return self.head(x)


model = Net()
optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
for _ in range(100_000):
    optimizer.zero_grad()
    model(torch.randn(64, 64)).square().mean().backward()
    optimizer.step()
    truth.step()
