"""ppo_clip.py: rollouts and acting, which vpg, trpo and ppo_kl share, and PPO-Clip's update."""

import copy
import dataclasses
import importlib
import math
from types import SimpleNamespace

import gymnasium
import numpy as np
import pytest
import torch
import toys
from hypothesis import given
from hypothesis import strategies as st

import ppo_clip
from ppo_clip import Agent, Args, make_envs, make_optimizer, measure, rollouts, update, with_rows

NAMES = ("reinforce", "vpg", "trpo", "ppo_clip", "ppo_kl")
SCRIPTS = {name: importlib.import_module(name) for name in NAMES}
each_script = pytest.mark.parametrize("script", SCRIPTS.values(), ids=SCRIPTS)
each_critic = pytest.mark.parametrize("script", [SCRIPTS[x] for x in NAMES[1:]], ids=NAMES[1:])
each_space = pytest.mark.parametrize("space", [toys.Discrete(4), toys.Box(-1, 1, (2,))], ids=str)


def start(args, script=ppo_clip):
    """What train makes before its loop."""
    torch.set_num_threads(1)
    torch.manual_seed(args.seed)
    envs = make_envs(args.env, args.num_envs, args.vectorization_mode)
    agent = script.Agent(envs, args.norm_obs)
    return envs, agent, script.rollouts(envs, agent, args, iteration=0)


# -------------------------------------------- rollouts --------------------------------------------


@pytest.mark.parametrize("env", ["CartPole-v1", "Pendulum-v1"])
@pytest.mark.parametrize("norm_obs", [False, True])
def test_stored_log_probs_and_values_are_those_of_the_collecting_policy(env, norm_obs):
    args = Args(env=env, num_envs=3, num_steps=300, norm_obs=norm_obs, norm_adv=False)
    _, agent, batches = start(args)
    first_obs = next(batches).obs  # standardised by a mean of 0 and a deviation of 1
    torch.nn.init.normal_(agent.policy.mlp[-1].weight)
    count, mean, std = agent.obs_moments.clone()
    batch = next(batches)
    with torch.no_grad():
        torch.testing.assert_close(agent.policy(batch.obs).log_prob(batch.actions), batch.log_probs)
        torch.testing.assert_close(batch.returns, batch.advantages + agent.value(batch.obs))
    assert {x.shape[:1] for x in batch} == {batch.log_probs.shape} == {batch.returns.shape}
    if norm_obs:  # what standardises a rollout is what was seen before it
        torch.testing.assert_close(mean, first_obs.double().mean(dim=0))
        torch.testing.assert_close(std, first_obs.double().std(dim=0, correction=0))
        assert count.tolist() == [len(first_obs)] * len(count)
        assert agent.obs_moments[0, 0] == len(first_obs) + len(batch.obs)
    else:
        assert agent.obs_moments.tolist() == [[0.0] * len(count)] * 2 + [[1.0] * len(count)]
    if env == "Pendulum-v1":
        cosine, sine, _ = (batch.obs * std + mean).T
        ones = torch.ones(len(batch.obs), dtype=torch.float64)
        torch.testing.assert_close(cosine**2 + sine**2, ones, rtol=1e-4, atol=1e-4)


@each_critic
@pytest.mark.parametrize("env", ["CartPole-v1", "Pendulum-v1"])
def test_advantages_are_standardised_over_each_rollout_and_returns_are_of_raw_ones(script, env):
    """To a mean of 0 and a population deviation of 1, that of the rollout alone."""
    found = {}
    for norm_adv in (False, True):
        args = script.Args(env=env, num_envs=3, num_steps=50, norm_adv=norm_adv)
        _, agent, batches = start(args, script)
        torch.nn.init.constant_(agent.critic[-1].bias, 3.0)  # else the mean is near 0
        found[norm_adv] = [next(batches) for _ in range(3)]
    for raw, batch in zip(found[False], found[True]):
        assert abs(raw.advantages.mean()) > 0.1
        advantages = raw.advantages.double().numpy()
        expected = (advantages - np.mean(advantages)) / np.std(advantages)
        np.testing.assert_allclose(batch.advantages, expected, rtol=1e-4, atol=1e-5)
        assert abs(batch.advantages.double().mean().item()) < 1e-6
        assert batch.advantages.double().std(correction=0).item() == pytest.approx(1, abs=1e-6)
        assert {x.dtype for x in (batch.advantages, batch.returns)} == {torch.float32}
        for name in ("obs", "actions", "log_probs", "returns"):
            assert torch.equal(getattr(batch, name), getattr(raw, name)), name
        with torch.no_grad():
            torch.testing.assert_close(raw.returns, raw.advantages + agent.value(raw.obs))


