"""Run one command over several seeds, each as a process of its own, and print a Markdown table of
how they ended.

    python benchmarks/seeds.py --seeds 10 --threshold 475 ppo_clip.py --env CartPole-v1
    python benchmarks/seeds.py --seeds 3 --jobs 2 ppo_clip.py --env HalfCheetah-v5 --norm-obs

All options of this program come first. `return` is episodic_return in the last row, the mean of the
last 100 episodes. `process s` is the whole process, start-up included; `at threshold` is where the
return first reached it, with at least 100 episodes behind it: in environment steps, and in seconds
since the process began, its shutdown included.
"""

import argparse
import csv
import statistics
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

ROOT = Path(__file__).parent.parent


def run(command: list[str], seed: int, threshold: float) -> dict[str, float | None]:
    with tempfile.TemporaryDirectory() as folder:
        run_dir = Path(folder, "run")
        start = time.perf_counter()
        options = ["--seed", str(seed), "--run-dir", str(run_dir), "--quiet"]
        subprocess.run([sys.executable, ROOT / command[0], *command[1:], *options], check=True)
        seconds = time.perf_counter() - start
        with open(run_dir / "metrics.csv", newline="") as file:
            rows = list(csv.DictReader(file))
    start_up = seconds - float(rows[-1]["wall_time"])
    reached = [
        row
        for row in rows
        if int(row["episodes"]) >= 100 and float(row["episodic_return"]) >= threshold
    ]
    return {
        "return": float(rows[-1]["episodic_return"] or "nan"),
        "process s": seconds,
        "steps": int(rows[-1]["global_step"]),
        "steps at threshold": int(reached[0]["global_step"]) if reached else None,
        "seconds at threshold": start_up + float(reached[0]["wall_time"]) if reached else None,
    }


parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
)
parser.add_argument("--seeds", type=int, default=5, help="seeds 1 to this")
parser.add_argument(
    "--jobs", type=int, default=1, help="processes at a time; times are honest only with 1"
)
parser.add_argument("--threshold", type=float, default=float("inf"), help="return to time")
parser.add_argument("command", nargs=argparse.REMAINDER, help="script and its arguments")
args = parser.parse_args()

with ThreadPoolExecutor(args.jobs) as pool:
    outcomes = list(
        pool.map(lambda seed: run(args.command, seed, args.threshold), range(1, args.seeds + 1))
    )
print(f"`{' '.join(args.command)}`, seeds 1 to {args.seeds}, {args.jobs} at a time\n")
columns = [name for name in outcomes[0] if any(outcome[name] is not None for outcome in outcomes)]
print("| seed | " + " | ".join(columns) + " |")
print("| --- |" + " ---: |" * len(columns))
for seed, outcome in enumerate(outcomes, 1):
    cells = [
        "never" if outcome[name] is None else f"{outcome[name]:,.1f}".removesuffix(".0")
        for name in columns
    ]
    print(f"| {seed} | " + " | ".join(cells) + " |")
for name in columns:
    numbers = [outcome[name] for outcome in outcomes if outcome[name] is not None]
    spread = f"{len(numbers)} of {len(outcomes)} seeds: mean {statistics.mean(numbers):,.1f}"
    spread += f", median {statistics.median(numbers):,.1f}"
    if len(numbers) > 1:
        spread += f", standard deviation {statistics.stdev(numbers):,.1f}"
    print(f"\n{name}: {spread}, from {min(numbers):,.1f} to {max(numbers):,.1f}", end="")
print()
