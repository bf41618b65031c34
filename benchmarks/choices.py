"""What each choice that costs the scripts some text saves: the time with the plain way, divided by the time as it is.

    python benchmarks/choices.py --rounds 20

The plain ways: to act with torch, not NumPy; torch's own Categorical; torch.optim.Adam, fused, with
torch.nn.utils.clip_grad_norm_; in TRPO, Fisher products as derivatives of the gradient of the KL. Each takes turns with
the script as it is, on networks of its own; figures are medians over the rounds. HalfCheetah needs MuJoCo, and is left
out without it.
"""

import argparse
import copy
import statistics
import sys
import time
from pathlib import Path

import torch
from torch import nn
from torch.distributions import Categorical, kl_divergence

sys.path.insert(0, str(Path(__file__).parent.parent))
import ppo_clip
import trpo


def torchs_policy(agent, obs):
    return Categorical(logits=agent.actor(agent.standardize(obs)), validate_args=False)


def actor_in_torch(agent, rng):
    @torch.no_grad()
    def act(obs):
        return agent.policy(torch.as_tensor(obs)).sample().numpy()

    return act


class TorchsAdam:
    def __init__(self, parameters, learning_rate):
        self.parameters = list(parameters)
        self.optimizer = torch.optim.Adam(self.parameters, learning_rate, eps=1e-5, fused=True)

    def minimize(self, loss, num_samples, max_grad_norm):
        self.optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(self.parameters, max_grad_norm)
        self.optimizer.step()


def product_by_hessian(policy, parameters, damping):
    with torch.no_grad():
        old_policy = trpo.Categorical(policy.logits)
    kl_gradient = trpo.flat_gradient(kl_divergence(old_policy, policy).mean(), parameters, create_graph=True)
    return lambda vector: trpo.flat_gradient(kl_gradient @ vector, parameters, retain_graph=True) + damping * vector


class Contender:
    """A script's rollout and update, with some of its parts replaced."""

    def __init__(self, script, args, categorical=False, adam=False, **replaced):
        torch.manual_seed(1)
        self.script, self.args, self.replaced = script, args, replaced
        self.envs = script.make_envs(args)
        self.agent = script.Agent(self.envs.single_observation_space, self.envs.single_action_space, False)
        self.optimizers = script.make_optimizers(self.agent, args)
        if categorical:
            self.agent.policy = lambda obs: torchs_policy(self.agent, obs)
        if adam:
            self.agent = copy.deepcopy(self.agent)  # its parameters are no views of a vector
            self.optimizers = {"agent": TorchsAdam(self.agent.parameters(), args.learning_rate)}
        self.episodes = script.Episodes(self.envs, 1)

    def iterate(self):
        """One iteration; return the milliseconds that its rollout and its update took."""
        own = {name: getattr(self.script, name) for name in self.replaced}
        vars(self.script).update(self.replaced)
        start = time.perf_counter()
        batch = self.script.rollout(self.envs, self.agent, self.episodes, self.args)
        between = time.perf_counter()
        self.script.update(self.agent, self.optimizers, batch, self.args)
        end = time.perf_counter()
        vars(self.script).update(own)
        return 1e3 * (between - start), 1e3 * (end - between)


def compare(title, contenders, rounds):
    times = {name: [] for name in contenders}
    for turn in range(rounds + 2):
        for name, contender in contenders.items():
            outcome = contender.iterate()
            if turn >= 2:  # the first two warm up
                times[name].append((*outcome, sum(outcome)))
    base = [statistics.median(x) for x in zip(*times["as it is"])]
    print(f"| {title}: as it is | " + " | ".join(f"{x:.1f} ms" for x in base) + " |")
    for name in list(contenders)[1:]:
        ratios = [statistics.median(x) / y for x, y in zip(zip(*times[name]), base)]
        print(f"| {name} | " + " | ".join(f"{ratio:.2f}" for ratio in ratios) + " |", flush=True)


parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--rounds", type=int, default=20, help="how often each takes its turn")
rounds = parser.parse_args().rounds

torch.set_num_threads(1)
print("| | rollout | update | both |\n| --- | ---: | ---: | ---: |")
sizes = {"CartPole-v1": (4, 128, 4, 4), "HalfCheetah-v5": (1, 2048, 32, 10)}
for env, (num_envs, num_steps, num_minibatches, epochs) in sizes.items():
    args = ppo_clip.Args(env, 1, 1, num_envs, num_steps, num_minibatches=num_minibatches, update_epochs=epochs)
    plain = {
        "acts with torch": {"actor_in_numpy": actor_in_torch},
        "torch's Categorical": {"categorical": True},
        "torch.optim.Adam": {"adam": True},
    }
    if env == "HalfCheetah-v5":
        del plain["torch's Categorical"]  # its normal policy is made of torch's own distributions
    plain["all of these"] = {name: value for part in plain.values() for name, value in part.items()}
    try:
        contenders = {"as it is": Contender(ppo_clip, args)}
        contenders |= {name: Contender(ppo_clip, args, **parts) for name, parts in plain.items()}
    except ppo_clip.ArgumentError as error:
        print(f"left out: {error}", file=sys.stderr)
        continue
    compare(f"ppo_clip.py, {env}, {num_envs} × {num_steps}", contenders, rounds)
for args in (trpo.Args(num_envs=8, num_steps=256, num_minibatches=16, cg_iters=15), trpo.Args()):
    contenders = {
        "as it is": Contender(trpo, args),
        "products by the KL's Hessian": Contender(trpo, args, fisher_vector_product=product_by_hessian),
    }
    compare(f"trpo.py, CartPole-v1, {args.num_envs} × {args.num_steps}", contenders, rounds)
