"""The images with the highest scores, on one sheet, as they are stored (of whole images: what the encoder gets)."""

from pathlib import Path

import numpy as np
from PIL import Image

from fastssl.beton.sheet import SHOWN, Cell, draw_cells, thumbnail
from fastssl.common.files import explain_write_errors, make_folder
from fastssl.evaluation.embed.output import Rows
from fastssl.loading import Batch


class Strangest:
    """Keeps thumbnails of the `count` images with the highest scores among those that `add` has seen."""

    def __init__(self, sheet: Path, score: str, count: int = SHOWN) -> None:
        self.sheet = sheet
        self.score = score
        self.count = count
        self.images = 0
        self._kept: list[tuple[float, str, Image.Image]] = []  # the highest score first

    def add(self, rows: Rows, batch: Batch) -> None:
        """Look at the valid images of a batch, of which `rows` has the names and scores."""
        score_B = rows.columns["score"]
        self.images += len(rows.names)
        lowest = self._kept[-1][0] if len(self._kept) == self.count else -np.inf
        higher = [
            position for position in np.argsort(-score_B, kind="stable")[: self.count] if score_B[position] > lowest
        ]
        if higher:
            pixels = batch.pixels()[batch.valid]  # (B, H, W, C), or (B, 1, size, size, 3) crops of the evaluation
            for position in higher:
                pixels_HWC = pixels[position].cpu().numpy()
                pixels_HWC = pixels_HWC.reshape(pixels_HWC.shape[-3:])
                self._kept.append((float(score_B[position]), rows.names[position], thumbnail(pixels_HWC)))
            self._kept = sorted(self._kept, key=lambda kept: -kept[0])[: self.count]

    def draw(self) -> int:
        """Draw the images that were kept, the highest score first, and return their number."""
        title = f"the {len(self._kept)} of {self.images:,} images with the highest {self.score}"
        cells = [Cell(picture, name, f"{value:.4g}") for value, name, picture in self._kept]
        with explain_write_errors(self.sheet):
            make_folder(self.sheet.parent)
            draw_cells(self.sheet, [(title, cells)])
        return len(cells)
