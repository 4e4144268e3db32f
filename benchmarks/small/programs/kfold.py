"""Cross-validation: twenty small nets, trained one after the other in one process.

python kfold.py --steps 4000 --seed 1
"""

from __future__ import annotations

import argparse

import torch
from torch import nn
from torch.nn import functional as F

FOLDS, EPOCHS, BATCH_SIZE = 20, 4, 32


def make_table(rows: int = 4000) -> tuple[torch.Tensor, torch.Tensor]:
    y = torch.randint(5, (rows,))
    x = torch.randn(5, 24)[y] + 2 * torch.randn(rows, 24)
    return x, y


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.hidden = nn.Linear(24, 48)
        self.norm = nn.BatchNorm1d(48)
        self.dropout = nn.Dropout(0.1)
        self.head = nn.Linear(48, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.dropout(F.gelu(self.norm(self.hidden(x)))))


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--steps", type=int, default=9000)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    torch.manual_seed(arguments.seed)
    x, y = make_table()
    step, fold = 0, 0
    while step < arguments.steps:
        is_held_out = torch.arange(len(x)) % FOLDS == fold % FOLDS
        x_train, y_train = x[~is_held_out], y[~is_held_out]
        model = Net()
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
        for _ in range(EPOCHS):
            model.train()
            for rows in torch.randperm(len(x_train)).split(BATCH_SIZE):
                if step == arguments.steps:
                    break
                loss = F.cross_entropy(model(x_train[rows]), y_train[rows])
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                step += 1
            model.eval()
            with torch.no_grad():
                found = F.cross_entropy(model(x[is_held_out]), y[is_held_out])
            print(f"step {step} loss {found.item():.4f}", flush=True)
        fold += 1


if __name__ == "__main__":
    main()
