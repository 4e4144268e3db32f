"""Forecasts of many series by NeuralForecast's N-HiTS."""

# /// script
# dependencies = ["neuralforecast"]
#
# [tool.field]
# title = "NeuralForecast, N-HiTS"
# command = ["{python}", "{file}", "{seed}"]
# result = 'mean absolute error ([\d.]+)'
# clock = 'fitted in ([\d.]+) s'
# ///

import logging
import sys
import time

import numpy as np
import pandas as pd
from neuralforecast import NeuralForecast
from neuralforecast.models import NHITS

SERIES, HOURS, HORIZON = 60, 1_000, 48


def make_series() -> pd.DataFrame:
    """Return hourly series with a day, a week, a trend and noise."""
    random = np.random.default_rng(0)
    hours = np.arange(HOURS)
    frames = []
    for number in range(SERIES):
        day, week = random.uniform(0.5, 2.0, 2)
        shift = random.uniform(0, 2 * np.pi, 2)
        y = day * np.sin(2 * np.pi * hours / 24 + shift[0])
        y += week * np.sin(2 * np.pi * hours / 168 + shift[1])
        y += random.normal(0, 0.001) * hours + random.normal(0, 0.3, HOURS)
        when = pd.date_range("2024-01-01", periods=HOURS, freq="h")
        frames.append(pd.DataFrame({"unique_id": f"s{number:02}", "ds": when, "y": y}))
    return pd.concat(frames, ignore_index=True)


def main() -> None:
    """Fit, forecast and save."""
    logging.getLogger("pytorch_lightning").setLevel(logging.WARNING)
    series = make_series()
    is_future = series.groupby("unique_id").cumcount() >= HOURS - HORIZON
    model = NHITS(
        h=HORIZON,
        input_size=5 * HORIZON,
        max_steps=300,
        val_check_steps=50,
        random_seed=int(sys.argv[1]),
        accelerator="cpu",
        enable_progress_bar=False,
    )
    forecast = NeuralForecast(models=[model], freq="h")
    start_s = time.perf_counter()
    forecast.fit(df=series[~is_future], val_size=HORIZON)
    print(f"fitted in {time.perf_counter() - start_s:.2f} s")
    found = forecast.predict().merge(series[is_future], on=["unique_id", "ds"])
    forecast.save("nhits", overwrite=True)
    print(f"mean absolute error {(found['NHITS'] - found['y']).abs().mean():.5f}")


if __name__ == "__main__":
    main()
