"""Clothing Co-Parsing (CCP), the 1,004 photographs with a label for every pixel, at half size."""

from __future__ import annotations

import io

import numpy as np
import scipy.io
from PIL import Image

from data_prep.install import ImageSet, encode_jpeg, read_expected, read_split

README = """# Clothing Co-Parsing (CCP), pixel-level part, half size

    {train,val,test}/images/<stem>.jpg   RGB, 275 px wide, 400 to 436 px high, JPEG
    {train,val,test}/labels/<stem>.png   palette PNG; pixel value = class index 0..58 (0 = null, background)
    stats.json                           class names and counts

Source: public GitHub repository `bearpaw/clothing-co-parsing`, commit
fe34fb77721a9973fbae92c05f7f12b664d10110. Changed: images halved (Lanczos) and re-encoded as JPEG (quality 86,
4:2:0, progressive); label maps converted from MATLAB files to PNG, every second pixel kept in each direction.
There is no official split of the pixel-level part; this one was drawn by iterative stratification over the
classes, rarest first (70/10/20 %). Licence file of the repository: Apache License 2.0. The photographs show
people; use them for research only, and cite

- W. Yang, P. Luo, L. Lin. Clothing co-parsing by joint image segmentation and labeling. CVPR 2014.
"""


def encode_image(jpeg: bytes) -> bytes:
    """Half the size; the last row or column of an odd one is squeezed in."""
    with Image.open(io.BytesIO(jpeg)) as image:
        half = image.convert("RGB").resize((image.width // 2, image.height // 2), Image.Resampling.LANCZOS)
    return encode_jpeg(half, quality=86, subsampling="4:2:0")


def decode_label(mat: bytes) -> np.ndarray:
    """Pixels 1, 3, 5, ... of both axes, those that nearest-neighbour halving keeps."""
    return scipy.io.loadmat(io.BytesIO(mat), variable_names=["groundtruth"])["groundtruth"][1::2, 1::2]


def pascal_palette(colours: int) -> list[int]:
    """The colour map of PASCAL VOC: the bits of the index, dealt out to r, g, b from the highest bit down."""
    index = np.arange(colours)[:, None]
    bits = [((index >> (3 * j + np.arange(3))) & 1) << (7 - j) for j in range(8)]
    return np.sum(bits, axis=0).ravel().tolist()


CCP = ImageSet(
    name="ccp",
    repository="bearpaw/clothing-co-parsing",
    commit="fe34fb77721a9973fbae92c05f7f12b664d10110",
    trees={
        "photos": "69f61ad9ec64f339701664146bbe7acb418cec5c",
        "annotations/pixel-level": "f92ee4a49d5237cf088f5c7135eecd1e705b2b90",
    },
    splits={split: read_split("ccp", split) for split in ("train", "val", "test")},
    paths=lambda split, stem: (f"photos/{stem}.jpg", f"annotations/pixel-level/{stem}.mat"),
    encode_image=encode_image,
    decode_label=decode_label,
    palette=pascal_palette(64),
    expected=read_expected("ccp"),
    readme=README,
)
