"""Train rlox's VPG and PPO on CartPole-v1 as its tutorial does, and measure the true return of what
they learned.

    pip install rlox==1.2.0 && python benchmarks/rlox_returns.py

`printed` is the mean_reward that rlox reports; `return` the mean undiscounted return of 20 episodes
of the policy.
"""

import argparse

import gymnasium
import numpy as np
import torch
from rlox.trainer import Trainer

SETTINGS = {
    "vpg": {"learning_rate": 3e-4, "vf_lr": 1e-3, "gae_lambda": 0.97, "vf_epochs": 5},
    "ppo": {"learning_rate": 3e-4, "n_epochs": 4, "clip_eps": 0.2},
}

parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
)
parser.add_argument("--seeds", type=int, default=3, help="seeds 1 to this")
parser.add_argument("--steps", type=int, default=50_000)
args = parser.parse_args()

torch.set_num_threads(1)
print("| | seed | printed | return |\n| --- | ---: | ---: | ---: |")
for name, settings in SETTINGS.items():
    for seed in range(1, args.seeds + 1):
        trainer = Trainer(
            name, env="CartPole-v1", seed=seed, config={"n_envs": 8, "n_steps": 2048, **settings}
        )
        printed = trainer.train(total_timesteps=args.steps)["mean_reward"]
        env, returns = gymnasium.make("CartPole-v1"), []
        for episode in range(20):
            obs, _ = env.reset(seed=episode)
            done, episodic_return = False, 0.0
            while not done:
                action = int(np.asarray(trainer.predict(obs)).flatten()[0])
                obs, reward, terminated, truncated, _ = env.step(action)
                done, episodic_return = terminated or truncated, episodic_return + reward
            returns.append(episodic_return)
        print(f"| {name} | {seed} | {printed:.0f} | {np.mean(returns):.0f} |", flush=True)
