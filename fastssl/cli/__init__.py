"""The commands. Each one parses, calls one function and prints; imports wait until a command needs them."""

import os
import shutil
import sys
from functools import partial
from itertools import product
from pathlib import Path
from typing import Annotated, Literal, NoReturn

import typer

from fastssl.common.errors import UserError
from fastssl.recipe import find_recipe, load_recipe, shipped_recipes

app = typer.Typer(
    help="Self-supervised encoders with calibrated uncertainty, trained through FFCV.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
evaluation = typer.Typer(help="Measure a trained run.", no_args_is_help=True)
recipes = typer.Typer(help="The recipes that come with fastssl.", no_args_is_help=True)
app.add_typer(evaluation, name="eval")
app.add_typer(recipes, name="recipes")


def main() -> NoReturn:
    """Run a command. What the user can mend ends in one sentence and exit code 2 (--debug: a traceback)."""
    debug = "--debug" in sys.argv
    sys.argv = [argument for argument in sys.argv if argument != "--debug"]
    try:
        app(prog_name="fastssl")
    except UserError as error:
        if debug:
            raise
        rank = f" process {os.environ.get('RANK')}" if os.environ.get("WORLD_SIZE", "1") != "1" else ""
        print(f"fastssl{rank}: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("fastssl: interrupted.", file=sys.stderr)
        sys.exit(130)


@app.command()
def doctor() -> None:
    """Say what this machine has and lacks, with the line that mends each lack."""
    from fastssl import doctor

    sys.exit(doctor.main())


@app.command()
def build_beton(
    builder: Annotated[str | None, typer.Argument(help="imagefolder, imagenet, cifar10, ...: see --list")] = None,
    out: Annotated[Path | None, typer.Option(help="folder for train.beton, val.beton, ...")] = None,
    source: Annotated[Path | None, typer.Option(help="folder or archive of the images")] = None,
    canvas: Annotated[int | None, typer.Option(help="store squares of this side (default: the builder's)")] = None,
    max_side: Annotated[int | None, typer.Option(help="store whole images of at most this side")] = None,
    quality: Annotated[int, typer.Option(min=1, max=100, help="of JPEGs made here")] = 90,
    order: Annotated[Literal["shuffle", "source"], typer.Option(help="of the samples in the file")] = "shuffle",
    workers: Annotated[int | None, typer.Option(help="processes (default: all cores)")] = None,
    limit: Annotated[int | None, typer.Option(help="take this many images of each split")] = None,
    strict: Annotated[bool, typer.Option("--strict", help="stop at the first bad image")] = False,
    download: Annotated[bool, typer.Option("--download", help="fetch the data set into --source first")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="say what would be written and how long it takes")] = False,
    list_: Annotated[bool, typer.Option("--list", help="list the builders")] = False,
) -> None:
    """Convert images to FFCV's .beton files. A build that was stopped goes on with the same command."""
    from fastssl import beton

    if list_:
        for name, (about, downloads) in beton.describe_builders().items():
            print(f"{name:<14} {about}" + (" (--download)" if downloads else ""))
        return
    if builder is None or out is None:
        raise UserError("build-beton needs a builder and --out; `fastssl build-beton --list` shows the builders.")
    options = dict(
        canvas=canvas, max_side=max_side, quality=quality, order=order, workers=workers, limit=limit
    )  # fmt: skip
    if dry_run:
        _print_forecast(beton.estimate_build(builder, source, out, **options))
        return
    reports = beton.build_beton(builder, source, out, **options, strict=strict, download=download)
    for report in reports:
        print(
            f"{report.path} holds {report.samples:,} images of {report.classes} classes, {report.bytes / 1e6:,.1f} MB"
            + (f", {report.bad} bad images skipped" if report.bad else "")
            + (" (kept: it was built from the same images with the same options)" if report.kept else "")
        )
    if any(report.bad for report in reports):
        print(f"The bad images are listed in {out / 'bad_images.jsonl'}.")


def _print_forecast(forecast) -> None:
    for split in forecast.splits:
        print(
            f"{split.path} would hold about {split.images:,} images of {split.classes} classes, "
            f"{split.bytes / 1e6:,.1f} MB, in {split.seconds / 60:,.1f} minutes"
            + (f"; {split.bad:.1%} of the images sampled are bad" if split.bad else "")
        )
    total = sum(split.bytes for split in forecast.splits)
    for fit, place, free in (("fit on", "disk", forecast.free_disk), ("fit into", "page cache", forecast.free_memory)):
        verdict = fit if total < free else f"DO NOT {fit}"
        print(f"All {total / 1e9:,.2f} GB {verdict} the {place}: {free / 1e9:,.1f} GB free.")


@app.command()
def inspect(
    file: Annotated[Path, typer.Argument(help="a .beton")],
    verify: Annotated[bool, typer.Option("--verify", help="decode every image, compare it with its checksum")] = False,
    sheet: Annotated[Path | None, typer.Option(help="PNG to draw random samples into")] = None,
    subset: Annotated[Path | None, typer.Option(help="list of image names or indices, one a line: count them")] = None,
    batch_size: Annotated[int | None, typer.Option(min=1, help="show the memory that such batches take")] = None,
    workers: Annotated[int | None, typer.Option(help="processes for --verify (default: all cores)")] = None,
) -> None:
    """Show what is in a .beton file, and whether all of it is sound."""
    from rich.console import Console

    from fastssl import beton

    console = Console()
    console.print(beton.summary_tables(beton.inspect_beton(file)))
    if batch_size is not None:
        from fastssl.loading import BetonLoader, estimate_memory
        from fastssl.recipe import ViewsConfig

        crop = "cpu" if beton.read_header(file).resolution is None else "gpu"
        bill = estimate_memory(BetonLoader(file, batch_size, crop=crop, views=ViewsConfig(), drop_last=False))
        title = f"memory for batches of {batch_size}, crops on the {crop.upper()}"
        console.print(beton.pairs_table(title, {cause: f"{size / 1e6:,.1f} MB" for cause, size in bill.items()}))
    if subset is not None:
        console.print(beton.subset_table(file, subset))
    if sheet is not None:
        print(f"{sheet} shows {beton.draw_sheet(file, sheet)} samples.")
    if verify:
        verification = beton.verify(file, workers)
        for line in verification.lines():
            print(line)
        print(verification.verdict())


@app.command()
def train(
    recipe: Annotated[str, typer.Argument(help="a YAML file; recipes/x.yaml also means the shipped one")],
    overrides: Annotated[list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", help="train.epochs=1 ...")] = None,
    resume: Annotated[str | None, typer.Option(help="run to continue; auto: the recipe's own, if there is one")] = None,
) -> None:
    """Train a recipe; on many GPUs: torchrun --nproc-per-node 8 -m fastssl train RECIPE."""
    settings = load_recipe(recipe, overrides or [])
    from fastssl.evaluation.probe import probe_of
    from fastssl.profiling.bottleneck import explain_data_wait
    from fastssl.training import train

    resume = Path(resume) if resume not in (None, "auto") else resume
    train(settings, resume=resume, probe=probe_of(settings), diagnose=explain_data_wait)


@app.command()
def profile(
    recipe: Annotated[str | None, typer.Argument(help="a YAML file; recipes/x.yaml also means the shipped one")] = None,
    overrides: Annotated[list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", help="train.epochs=1 ...")] = None,
    json: Annotated[
        Path | None, typer.Option(help="file to write, pictures and trace beside it (default: profiles/NAME.json)")
    ] = None,
    plan: Annotated[
        str | None, typer.Option(metavar='"8xA100, 64 cores, nvme"', help="predict hours and limit of that machine")
    ] = None,
    fail_under: Annotated[
        list[str] | None, typer.Option(metavar="KEY=VALUE", help="exit 1 below, e.g. accelerator_utilisation=0.9")
    ] = None,
    compare: Annotated[
        tuple[Path, Path] | None, typer.Option(metavar="A.json B.json", help="what changed between two profiles")
    ] = None,
) -> None:
    """Say what limits a run, by how much, and what to change; trains for a minute and keeps nothing of it."""
    from fastssl import profiling

    if compare:
        if recipe or json or plan is not None or fail_under:
            raise UserError("--compare reads two profiles and measures nothing: leave out recipe and other options.")
        a, b = map(profiling.read_profile, compare)
        _console().print(profiling.compare_table(str(compare[0]), str(compare[1]), a, b))
        return
    if recipe is None:
        raise UserError("profile needs a recipe, or --compare A.json B.json.")
    settings = load_recipe(recipe, overrides or [])
    path = json or profiling.default_path(settings, find_recipe(Path(recipe)))
    # What is wrong with the options is said before the minute.
    profiling.parse_thresholds(fail_under or [])
    machine = None if plan is None else profiling.parse_machine(plan)
    if machine:
        profiling.check_batch_size(machine, settings.train.batch_size, settings.train.accumulate)
    measured = profiling.profile_recipe(settings, overrides or [], profiling.trace_path(path))
    if measured is None:  # another process shows it
        return
    console = _console()
    console.print(profiling.profile_table(measured, console.width))
    profiling.write_files(path, measured)
    print(f"{path} holds these figures; {path.with_suffix('.html')} shows them; open {measured['trace']} beside it")
    print("in https://ui.perfetto.dev.")
    if machine:
        console.print(profiling.plan_table(profiling.plan_training(measured, machine)))
    if below := profiling.failed_thresholds(measured, fail_under or []):
        for line in below:
            print(f"fastssl: {line}", file=sys.stderr)
        sys.exit(1)


@app.command()
def sweep(
    file: Annotated[str, typer.Argument(help="a YAML file; recipes/sweeps/x.yaml also means the shipped one")],
    overrides: Annotated[list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", help="for every run")] = None,
    executor: Annotated[Literal["local", "slurm"], typer.Option(help="this machine, or a SLURM cluster")] = "local",
    per_gpu: Annotated[int, typer.Option(min=1, help="runs at a time on each GPU; without one, on the CPU")] = 1,
    retries: Annotated[int, typer.Option(min=0, help="how often a run that crashed is continued")] = 2,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="show runs and predicted hours")] = False,
    images_per_second: Annotated[float | None, typer.Option(min=0.1, help="of one run, for --dry-run")] = None,
    parallel: Annotated[int, typer.Option(min=1, help="SLURM: jobs at a time, each with one GPU")] = 8,
    cpus: Annotated[int, typer.Option(min=1, help="SLURM: cores of a job")] = 8,
    time_limit: Annotated[str, typer.Option(help="SLURM: of a job, then requeued; minutes or HH:MM")] = "24:00",
    partition: Annotated[str | None, typer.Option(help="SLURM: where to run (default: the cluster's)")] = None,
) -> None:
    """Train every run of a sweep. Finished runs are skipped, so the same command goes on after any stop."""
    from fastssl import sweep

    minutes = sweep.in_minutes(time_limit)
    chosen = sweep.load_sweep(file)
    runs = sweep.expand(chosen, overrides or [])
    if dry_run:
        jobs = parallel if executor == "slurm" else None
        sweep.dry_run(chosen, runs, per_gpu=per_gpu, jobs=jobs, images_per_second=images_per_second)
    elif executor == "slurm":
        sys.exit(
            sweep.submit_to_slurm(
                chosen, runs, per_gpu=per_gpu, retries=retries, parallel=parallel, cpus=cpus, minutes=minutes,
                partition=partition,
            )
        )  # fmt: skip
    else:
        sys.exit(sweep.run_locally(chosen, runs, per_gpu=per_gpu, retries=retries))


Runs = Annotated[list[Path], typer.Argument(help="run directories or checkpoints in them; several: also mean and sd")]
TrainData = Annotated[Path | None, typer.Option("--train", help=".beton to fit on (default: the run's data.train)")]
ValData = Annotated[Path | None, typer.Option("--val", help=".beton to test on (default: the run's data.val)")]
Untrained = Annotated[bool, typer.Option("--untrained", help="the weights that the run began with")]
View = Annotated[
    Literal["squash", "center"] | None, typer.Option(help="what is seen of an image (default: views.eval)")
]
Draws = Annotated[
    int | None, typer.Option(min=0, help="stochastic h: average over so many draws (0: mu; default: as published)")
]
DType = Annotated[Literal["float32", "float16"], typer.Option(help="of the cached features")]
Device = Annotated[Literal["auto", "cpu", "cuda"], typer.Option(help="auto: a GPU where there is one")]
Seed = Annotated[int, typer.Option(min=0, help="of the classifier, its splits and the intervals")]
Out = Annotated[Path | None, typer.Option(help="write mean and standard deviation of several runs to this JSON")]
Settings = Annotated[
    list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="of the fine-tuning's recipe; may be repeated")
]


@evaluation.command()
def knn(
    runs: Runs,
    train: TrainData = None,
    val: ValData = None,
    k: Annotated[list[int], typer.Option(help="neighbours; may be repeated")] = (20, 200),
    temperature: Annotated[list[float], typer.Option(min=1e-6, help="of the votes; may be repeated")] = (0.07, 0.1),
    draws: Draws = 0,
    untrained: Untrained = False,
    view: View = None,
    dtype: DType = "float32",
    device: Device = "auto",
    out: Out = None,
) -> None:
    """Accuracy of the weighted nearest neighbours."""
    from fastssl.evaluation import evaluate_knn

    evaluate = partial(evaluate_knn, ks=k, temperatures=temperature, draws=draws, dtype=dtype)
    _evaluate(evaluate, runs, train, val, out, untrained=untrained, view=view, device=device)


@evaluation.command()
def linear(
    runs: Runs,
    protocol: Annotated[
        Literal["sweep", "reference", "lbfgs"], typer.Option(help="reference: the published one (docs/evaluation.md)")
    ] = "sweep",
    schedule: Annotated[
        Literal["imagenet", "sun397", "flowers102"], typer.Option(help="of --protocol reference")
    ] = "imagenet",
    train: TrainData = None,
    val: ValData = None,
    draws: Draws = None,
    untrained: Untrained = False,
    view: View = None,
    dtype: DType = "float32",
    device: Device = "auto",
    seed: Seed = 0,
    out: Out = None,
) -> None:
    """Accuracy of a linear classifier on frozen features; whatever is chosen is chosen on training images."""
    from fastssl.evaluation import evaluate_linear

    options = dict(protocol=protocol, schedule=schedule, draws=draws, dtype=dtype, seed=seed)
    evaluate = partial(evaluate_linear, **options)
    _evaluate(evaluate, runs, train, val, out, untrained=untrained, view=view, device=device)


@evaluation.command()
def semisup(
    runs: Runs,
    percent: Annotated[float, typer.Option(min=0.01, max=100, help="share of each class's labels")] = 1.0,
    list_: Annotated[
        Path | None, typer.Option("--list", help="the images with labels, one name a line, such as SimCLR's lists")
    ] = None,
    train: TrainData = None,
    val: ValData = None,
    untrained: Untrained = False,
    view: View = None,
    device: Device = "auto",
    seed: Seed = 0,
    set_: Settings = None,
    out: Out = None,
) -> None:
    """Accuracy of the whole encoder, fine-tuned on few labels."""
    from fastssl.evaluation import evaluate_semisup

    options = dict(percent=percent, list_file=list_, seed=seed, view=view, overrides=set_ or [])
    _evaluate(partial(evaluate_semisup, **options), runs, train, val, out, untrained=untrained, device=device)


@evaluation.command()
def transfer(
    runs: Runs,
    to: Annotated[
        list[str], typer.Option(metavar="NAME=PATH", help="a folder of build-beton, or a .beton; may be repeated")
    ],
    method: Annotated[
        Literal["linear", "finetune", "both"], typer.Option(help="a linear classifier, or all of the encoder")
    ] = "linear",
    protocol: Annotated[Literal["sweep", "reference", "lbfgs"], typer.Option(help="of method linear")] = "sweep",
    draws: Draws = None,
    untrained: Untrained = False,
    view: View = None,
    dtype: DType = "float32",
    device: Device = "auto",
    seed: Seed = 0,
    set_: Settings = None,
    out: Out = None,
) -> None:
    """Accuracy on other data sets, as one table."""
    from fastssl.evaluation import evaluate_transfer, find_encoder, find_target

    targets = [find_target(*_name_and_path(text)) for text in to]
    if len({target.name for target in targets}) < len(targets):
        raise UserError("--to gives one name to two data sets: name them differently.")
    if set_ and method == "linear":
        raise UserError("--set is for fine-tuning: add --method finetune or both, or leave it out.")
    options = dict(protocol=protocol, draws=draws, dtype=dtype, seed=seed, view=view, overrides=set_ or [])
    methods = ("linear", "finetune") if method == "both" else (method,)
    results = []
    for run in runs:
        encoder = find_encoder(run, untrained=untrained, view=view, device=device)
        results += [evaluate_transfer(encoder, *what, **options) for what in product(targets, methods)]
    _show(results, out)


@evaluation.command()
def ood(
    runs: Runs,
    near: Annotated[list[Path] | None, typer.Option(help=".beton of others that are alike; may be repeated")] = None,
    far: Annotated[list[Path] | None, typer.Option(help=".beton of others that are not; may be repeated")] = None,
    suite: Annotated[
        Literal["cifar10", "cifar100", "imagenet"] | None, typer.Option(help="OpenOOD v1.5's sets, in --root")
    ] = None,
    root: Annotated[Path, typer.Option(help="of a suite: the folder with cifar100/, svhn/ and so on")] = Path("data"),
    id_: Annotated[
        Path | None, typer.Option("--id", help=".beton of in-distribution images (default: the run's data.val)")
    ] = None,
    fit: Annotated[Path | None, typer.Option(help=".beton to fit on (default: the run's data.train)")] = None,
    untrained: Untrained = False,
    view: View = None,
    device: Device = "auto",
    seed: Seed = 0,
    out: Out = None,
) -> None:
    """Out-of-distribution detection: AUROC of every detector, with and without labels."""
    from fastssl.evaluation import find_encoder
    from fastssl.evaluation.ood import evaluate_ood, find_sets, ood_summary_table, ood_table

    if suite and (near or far):
        raise UserError("--suite names its own sets: leave out --near and --far, or leave out --suite.")
    results = []
    for run in runs:
        encoder = find_encoder(run, untrained=untrained, view=view, device=device)
        sets = find_sets(encoder, near=near or [], far=far or [], suite=suite, root=root, fit=fit, id=id_)
        results.append(evaluate_ood(encoder, sets, seed=seed))
    _show(results, out, partial(ood_table, width=_console().width), ood_summary_table)


@evaluation.command()
def uncertainty(
    runs: Runs,
    train: TrainData = None,
    val: ValData = None,
    untrained: Untrained = False,
    view: View = None,
    dtype: DType = "float32",
    device: Device = "auto",
    seed: Seed = 0,
    out: Out = None,
) -> None:
    """Whether sigma knows which images are hard: wrong neighbours, wrong guesses, worse and worse images."""
    from fastssl.evaluation import evaluate_uncertainty

    evaluate = partial(evaluate_uncertainty, dtype=dtype, seed=seed)
    _evaluate(evaluate, runs, train, val, out, untrained=untrained, view=view, device=device)


@evaluation.command()
def mi(
    runs: Runs,
    data: Annotated[Path | None, typer.Option(help=".beton to measure on (default: the run's data.val)")] = None,
    untrained: Untrained = False,
    view: View = None,
    device: Device = "auto",
    seed: Annotated[int, typer.Option(min=0, help="of folds, critics and noise")] = 0,
    out: Out = None,
) -> None:
    """Mutual information of image, h, z and the z of two views, in nats (docs/mutual_information.md)."""
    from fastssl.evaluation import find_encoder
    from fastssl.evaluation.mutual_information import evaluate_mi, mi_summary_table, mi_table

    encoders = (find_encoder(run, untrained=untrained, view=view, device=device) for run in runs)
    _show([evaluate_mi(encoder, data, seed=seed) for encoder in encoders], out, mi_table, mi_summary_table)


def _evaluate(evaluate, runs: list[Path], train: Path | None, val: Path | None, out: Path | None, **options) -> None:
    """evaluate(encoder, split) of one run after the other. options: which encoder, and where."""
    from fastssl.evaluation import find_encoder, find_split

    results = []
    for run in runs:
        encoder = find_encoder(run, **options)
        results.append(evaluate(encoder, find_split(encoder, train, val)))
    _show(results, out)


def _name_and_path(text: str) -> tuple[str, Path]:
    name, equals, path = text.partition("=")
    if not (equals and name.replace("-", "").replace("_", "").isalnum() and path):
        raise UserError(f"--to {text} is not NAME=PATH, such as flowers102=data/flowers102.")
    return name, Path(path)


def _console():
    from rich.console import Console

    return Console(width=None if sys.stdout.isatty() else 160, markup=False)  # paths may hold brackets


def _show(results: list[dict], out: Path | None, table_of_one=None, table_of_several=None) -> None:
    """One result with its intervals; several as one table, with mean and standard deviation over seeds."""
    from fastssl.evaluation import result_table, summarize, summary_table, write_summary

    table_of_one, table_of_several = table_of_one or result_table, table_of_several or summary_table
    _console().print(table_of_one(results[0]) if len(results) == 1 else table_of_several(summarize(results)))
    if out:
        write_summary(out, summarize(results))
        print(f"{out} holds these figures.")


@app.command()
def export(
    run: Annotated[Path, typer.Argument(help="run directory or checkpoint file")],
    format: Annotated[
        Literal["timm", "safetensors", "onnx"],
        typer.Option(help="timm: its create_model loads it; safetensors: fastssl does; onnx: any ONNX runtime"),
    ],
    out: Annotated[Path | None, typer.Option(help="file to write (default: RUN/export/FORMAT/NAME)")] = None,
    sigma: Annotated[bool, typer.Option("--sigma", help="with what gives mu and sigma (safetensors, onnx)")] = False,
) -> None:
    """Write the trained encoder as one file for others, with a model card."""
    from fastssl.export import export_run

    exported = export_run(run, format, out, sigma)
    print(f"{exported.path} holds {exported.path.stat().st_size / 1e6:,.1f} MB; {exported.card} describes it.")
    print(f"Load it with: {exported.load_with}")
    if exported.difference is not None:
        print(f"On random images, onnxruntime differs from torch by {exported.difference:.1e} at most.")
    elif format == "onnx":
        print("Not checked against torch, as onnxruntime is missing: pip install 'onnxruntime'.")


@recipes.command()
def ls() -> None:
    """List the shipped recipes."""
    for path in sorted(shipped_recipes().rglob("*.yaml")):
        first_line = path.read_text().split("\n")[0].removeprefix("# ")
        print(f"recipes/{path.relative_to(shipped_recipes())!s:<36} {first_line}")


@recipes.command()
def show(recipe: Annotated[str, typer.Argument(help="such as recipes/zprob_barlow.yaml")]) -> None:
    """Print a recipe."""
    print(find_recipe(Path(recipe)).read_text(), end="")


@recipes.command()
def copy(
    recipe: Annotated[str, typer.Argument(help="such as recipes/zprob_barlow.yaml")],
    to: Annotated[Path, typer.Argument(help="file to write; never overwritten")],
) -> None:
    """Copy a recipe, to change it."""
    if to.exists():
        raise UserError(f"{to} exists already: name another file.")
    shutil.copyfile(find_recipe(Path(recipe)), to)


@app.command()
def demo() -> None:
    """Train on 3,200 handwritten digits for some minutes and show what was learned."""
    from fastssl.demo import run_demo

    run_demo()
