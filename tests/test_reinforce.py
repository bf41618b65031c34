"""reinforce.py: the estimator against an enumeration, and which steps it is made of."""

import itertools

import gymnasium
import numpy as np
import pytest
import torch
from gymnasium.spaces import Box, Discrete

from reinforce import Agent, Args, Batch, make_envs, make_optimizer, rollouts, train, update


@pytest.fixture(autouse=True)
def in_empty_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def start(args):
    """Environments, an agent, and the agent's rollouts in them."""
    torch.manual_seed(args.seed)
    envs = make_envs(args.env, args.num_envs)
    agent = Agent(envs.single_observation_space, envs.single_action_space, args.norm_obs)
    return envs, agent, rollouts(envs, agent, args, iteration=0)


class Recorder:
    """Takes an optimizer's place: keeps the gradient of the loss, and moves nothing."""

    def __init__(self, agent):
        self.agent = agent

    def zero_grad(self):
        self.agent.zero_grad()

    def step(self):
        self.gradient = torch.cat([x.grad.flatten() for x in self.agent.parameters()])


# A decision process of two steps: the second state is the first action; what each action pays
# depends on the state.
STATES = torch.tensor([[0.0, 1.0], [1.0, 0.0], [1.0, 1.0]], dtype=torch.float64)
FIRST_REWARDS, SECOND_REWARDS = [5.0, 3.0], [[1.0, -2.0], [0.0, 4.0]]
TRAJECTORIES = list(itertools.product((0, 1), (0, 1)))


@pytest.fixture
def agent():
    torch.manual_seed(1)
    agent = Agent(Box(0, 1, (2,)), Discrete(2), norm_obs=False).double()
    torch.nn.init.normal_(agent.actor[-1].weight)
    return agent


def exact_gradient(agent):
    """∇J(θ) of J(θ) = Σ_τ p_θ(τ) R(τ), which autograd finds without a score function; γ = 1."""
    first, *second = (agent.actor(state).softmax(-1) for state in STATES)
    expected_return = 0.0
    for a, b in TRAJECTORIES:
        total_return = FIRST_REWARDS[a] + SECOND_REWARDS[a][b]
        expected_return = expected_return + first[a] * second[a][b] * total_return
    grads = torch.autograd.grad(expected_return, list(agent.parameters()))
    return torch.cat([grad.flatten() for grad in grads])


def estimates(agent, shift=0.0, **options):
    """The probability of each trajectory and the gradient that update makes of it alone."""
    args = Args(num_envs=1, norm_returns=False, **options)
    result = []
    for a, b in TRAJECTORIES:
        obs, actions = torch.stack([STATES[0], STATES[1 + a]]), torch.tensor([a, b])
        rewards = torch.tensor([FIRST_REWARDS[a], SECOND_REWARDS[a][b]], dtype=torch.float64)
        with torch.no_grad():
            log_probs = agent.policy(obs).log_prob(actions)
        to_go = torch.stack([rewards.sum(), rewards[1]])
        batch = Batch(obs, actions, log_probs, to_go + shift, rewards.sum().expand(2) + shift)
        recorder = Recorder(agent)
        update(agent, recorder, batch, args)
        result.append((log_probs.sum().exp(), -recorder.gradient))
    assert sum(probability for probability, _ in result).item() == pytest.approx(1)
    return result


def mean_and_variance(weighted):
    mean = sum(probability * gradient for probability, gradient in weighted)
    squares = sum(p * (gradient - mean).square().sum() for p, gradient in weighted)
    return mean, squares.item()


def test_expected_estimate_is_the_policy_gradient_with_either_weight(agent):
    """Reward-to-go has less variance."""
    mean_to_go, variance_to_go = mean_and_variance(estimates(agent, reward_to_go=True))
    mean_total, variance_total = mean_and_variance(estimates(agent, reward_to_go=False))
    torch.testing.assert_close(mean_to_go, exact_gradient(agent))
    torch.testing.assert_close(mean_total, exact_gradient(agent))
    assert variance_to_go < 0.8 * variance_total


