"""Proximal policy optimization by stable-baselines3: rollouts and updates take turns."""

# /// script
# dependencies = ["stable-baselines3"]
#
# [tool.field]
# title = "stable-baselines3, PPO on CartPole"
# command = ["{python}", "{file}", "{seed}"]
# result = 'mean reward ([\d.]+)'
# clock = 'trained for ([\d.]+) s'
# ///

import sys
import time

from stable_baselines3 import PPO
from stable_baselines3.common.evaluation import evaluate_policy


def main() -> None:
    """Train, evaluate and save an agent."""
    model = PPO("MlpPolicy", "CartPole-v1", verbose=1, seed=int(sys.argv[1]), device="cpu")
    start_s = time.perf_counter()
    model.learn(30_000)
    print(f"trained for {time.perf_counter() - start_s:.2f} s")
    model.save("ppo_cartpole")
    mean, _ = evaluate_policy(model, model.get_env(), n_eval_episodes=20)
    print(f"mean reward {mean:.2f}")


if __name__ == "__main__":
    main()
