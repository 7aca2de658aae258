"""How close do the codecs of a canvas come to its pixels? PSNR and SSIM of BC4 and JPEG, a figure of the worst spots.

    python benchmarks/codec_quality.py IMAGES --out codec.png

Photographs are resized to 256 px as build-beton does. Drawn pictures stand for what photographs hold little of: text,
line art, gray noise, colored noise, one color, gradients, saturated stripes. PSNR is of all RGB values of an image, in
dB; SSIM is of its luma (Gaussian window of 11 px). Sizes are in KiB a canvas. Then the endpoints that the encoder finds
are compared with the best ones, found by trying all, for random blocks of the photographs.
"""

import argparse
import io
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from numba import njit
from PIL import Image, ImageDraw, ImageFont
from torchmetrics.functional.image import structural_similarity_index_measure

from fastssl.beton import bc4
from fastssl.beton.images import FORMATS
from fastssl.beton.resize import resize

SIDE = 256
SHOWN = 6  # columns of the figure
SPOT = 16  # px; side of the enlarged squares
ENLARGED = 10
FINE = (bc4.FINE_LUMA, bc4.FINE_CHROMA, bc4.FINE_CHROMA)
TRIED_BLOCKS = 3000  # of each plane: all pairs of endpoints are tried


class Result(NamedTuple):
    name: str
    psnr: float  # dB; infinite if the pixels are equal
    ssim: float
    size: int  # bytes


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("images", type=Path, help="folder of photographs, searched recursively")
    parser.add_argument("--out", type=Path, help="PNG of the worst spots of each kind of picture")
    options = parser.parse_args()
    files = sorted(path for path in options.images.rglob("*") if path.suffix.lower() in (".jpg", ".jpeg"))
    kinds = {f"{len(files):,} photographs": ((file.name, read_canvas(file)) for file in files), **drawn_pictures()}
    compare_with_all_endpoints(files)
    print("| pictures | codec | PSNR mean | 5 % | worst | SSIM mean | worst | KiB |\n|---|---|---|---|---|---|---|---|")
    spots = []
    for kind, pictures in kinds.items():
        results: dict[str, list[Result]] = {codec: [] for codec in CODECS}
        worst: tuple[float, np.ndarray, str] | None = None
        for name, pixels in pictures:
            for codec, code in CODECS.items():
                decoded, size = code(pixels)
                results[codec].append(Result(name, psnr(decoded, pixels), ssim(decoded, pixels), size))
            if worst is None or results["BC4"][-1].psnr < worst[0]:
                worst = results["BC4"][-1].psnr, pixels, name
        assert worst is not None
        spots.append((kind, worst[2], worst[1]))
        for codec, found in results.items():
            print_row(kind, codec, found)
    if options.out is not None:
        draw(spots[:SHOWN]).save(options.out)


