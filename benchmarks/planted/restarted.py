"""Workers that are started again for each short epoch: the first batch waits for them."""

import time

import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset
from truth import Truth

torch.manual_seed(0)
truth = Truth()
model = nn.Sequential(nn.Linear(512, 512), nn.ReLU(), nn.Linear(512, 10))
optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
data = TensorDataset(torch.randn(256, 512), torch.randint(0, 10, (256,)))
loader = DataLoader(data, batch_size=32, num_workers=2)
for _ in range(10_000):
    with truth.part():
        batches = iter(loader)
        batch = next(batches)
    while batch is not None:
        x, y = batch
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x.repeat(64, 1)), y.repeat(64)).backward()
        optimizer.step()
        truth.step()
        began_s = time.perf_counter()
        batch = next(batches, None)
        if batch is None:  # the workers end
            truth.add(time.perf_counter() - began_s)
