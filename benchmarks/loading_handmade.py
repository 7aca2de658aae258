"""Peers that users build by hand for benchmarks/loading.py: threads or processes over decoders and transforms.

They run in the Python of loading_peers.py, which describes the sources and the jobs.
"""

import itertools
import os
import random
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
from loading_shared import (
    BLUR,
    CANVAS,
    MEAN,
    RATIO,
    SCALE,
    SIZE,
    SOLARIZE,
    STD,
    Views,
    jpegs,
    random_box,
    shuffled_batches,
)

PIECE = 16  # images that a thread takes at a time

# ---- threads over libraries that release Python's lock


def in_threads(
    paths: list[str], fill: Callable[[str, list[np.ndarray]], None], shape: tuple[int, ...], dtype: type,
    batch: int, workers: int, views: int = 2,
) -> Iterator[Views]:  # fmt: skip
    """`fill` writes the views of a file into their places in the batch; three batches are under way."""
    # Used in turn, as new memory costs page faults.
    buffers = itertools.cycle([[np.empty((batch, *shape), dtype) for _ in range(views)] for _ in range(4)])

    def fill_piece(paths: list[str], out: Views, first: int) -> None:
        for index, path in enumerate(paths, first):
            fill(path, [view[index] for view in out])

    pending = []
    with ThreadPoolExecutor(workers) as pool:
        for chosen in shuffled_batches(paths, batch):
            out = next(buffers)
            pieces = range(0, batch, PIECE)
            pending.append((out, [pool.submit(fill_piece, chosen[i : i + PIECE], out, i) for i in pieces]))
            if len(pending) > 2:
                out, parts = pending.pop(0)
                for part in parts:
                    part.result()
                yield out


def simplejpeg_opencv(folder: Path, source: str, job: str, batch: int, workers: int) -> Iterator[Views]:
    """libjpeg-turbo, and cv2.resize: INTER_AREA where both sides shrink."""
    import cv2
    import simplejpeg

    cv2.setNumThreads(1)
    rng = random.Random(0)

    def resize_into(part: np.ndarray, out: np.ndarray) -> None:
        how = cv2.INTER_AREA if min(part.shape[:2]) > out.shape[0] else cv2.INTER_LINEAR
        cv2.resize(part, out.shape[:2], dst=out, interpolation=how)

    def fill(path: str, out: list[np.ndarray]) -> None:
        content = Path(path).read_bytes()
        if job == "decode" and source == "canvas":
            simplejpeg.decode_jpeg(content, "RGB", fastdct=False, fastupsample=False, buffer=out[0])
            return
        image = simplejpeg.decode_jpeg(content, "RGB", fastdct=False, fastupsample=False)
        if job == "decode":
            resize_into(image, out[0])
            return
        for view in out:
            top, left, height, width = random_box(rng, *image.shape[:2])
            resize_into(image[top : top + height, left : left + width], view)
            if rng.random() < 0.5:
                cv2.flip(view, 1, dst=view)

    side, views = (CANVAS, 1) if job == "decode" else (SIZE, 2)
    return in_threads(jpegs(folder, source), fill, (side, side, 3), np.uint8, batch, workers, views)


def torchcodec_torchvision(folder: Path, source: str, job: str, batch: int, workers: int) -> Iterator[Views]:
    """torchcodec's JPEG decoder, and torchvision's transforms v2 on uint8, antialiased."""
    import torch
    from torchcodec.decoders import decode_jpeg
    from torchvision.transforms.v2 import functional as F

    torch.set_num_threads(1)
    rng = random.Random(0)

    def fill(path: str, out: list[np.ndarray]) -> None:
        image_CHW = decode_jpeg(Path(path).read_bytes())
        for view in out:
            if job == "decode":
                x_CHW = image_CHW if source == "canvas" else F.resize(image_CHW, [CANVAS, CANVAS], antialias=True)
            else:
                x_CHW = F.resized_crop(image_CHW, *random_box(rng, *image_CHW.shape[1:]), [SIZE, SIZE], antialias=True)
                if rng.random() < 0.5:
                    x_CHW = x_CHW.flip(-1)
            torch.from_numpy(view).permute(2, 0, 1).copy_(x_CHW)

    side, views = (CANVAS, 1) if job == "decode" else (SIZE, 2)
    return in_threads(jpegs(folder, source), fill, (side, side, 3), np.uint8, batch, workers, views)


