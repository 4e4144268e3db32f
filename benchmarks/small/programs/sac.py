"""Soft actor-critic by stable-baselines3: an update after each step in the environment.

python sac.py --steps 500 --seed 1
"""

from __future__ import annotations

import argparse

from stable_baselines3 import SAC
from stable_baselines3.common.callbacks import BaseCallback

WARM_UP = 100


class Report(BaseCallback):
    def _on_step(self) -> bool:
        step = self.num_timesteps - WARM_UP
        if step > 0 and step % 20 == 0:
            loss = self.model.logger.name_to_value["train/critic_loss"]
            print(f"step {step} loss {loss:.4f}", flush=True)
        return True


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--steps", type=int, default=500)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    model = SAC("MlpPolicy", "Pendulum-v1", seed=arguments.seed, device="cpu")
    model.learn(WARM_UP + arguments.steps, callback=Report())


if __name__ == "__main__":
    main()
