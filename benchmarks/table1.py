"""Compare surrogate objectives as Table 1 of Schulman et al. 2017 does, with ppo_clip.py and
ppo_kl.py; print Markdown tables, and draw results/table1.png.

    python benchmarks/table1.py
    python benchmarks/table1.py --seeds 3
    python benchmarks/table1.py --seeds 0       # trains nothing, prints the tables again

Eleven settings of clip and penalty on seven tasks, a million steps each. A run's return is the mean
of its last 100 training episodes. A score is a return of which chance is 0 and the best setting's
mean 1, on each task. A setting's score is its mean over the tasks and the seeds, as in the paper.
Chance draws actions uniformly.

results/table1.csv keeps a line for each run. A run that has one is not made again, unless its
script has changed in more than comments and docstrings. So this goes on where it was stopped. Two
runs at a time, one thread each; the 77 runs of one seed take some hours.
"""

import argparse
import statistics
import sys

import numpy as np
from common import ROOT, keep, kept, make_missing, run_script, spread, table, text_of
from defaults import chance
from matplotlib.figure import Figure

RESULTS = ROOT / "results/table1.csv"
STEPS = 1_000_000
OPTIONS = """--num-envs 1 --num-steps 2048 --update-epochs 10 --num-minibatches 32
    --learning-rate 3e-4 --no-anneal-lr --gamma 0.99 --gae-lambda 0.95 --ent-coef 0"""
CLIP, KL = "ppo_clip.py --target-kl None", "ppo_kl.py"
PAPER = {  # its scores
    f"{KL} --penalty fixed --beta 0": -0.39,  # neither clip nor penalty
    f"{CLIP} --clip-coef 0.1": 0.76,
    f"{CLIP} --clip-coef 0.2": 0.82,
    f"{CLIP} --clip-coef 0.3": 0.70,
    f"{KL} --target-kl 0.003": 0.68,
    f"{KL} --target-kl 0.01": 0.74,
    f"{KL} --target-kl 0.03": 0.71,
    f"{KL} --penalty fixed --beta 0.3": 0.62,
    f"{KL} --penalty fixed --beta 1": 0.71,
    f"{KL} --penalty fixed --beta 3": 0.72,
    f"{KL} --penalty fixed --beta 10": 0.69,
}
TASKS = ["HalfCheetah-v5", "Hopper-v5", "InvertedDoublePendulum-v5", "InvertedPendulum-v5"]
TASKS += ["Reacher-v5", "Swimmer-v5", "Walker2d-v5"]
Runs = dict[tuple[str, str], dict[int, float]]  # returns, by task, setting and seed


def make(task: str, setting: str, seed: int) -> None:
    row = {"task": task, "program": setting, "seed": seed, "text": text_of(setting)}
    if setting == "chance":
        value, seconds = chance(task, seed)[-1], 0.0
    else:
        own = f"--env {task} --seed {seed} --total-timesteps {STEPS}"
        rows, process = run_script([*setting.split(), *OPTIONS.split(), *own.split()])
        value, seconds = float(rows[-1]["episodic_return"]), process.seconds
    keep(RESULTS, row | {"seconds": f"{seconds:.1f}", "return": f"{value:.5g}"})
    print(f"{task} {setting} {seed}: {value:.1f} in {seconds:.0f} s", file=sys.stderr)


def scores(runs: Runs) -> dict[str, dict[int, float]]:
    """Of each setting and seed, the mean over the tasks; only of seeds that have all runs."""
    seeds = set.intersection(*({*runs.get((task, x), {})} for task in TASKS for x in PAPER))
    found = {setting: dict.fromkeys(sorted(seeds), 0.0) for setting in PAPER}
    for task in TASKS if seeds else []:
        means = {x: statistics.mean(runs[task, x][seed] for seed in seeds) for x in PAPER}
        low, high = statistics.mean(runs[task, "chance"].values()), max(means.values())
        for setting in PAPER:
            for seed in seeds:
                score = (runs[task, setting][seed] - low) / (high - low)
                found[setting][seed] += score / len(TASKS)
    return found


def tables(runs: Runs) -> str:
    made = sum(len(x) for (_, setting), x in runs.items() if setting != "chance")
    found = scores(runs)
    ranks = sorted(PAPER, key=lambda x: -statistics.mean(found[x].values() or [0.0]))
    rows = []
    for setting, published in PAPER.items():
        own = [*found[setting].values()]
        cells = [f"{statistics.mean(own):.2f}", str(ranks.index(setting) + 1)] if own else ["", ""]
        seeds = " ".join(f"{x:.2f}" for x in own)
        rank = 1 + sum(x > published for x in PAPER.values())
        rows.append([f"`{setting}`", *cells, seeds, f"{published:.2f}", str(rank)])
    returns = [
        [f"`{x}`", *(spread([*runs.get((task, x), {}).values()]) for task in TASKS)]
        for x in [*PAPER, "chance"]
    ]
    header = ["setting", "score", "rank", "each seed's", "paper", "its rank"]
    return f"""{made} runs of {len(PAPER) * len(TASKS)} a seed.

Scores, means over the seven tasks:

{table(header, rows)}

Returns, mean ± standard deviation over the seeds:

{table(["setting", *TASKS], returns)}"""


def draw(runs: Runs) -> Figure:
    figure = Figure(figsize=(8, 4.5), layout="constrained")
    panel, found = figure.subplots(), scores(runs)
    rows = np.arange(len(PAPER))
    means = [statistics.mean(found[x].values() or [np.nan]) for x in PAPER]
    panel.barh(rows - 0.2, means, 0.4, label="these runs")
    panel.barh(rows + 0.2, [*PAPER.values()], 0.4, color="0.7", label="Schulman et al. 2017")
    for row, setting in zip(rows, PAPER):
        panel.plot([*found[setting].values()], [row - 0.2] * len(found[setting]), "k.", ms=4)
    names = [x.replace(" --target-kl None", "").replace(".py", "") for x in PAPER]
    panel.set_yticks(rows, names)
    panel.invert_yaxis()
    panel.spines[["top", "right"]].set_visible(False)
    panel.set_xlabel("score: chance is 0 and the best setting 1; mean over seven tasks")
    panel.legend(frameon=False)
    return figure


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--settings", nargs="+", choices=PAPER, default=[*PAPER])
    parser.add_argument("--tasks", nargs="+", choices=TASKS, default=TASKS)
    parser.add_argument("--seeds", type=int, default=1, help="seeds 1 to this")
    args = parser.parse_args()
    wanted = [
        (task, setting, seed)
        for seed in range(1, args.seeds + 1)
        for setting in [*args.settings, "chance"]
        for task in args.tasks
    ]
    make_missing(RESULTS, make, wanted, 2)
    runs: Runs = {}
    for (task, setting, seed), row in sorted(kept(RESULTS).items()):
        runs.setdefault((task, setting), {})[seed] = float(row["return"])
    print(tables(runs))
    draw(runs).savefig(ROOT / "results/table1.png", dpi=100)
