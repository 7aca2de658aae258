"""`fastssl embed`: the embeddings of your photographs in one file."""

from pathlib import Path
from typing import Annotated, Literal

from typer import Argument, Option

BAD_NAMES = 3  # bad images that are named on the screen
MOST_ON_SHEET = 2000  # a picture 70,000 px high


def embed(
    run: Annotated[
        Path,
        Argument(metavar="RUN", help="Run directory, checkpoint, or .safetensors file of `export --sigma`."),
    ],
    images: Annotated[
        Path, Argument(metavar="IMAGES", help="Folder of images, one image, .beton file, or text file of paths.")
    ],
    out: Annotated[Path, Option(metavar="FILE", help="File to write, by its name .npz, .csv or .parquet.")],
    score: Annotated[
        str | None,
        Option(metavar="DETECTOR", help="Add an OOD score, such as layers_unlabelled. docs/ood.md has all."),
    ] = None,
    fit: Annotated[
        Path | None,
        Option(metavar="FILE.beton", help="Training images of --score.", show_default="data.train of the run"),
    ] = None,
    sheet: Annotated[
        Path | None, Option(metavar="FILE.png", help="Draw the images with the highest --score to this file.")
    ] = None,
    sheet_count: Annotated[int, Option(min=1, max=MOST_ON_SHEET, metavar="N", help="Images on the sheet.")] = 40,
    view: Annotated[
        Literal["squash", "center"] | None,
        Option(help="Resize to a square, or crop the center.", show_default="views.eval of the run"),
    ] = None,
    device: Annotated[Literal["auto", "cpu", "cuda"], Option(help="auto: a GPU if there is one.")] = "auto",
    workers: Annotated[
        int | None, Option(metavar="N", help="Processes that read image files.", show_default="all cores")
    ] = None,
) -> None:
    """Write names and embeddings of images to one file. Bad images are listed, and the others are embedded.

    Examples:
      fastssl embed runs/demo photos --out photos.npz
      fastssl embed runs/demo data/mnist5k/val.beton --out digits.csv
      fastssl embed runs/a pics --out a.npz --score layers_unlabelled --sheet a.png
    """
    from fastssl.common.terminal import listed, printable
    from fastssl.evaluation.embed import embed_images, load_embedder

    encoder = load_embedder(run, view, device)
    report = embed_images(
        encoder, images, out, score=score, fit=fit, sheet=sheet, sheet_count=sheet_count, workers=workers
    )
    if report.conversion is not None and report.conversion.is_recorded:
        print(printable(report.conversion.reason))
    columns = ", ".join(f"{name} {shape[0]}" if shape else name for name, shape in report.columns.items())
    space = f" (mu and sigma of {report.space})" if report.space else ""
    print(printable(f"{out} holds {report.images:,} images: name, {columns}{space}."))
    if sheet is not None:
        print(printable(f"{sheet} shows the {report.drawn} with the highest score."))
    if report.bad:
        first = listed([f"{image.name} ({image.reason})" for image in report.bad[:BAD_NAMES]], len(report.bad))
        print(printable(f"{report.bad_list} lists {len(report.bad):,} bad images: {first}."))
    if report.account is not None:
        print(printable(report.account))
