"""docs/recipes.md: each change applies to its script, the result trains and does what is said."""

import importlib.util
import json
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import gymnasium
import numpy as np
import pytest
import torch
import tyro
from gymnasium.spaces import Box, Dict, Discrete, MultiBinary, MultiDiscrete
from torch.distributions import Categorical, Normal, TanhTransform, TransformedDistribution

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT / "benchmarks"))
from exercises import DIFF, exercise, solve  # noqa: E402

TEXT = (ROOT / "docs/recipes.md").read_text(encoding="utf-8")
NUMBERS = [int(n) for n in re.findall(r"^## (\d+)\. ", TEXT, re.M)]
WITH_DIFF = [n for n in NUMBERS if "```diff" in exercise(n, "recipes")]
LIMITS = dict.fromkeys(WITH_DIFF, 30) | {5: 60}  # changed lines
SMALL = {  # options under which a recipe trains in seconds
    4: "--total-timesteps 150 --num-envs 2 --num-steps 40 --update-epochs 1",
    5: "--total-timesteps 1000 --num-envs 3 --num-steps 64 --update-epochs 2 --num-minibatches 2",
}


def made(number, folder, monkeypatch):
    """The module of a recipe's changed script."""
    if number == 4:
        pytest.importorskip("cv2", reason="needs opencv-python")
    path = solve(number, folder, "recipes")[-1]
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, spec.name, module)
    spec.loader.exec_module(module)
    return module


def trained(module, *options):
    return module.train(tyro.cli(module.Args, args=["--quiet", "--run-dir", "run", *options]))


def env_of(number):
    env = re.search(r"--env (\S+)", exercise(number, "recipes"))[1]
    return env.replace("HalfCheetah-v5", "Pendulum-v1")  # the tests do without MuJoCo


