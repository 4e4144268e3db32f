"""A recommender: embedding bags of what a user has seen, and of words about an item.

    python recommender.py --steps 500 --seed 1

A deep and wide click model in the manner of Covington et al. (2016) and Naumov et al. (2019), on
clicks that are drawn from hidden tastes of users and topics of items. The tables are large, a batch
touches little of them.
"""

from __future__ import annotations

import argparse
from typing import NamedTuple

import torch
from torch import nn
from torch.nn import functional as F

HIDDEN = 8
"""Tastes and topics behind the clicks."""


class Batch(NamedTuple):
    history: torch.Tensor  # items seen by all users of the batch, one after the other
    history_starts: torch.Tensor
    words: torch.Tensor
    words_starts: torch.Tensor
    dense: torch.Tensor
    clicked: torch.Tensor


class Clicks:
    """Batches of users, items and whether they were clicked."""

    def __init__(self, items: int, vocabulary: int, seed: int) -> None:
        self.generator = torch.Generator().manual_seed(seed)
        fixed = torch.Generator().manual_seed(0)
        self.topics = torch.randn(items, HIDDEN, generator=fixed)
        self.item_words = torch.randint(vocabulary, (items, 12), generator=fixed)

    def batch(self, size: int, longest: int = 40) -> Batch:
        draw = self.generator
        items = len(self.topics)
        lengths = torch.randint(1, longest + 1, (size,), generator=draw)
        starts = lengths.cumsum(0) - lengths
        # Popular items are seen more often.
        history = (items * torch.rand(int(lengths.sum()), generator=draw) ** 3).long()
        tastes = torch.zeros(size, HIDDEN)
        tastes.index_add_(0, torch.arange(size).repeat_interleave(lengths), self.topics[history])
        tastes /= lengths[:, None] ** 0.5
        shown = (items * torch.rand(size, generator=draw) ** 3).long()
        dense = torch.rand(size, 4, generator=draw)
        affinity = (tastes * self.topics[shown]).sum(1) + dense.sum(1) - 2
        clicked = (torch.rand(size, generator=draw) < affinity.sigmoid()).float()
        words = self.item_words[shown].flatten()
        return Batch(history, starts, words, torch.arange(size) * 12, dense, clicked)


class ClickModel(nn.Module):
    def __init__(self, items: int, vocabulary: int, width: int) -> None:
        super().__init__()
        self.seen = nn.EmbeddingBag(items, width, mode="mean")
        self.words = nn.EmbeddingBag(vocabulary, width, mode="mean")
        self.deep = nn.Sequential(
            nn.Linear(3 * width + 4, 512), nn.ReLU(), nn.Linear(512, 256), nn.ReLU()
        )
        self.wide = nn.Linear(4, 1)
        self.head = nn.Linear(256, 1)

    def forward(
        self,
        history: torch.Tensor,
        history_starts: torch.Tensor,
        words: torch.Tensor,
        words_starts: torch.Tensor,
        dense: torch.Tensor,
    ) -> torch.Tensor:
        """Logits (batch,) of a click."""
        user = self.seen(history, history_starts)
        item = self.words(words, words_starts)
        deep = self.deep(torch.cat([user, item, user * item, dense], dim=1))
        return (self.head(deep) + self.wide(dense)).squeeze(1)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--steps", type=int, default=2000)
    parser.add_argument("--batch-size", type=int, default=256)
    parser.add_argument("--items", type=int, default=100_000)
    parser.add_argument("--vocabulary", type=int, default=20_000)
    parser.add_argument("--width", type=int, default=32)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    torch.manual_seed(arguments.seed)
    clicks = Clicks(arguments.items, arguments.vocabulary, arguments.seed)
    model = ClickModel(arguments.items, arguments.vocabulary, arguments.width)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    for step in range(arguments.steps):
        batch = clicks.batch(arguments.batch_size)
        logits = model(*batch[:-1])
        loss = F.binary_cross_entropy_with_logits(logits, batch.clicked)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if step % 10 == 0:
            print(f"step {step} loss {loss.item():.6f}", flush=True)


if __name__ == "__main__":
    main()
