"""Per-class results of real models on ADE20K and Cityscapes, from the logs that their authors published.

`expected/NAME.csv` lists the logs: model, method, protocol, source (`owner/repository:path`) and git blob id.
"""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Mapping
from functools import partial

from data_prep.install import HERE, TableSet, csv_bytes
from ltseg_core.config import UserError

COMMITS = {
    "CSAILVision/sceneparsing": "e20222964c58eba41d8986d45d652d93adc234a5",
    "Megvii-BaseDetection/DisAlign": "a2fc3500a108cb83e3942293a5675c97ab3a2c6e",
    "Menoly-xin/Hardness-Level-Learning": "7878d93183dca38f6bb557d030250ff625d1559e",
}
OBJECT_INFO = "CSAILVision/sceneparsing:objectInfo150.csv"
OBJECT_INFO_COLUMNS = {
    "idx": "Idx",
    "name": "Name",
    "pixel_ratio": "Ratio",
    "train_images": "Train",
    "val_images": "Val",
}
RESULT_COLUMNS = ("model", "method", "protocol", "class_idx", "class_name", "iou", "acc", "source")
GROUPS = ("head", "body", "tail")
SCORES = {"aacc": "aAcc", "miou": "mIoU", "macc": "mAcc"}
CITYSCAPES_SUMMARY = {"config": "exp_name", **SCORES}
ADE20K_SUMMARY = {
    "protocol": "protocol",
    **SCORES,
    **{f"{group}_{score.lower()}": f"m{group.title()}{score}" for score in ("IoU", "Acc") for group in GROUPS},
}
ROUNDING = 0.0101  # percent: log and mean are rounded to 0.01, each by up to half of it

ADE20K_README = f"""# ADE20K (150 classes): class statistics and per-class results

- `objectinfo150.csv` - idx, name, pixel_ratio, train_images, val_images (images containing the class). From
  `objectInfo150.csv` of the public GitHub repository `CSAILVision/sceneparsing` (BSD 3-Clause), commit
  {COMMITS["CSAILVision/sceneparsing"]}, class order as there; names with all synonyms, separated by ";".
  Pixel ratios are rounded to four digits there.
- `per_class_results.csv` - model, method, protocol, class_idx (1..150), class_name, iou, acc (both in percent,
  validation split, 2,000 images), source (`owner/repository:path`). 24 tables of 150 rows.
- `summary.csv` - one row a table: aAcc, mIoU, mAcc, and head/body/tail means where the log gives them (in percent).

Sources:

- `Megvii-BaseDetection/DisAlign` (Apache 2.0), commit {COMMITS["Megvii-BaseDetection/DisAlign"]}, six
  evaluation logs: FCN with ResNet-50, ResNet-101, ResNeSt-101, single-scale and multi-scale + flip. These are the
  **baseline** checkpoints of mmsegmentation; the repository publishes no log of DisAlign itself. Head, body and tail
  there are the first 20, next 55 and last 75 classes in index order (which is the order of pixel ratio).
- `Menoly-xin/Hardness-Level-Learning` (Apache 2.0), commit {COMMITS["Menoly-xin/Hardness-Level-Learning"]},
  training logs of mmsegmentation; the last evaluation of each run was taken (single-scale): each architecture as
  **baseline** and with **hardness-level** re-weighting of pixels (X. Xiao et al., Not all pixels are equal: Learning
  pixel hardness for semantic segmentation, 2023).

Each table's means were checked against the mIoU and mAcc its log states. One run each: no repeated seeds. The logs
state IoU and Acc to two digits of a percentage.

Cite: B. Zhou et al. Scene parsing through ADE20K dataset. CVPR 2017. S. Zhang et al. Distribution alignment: A unified
framework for long-tail visual recognition. CVPR 2021.
"""
CITYSCAPES_README = f"""# Cityscapes (19 evaluation classes): per-class results

- `per_class_results.csv` - model, method, protocol, class_idx (train id), class_name, iou, acc (percent, validation
  split of 500 images, single-scale), source (`owner/repository:path`). 45 tables of 19 rows.
- `summary.csv` - one row a table: configuration, aAcc, mIoU, mAcc (in percent).

The class counts of the training set are in `class_stats/cityscapes.csv` (`python -m data_prep class_stats`).

Source: `Menoly-xin/Hardness-Level-Learning` (Apache 2.0), commit {COMMITS["Menoly-xin/Hardness-Level-Learning"]},
training logs of mmsegmentation, last evaluation of each run:

- **five losses on one model** (PSPNet, 769 x 769, 40k iterations) with ResNet-18, -50 and -101: cross-entropy,
  class-weighted-ce, ohem, focal, hardness-level. The class weights are mmsegmentation's fixed list (0.84 for road to
  1.15 for motorcycle): mild, far from inverse frequency;
- eight architectures with ResNet-101 and seven further backbones, each with its own loss (cross-entropy / baseline) and
  with hardness-level re-weighting.

Each table's means were checked against the mIoU and mAcc its log states. One run each: no repeated seeds.

Cite: M. Cordts et al. The Cityscapes dataset for semantic urban scene understanding. CVPR 2016. X. Xiao et al. Not all
pixels are equal: Learning pixel hardness for semantic segmentation. 2023.
"""


def read_logs(name: str) -> list[dict[str, str]]:
    """The committed list of the logs of a data set: model, method, protocol, source, blob."""
    return list(csv.DictReader((HERE / "expected" / f"{name}.csv").read_text().splitlines()))


def address(source: str) -> str:
    """`owner/repository:path` -> `owner/repository/commit/path`."""
    repository, _, path = source.partition(":")
    return f"{repository}/{COMMITS[repository]}/{path}"


