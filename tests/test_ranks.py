"""Several processes under torchrun train as one process with all their environments would.

torchrun runs this file itself, as a program that does on each of two ranks what the tests then compare.
"""

import csv
import importlib
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
each_script = pytest.mark.parametrize("name", NAMES)
pytestmark = pytest.mark.xdist_group("ranks")  # one worker for all, as they share what two ranks did


def torchrun(*command, options=("--standalone", "--nproc-per-node", "2"), **kwargs):
    return finished(begun(*command, options=options, **kwargs))


def begun(*command, options, before=(), environment=None, **kwargs):
    command = [*before, sys.executable, "-m", "torch.distributed.run", *options, *command]
    environment = {
        **os.environ,
        "PYTHONPATH": str(Path(__file__).parent),
        "OMP_NUM_THREADS": "1",
        **(environment or {}),
    }
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen(command, env=environment, **pipes, **kwargs)


def finished(process):
    try:
        output, errors = process.communicate(timeout=200)
    finally:
        process.kill()
    return subprocess.CompletedProcess(process.args, process.returncode, output, errors)


# What both ranks do, each on its part of the rows, and what the tests do on all of them.


def part_of(x, rank):
    """The rows of a rank, 37 and 64 of 101, or all."""
    return x if rank is None else x[:37] if rank == 0 else x[37:]


def updated(name, kind, rank):
    """The parameters before and after an update on 101 rows, in float64, and its metrics."""
    script = SCRIPTS[name]
    torch.set_num_threads(1)  # or the first weights are rounded otherwise
    torch.manual_seed(1)
    options = {"num_minibatches": 1} if name != "reinforce" else {}
    options |= {"update_epochs": 3, "max_grad_norm": 0.1} if name in ("ppo_clip", "ppo_kl") else {}
    args = script.Args(env=KINDS[kind], num_envs=4 if rank is None else 2, **options)
    envs = script.make_envs(args)
    agent = script.Agent(envs.single_observation_space, envs.single_action_space, norm_obs=False).double()
    torch.nn.init.normal_(agent.actor[-1].weight, std=0.1)
    generator = np.random.default_rng(2)

    def rows(*shape):
        return torch.as_tensor(generator.standard_normal((101, *shape)))

    obs = rows(*envs.single_observation_space.shape)
    actions = torch.as_tensor(generator.integers(2, size=101)) if kind == "discrete" else rows(1)
    log_probs = agent.policy(obs).log_prob(actions).detach() + 0.2 * rows()
    batch = script.Batch(
        *(part_of(x, rank) for x in (obs, actions, log_probs, *[rows() for _ in script.Batch._fields[3:]]))
    )
    optimizers = script.make_optimizers(agent, args)
    before = torch.nn.utils.parameters_to_vector(agent.parameters()).detach().clone()
    metrics = script.update(agent, optimizers, batch, args)
    return before, torch.nn.utils.parameters_to_vector(agent.parameters()).detach(), metrics


def statistics_of(name, rank):
    """Running statistics of rows whose mean is large, after two parts."""
    statistics = SCRIPTS[name].RunningStatistics(3)
    for seed in (1, 2):
        rows = torch.as_tensor(np.random.default_rng(seed).normal([0, 100, -3], [1, 0.1, 50], (101, 3)))
        statistics.update(part_of(rows.float(), rank))
    return statistics.state_dict()


def episodes_of(name, rank):
    """The episodes noted in two rollouts of six environments, the first three of which are rank 0's."""
    script, generator = SCRIPTS[name], np.random.default_rng(3)
    episodes = script.Episodes(script.make_envs(script.Args(num_envs=6 if rank is None else 3)), 1)
    columns = slice(None) if rank is None else slice(3) if rank == 0 else slice(3, 6)
    for _ in range(2):
        rewards, dones = generator.standard_normal((50, 6)), generator.random((50, 6)) < 0.4
        script.record_episodes(episodes, rewards[:, columns], dones[:, columns], np.ones((50, 6), bool)[:, columns])
    return list(episodes.recent_returns), list(episodes.recent_lengths), episodes.count


def trained(name, rank, **options):
    """The agent's state after every update of a run, the batches' actions and lengths, and the rows of train."""
    script, weights, actions, steps = SCRIPTS[name], [], [], []
    update = script.update

    def recorded(agent, optimizers, batch, args):
        actions.append(batch.actions)
        steps.append(len(batch.obs))
        metrics = update(agent, optimizers, batch, args)
        weights.append({key: tensor.clone() for key, tensor in agent.state_dict().items()})
        return metrics

    script.update = recorded
    rows = script.train(script.Args(quiet=True, **options))
    script.update = update
    return weights, actions, steps, rows


