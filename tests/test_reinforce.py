"""reinforce.py: the estimator against an enumeration, and which steps it is made of."""

import itertools

import numpy as np
import pytest
import torch
import toys

import reinforce
from reinforce import Agent, Args, Batch, Episodes, make_envs, make_optimizers, rollout, train, update


@pytest.fixture(autouse=True)
def in_empty_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def start(args):
    torch.manual_seed(args.seed)
    envs = make_envs(args)
    return (
        envs,
        Agent(envs.single_observation_space, envs.single_action_space, args.norm_obs),
        Episodes(envs, args.seed),
    )


class Recorder:
    """Takes the place of an optimizer and keeps the gradient of the loss in place of following it."""

    def __init__(self, agent):
        self.parameters = list(agent.parameters())

    def minimize(self, loss, num_samples):
        self.gradient = torch.cat([grad.flatten() for grad in torch.autograd.grad(loss, self.parameters)])


# A decision process of two steps: the second state is the first action; what each action pays depends on the state.
STATES = torch.tensor([[0.0, 1.0], [1.0, 0.0], [1.0, 1.0]], dtype=torch.float64)
FIRST_REWARDS, SECOND_REWARDS = [5.0, 3.0], [[1.0, -2.0], [0.0, 4.0]]
TRAJECTORIES = list(itertools.product((0, 1), (0, 1)))


@pytest.fixture
def agent():
    torch.manual_seed(1)
    agent = Agent(toys.Box(0, 1, (2,)), toys.Discrete(2), norm_obs=False).double()
    torch.nn.init.normal_(agent.actor[-1].weight)
    return agent


def exact_gradient(agent):
    """∇J(θ) of J(θ) = Σ_τ p_θ(τ) R(τ), which autograd differentiates without a score function; γ = 1."""
    first, *second = (agent.policy(state).logits.exp() for state in STATES)
    expected_return = sum(first[a] * second[a][b] * (FIRST_REWARDS[a] + SECOND_REWARDS[a][b]) for a, b in TRAJECTORIES)
    return torch.cat([grad.flatten() for grad in torch.autograd.grad(expected_return, list(agent.parameters()))])


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
        update(agent, {"policy": recorder}, batch, args)
        result.append((log_probs.sum().exp(), -recorder.gradient))
    assert sum(probability for probability, _ in result).item() == pytest.approx(1)
    return result


def mean_and_variance(weighted):
    mean = sum(probability * gradient for probability, gradient in weighted)
    return mean, sum(probability * (gradient - mean).square().sum() for probability, gradient in weighted).item()


def test_expected_estimate_is_the_policy_gradient_with_either_weight_and_reward_to_go_has_less_variance(agent):
    mean_to_go, variance_to_go = mean_and_variance(estimates(agent, reward_to_go=True))
    mean_total, variance_total = mean_and_variance(estimates(agent, reward_to_go=False))
    torch.testing.assert_close(mean_to_go, exact_gradient(agent))
    torch.testing.assert_close(mean_total, exact_gradient(agent))
    assert variance_to_go < 0.8 * variance_total


@pytest.mark.parametrize("reward_to_go", [True, False])
def test_baseline_leaves_the_expectation_alone_and_changes_the_variance(agent, reward_to_go):
    mean, variance = mean_and_variance(estimates(agent, reward_to_go=reward_to_go))
    shifted_mean, shifted_variance = mean_and_variance(estimates(agent, shift=-2.0, reward_to_go=reward_to_go))
    torch.testing.assert_close(shifted_mean, mean)
    assert shifted_variance < 0.8 * variance


def test_batch_gradient_is_the_mean_over_episodes_of_sums_over_steps():
    """Not a mean over steps: an episode of 500 steps must not be weighed as one of 10 is."""
    args = Args(env="toys:Drift-v0", num_envs=4, norm_returns=False)
    envs, agent, episodes = start(args)
    batch, recorder = rollout(envs, agent, episodes, args), Recorder(agent)
    update(agent, {"policy": recorder}, batch, args)
    together = recorder.gradient
    # One environment's steps at a time: Drift's environment n has episodes of 3 + n steps; rows come in order of time.
    lengths = [3, 4, 5, 6]
    environment = torch.tensor([n for t in range(6) for n in range(4) if t < lengths[n]])
    parts = []
    for n in range(4):
        update(
            agent,
            {"policy": recorder},
            Batch(*(x[environment == n] for x in batch)),
            Args(num_envs=1, norm_returns=False),
        )
        parts.append(recorder.gradient)
    torch.testing.assert_close(together, sum(parts) / 4)


