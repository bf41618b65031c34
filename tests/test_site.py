"""docs/build.py: first the text of its pages, then the pages in Chromium."""

import csv
import html
import importlib.util
import itertools
import re
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest

ROOT = Path(__file__).parent.parent
SCRIPTS = ["reinforce", "vpg", "trpo", "ppo_clip", "ppo_kl"]
PAIRS = list(itertools.permutations(SCRIPTS, 2))
CELL = re.compile(
    r'<div class="(old|new)[^"]*" style="--r:(\d+)[^"]*">'
    r'<a id="(\w+)\.L(\d+)" href="#\3\.L\4">\4</a><code>(.*?)</code>'
)
FOLD = re.compile(
    r'<details class="fold.*?<summary>(\w+): (\d+) equal lines.*?</div></details>', re.S
)

spec = importlib.util.spec_from_file_location("site_build", ROOT / "docs/build.py")
builder = importlib.util.module_from_spec(spec)
spec.loader.exec_module(builder)


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("study") / "site"
    builder.build(folder)
    return folder


def plain(code: str) -> str:
    return html.unescape(re.sub(r"<[^>]*>", "", code))


def place(script: str, text: str) -> str:
    """The anchor of the first line of a script that has this text."""
    lines = (ROOT / f"{script}.py").read_text(encoding="utf-8").splitlines()
    return f"{script}.L{next(n for n, line in enumerate(lines, start=1) if text in line)}"


def check_pair(page: str, left: str, right: str) -> None:
    """Every line of both scripts stands once and in order, beside what it should stand beside."""
    for side, script in (("old", left), ("new", right)):
        cells = [x for x in CELL.findall(page) if x[0] == side]
        assert {x[2] for x in cells} == {script}
        assert [int(x[3]) for x in cells] == list(range(1, len(cells) + 1))
        lines = (ROOT / f"{script}.py").read_text(encoding="utf-8").splitlines()
        assert [plain(x[4]) for x in cells] == lines
    for fold in FOLD.finditer(page):
        old, new = ([x for x in CELL.findall(fold[0]) if x[0] == side] for side in ("old", "new"))
        assert [(x[1], x[4]) for x in old] == [(x[1], x[4]) for x in new]
        assert len(old) == int(fold[2]) > 2
    for block in re.findall(r'<div class="rows.*?</div></div>', page, re.S):
        rows = [int(x[1]) for x in CELL.findall(block)]
        assert set(rows) == set(range(1, max(rows) + 1))  # no row is empty


@pytest.mark.parametrize(("left", "right"), PAIRS)
def test_every_line_stands_once_and_in_order_in_its_column(site, left, right):
    check_pair((site / f"pairs/{left}-{right}.html").read_text(encoding="utf-8"), left, right)


@pytest.mark.parametrize("script", SCRIPTS)
def test_the_page_of_a_file_has_its_lines_and_its_sections(site, script):
    page = (site / f"{script}.py.html").read_text(encoding="utf-8")
    lines = (ROOT / f"{script}.py").read_text(encoding="utf-8").splitlines()
    cells = CELL.findall(page)
    assert [plain(x[4]) for x in cells] == lines
    assert [int(x[3]) for x in cells] == list(range(1, len(lines) + 1))
    for line, text in enumerate(lines, start=1):
        if ruler := re.fullmatch(r"# -+ (\w+) -+", text):
            assert f'<a href="#{script}.L{line}">{ruler[1]}</a>' in page


@pytest.mark.parametrize(("left", "right"), PAIRS)
def test_a_pair_has_its_own_sentences_objectives_and_place_on_the_home_page(site, left, right):
    page = (site / f"pairs/{left}-{right}.html").read_text(encoding="utf-8")
    texts, names = builder.texts(), builder.NAMES
    assert texts[f"{names[left]} → {names[right]}"] in page
    assert -1 < page.find(texts[names[left]]) < page.find(texts[names[right]])
    home = (site / "index.html").read_text(encoding="utf-8")
    assert f'<td><a href="pairs/{left}-{right}.html"' in home


