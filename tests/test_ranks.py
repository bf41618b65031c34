"""Several processes under torchrun train one agent.

torchrun runs this file itself, as a program that does on each of two ranks what the tests compare.
"""

import csv
import importlib
import json
import os
import shutil
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
STANDARDISED = {"raw": False, "standardised": True}
each_script = pytest.mark.parametrize("name", NAMES)


def torchrun(*command, **kwargs):
    launcher = (sys.executable, "-m", "torch.distributed.run", "--standalone")
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parent), "OMP_NUM_THREADS": "1"}
    options = {"env": environment, "capture_output": True, "text": True, "timeout": 200}
    return subprocess.run([*launcher, "--nproc-per-node", "2", *command], **options, **kwargs)


# What both ranks do, each on its half of the rows, and what the tests do on all of them.


def half_of(x, rank):
    return x if rank is None else x[50 * rank : 50 * (rank + 1)]


def updated(name, kind, rank, standardised):
    """An update on 100 rows, in float64.

    Returns what `measure` said before it, the parameters before and after it, and its metrics.
    """
    script = SCRIPTS[name]
    torch.set_num_threads(1)  # or the first weights are rounded otherwise
    torch.manual_seed(1)
    options = {"num_minibatches": 1} if name != "reinforce" else {}
    if name in ("ppo_clip", "ppo_kl"):
        options |= {"update_epochs": 3, "max_grad_norm": 0.1}
    if name == "trpo":  # each iteration multiplies the rounding: with 15, a part of 7e-6 was seen
        options |= {"cg_iters": 10}
    args = script.Args(env=KINDS[kind], num_envs=4 if rank is None else 2, **options)
    envs = script.make_envs(args.env)
    agent = script.Agent(envs, norm_obs=False)
    agent.double()
    torch.nn.init.normal_(agent.policy.mlp[-1].weight, std=0.1)
    generator = np.random.default_rng(2)

    def rows(*shape):
        return torch.as_tensor(generator.standard_normal((100, *shape)))

    obs = rows(*envs.single_observation_space.shape)
    discrete = torch.as_tensor(generator.integers(2, size=100))
    actions = discrete if kind == "discrete" else rows(1)
    log_probs = agent.policy(obs).log_prob(actions).detach() + 0.2 * rows()
    advantages, *returns = (5 * rows() + 2 for _ in script.Batch._fields[3:])
    if standardised:
        advantages = (advantages - advantages.mean()) / advantages.std(correction=0)
    fields = (obs, actions, log_probs, advantages, *returns)
    batch = script.Batch(*(half_of(x, rank) for x in fields))
    parts = [batch] if rank is not None else [[half_of(x, k) for x in fields] for k in (0, 1)]
    measured = [script.measure(agent, script.Batch(*part)) for part in parts]
    measured = {key: np.mean([part[key] for part in measured]) for key in measured[0]}
    optimizer = script.make_optimizer(agent, args)
    before = torch.nn.utils.parameters_to_vector(agent.parameters()).detach().clone()
    metrics = script.update(agent, optimizer, batch, args)
    after = torch.nn.utils.parameters_to_vector(agent.parameters()).detach()
    return measured, before, after, metrics


def statistics_of(name, rank):
    """Count, mean and deviation of rows, after two parts."""
    script, moments = SCRIPTS[name], torch.tensor([[0.0] * 3, [0.0] * 3, [1.0] * 3]).double()
    for seed in (1, 2):
        rows = np.random.default_rng(seed).normal([0, 1, -3], [1, 0.1, 50], (100, 3))
        moments = script.with_rows(moments, half_of(rows, rank))
    return moments


def trained(name, stop_after=None, args=None, saved=None, **options):
    """The agent's state after every update of a run, its batches, and its rows."""
    script, weights, batches, rows = SCRIPTS[name], [], [], []
    update = script.update

    def recorded(agent, optimizer, batch, args):
        if len(weights) == stop_after:
            raise StopIteration
        batches.append(batch)
        metrics = update(agent, optimizer, batch, args)
        weights.append({key: tensor.clone() for key, tensor in agent.state_dict().items()})
        return metrics

    script.update = recorded
    try:
        rows = script.train(args or script.Args(**options), saved)
    except StopIteration:
        torch.distributed.barrier()  # rank 0 has written
    script.update = update
    return weights, [tuple(batch) for batch in batches], rows