def torchvision_chains() -> list[Callable]:
    """The whole augmentation of both views, from an image of PIL or a tensor."""
    import torch
    from torchvision.transforms import v2

    def chain(blur: float, solarize: float) -> Callable:
        return v2.Compose(
            [
                v2.RandomResizedCrop(SIZE, SCALE, RATIO, antialias=True),
                v2.RandomHorizontalFlip(),
                v2.RandomApply([v2.ColorJitter(0.4, 0.4, 0.2, 0.1)], p=0.8),
                v2.RandomGrayscale(0.2),
                v2.RandomApply([v2.GaussianBlur(13, (0.1, 2.0))], p=blur),
                v2.RandomSolarize(128, p=solarize),
                v2.ToImage(),
                v2.ToDtype(torch.float32, scale=True),
                v2.Normalize(MEAN, STD),
            ]
        )

    return [chain(*own) for own in zip(BLUR, SOLARIZE)]


def albumentations_threads(folder: Path, source: str, job: str, batch: int, workers: int) -> Iterator[Views]:
    """AlbumentationsX (OpenCV), JPEGs by simplejpeg. Its resizing has no antialiasing."""
    import simplejpeg

    chains = albumentations_chains(job == "whole")

    def fill(path: str, out: list[np.ndarray]) -> None:
        image = simplejpeg.decode_jpeg(Path(path).read_bytes(), "RGB", fastdct=False, fastupsample=False)
        for view, chain in zip(out, chains):
            view[:] = chain(image=image)["image"].transpose(2, 0, 1)

    return in_threads(jpegs(folder, source), fill, (3, SIZE, SIZE), np.float32, batch, workers)


def albumentations_chains(colors: bool) -> list[Callable]:
    """The transforms of both views, which give float32 (H, W, C)."""
    os.environ |= {"NO_ALBUMENTATIONS_UPDATE": "1", "ALBUMENTATIONS_NO_TELEMETRY": "1"}
    import albumentations as A
    import cv2

    cv2.setNumThreads(1)

    def chain(blur: float, solarize: float) -> Callable:
        crop = A.RandomResizedCrop((SIZE, SIZE), scale=SCALE, ratio=RATIO, interpolation=cv2.INTER_LINEAR)
        color = [
            A.ColorJitter(
                brightness_range=(0.6, 1.4), contrast_range=(0.6, 1.4), saturation_range=(0.8, 1.2),
                hue_range=(-0.1, 0.1), p=0.8,
            ),
            A.ToGray(p=0.2),
            A.GaussianBlur(blur_range=(13, 13), sigma_range=(0.1, 2.0), p=blur),
            A.Solarize(threshold_range=(0.5, 0.5), p=solarize),
        ]  # fmt: skip
        return A.Compose([crop, A.HorizontalFlip(p=0.5), *(color if colors else []), A.Normalize(MEAN, STD)])

    return [chain(*own) for own in zip(BLUR, SOLARIZE)]


# ---- worker processes of a DataLoader


class Photos:
    """A map-style data set: `make` of a file."""

    def __init__(self, paths: list[str], make: Callable[[str], list]) -> None:
        self.paths = paths
        self.make = make

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> list:
        return self.make(self.paths[index])


def in_processes(paths: list[str], make: Callable[[str], list], batch: int, workers: int) -> Iterator[Views]:
    import torch

    loader = torch.utils.data.DataLoader(
        Photos(paths, make), batch, shuffle=True, drop_last=True, num_workers=workers, persistent_workers=True
    )
    while True:
        yield from loader


def albumentations_processes(folder: Path, source: str, job: str, batch: int, workers: int) -> Iterator[Views]:
    import simplejpeg

    chains = albumentations_chains(job == "whole")

    def make(path: str) -> list[np.ndarray]:
        image = simplejpeg.decode_jpeg(Path(path).read_bytes(), "RGB", fastdct=False, fastupsample=False)
        return [np.ascontiguousarray(chain(image=image)["image"].transpose(2, 0, 1)) for chain in chains]

    return in_processes(jpegs(folder, source), make, batch, workers)


def torchcodec_processes(folder: Path, source: str, job: str, batch: int, workers: int) -> Iterator[Views]:
    import torch
    from torchcodec.decoders import decode_jpeg

    torch.set_num_threads(1)
    chains = torchvision_chains()

    def make(path: str) -> list:
        image_CHW = decode_jpeg(Path(path).read_bytes())
        return [chain(image_CHW) for chain in chains]

    return in_processes(jpegs(folder, source), make, batch, workers)


def torchvision_pil(folder: Path, source: str, job: str, batch: int, workers: int) -> Iterator[Views]:
    """What a tutorial writes: PIL, torchvision's transforms, a DataLoader."""
    import torch
    from PIL import Image

    torch.set_num_threads(1)
    chains = torchvision_chains()

    def make(path: str) -> list:
        image = Image.open(path).convert("RGB")
        return [chain(image) for chain in chains]

    return in_processes(jpegs(folder, source), make, batch, workers)
