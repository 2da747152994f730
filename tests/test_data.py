"""Folder data sets: what they load and what they refuse."""

import shutil

import numpy as np
import pytest
import torch
from PIL import Image

from ltseg_core import data, stats
from ltseg_core.config import UserError
from ltseg_core.data.base import InMemory, Resized, Subset
from ltseg_core.data.folders import CAMVID, CCP, distinct_colours


def test_folder_pairs_and_classes(folder):
    root = folder(train=3, val=2, classes=4)
    train = data.load(str(root), "train")
    assert (len(train), train.classes, train.names) == (
        3,
        ("thing 0", "thing 1", "thing 2", "thing 3"),
        ["000", "001", "002"],
    )
    image, label = train[1]
    with Image.open(root / "train/images/001.png") as picture:
        assert np.array_equal(image.permute(1, 2, 0), picture)
    with Image.open(root / "train/labels/001.png") as picture:
        assert np.array_equal(label, picture)
    assert data.splits(str(root)) == ("train", "val")


def test_without_class_list_the_largest_value_counts(folder):
    root = folder(train=2, val=2, classes=3)
    (root / "classes.csv").unlink()
    label = np.zeros((32, 48), np.uint8)
    label[0, 0], label[0, 1] = 6, 255
    Image.fromarray(label).save(root / "val/labels/001.png")
    assert data.load(str(root), "train").classes == tuple(f"class {i}" for i in range(7))


def test_without_class_list_value_254_is_refused(folder):
    root = folder(train=2)
    (root / "classes.csv").unlink()
    Image.fromarray(np.full((32, 48), 253, np.uint8)).save(root / "train/labels/000.png")
    assert len(data.load(str(root), "train").classes) == 254
    Image.fromarray(np.full((32, 48), 254, np.uint8)).save(root / "train/labels/001.png")
    with pytest.raises(UserError, match=r"labels/001.png has the value 254: at most 254 classes, 0..253, fit"):
        data.load(str(root), "train")  # a changed label is seen


def test_suffixes_in_upper_case(folder):
    root = folder(train=2, classes=3)
    before = data.load(str(root), "train")
    sample, histogram = before[1], before.histogram(1)
    for path in [*root.glob("train/*/*.png")]:
        path.rename(path.with_suffix(".PNG"))
    after = data.load(str(root), "train")
    assert all(torch.equal(a, b) for a, b in zip(sample, after[1], strict=True))
    assert after.histogram(1) == histogram
    (root / "classes.csv").unlink()
    assert data.load(str(root), "train").classes == ("class 0", "class 1", "class 2")


def test_names_of_splits_and_options_in_any_case(folder):
    root = folder(train=3)
    loaded = data.load(str(root), "Train", Images=2)
    assert (loaded.split, len(loaded), loaded[0][0].shape) == ("train", 2, (3, 32, 48))
    scenes = data.load("Scenes", "VAL", Images=30, Size=[48, 64])
    assert (scenes.name, scenes.split, len(scenes), scenes[0][1].shape) == ("scenes", "val", 30, (48, 64))


def test_errors_of_the_system_are_not_called_corrupt(folder):
    root = folder(train=1)
    loaded = data.load(str(root), "train")
    (root / "train/images/000.png").unlink()
    (root / "train/images/000.png").mkdir()
    with pytest.raises(UserError, match=r"images/000.png cannot be read \(Is a directory\): mend") as refusal:
        loaded[0]
    assert "corrupt" not in str(refusal.value)


def test_palette_in_class_list(folder):
    root = folder(train=1, classes=2)
    (root / "classes.csv").write_text("class_index,class_name,red,green,blue\n1,b,4,5,6\n0,a,1,2,3\n")
    loaded = data.load(str(root), "train")
    assert loaded.classes == ("a", "b")
    assert loaded.palette.tolist() == [[1, 2, 3], [4, 5, 6]]


def test_images_keeps_a_spread(folder):
    root = folder(train=6)
    assert data.load(str(root), "train", images=3).names == ["000", "002", "005"]
    for bad in (0, 7):
        with pytest.raises(UserError, match=r"images must be in \[1, 6\]"):
            data.load(str(root), "train", images=bad)


