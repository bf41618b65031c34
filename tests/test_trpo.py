"""trpo.py: the natural gradient and the line search, each against its definition."""

import math

import gymnasium
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.func import functional_call

import trpo
from trpo import Agent, Args, Batch, Episodes, make_envs, make_optimizers, rollout, update

BOX, DISCRETE = gymnasium.spaces.Box(-1, 1, (2,)), gymnasium.spaces.Discrete(3)
OBS = gymnasium.spaces.Box(-1, 1, (3,))
each_kind = pytest.mark.parametrize("action_space", [DISCRETE, BOX], ids=["discrete", "continuous"])


@pytest.fixture
def small(monkeypatch):
    """Networks of one hidden layer of 4, so that their Hessians can be written out."""
    monkeypatch.setattr(trpo, "mlp", lambda i, o, head_gain: nn.Sequential(nn.Linear(i, 4), nn.Tanh(), nn.Linear(4, o)))


def make_batch(action_space, size=50, seed=0):
    """A float64 agent and a batch of random observations, its own actions and random advantages."""
    torch.manual_seed(seed)
    agent = Agent(OBS, action_space, norm_obs=False).double()
    obs, advantages = torch.randn(size, 3, dtype=torch.float64), torch.randn(size, dtype=torch.float64)
    with torch.no_grad():
        policy = agent.policy(obs)
        actions = policy.sample()
        return agent, Batch(obs, actions, policy.log_prob(actions), agent.value(obs), advantages, advantages)


def policy_of(agent):
    return {name: x for name, x in agent.named_parameters() if not name.startswith("critic.")}


def mean_kl(agent, obs, old, new):
    """KL(π_old ‖ π_new) from the textbook, of the parameters old and new, averaged over obs."""
    old_output, new_output = (
        functional_call(agent.actor, {n.removeprefix("actor."): p for n, p in x.items() if n != "log_std"}, obs)
        for x in (old, new)
    )
    if agent.discrete:
        p, log_p, log_q = old_output.softmax(-1), old_output.log_softmax(-1), new_output.log_softmax(-1)
        return (p * (log_p - log_q)).sum(-1).mean()
    var, new_var = (2 * old["log_std"]).exp(), (2 * new["log_std"]).exp()
    of_each = (new_var / var).log() / 2 + (var + (old_output - new_output).square()) / (2 * new_var) - 0.5
    return of_each.sum(-1).mean()


def surrogate_of(agent, batch):
    log_probs = agent.policy(batch.obs).log_prob(batch.actions)
    return sum(math.e ** (log_probs - batch.log_probs) * batch.advantages).item() / len(batch.obs)


@each_kind
def test_fisher_vector_product_is_that_of_the_kls_hessian(action_space, small):
    agent, batch = make_batch(action_space)
    parameters = policy_of(agent)
    old = {name: x.detach().clone() for name, x in parameters.items()}
    sizes = [x.numel() for x in old.values()]

    def kl_of_vector(vector):
        parts = vector.split(sizes)
        return mean_kl(agent, batch.obs, old, {n: p.view_as(old[n]) for n, p in zip(old, parts)})

    vector = torch.cat([x.flatten() for x in old.values()])
    hessian = torch.autograd.functional.hessian(kl_of_vector, vector)
    assert torch.linalg.eigvalsh(hessian).min() > -1e-12 and hessian.abs().max() > 0.01

    product = trpo.fisher_vector_product(agent.policy(batch.obs), list(parameters.values()), damping=0.3)
    for i in range(3):
        v = torch.randn(len(vector), dtype=torch.float64, generator=torch.Generator().manual_seed(i))
        torch.testing.assert_close(product(v), hessian @ v + 0.3 * v)


@given(st.integers(1, 12), st.integers(0, 2**32 - 1))
def test_conjugate_gradients_solve_the_linear_system(size, seed):
    generator = torch.Generator().manual_seed(seed)
    root = torch.randn(size, size, dtype=torch.float64, generator=generator)
    matrix, b = root @ root.T + torch.eye(size), torch.randn(size, dtype=torch.float64, generator=generator)
    solution = torch.linalg.solve(matrix, b)
    found = trpo.conjugate_gradients(lambda v: matrix @ v, b, iterations=4 * size)
    torch.testing.assert_close(found, solution, rtol=1e-3, atol=1e-4)
    error = found - solution
    assert error @ matrix @ error <= 1e-8 * (solution @ matrix @ solution)


