"""Read a .beton, and check it before compiled code follows its pointers.

FFCV's compiled readers trust every pointer and size in the file. Everything that they follow is checked here first,
with numpy, in a fraction of a second per million samples: a truncated, damaged or malicious file raises a UserError.
Files of stock FFCV are read too. Images are not decoded here.
"""

import bisect
import ctypes
import errno
import hashlib
import mmap
import os
import shlex
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np

from fastssl.beton.format import (
    ALLOCATION,
    ARRAY_FIELD,
    BC4,
    FIELD,
    FIELD_TYPES,
    HEADER,
    IMAGE_FIELD,
    INT_FIELD,
    JPG,
    LARGEST_PAGE,
    RAW,
    RGB,
    SMALLEST_PAGE,
    VERSION,
    ArrayImages,
    Manifest,
    align,
    indexed_names_path,
    manifest_path,
    metadata_type,
    names_path,
    read_array_images,
)
from fastssl.beton.shards import files_of, is_set, sets_in
from fastssl.beton.source import BUILT_SPLITS, how_to_make
from fastssl.common.errors import UserError, quote
from fastssl.common.files import UnsafeFile, open_regular

LARGEST_SOURCE_SIDE = 2**31 - 1  # px; areas then fit into 64 bits
LONGEST_NAME = 1 << 20  # bytes of a line of X.beton.names.txt
MOST_DIGITS = 18  # of an index that int64 holds
MAP_FIXED = 0x10  # of <sys/mman.h>
MOST_FIELDS = 256  # far above any real file; limits what a damaged header can make us read

_libc = ctypes.CDLL(None, use_errno=True)
_libc.mmap.restype = ctypes.c_void_p
_libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, *[ctypes.c_int] * 3, ctypes.c_long]


class FilePart(NamedTuple):
    """One file of a set, or the only one."""

    path: Path
    start: int  # its first byte, where the files of the set follow each other
    size: int  # bytes
    identity: tuple[int, ...]  # see `file_identity`

    @property
    def mtime_ns(self) -> int:
        return self.identity[-1]


def file_identity(stat: os.stat_result) -> tuple[int, ...]:
    """What differs once a file has been written again or replaced by another one."""
    return stat.st_dev, stat.st_ino, stat.st_size, stat.st_mtime_ns


def file_parts(path: Path) -> tuple[FilePart, ...]:
    """Return the files of a set in their order, each with the byte at which it begins in `map_file`.

    Each begins at a multiple of FFCV's page size, so no page of the set holds data of two files.
    """
    parts = []
    start = 0
    for file in files_of(path):
        stat = os.stat(file)
        parts.append(FilePart(file, start, stat.st_size, file_identity(stat)))
        start = align(start + stat.st_size)
    return tuple(parts)


def part_at(parts: Sequence[FilePart], position: int) -> FilePart:
    """Return the file that a byte of `map_file` belongs to."""
    return parts[bisect.bisect_right(parts, position, key=lambda part: part.start) - 1]


@dataclass(frozen=True)
class BetonInfo:
    """What the header, the tables and the manifest of a .beton tell, or those of all files of a set."""

    path: Path  # of a set, its pattern: see shards.py
    parts: tuple[FilePart, ...]
    num_samples: int
    page_size: int  # bytes
    fields: dict[str, str]  # name -> name of FFCV's field class, in the order of the file
    layout: Literal["canvas", "full"]  # the manifest's; without one "canvas" if all images have one size
    storage: Literal["raw", "jpg", "bc4", "mixed"]
    channels: int  # of the images; 3: RGB
    resolution: tuple[int, int] | None  # (height, width) in px of all stored images; None if they differ
    max_resolution: tuple[int, int]  # the largest height and the largest width in px
    classes: list[str] | None  # class names; None without a manifest
    metadata_bytes: int  # size of the metadata table in the file
    manifest: Manifest | None  # the contents of X.beton.json, which build-beton writes; of a set, all together

    @property
    def file_bytes(self) -> int:
        return sum(part.size for part in self.parts)


