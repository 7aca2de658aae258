"""The source of a build: the builders, and the samples that they list.

A builder is a module of the package beton_builders. It knows where the images and labels of one data set are.
"""

import difflib
import hashlib
import importlib
import itertools
import os
import pickle
import pkgutil
import shlex
import stat
from array import array
from collections.abc import Callable, Container, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, NamedTuple, Protocol, cast

import numpy as np

from fastssl.common.errors import UserError, in_short, quote
from fastssl.common.terminal import progress

ORDER_SEED = 0
PROGRESS_EVERY = 10_000  # samples listed between two updates of the progress

# Where an image is, or its content: see `Sample.image`.
ImageFile = str | Path | bytes | tuple[str, int, int] | Callable[[], bytes]
ImageSource = ImageFile | np.ndarray
Order = Literal["shuffle", "source"]
SplitRule = Literal["auto", "none"]


class Sample(NamedTuple):
    """One image of the source and its label. The image is read later, in a worker process.

    `image` is one of
        the path of an image file,
        (path, offset, size): that many bytes of a larger file, such as a member of a tar file,
        a picklable function without arguments that returns the bytes of an image file; if it has an attribute `path`,
        a change of that file is seen by the next build,
        the bytes of an image file, or uint8 pixels (H, W) or (H, W, 3), where they are in memory.
    """

    image: ImageSource
    label: int  # index into the split's class names; -1 for an image without a label
    name: str  # the path within the source: messages about a bad image and index lists use it


@dataclass(frozen=True)
class LeftOut:
    """A builder yields this among its samples: images within its archives or tables of which it makes no samples."""

    reason: str  # such as "rows without an image"; one reason may be given several times
    count: int


Listed = Mapping[str, tuple[list[str], Iterable[Sample | LeftOut]]]  # split -> (class names, samples)


class Builder(Protocol):
    """A module of beton_builders. The docstring of that package describes the optional names, such as SOURCE."""

    CANVAS: int  # px, the side of the canvas unless --canvas sets another

    # With SPLITS_BY_NAME it also takes `by_name`, with LISTS_ARRAYS `arrays`.
    def splits(self, source: Path | None) -> Listed:
        """Return for each split the class names and the samples. Raises ValueError if `source` has another layout."""


class BuilderInfo(NamedTuple):
    """A line of `fastssl build-beton --list`."""

    name: str
    summary: str  # the first line of the builder's docstring
    can_download: bool


class SourceSplit(NamedTuple):
    """One split of a data set."""

    name: str  # such as "train"
    classes: list[str]  # class names, in the order of the labels; may be empty if no image has a label
    samples: Sequence[Sample]
    order: np.ndarray  # indices of `samples` in the order of the file
    empty_classes: list[str]  # names of classes without samples
    left_out: dict[str, int]  # reason -> number of images within archives or tables that are no samples


BUILT_SPLITS = ("train", "val", "test")  # names of the files that builders write


def builder_names() -> list[str]:
    """Return the names of all builders, sorted."""
    package = importlib.import_module("beton_builders")
    names = (module.name for module in pkgutil.iter_modules(package.__path__))
    return sorted(name for name in names if not name.startswith("_"))


def describe_builders() -> list[BuilderInfo]:
    """Describe every builder in one line."""
    builders = [(name, load_builder(name)) for name in builder_names()]
    return [
        BuilderInfo(name, (builder.__doc__ or "").strip().split("\n")[0], hasattr(builder, "DOWNLOAD"))
        for name, builder in builders
    ]


def load_builder(name: str) -> Builder:
    """Import beton_builders.NAME. Raises UserError, with the most similar name, if there is no such builder."""
    names = builder_names()
    if name not in names:
        similar = difflib.get_close_matches(name, names, 1)
        hint = f"did you mean {similar[0]}? The" if similar else "the"
        raise UserError(f"Unknown builder {quote(name)}", hint=f"{hint} builders are {', '.join(names)}")
    return cast(Builder, importlib.import_module(f"beton_builders.{name}"))


def how_to_make(path: Path) -> str:
    """What to do where the .beton file `path` is missing: name one that is there, or the command that makes it."""
    there = sorted(file.name for file in path.parent.glob("*.beton"))
    if near := difflib.get_close_matches(path.name, there, 1, cutoff=0.75):
        return f"did you mean {path.with_name(near[0])}?"
    # Shipped recipes read data/DATASET/train.beton.
    folder = path.parent if path.stem in BUILT_SPLITS else path.with_suffix("")
    builder = folder.name if folder.name in builder_names() else "imagefolder"
    module = load_builder(builder)
    source = " --source DIR" if hasattr(module, "SOURCE") else ""
    download = " --download" if hasattr(module, "DOWNLOAD") else ""
    make = f"make it with `fastssl build-beton {builder}{source}{download} --out {shlex.quote(str(folder))}`"
    if folder not in (path, path.parent):
        make += f", and name {folder / 'train.beton'}"
    return make + (f", or name {path.with_name(there[0])}" if there else "")


