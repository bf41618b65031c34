"""The documents lead to what they name: files, lines, pictures, commands that parse, and figures.

python tests/test_docs.py renews the line numbers.

A figure that README or docs/ quote is the text of a link to its page. The link's title names the
row and the columns: [451 ± 54](results/gradient.md#the-section "reinforce | mean | deviation").
"""

import ast
import importlib
import re
import shlex
from contextlib import nullcontext
from pathlib import Path

import gymnasium
import numpy as np
import pytest
import tyro
from gymnasium.spaces import Box, Dict, Discrete, MultiDiscrete, Sequence

ROOT = Path(__file__).parent.parent
DOCUMENTS = [
    ROOT / "README.md",
    *sorted(ROOT.glob("docs/*.md")),
    *sorted(ROOT.glob("results/*.md")),
]
TEXTS = [path for path in DOCUMENTS if path.parent.name != "results"]  # which quote figures
QUOTE = re.compile(r'\[([^]\n]+)\]\(([\w./]*results/\w+\.md)#([\w-]+) "([^"\n]+)"\)')
CELLS = re.compile(r"<!-- cells of (\S+) -->\n((?:\|.*\n)+)")
LINE_LINK = re.compile(r"\[`([^`]+)`\]\(([\w./]+\.py)#L(\d+)(?:-L(\d+))?\)")

each_document = pytest.mark.parametrize(
    "document", DOCUMENTS, ids=lambda path: path.relative_to(ROOT).as_posix()
)


def lines_of(path, text):
    """First and last line of the definition of this name, or of the one line with this text."""
    source = path.read_text(encoding="utf-8")
    found = [
        (node.lineno, node.end_lineno)
        for node in ast.walk(ast.parse(source))
        if isinstance(node, ast.FunctionDef | ast.ClassDef) and node.name == text
    ]
    found = found or [(n, n) for n, line in enumerate(source.splitlines(), 1) if text in line]
    assert len(found) == 1, f"{text!r} is {len(found)} times in {path.name}"
    return found[0]


def with_line_numbers(document):
    def renew(match):
        text, target = match[1], match[2]
        first, last = lines_of(document.parent / target, text)
        return f"[`{text}`]({target}#L{first}" + (f"-L{last})" if last > first else ")")

    return LINE_LINK.sub(renew, document.read_text(encoding="utf-8"))


@each_document
def test_links_to_lines_are_where_the_code_is(document):
    assert document.read_text(encoding="utf-8") == with_line_numbers(document), (
        "run python tests/test_docs.py"
    )


def headings(document):
    """The anchors that GitHub gives to a document's headings."""
    found = re.findall(r"^#+ (.+)$", document.read_text(encoding="utf-8"), re.MULTILINE)
    return {anchor_of(heading) for heading in found}


def anchor_of(heading):
    return re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-")


@each_document
def test_links_lead_to_something(document):
    text = document.read_text(encoding="utf-8")
    for target in re.findall(r'\]\(([^)\s]+)(?: "[^"]*")?\)', text):
        path, _, anchor = target.partition("#")
        if target.startswith(("http", "../../deployments/")):  # the latter are GitHub's
            continue
        other = document.parent / path if path else document
        assert other.exists(), target
        if anchor and other.suffix == ".md":
            assert anchor in headings(other), target


def section(document, anchor):
    """What stands below the heading with this anchor, up to the next heading as high."""
    text = document.read_text(encoding="utf-8")
    for match in re.finditer(r"^(#+) (.+)$", text, re.MULTILINE):
        if anchor_of(match[2]) == anchor:
            return re.split(rf"^#{{1,{len(match[1])}}} ", text[match.end() :], flags=re.MULTILINE)[
                0
            ]
    raise AssertionError(f"{document.name} has no heading #{anchor}")


def tables(text):
    """The rows of each Markdown table, as dictionaries by column."""
    for match in re.finditer(r"(?:^\|.*\|\n?)+", text, re.MULTILINE):
        lines = [[x.strip() for x in line.strip("|").split("|")] for line in match[0].splitlines()]
        yield [dict(zip(lines[0], line)) for line in lines[2:]]


