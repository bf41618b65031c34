"""VPG: the vanilla policy gradient, with a value function as baseline and generalised advantage estimation.

Each iteration collects a rollout with the policy π_θ, takes one step along the gradient that it estimates, and fits the
value function V to the rollout's returns by regression. V is what turns returns into advantages Â, which say how much
better an action was than the policy's average one; λ trades their variance (λ = 1: the rewards up to the rollout's end,
and V there, minus V) for bias (λ = 0: one-step TD errors).

    ∇J(θ) = E_t[ ∇log π_θ(a_t | s_t) Â_t ],   Â_t = Σ_l (γλ)^l δ_{t+l},   δ_t = r_t + γ V(s_{t+1}) − V(s_t)

Sutton et al. 2000, "Policy Gradient Methods for Reinforcement Learning with Function Approximation", Theorem 1.
Schulman et al. 2016, "High-Dimensional Continuous Control Using Generalized Advantage Estimation" (arXiv 1506.02438),
eq. 16 and 28.

    python vpg.py --env CartPole-v1
    python vpg.py --env Acrobot-v1 --gae-lambda 1 --seed 2
    python vpg.py --env InvertedPendulum-v5 --num-envs 8 --vectorization-mode async --norm-obs
    torchrun --nproc-per-node 2 vpg.py --env CartPole-v1 --num-envs 16
"""

import contextlib
import csv
import dataclasses
import importlib.util
import io
import itertools
import json
import math
import os
import platform
import re
import sys
import time
import traceback
import zipfile
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from datetime import datetime
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple

import gymnasium
import numpy as np
import torch
import torch.distributed as dist
import tqdm
import tyro
from gymnasium.spaces import Box, Discrete
from gymnasium.vector import AutoresetMode, VectorEnv
from gymnasium.wrappers import TransformObservation
from gymnasium.wrappers.vector import ClipAction, FlattenObservation, TransformAction
from torch import Tensor, nn
from torch.distributions import Distribution, Independent, Normal

import gae_fast

# -------------------------------------------------------- Args --------------------------------------------------------

REAL = (int, float)
# What a number may be: its type, the words for it, and the test. A bool is no whole number here, hence type(x).
Seed = Annotated[int, "a whole number in [0, 2^63)", lambda x: type(x) is int and 0 <= x < 2**63]
Mode = Annotated[
    Literal["sync", "async", "vector_entry_point"] | None,
    "sync, async, vector_entry_point or None",
    lambda x: x in ("sync", "async", "vector_entry_point", None),
]
Total = Annotated[int, "a whole number in [1, 2^63)", lambda x: type(x) is int and 1 <= x < 2**63]
Count = Annotated[int, "a whole number in [1, 2^31)", lambda x: type(x) is int and 1 <= x < 2**31]
Steps = Annotated[int, "a whole number in [2, 2^31)", lambda x: type(x) is int and 2 <= x < 2**31]
Fraction = Annotated[float, "a number in [0, 1]", lambda x: isinstance(x, REAL) and 0 <= x <= 1]
Rate = Annotated[float, "a number in [0, 1e30]", lambda x: isinstance(x, REAL) and 0 <= x <= 1e30]


@dataclasses.dataclass
class Args:
    env: str = "CartPole-v1"
    """Gymnasium environment; `module:EnvId` imports the module first"""
    seed: Seed = 1
    """seed of all that is random: environments, networks, sampling, shuffling"""
    total_timesteps: Total = 200_000
    """environment steps to train for, all ranks together; the rollout that reaches them is the last"""
    num_envs: Count = 32
    """environments stepped side by side; under torchrun, on each rank"""
    num_steps: Steps = 32
    """steps of each environment in a rollout; 1 would not do, as it may only reset"""
    vectorization_mode: Mode = None
    """how Gymnasium steps them; None takes the native vector environment where there is one, else sync"""
    gamma: Fraction = 0.98
    """discount γ"""
    gae_lambda: Fraction = 0.95
    """λ of generalised advantage estimation"""
    norm_obs: bool = False
    """standardise observations by the mean and variance of the rollouts before, and clip them to ±10"""
    norm_reward: bool = False
    """divide rewards by the running standard deviation of the discounted sum of past rewards"""
    anneal_lr: bool = True
    """lower the learning rate linearly to 0 over the run"""
    device: str = "auto"
    """where the networks live: cpu, cuda, …; auto takes cuda where there is one; each rank takes a GPU of its own"""
    run_dir: str | None = None
    """folder to write, new or empty; None makes runs/<env>__<algorithm>__<seed>__<time>"""
    resume: str | None = None
    """folder of a run that was stopped, to go on with from its last checkpoint, with its own arguments; if
    --run-dir names it too and there is none yet, the run begins"""
    checkpoints: Count = 10
    """checkpoints of the run; they leave no trace in its training"""
    tensorboard: bool = False
    """write TensorBoard event files too"""
    quiet: bool = False
    """show no progress bar and no closing line"""

    learning_rate: Rate = 3e-3
    """Adam's step size for the policy"""
    norm_adv: bool = True
    """standardise the advantages of each rollout"""
    value_learning_rate: Rate = 1e-3
    """Adam's step size for the value function"""
    value_epochs: Count = 5
    """passes over each rollout that fit the value function"""
    num_minibatches: Count = 4
    """minibatches per pass; a divisor of num_envs * num_steps that leaves at least 2 steps in each"""


class ArgumentError(ValueError):
    """An argument cannot be used; the message names it and says what was expected and what came."""


class RunError(RuntimeError):
    """A run cannot go on; the message says where, why, and what is left of it."""


class LostRank(RunError):
    """Another process of the run has stopped; it says why itself, if it can."""


def parse_args(default: Args) -> Args:
    """Read the command line. Raises ArgumentError with the first words of the box that tyro draws for a bad one."""
    try:
        with contextlib.redirect_stderr(io.StringIO()) as box:
            return tyro.cli(Args, default=default)
    except SystemExit:
        if not box.getvalue():  # it was --help
            raise
        words = re.findall(r"[^\s│╮]+", re.split("[─-]{9,}", box.getvalue())[1])
        raise ArgumentError(f"{' '.join(words)} (see --help)") from None


def check_args(args: Args) -> None:
    """Raise ArgumentError for a value that no run could use."""
    anything_else = "a string, a flag or None", lambda x: isinstance(x, (str, bool, type(None)))
    for field in dataclasses.fields(args):
        value = getattr(args, field.name)
        expected, is_valid = getattr(field.type, "__metadata__", anything_else)
        if not is_valid(value):
            raise ArgumentError(f"--{field.name.replace('_', '-')}: expected {expected}, got {value!r}")
    if args.run_dir is not None and args.resume is None:
        run_dir = Path(args.run_dir)
        if args.run_dir == "" or run_dir.is_file() or (run_dir.is_dir() and os.listdir(run_dir)):
            raise ArgumentError(f"--run-dir: expected a new or empty folder, got {args.run_dir!r}")
    if args.tensorboard and not importlib.util.find_spec("tensorboard"):
        raise ArgumentError("--tensorboard: expected the package tensorboard to be installed, found none")
    check_update_args(args)