def test_learning_curves_are_the_means_and_ranges_of_the_runs():
    with open(ROOT / "results/defaults.csv", newline="") as file:
        rows = [x for x in csv.DictReader(file) if x["task"] == "Pendulum-v1"]
    (panel,) = [x for x in builder.learning_curves("trpo", "vpg") if x["task"] == "Pendulum-v1"]
    ours = [float(x[k]) for x in rows if x["program"][:-3] in SCRIPTS for k in x if k.isdigit()]
    for curve, script in zip(panel["curves"], ("trpo.py", "vpg.py")):
        ends = [float(x["200000"]) for x in rows if x["program"] == script]
        x, y = map(float, curve["mean"].split()[-1].split(","))
        value = min(ours) + (100 - y) / 96 * (max(ours) - min(ours))
        assert x == 200 and abs(value - sum(ends) / len(ends)) < 1
        heights = [float(x.split(",")[1]) for x in curve["band"].split() if x.startswith("200,")]
        assert len(heights) == 2 and heights[0] > y > heights[1]


def shifted(rows: list) -> list:
    return [
        *rows[:50],
        builder.Row(rows[50].left, None),
        builder.Row(None, rows[50].right),
        *rows[52:],
    ]


@pytest.mark.parametrize("broken", [shifted, lambda rows: rows[1:], lambda rows: rows[::-1]])
def test_a_broken_alignment_fails(monkeypatch, broken):
    whole = builder.align
    monkeypatch.setattr(builder, "align", lambda *names: broken(whole(*names)))
    blocks = [x["html"] for part in builder.sections("vpg", "trpo", {}) for x in part["blocks"]]
    with pytest.raises(AssertionError):
        check_pair("".join(blocks), "vpg", "trpo")


@pytest.mark.parametrize(("left", "right"), PAIRS)
def test_equal_definitions_stand_beside_each_other(left, right):
    for row in builder.align(left, right):
        if row.left and row.right:
            assert row.left[2:] == row.right[2:]
    shared = ["train", "Run.write", "mean_over_ranks", "Policy.sampler", "with_rows", "mlp"]
    together = {x.left.definition for x in builder.align(left, right) if x.is_equal}
    assert together >= set(shared)
    one_sided = [x.left or x.right for x in builder.align(left, right) if not (x.left and x.right)]
    assert not {x.definition for x in one_sided} & set(shared)


def test_changed_words_are_marked_and_no_others(site):
    page = (site / "pairs/vpg-ppo_clip.html").read_text(encoding="utf-8")
    (line,) = [x[4] for x in CELL.findall(page) if f"{x[2]}.L{x[3]}" == place("vpg", " num_steps:")]
    assert plain(line).startswith("    num_steps: Annotated[int, (2, math.inf)] = 64")
    assert [plain(x) for x in re.findall(r"<mark>(.*?)</mark>", line)] == ["64"]


def test_the_arguments_that_differ_in_presence_or_default():
    rows = {x[0]: x[1:3] for x in builder.different_arguments("vpg", "ppo_clip")}
    assert rows["--num-steps"] == ("64", "128")
    assert rows["--clip-coef"] == ("—", "0.2")
    assert rows["--value-epochs"] == ("10", "—")
    assert "--gae-lambda" not in rows


def test_each_cited_line_has_a_mark_with_its_equation_tests_and_experiment(site):
    theory = (ROOT / "docs/from_reinforce_to_ppo.md").read_text(encoding="utf-8")
    cited = set(re.findall(r"\]\(\.\./(reinforce|vpg|trpo|ppo_\w+)\.py#L(\d+)", theory))
    assert cited
    for script, line in cited:
        page = (site / f"{script}.py.html").read_text(encoding="utf-8")
        row = re.search(rf'<a id="{script}\.L{line}" .*?(?=<div class="new|</main>)', page, re.S)[0]
        assert re.search(r"from_reinforce_to_ppo\.html#\d+", row)
        assert "#test_" in row and "results/" in row


