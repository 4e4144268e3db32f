"""A program that captures its whole step in a CUDA graph and replays it."""

import torch
from common import DEVICE, digits
from torch import nn
from torch.nn import functional as F

torch.manual_seed(0)
images, labels = (tensor.to(DEVICE) for tensor in digits())
model = nn.Sequential(nn.Flatten(), nn.Linear(784, 512), nn.ReLU(), nn.Linear(512, 10)).to(DEVICE)
optimizer = torch.optim.Adam(model.parameters(), lr=1e-3, capturable=True)
x, y = images[:128].clone(), labels[:128].clone()


def step() -> torch.Tensor:
    optimizer.zero_grad(set_to_none=True)
    loss = F.cross_entropy(model(x), y)
    loss.backward()
    optimizer.step()
    return loss


stream = torch.cuda.Stream()
stream.wait_stream(torch.cuda.current_stream())
with torch.cuda.stream(stream):
    for _ in range(3):
        step()
torch.cuda.current_stream().wait_stream(stream)
graph = torch.cuda.CUDAGraph()
optimizer.zero_grad(set_to_none=True)
with torch.cuda.graph(graph):
    loss = step()
for number in range(200):
    at = 128 * (number % 39)
    x.copy_(images[at : at + 128])
    y.copy_(labels[at : at + 128])
    graph.replay()
    if number % 20 == 0:
        print(f"step {number} loss {loss.item():.6f}", flush=True)
