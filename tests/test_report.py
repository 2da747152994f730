"""One site from two made-up executed notebooks: every link, picture and page, and nothing from the network."""

import contextlib
import inspect
import io
import re
from functools import cache
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

import nbformat
import pandas as pd
import pytest
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook, new_output

from ltseg_core import analysis, report
from ltseg_core.config import UserError
from ltseg_core.losses import LOSSES
from ltseg_core.methods import METHODS

PIXEL = "iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAAAAAA6fptVAAAACklEQVR4nGNgAAAAAgABSK+kcQAAAABJRU5ErkJggg=="
NASTY = r"F*P* |rises| `by` 5_ to <10> %, a_b \alpha [x](y) $1 -- :doc:`z`"
NOTEBOOKS = Path(__file__).parents[1] / "notebooks"
BOARD = {
    "01_claims": [("X-01", "+0.2", "supported", "scenes")],
    "02_claims": [("RR-01", NASTY, "supported", "scenes"), ("RR-02", "-1", "contradicted", NASTY)],
    "07_claims": [("X-01", NASTY, "open", "camvid")],  # of a notebook that is not here
}
IN_HTML = (  # as JupyterLab names the headings
    "02_second.ipynb",
    "02_second.ipynb#The-claims",
    "02_second.ipynb#Is-%CF%80-of-a,-b-c-&amp;-d?",
    "03_third.ipynb",  # not here
    "03_third.ipynb#The-claims",
)
pytestmark = pytest.mark.filterwarnings("ignore:.*app' is deprecated")  # between Sphinx and MyST
SCORES = {"ce": 0.4, "blv": 0.4125, "blv sigma=4": 0.5}


class Page(HTMLParser):
    """Links, resources, anchors, meta tags and text of HTML, and for each table whether it can scroll."""

    def __init__(self, html):
        super().__init__()
        self.links, self.resources, self.ids, self.meta, self.text = [], [], set(), {}, ""
        self.divs, self.scrolling = [], []
        self.feed(html)

    def handle_starttag(self, tag, attrs):
        given = dict(attrs)
        self.ids.add(given.get("id"))
        self.meta |= {given["name"]: given["content"]} if tag == "meta" and "name" in given else {}
        classes = set(given.get("class", "").split())
        self.divs += [classes] if tag == "div" else []
        if tag == "table" and "genindextable" not in classes:  # Sphinx's index breaks its lines
            self.scrolling.append(any({"cell_output", "table-wrapper"} & div for div in self.divs))
        into = self.links if tag in ("a", "form") else self.resources
        into += [given[name] for name in ("href", "src", "action", "data", "poster") if given.get(name)]

    def handle_endtag(self, tag):
        if tag == "div":
            self.divs.pop()

    def handle_data(self, data):
        self.text += data


@cache
def page(path):
    return Page(path.read_text(encoding="utf-8"))


def article(path):
    """A page without its sidebars."""
    return Page(path.read_text(encoding="utf-8").partition("<article")[2].partition("</article")[0])


def squeezed(text):
    return re.sub(r"[\s`:]", "", text)


def write(folder, name, *cells, **metadata):
    folder.mkdir(parents=True, exist_ok=True)
    metadata |= {"language_info": {"name": "python"}}
    nbformat.write(new_notebook(cells=list(cells), metadata=metadata), folder / f"{name}.ipynb")


def code(source, *outputs):
    return new_code_cell(source, execution_count=1, outputs=[new_output("display_data", data) for data in outputs])


