"""What throughput.py and solve.py do about peers, real or missing; not how fast anything is."""

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


def run(program, *options):
    command = [sys.executable, ROOT / "benchmarks" / program, *options]
    return subprocess.run(command, capture_output=True, text=True)


@pytest.fixture
def peer(tmp_path):
    """What looks like a Python that has every package and takes 1,000 steps a second."""
    path = tmp_path / "python"
    path.write_text("#!/bin/sh\necho some line before\necho 1000.0\n")
    path.chmod(0o755)
    return path


@pytest.mark.skipif(
    sys.platform == "win32", reason="the program waits as Unix does, and the peer is a shell script"
)
def test_throughput_sets_ours_beside_the_peers_that_there_are(peer):
    options = ("--rounds", "1", "--only", "vpg.py")
    done = run("throughput.py", *options, "--sb3", "/nowhere", "--rlox", str(peer))
    assert done.returncode == 0, done.stderr
    assert "sb3_contrib: not found by /nowhere, left out" in done.stdout
    assert "rlox: not" not in done.stdout
    *_, row = done.stdout.splitlines()
    cells = [cell.strip() for cell in row.strip("|").split("|")]
    name, sizes, speed, memory, other, other_speed, _, ratio, _ = cells
    assert (name, sizes) == ("vpg.py, CartPole-v1", "8 2048 1 5")
    assert (other, other_speed) == ("rlox-vpg", "1,000")
    speed = float(speed.replace(",", ""))
    assert speed > 0 and 50 < float(memory) < 5000
    assert float(ratio.split("**")[1]) == pytest.approx(speed / 1000, abs=0.006)


def test_solve_names_a_missing_peer():
    done = run("solve.py", "--sb3", "/nowhere")
    assert done.returncode == 2 and done.stdout == ""
    expected = "expected a Python that has Stable-Baselines3, got /nowhere"
    assert done.stderr.endswith(f"error: --sb3: {expected}\n")