def download_dataset(builder: str, source: Path | None) -> None:
    """Download the builder's data set to the folder `source` with torchvision, which checks it."""
    calls = getattr(load_builder(builder), "DOWNLOAD", None)
    if calls is None:
        raise UserError(
            f"{builder} cannot be downloaded", hint="`fastssl build-beton --list` shows which data sets can"
        )
    if source is None:
        raise UserError("--download needs --source, the folder to download to", hint="add --source DIR")
    source.mkdir(parents=True, exist_ok=True)
    try:
        from torchvision import datasets

        for call in calls:
            options = {name: value for name, value in call.items() if name != "dataset"}
            getattr(datasets, call["dataset"])(root=source, download=True, **options)
    except (OSError, RuntimeError, ImportError) as error:
        raise UserError(
            f"{builder} could not be downloaded to {source} ({in_short(error)})",
            hint="check the network, and run the same command again",
        ) from error


def list_splits(
    builder: str,
    source: Path | None,
    order: Order = "shuffle",
    limit: int | None = None,
    split_rule: SplitRule = "auto",
    arrays: bool = False,
    hold_out: float | None = None,
) -> list[SourceSplit]:
    """List the splits of `source` (None: the builder brings its own images) with their samples.

    Order "shuffle" is a fixed random order, "source" the builder's. A `limit` takes only this many samples of each
    split, chosen at random. With the `split_rule` "none" no name of a folder or file tells a split. With `arrays`,
    builders that search folders list .npy files too. `hold_out` percent of a source without splits become the split
    val. Raises UserError if `source` cannot be read or does not have the builder's layout.
    """
    module = load_builder(builder)
    if source is None and hasattr(module, "SOURCE"):
        download = ", and --download to download the data set to it" if hasattr(module, "DOWNLOAD") else ""
        raise UserError(f"{builder} needs --source, {module.SOURCE}", hint=f"add --source DIR{download}")
    if source is not None and source.exists() and not (source.is_file() or source.is_dir()):
        raise UserError(
            f"{source} is a pipe, a socket or a device", hint=f"name the folder or archive of {builder} with --source"
        )
    if source is not None and not source.exists():
        download = ", or add --download to download the data set to it" if hasattr(module, "DOWNLOAD") else ""
        raise UserError(
            f"{source} does not exist", hint=f"name the folder or archive of {builder} with --source{download}"
        )
    options = {"by_name": split_rule == "auto"} if hasattr(module, "SPLITS_BY_NAME") else {}
    if split_rule == "none" and not options:
        raise UserError(f"{builder} does not take its splits from names", hint="leave out --splits none")
    if hasattr(module, "LISTS_ARRAYS"):
        options["arrays"] = arrays

    def list_all() -> Listed:
        return module.splits(source, **options)

    splits = []
    try:
        listed_splits = list_all() if hold_out is None else _hold_out(list_all, hold_out)
        for name, (classes, listed) in listed_splits.items():
            left_out: dict[str, int] = {}
            labels: set[int] = set()
            # Pixels that are in memory anyway stay in the builder's list.
            in_memory = isinstance(listed, Sequence)
            kept = _without_left_out(listed if in_memory else _with_progress(listed, name), left_out, labels)
            samples = list(kept) if in_memory else SampleList(kept)
            # A file that is sorted by class would make its first thousand samples one class. One permutation serves
            # both orders, so that `limit` takes the same samples.
            chosen = np.random.default_rng(ORDER_SEED).permutation(len(samples))[:limit]
            indices = chosen if order == "shuffle" else np.sort(chosen)
            names = [as_utf8(class_name) for class_name in classes]
            empty = [class_name for label, class_name in enumerate(names) if label not in labels]
            splits.append(SourceSplit(name, names, samples, indices, empty, left_out))
    except PermissionError as error:
        raise UserError(f"{error.filename} cannot be read", hint="make it readable for your user") from error
    except (OSError, ValueError, ImportError) as error:
        raise explain_builder_error(builder, error) from error
    if not splits:
        raise UserError(f"{source} holds no files of {builder}", hint="name its folder or archive with --source")
    for split in splits:
        if not split.samples and hold_out is not None and any(each.samples for each in splits):
            raise UserError(
                f"--hold-out {hold_out:g}% leaves the split {split.name!r} without images",
                hint="name another share, or leave it out",
            )
        if not split.samples:
            raise UserError(
                f"{source} holds no images for the split {split.name!r}",
                hint=f"name the folder or archive of {builder} with --source, or remove what is empty there",
            )
    return splits


