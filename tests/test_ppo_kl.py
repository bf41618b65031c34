"""ppo_kl.py: the penalised loss, the exact KL and β's schedule."""

import copy
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import ppo_kl
from ppo_kl import Agent, Args, Episodes, make_envs, make_optimizers, rollout, train, update


@pytest.fixture(autouse=True)
def in_empty_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def start(args):
    torch.manual_seed(args.seed)
    envs = make_envs(args)
    agent = Agent(envs.single_observation_space, envs.single_action_space, args.norm_obs)
    torch.nn.init.normal_(agent.actor[-1].weight)
    return envs, agent, rollout(envs, agent, Episodes(envs, args.seed), args)


def kl_of(old, new, obs):
    """KL(π_old ‖ π_new) at one observation, from the textbook."""
    p, q = old.actor(obs), new.actor(obs)
    if old.discrete:
        p, q = p.softmax(-1), q.softmax(-1)
        return sum(p[a] * math.e**0 * (p[a].log() - q[a].log()) for a in range(len(p)))
    var, new_var = (2 * old.log_std).exp(), (2 * new.log_std).exp()
    return ((new_var / var).log() / 2 + (var + (p - q) ** 2) / (2 * new_var) - 0.5).sum()


@pytest.mark.parametrize("env", ["CartPole-v1", "Pendulum-v1"])
def test_second_step_is_adam_on_the_penalised_loss_of_the_paper(env):
    """Two epochs of one minibatch against Schulman et al. 2017, eq. 8: only in the second is the KL not 0."""
    options = {"update_epochs": 2, "num_minibatches": 1, "ent_coef": 0.02, "vf_coef": 0.7, "max_grad_norm": 0.3}
    args = Args(env=env, num_envs=2, num_steps=30, norm_adv=False, beta=5.0, penalty="fixed", **options)
    envs, agent, batch = start(args)
    old, twin = copy.deepcopy(agent), copy.deepcopy(agent)
    optimizer = torch.optim.Adam(twin.parameters(), lr=args.learning_rate, eps=1e-5)
    for _ in range(2):
        loss = 0.0
        for i in range(len(batch.obs)):
            policy = twin.policy(batch.obs[i])
            ratio = math.e ** (policy.log_prob(batch.actions[i]) - batch.log_probs[i])
            objective = ratio * batch.advantages[i] - 5.0 * kl_of(old, twin, batch.obs[i])
            squared_error = (twin.value(batch.obs[i]) - batch.returns[i]) ** 2
            loss = loss - objective + args.vf_coef * squared_error / 2 - args.ent_coef * policy.entropy()
        optimizer.zero_grad()
        (loss / len(batch.obs)).backward()
        torch.nn.utils.clip_grad_norm_(twin.parameters(), args.max_grad_norm)
        optimizer.step()

    metrics = update(agent, make_optimizers(agent, args), batch, args)
    for (name, parameter), expected in zip(agent.named_parameters(), twin.parameters()):
        torch.testing.assert_close(parameter.detach(), expected.detach(), rtol=1e-3, atol=1e-4, msg=name)
    kl = sum(kl_of(old, agent, obs).item() for obs in batch.obs) / len(batch.obs)
    assert metrics["kl"] == pytest.approx(kl, rel=1e-2) and kl > 1e-5
    assert metrics["beta"] == 5.0


@given(st.floats(1e-6, 1e6), st.floats(0, 1), st.floats(1e-4, 1))
def test_beta_doubles_halves_or_stays(beta, kl, target_kl):
    expected = 2 * beta if kl > 1.5 * target_kl else beta / 2 if kl < target_kl / 1.5 else beta
    assert ppo_kl.adapted(beta, kl, target_kl) == expected


def test_beta_can_always_return():
    beta = 1.0
    for _ in range(5000):
        beta = ppo_kl.adapted(beta, 0.0, 0.01)
    assert ppo_kl.adapted(beta, 1.0, 0.01) == 2 * beta > 0
    for _ in range(5000):
        beta = ppo_kl.adapted(beta, 1.0, 0.01)
    assert torch.tensor(beta) * 1e9 < torch.inf and ppo_kl.adapted(beta, 0.0, 0.01) == beta / 2


def test_adaptive_beta_follows_the_logged_kl_once_a_rollout():
    rows = train(Args(run_dir="run", total_timesteps=30_000, quiet=True))
    assert rows[0]["beta"] == Args().beta
    for row, following in zip(rows, rows[1:]):
        assert following["beta"] == ppo_kl.adapted(row["beta"], row["kl"], 0.01)
    assert len({row["beta"] for row in rows}) > 2
    checkpoint = torch.load("run/checkpoint.pt", weights_only=True)
    last = ppo_kl.adapted(rows[-1]["beta"], rows[-1]["kl"], 0.01)
    assert checkpoint["optimizers"]["agent"]["beta"] == last


def test_fixed_beta_stays_and_a_high_one_holds_the_policy():
    kls = {}
    for beta in (0.0, 100.0):
        args = Args(run_dir=f"{beta}", penalty="fixed", beta=beta, total_timesteps=10_000, quiet=True)
        rows = train(args)
        assert {row["beta"] for row in rows} == {beta}
        kls[beta] = sum(row["kl"] for row in rows) / len(rows)
    assert kls[100.0] < 0.3 * kls[0.0]


def test_per_sample_logs_no_beta_and_still_the_kl():
    rows = train(Args(run_dir="run", penalty="per-sample", total_timesteps=5_000, quiet=True))
    assert {row["beta"] for row in rows} == {None} and all(row["kl"] > 0 for row in rows)
