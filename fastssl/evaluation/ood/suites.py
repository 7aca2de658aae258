"""The data sets of an OOD evaluation: which they are, that they can be compared, and what they were before."""

import hashlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from fastssl.beton import read_header, read_metadata
from fastssl.common.errors import UserError
from fastssl.evaluation.runs import BetonSubset, RunEncoder

LONGEST_NAME = 100  # of a result; a longer one becomes its hash
FIT_IMAGES = 50_000  # training images at most: all of CIFAR-10, 4 % of ImageNet
BUILD_OPTIONS = ("layout", "canvas", "max_side", "storage", "quality")
SPLITS = ("test", "val", "train")  # of a suite's set, the first that is there

# OpenOOD v1.5 (arXiv 2306.09301), by the names of the builders; ssb_hard, ninco and openimage_o by imagefolder. OpenOOD
# leaves out images whose class the ID set has (of Tiny-ImageNet, Places365, ...): build from its lists to compare.
SUITES: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "cifar10": (("cifar100", "tinyimagenet"), ("mnist", "svhn", "dtd", "places365")),
    "cifar100": (("cifar10", "tinyimagenet"), ("mnist", "svhn", "dtd", "places365")),
    "imagenet": (("ssb_hard", "ninco"), ("inaturalist", "dtd", "openimage_o")),
}


@dataclass(frozen=True)
class Sets:
    """Images to fit detectors on, in-distribution images to score, and near and far others, by name."""

    fit: BetonSubset
    id: BetonSubset
    near: dict[str, BetonSubset]
    far: dict[str, BetonSubset]
    name: str  # of results

    @property
    def others(self) -> dict[str, BetonSubset]:
        return self.near | self.far

    def describe(self) -> dict:
        """What the result says of them; `train` and `val` as every evaluation names what it fits and tests on."""
        return {
            "train": described(self.fit),
            "val": described(self.id),
            "near": {name: described(data) for name, data in self.near.items()},
            "far": {name: described(data) for name, data in self.far.items()},
        }


def find_sets(
    encoder: RunEncoder,
    *,
    near: list[Path] = (),
    far: list[Path] = (),
    suite: str | None = None,
    root: str | Path = "data",
    fit: str | Path | None = None,
    id: str | Path | None = None,
) -> Sets:
    """A suite's sets in root/NAME/{test,val,train}.beton, or files; data.train and data.val of the run as fit and id.

    Raises UserError where a file is missing, two have one name, or they were not built alike.
    """
    if suite:
        near, far = ([_found(Path(root), name) for name in names] for names in SUITES[suite])
    if not near and not far:
        raise UserError("There is nothing to tell the ID images from: name files with --near and --far, or a --suite.")
    recipe = encoder.recipe.data
    if id is None and recipe.val is None:
        raise UserError(f"{encoder.run_dir}/recipe.yaml has no data.val to take as ID: give one with --id FILE.beton.")
    whole = BetonSubset(Path(fit)) if fit else BetonSubset(Path(recipe.train), recipe.subset, recipe.limit)
    images = whole.describe()["images"]
    fit_data = whole if images <= FIT_IMAGES else BetonSubset(whole.path, whole.subset, FIT_IMAGES)
    names = [name_of(Path(path)) for path in (*near, *far)]
    for name in names:
        if name == "id" or names.count(name) > 1:
            raise UserError(f"Two of the sets are called {name}: put one of them into a folder of another name.")
    groups = [(suite, [])] if suite else [(kind, paths) for kind, paths in (("near", near), ("far", far)) if paths]
    data = dict(zip(names, (BetonSubset(Path(path)) for path in (*near, *far))))
    sets = Sets(
        fit_data,
        BetonSubset(Path(id or recipe.val)),
        {name: data[name] for name in names[: len(near)]},
        {name: data[name] for name in names[len(near) :]},
        result_name(groups, id, fit),
    )
    check_built_alike([data.path for data in (sets.id, sets.fit, *sets.others.values())])
    return sets


def result_name(groups: list[tuple[str, list[Path]]], id: str | Path | None, fit: str | Path | None) -> str:
    """Such as near-textures-far-mnist, or cifar10-fit-photos."""
    groups = groups + [(kind, [path]) for kind, path in (("id", id), ("fit", fit)) if path]
    name = "-".join("-".join([kind, *(name_of(Path(path)) for path in paths)]) for kind, paths in groups)
    return name if len(name) <= LONGEST_NAME else hashlib.sha256(name.encode()).hexdigest()[:16]


def _found(root: Path, name: str) -> Path:
    paths = [root / name / f"{split}.beton" for split in SPLITS]
    return next((path for path in paths if path.is_file()), paths[0])


def name_of(path: Path) -> str:
    """mnist for mnist/test.beton, else such as photos-night for photos/night.beton."""
    folder = path.resolve().parent.name
    return folder if path.stem in SPLITS else f"{folder}-{path.stem}"


def check_built_alike(paths: list[Path]) -> None:
    """That all were stored in one way: else their files, not their images, could be told apart."""
    options = {}
    for path in paths:
        info = read_header(path)
        manifest = info.manifest
        if manifest is None:
            raise UserError(f"{path} has no {path.name}.json that says how it was built: build it with build-beton.")
        options[path] = {name: manifest.get(name) for name in BUILD_OPTIONS}
        # Of images of one size the device cuts out the view, of others the CPU, which rounds to whole grey levels.
        options[path]["images of one size"] = info.resolution is not None
    first = paths[0]
    for path in paths[1:]:
        different = [name for name, value in options[path].items() if value != options[first][name]]
        if different:
            name = different[0]
            raise UserError(
                f"{path} was built with {name}: {options[path][name]}, {first} with {name}: {options[first][name]}, "
                "which alone could tell them apart: build all sets with the same options."
            )


def described(data: BetonSubset) -> dict:
    """What every result says of a file, and what its images were before they were stored."""
    info = read_header(data.path)
    metadata = read_metadata(data.path)
    return {
        **data.describe(),
        "builder": info.manifest.get("builder"),
        "source_formats": info.manifest.get("source_formats"),  # None: built before they were counted
        "own_bytes": info.manifest["counts"]["passed_through"] / info.num_samples,  # share stored as they were
        "source_px": [float(np.median(metadata[side])) for side in ("height", "width")],
    }
