"""A .beton that is being built, on the disk, so that a build that was stopped can resume.

X.beton.part/ holds
    build.json   the options of the build and a digest of the list of images
    pages        the file itself, without header and tables
    rows         one format.ROW for each image that has been processed
    bad.jsonl    a BadImage for each of them that is bad
A row is written after the pages of its image are on the disk, so whatever stops a build, the rows on the disk are true.
To start a build from the beginning, delete the folder.
"""

import contextlib
import json
import os
import time
import zlib
from collections.abc import Iterable
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, Self

import numpy as np

from fastssl.beton.format import RGB, ROW, data_start, manifest_path, write_tables
from fastssl.beton.images import Case
from fastssl.beton.shards import is_shard, set_manifest_path, set_of
from fastssl.common.errors import UserError
from fastssl.common.files import make_folder, open_regular, replace_durably, sync, try_lock
from fastssl.common.terminal import console, print_line

FILES = ("build.json", "pages", "rows", "bad.jsonl", "names.txt", "manifest.json", "lock")
SAVE_EVERY = 5.0  # seconds; at most this much work is repeated


@dataclass(frozen=True)
class BadImage:
    """A line of bad_images.jsonl: an image that cannot be read."""

    split: str
    name: str  # the sample's
    index: int  # the sample's
    reason: str

    @classmethod
    def from_json(cls, line: str) -> Self:
        """Raises ValueError for what `to_json` does not write, RecursionError for deep nesting."""
        content = json.loads(line)
        kinds = {field.name: field.type for field in fields(cls)}
        if not isinstance(content, dict) or {name: type(value) for name, value in content.items()} != kinds:
            raise ValueError("no line of bad_images.jsonl")
        return cls(**content)

    def to_json(self) -> bytes:
        # A surrogate, which JSON may hold and UTF-8 may not, stays an escape.
        return json.dumps(asdict(self), ensure_ascii=False).encode("utf-8", "backslashreplace") + b"\n"


def partial_folder(path: Path) -> Path:
    """Return the folder in which X.beton is built: X.beton.part."""
    return path.with_name(path.name + ".part")


