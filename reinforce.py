"""REINFORCE: the policy gradient with the returns of whole episodes as weights.

Each iteration plays one episode in every environment with the policy π_θ and takes one Adam step
with the estimated gradient of the expected return J. Actions of good episodes become more likely,
those of bad episodes less. An action cannot change earlier rewards, so the reward-to-go R̂_t can
replace R(τ), the return of the whole episode τ, as the action's weight. R̂_t has less variance.

    ∇J(θ) = E_τ[ Σ_t ∇log π_θ(a_t | s_t) R̂_t ],   R̂_t = Σ_{t' ≥ t} γ^(t'−t) r_{t'}

Williams 1992, "Simple Statistical Gradient-Following Algorithms for Connectionist Reinforcement
Learning", section 5; with R̂_t, Sutton and Barto 2018, section 13.3. For a discounted J, R̂_t needs
a factor γ^t. This factor is left out, as usual.

    python reinforce.py --env CartPole-v1
    python reinforce.py --env CartPole-v1 --no-reward-to-go --seed 2
    torchrun --nproc-per-node 2 reinforce.py --env CartPole-v1 --num-envs 8
"""

import csv
import dataclasses
import importlib.util
import json
import math
import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Literal, NamedTuple

import gymnasium
import numpy as np
import torch
import tqdm
import tyro
from gymnasium.spaces import Box, Discrete
from gymnasium.vector import AutoresetMode, VectorEnv
from gymnasium.wrappers.vector import ClipAction, FlattenObservation, RecordEpisodeStatistics
from torch import Tensor, nn
from torch.distributions import Categorical, Distribution, Independent, Normal
from torch.optim import Adam

import gae_fast  # the folder beside this file

ALGORITHM = Path(__file__).stem  # only a script of the same file name can resume a run
RANK, WORLD_SIZE = int(os.getenv("RANK", 0)), int(os.getenv("WORLD_SIZE", 1))  # set by torchrun

# ---------------------------------------------- Args ----------------------------------------------


@dataclasses.dataclass
class Args:
    env: str = "CartPole-v1"  # Gymnasium environment; `module:EnvId` imports the module first
    seed: int = 1  # seeds everything random: environments, initial weights, all sampling
    total_timesteps: int = 200_000  # steps of all environments; the last rollout may overshoot
    num_envs: int = 16  # parallel environments; with torchrun, in each process
    # how Gymnasium steps the environments; None: the environment's own vector version, else sync
    vectorization_mode: Literal["sync", "async", "vector_entry_point"] | None = None
    gamma: float = 0.98  # discount γ
    norm_obs: bool = True  # standardise observations by running mean and std; clip to ±10
    norm_reward: bool = False  # divide rewards by running std of their discounted sum; clip to ±10
    anneal_lr: bool = True  # lower learning rates linearly to 0 over the run
    device: str = "cpu"  # PyTorch device of the networks; only cpu has been tested
    run_dir: str | None = None  # new or empty folder; None: runs/<env>__<algorithm>__<seed>__<time>
    resume: str | None = None  # folder of a run to continue there; its arguments are the defaults
    checkpoint_every: int = 10_000  # steps of each environment between checkpoints; each resets all
    tensorboard: bool = False  # write TensorBoard event files too
    quiet: bool = False  # show no progress bar and print no summary

    learning_rate: float = 5e-3  # Adam's step size
    reward_to_go: bool = True  # weight actions by their reward-to-go; if False, by the total return
    norm_returns: bool = True  # standardise these returns over the steps of an iteration
    max_episode_steps: int = 10_000  # truncate an episode after this many steps

    def __post_init__(self) -> None:
        limits = {"gamma": 1}
        for field in dataclasses.fields(self):
            value, flag = getattr(self, field.name), f"--{field.name.replace('_', '-')}"
            least = 1 if field.type is int and field.name != "seed" else 0
            most = limits.get(field.name, math.inf)
            if isinstance(value, (int, float)) and not least <= value <= most:
                raise ValueError(f"{flag}: expected a number from {least} to {most}, got {value}")
        if self.num_envs == 1 and self.norm_returns and not self.reward_to_go:
            raise ValueError("--num-envs: expected 2 or more with --no-reward-to-go, got 1")
        if self.run_dir and (os.path.isfile(self.run_dir) or any(Path(self.run_dir).glob("*"))):
            raise ValueError(f"--run-dir: expected a new or empty folder, got {self.run_dir!r}")
        if self.tensorboard and not importlib.util.find_spec("tensorboard"):
            raise ValueError("--tensorboard: expected the package tensorboard, found none")
        if self.resume is not None:
            load_checkpoint(self.resume)
        try:  # Making one environment tells whether all can be made and used.
            make_envs(self.env, 1, self.vectorization_mode).close()
        except (gymnasium.error.Error, ImportError, ValueError) as error:
            raise ValueError(f"--env {self.env}: {error}") from error