PAGES = {
    *("index.html", "README.html", "docs/from_reinforce_to_ppo.html", "docs/exercises.html"),
    "docs/recipes.html",
    *("results/README.html", "results/penalties.html", "vpg.py.html", "pairs/vpg-ppo_clip.html"),
}


def test_all_links_and_anchors_resolve_and_nothing_is_loaded_from_elsewhere(site):
    texts = {x: x.read_text(encoding="utf-8") for x in sorted(site.rglob("*.html"))}
    assert {x.relative_to(site).as_posix() for x in texts} >= PAGES
    ids = {x: re.findall(r'\bid="([^"]*)"', text) for x, text in texts.items()}
    for page, text in texts.items():
        assert len(ids[page]) == len(set(ids[page])), page
        for address in re.findall(r'<a [^>]*href="([^"]*)"', text):
            url = urlsplit(html.unescape(address))
            if not url.scheme:
                target = (page.parent / unquote(url.path)).resolve() if url.path else page
                assert target.is_file(), (page, address)
                assert not url.fragment or unquote(url.fragment) in ids[target], (page, address)
        for address in re.findall(r'<(?:link|script|img)[^>]*(?:src|href)="([^"]*)"', text):
            assert address == "data:," or (page.parent / address).is_file(), (page, address)
    for name in ("style.css", "script.js"):
        assert not re.search(r"https?:|url\(|import", (site / name).read_text(encoding="utf-8"))


def test_all_formulas_are_drawn(site):
    for page in builder.PAGES:
        source = page.read_text(encoding="utf-8")
        fence = re.compile(r"^```(\w*)\n.*?^```$", re.M | re.S)
        formulas = fence.findall(source).count("math")
        formulas += len(re.findall(r"\$[^$\n]+\$", re.sub("`[^`]*`", "", fence.sub("", source))))
        text = (site / page.relative_to(ROOT).with_suffix(".html")).read_text(encoding="utf-8")
        drawn = re.findall(r"<math.*?</math>", text, re.S)
        assert len(drawn) == formulas, page
        assert not [x for x in drawn if "merror" in x or re.search(r"\\\w|[{}](?!<)", plain(x))], (
            page
        )


def test_a_second_build_is_the_same_to_the_byte(site, tmp_path):
    builder.build(tmp_path / "again")
    first, second = (
        {x.relative_to(folder): x.read_bytes() for x in folder.rglob("*") if x.is_file()}
        for folder in (site, tmp_path / "again")
    )
    assert first == second


def test_budgets(site):
    def lines(*names: str) -> int:
        return sum(len((ROOT / "docs" / x).read_text(encoding="utf-8").splitlines()) for x in names)

    assert lines("build.py") <= 400
    assert lines("site/style.css", "site/script.js") <= 200
    sizes = [x.stat().st_size for x in site.rglob("*") if x.is_file() and x.suffix != ".png"]
    assert sum(sizes) < 6e6


@pytest.mark.parametrize(("left", "right"), PAIRS)
def test_each_pair_has_two_sentences(left, right):
    text = plain(builder.texts()[f"{builder.NAMES[left]} → {builder.NAMES[right]}"]).strip()
    assert len(re.findall(r"[.](?:\s|$)", text)) == 2


# ------------------------------------------- in Chromium ------------------------------------------


