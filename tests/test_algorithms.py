"""What all five scripts promise alike, shown for each of them; test_ppo_clip.py looks closer at the shared text."""

import csv
import dataclasses
import importlib
import json
import math
import shutil
import subprocess
import sys
from pathlib import Path

import gymnasium
import pytest
import torch
import toys

ROOT = Path(__file__).parent.parent
NAMES = ("reinforce", "vpg", "trpo", "ppo_clip", "ppo_kl")
SCRIPTS = {name: importlib.import_module(name) for name in NAMES}
SHORT = {"total_timesteps": 400, "num_envs": 4, "quiet": True}

each_script = pytest.mark.parametrize("script", SCRIPTS.values(), ids=SCRIPTS)


@pytest.fixture(autouse=True)
def in_empty_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def arguments(script, **options):
    """Args for a short run, with rollouts of 16 steps where the script has rollouts of a length."""
    steps = {"num_steps": 16} if "num_steps" in vars(script.Args()) else {}
    return script.Args(**{**SHORT, **steps, **options})


def outcome(rows):
    """The rows without what a clock put into them, as text, where NaN equals NaN."""
    return str([{name: value for name, value in row.items() if name not in ("wall_time", "SPS")} for row in rows])


def test_all_five_are_here():
    assert set(SCRIPTS) == {"reinforce", "vpg", "trpo", "ppo_clip", "ppo_kl"}


@each_script
@pytest.mark.parametrize(
    "options", [{"env": "CartPole-v1"}, {"env": "Pendulum-v1", "norm_obs": True, "norm_reward": True}]
)
def test_one_command_gives_one_outcome(script, options):
    outcomes = []
    for run_dir, seed in (("a", 1), ("b", 1), ("c", 2)):
        rows = script.train(arguments(script, run_dir=run_dir, seed=seed, total_timesteps=3000, **options))
        checkpoint = torch.load(Path(run_dir, "checkpoint.pt"), weights_only=True)
        outcomes.append((outcome(rows), checkpoint["agent"]))
    (rows, weights), (rows_again, weights_again), (other_rows, _) = outcomes
    assert rows == rows_again != other_rows
    assert all(torch.equal(weights[name], weights_again[name]) for name in weights)


@each_script
@pytest.mark.parametrize("norm", [False, True])
def test_rows_that_are_no_steps_reach_nothing(script, norm):
    """A vector environment that puts nonsense where nobody may look trains as one that does not, to the bit."""
    runs = {}
    for env in ("toys:Drift-v0", "toys:AbsurdDrift-v0"):
        args = arguments(script, env=env, run_dir=env[5:], norm_obs=norm, norm_reward=norm)
        runs[env] = outcome(script.train(args)), torch.load(Path(env[5:], "checkpoint.pt"), weights_only=True)
    (rows, checkpoint), (absurd_rows, absurd_checkpoint) = runs.values()
    assert rows == absurd_rows
    for name, tensor in checkpoint["agent"].items():
        assert torch.equal(tensor, absurd_checkpoint["agent"][name]), name


SPACES = ["NegativeStart", "MatrixAction", "ScalarAction", "Float64", "DictObservation", "OverwritesAction"]


@each_script
@pytest.mark.parametrize("env", ["FrozenLake-v1", "Blackjack-v1", "Taxi-v4", *(f"toys:{name}-v0" for name in SPACES)])
def test_runs_in(script, env):
    rows = script.train(arguments(script, env=env, run_dir="run"))
    assert rows[-1]["global_step"] >= 400
    finite = set(rows[-1]) - {"explained_variance", "episodic_return", "episodic_length"}
    assert all(math.isfinite(rows[-1][name]) for name in finite)


@each_script
@pytest.mark.parametrize("options", [{"num_envs": 1}, {"num_envs": 64}, {"vectorization_mode": "async"}])
def test_one_environment_or_many_in_one_process_or_several(script, options):
    assert script.train(arguments(script, run_dir="run", **{"total_timesteps": 3000, **options}))[-1]["episodes"] > 0


@each_script
def test_learning_rate_falls_to_nothing_and_stays_where_told(script):
    rows = script.train(arguments(script, run_dir="a", total_timesteps=3000))
    rates = [row["learning_rate"] for row in rows]
    for rate, step in zip(rates, [0, *(row["global_step"] for row in rows)]):
        assert rate == pytest.approx(rates[0] * (1 - step / 3000))
    rows = script.train(arguments(script, run_dir="b", total_timesteps=1000, anneal_lr=False))
    assert {row["learning_rate"] for row in rows} == {rates[0]}


@each_script
def test_checkpoint_holds_the_trained_policy(script, monkeypatch):
    agents, save_checkpoint = [], script.save_checkpoint
    monkeypatch.setattr(script, "save_checkpoint", lambda *x: (agents.append(x[2]), save_checkpoint(*x)))
    args = arguments(
        script, env="Pendulum-v1", run_dir="run", total_timesteps=3000, norm_obs=True, norm_reward=True, device="cpu"
    )
    script.train(args)
    checkpoint = torch.load("run/checkpoint.pt", weights_only=True)
    assert checkpoint["algorithm"] == script.__name__ and script.Args(**checkpoint["args"]) == args
    envs = script.make_envs(args)
    agent = script.Agent(envs.single_observation_space, envs.single_action_space, norm_obs=True)
    agent.load_state_dict(checkpoint["agent"])
    for name, tensor in agents[-1].state_dict().items():
        assert torch.equal(tensor, agent.state_dict()[name]), name
    assert agent.obs_statistics.count > 0
    assert all(optimizer["step"] > 0 for optimizer in checkpoint["optimizers"].values())


