"""A .beton while it is being built, kept so that a build that was stopped can go on.

X.beton.part/ holds
    build.json   what is being built: the options and a digest of the list of images
    pages        the file itself, still without tables and header
    rows         what is in it: one write.ROW an image that was handled
    bad.jsonl    the name and the reason of each of them that was bad
The rows of an image are written after its pages are on the disk, so whatever stops a build, the
rows that are there are true. Delete the folder to begin anew.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import shutil
import time
import zlib
from collections.abc import Iterable
from pathlib import Path

import numpy as np

from fastssl.beton.images import Case
from fastssl.beton.write import ROW, data_start, write_tables
from fastssl.common.errors import UserError
from fastssl.common.files import replace_durably

SAVE_EVERY = 5.0  # seconds; at most that much work is done twice


class PartialBuild:
    """The folder X.beton.part/, in the hands of one process at a time.

    `rows` (ROW) and `bad` tell what has been handled, in the order of the build.
    """

    def __init__(self, path: Path, key: dict, capacity: int) -> None:
        """Take up the folder beside `path` if it was begun with the same `key`, else begin anew."""
        self.path = path
        self.folder = path.with_name(path.name + ".part")
        self.pages = self.folder / "pages"
        self.capacity = capacity
        self._key = json.loads(json.dumps({**key, "row_bytes": ROW.itemsize}))
        self._rows = np.zeros(capacity, ROW)

    def __enter__(self) -> PartialBuild:
        self.folder.mkdir(parents=True, exist_ok=True)
        self._lock = open(self.folder / "lock", "w")
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            self._lock.close()
            raise UserError(f"Another process is building {self.path}; wait for it, or give another --out.") from None
        if not self._take_up():
            self.begin_anew()
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is not None:
            with contextlib.suppress(OSError):  # a full disk; what was saved before stays true
                self.save()
        if kind is None or not len(self.good):
            shutil.rmtree(self.folder, ignore_errors=True)
        self._lock.close()

    @property
    def rows(self) -> np.ndarray:
        return self._rows[: self._done]

    @property
    def good(self) -> np.ndarray:
        return self.rows[self.rows["case"] != Case.BAD]

    @property
    def position(self) -> int:
        """The byte behind the last sample."""
        if not len(self.good):
            return data_start(self.capacity)
        last = self.good[-1]
        return int(last["data_ptr"]) + int(last["size"])

    @property
    def started(self) -> int:
        """When the build was begun, in ns since the epoch by the clock of the file system."""
        return (self.folder / "build.json").stat().st_mtime_ns

    def begin_anew(self) -> None:
        for name in ("build.json", "rows", "bad.jsonl", "manifest.json"):
            (self.folder / name).unlink(missing_ok=True)
        self.pages.write_bytes(b"")
        (self.folder / "build.json").write_text(json.dumps(self._key, indent=1), encoding="utf-8")
        self.bad: list[dict] = []
        self._done = self._rows_saved = self._bad_saved = 0
        self._last_save = time.monotonic()

    def add(self, rows: np.ndarray, bad: list[dict]) -> None:
        """Take note of images that have been handled; every few seconds that is saved."""
        self._rows[self._done : self._done + len(rows)] = rows
        self._done += len(rows)
        self.bad += bad
        if time.monotonic() - self._last_save >= SAVE_EVERY:
            self.save()

    def save(self) -> None:
        """Wait until all that has been added would be found again after a power cut.

        Whatever interrupts it (Ctrl-C, a full disk), doing it again leaves each row there once.
        """
        with open(self.pages, "rb") as file:
            os.fsync(file.fileno())
        lines = [json.dumps(entry, ensure_ascii=False) + "\n" for entry in self.bad]
        before = len("".join(lines[: self._bad_saved]).encode())
        _write_from(self.folder / "bad.jsonl", before, "".join(lines[self._bad_saved :]).encode())
        rows = self._rows[self._rows_saved : self._done].tobytes()
        _write_from(self.folder / "rows", self._rows_saved * ROW.itemsize, rows)
        self._rows_saved, self._bad_saved = self._done, len(self.bad)
        self._last_save = time.monotonic()

    def finish(self, manifest: dict, names: Iterable[str]) -> None:
        """Give the file, the names and the manifest beside it their final names."""
        with open(self.pages, "r+b") as file:
            metadata = write_tables(file, self.good, self.position)
            size = file.seek(0, os.SEEK_END)
        manifest = {
            **manifest,
            "bytes": size,
            "checksums": {
                "algorithm": "crc32",
                "metadata": f"{zlib.crc32(metadata.tobytes()):08x}",
                "samples": self.good["crc32"].astype(">u4").tobytes().hex(),
            },
        }
        started = self.started
        manifest_part, names_part = self.folder / "manifest.json", self.folder / "names.txt"
        with open(names_part, "w", encoding="utf-8", errors="surrogateescape") as file:
            file.writelines(name.replace("\n", "\\n") + "\n" for name in names)
        manifest_part.write_text(json.dumps(manifest, indent=1, ensure_ascii=False), "utf-8")
        for part in (names_part, manifest_part):
            with open(part, "rb") as file:
                os.fsync(file.fileno())
        # The manifest carries the time at which the build began: sources that changed later than
        # that make it out of date.
        os.utime(manifest_part, ns=(started, started))

        # The old manifest goes first: a .beton without one can be read, with a wrong one it
        # would be misread. The new one comes last: it says that all is there.
        manifest_path(self.path).unlink(missing_ok=True)
        replace_durably(self.pages, self.path)
        replace_durably(names_part, names_path(self.path))
        replace_durably(manifest_part, manifest_path(self.path))

    def _take_up(self) -> bool:
        """Read what an earlier process has done; False where there is nothing that can be used."""
        try:
            if (self.folder / "manifest.json").exists() and not self.pages.exists():
                # It was stopped within `finish`, with the file under its final name already.
                os.replace(self.path, self.pages)
            size = self.pages.stat().st_size
            key = json.loads((self.folder / "build.json").read_bytes())
            rows = np.frombuffer((self.folder / "rows").read_bytes()[: self._rows.nbytes], np.uint8)
            lines = (self.folder / "bad.jsonl").read_text("utf-8").split("\n")
        except (OSError, ValueError):
            return False
        self._done = len(rows) // ROW.itemsize
        self._rows[: self._done] = rows[: self._done * ROW.itemsize].view(ROW)
        bad_lines = lines[: int((self.rows["case"] == Case.BAD).sum())]
        if key != self._key or size < self.position:
            return False
        # What was written after the last time that everything was saved is cut off.
        os.truncate(self.pages, self.position if len(self.good) else 0)
        os.truncate(self.folder / "rows", self.rows.nbytes)
        text = "".join(line + "\n" for line in bad_lines)
        (self.folder / "bad.jsonl").write_text(text, "utf-8")
        self.bad = [json.loads(line) for line in bad_lines]
        self._rows_saved, self._bad_saved = self._done, len(self.bad)
        self._last_save = time.monotonic()
        return True


def manifest_path(path: Path) -> Path:
    """X.beton.json: how X.beton was built, what became of the images, its classes and checksums."""
    return path.with_name(path.name + ".json")


def names_path(path: Path) -> Path:
    """X.beton.names.txt: line i + 1 is the name of the image whose `index` is i."""
    return path.with_name(path.name + ".names.txt")


def _write_from(path: Path, position: int, content: bytes) -> None:
    path.touch()
    with open(path, "r+b") as file:
        file.seek(position)
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