@each_critic
def test_equal_advantages_are_standardised_to_0(script):
    """OneState pays 1 a step; with γ = 0 and this critic every advantage is 1 − 0.3."""
    options = {"num_envs": 2, "num_steps": 30, "gamma": 0.0, "norm_reward": False}
    args = script.Args(env="toys:OneStateTruncated-v0", norm_adv=True, **options)
    _, agent, batches = start(args, script)
    torch.nn.init.zeros_(agent.critic[-1].weight)
    torch.nn.init.constant_(agent.critic[-1].bias, 0.3)
    assert next(batches).advantages.abs().max() < 1e-6


@each_critic
def test_advantages_are_those_of_the_definition(script):
    """Drift's episodes end by termination in environments 0 and 2, by truncation in 1 and 3."""
    options = {"num_envs": 4, "num_steps": 20, "gamma": 0.9, "norm_reward": False}
    args = script.Args(env="toys:Drift-v0", norm_adv=False, **options)
    _, agent, batches = start(args, script)
    batch, expected, next_row = next(batches), {}, 0
    index = {}  # of each real step among the batch's rows, which go through time first
    for t in range(args.num_steps):
        for n in range(args.num_envs):
            if t % (4 + n) < 3 + n:
                index[t, n], next_row = next_row, next_row + 1
    assert len(batch.obs) == next_row
    for t, n in reversed(index):
        i = index[t, n]
        state, age = batch.obs[i]
        reward = state + 0.2 * batch.actions[i] - 0.1
        next_obs = torch.stack([reward, age + 0.1])  # the reward is the next state
        with torch.no_grad():
            value, next_value = agent.value(torch.stack([batch.obs[i], next_obs]))
        is_last = t % (4 + n) == 2 + n
        if is_last and n % 2 == 0:
            next_value = 0.0
        following = 0.0 if is_last else expected.get((t + 1, n), 0.0)
        delta = reward + 0.9 * next_value - value
        expected[t, n] = delta + 0.9 * args.gae_lambda * following
        torch.testing.assert_close(batch.advantages[i], expected[t, n], rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(batch.returns[i], expected[t, n] + value, rtol=1e-4, atol=1e-4)


def test_batch_holds_each_real_step_once_and_episodes_are_whole():
    """Drift's environment n has episodes of 3 + n steps, then a row that only resets."""
    options = {"num_envs": 4, "num_steps": 7, "num_minibatches": 4, "norm_obs": False}
    envs, _, batches = start(Args(env="toys:Drift-v0", **options))
    age = torch.cat([next(batches).obs[:, 1] for _ in range(30)])
    assert len(age) == toys.Drift.steps
    assert len(envs.return_queue) == sum(30 * 7 // (4 + n) for n in range(4))
    assert set(envs.length_queue) == {3, 4, 5, 6}
    # A real step begins at an age of 0 to 2 + n: the last observation, of age 3 + n, begins none.
    assert age.max() == pytest.approx(0.5)


def test_episodic_return_is_the_raw_one():
    envs, _, batches = start(Args(norm_reward=True, norm_obs=True, num_envs=5, num_steps=50))
    batch = [next(batches) for _ in range(5)][-1]
    assert len(envs.return_queue) > 20 and batch.returns.max() < 20
    assert list(envs.return_queue) == list(envs.length_queue)  # CartPole pays 1 a step


class Payer(gymnasium.vector.VectorEnv):
    """Pays random rewards in episodes of random lengths, and notes them."""

    metadata = {"autoreset_mode": gymnasium.vector.AutoresetMode.NEXT_STEP}
    single_observation_space = gymnasium.spaces.Box(0, 1, (1,))
    single_action_space = gymnasium.spaces.Discrete(2)

    def __init__(self, num_envs):
        self.num_envs = num_envs
        self.observation_space = gymnasium.spaces.Box(0, 1, (num_envs, 1))
        self.action_space = gymnasium.spaces.MultiDiscrete([2] * num_envs)
        self.random, self.paid, self.done = np.random.default_rng(0), [], np.zeros(num_envs, bool)

    def reset(self, *, seed=None, options=None):
        return np.zeros((self.num_envs, 1), np.float32), {}

    def step(self, actions):
        resets, self.done = self.done, self.random.random(self.num_envs) < 0.1
        self.done &= ~resets
        rewards = self.random.standard_normal(self.num_envs) * ~resets
        self.paid.append((rewards, resets))
        no = np.zeros(self.num_envs, bool)
        return np.zeros((self.num_envs, 1), np.float32), rewards, self.done, no, {}


def test_normalised_rewards_are_divided_by_the_deviation_of_each_episodes_discounted_sum():
    """With λ = 0 and a critic of 0, advantages are the rewards."""
    options = {"norm_reward": True, "norm_adv": False, "gae_lambda": 0.0, "gamma": 0.9}
    args = Args(num_envs=3, num_steps=25, **options)
    envs = gymnasium.wrappers.vector.RecordEpisodeStatistics(Payer(3))
    agent = Agent(envs, norm_obs=False)
    torch.nn.init.zeros_(agent.critic[-1].weight)
    batches, sums, so_far = rollouts(envs, agent, args, iteration=0), [], np.zeros(3)
    for _ in range(3):
        batch = next(batches)
        paid, envs.unwrapped.paid = envs.unwrapped.paid, []
        for rewards, resets in paid:
            so_far = np.where(resets, 0.0, 0.9 * so_far + rewards)
            sums.extend(so_far[~resets])
        expected = np.concatenate([rewards[~resets] for rewards, resets in paid]) / np.std(sums)
        np.testing.assert_allclose(batch.advantages, expected, rtol=1e-5)
    moments = [[len(sums)], [np.mean(sums)], [np.std(sums)]]
    np.testing.assert_allclose(agent.reward_moments, moments, rtol=1e-9)
    assert len(sums) < 3 * 75


class RarePayer(Payer):
    """Pays 1 and −½ in the first 300 steps, half as much in the next, and nothing else."""

    def step(self, actions):
        obs, _, *others = super().step(actions)
        is_paid = np.arange(self.num_envs) == len(self.paid) % 300 - 150
        return obs, is_paid * [1.0, -0.5] / (1 + len(self.paid) // 300), *others


def test_normalised_rewards_are_at_most_10_and_stay_apart():
    """The deviation of rare rewards is small, so that they would be larger."""
    options = {"norm_reward": True, "norm_adv": False, "gae_lambda": 0.0, "gamma": 0.5}
    args = Args(num_steps=300, num_envs=2, **options)
    envs = gymnasium.wrappers.vector.RecordEpisodeStatistics(RarePayer(2))
    agent = Agent(envs, norm_obs=False)
    torch.nn.init.zeros_(agent.critic[-1].weight)
    batches = rollouts(envs, agent, args, iteration=0)
    for expected in ([-5.0, 10.0], [-2.5, 5.0]):
        advantages = next(batches).advantages
        assert sorted(advantages[advantages != 0].tolist()) == expected
    assert agent.state_dict()["largest_reward"].tolist() == [1.0]


NO_ROWS = torch.tensor([[0.0] * 3, [0.0] * 3, [1.0] * 3], dtype=torch.float64)


@given(st.lists(st.integers(1, 20), min_size=1, max_size=5), st.floats(-10, 10), st.floats(0.1, 10))
def test_running_statistics_are_those_of_all_rows_together(sizes, shift, scale):
    rows = np.random.default_rng(len(sizes)).standard_normal((sum(sizes), 3)) * scale + shift
    moments = NO_ROWS
    for part in np.split(rows, np.cumsum(sizes)[:-1]):
        moments = with_rows(moments, part)
    assert moments.dtype == torch.float64
    for count, mean, std in (moments.numpy(), with_rows(NO_ROWS, rows).numpy()):
        assert count.tolist() == [len(rows)] * 3
        np.testing.assert_allclose(mean, rows.mean(axis=0), rtol=1e-9, atol=1e-9)
        # A part of one row has a variance of 0, in whose place is 1e-8.
        np.testing.assert_allclose(std**2, rows.var(axis=0), rtol=1e-9, atol=1.001e-8)
    assert torch.equal(NO_ROWS, torch.tensor([[0.0] * 3, [0.0] * 3, [1.0] * 3]).double())


@each_script
@pytest.mark.parametrize("offset", [0.0, 1e9, -1e9])
@pytest.mark.parametrize("sizes", [[1000], [1, 999], [400, 1, 599], [100] * 10])
def test_running_statistics_withstand_a_large_offset(script, offset, sizes):
    """Squares of 1e9 would swallow a deviation of 1: float64 has 16 digits."""
    signs = np.random.default_rng(0).choice([-1.0, 1.0], (1000, 3))
    rows, moments = offset + signs, NO_ROWS
    for part in np.split(rows, np.cumsum(sizes)[:-1]):
        moments = script.with_rows(moments, part)
    count, mean, std = moments.numpy()
    assert count.tolist() == [1000] * 3
    np.testing.assert_allclose(mean - offset, signs.mean(axis=0), atol=1e-6)
    np.testing.assert_allclose(std, signs.std(axis=0), rtol=1e-6)
    np.testing.assert_allclose(moments, script.with_rows(NO_ROWS, rows), rtol=1e-6)


def test_running_statistics_of_constants_have_a_deviation_to_divide_by():
    count, mean, std = with_rows(NO_ROWS, np.full((7, 3), 0.1))
    assert count.tolist() == [7] * 3 and mean.tolist() == pytest.approx([0.1] * 3)
    assert std.tolist() == pytest.approx([1e-4] * 3)


def test_actions_are_clipped_to_their_bounds_but_not_their_log_probs():
    class Recorder(gymnasium.vector.VectorWrapper):
        def step(self, actions):
            taken.append(actions)
            return super().step(actions)

    taken: list[np.ndarray] = []
    envs, agent, batches = start(Args(env="Pendulum-v1", num_envs=2, num_steps=100))
    envs.env.env = Recorder(envs.env.env)  # under TransformAction
    torch.nn.init.constant_(agent.policy.log_std, 2.0)
    batch = next(batches)
    assert np.abs(taken).max() == 2.0 and (np.abs(taken) == 2.0).mean() > 0.5
    assert batch.actions.abs().max() > 10
    expected = (2 * np.concatenate([batch.actions])).clip(-2, 2)  # to the policy 1 is the bound
    np.testing.assert_allclose(np.concatenate(taken), expected, rtol=1e-6)
    normal = torch.distributions.Normal(agent.policy.mlp(batch.obs), math.e**2)
    expected = normal.log_prob(batch.actions).sum(1).detach()
    torch.testing.assert_close(batch.log_probs, expected, rtol=1e-4, atol=1e-4)


def test_environment_that_writes_into_its_action_does_not_change_the_batch():
    _, agent, batches = start(Args(env="toys:OverwritesAction-v0", num_envs=2, num_steps=20))
    batch = next(batches)
    assert batch.actions.std() > 0.5 and batch.actions.abs().min() > 0
    expected = agent.policy(batch.obs).log_prob(batch.actions).detach()
    torch.testing.assert_close(batch.log_probs, expected)


# --------------------------------------------- acting ---------------------------------------------


def agent_for(space, norm_obs=False, script=ppo_clip):
    """An agent for observations of 5 numbers."""
    spaces = {"single_observation_space": toys.Box(-1, 1, (5,)), "single_action_space": space}
    return script.Agent(SimpleNamespace(**spaces), norm_obs)


def random_agent(space, norm_obs=False, script=ppo_clip):
    """An agent whose outputs differ from state to state, and some observations."""
    torch.manual_seed(0)
    agent = agent_for(space, norm_obs, script)
    torch.nn.init.normal_(agent.policy.mlp[-1].weight, std=0.2)
    if not agent.policy.discrete:
        torch.nn.init.normal_(agent.policy.log_std, std=0.3)
    if norm_obs:
        agent.obs_moments = with_rows(agent.obs_moments, 3 * np.random.randn(50, 5) + 1)
    return agent, 4 * np.random.default_rng(0).standard_normal((6, 5))


def assert_draws_are_of(policy, draws):
    """20,000 draws for each observation have the frequencies or the moments of the policy."""
    draws = torch.as_tensor(draws).reshape(-1, 20_000, *policy.event_shape)
    if isinstance(policy, torch.distributions.Categorical):
        frequencies = torch.stack([(draws == k).double().mean(dim=1) for k in range(4)], dim=1)
        error = (policy.probs * (1 - policy.probs) / 20_000).sqrt()
        assert ((frequencies - policy.probs).abs() < 5 * error).all()
        assert policy.probs.std(dim=0).min() > 0.05
    else:
        error = policy.stddev / math.sqrt(20_000)
        assert ((draws.mean(dim=1) - policy.mean).abs() < 5 * error).all()
        assert ((draws.std(dim=1) / policy.stddev - 1).abs() < 0.03).all()
        assert policy.mean.std(dim=0).min() > 0.1
        assert all(abs(torch.corrcoef(x.T)[0, 1]) < 0.05 for x in draws)


@each_space
@pytest.mark.parametrize("norm_obs", [False, True])
def test_acting_in_numpy_draws_from_the_policy(space, norm_obs):
    agent, obs = random_agent(space, norm_obs)
    obs[-1, 0] = 100.0  # over 30 deviations from the mean
    standard_obs = agent.standardizer()(obs)
    expected = obs
    if norm_obs:
        _, mean, std = agent.obs_moments.numpy()
        expected = ((obs - mean) / std).clip(-10, 10)
        assert expected.max() == 10
    np.testing.assert_allclose(standard_obs, expected, rtol=1e-6, atol=1e-6)
    sample = agent.policy.sampler(np.random.default_rng(0))
    with torch.no_grad():
        policy = agent.policy(torch.as_tensor(standard_obs))
    draws = sample(standard_obs.repeat(20_000, axis=0))[0]
    assert standard_obs.dtype == np.float32 and draws.dtype == policy.sample().numpy().dtype
    assert_draws_are_of(policy, draws)


@each_script
@each_space
def test_sampler_takes_another_hidden_layer(script, space, monkeypatch):
    """What it says that it drew from is forward's, too: logits, or means and deviations."""
    mlp = script.mlp
    monkeypatch.setattr(
        script, "mlp", lambda first, *others, head_gain: mlp(first, 9, *others, head_gain=head_gain)
    )
    agent, obs = random_agent(space, script=script)
    assert sum(isinstance(x, torch.nn.Linear) for x in agent.policy.mlp) == 4
    obs = torch.as_tensor(obs, dtype=torch.float32)
    agent.policy.check_sampler(obs)
    with torch.no_grad():
        policy = agent.policy(obs)
    rows = obs.repeat_interleave(20_000, dim=0).numpy()
    draws, *twin = agent.policy.sampler(np.random.default_rng(0))(rows)
    assert_draws_are_of(policy, draws)
    twin = [torch.as_tensor(x) for x in twin]
    if agent.policy.discrete:
        probs = twin[0][::20_000].softmax(-1)
        torch.testing.assert_close(probs, policy.probs, rtol=1e-4, atol=1e-5)
    else:
        torch.testing.assert_close(twin[0][::20_000], policy.mean, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(twin[1].expand(6, 2), policy.stddev)


def with_relu(script):
    def mlp(*sizes, head_gain, original=script.mlp):
        layers = original(*sizes, head_gain=head_gain)
        return torch.nn.Sequential(
            *(torch.nn.ReLU() if isinstance(x, torch.nn.Tanh) else x for x in layers)
        )

    return "mlp", mlp


def with_std_doubled(script):
    class Policy(script.Policy):
        def forward(self, obs):
            policy = super().forward(obs)
            if self.discrete:
                return policy
            normal = torch.distributions.Normal(policy.mean, 2 * policy.stddev)
            return torch.distributions.Independent(normal, 1)

    return "Policy", Policy


def with_logits_scaled(script):
    class Policy(script.Policy):
        def forward(self, obs):
            return torch.distributions.Categorical(logits=2 * self.mlp(obs))

    return "Policy", Policy


@each_script
@pytest.mark.parametrize(
    "change, space",
    [
        (with_relu, toys.Discrete(4)),
        (with_relu, toys.Discrete(2)),
        (with_relu, toys.Box(-1, 1, (2,))),
        (with_std_doubled, toys.Box(-1, 1, (2,))),
        (with_logits_scaled, toys.Discrete(4)),
        (with_logits_scaled, toys.Discrete(2)),
    ],
)
def test_sampler_that_draws_from_another_policy_is_refused(script, change, space, monkeypatch):
    """An agent with such a policy cannot be made, and the message names both methods."""
    monkeypatch.setattr(script, *change(script))
    for seed in range(5):
        torch.manual_seed(seed)
        with pytest.raises(RuntimeError, match=r"Policy\.sampler .* Policy\.forward"):
            agent_for(space, script=script)


@each_script
@each_space
def test_sampler_may_return_actions_alone(script, space, monkeypatch):
    """Then nothing is checked: an agent may sample from any policy by PyTorch."""

    def sampler(self, rng):
        return lambda obs: (self(torch.as_tensor(obs)).sample().numpy(),)

    monkeypatch.setattr(script.Policy, "sampler", sampler)
    monkeypatch.setattr(script, *with_relu(script))
    agent, obs = random_agent(space, script=script)
    obs = torch.as_tensor(obs, dtype=torch.float32)
    agent.policy.check_sampler(obs)
    with torch.no_grad():
        policy = agent.policy(obs)
        rows = obs.repeat_interleave(20_000, dim=0).numpy()
        (draws,) = agent.policy.sampler(np.random.default_rng(0))(rows)
    assert_draws_are_of(policy, draws)


def test_rollouts_act_with_a_sampler_that_returns_actions_alone(monkeypatch):
    def sampler(self, rng):
        return lambda obs: (self(torch.as_tensor(obs)).sample().numpy(),)

    monkeypatch.setattr(ppo_clip.Policy, "sampler", sampler)
    for env in ("CartPole-v1", "Pendulum-v1"):
        _, agent, batches = start(Args(env=env, num_envs=2, num_steps=20))
        batch = next(batches)
        expected = agent.policy(batch.obs).log_prob(batch.actions).detach()
        torch.testing.assert_close(batch.log_probs, expected)


def test_box_actions_have_one_deviation_in_all_states_and_their_log_probs_are_sums():
    agent, obs = random_agent(toys.Box(-1, 1, (2, 3)))
    obs = torch.as_tensor(obs, dtype=torch.float32)
    policy, mlp, std = agent.policy(obs), agent.policy.mlp, agent.policy.log_std.exp()
    assert policy.batch_shape == (6,) and policy.event_shape == (6,)
    assert torch.equal(policy.stddev, std.expand(6, 6))
    actions = policy.sample()
    each = torch.distributions.Normal(mlp(obs), std).log_prob(actions)
    torch.testing.assert_close(policy.log_prob(actions), each.sum(dim=1))


# --------------------------------------------- update ---------------------------------------------


def test_each_epoch_deals_every_step_once_in_another_order(monkeypatch):
    options = {"num_minibatches": 4, "update_epochs": 3, "target_kl": None}
    args = Args(num_envs=4, num_steps=32, **options)
    _, agent, batches = start(args)
    batch = ppo_clip.Batch(*(x[:101] for x in next(batches)))  # 4 minibatches cannot be equal
    seen, forward = [], agent.policy.forward
    monkeypatch.setattr(agent.policy, "forward", lambda obs: (seen.append(obs), forward(obs))[1])
    update(agent, make_optimizer(agent, args), batch, args)
    assert torch.equal(seen.pop(), batch.obs)  # the shares of clipped samples
    sizes = [len(obs) for obs in seen]
    assert len(sizes) == 12 and max(sizes) - min(sizes) == 1
    epochs = [torch.cat(seen[i : i + 4]) for i in (0, 4, 8)]
    assert not torch.equal(epochs[0], epochs[1]) and not torch.equal(epochs[0], batch.obs)
    for epoch in epochs:
        assert sorted(epoch.tolist()) == sorted(batch.obs.tolist())


@pytest.mark.parametrize("env", ["CartPole-v1", "Pendulum-v1", "toys:TargetMixed-v0"])
@pytest.mark.parametrize("norm_adv", [False, True])
def test_one_step_is_adam_on_the_loss_of_the_paper(env, norm_adv):
    """An epoch of one minibatch is eq. 9 of Schulman et al. 2017, sample by sample.

    Â is the batch's, as it is, whatever norm_adv says: that is for rollouts. The entropy of an
    action of k numbers is divided by k.
    """
    options = {"update_epochs": 1, "num_minibatches": 1, "ent_coef": 0.02, "vf_coef": 0.7}
    options |= {"max_grad_norm": 0.3, "norm_adv": norm_adv, "num_envs": 3, "num_steps": 40}
    args = Args(env=env, **options)
    _, agent, batches = start(args)
    torch.nn.init.normal_(agent.policy.mlp[-1].weight)  # else the entropy has no gradient
    batch = next(batches)
    k = batch.actions[0].numel()
    assert k == (4 if env.startswith("toys") else 1)
    noise = 0.5 * torch.randn_like(batch.log_probs)  # ratios on both sides of the band
    advantages = 2 * batch.advantages + 0.3
    batch = batch._replace(log_probs=batch.log_probs + noise, advantages=advantages)
    twin = copy.deepcopy(agent)

    optimizer = torch.optim.Adam(twin.parameters(), lr=args.learning_rate, eps=1e-5)
    loss = 0.0
    for i in range(len(batch.obs)):
        policy = twin.policy(batch.obs[i])
        ratio = math.e ** (policy.log_prob(batch.actions[i]) - batch.log_probs[i])
        clipped = torch.clip(ratio, 1 - args.clip_coef, 1 + args.clip_coef)
        surrogate = min(ratio * advantages[i], clipped * advantages[i])
        squared_error = (twin.value(batch.obs[i]) - batch.returns[i]) ** 2
        bonus = args.ent_coef * policy.entropy() / k
        loss = loss - surrogate + args.vf_coef * squared_error / 2 - bonus
    (loss / len(batch.obs)).backward()
    assert torch.nn.utils.clip_grad_norm_(twin.parameters(), args.max_grad_norm) > 0.3
    optimizer.step()

    update(agent, make_optimizer(agent, args), batch, args)
    for (name, parameter), expected in zip(agent.named_parameters(), twin.parameters()):
        torch.testing.assert_close(parameter.grad, expected.grad, rtol=1e-3, atol=1e-5, msg=name)
        torch.testing.assert_close(parameter, expected, rtol=1e-3, atol=1e-4, msg=name)


def test_target_kl_ends_the_epochs():
    options = {"num_envs": 4, "num_steps": 32, "num_minibatches": 4, "update_epochs": 10}
    args = Args(learning_rate=0.01, **options)
    steps = {}
    for target_kl in (None, 1e-9):
        _, agent, batches = start(args)
        optimizer = make_optimizer(agent, args)
        options = dataclasses.replace(args, target_kl=target_kl)
        batch = next(batches)
        update(agent, optimizer, batch, options)
        steps[target_kl] = int(next(iter(optimizer.state.values()))["step"])
        assert measure(agent, batch)["approx_kl"] > 1e-9
    assert steps == {None: 40, 1e-9: 4}


@pytest.mark.parametrize("name", ["ppo_clip", "ppo_kl"])
@pytest.mark.parametrize("env", ["CartPole-v1", "Pendulum-v1"])
def test_minibatch_of_one_row_has_a_policy_gradient(name, env):
    """With norm_adv, too: standardised by itself, its advantage would be 0."""
    script = SCRIPTS[name]
    options = {"num_minibatches": 16, "update_epochs": 1, "ent_coef": 0.0, "norm_adv": True}
    args = script.Args(env=env, num_envs=4, num_steps=8, **options)
    _, agent, batches = start(args, script)
    batch = script.Batch(*(x[:16] for x in next(batches)))
    weight, gradients = agent.policy.mlp[-1].bias, []
    optimizer = SimpleNamespace(zero_grad=agent.zero_grad, param_groups=[{}])
    optimizer.step = lambda: gradients.append(weight.grad.clone())
    script.update(agent, optimizer, batch, args)
    assert len(gradients) == 16 and min(x.norm() for x in gradients) > 1e-6


def assert_metrics_are_by_hand(script, agent, batch):
    """measure's five numbers, in double precision from single precision's outputs."""
    with torch.no_grad():
        policy, values = agent.policy(batch.obs), agent.value(batch.obs).double().numpy()
        log_ratios = (policy.log_prob(batch.actions) - batch.log_probs).double().numpy()
        if agent.policy.discrete:
            probs = agent.policy.mlp(batch.obs).double().softmax(-1).numpy()
            entropy = -(probs * np.log(probs)).sum(axis=1).mean()
        else:
            stds = agent.policy.log_std.double().exp().numpy()
            entropy = np.log(stds * math.sqrt(2 * math.pi * math.e)).sum()
    returns, advantages = batch.returns.double().numpy(), batch.advantages.double().numpy()
    expected = {
        "surrogate": np.mean((np.exp(log_ratios) - 1) * advantages),
        "entropy": entropy,
        "approx_kl": np.mean(np.exp(log_ratios) - 1 - log_ratios),
        "value_loss": np.mean((values - returns) ** 2) / 2,
        "explained_variance": 1 - np.var(returns - values) / np.var(returns),
    }
    metrics = script.measure(agent, batch)
    assert list(metrics) == list(expected)
    assert metrics == pytest.approx(expected, rel=1e-4, abs=1e-6)
    return metrics


@each_critic
@pytest.mark.parametrize("env", ["CartPole-v1", "Pendulum-v1"])
def test_metrics_are_of_the_agent_after_the_update_over_the_whole_rollout(script, env):
    options = {"num_envs": 4, "num_steps": 32, "num_minibatches": 4}
    args = script.Args(env=env, **options)
    _, agent, batches = start(args, script)
    batch = next(batches)
    before = assert_metrics_are_by_hand(script, agent, batch)
    script.update(agent, script.make_optimizer(agent, args), batch, args)
    after = assert_metrics_are_by_hand(script, agent, batch)
    assert after["approx_kl"] > 1e-6 > before["approx_kl"]
    assert after["surrogate"] > 1e-4 and before["surrogate"] == pytest.approx(0, abs=1e-6)
    assert after["value_loss"] < before["value_loss"]


@each_critic
def test_metrics_of_equal_returns_are_finite(script):
    """Their variance is 0, of which nothing is explained; 1e-8 is in its place."""
    agent, obs = random_agent(toys.Discrete(4), script=script)
    obs, ones = torch.as_tensor(obs, dtype=torch.float32), torch.ones(6)
    batch = script.Batch(obs, torch.arange(6) % 4, -ones, ones, ones)
    variance = agent.value(obs).var(correction=0).item()
    metrics = script.measure(agent, batch)
    assert metrics["explained_variance"] == pytest.approx(1 - variance * 1e8, rel=1e-3)


@each_script
def test_approx_kl_is_accurate_for_tiny_log_ratios(script):
    """Of 1e-6 it is 5e-13, of which exp(x) − 1 − x in single precision knows nothing."""
    agent, _ = random_agent(toys.Box(-1, 1, (2,)), script=script)
    obs = torch.randn(2000, 5, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        policy = agent.policy(obs)
        actions = policy.mean + 1.2 * policy.stddev
        log_probs = policy.log_prob(actions)
        old = log_probs + 1e-6 * torch.randn(2000, generator=torch.Generator().manual_seed(1))
    log_ratios = (log_probs - old).double()
    assert 0.5e-6 < log_ratios.std() < 2e-6 and log_ratios.abs().max() < 1e-5
    expected = (log_ratios.square() / 2 + log_ratios**3 / 6).mean().item()
    rest = torch.zeros(2000), torch.zeros(2000)
    batch = script.Batch(obs, actions, old, *rest[: len(script.Batch._fields) - 3])
    assert script.measure(agent, batch)["approx_kl"] == pytest.approx(expected, 0.02, 0)
    single = log_ratios.float()
    assert (single.exp() - 1 - single).mean().item() != pytest.approx(expected, 0.5, 0)


def test_metrics_of_an_unchanged_policy():
    args = Args(num_envs=4, num_steps=32, learning_rate=0.0, norm_adv=False)
    _, agent, batches = start(args)
    batch = next(batches)
    values = agent.value(batch.obs).detach()
    assert update(agent, make_optimizer(agent, args), batch, args) == {
        "clipfrac": 0.0,
        "frac_kill": 0.0,
    }
    metrics = assert_metrics_are_by_hand(ppo_clip, agent, batch)
    errors = values - batch.returns
    assert metrics["surrogate"] == pytest.approx(0, abs=1e-6)
    assert metrics["value_loss"] == pytest.approx(0.5 * errors.square().mean().item(), rel=1e-5)
    assert metrics["approx_kl"] == pytest.approx(0, abs=1e-9)
