"""Read what a .beton holds, and check it before any compiled code follows its pointers.

FFCV's compiled readers trust every pointer and size in the file. So everything that they follow
is checked here first, with numpy, in a fraction of a second per million samples: a file that is
cut off, damaged or made to harm is refused with one sentence. Files of stock FFCV are read too.
Image data itself is not decoded here.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np

from fastssl.beton.builders import builder_names
from fastssl.beton.format import (
    ALLOCATION,
    FIELD,
    FIELD_TYPES,
    HEADER,
    IMAGE_FIELD,
    INT_FIELD,
    LARGEST_PAGE,
    RAW,
    SMALLEST_PAGE,
    VERSION,
    metadata_type,
)
from fastssl.beton.partial_build import names_path
from fastssl.common.errors import UserError

MOST_FIELDS = 256  # far above any real file; bounds what a damaged header can make us read


@dataclass(frozen=True)
class BetonInfo:
    """What a .beton says about itself.

    `fields` maps each field's name to its FFCV class, in the order of the file. `resolution` is
    the (height, width) in px that all stored images share, None where they differ;
    `max_resolution` is the largest height and the largest width. `storage` is "raw", "jpg" or
    "mixed". `layout` is the manifest's, else "canvas" where all images have one size, and "full".
    `classes` and `manifest` are None without the file X.beton.json that `build-beton` writes.
    """

    path: Path
    num_samples: int
    page_size: int
    fields: dict[str, str]
    layout: str
    storage: str
    resolution: tuple[int, int] | None
    max_resolution: tuple[int, int]
    classes: list[str] | None
    manifest: dict | None


def read_header(path: str | Path) -> BetonInfo:
    """Check the whole file but for its image data, and say what it holds."""
    path = Path(path)
    checked = _read_checked(path)
    metadata = checked.metadata
    image = metadata["image"]
    heights, widths = image["height"], image["width"]
    max_resolution = (int(heights.max()), int(widths.max()))
    is_fixed = max_resolution == (int(heights.min()), int(widths.min()))
    modes = np.unique(image["mode"])
    storage = "mixed" if len(modes) == 2 else ("raw" if modes[0] == RAW else "jpg")

    manifest = _read_manifest(path, len(metadata))
    layout = manifest["layout"] if manifest else ("canvas" if is_fixed else "full")
    return BetonInfo(
        path=path,
        num_samples=len(metadata),
        page_size=checked.page_size,
        fields={name: FIELD_TYPES[type_id][0] for name, type_id in checked.field_types.items()},
        layout=layout,
        storage=storage,
        resolution=max_resolution if is_fixed else None,
        max_resolution=max_resolution,
        classes=manifest["classes"] if manifest else None,
        manifest=manifest,
    )


def read_metadata(path: str | Path) -> np.ndarray:
    """One row a sample, columns named as the fields; checked as `read_header` does.

    The column "image" holds mode, width, height and data_ptr, as `format.IMAGE` declares them.
    """
    return _read_checked(Path(path)).metadata


def read_samples(path: str | Path) -> tuple[np.ndarray, np.ndarray]:
    """`read_metadata`, and beside it the stored bytes of each image, int64 (num_samples,)."""
    checked = _read_checked(Path(path))
    return checked.metadata, checked.image_bytes


def read_labels(path: str | Path) -> np.ndarray:
    """The labels, int64 (num_samples,), in the order of the file."""
    path = Path(path)
    checked = _read_checked(path)
    if checked.field_types.get("label") != INT_FIELD:
        names = ", ".join(checked.field_types)
        raise UserError(f"{path} has no integer field 'label'; its fields: {names}.")
    return np.ascontiguousarray(checked.metadata["label"])


def data_checksum(info: BetonInfo) -> str:
    """A sha256 that tells data sets apart: of the checksums that the build left, else of the whole file."""
    manifest = info.manifest or {}
    if "checksums" in manifest:
        return hashlib.sha256(json.dumps(manifest["checksums"], sort_keys=True).encode()).hexdigest()
    with open(info.path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def read_names(path: Path, indices: np.ndarray | list) -> dict[int, str]:
    """The names of those of the images that have one of `indices`; {} without X.beton.names.txt."""
    wanted = {int(index) for index in indices}
    if not wanted or not names_path(path).exists():
        return {}
    with open(names_path(path), "rb") as file:
        return {
            index: line.removesuffix(b"\n").decode("utf-8", "surrogateescape")
            for index, line in enumerate(file)
            if index in wanted
        }


class _Checked(NamedTuple):
    """What `_read_checked` found sound."""

    page_size: int
    field_types: dict[str, int]  # name -> FFCV's number of the type
    metadata: np.ndarray
    image_bytes: np.ndarray


def _read_checked(path: Path) -> _Checked:
    try:
        with open(path, "rb") as file:
            content = np.memmap(file, np.uint8, mode="r")
    except FileNotFoundError:
        raise UserError(_how_to_make(path)) from None
    except (IsADirectoryError, PermissionError) as error:
        raise UserError(f"{path} cannot be read: {error.strerror}.") from error
    except ValueError as error:  # numpy cannot map an empty file
        raise _not_a_beton(path, "it is empty") from error

    header = _table(content, 0, HEADER, 1, path, "the header")[0]
    if header["version"] == 0:
        raise _not_a_beton(path, "its header was never written, so its build was interrupted")
    if header["version"] != VERSION:
        raise _not_a_beton(path, f"its first bytes are not those of FFCV version {VERSION}")
    page_size, num_samples = int(header["page_size"]), int(header["num_samples"])
    if page_size & (page_size - 1) or not SMALLEST_PAGE <= page_size <= LARGEST_PAGE:
        raise _not_a_beton(path, f"a page size of {page_size:,} bytes is impossible")
    if not 1 <= header["num_fields"] <= MOST_FIELDS:
        raise _not_a_beton(path, f"it cannot have {header['num_fields']} fields")
    if num_samples == 0:
        raise _not_a_beton(path, "it holds no samples")

    position = HEADER.itemsize
    descriptors = _table(content, position, FIELD, int(header["num_fields"]), path, "the fields")
    field_types = _field_types(descriptors, path)
    position += descriptors.nbytes
    row = metadata_type(field_types)
    metadata = np.array(_table(content, position, row, num_samples, path, "the metadata"))
    position += metadata.nbytes

    table_ptr = int(header["alloc_table_ptr"])
    count, rest = divmod(len(content) - table_ptr, ALLOCATION.itemsize)
    if table_ptr < position or count < 1 or rest:
        raise _not_a_beton(path, "its allocation table is missing or cut off")
    table = _table(content, table_ptr, ALLOCATION, count, path, "the allocation table")
    _check_allocations(table, position, table_ptr, page_size, num_samples, path)
    image_bytes = _check_images(metadata["image"], table, path)
    return _Checked(page_size, field_types, metadata, image_bytes)


def _field_types(descriptors: np.ndarray, path: Path) -> dict[str, int]:
    field_types: dict[str, int] = {}
    for descriptor in descriptors:
        name = descriptor["name"].tobytes().split(b"\0")[0].decode("ascii", "replace")
        type_id = int(descriptor["type_id"])
        if type_id not in FIELD_TYPES:
            raise UserError(
                f"{path} has a field {name!r} of a type (number {type_id}) that is not FFCV's own; "
                "only files with FFCV's standard fields can be read."
            )
        if not name.isprintable() or not name or name in field_types:
            raise _not_a_beton(path, f"its field names are damaged ({name!r})")
        field_types[name] = type_id
    if field_types.get("image") != IMAGE_FIELD:
        raise UserError(f"{path} has no image field 'image'; its fields: {', '.join(field_types)}.")
    return field_types


def _check_allocations(table: np.ndarray, start: int, end: int, page_size: int, num_samples: int, path: Path) -> None:
    """Every allocation lies between metadata and table, within one page, and has a sample."""
    ptr, size = table["ptr"], table["size"]
    # uint64 wraps around, so each value is bounded before two of them are added
    bounded = (ptr >= start) & (ptr <= end) & (size <= page_size)
    if not bounded.all() or (ptr + size > end).any():
        raise _not_a_beton(path, "it points at data outside of the file")
    page = np.uint64(page_size)
    if ((ptr % page) + size > page).any():
        raise _not_a_beton(path, "some of its data crosses the end of a page")
    if (table["sample_id"] >= num_samples).any():
        raise _not_a_beton(path, "its allocation table names samples that it does not have")


def _check_images(image: np.ndarray, table: np.ndarray, path: Path) -> np.ndarray:
    """Every image has its own allocation, found as FFCV finds it, of a size that fits; the sizes."""
    by_ptr = table[np.argsort(table["ptr"])]
    found = np.searchsorted(by_ptr["ptr"], image["data_ptr"])
    allocation = by_ptr[np.minimum(found, len(by_ptr) - 1)]
    own = allocation["sample_id"] == np.arange(len(image), dtype=np.uint64)
    if not (own & (allocation["ptr"] == image["data_ptr"])).all():
        raise _not_a_beton(path, "its images point at data that is not theirs")
    pixels = image["height"].astype(np.uint64) * image["width"]
    if (pixels == 0).any() or (allocation["size"] == 0).any():
        raise _not_a_beton(path, "it holds images without pixels")
    if (image["mode"] > RAW).any():
        raise _not_a_beton(path, "it holds images stored neither as pixels nor as JPEG")
    if ((image["mode"] == RAW) & (allocation["size"] != 3 * pixels)).any():
        raise _not_a_beton(path, "the size of its images does not fit their height and width")
    return allocation["size"].astype(np.int64)


def _table(content: np.ndarray, start: int, dtype: np.dtype, count: int, path: Path, what: str) -> np.ndarray:
    """`count` rows of the mapped file from byte `start`, if the file is that long."""
    end = start + count * dtype.itemsize
    if end > len(content):
        raise _not_a_beton(path, f"{what} would end at byte {end:,} of {len(content):,}")
    return content[start:end].view(dtype)


def _read_manifest(path: Path, num_samples: int) -> dict | None:
    """X.beton.json beside the file, None where there is none."""
    manifest_path = path.with_name(path.name + ".json")
    try:
        manifest = json.loads(manifest_path.read_text(encoding="utf-8"))
        belongs = manifest["samples"] == num_samples
        belongs &= isinstance(manifest["classes"], list)
        belongs &= manifest["layout"] in ("canvas", "full")
    except FileNotFoundError:
        return None
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{manifest_path} is damaged; delete it, and {path} reads without.") from error
    if not belongs:
        raise UserError(f"{manifest_path} does not belong to {path}; delete it, and the file reads without.")
    return manifest


def _how_to_make(path: Path) -> str:
    """The sentence for a file that is not there: shipped recipes read data/DATASET/train.beton."""
    folder = path.parent
    builder = folder.name if folder.name in builder_names() else "imagefolder"
    return f"No file {path}: make it with `fastssl build-beton {builder} --source DIR --out {folder}`, or name another."


def _not_a_beton(path: Path, why: str) -> UserError:
    return UserError(f"{path} is not a .beton file: {why}; build it with fastssl build-beton.")
