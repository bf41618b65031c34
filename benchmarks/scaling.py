"""Draw how ppo_clip.py's steps per second grow with num_envs and with the minibatch, and where the
time goes.

    python benchmarks/scaling.py --out scaling.png

CartPole-v1, one torch thread. Over num_envs: rollouts of 4,096 steps, or of 32 for each environment
if that is more, four epochs, minibatches of 512, with Gymnasium's native vector environment and
with its sync one. Over the minibatch: 32 environments × 128 steps, native, four epochs. Shares: the
environment's steps, acting, the rest of a rollout (old log-probabilities, values, advantages), and
the update. At the end, what the two networks' forward and backward passes alone
would allow, in one batch of 4,096 steps.
"""

import argparse
import statistics
import sys
import time

import matplotlib
import torch

matplotlib.use("Agg")
from common import ROOT, table
from gymnasium.vector import VectorEnv
from matplotlib import pyplot
from torch.optim import Adam
from torch.utils._python_dispatch import TorchDispatchMode

sys.path.insert(0, str(ROOT))
import ppo_clip

PARTS = ("environment", "acting", "values and advantages", "update")
EPOCHS = 4


def parts_of(args: ppo_clip.Args) -> tuple[VectorEnv, ppo_clip.Agent, Adam]:
    torch.manual_seed(1)
    envs = ppo_clip.make_envs(args.env, args.num_envs, args.vectorization_mode)
    agent = ppo_clip.Agent(envs, args.norm_obs)
    return envs, agent, ppo_clip.make_optimizer(agent, args)


def measure(args: ppo_clip.Args, seconds: float) -> list[float]:
    """Steps per second, and each of PARTS's seconds of an iteration: medians over iterations."""
    envs, agent, optimizer = parts_of(args)
    stretch = ppo_clip.rollouts(envs, agent, args, 0)
    spent = dict.fromkeys(("environment", "acting"), 0.0)

    def timed(name, function):
        def call(*arguments):
            start = time.perf_counter()
            result = function(*arguments)
            spent[name] += time.perf_counter() - start
            return result

        return call

    make_sampler = ppo_clip.Policy.sampler
    ppo_clip.Policy.sampler = lambda *arguments: timed("acting", make_sampler(*arguments))
    envs.step = timed("environment", envs.step)
    rows, begin = [], time.perf_counter()
    while len(rows) < 4 or time.perf_counter() - begin < seconds:
        spent.update(environment=0.0, acting=0.0)
        start = time.perf_counter()
        batch = next(stretch)
        between = time.perf_counter()
        ppo_clip.update(agent, optimizer, batch, args)
        end = time.perf_counter()
        rest = between - start - sum(spent.values())
        rows.append((len(batch.obs) / (end - start), *spent.values(), rest, end - between))
    ppo_clip.Policy.sampler = make_sampler
    envs.close()
    return [statistics.median(x) for x in zip(*rows[1:])]  # the first warms up


def networks_alone(size: int = 4096) -> tuple[float, float]:
    """Steps per second if an iteration were EPOCHS passes of both networks, and tanh's share."""
    _, agent, _ = parts_of(ppo_clip.Args())
    obs = torch.randn(size, 4)
    hidden, passes, tanhs = torch.randn(size, 64), [], []
    for _ in range(30):
        start = time.perf_counter()
        (agent.policy.mlp(obs).sum() + agent.critic(obs).sum()).backward()
        between = time.perf_counter()
        for _ in range(4):
            hidden.tanh()
        passes.append(between - start)
        tanhs.append(time.perf_counter() - between)
    seconds = statistics.median(passes)
    return size / (EPOCHS * seconds), statistics.median(tanhs) / seconds


class Counter(TorchDispatchMode):
    count = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.count += 1
        return function(*args, **(kwargs or {}))


