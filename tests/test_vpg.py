"""vpg.py: the policy's step, the critic's regression, and what λ does."""

import copy

import numpy as np
import pytest
import torch

import vpg
from vpg import Agent, Args, make_envs, make_optimizer, measure, rollouts, update


def start(args):
    """An agent, and its first rollout."""
    torch.manual_seed(args.seed)
    envs = make_envs(args.env, args.num_envs)
    agent = Agent(envs, args.norm_obs)
    return agent, next(rollouts(envs, agent, args, iteration=0))


def weights(agent, of_critic):
    """Copies of the parameters of the critic, or of the policy, by name."""
    prefix = "critic." if of_critic else "policy."
    named = agent.named_parameters()
    return {name: x.detach().clone() for name, x in named if name.startswith(prefix)}


@pytest.mark.parametrize("env", ["CartPole-v1", "Pendulum-v1"])
@pytest.mark.parametrize("norm_adv", [False, True])
def test_policy_takes_one_step_of_adam_on_the_policy_gradient(env, norm_adv):
    """Adam follows the gradient of Σ log π(a_t | s_t) Â_t / B, summed sample by sample.

    Â is the batch's, as it is, whatever norm_adv says: that is for rollouts.
    """
    args = Args(env=env, num_envs=3, num_steps=40, norm_adv=norm_adv, num_minibatches=1)
    agent, batch = start(args)
    torch.nn.init.normal_(agent.policy.mlp[-1].weight, std=0.3)
    with torch.no_grad():
        log_probs = agent.policy(batch.obs).log_prob(batch.actions)
    batch = batch._replace(log_probs=log_probs, advantages=2 * batch.advantages + 0.3)
    twin = copy.deepcopy(agent)
    gain = 0.0
    for obs, action, advantage in zip(batch.obs, batch.actions, batch.advantages):
        gain = gain + twin.policy(obs).log_prob(action) * advantage
    (-gain / len(batch.obs)).backward()
    torch.optim.Adam(twin.policy.parameters(), lr=args.learning_rate, eps=1e-5).step()

    assert update(agent, make_optimizer(agent, args), batch, args) == {}
    for name, expected in weights(twin, of_critic=False).items():
        found = agent.get_parameter(name).detach()
        torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-4, msg=name)
    metrics = measure(agent, batch)
    policy = agent.policy(batch.obs)
    log_ratio = (policy.log_prob(batch.actions) - batch.log_probs).detach().double()
    k3 = (log_ratio.exp() - 1 - log_ratio).mean().item()
    assert metrics["approx_kl"] == pytest.approx(k3, rel=1e-3) and k3 > 1e-6
    surrogate = ((log_ratio.exp() - 1) * batch.advantages).mean().item()
    assert metrics["surrogate"] == pytest.approx(surrogate, rel=1e-3) and surrogate > 0
    assert metrics["entropy"] == pytest.approx(policy.entropy().mean().item(), rel=1e-5)


def test_one_adam_has_a_group_for_the_policy_and_one_for_the_critic():
    args = Args(env="Pendulum-v1", learning_rate=0.02, value_learning_rate=0.05)
    agent, _ = start(args)
    optimizer = make_optimizer(agent, args)
    policy, critic = optimizer.param_groups
    assert (policy["lr"], critic["lr"]) == (0.02, 0.05)
    for group, of_critic in ((policy, False), (critic, True)):
        expected = {id(agent.get_parameter(name)) for name in weights(agent, of_critic)}
        assert {id(parameter) for parameter in group["params"]} == expected


def test_the_policys_step_moves_the_policy_alone_and_the_fit_the_critic_alone():
    """Each step leaves the other network's weights and Adam's moments of them as they were."""
    args = Args(env="Pendulum-v1", num_envs=4, num_steps=32, value_epochs=3, num_minibatches=4)
    agent, batch = start(args)
    twin = copy.deepcopy(agent)
    optimizer = make_optimizer(agent, args)
    for updates in (1, 2):  # the second one finds both networks' gradients
        before = weights(agent, of_critic=False)
        torch.manual_seed(0)
        update(agent, optimizer, batch, args)
        steps = {
            name: optimizer.state[parameter]["step"].item()
            for name, parameter in agent.named_parameters()
        }
        for name in before:
            assert steps[name] == updates and not torch.equal(
                agent.get_parameter(name), before[name]
            )
        assert {steps[name] for name in weights(agent, of_critic=True)} == {12 * updates}
    before, optimizer = weights(twin, of_critic=False), make_optimizer(twin, args)
    for _ in range(2):
        torch.manual_seed(0)
        vpg.fit_critic(twin, optimizer, batch, args)
    assert all(torch.equal(twin.get_parameter(name), before[name]) for name in before)
    for name, expected in weights(agent, of_critic=True).items():
        assert torch.equal(twin.get_parameter(name), expected), name