def options_of(name):
    options = {"total_timesteps": 2000, "num_envs": 5, "norm_obs": True, "norm_reward": True}
    options |= {"num_steps": 32} if name != "reinforce" else {}
    options |= {"quiet": True, "checkpoint_every": 100}
    return options | ({"target_kl": 1e-3, "learning_rate": 0.01} if name == "ppo_clip" else {})


def refusal_of_one_processs_run(name, rank):
    """What load_run says of a run that one process made."""
    folder = Path(f"one_{name}_{rank}")
    shutil.copytree(f"stopped_{name}", folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "world_size": 1}))
    try:
        SCRIPTS[name].load_run(str(folder))
    except SCRIPTS[name].ArgumentError as error:
        return str(error)


def work():
    torch.distributed.init_process_group()
    rank, found = torch.distributed.get_rank(), {}
    for name in NAMES:
        for standardised in STANDARDISED.values():
            kinds = {kind: updated(name, kind, rank, standardised) for kind in KINDS}
            found["updated", name, standardised] = kinds
        found["statistics", name] = statistics_of(name, rank)
        found["trained", name] = trained(name, **options_of(name), run_dir=name)
        trained(name, stop_after=4, **options_of(name), run_dir=f"stopped_{name}")
        args, saved = SCRIPTS[name].load_run(f"stopped_{name}")
        found["refusal", name] = refusal_of_one_processs_run(name, rank)
        torch.distributed.barrier()  # both ranks have read what rank 0 now goes on with
        trained(name, args=args, saved=saved)
        options = {
            "env": "toys:RankPays-v0",
            "num_envs": 3,
            "quiet": True,
            "run_dir": f"pay_{name}",
        }
        options |= {"num_steps": 16} if name != "reinforce" else {}
        found["pay", name] = trained(name, total_timesteps=200, **options)[-1]
    import toys

    toys.Seeds.seen.clear()
    options = {"env": "toys:Seeds-v0", "num_envs": 4, "total_timesteps": 300, "quiet": True}
    found["batches"] = trained("vpg", **options)[1]
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
@pytest.mark.parametrize("standardised", STANDARDISED.values(), ids=STANDARDISED)
def test_update_on_two_halves_is_that_of_one_process_on_the_whole(name, kind, standardised, found):
    """To 1e-6 of the update's length. The two ranks agree to the bit.

    What `measure` says on both ranks is the mean of what it says of each half.
    """
    measured, before, after, metrics = updated(name, kind, None, standardised)
    ranks = [rank["updated", name, standardised][kind] for rank in found]
    for rank_measured, rank_before, rank_after, rank_metrics in ranks:
        assert torch.equal(before, rank_before)
        length = (after - before).norm()
        assert length > 0 and (after - rank_after).norm() <= 1e-6 * length
        assert rank_metrics == pytest.approx(metrics, rel=1e-6, abs=1e-9)
        assert rank_measured == pytest.approx(measured, rel=1e-9, abs=1e-12)
    assert torch.equal(ranks[0][2], ranks[1][2])
    assert ranks[0][0] == ranks[1][0] and ranks[0][3] == ranks[1][3]


@each_script
def test_statistics_are_those_of_all_ranks(name, found):
    """The count is the ranks' mean."""
    whole = statistics_of(name, rank=None)
    for rank in found:
        moments = rank["statistics", name]
        torch.testing.assert_close(moments[1:], whole[1:], rtol=1e-9, atol=1e-9)
        assert (2 * moments[0] == whole[0]).all() and (whole[0] == 200).all()
    assert torch.equal(found[0]["statistics", name], found[1]["statistics", name])


