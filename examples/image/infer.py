"""Recognise the test images with a network that train.py has saved.

python train.py --save digits.pt
python infer.py digits.pt
"""

from __future__ import annotations

import argparse

import torch
from data import load_digits
from models import MODELS
from torch.utils.data import DataLoader


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("checkpoint")
    parser.add_argument("--batch-size", type=int, default=50)
    arguments = parser.parse_args()

    checkpoint = torch.load(arguments.checkpoint)
    model = MODELS[checkpoint["name"]]()
    model.load_state_dict(checkpoint["model"])
    model.eval()
    _, test_set = load_digits()
    right = 0
    with torch.inference_mode():
        for images, labels in DataLoader(test_set, arguments.batch_size):
            right += (model(images).argmax(1) == labels).sum().item()
    print(f"{right} of {len(test_set)} images recognised")


if __name__ == "__main__":
    main()
