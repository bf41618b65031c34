"""Train PPO-Clip with either of two common errors put in on purpose, and draw what it does.

    python benchmarks/two_errors.py --out two_errors.png

"Clipped samples have no gradient": the objective is clip(r) Â, without the min, so that a ratio
outside of the band has no gradient on either side. CartPole-v1, with a step size at which the clip
often acts. "An episode's end is an end": a truncation counts as a termination, so that no value is
added where a time limit cuts an episode. Pendulum-v1, all of whose episodes such a limit cuts.
"""

import argparse
import sys
import tempfile
import types
from concurrent.futures import ProcessPoolExecutor

import numpy as np
from common import ROOT, table
from matplotlib.figure import Figure

sys.path.insert(0, str(ROOT))

import gae_fast
import ppo_clip

CLIPPED = {
    "env": "CartPole-v1",
    "total_timesteps": 200_000,
    "learning_rate": 1e-2,
    "anneal_lr": False,
    "target_kl": None,
}
TRUNCATED = {"env": "Pendulum-v1", "total_timesteps": 300_000}


def clip_without_min(log_probs, ratio, advantages, args):
    return ratio.clamp(1 - args.clip_coef, 1 + args.clip_coef) * advantages


def gae_of_ends(rewards, values, terminations, truncations, gamma, gae_lambda):
    return gae_fast.gae(
        rewards, values, terminations | truncations, truncations & False, gamma, gae_lambda
    )


def train(job):
    """One run; the error, if any, replaces the function that does it right in this process
    alone."""
    error, options, seed = job
    if error == "no min":
        ppo_clip.clipped_surrogate = clip_without_min
    if error == "no bootstrap":
        ppo_clip.gae_fast = types.SimpleNamespace(**{**vars(gae_fast), "gae": gae_of_ends})
    with tempfile.TemporaryDirectory() as folder:
        rows = ppo_clip.train(
            ppo_clip.Args(**options, seed=seed, run_dir=f"{folder}/run", quiet=True)
        )
    return [row | {"frac_pass": row["clipfrac"] - row["frac_kill"]} for row in rows]


def draw(curves, path):
    """The return of each run, thin, and the mean over a contender's runs, on one panel for each
    environment."""
    figure = Figure(figsize=(11, 4), layout="constrained")
    panels = dict(zip(("CartPole-v1", "Pendulum-v1"), figure.subplots(1, 2)))
    for label, options, tables in curves:
        panel = panels[options["env"]]
        grid = np.linspace(0.05, 1, 100) * options["total_timesteps"]
        steps = [
            [row["global_step"] for row in rows if row["episodic_return"] is not None]
            for rows in tables
        ]
        returns = [
            [row["episodic_return"] for row in rows if row["episodic_return"] is not None]
            for rows in tables
        ]
        rows = [np.interp(grid, *pair) for pair in zip(steps, returns)]
        (line,) = panel.plot(grid, np.mean(rows, axis=0), label=label, linewidth=2)
        for row in rows:
            panel.plot(grid, row, color=line.get_color(), linewidth=0.5, alpha=0.6)
    for env, panel in panels.items():
        panel.set(title=env, xlabel="environment steps", ylabel="return")
        panel.spines[["top", "right"]].set_visible(False)
        panel.grid(alpha=0.3)
        panel.legend(fontsize="small")
    figure.savefig(path, dpi=150)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seeds", type=int, default=5, help="seeds 1 to this")
    parser.add_argument("--jobs", type=int, default=2, help="processes at a time")
    parser.add_argument("--out", help="picture to write")
    args = parser.parse_args()

    seeds = range(1, args.seeds + 1)
    contenders = {
        "right: min(r Â, clip(r) Â)": (None, CLIPPED),
        "wrong: clip(r) Â": ("no min", CLIPPED),
        "right: truncation bootstraps": (None, TRUNCATED),
        "wrong: truncation ends": ("no bootstrap", TRUNCATED),
    }
    jobs = [(*contender, seed) for contender in contenders.values() for seed in seeds]
    with ProcessPoolExecutor(args.jobs, max_tasks_per_child=1) as pool:
        tables = list(pool.map(train, jobs))
    columns = ["episodic_return", "frac_kill", "frac_pass", "approx_kl"]
    lines = []
    curves = []
    for i, (label, (_, options)) in enumerate(contenders.items()):
        of_label = tables[i * len(seeds) : (i + 1) * len(seeds)]
        curves.append((label, options, of_label))
        last = [rows[-1]["episodic_return"] for rows in of_label]
        # Over the second half of the run, but for the return.
        half = {
            x: [row[x] for rows in of_label for row in rows[len(rows) // 2 :]] for x in columns[1:]
        }
        cells = [
            f"{np.mean(last):.0f} ± {np.std(last, ddof=1):.0f}",
            *(f"{np.mean(x):.3f}" for x in half.values()),
        ]
        cells.append(" ".join(f"{x:.0f}" for x in last))
        lines.append([options["env"], label, *cells])
    print(table(["task", "objective", *columns, "returns"], lines, names=2))
    if args.out:
        draw(curves, args.out)
