"""gae_fast: recursions against definitions, compiled build against interpreted, every refusal."""

import math
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import gae_fast

ROOT = Path(__file__).parent.parent


def advantages_by_definition(rewards, values, terminations, truncations, gamma, gae_lambda):
    """Â_t = Σ_l (γλ)^l δ_{t+l}, up to the episode's end (Schulman et al. 2016, eq. 16)."""
    steps, num_envs = rewards.shape
    advantages = np.zeros((steps, num_envs))
    for n in range(num_envs):
        for t in range(steps):
            for k in range(t, steps):
                next_value = 0.0 if terminations[k, n] else values[k + 1, n]
                delta = rewards[k, n] + gamma * next_value - values[k, n]
                advantages[t, n] += (gamma * gae_lambda) ** (k - t) * delta
                if terminations[k, n] or truncations[k, n]:
                    break
    return advantages


def returns_by_definition(rewards, dones, gamma):
    steps, num_envs = rewards.shape
    returns = np.zeros((steps, num_envs))
    for n in range(num_envs):
        for t in range(steps):
            for k in range(t, steps):
                returns[t, n] += gamma ** (k - t) * rewards[k, n]
                if dones[k, n]:
                    break
    return returns


@st.composite
def rollouts(draw, max_steps=12, max_envs=4):
    steps, num_envs = draw(st.integers(1, max_steps)), draw(st.integers(1, max_envs))
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    scale = 10.0 ** draw(st.integers(-3, 3))
    rewards = scale * rng.standard_normal((steps, num_envs))
    values = scale * rng.standard_normal((steps + 1, num_envs))
    terminations = rng.random((steps, num_envs)) < draw(st.sampled_from([0.0, 0.1, 0.5, 1.0]))
    truncations = rng.random((steps, num_envs)) < draw(st.sampled_from([0.0, 0.1, 0.5, 1.0]))
    return rewards, values, terminations, truncations, draw(st.floats(0, 1)), draw(st.floats(0, 1))


@given(rollouts(), st.sampled_from([1, 5, 8192]))
def test_gae_is_its_definition(rollout, block_size):
    gae_fast.BLOCK_SIZE, before = block_size, gae_fast.BLOCK_SIZE
    advantages, returns = gae_fast.gae(*rollout)
    gae_fast.BLOCK_SIZE = before
    expected = advantages_by_definition(*rollout)
    tolerance = 1e-12 * len(expected) * np.abs(rollout[0]).max().clip(np.abs(rollout[1]).max())
    np.testing.assert_allclose(advantages, expected, rtol=1e-10, atol=100 * tolerance)
    np.testing.assert_array_equal(returns, advantages + rollout[1][:-1])


@given(rollouts())
def test_rewards_to_go_is_its_definition(rollout):
    rewards, _, dones, _, gamma, _ = rollout
    expected = returns_by_definition(rewards, dones, gamma)
    np.testing.assert_allclose(
        gae_fast.rewards_to_go(rewards, dones, gamma),
        expected,
        rtol=1e-10,
        atol=1e-10 * np.abs(rewards).max(),
    )


def example(steps=37, num_envs=5, seed=0):
    rng = np.random.default_rng(seed)
    rewards, values = (
        rng.standard_normal((steps, num_envs)),
        rng.standard_normal((steps + 1, num_envs)),
    )
    terminations, truncations = rng.random((2, steps, num_envs)) < 0.1
    return rewards, values, terminations, truncations, 0.97, 0.9


@pytest.mark.parametrize("block_size", [1, 7, 64])
def test_blocks_do_not_change_a_bit(block_size, monkeypatch):
    whole = gae_fast.gae(*example())
    monkeypatch.setattr(gae_fast, "BLOCK_SIZE", block_size)
    blocks = gae_fast.gae(*example())
    np.testing.assert_array_equal(whole, blocks)


