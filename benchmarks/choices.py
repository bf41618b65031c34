"""What each piece of code kept for speed brings, and what each piece left out would bring.

    python benchmarks/choices.py
    python benchmarks/choices.py --rounds 3 --only NumPy

A gain is in per cent of the steps per second of ppo_clip.py on CartPole-v1: 4 environments × 128
steps, 4 minibatches, 4 epochs. For code that is kept, it is the gain of the script over the plain
way. For code that is left out, it is the gain that this code would bring. The rule is that such
code must bring one per cent for each of its lines. The last two rows are trpo.py's, on CartPole-v1:
8 environments × 256 steps, 16 minibatches, 10 epochs, 15 iterations of conjugate gradients. They
are the gains of the whole, and of update alone.

The script as it is and with parts of it replaced take turns, each a short run of train, in one
process. A gain is the median of the rounds' ratios, with the least and the greatest. Seconds are
the processor's, so that other programs disturb less. Fifteen rounds take eight minutes.
"""

import argparse
import inspect
import math
import statistics
import sys
import tempfile
import time
from collections import deque
from types import ModuleType
from typing import Any, NamedTuple
from unittest import mock

import torch
from common import ROOT, table
from gymnasium.wrappers.vector import FlattenObservation, NormalizeReward
from torch import nn
from torch.distributions import Categorical, Distribution
from torch.optim import Adam

sys.path.insert(0, str(ROOT))
import ppo_clip
import trpo

make_envs = ppo_clip.make_envs


class TorchPolicy(ppo_clip.Policy):
    def sampler(self, rng):
        return lambda obs: (self(torch.as_tensor(obs)).sample().numpy(),)


class NormalizeRecordedReward(NormalizeReward):
    return_queue = property(lambda self: self.env.return_queue)
    length_queue = property(lambda self: self.env.length_queue)
    episode_count = property(lambda self: self.env.episode_count)


def envs_with_normalized_rewards(*args):
    return NormalizeRecordedReward(make_envs(*args), gamma=0.99)


def envs_flattened_twice(*args):
    envs = make_envs(*args)
    envs.env = FlattenObservation(envs.env)
    return envs


def no_statistics(envs, *_, **__):
    envs.return_queue, envs.length_queue, envs.episode_count = deque(), deque(), 0
    return envs


def plain_adam(agent, args):
    return Adam(agent.parameters(), args.learning_rate, eps=1e-5)


def as_one_vector(parameters):
    parameters = list(parameters)
    vector = nn.utils.parameters_to_vector(parameters).detach()
    vector.grad = torch.zeros_like(vector)
    nn.utils.vector_to_parameters(vector, parameters)
    for parameter, grad in zip(parameters, vector.grad.split([x.numel() for x in parameters])):
        parameter.grad = grad.view_as(parameter)
    return vector


def adam_of_one_vector(agent, args):
    """Adam on one vector, which is all that update then sees as parameters and as gradients."""
    vector = as_one_vector(agent.parameters())
    agent.parameters = lambda: [vector]
    optimizer = Adam([vector], args.learning_rate, eps=1e-5, fused=True)
    optimizer.zero_grad = vector.grad.zero_
    return optimizer


class LeanCategorical(Distribution):
    def __init__(self, logits, validate_args):
        super().__init__(logits.shape[:-1], validate_args=False)
        self.logits = logits.log_softmax(dim=-1)

    def sample(self):
        return (self.logits - torch.empty_like(self.logits).exponential_().log()).argmax(dim=-1)

    def log_prob(self, actions):
        return self.logits.gather(-1, actions.unsqueeze(-1)).squeeze(-1)

    def entropy(self):
        return -(self.logits.exp() * self.logits).sum(dim=-1)


def product_of_coordinates(policy, obs, damping):
    """The product v ↦ (H + damping I) v, where H = E_t[DᵀD] and D = ∂y/∂θ. Appendix C.1."""
    parameters = list(policy.parameters())
    y = fisher_coordinates(policy(obs))
    u = torch.zeros_like(y, requires_grad=True)  # any value will do: Dᵀu is linear in u
    transposed_product = trpo.flat_gradient((u * y).sum(), parameters, create_graph=True)  # Dᵀu

    def product(vector):
        (jacobian_vector,) = torch.autograd.grad(transposed_product @ vector, u, retain_graph=True)
        weighted_mean = (jacobian_vector * y).sum() / len(y)  # its gradient is E_t[Dᵀ(D v)]
        fisher_vector = trpo.flat_gradient(weighted_mean, parameters, retain_graph=True)
        return trpo.mean_over_ranks(fisher_vector) + damping * vector

    return product


def fisher_coordinates(policy):
    """Coordinates y of the policy, in which KL(π ‖ π + dπ) is ½ |dy|² to second order."""
    if isinstance(policy, Categorical):  # |dy|² = Σ_a p_a (d log p_a)²
        return (0.5 * policy.logits).exp().detach() * policy.logits
    normal = policy.base_dist  # |dy|² = Σ (dμ / σ)² + 2 (d log σ)²
    scaled = (normal.loc / normal.scale.detach(), math.sqrt(2) * normal.scale.log())
    return torch.stack(scaled, dim=1)


