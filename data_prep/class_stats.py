"""Class statistics of four public training sets, counted by the authors of Region Rebalance."""

from __future__ import annotations

import ast
from collections.abc import Mapping

from data_prep.install import TableSet, csv_bytes
from ltseg_core.config import UserError

README = """# Class statistics of four public training sets

One CSV a data set: `class_index, class_name, train_pixels, train_images`. `train_pixels` is the number of
training pixels labelled with the class, `train_images` the number of training images that contain it (F of
Region Rebalance, Eq. 7). Void pixels are not counted.

Source: counted by the authors of Region Rebalance (J. Cui et al., 2022), published with their code in the
public GitHub repository `dvlab-research/Parametric-Contrastive-Learning`, folder GPaCo/Seg/stats (MIT licence), commit
fe56535ecd716e56a72e75c4e818f2059e557584; class names from its folder GPaCo/Seg/mmseg/datasets. The
pixel counts of COCO-Stuff-10K start with an `unlabeled` row, which is dropped here.
"""
SOURCE = "dvlab-research/Parametric-Contrastive-Learning/fe56535ecd716e56a72e75c4e818f2059e557584/GPaCo/Seg"
STATS, NAMES = f"{SOURCE}/stats", f"{SOURCE}/mmseg/datasets"
COLUMNS = ("class_index", "class_name", "train_pixels", "train_images")
NAME_FILES = {
    "ade20k": "ade.py",
    "cityscapes": "cityscapes.py",
    "cocostuff10k": "coco_stuff.py",
    "cocostuff164k": "coco_stuff.py",
}


def class_names(source: bytes) -> list[str]:
    """The literal assigned to CLASSES in a Python file, which is parsed and never run."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Assign) and getattr(node.targets[0], "id", "") == "CLASSES":
            return [name.strip() for name in ast.literal_eval(node.value)]
    raise UserError("the file of class names has no CLASSES")


def build(files: Mapping[str, bytes]) -> dict[str, bytes]:
    """Source files by address -> one CSV a data set."""
    tables = {}
    for dataset, name_file in NAME_FILES.items():
        classes = class_names(files[f"{NAMES}/{name_file}"])
        counts = [files[f"{STATS}/{dataset}_{kind}_label_stats.txt"].split() for kind in ("pix", "image")]
        # the pixel counts of COCO-Stuff-10K have one row more, `unlabeled`, before the classes
        pixels, images = (rows[-len(classes) :] for rows in counts)
        rows = zip(range(len(classes)), classes, map(int, pixels), map(int, images), strict=True)
        tables[f"{dataset}.csv"] = csv_bytes(COLUMNS, rows)
    return tables


CLASS_STATS = TableSet(
    name="class_stats",
    blobs={
        f"{STATS}/ade20k_pix_label_stats.txt": "4a94ed88bfed23c4e3e82aabcb81080ab9743e02",
        f"{STATS}/ade20k_image_label_stats.txt": "ff12d9ddb908a220feb7a9115e1c1303b2a4d7ac",
        f"{STATS}/cityscapes_pix_label_stats.txt": "38c9c6ef4b2faef6f0d370a034609cae7f9af014",
        f"{STATS}/cityscapes_image_label_stats.txt": "ed892cf27995616b4b8c9c0794fc994852bc708f",
        f"{STATS}/cocostuff10k_pix_label_stats.txt": "a3941c8d5b1923e64ac04d6f31f582600538d153",
        f"{STATS}/cocostuff10k_image_label_stats.txt": "785b2cdac9f7a546a9c55763057e4a1dc544b832",
        f"{STATS}/cocostuff164k_pix_label_stats.txt": "ecdd8afbca33208362140a4d05a062febe4ef33e",
        f"{STATS}/cocostuff164k_image_label_stats.txt": "c57efbfc11a5703ca578a080b4f7918f3f9d2fb2",
        f"{NAMES}/ade.py": "d807a001a0807d305687564ca9b0ae4e73f97150",
        f"{NAMES}/cityscapes.py": "2be00d68480dacfde074536a8c12e54758c9a3d4",
        f"{NAMES}/coco_stuff.py": "546a014284b803d63018442fa0e7cb12e8385d4d",
    },
    build=build,
    # without class names: public lists spell some differently
    columns={f"{dataset}.csv": ("class_index", "train_pixels", "train_images") for dataset in NAME_FILES},
    sha256={
        "ade20k.csv": "4cec35b7bff7c893ecebdcebff91f02f0c1c3b974d462c3daeb54aa413e7016a",
        "cityscapes.csv": "9026a74f76844ddb89f83fcebe6791b22c62bc2e58059e766cd7eab011879966",
        "cocostuff10k.csv": "6ce8be1afbec9c2415f61df61c609d23c95bf27e4563d2463d3a99962124dbb7",
        "cocostuff164k.csv": "ffc3105227b58e9a101d8d2554a74c99c7f57a01be6eb3b7effafd3925d81ba5",
    },
    readme=README,
)