def test_conjugate_gradients_get_nearer_with_each_iteration_and_stop_when_done():
    root = torch.randn(30, 30, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    matrix, b = root @ root.T + torch.eye(30), torch.ones(30, dtype=torch.float64)
    solution = torch.linalg.solve(matrix, b)
    errors = [trpo.conjugate_gradients(lambda v: matrix @ v, b, n) - solution for n in range(0, 25, 4)]
    norms = [(error @ matrix @ error).item() for error in errors]
    assert norms == sorted(norms, reverse=True) and norms[-1] < 1e-3 * norms[0]
    products = []
    trpo.conjugate_gradients(lambda v: (products.append(v), v)[1], b, 100)  # the identity: one iteration is exact
    assert len(products) == 1
    assert torch.equal(trpo.conjugate_gradients(lambda v: v, torch.zeros(5), 10), torch.zeros(5))


@each_kind
@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("target_kl", [0.001, 0.1])
def test_step_improves_the_surrogate_within_the_ball(action_space, seed, target_kl):
    agent, batch = make_batch(action_space, seed=seed)
    old = {name: x.detach().clone() for name, x in policy_of(agent).items()}
    before = surrogate_of(agent, batch)
    args = Args(target_kl=target_kl, norm_adv=False, num_minibatches=1)
    metrics = update(agent, make_optimizers(agent, args), batch, args)
    kl = mean_kl(agent, batch.obs, old, policy_of(agent)).item()
    improvement = surrogate_of(agent, batch) - before
    assert metrics["accepted"] == 1 and 1 <= metrics["line_search_steps"] <= 10
    assert 0 < kl <= target_kl and improvement > 0
    assert metrics["kl"] == pytest.approx(kl) and metrics["surrogate_improvement"] == pytest.approx(improvement)
    assert metrics["policy_loss"] == pytest.approx(-before)


@each_kind
def test_undamped_step_ends_on_the_edge_of_the_ball(action_space, small):
    """Where the quadratic model holds, which is near θ_old, the KL of √(2δ / xᵀHx) x is δ."""
    agent, batch = make_batch(action_space, size=500)
    options = {"cg_damping": 0.0, "cg_iters": 100, "line_search_decay": 0.99}
    args = Args(target_kl=1e-10, norm_adv=False, num_minibatches=1, **options)
    metrics = update(agent, make_optimizers(agent, args), batch, args)
    assert metrics["accepted"] == 1 and metrics["kl"] == pytest.approx(1e-10, rel=0.05)


@each_kind
def test_batch_on_which_no_step_can_leaves_every_bit_alone(action_space):
    for advantages, options in [
        (torch.zeros(50), {}),  # no direction
        (None, {"target_kl": 1e308, "line_search_steps": 1}),  # so far that the surrogate is not a number
    ]:
        agent, batch = make_batch(action_space)
        if advantages is not None:
            batch = batch._replace(advantages=advantages.double())
        before = {name: x.detach().clone() for name, x in policy_of(agent).items()}
        args = Args(norm_adv=False, num_minibatches=1, **options)
        metrics = update(agent, make_optimizers(agent, args), batch, args)
        for name, parameter in policy_of(agent).items():
            assert torch.equal(parameter, before[name]), name
        assert metrics["accepted"] == metrics["kl"] == metrics["surrogate_improvement"] == 0
        assert metrics["line_search_steps"] == args.line_search_steps
        assert metrics["approx_kl"] == pytest.approx(0, abs=1e-12)


def test_advantages_that_are_not_finite_stop_the_run_and_leave_every_bit_alone():
    agent, batch = make_batch(DISCRETE)
    before = {name: x.detach().clone() for name, x in policy_of(agent).items()}
    args = Args(norm_adv=False, num_minibatches=1)
    with pytest.raises(trpo.RunError, match="there is NaN or infinity in loss"):
        update(agent, make_optimizers(agent, args), batch._replace(advantages=batch.advantages * torch.inf), args)
    assert all(torch.equal(x, before[name]) for name, x in policy_of(agent).items())


@each_kind
def test_policy_lies_in_memory_from_the_start_as_an_update_leaves_it(action_space):
    """Else the first update, and the first of a resumed run, would round in another order than the others."""
    agent, batch = make_batch(action_space)
    args = Args(norm_adv=False, num_minibatches=1)
    layouts, optimizers = [], make_optimizers(agent, args)
    for _ in range(2):
        layouts.append([parameter.storage_offset() for parameter in policy_of(agent).values()])
        assert len({parameter.untyped_storage().data_ptr() for parameter in policy_of(agent).values()}) == 1
        metrics = update(agent, optimizers, batch, args)
    assert metrics["accepted"] and layouts[0] == layouts[1] and len(set(layouts[0])) == len(layouts[0])


def test_step_that_overshoots_is_refused_although_it_is_in_the_ball():
    """With a wide ball the first step has a KL of 88 out of 100, and a worse surrogate."""
    agent, batch = make_batch(DISCRETE, size=20)
    before = {name: x.detach().clone() for name, x in policy_of(agent).items()}
    options = {"target_kl": 100.0, "cg_damping": 1e-4, "cg_iters": 50, "line_search_steps": 1}
    args = Args(norm_adv=False, num_minibatches=1, **options)
    assert update(agent, make_optimizers(agent, args), batch, args)["accepted"] == 0
    assert all(torch.equal(x, before[name]) for name, x in policy_of(agent).items())


def test_line_search_shortens_until_both_conditions_hold():
    """Too long a first step: the KL of the accepted one is within δ, that of the one before was not, or lost."""
    agent, batch = make_batch(BOX, size=30)
    args = Args(target_kl=3.0, norm_adv=False, num_minibatches=1, cg_damping=1e-6, cg_iters=50, line_search_steps=40)
    twin, _ = make_batch(BOX, size=30)
    metrics = update(agent, make_optimizers(agent, args), batch, args)
    assert metrics["accepted"] == 1 and metrics["line_search_steps"] > 1 and metrics["kl"] <= 3.0
    fewer = {"line_search_steps": metrics["line_search_steps"] - 1}
    rejected = update(twin, make_optimizers(twin, args), batch, Args(**{**vars(args), **fewer}))
    assert rejected["accepted"] == 0


class Rescaled(nn.Module):
    """A linear layer whose weight and bias are c times this module's parameters: other coordinates of one function."""

    def __init__(self, linear, c):
        super().__init__()
        self.c = c
        self.weight, self.bias = nn.Parameter(linear.weight.detach() / c), nn.Parameter(linear.bias.detach() / c)

    def forward(self, x):
        return nn.functional.linear(x, self.c * self.weight, self.c * self.bias)


@each_kind
def test_natural_gradient_does_not_depend_on_the_parameters_scale_as_the_plain_one_does(action_space, small):
    natural, plain = [], []
    for c in (1.0, 10.0):
        agent, batch = make_batch(action_space)
        agent.actor[-1] = Rescaled(agent.actor[-1], c)
        loss = -(agent.policy(batch.obs).log_prob(batch.actions) * batch.advantages).mean()
        parameters = policy_of(agent)
        gradients = torch.autograd.grad(loss, list(parameters.values()))
        args = Args(target_kl=1e-10, norm_adv=False, num_minibatches=1, cg_damping=0.0, cg_iters=200)
        update(agent, make_optimizers(agent, args), batch, args)
        natural.append(agent.actor(batch.obs).detach())
        agent, _ = make_batch(action_space)
        agent.actor[-1] = Rescaled(agent.actor[-1], c)
        with torch.no_grad():
            for parameter, gradient in zip(policy_of(agent).values(), gradients):
                parameter -= 0.001 * gradient
        plain.append(agent.actor(batch.obs).detach())
    start = make_batch(action_space)[0].actor(batch.obs).detach()
    torch.testing.assert_close(natural[0] - start, natural[1] - start, rtol=1e-2, atol=1e-8)
    assert (natural[0] - start).abs().max() > 1e-6
    assert (plain[1] - start).norm() > 10 * (plain[0] - start).norm()


@each_kind
def test_exact_kl_is_the_mean_log_ratio_over_many_samples(action_space):
    agent, batch = make_batch(action_space, size=20)
    other, _ = make_batch(action_space, size=20, seed=1)
    nn.init.normal_(agent.actor[-1].weight)
    if not agent.discrete:
        nn.init.constant_(other.log_std, 0.4)
    with torch.no_grad():
        old, new = agent.policy(batch.obs), other.policy(batch.obs)
        samples = [old.sample() for _ in range(40_000)]
        log_ratios = torch.stack([(old.log_prob(x) - new.log_prob(x)).mean() for x in samples])
    standard_error = log_ratios.std() / math.sqrt(len(log_ratios))
    exact = trpo.kl_divergence(old, new).mean()
    assert abs(log_ratios.mean() - exact) < 4 * standard_error < 0.05 * exact


def test_rows_log_the_step():
    args = Args(num_envs=4, num_steps=32)
    torch.manual_seed(1)
    envs = make_envs(args)
    agent = Agent(envs.single_observation_space, envs.single_action_space, args.norm_obs)
    metrics = update(agent, make_optimizers(agent, args), rollout(envs, agent, Episodes(envs, 1), args), args)
    columns = "policy_loss value_loss entropy approx_kl kl surrogate_improvement line_search_steps accepted"
    assert list(metrics) == [*columns.split(), "explained_variance"]
    assert metrics["kl"] <= args.target_kl and metrics["approx_kl"] == pytest.approx(metrics["kl"], rel=0.5)
