"""What all five scripts promise alike: determinism, the run's folder, spaces, values, learning."""

import csv
import dataclasses
import json
import random
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import toys
from test_trust import NORMS, ROOT, SCRIPTS, arguments, assert_same, each_script, main

import gae_fast


@pytest.fixture(autouse=True)
def in_empty_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def table_of(folder):
    with open(Path(folder, "metrics.csv"), newline="") as file:
        return list(csv.DictReader(file))


def as_text(rows):
    """Rows as metrics.csv has them."""
    return [{k: "" if v is None else str(v) for k, v in row.items()} for row in rows]


def without_clock(rows):
    return [{k: v for k, v in row.items() if k not in ("wall_time", "SPS")} for row in rows]


def trained_agent(script, folder):
    args, saved = script.load_run(folder)
    agent = script.Agent(script.make_envs(args.env), args.norm_obs)
    agent.load_state_dict(saved["agent"])
    return agent


# ------------------------------------------ determinism -------------------------------------------


@each_script
@pytest.mark.parametrize(
    "options", [{}, {"env": "Pendulum-v1", "vectorization_mode": "async", "gamma": 0.9, **NORMS}]
)
def test_one_command_gives_one_outcome_and_config_is_enough_to_repeat_it(script, options):
    script.train(arguments(script, run_dir="run", seed=5, **options))
    assert script.load_run("run", run_dir="run", resume=None)[0] == arguments(
        script, run_dir="run", seed=5, **options
    )
    torch.rand(7), np.random.rand(7), random.random()  # other states of the global generators
    config = json.loads(Path("run/config.json").read_text())
    again = {field.name: config[field.name] for field in dataclasses.fields(script.Args)}
    script.train(script.Args(**{**again, "run_dir": "again"}))
    assert_same("run", "again")
    script.train(script.Args(**{**again, "run_dir": "other", "seed": 6}))
    assert without_clock(table_of("run")) != without_clock(table_of("other"))


@each_script
@pytest.mark.parametrize("norms", [{}, NORMS], ids=["plain", "normalised"])
def test_rows_that_are_no_steps_reach_nothing(script, norms):
    """An environment with NaN where nobody may look trains as one without, to the bit."""
    for env in ("Drift", "AbsurdDrift"):
        options = {"env": f"toys:{env}-v0", "run_dir": env, "num_envs": 4, **norms}
        rows = script.train(arguments(script, **options))
        if script.__name__ != "reinforce":  # whose environments step on while they wait
            assert rows[-1]["global_step"] == toys.Drift.steps
    assert_same("Drift", "AbsurdDrift")


# -------------------------------------------- the run ---------------------------------------------

FIRST = ["global_step", "wall_time", "episodes", "episodic_return", "episodic_length", "SPS"]
PARTS = ["surrogate", "entropy", "approx_kl", "value_loss", "explained_variance"]
METRICS = {
    "reinforce": PARTS[:3],
    "vpg": PARTS,
    "trpo": [*PARTS, "kl", "line_search_steps", "accepted"],
    "ppo_clip": [*PARTS, "clipfrac", "frac_kill"],
    "ppo_kl": [*PARTS, "kl", "beta"],
}
LAST = ["learning_rate"]