@pytest.fixture(scope="module")
def out(tmp_path_factory):
    """A folder as `ltseg run` leaves it: two notebooks, a figure, claims and means."""
    out = tmp_path_factory.mktemp("report")
    first = (
        "# Does $\\pi_k$ matter?\n\n**Yes, by $\\frac{1}{2}$.** See [this](02_second.ipynb), [its claims]"
        "(02_second.ipynb#The-claims) and [what did not run](03_third.ipynb#The-claims).\n\n$$z_k = \\log n_k$$"
    )
    links = {"text/html": "<p>" + ", ".join(f'<a href="{link}">{link}</a>' for link in IN_HTML) + "</p>"}
    widget = {"application/vnd.jupyter.widget-view+json": {"model_id": "1"}, "text/plain": "only a widget"}
    state = {"application/vnd.jupyter.widget-state+json": {"state": {}, "version_major": 2, "version_minor": 0}}
    cells = new_markdown_cell(first), code("run('balanced_softmax')", {"image/png": PIXEL}, widget, links)
    write(out / "notebooks", "01_first", *cells, widgets=state)
    table = {"text/html": pd.DataFrame({"x": [1]}, index=["vs"]).to_html()}
    write(
        out / "notebooks",
        "02_second",
        new_markdown_cell("# What does BLV do?\n\n**It pushes.**"),
        code("t", table),
        new_markdown_cell("## The claims"),
        new_markdown_cell("#### Is π of a, b-c & d?"),
    )
    (out / "figures").mkdir()
    for kind in ("png", "pdf", "svg"):
        (out / f"figures/01_line.{kind}").write_text(f"a {kind}")
    for name, rows in BOARD.items():
        pd.DataFrame(rows, columns=report.CLAIMS).to_csv(out / f"figures/{name}.csv", index=False)
    means = [
        (m, k, v, v - 0.01, v + 0.01, 1 if m == "ce" else 3)
        for m, v in SCORES.items()
        for k in ("miou", "macc", "tail iou")
    ]
    pd.DataFrame(means, columns=report.MEANS).to_csv(out / "figures/02_means.csv", index=False)
    return out


@pytest.fixture(scope="module")
def site(out):
    with contextlib.redirect_stderr(io.StringIO()) as said:
        index = report.build(out)
    assert said.getvalue() == ""
    return index.parent


@pytest.mark.slow
def test_no_page_has_a_broken_link_or_needs_the_network(site):
    paths = list(site.rglob("*.html"))
    assert {"index.html", "claims.html", "search.html"} <= {path.name for path in paths}
    broken = []
    for path in paths:
        assert [r for r in page(path).resources if urlsplit(r).scheme not in ("", "data")] == [], path
        for link in page(path).links + page(path).resources:
            where = urlsplit(link)
            if where.scheme:  # a link to the web, or data
                continue
            assert not where.netloc, link
            target = (path.parent / unquote(where.path)).resolve() if where.path else path
            found = target.is_file() and target.is_relative_to(site)
            place = unquote(where.fragment)
            if not found or (target.suffix == ".html" and place and place not in page(target).ids):
                broken.append(f"{path.relative_to(site)}: {link}")
    assert broken == []
    styles = "".join(path.read_text() for path in site.rglob("*.css"))
    assert not re.search(r"""(url\(|@import)\s*["']?(https?:)?//""", styles)


@pytest.mark.slow
def test_links_between_notebooks_lead_to_pages_and_headings(site):
    first = article(site / "notebooks/01_first.html")
    claims = "02_second.html#the-claims"
    found = [link for link in first.links if link.startswith(("02_", "03_"))]
    assert found == ["02_second.html", claims, "02_second.html", claims, "02_second.html#is-of-a-b-c-d"]
    assert "what did not run" in first.text
    assert first.text.count("03_third.ipynb") == 2
    (download,) = (site / "_downloads").rglob("01_first.ipynb")
    assert download.read_text().count("02_second.ipynb#The-claims") == 3


