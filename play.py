"""Play episodes with a trained policy: print its returns, show a window or write a video.

    python play.py runs/NAME
    python play.py runs/NAME --episodes 100 --seed 7 --stochastic
    python play.py runs/NAME --render human --episodes 3
    python play.py runs/NAME --video cartpole.mp4

Episodes are played one after the other in the run's environment. The output is the mean ± the
standard deviation of the episodes' undiscounted returns and lengths.
"""

import contextlib
import dataclasses
import importlib
import importlib.util
import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Literal

import numpy as np
import torch
import tyro
from gymnasium.vector import VectorEnv
from torch import nn


# ---------------------------------------------- Args ----------------------------------------------
@dataclasses.dataclass
class Args:
    run: tyro.conf.Positional[str]  # folder of the run
    episodes: int = 10  # episodes to play
    seed: int = 1  # of the environment and of sampled actions
    stochastic: bool = False  # sample actions, as in training; else take the most probable ones
    render: Literal["human"] | None = None  # human opens a window
    video: str | None = None  # write the first episode to this .mp4 or .gif file
    max_episode_steps: int = 10_000  # stop an episode after this many steps

    def __post_init__(self) -> None:
        for name, least in (("episodes", 1), ("seed", 0), ("max_episode_steps", 1)):
            value, flag = getattr(self, name), f"--{name.replace('_', '-')}"
            if value < least:
                raise ValueError(f"{flag}: expected a number from {least}, got {value}")
        if self.video is not None:
            path = Path(self.video)
            if path.suffix not in (".mp4", ".gif") or not os.access(path.parent, os.W_OK):
                expected = "an .mp4 or .gif file in a writable folder"
                raise ValueError(f"--video: expected {expected}, got {self.video!r}")
            if path.is_dir():
                raise ValueError(f"--video: expected a file, got the folder {self.video!r}")
            for name in ("imageio", "imageio_ffmpeg")[: 2 if path.suffix == ".mp4" else 1]:
                if not importlib.util.find_spec(name):
                    raise ValueError("--video: expected the package imageio[ffmpeg], found none")
            if self.render:
                raise ValueError("--render: expected a window or --video, got both")
        envs, *_ = load(self)
        envs.close()


# ---------------------------------------------- play ----------------------------------------------
def load(args: Args) -> tuple[VectorEnv, nn.Module, str]:
    """Return a run's environment, agent and title. Raises ValueError for what cannot be played.

    No code of the checkpoint is run. A script beside this one and the env's module are imported.
    """
    files = sorted(Path(__file__).parent.glob("*.py"))
    scripts = [x.stem for x in files if "\ndef train(" in x.read_text(encoding="utf-8")]
    refusal = f"run: expected the folder of a run, got {args.run!r}"
    try:
        config = json.loads(Path(args.run, "config.json").read_text(encoding="utf-8"))
        if config["algorithm"] not in scripts:
            raise ValueError(f"it is of {config['algorithm']!r}, not of {', '.join(scripts)}")
        saved = torch.load(f"{args.run}/checkpoint.pt", map_location="cpu", weights_only=True)
    except Exception as e:  # torch raises many kinds
        raise ValueError(f"{refusal}: {e}") from e
    script = importlib.import_module(config["algorithm"])
    # Not every environment takes a render_mode, and not every vector version opens a window.
    render_mode, options = "rgb_array" if args.video else args.render, {}
    if render_mode:
        options = {"render_mode": render_mode}
        refusal = f"--{'video' if args.video else 'render'}: expected an environment that is drawn"
    try:
        mode = "sync" if render_mode else config["vectorization_mode"]
        envs = script.make_envs(config["env"], 1, mode, **options)
        if render_mode and envs.unwrapped.render_mode != render_mode:
            raise ValueError(f"{config['env']} has no render_mode {render_mode}")
        agent = script.Agent(envs, config["norm_obs"])
        agent.load_state_dict(saved["agent"])
    except Exception as e:  # among others RuntimeError, of another environment's weights
        raise ValueError(f"{refusal}: {e}") from e
    return envs, agent, f"{config['env']}, {script.ALGORITHM} after {saved['global_step']:,} steps"


@contextlib.contextmanager
def film(video: str, frames_per_second: float) -> Iterator[Callable[[np.ndarray], None]]:
    """Yield a function that adds a frame. The file gets its name when it is complete."""
    import imageio.v2  # imported here: only videos need it

    path = Path(video)
    part = path.with_stem(f"{path.stem}.part")
    if path.suffix == ".gif":
        options = {"duration": 1000 / frames_per_second, "loop": 0}  # in ms; 0: repeat for ever
    else:
        options = {"fps": frames_per_second, "macro_block_size": 2}  # width and height must be even
    try:
        with imageio.v2.get_writer(part, **options) as writer:
            yield writer.append_data
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)


@torch.no_grad()
def play(args: Args) -> tuple[list[float], list[int]]:
    """Play episodes, print the mean return and length, and return all returns and lengths."""
    envs, agent, title = load(args)
    torch.manual_seed(args.seed)
    returns, lengths = [], []
    with contextlib.ExitStack() as stack:
        stack.enter_context(contextlib.closing(envs))
        add_frame = None
        if args.video:
            add_frame = stack.enter_context(film(args.video, envs.metadata.get("render_fps", 30)))
        standardize = agent.standardizer()
        for episode in range(args.episodes):
            obs, _ = envs.reset(seed=args.seed if episode == 0 else None)
            total, length, is_over = 0.0, 0, False
            while not is_over and length < args.max_episode_steps:
                if add_frame and episode == 0:
                    add_frame(envs.render()[0])
                policy = agent.policy(torch.as_tensor(standardize(np.asarray(obs, float))))
                actions = policy.sample() if args.stochastic else policy.mode
                obs, rewards, terminations, truncations, _ = envs.step(actions.numpy())
                total += float(rewards[0])
                length += 1
                is_over = terminations[0] or truncations[0]
            if add_frame and episode == 0:  # what the last step led to
                add_frame(envs.render()[0])
            returns.append(total)
            lengths.append(length)
    return_and_length = (f"{np.mean(x):.1f} ± {np.std(x):.1f}" for x in (returns, lengths))
    said = "return {}, length {}".format(*return_and_length)
    actions = "sampled" if args.stochastic else "most probable"
    print(f"{title}: {said}, {args.episodes} episodes, {actions} actions")
    return returns, lengths


if __name__ == "__main__":
    play(tyro.cli(Args, description=__doc__))