# ------------------------------------------------------ make_envs -----------------------------------------------------


def make_envs(args: Args, **options: Any) -> VectorEnv:
    """Make the vector environment, with flat observations and with actions counted from 0 or clipped to their bounds.

    Gymnasium's make_vec takes the options. Raises ArgumentError if it cannot make the environment or if an Agent cannot
    act in it.
    """
    if args.vectorization_mode == "async":
        options["wrappers"] = [of_one_form]
    try:
        envs = gymnasium.make_vec(args.env, args.num_envs, args.vectorization_mode, **options)
    except (Exception, SystemExit) as error:  # an environment's own may be of any kind
        said = " ".join(str(error).split()) or type(error).__name__
        raise ArgumentError(f"--env: expected one that Gymnasium can make, got {args.env!r}: {said}") from error
    obs_space, action_space = envs.single_observation_space, envs.single_action_space
    is_real_box = isinstance(action_space, Box) and action_space.dtype.kind == "f"
    autoreset_mode = envs.metadata.get("autoreset_mode")
    refusal = None
    if not obs_space.is_np_flattenable:
        refusal = f"expected observations that can be flattened, got {obs_space}"
    elif not isinstance(action_space, Discrete) and not is_real_box:
        refusal = f"expected Discrete or real-valued Box actions, got {action_space}"
    elif autoreset_mode != AutoresetMode.NEXT_STEP:
        refusal = f"expected next-step autoreset, got {autoreset_mode}; --vectorization-mode sync may help"
    elif envs.num_envs != args.num_envs:
        refusal = f"expected num_envs = {args.num_envs} environments, got {envs.num_envs}"
    if refusal:
        envs.close()
        raise ArgumentError(f"--env {args.env}: {refusal}")

    if not isinstance(obs_space, Box) or len(obs_space.shape) != 1:
        envs = FlattenObservation(envs)
    if isinstance(action_space, Box):
        envs = ClipAction(envs)
    elif action_space.start != 0:
        counted_from_0 = Discrete(action_space.n)
        envs = TransformAction(envs, lambda action: action + action_space.start, single_action_space=counted_from_0)
    return envs


def of_one_form(env: gymnasium.Env) -> gymnasium.Env:
    """Let observations of another size or kind than the space's raise; a worker process would broadcast or cast."""
    space = env.observation_space

    def formed(obs: Any) -> np.ndarray:
        return np.reshape(obs, space.shape).astype(space.dtype, casting="same_kind", copy=False)

    return TransformObservation(env, formed, None) if isinstance(space, Box) else env


# -------------------------------------------------------- Agent -------------------------------------------------------


def mlp(num_inputs: int, num_outputs: int, head_gain: float) -> nn.Sequential:
    """Two hidden layers of 64 tanh units, with orthogonal weights and zero biases."""
    hidden = [nn.Linear(num_inputs, 64), nn.Tanh(), nn.Linear(64, 64), nn.Tanh()]
    layers = nn.Sequential(*hidden, nn.Linear(64, num_outputs))
    for layer, gain in zip(layers[::2], (math.sqrt(2), math.sqrt(2), head_gain)):
        nn.init.orthogonal_(layer.weight, gain)
        nn.init.zeros_(layer.bias)
    return layers


class RunningStatistics(nn.Module):
    """Mean and variance of all rows seen so far, in buffers, so that a checkpoint carries them."""

    def __init__(self, *shape: int) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(shape))
        self.register_buffer("var", torch.ones(shape))
        self.register_buffer("count", torch.tensor(0))

    def update(self, rows: Tensor) -> None:
        """Take in rows of shape (B, *shape), B ≥ 1. Chan et al. 1979: the moments of two samples joined."""
        var, mean, num_rows = pooled_moments(*torch.var_mean(rows, dim=0, correction=0), len(rows))
        self.count += num_rows
        share = num_rows / self.count
        delta = mean - self.mean
        self.mean += share * delta
        self.var = (1 - share) * self.var + share * (var + (1 - share) * delta.square())


class Categorical(Distribution):
    """One of the actions 0, …, n − 1, with probabilities proportional to exp(logits), which are of shape (…, n).

    Networks this small cost their calls more than their arithmetic, and this makes fewer calls than torch's own, with
    which an update of PPO takes 1.1 to 1.2 times as long (benchmarks/choices.py).
    """

    arg_constraints = {}  # nothing is checked

    def __init__(self, logits: Tensor) -> None:
        super().__init__(logits.shape[:-1], validate_args=False)
        self.logits = logits.log_softmax(dim=-1)  # normalised: log p

    @property
    def mode(self) -> Tensor:
        return self.logits.argmax(dim=-1)

    def sample(self) -> Tensor:
        # The Gumbel-max trick: with g = −log of exponential noise, argmax_k (log p_k + g_k) is k with probability p_k.
        return (self.logits - torch.empty_like(self.logits).exponential_().log()).argmax(dim=-1)

    def log_prob(self, actions: Tensor) -> Tensor:
        # Actions may have leading dimensions that the logits lack.
        return self.logits.expand(*actions.shape, -1).gather(-1, actions.unsqueeze(-1)).squeeze(-1)

    def entropy(self) -> Tensor:
        return -(self.logits.exp() * self.logits).sum(dim=-1)


class Agent(nn.Module):
    """A policy π(a | s) and a value function V(s), two separate networks over the same observations."""

    def __init__(self, obs_space: Box, action_space: Box | Discrete, norm_obs: bool) -> None:
        super().__init__()
        (num_obs,) = obs_space.shape
        self.discrete = isinstance(action_space, Discrete)
        self.action_shape = action_space.shape
        num_outputs = int(action_space.n) if self.discrete else math.prod(self.action_shape)
        self.actor = mlp(num_obs, num_outputs, head_gain=0.01)
        self.critic = mlp(num_obs, 1, head_gain=1.0)
        if not self.discrete:
            self.log_std = nn.Parameter(torch.zeros(self.action_shape))
        self.norm_obs = norm_obs
        self.obs_statistics = RunningStatistics(num_obs)
        self.reward_statistics = RunningStatistics()

    def policy(self, obs: Tensor) -> Distribution:
        """π(· | s) for obs (…, num_obs): a Categorical, or a diagonal Normal with one log_std for all states."""
        output = self.actor(self.standardize(obs))
        if self.discrete:
            return Categorical(output)
        mean = output.reshape(*obs.shape[:-1], *self.action_shape)
        normal = Normal(mean, self.log_std.exp().expand_as(mean), validate_args=False)
        return Independent(normal, len(self.action_shape), validate_args=False)

    def value(self, obs: Tensor) -> Tensor:
        """V(s) for obs (…, num_obs), of shape (…)."""
        return self.critic(self.standardize(obs)).squeeze(-1)

    def standardize(self, obs: Tensor) -> Tensor:
        if not self.norm_obs:
            return obs
        return ((obs - self.obs_statistics.mean) / (self.obs_statistics.var + 1e-8).sqrt()).clamp(-10, 10)


