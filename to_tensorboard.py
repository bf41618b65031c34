"""Write a run's metrics.csv as TensorBoard event files into its folder, also while the run goes on.

    pip install tensorboard
    python to_tensorboard.py runs/NAME & tensorboard --logdir runs
    python to_tensorboard.py --no-follow runs/*

It reads metrics.csv only, so it changes nothing about a run. Tags are CleanRL's. Ctrl-C ends it.
"""

import csv
import dataclasses
import importlib.util
import json
import time
from pathlib import Path

import tyro

CHARTS = "wall_time episodes episodic_return episodic_length SPS learning_rate".split()


@dataclasses.dataclass
class Args:
    runs: tyro.conf.Positional[tuple[str, ...]]  # folders of runs
    follow: bool = True  # wait for further rows until every run has all its steps
    seconds: float = 2.0  # how long to wait between two looks

    def __post_init__(self) -> None:
        for folder in self.runs:
            if not Path(folder, "config.json").is_file():
                raise ValueError(f"runs: expected the folder of a run, got {folder!r}")
        if not importlib.util.find_spec("tensorboard"):
            raise ValueError(
                "expected the package tensorboard, found none: pip install tensorboard"
            )


def write(args: Args) -> dict[str, int]:
    """Write the rows of all runs, each once; return how many of each run there were."""
    from torch.utils.tensorboard import SummaryWriter  # slow

    totals = {
        x: json.loads(Path(x, "config.json").read_text())["total_timesteps"] for x in args.runs
    }
    writers = {folder: SummaryWriter(folder, purge_step=0) for folder in args.runs}
    counts = dict.fromkeys(args.runs, 0)
    going_on = set(args.runs)
    while going_on:
        for folder in sorted(going_on):
            text = Path(folder, "metrics.csv").read_text()
            whole = text[: text.rfind("\n") + 1]  # without a row that is being written
            rows = list(csv.DictReader(whole.splitlines()))
            for row in rows[counts[folder] :]:
                step = int(row["global_step"])
                for name in [x for x in row if x != "global_step" and row[x]]:
                    tag = f"{'charts' if name in CHARTS else 'losses'}/{name}"
                    writers[folder].add_scalar(tag, float(row[name]), step)
            counts[folder] = len(rows)
            writers[folder].flush()
            is_done = bool(rows) and int(rows[-1]["global_step"]) >= totals[folder]
            if is_done or not args.follow:
                writers[folder].close()
                going_on.remove(folder)
        if going_on:
            time.sleep(args.seconds)
    return counts


if __name__ == "__main__":
    try:
        for folder, count in write(tyro.cli(Args, description=__doc__)).items():
            print(f"{folder}: {count} rows")
    except KeyboardInterrupt:
        pass
