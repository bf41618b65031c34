"""What benchmarks do about peers, real or missing, about runs made before, and with the pages of
results/; not how fast anything is.
"""

import csv
import importlib
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
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
    assert "sb3: not found, left out" in done.stdout
    assert "rlox: not" not in done.stdout
    *_, row = done.stdout.splitlines()
    cells = [cell.strip() for cell in row.strip("|").split("|")]
    name, sizes, speed, memory, other, other_speed, _, ratio, _ = cells
    assert (name, sizes) == ("vpg.py, CartPole-v1", "8 2048 1 5")
    assert (other, other_speed) == ("rlox-vpg", "1,000")
    speed = float(speed.replace(",", ""))
    assert speed > 0 and 50 < float(memory) < 5000
    assert float(ratio.split()[0]) == pytest.approx(speed / 1000, abs=0.006)


@pytest.mark.skipif(sys.platform == "win32", reason="the program waits as Unix does")
def test_settings_gives_mean_deviation_worst_and_seconds(monkeypatch):
    options = ("--tasks", "CartPole-v1", "--seeds", "2", "--steps", "900")
    done = run("settings.py", *options, "--runs", "vpg", "vpg --num-envs 2")
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert lines[0] == "| run | CartPole-v1 |" and lines[3].startswith("| vpg --num-envs 2 | ")
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    assert lines[5] == lines[0] and lines[8].count("/") == 2  # a seed each
    settings = importlib.import_module("settings")
    runs = [settings.Run(*run) for run in ((1.0, 50.0, 3.0), (3.0, 60.4, 5.0), (5.0, 70.0, 9.0))]
    assert settings.cell(runs) == "3.0 ± 2.0 (1.0), 5 s"
    assert settings.seeds(runs) == "1/50 3/60 5/70"
    assert settings.cell([settings.Run(-250.0, 9.0, 3.0)]) == "-250 (-250), 3 s"
    done = run("settings.py", *options, "--runs", "vpg --no-such-option")
    assert done.returncode == 1 and "CalledProcessError" in done.stderr


def test_until_stops_at_the_level_at_the_limit_and_at_the_end(tmp_path):
    own = ("--env", "CartPole-v1", "--total-timesteps", "6000", "--quiet", "--run-dir")
    for level, seconds, said in (("15", "600", None), ("501", "0", "inf"), ("501", "600", "inf")):
        folder = tmp_path / f"{level}_{seconds}"
        done = run("until.py", "ppo_clip.py", level, seconds, *own, str(folder))
        assert done.returncode == 0, done.stderr
        rows = (folder / "metrics.csv").read_text().splitlines()[1:]
        steps, episodes = (int(rows[-1].split(",")[i]) for i in (0, 2))
        assert done.stdout.split()[-1] == (said or str(steps))
        assert episodes >= 100 or level != "15"
        assert steps >= 6000 if (level, seconds) == ("501", "600") else steps < 6000


@pytest.mark.skipif(sys.platform == "win32", reason="the peer is a shell script")
def test_solve_keeps_both_processes_of_a_pair(solve, peer, tmp_path, monkeypatch):
    monkeypatch.setattr(solve, "RESULTS", tmp_path / "solve.csv")
    monkeypatch.setattr(solve, "LEVELS", {"CartPole-v1": 15})
    solve.make(str(peer), "CartPole-v1", "ppo_clip.py", 2)
    ((key, row),) = solve.kept(solve.RESULTS).items()
    assert key == ("CartPole-v1", "ppo_clip.py", 2)
    assert 1000 < int(row["ours_steps"]) < 20_000 and row["peer_steps"] == "1000"
    assert float(row["ours_seconds"]) > float(row["peer_seconds"]) >= 0


def test_solve_takes_medians_and_counts_who_was_stopped_as_stopped_at_the_limit(solve):
    inf, runs = float("inf"), {}
    runs["CartPole-v1"] = [[10.0, 6e4, 20.0, 7e4], [12.0, 5e4, 30.0, 8e4], [8.0, 9e4, 10.0, 9e4]]
    runs["Hopper-v5"] = [[60.0, 6e5, inf, inf], [30.0, 5e5, inf, inf], [90.0, 5e5, 100.0, 2e5]]
    runs["HalfCheetah-v5"] = [[inf, inf, 500.0, 7e5]]
    lines = solve.tables(runs).splitlines()
    assert "| CartPole-v1, 475 | 10.0 | 60,000 | 20.0 | 80,000 | 0.50 |" in lines
    assert "| Hopper-v5, 2000 | 60.0 | 500,000 | — | — | ≤ 0.10 |" in lines
    assert "| HalfCheetah-v5, 2000 | — | — | 500.0 | 700,000 | ≥ 1.20 |" in lines
    assert "Ahead on 2 of 3 tasks; the median of the quotients is 0.50." in lines
    assert "| Hopper-v5 | SB3, RL Zoo's settings | — — 100.0 |" in lines


