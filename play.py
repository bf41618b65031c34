"""Watch a policy that one of the scripts has trained: what it reaches, a window, a video.

    python play.py runs/NAME
    python play.py runs/NAME --episodes 100 --seed 7 --stochastic
    python play.py runs/NAME --render human --episodes 3
    python play.py runs/NAME --video cartpole.mp4

It plays one episode after the other in the environment of the run's config, and prints mean ± standard deviation of
their undiscounted returns and of their lengths.
"""

import contextlib
import dataclasses
import importlib
import importlib.util
import io
import json
import os
import re
import sys
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import torch
import tyro
from gymnasium.vector import VectorEnv
from torch import nn

ROOT = Path(__file__).parent
Flag = Annotated[bool, tyro.conf.FlagCreatePairsOff]


@dataclasses.dataclass
class Args:
    run: tyro.conf.Positional[str]
    """folder of the run"""
    episodes: int = 10
    """episodes to play"""
    seed: int = 1
    """seed of the environment and of sampled actions"""
    deterministic: Flag = False
    """take the most probable action, the default"""
    stochastic: Flag = False
    """sample actions, as in training"""
    render: Literal["human"] | None = None
    """human opens a window"""
    video: str | None = None
    """file to write, .mp4 or .gif: the first episode"""
    max_episode_steps: int = 10_000
    """steps after which an episode is cut that the environment does not end"""


class ArgumentError(ValueError):
    """An argument cannot be used; the message names it and says what was expected and what came."""


def parse_args() -> Args:
    """Read the command line. Raises ArgumentError with the first words of the box that tyro draws for a bad one."""
    try:
        with contextlib.redirect_stderr(io.StringIO()) as box:
            return tyro.cli(Args, description=__doc__)
    except SystemExit:
        if not box.getvalue():  # it was --help
            raise
        words = re.findall(r"[^\s│╮]+", re.split("[─-]{9,}", box.getvalue())[1])
        raise ArgumentError(f"{' '.join(words)} (see --help)") from None


def check_args(args: Args) -> None:
    for name, least in (("episodes", 1), ("seed", 0), ("max_episode_steps", 1)):
        number = getattr(args, name)
        if type(number) is not int or not least <= number < 2**63:
            flag = f"--{name.replace('_', '-')}"
            raise ArgumentError(
                f"{flag}: expected a whole number in [{least}, 2^63), got {number!r}"
            )
    if args.deterministic and args.stochastic:
        raise ArgumentError("--deterministic: expected it or --stochastic, got both")
    if args.video is None:
        return
    if args.render:
        raise ArgumentError("--render: expected a window or --video, got both")
    path = Path(args.video)
    if path.suffix not in (".mp4", ".gif") or path.is_dir() or not os.access(path.parent, os.W_OK):
        raise ArgumentError(
            f"--video: expected a file .mp4 or .gif in a folder to write to, got {args.video!r}"
        )
    if not importlib.util.find_spec("imageio") or not importlib.util.find_spec("imageio_ffmpeg"):
        raise ArgumentError(
            '--video: expected imageio[ffmpeg] installed (pip install "imageio[ffmpeg]"), found none'
        )


