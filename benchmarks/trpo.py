"""Set trpo.py beside sb3-contrib's TRPO on CartPole-v1, at equal steps, and print a Markdown table.

    python benchmarks/trpo.py --peer PATH/TO/bin/python --seeds 5

The peer is the Python of an environment with sb3-contrib in it (pip install torch==2.13.0 sb3-contrib); it trains with
the settings that RL Zoo has tuned for it. Ours trains with its defaults, and once more with the peer's settings. The
three take turns, one torch thread each; `return` is the mean of the last 100 episodes, `steps/s` leaves start-up out.
"""

import argparse
import csv
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).parent.parent
PEER = """
import sys, time
import numpy, torch
from sb3_contrib import TRPO
from stable_baselines3.common.env_util import make_vec_env

torch.set_num_threads(1)
seed, steps = int(sys.argv[1]), int(sys.argv[2])
settings = dict(n_steps=512, batch_size=512, cg_damping=1e-3, gae_lambda=0.98, n_critic_updates=20)
model = TRPO("MlpPolicy", make_vec_env("CartPole-v1", n_envs=2, seed=seed), seed=seed, device="cpu", **settings)
start = time.perf_counter()
model.learn(steps)
seconds = time.perf_counter() - start
print(numpy.mean([episode["r"] for episode in model.ep_info_buffer]), model.num_timesteps / seconds)
"""
# The peer's settings and defaults in our words. The line search, δ and the standardised advantages are the same anyway.
SAME_SETTINGS = "--num-envs 2 --num-steps 512 --num-minibatches 2 --value-epochs 20 --value-learning-rate 0.001"
SAME_SETTINGS += " --no-anneal-lr --gamma 0.99 --gae-lambda 0.98 --cg-damping 0.001 --cg-iters 15"


def ours(options: str, seed: int, steps: int) -> tuple[float, float]:
    with tempfile.TemporaryDirectory() as folder:
        command = f"--seed {seed} --total-timesteps {steps} --quiet --run-dir {folder}/run {options}".split()
        subprocess.run([sys.executable, ROOT / "trpo.py", *command], check=True)
        with open(Path(folder, "run/metrics.csv"), newline="") as file:
            last = list(csv.DictReader(file))[-1]
    return float(last["episodic_return"]), int(last["global_step"]) / float(last["wall_time"])


def peers(python: str, seed: int, steps: int) -> tuple[float, float]:
    run = subprocess.run([python, "-c", PEER, str(seed), str(steps)], check=True, capture_output=True, text=True)
    return tuple(map(float, run.stdout.split()[-2:]))


parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--peer", required=True, help="the Python that has sb3-contrib")
parser.add_argument("--seeds", type=int, default=5, help="seeds 1 to this")
parser.add_argument("--steps", type=int, default=100_000)
args = parser.parse_args()

contenders = {
    "sb3-contrib": lambda seed: peers(args.peer, seed, args.steps),
    "trpo.py": lambda seed: ours("", seed, args.steps),
    "trpo.py, the peer's settings": lambda seed: ours(SAME_SETTINGS, seed, args.steps),
}
results = {name: [] for name in contenders}
for seed in range(1, args.seeds + 1):
    for name, run in contenders.items():
        results[name].append(run(seed))
print(f"CartPole-v1, {args.steps:,} steps, seeds 1 to {args.seeds}\n")
print(
    "| | return, mean ± deviation | each seed | steps/s, median | ÷ sb3-contrib |\n| --- | ---: | --- | ---: | ---: |"
)
for name, outcomes in results.items():
    returns, speeds = zip(*outcomes)
    ratios = [speed / peer for speed, (_, peer) in zip(speeds, results["sb3-contrib"])]
    spread = (
        f"{statistics.mean(returns):.0f} ± {statistics.stdev(returns):.0f}" if len(returns) > 1 else f"{returns[0]:.0f}"
    )
    each = " ".join(f"{x:.0f}" for x in returns)
    print(f"| {name} | {spread} | {each} | {statistics.median(speeds):,.0f} | {statistics.median(ratios):.1f} |")
