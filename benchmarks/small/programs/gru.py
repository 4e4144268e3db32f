"""A small GRU that forecasts the next value of four sensors from the last 24.

python gru.py --steps 2000 --seed 1
"""

from __future__ import annotations

import argparse

import torch
from torch import nn
from torch.utils.data import DataLoader, Dataset

WINDOW = 24


class Windows(Dataset):
    def __init__(self, series: torch.Tensor) -> None:
        self.series = series

    def __len__(self) -> int:
        return len(self.series) - WINDOW

    def __getitem__(self, index: int) -> tuple[torch.Tensor, torch.Tensor]:
        return self.series[index : index + WINDOW], self.series[index + WINDOW]


class Forecaster(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.gru = nn.GRU(4, 32, batch_first=True)
        self.head = nn.Linear(32, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        output, _ = self.gru(x)
        return self.head(output[:, -1])


def make_series(length: int = 20_000) -> torch.Tensor:
    hours = torch.arange(length, dtype=torch.float32).unsqueeze(1)
    periods = torch.tensor([24.0, 60.0, 168.0, 37.0])
    return torch.sin(2 * torch.pi * hours / periods) + 0.1 * torch.randn(length, 4)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--steps", type=int, default=1500)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    torch.manual_seed(arguments.seed)
    dataset = Windows(make_series())
    loader = DataLoader(dataset, batch_size=32, shuffle=True)
    model = Forecaster()
    optimizer = torch.optim.Adam(model.parameters(), lr=2e-3)
    step = 0
    while step < arguments.steps:
        for x, y in loader:
            optimizer.zero_grad()
            loss = nn.functional.mse_loss(model(x), y)
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            if step % 25 == 0:
                print(f"step {step} loss {loss.item():.4f}", flush=True)
            step += 1
            if step == arguments.steps:
                break


if __name__ == "__main__":
    main()
