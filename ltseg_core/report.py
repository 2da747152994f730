"""The executed notebooks, the claims board and a page per method as one static site, made by Sphinx.

`build` writes a folder of sources and lets Sphinx make the pages: notebooks through myst-nb, which executes nothing,
docstrings through autodoc. The site opens from the file system, search included, and loads nothing from the network:
formulas become MathML, which browsers draw themselves. This module is also the Sphinx extension that does so.

    index.md       the question list: question and answer of every notebook
    notebooks/     the executed notebooks, each with its files to download
    claims.rst     `analysis.claims_board` of figures/*_claims.csv
    methods/       a page for every key of `METHODS`, with its rows of figures/*_means.csv (tables of `analysis.means`)
"""

from __future__ import annotations

import inspect
import os
import re
import shutil
import sys
import tempfile
import textwrap
from collections.abc import Iterable, Mapping, Sequence
from html import unescape
from html.parser import HTMLParser
from itertools import groupby
from pathlib import Path
from typing import Any, get_args
from urllib.parse import unquote, urlsplit

import nbformat
import pandas as pd
from docutils import nodes
from sphinx import addnodes
from sphinx.application import Sphinx
from sphinx.util.console import nocolor
from sphinx.util.docutils import docutils_namespace, patch_docutils
from sphinx.util.rst import escape
from sphinx.writers.html5 import HTML5Translator

from ltseg_core import __version__, analysis, viz
from ltseg_core.config import UserError
from ltseg_core.losses import LOSSES
from ltseg_core.methods import METHODS
from ltseg_core.notebook import PACKAGE, Notebook, read, write

CLAIMS = ("claim", "found", "verdict", "data")
MEANS = ("method", "metric", "value", "low", "high", "seeds")
SETTINGS = {
    "project": "ltseg",
    "html_title": f"ltseg {__version__}",
    "extensions": ["myst_nb", "sphinx.ext.autodoc", "sphinx.ext.viewcode", "ltseg_core.report"],
    "exclude_patterns": ["figures"],
    "html_theme": "furo",
    "html_css_files": ["report.css"],
    "html_static_path": ["_static"],
    "html_math_renderer": "mathml",
    "html_copy_source": False,
    "html_show_copyright": False,
    "html_show_search_summary": False,  # would read other pages, which browsers refuse for file://
    "nb_execution_mode": "off",
    "nb_ipywidgets_js": {},  # from the network; a widget shows as its text
    "nb_mime_priority_overrides": [("html", "application/vnd.jupyter.widget-view+json", None)],
    "nb_merge_streams": True,
    "myst_enable_extensions": ["amsmath", "deflist", "dollarmath"],
    "myst_heading_anchors": 6,
    "myst_heading_slug_func": "ltseg_core.report.anchor",
    "smartquotes": False,  # would change what code and formulas in docstrings say
    "suppress_warnings": ["myst.header"],  # a notebook may skip a level of headings
    "add_module_names": False,
    "maximum_signature_line_length": 40,
    "python_display_short_literal_types": True,
}
STYLE = """
article dd { margin-left: 1rem }
article .claims > dt { font-weight: bold; margin-top: 1rem }
.claims dl.field-list { display: grid; grid-template-columns: max-content 1fr }
.claims dl.field-list :is(dt, dd, p) { font-weight: normal; margin-block: 0; line-height: 1.5 }
.supported, .contradicted { font-weight: bold }
.supported { color: #1a7f5a }
.contradicted { color: #c2491d }
.highlight-text pre { font-size: 0.68rem; white-space: pre-wrap }
.cell_output pre { white-space: pre-wrap }
.cell_output { overflow-x: auto }
.cell_output table { border: 0; border-collapse: collapse; font-size: 0.8rem; width: max-content }
div.cell_output table :is(td, th) { border: 0; border-bottom: 1px solid var(--color-background-border) }
div.cell_output table :is(td, th) { max-width: 20rem; padding: 0.2rem 0.6rem; text-align: left }
.indextable { overflow-wrap: anywhere }
"""


