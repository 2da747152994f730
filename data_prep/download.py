"""Complete, resumable downloads, and safe reading of the archives they bring.

What is checked, and why not the checksum of the archive: the public repositories offer an archive of any
commit, but pack it on demand, and its bytes may change with the compressor. Its *content* is pinned
instead, by the ids that git itself gives to every file ("blob") and folder ("tree"); `git ls-tree COMMIT`
shows the same ids to anyone. They are SHA-1 digests of content, names and modes.
"""

from __future__ import annotations

import gzip
import hashlib
import http.client
import os
import shutil
import ssl
import tarfile
import time
import urllib.error
import urllib.request
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path, PurePosixPath

from tqdm import tqdm

from ltseg_core.config import UserError

CHUNK = 1 << 16
MEMBER_LIMIT = 1 << 28  # bytes; the largest wanted file known holds 50,000 images of 3,072 bytes
PAUSE_S = 0.5  # before the second attempt; doubled before each further one
TIMEOUT_S = 30.0
NETWORK_ERRORS = (
    urllib.error.URLError,
    http.client.HTTPException,
    ConnectionError,
    TimeoutError,
    ssl.SSLError,
)


def write_atomically(path: Path, content: bytes) -> None:
    """Write a file that a killed process leaves absent or complete."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(path.name + ".tmp")
    part.write_bytes(content)
    os.replace(part, path)


def download(url: str, path: Path, *, attempts: int = 5) -> None:
    """Fetch `url` into `path`, which appears only when it is complete; an existing `path` is kept.

    Bytes collect in `path.part`. It is continued (HTTP Range) by the next attempt, or the next call, where
    the server states a strong ETag or a date by which both can know that the file is still the same; any
    other server is asked for the whole file again.

    Raises UserError for an address the server does not have, a refusal, and a connection that keeps
    breaking off; OSError where the disk cannot be written.
    """
    if path.exists():
        return
    if not url.startswith(("http://", "https://")):
        raise UserError(f"cannot download {url}: the address must start with http:// or https://")
    path.parent.mkdir(parents=True, exist_ok=True)
    part, validator = path.with_name(path.name + ".part"), path.with_name(path.name + ".validator")
    problem = ""
    for attempt in range(attempts):
        if attempt:
            time.sleep(PAUSE_S * 2 ** (attempt - 1))
        try:
            problem = _attempt(url, part, validator)
        except urllib.error.HTTPError as error:
            if error.code in (404, 410):
                raise UserError(
                    f"{url} does not exist (HTTP {error.code}); if the repository has moved, "
                    "give a mirror of it with --base-url"
                ) from None
            if error.code == 416:  # the part is longer than the file: it belongs to something else
                part.unlink(missing_ok=True)
            elif error.code < 500 and error.code not in (408, 425, 429):
                raise UserError(f"{url} was refused: HTTP {error.code} {error.reason}") from None
            problem = f"HTTP {error.code} {error.reason}"
        except NETWORK_ERRORS as error:
            problem = str(getattr(error, "reason", error)) or type(error).__name__
        if not problem:
            os.replace(part, path)
            validator.unlink(missing_ok=True)
            return
    have = part.stat().st_size if part.exists() else 0
    raise UserError(
        f"{url} could not be downloaded in {attempts} attempts (last: {problem}); {have:,} bytes are kept in "
        f"{part}: run the same command again to go on"
    )


def _attempt(url: str, part: Path, validator: Path) -> str:
    """One request; returns what is wrong with the part afterwards, "" when it is complete."""
    headers = {"User-Agent": "ltseg-data-prep", "Accept-Encoding": "identity"}
    start = part.stat().st_size if part.exists() and validator.exists() else 0
    if start:
        headers |= {"Range": f"bytes={start}-", "If-Range": validator.read_text()}
    with urllib.request.urlopen(urllib.request.Request(url, headers=headers), timeout=TIMEOUT_S) as response:
        if start and response.status == 206:
            if not response.headers.get("Content-Range", "").startswith(f"bytes {start}-"):
                part.unlink()
                return f"the server sent another range than the one asked for, from byte {start}"
        else:
            start = 0
            etag = response.headers.get("ETag", "")
            known = etag if etag and not etag.startswith("W/") else response.headers.get("Last-Modified", "")
            part.unlink(missing_ok=True)
            validator.unlink(missing_ok=True)
            if known:
                write_atomically(validator, known.encode())
        length = response.headers.get("Content-Length")
        total = start + int(length) if length else None
        with (
            part.open("ab") as file,
            tqdm(total=total, initial=start, desc=part.stem, unit="B", unit_scale=True, disable=None) as bar,
        ):
            while chunk := response.read(CHUNK):
                file.write(chunk)
                bar.update(len(chunk))
    have = part.stat().st_size
    return "" if total in (None, have) else f"the connection broke off after {have:,} of {total:,} bytes"


def archive_files(archive: Path, wanted: Callable[[str], bool]) -> Iterator[tuple[str, bytes]]:
    """(path inside the repository, content) of each wanted file of a `.tar.gz` of a repository, in its order.

    Nothing is ever extracted under a name that stands in the archive. Raises UserError for a truncated or
    corrupt archive, and for one that holds what the known repositories do not: an absolute path, `..`, a
    link, a device, two files of one name, or a wanted file beyond 256 MiB.
    """
    seen: set[str] = set()
    try:
        with gzip.open(archive) as stream, tarfile.open(fileobj=stream, mode="r:") as tar:
            for member in tar:
                path = PurePosixPath(member.name)
                if path.is_absolute() or ".." in path.parts or "\\" in member.name:
                    raise UserError(f"{archive} is not to be trusted: it holds the path {member.name!r}")
                if not (member.isfile() or member.isdir()):
                    raise UserError(f"{archive} is not to be trusted: {member.name!r} is a link or a device")
                name = "/".join(path.parts[1:])  # without the folder repository-commit
                content = tar.extractfile(member) if wanted(name) else None  # None for a folder, too
                if content is None:
                    continue
                if member.size > MEMBER_LIMIT or name in seen:
                    problem = "twice" if name in seen else f"with {member.size:,} bytes"
                    raise UserError(f"{archive} is not to be trusted: it holds {name} {problem}")
                seen.add(name)
                yield name, content.read()
            while stream.read(CHUNK):  # the checksum of the compression stands at the end
                pass
    except (EOFError, zlib.error, gzip.BadGzipFile, tarfile.TarError) as error:
        raise UserError(f"{archive} is truncated or corrupt ({error})") from None


def blob_id(content: bytes) -> str:
    """The id that git gives to a file of this content."""
    return hashlib.sha1(b"blob %d\0" % len(content) + content, usedforsecurity=False).hexdigest()


def tree_id(blobs: Mapping[str, str]) -> str:
    """The id that git gives to a folder of these plain files (name -> blob id; mode 100644, no folders)."""
    rows = sorted((name.encode(), bytes.fromhex(blob)) for name, blob in blobs.items())
    content = b"".join(b"100644 %s\0%s" % row for row in rows)
    return hashlib.sha1(b"tree %d\0" % len(content) + content, usedforsecurity=False).hexdigest()


def verify_archive(archive: Path, trees: Mapping[str, str], needed: Iterable[str]) -> None:
    """Check that the folders `trees` (path -> git tree id) of an archive are exactly the pinned ones.

    Raises UserError naming the first missing file of `needed`, or the folder that differs, and whatever
    `archive_files` raises.
    """
    blobs: dict[str, dict[str, str]] = {folder: {} for folder in trees}
    for path, content in archive_files(archive, lambda path: path.rpartition("/")[0] in trees):
        folder, _, name = path.rpartition("/")
        blobs[folder][name] = blob_id(content)
    missing = [path for path in needed if path.rpartition("/")[2] not in blobs[path.rpartition("/")[0]]]
    if missing:
        others = f" and {len(missing) - 1} more" if missing[1:] else ""
        raise UserError(f"{archive} lacks {missing[0]}{others}")
    for folder, expected in trees.items():
        if (found := tree_id(blobs[folder])) != expected:
            raise UserError(f"{archive}: checksum of folder {folder} differs: git tree id {found}, expected {expected}")


def remove(path: Path) -> None:
    """Remove a file or a folder with all it holds, if it is there."""
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
