"""Train PPO-Clip in its three forms, and PPO-KL with the per-sample penalty, and compare their
metrics.csv to the bit.

    python benchmarks/forms.py --envs CartPole-v1 Pendulum-v1 --seeds 3
    python benchmarks/forms.py --options="--clip-coef 0.1"

All columns that all four have, but for the times, are compared with those of `--form min`, as text;
so is every tensor of the agent in the last checkpoint, exactly. As PPO-KL does, PPO-Clip takes all
of its epochs: `--target-kl None`. `killed` and `passed` are the means over the run of frac_kill and
of clipfrac − frac_kill, in `--form min`.
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
from common import ROOT, table

FORMS = {
    **{x: ["ppo_clip.py", "--form", x, "--target-kl", "None"] for x in ("min", "phi", "beta")},
    "per-sample": ["ppo_kl.py", "--penalty", "per-sample", "--ent-coef", "0.02"],
}
COLUMNS = "global_step episodes episodic_return episodic_length surrogate entropy approx_kl"
COLUMNS += " value_loss explained_variance learning_rate"


def outcomes(env: str, seed: int, options: list[str], jobs: int) -> dict[str, tuple]:
    """Of each form: its rows of metrics.csv, its weights at the end, the killed and the passed."""
    with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor(jobs) as pool:

        def train(form: str) -> tuple[list[list[str]], dict[str, torch.Tensor], list[float]]:
            run_dir, (script, *own) = Path(folder, form), FORMS[form]
            own += ["--env", env, "--seed", str(seed), "--quiet", "--run-dir", str(run_dir)]
            subprocess.run([sys.executable, ROOT / script, *own, *options], check=True)
            with open(run_dir / "metrics.csv", newline="") as file:
                table = list(csv.DictReader(file))
            rows = [[row[name] for name in COLUMNS.split()] for row in table]
            means = [
                sum(float(row.get(name, "nan")) for row in table) / len(table)
                for name in ("clipfrac", "frac_kill")
            ]
            weights = torch.load(run_dir / "checkpoint.pt", weights_only=True)["agent"]
            return rows, weights, [means[1], means[0] - means[1]]

        return dict(zip(FORMS, pool.map(train, FORMS)))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--envs", nargs="+", default=["CartPole-v1"])
    parser.add_argument(
        "--options", default="", help="arguments of all runs, in one pair of quotes"
    )
    parser.add_argument("--seeds", type=int, default=3, help="seeds 1 to this")
    parser.add_argument("--jobs", type=int, default=2, help="processes at a time")
    args = parser.parse_args()

    lines, all_equal = [], True
    for env in args.envs:
        for seed in range(1, args.seeds + 1):
            runs = outcomes(env, seed, shlex.split(args.options), args.jobs)
            rows, weights, shares = runs.pop("min")
            cells = [f"{env}, seed {seed}", f"{len(rows)}"]
            for other_rows, other_weights, _ in runs.values():
                alike = sum(x == y for x, y in zip(other_rows, rows))
                equal = other_rows == rows and all(
                    torch.equal(other_weights[name], weights[name]) for name in weights
                )
                cells.append("equal" if equal else f"{alike} rows alike")
                all_equal = all_equal and equal
            lines.append([*cells, *(f"{share:.3f}" for share in shares)])
    print(table(["run", "rows", *list(FORMS)[1:], "killed", "passed"], lines))
    sys.exit(0 if all_equal else "not all are equal")
