"""compare.py: real runs of a few seconds, their curves and table; and made-up folders whose numbers are known."""

import csv
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

import compare
from compare import Args, ArgumentError, Run

ROOT = Path(__file__).parent.parent


@pytest.fixture(autouse=True)
def in_empty_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def make_folder(name, returns, algorithm="vpg", seed=1, env="CartPole-v1", **config):
    """A run's folder whose row i has 100 (i + 1) steps, 60 (i + 1) episodes and i + 1 seconds."""
    Path(name).mkdir(parents=True)
    Path(name, "config.json").write_text(
        json.dumps({"total_timesteps": 100, "algorithm": algorithm, "env": env, "seed": seed, **config})
    )
    with open(Path(name, "metrics.csv"), "w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["global_step", "wall_time", "episodes", "episodic_return"])
        writer.writerows([100 * (i + 1), i + 1, 60 * (i + 1), value] for i, value in enumerate(returns))


def is_picture(path):
    return Path(path).read_bytes().startswith(b"\x89PNG\r\n\x1a\n") and Path(path).stat().st_size > 10_000


def test_trains_reads_draws_and_survives_a_failed_run():
    runs = ("vpg", "ppo_clip --clip-coef 0.05", "ppo_clip --no-such-flag")
    args = Args(runs=runs, seeds=2, total_timesteps=2500, out="out", threshold=1.0, quiet=True)
    rows, failures = compare.compare(args)
    assert [row["run"] for row in rows] == ["vpg", "ppo_clip --clip-coef 0.05"]
    assert {(job.label, job.seed) for job in failures} == {
        ("ppo_clip --no-such-flag", 1),
        ("ppo_clip --no-such-flag", 2),
    }
    assert all("--no-such-flag" in said for said in failures.values())
    for row, folder in zip(rows, ("vpg", "ppo_clip_clip_coef_0.05")):
        last = []
        for seed in (1, 2):
            config = json.loads(Path("out", f"{folder}__{seed}", "config.json").read_text())
            assert config["seed"] == seed and config["total_timesteps"] == 2500
            with open(Path("out", f"{folder}__{seed}", "metrics.csv"), newline="") as file:
                last.append(list(csv.DictReader(file))[-1])
        returns = [float(x["episodic_return"]) for x in last]
        assert row["mean"] == pytest.approx(np.mean(returns), abs=0.05) and row["seeds"] == 2
        assert row["deviation"] == pytest.approx(np.std(returns, ddof=1), abs=0.05)
        assert (row["worst"], row["best"]) == pytest.approx((min(returns), max(returns)), abs=0.05)
        assert row["steps"] == int(np.median([int(x["global_step"]) for x in last])) and row["reached 1"] == "2 of 2"
    with open("out/summary.csv", newline="") as file:
        assert list(csv.DictReader(file)) == [{name: str(value) for name, value in row.items()} for row in rows]
    assert is_picture("out/learning_curves.png")
    assert {path.name for path in Path("out").glob("*.log")} == {
        f"ppo_clip_no_such_flag__{seed}.log" for seed in (1, 2)
    }


def test_command_line_prints_the_table_and_what_failed():
    make_folder("a", [10, 20])
    command = [sys.executable, ROOT / "compare.py", "--read", "a", "--runs", "vpg --gamma 2", "--seeds", "1"]
    run = subprocess.run(command, capture_output=True, text=True)
    assert run.returncode == 1
    assert "| vpg (read) | 1 | 20.0 | nan | nan |" in run.stdout and "learning_curves.png" in run.stdout
    assert run.stderr.strip().split("\n")[-1] == (
        "failed: vpg --gamma 2, seed 1: vpg.py: --gamma: expected a number in [0, 1], got 2.0"
    )
    assert "1.0/1 runs" in run.stderr


def test_shared_options_reach_every_run_and_no_label():
    runs = ["vpg", "ppo_clip --gamma 0.7"]
    command = [sys.executable, ROOT / "compare.py", "--runs", *runs, "--options=--num-envs 3 --gamma 0.8"]
    command += ["--seeds", "1", "--total-timesteps", "500", "--out", "out", "--quiet"]
    subprocess.run(command, check=True)
    configs = [json.loads(path.read_text()) for path in sorted(Path("out").glob("*/config.json"))]
    assert [(x["algorithm"], x["num_envs"], x["gamma"]) for x in configs] == [("ppo_clip", 3, 0.7), ("vpg", 3, 0.8)]
    with open("out/summary.csv", newline="") as file:
        assert [row["run"] for row in csv.DictReader(file)] == runs


def test_complaint_is_the_line_that_says_what_is_wrong():
    assert compare.complaint("a warning\nTraceback …\n  File …\nKeyError: 'x'\n") == "KeyError: 'x'"
    assert compare.complaint("") == ""


def test_folders_are_labelled_by_what_differs_and_grouped_by_it():
    for seed in (1, 2):
        make_folder(f"a{seed}", [1, 2], seed=seed, gamma=0.9, lr=1, python=f"3.{seed}", run_dir=f"a{seed}")
        make_folder(f"b{seed}", [3, 4 + seed], seed=seed, gamma=0.99, lr=1, run_dir=f"b{seed}")
        make_folder(f"c{seed}", [5, 6], "trpo", seed=seed, gamma=0.5)
    rows, failures = compare.compare(Args(read=("a1", "b1", "c1", "c2", "b2", "a2"), seconds=False, quiet=True))
    assert not failures and [row["run"] for row in rows] == ["vpg --gamma 0.9", "vpg --gamma 0.99", "trpo"]
    assert [row["returns"] for row in rows] == ["2 2", "5 6", "6 6"]
    (folder,) = Path("comparisons").iterdir()
    assert folder.name.startswith("CartPole-v1__") and is_picture(folder / "learning_curves.png")
    width = int.from_bytes((folder / "learning_curves.png").read_bytes()[16:20], "big")
    assert width == 7 * 150  # one panel, without that over seconds


def test_threshold_is_reached_where_the_return_is_and_a_hundred_episodes_lie_behind():
    make_folder("a", [1, 9, 3], seed=1)
    make_folder("b", [9, 9, 9], seed=2)
    make_folder("c", [1, 2, 3], seed=3)
    (row,), _ = compare.compare(Args(read=("a", "b", "c"), threshold=9.0, quiet=True))
    assert row["reached 9"] == "2 of 3" and row["after steps"] == "200"  # 200, 200 and never
    (row,), _ = compare.compare(Args(read=("b",), threshold=9.0, quiet=True))
    assert row["reached 9"] == "1 of 1" and row["after steps"] == "200"  # after 100 steps, 60 episodes
    (row,), _ = compare.compare(Args(read=("a", "c"), threshold=9.0, quiet=True))
    assert row["reached 9"] == "1 of 2" and row["after steps"] == "inf"


def test_curves_hold_the_last_value_logged_by_then():
    slow = Run("x", 1, np.array([10, 20, 30]), np.array([1.0, 2, 3]), np.array([5.0, 6, 7]), 0)
    fast = Run("x", 2, np.array([12, 16, 20]), np.array([0.5, 1, 1.5]), np.array([0.0, 1, 2]), 0)
    grid, returns = compare.curves([slow, fast], "steps")
    assert grid[0] == 12 and grid[-1] == 30 and returns.shape == (2, 200)
    for i, step in enumerate(grid):
        assert returns[0, i] == (5 if step < 20 else 6 if step < 30 else 7)
        assert returns[1, i] == (0 if step < 16 else 1 if step < 20 else 2)
    assert compare.curves([slow, fast], "seconds")[0][[0, -1]].tolist() == [1, 3]


def test_interquartile_mean_leaves_out_a_quarter_at_either_end():
    values = np.array([[-100.0, 0], [1, 0], [2, 0], [3, 0], [3, 0], [4, 0], [5, 0], [900, 0]])
    assert compare.over_seeds(values, "iqm").tolist() == [(2 + 3 + 3 + 4) / 4, 0]
    assert compare.over_seeds(values, "mean").tolist() == values.mean(axis=0).tolist()


@pytest.mark.parametrize(("statistic", "seeds", "coverage"), [("mean", 5, 0.84), ("mean", 20, 0.93), ("iqm", 20, 0.95)])
def test_interval_covers_the_truth_about_as_often_as_it_says(statistic, seeds, coverage):
    """Of 500 samples from a normal distribution; for few seeds less often, as the docstring has it."""
    samples = np.random.default_rng(0).standard_normal((seeds, 500)) + 3
    low, high = compare.interval(samples, statistic)
    assert np.mean((low < 3) & (high > 3)) == pytest.approx(coverage, abs=0.04)
    again = compare.interval(samples, statistic)
    assert np.array_equal(low, again[0]) and np.array_equal(high, again[1])
    assert np.isnan(compare.interval(samples[:1], statistic)).all()


REFUSED = [
    ("--runs", {}),
    ("--runs", {"runs": ("vgp",)}),
    ("--runs", {"runs": ("",)}),
    ("--runs", {"runs": ("vpg", "vpg")}),
    ("--runs", {"runs": ("vpg --seed 3",)}),
    ("--runs", {"runs": ("vpg '",)}),
    ("--runs", {"runs": ("vpg --run-dir=x",)}),
    ("--options", {"runs": ("vpg",), "options": "--gamma 0.9 --seed 3"}),
    ("--options", {"runs": ("vpg",), "options": '"--gamma'}),
    ("--seeds", {"runs": ("vpg",), "seeds": 0}),
    ("--jobs", {"runs": ("vpg",), "jobs": -1}),
    ("--total-timesteps", {"runs": ("vpg",), "total_timesteps": 0}),
    ("--read", {"read": ("nowhere",)}),
    ("--read", {"read": ("here", "there")}),
    ("--read", {"read": ("here", "here")}),
    ("--read", {"read": ("foreign",)}),
    ("--out", {"read": ("here",), "out": "here"}),
    ("--out", {"read": ("here",), "out": "here/config.json/below"}),
    ("empty/metrics.csv", {"read": ("empty",)}),
    ("killed/metrics.csv", {"read": ("killed",)}),
]


@pytest.mark.parametrize(("name", "options"), REFUSED)
def test_refused_argument_is_named_and_leaves_nothing(name, options):
    make_folder("here", [1, 2])
    make_folder("there", [1, 2], env="Acrobot-v1")
    make_folder("empty", ["", ""])
    make_folder("killed", [1, 2], total_timesteps=1000)
    make_folder("foreign", [1, 2])
    Path("foreign/config.json").write_text("[]")
    before = sorted(Path.cwd().rglob("*"))
    with pytest.raises(ArgumentError, match=f"^{name}: expected .*, got "):
        compare.compare(Args(quiet=True, **options))
    assert sorted(Path.cwd().rglob("*")) == before


def test_run_without_an_episode_is_reported():
    args = Args(env="Pendulum-v1", runs=("vpg",), seeds=1, total_timesteps=1000, out="out", quiet=True)
    rows, failures = compare.compare(args)
    assert rows == [] and list(failures.values()) == [
        "out/vpg__1/metrics.csv: expected a finished run, got none: no episode ended"
    ]


@pytest.mark.skipif(os.name != "posix", reason="signals of POSIX")
def test_ctrl_c_ends_it_and_its_runs_in_one_line(tmp_path):
    """SIGINT to the whole group, as a terminal sends it."""
    command = [sys.executable, ROOT / "compare.py", "--runs", "vpg", "--jobs", "2", "--quiet"]
    heed = lambda: signal.signal(signal.SIGINT, signal.default_int_handler)  # noqa: E731  what runs behind & ignores it
    pipe = {"stderr": subprocess.PIPE, "text": True}
    process = subprocess.Popen([*command, "--out", tmp_path / "out"], **pipe, start_new_session=True, preexec_fn=heed)
    while not list(tmp_path.glob("out/*/metrics.csv")):
        assert process.poll() is None
        time.sleep(0.05)
    os.killpg(process.pid, signal.SIGINT)
    _, complaint = process.communicate(timeout=60)
    assert process.returncode == 130 and complaint.startswith("compare.py: interrupted") and complaint.count("\n") == 1
    with pytest.raises(ProcessLookupError):
        os.killpg(process.pid, 0)


@pytest.mark.parametrize(
    "arguments", [["--seeds", "x"], ["--no-such-flag"], ["--statistic", "median"], ["--seeds", "0"]]
)
def test_command_line_refuses_in_one_line(arguments, tmp_path):
    command = [sys.executable, ROOT / "compare.py", "--runs", "vpg", *arguments]
    run = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert run.returncode == 1 and run.stdout == "" and run.stderr.count("\n") == 1
    assert run.stderr.startswith("compare.py: ") and arguments[0] in run.stderr and not list(tmp_path.iterdir())
