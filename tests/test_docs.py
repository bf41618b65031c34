"""The documents lead to what they name: files, lines, pictures, and commands that parse.

python tests/test_docs.py renews the line numbers.
"""

import ast
import importlib
import re
import shlex
from pathlib import Path

import pytest
import tyro

ROOT = Path(__file__).parent.parent
DOCUMENTS = [
    ROOT / "README.md",
    *sorted(ROOT.glob("docs/*.md")),
    *sorted(ROOT.glob("results/*.md")),
]
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
    return {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in found}


@each_document
def test_links_lead_to_something(document):
    text = document.read_text(encoding="utf-8")
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        path, _, anchor = target.partition("#")
        if target.startswith("http"):
            continue
        other = document.parent / path if path else document
        assert other.exists(), target
        if anchor and other.suffix == ".md":
            assert anchor in headings(other), target


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


if __name__ == "__main__":
    for document in DOCUMENTS:
        document.write_text(with_line_numbers(document), encoding="utf-8")
