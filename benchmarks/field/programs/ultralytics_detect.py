"""Object detection by Ultralytics' own command line, which accumulates eight batches to a step.

Run by itself, this file makes the images: coloured discs and squares on noise, with their boxes.
"""

# /// script
# dependencies = ["ultralytics-opencv-headless", "torchvision"]
#
# [tool.field]
# title = "Ultralytics, `yolo detect train`"
# command = [
#     "{bin}/yolo", "detect", "train", "model=yolo26n.yaml", "data={data}/shapes.yaml", "epochs=3",
#     "imgsz=160", "batch=8", "workers=0", "device=cpu", "plots=False", "seed={seed}",
#     "project={folder}",
# ]
# prepares = true
# environment = { YOLO_CONFIG_DIR = "{data}", YOLO_AUTOINSTALL = "false" }
# result = '^ +all +\d+ +\d+ +([\d.e-]+) +([\d.e-]+) +([\d.e-]+) +([\d.e-]+)'
# clock = '\d+ epochs completed in ([\d.]+) hours'
# clock_unit_s = 3600
# ///

from pathlib import Path

import cv2
import numpy as np

IMAGES = {"train": 256, "val": 64}
PIXELS = 160


def main() -> None:
    """Write the images and labels into the working folder."""
    random = np.random.default_rng(0)
    for part, count in IMAGES.items():
        images, labels = Path("images", part), Path("labels", part)
        images.mkdir(parents=True)
        labels.mkdir(parents=True)
        for number in range(count):
            image = random.integers(0, 90, (PIXELS, PIXELS, 3), dtype=np.uint8)
            lines = []
            for _ in range(random.integers(1, 5)):
                kind, radius = int(random.integers(2)), int(random.integers(10, 30))
                x, y = (int(v) for v in random.integers(radius, PIXELS - radius, 2))
                colour = tuple(int(v) for v in random.integers(120, 256, 3))
                if kind:
                    cv2.circle(image, (x, y), radius, colour, -1)
                else:
                    low, high = (x - radius, y - radius), (x + radius, y + radius)
                    cv2.rectangle(image, low, high, colour, -1)
                box = (x / PIXELS, y / PIXELS, 2 * radius / PIXELS, 2 * radius / PIXELS)
                lines.append(" ".join([str(kind), *(f"{value:.5f}" for value in box)]))
            cv2.imwrite(str(images / f"{number:04}.jpg"), image)
            (labels / f"{number:04}.txt").write_text("\n".join(lines) + "\n")
    Path("shapes.yaml").write_text(
        f"path: {Path.cwd()}\ntrain: images/train\nval: images/val\nnames: [square, disc]\n"
    )


if __name__ == "__main__":
    main()