def lines_of(*functions: Any) -> int:
    return sum(bool(x.strip()) for f in functions for x in inspect.getsource(f).splitlines())


class Choice(NamedTuple):
    name: str
    kept: bool
    lines: int  # of the faster text that the plain one would do without
    replaced: dict[str, Any]  # parts of the script
    options: dict[str, Any] = {}  # of the script as it is
    script: ModuleType = ppo_clip


ACTOR = lines_of(ppo_clip.Policy.sampler) + 1  # and its generator
PRODUCT = lines_of(product_of_coordinates, fisher_coordinates) - lines_of(
    trpo.fisher_vector_product
)
CHOICES = [
    Choice("acting in NumPy", True, ACTOR, {"Policy": TorchPolicy}),
    Choice(
        "rewards normalised once a rollout, not by NormalizeReward",
        True,
        6,  # five in rollouts, one in Agent
        {"make_envs": envs_with_normalized_rewards},
        {"norm_reward": True},
    ),
    Choice("Adam fused", True, 0, {"make_optimizer": plain_adam}),
    Choice("FlattenObservation only where needed", True, 1, {"make_envs": envs_flattened_twice}),
    Choice(
        "parameters and gradients as views of one vector",
        False,
        lines_of(as_one_vector) + 2,  # and two in update
        {"make_optimizer": adam_of_one_vector},
    ),
    Choice(
        "own records of episodes, if they took no time",
        False,
        15,
        {"RecordEpisodeStatistics": no_statistics},
    ),
    Choice("own Categorical", False, lines_of(LeanCategorical), {"Categorical": LeanCategorical}),
    Choice(
        "TRPO: Fisher products by coordinates, not by the KL's derivatives",
        False,
        PRODUCT,
        {"fisher_vector_product": product_of_coordinates},
        script=trpo,
    ),
]
SIZES = {
    ppo_clip: {
        "num_envs": 4,
        "num_steps": 128,
        "num_minibatches": 4,
        "update_epochs": 4,
        "target_kl": None,
    },
    trpo: {"num_envs": 8, "num_steps": 256, "num_minibatches": 16, "cg_iters": 15},
}
for sizes in SIZES.values():
    sizes |= {"norm_obs": False, "norm_reward": False}


def speeds(script: ModuleType, options: dict[str, Any], seed: int) -> list[float]:
    """Steps per second of a short run of train but for its first iteration, and of update alone."""
    starts, ends = [], []

    def noted_update(*args, update=script.update):
        starts.append(time.process_time())
        metrics = update(*args)
        ends.append(time.process_time())
        return metrics

    with tempfile.TemporaryDirectory() as folder, mock.patch.object(script, "update", noted_update):
        own = {"run_dir": f"{folder}/run", "quiet": True, "total_timesteps": 20_000, "gamma": 0.99}
        rows = script.train(script.Args(seed=seed, **(own | SIZES[script] | options)))
    steps = rows[-1]["global_step"] - rows[0]["global_step"]
    return [steps / (ends[-1] - ends[0]), steps / (sum(ends[1:]) - sum(starts[1:]))]


def compare(choice: Choice, rounds: int) -> list[list[str]]:
    """The rows of the table for a choice."""
    rows, ratios = [], []
    for seed in range(rounds + 1):
        for turn in (seed, seed + 1):  # who begins changes
            if turn % 2:
                as_it_is = speeds(choice.script, choice.options, seed)
            else:
                with mock.patch.multiple(choice.script, **choice.replaced):
                    replaced = speeds(choice.script, {}, seed)
        fast, slow = (as_it_is, replaced) if choice.kept else (replaced, as_it_is)
        ratios.append([100 * (x / y - 1) for x, y in zip(fast, slow)])
    whole, update = zip(*ratios[1:])  # the first round warms up
    for part, gains in {"": whole, ", update alone": update}.items():
        if part and choice.script is ppo_clip:
            continue
        gain = statistics.median(gains)
        per_line = f"{gain / choice.lines:.1f}" if choice.lines else "—"
        cells = [choice.name + part, "yes" if choice.kept else "no", f"{choice.lines}"]
        cells += [f"{gain:.1f} ({min(gains):.1f} to {max(gains):.1f})", per_line]
        rows.append(cells)
    return rows


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=15, help="how often each takes its turn")
    parser.add_argument("--only", default="", help="only choices whose name has this in it")
    arguments = parser.parse_args()

    chosen = [choice for choice in CHOICES if arguments.only in choice.name]
    rows = [row for choice in chosen for row in compare(choice, arguments.rounds)]
    print(table(["choice", "kept", "lines", "gain, %", "gain per line, %"], rows))