@pytest.mark.parametrize("reward_to_go", [True, False])
def test_baseline_leaves_the_expectation_alone_and_changes_the_variance(agent, reward_to_go):
    mean, variance = mean_and_variance(estimates(agent, reward_to_go=reward_to_go))
    shifted = estimates(agent, shift=-2.0, reward_to_go=reward_to_go)
    shifted_mean, shifted_variance = mean_and_variance(shifted)
    torch.testing.assert_close(shifted_mean, mean)
    assert shifted_variance < 0.8 * variance


def test_batch_gradient_is_the_mean_over_episodes_of_sums_over_steps():
    """Not a mean over steps: an episode of 500 steps must not be weighed as one of 10 is."""
    args = Args(env="toys:Drift-v0", num_envs=4, norm_returns=False)
    _, agent, episodes = start(args)
    batch, recorder = next(episodes), Recorder(agent)
    update(agent, recorder, batch, args)
    together = recorder.gradient
    # One environment's steps at a time: Drift's environment n has episodes of 3 + n steps; rows
    # come in order of time.
    environment = torch.tensor([n for t in range(6) for n in range(4) if t < 3 + n])
    parts = []
    for n in range(4):
        episode = Batch(*(x[environment == n] for x in batch))
        update(agent, recorder, episode, Args(num_envs=1, norm_returns=False))
        parts.append(recorder.gradient)
    torch.testing.assert_close(together, sum(parts) / 4)


@pytest.mark.parametrize("reward_to_go", [True, False])
def test_weights_are_standardised_over_all_steps(reward_to_go, agent):
    obs, actions = STATES, torch.tensor([0, 1, 1])
    log_probs = agent.policy(obs).log_prob(actions).detach()
    weights = torch.tensor([3.0, 1.0, -4.0], dtype=torch.float64)
    fields = (weights, 0 * weights) if reward_to_go else (0 * weights, weights)
    by_hand = weights / weights.square().mean().sqrt()  # their mean is 0
    gradients = []
    for options, (to_go, total) in (
        ({"reward_to_go": reward_to_go}, (fields[0] + 7, fields[1] + 7)),
        ({"norm_returns": False}, (by_hand, by_hand)),
    ):
        recorder = Recorder(agent)
        update(agent, recorder, Batch(obs, actions, log_probs, to_go, total), Args(**options))
        gradients.append(recorder.gradient)
    torch.testing.assert_close(gradients[0], gradients[1])


def test_rows_log_the_loss_and_the_entropy_before_and_the_kl_after_the_step(agent):
    obs, actions = STATES, torch.tensor([0, 1, 1])
    log_probs = agent.policy(obs).log_prob(actions).detach()
    weights = torch.tensor([3.0, 1.0, -4.0], dtype=torch.float64)
    probabilities = agent.actor(obs).softmax(-1).detach()
    args = Args(num_envs=2, norm_returns=False, learning_rate=0.01)
    batch = Batch(obs, actions, log_probs, weights, 0 * weights)
    metrics = update(agent, make_optimizer(agent, args), batch, args)
    assert metrics["policy_loss"] == pytest.approx(-(log_probs @ weights).item() / 2)
    entropy = -(probabilities * probabilities.log()).sum(-1).mean().item()
    assert metrics["entropy"] == pytest.approx(entropy)
    log_ratio = agent.policy(obs).log_prob(actions) - log_probs
    k3 = (log_ratio.exp() - 1 - log_ratio).mean().item()
    assert metrics["approx_kl"] == pytest.approx(k3) and k3 > 1e-6


def test_every_environment_gives_one_whole_episode_and_nothing_behind_it():
    """Drift pays its state and starts from a random one: R̂_t follows from the observations alone.

    The first environment ends another episode while it waits for the last one, which no queue sees.
    """
    args = Args(env="toys:Drift-v0", num_envs=5, gamma=0.9, norm_obs=False)
    envs, _, episodes = start(args)
    for iteration in range(1, 4):
        batch = next(episodes)
        assert len(batch.obs) == 3 + 4 + 5 + 6 + 7
        assert envs.episode_count == 5 * iteration == len(envs.return_queue)
        assert list(envs.length_queue) == [3, 4, 5, 6, 7] * iteration
        time = (10 * batch.obs[:, 1]).round().long()
        environment = torch.tensor([n for t in range(7) for n in range(5) if t < 3 + n])
        for n in range(5):
            rows = environment == n
            assert time[rows].tolist() == list(range(3 + n))
            rewards = batch.obs[rows, 0] + 0.2 * batch.actions[rows] - 0.1
            to_go = [sum(0.9**k * r for k, r in enumerate(rewards[t:])) for t in range(3 + n)]
            torch.testing.assert_close(batch.rewards_to_go[rows], torch.stack(to_go))
            torch.testing.assert_close(batch.total_returns[rows], to_go[0].expand(3 + n))
            undiscounted = pytest.approx(rewards.sum().item(), rel=1e-5, abs=1e-6)
            assert list(envs.return_queue)[n - 5] == undiscounted


