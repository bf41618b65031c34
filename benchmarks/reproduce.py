"""Run the commands of results/ again, and put what they print into their pages.

    python benchmarks/reproduce.py                  # those whose code has changed since
    python benchmarks/reproduce.py steps gradient   # the same, of these pages alone
    python benchmarks/reproduce.py steps --again    # whether the code has changed or not
    python benchmarks/reproduce.py --index          # none; only renews results/README.md

A block of a page is a command in backquotes, a comment with its stamp, what the command printed,
and a comment with the word end. The stamp names the commit, the date, the minutes that
the command took, and a hash of the code that was measured. Text outside of the blocks is written by
hand, and stays. A picture behind a block of compare.py is renewed with it.

A page is written as soon as a command has ended, so a run that was stopped goes on where it was.
results/README.md lists all blocks. What the programs need: .peers, as throughput.py says, and
pip install numba rlox==1.2.0 "gymnasium[box2d,mujoco]==1.4.0". Times rely on a quiet machine.
"""

import argparse
import math
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from common import ROOT, fingerprint, run, table

RESULTS = ROOT / "results"
SCRIPTS = ["reinforce", "vpg", "trpo", "ppo_clip", "ppo_kl"]
BLOCK = re.compile(
    r"^`(?P<command>python [^`\n]+)`\n<!-- (?P<stamp>[^\n]*) -->\n\n"
    r"(?P<output>.*?)\n*<!-- end -->(\n\n!\[[^\]]*\]\((?P<picture>\w+\.png)\))?",
    re.MULTILINE | re.DOTALL,
)
STAMP = re.compile(r"commit (\w+), (\S+), (\S+) min, code (\w+)")


def pages() -> list[Path]:
    return sorted(x for x in RESULTS.glob("*.md") if x.name != "README.md")


def blocks(page: Path) -> Iterator[re.Match[str]]:
    return BLOCK.finditer(page.read_text(encoding="utf-8"))


def measured_by(command: str) -> list[Path]:
    """The files whose change makes a command's output old: gae_fast, and the scripts it names."""
    program = ROOT / command.split()[1]
    text = command + (program.read_text(encoding="utf-8") if program.parent != ROOT else "")
    named = [ROOT / f"{name}.py" for name in SCRIPTS if re.search(rf"\b{name}\b", text)]
    return [*sorted((ROOT / "gae_fast").glob("*.py")), *named]


def is_current(block: re.Match[str]) -> bool:
    stamp = STAMP.fullmatch(block["stamp"])
    return bool(stamp) and stamp[4] == fingerprint(*measured_by(block["command"]))


def put(page: Path, command: str, output: str, stamp: str) -> None:
    """Write a command's output and stamp into its block."""

    def renewed(block: re.Match[str]) -> str:
        if block["command"] != command:
            return block[0]
        behind = block[0].partition("<!-- end -->")[2]
        return f"`{command}`\n<!-- {stamp} -->\n\n{output.strip()}\n\n<!-- end -->{behind}"

    page.write_text(BLOCK.sub(renewed, page.read_text(encoding="utf-8")), encoding="utf-8")


def git(*arguments: str) -> str:
    return subprocess.check_output(["git", "-C", ROOT, *arguments], text=True).strip()


def take(page: Path, block: re.Match[str]) -> None:
    """Run a block's command and write what it prints."""
    command, files = block["command"], measured_by(block["command"])
    if changes := git("status", "--porcelain", "--", *map(str, files)):
        sys.exit(f"expected committed files, as a page names the commit, got\n{changes}")
    print(f"{page.stem}: {command}", file=sys.stderr)
    with tempfile.TemporaryDirectory() as folder:
        is_compare = command.startswith("python compare.py")
        own = ["--out", f"{folder}/out"] if is_compare else []
        _, program, *arguments = shlex.split(command)
        start = time.perf_counter()
        output = run([sys.executable, ROOT / program, *arguments, *own]).output
        minutes = (time.perf_counter() - start) / 60
        if is_compare:
            output = "\n".join(x for x in output.splitlines() if x.startswith("|"))
            if block["picture"]:
                shutil.copy(f"{folder}/out/learning_curves.png", RESULTS / block["picture"])
    stamp = f"commit {git('rev-parse', '--short', 'HEAD')}, {time.strftime('%Y-%m-%d')}"
    put(page, command, output, f"{stamp}, {math.ceil(minutes)} min, code {fingerprint(*files)}")


def index() -> str:
    """What results/README.md says."""
    rows = []
    for page in pages():
        title = page.read_text(encoding="utf-8").splitlines()[0].removeprefix("# ")
        for block in blocks(page):
            stamp = STAMP.fullmatch(block["stamp"])
            commit, date, minutes, _ = stamp.groups() if stamp else ("not taken yet", "", "", "")
            state = "the same" if is_current(block) else "changed"
            command = f"`{block['command']}`"
            rows.append([f"[{title}]({page.name})", command, commit, date, minutes, state])
    header = ["page", "command", "commit", "date", "minutes", "code since"]
    return f"""# Results

Each table of these pages was printed by the command that stands above it. The text around the
tables was written by hand. This index says which commit a command ran at, when, and for how long on
two cores ("?": nobody noted it). "The same": the measured code has not changed since, except for
comments.

`python benchmarks/reproduce.py` runs every command whose code has changed, and
`python benchmarks/reproduce.py steps` only those of one page.

{table(header, rows, names=4)}
"""


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    names = [page.stem for page in pages()]
    parser.add_argument("pages", nargs="*", metavar="page", help=f"of {', '.join(names)}")
    parser.add_argument("--again", action="store_true", help="also where the code is the same")
    parser.add_argument("--index", action="store_true", help="run nothing")
    options = parser.parse_args()
    if unknown := [x for x in options.pages if x not in names]:
        parser.error(f"page: expected some of {names}, got {unknown}")
    for page in pages():
        if options.index or page.stem not in (options.pages or names):
            continue
        for block in blocks(page):
            if options.again or not is_current(block):
                take(page, block)
                (RESULTS / "README.md").write_text(index(), encoding="utf-8")
    (RESULTS / "README.md").write_text(index(), encoding="utf-8")
