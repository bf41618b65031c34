"""Measure the noise and the bias of the policy gradient's estimate at a fixed policy, for several
weights Ψ_t of the actions.

    python benchmarks/gradient_variance.py --out gradient_variance.png

For each seed, reinforce.py trains a policy for a while. Then the policy is fixed and plays. A
critic V is fitted to the returns of one half of its episodes, and a poor V to twenty of these in
one pass. Each episode of the other half gives one estimate ĝ = Σ_t ∇log π(a_t | s_t) Ψ_t for each
weight Ψ_t. γ is 1, so that all weights but GAE with λ < 1 estimate one gradient without bias, that
of the mean return of an episode.

noise: E‖ĝ − E ĝ‖² / ‖∇J‖², the number of episodes whose mean has as much noise in it as signal.
bias: ‖E ĝ − ∇J‖ / ‖∇J‖, where ∇J is the mean with R̂_t − V(s_t), whose own noise is subtracted;
`unseen` is the size of bias that noise would show where there is none. R(τ), R̂ and R̂ − V have
none, whatever V is.
"""

import argparse
import contextlib
import itertools
import sys
import tempfile
from pathlib import Path

import numpy as np
import torch
from common import ROOT, table
from matplotlib.figure import Figure

sys.path.insert(0, str(ROOT))

import gae_fast
import reinforce

LAMBDAS = [1.0, 0.98, 0.9, 0.5, 0.0]
ADVANTAGES = ["R̂ − V, as GAE with λ = 1", *(f"GAE, λ = {x:g}" for x in LAMBDAS[1:])]
WEIGHTS = ["R(τ), the total return", "R̂, the reward-to-go", *ADVANTAGES]
WEIGHTS += [f"{x}, poor V" for x in ADVANTAGES]
REFERENCE = WEIGHTS.index(ADVANTAGES[0])


def play(agent, args, num_episodes):
    """Whole episodes of the policy, one after another, as reinforce.py's batches."""
    with contextlib.closing(reinforce.make_envs(args.env)) as envs:
        return list(itertools.islice(reinforce.rollouts(envs, agent, args, 0), num_episodes))


def fit_critic(batches, num_epochs):
    """V(s), fitted to the reward-to-go divided by its deviation, as tanh networks prefer."""
    obs = torch.cat([x.obs for x in batches])
    returns = torch.cat([x.weights for x in batches])
    network, scale = reinforce.mlp(obs.shape[1], 64, 64, 1, head_gain=1.0), returns.std()
    optimizer = torch.optim.Adam(network.parameters(), eps=1e-5, fused=True)
    for epoch in range(num_epochs):
        optimizer.param_groups[0]["lr"] = 1e-3 * (1 - epoch / num_epochs)
        for rows in torch.randperm(len(obs)).split(256):
            errors = network(obs[rows]).squeeze(-1) - returns[rows] / scale
            optimizer.zero_grad()
            errors.square().mean().backward()
            optimizer.step()
    return lambda obs: network(obs).squeeze(-1).detach() * scale


def weights_of(batch, critics):
    """Ψ_t of each of WEIGHTS, (len(WEIGHTS), T). An episode's end ends its return, and GAE's."""
    to_go = batch.weights
    rewards = (to_go - torch.cat([to_go[1:], torch.zeros(1)])).numpy()
    ends = terminations, truncations = np.zeros((2, len(rewards)), bool)
    terminations[-1] = True
    weights = [to_go[0].expand(len(to_go)), to_go]
    for critic in critics:
        values = np.append(critic(batch.obs).numpy(), np.float32(0))
        for gae_lambda in LAMBDAS:
            advantages, _ = gae_fast.gae(rewards, values, *ends, 1.0, gae_lambda)
            weights.append(torch.as_tensor(advantages))
    return torch.stack(weights)


def estimates(agent, batches, critics):
    """One gradient estimate for each episode and weight, (episodes, len(WEIGHTS), parameters)."""
    parameters = list(agent.parameters())
    result = []
    for batch in batches:
        log_probs = agent.policy(batch.obs).log_prob(batch.actions)
        weights = weights_of(batch, critics)
        grads = torch.autograd.grad(log_probs, parameters, weights, is_grads_batched=True)
        result.append(torch.cat([grad.flatten(1) for grad in grads], dim=1))
    return torch.stack(result).double()


def noise_and_bias(gradients):
    """The noise, the bias and the unseen bias of each weight, all relative to the signal ‖∇J‖."""
    count = len(gradients)
    means = gradients.mean(dim=0)
    variances = (gradients - means).square().sum(dim=(0, 2)) / (count - 1)
    signal = means[REFERENCE].square().sum() - variances[REFERENCE] / count
    # Differences of one episode's estimates, so that most noise goes out.
    differences = gradients - gradients[:, REFERENCE : REFERENCE + 1]
    mean_differences = differences.mean(dim=0)
    unseen = (differences - mean_differences).square().sum(dim=(0, 2)) / (count - 1) / count
    bias = (mean_differences.square().sum(dim=1) - unseen).clamp(min=0)
    figures = [variances / signal, (bias / signal).sqrt(), (unseen / signal).sqrt()]
    return torch.stack(figures).numpy()


