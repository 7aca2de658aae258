"""The schema of X.beton.json, which may come from elsewhere with its .beton.

Not part of read.py: only who reads a manifest imports pydantic, and no worker process does.
"""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ValidationError

from fastssl.beton.format import Manifest, manifest_path
from fastssl.common.errors import UserError
from fastssl.common.files import read_bytes
from fastssl.common.schema import Count
from fastssl.common.terminal import printable

LARGEST = 64 << 20  # bytes, and for each sample as many as the next line says
LARGEST_PER_SAMPLE = 64  # a checksum takes 8; class names and missing images may take more
MOST_COUNTED = 1 << 27  # samples; a larger set is in shards, and the manifest of a set has no checksum for each sample


class Checksums(BaseModel, strict=True):
    algorithm: str
    metadata: str
    samples: str


class Schema(BaseModel, strict=True):
    """The types of what fastssl reads. A file from elsewhere may lack all but the first three keys, or have others."""

    samples: Count
    classes: list[str]
    layout: Literal["canvas", "full"]
    storage: Literal["raw", "jpg", "bc4"] | None = None
    bytes: Count = 0
    builder: str | None = None
    source: str | None = None
    spot_check: str | None = None  # of a shard, see `listing.spot_check`
    fastssl: str | None = None
    pillow: str | None = None
    canvas: int | None = None
    max_side: int | None = None
    quality: int | None = None
    range: str | None = None
    limit: int | None = None
    hold_out: float | None = None
    listed: Count = 0  # of a shard with a limit: the images of the split, with those that it leaves out
    channels: int = 3
    max_megapixels: int = 0
    order: dict[str, int] | str | None = None
    unlabelled: Count = 0
    nearly_black: Count = 0
    nearly_black_names: list[str] = []  # the first of them
    enlarged: Count = 0
    missing: list[int] = []
    counts: dict[str, Count] = {}
    encoded_because: dict[str, Count] = {}
    source_formats: dict[str, Count] = {}
    checksums: Checksums | None = None


def read_manifest(path: Path, samples: int) -> Manifest:
    """Return the contents of the manifest of a .beton with at most so many samples.

    Raises OSError if it cannot be read, and ValueError, which says what is wrong first, if it has another form.
    """
    return read_checked(manifest_path(path), Schema, samples)


def read_checked(path: Path, schema: type[BaseModel], samples: int) -> Manifest:
    """Return the contents of a manifest at `path`, which may have the size of one of so many samples; as above."""
    content = read_bytes(path, LARGEST + min(samples, MOST_COUNTED) * LARGEST_PER_SAMPLE)
    try:
        schema.model_validate_json(content)
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        key = ".".join(map(str, first["loc"]))
        raise ValueError(f"{key}: {first['msg']}" if key else first["msg"]) from error
    manifest: dict[str, Any] = json.loads(content)
    return manifest


def read_or_explain(path: Path, without: str, read: Callable[[Path], Manifest]) -> Manifest | None:
    """Return read(path), None if there is no such file. Raises UserError, which says what `without` it is done."""
    try:
        return read(path)
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        reason = printable(getattr(error, "strerror", None) or str(error))
        raise UserError(f"{path} is damaged ({reason:.200})", hint=f"delete it, and {without}") from error
