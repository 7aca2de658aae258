"""The peers of benchmarks/loading.py, each with the best settings found. They have a Python of their own:

    python -m venv .cache/peers
    echo "$PWD/.venv/lib/python3.11/site-packages" > .cache/peers/lib/python3.11/site-packages/fastssl.pth
    .cache/peers/bin/pip install nvidia-dali-cuda120==2.4.0 simplejpeg==1.9.0 opencv-python-headless==5.0.0.93 \
        torchcodec==0.17.0 spdl==0.8.0 turboloader==2.39.0 litdata==0.2.76 datago==2026.10.1 albumentationsx==2.5.1 \
        kornia==0.9.0
    apt-get install ffmpeg    # torchcodec and SPDL load its libraries

The second line lends them torch and torchvision of .venv, so that all use the same. Peers bring their own versions of
common packages, so they stay out of .venv.

A peer is a function, here or in loading_handmade.py, of (folder, source, job, batch, workers): an iterator of batches.
Sources: "originals", "canvas" (the same images as JPEGs of 256 px), "raw" (their pixels). Jobs:

    decode    one image of 256 x 256, uint8; originals are resized
    crops     two crops of 224 px, flipped, uint8
    floats    the same, normalized, float32
    whole     two views: crop, flip, color jitter, grayscale, blur, solarize; normalized, float32

What was tried for each, and was slower: records/loading.md.
"""

