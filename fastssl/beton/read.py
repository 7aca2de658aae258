"""Read a .beton or a set of shards: what it holds, its table of samples, the names of its images.

tables.py checks the tables before anything here follows them.
"""

import hashlib
import shlex
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import numpy as np

from fastssl.beton.format import (
    BC4,
    FIELD_TYPES,
    INT_FIELD,
    JPG,
    RAW,
    Manifest,
    indexed_names_path,
    manifest_path,
    names_path,
)
from fastssl.beton.parts import FilePart, file_parts
from fastssl.beton.shards import files_of, is_set, sets_in
from fastssl.beton.tables import Tables, read_tables
from fastssl.common.errors import UserError
from fastssl.common.files import UnsafeFile, expand_user, open_regular

if TYPE_CHECKING:  # it imports pydantic, which no worker process does
    from fastssl.beton.mapped import MappedTables

LONGEST_NAME = 1 << 20  # bytes of a line of X.beton.names.txt
MOST_DIGITS = 18  # of an index that int64 holds


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
    # What was checked: all rows, or where those of a very large set are. It goes with this object.
    tables: "Tables | MappedTables" = field(repr=False, compare=False)

    @property
    def file_bytes(self) -> int:
        return sum(part.size for part in self.parts)


def beton_file(path: str | Path, split: str) -> Path:
    """Return the .beton file that a user means by `path`: SPLIT.beton in it if it is a folder. `~` is expanded.

    Of a folder with SPLIT-00000-of-00064.beton and so on, it is the pattern of these shards.

    Raises:
        UserError: it is a folder without that file, or one with several such files or sets.
    """
    path = expand_user(path)
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


def read_header(path: str | Path, files: Sequence[Path] | None = None) -> BetonInfo:
    """Check all files except for their image data, and describe them. Raises UserError if one is not sound.

    files: those of the set that are meant, in its order; None: all. They are the whole set for who reads the result.
    """
    from fastssl.beton.mapped import find_mapped, warn_of_large_tables

    path = Path(path)
    if mapped := find_mapped(path, files):
        return _header_of_mapped(path, mapped)
    warn_of_large_tables(path, files)
    checked = read_tables(path, files)
    image = checked.metadata["image"]
    max_resolution = (int(image["height"].max()), int(image["width"].max()))
    has_one_size = max_resolution == (int(image["height"].min()), int(image["width"].min()))
    storages: dict[int, Literal["raw", "jpg", "bc4"]] = {RAW: "raw", JPG: "jpg", BC4: "bc4"}
    modes = np.unique(image["mode"]).tolist()
    manifest = _read_manifest(path, files or files_of(path), checked)
    if manifest and checked.field_types.get("label") == INT_FIELD:
        _check_labels(path, checked.metadata["label"], len(manifest["classes"]))
    return BetonInfo(
        path=path,
        parts=file_parts(path, files),
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
        tables=checked,
    )


def _header_of_mapped(path: Path, mapped: "MappedTables") -> BetonInfo:
    """Describe a very large set by its manifest."""
    manifest = mapped.manifest
    is_canvas = manifest["layout"] == "canvas"
    return BetonInfo(
        path=path,
        parts=mapped.parts,
        num_samples=mapped.num_samples,
        page_size=mapped.page_size,
        fields={name: FIELD_TYPES[type_id][0] for name, type_id in mapped.field_types.items()},
        layout=manifest["layout"],
        storage=manifest["storage"],
        channels=mapped.channels,
        resolution=(mapped.side, mapped.side) if is_canvas else None,
        max_resolution=(mapped.side, mapped.side),
        classes=manifest["classes"],
        metadata_bytes=mapped.metadata_bytes,
        manifest=manifest,
        tables=mapped,
    )


def read_metadata(path: str | Path) -> np.ndarray:
    """Return one row per sample, with a column per field; the file is checked as by `read_header`.

    The column "image" holds mode, width, height and data_ptr, as `format.IMAGE` declares them, whatever their channels.
    """
    return read_tables(Path(path)).metadata


def read_samples(path: str | Path) -> tuple[np.ndarray, np.ndarray]:
    """Return the rows of `read_metadata`, and the size in bytes of each stored image, int64 (num_samples,)."""
    checked = read_tables(Path(path))
    return checked.metadata, checked.image_bytes


def read_labels(path: str | Path) -> np.ndarray:
    """Return the labels in the order of the file, int64 (num_samples,)."""
    checked = read_tables(Path(path))
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


def _read_manifest(path: Path, files: Sequence[Path], tables: Tables) -> Manifest | None:
    """Return the manifest of a file or a set with these tables."""
    from fastssl.beton.set_manifest import read_file_manifest, read_set_manifest

    if is_set(path):
        return read_set_manifest(path, files, tables.samples_of_files, tables.crc32_of_files)
    return read_file_manifest(path, tables.samples_of_files[0])


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
