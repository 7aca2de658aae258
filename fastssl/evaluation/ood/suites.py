"""The data sets of an OOD evaluation: find them, check that they can be compared, describe their source images."""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from fastssl.beton import beton_file, has_split, read_header, read_metadata
from fastssl.beton.shards import is_set, split_of
from fastssl.common.errors import UserError
from fastssl.evaluation.results import DataDescription
from fastssl.evaluation.runs import BetonSubset, RunEncoder

MAX_NAME = 100  # characters of a result's name; longer ones are replaced by a hash
FIT_IMAGES = 50_000  # training images at most: all of CIFAR-10, 4 % of ImageNet
BUILD_OPTIONS = ("layout", "canvas", "max_side", "storage", "quality", "channels")
SPLITS = ("test", "val", "train")  # of a suite's set the first of these files that exists is used

# OpenOOD v1.5 (arXiv 2306.09301): near and far sets by the names of their builders (ssb_hard, ninco and openimage_o:
# imagefolder). OpenOOD leaves out images of classes that the ID set has (in Tiny-ImageNet, Places365, ...). To compare
# with its results, build the files from its lists.
SUITES: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "cifar10": (("cifar100", "tinyimagenet"), ("mnist", "svhn", "dtd", "places365")),
    "cifar100": (("cifar10", "tinyimagenet"), ("mnist", "svhn", "dtd", "places365")),
    "imagenet": (("ssb_hard", "ninco"), ("inaturalist", "dtd", "openimage_o")),
}


class SetDescription(DataDescription):
    builder: str | None
    source_formats: dict[str, int] | None  # images per file format before they were stored; None: not recorded
    own_bytes: float  # share of images that are stored with their original bytes
    source_px: list[float]  # median [height, width] of the source images


@dataclass(frozen=True)
class OODSets:
    """The images of an OOD evaluation."""

    fit: BetonSubset  # training images, which the detectors are fitted on
    id: BetonSubset  # in-distribution images
    near: dict[str, BetonSubset]  # OOD sets by name
    far: dict[str, BetonSubset]
    name: str  # of the result

    @property
    def ood(self) -> dict[str, BetonSubset]:
        """All OOD sets, near ones first."""
        return self.near | self.far

    def describe(self) -> dict[str, SetDescription | dict[str, SetDescription]]:
        """Describe all sets, under the names of other evaluations: `train` are fitted on, `val` are the ID images."""
        return {
            "train": describe_set(self.fit),
            "val": describe_set(self.id),
            "near": {name: describe_set(data) for name, data in self.near.items()},
            "far": {name: describe_set(data) for name, data in self.far.items()},
        }


def find_sets(
    encoder: RunEncoder,
    *,
    near: Sequence[Path] = (),
    far: Sequence[Path] = (),
    suite: str | None = None,
    root: str | Path = "data",
    fit: str | Path | None = None,
    id: str | Path | None = None,
) -> OODSets:
    """Find the data sets of an OOD evaluation.

    Args:
        encoder: of the run.
        near: near OOD sets: files, or folders with test.beton, val.beton or train.beton.
        far: far OOD sets.
        suite: a key of `SUITES`, instead of `near` and `far`.
        root: the sets of a suite are root/NAME/test.beton, val.beton or train.beton.
        fit: file of training images; by default data.train of the run. At most 50,000 images are used.
        id: file of in-distribution images; by default data.val of the run.

    Raises:
        UserError: if a file is missing, two sets have the same name, or the files were built with different options.
    """
    if suite:
        near, far = ([Path(root) / name for name in names] for names in SUITES[suite])
    if not near and not far:
        raise UserError("There are no OOD images", hint="name files with --near and --far, or a --suite")
    config = encoder.recipe.data
    id_file = id or config.val
    if id_file is None:
        raise UserError(f"{encoder.run_dir}/recipe.yaml has no data.val", hint="name ID images with --id FILE.beton")
    near, far = ([_file_of_set(path) for path in paths] for paths in (near, far))
    fit_data = find_fit_images(encoder, fit)
    encoder.check_channels(beton_file(id_file, "val"), *near, *far)
    names = ["id", *(set_name(path) for path in (*near, *far))]
    for name in names:
        if names.count(name) > 1:
            raise UserError(f"Two of the sets are called {name}", hint="move one of them to a folder with another name")
    sets = OODSets(
        fit=fit_data,
        id=BetonSubset(beton_file(id_file, "val")),
        near={set_name(path): BetonSubset(path) for path in near},
        far={set_name(path): BetonSubset(path) for path in far},
        name=result_name(suite, near, far, id, fit),
    )
    check_same_build([data.path for data in (sets.id, sets.fit, *sets.ood.values())])
    return sets


