"""Datasets that do more than return a sample, or whose samples are more than their index says."""
# flatout run --set loader=workers
# flatout run --set loader=prefetch
# flatout run --set loader=cache

import sqlite3
import threading

import torch
from torch.utils.data import DataLoader, Dataset, Sampler, default_collate


class Data(Dataset):
    """Gets a sample by a function of the program."""

    def __init__(self, get, **attributes):
        self.x = torch.arange(64.0)[:, None].repeat(1, 2)
        vars(self).update(attributes)
        self.get = get

    def __len__(self):
        return 64

    def __getitem__(self, i):
        return self.get(self, i)


class Once:
    """A transform that counts on its class."""

    calls = 0

    def __call__(self, x):
        Once.calls += 1
        return x


def visit(data, i):
    data.visits[i] += 1
    return data.x[i]


def remember(data, i):
    return data.seen.setdefault(i, data.x[i] + len(data.seen))


def select(data, i):
    (value,) = data.connection.execute("select ?", (i,)).fetchone()
    return torch.tensor(value)


def count(data, i):
    global total
    total += 1
    return data.x[i]


def say(data, i):
    if i % 16 == 0:
        print("sample", i)
    return data.x[i]


def locked(data, i):
    with data.lock:
        return data.x[i]


total = 0
torch.manual_seed(0)
net = torch.nn.Linear(2, 1)
torch.nn.init.ones_(net.weight)
connection = sqlite3.connect(":memory:")
local = threading.local()
local.value = 3
seen = []
cases = {
    "visits": Data(visit, visits=torch.zeros(64)),
    "remembers": Data(remember, seen={}),
    "database": Data(select, connection=connection),
    "global": Data(count),
    "prints": Data(say),
    "lock": Data(locked, lock=threading.Lock()),
    "thread": Data(lambda data, i: data.x[i] * local.value),
    "log": Data(lambda data, i: (seen.append(i), data.x[i])[1]),
    "model": Data(lambda data, i: net(data.x[i]).detach()),
    "transform": Data(lambda data, i: data.transform(data.x[i]), transform=Once()),
    "own generator": Data(
        lambda data, i: data.x[i] + torch.rand(1, generator=data.generator),
        generator=torch.Generator().manual_seed(0),
    ),
    "iterator": Data(lambda data, i: data.x[i] + next(data.numbers), numbers=iter(range(999))),
    "trained": Data(
        lambda data, i: data.x[i] * data.scale, scale=torch.ones(2, requires_grad=True)
    ),
}
for name, data in cases.items():
    found = []
    for _ in range(3):
        for batch in DataLoader(data, 16):
            found.append(float(batch.sum()))
            with torch.no_grad():
                net.weight += 1
            local.value += 1
    print(name, found, batch.requires_grad)
print(
    cases["visits"].visits.sum().item(), total, len(seen), Once.calls, len(cases["remembers"].seen)
)


class Batches(Data):
    def __getitems__(self, indices):
        return self.x[indices]


class Hard(Sampler):
    """Draws what the training found hard."""

    def __init__(self):
        self.loss = torch.zeros(64)

    def __iter__(self):
        for _ in range(64):
            yield int(self.loss.argmax())

    def __len__(self):
        return 64


def by_hand(samples):
    return default_collate(samples)


def apart(samples):
    return torch.stack([x for x, _ in samples]), [f for _, f in samples]


sampler = Hard()
for name, loader in {
    "whole batches": DataLoader(Batches(None), 16, collate_fn=lambda batch: batch),
    "cannot be pickled": DataLoader(
        Data(lambda data, i: (data.x[i], lambda: i)), 8, collate_fn=apart
    ),
    "hard ones": DataLoader(Data(lambda data, i: (data.x[i], i)), 4, sampler=sampler),
    "program's memory": DataLoader(Data(lambda data, i: data.x[i]), batch_size=None),
    "collated by hand": DataLoader(Data(lambda data, i: i), 8, collate_fn=by_hand),
}.items():
    for _ in range(2):
        found = []
        for batch in loader:
            x = batch if torch.is_tensor(batch) else batch[0]
            found.append((type(batch).__name__, float(x.sum())))
            if name == "hard ones":
                sampler.loss[batch[1]] -= x[:, 0] + 1
            if name == "program's memory":
                x *= 2
        print(name, found)