@each_script
def test_advantages_are_standardised_over_both_ranks(name, found):
    """Mean 0 and std 1 of the steps of both together, where a rank's are not.

    REINFORCE's weights have no mean of 0 but at each time; their mean square is 1.
    """
    parts = [rank["trained", name][1] for rank in found]
    for one, other in zip(*parts):
        together = torch.cat([one[3], other[3]])
        assert together.square().mean().item() == pytest.approx(1, abs=1e-5)
        assert name == "reinforce" or together.mean().item() == pytest.approx(0, abs=1e-5)
    alone = [batch[3].square().mean().item() - 1 for batch in parts[0]]
    assert max(map(abs, alone)) > 0.01
    assert name == "vpg" or any(len(one[3]) != len(other[3]) for one, other in zip(*parts))


@each_script
def test_ranks_have_equal_weights_after_every_update(name, found):
    """To the bit, as are their statistics; and global_step counts the steps of both."""
    (weights, batches, rows), (others, other_batches, other_rows) = (
        rank["trained", name] for rank in found
    )
    assert len(weights) == len(others) == len(rows) == len(other_rows) > 5
    for one, other in zip(weights, others):
        assert all(torch.equal(tensor, other[key]) for key, tensor in one.items())
    first, last = (x["policy.mlp.0.weight"] for x in (weights[0], weights[-1]))
    assert not torch.equal(first, last)
    taken = np.cumsum([len(x[0]) + len(y[0]) for x, y in zip(batches, other_batches)]).tolist()
    assert [row["global_step"] for row in rows] == taken
    assert [row["global_step"] for row in other_rows] == taken
    assert not all(torch.equal(x[1], y[1]) for x, y in zip(batches, other_batches))


def without_clock(rows):
    return [{k: v for k, v in row.items() if k not in ("wall_time", "SPS")} for row in rows]


@each_script
def test_rows_of_both_ranks_are_equal_and_of_the_episodes_of_both(name, found):
    """Episodes of 10 steps, which pay 0 on rank 0 and 10 on rank 1."""
    for run in ("trained", "pay"):
        rows, others = (
            rank[run, name][-1] if run == "trained" else rank[run, name] for rank in found
        )
        assert without_clock(rows) == without_clock(others)
    steps, ends = (60, (6, 6)) if name == "reinforce" else (90, (6, 12))
    for k, row in enumerate(rows[:2]):
        assert row["global_step"] == steps * (k + 1) and row["episodes"] == sum(ends[: k + 1])
        assert row["episodic_return"] == 5 and row["episodic_length"] == 10


@each_script
def test_resume_with_another_number_of_processes_is_refused(name, folder, found):
    script = SCRIPTS[name]
    with pytest.raises(script.ArgumentError, match=f"^--resume: .* {name}, world_size 2$"):
        script.load_run(str(folder / name))
    for rank in found:
        assert rank["refusal", name].startswith("--resume: ")
        assert rank["refusal", name].endswith(f" {name}, world_size 1")


def rows_of(folder):
    with open(folder / "metrics.csv", newline="") as file:
        return without_clock(csv.DictReader(file))


@each_script
def test_only_rank_0_writes(name, folder, found):
    files = ["checkpoint.pt", "config.json", "metrics.csv"]
    assert sorted(os.listdir(folder / name)) == files
    assert len(os.listdir(folder / "runs")) == 1  # of the run whose folder train named
    assert json.loads((folder / name / "config.json").read_text())["world_size"] == 2
    assert len(rows_of(folder / name)) == len(found[0]["trained", name][-1])


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
    first, second = (rank["batches"][0][1] for rank in found)
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


def test_world_size_in_the_environment_alone_makes_no_ranks():
    """As on a cluster, whose scheduler sets it: without torchrun, each script is one process."""
    code = """
import runpy, sys
for name in {names}:
    sys.argv = [name, "--total-timesteps", "100", "--run-dir", name, "--quiet", "--num-envs", "2"]
    runpy.run_path(f"{root}/{name}.py", run_name="__main__")
"""
    code = code.replace("{names}", repr(NAMES)).replace("{root}", str(ROOT))
    environment = {**os.environ, "WORLD_SIZE": "2", "RANK": "1", "LOCAL_RANK": "1"}
    environment |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", code]
    run = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60)
    assert run.returncode == 0, run.stderr
    for name in NAMES:
        assert json.loads(Path(name, "config.json").read_text())["world_size"] == 1
        assert rows_of(Path(name)) and Path(name, "checkpoint.pt").exists()
