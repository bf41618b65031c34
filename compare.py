"""Run scripts or settings over several seeds and compare them: learning curves and a table.

    python compare.py --env CartPole-v1 --runs reinforce vpg trpo ppo_clip ppo_kl --seeds 10
    python compare.py --runs vpg ppo_clip "ppo_clip --clip-coef 0.05" --threshold 475
    python compare.py --read runs/CartPole-v1__vpg__* runs/CartPole-v1__trpo__*

Each run is a separate process. If a run fails, the other runs go on; the failure is reported at the
end. The folder --out holds the new runs' folders, learning_curves.png and summary.csv.

Curves show episodic_return, the mean of a run's last 100 episodes, averaged over seeds. The shade
is a 95 % bootstrap interval (percentiles, Efron 1979). It is too narrow for few seeds: with five
normally distributed returns, 84 % of the intervals contain the true mean. --statistic iqm (Agarwal
et al. 2021, arXiv 2108.13264) leaves out the worst and the best quarter of seeds, rounded down.
"""

import csv
import dataclasses
import functools
import importlib
import json
import os
import re
import shlex
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import scipy.stats
import tqdm
import tyro
from matplotlib.figure import Figure

ROOT = Path(__file__).parent
SCRIPTS = [x for x in sorted(ROOT.glob("*.py")) if "\ndef train(" in x.read_text(encoding="utf-8")]


# ---------------------------------------------- Args ----------------------------------------------
@dataclasses.dataclass
class Args:
    env: str = "CartPole-v1"  # environment of all runs
    # scripts to run, each with its arguments in the same quotes: vpg "ppo_clip --clip-coef 0.1"
    runs: tuple[str, ...] = ()
    # arguments of all runs, not shown in labels; write with an equals sign: --options="--gamma 0.9"
    options: str = ""
    seeds: int = 5  # number of seeds: 1, 2, … up to this
    total_timesteps: int | None = None  # steps of every run; None: each script's default
    read: tuple[str, ...] = ()  # folders of finished runs to compare too
    jobs: int | None = None  # parallel runs; None: the number of cores
    statistic: Literal["mean", "iqm"] = "mean"  # over the seeds: mean or interquartile mean
    # a return; the table gives the steps until the mean of the last 100 episodes reaches it
    threshold: float | None = None
    seconds: bool = True  # also draw and list seconds of training; reliable with --jobs 1
    out: str | None = None  # new or empty folder; None: comparisons/<env>__<time>
    quiet: bool = False  # show no progress bar and no table

    def __post_init__(self) -> None:
        for name in ("seeds", "total_timesteps", "jobs"):
            value, flag = getattr(self, name), f"--{name.replace('_', '-')}"
            if value is not None and value < 1:
                raise ValueError(f"{flag}: expected a number from 1, got {value}")
        if not self.runs and not self.read:
            raise ValueError("--runs: expected a script, or folders with --read, got none")
        if self.out and (os.path.isfile(self.out) or any(Path(self.out).glob("*"))):
            raise ValueError(f"--out: expected a new or empty folder, got {self.out!r}")
        plan(self, Path())
        runs = read_folders(self.read)
        envs = {run.config["env"] for run in runs} | ({self.env} if self.runs else set())
        if len(envs) > 1:
            raise ValueError(f"--read: expected runs of one environment, got {sorted(envs)}")
        if len({(run.label, run.config["seed"]) for run in runs}) < len(runs):
            raise ValueError("--read: expected runs that differ in seed or settings, got two alike")


# ---------------------------------------------- runs ----------------------------------------------
class Job(NamedTuple):
    label: str
    seed: int
    command: tuple[str, ...]
    folder: Path  # of the run; stderr goes to <folder>.log


class Run(NamedTuple):
    label: str
    config: dict[str, Any]  # what config.json says
    rows: np.ndarray  # rows of metrics.csv that have a return, one field per column


def plan(args: Args, out: Path) -> list[Job]:
    """List the runs to start. Raises ValueError for a run that is not possible or comes twice."""
    steps = () if args.total_timesteps is None else ("--total-timesteps", str(args.total_timesteps))
    jobs = []
    for label in args.runs:
        name, *own_options = shlex.split(label) or [""]
        script = ROOT / f"{name.removesuffix('.py')}.py"
        if script not in SCRIPTS:
            raise ValueError(f"--runs: expected one of {[x.stem for x in SCRIPTS]}, got {name!r}")
        options = shlex.split(args.options) + own_options  # a repeated option: the last one counts
        names = {x.split("=")[0] for x in options}
        if taken := {"--env", "--seed", "--run-dir", "--resume"} & names:
            given = " ".join(options)
            raise ValueError(f"--runs, --options: expected no {min(taken)}, got {given!r}")
        for seed in range(1, args.seeds + 1):
            folder = out / f"{re.sub(r'[^a-zA-Z0-9.]+', '_', label)}__{seed}"
            own = ("--env", args.env, "--seed", str(seed), "--run-dir", str(folder), "--quiet")
            command = (sys.executable, str(script), *steps, *options, *own)
            jobs.append(Job(label, seed, command, folder))
    if len({job.folder for job in jobs}) < len(jobs):
        raise ValueError(f"--runs: expected each once, got {args.runs}")
    return jobs


