"""Build the study site: any two of the five scripts side by side, and all pages of the project.

    pip install -r docs/requirements.txt
    python docs/build.py          # writes site/, whose index.html any browser opens from the folder

A Markdown page becomes PATH.html, and so does each file that a page links to. pairs/A-B.html has
the scripts A and B in two columns. Texts come from docs/pairs.md, the marks in the margin from
docs/from_reinforce_to_ppo.md, and learning curves from results/defaults.csv.
"""

import ast
import csv
import functools
import html
import itertools
import math
import re
import shutil
import statistics
import sys
from collections import defaultdict
from collections.abc import Iterator, Sequence
from difflib import SequenceMatcher
from pathlib import Path
from typing import Any, NamedTuple

import jinja2
from latex2mathml.converter import convert
from markdown_it import MarkdownIt
from markdown_it.token import Token
from mdit_py_plugins.anchors import anchors_plugin
from mdit_py_plugins.dollarmath import dollarmath_plugin
from pygments.lexers import get_lexer_by_name
from pygments.token import STANDARD_TYPES

ROOT = Path(__file__).parent.parent
SCRIPTS = ["reinforce", "vpg", "trpo", "ppo_clip", "ppo_kl"]
NAMES = dict(zip(SCRIPTS, ["REINFORCE", "VPG", "TRPO", "PPO-Clip", "PPO-KL"]))
PAGES = [ROOT / "README.md", *sorted(ROOT.glob("docs/*.md")), *sorted(ROOT.glob("results/*.md"))]
TASKS = ["CartPole-v1", "Pendulum-v1", "LunarLander-v3", "HalfCheetah-v5"]
WIDE = '<div class="wide" tabindex="0" role="group" aria-label="{}">'  # scrolls by itself


def read(path: str) -> str:
    return (ROOT / path).read_text(encoding="utf-8")


# ----------------------------------------- the alignment ------------------------------------------


class Line(NamedTuple):
    """A line of a script, and the section and definition that it belongs to."""

    number: int  # from 1
    text: str
    section: str
    definition: str

    @property
    def is_core(self) -> bool:
        """Whether it belongs to update, or to the algorithm's own arguments."""
        return self.section == "update" or self.definition == "own arguments"


class Row(NamedTuple):
    """Lines that stand beside each other; None is a gap."""

    left: Line | None
    right: Line | None

    @property
    def is_equal(self) -> bool:
        return bool(self.left and self.right and self.left.text == self.right.text)


@functools.cache
def script_lines(name: str) -> list[Line]:
    """Read a script's lines. Methods are definitions too; a definition has its decorators."""
    tree, starts = ast.parse(read(f"{name}.py")), {}  # line number → definition

    def visit(nodes: list[ast.stmt], prefix: str) -> None:
        for node in nodes:
            if isinstance(node, ast.ClassDef | ast.FunctionDef):
                first = min(x.lineno for x in (node, *node.decorator_list))
                starts[first] = prefix + node.name
                visit(node.body if isinstance(node, ast.ClassDef) else [], f"{node.name}.")

    visit(tree.body, "")
    starts[next(x.lineno for x in tree.body if isinstance(x, ast.Import))] = "imports"
    starts[next(x.lineno for x in tree.body if isinstance(x, ast.If))] = "main"
    lines, section, definition = [], "head", "docstring"
    for number, line in enumerate(read(f"{name}.py").splitlines(), start=1):
        if ruler := re.fullmatch(r"# -+ (\w+) -+", line):
            section, definition = ruler[1], ""
        elif definition == "Args" and not line and lines[-1].text.startswith("    quiet"):
            definition = "own arguments"
        definition = starts.get(number, definition)
        lines.append(Line(number, line, section, definition))
    return lines


@functools.cache
def likeness(old: str, new: str) -> float:
    """How alike two lines are: 1 for equal ones, 0 if they should not stand beside each other."""
    if not old or not new:
        return 0.1 * (old == new)
    a, b = (re.findall(r"\w+|[^\w\s]", re.sub(r"(?<=\S)  # .*", "", x)) for x in (old, new))
    ratio = SequenceMatcher(None, a, b, autojunk=False).ratio()
    return ratio if ratio > 0.6 else 0.0


def align_lines(old: Sequence[Line], new: Sequence[Line]) -> list[Row]:
    """Set lines beside each other, in order, so that the sum of their likeness is greatest."""
    best = [[0.0] * (len(new) + 1) for _ in range(len(old) + 1)]  # of the lines from i and j on
    for i, j in itertools.product(reversed(range(len(old))), reversed(range(len(new)))):
        together = best[i + 1][j + 1] + likeness(old[i].text, new[j].text)
        best[i][j] = max(together, best[i + 1][j], best[i][j + 1])
    rows, i, j = [], 0, 0
    while i < len(old) or j < len(new):
        only_old = i < len(old) and best[i][j] == best[i + 1][j]
        only_new = not only_old and j < len(new) and best[i][j] == best[i][j + 1]
        rows.append(Row(None if only_new else old[i], None if only_old else new[j]))
        i, j = i + (not only_new), j + (not only_old)
    return rows


