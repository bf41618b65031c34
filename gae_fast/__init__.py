"""Generalised advantage estimation and rewards-to-go, compiled by mypyc where a C compiler is found.

    advantages, returns = gae_fast.gae(rewards, values, terminations, truncations, gamma, gae_lambda)
    rewards_to_go = gae_fast.rewards_to_go(rewards, dones, gamma)

Time is the first axis, environments the second; T steps of one environment may come as (T,). `COMPILED` is True when
the compiled build is in use; the interpreted build gives bit-identical numbers, but slower.
"""

import importlib.util
import types
import warnings
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

try:
    from .recursions import sweep  # relative: the folder may stand inside a package
except ImportError:  # compiled for another machine, or mypyc's runtime is missing: use the source
    _spec = importlib.util.spec_from_file_location(f"{__name__}.recursions", Path(__file__).with_name("recursions.py"))
    assert _spec and _spec.loader
    _source = importlib.util.module_from_spec(_spec)
    _spec.loader.exec_module(_source)
    sweep = _source.sweep

__all__ = ["COMPILED", "gae", "rewards_to_go"]
__version__ = "0.1.0"

COMPILED: bool = not isinstance(sweep, types.FunctionType)

# Elements per call of sweep: 64 KB of float64 stay in the cache, and malloc reuses the memory.
# Whole arrays of megabytes would cost one page fault per 4 KB.
BLOCK_SIZE = 8192


