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

ROOT = Path(__file__).parent.parent
SCRIPTS = {
    name: (ROOT / f"{name}.py").read_text(encoding="utf-8")
    for name in ("vpg", "trpo", "ppo_clip", "ppo_kl", "reinforce")
}
BUDGETS = dict.fromkeys(SCRIPTS, 480) | {"trpo": 520, "play": 150, "compare": 300}
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


def post_init(source):
    return sections(source)["Args"].split("    def __post_init__")[1]


def definitions(text):
    """Name → text of each function and class in a section."""
    nodes = [x for x in ast.parse(text).body if isinstance(x, (ast.FunctionDef, ast.ClassDef))]
    return {node.name: ast.get_source_segment(text, node) for node in nodes}


def must_be_same(what, text, script, other_text):
    if text != other_text:
        pair = (x.splitlines() for x in (text, other_text))
        lines = difflib.unified_diff(*pair, "vpg.py", f"{script}.py", lineterm="")
        pytest.fail(f"{what} is not the same text:\n" + "\n".join(lines), pytrace=False)


@pytest.mark.parametrize("script", ["trpo", "ppo_clip", "ppo_kl"])
def test_scripts_with_a_critic_are_one_text(script):
    vpg, other = SCRIPTS["vpg"], SCRIPTS[script]
    must_be_same("imports", imports(vpg), script, imports(other))
    assert shared_args(vpg) == shared_args(other)
    must_be_same("__post_init__", post_init(vpg), script, post_init(other))
    for name in ("make_envs", "Agent", "rollout", "train"):
        must_be_same(name, sections(vpg)[name], script, sections(other)[name])


def test_reinforce_shares_all_that_needs_no_critic():
    vpg, reinforce = SCRIPTS["vpg"], SCRIPTS["reinforce"]
    must_be_same("imports", imports(vpg), "reinforce", imports(reinforce))
    for name in ("make_envs", "train"):
        must_be_same(name, sections(vpg)[name], "reinforce", sections(reinforce)[name])
    args, own = shared_args(vpg), shared_args(reinforce)
    assert own.items() <= args.items()
    assert {name.strip() for name in args.keys() - own.keys()} == {"num_steps", "gae_lambda"}
    for section in ("Agent", "rollout"):
        texts = definitions(sections(vpg)[section])
        for name, text in definitions(sections(reinforce)[section]).items():
            if name not in ("Agent", "Batch", "rollouts"):
                must_be_same(name, texts[name], "reinforce", text)
    pair = (sections(x)["Agent"].splitlines() for x in (vpg, reinforce))
    changed = [line for line in difflib.ndiff(*pair) if line[:2] in ("- ", "+ ")]
    kept = [line for line in changed if not re.search(r'critic|value|"""', line) and line[2:]]
    assert not kept, kept
    pair = (post_init(x).splitlines() for x in (vpg, reinforce))
    changed = [line for line in difflib.ndiff(*pair) if line[:2] in ("- ", "+ ")]
    known = r'fewest|limits|least = ({"seed"|1 if field.type is int and)|num_envs|num-envs'
    assert len(changed) == 7 and all(re.search(known, x) for x in changed)


def test_helpers_of_one_name_are_one_text():
    """What several scripts have in the section `update` under one name, they have in one text."""
    seen = {}
    for script, source in SCRIPTS.items():
        for name, text in definitions(sections(source)["update"]).items():
            if name not in INTERFACE:
                must_be_same(name, seen.setdefault(name, text), script, text)
    assert {"fit_critic", "partition"} <= seen.keys()


def test_own_arguments_of_one_name_have_one_type_and_default_types_agree():
    types = {}
    for script, source in SCRIPTS.items():
        body = next(x for x in ast.parse(source).body if getattr(x, "name", "") == "Args").body
        for field in (x for x in body if isinstance(x, ast.AnnAssign)):
            kind = ast.unparse(field.annotation)
            either = {types.setdefault(field.target.id, kind), kind}
            # PPO-Clip can do without a target_kl.
            assert len(either) == 1 or either == {"float", "float | None"}, (
                script,
                field.target.id,
            )


def test_defaults_of_one_name_are_one_but_where_named():
    """They were tried on the nine tasks of results/defaults.md."""
    own = {"learning_rate", "value_learning_rate", "num_minibatches", "target_kl"}
    departures = {
        "reinforce": {"num_envs": 16, "gamma": 0.98, "norm_reward": False},
        "vpg": {"num_steps": 64},
        "trpo": {"anneal_lr": False},
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
        assert differing == departures.get(
            script, {"target_kl": 0.02} if script == "ppo_kl" else {}
        )


@pytest.mark.parametrize("script", SCRIPTS)
def test_sections_stand_in_one_order(script):
    assert list(sections(SCRIPTS[script])) == ["head", *SECTIONS]


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
            limit = 50 if node.name == "update" and name in SCRIPTS else 60
            assert node.end_lineno - node.lineno + 1 <= limit, node.name
    if name in SCRIPTS:
        assert next(n for n, x in enumerate(lines, 1) if x.startswith("def update(")) < 320


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
        ("# a buffer, so that", "# buffers, so that", "Agent"),
        ("import json\n", "import json as json\n", "imports"),
        ("self.rows.append(row)", "self.rows += [row]", "train"),
        ("expected next-step autoreset", "expected another autoreset", "make_envs"),
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
        ("least = 1 if field.type is int", "least = 1 if int is field.type"),
        ("self.rows.append(row)", "self.rows += [row]"),
        ("np.tanh(x @ w1.T + b1)", "np.tanh(b1 + x @ w1.T)"),
        ("return Categorical(logits=output, validate_args=False)", "return Categorical(output)"),
    ],
)
def test_a_change_in_reinforce_alone_is_noticed(text, replacement, monkeypatch):
    assert SCRIPTS["reinforce"].count(text) == 1
    monkeypatch.setitem(SCRIPTS, "reinforce", SCRIPTS["reinforce"].replace(text, replacement))
    with pytest.raises((pytest.fail.Exception, AssertionError)):
        test_reinforce_shares_all_that_needs_no_critic()