def beton_file(path: str | Path, split: str) -> Path:
    """Return the .beton file that a user means by `path`: SPLIT.beton in it if it is a folder. `~` is expanded.

    Of a folder with SPLIT-00000-of-00064.beton and so on, it is the pattern of these shards.

    Raises:
        UserError: it is a folder without that file, or one with several such files or sets.
    """
    path = Path(path).expanduser()
    if not path.is_dir():
        return path
    file = path / f"{split}.beton"
    found = [*([file] if file.exists() else []), *sets_in(path, split)]
    if len(found) > 1:
        raise UserError(
            f"{path} holds {' and '.join(each.name for each in found)}, which may be different images",
            hint="name one of them, or move the other one",
        )
    if found:
        return found[0]
    others = sorted(other.name for other in path.glob("*.beton"))
    if others:
        raise UserError(
            f"{path} is a folder without {split}.beton", hint=f"name one of its files, {', '.join(others[:5])}"
        )
    build = f"fastssl build-beton imagefolder --source {shlex.quote(str(path))} --out DIR"
    raise UserError(
        f"{path} is a folder without {split}.beton",
        hint=f"make it with `{build}` if it holds images, and name DIR",
    )


def has_split(path: Path, split: str) -> bool:
    """Whether `path` is a folder with SPLIT.beton or with shards of it."""
    return path.is_dir() and ((path / f"{split}.beton").is_file() or bool(sets_in(path, split)))


def read_header(path: str | Path) -> BetonInfo:
    """Check all files except for their image data, and describe them. Raises UserError if one is not sound."""
    path = Path(path)
    checked = _read_checked(path)
    image = checked.metadata["image"]
    max_resolution = (int(image["height"].max()), int(image["width"].max()))
    has_one_size = max_resolution == (int(image["height"].min()), int(image["width"].min()))
    storages: dict[int, Literal["raw", "jpg", "bc4"]] = {RAW: "raw", JPG: "jpg", BC4: "bc4"}
    modes = np.unique(image["mode"]).tolist()
    manifest = _read_manifest(path, checked.samples_of_files)
    if manifest and checked.field_types.get("label") == INT_FIELD:
        _check_labels(path, checked.metadata["label"], len(manifest["classes"]))
    return BetonInfo(
        path=path,
        parts=file_parts(path),
        num_samples=len(image),
        page_size=checked.page_size,
        fields={name: FIELD_TYPES[type_id][0] for name, type_id in checked.field_types.items()},
        layout=manifest["layout"] if manifest else ("canvas" if has_one_size else "full"),
        storage=storages[modes[0]] if len(modes) == 1 else "mixed",
        channels=checked.channels,
        resolution=max_resolution if has_one_size else None,
        max_resolution=max_resolution,
        classes=manifest["classes"] if manifest else None,
        metadata_bytes=checked.metadata_bytes,
        manifest=manifest,
    )


def read_metadata(path: str | Path) -> np.ndarray:
    """Return one row per sample, with a column per field; the file is checked as by `read_header`.

    The column "image" holds mode, width, height and data_ptr, as `format.IMAGE` declares them, whatever their channels.
    """
    return _read_checked(Path(path)).metadata


def read_samples(path: str | Path) -> tuple[np.ndarray, np.ndarray]:
    """Return the rows of `read_metadata`, and the size in bytes of each stored image, int64 (num_samples,)."""
    checked = _read_checked(Path(path))
    return checked.metadata, checked.image_bytes


def read_labels(path: str | Path) -> np.ndarray:
    """Return the labels in the order of the file, int64 (num_samples,)."""
    checked = _read_checked(Path(path))
    if checked.field_types.get("label") != INT_FIELD:
        raise UserError(
            f"{path} has no integer field 'label', only {', '.join(checked.field_types)}",
            hint="build it again with fastssl build-beton",
        )
    return np.ascontiguousarray(checked.metadata["label"])


