"""Time gae_fast.gae beside a NumPy loop, numba and rlox, and print a Markdown table.

    pip install numba rlox==1.2.0 && python benchmarks/gae.py

All four get time-major float64 arrays with boolean terminations and truncations, and return the
advantages and returns in the same order. rlox knows only one kind of episode end and wants each
environment's steps together. So it is given the terminations alone, and its times include the
transposes. What is not installed is left out. All take turns, and times are medians over rounds.
"""

import functools
import statistics
import timeit

import numpy as np
from common import table

import gae_fast

GAMMA, GAE_LAMBDA = 0.99, 0.95
SIZES = [(128, 4), (256, 8), (2048, 1), (2048, 8), (128, 256), (2048, 64)]
ROUNDS = 15


def numpy_loop(rewards, values, terminations, truncations):
    advantages, last = np.zeros_like(rewards), 0.0
    for t in reversed(range(len(rewards))):
        delta = rewards[t] + GAMMA * (1.0 - terminations[t]) * values[t + 1] - values[t]
        last = delta + GAMMA * GAE_LAMBDA * (1.0 - (terminations[t] | truncations[t])) * last
        advantages[t] = last
    return advantages, advantages + values[:-1]


def ours(rewards, values, terminations, truncations):
    return gae_fast.gae(rewards, values, terminations, truncations, GAMMA, GAE_LAMBDA)


def rlox_batched(rewards, values, terminations, truncations):
    flat = [
        np.ascontiguousarray(x.T).ravel()
        for x in (rewards, values[:-1], terminations.astype(float))
    ]
    num_steps, num_envs = rewards.shape
    results = rlox.compute_gae_batched(*flat, values[-1].copy(), num_steps, GAMMA, GAE_LAMBDA)
    return tuple(np.ascontiguousarray(x.reshape(num_envs, num_steps).T) for x in results)


contenders = {"gae_fast": ours, "NumPy loop": numpy_loop}
try:
    import numba
except ImportError:
    print("numba is not installed and left out")
else:

    @numba.njit
    def numba_loop(rewards, values, terminations, truncations):
        num_steps, num_envs = rewards.shape
        advantages, returns, last = (
            np.empty((num_steps, num_envs)),
            np.empty((num_steps, num_envs)),
            np.zeros(num_envs),
        )
        for t in range(num_steps - 1, -1, -1):
            for n in range(num_envs):
                advantage = rewards[t, n] - values[t, n]
                if not terminations[t, n]:
                    advantage += GAMMA * values[t + 1, n]
                    if not truncations[t, n]:
                        advantage += GAMMA * GAE_LAMBDA * last[n]
                last[n] = advantages[t, n] = advantage
                returns[t, n] = advantage + values[t, n]
        return advantages, returns

    contenders["numba"] = numba_loop
try:
    import rlox
except ImportError:
    print("rlox is not installed and left out")
else:
    contenders["rlox"] = rlox_batched

build = "compiled" if gae_fast.COMPILED else "interpreted"
print(f"gae_fast {gae_fast.__version__}, {build}; NumPy {np.__version__}\n")
others = [name for name in contenders if name != "gae_fast"]
rows = []
for num_steps, num_envs in SIZES:
    rng = np.random.default_rng(0)
    rewards = rng.standard_normal((num_steps, num_envs))
    values = rng.standard_normal((num_steps + 1, num_envs))
    terminations, truncations = rng.random((2, num_steps, num_envs)) < 0.01
    arrays = (rewards, values, terminations, truncations)
    for name, function in contenders.items():
        ends = (terminations, np.zeros_like(truncations) if name == "rlox" else truncations)
        results = function(rewards, values, *ends)
        for got, expected in zip(results, numpy_loop(rewards, values, *ends)):
            np.testing.assert_allclose(got, expected, rtol=1e-9, atol=1e-9, err_msg=name)
    times = {name: [] for name in contenders}
    for _ in range(ROUNDS):
        for name, function in contenders.items():
            number = 5 if name == "NumPy loop" else max(10, 200_000 // (num_steps * num_envs))
            seconds = timeit.timeit(functools.partial(function, *arrays), number=number)
            times[name].append(seconds / number * 1e6)
    median = {name: statistics.median(times[name]) for name in contenders}
    cells = [f"{median[name]:.1f}" for name in contenders]
    cells += [f"{median[x] / median['gae_fast']:.2f}" for x in others]
    rows.append([f"({num_steps}, {num_envs})", *cells])
header = [*(f"{name} µs" for name in contenders), *(f"{name} ÷ gae_fast" for name in others)]
print(table(["(T, N)", *header], rows))
