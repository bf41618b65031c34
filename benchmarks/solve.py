"""Time whole processes until CartPole-v1 is solved, ours beside Stable-Baselines3's, and print a
Markdown table.

    python benchmarks/solve.py --seeds 10

Solved is a mean return of 475 over the last 100 episodes. Ours is ppo_clip.py as it stands; the
peer is PPO of Stable-Baselines3 with the settings that RL Zoo has tuned for this task, in an
environment of its own, which throughput.py says how to make. The two take turns. The peer stops
where the task is solved. Ours goes on; counted are its seconds up to the row of metrics.csv in
which it is, and those of its start and of its end.
"""

import argparse
import csv
import math
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from throughput import has

ROOT = Path(__file__).parent.parent


def ours(seed: int) -> tuple[float, float]:
    with tempfile.TemporaryDirectory() as folder:
        command = [
            sys.executable,
            ROOT / "ppo_clip.py",
            "--seed",
            str(seed),
            "--quiet",
            "--device",
            "cpu",
        ]
        start = time.perf_counter()
        subprocess.run([*command, "--run-dir", f"{folder}/run"], check=True)
        seconds = time.perf_counter() - start
        with open(Path(folder, "run/metrics.csv"), newline="") as file:
            rows = list(csv.DictReader(file))
    solved = [
        row for row in rows if int(row["episodes"]) >= 100 and float(row["episodic_return"]) >= 475
    ]
    if not solved:
        return math.inf, math.inf
    return seconds - float(rows[-1]["wall_time"]) + float(solved[0]["wall_time"]), int(
        solved[0]["global_step"]
    )


def peers(python: str, seed: int) -> tuple[float, float]:
    command = [python, ROOT / "benchmarks/peers.py", "sb3-solve", str(seed)]
    start = time.perf_counter()
    run = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    seconds, steps = time.perf_counter() - start, float(run.stdout.split()[-1])
    return (seconds, steps) if steps < math.inf else (math.inf, steps)


parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
)
parser.add_argument(
    "--sb3",
    default=str(ROOT / ".peers/sb3/bin/python"),
    help="the Python that has Stable-Baselines3",
)
parser.add_argument("--seeds", type=int, default=10, help="seeds 1 to this")
args = parser.parse_args()
if not has(args.sb3, "stable_baselines3"):
    parser.error(f"--sb3: expected a Python that has Stable-Baselines3, got {args.sb3}")

print(
    "| seed | ppo_clip.py, s | steps | SB3 tuned, s | steps | ours ÷ SB3, s |\n| --- |"
    + " ---: |" * 5
)
results = []
for seed in range(1, args.seeds + 1):
    (seconds, steps), (peer_seconds, peer_steps) = ours(seed), peers(args.sb3, seed)
    results.append((seconds, steps, peer_seconds, peer_steps, seconds / peer_seconds))
    cells = f"{seconds:.1f} | {steps:,.0f} | {peer_seconds:.1f} | {peer_steps:,.0f}"
    print(f"| {seed} | {cells} | {seconds / peer_seconds:.2f} |", flush=True)
seconds, steps, peer_seconds, peer_steps, ratio = (statistics.median(x) for x in zip(*results))
cells = f"{seconds:.1f} | {steps:,.0f} | {peer_seconds:.1f} | {peer_steps:,.0f} | {ratio:.2f}"
print(f"| median | {cells} |")
