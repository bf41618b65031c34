"""play.py: policies of all five scripts, played, shown and filmed."""

import importlib
import importlib.util
import json
import os
import pickle
import subprocess
import sys
from pathlib import Path

import gymnasium
import imageio.v2
import numpy as np
import pytest
import torch
import tyro

import play

ROOT = Path(__file__).parent.parent
SCRIPTS = ("reinforce", "vpg", "trpo", "ppo_clip", "ppo_kl")


@pytest.fixture(autouse=True)
def in_empty_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("SDL_VIDEODRIVER", "dummy")  # windows that no screen shows


def train(name, env="CartPole-v1", **options):
    """Train a script for a moment, into the folder run; return the script and the rows."""
    script = importlib.import_module(name)
    options = {"num_envs": 2, "total_timesteps": 150, "run_dir": "run", "quiet": True} | options
    if name != "reinforce":
        options["num_steps"] = 16
    return script, script.train(script.Args(env=env, **options))


def refusal(argv, capsys):
    """What the command line says as it refuses its arguments, without the box around it."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as exit:
        tyro.cli(play.Args, args=argv)
    output, errors = capsys.readouterr()
    assert exit.value.code == 2 and output == ""
    return " ".join(errors.replace("│", " ").split())


@pytest.mark.parametrize("name", SCRIPTS)
@pytest.mark.parametrize(
    "env", ["CartPole-v1", "Pendulum-v1", "toys:DictObservation-v0", "toys:MatrixAction-v0"]
)
def test_plays_what_any_script_trained(name, env, capsys):
    """The toys refuse an action outside their action space."""
    _, rows = train(name, env, norm_obs=True)
    for stochastic, actions in ((False, "most probable"), (True, "sampled")):
        returns, lengths = play.play(play.Args("run", 2, stochastic=stochastic))
        said = capsys.readouterr().out
        assert said.startswith(f"{env}, {name} after {rows[-1]['global_step']:,} steps: return ")
        assert said.endswith(f", 2 episodes, {actions} actions\n")
        assert len(returns) == len(lengths) == 2
        if "toys" in env:
            assert returns == [2.5, 2.5] and lengths == [5, 5]


def test_returns_and_lengths_are_the_environments(capsys):
    """Beside a loop of its own over a single environment, with the weights read anew."""
    script, _ = train("ppo_clip", vectorization_mode="sync", norm_obs=True, total_timesteps=500)
    capsys.readouterr()
    returns, lengths = play.play(play.Args("run", episodes=3, seed=5))
    env = gymnasium.make("CartPole-v1")
    agent = script.Agent(script.make_envs("CartPole-v1"), norm_obs=True)
    agent.load_state_dict(torch.load("run/checkpoint.pt", weights_only=True)["agent"])
    _, mean, std = agent.obs_moments
    assert not torch.allclose(std, torch.ones_like(std), atol=0.3)
    expected = []
    for episode in range(3):
        obs, _ = env.reset(seed=5 if episode == 0 else None)
        rewards, over = [], False
        while not over:
            standard_obs = ((torch.as_tensor(obs) - mean) / std).float()
            action = agent.policy.mlp(standard_obs).argmax().item()
            obs, reward, terminated, truncated, _ = env.step(action)
            rewards.append(reward)
            over = terminated or truncated
        expected.append((sum(rewards), len(rewards)))
    assert list(zip(returns, lengths)) == expected and len(set(lengths)) > 1
    said = capsys.readouterr().out
    assert f"return {np.mean(returns):.1f} ± {np.std(returns):.1f}, length " in said
    assert f", length {np.mean(lengths):.1f} ± {np.std(lengths):.1f}, 3 episodes" in said


def test_one_seed_gives_the_same_episodes_and_another_gives_others():
    train("vpg", "Pendulum-v1", vectorization_mode="async")
    played = {}
    for stochastic in (False, True):
        options = {"stochastic": stochastic, "max_episode_steps": 30}
        first, again, other = (play.play(play.Args("run", 3, x, **options)) for x in (1, 1, 2))
        assert first == again != other and len(set(first[0])) == 3
        played[stochastic] = first
    assert played[False] != played[True]


def test_an_episode_without_an_end_is_cut():
    train("vpg", "toys:OneStateEndless-v0")
    args = play.Args("run", 2, max_episode_steps=7)
    assert play.play(args) == ([7.0, 7.0], [7, 7])


@pytest.mark.parametrize("name", ["film.mp4", "film.gif"])
@pytest.mark.parametrize("env", ["CartPole-v1", "Acrobot-v1"])
def test_video_is_one_of_the_first_episode(name, env):
    """A real file, read back: its frames, their size, that something moves."""
    train("reinforce", env, total_timesteps=40, max_episode_steps=20)
    _, lengths = play.play(play.Args("run", 2, video=name, max_episode_steps=30))
    with imageio.v2.get_reader(name) as video:
        frames = [np.asarray(frame) for frame in video]
        about = video.get_meta_data()
    speed = about["fps"] if name == "film.mp4" else 1000 / about["duration"]
    single = gymnasium.make(env, render_mode="rgb_array")
    # A GIF counts in hundredths of a second, and takes frames that are alike for one.
    assert speed == pytest.approx(single.metadata["render_fps"], rel=0.12)
    count = lengths[0] + 1  # what each action was taken in, and what the last one led to
    assert len(frames) == count if name == "film.mp4" else 5 <= len(frames) <= count
    single.reset()
    assert frames[0].shape[:2] == single.render().shape[:2]
    assert (frames[0].astype(int) != frames[-1]).mean() > 0.001
    assert sorted(os.listdir()) == [name, "run"]


@pytest.mark.parametrize("name", ["film.mp4", "film.gif"])
def test_video_of_an_episode_that_fails_leaves_no_file(name, monkeypatch):
    script, _ = train("vpg")
    Path(name).write_bytes(b"the one before")
    forward, calls = script.Policy.forward, iter(range(10))

    def fail_in_the_fifth_step(policy, obs):
        assert len(obs) > 1 or next(calls) < 4, "on purpose"  # Policy's check has many rows
        return forward(policy, obs)

    monkeypatch.setattr(script.Policy, "forward", fail_in_the_fifth_step)
    with pytest.raises(AssertionError, match="on purpose"):
        play.play(play.Args("run", video=name))
    assert sorted(os.listdir()) == [name, "run"] and Path(name).read_bytes() == b"the one before"


def test_window_opens(monkeypatch):
    train("vpg")
    pygame = importlib.import_module("pygame")
    opened, set_mode = [], pygame.display.set_mode
    monkeypatch.setattr(pygame.display, "set_mode", lambda *x: (opened.append(x), set_mode(*x))[1])
    play.play(play.Args("run", 1, render="human", max_episode_steps=5))
    assert opened


REFUSED = [
    ("", "Missing"),
    ("nowhere", "run: expected the folder of a run, got 'nowhere'"),
    ("run --episodes 0", "--episodes: expected a number from 1, got 0"),
    ("run --episodes x", "--episodes"),
    ("run --seed -1", "--seed: expected a number from 0, got -1"),
    ("run --max-episode-steps 0", "--max-episode-steps: expected a number from 1, got 0"),
    ("run --render rgb_array", "--render"),
    ("run --render human --video a.mp4", "--render: expected a window or --video, got both"),
    ("run --video a.avi", "--video: expected an .mp4 or .gif file in a writable folder"),
    ("run --video nowhere/a.mp4", "--video: expected an .mp4 or .gif file in a writable folder"),
    ("run --video dir.gif", "--video: expected a file, got the folder 'dir.gif'"),
    ("toy --video a.mp4", "--video: expected an environment that is drawn: "),
    ("toy --video a.gif", "unexpected keyword argument 'render_mode'"),
    ("toy --render human", "--render: expected an environment that is drawn: "),
]


@pytest.mark.filterwarnings("ignore")
def test_bad_argument_is_named_and_leaves_nothing(capsys):
    train("vpg")
    train("vpg", "toys:Float64-v0", run_dir="toy")
    Path("dir.gif").mkdir()
    for argv, named in REFUSED:
        assert named in refusal(argv.split(), capsys), argv
        assert sorted(os.listdir()) == ["dir.gif", "run", "toy"]


@pytest.mark.parametrize("missing", ["imageio", "imageio_ffmpeg"])
def test_missing_imageio_is_named(missing, capsys, monkeypatch):
    train("vpg")
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda x: x != missing and find_spec(x))
    said = "--video: expected the package imageio[ffmpeg], found none"
    assert said in refusal(["run", "--video", "a.mp4"], capsys)
    tyro.cli(play.Args, args=["run"])  # which needs none
    if missing == "imageio_ffmpeg":
        tyro.cli(play.Args, args=["run", "--video", "a.gif"])


class Bomb:
    """Leaves a folder behind if it is unpickled."""

    def __reduce__(self):
        return os.mkdir, ("exploded",)


def test_unusable_checkpoint_is_refused_and_runs_nothing(capsys, monkeypatch):
    """Nor is a module imported that the checkpoint names, if it is no script beside play.py."""
    train("ppo_kl")
    path = Path("run/checkpoint.pt")
    content, checkpoint = path.read_bytes(), torch.load(path, weights_only=True)
    Path("evil.py").write_text("import os\n\n\ndef train():\n    pass\n\n\nos.mkdir('exploded')\n")
    monkeypatch.syspath_prepend(os.getcwd())
    wrong_shape = {**checkpoint["agent"], "policy.mlp.0.weight": torch.zeros(64, 7)}
    contents = [
        ("No such file", None),
        ("", b""),  # torch says little about these two
        ("", content[: len(content) // 2]),
        ("Weights only load failed", pickle.dumps({"agent": Bomb()}, protocol=2)),
        ("Weights only load failed", {**checkpoint, "agent": Bomb()}),
        ("list indices", [1, 2]),
        ("size mismatch for policy.mlp.0.weight", {**checkpoint, "agent": wrong_shape}),
    ]
    for said, changed in contents:
        path.unlink(missing_ok=True)
        if isinstance(changed, bytes):
            path.write_bytes(changed)
        elif changed is not None:
            torch.save(changed, path)
        words = refusal(["run"], capsys)
        assert "run: expected the folder of a run, got 'run': " in words and said in words, words
        assert sorted(os.listdir()) == ["evil.py", "run"]
    path.write_bytes(content)
    config = json.loads(Path("run/config.json").read_text())
    for said, changed in [
        ("it is of 'evil', not of ppo_clip, ", {**config, "algorithm": "evil"}),
        ("it is of 'play', not of ppo_clip, ", {**config, "algorithm": "play"}),
        ("`v9` for environment", {**config, "env": "CartPole-v9"}),
        ("'algorithm'", {}),
    ]:
        Path("run/config.json").write_text(json.dumps(changed))
        words = refusal(["run"], capsys)
        assert "run: expected the folder of a run, got 'run': " in words and said in words, words
        assert sorted(os.listdir()) == ["evil.py", "run"]


def test_command_line():
    _, rows = train("reinforce")
    command = [sys.executable, ROOT / "play.py", "run", "--episodes", "3", "--stochastic"]
    said = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    assert said.startswith(f"CartPole-v1, reinforce after {rows[-1]['global_step']} steps: return ")
    assert said.endswith(", 3 episodes, sampled actions\n")
