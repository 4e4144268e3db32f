"""A classifier of tables by pytorch-tabnet. A step is an epoch.

python tabnet.py --steps 20 --seed 1
"""

from __future__ import annotations

import argparse
import warnings

import numpy as np
from pytorch_tabnet.callbacks import Callback
from pytorch_tabnet.tab_model import TabNetClassifier


class Report(Callback):
    def on_epoch_end(self, epoch: int, logs: dict[str, float] | None = None) -> None:
        print(f"step {epoch} loss {logs['loss']:.4f}", flush=True)


def make_table(rows: int = 4096) -> tuple[np.ndarray, np.ndarray]:
    random = np.random.default_rng(0)
    y = random.integers(7, size=rows)
    x = random.normal(size=(7, 32))[y] + 2 * random.normal(size=(rows, 32))
    return x.astype(np.float32), y


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    warnings.simplefilter("ignore")
    x, y = make_table()
    classifier = TabNetClassifier(seed=arguments.seed, verbose=0, device_name="cpu")
    classifier.fit(
        x,
        y,
        max_epochs=arguments.steps,
        batch_size=512,
        virtual_batch_size=128,
        callbacks=[Report()],
    )


if __name__ == "__main__":
    main()