def options_of(name):
    options = {"env": "CartPole-v1", "total_timesteps": 3000, "num_envs": 5, "norm_obs": True, "norm_reward": True}
    return options | ({"target_kl": 1e-3, "learning_rate": 0.01} if name == "ppo_clip" else {}) | {"run_dir": name}


def killable(name="ppo_clip"):
    options = {"env": "toys:OneRankIsKilled-v0", "num_envs": 3, "num_steps": 16, "num_minibatches": 2}
    return {**options, "total_timesteps": 1200}


def work():
    with SCRIPTS["vpg"].process_group():
        rank, found = torch.distributed.get_rank(), {}
        Path("killed").touch()  # so that nothing is
        for name in NAMES:
            found["updated", name] = {kind: updated(name, kind, rank) for kind in KINDS}
            found["statistics", name] = statistics_of(name, rank)
            found["episodes", name] = episodes_of(name, rank)
            found["trained", name] = trained(name, rank, **options_of(name))
        found["continuous"] = trained("ppo_kl", rank, env="Pendulum-v1", total_timesteps=4000, run_dir="continuous")
        import toys

        _, found["actions"], *_ = trained("vpg", rank, env="toys:Seeds-v0", num_envs=4, total_timesteps=300)
        found["seeds"] = toys.Seeds.seen
        trained("ppo_clip", rank, **killable(), run_dir="whole")
        torch.save(found, f"found{rank}.pt")


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
def test_update_of_two_ranks_is_that_of_one_process(name, kind, found):
    """To 1e-6 of the update's length, though the ranks have 37 and 64 rows; and so are the metrics."""
    before, after, metrics = updated(name, kind, rank=None)
    for rank in found:
        rank_before, rank_after, rank_metrics = rank["updated", name][kind]
        assert torch.equal(before, rank_before)
        assert (after - rank_after).norm() <= 1e-6 * (after - before).norm()
        assert rank_metrics == pytest.approx(metrics, rel=1e-6, abs=1e-9)
    assert torch.equal(found[0]["updated", name][kind][1], found[1]["updated", name][kind][1])


@each_script
def test_statistics_are_those_of_all_ranks(name, found):
    expected = statistics_of(name, rank=None)
    for rank in found:
        for key, tensor in rank["statistics", name].items():
            torch.testing.assert_close(tensor, expected[key], rtol=1e-5, atol=1e-6)
        assert rank["statistics", name]["count"] == 202
    for key, tensor in found[0]["statistics", name].items():
        assert torch.equal(tensor, found[1]["statistics", name][key])


@each_script
def test_episodes_of_all_ranks_are_noted_in_the_order_in_which_they_end(name, found):
    returns, lengths, count = episodes_of(name, rank=None)
    assert count > 200
    for rank in found:
        assert rank["episodes", name] == (pytest.approx(returns), lengths, count)


@each_script
def test_ranks_have_equal_weights_after_every_update(name, found):
    """To the bit, as are their statistics; and the rows that train returns."""
    runs = [rank["trained", name] for rank in found]
    if name == "ppo_kl":
        runs += [rank["continuous"] for rank in found]
    for (weights, actions, steps, rows), (other_weights, other_actions, other_steps, other_rows) in zip(
        runs[::2], runs[1::2]
    ):
        assert len(weights) == len(other_weights) == len(rows) == len(other_rows) > 1
        for one, other in zip(weights, other_weights):
            assert all(torch.equal(tensor, other[key]) for key, tensor in one.items())
        assert not torch.equal(weights[0]["actor.0.weight"], weights[-1]["actor.0.weight"])
        assert [str(row) for row in rows] == [str(row) for row in other_rows]  # NaN included
        # Every logged step is one that a rank took; the ranks drew actions of their own.
        taken = np.cumsum(np.add(steps, other_steps))
        assert [row["global_step"] for row in rows] == taken.tolist()
        assert not all(torch.equal(x, y) for x, y in zip(actions, other_actions))


@each_script
def test_only_rank_0_writes(name, folder, found):
    assert sorted(os.listdir(folder / name)) == ["checkpoint.pt", "config.json", "metrics.csv"]
    assert len(os.listdir(folder / "runs")) == 1  # of the run whose folder train named
    rows = list(csv.DictReader(open(folder / name / "metrics.csv", newline="")))
    *_, returned = found[1]["trained", name]
    assert len(rows) == len(returned) and rows[-1]["global_step"] == str(returned[-1]["global_step"])


