"""The loaders of benchmarks/loading.py that need packages of their own: NVIDIA DALI, and simplejpeg with OpenCV.

    python -m venv .cache/peers
    .cache/peers/bin/pip install nvidia-dali-cuda120==2.4.0 simplejpeg==1.9.0 opencv-python-headless==5.0.0.93

They stay out of fastssl's environment, as DALI brings its own versions of common packages. benchmarks/loading.py runs
this file with that Python. Both read the JPEGs of the canvas as files, and work on the CPU.

    DALI, decode            fn.decoders.image
    DALI, whole             one decode, then for both views random_resized_crop (antialiased), color_twist,
                            gaussian_blur, solarize, crop_mirror_normalize to float32
    simplejpeg, decode      simplejpeg.decode_jpeg in a pool of threads, into the batch
    simplejpeg and OpenCV   one decode, two crops by cv2.resize (INTER_AREA where both sides shrink), flips: uint8
"""

import argparse
import itertools
import json
import math
import os
import random
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
from loading import BATCH, CANVAS, SIZE, measure

SCALE, RATIO = (0.08, 1.0), (3 / 4, 4 / 3)
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
PIECE = 16  # images that a thread takes at a time


def dali_batches(folder: Path, workers: int, whole: bool) -> Iterator[int]:
    import nvidia.dali as dali
    import nvidia.dali.fn as fn
    import nvidia.dali.types as types

    files = [str(path) for path in sorted(folder.iterdir())]

    def chance(probability: float):
        return fn.random.coin_flip(probability=probability, dtype=types.BOOL)

    def view(image, blur: float, solarize: float):
        x = fn.random_resized_crop(
            image, size=(SIZE, SIZE), random_area=SCALE, random_aspect_ratio=RATIO, interp_type=types.INTERP_LINEAR,
            antialias=True,
        )  # fmt: skip
        if chance(0.8):
            x = fn.color_twist(
                x, brightness=fn.random.uniform(range=(0.6, 1.4)), contrast=fn.random.uniform(range=(0.6, 1.4)),
                saturation=fn.random.uniform(range=(0.8, 1.2)), hue=fn.random.uniform(range=(-36.0, 36.0)),
            )  # fmt: skip
        if chance(0.2):
            gray = fn.color_space_conversion(x, image_type=types.RGB, output_type=types.GRAY)
            x = fn.color_space_conversion(gray, image_type=types.GRAY, output_type=types.RGB)
        if chance(blur):
            x = fn.gaussian_blur(x, sigma=fn.random.uniform(range=(0.1, 2.0)), window_size=13)
        if chance(solarize):
            bright = x >= 128
            x = fn.cast(bright * (255 - x) + (bright ^ True) * x, dtype=types.UINT8)
        return fn.crop_mirror_normalize(
            x, dtype=types.FLOAT, output_layout="CHW", mirror=fn.random.coin_flip(),
            mean=[255 * value for value in MEAN], std=[255 * value for value in STD],
        )  # fmt: skip

    @dali.pipeline_def(
        batch_size=BATCH, num_threads=workers, device_id=None, seed=1, prefetch_queue_depth=2, enable_conditionals=True
    )
    def pipeline():
        encoded, _ = fn.readers.file(files=files, random_shuffle=True, initial_fill=1024)
        image = fn.decoders.image(encoded, device="cpu")
        return (view(image, 1.0, 0.0), view(image, 0.1, 0.2)) if whole else image

    built = pipeline()
    built.build()
    while True:
        for output in built.run():
            assert len(np.asarray(output.as_tensor())) == BATCH  # contiguous, not copied
        yield BATCH


def simplejpeg_batches(folder: Path, workers: int, crops: bool) -> Iterator[int]:
    import cv2
    import simplejpeg

    cv2.setNumThreads(1)
    files = sorted(folder.iterdir())
    rng = random.Random(0)

    def decode(path: Path) -> np.ndarray:
        return simplejpeg.decode_jpeg(path.read_bytes(), "RGB", fastdct=False, fastupsample=False)

    def fill(paths: list[Path], out: np.ndarray) -> None:
        for path, slot in zip(paths, out):
            image = decode(path)
            if not crops:
                slot[:] = image
                continue
            for view in slot:
                top, left, height, width = random_box(rng)
                part = image[top : top + height, left : left + width]
                how = cv2.INTER_AREA if min(height, width) > SIZE else cv2.INTER_LINEAR
                if rng.random() < 0.5:
                    cv2.flip(cv2.resize(part, (SIZE, SIZE), interpolation=how), 1, dst=view)
                else:
                    cv2.resize(part, (SIZE, SIZE), dst=view, interpolation=how)

    shape = (BATCH, 2, SIZE, SIZE, 3) if crops else (BATCH, CANVAS, CANVAS, 3)
    buffers = itertools.cycle([np.empty(shape, np.uint8) for _ in range(4)])  # as new memory costs page faults
    pending = []
    with ThreadPoolExecutor(workers) as pool:
        while True:
            rng.shuffle(files)
            for first in range(0, len(files) - BATCH + 1, BATCH):
                batch = next(buffers)
                pieces = range(0, BATCH, PIECE)
                pending.append(
                    [pool.submit(fill, files[first + i : first + i + PIECE], batch[i : i + PIECE]) for i in pieces]
                )
                if len(pending) > 2:
                    for piece in pending.pop(0):
                        piece.result()
                    yield BATCH


def random_box(rng: random.Random) -> tuple[int, int, int, int]:
    """As torchvision's RandomResizedCrop: top, left, height, width."""
    for _ in range(10):
        area = CANVAS * CANVAS * rng.uniform(*SCALE)
        ratio = math.exp(rng.uniform(math.log(RATIO[0]), math.log(RATIO[1])))
        width, height = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
        if width <= CANVAS and height <= CANVAS:
            return rng.randint(0, CANVAS - height), rng.randint(0, CANVAS - width), height, width
    return 0, 0, CANVAS, CANVAS


PEERS = {
    "DALI, decode": lambda folder, workers: dali_batches(folder, workers, whole=False),
    "DALI, whole": lambda folder, workers: dali_batches(folder, workers, whole=True),
    "simplejpeg, decode": lambda folder, workers: simplejpeg_batches(folder, workers, crops=False),
    "simplejpeg and OpenCV": lambda folder, workers: simplejpeg_batches(folder, workers, crops=True),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("peer", choices=PEERS)
    parser.add_argument("folder", type=Path, help="JPEG files of the canvas' size")
    parser.add_argument("--workers", type=int, default=2)
    arguments = parser.parse_args()
    print("RESULT", json.dumps(measure(PEERS[arguments.peer](arguments.folder, arguments.workers))), flush=True)
    os._exit(0)


if __name__ == "__main__":
    main()