def align(left: str, right: str) -> list[Row]:
    """Align two scripts definition by definition; one that only one of them has stands alone."""
    old, new = (
        {key: list(lines) for key, lines in itertools.groupby(script_lines(x), lambda x: x[2:])}
        for x in (left, right)
    )
    rows, keys = [], (list(old), list(new))
    for tag, i1, i2, j1, j2 in SequenceMatcher(None, *keys, autojunk=False).get_opcodes():
        a, b = [old[x] for x in keys[0][i1:i2]], [new[x] for x in keys[1][j1:j2]]
        for pair in zip(a, b) if tag == "equal" else [*((x, []) for x in a), *(([], x) for x in b)]:
            rows += align_lines(*pair)
    return rows


def changed_words(old: str, new: str) -> tuple[list[range], list[range]]:
    """The characters in which two lines differ, of each line."""
    word = r"\d[\d_.]*(?:e-?\d+)?|\w+|\s+|."
    a, b = re.findall(word, old), re.findall(word, new)
    spans = ([], [])
    for tag, *ends in SequenceMatcher(None, a, b, autojunk=False).get_opcodes():
        for text, start, end, own in ((a, *ends[:2], spans[0]), (b, *ends[2:], spans[1])):
            before, text = "".join(text[:start]), "".join(text[start:end]).rstrip()
            if tag != "equal" and text:
                own.append(range(len(before), len(before) + len(text)))
    return spans


# ------------------------------------------- the columns ------------------------------------------


@functools.cache
def colours(text: str, language: str = "python") -> list[list[tuple[str, str]]]:
    """Each line of a text as (class of Pygments, piece)."""
    lines = [[]]
    for kind, value in get_lexer_by_name(language, stripnl=False).get_tokens(text):
        first, *others = value.split("\n")
        name = STANDARD_TYPES[kind][: 2 if language == "diff" else 1]
        lines[-1].append((name, first))
        lines += [[(name, x)] for x in others]
    return lines[:-1]


def coloured(pieces: list[tuple[str, str]], marks: Sequence[range] = ()) -> str:
    """A line as HTML: comments, keywords, strings and numbers in colour, changed words marked."""
    out, position = [], 0
    for kind, piece in pieces:
        marked = [any(position + n in x for x in marks) for n in range(len(piece))]
        for is_marked, group in itertools.groupby(range(len(piece)), key=marked.__getitem__):
            text = html.escape("".join(piece[n] for n in group), quote=False)
            text = (
                f"<i class={kind}>{text}</i>" if kind in ("c", "k", "s", "m", "gd", "gi") else text
            )
            out.append(f"<mark>{text}</mark>" if is_marked else text)
        position += len(piece)
    return "".join(out).replace("</mark><mark>", "")


def cell(file: str, number: int, code: str, kind: str, row: int, cite: str = "") -> str:
    """A line in its column, with its number, a link to itself."""
    place = f"{file}.L{number}"
    link = f'<a id="{place}" href="#{place}">{number}</a>'
    indent = len(code) - len(code.lstrip())
    style = f"--r:{row};--i:{indent}" if indent > 4 else f"--r:{row}"  # for lines that wrap
    return f'<div class="{kind}" style="{style}">{link}<code>{code}</code>{cite}</div>'


def chunk(left: str, right: str, rows: list[Row], cites: dict[tuple[str, int], str]) -> str:
    """Rows as two columns: all of the left one, then all of the right one, so that they also read
    as a diff when a narrow window puts them below each other."""
    cells = ([], [])
    for n, row in enumerate(rows, start=1):
        marks = ((), ())
        kinds = ("old", "new") if row.is_equal else ("old cut", "new add")
        if row.left and row.right and not row.is_equal:
            marks = changed_words(row.left.text, row.right.text)
            if row.left.text.strip() == row.right.text.strip():
                kinds = ("old shift", "new shift")
        for own, script, line, kind, mark in zip(cells, (left, right), row, kinds, marks):
            if line:
                code = coloured(colours(read(f"{script}.py"))[line.number - 1], mark)
                cite = cites.get((script, line.number), "")
                own.append(cell(script, line.number, code, kind, n, cite))
    return "".join(itertools.chain(*cells))