def test_stored_log_probs_are_those_of_the_collecting_policy():
    _, agent, episodes = start(Args(env="Pendulum-v1", num_envs=3))
    batch = next(episodes)
    assert len(batch.obs) == 600
    log_probs = agent.policy(batch.obs).log_prob(batch.actions)
    torch.testing.assert_close(log_probs.detach(), batch.log_probs)


def test_short_episodes_are_not_preferred():
    """CartPole's first policy has the same lengths in fifty environments at once as in one."""
    lengths = {}
    for num_envs in (1, 50):
        envs, _, episodes = start(Args(num_envs=num_envs))
        lengths[num_envs] = []
        while len(lengths[num_envs]) < 1000:
            next(episodes)
            lengths[num_envs] += list(envs.length_queue)[-num_envs:]
    means = [np.mean(x) for x in lengths.values()]
    standard_error = np.sqrt(sum(np.var(x) / len(x) for x in lengths.values()))
    assert abs(means[0] - means[1]) < 4 * standard_error < 5


def test_environment_without_an_end_is_cut():
    options = {"num_envs": 3, "max_episode_steps": 7, "gamma": 0.5, "total_timesteps": 100}
    args = Args(env="toys:OneStateEndless-v0", quiet=True, **options)
    envs, _, episodes = start(args)
    for iteration in range(1, 3):
        batch = next(episodes)
        assert len(batch.obs) == 21 and list(envs.length_queue) == [7] * 3 * iteration
        torch.testing.assert_close(batch.rewards_to_go[-3:], torch.ones(3))
        torch.testing.assert_close(batch.rewards_to_go[:3], torch.full((3,), 2 - 0.5**6))
    assert train(args)[-1]["global_step"] == 105


def test_normalised_rewards_restart_with_each_episode():
    args = Args(env="toys:OneStateTerminated-v0", num_envs=2, gamma=0.5, norm_reward=True)
    envs, agent, episodes = start(args)
    for _ in range(3):
        batch = next(episodes)
    sums = [1, 1.5, 1.75, 1.875]  # S_t of an episode of 4 rewards of 1
    mean, std = agent.reward_statistics.mean_and_std()
    assert mean.item() == pytest.approx(np.mean(sums), rel=1e-4)
    assert std.item() == pytest.approx(np.std(sums), rel=1e-4)
    to_go = torch.tensor([1.875, 1.75, 1.5, 1.0]).repeat_interleave(2) / std
    torch.testing.assert_close(batch.rewards_to_go, to_go)
    assert list(envs.return_queue) == [4.0] * 6  # raw


class LastPays(gymnasium.vector.VectorWrapper):
    def step(self, actions):
        obs, _, terminations, *others = self.env.step(actions)
        return obs, terminations * [1.0, -1.0], terminations, *others


def test_normalised_rewards_are_at_most_10():
    """The deviation of rare rewards is small, so that they would be larger."""
    args = Args(env="toys:OneStateTerminated-v0", num_envs=2, gamma=0.5, norm_reward=True)
    envs, _, episodes = start(args)
    for env in envs.unwrapped.envs:
        env.unwrapped.terminate_after = 400
    envs.env = LastPays(envs.env)
    assert next(episodes).rewards_to_go[-2:].tolist() == [10.0, -10.0]


def test_optimizer_follows_the_gradient_of_all_parameters():
    args = Args(env="Pendulum-v1", num_envs=2)
    _, agent, episodes = start(args)
    before = {name: parameter.detach().clone() for name, parameter in agent.named_parameters()}
    update(agent, make_optimizer(agent, args), next(episodes), args)
    for name, parameter in agent.named_parameters():
        assert not torch.equal(parameter, before[name]), name
    assert "log_std" in before
