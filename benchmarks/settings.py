"""Train scripts with several settings on several tasks, and print returns and seconds as Markdown.

    python benchmarks/settings.py --tasks Hopper-v5 LunarLander-v3 --seeds 5 \\
        --runs ppo_clip "ppo_clip --num-minibatches 8"

A return is the mean of the last 100 training episodes: its mean over the seeds ± their standard
deviation, and in brackets the worst seed's. Seconds are the median of whole processes on that task;
two run at a time, one thread each. A second table has every seed's return, and after a slash the
mean length of the same episodes.
"""

import argparse
import statistics
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

from common import run_script, table


class Run(NamedTuple):
    score: float  # the last mean return
    length: float  # and that of the lengths
    seconds: float


def make(label: str, task: str, seed: int, steps: int) -> Run:
    script, *options = label.split()
    own = ["--env", task, "--seed", str(seed), "--total-timesteps", str(steps)]
    rows, process = run_script([f"{script}.py", *own, *options])
    last = (float(rows[-1][name] or "nan") for name in ("episodic_return", "episodic_length"))
    return Run(*last, process.seconds)


def cell(runs: list[Run]) -> str:
    returns, _, seconds = zip(*runs)
    digits = 0 if max(abs(x) for x in returns) >= 100 else 1
    spread = f" ± {statistics.stdev(returns):.{digits}f}" if len(returns) > 1 else ""
    mean = f"{statistics.mean(returns):.{digits}f}{spread} ({min(returns):.{digits}f})"
    return f"{mean}, {statistics.median(seconds):.0f} s"


def seeds(runs: list[Run]) -> str:
    return " ".join(f"{run.score:.4g}/{run.length:.0f}" for run in runs)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--runs", nargs="+", required=True, help="a script and its options, quoted")
    parser.add_argument("--tasks", nargs="+", required=True, help="Gymnasium environments")
    parser.add_argument("--seeds", type=int, default=5, help="seeds 1 to this")
    parser.add_argument("--steps", type=int, default=200_000, help="steps of each run")
    args = parser.parse_args()

    with ThreadPoolExecutor(2) as pool:
        futures = {
            (label, task): [
                pool.submit(make, label, task, seed, args.steps)
                for seed in range(1, args.seeds + 1)
            ]
            for label in args.runs
            for task in args.tasks
        }
    runs = {key: [x.result() for x in made] for key, made in futures.items()}
    for show in cell, seeds:
        rows = [[label, *(show(runs[label, task]) for task in args.tasks)] for label in args.runs]
        print(table(["run", *args.tasks], rows), end="\n\n")
