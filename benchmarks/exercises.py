"""Solve an exercise of docs/exercises.md, or try a recipe of docs/recipes.md: make its change in a
copy, run its command of compare.py.

    python benchmarks/exercises.py 1
    python benchmarks/exercises.py 1 --page recipes
    python benchmarks/exercises.py 1 --page recipes --into .     # the changed copy alone

Prints the table of compare.py, and one of the divergences if the runs log them. The copies are of
reinforce, vpg, trpo, ppo_clip and ppo_kl.
"""

import argparse
import csv
import re
import shlex
import shutil
import statistics
import subprocess
import sys
import tempfile
from collections import defaultdict
from pathlib import Path

from common import ROOT, run, table

DIFF = re.compile(r"^```diff\n(--- (\w+\.py)\n\+\+\+ (\w+\.py)\n.*?)^```$", re.M | re.S)


def exercise(number: int, page: str = "exercises") -> str:
    """The text of an exercise or a recipe. Raises ValueError if there is none of this number."""
    text = (ROOT / f"docs/{page}.md").read_text(encoding="utf-8")
    found = re.search(rf"^## {number}\. .*?(?=^## |\Z)", text, re.M | re.S)
    if not found:
        raise ValueError(f"exercise: expected the number of one of {page}, got {number}")
    return found[0]


def solve(number: int, folder: Path, page: str = "exercises") -> list[Path]:
    """Copy the scripts into a folder, with the exercise's change; return the changed copies.

    What a change builds upon is made first, if it is a copy of another exercise of the page.
    """
    for script in ROOT.glob("*.py"):
        shutil.copy(script, folder)
    shutil.copytree(ROOT / "gae_fast", folder / "gae_fast", dirs_exist_ok=True)
    (folder / "benchmarks").mkdir(exist_ok=True)
    shutil.copy(ROOT / "benchmarks/recipe_tasks.py", folder / "benchmarks")
    changed = []
    for diff, old, new in DIFF.findall(exercise(number, page)):
        if not (folder / old).exists():
            before = (ROOT / f"docs/{page}.md").read_text("utf-8").partition(f"\n+++ {old}\n")[0]
            solve(int(re.findall(r"^## (\d+)\. ", before, re.M)[-1]), folder, page)
        shutil.copy(folder / old, folder / new)
        patch = diff.replace(f"--- {old}", f"--- {new}")
        subprocess.run(["git", "apply", "-p0"], input=patch, text=True, cwd=folder, check=True)
        changed.append(folder / new)
    return changed


def divergences(out: Path) -> str:
    """A table of the column kl of all runs in a folder, and of approx_kl beside it; or nothing."""
    runs = defaultdict(list)
    for path in sorted(out.glob("*/metrics.csv")):
        with open(path, newline="") as file:
            rows = [x for x in csv.DictReader(file) if "kl" in x]
        runs[path.parent.name.rpartition("__")[0]] += [
            (float(x["kl"]), float(x["approx_kl"])) for x in rows
        ]
    header = ["run", "updates", "kl, median", "kl, greatest", "approx_kl, median"]
    header += ["approx_kl, greatest"]
    rows = []
    for name, values in runs.items():
        columns = list(zip(*values))
        cells = [f"{of(x):.2g}" for x in columns for of in (statistics.median, max)]
        rows += [[name, str(len(values)), *cells]] if cells else []
    return f"\n{table(header, rows)}" if rows else ""


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("exercise", type=int, help="its number")
    parser.add_argument("--page", choices=["exercises", "recipes"], default="exercises")
    parser.add_argument("--into", metavar="FOLDER", help="put the copy there, and run nothing")
    chosen = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        changed = solve(chosen.exercise, Path(name), chosen.page)
        if chosen.into:
            for path in changed:
                target = Path(chosen.into, path.name)
                if target.exists() or not target.parent.is_dir():
                    parser.error(
                        f"--into: expected a folder without {path.name}, got {chosen.into}"
                    )
                print(shutil.copy(path, target))
            sys.exit()
        text = exercise(chosen.exercise, chosen.page)
        for command in re.findall(r"`python (compare\.py [^`]*)`", text):
            program, *options = shlex.split(command)
            done = run([sys.executable, f"{name}/{program}", *options, "--out", f"{name}/out"])
            print("\n".join(x for x in done.output.splitlines() if x.startswith("|")))
            print(divergences(Path(name, "out")))
