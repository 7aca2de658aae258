"""The pass over the images of `fastssl embed`.

Worker processes read and convert image files, a thread decodes the next batch to pixels, the main thread runs the
encoder and writes. A .beton needs no conversion: BetonLoader reads it.
"""

import json
import os
from collections.abc import Generator, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np

from fastssl.beton import read_header, read_names
from fastssl.beton.format import RGB
from fastssl.beton.images import Encoded
from fastssl.beton.pool import Pool, worker_pool
from fastssl.beton.shards import exists, is_set
from fastssl.beton.sheet import SHOWN, check_sheet
from fastssl.beton.source import as_utf8, file_of
from fastssl.common.errors import UserError
from fastssl.common.files import expand_user, explain_write_errors, remove_abandoned_files, write_atomically
from fastssl.common.system import resolve_workers
from fastssl.common.terminal import console, print_line, printable, progress
from fastssl.evaluation.embed.images import BadImage, ImageFiles, list_images
from fastssl.evaluation.embed.output import Rows, find_writer
from fastssl.evaluation.embed.score import Scorer
from fastssl.evaluation.embed.strangest import Strangest
from fastssl.evaluation.features import BATCH_SIZE, check_finite, embed_batches, eval_input, eval_loader
from fastssl.evaluation.ood.suites import check_same_build
from fastssl.evaluation.runs import (
    BetonSubset,
    RunEncoder,
    find_device,
    load_run_encoder,
    weights_sha256,
)
from fastssl.loading import Batch
from fastssl.loading.image_files import Conversion, decode_batch, find_conversion
from fastssl.loading.prefetch import run_ahead
from fastssl.models.exported import load_exported_model

READY_BATCHES = 1  # decoded, waiting for the encoder
TASKS_PER_WORKER = (
    4  # submitted at a time; fewer than in a build, because the converted images come back to this process
)


@dataclass
class EmbedReport:
    """The result of `embed_images`."""

    out: Path
    images: int = 0  # that were embedded
    columns: dict[str, tuple[int, ...]] = field(default_factory=dict)  # name -> shape of an image's value
    space: str | None = None  # of mu and sigma: "h" or "z"; None: the model is deterministic
    bad: list[BadImage] = field(default_factory=list)
    bad_list: Path | None = None  # a line of JSON for each bad image; None: there are none
    conversion: Conversion | None = None  # of image files; printed before the work if it is not a recorded one
    account: str | None = None  # a sentence that accounts for every file
    drawn: int = 0  # images on the sheet


class Pixels(NamedTuple):
    """A batch for the encoder."""

    batch: Batch
    augmented: Batch | None  # the same images with the crops of two training views, if the scorer needs them


def load_embedder(run: str | Path, view: Literal["squash", "center"] | None = None, device: str = "auto") -> RunEncoder:
    """Load what `load_run_encoder` loads, or the model of a .safetensors that was exported with --sigma.

    What is computed of training images is cached next to such a file, in features/.
    """
    path = Path(run)
    if path.suffix != ".safetensors":
        return load_run_encoder(run, view=view, device=device)
    model = load_exported_model(path)
    views = model.recipe.views.model_copy(update={"eval": view or model.recipe.views.eval})
    recipe = model.recipe.model_copy(update={"views": views})
    chosen = find_device(device)
    return RunEncoder(path.parent, recipe, model.to(chosen), chosen, path, f"-{path.stem}", weights_sha256(model))


