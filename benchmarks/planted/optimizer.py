"""AdamW without its fused kernel, over more parameters than the batch needs: about 60 %."""

import torch
from torch import nn
from truth import Truth

torch.manual_seed(0)
truth = Truth()
model = nn.Sequential(*(layer for _ in range(16) for layer in (nn.Linear(384, 384), nn.ReLU())))
optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)
for _ in range(100_000):
    optimizer.zero_grad()
    model(torch.randn(24, 384)).square().mean().backward()
    with truth.part():
        optimizer.step()
    truth.step()