def numbers_in(text):
    text = text.replace("−", "-").replace(",", "")
    return re.findall(r"(?<![\w.])-?\d+(?:\.\d+)?(?:e-?\d+)?", text)


def is_rounding(quoted, number):
    """Whether a number rounds to a quoted one: to its decimals, or at its trailing zeros."""
    _, _, decimals = quoted.partition(".")
    zeros = len(quoted) - len(quoted.rstrip("0")) if abs(float(quoted)) >= 1000 else 0
    places = [len(decimals)] if decimals else range(0, -zeros - 1, -1)
    return any(abs(float(quoted) - number) <= 0.5001 * 10.0**-x for x in places)


def quoted_from(page, anchor, title, as_percent):
    """The numbers in the cells that the title of a quotation names."""
    name, *columns = title.split(" | ")
    found = [
        [row[column] for column in columns]
        for rows in tables(section(page, anchor))
        for row in rows
        if name in (list(row.values())[0], ", ".join(list(row.values())[:2]))
        and {*columns} <= {*row}
    ]
    assert len(found) == 1 and columns, f"{title!r} is {len(found)} rows of {page.name}#{anchor}"
    return [
        100 * float(number) if as_percent and "%" not in cell else float(number)
        for cell in found[0]
        for number in numbers_in(cell)
    ]


def quotations(document):
    return [
        pytest.param(document, *match.groups(), id=f"{document.name}-{match[1]}-{match[4]}")
        for match in QUOTE.finditer(document.read_text(encoding="utf-8"))
    ]


@pytest.mark.parametrize(
    ("document", "text", "page", "anchor", "title"), [x for text in TEXTS for x in quotations(text)]
)
def test_a_quoted_figure_is_that_of_the_page(document, text, page, anchor, title):
    numbers = quoted_from(document.parent / page, anchor, title, as_percent="%" in text)
    assert numbers_in(text), f"{text!r} has no figure"
    for quoted in numbers_in(text):  # in the order of the cells
        while numbers and not is_rounding(quoted, numbers[0]):
            numbers.pop(0)
        assert numbers, f"{quoted} is not what {page}#{anchor} says of {title}"
        numbers.pop(0)


def test_quoted_figures_are_many():
    assert sum(len(quotations(text)) for text in TEXTS) > 30


@pytest.mark.parametrize("document", TEXTS, ids=lambda path: path.name)
def test_a_table_of_figures_is_part_of_one_on_the_page(document):
    text = document.read_text(encoding="utf-8")
    for page, lines in CELLS.findall(text):
        rows = [
            [row[column] for column in header]
            for header in [next(tables(lines))[0].keys()]
            for table in tables((document.parent / page).read_text(encoding="utf-8"))
            for row in table
            if {*header} <= {*row}
        ]
        for row in next(tables(lines)):
            assert list(row.values()) in rows, f"{page} has no such row: {row}"


@pytest.mark.parametrize("document", TEXTS, ids=lambda path: path.name)
def test_no_mean_and_deviation_is_copied_by_hand(document):
    text = CELLS.sub("", QUOTE.sub("", document.read_text(encoding="utf-8")))
    assert not re.findall(r".*\d ± \d.*", text)


def test_readme_is_short_and_counts_the_lines_of_the_scripts():
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    assert text.count("\n") <= 150
    counts = re.findall(r"^\| \[`(\w+\.py)`\]\(\w+\.py\) \| (\d+) \|", text, re.MULTILINE)
    assert len(counts) == 5
    for name, count in counts:
        assert int(count) == (ROOT / name).read_text(encoding="utf-8").count("\n"), name


def commands_in(text):
    spans = re.findall(r"`(python [^`]+)`", text) + re.findall(
        r"^(?:\$ )?(python .+)$", text, re.MULTILINE
    )
    # What torchrun starts is a script with its arguments.
    spans += [
        f"python {command}"
        for command in re.findall(r"^.*torchrun .*?(\w+\.py.*)$", text, re.MULTILINE)
    ]
    return [span for span in spans if not span.startswith(("python -", "python3"))]


