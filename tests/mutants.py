"""Break the code, one line at a time, and see a test fail: python tests/mutants.py [WORD]

Each mutant is (file, text, what replaces it, the tests that must notice). The repository is copied
and left as it is. With a word, only mutants whose file or tests have it in them.
"""

import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).parent.parent
PPO, GAE, INIT = "ppo_clip.py", "gae_fast/recursions.py", "gae_fast/__init__.py"
REINFORCE, VPG, TRPO, PPO_KL = "reinforce.py", "vpg.py", "trpo.py", "ppo_kl.py"
COMPARE, PLAY, DEFAULTS = "compare.py", "play.py", "benchmarks/defaults.py"
COMMON, REPRODUCE = "benchmarks/common.py", "benchmarks/reproduce.py"
DOCS = "docs/from_reinforce_to_ppo.md"
LOW_HIGH = "advantages < 0, ratio.clamp(min=low), ratio.clamp(max=high)"
MUTANTS = [
    # gae_fast: the recursion, its ends, its blocks
    (GAE, "+ trace_decay * next_advantage", "+ gamma * next_advantage", "is_its_definition"),
    (GAE, "latest if num_envs == 1", "latest if num_envs <= 2", "is_its_definition"),
    (GAE, "elif not terminations[k]:", "elif True:", "is_its_definition"),
    (GAE, "if not ends[k]:", "if not terminations[k]:", "is_its_definition"),
    (INIT, "= swept[:num_envs]", "= swept[-num_envs:]", "blocks_do_not_change"),
    (INIT, "gamma, 1.0)[0]", "gamma, gamma)[0]", "rewards_to_go_is_its_definition"),
    (INIT, "if not 0.0 <= number <= 1.0:", "if number < 0.0 or number > 1.0:", "refused_input"),
    # Args: what no run could use
    (PPO, "not least <= value <= most", "not value >= least", "bad_value"),
    (PPO, '"num_steps": 2}', '"num_steps": 1}', "bad_value"),
    (PPO, '"num_steps": 2}', '"num_steps": 3}', "smallest_values"),
    (PPO, '{"seed": 0,', '{"seed": 1,', "smallest_values"),
    (PPO, "* (self.num_steps // 2)", "* self.num_steps", "bad_value"),
    (PPO, "            load_checkpoint(self.resume)\n", "            pass\n", "bad_value"),
    (PPO, "weights_only=True", "weights_only=False", "bad_value"),
    (PPO, 'if checkpoint["algorithm"] != ALGORITHM:', "if False:", "bad_value"),
    (PPO, "and action_space.start == 0", "", "bad_value"),
    (PPO, "!= AutoresetMode.NEXT_STEP", "is None", "bad_value"),
    # the rollout: autoreset, truncation, raw returns, old log-probabilities
    (PPO, "rewards[~is_step] = 0.0", "pass", "no_steps_reach"),
    (PPO, "x[kept] for x in fields", "x.flatten(0, 1) for x in fields", "no_steps_reach"),
    (PPO, "discounted_sums[is_step, None]", "discounted_sums.reshape(-1, 1)", "normalised_rewards"),
    (PPO, "raw_obs[:-1][kept]", "raw_obs[:-1].flatten(0, 1)", "no_steps_reach"),
    (PPO, "ends = (terminations,", "ends = (terminations | truncations,", "truncation_boot"),
    (PPO, "ends = (terminations,", "ends = (terminations & False,", "truncation_boot"),
    (PPO, ".item()).clip(-10, 10)", ".item())", "rewards_are_at_most_10"),
    (PPO, "discounted_sums[t - 1] * is_step[t]", "discounted_sums[t - 1]", "normalised_rewards"),
    (PPO, "discounted_sums[t - 1]", "discounted_sums[max(t - 1, 0)]", "normalised_rewards"),
    (PPO, "agent.policy(standard_obs[:-1])", "agent.policy(standard_obs[1:])", "stored_log_probs"),
    (PPO, "ClipAction(envs) if is_real else envs", "envs", "clipped_to_their_bounds"),
    # the policy, and acting in NumPy
    (PPO, "(x + rng.gumbel(size=x.shape))", "x", "acting_in_numpy_draws"),
    (PPO, "x + action_std * rng", "x + rng", "acting_in_numpy_draws"),
    (PPO, ".clip(-10, 10) if agent.norm_obs", "if agent.norm_obs", "acting_in_numpy_draws"),
    (
        PPO,
        "    assert {type(x) for x in agent.actor}",
        "    {type(x) for x in agent.actor}",
        "refuses_a",
    ),
    (PPO, "self.sums += mean", "self.sums = mean", "running_statistics"),
    # the update
    (PPO, LOW_HIGH, "advantages < 0, ratio, ratio.clamp(max=high)", "theorem_1 or theorem_2"),
    (PPO, "torch.where(advantages < 0,", "torch.where(advantages > 0,", "theorem_1 or theorem_2"),
    (PPO, "- args.ent_coef * entropy", "+ args.ent_coef * entropy", "one_step_is"),
    (
        PPO,
        "            optimizer.zero_grad()\n",
        "",
        "second_step or forms_train or each_epoch or one_step",
    ),
    (PPO, "parameters(), args.max_grad_norm)", "parameters(), 1e9)", "one_step_is"),
    (PPO, "torch.randperm(len(batch.obs))", "torch.arange(len(batch.obs))", "each_epoch"),
    (PPO, 'metrics["approx_kl"] > args.target_kl', "False", "target_kl_ends"),
    (PPO, "            if args.norm_adv:\n", "            if True:\n", "old_policy_all"),
    # the run: seeds, stretches, checkpoints, rows
    (PPO, "torch.manual_seed(seeds[0])", "pass", "one_command or stopped_and"),
    (PPO, "np.random.default_rng(seeds[1])", "np.random.default_rng()", "one_command"),
    (PPO, "envs.reset(seed=seeds[2])", "envs.reset()", "one_command"),
    (PPO, "(args.seed, iteration, RANK)", "(args.seed, RANK)", "stretches or stopped_and"),
    (PPO, 'optimizer.load_state_dict(checkpoint["optimizer"])', "pass", "stopped_and_resumed_run"),
    (PPO, 'envs.return_queue.extend(checkpoint["returns"])', "pass", "stopped_and_resumed_run"),
    (
        PPO,
        'self.folder / "checkpoint.new")\n',
        'self.folder / "checkpoint.pt")\n',
        "holds_the_run or stopped",
    ),
    (PPO, 'group["lr"] = share_left * learning_rate', "pass", "learning_rate_falls"),
    (
        PPO,
        'default=Args(**load_checkpoint(args.resume)["args"])',
        "default=args",
        "given_with_resume or killed",
    ),
    (PPO, "if value is not None and not math.isfinite(value):", "if False:", "not_finite"),
    (PPO, "numbers = row | {name", "numbers = row or {name", "not_finite"),
    # several ranks
    (PPO, "mean_over_ranks(*(x.grad for x in agent.parameters()))", "pass", "equal_weights"),
    (PPO, "vector / WORLD_SIZE, tensors", "vector, tensors", "two_halves"),
    (
        PPO,
        "(torch.tensor(float(len(batch.obs)))) * WORLD_SIZE",
        "(torch.tensor(float(len(batch.obs))))",
        "equal_w",
    ),
    (VPG, "iteration, RANK)", "iteration)", "of_their_own"),
    (VPG, "mean_over_ranks(*(x.grad for x in agent.critic.parameters()))", "pass", "two_halves"),
    (TRPO, "g = mean_over_ranks(flat_gradient", "g = (flat_gradient", "two_halves"),
    (TRPO, "return mean_over_ranks(hessian_vector)", "return hessian_vector", "two_halves"),
    (PPO_KL, "mean_over_ranks(kl).item()", "kl.item()", "two_halves"),
    # REINFORCE: whole episodes, their mean, their weights
    (REINFORCE, ".sum() / args.num_envs", ".mean()", "mean_over_episodes"),
    (REINFORCE, "is_playing = is_playing & ~is_over", "is_playing = ~is_over", "one_whole_episode"),
    (REINFORCE, "np.where(is_playing, reward, 0.0)", "reward", "one_whole_episode"),
    (REINFORCE, "envs.env.step(", "envs.step(", "one_whole_episode"),
    (REINFORCE, ".item()).clip(-10, 10)", ".item())", "rewards_are_at_most_10"),
    (
        REINFORCE,
        "batch.rewards_to_go if args",
        "batch.total_returns if args",
        "policy_gradient_with",
    ),
    (REINFORCE, "    if args.norm_returns:", "    if False:", "standardised_over_all"),
    # VPG: the step and the regression
    (VPG, "loss = -(policy", "loss = (policy", "policy_takes_one_step"),
    (
        VPG,
        "batch.obs[rows]) - batch.returns[rows]",
        "batch.obs[rows]) - batch.values[rows]",
        "critic_conv",
    ),
    (VPG, '"lr": args.value_learning_rate', '"lr": args.learning_rate', "one_adam_has"),
    # TRPO: the natural gradient, the ball, the line search
    (
        TRPO,
        "improvement > 0 and kl <= args.target_kl",
        "improvement > 0",
        "within_the_ball or shortens",
    ),
    (TRPO, "improvement > 0 and kl <= args.target_kl", "kl <= args.target_kl", "overshoots"),
    (
        TRPO,
        "        nn.utils.vector_to_parameters(old_parameters, parameters)",
        "        pass",
        "every_bit",
    ),
    (TRPO, "(2 * args.target_kl /", "(args.target_kl /", "edge_of_the_ball"),
    (TRPO, "+ damping * vector", "", "fisher_vector_product"),
    (TRPO, "args.line_search_decay**attempt", "1.0", "shortens"),
    (
        TRPO,
        "kl_divergence(old_policy, policy).mean()).item()",
        "kl_divergence(policy, old_policy).mean()).item()",
        "within_the_ball",
    ),
    (TRPO, "residual = residual - step", "residual = residual + step", "conjugate_gradients"),
    (TRPO, "<= 1e-10 * (b @ b)", "< 0", "stop_when_done"),
    (
        TRPO,
        "    nn.utils.vector_to_parameters(nn.utils.parameters_to",
        "    (nn.utils.parameters_to",
        "lies_in_memory",
    ),
    # PPO-KL: the penalty and β
    (PPO_KL, "advantages - penalty", "advantages + penalty", "penalised_loss"),
    (
        PPO_KL,
        "kl_divergence(old_agent.policy(obs), policy)",
        "kl_divergence(policy, old_agent.policy(obs))",
        "penalised_loss",
    ),
    (PPO_KL, "2 * beta if kl", "3 * beta if kl", "beta_doubles"),
    (PPO_KL, 'optimizer.param_groups[0]["beta"] = adapted', "_ = adapted", "adaptive_beta_follows"),
    # the forms and the partition
    (
        PPO,
        "ratio - ratio.clamp(low, high), 0.0",
        "ratio.clamp(low, high) - ratio, 0.0",
        "theorem_2",
    ),
    (PPO, "torch.where(kill, -ratio.detach(), 0.0)", "torch.where(kill, -ratio, 0.0)", "theorem_1"),
    (
        PPO,
        "torch.where(kill, -ratio.detach(), 0.0)",
        "torch.where(~kill, -ratio.detach(), 0.0)",
        "theorem_1",
    ),
    (PPO, "(below & (advantages < 0))", "below", "in_one_set"),
    (PPO, "above, below = ratio > 1", "above, below = ratio >= 1", "in_one_set"),
    (
        PPO,
        "partition(log_ratio.exp(), advantages,",
        "partition(log_ratio.exp(), -advantages,",
        "rows_log",
    ),
    (
        PPO_KL,
        "torch.where(masks[1], ratio.detach(), 0.0)",
        "torch.where(masks[1], ratio, 0.0)",
        "theorem_1 or float32",
    ),
    (PPO_KL, "torch.where(masks[1],", "torch.where(masks[2],", "theorem_1_per_sample_in"),
    # play.py
    (
        PLAY,
        "policy.sample() if args.stochastic else policy.mode",
        "policy.sample()",
        "returns_and_len",
    ),
    (PLAY, "policy.sample() if args.stochastic else policy.mode", "policy.mode", "one_seed"),
    (PLAY, "agent.policy(agent.standardize(obs))", "agent.policy(obs)", "returns_and_lengths"),
    (PLAY, "if add_frame and episode == 0:", "if add_frame:", "video_is_one"),
    (PLAY, "        part.unlink(missing_ok=True)", "        pass", "fails_leaves_no_file"),
    # compare.py
    (COMPARE, 'side="right"', 'side="left"', "curves_hold"),
    (COMPARE, "trim_mean(values, 0.25", "trim_mean(values, 0.1", "interquartile_mean"),
    (
        COMPARE,
        '(run.rows["episodes"] >= 100)',
        '(run.rows["episodes"] >= 0)',
        "threshold_is_reached",
    ),
    # defaults: one set where nothing speaks against it, and the page that sets it beside the peers'
    (VPG, "gamma: float = 0.995", "gamma: float = 0.99", "defaults_of_one_name"),
    (PPO_KL, "update_epochs: int = 10", "update_epochs: int = 5", "defaults_of_one_name"),
    (DEFAULTS, 'if row["text"] == text_of(row["program"])', "if row", "script_has_changed"),
    (COMMON, "if ast.get_docstring(node) is not None", "if False", "script_has_changed"),
    (
        COMMON,
        "if token.type == tokenize.COMMENT",
        "if False",
        "script_has_changed or renews_a_block",
    ),
    (DEFAULTS, 'side="right"', 'side="left"', "at_or_before_each_step"),
    (DEFAULTS, "latest[-1] = len(steps) - 1", "pass", "at_or_before_each_step"),
    (DEFAULTS, "np.mean(ours) - np.mean(peer)", "np.mean(peer) - np.mean(ours)", "who_is_ahead"),
    (DEFAULTS, "/ (np.mean(peer) - base)", "/ np.mean(peer)", "who_is_ahead"),
    (DEFAULTS, "ddof=1", "ddof=0", "who_is_ahead or what_the_program_makes"),
    (DEFAULTS, 'not has(args.python, "sb3_contrib")', "not True", "defaults_names_a_missing_peer"),
    # the pages, and the figures that README and docs quote
    (REPRODUCE, 'if block["command"] != command:', "if False:", "renews_a_block"),
    (REPRODUCE, "behind = block[0].partition", "behind = str().partition", "renews_a_block"),
    (
        REPRODUCE,
        'stamp[4] == fingerprint(*measured_by(block["command"]))',
        "True",
        "renews_a_block",
    ),
    (REPRODUCE, "if changes := git(", "if False and git(", "not_committed"),
    ("README.md", "| Pendulum-v1 | -1190 ", "| Pendulum-v1 | -1191 ", "part_of_one_on_the_page"),
    (DOCS, "[−156 ± 8]", "[−157 ± 8]", "a_quoted_figure"),
    (DOCS, "[−156 ± 8]", "[−156 ± 9]", "a_quoted_figure"),
    (DOCS, "[−156 ± 8](", "−156 ± 8 (", "copied_by_hand"),
    (DOCS, "[2.19]", "[2.9]", "a_quoted_figure"),
]


