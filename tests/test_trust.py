"""What a run withstands: kills, bad numbers, broken environments, full disks, foreign files; all five scripts."""

import csv
import dataclasses
import importlib
import io
import json
import math
import multiprocessing
import os
import pickle
import random
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
SCRIPTS = {name: importlib.import_module(name) for name in ("reinforce", "vpg", "trpo", "ppo_clip", "ppo_kl")}
each_script = pytest.mark.parametrize("script", SCRIPTS.values(), ids=SCRIPTS)
on_posix = pytest.mark.skipif(os.name != "posix", reason="signals and limits of POSIX")


@pytest.fixture(autouse=True)
def in_empty_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def arguments(script, **options):
    """Arguments of a run of 600 steps, with rollouts of 48, and of no episode's end in REINFORCE."""
    short = {"total_timesteps": 600, "num_envs": 3, "quiet": True}
    if script.__name__ != "reinforce":
        short |= {"num_steps": 16}
    if script.__name__ in ("ppo_clip", "ppo_kl"):
        short |= {"num_minibatches": 2}
    return script.Args(**{**short, **options})


def outcome(folder):
    """The rows but for what a clock put into them, and all that the checkpoint holds of the trained state."""
    with open(Path(folder, "metrics.csv"), newline="") as file:
        rows = [{k: v for k, v in row.items() if k not in ("wall_time", "SPS")} for row in csv.DictReader(file)]
    checkpoint = torch.load(Path(folder, "checkpoint.pt"), weights_only=True)
    counts = checkpoint["progress"]["global_step"], checkpoint["progress"]["iteration"]
    return rows, checkpoint["agent"], checkpoint["optimizers"], *counts


def assert_same(folder, other):
    (rows, agent, optimizers, *counts), (other_rows, other_agent, other_optimizers, *other_counts) = (
        outcome(folder),
        outcome(other),
    )
    assert rows == other_rows and counts == other_counts
    for tensors, others in [(agent, other_agent), *((optimizers[name], other_optimizers[name]) for name in optimizers)]:
        assert tensors.keys() == others.keys()
        for name in tensors:
            assert torch.equal(tensors[name], others[name]), name


class Stop(Exception):
    """Ends a run where a kill would have: nothing in the scripts reacts to it."""


def stop_after(script, iterations, args, monkeypatch):
    """Train, and stop in the iteration after so many."""
    done = []

    def update(*x):
        done.append(x)
        if len(done) > iterations:
            raise Stop
        return original(*x)

    original = script.update
    with monkeypatch.context() as context, pytest.raises(Stop):
        context.setattr(script, "update", update)
        script.train(args)


# ---------------------------------------------------- kill and resume -------------------------------------------------

NORMS = {"norm_obs": True, "norm_reward": True}
TASKS = [
    {"env": "CartPole-v1"},
    {"env": "Pendulum-v1", "vectorization_mode": "async", **NORMS},
    {"env": "toys:Drift-v0", **NORMS},
    {"env": "toys:Float64-v0"},
    {"env": "toys:DictObservation-v0", "norm_obs": True},
    {"env": "toys:Restive-v0"},
]


