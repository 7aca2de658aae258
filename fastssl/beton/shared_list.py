"""The list of a source's images, made once for all processes that build its shards.

OUT/list-of-00064/ holds
    header.json   what was listed, with which options, and where the images of each shard are in the next files
    train.jsonl   a line for each image of the split, in the order of the shards: [index, label, name, image]
    lock          held while the list is made
An image is the path of a file, [path, offset, size], or {"class": NAME, ...}: the fields of one of the builder's
IMAGE_CLASSES. Paths are relative to --source, which may be elsewhere on another machine, and lead to nothing outside of
it. Where a builder holds images in memory, or names files outside of --source, every process lists the source itself.

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
from fastssl.beton.listing import ListedSplit, Listing, list_source
from fastssl.beton.manifest import Count, read_checked
from fastssl.beton.options import BuildOptions
from fastssl.beton.shards import Shard, check_shards
from fastssl.beton.source import (
    ImageSource,
    Sample,
    SampleList,
    SourceSplit,
    as_utf8,
    load_builder,
)
from fastssl.common.errors import UserError
from fastssl.common.files import make_folder, open_regular, try_lock, write_atomically
from fastssl.common.terminal import console, print_line, printable, progress, time_in_words

LONGEST_LINE = 1 << 20  # bytes
SAY_EVERY = 60.0  # seconds, while another process lists the source
Sha256 = Annotated[str, Field(pattern="^[0-9a-f]{64}$")]


class _Slice(BaseModel, strict=True):
    """Where the images of a shard are in the file of its split."""

    start: Count  # bytes
    size: Count
    sha256: Sha256


class _Split(BaseModel, strict=True):
    name: Annotated[str, Field(pattern=r"^[^/\x00]+$")]
    classes: list[str]
    empty_classes: list[str]
    left_out: dict[str, Count]
    samples: Count  # with those that --limit leaves out
    images: Count
    sample_list_sha256: Sha256
    shards: list[_Slice]


class _Header(BaseModel, strict=True):
    listed: dict[
        str, str | int | bool | None
    ]  # all that the list depends on, but for the source: see `_what_is_listed`
    source: str | None
    is_shared: bool  # False: every process lists the source itself
    files: dict[str, Count] | None
    splits: list[_Split]


class _Damaged(ValueError):
    """A list that cannot be used; the message says why."""


class _CannotShare(Exception):
    """An image that no list can hold."""


def list_folder(out: Path, shards: int) -> Path:
    return out / f"list-of-{shards:05}"


def make_list(builder: str, source: Path | None, out: Path, options: BuildOptions) -> Listing:
    """List the images of a source, and replace the list in OUT, which other processes use. Returns all images."""
    assert options.shards is not None
    folder = list_folder(out, options.shards)
    listing = _list_checked(builder, source, out, options)
    make_folder(folder)
    with _locked(folder):
        return _write(folder, listing, builder, source, options)


def read_or_make_list(builder: str, source: Path | None, out: Path, options: BuildOptions) -> Listing:
    """Return the images of the shard that is asked for, or of all: by the list in OUT, made if there is none."""
    assert options.shards is not None
    folder = list_folder(out, options.shards)
    with contextlib.suppress(_Damaged):  # or another process is replacing it: the next look is under the lock
        if (found := _read(folder, builder, source, options)) is not None:
            return found
    make_folder(folder)
    with _locked(folder):
        try:
            if (found := _read(folder, builder, source, options)) is not None:
                return found
        except _Damaged as error:
            print_line(console(stderr=True), f"The list in {folder} is damaged ({error}), so it is made again.")
        listing = _write(folder, _list_checked(builder, source, out, options), builder, source, options)
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


def _what_is_listed(builder: str, options: BuildOptions) -> dict[str, str | int | bool | None]:
    """Return all that a list depends on, but for the source, which may be elsewhere on another machine."""
    return {
        "fastssl": version("fastssl-trainer"),
        "builder": builder,
        "order": options.order,
        "limit": options.limit,
        "splits": options.splits,
        "arrays": options.channels != RGB,
        "shards": options.shards,
    }


# --- write --------------------------------------------------------------------------------------


def _list_checked(builder: str, source: Path | None, out: Path, options: BuildOptions) -> Listing:
    """List the source, and refuse shards that cannot be."""
    listing = list_source(builder, source, options)
    for each in listing.splits:
        check_shards(each.split.name, each.images, out, options.shards)
    return listing


def _write(folder: Path, listing: Listing, builder: str, source: Path | None, options: BuildOptions) -> Listing:
    """Write the list. Its header goes first and comes last, so that it is never next to lines of another list."""
    shards = options.shards
    assert shards is not None
    (folder / "header.json").unlink(missing_ok=True)
    header = _Header(
        listed=_what_is_listed(builder, options),
        source=None if source is None else printable(str(source)),
        is_shared=True,
        files=None,
        splits=[],
    )
    paths = _Paths.of(builder, source)
    try:
        header.splits = [_write_split(folder, each, shards, paths) for each in listing.splits]
    except _CannotShare:
        header.is_shared = False
        header.splits = []
    else:
        arrays = options.channels != RGB
        files = count_files(builder, source, [each.split for each in listing.splits], arrays)
        header.files = None if files is None else {as_utf8(what): count for what, count in files.items()}
    write_atomically(folder / "header.json", header.model_dump_json(indent=1) + "\n")
    return listing._replace(files=header.files)


def _write_split(folder: Path, listed: ListedSplit, shards: int, paths: "_Paths") -> _Split:
    """Write the images of a split, and return what the header tells of them."""
    split = listed.split
    slices: list[_Slice] = []

    def write(path: Path) -> None:
        with open(path, "wb") as file, progress(f"{split.name}: writing the list", listed.images) as advance:
            for number in range(shards):
                start, sha256 = file.tell(), hashlib.sha256()
                order = split.order[Shard(number, shards).bounds(listed.images)].tolist()
                for index in order:
                    image, label, name = split.samples[index]
                    # ASCII: a name that is not UTF-8 has surrogates, which JSON can escape.
                    line = json.dumps([index, label, name, paths.encode(image)]).encode() + b"\n"
                    file.write(line)
                    sha256.update(line)
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
    paths = _Paths.of(builder, source)
    numbers = range(options.shards) if options.shard is None else [options.shard]
    shards = [Shard(number, options.shards) for number in numbers]
    splits = [_read_split(folder, split, shards, paths) for split in header.splits]
    _check_source(folder, header, splits, source)
    images = sum(split.images for split in header.splits)
    made = time.strftime("%Y-%m-%d %H:%M", time.localtime(listed_at))
    print_line(
        console(stderr=True),
        f"Uses the list of {images:,} images in {folder}, made at {made}. Files that were added to the source since "
        "are not in it: delete the folder to list them.",
    )
    return Listing(splits, header.files)


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
    return ListedSplit(of_shard, split.images, split.sample_list_sha256)


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


def _check_source(folder: Path, header: _Header, splits: list[ListedSplit], source: Path | None) -> None:
    """Refuse another data set: the source may be elsewhere on this machine, but must hold the first image."""
    if source is None or header.source == printable(str(source)):
        return
    split = next((each.split for each in splits if len(each.split.order)), None)
    if split is None:
        return
    image, _, name = split.samples[int(split.order[0])]
    path = image if isinstance(image, str) else image[0] if isinstance(image, tuple) else getattr(image, "path", None)
    if path is not None and not os.path.lexists(path):
        raise UserError(
            f"The list in {folder} is of {header.source}, and {source} does not hold its image {printable(name)}",
            hint="name the same images with --source, or delete that folder, and they are listed again",
        )


def _cannot_read(folder: Path, error: OSError) -> UserError:
    return UserError(
        f"The list of images in {folder} cannot be read ({error.strerror})",
        hint="make it readable for your user, or delete it, and the source is listed again",
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
