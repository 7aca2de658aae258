"""The manifest of a set of shards: OUT/train-of-00064.beton.json, so that opening a set reads one file and not 64.

It holds what the manifests of the shards hold together, without the checksums of the samples, and the name, samples,
bytes and checksums of each shard. The build that completes the set writes it last. It is deleted before a shard is
replaced. A set without it is read by joining the manifests of its shards.
"""

import contextlib
import hashlib
import json
import os
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel, Field

from fastssl.beton.format import ALLOCATION, Manifest, manifest_path
from fastssl.beton.manifest import Schema, read_checked, read_manifest, read_or_explain
from fastssl.beton.shards import SET, Shard, set_manifest_path, set_path, shard_path
from fastssl.common.errors import UserError, quote
from fastssl.common.files import read_text, write_atomically
from fastssl.common.schema import Count

# What must be equal in the manifests of a set, so that its files are of one build.
SAME_IN_A_SET = (
    "classes", "layout", "storage", "canvas", "max_side", "quality", "range", "channels", "max_megapixels", "order",
    "builder", "limit", "listed", "splits", "hold_out", "shards", "sample_list_sha256",
)  # fmt: skip
COUNTS = ("samples", "bytes", "unlabelled", "nearly_black", "enlarged")
TABLES_OF_COUNTS = ("counts", "encoded_because", "source_formats")


class SetFile(BaseModel, strict=True):
    """What the manifest of a set tells of one shard."""

    name: str
    samples: Count
    bytes: Count
    metadata: Annotated[str, Field(pattern="^[0-9a-f]{8}$")]  # CRC-32 of its metadata, which tells labels and indices
    checksum: Annotated[str, Field(pattern="^[0-9a-f]{64}$")]  # see `hash_checksums`


class SetSchema(Schema, strict=True):
    """The types of what fastssl reads in the manifest of a set."""

    files: list[SetFile]


def hash_checksums(checksums: Any) -> str:
    """Return one SHA-256 for the checksums of a file, or for the hashes of all files of a set."""
    return hashlib.sha256(json.dumps(checksums, sort_keys=True).encode()).hexdigest()


def read_set_manifest(
    path: Path, files: Sequence[Path], samples: Sequence[int], crc32s: Sequence[int] | None = None
) -> Manifest | None:
    """Return what the manifest of a set holds, or would hold if the build had written it.

    Args:
        path: the pattern that names the set; if it names some shards only, their manifests are joined.
        files: its files, or some of them (data.shards=local), in their order.
        samples: how many samples each file has, by its header.
        crc32s: CRC-32 of the metadata of each file; None: they have not been read.

    Returns None if neither the set nor each of its files has a manifest. "files" is missing if a file has no checksums.
    Raises UserError if a manifest is damaged, or not of these files, or if the files are of different builds.
    """
    if SET.fullmatch(path.name):
        manifest = read_or_explain(
            set_manifest_path(path),
            f"{path} is read without it",
            lambda file: read_checked(file, SetSchema, sum(samples)),
        )
        if manifest is not None:
            manifest = _of_these_files(path, manifest, files, samples)
            for file, described, crc32 in zip(files, manifest["files"], crc32s or ()):
                check_metadata(set_manifest_path(path), file, described["metadata"], crc32)
            return manifest
    manifests: list[Manifest] = []
    for file, count in zip(files, samples):
        manifest = read_file_manifest(file, count)
        if manifest is None:
            return None
        manifests.append(_of_shard(manifest))
    return _join(files, manifests)


def read_file_manifest(path: Path, samples: int) -> Manifest | None:
    """Return the contents of X.beton.json, None if there is no such file. Raises UserError if it is not of the file."""
    without = f"{path} is read without it"
    manifest = read_or_explain(manifest_path(path), without, lambda _: read_manifest(path, samples))
    if manifest is not None and manifest["samples"] != samples:
        raise UserError(
            f"{manifest_path(path)} does not belong to {path}", hint="delete it, and the file is read without it"
        )
    return manifest


def read_shard_list(path: Path) -> list[SetFile]:
    """Return what the manifest of a set tells of each of its shards, wherever they are.

    Raises UserError if `path` does not name a whole set, or if its manifest is missing or damaged.
    """
    if not (found := SET.fullmatch(path.name)):
        raise UserError(
            f"{path} does not name a set of shards",
            hint="name its folder, or its pattern such as 'data/photos/train-*-of-00064.beton'",
        )
    split, count = found[1], int(found[2])
    where = set_manifest_path(path)
    manifest = read_or_explain(where, "build the set again", lambda file: read_checked(file, SetSchema, 0))
    if manifest is None:
        raise UserError(
            f"{where} is missing: it tells what the shards on other nodes hold",
            hint="copy it from the folder of all shards to every node; build-beton has written it there",
        )
    files = SetSchema.model_validate(manifest).files
    names = [shard_path(path.parent, split, Shard(number, count)).name for number in range(count)]
    if [file.name for file in files] != names or manifest["samples"] != sum(file.samples for file in files):
        raise UserError(f"{where} does not name the {count:,} shards of {path}", hint="copy it again")
    return files


