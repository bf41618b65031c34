"""What a run withstands: kills, bad input, bad numbers, broken environments; all five scripts."""

import csv
import dataclasses
import gc
import importlib
import json
import math
import multiprocessing
import os
import pickle
import random
import re
import runpy
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
import toys

ROOT = Path(__file__).parent.parent
NAMES = ("reinforce", "vpg", "trpo", "ppo_clip", "ppo_kl")
SCRIPTS = {name: importlib.import_module(name) for name in NAMES}
each_script = pytest.mark.parametrize("script", SCRIPTS.values(), ids=SCRIPTS)
on_posix = pytest.mark.skipif(os.name != "posix", reason="signals of POSIX")
NORMS = {"norm_obs": True, "norm_reward": True}


@pytest.fixture(autouse=True)
def in_empty_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def arguments(script, **options):
    """Args of a run of 600 steps, in rollouts of 48 steps or of three episodes."""
    short = {"total_timesteps": 600, "num_envs": 3, "num_steps": 16, "num_minibatches": 2}
    names = {field.name for field in dataclasses.fields(script.Args)}
    short = {name: value for name, value in short.items() if name in names}
    return script.Args(**{**short, "quiet": True, **options})


def resumed(script, folder, **changes):
    return script.train(script.Args(**{**script.load_checkpoint(folder)["args"], **changes}))


def leaves(tree, path=""):
    """What a tree of dicts and lists holds, by its path; what a clock put into it is left out."""
    if isinstance(tree, dict | list):
        items = tree.items() if isinstance(tree, dict) else enumerate(tree)
        parts = [leaves(x, f"{path}/{key}") for key, x in items if key not in ("wall_time", "SPS")]
        return {key: value for part in parts for key, value in part.items()}
    return {path: tree.tolist() if isinstance(tree, torch.Tensor) else tree}


def outcome(folder):
    """All that a run leaves but its arguments: rows, weights, state of the optimizer."""
    with open(Path(folder, "metrics.csv"), newline="") as file:
        table = list(csv.DictReader(file))
    checkpoint = torch.load(Path(folder, "checkpoint.pt"), weights_only=True)
    del checkpoint["args"]
    return leaves({**checkpoint, "table": table})


def assert_same(folder, other):
    left, right = outcome(folder), outcome(other)
    assert [x for x in sorted({*left, *right}) if left.get(x, "") != right.get(x, "")] == []


def files_in(folder):
    return {path: path.read_bytes() for path in Path(folder).rglob("*") if path.is_file()}


class Stop(Exception):
    """Ends a run where a kill would have: nothing in the scripts reacts to it."""


def stop_after(iterations, script, args, monkeypatch):
    """Train, and stop in the iteration after so many."""
    updates, original = [], script.update

    def update(*x):
        updates.append(x)
        if len(updates) > iterations:
            raise Stop
        return original(*x)

    with monkeypatch.context() as context, pytest.raises(Stop):
        context.setattr(script, "update", update)
        script.train(args)


def main(script, argv, capsys, monkeypatch):
    """Run the script as a program with these arguments; return its status, output and errors."""
    status = 0
    with monkeypatch.context() as context:
        context.setattr(sys, "argv", [script.__file__, *map(str, argv)])
        try:
            runpy.run_path(script.__file__, run_name="__main__")
        except SystemExit as end:
            status = end.code
    return status, *capsys.readouterr()


# ---------------------------------------- kill and resume -----------------------------------------

TASKS = [
    {"env": "CartPole-v1"},
    {"env": "Pendulum-v1", "vectorization_mode": "async", **NORMS},
    {"env": "toys:Drift-v0", **NORMS},
    {"env": "toys:Restive-v0"},
    {"env": "toys:DictObservation-v0", "norm_obs": True},
]