def build(out: str | os.PathLike[str]) -> Path:
    """Make `out`/site from the executed notebooks and tables in `out`, if it is older; return its first page.

    What Sphinx warns of goes to standard error. The site is replaced when the new one is finished.
    Raises UserError if there are no executed notebooks, a table lacks a column, a link between pages leads nowhere, or
    the site cannot be written.
    """
    out = Path(out).expanduser().resolve()
    executed = [read(path) for path in sorted((out / "notebooks").glob("*.ipynb"))]
    if not executed:
        raise UserError(f"no executed notebooks in {out / 'notebooks'}: run `ltseg run --out {out}` first")
    index = out / "site" / "index.html"
    package = (path for path in PACKAGE.rglob("*") if "__pycache__" not in path.parts)  # folders too: files may go
    sources = [path for folder in ("notebooks", "figures") for path in (out / folder, *(out / folder).glob("*"))]
    if index.exists() and index.stat().st_mtime > max(p.stat().st_mtime for p in (*sources, *package) if p.exists()):
        return index
    try:
        with tempfile.TemporaryDirectory(dir=out, prefix=".site-") as scratch:
            texts, pages = Path(scratch, "sources"), Path(scratch, "pages")
            _write_sources(texts, executed, out / "figures")
            _sphinx(texts, pages, Path(scratch, "doctrees"))
            _check_links(pages)
            shutil.rmtree(out / "site", ignore_errors=True)
            os.replace(pages, out / "site")
    except OSError as error:
        raise UserError(f"cannot write {error.filename or out / 'site'}: {error.strerror}") from None
    return index


def _sphinx(sources: Path, pages: Path, doctrees: Path) -> None:
    nocolor()
    with patch_docutils(), docutils_namespace():
        Sphinx(sources, None, pages, doctrees, "html", SETTINGS, status=None, warning=sys.stderr, freshenv=True).build()


def setup(app: Sphinx) -> dict[str, Any]:
    """What the site needs of Sphinx beyond settings: MathML, links between notebooks, docstrings of this package."""
    app.add_html_math_renderer("mathml", (_mathml, None), (_mathml, None))
    app.connect("doctree-read", _link_notebooks)
    app.connect("autodoc-process-docstring", _docstring)
    return {"parallel_read_safe": True, "parallel_write_safe": True}


def _mathml(translator: HTML5Translator, node: Any) -> None:
    translator.math_output, translator.math_options = "mathml", ""
    super(HTML5Translator, translator).visit_math(node)  # docutils' own; Sphinx knows only MathJax and pictures


# --------------------------------------------------------------------------------------------------- the links


def anchor(heading: str) -> str:
    """What JupyterLab calls a heading: in Markdown, `[...](NN_name.ipynb#The-claims)` works there and on the site."""
    return heading.replace(" ", "-")


def _link_notebooks(app: Sphinx, doctree: nodes.document) -> None:
    """HTML outputs link to pages where they link to notebooks; a link to a notebook that has not run is plain text."""

    def page(link: re.Match[str]) -> str:
        place = "#" + nodes.make_id(unescape(unquote(link[3]))) if link[3] else ""
        return f' href="{link[2]}.html{place}"' if f"notebooks/{link[2]}" in app.env.found_docs else ""

    for html in doctree.findall(nodes.raw):
        html[:] = [nodes.Text(re.sub(r"""\s+href=(["'])([\w-]+)\.ipynb(?:#(.*?))?\1""", page, html.astext()))]
    for link in list(doctree.findall(addnodes.pending_xref)):
        if re.fullmatch(r"[\w-]+\.ipynb(#.*)?", link["reftarget"]):  # MyST found no such file
            link.replace_self(link.children)


class _Page(HTMLParser):
    """What a page links to and what links can lead to."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.links: list[str] = []
        self.ids: set[str | None] = {"", "top"}
        self.feed(path.read_text(encoding="utf-8"))

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.links += [value for name, value in attrs if value and name in ("href", "src", "action", "data", "poster")]
        self.ids |= {value for name, value in attrs if name in ("id", "name")}


def _check_links(site: Path) -> None:
    """Raises UserError if a file or place within the site is linked to that is not there."""
    pages = {path: _Page(path) for path in site.rglob("*.html")}
    broken = []
    for path, page in pages.items():
        for link in dict.fromkeys(page.links):
            where = urlsplit(link)
            target = Path(os.path.normpath(path.parent / unquote(where.path))) if where.path else path
            there = target.is_file() and target.is_relative_to(site)
            there = there and (target not in pages or unquote(where.fragment) in pages[target].ids)
            if not (where.scheme or where.netloc or there):
                broken.append(f"{path.relative_to(site)} links to {link}")
    if broken:
        raise UserError("the site is not replaced, for links lead nowhere: " + "; ".join(sorted(broken)))


# ------------------------------------------------------------------------------------------------- the sources


def _write_sources(folder: Path, executed: Sequence[Notebook], figures: Path) -> None:
    if figures.is_dir():
        shutil.copytree(figures, folder / "figures")
    write(folder / "_static" / "report.css", STYLE)
    for notebook in executed:
        nb = nbformat.read(notebook.path, as_version=4)
        nb.cells.append(nbformat.v4.new_markdown_cell(_downloads(notebook, figures)))
        write(folder / "notebooks" / notebook.path.name, nbformat.writes(nb))
    write(folder / "index.md", _index(executed))
    texts = {n.name: _text(n) for n in executed}
    claims = viz.saved_tables("*_claims", figures, columns=CLAIMS, dtype=str)
    write(folder / "claims.rst", _claims(claims, texts))
    means = viz.saved_tables("*_means", figures, columns=MEANS)
    write(folder / "methods" / "index.rst", _method_list())
    for name in METHODS:
        write(folder / "methods" / f"{name}.rst", _method(name, means, texts))


def _downloads(notebook: Notebook, figures: Path) -> str:
    """The last cell of a notebook's page: the notebook and what it saved, as files (Markdown)."""
    files: dict[str, list[str]] = {notebook.name: [f"{{download}}`notebook <{notebook.path.name}>`"]}
    for path in sorted(figures.glob(f"{notebook.name[:2]}_*.*")):
        link = f"{{download}}`{path.suffix[1:].upper()} </figures/{path.name}>`"
        files.setdefault(path.stem, []).append(link)
    return "\n".join(["## Files", "", *(f"- {stem}: {', '.join(links)}" for stem, links in files.items())])


