"""The scripts share their scaffolding to the letter: between two of them, only what separates the algorithms differs.

Every file at the root that defines `update` is one of the scripts. Its own are the docstring, the section `update`, the
Args after the first blank line, and the imports and constants that only these use. Nothing here lists what is shared.
"""

import ast
import difflib
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
FILES = {path.stem: path.read_text(encoding="utf-8") for path in sorted(ROOT.glob("*.py"))}
SCRIPTS = {name: source for name, source in FILES.items() if "\ndef update(" in source}
INTERFACE = {"check_update_args", "make_optimizers", "update"}  # what train calls in the section update
CRITIC = re.compile(
    r"critic|\bvalues\b(?!\()|\bdef value\b|advantage|\bgae\(|gae_lambda|num_steps"
)  # not dict.values()


def names_in(text):
    nodes = ast.walk(ast.parse(text))
    return {node.id for node in nodes if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Load)}


def statements(source):
    """(section, name, text) of every top-level statement after the docstring; the text begins where the last one ended.

    An import of several names is one statement for each of them.
    """
    lines, section, result = source.splitlines(keepends=True), "imports", []
    body = ast.parse(source).body
    for before, node in zip(body, body[1:]):
        first = min([node.lineno, *(x.lineno for x in getattr(node, "decorator_list", []))])
        gap = "".join(lines[before.end_lineno : first - 1])
        text = "".join(lines[first - 1 : node.end_lineno])
        if banner := re.search(r"^# -+ (.+?) -+$", gap, re.MULTILINE):
            section = banner[1]
        if isinstance(node, ast.Import | ast.ImportFrom):
            start = f"from {node.module} import" if isinstance(node, ast.ImportFrom) else "import"
            result += [(section, alias.name, f"{start} {alias.name}\n") for alias in node.names]
        elif isinstance(node, ast.Assign):
            result.append((section, node.targets[0].id, gap + text))
        else:
            result.append((section, getattr(node, "name", "__main__"), gap + text))
    return result


def split_args(text):
    """Name → annotation and docstring, not the default: of the fields before the first blank line and after."""
    lines = text.splitlines()
    body = ast.parse(text).body[0].body
    parts = [{}]
    for field, docstring in zip(body[::2], body[1::2]):
        if not lines[field.lineno - 2].strip():
            parts.append({})
        words = "\n".join(lines[docstring.lineno - 1 : docstring.end_lineno]).strip()
        parts[-1][f"Args.{field.target.id}"] = f"{field.target.id}: {ast.unparse(field.annotation)}\n{words}\n"
    shared, own = parts
    return shared, own


def scaffolding(source):
    """Name → text of all that the script does not have for itself, in order."""
    shared = {name: text for section, name, text in statements(source) if section != "update"}
    fields, _ = split_args(shared["Args"])
    shared = {k: v for name, text in shared.items() for k, v in (fields.items() if name == "Args" else [(name, text)])}
    # What train, the program and the shared arguments lead to. The rest serves the script's own parts alone.
    reached, new = set(), {"train", "__main__", *fields}
    while new:
        reached |= new
        new = {other for name in new for other in names_in(shared[name]) & set(shared)} - reached
    return {name: text for name, text in shared.items() if name in reached}


def must_be_same(name, script, text, other, other_text):
    if text != other_text:
        lines = difflib.unified_diff(
            text.splitlines(), other_text.splitlines(), f"{script}.py", f"{other}.py", lineterm=""
        )
        pytest.fail(f"{name} is not the same text:\n" + "\n".join(lines), pytrace=False)


WITH_CRITIC = [name for name, source in SCRIPTS.items() if "def value(" in source]
WITHOUT_CRITIC = [name for name in SCRIPTS if name not in WITH_CRITIC]


def test_all_five_are_compared():
    assert set(WITH_CRITIC) >= {"vpg", "trpo", "ppo_clip", "ppo_kl"} and "reinforce" in WITHOUT_CRITIC
    shared = scaffolding(SCRIPTS["vpg"])
    assert {"make_envs", "Agent", "Adam", "rollout", "train", "Log", "save_checkpoint", "Args.gamma"} <= set(shared)
    assert not {"Args.learning_rate", "update", "make_optimizers", "fit_critic"} & set(shared)