def test_memory_layout_and_container_do_not_matter():
    arguments = example()
    expected = gae_fast.gae(*arguments)
    arrays, numbers = arguments[:4], arguments[4:]
    variants = {
        "Fortran order": [np.asfortranarray(x) for x in arrays],
        "strided": [np.repeat(np.repeat(x, 2, axis=0), 3, axis=1)[::2, ::3] for x in arrays],
        "reversed": [x[::-1, ::-1].copy()[::-1, ::-1] for x in arrays],
        "lists": [x.tolist() for x in arrays],
        "read-only": [np.frombuffer(x.tobytes(), x.dtype).reshape(x.shape) for x in arrays],
        "flags as integers": [*arrays[:2], *(x.astype(int) for x in arrays[2:])],
        "flags as floats": [*arrays[:2], *(x.astype(np.float32) for x in arrays[2:])],
        "big-endian": [*(x.astype(">f8") for x in arrays[:2]), *arrays[2:]],
    }
    for name, variant in variants.items():
        np.testing.assert_array_equal(gae_fast.gae(*variant, *numbers), expected, err_msg=name)
    for n in range(5):
        column = gae_fast.gae(*(x[:, n] for x in arrays), *numbers)
        np.testing.assert_array_equal(column, [x[:, n] for x in expected])


RESULT_DTYPES = {
    "f4": "f4",
    "f8": "f8",
    "f2": "f8",
    "i4": "f8",
    "u1": "f8",
    "?": "f8",
    ">f4": "f4",
    ">f8": "f8",
}


@pytest.mark.parametrize(("dtype", "result"), RESULT_DTYPES.items())
@pytest.mark.parametrize("block_size", [1, 8192])
def test_results_are_new_writeable_arrays_of_the_rewards_dtype(
    dtype, result, block_size, monkeypatch
):
    monkeypatch.setattr(gae_fast, "BLOCK_SIZE", block_size)
    rewards, values, terminations, truncations, gamma, gae_lambda = example()
    rewards = (rewards > 0).astype(dtype)
    arrays = gae_fast.gae(rewards, values, terminations, truncations, gamma, gae_lambda)
    arrays = (*arrays, gae_fast.rewards_to_go(rewards, terminations, gamma))
    for array in arrays:
        assert array.dtype == np.dtype(result) and array.dtype.isnative
        assert array.shape == rewards.shape and array.flags.writeable and array.flags.c_contiguous
        assert not np.shares_memory(array, rewards) and not np.shares_memory(array, values)


def test_single_precision_is_rounded_only_once():
    rewards, values, *rest = example()
    rewards, values = rewards.astype(np.float32), values.astype(np.float32)
    double = gae_fast.gae(rewards.astype(np.float64), values, *rest)
    np.testing.assert_array_equal(gae_fast.gae(rewards, values, *rest), np.float32(double))


def test_nothing_passes_an_episode_end():
    """A terminated step does not see what stands behind it; a truncated one sees only the value."""
    rewards, values = np.ones((4, 1)), np.full((5, 1), 10.0)
    values[2:] = rewards[2:] = np.nan
    ends, never = np.array([[False], [True], [False], [False]]), np.zeros((4, 1), bool)
    advantages, _ = gae_fast.gae(rewards, values, ends, never, 0.5, 1.0)
    np.testing.assert_allclose(advantages[:2, 0], [1 + 0.5 * 1 - 10, 1 - 10])
    values[2] = 8.0
    advantages, _ = gae_fast.gae(rewards, values, never, ends, 0.5, 1.0)
    np.testing.assert_allclose(advantages[:2, 0], [1 + 0.5 * (1 + 0.5 * 8) - 10, 1 + 0.5 * 8 - 10])


def test_terminated_wins_over_truncated():
    both = np.array([True])
    assert gae_fast.gae([1.0], [0.0, 100.0], both, both, 1.0, 1.0)[0] == 1.0


