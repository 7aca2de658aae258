"""Features of a .beton file: one pass of a frozen encoder over the evaluation transform, cached in RUN/features/.

The name of a cache folder contains a hash of everything that its numbers depend on, weights included. So a cache is
never stale: with other weights, another file or another view the name differs. A folder may be deleted at any time.
"""

import hashlib
import json
import os
import platform
import shutil
import time
import zlib
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal, cast

import numpy as np
import torch
import torch.nn.functional as F
from numpy.lib.format import open_memmap
from pydantic import TypeAdapter, ValidationError
from torch import Tensor, nn
from typing_extensions import TypedDict

from fastssl.beton import read_header
from fastssl.beton.shards import split_of
from fastssl.common.errors import UserError
from fastssl.common.files import (
    LARGEST_TEXT,
    abandoned_parts,
    explain_write_errors,
    make_folder,
    open_regular,
    part_of,
    read_bytes,
)
from fastssl.common.randomness import NOISE_EVALUATION, normals
from fastssl.evaluation.arrays import Advance, Device, as_tensor
from fastssl.evaluation.runs import BetonSubset, RunEncoder
from fastssl.loading import Batch, BetonLoader, SampleSelection
from fastssl.loading.samples import Samples
from fastssl.models.gaussian import GaussianHead
from fastssl.models.ssl_model import Embedding, evaluating
from fastssl.recipe import ViewsConfig
from fastssl.views import PairedViews, describe_eval_transform, eval_transform

CACHE_VERSION = 2  # raise it when the same inputs give other numbers
BATCH_SIZE = 256
CHUNK_BYTES = 1 << 26  # of an array in a file read at a time, and of noise drawn at a time
ABANDONED_AFTER = 86_400  # seconds after which an unfinished cache of another machine is a leftover
ARRAYS = ("h", "label", "index", "mu", "sigma")  # of Features

DType = Literal["float32", "float16"]
# From a batch to the input of `embed`: (B, C, size, size), or (B, V, C, size, size) for V views of each image.
MakeInput = Callable[[Batch], Tensor]


class About(TypedDict):
    """about.json of a cache."""

    space: Literal["h", "z"] | None
    crc32: dict[Literal["h", "label", "index", "mu", "sigma"], int]  # of the numbers in each array


class Host(TypedDict):
    """about.json of a cache that is being written."""

    host: str


@dataclass(frozen=True)
class Features:
    """The embeddings of N images, in the order of the file. Cached ones are read-only memory maps.

    Of two augmented views of each image, h is (N, 2, D), mu and sigma are (N, 2, E).
    """

    h: np.ndarray  # (N, D) float32 or float16: the representation; its mean where h is stochastic
    label: np.ndarray  # (N,) int64
    index: np.ndarray  # (N,) int64: sample ids
    mu: np.ndarray | None = None  # (N, E), the type of h: mean of the stochastic embedding
    sigma: np.ndarray | None = None  # (N, E): its standard deviation
    space: Literal["h", "z"] | None = None  # where the stochastic embedding lives

    def select(self, rows: np.ndarray) -> "Features":
        """Some of the rows, copied into memory."""
        return Features(**{name: x[rows] for name, x in self.arrays().items()}, space=self.space)

    def arrays(self) -> dict[str, np.ndarray]:
        """The fields that are arrays, by name."""
        return {name: x for name, x in vars(self).items() if isinstance(x, np.ndarray)}


def cached_features(
    encoder: RunEncoder, data: BetonSubset, dtype: DType = "float32", *, augmented: bool = False
) -> Features:
    """The features of a .beton by the encoder of a run, read from RUN/features/ or computed and written there.

    They are written batch by batch and returned as memory maps, so a set of any size takes little memory.

    dtype is that of the stored h, mu and sigma. With `augmented`, both training views of each image are embedded
    (`augmented_input`) in place of the evaluation transform.

    Raises:
        UserError: the encoder outputs numbers that are not finite or too large for `dtype`, or the cache cannot be
            written.
    """
    views = encoder.recipe.views
    make_input = augmented_input(views) if augmented else eval_input(views)
    view = views.model_dump(mode="json") if augmented else describe_eval_transform(views)

    def compute(loader: BetonLoader, advance: Advance) -> Iterator[Features]:
        return check_finite(embed_batches(encoder.model, loader, make_input, advance), data.path, dtype)

    work = f"features of {data.path}" + (", two views" if augmented else "")
    depends_on = {"view": view, "dtype": dtype}

    def fits(features: Features) -> bool:
        width = cast(int, encoder.model.encoder.num_features)
        widths: dict[str, int | None] = {"h": width, "mu": None, "sigma": None}
        if len(encoder.model.heads):
            head = cast(GaussianHead, encoder.model.heads["h" if "h" in encoder.model.heads else "z"])
            widths["mu"] = widths["sigma"] = head.mu.out_features
        views = (2,) if augmented else ()
        found = {name: None if x is None else x.shape[1:] for name, x in vars(features).items() if name in widths}
        return found == {name: width and (*views, width) for name, width in widths.items()}

    return load_or_compute_features(encoder, data, depends_on, work, compute, dtype, augmented=augmented, fits=fits)