@pytest.mark.parametrize("script", [name for name in WITH_CRITIC if name != "vpg"])
def test_scripts_with_a_critic_are_one_text(script):
    shared, others = scaffolding(SCRIPTS["vpg"]), scaffolding(SCRIPTS[script])
    for name in shared.keys() & others.keys():
        must_be_same(name, "vpg", shared[name], script, others[name])
    assert list(shared) == list(others), "not the same definitions in the same order"


@pytest.mark.parametrize("script", WITHOUT_CRITIC)
def test_script_without_a_critic_shares_all_that_has_none_in_it(script):
    shared, others = scaffolding(SCRIPTS["vpg"]), scaffolding(SCRIPTS[script])
    without_critic = {name: text for name, text in shared.items() if not CRITIC.search(name + text)}
    assert shared.keys() - without_critic.keys() == {"Args.num_steps", "Args.gae_lambda", "Agent", "Batch", "rollout"}
    needed = names_in("".join(without_critic.values()))
    for name, text in others.items():
        if name in without_critic:
            must_be_same(name, "vpg", shared[name], script, text)
        else:
            assert name in shared, f"{name} stands in {script}.py alone"
    for name in without_critic:
        assert name in others or name not in needed, f"{script}.py has no {name}"
    assert [name for name in others if name in shared] == [name for name in shared if name in others]


def test_helpers_and_constants_of_one_name_are_one_text():
    """What several scripts have for themselves under one name, they have in one text."""
    first_seen = {}
    for script, source in SCRIPTS.items():
        shared = scaffolding(source)
        for _, name, text in statements(source):
            if name not in shared and name not in INTERFACE and name != "Args":
                other, other_text = first_seen.setdefault(name, (script, text))
                must_be_same(name, other, other_text.strip(), script, text.strip())


def test_own_arguments_of_one_name_have_one_type():
    types = {}
    for script, source in SCRIPTS.items():
        _, own = split_args(next(text for _, name, text in statements(source) if name == "Args"))
        for name, text in own.items():
            first, first_type = types.setdefault(name, (script, text.split("\n")[0]))
            either = {first_type, text.split("\n")[0]}
            # PPO-Clip can do without a target_kl.
            assert len(either) == 1 or either == {"target_kl: FinitePositive", "target_kl: OptionalPositive"}, (
                first,
                script,
            )


def test_sections_stand_in_one_order():
    order = ["Args", "make_envs", "Agent", "rollout", "update", "ranks", "train"]
    for script, source in SCRIPTS.items():
        assert re.findall(r"^# -+ (.+?) -+$", source, re.MULTILINE) == order, script


@pytest.mark.parametrize(
    ("text", "replacement", "named"),
    [
        ("episodes.count += 1", "episodes.count += 2", "record_episodes"),
        ('"""discount γ"""', '"""the discount"""', "Args.gamma"),
        ("1 <= x < 2**31]", "0 < x < 2**31]", "Count"),
        ("# What a number may be", "# What a number might be", "Seed"),
        ("import json\n", "import json as json\n", None),
        ("# an environment may write", "# environments may write", "rollout"),
    ],
)
def test_a_change_in_one_script_alone_is_noticed(text, replacement, named, monkeypatch):
    assert SCRIPTS["trpo"].count(text) == 1
    monkeypatch.setitem(SCRIPTS, "trpo", SCRIPTS["trpo"].replace(text, replacement))
    if named is None:  # the same import in other words
        return test_scripts_with_a_critic_are_one_text("trpo")
    with pytest.raises(pytest.fail.Exception, match=f"{named} is not the same text:\n--- vpg.py\n"):
        test_scripts_with_a_critic_are_one_text("trpo")


@pytest.mark.parametrize(
    ("text", "replacement", "named"),
    [
        ("if self.file.tell() == 0:", "if not self.file.tell():", "Log"),
        ("fraction * optimizer", "optimizer", "set_learning_rate"),
        ("episodes.count += 1", "episodes.count += 2", "record_episodes"),
    ],
)
def test_a_change_in_reinforce_alone_is_noticed(text, replacement, named, monkeypatch):
    assert SCRIPTS["reinforce"].count(text) == 1
    monkeypatch.setitem(SCRIPTS, "reinforce", SCRIPTS["reinforce"].replace(text, replacement))
    with pytest.raises(pytest.fail.Exception, match=f"{named} is not the same text"):
        test_script_without_a_critic_shares_all_that_has_none_in_it("reinforce")