def script_of(folder: str) -> Any:
    """Import the script that made a run. Raises ArgumentError if there is no run or no such script beside this file."""
    scripts = sorted(
        path.stem
        for path in ROOT.glob("*.py")
        if "\ndef train(" in path.read_text(encoding="utf-8")
    )
    try:
        algorithm = json.loads(Path(folder, "config.json").read_bytes())["algorithm"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ArgumentError(
            f"run: expected the folder of a run, got {folder!r}: {error}"
        ) from error
    if algorithm not in scripts:
        raise ArgumentError(
            f"run: expected one of {', '.join(scripts)}, got {folder!r}, which is of {algorithm!r}"
        )
    return importlib.import_module(algorithm)


class Video:
    """A file of frames, which takes its name when it is complete."""

    def __init__(self, path: Path, frames_per_second: float) -> None:
        import imageio.v2  # here, as few need it

        self.path, self.part = path, path.with_name(f".part-{os.getpid()}-{path.name}")
        if path.suffix == ".gif":
            options = {
                "duration": 1000 / frames_per_second,
                "loop": 0,
            }  # milliseconds a frame; for ever
        else:
            options = {"fps": frames_per_second, "macro_block_size": 2}  # sizes need only be even
        self.writer = imageio.v2.get_writer(self.part, **options)

    def __enter__(self) -> "Video":
        return self

    def add(self, envs: VectorEnv) -> None:
        """Add what the first environment shows. Raises ArgumentError if that is no image."""
        try:
            self.writer.append_data(np.asarray(envs.render()[0], np.uint8))
        except Exception as error:  # an environment's own may be of any kind
            said = " ".join(str(error).split()) or type(error).__name__
            raise ArgumentError(
                f"--video: expected an environment that renders images, got none: {said}"
            ) from error

    def __exit__(self, kind: Any, *_: Any) -> None:
        try:
            self.writer.close()
            if kind is None:
                self.part.replace(self.path)
        finally:
            self.part.unlink(missing_ok=True)


def load(args: Args) -> tuple[Any, VectorEnv, nn.Module, str]:
    """Load a run's script, environment and trained agent, and a title. Raises ArgumentError if one is unusable."""
    script = script_of(args.run)
    try:
        checkpoint = script.load_checkpoint(args.run)
        trained = script.Args(**checkpoint["args"])
        # One environment needs no process of its own, and a native vector environment has no window.
        mode = (
            "sync"
            if args.render or trained.vectorization_mode == "async"
            else trained.vectorization_mode
        )
        options = (
            {"render_mode": "rgb_array" if args.video else args.render}
            if args.video or args.render
            else {}
        )
        envs = script.make_envs(
            dataclasses.replace(trained, num_envs=1, vectorization_mode=mode), **options
        )
    except script.ArgumentError as error:
        raise ArgumentError(re.sub("^--(resume|env)", "run", str(error))) from error
    agent = script.Agent(envs.single_observation_space, envs.single_action_space, trained.norm_obs)
    try:
        agent.load_state_dict(checkpoint["agent"])
    except RuntimeError as error:
        envs.close()
        said = " ".join(str(error).split())
        raise ArgumentError(
            f"run: expected weights that fit {trained.env}, got others: {said}"
        ) from error
    title = (
        f"{trained.env}, {script.__name__} after {checkpoint['progress']['global_step']:,} steps"
    )
    return script, envs, agent, title


def play(args: Args) -> tuple[list[float], list[int]]:
    """Play episodes, print what they come to, and return their returns and lengths.

    Raises ArgumentError for an argument that cannot be used, and the script's RunError if the environment fails.
    """
    check_args(args)
    script, envs, agent, title = load(args)
    returns, lengths = [], []
    with contextlib.ExitStack() as stack:
        stack.enter_context(script.closing(envs))
        video = None
        if args.video:
            video = stack.enter_context(
                Video(Path(args.video), envs.metadata.get("render_fps", 30))
            )
        torch.manual_seed(args.seed)
        for episode in range(args.episodes):
            obs, *_ = script.arrays_of(envs, "reset", seed=args.seed if episode == 0 else None)
            returns.append(0.0)
            lengths.append(0)
            is_over = False
            while not is_over and lengths[-1] < args.max_episode_steps:
                if video and episode == 0:
                    video.add(envs)
                with torch.no_grad():
                    policy = agent.policy(torch.as_tensor(obs, dtype=torch.float32))
                    actions = policy.sample() if args.stochastic else policy.mode
                obs, rewards, terminations, truncations = script.arrays_of(
                    envs, "step", actions.numpy()
                )
                script.check_finite(observations=obs, rewards=rewards)
                returns[-1] += float(rewards[0])
                lengths[-1] += 1
                is_over = terminations[0] or truncations[0]
    print(
        f"{title}: return {np.mean(returns):.1f} ± {np.std(returns):.1f}, length {np.mean(lengths):.1f} ± "
        f"{np.std(lengths):.1f}, {args.episodes} episodes, {'sampled' if args.stochastic else 'most probable'} actions"
    )
    return returns, lengths


if __name__ == "__main__":
    try:
        play(parse_args())
    except KeyboardInterrupt:
        print(f"{Path(__file__).name}: interrupted", file=sys.stderr)
        sys.exit(130)
    except (ArgumentError, RuntimeError) as error:
        if type(error).__name__ not in (
            "ArgumentError",
            "RunError",
        ):  # each script has a RunError of its own
            raise
        sys.exit(f"{Path(__file__).name}: {error}")
    except OSError as error:
        sys.exit(f"{Path(__file__).name}: {error}")
