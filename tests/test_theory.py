"""What the theory of policy gradients states, checked on the scripts.

docs/from_reinforce_to_ppo.md tells the theory. Each test is named after a statement and cites it.
The reference side comes from the definitions alone: densities are written out, derivatives are
differences or autograd through those densities, expectations are sums over all actions. Two forms
that shall be one to the bit are compared with one another.
"""

import copy
import csv
import math
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple

import numpy as np
import pytest
import torch
from gymnasium.spaces import Box, Discrete
from hypothesis import given, settings
from hypothesis import strategies as st

import gae_fast
import ppo_clip
import ppo_kl
import trpo
import vpg

FORMS = ("min", "phi", "beta")
KINDS = ("discrete", "continuous")


# -------------------------------------- policies and samples --------------------------------------


class World(NamedTuple):
    """A policy π_old and one near or far from it, both of random weights, and what π_old did."""

    old: ppo_kl.Agent
    agent: ppo_kl.Agent
    batch: ppo_clip.Batch


def random_agent(kind, generator, action_size=2):
    action_space = Discrete(4) if kind == "discrete" else Box(-1, 1, (action_size,))
    spaces = {"single_observation_space": Box(-1, 1, (3,)), "single_action_space": action_space}
    agent = ppo_kl.Agent(SimpleNamespace(**spaces), norm_obs=False).double()
    with torch.no_grad():
        for parameter in agent.parameters():
            fan_in = parameter.shape[1] if parameter.dim() == 2 else 4
            parameter.copy_(
                torch.randn(parameter.shape, generator=generator, dtype=torch.float64) / fan_in**0.5
            )
    return agent


def make_world(kind, seed, reach, advantages, action_size=2):
    generator = torch.Generator().manual_seed(seed)
    old = random_agent(kind, generator, action_size)
    agent = copy.deepcopy(old)
    size = len(advantages)
    obs = torch.randn(size, 3, generator=generator, dtype=torch.float64)
    with torch.no_grad():
        for parameter in agent.parameters():
            parameter += reach * torch.randn(
                parameter.shape, generator=generator, dtype=torch.float64
            )
        output = old.policy.mlp(obs)
        if kind == "discrete":
            actions = torch.multinomial(output.softmax(-1), 1, generator=generator)[:, 0]
        else:
            noise = torch.randn(size, action_size, generator=generator, dtype=torch.float64)
            actions = output + old.policy.log_std.exp() * noise
        log_probs = torch.stack([log_density(old, obs[i], actions[i]) for i in range(size)])
    returns = torch.randn(size, generator=generator, dtype=torch.float64)
    advantages = torch.tensor(advantages, dtype=torch.float64)
    return World(old, agent, ppo_clip.Batch(obs, actions, log_probs, advantages, returns))


def log_density(agent, obs, action):
    """log π(a | s) of an action, or of several in one state: a softmax's, or of bell curves."""
    output = agent.policy.mlp(obs)
    if agent.policy.discrete:
        return output[action] - output.exp().sum().log()
    std = agent.policy.log_std.exp()
    return (-((action - output) ** 2) / (2 * std**2) - (std * math.sqrt(2 * math.pi)).log()).sum(-1)


def density(agent, obs, action):
    """π(a | s); 0 for an action that is 40 standard deviations off."""
    return log_density(agent, obs, action).exp()


def policy_parameters(agent):
    return list(agent.policy.parameters())


def gradient(scalar, agent):
    """∇ of a scalar with respect to the policy's parameters, as one vector."""
    parameters = policy_parameters(agent)
    grads = torch.autograd.grad(
        scalar, parameters, allow_unused=True, materialize_grads=True, retain_graph=True
    )
    return torch.cat([grad.flatten() for grad in grads])


def scores(agent, batch):
    """∇log π_θ(a_t | s_t) of every sample, from the densities."""
    return [
        gradient(log_density(agent, *sample), agent) for sample in zip(batch.obs, batch.actions)
    ]


advantage = st.one_of(st.floats(-3, 3), st.sampled_from([0.0, 1.0, -1.0]))
worlds = st.builds(
    make_world,
    kind=st.sampled_from(KINDS),
    seed=st.integers(0, 2**32),
    reach=st.sampled_from([0.0, 0.01, 0.1, 0.5]),
    advantages=st.lists(advantage, min_size=3, max_size=6).filter(lambda x: max(x) - min(x) > 0.1),
)
at_theta_k = st.builds(lambda world: world._replace(agent=copy.deepcopy(world.old)), worlds)


class Recorder:
    """Takes an optimizer's place: keeps the policy's gradient at each step, and moves nothing."""

    def __init__(self, agent):
        self.agent, self.gradients, self.param_groups = agent, [], [{}]

    def zero_grad(self):
        self.agent.zero_grad()

    def step(self):
        parameters = policy_parameters(self.agent)
        grads = [torch.zeros_like(x) if x.grad is None else x.grad for x in parameters]
        self.gradients.append(torch.cat([grad.flatten() for grad in grads]))


class Jump(Recorder):
    """A Recorder whose first step takes the agent to another one."""

    def __init__(self, agent, target):
        super().__init__(agent)
        self.target = target

    def step(self):
        super().step()
        self.agent.load_state_dict(self.target.state_dict())


