"""Data sets that live in folders: {split}/images/<stem>.jpg|png and {split}/labels/<stem>.png."""

from __future__ import annotations

import colorsys
import csv
import io
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from ltseg_core.config import IGNORE_INDEX, UserError, choose
from ltseg_core.data.base import SegmentationDataset

IMAGE_SUFFIXES, LABEL_SUFFIXES = (".jpg", ".jpeg", ".png"), (".png",)  # in upper case, too


@dataclass(frozen=True)
class Spec:
    """What a public data set's folder does not say about itself.

    ignored: label value that means "not labelled" in the files;  prepare: the command that fetches the data
    """

    classes: tuple[str, ...]
    palette: tuple[tuple[int, int, int], ...]
    ignored: int = IGNORE_INDEX
    prepare: str = ""


CAMVID = Spec(
    classes=(
        "Sky", "Building", "Pole", "Road", "Pavement", "Tree", "SignSymbol", "Fence", "Car", "Pedestrian",
        "Bicyclist",
    ),
    palette=(
        (128, 128, 128), (128, 0, 0), (192, 192, 128), (128, 64, 128), (0, 0, 192), (128, 128, 0),
        (192, 128, 128), (64, 64, 128), (64, 0, 128), (64, 64, 0), (0, 128, 192),
    ),
    ignored=11,
    prepare="python -m data_prep camvid",
)  # fmt: skip

CCP_CLASSES = (
    "null accessories bag belt blazer blouse bodysuit boots bra bracelet cape cardigan clogs coat dress earrings "
    "flats glasses gloves hair hat heels hoodie intimate jacket jeans jumper leggings loafers necklace panties "
    "pants pumps purse ring romper sandals scarf shirt shoes shorts skin skirt sneakers socks stockings suit "
    "sunglasses sweater sweatshirt swimwear t-shirt tie tights top vest wallet watch wedges"
)


def distinct_colours(count: int) -> tuple[tuple[int, int, int], ...]:
    """`count` colours by golden-angle hues and alternating lightness; the first is black (background)."""
    hues = [(0.618034 * i) % 1 for i in range(count)]
    colours = [colorsys.hls_to_rgb(h, (0.35, 0.5, 0.68)[i % 3], 0.75) for i, h in enumerate(hues)]
    return ((0, 0, 0), *[(round(255 * r), round(255 * g), round(255 * b)) for r, g, b in colours[1:]])


CCP = Spec(tuple(CCP_CLASSES.split()), distinct_colours(59), prepare="python -m data_prep ccp")
SPECS = {"camvid": CAMVID, "ccp": CCP}


class FolderDataset(SegmentationDataset):
    """One split of a folder `<root>/<split>/{images,labels}`.

    Image and label share their stem. A label map is a one-channel PNG (grey or palette) whose values are class
    indices; `spec.ignored` becomes 255. Without a spec the classes are read from `<root>/classes.csv`
    (columns class_index, class_name, optionally red, green, blue) or, failing that, numbered up to the
    largest value found in the label maps of all splits.

    images: how many images to keep, spread evenly over the sorted stems (None keeps all)

    Raises UserError when a folder, an image or a label is missing or cannot be read, two files share a stem, the
    split is empty, a file cannot be decoded, image and label differ in size, a label has several channels, a value
    is no class (without a class list: 254), or the class list is malformed.
    """

    def __init__(
        self,
        root: Path,
        split: str,
        *,
        name: str,
        spec: Spec | None = None,
        images: int | None = None,
    ) -> None:
        if not root.is_dir():
            hint = f"fetch it with `{spec.prepare} --root {root.parent}`" if spec else "check the path"
            raise UserError(
                f"no data set {name!r} at {root}: {hint}, or point --data-root or LTSEG_DATA to the folder that"
                " holds it"
            )
        with _listed(root):
            splits = sorted(p.name for p in root.iterdir() if (p / "images").exists())
        if not splits:
            raise UserError(f"{root} holds no split: expected <split>/images and <split>/labels, e.g. train/images")
        self.name, self.split = name, choose(f"split of {name}", split, splits)
        self.folder = root / self.split
        self._images, self._labels = self._pairs()
        self.names = sorted(self._images)
        if images is not None:
            if not 0 < images <= len(self.names):
                raise UserError(f"images must be in [1, {len(self.names)}] for {self.folder}, got {images}")
            keep = np.linspace(0, len(self.names) - 1, images).round().astype(int)
            self.names = [self.names[i] for i in keep]
        spec = spec or _read_spec(root)
        self.classes, self.palette = spec.classes, np.array(spec.palette, dtype=np.uint8)
        self._ignored = spec.ignored
        self._remap = np.full(256, _INVALID, dtype=np.uint8)
        self._remap[: len(spec.classes)] = np.arange(len(spec.classes))
        self._remap[[spec.ignored, IGNORE_INDEX]] = IGNORE_INDEX

    def _pairs(self) -> tuple[dict[str, str], dict[str, str]]:
        """File names of the images and of the labels by stem."""
        images = _by_stem(self.folder / "images", IMAGE_SUFFIXES)
        labels = _by_stem(self.folder / "labels", LABEL_SUFFIXES)
        if not images and not labels:
            raise UserError(f"split {self.split!r} is empty: no images in {self.folder / 'images'}")
        for what, missing, where in (
            ("label", sorted(images.keys() - labels), "labels"),
            ("image", sorted(labels.keys() - images), "images"),
        ):
            if missing:
                more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
                raise UserError(f"no {what} for {missing[0]!r}{more} in {self.folder / where}: add or remove it")
        return images, labels

    def image(self, index: int) -> np.ndarray:
        """RGB image, (H, W, 3) uint8."""
        with _opened(self.folder / "images" / self._images[self.names[index]]) as picture:
            return np.array(picture.convert("RGB"))

    def _label_path(self, index: int) -> Path:
        return self.folder / "labels" / self._labels[self.names[index]]

    def label(self, index: int) -> np.ndarray:
        path = self._label_path(index)
        with _opened(path) as picture:
            values = _label_values(picture, path)
        label = self._remap[values]
        if (label == _INVALID).any():
            raise UserError(
                f"{path} has the value {values[label == _INVALID][0]}, which is no class of {self.name}"
                f" (0..{len(self.classes) - 1}, ignore 255): correct the label or list the class in classes.csv"
            )
        return label

    def histogram(self, index: int) -> list[int]:
        path = self._label_path(index)
        with _opened(path) as picture:
            if picture.mode not in ("L", "P"):
                return super().histogram(index)
            values = picture.histogram()  # never held as an array: that would cost as much as decoding
        if self._ignored != IGNORE_INDEX:
            values[IGNORE_INDEX] += values[self._ignored]
            values[self._ignored] = 0
        return values

    def sample(self, index: int) -> tuple[np.ndarray, np.ndarray]:
        image, label = self.image(index), self.label(index)
        if image.shape[:2] != label.shape:
            raise UserError(
                f"image and label {self.names[index]!r} in {self.folder} differ in size (height x width): "
                f"{image.shape[0]}x{image.shape[1]} and {label.shape[0]}x{label.shape[1]}"
            )
        return image, label


