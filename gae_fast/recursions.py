"""The recursion of generalised advantage estimation over flat arrays: a loop that mypyc compiles to plain C.

A flat array holds T rows of N environments, row after row, so element k is followed in time by element k + N.
`__init__.py` checks every argument; nothing is checked here.
"""

from collections.abc import Iterable

try:
    from librt.vecs import extend, vec
    from mypy_extensions import i64
except ImportError:  # the folder was copied, not installed: use lists
    from .lists import extend, i64, vec  # type: ignore[assignment]


def sweep(
    rewards: Iterable[float],
    values: Iterable[float],
    terminations: bytes,
    ends: bytes,
    next_advantages: Iterable[float],
    gamma: float,
    gae_lambda: float,
) -> vec[float]:
    """Return Â of some rows, followed by `next_advantages`, the row that comes after them in time.

    `values` is one row longer than `rewards`; `ends` marks the steps that were terminated or truncated.
    The arithmetic is float64. Source: Schulman et al. 2016 (arXiv 1506.02438), eq. 16, as a recursion.
    """
    value = vec[float](values)
    advantage = vec[float](rewards, capacity=len(value))  # element k holds r_t until the loop puts Â_t in its place
    k: i64 = len(advantage)
    num_envs: i64 = len(value) - k
    advantage = extend(advantage, next_advantages)
    trace_decay = gamma * gae_lambda
    latest = advantage[k]
    while k > 0:
        k -= 1
        # With one environment Â_{t+1} is `latest`. Reading it from memory would double the time.
        next_advantage = latest if num_envs == 1 else advantage[k + num_envs]
        if not ends[k]:
            delta = advantage[k] + gamma * value[k + num_envs] - value[k]
            latest = delta + trace_decay * next_advantage
        elif not terminations[k]:  # truncated: V(s_{t+1}) stands for later rewards
            latest = advantage[k] + gamma * value[k + num_envs] - value[k]
        else:
            latest = advantage[k] - value[k]
        advantage[k] = latest
    return advantage