@each_script
def test_folder_holds_the_run(script, monkeypatch):
    """Rows, arguments, and the trained agent, whose sampled actions are the same, too."""
    agents, save = [], script.Run.save_checkpoint
    monkeypatch.setattr(
        script.Run, "save_checkpoint", lambda run: (agents.append(run.agent), save(run))
    )
    args = arguments(script, env="Pendulum-v1", run_dir="run", total_timesteps=1300, **NORMS)
    rows = script.train(args)
    assert as_text(rows) == table_of("run")
    assert list(rows[0]) == FIRST + METRICS[script.__name__] + LAST
    assert all(type(rows[-1][name]) is int for name in ("global_step", "episodes", "SPS"))
    assert rows[-2]["global_step"] < 1300 <= rows[-1]["global_step"]
    if script.__name__ != "reinforce":  # which has whole episodes only
        assert rows[0]["episodes"] == 0 and rows[0]["episodic_return"] is None
        assert rows[-1]["episodes"] == 6 and rows[-1]["episodic_length"] == 200
    checkpoint = torch.load("run/checkpoint.pt", weights_only=True)
    assert set(checkpoint) == {"rows", "global_step", "recent", "agent", "optimizer"}
    assert checkpoint["rows"] == len(rows)
    assert checkpoint["global_step"] == rows[-1]["global_step"]
    returns, lengths = np.mean(checkpoint["recent"], axis=0)
    assert (returns, lengths) == (rows[-1]["episodic_return"], rows[-1]["episodic_length"])
    assert len(checkpoint["recent"]) == rows[-1]["episodes"]
    loaded, saved = script.load_run("run")
    assert loaded == dataclasses.replace(args, run_dir=None, resume="run")
    assert saved["rows"] == rows and [*map(type, saved["rows"][-1])] == [*map(type, rows[-1])]

    config = json.loads(Path("run/config.json").read_text())
    assert config.pop("algorithm") == script.__name__
    assert {name: config.pop(name) for name in vars(args)} == vars(args)
    assert set(config) == {"world_size", "numpy", "torch", "gymnasium", "gae_fast"}
    files = ["checkpoint.pt", "config.json", "metrics.csv"]
    assert sorted(path.name for path in Path("run").iterdir()) == files

    agent, obs, actions = trained_agent(script, "run"), 2 * torch.randn(50, 3), []
    for name, tensor in agents[-1].state_dict().items():
        assert torch.equal(tensor, agent.state_dict()[name]), name
    for each in (agent, agents[-1]):
        torch.manual_seed(3)
        standard = torch.as_tensor(each.standardizer()(obs.numpy()))
        actions.append(each.policy(standard).sample())
        rng = np.random.default_rng(3)
        actions.append(each.policy.sampler(rng)(standard.numpy())[0])
    assert torch.equal(actions[0], actions[2]) and np.array_equal(actions[1], actions[3])
    steps = rows[-1]["global_step"]
    assert (agent.obs_moments[0] == steps).all() and agent.reward_moments[0].item() == steps


@each_script
def test_learning_rate_falls_to_nothing_or_stays(script):
    rows = script.train(arguments(script, run_dir="a", anneal_lr=True))
    rates = [row["learning_rate"] for row in rows]
    for rate, step in zip(rates, [0, *(row["global_step"] for row in rows)]):
        assert rate == pytest.approx(rates[0] * (1 - step / 600))
    rows = script.train(arguments(script, run_dir="b", anneal_lr=False))
    assert {row["learning_rate"] for row in rows} == {rates[0]}


@each_script
def test_python_and_command_line_agree(script, capsys, monkeypatch):
    rows = script.train(script.Args(run_dir="run", quiet=True, total_timesteps=900, seed=7))
    argv = ["--seed", 7, "--total-timesteps", 900]
    status, output, errors = main(script, argv, capsys, monkeypatch)
    (folder,) = Path("runs").iterdir()
    assert folder.name.startswith(f"CartPole-v1__{script.__name__}__7__")
    assert without_clock(table_of(folder)) == without_clock(as_text(rows))
    assert status == 0 and output == f"{folder}\n"
    assert "step/s" in errors and f"return={rows[-1]['episodic_return']:.3g}" in errors
    assert main(script, ["--resume", folder, "--quiet"], capsys, monkeypatch) == (0, "", "")


@each_script
def test_help_names_every_argument(script, capsys, monkeypatch):
    status, output, _ = main(script, ["--help"], capsys, monkeypatch)
    assert status == 0
    for field in dataclasses.fields(script.Args):
        assert f"--{field.name.replace('_', '-')}" in output


