"""play.py: policies of all five scripts, played, shown and filmed."""

import importlib
import os
import runpy
import sys
from pathlib import Path

import gymnasium
import imageio.v2
import numpy as np
import pytest
import torch
from test_trust import BREAKAGES, SCRIPTS, arguments, break_checkpoint, each_script

import play

ROOT = Path(__file__).parent.parent


@pytest.fixture(autouse=True)
def in_empty_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("SDL_VIDEODRIVER", "dummy")  # windows that no screen shows


def main(argv, capsys, monkeypatch):
    """Run play.py as a program; return its exit status, output and errors."""
    monkeypatch.setattr(sys, "argv", ["play.py", *argv])
    status = 0
    try:
        runpy.run_path(str(ROOT / "play.py"), run_name="__main__")
    except SystemExit as exit:
        status = exit.code
    output, errors = capsys.readouterr()
    return (1, output, f"{errors}{status}\n") if isinstance(status, str) else (status, output, errors)


@each_script
@pytest.mark.parametrize("env", ["CartPole-v1", "Pendulum-v1", "toys:StartAtThree-v0", "toys:MatrixAction-v0"])
@pytest.mark.parametrize("actions", [["--deterministic"], ["--stochastic"], []])
def test_plays_what_any_script_trained(script, env, actions, capsys, monkeypatch):
    script.train(arguments(script, env=env, run_dir="run", norm_obs=True))
    capsys.readouterr()
    status, output, errors = main(["run", "--episodes", "2", *actions], capsys, monkeypatch)
    steps = script.load_checkpoint("run")["progress"]["global_step"]
    assert status == 0 and output.startswith(f"{env}, {script.__name__} after {steps:,} steps: return ")
    assert output.endswith(f"2 episodes, {'sampled' if '--stochastic' in actions else 'most probable'} actions\n")


def test_returns_and_lengths_are_the_environments(capsys):
    """Beside a loop of its own over a single environment, with the weights read anew."""
    script = SCRIPTS["ppo_clip"]
    script.train(arguments(script, vectorization_mode="sync", run_dir="run", norm_obs=True, total_timesteps=3000))
    returns, lengths = play.play(play.Args("run", episodes=3, seed=5))
    env = gymnasium.make("CartPole-v1")
    agent = script.Agent(env.observation_space, env.action_space, norm_obs=True)
    agent.load_state_dict(torch.load("run/checkpoint.pt", weights_only=True)["agent"])
    expected = []
    for episode in range(3):
        obs, _ = env.reset(seed=5 if episode == 0 else None)
        rewards, over = [], False
        while not over:
            action = agent.actor(agent.standardize(torch.as_tensor(obs))).argmax().item()
            obs, reward, terminated, truncated, _ = env.step(action)
            rewards.append(reward)
            over = terminated or truncated
        expected.append((sum(rewards), len(rewards)))
    assert list(zip(returns, lengths)) == expected and len(set(lengths)) > 1
    said = capsys.readouterr().out
    assert f"return {np.mean(returns):.1f} ± {np.std(returns):.1f}, length {np.mean(lengths):.1f} ± " in said


def test_one_seed_gives_the_same_episodes_and_another_gives_others():
    script = SCRIPTS["vpg"]
    script.train(arguments(script, env="Pendulum-v1", run_dir="run", vectorization_mode="async"))
    for stochastic in (False, True):
        first, again, other = (play.play(play.Args("run", 3, seed, stochastic=stochastic)) for seed in (1, 1, 2))
        assert first == again != other and len(set(first[0])) == 3
    assert play.play(play.Args("run", 3)) != play.play(play.Args("run", 3, stochastic=True))
    assert play.play(play.Args("run", 3)) == play.play(play.Args("run", 3, deterministic=True))


def test_an_episode_without_an_end_is_cut(capsys):
    script = SCRIPTS["vpg"]
    script.train(arguments(script, env="toys:OneStateEndless-v0", run_dir="run"))
    assert play.play(play.Args("run", 2, max_episode_steps=7)) == ([7.0, 7.0], [7, 7])


@pytest.mark.parametrize("name", ["film.mp4", "film.gif"])
@pytest.mark.parametrize("env", ["CartPole-v1", "Acrobot-v1"])
def test_video_is_one_of_the_first_episode(name, env, capsys, monkeypatch):
    """A real file, read back: its frames, their size, that something moves."""
    script = SCRIPTS["reinforce"]
    script.train(arguments(script, env=env, run_dir="run", total_timesteps=60, max_episode_steps=20))
    argv = ["run", "--episodes", "2", "--video", name, "--max-episode-steps", "30"]
    status, output, errors = main(argv, capsys, monkeypatch)
    assert status == 0 and "return" in output, errors
    with imageio.v2.get_reader(name) as video:
        frames = [np.asarray(frame) for frame in video]
        speed = video.get_meta_data()["fps"] if name == "film.mp4" else 1000 / video.get_meta_data()["duration"]
    single = gymnasium.make(env, render_mode="rgb_array")
    assert 5 <= len(frames) <= 30
    assert speed == pytest.approx(single.metadata["render_fps"], rel=0.12)  # a GIF counts in hundredths of a second
    single.reset()
    assert frames[0].shape[:2] == single.render().shape[:2]
    assert (frames[0].astype(int) != frames[-1]).mean() > 0.001
    assert sorted(os.listdir()) == [name, "run"]