def _index(executed: Iterable[Notebook]) -> str:
    questions = "\n".join(f"[{n.question}](notebooks/{n.path.name})\n: {n.answer or '…'}\n" for n in executed)
    toctree = "```{{toctree}}\n:hidden:\n:caption: {}\n\n{}\n```\n"
    names = "\n".join(f"notebooks/{n.name}" for n in executed)
    return f"""# Long-tailed semantic segmentation

Five papers and their baselines under one protocol. Each question is answered by one executed notebook, with its code;
[](claims.rst) sets the papers' numbers beside ours, and [](methods/index.rst) says what each method computes.

{questions}
{toctree.format("Questions", names)}
{toctree.format("Answers", "claims" + chr(10) + "methods/index")}"""


# ------------------------------------------------------------------------- claims and methods, reStructuredText


def _claims(tables: Mapping[str, pd.DataFrame], texts: Mapping[str, str]) -> str:
    """The claims board: how the verdicts fall, then every claim under its paper. texts: of the notebooks, by name"""
    if not tables:
        return _title("Claims") + "No claim is judged here yet: run the notebooks (``ltseg run``), then report again."
    board = analysis.claims_board(tables)
    judging = re.compile("^## The claims$", re.MULTILINE)
    places = {name: "#the-claims" if judging.search(text) else "" for name, text in texts.items()}
    pages = {name[:2]: f"`{name} <notebooks/{name}.html{place}>`__" for name, place in places.items()}
    paper = board["paper"].rename("claims of")
    verdicts = list(get_args(analysis.Verdict))
    text = [
        _title("Claims"),
        "What the papers say, in our words and with their numbers, and what was found here, notebook by notebook. A"
        " verdict is computed from the interval of a difference; *open* means that it decides nothing, or that"
        " something is missing to test it.",
        "",
        *(f".. role:: {verdict}" for verdict in verdicts),
        "",
        _table(
            pd.crosstab(paper, board["verdict"]).reindex(paper.unique(), columns=verdicts, fill_value=0).reset_index()
        ),
    ]
    for name, claims in board.groupby(paper, sort=False):
        text += [_title(str(name), "-"), ".. rst-class:: claims\n"]
        for claim, row in claims.iterrows():
            fields = {field: _plain(row[field]) for field in ("published", "found", "data")}
            fields["verdict"] = f":{row['verdict']}:`{row['verdict']}`"
            fields["notebooks"] = ", ".join(pages.get(n, n) for n in row["notebooks"].split(", "))
            text += [f"_`{claim}` {_plain(row['statement'])}"]
            text += [f"    :{field}: {value}" for field, value in fields.items() if value] + [""]
    return "\n".join(text)


def _method_list() -> str:
    """The page that lists the methods by kind, with the first words of their documentation."""
    text = [_title("Methods")]
    kinds = pd.Series({name: _kind(name) for name in METHODS})
    for kind, names in kinds.groupby(kinds, sort=False):
        text += [_title(str(kind), "-"), *(f":doc:`{name}`\n    {_summary(name)}\n" for name in names.index)]
    return "\n".join([*text, ".. toctree::", "    :hidden:", "", *(f"    {name}" for name in METHODS), ""])


def _kind(name: str) -> str:
    if name in LOSSES:
        return "Pixel losses for the whole network"
    return "Corrections of a finished network" if METHODS[name].first else "Other ways to train the whole network"


def _documented(name: str) -> tuple[Any, str]:
    """What documents a method, its loss or the function that builds its stages, and the docstring of its module."""
    described = LOSSES.get(name) or METHODS[name].build
    return described, inspect.getdoc(inspect.getmodule(described)) or ""