def compare_with_all_endpoints(files: list[Path]) -> None:
    """Print how far the encoder's blocks are from the best ones."""
    of_plane: dict[str, list[np.ndarray]] = {"Y": [], "Cb": [], "Cr": []}
    rng = np.random.default_rng(0)
    for file in files[:: max(1, len(files) // 100)]:
        planes = [np.empty((side, side), np.uint8) for side in (SIDE, SIDE // 2, SIDE // 2)]
        bc4._to_planes(read_canvas(file), *planes)
        for pairs, fine, plane in zip(of_plane.values(), FINE, planes, strict=True):
            blocks = np.empty(plane.size // 2, np.uint8)
            bc4._encode_plane(plane, fine, blocks)
            decoded = np.empty_like(plane)
            bc4.decode_plane(bc4.read_only(blocks), decoded)
            both = [x.reshape(len(x) // 4, 4, -1, 4).transpose(0, 2, 1, 3).reshape(-1, 16) for x in (plane, decoded)]
            pairs.append(np.stack(both, axis=1)[rng.permutation(len(both[0]))[: TRIED_BLOCKS // 100]])
    print("\n| plane | blocks | dB below the best endpoints | blocks more than 0.3 dB below |\n|---|---|---|---|")
    for name, pairs in of_plane.items():
        values_N2P = np.concatenate(pairs).astype(np.int64)
        best = np.array([smallest_error(values) for values in values_N2P[:, 0]])
        errors = np.square(values_N2P[:, 1] - values_N2P[:, 0]).sum(axis=1)
        share = (errors > best * 10**0.03).mean()
        print(f"| {name} | {len(best):,} | {10 * np.log10(errors.sum() / best.sum()):.2f} | {share:.1%} |")
    print()


@njit
def smallest_error(values: np.ndarray) -> int:
    """The sum of squared distances of 16 values to their levels, of the best endpoints high > low."""
    best = 1 << 30
    levels = np.empty(8, np.int64)
    for high in range(1, 256):
        for low in range(high):
            for k in range(8):
                levels[k] = (k * high + (7 - k) * low) // 7
            total = 0
            for value in values:
                nearest = 1 << 20
                for level in levels:
                    nearest = min(nearest, (value - level) ** 2)
                total += nearest
                if total >= best:
                    break
            best = min(best, total)
    return best


def read_canvas(file: Path) -> np.ndarray:
    with Image.open(file, formats=FORMATS) as image:
        return resize(np.array(image.convert("RGB")), SIDE, SIDE)


def as_bc4(pixels: np.ndarray) -> tuple[np.ndarray, int]:
    blocks = bc4.encode(pixels)
    return bc4.decode(blocks, SIDE), len(blocks)


def as_jpeg(quality: int) -> Callable[[np.ndarray], tuple[np.ndarray, int]]:
    def code(pixels: np.ndarray) -> tuple[np.ndarray, int]:
        buffer = io.BytesIO()
        Image.fromarray(pixels).save(buffer, "JPEG", quality=quality, subsampling="4:2:0")
        return np.asarray(Image.open(buffer)), buffer.tell()

    return code


CODECS = {"BC4": as_bc4, "JPEG q90": as_jpeg(90), "JPEG q95": as_jpeg(95)}


def drawn_pictures() -> dict[str, Iterator[tuple[str, np.ndarray]]]:
    """(name, pixels) of ten pictures of each kind, always the same."""

    def seeded(draw_one: Callable[[np.random.Generator], np.ndarray]) -> Iterator[tuple[str, np.ndarray]]:
        return ((f"number {seed}", draw_one(np.random.default_rng(seed))) for seed in range(10))

    return {
        "text": seeded(text),
        "line art": seeded(line_art),
        "noise, gray": seeded(lambda rng: np.repeat(rng.integers(0, 256, (SIDE, SIDE, 1), np.uint8), 3, axis=2)),
        "noise, colored": seeded(lambda rng: rng.integers(0, 256, (SIDE, SIDE, 3), np.uint8)),
        "stripes, saturated": seeded(stripes),
        "gradients": seeded(gradient),
        "one color": seeded(lambda rng: np.full((SIDE, SIDE, 3), rng.integers(0, 256, 3), np.uint8)),
    }


def text(rng: np.random.Generator) -> np.ndarray:
    image = Image.new("RGB", (SIDE, SIDE), tuple(rng.integers(200, 256, 3).tolist()))
    draw = ImageDraw.Draw(image)
    top = 2
    while top < SIDE:
        size = int(rng.integers(9, 22))
        line = "".join(chr(letter) for letter in rng.integers(33, 127, 60))
        draw.text((2, top), line, tuple(rng.integers(0, 100, 3).tolist()), ImageFont.load_default(size))
        top += size + 3
    return np.asarray(image)


def line_art(rng: np.random.Generator) -> np.ndarray:
    image = Image.new("RGB", (SIDE, SIDE), "white")
    draw = ImageDraw.Draw(image)
    for _ in range(40):
        ends = rng.integers(0, SIDE, 4).tolist()
        draw.line(ends, tuple(rng.integers(0, 256, 3).tolist()), int(rng.integers(1, 4)))
    return np.asarray(image)


def stripes(rng: np.random.Generator) -> np.ndarray:
    """Stripes of two saturated colors, a few pixels wide: the worst for chroma at half resolution."""
    colors = rng.permutation(np.array([(255, 0, 0), (0, 255, 0), (0, 0, 255), (255, 255, 0), (255, 0, 255)], np.uint8))
    y, x = np.mgrid[:SIDE, :SIDE]
    angle, width = rng.uniform(0, np.pi), rng.uniform(2, 9)
    return colors[((x * np.cos(angle) + y * np.sin(angle)) // width % 2).astype(np.int64)]


def gradient(rng: np.random.Generator) -> np.ndarray:
    corners = rng.integers(0, 256, (2, 2, 3)).astype(np.uint8)
    return np.asarray(Image.fromarray(corners).resize((SIDE, SIDE), Image.Resampling.BILINEAR))


def psnr(decoded: np.ndarray, pixels: np.ndarray) -> float:
    error = float(np.square(decoded.astype(np.float64) - pixels).mean())
    return float("inf") if error == 0 else 10 * np.log10(255**2 / error)


def ssim(decoded: np.ndarray, pixels: np.ndarray) -> float:
    weights = torch.tensor([0.299, 0.587, 0.114])
    lumas = [(torch.from_numpy(x.copy()).float() @ weights)[None, None] for x in (decoded, pixels)]
    return float(structural_similarity_index_measure(*lumas, data_range=255.0))


def print_row(kind: str, codec: str, results: list[Result]) -> None:
    of_psnr = np.array([result.psnr for result in results])
    worst, least_similar = min(results, key=lambda r: r.psnr), min(results, key=lambda r: r.ssim)
    size = np.mean([result.size for result in results]) / 1024
    print(
        f"| {kind} | {codec} | {of_psnr.mean():.1f} | {np.quantile(of_psnr, 0.05, method='lower'):.1f} | "
        f"{worst.psnr:.1f} ({worst.name}) | {np.mean([result.ssim for result in results]):.4f} | "
        f"{least_similar.ssim:.4f} ({least_similar.name}) | {size:.1f} |",
        flush=True,
    )


def draw(spots: list[tuple[str, str, np.ndarray]]) -> Image.Image:
    """A column for each kind of picture: its worst square in BC4, enlarged, as pixels, BC4 and JPEG."""
    edge = SPOT * ENLARGED
    gap = 12
    font = ImageFont.load_default(13)
    page = Image.new("RGB", (90 + len(spots) * (edge + gap), 40 + 4 * (edge + gap)), "white")
    pen = ImageDraw.Draw(page)
    names = ("the picture", "pixels", "BC4", "JPEG q90")
    for row, name in enumerate(names):
        pen.text((6, 40 + row * (edge + gap) + edge // 2), name, "black", font)
    for column, (kind, name, pixels) in enumerate(spots):
        left = 90 + column * (edge + gap)
        pen.text((left, 4), kind, "black", font)
        pen.text((left, 20), name[:24], "gray", font)
        decoded, jpeg = as_bc4(pixels)[0], as_jpeg(90)(pixels)[0]
        error = np.square(decoded.astype(np.float64) - pixels).sum(axis=2)
        sums = error.reshape(SIDE // SPOT, SPOT, SIDE // SPOT, SPOT).sum(axis=(1, 3))
        top, start = (SPOT * int(i) for i in np.unravel_index(sums.argmax(), sums.shape))
        whole = Image.fromarray(pixels)
        ImageDraw.Draw(whole).rectangle((start - 1, top - 1, start + SPOT, top + SPOT), outline="red")
        page.paste(whole.resize((edge, edge), Image.Resampling.BILINEAR), (left, 40))
        for row, shown in enumerate((pixels, decoded, jpeg), start=1):
            spot = Image.fromarray(shown[top : top + SPOT, start : start + SPOT])
            page.paste(spot.resize((edge, edge), Image.Resampling.NEAREST), (left, 40 + row * (edge + gap)))
    return page


if __name__ == "__main__":
    main()
