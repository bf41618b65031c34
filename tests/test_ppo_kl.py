"""ppo_kl.py: the penalised loss, the exact KL and β's schedule."""

import copy
import dataclasses
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import ppo_kl
from ppo_kl import Agent, Args, load_run, make_envs, make_optimizer, rollouts, train, update


@pytest.fixture(autouse=True)
def in_empty_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def start(args):
    """An agent of some certainty, and its first rollout."""
    torch.manual_seed(args.seed)
    envs = make_envs(args.env, args.num_envs)
    agent = Agent(envs, args.norm_obs)
    torch.nn.init.normal_(agent.policy.mlp[-1].weight)
    return agent, next(rollouts(envs, agent, args, iteration=0))


def kl_of(old, new, obs):
    """KL(π_old ‖ π_new) at one observation, from the textbook."""
    old, new = old.policy, new.policy
    p, q = old.mlp(obs), new.mlp(obs)
    if old.discrete:
        p, q = p.softmax(-1), q.softmax(-1)
        return sum(p[a] * (p[a].log() - q[a].log()) for a in range(len(p)))
    var, new_var = (2 * old.log_std).exp(), (2 * new.log_std).exp()
    return ((new_var / var).log() / 2 + (var + (p - q) ** 2) / (2 * new_var) - 0.5).sum()


@pytest.mark.parametrize("env", ["CartPole-v1", "Pendulum-v1", "toys:TargetMixed-v0"])
def test_second_step_is_adam_on_the_penalised_loss_of_the_paper(env, monkeypatch):
    """Two epochs of one minibatch against Schulman et al. 2017, eq. 8.

    Only in the second is the KL not 0.
    """
    options = {"update_epochs": 2, "num_minibatches": 1, "ent_coef": 0.02, "vf_coef": 0.7}
    options |= {"num_envs": 2, "num_steps": 30, "norm_adv": False, "max_grad_norm": 0.3}
    args = Args(env=env, beta=5.0, penalty="fixed", **options)
    agent, batch = start(args)
    k = batch.actions[0].numel()  # the entropy bonus is per number of an action
    old, twin = copy.deepcopy(agent), copy.deepcopy(agent)
    optimizer = torch.optim.Adam(twin.parameters(), lr=args.learning_rate, eps=1e-5)
    for _ in range(2):
        loss = 0.0
        for i in range(len(batch.obs)):
            policy = twin.policy(batch.obs[i])
            ratio = math.e ** (policy.log_prob(batch.actions[i]) - batch.log_probs[i])
            objective = ratio * batch.advantages[i] - 5.0 * kl_of(old, twin, batch.obs[i])
            squared_error = (twin.value(batch.obs[i]) - batch.returns[i]) ** 2
            loss = loss - objective + 0.7 * squared_error / 2 - 0.02 * policy.entropy() / k
        optimizer.zero_grad()
        (loss / len(batch.obs)).backward()
        torch.nn.utils.clip_grad_norm_(twin.parameters(), args.max_grad_norm)
        optimizer.step()

    losses, backward = [], torch.Tensor.backward
    monkeypatch.setattr(torch.Tensor, "backward", lambda x: (losses.append(x.item()), backward(x)))
    metrics = update(agent, make_optimizer(agent, args), batch, args)
    assert len(losses) == 2
    assert losses[1] == pytest.approx(loss.item() / len(batch.obs), 1e-3, 1e-5)
    for (name, parameter), expected in zip(agent.named_parameters(), twin.parameters()):
        found = parameter.detach()
        torch.testing.assert_close(found, expected.detach(), rtol=1e-3, atol=1e-4, msg=name)
    kl = sum(kl_of(old, agent, obs).item() for obs in batch.obs) / len(batch.obs)
    assert metrics == {"kl": pytest.approx(kl, rel=1e-2), "beta": 5.0} and kl > 1e-5
    log_probs = agent.policy(batch.obs).log_prob(batch.actions).detach()
    log_ratio = (log_probs - batch.log_probs).double()
    k3 = (log_ratio.exp() - 1 - log_ratio).mean().item()
    assert ppo_kl.measure(agent, batch)["approx_kl"] == pytest.approx(k3, rel=1e-3)


@given(st.floats(1e-6, 1e6), st.floats(0, 1), st.floats(1e-4, 1))
def test_beta_doubles_halves_or_stays(beta, kl, target_kl):
    """By section 4 of Schulman et al. 2017, and within 0.25 … 1e4."""
    expected = 2 * beta if kl > 1.5 * target_kl else beta / 2 if kl < target_kl / 1.5 else beta
    assert ppo_kl.adapted(beta, kl, target_kl) == min(max(expected, 0.25), 1e4)


def test_beta_at_a_limit_stays_there_and_comes_back():
    """A β of 0, which no factor would change, cannot come about."""
    beta, found = 1.0, []
    for kl in [0.0] * 20 + [1.0] * 40 + [0.0] * 40:
        beta = ppo_kl.adapted(beta, kl, target_kl=0.01)
        found.append(beta)
    down, up, down_again = found[:20], found[20:60], found[60:]
    assert down == [0.5] + [0.25] * 19
    assert up == [2.0**k * 0.25 for k in range(1, 16)] + [1e4] * 25
    assert down_again == [2.0**-k * 1e4 for k in range(1, 16)] + [0.25] * 25
    for beta, limit in ((0.0, 0.25), (0.25, 0.25), (1e4, 1e4), (1e9, 1e4)):
        assert ppo_kl.adapted(beta, 0.01, target_kl=0.01) == limit


