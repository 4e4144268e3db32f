"""Requests that come one at a time: a trained net judges a single row per call.

python rows.py --steps 20000 --seed 1
"""

from __future__ import annotations

import argparse

import torch
from torch import nn


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--steps", type=int, default=30_000)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    torch.manual_seed(arguments.seed)
    model = nn.Sequential(
        nn.Linear(32, 128), nn.LayerNorm(128), nn.GELU(), nn.Linear(128, 64), nn.GELU()
    )
    model.append(nn.Linear(64, 2))
    model.eval()
    requests = torch.randn(4096, 1, 32)
    total = 0.0
    with torch.inference_mode():
        for step in range(arguments.steps):
            scores = model(requests[step % 4096]).softmax(1)
            total += float(scores[0, 1])
            if step % 1000 == 0:
                print(f"step {step} counts {total:.5f}", flush=True)


if __name__ == "__main__":
    main()
