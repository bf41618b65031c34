"""Break the code, one line at a time, and see that the test which guards the line fails: python tests/mutants.py

Each mutant is (file, text, what replaces it, the tests that must notice). The repository is copied and left as it is.
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
COMPARE, PLAY = "compare.py", "play.py"
MIN = "torch.where(advantages < 0, ratio.clamp(min=1 - clip_coef), ratio.clamp(max=1 + clip_coef)) * advantages"
EPOCH = "    for _ in range(args.update_epochs):\n        samples = []\n"
ALL_EPOCHS = "    samples = []\n    for _ in range(args.update_epochs):\n"
BETA = "advantages * (torch.where(kill, -ratio.detach(), 0.0) * log_probs)"
MUTANTS = [
    # gae_fast: the recursion, its ends, its blocks
    (GAE, "+ trace_decay * next_advantage", "+ gamma * next_advantage", "is_its_definition"),
    (GAE, "latest if num_envs == 1", "latest if num_envs <= 2", "is_its_definition"),
    (GAE, "elif not terminations[k]:", "elif True:", "is_its_definition"),
    (GAE, "if not ends[k]:", "if not terminations[k]:", "is_its_definition"),
    (INIT, "next_advantages = swept[:num_envs]", "next_advantages = swept[-num_envs:]", "blocks_do_not_change"),
    (INIT, "gamma, 1.0)[0]", "gamma, gamma)[0]", "rewards_to_go_is_its_definition"),
    (INIT, "if not 0.0 <= number <= 1.0:", "if number < 0.0 or number > 1.0:", "refused_input"),
    # the rollout: the mask, truncation, raw returns, old log-probabilities
    (PPO, "rewards[~is_step] = 0.0", "pass", "autoreset_rows"),
    (PPO, "x[rows] for x in (obs", "x.flatten(0, 1) for x in (obs", "autoreset_rows or each_real_step"),
    (PPO, "discounted_sums[is_step]", "discounted_sums", "autoreset_rows or normalized_rewards"),
    (PPO, "values.cpu(), terminations, truncations", "values.cpu(), dones, truncations", "truncation_bootstraps"),
    (PPO, "values.cpu(), terminations, truncations", "values.cpu(), 0 * dones, dones", "termination_does_not"),
    (
        PPO,
        "episodes.discounted_sum * is_step[t]",
        "episodes.discounted_sum",
        "normalized_rewards",
    ),
    (PPO, "record_episodes(episodes, rewards,", "record_episodes(episodes, rewards / 2,", "raw_one or agree_with"),
    (PPO, "returns[t:, n] -= returns[t, n]", "pass", "raw_one or agree_with"),
    (PPO, "agent.policy(obs[:-1]).log_prob", "agent.policy(obs[1:]).log_prob", "stored_log_probs"),
    (PPO, "envs = ClipAction(envs)", "pass", "actions_are_clipped"),
    (PPO, "actions[t].copy()", "actions[t]", "writes_into_its_action"),
    # the policy, and acting in NumPy
    (PPO, "return -(self.logits.exp()", "return (self.logits.exp()", "torchs_distributions"),
    (PPO, "(self.logits - torch.empty_like", "(self.logits + torch.empty_like", "acting_in_numpy_draws"),
    (PPO, "(x + rng.gumbel(size=x.shape))", "x", "acting_in_numpy_draws"),
    (PPO, "std * rng.standard_normal", "rng.standard_normal", "acting_in_numpy_draws"),
    (PPO, "if agent.norm_obs else obs\n        for", "if False else obs\n        for", "acting_in_numpy_draws"),
    (PPO, "if type(layer) is nn.Tanh:", "if type(layer) is not nn.Linear:", "refuses_a_layer"),
    (PPO, "self.log_std.exp().expand_as(mean)", "self.log_std.expand_as(mean)", "torchs_distributions or acting"),
    (PPO, "num_rows / self.count", "num_rows / (self.count + 1)", "running_statistics"),
    # the update
    (PPO, "advantages < 0, ratio.clamp(min=1 - clip_coef)", "advantages < 0, ratio", "theorem_1 or theorem_2"),
    (PPO, "advantages < 0, ratio.clamp(", "advantages > 0, ratio.clamp(", "theorem_1 or theorem_2"),
    (PPO, "- args.ent_coef * entropy", "+ args.ent_coef * entropy", "one_step"),
    (PPO, "self.grad.zero_()", "pass", "torchs_adam"),
    (PPO, "/ max_grad_norm)", "/ max_grad_norm / 2)", "one_step"),
    (PPO, "clamp(min=1.0).float()", "clamp(min=0.0).float()", "torchs_adam"),
    (PPO, 'self.state["step"] += 1', "pass", "torchs_adam"),
    (PPO, "torch.randperm(len(batch.obs)", "torch.randperm(len(batch.obs) - 1", "each_epoch"),
    (PPO, "torch.randperm(len(batch.obs)", "torch.arange(len(batch.obs)", "each_epoch"),
    (PPO, "mean_over_ranks(k3).item() > args.target_kl", "False", "target_kl"),
    # the run
    (PPO, "torch.manual_seed(args.seed)", "pass", "one_command"),
    (PPO, "np.random.default_rng(action_seed + rank())", "np.random.default_rng()", "one_command"),
    (PPO, "seed=first_seed", "seed=None", "one_command"),
    (PPO, 'self.register_buffer("mean", torch.zeros(shape))', "self.mean = torch.zeros(shape)", "restores_the_policy"),
    (PPO, "check_args(args)\n            if args.device", "if args.device", "leaves_nothing"),
    # stop and resume
    (PPO, "if len(self.actions) > self.most_repeated:", "if False:", "repeat_too_much"),
    (PPO, "episodes.actions.extend(actions)", "pass", "stopped_and_resumed"),
    (PPO, "torch.default_generator.manual_seed(torch_seed + rank())", "pass", "stopped_and_resumed"),
    (PPO, "np.asarray(self.obs, np.float32)", "np.asarray(self.obs)", "stopped_and_resumed"),
    (PPO, "if not all(all_gather(is_same)):", "if False:", "do_not_repeat"),
    (PPO, "self.file.truncate(progress.metrics_size)", "pass", "stopped_and_resumed"),
    (PPO, "progress.metrics_size = log.sync()", "pass", "stopped_and_resumed"),
    (PPO, 'tensor.copy_(checkpoint["optimizers"][name][key].view_as(tensor))', "pass", "stopped_and_resumed"),
    (PPO, "if damaged := file.testzip():", "if damaged := None:", "bit_is_flipped"),
    (PPO, 'map_location="cpu", weights_only=True', 'map_location="cpu", weights_only=False', "unusable_checkpoint"),
    (PPO, "if config[name] != value and", "if False and", "unusable_checkpoint"),
    (PPO, "new != old and not is_longer", "False", "changed_argument"),
    (PPO, "new > old and not saved.anneal_lr", "new > old", "changed_argument"),
    (PPO, "return parse_args(saved_args(args.resume))", "return args", "killed_and_resumed"),
    (PPO, 'with open(new, "wb") as file:', 'with open(path, "wb") as file:', "cannot_grow or full_disk"),
    (PPO, "sys.exit(130)", "sys.exit(1)", "ctrl_c"),
    # numbers and environments gone wrong
    (PPO, 'getattr(envs.unwrapped, "processes", [])', "[]", "process_that_dies or environment_that_fails"),
    (PPO, "check_finite(observations=obs, rewards=rewards)", "pass", "not_finite_stop"),
    (REINFORCE, "check_finite(observations=obs, rewards=rewards)", "pass", "not_finite_stop"),
    (TRPO, "check_finite(loss=old_surrogate, gradient=gradient)", "pass", "advantages_that_are_not_finite"),
    (
        TRPO,
        "nn.utils.vector_to_parameters(nn.utils.parameters_to_vector(parameters), parameters)",
        "pass",
        "lies_in_memory",
    ),
    (PPO, "check_finite(**agent.state_dict())", "pass", "never_saved"),
    (PPO, "if not math.isfinite(loss.item() + norm.item()):", "if False:", "never_followed"),
    (PPO, "if [x.shape for x in arrays] != expected", "if False", "other_arrays"),
    (PPO, 'options["wrappers"] = [of_one_form]', "pass", "environment_that_fails"),
    # several ranks
    (PPO, "vector * num_samples, vector.new_tensor([num_samples])", "vector, vector.new_tensor([1])", "update_of_two"),
    (PPO, "average_over_ranks(self.grad, num_samples)", "pass", "equal_weights or update_of_two"),
    (PPO, "loss.mean(), len(loss), args.max", "loss.mean(), 1, args.max", "update_of_two"),
    (PPO, "n * (var + mean.square())]", "n * var]", "update_of_two or statistics_are"),
    (PPO, "mean = mean.dtype, mean.double()", "mean = mean.dtype, mean", "statistics_are"),
    (PPO, "mean.to(dtype), n.long()", "mean.to(dtype), num_rows", "statistics_are"),
    (VPG, "+ rank() * self.envs.num_envs", "", "have_the_seeds"),
    (VPG, "default_rng(action_seed + rank())", "default_rng(action_seed)", "actions_of_their_own"),
    (PPO, "chain(*all_gather(ended))", "chain(ended)", "episodes_of_all"),
    (PPO, "key=lambda episode: episode[0]", "key=lambda episode: 0", "episodes_of_all"),
    (PPO, "int(sum_over_ranks(torch.tensor(len(batch.obs), device=device)))", "len(batch.obs)", "equal_weights"),
    (PPO, "            if rank() == 0:\n                log.write(row)", "            log.write(row)", "equal_weights"),
    (VPG, "make_run_dir(args) if rank() == 0 else None", "make_run_dir(args)", "only_rank_0"),
    (PPO, 'checkpoint["episodes"][rank()]', 'checkpoint["episodes"][0]', "killed_rank"),
    (PPO, "if args.resume == args.run_dir and", "if False and", "killed_rank"),
    (PPO, "store = store_of_this_start(store, own_rank, size)", "pass", "killed_rank or two_hosts"),
    (VPG, 'if checkpoint["world_size"] != world_size():', "if False:", "not_resumed_by_one"),
    (PPO, "average_over_ranks(vector, len(xs[0]))", "pass", "update_of_two"),
    (
        REINFORCE,
        "with raising_on_all_ranks():\n                args = command",
        "if True:\n                args = command",
        "named_once",
    ),
    (REINFORCE, "minimize(policy_loss, args.num_envs)", "minimize(policy_loss, len(batch.obs))", "update_of_two"),
    (VPG, "average_over_ranks(value_loss, len(batch.obs))", "pass", "update_of_two"),
    (VPG, "if rank() == 0 or not isinstance(error, LostRank):", "if rank() == 0:", "error_on_one_rank"),
    (TRPO, "average_over_ranks(gradient, len(old_surrogate))", "pass", "update_of_two"),
    (TRPO, "average_over_ranks(fisher_vector, len(y))", "pass", "update_of_two"),
    (PPO_KL, "k3, kl, *masks).tolist()", "k3, 0 * kl, *masks).tolist()", "update_of_two or kl"),
    # REINFORCE: whole episodes, their mean, their weights
    (REINFORCE, ".sum() / args.num_envs", ".mean()", "mean_over_episodes"),
    (REINFORCE, "~episodes.dones & (termination", "(termination", "one_whole_episode"),
    (REINFORCE, "np.where(episodes.dones, 0.0, reward)", "reward", "one_whole_episode"),
    (REINFORCE, "batch.rewards_to_go if args", "batch.total_returns if args", "policy_gradient_with_either"),
    (
        REINFORCE,
        "self.discounted_sum = np.zeros(self.envs.num_envs)",
        "self.discounted_sum = getattr(self, 'discounted_sum', np.zeros(self.envs.num_envs))",
        "restart_with_each_episode",
    ),
    (REINFORCE, "(weights,) = standardized(weights)", "pass", "standardised_over_all"),
    # VPG: the step and the regression
    (VPG, "policy_loss = -policy", "policy_loss = policy", "policy_takes_one_step"),
    (VPG, "minibatch.obs), minibatch.returns", "minibatch.obs), minibatch.values", "critic_converges"),
    # TRPO: the natural gradient, the ball, the line search
    (TRPO, "improvement > 0 and kl <= args.target_kl", "improvement > 0", "within_the_ball or shortens"),
    (TRPO, "improvement > 0 and kl <= args.target_kl", "kl <= args.target_kl", "overshoots"),
    (TRPO, "nn.utils.vector_to_parameters(old_parameters, parameters)", "pass", "leaves_every_bit"),
    (TRPO, "(2 * args.target_kl /", "(args.target_kl /", "edge_of_the_ball"),
    (TRPO, "fisher_vector + damping * vector", "fisher_vector", "fisher_vector_product"),
    (TRPO, "(0.5 * policy.logits).exp()", "policy.logits.exp()", "fisher_vector_product"),
    (TRPO, "math.sqrt(2) * normal", "normal", "fisher_vector_product"),
    (TRPO, "normal.loc / normal.scale.detach()", "normal.loc / normal.scale", "fisher_vector_product"),
    (TRPO, ".sum() / len(y)", ".sum()", "fisher_vector_product"),
    (TRPO, "(p.logits.exp() *", "(q.logits.exp() *", "exact_kl"),
    (TRPO, "args.line_search_decay**attempt", "1.0", "shortens"),
    (TRPO, "kl_divergence(policy, new_policy)", "kl_divergence(new_policy, policy)", "within_the_ball"),
    (TRPO, "residual = residual - step", "residual = residual + step", "conjugate_gradients"),
    (TRPO, "<= 1e-10 * (b @ b)", "< 0", "stop_when_done"),
    # PPO-KL: the penalty and β
    (PPO_KL, "advantages - penalty", "advantages + penalty", "penalised_loss"),
    (PPO_KL, "kl_divergence(old_policy, policy)", "kl_divergence(policy, old_policy)", "penalised_loss"),
    (PPO_KL, "min(2 * beta, MOST_BETA)", "3 * beta", "beta_doubles"),
    (PPO_KL, "max(beta / 2, LEAST_BETA)", "beta / 2", "beta_can_always"),
    # the forms and the partition
    (PPO, MIN, "torch.min(ratio * advantages, ratio.clamp(1 - clip_coef, 1 + clip_coef) * advantages)", "just_off"),
    (PPO, "where(kill, (ratio - edge)", "where(kill, (edge - ratio)", "theorem_2"),
    (PPO, "(ratio - edge)", "(ratio - edge).detach()", "theorem_1"),
    (PPO, "(below & (advantages < 0))", "below", "in_one_set"),
    (PPO, "above, below = ratio > 1", "above, below = ratio >= 1", "in_one_set"),
    (PPO, "partition(log_ratio.exp(), advantages, args", "partition(log_ratio.exp(), -advantages, args", "rows_log"),
    (
        PPO_KL,
        "partition(log_ratio.exp(), advantages, args",
        "partition(1 / log_ratio.exp(), advantages, args",
        "rows_log",
    ),
    (
        PPO,
        "        if args.norm_adv:\n            advantages_of",
        "        if True:\n            advantages_of",
        "old_policy_all",
    ),
    (PPO, "return ratio * advantages - phi(ratio, advantages, clip_coef)", "pass", "own_penalty"),
    (PPO, EPOCH, ALL_EPOCHS, "last_epoch"),
    (PPO_KL, EPOCH, ALL_EPOCHS, "last_epoch"),
    (PPO_KL, BETA, "torch.where(kill, -ratio.detach() * advantages, 0.0) * log_probs", "in_float32"),
    (PPO_KL, "-ratio.detach(), 0.0)", "-ratio, 0.0)", "coefficient_of_each"),
    (PPO_KL, "kill, -ratio.detach()", "~kill, -ratio.detach()", "coefficient_of_each"),
    (PPO_KL, "penalty = -beta_log_probs", "penalty = beta_log_probs", "theorem_1_for_the_batch"),
    # play.py
    (PLAY, "policy.sample() if args.stochastic else policy.mode", "policy.sample()", "returns_and_lengths"),
    (PLAY, "policy.sample() if args.stochastic else policy.mode", "policy.mode", "one_seed"),
    (PLAY, "seed=args.seed if episode == 0 else None", "seed=args.seed", "one_seed"),
    (PLAY, "if video and episode == 0:", "if video:", "video_is_one"),
    (PLAY, "if kind is None:", "if True:", "fails_leaves_no_file"),
    # compare.py
    (COMPARE, 'side="right"', 'side="left"', "curves_hold"),
    (COMPARE, "trim_mean(values, 0.25", "trim_mean(values, 0.1", "interquartile_mean"),
    (COMPARE, "(episodes >= 100)", "(episodes >= 0)", "threshold_is_reached"),
]


def tests_fail(file: str, text: str, replacement: str, tests: str) -> bool:
    """Whether these tests fail in a copy of the repository with one text replaced."""
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder, "copy")
        ignored = shutil.ignore_patterns(".git", ".venv", "runs", "build", "*.egg-info", ".*_cache", "*.so", "*.pyd")
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


for file, text, *_ in MUTANTS:
    count = (ROOT / file).read_text().count(text)
    assert count == 1, f"{file}: expected once, found {count} times: {text}"
every_test = " or ".join(sorted({tests for *_, tests in MUTANTS}))
assert not tests_fail(PPO, "# What a number may be", "# What a number may be", every_test), "they fail unbroken, too"
survivors = 0
for file, text, replacement, tests in MUTANTS:
    noticed = tests_fail(file, text, replacement, tests)
    survivors += not noticed
    print(f"{'noticed ' if noticed else 'SURVIVED'}  {file}: {text!r} → {replacement!r}  ({tests})", flush=True)
print(f"{survivors} of {len(MUTANTS)} survived")
sys.exit(survivors > 0)
