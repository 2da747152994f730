"""One notebook as a file: what it asks, its parameters and source hash, its committed copy."""

from __future__ import annotations

import ast
import base64
import contextlib
import hashlib
import io
import json
import os
import re
import sys
import tempfile
import traceback
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ltseg_core.config import UserError

PACKAGE = Path(__file__).resolve().parent
ADDED_BY_PAPERMILL = {"injected-parameters", "papermill-error-cell-tag"}


@dataclass(frozen=True)
class Notebook:
    """A numbered notebook of the collection, as its file says."""

    name: str
    path: Path
    question: str
    """The first heading."""
    answer: str
    """The first words in bold: how the first paragraph answers."""
    needs: tuple[str, ...]
    """Names of the notebooks that run before it: `{"ltseg": {"needs": [...]}}` in the notebook's metadata."""
    parameters: Mapping[str, Any] | None
    """Default values by name; None if no cell has the tag `parameters`."""


def read(path: Path) -> Notebook:
    """The notebook at `path`. Raises UserError if it is none, or one of its parameters is no plain literal."""
    nb = _load(path)
    text = "\n".join("".join(c["source"]) for c in nb["cells"] if c["cell_type"] == "markdown")
    heading = re.search(r"^#+\s+(.+?)\s*$", text, re.MULTILINE)
    bold = re.search(r"\*\*(.+?)\*\*", text, re.DOTALL)
    tagged = [c for c in nb["cells"] if "parameters" in c["metadata"].get("tags", [])]
    return Notebook(
        name=path.stem,
        path=path.resolve(),
        question=heading[1] if heading else path.stem,
        answer=" ".join(bold[1].split()) if bold else "",
        needs=tuple(nb["metadata"].get("ltseg", {}).get("needs", ())),
        parameters=_literals(path, "".join(tagged[0]["source"])) if tagged else None,
    )


def _load(path: Path) -> dict[str, Any]:
    # Plain JSON: importing nbformat costs half a second, and most calls only ask what is up to date.
    try:
        nb = json.loads(path.read_text(encoding="utf-8"))
        if nb["nbformat"] != 4 or not isinstance(nb["cells"], list):
            raise KeyError
        return nb
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from None
    except (ValueError, KeyError, TypeError):
        raise UserError(f"{path} is not a notebook of format 4: open and save it in JupyterLab") from None


def _literals(path: Path, source: str) -> dict[str, Any]:
    values: dict[str, Any] = {}
    try:
        for node in ast.parse(source).body:
            if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name):
                values[node.targets[0].id] = ast.literal_eval(node.value)
            elif isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name) and node.value:
                values[node.target.id] = ast.literal_eval(node.value)
    except (ValueError, SyntaxError) as error:
        raise UserError(f"{path}: the parameters cell must hold plain literals only ({error})") from None
    return values


def source_hash(notebook: str | os.PathLike[str] | Mapping[str, Any]) -> str:
    """SHA-256 of type, source and tags of all cells but those that papermill adds."""
    nb = notebook if isinstance(notebook, Mapping) else _load(Path(notebook))
    return hashlib.sha256(json.dumps(_own_cells(nb)).encode()).hexdigest()


def code_as_run(notebook: Notebook, profile: str) -> list[str]:
    """The code cells as a kernel runs them, with the one that papermill adds below those of parameters, to the letter:
    `results.remembered` knows a kernel by the cells that it ran.
    """
    code = []
    for kind, source, tags in _own_cells(_load(notebook.path)):
        if kind == "code" and source.strip():
            code.append(source)
            if "parameters" in tags and "profile" in (notebook.parameters or {}):
                code.append(f'# Parameters\nprofile = "{profile}"\n')
    return code


def _own_cells(nb: Mapping[str, Any]) -> list[tuple[str, str, list[str]]]:
    """Type, source and tags of all cells but those that papermill adds."""
    cells = [(c["cell_type"], "".join(c["source"]), sorted(c["metadata"].get("tags", []))) for c in nb["cells"]]
    return [cell for cell in cells if not ADDED_BY_PAPERMILL.intersection(cell[2])]


@contextlib.contextmanager
def text_check() -> Iterator[None]:
    """The asserts under it state what the text says of the default run: `with notebook.text_check(): assert ...`.

    Prints that they hold. An AssertionError becomes a notice under the cell, and the notebook goes on: on another
    processor the last bits of a training differ, and with them its numbers. `ltseg run` repeats the notice, and
    `publish` refuses the notebook.
    """
    try:
        yield
        print("the text agrees with the tables")
    except AssertionError as error:
        from IPython.display import Markdown, display

        line = traceback.extract_tb(error.__traceback__)[-1].line
        found = str(error).partition("\n")[0] or f"`{line}` does not hold"
        notice = Markdown(
            f"**The text was written for other numbers:** {found}. The tables and figures are this run's."
        )
        display(notice, metadata={"ltseg": {"text_differs": found}})


def text_differs(nb: Mapping[str, Any]) -> str | None:
    """The first notice of `text_check` in an executed notebook."""
    outputs = (output for cell in nb["cells"] for output in cell.get("outputs", []))
    notices = (output.get("metadata", {}).get("ltseg", {}).get("text_differs") for output in outputs)
    return next(filter(None, notices), None)


