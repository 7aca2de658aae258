"""Very large sets of shards, whose tables stay in their files: only the rows of a batch are read, and checked then.

A set is opened this way if it has more than MOST_IN_MEMORY samples and a manifest, which states what would otherwise
come from all rows: sides, storage, classes. Opening it checks the header of each file and where its tables are.
"""

import warnings
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import numpy as np

from fastssl.beton.format import (
    ALLOCATION,
    BC4,
    IMAGE_FIELD,
    JPG,
    OUR_ARRAY_FIELDS,
    OUR_FIELDS,
    RAW,
    ArrayImages,
    Manifest,
    metadata_type,
)
from fastssl.beton.parts import FilePart, file_parts, map_file, require_unchanged
from fastssl.beton.set_manifest import read_set_manifest
from fastssl.beton.shards import SET, files_of, is_set, set_manifest_path
from fastssl.beton.tables import (
    Header,
    check_allocations,
    check_images,
    find_wrong_source,
    read_file_header,
    with_image_column,
)
from fastssl.common.errors import UserError

# Samples. Up to so many, tables and orders are arrays: 16.7 million take about 3 GB. Above, both are computed or read
# for each batch.
MOST_IN_MEMORY = 1 << 24
BYTES_IN_MEMORY = 200  # of a sample, with its place in an order: records/scale.md
THREADS = 16  # that read headers: on a network disk each takes milliseconds
LARGEST_SIDE = (1 << 16) - 1  # px, of format.IMAGE
MODES = {"raw": RAW, "jpg": JPG, "bc4": BC4}


