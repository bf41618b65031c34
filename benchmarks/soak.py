"""Train for long in one process, and print its memory, speed and files' sizes as a Markdown table.

    python benchmarks/soak.py --steps 5000000 ppo_clip.py --env CartPole-v1

All options of this program come first. There is a row after each tenth of the steps but for the
last, as the process may end first. steps/s are those since the row before. Linux alone.
"""

import argparse
import csv
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from common import ROOT, table

if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--steps", type=int, default=5_000_000, help="environment steps")
    parser.add_argument("command", nargs=argparse.REMAINDER, help="script and its arguments")
    args = parser.parse_args()

    rows, last_step, last_time = [], 0, 0.0
    with tempfile.TemporaryDirectory() as folder:
        run_dir = Path(folder, "run")
        options = ["--total-timesteps", str(args.steps), "--run-dir", str(run_dir), "--quiet"]
        script, *own = args.command
        process = subprocess.Popen([sys.executable, ROOT / script, *own, *options])
        while process.poll() is None:
            time.sleep(0.5)
            if not (run_dir / "metrics.csv").exists():
                continue
            with open(run_dir / "metrics.csv", newline="") as file:
                metrics = list(csv.DictReader(file))[:-1]  # without the one that is being written
            with open(f"/proc/{process.pid}/statm") as file:
                memory = int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 1e6
            tenths = int(metrics[-1]["global_step"]) * 10 // args.steps if metrics else 0
            if tenths <= len(rows) or memory == 0:  # 0: it has ended
                continue
            step, seconds = int(metrics[-1]["global_step"]), float(metrics[-1]["wall_time"])
            names = ("metrics.csv", "checkpoint.pt")
            sizes = [f"{(run_dir / name).stat().st_size / 1e6:.2f}" for name in names]
            speed = (step - last_step) / (seconds - last_time)
            rows.append([f"{step:,}", f"{memory:.1f}", f"{speed:,.0f}", *sizes])
            last_step, last_time = step, seconds
    print(table(["steps", "memory, MB", "steps/s", "metrics.csv, MB", "checkpoint.pt, MB"], rows))
    sys.exit(process.returncode)