def test_update_takes_an_adaptive_beta_to_its_lower_limit_and_back():
    """Small steps are far below the target; then the target is far below the steps."""
    args = Args(num_envs=4, num_steps=32, update_epochs=1, beta=4.0)
    agent, batch = start(args)
    optimizer, betas = make_optimizer(agent, args), []
    for target_kl in [1e6] * 6 + [1e-9] * 6:
        args.target_kl = target_kl
        betas.append(update(agent, optimizer, batch, args)["beta"])
    assert betas == [4, 2, 1, 0.5, 0.25, 0.25, 0.25, 0.5, 1, 2, 4, 8]


def test_beta_stays_within_a_factor_of_one_and_a_half_of_the_target():
    found = [ppo_kl.adapted(3.0, kl, 0.01) for kl in (0.0066, 0.0067, 0.01, 0.0149, 0.0151)]
    assert found == [1.5, 3.0, 3.0, 3.0, 6.0]


@pytest.mark.parametrize("penalty", ["adaptive", "fixed", "per-sample"])
def test_update_changes_an_adaptive_beta_alone_and_after_its_steps(penalty):
    """Far from the target β doubles, but the row has the β that these steps paid."""
    args = Args(num_envs=4, penalty=penalty, beta=3.0, target_kl=1e-9)
    agent, batch = start(args)
    optimizer = make_optimizer(agent, args)
    betas = []
    for _ in range(2):
        betas.append(update(agent, optimizer, batch, args).get("beta"))
    expected = {"adaptive": [3.0, 6.0, 12.0], "fixed": [3.0, 3.0, None], "per-sample": [None] * 3}
    assert [*betas, optimizer.param_groups[0].get("beta")] == expected[penalty]


@pytest.mark.parametrize(("penalty", "steps"), [("adaptive", 4), ("fixed", 40), ("per-sample", 40)])
def test_twice_the_target_ends_the_epochs_of_an_adaptive_beta_alone(penalty, steps):
    args = Args(num_envs=4, num_steps=32, penalty=penalty, target_kl=1e-9)
    agent, batch = start(args)
    optimizer = make_optimizer(agent, args)
    kl = update(agent, optimizer, batch, args)["kl"]
    assert ppo_kl.measure(agent, batch)["approx_kl"] > 2e-9 and kl > 1.5e-9
    assert next(iter(optimizer.state.values()))["step"] == steps


def test_the_epochs_go_on_below_twice_the_target():
    args = Args(num_envs=4, num_steps=32, update_epochs=2, num_minibatches=1)
    ends = {}
    for factor in (0, 1.9, 2.1):  # of the divergence after the first epoch
        agent, batch = start(args)
        optimizer = make_optimizer(agent, args)
        if not factor:
            update(agent, optimizer, batch, dataclasses.replace(args, update_epochs=1))
            first = ppo_kl.measure(agent, batch)["approx_kl"]
        else:
            update(agent, optimizer, batch, dataclasses.replace(args, target_kl=first / factor))
            ends[factor] = int(next(iter(optimizer.state.values()))["step"])
    assert ends == {1.9: 2, 2.1: 1}


def test_adaptive_beta_follows_the_logged_kl_once_a_rollout_and_over_a_resume():
    """The checkpoint has the β of the rollout to come, with which a resumed run goes on."""
    options = {"num_steps": 64, "num_minibatches": 4, "total_timesteps": 12_000, "quiet": True}
    args = Args(run_dir="run", beta=8.0, **options)
    rows = train(args)
    assert rows[0]["beta"] == 8
    _, saved = load_run("run")
    last = ppo_kl.adapted(rows[-1]["beta"], rows[-1]["kl"], args.target_kl)
    assert saved["optimizer"]["param_groups"][0]["beta"] == last
    assert last != 8  # which a resumed run would begin with if β were not kept
    resumed = train(*load_run("run", total_timesteps=16_000))
    assert resumed[: len(rows)] == rows and len(resumed) > len(rows) + 5
    for row, following in zip(resumed, resumed[1:]):
        assert following["beta"] == ppo_kl.adapted(row["beta"], row["kl"], args.target_kl)
    assert len({row["beta"] for row in rows}) > 2


def test_fixed_beta_stays_and_a_high_one_holds_the_policy():
    kls = {}
    for beta in (0.0, 100.0):
        options = {"penalty": "fixed", "total_timesteps": 10_000, "quiet": True}
        rows = train(Args(run_dir=f"{beta}", beta=beta, **options))
        assert {row["beta"] for row in rows} == {beta}
        kls[beta] = sum(row["kl"] for row in rows) / len(rows)
    assert kls[100.0] < 0.3 * kls[0.0]


def test_per_sample_logs_no_beta_and_still_the_kl():
    rows = train(Args(run_dir="run", penalty="per-sample", total_timesteps=5_000, quiet=True))
    assert all("beta" not in row and row["kl"] > 0 for row in rows)
    assert "beta" not in open("run/metrics.csv").readline()


def test_a_mistyped_penalty_from_python_is_no_fixed_penalty():
    """The command line refuses it; in Python it must not pass for another."""
    args = Args(penalty="adaptiv", num_steps=8, total_timesteps=100, quiet=True)
    with pytest.raises(KeyError, match="adaptiv"):
        train(args)
