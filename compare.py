"""Train algorithms, forms or settings over several seeds and compare them: learning curves with intervals, a table.

    python compare.py --env CartPole-v1 --runs reinforce vpg trpo ppo_clip ppo_kl --seeds 10
    python compare.py --runs vpg ppo_clip "ppo_clip --clip-coef 0.05" "ppo_clip --clip-coef 0.5" --threshold 475
    python compare.py --read runs/CartPole-v1__vpg__* runs/CartPole-v1__trpo__*

Each run is a process of its own, as many at a time as the machine has cores (--jobs 1 for seconds to rely on); one that
fails is reported, and the others go on. The folder --out then holds every run's folder, learning_curves.png and
summary.csv. Curves show episodic_return, the mean of a run's last 100 episodes, averaged over seeds, with a 95 %
bootstrap interval (Efron 1979, percentiles), which is too narrow for few seeds: of five normal ones it covers 84 %.
--statistic iqm takes the interquartile mean (Agarwal et al. 2021, arXiv 2108.13264), which leaves out the worst and the
best quarter of the seeds.
"""

import contextlib
import csv
import dataclasses
import io
import json
import math
import os
import re
import shlex
import subprocess
import sys
import time
from datetime import datetime
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import scipy.stats
import tqdm
import tyro
from matplotlib.figure import Figure

ROOT = Path(__file__).parent


@dataclasses.dataclass
class Args:
    env: str = "CartPole-v1"
    """environment of all runs"""
    runs: tuple[str, ...] = ()
    """scripts to run, each with its arguments in the same quotes: vpg "ppo_clip --clip-coef 0.1" """
    options: str = ""
    """arguments that all runs share, which the labels leave out; with an equals sign: --options="--gamma 0.9" """
    seeds: int = 5
    """train with the seeds 1 to this"""
    total_timesteps: int | None = None
    """steps of every run; None leaves each script its own default"""
    read: tuple[str, ...] = ()
    """folders of finished runs to compare too"""
    jobs: int | None = None
    """runs at a time; None makes it the number of cores"""
    statistic: Literal["mean", "iqm"] = "mean"
    """what is taken over seeds: the mean, or the interquartile mean"""
    threshold: float | None = None
    """a return; the table says when each run reached it, with at least 100 episodes behind it"""
    seconds: bool = True
    """draw the curves over the seconds of training too, which say little on a machine with other work"""
    out: str | None = None
    """folder to write, new or empty; None makes comparisons/<env>__<time>"""
    quiet: bool = False
    """show no progress bar and no table"""


class ArgumentError(ValueError):
    """An argument cannot be used; the message names it and says what was expected and what came."""


def parse_args() -> Args:
    """Read the command line. Raises ArgumentError with the first words of the box that tyro draws for a bad one."""
    try:
        with contextlib.redirect_stderr(io.StringIO()) as box:
            return tyro.cli(Args, description=__doc__)
    except SystemExit:
        if not box.getvalue():  # it was --help
            raise
        words = re.findall(r"[^\s│╮]+", re.split("[─-]{9,}", box.getvalue())[1])
        raise ArgumentError(f"{' '.join(words)} (see --help)") from None


class Job(NamedTuple):
    label: str
    seed: int
    command: tuple[str, ...]
    folder: Path  # what the run writes; its errors go to the file of this name and .log


class Run(NamedTuple):
    """What a run's folder says; steps, seconds and returns have one element for each row that has a return."""

    label: str
    seed: int
    steps: np.ndarray
    seconds: np.ndarray
    returns: np.ndarray
    reached: float  # steps after which the return was at the threshold; inf if it never was


# ---------------------------------------------------- train the runs --------------------------------------------------


def plan(args: Args, out: Path) -> list[Job]:
    """List the runs to make. Raises ArgumentError for a run that no script can make."""
    scripts = sorted(
        path.stem
        for path in ROOT.glob("*.py")
        if "\ndef train(" in path.read_text(encoding="utf-8")
    )
    shared = split_words("--options", args.options)
    jobs = []
    for label in args.runs:
        name, *own_options = split_words("--runs", label) or [""]
        options = [*shared, *own_options]  # of an argument in both, a script takes the last
        script = name.removesuffix(".py")
        if script not in scripts:
            raise ArgumentError(
                f"--runs: expected scripts out of {', '.join(scripts)}, got {name!r}"
            )
        steps = (
            [] if args.total_timesteps is None else ["--total-timesteps", str(args.total_timesteps)]
        )
        for seed in range(1, args.seeds + 1):
            folder = out / f"{re.sub(r'[^a-zA-Z0-9.]+', '_', label)}__{seed}"
            own = ("--seed", str(seed), "--run-dir", str(folder), "--quiet")
            command = (
                sys.executable,
                str(ROOT / f"{script}.py"),
                "--env",
                args.env,
                *steps,
                *options,
                *own,
            )
            jobs.append(Job(label, seed, command, folder))
    if len({job.folder for job in jobs}) < len(jobs):
        raise ArgumentError(f"--runs: expected each run once, got {list(args.runs)}")
    return jobs


