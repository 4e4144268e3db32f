"""A small recurrent network, unrolled in Python: steps of a millisecond or two, mostly overhead.

    python python_bound.py --steps 5000 --seed 1

It learns which byte follows the last few in the standard library's sources.
"""

from __future__ import annotations

import argparse
import sysconfig
from pathlib import Path

import torch
from torch import nn
from torch.nn import functional as F

VOCABULARY = 128  # ASCII
TEXT_BYTES = 1_000_000


class Network(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(VOCABULARY, width)
        self.cell = nn.RNNCell(width, width)
        self.head = nn.Linear(width, VOCABULARY)

    def forward(self, text: torch.Tensor) -> torch.Tensor:
        """Logits (batch, vocabulary) of the byte that follows ``text`` (batch, time)."""
        hidden = None
        for inputs in self.embedding(text).unbind(1):
            hidden = self.cell(inputs, hidden)
        return self.head(hidden)


def load_text() -> torch.Tensor:
    text = bytearray()
    for path in sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py")):
        source = path.read_bytes()
        if source.isascii():
            text += source
        if len(text) >= TEXT_BYTES:
            break
    return torch.frombuffer(text, dtype=torch.uint8).long()


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--steps", type=int, default=20_000)
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--context", type=int, default=8)
    parser.add_argument("--width", type=int, default=32)
    parser.add_argument("--lr", type=float, default=2e-3)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    torch.manual_seed(arguments.seed)
    windows = load_text().unfold(0, arguments.context + 1, 1)
    model = Network(arguments.width)
    optimizer = torch.optim.Adam(model.parameters(), lr=arguments.lr)
    for step in range(arguments.steps):
        batch = windows[torch.randint(len(windows), (arguments.batch_size,))]
        loss = F.cross_entropy(model(batch[:, :-1]), batch[:, -1])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if step % 100 == 0:
            print(f"step {step} loss {loss.item():.6f}", flush=True)


if __name__ == "__main__":
    main()