def data_checksum(info: BetonInfo) -> str:
    """Return a SHA-256 that identifies the data: of the checksums in the manifest, otherwise of the whole file."""
    from fastssl.beton.set_manifest import hash_checksums

    manifest = info.manifest or {}
    if is_set(info.path) and "files" in manifest:
        return hash_checksums([file["checksum"] for file in manifest["files"]])
    if "checksums" in manifest:
        return hash_checksums(manifest["checksums"])
    checksum = hashlib.sha256()
    for part in info.parts:
        with open(part.path, "rb") as file:
            hashlib.file_digest(file, lambda: checksum)
    return checksum.hexdigest()


def read_names(path: Path, indices: Iterable[int]) -> dict[int, str]:
    """Return the names of the images with these indices; an empty dict for files without a list of names."""
    wanted = {int(index) for index in indices}
    if not wanted or not has_names(path):
        return {}
    found = {index: name for index, name in all_names(path) if index in wanted}
    return {index: name.decode("utf-8", "surrogateescape") for index, name in found.items()}


def has_names(path: Path) -> bool:
    """Whether build-beton has written a list of names next to the file, or next to each file of a set."""
    return all(names_file(file).exists() for file in files_of(path))


def names_file(file: Path) -> Path:
    """Return the list of names of a single file or a shard."""
    return indexed_names_path(file) if indexed_names_path(file).exists() else names_path(file)


def all_names(path: Path) -> Iterator[tuple[int, bytes]]:
    """Yield index and name of each image that the build has listed: a million are never in memory.

    Only b"\n" ends a name; str.splitlines would split at more. Raises UserError if the names cannot be read.
    """
    for file in files_of(path):
        names = names_file(file)
        if names == names_path(file):
            yield from enumerate(_lines(names, file))
            continue
        for line in _lines(names, file):
            index, tab, name = line.partition(b"\t")
            if not tab or not index.isdigit() or len(index) > MOST_DIGITS:
                raise UserError(
                    f"{names} is damaged: it has a line without an index and a name",
                    hint=f"delete it, and the images of {path} have no names",
                )
            yield int(index), name


def _lines(names: Path, beton: Path) -> Iterator[bytes]:
    try:
        with open_regular(names) as file:
            for line in iter(partial(file.readline, LONGEST_NAME), b""):
                if len(line) == LONGEST_NAME:
                    raise UnsafeFile(names, f"a file with lines of {LONGEST_NAME:,} bytes")
                yield line.removesuffix(b"\n")
    except OSError as error:
        raise UserError(
            f"{names} cannot be read ({error.strerror})", hint=f"delete it, and the images of {beton} have no names"
        ) from error


class _Checked(NamedTuple):
    """The tables of a file that is sound, or of all files of a set."""

    page_size: int
    field_types: dict[str, int]  # name -> FFCV's type id
    metadata: np.ndarray  # with a format.IMAGE as the column "image"; of a set, its pointers are those of `map_file`
    metadata_bytes: int  # in the file
    image_bytes: np.ndarray
    channels: int
    file_bytes: int
    samples_of_files: tuple[int, ...]


def map_file(path: Path) -> np.ndarray:
    """Return the bytes of a file, mapped: they are read from the disk when they are used.

    Of a set, those of all files: each begins at its `FilePart.start`, and what is between two files is zeros.
    """
    try:
        if is_set(path):
            return _map_one_after_the_other(file_parts(path))
        # numba dispatches slowly on a memmap.
        return np.asarray(np.memmap(path, np.uint8, mode="r"))
    except (OSError, MemoryError) as error:
        if isinstance(error, OSError) and error.errno != errno.ENOMEM:
            raise
        size = sum(part.size for part in file_parts(path))
        raise UserError(
            f"{path} has {size / 1e9:,.1f} GB, more than the limit on the address space of a "
            "process leaves (a mapped file takes address space, not memory)",
            hint="raise the limit: ulimit -v; on Grid Engine h_vmem",
        ) from error