def sections(left: str, right: str, cites: dict[tuple[str, int], str]) -> list[dict[str, Any]]:
    """The sections of two scripts, each with its blocks; an equal block is a fold."""

    def of(row: Row) -> Line:
        return row.left or row.right

    out = []
    for section, rows in itertools.groupby(align(left, right), key=lambda x: of(x).section):
        blocks = []
        groups = itertools.groupby(rows, key=lambda x: (of(x).is_core, x.is_equal))
        for (core, is_equal), group in [(key, list(group)) for key, group in groups]:
            names = [x for x in dict.fromkeys(of(x).definition for x in group) if x != section]
            block = {"core": core, "names": [x for x in names if x], "count": len(group)}
            block["is_fold"] = is_equal and len(group) > 2
            blocks.append(block | {"html": chunk(left, right, group, cites)})
        out.append({"name": section, "blocks": blocks, "core": any(x["core"] for x in blocks)})
    return out


# --------------------------------------- what stands above ----------------------------------------


def arguments(script: str) -> dict[str, tuple[str, str]]:
    """Each argument's default and comment."""
    fields = [x.text for x in script_lines(script) if x.definition in ("Args", "own arguments")]
    found = [re.fullmatch(r"    (\w+): [^=]+ = (.+?)(?:  # (.*))?", x) for x in fields]
    return {f"--{x[1].replace('_', '-')}": (x[2], x[3] or "") for x in found if x}


def different_arguments(left: str, right: str) -> list[tuple[str, str, str, str]]:
    """(argument, default on the left, on the right, what it is) of those that differ."""
    a, b = arguments(left), arguments(right)
    rows = [(x, a.get(x, ("—", "")), b.get(x, ("—", ""))) for x in a | b]
    return [(x, old[0], new[0], new[1] or old[1]) for x, old, new in rows if old[0] != new[0]]


@functools.cache
def default_runs() -> dict[tuple[str, str], list[list[float]]]:
    """The returns of each (task, script), (seeds, 20), after each 10,000 steps."""
    runs = defaultdict(list)
    for row in csv.DictReader(read("results/defaults.csv").splitlines()):
        values = [float(row[x] or "nan") for x in row if x.isdigit()]
        runs[row["task"], row["program"].removesuffix(".py")].append(values)
    return runs


def learning_curves(*scripts: str) -> Iterator[dict[str, Any]]:
    """For each task, each script's mean return and range over the seeds, as SVG points."""
    for task in TASKS:
        every = [x for name in NAMES for run in default_runs()[task, name] for x in run if x == x]
        low, high = min(every), max(every)
        curves = []
        for script in scripts:
            steps = enumerate(zip(*default_runs()[task, script]), start=1)
            known = [(10 * n, x) for n, x in steps if math.isfinite(sum(x))]
            mean, least, most = (
                [f"{x},{100 - 96 * (of(values) - low) / (high - low):.1f}" for x, values in known]
                for of in (statistics.fmean, min, max)
            )
            curves.append({"mean": " ".join(mean), "band": " ".join([*least, *reversed(most)])})
        yield {"task": task, "low": f"{low:,.0f}", "high": f"{high:,.0f}", "curves": curves}


def texts() -> dict[str, str]:
    """The texts of docs/pairs.md as HTML: objectives by script, sentences by pair."""
    page = ROOT / "docs/pairs.md"
    _, *parts = re.split(r"^##+ (.+)\n", page.read_text(encoding="utf-8"), flags=re.M)
    return {x: markdown(text, page, set()) for x, text in zip(parts[::2], parts[1::2])}


def citations() -> dict[tuple[str, int], dict[str, Any]]:
    """What the theory page says of a line: its section, and that section's tests and experiment."""
    cited = {}
    for part in re.split(r"^## ", read("docs/from_reinforce_to_ppo.md"), flags=re.M)[1:]:
        title = part.partition("\n")[0]
        values = {"title": title, "anchor": slug(title)}
        values["tests"] = dict.fromkeys(re.findall(r"\[`(test_\w+)`\]\(\.\./(\S+)#L(\d+)", part))
        values["experiments"] = re.findall(r"\]\(\.\./(results/\w+)\.md#([\w-]+)", part)[:1]
        for text in re.findall(r"^- \*\*Code:\*\*.*(?:\n  .*)*", part, re.M):
            for script, line in re.findall(r"\]\(\.\./(\w+)\.py#L(\d+)", text):
                cited[script, int(line)] = values
    return cited


# ------------------------------------------ Markdown pages ----------------------------------------


def slug(title: str) -> str:
    """GitHub's anchor of a heading."""
    return re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-")


