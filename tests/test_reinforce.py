"""reinforce.py: the estimator against an enumeration, and which steps it is made of."""

import itertools
from types import SimpleNamespace

import gymnasium
import numpy as np
import pytest
import torch
from gymnasium.spaces import Box, Discrete

import gae_fast
from reinforce import (
    Agent,
    Args,
    Batch,
    make_envs,
    make_optimizer,
    measure,
    rollouts,
    train,
    update,
)


@pytest.fixture(autouse=True)
def in_empty_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def start(args):
    """Environments, an agent, and the agent's rollouts in them."""
    torch.manual_seed(args.seed)
    envs = make_envs(args.env, args.num_envs)
    agent = Agent(envs, args.norm_obs)
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
    spaces = {"single_observation_space": Box(0, 1, (2,)), "single_action_space": Discrete(2)}
    agent = Agent(SimpleNamespace(**spaces), norm_obs=False).double()
    torch.nn.init.normal_(agent.policy.mlp[-1].weight)
    return agent


def exact_gradient(agent):
    """∇J(θ) of J(θ) = Σ_τ p_θ(τ) R(τ), which autograd finds without a score function; γ = 1."""
    first, *second = (agent.policy.mlp(state).softmax(-1) for state in STATES)
    expected_return = 0.0
    for a, b in TRAJECTORIES:
        total_return = FIRST_REWARDS[a] + SECOND_REWARDS[a][b]
        expected_return = expected_return + first[a] * second[a][b] * total_return
    grads = torch.autograd.grad(expected_return, list(agent.parameters()))
    return torch.cat([grad.flatten() for grad in grads])


def estimates(agent, reward_to_go, shift=0.0):
    """The probability of each trajectory and the gradient that update makes of it alone."""
    result = []
    for a, b in TRAJECTORIES:
        obs, actions = torch.stack([STATES[0], STATES[1 + a]]), torch.tensor([a, b])
        rewards = torch.tensor([FIRST_REWARDS[a], SECOND_REWARDS[a][b]], dtype=torch.float64)
        with torch.no_grad():
            log_probs = agent.policy(obs).log_prob(actions)
        to_go, total = torch.stack([rewards.sum(), rewards[1]]), rewards.sum().expand(2)
        batch = Batch(obs, actions, log_probs, (to_go if reward_to_go else total) + shift)
        recorder = Recorder(agent)
        update(agent, recorder, batch, Args(num_envs=1, norm_returns=False))
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


def test_mean_of_two_episodes_at_each_time_as_baseline_halves_the_expected_estimate(agent):
    """Each return is a half of its own baseline; the other half is of another episode, and so
    leaves the expectation alone. The first action 1 ends an episode here.

    That rollouts makes its weights so is the test of returns less their mean at each time.
    """
    episodes = [((0, 0), (5.0, 1.0)), ((0, 1), (5.0, -2.0)), ((1,), (3.0,))]
    first, second = (agent.policy.mlp(state).softmax(-1) for state in STATES[:2])
    expected_return = 3.0 * first[1] + first[0] * (5.0 + second[0] - 2.0 * second[1])
    exact = torch.autograd.grad(expected_return, list(agent.parameters()))
    sum_of_probabilities, estimate, recorder = 0.0, 0.0, Recorder(agent)
    for pair in itertools.product(episodes, repeat=2):
        rewards = np.zeros((2, 2))
        for n, (_, paid) in enumerate(pair):
            rewards[: len(paid), n] = paid
        returns = gae_fast.rewards_to_go(rewards, np.zeros((2, 2), bool), 1.0)
        steps = [(t, n) for t in (0, 1) for n in (0, 1) if t < len(pair[n][0])]
        obs = torch.stack([STATES[t] for t, _ in steps])
        actions = torch.tensor([pair[n][0][t] for t, n in steps])
        weights = torch.tensor([returns[t, n] - returns[t].mean() for t, n in steps])
        with torch.no_grad():
            log_probs = agent.policy(obs).log_prob(actions)
        update(agent, recorder, Batch(obs, actions, log_probs, weights), Args(num_envs=2))
        probability = log_probs.sum().exp()
        sum_of_probabilities += probability.item()
        estimate = estimate - probability * recorder.gradient
    assert sum_of_probabilities == pytest.approx(1)
    torch.testing.assert_close(2 * estimate, torch.cat([x.flatten() for x in exact]))


def test_batch_gradient_is_the_mean_over_episodes_of_sums_over_steps():
    """Not a mean over steps: an episode of 500 steps must not be weighed as one of 10 is."""
    args = Args(env="toys:Drift-v0", num_envs=4)
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


