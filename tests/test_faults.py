"""Faults that the scripts once had, or were close to: none may come back."""

import csv
import dataclasses
import itertools
import json
import math
import multiprocessing
import os
import re
import shutil
import signal
import subprocess
import sys
import time
import warnings
from importlib import util
from pathlib import Path

import numpy as np
import pytest
import torch
import toys
from gymnasium.spaces import Box
from test_trust import (
    ROOT,
    SCRIPTS,
    arguments,
    assert_same,
    each_script,
    main,
    on_posix,
    program,
    resumed,
)

with_critic = pytest.mark.parametrize("name", [x for x in SCRIPTS if x != "reinforce"])
each_mode = pytest.mark.parametrize("mode", ["sync", "async"])


@pytest.fixture(autouse=True)
def in_empty_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def without_clock(rows):
    return [{k: v for k, v in row.items() if k not in ("wall_time", "SPS")} for row in rows]


# -------------------------------------------- actions ---------------------------------------------


@each_script
def test_actions_span_a_box_from_the_first_rollout_on(script):
    """A policy of mean 0 and std 1/√k covers [−1, 1], and so each component that has two bounds.

    The environment itself refuses what its space does not contain.
    """
    for name, box in toys.boxes.items():
        toys.Target.seen.clear()
        args = arguments(script, env=f"toys:Target{name}-v0", run_dir=name, total_timesteps=1)
        script.train(arguments(script, **vars(args) | {"num_envs": 20}))
        actions, bounded = np.stack(toys.Target.seen), np.isfinite(box.high - box.low)
        low, high = box.low[bounded], box.high[bounded]
        shares = (actions[:, bounded] - low) / (high - low)
        assert len(actions) >= 200, name
        assert (shares.min(axis=0) < 0.1).all() and (shares.max(axis=0) > 0.9).all(), name
        inside = ((shares > 0) & (shares < 1)).mean(axis=0)
        expected = math.erf(math.sqrt(actions.shape[1] / 2))  # of a normal of that std
        assert np.abs(inside - expected).max() < 0.06, (name, inside, expected)
        assert np.abs(shares.mean(axis=0) - 0.5).max() < 0.1, name
    # Last came the mixed box, of which the three other components are as sampled, but clipped.
    for k, bound in [(1, box.low[1]), (2, box.high[2]), (3, 0)]:
        assert np.abs(actions[:, k] - bound).max() < 12 and len(np.unique(actions[:, k])) > 100
    assert actions[:, 3].mean() == pytest.approx(0, abs=0.3)
    assert actions[:, 3].std() == pytest.approx(0.5, abs=0.1)


EDGES = [(-0.1, 0.2), (0, 1000), (100, 200), (-0.01, 0.01), (-2, 2), (0.3, 7.7), (-0.1, 1e-3)]
WILD_EDGES = [(-1 / 3, 2 / 3), (-0.1, 1e9), (1e-30, 0.3), (-1e5, 1e-3), (2 / 3, 7.7), (-1e9, 0.1)]


@each_script
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_edges_are_the_bounds_exactly(script, dtype):
    """Of usual boxes −1 and 1 are the bounds to the bit, else nearly; what is beyond always is."""
    for edges, beyond in [(EDGES, 0), (EDGES, 1e-6), (WILD_EDGES, 1e-6), (EDGES + WILD_EDGES, 2)]:
        low, high = np.array(edges, dtype).T
        envs = script.make_envs("toys:Target-v0", 1, "sync", box=Box(low, high, dtype=dtype))
        envs.reset(seed=1)
        for action, bound in [(-1.0, low), (1.0, high)]:
            envs.step(np.full((1, len(low)), action * (1 + beyond), np.float32))
            seen = toys.Target.seen[-1]
            assert seen.dtype == dtype
            if edges is WILD_EDGES:
                assert (np.abs(seen - bound) <= 1e-7 * (high - low)).all()
            else:
                assert np.array_equal(seen, bound), (seen, bound)
        envs.close()


@each_script
def test_bounds_of_a_box_make_no_difference(script):
    """All of a run but rounding is the same, so that what learns in one box learns in another."""
    tables = []
    for name in ("100To200", "To1000", "Tiny"):
        args = {"env": f"toys:Target{name}-v0", "num_envs": 8, "run_dir": name}
        rows = script.train(script.Args(total_timesteps=20_000, quiet=True, **args))
        assert rows[-1]["episodic_return"] > rows[0]["episodic_return"] + 0.3, name
        tables.append([(row["global_step"], row["episodic_return"]) for row in rows])
    for table in tables[1:]:
        np.testing.assert_allclose(np.array(table, float), np.array(tables[0], float), rtol=1e-3)


