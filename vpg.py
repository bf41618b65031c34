"""VPG: the vanilla policy gradient, with a value function as baseline.

Each iteration collects a rollout with the policy π_θ, takes one Adam step with its estimate of ∇J,
the gradient of the expected return, and fits the value function V to the returns of the rollout.
The advantage Â_t estimates how much better action a_t was than the policy's average action in s_t,
from one TD error δ_t (λ = 0, more bias) up to all rewards that follow it (λ = 1, more variance).

    ∇J(θ) ∝ E_t[ ∇log π_θ(a_t | s_t) Â_t ]
    Â_t = Σ_l (γλ)^l δ_{t+l},   δ_t = r_t + γ V(s_{t+1}) − V(s_t)

Sutton et al. 2000, "Policy Gradient Methods for Reinforcement Learning with Function
Approximation", Theorem 1. Schulman et al. 2016, "High-Dimensional Continuous Control Using
Generalized Advantage Estimation" (arXiv 1506.02438), eq. 16. V is fitted to Â + V_old.

    python vpg.py --env CartPole-v1
    torchrun --nproc-per-node 2 vpg.py --env CartPole-v1 --num-envs 4
"""

import csv
import dataclasses
import json
import math
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple, get_type_hints

import gymnasium
import numpy as np
import torch
import tqdm
import tyro
from gymnasium.spaces import Box, Discrete
from gymnasium.vector import AutoresetMode, VectorEnv
from gymnasium.wrappers.vector import FlattenObservation, RecordEpisodeStatistics, TransformAction
from torch import Tensor, nn
from torch.distributions import Categorical, Distribution, Independent, Normal

import gae_fast  # the folder beside this file; in a package: from . import gae_fast

ALGORITHM = Path(__file__).stem  # only a script of the same file name can resume a run


# ---------------------------------------------- Args ----------------------------------------------
class ArgumentError(ValueError):
    """An argument that no run can use; the message says what was expected and what came."""


Count = Annotated[int, (1, math.inf)]  # a number, with its least and its greatest value
Amount = Annotated[float, (0, math.inf)]