def _hold_out(list_all: Callable[[], Listed], percent: float) -> Listed:
    """Return the split train as train and val. The source is listed for each of them, as its samples may be many.

    A hash of its name decides about a sample: it stays in its split when other images are added or removed.
    """

    def is_held_out(sample: Sample) -> bool:
        name = hashlib.sha256(os.fsencode(sample.name)).digest()
        return int.from_bytes(name[:8], "big") < percent / 100 * 2**64

    first = list_all()
    if list(first) != ["train"]:
        raise UserError(
            f"--hold-out is for a source without splits, and this one has {', '.join(first)}",
            hint="leave out --hold-out",
        )
    classes, listed = first["train"]
    train = (each for each in listed if isinstance(each, LeftOut) or not is_held_out(each))
    val = (each for each in list_all()["train"][1] if isinstance(each, Sample) and is_held_out(each))
    return {"train": (classes, train), "val": (classes, val)}


def explain_builder_error(builder: str, error: Exception) -> UserError:
    """A builder, which imports nothing but Sample, raises ValueError("what is wrong: what to do.")."""
    message, _, hint = str(error).rpartition(": ")
    if not message or getattr(error, "errno", None) or not hint[:1].islower():  # of the system or of another library
        return UserError(str(error), hint=f"name the folder or archive of {builder} with --source")
    return UserError(message, hint=hint)


def _without_left_out(
    listed: Iterable[Sample | LeftOut], left_out: dict[str, int], labels: set[int]
) -> Iterator[Sample]:
    """Yield the samples. Count in `left_out` what is no sample, by reason, and add the samples' labels to `labels`."""
    for each in listed:
        if isinstance(each, LeftOut):
            left_out[each.reason] = left_out.get(each.reason, 0) + each.count
        else:
            labels.add(each.label)
            yield each


def _with_progress(samples: Iterable[Sample | LeftOut], split: str) -> Iterator[Sample | LeftOut]:
    """Yield the samples and show their number: on a slow disk, listing a million takes minutes."""
    samples = iter(samples)
    with progress(f"{split}: listing", None) as advance:
        while chunk := list(itertools.islice(samples, PROGRESS_EVERY)):
            yield from chunk
            advance(len(chunk))


def as_utf8(name: str) -> str:
    """Escape what is not UTF-8 in a file name."""
    return name.encode("utf-8", "backslashreplace").decode()


class SampleList(Sequence[Sample]):
    """Samples in little memory, in the order given: each is stored pickled.

    A sample with a path of 50 characters takes about 120 bytes, a sixth of the objects' size. Adding a million samples
    takes 3 seconds, reading one 3 microseconds.
    """

    def __init__(self, samples: Iterable[Sample]) -> None:
        self.content = bytearray()
        self._ends = array("Q", [0])  # byte positions in `_content`
        for image, label, name in samples:
            if isinstance(image, Path):
                image = os.fspath(image)
            self.content += pickle.dumps((image, label, name), protocol=5)
            self._ends.append(len(self.content))

    def __len__(self) -> int:
        return len(self._ends) - 1

    def __getitem__(self, position: int) -> Sample:  # type: ignore[override]  # slices are not needed
        if not 0 <= position < len(self):
            raise IndexError(position)
        with memoryview(self.content) as content:
            return Sample(*pickle.loads(content[self._ends[position] : self._ends[position + 1]]))


def digest(samples: Sequence[Sample], paths: bool = True) -> str:
    """Return a SHA-256 of the samples' number, order, paths, labels, names and pixels; files are not read.

    paths: whether files count by their paths; if not, only by the names of their samples within the source.
    """
    if isinstance(samples, SampleList) and paths:
        return hashlib.sha256(samples.content).hexdigest()
    result = hashlib.sha256()
    for image, label, name in samples:
        if file_of(image) is not None and not paths:
            result.update(repr((label, name)).encode())
        elif isinstance(image, np.ndarray):
            result.update(repr((label, name, image.shape)).encode())
            result.update(np.ascontiguousarray(image).data)
        else:
            result.update(repr((label, name, image)).encode())
    return result.hexdigest()


def file_of(image: ImageSource) -> str | os.PathLike[str] | None:
    """Return the path of the file that holds an image, None if it is in memory or its function does not tell."""
    path = image[0] if isinstance(image, tuple) else getattr(image, "path", image)
    return path if isinstance(path, str | os.PathLike) else None


def changed_since(
    samples: Sequence[Sample], indices: Iterable[int], time_ns: int, missing: Container[int] = ()
) -> bool:
    """Return whether the file of any of these samples was written, moved, replaced or deleted after a time.

    Args:
        samples: all samples of the split.
        indices: which of them to look at.
        time_ns: since the epoch, by the clock of the file system.
        missing: indices of samples whose files did not exist then: they have changed if they exist now.
    """
    previous = None
    for index in indices:
        path = file_of(samples[index].image)
        if path is None or path == previous:
            continue
        previous = path
        try:
            found = os.lstat(path)
            if stat.S_ISLNK(found.st_mode):
                # The link may be new and its file old.
                if found.st_ctime_ns > time_ns:
                    return True
                found = os.stat(path)
        except OSError:
            if index not in missing:
                return True
            continue
        if found.st_ctime_ns > time_ns or index in missing:
            return True
    return False