@each_script
@pytest.mark.parametrize("options", TASKS, ids=lambda options: options["env"].split(":")[-1])
def test_stopped_and_resumed_run_ends_as_one_that_was_not(script, options, monkeypatch):
    args = arguments(script, checkpoint_every=20, **options)  # stretches of two rollouts
    if script.__name__ == "reinforce" and options["env"] == "Pendulum-v1":
        args = dataclasses.replace(args, total_timesteps=1300)  # its rollouts take 600 steps
    rows = script.train(dataclasses.replace(args, run_dir="whole"))
    assert len(rows) >= 3
    first = {0} if options["env"] == "CartPole-v1" else set()
    for iterations in first | {len(rows) // 2, len(rows) - 1}:
        folder = f"stopped{iterations}"
        stop_after(iterations, script, dataclasses.replace(args, run_dir=folder), monkeypatch)
        with open(f"{folder}/metrics.csv", "a") as file:
            file.write("17,half a ro")  # the kill came while a row was written
        Path(folder, "checkpoint.new").write_bytes(b"half a checkpoint")
        torch.rand(7), np.random.rand(7), random.random()  # other states of the global generators
        resumed(script, folder)
        assert_same("whole", folder)
        assert sorted(os.listdir(folder)) == ["checkpoint.pt", "config.json", "metrics.csv"]


@each_script
@on_posix
def test_killed_and_resumed_run_ends_as_one_that_was_not(script):
    """SIGKILL from outside, at a moment that differs from test to test, on the command line."""
    options = ["--total-timesteps", "12000", "--norm-obs", "--norm-reward", "--quiet"]
    options += ["--checkpoint-every", "70", "--run-dir", "killed"]
    command = [sys.executable, "-W", "ignore", script.__file__]
    process, metrics = subprocess.Popen([*command, *options]), Path("killed/metrics.csv")
    size = random.Random().randrange(1000)
    while not metrics.exists() or metrics.stat().st_size <= size:
        assert process.poll() is None
        time.sleep(0.002)
    process.kill()
    assert process.wait() == -signal.SIGKILL, f"it ended before {size} bytes of rows"
    run = subprocess.run([*command, "--resume", "killed"], capture_output=True, text=True)
    assert run.returncode == 0 and run.stdout == run.stderr == "", run.stderr
    resumed(script, "killed", resume=None, run_dir="whole")
    assert_same("whole", "killed")


@each_script
def test_stretches_begin_with_a_checkpoint_new_seeds_and_new_episodes(script, monkeypatch):
    """Episodes of 10 steps and a reset. A stretch is due after 16 steps, two rollouts of 16 rows.

    They hold 10 steps, a reset and 5 steps; 5 steps, a reset and 10 steps. REINFORCE's hold 10.
    """
    saved_at, save = [], script.Run.save_checkpoint

    def save_and_note(run):
        save(run)
        saved_at.append(script.load_checkpoint("run")["rows"])

    monkeypatch.setattr(script.Run, "save_checkpoint", save_and_note)
    toys.Seeds.seen.clear()
    options = {"env": "toys:Seeds-v0", "run_dir": "run", "total_timesteps": 360}
    rows = script.train(arguments(script, checkpoint_every=16, **options))
    steps, ends = (10, (1, 1)) if script.__name__ == "reinforce" else (15, (1, 2))
    seeds = [seed for seed in toys.Seeds.seen if seed is not None]
    assert len(rows) == 360 / 3 / steps and len(rows) % 2 == 0
    assert len(set(seeds)) == len(seeds) == 3 * len(rows) / 2
    assert [len(x) for x in saved_at] == list(range(0, len(rows) + 1, 2))
    assert [row["global_step"] for row in rows] == [3 * steps * (k + 1) for k in range(len(rows))]
    assert rows[0]["episodes"] == 3 * ends[0] and rows[-1]["episodic_length"] == 10
    assert rows[-1]["episodes"] == 3 * sum(ends) * len(rows) / 2


@each_script
def test_longer_run_is_the_one_that_was_longer_from_the_start(script, capsys, monkeypatch):
    options = {"anneal_lr": False, "checkpoint_every": 1, "norm_obs": True}
    script.train(arguments(script, run_dir="run", **options))
    status, *_ = main(script, ["--resume", "run", "--total-timesteps", 900], capsys, monkeypatch)
    script.train(arguments(script, run_dir="long", total_timesteps=900, **options))
    assert status == 0
    assert_same("run", "long")
    configs = [json.loads(Path(name, "config.json").read_text()) for name in ("run", "long")]
    assert configs[0] == {**configs[1], "run_dir": None, "resume": "run"}


@each_script
def test_arguments_given_with_resume_win_and_the_others_are_the_runs(script, capsys, monkeypatch):
    script.train(arguments(script, run_dir="run", seed=3, gamma=0.5, anneal_lr=False))
    files = files_in("run")
    rate = "--value-learning-rate" if script.__name__ == "trpo" else "--learning-rate"
    argv = ["--resume", "run", "--seed", 1, "--total-timesteps", 900, "--run-dir", "other"]
    argv += [rate, 0.0125]
    assert main(script, argv, capsys, monkeypatch) == (0, "", "")
    config = json.loads(Path("other/config.json").read_text())
    assert (config["seed"], config["gamma"], config["anneal_lr"]) == (1, 0.5, False)
    rows = script.load_checkpoint("other")["rows"]
    assert rows[-1]["global_step"] >= 900 > rows[-3]["global_step"]
    assert rows[0]["learning_rate"] != 0.0125 == rows[-1]["learning_rate"]
    assert files_in("run") == files


@each_script
def test_resume_that_fails_leaves_the_runs_files_alone(script, capsys, monkeypatch):
    stop_after(3, script, arguments(script, run_dir="run"), monkeypatch)
    files = files_in("run")
    with pytest.raises(RuntimeError, match="size mismatch"):
        main(script, ["--resume", "run", "--env", "Acrobot-v1"], capsys, monkeypatch)
    assert files_in("run") == files


@each_script
def test_complete_run_stays_as_it_is_wherever_it_lies(script):
    rows = script.train(arguments(script, run_dir="run"))
    shutil.copytree("run", "elsewhere")
    assert resumed(script, "elsewhere") == rows
    assert_same("run", "elsewhere")
    assert sorted(os.listdir()) == ["elsewhere", "run"]


def test_tensorboard_of_a_resumed_run_has_each_step_once(monkeypatch):
    events = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    script = SCRIPTS["ppo_clip"]
    args = arguments(script, run_dir="run", tensorboard=True, checkpoint_every=70)
    stop_after(7, script, args, monkeypatch)
    rows = resumed(script, "run")
    scalars = events.EventAccumulator("run").Reload().Scalars("losses/entropy")
    assert [event.step for event in scalars] == [row["global_step"] for row in rows]


# ------------------------------------------- bad input --------------------------------------------

NAN = math.nan
BAD_VALUES = {
    **{name: [0, -1] for name in ("total_timesteps", "num_envs")},
    "num_steps": [1, 0, -1],  # after an episode's end a rollout of 1 would have no step
    **{name: [0] for name in ("update_epochs", "value_epochs", "cg_iters", "line_search_steps")},
    **{name: [0] for name in ("max_episode_steps", "checkpoint_every")},
    "num_minibatches": [0, 25],  # of 48 steps, of which half may only reset
    "gamma": [-0.1, 1.1, NAN],
    "gae_lambda": [-0.1, 1.1, NAN],
    "seed": [-1],
    **{name: [-1.0, NAN] for name in ("learning_rate", "value_learning_rate", "clip_coef")},
    **{name: [-1.0, NAN] for name in ("ent_coef", "vf_coef", "max_grad_norm", "target_kl")},
    **{name: [-1.0, NAN] for name in ("beta", "cg_damping", "line_search_decay")},
    "env": ["CartPol-v1", "CartPole-v99", "no_such_module:X-v0", ""]
    + [f"toys:{x}-v0" for x in ("MultiDiscreteAction", "IntegerBox", "StartAtThree")]
    + [f"toys:{x}-v0" for x in ("NegativeStart", "GraphObservation", "SameStep", "NoMode")],
    "run_dir": ["full", "file"],
    "resume": ["no_such_folder", "full", "foreign", "garbage", "bomb", "pickle", "torn", "list"],
    "tensorboard": [True],
}


class Bomb:
    """Makes a folder if it is unpickled."""

    def __reduce__(self):
        return os.mkdir, ("exploded",)


def make_traps(script):
    """The files and folders that BAD_VALUES speaks of."""
    for name in ("full", "foreign", "garbage", "bomb", "pickle", "torn", "list"):
        Path(name).mkdir()
    Path("file").touch()
    Path("full/.hidden").touch()
    script.train(arguments(script, run_dir="run", total_timesteps=1))
    good = torch.load("run/checkpoint.pt", weights_only=True)
    torch.save({**good, "algorithm": "sac"}, "foreign/checkpoint.pt")
    Path("garbage/checkpoint.pt").write_bytes(b"garbage")
    torch.save({**good, "agent": Bomb()}, "bomb/checkpoint.pt")
    Path("pickle/checkpoint.pt").write_bytes(pickle.dumps({**good, "agent": Bomb()}))
    whole = Path("run/checkpoint.pt").read_bytes()
    Path("torn/checkpoint.pt").write_bytes(whole[: len(whole) // 2])
    torch.save([1, 2], "list/checkpoint.pt")


def unwrapped(text):
    """The words in a box of tyro's, whose lines break anywhere."""
    return re.sub(r"[│╭╮╰╯─\s]", "", text)


@each_script
def test_bad_value_is_refused_by_name_and_leaves_nothing(script, capsys, monkeypatch):
    """Python raises ValueError; the command line shows the same words and exits with status 2."""
    make_traps(script)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    before, own = files_in("."), {field.name for field in dataclasses.fields(script.Args)}
    assert own - set(BAD_VALUES) <= {
        *("vectorization_mode", "norm_obs", "norm_reward", "norm_adv", "norm_returns", "quiet"),
        *("anneal_lr", "device", "form", "penalty", "reward_to_go"),
    }
    short = {"num_envs": 3, "num_steps": 16} if "num_steps" in own else {"num_envs": 3}
    for name, value in [(key, x) for key in own & set(BAD_VALUES) for x in BAD_VALUES[key]]:
        flag = f"--{name.replace('_', '-')}"
        with pytest.raises(ValueError, match=f"^{flag}") as error:
            script.Args(**{**short, name: value})
        argv = [f"--{x.replace('_', '-')}={short[x]}" for x in short if x != name]
        argv += [flag] if value is True else [f"{flag}={value}"]
        status, output, errors = main(script, argv, capsys, monkeypatch)
        assert status == 2 and output == "" and "Traceback" not in errors, (argv, errors)
        assert unwrapped(str(error.value)) in unwrapped(errors), argv
        assert files_in(".") == before and not Path("exploded").exists(), argv


@each_script
@pytest.mark.parametrize("env", ["CartPole-v1", "Pendulum-v1"])
def test_smallest_values_make_a_run(script, env):
    """One environment, rollouts of a step or two, one pass, and 0 where 0 is a value."""
    ones = ("num_minibatches", "update_epochs", "value_epochs", "cg_iters", "line_search_steps")
    zeros = ("seed", "gamma", "gae_lambda", "clip_coef", "ent_coef", "vf_coef", "cg_damping")
    least = {"num_envs": 1, "num_steps": 2, **dict.fromkeys(ones, 1), **dict.fromkeys(zeros, 0)}
    names = {field.name for field in dataclasses.fields(script.Args)}
    options = {name: value for name, value in least.items() if name in names}
    rows = script.train(script.Args(env=env, total_timesteps=450, quiet=True, **options))
    assert rows[-1]["global_step"] >= 450 and rows[-1]["episodes"] >= 2


@each_script
def test_command_line_that_cannot_be_parsed_is_refused(script, capsys, monkeypatch):
    cases = [["--gamma", "high"], ["--num-envs", "1.5"], ["--no-such-flag"], ["--norm-obs", "3"]]
    for argv in [*cases, ["--vectorization-mode", "x"]]:
        status, output, errors = main(script, argv, capsys, monkeypatch)
        assert status == 2 and output == "" and "Traceback" not in errors, (argv, errors)
        assert argv[0] in errors or argv[1] in errors, errors
        assert not os.listdir()


def test_refusals_say_what_would_do():
    for options, hint in [
        ({"env": "CartPol-v1"}, "^--env CartPol-v1: .*Did you mean: `CartPole`"),
        ({"env": "no_such_module:X-v0"}, "^--env no_such_module:X-v0: .*No module named"),
        ({"env": "toys:MultiDiscreteAction-v0"}, r"expected Discrete.*, got MultiDiscrete\("),
        ({"env": "toys:StartAtThree-v0"}, r"expected Discrete \(from 0\).* start=3"),
        ({"env": "toys:SameStep-v0"}, "expected next-step autoreset"),
        ({"env": "Acrobot-v1", "vectorization_mode": "vector_entry_point"}, "^--env Acrobot-v1: "),
        ({"tensorboard": 1, "resume": "x"}, "^--resume: expected a run of vpg, got 'x'"),
        ({"gamma": 2}, "^--gamma: expected a number from 0 to 1, got 2$"),
    ]:
        with pytest.raises(ValueError, match=hint):
            SCRIPTS["vpg"].Args(**options)


def test_reinforce_refuses_one_return_that_would_be_standardised_to_nothing():
    with pytest.raises(ValueError, match="^--num-envs: expected 2 or more.*, got 1$"):
        SCRIPTS["reinforce"].Args(num_envs=1, reward_to_go=False)
    SCRIPTS["reinforce"].Args(num_envs=1, reward_to_go=False, norm_returns=False)


# ---------------------------------------- numbers gone wrong --------------------------------------


def assert_stops(script, args, message):
    """The run stops with this message; all that it saved is finite, and its last good state."""
    with pytest.raises(FloatingPointError, match=message) as error:
        script.train(args)
    rows = script.load_checkpoint(args.run_dir)["rows"]
    assert f"iteration {len(rows) + 1}:" in str(error.value)
    for path, value in outcome(args.run_dir).items():
        if value not in (None, "") and not path.startswith("/algorithm"):
            assert np.isfinite(np.asarray(value, float)).all(), path


FAULTS = ("nan", "nan-reward", "infinite-reward")


@each_script
@pytest.mark.parametrize(
    ("faults", "norms"),
    [
        ((*FAULTS, "infinite", "huge"), {}),
        (FAULTS, NORMS),
        (("infinite", "huge", "huge-reward"), NORMS),
    ],
    ids=["plain", "normalised", "hidden by normalisation"],
)
@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_numbers_that_are_not_finite_stop_the_run(script, faults, norms):
    for fault in faults:
        options = {"env": f"toys:Faulty-{fault}-v0", "run_dir": fault, "checkpoint_every": 1}
        message = r"^iteration \d+: [\w.]+ is -?(nan|inf)$"
        assert_stops(script, arguments(script, **options, **norms), message)


@each_script
def test_advantages_and_weights_that_are_not_finite_stop_the_run(script, monkeypatch):
    original = script.update
    weights = "rewards_to_go" if script.__name__ == "reinforce" else "advantages"

    def with_bad_advantages(agent, optimizer, batch, args):
        getattr(batch, weights)[7] = math.inf
        return original(agent, optimizer, batch, args)

    def with_bad_weights(agent, *x):
        metrics = original(agent, *x)
        with torch.no_grad():
            agent.actor[0].bias[3] = math.nan
        return metrics

    for update, name in [(with_bad_advantages, "policy_loss"), (with_bad_weights, "actor.0.bias")]:
        monkeypatch.setattr(script, "update", update)
        assert_stops(script, arguments(script, run_dir=name), f"^iteration 1: {name} is ")


# --------------------------------------- broken environments --------------------------------------


@each_script
def test_environment_that_fails_shows_its_own_error(script):
    for fault, error in [("raises", ZeroDivisionError), ("reset-raises", KeyError)]:
        env = f"toys:Faulty-{fault}-v0"
        for mode in ("sync", "async"):
            args = arguments(script, env=env, vectorization_mode=mode, run_dir=f"{fault} {mode}")
            with pytest.raises(error, match="the physics exploded|no such level"):
                script.train(args)
            gc.collect()
            assert not multiprocessing.active_children()


@on_posix
@pytest.mark.parametrize(
    ("name", "fault"), [("reinforce", "dies"), ("ppo_clip", "dies"), ("ppo_clip", "raises")]
)
def test_worker_process_that_fails_or_dies_ends_the_program(name, fault):
    command = [sys.executable, "-W", "ignore", ROOT / f"{name}.py", "--quiet", "--run-dir", "run"]
    command += ["--env", f"toys:Faulty-{fault}-v0", "--vectorization-mode", "async"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT / "tests")}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    process = subprocess.Popen(
        [*command, "--num-envs", "3"], **pipes, env=environment, start_new_session=True
    )
    output, errors = process.communicate(timeout=60)
    assert process.returncode == 1 and output == "" and "Traceback" in errors
    assert ("the physics exploded" in errors) == (fault == "raises")
    with pytest.raises(ProcessLookupError):  # no worker is left
        os.killpg(process.pid, 0)
    assert SCRIPTS[name].load_checkpoint("run")["rows"] == []