class Adam:
    """Adam (Kingma and Ba 2015) on one vector, of which the parameters and their gradients become views.

    So a step takes a few kernels in all, not a few for each layer. Move the module to its device before. The arithmetic
    is that of torch.optim.Adam with eps = 1e-5, as is usual for PPO, and clip_grad_norm_, with which an update of PPO
    takes 1.4 times as long (benchmarks/choices.py); torch.optim.Adam would also take a second to import torch._dynamo
    first. The kernel is torch's own, and private to it: another version of torch may call for a change here.
    """

    def __init__(self, parameters: Iterable[nn.Parameter], learning_rate: float) -> None:
        parameters = list(parameters)
        sizes = [parameter.numel() for parameter in parameters]
        self.vector = nn.utils.parameters_to_vector(parameters).detach()
        self.grad = torch.zeros_like(self.vector)
        for parameter, data, grad in zip(parameters, self.vector.split(sizes), self.grad.split(sizes)):
            parameter.data = data.view_as(parameter)
            parameter.grad = grad.view_as(parameter)
        self.initial_learning_rate = self.learning_rate = learning_rate
        moments = {"first_moment": torch.zeros_like(self.vector), "second_moment": torch.zeros_like(self.vector)}
        self.state = {"step": torch.zeros((), device=self.vector.device), **moments}

    def minimize(self, loss: Tensor, num_samples: int, max_grad_norm: float = math.inf) -> None:
        """Take one step down the gradient of the loss, scaled down to max_grad_norm where it is longer.

        The loss is the mean over this rank's num_samples; its gradient is averaged over those of all ranks first.
        Raises RunError, before the step, if the loss or the gradient is not finite.
        """
        self.grad.zero_()
        loss.backward()
        average_over_ranks(self.grad, num_samples)
        norm = self.grad.norm()
        if not math.isfinite(loss.item() + norm.item()):
            check_finite(loss=loss, gradient=self.grad, gradient_norm=norm)
        divisor = (norm / max_grad_norm).clamp(min=1.0).float() if max_grad_norm < math.inf else None
        self.state["step"] += 1
        moments = [self.state["first_moment"]], [self.state["second_moment"]], []  # and none of AMSGrad
        options = {"beta1": 0.9, "beta2": 0.999, "eps": 1e-5, "weight_decay": 0.0, "amsgrad": False, "maximize": False}
        options |= {"lr": self.learning_rate, "grad_scale": divisor}  # by which the kernel divides the gradient
        torch._fused_adam_([self.vector], [self.grad], *moments, [self.state["step"]], **options)


# ------------------------------------------------------- rollout ------------------------------------------------------


class Batch(NamedTuple):
    """The B ≤ num_steps * num_envs steps of a rollout, every field of shape (B, …)."""

    obs: Tensor  # as the environment gave them
    actions: Tensor  # as the policy drew them, before clipping to their bounds
    log_probs: Tensor  # log π_old(a_t | s_t)
    values: Tensor  # V_old(s_t)
    advantages: Tensor  # Â_t
    returns: Tensor  # Â_t + V_old(s_t), the value function's target


def shuffled(batch: Batch, num_minibatches: int) -> list[Batch]:
    """Split a batch at random into minibatches whose sizes differ by at most one."""
    order = torch.randperm(len(batch.obs)).to(batch.obs.device)
    fields = [x[order].tensor_split(num_minibatches) for x in batch]
    return [Batch(*parts) for parts in zip(*fields)]


class Episodes:
    """Where every environment stands between two rollouts, and the returns and lengths of the last 100 episodes.

    Gymnasium cannot save an environment. So a checkpoint holds the key from which the environments were last seeded and
    all actions since: a resumed run resets them with that key and takes the actions again.
    """

    ARRAYS = ("obs", "dones", "running_return", "running_length", "discounted_sum", "actions")

    def __init__(self, envs: VectorEnv, seed: int, state: dict[str, Any] | None = None) -> None:
        """Begin the first episodes, or bring environments just made to where a state says."""
        self.envs, self.seed = envs, seed
        self.count = state["count"] if state else 0
        self.recent_returns = deque(state["recent_returns"] if state else [], maxlen=100)
        self.recent_lengths = deque(state["recent_lengths"] if state else [], maxlen=100)
        # Actions that a resumed run may have to take again: ten episodes of full length, where that is known.
        self.most_repeated = 10 * (envs.unwrapped.spec.max_episode_steps or 1000)
        self.begin_anew(state["reset_key"] if state else 0)
        self.prepare(0)  # for a rollout without train
        if state:
            self.act_again(state)

    def begin_anew(self, key: int) -> None:
        """Reset the environments, with a seed that the key gives; what was under way is cut."""
        first_seed = seeds_of(self.seed, key)[0] + rank() * self.envs.num_envs
        (self.obs,) = arrays_of(self.envs, "reset", seed=first_seed)
        self.dones = np.zeros(self.envs.num_envs, bool)
        self.running_return = np.zeros(self.envs.num_envs)  # so far, undiscounted, as the environment pays it
        self.running_length = np.zeros(self.envs.num_envs, int)
        self.discounted_sum = np.zeros(self.envs.num_envs)
        self.reset_key, self.actions = key, []  # all actions since

    def prepare(self, iteration: int) -> None:
        """Seed the generators of actions and shuffles for this iteration; so a checkpoint need not hold their states.

        Begin new episodes where a resumed run would have more than most_repeated actions to take again.
        """
        if len(self.actions) > self.most_repeated:
            self.begin_anew(iteration)
        _, action_seed, torch_seed = seeds_of(self.seed, iteration)
        self.action_rng = np.random.default_rng(action_seed + rank())
        torch.default_generator.manual_seed(torch_seed + rank())  # torch.manual_seed takes 100 times as long

    def state(self) -> dict[str, Any]:
        """What a checkpoint holds."""
        arrays = {name: torch.as_tensor(np.array(getattr(self, name))) for name in self.ARRAYS}
        recent = {"recent_returns": list(self.recent_returns), "recent_lengths": list(self.recent_lengths)}
        return {"count": self.count, "reset_key": self.reset_key, **recent, **arrays}

    def act_again(self, state: dict[str, Any]) -> None:
        """Take the actions of a state again; if they do not lead to its observations, begin new episodes and say so."""
        for actions in state["actions"].numpy():
            self.obs, *_ = arrays_of(self.envs, "step", actions.copy())
        # REINFORCE has no actions to take again: its rollouts begin with a reset.
        is_same = not len(state["actions"]) or np.array_equal(np.asarray(self.obs, np.float32), state["obs"].numpy())
        if not all(all_gather(is_same)):
            if rank() == 0:
                said = "the environments do not repeat themselves, so they begin new episodes"
                print(f"--resume: {said}", file=sys.stderr)
            self.begin_anew(self.count)
        else:
            for name in self.ARRAYS:
                setattr(self, name, state[name].numpy())
            self.actions = list(self.actions)