def _map_one_after_the_other(parts: Sequence[FilePart]) -> np.ndarray:
    """Map files into one range of addresses, so that all that reads one mapped file reads a set too."""
    total = parts[-1].start + parts[-1].size
    # Its pages are replaced by those of the files; it gives all of them back when the array is deleted.
    region = mmap.mmap(-1, total, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS, prot=mmap.PROT_READ)
    content = np.frombuffer(region, np.uint8)
    for part in parts:
        with open_regular(part.path) as file:
            address, fixed = content.ctypes.data + part.start, mmap.MAP_SHARED | MAP_FIXED
            if _libc.mmap(address, part.size, mmap.PROT_READ, fixed, file.fileno(), 0) != address:
                number = ctypes.get_errno()
                raise OSError(number, os.strerror(number), str(part.path))
    return content


def _read_checked(path: Path) -> _Checked:
    files = files_of(path)
    checked = [_read_checked_file(file) for file in files]
    return _join(path, files, checked) if is_set(path) else checked[0]


def _join(path: Path, files: Sequence[Path], checked: Sequence[_Checked]) -> _Checked:
    """Return the tables of a set. Raises UserError if its files do not belong together."""
    first = checked[0]
    start = 0
    for file, each in zip(files, checked):
        if (each.field_types, each.channels) != (first.field_types, first.channels):
            raise UserError(f"{file} has other fields or channels than {files[0]}", hint="name files of one build")
        each.metadata["image"]["data_ptr"] += np.uint64(start)
        start = align(start + each.file_bytes)
    metadata = np.concatenate([each.metadata for each in checked])
    if first.field_types.get("index") == INT_FIELD:
        index_N = np.sort(metadata["index"])
        is_repeated_N = index_N[1:] == index_N[:-1]
        if is_repeated_N.any():
            raise UserError(
                f"Two files of {path} hold an image with the index {index_N[int(np.argmax(is_repeated_N))]}",
                hint="name shards of one build only",
            )
    return _Checked(
        page_size=max(each.page_size for each in checked),
        field_types=first.field_types,
        metadata=metadata,
        metadata_bytes=sum(each.metadata_bytes for each in checked),
        image_bytes=np.concatenate([each.image_bytes for each in checked]),
        channels=first.channels,
        file_bytes=sum(each.file_bytes for each in checked),
        samples_of_files=tuple(len(each.metadata) for each in checked),
    )


def _read_checked_file(path: Path) -> _Checked:
    try:
        with open_regular(path) as file:
            # numpy cannot map an empty file.
            content = map_file(path) if os.fstat(file.fileno()).st_size else np.empty(0, np.uint8)
    except FileNotFoundError:
        raise UserError(f"No file {path}", hint=how_to_make(path)) from None
    except IsADirectoryError:
        sets = sorted({str(each) for split in BUILT_SPLITS for each in sets_in(path, split)})
        hint = f"name the shards of a split in it, such as '{sets[0]}'" if sets else "name a file in it"
        raise UserError(f"{path} is a folder, not a .beton file", hint=hint) from None
    except UnsafeFile as error:
        raise UserError(f"{path} is {error.strerror}", hint="name a .beton file") from error
    except OSError as error:
        raise UserError(
            f"{path} cannot be read ({error.strerror})", hint="make it readable for your user, or name another file"
        ) from error
    try:
        return _check_tables(content)
    except ValueError as error:
        raise UserError(f"{path} is not a .beton file: {error}", hint="build it with fastssl build-beton") from error


