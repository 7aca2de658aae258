"""`fastssl build-beton` and `fastssl inspect`: make .beton files and show their contents."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

from typer import Argument, Option

from fastssl.cli.help import SLURM_PANEL, Cpus, Partition, TimeLimit
from fastssl.common.errors import UserError, quote
from fastssl.common.terminal import console, count_of, listed, print_error, print_line, size_in_words, time_in_words

if TYPE_CHECKING:
    from fastssl.beton import BuildEstimate, BuildReport
    from fastssl.beton.slurm import SlurmBuild


STORAGE_PANEL = "How images are stored"
MOST_NAMED = 5  # shards or empty classes in a line
CLASSES_NAMED = 3
MOST_ENLARGED = 0.5  # share of the images above which a smaller canvas is suggested
BAD_IMAGES_PANEL = "Bad images, which are skipped"


def build_beton(
    builder: Annotated[
        str | None, Argument(metavar="BUILDER", help="What the images are, such as imagefolder or cifar10: see --list.")
    ] = None,
    source: Annotated[Path | None, Option(help="Folder or archive of the images.")] = None,
    out: Annotated[Path | None, Option(help="Folder to write train.beton, val.beton, ... to.")] = None,
    download: Annotated[bool, Option("--download", help="Download the data set to --source first.")] = False,
    limit: Annotated[
        int | None, Option(metavar="N", help="Use at most this many images of each split.", show_default="all")
    ] = None,
    workers: Annotated[int | None, Option(metavar="N", help="Number of processes.", show_default="all cores")] = None,
    executor: Annotated[
        Literal["local", "slurm"], Option(help="This machine, or for --shards a SLURM cluster.")
    ] = "local",
    dry_run: Annotated[bool, Option("--dry-run", help="Estimate sizes and time, and write nothing.")] = False,
    images: Annotated[
        int | None,
        Option(min=1, metavar="N", help="Let --dry-run estimate N images, of which the source is a sample."),
    ] = None,
    list_: Annotated[bool, Option("--list", help="List the builders.")] = False,
    canvas: Annotated[
        int | None,
        Option(
            metavar="PX", help="Resize each image to a square of this side.", show_default="the builder's",
            rich_help_panel=STORAGE_PANEL,
        ),
    ] = None,
    max_side: Annotated[
        int | None,
        Option(
            metavar="PX", help="Keep whole images in place of squares, shrunk to this side if larger.",
            rich_help_panel=STORAGE_PANEL,
        ),
    ] = None,
    codec: Annotated[
        Literal["jpeg", "bc4"] | None,
        Option(
            help="Compression of the squares: bc4 loads fastest, jpeg takes less disk.",
            show_default="none up to 64 px, else bc4", rich_help_panel=STORAGE_PANEL,
        ),
    ] = None,
    quality: Annotated[
        int | None,
        Option(
            min=1, max=100, metavar="N", help="Quality of the JPEGs that the build encodes.", show_default="90",
            rich_help_panel=STORAGE_PANEL,
        ),
    ] = None,
    order: Annotated[
        Literal["shuffle", "source"], Option(help="Order of the images in the file.", rich_help_panel=STORAGE_PANEL)
    ] = "shuffle",
    splits: Annotated[
        Literal["auto", "none"],
        Option(
            help="auto: folders and files called train, val or test are splits; none: all images are for training.",
            rich_help_panel=STORAGE_PANEL,
        ),
    ] = "auto",
    hold_out: Annotated[
        str | None,
        Option(
            metavar="N%", help="Share of the images that becomes the split val, of a source that has no splits.",
            show_default="none", rich_help_panel=STORAGE_PANEL,
        ),
    ] = None,
    shards: Annotated[
        int | None,
        Option(
            min=1, metavar="N", help="Write each split as this many files.", show_default="one file",
            rich_help_panel=STORAGE_PANEL,
        ),
    ] = None,
    shard: Annotated[
        int | None,
        Option(
            min=0, metavar="K", help="Build only this one of --shards, from 0; other processes build the others.",
            show_default="all", rich_help_panel=STORAGE_PANEL,
        ),
    ] = None,
    channels: Annotated[
        int,
        Option(
            min=1, metavar="N", help="3: RGB; 1: gray; other numbers: TIFF stacks and .npy files.",
            rich_help_panel=STORAGE_PANEL,
        ),
    ] = 3,
    range_: Annotated[
        str,
        Option(
            "--range", metavar="RANGE",
            help="Of images with more than 8 bits: the values that become 0 and 255, as LOW,HIGH; full: 0 and 65535; "
            "auto: by each image's values.",
            rich_help_panel=STORAGE_PANEL,
        ),
    ] = "full",
    strict: Annotated[
        bool, Option("--strict", help="Stop at the first bad image.", rich_help_panel=BAD_IMAGES_PANEL)
    ] = False,
    allow_bad: Annotated[
        str | None,
        Option(
            metavar="N%", help="Share of bad images above which the exit code is 1.", show_default="1%, or 10 images",
            rich_help_panel=BAD_IMAGES_PANEL,
        ),
    ] = None,
    max_megapixels: Annotated[
        int, Option(min=1, metavar="N", help="Larger images are bad.", rich_help_panel=BAD_IMAGES_PANEL)
    ] = 179,
    parallel: Annotated[
        int, Option(min=1, metavar="N", help="Parallel jobs, each with one shard.", rich_help_panel=SLURM_PANEL)
    ] = 8,
    cpus: Cpus = 8,
    time_limit: TimeLimit = "24:00",
    partition: Partition = None,
) -> None:  # fmt: skip
    """Convert images to .beton files. The same command resumes a build that was stopped.

    Examples:
      fastssl build-beton imagefolder --source photos --out data/photos
      fastssl build-beton cifar10 --source downloads --out data/cifar10 --download
      fastssl build-beton imagenet --source ILSVRC --out data/imagenet --dry-run
      fastssl build-beton csv --source a.csv --out a --shards 64 --executor slurm
    """
    from fastssl import beton
    from fastssl.beton.ranges import parse_range

    if list_:
        for info in beton.describe_builders():
            print(f"{info.name:<14} {info.summary}" + (" (--download)" if info.can_download else ""))
        return
    if builder is None:
        raise UserError("build-beton needs a builder", hint="`fastssl build-beton --list` shows the builders")
    if out is None:
        raise UserError("build-beton needs --out, the folder to write to", hint=f"add --out data/{builder}")
    options = beton.BuildOptions(
        canvas=canvas,
        max_side=max_side,
        codec=codec,
        quality=quality,
        order=order,
        workers=workers,
        limit=limit,
        strict=strict,
        allow_bad=_percent("--allow-bad", allow_bad),
        download=download,
        value_range=parse_range(range_),
        max_megapixels=max_megapixels,
        splits=splits,
        channels=channels,
        shards=shards,
        shard=shard,
        hold_out=_percent("--hold-out", hold_out),
    )
    if images is not None and not dry_run:
        raise UserError("--images is for an estimate", hint="add --dry-run, or use --limit to build fewer images")
    if dry_run:
        _print_estimate(beton.estimate_build(builder, source, out, options, images))
        return
    if executor == "slurm":
        from fastssl.beton.slurm import submit_build
        from fastssl.common.slurm import parse_time_limit

        minutes = parse_time_limit(time_limit)
        build = submit_build(
            builder, source, out, options, parallel=parallel, cpus=cpus, minutes=minutes, partition=partition
        )
        _print_jobs(build)
        if build.report is None:
            return
        report = build.report
    else:
        # BuildOptions has the keyword arguments of build_beton.
        report = beton.build_beton(builder, source, out, **vars(options))
    _print_report(report)
    if report.problem:
        print_error(report.problem)
        raise SystemExit(1)


def _print(text: str) -> None:
    """Print a line with names of files or classes, which may hold anything."""
    print_line(console(), text)


def _print_report(report: "BuildReport") -> None:
    """Say what each file holds, and what was left out."""
    for split in report.splits:
        _print(
            f"{split.path} holds {_images_and_classes(split.samples, split.classes)}, {size_in_words(split.bytes)}"
            + (f", {split.unlabelled:,} without a label" if split.unlabelled and split.classes else "")
            + (f", {count_of(split.bad, 'bad image')} skipped" if split.bad else "")
            + (" (up to date: built from the same images with the same options)" if split.up_to_date else "")
        )
        if split.empty_classes:
            count = len(split.empty_classes)
            names = listed(split.empty_classes[:MOST_NAMED], count)
            _print(f"Classes without images in the split {split.split}: {count:,} ({names}).")
    for split in report.splits:
        if split.nearly_black:
            names = listed(split.nearly_black_names, split.nearly_black)
            _print(
                f"Nearly black, with no value above 1/8 of the range: {count_of(split.nearly_black, 'image')} of "
                f"{split.path} ({names}). If such files have more than 8 bits per channel, --range auto or "
                "--range LOW,HIGH sets their range."
            )
        _say_if_enlarged(str(split.path), split.enlarged / max(1, split.samples))
    for bad_images in dict.fromkeys(split.bad_images for split in report.splits if split.bad):
        _print(f"The bad images are listed in {bad_images}.")
    _print(report.account)


def _say_if_enlarged(path: str, share: float) -> None:
    if share > MOST_ENLARGED:
        _print(
            f"{share:.0%} of the images of {path} have less than half of the canvas's side, and are enlarged: a "
            "smaller --canvas, such as their own side, takes less space and loads faster."
        )


def _print_jobs(build: "SlurmBuild") -> None:
    """Say how many shards are complete, and which are submitted now."""
    _print(
        f"{build.complete:,} of {count_of(build.shards, 'shard')} are complete, {build.queued:,} were queued or "
        f"running already, {len(build.submitted):,} are submitted now."
    )
    if build.submitted:
        numbers = listed([str(shard) for shard in build.submitted][:MOST_NAMED], len(build.submitted))
        first = next(iter(build.submitted.values()))
        _print(f"Job array {first.split('_')[0]} builds the shards {numbers}.")
    for shard, job_id in list(build.ended.items())[:MOST_NAMED]:
        _print(f"The job {job_id} of shard {shard} had ended before it was complete: see its log in {build.folder}.")
    if build.complete < build.shards:
        _print(f"The jobs' logs are in {build.folder}. The same command shows the progress.")


def _percent(option: str, text: str | None) -> float | None:
    try:
        return None if text is None else float(text.removesuffix("%"))
    except ValueError:
        raise UserError(f"{option} must be a percentage, got {quote(text)}", hint="write it like 5%") from None


def _images_and_classes(images: int, classes: list[str]) -> str:
    """Return their numbers, with the names of the first classes."""
    what = count_of(images, "image")
    if not classes:
        return f"{what} without labels"
    return f"{what} of {count_of(len(classes), 'class')} ({listed(classes[:CLASSES_NAMED], len(classes))})"


def _print_estimate(estimate: "BuildEstimate") -> None:
    for split in estimate.splits:
        _print(
            f"{split.path} would hold about {_images_and_classes(split.images, split.classes)}, "
            f"{size_in_words(split.bytes)}, as {split.stored}; time to build: {_build_time(split.seconds)}"
            + (f"; {split.bad:.1%} of the images sampled are bad" if split.bad else "")
        )
        _say_if_enlarged(str(split.path), split.enlarged)
    for splits in estimate.others:
        size, seconds = sum(split.bytes for split in splits), sum(split.seconds for split in splits)
        _print(f"As {splits[0].stored} instead: {size_in_words(size)}; time to build: {_build_time(seconds)}")
    total = sum(split.bytes for split in estimate.splits)
    fits_disk = "fit on" if total < estimate.free_disk else "DO NOT fit on"
    _print(f"All {size_in_words(total)} {fits_disk} the disk: {size_in_words(estimate.free_disk)} free.")
    fits_memory = "fit into" if total < estimate.free_memory else "DO NOT fit into"
    _print(
        f"All {size_in_words(total)} {fits_memory} memory (the page cache): {size_in_words(estimate.free_memory)} free."
    )


def _build_time(seconds: float) -> str:
    return f"{time_in_words(seconds)}, plus the start of the processes"


def inspect(
    file: Annotated[
        Path,
        Argument(
            metavar="FILE.beton",
            help="A file of build-beton or FFCV, a folder with train.beton or its shards, or a .shards list.",
        ),
    ],
    verify: Annotated[bool, Option("--verify", help="Decode every image and check its checksum.")] = False,
    workers: Annotated[
        int | None, Option(metavar="N", help="Number of processes for --verify.", show_default="all cores")
    ] = None,
    sheet: Annotated[Path | None, Option(metavar="FILE.png", help="Draw random images to this file.")] = None,
    subset: Annotated[
        Path | None,
        Option(metavar="FILE.txt", help="Count the images of this list, which has a name or an index per line."),
    ] = None,
    batch_size: Annotated[
        int | None, Option(min=1, metavar="N", help="Show the memory that loading such batches takes.")
    ] = None,
) -> None:
    """Show what a .beton file holds, and check it.

    Examples:
      fastssl inspect data/photos/train.beton
      fastssl inspect data/photos/train.beton --sheet photos.png
      fastssl inspect data/photos/train.beton --verify
    """
    from fastssl import beton
    from fastssl.common.terminal import pairs_table

    screen = console()
    file = beton.beton_file(file, "train")
    screen.print(beton.inspect_beton(file))
    if batch_size is not None:
        from fastssl.loading import BetonLoader, estimate_memory
        from fastssl.recipe import ViewsConfig

        crop: Literal["cpu", "gpu"] = "cpu" if beton.read_header(file).resolution is None else "gpu"
        sizes = estimate_memory(BetonLoader(file, batch_size, crop=crop, views=ViewsConfig(), drop_last=False))
        title = f"memory for batches of {batch_size}, crops on the {crop.upper()}"
        screen.print(pairs_table(title, {cause: size_in_words(size) for cause, size in sizes.items()}))
    if subset is not None:
        screen.print(beton.subset_table(file, subset))
    if sheet is not None:
        _print(f"{sheet} shows {beton.draw_sheet(file, sheet)} samples.")
    if verify:
        verification = beton.verify(file, workers)
        for line in verification.lines():
            _print(line)
        _print(verification.verdict())