NAN, INF = float("nan"), float("inf")
REFUSED = {
    "rewards": [
        [],
        np.zeros((0, 3)),
        np.zeros((3, 0)),
        1.0,
        np.zeros((3, 2, 1)),
        [1j, 2j, 3j],
        ["a", "b", "c"],
        None,
    ]
    + [[[1.0], [1.0, 2.0]], np.array([1, 2, 3], object), np.array(["2001-01-01"] * 3, "M8[D]")],
    "values": [np.zeros(3), np.zeros(5), np.zeros((4, 1)), 0.0, ["a"] * 4, [1j] * 4, [None] * 4],
    "terminations": [
        np.zeros(2),
        np.zeros(4),
        np.zeros((3, 1)),
        [0, 2, 0],
        [0, NAN, 0],
        [0.5, 0, 0],
        "abc",
        None,
    ],
    "truncations": [
        np.zeros(2),
        np.zeros(4),
        np.zeros((3, 1)),
        [0, -1, 0],
        [0, NAN, 0],
        [0.5, 0, 0],
        {},
        None,
    ],
    "gamma": [-0.1, 1.1, NAN, float("inf"), None, "0.9", [0.9, 0.9], 1j],
    "gae_lambda": [-0.1, 1.1, NAN, float("inf"), None, "0.9", [0.9, 0.9], 1j],
}
VALID = {
    "rewards": np.ones(3),
    "values": np.ones(4),
    "terminations": np.zeros(3, bool),
    "truncations": np.zeros(3, bool),
    "gamma": 0.9,
    "gae_lambda": 0.9,
}


@pytest.mark.parametrize(
    ("name", "value"), [(name, value) for name, values in REFUSED.items() for value in values]
)
def test_refused_input_is_named(name, value):
    with pytest.raises(ValueError, match=f"^{name}: expected .*, got"):
        gae_fast.gae(**{**VALID, name: value})
    if name in ("rewards", "gamma"):
        with pytest.raises(ValueError, match=f"^{name}: expected .*, got"):
            gae_fast.rewards_to_go(
                **{"rewards": np.ones(3), "dones": np.zeros(3), "gamma": 0.9, name: value}
            )
    if name == "terminations":
        with pytest.raises(ValueError, match="^dones: expected .*, got"):
            gae_fast.rewards_to_go(np.ones(3), value, 0.9)


@pytest.mark.parametrize(
    "number", [np.float32(0.5), np.float64(0.5), np.array(0.5), np.int64(1), 0, 1, True]
)
def test_numbers_of_any_real_type_are_taken(number):
    plain = gae_fast.gae(*example()[:4], float(number), float(number))
    np.testing.assert_array_equal(gae_fast.gae(*example()[:4], number, number), plain)


# -------------------------------------- whatever it is given --------------------------------------

NUMBERS = st.sampled_from([0.0, -0.0, 1.0, -1.5, 1e-320, 1e30, -1e300, 1.7e308, INF, -INF, NAN])
LAYOUTS = {
    "C": np.ascontiguousarray,
    "Fortran": np.asfortranarray,
    "strided": lambda x: np.repeat(x, 2, axis=0)[::2],
    "reversed": lambda x: x[::-1].copy()[::-1],
    "unaligned": lambda x: np.frombuffer(
        b"x" + x.tobytes(), x.dtype, offset=1, count=x.size
    ).reshape(x.shape),
    "list": lambda x: x.tolist(),
}


NO_ARRAYS = [None, "abc", b"", 1.0, {}, {1}, object(), [[1.0], []], np.float64(2), iter([1.0])]
NO_NUMBERS = ["c8", "U3", "M8[s]", "O"]


@st.composite
def wild_arrays(draw, shape, dtypes, numbers):
    """An array of the shape and of one of the dtypes; now and then another, or no array."""
    oddity = draw(st.integers(0, 60))
    if oddity == 0:
        return draw(st.sampled_from(NO_ARRAYS))
    if oddity == 1:
        shape = tuple(draw(st.lists(st.integers(0, 4), max_size=4)))
    x = np.array(
        draw(st.lists(numbers, min_size=math.prod(shape), max_size=math.prod(shape))), float
    ).reshape(shape)
    with np.errstate(all="ignore"):
        x = x.astype(draw(st.sampled_from(NO_NUMBERS if oddity == 2 else dtypes)))
    if x.ndim and x.dtype != object:
        x = LAYOUTS[draw(st.sampled_from(sorted(LAYOUTS)))](x)
    if isinstance(x, np.ndarray) and draw(st.booleans()):
        x.flags.writeable = False
    return x