# -------------------------------------------- rewards ---------------------------------------------


@each_script
def test_learns_which_rare_reward_is_larger(script):
    """After 399 steps that pay nothing, the last pays 1 or 2; at random, 1.5."""
    args = script.Args(env="toys:LastMovePays-v0", total_timesteps=60_000, quiet=True)
    rows = script.train(dataclasses.replace(args, run_dir="run"))
    assert rows[-1]["episodic_return"] > 1.7


NUMBERED = ["Int32Action", "StartAtOne", "StartAtThree", "NegativeStart", "NoAction"]


@each_script
def test_actions_are_of_their_space(script):
    """Of its dtype, from its start on; the environment refuses what is not. As in play.py, too."""
    for name in NUMBERED:
        env = f"toys:{name}-v0"
        rows = script.train(arguments(script, env=env, run_dir=name, total_timesteps=100))
        assert rows[-1]["global_step"] >= 100
        envs = script.make_envs(env, 3, "sync")
        agent = script.Agent(envs, norm_obs=True)
        obs, _ = envs.reset(seed=1)
        for _ in range(20):
            policy = agent.policy(torch.as_tensor(agent.standardizer()(obs)))
            obs, *_ = envs.step(policy.mode.detach().numpy())
            obs, *_ = envs.step(policy.sample().numpy())
        envs.close()


# --------------------------------------------- info -----------------------------------------------


@each_script
@each_mode
def test_whatever_info_holds_changes_nothing(script, mode):
    options = {"vectorization_mode": mode, "total_timesteps": 100, "num_envs": 2}
    args = arguments(script, env="toys:InformsNothing-v0", run_dir="nothing", **options)
    expected = without_clock(script.train(args))
    assert expected[-1]["episodic_return"] == expected[-1]["episodic_length"] == 10
    for what in ("episode", "winner", "lengths", "recorded"):
        args = arguments(script, env=f"toys:Informs-{what}-v0", run_dir=what, **options)
        assert without_clock(script.train(args)) == expected, what


# --------------------------------------------- seeds ----------------------------------------------


class Seeded(Exception):
    """Raised by a reset with a seed."""


@each_script
def test_seeds_of_environments_have_31_bits(script):
    """Environment n gets the seed of the first one plus n."""

    class Envs:
        observation_space = Box(0, 1, (64, 1))

        def reset(self, seed):
            raise Seeded(seed)

    seeds = []
    for seed, iteration in itertools.product([*range(40), 2**31, 2**63], range(10)):
        args = arguments(script, seed=seed, num_envs=64)
        with pytest.raises(Seeded) as error:
            next(script.rollouts(Envs(), None, args, iteration))
        seeds.append(error.value.args[0])
    assert len(set(seeds)) == len(seeds) == 420
    assert 0 <= min(seeds) and max(seeds) + 64 < 2**31
    args = arguments(script, env="toys:SmallSeeds-v0", num_envs=64, run_dir="run")
    for seed in (1, 2, 3):
        script.train(arguments(script, **vars(args) | {"seed": seed, "run_dir": str(seed)}))


# ---------------------------------------- endless episodes ----------------------------------------


@with_critic
def test_stretch_without_an_end_of_an_episode_warns(name):
    """Returns stay unknown where episodes are longer than a stretch, after which all are reset."""
    script, options = SCRIPTS[name], {"checkpoint_every": 32}
    with pytest.warns(UserWarning, match="--checkpoint-every"):
        script.train(arguments(script, env="toys:OneStateEndless-v0", run_dir="run", **options))


@each_script
def test_nothing_is_warned_of_where_episodes_end(script):
    """Nor does a last stretch warn, which is too short for an episode, nor a resumed run."""
    options = {"env": "toys:InformsNothing-v0", "checkpoint_every": 40, "num_envs": 1}
    options |= (
        {"num_steps": 8, "num_minibatches": 1}
        if script.__name__ != "reinforce"
        else {"norm_returns": False}
    )
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*--checkpoint-every")
        rows = script.train(arguments(script, run_dir="run", total_timesteps=83, **options))
        assert rows[-1]["episodes"] >= 8
        resumed(script, "run", total_timesteps=300)
        script.train(arguments(script, run_dir="default"))
        options["env"] = "toys:OneStateTruncated-v0"  # the last 8 rows see no end of its 10 steps
        rows = script.train(arguments(script, run_dir="short", total_timesteps=45, **options))
        assert script.__name__ == "reinforce" or rows[-1]["episodes"] == rows[-2]["episodes"]