def seeds_of(seed: int, key: int) -> list[int]:
    """Seeds for the environments, the actions and torch. Hashed, since environment n is given the first plus n.

    Rank r adds r to the seeds of actions and torch, and r * num_envs to that of the environments, which thus get the
    seeds that they would get in one process.
    """
    return np.random.SeedSequence(seed, spawn_key=(key,)).generate_state(3).tolist()


def arrays_of(envs: VectorEnv, method: str, *args: Any, **kwargs: Any) -> list[np.ndarray]:
    """Call reset or step; return what it returns but for the infos. Raises RunError if it fails."""
    try:
        *arrays, _ = getattr(envs, method)(*args, **kwargs)
        expected = [envs.observation_space.shape, *[(envs.num_envs,)] * (3 if method == "step" else 0)]
        if [x.shape for x in arrays] != expected or not {x.dtype.kind for x in arrays} <= {*"biuf"}:
            got = ", ".join(f"{x.dtype}{x.shape}" for x in arrays)
            raise ValueError(f"expected numbers of shapes {expected}, got {got}")
        return arrays
    except (Exception, SystemExit) as error:
        said = f"{type(error).__name__}: {' '.join(str(error).split())}"
        if hasattr(envs.unwrapped, "processes") and isinstance(error, (EOFError, ConnectionError)):
            said += "; a worker process died"
        raise RunError(f"the environment's {method} failed: {said}") from error


def check_finite(**quantities: np.ndarray | Tensor) -> None:
    """Raise RunError for a quantity with NaN or infinity in it."""
    for name, numbers in quantities.items():
        if not torch.as_tensor(numbers).isfinite().all():
            raise RunError(f"there is NaN or infinity in {name}")


def in_numpy(layer: nn.Module) -> Callable[[np.ndarray], np.ndarray]:
    """The layer as a function of NumPy arrays, good until its weights change. Raises TypeError for an unknown kind."""
    if type(layer) is nn.Tanh:
        return np.tanh
    if type(layer) is nn.Linear:
        weight, bias = layer.weight.detach().cpu().numpy().T, layer.bias.detach().cpu().numpy()
        return lambda x: x @ weight + bias
    raise TypeError(f"expected nn.Linear or nn.Tanh, got {layer}: in_numpy must be told what it is in NumPy")


def actor_in_numpy(agent: Agent, rng: np.random.Generator) -> Callable[[np.ndarray], np.ndarray]:
    """A function that draws actions (N, …) for observations (N, num_obs) as agent.policy(obs).sample() would.

    It says again what Agent.standardize and Agent.policy say, and must change with them. A step has so few rows that it
    costs its calls, and NumPy's cost less: with torch, a rollout takes 1.6 to 2 times as long (benchmarks/choices.py).
    """
    layers = [in_numpy(layer) for layer in agent.actor]
    obs_mean, obs_var = agent.obs_statistics.mean.cpu().numpy(), agent.obs_statistics.var.cpu().numpy()
    std = None if agent.discrete else agent.log_std.detach().exp().cpu().numpy()

    def act(obs: np.ndarray) -> np.ndarray:
        x = ((obs - obs_mean) / np.sqrt(obs_var + 1e-8)).clip(-10, 10) if agent.norm_obs else obs
        for layer in layers:
            x = layer(x)
        if agent.discrete:
            return (x + rng.gumbel(size=x.shape)).argmax(axis=-1)  # as in Categorical.sample
        mean = x.reshape(len(x), *agent.action_shape)
        return mean + std * rng.standard_normal(mean.shape, np.float32)

    return act


def rollout(envs: VectorEnv, agent: Agent, episodes: Episodes, args: Args) -> Batch:
    """Act num_steps times in every environment and return the steps taken as a Batch.

    Gymnasium resets an environment on the step after an episode's last. That row is no step of any episode, and nothing
    may see it but for its observation: the episode's last one, from which a truncated episode bootstraps.
    """
    device = next(agent.parameters()).device
    obs = np.empty((args.num_steps + 1, *episodes.obs.shape), np.float32)
    rewards = np.empty((args.num_steps, envs.num_envs))
    terminations, truncations = np.empty(rewards.shape, bool), np.empty(rewards.shape, bool)
    actions = []
    act = actor_in_numpy(agent, episodes.action_rng)
    obs[0] = episodes.obs
    for t in range(args.num_steps):
        actions.append(act(obs[t]))
        action = actions[t].copy()  # an environment may write into what it is given
        obs[t + 1], rewards[t], terminations[t], truncations[t] = arrays_of(envs, "step", action)
    check_finite(observations=obs, rewards=rewards)
    actions = np.stack(actions)
    episodes.actions.extend(actions)

    dones = terminations | truncations
    is_step = ~np.concatenate([episodes.dones[None], dones[:-1]])  # what follows an episode's last step only resets
    rewards[~is_step] = 0.0
    episodes.obs, episodes.dones = obs[-1], dones[-1]
    record_episodes(episodes, rewards, dones, is_step)
    if args.norm_reward:
        rewards = normalize_rewards(episodes, rewards, is_step, args.gamma, agent.reward_statistics)

    with torch.no_grad():
        obs, actions = (torch.tensor(x, device=device) for x in (obs, actions))  # copies, aligned by torch
        log_probs, values = agent.policy(obs[:-1]).log_prob(actions), agent.value(obs)
    targets = gae_fast.gae(rewards, values.cpu(), terminations, truncations, args.gamma, args.gae_lambda)
    advantages, returns = (torch.as_tensor(x, dtype=torch.float32, device=device) for x in targets)
    rows = torch.as_tensor(is_step, device=device)
    return Batch(*(x[rows] for x in (obs[:-1], actions, log_probs, values[:-1], advantages, returns)))


def record_episodes(episodes: Episodes, rewards: np.ndarray, dones: np.ndarray, is_step: np.ndarray) -> None:
    """Add the rewards (T, N) to the episodes under way; note the return and length of those that end, on all ranks."""
    returns = episodes.running_return + rewards.cumsum(axis=0)
    lengths = episodes.running_length + is_step.cumsum(axis=0)
    ended = []
    for t, n in np.argwhere(dones):
        ended.append((int(t), float(returns[t, n]), int(lengths[t, n])))
        returns[t:, n] -= returns[t, n]
        lengths[t:, n] -= lengths[t, n]
    episodes.running_return, episodes.running_length = returns[-1], lengths[-1]
    for _, episodic_return, length in sorted(itertools.chain(*all_gather(ended)), key=lambda episode: episode[0]):
        episodes.recent_returns.append(episodic_return)
        episodes.recent_lengths.append(length)
        episodes.count += 1