@dataclasses.dataclass
class Args:
    env: str = "CartPole-v1"  # Gymnasium environment; `module:EnvId` imports the module first
    seed: Annotated[int, (0, 2**63)] = 1  # of all that is random: environments, weights, sampling
    total_timesteps: Count = 200_000  # steps of all environments; the last rollout may overshoot
    num_envs: Count = 8  # parallel environments; with torchrun, in each process
    num_steps: Annotated[int, (2, math.inf)] = 64  # rollout rows per environment, resets too
    # how Gymnasium steps the environments; None: the environment's own vector version, else sync
    vectorization_mode: Literal["sync", "async", "vector_entry_point"] | None = None
    gamma: Annotated[float, (0, 1)] = 0.994  # discount γ
    gae_lambda: Annotated[float, (0, 1)] = 0.95  # λ of generalised advantage estimation
    norm_obs: bool = True  # standardise observations by mean and std of past rollouts; clip to ±10
    norm_reward: bool = True  # divide rewards by running std of discounted sums; none exceeds ±10
    norm_adv: bool = True  # standardise the advantages of each rollout
    anneal_lr: bool = True  # lower learning rates linearly to 0 over the run
    device: str = "cpu"  # PyTorch device of the networks; only cpu has been tested
    run_dir: str | None = None  # new or empty folder; None: runs/<env>__<algorithm>__<seed>__<time>
    resume: str | None = None  # folder of a run to go on with; its arguments are the defaults
    checkpoint_every: Count = 10_000  # steps of each environment to the next checkpoint and reset
    quiet: bool = False  # show no progress bar and do not print the folder

    learning_rate: Amount = 5e-3  # Adam's step size for the policy
    value_learning_rate: Annotated[float, (1e-12, math.inf)] = 1e-3  # value function's step size
    value_epochs: Count = 10  # epochs over each rollout to fit the value function
    num_minibatches: Count = 4  # minibatches per epoch of the value function

    def __post_init__(self) -> None:
        for name, kind in get_type_hints(Args, include_extras=True).items():
            value, span = getattr(self, name), getattr(kind, "__metadata__", [None])[0]
            if name == "num_minibatches":  # at worst half of the rows are resets
                span = (1, self.num_envs * (self.num_steps // 2))
            if isinstance(span, tuple) and value is not None and not span[0] <= value <= span[1]:
                expected = f"expected a number from {span[0]} to {span[1]}"
                raise ArgumentError(f"--{name.replace('_', '-')}: {expected}, got {value}")


# ------------------------------------------- make_envs --------------------------------------------
def make_envs(env: str, num_envs: int = 1, mode: str | None = None, **options: Any) -> VectorEnv:
    """gymnasium.make_vec, with flat observations, for actions as Policy samples them.

    To Policy, Discrete begins at 0, and a component of a Box that has two bounds is [−1, 1].
    Raises ArgumentError for an environment that cannot be made, or that an Agent cannot act in.
    """
    if mode == "async":  # which fails for some spaces before they can be refused below
        make_envs(env, 1, "sync", **options).close()
    refusal = ""
    try:
        envs = gymnasium.make_vec(env, num_envs, mode, **options)
        obs_space, space = envs.single_observation_space, envs.single_action_space
        needed = "Discrete or real Box actions, flattenable observations and next-step autoreset"
        refusal = f"expected {needed} (see docs/runs.md), got {space}, {obs_space}, {envs.metadata}"
        is_real = isinstance(space, Box) and space.dtype.kind == "f"
        is_usable = (is_real or isinstance(space, Discrete)) and obs_space.is_np_flattenable
        if not is_usable or envs.metadata.get("autoreset_mode") != AutoresetMode.NEXT_STEP:
            raise NotImplementedError  # as Gymnasium does for a space of somebody's own
    except (gymnasium.error.Error, ImportError, NotImplementedError, TypeError, ValueError) as e:
        raise ArgumentError(f"--env {env}: {refusal or e}") from e
    envs.unwrapped._add_info = lambda infos, *_: infos  # no script reads info: drop it
    if not isinstance(obs_space, Box) or len(obs_space.shape) != 1:
        envs = FlattenObservation(envs)
    low, high = (space.low, space.high) if is_real else (-np.inf, np.inf)
    scale = np.where(np.isfinite(high - low), (high - low) / 2, 1)
    center = np.where(np.isfinite(high - low), low + scale, getattr(space, "start", 0))

    def into_space(actions: np.ndarray) -> np.ndarray:
        actions = center + scale * actions.reshape(len(actions), *space.shape)
        return actions.clip(low, high).astype(space.dtype)

    envs = envs if not is_real and space == Discrete(space.n) else TransformAction(envs, into_space)
    return RecordEpisodeStatistics(envs, None, stats_key="ours")


# --------------------------------------------- Agent ----------------------------------------------
def with_rows(moments: Tensor, rows: np.ndarray | Tensor) -> Tensor:
    """Count (a rank's), mean and std of columns, (3, k) float64, after rows (B, k) of all ranks."""
    (count, mean, std), rows = moments, torch.as_tensor(rows).to(moments)
    center = mean if count.any() else mean_over_ranks(rows.mean(dim=0))
    rows = rows - center  # squares of large numbers would swallow their differences
    sums = mean_over_ranks(torch.stack([rows**0, rows, rows**2]).sum(dim=1))
    sums = sums + torch.stack([count, 0 * count, count * std**2])
    count, (shift, square) = sums[0], sums[1:] / sums[0]
    return torch.stack([count, center + shift, (square - shift**2).clamp(min=1e-8).sqrt()])


def mlp(*sizes: int, head_gain: float) -> nn.Sequential:
    """Linear layers with tanh between them, orthogonal weights and zero biases."""
    layers = [x for pair in zip(sizes, sizes[1:]) for x in (nn.Linear(*pair), nn.Tanh())][:-1]
    for layer in layers[::2]:
        nn.init.orthogonal_(layer.weight, head_gain if layer is layers[-1] else math.sqrt(2))
        nn.init.zeros_(layer.bias)
    return nn.Sequential(*layers)


class Policy(nn.Module):
    """π(a | s): Categorical; for Box of k numbers, Normal; one std in all states, first 1/√k."""

    def __init__(self, num_obs: int, action_space: Box | Discrete) -> None:
        super().__init__()
        self.discrete = isinstance(action_space, Discrete)
        k = int(action_space.n) if self.discrete else math.prod(action_space.shape)
        self.mlp = mlp(num_obs, 64, 64, k, head_gain=0.01)
        self.log_std = None if self.discrete else nn.Parameter(-0.5 * torch.full((k,), k).log())
        self.check_sampler(torch.randn(100, num_obs))

    def forward(self, obs: Tensor) -> Distribution:  # (…, num_obs)
        output = self.mlp(obs)
        if self.discrete:
            return Categorical(logits=output, validate_args=False)
        return Independent(Normal(output, self.log_std.exp(), False), 1, validate_args=False)

    def sampler(self, rng: np.random.Generator) -> Callable[[np.ndarray], tuple[np.ndarray, ...]]:
        """NumPy's twin of forward until an update: obs ↦ actions, and logits or means and std."""
        # Change both alike, or return lambda obs: (self(torch.as_tensor(obs)).sample().numpy(),)
        *hidden, head = [[y.numpy(force=True).T for y in x.parameters()] for x in self.mlp[::2]]
        std = None if self.discrete else self.log_std.exp().numpy(force=True)

        def sample(obs: np.ndarray) -> tuple[np.ndarray, ...]:  # (N, num_obs)
            for weight, bias in hidden:
                obs = np.tanh(obs @ weight + bias)
            output = obs @ head[0] + head[1]
            if self.discrete:  # the argmax of logits + Gumbel noise is a sample of their softmax
                return (output + rng.gumbel(size=output.shape)).argmax(axis=-1), output
            return output + std * rng.standard_normal(output.shape, np.float32), output, std

        return sample

    def check_sampler(self, obs: Tensor) -> None:
        """Raise RuntimeError if sampler's logits, or means and std, are not those of forward."""
        actions, *twin = map(torch.as_tensor, self.sampler(np.random.default_rng(0))(obs.numpy()))
        if twin:
            twin = Categorical(logits=twin[0]) if self.discrete else Independent(Normal(*twin), 1)
            if not self(obs).log_prob(actions).allclose(twin.log_prob(actions), 1e-5, 1e-5):
                raise RuntimeError("Policy.sampler and Policy.forward have other distributions")


class Agent(nn.Module):
    """A policy π(a | s) and a value function V(s): two networks, for standardised observations."""

    def __init__(self, envs: VectorEnv, norm_obs: bool) -> None:
        super().__init__()
        (num_obs,) = envs.single_observation_space.shape
        self.policy = Policy(num_obs, envs.single_action_space)
        self.critic = mlp(num_obs, 64, 64, 1, head_gain=1.0)
        self.clip_obs = 10.0 if norm_obs else math.inf
        no_rows = torch.tensor([[0.0], [0.0], [1.0]], dtype=torch.float64)  # count, mean and std
        self.register_buffer("obs_moments", no_rows.repeat(1, num_obs))  # a buffer is saved, too
        self.register_buffer("reward_moments", no_rows)
        self.register_buffer("largest_reward", torch.zeros(1, dtype=torch.float64))

    def value(self, obs: Tensor) -> Tensor:  # V(s) for obs (…, num_obs), of shape (…)
        return self.critic(obs).squeeze(-1)

    def standardizer(self) -> Callable[[np.ndarray], np.ndarray]:
        """Return raw obs ↦ the obs that the networks take: float32, standardised if norm_obs."""
        _, mean, std = self.obs_moments.numpy(force=True)
        return lambda x: ((x - mean) / std).clip(-self.clip_obs, self.clip_obs).astype(np.float32)


# -------------------------------------------- rollout ---------------------------------------------
class Batch(NamedTuple):
    """The B ≤ num_steps * num_envs steps of a rollout, every field of shape (B, …)."""

    obs: Tensor  # standardised if norm_obs
    actions: Tensor  # as sampled from the policy, before rescaling and clipping
    log_probs: Tensor  # log π_old(a_t | s_t); π_old is the policy of the rollout
    advantages: Tensor  # Â_t, standardised if norm_adv
    returns: Tensor  # raw Â_t + V_old(s_t), the value function's target


@torch.no_grad()  # holds inside this generator only, not in its caller
def rollouts(envs: VectorEnv, agent: Agent, args: Args, iteration: int) -> Iterator[Batch]:
    """Reset the environments, then yield rollouts of num_steps rows of every environment."""
    rng = np.random.default_rng((args.seed, iteration, rank_and_world_size()[0]))
    torch.manual_seed(rng.integers(2**63))  # for update's shuffles: a stopped run resumes exactly
    raw_obs = np.empty((args.num_steps + 1, *envs.observation_space.shape))
    raw_obs[-1], _ = envs.reset(seed=int(rng.integers(2**30)))  # with an index added, below 2³¹
    rewards, discounted_sums = np.zeros((2, args.num_steps, args.num_envs))
    is_step, terminations, truncations = np.zeros((3, args.num_steps, args.num_envs), bool)
    while True:
        actions, standardize, sample = [], agent.standardizer(), agent.policy.sampler(rng)
        raw_obs[0] = raw_obs[-1]
        for t in range(args.num_steps):
            # After an episode's last step, envs.step ignores the action and resets: that row is no
            # step. Its raw_obs[t] is the last observation of the old episode; V of it bootstraps
            # row t − 1 if that was truncated. (At t = 0, row −1 is that of the previous rollout.)
            is_step[t] = ~(terminations[t - 1] | truncations[t - 1])
            actions.append(sample(standardize(raw_obs[t]))[0])
            raw_obs[t + 1], rewards[t], terminations[t], truncations[t], _ = envs.step(actions[t])
        if args.norm_reward:
            rewards[~is_step] = 0.0
            for t in range(args.num_steps):
                discounted_sums[t] = args.gamma * discounted_sums[t - 1] * is_step[t] + rewards[t]
            agent.reward_moments = with_rows(agent.reward_moments, discounted_sums[is_step, None])
            agent.largest_reward.clamp_(mean_over_ranks(torch.tensor(np.abs(rewards).max())))
            rewards = rewards / max(agent.reward_moments[2], agent.largest_reward / 10).item()
        obs = standardize(raw_obs)
        values = agent.value(torch.as_tensor(obs, device=args.device)).cpu()
        ends = (terminations, truncations)  # both end Â_t's sum; only termination drops V(s_{t+1})
        targets = gae_fast.gae(rewards, values, *ends, args.gamma, args.gae_lambda)
        arrays = (x[is_step] for x in (obs[:-1], np.stack(actions), *targets))  # (B, …), B steps
        obs, actions, advantages, returns = (torch.tensor(x, device=args.device) for x in arrays)
        if args.norm_adv:
            _, mean, std = with_rows(advantages.new_zeros(3, 1), advantages[:, None])
            advantages = (advantages - mean) / std
        log_probs = agent.policy(obs).log_prob(actions)
        if args.norm_obs:  # last: this rollout's actions were sampled with the old statistics
            agent.obs_moments = with_rows(agent.obs_moments, raw_obs[:-1][is_step])
        yield Batch(obs, actions, log_probs, advantages.float(), returns.float())


# --------------------------------------------- update ---------------------------------------------
def make_optimizer(agent: Agent, args: Args) -> torch.optim.Adam:
    policy = {"params": agent.policy.parameters(), "lr": args.learning_rate}
    critic = {"params": agent.critic.parameters(), "lr": args.value_learning_rate}
    return torch.optim.Adam([policy, critic], eps=1e-5, fused=True)


def update(agent: Agent, optimizer: torch.optim.Adam, batch: Batch, args: Args) -> dict[str, float]:
    """Take VPG's step on one rollout, then fit V to the rollout's returns."""
    log_probs = agent.policy(batch.obs).log_prob(batch.actions)
    loss = -(log_probs * batch.advantages).mean()  # its gradient estimates −∇J, up to a factor
    optimizer.zero_grad()
    loss.backward()
    mean_over_ranks(*(x.grad for x in agent.policy.parameters()))
    optimizer.step()  # steps the policy only: Adam skips the critic, whose gradients are None
    fit_critic(agent, optimizer, batch, args)
    return {}


def fit_critic(agent: Agent, optimizer: torch.optim.Adam, batch: Batch, args: Args) -> None:
    """Fit V to the returns of the rollout, in epochs of minibatches."""
    for _ in range(args.value_epochs):
        for rows in torch.randperm(len(batch.obs)).tensor_split(args.num_minibatches):
            loss = 0.5 * (agent.value(batch.obs[rows]) - batch.returns[rows]).square().mean()
            optimizer.zero_grad()
            loss.backward()
            mean_over_ranks(*(x.grad for x in agent.critic.parameters()))
            optimizer.step()


# --------------------------------------------- train ----------------------------------------------
def train(args: Args, saved: dict[str, Any] | None = None) -> list[dict[str, Any]]:
    """Train an agent, write the run's folder, and return the rows of its metrics.csv.

    load_run gives both arguments for a run to go on with; saved is used up. Raises ArgumentError
    for what no run can use, FloatingPointError for a metric or a weight that is not finite.
    """
    run = Run(args, saved or {})
    try:
        while run.global_step < args.total_timesteps:
            if run.global_step >= run.saved_step + run.period:
                run.save_checkpoint()
                batches = rollouts(run.envs, run.agent, args, iteration=len(run.rows))
            for group, rate in zip(run.optimizer.param_groups, run.learning_rates):
                group["lr"] = rate * (1 - args.anneal_lr * run.global_step / args.total_timesteps)
            batch = next(batches)
            metrics = update(run.agent, run.optimizer, batch, args)
            run.write(len(batch.obs), measure(run.agent, batch) | metrics)
        run.save_checkpoint()
    except KeyboardInterrupt:
        [process.kill() for process in getattr(run.envs.unwrapped, "processes", [])]
        run.envs.unwrapped.closed = True  # else Gymnasium waits for processes that Ctrl-C has ended
        raise KeyboardInterrupt(f"saved to step {run.saved_step}: --resume {run.folder}") from None
    run.bar.close(), run.envs.close()
    if run.rank == 0 and not args.quiet:
        print(run.folder)
    return run.rows


@torch.no_grad()
def measure(agent: Agent, batch: Batch) -> dict[str, float]:
    """Metrics of the agent as it is on a rollout: means over all ranks of each rank's own."""
    policy, errors = agent.policy(batch.obs), batch.returns - agent.value(batch.obs)
    log_ratio = policy.log_prob(batch.actions) - batch.log_probs
    unexplained = errors.var(correction=0) / batch.returns.var(correction=0).clamp(min=1e-8)
    metrics = {
        "surrogate": (log_ratio.expm1() * batch.advantages).mean(),  # (r − 1) Â, not clipped
        "entropy": policy.entropy().mean(),
        "approx_kl": (log_ratio.expm1() - log_ratio).mean(),  # k3, joschu.net/blog/kl-approx.html
        "value_loss": 0.5 * errors.square().mean(),
        "explained_variance": 1 - unexplained,
    }
    return dict(zip(metrics, mean_over_ranks(torch.stack([*metrics.values()])).tolist()))


class Run:
    """What a run trains, and its rows, folder and progress bar. Rank 0 alone writes files."""

    def __init__(self, args: Args, saved: dict[str, Any]) -> None:
        torch.set_num_threads(1)  # networks this small are slower with two threads
        torch.manual_seed(args.seed)
        self.args, self.rank, self.world_size = args, *rank_and_world_size()
        self.envs = make_envs(args.env, args.num_envs, args.vectorization_mode)
        self.agent = Agent(self.envs, args.norm_obs).to(args.device)
        self.optimizer = make_optimizer(self.agent, args)
        self.learning_rates = [x["lr"] for x in self.optimizer.param_groups]  # before annealing
        self.rows, self.recent = saved.get("rows", []), saved.get("recent", [])
        if saved:
            self.agent.load_state_dict(saved.pop("agent"))  # so that nothing uses it twice
            self.optimizer.load_state_dict(saved.pop("optimizer"))
        last = self.rows[-1] if self.rows else {"global_step": 0, "episodes": 0, "wall_time": 0.0}
        self.global_step, self.episodes = last["global_step"], last["episodes"]
        self.period = args.checkpoint_every * args.num_envs * self.world_size
        self.saved_step, self.old_episodes = -math.inf, None  # so that train saves at once
        self.folder = self.make_folder(is_new=not saved) if self.rank == 0 else None
        self.start = time.perf_counter() - last["wall_time"]
        options = {"initial": self.global_step, "disable": args.quiet or self.rank > 0}
        self.bar = tqdm.tqdm(total=args.total_timesteps, unit="step", **options)

    def make_folder(self, is_new: bool) -> Path:
        args, now = self.args, f"{time.strftime('%Y%m%d-%H%M%S')}-{time.time_ns() % 10**9:09}"
        name = f"{args.env}__{ALGORITHM}__{args.seed}__{now}".replace(":", "-").replace("/", "-")
        folder = Path(args.run_dir or args.resume or f"runs/{name}")
        if is_new and args.resume or args.run_dir and (folder.is_file() or any(folder.glob("*"))):
            raise ArgumentError(f"--run-dir: expected an empty folder (or load_run), got {folder}")
        folder.mkdir(parents=True, exist_ok=True)
        config = {"algorithm": ALGORITHM, **vars(args), "world_size": self.world_size}
        config |= {x.__name__: x.__version__ for x in (np, torch, gymnasium, gae_fast)}
        (folder / "config.new").write_text(json.dumps(config, indent=2) + "\n")
        (folder / "config.new").replace(folder / "config.json")  # whole or not at all
        with open(folder / "metrics.new", "w", newline="") as file:
            csv.writer(file).writerows([*self.rows[:1], *(row.values() for row in self.rows)])
        return (folder / "metrics.new").replace(folder / "metrics.csv").parent

    def write(self, steps: int, metrics: dict[str, float]) -> None:
        """Add a row. Raises FloatingPointError for a metric or a weight that is not finite."""
        ended = [*zip(map(float, self.envs.return_queue), map(int, self.envs.length_queue))]
        self.envs.return_queue.clear(), self.envs.length_queue.clear(), self.envs.time_queue.clear()
        gathered = [(steps, ended)] * self.world_size
        if self.world_size > 1:
            torch.distributed.all_gather_object(gathered, gathered[0])
        self.global_step += sum(steps for steps, _ in gathered)
        ended = [episode for _, episodes in gathered for episode in episodes]
        self.episodes, self.recent = self.episodes + len(ended), [*self.recent, *ended][-100:]
        means = np.mean(self.recent, axis=0).tolist() if self.recent else (None, None)
        seconds = round(time.perf_counter() - self.start, 3)
        row = {"global_step": self.global_step, "wall_time": seconds, "episodes": self.episodes}
        row |= {"episodic_return": means[0], "episodic_length": means[1]}
        row |= {"SPS": int(self.global_step / max(seconds, 1e-3)), **metrics}
        row |= {"learning_rate": self.optimizer.param_groups[0]["lr"]}
        for name, value in {**row, **self.agent.state_dict()}.items():
            if value is not None and not math.isfinite(torch.as_tensor(value).sum()):
                raise FloatingPointError(f"iteration {len(self.rows) + 1}: {name} is not finite")
        assert not self.rows or [*row] == [*self.rows[0]], f"metrics.csv: other columns: {[*row]}"
        self.rows.append(row)
        if self.rank == 0:
            with open(self.folder / "metrics.csv", "a", newline="") as file:
                csv.writer(file).writerows([row.values()] if self.rows[1:] else [row, row.values()])
        self.bar.set_postfix({"return": means[0]}, refresh=False)
        self.bar.update(self.global_step - self.bar.n)

    def save_checkpoint(self) -> None:
        if self.global_step >= self.saved_step + self.period and self.episodes == self.old_episodes:
            warnings.warn("no episode ends between resets: raise --checkpoint-every", stacklevel=2)
        saved = {"rows": len(self.rows), "global_step": self.global_step, "recent": self.recent}
        saved |= {"agent": self.agent.state_dict(), "optimizer": self.optimizer.state_dict()}
        if self.rank == 0:
            torch.save(saved, self.folder / "checkpoint.new")
            (self.folder / "checkpoint.new").replace(self.folder / "checkpoint.pt")
        self.saved_step, self.old_episodes = self.global_step, self.episodes


def load_run(folder: str, **changes: Any) -> tuple[Args, dict[str, Any]]:
    """Own Args, with changes, and state of a run, for train(*load_run(…)). Raises ArgumentError."""
    try:
        config = json.loads(Path(folder, "config.json").read_text())
        if (config["algorithm"], config["world_size"]) != (ALGORITHM, rank_and_world_size()[1]):
            raise ValueError(f"it is of {config['algorithm']}, world_size {config['world_size']}")
        saved = torch.load(f"{folder}/checkpoint.pt", map_location="cpu", weights_only=True)
        table = csv.DictReader(Path(folder, "metrics.csv").read_text().splitlines())
        rows = [next(table) for _ in range(saved["rows"])]
        saved["rows"] = [{k: json.loads(x or "null") for k, x in row.items()} for row in rows]
    except Exception as e:  # torch raises many kinds of exception
        found = f"{folder!r}: {type(e).__name__}: {e}".splitlines()[0]
        raise ArgumentError(f"--resume: expected a run of {ALGORITHM}, got {found}") from e
    own = {x.name: config[x.name] for x in dataclasses.fields(Args) if x.name in config}
    return Args(**own | {"run_dir": None, "resume": folder} | changes), saved


def rank_and_world_size() -> tuple[int, int]:
    """The number of this process and the number of all: 0 and 1 without torchrun."""
    dist = torch.distributed
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


def mean_over_ranks(*tensors: Tensor) -> Tensor:
    """Replace tensors, in place, by their means over all ranks (one message); return the first."""
    if torch.distributed.is_initialized():
        vector = nn.utils.parameters_to_vector(tensors)
        torch.distributed.all_reduce(vector)
        nn.utils.vector_to_parameters(vector / torch.distributed.get_world_size(), tensors)
    return tensors[0]


if __name__ == "__main__":
    if torch.distributed.is_torchelastic_launched():  # by torchrun
        torch.distributed.init_process_group()
    try:
        named = tyro.cli(Args)
        own, saved = load_run(named.resume) if named.resume else (named, None)
        train(tyro.cli(Args, default=own), saved)  # own: for what the command does not name
    except (ArgumentError, KeyboardInterrupt) as reason:
        raise SystemExit(f"{ALGORITHM}.py: {reason}") from None
