"""Steps per second and memory of our scripts beside Stable-Baselines3, sb3-contrib and rlox, as a
Markdown table.

    python benchmarks/throughput.py --rounds 7
    python benchmarks/throughput.py --rounds 7 --only HalfCheetah --sb3 PATH/TO/bin/python

The peers live in environments of their own, by default .peers/sb3 and .peers/rlox in the
repository:

    python -m venv .peers/sb3
    .peers/sb3/bin/pip install torch==2.13.0 sb3-contrib==2.9.2 "gymnasium[mujoco]==1.4.0"
    python -m venv .peers/rlox
    .peers/rlox/bin/pip install torch==2.13.0 rlox==1.2.0

with the build of torch that ours has, as the memory depends on it. HalfCheetah needs MuJoCo on our
side too.

Ours and theirs take turns on equal work: environments, rollouts, epochs, minibatches and networks
are of equal sizes. Each has one torch thread, on the CPU, and steps environments in its own way:
ours as Gymnasium does by default, that is CartPole in its vector environment (`sync` asks for one
environment after the other); Stable-Baselines3 one after the other, in Python; rlox its CartPole in
Rust. Each runs as a process of its own. A figure is the median over the rounds, a ratio the median
of the rounds' ratios, with the least and the greatest. Steps per second leave imports and set-up
out; the peak of memory is the whole process's.
"""

import argparse
import csv
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).parent.parent
SIZES = "--no-norm-obs --no-norm-reward --gamma 0.99"
SIZES += " --num-envs {} --num-steps {} --num-minibatches {}"
PPO = f"{SIZES} --update-epochs {{}} --learning-rate 2.5e-4"
CRITIC = f"{SIZES} --value-epochs {{}} --value-learning-rate 1e-3"
SYNC = "--vectorization-mode sync"
# Our command; environments, steps, minibatches and epochs; steps in all; the peers of peers.py.
SETTINGS = [
    (f"ppo_clip.py --env CartPole-v1 {PPO}", "4 128 4 4", 60_000, ["sb3-ppo", "rlox-ppo"]),
    (f"ppo_clip.py --env CartPole-v1 {SYNC} {PPO}", "4 128 4 4", 60_000, ["sb3-ppo"]),
    (f"ppo_clip.py --env HalfCheetah-v5 {PPO}", "1 2048 32 10", 16_384, ["sb3-ppo"]),
    (f"trpo.py --env CartPole-v1 --cg-iters 15 {CRITIC}", "8 256 16 10", 81_920, ["sb3-trpo"]),
    (f"trpo.py --env CartPole-v1 --cg-iters 10 {CRITIC}", "8 2048 1 5", 163_840, ["rlox-trpo"]),
    (f"vpg.py --env CartPole-v1 --gae-lambda 0.97 {CRITIC}", "8 2048 1 5", 163_840, ["rlox-vpg"]),
    (f"ppo_kl.py --env CartPole-v1 {PPO}", "4 128 4 4", 60_000, []),
    ("reinforce.py --env CartPole-v1 --no-norm-obs --num-envs {}", "4", 60_000, []),
]


def measured(command: list[str | Path]) -> tuple[str, float]:
    """Run a command; return the last line that it prints, and the peak of its memory in MB."""
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    output = process.stdout.read()
    _, status, usage = os.wait4(process.pid, 0)
    if status:
        sys.exit(f"failed: {' '.join(map(str, command))}")
    unit = 1 if sys.platform == "darwin" else 1024  # of ru_maxrss, in bytes
    return (output.splitlines() or [""])[-1], usage.ru_maxrss * unit / 1e6


def run_ours(command: str, sizes: str, steps: int, seed: int) -> tuple[float, float]:
    with tempfile.TemporaryDirectory() as folder:
        options = (
            f"--total-timesteps {steps} --seed {seed} --device cpu --quiet --run-dir {folder}/run"
        )
        script, *arguments = f"{command.format(*sizes.split())} {options}".split()
        _, memory = measured([sys.executable, ROOT / script, *arguments])
        with open(Path(folder, "run/metrics.csv"), newline="") as file:
            last = list(csv.DictReader(file))[-1]
    return int(last["global_step"]) / float(last["wall_time"]), memory


def run_peer(
    python: str, peer: str, env: str, sizes: str, steps: int, seed: int
) -> tuple[float, float]:
    line, memory = measured(
        [python, ROOT / "benchmarks/peers.py", peer, env, *sizes.split(), str(steps), str(seed)]
    )
    return float(line), memory


def has(python: str, package: str) -> bool:
    try:
        return (
            subprocess.run([python, "-c", f"import {package}"], capture_output=True).returncode == 0
        )
    except OSError:
        return False


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--sb3", default=str(ROOT / ".peers/sb3/bin/python"), help="the Python that has sb3-contrib"
    )
    parser.add_argument(
        "--rlox", default=str(ROOT / ".peers/rlox/bin/python"), help="the Python that has rlox"
    )
    parser.add_argument(
        "--rounds", type=int, default=5, help="how often each takes its turn; round k has seed k"
    )
    parser.add_argument("--only", default="", help="only settings whose command has this in it")
    args = parser.parse_args()

    pythons = {"sb3": args.sb3, "rlox": args.rlox}
    for name, package in (("sb3", "sb3_contrib"), ("rlox", "rlox")):
        if not has(pythons[name], package):
            print(f"{package}: not found by {pythons[name]}, left out\n")
            del pythons[name]
    sizes = "environments, steps, minibatches, epochs (of the critic in TRPO and VPG)"
    print(f"{args.rounds} rounds. Sizes: {sizes}.\n")
    print("| ours | sizes | steps/s | MB | peer | steps/s | MB ", end="")
    print("| ours ÷ peer, steps/s | peer ÷ ours, MB |")
    print("| --- | --- | ---: | ---: | --- | ---: | ---: | ---: | ---: |")
    for command, sizes, steps, peers in SETTINGS:
        if args.only not in command:
            continue
        env = command.split()[2]
        peers = [peer for peer in peers if peer.split("-")[0] in pythons]
        mine, theirs = [], {peer: [] for peer in peers}
        for seed in range(1, args.rounds + 1):
            mine.append(run_ours(command, sizes, steps, seed))
            for peer in peers:
                theirs[peer].append(
                    run_peer(pythons[peer.split("-")[0]], peer, env, sizes, steps, seed)
                )
        speed, memory = (statistics.median(x) for x in zip(*mine))
        name = f"{command.split()[0]}, {env}{', sync' if 'sync' in command else ''}"
        first = f"| {name} | {sizes} | {speed:,.0f} | {memory:.0f} |"
        if not peers:
            print(first, "— | | | | |", flush=True)
        for peer, results in theirs.items():
            peer_speed, peer_memory = (statistics.median(x) for x in zip(*results))
            ratios = sorted(ours / other for (ours, _), (other, _) in zip(mine, results))
            ratio = f"**{statistics.median(ratios):.2f}** ({ratios[0]:.2f} to {ratios[-1]:.2f})"
            cells = f"{peer} | {peer_speed:,.0f} | {peer_memory:.0f} | {ratio}"
            print(first, cells, f"| {peer_memory / memory:.2f} |", flush=True)