def load_or_compute_features(
    encoder: RunEncoder,
    data: BetonSubset,
    depends_on: dict[str, Any],
    work: str,
    compute: Callable[[BetonLoader, Advance], Iterable[Features]],
    dtype: DType = "float32",
    *,
    augmented: bool = False,
    fits: Callable[[Features], bool] = lambda features: True,
) -> Features:
    """Return the cache of these inputs, or write it with what `compute` yields, in the order of the loader.

    Args:
        depends_on: JSON values that the numbers depend on, besides the weights, the file (path, size and modification
            time) and the chosen images.
        work: what is computed, for the title of the progress.
        compute: called with a loader of the images and the function that advances the progress bar by images.
        dtype: of the floats in the cache.
        fits: whether a cache has the widths that this encoder gives; else it is written again.
    """
    parts = read_header(data.path).parts
    files = [[str(part.path.resolve()), part.size, part.mtime_ns] for part in parts]
    depends_on = depends_on | {
        "version": CACHE_VERSION,
        "weights": encoder.sha256,
        "beton": files[0] if len(files) == 1 else files,
        "subset": data.subset_sha256(),
        "limit": data.limit,
    }
    key = hashlib.sha256(json.dumps(depends_on, sort_keys=True).encode()).hexdigest()[:16]
    folder = encoder.run_dir / "features" / f"{split_of(data.path)}-{key}"
    features = read_features(folder)

    def is_sound(features: Features) -> bool:
        return fits(features) and _are_of(data, features)

    if features is None or not is_sound(features):
        loader = eval_loader(data, encoder.recipe.views, encoder.device, augmented=augmented)
        with encoder.progress(work, len(loader.rows)) as advance:
            write_features(folder, compute(loader, advance), len(loader.rows), dtype, is_sound)
        features = read_features(folder)
        if features is None or not is_sound(features):
            raise UserError(f"{folder} is damaged although it was just written", hint="check the disk")
    return features


def compute_features(model: nn.Module, data: BetonSubset, views: ViewsConfig, *, skip: int = 0) -> Features:
    """The features of a .beton under the evaluation transform, in memory.

    The model has `embed(images) -> Embedding`; its device is used. `skip` leaves out the first images of the random
    draw that data.limit makes.
    """
    loader = eval_loader(data, views, next(model.parameters()).device, skip=skip)
    return concatenate(list(embed_batches(model, loader, eval_input(views))))


def _are_of(data: BetonSubset, features: Features) -> bool:
    """Whether the features have the ids and labels of these images, in their order."""
    samples = Samples.read(read_header(data.path))
    rows = SampleSelection(data.subset, data.limit).rows(samples)
    pairs = (features.index, "index"), (features.label, "label")
    return all(np.array_equal(cached, samples.column(name, rows)) for cached, name in pairs)


def concatenate(batches: list[Features]) -> Features:
    columns = {name: np.concatenate([batch.arrays()[name] for batch in batches]) for name in batches[0].arrays()}
    return Features(**columns, space=batches[0].space)


@torch.inference_mode()
def embed_batches(
    model: nn.Module, loader: Iterable[Batch], make_input: MakeInput, advance: Advance = lambda images: None
) -> Iterator[Features]:
    """Yield the features of the valid samples of each batch.

    The model runs in eval mode, so batch norm uses its running statistics and does not change them; its former mode is
    restored. Autocast and TF32 are off. With V views per image in the input, h, mu and sigma are (B, V, D).
    """
    embed = cast(Callable[[Tensor], Embedding], model.embed)
    with evaluating(model):
        for batch in loader:
            with in_fp32(batch.index.device):
                images = make_input(batch)
                embedding = embed(images.flatten(0, -4))
            outputs = {"h": embedding.h, "mu": embedding.mu, "sigma": embedding.sigma}
            arrays = {name: x.unflatten(0, images.shape[:-3]) for name, x in outputs.items() if x is not None}
            arrays |= {"label": batch.label, "index": batch.index}
            features = Features(**{name: valid_rows(x, batch) for name, x in arrays.items()}, space=embedding.space)
            yield features
            advance(len(features.label))


