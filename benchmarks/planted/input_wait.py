"""A dataset that is slow to read: about 70 % of a step."""

import time

import torch
from torch import nn
from torch.utils.data import DataLoader, Dataset
from truth import Truth

torch.manual_seed(0)
truth = Truth()


class Slow(Dataset):
    wait_s = 0.0

    def __len__(self):
        return 16_000

    def __getitem__(self, index):
        with truth.part():
            time.sleep(self.wait_s)
            return torch.full((512,), index / 16_000), index % 10


model = nn.Sequential(nn.Linear(512, 1024), nn.ReLU(), nn.Linear(1024, 10))
optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)


def train(x, y):
    optimizer.zero_grad()
    nn.functional.cross_entropy(model(x), y).backward()
    optimizer.step()


for x, y in DataLoader(Slow(), batch_size=8):
    began_s = time.perf_counter()
    train(x.repeat(8, 1), y.repeat(8))
    Slow.wait_s = 7 / 3 * (time.perf_counter() - began_s) / 8
    truth.step()