def make_run(job: Job) -> Run | str:
    """Run a job; return its Run or, if it failed, an error message."""
    log = Path(f"{job.folder}.log")
    with open(log, "w") as file:
        status = subprocess.run(job.command, stdout=subprocess.DEVNULL, stderr=file).returncode
    if status != 0:
        lines = [f"status {status}", *log.read_text(errors="replace").splitlines()]
        return f"{log}: {lines[-1]}"
    log.unlink()
    try:
        return read_run(job.folder, job.label)
    except ValueError as error:
        return str(error)


def read_run(folder: Path, label: str) -> Run:
    """Read a run's folder. Raises ValueError if the run did not finish or no episode ended."""
    try:
        config = json.loads((folder / "config.json").read_text())
        rows = np.genfromtxt(folder / "metrics.csv", delimiter=",", names=True, ndmin=1)
        if rows["global_step"][-1] < config["total_timesteps"]:
            raise ValueError(f"it ends before {config['total_timesteps']} steps")
        rows = rows[np.isfinite(rows["episodic_return"])]
        if not len(rows):
            raise ValueError("no episode ended")
        return Run(label, config, rows)
    except (OSError, LookupError, TypeError, ValueError) as error:
        raise ValueError(f"{folder} holds no finished run: {error}") from error


def read_folders(folders: tuple[str, ...]) -> list[Run]:
    """Read runs. Labels: the algorithm and the arguments in which runs of the algorithm differ."""
    runs = [read_run(Path(folder), "") for folder in folders]
    ignored = "seed run_dir resume quiet device numpy torch gymnasium gae_fast".split()
    labelled = []
    for run in runs:
        algorithm = run.config["algorithm"]
        others = [x.config for x in runs if x.config["algorithm"] == algorithm]
        settings = [x for x in run.config if x not in ignored]
        differing = [x for x in settings if any(y.get(x) != run.config[x] for y in others)]
        options = [f"--{x.replace('_', '-')} {run.config[x]}" for x in differing]
        labelled.append(run._replace(label=" ".join([algorithm, *options])))
    return labelled


# ------------------------------------ statistics over the seeds -----------------------------------
def over_seeds(values: np.ndarray, statistic: str, axis: int = 0) -> np.ndarray:
    """The mean, or the interquartile mean: without the lowest and highest n // 4 of n seeds."""
    if statistic == "mean":
        return np.mean(values, axis=axis)
    return scipy.stats.trim_mean(values, 0.25, axis=axis)


def interval(values: np.ndarray, statistic: str) -> tuple[np.ndarray, np.ndarray]:
    """The statistic's 95 % bootstrap interval, of values (seeds, …). NaN for a single seed."""
    if len(values) == 1:
        return (np.full(values.shape[1:], np.nan),) * 2
    statistics = functools.partial(over_seeds, statistic=statistic)
    options = {"n_resamples": 2000, "batch": 100, "method": "percentile", "rng": 0}
    result = scipy.stats.bootstrap((values,), statistics, axis=0, **options)
    return result.confidence_interval.low, result.confidence_interval.high


def curves(runs: list[Run], axis: str) -> tuple[np.ndarray, np.ndarray]:
    """A grid along a column of metrics.csv, (200,), and the runs' returns on it, (runs, 200).

    A run's return at a grid point is the last one logged up to there. The grid starts where all
    runs have a return and ends where the longest run ends. A shorter run keeps its last return.
    """
    ticks = [run.rows[axis] for run in runs]
    grid = np.linspace(max(x[0] for x in ticks), max(x[-1] for x in ticks), 200)
    latest = [np.searchsorted(x, grid, side="right") - 1 for x in ticks]
    return grid, np.stack([run.rows["episodic_return"][i] for run, i in zip(runs, latest)])


def draw(groups: dict[str, list[Run]], args: Args, title: str, path: Path) -> None:
    axes = {"global_step": "environment steps", "wall_time": "seconds of training"}
    figure = Figure(figsize=(11 if args.seconds else 7, 4), layout="constrained")
    panels = figure.subplots(1, 1 + args.seconds, sharey=True, squeeze=False)[0]
    for (axis, name), panel in zip(axes.items(), panels):
        for label, runs in groups.items():
            grid, returns = curves(runs, axis)
            label = f"{label} ({len(runs)} seed{'s' if len(runs) > 1 else ''})"
            (line,) = panel.plot(grid, over_seeds(returns, args.statistic), label=label)
            low, high = interval(returns, args.statistic)
            panel.fill_between(grid, low, high, color=line.get_color(), alpha=0.2, linewidth=0)
        panel.set_xlabel(name)
        panel.spines[["top", "right"]].set_visible(False)
        panel.grid(alpha=0.3)
    panels[0].set_ylabel(f"return, {args.statistic} over seeds")
    panels[0].legend(fontsize="small")
    figure.suptitle(title)
    figure.savefig(path, dpi=150)


