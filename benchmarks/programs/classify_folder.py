"""Recognise the shapes in a folder of JPEG files.

    python classify_folder.py FOLDER --prepare       # draw the files, train the network
    python classify_folder.py FOLDER --steps 100     # batches to recognise

The network is a residual one for 64 x 64 pixels; the files are those of ``jpeg.py``.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from jpeg import CORNERS, Shapes, write_files
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader

PIXELS = 64


class Residual(nn.Module):
    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False),
            nn.BatchNorm2d(outputs),
            nn.ReLU(inplace=True),
            nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False),
            nn.BatchNorm2d(outputs),
        )
        self.shortcut = nn.Conv2d(inputs, outputs, 1, stride, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.relu(self.body(x) + self.shortcut(x))


def build_model(width: int = 32) -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, width, 7, 2, 3, bias=False),
        nn.BatchNorm2d(width),
        nn.ReLU(inplace=True),
        Residual(width, width, 1),
        Residual(width, 2 * width, 2),
        Residual(2 * width, 4 * width, 2),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(4 * width, len(CORNERS)),
    )


def prepare(folder: Path, files: int, steps: int) -> None:
    """Draw the files and train the network on them."""
    torch.manual_seed(0)
    folder.mkdir(parents=True, exist_ok=True)
    loader = DataLoader(Shapes(write_files(folder, files), PIXELS), 16, shuffle=True)
    model = build_model()
    optimizer = torch.optim.Adam(model.parameters(), lr=2e-3)
    step = 0
    while step < steps:
        for images, labels in loader:
            loss = F.cross_entropy(model(images), labels)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            step += 1
            if step == steps:
                break
    torch.save(model.state_dict(), folder / "model.pt")
    print(f"loss {loss.item():.4f} after {steps} steps")


def classify(folder: Path, steps: int, batch_size: int) -> None:
    """Name the shape of every file, over and over until so many batches are done."""
    model = build_model()
    model.load_state_dict(torch.load(folder / "model.pt"))
    model.eval()
    paths = sorted(folder.glob("*.jpg"))
    loader = DataLoader(Shapes([(path, 0) for path in paths], PIXELS), batch_size)
    counts = torch.zeros(len(CORNERS), dtype=torch.long)
    step = 0
    while step < steps:
        for images, _ in loader:
            with torch.inference_mode():
                counts += model(images).argmax(1).bincount(minlength=len(CORNERS))
            if step % 5 == 0:
                print(f"step {step} counts {counts.tolist()}", flush=True)
            step += 1
            if step == steps:
                break


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("folder", type=Path)
    parser.add_argument("--prepare", action="store_true", help="draw the files, train the network")
    parser.add_argument("--files", type=int, default=320)
    parser.add_argument("--training-steps", type=int, default=200)
    parser.add_argument("--steps", type=int, default=500)
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    torch.manual_seed(arguments.seed)
    if arguments.prepare:
        prepare(arguments.folder, arguments.files, arguments.training_steps)
    else:
        classify(arguments.folder, arguments.steps, arguments.batch_size)


if __name__ == "__main__":
    main()
