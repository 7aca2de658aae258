"""The table of all samples of a .beton, and the crop boxes that are cut out of them on the CPU."""

import hashlib
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
import torch

from fastssl.beton import BetonInfo, read_header, read_names, read_samples
from fastssl.beton.format import BC4, JPG, bc4_bytes
from fastssl.beton.parts import FilePart, file_parts, map_file, part_at
from fastssl.common.errors import UserError
from fastssl.common.geometry import FLIP, crop_box, eval_box
from fastssl.common.randomness import AUGMENTATION, uniforms
from fastssl.recipe import ViewsConfig

CropMode = Literal["gpu", "cpu", "eval"]


class Samples(NamedTuple):
    """Arrays over the N rows of a file, in the file's order, already checked against its size.

    A set of shards is one file here: all of its files, mapped one after the other. A file of stock FFCV may lack labels
    (then -1), ids (then the row) and source sizes (then the stored ones).
    """

    path: Path
    file: np.ndarray  # the whole file, mapped, uint8
    start_N: np.ndarray  # byte of `file` at which the image starts
    size_N: np.ndarray  # stored bytes of the image
    mode_N: np.ndarray  # RAW, JPG or BC4 of beton.format
    shape_N2: np.ndarray  # stored height and width in px
    channels: int  # of every image; 3: RGB
    page_N: np.ndarray  # page of the file that contains the image
    label_N: np.ndarray
    index_N: np.ndarray  # stable sample ids
    height_N: np.ndarray  # of the source image, in px
    width_N: np.ndarray
    parts: tuple[FilePart, ...] = ()  # the files that were mapped

    @classmethod
    def read(cls, info: BetonInfo) -> "Samples":
        """Read the table of a file, and map its images."""
        metadata, size_N = read_samples(info.path)
        image = metadata["image"]
        shape_N2 = np.stack([image["height"], image["width"]], axis=1).astype(np.int64)
        start_N = image["data_ptr"].astype(np.int64)

        def column(name: str, default_N: np.ndarray) -> np.ndarray:
            # Of other types, such as an array's position in the file, nothing is checked.
            is_checked = info.fields.get(name) == "IntField"
            return metadata[name].astype(np.int64) if is_checked else default_N

        file = map_file(info.path)
        if file_parts(info.path) != info.parts:
            raise UserError(f"{info.path} has changed since it was opened", hint="start again")
        return cls(
            path=info.path,
            file=file,
            start_N=start_N,
            size_N=size_N,
            mode_N=np.ascontiguousarray(image["mode"]),
            shape_N2=shape_N2,
            channels=info.channels,
            page_N=start_N // info.page_size,
            label_N=column("label", np.full(len(metadata), -1)),
            index_N=column("index", np.arange(len(metadata))),
            height_N=column("height", shape_N2[:, 0]),
            width_N=column("width", shape_N2[:, 1]),
            parts=info.parts,
        )

    @property
    def in_blocks(self) -> bool:
        """Whether the images are canvases in BC4. All of a file are, or none."""
        return bool(self.mode_N[0] == BC4)

    def fingerprint(self) -> str:
        """A hash that differs for other labels, orders or sizes of images, but not for a copy of the file.

        It reads no image: other images of the same sizes are not noticed.
        """
        columns = [self.size_N, self.label_N, self.index_N, self.height_N, self.width_N]
        if self.in_blocks:  # as many bytes may be pixels of another side
            columns.append(self.shape_N2)
        return hashlib.sha256(b"".join(np.ascontiguousarray(c).tobytes() for c in columns)).hexdigest()

    def describe(self, row: int) -> str:
        """Name a sample in an error message: its file, index, source image (if known) and position in the file."""
        index = int(self.index_N[row])
        part = part_at(self.parts, int(self.start_N[row]))
        name = read_names(part.path, [index]).get(index)
        source = f" ({name})" if name else ""
        byte = self.start_N[row] - part.start
        return f"{part.path}: the sample with index {index}{source}, at byte {byte:,},"


