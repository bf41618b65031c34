"""to_tensorboard.py: the rows of metrics.csv as event files, of a run that is over or goes on."""

import csv
import json
import threading
from pathlib import Path

import pytest
import tyro

import ppo_clip
import to_tensorboard

events = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")


@pytest.fixture(autouse=True)
def in_empty_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def scalars(folder, tag):
    accumulator = events.EventAccumulator(folder).Reload()
    return {event.step: event.value for event in accumulator.Scalars(tag)}


def test_event_files_have_the_rows_under_cleanrls_tags():
    rows = ppo_clip.train(ppo_clip.Args(total_timesteps=6000, run_dir="run", quiet=True))
    assert to_tensorboard.write(to_tensorboard.Args(("run",))) == {"run": len(rows)}
    for tag in ("charts/SPS", "charts/episodic_return", "losses/value_loss", "losses/clipfrac"):
        name = tag.split("/")[1]
        expected = {x["global_step"]: x[name] for x in rows if x[name] is not None}
        assert scalars("run", tag) == pytest.approx(expected)
    tags = events.EventAccumulator("run").Reload().Tags()["scalars"]
    assert len(tags) == len(rows[0]) - 1  # all columns but global_step


def test_a_run_that_goes_on_is_followed_until_its_end():
    """A row is read once it is whole; empty cells are left out."""
    Path("run").mkdir()
    Path("run/config.json").write_text(json.dumps({"total_timesteps": 30}))
    metrics = Path("run/metrics.csv")
    metrics.write_text("global_step,episodic_return,entropy\n10,,0.5\n20,7.0,0.")
    counts = {}

    def follow():
        counts.update(to_tensorboard.write(to_tensorboard.Args(("run",), seconds=0.05)))

    thread = threading.Thread(target=follow)
    thread.start()
    thread.join(0.5)
    assert thread.is_alive()
    with open(metrics, "a", newline="") as file:
        file.write("4\n")
        csv.writer(file).writerow([30, 8.0, 0.3])
    thread.join(20)
    assert not thread.is_alive() and counts == {"run": 3}
    assert scalars("run", "losses/entropy") == pytest.approx({10: 0.5, 20: 0.4, 30: 0.3})
    assert scalars("run", "charts/episodic_return") == {20: 7.0, 30: 8.0}


def test_without_follow_a_run_that_is_not_over_is_written_as_it_is():
    Path("run").mkdir()
    Path("run/config.json").write_text(json.dumps({"total_timesteps": 30}))
    Path("run/metrics.csv").write_text("global_step,entropy\n10,0.5\n")
    assert to_tensorboard.write(to_tensorboard.Args(("run",), follow=False)) == {"run": 1}


def test_folder_that_is_no_run_is_refused(capsys):
    with pytest.raises(SystemExit) as end:
        tyro.cli(to_tensorboard.Args, args=["nowhere"])
    assert end.value.code == 2
    assert "runs: expected the folder of a run, got 'nowhere'" in capsys.readouterr().err