# ----------------------------------------------- β ------------------------------------------------


def test_beta_stays_within_its_limits_and_comes_back():
    """Without a reward the policy stays, and β halves; with one and a small target it doubles."""
    script = SCRIPTS["ppo_kl"]
    options = {"beta": 1.0, "run_dir": "run", "ent_coef": 0.0, "env": "toys:PaysNothing-v0"}
    betas = [row["beta"] for row in script.train(arguments(script, norm_adv=False, **options))]
    assert betas[:3] == [1.0, 0.5, 0.25] and betas[-1] == min(betas) == 0.25 and len(betas) > 4
    changes = {"env": "toys:PaysOne-v0", "target_kl": 1e-9, "total_timesteps": 1500}
    changes |= {"norm_adv": True}
    rows = resumed(script, "run", **changes)
    assert max(row["beta"] for row in rows) > 10 * 0.25
    assert script.adapted(0.25, 0.0, 0.02) == 0.25 and script.adapted(0.25, 1.0, 0.02) == 0.5
    assert script.adapted(1e4, 1.0, 0.02) == 1e4 and script.adapted(1e4, 0.0, 0.02) == 5e3


def test_beta_does_not_grow_without_end():
    """With a target that no step reaches, it stays at its limit, and all numbers are finite."""
    script = SCRIPTS["ppo_kl"]
    options = {"target_kl": 1e-9, "beta": 1000.0, "run_dir": "run", "update_epochs": 2}
    rows = script.train(arguments(script, total_timesteps=2400, **options))
    betas = [row["beta"] for row in rows]
    assert len(rows) >= 50 and max(betas) == 1e4 and min(betas[-10:]) >= 2.5e3
    for row in rows:
        assert np.isfinite([x for x in row.values() if x is not None]).all()


@pytest.mark.parametrize("name", ["ppo_kl", "trpo"])
def test_target_kl_of_0_is_refused(name, capsys, monkeypatch):
    """No β reaches it, and no step is so short."""
    with pytest.raises(SCRIPTS[name].ArgumentError, match="^--target-kl: expected .*, got 0$"):
        SCRIPTS[name].Args(target_kl=0)
    status, output, errors = main(SCRIPTS[name], ["--target-kl", 0], capsys, monkeypatch)
    assert status == 2 and output == "" and "--target-kl: expected a number from" in errors
    assert not os.listdir()


# --------------------------------------- observations far from 0 ----------------------------------


@each_script
@pytest.mark.parametrize("offset", ["1e6", "1e9"])
def test_observations_far_from_0_are_standardised(script, offset):
    """The first component is the second, plus so much: the policy has to see no difference."""
    args = arguments(script, env=f"toys:Far{offset}-v0", num_envs=32)
    envs = script.make_envs(args.env, 32)
    agent = script.Agent(envs, norm_obs=True)
    *_, batch = itertools.islice(script.rollouts(envs, agent, args, 0), 6)
    far, near = batch.obs.T.double()
    assert batch.obs.mean(dim=0).abs().max() < 0.2 and (far.std() - 1).abs() < 0.1
    torch.testing.assert_close(far, near, rtol=1e-4, atol=1e-4)
    _, mean, std = agent.obs_moments
    assert (mean - torch.tensor([float(offset), 0])).abs().max() < 0.2
    assert (std - 1).abs().max() < 0.1


# ------------------------------------ the bar and the run's folder --------------------------------


@each_script
def test_bar_of_a_resumed_run_begins_at_the_saved_step(script, monkeypatch):
    """So that its speed and its remaining time are those of the new steps."""
    bars, tqdm = [], script.tqdm.tqdm

    def bar(*args, **kwargs):
        bars.append(tqdm(*args, **{**kwargs, "file": open(os.devnull, "w")}))
        return bars[-1]

    monkeypatch.setattr(script.tqdm, "tqdm", bar)
    rows = script.train(arguments(script, run_dir="run", quiet=False))
    more = resumed(script, "run", total_timesteps=900)
    assert [x.initial for x in bars] == [0, rows[-1]["global_step"]]
    assert [x.n for x in bars] == [rows[-1]["global_step"], more[-1]["global_step"]]
    assert bars[1].total == 900


@each_script
def test_runs_of_one_second_and_one_seed_have_folders_of_their_own(script, monkeypatch):
    monkeypatch.setattr(time, "strftime", lambda *_: "20260101-000000")
    for _ in range(3):
        script.train(arguments(script, total_timesteps=1))
    folders = sorted(os.listdir("runs"))
    assert len(folders) == 3
    for folder in folders:
        name = f"CartPole-v1__{script.__name__}__1__20260101-000000-"
        assert re.fullmatch(re.escape(name) + r"\d{9}", folder)
        assert len(script.load_run(f"runs/{folder}")[1]["rows"]) == 1


