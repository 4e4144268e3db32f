"""Attention whose time goes to the random numbers of its dropout."""

import torch
from torch import nn
from truth import Truth

torch.manual_seed(0)
truth = Truth()
KEEP = 0.8


class Attention(nn.Module):
    def __init__(self, width, heads):
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)

    def forward(self, x):
        batch, time, width = x.shape
        q, k, v = self.qkv(x).view(batch, time, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        weights = (q @ k.transpose(-2, -1) * q.shape[-1] ** -0.5).softmax(-1)
        mask = torch.empty_like(weights)
        with truth.part():
            mask.bernoulli_(KEEP)
        y = (weights * mask / KEEP) @ v
        return self.out(y.transpose(1, 2).reshape(batch, time, width))


model = nn.Sequential(Attention(64, 8), Attention(64, 8))
optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
for _ in range(100_000):
    optimizer.zero_grad()
    model(torch.randn(4, 96, 64)).square().mean().backward()
    optimizer.step()
    truth.step()
