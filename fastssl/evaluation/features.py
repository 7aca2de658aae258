"""Features of a whole .beton: one pass of a frozen encoder over the clean view, kept on disk, read as maps.

A cached folder is named by a hash of everything that its numbers depend on, the weights included, so it never has to be
invalidated: a changed weight, file or view asks for another name. It may be deleted at any time.
"""

import hashlib
import json
import os
import shutil
import tempfile
import time
import zlib
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from numpy.lib.format import open_memmap
from torch import Tensor, nn

from fastssl.beton import read_header, read_index_list
from fastssl.common.errors import UserError
from fastssl.common.files import explain_write_errors
from fastssl.common.randomness import NOISE_EVALUATION, normals
from fastssl.common.terminal import progress
from fastssl.evaluation.arrays import as_tensor
from fastssl.loading import Batch, BetonLoader
from fastssl.models.ssl_model import evaluating
from fastssl.recipe import ViewsConfig
from fastssl.views import PairedViews, describe_eval_transform, eval_transform

CACHE_VERSION = 2  # raise it when the same inputs give other numbers
A_DAY = 86_400  # seconds
BATCH_SIZE = 256
CHUNK_BYTES = 1 << 26  # of a mapped array read at a time, and of noise drawn at a time

DType = Literal["float32", "float16"]


class Features(NamedTuple):
    """What an encoder makes of N images, in the order of the file. Large ones are maps of files, read-only.

    Of two augmented views of each image, h, mu and sigma are (N, 2, D) and (N, 2, E).
    """

    h: np.ndarray  # (N, D) float32 or float16: the representation; where h is stochastic, its mean
    label: np.ndarray  # (N,) int64
    index: np.ndarray  # (N,) int64: sample ids
    mu: np.ndarray | None = None  # (N, E), the type of h: mean of a stochastic embedding
    sigma: np.ndarray | None = None  # (N, E): its standard deviation
    space: str | None = None  # where that embedding lives, "h" or "z"

    def rows(self, rows: np.ndarray) -> "Features":
        """A part of them, in memory."""
        return Features(*(x[rows] if isinstance(x, np.ndarray) else x for x in self))