# ------------------------------------------- make_envs --------------------------------------------


def make_envs(env: str, num_envs: int = 1, mode: str | None = None, **options: Any) -> VectorEnv:
    """gymnasium.make_vec, with flat observations and with actions clipped to their bounds.

    Raises ValueError for an environment that an Agent cannot act in.
    """
    envs = gymnasium.make_vec(env, num_envs, mode, **options)
    obs_space, action_space = envs.single_observation_space, envs.single_action_space
    is_discrete = isinstance(action_space, Discrete) and action_space.start == 0
    is_real = isinstance(action_space, Box) and action_space.dtype.kind == "f"
    if not (is_discrete or is_real) or not obs_space.is_np_flattenable:
        expected = "Discrete (from 0) or real Box actions, and observations that can be flattened"
        raise ValueError(f"expected {expected}, got {action_space} and {obs_space}")
    if envs.metadata.get("autoreset_mode") != AutoresetMode.NEXT_STEP:
        raise ValueError(f"expected next-step autoreset, got {envs.metadata}")
    if not isinstance(obs_space, Box) or len(obs_space.shape) != 1:
        envs = FlattenObservation(envs)
    return RecordEpisodeStatistics(ClipAction(envs) if is_real else envs)


# --------------------------------------------- Agent ----------------------------------------------


class RunningStatistics(nn.Module):
    """Mean and std of each column x of all rows so far, from the sums of 1, x and x²."""

    def __init__(self, size: int) -> None:
        super().__init__()
        prior = torch.tensor([1e-4, 0.0, 1e-4], dtype=torch.float64)  # 1e-4 rows of mean 0, std 1
        self.register_buffer("sums", prior.repeat(size, 1))  # a buffer, so that checkpoints have it

    def update(self, rows: Tensor) -> None:  # (B, size)
        rows = rows.to(self.sums)
        self.sums += mean_over_ranks(torch.stack([rows**0, rows, rows**2], dim=-1).sum(dim=0))

    def mean_and_std(self) -> tuple[Tensor, Tensor]:
        mean, mean_square = (self.sums[:, 1:] / self.sums[:, :1]).T
        return mean.float(), (mean_square - mean.square()).clamp(min=1e-8).sqrt().float()


def mlp(num_inputs: int, num_outputs: int, head_gain: float) -> nn.Sequential:
    """Two hidden layers of 64 tanh units, with orthogonal weights and zero biases."""
    hidden = [nn.Linear(num_inputs, 64), nn.Tanh(), nn.Linear(64, 64), nn.Tanh()]
    layers = nn.Sequential(*hidden, nn.Linear(64, num_outputs))
    for layer, gain in zip(layers[::2], (math.sqrt(2), math.sqrt(2), head_gain)):
        nn.init.orthogonal_(layer.weight, gain)
        nn.init.zeros_(layer.bias)
    return layers


class Agent(nn.Module):
    """A policy π(a | s): a network for standardised observations."""

    def __init__(self, obs_space: Box, action_space: Box | Discrete, norm_obs: bool) -> None:
        super().__init__()
        (num_obs,) = obs_space.shape
        self.discrete = isinstance(action_space, Discrete)
        num_outputs = int(action_space.n) if self.discrete else math.prod(action_space.shape)
        self.actor = mlp(num_obs, num_outputs, head_gain=0.01)
        self.log_std = None if self.discrete else nn.Parameter(torch.zeros(num_outputs))
        self.norm_obs = norm_obs
        self.obs_statistics = RunningStatistics(num_obs)
        self.reward_statistics = RunningStatistics(1)

    def policy(self, obs: Tensor) -> Distribution:
        """π(· | s) for standardised obs (…, num_obs): Categorical, or Normal with std free of s."""
        output = self.actor(obs)
        if self.discrete:
            return Categorical(logits=output, validate_args=False)
        return Independent(Normal(output, self.log_std.exp(), False), 1, validate_args=False)

    def standardize(self, obs: Tensor) -> Tensor:
        """Standardise raw observations if norm_obs; policy takes the result."""
        mean, std = self.obs_statistics.mean_and_std()
        return ((obs - mean) / std).clip(-10, 10) if self.norm_obs else obs


