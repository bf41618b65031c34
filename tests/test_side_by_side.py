"""The scripts share their scaffolding to the letter, keep to their budgets, and are formatted.

A script's own parts are its docstring, the Args after the first blank line, the section `update`,
and the imports that only these use. All else is one text, but for what REINFORCE, which has no
critic and learns from whole episodes, does without.
"""

import ast
import difflib
import re
import subprocess
import sys
from pathlib import Path

import pytest
from mutants import MUTANTS

ROOT = Path(__file__).parent.parent
SCRIPTS = {
    name: (ROOT / f"{name}.py").read_text(encoding="utf-8")
    for name in ("vpg", "trpo", "ppo_clip", "ppo_kl", "reinforce")
}
BUDGETS = dict.fromkeys(SCRIPTS, 480) | {"trpo": 520, "play": 150, "compare": 300}
UPDATE_BUDGETS = {"reinforce": 16, "vpg": 16, "ppo_clip": 28, "ppo_kl": 36, "trpo": 36}
DIFF_BUDGETS = {  # lines that git diff adds and removes
    ("reinforce", "vpg"): 150,
    ("vpg", "trpo"): 124,
    ("vpg", "ppo_clip"): 100,
    ("ppo_clip", "ppo_kl"): 64,
}
SECTIONS = ["Args", "make_envs", "Agent", "rollout", "update", "train"]
INTERFACE = {"make_optimizer", "update"}  # what each script has for itself


def sections(source):
    """Name → text of each section; what stands before the first banner is `head`."""
    parts = re.split(r"^# -+ (\w+) -+$\n", source, flags=re.MULTILINE)
    return {"head": parts[0]} | dict(zip(parts[1::2], parts[2::2]))


def imports(source):
    """The lines between the docstring and the first section, without a script's own imports."""
    docstring = ast.parse(source).body[0]
    lines = sections(source)["head"].splitlines(keepends=True)[docstring.end_lineno :]
    lines = [line.replace(", kl_divergence", "") for line in lines if line != "import copy\n"]
    return "".join(lines)


def shared_args(source):
    """The fields of Args before the first blank line inside of it, without their defaults."""
    fields = sections(source)["Args"].split("class Args:\n")[1].split("\n\n")[0]
    return {line.split(":")[0]: re.sub(r" = [^#]+", " ", line) for line in fields.splitlines()}


def around_args(source):
    """What the section Args has beside the fields: ArgumentError and kinds, and __post_init__."""
    before, after = sections(source)["Args"].split("class Args:\n")
    return before, after.split("    def __post_init__")[1]


def definitions(text):
    """Name → text of each function and class in a section."""
    nodes = [x for x in ast.parse(text).body if isinstance(x, (ast.FunctionDef, ast.ClassDef))]
    return {node.name: ast.get_source_segment(text, node) for node in nodes}


def must_be_same(what, text, script, other_text):
    if text != other_text:
        pair = (x.splitlines() for x in (text, other_text))
        lines = difflib.unified_diff(*pair, "vpg.py", f"{script}.py", lineterm="")
        pytest.fail(f"{what} is not the same text:\n" + "\n".join(lines), pytrace=False)


AROUND = ("before Args", "__post_init__")


@pytest.mark.parametrize("script", ["trpo", "ppo_clip", "ppo_kl"])
def test_scripts_with_a_critic_are_one_text(script):
    vpg, other = SCRIPTS["vpg"], SCRIPTS[script]
    must_be_same("imports", imports(vpg), script, imports(other))
    assert shared_args(vpg) == shared_args(other)
    for what, text, other_text in zip(AROUND, around_args(vpg), around_args(other)):
        must_be_same(what, text, script, other_text)
    for name in ("make_envs", "Agent", "rollout", "train"):
        must_be_same(name, sections(vpg)[name], script, sections(other)[name])


def without_critic(measure):
    """VPG's `measure` as REINFORCE has it: with weights, and without the lines of a critic."""
    errors = ", errors = agent.policy(batch.obs), batch.returns - agent.value(batch.obs)"
    assert errors in measure and "batch.advantages" in measure and "Â" in measure
    text = measure.replace(errors, " = agent.policy(batch.obs)").replace("Â", "R̂")
    lines = text.replace("batch.advantages", "batch.weights").splitlines(keepends=True)
    critics = [line for line in lines if "errors" in line or "unexplained" in line]
    assert len(critics) == 3
    return "".join(line for line in lines if line not in critics)


