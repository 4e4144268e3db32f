"""timm's train.py, as it lies in timm's repository, on a folder of images.

Run by itself, this file makes the images: stripes of ten directions.
"""

# /// script
# dependencies = ["timm", "torchvision"]
#
# [tool.field]
# title = "timm, `train.py`"
# command = [
#     "{python}", "{source}/train.py", "--data-dir", "{data}", "--model", "resnet18",
#     "--num-classes", "10", "--img-size", "96", "-b", "32", "--epochs", "2",
#     "--warmup-epochs", "0", "--opt", "adamw", "--lr", "1e-3", "--mixup", "0.2", "--model-ema",
#     "--workers", "1", "--device", "cpu", "--seed", "{seed}", "--output", "{folder}",
# ]
# prepares = true
# result = '^Test: \[ +3/3\].*Loss: +[\d.]+ \( *([\d.]+)\).*Acc@1: +[\d.]+ \( *([\d.]+)\)'
#
# [tool.field.source]
# repository = "https://github.com/huggingface/pytorch-image-models"
# commit = "aa4b5850"
# paths = ["train.py"]
# ///

from pathlib import Path

import numpy as np
from PIL import Image

CLASSES, PIXELS = 10, 128
IMAGES = {"train": 64, "validation": 12}


def main() -> None:
    """Write the images into the working folder, a folder for each part and class."""
    random = np.random.default_rng(0)
    y, x = np.mgrid[:PIXELS, :PIXELS]
    for part, count in IMAGES.items():
        for kind in range(CLASSES):
            folder = Path(part, f"class{kind}")
            folder.mkdir(parents=True)
            for number in range(count):
                angle = np.pi * (kind + random.uniform(-0.3, 0.3)) / CLASSES
                waves = np.sin(
                    (x * np.cos(angle) + y * np.sin(angle)) / random.uniform(2, 6)
                    + random.uniform(0, 6)
                )
                image = 128 + 60 * waves[..., None] * random.uniform(0.3, 1, 3)
                image += random.normal(0, 30, (PIXELS, PIXELS, 3))
                pixels = image.clip(0, 255).astype(np.uint8)
                Image.fromarray(pixels).save(folder / f"{number:03}.jpg")


if __name__ == "__main__":
    main()
