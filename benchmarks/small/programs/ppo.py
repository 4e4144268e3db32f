"""Proximal policy optimization by stable-baselines3. A step is a rollout and its updates.

python ppo.py --steps 20 --seed 1
"""

from __future__ import annotations

import argparse

from stable_baselines3 import PPO
from stable_baselines3.common.callbacks import BaseCallback


class Report(BaseCallback):
    def _on_step(self) -> bool:
        return True

    def _on_rollout_end(self) -> None:
        step = self.num_timesteps // self.model.n_steps
        rewards = [episode["r"] for episode in self.model.ep_info_buffer]
        print(f"step {step} loss {-sum(rewards) / len(rewards):.3f}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--steps", type=int, default=16)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    model = PPO("MlpPolicy", "CartPole-v1", n_steps=512, seed=arguments.seed, device="cpu")
    model.learn(arguments.steps * model.n_steps, callback=Report())


if __name__ == "__main__":
    main()
