"""Steps per second of one rank and of several under torchrun, and their time for communication, as
Markdown tables.

    pip install "gymnasium[mujoco]==1.4.0" && python benchmarks/ranks.py --rounds 5
    python benchmarks/ranks.py --rounds 5 --ranks 1 2 --only CartPole --free

Every rank has the same settings, so that K ranks have K times the environments and, ideally, K
times the steps per second; efficiency is the share of this that they reach. One rank is the plain
program, without torchrun. `2 apart` is two plain programs at the same time that never communicate:
what the machine has to give. All take turns; a figure is the median over the rounds, a ratio the
median of the rounds' ratios, with the least and the greatest. Imports, set-up, the first iteration
and the last are left out. Each process is bound to a core of its own, unless --free is
given. `communication` is the share of rank 0's time in all_reduce: messages, and waiting for the
other ranks to come. The last tables time messages of several sizes, which all ranks send at once:
by mean_over_ranks, by the all_reduce in it, and by an all_gather and a mean.
"""

import argparse
import importlib
import json
import os
import shlex
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import tyro
from common import ROOT, table

CHEETAH = "--env HalfCheetah-v5 --num-envs 32"
PPO = "ppo_clip.py --target-kl None"  # all epochs, whatever the data
# What runs, and its steps in all for each rank.
SETTINGS = [
    (f"{PPO} {CHEETAH} --num-steps 32", 60_000),
    (f"{PPO} {CHEETAH} --num-steps 128", 100_000),
    (f"{PPO} {CHEETAH} --num-steps 128 --num-minibatches 4 --update-epochs 5", 100_000),
    (f"{PPO} {CHEETAH} --num-steps 512", 131_072),
    (f"{PPO} {CHEETAH} --num-envs 1 --num-steps 2048 --num-minibatches 32", 24_576),
    (f"trpo.py {CHEETAH} --num-steps 128", 100_000),
    (f"{PPO} --env CartPole-v1", 120_000),
]
SIZES = (1, 10_000, 100_000, 1_000_000)
WAYS = ("mean_over_ranks", "all_reduce", "all_gather and mean")


def of_rank(command: list[str]) -> None:
    """What each rank does: train, or send messages; rank 0 prints the figures as JSON."""
    if "LOCAL_RANK" in os.environ and os.environ.get("BIND"):
        cores = sorted(os.sched_getaffinity(0))
        os.sched_setaffinity(0, {cores[int(os.environ["LOCAL_RANK"]) % len(cores)]})
    sys.path.insert(0, str(ROOT))
    name, *arguments = command
    script = importlib.import_module(Path(name).stem)
    args = tyro.cli(script.Args, args=[*arguments, "--quiet"]) if arguments else None
    if dist.is_torchelastic_launched():
        dist.init_process_group("gloo")
    figures = trained(script, args) if args else messages(script)
    if script.rank_and_world_size()[0] == 0:
        print(json.dumps(figures))
    if dist.is_initialized():
        dist.destroy_process_group()


def trained(script: Any, args: Any) -> dict[str, float]:
    all_reduce, rollouts = dist.all_reduce, script.rollouts
    begun, communication = [], [0.0]

    def timed_all_reduce(*args: Any) -> None:
        start = time.perf_counter()
        all_reduce(*args)
        communication[-1] += time.perf_counter() - start

    def noted_rollouts(*args: Any, **options: Any) -> Iterator[Any]:
        stretch = rollouts(*args, **options)
        while True:
            begun.append(time.perf_counter())
            communication.append(0.0)
            yield next(stretch)

    dist.all_reduce, script.rollouts = timed_all_reduce, noted_rollouts
    rows = script.train(args)
    seconds = begun[-1] - begun[1]  # without the first iteration and the last
    steps = rows[-2]["global_step"] - rows[0]["global_step"]
    return {
        "speed": steps / seconds,
        "communication": sum(communication[2:-1]) / seconds,
        "iteration": seconds / (len(begun) - 2),
    }


def messages(script: Any) -> dict[str, list[float]]:
    """Microseconds of a message of each of SIZES floats, by each of WAYS."""
    torch.set_num_threads(1)
    figures = {}
    for name, operation in zip(WAYS, (script.mean_over_ranks, dist.all_reduce, all_gather_mean)):
        figures[name] = []
        for size in SIZES:
            x, times = torch.zeros(size), []
            count = 200 if size <= 10_000 else 20
            for _ in range(6):
                dist.barrier()
                start = time.perf_counter()
                for _ in range(count):
                    operation(x)
                times.append((time.perf_counter() - start) / count * 1e6)
            figures[name].append(statistics.median(times[1:]))
    return figures