def _of_these_files(path: Path, manifest: Manifest, files: Sequence[Path], samples: Sequence[int]) -> Manifest:
    """Return the manifest of a set for some of its files. Raises UserError unless they are those that it names."""
    found = SET.fullmatch(path.name)
    assert found
    if len(files) < int(found[2]):
        names = {file.name for file in files}
        named = [each for each in manifest["files"] if each["name"] in names]
        manifest = {**manifest, "files": named, "samples": sum(each["samples"] for each in named)}
    _check_files(path, manifest, files, samples)
    return manifest


def check_metadata(manifest: Path, file: Path, expected: str, crc32: int) -> None:
    """Raise UserError if a shard has other labels or indices than the manifest of its set says.

    Args:
        manifest: path of the manifest of the set.
        file: the shard.
        expected: what the manifest has as the `SetFile.metadata` of the shard.
        crc32: of the shard's metadata, all its rows as they are in the file.
    """
    if f"{crc32:08x}" != expected:
        raise UserError(
            f"{file} is not the shard that {manifest} names: it has other labels or images",
            hint=f"copy the shard again, or delete {manifest.name}, and the shards are read without it",
        )


def _check_files(path: Path, manifest: Manifest, files: Sequence[Path], samples: Sequence[int]) -> None:
    """Raise UserError unless the files of a set are those that its manifest names."""
    known = [(each["name"], each["bytes"], each["samples"]) for each in manifest["files"]]
    found = [(file.name, os.stat(file).st_size, count) for file, count in zip(files, samples)]
    if known == found and manifest["samples"] == sum(samples):
        return
    where = set_manifest_path(path)
    hint = f"copy the shards again, or delete {where.name}, and they are read without it"
    for (name, size, count), of_file in zip(known, found):
        if name == of_file[0] and (name, size, count) != of_file:
            raise UserError(
                f"{where} is not of these shards: by it, {name} has {size:,} bytes and {count:,} samples, but the file "
                f"has {of_file[1]:,} bytes and {of_file[2]:,} samples",
                hint=hint,
            )
    raise UserError(
        f"{where} is not of these shards: it names {len(known):,} files with {manifest['samples']:,} samples, and "
        f"there are {len(found):,} with {sum(samples):,}, or their names differ",
        hint=hint,
    )


def write_set_manifest(out: Path, split: str, shards: int) -> bool:
    """Write the manifest of a set if all of its shards are there, and are of one build. Returns whether they are.

    One that holds the same already stays as it is.
    """
    files = [shard_path(out, split, Shard(number, shards)) for number in range(shards)]
    # A look at the names first: of a thousand processes, each of which builds a shard, one has all manifests to read.
    if not all(file.exists() and manifest_path(file).exists() for file in files):
        return False
    manifests = []
    try:
        for file in files:
            size = os.stat(file).st_size
            manifest = read_manifest(file, size // ALLOCATION.itemsize)  # no file of this size has more samples
            if manifest.get("bytes") != size or not manifest.get("checksums"):
                return False
            manifests.append(_of_shard(manifest))
        joined = _join(files, manifests)
    except (OSError, ValueError, UserError):  # another process is replacing a shard, or has not replaced it yet
        return False
    where = set_manifest_path(set_path(out, split, shards))
    text = json.dumps(joined, indent=1, ensure_ascii=False) + "\n"
    with contextlib.suppress(OSError, ValueError):  # there is none, or it is damaged
        if read_text(where, len(text.encode())) == text:
            return True
    write_atomically(where, text)
    return True


def _of_shard(manifest: Manifest) -> Manifest:
    """Return the manifest of a shard with one hash in place of the checksums, which take 8 bytes for each sample."""
    checksums = manifest.pop("checksums", None)
    if not checksums:
        return {**manifest, "checksum": None}
    return {**manifest, "metadata": checksums["metadata"], "checksum": hash_checksums(checksums)}


def _join(files: Sequence[Path], manifests: Sequence[Manifest]) -> Manifest:
    """Return the manifests of a set as one: counts added, lists joined.

    Raises UserError if they are of different builds.
    """
    first = manifests[0]
    for file, manifest in zip(files, manifests):
        for name in SAME_IN_A_SET:
            if manifest.get(name) != first.get(name):
                what = "list of images" if name == "sample_list_sha256" else name
                raise UserError(
                    f"{file} and {files[0]} are of different builds: they have another {what}",
                    hint="build the shards again with the same options and images, or name those of one build",
                )
        if manifest.get("source") != first.get("source") and manifest.get("spot_check") != first.get("spot_check"):
            sources = f"{quote(manifest.get('source'))} and {quote(first.get('source'))}"
            raise UserError(
                f"{file} and {files[0]} are of different images with the same names, from {sources}",
                hint="build the shards again from one source, or name those of one build",
            )
    joined = {name: value for name, value in first.items() if name not in ("shard", "metadata", "checksum")}
    joined["missing"] = [index for each in manifests for index in each.get("missing", [])]
    joined |= {name: sum(each.get(name, 0) for each in manifests) for name in COUNTS}
    for name in TABLES_OF_COUNTS:
        total: Counter[str] = Counter()
        for each in manifests:
            total.update(each.get(name, {}))
        joined[name] = dict(total)
    if all(each["checksum"] for each in manifests):
        joined["files"] = [
            {
                "name": file.name,
                "samples": each["samples"],
                "bytes": each.get("bytes", 0),
                "metadata": each["metadata"],
                "checksum": each["checksum"],
            }
            for file, each in zip(files, manifests)
        ]
    else:
        joined.pop("files", None)
    return joined
