"""Metrics computed in pure Python after every step: more than half of it."""

import torch
from torch import nn
from truth import Truth

torch.manual_seed(0)
truth = Truth()
model = nn.Sequential(nn.Linear(256, 512), nn.ReLU(), nn.Linear(512, 16))
optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
x, y = torch.randn(1024, 256), torch.randint(0, 16, (1024,))
seen = {}
for _ in range(100_000):
    optimizer.zero_grad()
    loss = nn.functional.cross_entropy(model(x), y)
    loss.backward()
    optimizer.step()
    with truth.part():
        for index in range(80_000):
            seen[index % 997] = seen.get(index % 997, 0.0) * 0.9 + 0.1 * index
    truth.step()