def all_gather_mean(x: torch.Tensor) -> torch.Tensor:
    """What mean_over_ranks does, in another way: every rank sends all that it has to all others."""
    parts = [torch.empty_like(x) for _ in range(dist.get_world_size())]
    dist.all_gather(parts, x)
    return x.copy_(torch.stack(parts).mean(dim=0))


def start(command: str, ranks: int, bind: bool, core: int = 0) -> subprocess.Popen:
    """Have a number of ranks do a command; one is a plain program, on the core given."""
    torchrun = f"-m torch.distributed.run --standalone --nproc-per-node {ranks}".split()
    program = [*(torchrun if ranks > 1 else []), __file__, "--of-rank", command]
    own = {"OMP_NUM_THREADS": "1", "BIND": "1" * bind, "LOCAL_RANK": str(core)}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen([sys.executable, *program], env={**os.environ, **own}, **pipes)


def figures_of(process: subprocess.Popen) -> dict[str, Any]:
    """What rank 0 prints."""
    output, errors = process.communicate()
    if process.returncode:
        sys.exit(f"failed: {shlex.join(process.args)}\n{errors}")
    return json.loads(output.splitlines()[-1])


def measured(command: str, steps: int, world: str, bind: bool) -> dict[str, float]:
    """The figures of a world: `2` is two ranks, `2 apart` two programs that never meet, whose
    speeds are added up."""
    ranks, *apart = world.split()
    with tempfile.TemporaryDirectory() as folder:
        if apart:
            command = f"{command} --total-timesteps {steps} --run-dir {folder}"
            processes = [start(f"{command}/{core}", 1, bind, core) for core in range(int(ranks))]
            first, *others = [figures_of(process) for process in processes]
            return {**first, "speed": first["speed"] + sum(x["speed"] for x in others)}
        total = int(ranks) * steps
        return figures_of(
            start(f"{command} --total-timesteps {total} --run-dir {folder}/run", int(ranks), bind)
        )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=3, help="runs of each world")
    parser.add_argument(
        "--ranks", type=int, nargs="+", default=[2], help="worlds to set beside one rank"
    )
    parser.add_argument("--only", default="", help="only the settings that have this in them")
    parser.add_argument(
        "--free", action="store_true", help="leave it to the system which core a rank runs on"
    )
    parser.add_argument("--of-rank", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.of_rank:
        return of_rank(shlex.split(options.of_rank))
    bind = not options.free and hasattr(os, "sched_setaffinity")

    print(f"{options.rounds} rounds, {'a core for each rank' if bind else 'ranks free to move'}\n")
    rows = []
    for command, steps in SETTINGS:
        if options.only not in command:
            continue
        names = ["1", *(name for ranks in options.ranks for name in (f"{ranks} apart", f"{ranks}"))]
        worlds: dict[str, list[dict[str, float]]] = {name: [] for name in names}
        for _ in range(options.rounds):
            for name, figures in worlds.items():
                figures.append(measured(command, steps, name, bind))
        for name, figures in worlds.items():
            keys = ("speed", "communication", "iteration")
            speed, communication, iteration = (
                statistics.median(x[key] for x in figures) for key in keys
            )
            ratios = sorted(x["speed"] / one["speed"] for x, one in zip(figures, worlds["1"]))
            ratio = statistics.median(ratios)
            spread = f" ({ratios[0]:.2f} to {ratios[-1]:.2f})" if name != "1" else ""
            efficiency = ratio / int(name.split()[0])
            cells = [command, name, f"{speed:,.0f}", f"{ratio:.2f}{spread}"]
            rows.append([*cells, f"{efficiency:.0%}", f"{communication:.0%}", f"{iteration:.3f}"])
    header = ["settings of each rank", "ranks", "steps/s", "× one rank", "efficiency"]
    print(table([*header, "communication", "s an iteration"], rows, names=2))

    for ranks in options.ranks:
        figures = figures_of(start("ppo_clip.py", ranks, bind))
        times = zip(*(figures[way] for way in WAYS))
        rows = [[f"{n:,}", *(f"{x:,.0f}" for x in row)] for n, row in zip(SIZES, times)]
        print(f"\n{table([f'floats in a message between {ranks} ranks, µs', *WAYS], rows)}")


if __name__ == "__main__":
    main()