def embed_images(
    encoder: RunEncoder,
    images: str | Path,
    out: str | Path,
    *,
    score: str | None = None,
    fit: str | Path | None = None,
    sheet: str | Path | None = None,
    sheet_count: int = SHOWN,
    workers: int | None = None,
) -> EmbedReport:
    """Write names, h, mu, sigma and scores of images to one file, in the order of the images.

    Image files are converted as the training images of the run were, and their pixels are those of a .beton that
    `build-beton` makes of them. Bad images are left out and listed in OUT.bad.jsonl.

    Args:
        encoder: of `load_run_encoder`.
        images: a folder with images at any depth, a text file with one path per line, a .beton, or an image.
        out: a .npz, .csv or .parquet. An existing file is replaced when the new one is complete.
        score: name of a detector of `fastssl.evaluation.ood.DETECTORS`; a higher score means more unusual.
        fit: .beton that the detector is fitted to, and as which images are converted; None: the run's data.train.
        sheet: a PNG on which the images with the highest scores are drawn; None: none is drawn.
        sheet_count: how many of them.
        workers: processes that convert image files; None: all cores.

    Raises:
        UserError: an argument is wrong, no image can be read, or `out` cannot be written.
    """
    images, out = expand_user(images), expand_user(out)
    in_chans = encoder.recipe.model.in_chans
    report = EmbedReport(out)
    # What is quickly found wrong comes first; fitting a detector may take minutes.
    write = find_writer(out)
    processes = resolve_workers(workers)
    if not exists(images):
        raise UserError(f"{images} does not exist", hint="name a folder of images, a list of paths or a .beton")
    if out.resolve() == images.resolve():
        raise UserError(f"--out {out} is the list of images", hint="name another file")
    if sheet is not None and score is None:
        raise UserError("--sheet draws the images with the highest score", hint="add --score layers_unlabelled")
    strangest = (
        None if sheet is None or score is None else Strangest(_check_sheet_path(sheet, images), score, sheet_count)
    )
    scorer = Scorer(encoder, score, fit) if score is not None else None
    if is_set(images) or (images.suffix == ".beton" and images.is_file()):
        encoder.check_channels(images)
        if scorer is not None and scorer.fit_data is not None:
            check_same_build([scorer.fit_data.path, images])
        rows = _embed_beton(encoder, images, scorer, strangest, report)
    else:
        files = list_images(images, arrays=in_chans != RGB)
        if strangest is not None:
            _refuse_listed(strangest.sheet, files)
        report.conversion = find_conversion(fit or encoder.recipe.data.train, encoder.recipe.views, in_chans)
        if not report.conversion.is_recorded:
            print_line(console(), printable(report.conversion.reason))
        if scorer is not None and scorer.fit_data is not None:
            _check_same_crops(scorer.fit_data.path, report.conversion)
        rows = _embed_files(encoder, files, scorer, strangest, report, processes)
    if scorer is not None:
        scorer.fit()
    with explain_write_errors(out):
        if out.parent.is_dir():
            remove_abandoned_files(out.parent, out.name)
        write_atomically(out, lambda part: write(part, rows))
        _list_bad_images(report)
    if strangest is not None:
        report.drawn = strangest.draw()
    return report


def _check_sheet_path(sheet: str | Path, images: Path) -> Path:
    """Return the path of the sheet. Raises UserError if it cannot be one, or would be among the images."""
    path = check_sheet(expand_user(sheet))
    if path.is_dir():
        raise UserError(f"--sheet {path} is a folder", hint="name a file")
    # realpath, because Path.resolve raises an error for a link to itself.
    if Path(os.path.realpath(path)).is_relative_to(os.path.realpath(images)):
        raise UserError(f"--sheet {path} would be one of the images in {images}", hint="name a file outside of it")
    return path


def _refuse_listed(sheet: Path, files: ImageFiles) -> None:
    """Raise UserError if the sheet would replace an image that a list names."""
    path = os.path.realpath(sheet)
    if sheet.exists() and any(path == os.path.realpath(str(file_of(each.image))) for each in files.samples):
        raise UserError(f"--sheet {sheet} is one of the images of {files.path}", hint="name another file")


def _check_same_crops(train: Path, conversion: Conversion) -> None:
    """Raise UserError if the views of the training images are made in another way than those of image files."""
    if conversion.plan.layout == "full" and read_header(train).resolution is not None:
        raise UserError(
            f"All images of {train} have one size, so their views are cropped on the device, and those of image files "
            "on the CPU, which a detector could tell apart",
            hint="build a .beton of the images, or leave out --score",
        )


def _embed_beton(
    encoder: RunEncoder, beton: Path, scorer: Scorer | None, strangest: Strangest | None, report: EmbedReport
) -> Iterator[Rows]:
    data, views = BetonSubset(beton), encoder.recipe.views
    count = read_header(beton).num_samples
    size = min(BATCH_SIZE, count)
    loader = eval_loader(data, views, encoder.device, batch_size=size)
    augmented: Iterator[Batch | None] = iter([])
    if scorer is not None and scorer.kind.of_views:
        augmented = iter(eval_loader(data, views, encoder.device, batch_size=size, augmented=True))
    names = read_names(beton, loader.samples.column("index", loader.rows).tolist())
    with progress(f"Embedding {beton}", count) as advance:
        for batch in loader:
            pixels = Pixels(batch, next(augmented, None))
            columns, index = _embed_batch(encoder, beton, pixels, scorer, report)
            rows = Rows([as_utf8(names.get(i, str(i))) for i in index], columns)
            if strangest is not None:
                strangest.add(rows, batch)
            yield rows
            advance(len(index))


