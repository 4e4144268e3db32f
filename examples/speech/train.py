"""Train a network to tell five languages apart, from recorded telephone prompts.

python train.py            # 8 epochs: over 90 % of unheard sentences (chance: 20 %)
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from data import FOLDER, load_speech
from model import LanguageClassifier
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader


@torch.no_grad()
def accuracy(model: nn.Module, loader: DataLoader) -> float:
    """Share of clips whose language is the model's first choice."""
    model.eval()
    right = sum((model(clips).argmax(1) == labels).sum().item() for clips, labels in loader)
    model.train()
    return right / len(loader.dataset)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, default=FOLDER)
    parser.add_argument("--epochs", type=int, default=8)
    parser.add_argument("--steps", type=int, help="stop after so many steps")
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--lr", type=float, default=3e-3, help="at its peak")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--save", metavar="FILE", help="write the trained model here")
    arguments = parser.parse_args()

    torch.manual_seed(arguments.seed)
    train_set, test_set = load_speech(arguments.data)
    print(f"{len(train_set)} clips to learn from, {len(test_set)} to test with")
    loader = DataLoader(train_set, arguments.batch_size, shuffle=True)
    test_loader = DataLoader(test_set, 100)
    model = LanguageClassifier()
    optimizer = torch.optim.AdamW(model.parameters(), lr=arguments.lr, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, arguments.lr, total_steps=max(1, arguments.epochs * len(loader))
    )
    step = 0
    for epoch in range(arguments.epochs):
        for clips, labels in loader:
            loss = F.cross_entropy(model(clips), labels)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
            if step % 10 == 0:
                print(f"step {step} loss {loss.item():.6f}", flush=True)
            step += 1
            if step == arguments.steps:
                break
        print(f"epoch {epoch} test accuracy {accuracy(model, test_loader):.4f}", flush=True)
        if step == arguments.steps:
            break
    if arguments.save:
        torch.save(model.state_dict(), arguments.save)


if __name__ == "__main__":
    main()