def find_fit_images(encoder: RunEncoder, fit: str | Path | None = None) -> BetonSubset:
    """Return the images that detectors are fitted on: data.train of the run, or all of `fit`, at most 50,000."""
    config = encoder.recipe.data
    path = beton_file(fit or config.train, "train")
    encoder.check_channels(path)
    data = BetonSubset(path) if fit else BetonSubset(path, config.subset, config.limit)
    is_small = data.describe()["images"] <= FIT_IMAGES
    return data if is_small else BetonSubset(data.path, data.subset, FIT_IMAGES)


def result_name(
    suite: str | None, near: Sequence[Path], far: Sequence[Path], id: str | Path | None, fit: str | Path | None
) -> str:
    """Return the name of a result, such as near-textures-far-mnist or cifar10-fit-photos."""
    parts = [suite] if suite else []
    for kind, paths in (("near", near), ("far", far)):
        if paths and not suite:
            parts += [kind, *(set_name(Path(path)) for path in paths)]
    for kind, path in (("id", id), ("fit", fit)):
        if path:
            parts += [kind, set_name(Path(path))]
    name = "-".join(parts)
    return name if len(name) <= MAX_NAME else hashlib.sha256(name.encode()).hexdigest()[:16]


def _file_of_set(path: Path) -> Path:
    """The .beton of a set, which may be given as its folder. The message about a missing one names its builder."""
    if path.suffix == ".beton" or is_set(path):
        return beton_file(path, SPLITS[0])
    split = next((split for split in SPLITS if has_split(path, split)), None)
    return beton_file(path, split) if split else path / f"{SPLITS[0]}.beton"


def set_name(path: Path) -> str:
    """Return mnist for mnist/test.beton, and photos-night for photos/night.beton."""
    folder = path.resolve().parent.name
    split = split_of(path)
    return folder if split in SPLITS else f"{folder}-{split}"


def check_same_build(paths: Sequence[Path]) -> None:
    """Raise UserError unless all files were built with the same options, which a detector could tell apart."""
    first: dict[str, object] = {}
    for path in paths:
        info = read_header(path)
        if info.manifest is None:
            raise UserError(f"{path} has no {path.name}.json with its build options", hint="build it with build-beton")
        options = {name: info.manifest.get(name) for name in BUILD_OPTIONS}
        # Views of images of one size are cropped on the device; of several sizes on the CPU, which rounds to uint8.
        options["images of one size"] = info.resolution is not None
        first = first or options
        for name, value in options.items():
            if value != first[name]:
                raise UserError(
                    f"{path} was built with {name}={value}, {paths[0]} with {name}={first[name]}, which alone could "
                    "tell them apart",
                    hint="build all sets with the same options",
                )


def describe_set(data: BetonSubset) -> SetDescription:
    """Describe a file, and its source images before they were stored."""
    info = read_header(data.path)
    assert info.manifest is not None  # find_sets refuses files without one
    metadata = read_metadata(data.path)
    return {
        **data.describe(),
        "builder": info.manifest.get("builder"),
        "source_formats": info.manifest.get("source_formats"),
        "own_bytes": info.manifest.get("counts", {}).get("passed_through", 0) / info.num_samples,
        "source_px": [float(np.median(metadata[side])) for side in ("height", "width")],
    }