@each_script
def test_python_and_command_line_agree(script):
    command = [sys.executable, ROOT / f"{script.__name__}.py", "--total-timesteps", "400", "--num-envs", "4"]
    rows = script.train(dataclasses.replace(script.Args(run_dir="a", quiet=True), total_timesteps=400, num_envs=4))
    run = subprocess.run([*command, "--run-dir", "b"], capture_output=True, text=True, check=True)
    with open("b/metrics.csv", newline="") as file:
        table = list(csv.DictReader(file))
    as_text = [{name: "" if value is None else str(value) for name, value in row.items()} for row in rows]
    assert outcome(table) == outcome(as_text)
    assert run.stdout.count("\n") == 1 and run.stdout.endswith("; b\n")
    assert json.loads(Path("b/config.json").read_text())["algorithm"] == script.__name__


@each_script
def test_script_copied_elsewhere_with_gae_fast_just_works(script, tmp_path):
    shutil.copy(script.__file__, tmp_path)
    shutil.copytree(ROOT / "gae_fast", tmp_path / "gae_fast", ignore=shutil.ignore_patterns("__pycache__", "build"))
    command = [sys.executable, Path(script.__file__).name, "--total-timesteps", "200", "--run-dir", "run", "--quiet"]
    run = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=True)
    assert run.stdout == run.stderr == "" and (tmp_path / "run/checkpoint.pt").exists()


@each_script
def test_help_names_every_argument(script):
    run = subprocess.run([sys.executable, script.__file__, "--help"], capture_output=True, text=True, check=True)
    for field in dataclasses.fields(script.Args):
        assert f"--{field.name.replace('_', '-')}" in run.stdout


def bad_values():
    """Values that the type of an argument cannot hold, for every number among the arguments of every script."""
    for name, script in SCRIPTS.items():
        for field in dataclasses.fields(script.Args):
            expected = getattr(field.type, "__metadata__", [""])[0]
            if "whole number" in expected:
                values = [-1, 1.5, "3"] + ([] if "[0, " in expected else [0])
            elif "[0, 1]" in expected or "both excluded" in expected:
                values = [-0.1, 1.1, float("nan"), "x"] + ([0.0, 1.0] if "both excluded" in expected else [])
            elif expected:
                values = [-1.0, float("nan"), "x"] + ([0.0] if "above 0" in expected else [])
                values += [float("inf")] if "finite" in expected else []
            else:
                values = []
            yield from (pytest.param(script, field.name, value, id=f"{name}-{field.name}-{value}") for value in values)


@pytest.mark.parametrize(("script", "name", "value"), list(bad_values()))
def test_bad_value_is_refused_by_name_and_leaves_nothing(script, name, value):
    with pytest.raises(script.ArgumentError, match=f"^--{name.replace('_', '-')}: expected .*, got {value!r}$"):
        script.train(arguments(script, **{name: value}))
    assert not list(Path.cwd().iterdir())


@pytest.mark.parametrize(
    ("script", "options"),
    [
        ("trpo", {"num_minibatches": 5}),
        ("vpg", {"num_minibatches": 64}),
        ("ppo_kl", {"num_minibatches": 5}),
        ("ppo_kl", {"beta": 0.0}),
        ("ppo_kl", {"beta": 1e9}),
        ("reinforce", {"num_envs": 1, "reward_to_go": False}),
    ],
)
def test_values_that_do_not_go_together_are_refused(script, options):
    name = next(iter(options))
    with pytest.raises(SCRIPTS[script].ArgumentError, match=f"^--{name.replace('_', '-')}: expected .*, got "):
        SCRIPTS[script].train(arguments(SCRIPTS[script], **options))
    assert not list(Path.cwd().iterdir())


LEARNS = {"reinforce": 100_000, "vpg": 120_000, "trpo": 60_000, "ppo_clip": 60_000, "ppo_kl": 60_000}


@each_script
def test_learns_cartpole(script):
    rows = script.train(script.Args(total_timesteps=LEARNS[script.__name__], run_dir="run", quiet=True))
    assert rows[0]["episodic_return"] < 50 and rows[-1]["episodic_return"] > 150


@pytest.mark.parametrize("script", [SCRIPTS["vpg"], SCRIPTS["trpo"]])
@pytest.mark.parametrize("ending", ["Truncated", "Terminated"])
def test_truncation_bootstraps_and_termination_does_not(script, ending):
    """One state, reward 1. Cut after 10 steps, it is worth 1 / (1 − γ); ended after 4, the mean of 4 finite sums."""
    options = {"num_steps": 32, "total_timesteps": 20_000, "gamma": 0.9, "gae_lambda": 1.0}
    name = "value_learning_rate" if "value_learning_rate" in vars(script.Args()) else "learning_rate"
    args = arguments(script, env=f"toys:OneState{ending}-v0", run_dir="run", **options, **{name: 1e-2})
    script.train(args)
    agent = script.Agent(toys.OneState.observation_space, gymnasium.spaces.Discrete(2), norm_obs=False)
    agent.load_state_dict(torch.load("run/checkpoint.pt", weights_only=True)["agent"])
    finite_sum = sum(sum(0.9**k for k in range(left)) for left in (1, 2, 3, 4)) / 4
    expected = 1 / (1 - 0.9) if ending == "Truncated" else finite_sum
    assert agent.value(torch.ones(1)).item() == pytest.approx(expected, rel=0.03)