def site_link(page: Path, link: str, files: set[Path]) -> str:
    """Where a link of a Markdown page leads in the site; notes the file that it needs."""
    path, _, fragment = link.partition("#")
    if re.match(r"\w+:", link) or not path:
        return link
    if path == "../../deployments/github-pages":  # GitHub shows there where the site is
        return "index.html"
    target = (page.parent / path).resolve()
    if target.is_dir():
        target, path = target / "README.md", f"{path.rstrip('/')}/README.md"
    files.add(target)
    if target.suffix == ".png":
        return path
    if line := re.match(r"L(\d+)", fragment):
        fragment = f"{target.stem}.L{line[1]}"
    path = path.removesuffix(".md") + ".html"
    return f"{path}#{fragment}" if fragment else path


def markdown(text: str, page: Path, files: set[Path]) -> str:
    """The text of a Markdown page as HTML, with formulas as MathML and links into the site."""
    md = MarkdownIt("commonmark").enable("table")
    md.use(anchors_plugin, max_level=4, slug_func=slug)
    md.use(dollarmath_plugin, allow_space=False, renderer=lambda x, _: convert(x))

    def fence(tokens: list[Token], i: int, *_: Any) -> str:
        language, text = tokens[i].info or "text", tokens[i].content
        if language == "math":
            return f"{WIDE.format('Formula')}{convert(text.strip(), display='block')}</div>"
        inner = "\n".join(map(coloured, colours(text, language)))
        return f'<pre tabindex="0"><code>{inner}</code></pre>'

    md.renderer.rules["fence"] = md.renderer.rules["code_block"] = fence
    tokens = md.parse(text)
    for token in [x for parent in tokens for x in parent.children or ()]:
        for name in {"href", "src"} & set(token.attrs):
            token.attrs[name] = site_link(page, str(token.attrs[name]), files)
    md.renderer.rules["table_open"] = lambda *_: WIDE.format("Table") + "<table>"
    md.renderer.rules["table_close"] = lambda *_: "</table></div>"
    return md.renderer.render(tokens, md.options, {})


# ---------------------------------------------- site ----------------------------------------------


def build(site: Path) -> None:
    """Write all pages into a new folder."""
    shutil.rmtree(site, ignore_errors=True)
    loader = jinja2.FileSystemLoader(ROOT / "docs/site")
    options = {"undefined": jinja2.StrictUndefined, "trim_blocks": True, "lstrip_blocks": True}
    templates = jinja2.Environment(loader=loader, **options)
    templates.globals |= {"names": NAMES, "texts": texts(), "learning_curves": learning_curves}
    templates.globals |= {"arguments": different_arguments}

    def render(template: str, root: str = "", **values: Any) -> str:
        return templates.get_template(template).render(root=root, **values)

    def write(path: str, page: str) -> None:
        (site / path).parent.mkdir(parents=True, exist_ok=True)
        (site / path).write_text(page, encoding="utf-8")

    commands = re.findall(r"^python3 -m venv .*$", read("README.md"), re.M)
    write("index.html", render("home.html", title="Home", commands=commands))
    files = {ROOT / f"{name}.py" for name in NAMES} | {ROOT / "results/cartpole.png"}
    for page in PAGES:
        path = page.relative_to(ROOT).with_suffix(".html").as_posix()
        title, _, text = page.read_text(encoding="utf-8").partition("\n")
        values = {"title": title.strip("# "), "text": markdown(f"{title}\n{text}", page, files)}
        values["headings"] = re.findall(r'<h2 id="([^"]*)">(.*?)</h2>', values["text"])
        write(path, render("document.html", "../" * path.count("/"), **values))
    cites = {x: render("cite.html", "../", **values) for x, values in citations().items()}
    for left, right in itertools.permutations(NAMES, 2):
        values = {"left": left, "right": right, "title": f"{NAMES[left]} → {NAMES[right]}"}
        values["sections"] = sections(left, right, cites)
        write(f"pairs/{left}-{right}.html", render("pair.html", "../", **values))
    cites = {x: render("cite.html", **values) for x, values in citations().items()}
    for file in sorted(files - set(PAGES)):
        path, stem = file.relative_to(ROOT).as_posix(), file.stem
        if file.suffix == ".png":
            shutil.copy(file, site / path)
            continue
        lines = enumerate(
            colours(read(path), "python" if file.suffix == ".py" else "text"), start=1
        )
        cells = [cell(stem, n, coloured(x), "new", n, cites.get((stem, n), "")) for n, x in lines]
        values = {"script": stem, "title": path, "lines": "".join(cells), "parts": {}}
        if stem in NAMES:
            for line in script_lines(stem):
                values["parts"].setdefault(line.section, line.number)
        write(f"{path}.html", render("source.html", "../" * path.count("/"), **values))
    for name in ("style.css", "script.js"):
        shutil.copy(ROOT / "docs/site" / name, site / name)
    print(site / "index.html")


if __name__ == "__main__":
    build(Path(sys.argv[1]) if len(sys.argv) > 1 else ROOT / "site")
