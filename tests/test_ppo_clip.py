"""ppo_clip.py: rollouts and acting, which vpg, trpo and ppo_kl share, and PPO-Clip's update."""

import dataclasses
import math

import gymnasium
import numpy as np
import pytest
import torch
import toys
from hypothesis import given
from hypothesis import strategies as st
from test_trust import SCRIPTS

import ppo_clip
from ppo_clip import Agent, Args, RunningStatistics, make_envs, make_optimizer, rollouts, update


def start(args, script=ppo_clip):
    """What train makes before its loop."""
    torch.set_num_threads(1)
    torch.manual_seed(args.seed)
    envs = make_envs(args.env, args.num_envs, args.vectorization_mode)
    spaces = envs.single_observation_space, envs.single_action_space
    agent = script.Agent(*spaces, args.norm_obs)
    return envs, agent, script.rollouts(envs, agent, args, iteration=0)


# -------------------------------------------- rollouts --------------------------------------------


@pytest.mark.parametrize("env", ["CartPole-v1", "Pendulum-v1"])
@pytest.mark.parametrize("norm_obs", [False, True])
def test_stored_log_probs_and_values_are_those_of_the_collecting_policy(env, norm_obs):
    args = Args(env=env, num_envs=3, num_steps=300, norm_obs=norm_obs)
    _, agent, batches = start(args)
    first_obs = next(batches).obs  # standardised by a mean of 0 and a deviation of 1
    torch.nn.init.normal_(agent.actor[-1].weight)
    mean, std = agent.obs_statistics.mean_and_std()
    batch = next(batches)
    with torch.no_grad():
        torch.testing.assert_close(agent.policy(batch.obs).log_prob(batch.actions), batch.log_probs)
        torch.testing.assert_close(agent.value(batch.obs), batch.values)
    torch.testing.assert_close(batch.returns, batch.advantages + batch.values)
    assert {x.shape[:1] for x in batch} == {batch.log_probs.shape} == {batch.returns.shape}
    if norm_obs:  # what standardises a rollout is what was seen before it
        torch.testing.assert_close(mean, first_obs.mean(dim=0), rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(std, first_obs.std(dim=0), rtol=1e-2, atol=1e-4)
        assert agent.obs_statistics.sums[0, 0] == pytest.approx(len(first_obs) + len(batch.obs))
    if norm_obs and env == "Pendulum-v1":
        cosine, sine, _ = (batch.obs * std + mean).T
        ones = torch.ones(len(batch.obs))
        torch.testing.assert_close(cosine**2 + sine**2, ones, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", ["vpg", "trpo", "ppo_clip", "ppo_kl"])
def test_advantages_are_those_of_the_definition(name):
    """Drift's episodes end by termination in environments 0 and 2, by truncation in 1 and 3."""
    options = {"num_envs": 4, "num_steps": 20, "gamma": 0.9, "norm_reward": False}
    args = SCRIPTS[name].Args(env="toys:Drift-v0", **options)
    _, agent, batches = start(args, SCRIPTS[name])
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
        with torch.no_grad():
            next_value = agent.value(torch.stack([reward, age + 0.1]))
        is_last = t % (4 + n) == 2 + n
        if is_last and n % 2 == 0:
            next_value = 0.0
        following = 0.0 if is_last else expected.get((t + 1, n), 0.0)
        delta = reward + 0.9 * next_value - batch.values[i]
        expected[t, n] = delta + 0.9 * args.gae_lambda * following
        torch.testing.assert_close(batch.advantages[i], expected[t, n], rtol=1e-4, atol=1e-4)


def test_batch_holds_each_real_step_once_and_episodes_are_whole():
    """Drift's environment n has episodes of 3 + n steps, then a row that only resets."""
    options = {"num_envs": 4, "num_steps": 7, "num_minibatches": 4, "norm_obs": False}
    envs, _, batches = start(Args(env="toys:Drift-v0", **options))
    age = torch.cat([next(batches).obs[:, 1] for _ in range(30)])
    assert len(age) == toys.Drift.steps
    assert envs.episode_count == sum(30 * 7 // (4 + n) for n in range(4))
    assert set(envs.length_queue) == {3, 4, 5, 6}
    # A real step begins at an age of 0 to 2 + n: the last observation, of age 3 + n, begins none.
    assert age.max() == pytest.approx(0.5)


def test_episodic_return_is_the_raw_one():
    envs, _, batches = start(Args(norm_reward=True, norm_obs=True, num_envs=5, num_steps=50))
    batch = [next(batches) for _ in range(5)][-1]
    assert envs.episode_count > 20 and batch.returns.max() < 20
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
    args = Args(num_envs=3, num_steps=25, norm_reward=True, gae_lambda=0.0, gamma=0.9)
    envs = gymnasium.wrappers.vector.RecordEpisodeStatistics(Payer(3))
    agent = Agent(Payer.single_observation_space, Payer.single_action_space, norm_obs=False)
    torch.nn.init.zeros_(agent.critic[-1].weight)
    batches, sums, so_far = rollouts(envs, agent, args, iteration=0), [], np.zeros(3)
    for _ in range(3):
        batch = next(batches)
        paid, envs.unwrapped.paid = envs.unwrapped.paid, []
        for rewards, resets in paid:
            so_far = np.where(resets, 0.0, 0.9 * so_far + rewards)
            sums.extend(so_far[~resets])
        expected = np.concatenate([rewards[~resets] for rewards, resets in paid]) / np.std(sums)
        np.testing.assert_allclose(batch.advantages, expected, rtol=1e-4)
    assert len(sums) < 3 * 75 and agent.reward_statistics.sums[0, 0] == pytest.approx(len(sums))


class RarePayer(Payer):
    """Pays 1, with either sign, once in 300 steps, and nothing else."""

    def step(self, actions):
        obs, _, *others = super().step(actions)
        is_paid = np.arange(self.num_envs) == len(self.paid) - 150
        return obs, is_paid * [1.0, -1.0], *others


def test_normalised_rewards_are_at_most_10():
    """The deviation of rare rewards is small, so that they would be larger."""
    args = Args(num_steps=300, num_envs=2, norm_reward=True, gae_lambda=0.0, gamma=0.5)
    envs = gymnasium.wrappers.vector.RecordEpisodeStatistics(RarePayer(2))
    agent = Agent(Payer.single_observation_space, Payer.single_action_space, norm_obs=False)
    torch.nn.init.zeros_(agent.critic[-1].weight)
    advantages = next(rollouts(envs, agent, args, iteration=0)).advantages
    assert sorted(advantages[advantages != 0].tolist()) == [-10.0, 10.0]


@given(st.lists(st.integers(1, 20), min_size=1, max_size=5), st.floats(-10, 10), st.floats(0.1, 10))
def test_running_statistics_are_those_of_all_rows_together(sizes, shift, scale):
    generator = torch.Generator().manual_seed(len(sizes))
    rows = torch.randn(sum(sizes), 3, generator=generator) * scale + shift
    statistics = RunningStatistics(3)
    assert torch.equal(torch.stack(statistics.mean_and_std()), torch.tensor([[0.0] * 3, [1.0] * 3]))
    for part in rows.split(sizes):
        statistics.update(part)
    mean, std = statistics.mean_and_std()
    n, prior = len(rows), 1e-4  # as many rows of mean 0 and deviation 1
    expected = rows.double().sum(dim=0) / (n + prior)
    square = (rows.double().square().sum(dim=0) + prior) / (n + prior) - expected.square()
    torch.testing.assert_close(mean, expected.float(), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(std, square.clamp(min=1e-8).sqrt().float(), rtol=1e-3, atol=1e-4)


def test_actions_are_clipped_to_their_bounds_but_not_their_log_probs():
    class Recorder(gymnasium.vector.VectorWrapper):
        def step(self, actions):
            taken.append(actions)
            return super().step(actions)

    taken: list[np.ndarray] = []
    envs, agent, batches = start(Args(env="Pendulum-v1", num_envs=2, num_steps=100))
    envs.env.env = Recorder(envs.env.env)  # under ClipAction
    torch.nn.init.constant_(agent.log_std, 2.0)
    batch = next(batches)
    assert np.abs(taken).max() == 2.0 and (np.abs(taken) == 2.0).mean() > 0.5
    assert batch.actions.abs().max() > 10
    normal = torch.distributions.Normal(agent.actor(batch.obs), math.e**2)
    expected = normal.log_prob(batch.actions).sum(1).detach()
    torch.testing.assert_close(batch.log_probs, expected, rtol=1e-4, atol=1e-4)


def test_environment_that_writes_into_its_action_does_not_change_the_batch():
    _, agent, batches = start(Args(env="toys:OverwritesAction-v0", num_envs=2, num_steps=20))
    batch = next(batches)
    assert batch.actions.std() > 0.5 and batch.actions.abs().min() > 0
    expected = agent.policy(batch.obs).log_prob(batch.actions).detach()
    torch.testing.assert_close(batch.log_probs, expected)


# --------------------------------------------- acting ---------------------------------------------


def random_agent(action_space, norm_obs=False):
    """An agent whose outputs differ from state to state, and some observations."""
    torch.manual_seed(0)
    agent = Agent(gymnasium.spaces.Box(-1, 1, (5,)), action_space, norm_obs)
    torch.nn.init.normal_(agent.actor[-1].weight, std=0.2)
    if not agent.discrete:
        torch.nn.init.normal_(agent.log_std, std=0.3)
    agent.obs_statistics.update(3 * torch.randn(50, 5) + 1)
    return agent, 4 * torch.randn(6, 5)


@pytest.mark.parametrize("action_space", [toys.Discrete(4), toys.Box(-1, 1, (2,))], ids=str)
@pytest.mark.parametrize("norm_obs", [False, True])
def test_acting_in_numpy_draws_from_the_policy(action_space, norm_obs):
    """20,000 draws for each observation, whose frequencies or moments are the policy's."""
    agent, obs = random_agent(action_space, norm_obs)
    obs[-1, 0] = 100.0  # over 30 deviations from the mean
    act = ppo_clip.actor_in_numpy(agent, np.random.default_rng(0))
    assert act(obs.numpy()).dtype == agent.policy(obs).sample().numpy().dtype
    draws = torch.as_tensor(act(obs.repeat_interleave(20_000, dim=0).numpy()))
    draws = draws.reshape(len(obs), 20_000, *action_space.shape)
    with torch.no_grad():
        policy = agent.policy(agent.standardize(obs))
    if agent.discrete:
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


def test_acting_in_numpy_refuses_a_layer_that_it_does_not_know():
    agent, _ = random_agent(gymnasium.spaces.Discrete(4))
    agent.actor[1] = torch.nn.ReLU()
    with pytest.raises(AssertionError):
        ppo_clip.actor_in_numpy(agent, np.random.default_rng(0))


def test_box_actions_have_one_deviation_in_all_states_and_their_log_probs_are_sums():
    agent, obs = random_agent(gymnasium.spaces.Box(-1, 1, (2, 3)))
    policy = agent.policy(obs)
    assert policy.batch_shape == (6,) and policy.event_shape == (6,)
    assert torch.equal(policy.stddev, agent.log_std.exp().expand(6, 6))
    actions = policy.sample()
    each = torch.distributions.Normal(agent.actor(obs), agent.log_std.exp()).log_prob(actions)
    torch.testing.assert_close(policy.log_prob(actions), each.sum(dim=1))


# --------------------------------------------- update ---------------------------------------------


def test_each_epoch_deals_every_step_once_in_another_order(monkeypatch):
    args = Args(num_envs=4, num_steps=32, num_minibatches=4, update_epochs=3)
    _, agent, batches = start(args)
    batch = ppo_clip.Batch(*(x[:101] for x in next(batches)))  # 4 minibatches cannot be equal
    seen, policy = [], agent.policy
    monkeypatch.setattr(agent, "policy", lambda obs: (seen.append(obs), policy(obs))[1])
    update(agent, make_optimizer(agent, args), batch, args)
    sizes = [len(obs) for obs in seen]
    assert len(sizes) == 12 and max(sizes) - min(sizes) == 1
    epochs = [torch.cat(seen[i : i + 4]) for i in (0, 4, 8)]
    assert not torch.equal(epochs[0], epochs[1]) and not torch.equal(epochs[0], batch.obs)
    for epoch in epochs:
        assert sorted(epoch.tolist()) == sorted(batch.obs.tolist())


@pytest.mark.parametrize("env", ["CartPole-v1", "Pendulum-v1"])
@pytest.mark.parametrize("norm_adv", [False, True])
def test_one_step_is_adam_on_the_loss_of_the_paper(env, norm_adv):
    """An epoch of one minibatch is eq. 9 of Schulman et al. 2017, sample by sample."""
    options = {"update_epochs": 1, "num_minibatches": 1, "ent_coef": 0.02, "vf_coef": 0.7}
    options |= {"max_grad_norm": 0.3, "norm_adv": norm_adv, "num_envs": 3, "num_steps": 40}
    args = Args(env=env, **options)
    envs, agent, batches = start(args)
    torch.nn.init.normal_(agent.actor[-1].weight)  # else the entropy has no gradient
    batch = next(batches)
    noise = 0.5 * torch.randn_like(batch.log_probs)  # ratios on both sides of the band
    batch = batch._replace(log_probs=batch.log_probs + noise)
    twin = Agent(envs.single_observation_space, envs.single_action_space, norm_obs=False)
    twin.load_state_dict(agent.state_dict())
    advantages = batch.advantages
    if norm_adv:
        advantages = (advantages - advantages.mean()) / advantages.std(correction=0)

    optimizer = torch.optim.Adam(twin.parameters(), lr=args.learning_rate, eps=1e-5)
    loss = 0.0
    for i in range(len(batch.obs)):
        policy = twin.policy(batch.obs[i])
        ratio = math.e ** (policy.log_prob(batch.actions[i]) - batch.log_probs[i])
        clipped = torch.clip(ratio, 1 - args.clip_coef, 1 + args.clip_coef)
        surrogate = min(ratio * advantages[i], clipped * advantages[i])
        squared_error = (twin.value(batch.obs[i]) - batch.returns[i]) ** 2
        loss = (
            loss - surrogate + args.vf_coef * squared_error / 2 - args.ent_coef * policy.entropy()
        )
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
        metrics = update(agent, optimizer, next(batches), options)
        steps[target_kl] = int(next(iter(optimizer.state.values()))["step"])
        assert metrics["approx_kl"] > 1e-9
    assert steps == {None: 40, 1e-9: 4}


def test_metrics_of_an_unchanged_policy():
    args = Args(num_envs=4, num_steps=32, learning_rate=0.0, norm_adv=False)
    _, agent, batches = start(args)
    batch = next(batches)
    metrics = update(agent, make_optimizer(agent, args), batch, args)
    errors = batch.values - batch.returns
    assert metrics["policy_loss"] == pytest.approx(-batch.advantages.mean().item(), rel=1e-3)
    assert metrics["value_loss"] == pytest.approx(0.5 * errors.square().mean().item(), rel=1e-3)
    unexplained = errors.var().item() / batch.returns.var().item()
    assert metrics["explained_variance"] == pytest.approx(1 - unexplained, abs=1e-5)
    probs = agent.policy(batch.obs).probs.double()
    entropy = -(probs * probs.log()).sum(1).mean().item()
    assert metrics["entropy"] == pytest.approx(entropy, rel=1e-4)
    assert metrics["approx_kl"] == pytest.approx(0, abs=1e-6)
    assert metrics["clipfrac"] == 0 and metrics["frac_in"] == 1
