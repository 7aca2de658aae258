"""Draw samples of a .beton into one PNG."""

import functools
import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from fastssl.beton import jpeg
from fastssl.beton.format import BC4, RAW, RGB, UNLABELLED
from fastssl.beton.parts import FilePart, part_at
from fastssl.beton.read import BetonInfo, read_header, read_samples
from fastssl.common.errors import UserError
from fastssl.common.files import explain_write_errors, write_atomically
from fastssl.common.terminal import printable

NARROWEST = 3  # columns, so that a title has room
COLUMNS = 6  # a sheet is then about as wide as a page of text in a browser, and its text is read at full size
SHOWN = 40  # samples
SEED = 0
THUMBNAIL = 160  # px; the longer side of a thumbnail
GAP = 14  # px, around everything
LINE = 18  # px from one line of text to the next
CELL_WIDTH, CELL_HEIGHT = THUMBNAIL + GAP, THUMBNAIL + 2 * LINE + GAP  # px
CHANNELS_SHOWN = {1: "", 2: "; the first of 2 channels is shown", RGB: ""}
TITLE_HEIGHT = GAP + LINE + GAP  # px
PAGE, GREY, PALE = (240, 240, 240), (89, 89, 89), (230, 180, 180)


class Cell(NamedTuple):
    """One image of a sheet."""

    picture: Image.Image  # at most THUMBNAIL px on each side
    caption: str
    note: str  # the line below the caption


def draw_sheet(path: str | Path, sheet: str | Path) -> int:
    """Draw random samples, always the same, with class and index, into a PNG. Returns the number of samples."""
    sheet = check_sheet(sheet)
    info = read_header(path)
    count = min(SHOWN, info.num_samples)
    positions = np.sort(np.random.default_rng(SEED).permutation(info.num_samples)[:count])
    which = f"{count} of {info.num_samples:,} random samples" if count < info.num_samples else f"all {count} samples"
    with explain_write_errors(sheet):
        draw_samples(path, sheet, [(f"{info.path.name}: {which}", positions.tolist())])
    return count


def check_sheet(sheet: str | Path) -> Path:
    """Return the path. Raises UserError if it is not that of a PNG file."""
    sheet = Path(sheet)
    if sheet.suffix.lower() != ".png":
        raise UserError(f"--sheet {sheet} is not a PNG file", hint="write a name that ends in .png")
    return sheet


def draw_samples(
    path: str | Path,
    sheet: str | Path,
    groups: Sequence[tuple[str, Sequence[int]]],
    notes: Mapping[int, str] | None = None,
) -> None:
    """Draw samples of a .beton, with their classes, into a PNG.

    Args:
        path: the .beton file.
        sheet: the PNG file.
        groups: drawn one below the other; each has a title and the positions of its samples in the file.
        notes: position -> second line of the sample's caption. None: the sample's index.
    """
    info = read_header(path)
    metadata, image_bytes = read_samples(path)
    has_index = info.fields.get("index") == "IntField"

    def cell(position: int) -> Cell:
        row = metadata[position]
        part = part_at(info.parts, int(row["image"]["data_ptr"]))
        picture = _stored_picture(part, row["image"], int(image_bytes[position]), info.channels)
        index = f"index {row['index']}" if has_index else f"sample {position}"
        return Cell(picture, _class_of(info, row), index if notes is None else notes[position])

    more = f"; the first three of {info.channels} channels are shown as red, green and blue"
    note_on_channels = CHANNELS_SHOWN.get(info.channels, more)
    draw_cells(sheet, [(title + note_on_channels, [cell(each) for each in positions]) for title, positions in groups])


