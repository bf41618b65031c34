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
import warnings
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
    short |= {"update_epochs": 3, "value_epochs": 3}
    names = {field.name for field in dataclasses.fields(script.Args)}
    short = {name: value for name, value in short.items() if name in names}
    return script.Args(**{**short, "quiet": True, **options})


def resumed(script, folder, **changes):
    return script.train(*script.load_run(folder, **changes))


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
    """Run the script as a program with these arguments; return its status, output and errors.

    The status is a text where Python would print this text and exit with 1.
    """
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
    options = {"total_timesteps": 400, **options}
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
        for name in ("checkpoint", "config", "metrics"):
            Path(folder, f"{name}.new").write_bytes(b"half a file")
        torch.rand(7), np.random.rand(7), random.random()  # other states of the global generators
        resumed(script, folder)
        assert_same("whole", folder)
        assert sorted(os.listdir(folder)) == ["checkpoint.pt", "config.json", "metrics.csv"]


STREAMS = ("output", "errors")


def program(script, argv):
    """Start the script as a program in a process of its own, which need not import torch anew.

    It leads its group of processes. What it prints is in the files `output` and `errors`.
    """

    def work():
        os.setsid()
        for number, name in enumerate(STREAMS, 1):
            os.dup2(os.open(name, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), number)
        sys.stdout, sys.stderr = (open(number, "w", buffering=1) for number in (1, 2))
        signal.signal(signal.SIGINT, signal.default_int_handler)
        warnings.simplefilter("ignore")
        sys.argv = [script.__file__, *map(str, argv)]
        runpy.run_path(script.__file__, run_name="__main__")

    process = multiprocessing.get_context("fork").Process(target=work)
    process.start()
    return process


@each_script
@on_posix
def test_killed_and_resumed_run_ends_as_one_that_was_not(script):
    """SIGKILL from outside, at a moment that differs from test to test, on the command line."""
    options = ["--total-timesteps", "9000", "--norm-obs", "--norm-reward", "--quiet"]
    options += ["--checkpoint-every", "70", "--run-dir", "killed"]
    options += ["--num-steps", "64"] if script.__name__ != "reinforce" else []
    process, metrics = program(script, options), Path("killed/metrics.csv")
    size = random.Random().randrange(1000)
    while not metrics.exists() or metrics.stat().st_size <= size:
        assert process.is_alive()
        time.sleep(0.002)
    process.kill()
    process.join()
    assert process.exitcode == -signal.SIGKILL, f"it ended before {size} bytes of rows"
    process = program(script, ["--resume", "killed"])
    process.join()
    assert (process.exitcode, Path("output").read_text(), Path("errors").read_text()) == (0, "", "")
    args, _ = script.load_run("killed", resume=None, run_dir="whole")
    script.train(args)
    assert_same("whole", "killed")


@each_script
def test_stretches_begin_with_a_checkpoint_new_seeds_and_new_episodes(script, monkeypatch):
    """Episodes of 10 steps and a reset. A stretch is due after 16 steps, two rollouts of 16 rows.

    They hold 10 steps, a reset and 5 steps; 5 steps, a reset and 10 steps. REINFORCE's hold 10.
    """
    saved_at, save = [], script.Run.save_checkpoint

    def save_and_note(run):
        save(run)
        saved_at.append(script.load_run("run")[1]["rows"])

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
    rows = script.load_run("other")[1]["rows"]
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


# ------------------------------------------- bad input --------------------------------------------