def _summary(name: str) -> str:
    """The first paragraph of a method's documentation; that of the module for a function just called `build`."""
    described, module = _documented(name)
    text = module if described.__name__ == "build" else inspect.getdoc(described) or ""
    return _escaped(" ".join(text.split("\n\n")[0].split()))


def _method(name: str, means: Mapping[str, pd.DataFrame], texts: Mapping[str, str]) -> str:
    """The page of a method: its documentation, its rows of the tables, the notebooks that name it."""
    described, module = _documented(name)
    method, label = METHODS[name], viz.method_style(name).label
    command = f"``ltseg train --method {name}`` trains it."
    if method.first:
        command += (
            f" It starts from the finished run of ``{method.first}``, or of the method that a hyper-parameter ``first``"
            f" names, and " + (f"adds {method.length:.0%} of its steps." if method.length else "takes no step.")
        )
    if method.unlabelled:
        command += " It needs images without labels, e.g. ``-p labelled_images=50 -p ema_decay=0.98``."
    directive = "autoclass" if inspect.isclass(described) else "autofunction"
    signature = f"{command}\n\n.. {directive}:: {described.__module__}.{described.__qualname__}\n"
    parts = [signature, _title("Notation", "-"), _prose(module)]
    if described.__name__ == "build":
        parts = [_prose(module), signature]
    scores = {
        study: table[(table["method"].str.partition(" ")[0] == name) & table["metric"].isin(["miou", "macc"])]
        for study, table in means.items()
    }
    results = [_scores(study, own) for study, own in scores.items() if len(own)]
    mentioned = re.compile(rf"""["'`>]{name}(?= \w+=|["'`<])|\b{re.escape(label)}\b""")
    notebooks = [f"* :doc:`/notebooks/{notebook}`" for notebook, text in texts.items() if mentioned.search(text)]
    parts += [_title("Results", "-"), *(results or ["No table here has this method.\n"])]
    parts += [_title("Notebooks", "-"), *(notebooks or ["No notebook names it."]), ""]
    return "\n".join([_title(_plain(label)), *parts])


def _scores(study: str, rows: pd.DataFrame) -> str:
    """A method's rows of a table of `analysis.means`, with the number of seeds that each interval covers."""
    seeds = rows.groupby("method")["seeds"].first()
    return (
        f"From ``{study}``, in percent with 95 % intervals over test images and seeds; with one seed the interval"
        f" covers the test images only.\n\n{_table(analysis.readable(rows).join(seeds).reset_index())}"
    )


def _prose(text: str) -> str:
    """The docstring of a module: what is indented keeps its lines."""
    blocks: list[str] = []
    for indented, lines in groupby(text.splitlines(), key=lambda line: line.startswith(" ")):
        block = "\n".join(lines)
        blocks.append(f"\n.. code-block:: text\n\n{block}\n" if indented else _escaped(block))
    return "\n".join([*blocks, ""])


def _text(notebook: Notebook) -> str:
    """Sources and HTML tables of an executed notebook."""
    cells = nbformat.read(notebook.path, as_version=4).cells
    tables = [o.get("data", {}).get("text/html", "") for cell in cells for o in cell.get("outputs", [])]
    return "\n".join([cell.source for cell in cells] + tables)


def _title(text: str, line: str = "=") -> str:
    return f"{text}\n{line * len(text)}\n"


def _table(table: pd.DataFrame) -> str:
    cells = table.map(_plain).to_csv(index=False)
    return ".. csv-table::\n    :header-rows: 1\n\n" + textwrap.indent(cells, "    ")


def _plain(value: Any) -> str:
    return escape(" ".join(str(value).split()))


def _escaped(text: str) -> str:
    """Plain text of a docstring; what stands between backticks is code."""
    parts = re.split(r"(`[^`]+`)", text)
    return "".join(f"`{part}`" if part.startswith("`") else escape(part) for part in parts)


def _docstring(app: Sphinx, what: str, name: str, described: Any, options: Any, lines: list[str]) -> None:
    """A docstring of this package as reStructuredText: `option: what it does` is an entry of a list, all else prose."""
    known, text, inside = inspect.signature(described).parameters, [], False
    for line in lines:
        option = re.match(r"(\w+(?:, \w+)*): +(?=\S)", line)
        if option and known.keys() >= set(option[1].split(", ")):
            text += ["", f"``{option[1]}``", "    " + _escaped(line[option.end() :])]
            inside = True
        elif inside and line.startswith(" "):
            text.append("    " + _escaped(line.strip()))
        else:
            text += [""] * inside + [_escaped(line.strip())]
            inside = False
    lines[:] = text