def test_critic_converges_to_the_least_squares_fit():
    options = {"value_epochs": 400, "num_minibatches": 2, "value_learning_rate": 3e-3}
    args = Args(num_envs=4, num_steps=32, **options)
    agent, batch = start(args)
    values = agent.value(batch.obs).detach()
    assert vpg.fit_critic(agent, make_optimizer(agent, args), batch, args) is None
    errors = agent.value(batch.obs) - batch.returns
    assert errors.square().mean() < 0.1 * (values - batch.returns).square().mean()
    loss = 0.5 * errors.square().mean().item()
    assert measure(agent, batch)["value_loss"] == pytest.approx(loss, rel=1e-5)


def test_value_loss_is_that_of_the_critic_after_its_last_pass():
    """½ (V − R̂)² and the explained variance, both over the whole rollout, by hand."""
    args = Args(num_envs=4, num_steps=32, value_epochs=3, num_minibatches=2)
    agent, batch = start(args)
    before = measure(agent, batch)
    update(agent, make_optimizer(agent, args), batch, args)
    metrics = measure(agent, batch)
    returns = batch.returns.double().numpy()
    errors = returns - agent.value(batch.obs).detach().double().numpy()
    assert metrics["value_loss"] == pytest.approx(np.mean(errors**2) / 2, rel=1e-5)
    explained = 1 - np.var(errors) / np.var(returns)
    assert metrics["explained_variance"] == pytest.approx(explained, abs=1e-5)
    assert metrics["value_loss"] < 0.9 * before["value_loss"]


def first_step_advantages(gae_lambda):
    """Â of the first step of 4,000 episodes of Delayed under a critic of zeros, and the actions."""
    options = {"env": "toys:Delayed-v0", "num_envs": 4000, "num_steps": 6, "gamma": 0.9}
    options |= {"norm_obs": False, "norm_reward": False, "norm_adv": False}
    args = Args(gae_lambda=gae_lambda, **options)
    torch.manual_seed(args.seed)
    envs = make_envs(args.env, args.num_envs)
    agent = Agent(envs, args.norm_obs)
    for parameter in agent.critic.parameters():
        torch.nn.init.zeros_(parameter)
    batch = next(rollouts(envs, agent, args, iteration=0))
    first = batch.obs[:, 0] == 0
    assert first.sum() == 4000
    return batch.advantages[first].numpy(), batch.actions[first].numpy()


def test_lambda_trades_bias_for_variance():
    """The first action pays 1 five steps later, which is γ⁵ now; the critic knows nothing."""
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
            assert abs(bias[0] - 0.9**5) < 4 * standard_error  # no later reward is seen
    assert bias[0] > bias[0.9] > bias[1]
    assert variance[0] < variance[0.9] < variance[1]
    assert variance[0] == pytest.approx(1, rel=0.1)
    assert variance[1] == pytest.approx(sum(0.9 ** (2 * k) for k in range(6)), rel=0.1)


@pytest.mark.parametrize("gae_lambda", [0.0, 1.0])
def test_ends_of_lambda_are_td_error_and_return_minus_value(gae_lambda):
    """An episode of 3 steps, which a termination ends, and a row that resets."""
    options = {"env": "toys:Drift-v0", "num_envs": 1, "num_steps": 4, "num_minibatches": 1}
    options |= {"norm_obs": False, "norm_reward": False, "norm_adv": False}
    args = Args(gae_lambda=gae_lambda, gamma=0.9, **options)
    agent, batch = start(args)
    rewards = batch.obs[:, 0] + 0.2 * batch.actions - 0.1
    values = [*agent.value(batch.obs).detach(), torch.tensor(0.0)]
    assert len(batch.obs) == 3
    for t in range(3):
        to_go = sum(0.9**k * r for k, r in enumerate(rewards[t:]))
        expected = to_go if gae_lambda == 1 else rewards[t] + 0.9 * values[t + 1]
        expected = expected - values[t]
        torch.testing.assert_close(batch.advantages[t], expected, rtol=1e-4, atol=1e-5)
