"""A vision transformer that only infers, over batches of images from the host."""

import argparse

import torch
from common import DEVICE, digits
from torch import nn
from torch.nn import functional as F

parser = argparse.ArgumentParser()
parser.add_argument("--batches", type=int, default=200)
parser.add_argument("--batch-size", type=int, default=64)
parser.add_argument("--width", type=int, default=512)
arguments = parser.parse_args()


class Classifier(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        layer = nn.TransformerEncoderLayer(
            width, width // 64, 4 * width, batch_first=True, norm_first=True, activation="gelu"
        )
        self.patches = nn.Conv2d(1, width, 8, 8)
        self.encoder = nn.TransformerEncoder(layer, 8, enable_nested_tensor=False)
        self.head = nn.Linear(width, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        tokens = self.patches(x).flatten(2).transpose(1, 2)
        return self.head(self.encoder(tokens).mean(1))


torch.manual_seed(0)
images, _ = digits()
classifier = Classifier(arguments.width).eval().to(DEVICE)
counts = torch.zeros(10, dtype=torch.long)
with torch.inference_mode():
    for number in range(arguments.batches):
        at = arguments.batch_size * number % (len(images) - arguments.batch_size)
        batch = F.interpolate(images[at : at + arguments.batch_size], scale_factor=4)
        counts += classifier(batch.to(DEVICE)).argmax(1).cpu().bincount(minlength=10)
print(f"counts {counts.tolist()}")
