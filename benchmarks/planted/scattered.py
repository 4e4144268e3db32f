"""Messages of a graph, gathered and added up by index, in front of what is trained: about 60 %."""

import torch
from torch import nn
from truth import Truth

torch.manual_seed(0)
truth = Truth()
NODES, EDGES, WIDTH = 4_000, 20_000, 64
source, goal = torch.randint(0, NODES, (2, EDGES))
spread = goal.unsqueeze(1).expand(-1, WIDTH).contiguous()
features = torch.randn(NODES, WIDTH)
model = nn.Sequential(nn.Linear(WIDTH, 256), nn.Tanh(), nn.Linear(256, 8))
optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
for _ in range(100_000):
    optimizer.zero_grad()
    with truth.part():
        messages = features[source]
        total = torch.zeros(NODES, WIDTH).scatter_add_(0, spread, messages)
    model(total).square().mean().backward()
    optimizer.step()
    truth.step()