import functools
import itertools
import os
import random
import sys
import tarfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from loading_shared import (
    BLUR,
    CANVAS,
    JPEGS,
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


def dali(folder: Path, source: str, job: str, batch: int, workers: int) -> Iterator[Views]:
    """The CPU pipeline: one decode, two views. Reuses its output, as its documentation says."""
    import nvidia.dali as dali
    import nvidia.dali.fn as fn
    import nvidia.dali.types as types

    def view(image, blur: float, solarize: float):
        x = fn.random_resized_crop(
            image, size=(SIZE, SIZE), random_area=SCALE, random_aspect_ratio=RATIO, interp_type=types.INTERP_LINEAR,
            antialias=True,
        )  # fmt: skip
        if job == "crops":
            return fn.flip(x, horizontal=fn.random.coin_flip())
        if job == "whole":
            x = dali_colors(fn, types, x, blur, solarize)
        return fn.crop_mirror_normalize(
            x, dtype=types.FLOAT, output_layout="CHW", mirror=fn.random.coin_flip(),
            mean=[255 * value for value in MEAN], std=[255 * value for value in STD],
        )  # fmt: skip

    @dali.pipeline_def(batch_size=batch, num_threads=workers, device_id=None, seed=1, prefetch_queue_depth=2)
    def pipeline():
        encoded, _ = fn.readers.file(files=jpegs(folder, source), random_shuffle=True, initial_fill=1024)
        image = fn.decoders.image(encoded, device="cpu")
        if job == "decode":
            return image if source == "canvas" else fn.resize(image, size=(CANVAS, CANVAS), antialias=True)
        return tuple(view(image, *own) for own in zip(BLUR, SOLARIZE))

    built = pipeline(enable_conditionals=True)
    built.build()
    while True:
        yield [np.asarray(output.as_tensor()) for output in built.run()]  # not copied


def dali_colors(fn, types, x, blur: float, solarize: float):
    import nvidia.dali as dali

    @dali.pipeline.do_not_convert
    def chance(probability: float):
        return fn.random.coin_flip(probability=probability, dtype=types.BOOL)

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
    return x


def spdl(folder: Path, source: str, job: str, batch: int, workers: int) -> Iterator[Views]:
    """FFmpeg decodes, and its filters crop, scale and flip; SPDL's thread pool runs it."""
    import spdl.io
    from PIL import Image
    from spdl.pipeline import PipelineBuilder

    paths, piece, rng = jpegs(folder, source), 32, random.Random(0)
    size_of = {path: Image.open(path).size for path in paths} if job == "crops" else {}  # as an index would have it

    def decode(paths: list[str]) -> np.ndarray:
        scaled = spdl.io.get_video_filter_desc(
            scale_width=CANVAS, scale_height=CANVAS, scale_algo="bilinear", scale_mode=None, pix_fmt="rgb24"
        )
        return spdl.io.to_numpy(spdl.io.load_image_batch(paths, width=None, height=None, filter_desc=scaled))

    def crop(paths: list[str]) -> np.ndarray:
        frames = []
        for path in paths:
            width, height = size_of[path]
            views = ""
            for number in range(2):
                y, x, h, w = random_box(rng, height, width)
                flip = ",hflip" if rng.random() < 0.5 else ""
                views += f"[i{number}]crop={w}:{h}:{x}:{y}:exact=1,scale={SIZE}:{SIZE}:flags=bilinear{flip}[o{number}];"
            both = f"format=rgb24,split[i0][i1];{views}[o0][o1]vstack,format=rgb24"
            frames.append(spdl.io.decode_packets(spdl.io.demux_image(path), filter_desc=both))
        return spdl.io.to_numpy(spdl.io.convert_frames(frames))

    pipeline = (
        PipelineBuilder()
        .add_source(shuffled_batches(paths, piece))
        .pipe(decode if job == "decode" else crop, concurrency=workers)
        .aggregate(batch // piece)
        .pipe(np.concatenate)
        .add_sink(2)
        .build(num_threads=workers)
    )
    with pipeline.auto_stop():
        for images in pipeline:
            yield [images] if job == "decode" else [images[:, :SIZE], images[:, SIZE:]]


def turboloader(folder: Path, source: str, job: str, batch: int, workers: int) -> Iterator[Views]:
    """C++ threads; float32 whatever the job, and crops are normalized. "raw": nothing to decode.

    A crop decodes only its own window of the JPEG. One loader for each view: the seed sets the order as well as the
    crops, so only unshuffled loaders can cut different crops of the same images.
    """
    import turboloader as turbo

    def loader(seed: int):
        options = {"seed": seed, "shuffle": job == "decode", "drop_last": True}
        if source == "raw":
            return turbo.TblRawImageLoader(
                str(folder / "raw.tbl"), batch, train_aug=True, hflip_prob=0.5, image_size=SIZE, **options
            )
        if job == "decode":
            options |= {"image_size": CANVAS}
        else:
            options |= {"image_size": SIZE, "train_aug": True, "transform": turbo.ImageNetNormalize()}
        return turbo.DataLoader(str(folder / f"{source}.tar"), batch, workers, output_format="pytorch", **options)

    loaders = [loader(view) for view in range(1 if job == "decode" else 2)]
    for epoch in itertools.count():
        for own in loaders:
            own.set_epoch(epoch)
        for views in zip(*loaders):
            yield [images for images, _ in views]


def litdata(folder: Path, source: str, job: str, batch: int, workers: int) -> Iterator[Views]:
    """Decodes JPEGs in LitData's chunks, by torchcodec in its DataLoader's processes; torchvision resizes."""
    import litdata
    import torch
    from torchcodec.decoders import decode_jpeg
    from torchvision.transforms.v2 import functional as F

    torch.set_num_threads(1)

    class Streamed(litdata.StreamingDataset):
        def __getitem__(self, index):
            image_CHW = decode_jpeg(super().__getitem__(index)["image"])
            return [image_CHW if source == "canvas" else F.resize(image_CHW, [CANVAS, CANVAS], antialias=True)]

    data = Streamed(str(folder / "litdata" / source), shuffle=True, drop_last=True)
    loader = litdata.StreamingDataLoader(
        data, batch_size=batch, num_workers=workers, drop_last=True, persistent_workers=True
    )
    while True:
        yield from loader


def datago(folder: Path, source: str, job: str, batch: int, workers: int) -> Iterator[Views]:
    """Decodes canvases in Rust threads, and hands over images one by one."""
    os.environ |= {"DATAGO_MAX_TASKS": str(workers), "RUST_LOG": "error"}
    import json

    from datago import DatagoClient

    files = {"root_path": str(folder / JPEGS[source]), "random_sampling": True, "rank": 0, "world_size": 1}
    config = {
        "source_type": "file", "source_config": files, "limit": 10**9, "prefetch_buffer_size": batch,
        "samples_buffer_size": batch, "image_format": "numpy",
    }  # fmt: skip
    buffers = itertools.cycle([np.empty((batch, CANVAS, CANVAS, 3), np.uint8) for _ in range(2)])
    out, count = next(buffers), 0
    while True:
        client = DatagoClient(json.dumps(config))
        while (sample := client.get_sample()) is not None:
            out[count] = sample.image.to_numpy_array()
            count += 1
            if count == batch:
                yield [out]
                out, count = next(buffers), 0


# ---- the files of TurboLoader and LitData
RAW_IMAGES = 2000  # of 196 KB


def read_sample(paths: list[str], index: int) -> dict[str, bytes]:
    return {"image": Path(paths[index]).read_bytes()}


def prepare(folder: Path) -> None:
    """Write what TurboLoader and LitData read."""
    import turboloader as turbo

    # LitData deletes its two cache folders before it writes: by default `data` and `chunks` in the folder of temporary
    # files, also those of others. So it gets folders of its own, before it is imported.
    for name in ("DATA_OPTIMIZER_DATA_CACHE_FOLDER", "DATA_OPTIMIZER_CACHE_FOLDER"):
        os.environ[name] = str(folder.resolve() / "litdata-cache" / name)
    import litdata

    def pack(tar_path: Path, paths: list[str]) -> str:
        with tarfile.open(tar_path, "w", dereference=True) as tar:
            for number, path in enumerate(paths):
                tar.add(path, f"{number:06}.jpg")
        return str(tar_path)

    for source in JPEGS:
        paths = jpegs(folder.resolve(), source)
        pack(folder / f"{source}.tar", paths)
        chunks = str(folder.resolve() / "litdata" / source)
        # Its inputs are numbers and not paths, as it also deletes inputs that it takes for its own copies.
        read = functools.partial(read_sample, paths)
        litdata.optimize(read, list(range(len(paths))), chunks, chunk_bytes="64MB", num_workers=1)
    few = pack(folder / "few.tar", jpegs(folder, "canvas")[:RAW_IMAGES])
    turbo.preprocess_to_tbl(few, str(folder / "raw.tbl"), image_size=CANVAS, num_workers=2)


if __name__ == "__main__":
    prepare(Path(sys.argv[1]))
