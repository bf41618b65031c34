"""Train for very long in one process, and see that neither memory nor speed nor the files' sizes
drift.

    python benchmarks/soak.py --steps 20000000 ppo_clip.py --env CartPole-v1

All options of this program come first. Prints, as a Markdown table, what the process is like after
each twentieth of its steps, but for the last, as it may end first: its resident memory, its steps
per second since the row before, and the sizes of its files. Linux alone.
"""

import argparse
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).parent.parent

parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
)
parser.add_argument("--steps", type=int, default=20_000_000, help="environment steps")
parser.add_argument("command", nargs=argparse.REMAINDER, help="script and its arguments")
args = parser.parse_args()

print(f"`python benchmarks/soak.py --steps {args.steps} {' '.join(args.command)}`\n")
print("| steps | memory, MB | steps/s | metrics.csv, MB | checkpoint.pt, MB | return |")
print("| ---: | ---: | ---: | ---: | ---: | ---: |", flush=True)
with tempfile.TemporaryDirectory() as folder:
    run_dir = Path(folder, "run")
    options = ["--total-timesteps", str(args.steps), "--run-dir", str(run_dir), "--quiet"]
    process = subprocess.Popen(
        [sys.executable, ROOT / args.command[0], *args.command[1:], *options]
    )
    printed, last_step, last_time = 0, 0, 0.0
    while process.poll() is None:
        time.sleep(0.2)
        if not (run_dir / "metrics.csv").exists():
            continue
        with open(run_dir / "metrics.csv", "rb") as file:
            header = file.readline().decode().strip().split(",")
            file.seek(max(file.seek(0, os.SEEK_END) - 1024, 0))
            lines = file.read().decode().split("\r\n")
        row = dict(zip(header, lines[-2].split(","))) if len(lines) > 2 else {}
        if not row or int(row["global_step"]) * 20 // args.steps == printed:
            continue
        step, seconds = int(row["global_step"]), float(row["wall_time"])
        with open(f"/proc/{process.pid}/statm") as file:
            memory = int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")
        if memory == 0:  # it has ended
            break
        sizes = [(run_dir / name).stat().st_size / 1e6 for name in ("metrics.csv", "checkpoint.pt")]
        speed = (step - last_step) / (seconds - last_time)
        print(
            f"| {step:,} | {memory / 1e6:.1f} | {speed:,.0f} | {sizes[0]:.2f} | {sizes[1]:.2f} "
            f"| {float(row['episodic_return'] or 'nan'):.1f} |",
            flush=True,
        )
        printed, last_step, last_time = step * 20 // args.steps, step, seconds
    process.wait()
sys.exit(process.returncode)