@pytest.fixture(autouse=True)
def in_a_folder_of_its_own(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def logger(monkeypatch):
    """Stands in for wandb, which the tests do not install; keeps what it was given."""
    calls = []
    fake = SimpleNamespace(
        init=lambda **options: calls.append(options),
        log=lambda row, step: calls.append((step, dict(row))),
    )
    monkeypatch.setitem(sys.modules, "wandb", fake)
    return calls


def test_they_are_numbered_and_each_diff_is_short():
    assert NUMBERS == [*range(1, len(NUMBERS) + 1)] and len(WITH_DIFF) >= 12
    for number in WITH_DIFF:
        text = exercise(number, "recipes")
        (diff,) = re.findall(r"^```diff\n(.*?)^```$", text, re.M | re.S)
        changed = [x for x in diff.splitlines()[2:] if x[:1] in "+-"]
        assert 0 < len(changed) <= LIMITS[number], f"recipe {number} changes {len(changed)} lines"
        assert text.count("**Command:** `python compare.py ") == 1
        assert "--seeds 3" in text and text.count("<details open>") == 1
        assert re.search(r"\+\+\+ (\w+)\.py", diff)[1] in re.search(r"--runs ([^`]*)`", text)[1]
    with pytest.raises(ValueError, match="expected the number of one of recipes, got 99"):
        exercise(99, "recipes")


@pytest.mark.parametrize("script", ["vpg", "trpo", "ppo_kl"])
def test_all_but_memory_and_cleanrls_apply_to_the_other_scripts(script, tmp_path):
    applied = set()
    for number in WITH_DIFF:
        ((diff, old, new),) = DIFF.findall(exercise(number, "recipes"))
        (tmp_path / new).write_bytes((ROOT / f"{script}.py").read_bytes())
        patch, command = diff.replace(f"--- {old}", f"--- {new}"), ["git", "apply", "-p0"]
        done = subprocess.run(command, input=patch, text=True, cwd=tmp_path, capture_output=True)
        applied |= {number} if done.returncode == 0 else set()
    assert applied == {*WITH_DIFF} - {3, 5, 10}  # 3 changes the copy of recipe 1


@pytest.mark.parametrize("number", WITH_DIFF)
def test_a_recipe_is_well_formed_and_trains(number, tmp_path, monkeypatch, logger):
    module = made(number, tmp_path, monkeypatch)
    ruff = [sys.executable, "-m", "ruff"]
    config = ["--config", str(ROOT / "pyproject.toml"), module.__file__]
    subprocess.run([*ruff, "check", "--quiet", *config], check=True)
    subprocess.run([*ruff, "format", "--check", "--quiet", *config], check=True)
    default = "--total-timesteps 2500 --num-envs 2 --update-epochs 2"
    rows = trained(module, "--env", env_of(number), *SMALL.get(number, default).split())
    values = [x for row in rows for x in row.values() if x is not None]
    assert rows and np.isfinite(values).all()
    assert rows[-1]["approx_kl"] != 0 and rows[-1]["episodes"] > 0


@pytest.mark.filterwarnings("ignore:no episode ends between resets")
@pytest.mark.parametrize("number", [n for n in WITH_DIFF if n != 4])
def test_a_recipe_resumes_to_the_bit(number, tmp_path, monkeypatch, logger):
    module = made(number, tmp_path, monkeypatch)
    options = f"--env {env_of(number)} --num-envs 2 --num-steps 32 --num-minibatches 2".split()
    options += ["--update-epochs", "2", "--checkpoint-every", "1", "--no-anneal-lr"]
    whole = trained(module, *options, "--total-timesteps", "512")
    Path("run").rename("whole")
    trained(module, *options, "--total-timesteps", "256")
    resumed = module.train(*module.load_run("run", total_timesteps=512))
    timeless = [
        [{k: x for k, x in row.items() if k not in ("wall_time", "SPS")} for row in rows]
        for rows in (whole, resumed)
    ]
    assert len(whole) > 4 and timeless[0] == timeless[1]


# --- what each recipe says of itself ---
def space_env(space):
    class Sized(gymnasium.Env):
        observation_space, action_space = Box(-1, 1, (3,)), space

        def reset(self, *, seed=None, options=None):
            super().reset(seed=seed)
            self.steps = 0
            return self.observation_space.sample(), {}

        def step(self, action):
            assert space.contains(action), f"{action!r} is not in {space}"
            Sized.seen.append(np.array(action))
            self.steps += 1
            return self.observation_space.sample(), 1.0, self.steps == 5, False, {}

    Sized.seen = []
    return Sized


SPACES = [
    MultiDiscrete([3, 1, 4]),
    MultiDiscrete([2, 3], start=[5, -1]),
    MultiDiscrete([[2, 3], [4, 2]]),
    MultiBinary(3),
    MultiBinary([2, 2]),
    Box(np.array([-2, 0]), np.array([1, 5]), dtype=np.int64),
    Box(np.int32(3), np.int32(5), (2, 2), np.int32),
    Box(-1, 1, (2,)),
]


@pytest.mark.parametrize("space", SPACES, ids=str)
def test_several_actions_takes_every_action_of_a_space_and_no_other(space, tmp_path, monkeypatch):
    module, env = made(1, tmp_path, monkeypatch), space_env(space)
    gymnasium.register("Sized-v0", env)
    try:
        rows = trained(module, "--env", "Sized-v0", "--num-steps", "64", "--total-timesteps", "900")
    finally:
        gymnasium.registry.pop("Sized-v0")
    assert len(rows) > 1
    if space.dtype.kind != "f":
        seen = np.array([x.ravel() for x in env.seen])
        assert [len(np.unique(x)) for x in seen.T] == [*sizes_of(space)]


def sizes_of(space):
    if isinstance(space, MultiBinary):
        return [2] * int(np.prod(space.shape))
    return np.ravel(space.nvec if isinstance(space, MultiDiscrete) else space.high - space.low + 1)


def test_several_actions_sums_log_probabilities_and_entropies(tmp_path, monkeypatch):
    module = made(1, tmp_path, monkeypatch)
    policy = module.Policy(2, MultiDiscrete([2, 4]))
    obs = torch.randn(5, 2)
    with torch.no_grad():
        policy.mlp[-1].weight.normal_()
        logits = policy.mlp(obs).view(5, 2, 4)
    parts = Categorical(logits=logits[:, 0, :2]), Categorical(logits=logits[:, 1])
    actions = torch.tensor([[1, 3], [0, 0], [1, 1], [0, 2], [1, 0]])
    expected = sum(x.log_prob(a) for x, a in zip(parts, actions.T))
    torch.testing.assert_close(policy(obs).log_prob(actions), expected)
    torch.testing.assert_close(policy(obs).entropy(), sum(x.entropy() for x in parts))
    policy(obs).entropy().sum().backward()
    assert all(x.grad.isfinite().all() for x in policy.parameters())


def test_masked_draws_what_is_allowed_alone_and_keeps_its_entropy(tmp_path, monkeypatch):
    module = made(2, tmp_path, monkeypatch)
    policy, rng = module.Policy(7, Discrete(4)), np.random.default_rng(1)
    obs = rng.standard_normal((4000, 7), np.float32)
    obs[:, :4] = rng.permuted(np.tile([1, 1, 0, 0], (4000, 1)), axis=1)
    actions, _ = policy.sampler(rng)(obs)
    assert (np.take_along_axis(obs[:, :4], actions[:, None], axis=1) == 1).all()
    pi = policy(torch.as_tensor(obs))
    assert ((pi.probs == 0) == (torch.as_tensor(obs[:, :4]) == 0)).all()
    chosen = pi.probs[torch.as_tensor(obs[:, :4]) == 1].view(-1, 2)
    torch.testing.assert_close(pi.entropy(), Categorical(probs=chosen).entropy())
    pi.entropy().sum().backward()
    assert all(x.grad.isfinite().all() for x in policy.parameters())
    obs[:, :4] = 0
    assert policy(torch.as_tensor(obs)).entropy().isfinite().all()


def test_masked_does_not_standardise_the_mask(tmp_path, monkeypatch):
    module = made(2, tmp_path, monkeypatch)
    rows = trained(module, "--env", env_of(2), "--total-timesteps", "3000")
    envs = module.make_envs(env_of(2), 2)
    agent = module.Agent(envs, True)
    agent.load_state_dict(module.load_run("run")[1]["agent"])
    moments = agent.obs_moments.clone()
    obs, _ = envs.reset(seed=1)
    standardised = agent.standardizer()(obs)
    assert (standardised[:, :12] == obs[:, :12]).all()
    assert (standardised[:, 12:] != obs[:, 12:]).any()
    assert (agent.obs_moments == moments).all() and (moments[1:, :12] != 0).all()
    assert rows[-1]["episodic_length"] == 20  # no rule is ever broken


def test_several_masked_draws_what_is_allowed_alone(tmp_path, monkeypatch):
    module = made(3, tmp_path, monkeypatch)
    policy, rng = module.Policy(9, MultiDiscrete([2, 4])), np.random.default_rng(1)
    obs = rng.standard_normal((4000, 9), np.float32)
    obs[:, :2] = rng.permuted(np.tile([1, 0], (4000, 1)), axis=1)
    obs[:, 2:6] = rng.permuted(np.tile([1, 1, 0, 0], (4000, 1)), axis=1)
    actions, _ = policy.sampler(rng)(obs)
    rows = np.arange(4000)
    assert (obs[rows, actions[:, 0]] == 1).all() and (obs[rows, 2 + actions[:, 1]] == 1).all()
    assert 0.4 < np.mean(actions[:, 1] < 2) < 0.6
    pi = policy(torch.as_tensor(obs))
    probs = pi.base_dist.probs.detach()
    assert (probs[:, 0, 2:] == 0).all() and ((probs[:, 1] > 0).sum(dim=1) == 2).all()
    torch.testing.assert_close(pi.entropy(), pi.base_dist.entropy().sum(dim=1))
    assert pi.entropy().isfinite().all() and (pi.entropy() <= np.log(2) + 1e-5).all()
    rows = trained(module, "--env", env_of(3), "--total-timesteps", "3000")
    assert rows[-1]["episodic_length"] == 20  # no jammed position is ever tried


def test_images_are_four_frames_of_one_size(tmp_path, monkeypatch):
    module = made(4, tmp_path, monkeypatch)
    envs = module.make_envs(env_of(4), 2)
    assert envs.single_observation_space.shape == (4 * 36 * 36,)
    agent = module.Agent(envs, True)
    assert agent.value(torch.zeros(3, 2, 4 * 36 * 36)).shape == (3, 2)
    monkeypatch.setattr(module, "SIDE", 84)  # Nature's
    network = module.mlp(4 * 84 * 84, 64, 2, head_gain=1.0)
    assert network(torch.zeros(5, 4 * 84 * 84)).shape == (5, 2)


def test_memory_is_that_of_acting_and_ends_with_an_episode(tmp_path, monkeypatch):
    """What update computes from the rollout is what the rollout acted by."""
    module = made(5, tmp_path, monkeypatch)
    args = module.Args(env=env_of(5), num_envs=3, num_steps=64, num_minibatches=3)
    envs = module.make_envs(args.env, 3)
    torch.manual_seed(1)
    agent = module.Agent(envs, args.norm_obs)
    batches = module.rollouts(envs, agent, args, iteration=0)
    for _ in range(3):  # no update, so states go over from rollout to rollout
        batch = next(batches)
        obs, actions, log_probs, _, _ = batch.remembered(agent)
        torch.testing.assert_close(agent.policy(obs).log_prob(actions), log_probs)
        assert len(obs) == batch.is_step.sum() < 3 * 64
        states = agent.memory.unroll(batch.obs, batch.is_step, batch.state)
        for n, t in (~batch.is_step[:, :-1]).nonzero().tolist():
            alone = agent.memory(batch.obs[n, t + 1 : t + 2], torch.zeros(1, 64))
            torch.testing.assert_close(states[n, t + 1], alone[0])
    assert batch.state.abs().sum() > 0


def test_state_std_depends_on_the_state_and_begins_at_one_over_root_k(tmp_path, monkeypatch):
    module = made(6, tmp_path, monkeypatch)
    policy = module.Policy(3, Box(-1, 1, (4,)))
    std = policy(torch.randn(100, 3)).stddev
    assert (std[0] != std[1]).all() and std.mean().item() == pytest.approx(0.5, rel=0.05)


def test_squashed_has_the_density_of_torch(tmp_path, monkeypatch):
    module = made(7, tmp_path, monkeypatch)
    normal, u = Normal(torch.randn(5, 3), torch.rand(5, 3) + 0.1), torch.randn(5, 3)
    ours = module.Squashed(normal, 1)
    theirs = TransformedDistribution(normal, TanhTransform())
    torch.testing.assert_close(
        ours.log_prob(u), theirs.log_prob(u.tanh()).sum(-1), rtol=1e-4, atol=1e-4
    )
    torch.manual_seed(1)
    many = module.Squashed(Normal(torch.zeros(100_000, 1), torch.full((100_000, 1), 0.3)), 1)
    samples = many.sample()
    assert many.entropy().mean().item() == pytest.approx(
        -many.log_prob(samples).mean().item(), abs=0.01
    )
    assert ours.log_prob(torch.full((5, 3), 50.0)).isfinite().all()


def test_squashed_acts_within_the_bounds(tmp_path, monkeypatch):
    module = made(7, tmp_path, monkeypatch)
    into_space = module.make_envs("Pendulum-v1", 2).env.func
    assert into_space(np.array([[-9.0], [0.3]])) == pytest.approx(2 * np.tanh([[-9.0], [0.3]]))


def test_one_trunk_is_shared(tmp_path, monkeypatch):
    module = made(8, tmp_path, monkeypatch)
    agent = module.Agent(module.make_envs("CartPole-v1", 2), True)
    assert agent.policy.mlp[0] is agent.critic[0] and agent.policy.mlp[2] is agent.critic[2]
    trunk, policy, critic = 5 * 64 + 65 * 64, 65 * 2, 65
    assert sum(x.numel() for x in agent.parameters()) == trunk + policy + critic


def test_as_cleanrl_clips_the_value_loss(tmp_path, monkeypatch):
    """With V beyond ε from V_old on the side of the return, a sample has no gradient."""
    module = made(10, tmp_path, monkeypatch)
    args = module.Args(num_envs=2, num_steps=32, ent_coef=0.0, update_epochs=1, num_minibatches=1)
    envs = module.make_envs("CartPole-v1", 2)
    agent = module.Agent(envs, True)
    batch = next(module.rollouts(envs, agent, args, iteration=0))
    torch.testing.assert_close(batch.values, agent.value(batch.obs), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(batch.returns, batch.advantages + batch.values, rtol=1e-4, atol=1e-4)
    optimizer = module.make_optimizer(agent, args)
    moved = batch._replace(values=batch.values.detach() - 1, returns=batch.returns * 0 + 99)
    before = [x.clone() for x in agent.critic.parameters()]
    module.update(agent, optimizer, moved, args)
    assert all((x == y).all() for x, y in zip(before, agent.critic.parameters()))
    module.update(agent, optimizer, moved._replace(returns=batch.returns * 0 - 99), args)
    assert any((x != y).any() for x, y in zip(before, agent.critic.parameters()))


def test_evaluated_keeps_the_best_and_ends_when_solved(tmp_path, monkeypatch):
    module = made(11, tmp_path, monkeypatch)
    rows = trained(module, "--total-timesteps", "60000", "--eval-every", "3", "--stop-at", "200")
    scores = [row["eval_return"] for row in rows]
    assert scores[0] == scores[2] and max(scores) >= 200 > max(scores[:-1])
    assert rows[-1]["global_step"] < 60_000
    args, _ = module.load_run("run")
    agent = module.Agent(module.make_envs("CartPole-v1", 2), True)
    agent.load_state_dict(torch.load("run/best.pt", weights_only=True))
    assert module.evaluate(agent, args) == max(scores)


def test_evaluated_is_the_mean_of_first_episodes_alone(tmp_path, monkeypatch):
    """The episodes differ in length, so that some environments begin a second one."""
    module = made(11, tmp_path, monkeypatch)
    args = module.Args(seed=3, vectorization_mode="sync")
    torch.manual_seed(1)
    agent, env = module.Agent(module.make_envs(args.env, 2), True), gymnasium.make(args.env)
    returns = []
    for seed in range(args.seed, args.seed + 10):
        (obs, _), is_over, total = env.reset(seed=seed), False, 0.0
        while not is_over:
            action = agent.policy(torch.as_tensor(agent.standardizer()(obs))).mode.item()
            obs, reward, terminated, truncated, _ = env.step(action)
            total, is_over = total + reward, terminated or truncated
        returns.append(total)
    assert len({*returns}) > 1 and module.evaluate(agent, args) == pytest.approx(np.mean(returns))


def test_evaluated_trains_as_ppo_clip_does_to_the_bit(tmp_path, monkeypatch):
    import ppo_clip

    module = made(11, tmp_path, monkeypatch)
    options = {"total_timesteps": 4000, "quiet": True}
    theirs = module.train(module.Args(run_dir="theirs", eval_every=2, **options))
    ours = ppo_clip.train(ppo_clip.Args(run_dir="ours", **options))
    for x, y in zip(theirs, ours, strict=True):
        assert {k for k in x if x[k] != y.get(k)} <= {"wall_time", "SPS", "eval_return"}


def test_logged_logs_each_row(tmp_path, monkeypatch, logger):
    module = made(12, tmp_path, monkeypatch)
    rows = trained(module, "--total-timesteps", "3000")
    assert logger[0]["config"]["total_timesteps"] == 3000
    assert logger[1:] == [(row["global_step"], row) for row in rows]


# --- recipes without a diff ---
def blocks(number):
    return re.findall(r"^```python\n(.*?)^```$", exercise(number, "recipes"), re.M | re.S)


def test_the_copy_alone_is_put_into_a_folder(tmp_path):
    command = [sys.executable, ROOT / "benchmarks/exercises.py", "3", "--page", "recipes"]
    done = subprocess.run(
        [*command, "--into", tmp_path], capture_output=True, text=True, check=True
    )
    assert [x.name for x in tmp_path.iterdir()] == ["several_masked.py"]
    assert done.stdout == f"{tmp_path / 'several_masked.py'}\n"
    for folder in (tmp_path, tmp_path / "missing"):  # it would be overwritten, or be a file
        done = subprocess.run([*command, "--into", folder], capture_output=True, text=True)
        assert done.returncode == 2 and "expected a folder without several_masked.py" in done.stderr
    folder = tmp_path / "elsewhere"
    folder.mkdir()
    (path,) = solve(3, folder, "recipes")
    assert path.read_text(encoding="utf-8") == (tmp_path / path.name).read_text(encoding="utf-8")


def test_a_wrapper_puts_the_mask_first(monkeypatch):
    class Warehouse(space_env(Discrete(3))):
        observation_space = Dict({"demand": Box(2, 9, (4,)), "mask": MultiBinary(3)})

    import ppo_clip

    (code,) = blocks(2)
    gymnasium.register("Warehouse-v0", Warehouse)
    try:
        exec(code.replace("warehouse:", ""), {"__name__": "my_envs"})
        obs, _ = ppo_clip.make_envs("MaskFirst-v0", 2).reset(seed=1)
    finally:
        for name in ("Warehouse-v0", "MaskFirst-v0"):
            gymnasium.registry.pop(name, None)
    assert obs.shape == (2, 7) and (obs[:, :3] <= 1).all() and (obs[:, 3:] >= 2).all()


def test_three_ways_to_give_an_environment_arguments(monkeypatch):
    import ppo_clip

    monkeypatch.setattr(ppo_clip, "make_envs", ppo_clip.make_envs)  # put back afterwards
    register, partial, from_python = blocks(13)
    try:
        exec(register, {})
        exec(partial, {})
        for name, tiles, slips in (("BigLake-v0", 64, True), ("DryLake-v0", 16, False)):
            envs = ppo_clip.make_envs(name, 2)
            assert envs.single_observation_space.shape == (tiles,)
            lake = envs.unwrapped.envs[0].unwrapped
            assert (len(lake.P[0][1]) > 1) == slips
    finally:
        for name in ("BigLake-v0", "DryLake-v0"):
            gymnasium.registry.pop(name, None)
    found = {}
    exec(from_python.replace("20_000", "3_000"), found)
    assert len(found["rows"]) > 2 and found["rows"][-1]["episodic_length"] <= 100
    assert ppo_clip.make_envs("FrozenLake-v1", 2).single_observation_space.shape == (64,)


def test_the_search_finds_settings():
    optuna = pytest.importorskip("optuna")
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    (code,) = blocks(14)
    assert len(code.splitlines()) <= 17
    code = code.replace("50_000", "2_000").replace("n_trials=20", "n_trials=2")
    found = {}
    exec(code, found)
    assert found["study"].best_value > 5 and len(found["study"].trials) == 2


@pytest.mark.parametrize("env", ["CartPole-v1", "Pendulum-v1"])
def test_the_deployed_policy_is_ours(env):
    import ppo_clip

    ppo_clip.train(ppo_clip.Args(env=env, total_timesteps=2500, run_dir="run", quiet=True))
    export, use = blocks(15)
    found = {}
    exec(export.replace("runs/NAME", "run"), found)
    envs = ppo_clip.make_envs(env, 5)
    obs, _ = envs.reset(seed=1)
    code = "import json, sys\n\nfor obs in json.loads(sys.argv[1]):\n"
    code += "".join(f"    {line}\n" for line in [*use.splitlines(), "print(logits.tolist())"])
    # In a process that has nothing of this project, and for two sizes of a batch:
    batches = json.dumps([obs.tolist(), obs[:1].tolist()])
    isolated = [sys.executable, "-I", "-c", code, batches]
    done = subprocess.run(isolated, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    agent = found["agent"]
    expected = agent.policy.mlp(torch.as_tensor(agent.standardizer()(obs)))
    for line, rows in zip(done.stdout.splitlines(), (expected, expected[:1]), strict=True):
        logits = torch.tensor(json.loads(line))
        torch.testing.assert_close(logits, rows, rtol=0, atol=1e-6)