def read_evaluation(content: bytes) -> tuple[dict[str, str], list[list[str]]]:
    """An evaluation log as mmsegmentation prints it: scores by name; rows of class, IoU, Acc (percent)."""
    lines = content.decode().splitlines()
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines if line.startswith("|")]
    _, *classes, names, values = rows  # the heads Class, IoU, Acc; at the end heads and values of the summary
    return dict(zip(names, values, strict=True)), classes


def read_training(content: bytes) -> tuple[dict[str, str], list[list[str]]]:
    """The last evaluation in a training log (JSON lines, scores as fractions), as `read_evaluation` gives it."""
    start, *records = map(json.loads, content.decode().splitlines())
    last = [record for record in records if record["mode"] == "val"][-1]
    scores = {name: str(round(100 * score, 2)) for name, score in last.items() if isinstance(score, float)}
    names = [key.removeprefix("IoU.") for key in last if key.startswith("IoU.")]
    classes = [[name.strip(), scores[f"IoU.{name}"], scores[f"Acc.{name}"]] for name in names]
    return {"exp_name": start["exp_name"], **scores}, classes


def read_log(source: str, content: bytes, classes: int) -> tuple[dict[str, str], list[list[str]]]:
    """Scores by their name in the log, and one row of class name, IoU, Acc a class, as text in percent.

    Raises UserError for a log that has no complete table, or one of another number of classes than `classes`, or one
    whose means are not the mIoU and mAcc that the log states.
    """
    try:
        scores, rows = (read_training if source.endswith(".json") else read_evaluation)(content)
        means = {"mIoU": [float(iou) for _, iou, _ in rows], "mAcc": [float(acc) for _, _, acc in rows]}
        stated = {name: float(scores[name]) for name in means}
    except (ValueError, KeyError, IndexError, TypeError) as error:
        raise UserError(f"{source} has no complete table of results per class ({error})") from None
    if len(rows) != classes:
        raise UserError(f"{source} has results of {len(rows)} classes, expected {classes}")
    for name, values in means.items():
        mean = sum(values) / classes
        if not abs(mean - stated[name]) <= ROUNDING:
            raise UserError(f"{source} states {name} {stated[name]}, but the mean over its classes is {mean:.2f}")
    return scores, rows


def build(
    files: Mapping[str, bytes], *, name: str, classes: int, first: int, summary: Mapping[str, str]
) -> dict[str, bytes]:
    """Logs by address -> one table of all classes, counted from `first`, and one with a row a log.

    summary: column -> its name in the logs, or in the list of logs; empty where a log does not state it
    Raises UserError as `read_log` does.
    """
    results, summaries = [], []
    for log in read_logs(name):
        model, method, source = log["model"], log["method"], log["source"]
        scores, rows = read_log(source, files[address(source)], classes)
        results += [[model, method, log["protocol"], index, *row, source] for index, row in enumerate(rows, first)]
        stated = [(log | scores).get(key, "") for key in summary.values()]
        summaries.append([model, method, *stated, source.partition(":")[2]])
    return {
        "per_class_results.csv": csv_bytes(RESULT_COLUMNS, results),
        "summary.csv": csv_bytes(("model", "method", *summary, "file"), summaries),
    }


def build_ade20k(files: Mapping[str, bytes]) -> dict[str, bytes]:
    """Source files by address -> the tables of `build`, and the class statistics under our column names."""
    info = csv.DictReader(io.StringIO(files[address(OBJECT_INFO)].decode()))
    rows = [[row[column] for column in OBJECT_INFO_COLUMNS.values()] for row in info]
    tables = build(files, name="ade20k_stats", classes=len(rows), first=1, summary=ADE20K_SUMMARY)
    return {"objectinfo150.csv": csv_bytes([*OBJECT_INFO_COLUMNS], rows), **tables}


ADE20K_STATS = TableSet(
    name="ade20k_stats",
    blobs={
        address(OBJECT_INFO): "333653c5e171cbde5d462086b1c9e5c8d21a97c6",
        **{address(log["source"]): log["blob"] for log in read_logs("ade20k_stats")},
    },
    build=build_ade20k,
    columns={
        "objectinfo150.csv": [*OBJECT_INFO_COLUMNS],
        "per_class_results.csv": RESULT_COLUMNS,
        "summary.csv": ("model", "method", *ADE20K_SUMMARY),
    },
    sha256={
        "objectinfo150.csv": "fee9104915136ab7e974a2cb200a5c3beb06a2e1a4b6ac8f29f9244e8c79a55f",
        "per_class_results.csv": "e30452214bb5e85e091eeb24cf6d2533d280db805dab8a0c41ba20f93d4c8f8a",
        "summary.csv": "9c1dc370ddfc4df75849f4d9dd0fddb28b807811d9c4c97c42ba7cfa05ee33e5",
    },
    readme=ADE20K_README,
)
CITYSCAPES_STATS = TableSet(
    name="cityscapes_stats",
    blobs={address(log["source"]): log["blob"] for log in read_logs("cityscapes_stats")},
    build=partial(build, name="cityscapes_stats", classes=19, first=0, summary=CITYSCAPES_SUMMARY),
    columns={
        "per_class_results.csv": RESULT_COLUMNS,
        "summary.csv": ("model", "method", *CITYSCAPES_SUMMARY),
    },
    sha256={
        "per_class_results.csv": "f816d57e7d822494077fad64bbe1c462ae7d91f74d91cf617c91d67f18296a34",
        "summary.csv": "c7f9cb608c6896a784575b1b6def3d127e4108959e64026a1322bba3d42f495d",
    },
    readme=CITYSCAPES_README,
)