class PartialBuild:
    """The folder X.beton.part/, as a context manager: locked, so that one process at a time builds X.beton.

    Attributes:
        rows: format.ROW of the images that have been processed, in the order of the file.
        bad: those of them that are bad.
        pages: the file to which samples are written.
    """

    def __init__(self, path: Path, key: dict[str, Any], capacity: int) -> None:
        """Resume the build of `path` if it was started with the same `key`, otherwise start it.

        `key` is everything that the content of the file depends on. `capacity` counts all images, good or bad.
        """
        self.path = path
        self.folder = partial_folder(path)
        self.pages = self.folder / "pages"
        self.capacity = capacity
        self.bad: list[BadImage] = []
        self._key = json.loads(json.dumps({**key, "row_bytes": ROW.itemsize}))
        self._rows = np.zeros(capacity, ROW)
        self._processed = self._rows_saved = 0
        self._last_save = time.monotonic()

    def __enter__(self) -> Self:
        make_folder(self.folder)
        for name in FILES:
            # An earlier build left it, or somebody else: a link would lead to another file.
            with contextlib.suppress(FileNotFoundError):
                open_regular(self.folder / name, "r+b").close()
        self._lock = open_regular(self.folder / "lock", "w")
        try:
            if not try_lock(self._lock):
                warning = f"warning: {self.path} is on a file system without locks: build it with one process."
                print_line(console(stderr=True), warning)
        except BlockingIOError:
            self._lock.close()
            raise UserError(
                f"Another process is building {self.path}", hint="wait for it, or use another --out"
            ) from None
        if not self._resume():
            self.restart()
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is not None:
            with contextlib.suppress(OSError):  # a full disk; what was saved before stays true
                self.save()
        if kind is None or not len(self.good):
            with contextlib.suppress(OSError):  # what else is in the folder is not ours, and stays with it
                for name in FILES:
                    (self.folder / name).unlink(missing_ok=True)
                self.folder.rmdir()
        self._lock.close()

    @property
    def rows(self) -> np.ndarray:
        return self._rows[: self._processed]

    @property
    def good(self) -> np.ndarray:
        """The rows of the samples, which are the images that are not bad."""
        return self.rows[self.rows["case"] != Case.BAD]

    @property
    def position(self) -> int:
        """The end of the last sample, in bytes."""
        if not len(self.good):
            return data_start(self.capacity)
        last = self.good[-1]
        return int(last["data_ptr"]) + int(last["size"])

    @property
    def started(self) -> int:
        """When the build was started, in ns since the epoch by the clock of the file system."""
        return (self.folder / "build.json").stat().st_mtime_ns

    def restart(self) -> None:
        """Discard all that has been built."""
        for name in ("build.json", "rows", "bad.jsonl", "manifest.json"):
            (self.folder / name).unlink(missing_ok=True)
        self.pages.write_bytes(b"")
        (self.folder / "build.json").write_text(json.dumps(self._key, indent=1), encoding="utf-8")
        self.bad = []
        self._processed = self._rows_saved = 0

    def add(self, rows: np.ndarray, bad: list[BadImage]) -> None:
        """Record images whose samples have been written to `pages`, and save the record every few seconds."""
        self._rows[self._processed : self._processed + len(rows)] = rows
        self._processed += len(rows)
        self.bad += bad
        if time.monotonic() - self._last_save >= SAVE_EVERY:
            self.save()

    def save(self) -> None:
        """Return when all that has been added would survive a power cut.

        If it is interrupted (Ctrl-C, a full disk) and called again, each row is still saved once.
        """
        sync(self.pages)
        # There are few, so all are written again.
        _write_at(self.folder / "bad.jsonl", 0, b"".join(image.to_json() for image in self.bad))
        new_rows = self.rows[self._rows_saved :]
        _write_at(self.folder / "rows", self._rows_saved * ROW.itemsize, new_rows.tobytes())
        self._rows_saved = self._processed
        self._last_save = time.monotonic()

    def finish(self, manifest: dict[str, Any], names_file: Path, names: Iterable[str]) -> None:
        """Complete the file, and give it, the list of names and the manifest their final names."""
        with open(self.pages, "r+b") as file:
            metadata = write_tables(file, self.good, self.position, manifest.get("channels", RGB))
            size = file.seek(0, os.SEEK_END)
        checksums = {
            "algorithm": "crc32",
            "metadata": f"{zlib.crc32(metadata.tobytes()):08x}",
            "samples": self.good["crc32"].astype(">u4").tobytes().hex(),
        }
        manifest = {**manifest, "bytes": size, "checksums": checksums}
        manifest_part = self.folder / "manifest.json"
        names_part = self.folder / "names.txt"
        with open(names_part, "w", encoding="utf-8", errors="surrogateescape") as file:
            file.writelines(name.replace("\n", "\\n") + "\n" for name in names)
        manifest_part.write_text(json.dumps(manifest, indent=1, ensure_ascii=False), "utf-8")
        for part in (names_part, manifest_part):
            sync(part)
        # The manifest gets the time at which the build was started: if a source changes later, the file is outdated.
        started = self.started
        os.utime(manifest_part, ns=(started, started))

        # The old manifest goes first: a .beton without a manifest can be read, but with a wrong one it is misread.
        # The new manifest comes last: it tells that the other files are complete.
        if is_shard(self.path):
            set_manifest_path(set_of(self.path)).unlink(missing_ok=True)
        manifest_path(self.path).unlink(missing_ok=True)
        replace_durably(self.pages, self.path)
        replace_durably(names_part, names_file)
        replace_durably(manifest_part, manifest_path(self.path))

    def _resume(self) -> bool:
        """Read what an earlier process has built. Returns False if there is nothing that can be used."""
        try:
            if (self.folder / "manifest.json").exists() and not self.pages.exists():
                # The process was stopped in `finish`, after the file had got its final name.
                open_regular(self.path, "r+b").close()  # and no link to another file
                os.replace(self.path, self.pages)
            size = self.pages.stat().st_size
            key = json.loads((self.folder / "build.json").read_bytes())
            rows = np.frombuffer((self.folder / "rows").read_bytes()[: self._rows.nbytes], np.uint8)
            lines = (self.folder / "bad.jsonl").read_text("utf-8").split("\n")
            bad = [BadImage.from_json(line) for line in lines if line]
        except (OSError, ValueError, RecursionError):
            return False
        self._processed = len(rows) // ROW.itemsize
        self._rows[: self._processed] = rows[: self._processed * ROW.itemsize].view(ROW)
        if key != self._key or size < self.position:
            return False
        # Cut off what was written after the last complete save.
        os.truncate(self.pages, self.position if len(self.good) else 0)
        os.truncate(self.folder / "rows", self.rows.nbytes)
        self.bad = bad[: len(self.rows) - len(self.good)]
        (self.folder / "bad.jsonl").write_bytes(b"".join(image.to_json() for image in self.bad))
        self._rows_saved = self._processed
        return True


def _write_at(path: Path, position: int, content: bytes) -> None:
    """Write to a file from byte `position` on, and wait until that is on the disk."""
    path.touch()
    with open(path, "r+b") as file:
        file.seek(position)
        file.write(content)
    sync(path)