@pytest.mark.slow
def test_pages_fit_a_phone_because_what_is_wide_scrolls(site):
    pages = {path: page(path) for path in site.rglob("*.html")}
    for path, made in pages.items():
        assert "width=device-width" in made.meta["viewport"], path
        assert all(made.scrolling), path
    assert sum(len(made.scrolling) for made in pages.values()) == 4  # notebook, board, two methods
    styles = "".join((site / "_static" / name).read_text() for name in ("report.css", "styles/furo.css"))
    rules = [(what.split(",")[-1].split()[-1:], rule) for what, rule in re.findall(r"([^{}]+){([^{}]*)}", styles)]
    for what, does in (
        (".cell_output", "overflow-x:auto"),
        (".table-wrapper.container", "overflow-x:auto"),
        ("img", "max-width:100%"),
    ):
        assert any(name == [what] and does in rule.replace(" ", "") for name, rule in rules), what


@pytest.mark.slow
def test_notebooks_are_shown_as_they_were_executed_with_their_files(site):
    index, first = article(site / "index.html"), article(site / "notebooks/01_first.html")
    assert "It pushes." in index.text
    assert "notebooks/01_first.html" in index.links
    html = (site / "notebooks/01_first.html").read_text().partition("<article")[2].partition("</article")[0]
    assert html.count("<math") == 3  # in the title, the answer and as a formula
    assert html.count('display="block"') == 1
    assert "only a widget" in first.text
    assert "02_second.html" in first.links
    files = {Path(link).name: (site / "notebooks" / link).read_text() for link in first.links if "_downloads" in link}
    assert files.pop("01_first.ipynb").count("balanced_softmax") == 1
    assert files.pop("01_claims.csv").endswith("X-01,+0.2,supported,scenes\n")
    assert files == {f"01_line.{kind}": f"a {kind}" for kind in ("png", "pdf", "svg")}


@pytest.mark.slow
def test_the_board_counts_the_verdicts_and_keeps_every_word(site):
    board = article(site / "claims.html")
    assert {claim.lower() for claim in analysis.claims().index} <= board.ids
    text = " ".join(board.text.split())
    assert text.count(NASTY) == 4  # twice as what was found, once as the data and beside what was found there
    for words in (
        "claims of supported contradicted open Region Rebalance 1 1 24 BLV 0 0 27",
        "where papers disagree 1 0 5",
        f"found: 01 (scenes): +0.2; 07 (camvid): {NASTY} data: scenes, camvid verdict: supported",
    ):
        assert words in text.replace("found : ", "found: ")
    pages = [link for link in board.links if "notebooks/" in link]
    second = "notebooks/02_second.html#the-claims"
    assert pages == [second, second, "notebooks/01_first.html"]


@pytest.mark.slow
def test_the_page_of_a_method_holds_its_documentation_and_options(site):
    for name in METHODS:
        described = LOSSES.get(name) or METHODS[name].build
        text = squeezed(article(site / f"methods/{name}.html").text)
        for document in (described, inspect.getmodule(described)):
            assert squeezed(inspect.getdoc(document)) in text, (name, document)
        for option in list(inspect.signature(described).parameters.values())[1:]:
            default = "" if option.default is option.empty else f"={option.default!r}"
            assert re.search(rf"{option.name}[^=]*{re.escape(squeezed(default))}", text), (name, option)


@pytest.mark.slow
def test_the_page_of_a_method_holds_its_scores_and_the_notebooks_that_name_it(site):
    texts = {name: " ".join(article(site / f"methods/{name}.html").text.split()) for name in ("ce", "blv", "vs", "pat")}
    assert (
        "method miou macc seeds blv 41.2 [40.2, 42.2] 41.2 [40.2, 42.2] 3 blv sigma=4 50.0 [49.0, 51.0]" in texts["blv"]
    )
    assert "with one seed the interval covers the test images only" in texts["ce"]
    assert "ce 40.0 [39.0, 41.0] 40.0 [39.0, 41.0] 1" in texts["ce"]
    assert "No table here has this method." in texts["pat"]
    named = {name: text.rpartition("Notebooks")[2] for name, text in texts.items()}
    assert all("What does BLV do?" in named[name] for name in ("blv", "vs"))
    assert "No notebook names it." in named["pat"]