def descent(agent, rate=0.01):
    """Plain gradient descent of all parameters."""
    return torch.optim.SGD(agent.parameters(), rate)


ONE_STEP = {"update_epochs": 1, "num_minibatches": 1, "ent_coef": 0.0, "max_grad_norm": math.inf}


def gradient_in_update(script, agent, batch, **options):
    """The gradient of the policy's objective in update, over all samples at once: of vpg or PPO."""
    recorder = Recorder(agent)
    one_step = {"num_minibatches": 1, "value_epochs": 1} if script is vpg else ONE_STEP
    script.update(agent, recorder, batch, script.Args(**one_step, **options))
    return -recorder.gradients[0]


def gradient_of_ppo_kl_at(world, beta):
    """The same at θ′, which ppo_kl's update comes to in a first epoch that begins at π_old."""
    agent = copy.deepcopy(world.old)
    jump = Jump(agent, world.agent)
    options = {**ONE_STEP, "update_epochs": 2, "penalty": "fixed", "beta": beta}
    ppo_kl.update(agent, jump, world.batch, ppo_kl.Args(**options))
    return -jump.gradients[1]


def assert_equal(left, right):
    scale = max(left.abs().max().item(), right.abs().max().item(), 1e-6)
    torch.testing.assert_close(left, right, rtol=0, atol=1e-9 * scale)


# ------------------------------------ where the ratio is from -------------------------------------


@given(worlds, st.integers(0, 2**32))
@settings(max_examples=30)
def test_gradient_of_the_ratio_is_the_ratio_times_the_score(world, seed):
    """∇r = r ∇log π: a difference quotient of π_θ / π_old, against the script's log_prob.

    The direction is random. "Where is the policy gradient in PPO?", section 4, steps 2 and 3.
    """
    parameters = policy_parameters(world.agent)
    theta = torch.nn.utils.parameters_to_vector(parameters).detach()
    direction = torch.randn(
        len(theta), generator=torch.Generator().manual_seed(seed), dtype=torch.float64
    )
    direction /= direction.norm()

    def ratios_at(step):
        torch.nn.utils.vector_to_parameters(theta + step * direction, parameters)
        with torch.no_grad():
            return [
                density(world.agent, *x) / density(world.old, *x)
                for x in zip(world.batch.obs, world.batch.actions)
            ]

    ahead, behind, here = ratios_at(1e-5), ratios_at(-1e-5), ratios_at(0.0)
    log_probs = world.agent.policy(world.batch.obs).log_prob(world.batch.actions)
    for i, ratio in enumerate(here):
        slope = (ahead[i] - behind[i]) / 2e-5
        assert slope.item() == pytest.approx(
            (ratio * gradient(log_probs[i], world.agent) @ direction).item(), 1e-4, 1e-7
        )


def all_actions(agent, other, obs):
    """All actions, or a fine grid of them, with weights: Σ weight · density · f is E[f]."""
    if agent.policy.discrete:
        return torch.arange(4), torch.ones(4, dtype=torch.float64)
    with torch.no_grad():
        means, stds = zip(
            *((x.policy.mlp(obs).item(), x.policy.log_std.exp().item()) for x in (agent, other))
        )
    grid = torch.linspace(
        min(means) - 9 * max(stds), max(means) + 9 * max(stds), 301, dtype=torch.float64
    )
    return grid[:, None], (grid[1] - grid[0]).expand(301)


one_state = st.builds(
    make_world,
    kind=st.sampled_from(KINDS),
    seed=st.integers(0, 2**32),
    reach=st.sampled_from([0.01, 0.1]),
    advantages=st.just([1.0]),
    action_size=st.just(1),
)
coefficients = st.tuples(st.floats(-2, 2), st.floats(-2, 2), st.floats(-2, 2))


@given(one_state, coefficients)
@settings(max_examples=30)
def test_importance_sampling_is_exact_in_expectation(world, coefficients):
    """E_{a∼π_θ}[f(a)] = E_{a∼π_old}[r f(a)], and their gradients agree: nothing is approximated.

    "Where does the ratio come from?", the derivation of L^CPI from L^PG.
    """
    obs = world.batch.obs[0]
    actions, weights = all_actions(world.agent, world.old, obs)
    f = sum(
        c * actions.double().flatten() ** k for k, c in enumerate(coefficients)
    )  # any function of the action
    new = density(world.agent, obs, actions)
    old = density(world.old, obs, actions).detach()
    log_ratio = (
        world.agent.policy(obs).log_prob(actions) - world.old.policy(obs).log_prob(actions).detach()
    )
    assert (weights * old).sum().item() == pytest.approx(1) and (
        weights * new
    ).sum().item() == pytest.approx(1)
    assert_equal((weights * old * log_ratio.exp() * f).sum(), (weights * new * f).sum())
    surrogate = gradient((weights * old * log_ratio.exp() * f).sum(), world.agent)
    assert_equal(surrogate, gradient((weights * new * f).sum(), world.agent))  # of E_π[f] itself
    assert_equal(
        surrogate, gradient((weights * new.detach() * new.log() * f).sum(), world.agent)
    )  # E_π[∇log π f]