def test_reinforce_shares_all_that_needs_no_critic():
    vpg, reinforce = SCRIPTS["vpg"], SCRIPTS["reinforce"]
    must_be_same("imports", imports(vpg), "reinforce", imports(reinforce))
    parts, own_parts = sections(vpg), sections(reinforce)
    must_be_same("make_envs", parts["make_envs"], "reinforce", own_parts["make_envs"])
    measure = definitions(parts["train"])["measure"]
    train = parts["train"].replace(measure, without_critic(measure))
    must_be_same("train", train, "reinforce", own_parts["train"])
    args, own = shared_args(vpg), shared_args(reinforce)
    assert own.items() <= args.items()
    missing = {name.strip() for name in args.keys() - own.keys()}
    assert missing == {"num_steps", "gae_lambda", "norm_adv"}
    (before, checks), (own_before, own_checks) = around_args(vpg), around_args(reinforce)
    must_be_same("before Args", before, "reinforce", own_before)
    lines = checks.splitlines(keepends=True)
    (first,) = (n for n, line in enumerate(lines) if 'if name == "num_minibatches":' in line)
    assert " = (1, self.num_envs * (self.num_steps // 2))" in lines.pop(first + 1)
    lines.pop(first)
    own_lines = own_checks.rstrip().splitlines(keepends=True)
    assert own_lines[-2].startswith("        if self.num_envs == 1 and ")
    shared = "".join(own_lines[:-2]).rstrip()
    must_be_same("__post_init__", "".join(lines).rstrip(), "reinforce", shared)
    for section in ("Agent", "rollout"):
        texts = definitions(parts[section])
        for name, text in definitions(own_parts[section]).items():
            if name not in ("Agent", "Batch", "rollouts"):
                must_be_same(name, texts[name], "reinforce", text)
    changed = changed_lines(parts["Agent"], own_parts["Agent"])
    kept = [line for line in changed if not re.search(r'critic|value|"""', line) and line[2:]]
    assert not kept, kept
    # The batch's other fields, the seeds, and the standardisation of observations are one text.
    texts, own_texts = definitions(parts["rollout"]), definitions(own_parts["rollout"])
    changed = changed_lines(texts["Batch"], own_texts["Batch"])
    kept = [line for line in changed if not re.search(r'weights|advantages|returns|"""', line)]
    assert not kept, kept
    pair = (x["rollouts"] for x in (texts, own_texts))
    blocks = [re.search(r"    rng = .*\n.*\n", x)[0] for x in pair]
    must_be_same("seeds of rollouts", blocks[0], "reinforce", blocks[1])


def changed_lines(text, other_text):
    """Lines of only one of two texts, with the sign that says of which."""
    lines = difflib.ndiff(text.splitlines(), other_text.splitlines())
    return [line for line in lines if line[:2] in ("- ", "+ ")]


def test_helpers_of_one_name_are_one_text():
    """What several scripts have in the section `update` under one name, they have in one text."""
    seen = {}
    for script, source in SCRIPTS.items():
        for name, text in definitions(sections(source)["update"]).items():
            if name not in INTERFACE:
                must_be_same(name, seen.setdefault(name, text), script, text)
    assert {"fit_critic", "kill_mask"} <= seen.keys()


def test_own_arguments_of_one_name_have_one_type_and_default_types_agree():
    types = {}
    for script, source in SCRIPTS.items():
        body = next(x for x in ast.parse(source).body if getattr(x, "name", "") == "Args").body
        for field in (x for x in body if isinstance(x, ast.AnnAssign)):
            kind = ast.unparse(field.annotation)
            either = {types.setdefault(field.target.id, kind), kind}
            # PPO-Clip can do without a target_kl.
            optional = [x.replace("float | None, (0,", "float, (1e-12,") for x in either]
            assert len(set(optional)) == 1, (script, field.target.id, either)


def test_defaults_of_one_name_are_one_but_where_named():
    """They were tried on the nine tasks of results/defaults.md."""
    own = {"learning_rate", "value_learning_rate", "target_kl"}
    departures = {
        "reinforce": {"num_envs": 16, "gamma": 0.98, "norm_reward": False},
        "vpg": {"num_steps": 64},
        "trpo": {"num_steps": 256},
        "ppo_kl": {"target_kl": 0.02, "ent_coef": 0.01},  # results/settings.md says why
    }
    defaults = {}
    for script, source in SCRIPTS.items():
        body = next(x for x in ast.parse(source).body if getattr(x, "name", "") == "Args").body
        fields = [x for x in body if isinstance(x, ast.AnnAssign)]
        defaults[script] = {x.target.id: ast.literal_eval(x.value) for x in fields}
    reference = defaults["ppo_clip"]
    for script, values in defaults.items():
        differing = {k: v for k, v in values.items() if k in reference and v != reference[k]}
        if script != "ppo_kl":
            differing = {k: v for k, v in differing.items() if k not in own}
        assert differing == departures.get(script, {})


@pytest.mark.parametrize("script", SCRIPTS)
def test_sections_stand_in_one_order(script):
    assert list(sections(SCRIPTS[script])) == ["head", *SECTIONS]


@pytest.mark.parametrize("script", SCRIPTS)
def test_banners_stand_directly_above_the_first_definition(script):
    lines = SCRIPTS[script].splitlines()
    banners = [n for n, line in enumerate(lines) if re.match(r"# -+ \w+ -+$", line)]
    assert len(banners) == len(SECTIONS)
    for n in banners:
        assert lines[n - 2 : n] == ["", ""] and lines[n - 3] != "" and len(lines[n]) == 100
        assert re.match(r"(def|class|@)\b|@", lines[n + 1]), lines[n : n + 2]