def eval_loader(
    data: BetonSubset,
    views: ViewsConfig,
    device: torch.device,
    *,
    skip: int = 0,
    augmented: bool = False,
    batch_size: int = BATCH_SIZE,
) -> BetonLoader:
    """Load each image once, in the order of the file, for `eval_input`, or for `augmented_input` if `augmented`."""
    # Images of one size go to the device as they are. Of images of several sizes, the CPU crops the view.
    crop: Literal["gpu", "cpu", "eval"] = "gpu" if read_header(data.path).resolution else "cpu" if augmented else "eval"
    return BetonLoader(
        data.path, batch_size, crop=crop, views=views, shuffle=False, drop_last=False, device=device,
        selection=SampleSelection(data.subset, data.limit, skip), shard=False,
    )  # fmt: skip


def eval_input(views: ViewsConfig) -> MakeInput:
    """The evaluation transform of each image: (B, C, size, size)."""
    transform = eval_transform(views)
    return lambda batch: transform(batch.image, batch.height, batch.width)


@lru_cache(maxsize=4)
def augmented_input(views: ViewsConfig) -> MakeInput:
    """Both training views of each image, as in the first epoch of a run with seed 0: (B, 2, C, size, size)."""
    pair = PairedViews(views)
    return lambda batch: torch.stack(pair(batch.image, batch.index, 0, batch.height, batch.width), dim=1)


@contextmanager
def in_fp32(device: torch.device) -> Iterator[None]:
    """Switch autocast and TF32 off inside the block."""
    cudnn = torch.backends.cudnn
    # All flags are passed: cudnn.flags() resets those that are left out.
    fp32_flags = cudnn.flags(enabled=cudnn.enabled, benchmark=cudnn.benchmark, allow_tf32=False)
    with torch.autocast(device.type, enabled=False), fp32_flags:
        yield


def valid_rows(x: Tensor, batch: Batch) -> np.ndarray:
    """The rows of the valid samples of a batch, as float32 or int64 on the CPU."""
    return x[batch.valid].to("cpu", torch.float32 if x.is_floating_point() else torch.int64).numpy()


def check_finite(batches: Iterable[Features], beton: Path, dtype: DType) -> Iterator[Features]:
    """Yield the batches. Raises UserError at the first number that is not finite in `dtype`."""
    largest = np.finfo(dtype).max
    for batch in batches:
        values = np.array([np.abs(x).max() for x in (batch.h, batch.mu, batch.sigma) if x is not None])
        if not np.isfinite(values).all():
            raise UserError(f"The encoder outputs numbers that are not finite on {beton}", hint="train it again")
        if values.max() > largest:
            raise UserError(f"The encoder outputs numbers up to {values.max():.3g}", hint=f"leave out --dtype {dtype}")
        yield batch


def write_features(
    folder: Path,
    batches: Iterable[Features],
    count: int,
    dtype: DType = "float32",
    fits: Callable[[Features], bool] = lambda features: True,
) -> None:
    """Write `count` samples, batch by batch, to one .npy file per field of Features.

    The files are written to a temporary folder that is renamed at the end, so `folder` is complete or not there. Raises
    UserError if they cannot be written, and what iterating over the batches raises.
    """
    temporary = part_of(folder)
    with explain_write_errors(folder):
        make_folder(folder.parent)
        for part in abandoned_parts(folder.parent):
            _remove_abandoned(part)
        shutil.rmtree(temporary, ignore_errors=True)  # of an ended process with our number
        temporary.mkdir()
    try:
        with explain_write_errors(folder):
            # Which machine the number in the folder's name belongs to.
            (temporary / "about.json").write_text(json.dumps({"host": platform.node()}))
        maps: dict[str, np.memmap] = {}
        checksums: dict[str, int] = {}
        space, done = None, 0
        for batch in batches:
            space = batch.space
            for name, array in batch.arrays().items():
                if name == "mu" and space == "h":  # mu is h there: it is stored once
                    continue
                x = np.ascontiguousarray(array, dtype if array.dtype.kind == "f" else None)
                if name not in maps:
                    with explain_write_errors(folder):
                        maps[name] = _new_map(temporary / f"{name}.npy", x.dtype, (count, *x.shape[1:]))
                maps[name][done : done + len(x)] = x
                checksums[name] = zlib.crc32(x.data, checksums.get(name, 0))
            done += len(batch.label)
        assert done == count, f"{done} samples where {count} were expected"
        with explain_write_errors(folder):
            for array in maps.values():
                array.flush()
            (temporary / "about.json").write_text(json.dumps({"space": space, "crc32": checksums}))
            # Another process may have written the same cache in the meantime.
            if (other := read_features(folder)) is None or not fits(other):
                shutil.rmtree(folder, ignore_errors=True)  # a damaged one
                temporary.rename(folder)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _new_map(path: Path, dtype: np.dtype, shape: tuple[int, ...]) -> np.memmap:
    """A memory map of a new file whose blocks are all allocated: on a full disk, writing to holes kills the process."""
    array = open_memmap(path, "w+", dtype, shape)
    with open(path, "r+b") as file:
        os.posix_fallocate(file.fileno(), 0, array.offset + array.nbytes)
    return array


