"""trpo.py: the natural gradient and the line search, each against its definition."""

import itertools
import math
from types import SimpleNamespace

import pytest
import torch
from gymnasium.spaces import Box, Discrete
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.func import functional_call

import trpo
from trpo import Agent, Args, Batch, make_envs, make_optimizer, measure, rollouts, train, update

BOX, DISCRETE, OBS = Box(-1, 1, (2,)), Discrete(3), Box(-1, 1, (3,))
each_kind = pytest.mark.parametrize("action_space", [DISCRETE, BOX], ids=["discrete", "continuous"])


@pytest.fixture
def small(monkeypatch):
    """Networks of one hidden layer of 4, so that their Hessians can be written out."""

    def mlp(*sizes, head_gain):
        return nn.Sequential(nn.Linear(sizes[0], 4), nn.Tanh(), nn.Linear(4, sizes[-1]))

    monkeypatch.setattr(trpo, "mlp", mlp)


def make_batch(action_space, size=50, seed=0):
    """A float64 agent and a batch of random observations, its own actions, random advantages."""
    torch.manual_seed(seed)
    spaces = {"single_observation_space": OBS, "single_action_space": action_space}
    agent = Agent(SimpleNamespace(**spaces), norm_obs=False).double()
    obs = torch.randn(size, 3, dtype=torch.float64)
    advantages = torch.randn(size, dtype=torch.float64)
    with torch.no_grad():
        policy = agent.policy(obs)
        actions = policy.sample()
    return agent, Batch(obs, actions, policy.log_prob(actions), advantages, advantages)


def make_args(**options):
    """Args of an update on all samples at once."""
    return Args(num_minibatches=1, **options)


def policy_of(agent):
    return dict(agent.policy.named_parameters())


def copies(agent):
    return {name: x.detach().clone() for name, x in policy_of(agent).items()}


def is_as_before(agent, before):
    return all(torch.equal(x, before[name]) for name, x in policy_of(agent).items())


def mean_kl(agent, obs, old, new):
    """KL(π_old ‖ π_new) from the textbook, of the parameters old and new, averaged over obs."""

    def output(parameters):
        of_mlp = {n.removeprefix("mlp."): x for n, x in parameters.items() if n != "log_std"}
        return functional_call(agent.policy.mlp, of_mlp, obs)

    p, q = output(old), output(new)
    if agent.policy.discrete:
        return (p.softmax(-1) * (p.log_softmax(-1) - q.log_softmax(-1))).sum(-1).mean()
    var, new_var = (2 * old["log_std"]).exp(), (2 * new["log_std"]).exp()
    of_each = (new_var / var).log() / 2 + (var + (p - q).square()) / (2 * new_var) - 0.5
    return of_each.sum(-1).mean()


def surrogate_of(agent, batch):
    log_probs = agent.policy(batch.obs).log_prob(batch.actions)
    return sum(math.e ** (log_probs - batch.log_probs) * batch.advantages).item() / len(batch.obs)


def assert_products_are(agent, batch, matrix):
    """fisher_vector_product is v ↦ (H + damping I) v with the given H, for a few v."""
    product = trpo.fisher_vector_product(agent.policy, batch.obs, damping=0.3)
    for i in range(3):
        generator = torch.Generator().manual_seed(i)
        v = torch.randn(len(matrix), dtype=torch.float64, generator=generator)
        torch.testing.assert_close(product(v), matrix @ v + 0.3 * v)


@each_kind
def test_fisher_vector_product_is_that_of_the_kls_hessian(action_space, small):
    agent, batch = make_batch(action_space)
    old = copies(agent)

    def kl_of_vector(vector):
        parts = vector.split([x.numel() for x in old.values()])
        new = {name: part.view_as(old[name]) for name, part in zip(old, parts)}
        return mean_kl(agent, batch.obs, old, new)

    vector = torch.cat([x.flatten() for x in old.values()])
    hessian = torch.autograd.functional.hessian(kl_of_vector, vector)
    assert torch.linalg.eigvalsh(hessian).min() > -1e-12 and hessian.abs().max() > 0.01
    assert_products_are(agent, batch, hessian)