def split_words(name: str, text: str) -> list[str]:
    """Split as a shell does. Raises ArgumentError, also for an argument that is not to be given here."""
    try:
        words = shlex.split(text)
    except ValueError as error:
        raise ArgumentError(
            f"{name}: expected words and closed quotes, got {text!r}: {error}"
        ) from error
    if taken := {"--env", "--seed", "--run-dir", "--quiet"} & {
        word.split("=")[0] for word in words
    }:
        raise ArgumentError(
            f"{name}: expected no {min(taken)}, which compare.py sets itself, got {text!r}"
        )
    return words


def run_all(jobs: list[Job], at_a_time: int, quiet: bool) -> dict[Job, str]:
    """Run the jobs, so many at a time; return a line of what each failed one said."""
    waiting, running, failures = list(jobs), {}, {}
    with contextlib.ExitStack() as stack:
        form = "{l_bar}{bar}| {n:.1f}/{total} runs [{elapsed}<{remaining}]"
        bar = stack.enter_context(
            tqdm.tqdm(total=len(jobs), bar_format=form, disable=quiet or not jobs)
        )
        stack.callback(lambda: [(process.kill(), process.wait()) for process in running.values()])
        while waiting or running:
            while waiting and len(running) < at_a_time:
                job = waiting.pop(0)
                with open(f"{job.folder}.log", "w") as errors:
                    running[job] = subprocess.Popen(
                        job.command, stdout=subprocess.DEVNULL, stderr=errors
                    )
            time.sleep(0.1)
            for job, process in list(running.items()):
                if process.poll() is not None:
                    del running[job]
                    log = Path(f"{job.folder}.log")
                    if process.returncode:
                        failures[job] = (
                            complaint(log.read_text(errors="replace"))
                            or f"status {process.returncode}"
                        )
                    else:
                        log.unlink()
            bar.n = (
                len(jobs)
                - len(waiting)
                - len(running)
                + sum(share_done(job.folder) for job in running)
            )
            bar.refresh()
    return failures


def complaint(log: str) -> str:
    """The last line that a run wrote, which sums up what stopped it."""
    return next((line.strip() for line in reversed(log.splitlines()) if line.strip()), "")


def share_done(folder: Path) -> float:
    """The share of its steps that a run under way has taken: 0 until it has written a row."""
    with contextlib.suppress(OSError, ValueError, KeyError):
        config = json.loads((folder / "config.json").read_text())
        with open(folder / "metrics.csv", "rb") as file:
            file.seek(max(file.seek(0, os.SEEK_END) - 4096, 0))
            last_line = file.read().decode().rstrip().split("\n")[-1]
        return min(int(last_line.split(",")[0]) / config["total_timesteps"], 1.0)
    return 0.0


# ----------------------------------------------------- read folders ---------------------------------------------------


def read_config(folder: Path) -> dict[str, Any]:
    try:
        config = json.loads((folder / "config.json").read_text())
        if not {"algorithm", "env", "seed", "total_timesteps"} <= config.keys():
            raise ValueError("config.json is not that of a run")
    except (OSError, ValueError, AttributeError) as error:
        raise ArgumentError(
            f"--read: expected folders of runs, got {str(folder)!r}: {error}"
        ) from error
    return config


def read_run(folder: Path, label: str, config: dict[str, Any], threshold: float | None) -> Run:
    """Read metrics.csv. Raises ArgumentError if it is no table of metrics, or of a run that has not ended."""
    try:
        with open(folder / "metrics.csv", newline="") as file:
            rows = [row for row in csv.DictReader(file) if row["episodic_return"]]
        if not rows:
            raise ValueError("no episode ended")
        columns = ("global_step", "wall_time", "episodic_return", "episodes")
        steps, seconds, returns, episodes = np.array(
            [[float(row[name]) for name in columns] for row in rows]
        ).T
        if steps[-1] < config["total_timesteps"]:
            raise ValueError(f"it ends after {steps[-1]:.0f} of {config['total_timesteps']} steps")
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ArgumentError(
            f"{folder / 'metrics.csv'}: expected a finished run, got none: {error}"
        ) from error
    reached = steps[(returns >= threshold) & (episodes >= 100)] if threshold is not None else []
    return Run(
        label,
        config["seed"],
        steps,
        seconds,
        returns,
        float(reached[0]) if len(reached) else math.inf,
    )