def _remove_abandoned(part: Path) -> None:
    """Remove the unfinished cache of a process that is gone, and nothing else."""
    try:
        host = TypeAdapter(Host).validate_json(read_bytes(part / "about.json", LARGEST_TEXT))["host"]
        files = list(part.iterdir())
        # Of a process on another machine it is not known whether it is gone, only when it wrote last.
        is_gone = host == platform.node() or time.time() - max(x.stat().st_mtime for x in files) > ABANDONED_AFTER
        is_ours = {file.name for file in files} <= {"about.json", *(f"{name}.npy" for name in ARRAYS)}
        if is_gone and is_ours and not part.is_symlink():
            shutil.rmtree(part)
    except (OSError, ValidationError):  # of something else, or another process has removed it
        pass


def read_features(folder: Path) -> Features | None:
    """Read a cache folder as memory maps. None if it does not exist or is damaged. No code in it is run (no pickle)."""
    try:
        about = TypeAdapter(About).validate_json(read_bytes(folder / "about.json", LARGEST_TEXT), strict=True)
        arrays = {name: _read_map(folder / f"{name}.npy", crc) for name, crc in about["crc32"].items()}
        if about["space"] == "h":
            arrays["mu"] = arrays["h"]
        features = Features(**arrays, space=about["space"])
        _check_shapes(features)
        return features
    except Exception:  # damaged bytes raise errors of many types
        return None


def _read_map(path: Path, crc: int) -> np.ndarray:
    """Map an array into memory. Raises ValueError if it has another checksum, or a number that is not finite."""
    open_regular(path).close()
    array: np.ndarray = open_memmap(path, "r")
    if array.dtype not in (np.float32, np.float16, np.int64):
        raise ValueError(f"{array.dtype}")
    found, rows = 0, max(1, CHUNK_BYTES // max(1, array[:1].nbytes))
    for first in range(0, len(array), rows):
        chunk = np.ascontiguousarray(array[first : first + rows])
        found = zlib.crc32(chunk.data, found)
        if not np.isfinite(chunk).all():
            raise ValueError("not finite")
    if found != crc:
        raise ValueError("checksum")
    return array


def _check_shapes(features: Features) -> None:
    """Raise ValueError unless the arrays have the types and shapes of Features, with a row per image each."""
    h, rows = features.h, features.label.shape
    stochastic = [x for x in (features.mu, features.sigma) if x is not None]
    if h.ndim not in (2, 3) or any(x.shape[:-1] != h.shape[:-1] or x.dtype != h.dtype for x in stochastic):
        raise ValueError("shapes of h, mu and sigma")
    if rows != h.shape[:1] or features.index.shape != rows:
        raise ValueError("rows of h, label and index")
    if (h.dtype == np.int64) or features.label.dtype != np.int64 or features.index.dtype != np.int64:
        raise ValueError("types")
    if len(stochastic) != (0 if features.space is None else 2):
        raise ValueError("mu and sigma")


def mean_of_draws(features: Features, draws: int, seed: int, *, normalize: bool, device: Device = "cpu") -> np.ndarray:
    """The mean over `draws` samples of h ~ N(mu, sigma^2), (N, D) float32; h itself without draws.

    The logits of a linear classifier, averaged over draws, are its logits of this mean. So averaging logits in training
    and in testing is training and testing on the mean, and the draws need not be stored. With `normalize`, each draw is
    divided by its length. The noise is a function of (seed, sample id, draw).
    """
    if draws == 0:
        return features.h
    if features.space != "h" or features.mu is None or features.sigma is None:
        raise ValueError("Only a stochastic h has draws to average over.")
    count, width = features.mu.shape
    mean_ND = np.empty((count, width), np.float32)
    rows = max(1, CHUNK_BYTES // (4 * draws * width))
    for first in range(0, count, rows):
        part = slice(first, first + rows)
        mu_BD = as_tensor(features.mu[part]).to(device).float()
        sigma_BD = as_tensor(features.sigma[part]).to(device).float()
        index_B = as_tensor(features.index[part]).to(device)
        noise_SBD = normals(seed, 0, index_B, 0, draws, width, NOISE_EVALUATION)
        h_SBD = mu_BD + sigma_BD * noise_SBD
        mean_ND[part] = (F.normalize(h_SBD, dim=-1) if normalize else h_SBD).mean(dim=0).cpu().numpy()
    return mean_ND
