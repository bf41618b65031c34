"""vpg.py: the policy's step, the critic's regression, and what λ does."""

import numpy as np
import pytest
import torch

import vpg
from vpg import Agent, Args, Episodes, make_envs, make_optimizers, rollout, update


def start(args):
    torch.manual_seed(args.seed)
    envs = make_envs(args)
    return (
        envs,
        Agent(envs.single_observation_space, envs.single_action_space, args.norm_obs),
        Episodes(envs, args.seed),
    )


@pytest.mark.parametrize("env", ["CartPole-v1", "Pendulum-v1"])
@pytest.mark.parametrize("norm_adv", [False, True])
def test_policy_takes_one_step_of_adam_on_the_policy_gradient(env, norm_adv):
    """Σ log π(a_t | s_t) Â_t / B, summed sample by sample, whose gradient torch.optim.Adam follows."""
    args = Args(env=env, num_envs=3, num_steps=40, norm_adv=norm_adv, num_minibatches=1)
    envs, agent, episodes = start(args)
    torch.nn.init.normal_(agent.actor[-1].weight)
    batch = rollout(envs, agent, episodes, args)
    twin = Agent(envs.single_observation_space, envs.single_action_space, norm_obs=False)
    twin.load_state_dict(agent.state_dict())
    policy = [parameter for name, parameter in twin.named_parameters() if "critic" not in name]
    advantages = batch.advantages
    if norm_adv:
        advantages = (advantages - advantages.mean()) / advantages.var(correction=0).sqrt()
    gain = sum(twin.policy(batch.obs[i]).log_prob(batch.actions[i]) * advantages[i] for i in range(len(batch.obs)))
    (-gain / len(batch.obs)).backward()
    assert all(parameter.grad is None for parameter in twin.critic.parameters())
    torch.optim.Adam(policy, lr=args.learning_rate, eps=1e-5).step()

    entropy = agent.policy(batch.obs).entropy().mean().item()
    metrics = update(agent, make_optimizers(agent, args), batch, args)
    for (name, parameter), expected in zip(agent.named_parameters(), twin.parameters()):
        if "critic" not in name:
            torch.testing.assert_close(parameter.detach(), expected.detach(), rtol=1e-3, atol=1e-4, msg=name)
    assert metrics["policy_loss"] == pytest.approx(-gain.item() / len(batch.obs), rel=1e-3, abs=1e-5)
    new, old = agent.policy(batch.obs).log_prob(batch.actions), batch.log_probs
    assert metrics["approx_kl"] == pytest.approx(((new - old).exp() - 1 - (new - old)).mean().item(), abs=1e-7)
    assert metrics["entropy"] == pytest.approx(entropy, rel=1e-5)


def test_critic_is_fitted_in_passes_of_minibatches():
    args = Args(num_envs=4, num_steps=32, value_epochs=3, num_minibatches=4)
    envs, agent, episodes = start(args)
    batch = rollout(envs, agent, episodes, args)
    optimizers = make_optimizers(agent, args)
    update(agent, optimizers, batch, args)
    assert optimizers["critic"].state["step"] == 12 and optimizers["policy"].state["step"] == 1


def test_critic_converges_to_the_least_squares_fit():
    args = Args(num_envs=4, num_steps=32, value_epochs=400, num_minibatches=2, value_learning_rate=3e-3)
    envs, agent, episodes = start(args)
    batch = rollout(envs, agent, episodes, args)
    before = [parameter.detach().clone() for name, parameter in agent.named_parameters() if "critic" not in name]
    loss = vpg.fit_critic(agent, make_optimizers(agent, args)["critic"], batch, args)
    errors = agent.value(batch.obs) - batch.returns
    assert 0.5 * errors.square().mean() < 0.1 * 0.5 * (batch.values - batch.returns).square().mean()
    assert loss == pytest.approx(0.5 * errors.square().mean().item(), rel=0.5)
    after = [parameter for name, parameter in agent.named_parameters() if "critic" not in name]
    assert all(torch.equal(x, y) for x, y in zip(before, after))  # no gradient reaches the policy


def first_step_advantages(gae_lambda):
    """Â of the first step of 4,000 episodes of Delayed under a critic that says 0 everywhere, and its actions."""
    args = Args(env="toys:Delayed-v0", num_envs=4000, num_steps=6, gae_lambda=gae_lambda, gamma=0.9)
    envs, agent, episodes = start(args)
    for parameter in agent.critic.parameters():
        torch.nn.init.zeros_(parameter)
    batch = rollout(envs, agent, episodes, args)
    first = batch.obs[:, 0] == 0
    return batch.advantages[first].numpy(), batch.actions[first].numpy()


def test_lambda_trades_bias_for_variance():
    """The first action pays 1 five steps later, γ⁵ now; the critic knows nothing. Tables of text 1, section 6."""
    bias, variance = {}, {}
    for gae_lambda in (0.0, 0.9, 1.0):
        advantages, actions = first_step_advantages(gae_lambda)
        groups = [advantages[actions == action] for action in (0, 1)]
        standard_error = np.sqrt(sum(group.var() / len(group) for group in groups))
        bias[gae_lambda] = 0.9**5 - (groups[1].mean() - groups[0].mean())
        variance[gae_lambda] = groups[0].var()
        if gae_lambda == 1:
            assert abs(bias[1]) < 4 * standard_error < 0.5 * 0.9**5  # Monte-Carlo: no bias
        if gae_lambda == 0:
            assert abs(bias[0] - 0.9**5) < 4 * standard_error  # one-step: none of the reward to come is seen
    assert bias[0] > bias[0.9] > bias[1]
    assert variance[0] < variance[0.9] < variance[1]
    assert variance[0] == pytest.approx(1, rel=0.1)
    assert variance[1] == pytest.approx(sum(0.9 ** (2 * k) for k in range(6)), rel=0.1)


@pytest.mark.parametrize("gae_lambda", [0.0, 1.0])
def test_ends_of_lambda_are_td_error_and_return_minus_value(gae_lambda):
    args = Args(env="toys:Drift-v0", num_envs=1, num_steps=4, gae_lambda=gae_lambda, gamma=0.9)
    envs, agent, episodes = start(args)
    batch = rollout(envs, agent, episodes, args)  # an episode of 3 steps, terminated, and a row that resets
    rewards = batch.obs[:, 0] + 0.2 * batch.actions - 0.1
    values = [*batch.values, torch.tensor(0.0)]
    for t in range(3):
        to_go = sum(0.9**k * r for k, r in enumerate(rewards[t:]))
        expected = to_go if gae_lambda == 1 else rewards[t] + 0.9 * values[t + 1]
        torch.testing.assert_close(batch.advantages[t], expected - values[t], rtol=1e-4, atol=1e-5)