def draw_cells(sheet: str | Path, groups: Sequence[tuple[str, Sequence[Cell]]]) -> None:
    """Draw groups of images, each with a title, one below the other into a PNG."""
    columns = min(COLUMNS, max(NARROWEST, *(len(cells) for _, cells in groups)))
    heights = [TITLE_HEIGHT + -(-len(cells) // columns) * CELL_HEIGHT for _, cells in groups]
    page = Image.new("RGB", (GAP + columns * CELL_WIDTH, sum(heights)), PAGE)
    draw = ImageDraw.Draw(page)
    first_row = 0
    for (title, cells), height in zip(groups, heights):
        draw.text((GAP, first_row + GAP), _shorten(printable(title), page.width - 2 * GAP), "black", _font())
        for number, cell in enumerate(cells):
            left = GAP + number % columns * CELL_WIDTH
            top = first_row + TITLE_HEIGHT + number // columns * CELL_HEIGHT
            # Centered, directly above the caption.
            picture = cell.picture
            page.paste(picture, (left + (THUMBNAIL - picture.width) // 2, top + THUMBNAIL - picture.height))
            middle = left + THUMBNAIL // 2
            below = top + THUMBNAIL + 2
            draw.text((middle, below), _shorten(printable(cell.caption), THUMBNAIL), "black", _font(), anchor="ma")
            draw.text((middle, below + LINE), _shorten(cell.note, THUMBNAIL), GREY, _font(), anchor="ma")
        first_row += height
    write_atomically(Path(sheet), lambda part: page.save(part, "PNG"))


def _stored_picture(part: FilePart, image: np.void, size: int, channels: int) -> Image.Image:
    """Return a stored image of `size` bytes (a row of format.IMAGE) as a thumbnail."""
    try:
        with open(part.path, "rb") as file:
            file.seek(int(image["data_ptr"]) - part.start)
            content = file.read(size)
        if image["mode"] == RAW:
            pixels = np.frombuffer(content, np.uint8).reshape(image["height"], image["width"], channels)
        elif image["mode"] == BC4:
            from fastssl.beton import bc4  # imports numba, which few sheets need

            pixels = bc4.decode(np.frombuffer(content, np.uint8), int(image["height"]))
        else:
            # A large image is shrunk while it is decoded, but not below twice the size of the thumbnail.
            longer = max(jpeg.read_size(content))
            shrink = next((factor for factor in (8, 4, 2) if longer >= 2 * THUMBNAIL * factor), 1)
            pixels = jpeg.decode(content, shrink).pixels
    except (ValueError, OSError) as error:
        return _crossed_box(f"does not decode: {error}")
    return thumbnail(pixels)


def thumbnail(pixels_HWC: np.ndarray) -> Image.Image:
    """Return an image whose longer side is at most THUMBNAIL px. Of more than three channels the first three are shown,
    of two the first."""
    channels = pixels_HWC.shape[-1]
    picture = Image.fromarray(np.ascontiguousarray(pixels_HWC[..., :RGB] if channels >= RGB else pixels_HWC[..., 0]))
    # A small image is enlarged by a whole number, which shows its pixels as they are.
    factor = max(1, THUMBNAIL // max(picture.size))
    picture = picture.resize((picture.width * factor, picture.height * factor), Image.Resampling.NEAREST)
    picture.thumbnail((THUMBNAIL, THUMBNAIL))
    return picture


def _crossed_box(reason: str) -> Image.Image:
    box = Image.new("RGB", (THUMBNAIL, THUMBNAIL), "white")
    draw, last = ImageDraw.Draw(box), THUMBNAIL - 1
    draw.line((0, 0, last, last), PALE, 3)
    draw.line((0, last, last, 0), PALE, 3)
    draw.multiline_text((GAP // 2, GAP // 2), textwrap.fill(printable(reason), 19, max_lines=8), "black", _font())
    draw.rectangle((0, 0, last, last), outline=GREY)
    return box


def _class_of(info: BetonInfo, row: np.void) -> str:
    label = int(row["label"]) if info.fields.get("label") == "IntField" else UNLABELLED
    if label == UNLABELLED:
        return "no label"
    if info.classes and 0 <= label < len(info.classes):
        return printable(str(info.classes[label]))
    return f"label {label}"


def _shorten(text: str, width: float) -> str:
    """Cut the text to at most `width` px."""
    if _font().getlength(text) <= width:
        return text
    text = text[:200]  # no more fits anyway, and the loop measures each length
    while text and _font().getlength(text + "…") > width:
        text = text[:-1]
    return text.rstrip() + "…"


@functools.cache
def _font() -> ImageFont.FreeTypeFont:
    """DejaVu Sans, which matplotlib contains: Latin, Greek, Cyrillic, Arabic and more."""
    import matplotlib

    return ImageFont.truetype(Path(matplotlib.get_data_path()) / "fonts/ttf/DejaVuSans.ttf", 13)