@pytest.mark.parametrize("norm_returns", [True, False])
def test_update_takes_the_weights_as_they_are(norm_returns, agent):
    """−Σ log π(a_t | s_t) w_t / N, whatever norm_returns says: that is for rollouts."""
    obs, actions = STATES, torch.tensor([0, 1, 1])
    weights = torch.tensor([3.0, 1.0, -4.5], dtype=torch.float64)
    log_probs = agent.policy(obs).log_prob(actions)
    loss = -(log_probs @ weights) / 2
    grads = torch.autograd.grad(loss, list(agent.parameters()))
    recorder, args = Recorder(agent), Args(num_envs=2, norm_returns=norm_returns)
    assert update(agent, recorder, Batch(obs, actions, log_probs.detach(), weights), args) == {}
    torch.testing.assert_close(recorder.gradient, torch.cat([x.flatten() for x in grads]))


@pytest.mark.parametrize("reward_to_go", [True, False])
@pytest.mark.parametrize("env", ["CartPole-v1", "toys:Drift-v0"])
def test_weights_are_returns_less_their_mean_at_each_time_of_mean_square_1(env, reward_to_go):
    """The mean square is that of a rollout's steps. An episode that is over still counts in the
    mean: with a reward-to-go of 0, or with its whole return."""
    found = {}
    for norm_returns in (False, True):
        options = {"norm_returns": norm_returns, "reward_to_go": reward_to_go}
        envs, _, episodes = start(Args(env=env, num_envs=5, **options))
        found[norm_returns] = [next(episodes) for _ in range(3)]
    lengths = np.reshape(envs.length_queue, (3, 5))
    for raw, batch, ends in zip(found[False], found[True], lengths):
        is_step = np.arange(ends.max())[:, None] < ends
        returns = np.zeros(is_step.shape)
        returns[is_step] = raw.weights
        baseline = returns.mean(axis=1, keepdims=True) if reward_to_go else returns[0].mean()
        expected = (returns - baseline)[is_step]
        expected /= np.sqrt(np.mean(expected**2))
        np.testing.assert_allclose(batch.weights, expected, rtol=1e-4, atol=1e-5)
        assert batch.weights.double().square().mean().item() == pytest.approx(1, abs=1e-6)
        assert batch.weights.dtype == torch.float32
        for name in ("obs", "actions", "log_probs"):
            assert torch.equal(getattr(batch, name), getattr(raw, name)), name


@pytest.mark.parametrize("env", ["CartPole-v1", "toys:OneStateEndless-v0"])
@pytest.mark.parametrize("steps", [5, 8])
@pytest.mark.parametrize("reward_to_go", [True, False])
def test_equal_episodes_have_weights_of_0(env, steps, reward_to_go):
    """Late steps have a smaller reward-to-go, for which nobody is to blame. Before the eighth step
    no pole falls. CartPole pays in single precision."""
    args = Args(env=env, num_envs=3, reward_to_go=reward_to_go, max_episode_steps=steps)
    _, _, episodes = start(args)
    weights = next(episodes).weights
    assert len(weights) == 3 * steps and weights.abs().max() < 1e-6


def test_weights_of_nearly_equal_returns_have_a_mean_square_of_1(monkeypatch):
    """Of 50 (1 − 0.98^T) for long T, in single precision only three digits would differ."""
    args = Args(env="CartPole-v1", num_envs=16, reward_to_go=False)
    envs, agent, episodes = start(args)
    lengths, played = np.arange(16) + 480, 0

    def step(actions):
        nonlocal played
        played += 1
        rewards, no = np.ones(16, np.float32), np.zeros(16, bool)
        return np.zeros((16, 4), np.float32), rewards, played >= lengths, no, {}

    monkeypatch.setattr(envs.env, "step", step)
    weights = next(episodes).weights.double()
    returns = 50 * (1 - 0.98**lengths)
    everything = np.concatenate([returns[t < lengths] for t in range(495)])
    everything -= returns.mean()
    expected = everything / np.sqrt(np.mean(everything**2))
    np.testing.assert_allclose(weights, expected, rtol=1e-3, atol=1e-3)


def test_rows_log_the_surrogate_the_entropy_and_the_kl_after_the_step(agent):
    obs, actions = STATES, torch.tensor([0, 1, 1])
    log_probs = agent.policy(obs).log_prob(actions).detach()
    weights = torch.tensor([3.0, 1.0, -4.0], dtype=torch.float64)
    args = Args(num_envs=2, learning_rate=0.01)
    batch = Batch(obs, actions, log_probs, weights)
    before = measure(agent, batch)
    assert update(agent, make_optimizer(agent, args), batch, args) == {}
    metrics = measure(agent, batch)
    assert list(metrics) == ["surrogate", "entropy", "approx_kl"]
    probabilities = agent.policy.mlp(obs).softmax(-1).detach()
    entropy = -(probabilities * probabilities.log()).sum(-1).mean().item()
    assert metrics["entropy"] == pytest.approx(entropy)
    log_ratio = probabilities[range(3), actions].log() - log_probs
    k3 = (log_ratio.exp() - 1 - log_ratio).mean().item()
    assert metrics["approx_kl"] == pytest.approx(k3) and k3 > 1e-6
    surrogate = ((log_ratio.exp() - 1) * weights).mean().item()
    assert metrics["surrogate"] == pytest.approx(surrogate) and surrogate > 0.01
    assert before["surrogate"] == before["approx_kl"] == 0