@st.composite
def wild_calls(draw):
    steps, num_envs = draw(st.integers(1, 5)), draw(st.sampled_from([None, 1, 3]))
    shapes = [(t,) if num_envs is None else (t, num_envs) for t in (steps, steps + 1)]
    flags = st.sampled_from([0.0, 1.0, 0.5] if draw(st.integers(0, 20)) == 0 else [0.0, 1.0])
    masks = [draw(wild_arrays(shapes[0], ["?", "?", "u1", "f4", "i8"], flags)) for _ in range(2)]
    numbers = draw(st.sampled_from([NUMBERS, st.floats(-100, 100)]))
    floats = ["f8", "f8", "f4", "f4", "f2", ">f8", "g", "i4", "u1", "?"]
    rewards, values = (draw(wild_arrays(shape, floats, numbers)) for shape in shapes)
    odd = st.one_of(st.floats(), st.sampled_from([None, "1", [], np.array([0.5])]))
    discounts = [draw(odd if draw(st.integers(0, 40)) == 0 else st.floats(0, 1)) for _ in range(2)]
    return rewards, values, *masks, *discounts


def advantages_by_recursion(rewards, values, terminations, truncations, gamma, gae_lambda):
    """δ_t = r_t + γ V(s_{t+1}) − V(s_t), Â_t = δ_t + γλ Â_{t+1}, without what is behind an end."""
    advantages = np.zeros(rewards.shape)
    for n in np.ndindex(rewards.shape[1:]):
        latest = 0.0
        for t in reversed(range(len(rewards))):
            at, after = (t, *n), (t + 1, *n)
            delta = rewards[at] + (0.0 if terminations[at] else gamma * values[after]) - values[at]
            latest = (
                delta
                if terminations[at] or truncations[at]
                else delta + gamma * gae_lambda * latest
            )
            advantages[at] = latest
    return advantages


def answers_rightly(call):
    """Whether it answers, and as the definition does, rather than refuse."""
    try:
        advantages, returns = gae_fast.gae(*call)
    except (ValueError, TypeError):
        return False
    rewards, values, terminations, truncations = (np.array(x).astype(float) for x in call[:4])
    with np.errstate(all="ignore"):
        expected = advantages_by_recursion(
            rewards, values, terminations, truncations, float(call[4]), float(call[5])
        )
        np.testing.assert_allclose(
            advantages, expected.astype(advantages.dtype), rtol=1e-6, atol=1e-300
        )
        to_go = gae_fast.rewards_to_go(call[0], call[2], call[4])
        no_values = np.zeros((len(rewards) + 1, *rewards.shape[1:]))
        expected = advantages_by_recursion(
            rewards, no_values, terminations, terminations, float(call[4]), 1.0
        )
        np.testing.assert_allclose(to_go, expected.astype(to_go.dtype), rtol=1e-6, atol=1e-300)
    return True


@pytest.mark.filterwarnings("ignore")
def test_whatever_it_is_given_it_answers_rightly_or_refuses():
    """The interpreter survives this, and answers often enough to mean something."""
    answers = []
    settings(max_examples=1000)(
        given(wild_calls())(lambda call: answers.append(answers_rightly(call)))
    )()
    assert 300 < sum(answers) < len(answers) - 100