def actions_with_probabilities(agent, obs):
    """Every action and π(a | s); or 3 × 3 points that integrate polynomials to degree 5 exactly."""
    if agent.policy.discrete:
        return list(enumerate(agent.policy.mlp(obs).softmax(-1).tolist()))
    nodes = {-math.sqrt(3): 1 / 6, 0.0: 2 / 3, math.sqrt(3): 1 / 6}  # Gauss-Hermite
    mean, std = agent.policy.mlp(obs).detach(), agent.policy.log_std.exp().detach()
    pairs = itertools.product(nodes, nodes)
    return [(mean + std * torch.tensor(x).double(), nodes[x[0]] * nodes[x[1]]) for x in pairs]


def log_density(agent, obs, action):
    output = agent.policy.mlp(obs)
    if agent.policy.discrete:
        return output[action] - output.exp().sum().log()
    squares = ((action - output) / agent.policy.log_std.exp()).square()
    return -(squares / 2 + agent.policy.log_std + math.log(2 * math.pi) / 2).sum()


@each_kind
def test_fisher_vector_product_is_that_of_the_scores_outer_products(action_space, small):
    """The definition: the mean over states of E_a[∇log π ∇log πᵀ]."""
    agent, batch = make_batch(action_space, size=10)
    if not agent.policy.discrete:
        nn.init.normal_(agent.policy.log_std, std=0.5)
    matrix = 0.0
    for obs in batch.obs:
        for action, probability in actions_with_probabilities(agent, obs):
            log_prob = log_density(agent, obs, action)
            grads = torch.autograd.grad(
                log_prob, list(policy_of(agent).values()), materialize_grads=True
            )
            score = torch.cat([grad.flatten() for grad in grads])
            matrix = matrix + probability * torch.outer(score, score) / len(batch.obs)
    assert_products_are(agent, batch, matrix)


@given(st.integers(1, 12), st.integers(0, 2**32 - 1))
def test_conjugate_gradients_solve_the_linear_system(size, seed):
    generator = torch.Generator().manual_seed(seed)
    root = torch.randn(size, size, dtype=torch.float64, generator=generator)
    matrix = root @ root.T + torch.eye(size)
    b = torch.randn(size, dtype=torch.float64, generator=generator)
    solution = torch.linalg.solve(matrix, b)
    found = trpo.conjugate_gradients(lambda v: matrix @ v, b, iterations=4 * size)
    torch.testing.assert_close(found, solution, rtol=1e-3, atol=1e-4)
    error = found - solution
    assert error @ matrix @ error <= 1e-8 * (solution @ matrix @ solution)


def test_conjugate_gradients_get_nearer_with_each_iteration_and_stop_when_done():
    generator = torch.Generator().manual_seed(0)
    root = torch.randn(30, 30, dtype=torch.float64, generator=generator)
    matrix, b = root @ root.T + torch.eye(30), torch.ones(30, dtype=torch.float64)
    solution = torch.linalg.solve(matrix, b)
    found = [trpo.conjugate_gradients(lambda v: matrix @ v, b, n) for n in range(0, 25, 4)]
    errors = [((x - solution) @ matrix @ (x - solution)).item() for x in found]
    assert errors == sorted(errors, reverse=True) and errors[-1] < 1e-3 * errors[0]
    products = []  # of the identity, for which one iteration is exact
    trpo.conjugate_gradients(lambda v: (products.append(v), v)[1], b, 100)
    assert len(products) == 1
    assert torch.equal(trpo.conjugate_gradients(lambda v: v, 0 * b, 10), 0 * b)


@each_kind
@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("target_kl", [0.001, 0.1])
def test_step_improves_the_surrogate_within_the_ball(action_space, seed, target_kl):
    agent, batch = make_batch(action_space, seed=seed)
    old, before = copies(agent), surrogate_of(agent, batch)
    args = make_args(target_kl=target_kl)
    metrics = update(agent, make_optimizer(agent, args), batch, args)
    kl = mean_kl(agent, batch.obs, old, policy_of(agent)).item()
    improvement = surrogate_of(agent, batch) - before
    assert metrics["accepted"] == 1 and 1 <= metrics["line_search_steps"] <= 10
    assert 0 < kl <= target_kl and improvement > 0
    assert metrics["kl"] == pytest.approx(kl)
    assert list(metrics) == ["kl", "line_search_steps", "accepted"]
    with torch.no_grad():
        found = trpo.surrogate(agent.policy(batch.obs), batch).item()
    assert found == pytest.approx(improvement)  # of L(θ) − L(θ_old)
    assert measure(agent, batch)["surrogate"] == pytest.approx(improvement)