@pytest.mark.parametrize(("name", "compiled"), [("reinforce", True), ("ppo_clip", False)])
def test_script_copied_elsewhere_with_gae_fast_just_works(name, compiled, tmp_path):
    """Without the compiled gae_fast there is a warning, and the numbers are the same."""
    script = SCRIPTS[name]
    rows = script.train(script.Args(run_dir="run", quiet=True, total_timesteps=900))
    shutil.copy(script.__file__, tmp_path)
    ignored = ["__pycache__", "build", "*.egg-info", *([] if compiled else ["*.so", "*.pyd"])]
    ignore = shutil.ignore_patterns(*ignored)
    shutil.copytree(ROOT / "gae_fast", tmp_path / "gae_fast", ignore=ignore)
    command = [sys.executable, f"{name}.py", "--total-timesteps", "900", "--run-dir", "copy"]
    run = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=True)
    assert without_clock(table_of("copy")) == without_clock(as_text(rows))
    is_compiled = compiled and gae_fast.COMPILED
    assert run.stderr.count("gae_fast runs interpreted") == (not is_compiled)


# ------------------------------------- environments and spaces ------------------------------------

SPACES = ["MatrixAction", "ScalarAction", "Float64", "DictObservation", "OverwritesAction"]
SPACES += ["StartAtThree", "NegativeStart", "Int32Action"]
ENVS = ["FrozenLake-v1", "Taxi-v4", "Blackjack-v1", *(f"toys:{name}-v0" for name in SPACES)]


@each_script
def test_runs_in(script):
    for k, env in enumerate(ENVS):
        rows = script.train(arguments(script, env=env, run_dir=str(k), total_timesteps=200))
        assert rows[-1]["global_step"] >= 200 and np.isfinite(rows[-1]["surrogate"]), env


@each_script
def test_any_number_of_environments_in_any_mode(script):
    for num_envs, mode in [(1, "sync"), (3, "async"), (64, "vector_entry_point")]:
        env = "CartPole-v1" if num_envs == 64 else "Pendulum-v1"
        options = {"num_envs": num_envs, "vectorization_mode": mode, "env": env}
        if script.__name__ == "reinforce" and num_envs == 1:
            options |= {"norm_returns": False}
        rows = script.train(arguments(script, run_dir=str(num_envs), **options))
        steps = 200 if script.__name__ == "reinforce" else 16
        assert num_envs == 64 or rows[0]["global_step"] == num_envs * steps
        assert rows[-1]["global_step"] >= 600 and np.isfinite(rows[-1]["surrogate"])


# ------------------------------------------- learning ---------------------------------------------


@pytest.mark.parametrize("ending", ["Truncated", "Terminated"])
@pytest.mark.parametrize("name", ["vpg", "ppo_clip"])
def test_truncation_bootstraps_and_termination_does_not(name, ending):
    """One state, reward 1: worth 1 / (1 − γ) if cut after 10 steps, else a mean of four sums.

    Here the critic learns it; test_ppo_clip.py checks what the critics of all scripts are taught.
    """
    script = SCRIPTS[name]
    options = {"num_envs": 4, "num_steps": 32, "total_timesteps": 12_000, "gamma": 0.9}
    rates = [x.name for x in dataclasses.fields(script.Args) if x.name.endswith("learning_rate")]
    options |= {"run_dir": "run", "gae_lambda": 1.0, rates[-1]: 1e-2}
    options |= {"norm_obs": False, "norm_reward": False}
    options |= {"value_epochs": 10} if name == "vpg" else {"update_epochs": 10}
    script.train(arguments(script, env=f"toys:OneState{ending}-v0", **options))
    finite_sum = sum(sum(0.9**k for k in range(left)) for left in (1, 2, 3, 4)) / 4
    expected = 1 / (1 - 0.9) if ending == "Truncated" else finite_sum
    value = trained_agent(script, "run").value(torch.ones(1)).item()
    assert value == pytest.approx(expected, rel=0.03)


LEARNS = {"reinforce": 80_000, "vpg": 60_000, "trpo": 40_000, "ppo_clip": 40_000, "ppo_kl": 40_000}


@each_script
def test_learns_cartpole(script):
    steps = LEARNS[script.__name__]
    rows = script.train(script.Args(total_timesteps=steps, run_dir="run", quiet=True))
    assert rows[0]["episodic_return"] < 50 and rows[-1]["episodic_return"] > 150