def resident_bytes():
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="reads its own size from /proc")
@pytest.mark.skipif(not gae_fast.COMPILED, reason="a million interpreted calls take long")
def test_a_million_calls_do_not_leak():
    """Every tenth of them refused; 16 bytes left behind by each tenth call would be 1.6 MB."""
    rewards, values, flags = np.ones(3), np.ones(4), np.zeros(3, bool)

    def call(times):
        for i in range(times // 2):
            gae_fast.rewards_to_go(rewards, flags, 0.9)
            try:
                gae_fast.gae(rewards, values, flags, flags, 0.9, 0.9 if i % 5 else 2.0)
            except ValueError:
                pass

    call(20_000)
    before = resident_bytes()
    call(1_000_000)
    assert resident_bytes() - before < 1_500_000


def test_interpreted_it_answers_rightly_or_refuses_too(tmp_path):
    copy_of_gae_fast(tmp_path, compiled=False)
    (tmp_path / "tests").mkdir()
    for name in ("test_gae_fast.py", "conftest.py"):
        shutil.copy(ROOT / "tests" / name, tmp_path / "tests")
    code = "import gae_fast, pytest, sys; assert not gae_fast.COMPILED; "
    code += "sys.exit(pytest.main(sys.argv[1:]))"
    tests = ["tests/test_gae_fast.py", "-q", "-p", "no:cacheprovider", "-k", "whatever_it_is"]
    command = [sys.executable, "-W", "ignore", "-c", code, *tests]
    run = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert run.returncode == 0 and "1 passed" in run.stdout, run.stdout + run.stderr


# ----------------------------------- compiled and interpreted ------------------------------------

COMPUTE = """
import sys, warnings
{prelude}
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    import gae_fast
import numpy as np
print(gae_fast.COMPILED, [str(w.message) for w in caught if w.category is RuntimeWarning])
data = np.load("in.npz")
rows = [data[f"{{name}}{{i}}"] for i in range(3) for name in ("r", "v", "d", "u")]
results = [gae_fast.gae(*rows[i:i + 4], 0.99, 0.95) for i in (0, 4, 8)]
results += [(gae_fast.rewards_to_go(rows[i], rows[i + 2], 0.99),) * 2 for i in (0, 4, 8)]
np.savez("out.npz", *[x for pair in results for x in pair])
"""


def copy_of_gae_fast(folder, compiled):
    """Copy the package folder as a user would, with its compiled files or without."""
    ignored = ["__pycache__", "build", "*.egg-info", *([] if compiled else ["*.so", "*.pyd"])]
    shutil.copytree(ROOT / "gae_fast", folder / "gae_fast", ignore=shutil.ignore_patterns(*ignored))


def compute_in_copy(folder, compiled, prelude=""):
    copy_of_gae_fast(folder, compiled)
    rng = np.random.default_rng(1)
    arrays = {}
    for i, (steps, num_envs, dtype) in enumerate([(100, 3, "f8"), (100, 3, "f4"), (3000, 5, "f8")]):
        magnitude = 10.0 ** rng.integers(-6, 6, (steps, num_envs))
        arrays |= {f"r{i}": (magnitude * rng.standard_normal((steps, num_envs))).astype(dtype)}
        arrays |= {f"v{i}": rng.standard_normal((steps + 1, num_envs)).astype(dtype)}
        arrays |= {
            f"d{i}": rng.random((steps, num_envs)) < 0.05,
            f"u{i}": rng.random((steps, num_envs)) < 0.05,
        }
    np.savez(folder / "in.npz", **arrays)
    command = [sys.executable, "-c", COMPUTE.format(prelude=prelude)]
    run = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=True)
    return run.stdout.strip(), dict(np.load(folder / "out.npz"))


@pytest.mark.skipif(
    not any(map(shutil.which, ("cc", "gcc", "clang", "cl"))), reason="no C compiler here"
)
def test_compiled_build_is_in_use():
    assert gae_fast.COMPILED
    assert Path(gae_fast.__file__).parent == ROOT / "gae_fast"


@pytest.mark.skipif(not gae_fast.COMPILED, reason="compares with the compiled build")
@pytest.mark.parametrize(
    ("prelude", "compiled_files"),
    [
        ("", False),
        ("sys.modules['librt.vecs'] = None", False),
        ("sys.modules['librt.vecs'] = None", True),
    ],
    ids=["source alone", "and no librt", "compiled files but no librt"],
)
def test_interpreted_build_gives_the_same_bits(prelude, compiled_files, tmp_path):
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    said, compiled = compute_in_copy(tmp_path / "a", compiled=True)
    assert said == "True []"
    said, interpreted = compute_in_copy(tmp_path / "b", compiled_files, prelude)
    assert (
        re.match(r"False \['gae_fast runs interpreted.*pip install", said)
        and said.count("interpreted") == 1
    )
    assert compiled.keys() == interpreted.keys() and len(compiled) == 12
    for name in compiled:
        assert compiled[name].dtype == interpreted[name].dtype
        np.testing.assert_array_equal(compiled[name], interpreted[name])


def test_strict_mypy_passes():
    files = ["gae_fast/__init__.py", "gae_fast/recursions.py", "gae_fast/lists.py"]
    command = [sys.executable, "-m", "mypy", "--strict", *files]
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert run.returncode == 0, run.stdout
