"""ppo_clip.py: what a run promises, from the rollout's rows to the files on disk."""

import csv
import dataclasses
import json
import math
import shutil
import subprocess
import sys
from pathlib import Path

import gymnasium
import numpy as np
import pytest
import torch
import toys
from hypothesis import given
from hypothesis import strategies as st

import ppo_clip
from ppo_clip import Agent, Args, ArgumentError, Batch, Episodes, RunningStatistics, make_envs, rollout, train, update

ROOT = Path(__file__).parent.parent
SHORT = {"total_timesteps": 400, "num_envs": 4, "num_steps": 16, "quiet": True}


@pytest.fixture(autouse=True)
def in_empty_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def start(args):
    """What train makes before its loop."""
    torch.manual_seed(args.seed)
    envs = make_envs(args)
    agent = Agent(envs.single_observation_space, envs.single_action_space, args.norm_obs)
    return envs, agent, Episodes(envs, args.seed)


def outcome(rows):
    """The rows without what a clock put into them."""
    return [{name: value for name, value in row.items() if name not in ("wall_time", "SPS")} for row in rows]


def restore(run_dir):
    checkpoint = torch.load(Path(run_dir, "checkpoint.pt"), weights_only=True)
    args = Args(**checkpoint["args"])
    envs = make_envs(args)
    agent = Agent(envs.single_observation_space, envs.single_action_space, args.norm_obs)
    agent.load_state_dict(checkpoint["agent"])
    return agent, envs, checkpoint


# ------------------------------------------------------- rollout ------------------------------------------------------


