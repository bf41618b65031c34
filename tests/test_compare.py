"""compare.py: short runs, their curves and table; and made-up folders whose numbers are known."""

import csv
import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest

import compare
from compare import Args, Job, Run

ROOT = Path(__file__).parent.parent


@pytest.fixture(autouse=True)
def in_empty_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def make_folder(name, returns, algorithm="vpg", seed=1, env="CartPole-v1", **config):
    """A run's folder. Its row i has 100 (i + 1) steps, 60 (i + 1) episodes and i + 1 seconds."""
    Path(name).mkdir(parents=True)
    config = {"total_timesteps": 100, "algorithm": algorithm, "env": env, "seed": seed, **config}
    Path(name, "config.json").write_text(json.dumps(config))
    with open(Path(name, "metrics.csv"), "w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["global_step", "wall_time", "episodes", "episodic_return"])
        for i, value in enumerate(returns, 1):
            writer.writerow([100 * i, i, 60 * i, value])


def make_run(returns, steps=None, seconds=None, label="x", seed=1):
    n = len(returns)
    table = {
        "global_step": np.arange(1.0, n + 1) if steps is None else steps,
        "wall_time": np.arange(1.0, n + 1) if seconds is None else seconds,
        "episodes": np.full(n, 100),
        "episodic_return": returns,
    }
    rows = np.rec.fromarrays([np.array(x, float) for x in table.values()], names=[*table])
    return Run(label, {"seed": seed, "env": "CartPole-v1"}, rows)


def is_picture(path):
    content = Path(path).read_bytes()
    return content.startswith(b"\x89PNG\r\n\x1a\n") and len(content) > 10_000


def test_trains_draws_and_goes_on_when_a_run_fails():
    """The command line."""
    labels = ["vpg --value-learning-rate 1e30", "ppo_clip --gamma 0.7"]
    command = [sys.executable, ROOT / "compare.py", "--runs", *labels, "--seeds", "1"]
    command += ["--options=--num-envs 4 --gamma 0.8", "--total-timesteps", "2000", "--out", "out"]
    said = subprocess.run(command, capture_output=True, text=True)
    log = "out/vpg_value_learning_rate_1e30__1.log"
    why = Path(log).read_text().split("\n")[-2]
    assert said.returncode == 1 and why.startswith("FloatingPointError: iteration ")
    assert said.stderr.endswith(f"\nfailed: vpg --value-learning-rate 1e30, seed 1: {log}: {why}\n")
    assert "2/2" in said.stderr
    folder = Path("out/ppo_clip_gamma_0.7__1")
    config = json.loads((folder / "config.json").read_text())
    wanted = {"algorithm": "ppo_clip", "seed": 1, "total_timesteps": 2000}
    assert config == config | wanted | {"num_envs": 4, "gamma": 0.7}
    with open(folder / "metrics.csv", newline="") as file:
        *_, last = csv.DictReader(file)
    with open("out/summary.csv", newline="") as file:
        (row,) = csv.DictReader(file)
    assert row["run"] == labels[1] and row["seeds"] == "1" and row["steps"] == last["global_step"]
    assert row["returns"] == f"{float(last['episodic_return']):.4g}"
    assert {x.name for x in Path("out").iterdir()} == {
        "vpg_value_learning_rate_1e30__1",
        "vpg_value_learning_rate_1e30__1.log",
        "ppo_clip_gamma_0.7__1",
        "learning_curves.png",
        "summary.csv",
    }
    assert is_picture("out/learning_curves.png")
    heads, ruler, cells, _, picture = said.stdout.strip().split("\n")
    assert heads == f"| {' | '.join(row)} |" and cells == f"| {' | '.join(row.values())} |"
    assert picture == "out/learning_curves.png" and set(ruler) == set("|-: ")


def test_plan_has_every_run_with_every_seed():
    """Of an argument given twice, a script takes the last."""
    args = Args(env="X-v0", runs=("vpg", "trpo.py --gamma 0.7"), options="--gamma 0.8", seeds=2)
    jobs = compare.plan(args, Path("out"))
    assert [(job.label, job.seed, job.folder.as_posix()) for job in jobs] == [
        ("vpg", 1, "out/vpg__1"),
        ("vpg", 2, "out/vpg__2"),
        ("trpo.py --gamma 0.7", 1, "out/trpo.py_gamma_0.7__1"),
        ("trpo.py --gamma 0.7", 2, "out/trpo.py_gamma_0.7__2"),
    ]
    words = "--gamma 0.8 --gamma 0.7 --env X-v0 --seed 2 --run-dir out/trpo.py_gamma_0.7__2 --quiet"
    assert jobs[3].command == (sys.executable, str(ROOT / "trpo.py"), *words.split())
    args = Args(runs=("vpg --total-timesteps 7",), total_timesteps=9)
    command = " ".join(compare.plan(args, Path("out"))[0].command)
    assert "--total-timesteps 9 --total-timesteps 7 --env CartPole-v1" in command


def test_table_says_what_the_last_returns_are_over_seeds():
    """To four digits, but steps to the last one."""
    returns, steps, seconds = [3.0, 1.0, 2.0, 1e6 / 3], [700001, 700001, 700003, 9], [3, 4, 5, 6]
    zipped = zip(returns, steps, seconds)
    runs = [make_run([0, r], [1, s], [1, t], seed=9 - i) for i, (r, s, t) in enumerate(zipped)]
    (row,) = compare.summarize({"x": runs[:3]}, Args(read=(), runs=("vpg",)))
    low, high = compare.interval(np.array([3.0, 1.0, 2.0]), "mean")
    rates = 700001 / 4
    assert (row["run"], row["seeds"], row["returns"]) == ("x", 3, "2 1 3")  # by their seeds
    assert (row["mean"], row["deviation"], row["worst"], row["best"]) == (2, 1, 1, 3)
    assert (row["low"], row["high"]) == pytest.approx((low, high), rel=1e-3)
    assert (row["steps"], row["seconds"], row["steps/s"]) == (700001, 4, int(rates))
    (row,) = compare.summarize({"x": runs}, Args(runs=("vpg",), statistic="iqm"))
    assert row["iqm"] == 2.5 and row["best"] == 333300 and "mean" not in row


@pytest.mark.parametrize("at_a_time", [1, 3])
def test_so_many_runs_at_a_time_as_jobs_says(at_a_time, monkeypatch):
    """Their results go into the table with those read, in the order of the arguments."""
    make_folder("there", [10, 20])
    together = threading.Barrier(at_a_time)
    running, most = [], []

    def make_run_of(job):
        running.append(job)
        together.wait(timeout=20)  # for the others, or this raises
        time.sleep(0.05)
        most.append(len(running))
        running.remove(job)
        assert job.folder.parent.is_dir()
        return make_run([7, 8 + job.seed], label=job.label, seed=job.seed)

    monkeypatch.setattr(compare, "make_run", make_run_of)
    args = Args(runs=("trpo", "vpg"), seeds=3, read=("there",), jobs=at_a_time, quiet=True)
    table, failures = compare.compare(args)
    assert max(most) == at_a_time and failures == {}
    assert [row["run"] for row in table] == ["trpo", "vpg", "vpg (read)"]
    assert [row["returns"] for row in table] == ["9 10 11", "9 10 11", "20"]
    assert np.isnan(table[2]["low"]) and table[2]["mean"] == 20


def test_what_stops_a_run_is_its_failure():
    """Programs that end otherwise than with a finished run."""

    def failure(program):
        Path("out").mkdir(exist_ok=True)
        return compare.make_run(Job("x", 1, (sys.executable, "-c", program), Path("out/x")))

    assert failure("1 / 0") == "out/x.log: ZeroDivisionError: division by zero"
    assert failure("exit(3)") == "out/x.log: status 3" and Path("out/x.log").exists()
    assert failure("print('well')").startswith("out/x holds no finished run: ")
    assert not Path("out/x.log").exists()
    make_folder("out/x", ["", ""])
    assert failure("") == "out/x holds no finished run: no episode ended"


def test_folders_are_labelled_by_what_differs_and_grouped_by_it(monkeypatch):
    axes, curves = set(), compare.curves
    monkeypatch.setattr(compare, "curves", lambda x, axis: (axes.add(axis), curves(x, axis))[1])
    for seed in (2, 1):
        same = {"seed": seed, "lr": 1, "torch": f"2.{seed}"}
        make_folder(f"a{seed}", [1, 2], gamma=0.9, run_dir=f"a{seed}", **same)
        make_folder(f"b{seed}", [3, 4 + seed], gamma=0.99, run_dir=f"b{seed}", **same)
        make_folder(f"c{seed}", [5, 6], "trpo", seed=seed, gamma=0.5)
    read = ("a1", "b2", "c1", "c2", "b1", "a2")
    table, failures = compare.compare(Args(read=read, seconds=False, quiet=True))
    assert not failures
    assert [row["run"] for row in table] == ["vpg --gamma 0.9", "vpg --gamma 0.99", "trpo"]
    assert [row["returns"] for row in table] == ["2 2", "5 6", "6 6"]
    (folder,) = Path("comparisons").iterdir()
    assert folder.name.startswith("CartPole-v1__") and is_picture(folder / "learning_curves.png")
    width = int.from_bytes((folder / "learning_curves.png").read_bytes()[16:20], "big")
    assert width == 7 * 150 and axes == {"global_step"}  # no panel over seconds
    assert "steps" in table[0] and not {"seconds", "steps/s"} & {*table[0]}


def test_threshold_is_reached_where_the_return_is_and_a_hundred_episodes_lie_behind():
    make_folder("a", [1, 9, 3], seed=1)
    make_folder("b", [9, 9, 9], seed=2)  # after 100 steps of only 60 episodes
    make_folder("c", [1, 2, 3], seed=3)
    for folders, count, after in [("abc", "2 of 3", "200"), ("b", "1 of 1", "200")]:
        runs = compare.read_folders(tuple(folders))
        (row,) = compare.summarize({"x": runs}, Args(read=("a",), threshold=9.0))
        assert (row["reached 9"], row["after steps"]) == (count, after)
    runs = compare.read_folders(("a", "c"))
    (row,) = compare.summarize({"x": runs}, Args(read=("a",), threshold=9.0))
    assert (row["reached 9"], row["after steps"]) == ("1 of 2", "inf")


def test_curves_hold_the_last_value_logged_by_then():
    slow = make_run([5, 6, 7], [10, 20, 30], [1, 2, 3])
    fast = make_run([0, 1, 2], [12, 16, 20], [0.5, 1, 1.5])
    grid, returns = compare.curves([slow, fast], "global_step")
    assert grid[0] == 12 and grid[-1] == 30 and returns.shape == (2, 200)
    for i, step in enumerate(grid):
        assert returns[0, i] == (5 if step < 20 else 6 if step < 30 else 7)
        assert returns[1, i] == (0 if step < 16 else 1 if step < 20 else 2)
    assert compare.curves([slow, fast], "wall_time")[0][[0, -1]].tolist() == [1, 3]


def test_interquartile_mean_leaves_out_a_quarter_at_either_end():
    values = np.array([[-100.0, 0], [1, 0], [2, 0], [3, 0], [3, 0], [4, 0], [5, 0], [900, 0]])
    assert compare.over_seeds(values, "iqm").tolist() == [(2 + 3 + 3 + 4) / 4, 0]
    assert compare.over_seeds(values, "mean").tolist() == values.mean(axis=0).tolist()


@pytest.mark.parametrize(
    ("statistic", "seeds", "coverage"), [("mean", 5, 0.84), ("mean", 20, 0.93), ("iqm", 20, 0.95)]
)
def test_interval_covers_the_truth_about_as_often_as_it_says(statistic, seeds, coverage):
    """Of 500 samples from a normal distribution. For few seeds it is less often."""
    samples = np.random.default_rng(0).standard_normal((seeds, 500)) + 3
    low, high = compare.interval(samples, statistic)
    assert np.mean((low < 3) & (high > 3)) == pytest.approx(coverage, abs=0.04)
    again = compare.interval(samples, statistic)
    assert np.array_equal(low, again[0]) and np.array_equal(high, again[1])
    assert np.isnan(compare.interval(samples[:1], statistic)).all()


REFUSED = [
    ("--runs: expected a script, or folders with --read", {}),
    ("--runs: expected one of .*, got 'vgp'", {"runs": ("vgp",)}),
    ("--runs: expected one of .*, got 'compare'", {"runs": ("compare",)}),
    ("--runs: expected one of .*, got ''", {"runs": ("",)}),
    ("--runs: expected each once", {"runs": ("vpg", "vpg")}),
    ("--runs, --options: expected no --seed", {"runs": ("vpg --seed 3",)}),
    ("--runs, --options: expected no --run-dir", {"runs": ("vpg --run-dir=x",)}),
    ("--runs, --options: expected no --env", {"runs": ("vpg",), "options": "--gamma 0.9 --env X"}),
    ("No closing quotation", {"runs": ("vpg '",)}),
    ("No closing quotation", {"runs": ("vpg",), "options": '"--gamma'}),
    ("--seeds: expected a number from 1, got 0", {"runs": ("vpg",), "seeds": 0}),
    ("--jobs: expected a number from 1, got -1", {"runs": ("vpg",), "jobs": -1}),
    ("--total-timesteps: expected a number from 1", {"runs": ("vpg",), "total_timesteps": 0}),
    ("nowhere holds no finished run: .*No such file", {"read": ("nowhere",)}),
    ("foreign holds no finished run", {"read": ("foreign",)}),
    ("empty holds no finished run: no episode ended", {"read": ("empty",)}),
    ("headless holds no finished run", {"read": ("headless",)}),
    ("killed holds no finished run: it ends before 1000", {"read": ("here", "killed")}),
    ("--read: expected runs of one environment", {"read": ("here", "there")}),
    ("--read: expected runs of one environment", {"read": ("there",), "runs": ("vpg",)}),
    ("--read: expected runs that differ in seed or settings", {"read": ("here", "here")}),
    ("--out: expected a new or empty folder, got 'here'", {"read": ("here",), "out": "here"}),
    ("--out: expected .*, got 'file'", {"read": ("here",), "out": "file"}),
]


def test_bad_argument_is_named():
    make_folder("here", [1, 2])
    make_folder("there", [1, 2], env="Acrobot-v1")
    make_folder("empty", ["", ""])
    make_folder("headless", [])
    make_folder("killed", [1, 2], seed=2, total_timesteps=1000)
    make_folder("foreign", [1, 2])
    Path("foreign/config.json").write_text("[]")
    Path("file").touch()
    for message, options in REFUSED:
        with pytest.raises(ValueError, match=f"^{message}"):
            Args(**options)
    Args(runs=("vpg.py",), read=("here",), out="new")


def test_script_refuses_its_arguments_before_anything_is_written(capsys):
    for label, said in [("vpg --gamma 2", "--gamma: expected"), ("vpg --no-such 2", "--no-such")]:
        with pytest.raises(SystemExit) as exit:
            compare.compare(Args(runs=("ppo_clip", label), seeds=2))
        assert exit.value.code == 2 and said in capsys.readouterr().err
        assert not os.listdir()


@pytest.mark.skipif(os.name != "posix", reason="signals of POSIX")
def test_ctrl_c_ends_it_and_its_runs(tmp_path):
    """SIGINT to the whole group, as a terminal sends it."""
    command = [sys.executable, ROOT / "compare.py", "--runs", "vpg", "--jobs", "2", "--quiet"]
    command += ["--seeds", "4", "--total-timesteps", "2000000"]
    process = subprocess.Popen(
        [*command, "--out", tmp_path / "out"],
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        # What runs behind & ignores the signal, and so do its children.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )
    while len(list(tmp_path.glob("out/*/metrics.csv"))) < 2:  # both processes have begun
        assert process.poll() is None
        time.sleep(0.05)
    os.killpg(process.pid, signal.SIGINT)
    _, complaint = process.communicate(timeout=60)
    assert process.returncode == -signal.SIGINT and complaint.endswith("KeyboardInterrupt\n")
    assert sorted(x.name for x in tmp_path.glob("out/*.log")) == ["vpg__1.log", "vpg__2.log"]
    with pytest.raises(ProcessLookupError):
        os.killpg(process.pid, 0)