NAN = math.nan
BAD_VALUES = {  # which Args refuses
    **{name: [0, -1] for name in ("total_timesteps", "num_envs")},
    "num_steps": [1, 0, -1],  # after an episode's end a rollout of 1 would have no step
    **{name: [0] for name in ("update_epochs", "value_epochs", "cg_iters", "line_search_steps")},
    **{name: [0] for name in ("max_episode_steps", "checkpoint_every")},
    "num_minibatches": [0, 25],  # of 48 steps, of which half may only reset
    "gamma": [-0.1, 1.1, NAN],
    "gae_lambda": [-0.1, 1.1, NAN],
    "seed": [-1, 2**63 + 1],
    **{name: [-1.0, NAN] for name in ("learning_rate", "clip_coef", "beta")},
    "value_learning_rate": [-1.0, 0.0, NAN],  # δ of TRPO falls as it does
    **{name: [-1.0, NAN] for name in ("ent_coef", "vf_coef", "max_grad_norm", "target_kl")},
    **{name: [-1.0, NAN] for name in ("cg_damping", "line_search_decay")},
}
UNUSABLE = {  # which train and load_run refuse, for they need environments and files to know
    "env": ["CartPol-v1", "CartPole-v99", "no_such_module:X-v0", ""]
    + [f"toys:{x}-v0" for x in ("MultiDiscreteAction", "IntegerBox", "GraphObservation")]
    + [f"toys:{x}-v0" for x in ("SameStep", "NoMode")],
    "run_dir": ["full", "file"],
    "resume": ["no_such_folder", "full", "foreign", "garbage", "bomb", "pickle", "torn", "list"]
    + ["ranks", "no config", "torn config", "few rows"],
}


class Bomb:
    """Makes a folder if it is unpickled."""

    def __reduce__(self):
        return os.mkdir, ("exploded",)