class MappedTables(NamedTuple):
    """Where the tables of a set are in the bytes that `map_file` returns, and what its rows must fulfill."""

    parts: tuple[FilePart, ...]
    num_samples: int
    # Of each file, int64: row of the set of its first sample; bytes of all files at which it, its metadata (and where
    # these end) and its allocation table begin.
    first_row_F: np.ndarray
    start_F: np.ndarray
    metadata_F: np.ndarray
    metadata_end_F: np.ndarray
    allocations_F: np.ndarray
    page_size: int
    field_types: dict[str, int]
    images: ArrayImages | None  # what all images are if they are in an array field
    channels: int
    side: int  # px: of a canvas, or the largest one
    manifest: Manifest

    @property
    def metadata_type(self) -> np.dtype[np.void]:
        return metadata_type(self.field_types)

    @property
    def metadata_bytes(self) -> int:
        return self.num_samples * self.metadata_type.itemsize

    def check_rows(self, row_B: np.ndarray, metadata_B: np.ndarray, allocation_B: np.ndarray) -> np.ndarray:
        """Check rows of the tables as `read_tables` checks all rows of a file, except for repeated indices.

        Args:
            row_B: rows of the set.
            metadata_B: what the files hold for them, of `metadata_type`.
            allocation_B: the same, of type ALLOCATION.

        Returns the metadata with a format.IMAGE as the column "image", whose pointers are those of the file. Raises
        UserError, which names the first file with such a row.
        """
        try:
            return self._checked(row_B, metadata_B, allocation_B)
        except ValueError:
            for b in range(len(row_B)):
                try:
                    self._checked(row_B[b : b + 1], metadata_B[b : b + 1], allocation_B[b : b + 1])
                except ValueError as error:
                    file, row = self.file_of(row_B[b : b + 1])
                    raise UserError(
                        f"{self.parts[file[0]].path} is damaged at its sample {row[0]}: {error}",
                        hint="copy the file again, or build it again with fastssl build-beton",
                    ) from error
            raise

    def file_of(self, row_B: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return the number of the file that holds each row, and the row in it, int64 (B,) each."""
        if len(row_B) and not (0 <= row_B.min() and row_B.max() < self.num_samples):
            raise IndexError(f"rows are from 0 to {self.num_samples - 1}")
        file_B = np.searchsorted(self.first_row_F, row_B, side="right") - 1
        return file_B, row_B - self.first_row_F[file_B]

    def pieces_of(self, name: str) -> Iterator[np.ndarray]:
        """Yield a column of integers, file by file. Its values are what the files hold: they are not checked.

        Raises UserError if a file has changed since the set was opened.
        """
        for part, first, end in zip(self.parts, self.metadata_F.tolist(), self.metadata_end_F.tolist()):
            require_unchanged(part)
            content = map_file(part.path)
            require_unchanged(part)  # nor between the first look and the mapping
            yield np.array(content[first - part.start : end - part.start].view(self.metadata_type)[name])

    def _checked(self, row_B: np.ndarray, metadata_B: np.ndarray, allocation_B: np.ndarray) -> np.ndarray:
        file_B, row_in_file_B = self.file_of(row_B)
        if self.images is not None:
            metadata_B = with_image_column(metadata_B, self.field_types, self.images)
        image_B = metadata_B["image"]
        is_own_B = allocation_B["sample_id"] == row_in_file_B.astype(np.uint64)
        if not (is_own_B & (allocation_B["ptr"] == image_B["data_ptr"])).all():
            raise ValueError("its image points at data that is not its own")
        start_B = self.start_F[file_B]
        first_B = (self.metadata_end_F[file_B] - start_B).astype(np.uint64)
        end_B = (self.allocations_F[file_B] - start_B).astype(np.uint64)
        check_allocations(allocation_B, first_B, end_B, self.page_size)
        if (image_B["mode"] != MODES[self.manifest["storage"]]).any():
            raise ValueError(f"its image is not stored as its manifest says ({self.manifest['storage']})")
        sides_B = np.stack([image_B["height"], image_B["width"]])
        if (sides_B > self.side).any() or (self.manifest["layout"] == "canvas" and (sides_B != self.side).any()):
            raise ValueError(f"its image has another size than its manifest says ({self.side} px)")
        check_images(image_B, allocation_B["size"], self.channels)
        if wrong := find_wrong_source(metadata_B, self.field_types):
            raise ValueError(f"its source {wrong[1]}")
        if (metadata_B["index"] < 0).any():
            raise ValueError("its index is negative")
        if (metadata_B["label"] >= len(self.manifest["classes"])).any():
            raise ValueError(f"its label is that of no class, and the manifest names {len(self.manifest['classes']):,}")
        return metadata_B


def find_mapped(path: Path, files: Sequence[Path] | None = None) -> MappedTables | None:
    """Return where the tables of a very large set are; None for a file, and for a set whose tables are read at once.

    files: those of the set that are meant; None: all.

    Raises UserError if a file is not sound, or if the manifest is not of these files.
    """
    if not (is_set(path) and SET.fullmatch(path.name) and set_manifest_path(path).exists()):
        return None
    parts = file_parts(path, files)
    files = [part.path for part in parts]
    with ThreadPoolExecutor(THREADS) as pool:
        headers = list(pool.map(read_file_header, files))
    samples = [header.num_samples for header in headers]
    if sum(samples) <= MOST_IN_MEMORY:
        return None
    manifest = read_set_manifest(path, files, samples)
    if manifest is None:  # deleted at this moment
        return None
    first = headers[0]
    for part, header in zip(parts, headers):
        _check_file(part, header, first, files[0])
    side = _recorded_side(path, manifest, first)
    start_F = np.array([part.start for part in parts], np.int64)
    return MappedTables(
        parts=parts,
        num_samples=sum(samples),
        first_row_F=np.cumsum(samples) - samples,
        start_F=start_F,
        metadata_F=start_F + [header.metadata_start for header in headers],
        metadata_end_F=start_F + [header.metadata_end for header in headers],
        allocations_F=start_F + [header.table_start for header in headers],
        page_size=first.page_size,
        field_types=first.field_types,
        images=first.images,
        channels=first.channels,
        side=side,
        manifest=manifest,
    )


def warn_of_large_tables(path: Path, files: Sequence[Path] | None = None) -> None:
    """Say how much memory the tables of a very large file take, or of a set that `find_mapped` does not know."""
    samples = sum(read_file_header(file).num_samples for file in files or files_of(path))
    if samples <= MOST_IN_MEMORY:
        return
    if SET.fullmatch(path.name):
        advice = f"{set_manifest_path(path)} is missing: copy it there, or run the build again, which writes it"
    else:
        advice = "build it with --shards, and name the whole set, by its folder or as 'train-*-of-00064.beton'"
    warnings.warn(
        f"{path} has {samples:,} images, whose tables take about {samples * BYTES_IN_MEMORY / 1e9:.2g} GB of memory in "
        f"each process. Those of a whole set of shards with its manifest take none; {advice}.",
        stacklevel=1,  # one place, so that Python shows it once
    )


def _check_file(part: FilePart, header: Header, first: Header, first_file: Path) -> None:
    """Raise UserError if a file is not one of a build with the first one."""
    if (header.field_types, header.images, header.page_size) != (first.field_types, first.images, first.page_size):
        raise UserError(f"{part.path} has other fields or images than {first_file}", hint="name files of one build")
    fields = OUR_FIELDS if first.images is None else OUR_ARRAY_FIELDS
    # The allocation of sample i is row i, as in every file of build-beton.
    if header.field_types != fields or part.size - header.table_start != header.num_samples * ALLOCATION.itemsize:
        raise UserError(
            f"{part.path} is not one of build-beton: it has other fields or another allocation table",
            hint="build it with fastssl build-beton",
        )


def _recorded_side(path: Path, manifest: Manifest, first: Header) -> int:
    """Return the side of the canvas, or the largest one. Raises UserError if the manifest does not fit the files."""
    side = manifest.get("canvas" if manifest["layout"] == "canvas" else "max_side")
    storage, images = manifest.get("storage"), first.images
    if images is None:
        fits = storage in ("raw", "jpg") and first.field_types["image"] == IMAGE_FIELD
    else:
        fits = manifest["layout"] == "canvas" and (images.height, images.width) == (side, side)
        fits = fits and storage in MODES and MODES[storage] == images.mode
    if not fits or side is None or not 0 < side <= LARGEST_SIDE:
        where = set_manifest_path(path)
        raise UserError(
            f"{where} does not fit the files: by it, images are stored as {storage!r}, with sides of {side} px",
            hint=f"copy it again, or delete it, and {path} is read without it",
        )
    return side