def label_configs(configs: list[dict[str, Any]]) -> list[str]:
    """Name each run after its algorithm and the arguments in which the algorithm's runs differ."""
    no_setting = {"algorithm", "seed", "run_dir", "resume", "quiet", "tensorboard", "device"}
    no_setting |= {"python", "numpy", "torch", "gymnasium", "gae_fast", "gae_fast_compiled"}
    labels = []
    for config in configs:
        others = [other for other in configs if other["algorithm"] == config["algorithm"]]
        differing = [
            name
            for name in config
            if name not in no_setting and any(other.get(name) != config[name] for other in others)
        ]
        labels.append(
            " ".join(
                [
                    config["algorithm"],
                    *(f"--{name.replace('_', '-')} {config[name]}" for name in differing),
                ]
            )
        )
    return labels


# ----------------------------------------------- statistics over the seeds --------------------------------------------


def over_seeds(values: np.ndarray, statistic: str, axis: int = 0) -> np.ndarray:
    """The mean over seeds, or the interquartile mean, which cuts off a quarter of them, rounded down, at either end."""
    return (
        np.mean(values, axis=axis)
        if statistic == "mean"
        else scipy.stats.trim_mean(values, 0.25, axis=axis)
    )


def interval(values: np.ndarray, statistic: str) -> tuple[np.ndarray, np.ndarray]:
    """The 95 % bootstrap interval of the statistic over seeds, values of shape (seeds, …); NaN for a single seed."""
    if len(values) == 1:
        return np.full(values.shape[1:], np.nan), np.full(values.shape[1:], np.nan)
    result = scipy.stats.bootstrap(
        (values,),
        lambda sample, axis: over_seeds(sample, statistic, axis),
        n_resamples=2000,
        batch=100,
        axis=0,
        method="percentile",
        rng=0,
    )
    return result.confidence_interval.low, result.confidence_interval.high


def curves(runs: list[Run], axis: str) -> tuple[np.ndarray, np.ndarray]:
    """A grid along `steps` or `seconds`, shape (200,), and the runs' returns on it, (runs, 200).

    Each run's return is the last one logged by then. The grid begins where all runs have one and ends where the last
    run ends: one that ended before keeps its return.
    """
    grid = np.linspace(
        max(getattr(run, axis)[0] for run in runs), max(getattr(run, axis)[-1] for run in runs), 200
    )
    rows = [
        run.returns[np.searchsorted(getattr(run, axis), grid, side="right") - 1] for run in runs
    ]
    return grid, np.stack(rows)


def draw(groups: dict[str, list[Run]], args: Args, env: str, path: Path) -> None:
    axes = ("steps", "seconds") if args.seconds else ("steps",)
    figure = Figure(figsize=(11 if args.seconds else 7, 4), layout="constrained")
    panels = figure.subplots(1, len(axes), sharey=True, squeeze=False)[0]
    for axis, panel in zip(axes, panels):
        for label, runs in groups.items():
            grid, returns = curves(runs, axis)
            count = f"{len(runs)} seed{'s' if len(runs) > 1 else ''}"
            (line,) = panel.plot(
                grid, over_seeds(returns, args.statistic), label=f"{label} ({count})"
            )
            panel.fill_between(
                grid,
                *interval(returns, args.statistic),
                color=line.get_color(),
                alpha=0.2,
                linewidth=0,
            )
        panel.set_xlabel({"steps": "environment steps", "seconds": "seconds of training"}[axis])
        panel.spines[["top", "right"]].set_visible(False)
        panel.grid(alpha=0.3)
    panels[0].set_ylabel(
        {"mean": "return, mean over seeds", "iqm": "return, interquartile mean over seeds"}[
            args.statistic
        ]
    )
    panels[0].legend(fontsize="small")
    figure.suptitle(env)
    figure.savefig(path, dpi=150)


def rounded(number: float) -> float:
    """To a tenth, or to three digits where that is finer: returns of 0.74 are compared as well as those of 500."""
    return float(f"{number:.1f}" if abs(number) >= 100 else f"{number:.3g}")


