"""Measure how far one update moves the policy: the mean over a rollout's states of the exact
KL(π_old ‖ π_θ), after each update of whole runs with the defaults, as a Markdown table.

    python benchmarks/divergence.py --envs CartPole-v1 Pendulum-v1 --seeds 5
"""

import argparse
import copy
import importlib
import sys
import tempfile
from concurrent.futures import ProcessPoolExecutor

import numpy as np
import torch
from common import ROOT, table
from torch.distributions import kl_divergence

sys.path.insert(0, str(ROOT))
NAMES = ["vpg", "trpo", "ppo_clip", "ppo_kl"]


def divergences(env: str, name: str, seed: int) -> list[float]:
    """That of each update of a run."""
    script = importlib.import_module(name)
    update, found = script.update, []

    def measured_update(agent, optimizer, batch, args):
        old_agent = copy.deepcopy(agent)
        metrics = update(agent, optimizer, batch, args)
        with torch.no_grad():
            old_policy, policy = old_agent.policy(batch.obs), agent.policy(batch.obs)
            found.append(kl_divergence(old_policy, policy).mean().item())
        return metrics

    script.update = measured_update
    with tempfile.TemporaryDirectory() as folder:
        script.train(script.Args(env=env, seed=seed, run_dir=f"{folder}/run", quiet=True))
    return found


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--envs", nargs="+", default=["CartPole-v1"])
    parser.add_argument("--seeds", type=int, default=5, help="seeds 1 to this")
    parser.add_argument("--jobs", type=int, default=2, help="processes at a time")
    options = parser.parse_args()

    seeds = range(1, options.seeds + 1)
    jobs = [(env, name, seed) for env in options.envs for name in NAMES for seed in seeds]
    with ProcessPoolExecutor(options.jobs, max_tasks_per_child=1) as pool:
        found = list(pool.map(divergences, *zip(*jobs)))
    rows = []
    for env in options.envs:
        for name in NAMES:
            runs = [x for job, x in zip(jobs, found) if job[:2] == (env, name)]
            values = np.concatenate(runs)
            figures = [np.median(values), np.quantile(values, 0.95), values.max()]
            rows.append([env, name, f"{len(values)}", *(f"{x:.2g}" for x in figures)])
    header = ["task", "script", "updates", "median", "95 % are below", "greatest"]
    print(table(header, rows, names=2))
