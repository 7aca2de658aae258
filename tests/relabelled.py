"""Copies of .beton files with other labels, for tests of what needs labels."""

import json
import shutil
from pathlib import Path

import numpy as np

from fastssl.beton import read_labels
from fastssl.beton.format import FIELD, HEADER, OUR_FIELDS, manifest_path, metadata_type


def relabelled(beton: Path, copy: Path, labels: np.ndarray, classes: list[str] | None = None) -> Path:
    """Copy a .beton of build-beton with its manifest and names, and write `labels` (N,) in the order of the file.

    classes: other class names for the manifest.
    """
    copy.parent.mkdir(parents=True, exist_ok=True)
    for suffix in ("", ".json", ".names.txt"):
        shutil.copy(f"{beton}{suffix}", f"{copy}{suffix}")
    offset = HEADER.itemsize + len(OUR_FIELDS) * FIELD.itemsize
    metadata = np.memmap(copy, metadata_type(OUR_FIELDS), "r+", offset, len(labels))
    metadata["label"] = labels
    metadata.flush()
    if classes:
        manifest = manifest_path(copy)
        manifest.write_text(json.dumps({**json.loads(manifest.read_text()), "classes": classes}))
    return copy


def without_labels(beton: Path, folder: Path) -> dict[str, Path]:
    """Three copies of a file with 3 classes: no image has a label, some have one, all have the same."""
    label_N = read_labels(beton)
    kinds = {"none": np.full_like(label_N, -1), "some": np.where(label_N == 2, -1, label_N), "one": 0 * label_N}
    return {kind: relabelled(beton, folder / f"{kind}.beton", labels) for kind, labels in kinds.items()}