def _broken(root, what):
    labels, images = root / "train/labels", root / "train/images"
    if what == "no label":
        (labels / "001.png").unlink()
    elif what == "no image":
        (images / "001.png").unlink()
    elif what == "empty":
        for path in [*labels.iterdir(), *images.iterdir()]:
            path.unlink()
    elif what == "no labels folder":
        shutil.rmtree(labels)
    elif what in ("labels are a file", "images are a file"):
        where = labels if what == "labels are a file" else images
        shutil.rmtree(where)
        where.touch()
    elif what == "size":
        Image.fromarray(np.zeros((8, 9), np.uint8)).save(labels / "001.png")
    elif what == "truncated label":
        (labels / "001.png").write_bytes((labels / "001.png").read_bytes()[:-40])
    elif what == "truncated image":
        (images / "001.png").write_bytes((images / "001.png").read_bytes()[:300])
    elif what == "not an image":
        (images / "001.png").write_text("hello")
    elif what == "value":
        Image.fromarray(np.full((32, 48), 9, np.uint8)).save(labels / "001.png")
    elif what == "sixteen bit":
        Image.fromarray(np.full((32, 48), 900, np.uint16)).save(labels / "001.png")
    elif what == "colour label":
        Image.fromarray(np.zeros((32, 48, 3), np.uint8)).save(labels / "001.png")
    elif what == "two images":
        (images / "001.jpg").touch()
    elif what == "two labels":
        (labels / "001.PNG").touch()
    elif what == "disappears":
        (labels / "001.png").unlink()
        (labels / "001.png").symlink_to("nowhere")
    elif what == "class list of bytes":
        (root / "classes.csv").write_bytes(b"\xff\xfe")
    elif what == "class list":
        (root / "classes.csv").write_text("class_index,class_name\n0,a\n2,b\n")
    elif what == "class list columns":
        (root / "classes.csv").write_text("id,name\n0,a\n1,b\n")
    elif what == "class list is a folder":
        (root / "classes.csv").unlink()
        (root / "classes.csv").mkdir()
    elif what == "endless class name":
        (root / "classes.csv").write_text(f"class_index,class_name\n0,{'a' * 200_000}\n1,b\n")
    elif what in ("256", "-1"):
        (root / "classes.csv").write_text(f"class_index,class_name,red,green,blue\n0,a,0,0,255\n1,b,4,{what},6\n")


@pytest.mark.parametrize(
    ("what", "message"),
    [
        ("no label", r"no label for '001' in .*train/labels"),
        ("no image", r"no image for '001' in .*train/images"),
        ("empty", r"split 'train' is empty: no images in .*train/images"),
        ("no labels folder", r"train/labels cannot be listed \(No such file or directory\): expected readable folders"),
        ("labels are a file", r"train/labels cannot be listed \(Not a directory\): expected readable folders"),
        ("images are a file", r"train/images cannot be listed \(Not a directory\): expected readable folders"),
        ("size", r"'001'.* differ in size .*: 32x48 and 8x9"),
        ("truncated label", r"labels/001.png cannot be decoded .*truncated or corrupt"),
        ("truncated image", r"images/001.png cannot be decoded .*truncated or corrupt"),
        ("not an image", r"images/001.png cannot be decoded"),
        ("value", r"labels/001.png has the value 9, which is no class of pictures \(0..3, ignore 255\)"),
        ("sixteen bit", r"labels/001.png has values up to 900"),
        ("colour label", r"labels/001.png has 3 channels \(RGB\)"),
        ("two images", r"train/images holds both 001.jpg and 001.png: remove or rename one"),
        ("two labels", r"train/labels holds both 001.PNG and 001.png"),
        ("disappears", r"labels/001.png has disappeared"),
        ("class list of bytes", "classes.csv cannot be read"),
        ("class list", "classes.csv cannot be read"),
        ("class list columns", "expected columns class_index, class_name"),
        ("class list is a folder", r"classes.csv cannot be read \(IsADirectoryError"),
        ("endless class name", r"classes.csv cannot be read .*field limit"),
        ("256", r"classes.csv cannot be read .*\(4, 256, 6\) of class_index 1 is not within 0..255"),
        ("-1", r"classes.csv cannot be read .*\(4, -1, 6\) of class_index 1 is not within 0..255"),
    ],
)
def test_refusals_say_what_where_and_what_to_do(folder, what, message):
    root = folder(train=3)
    _broken(root, what)
    with pytest.raises(UserError, match=message):
        loaded = data.load(str(root), "train")
        for i in range(len(loaded)):
            loaded[i]