def _check_tables(content: np.ndarray) -> _Checked:
    """Check everything in the bytes of a file except for image data. Raises ValueError for what is wrong first."""
    header = _read_table(content, 0, HEADER, 1, "the header")[0]
    if header["version"] == 0:
        raise ValueError("its header was never written, because its build was interrupted")
    if header["version"] != VERSION:
        raise ValueError(f"its first bytes are not those of FFCV version {VERSION}")
    page_size = int(header["page_size"])
    num_samples = int(header["num_samples"])
    if page_size & (page_size - 1) or not SMALLEST_PAGE <= page_size <= LARGEST_PAGE:
        raise ValueError(f"a page size of {page_size:,} bytes is impossible")
    if not 1 <= header["num_fields"] <= MOST_FIELDS:
        raise ValueError(f"it cannot have {header['num_fields']} fields")
    if num_samples == 0:
        raise ValueError("it holds no samples")

    position = HEADER.itemsize
    descriptors = _read_table(content, position, FIELD, int(header["num_fields"]), "the fields")
    field_types = _read_field_types(descriptors)
    position += descriptors.nbytes
    stored = _read_table(content, position, metadata_type(field_types), num_samples, "the metadata")
    position += stored.nbytes
    images = _read_array_images(descriptors, field_types)
    metadata = np.array(stored) if images is None else _with_image_column(stored, field_types, images)
    channels = RGB if images is None else images.channels
    if images is None and (metadata["image"]["mode"] > RAW).any():
        raise ValueError("it holds images stored neither as pixels nor as JPEG")

    table_ptr = int(header["alloc_table_ptr"])
    count, rest = divmod(len(content) - table_ptr, ALLOCATION.itemsize)
    if table_ptr < position or count < 1 or rest:
        raise ValueError("its allocation table is missing or cut off")
    table = _read_table(content, table_ptr, ALLOCATION, count, "the allocation table")
    _check_allocations(table, position, table_ptr, page_size, num_samples)
    image_bytes = _check_images(metadata["image"], table, channels)
    _check_numbers(metadata, field_types)
    samples = (len(metadata),)
    return _Checked(page_size, field_types, metadata, stored.nbytes, image_bytes, channels, len(content), samples)


def _read_table(content: np.ndarray, start: int, dtype: np.dtype, count: int, name: str) -> np.ndarray:
    """Return `count` rows of the file from byte `start` on, if the file is that long."""
    end = start + count * dtype.itemsize
    if end > len(content):
        raise ValueError(f"{name} would end at byte {end:,} of {len(content):,}")
    return content[start:end].view(dtype)


def _read_field_types(descriptors: np.ndarray) -> dict[str, int]:
    field_types: dict[str, int] = {}
    for descriptor in descriptors:
        name = descriptor["name"].tobytes().split(b"\0")[0].decode("ascii", "replace")
        type_id = int(descriptor["type_id"])
        if type_id not in FIELD_TYPES:
            raise ValueError(f"its field {quote(name)} has a type (number {type_id}) that is not one of FFCV's own")
        if not name.isprintable() or not name or name in field_types:
            raise ValueError(f"its field names are damaged ({quote(name)})")
        field_types[name] = type_id
    if field_types.get("image") not in (IMAGE_FIELD, ARRAY_FIELD):
        raise ValueError(f"it has no image field 'image'; its fields: {', '.join(field_types)}")
    return field_types


def _read_array_images(descriptors: np.ndarray, field_types: dict[str, int]) -> ArrayImages | None:
    """Return what all images are if they are in an array field; None for FFCV's own image field."""
    if field_types["image"] == IMAGE_FIELD:
        return None
    return read_array_images(descriptors["arguments"][list(field_types).index("image")])


def _with_image_column(stored: np.ndarray, field_types: dict[str, int], images: ArrayImages) -> np.ndarray:
    """Return the metadata of images in an array field, which is a pointer, as that of FFCV's own image field."""
    metadata = np.zeros(len(stored), metadata_type({**field_types, "image": IMAGE_FIELD}))
    for name in field_types:
        if name != "image":
            metadata[name] = stored[name]
    image = metadata["image"]
    image["mode"] = images.mode
    image["height"] = images.height
    image["width"] = images.width
    image["data_ptr"] = stored["image"]
    return metadata


