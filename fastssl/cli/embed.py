"""`fastssl embed`: the embeddings of your photographs in one file."""

import os
from pathlib import Path
from typing import Annotated, Literal

from typer import Argument, Option

BAD_NAMES = 3  # bad images that are named on the screen


def embed(
    run: Annotated[Path, Argument(help="run directory, checkpoint file, or .safetensors of an export with --sigma")],
    images: Annotated[Path, Argument(help="folder of images, text file with one path per line, or .beton")],
    out: Annotated[Path, Option(help="file to write: .npz, .csv or .parquet")],
    score: Annotated[
        str | None, Option(metavar="DETECTOR", help="add an OOD score, such as knn_cosine (docs/ood.md has all)")
    ] = None,
    fit: Annotated[Path | None, Option(help=".beton to fit the score on (default: the run's data.train)")] = None,
    view: Annotated[
        Literal["squash", "center"] | None, Option(help="transform (default: the run's views.eval)")
    ] = None,
    device: Annotated[Literal["auto", "cpu", "cuda"], Option(help="auto: a GPU if there is one")] = "auto",
    workers: Annotated[int | None, Option(help="processes that convert image files (default: all cores)")] = None,
) -> None:
    """Write names, h, mu, sigma and an OOD score of images to one file. Bad images are listed, not fatal."""
    # Before torch is imported: threads of the encoder that wait for each other must leave the cores to the processes
    # that convert images. With 2 cores for both, 4,000 images of 32 px took 15 s of CPU time in place of 25.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    from fastssl.common.terminal import printable
    from fastssl.evaluation.embed import embed_images, load_embedder

    report = embed_images(load_embedder(run, view, device), images, out, score=score, fit=fit, workers=workers)
    if report.conversion is not None and report.conversion.is_recorded:
        print(printable(report.conversion.reason))
    columns = ", ".join(f"{name} {shape[0]}" if shape else name for name, shape in report.columns.items())
    space = f" (mu and sigma of {report.space})" if report.space else ""
    print(printable(f"{out} holds {report.images:,} images: name, {columns}{space}."))
    if report.bad:
        first = ", ".join(f"{image.name} ({image.reason})" for image in report.bad[:BAD_NAMES])
        more = ", ..." if len(report.bad) > BAD_NAMES else ""
        print(printable(f"{report.bad_list} lists {len(report.bad):,} bad images: {first}{more}."))
    if report.account is not None:
        print(printable(report.account))
