"""Set trpo.py beside sb3-contrib's TRPO at equal steps, and print a Markdown table.

    python benchmarks/trpo.py --peer PATH/TO/bin/python --seeds 5
    python benchmarks/trpo.py --env InvertedDoublePendulum-v5 --seeds 3

The peer is the Python of an environment with sb3-contrib in it (pip install torch==2.13.0
sb3-contrib); without it, ours runs alone. On CartPole-v1 the peer trains with the settings that RL
Zoo has tuned for it, on InvertedDoublePendulum-v5 (which needs MuJoCo) with its defaults. Ours
trains with the peer's settings, and on CartPole-v1 with its own defaults too. All take turns, one
torch thread each; `return` is the mean of the last 100 episodes, `steps/s` leaves start-up out.
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
env, seed, steps, num_envs = sys.argv[1], *map(int, sys.argv[2:5])
settings = eval(sys.argv[5])
envs = make_vec_env(env, n_envs=num_envs, seed=seed)
model = TRPO("MlpPolicy", envs, seed=seed, device="cpu", **settings)
start = time.perf_counter()
model.learn(steps)
seconds = time.perf_counter() - start
returns = [episode["r"] for episode in model.ep_info_buffer]
print(numpy.mean(returns), model.num_timesteps / seconds)
"""
# Of each environment: the steps in all, the peer's environments and settings, and what of them is
# its own in our words. The line search, δ and the standardised advantages are the same anyway.
COMMON = "--no-anneal-lr --gamma 0.99 --value-learning-rate 0.001 --cg-iters 15"
COMMON += " --no-norm-obs --no-norm-reward"
TUNED = "dict(n_steps=512, batch_size=512, cg_damping=1e-3, gae_lambda=0.98, n_critic_updates=20)"
SAME_AS_TUNED = "--num-envs 2 --num-steps 512 --num-minibatches 2 --value-epochs 20"
SAME_AS_TUNED += " --gae-lambda 0.98 --cg-damping 0.001"
SAME_AS_DEFAULTS = "--num-envs 1 --num-steps 2048 --num-minibatches 16 --value-epochs 10"
SAME_AS_DEFAULTS += " --gae-lambda 0.95 --cg-damping 0.1"
TASKS = {
    "CartPole-v1": (100_000, 2, TUNED, SAME_AS_TUNED),
    "InvertedDoublePendulum-v5": (200_000, 1, "{}", SAME_AS_DEFAULTS),
}


def ours(options: str, env: str, seed: int, steps: int) -> tuple[float, float]:
    with tempfile.TemporaryDirectory() as folder:
        command = f"--env {env} --seed {seed} --total-timesteps {steps} --run-dir {folder}/run"
        command = f"{command} --quiet {options}".split()
        subprocess.run([sys.executable, ROOT / "trpo.py", *command], check=True)
        with open(Path(folder, "run/metrics.csv"), newline="") as file:
            last = list(csv.DictReader(file))[-1]
    speed = int(last["global_step"]) / float(last["wall_time"])
    return float(last["episodic_return"] or "nan"), speed


def peers(python: str, env: str, seed: int, steps: int) -> tuple[float, float]:
    _, num_envs, settings, _ = TASKS[env]
    command = [python, "-c", PEER, env, *map(str, (seed, steps, num_envs)), settings]
    run = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    return tuple(map(float, run.stdout.split()[-2:]))


parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
)
parser.add_argument("--env", default="CartPole-v1", choices=list(TASKS))
parser.add_argument("--peer", help="the Python that has sb3-contrib; without it, ours runs alone")
parser.add_argument("--seeds", type=int, default=5, help="seeds 1 to this")
parser.add_argument("--steps", type=int, help="100,000 on CartPole-v1, else 200,000")
args = parser.parse_args()

steps, _, _, same_settings = TASKS[args.env]
steps = args.steps or steps
contenders = {}
if args.peer:
    contenders["sb3-contrib"] = lambda seed: peers(args.peer, args.env, seed, steps)
if args.env == "CartPole-v1":
    contenders["trpo.py"] = lambda seed: ours("", args.env, seed, steps)
same_settings = f"{COMMON} {same_settings}"
contenders["trpo.py, the peer's settings"] = lambda seed: ours(same_settings, args.env, seed, steps)
results = {name: [] for name in contenders}
for seed in range(1, args.seeds + 1):
    for name, run in contenders.items():
        results[name].append(run(seed))
print(f"{args.env}, {steps:,} steps, seeds 1 to {args.seeds}\n")
print("| | return, mean ± deviation | each seed | steps/s, median | ÷ sb3-contrib |")
print("| --- | ---: | --- | ---: | ---: |")
for name, outcomes in results.items():
    returns, speeds = zip(*outcomes)
    peer_speeds = [speed for _, speed in results.get("sb3-contrib", [])]
    ratio = statistics.median(x / y for x, y in zip(speeds, peer_speeds)) if peer_speeds else None
    spread = f" ± {statistics.stdev(returns):,.0f}" if len(returns) > 1 else ""
    cells = [
        name,
        f"{statistics.mean(returns):,.0f}{spread}",
        " ".join(f"{x:.0f}" for x in returns),
    ]
    cells += [f"{statistics.median(speeds):,.0f}", f"{ratio:.1f}" if ratio else ""]
    print(f"| {' | '.join(cells)} |")