@pytest.mark.parametrize("env", ["CartPole-v1", "Pendulum-v1"])
@pytest.mark.parametrize("norm_obs", [False, True])
def test_stored_log_probs_and_values_are_those_of_the_collecting_policy(env, norm_obs):
    envs, agent, episodes = start(Args(env=env, num_envs=3, num_steps=300, norm_obs=norm_obs))
    args = Args(env=env, num_envs=3, num_steps=300)
    rollout(envs, agent, episodes, args)
    agent.obs_statistics.update(torch.randn(100, *episodes.obs.shape[1:]) * 3)
    torch.nn.init.normal_(agent.actor[-1].weight)
    batch = rollout(envs, agent, episodes, args)
    with torch.no_grad():
        torch.testing.assert_close(agent.policy(batch.obs).log_prob(batch.actions), batch.log_probs)
        torch.testing.assert_close(agent.value(batch.obs), batch.values)
    assert batch.log_probs.shape == batch.values.shape == batch.advantages.shape == batch.returns.shape
    torch.testing.assert_close(batch.returns, batch.advantages + batch.values, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("norm", [False, True])
def test_autoreset_rows_reach_nothing(norm):
    """A vector environment that puts nonsense where nobody may look trains as one that does not, to the bit."""
    runs = {}
    for env in ("toys:Drift-v0", "toys:AbsurdDrift-v0"):
        args = Args(env=env, run_dir=env[5:], norm_obs=norm, norm_reward=norm, **SHORT)
        runs[env] = outcome(train(args)), torch.load(Path(env[5:], "checkpoint.pt"), weights_only=True)
        assert runs[env][0][-1]["global_step"] == toys.Drift.steps
    (rows, checkpoint), (absurd_rows, absurd_checkpoint) = runs.values()
    assert rows == absurd_rows
    for name, tensor in checkpoint["agent"].items():
        assert torch.equal(tensor, absurd_checkpoint["agent"][name]), name


def test_batch_holds_each_real_step_once_and_episodes_are_whole():
    """Drift's environment n has episodes of 3 + n steps: 3 + n rows in n's column, then a row that only resets."""
    args = Args(env="toys:Drift-v0", num_envs=4, num_steps=7)
    envs, agent, episodes = start(args)
    age = torch.cat([rollout(envs, agent, episodes, args).obs[:, 1] for _ in range(30)])
    assert len(age) == toys.Drift.steps
    assert episodes.count == sum(30 * 7 // (4 + n) for n in range(4))
    assert set(episodes.recent_lengths) == {3, 4, 5, 6}
    # The age in a real step's observation is 0 to 2 + n: the last observation, of age 3 + n, belongs to no step.
    assert age.max() == pytest.approx(0.5)


def test_episodic_return_is_the_raw_one():
    args = Args(norm_reward=True, norm_obs=True, num_envs=5, num_steps=50)
    envs, agent, episodes = start(args)
    for _ in range(5):
        rollout(envs, agent, episodes, args)
    assert episodes.count > 20
    assert list(episodes.recent_returns) == list(episodes.recent_lengths)  # CartPole pays 1 a step


def test_episodes_agree_with_gymnasium():
    args = Args(env="Acrobot-v1", num_envs=3, num_steps=400)
    envs, agent, episodes = start(args)
    recorder = gymnasium.wrappers.vector.RecordEpisodeStatistics(envs)
    episodes = Episodes(recorder, 5)
    for _ in range(5):
        rollout(recorder, agent, episodes, args)
    assert episodes.count == recorder.episode_count >= 3
    assert list(episodes.recent_returns) == [float(x) for x in recorder.return_queue]
    assert list(episodes.recent_lengths) == [int(x) for x in recorder.length_queue]


def test_normalized_rewards_divide_by_the_deviation_of_each_episodes_discounted_sum():
    rng = np.random.default_rng(0)
    rewards, dones = rng.standard_normal((60, 3)), rng.random((60, 3)) < 0.1
    is_step = ~np.concatenate([np.zeros((1, 3), bool), dones[:-1]])
    rewards[~is_step] = 0
    discounted = []
    for n in range(3):
        so_far = 0.0
        for t in range(60):
            so_far = 0.9 * so_far + rewards[t, n]
            if is_step[t, n]:
                discounted.append(so_far)
            if dones[t, n]:
                so_far = 0.0
    episodes, statistics = Episodes(make_envs(Args(num_envs=3)), 1), RunningStatistics()
    ppo_clip.normalize_rewards(episodes, rewards[:25], is_step[:25], 0.9, statistics)
    result = ppo_clip.normalize_rewards(episodes, rewards[25:], is_step[25:], 0.9, statistics)
    np.testing.assert_allclose(result, rewards[25:] / np.std(discounted), rtol=1e-5)


@given(st.lists(st.integers(1, 20), min_size=1, max_size=5), st.floats(-10, 10), st.floats(0.1, 10))
def test_running_statistics_are_those_of_all_rows_together(sizes, shift, scale):
    rows = torch.randn(sum(sizes), 3, generator=torch.Generator().manual_seed(len(sizes))) * scale + shift
    statistics = RunningStatistics(3)
    for part in rows.split(sizes):
        statistics.update(part)
    torch.testing.assert_close(statistics.mean, rows.mean(dim=0), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(statistics.var, rows.var(dim=0, correction=0), rtol=1e-3, atol=1e-4)
    assert statistics.count == len(rows)


VALUE_TASK = {"num_envs": 4, "num_steps": 32, "total_timesteps": 40_000, "learning_rate": 1e-2, "gamma": 0.9}


@pytest.mark.parametrize("gae_lambda", [0.0, 0.95, 1.0])
def test_truncation_bootstraps(gae_lambda):
    """One state, reward 1, a time limit of 10 steps: the value is that of going on for ever, 1 / (1 − γ)."""
    train(Args(env="toys:OneStateTruncated-v0", run_dir="run", gae_lambda=gae_lambda, quiet=True, **VALUE_TASK))
    agent, _, _ = restore("run")
    assert agent.value(torch.ones(1)).item() == pytest.approx(1 / (1 - 0.9), rel=0.02)


def test_termination_does_not_bootstrap():
    """The same with a terminal state after 4 steps: the value is the finite sum, averaged over the 4 steps."""
    train(Args(env="toys:OneStateTerminated-v0", run_dir="run", gae_lambda=1.0, quiet=True, **VALUE_TASK))
    agent, _, _ = restore("run")
    finite_sums = [sum(0.9**k for k in range(left)) for left in (1, 2, 3, 4)]
    assert agent.value(torch.ones(1)).item() == pytest.approx(np.mean(finite_sums), rel=0.03)


# ------------------------------------------------------- update -------------------------------------------------------


def test_each_epoch_deals_every_step_once_in_another_order(monkeypatch):
    args = Args(num_envs=4, num_steps=32, num_minibatches=4, update_epochs=3)
    envs, agent, episodes = start(args)
    batch = Batch(*(x[:101] for x in rollout(envs, agent, episodes, args)))  # 4 minibatches cannot be equal
    seen, policy = [], agent.policy
    monkeypatch.setattr(agent, "policy", lambda obs: (seen.append(obs), policy(obs))[1])
    update(agent, ppo_clip.make_optimizers(agent, args), batch, args)
    sizes = [len(obs) for obs in seen]
    assert len(sizes) == 12 and max(sizes) - min(sizes) == 1
    epochs = [torch.cat(seen[i : i + 4]) for i in (0, 4, 8)]
    assert not torch.equal(epochs[0], epochs[1]) and not torch.equal(epochs[0], batch.obs)
    for epoch in epochs:
        assert sorted(epoch.tolist()) == sorted(batch.obs.tolist())


@pytest.mark.parametrize("env", ["CartPole-v1", "Pendulum-v1"])
def test_one_step_is_adam_on_the_loss_of_the_paper(env):
    """One epoch of one minibatch against Schulman et al. 2017, eq. 9, sample by sample, with torch's own clipping."""
    options = {"update_epochs": 1, "num_minibatches": 1, "ent_coef": 0.02, "vf_coef": 0.7, "max_grad_norm": 0.3}
    args = Args(env=env, num_envs=3, num_steps=40, norm_adv=False, **options)
    envs, agent, episodes = start(args)
    torch.nn.init.normal_(agent.actor[-1].weight)  # else the entropy is at its maximum and has no gradient
    batch = rollout(envs, agent, episodes, args)
    batch = batch._replace(log_probs=batch.log_probs + 0.5 * torch.randn_like(batch.log_probs))  # ratios on both sides
    twin = Agent(envs.single_observation_space, envs.single_action_space, norm_obs=False)
    twin.load_state_dict(agent.state_dict())

    optimizer = torch.optim.Adam(twin.parameters(), lr=args.learning_rate, eps=1e-5)
    loss = 0.0
    for i in range(len(batch.obs)):
        policy = twin.policy(batch.obs[i])
        ratio = math.e ** (policy.log_prob(batch.actions[i]) - batch.log_probs[i])
        clipped = max(min(ratio, torch.tensor(1 + args.clip_coef)), torch.tensor(1 - args.clip_coef))
        surrogate = min(ratio * batch.advantages[i], clipped * batch.advantages[i])
        squared_error = (twin.value(batch.obs[i]) - batch.returns[i]) ** 2
        loss = loss - surrogate + args.vf_coef * squared_error / 2 - args.ent_coef * policy.entropy()
    (loss / len(batch.obs)).backward()
    torch.nn.utils.clip_grad_norm_(twin.parameters(), args.max_grad_norm)
    optimizer.step()

    update(agent, ppo_clip.make_optimizers(agent, args), batch, args)
    for (name, parameter), expected in zip(agent.named_parameters(), twin.parameters()):
        torch.testing.assert_close(parameter.grad, expected.grad, rtol=1e-3, atol=1e-5, msg=name)
        torch.testing.assert_close(parameter.detach(), expected.detach(), rtol=1e-3, atol=1e-4, msg=name)


def test_optimizer_is_torchs_adam_with_its_gradient_clipping():
    """Ten steps on a random regression, some clipped and some not: the parameters are torch.optim.Adam's."""
    torch.manual_seed(0)
    ours, twin = (torch.nn.Sequential(torch.nn.Linear(3, 5), torch.nn.Tanh(), torch.nn.Linear(5, 2)) for _ in range(2))
    twin.load_state_dict(ours.state_dict())
    optimizer = ppo_clip.Adam(ours.parameters(), 0.01)
    reference = torch.optim.Adam(twin.parameters(), lr=0.01, eps=1e-5)
    norms = []
    for step in range(10):
        x, y = torch.randn(20, 3), 0.2 * step * torch.randn(20, 2)
        optimizer.learning_rate = reference.param_groups[0]["lr"] = 0.01 / (step + 1)
        optimizer.minimize((ours(x) - y).square().mean(), len(x), max_grad_norm=0.5)
        reference.zero_grad()
        (twin(x) - y).square().mean().backward()
        norms.append(torch.nn.utils.clip_grad_norm_(twin.parameters(), 0.5).item())
        reference.step()
        for parameter, expected in zip(ours.parameters(), twin.parameters()):
            torch.testing.assert_close(parameter, expected)
    assert min(norms) < 0.5 < max(norms)


def test_target_kl_ends_the_epochs():
    args = Args(num_envs=4, num_steps=32, num_minibatches=4, update_epochs=10, learning_rate=0.01)
    steps = {}
    for target_kl in (None, 1e-9):
        envs, agent, episodes = start(args)
        optimizers = ppo_clip.make_optimizers(agent, args)
        batch = rollout(envs, agent, episodes, args)
        metrics = update(agent, optimizers, batch, dataclasses.replace(args, target_kl=target_kl))
        steps[target_kl] = int(optimizers["agent"].state["step"])
        assert metrics["approx_kl"] > 1e-9
    assert steps == {None: 40, 1e-9: 4}


def test_metrics_of_an_unchanged_policy():
    args = Args(num_envs=4, num_steps=32, num_minibatches=2, update_epochs=3, learning_rate=0.0, norm_adv=False)
    envs, agent, episodes = start(args)
    batch = rollout(envs, agent, episodes, args)
    metrics = update(agent, ppo_clip.make_optimizers(agent, args), batch, args)
    assert metrics["policy_loss"] == pytest.approx(-batch.advantages.mean().item(), rel=1e-3)
    assert metrics["value_loss"] == pytest.approx(0.5 * (batch.values - batch.returns).square().mean().item(), rel=1e-3)
    probabilities = agent.policy(batch.obs).logits.double().exp()
    assert metrics["entropy"] == pytest.approx(-(probabilities * probabilities.log()).sum(1).mean().item(), rel=1e-4)
    assert metrics["approx_kl"] == pytest.approx(0, abs=1e-6) and metrics["clipfrac"] == 0


# ------------------------------------------------------- a run --------------------------------------------------------


def test_one_command_gives_one_outcome_in_processes_too():
    options, outcomes = {"env": "Acrobot-v1", "vectorization_mode": "async"}, []
    for run_dir in ("a", "b"):
        rows = train(Args(run_dir=run_dir, **{**SHORT, "total_timesteps": 2000}, **options))
        outcomes.append((outcome(rows), torch.load(Path(run_dir, "checkpoint.pt"), weights_only=True)["agent"]))
    (rows, weights), (rows_again, weights_again) = outcomes
    assert str(rows) == str(rows_again)  # as text, where NaN equals NaN
    assert all(torch.equal(weights[name], weights_again[name]) for name in weights)
    other = train(Args(run_dir="c", seed=2, **{**SHORT, "total_timesteps": 2000}, **options))
    assert str(outcome(other)) != str(rows)


def test_rows_are_metrics_csv_and_the_folder_is_complete():
    rows = train(Args(run_dir="run", device="cpu", **SHORT))
    with open("run/metrics.csv", newline="") as file:
        table = list(csv.DictReader(file))
    columns = "global_step wall_time episodes episodic_return episodic_length SPS policy_loss value_loss entropy"
    columns += " approx_kl clipfrac frac_in frac_kill frac_pass explained_variance learning_rate"
    assert list(table[0]) == columns.split()
    assert [{k: "" if v is None else str(v) for k, v in row.items()} for row in rows] == table
    assert rows[0]["learning_rate"] == Args().learning_rate > rows[-1]["learning_rate"] > 0
    assert rows[-2]["global_step"] < 400 <= rows[-1]["global_step"]
    config = json.loads(Path("run/config.json").read_text())
    for name, value in dataclasses.asdict(Args(run_dir="run", device="cpu", **SHORT)).items():
        assert config.pop(name) == value
    assert set(config) == {
        "algorithm",
        "world_size",
        "python",
        "numpy",
        "torch",
        "gymnasium",
        "gae_fast",
        "gae_fast_compiled",
    }
    assert sorted(path.name for path in Path("run").iterdir()) == ["checkpoint.pt", "config.json", "metrics.csv"]


def test_returns_are_empty_before_the_first_episode_ends():
    rows = train(Args(env="Pendulum-v1", run_dir="run", **{**SHORT, "total_timesteps": 1000}))
    assert rows[0]["episodes"] == 0 and rows[0]["episodic_return"] is rows[0]["episodic_length"] is None
    assert rows[-1]["episodes"] == 4 and rows[-1]["episodic_length"] == 200


def test_default_folder_is_named_after_the_run():
    train(Args(seed=7, **SHORT))
    (folder,) = Path("runs").iterdir()
    assert folder.name.startswith("CartPole-v1__ppo_clip__7__")


@pytest.mark.parametrize("options", [{"norm_obs": True}, {"env": "Pendulum-v1", "norm_obs": True, "norm_reward": True}])
def test_checkpoint_restores_the_policy(options, monkeypatch):
    """The restored policy is the trained one to the bit, and acts as it did: same values, same samples.

    Close, not equal: where a weight lies in memory can change the order in which a product is summed.
    """
    kept = {}

    def save_and_keep(run_dir, args, agent, *rest):
        kept["agent"] = agent
        save_checkpoint(run_dir, args, agent, *rest)

    save_checkpoint = ppo_clip.save_checkpoint
    monkeypatch.setattr(ppo_clip, "save_checkpoint", save_and_keep)
    train(Args(run_dir="run", **SHORT, **options))
    agent, envs, checkpoint = restore("run")
    obs = torch.randn(50, *envs.single_observation_space.shape) * 2
    for name, tensor in kept["agent"].state_dict().items():
        assert torch.equal(tensor, agent.state_dict()[name]), name
    torch.testing.assert_close(agent.value(obs), kept["agent"].value(obs))
    samples = []
    for each in (agent, kept["agent"]):
        torch.manual_seed(3)
        samples.append(each.policy(obs).sample())
    torch.testing.assert_close(*samples)
    assert checkpoint["algorithm"] == "ppo_clip" and checkpoint["args"]["env"] == Args(**options).env
    assert agent.obs_statistics.count > 0
    assert not Path("run/checkpoint.pt.tmp").exists()


def test_python_and_command_line_agree():
    command = [sys.executable, ROOT / "ppo_clip.py", "--total-timesteps", "400", "--num-envs", "4", "--num-steps", "16"]
    run = subprocess.run([*command, "--run-dir", "a", "--seed", "3"], capture_output=True, text=True, check=True)
    rows = train(Args(run_dir="b", **SHORT, seed=3))
    tables = [list(csv.DictReader(open(f"{name}/metrics.csv", newline=""))) for name in "ab"]
    assert outcome(tables[0]) == outcome(tables[1])
    assert "step/s" in run.stderr and "return" in run.stderr
    assert run.stdout.count("\n") == 1 and run.stdout.endswith("; a\n")
    assert f"return {rows[-1]['episodic_return']:.1f}" in run.stdout
    quiet = subprocess.run([*command, "--run-dir", "c", "--quiet"], capture_output=True, text=True, check=True)
    assert quiet.stdout == quiet.stderr == ""


@pytest.mark.parametrize("compiled", [True, False])
def test_script_and_folder_copied_elsewhere_just_work(compiled, tmp_path):
    shutil.copy(ROOT / "ppo_clip.py", tmp_path)
    ignored = ["__pycache__", "build", "*.egg-info", *([] if compiled else ["*.so", "*.pyd"])]
    shutil.copytree(ROOT / "gae_fast", tmp_path / "gae_fast", ignore=shutil.ignore_patterns(*ignored))
    command = [sys.executable, "ppo_clip.py", "--total-timesteps", "200", "--run-dir", "run"]
    run = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=True)
    assert json.loads((tmp_path / "run/config.json").read_text())["gae_fast_compiled"] == compiled
    assert run.stderr.count("gae_fast runs interpreted") == (not compiled)


def test_tensorboard_tags():
    events = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    rows = train(Args(run_dir="run", tensorboard=True, **SHORT))
    accumulator = events.EventAccumulator("run").Reload()
    losses = {"policy_loss", "value_loss", "entropy", "approx_kl", "clipfrac", "explained_variance"}
    losses |= {"frac_in", "frac_kill", "frac_pass"}
    charts = {"episodes", "episodic_return", "episodic_length", "SPS", "learning_rate"}
    assert set(accumulator.Tags()["scalars"]) == {f"losses/{x}" for x in losses} | {f"charts/{x}" for x in charts}
    last = accumulator.Scalars("losses/value_loss")[-1]
    assert last.step == rows[-1]["global_step"] and last.value == pytest.approx(rows[-1]["value_loss"], rel=1e-6)


# ------------------------------------------------ environments and spaces ---------------------------------------------


SPACES = ["StartAtThree", "NegativeStart", "MatrixAction", "ScalarAction", "Float64", "DictObservation"]
ENVS = ["FrozenLake-v1", "Taxi-v4", "Blackjack-v1", "MountainCarContinuous-v0", *(f"toys:{x}-v0" for x in SPACES)]


@pytest.mark.parametrize("env", ENVS)
def test_runs_in(env):
    rows = train(Args(env=env, run_dir="run", **SHORT))
    assert rows[-1]["global_step"] >= 400 and math.isfinite(rows[-1]["value_loss"])


@pytest.mark.parametrize("num_envs", [1, 64])
@pytest.mark.parametrize("mode", [None, "sync", "async", "vector_entry_point"])
def test_any_number_of_environments_in_any_mode(num_envs, mode):
    if (num_envs, mode) == (64, "async"):
        num_envs = 8  # processes
    args = Args(run_dir="run", **{**SHORT, "num_envs": num_envs, "total_timesteps": 2000}, vectorization_mode=mode)
    assert train(args)[-1]["episodes"] > 0


def test_actions_are_clipped_to_their_bounds_but_not_their_log_probs():
    class Recorder(gymnasium.vector.VectorWrapper):
        def step(self, actions):
            taken.append(actions)
            return super().step(actions)

    taken: list[np.ndarray] = []
    args = Args(env="Pendulum-v1", num_envs=2, num_steps=100)
    envs, agent, episodes = start(args)
    envs.env = Recorder(envs.env)
    torch.nn.init.constant_(agent.log_std, 2.0)
    batch = rollout(envs, agent, episodes, args)
    assert np.abs(taken).max() == 2.0 and (np.abs(taken) == 2.0).mean() > 0.5
    assert batch.actions.abs().max() > 10
    expected = torch.distributions.Normal(agent.actor(batch.obs), math.e**2).log_prob(batch.actions).sum(1)
    torch.testing.assert_close(batch.log_probs, expected.detach(), rtol=1e-4, atol=1e-4)


def test_environment_that_writes_into_its_action_does_not_change_the_batch():
    args = Args(env="toys:OverwritesAction-v0", num_envs=2, num_steps=20)
    envs, agent, episodes = start(args)
    batch = rollout(envs, agent, episodes, args)
    assert batch.actions.std() > 0.5
    torch.testing.assert_close(agent.policy(batch.obs).log_prob(batch.actions).detach(), batch.log_probs)


SPACES = [gymnasium.spaces.Discrete(4)] + [gymnasium.spaces.Box(-1, 1, shape) for shape in ((), (2,), (2, 3))]
each_space = pytest.mark.parametrize("action_space", SPACES, ids=str)


def random_agent(action_space, norm_obs=False):
    """An agent whose outputs differ from state to state, and some observations."""
    torch.manual_seed(0)
    agent = Agent(gymnasium.spaces.Box(-1, 1, (5,)), action_space, norm_obs)
    torch.nn.init.normal_(agent.actor[-1].weight, std=0.2)
    if not agent.discrete:
        torch.nn.init.normal_(agent.log_std, std=0.3)
    if norm_obs:
        agent.obs_statistics.update(3 * torch.randn(50, 5) + 1)
    return agent, 4 * torch.randn(6, 5)


def torchs(agent, obs):
    """The policy made of torch's own distributions."""
    output = agent.actor(agent.standardize(obs))
    if agent.discrete:
        return torch.distributions.Categorical(logits=output)
    mean = output.reshape(len(obs), *agent.action_shape)
    normal = torch.distributions.Normal(mean, agent.log_std.exp().expand_as(mean))
    return torch.distributions.Independent(normal, len(agent.action_shape))


@each_space
def test_policy_is_what_torchs_distributions_make_it(action_space):
    agent, obs = random_agent(action_space)
    policy, expected = agent.policy(obs), torchs(agent, obs)
    assert policy.batch_shape == expected.batch_shape and policy.event_shape == expected.event_shape
    torch.testing.assert_close(policy.mode, expected.mode)
    samples = expected.sample((7,))
    for actions in (samples[0], samples):  # one for each observation, and seven
        assert policy.log_prob(actions).shape == expected.log_prob(actions).shape
        torch.testing.assert_close(policy.log_prob(actions), expected.log_prob(actions))
    torch.testing.assert_close(policy.entropy(), expected.entropy())

    parameters = [parameter for name, parameter in agent.named_parameters() if not name.startswith("critic.")]
    weights = torch.randn(2, len(obs))
    gradients = [
        torch.autograd.grad((weights[0] * x.log_prob(samples[0]) + weights[1] * x.entropy()).sum(), parameters)
        for x in (agent.policy(obs), torchs(agent, obs))
    ]
    for found, right in zip(*gradients):
        torch.testing.assert_close(found, right, rtol=1e-4, atol=1e-5)


@each_space
@pytest.mark.parametrize("norm_obs", [False, True])
def test_acting_in_numpy_draws_from_the_policy(action_space, norm_obs):
    """And so does sample(): 20,000 draws for each observation, whose frequencies or moments are the policy's."""
    agent, obs = random_agent(action_space, norm_obs=norm_obs)
    act, many = ppo_clip.actor_in_numpy(agent, np.random.default_rng(0)), obs.repeat_interleave(20_000, dim=0)
    assert act(obs.numpy()).dtype == agent.policy(obs).sample().numpy().dtype
    with torch.no_grad():
        expected = torchs(agent, obs)
        for actions in (torch.as_tensor(act(many.numpy())), agent.policy(many).sample()):
            draws = actions.reshape(len(obs), 20_000, *agent.action_shape)
            if agent.discrete:
                frequencies = torch.stack([(draws == k).double().mean(dim=1) for k in range(4)], dim=1)
                error = (expected.probs * (1 - expected.probs) / 20_000).sqrt()
                assert ((frequencies - expected.probs).abs() < 5 * error).all()
                assert expected.probs.std(dim=0).min() > 0.05
            else:
                error = expected.stddev / math.sqrt(20_000)
                assert ((draws.mean(dim=1) - expected.mean).abs() < 5 * error).all()
                assert ((draws.std(dim=1) / expected.stddev - 1).abs() < 0.03).all()
                assert expected.mean.std(dim=0).min() > 0.1


def test_acting_in_numpy_refuses_a_layer_that_it_does_not_know():
    agent, _ = random_agent(gymnasium.spaces.Discrete(4))
    agent.actor[1] = torch.nn.ReLU()
    with pytest.raises(TypeError, match=r"expected nn.Linear or nn.Tanh, got ReLU\(\)"):
        ppo_clip.actor_in_numpy(agent, np.random.default_rng(0))


@each_space
def test_policy_stays_what_it_was_when_the_parameters_move(action_space):
    agent, obs = random_agent(action_space)
    policy = agent.policy(obs)
    actions = policy.sample()
    before = policy.log_prob(actions).detach(), policy.entropy().detach()
    with torch.no_grad():
        for parameter in agent.parameters():
            parameter += 1.0
    assert torch.equal(policy.log_prob(actions), before[0]) and torch.equal(policy.entropy(), before[1])


# ------------------------------------------------------- refusals -----------------------------------------------------


NAN, INF = float("nan"), float("inf")
COUNTS = ("total_timesteps", "num_envs", "num_steps", "update_epochs", "num_minibatches")
REFUSED = [
    *[(name, value) for name in COUNTS for value in (0, -1, 1.5, True, "4")],
    ("num_steps", 1),
    *[(name, value) for name in ("gamma", "gae_lambda") for value in (-0.1, 1.1, NAN, None, "0.9")],
    *[(name, value) for name in ("learning_rate", "clip_coef", "ent_coef", "vf_coef") for value in (-1e-9, NAN, INF)],
    *[(name, value) for name in ("max_grad_norm", "target_kl") for value in (0.0, -1.0, NAN)],
    *[("seed", value) for value in (-1, 0.5, 2**63)],
    *[("num_minibatches", value) for value in (3, 32, 64, 128)],  # of 4 * 16 steps, of which half may only reset
    *[("device", value) for value in ("abacus", "cuda:99", "meta", "", 5.0)],
    *[("env", value) for value in ("CartPol-v1", "CartPole-v99", "no_such_module:X-v0", "a:b:c", "")],
    *[
        ("env", f"toys:{x}-v0")
        for x in ("MultiDiscreteAction", "IntegerBox", "GraphObservation", "SameStep", "NoMode", "Three")
    ],
    ("env", 7),
    ("quiet", 2),
    *[("form", value) for value in ("max", "", None, 1)],
    ("run_dir", Path("path")),
    ("run_dir", "full"),
    ("run_dir", "file"),
    ("run_dir", "file/below"),
    ("tensorboard", True),
]


@pytest.mark.parametrize(("name", "value"), REFUSED)
def test_refused_argument_is_named_and_leaves_nothing(name, value, monkeypatch):
    Path("full").mkdir()
    Path("full/thing").touch()
    Path("file").touch()
    if name == "tensorboard":
        monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    flag = f"--{name.replace('_', '-')}"
    with pytest.raises(ArgumentError, match=f"^{flag}( [^ ]*)?: expected .*, (got|found) ") as error:
        train(Args(**{**SHORT, name: value}))
    assert "\n" not in str(error.value)
    assert sorted(path.name for path in Path.cwd().rglob("*")) == ["file", "full", "thing"]


def test_refusals_say_what_would_do():
    for options, hint in [
        ({"env": "CartPol-v1"}, "CartPole"),
        ({"env": "toys:MultiDiscreteAction-v0"}, "MultiDiscrete"),
        ({"env": "toys:SameStep-v0"}, "sync"),
        ({"env": "Acrobot-v1", "vectorization_mode": "vector_entry_point"}, "vector entry point"),
    ]:
        with pytest.raises(ArgumentError, match=hint):
            train(Args(**SHORT, **options))


@pytest.mark.parametrize("arguments", [["--gamma", "2"], ["--env", "CartPol-v1"], ["--num-minibatches", "7"]])
def test_command_line_refuses_in_one_line(arguments):
    command = [sys.executable, ROOT / "ppo_clip.py", *arguments]
    run = subprocess.run(command, capture_output=True, text=True)
    assert run.returncode != 0 and run.stdout == ""
    assert run.stderr.startswith(f"ppo_clip.py: {arguments[0]}: expected ") and run.stderr.count("\n") == 1
    assert arguments[1] in run.stderr and not list(Path.cwd().iterdir())


@pytest.mark.parametrize("arguments", [["--gamma", "high"], ["--no-such-flag"], ["--vectorization-mode", "x"]])
def test_command_line_that_cannot_be_parsed(arguments):
    run = subprocess.run([sys.executable, ROOT / "ppo_clip.py", *arguments], capture_output=True, text=True)
    assert run.returncode == 1 and run.stdout == ""
    assert arguments[0] in run.stderr and run.stderr.startswith("ppo_clip.py: ") and run.stderr.count("\n") == 1
    assert not list(Path.cwd().iterdir())