def mean_of_draws(
    features: Features, draws: int, seed: int, *, normalize: bool, device: torch.device | str = "cpu"
) -> np.ndarray:
    """(N, D) float32: the mean over `draws` of h ~ N(mu, sigma^2), each first divided by its length if `normalize`.

    A linear classifier's logits, averaged over draws, are its logits of this mean, so nothing else need be kept of the
    draws: averaged logits in training and in testing come to training and testing on it. The noise is a function of
    (seed, sample, draw).
    """
    if features.space != "h":
        raise ValueError("Only a stochastic h has draws to average over.")
    mean_ND = np.empty(features.mu.shape, np.float32)
    rows = max(1, CHUNK_BYTES // (4 * draws * mean_ND.shape[1]))
    for first in range(0, len(mean_ND), rows):
        part = slice(first, first + rows)
        mu_BD, sigma_BD = (as_tensor(x[part]).to(device).float() for x in (features.mu, features.sigma))
        index_B = as_tensor(features.index[part]).to(device)
        noise_SBD = normals(seed, 0, index_B, 0, draws, mu_BD.shape[1], NOISE_EVALUATION)
        h_SBD = mu_BD + sigma_BD * noise_SBD
        mean_ND[part] = (F.normalize(h_SBD, dim=-1) if normalize else h_SBD).mean(dim=0).cpu().numpy()
    return mean_ND


def extract_features(
    model: nn.Module,
    loader: Iterable[Batch],
    clean: Callable[..., Tensor],
    *,
    advance: Callable[[int], object] = lambda images: None,
) -> Features:
    """Embed every valid sample that the loader gives, in its order; all in memory.

    model: has `embed(images) -> Embedding(h, mu, sigma, space)`; it runs in eval mode, so that batch norm uses its
    running statistics and leaves them alone, and gets its former mode back.
    loader: its batches have image, height, width, label, index and valid, on the model's device.
    clean: uint8 images (B, H, W, 3), and the source images' sizes, to what `embed` takes. `advance` is told of each
    batch's number of images. Autocast and TF32 are off, whatever surrounds the call.
    """
    parts = list(embedded_batches(model, loader, eval_input(clean), advance))
    *arrays, space = zip(*parts, strict=True)
    return Features(*(None if column[0] is None else np.concatenate(column) for column in arrays), space[0])


@torch.inference_mode()
def embedded_batches(
    model: nn.Module, loader: Iterable[Batch], look: Callable[[Batch], Tensor], advance: Callable[[int], object]
) -> Iterator[Features]:
    """`extract_features`, batch by batch.

    look: from a batch to what `embed` takes: one image a sample (B, 3, size, size), or several (B, views, 3, size,
    size), and then h, mu and sigma are (B, views, D).
    """
    with evaluating(model):
        for batch in loader:
            with in_fp32(batch.image.device):
                images = look(batch)
                embedding = model.embed(images.flatten(0, -4))
            h, mu, sigma = (
                None if x is None else kept(x.unflatten(0, images.shape[:-3]), batch)
                for x in (embedding.h, embedding.mu, embedding.sigma)
            )
            features = Features(h, kept(batch.label, batch), kept(batch.index, batch), mu, sigma, embedding.space)
            yield features
            advance(len(features.label))


def eval_input(clean: Callable[..., Tensor]) -> Callable[[Batch], Tensor]:
    return lambda batch: clean(batch.image, batch.height, batch.width)


def augmented_input(views: ViewsConfig) -> Callable[[Batch], Tensor]:
    """Both training views of each image, as a run with seed 0 sees them in its first epoch: (B, 2, 3, size, size)."""
    pair = PairedViews(views)
    return lambda batch: torch.stack(pair(batch.image, batch.index, 0, batch.height, batch.width), dim=1)


@contextmanager
def in_fp32(device: torch.device) -> Iterator[None]:
    """No autocast and no TF32, whatever surrounds it."""
    cudnn = torch.backends.cudnn
    exactly = cudnn.flags(enabled=cudnn.enabled, benchmark=cudnn.benchmark, allow_tf32=False)
    with torch.autocast(device.type, enabled=False), exactly:
        yield


def kept(x: Tensor, batch: Batch) -> np.ndarray:
    """The rows of a batch that are samples, as float32 or int64 on the CPU."""
    return x[batch.valid].to("cpu", torch.float32 if x.is_floating_point() else torch.int64).numpy()


def eval_loader(
    beton: str | Path,
    views: ViewsConfig,
    device: torch.device,
    subset: str | Path | None = None,
    limit: int | None = None,
    skip: int = 0,
    augmented: bool = False,
) -> BetonLoader:
    """Each image of a .beton once, in the file's order, for `eval_transform`, or for `augmented_input`."""
    # Images of one size go to the device as they are; of others, the CPU cuts out the view's part.
    crop = "gpu" if read_header(beton).resolution else "cpu" if augmented else "eval"
    return BetonLoader(
        beton, BATCH_SIZE, crop=crop, views=views, shuffle=False, drop_last=False, device=device, subset=subset,
        limit=limit, skip=skip, shard=False,
    )  # fmt: skip


def compute_features(
    model: nn.Module,
    beton: str | Path,
    views: ViewsConfig,
    *,
    subset: str | Path | None = None,
    limit: int | None = None,
    skip: int = 0,
    advance: Callable[[int], object] = lambda images: None,
) -> Features:
    """`extract_features` of a .beton under the clean view, on the model's device.

    `subset` and `limit` pick the same images as data.subset and data.limit do in training, `limit` behind the first
    `skip` of its draw.
    """
    loader = eval_loader(beton, views, next(model.parameters()).device, subset, limit, skip)
    return extract_features(model, loader, eval_transform(views), advance=advance)


def cached_features(
    run_dir: str | Path,
    beton: str | Path,
    *,
    model: nn.Module,
    views: ViewsConfig,
    subset: str | Path | None = None,
    limit: int | None = None,
    dtype: DType = "float32",
    augmented: bool = False,
) -> Features:
    """`compute_features` as maps of files, or what an earlier call left in RUN/features/.

    augmented: of both training views of each image (`augmented_input`) in place of the clean one.

    They are written batch by batch, so a set of any size takes little memory. The folder's name holds a sha256 of the
    model's weights, the .beton's path, size and time of change, the clean view, the images of `subset`, `limit` and
    `dtype`. Damaged files are made anew; reading them runs no code. Raises UserError where the encoder gives numbers
    that are not finite.
    """
    depends_on = {
        "version": CACHE_VERSION,
        "weights": weights_sha256(model),
        "beton": identity_of(beton),
        "view": views.model_dump(mode="json") if augmented else describe_eval_transform(views),
        "limit": limit,
        "dtype": dtype,
    }
    if subset is not None:
        listed = np.sort(read_index_list(beton, subset))
        depends_on["subset"] = hashlib.sha256(listed.tobytes()).hexdigest()
    folder = cache_folder(run_dir, beton, depends_on)
    features = read_features(folder)
    if features is None:
        loader = eval_loader(beton, views, next(model.parameters()).device, subset, limit, augmented=augmented)
        look = augmented_input(views) if augmented else eval_input(eval_transform(views))
        what = f"Features of {beton}" + (", two views" if augmented else "")
        with progress(what, len(loader.rows), "images") as advance:
            batches = embedded_batches(model, loader, look, advance)
            write_features(folder, finite(batches, beton, dtype), len(loader.rows), dtype)
        features = read_features(folder)
    return features


def identity_of(beton: str | Path) -> list:
    """What tells a .beton from others without reading its images: path, size and time of change."""
    path = read_header(beton).path
    stat = path.stat()
    return [str(path.resolve()), stat.st_size, stat.st_mtime_ns]


def cache_folder(run_dir: str | Path, beton: str | Path, depends_on: dict) -> Path:
    """RUN/features/NAME-HASH, the hash of all that its content depends on."""
    key = hashlib.sha256(json.dumps(depends_on).encode()).hexdigest()
    return Path(run_dir) / "features" / f"{Path(beton).stem}-{key[:16]}"


def finite(batches: Iterable[Features], beton: str | Path, dtype: DType) -> Iterator[Features]:
    """The batches, as long as their numbers are finite in `dtype`."""
    largest = np.finfo(dtype).max
    for batch in batches:
        values = np.array([np.abs(x).max() for x in (batch.h, batch.mu, batch.sigma) if x is not None])
        if not np.isfinite(values).all():
            raise UserError(f"The encoder gives numbers that are not finite on {beton}: train it again.")
        if values.max() > largest:
            raise UserError(f"The encoder gives numbers up to {values.max():.3g}: leave out --dtype {dtype}.")
        yield batch


def write_features(folder: Path, batches: Iterable[Features], count: int, dtype: DType = "float32") -> None:
    """`count` samples, batch by batch, into NAME.npy each; written beside and renamed, so never half there.

    Raises UserError where they cannot be written, and what reading the batches raises.
    """
    with explain_write_errors(folder):
        folder.parent.mkdir(parents=True, exist_ok=True)
        remove_abandoned(folder.parent)
        beside = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", suffix=".part", dir=folder.parent))
    try:
        maps, checksums, space, done = {}, {}, None, 0
        for batch in batches:
            *arrays, space = batch
            for name, x in zip(Features._fields, arrays):
                if x is None or (name == "mu" and space == "h"):  # there mu is h
                    continue
                x = np.ascontiguousarray(x, dtype if x.dtype.kind == "f" else None)
                if name not in maps:
                    with explain_write_errors(folder):
                        maps[name] = new_map(beside / f"{name}.npy", x.dtype, (count, *x.shape[1:]))
                maps[name][done : done + len(x)] = x
                checksums[name] = zlib.crc32(x, checksums.get(name, 0))
            done += len(batch.label)
        assert done == count, f"{done} samples where {count} were expected"
        with explain_write_errors(folder):
            for array in maps.values():
                array.flush()
            (beside / "about.json").write_text(json.dumps({"space": space, "crc32": checksums}))
            if read_features(folder) is None:  # else another process was faster
                shutil.rmtree(folder, ignore_errors=True)  # a damaged one
                beside.rename(folder)
    finally:
        shutil.rmtree(beside, ignore_errors=True)


def new_map(path: Path, dtype: np.dtype, shape: tuple[int, ...]) -> np.memmap:
    """An array in a file, whose space is taken at once: on a full disk, writing to a map would kill the process."""
    array = open_memmap(path, "w+", dtype, shape)
    with open(path, "r+b") as file:
        os.posix_fallocate(file.fileno(), 0, array.offset + array.nbytes)
    return array


def remove_abandoned(folder: Path) -> None:
    """What processes that were killed a day ago and more had begun."""
    for path in folder.glob(".*.part"):
        if time.time() - path.stat().st_mtime > A_DAY:
            shutil.rmtree(path, ignore_errors=True)


def read_features(folder: Path) -> Features | None:
    """None where there are none, or damaged ones."""
    try:
        about = json.loads((folder / "about.json").read_text())
        arrays = {name: np.load(folder / f"{name}.npy", mmap_mode="r", allow_pickle=False) for name in about["crc32"]}
        if any(checksum(x) != about["crc32"][name] for name, x in arrays.items()):
            return None
        if about["space"] == "h":
            arrays["mu"] = arrays["h"]
        return Features(**arrays, space=about["space"])
    except (OSError, ValueError, KeyError, TypeError, AttributeError, EOFError):  # other files than ours
        return None


def checksum(array: np.ndarray) -> int:
    crc, rows = 0, max(1, CHUNK_BYTES // max(1, array[:1].nbytes))
    for first in range(0, len(array), rows):
        crc = zlib.crc32(np.ascontiguousarray(array[first : first + rows]), crc)
    return crc


def weights_sha256(model: nn.Module) -> str:
    """Of all parameters and buffers: names, types, shapes and values."""
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    return digest.hexdigest()