def make_traps(script):
    """The files and folders that UNUSABLE speaks of: each is a run of which one thing is wrong."""
    Path("full").mkdir()
    Path("file").touch()
    Path("full/.hidden").touch()
    script.train(arguments(script, run_dir="run", total_timesteps=1))
    for name in set(UNUSABLE["resume"]) - {"no_such_folder", "full"}:
        shutil.copytree("run", name)
    good = torch.load("run/checkpoint.pt", weights_only=True)
    config = Path("run/config.json").read_text()
    for name, key, value in [("foreign", "algorithm", "sac"), ("ranks", "world_size", 2)]:
        Path(name, "config.json").write_text(json.dumps({**json.loads(config), key: value}))
    Path("garbage/checkpoint.pt").write_bytes(b"garbage")
    torch.save({**good, "agent": Bomb()}, "bomb/checkpoint.pt")
    Path("pickle/checkpoint.pt").write_bytes(pickle.dumps({**good, "agent": Bomb()}))
    whole = Path("run/checkpoint.pt").read_bytes()
    Path("torn/checkpoint.pt").write_bytes(whole[: len(whole) // 2])
    torch.save([1, 2], "list/checkpoint.pt")
    Path("no config/config.json").unlink()
    Path("torn config/config.json").write_text(config[: len(config) // 2])
    table = Path("run/metrics.csv").read_text().splitlines(keepends=True)
    Path("few rows/metrics.csv").write_text("".join(table[:-1]))


def unwrapped(text):
    """The words in a box of tyro's, whose lines break anywhere."""
    return re.sub(r"[│╭╮╰╯─\s]", "", text)


@each_script
def test_bad_value_is_refused_by_name_and_leaves_nothing(script, capsys, monkeypatch):
    """Python raises ArgumentError; the command line shows its words and exits with status 2."""
    own = {field.name for field in dataclasses.fields(script.Args)}
    assert own - set(BAD_VALUES) - set(UNUSABLE) <= {
        *("vectorization_mode", "norm_obs", "norm_reward", "norm_adv", "norm_returns", "quiet"),
        *("anneal_lr", "device", "form", "penalty", "reward_to_go"),
    }
    short = {"num_envs": 3, "num_steps": 16} if "num_steps" in own else {"num_envs": 3}
    for name, value in [(key, x) for key in own & set(BAD_VALUES) for x in BAD_VALUES[key]]:
        flag = f"--{name.replace('_', '-')}"
        with pytest.raises(script.ArgumentError, match=f"^{flag}: expected a number ") as error:
            script.Args(**{**short, name: value})
        argv = [f"--{x.replace('_', '-')}={short[x]}" for x in short if x != name]
        status, output, errors = main(script, [*argv, f"{flag}={value}"], capsys, monkeypatch)
        assert status == 2 and output == "" and "Traceback" not in errors, (argv, errors)
        assert unwrapped(str(error.value)) in unwrapped(errors), argv
        assert not os.listdir(), argv


@each_script
def test_unusable_environment_or_folder_is_refused_and_leaves_nothing(script, capsys, monkeypatch):
    """Python raises ArgumentError; the command line exits with the same words, on one line."""
    assert issubclass(script.ArgumentError, ValueError)
    make_traps(script)
    before = files_in(".")
    for name, value in [(key, x) for key in UNUSABLE for x in UNUSABLE[key]]:
        flag = f"--{name.replace('_', '-')}"
        with pytest.raises(script.ArgumentError, match=f"^{flag}[ :]") as error:
            if name == "resume":
                script.load_run(value)
            else:
                script.train(arguments(script, **{name: value}))
        said = f"{script.__name__}.py: {error.value}"
        assert main(script, [flag, value, "--quiet"], capsys, monkeypatch) == (said, "", "")
        assert name == "resume" or value == "" or "\n" not in said
        assert files_in(".") == before and not Path("exploded").exists(), value
    with pytest.raises(script.ArgumentError, match="^--run-dir: expected an empty folder"):
        script.train(script.Args(resume="run", quiet=True))  # load_run goes on with a run
    assert files_in(".") == before


@on_posix
def test_refusal_is_one_line_on_stderr_and_a_status():
    command = [sys.executable, ROOT / "vpg.py", "--env", "CartPol-v1"]
    run = subprocess.run(command, capture_output=True, text=True)
    assert (run.returncode, run.stdout, run.stderr.count("\n")) == (1, "", 1)
    assert run.stderr.startswith("vpg.py: --env CartPol-v1: Environment `CartPol` doesn't exist")
    assert not os.listdir()


@each_script
@pytest.mark.parametrize("env", ["CartPole-v1", "Pendulum-v1"])
def test_smallest_values_make_a_run(script, env):
    """One environment, rollouts of a step or two, one pass, and 0 where 0 is a value."""
    ones = ("num_minibatches", "update_epochs", "value_epochs", "cg_iters", "line_search_steps")
    zeros = ("seed", "gamma", "gae_lambda", "clip_coef", "ent_coef", "vf_coef", "cg_damping")
    least = {"num_envs": 1, "num_steps": 2, **dict.fromkeys(ones, 1), **dict.fromkeys(zeros, 0)}
    names = {field.name for field in dataclasses.fields(script.Args)}
    options = {name: value for name, value in least.items() if name in names}
    options |= {"value_learning_rate": 1e-12} if "value_learning_rate" in names else {}
    options |= (
        {"target_kl": 0 if script.__name__ == "ppo_clip" else 1e-12} if "target_kl" in names else {}
    )
    options |= {"norm_returns": False} if "norm_returns" in names else {}
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
    vpg = SCRIPTS["vpg"]
    for options, hint in [
        ({"env": "CartPol-v1"}, "^--env CartPol-v1: .*Did you mean: `CartPole`"),
        ({"env": "no_such_module:X-v0"}, "^--env no_such_module:X-v0: .*No module named"),
        ({"env": "toys:MultiDiscreteAction-v0"}, r"expected Discrete.*, got MultiDiscrete\("),
        ({"env": "toys:IntegerBox-v0"}, r"expected Discrete or real Box.*, got Box\(.* int64\)"),
        ({"env": "toys:SameStep-v0"}, "expected .*next-step autoreset .*SAME_STEP"),
        ({"env": "Acrobot-v1", "vectorization_mode": "vector_entry_point"}, "^--env Acrobot-v1: "),
        ({"gamma": 2}, "^--gamma: expected a number from 0 to 1, got 2$"),
    ]:
        with pytest.raises(vpg.ArgumentError, match=hint):
            vpg.train(vpg.Args(**options, quiet=True))
    with pytest.raises(vpg.ArgumentError, match="^--resume: expected a run of vpg, got 'x'"):
        vpg.load_run("x")
    assert not os.listdir()


@pytest.mark.parametrize("reward_to_go", [True, False])
def test_reinforce_refuses_one_environment_whose_baseline_would_leave_nothing(reward_to_go):
    hint = "^--num-envs: expected 2 or more, or --no-norm-returns, got 1$"
    with pytest.raises(ValueError, match=hint):
        SCRIPTS["reinforce"].Args(num_envs=1, reward_to_go=reward_to_go)
    SCRIPTS["reinforce"].Args(num_envs=1, reward_to_go=reward_to_go, norm_returns=False)


# ---------------------------------------- numbers gone wrong --------------------------------------


def assert_stops(script, args, message):
    """The run stops with this message; all that it saved is finite, and its last good state."""
    with pytest.raises(FloatingPointError, match=message) as error:
        script.train(args)
    rows = script.load_run(args.run_dir)[1]["rows"]
    assert f"iteration {len(rows) + 1}:" in str(error.value)
    for path, value in outcome(args.run_dir).items():
        if value not in (None, ""):
            assert np.isfinite(np.asarray(value, float)).all(), path


FAULTS = ("nan", "nan-reward", "infinite-reward")


@each_script
@pytest.mark.parametrize(
    ("faults", "norms"),
    [
        ((*FAULTS, "infinite", "huge"), dict.fromkeys(NORMS, False)),
        (FAULTS, NORMS),
        (("infinite", "huge", "huge-reward"), NORMS),
    ],
    ids=["plain", "normalised", "hidden by normalisation"],
)
@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_numbers_that_are_not_finite_stop_the_run(script, faults, norms):
    for fault in faults:
        options = {"env": f"toys:Faulty-{fault}-v0", "run_dir": fault, "checkpoint_every": 1}
        message = r"^iteration \d+: [\w.]+ is not finite$"
        assert_stops(script, arguments(script, **options, **norms), message)


@each_script
def test_advantages_and_weights_that_are_not_finite_stop_the_run(script, monkeypatch):
    original = script.update
    weights = "weights" if script.__name__ == "reinforce" else "advantages"

    def with_bad_advantages(agent, optimizer, batch, args):
        getattr(batch, weights)[7] = math.inf
        return original(agent, optimizer, batch, args)

    def with_bad_weights(agent, *x):
        metrics = original(agent, *x)
        with torch.no_grad():
            agent.policy.mlp[0].bias[3] = math.inf  # whose tanh is finite, as are the metrics
        return metrics

    bad_weights = (with_bad_weights, "policy.mlp.0.bias")
    for update, name in [(with_bad_advantages, "surrogate"), bad_weights]:
        monkeypatch.setattr(script, "update", update)
        message = f"^iteration 1: {name} is not finite$"
        assert_stops(script, arguments(script, run_dir=name), message)


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
    options = ["--env", f"toys:Faulty-{fault}-v0", "--vectorization-mode", "async"]
    options += ["--num-envs", "3", "--quiet", "--run-dir", "run"]
    if name == "ppo_clip" and fault == "dies":
        command = [sys.executable, "-W", "ignore", ROOT / f"{name}.py", *options]
        environment = {**os.environ, "PYTHONPATH": str(ROOT / "tests")}
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
        process = subprocess.Popen(command, **pipes, env=environment, start_new_session=True)
        output, errors = process.communicate(timeout=60)
        status = process.returncode
    else:
        process = program(SCRIPTS[name], options)
        process.join(60)
        status, output, errors = process.exitcode, *map(Path.read_text, map(Path, STREAMS))
    assert status == 1 and output == "" and "Traceback" in errors
    assert ("the physics exploded" in errors) == (fault == "raises")
    with pytest.raises(ProcessLookupError):  # no worker is left
        os.killpg(process.pid, 0)
    assert SCRIPTS[name].load_run("run")[1]["rows"] == []