@each_script
def test_slash_of_an_id_makes_no_folder_within_a_folder(script):
    script.train(arguments(script, env="toys:ns/Env-v0", total_timesteps=1))
    (folder,) = os.listdir("runs")
    assert folder.startswith(f"toys-ns-Env-v0__{script.__name__}__1__")
    files = sorted(os.listdir(f"runs/{folder}"))
    assert files == ["checkpoint.pt", "config.json", "metrics.csv"]


# ---------------------------------------- unusable spaces -----------------------------------------

SPACES = {
    "SequenceObservation": r"Sequence\(Box",
    "GraphObservation": r"Graph\(Box",
    "OwnObservation": r"OwnSpace\(\)",
    "OwnInDict": r"Dict\(.*OwnSpace\(\)",
    "OwnAction": r"OwnSpace\(\)",
}


@each_script
@each_mode
def test_space_that_no_agent_can_use_is_shown_and_refused(script, mode):
    for name, shown in SPACES.items():
        args = arguments(script, env=f"toys:{name}-v0", vectorization_mode=mode)
        with pytest.raises(script.ArgumentError, match=f"^--env toys:{name}-v0: ") as error:
            script.train(args)
        assert re.search(shown, str(error.value)) and "docs/runs.md" in str(error.value), name
        assert not os.listdir() and not multiprocessing.active_children()


@each_script
@each_mode
def test_environment_that_needs_an_argument_is_refused_on_one_line(script, mode):
    args = arguments(script, env="toys:NeedsLevel-v0", vectorization_mode=mode)
    with pytest.raises(script.ArgumentError, match="^--env .* missing 1 .*: 'level'") as error:
        script.train(args)
    assert "\n" not in str(error.value) and not os.listdir()


# --------------------------------------------- Ctrl-C ---------------------------------------------


@on_posix
@each_script
@each_mode
def test_ctrl_c_tells_how_to_go_on_and_the_run_then_ends_as_it_would_have(script, mode):
    """In the first stretch. A terminal sends the signal to the worker processes, too."""
    options = ["--num-envs", 2, "--vectorization-mode", mode, "--quiet", "--no-anneal-lr"]
    options += ["--checkpoint-every", 10**6, "--total-timesteps", 10**6, "--run-dir", "stopped"]
    process, metrics = program(script, options), Path("stopped/metrics.csv")
    while not metrics.exists() or metrics.stat().st_size < 300:
        assert process.is_alive(), Path("errors").read_text()
        time.sleep(0.002)
    os.killpg(process.pid, signal.SIGINT)
    process.join(30)
    errors = Path("errors").read_text()
    assert process.exitcode not in (0, None) and Path("output").read_text() == "", errors
    last_line = errors.splitlines()[-1]
    assert last_line == f"{script.__name__}.py: saved to step 0: --resume stopped"
    assert "Traceback" not in errors, errors
    resumed(script, "stopped", total_timesteps=1000)
    args, _ = script.load_run("stopped", resume=None, run_dir="whole")
    script.train(args)
    assert_same("stopped", "whole")


@on_posix
def test_ctrl_c_ends_a_program_started_from_a_shell():
    options = ["--num-envs", "2", "--vectorization-mode", "async", "--run-dir", "run"]
    command = [sys.executable, ROOT / "ppo_clip.py", *options]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    handler = signal.signal(signal.SIGINT, signal.default_int_handler)  # a job of `sh &` ignores it
    process = subprocess.Popen(command, **pipes, start_new_session=True)
    signal.signal(signal.SIGINT, handler)
    while not Path("run/checkpoint.pt").exists():
        assert process.poll() is None
        time.sleep(0.01)
    os.killpg(process.pid, signal.SIGINT)
    output, errors = process.communicate(timeout=60)
    assert process.returncode == 1 and output == "" and "Traceback" not in errors, errors
    assert errors.splitlines()[-1] == "ppo_clip.py: saved to step 0: --resume run"


# --------------------------------------------- copies ---------------------------------------------


