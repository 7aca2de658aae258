"""The list of a source's images, made once for all processes that build its shards.

OUT/list-of-00064/ holds
    header.json   what was listed, with which options, and where the images of each shard are in the next files
    train.jsonl   a line for each image of the split, in the order of the shards: [index, label, name, image]
    lock          held while the list is made
An image is the path of a file, [path, offset, size], or {"class": NAME, ...}: the fields of one of the builder's
IMAGE_CLASSES. Paths are relative to --source, which may be elsewhere on another machine, and lead to nothing outside of
it. Where a builder holds images in memory, or names files outside of --source, every process lists the source itself.

A list is used while what it was read from is as it was: a --source that is a file, the archives and tables that hold
images, and the builder's LABEL_FILES, by size and time of change. Another --source must hold the same images, by a spot
check.

The folder may come from elsewhere: nothing in it is run. The header is checked by its schema, the lines by their types
and their SHA-256.
"""

import contextlib
import hashlib
import json
import os
import time
from array import array
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields
from importlib.metadata import version
from pathlib import Path
from typing import Annotated, Any

import numpy as np
from pydantic import BaseModel, Field

from fastssl.beton.accounting import count_files
from fastssl.beton.format import RGB
from fastssl.beton.listing import SPOT_CHECKED, ListedSplit, Listing, list_source, spot_check, spot_checked
from fastssl.beton.manifest import read_checked
from fastssl.beton.options import BuildOptions
from fastssl.beton.shards import Shard, check_shards
from fastssl.beton.source import (
    ImageSource,
    Sample,
    SampleList,
    SourceSplit,
    as_utf8,
    file_of,
    load_builder,
)
from fastssl.common.errors import UserError
from fastssl.common.files import make_folder, open_regular, try_lock, write_atomically
from fastssl.common.schema import Count
from fastssl.common.terminal import console, print_line, printable, progress, time_in_words

LONGEST_LINE = 1 << 20  # bytes
SAY_EVERY = 60.0  # seconds, while another process lists the source
Sha256 = Annotated[str, Field(pattern="^[0-9a-f]{64}$")]


class _Slice(BaseModel, strict=True):
    """Where the images of a shard are in the file of its split."""

    start: Count  # bytes
    size: Count
    sha256: Sha256


class _Stamp(BaseModel, strict=True):
    """What a file was when it was read."""

    size: Count  # bytes
    changed: Annotated[int, Field(ge=0, lt=2**63)]  # ns since the epoch


class _Split(BaseModel, strict=True):
    name: Annotated[str, Field(pattern=r"^[^/\x00]+$")]
    classes: list[str]
    empty_classes: list[str]
    left_out: dict[str, Count]
    samples: Count  # with those that --limit leaves out
    images: Count
    sample_list_sha256: Sha256
    spot_check: Sha256  # see `listing.spot_check`
    spot_checked: Annotated[list[str], Field(max_length=SPOT_CHECKED)]  # its images, as in a line of the list
    shards: list[_Slice]


class _Header(BaseModel, strict=True):
    # All that the list depends on, but for the source: see `_what_is_listed`.
    listed: dict[str, str | int | float | bool | None]
    source: str | None
    is_shared: bool  # False: every process lists the source itself
    files: dict[str, Count] | None
    tables: dict[str, _Stamp]  # the files that were read to list the images, by their paths as JSON
    splits: list[_Split]


class _Damaged(ValueError):
    """A list that cannot be used; the message says why."""


class _Outdated(_Damaged):
    """A list of what the source was; the message says what has changed."""


class _CannotRead(UserError):
    """A list is there, and reading it fails, which may pass: another process or a network disk replaces it."""


class _CannotShare(Exception):
    """An image that no list can hold."""


def list_folder(out: Path, shards: int) -> Path:
    return out / f"list-of-{shards:05}"


def make_list(builder: str, source: Path | None, out: Path, options: BuildOptions) -> Listing:
    """List the images of a source, and replace the list in OUT, which other processes use. Returns all images."""
    assert options.shards is not None
    folder = list_folder(out, options.shards)
    tables = _label_files(builder, source)
    listing = _list_checked(builder, source, out, options)
    make_folder(folder)
    with _locked(folder):
        return _write(folder, listing, tables, builder, source, options)