@pytest.mark.parametrize("reward_to_go", [True, False])
def test_weights_are_standardised_over_all_steps(reward_to_go, agent):
    obs, actions = STATES, torch.tensor([0, 1, 1])
    log_probs = agent.policy(obs).log_prob(actions).detach()
    weights = torch.tensor([3.0, 1.0, -4.0], dtype=torch.float64)
    fields = (weights, 0 * weights) if reward_to_go else (0 * weights, weights)
    recorder, plain = Recorder(agent), Recorder(agent)
    update(agent, {"policy": recorder}, Batch(obs, actions, log_probs, *fields), Args(reward_to_go=reward_to_go))
    by_hand = weights / weights.square().mean().sqrt()  # their mean is 0
    update(agent, {"policy": plain}, Batch(obs, actions, log_probs, by_hand, by_hand), Args(norm_returns=False))
    torch.testing.assert_close(recorder.gradient, plain.gradient)


def test_every_environment_gives_one_whole_episode_and_nothing_behind_it():
    """Drift pays its state and starts from a random one: R̂_t follows from the observations alone."""
    args = Args(env="toys:Drift-v0", num_envs=5, gamma=0.9)
    envs, agent, episodes = start(args)
    for iteration in range(1, 4):
        batch = rollout(envs, agent, episodes, args)
        assert len(batch.obs) == 3 + 4 + 5 + 6 + 7 and episodes.count == 5 * iteration
        assert list(episodes.recent_lengths)[-5:] == [3, 4, 5, 6, 7]
        assert not episodes.running_return.any() and not episodes.running_length.any()
        time = (10 * batch.obs[:, 1]).round().long()
        environment = torch.cat([torch.arange(max(0, t - 2), 5) for t in range(7)])
        for n in range(5):
            rows = environment == n
            assert time[rows].tolist() == list(range(3 + n))
            rewards = batch.obs[rows, 0] + 0.2 * batch.actions[rows] - 0.1
            to_go = [sum(0.9**k * r for k, r in enumerate(rewards[t:])) for t in range(3 + n)]
            torch.testing.assert_close(batch.rewards_to_go[rows], torch.stack(to_go))
            torch.testing.assert_close(batch.total_returns[rows], to_go[0].expand(3 + n))
            assert list(episodes.recent_returns)[n - 5] == pytest.approx(rewards.sum().item(), rel=1e-5)


def test_stored_log_probs_are_those_of_the_collecting_policy():
    args = Args(env="Pendulum-v1", num_envs=3)
    envs, agent, episodes = start(args)
    batch = rollout(envs, agent, episodes, args)
    torch.testing.assert_close(agent.policy(batch.obs).log_prob(batch.actions), batch.log_probs)


def test_short_episodes_are_not_preferred():
    """CartPole's first policy: fifty environments side by side give the lengths that one gives, one after another."""
    lengths = {}
    for num_envs in (1, 50):
        args = Args(num_envs=num_envs)
        envs, agent, episodes = start(args)
        lengths[num_envs] = []
        while len(lengths[num_envs]) < 1000:
            lengths[num_envs].append(len(rollout(envs, agent, episodes, args).obs))
            if num_envs == 50:
                lengths[50] = lengths[50][:-1] + list(episodes.recent_lengths)[-50:]
    means = [np.mean(x) for x in lengths.values()]
    standard_error = np.sqrt(sum(np.var(x) / len(x) for x in lengths.values()))
    assert abs(means[0] - means[1]) < 4 * standard_error < 3


def test_environment_without_an_end_is_cut():
    args = Args(
        env="toys:OneStateEndless-v0", num_envs=3, max_episode_steps=7, gamma=0.5, total_timesteps=100, quiet=True
    )
    envs, agent, episodes = start(args)
    for _ in range(2):
        batch = rollout(envs, agent, episodes, args)
        assert len(batch.obs) == 21 and set(episodes.recent_lengths) == {7}
        torch.testing.assert_close(batch.rewards_to_go[-3:], torch.ones(3))
        torch.testing.assert_close(batch.rewards_to_go[:3], torch.full((3,), 2 - 0.5**6))
    assert train(args)[-1]["global_step"] == 105


def test_normalised_rewards_restart_with_each_episode():
    args = Args(env="toys:OneStateTerminated-v0", num_envs=2, gamma=0.5, norm_reward=True)
    envs, agent, episodes = start(args)
    for _ in range(3):
        rollout(envs, agent, episodes, args)
    sums = [1, 1.5, 1.75, 1.875]  # S_t of an episode of 4 rewards of 1
    assert agent.reward_statistics.mean.item() == pytest.approx(np.mean(sums))
    assert agent.reward_statistics.var.item() == pytest.approx(np.var(sums))
    assert list(episodes.recent_returns) == [4.0] * 6


def test_optimizer_follows_the_gradient_of_all_parameters():
    args = Args(env="Pendulum-v1", num_envs=2)
    envs, agent, episodes = start(args)
    before = {name: parameter.detach().clone() for name, parameter in agent.named_parameters()}
    update(agent, make_optimizers(agent, args), rollout(envs, agent, episodes, args), args)
    for name, parameter in agent.named_parameters():
        assert not torch.equal(parameter, before[name]), name
    assert reinforce.Args().reward_to_go