def _embed_files(
    encoder: RunEncoder,
    files: ImageFiles,
    scorer: Scorer | None,
    strangest: Strangest | None,
    report: EmbedReport,
    workers: int,
) -> Iterator[Rows]:
    report.bad += files.bad
    total, done = len(files.samples), 0
    with worker_pool(workers) as pool, progress(f"Embedding {files.path}", total) as advance:
        batches = _decoded_batches(encoder, files, scorer, report, pool)
        for pixels in run_ahead(batches, READY_BATCHES):
            columns, index = _embed_batch(encoder, files.path, pixels, scorer, report)
            rows = Rows([files.samples[i].name for i in index], columns)
            if strangest is not None:
                strangest.add(rows, pixels.batch)
            yield rows
            advance(index[-1] + 1 - done)  # with the bad images before it
            done = index[-1] + 1
        if done < total:
            advance(total - done)
    report.account = files.account(report.images, len(report.bad))
    if not report.images:
        _list_bad_images(report)
        raise UserError(
            f"None of the {len(report.bad):,} images of {files.path} could be read (the first: {report.bad[0].name}: "
            f"{report.bad[0].reason})",
            hint=f"read {report.bad_list}, which lists them all with the reason",
        )


def _decoded_batches(
    encoder: RunEncoder, files: ImageFiles, scorer: Scorer | None, report: EmbedReport, pool: Pool
) -> Generator[Pixels, None, None]:
    """Yield batches of the good images in order, and add the bad ones to the report. Runs in a thread."""
    assert report.conversion is not None
    plan, views, size = report.conversion.plan, encoder.recipe.views, min(BATCH_SIZE, len(files.samples))
    needs_views = scorer is not None and scorer.kind.of_views

    def decode(images: list[Encoded], index: list[int]) -> Pixels:
        batch, augmented = (
            decode_batch(images, index, plan, views, encoder.device, batch_size=size, augmented=augmented)
            if needs_views or not augmented
            else None
            for augmented in (False, True)
        )
        assert batch is not None
        return Pixels(batch, augmented)

    results = pool.encode((sample.image for sample in files.samples), plan, tasks_per_worker=TASKS_PER_WORKER)
    images: list[Encoded] = []
    index: list[int] = []
    for number, result in enumerate(results):
        if isinstance(result, str):
            report.bad.append(BadImage(files.samples[number].name, result))
            continue
        images.append(result)
        index.append(number)
        if len(images) == size:
            yield decode(images, index)
            images, index = [], []
    if images:
        yield decode(images, index)


def _embed_batch(
    encoder: RunEncoder, source: Path, pixels: Pixels, scorer: Scorer | None, report: EmbedReport
) -> tuple[dict[str, np.ndarray], list[int]]:
    """Return the columns of the valid images of a batch, and their indices. Counts them in the report."""
    batches = embed_batches(encoder.model, [pixels.batch], eval_input(encoder.recipe.views))
    (features,) = check_finite(batches, source, "float32")
    columns: dict[str, np.ndarray] = {}
    if scorer is not None:
        columns["score"] = scorer.score(features, pixels.batch, pixels.augmented)
    columns["h"] = features.h
    if features.mu is not None and features.sigma is not None:
        columns |= {"mu": features.mu, "sigma": features.sigma}
    report.images += len(features.index)
    report.columns = {name: x.shape[1:] for name, x in columns.items()}
    report.space = features.space
    return columns, features.index.tolist()


def _list_bad_images(report: EmbedReport) -> None:
    """Write OUT.bad.jsonl, or remove that of an earlier OUT if all images are good."""
    path = report.out.with_name(report.out.name + ".bad.jsonl")
    if not report.bad:
        path.unlink(missing_ok=True)
        return
    write_atomically(path, "".join(json.dumps(image._asdict()) + "\n" for image in report.bad))
    report.bad_list = path
