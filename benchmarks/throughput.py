"""Steps per second and memory of our scripts beside the peers', as a Markdown table.

    python benchmarks/throughput.py --rounds 5
    python benchmarks/throughput.py --only HalfCheetah --sb3 PATH/TO/bin/python

The peers are Stable-Baselines3, sb3-contrib and rlox, in environments of their own with the same
build of torch, on which the memory depends:

    python -m venv .peers/sb3
    .peers/sb3/bin/pip install torch==2.13.0 sb3-contrib==2.9.2 "gymnasium[mujoco]==1.4.0"
    python -m venv .peers/rlox
    .peers/rlox/bin/pip install torch==2.13.0 rlox==1.2.0

CleanRL is no package: copy its ppo.py to .peers/cleanrl/. It runs in the first of these
environments, after .peers/sb3/bin/pip install tyro tensorboard. A peer that is not there is left
out. HalfCheetah-v5 needs MuJoCo on our side too.

The sizes are environments, steps of each, minibatches and epochs (of the critic in TRPO and VPG).
They and the networks are the same for both sides. Each side steps environments in its own way: ours
CartPole-v1 as one vector environment (`sync`: one environment after the other), Stable-Baselines3
and CleanRL one after the other, rlox in Rust. Each run is a process with one torch thread, on the
CPU. The two sides take turns. A figure is the median over the rounds, a ratio the median of the
rounds' ratios, with the least and the greatest. Steps per second leave out imports and set-up; MB
is the peak of the whole process's memory.
"""

import argparse
import statistics
from pathlib import Path

from common import RLOX, ROOT, SB3, has, run_peer, run_script, table

SIZES = "--no-norm-obs --no-norm-reward --gamma 0.99"
SIZES += " --num-envs {} --num-steps {} --num-minibatches {}"
PPO = f"{SIZES} --update-epochs {{}} --learning-rate 2.5e-4"
ALL_EPOCHS = "--target-kl None"  # or PPO-Clip may take fewer than its peers
CRITIC = f"{SIZES} --value-epochs {{}} --value-learning-rate 1e-3"
SYNC = "--vectorization-mode sync"
# Our command; its sizes; steps in all; the peers of peers.py.
PPO_PEERS = ["sb3-ppo", "rlox-ppo", "cleanrl-ppo"]
SETTINGS = [
    (f"ppo_clip.py --env CartPole-v1 {ALL_EPOCHS} {PPO}", "4 128 4 4", 60_000, PPO_PEERS),
    (f"ppo_clip.py --env CartPole-v1 {ALL_EPOCHS} {SYNC} {PPO}", "4 128 4 4", 60_000, ["sb3-ppo"]),
    (f"ppo_clip.py --env HalfCheetah-v5 {ALL_EPOCHS} {PPO}", "1 2048 32 10", 16_384, ["sb3-ppo"]),
    (f"trpo.py --env CartPole-v1 --cg-iters 15 {CRITIC}", "8 256 16 10", 81_920, ["sb3-trpo"]),
    (f"trpo.py --env CartPole-v1 --cg-iters 10 {CRITIC}", "8 2048 1 5", 163_840, ["rlox-trpo"]),
    (f"vpg.py --env CartPole-v1 --gae-lambda 0.97 {CRITIC}", "8 2048 1 5", 163_840, ["rlox-vpg"]),
    (f"ppo_kl.py --env CartPole-v1 {PPO}", "4 128 4 4", 60_000, []),
    ("reinforce.py --env CartPole-v1 --no-norm-obs --num-envs {}", "4", 60_000, []),
]


def run_ours(command: str, sizes: str, steps: int, seed: int) -> tuple[float, float]:
    command = f"{command.format(*sizes.split())} --total-timesteps {steps} --seed {seed}"
    rows, process = run_script(command.split())
    return int(rows[-1]["global_step"]) / float(rows[-1]["wall_time"]), process.memory


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--sb3", default=SB3, help="the Python that has sb3-contrib")
    parser.add_argument("--rlox", default=RLOX, help="the Python that has rlox")
    cleanrl = str(ROOT / ".peers/cleanrl/ppo.py")
    parser.add_argument("--cleanrl", default=cleanrl, help="CleanRL's ppo.py, for --sb3")
    parser.add_argument("--rounds", type=int, default=5, help="turns; the k-th has seed k")
    parser.add_argument("--only", default="", help="only settings whose command has this in it")
    args = parser.parse_args()

    pythons = {"sb3": args.sb3, "rlox": args.rlox, "cleanrl": args.sb3}
    needed = {"sb3": "sb3_contrib", "rlox": "rlox", "cleanrl": "tyro"}
    found = {name: has(pythons[name], needed[name]) for name in needed}
    found["cleanrl"] &= Path(args.cleanrl).exists()
    for name in [name for name in found if not found[name]]:
        print(f"{name}: not found, left out\n")
    rows = []
    for command, sizes, steps, peers in SETTINGS:
        if args.only not in command:
            continue
        env, ours, theirs = command.split()[2], [], {}
        for seed in range(1, args.rounds + 1):
            ours.append(run_ours(command, sizes, steps, seed))
            for peer in peers:
                package = peer.split("-")[0]
                if found[package]:
                    own = [args.cleanrl] if package == "cleanrl" else []
                    values = [*own, env, *sizes.split(), steps, seed]
                    done = run_peer(pythons[package], peer, *values)
                    speed = float(done.output.split()[-1])
                    theirs.setdefault(peer, []).append((speed, done.memory))
        speed, memory = (statistics.median(x) for x in zip(*ours))
        name = f"{command.split()[0]}, {env}{', sync' if SYNC in command else ''}"
        cells = [name, sizes, f"{speed:,.0f}", f"{memory:.0f}"]
        for peer, results in theirs.items():
            peer_speed, peer_memory = (statistics.median(x) for x in zip(*results))
            ratios = sorted(mine / other for (mine, _), (other, _) in zip(ours, results))
            ratio = f"{statistics.median(ratios):.2f} ({ratios[0]:.2f} to {ratios[-1]:.2f})"
            peers_cells = [peer, f"{peer_speed:,.0f}", f"{peer_memory:.0f}", ratio]
            rows.append([*cells, *peers_cells, f"{peer_memory / memory:.2f}"])
        if not theirs:
            rows.append([*cells, "", "", "", "", ""])
    header = ["ours", "sizes", "steps/s", "MB", "peer", "its steps/s", "its MB"]
    print(table([*header, "ours ÷ peer, steps/s", "peer ÷ ours, MB"], rows))
