"""Train PPO-Clip in its three forms, and PPO-KL with the per-sample penalty, and compare their
metrics.csv to the bit.

    python benchmarks/forms.py --seeds 5
    python benchmarks/forms.py --env Pendulum-v1 --options="--norm-obs --clip-coef 0.1"

Compared are all columns that are one quantity in all four (not policy_loss, kl and the times), as
they stand in the file, and every tensor of the agent in the last checkpoint. `killed` and `passed`
are the means over the run of frac_kill and frac_pass: how much there was to differ in.
"""

import argparse
import csv
import shlex
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch

ROOT = Path(__file__).parent.parent
FORMS = {
    "min": ["ppo_clip.py", "--form", "min"],
    "phi": ["ppo_clip.py", "--form", "phi"],
    "beta": ["ppo_clip.py", "--form", "beta"],
    "per-sample": ["ppo_kl.py", "--penalty", "per-sample"],
}
COLUMNS = (
    "global_step episodes episodic_return episodic_length value_loss entropy approx_kl".split()
)
COLUMNS += "clipfrac frac_in frac_kill frac_pass explained_variance learning_rate".split()

parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
)
parser.add_argument("--env", default="CartPole-v1")
parser.add_argument("--options", default="", help="arguments of all runs, in one pair of quotes")
parser.add_argument("--seeds", type=int, default=3, help="seeds 1 to this")
parser.add_argument("--jobs", type=int, default=2, help="processes at a time")
args = parser.parse_args()

print(
    f"{args.env} {args.options}".strip()
    + "\n\n| seed | rows | "
    + " | ".join(list(FORMS)[1:])
    + " | killed | passed |"
)
print("| --- |" + " ---: |" * 6)
all_equal = True
for seed in range(1, args.seeds + 1):
    with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor(args.jobs) as pool:
        own = ["--env", args.env, "--seed", str(seed), "--quiet"]
        own += shlex.split(args.options)
        commands = [
            [sys.executable, ROOT / x[0], *x[1:], *own, "--run-dir", f"{folder}/{k}"]
            for k, x in FORMS.items()
        ]
        list(pool.map(lambda command: subprocess.run(command, check=True), commands))
        tables, weights = {}, {}
        for form in FORMS:
            with open(Path(folder, form, "metrics.csv"), newline="") as file:
                rows = list(csv.DictReader(file))
            tables[form] = [[row[name] for name in COLUMNS] for row in rows]
            weights[form] = torch.load(Path(folder, form, "checkpoint.pt"), weights_only=True)[
                "agent"
            ]
    cells = []
    for form in list(FORMS)[1:]:
        equal = len(tables[form]) == len(tables["min"]) and tables[form] == tables["min"]
        equal = equal and all(
            torch.equal(weights[form][name], tensor) for name, tensor in weights["min"].items()
        )
        all_equal = all_equal and equal
        rows_alike = sum(left == right for left, right in zip(tables[form], tables["min"]))
        cells.append("equal" if equal else f"{rows_alike} rows alike")
    shares = [
        sum(float(row[COLUMNS.index(name)]) for row in tables["min"])
        for name in ("frac_kill", "frac_pass")
    ]
    cells += [f"{share / len(tables['min']):.3f}" for share in shares]
    print(f"| {seed} | {len(tables['min'])} | " + " | ".join(cells) + " |", flush=True)
sys.exit(0 if all_equal else "not all are equal")