def operations_of_a_minibatch() -> int:
    """How many operations torch dispatches for a minibatch: forward, backward and in Adam."""
    counts = []
    for epochs in (1, 2):
        sizes = {"num_envs": 4, "num_steps": 32, "num_minibatches": 1}
        args = ppo_clip.Args(**sizes, update_epochs=epochs, target_kl=None)
        envs, agent, optimizer = parts_of(args)
        batch = next(ppo_clip.rollouts(envs, agent, args, 0))
        with Counter() as counter:
            ppo_clip.update(agent, optimizer, batch, args)
        counts.append(counter.count)
    return counts[1] - counts[0]


def print_table(title: str, results: dict[int, list[float]]) -> None:
    rows = [
        [f"{title} {x:,}", f"{speed:,.0f}", *(f"{part / sum(seconds):.0%}" for part in seconds)]
        for x, (speed, *seconds) in results.items()
    ]
    print(f"\n{table(['size', 'steps/s', *PARTS], rows)}")


parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
)
parser.add_argument("--out", default="scaling.png", help="the picture")
parser.add_argument("--seconds", type=float, default=3.0, help="time for each point")
options = parser.parse_args()

torch.set_num_threads(1)
over_envs: dict[str, dict[int, list[float]]] = {"native": {}, "sync": {}}
for num_envs in (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024):
    num_steps = max(4096 // num_envs, 32)
    sizes = {
        "num_envs": num_envs,
        "num_steps": num_steps,
        "num_minibatches": num_envs * num_steps // 512,
        "update_epochs": EPOCHS,
        "target_kl": None,
    }
    for name, mode in (("native", "vector_entry_point"), ("sync", "sync")):
        args = ppo_clip.Args(**sizes, vectorization_mode=mode)
        over_envs[name][num_envs] = measure(args, options.seconds)
over_minibatch = {}
for size in (32, 64, 128, 256, 512, 1024, 2048, 4096):
    sizes = {"num_envs": 32, "num_steps": 128, "num_minibatches": 4096 // size}
    args = ppo_clip.Args(**sizes, update_epochs=EPOCHS, target_kl=None)
    over_minibatch[size] = measure(args, options.seconds)
ceiling, tanh_share = networks_alone()

print_table("num_envs", over_envs["native"])
print_table("sync, num_envs", over_envs["sync"])
print_table("minibatch", over_minibatch)
print(f"\nThe networks alone: {ceiling:,.0f} steps/s, of which tanh takes {tanh_share:.0%}.")
print(f"A minibatch step is {operations_of_a_minibatch()} operations.")

figure, ((speed_1, speed_2), (share_1, share_2)) = pyplot.subplots(
    2, 2, figsize=(11, 7), sharex="col", sharey="row"
)
for name, results in over_envs.items():
    speed_1.plot(
        results.keys(),
        [x[0] for x in results.values()],
        marker="o",
        label=f"{name} vector environment",
    )
speed_2.plot(over_minibatch.keys(), [x[0] for x in over_minibatch.values()], marker="o", color="C0")
for axes, word in ((speed_1, "num_envs"), (speed_2, "steps in a minibatch")):
    axes.axhline(ceiling, color="gray", linestyle=":", label="the networks' passes alone")
    axes.set(xscale="log", yscale="log", title=f"over {word}")
    axes.set_yticks(
        ticks := [10_000, 20_000, 50_000, 100_000, 200_000], [f"{tick:,}" for tick in ticks]
    )
    axes.minorticks_off()
    axes.grid(alpha=0.3)
speed_1.set_ylabel("steps per second")
speed_1.legend()
for axes, results, word in (
    (share_1, over_envs["native"], "num_envs"),
    (share_2, over_minibatch, "minibatch"),
):
    shares = [[part / sum(row[1:]) for part in row[1:]] for row in results.values()]
    axes.stackplot(list(results), *zip(*shares), labels=PARTS, alpha=0.8)
    axes.set(xlabel=word, xticks=list(results), xticklabels=[f"{x}" for x in results], ylim=(0, 1))
    axes.minorticks_off()
share_1.set_ylabel("share of the time (native)")
share_2.legend(loc="center")
figure.tight_layout()
figure.savefig(options.out, dpi=110)
