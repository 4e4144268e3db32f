"""Segmentation by a U-Net of segmentation-models-pytorch on a ResNet-18."""

# /// script
# dependencies = ["segmentation-models-pytorch"]
#
# [tool.field]
# title = "segmentation-models-pytorch, U-Net"
# command = ["{python}", "{file}", "--seed", "{seed}"]
# result = 'best IoU ([\d.]+), last loss ([\d.]+)'
# clock = 'trained for ([\d.]+) s'
# ///

import argparse
import time

import segmentation_models_pytorch as smp
import torch
from torch.utils.data import DataLoader, Dataset

PIXELS = 96


class Discs(Dataset):
    """Discs on noise, and their masks; a sample depends on its index only."""

    def __init__(self, count: int, first: int) -> None:
        self.count, self.first = count, first
        self.grid = torch.stack(torch.meshgrid(*[torch.arange(PIXELS)] * 2, indexing="ij")).float()

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> tuple[torch.Tensor, torch.Tensor]:
        random = torch.Generator().manual_seed(self.first + index)
        image = 0.5 * torch.randn(3, PIXELS, PIXELS, generator=random)
        mask = torch.zeros(1, PIXELS, PIXELS)
        for _ in range(3):
            centre = PIXELS * torch.rand(2, 1, 1, generator=random)
            radius = 5 + 15 * torch.rand(1, generator=random)
            disc = ((self.grid - centre) ** 2).sum(0, keepdim=True) < radius**2
            image += disc * torch.randn(3, 1, 1, generator=random)
            mask[disc] = 1.0
        return image, mask


def main() -> None:
    """Train, with a validation after each epoch that keeps the best weights."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--epochs", type=int, default=3)
    args = parser.parse_args()
    torch.manual_seed(args.seed)
    model = smp.Unet("resnet18", encoder_weights=None, in_channels=3, classes=1)
    loss_of = smp.losses.DiceLoss(smp.losses.BINARY_MODE, from_logits=True)
    optimizer = torch.optim.Adam(model.parameters(), lr=2e-4)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, args.epochs)
    train = DataLoader(Discs(160, 0), batch_size=8, shuffle=True)
    valid = DataLoader(Discs(40, 10_000), batch_size=8)
    best = 0.0
    start_s = time.perf_counter()
    for epoch in range(args.epochs):
        model.train()
        for image, mask in train:
            loss = loss_of(model(image), mask)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        schedule.step()
        model.eval()
        counts = []
        with torch.no_grad():
            for image, mask in valid:
                found = model(image).sigmoid() > 0.5
                counts.append(smp.metrics.get_stats(found.long(), mask.long(), mode="binary"))
        summed = [torch.cat(parts) for parts in zip(*counts, strict=True)]
        iou = float(smp.metrics.iou_score(*summed, reduction="micro"))
        print(f"epoch {epoch}: loss {loss.item():.4f}, IoU {iou:.4f}", flush=True)
        if iou > best:
            best = iou
            torch.save(model.state_dict(), "best.pt")
    print(f"trained for {time.perf_counter() - start_s:.2f} s")
    print(f"best IoU {best:.4f}, last loss {loss.item():.4f}")


if __name__ == "__main__":
    main()
