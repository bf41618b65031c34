"""Train another package's agent once and print its steps per second, or what is said below.

    PYTHON benchmarks/peers.py sb3-ppo   ENV NUM_ENVS NUM_STEPS NUM_MINIBATCHES EPOCHS STEPS SEED
    PYTHON benchmarks/peers.py sb3-trpo  ENV NUM_ENVS NUM_STEPS NUM_MINIBATCHES EPOCHS STEPS SEED
    PYTHON benchmarks/peers.py rlox-ppo  ENV NUM_ENVS NUM_STEPS NUM_MINIBATCHES EPOCHS STEPS SEED
    PYTHON benchmarks/peers.py rlox-vpg  (and rlox-trpo) likewise; these fit their critic to all of
                                         a rollout at once
    PYTHON benchmarks/peers.py cleanrl-ppo PPO.PY  ENV NUM_ENVS ... (as above)
    PYTHON benchmarks/peers.py sb3-solve ENV LEVEL SECONDS SEED
    PYTHON benchmarks/peers.py defaults  ppo|trpo|a2c ENV STEPS SEED

PYTHON is that of a virtual environment with the package. throughput.py, solve.py and defaults.py
run this; nothing of ours is imported. One torch thread. What is timed is the training alone:
imports and the making of agents are left out. EPOCHS are those of the critic in TRPO and VPG.
PPO.PY is CleanRL's script, which times itself. sb3-solve trains PPO with the settings that RL Zoo
has tuned for the task until the mean return of the last 100 episodes reaches a level, for so many
seconds at most. It prints the steps, or inf. defaults trains with the library's default settings.
It prints a line for each episode: the steps taken when it ended, and its return.
"""

import math
import os
import runpy
import sys
import tempfile
import time

import torch


def sb3(
    algorithm: str,
    env: str,
    num_envs: int,
    num_steps: int,
    num_minibatches: int,
    epochs: int,
    seed: int,
):
    from stable_baselines3 import PPO
    from stable_baselines3.common.env_util import make_vec_env

    settings = {
        "n_steps": num_steps,
        "batch_size": num_envs * num_steps // num_minibatches,
        "seed": seed,
    }
    envs = make_vec_env(env, n_envs=num_envs, seed=seed)
    if algorithm == "ppo":
        return PPO(
            "MlpPolicy",
            envs,
            n_epochs=epochs,
            ent_coef=0.01,
            learning_rate=2.5e-4,
            device="cpu",
            **settings,
        )
    from sb3_contrib import TRPO

    return TRPO("MlpPolicy", envs, n_critic_updates=epochs, device="cpu", **settings)


