"""A program that compiles its own model, with CUDA graphs inside."""

import os
import tempfile

os.environ["TRITON_CACHE_DIR"] = f"{tempfile.gettempdir()}/triton"

import torch
from common import DEVICE, digits
from torch import nn
from torch.nn import functional as F

torch.manual_seed(0)
images, labels = digits()
plain = nn.Sequential(nn.Flatten(), nn.Linear(784, 512), nn.GELU(), nn.Linear(512, 10)).to(DEVICE)
model = torch.compile(plain, mode="reduce-overhead")
optimizer = torch.optim.SGD(plain.parameters(), lr=0.05, momentum=0.9)
for number in range(120):
    at = 128 * (number % 39)
    x, y = images[at : at + 128].to(DEVICE), labels[at : at + 128].to(DEVICE)
    loss = F.cross_entropy(model(x), y)
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    if number % 20 == 0:
        print(f"step {number} loss {loss.item():.6f}", flush=True)