@given(one_state, st.floats(-100, 100))
@settings(max_examples=30)
def test_the_score_and_so_a_baseline_has_expectation_zero(world, baseline):
    """E_{a∼π}[∇log π(a | s)] = 0, hence E[∇log π · b(s)] = 0.

    "Policy gradient from first principles", section 3.
    """
    obs = world.batch.obs[0]
    actions, weights = all_actions(world.agent, world.old, obs)
    probabilities = (weights * density(world.agent, obs, actions)).detach()
    log_probs = world.agent.policy(obs).log_prob(actions)
    expectation = gradient((probabilities * log_probs).sum(), world.agent)
    size = max(
        gradient(log_prob, world.agent).abs().max() for log_prob in log_probs[:: len(actions) // 4]
    )
    assert expectation.abs().max() < 1e-9 * size
    assert (
        gradient((probabilities * log_probs * baseline).sum(), world.agent).abs().max()
        <= 1e-7 * size
    )


# --------------------------------- at the old policy all are one ----------------------------------


@given(at_theta_k, st.floats(0, 10), st.booleans())
@settings(max_examples=12)
def test_at_the_old_policy_all_objectives_have_the_vanilla_gradient(world, beta, norm_adv):
    """At θ = θ_k the gradient of L^PG, TRPO's, PPO-Clip's and PPO-KL's objective is E_t[∇log π Â].

    Â is the batch's, as it is: norm_adv is for rollouts. "Where is the policy gradient in PPO?",
    section 4, step 5.
    """
    _, agent, batch = world
    weighted = [a * score for a, score in zip(batch.advantages, scores(agent, batch))]
    expected = sum(weighted) / len(weighted)
    found = [gradient_in_update(vpg, agent, batch, norm_adv=norm_adv)]
    found += [gradient(trpo.surrogate(agent.policy(batch.obs), batch), agent)]
    found += [
        gradient_in_update(ppo_clip, agent, batch, norm_adv=norm_adv, form=form) for form in FORMS
    ]
    for penalty in ("adaptive", "fixed", "per-sample"):
        found += [
            gradient_in_update(ppo_kl, agent, batch, norm_adv=norm_adv, penalty=penalty, beta=beta)
        ]
    for one in found:
        assert_equal(one, expected)


@given(at_theta_k, st.sampled_from(FORMS))
@settings(max_examples=30)
def test_one_step_of_ppo_is_one_vanilla_step(world, form):
    """One epoch, one minibatch, plain gradient descent: θ_k + α E_t[∇log π Â].

    "Where does the ratio come from?".
    """
    before = torch.nn.utils.parameters_to_vector(policy_parameters(world.old)).detach()
    step = sum(
        a * score for a, score in zip(world.batch.advantages, scores(world.old, world.batch))
    )
    expected = before + 0.01 * step / len(world.batch.advantages)
    for script, options in (
        (vpg, {}),
        (ppo_clip, {"form": form}),
        (ppo_kl, {}),
        (ppo_kl, {"penalty": "per-sample"}),
    ):
        agent = copy.deepcopy(world.old)
        one_step = {"num_minibatches": 1, "value_epochs": 1} if script is vpg else ONE_STEP
        script.update(agent, descent(agent), world.batch, script.Args(**one_step, **options))
        assert_equal(
            torch.nn.utils.parameters_to_vector(policy_parameters(agent)).detach(), expected
        )


# ----------------------------------------- the partition ------------------------------------------


def region(ratio, advantage, clip_coef):
    """The set that a sample is in, by section 2 of arXiv 2606.23932.

    It leaves open where Â = 0 outside of the band belongs.
    """
    if 1 - clip_coef <= ratio <= 1 + clip_coef:
        return "in"
    if (ratio > 1 + clip_coef and advantage > 0) or (ratio < 1 - clip_coef and advantage < 0):
        return "kill"
    return "pass"


clip_coefs = st.one_of(st.sampled_from([0.0, 0.2, 0.5, 1.0]), st.floats(0, 1.5))


def next_to(edge):
    """A number's neighbours in double precision, and those of the nearest in single precision."""
    single = np.float32(edge)
    return *(math.nextafter(edge, x) for x in (0, 9)), *(
        float(np.nextafter(single, np.float32(x))) for x in (0, 9)
    )


@st.composite
def samples(draw):
    """(ratios, advantages, ε): ratios far outside of the band, in it, on and next to its edges."""
    clip_coef = draw(clip_coefs)
    edges = [x for edge in (1 - clip_coef, 1 + clip_coef) for x in (edge, *next_to(edge))]
    ratio = st.one_of(
        st.floats(1e-3, 1e3), st.floats(0.5, 2), st.sampled_from([x for x in edges if x > 1e-3])
    )
    pairs = draw(st.lists(st.tuples(ratio, advantage), min_size=3, max_size=6))
    return *(list(x) for x in zip(*pairs)), clip_coef


def with_ratios(world, ratios):
    """log π_θ of the first samples, and the given ratios, with the gradient that ratios have."""
    log_probs = world.agent.policy(world.batch.obs).log_prob(world.batch.actions)[: len(ratios)]
    return log_probs, torch.tensor(ratios, dtype=torch.float64) * (
        log_probs - log_probs.detach()
    ).exp()


six_samples = st.builds(
    make_world,
    kind=st.sampled_from(KINDS),
    seed=st.integers(0, 2**32),
    reach=st.just(0.1),
    advantages=st.just([1.0] * 6),
)


def clipped_surrogate(form, clip_coef, log_probs, ratio, advantages):
    args = ppo_clip.Args(form=form, clip_coef=clip_coef)
    return ppo_clip.clipped_surrogate(log_probs, ratio, advantages, args)


def gradient_of_the_definition(world, i, ratio, advantage, clip_coef):
    """Â ∇π_θ / π_old on I_in and I_pass, with π_old = π_θ / r; 0 on I_kill.

    Section 3 of arXiv 2606.23932.
    """
    probability = density(world.agent, world.batch.obs[i], world.batch.actions[i])
    whole = advantage * ratio / probability.item() * gradient(probability, world.agent)
    return 0 * whole if region(ratio, advantage, clip_coef) == "kill" else whole


@pytest.mark.parametrize("script", [ppo_clip, ppo_kl])
@given(samples())
@settings(max_examples=300)
def test_every_sample_is_in_one_set_of_the_partition(script, sample):
    """I_kill has no sample of I_in, so that I_pass is the rest. arXiv 2606.23932, section 2."""
    ratios, advantages, clip_coef = sample
    tensors = [torch.tensor(x, dtype=torch.float64) for x in (ratios, advantages)]
    kill = script.kill_mask(*tensors, clip_coef)
    is_in = (tensors[0] >= 1 - clip_coef) & (tensors[0] <= 1 + clip_coef)
    assert kill.dtype == torch.bool and not (kill & is_in).any()
    for i, (ratio, one) in enumerate(zip(ratios, advantages)):
        name = "in" if is_in[i] else "kill" if kill[i] else "pass"
        assert name == region(ratio, one, clip_coef)


@given(six_samples, samples())
@settings(max_examples=40)
def test_theorem_1_per_sample_the_gradient_is_zero_on_kill_and_whole_elsewhere(world, sample):
    """Each sample's gradient is Â ∇π_θ / π_old on I_in ∪ I_pass, and 0 on I_kill and only there.

    So it is in each of PPO-Clip's forms. Theorem 1 of arXiv 2606.23932. It corrects "Where is the
    policy gradient in PPO?", section 5, which has 0 wherever the ratio is outside of the band.
    """
    ratios, advantages, clip_coef = sample
    log_probs, ratio = with_ratios(world, ratios)
    tensors = log_probs, ratio, torch.tensor(advantages, dtype=torch.float64)
    for form in FORMS:
        objectives = clipped_surrogate(form, clip_coef, *tensors)
        for i, (ratio, one) in enumerate(zip(ratios, advantages)):
            found = gradient(objectives[i], world.agent)
            assert_equal(found, gradient_of_the_definition(world, i, ratio, one, clip_coef))
            if abs(one) > 1e-6:
                assert (found.abs().max() == 0) == (region(ratio, one, clip_coef) == "kill")


@given(six_samples, samples())
@settings(max_examples=20)
def test_theorem_1_per_sample_in_the_update_of_ppo_kl(world, sample):
    """The same of --penalty per-sample, in updates on one sample each, which is there twice."""
    ratios, advantages, clip_coef = sample
    log_probs, _ = with_ratios(world, ratios)
    options = {"penalty": "per-sample", "clip_coef": clip_coef}
    for i, (ratio, one) in enumerate(zip(ratios, advantages)):
        if min(abs(ratio - 1 + clip_coef), abs(ratio - 1 - clip_coef)) < 1e-9:
            continue  # update takes the ratio from logarithms, whose rounding decides here
        batch = ppo_clip.Batch(*(x[[i, i]] for x in world.batch))
        old_log_probs = log_probs[[i, i]].detach() - math.log(ratio)
        batch = batch._replace(
            log_probs=old_log_probs, advantages=torch.full_like(old_log_probs, one)
        )
        found = gradient_in_update(ppo_kl, world.agent, batch, **options)
        assert_equal(found, gradient_of_the_definition(world, i, ratio, one, clip_coef))
        if abs(one) > 1e-6:
            assert (found.abs().max() == 0) == (region(ratio, one, clip_coef) == "kill")


@given(worlds, clip_coefs)
@settings(max_examples=40)
def test_theorem_1_for_the_batch_at_every_new_policy(world, clip_coef):
    """∇L_CLIP(θ′) = ∇L_KL(θ′) = (1/N) Σ of the definition's gradients, in the scripts' updates."""
    _, agent, batch = world
    expected = 0
    for i, (old_log_prob, one) in enumerate(
        zip(batch.log_probs.tolist(), batch.advantages.tolist())
    ):
        ratio = density(agent, batch.obs[i], batch.actions[i]).item() / math.exp(old_log_prob)
        if min(abs(ratio - 1 + clip_coef), abs(ratio - 1 - clip_coef)) < 1e-9 or ratio < 1e-300:
            return  # rounding decides between two sets (at θ_k with ε = 0), or density underflows
        expected = expected + gradient_of_the_definition(world, i, ratio, one, clip_coef) / len(
            batch.obs
        )
    options = {"clip_coef": clip_coef}
    for form in FORMS:
        assert_equal(gradient_in_update(ppo_clip, agent, batch, form=form, **options), expected)
    per_sample = gradient_in_update(ppo_kl, agent, batch, penalty="per-sample", **options)
    assert_equal(per_sample, expected)


@given(samples(), st.lists(st.floats(-5, 5).filter(bool), min_size=6, max_size=6))
def test_theorem_1_the_coefficient_of_each_sample(sample, log_probs):
    """β_t = −r Â on I_kill and 0 on I_in ∪ I_pass, a constant to the gradient."""
    ratios, advantages, clip_coef = sample
    lists = log_probs[: len(ratios)], ratios, advantages
    tensors = [torch.tensor(x, dtype=torch.float64, requires_grad=True) for x in lists]
    objectives = clipped_surrogate("beta", clip_coef, *tensors)
    betas, slopes = torch.autograd.grad(objectives.sum(), tensors[:2], materialize_grads=True)
    assert slopes.tolist() == advantages  # of r Â alone
    for beta, value, log_prob, ratio, one in zip(betas, objectives, *lists):
        expected = -ratio * one if region(ratio, one, clip_coef) == "kill" else 0.0
        assert beta.item() == pytest.approx(expected, rel=1e-12)
        size = abs(ratio * one) * (1 + abs(log_prob))
        assert abs(value.item() - (ratio * one + expected * log_prob)) <= 1e-12 * size


def test_per_sample_penalty_has_the_value_of_theorem_1(monkeypatch):
    """The loss is the mean of −(r Â + β_t log π), which no gradient shows."""
    world = make_world(
        "discrete", 3, reach=0.1, advantages=[2.0, -1.0, 0.5, -2.0, 1.0, -0.5, 3.0, -1.5]
    )
    losses, backward = [], torch.Tensor.backward
    monkeypatch.setattr(torch.Tensor, "backward", lambda x: (losses.append(x.item()), backward(x)))
    args = ppo_kl.Args(**ONE_STEP, vf_coef=0.0, penalty="per-sample")
    ppo_kl.update(world.agent, Recorder(world.agent), world.batch, args)
    expected, regions = 0.0, []
    for obs, action, old_log_prob, one in zip(*world.batch[:3], world.batch.advantages.tolist()):
        probability = density(world.agent, obs, action).item()
        ratio = probability / math.exp(old_log_prob)
        regions.append(region(ratio, one, 0.2))
        beta = -ratio * one if regions[-1] == "kill" else 0.0
        expected -= (ratio * one + beta * math.log(probability)) / len(world.batch.obs)
    assert losses == [pytest.approx(expected, rel=1e-9)]
    assert set(regions) == {"in", "kill", "pass"}


def test_each_form_is_made_of_its_own_penalty(monkeypatch):
    """Else it would say nothing that they train alike. Without I_kill phi and beta are r Â."""
    tensors = torch.tensor([[-0.5, -0.7, -2.0], [2.0, 0.5, 1.1], [1.0, -1.0, 3.0]])
    log_probs, ratio, advantages = tensors
    clipped = torch.tensor([1.2, -0.8, 3.3])
    both = torch.where(advantages == 3, 1, 1 - log_probs) * ratio * advantages  # 1.1 is in the band
    for form, expected in (("min", clipped), ("phi", clipped), ("beta", both)):
        torch.testing.assert_close(clipped_surrogate(form, 0.2, *tensors), expected)
    nobody = torch.zeros(3, dtype=torch.bool)
    monkeypatch.setattr(ppo_clip, "kill_mask", lambda *_: nobody)
    for form, expected in (
        ("min", clipped),
        ("phi", ratio * advantages),
        ("beta", ratio * advantages),
    ):
        torch.testing.assert_close(clipped_surrogate(form, 0.2, *tensors), expected)


@given(samples())
@settings(max_examples=300)
def test_theorem_2_the_clip_is_a_penalty_on_the_ratio(sample):
    """min(r Â, clip(r) Â) = r Â − Φ(r, Â) as values, and Φ ≥ 0. Theorem 2 of arXiv 2606.23932."""
    ratios, advantages, clip_coef = sample
    tensors = [torch.tensor(x, dtype=torch.float64) for x in (ratios, advantages)]
    log_probs = torch.zeros(len(ratios), dtype=torch.float64)
    minima, differences = (
        clipped_surrogate(x, clip_coef, log_probs, *tensors) for x in ("min", "phi")
    )
    for i, (ratio, one) in enumerate(zip(ratios, advantages)):
        clipped = min(ratio * one, max(min(ratio, 1 + clip_coef), 1 - clip_coef) * one)
        penalty = 0.0
        if ratio > 1 + clip_coef and one > 0:
            penalty = (ratio - (1 + clip_coef)) * one
        if ratio < 1 - clip_coef and one < 0:
            penalty = (ratio - (1 - clip_coef)) * one
        assert penalty >= 0
        assert minima[i].item() == clipped
        rounding = 1e-12 * abs(ratio * one) + 1e-300
        assert differences[i].item() == pytest.approx(clipped, rel=1e-12, abs=rounding)
        assert ratio * one - differences[i].item() == pytest.approx(
            penalty, rel=1e-12, abs=rounding
        )


def test_one_coefficient_for_all_samples_cannot_do_what_the_clip_does():
    """No scalar β gives PPO-KL the gradient of PPO-Clip at this θ′. It may weigh the KL or log π.

    The gradient is affine in β, so that the nearest one is a projection. arXiv 2606.23932 needs a
    β_t for each sample.
    """
    world = make_world(
        "discrete", 3, reach=0.1, advantages=[2.0, -1.0, 0.5, -2.0, 1.0, -0.5, 3.0, -1.5]
    )
    _, agent, batch = world
    target = gradient_in_update(ppo_clip, agent, batch)
    unpenalised, penalised, at_two = (
        gradient_of_ppo_kl_at(world, beta) for beta in (0.0, 1.0, 2.0)
    )
    assert_equal(at_two, 2 * penalised - unpenalised)  # affine
    old, new = (x.policy.mlp(batch.obs).log_softmax(-1) for x in (world.old, agent))
    kl = (old.exp() * (old - new)).sum(-1).mean()
    assert_equal(penalised - unpenalised, -gradient(kl, agent))  # exact
    for slope in (penalised - unpenalised, sum(scores(agent, batch)) / len(batch.obs)):
        assert slope.norm() > 0.01
        best_beta = (target - unpenalised) @ slope / (slope @ slope)
        nearest = unpenalised + best_beta * slope
        assert (nearest - target).norm() > 0.3 * target.norm()
    per_sample = gradient_in_update(ppo_kl, agent, batch, penalty="per-sample")
    assert_equal(per_sample, target)


@given(samples(), st.integers(1, 1000), st.integers(0, 2**32))
@settings(max_examples=300)
def test_the_forms_have_one_gradient_to_the_bit_in_float32(sample, batch_size, seed):
    """For any number of samples in the mean: a power of 2 would hide the rounding."""
    ratios, advantages, clip_coef = sample
    ratios, advantages = torch.tensor(ratios), torch.tensor(advantages)
    found = []
    for form in FORMS:
        generator = torch.Generator().manual_seed(seed)
        log_probs = torch.randn(len(ratios), generator=generator, requires_grad=True)
        ratio = ratios * (log_probs - log_probs.detach()).exp()
        objective = clipped_surrogate(form, clip_coef, log_probs, ratio, advantages)
        (grad,) = torch.autograd.grad(-objective.sum() / batch_size, log_probs)
        found.append(grad)
    assert all(torch.equal(grad, found[0]) for grad in found)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("norm_adv", [False, True])
@given(st.integers(30, 60), st.integers(0, 2**32), st.floats(0.05, 0.3))
@settings(max_examples=10)
def test_the_updates_have_one_gradient_to_the_bit_in_float32(kind, norm_adv, size, seed, clip_coef):
    """PPO-Clip's in each form and PPO-KL's with --penalty per-sample, with whatever is in them."""
    rng = np.random.default_rng(seed)
    world = make_world(kind, seed, reach=0.3, advantages=rng.standard_normal(size))
    agent = world.agent.float()
    batch = ppo_clip.Batch(*(x if x.dtype == torch.int64 else x.float() for x in world.batch))
    options = {"norm_adv": norm_adv, "clip_coef": clip_coef}
    calls = [(ppo_clip, {"form": form}) for form in FORMS] + [(ppo_kl, {"penalty": "per-sample"})]
    found = []
    for script, choice in calls:
        torch.manual_seed(0)
        found.append(gradient_in_update(script, agent, batch, **choice, **options))
    assert found[0].abs().max() > 0
    assert all(torch.equal(one, found[0]) for one in found)


@pytest.mark.parametrize("edge", [np.float32(0.8), np.float32(1.2)])
@pytest.mark.parametrize("form", FORMS)
def test_a_ratio_just_off_the_band_is_killed_or_passed_whole(edge, form):
    """Where r Â and clip(r) Â round to one number, torch.min would share out the gradient."""
    rng = np.random.default_rng(0)
    off = np.nextafter(edge, np.float32(9 if edge > 1 else 0))
    tied = [x for x in rng.standard_normal(1000).astype(np.float32) if off * x == edge * x]
    assert min(tied) < 0 < max(tied)
    for one in tied:
        log_prob = torch.zeros(1, requires_grad=True)
        ratio = torch.tensor([off]) * log_prob.exp()
        objective = clipped_surrogate(form, 0.2, log_prob, ratio, torch.tensor([one]))
        (grad,) = torch.autograd.grad(objective.sum(), log_prob)
        killed = (edge > 1) == (one > 0)
        assert grad.item() == (0.0 if killed else np.float32(off * one))


# ------------------------------ the forms and the partition in a run ------------------------------


RUNS = [(env, seed) for env in ("CartPole-v1", "Pendulum-v1") for seed in (1, 2, 3)]


@pytest.fixture(autouse=True)
def in_empty_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


@pytest.mark.parametrize("env, seed", [*RUNS, ("toys:MatrixAction-v0", 2)])
def test_the_four_forms_train_identically_to_the_bit(env, seed, monkeypatch):
    """A whole run each, many of whose ratios leave the band on either side.

    Theorems 1 and 2 of arXiv 2606.23932.
    """
    options = {"env": env, "seed": seed, "quiet": True, "total_timesteps": 2_400}
    options |= {"num_envs": 7, "num_steps": 40, "learning_rate": 5e-3}
    options |= {"update_epochs": 5, "clip_coef": 0.1, "ent_coef": 0.02}
    options |= {"norm_adv": seed < 3, "norm_reward": env == "Pendulum-v1"}
    sums, clipped_surrogate = {form: [] for form in FORMS}, ppo_clip.clipped_surrogate

    def noted(*tensors_and_args):
        objectives = clipped_surrogate(*tensors_and_args)
        sums[tensors_and_args[-1].form].append(objectives.sum().item())
        return objectives

    monkeypatch.setattr(ppo_clip, "clipped_surrogate", noted)
    for form in FORMS:
        ppo_clip.train(ppo_clip.Args(run_dir=form, form=form, target_kl=None, **options))
    ppo_kl.train(ppo_kl.Args(run_dir="per-sample", penalty="per-sample", **options))
    folders, tables, weights = (*FORMS, "per-sample"), [], []
    for folder in folders:
        with open(Path(folder, "metrics.csv"), newline="") as file:
            tables.append(list(csv.DictReader(file)))
        weights.append(torch.load(Path(folder, "checkpoint.pt"), weights_only=True)["agent"])
    assert len(tables[0]) > 8
    shared = [x for x in tables[0][0] if x in tables[3][0] and x not in ("wall_time", "SPS")]
    metrics = {"surrogate", "entropy", "approx_kl", "value_loss", "explained_variance"}
    assert metrics < {*shared}
    for folder, table, found in zip(folders, tables, weights):
        columns = shared if folder == "per-sample" else [*shared, "clipfrac", "frac_kill"]
        rows = [[row[name] for name in columns] for row in table]
        assert rows == [[row[name] for name in columns] for row in tables[0]], folder
        assert found.keys() == weights[0].keys()
        for name, tensor in weights[0].items():
            assert torch.equal(found[name], tensor), f"{folder}: {name}"
    kills, clips = (sum(float(row[x]) for row in tables[0]) for x in ("frac_kill", "clipfrac"))
    assert min(kills, clips - kills) > 0.01 * len(tables[0])  # I_kill and I_pass
    assert sums["beta"] != sums["min"]  # another value, with the same gradient
    assert sums["phi"] == pytest.approx(sums["min"], rel=1e-3, abs=1e-3)


@pytest.mark.parametrize("norm_adv", [False, True])
@given(worlds, st.integers(1, 3))
@settings(max_examples=20)
def test_rows_log_the_partition(norm_adv, world, num_minibatches):
    """frac_kill is the share of I_kill, and clipfrac that of I_kill and I_pass together.

    Both are of the policy after the update, over the whole rollout, with the batch's advantages.
    """
    _, agent, batch = world
    log_probs = [log_density(agent, *x).item() for x in zip(batch.obs, batch.actions)]
    ratios = np.exp(np.array(log_probs) - batch.log_probs.numpy())
    if any(abs(abs(ratios - 1) - 0.2) < 1e-9):
        return
    agent = copy.deepcopy(world.old)  # the first step takes it to the other one
    args = ppo_clip.Args(**ONE_STEP | {"num_minibatches": num_minibatches}, norm_adv=norm_adv)
    metrics = ppo_clip.update(agent, Jump(agent, world.agent), batch, args)
    regions = [region(ratio, one, 0.2) for ratio, one in zip(ratios, batch.advantages.tolist())]
    shares = {name: regions.count(name) / len(regions) for name in ("in", "kill", "pass")}
    assert list(metrics) == ["clipfrac", "frac_kill"]
    assert metrics["frac_kill"] == pytest.approx(shares["kill"])
    assert 1 - metrics["clipfrac"] == pytest.approx(shares["in"])
    assert metrics["clipfrac"] - metrics["frac_kill"] == pytest.approx(shares["pass"])


@pytest.mark.parametrize("script", [vpg, trpo, ppo_clip, ppo_kl])
@given(worlds)
@settings(max_examples=20)
def test_rows_log_the_surrogate_and_the_divergence_of_the_definition(script, world):
    """The means of (r − 1) Â and of r − 1 − log r, from the densities; the entropy from them."""
    _, agent, batch = world
    log_probs = [log_density(agent, *x).item() for x in zip(batch.obs, batch.actions)]
    log_ratios = np.array(log_probs) - batch.log_probs.numpy()
    ratios = np.exp(log_ratios)
    if agent.policy.discrete:
        actions = torch.arange(4)
        each = torch.stack([log_density(agent, obs, actions) for obs in batch.obs]).detach()
        entropy = -(each.exp() * each).sum(dim=1).mean().item()
    else:
        entropy = (agent.policy.log_std + 0.5 * math.log(2 * math.pi * math.e)).sum().item()
    metrics = script.measure(agent, batch)
    surrogate = np.mean((ratios - 1) * batch.advantages.numpy())
    assert metrics["surrogate"] == pytest.approx(surrogate, rel=1e-6, abs=1e-12)
    assert metrics["approx_kl"] == pytest.approx(
        np.mean(ratios - 1 - log_ratios), rel=1e-6, abs=1e-12
    )
    assert metrics["entropy"] == pytest.approx(entropy, rel=1e-6)


@pytest.mark.parametrize("num_epochs, num_minibatches", [(1, 1), (1, 3), (2, 2)])
def test_metrics_are_those_after_the_last_step(num_epochs, num_minibatches):
    """However many steps an update takes, its shares are those of the policy that it leaves."""
    world = make_world("discrete", seed=6, reach=0.3, advantages=[1.0, 1.1, 1.2, 1.3, -5.0, 1.5])
    agent, batch = copy.deepcopy(world.old), world.batch
    steps = {"update_epochs": num_epochs, "num_minibatches": num_minibatches}
    args = ppo_clip.Args(**ONE_STEP | steps, clip_coef=0.05)
    metrics = ppo_clip.update(agent, descent(agent, 0.3), batch, args)
    ratios = [
        (density(agent, *x) / density(world.old, *x)).item() for x in zip(batch.obs, batch.actions)
    ]
    regions = [region(ratio, one, 0.05) for ratio, one in zip(ratios, batch.advantages.tolist())]
    assert metrics["clipfrac"] == pytest.approx(1 - regions.count("in") / 6)
    assert metrics["frac_kill"] == pytest.approx(regions.count("kill") / 6) and "kill" in regions


# --------------------------------- advantages, and the two errors ---------------------------------


@st.composite
def trajectories(draw):
    """Rewards (T, 1), values (T + 1, 1) and both kinds of ends of one environment, and γ."""
    length = draw(st.integers(1, 12))
    numbers = st.lists(st.floats(-10, 10), min_size=length, max_size=length)
    ends = draw(
        st.lists(
            st.sampled_from(["", "", "", "terminated", "truncated"]),
            min_size=length,
            max_size=length,
        )
    )
    columns = (
        draw(numbers),
        [*draw(numbers), draw(st.floats(-10, 10))],
        *([e == x for e in ends] for x in ("terminated", "truncated")),
    )
    return *(np.array(column)[:, None] for column in columns), draw(st.floats(0, 1))


@given(trajectories())
def test_gae_with_lambda_0_is_the_temporal_difference(trajectory):
    """Â_t = r_t + γ V(s_{t+1}) − V(s_t), without V(s_{t+1}) behind a termination.

    Schulman et al. 2016, eq. 17.
    """
    rewards, values, terminations, truncations, gamma = trajectory
    advantages, _ = gae_fast.gae(rewards, values, terminations, truncations, gamma, 0.0)
    for t in range(len(rewards)):
        ahead = 0.0 if terminations[t, 0] else gamma * values[t + 1, 0]
        assert advantages[t, 0] == pytest.approx(rewards[t, 0] + ahead - values[t, 0], abs=1e-9)


@given(trajectories())
def test_gae_with_lambda_1_is_the_return_minus_the_value(trajectory):
    """Â_t = Σ_k γ^k r_{t+k} + γ^n V(s_{t+n}) − V(s_t), up to the episode's end or the last step.

    V behind a truncation counts, V behind a termination does not. Schulman et al. 2016, eq. 18;
    Pardo et al. 2018.
    """
    rewards, values, terminations, truncations, gamma = trajectory
    advantages, returns = gae_fast.gae(rewards, values, terminations, truncations, gamma, 1.0)
    for t in range(len(rewards)):
        total, discount = 0.0, 1.0
        for k in range(t, len(rewards)):
            total, discount = total + discount * rewards[k, 0], discount * gamma
            if terminations[k, 0] or truncations[k, 0]:
                break
        total += 0.0 if terminations[k, 0] else discount * values[k + 1, 0]
        assert returns[t, 0] == pytest.approx(total, abs=1e-6)
        assert advantages[t, 0] == pytest.approx(total - values[t, 0], abs=1e-6)


def test_an_action_of_i_pass_is_brought_back_and_one_of_i_kill_is_left():
    """clipfrac counts both; ascent on PPO-Clip's objective moves one of them and not the other."""
    world = make_world("discrete", seed=0, reach=0.0, advantages=[-1.0])
    sample = ppo_clip.Batch(*(x[[0, 0]] for x in world.batch))
    args = ppo_clip.Args(**ONE_STEP)
    for one, moves in ((-1.0, True), (1.0, False)):
        agent = copy.deepcopy(world.old)
        # π_old had given the action half of its present probability: r = 2.
        old_log_probs = sample.log_probs - math.log(2)
        batch = sample._replace(log_probs=old_log_probs, advantages=sample.advantages * -one)
        ratios = []
        for _ in range(50):
            probability = density(agent, batch.obs[0], batch.actions[0]).item()
            ratios.append(probability / old_log_probs[0].exp().item())
            metrics = ppo_clip.update(agent, descent(agent, 1e-4), batch, args)
            assert metrics == {"clipfrac": 1.0, "frac_kill": float(not moves)}
        assert ratios[0] == pytest.approx(2)
        if moves:
            assert ratios == sorted(ratios, reverse=True) and ratios[-1] < 1.9
        else:
            assert set(ratios) == {ratios[0]}
