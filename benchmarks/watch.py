"""Train agents, film an episode of each with play.py, and set the films side by side.

    MUJOCO_GL=egl python benchmarks/watch.py

It writes docs/agents.webp, an animated picture in real time, and docs/agents.png, a still. A
caption has the steps of the training and its seconds. runs/watch keeps the agents; one that is
there is not trained again. It needs gymnasium[box2d,mujoco], imageio[ffmpeg], and EGL where there
is no display.
"""

import csv
import sys
import tempfile
from pathlib import Path

import imageio.v2
from common import ROOT, run, train
from PIL import Image, ImageDraw, ImageFont

AGENTS = [  # script, task and steps
    ("reinforce.py", "CartPole-v1", 200_000),
    ("vpg.py", "LunarLander-v3", 1_000_000),
    ("trpo.py", "Hopper-v5", 1_000_000),
    ("ppo_kl.py", "HalfCheetah-v5", 1_000_000),
    ("ppo_clip.py", "Ant-v5", 1_000_000),
]
SIDE, GAP, LINE = 168, 8, 16  # pixels: a panel's side, what is between two, and a caption's line
SECONDS, RATE = 6, 20  # of the film; frames per second


def trained(script: str, task: str, steps: int) -> tuple[Path, float]:
    """The folder of an agent, and the seconds that its training took."""
    folder = ROOT / "runs/watch" / f"{script.removesuffix('.py')}__{task}"
    if not folder.exists():
        train(folder, [script, "--env", task, "--total-timesteps", steps])
    with open(folder / "metrics.csv", newline="") as file:
        *_, last = csv.DictReader(file)
    return folder, float(last["wall_time"])


def film(agent: Path) -> list[Image.Image]:
    """Square pictures of the first seconds of an episode, of most probable actions."""
    with tempfile.TemporaryDirectory() as folder:
        video = Path(folder, "film.mp4")
        run([sys.executable, ROOT / "play.py", agent, "--episodes", 1, "--video", video])
        reader = imageio.v2.get_reader(video)
        every = reader.get_meta_data()["fps"] / RATE
        pictures = [Image.fromarray(x) for x in reader]
    chosen = [pictures[min(round(i * every), len(pictures) - 1)] for i in range(SECONDS * RATE)]
    side = min(chosen[0].size)
    left, top = ((x - side) // 2 for x in chosen[0].size)
    box = (left, top, left + side, top + side)
    return [x.crop(box).resize((SIDE, SIDE), Image.Resampling.LANCZOS) for x in chosen]


def main() -> None:
    films, captions = [], []
    for script, task, steps in AGENTS:
        folder, seconds = trained(script, task, steps)
        films.append(film(folder))
        captions.append(f"{task}\n{script}\n{steps:,} steps, {seconds:.0f} s")
    width = len(AGENTS) * (SIDE + GAP) - GAP
    font, pictures = ImageFont.load_default(13), []
    for panels in zip(*films):
        picture = Image.new("RGB", (width, SIDE + 3 * LINE + GAP), "white")
        draw = ImageDraw.Draw(picture)
        for i, (panel, caption) in enumerate(zip(panels, captions)):
            picture.paste(panel, (i * (SIDE + GAP), 0))
            for j, text in enumerate(caption.splitlines()):
                draw.text((i * (SIDE + GAP), SIDE + 4 + j * LINE), text, "black", font)
        pictures.append(picture)
    options = {"save_all": True, "append_images": pictures[1:], "loop": 0}
    options |= {"duration": 1000 // RATE, "quality": 60, "method": 6}
    pictures[0].save(ROOT / "docs/agents.webp", **options)
    pictures[len(pictures) // 2].save(ROOT / "docs/agents.png", optimize=True)
    print(f"{(ROOT / 'docs/agents.webp').stat().st_size / 1e6:.2f} MB")


if __name__ == "__main__":
    main()
