"""Several processes under torchrun train one agent.

torchrun runs this file itself, as a program that does on each of two ranks what the tests compare.
"""

import csv
import importlib
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed

ROOT = Path(__file__).parent.parent
sys.path[:0] = [str(ROOT), str(Path(__file__).parent)]

NAMES = ("reinforce", "vpg", "trpo", "ppo_clip", "ppo_kl")
SCRIPTS = {name: importlib.import_module(name) for name in NAMES}
KINDS = {"discrete": "CartPole-v1", "continuous": "Pendulum-v1"}
each_script = pytest.mark.parametrize("name", NAMES)
pytestmark = pytest.mark.xdist_group("ranks")  # one worker for all: they share what two ranks did


def torchrun(*command, **kwargs):
    launcher = (sys.executable, "-m", "torch.distributed.run", "--standalone")
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parent), "OMP_NUM_THREADS": "1"}
    options = {"env": environment, "capture_output": True, "text": True, "timeout": 200}
    return subprocess.run([*launcher, "--nproc-per-node", "2", *command], **options, **kwargs)


# What both ranks do, each on its half of the rows, and what the tests do on all of them.


def half_of(x, rank):
    return x if rank is None else x[50 * rank : 50 * (rank + 1)]


def updated(name, kind, rank):
    """The parameters before and after an update on 100 rows, in float64."""
    script = SCRIPTS[name]
    torch.set_num_threads(1)  # or the first weights are rounded otherwise
    torch.manual_seed(1)
    options = {"norm_returns": False} if name == "reinforce" else {"norm_adv": False}
    options |= {"num_minibatches": 1} if name != "reinforce" else {}
    if name in ("ppo_clip", "ppo_kl"):
        options |= {"update_epochs": 3, "max_grad_norm": 0.1}
    args = script.Args(env=KINDS[kind], num_envs=4 if rank is None else 2, **options)
    envs = script.make_envs(args.env)
    agent = script.Agent(envs.single_observation_space, envs.single_action_space, norm_obs=False)
    agent.double()
    torch.nn.init.normal_(agent.actor[-1].weight, std=0.1)
    generator = np.random.default_rng(2)

    def rows(*shape):
        return torch.as_tensor(generator.standard_normal((100, *shape)))

    obs = rows(*envs.single_observation_space.shape)
    discrete = torch.as_tensor(generator.integers(2, size=100))
    actions = discrete if kind == "discrete" else rows(1)
    log_probs = agent.policy(obs).log_prob(actions).detach() + 0.2 * rows()
    fields = (obs, actions, log_probs, *(rows() for _ in script.Batch._fields[3:]))
    batch = script.Batch(*(half_of(x, rank) for x in fields))
    optimizer = script.make_optimizer(agent, args)
    before = torch.nn.utils.parameters_to_vector(agent.parameters()).detach().clone()
    metrics = script.update(agent, optimizer, batch, args)
    return before, torch.nn.utils.parameters_to_vector(agent.parameters()).detach(), metrics


def statistics_of(name, rank):
    """Mean and deviation of rows, after two parts."""
    statistics = SCRIPTS[name].RunningStatistics(3)
    for seed in (1, 2):
        rows = np.random.default_rng(seed).normal([0, 1, -3], [1, 0.1, 50], (100, 3))
        statistics.update(half_of(torch.as_tensor(rows).float(), rank))
    return statistics.mean_and_std()


def trained(name, stop_after=None, **options):
    """The agent's state after every update of a run, the batches' actions and sizes, the rows."""
    script, weights, actions, sizes = SCRIPTS[name], [], [], []
    update = script.update

    def recorded(agent, optimizer, batch, args):
        if len(weights) == stop_after:
            raise StopIteration
        actions.append(batch.actions)
        sizes.append(len(batch.obs))
        metrics = update(agent, optimizer, batch, args)
        weights.append({key: tensor.clone() for key, tensor in agent.state_dict().items()})
        return metrics

    script.update = recorded
    rows, args = [], script.Args(**options)
    torch.distributed.barrier()  # all ranks have found run_dir empty, as before init_process_group
    try:
        rows = script.train(args)
    except StopIteration:
        torch.distributed.barrier()  # rank 0 has written
    script.update = update
    return weights, actions, sizes, rows


def options_of(name):
    options = {"total_timesteps": 3000, "num_envs": 5, "norm_obs": True, "norm_reward": True}
    options |= {"num_steps": 32} if name != "reinforce" else {}
    options |= {"quiet": True, "checkpoint_every": 100}
    return options | ({"target_kl": 1e-3, "learning_rate": 0.01} if name == "ppo_clip" else {})


def work():
    torch.distributed.init_process_group()
    rank, found = torch.distributed.get_rank(), {}
    for name in NAMES:
        found["updated", name] = {kind: updated(name, kind, rank) for kind in KINDS}
        found["statistics", name] = statistics_of(name, rank)
        found["trained", name] = trained(name, **options_of(name), run_dir=name)
        trained(name, stop_after=4, **options_of(name), run_dir=f"stopped_{name}")
        checkpoint = SCRIPTS[name].load_checkpoint(f"stopped_{name}")
        trained(name, **checkpoint["args"])
    import toys

    toys.Seeds.seen.clear()
    options = {"env": "toys:Seeds-v0", "num_envs": 4, "total_timesteps": 300, "quiet": True}
    _, found["actions"], *_ = trained("vpg", **options)
    found["seeds"] = toys.Seeds.seen
    torch.save(found, f"found{rank}.pt")
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    work()
    sys.exit()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """The folder in which two ranks did all that."""
    path = tmp_path_factory.mktemp("ranks")
    run = torchrun(__file__, cwd=path)
    assert run.returncode == 0, run.stderr
    return path


