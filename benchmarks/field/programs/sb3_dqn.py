"""Deep Q-learning by stable-baselines3: a small update after every few steps of the environment."""

# /// script
# dependencies = ["stable-baselines3"]
#
# [tool.field]
# title = "stable-baselines3, DQN on CartPole"
# command = ["{python}", "{file}", "{seed}"]
# result = 'mean reward ([\d.]+)'
# clock = 'trained for ([\d.]+) s'
# ///

import sys
import time

from stable_baselines3 import DQN
from stable_baselines3.common.evaluation import evaluate_policy


def main() -> None:
    """Train, evaluate and save an agent, with the parameters of RL Zoo for this environment."""
    model = DQN(
        "MlpPolicy",
        "CartPole-v1",
        learning_rate=2.3e-3,
        batch_size=64,
        buffer_size=100_000,
        learning_starts=1_000,
        gamma=0.99,
        target_update_interval=10,
        train_freq=256,
        gradient_steps=128,
        exploration_fraction=0.16,
        exploration_final_eps=0.04,
        policy_kwargs={"net_arch": [256, 256]},
        verbose=1,
        seed=int(sys.argv[1]),
        device="cpu",
    )
    start_s = time.perf_counter()
    model.learn(20_000, log_interval=50)
    print(f"trained for {time.perf_counter() - start_s:.2f} s")
    model.save("dqn_cartpole")
    mean, _ = evaluate_policy(model, model.get_env(), n_eval_episodes=20)
    print(f"mean reward {mean:.2f}")


if __name__ == "__main__":
    main()
