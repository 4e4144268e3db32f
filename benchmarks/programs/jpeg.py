"""A small CNN on JPEG files: their decoding takes most of a step.

    python jpeg.py --steps 200 --seed 1

The files are drawn at the start, into a temporary folder: polygons of four kinds, of any size,
colour and place, on a noisy background. The data set opens them with Pillow, crops, shrinks and
flips.
"""

from __future__ import annotations

import argparse
import math
import random
import tempfile
from pathlib import Path

import torch
from PIL import Image, ImageDraw
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, Dataset

FILE_PIXELS = 320
CORNERS = (3, 4, 6, 60)
"""Of the shapes, one for each class; the last one is as good as a circle."""


def draw(corners: int, generator: random.Random) -> Image.Image:
    """A regular polygon of that many corners somewhere on a noisy background."""
    noise = Image.frombytes("RGB", (80, 80), generator.randbytes(3 * 80 * 80))
    dark = noise.point(lambda value: value // 3)
    image = dark.resize((FILE_PIXELS, FILE_PIXELS), Image.Resampling.BICUBIC)
    radius = generator.uniform(0.2, 0.35) * FILE_PIXELS
    x, y = (generator.uniform(0.4, 0.6) * FILE_PIXELS for _ in range(2))
    turned = generator.uniform(0, 2 * math.pi)
    angles = [turned + 2 * math.pi * corner / corners for corner in range(corners)]
    outline = [(x + radius * math.cos(a), y + radius * math.sin(a)) for a in angles]
    red, green, blue = (generator.randrange(100, 256) for _ in range(3))
    ImageDraw.Draw(image).polygon(outline, fill=(red, green, blue))
    return image


def write_files(folder: Path, count: int) -> list[tuple[Path, int]]:
    """Draw the files; returns their paths with the numbers of their classes."""
    generator = random.Random(0)
    files = []
    for number in range(count):
        label = number % len(CORNERS)
        path = folder / f"{number:05}.jpg"
        draw(CORNERS[label], generator).save(path, quality=90)
        files.append((path, label))
    return files


class Shapes(Dataset):
    """Decoded, augmented images (3, pixels, pixels) in [-1, 1], and their classes."""

    def __init__(self, files: list[tuple[Path, int]], pixels: int) -> None:
        self.files = files
        self.pixels = pixels

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
        path, label = self.files[index]
        with Image.open(path) as file:
            image = file.convert("RGB")
        left, top, flip = torch.rand(3).tolist()
        size = int(0.9 * FILE_PIXELS)
        left, top = (int(share * (FILE_PIXELS - size)) for share in (left, top))
        box = (left, top, left + size, top + size)
        image = image.resize((self.pixels, self.pixels), Image.Resampling.BILINEAR, box)
        if flip < 0.5:
            image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        pixels = torch.frombuffer(bytearray(image.tobytes()), dtype=torch.uint8)
        pixels = pixels.view(self.pixels, self.pixels, 3).permute(2, 0, 1)
        return pixels.float() / 127.5 - 1, label


def build_model(width: int) -> nn.Module:
    layers: list[nn.Module] = []
    channels = 3
    for wider in (width, 2 * width, 4 * width):
        layers += [
            nn.Conv2d(channels, wider, 3, padding=1, bias=False),
            nn.BatchNorm2d(wider),
            nn.ReLU(inplace=True),
            nn.MaxPool2d(2),
        ]
        channels = wider
    layers += [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(channels, len(CORNERS))]
    return nn.Sequential(*layers)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--files", type=int, default=480)
    parser.add_argument("--pixels", type=int, default=48)
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--width", type=int, default=16)
    parser.add_argument("--workers", type=int, default=0)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    torch.manual_seed(arguments.seed)
    with tempfile.TemporaryDirectory() as folder:
        files = write_files(Path(folder), arguments.files)
        loader = DataLoader(
            Shapes(files, arguments.pixels),
            arguments.batch_size,
            shuffle=True,
            num_workers=arguments.workers,
        )
        train(build_model(arguments.width), loader, arguments.steps)


def train(model: nn.Module, loader: DataLoader, steps: int) -> None:
    optimizer = torch.optim.Adam(model.parameters(), lr=2e-3)
    step = 0
    while step < steps:
        for images, labels in loader:
            loss = F.cross_entropy(model(images), labels)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            if step % 10 == 0:
                print(f"step {step} loss {loss.item():.6f}", flush=True)
            step += 1
            if step == steps:
                break


if __name__ == "__main__":
    main()
