"""A recurrent tagger on sequences of many lengths, each batch as long as its bucket.

    python bucketed.py --steps 500 --seed 1

It learns the parity of the tokens so far. The time of a step varies with the bucket by a factor of
eight, every tenth bucket ends with a smaller batch, and every 50 steps it is evaluated.
"""

from __future__ import annotations

import argparse
import random
from collections.abc import Iterator

import torch
from torch import nn
from torch.nn import functional as F

VOCABULARY = 16
LENGTHS = (8, 12, 16, 24, 32, 48, 64)


class Tagger(nn.Module):
    def __init__(self, width: int = 128) -> None:
        super().__init__()
        self.embedding = nn.Embedding(VOCABULARY, width)
        self.recurrence = nn.LSTM(width, width, batch_first=True)
        self.head = nn.Linear(width, 2)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        states, _ = self.recurrence(self.embedding(tokens))
        return self.head(states)


def batches(size: int, seed: int) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    draw = random.Random(seed)
    while True:
        length = draw.choice(LENGTHS)
        rows = size if draw.random() < 0.9 else draw.randrange(1, size)
        tokens = torch.randint(VOCABULARY, (rows, length))
        yield tokens, tokens.cumsum(1) % 2


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--steps", type=int, default=500)
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    torch.manual_seed(arguments.seed)
    net = Tagger()
    optimizer = torch.optim.Adam(net.parameters(), lr=1e-3)
    stream = batches(arguments.batch_size, arguments.seed)
    for step in range(arguments.steps):
        tokens, tags = next(stream)
        loss = F.cross_entropy(net(tokens).flatten(0, 1), tags.flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if step % 50 == 0:
            net.eval()
            with torch.no_grad():
                right = (net(tokens).argmax(2) == tags).float().mean().item()
            net.train()
            print(f"step {step} loss {loss.item():.4f} right {right:.3f}", flush=True)


if __name__ == "__main__":
    main()