def read_or_make_list(builder: str, source: Path | None, out: Path, options: BuildOptions) -> Listing:
    """Return the images of the shard that is asked for, or of all: by the list in OUT, made if there is none."""
    assert options.shards is not None
    folder = list_folder(out, options.shards)
    # If another process is replacing it, the next look is under the lock.
    with contextlib.suppress(_Damaged, _CannotRead):
        if (found := _read(folder, builder, source, options)) is not None:
            return found
    make_folder(folder)
    with _locked(folder):
        try:
            if (found := _read(folder, builder, source, options)) is not None:
                return found
        except _Damaged as error:
            what = "outdated" if isinstance(error, _Outdated) else "damaged"
            print_line(console(stderr=True), f"The list in {folder} is {what} ({error}), so it is made again.")
        tables = _label_files(builder, source)
        listing = _write(folder, _list_checked(builder, source, out, options), tables, builder, source, options)
    return _of_shard(listing, options)


@contextlib.contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Hold the lock of a list, after waiting for the process that holds it. Without locks, several may list at once."""
    with open_regular(folder / "lock", "w") as file:
        start = said = time.monotonic()
        line = f"Another process lists the images in {folder}: waiting for it"
        while True:
            try:
                try_lock(file)
                break
            except BlockingIOError:
                if said == start or time.monotonic() - said >= SAY_EVERY:
                    said = time.monotonic()
                    print_line(console(stderr=True), f"{line} ({time_in_words(said - start)}).")
                time.sleep(0.2)
        yield


def _what_is_listed(builder: str, options: BuildOptions) -> dict[str, str | int | float | bool | None]:
    """Return all that a list depends on, but for the source, which may be elsewhere on another machine."""
    return {
        "fastssl": version("fastssl-trainer"),
        "builder": builder,
        "order": options.order,
        "limit": options.limit,
        "splits": options.splits,
        "arrays": options.channels != RGB,
        "shards": options.shards,
        "hold_out": options.hold_out,
    }


# --- what a list is read from -------------------------------------------------------------------


def _stamp(path: str | os.PathLike[str]) -> _Stamp | None:
    """Return what a file is now, None if it is not there."""
    try:
        status = os.stat(path)
    except (FileNotFoundError, NotADirectoryError):
        return None
    return _Stamp(size=status.st_size, changed=status.st_mtime_ns % 2**63)


def _label_files(builder: str, source: Path | None) -> dict[str, _Stamp]:
    """Return the files that tell a builder its images or labels, by their paths: a source that is one, LABEL_FILES."""
    if source is None:
        return {}
    patterns = getattr(load_builder(builder), "LABEL_FILES", ())
    found = [source] if source.is_file() else [path for pattern in patterns for path in source.glob(pattern)]
    return {os.fspath(path): stamp for path in found if path.is_file() and (stamp := _stamp(path))}


def _check_tables(header: _Header, paths: "_Paths", builder: str, source: Path | None) -> None:
    """Raise _Outdated if what the list was read from has changed."""
    try:
        then = {str(paths.decode(json.loads(name))): stamp for name, stamp in header.tables.items()}
    except (ValueError, RecursionError) as error:
        raise _Damaged("it names a table that is no file") from error
    now = _label_files(builder, source)
    for path in [*then, *now]:
        found = now.get(path) or _stamp(path)
        if found != then.get(path):
            what = "is missing" if found is None else "has changed since" if path in then else "is new"
            raise _Outdated(f"{printable(path)} {what}")


# --- write --------------------------------------------------------------------------------------


def _list_checked(builder: str, source: Path | None, out: Path, options: BuildOptions) -> Listing:
    """List the source, and refuse shards that cannot be."""
    listing = list_source(builder, source, options)
    for each in listing.splits:
        check_shards(each.split.name, each.images, out, options.shards)
    return listing


def _write(
    folder: Path,
    listing: Listing,
    tables: dict[str, _Stamp],
    builder: str,
    source: Path | None,
    options: BuildOptions,
) -> Listing:
    """Write the list. Its header goes first and comes last, so that it is never next to lines of another list.

    tables: the label files as they were before the source was listed; those that images are in are added.
    """
    shards = options.shards
    assert shards is not None
    (folder / "header.json").unlink(missing_ok=True)
    header = _Header(
        listed=_what_is_listed(builder, options),
        source=_absolute(source),
        is_shared=True,
        files=None,
        tables={},
        splits=[],
    )
    paths = _Paths.of(builder, source)
    try:
        header.splits = [_write_split(folder, each, shards, paths, tables) for each in listing.splits]
        header.tables = {json.dumps(paths.encode(path)): stamp for path, stamp in tables.items()}
    except _CannotShare:
        header.is_shared = False
        header.splits = []
    else:
        arrays = options.channels != RGB
        files = count_files(builder, source, [each.split for each in listing.splits], arrays)
        header.files = None if files is None else {as_utf8(what): count for what, count in files.items()}
    write_atomically(folder / "header.json", header.model_dump_json(indent=1) + "\n")
    return listing._replace(files=header.files)


def _write_split(folder: Path, listed: ListedSplit, shards: int, paths: "_Paths", tables: dict[str, _Stamp]) -> _Split:
    """Write the images of a split, and return what the header tells of them. Adds the tables that they are in."""
    split = listed.split
    slices: list[_Slice] = []

    def write(part: Path) -> None:
        with open(part, "wb") as file, progress(f"{split.name}: writing the list", listed.images) as advance:
            for number in range(shards):
                start, sha256 = file.tell(), hashlib.sha256()
                order = split.order[Shard(number, shards).bounds(listed.images)].tolist()
                for index in order:
                    image, label, name = split.samples[index]
                    # ASCII: a name that is not UTF-8 has surrogates, which JSON can escape.
                    line = json.dumps([index, label, name, paths.encode(image)]).encode() + b"\n"
                    file.write(line)
                    sha256.update(line)
                    table = None if isinstance(image, str | os.PathLike) else file_of(image)
                    if table is not None and (path := os.fspath(table)) not in tables and (stamp := _stamp(path)):
                        tables[path] = stamp  # the list holds positions in it
                advance(len(order))
                slices.append(_Slice(start=start, size=file.tell() - start, sha256=sha256.hexdigest()))

    write_atomically(folder / f"{split.name}.jsonl", write)
    return _Split(
        name=split.name,
        classes=split.classes,
        empty_classes=split.empty_classes,
        left_out={as_utf8(reason): count for reason, count in split.left_out.items()},
        samples=len(split.samples),
        images=listed.images,
        sample_list_sha256=listed.sha256,
        spot_check=listed.spot_check or "",
        spot_checked=[json.dumps(paths.encode(image)) for image in spot_checked(split)],
        shards=slices,
    )


@dataclass(frozen=True)
class _Paths:
    """How the images of a source are written into a list, and read from it."""

    source: str  # "" for a builder that brings its own images
    folder: str  # the source, or the folder of a source that is a file
    image_classes: dict[str, type]  # the builder's dataclasses that a list may hold, by name

    @classmethod
    def of(cls, builder: str, source: Path | None) -> "_Paths":
        classes = getattr(load_builder(builder), "IMAGE_CLASSES", ())
        folder = source if source is None or source.is_dir() else source.parent
        return cls(str(source or ""), str(folder or ""), {each.__name__: each for each in classes})

    def encode(self, image: ImageSource) -> Any:
        if isinstance(image, str | Path):
            return self._relative(os.fspath(image))
        if isinstance(image, tuple):
            path, offset, size = image
            return [self._relative(path), int(offset), int(size)]
        if type(image) in self.image_classes.values():
            values = {field.name: getattr(image, field.name) for field in fields(image)}  # type: ignore[arg-type]
            paths = {name: self._relative(values[name]) for name in ("path", "root") if name in values}
            return {"class": type(image).__name__, **values, **paths}
        raise _CannotShare

    def decode(self, value: Any) -> ImageSource:
        """Return the image that a list holds. Raises _Damaged for what `encode` does not write."""
        if isinstance(value, str):
            return self._absolute(value)
        if (
            isinstance(value, list)
            and len(value) == 3
            and all(type(each) is int and 0 <= each < 2**63 for each in value[1:])
        ):
            return self._absolute(value[0]), value[1], value[2]
        if isinstance(value, dict) and isinstance(value.get("class"), str) and value["class"] in self.image_classes:
            image_class = self.image_classes[value.pop("class")]
            types = {field.name: field.type for field in fields(image_class)}
            if {name: type(each) for name, each in value.items()} == types:
                value |= {name: self._absolute(value[name]) for name in ("path", "root") if name in value}
                image: ImageSource = image_class(**value)
                return image
        raise _Damaged("a line names no image")

    def _relative(self, path: str) -> str:
        """Return the path relative to the folder of the source; "" for a source that is a file, "." for the folder."""
        if path == self.folder:
            return "."
        if path == self.source:
            return ""
        below = path.removeprefix(self.folder.rstrip("/") + "/")
        if not self.folder or below == path or not _is_below(below):
            raise _CannotShare
        return below

    def _absolute(self, path: Any) -> str:
        if not isinstance(path, str) or not _is_below(path) or not _is_file_name(path):
            raise _Damaged("a line names a file outside of the source")
        return {"": self.source, ".": self.folder}.get(path) or os.path.join(self.folder, path)


def _is_file_name(path: str) -> bool:
    try:
        return b"\0" not in os.fsencode(path)
    except UnicodeEncodeError:
        return False


def _is_below(path: str) -> bool:
    return not path.startswith("/") and ".." not in path.split("/")


# --- read ---------------------------------------------------------------------------------------


def _read(folder: Path, builder: str, source: Path | None, options: BuildOptions) -> Listing | None:
    """Return the images of a shard or of all, None if there is no list of what this build would list.

    Raises _Damaged, and UserError if the list cannot be read, or `source` is not what was listed.
    """
    assert options.shards is not None
    try:
        listed_at = os.stat(folder / "header.json").st_mtime
        header = _Header.model_validate(read_checked(folder / "header.json", _Header, 0))
    except FileNotFoundError:
        return None
    except OSError as error:
        raise _cannot_read(folder, error) from error
    except ValueError as error:
        raise _Damaged(printable(str(error))[:200]) from error
    if header.listed != _what_is_listed(builder, options):
        return None
    if not header.is_shared:
        return _of_shard(list_source(builder, source, options), options)
    if not header.splits:
        raise _Damaged("it names no split")
    paths = _Paths.of(builder, source)
    try:
        _check_tables(header, paths, builder, source)
    except OSError as error:
        raise _cannot_read(folder, error) from error
    numbers = range(options.shards) if options.shard is None else [options.shard]
    shards = [Shard(number, options.shards) for number in numbers]
    splits = [_read_split(folder, split, shards, paths) for split in header.splits]
    is_own = header.source == _absolute(source)
    if not is_own:
        _check_other_source(folder, header, paths, source)
    images = sum(split.images for split in header.splits)
    made = time.strftime("%Y-%m-%d %H:%M", time.localtime(listed_at))
    of_other = "" if is_own else f" from {header.source}"
    print_line(
        console(stderr=True),
        f"Uses the list of {images:,} images in {folder}, made at {made}{of_other}. Files that were added to the "
        "source since are not in it: delete the folder to list them.",
    )
    return Listing(splits, header.files if is_own else {})  # its files were counted in the other source


def _of_shard(listing: Listing, options: BuildOptions) -> Listing:
    """Return of a list of all images those of the shard that is asked for."""
    if options.shards is None or options.shard is None:
        return listing
    shard = Shard(options.shard, options.shards)
    splits = []
    for listed in listing.splits:
        order = listed.split.order[shard.bounds(listed.images)]
        splits.append(listed._replace(split=listed.split._replace(order=order)))
    return listing._replace(splits=splits)


def _read_split(folder: Path, split: _Split, shards: list[Shard], paths: _Paths) -> ListedSplit:
    """Return the images of some shards of a split, which follow each other."""
    bounds = [shard.bounds(split.images) for shard in shards]
    if len(split.shards) != shards[0].shards or not split.images <= split.samples:
        raise _Damaged("its numbers do not fit together")
    index_N = array("q")

    def samples() -> Iterator[Sample]:
        for shard in shards:
            for line in _lines(folder / f"{split.name}.jsonl", split.shards[shard.number]):
                index, sample = _parse(line, paths)
                index_N.append(index)
                yield sample

    try:
        sample_list = SampleList(samples())
    except FileNotFoundError as error:
        raise _Damaged(f"{split.name}.jsonl is missing") from error
    except OSError as error:
        raise _cannot_read(folder, error) from error
    order = np.array(index_N, np.int64)
    if len(order) != bounds[-1].stop - bounds[0].start or len(np.unique(order)) != len(order):
        raise _Damaged(f"{split.name}.jsonl names other images than the header")
    if len(order) and not 0 <= order.min() <= order.max() < split.samples:
        raise _Damaged(f"{split.name}.jsonl has an index that is none")
    of_shard = SourceSplit(
        split.name,
        split.classes,
        SomeSamples(sample_list, order, split.samples),
        order,
        split.empty_classes,
        split.left_out,
    )
    return ListedSplit(of_shard, split.images, split.sample_list_sha256, split.spot_check)


def _lines(path: Path, part: _Slice) -> Iterator[bytes]:
    """Yield the lines of a shard, and compare them with their SHA-256 at the end."""
    sha256 = hashlib.sha256()
    left = part.size
    with open_regular(path) as file:
        file.seek(part.start)
        while left:
            line: bytes = file.readline(min(left, LONGEST_LINE))
            if not line.endswith(b"\n"):
                raise _Damaged(f"{path.name} is cut off")
            left -= len(line)
            sha256.update(line)
            yield line
    if sha256.hexdigest() != part.sha256:
        raise _Damaged(f"{path.name} has changed since it was written")


def _parse(line: bytes, paths: _Paths) -> tuple[int, Sample]:
    try:
        index, label, name, image = json.loads(line)
        if type(index) is not int or type(label) is not int:
            raise TypeError
        os.fsencode(name)  # it may have surrogates, but only those of bytes that are not UTF-8
    except (ValueError, TypeError, RecursionError) as error:
        raise _Damaged("a line is no list of index, label, name and image") from error
    if not max(abs(index), abs(label)) < 2**63:
        raise _Damaged("a line has a number that is too large")
    return index, Sample(paths.decode(image), label, name)


def _absolute(source: Path | None) -> str | None:
    return None if source is None else printable(os.path.abspath(source))


def _check_other_source(folder: Path, header: _Header, paths: _Paths, source: Path | None) -> None:
    """Refuse another data set: the source may be elsewhere on this machine, but must hold the same images."""
    for split in header.splits:
        try:
            images = [paths.decode(json.loads(image)) for image in split.spot_checked]
        except (ValueError, RecursionError) as error:
            raise _Damaged("it names no images for a spot check") from error
        if spot_check(images) != split.spot_check:
            missing = any((path := file_of(image)) and not os.path.lexists(path) for image in images)
            what = "does not hold its images" if missing else "holds other images"
            raise UserError(
                f"The list in {folder} is of {header.source}, and {source} {what}",
                hint="name the same images with --source, or use another --out, or delete that folder to list it",
            )


def _cannot_read(folder: Path, error: OSError) -> UserError:
    is_forbidden = isinstance(error, PermissionError)
    return _CannotRead(
        f"The list of images in {folder} cannot be read ({error.strerror})",
        hint=f"{'make it readable for your user' if is_forbidden else 'run the same command again'}, "
        "or delete it, and the source is listed again",
    )


class SomeSamples(Sequence[Sample]):
    """Those of many samples that a shard holds, by their index among all of them."""

    def __init__(self, samples: SampleList, index_N: np.ndarray, total: int) -> None:
        self._samples = samples
        self._row_N = np.argsort(index_N)
        self._index_N = index_N[self._row_N]  # sorted
        self._total = total

    def __len__(self) -> int:
        return self._total

    def __getitem__(self, index: int) -> Sample:  # type: ignore[override]  # slices are not needed
        position = int(np.searchsorted(self._index_N, index))
        if position == len(self._index_N) or self._index_N[position] != index:
            raise IndexError(index)
        return self._samples[int(self._row_N[position])]