@pytest.fixture
def found(folder):
    return [torch.load(folder / f"found{rank}.pt", weights_only=False) for rank in (0, 1)]


@pytest.fixture(autouse=True)
def in_empty_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


@each_script
@pytest.mark.parametrize("kind", KINDS)
def test_update_on_two_halves_is_that_of_one_process_on_the_whole(name, kind, found):
    """To 1e-6 of the update's length. The two ranks agree to the bit."""
    before, after, metrics = updated(name, kind, rank=None)
    for rank in found:
        rank_before, rank_after, rank_metrics = rank["updated", name][kind]
        assert torch.equal(before, rank_before)
        assert (after - rank_after).norm() <= 1e-6 * (after - before).norm()
        if name in ("ppo_clip", "ppo_kl"):  # whose logged means are over all ranks
            del metrics["explained_variance"], rank_metrics["explained_variance"]
            assert rank_metrics == pytest.approx(metrics, rel=1e-6, abs=1e-9)
            metrics["explained_variance"] = None
    assert torch.equal(found[0]["updated", name][kind][1], found[1]["updated", name][kind][1])


@each_script
def test_statistics_are_those_of_all_ranks(name, found):
    for rank in found:
        for tensor, expected in zip(rank["statistics", name], statistics_of(name, rank=None)):
            torch.testing.assert_close(tensor, expected, rtol=1e-4, atol=1e-4)


@each_script
def test_ranks_have_equal_weights_after_every_update(name, found):
    """To the bit, as are their statistics; and global_step counts the steps of both."""
    (weights, actions, sizes, rows), (others, other_actions, other_sizes, other_rows) = (
        rank["trained", name] for rank in found
    )
    assert len(weights) == len(others) == len(rows) == len(other_rows) > 5
    for one, other in zip(weights, others):
        assert all(torch.equal(tensor, other[key]) for key, tensor in one.items())
    assert not torch.equal(weights[0]["actor.0.weight"], weights[-1]["actor.0.weight"])
    taken = np.cumsum(np.add(sizes, other_sizes)).tolist()
    assert [row["global_step"] for row in rows] == taken
    assert [row["global_step"] for row in other_rows] == taken
    assert not all(torch.equal(x, y) for x, y in zip(actions, other_actions))


def rows_of(folder):
    with open(folder / "metrics.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    return [{k: v for k, v in row.items() if k not in ("wall_time", "SPS")} for row in rows]


@each_script
def test_only_rank_0_writes(name, folder, found):
    files = ["checkpoint.pt", "config.json", "metrics.csv"]
    assert sorted(os.listdir(folder / name)) == files
    assert len(os.listdir(folder / "runs")) == 1  # of the run whose folder train named
    assert json.loads((folder / name / "config.json").read_text())["world_size"] == 2
    assert len(rows_of(folder / name)) == len(found[0]["trained", name][3])


@each_script
def test_stopped_and_resumed_ranks_end_as_ranks_that_were_not(name, folder):
    stopped = folder / f"stopped_{name}"
    assert rows_of(stopped) == rows_of(folder / name)
    agents = [torch.load(x / "checkpoint.pt", weights_only=True) for x in (stopped, folder / name)]
    for key, tensor in agents[0]["agent"].items():
        assert torch.equal(tensor, agents[1]["agent"][key]), key


def test_ranks_have_environments_and_actions_of_their_own(found):
    """All observations are equal, as are the weights: only random numbers can differ."""
    seeds = [{seed for seed in rank["seeds"] if seed is not None} for rank in found]
    assert len(seeds[0]) == len(seeds[1]) == 4 and not seeds[0] & seeds[1]
    first, second = (rank["actions"][0] for rank in found)
    assert first.shape == second.shape and not torch.equal(first, second)


def test_error_on_one_rank_is_shown_and_ends_the_job():
    command = (str(ROOT / "vpg.py"), "--env", "toys:OneRankRaises-v0", "--num-envs", "3")
    run = torchrun(*command, "--num-steps", "16", "--run-dir", "run", "--quiet")
    assert run.returncode != 0 and "ZeroDivisionError: the physics of rank 1" in run.stderr


def test_bad_argument_ends_the_job_and_leaves_nothing():
    run = torchrun(str(ROOT / "ppo_kl.py"), "--gamma", "2")
    assert run.returncode != 0 and "--gamma: expected a number from 0 to 1, got 2" in run.stderr
    assert not os.listdir()


@each_script
def test_without_torchrun_nothing_is_sent(name, monkeypatch):
    def refuse(*args, **kwargs):
        raise AssertionError("no message was asked for")

    for operation in ("init_process_group", "all_reduce"):
        monkeypatch.setattr(torch.distributed, operation, refuse)
    script = SCRIPTS[name]
    script.train(script.Args(**options_of(name) | {"total_timesteps": 1500}, run_dir="run"))
    assert not torch.distributed.is_initialized()