@pytest.mark.parametrize("reward_to_go", [True, False])
def test_every_environment_gives_one_whole_episode_and_nothing_behind_it(reward_to_go):
    """Drift pays its state and starts from a random one: R̂_t follows from the observations alone.

    The first environment ends another episode while it waits for the last one, which no queue sees.
    """
    options = {"norm_obs": False, "norm_returns": False, "reward_to_go": reward_to_go}
    args = Args(env="toys:Drift-v0", num_envs=5, gamma=0.9, **options)
    envs, _, episodes = start(args)
    for iteration in range(1, 4):
        batch = next(episodes)
        assert len(batch.obs) == 3 + 4 + 5 + 6 + 7
        assert len(envs.return_queue) == 5 * iteration
        assert list(envs.length_queue) == [3, 4, 5, 6, 7] * iteration
        time = (10 * batch.obs[:, 1]).round().long()
        environment = torch.tensor([n for t in range(7) for n in range(5) if t < 3 + n])
        for n in range(5):
            rows = environment == n
            assert time[rows].tolist() == list(range(3 + n))
            rewards = batch.obs[rows, 0] + 0.2 * batch.actions[rows] - 0.1
            to_go = [sum(0.9**k * r for k, r in enumerate(rewards[t:])) for t in range(3 + n)]
            expected = torch.stack(to_go) if reward_to_go else to_go[0].expand(3 + n)
            torch.testing.assert_close(batch.weights[rows], expected)
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
        envs, _, episodes = start(Args(num_envs=num_envs, norm_returns=False))
        lengths[num_envs] = []
        while len(lengths[num_envs]) < 1000:
            next(episodes)
            lengths[num_envs] += list(envs.length_queue)[-num_envs:]
    means = [np.mean(x) for x in lengths.values()]
    standard_error = np.sqrt(sum(np.var(x) / len(x) for x in lengths.values()))
    assert abs(means[0] - means[1]) < 4 * standard_error < 5


def test_environment_without_an_end_is_cut():
    options = {"num_envs": 3, "max_episode_steps": 7, "gamma": 0.5, "total_timesteps": 100}
    args = Args(env="toys:OneStateEndless-v0", norm_returns=False, quiet=True, **options)
    envs, _, episodes = start(args)
    for iteration in range(1, 3):
        batch = next(episodes)
        assert len(batch.obs) == 21 and list(envs.length_queue) == [7] * 3 * iteration
        torch.testing.assert_close(batch.weights[-3:], torch.ones(3))
        torch.testing.assert_close(batch.weights[:3], torch.full((3,), 2 - 0.5**6))
    assert train(args)[-1]["global_step"] == 105


def test_normalised_rewards_restart_with_each_episode():
    options = {"norm_reward": True, "norm_returns": False, "gamma": 0.5}
    args = Args(env="toys:OneStateTerminated-v0", num_envs=2, **options)
    envs, agent, episodes = start(args)
    for _ in range(3):
        batch = next(episodes)
    sums = [1, 1.5, 1.75, 1.875]  # S_t of an episode of 4 rewards of 1
    moments = [[3 * 2 * 4], [np.mean(sums)], [np.std(sums)]]
    np.testing.assert_allclose(agent.reward_moments, moments, rtol=1e-9)
    to_go = torch.tensor([1.875, 1.75, 1.5, 1.0]).repeat_interleave(2) / np.std(sums)
    torch.testing.assert_close(batch.weights, to_go)
    assert list(envs.return_queue) == [4.0] * 6  # raw


class LastPays(gymnasium.vector.VectorWrapper):
    """The last step of the first episode pays 1 and −½, that of the next half as much."""

    amounts = np.array([1.0, -0.5])

    def step(self, actions):
        obs, _, terminations, *others = self.env.step(actions)
        rewards = terminations * self.amounts
        self.amounts = self.amounts / (1 + terminations)
        return obs, rewards, terminations, *others


def test_normalised_rewards_are_at_most_10_and_stay_apart():
    """The deviation of rare rewards is small, so that they would be larger."""
    options = {"norm_reward": True, "norm_returns": False, "gamma": 0.5}
    args = Args(env="toys:OneStateTerminated-v0", num_envs=2, **options)
    envs, agent, episodes = start(args)
    for env in envs.unwrapped.envs:
        env.unwrapped.terminate_after = 400
    envs.env = LastPays(envs.env)
    for expected in ([10.0, -5.0], [5.0, -2.5]):
        assert next(episodes).weights[-2:].tolist() == expected
    assert agent.state_dict()["largest_reward"].tolist() == [1.0]


def test_optimizer_follows_the_gradient_of_all_parameters():
    args = Args(env="Pendulum-v1", num_envs=2)
    _, agent, episodes = start(args)
    before = {name: parameter.detach().clone() for name, parameter in agent.named_parameters()}
    update(agent, make_optimizer(agent, args), next(episodes), args)
    for name, parameter in agent.named_parameters():
        assert not torch.equal(parameter, before[name]), name
    assert "policy.log_std" in before