def test_million_keeps_the_return_in_training_and_the_return_played(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    million = importlib.import_module("million")
    monkeypatch.setattr(million, "RESULTS", tmp_path / "million.csv")
    monkeypatch.setattr(million, "STEPS", 3000)
    monkeypatch.setattr(million, "GRID", np.array([1000, 2000, 3000]))
    million.make("CartPole-v1", "vpg.py", 2)
    ((key, row),) = million.kept(million.RESULTS).items()
    assert key == ("CartPole-v1", "vpg.py", 2)
    assert 5 < float(row["played"]) <= 500 and 10 < float(row["3000"]) < 60
    assert row["1000"] != row["3000"] and float(row["seconds"]) > 0


def test_table1_scores_chance_0_and_the_best_setting_1_on_each_task(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    table1 = importlib.import_module("table1")
    first, second, *others = table1.PAPER
    runs = {(task, "chance"): {1: -10.0} for task in table1.TASKS}
    for task in table1.TASKS:
        runs[task, first] = {1: 80.0, 2: 100.0}  # the best mean: 90
        runs |= {(task, x): {1: -10.0, 2: -10.0, 3: 1e6} for x in others}  # seed 3 is not complete
        runs[task, second] = {1: 40.0, 2: 40.0}
    scores = table1.scores(runs)
    assert scores[first] == pytest.approx({1: 0.9, 2: 1.1})
    assert scores[second] == pytest.approx({1: 0.5, 2: 0.5})
    assert scores[others[0]] == pytest.approx({1: 0.0, 2: 0.0})
    row = table1.tables(runs).splitlines()[6]
    assert row == f"| `{first}` | 1.00 | 1 | 0.90 1.10 | -0.39 | 11 |"
    del runs["Hopper-v5", second]
    assert not any(table1.scores(runs).values())  # nothing is scored before all tasks are there
    assert f"| `{first}` |  |  |  | -0.39 | 11 |" in table1.tables(runs)


def test_solve_names_a_missing_peer():
    done = run("solve.py", "--sb3", "/nowhere", "--seeds", "1000")
    assert done.returncode == 2 and done.stdout == ""
    expected = "expected a Python that has Stable-Baselines3, got /nowhere"
    assert done.stderr.endswith(f"error: --sb3: {expected}\n")


@pytest.fixture
def solve(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    return importlib.import_module("solve")


@pytest.fixture
def defaults(tmp_path, monkeypatch, reproduce):
    """The program defaults.py in a repository of its own, with one script in it.

    reproduce is imported before, as it keeps the ROOT that it finds.
    """
    module = importlib.import_module("defaults")
    monkeypatch.setattr(importlib.import_module("common"), "ROOT", tmp_path)
    monkeypatch.setattr(module, "RESULTS", tmp_path / "defaults.csv")
    (tmp_path / "vpg.py").write_text('"""Text."""\nx = 1  # one\n')
    return module


def test_defaults_makes_a_run_again_when_its_script_has_changed(defaults, tmp_path, monkeypatch):
    monkeypatch.setattr(defaults, "our_run", lambda *run: [7.0] * len(defaults.GRID))
    monkeypatch.setattr(defaults, "chance", lambda *run: [1.0] * len(defaults.GRID))
    defaults.make("python", "CartPole-v1", "vpg.py", 1)
    defaults.make("python", "CartPole-v1", "chance", 2)
    runs = {("CartPole-v1", "vpg.py", 1), ("CartPole-v1", "chance", 2)}
    assert defaults.kept(defaults.RESULTS).keys() == runs
    (tmp_path / "vpg.py").write_text('"""Another text."""\n\nx = 1  # won\n')
    assert defaults.kept(defaults.RESULTS).keys() == runs
    (tmp_path / "vpg.py").write_text('"""Text."""\nx = 2  # one\n')
    assert defaults.kept(defaults.RESULTS).keys() == {("CartPole-v1", "chance", 2)}


def test_defaults_takes_the_last_return_at_or_before_each_step(defaults):
    values = defaults.curve([15_000, 20_000, 199_000, 204_000], [1.0, 2.0, 3.0, 4.0])
    assert values[1:19] == [2.0] * 18 and values[19] == 4.0
    assert values[0] != values[0]  # no run has a return yet: NaN


def test_page_of_defaults_is_what_the_program_makes_of_its_file(defaults, reproduce):
    runs = {}
    with open(ROOT / "results/defaults.csv", newline="") as file:
        for row in csv.DictReader(file):
            runs.setdefault((row["task"], row["program"]), {})[int(row["seed"])] = row
    runs = {key: [rows[seed] for seed in sorted(rows)] for key, rows in runs.items()}
    (block,) = reproduce.blocks(ROOT / "results/defaults.md")
    assert block["output"] == defaults.tables(runs)


def test_page_of_defaults_says_who_is_ahead_and_by_how_much(defaults):
    def rows(*returns):
        return [{"seconds": "1", "200000": str(x)} for x in returns]

    runs = {
        ("Acrobot-v1", "ppo_clip.py"): rows(-80, -90),
        ("Acrobot-v1", "ppo_kl.py"): rows(-101, -101),
        ("Acrobot-v1", "SB3 PPO"): rows(-100, -100),
        ("Acrobot-v1", "vpg.py"): rows(-300, -300),
        ("Acrobot-v1", "SB3 A2C"): rows(-300, -300),
        ("Acrobot-v1", "chance"): rows(-500, -500),
    }
    lines = defaults.tables(runs).splitlines()
    means, multiples = [x for x in lines if x.startswith("| Acrobot-v1 |")][:2]
    assert "| -85.0 ± 7.1 | -101 ± 0 | -100 ± 0 |" in means
    assert multiples == "| Acrobot-v1 | ahead, 1.04 | behind, 1.00 |  | equal, 1.00 |"


def test_defaults_names_a_missing_peer():
    options = ("--programs", "SB3 PPO", "--seeds", "1000", "--python", "/nowhere")
    done = run("defaults.py", *options)
    assert done.returncode == 2 and done.stdout == ""
    expected = "expected a Python that has sb3-contrib, got /nowhere"
    assert done.stderr.endswith(f"error: --python: {expected}\n")


@pytest.fixture
def reproduce(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    return importlib.import_module("reproduce")


PAGE = """# A title

By hand.

`python compare.py --runs vpg`
<!-- to be taken -->

<!-- end -->

![Curves](curves.png)

By hand, too.

`python benchmarks/gae.py`
<!-- commit 1234567, 2026-01-02, 3 min, code 89abcdef -->

old

<!-- end -->
"""


@pytest.fixture
def repository(reproduce, tmp_path, monkeypatch):
    """A repository of its own, with a page that has two blocks."""
    for name in ("benchmarks", "gae_fast", "results"):
        (tmp_path / name).mkdir()
    (tmp_path / "vpg.py").write_text("x = 1\n")
    (tmp_path / "benchmarks/gae.py").write_text("import gae_fast\n")
    (tmp_path / "gae_fast/__init__.py").write_text('"""Text."""\nx = 1\n')
    (tmp_path / "results/page.md").write_text(PAGE, encoding="utf-8")
    monkeypatch.setattr(reproduce, "ROOT", tmp_path)
    monkeypatch.setattr(reproduce, "RESULTS", tmp_path / "results")
    return tmp_path


def test_reproduce_renews_a_block_and_its_picture_and_leaves_the_rest(
    reproduce, repository, monkeypatch
):
    def run(command):
        assert command[1:4] == [repository / "compare.py", "--runs", "vpg"]
        folder = Path(command[command.index("--out") + 1])
        folder.mkdir()
        (folder / "learning_curves.png").write_bytes(b"picture")
        return SimpleNamespace(
            output=f"| run |\n| --- |\n| vpg |\n\n{folder}/learning_curves.png\n"
        )

    monkeypatch.setattr(reproduce, "run", run)
    monkeypatch.setattr(reproduce, "git", lambda *words: "abc1234" if "HEAD" in words else "")
    page = repository / "results/page.md"
    first, second = reproduce.blocks(page)
    assert not reproduce.is_current(first) and not reproduce.is_current(second)
    reproduce.take(page, first)
    text = page.read_text(encoding="utf-8")
    assert (repository / "results/curves.png").read_bytes() == b"picture"
    renewed, same = reproduce.blocks(page)
    assert renewed["picture"] == "curves.png"
    assert renewed["output"] == "| run |\n| --- |\n| vpg |" and same[0] == second[0]
    assert without(text, renewed, same) == without(PAGE, first, second)
    stamp = reproduce.STAMP.fullmatch(renewed["stamp"])
    assert stamp[1] == "abc1234" and stamp[3] == "1"
    assert "| abc1234 |" in reproduce.index() and "| 1234567 | 2026-01-02 | 3 | changed |" in (
        reproduce.index()
    )
    # A comment changes nothing; a statement of what the command names does.
    assert reproduce.is_current(renewed)
    (repository / "vpg.py").write_text("# one\n\nx = 1  # won\n")
    assert reproduce.is_current(renewed)
    (repository / "vpg.py").write_text("x = 2\n")
    assert not reproduce.is_current(renewed)


def without(text, *blocks):
    for block in blocks:
        text = text.replace(block[0], "")
    return text


def test_reproduce_takes_nothing_from_code_that_is_not_committed(
    reproduce, repository, monkeypatch
):
    monkeypatch.setattr(reproduce, "git", lambda *words: " M vpg.py")
    page = repository / "results/page.md"
    with pytest.raises(SystemExit, match="expected committed files"):
        reproduce.take(page, next(reproduce.blocks(page)))
    assert page.read_text(encoding="utf-8") == PAGE


def test_index_of_the_results_is_what_the_program_makes_of_the_pages(reproduce):
    assert (ROOT / "results/README.md").read_text(encoding="utf-8") == reproduce.index(), (
        "run python benchmarks/reproduce.py --index"
    )


def test_every_table_of_the_results_stands_in_a_block_or_is_of_published_figures(reproduce):
    for page in reproduce.pages():
        text = page.read_text(encoding="utf-8")
        assert "to be taken" not in text
        by_hand = reproduce.BLOCK.sub("", text).partition("\n## Published\n")[0]
        assert "| ---" not in by_hand, f"{page.name} has a table by hand"
