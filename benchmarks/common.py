"""What the programs of this folder share."""

import ast
import csv
import hashlib
import io
import os
import statistics
import subprocess
import sys
import tempfile
import time
import tokenize
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parent.parent
SB3, RLOX = (str(ROOT / f".peers/{name}/bin/python") for name in ("sb3", "rlox"))


class Process(NamedTuple):
    output: str
    seconds: float
    memory: float  # its peak, in MB


def run(command: list[str | Path]) -> Process:
    """Run a command to its end. Raises CalledProcessError if it fails. Unix alone."""
    start = time.perf_counter()
    process = subprocess.Popen(list(map(str, command)), stdout=subprocess.PIPE, text=True)
    output = process.stdout.read()
    _, status, usage = os.wait4(process.pid, 0)
    if status:
        raise subprocess.CalledProcessError(status, process.args)
    unit = 1 if sys.platform == "darwin" else 1024  # of ru_maxrss, in bytes
    return Process(output, time.perf_counter() - start, usage.ru_maxrss * unit / 1e6)


def train(folder: str | Path, arguments: list[str | Path]) -> tuple[list[dict[str, str]], Process]:
    """Run one of our scripts in a new folder; return the rows of its metrics.csv too."""
    own = ["--quiet", "--device", "cpu", "--run-dir", folder]
    process = run([sys.executable, ROOT / arguments[0], *arguments[1:], *own])
    with open(Path(folder, "metrics.csv"), newline="") as file:
        return list(csv.DictReader(file)), process


def run_script(arguments: list[str | Path]) -> tuple[list[dict[str, str]], Process]:
    """The same in a folder that is deleted afterwards."""
    with tempfile.TemporaryDirectory() as folder:
        return train(f"{folder}/run", arguments)


def run_peer(python: str, *arguments: str | int) -> Process:
    """Run benchmarks/peers.py by the Python of an environment that has the peer."""
    return run([python, ROOT / "benchmarks/peers.py", *map(str, arguments)])


def has(python: str, package: str) -> bool:
    """Whether an environment's Python exists and finds a package."""
    try:
        found = subprocess.run([python, "-c", f"import {package}"], capture_output=True)
    except OSError:
        return False
    return found.returncode == 0


def text_of(program: str) -> str:
    """What tells whether a script of ours has changed; nothing for a peer."""
    script = ROOT / program.split()[0]
    return fingerprint(script) if script.suffix == ".py" else ""


def kept(path: Path) -> dict[tuple[str, str, int], dict[str, str]]:
    """The runs that a file keeps, by task, program and seed, without those of changed scripts."""
    if not path.exists():
        return {}
    with open(path, newline="") as file:
        rows = [row for row in csv.DictReader(file) if row["text"] == text_of(row["program"])]
    return {(row["task"], row["program"], int(row["seed"])): row for row in rows}


def keep(path: Path, row: dict[str, object]) -> None:
    """Add a run to such a file."""
    is_new = not path.exists()
    with open(path, "a", newline="") as file:
        csv.writer(file).writerows([row, row.values()] if is_new else [row.values()])


def make_missing(path: Path, make: Callable, wanted: list[tuple[str, str, int]], jobs: int) -> None:
    """Call make(task, program, seed) for each wanted run that the file has not, some at a time."""
    done = kept(path)
    with ThreadPoolExecutor(jobs) as pool:
        futures = [pool.submit(make, *run) for run in wanted if run not in done]
    for future in futures:  # an error is raised when the others have ended
        future.result()


def spread(values: Sequence[float]) -> str:
    """Their mean ± their standard deviation."""
    if not values:
        return ""
    digits = 0 if max(map(abs, values)) >= 100 else 1
    mean = round(statistics.mean(values), digits) + 0.0  # no −0.0
    deviation = f" ± {statistics.stdev(values):.{digits}f}" if len(values) > 1 else ""
    return f"{mean:.{digits}f}{deviation}"


def table(header: list[str], rows: list[list[str]], names: int = 1) -> str:
    """A Markdown table, whose first columns hold names and the others figures."""
    ruler = ["---"] * names + ["---:"] * (len(header) - names)
    return "\n".join(f"| {' | '.join(cells)} |" for cells in (header, ruler, *rows))


def fingerprint(*paths: Path) -> str:
    """A hash of Python code without its comments, its docstrings and blank lines."""
    code = hashlib.sha256()
    for path in paths:
        text = path.read_text(encoding="utf-8")
        lines = text.splitlines()
        for token in tokenize.generate_tokens(io.StringIO(text).readline):
            if token.type == tokenize.COMMENT:
                lines[token.start[0] - 1] = lines[token.start[0] - 1][: token.start[1]]
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef)):
                if ast.get_docstring(node) is not None:
                    first, last = node.body[0].lineno - 1, node.body[0].end_lineno
                    lines[first:last] = [""] * (last - first)
        code.update("\n".join(x.rstrip() for x in lines if x.strip()).encode())
    return code.hexdigest()[:8]