@each_kind
def test_undamped_step_ends_on_the_edge_of_the_ball(action_space, small):
    """Where the quadratic model is right, near θ_old, the KL of √(2δ / xᵀHx) x is δ."""
    agent, batch = make_batch(action_space, size=500)
    args = make_args(target_kl=1e-10, cg_damping=0.0, cg_iters=100, line_search_decay=0.99)
    metrics = update(agent, make_optimizer(agent, args), batch, args)
    assert metrics["accepted"] == 1 and metrics["kl"] == pytest.approx(1e-10, rel=0.05)


@each_kind
def test_ball_shrinks_with_the_learning_rate(action_space, small):
    """An annealed learning rate anneals δ, in proportion; else a solved task may be unlearnt."""
    agent, batch = make_batch(action_space, size=500)
    args = make_args(target_kl=1e-8, cg_damping=0.0, cg_iters=100, line_search_decay=0.99)
    optimizer = make_optimizer(agent, args)
    for fraction in (1.0, 0.5, 0.01):
        optimizer.param_groups[0]["lr"] = fraction * args.value_learning_rate
        with torch.no_grad():  # of the policy as it is now
            batch = batch._replace(log_probs=agent.policy(batch.obs).log_prob(batch.actions))
        metrics = update(agent, optimizer, batch, args)
        assert metrics["kl"] == pytest.approx(fraction * 1e-8, rel=0.05)


@each_kind
def test_undamped_step_is_the_best_in_the_ball(action_space, small):
    """No other direction of that KL has a higher slope of L: the step is parallel to H⁻¹g."""
    agent, batch = make_batch(action_space, size=500)
    parameters = list(policy_of(agent).values())
    product = trpo.fisher_vector_product(agent.policy, batch.obs, damping=0.0)
    g = trpo.flat_gradient(trpo.surrogate(agent.policy(batch.obs), batch), parameters)
    old = nn.utils.parameters_to_vector(parameters).detach()
    args = make_args(target_kl=1e-10, cg_damping=0.0, cg_iters=200)
    update(agent, make_optimizer(agent, args), batch, args)
    step = nn.utils.parameters_to_vector(parameters).detach() - old
    matrix_step = product(step)
    assert (g @ matrix_step / (g.norm() * matrix_step.norm())).item() == pytest.approx(1, abs=1e-3)
    assert (g @ step / (g.norm() * step.norm())).item() < 0.9  # unlike the plain gradient's


@each_kind
def test_batch_on_which_no_step_can_leaves_every_bit_alone(action_space):
    for factor, options in [
        (0.0, {}),  # no direction
        (1.0, {"target_kl": 1e308, "line_search_steps": 1}),  # too far to have a surrogate
    ]:
        agent, batch = make_batch(action_space)
        batch = batch._replace(advantages=factor * batch.advantages)
        before, args = copies(agent), make_args(**options)
        metrics = update(agent, make_optimizer(agent, args), batch, args)
        assert is_as_before(agent, before)
        steps = args.line_search_steps
        assert metrics == {"kl": 0.0, "line_search_steps": steps, "accepted": 0}
        after = measure(agent, batch)
        assert after["surrogate"] == after["approx_kl"] == 0


def test_advantages_that_are_not_finite_leave_every_bit_of_the_policy_alone():
    agent, batch = make_batch(DISCRETE)
    before, args = copies(agent), make_args()
    batch = batch._replace(advantages=batch.advantages * torch.inf)
    metrics = update(agent, make_optimizer(agent, args), batch, args)
    assert is_as_before(agent, before)
    assert metrics["accepted"] == 0 and metrics["kl"] == 0
    assert not math.isfinite(measure(agent, batch)["surrogate"])  # stops train


def test_advantages_that_are_not_finite_stop_the_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    gae = trpo.gae_fast.gae
    monkeypatch.setattr(trpo.gae_fast, "gae", lambda *x: (gae(*x)[0] * math.inf, gae(*x)[1]))
    with pytest.raises(FloatingPointError, match="iteration 1: surrogate is not finite"):
        train(Args(total_timesteps=5000, quiet=True))


def addresses(parameters):
    return [(x.data_ptr(), x.untyped_storage().data_ptr(), x.stride()) for x in parameters]


