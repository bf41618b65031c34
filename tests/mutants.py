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
    (PPO, "not span[0] <= value <= span[1]", "not value >= span[0]", "bad_value"),
    (PPO, "Annotated[int, (2, math.inf)]", "Annotated[int, (1, math.inf)]", "bad_value"),
    (PPO, "Annotated[int, (2, math.inf)]", "Annotated[int, (3, math.inf)]", "smallest_values"),
    (PPO, "Annotated[int, (0, 2**63)]", "Annotated[int, (1, 2**63)]", "smallest_values"),
    (PPO, "* (self.num_steps // 2)", "* self.num_steps", "bad_value"),
    (PPO, "weights_only=True", "weights_only=False", "bad_value or refused"),
    (PPO, 'if (config["algorithm"], config["world_size"]) != (', "if (0, 0) == (", "refused"),
    (PPO, '.get("autoreset_mode") != AutoresetMode.NEXT_STEP', " is None", "refused"),
    (
        PPO,
        "if is_new and args.resume or args",
        "if args",
        "unusable_environment_or_folder",
    ),
    (PPO, "args.run_dir and (folder", "False and (folder", "refused"),
    # environments: actions, info, seeds
    (PPO, "center + scale * actions", "actions", "faults and bounds"),
    (PPO, "return actions.clip(low, high)", "return actions", "faults and bounds or clipped_to"),
    (PPO, ".astype(space.dtype)", "", "of_their_space or bounds_exactly"),
    (PPO, 'getattr(space, "start", 0)', "0", "of_their_space"),
    (PPO, "_add_info = lambda infos, *_: infos", "_x = 0", "info"),
    (PPO, "space == Discrete(space.n)", "True", "actions_are_of_their_space"),
    (PPO, "reshape(len(actions), *", "reshape(-1, *", "actions_are_of_their_space"),
    (PPO, ", self.envs.time_queue.clear()", "", "queues_of_ended"),
    (PPO, 'saved.pop("agent")', 'saved["agent"]', "is_for_one_train"),
    (PPO, "[process.kill() for process in getattr", "[0 for process in getattr", "ctrl_c"),
    (PPO, 'stats_key="ours"', 'stats_key="episode"', "advantages_are_those"),
    (PPO, "rng.integers(2**30)", "rng.integers(2**30) + 2**31", "seeds"),
    # the rollout: autoreset, truncation, raw returns, old log-probabilities
    (PPO, "rewards[~is_step] = 0.0", "pass", "no_steps_reach"),
    (PPO, "arrays = (x[is_step] for x", "arrays = (x.reshape(-1, *x.shape[2:]) for x", "no_steps"),
    (PPO, "discounted_sums[is_step, None]", "discounted_sums.reshape(-1, 1)", "normalised_rewards"),
    (PPO, "raw_obs[:-1][is_step])", "raw_obs[:-1].reshape(-1, raw_obs.shape[-1]))", "no_steps"),
    (PPO, "ends = (terminations,", "ends = (terminations | truncations,", "truncation_boot"),
    (PPO, "ends = (terminations,", "ends = (terminations & False,", "truncation_boot"),
    (PPO, "-0.5 * torch.full((k,), k)", "torch.full((k,), 0.5)", "span_a_box"),
    (PPO, "max(agent.reward_moments[2], ", "max(1e-8 + 0 * ", "normalised_rewards"),
    (PPO, "agent.largest_reward / 10)", "agent.largest_reward / 1e9)", "rewards_are_at_most_10"),
    (PPO, "largest_reward.clamp_(", "largest_reward.fill_(", "rewards_are_at_most_10"),
    (PPO, "discounted_sums[t - 1] * is_step[t]", "discounted_sums[t - 1]", "normalised_rewards"),
    (PPO, "discounted_sums[t - 1]", "discounted_sums[max(t - 1, 0)]", "normalised_rewards"),
    (
        PPO,
        "    log_probs = agent.policy(obs).log",
        "    log_probs = 0.9 * agent.policy(obs).log",
        "stored",
    ),
    (
        PPO,
        "        if args.norm_adv:\n",
        "        if True:\n",
        "standard or definition",
    ),
    (
        PPO,
        "_, mean, std = with_rows(advantages.new_zeros(3, 1), advantages[:, None])",
        "mean, std = advantages.mean(), advantages.std(correction=0)",
        "standardised_over_both",
    ),
    # the policy, and acting in NumPy
    (PPO, "(output + rng.gumbel(size=output.shape))", "output", "acting_in_numpy_draws"),
    (PPO, "output + std * rng", "output + rng", "acting_in_numpy_draws or check"),
    (PPO, ".clip(-self.clip_obs, self.clip_obs)", "", "acting_in_numpy_draws or at_most_10"),
    (PPO, "        self.check_sampler(torch.randn(100, num_obs))\n", "", "check or sampler"),
    (PPO, "    rows = rows - center", "    center = 0 * center", "far_from_0"),
    (PPO, "count * std**2])", "0 * count])", "statistics"),
    # the update
    (PPO, LOW_HIGH, "advantages < 0, ratio, ratio.clamp(max=high)", "theorem_1 or theorem_2"),
    (PPO, "torch.where(advantages < 0,", "torch.where(advantages > 0,", "theorem_1 or theorem_2"),
    (PPO, "- args.ent_coef * entropy", "+ args.ent_coef * entropy", "one_step_is"),
    (PPO, " / (policy.event_shape.numel() or 1)", "", "one_step_is"),
    (PPO_KL, " / (policy.event_shape.numel() or 1)", "", "second_step"),
    (
        PPO,
        "            optimizer.zero_grad()\n",
        "",
        "second_step or forms_train or each_epoch or one_step",
    ),
    (PPO, "parameters, args.max_grad_norm)", "parameters, 1e9)", "one_step_is"),
    (PPO, "torch.randperm(len(batch.obs))", "torch.arange(len(batch.obs))", "each_epoch"),
    (PPO, '["approx_kl"] > args.target_kl', '["approx_kl"] > 1e9', "target_kl_ends"),
    (PPO, "log_ratio.expm1() - log_ratio", "log_ratio.exp() - 1 - log_ratio", "tiny_log_ratios"),
    (PPO, "0.5 * errors.square()", "errors.square()", "metrics"),
    (PPO, 'dict(zip(("clipfrac", "frac_kill")', 'dict(zip(("frac_kill", "clipfrac")', "kill"),
    # the run: seeds, stretches, checkpoints, rows
    (PPO, "torch.manual_seed(rng", "int(rng", "one_command or stopped_and"),
    (PPO, "default_rng((args.seed, ", "default_rng((time.time_ns(), ", "one_command"),
    (PPO, "envs.reset(seed=int(rng.integers(2**30)))", "envs.reset()", "one_command"),
    (PPO, "(args.seed, iteration, rank_", "(args.seed, rank_", "stretches or stopped_and"),
    (
        PPO,
        'self.optimizer.load_state_dict(saved.pop("optimizer"))',
        "pass",
        "stopped_and_resumed_run",
    ),
    (PPO, 'saved.get("recent", [])', "[]", "stopped_and_resumed_run"),
    (
        PPO,
        'self.folder / "checkpoint.new")\n',
        'self.folder / "checkpoint.pt")\n',
        "holds_the_run or stopped",
    ),
    (PPO, '"initial": self.global_step', '"initial": 0', "bar"),
    (PPO, "- args.anneal_lr * run", "- 0 * run", "learning_rate_falls"),
    (PPO, "tyro.cli(Args, default=own)", "named", "given_with_resume or killed"),
    (PPO, "if value is not None and not math", "if False and not math", "not_finite"),
    (PPO, "in {**row, **self.agent.state_dict()}", "in {**row}", "not_finite"),
    (
        PPO,
        "if self.global_step >= self.saved_step + self.period and self.episodes ==",
        "if self.episodes ==",
        "where_episodes_end",
    ),
    (PPO_KL, "assert not self.rows or", "assert True or", "columns"),
    # several ranks
    (PPO, "mean_over_ranks(*(x.grad for x in parameters))", "pass", "equal_weights"),
    (PPO, "vector / torch.distributed.get_world_size(), tensors", "vector, tensors", "two_halves"),
    (PPO, "sum(steps for steps, _ in gathered)", "steps", "equal_w"),
    (VPG, "iteration, rank_and_world_size()[0])", "iteration)", "of_their_own"),
    (VPG, "mean_over_ranks(*(x.grad for x in agent.critic.parameters()))", "pass", "two_halves"),
    (TRPO, "g = mean_over_ranks(flat_gradient", "g = (flat_gradient", "two_halves"),
    (TRPO, "return mean_over_ranks(hessian_vector)", "return hessian_vector", "two_halves"),
    (PPO_KL, "kl = mean_over_ranks(kl_divergence(", "kl = (kl_divergence(", "two_halves"),
    # REINFORCE: whole episodes, their mean, their weights
    (REINFORCE, ".sum() / args.num_envs", ".mean()", "mean_over_episodes"),
    (REINFORCE, "is_playing = is_playing & ~is_over", "is_playing = ~is_over", "one_whole_episode"),
    (REINFORCE, "np.where(is_playing, reward, 0.0)", "reward", "one_whole_episode"),
    (REINFORCE, "envs.env.step(", "envs.step(", "one_whole_episode"),
    (REINFORCE, "largest_reward / 10)", "largest_reward / 1e9)", "rewards_are_at_most_10"),
    (REINFORCE, "        if not args.reward_to_go:", "        if True:", "one_whole_episode"),
    (REINFORCE, "returns - returns.mean(axis=1, keepdims=True)", "returns", "mean_at_each_time"),
    (REINFORCE, "returns.mean(axis=1, keepdims=True)", "returns[is_step].mean()", "mean_at_each"),
    (REINFORCE, "weights / torch.hypot(mean, std)", "weights", "mean_at_each"),
    (REINFORCE, "torch.hypot(mean, std)", "std", "mean_at_each"),
    # VPG: the step and the regression
    (VPG, "loss = -(log_probs", "loss = (log_probs", "policy_takes_one_step"),
    (
        VPG,
        "batch.obs[rows]) - batch.returns[rows]",
        "batch.obs[rows]) - batch.advantages[rows]",
        "critic_conv",
    ),
    (VPG, '"lr": args.value_learning_rate', '"lr": args.learning_rate', "one_adam_has"),
    # TRPO: the natural gradient, the ball, the line search
    (
        TRPO,
        "improvement > 0 and kl <= delta",
        "improvement > 0",
        "within_the_ball or shortens",
    ),
    (TRPO, "improvement > 0 and kl <= delta", "kl <= delta", "overshoots"),
    (TRPO, "        set_parameters(parameters, old_parameters)\n", "        pass\n", "every_bit"),
    (
        TRPO,
        '(optimizer.param_groups[0]["lr"] / args.value_learning_rate)',
        "1.0",
        "shrinks_with_the_learning_rate",
    ),
    (TRPO, "(2 * delta /", "(delta /", "edge_of_the_ball"),
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
    (TRPO, "x.data.copy_(part.view_as(x))", "x.data = part.view_as(x)", "memory"),
    # PPO-KL: the penalty and β
    (PPO_KL, "advantages - penalty", "advantages + penalty", "penalised_loss"),
    (
        PPO_KL,
        "kl_divergence(old_policy(obs), policy)",
        "kl_divergence(policy, old_policy(obs))",
        "penalised_loss",
    ),
    (PPO_KL, "2 * beta if kl", "3 * beta if kl", "beta_doubles"),
    (PPO_KL, '["approx_kl"] > 2 *', '["approx_kl"] > 3 *', "epochs_go_on"),
    (PPO_KL, 'args.penalty == "adaptive" and', "True and", "ends_the_epochs_of"),
    (PPO_KL, "min(max(beta, 0.25), 1e4)", "beta", "beta or limits"),
    (PPO_KL, "betas[args.penalty]", "betas.get(args.penalty, args.beta)", "mistyped_penalty"),
    (PPO_KL, 'group["beta"] = adapted', "_ = adapted", "adaptive_beta_follows"),
    (PPO_KL, "Annotated[float, (1e-12, math.inf)]", "Amount", "target_kl or bad_value"),
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
    (
        PPO,
        "(ratio < 1 - clip_coef) & (advantages < 0)",
        "(ratio < 1 - clip_coef)",
        "kill or theorem",
    ),
    (PPO, "kill_mask(ratio, batch.advantages,", "kill_mask(ratio, -batch.advantages,", "kill"),
    (
        PPO_KL,
        "torch.where(kill, ratio.detach(), 0.0)",
        "torch.where(kill, ratio, 0.0)",
        "theorem_1 or float32",
    ),
    (PPO_KL, "torch.where(kill, ratio", "torch.where(~kill, ratio", "theorem_1_per_sample"),
    # play.py
    (
        PLAY,
        "policy.sample() if args.stochastic else policy.mode",
        "policy.sample()",
        "returns_and_len",
    ),
    (PLAY, "policy.sample() if args.stochastic else policy.mode", "policy.mode", "one_seed"),
    (PLAY, "standardize(np.asarray(obs, float))", "np.float32(obs)", "returns_and_lengths"),
    (
        PLAY,
        "            if add_frame and episode == 0:  # what",
        "            if False:  #",
        "video_is_one",
    ),
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
    (VPG, "= 0.994  # discount", "= 0.99  # discount", "defaults_of_one_name"),
    (PPO_KL, "update_epochs: Count = 10", "update_epochs: Count = 5", "defaults_of_one_name"),
    (COMMON, 'if row["text"] == text_of(row["program"])', "if row", "script_has_changed"),
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
    (
        COMMON,
        "statistics.stdev(values)",
        "statistics.pstdev(values)",
        "who_is_ahead or what_the_program_makes",
    ),
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
    ("README.md", "| Pendulum-v1 | -1147 ", "| Pendulum-v1 | -1148 ", "part_of_one_on_the_page"),
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


if __name__ == "__main__":
    word = sys.argv[1] if len(sys.argv) > 1 else ""
    chosen = [mutant for mutant in MUTANTS if word in f"{mutant[0]} {mutant[3]}"]
    assert chosen, f"no mutant has {word} in its file or tests"
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