def require_labels(path: Path, label_N: np.ndarray, use: str, fix: str, classes: int = 1) -> None:
    """Check the labels (N,) of images of `path` before they are used. Everything that needs labels calls this.

    Args:
        use: what needs labels, and `fix`: what to do without; parts of the message.
        classes: the least number of classes that `use` needs.

    Raises:
        UserError: one of the images has no label (a negative one), or they have fewer classes.
    """
    missing = int((label_N < 0).sum())
    if missing:
        verb = "has" if missing == 1 else "have"
        raise UserError(
            f"{missing:,} of the {len(label_N):,} images of {path} {verb} no label, which {use} needs", hint=fix
        )
    if len(np.unique(label_N)) < classes:
        raise UserError(f"{path} holds one class only, and {use} needs several", hint=fix)


def require_channels(path: str | Path, in_chans: int, encoder: str = "", fix: str = "") -> None:
    """Check that the images of `path` have the channels that an encoder takes. All that embeds images calls this.

    Args:
        in_chans: channels that the encoder takes.
        encoder: which one it is, and `fix`: what to do; parts of the message. "": that of a run that is to be trained.

    Raises:
        UserError: the images have another number of channels.
    """
    channels = read_header(path).channels
    if channels != in_chans:
        encoder = encoder or "the encoder (model.in_chans)"
        fix = fix or f"set model.in_chans={channels}, with views.mean and views.std for such images"
        raise UserError(
            f"{path} holds images of {channels} channel{'' if channels == 1 else 's'}, and {encoder} takes {in_chans}",
            hint=f"{fix}, or build it again with --channels {in_chans}",
        )


class Crops(NamedTuple):
    """What is cut out of the images of a batch."""

    box_BV4: np.ndarray  # float64, in stored px: top, left, height, width
    flip_BV: np.ndarray  # bool: mirrored left to right


class Cropping(NamedTuple):
    """What the CPU cuts out of every image."""

    mode: CropMode  # "gpu": nothing; "cpu": the crops of the views; "eval": the box of the evaluation transform
    views: ViewsConfig
    seed: int  # of the random boxes and flips
    crops: int  # per image, with mode "cpu"

    def image_shape(self, samples: Samples) -> tuple[int, ...]:
        """The shape of an image in a batch: (H, W, C), for blocks (bytes,), or (crops, size, size, 3)."""
        if self.mode == "gpu":  # all images of the file have this shape
            height, width = samples.shape_N2[0].tolist()
            return (bc4_bytes(height),) if samples.in_blocks else (height, width, samples.channels)
        return self.crops if self.mode == "cpu" else 1, self.views.size, self.views.size, 3

    def only_copies(self, samples: Samples) -> bool:
        """Whether a batch holds what is stored: pixels or blocks, whole."""
        return self.mode == "gpu" and not (samples.mode_N == JPG).any()

    def draw(self, samples: Samples, row_B: np.ndarray, epoch: int) -> Crops:
        """The crops of these rows, the same as in fastssl.views; none with mode "gpu"."""
        if self.mode == "gpu":
            return Crops(np.empty((len(row_B), 0, 4)), np.empty((len(row_B), 0), bool))
        index_B, height_B, width_B = (
            torch.from_numpy(column[row_B]) for column in (samples.index_N, samples.height_N, samples.width_N)
        )
        if self.mode == "eval":
            box_BV4 = eval_box(height_B, width_B, self.views.eval)[:, None]
            flip_BV = torch.zeros(len(row_B), 1, dtype=torch.bool)
        else:
            box_BV4 = torch.empty(len(row_B), self.crops, 4, dtype=torch.float64)
            flip_BV = torch.empty(len(row_B), self.crops, dtype=torch.bool)
            for view in range(self.crops):
                u_BN = uniforms(self.seed, epoch, index_B, view, FLIP + 1, AUGMENTATION)
                box_BV4[:, view] = crop_box(u_BN, height_B, width_B, self.views.scale, self.views.ratio)
                flip_BV[:, view] = u_BN[:, FLIP] < self.views.flip
        source_B2 = np.stack([samples.height_N[row_B], samples.width_N[row_B]], axis=1)
        stored_per_source_B4 = np.tile(samples.shape_N2[row_B] / source_B2, 2)
        return Crops(box_BV4.numpy() * stored_per_source_B4[:, None], flip_BV.numpy())