def test_environments_have_the_seeds_of_one_process_with_all_of_them(found):
    import toys

    vpg = SCRIPTS["vpg"]
    toys.Seeds.seen.clear()
    vpg.Episodes(vpg.make_envs(vpg.Args(env="toys:Seeds-v0", num_envs=8)), seed=1)
    expected = [seed for seed in toys.Seeds.seen if seed is not None]
    assert len(set(expected)) == 8
    assert [[seed for seed in rank["seeds"] if seed is not None] for rank in found] == [expected[:4], expected[4:]]


def test_ranks_draw_actions_of_their_own(found):
    """All observations are equal, as are the weights: only the random numbers can differ."""
    first, second = (rank["actions"][0] for rank in found)
    assert first.shape == second.shape and not torch.equal(first, second)


def test_run_of_two_ranks_is_not_resumed_by_one(folder):
    shutil.copytree(folder / "vpg", "run")
    expected = r"--resume: expected as many ranks as the run has, 2, got 1$"
    with pytest.raises(SCRIPTS["vpg"].ArgumentError, match=expected):
        SCRIPTS["vpg"].train(SCRIPTS["vpg"].saved_args("run"))


def assert_same(folder, other):
    """Two runs have the same rows, but for the clock's, and the same weights."""
    outcomes = []
    for path in (folder, other):
        rows = list(csv.DictReader(open(path / "metrics.csv", newline="")))
        rows = [{k: v for k, v in row.items() if k not in ("wall_time", "SPS")} for row in rows]
        outcomes.append((rows, torch.load(path / "checkpoint.pt", weights_only=True)["agent"]))
    (rows, agent), (other_rows, other_agent) = outcomes
    assert rows == other_rows
    assert all(torch.equal(tensor, other_agent[key]) for key, tensor in agent.items())


def program(name, **options):
    flags = [x for key, value in options.items() for x in (f"--{key.replace('_', '-')}", str(value))]
    return [str(ROOT / f"{name}.py"), "--quiet", *flags]


def test_killed_rank_is_restarted_from_the_last_checkpoint(folder):
    """With --run-dir and --resume of one name, the same command begins the run and goes on with it."""
    Path("killed").unlink(missing_ok=True)
    command = program("ppo_clip", **killable(), run_dir="run", resume="run")
    run = torchrun(*command, options=("--standalone", "--nproc-per-node", "2", "--max-restarts", "1"))
    assert run.returncode == 0 and "exitcode: -9" in run.stderr and Path("killed").exists(), run.stderr
    assert run.stderr.count("--resume: there is no checkpoint in run yet, so the run begins\n") == 1
    assert_same(Path("run"), folder / "whole")


@pytest.fixture
def hosts():
    """The commands that run another command on either of two hosts: network namespaces joined by a cable."""
    ip = shutil.which("ip") or "/usr/sbin/ip"
    names = [f"host{i}-{os.getpid()}" for i in (0, 1)]
    if sys.platform != "linux" or not os.path.exists(ip) or subprocess.run([ip, "netns", "add", names[0]]).returncode:
        pytest.skip("this system cannot make network namespaces, or not for this user")
    try:
        cable = f"link add cable0 netns {names[0]} type veth peer name cable1 netns {names[1]}"
        commands = [f"netns add {names[1]}", cable]
        for i, name in enumerate(names):
            commands.append(f"-n {name} addr add 10.77.0.{i + 1}/24 dev cable{i}")
            commands += [f"-n {name} link set {device} up" for device in (f"cable{i}", "lo")]
        for command in commands:
            subprocess.run([ip, *command.split()], check=True)
        yield [(ip, "netns", "exec", name) for name in names]
    finally:
        for name in names:
            subprocess.run([ip, "netns", "delete", name], stderr=subprocess.DEVNULL)


def test_two_hosts_begin_and_restart_a_run(hosts, folder):
    """They share no files: each has a folder of its own, and only the first one's gets the run. One rank is killed."""
    processes = []
    for i, before in enumerate(hosts):
        options = "--nnodes 2 --nproc-per-node 1 --max-restarts 1 --rdzv-backend c10d --rdzv-endpoint 10.77.0.1:29400"
        # What real hosts find by their names: who has the endpoint, and where each is.
        options += f" --rdzv-conf is_host={1 - i} --local-addr 10.77.0.{i + 1}"
        os.mkdir(f"host{i}")
        command = program("ppo_clip", **killable(), run_dir="run", resume="run")
        environment = {"GLOO_SOCKET_IFNAME": f"cable{i}"}
        options = {"options": options.split(), "before": before, "environment": environment, "cwd": f"host{i}"}
        processes.append(begun(*command, **options))
    for process in processes:
        run = finished(process)
        assert run.returncode == 0, run.stderr
    assert os.listdir("host0") == ["run"] and os.listdir("host1") == ["killed"]
    assert_same(Path("host0/run"), folder / "whole")