@pytest.fixture(scope="module")
def browser() -> Iterator[object]:
    api = pytest.importorskip("playwright.sync_api", reason="needs pip install playwright")
    with api.sync_playwright() as playwright:
        own = Path(playwright.chromium.executable_path)
        found = shutil.which("chromium") or shutil.which("google-chrome")
        path = found or (str(own) if own.exists() else None)
        if path is None:
            pytest.skip("needs Chromium: apt-get install chromium, or playwright install chromium")
        browser = playwright.chromium.launch(executable_path=path, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture
def visit(browser, site) -> Iterator[Callable]:
    """Open a page of the site; at the end, no page may have said anything on the console."""
    pages, said = [], []

    def visit(path: str, width: int = 1280, scheme: str = "light", **options: object):
        page = browser.new_page(
            viewport={"width": width, "height": 900}, color_scheme=scheme, **options
        )
        page.on("console", lambda message: said.append((path, message.text)))
        page.on("pageerror", lambda error: said.append((path, error)))
        page.on("requestfailed", lambda request: said.append((path, request.url)))
        page.goto(f"{site.as_uri()}/{path}")
        pages.append(page)
        return page

    yield visit
    for page in pages:
        page.close()
    assert not said


def test_every_page_loads_without_an_error_and_without_sideways_scrolling(site, visit):
    page = visit("index.html")
    for path in sorted(site.rglob("*.html")):
        page.goto(path.as_uri())
        for width in (1280, 400):
            page.set_viewport_size({"width": width, "height": 900})
            assert page.evaluate("document.documentElement.scrollWidth") <= width, (path, width)


def test_a_fold_opens_by_mouse_and_by_keyboard(visit):
    page = visit("pairs/vpg-trpo.html")
    fold = page.locator(".fold").first
    line = fold.locator(".new").first
    assert not line.is_visible()
    fold.locator("summary").click()
    assert line.is_visible()
    fold.locator("summary").press("Enter")
    assert not line.is_visible()
    page.get_by_role("button", name="Open all equal lines").click()
    assert page.locator(".fold:not([open])").count() == 0
    page.get_by_role("button", name="Open all equal lines").press("Enter")
    assert page.locator(".fold[open]").count() == 0


def test_a_button_leaves_update_and_own_arguments_alone(visit):
    page = visit("pairs/vpg-trpo.html")
    page.get_by_role("button", name="Only update and own arguments").click()
    shown = page.locator("section:visible h2.section").all_inner_texts()
    assert shown == ["Args", "update"]
    assert page.locator('[id="vpg.L1"]').count() and not page.locator('[id="vpg.L1"]').is_visible()


def test_menus_and_swap_lead_to_the_pair(visit):
    page = visit("pairs/vpg-trpo.html")
    page.get_by_role("button", name="Swap").click()
    page.wait_for_url("**/pairs/trpo-vpg.html")
    page.get_by_label("Left").select_option("ppo_kl")
    page.wait_for_url("**/pairs/ppo_kl-vpg.html")
    page.get_by_label("Right").select_option("ppo_kl")  # the same twice: the two change places
    page.wait_for_url("**/pairs/vpg-ppo_kl.html")


@pytest.mark.parametrize("width", [1280, 400])
@pytest.mark.parametrize(
    "line",
    [
        place("vpg", "is_step[t] ="),
        place("ppo_clip", "raw_obs[0] = raw_obs[-1]"),
        place("vpg", "loss = -(log_probs"),
    ],
)
def test_a_deep_link_scrolls_to_its_line_even_in_a_fold(visit, line, width):
    page = visit(f"pairs/vpg-ppo_clip.html#{line}", width)
    page.wait_for_timeout(200)
    row = page.evaluate(
        """id => { const row = document.getElementById(id).parentElement;
        const twin = row.parentElement.querySelector(`.new[style="${row.getAttribute("style")}"]`);
        return (row.offsetParent ? row : twin).getBoundingClientRect().top }""",
        line,
    )
    assert 0 < row < 900


def test_the_clip_by_hand(visit):
    page = visit("docs/from_reinforce_to_ppo.html")
    names = "set min phi beta min-slope phi-slope beta-slope".split()
    text = {name: page.locator(f"#clip-{name}") for name in names}

    def numbers() -> list[float]:
        return [float(text[x].inner_text().replace("−", "-")) for x in names[1:]]

    def set_slider(name: str, value: float) -> None:
        page.locator(f"#clip-{name}").fill(str(value))

    assert text["set"].inner_text() == "kill"
    assert numbers() == [1.2, 1.2, 0.89, 0, 0, 0]  # β = −1.5, and 1.5 − 1.5 log 1.5 = 0.89
    set_slider("sign", -1)
    assert text["set"].inner_text() == "pass"  # Â < 0 and r above 1 + ε
    assert numbers() == [-1.5, -1.5, -1.5, -1, -1, -1]
    dot = [float(page.locator("#clip-dot").get_attribute(x)) for x in ("cx", "cy")]
    assert dot == [30 + 170 * 1.5, 110 + 50 * 1.5]
    assert page.locator("#clip-curve").get_attribute("d") == "M30,150 L166,150 L370,210"
    set_slider("r", 0.5)
    assert text["set"].inner_text() == "kill" and numbers()[3:] == [0, 0, 0]
    set_slider("r", 0.9)
    assert text["set"].inner_text() == "in"
    set_slider("epsilon", 0.05)
    assert text["set"].inner_text() == "kill"
    box = page.locator("#clip svg").bounding_box()
    page.mouse.move(box["x"] + box["width"] * 0.9, box["y"] + 20)
    assert text["set"].inner_text() == "pass"


def test_without_scripts_the_picture_and_the_folds_are_there(visit):
    page = visit("docs/from_reinforce_to_ppo.html", java_script_enabled=False)
    assert page.locator("#clip-curve").is_visible()
    assert not page.locator("#clip form").is_visible()
    page = visit("pairs/vpg-trpo.html", java_script_enabled=False)
    page.locator(".fold summary").first.click()
    assert page.locator(".fold .new").first.is_visible()


def test_a_mark_opens_and_escape_closes_it(visit):
    page = visit("pairs/reinforce-vpg.html")
    mark = page.locator(".cite").first
    mark.locator("summary").press("Enter")
    assert mark.get_by_text("equation").is_visible()
    page.keyboard.press("Escape")
    assert not mark.get_by_text("equation").is_visible()


def test_the_name_of_the_section_stays_in_view(visit):
    page = visit(f"pairs/vpg-trpo.html#{place('trpo', 'def flat_gradient')}")
    page.wait_for_timeout(200)
    box = page.locator("h2.section", has_text="update").bounding_box()
    assert abs(box["y"]) < 1


def test_a_narrow_window_has_the_diff_in_its_usual_order(visit):
    page = visit("pairs/vpg-ppo_clip.html", 400)
    page.get_by_role("button", name="Open all equal lines").click()
    shown = page.evaluate(
        """() => [...document.querySelectorAll(".rows > div")].filter(x => x.offsetParent)
        .map(x => [x.className, x.getBoundingClientRect().top, x.querySelector("a").id])"""
    )
    assert [x[1] for x in shown] == sorted(x[1] for x in shown)
    new = [x[2] for x in shown if x[0].startswith("new")]
    count = len((ROOT / "ppo_clip.py").read_text(encoding="utf-8").splitlines())
    assert new == [f"ppo_clip.L{n}" for n in range(1, count + 1)]
    old = [x[2] for x in shown if x[0].startswith("old")]
    loss, equal = place("vpg", "loss = -(log_probs"), place("vpg", "is_step[t] =")
    assert loss in old and equal not in old  # an equal line stands once
    order = [x[2] for x in shown]
    assert order.index(loss) < order.index(place("ppo_clip", "loss = args.vf_coef"))


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize(
    "path", ["index.html", "pairs/vpg-ppo_clip.html", "docs/from_reinforce_to_ppo.html"]
)
def test_axe_finds_no_violation_of_wcag_aa(visit, path, scheme):
    axe = pytest.importorskip("axe_playwright_python.sync_playwright")
    page = visit(path, scheme=scheme)
    page.evaluate("document.querySelectorAll('details').forEach(x => { x.open = true; })")
    tags = ["wcag2a", "wcag2aa", "wcag21a", "wcag21aa"]
    results = axe.Axe().run(page, options={"runOnly": tags, "preload": False})
    assert not results.response["violations"], results.generate_report()
