"""Forecasts of many series by NeuralForecast's N-HiTS.

python nhits.py --steps 300 --seed 1
"""

from __future__ import annotations

import argparse
import logging
import warnings

import numpy as np
import pandas as pd
from lightning.pytorch.callbacks import Callback
from neuralforecast import NeuralForecast
from neuralforecast.models import NHITS

SERIES, HOURS, HORIZON = 40, 600, 24


class Report(Callback):
    def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
        step = trainer.global_step
        if step % 20 == 0:
            print(f"step {step} loss {outputs['loss'].item():.5f}", flush=True)


def make_series() -> pd.DataFrame:
    """Hourly series with a day, a week and noise."""
    random = np.random.default_rng(0)
    hours = np.arange(HOURS)
    frames = []
    for number in range(SERIES):
        day, week = random.uniform(0.5, 2.0, 2)
        y = day * np.sin(2 * np.pi * hours / 24) + week * np.sin(2 * np.pi * hours / 168)
        y += random.normal(0, 0.3, HOURS)
        when = pd.date_range("2024-01-01", periods=HOURS, freq="h")
        frames.append(pd.DataFrame({"unique_id": f"s{number:02}", "ds": when, "y": y}))
    return pd.concat(frames, ignore_index=True)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    warnings.simplefilter("ignore")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    model = NHITS(
        h=HORIZON,
        input_size=5 * HORIZON,
        max_steps=arguments.steps,
        random_seed=arguments.seed,
        accelerator="cpu",
        enable_progress_bar=False,
        logger=False,
        enable_checkpointing=False,
        callbacks=[Report()],
    )
    NeuralForecast(models=[model], freq="h").fit(make_series())


if __name__ == "__main__":
    main()