def _check_allocations(table: np.ndarray, start: int, end: int, page_size: int, num_samples: int) -> None:
    """Check that every allocation is between metadata and table, within one page, and belongs to a sample."""
    ptr, size = table["ptr"], table["size"]
    # uint64 wraps around, so each value is bounded before two of them are added.
    is_bounded = (ptr >= start) & (ptr <= end) & (size <= page_size)
    if not is_bounded.all() or (ptr + size > end).any():
        raise ValueError("it points at data outside of the file")
    page = np.uint64(page_size)
    if ((ptr % page) + size > page).any():
        raise ValueError("some of its data crosses the end of a page")
    if (table["sample_id"] >= num_samples).any():
        raise ValueError("its allocation table names samples that it does not have")


def _check_images(image: np.ndarray, table: np.ndarray, channels: int) -> np.ndarray:
    """Check that every image has its own allocation, found as FFCV finds it, of a valid size. Return the sizes."""
    by_ptr = table[np.argsort(table["ptr"])]
    found = np.searchsorted(by_ptr["ptr"], image["data_ptr"])
    allocation = by_ptr[np.minimum(found, len(by_ptr) - 1)]
    is_own = allocation["sample_id"] == np.arange(len(image), dtype=np.uint64)
    if not (is_own & (allocation["ptr"] == image["data_ptr"])).all():
        raise ValueError("its images point at data that is not theirs")
    pixels = image["height"].astype(np.uint64) * image["width"]
    if (pixels == 0).any() or (allocation["size"] == 0).any():
        raise ValueError("it holds images without pixels")
    expected = np.where(image["mode"] == BC4, pixels * 3 // 4, channels * pixels)
    if ((image["mode"] != JPG) & (allocation["size"] != expected)).any():
        raise ValueError("the size of its images does not fit their height and width")
    return allocation["size"].astype(np.int64)


def _check_numbers(metadata: np.ndarray, field_types: dict[str, int]) -> None:
    """Check the sizes of the source images, from which crop boxes are computed, and the indices, which are ids."""
    for side in ("height", "width"):
        if field_types.get(side) == INT_FIELD:
            is_wrong_N = (metadata[side] < 1) | (metadata[side] > LARGEST_SOURCE_SIDE)
            if is_wrong_N.any():
                sample = int(np.argmax(is_wrong_N))
                raise ValueError(
                    f"the source of its sample {sample} cannot have a {side} of {metadata[side][sample]} px"
                )
    if field_types.get("index") == INT_FIELD:
        index_N = np.sort(metadata["index"])  # faster than argsort
        is_repeated_N = index_N[1:] == index_N[:-1]
        if index_N[0] < 0:
            sample = int(np.argmin(metadata["index"]))
            raise ValueError(f"its sample {sample} has the negative index {index_N[0]}")
        if is_repeated_N.any():
            order_N = np.argsort(metadata["index"], kind="stable")
            first = int(np.argmax(is_repeated_N))
            raise ValueError(
                f"its samples {order_N[first]} and {order_N[first + 1]} have the same index {index_N[first]}"
            )


def _read_manifest(path: Path, samples: Sequence[int]) -> Manifest | None:
    """Return the manifest of a file or a set, whose files have so many `samples`."""
    from fastssl.beton.set_manifest import read_file_manifest, read_set_manifest

    return read_set_manifest(path, files_of(path), samples) if is_set(path) else read_file_manifest(path, samples[0])


def _check_labels(path: Path, label_N: np.ndarray, classes: int) -> None:
    """Raise UserError if a label is that of no class, and is not negative, which is no label."""
    is_wrong_N = label_N >= classes
    if is_wrong_N.any():
        sample = int(np.argmax(is_wrong_N))
        raise UserError(
            f"{path} is damaged: its sample {sample} has the label {label_N[sample]}, and {manifest_path(path).name} "
            f"names {classes:,} classes",
            hint="copy both again, or build the file again",
        )