def test_error_on_one_rank_is_shown_and_ends_the_job():
    command = program("vpg", env="toys:OneRankRaises-v0", num_envs=3, num_steps=16, total_timesteps=5000, run_dir="run")
    run = torchrun(*command)
    assert run.returncode == 1
    assert run.stderr.count("ZeroDivisionError: the physics of rank 1\n") == 1  # in the environment's own traceback
    said = "the environment's step failed: ZeroDivisionError: the physics of rank 1; the last good checkpoint is run"
    assert run.stderr.count(f"vpg.py: rank 1: iteration 4: {said}") == 1
    assert "to go on: torchrun … vpg.py --resume run\n" in run.stderr


@pytest.mark.parametrize(
    ("name", "options", "said"),
    [
        ("trpo", {"gamma": 2}, "trpo.py: --gamma: expected a number in [0, 1], got 2.0\n"),
        ("reinforce", {"env": "Nope-v0"}, "reinforce.py: --env: expected one that Gymnasium can make, got 'Nope-v0'"),
    ],
)
def test_bad_input_is_named_once(name, options, said):
    run = torchrun(*program(name, **options))
    assert run.returncode == 1 and run.stderr.count(said) == 1 and run.stderr.count("expected") == 1, run.stderr
    assert os.listdir() == []


def test_one_rank_has_the_bits_of_no_torchrun():
    options = {"env": "CartPole-v1", "total_timesteps": 3000, "norm_obs": True, "quiet": True}
    run = torchrun(
        *program("ppo_clip"), "--norm-obs", "--total-timesteps", "3000", "--run-dir", "one", options=("--standalone",)
    )
    assert run.returncode == 0, run.stderr
    SCRIPTS["ppo_clip"].train(SCRIPTS["ppo_clip"].Args(**options, run_dir="none"))
    one, none = (torch.load(f"{path}/checkpoint.pt", weights_only=True)["agent"] for path in ("one", "none"))
    assert all(torch.equal(tensor, none[key]) for key, tensor in one.items())


@each_script
def test_without_torchrun_there_is_no_process_group(name, monkeypatch):
    def refuse(*args, **kwargs):
        raise AssertionError("no process group was asked for")

    operations = ("all_reduce", "all_to_all_single", "all_gather_object", "gather_object", "broadcast_object_list")
    for operation in ("init_process_group", *operations):
        monkeypatch.setattr(torch.distributed, operation, refuse)
    script = SCRIPTS[name]
    script.train(script.Args(**options_of(name) | {"total_timesteps": 1500}, quiet=True))
    assert not torch.distributed.is_initialized()


def test_of_the_errors_of_torch_distributed_only_lost_connections_are_lost_ranks():
    script = SCRIPTS["trpo"]

    def fail(message):
        raise RuntimeError(message)

    said = "[/gloo/transport/tcp/pair.cc:537] Read error [127.0.0.1]:15524: Connection reset by peer. This is\ntypical"
    with pytest.raises(script.LostRank, match=r"another rank has stopped: Read error \S+ Connection reset by peer$"):
        script.collective(fail, said)
    with pytest.raises(RuntimeError, match="^No backend type associated with device type mps$") as error:
        script.collective(fail, "No backend type associated with device type mps")
    assert not isinstance(error.value, script.RunError)


def test_checkpoint_of_an_earlier_version_is_refused():
    vpg = SCRIPTS["vpg"]
    vpg.train(vpg.Args(total_timesteps=1500, run_dir="run", quiet=True))
    checkpoint = torch.load("run/checkpoint.pt", weights_only=True)
    del checkpoint["world_size"]
    torch.save(checkpoint, "run/checkpoint.pt")
    with pytest.raises(
        vpg.ArgumentError, match=r"^--resume: expected a run of vpg, got 'run': it is of an earlier version$"
    ):
        vpg.saved_args("run")


def test_device_auto_may_be_said_again_in_a_resume(capsys):
    vpg = SCRIPTS["vpg"]
    vpg.train(vpg.Args(total_timesteps=1500, run_dir="run", quiet=True))
    vpg.train(vpg.Args(total_timesteps=1500, run_dir="run", quiet=True, resume="run", device="auto"))
    assert capsys.readouterr().out.startswith("run is complete")
