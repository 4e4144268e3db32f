"""Evaluation passes without ``torch.no_grad()``: about half of the time."""

import torch
from torch import nn
from truth import Truth

torch.manual_seed(0)
truth = Truth()
model = nn.Sequential(nn.Linear(512, 1024), nn.ReLU(), nn.Dropout(0.1), nn.Linear(1024, 16))
optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
for _ in range(100_000):
    model.train()
    optimizer.zero_grad()
    x, y = torch.randn(64, 512), torch.randint(0, 16, (64,))
    nn.functional.cross_entropy(model(x), y).backward()
    optimizer.step()
    model.eval()
    for _ in range(3):
        x = torch.randn(64, 512)
        with truth.part():
            model(x)
    truth.step()
