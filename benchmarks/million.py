"""Train all scripts with their defaults for a million steps on seven tasks, play with the trained
policies, print Markdown tables, and draw results/million.png.

    python benchmarks/million.py
    python benchmarks/million.py --scripts ppo_clip.py --tasks Hopper-v5
    python benchmarks/million.py --seeds 0      # trains nothing, prints the tables again

A training return is the mean of the last 100 episodes, whose actions are sampled. A played return
is the mean of play.py over 100 episodes of the most probable actions. Beside them stand published
figures of PPO, for other versions of the tasks; RL Zoo's BipedalWalker had five million steps.

results/million.csv keeps a line for each run, with its return after each 20,000 steps. A run that
has one is not made again, unless its script has changed in more than comments and docstrings. So
this goes on where it was stopped. Two runs at a time, one thread each; 105 runs take some hours.
"""

import argparse
import re
import sys
import tempfile

import numpy as np
from common import ROOT, keep, kept, make_missing, run, spread, table, text_of, train
from matplotlib.figure import Figure

RESULTS = ROOT / "results/million.csv"
STEPS = 1_000_000
GRID = np.arange(20_000, STEPS + 1, 20_000)
SCRIPTS = ["ppo_clip.py", "ppo_kl.py", "trpo.py", "vpg.py", "reinforce.py"]
# In training: CleanRL, v4; and the PPO-Clip of arXiv 2606.23932, v4 (LunarLander: v3).
# The most probable actions: RL Zoo, v3 (LunarLander: v2).
CLEANRL = {"HalfCheetah-v5": "1443 ± 46", "Hopper-v5": "2383 ± 272", "Walker2d-v5": "2288 ± 572"}
KLIP = {"HalfCheetah-v5": "1955 ± 312", "Hopper-v5": "2598 ± 278", "Walker2d-v5": "3717 ± 425"}
KLIP |= {"Ant-v5": "2193 ± 361", "LunarLander-v3": "107 ± 8"}
ZOO = {"HalfCheetah-v5": "5819 ± 664", "Hopper-v5": "2410 ± 10", "Walker2d-v5": "3479 ± 822"}
ZOO |= {"Ant-v5": "1327 ± 452", "Swimmer-v5": "282 ± 10", "LunarLander-v3": "242 ± 32"}
ZOO |= {"BipedalWalker-v3": "213 ± 129"}
TASKS = ["HalfCheetah-v5", "Hopper-v5", "Walker2d-v5", "Ant-v5", "Swimmer-v5", "LunarLander-v3"]
TASKS += ["BipedalWalker-v3"]


def make(task: str, script: str, seed: int) -> None:
    text = text_of(script)
    with tempfile.TemporaryDirectory() as folder:
        options = f"--env {task} --seed {seed} --total-timesteps {STEPS}"
        rows, process = train(f"{folder}/run", [script, *options.split()])
        command = [sys.executable, ROOT / "play.py", f"{folder}/run", "--episodes", "100"]
        played = re.search(r"return (\S+) ±", run(command).output)[1]
    steps = [int(row["global_step"]) for row in rows]
    latest = np.searchsorted(steps, GRID, side="right") - 1  # the row at or before each step
    latest[-1] = -1  # the last rollout ends after the last step
    returns = [float(rows[i]["episodic_return"] or "nan") for i in latest]
    row = {"task": task, "program": script, "seed": seed, "text": text}
    row |= {"seconds": f"{process.seconds:.1f}", "played": played}
    keep(RESULTS, row | {str(x): f"{y:.5g}" for x, y in zip(GRID, returns)})
    print(f"{task} {script} {seed}: {returns[-1]:.1f}, played {played}", file=sys.stderr)


def tables(runs: dict[tuple[str, str], list[dict[str, str]]]) -> str:
    def returns(column: str, *published: dict[str, str]) -> list[list[str]]:
        return [
            [
                task,
                *(spread([float(x[column]) for x in runs.get((task, y), [])]) for y in SCRIPTS),
                *(figures.get(task, "") for figures in published),
            ]
            for task in TASKS
        ]

    last, seconds = str(STEPS), [[task] for task in TASKS]
    for row in seconds:
        for script in SCRIPTS:
            times = [float(x["seconds"]) for x in runs.get((row[0], script), [])]
            row.append(f"{np.median(times):.0f}" if times else "")
    seeds = [
        [task, script, *(" ".join(f"{float(x[y]):.4g}" for x in made) for y in (last, "played"))]
        for task in TASKS
        for script in SCRIPTS
        if (made := runs.get((task, script)))
    ]
    training = returns(last, CLEANRL, KLIP)
    published = ["CleanRL, PPO", "arXiv 2606.23932, PPO-Clip"]
    return f"""{sum(map(len, runs.values()))} of {len(TASKS) * len(SCRIPTS) * 3} runs.

In training, sampled actions, mean ± standard deviation over the seeds:

{table(["task", *SCRIPTS, *published], training)}

Played, most probable actions, mean ± standard deviation over the seeds:

{table(["task", *SCRIPTS, "RL Zoo, PPO"], returns("played", ZOO))}

Seconds of a training, medians of whole processes:

{table(["task", *SCRIPTS], seconds)}

Every seed, in the seeds' order:

{table(["task", "script", "in training", "played"], seeds, names=2)}"""


def draw(runs: dict[tuple[str, str], list[dict[str, str]]]) -> Figure:
    figure = Figure(figsize=(13, 6.5), layout="constrained")
    *panels, spare = figure.subplots(2, 4).flat
    for task, panel in zip(TASKS, panels):
        for script in SCRIPTS:
            rows = runs.get((task, script), [])
            curves = np.array([[float(row[str(x)]) for x in GRID] for row in rows])
            if not rows:
                continue
            (line,) = panel.plot(GRID, curves.mean(axis=0), color=f"C{SCRIPTS.index(script)}")
            line.set_label(script)
            panel.fill_between(GRID, curves.min(axis=0), curves.max(axis=0), alpha=0.15, lw=0)
        panel.set_title(task, fontsize="medium")
        panel.spines[["top", "right"]].set_visible(False)
        panel.grid(alpha=0.3)
        panel.xaxis.set_major_formatter(lambda x, _: f"{x / 1e6:g}M")
    spare.axis("off")
    spare.legend(*panels[0].get_legend_handles_labels(), loc="center", frameon=False)
    figure.supxlabel("environment steps")
    figure.supylabel("return in training; mean and range of three seeds")
    return figure


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--scripts", nargs="+", choices=SCRIPTS, default=SCRIPTS)
    parser.add_argument("--tasks", nargs="+", choices=TASKS, default=TASKS)
    parser.add_argument("--seeds", type=int, default=3, help="seeds 1 to this")
    args = parser.parse_args()
    wanted = [
        (task, script, seed)
        for seed in range(1, args.seeds + 1)
        for task in args.tasks
        for script in args.scripts
    ]
    make_missing(RESULTS, make, wanted, 2)
    runs: dict[tuple[str, str], list[dict[str, str]]] = {}
    for (task, script, _), row in sorted(kept(RESULTS).items()):
        runs.setdefault((task, script), []).append(row)
    print(tables(runs))
    draw(runs).savefig(ROOT / "results/million.png", dpi=100)