@each_script
@pytest.mark.parametrize("options", TASKS, ids=lambda options: options["env"].split(":")[-1])
def test_stopped_and_resumed_run_ends_as_one_that_was_not(script, options, monkeypatch):
    whole = arguments(script, run_dir="whole", **options)
    if options["env"] == "Pendulum-v1":
        whole = dataclasses.replace(whole, total_timesteps=1500)
    rows = script.train(whole)
    assert len(rows) >= 3
    for iterations in sorted({0, len(rows) // 2, len(rows) - 1}):
        folder = f"stopped{iterations}"
        stop_after(script, iterations, dataclasses.replace(whole, run_dir=folder), monkeypatch)
        with open(f"{folder}/metrics.csv", "a") as file:
            file.write("17,half a ro")  # the kill came while a row was written
        Path(folder, "checkpoint.pt.new").write_bytes(b"half a checkpoint")
        torch.rand(7), np.random.rand(7)  # other states of the global generators
        resumed_rows = script.train(script.saved_args(folder))
        assert_same("whole", folder)
        assert [row["global_step"] for row in resumed_rows] == [row["global_step"] for row in rows]
        assert sorted(os.listdir(folder)) == ["checkpoint.pt", "config.json", "metrics.csv"]


@each_script
@on_posix
def test_killed_and_resumed_run_ends_as_one_that_was_not(script):
    """SIGKILL from outside, on the real command line."""
    options = ["--total-timesteps", "60000", "--norm-obs", "--norm-reward", "--checkpoints", "7", "--quiet"]
    command = [sys.executable, "-W", "ignore", script.__file__]
    process = subprocess.Popen([*command, *options, "--run-dir", "killed"])
    while not Path("killed/metrics.csv").exists() or Path("killed/metrics.csv").stat().st_size < 1000:
        assert process.poll() is None
        time.sleep(0.005)
    process.kill()
    assert process.wait() == -signal.SIGKILL
    run = subprocess.run([*command, "--resume", "killed"], capture_output=True, text=True)
    assert run.returncode == 0 and run.stdout == run.stderr == "", run.stderr
    script.train(dataclasses.replace(script.saved_args("killed"), run_dir="whole", resume=None))
    assert_same("whole", "killed")


@pytest.mark.parametrize("script", [SCRIPTS["vpg"], SCRIPTS["ppo_clip"]], ids=["vpg", "ppo_clip"])
def test_episodes_are_cut_where_a_resumed_run_would_repeat_too_much(script, monkeypatch):
    """After ten times the 10 steps of a full episode, at the next rollout; what is cut is not reported."""
    args = arguments(script, env="toys:Seeds-v0", total_timesteps=960)
    toys.Seeds.seen.clear()
    rows = script.train(dataclasses.replace(args, run_dir="whole"))
    seeds = [seed for seed in toys.Seeds.seen if seed is not None]
    # 20 and a few more rollouts of 16: the first after 112 steps, 10 whole episodes and a part, begins anew, and so on
    assert len(set(seeds)) == len(seeds) == 3 * (1 + (len(rows) - 1) // 7)
    assert rows[-1]["episodes"] == 3 * (10 * (len(rows) // 7) + (len(rows) % 7) * 16 // 11)
    assert rows[-1]["episodic_length"] == 10
    for iterations in (6, 7, 8, len(rows) - 2):
        stop_after(script, iterations, dataclasses.replace(args, run_dir=f"stopped{iterations}"), monkeypatch)
        script.train(script.saved_args(f"stopped{iterations}"))
        assert_same("whole", f"stopped{iterations}")


@each_script
def test_config_is_enough_to_repeat_a_run(script):
    script.train(arguments(script, env="Pendulum-v1", run_dir="run", seed=5, gamma=0.9, **NORMS))
    config = json.loads(Path("run/config.json").read_text())
    again = {field.name: config[field.name] for field in dataclasses.fields(script.Args)}
    script.train(script.Args(**{**again, "run_dir": "again"}))
    assert_same("run", "again")


@each_script
def test_checkpoints_leave_no_trace_in_the_training(script):
    for checkpoints in (1, 3, 1000):
        script.train(arguments(script, run_dir=f"{checkpoints}", checkpoints=checkpoints))
        assert_same("1", f"{checkpoints}")


@each_script
def test_checkpoints_come_when_they_are_due(script, monkeypatch):
    steps, save = [], script.save_checkpoint
    monkeypatch.setattr(script, "save_checkpoint", lambda *x: (steps.append(x[-1].global_step), save(*x)))
    rows = script.train(arguments(script, run_dir="run", checkpoints=4))
    reached = [0, *(row["global_step"] for row in rows)]
    assert steps == sorted({0, *(next(step for step in reached if step >= k * 600 / 4) for k in (1, 2, 3, 4))})


def test_environments_that_do_not_repeat_themselves_begin_anew(monkeypatch, capsys):
    script = SCRIPTS["ppo_clip"]
    stop_after(script, 9, arguments(script, env="toys:Restless-v0", run_dir="run"), monkeypatch)
    rows = script.train(script.saved_args("run"))
    assert rows[-1]["global_step"] >= 600
    assert "the environments do not repeat themselves" in capsys.readouterr().err


@each_script
def test_longer_run_is_the_one_that_was_longer_from_the_start(script):
    options = {"anneal_lr": False, "norm_obs": True}
    script.train(arguments(script, run_dir="run", **options))
    script.train(dataclasses.replace(script.saved_args("run"), total_timesteps=1111))
    script.train(arguments(script, run_dir="long", total_timesteps=1111, **options))
    assert_same("run", "long")
    configs = [json.loads(Path(name, "config.json").read_text()) for name in ("run", "long")]
    assert configs[0] == {**configs[1], "run_dir": "run"} and configs[0]["resume"] is None


@each_script
def test_complete_run_says_so_and_stays_as_it_is(script, capsys):
    rows = script.train(arguments(script, run_dir="run"))
    files = {path: path.read_bytes() for path in Path("run").iterdir()}
    assert script.train(script.saved_args("run")) == rows
    assert capsys.readouterr().out == f"run is complete, with {rows[-1]['global_step']} steps\n"
    assert {path: path.read_bytes() for path in Path("run").iterdir()} == files


REFUSED_CHANGES = [
    ("gamma", 0.5, "expected none or 0.98"),
    ("seed", 2, "expected none or 1"),
    ("env", "Acrobot-v1", "expected none or 'CartPole-v1'"),
    ("quiet", False, "expected none or True"),
    ("total_timesteps", 1200, "expected none or 600, as in the run of --resume, got 1200"),
    ("total_timesteps", 500, "expected none or 600"),
]


@each_script
@pytest.mark.parametrize(("name", "value", "message"), REFUSED_CHANGES)
def test_changed_argument_is_refused_with_resume(script, name, value, message):
    script.train(arguments(script, run_dir="run"))
    with pytest.raises(script.ArgumentError, match=f"^--{name.replace('_', '-')}: {message}"):
        script.train(dataclasses.replace(script.saved_args("run"), **{name: value}))


@each_script
def test_empty_names_are_no_names(script):
    for name in ("resume", "run_dir"):
        with pytest.raises(script.ArgumentError, match=f"^--{name.replace('_', '-')}: expected .*, got ''"):
            script.train(arguments(script, **{name: ""}))
    assert not os.listdir()


def test_argument_given_with_resume_counts_even_where_it_is_the_default(capsys, monkeypatch):
    script = SCRIPTS["vpg"]
    script.train(arguments(script, run_dir="run", seed=3))
    assert main(script, ["--resume", "run", "--seed", "1"], capsys, monkeypatch) == (
        1,
        "",
        "vpg.py: --seed: expected none or 3, as in the run of --resume, got 1\n",
    )
    status, said, complaint = main(script, ["--resume", "run", "--seed", "3"], capsys, monkeypatch)
    assert status == 0 and "is complete" in said and complaint == ""


# ---------------------------------------------------- broken checkpoints ----------------------------------------------


class Bomb:
    """Leaves a file behind if it is unpickled."""

    def __reduce__(self):
        return os.mkdir, ("exploded",)


def break_checkpoint(how, script, path):
    """Make a checkpoint unusable; return what the refusal says."""
    content = path.read_bytes()
    checkpoint = torch.load(path, weights_only=True)
    if how == "missing":
        path.unlink()
        return "No such file"
    if how == "empty":
        path.write_bytes(b"")
        return "not a zip file"
    if how == "truncated":
        path.write_bytes(content[: len(content) // 2])
        return "not a zip file"
    if how == "one bit":  # in the middle of a tensor
        at = len(content) // 2
        path.write_bytes(content[:at] + bytes([content[at] ^ 4]) + content[at + 1 :])
        return "is damaged"
    if how == "pickle":
        path.write_bytes(pickle.dumps({"agent": Bomb()}))
        return "not a zip file"
    if how == "bomb":
        torch.save({**checkpoint, "agent": Bomb()}, path)
        return "Weights only load failed"
    if how == "list":
        torch.save([1, 2], path)
    elif how == "algorithm":
        torch.save({**checkpoint, "algorithm": "sac"}, path)
        return f"its config.json has algorithm '{script.__name__}', its checkpoint.pt 'sac'"
    elif how == "environment":
        torch.save({**checkpoint, "args": {**checkpoint["args"], "env": "Acrobot-v1"}}, path)
        return "its config.json has env 'CartPole-v1', its checkpoint.pt 'Acrobot-v1'"
    elif how == "other run":
        script.train(arguments(script, run_dir="other", seed=7, quiet=True))
        shutil.copy("other/checkpoint.pt", path)
        shutil.rmtree("other")
        return "its config.json has seed 1, its checkpoint.pt 7"
    elif how == "not finite":
        checkpoint["agent"]["actor.0.bias"][3] = math.nan
        torch.save(checkpoint, path)
        return "there is NaN or infinity in actor.0.bias"
    elif how == "progress":
        del checkpoint["progress"]["global_step"]
        checkpoint["progress"]["steps"] = 3
        torch.save(checkpoint, path)
    elif how == "value":
        torch.save({**checkpoint, "args": {**checkpoint["args"], "gamma": 2.0}}, path)
        return "--gamma: expected a number in [0, 1], got 2"
    elif how == "no metrics":
        Path("run/metrics.csv").unlink()
        return "No such file"
    elif how == "shapes":
        checkpoint["agent"]["actor.0.weight"] = torch.zeros(64, 7)
        torch.save(checkpoint, path)
        return "size mismatch"
    elif how == "optimizer":
        next(iter(checkpoint["optimizers"].values()))["first_moment"] = torch.zeros(1)
        torch.save(checkpoint, path)
    elif how == "no optimizer":
        del checkpoint["optimizers"]
        torch.save(checkpoint, path)
    elif how == "argument":
        torch.save({**checkpoint, "args": {**checkpoint["args"], "magic": 1}}, path)
        return "magic"
    elif how == "rows":
        Path("run/metrics.csv").write_text("global_step\r\n")
        return "metrics.csv lacks rows"
    elif how == "config":
        Path("run/config.json").write_text("{")
    return ""


BREAKAGES = ["missing", "empty", "truncated", "one bit", "pickle", "bomb", "list", "algorithm", "environment", "shapes"]
BREAKAGES += ["optimizer", "no optimizer", "argument", "rows", "config", "other run", "not finite", "progress", "value"]
BREAKAGES += ["no metrics"]


@each_script
@pytest.mark.parametrize("how", BREAKAGES)
def test_unusable_checkpoint_is_refused_in_one_line(script, how, monkeypatch, capsys):
    stop_after(script, 3, arguments(script, run_dir="run"), monkeypatch)
    said = break_checkpoint(how, script, Path("run/checkpoint.pt"))
    files = {path: path.read_bytes() for path in Path("run").iterdir()}
    status, output, complaint = main(script, ["--resume", "run"], capsys, monkeypatch)
    assert status == 1 and output == ""
    assert complaint.startswith(f"{script.__name__}.py: --resume: expected ") and complaint.count("\n") == 1
    assert said in complaint
    assert {path: path.read_bytes() for path in Path("run").iterdir()} == files and os.listdir() == ["run"]


def test_whatever_bit_is_flipped_the_checkpoint_is_refused_or_as_good():
    script = SCRIPTS["ppo_clip"]
    script.train(arguments(script, run_dir="run"))
    path, rng = Path("run/checkpoint.pt"), random.Random(0)
    content, whole = path.read_bytes(), script.load_checkpoint("run")
    refusals = 0
    for _ in range(200):
        at = rng.randrange(len(content))
        path.write_bytes(content[:at] + bytes([content[at] ^ 1 << rng.randrange(8)]) + content[at + 1 :])
        try:
            checkpoint = script.load_checkpoint("run")
        except script.ArgumentError:
            refusals += 1
            continue
        assert all(torch.equal(checkpoint["agent"][name], tensor) for name, tensor in whole["agent"].items())
        assert checkpoint["args"] == whole["args"] and checkpoint["progress"] == whole["progress"]
    assert refusals > 150


# ------------------------------------------------- interrupts and full disks ------------------------------------------


@on_posix
@pytest.mark.parametrize("mode", ["vector_entry_point", "async"])
def test_ctrl_c_leaves_a_run_to_resume(mode):
    """SIGINT to the whole group, as a terminal sends it: one line, status 130, no process left."""
    options = ["--num-envs", "4", "--vectorization-mode", mode, "--checkpoints", "100", "--quiet", "--run-dir", "run"]
    command = [sys.executable, "-W", "ignore", ROOT / "ppo_clip.py", *options]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    heed = lambda: signal.signal(signal.SIGINT, signal.default_int_handler)  # noqa: E731  what runs behind & ignores it
    process = subprocess.Popen(command, **pipes, start_new_session=True, preexec_fn=heed)
    while not Path("run/metrics.csv").exists() or Path("run/metrics.csv").stat().st_size < 5000:
        assert process.poll() is None
        time.sleep(0.01)
    os.killpg(process.pid, signal.SIGINT)
    said, complaint = process.communicate(timeout=60)
    assert process.returncode == 130 and said == "" and complaint.count("\n") == 1, complaint
    assert complaint.startswith("ppo_clip.py: iteration ")
    assert complaint.endswith("; to go on: python ppo_clip.py --resume run\n")
    with pytest.raises(ProcessLookupError):
        os.killpg(process.pid, 0)
    assert SCRIPTS["ppo_clip"].load_checkpoint("run")["progress"]["global_step"] > 0


@on_posix
def test_file_that_cannot_grow_ends_the_run_in_one_line():
    """The limit stands for a full disk: writing fails in the middle of a checkpoint."""
    import resource

    limit = lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (300_000, 300_000))  # noqa: E731
    command = [sys.executable, ROOT / "ppo_clip.py", "--quiet", "--run-dir", "run"]
    run = subprocess.run(command, capture_output=True, text=True, preexec_fn=limit)
    assert run.returncode == 1 and run.stdout == "" and run.stderr.count("\n") == 1, run.stderr
    assert "File too large" in run.stderr and "the last good checkpoint is run/checkpoint.pt" in run.stderr
    assert SCRIPTS["ppo_clip"].load_checkpoint("run")["progress"]["global_step"] > 0


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
@each_script
def test_full_disk_leaves_the_last_good_checkpoint(script, monkeypatch):
    stop_after(script, 3, arguments(script, run_dir="run"), monkeypatch)
    good = Path("run/checkpoint.pt").read_bytes()
    Path("run/checkpoint.pt.new").symlink_to("/dev/full")
    with pytest.raises(script.RunError, match="No space left on device.*last good checkpoint is run/checkpoint.pt"):
        script.train(script.saved_args("run"))
    assert Path("run/checkpoint.pt").read_bytes() == good
    assert sorted(os.listdir("run")) == ["checkpoint.pt", "config.json", "metrics.csv"]
    assert script.train(script.saved_args("run"))[-1]["global_step"] >= 600


# ------------------------------------------------------ numbers gone wrong --------------------------------------------


@each_script
@pytest.mark.parametrize(
    ("fault", "quantity"),
    [("nan", "observations"), ("infinite", "observations"), ("huge", "observations")]
    + [("nan reward", "rewards"), ("infinite reward", "rewards")],
)
@pytest.mark.filterwarnings("ignore:overflow:RuntimeWarning")
def test_numbers_that_are_not_finite_stop_the_run(script, fault, quantity):
    args = arguments(script, env=f"toys:Faulty-{fault.replace(' ', '-')}-v0", run_dir="run", **NORMS)
    message = rf"iteration \d+: there is NaN or infinity in {quantity}; the last good checkpoint is run.checkpoint.pt"
    with pytest.raises(script.RunError, match=message) as error:
        script.train(args)
    assert "\n" not in str(error.value) and error.value.__cause__ is None
    checkpoint = script.load_checkpoint("run")
    assert all(torch.isfinite(tensor).all() for tensor in checkpoint["agent"].values())
    assert len(script.read_rows(Path("run"))) >= checkpoint["progress"]["iteration"] > 0


@each_script
def test_loss_that_overflows_stops_the_run(script, monkeypatch):
    """Rewards that float32 holds, and products of them that it does not."""
    monkeypatch.setitem(toys.Faulty.REWARDS, "nan reward", 3e38)
    unscaled = {"norm_returns": False} if script.__name__ == "reinforce" else {"norm_adv": False}
    args = arguments(script, env="toys:Faulty-nan-reward-v0", run_dir="run", **unscaled)
    with pytest.raises(script.RunError, match=r"iteration \d+: there is NaN or infinity in loss; the last good"):
        script.train(args)


@each_script
def test_gradient_that_is_not_finite_is_never_followed(script):
    """√|x| at 0, whose slope is infinite, and a slope whose square overflows."""
    steep, steeper = (lambda x: 3e38 * (x - 0.5)), (lambda x: x.abs().sqrt())
    for loss, quantity in [(steeper, "gradient"), (steep, "gradient_norm")]:
        parameters = [torch.nn.Parameter(torch.zeros(()) if quantity == "gradient" else torch.zeros(2))]
        optimizer = script.Adam(parameters, 0.1)
        with pytest.raises(script.RunError, match=f"NaN or infinity in {quantity}$"):
            optimizer.minimize(loss(parameters[0]).sum(), 1)
        assert (parameters[0] == 0).all() and optimizer.state["step"] == 0


@each_script
def test_weights_that_are_not_finite_are_never_saved(script, monkeypatch):
    """Neither those of an update that breaks them behind the optimizer's back, nor statistics."""
    original = script.update

    def breaks_weights(agent, *x):
        metrics = original(agent, *x)
        with torch.no_grad():
            next(agent.parameters())[0, 0] = math.nan
        return metrics

    monkeypatch.setattr(script, "update", breaks_weights)
    with pytest.raises(script.RunError, match="iteration 1: there is NaN or infinity in actor.0.weight"):
        script.train(arguments(script, run_dir="run"))
    assert script.load_checkpoint("run")["progress"]["iteration"] == 0

    def breaks_statistics(agent, *x):
        agent.reward_statistics.var.fill_(math.inf)
        return original(agent, *x)

    monkeypatch.setattr(script, "update", breaks_statistics)
    with pytest.raises(script.RunError, match="there is NaN or infinity in reward_statistics.var"):
        script.train(arguments(script, run_dir="other"))
    assert script.load_checkpoint("other")["progress"]["iteration"] == 0


# ------------------------------------------------------ broken environments -------------------------------------------

SAID = {
    "long": "ValueError: ",
    "short": "ValueError: ",
    "complex": "TypeError: ",
    "text": "Error: ",
    "none": "Error: ",
    "two rewards": "ValueError: ",
    "text reward": "ValueError: could not convert string to float",
    "raises": "ZeroDivisionError: the physics exploded",
    "four values": "ValueError: not enough values to unpack",
}


@pytest.mark.parametrize("fault", SAID)
@pytest.mark.parametrize("mode", ["sync", "async"])
@pytest.mark.parametrize("script", [SCRIPTS["reinforce"], SCRIPTS["ppo_clip"]], ids=["reinforce", "ppo_clip"])
@pytest.mark.filterwarnings("ignore")
def test_environment_that_fails_ends_the_run_with_its_own_error(script, fault, mode):
    args = arguments(script, env=f"toys:Faulty-{fault.replace(' ', '-')}-v0", vectorization_mode=mode, run_dir="run")
    message = f"iteration .: the environment's step failed: .*{SAID[fault]}.*the last good checkpoint is "
    with pytest.raises(script.RunError, match=message) as error:
        script.train(args)
    assert "\n" not in str(error.value) and isinstance(error.value.__cause__, Exception)
    assert not multiprocessing.active_children()


@each_script
@on_posix
def test_worker_process_that_dies_ends_the_run(script):
    with pytest.raises(script.RunError, match=r"iteration \d: .* step failed: \w+: .*; a worker process died;"):
        script.train(arguments(script, env="toys:Faulty-dies-v0", vectorization_mode="async", run_dir="run"))
    assert not multiprocessing.active_children()


@each_script
@pytest.mark.parametrize("mode", ["sync", "async"])
def test_environment_that_cannot_be_reset_leaves_nothing(script, mode):
    with pytest.raises(script.RunError, match="^the environment's reset failed: KeyError: .*no such level"):
        script.train(arguments(script, env="toys:Faulty-reset-raises-v0", vectorization_mode=mode, run_dir="run"))
    assert not multiprocessing.active_children() and not os.listdir()


@pytest.mark.parametrize("fault", ["column-of-rewards", "one-observation", "complex-rewards"])
@pytest.mark.parametrize("script", [SCRIPTS["reinforce"], SCRIPTS["ppo_clip"]], ids=["reinforce", "ppo_clip"])
def test_vector_environment_that_gives_other_arrays_ends_the_run(script, fault):
    with pytest.raises(script.RunError, match=r"step failed: ValueError: expected numbers of shapes .*, got "):
        script.train(arguments(script, env=f"toys:Faulty-{fault}-v0", run_dir="run"))


def test_command_line_shows_the_environments_error_and_sums_it_up_in_the_last_line():
    command = [sys.executable, "-W", "ignore", ROOT / "ppo_clip.py", "--env", "toys:Faulty-raises-v0", "--quiet"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT / "tests")}
    run = subprocess.run([*command, "--run-dir", "run"], capture_output=True, text=True, env=environment)
    *own, summary = run.stderr.splitlines()
    assert run.returncode == 1 and run.stdout == ""
    assert summary.startswith("ppo_clip.py: iteration 2: the environment's step failed: ZeroDivisionError: the physics")
    assert own[0] == "Traceback (most recent call last):" and 'raise ZeroDivisionError("the physics' in "".join(own)
    assert not any("ppo_clip.RunError" in line for line in own)


# ------------------------------------------------- every argument's bad values ----------------------------------------


def main(script, argv, capsys, monkeypatch):
    """Run the script as a program with these arguments; return its exit status, output and errors."""
    with monkeypatch.context() as context:
        context.setattr(sys, "argv", [script.__file__, *argv])
        status = 0
        try:
            runpy.run_path(script.__file__, run_name="__main__")
        except SystemExit as exit:
            status = exit.code
        output, errors = capsys.readouterr()
        if isinstance(status, str):  # what the interpreter does with it
            status, errors = 1, f"{errors}{status}\n"
        return status, output, errors


def bad_values(script):
    """(flag, value) for every field of Args: values of another type, and some that the field's own words exclude."""
    for field in dataclasses.fields(script.Args):
        flag, expected = f"--{field.name.replace('_', '-')}", getattr(field.type, "__metadata__", [""])[0]
        if "whole number" in expected:
            values = ["-1", "1.5", "x", "", "1e99", "nan", str(2**63)] + (["0"] if "[0, " not in expected else [])
        elif expected.startswith(("a number", "a finite number", "None or a number")):
            values = ["-1", "x", "", "nan"]
            values += {"[0, 1]": ["1.1", "inf"], "[0, 1e30]": ["inf", "1e31"], "both": ["0", "1"]}.get(
                next((word for word in ("[0, 1]", "[0, 1e30]", "both") if word in expected), ""), ["0"]
            )
        elif field.type in (bool, "bool"):
            values = ["3"]
        else:
            values = {
                "env": ["NoSuch-v0", "no_such_module:X-v0", ""],
                "device": ["abacus", "cuda:99", ""],
                "run_dir": ["full", "file", "file/below", ""],
                "resume": ["no_such_folder", "full", "file", ""],
                "vectorization_mode": ["x", ""],
            }.get(field.name, ["no such choice", ""])
        yield from ((flag, value) for value in values)


def test_bad_values_are_known_for_every_argument():
    for script in SCRIPTS.values():
        assert {flag for flag, _ in bad_values(script)} == {
            f"--{field.name.replace('_', '-')}" for field in dataclasses.fields(script.Args)
        }


@each_script
def test_bad_value_of_any_argument_is_refused_in_one_line_and_leaves_nothing(script, capsys, monkeypatch):
    Path("full").mkdir()
    Path("full/thing").touch()
    Path("file").touch()
    for flag, value in bad_values(script):
        status, output, errors = main(script, [flag, value], capsys, monkeypatch)
        case = f"{script.__name__} {flag} {value!r}: {errors}"
        assert status == 1 and output == "", case
        assert errors.count("\n") == 1 and errors.startswith(f"{script.__name__}.py: "), case
        assert flag in errors or f"Unrecognized options: {value}" in errors, case
        assert sorted(path.as_posix() for path in Path().rglob("*")) == ["file", "full", "full/thing"], case


def test_help_is_no_error(capsys, monkeypatch):
    status, output, errors = main(SCRIPTS["vpg"], ["--help"], capsys, monkeypatch)
    assert status == 0 and "--resume" in output and errors == ""


# --------------------------------------------------------- the log ----------------------------------------------------


@each_script
def test_rows_are_read_as_they_were_written(script):
    rows = script.train(arguments(script, run_dir="run"))
    file = io.StringIO()
    writer = csv.DictWriter(file, rows[0])
    writer.writeheader()
    writer.writerows(rows)
    assert file.getvalue() == Path("run/metrics.csv").read_bytes().decode()
    assert all(type(rows[-1][name]) is int for name in ("global_step", "episodes", "SPS"))


def test_tensorboard_of_a_resumed_run_has_each_step_once(monkeypatch):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    script = SCRIPTS["ppo_clip"]
    stop_after(script, 7, arguments(script, run_dir="run", tensorboard=True, checkpoints=3), monkeypatch)
    rows = script.train(script.saved_args("run"))
    events = EventAccumulator("run").Reload()
    assert [event.step for event in events.Scalars("losses/entropy")] == [row["global_step"] for row in rows]


def test_script_moved_with_its_run_resumes(tmp_path, monkeypatch):
    """The folder's name is not in the run."""
    script = SCRIPTS["vpg"]
    stop_after(script, 5, arguments(script, run_dir="run"), monkeypatch)
    shutil.move("run", "elsewhere")
    assert script.train(script.saved_args("elsewhere"))[-1]["global_step"] >= 600
    assert os.listdir() == ["elsewhere"]