def normalize_rewards(
    episodes: Episodes, rewards: np.ndarray, is_step: np.ndarray, gamma: float, statistics: RunningStatistics
) -> np.ndarray:
    """Divide the rewards (T, N) by the running standard deviation of S_t = γ S_{t−1} + r_t, begun anew each episode."""
    discounted_sums = np.empty_like(rewards)
    for t in range(len(rewards)):
        # On a row that is no step of an episode, the sum begins anew.
        episodes.discounted_sum = gamma * episodes.discounted_sum * is_step[t] + rewards[t]
        discounted_sums[t] = episodes.discounted_sum
    statistics.update(torch.as_tensor(discounted_sums[is_step], dtype=torch.float32, device=statistics.mean.device))
    return rewards / math.sqrt(statistics.var.item() + 1e-8)


# ------------------------------------------------------- update -------------------------------------------------------


def check_update_args(args: Args) -> None:
    """Raise ArgumentError if a rollout cannot be split into the minibatches asked for."""
    batch_size = args.num_envs * args.num_steps
    at_most = max(args.num_envs * (args.num_steps // 2) // 2, 1)  # 2 steps in each, if every other row only resets
    if batch_size % args.num_minibatches or args.num_minibatches > at_most:
        expected = f"a divisor of num_envs * num_steps = {batch_size}, at most {at_most}"
        raise ArgumentError(f"--num-minibatches: expected {expected}, got {args.num_minibatches}")


def make_optimizers(agent: Agent, args: Args) -> dict[str, Adam]:
    policy = [parameter for name, parameter in agent.named_parameters() if not name.startswith("critic.")]
    return {
        "policy": Adam(policy, args.learning_rate),
        "critic": Adam(agent.critic.parameters(), args.value_learning_rate),
    }


def update(agent: Agent, optimizers: dict[str, Adam], batch: Batch, args: Args) -> dict[str, float]:
    """Take the step of VPG on one rollout, then fit the critic to its returns; return the metrics."""
    advantages = standardized(batch.advantages)[0] if args.norm_adv else batch.advantages
    policy = agent.policy(batch.obs)
    policy_loss = -policy.log_prob(batch.actions) * advantages
    optimizers["policy"].minimize(policy_loss.mean(), len(policy_loss))  # along −∇J, Theorem 1
    value_loss = fit_critic(agent, optimizers["critic"], batch, args)  # eq. 28, with Â + V as target

    with torch.no_grad():
        log_ratio = agent.policy(batch.obs).log_prob(batch.actions) - batch.log_probs
    k3 = log_ratio.exp() - 1 - log_ratio  # of joschu.net/blog/kl-approx.html
    policy_loss, entropy, approx_kl = mean_over_ranks(policy_loss, policy.entropy(), k3).tolist()
    return {
        "policy_loss": policy_loss,
        "value_loss": value_loss,
        "entropy": entropy,
        "approx_kl": approx_kl,
        "explained_variance": explained_variance(batch),
    }


def fit_critic(agent: Agent, optimizer: Adam, batch: Batch, args: Args) -> float:
    """Fit V to the returns in passes of shuffled minibatches; return the mean loss, ½ (V − R̂)², of the last pass."""
    for _ in range(args.value_epochs):
        losses = []
        for minibatch in shuffled(batch, args.num_minibatches):
            value_loss = 0.5 * nn.functional.mse_loss(agent.value(minibatch.obs), minibatch.returns)
            optimizer.minimize(value_loss, len(minibatch.obs))
            losses.append(value_loss.detach())
    value_loss = torch.stack(losses).mean(dim=0, keepdim=True)
    average_over_ranks(value_loss, len(batch.obs))
    return value_loss.item()


def standardized(*xs: Tensor) -> list[Tensor]:
    """Each x, of shape (B,), less its mean and over its standard deviation, which are those of all ranks' rows."""
    std, mean = zip(*[torch.std_mean(x, correction=0) for x in xs])
    if world_size() > 1:  # only then, as a root squared is rounded
        var, mean, _ = pooled_moments(torch.stack(std).square(), torch.stack(mean), [len(x) for x in xs])
        std = var.sqrt()
    return [(x - m) / (s + 1e-8) for x, m, s in zip(xs, mean, std)]


def explained_variance(batch: Batch) -> float:
    """1 − Var(R̂ − V) / Var(R̂): 1 for a perfect critic, 0 for a constant one; NaN or −inf where all R̂ are equal."""
    residuals, returns = batch.returns - batch.values, batch.returns
    var = torch.stack([residuals.var(correction=0), returns.var(correction=0)])
    var, _, _ = pooled_moments(var, torch.stack([residuals.mean(), returns.mean()]), len(returns))
    return (1 - var[0] / var[1]).item()


# ------------------------------------------------------- ranks -------------------------------------------------------
#
# torchrun starts several processes, the ranks. Each steps environments of its own, and all train one agent, as one
# process with all the environments would. With these functions they communicate: every rank must call them, and all in
# the same order. Without torchrun there is one rank, and no communication.


@contextlib.contextmanager
def process_group() -> Iterator[None]:
    """Join the process group of all ranks, if torchrun has started this process."""
    if dist.is_initialized() or not dist.is_torchelastic_launched():
        yield
        return
    store, own_rank, size = next(dist.rendezvous("env://"))
    store = store_of_this_start(store, own_rank, size)
    dist.init_process_group(store=store, rank=own_rank, world_size=size)  # gloo on CPUs, nccl on GPUs
    yield
    dist.destroy_process_group()  # not after an error: it might wait for a rank that has gone


def store_of_this_start(store: dist.Store, own_rank: int, size: int) -> dist.Store:
    """The part of torchrun's store for this start alone; after a restart the store still has the ranks' old addresses.

    Its name is a random token. Each rank stores a new one; rank 0 publishes all it finds, again and again. A rank that
    finds its own among them knows that the list is of this start, and takes the first, which is rank 0's. (torchrun's
    count of restarts would not do, as each machine counts for itself.)
    """
    token = os.urandom(8).hex()
    store.set(f"token {own_rank}", token)
    if own_rank == 0:
        while store.add(token, 0) < size - 1:
            store.set("tokens", " ".join(store.get(f"token {r}").decode() for r in range(size)))
            time.sleep(0.01)
    else:
        tokens = []
        while token not in tokens:
            time.sleep(0.01)
            tokens = store.get("tokens").decode().split()
        token = tokens[0]
        store.add(token, 1)
    return dist.PrefixStore(token, store)


def world_size() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def collective(operation: Callable[..., Any], *args: Any) -> None:
    """Call one of torch.distributed's collectives. Raises LostRank if another rank has stopped."""
    try:
        operation(*args)
    except RuntimeError as error:
        said = re.sub(r"^\[\S+\] ", "", str(error).split("\n")[0]).split(". ")[0]  # without the place in gloo's source
        if not re.search("connect|timed out|timeout|pipe", said, re.IGNORECASE):
            raise
        raise LostRank(f"another rank has stopped: {said}") from None


def broadcast(x: Any) -> Any:
    """Rank 0's x, on every rank."""
    xs = [x]
    if world_size() > 1:
        collective(dist.broadcast_object_list, xs)
    return xs[0]


def all_gather(x: Any) -> list[Any]:
    """Every rank's x, on every rank."""
    xs = [x] * world_size()
    if world_size() > 1:
        collective(dist.all_gather_object, xs, x)
    return xs


@contextlib.contextmanager
def raising_on_all_ranks() -> Iterator[None]:
    """Raise on all ranks the ArgumentError, or SystemExit of --help, that is raised herein on one."""
    raised = None
    try:
        yield
    except (ArgumentError, SystemExit) as error:
        raised = error
    for error in all_gather(raised):
        if error is not None:
            raise error


def sum_over_ranks(x: Tensor) -> Tensor:
    """Add up a tensor over all ranks, in place, and return it."""
    if world_size() > 1 and x.is_cuda:
        collective(dist.all_reduce, x)
    elif world_size() > 1:
        # For messages this small latency counts, not bandwidth: gloo's all_reduce takes many rounds, this takes one.
        xs = x.new_empty(world_size(), *x.shape)
        collective(exchange, xs, x.expand_as(xs).contiguous())
        torch.sum(xs, dim=0, out=x)
    return x


def exchange(outputs: Tensor, inputs: Tensor) -> None:
    """all_to_all_single, awake while it waits: a core that goes to sleep is slow to wake, a virtual one above all."""
    work = dist.all_to_all_single(outputs, inputs, async_op=True)
    while hasattr(os, "sched_yield") and not work.is_completed():
        os.sched_yield()
    work.wait()


def average_over_ranks(vector: Tensor, num_samples: int) -> None:
    """Replace a vector, the mean over this rank's num_samples, by the mean over the samples of all ranks, in place."""
    if world_size() > 1:
        message = torch.cat([vector * num_samples, vector.new_tensor([num_samples])])
        sum_over_ranks(message)
        torch.div(message[:-1], message[-1], out=vector)


def mean_over_ranks(*xs: Tensor) -> Tensor:
    """The mean of each x, of shape (B,), over the samples of all ranks."""
    vector = torch.stack([x.detach().mean() for x in xs])
    average_over_ranks(vector, len(xs[0]))
    return vector


def pooled_moments(var: Tensor, mean: Tensor, num_rows: Any) -> tuple[Tensor, Tensor, Any]:
    """The variance (correction 0), mean and number of all ranks' rows, given those of this rank's."""
    if world_size() > 1:
        dtype, mean = mean.dtype, mean.double()  # in float64 the difference of squares below has digits to spare
        n = torch.as_tensor(num_rows, dtype=torch.float64, device=mean.device)
        sums = [n, n * mean, n * (var + mean.square())]
        message = sum_over_ranks(torch.cat([x.flatten() for x in sums]))
        n, total, squares = (x.view_as(y) for x, y in zip(message.split([y.numel() for y in sums]), sums))
        mean = total / n
        var = (squares / n - mean.square()).clamp(min=0)
        var, mean, num_rows = var.to(dtype), mean.to(dtype), n.long()
    return var, mean, num_rows


# -------------------------------------------------------- train -------------------------------------------------------


@dataclasses.dataclass
class Progress:
    """How far a run has come."""

    iteration: int = 0  # rollouts and updates so far; each has a row in metrics.csv
    global_step: int = 0  # steps of the environments
    wall_time: float = 0.0  # seconds
    metrics_size: int = 0  # bytes of metrics.csv at the last checkpoint


@process_group()
def train(args: Args) -> list[dict[str, Any]]:
    """Train an agent, write the run's folder, and return the rows of its metrics.csv.

    train(saved_args("runs/NAME")) goes on with a run that was stopped. Under torchrun all ranks must call it;
    rank 0's args hold for all, and it alone writes and prints. Seeds torch's global generator and limits torch to one
    thread. Raises ArgumentError, before anything is written, for an argument that cannot be used, and RunError for what
    stops the run.
    """
    args, checkpoint, run_dir = broadcast(begin(args))  # rank 0's
    if checkpoint and checkpoint["progress"]["global_step"] >= args.total_timesteps:
        if rank() == 0:
            print(f"{run_dir} is complete, with {checkpoint['progress']['global_step']:,} steps")
        return broadcast(read_rows(run_dir) if rank() == 0 else None)
    torch.set_num_threads(1)  # networks this small lose more to a second thread than they gain
    torch.manual_seed(args.seed)
    with contextlib.ExitStack() as stack:
        with raising_on_all_ranks():
            device = find_device(args.device)
            envs = stack.enter_context(closing(make_envs(args)))
        agent = Agent(envs.single_observation_space, envs.single_action_space, args.norm_obs)
        agent.load_state_dict(broadcast(agent.state_dict()))  # equal seeds need not give equal bits on unlike machines
        optimizers = make_optimizers(agent.to(device), args)
        with raising_on_all_ranks():
            if checkpoint:
                episodes, progress = restore(checkpoint, envs, agent, optimizers)
            else:
                episodes, progress = Episodes(envs, args.seed), Progress()
                run_dir = make_run_dir(args) if rank() == 0 else None
        run_dir = broadcast(run_dir)
        stack.enter_context(saying_what_is_left(progress, run_dir))
        if rank() == 0:
            save_config(run_dir, args)
            log = stack.enter_context(contextlib.closing(Log(run_dir, args, progress)))
        save_checkpoint(run_dir, args, agent, optimizers, episodes, progress)
        start = time.perf_counter() - progress.wall_time

        while progress.global_step < args.total_timesteps:
            share_done = progress.global_step / args.total_timesteps
            learning_rate = set_learning_rate(optimizers, 1 - share_done if args.anneal_lr else 1.0)
            episodes.prepare(progress.iteration)
            batch = rollout(envs, agent, episodes, args)
            metrics = update(agent, optimizers, batch, args)
            if args.norm_obs:  # not before: π_θ and π_old must see the same observations
                agent.obs_statistics.update(batch.obs)
            check_finite(**agent.state_dict())

            due_before = progress.global_step * args.checkpoints // args.total_timesteps
            progress.iteration += 1
            progress.global_step += int(sum_over_ranks(torch.tensor(len(batch.obs), device=device)))
            progress.wall_time = time.perf_counter() - start
            returns, lengths = episodes.recent_returns, episodes.recent_lengths
            row = {
                "global_step": progress.global_step,
                "wall_time": round(progress.wall_time, 3),
                "episodes": episodes.count,
                "episodic_return": sum(returns) / len(returns) if returns else None,
                "episodic_length": sum(lengths) / len(lengths) if lengths else None,
                "SPS": int(progress.global_step / progress.wall_time),
                **metrics,
                "learning_rate": learning_rate,
            }
            if rank() == 0:
                log.write(row)
            if progress.global_step * args.checkpoints // args.total_timesteps > due_before:
                progress.metrics_size = log.sync() if rank() == 0 else 0
                save_checkpoint(run_dir, args, agent, optimizers, episodes, progress)

    if rank() == 0 and not args.quiet:
        returns = episodes.recent_returns
        outcome = f"return {np.mean(returns):.1f}, mean of {len(returns)} episodes" if returns else "no episode ended"
        print(f"{args.env}: {outcome}; {progress.global_step:,} steps in {progress.wall_time:.1f} s; {run_dir}")
    return broadcast(read_rows(run_dir) if rank() == 0 else None)


def begin(args: Args) -> tuple[Args, dict[str, Any] | None, Path]:
    """Check the arguments and load the checkpoint to go on from, if any; on rank 0, for all.

    Return the run's own arguments, the checkpoint, and the folder to resume. Raises ArgumentError.
    """
    checkpoint, run_dir = None, Path(args.resume or "")
    with raising_on_all_ranks():
        if rank() == 0:
            check_args(args)
            if args.device == "auto":
                args = dataclasses.replace(args, device="cuda" if torch.cuda.is_available() else "cpu")
            if args.resume is not None:
                checkpoint = load_checkpoint(args.resume)
                args = resumed_args(args, checkpoint)
    return args, checkpoint, run_dir


def find_device(name: str) -> torch.device:
    try:
        device = torch.device(name)
        if world_size() > 1 and device.type == "cuda":
            if device.index is not None:
                raise RuntimeError("ranks cannot share a GPU; cuda, without a number, gives each its own")
            device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
            torch.cuda.set_device(device)
        torch.zeros(1, device=device).cpu()
        return device
    except (RuntimeError, AssertionError, ImportError, TypeError) as error:  # torch raises all of these
        said = str(error).split("\n")[0]
        raise ArgumentError(f"--device: expected one that torch finds here, got {name!r}: {said}") from error


@contextlib.contextmanager
def closing(envs: VectorEnv) -> Iterator[VectorEnv]:
    """Close the environments at the end; after an error kill their processes, which may not answer any more."""
    try:
        yield envs
    except BaseException:
        for process in getattr(envs.unwrapped, "processes", []):
            process.kill()
            process.join()
            envs.unwrapped.closed = True
        raise
    finally:
        with contextlib.suppress(Exception):  # all is saved
            envs.close()


@contextlib.contextmanager
def saying_what_is_left(progress: Progress, run_dir: Path) -> Iterator[None]:
    """Add to the error that stops a run its iteration, the last good checkpoint and how to go on."""
    try:
        yield
    except (KeyboardInterrupt, RunError, OSError, MemoryError) as error:
        said = f"iteration {progress.iteration + 1}: {error if str(error) else type(error).__name__}"
        if (run_dir / "checkpoint.pt").exists():
            said += f"; the last good checkpoint is {run_dir / 'checkpoint.pt'}"
            if error.__cause__ or type(error) is not RunError:  # NaN or infinity would come again
                launcher = "python" if world_size() == 1 else "torchrun …"
                said += f"; to go on: {launcher} {Path(__file__).name} --resume {run_dir}"
        kind = type(error) if isinstance(error, (KeyboardInterrupt, RunError)) else RunError
        raise kind(said) from error.__cause__


def make_run_dir(args: Args) -> Path:
    name = f"{args.env}__{Path(__file__).stem}__{args.seed}__{datetime.now():%Y%m%d-%H%M%S-%f}"
    run_dir = Path(args.run_dir or f"runs/{name.replace('/', '-').replace(':', '-')}")
    try:
        run_dir.mkdir(parents=True, exist_ok=bool(args.run_dir))
    except OSError as error:
        raise ArgumentError(f"--run-dir: expected a folder that can be made, got {str(run_dir)!r}: {error}") from error
    return run_dir


def save_config(run_dir: Path, args: Args) -> None:
    """Write config.json: the arguments, how many ranks have them, and the versions of what they run on."""
    versions = {
        "python": platform.python_version(),
        "numpy": np.__version__,
        "torch": torch.__version__,
        "gymnasium": gymnasium.__version__,
        "gae_fast": gae_fast.__version__,
        "gae_fast_compiled": gae_fast.COMPILED,
    }
    config = {"algorithm": Path(__file__).stem, **dataclasses.asdict(args), "world_size": world_size(), **versions}
    write_whole(run_dir / "config.json", (json.dumps(config, indent=2) + "\n").encode())


def write_whole(path: Path, content: bytes) -> None:
    """Write a file whole or not at all, even if the machine stops meanwhile."""
    new = path.with_name(f"{path.name}.new")
    try:
        with open(new, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(new, path)
    finally:
        new.unlink(missing_ok=True)


def set_learning_rate(optimizers: dict[str, Adam], fraction: float) -> float:
    """Set each optimizer's learning rate to a fraction of its initial one; return the first optimizer's."""
    for optimizer in optimizers.values():
        optimizer.learning_rate = fraction * optimizer.initial_learning_rate
    return next(iter(optimizers.values())).learning_rate


class Log:
    """Where rows go: metrics.csv, the progress bar and, if asked for, TensorBoard."""

    def __init__(self, run_dir: Path, args: Args, progress: Progress) -> None:
        self.file = open(run_dir / "metrics.csv", "a", newline="", buffering=1)  # a line is written when it is complete
        self.file.truncate(progress.metrics_size)  # of a run that is resumed: drop the rows after its checkpoint
        self.file.seek(0, os.SEEK_END)
        self.writer = csv.writer(self.file)
        steps = {"total": args.total_timesteps, "initial": progress.global_step}
        self.bar = tqdm.tqdm(**steps, unit="step", disable=args.quiet)
        self.tensorboard = None
        if args.tensorboard:
            from torch.utils.tensorboard import SummaryWriter  # here, as few runs need it and it is slow to import

            self.tensorboard = SummaryWriter(run_dir, purge_step=progress.global_step + 1)

    def write(self, row: dict[str, Any]) -> None:
        if self.file.tell() == 0:
            self.writer.writerow(row.keys())
        self.writer.writerow(row.values())
        if row["episodic_return"] is not None:
            self.bar.set_postfix_str(f"return {row['episodic_return']:.1f}", refresh=False)
        self.bar.update(min(row["global_step"], self.bar.total) - self.bar.n)
        if self.tensorboard:
            charts = ("episodes", "episodic_return", "episodic_length", "SPS", "learning_rate")  # as in CleanRL
            for name in row.keys() - {"global_step", "wall_time"}:
                if row[name] is not None:
                    tag = f"{'charts' if name in charts else 'losses'}/{name}"
                    self.tensorboard.add_scalar(tag, row[name], row["global_step"])

    def sync(self) -> int:
        """Have the rows on the disk, and return their size."""
        os.fsync(self.file.fileno())
        return self.file.tell()

    def close(self) -> None:
        self.file.close()
        self.bar.close()
        if self.tensorboard:
            self.tensorboard.close()


def read_rows(run_dir: Path) -> list[dict[str, Any]]:
    """The rows of metrics.csv, with None for an empty cell."""

    def number(cell: str) -> float | int | None:
        return None if cell == "" else int(cell) if cell.isdigit() else float(cell)

    with open(run_dir / "metrics.csv", newline="") as file:
        return [{name: number(cell) for name, cell in row.items()} for row in csv.DictReader(file)]


def save_checkpoint(
    run_dir: Path, args: Args, agent: Agent, optimizers: dict[str, Adam], episodes: Episodes, progress: Progress
) -> None:
    """Write checkpoint.pt, whole or not at all, for torch.load(..., weights_only=True).

    It needs no state of a generator, as Episodes.prepare seeds them all. Raises RunError for a number not finite.
    """
    states = [episodes.state()] * world_size()
    if world_size() > 1:
        collective(dist.gather_object, states[0], states if rank() == 0 else None)
    if rank() > 0:
        return
    checkpoint = {
        "algorithm": Path(__file__).stem,
        "args": dataclasses.asdict(args),
        "progress": dataclasses.asdict(progress),
        "world_size": world_size(),
        "episodes": states,
        "agent": agent.state_dict(),
        "optimizers": {name: optimizer.state for name, optimizer in optimizers.items()},
    }
    for tensors in (checkpoint["agent"], *checkpoint["optimizers"].values()):
        check_finite(**tensors)
    file = io.BytesIO()
    torch.save(checkpoint, file)
    write_whole(run_dir / "checkpoint.pt", file.getvalue())


def load_checkpoint(folder: str) -> dict[str, Any]:
    """Read the checkpoint of the run in a folder; nothing in it is executed.

    Raises ArgumentError if it is damaged, of another run than config.json is, or ahead of metrics.csv.
    """
    path, algorithm = Path(folder, "checkpoint.pt"), Path(__file__).stem
    try:
        with zipfile.ZipFile(path) as file:
            if damaged := file.testzip():  # torch.load does not compare checksums
                raise ValueError(f"{damaged} in it is damaged")
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
        config = json.loads(Path(folder, "config.json").read_bytes())
        check_args(Args(**checkpoint["args"] | {"resume": folder}))
        for name, value in {**checkpoint["args"], "algorithm": checkpoint["algorithm"]}.items():
            if config[name] != value and name != "total_timesteps":  # which a resumed run may have made larger
                raise ValueError(f"its config.json has {name} {config[name]!r}, its checkpoint.pt {value!r}")
        if "world_size" not in checkpoint:
            raise ValueError("it is of an earlier version")
        if checkpoint["algorithm"] != algorithm:
            raise ValueError(f"it is one of {checkpoint['algorithm']}")
        if Path(folder, "metrics.csv").stat().st_size < Progress(**checkpoint["progress"]).metrics_size:
            raise ValueError("its metrics.csv lacks rows")
        check_finite(**checkpoint["agent"])
        return checkpoint
    except Exception as error:  # of many kinds and, where torch raises them, of many sentences
        said = " ".join(str(error).split(". ")[0].split()) or type(error).__name__
        raise ArgumentError(f"--resume: expected a run of {algorithm}, got {folder!r}: {said}") from error


def saved_args(folder: str) -> Args:
    """The arguments with which to go on with the run in a folder. Raises ArgumentError if that cannot be done."""
    return Args(**load_checkpoint(folder)["args"] | {"resume": folder})


def resumed_args(args: Args, checkpoint: dict[str, Any]) -> Args:
    """The arguments of the checkpoint's run, with more steps if args say so. Raises ArgumentError for other changes."""
    saved = Args(**checkpoint["args"])
    if checkpoint["world_size"] != world_size():
        expected = f"as many ranks as the run has, {checkpoint['world_size']}"
        raise ArgumentError(f"--resume: expected {expected}, got {world_size()}")
    for name, old in dataclasses.asdict(saved).items():
        new = getattr(args, name)
        # A longer run begins as this one did, unless the learning rate is annealed over its length.
        is_longer = name == "total_timesteps" and new > old and not saved.anneal_lr
        if name != "resume" and new != old and not is_longer:
            expected = f"none or {old!r}, as in the run of --resume"
            raise ArgumentError(f"--{name.replace('_', '-')}: expected {expected}, got {new!r}")
    return dataclasses.replace(saved, total_timesteps=args.total_timesteps)


def restore(
    checkpoint: dict[str, Any], envs: VectorEnv, agent: Agent, optimizers: dict[str, Adam]
) -> tuple[Episodes, Progress]:
    """Put back what save_checkpoint saved. Raises ArgumentError if it does not fit."""
    try:
        agent.load_state_dict(checkpoint["agent"])
        for name, optimizer in optimizers.items():
            for key, tensor in optimizer.state.items():
                tensor.copy_(checkpoint["optimizers"][name][key].view_as(tensor))  # view_as refuses another size
        episodes = Episodes(envs, checkpoint["args"]["seed"], checkpoint["episodes"][rank()])
    except RunError:
        raise
    except (AttributeError, KeyError, RuntimeError, TypeError, ValueError) as error:
        said = " ".join(str(error).split())
        raise ArgumentError(f"--resume: expected a checkpoint that fits the run, got another: {said}") from error
    return episodes, Progress(**checkpoint["progress"])


def command_line() -> Args:
    """The arguments of the command line, with those of the run that it resumes as defaults. Raises ArgumentError."""
    args = parse_args(Args())
    if args.resume is None:
        return args
    if args.resume == args.run_dir and not Path(args.resume, "checkpoint.pt").exists():
        print(f"--resume: there is no checkpoint in {args.resume} yet, so the run begins", file=sys.stderr)
        return dataclasses.replace(args, resume=None)
    return parse_args(saved_args(args.resume))  # so that an argument given here can be told from one left out


if __name__ == "__main__":
    with process_group():
        program = Path(__file__).name
        try:
            with raising_on_all_ranks():
                args = command_line() if rank() == 0 else Args()  # train takes rank 0's
            train(args)
        except KeyboardInterrupt as interrupt:
            if rank() == 0:
                print(f"{program}: {str(interrupt) or 'interrupted'}", file=sys.stderr)
            sys.exit(130)
        except ArgumentError as error:
            if rank() == 0:
                print(f"{program}: {error}", file=sys.stderr)
            with contextlib.suppress(LostRank):
                broadcast(None)  # waits until rank 0 has printed, as torchrun stops all ranks when one ends
            sys.exit(1)
        except RunError as error:
            if error.__cause__:
                traceback.print_exception(error.__cause__)  # the environment's own
            if rank() == 0 or not isinstance(error, LostRank):  # of those that lost another, rank 0 speaks for all
                speaker = program if world_size() == 1 else f"{program}: rank {rank()}"
                print(f"{speaker}: {error}", file=sys.stderr)
            sys.exit(1)
