"""A residual CNN with batch norm on digits: SGD with momentum, a plain loader, an evaluation."""

import argparse

import torch
from common import DEVICE, be_deterministic, digits
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

parser = argparse.ArgumentParser()
parser.add_argument("--epochs", type=int, default=10)
parser.add_argument("--batch-size", type=int, default=128)
parser.add_argument("--width", type=int, default=64)
parser.add_argument("--workers", type=int, default=0)
parser.add_argument("--seed", type=int, default=0)
parser.add_argument("--deterministic", action="store_true")
arguments = parser.parse_args()


class Block(nn.Module):
    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False)
        self.norm1, self.norm2 = nn.BatchNorm2d(outputs), nn.BatchNorm2d(outputs)
        self.shortcut = nn.Conv2d(inputs, outputs, 1, stride, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = F.relu(self.norm1(self.conv1(x)))
        return F.relu(self.norm2(self.conv2(y)) + self.shortcut(x))


if arguments.deterministic:
    be_deterministic()
torch.manual_seed(arguments.seed)
images, labels = digits()
width = arguments.width
model = nn.Sequential(
    *(nn.Conv2d(1, width, 3, 1, 1), Block(width, width, 1), Block(width, 2 * width, 2)),
    *(Block(2 * width, 4 * width, 2), nn.AdaptiveAvgPool2d(1), nn.Flatten()),
    nn.Linear(4 * width, 10),
).to(DEVICE)
optimizer = torch.optim.SGD(model.parameters(), lr=0.02, momentum=0.9, weight_decay=1e-4)
training = DataLoader(
    TensorDataset(images[::2], labels[::2]),
    arguments.batch_size,
    shuffle=True,
    drop_last=True,
    num_workers=arguments.workers,
)
testing = DataLoader(TensorDataset(images[1::2], labels[1::2]), arguments.batch_size)
for epoch in range(arguments.epochs):
    model.train()
    for x, y in training:
        x, y = x.to(DEVICE), y.to(DEVICE)
        loss = F.cross_entropy(model(x), y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    model.eval()
    with torch.no_grad():
        right = sum((model(x.to(DEVICE)).argmax(1).cpu() == y).sum().item() for x, y in testing)
    print(f"epoch {epoch} loss {loss.item():.6f} right {right}", flush=True)
