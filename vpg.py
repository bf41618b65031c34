"""VPG: the vanilla policy gradient, with a value function as baseline.

Each iteration collects a rollout with the policy π_θ, takes one Adam step with its estimate of the
gradient of the expected return J, and fits the value function V to the returns of the rollout.
The advantage Â_t estimates how much better action a_t was than the policy's average action in s_t.
In generalised advantage estimation, λ = 0 uses the one-step TD error δ_t (more bias), λ = 1 uses
all rewards up to the end of the episode or rollout (more variance).

    ∇J(θ) ∝ E_t[ ∇log π_θ(a_t | s_t) Â_t ]
    Â_t = Σ_l (γλ)^l δ_{t+l},   δ_t = r_t + γ V(s_{t+1}) − V(s_t)

Sutton et al. 2000, "Policy Gradient Methods for Reinforcement Learning with Function
Approximation", Theorem 1. Schulman et al. 2016, "High-Dimensional Continuous Control Using
Generalized Advantage Estimation" (arXiv 1506.02438), eq. 16 (Â) and 28 (V; the paper fits V to
discounted sums of rewards, this script to Â + V_old, where V_old is V before the fit).

    python vpg.py --env CartPole-v1
    python vpg.py --env InvertedPendulum-v5 --vectorization-mode async
    torchrun --nproc-per-node 2 vpg.py --env CartPole-v1 --num-envs 4
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
    num_envs: int = 8  # parallel environments; with torchrun, in each process
    num_steps: int = 64  # rows of a rollout: steps of each environment, resets included
    # how Gymnasium steps the environments; None: the environment's own vector version, else sync
    vectorization_mode: Literal["sync", "async", "vector_entry_point"] | None = None
    gamma: float = 0.995  # discount γ
    gae_lambda: float = 0.95  # λ of generalised advantage estimation
    norm_obs: bool = True  # standardise observations by running mean and std; clip to ±10
    norm_reward: bool = True  # divide rewards by running std of their discounted sum; clip to ±10
    anneal_lr: bool = True  # lower learning rates linearly to 0 over the run
    device: str = "cpu"  # PyTorch device of the networks; only cpu has been tested
    run_dir: str | None = None  # new or empty folder; None: runs/<env>__<algorithm>__<seed>__<time>
    resume: str | None = None  # folder of a run to continue there; its arguments are the defaults
    checkpoint_every: int = 10_000  # steps of each environment between checkpoints; each resets all
    tensorboard: bool = False  # write TensorBoard event files too
    quiet: bool = False  # show no progress bar and print no summary

    learning_rate: float = 3e-3  # Adam's step size for the policy
    norm_adv: bool = True  # standardise the advantages of each rollout
    value_learning_rate: float = 1e-3  # Adam's step size for the value function
    value_epochs: int = 10  # epochs over each rollout to fit the value function
    num_minibatches: int = 4  # minibatches per epoch

    def __post_init__(self) -> None:
        fewest_steps = self.num_envs * (self.num_steps // 2)  # at worst half of the rows reset
        limits = {"gamma": 1, "gae_lambda": 1, "num_minibatches": fewest_steps}
        for field in dataclasses.fields(self):
            value, flag = getattr(self, field.name), f"--{field.name.replace('_', '-')}"
            least = {"seed": 0, "num_steps": 2}.get(field.name, int(field.type is int))
            most = limits.get(field.name, math.inf)
            if isinstance(value, (int, float)) and not least <= value <= most:
                raise ValueError(f"{flag}: expected a number from {least} to {most}, got {value}")
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
    """A policy π(a | s) and a value function V(s): two networks, for standardised observations."""

    def __init__(self, obs_space: Box, action_space: Box | Discrete, norm_obs: bool) -> None:
        super().__init__()
        (num_obs,) = obs_space.shape
        self.discrete = isinstance(action_space, Discrete)
        num_outputs = int(action_space.n) if self.discrete else math.prod(action_space.shape)
        self.actor = mlp(num_obs, num_outputs, head_gain=0.01)
        self.critic = mlp(num_obs, 1, head_gain=1.0)
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

    def value(self, obs: Tensor) -> Tensor:
        """V(s) for obs (…, num_obs), of shape (…)."""
        return self.critic(obs).squeeze(-1)

    def standardize(self, obs: Tensor) -> Tensor:
        """Standardise raw observations if norm_obs; policy and value take the result."""
        mean, std = self.obs_statistics.mean_and_std()
        return ((obs - mean) / std).clip(-10, 10) if self.norm_obs else obs


# -------------------------------------------- rollout ---------------------------------------------


class Batch(NamedTuple):
    """The B ≤ num_steps * num_envs steps of a rollout, every field of shape (B, …)."""

    obs: Tensor  # standardised if norm_obs
    actions: Tensor  # as sampled from the policy, before clipping
    log_probs: Tensor  # log π_old(a_t | s_t); π_old is the policy of the rollout
    values: Tensor  # V_old(s_t); V_old is V before the update
    advantages: Tensor  # Â_t
    returns: Tensor  # Â_t + V_old(s_t), the value function's target


@torch.no_grad()  # holds inside this generator only, not in its caller
def rollouts(envs: VectorEnv, agent: Agent, args: Args, iteration: int) -> Iterator[Batch]:
    """Reset the environments, then yield rollouts of num_steps rows of every environment.

    Seed, iteration and rank determine all random numbers, so a stopped run resumes exactly.
    """
    seeds = np.random.SeedSequence((args.seed, iteration, RANK)).generate_state(3).tolist()
    torch.manual_seed(seeds[0])
    rng = np.random.default_rng(seeds[1])
    obs = np.empty((args.num_steps + 1, *envs.observation_space.shape), np.float32)
    obs[-1], _ = envs.reset(seed=seeds[2])
    rewards, discounted_sums = np.zeros((2, args.num_steps, args.num_envs))
    is_step, terminations, truncations = np.zeros((3, args.num_steps, args.num_envs), bool)
    while True:
        actions, act = [], actor_in_numpy(agent, rng)
        obs[0] = obs[-1]
        for t in range(args.num_steps):
            # After an episode's last step, envs.step ignores the action and resets: row t is no
            # step. obs[t] is then the last observation of that episode; if it was truncated,
            # V(obs[t]) bootstraps it. (At t = 0, row −1 is the last row of the previous rollout.)
            is_step[t] = ~(terminations[t - 1] | truncations[t - 1])
            actions.append(act(obs[t]))  # envs.step gets a copy: envs may change it
            result = envs.step(actions[t].reshape(envs.action_space.shape).copy())
            obs[t + 1], rewards[t], terminations[t], truncations[t], _ = result
        if args.norm_reward:
            rewards[~is_step] = 0.0
            for t in range(args.num_steps):
                discounted_sums[t] = args.gamma * discounted_sums[t - 1] * is_step[t] + rewards[t]
            agent.reward_statistics.update(torch.as_tensor(discounted_sums[is_step, None]))
            rewards = (rewards / agent.reward_statistics.mean_and_std()[1].item()).clip(-10, 10)

        arrays = (obs, np.stack(actions), is_step)
        raw_obs, actions, kept = (torch.tensor(x, device=args.device) for x in arrays)
        standard_obs = agent.standardize(raw_obs)
        log_probs = agent.policy(standard_obs[:-1]).log_prob(actions)
        values = agent.value(standard_obs)
        ends = (terminations, truncations)  # both end the sum Â_t; a truncated step uses V(s_{t+1})
        targets = gae_fast.gae(rewards, values.cpu(), *ends, args.gamma, args.gae_lambda)
        advantages, returns = (torch.tensor(x, device=args.device).float() for x in targets)
        fields = (standard_obs[:-1], actions, log_probs, values[:-1], advantages, returns)
        if args.norm_obs:  # last: this rollout's actions were sampled with the old statistics
            agent.obs_statistics.update(raw_obs[:-1][kept])
        yield Batch(*(x[kept] for x in fields))


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
    policy = [x for name, x in agent.named_parameters() if not name.startswith("critic.")]
    policy_group = {"params": policy, "lr": args.learning_rate}
    critic_group = {"params": agent.critic.parameters(), "lr": args.value_learning_rate}
    return Adam([policy_group, critic_group], eps=1e-5, fused=True)


def update(agent: Agent, optimizer: Adam, batch: Batch, args: Args) -> dict[str, float]:
    """Take VPG's step on one rollout, then fit V to the rollout's returns; return metrics."""
    advantages = batch.advantages
    if args.norm_adv:
        std, mean = torch.std_mean(advantages, correction=0)
        advantages = (advantages - mean) / (std + 1e-8)
    policy = agent.policy(batch.obs)
    loss = -(policy.log_prob(batch.actions) * advantages).mean()  # its gradient estimates −∇J
    optimizer.zero_grad()
    loss.backward()
    mean_over_ranks(*(x.grad for x in agent.parameters() if x.grad is not None))
    optimizer.step()  # steps the policy only: Adam skips the critic, whose gradients are None
    value_loss = fit_critic(agent, optimizer, batch, args)

    with torch.no_grad():
        log_ratio = agent.policy(batch.obs).log_prob(batch.actions) - batch.log_probs
    k3 = log_ratio.exp() - 1 - log_ratio  # ≈ KL(π_old ‖ π_θ): joschu.net/blog/kl-approx.html
    unexplained = (batch.returns - batch.values).var(correction=0)
    unexplained /= batch.returns.var(correction=0).clamp(min=1e-8)
    return {
        "policy_loss": loss.item(),
        "value_loss": value_loss,
        "entropy": policy.entropy().mean().item(),
        "approx_kl": k3.mean().item(),
        "explained_variance": 1 - unexplained.item(),
    }


def fit_critic(agent: Agent, optimizer: Adam, batch: Batch, args: Args) -> float:
    """Fit V to the returns in epochs of minibatches; return the mean loss of the last epoch."""
    for _ in range(args.value_epochs):
        losses = []
        for rows in torch.randperm(len(batch.obs)).tensor_split(args.num_minibatches):
            loss = 0.5 * (agent.value(batch.obs[rows]) - batch.returns[rows]).square().mean()
            optimizer.zero_grad()
            loss.backward()
            mean_over_ranks(*(x.grad for x in agent.critic.parameters()))
            optimizer.step()
            losses.append(loss.detach())
    return torch.stack(losses).mean().item()


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
