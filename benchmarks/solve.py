"""Time whole processes until CartPole-v1 is solved, ours beside Stable-Baselines3's, and print a
Markdown table.

    python benchmarks/solve.py --seeds 10

Solved is a mean return of 475 over the last 100 episodes. Ours is ppo_clip.py with its defaults.
The peer is Stable-Baselines3's PPO with the settings that RL Zoo has tuned for this task, installed
as throughput.py says. The two take turns. The peer stops when the task is solved. Ours goes on, but
the time from the row of metrics.csv in which the task is solved to the last row is not counted.
`inf`: the run ended unsolved.
"""

import argparse
import math
import statistics

from common import SB3, has, run_peer, run_script, table


def ours(seed: int) -> tuple[float, float]:
    rows, process = run_script(["ppo_clip.py", "--env", "CartPole-v1", "--seed", str(seed)])
    for row in rows:
        if int(row["episodes"]) >= 100 and float(row["episodic_return"]) >= 475:
            after = float(rows[-1]["wall_time"]) - float(row["wall_time"])
            return process.seconds - after, int(row["global_step"])
    return math.inf, math.inf


def peers(python: str, seed: int) -> tuple[float, float]:
    process = run_peer(python, "sb3-solve", seed)
    steps = float(process.output.split()[-1])
    return process.seconds if steps < math.inf else math.inf, steps


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--sb3", default=SB3, help="the Python that has Stable-Baselines3")
    parser.add_argument("--seeds", type=int, default=10, help="seeds 1 to this")
    args = parser.parse_args()
    if not has(args.sb3, "stable_baselines3"):
        parser.error(f"--sb3: expected a Python that has Stable-Baselines3, got {args.sb3}")

    results = [(*ours(seed), *peers(args.sb3, seed)) for seed in range(1, args.seeds + 1)]
    results = [(*x, x[0] / x[2]) for x in results]
    medians = [statistics.median(x) for x in zip(*results)]
    names = [*map(str, range(1, args.seeds + 1)), "median"]
    rows = [
        [name, f"{seconds:.1f}", f"{steps:,.0f}", f"{other:.1f}", f"{its:,.0f}", f"{ratio:.2f}"]
        for name, (seconds, steps, other, its, ratio) in zip(names, [*results, medians])
    ]
    header = ["seed", "ppo_clip.py, s", "steps", "SB3 tuned, s", "its steps", "ours ÷ SB3, s"]
    print(table(header, rows))
