"""Time whole processes until a task is solved, ours beside Stable-Baselines3's; print Markdown
tables, and draw results/solve.png if they are of all tasks.

    python benchmarks/solve.py
    python benchmarks/solve.py --tasks CartPole-v1 --seeds 10
    python benchmarks/solve.py --seeds 0        # trains nothing, prints the tables again

A task is solved when the mean return of the last 100 training episodes reaches a level. Ours is
ppo_clip.py with its defaults, which has 200,000 steps for the first four tasks and a million for
the others. The peer is Stable-Baselines3's PPO with the settings that RL Zoo has tuned for the
task, installed as throughput.py says (and gymnasium[box2d]). Each process is stopped when its task
is solved, or after ten minutes.

results/solve.csv keeps a line for each pair of processes. A pair that has one is not timed again,
unless ppo_clip.py has changed in more than comments and docstrings. The two of a pair take turns;
two pairs are timed at the same time, one thread each.
"""

import argparse
import functools
import math
import statistics
import sys
import tempfile

import numpy as np
from common import ROOT, SB3, has, keep, kept, make_missing, run, run_peer, table, text_of
from matplotlib.figure import Figure

RESULTS = ROOT / "results/solve.csv"
SCRIPT, SECONDS = "ppo_clip.py", 600
LEVELS = {  # of the mean return
    "CartPole-v1": 475,
    "Acrobot-v1": -100,
    "MountainCarContinuous-v0": 90,
    "Pendulum-v1": -200,
    "LunarLander-v3": 200,
    "InvertedPendulum-v5": 950,
    "InvertedDoublePendulum-v5": 8000,
    "Hopper-v5": 2000,
    "HalfCheetah-v5": 2000,
}
STEPS = {task: 200_000 if i < 4 else 1_000_000 for i, task in enumerate(LEVELS)}
COLUMNS = ["ours_seconds", "ours_steps", "peer_seconds", "peer_steps"]


def make(python: str, task: str, program: str, seed: int) -> None:
    row = {"task": task, "program": program, "seed": seed, "text": text_of(program)}
    with tempfile.TemporaryDirectory() as folder:
        options = f"--env {task} --seed {seed} --total-timesteps {STEPS[task]} --quiet"
        command = [sys.executable, ROOT / "benchmarks/until.py", program, LEVELS[task], SECONDS]
        ours = run([*command, *options.split(), "--run-dir", f"{folder}/run"])
    peer = run_peer(python, "sb3-solve", task, LEVELS[task], SECONDS, seed)
    for name, process in (("ours", ours), ("peer", peer)):
        steps = float(process.output.split()[-1])
        row[f"{name}_seconds"] = f"{process.seconds if steps < math.inf else math.inf:.2f}"
        row[f"{name}_steps"] = f"{steps:.0f}"
    keep(RESULTS, row)
    print(*row.values(), file=sys.stderr)


def shown(number: float, form: str = ".1f") -> str:
    return f"{number:{form}}" if number < math.inf else "—"


def quotient(ours: float, peer: float) -> float:
    """Who was stopped took as long as the limit, or longer."""
    return min(ours, SECONDS) / min(peer, SECONDS)


def tables(runs: dict[str, list[list[float]]]) -> str:
    rows, seeds, ratios = [], [], []
    for task, level in LEVELS.items():
        if task not in runs:
            continue
        ours, steps, peer, its = map(statistics.median, zip(*runs[task]))
        ratios.append(quotient(ours, peer))
        sign = "" if max(ours, peer) < math.inf else "≤ " if ours < peer else "≥ "
        cells = [shown(ours), shown(steps, ",.0f"), shown(peer), shown(its, ",.0f")]
        rows.append([f"{task}, {level}", *cells, f"{sign}{ratios[-1]:.2f}"])
        for column, name in ((0, "ppo_clip.py"), (2, "SB3, RL Zoo's settings")):
            seeds.append([task, name, " ".join(shown(x[column]) for x in runs[task])])
    ahead = f"Ahead on {sum(x < 1 for x in ratios)} of {len(ratios)} tasks"
    header = [
        "task, level",
        "ppo_clip.py, s",
        "steps",
        "SB3 tuned, s",
        "its steps",
        "ours ÷ SB3, s",
    ]
    return f"""Medians over the seeds; —: not within {SECONDS} s or the steps of the run:

{table(header, rows)}

{ahead}; the median of the quotients is {statistics.median(ratios):.2f}.

Seconds of every seed, in the seeds' order:

{table(["task", "program", "seconds"], seeds, names=2)}"""


def draw(runs: dict[str, list[list[float]]]) -> Figure:
    figure = Figure(figsize=(8, 4), layout="constrained")
    panel, tasks = figure.subplots(), [task for task in LEVELS if task in runs]
    rows = np.arange(len(tasks))
    for column, shift, label in ((0, -0.2, "ppo_clip.py"), (2, 0.2, "SB3, RL Zoo's settings")):
        seconds = [[min(x[column], SECONDS) for x in runs[task]] for task in tasks]
        panel.barh(rows + shift, [statistics.median(x) for x in seconds], 0.4, label=label)
        for row, values in zip(rows, seconds):
            panel.plot(values, [row + shift] * len(values), "k.", ms=4)
    panel.axvline(SECONDS, color="0.6", lw=1)
    panel.set_yticks(rows, [f"{task}, {LEVELS[task]}" for task in tasks])
    panel.invert_yaxis()
    panel.set_xscale("log")
    panel.spines[["top", "right"]].set_visible(False)
    panel.set_xlabel(
        f"seconds of a whole process until the task is solved; stopped after {SECONDS}"
    )
    panel.legend(frameon=False)
    return figure


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--tasks", nargs="+", choices=LEVELS, default=[*LEVELS])
    parser.add_argument("--seeds", type=int, default=3, help="seeds 1 to this")
    parser.add_argument("--jobs", type=int, default=2, help="pairs at a time")
    parser.add_argument("--sb3", default=SB3, help="the Python that has Stable-Baselines3")
    args = parser.parse_args()
    seeds = range(1, args.seeds + 1)
    wanted = [(task, SCRIPT, seed) for seed in seeds for task in args.tasks]
    if {*wanted} - {*kept(RESULTS)} and not has(args.sb3, "stable_baselines3"):
        parser.error(f"--sb3: expected a Python that has Stable-Baselines3, got {args.sb3}")
    make_missing(RESULTS, functools.partial(make, args.sb3), wanted, args.jobs)
    runs: dict[str, list[list[float]]] = {}
    for (task, _, seed), row in sorted(kept(RESULTS).items()):
        if task in args.tasks and (seed in seeds or not seeds):
            runs.setdefault(task, []).append([float(row[x]) for x in COLUMNS])
    print(tables(runs))
    if args.tasks == [*LEVELS]:
        draw(runs).savefig(ROOT / "results/solve.png", dpi=100)
