"""Batches of images that are in no .beton: converted as `build-beton` converts them, decoded as BetonLoader decodes.

So the pixels are those of a .beton, bit for bit: a detector of unusual images must not see how they were stored.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

from fastssl.beton import beton_file, has_split, read_header, recorded_plan
from fastssl.beton.format import PAGE_SIZE, RGB, UNLABELLED
from fastssl.beton.images import MAX_MEGAPIXELS, Encoded, StoragePlan
from fastssl.beton.options import JPEG_QUALITY
from fastssl.beton.shards import exists
from fastssl.common.errors import UserError
from fastssl.common.files import expand_user
from fastssl.common.system import available_cores
from fastssl.loading import kernels
from fastssl.loading.decoding import Buffers, ThreadDecoder
from fastssl.loading.loader import Batch
from fastssl.loading.samples import CropMode, Cropping, SampleRows, Samples, largest_shapes
from fastssl.recipe import ViewsConfig

IN_MEMORY = Path("images in memory")  # in place of the path of a .beton
DEFAULT_CANVASES = (32, 64, 256)  # px; of the builders whose images have about the size of the views


class Conversion(NamedTuple):
    """How images are converted before an encoder sees them."""

    plan: StoragePlan
    is_recorded: bool  # by the file that the encoder was trained on; False: chosen by views.size
    reason: str  # a sentence for the user


def find_conversion(train: str | Path, views: ViewsConfig, in_chans: int = RGB) -> Conversion:
    """Return the conversion of the training file, which its manifest records; otherwise canvases by views.size."""
    train = expand_user(train)
    if train.is_dir():
        train = beton_file(train, "train") if has_split(train, "train") else train / "train.beton"
    problem = f"{train.name}.json is not next to {train}" if exists(train) else f"{train} is not here"
    if exists(train):
        try:
            info = read_header(train)
            plan = None if info.manifest is None else recorded_plan(info.manifest)
            if plan and plan.layout == "canvas" and plan.storage != info.storage:
                raise UserError(
                    f"it says {plan.described}, and the file holds other images", hint="build the file again"
                )
            if plan and plan.channels != in_chans:
                raise UserError(
                    f"its images have {plan.channels} channels, those of the encoder {in_chans}",
                    hint=f"build the file again with --channels {in_chans}",
                )
            if plan:
                return Conversion(plan, True, f"Images are converted as {train} was built: {describe_plan(plan)}.")
        except UserError as error:
            problem = f"{train.name}.json does not tell ({error.message})"
    side = next((side for side in DEFAULT_CANVASES if views.size <= side), DEFAULT_CANVASES[-1])
    plan = StoragePlan("canvas", side, JPEG_QUALITY, "full", MAX_MEGAPIXELS, in_chans)
    return Conversion(
        plan,
        False,
        f"How the training images were converted is not known, as {problem}: by views.size={views.size}, images are "
        f"converted to a {describe_plan(plan)}.",
    )


def describe_plan(plan: StoragePlan) -> str:
    """Describe in a few words how images are stored."""
    if plan.layout == "full":
        return f"whole images of at most {plan.side} px, JPEG quality {plan.quality} where they are encoded"
    if plan.channels != RGB:
        channels = "one channel" if plan.channels == 1 else f"{plan.channels} channels"
        return f"canvas of {plan.side} x {plan.side} px, pixels of {channels}"
    return f"canvas of {plan.side} x {plan.side} px, {plan.described}"


def decode_batch(
    images: Sequence[Encoded],
    index: Sequence[int],
    plan: StoragePlan,
    views: ViewsConfig,
    device: torch.device,
    *,
    batch_size: int | None = None,
    augmented: bool = False,
) -> Batch:
    """Decode images that `encode_all` has encoded, to a batch as BetonLoader makes it for an evaluation.

    Args:
        images: of one plan.
        index: a number for each image, from which the randomness of its views is derived.
        plan: their plan.
        views: the recipe's section.
        device: of the batch.
        batch_size: fill the batch up to so many images with repeated ones, which `valid` marks.
        augmented: cut the crops of the training views, not the box of the evaluation transform, where the CPU crops.
    """
    size = max(len(images), batch_size or 0)
    position_B = np.arange(size)
    row_B = position_B % len(images)
    size_N = np.array([len(image.payload) for image in images])
    shape_N2 = np.array([(image.height, image.width) for image in images], np.int64)
    samples = Samples(
        path=IN_MEMORY,
        file=np.frombuffer(b"".join(image.payload for image in images), np.uint8),
        rows=SampleRows(
            start_B=np.cumsum(size_N) - size_N,
            size_B=size_N,
            mode_B=np.array([image.mode for image in images], np.uint8),
            shape_B2=shape_N2,
            label_B=np.full(len(images), UNLABELLED),
            index_B=np.array(index, np.int64),
            height_B=np.array([image.source_height for image in images], np.int64),
            width_B=np.array([image.source_width for image in images], np.int64),
        ),
        count=len(images),
        channels=plan.channels,
        storage=plan.storage,
        largest_K2=largest_shapes(shape_N2),
        page_size=PAGE_SIZE,
    )
    # As evaluation.features.eval_loader: canvases are cropped on the device.
    crop: CropMode = "gpu" if plan.layout == "canvas" else "cpu" if augmented else "eval"
    decoder = ThreadDecoder(samples, Cropping(crop, views, 0, 2), available_cores(), Buffers(pinned=False))
    try:
        pending = decoder.begin(decoder.prepare(row_B, epoch=0))
        pending.wait()
    finally:
        decoder.close()
    if (pending.task.arrays.status_B == kernels.FAILED).any():
        raise RuntimeError("turbojpeg does not decode what was encoded for it: `fastssl doctor` may tell why.")
    rows = pending.task.rows
    label_B, index_B, height_B, width_B = (
        torch.from_numpy(column_B).to(device) for column_B in (rows.label_B, rows.index_B, rows.height_B, rows.width_B)
    )
    valid_B = torch.from_numpy(position_B < len(images)).to(device)
    return Batch(pending.task.image.to(device), label_B, index_B, height_B, width_B, valid_B)
