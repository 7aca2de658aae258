"""Features of a whole .beton: one pass of a frozen encoder over the clean view, kept on disk.

A cached file is named by a hash of everything that its numbers depend on, the weights included, so
it never has to be invalidated: a changed weight, file or view asks for another name.
"""

import hashlib
import json
import zlib
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file
from torch import Tensor, nn

from fastssl.beton import read_header, read_index_list
from fastssl.beton.atomic import write_atomically
from fastssl.beton.progress import progress
from fastssl.loading import Batch, BetonLoader
from fastssl.models.ssl_model import evaluating
from fastssl.recipe import Views
from fastssl.views import clean_view

CACHE_VERSION = 1  # raise it when the same inputs give other numbers
BATCH_SIZE = 256


class Features(NamedTuple):
    """What an encoder makes of N images, in the order of the file."""

    h: np.ndarray  # (N, D) float32: the representation
    label: np.ndarray  # (N,) int64
    index: np.ndarray  # (N,) int64: sample ids
    mu: np.ndarray | None = None  # (N, E) float32: mean of a stochastic embedding
    sigma: np.ndarray | None = None  # (N, E) float32: its standard deviation


@torch.inference_mode()
def extract_features(
    model: nn.Module,
    loader: Iterable[Batch],
    clean: Callable[[Tensor], Tensor],
    *,
    advance: Callable[[int], object] = lambda images: None,
) -> Features:
    """Embed every valid sample that the loader gives, in its order.

    model: has `embed(images) -> Embedding(h, mu, sigma, ...)`; it runs in eval mode, so that batch
    norm uses its running statistics and leaves them alone, and gets its former mode back.
    loader: its batches have image, label, index and valid, on the model's device.
    clean: uint8 images (B, H, W, 3) to what `embed` takes. `advance` is told of each batch's number
    of images. Autocast is off, whatever surrounds the call.
    """
    columns: dict[str, list[np.ndarray]] = {name: [] for name in Features._fields}
    with evaluating(model):
        for batch in loader:
            with torch.autocast(batch.image.device.type, enabled=False):
                embedding = model.embed(clean(batch.image))
            values = (embedding.h, batch.label, batch.index, embedding.mu, embedding.sigma)
            for name, value in zip(Features._fields, values, strict=True):
                if value is not None:
                    kind = torch.float32 if value.is_floating_point() else torch.int64
                    columns[name].append(value[batch.valid].to("cpu", kind).numpy())
            advance(int(batch.valid.sum()))
    return Features(*(np.concatenate(parts) if parts else None for parts in columns.values()))


def clean_features(
    model: nn.Module,
    beton: str | Path,
    views: Views,
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
    # Images of one size go to the device as they are; others are brought to the view's by the CPU.
    crop = "gpu" if read_header(beton).resolution else "whole"
    loader = BetonLoader(
        beton,
        BATCH_SIZE,
        crop=crop,
        views=views,
        shuffle=False,
        drop_last=False,
        device=next(model.parameters()).device,
        subset=subset,
        limit=limit,
        skip=skip,
        shard=False,
    )
    return extract_features(model, loader, clean_view(views), advance=advance)


def cached_features(
    run_dir: str | Path,
    beton: str | Path,
    *,
    model: nn.Module,
    views: Views,
    subset: str | Path | None = None,
    limit: int | None = None,
) -> Features:
    """`clean_features`, or what an earlier call left in RUN/features/.

    The file's name holds a sha256 of the model's weights, the .beton's path, size and time of
    change, the size and normalisation of the clean view, the images of `subset`, and `limit`. A damaged
    file is made anew; reading one runs no code.
    """
    info = read_header(beton)
    stat = info.path.stat()
    depends_on = {
        "version": CACHE_VERSION,
        "weights": weights_sha256(model),
        "beton": [str(info.path.resolve()), stat.st_size, stat.st_mtime_ns],
        "view": [views.size, views.mean, views.std],
        "limit": limit,
    }
    images = info.num_samples
    if subset is not None:
        listed = np.sort(read_index_list(beton, subset))
        images, depends_on["subset"] = len(listed), hashlib.sha256(listed.tobytes()).hexdigest()
    key = hashlib.sha256(json.dumps(depends_on).encode()).hexdigest()
    path = Path(run_dir) / "features" / f"{info.path.stem}-{key[:16]}.safetensors"

    features = read_features(path)
    if features is None:
        images = min(images, limit or images)
        with progress(f"Features of {beton}", images, "images") as advance:
            features = clean_features(model, beton, views, subset=subset, limit=limit, advance=advance)
        write_features(path, features)
    return features


def write_features(path: Path, features: Features) -> None:
    """Written beside and renamed, so the file is never half there."""
    arrays = {
        name: np.ascontiguousarray(x) for name, x in features._asdict().items() if x is not None
    }
    metadata = {"crc32": checksum(arrays)}
    write_atomically(path, lambda beside: save_file(arrays, beside, metadata=metadata))


def read_features(path: Path) -> Features | None:
    """None where there is no such file, or a damaged one."""
    try:
        with safe_open(path, framework="numpy") as file:
            arrays = {name: file.get_tensor(name) for name in file.keys()}
            if (file.metadata() or {}).get("crc32") != checksum(arrays):
                return None
        return Features(**arrays)
    except (FileNotFoundError, SafetensorError, TypeError):  # TypeError: other arrays than ours
        return None


def checksum(arrays: dict[str, np.ndarray]) -> str:
    crc = 0
    for name in sorted(arrays):
        crc = zlib.crc32(arrays[name], zlib.crc32(name.encode(), crc))
    return f"{crc:08x}"


def weights_sha256(model: nn.Module) -> str:
    """Of all parameters and buffers: names, types, shapes and values."""
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    return digest.hexdigest()