@pytest.mark.parametrize("script", SCRIPTS)
def test_script_imports_nothing_of_this_project_but_gae_fast(script):
    own = {path.stem for path in ROOT.glob("*.py")} | {"tests", "benchmarks", "gae_fast"}
    names = set()
    for node in ast.walk(ast.parse(SCRIPTS[script])):
        if isinstance(node, ast.Import):
            names |= {alias.name.split(".")[0] for alias in node.names}
        if isinstance(node, ast.ImportFrom):
            names.add(node.module.split(".")[0])
    assert names & own == {"gae_fast"}


# ------------------------------------------- budgets ----------------------------------------------


@pytest.mark.parametrize("name", BUDGETS)
def test_file_keeps_to_its_budget(name):
    source = (ROOT / f"{name}.py").read_text(encoding="utf-8")
    lines = source.splitlines()
    assert len(lines) <= BUDGETS[name]
    assert max(map(len, lines)) <= 100
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.FunctionDef):
            limit = UPDATE_BUDGETS[name] if node.name == "update" and name in SCRIPTS else 60
            assert node.end_lineno - node.lineno + 1 <= limit, node.name
    if name in SCRIPTS:
        assert next(n for n, x in enumerate(lines, 1) if x.startswith("def update(")) < 320


@pytest.mark.parametrize(("one", "other"), DIFF_BUDGETS)
def test_differences_keep_to_their_budgets(one, other):
    command = ["git", "diff", "--no-index", "--numstat", f"{one}.py", f"{other}.py"]
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert run.returncode == 1, run.stderr  # they differ
    added, removed, _ = run.stdout.split(maxsplit=2)
    assert int(added) + int(removed) <= DIFF_BUDGETS[one, other]


def test_everything_is_formatted_and_without_lint():
    for command in (["format", "--check"], ["check"]):
        run = subprocess.run(
            [sys.executable, "-m", "ruff", *command, "."], cwd=ROOT, capture_output=True, text=True
        )
        assert run.returncode == 0, run.stdout + run.stderr


# ------------------------------- these tests notice what they are for -----------------------------


@pytest.mark.parametrize(
    ("text", "replacement", "named"),
    [
        ("rewards[~is_step] = 0.0", "rewards[~is_step] = 0", "rollout"),
        ("# a buffer is saved, too", "# buffers are saved, too", "Agent"),
        ("import json\n", "import json as json\n", "imports"),
        ("self.rows.append(row)", "self.rows += [row]", "train"),
        ('"value_loss": 0.5 * errors', '"value_loss": errors', "train"),
        ("flattenable observations and", "flat observations and", "make_envs"),
        ("Amount = Annotated[float, (0, math.inf)]", "Amount = float", "before Args"),
        ("# at worst half of the rows", "# half of the rows", "__post_init__"),
    ],
)
def test_a_change_in_one_script_alone_is_noticed(text, replacement, named, monkeypatch):
    assert SCRIPTS["trpo"].count(text) == 1
    monkeypatch.setitem(SCRIPTS, "trpo", SCRIPTS["trpo"].replace(text, replacement))
    with pytest.raises(pytest.fail.Exception, match=f"{named} is not the same text:\n--- vpg.py\n"):
        test_scripts_with_a_critic_are_one_text("trpo")


@pytest.mark.parametrize(
    ("text", "replacement"),
    [
        ("# discount γ", "# the discount"),
        ("[0] <= value <= ", "[0] <= value < "),
        ("Amount = Annotated[float, (0, math.inf)]", "Amount = float"),
        ("self.rows.append(row)", "self.rows += [row]"),
        ("obs = np.tanh(obs @ weight + bias)", "obs = np.tanh(bias + obs @ weight)"),
        ("return Categorical(logits=output, validate_args=False)", "return Categorical(output)"),
        ("self.clip_obs = 10.0 if norm_obs", "self.clip_obs = 9.0 if norm_obs"),
        ("(log_ratio.expm1() - log_ratio).mean()", "log_ratio.mean()"),
        ("(log_ratio.expm1() * batch.weights).mean()", "(log_ratio * batch.weights).mean()"),
        ("rng.integers(2**63)", "rng.integers(2**62)"),
        ("obs: Tensor  # standardised if norm_obs", "obs: Tensor  # standardised"),
    ],
)
def test_a_change_in_reinforce_alone_is_noticed(text, replacement, monkeypatch):
    assert SCRIPTS["reinforce"].count(text) == 1
    monkeypatch.setitem(SCRIPTS, "reinforce", SCRIPTS["reinforce"].replace(text, replacement))
    with pytest.raises((pytest.fail.Exception, AssertionError)):
        test_reinforce_shares_all_that_needs_no_critic()


def test_each_mutants_text_stands_once():
    """Else tests/mutants.py, which runs no test on its own, breaks nothing and says nothing."""
    texts = {(file, text): (ROOT / file).read_text("utf-8") for file, text, *_ in MUTANTS}
    assert [key for key, whole in texts.items() if whole.count(key[1]) != 1] == []
