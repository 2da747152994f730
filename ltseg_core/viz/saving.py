"""Figures and tables as files in one folder, where the report finds them."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any
from unittest.mock import patch

import pandas as pd

from ltseg_core.config import UserError
from ltseg_core.results import write_atomically
from ltseg_core.viz.look import DPI, style

if TYPE_CHECKING:  # matplotlib waits for the first figure
    from matplotlib.figure import Figure


def save_figure(figure: Figure, name: str, folder: str | os.PathLike[str] | None = None) -> Path:
    """Write `name`.png, .pdf and .svg into `folder` (default: $LTSEG_FIGURES, else ./figures); return the PNG.

    The layout of the figure is settled for good. Equal figures give equal bytes; an interrupted call leaves old or
    new files, never half a file.
    Raises ValueError for a name that is not one word of letters, digits, "_", "-" and "."; UserError if the
    folder cannot be written.
    """
    import matplotlib as mpl

    unnamed = {
        "svg": {"Date": None, "Creator": None},
        "pdf": {"CreationDate": None, "Creator": None, "Producer": None},
        "png": {"Software": None},
    }
    # Laid out once: with an engine each file would be drawn twice, and things move a little at every drawing.
    no_engine: dict[Any, Any] = dict.fromkeys(("figure.constrained_layout.use", "figure.autolayout"), False)
    with style(), mpl.rc_context(no_engine), _lean_fonts():
        if (engine := figure.get_layout_engine()) is not None:
            engine.execute(figure)
        figure.set_layout_engine(None)
        for kind, metadata in unnamed.items():
            _save(partial(figure.savefig, format=kind, metadata=metadata, dpi=DPI), name, kind, folder)
    return _folder(folder) / f"{name}.png"


@contextmanager
def _lean_fonts() -> Iterator[None]:
    """Without the fonts' tables that say how to set text, which it already is: they take a quarter of a PDF's time."""
    from fontTools import subset

    class Lean(subset.Options):
        def __init__(self, **options: Any) -> None:
            super().__init__(**options)
            self.drop_tables += ["GDEF", "GPOS", "GSUB"]

    with patch.object(subset, "Options", Lean):
        yield


def save_table(table: pd.DataFrame, name: str, folder: str | os.PathLike[str] | None = None) -> Path:
    """Write a table with its index as `name`.csv beside the figures; errors and safety as in `save_figure`."""
    return _save(table.to_csv, name, "csv", folder)


def saved_tables(
    pattern: str,
    folder: str | os.PathLike[str] | None = None,
    *,
    columns: Sequence[str] = (),
    dtype: type | None = None,
) -> dict[str, pd.DataFrame]:
    """Tables that `save_table` wrote under names like `*_claims`, by name.

    dtype: of all values, e.g. str; None guesses. Raises UserError for a file that is no table or lacks a column.
    """
    tables = {}
    for path in sorted(_folder(folder).glob(f"{pattern}.csv")):
        try:
            tables[path.stem] = table = pd.read_csv(path, dtype=dtype)
        except ValueError as error:
            raise UserError(f"{path} is no table ({error}): run its notebook again") from None
        if missing := [column for column in columns if column not in table]:
            raise UserError(f"{path} lacks the column {', '.join(missing)}; expected {', '.join(columns)}")
    return tables


def _folder(folder: str | os.PathLike[str] | None) -> Path:
    return Path(folder or os.environ.get("LTSEG_FIGURES") or "figures").expanduser()


def _save(write: Callable[[Path], object], name: str, kind: str, folder: str | os.PathLike[str] | None) -> Path:
    if not re.fullmatch(r"\w[\w.-]*", name):
        raise ValueError(f"a name must be letters, digits, '_', '-' and '.', got {name!r}")
    path = _folder(folder) / f"{name}.{kind}"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(path, write)
    except OSError as error:
        raise UserError(f"cannot write {path.name} to {path.parent}: {error.strerror}; set LTSEG_FIGURES") from None
    return path
