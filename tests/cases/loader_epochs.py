"""Epochs of a loader that are cut, mixed, repeated, and whose data change between two batches."""
# flatout run --set loader=workers
# flatout run --set loader=prefetch
# flatout run --set loader=cache
# flatout run --set loader=batched

import itertools
import os

import numpy as np
import torch
from torch.utils.data import (
    DataLoader,
    Dataset,
    RandomSampler,
    TensorDataset,
    WeightedRandomSampler,
    get_worker_info,
    random_split,
)


class Points(Dataset):
    def __init__(self):
        self.x = torch.arange(120.0)[:, None].repeat(1, 3)
        self.y = torch.zeros(120, dtype=torch.long)
        self.array = np.arange(120.0)
        self.numbers = list(range(120))
        self.noise = torch.zeros(1)
        self.epoch = 0

    def __len__(self):
        return len(self.x)

    def __getitem__(self, i):
        return self.x[i] + self.epoch, self.y[i], self.numbers[i], self.array[i], self.noise


def sums(batch):
    return [float(torch.as_tensor(part).double().sum()) for part in batch]


def show(name, *values):
    print(name, *values, torch.get_rng_state().sum().item())


torch.manual_seed(0)
points = Points()
loader = DataLoader(points, 16, shuffle=True)
show("zip", [(sums(a), sums(b)) for a, b in zip(loader, loader, strict=True)])
one, other = iter(loader), iter(loader)
show("in turns", [(sums(next(one)), sums(next(other))) for _ in range(3)], len(one), len(loader))
show("the rest", [sums(b) for b in one], [sums(b) for b in other])
for _ in range(3):
    show("after the end", next(one, "nothing"))
for _ in range(2):
    *_, batch = itertools.islice(loader, 3)
    show("left early", sums(batch))
cycle = itertools.cycle(DataLoader(points, 64))
show("cycle", [sums(next(cycle)) for _ in range(5)])

found = []
for number, batch in enumerate(loader):
    found.append(sums(batch))
    if number % 2:
        points.epoch += 1
    if number == 1:
        points.y[::7] += 1
    if number == 2:
        points.x.data[5:50] *= 2
    if number == 3:
        points.array[3:90] = -1
    if number == 4:
        points.numbers[10:80] = [7] * 70
    if number == 5:
        points.noise.numpy()[0] = 3
show("changes", found)

for name, sampler in (
    ("weights", WeightedRandomSampler(torch.ones(120), 50)),
    ("with replacement", RandomSampler(points, replacement=True, num_samples=50)),
    ("a list", [5, 3, 3, 119]),
):
    show(name, [sums(b) for b in DataLoader(points, 16, sampler=sampler)])

generator = torch.Generator().manual_seed(3)
loader = DataLoader(points, 16, shuffle=True, generator=generator)
for stop in (6, 8):
    found = []
    for number, batch in enumerate(loader):
        found.append((sums(batch), generator.get_state().sum().item()))
        if number == stop:
            break
    show("a generator", found, generator.get_state().sum().item())

loader = DataLoader(points, 10)
found = []
for number, batch in enumerate(loader):
    found.append(sums(batch))
    if number == 2:
        loader.batch_sampler.batch_size = 7
    if number == 6:
        loader.batch_sampler.batch_size = 20
show("other sizes", found, [sums(b) for b in loader])

halves = random_split(points, [60, 60], generator=torch.Generator().manual_seed(1))
loaders = [DataLoader(half, 20, shuffle=True) for half in halves]
for _ in range(2):
    show("halves", [[sums(b) for b in loader] for loader in loaders])
    halves[0].indices.reverse()
    points.epoch = 100


class Broken(Points):
    def __getitem__(self, i):
        if i == 50:
            raise KeyError("fifty")
        return self.x[i], 0 if get_worker_info() is None else 1


batches = iter(DataLoader(Broken(), 20))
for _ in range(8):
    try:
        show("errors", sums(next(batches)))
    except (KeyError, StopIteration) as error:
        show("errors", type(error).__name__, error)


class Halves(Points):
    def __getitem__(self, i):
        return torch.tensor([0.5, i]), torch.full((2,), 2.0)


halves = DataLoader(Halves(), 60)
torch.set_default_dtype(torch.float64)
show("default dtype", [b[0].dtype for b in halves])
torch.set_default_dtype(torch.float32)
with torch.inference_mode():
    show("inference", [(b[0].dtype, b[0].is_inference()) for b in halves])
with torch.autocast("cpu", dtype=torch.bfloat16):
    show("autocast", [b[0].dtype for b in halves])
batch = next(iter(halves))[0]
show("memory", batch.is_shared(), batch.resize_(200, 3).shape)

tensors = TensorDataset(torch.arange(60.0), torch.zeros(60))
found = []
for number, batch in enumerate(itertools.chain(*[DataLoader(tensors, 6, shuffle=True)] * 2)):
    found.append(sums(batch))
    if number == 4:
        tensors.tensors[1][::3] += 1
    if number == 12:
        tensors.tensors = (tensors.tensors[0] * 2, tensors.tensors[1])
show("tensors", found)

Points.__getitem__ = lambda self, i: self.x[i] * 5
show("another method", [float(b.sum()) for b in DataLoader(points, 50)])
show("single samples", [float(b[0]) for b in DataLoader(TensorDataset(torch.ones(3)), None)])
try:
    os.wait()
except ChildProcessError:
    print("no children")
