"""The solutions of docs/exercises.md: each change applies to its script, and the result trains."""

import importlib.util
import re
import sys
from pathlib import Path
from typing import Any

import pytest
import tyro

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT / "benchmarks"))
from exercises import divergences, exercise, solve  # noqa: E402

NUMBERS = range(1, 11)
WITH_CODE = [n for n in NUMBERS if "```diff" in exercise(n)]


def train(script: Path, *options: str, folder: Path | None = None) -> list[dict[str, Any]]:
    """The rows of a changed script's run, in this process, which has loaded torch already."""
    spec = importlib.util.spec_from_file_location(f"changed_{script.stem}", script)
    changed = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(changed)
    run_dir = str(folder or script.parent / "run")
    return changed.train(tyro.cli(changed.Args, args=["--quiet", "--run-dir", run_dir, *options]))


def test_there_are_ten_each_with_a_command_and_a_folded_solution():
    text = (ROOT / "docs/exercises.md").read_text(encoding="utf-8")
    assert re.findall(r"^## (\d+)\. ", text, re.M) == [str(n) for n in NUMBERS]
    for n in NUMBERS:
        assert exercise(n).count("**Command:** `python ") == 1
        assert exercise(n).count("<details><summary>Solution</summary>") == 1
        assert exercise(n).count("</details>") == 1
    with pytest.raises(ValueError, match="expected the number of one of exercises, got 11"):
        exercise(11)


def test_divergences_are_over_all_updates_of_a_run(tmp_path):
    for seed, kl in ((1, [1, 2]), (2, [3, 8])):
        (tmp_path / f"trpo__{seed}").mkdir()
        rows = "\n".join(f"{x},{x / 10}" for x in kl)
        (tmp_path / f"trpo__{seed}/metrics.csv").write_text(f"kl,approx_kl\n{rows}\n")
    assert "| trpo | 4 | 2.5 | 8 | 0.25 | 0.8 |" in divergences(tmp_path)
    (tmp_path / "none").mkdir()
    assert divergences(tmp_path / "none") == ""


@pytest.mark.parametrize("number", WITH_CODE)
def test_a_solution_trains(number, tmp_path):
    (script,) = solve(number, tmp_path)
    env = re.search(r"--env (\S+)", exercise(number))[1]
    rows = train(script, "--env", env, "--total-timesteps", "1000", "--num-envs", "2")
    assert rows
    assert re.search(rf"`python compare\.py .*--runs .*\b{script.stem}\b", exercise(number))
    if number == 5:
        assert all(row["kl"] >= 0 for row in rows)
    if number == 6:
        assert {(row["line_search_steps"], row["accepted"]) for row in rows} == {(1, 1)}


def test_one_step_of_ppo_clip_does_not_depend_on_the_clip(tmp_path):
    options = "--env CartPole-v1 --total-timesteps 5000 --update-epochs 1 --num-minibatches 1"
    wide, narrow = (
        train(ROOT / "ppo_clip.py", *options.split(), "--clip-coef", x, folder=tmp_path / x)
        for x in ("0.2", "0.001")
    )
    assert len(wide) == len(narrow) > 2
    for x, y in zip(wide, narrow):
        assert {name for name in x if x[name] != y[name]} - {"wall_time", "SPS"} == {
            *("clipfrac", "frac_kill")
        }