@pytest.mark.slow
def test_a_site_that_is_up_to_date_is_left_alone(out, site, monkeypatch):
    made = (site / "index.html").stat().st_mtime_ns
    assert report.build(out) == site / "index.html"
    assert (site / "index.html").stat().st_mtime_ns == made
    monkeypatch.setattr(report, "_sphinx", lambda *_: pytest.fail("builds again"))
    (out / "figures/01_line.png").write_text("a newer png")
    with pytest.raises(pytest.fail.Exception, match="builds again"):
        report.build(out)


def test_a_folder_without_executed_notebooks_is_refused(tmp_path):
    with pytest.raises(UserError, match=r"no executed notebooks in .*notebooks: run `ltseg run --out"):
        report.build(tmp_path)


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        (
            "05_claims",
            "claim,verdict\nRR-01,open\n",
            r"05_claims\.csv lacks the column found, data",
        ),
        ("03_means", "method,miou\nce,1\n", r"03_means\.csv lacks the column metric, value, low, high, seeds"),
        ("03_means", "", r"03_means\.csv is no table"),
    ],
)
def test_a_table_that_is_none_is_refused_and_the_site_stays(tmp_path, name, text, message):
    write(tmp_path / "notebooks", "01_first", new_markdown_cell("# Why?"))
    (tmp_path / "site").mkdir()
    (tmp_path / "site/index.html").write_text("old")
    (tmp_path / "figures").mkdir()
    (tmp_path / f"figures/{name}.csv").write_text(text)
    with pytest.raises(UserError, match=message):
        report.build(tmp_path)
    assert (tmp_path / "site/index.html").read_text() == "old"
    assert {path.name for path in tmp_path.iterdir()} == {"notebooks", "figures", "site"}


@pytest.mark.parametrize("link", ["c.html", "sub/", "b.html#a", "#b", "../a.html", "a.png"])
def test_a_link_that_leads_nowhere_is_named_with_its_page(tmp_path, link):
    site = tmp_path / "site"
    good = ["b.html", "b.html#%CF%80", "sub/../a.html#a", "#", "#top", "?v=1", "https://x.org/no", "data:,x"]
    for name, links, place in (("a", good, "a"), ("b", [], "π"), ("sub/c", [], "c"), ("../a", [], "a")):
        (site / name).parent.mkdir(parents=True, exist_ok=True)
        text = f'<p id="{place}"/>' + "".join(f'<a href="{link}">x</a>' for link in links)
        (site / f"{name}.html").write_text(text, encoding="utf-8")
    report._check_links(site)
    (site / "sub/c.html").write_text(f'<img src="../b.html"><a href="{link}">x</a>')
    (site / "b.html").write_text(f'<a href="{link}">x</a>')
    with pytest.raises(UserError, match=re.escape(f"b.html links to {link}")):
        report._check_links(site)


def test_the_committed_notebooks_link_to_headings_that_are_there():
    notebooks = {path.stem: nbformat.read(path, as_version=4).cells for path in NOTEBOOKS.glob("*.ipynb")}
    texts = {n: "\n".join(c.source for c in cells if c.cell_type == "markdown") for n, cells in notebooks.items()}
    headings = {n: {report.anchor(h) for h in re.findall(r"^#+ +(.+?) *$", t, re.M)} for n, t in texts.items()}
    for name, cells in notebooks.items():
        outputs = [output.get("data", {}).get("text/html", "") for c in cells for output in c.get("outputs", [])]
        text = "\n".join([texts[name], *outputs])
        for to, place in set(re.findall(r"""["(]([\w-]+)\.ipynb(?:#([^")]+))?[")]""", text)):
            assert to in notebooks, (name, to)
            assert not place or place in headings[to], (name, to, place)


def test_without_claims_the_board_says_which_notebook_to_run():
    assert "ltseg run" in report._claims({}, {})
