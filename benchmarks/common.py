"""What the programs of this folder share."""

import ast
import csv
import hashlib
import io
import os
import subprocess
import sys
import tempfile
import time
import tokenize
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


def run_script(arguments: list[str | Path]) -> tuple[list[dict[str, str]], Process]:
    """Run one of our scripts in a folder of its own; return the rows of its metrics.csv too."""
    with tempfile.TemporaryDirectory() as folder:
        own = ["--quiet", "--device", "cpu", "--run-dir", f"{folder}/run"]
        process = run([sys.executable, ROOT / arguments[0], *arguments[1:], *own])
        with open(Path(folder, "run/metrics.csv"), newline="") as file:
            return list(csv.DictReader(file)), process


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