@each_kind
def test_set_parameters_copies_a_vector_in_place(action_space):
    agent, _ = make_batch(action_space)
    parameters = list(agent.policy.parameters())
    before = addresses(parameters)
    vector = torch.randn(sum(x.numel() for x in parameters), dtype=torch.float64)
    copy = vector.clone()
    trpo.set_parameters(parameters, vector)
    assert addresses(parameters) == before
    assert torch.equal(nn.utils.parameters_to_vector(parameters), copy)
    vector.zero_()  # a copy, no view
    assert torch.equal(nn.utils.parameters_to_vector(parameters), copy)
    assert all(x.is_leaf and x.requires_grad for x in parameters)


@each_kind
@pytest.mark.parametrize("is_accepted", [True, False])
def test_policy_lies_in_memory_from_the_start_as_an_update_leaves_it(action_space, is_accepted):
    """Else the first update, and the first of a resumed run, would round otherwise than others."""
    agent, batch = make_batch(action_space)
    args = make_args()
    if not is_accepted:
        batch = batch._replace(advantages=0 * batch.advantages)
    optimizer, parameters = make_optimizer(agent, args), list(agent.parameters())
    before = addresses(parameters)
    for _ in range(2):
        metrics = update(agent, optimizer, batch, args)
        assert metrics["accepted"] == is_accepted and addresses(parameters) == before


def test_optimizer_has_the_critic_alone():
    agent, batch = make_batch(BOX)
    args = make_args(value_learning_rate=0.05, value_epochs=3)
    optimizer = make_optimizer(agent, args)
    (group,) = optimizer.param_groups
    assert group["lr"] == 0.05
    assert [id(x) for x in group["params"]] == [id(x) for x in agent.critic.parameters()]
    before, critic = copies(agent), [x.detach().clone() for x in agent.critic.parameters()]
    assert trpo.fit_critic(agent, optimizer, batch, args) is None
    assert is_as_before(agent, before)
    assert not any(torch.equal(x, y) for x, y in zip(critic, agent.critic.parameters()))


def test_step_that_overshoots_is_refused_although_it_is_in_the_ball():
    """With a wide ball the first step has a KL below δ = 100, and a worse surrogate."""
    agent, batch = make_batch(DISCRETE, size=20, seed=17)
    old, before = copies(agent), surrogate_of(agent, batch)
    args = make_args(target_kl=100.0, cg_damping=1e-3, cg_iters=50, line_search_steps=1)
    assert update(agent, make_optimizer(agent, args), batch, args)["accepted"] == 0
    assert is_as_before(agent, old)

    parameters = list(policy_of(agent).values())
    product = trpo.fisher_vector_product(agent.policy, batch.obs, args.cg_damping)
    g = trpo.flat_gradient(trpo.surrogate(agent.policy(batch.obs), batch), parameters)
    x = trpo.conjugate_gradients(product, g, args.cg_iters)
    step = (200 / (x @ product(x))).sqrt() * x
    start = nn.utils.parameters_to_vector(parameters).detach()
    trpo.set_parameters(parameters, start + step)
    assert mean_kl(agent, batch.obs, old, policy_of(agent)).item() < 100
    assert surrogate_of(agent, batch) < before


def test_line_search_shortens_until_both_conditions_are_met():
    """Too long a first step: that of the attempt before the accepted one is refused."""
    options = {"target_kl": 3.0, "cg_damping": 1e-6, "cg_iters": 50}
    agent, batch = make_batch(BOX, size=30)
    args = make_args(line_search_steps=40, **options)
    metrics = update(agent, make_optimizer(agent, args), batch, args)
    assert metrics["accepted"] == 1 and metrics["line_search_steps"] > 1 and metrics["kl"] <= 3.0
    accepted = nn.utils.parameters_to_vector(policy_of(agent).values()).detach()
    agent, _ = make_batch(BOX, size=30)
    start = nn.utils.parameters_to_vector(policy_of(agent).values()).detach()
    args = make_args(line_search_steps=metrics["line_search_steps"] - 1, **options)
    assert update(agent, make_optimizer(agent, args), batch, args)["accepted"] == 0

    product = trpo.fisher_vector_product(agent.policy, batch.obs, args.cg_damping)
    step = accepted - start
    length = (step @ product(step) / 6).sqrt().item()  # of √(2δ / xᵀHx) x it is 1
    assert length == pytest.approx(0.8 ** (metrics["line_search_steps"] - 1))


class Rescaled(nn.Module):
    """A linear layer whose weight and bias are c times this module's parameters.

    These are other coordinates of one function.
    """

    def __init__(self, linear, c):
        super().__init__()
        self.c = c
        self.weight = nn.Parameter(linear.weight.detach() / c)
        self.bias = nn.Parameter(linear.bias.detach() / c)

    def forward(self, x):
        return nn.functional.linear(x, self.c * self.weight, self.c * self.bias)


