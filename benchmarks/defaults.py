"""Train our scripts and their peers, all with their defaults, on nine kinds of task; print Markdown
tables, and draw results/defaults.png.

    python benchmarks/defaults.py
    python benchmarks/defaults.py --programs ppo_clip.py "SB3 PPO" --tasks LunarLander-v3
    python benchmarks/defaults.py --seeds 0     # trains nothing, prints the tables again

Peers are Stable-Baselines3's PPO and A2C and sb3-contrib's TRPO, installed as throughput.py says.
A run has 200,000 steps. Its return is the mean return of the last 100 training episodes; rewards
are neither normalised nor discounted for this. Chance draws actions uniformly.

results/defaults.csv keeps a line for each run, with its return after each 10,000 steps. A run that
has one is not made again, unless its script has changed in more than comments and docstrings. So
this goes on where it was stopped. Two runs at a time, one thread each; 405 runs take some hours.
"""

import argparse
import functools
import sys
import time

import gymnasium
import numpy as np
from common import (
    ROOT,
    SB3,
    has,
    keep,
    kept,
    make_missing,
    run_peer,
    run_script,
    spread,
    table,
    text_of,
)
from matplotlib.figure import Figure

RESULTS = ROOT / "results/defaults.csv"
STEPS = 200_000
GRID = range(10_000, STEPS + 1, 10_000)
TASKS = [
    "CartPole-v1",
    "Acrobot-v1",
    "MountainCarContinuous-v0",
    "Pendulum-v1",
    "LunarLander-v3",
    "InvertedPendulum-v5",
    "InvertedDoublePendulum-v5",
    "Hopper-v5",
    "HalfCheetah-v5",
]
PEER_OF = {"ppo_clip.py": "SB3 PPO", "ppo_kl.py": "SB3 PPO", "trpo.py": "sb3-contrib TRPO"}
PEER_OF |= {"vpg.py": "SB3 A2C"}
OURS, PEERS = [*PEER_OF, "reinforce.py"], [*dict.fromkeys(PEER_OF.values())]
COLUMNS = ["ppo_clip.py", "ppo_kl.py", "SB3 PPO", "trpo.py", "sb3-contrib TRPO", "vpg.py"]
COLUMNS += ["SB3 A2C", "reinforce.py", "chance"]


def our_run(program: str, task: str, seed: int) -> list[float]:
    options = f"--env {task} --seed {seed} --total-timesteps {STEPS}"
    rows, _ = run_script([program, *options.split()])
    returns = [float(row["episodic_return"] or "nan") for row in rows]
    return curve([int(row["global_step"]) for row in rows], returns)


def peer_run(python: str, program: str, task: str, seed: int) -> list[float]:
    algorithm = program.split()[-1].lower()
    process = run_peer(python, "defaults", algorithm, task, STEPS, seed)
    steps, returns = np.loadtxt(process.output.splitlines(), ndmin=2).T
    return curve(steps, [returns[max(0, i - 99) : i + 1].mean() for i in range(len(returns))])


def curve(steps, returns) -> list[float]:
    """The last return at or before each step of the grid; its last is that at the run's end."""
    latest = np.searchsorted(steps, GRID, side="right") - 1
    latest[-1] = len(steps) - 1
    return [float(returns[i]) if i >= 0 else np.nan for i in latest]


def chance(task: str, seed: int) -> list[float]:
    """Mean return of 100 episodes of uniformly drawn actions."""
    env = gymnasium.make(task)
    env.action_space.seed(seed)
    returns = []
    for episode in range(100):
        env.reset(seed=1000 * seed + episode)
        rewards, is_over = 0.0, False
        while not is_over:
            _, reward, terminated, truncated, _ = env.step(env.action_space.sample())
            rewards, is_over = rewards + float(reward), terminated or truncated
        returns.append(rewards)
    return [float(np.mean(returns))] * len(GRID)


def make(python: str, task: str, program: str, seed: int) -> None:
    row = {"task": task, "program": program, "seed": seed, "text": text_of(program)}
    start = time.perf_counter()
    if program == "chance":
        returns = chance(task, seed)
    elif program in OURS:
        returns = our_run(program, task, seed)
    else:
        returns = peer_run(python, program, task, seed)
    row |= {"seconds": f"{time.perf_counter() - start:.1f}"}
    keep(RESULTS, row | {str(x): f"{y:.5g}" for x, y in zip(GRID, returns)})
    print(f"{task} {program} {seed}: {returns[-1]:.1f} in {row['seconds']} s", file=sys.stderr)