def summarize(groups: dict[str, list[Run]], args: Args) -> list[dict[str, Any]]:
    """One row for each label: the runs' last returns and their spread, steps and seconds."""
    table = []
    columns = ["episodic_return", "global_step", "wall_time"]
    for label, runs in groups.items():
        runs = sorted(runs, key=lambda run: run.config["seed"])
        last, steps, seconds = np.array([[x.rows[name][-1] for name in columns] for x in runs]).T
        low, high = interval(last, args.statistic)
        numbers = {
            args.statistic: over_seeds(last, args.statistic),
            "low": low,
            "high": high,
            "deviation": last.std(ddof=1) if len(runs) > 1 else np.nan,
            "worst": last.min(),
            "best": last.max(),
            "steps": np.median(steps),
        }
        if args.seconds:
            numbers |= {"seconds": np.median(seconds), "steps/s": np.median(steps / seconds)}
        row = {"run": label, "seeds": len(runs)}
        for name, x in numbers.items():
            row[name] = int(x) if name in ("steps", "steps/s") else float(f"{x:.4g}")
        if args.threshold is not None:
            reached = [first_reached(run, args.threshold) for run in runs]
            row[f"reached {args.threshold:g}"] = f"{np.isfinite(reached).sum()} of {len(runs)}"
            row["after steps"] = f"{np.median(reached):.0f}"  # inf if half never reached it
        row["returns"] = " ".join(f"{x:.4g}" for x in last)
        table.append(row)
    return table


def first_reached(run: Run, threshold: float) -> float:
    """The first global_step with return ≥ threshold and ≥ 100 episodes; inf if there is none."""
    is_there = (run.rows["episodic_return"] >= threshold) & (run.rows["episodes"] >= 100)
    return np.min(run.rows["global_step"][is_there], initial=np.inf)


def markdown(table: list[dict[str, Any]]) -> str:
    ruler = ["---" if name in ("run", "returns") else "---:" for name in table[0]]
    lines = [table[0], ruler, *(row.values() for row in table)]
    return "\n".join(f"| {' | '.join(map(str, cells))} |" for cells in lines)


# --------------------------------------------- compare --------------------------------------------
def compare(args: Args) -> tuple[list[dict[str, Any]], dict[Job, str]]:
    """Run all jobs, draw the curves, write the table; return its rows and the failures."""
    read = read_folders(args.read)
    if args.runs:  # the new runs may have other settings than the runs read
        read = [run._replace(label=f"{run.label} (read)") for run in read]
    env = args.env if args.runs else read[0].config["env"]
    out = Path(args.out or f"comparisons/{env.replace(':', '-')}__{time.strftime('%Y%m%d-%H%M%S')}")
    jobs = plan(args, out)
    for job in jobs[:: args.seeds]:  # check all arguments before anything is written
        script = importlib.import_module(Path(job.command[1]).stem)
        parsed = tyro.cli(script.Args, prog=f"{script.ALGORITHM}.py", args=job.command[2:])
        try:
            script.make_envs(parsed.env, 1, parsed.vectorization_mode).close()
        except script.ArgumentError as error:
            sys.exit(f"compare.py: {error}")
    out.mkdir(parents=True, exist_ok=bool(args.out))
    pool = ThreadPoolExecutor(args.jobs or os.cpu_count())  # a thread waits for a process
    futures = [pool.submit(make_run, job) for job in jobs]
    hidden = args.quiet or not jobs
    try:
        list(tqdm.tqdm(as_completed(futures), total=len(jobs), unit="run", disable=hidden))
    finally:
        pool.shutdown(cancel_futures=True)  # Ctrl-C ends the processes; no more are started
    results = {job: future.result() for job, future in zip(jobs, futures)}
    failures = {job: x for job, x in results.items() if isinstance(x, str)}
    groups: dict[str, list[Run]] = {}
    for made in [*(x for x in results.values() if isinstance(x, Run)), *read]:
        groups.setdefault(made.label, []).append(made)
    table = summarize(groups, args)
    if table:
        draw(groups, args, env, out / "learning_curves.png")
        with open(out / "summary.csv", "w", newline="") as file:
            writer = csv.DictWriter(file, table[0])
            writer.writeheader()
            writer.writerows(table)
        if not args.quiet:
            print(f"{markdown(table)}\n\n{out / 'learning_curves.png'}")
    return table, failures


if __name__ == "__main__":
    _, failures = compare(tyro.cli(Args, description=__doc__))
    lines = [f"failed: {job.label}, seed {job.seed}: {why}" for job, why in failures.items()]
    sys.exit("\n".join(lines) or 0)