def measure(env, seed, total_timesteps, num_episodes):
    with tempfile.TemporaryDirectory() as folder:
        run_dir = str(Path(folder, "run"))
        args = reinforce.Args(
            env=env,
            seed=seed,
            total_timesteps=total_timesteps,
            norm_obs=False,
            run_dir=run_dir,
            quiet=True,
        )
        reinforce.train(args)
        checkpoint = torch.load(Path(run_dir, "checkpoint.pt"), weights_only=True)
    # Another seed, so that the episodes are others than those of the training.
    options = {"num_envs": 1, "gamma": 1.0, "norm_obs": False, "norm_returns": False}
    args = reinforce.Args(env=env, seed=seed + 1, **options)
    with contextlib.closing(reinforce.make_envs(env)) as envs:
        agent = reinforce.Agent(envs, args.norm_obs)
    agent.load_state_dict(checkpoint["agent"])
    batches = play(agent, args, 2 * num_episodes)
    critics = [fit_critic(batches[:num_episodes], 40), fit_critic(batches[:20], 1)]
    mean_return = np.mean([batch.weights[0].item() for batch in batches])
    return mean_return, noise_and_bias(estimates(agent, batches[num_episodes:], critics))


def draw(noise, bias, title, path):
    """Noise of the weights, and bias by λ, as the mean over the seeds and a dot for each; arrays
    (seeds, WEIGHTS)."""
    figure = Figure(figsize=(11, 4), layout="constrained")
    left, right = figure.subplots(1, 2)
    groups = {
        "no V": slice(0, 2),
        "V": slice(2, 2 + len(LAMBDAS)),
        "poor V": slice(2 + len(LAMBDAS), None),
    }
    for label, group in groups.items():
        names = [name.replace("R̂", r"$\hat{R}$") for name in WEIGHTS[group]]
        (bars,) = left.plot(
            geometric_mean(noise[:, group]), names, "o", label=label, markersize=9, alpha=0.6
        )
        for row in noise[:, group]:
            left.plot(row, names, ".", color=bars.get_color(), markersize=4)
        if label != "no V":
            right.plot(
                LAMBDAS,
                bias[:, group].mean(axis=0),
                "o-",
                color=bars.get_color(),
                label=label,
                alpha=0.6,
            )
            for row in bias[:, group]:
                right.plot(LAMBDAS, row, ".", color=bars.get_color(), markersize=4)
    left.set_xscale("log")
    left.invert_yaxis()
    left.set_xlabel("noise of one episode’s estimate, ÷ signal")
    right.set_xlabel("λ")
    right.set_ylabel("bias ÷ signal")
    right.legend()
    for panel in (left, right):
        panel.spines[["top", "right"]].set_visible(False)
        panel.grid(alpha=0.3)
    figure.suptitle(title)
    figure.savefig(path, dpi=150)


def geometric_mean(values):
    return np.exp(np.log(values).mean(axis=0))


parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
)
parser.add_argument("--env", default="CartPole-v1")
parser.add_argument("--seeds", type=int, default=5, help="policies, of the seeds 1 to this")
parser.add_argument(
    "--total-timesteps", type=int, default=30_000, help="that each policy is trained for"
)
parser.add_argument(
    "--episodes", type=int, default=1000, help="estimates of each policy's gradient"
)
parser.add_argument("--out", help="picture to write")
args = parser.parse_args()

torch.set_num_threads(1)
measured = [
    measure(args.env, seed, args.total_timesteps, args.episodes)
    for seed in range(1, args.seeds + 1)
]
returns = ", ".join(f"{mean_return:.0f}" for mean_return, _ in measured)
noise, bias, unseen = np.stack([figures for _, figures in measured], axis=1)
print(f"{args.env}, {args.episodes} episodes of each of {args.seeds} policies,", end=" ")
print(f"whose mean returns are {returns}\n")
rows = []
for i, name in enumerate(WEIGHTS):
    cells = [geometric_mean(noise[:, i]), noise[:, i].min(), noise[:, i].max()]
    if "λ" in name and "λ = 1" not in name:
        cells += [bias[:, i].mean(), bias[:, i].min(), bias[:, i].max(), unseen[:, i].mean()]
    cells = [f"{cell:.3g}" for cell in cells]
    rows.append([name, *cells, *["none", "", "", ""][: 7 - len(cells)]])
header = ["noise, geometric mean", "least", "greatest"]
header += ["bias, mean", "least bias", "greatest bias", "unseen bias"]
print(table(["weight", *header], rows))
if args.out:
    draw(noise, bias, f"{args.env}: gradient estimates at {args.seeds} fixed policies", args.out)