# -------------------------------------------- rollout ---------------------------------------------


class Batch(NamedTuple):
    """The B steps of one whole episode of every environment, every field of shape (B, …)."""

    obs: Tensor  # standardised if norm_obs
    actions: Tensor  # as sampled from the policy, before clipping
    log_probs: Tensor  # log π_old(a_t | s_t); π_old is the policy of the rollout
    rewards_to_go: Tensor  # R̂_t
    total_returns: Tensor  # R(τ) of the step's episode


@torch.no_grad()  # holds inside this generator only, not in its caller
def rollouts(envs: VectorEnv, agent: Agent, args: Args, iteration: int) -> Iterator[Batch]:
    """Yield rollouts of one whole episode of every environment; the episodes start together.

    Seed, iteration and rank determine all random numbers, so a stopped run resumes exactly.
    """
    seeds = np.random.SeedSequence((args.seed, iteration, RANK)).generate_state(3).tolist()
    torch.manual_seed(seeds[0])
    rng = np.random.default_rng(seeds[1])
    envs.reset(seed=seeds[2])
    while True:
        obs, actions, rewards, is_step = [], [], [], []
        act, is_playing = actor_in_numpy(agent, rng), np.ones(args.num_envs, bool)
        next_obs, _ = envs.reset()
        while is_playing.any():
            obs.append(np.array(next_obs, np.float32))
            actions.append(act(obs[-1]))  # envs.step gets a copy: envs may change it
            is_step.append(is_playing)
            # An environment whose episode is over goes on until all episodes are over. Its further
            # rows are no steps. envs.env skips the wrapper that would record them as an episode.
            result = envs.env.step(actions[-1].reshape(envs.action_space.shape).copy())
            next_obs, reward, terminations, truncations, _ = result
            rewards.append(np.where(is_playing, reward, 0.0))
            is_over = terminations | truncations | (len(obs) == args.max_episode_steps)
            is_playing = is_playing & ~is_over
        obs, actions, is_step = (np.stack(x) for x in (obs, actions, is_step))
        rewards = np.stack(rewards, dtype=float)
        envs.return_queue.extend(rewards.sum(axis=0))
        envs.length_queue.extend(is_step.sum(axis=0))
        envs.episode_count += args.num_envs
        if args.norm_reward:
            discounted_sums = np.zeros_like(rewards)
            for t in range(len(rewards)):
                discounted_sums[t] = args.gamma * discounted_sums[t - 1] + rewards[t]
            agent.reward_statistics.update(torch.as_tensor(discounted_sums[is_step, None]))
            rewards = (rewards / agent.reward_statistics.mean_and_std()[1].item()).clip(-10, 10)

        rewards_to_go = gae_fast.rewards_to_go(rewards, np.zeros_like(is_step), args.gamma)
        total_returns = np.broadcast_to(rewards_to_go[0], rewards.shape)
        arrays = (obs[is_step], actions[is_step], rewards_to_go[is_step], total_returns[is_step])
        raw_obs, actions, *returns = (torch.tensor(x, device=args.device) for x in arrays)
        standard_obs = agent.standardize(raw_obs)
        log_probs = agent.policy(standard_obs).log_prob(actions)
        if args.norm_obs:  # last: this rollout's actions were sampled with the old statistics
            agent.obs_statistics.update(raw_obs)
        yield Batch(standard_obs, actions, log_probs, *(x.float() for x in returns))


def actor_in_numpy(agent: Agent, rng: np.random.Generator) -> Callable[[np.ndarray], np.ndarray]:
    """Return a NumPy form of agent.policy(agent.standardize(obs)).sample(), faster for few rows."""
    assert {type(x) for x in agent.actor} == {nn.Linear, nn.Tanh}, "other layers: use agent.policy"
    w1, b1, w2, b2, w3, b3 = (x.numpy(force=True) for x in agent.actor.parameters())
    mean, std = (x.numpy(force=True) for x in agent.obs_statistics.mean_and_std())
    action_std = None if agent.discrete else agent.log_std.exp().numpy(force=True)

    def act(obs: np.ndarray) -> np.ndarray:  # (N, num_obs)
        x = ((obs - mean) / std).clip(-10, 10) if agent.norm_obs else obs
        x = np.tanh(np.tanh(x @ w1.T + b1) @ w2.T + b2) @ w3.T + b3
        if agent.discrete:  # the argmax of logits + Gumbel noise is a sample of their softmax
            return (x + rng.gumbel(size=x.shape)).argmax(axis=-1)
        return x + action_std * rng.standard_normal(x.shape, np.float32)

    return act