def summarize(groups: dict[str, list[Run]], args: Args) -> list[dict[str, Any]]:
    """One row for each label: the runs' last returns, their spread, and what they took."""
    rows = []
    for label, runs in groups.items():
        last = np.array([run.returns[-1] for run in runs])
        low, high = interval(last, args.statistic)
        row = {
            "run": label,
            "seeds": len(runs),
            args.statistic: rounded(over_seeds(last, args.statistic)),
            "low": rounded(low),
            "high": rounded(high),
            "deviation": rounded(last.std(ddof=1)) if len(runs) > 1 else float("nan"),
            "worst": rounded(last.min()),
            "best": rounded(last.max()),
            "steps": int(np.median([run.steps[-1] for run in runs])),
            "seconds": rounded(np.median([run.seconds[-1] for run in runs])),
            "steps/s": int(np.median([run.steps[-1] / run.seconds[-1] for run in runs])),
        }
        if args.threshold is not None:
            reached = np.array([run.reached for run in runs])
            row[f"reached {args.threshold:g}"] = f"{np.isfinite(reached).sum()} of {len(runs)}"
            row["after steps"] = (
                f"{np.median(reached):.0f}"  # inf where half of the runs never were there
            )
        row["returns"] = " ".join(
            f"{run.returns[-1]:.4g}" for run in sorted(runs, key=lambda run: run.seed)
        )
        rows.append(row)
    return rows


def markdown(rows: list[dict[str, Any]]) -> str:
    lines = [
        [str(cell) for cell in cells] for cells in ([*rows[0]], *(row.values() for row in rows))
    ]
    ruler = ["---" if name in ("run", "returns") else "---:" for name in rows[0]]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in (lines[0], ruler, *lines[1:]))


# -------------------------------------------------------- compare -----------------------------------------------------


def check_args(args: Args) -> None:
    for name in ("seeds", "total_timesteps", "jobs"):
        number = getattr(args, name)
        if number is not None and (type(number) is not int or number < 1):
            raise ArgumentError(
                f"--{name.replace('_', '-')}: expected a whole number, 1 or more, got {number!r}"
            )
    if not args.runs and not args.read:
        raise ArgumentError(
            "--runs: expected at least one script, or folders with --read, got none"
        )
    if args.out and Path(args.out).exists() and (Path(args.out).is_file() or os.listdir(args.out)):
        raise ArgumentError(f"--out: expected a new or empty folder, got {args.out!r}")


def compare(args: Args) -> tuple[list[dict[str, Any]], dict[Job, str]]:
    """Make the runs, draw the curves and write the table; return the table's rows, and the runs that failed.

    Raises ArgumentError, before anything is written, for an argument that cannot be used.
    """
    check_args(args)
    configs = [read_config(Path(folder)) for folder in args.read]
    env, *other_envs = sorted(
        {config["env"] for config in configs} | ({args.env} if args.runs else set())
    )
    if other_envs:
        raise ArgumentError(
            f"--read: expected runs of one environment, got {', '.join([env, *other_envs])}"
        )
    name = re.sub(r"[^\w.-]+", "-", env)
    out = Path(args.out or f"comparisons/{name}__{datetime.now():%Y%m%d-%H%M%S-%f}")
    jobs = plan(args, out)
    suffix = (
        " (read)" if jobs else ""
    )  # apart from this command's runs, whose settings may be others
    read = [
        read_run(Path(folder), label + suffix, config, args.threshold)
        for folder, label, config in zip(args.read, label_configs(configs), configs)
    ]
    if len({(run.label, run.seed) for run in read}) < len(read):
        raise ArgumentError("--read: expected runs that differ in seed or setting, got one twice")

    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ArgumentError(
            f"--out: expected a folder that can be made, got {str(out)!r}: {error}"
        ) from error
    cores = (
        len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    )
    failures = run_all(jobs, args.jobs or cores, args.quiet)
    made = []
    for job in jobs:
        if job not in failures:
            try:
                made.append(
                    read_run(job.folder, job.label, read_config(job.folder), args.threshold)
                )
            except ArgumentError as error:
                failures[job] = str(error)
    groups: dict[str, list[Run]] = {}
    for run in [*made, *read]:
        groups.setdefault(run.label, []).append(run)
    rows = summarize(groups, args)
    if rows:
        draw(groups, args, env, out / "learning_curves.png")
        with open(out / "summary.csv", "w", newline="") as file:
            writer = csv.DictWriter(file, rows[0])
            writer.writeheader()
            writer.writerows(rows)
    if not args.quiet:
        print(
            "\n".join(
                [markdown(rows), f"\n{out / 'learning_curves.png'}"]
                if rows
                else ["no run ended well"]
            )
        )
    return rows, failures


if __name__ == "__main__":
    try:
        _, failures = compare(parse_args())
    except KeyboardInterrupt:
        print(
            f"{Path(__file__).name}: interrupted; --read compares the runs that had ended",
            file=sys.stderr,
        )
        sys.exit(130)
    except ArgumentError as error:
        sys.exit(f"{Path(__file__).name}: {error}")
    if failures:
        sys.exit(
            "\n".join(
                f"failed: {job.label}, seed {job.seed}: {said}" for job, said in failures.items()
            )
        )
