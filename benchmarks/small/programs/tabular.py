"""A multilayer perceptron on a table of numbers: batches of 64 rows, three layers of 64.

python tabular.py --steps 2000 --seed 1
"""

from __future__ import annotations

import argparse

import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset


def make_table(rows: int = 8192) -> TensorDataset:
    x = torch.randn(rows, 32)
    y = torch.sin(2 * x[:, :8]).sum(1) + x[:, 8] * x[:, 9] + 0.1 * torch.randn(rows)
    return TensorDataset(x, y.unsqueeze(1))


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--steps", type=int, default=4000)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    torch.manual_seed(arguments.seed)
    dataset = make_table()
    loader = DataLoader(dataset, batch_size=64, shuffle=True)
    model = nn.Sequential(
        nn.Linear(32, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 1)
    )
    criterion = nn.MSELoss()
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    step = 0
    while step < arguments.steps:
        for x, y in loader:
            optimizer.zero_grad()
            loss = criterion(model(x), y)
            loss.backward()
            optimizer.step()
            if step % 100 == 0:
                print(f"step {step} loss {loss.item():.4f}", flush=True)
            step += 1
            if step == arguments.steps:
                break


if __name__ == "__main__":
    main()