# --------------------------------------------- update ---------------------------------------------


def make_optimizer(agent: Agent, args: Args) -> Adam:
    return Adam(agent.parameters(), args.learning_rate, eps=1e-5, fused=True)


def update(agent: Agent, optimizer: Adam, batch: Batch, args: Args) -> dict[str, float]:
    """Take REINFORCE's step on one episode of each environment; return the metrics."""
    weights = batch.rewards_to_go if args.reward_to_go else batch.total_returns
    if args.norm_returns:  # the mean is a simple baseline
        std, mean = torch.std_mean(weights, correction=0)
        weights = (weights - mean) / (std + 1e-8)
    policy = agent.policy(batch.obs)
    # The sum over an episode's steps, averaged over episodes. A mean over all steps is biased.
    loss = -(policy.log_prob(batch.actions) * weights).sum() / args.num_envs
    optimizer.zero_grad()
    loss.backward()
    mean_over_ranks(*(x.grad for x in agent.parameters()))
    optimizer.step()

    with torch.no_grad():
        log_ratio = agent.policy(batch.obs).log_prob(batch.actions) - batch.log_probs
    k3 = log_ratio.exp() - 1 - log_ratio  # ≈ KL(π_old ‖ π_θ): joschu.net/blog/kl-approx.html
    return {
        "policy_loss": loss.item(),
        "entropy": policy.entropy().mean().item(),
        "approx_kl": k3.mean().item(),
    }


# --------------------------------------------- train ----------------------------------------------


def train(args: Args) -> list[dict[str, Any]]:
    """Train an agent, write the run's folder, and return the rows of its metrics.csv.

    Raises FloatingPointError for a metric or a weight that is not finite.
    """
    torch.set_num_threads(1)  # networks this small are slower with two threads
    torch.manual_seed(args.seed)
    envs = make_envs(args.env, args.num_envs, args.vectorization_mode)
    agent = Agent(envs.single_observation_space, envs.single_action_space, args.norm_obs)
    optimizer = make_optimizer(agent.to(args.device), args)
    learning_rates = [group["lr"] for group in optimizer.param_groups]  # before annealing
    run = Run(args, envs, agent, optimizer)
    global_step = next_checkpoint = run.rows[-1]["global_step"] if run.rows else 0
    start = time.perf_counter() - (run.rows[-1]["wall_time"] if run.rows else 0.0)

    while global_step < args.total_timesteps:
        if global_step >= next_checkpoint:
            run.save_checkpoint()
            batches = rollouts(envs, agent, args, iteration=len(run.rows))
            next_checkpoint = global_step + args.checkpoint_every * args.num_envs * WORLD_SIZE
        share_left = 1 - global_step / args.total_timesteps if args.anneal_lr else 1.0
        for group, learning_rate in zip(optimizer.param_groups, learning_rates):
            group["lr"] = share_left * learning_rate
        batch = next(batches)
        metrics = update(agent, optimizer, batch, args)

        steps_taken = mean_over_ranks(torch.tensor(float(len(batch.obs)))) * WORLD_SIZE
        global_step += round(steps_taken.item())
        wall_time = time.perf_counter() - start
        row = {
            "global_step": global_step,
            "wall_time": round(wall_time, 3),
            "episodes": int(envs.episode_count),
            "episodic_return": float(np.mean(envs.return_queue)) if envs.return_queue else None,
            "episodic_length": float(np.mean(envs.length_queue)) if envs.length_queue else None,
            "SPS": int(global_step / wall_time),
            **metrics,
            "learning_rate": optimizer.param_groups[0]["lr"],
        }
        numbers = row | {name: x.sum().item() for name, x in agent.state_dict().items()}
        for name, value in numbers.items():
            if value is not None and not math.isfinite(value):
                raise FloatingPointError(f"iteration {len(run.rows) + 1}: {name} is {value}")
        run.write(row)

    run.save_checkpoint()
    run.bar.close()
    if RANK == 0 and not args.quiet:
        print(f"{args.env}: {run.bar.postfix or 'no return'}, {global_step:,} steps; {run.folder}")
    envs.close()
    return run.rows