def rlox(
    algorithm: str,
    env: str,
    num_envs: int,
    num_steps: int,
    num_minibatches: int,
    epochs: int,
    seed: int,
):
    from rlox.trainer import Trainer

    settings = {"n_envs": num_envs, "n_steps": num_steps}
    if algorithm == "ppo":
        settings |= {"batch_size": num_envs * num_steps // num_minibatches, "n_epochs": epochs}
    else:
        settings |= {"vf_epochs": epochs}
    return Trainer(algorithm, env=env, seed=seed, config=settings)


# What RL Zoo changes of Stable-Baselines3's defaults for a task. normalize: by VecNormalize.
# steps: over which a setting falls to 0, where one does.
LARGE = {"net_arch": [256, 256], "activation_fn": torch.nn.ReLU}
LARGE |= {"log_std_init": -2, "ortho_init": False}
ZOO = {
    "CartPole-v1": dict(
        n_envs=8,
        n_steps=32,
        batch_size=256,
        n_epochs=20,
        learning_rate=lambda left: 1e-3 * left,
        clip_range=lambda left: 0.2 * left,
        gamma=0.98,
        gae_lambda=0.8,
        steps=100_000,
    ),
    "Acrobot-v1": dict(
        normalize=True, n_envs=16, n_steps=256, n_epochs=4, gamma=0.99, gae_lambda=0.94
    ),
    "Pendulum-v1": dict(
        n_envs=4,
        n_steps=1024,
        n_epochs=10,
        learning_rate=1e-3,
        gamma=0.9,
        gae_lambda=0.95,
        use_sde=True,
        sde_sample_freq=4,
    ),
    "MountainCarContinuous-v0": dict(
        normalize=True,
        n_steps=8,
        batch_size=256,
        n_epochs=10,
        learning_rate=7.77e-5,
        clip_range=0.1,
        gamma=0.9999,
        gae_lambda=0.9,
        ent_coef=0.00429,
        vf_coef=0.19,
        max_grad_norm=5,
        use_sde=True,
        policy_kwargs={"log_std_init": -3.29, "ortho_init": False},
    ),
    "LunarLander-v3": dict(
        n_envs=16,
        n_steps=1024,
        batch_size=64,
        n_epochs=4,
        gamma=0.999,
        gae_lambda=0.98,
        ent_coef=0.01,
    ),
    "InvertedPendulum-v5": dict(
        normalize=True,
        n_steps=32,
        batch_size=64,
        n_epochs=5,
        learning_rate=2.22425e-4,
        clip_range=0.4,
        gamma=0.999,
        gae_lambda=0.9,
        ent_coef=1.37976e-7,
        vf_coef=0.19816,
        max_grad_norm=0.3,
    ),
    "InvertedDoublePendulum-v5": dict(
        normalize=True,
        n_steps=128,
        batch_size=512,
        n_epochs=10,
        learning_rate=1.55454e-4,
        clip_range=0.4,
        gamma=0.98,
        gae_lambda=0.8,
        ent_coef=1.05057e-6,
        vf_coef=0.695929,
    ),
    "Hopper-v5": dict(
        normalize=True,
        n_steps=512,
        batch_size=32,
        n_epochs=5,
        learning_rate=9.80828e-5,
        clip_range=0.2,
        gamma=0.999,
        gae_lambda=0.99,
        ent_coef=0.00229519,
        vf_coef=0.835671,
        max_grad_norm=0.7,
        policy_kwargs=LARGE,
    ),
    "HalfCheetah-v5": dict(
        normalize=True,
        n_steps=512,
        batch_size=64,
        n_epochs=20,
        learning_rate=2.0633e-5,
        clip_range=0.1,
        gamma=0.98,
        gae_lambda=0.92,
        ent_coef=0.000401762,
        vf_coef=0.58096,
        max_grad_norm=0.8,
        policy_kwargs=LARGE,
    ),
}


def solve(env: str, level: float, seconds: float, seed: int) -> float:
    """Train Stable-Baselines3's PPO with RL Zoo's settings until the mean return of 100 episodes
    reaches a level; return the steps taken, infinite where it does not."""
    from stable_baselines3 import PPO
    from stable_baselines3.common.callbacks import BaseCallback
    from stable_baselines3.common.env_util import make_vec_env
    from stable_baselines3.common.vec_env import VecNormalize

    start = time.perf_counter()

    class StopWhenSolved(BaseCallback):
        is_solved = False

        def _on_step(self) -> bool:
            if self.locals["dones"].any():
                returns = [episode["r"] for episode in self.model.ep_info_buffer]
                self.is_solved = len(returns) == 100 and sum(returns) / 100 >= level
            return not self.is_solved and time.perf_counter() - start < seconds

    settings = dict(ZOO[env])
    envs = make_vec_env(env, n_envs=settings.pop("n_envs", 1), seed=seed)
    if settings.pop("normalize", False):
        envs = VecNormalize(envs, gamma=settings["gamma"])
    steps = settings.pop("steps", 10**9)
    model = PPO("MlpPolicy", envs, seed=seed, device="cpu", **settings)
    callback = StopWhenSolved()
    model.learn(steps, callback=callback)
    return model.num_timesteps if callback.is_solved else math.inf


def train_with_defaults(algorithm: str, env: str, steps: int, seed: int) -> None:
    """Train Stable-Baselines3's PPO or A2C or sb3-contrib's TRPO; print steps and returns."""
    import sb3_contrib
    import stable_baselines3
    from stable_baselines3.common.env_util import make_vec_env

    envs = make_vec_env(env, n_envs=1, seed=seed)  # in a Monitor, which keeps the returns
    package = sb3_contrib if algorithm == "trpo" else stable_baselines3
    make = getattr(package, algorithm.upper())
    make("MlpPolicy", envs, seed=seed, device="cpu").learn(steps)
    (monitor,) = envs.envs
    steps_taken = 0
    lengths, returns = monitor.get_episode_lengths(), monitor.get_episode_rewards()
    for length, episodic_return in zip(lengths, returns):
        steps_taken += length
        print(steps_taken, episodic_return)


torch.set_num_threads(1)
kind, *arguments = sys.argv[1:]
if kind == "sb3-solve":
    env, level, seconds, seed = arguments
    print(solve(env, float(level), float(seconds), int(seed)))
elif kind == "defaults":
    algorithm, env, steps, seed = arguments
    train_with_defaults(algorithm, env, int(steps), int(seed))
elif kind == "cleanrl-ppo":
    script, *values = arguments
    names = "env-id num-envs num-steps num-minibatches update-epochs total-timesteps seed".split()
    os.chdir(tempfile.mkdtemp())  # where it leaves its event files
    sys.argv = [
        script,
        "--no-cuda",
        *(x for pair in zip(names, values) for x in (f"--{pair[0]}", pair[1])),
    ]
    runpy.run_path(script, run_name="__main__")  # its last line is "SPS: " and a number
else:
    package, algorithm = kind.split("-")
    env, (num_envs, num_steps, num_minibatches, epochs, steps, seed) = (
        arguments[0],
        map(int, arguments[1:]),
    )
    make = {"sb3": sb3, "rlox": rlox}[package]
    model = make(algorithm, env, num_envs, num_steps, num_minibatches, epochs, seed)
    start = time.perf_counter()
    if package == "sb3":
        steps = model.learn(steps).num_timesteps
    else:
        steps -= steps % (
            num_envs * num_steps
        )  # it trains on whole rollouts only, and no more than asked for
        model.train(total_timesteps=steps)
    print(steps / (time.perf_counter() - start))
