"""From a public repository to a checked folder of data: download, verify, convert, count, move into place.

Everything happens in `ROOT/.data_prep/NAME/`, so `ROOT/NAME` is absent or complete. A killed run goes on
where it stopped: the download by its `.part`, the conversion by the files already written (each atomically).
"""

from __future__ import annotations

import csv
import hashlib
import io
import json
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import filelock
import numpy as np
from PIL import Image
from tqdm import tqdm

from data_prep.download import archive_files, blob_id, download, remove, verify_archive, write_atomically
from ltseg_core.config import UserError

HERE = Path(__file__).parent
ARCHIVES = "https://codeload.github.com"
FILES = "https://raw.githubusercontent.com"
AGAIN = "run the command again, or take another mirror with --base-url"
SUFFIXES = {"images": ".jpg", "labels": ".png"}


@dataclass(frozen=True, kw_only=True)
class ImageSet:
    """Images and label maps in one public repository."""

    name: str
    repository: str
    """`owner/name` on GitHub."""
    commit: str
    trees: Mapping[str, str]
    """Folder in the repository -> its git tree id; together they hold every source file."""
    splits: Mapping[str, Sequence[str]]
    """Split -> stems."""
    paths: Callable[[str, str], tuple[str, str]]
    """(split, stem) -> paths of image and label in the repository."""
    encode_image: Callable[[bytes], bytes]
    """Source file -> JPEG file."""
    decode_label: Callable[[bytes], np.ndarray]
    """Source file -> (H, W) uint8 class indices."""
    palette: Sequence[int]
    """r, g, b, r, g, b, ... of the label PNGs; cosmetic."""
    expected: Mapping[str, Any]
    """The content of stats.json: `classes`, and per split `images`, `pixels`, `images_with_class`."""
    readme: str


@dataclass(frozen=True, kw_only=True)
class TableSet:
    """Tables computed from small files of public repositories."""

    name: str
    blobs: Mapping[str, str]
    """`owner/repository/commit/path` of a file on GitHub -> its git blob id."""
    build: Callable[[Mapping[str, bytes]], Mapping[str, bytes]]
    """Source files, by the same keys -> finished files by name."""
    columns: Mapping[str, Sequence[str]]
    """Finished CSV -> its columns under checksum."""
    sha256: Mapping[str, str]
    """Finished CSV -> SHA-256 of these columns, comma-separated, one row a line, without header."""
    readme: str


def csv_bytes(columns: Sequence[str], rows: Iterable[Sequence[object]]) -> bytes:
    """A CSV file with a header."""
    table = io.StringIO(newline="")
    csv.writer(table).writerows([columns, *rows])
    return table.getvalue().encode()


def read_expected(name: str) -> dict[str, Any]:
    """The committed counts of a data set, equal to its stats.json."""
    return json.loads((HERE / "expected" / f"{name}.json").read_text())


def read_split(name: str, split: str) -> list[str]:
    """The stems of a committed split list; lines that start with # say where it comes from."""
    lines = (HERE / "splits" / f"{name}_{split}.txt").read_text().splitlines()
    return [line for line in lines if not line.startswith("#")]


def prepare_images(spec: ImageSet, root: Path, *, base_url: str | None = None, keep_archive: bool = False) -> str:
    """Install an image set as ROOT/NAME/{train,val,test}/{images,labels}; returns one line on what was done.

    Raises UserError as `download` and `verify_archive` do, for a file that cannot be decoded, and for
    counts that differ from the expected ones (naming split and class); then nothing is installed.
    """
    targets = {
        path: f"{split}/{kind}/{stem}{suffix}"
        for split, stems in spec.splits.items()
        for stem in stems
        for path, (kind, suffix) in zip(spec.paths(split, stem), SUFFIXES.items(), strict=True)
    }

    def build(work: Path, folder: Path) -> None:
        archive = work / f"{spec.name}.tar.gz"
        download(f"{base_url or ARCHIVES}/{spec.repository}/tar.gz/{spec.commit}", archive)
        try:
            verify_archive(archive, spec.trees, targets)
        except UserError as error:
            remove(archive)
            raise UserError(f"{error}. It was deleted and nothing was installed: {AGAIN}") from None
        with tqdm(total=len(targets), desc=f"convert {spec.name}", unit="file", disable=None) as bar:
            for path, content in archive_files(archive, targets.__contains__):
                _convert(spec, path, content, folder / targets[path])
                bar.update()
        write_atomically(folder / "stats.json", json.dumps(spec.expected, indent=1).encode())
        write_atomically(folder / "README.md", spec.readme.encode())

    done = install(spec.name, root, build, lambda folder: check_images(spec, folder), keep=keep_archive)
    sizes = ", ".join(f"{len(stems)} {split}" for split, stems in spec.splits.items())
    return f"{done}: {sizes} images; every class count is as expected"


def _convert(spec: ImageSet, source: str, content: bytes, target: Path) -> None:
    """Write the image or label map `target` unless a former run has."""
    if target.exists():
        return
    try:
        if target.parent.name == "images":
            encoded = spec.encode_image(content)
        else:
            label = spec.decode_label(content)
            if label.dtype != np.uint8 or label.ndim != 2:
                raise ValueError(f"a label map is (H, W) uint8, this is {label.shape} {label.dtype}")
            encoded = encode_label(label, spec.palette)
    except (OSError, ValueError, TypeError, KeyError, SyntaxError) as error:  # what decoders raise
        raise UserError(f"{source} of {spec.repository} cannot be read: {error}") from None
    write_atomically(target, encoded)