_INVALID = 254  # marks values that are no class; so at most 254 classes


def _by_stem(folder: Path, suffixes: tuple[str, ...]) -> dict[str, str]:
    """The names of the files in `folder` that end on one of `suffixes`, by stem."""
    names: dict[str, str] = {}
    with _listed(folder):
        paths = sorted(folder.iterdir())
    for path in paths:
        if path.suffix.lower() in suffixes:
            if path.stem in names:
                raise UserError(f"{folder} holds both {names[path.stem]} and {path.name}: remove or rename one")
            names[path.stem] = path.name
    return names


@contextmanager
def _listed(folder: Path) -> Iterator[None]:
    """Whatever goes wrong while the contents of `folder` are listed becomes a UserError that says where."""
    try:
        yield
    except OSError as error:
        raise UserError(
            f"{error.filename or folder} cannot be listed ({error.strerror}): expected readable folders"
            " <split>/images and <split>/labels"
        ) from None


@contextmanager
def _opened(path: Path) -> Iterator[Image.Image]:
    """The picture at `path`; whatever goes wrong while it is read becomes a UserError that names it."""
    try:
        # read at once: every small read of PIL's would give up the interpreter lock and queue for it again
        with Image.open(io.BytesIO(path.read_bytes())) as picture:
            yield picture
    except FileNotFoundError:
        raise UserError(f"{path} has disappeared") from None
    except (OSError, SyntaxError) as error:  # PIL raises SyntaxError for broken PNG chunks
        if isinstance(error, OSError) and error.strerror:  # from the system, not from PIL
            raise UserError(f"{path} cannot be read ({error.strerror}): mend its permissions or the disk") from None
        raise UserError(f"{path} cannot be decoded ({error}): truncated or corrupt, fetch it again") from None


def _label_values(picture: Image.Image, path: Path) -> np.ndarray:
    """The stored values of a label map, (H, W) uint8."""
    bands = picture.getbands()
    if len(bands) > 1:
        raise UserError(
            f"{path} has {len(bands)} channels ({picture.mode}): a label map has one channel of class indices;"
            " convert colours to indices first"
        )
    values = np.asarray(picture)
    if values.max(initial=0) > 255:  # 16-bit PNG
        raise UserError(f"{path} has values up to {values.max()}: class indices must be below 255")
    return values.astype(np.uint8, copy=False)


def _read_spec(root: Path) -> Spec:
    path = root / "classes.csv"
    if not path.exists():
        labels = [p for p in root.glob("*/labels/*") if p.suffix.lower() in LABEL_SUFFIXES]
        with ThreadPoolExecutor() as pool:  # PIL releases the GIL while it decodes
            largest, found_in = max(zip(pool.map(_largest_class, labels), labels, strict=True))
        if largest >= _INVALID:
            raise UserError(f"{found_in} has the value {largest}: at most {_INVALID} classes, 0..{_INVALID - 1}, fit")
        return Spec(tuple(f"class {i}" for i in range(largest + 1)), distinct_colours(largest + 1))
    try:
        with path.open(newline="", encoding="utf-8") as file:
            rows = list(csv.DictReader(file))
        rows.sort(key=lambda row: int(row["class_index"]))
        if [int(row["class_index"]) for row in rows] != list(range(len(rows))) or not 2 <= len(rows) <= _INVALID:
            raise ValueError(f"class_index must count 0, 1, 2, ... up to at most {_INVALID - 1}")
        palette: Sequence[tuple[int, int, int]] = distinct_colours(len(rows))
        if "red" in rows[0]:
            palette = [(int(row["red"]), int(row["green"]), int(row["blue"])) for row in rows]
        for index, colour in enumerate(palette):
            if not all(0 <= value <= 255 for value in colour):
                raise ValueError(f"the colour {colour} of class_index {index} is not within 0..255")
    except (OSError, KeyError, ValueError, TypeError, csv.Error) as error:
        raise UserError(
            f"{path} cannot be read ({error!r}): expected columns class_index, class_name and, if you like, red, green,"
            " blue"
        ) from None
    return Spec(tuple(row["class_name"] for row in rows), tuple(palette))


def _largest_class(path: Path) -> int:
    with _opened(path) as picture:
        values = _label_values(picture, path)
    return int(values[values != IGNORE_INDEX].max(initial=0))