@pytest.mark.parametrize("name", ["film.mp4", "film.gif"])
def test_video_of_an_episode_that_fails_leaves_no_file(name, monkeypatch):
    script = SCRIPTS["vpg"]
    script.train(arguments(script, run_dir="run"))
    Path(name).write_bytes(b"the one before")
    checks = iter([None, None])
    monkeypatch.setattr(script, "check_finite", lambda **_: next(checks, 1) and 1 / 0)
    monkeypatch.setattr(script, "load_checkpoint", lambda folder: torch.load(f"{folder}/checkpoint.pt"))
    with pytest.raises(ZeroDivisionError):
        play.play(play.Args("run", video=name))
    assert sorted(os.listdir()) == [name, "run"] and Path(name).read_bytes() == b"the one before"


def test_window_opens():
    script = SCRIPTS["vpg"]
    script.train(arguments(script, run_dir="run"))
    pygame = importlib.import_module("pygame")
    opened = []
    original = pygame.display.set_mode
    with pytest.MonkeyPatch.context() as context:
        context.setattr(pygame.display, "set_mode", lambda *x: (opened.append(x), original(*x))[1])
        play.play(play.Args("run", 1, render="human", max_episode_steps=5))
    assert opened


@pytest.mark.parametrize(
    ("argv", "named"),
    [
        ([], "STR folder of the run"),
        (["nowhere"], "run: expected the folder of a run, got 'nowhere'"),
        (["run", "--episodes", "0"], "--episodes: expected a whole number in [1, 2^63), got 0"),
        (["run", "--episodes", "x"], "--episodes"),
        (["run", "--seed", "-1"], "--seed: expected"),
        (["run", "--max-episode-steps", "0"], "--max-episode-steps: expected"),
        (["run", "--deterministic", "--stochastic"], "--deterministic: expected it or --stochastic, got both"),
        (["run", "--render", "rgb_array"], "--render"),
        (["run", "--render", "human", "--video", "a.mp4"], "--render: expected"),
        (["run", "--video", "a.avi"], "--video: expected a file .mp4 or .gif"),
        (["run", "--video", "nowhere/a.mp4"], "--video: expected a file .mp4 or .gif in a folder to write to"),
        (["run", "--video", "dir.gif"], "--video: expected a file .mp4 or .gif"),
        (["toy", "--video", "a.mp4"], "render_mode"),
        (["sac"], "run: expected one of "),
    ],
)
@pytest.mark.filterwarnings("ignore")
def test_bad_argument_is_refused_in_one_line_and_leaves_nothing(argv, named, capsys, monkeypatch):
    script = SCRIPTS["vpg"]
    script.train(arguments(script, run_dir="run", total_timesteps=50))
    script.train(arguments(script, env="toys:Float64-v0", run_dir="toy", total_timesteps=50))
    Path("sac").mkdir()
    Path("dir.gif").mkdir()
    Path("sac/config.json").write_text('{"algorithm": "sac"}')
    status, output, errors = main(argv, capsys, monkeypatch)
    assert status == 1 and output == "" and errors.count("\n") == 1 and errors.startswith("play.py: ")
    assert named in errors and sorted(os.listdir()) == ["dir.gif", "run", "sac", "toy"]


@pytest.mark.parametrize("how", [how for how in BREAKAGES if "optimizer" not in how and how != "rows"])
def test_unusable_checkpoint_is_refused_in_one_line(how, capsys, monkeypatch):
    script = SCRIPTS["ppo_kl"]
    script.train(arguments(script, run_dir="run"))
    said = break_checkpoint(how, script, Path("run/checkpoint.pt"))
    status, output, errors = main(["run"], capsys, monkeypatch)
    assert status == 1 and output == "" and errors.count("\n") == 1 and errors.startswith("play.py: run: expected ")
    assert said in errors and os.listdir() == ["run"]


def test_environment_that_fails_is_named(capsys, monkeypatch):
    script = SCRIPTS["vpg"]
    script.train(arguments(script, env="toys:Faulty-raises-v0", run_dir="run", total_timesteps=50))
    status, _, errors = main(["run", "--episodes", "9"], capsys, monkeypatch)
    assert status == 1 and "the environment's step failed: ZeroDivisionError: the physics exploded" in errors