@pytest.mark.parametrize(
    ("document", "command"),
    [
        (path.name, command)
        for path in DOCUMENTS
        # These have their own tests: their scripts are copies, made there.
        if path.name not in ("exercises.md", "recipes.md")
        for command in commands_in(path.read_text(encoding="utf-8"))
    ],
)
def test_commands_parse(document, command, monkeypatch):
    _, script, *arguments = shlex.split(command)
    path = ROOT / script
    if path.parent == ROOT:
        module = importlib.import_module(path.stem)
        if "--help" in arguments:
            return
        # What a command names need not be there: runs/NAME, an environment of another package.
        names = {"reinforce", "vpg", "trpo", "ppo_clip", "ppo_kl", path.stem} - {"compare"}
        for other in (importlib.import_module(name) for name in names):
            monkeypatch.setattr(other.Args, "__post_init__", lambda self: None, raising=False)
        args = tyro.cli(module.Args, args=arguments)
        if path.stem == "compare":
            for job in module.plan(args, Path("out")):
                name = Path(job.command[1]).stem
                tyro.cli(importlib.import_module(name).Args, args=job.command[2:])
    else:
        source = path.read_text(encoding="utf-8")
        own = arguments[
            : next((i for i, x in enumerate(arguments) if x.endswith(".py")), None)
        ]  # not the script's
        for option in own:
            assert not option.startswith("--") or f'"{option.split("=")[0]}"' in source, option


class Buttons(gymnasium.Env):
    """The environment that docs/runs.md makes usable."""

    action_space = MultiDiscrete([3, 2])
    observation_space = Dict(position=Box(-1, 1, (2,)), said=Sequence(Discrete(3)))

    def reset(self, seed=None, options=None):
        super().reset(seed=seed)
        return {"position": np.zeros(2, np.float32), "said": ()}, {}

    def step(self, action):
        assert action in self.action_space
        is_over = bool(self.np_random.random() < 0.1)
        return {"position": np.ones(2, np.float32), "said": (1,)}, 1.0, is_over, False, {}


def test_python_of_the_documents_runs(tmp_path, monkeypatch, capsys):
    """With fewer steps. Afterwards the environments of my_envs.py train."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(ROOT)
    monkeypatch.setattr(gymnasium.envs.registration, "registry", {**gymnasium.registry})
    gymnasium.register("Buttons-v0", Buttons)
    reinforce, script = map(importlib.import_module, ("reinforce", "ppo_clip"))
    monkeypatch.setattr(reinforce, "Run", reinforce.Run)  # one block puts another in its place
    own = {"num_steps": 256, "run_dir": "runs/NAME", "quiet": True}
    script.train(script.Args(total_timesteps=2000, **own))
    blocks = [
        block
        for text in TEXTS
        if text.name != "recipes.md"  # tests/test_recipes.py runs those
        for block in re.findall(r"^```python\n(.*?)^```", text.read_text("utf-8"), re.M | re.S)
    ]
    assert len(blocks) == 6
    few = "total_timesteps=3000, quiet=True"
    for block in blocks:
        block = re.sub(r"\bArgs\((env=[^,)]+)(?:, seed=3)?\)", rf"Args(\1, {few})", block)
        exec(block.replace("=400_000", "=5000, quiet=True"), {})
    assert (tmp_path / "runs/again/metrics.csv").exists()
    rows = script.load_run("runs/NAME")[1]["rows"]
    assert len(rows) == 3  # each of nearly 2,000 steps; the last one is of the resumed run
    assert re.search(r"^CartPole-v1 \d\d%\nPendulum-v1 100%$", capsys.readouterr().out, re.M)
    for env in ("Buttons-v0", "OneButton-v0", "BigLake-v0"):
        with pytest.raises(script.ArgumentError) if env == "Buttons-v0" else nullcontext():
            assert script.train(script.Args(env=env, total_timesteps=1000, quiet=True))


if __name__ == "__main__":
    for document in DOCUMENTS:
        document.write_text(with_line_numbers(document), encoding="utf-8")
