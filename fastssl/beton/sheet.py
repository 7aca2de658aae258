"""What the images of a .beton look like: some of them in one picture."""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from fastssl.beton import jpeg
from fastssl.beton.format import RAW
from fastssl.beton.read import BetonInfo, read_header, read_samples
from fastssl.common.errors import UserError
from fastssl.common.files import write_atomically
from fastssl.common.terminal import printable

SHOWN = 40  # samples
COLUMNS = 8
SEED = 0
THUMBNAIL = 160  # px; the longer side of a thumbnail
GAP = 14  # px, around everything
LINE = 18  # px from one line of text to the next
PAGE, GREY, PALE = (240, 240, 240), (100, 100, 100), (230, 180, 180)


def draw_sheet(path: str | Path, sheet: str | Path) -> int:
    """Draw random samples, always the same, with class and index, into a PNG; returns how many."""
    sheet = Path(sheet)
    if sheet.suffix.lower() != ".png":
        raise UserError(f"The sheet is a PNG, but {sheet} does not end in .png: name it so.")
    info = read_header(path)
    count = min(SHOWN, info.num_samples)
    positions = np.sort(np.random.default_rng(SEED).permutation(info.num_samples)[:count])
    which = f"{count} of {info.num_samples:,} samples, drawn at random"
    title = f"{info.path.name}: {which if count < info.num_samples else f'all {count} samples'}"
    try:
        draw_samples(path, sheet, [(title, positions)])
    except OSError as error:
        raise UserError(f"Cannot write {sheet}: {error.strerror}; name another --sheet.") from error
    return count


def draw_samples(
    path: str | Path,
    sheet: str | Path,
    groups: Sequence[tuple[str, Sequence[int]]],
    notes: Mapping[int, str] | None = None,
    columns: int = COLUMNS,
) -> None:
    """Draw samples of a .beton into a PNG, group below group: a title, and the positions in the file that stand there.

    Under each sample are its class and what `notes` says of its position, without notes its index.
    """
    info = read_header(path)
    metadata, image_bytes = read_samples(path)
    columns = min(columns, max(len(positions) for _, positions in groups))
    cell_width, cell_height = THUMBNAIL + GAP, THUMBNAIL + 2 * LINE + GAP
    before_rows = GAP + LINE + GAP
    height = sum(before_rows + -(-len(positions) // columns) * cell_height for _, positions in groups)
    picture = Image.new("RGB", (GAP + columns * cell_width, height), PAGE)
    draw = ImageDraw.Draw(picture)

    first_row = 0
    with open(info.path, "rb") as file:
        for title, positions in groups:
            draw.text((GAP, first_row + GAP), _cut(title, picture.width - 2 * GAP), "black", _font())
            first_row += before_rows
            for place, position in enumerate(positions):
                row, left = metadata[position], GAP + place % columns * cell_width
                top = first_row + place // columns * cell_height
                file.seek(int(row["image"]["data_ptr"]))
                try:
                    thumbnail = _thumbnail(file.read(int(image_bytes[position])), row["image"])
                except (ValueError, OSError) as error:
                    thumbnail = _crossed_box(f"does not decode: {error}")
                above = THUMBNAIL - thumbnail.height  # an image stands on its caption
                picture.paste(thumbnail, (left + (THUMBNAIL - thumbnail.width) // 2, top + above))
                name, index = _caption(info, row, position)
                second = index if notes is None else notes[position]
                for line, (text, colour) in enumerate(((name, "black"), (second, GREY))):
                    text = _cut(text, THUMBNAIL)
                    middle = left + (THUMBNAIL - _font().getlength(text)) // 2
                    draw.text((middle, top + THUMBNAIL + 2 + line * LINE), text, colour, _font())
            first_row += -(-len(positions) // columns) * cell_height
    write_atomically(Path(sheet), lambda beside: picture.save(beside, "PNG"))


def _thumbnail(content: bytes, image: np.void) -> Image.Image:
    """A stored image (a row of format.IMAGE), its longer side at most THUMBNAIL px."""
    if image["mode"] == RAW:
        pixels = np.frombuffer(content, np.uint8).reshape(image["height"], image["width"], 3)
    else:
        # A large one is shrunk as it is decoded, but not below twice of what is shown.
        longer = max(jpeg.read_size(content))
        shrink = next((s for s in (8, 4, 2) if longer >= 2 * THUMBNAIL * s), 1)
        pixels = jpeg.decode(content, shrink).pixels
    thumbnail = Image.fromarray(pixels)
    # A small one is enlarged by a whole number, so that its pixels are seen as they are.
    factor = max(1, THUMBNAIL // max(thumbnail.size))
    size = (thumbnail.width * factor, thumbnail.height * factor)
    thumbnail = thumbnail.resize(size, Image.Resampling.NEAREST)
    thumbnail.thumbnail((THUMBNAIL, THUMBNAIL))
    return thumbnail


def _crossed_box(reason: str) -> Image.Image:
    box = Image.new("RGB", (THUMBNAIL, THUMBNAIL), "white")
    draw, last = ImageDraw.Draw(box), THUMBNAIL - 1
    draw.line((0, 0, last, last), PALE, 3)
    draw.line((0, last, last, 0), PALE, 3)
    draw.rectangle((0, 0, last, last), outline=GREY)
    lines = [""]
    for word in printable(reason).split():
        longer = f"{lines[-1]} {word}".strip()
        if _font().getlength(longer) <= THUMBNAIL - GAP:
            lines[-1] = longer
        else:
            lines.append(word)
    for line, text in enumerate(lines[: THUMBNAIL // LINE - 1]):
        draw.text((GAP // 2, GAP // 2 + line * LINE), _cut(text, THUMBNAIL - GAP), "black", _font())
    return box


def _caption(info: BetonInfo, row: np.void, position: int) -> tuple[str, str]:
    """The class and the index of a sample; without an index its position in the file."""
    label = int(row["label"]) if info.fields.get("label") == "IntField" else None
    is_named = label is not None and 0 <= label < len(info.classes or [])
    if is_named:
        name = printable(str(info.classes[label]))
    else:
        name = "no label" if label is None else f"label {label}"
    has_index = info.fields.get("index") == "IntField"
    return name, f"index {row['index']}" if has_index else f"sample {position}"


def _cut(text: str, width: float) -> str:
    """The text, cut to so many px."""
    if _font().getlength(text) <= width:
        return text
    text = text[:200]  # no more fits in any case, and what follows tries one length after the other
    while text and _font().getlength(text + "…") > width:
        text = text[:-1]
    return text.rstrip() + "…"


@functools.cache
def _font() -> ImageFont.FreeTypeFont:
    """DejaVu, which matplotlib brings: Latin, Greek, Cyrillic, Arabic and more."""
    import matplotlib

    return ImageFont.truetype(Path(matplotlib.get_data_path()) / "fonts/ttf/DejaVuSans.ttf", 13)