def finite_mean(rows: list[dict[str, str]], column: int) -> float:
    values = np.array([float(row[str(column)]) for row in rows])
    return float(values[np.isfinite(values)].mean()) if np.isfinite(values).any() else np.nan


def tables(runs: dict[tuple[str, str], list[dict[str, str]]]) -> str:
    last = {key: [float(row[str(STEPS)]) for row in rows] for key, rows in runs.items()}

    def compared(task: str, program: str) -> str:
        ours, peer = last.get((task, program)), last.get((task, PEER_OF[program]))
        if not ours or not peer or (task, "chance") not in last:
            return ""
        base = np.mean(last[task, "chance"])
        gain = (np.mean(ours) - base) / (np.mean(peer) - base)
        difference = np.mean(ours) - np.mean(peer)
        words = {1: "ahead", 0: "equal", -1: "behind"}
        return f"{words[int(np.sign(difference))]}, {gain:.2f}"

    made = sum(map(len, last.values()))
    returns = [[task, *(spread(last.get((task, x), [])) for x in COLUMNS)] for task in TASKS]
    ahead = [[task, *(compared(task, x) for x in PEER_OF)] for task in TASKS]
    seconds = [[task] for task in TASKS]
    for row in seconds:
        for program in COLUMNS[:-1]:
            times = [float(run["seconds"]) for run in runs.get((row[0], program), [])]
            row.append(f"{np.median(times):.0f}" if times else "")
    seeds = [
        [task, program, " ".join(f"{x:.4g}" for x in last[task, program])]
        for task in TASKS
        for program in COLUMNS[:-1]
        if (task, program) in last
    ]
    ahead_header = ["task", *(f"{x} : {PEER_OF[x]}" for x in PEER_OF)]
    return f"""{made} of {len(TASKS) * len(COLUMNS) * 5} runs.

Returns, mean ± standard deviation over the seeds:

{table(["task", *COLUMNS], returns)}

Who is ahead of its peer, and its gain over chance as a multiple of the peer's:

{table(ahead_header, ahead)}

Seconds of a whole process, medians:

{table(["task", *COLUMNS[:-1]], seconds)}

Every seed, in the seeds' order:

{table(["task", "program", "returns"], seeds, names=2)}"""


def draw(runs: dict[tuple[str, str], list[dict[str, str]]]) -> Figure:
    figure = Figure(figsize=(11, 10), layout="constrained")
    for task, panel in zip(TASKS, figure.subplots(3, 3).flat):
        for program in COLUMNS[:-1]:
            rows = runs.get((task, program), [])
            color = f"C{[*OURS].index(program)}" if program in OURS else None
            if program in PEERS:  # of the colour of the script that is its match, and dashed
                color = f"C{OURS.index([x for x in PEER_OF if PEER_OF[x] == program][0])}"
            means = [finite_mean(rows, column) if rows else np.nan for column in GRID]
            panel.plot(GRID, means, "--" if program in PEERS else "-", color=color, label=program)
        panel.set_title(task, fontsize="medium")
        panel.spines[["top", "right"]].set_visible(False)
        panel.grid(alpha=0.3)
        panel.xaxis.set_major_formatter(lambda x, _: f"{x / 1000:.0f}k")
    figure.legend(*panel.get_legend_handles_labels(), loc="outside upper center", ncols=8)
    figure.supxlabel("environment steps")
    figure.supylabel("return, mean over seeds")
    return figure


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--programs", nargs="+", choices=COLUMNS, default=COLUMNS)
    parser.add_argument("--tasks", nargs="+", choices=TASKS, default=TASKS)
    parser.add_argument("--seeds", type=int, default=5, help="seeds 1 to this")
    parser.add_argument("--jobs", type=int, default=2, help="runs at a time")
    parser.add_argument("--python", default=SB3, help="the Python that has the peers")
    args = parser.parse_args()
    wanted = [
        (task, program, seed)
        for seed in range(1, args.seeds + 1)
        for task in args.tasks
        for program in args.programs
    ]
    missing = {program for task, program, seed in {*wanted} - {*kept(RESULTS)}}
    if missing & {*PEERS} and not has(args.python, "sb3_contrib"):
        parser.error(f"--python: expected a Python that has sb3-contrib, got {args.python}")
    make_missing(RESULTS, functools.partial(make, args.python), wanted, args.jobs)
    runs: dict[tuple[str, str], list[dict[str, str]]] = {}
    for (task, program, _), row in sorted(kept(RESULTS).items()):
        runs.setdefault((task, program), []).append(row)
    print(tables(runs))
    draw(runs).savefig(ROOT / "results/defaults.png", dpi=100)
