"""CIFAR-100: the long tail, the made-up and the real files, its preparation, and classification as segmentation."""

import csv
import hashlib
import io
import pickle
import tarfile
from dataclasses import replace
from itertools import pairwise

import numpy as np
import pandas as pd
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torchvision.datasets import CIFAR100 as Reference

from data_prep import cifar100 as prep
from data_prep.cifar100 import ARCHIVE, HOST, MD5, check, mosaic, prepare
from ltseg_core import data, metrics, stats
from ltseg_core.config import STUDIES, Experiment, UserError
from ltseg_core.data.cifar100 import images_of
from ltseg_core.models import build_model


def pixel(label, number):
    """The colour of all pixels of a made-up image."""
    return np.array([label, number % 256, number // 256], np.uint8)


@pytest.fixture(scope="session")
def archive():
    """The authors' archive with flat images: 500 training and 100 test images of each class, shuffled."""
    content = {"meta": {"fine_label_names": [f"class_{k}" for k in range(100)]}}
    for name, each in (("train", 500), ("test", 100)):
        order = np.random.default_rng(0).permutation(100 * each)
        labels, numbers = order // each, order % each
        colours = np.stack([pixel(k, i) for k, i in zip(labels, numbers, strict=True)])
        content[name] = {
            "data": np.repeat(colours[:, :, None], 1024, axis=2).reshape(len(order), 3072),
            "fine_labels": labels.tolist(),
            "filenames": [f"thing_{k}_s_{i:06d}.png" for k, i in zip(labels, numbers, strict=True)],
        }
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w:gz", compresslevel=1) as tar:
        for name, value in content.items():
            member, pickled = tarfile.TarInfo(f"cifar-100-python/{name}"), pickle.dumps(value)
            member.size = len(pickled)
            tar.addfile(member, io.BytesIO(pickled))
    return file.getvalue()


@pytest.fixture(scope="session")
def root(archive, tmp_path_factory):
    """A data root with CIFAR-100 as `data_prep` makes it of the made-up archive."""
    folder = tmp_path_factory.mktemp("data")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(prep, "MD5", hashlib.md5(archive).hexdigest())
        patch.setattr(prep, "download", lambda url, path: (path.parent.mkdir(exist_ok=True), path.write_bytes(archive)))
        assert "every class count is as expected" in prepare(folder)
    return folder


def test_the_long_tail_by_hand():
    for imbalance in (50, 100, 200, 500):
        assert images_of(imbalance).tolist() == [int(500 * (1 / imbalance) ** (k / 99)) for k in range(100)]
    assert (images_of(50).sum(), images_of(100).sum()) == (12608, 10847)  # Cao et al. 2019: 10,847
    assert images_of(100)[[0, -1]].tolist() == [500, 5]


def test_prepared_files(root, archive):
    assert sorted(path.name for path in root.iterdir()) == ["cifar100"]  # no archive, no working folder
    check(root / "cifar100")
    with (root / "cifar100" / "train_lt50.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["index"] for row in rows] == [str(i) for i in range(12608)]
    own = sorted((row for row in rows if row["label"] == "7"), key=lambda row: int(row["rank"]))
    by_hash = sorted((f"thing_7_s_{i:06d}.png" for i in range(500)), key=lambda n: hashlib.sha256(n.encode()).digest())
    assert [row["file"] for row in own] == by_hash[: images_of(50)[7]]
    assert "already complete" in prepare(root)


@pytest.mark.parametrize("imbalance", [50, 100, 500, None])
def test_splits(root, imbalance):
    parts = {split: data.load("cifar100", split, root, imbalance=imbalance) for split in data.splits("cifar100", root)}
    assert list(parts) == ["train", "val", "test"]
    counts = {split: stats.count_classes(d) for split, d in parts.items()}
    wanted = np.full(100, 126) if imbalance is None else images_of(imbalance)
    assert counts["train"].images.tolist() == wanted.tolist()
    assert counts["test"].images.tolist() == [100] * 100
    available = np.maximum(images_of(50), 126)
    assert counts["val"].images.tolist() == (available - wanted).clip(0, 10).tolist()
    for d in parts.values():
        for i in (0, len(d) // 2, len(d) - 1):
            image, label = d.sample(i)
            k, number = (int(x) for x in d.names[i].removeprefix("thing_").split("_s_"))
            assert label.shape == (32, 32)
            assert (label == k).all()
            assert (image == pixel(k, number)).all()
    assert not set(parts["train"].names) & set(parts["val"].names)
    torch.testing.assert_close(counts["train"].pixels, 1024 * counts["train"].images)


def test_subsets_are_nested(root):
    names = [set(data.load("cifar100", "train", root, imbalance=i).names) for i in (50, 100, 200, 500)]
    assert all(larger > smaller for larger, smaller in pairwise(names))


def test_bad_input(root, tmp_path):
    for imbalance in (49, 501, -1):
        with pytest.raises(
            UserError, match=rf"imbalance must be in \[50, 500\], or None for balanced, got {imbalance}"
        ):
            data.load("cifar100", "train", root, imbalance=imbalance)
    with pytest.raises(UserError, match="unknown split of cifar100 'trian': did you mean 'train'"):
        data.load("cifar100", "trian", root)
    with pytest.raises(
        UserError, match=f"no data set 'cifar100' at {tmp_path}/cifar100: fetch it with `python -m data_"
    ):
        data.load("cifar100", "train", tmp_path)
    assert data.splits("cifar100", tmp_path) == ()
    assert "cifar100" not in data.found(root)  # not a data set of segmentation


def test_damaged_files(root, tmp_path):
    def copied():
        folder = tmp_path / "cifar100"
        folder.mkdir(exist_ok=True)
        for path in (root / "cifar100").iterdir():
            (folder / path.name).write_bytes(path.read_bytes())
        return folder

    for name, content, damaged in (
        ("test.webp", b"RIFF", "test.webp is missing or damaged"),
        ("test.csv", b"index,label\n0,0\n", r"test.csv is missing or damaged \(KeyError\('rank'\)\)"),
        ("test.csv", b"index,label,rank,file\n0,100,0,a.png\n", "labels from 100 to 100, expected 0 to 99"),
        ("test.webp", mosaic(np.zeros((9, 32, 32, 3), np.uint8)), "100 tiles for the 10000 rows of test.csv"),
    ):
        (copied() / name).write_bytes(content)
        with pytest.raises(UserError, match=damaged):
            data.load("cifar100", "test", tmp_path).sample(0)
        with pytest.raises(UserError, match=r"Move .*cifar100 away"):
            prepare(tmp_path)
    (copied() / "classes.txt").write_text("apple\npear\n")
    with pytest.raises(UserError, match=r"classes.txt is missing or damaged .*2 names, expected 100"):
        data.load("cifar100", "test", tmp_path)
    (copied() / "classes.txt").unlink()
    with pytest.raises(UserError, match=r"classes.txt is missing or damaged \(FileNotFoundError"):
        data.load("cifar100", "test", tmp_path)
    lines = (copied() / "train_lt50.csv").read_text().splitlines(keepends=True)
    (tmp_path / "cifar100" / "train_lt50.csv").write_text("".join(lines[:-1]))
    with pytest.raises(UserError, match="class 99 has 9 images, expected 10"):
        check(tmp_path / "cifar100")


def test_the_archive_is_the_one_that_torchvision_knows():
    assert (f"{HOST}/{ARCHIVE}", MD5) == (Reference.url, Reference.tgz_md5)


def test_classification_is_segmentation_of_images_with_one_label():
    torch.manual_seed(0)
    network = build_model("ImageClassifier", "tu-mobilenetv3_small_050", 7).eval()
    image, label = torch.rand(5, 3, 32, 32), torch.tensor([0, 3, 6, 3, 1])
    maps = label.view(-1, 1, 1).expand(-1, 32, 32)
    with torch.no_grad():
        features, logits, _ = network(image)
        last = network.encode(image)[-1]
    expected = network.classifier(last.mean((2, 3), keepdim=True))[..., 0, 0]
    torch.testing.assert_close(features[..., 0, 0], last.mean((2, 3)))
    torch.testing.assert_close(logits, expected[..., None, None].expand(-1, -1, 32, 32))
    torch.testing.assert_close(F.cross_entropy(logits, maps), F.cross_entropy(expected, label))
    counts = metrics.ConfusionCounts(7)
    counts.update(logits.argmax(1), maps)
    assert counts.pixel_acc() == pytest.approx((expected.argmax(1) == label).double().mean().item())


def test_real_files_where_present(real_data):
    check(real_data / "cifar100")
    train = data.load("cifar100", "train", real_data)
    assert len(train) == 10847
    with Image.open(real_data / "cifar100" / "train_lt50.webp") as picture:
        first = np.asarray(picture.convert("RGB").crop((0, 0, 32, 32)))
    assert np.array_equal(train.sample(0)[0], first)
    test = data.load("cifar100", "test", real_data)
    means = np.mean([test.sample(i)[0] for i in range(0, 10000, 7)], axis=(0, 1, 2)) / 255
    np.testing.assert_allclose(means, [0.5071, 0.4865, 0.4409], atol=0.01)  # the published means of the training set


def test_kept_counts_are_those_of_the_experiment_file():
    table, base = pd.read_csv(STUDIES / "cifar100.csv"), Experiment.from_file(STUDIES / "cifar100.yaml")
    arms = {"ce": {}, "disalign": {}, "disalign rho=1": {"rho": 1}, "disalign rho=1.2": {"rho": 1.2}}
    keys = {
        replace(base, method=name.split()[0], hyper=hyper, seed=seed).key(): (name, seed)
        for name, hyper in arms.items()
        for seed in range(3)
    }
    assert table.groupby("run")[["method", "seed"]].first().apply(tuple, axis=1).to_dict() == keys
    for _, run in table.groupby("run"):
        assert run["class_id"].tolist() == list(range(100))
        assert run["train_images"].tolist() == images_of(100).tolist()
        assert (run["target_pixels"] == 100 * 1024).all()
        assert (run["predicted_pixels"] % 1024 == 0).all()  # whole images
        assert run["predicted_pixels"].sum() == 100 * 100 * 1024
        assert (run["intersection"] <= run["predicted_pixels"]).all()