def test_truncated_jpeg(folder):
    root = folder(train=1)
    image = root / "train/images/000.png"
    with Image.open(image) as picture:
        picture.save(image.with_suffix(".jpg"))
    image.unlink()
    path = image.with_suffix(".jpg")
    path.write_bytes(path.read_bytes()[:-200])
    with pytest.raises(UserError, match="000.jpg cannot be decoded"):
        data.load(str(root), "train")[0]


def test_missing_root_split_and_typos(tmp_path, folder):
    with pytest.raises(UserError, match=r"no data set 'camvid' at .*: fetch it with `python -m data_prep camvid"):
        data.load("camvid", "train", tmp_path)
    with pytest.raises(UserError, match="no data set 'nothing' at"):
        data.load(str(tmp_path / "nothing"), "train")
    with pytest.raises(UserError, match="did you mean 'camvid'"):
        data.load("camvit", "train")
    root = folder(train=1)
    with pytest.raises(UserError, match="did you mean 'train'"):
        data.load(str(root), "trian")
    with pytest.raises(UserError, match="did you mean 'images'"):
        data.load(str(root), "train", image=3)
    with pytest.raises(UserError, match="holds no split"):
        data.load(str(root / "train"), "train")


def test_all_ignored_image_and_class_that_never_occurs(folder):
    root = folder(train=2, classes=5)
    for name in ("000", "001"):
        label = np.full((32, 48), 255, np.uint8)
        label[:4] = 2 if name == "001" else 255
        Image.fromarray(label).save(root / f"train/labels/{name}.png")
    counts = stats.count_classes(data.load(str(root), "train"))
    assert counts.pixels.tolist() == [0, 0, 4 * 48, 0, 0]
    assert counts.images.tolist() == [0, 0, 1, 0, 0]


def test_resized_keeps_or_scales_labels(folder):
    root = folder(train=1, size=(32, 48))
    plain = data.load(str(root), "train")
    both = Resized(plain, (16, 24), resize_labels=True)[0]
    only_image = Resized(plain, (16, 24), resize_labels=False)[0]
    assert (both[0].shape, both[1].shape, only_image[1].shape) == ((3, 16, 24), (16, 24), (32, 48))
    assert torch.equal(both[0], only_image[0])
    # blocks of 8 pixels: nearest neighbour at half size is every second pixel
    assert torch.equal(both[1], plain[0][1][1::2, 1::2])


def test_subset_and_memory_agree_with_the_data_set(folder):
    plain = data.load(str(folder(train=4)), "train")
    part, held = Subset(plain, [3, 1]), InMemory(plain)
    assert part.names == ["003", "001"]
    assert all(torch.equal(a, b) for a, b in zip(part[0], plain[3], strict=True))
    assert all(torch.equal(a, b) for a, b in zip(held[2], plain[2], strict=True))


def test_specs_are_consistent():
    assert len(CAMVID.classes) == len(CAMVID.palette) == 11
    assert len(CCP.classes) == len(CCP.palette) == 59
    assert len(set(distinct_colours(254))) == 254


def test_camvid_counts_equal_its_readme(real_data):
    counts = stats.count_classes(data.load("camvid", "train", real_data))
    rows = [line.split("|")[1:-1] for line in (real_data / "camvid/README.md").read_text().splitlines()]
    table = [[cell.strip().replace(",", "") for cell in row] for row in rows if len(row) == 9]
    expected = {row[1]: (int(row[2]), int(row[3])) for row in table if row[0].isdigit()}
    for i, name in enumerate(CAMVID.classes):
        assert (int(counts.pixels[i]), int(counts.images[i])) == expected[name]


def test_ccp_counts_equal_its_statistics(real_data):
    import json

    counts = stats.count_classes(data.load("ccp", "test", real_data))
    stored = json.loads((real_data / "ccp/stats.json").read_text())
    assert list(CCP.classes) == stored["classes"]
    assert counts.pixels.tolist() == [stored["splits"]["test"]["pixels"].get(name, 0) for name in CCP.classes]