class Run:
    """The rows, folder and progress bar of a run. Only rank 0 has the folder and the bar."""

    def __init__(self, args: Args, envs: VectorEnv, agent: Agent, optimizer: Adam) -> None:
        self.args, self.envs, self.agent, self.optimizer = args, envs, agent, optimizer
        self.rows, rows = [], []
        if args.resume is not None:
            checkpoint = load_checkpoint(args.resume)
            rows = checkpoint["rows"]
            agent.load_state_dict(checkpoint["agent"])
            optimizer.load_state_dict(checkpoint["optimizer"])
            envs.return_queue.extend(checkpoint["returns"])
            envs.length_queue.extend(checkpoint["lengths"])
            envs.episode_count = rows[-1]["episodes"] if rows else 0
        name = f"{args.env}__{ALGORITHM}__{args.seed}__{time.strftime('%Y%m%d-%H%M%S')}"
        self.folder = Path(args.run_dir or args.resume or f"runs/{name.replace(':', '-')}")
        if RANK == 0:
            self.folder.mkdir(parents=True, exist_ok=bool(args.run_dir or args.resume))
            config = {"algorithm": ALGORITHM, **vars(args), "world_size": WORLD_SIZE}
            config |= {x.__name__: x.__version__ for x in (np, torch, gymnasium, gae_fast)}
            (self.folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")
        path = self.folder / "metrics.csv" if RANK == 0 else os.devnull
        self.file = open(path, "w", newline="", buffering=1)
        self.bar = tqdm.tqdm(total=args.total_timesteps, unit="step", disable=args.quiet or RANK)
        if args.tensorboard and RANK == 0:
            module = importlib.import_module("torch.utils.tensorboard")  # slow, and seldom used
            self.tensorboard = module.SummaryWriter(self.folder, purge_step=0)
        for row in rows:
            self.write(row)

    def write(self, row: dict[str, Any]) -> None:
        self.rows.append(row)
        writer = csv.DictWriter(self.file, row)
        if len(self.rows) == 1:
            writer.writeheader()
        writer.writerow(row)
        if row["episodic_return"] is not None:
            self.bar.set_postfix_str(f"return {row['episodic_return']:.5g}", refresh=False)
        self.bar.update(row["global_step"] - self.bar.n)
        if self.args.tensorboard and RANK == 0:
            charts = (*list(row)[:6], "learning_rate")  # tags as in CleanRL
            for name in [x for x in row if row[x] is not None]:
                tag = f"{'charts' if name in charts else 'losses'}/{name}"
                self.tensorboard.add_scalar(tag, row[name], row["global_step"])
            self.tensorboard.flush()

    def save_checkpoint(self) -> None:
        checkpoint = {
            "algorithm": ALGORITHM,
            "args": vars(self.args),
            "agent": self.agent.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "rows": self.rows,
            "returns": [float(x) for x in self.envs.return_queue],
            "lengths": [int(x) for x in self.envs.length_queue],
        }
        if RANK == 0:
            torch.save(checkpoint, self.folder / "checkpoint.new")
            os.replace(self.folder / "checkpoint.new", self.folder / "checkpoint.pt")


def load_checkpoint(folder: str) -> dict[str, Any]:
    """Read a run's checkpoint without running code in it. Raises ValueError if that fails."""
    try:
        checkpoint = torch.load(f"{folder}/checkpoint.pt", map_location="cpu", weights_only=True)
        if checkpoint["algorithm"] != ALGORITHM:
            raise ValueError(f"it is one of {checkpoint['algorithm']}")
        checkpoint["args"] |= {"run_dir": None, "resume": folder}
    except Exception as e:  # torch raises many kinds of exception
        raise ValueError(f"--resume: expected a run of {ALGORITHM}, got {folder!r}: {e}") from e
    return checkpoint


def mean_over_ranks(*tensors: Tensor) -> Tensor:
    """Replace tensors by their means over all ranks, in one all_reduce; return the first."""
    if WORLD_SIZE > 1:
        vector = nn.utils.parameters_to_vector(tensors)
        torch.distributed.all_reduce(vector)
        nn.utils.vector_to_parameters(vector / WORLD_SIZE, tensors)
    return tensors[0]


if __name__ == "__main__":
    args = tyro.cli(Args)
    if args.resume is not None:  # parse again, with the run's arguments as defaults
        args = tyro.cli(Args, default=Args(**load_checkpoint(args.resume)["args"]))
    if WORLD_SIZE > 1:
        torch.distributed.init_process_group()
    train(args)
    if WORLD_SIZE > 1:
        torch.distributed.destroy_process_group()