def _unchecked(nb: Mapping[str, Any]) -> bool:
    """Whether a cell of an executed notebook has a `text_check` that was not entered: it would have said something."""
    return any("text_check()" in "".join(c["source"]) and not c["outputs"] for c in nb["cells"] if "outputs" in c)


def package_hash(package: Path = PACKAGE) -> str:
    """SHA-256 of all files of a package."""
    files = [p for p in sorted(package.rglob("*")) if p.is_file() and "__pycache__" not in p.parts]
    hashes = [(p.relative_to(package).as_posix(), hashlib.sha256(p.read_bytes()).hexdigest()) for p in files]
    return hashlib.sha256(json.dumps(hashes).encode()).hexdigest()


def publish(executed: str | os.PathLike[str], target: str | os.PathLike[str]) -> None:
    """Write the executed notebook to `target` (the copy in the repository) as a reader should get it.

    Removes what papermill added and everything that differs between two machines, counts the cells anew and
    stores the hash of the source and the seconds the execution took.
    Raises UserError if the notebook failed, was run with parameters that are not its defaults, was edited since, says
    what its tables do not, or does not check what it says, or prints a path of this machine.
    """
    import nbformat

    nb = nbformat.read(executed, as_version=4)
    run_with, defaults = nb.metadata.get("papermill", {}).get("parameters", {}), read(Path(executed)).parameters
    changed = {name: value for name, value in run_with.items() if value != _jsonable((defaults or {}).get(name))}
    if changed:
        raise UserError(f"{executed} ran with {changed}: publish a run with the default parameters")
    if Path(target).exists() and source_hash(target) != source_hash(nb):
        raise UserError(f"{target} was edited since {executed} was run: run it again")
    if found := text_differs(nb):
        raise UserError(f"the text of {target} was written for other numbers ({found}): correct it and run it again")
    if _unchecked(nb):
        raise UserError(
            f"a text_check of {executed} was not reached with the default parameters: correct its condition"
        )
    nb.cells = [c for c in nb.cells if not ADDED_BY_PAPERMILL.intersection(c.metadata.get("tags", []))]
    machine = [str(p) for p in (Path.cwd(), Path.home(), tempfile.gettempdir(), sys.prefix) if len(str(p)) > 1]
    for count, cell in enumerate((c for c in nb.cells if c.cell_type == "code" and c.source.strip()), start=1):
        if cell.execution_count is None or any(o.output_type == "error" for o in cell.outputs):
            raise UserError(f"{executed}: code cell {count} failed or was not run")
        cell.execution_count = count
        for output in cell.outputs:
            if "image/png" in output.get("data", {}):
                output.data["image/png"] = _smaller_png(output.data["image/png"])
            if "execution_count" in output:
                output.execution_count = count
            texts = [v for mime, v in output.get("data", {}).items() if mime.startswith(("text/", "image/svg"))]
            for path in machine:
                if any(path in text for text in [output.get("text", ""), *texts]):
                    raise UserError(f"{executed}: code cell {count} prints {path}, a path of this machine")
    for cell in nb.cells:
        for key in ("papermill", "execution", *([] if cell.metadata.get("tags") else ["tags"])):
            cell.metadata.pop(key, None)
    seconds = nb.metadata.get("papermill", {}).get("duration", 0)
    for key in ("papermill", "widgets"):
        nb.metadata.pop(key, None)
    nb.metadata.kernelspec = {"name": "python3", "display_name": "Python 3", "language": "python"}
    nb.metadata.language_info = {"name": "python"}
    nb.metadata.ltseg = {
        **nb.metadata.get("ltseg", {}),
        "source_sha256": source_hash(nb),
        "wall_s": round(seconds),
    }
    write(Path(target), nbformat.writes(nb) + "\n")


def _smaller_png(encoded: str) -> str:
    """An opaque picture packed tightly, both base64: plots (few shades) in 256 colours, photographs without loss."""
    from PIL import Image

    with Image.open(io.BytesIO(base64.b64decode(encoded))) as picture:
        if picture.mode != "RGBA" or picture.getchannel("A").getextrema() != (255, 255):
            return encoded
        plain = picture.convert("RGB")
    if plain.getcolors(1024) is not None:
        plain = plain.quantize(256, dither=Image.Dither.NONE)
    packed = io.BytesIO()
    plain.save(packed, "PNG", optimize=True)
    return min(base64.b64encode(packed.getvalue()).decode(), encoded, key=len)


def _jsonable(value: Any) -> Any:
    return json.loads(json.dumps(value))


def check_published(notebook: str | os.PathLike[str]) -> str | None:
    """What is wrong with a committed notebook, in one sentence; None if it is as `publish` left it."""
    nb = _load(Path(notebook))
    stored = nb["metadata"].get("ltseg", {}).get("source_sha256")
    code = [c for c in nb["cells"] if c["cell_type"] == "code" and "".join(c["source"]).strip()]
    if stored is None or any(c.get("execution_count") is None for c in code):
        return f"{notebook} was never run and published, or its outputs were stripped"
    if stored != source_hash(nb):
        return f"{notebook} was edited since it was run"
    return f"{notebook} has a text_check that was not reached" if _unchecked(nb) else None


def write(path: Path, text: str) -> None:
    """Whatever interrupts it, `path` holds the old or the new text. Raises UserError, e.g. on a full disk."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary.write_text(text, encoding="utf-8")
        os.replace(temporary, path)
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror}") from None
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