def test_script_in_a_package_trains(tmp_path):
    """With gae_fast in the package: nothing is imported from elsewhere. Also without librt."""
    package = tmp_path / "mypackage"
    package.mkdir()
    (package / "__init__.py").touch()
    for name in SCRIPTS:
        text = Path(SCRIPTS[name].__file__).read_text(encoding="utf-8")
        assert text.count("\nimport gae_fast") == 1
        text = text.replace("\nimport gae_fast", "\nfrom . import gae_fast")
        (package / f"{name}.py").write_text(text, encoding="utf-8")
    ignore = shutil.ignore_patterns("__pycache__", "build", "*.egg-info")
    shutil.copytree(ROOT / "gae_fast", package / "gae_fast", ignore=ignore)
    shutil.copytree(package, tmp_path / "without_librt")
    code = f"""
import importlib, sys
sys.modules["gae_fast"] = None  # so that importing it fails
for package in ("mypackage", "without_librt"):
    for name in {[*SCRIPTS]}:
        script = importlib.import_module(f"{{package}}.{{name}}")
        options = {{"num_envs": 2, "quiet": True, "run_dir": f"runs/{{package}} {{name}}"}}
        script.train(script.Args(total_timesteps=50, **options))
    sys.modules |= {{"librt": None, "librt.vecs": None, "librt.internal": None}}
"""
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    command = [sys.executable, "-c", code]
    run = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    for name in SCRIPTS:
        for each in ("mypackage", "without_librt"):
            assert Path(f"runs/{each} {name}/checkpoint.pt").exists()


@each_script
def test_copy_with_an_argument_of_its_own_trains(script, tmp_path, monkeypatch):
    """A float without bounds may be negative."""
    text = Path(script.__file__).read_text(encoding="utf-8")
    lines = text.splitlines(keepends=True)
    (last,) = (n for n, line in enumerate(lines) if line.startswith("    quiet: bool = False"))
    lines.insert(last + 1, "    log_std_init: float = -0.5  # of my own\n")
    (tmp_path / "copy_of_it.py").write_text("".join(lines), encoding="utf-8")
    spec = util.spec_from_file_location("copy_of_it", tmp_path / "copy_of_it.py")
    module = util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "copy_of_it", module)
    spec.loader.exec_module(module)
    args = arguments(module, run_dir="run")
    assert args.log_std_init == -0.5
    rows = module.train(args)
    assert rows[-1]["global_step"] >= 600
    assert module.load_run("run", log_std_init=-math.inf)[0].log_std_init == -math.inf
    config = json.loads(Path("run/config.json").read_text())
    assert config.pop("log_std_init") == -0.5
    Path("run/config.json").write_text(json.dumps(config))  # as of a run before the argument
    assert module.load_run("run")[0].log_std_init == -0.5


# --------------------------------------- files of a run -------------------------------------------


def test_resumed_run_of_other_columns_stops_and_its_table_stays_whole():
    script = SCRIPTS["ppo_kl"]
    rows = script.train(arguments(script, run_dir="run"))
    with pytest.raises(AssertionError, match="columns"):
        resumed(script, "run", penalty="per-sample", total_timesteps=900)
    with open("run/metrics.csv", newline="") as file:
        table = list(csv.reader(file))
    assert {len(row) for row in table} == {len(rows[0])} and len(table) == 1 + len(rows)
    assert script.load_run("run")[1]["rows"] == rows


@each_script
def test_checkpoint_does_not_grow_with_the_rows(script):
    """Beside the weights it has the last 100 episodes, of which all runs here have more."""
    sizes, numbers = [], []
    for steps in (1600, 4800):
        options = {"env": "toys:InformsNothing-v0", "num_envs": 10, "total_timesteps": steps}
        rows = script.train(arguments(script, run_dir=str(steps), **options))
        assert rows[-1]["episodes"] >= 100
        numbers.append(len(rows))
        sizes.append(Path(str(steps), "checkpoint.pt").stat().st_size)
    assert numbers[1] - numbers[0] >= 20 and abs(sizes[1] - sizes[0]) < 300


@each_script
def test_queues_of_ended_episodes_are_empty_after_each_row(script, monkeypatch):
    """Else a long run fills the memory."""
    sizes, write = [], script.Run.write

    def written(run, *args):
        write(run, *args)
        queues = (run.envs.return_queue, run.envs.length_queue, run.envs.time_queue)
        sizes.append([len(queue) for queue in queues])

    monkeypatch.setattr(script.Run, "write", written)
    rows = script.train(arguments(script, env="toys:InformsNothing-v0", run_dir="run"))
    assert rows[-1]["episodes"] >= 2 and len(sizes) >= 2 and not any(map(any, sizes))


@each_script
def test_what_load_run_returns_is_for_one_train(script):
    """A second train would begin with rows and weights that the first has changed."""
    script.train(arguments(script, run_dir="run"))
    args, saved = script.load_run("run", total_timesteps=600)
    script.train(args, saved)
    with pytest.raises(KeyError, match="agent"):
        script.train(args, saved)