def encode_label(label: np.ndarray, palette: Sequence[int]) -> bytes:
    """(H, W) uint8 class indices -> palette PNG."""
    image = Image.fromarray(label)
    image.putpalette(list(palette))
    file = io.BytesIO()
    image.save(file, "PNG", optimize=True)
    return file.getvalue()


def encode_jpeg(image: Image.Image, *, quality: int, subsampling: str) -> bytes:
    """Progressive JPEG; subsampling is "4:4:4" or "4:2:0"."""
    file = io.BytesIO()
    options: dict[str, Any] = {"quality": quality, "subsampling": subsampling}
    image.save(file, "JPEG", progressive=True, optimize=True, **options)
    return file.getvalue()


def check_images(spec: ImageSet, folder: Path) -> None:
    """Raise UserError unless `folder` holds exactly the files of the splits, with the expected counts."""
    classes = spec.expected["classes"]
    for split, stems in spec.splits.items():
        for kind, suffix in SUFFIXES.items():
            found = {path.stem for path in (folder / split / kind).glob(f"*{suffix}")}
            if wrong := sorted(found ^ set(stems)):
                problem = "does not belong there" if wrong[0] in found else "is missing"
                raise UserError(
                    f"{folder / split / kind}: {wrong[0]}{suffix} {problem} ({len(found)} files, expected {len(stems)})"
                )
        pixels, images = np.zeros(256, np.int64), np.zeros(256, np.int64)
        for stem in stems:
            image_path = folder / split / "images" / f"{stem}.jpg"
            label_path = folder / split / "labels" / f"{stem}.png"
            try:
                with Image.open(image_path) as image, Image.open(label_path) as label:
                    image_size, label_size = image.size, label.size
                    counts = np.bincount(np.asarray(label).ravel(), minlength=256)
            except (OSError, SyntaxError) as error:
                raise UserError(f"{image_path} or its label cannot be read: {error}") from None
            if image_size != label_size:
                raise UserError(f"{label_path} is {label_size} pixels large, its image {image_size}")
            if counts[len(classes) :].any():
                value = np.flatnonzero(counts)[-1]
                raise UserError(f"{label_path} holds the value {value}, but there are {len(classes)} classes")
            pixels += counts
            images += counts > 0
        for unit, key, seen in (("pixels", "pixels", pixels), ("images", "images_with_class", images)):
            for class_name, count in zip(classes, seen, strict=False):  # `seen` goes on to 255
                if count != (expected := spec.expected["splits"][split][key][class_name]):
                    raise UserError(f"{folder / split}: class {class_name} has {count:,} {unit}, expected {expected:,}")


def prepare_tables(spec: TableSet, root: Path, *, base_url: str | None = None, keep_archive: bool = False) -> str:
    """Install a set of tables as ROOT/NAME/*.csv; returns one line on what was done.

    Raises UserError as `download` does, and for a source or a finished file whose checksum differs.
    """

    def build(work: Path, folder: Path) -> None:
        files = {}
        for path, expected in spec.blobs.items():
            local = work / "sources" / path
            download(f"{base_url or FILES}/{path}", local)
            files[path] = local.read_bytes()
            if (found := blob_id(files[path])) != expected:
                remove(local)
                raise UserError(
                    f"{path}: checksum differs: git blob id {found}, expected {expected}. "
                    f"It was deleted and nothing was installed: {AGAIN}"
                )
        for name, content in spec.build(files).items():
            write_atomically(folder / name, content)
        write_atomically(folder / "README.md", spec.readme.encode())

    done = install(spec.name, root, build, lambda folder: check_tables(spec, folder), keep=keep_archive)
    return f"{done}: {len(spec.sha256)} tables; every checksum is as expected"


def check_tables(spec: TableSet, folder: Path) -> None:
    """Raise UserError unless `folder` holds the finished tables, each with the expected checksum."""
    for name, expected in spec.sha256.items():
        path, columns = folder / name, spec.columns[name]
        try:
            with path.open(newline="") as file:
                lines = [",".join(row[column] for column in columns) for row in csv.DictReader(file)]
        except FileNotFoundError:
            raise UserError(f"{path} is missing") from None
        except (KeyError, TypeError, ValueError, csv.Error):
            raise UserError(f"{path} is not a table with the columns {', '.join(columns)}") from None
        if (found := hashlib.sha256("\n".join(lines).encode()).hexdigest()) != expected:
            raise UserError(f"{path}: checksum differs: SHA-256 of its values is {found}, expected {expected}")


def install(
    name: str,
    root: Path,
    build: Callable[[Path, Path], None],
    check: Callable[[Path], None],
    *,
    keep: bool,
) -> str:
    """Build a folder aside, check it, and move it to ROOT/NAME; an existing one is only checked."""
    target, work = root / name, root / ".data_prep" / name
    if target.exists():
        try:
            check(target)
        except UserError as error:
            raise UserError(f"{error}. Move {target} away (or delete it) and run the command again") from None
        return f"{target} was already complete"
    work.mkdir(parents=True, exist_ok=True)
    try:
        with filelock.FileLock(work / "lock", timeout=0):
            build(work, work / name)
            try:
                check(work / name)
            except UserError as error:
                remove(work / name)
                raise UserError(f"{error}. Nothing was installed") from None
            os.replace(work / name, target)
    except filelock.Timeout:
        raise UserError(f"another process is preparing {target}: wait for it to finish") from None
    if not keep:
        remove(work)
        if not any(work.parent.iterdir()):
            work.parent.rmdir()
    return f"{target} installed"
