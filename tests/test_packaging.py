"""The repository as a whole: one set of dependencies, a layered package, a light start, clean committed files."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
import tomllib
from functools import cache
from pathlib import Path

import pytest
import yaml
from packaging.markers import Marker
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

import ltseg_core

ROOT = Path(__file__).resolve().parents[1]
CONDA_NAMES = {"torch": "pytorch", "matplotlib": "matplotlib-base", "seaborn": "seaborn-base", "dask": "dask-core"}
# A module imports only from rows above its own.
ROWS = [
    "config",
    "data",
    "stats",
    "metrics",
    "losses",
    "networks",
    "models",
    "methods",
    "evaluate",
    "features",
    "notebook",
    "results",
    "parallel",
]
ROWS += ["self_training", "train", "cost", "analysis", "viz", "explorer", "collection", "redraw", "report", "cli"]
PLATFORMS = [
    {"python_version": f"3.{minor}", "python_full_version": f"3.{minor}.7", "sys_platform": system, "os_name": name}
    for minor in (11, 12, 13, 14)
    for system, name in (("linux", "posix"), ("darwin", "posix"), ("win32", "nt"))
]

# ------------------------------------------------------------------------------------------- dependencies


@cache
def pyproject() -> dict:
    return tomllib.loads((ROOT / "pyproject.toml").read_text())


@cache
def direct() -> dict[str, Requirement]:
    """What pyproject.toml asks for, development included, by canonical name."""
    project = pyproject()["project"]
    wanted = map(Requirement, project["dependencies"] + project["optional-dependencies"]["dev"])
    return {canonicalize_name(r.name): r for r in wanted}


def locked(name: str = "requirements.lock") -> list[tuple[Requirement, list[str], str]]:
    """(requirement, hashes, comment) of every entry of a lock file; refuses every other kind of line."""
    entries = []
    for block in re.split(r"\n(?=[^\s#])", (ROOT / name).read_text().strip()):
        comment = "".join(re.findall(r"^ +#(.*)$", block, re.MULTILINE))
        line = re.sub(r"^ +#.*$", "", block, flags=re.MULTILINE).replace("\\\n", " ")
        requirement, *hashes = re.split(r"\s+--hash=", line.strip())
        entries.append((Requirement(requirement), hashes, comment))
    return entries


@pytest.mark.parametrize("name", ["requirements.lock", "requirements-uv.lock"])
def test_the_lock_pins_one_version_with_hashes_and_names_no_host(name):
    assert "://" not in (ROOT / name).read_text()
    for requirement, hashes, _ in locked(name):
        assert re.fullmatch(r"==[^*,]+", str(requirement.specifier)), f"{requirement} is not pinned"
        assert requirement.url is None
        assert hashes, f"{requirement.name} has no hash"
        assert all(re.fullmatch(r"sha256:[0-9a-f]{64}", h) for h in hashes), requirement.name


@pytest.mark.parametrize("name", sorted(direct()))
def test_the_lock_satisfies_every_dependency_on_every_platform(name):
    entries = [r for r, _, _ in locked() if canonicalize_name(r.name) == name]
    for entry in entries:
        version = str(entry.specifier).removeprefix("==")
        assert direct()[name].specifier.contains(version), f"{entry} against {direct()[name]}: run `make lock`"
    for platform in PLATFORMS:
        applicable = [e for e in entries if (e.marker or Marker("python_version > '3'")).evaluate(platform)]
        assert len(applicable) == 1, f"{name} on {platform}: {applicable}"


def test_the_lock_was_made_from_these_dependencies():
    asked = {canonicalize_name(r.name) for r, _, comment in locked() if "ltseg (pyproject.toml)" in comment}
    assert asked == set(direct()), "run `make lock`"


def test_the_conda_environment_holds_the_same_packages_with_the_same_bounds():
    environment = yaml.safe_load((ROOT / "environment.yml").read_text())
    assert environment["channels"] == ["conda-forge", "nodefaults"]
    *conda, last = environment["dependencies"]
    assert set(last) == {"pip"}
    *from_pip, project = last["pip"]
    assert project == "-e ."
    python, pip = conda[:2]
    assert python == "python" + pyproject()["project"]["requires-python"]
    assert pip == "pip"
    back = {conda_name: name for name, conda_name in CONDA_NAMES.items()}
    stated = [Requirement(text) for text in conda[2:] + from_pip]
    bounds = {canonicalize_name(back.get(r.name, r.name)): r.specifier for r in stated}
    assert len(bounds) == len(stated), "a package is listed twice"
    assert bounds == {name: r.specifier for name, r in direct().items()}


def test_one_version_everywhere():
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert citation["version"] == pyproject()["project"]["version"] == ltseg_core.__version__
    assert len(citation["references"]) == 5
    assert all(paper["title"] and paper["authors"] and paper["year"] for paper in citation["references"])


# ---------------------------------------------------------------------------------------------- the package


def modules(package: str) -> list[Path]:
    return sorted((ROOT / package).rglob("*.py"))


def imported(tree: ast.AST) -> set[str]:
    """Dotted names of all imports, also those inside functions; `from a import b` counts as a.b."""
    names = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, f"relative import in line {node.lineno}"
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    return names


@pytest.mark.parametrize("path", modules("ltseg_core"), ids=lambda p: str(p.relative_to(ROOT)))
def test_a_module_imports_only_from_rows_above_it(path):
    own = path.relative_to(ROOT / "ltseg_core").parts[0].removesuffix(".py")
    names = imported(ast.parse(path.read_text()))
    assert not [n for n in names if n.split(".")[0] == "data_prep"]
    if own == "__init__":
        assert not [n for n in names if n.startswith("ltseg_core")]
        return
    assert own in ROWS, f"give {own} a row here and in docs/architecture.md"
    parts = {n.split(".")[1] for n in names if n.startswith("ltseg_core.")} & set(ROWS) - {own}
    assert parts <= set(ROWS[: ROWS.index(own)]), f"{own} imports from below: {parts - set(ROWS[: ROWS.index(own)])}"


def test_the_architecture_page_describes_every_module():
    page = (ROOT / "docs" / "architecture.md").read_text()
    own = {p.relative_to(ROOT / "ltseg_core").parts[0].removesuffix(".py") for p in modules("ltseg_core")}
    assert not [name for name in own - {"__init__"} if not re.search(rf"^\| `{name}(\.py|/)`", page, re.MULTILINE)]


@pytest.mark.parametrize("path", modules("ltseg_core") + modules("data_prep"), ids=lambda p: str(p.relative_to(ROOT)))
def test_everything_public_has_a_docstring(path):
    tree = ast.parse(path.read_text())
    assert ast.get_docstring(tree), "the module has no docstring"
    kinds = (ast.FunctionDef, ast.ClassDef)
    public = [n for n in tree.body if isinstance(n, kinds) and not n.name.startswith("_")]
    assert [n.name for n in public if not ast.get_docstring(n)] == []


def loaded_by(code: str, heavy: str) -> str:
    """Those of the modules `heavy` that a new interpreter has loaded after `code`."""
    code += f"\nimport sys\nprint('loaded:', *[m for m in {heavy.split()} if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    return done.stdout.rpartition("loaded:")[2].strip()


def test_importing_the_whole_package_loads_no_model_library():
    names = [".".join(p.relative_to(ROOT).with_suffix("").parts) for p in modules("ltseg_core")]
    code = "import " + ", ".join(n.removesuffix(".__init__") for n in names)
    heavy = "segmentation_models_pytorch timm torchvision torchmetrics accelerate tensorboard papermill"
    assert loaded_by(code, heavy) == ""


def test_help_loads_no_numerical_library():
    code = (
        "import sys; sys.argv = ['ltseg', '--help']\nfrom ltseg_core.cli import main\n"
        "try: main()\nexcept SystemExit as end: assert not end.code"
    )
    assert loaded_by(code, "torch numpy pandas matplotlib scipy sklearn") == ""


# ------------------------------------------------------------------------------------------ committed files


@cache
def tracked() -> list[Path]:
    if not (ROOT / ".git").exists():
        pytest.skip("not a git clone")
    names = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    return [path for name in names.split("\0") if name and (path := ROOT / name).is_file()]


def test_committed_files_name_no_path_or_package_host_of_a_machine():
    folders = "|".join(["work", "tmp", "root", "home", "Users", "opt"])
    hosts = "|".join(["pypi", "pythonhosted", "anaconda", "npmjs", "download.pytorch"])
    wrong = re.compile(rf"(?<![\w.~/)}}\]-])/(?:{folders})/\w|\b(?:{hosts})\.(?:org|com)\b")
    assert wrong.search(" /" + "tmp/x")
    found = []
    for path in tracked():
        try:
            text = path.read_text(encoding="utf-8")
        except UnicodeDecodeError:
            continue  # a picture
        found += [f"{path.relative_to(ROOT)}: {match[0]}" for match in wrong.finditer(text)]
    assert found == []


def test_committed_files_are_small():
    bytes_ = {path: path.stat().st_size for path in tracked()}
    large = [path for path, size in bytes_.items() if size > (500_000 if path.suffix == ".ipynb" else 1_000_000)]
    assert large == []