def gae(
    rewards: ArrayLike,
    values: ArrayLike,
    terminations: ArrayLike,
    truncations: ArrayLike,
    gamma: float,
    gae_lambda: float,
) -> tuple[NDArray[Any], NDArray[Any]]:
    """Return the advantages GAE(γ, λ) and the returns, the targets of the value function V.

    δ_t = r_t + γ (1 − terminated_t) V(s_{t+1}) − V(s_t)
    Â_t = δ_t + γ λ (1 − (terminated_t or truncated_t)) Â_{t+1}, with Â_T = 0;  returns = Â + V

    Args:
        rewards: r_t, shape (T, N) or (T,).
        values: V(s_t), shape (T + 1, N) or (T + 1,); the last row is V(s_T). The row after a truncated step holds the
            value of the episode's last observation; Â_t of a terminated step ignores row t + 1.
        terminations: where the episode reached a terminal state; booleans or 0s and 1s of rewards' shape.
        truncations: where the episode was truncated, for example by a time limit; same shape.
        gamma: discount γ in [0, 1].
        gae_lambda: λ in [0, 1]; 0 gives the one-step TD error, 1 the return, with V where it is cut off, minus V(s_t).

    Returns:
        (advantages, returns), new arrays of rewards' shape, computed in float64; float32 if rewards are, else float64.

    Raises:
        ValueError: an argument is not of real numbers, a flag not 0 or 1, a shape wrong or empty, γ or λ not in [0, 1].

    Source: Schulman et al. 2016 (arXiv 1506.02438), eq. 16; truncation as in Pardo et al. 2018 (arXiv 1712.00378).
    """
    rewards = _rewards(rewards)
    shape = rewards.shape
    values = _reals("values", values, (len(rewards) + 1, *shape[1:]))
    terminations = _flags("terminations", terminations, shape)
    truncations = _flags("truncations", truncations, shape)
    gamma = _fraction("gamma", gamma)
    gae_lambda = _fraction("gae_lambda", gae_lambda)
    ends = terminations | truncations
    num_envs = values.size - rewards.size
    next_advantages: NDArray[np.float64] = np.zeros(num_envs)
    single = rewards.dtype.char == "f"

    if rewards.size <= BLOCK_SIZE:
        # The loop below for one block, without slicing: slicing would double the time.
        rewards, values = np.asarray(rewards, np.float64).ravel(), np.asarray(values, np.float64)
        swept = np.array(
            sweep(rewards, values.ravel(), terminations.tobytes(), ends.tobytes(), next_advantages, gamma, gae_lambda)
        )
        advantages = swept[:-num_envs].reshape(shape)
        returns = advantages + values[:-1]
        return (advantages.astype(np.float32), returns.astype(np.float32)) if single else (advantages, returns)

    advantages = np.empty(shape, np.float32 if single else np.float64)
    returns = np.empty_like(advantages)
    flat_advantages, flat_returns = advantages.reshape(-1), returns.reshape(-1)
    rewards, values, terminations, ends = rewards.ravel(), values.ravel(), terminations.ravel(), ends.ravel()
    block_size = max(BLOCK_SIZE // num_envs, 1) * num_envs
    for stop in range(rewards.size, 0, -block_size):
        block = slice(max(stop - block_size, 0), stop)
        reward = np.asarray(rewards[block], np.float64)
        value = np.asarray(values[block.start : stop + num_envs], np.float64)
        terminated, ended = terminations[block].tobytes(), ends[block].tobytes()
        swept = np.asarray(sweep(reward, value, terminated, ended, next_advantages, gamma, gae_lambda))
        next_advantages = swept[:num_envs]
        flat_advantages[block] = swept[:-num_envs]
        np.add(swept[:-num_envs], value[:-num_envs], out=flat_returns[block])
    return advantages, returns


def rewards_to_go(rewards: ArrayLike, dones: ArrayLike, gamma: float) -> NDArray[Any]:
    """Return the discounted sum of the rewards from each step to the end of its episode.

    R̂_t = r_t + γ (1 − done_t) R̂_{t+1}, with R̂_T = 0.

    Args:
        rewards: r_t, shape (T, N) or (T,).
        dones: where an episode ended; booleans or 0s and 1s of rewards' shape.
        gamma: discount γ in [0, 1].

    Returns:
        A new array of rewards' shape, computed in float64; float32 if rewards are, else float64.

    Raises:
        ValueError: an argument is not of real numbers, a flag not 0 or 1, a shape wrong or empty, γ not in [0, 1].

    Source: Williams 1992; Sutton and Barto 2018, section 13.3.
    """
    rewards = _rewards(rewards)
    dones = _flags("dones", dones, rewards.shape)
    # R̂ is Â for λ = 1 and V = 0.
    no_values = np.zeros((len(rewards) + 1, *rewards.shape[1:]))
    return gae(rewards, no_values, dones, np.zeros_like(dones), gamma, 1.0)[0]


def _rewards(argument: ArrayLike) -> NDArray[Any]:
    array = _reals("rewards", argument)
    if array.ndim not in (1, 2) or not array.size:
        raise ValueError(f"rewards: expected shape (T, N) or (T,) with T and N at least 1, got {array.shape}")
    return array


def _flags(name: str, argument: ArrayLike, shape: tuple[int, ...]) -> NDArray[np.bool_]:
    array = _reals(name, argument, shape)
    if array.dtype.kind != "b":
        if not np.isin(array, (0, 1)).all():
            raise ValueError(f"{name}: expected booleans or 0s and 1s, got other numbers")
        array = array != 0
    return array


def _reals(name: str, argument: ArrayLike, shape: tuple[int, ...] | None = None) -> NDArray[Any]:
    try:
        array = np.asarray(argument)
    except Exception as error:  # whatever a foreign array type raises when NumPy cannot read it
        kind = type(argument).__name__
        raise ValueError(f"{name}: expected an array of real numbers, got {kind}: {error}") from error
    if array.dtype.kind not in "fiub":
        raise ValueError(f"{name}: expected an array of real numbers, got dtype {array.dtype}")
    if shape is not None and array.shape != shape:
        raise ValueError(f"{name}: expected shape {shape} to go with rewards, got {array.shape}")
    return array


def _fraction(name: str, argument: float) -> float:
    try:
        number = float(argument) if not isinstance(argument, str) else float("nan")
    except (TypeError, ValueError):
        number = float("nan")
    if not 0.0 <= number <= 1.0:
        raise ValueError(f"{name}: expected a number in [0, 1], got {argument!r}")
    return number


if not COMPILED:
    warnings.warn(
        "gae_fast runs interpreted, many times slower: to compile it, install a C compiler and run"
        " `pip install -e ./gae_fast` in the folder that contains gae_fast/",
        RuntimeWarning,
        stacklevel=2,
    )
