"""What is known of every sample of a .beton without decoding it."""

import hashlib
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

from fastssl.beton import BetonInfo, read_names, read_samples
from fastssl.common.geometry import UNIFORMS_PER_BOX, crop_box, eval_box
from fastssl.common.randomness import AUGMENTATION, uniforms
from fastssl.recipe import ViewsConfig


class Samples(NamedTuple):
    """Arrays over the N rows of a file, in their order there, already checked against its size.

    A file of stock FFCV may lack labels (then -1), ids (the row) and source sizes (the stored ones).
    """

    path: Path
    file: np.ndarray  # the whole file, mapped, uint8
    start_N: np.ndarray  # where the image's bytes lie in it
    size_N: np.ndarray
    mode_N: np.ndarray  # beton.format's RAW or JPG
    shape_N2: np.ndarray  # stored height and width in px
    page_N: np.ndarray  # the page of the file that the image lies in
    label_N: np.ndarray
    index_N: np.ndarray  # stable sample ids
    height_N: np.ndarray  # the source image's, in px
    width_N: np.ndarray

    @classmethod
    def of(cls, info: BetonInfo) -> "Samples":
        metadata, size_N = read_samples(info.path)
        image, count = metadata["image"], len(metadata)
        shape_N2 = np.stack([image["height"], image["width"]], axis=1).astype(np.int64)
        start_N = image["data_ptr"].astype(np.int64)

        def column(name: str, default: np.ndarray) -> np.ndarray:
            found = name in metadata.dtype.names and np.issubdtype(metadata[name].dtype, np.integer)
            return metadata[name].astype(np.int64) if found else default

        return cls(
            path=info.path,
            file=np.asarray(np.memmap(info.path, np.uint8, mode="r")),  # numba dispatches slowly on a memmap
            start_N=start_N,
            size_N=size_N,
            mode_N=np.ascontiguousarray(image["mode"]),
            shape_N2=shape_N2,
            page_N=start_N // info.page_size,
            label_N=column("label", np.full(count, -1)),
            index_N=column("index", np.arange(count)),
            height_N=column("height", shape_N2[:, 0]),
            width_N=column("width", shape_N2[:, 1]),
        )

    def fingerprint(self) -> str:
        """Tells files with other images, labels or orders apart, wherever they lie; decodes nothing."""
        columns = self.size_N, self.label_N, self.index_N, self.height_N, self.width_N
        return hashlib.sha256(b"".join(np.ascontiguousarray(c).tobytes() for c in columns)).hexdigest()

    def stored(self, row: int) -> np.ndarray:
        """The image's bytes as they lie in the file, uint8."""
        return self.file[self.start_N[row] : self.start_N[row] + self.size_N[row]]

    def describe(self, row: int) -> str:
        """Names a sample: by file, index, place, and the source image where its name is known."""
        index = int(self.index_N[row])
        name = read_names(self.path, [index]).get(index)
        source = f" ({name})" if name else ""
        return f"{self.path}: the sample with index {index}{source}, at byte {self.start_N[row]:,},"

    def eval_boxes(self, rows: np.ndarray, views: ViewsConfig) -> np.ndarray:
        """(B, 1, 4) float64: the box of the clean view in stored pixels, the one that fastssl.views takes."""
        height_B, width_B = (torch.from_numpy(column[rows]) for column in (self.height_N, self.width_N))
        return self._in_stored_pixels(eval_box(height_B, width_B, views.eval)[:, None], rows)

    def crop_boxes(self, rows: np.ndarray, seed: int, epoch: int, views: ViewsConfig, count: int) -> np.ndarray:
        """(B, count, 4) float64: the views' boxes in stored pixels, the ones that fastssl.views draws."""
        index_B, height_B, width_B = (
            torch.from_numpy(column[rows]) for column in (self.index_N, self.height_N, self.width_N)
        )
        box_BV4 = torch.empty(len(rows), count, 4, dtype=torch.float64)
        for view in range(count):
            u_BN = uniforms(seed, epoch, index_B, view, UNIFORMS_PER_BOX, AUGMENTATION)
            box_BV4[:, view] = crop_box(u_BN, height_B, width_B, views.scale, views.ratio)
        return self._in_stored_pixels(box_BV4, rows)

    def _in_stored_pixels(self, box_BV4: torch.Tensor, rows: np.ndarray) -> np.ndarray:
        source_B2 = np.stack([self.height_N[rows], self.width_N[rows]], axis=1)
        return box_BV4.numpy() * np.tile(self.shape_N2[rows] / source_B2, 2)[:, None]