@each_kind
def test_natural_gradient_does_not_depend_on_the_parameters_scale(action_space, small):
    """The plain one does."""

    def rescaled_agent(c):
        agent, _ = make_batch(action_space, seed=10)
        agent.policy.mlp[-1] = Rescaled(agent.policy.mlp[-1], c)
        return agent

    start, batch = make_batch(action_space, seed=10)
    output = start.policy.mlp(batch.obs).detach()
    natural, plain = [], []
    for c in (1.0, 10.0):
        agent = rescaled_agent(c)
        args = make_args(target_kl=1e-10, cg_damping=0.0, cg_iters=200)
        update(agent, make_optimizer(agent, args), batch, args)
        natural.append(agent.policy.mlp(batch.obs).detach() - output)
        agent = rescaled_agent(c)
        gain = (agent.policy(batch.obs).log_prob(batch.actions) * batch.advantages).mean()
        parameters = list(policy_of(agent).values())
        with torch.no_grad():
            for parameter, grad in zip(parameters, torch.autograd.grad(gain, parameters)):
                parameter += 0.001 * grad
        plain.append(agent.policy.mlp(batch.obs).detach() - output)
    torch.testing.assert_close(*natural, rtol=1e-2, atol=1e-8)
    assert natural[0].abs().max() > 1e-6
    assert plain[1].norm() > 10 * plain[0].norm()


@each_kind
def test_exact_kl_is_the_mean_log_ratio_over_many_samples(action_space):
    agent, batch = make_batch(action_space, size=20)
    other, _ = make_batch(action_space, size=20, seed=1)
    nn.init.normal_(agent.policy.mlp[-1].weight)
    if not agent.policy.discrete:
        nn.init.constant_(other.policy.log_std, 0.4)
    with torch.no_grad():
        old, new = agent.policy(batch.obs), other.policy(batch.obs)
        actions = old.sample((40_000,))
        log_ratios = (old.log_prob(actions) - new.log_prob(actions)).mean(dim=1)
    standard_error = log_ratios.std() / math.sqrt(len(log_ratios))
    exact = trpo.kl_divergence(old, new).mean()
    assert abs(log_ratios.mean() - exact) < 4 * standard_error < 0.05 * exact


def test_no_step_of_a_run_leaves_the_ball_of_its_time(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    args = Args(num_envs=4, num_steps=64, total_timesteps=3000, quiet=True)
    rows = train(args)
    deltas = [args.target_kl * x["learning_rate"] / args.value_learning_rate for x in rows]
    assert deltas[0] == args.target_kl and deltas[-1] < 0.1 * args.target_kl
    assert all(row["kl"] <= delta * (1 + 1e-9) for row, delta in zip(rows, deltas))
    assert sum(row["kl"] > 0.3 * delta for row, delta in zip(rows, deltas)) > 0.8 * len(rows)


def test_rows_log_the_step():
    args = Args(num_envs=4)
    torch.manual_seed(1)
    envs = make_envs(args.env, args.num_envs)
    agent = Agent(envs, args.norm_obs)
    batch = next(rollouts(envs, agent, args, iteration=0))
    metrics = update(agent, make_optimizer(agent, args), batch, args)
    assert list(metrics) == ["kl", "line_search_steps", "accepted"]
    assert 0 < metrics["kl"] <= args.target_kl and metrics["accepted"] == 1
    columns = measure(agent, batch)
    assert list(columns) == "surrogate entropy approx_kl value_loss explained_variance".split()
    policy = agent.policy(batch.obs)
    assert columns["entropy"] == pytest.approx(policy.entropy().mean().item())
    log_ratio = (policy.log_prob(batch.actions) - batch.log_probs).detach().double()
    surrogate = ((log_ratio.exp() - 1) * batch.advantages).mean().item()
    assert columns["surrogate"] == pytest.approx(surrogate, rel=1e-4) and surrogate > 0
    assert columns["approx_kl"] == pytest.approx(metrics["kl"], rel=0.5)
    errors = (agent.value(batch.obs) - batch.returns).detach()
    assert columns["value_loss"] == pytest.approx(0.5 * errors.square().mean().item())
    unexplained = (errors.var() / batch.returns.var()).item()
    assert columns["explained_variance"] == pytest.approx(1 - unexplained, abs=1e-5)