def tests_fail(file: str, text: str, replacement: str, tests: str) -> bool:
    """Whether these tests fail in a copy of the repository with one text replaced."""
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder, "copy")
        ignored = shutil.ignore_patterns(
            ".git",
            ".venv",
            ".peers",
            "comparisons",
            "runs",
            "build",
            "*.egg-info",
            ".*_cache",
            "*.so",
            "*.pyd",
        )
        shutil.copytree(ROOT, copy, ignore=ignored)
        (copy / file).write_text((copy / file).read_text().replace(text, replacement))
        command = [
            sys.executable,
            "-W",
            "ignore",
            "-m",
            "pytest",
            "-q",
            "-x",
            "-n",
            "0",
            "-p",
            "no:cacheprovider",
            "-k",
            tests,
        ]
        environment = {**os.environ, "PYTHONPATH": str(copy)}  # ahead of an installed gae_fast
        status = subprocess.run(command, cwd=copy, env=environment, capture_output=True).returncode
        assert status in (0, 1), f"pytest could not run: status {status}"  # 1: some test failed
        return status == 1


word = sys.argv[1] if len(sys.argv) > 1 else ""
chosen = [mutant for mutant in MUTANTS if word in f"{mutant[0]} {mutant[3]}"]
assert chosen, f"no mutant has {word} in its file or tests"
for file, text, *_ in MUTANTS:
    count = (ROOT / file).read_text().count(text)
    assert count == 1, f"{file}: expected once, found {count} times: {text}"
every_test = " or ".join(sorted({tests for *_, tests in chosen}))
assert not tests_fail(PPO, "import csv", "import csv", every_test), "they fail unbroken, too"
survivors = 0
for file, text, replacement, tests in chosen:
    noticed = tests_fail(file, text, replacement, tests)
    survivors += not noticed
    said = "noticed " if noticed else "SURVIVED"
    print(f"{said}  {file}: {text!r} → {replacement!r}  ({tests})", flush=True)
print(f"{survivors} of {len(chosen)} survived")
sys.exit(survivors > 0)
