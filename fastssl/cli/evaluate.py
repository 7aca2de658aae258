"""`fastssl eval`: measure trained runs."""

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal, NamedTuple, TypeVar

from typer import Argument, Option, Typer

from fastssl.cli.help import WEIGHTS_PANEL, Command, Group
from fastssl.common.errors import UserError

if TYPE_CHECKING:
    from rich.console import RenderableType

    from fastssl.evaluation import EvaluationData, EvaluationResult, RunEncoder, SummaryRow

TEMPERATURES = [0.07, 0.1]

Result = TypeVar("Result", bound="EvaluationResult")

app = Typer(cls=Group, help="Evaluate trained runs: accuracy, OOD detection, uncertainty.", no_args_is_help=True)

# Options that several commands share.
Runs = Annotated[
    list[Path] | None,
    Argument(
        metavar="RUN",
        help="Run directories, checkpoints, or a sweep's folder. Of several, mean and standard deviation are shown.",
    ),
]
TrainData = Annotated[
    Path | None,
    Option("--train", metavar="FILE.beton", help="Images to fit on.", show_default="data.train of the run"),
]
ValData = Annotated[
    Path | None,
    Option("--val", metavar="FILE.beton", help="Images to test on.", show_default="data.val of the run"),
]
Untrained = Annotated[bool, Option("--untrained", help="Evaluate the weights that the run started from.")]
VIEW = "Evaluation transform: resize to a square, or crop the center."
View = Annotated[Literal["squash", "center"] | None, Option(help=VIEW, show_default="views.eval of the run")]
FinetuneView = Annotated[
    Literal["squash", "center"] | None, Option(help=VIEW, show_default="center above 64 px, as published")
]
Draws = Annotated[
    int | None,
    Option(
        min=0, metavar="N", help="Of a stochastic h: draws to average; 0: use mu.",
        show_default="0, or embedding.samples with --protocol reference",
    ),
]  # fmt: skip
DType = Annotated[Literal["float32", "float16"], Option(help="Data type of the cached features.")]
Protocol = Annotated[
    Literal["sweep", "reference", "lbfgs"],
    Option(
        help="Linear classifier. sweep: SGD, learning rate and weight decay chosen on training images; lbfgs: logistic "
        "regression; reference: as published."
    ),
]
Device = Annotated[Literal["auto", "cpu", "cuda"], Option(help="auto: a GPU if there is one.")]
Seed = Annotated[int, Option(min=0, metavar="N", help="Seed of every random choice of the evaluation.")]
Settings = Annotated[
    list[str] | None,
    Option(
        "--set", metavar="KEY=VALUE", help="Recipe key of the fine-tuning, such as train.epochs=10. May be repeated."
    ),
]
Out = Annotated[
    Path | None, Option(metavar="FILE.json", help="Write mean and standard deviation over the runs to this file.")
]
Weights = Annotated[
    Path | None, Option(metavar="FILE", help="A file of weights; needs --backbone.", rich_help_panel=WEIGHTS_PANEL)
]
Backbone = Annotated[
    str | None,
    Option(metavar="NAME", help="timm's name, such as vit_small_patch16_224.", rich_help_panel=WEIGHTS_PANEL),
]
Stem = Annotated[
    Literal["imagenet", "small"] | None,
    Option(help="small: 3x3 convolution and no max-pool.", show_default="imagenet", rich_help_panel=WEIGHTS_PANEL),
]
Size = Annotated[
    int | None,
    Option(
        min=8, metavar="PX", help="Side of the images.", show_default="the backbone's", rich_help_panel=WEIGHTS_PANEL
    ),
]
OutDir = Annotated[
    Path | None,
    Option(
        metavar="DIR", help="Folder of the results.", show_default="NAME_eval, next to the file",
        rich_help_panel=WEIGHTS_PANEL,
    ),
]  # fmt: skip


@app.command(cls=Command)
def knn(
    runs: Runs = None,
    train: TrainData = None,
    val: ValData = None,
    k: Annotated[
        list[int] | None,
        Option(
            metavar="N",
            help="Number of neighbors. May be repeated.",
            show_default="20 and 200, or as many as there are images",
        ),
    ] = None,
    temperature: Annotated[
        list[float], Option(min=1e-6, metavar="T", help="Temperature of the votes. May be repeated.")
    ] = TEMPERATURES,
    draws: Annotated[int, Option(min=0, metavar="N", help="Of a stochastic h: draws to average; 0: use mu.")] = 0,
    untrained: Untrained = False,
    view: View = None,
    dtype: DType = "float32",
    weights: Weights = None,
    backbone: Backbone = None,
    stem: Stem = None,
    size: Size = None,
    out_dir: OutDir = None,
    device: Device = "auto",
    out: Out = None,
) -> None:
    """Accuracy of a weighted k-nearest-neighbor classifier on frozen features.

    Examples:
      fastssl eval knn runs/demo
      fastssl eval knn runs/seed0 runs/seed1 runs/seed2 --k 20 --k 200
      fastssl eval knn --weights resnet50.pth --backbone resnet50 \\
          --train data/photos --val data/photos
    """
    from fastssl.evaluation import evaluate_knn

    source = Source(runs, untrained, weights, backbone, stem, size, out_dir)
    evaluate = partial(evaluate_knn, ks=k or None, temperatures=temperature, draws=draws, dtype=dtype)
    _evaluate(evaluate, source, view, device, train, val, out)


@app.command(cls=Command)
def linear(
    runs: Runs = None,
    protocol: Protocol = "sweep",
    schedule: Annotated[
        Literal["imagenet", "sun397", "flowers102"],
        Option(metavar="NAME", help="Of --protocol reference: imagenet, sun397 or flowers102."),
    ] = "imagenet",
    train: TrainData = None,
    val: ValData = None,
    draws: Draws = None,
    untrained: Untrained = False,
    view: View = None,
    dtype: DType = "float32",
    weights: Weights = None,
    backbone: Backbone = None,
    stem: Stem = None,
    size: Size = None,
    out_dir: OutDir = None,
    device: Device = "auto",
    seed: Seed = 0,
    out: Out = None,
) -> None:
    """Accuracy of a linear classifier on frozen features.

    Examples:
      fastssl eval linear runs/demo
      fastssl eval linear runs/demo --protocol reference
    """
    from fastssl.evaluation import evaluate_linear

    source = Source(runs, untrained, weights, backbone, stem, size, out_dir)
    evaluate = partial(evaluate_linear, protocol=protocol, schedule=schedule, draws=draws, dtype=dtype, seed=seed)
    _evaluate(evaluate, source, view, device, train, val, out)


@app.command(cls=Command)
def semisup(
    runs: Runs = None,
    percent: Annotated[
        float, Option(min=0.01, max=100, metavar="N", help="Percentage of the labels of each class to use.")
    ] = 1.0,
    list_: Annotated[
        Path | None,
        Option(
            "--list", metavar="FILE.txt", help="Use the images in this list, a name per line, in place of --percent."
        ),
    ] = None,
    train: TrainData = None,
    val: ValData = None,
    untrained: Untrained = False,
    view: FinetuneView = None,
    weights: Weights = None,
    backbone: Backbone = None,
    stem: Stem = None,
    size: Size = None,
    out_dir: OutDir = None,
    device: Device = "auto",
    seed: Seed = 0,
    set_: Settings = None,
    out: Out = None,
) -> None:
    """Accuracy of the whole encoder, fine-tuned on few labels.

    Examples:
      fastssl eval semisup runs/demo --percent 10
      fastssl eval semisup runs/demo --percent 10 --set train.epochs=10
    """
    from fastssl.evaluation import evaluate_semisup

    source = Source(runs, untrained, weights, backbone, stem, size, out_dir)
    evaluate = partial(evaluate_semisup, percent=percent, list_file=list_, seed=seed, view=view, overrides=set_ or [])
    # `view` is the transform of the fine-tuning, so the encoder keeps the run's.
    _evaluate(evaluate, source, None, device, train, val, out, train_list=list_)


@app.command(cls=Command)
def transfer(
    to: Annotated[
        list[str],
        Option(metavar="NAME=PATH", help="A data set: a folder of build-beton, or a .beton file. May be repeated."),
    ],
    runs: Runs = None,
    method: Annotated[
        Literal["linear", "finetune", "both"], Option(help="Train a linear classifier, or the whole encoder.")
    ] = "linear",
    protocol: Protocol = "sweep",
    draws: Draws = None,
    untrained: Untrained = False,
    view: Annotated[
        Literal["squash", "center"] | None,
        Option(help=VIEW, show_default="views.eval of the run; fine-tuning: center above 64 px"),
    ] = None,
    dtype: DType = "float32",
    weights: Weights = None,
    backbone: Backbone = None,
    stem: Stem = None,
    size: Size = None,
    out_dir: OutDir = None,
    device: Device = "auto",
    seed: Seed = 0,
    set_: Settings = None,
    out: Out = None,
) -> None:
    """Accuracy on other data sets, of a linear classifier or after fine-tuning.

    Examples:
      fastssl eval transfer runs/demo --to cifar10=data/cifar10
      fastssl eval transfer runs/demo --method both \\
          --to dtd=data/dtd --to flowers102=data/flowers102
    """
    from fastssl.evaluation import evaluate_transfer, find_target

    targets = [find_target(*_name_and_path(text)) for text in to]
    if len({target.name for target in targets}) < len(targets):
        raise UserError("--to gives one name to two data sets", hint="name them differently")
    if set_ and method == "linear":
        raise UserError("--set is for fine-tuning", hint="add --method finetune or both, or leave out --set")
    methods: list[Literal["linear", "finetune"]] = ["linear", "finetune"] if method == "both" else [method]
    source = Source(runs, untrained, weights, backbone, stem, size, out_dir)
    results = [
        evaluate_transfer(
            encoder, target, each, protocol=protocol, draws=draws, dtype=dtype, seed=seed, view=view,
            overrides=set_ or [],
        )
        for encoder in _encoders(source, view, device, targets[0].train, targets[0].test)
        for target in targets
        for each in methods
    ]  # fmt: skip
    _show(results, out)


@app.command(cls=Command)
def ood(
    runs: Runs = None,
    near: Annotated[
        list[Path] | None,
        Option(metavar="FILE.beton", help="Images near the training images, such as other classes. May be repeated."),
    ] = None,
    far: Annotated[
        list[Path] | None,
        Option(metavar="FILE.beton", help="Images far from them, such as other kinds of images. May be repeated."),
    ] = None,
    suite: Annotated[
        Literal["cifar10", "cifar100", "imagenet"] | None,
        Option(
            metavar="NAME",
            help="The data sets of OpenOOD v1.5 in place of --near and --far: cifar10, cifar100 or imagenet.",
        ),
    ] = None,
    root: Annotated[Path, Option(metavar="DIR", help="Of --suite: the folder with cifar100/, svhn/ and so on.")] = Path(
        "data"
    ),
    id_: Annotated[
        Path | None,
        Option("--id", metavar="FILE.beton", help="In-distribution images.", show_default="data.val of the run"),
    ] = None,
    fit: Annotated[
        Path | None,
        Option(metavar="FILE.beton", help="Images to fit the detectors on.", show_default="data.train of the run"),
    ] = None,
    jepa_images: Annotated[
        int,
        Option(min=0, metavar="N", help="Also compute JEPA-SCORE, which is slow, of N images of each set (0: none)."),
    ] = 0,
    jepa_exact: Annotated[
        bool,
        Option("--jepa-exact", help="JEPA-SCORE of all directions of the embedding in place of 64 random ones."),
    ] = False,
    untrained: Untrained = False,
    view: View = None,
    weights: Weights = None,
    backbone: Backbone = None,
    stem: Stem = None,
    size: Size = None,
    out_dir: OutDir = None,
    device: Device = "auto",
    seed: Seed = 0,
    out: Out = None,
) -> None:
    """Out-of-distribution detection: AUROC of every detector, with and without labels.

    Examples:
      fastssl eval ood runs/demo --near data/mnist5k/ood.beton \\
          --far data/mnist5k/photos.beton --far data/mnist5k/noise.beton
      fastssl eval ood runs/cifar10_zprob_barlow --suite cifar10 --root data
    """
    from fastssl.common.terminal import console, print_line
    from fastssl.evaluation.ood import evaluate_ood, find_sets, ood_summary_table, ood_table, save_ood_table

    if suite and (near or far):
        raise UserError("--suite names its own sets", hint="leave out --near and --far, or leave out --suite")
    if jepa_exact and not jepa_images:
        raise UserError("--jepa-exact alone computes nothing", hint="add --jepa-images N")
    source = Source(runs, untrained, weights, backbone, stem, size, out_dir)
    if weights and not (fit and id_):
        raise UserError(
            "--weights has no data of its own", hint="name images with --fit FILE.beton and --id FILE.beton"
        )
    results = []
    for encoder in _encoders(source, view, device, fit, id_):
        sets = find_sets(encoder, near=near or [], far=far or [], suite=suite, root=root, fit=fit, id=id_)
        results.append(evaluate_ood(encoder, sets, seed=seed, jepa_images=jepa_images, jepa_exact=jepa_exact))
        path = save_ood_table(encoder.run_dir, results[-1])
    _show(results, out, ood_table, ood_summary_table)
    if len(results) == 1:
        print_line(console(), f"{path} holds the table with all columns.")


@app.command(cls=Command)
def uncertainty(
    runs: Runs = None,
    train: TrainData = None,
    val: ValData = None,
    untrained: Untrained = False,
    view: View = None,
    dtype: DType = "float32",
    weights: Weights = None,
    backbone: Backbone = None,
    stem: Stem = None,
    size: Size = None,
    out_dir: OutDir = None,
    device: Device = "auto",
    seed: Seed = 0,
    out: Out = None,
) -> None:
    """Test whether sigma predicts errors of a classifier, and corruptions of the images.

    Examples:
      fastssl eval uncertainty runs/demo
      fastssl eval uncertainty runs/seed0 runs/seed1 runs/seed2 --out sigma.json
    """
    from fastssl.evaluation import evaluate_uncertainty

    source = Source(runs, untrained, weights, backbone, stem, size, out_dir)
    evaluate = partial(evaluate_uncertainty, dtype=dtype, seed=seed)
    _evaluate(evaluate, source, view, device, train, val, out)


@app.command(cls=Command)
def mi(
    runs: Runs = None,
    data: Annotated[
        Path | None,
        Option(metavar="FILE.beton", help="Images to measure on.", show_default="data.val of the run"),
    ] = None,
    untrained: Untrained = False,
    view: View = None,
    weights: Weights = None,
    backbone: Backbone = None,
    stem: Stem = None,
    size: Size = None,
    out_dir: OutDir = None,
    device: Device = "auto",
    seed: Seed = 0,
    verbose: Annotated[bool, Option("--verbose", help="Show every self-check of the estimates.")] = False,
    out: Out = None,
) -> None:
    """Mutual information between image, h, z and the z of two views, in nats.

    Examples:
      fastssl eval mi runs/demo
      fastssl eval mi runs/demo --untrained
    """
    from fastssl.beton import beton_file
    from fastssl.evaluation.mutual_information import evaluate_mi, mi_summary_table, mi_table

    source = Source(runs, untrained, weights, backbone, stem, size, out_dir)
    if weights and not data:
        raise UserError("--weights has no data of its own", hint="name images with --data FILE.beton")
    file = beton_file(data, "val") if data else None
    results = [evaluate_mi(encoder, file, seed=seed) for encoder in _encoders(source, view, device, file, file)]
    _show(results, out, partial(mi_table, verbose=verbose), mi_summary_table)


class Source(NamedTuple):
    """Where encoders come from: runs, or one file of weights."""

    runs: list[Path] | None
    untrained: bool
    weights: Path | None
    backbone: str | None
    stem: Literal["imagenet", "small"] | None
    size: int | None
    out_dir: Path | None


def _encoders(source: Source, view: View, device: str, train: Path | None, val: Path | None) -> "Iterator[RunEncoder]":
    """Load the encoders one after the other, so that only one is in memory.

    train, val: of the images, for weights, which have no recipe that names them.
    """
    from fastssl.common.terminal import console, print_line
    from fastssl.evaluation import load_foreign_encoder, load_run_encoder

    if source.weights is None:
        if not source.runs:
            raise UserError(
                "There is no run to evaluate", hint="name a run directory, or a file with --weights and its --backbone"
            )
        for option in ("backbone", "stem", "size", "out_dir"):
            if getattr(source, option) is not None:
                name = f"--{option.replace('_', '-')}"
                raise UserError(f"{name} is for --weights", hint=f"leave out {name}")
        for run in _runs_of(source.runs):
            yield load_run_encoder(run, untrained=source.untrained, view=view, device=device)
        return
    if source.runs or source.untrained:
        other = "a run" if source.runs else "--untrained"
        raise UserError("--weights takes the place of runs", hint=f"leave out {other}, or --weights")
    if source.backbone is None:
        raise UserError("--weights needs the name of its architecture", hint="add --backbone NAME, such as resnet50")
    assert train is not None
    encoder, remarks = load_foreign_encoder(
        source.weights, source.backbone, train=train, val=val, stem=source.stem or "imagenet", size=source.size,
        view=view, device=device, out_dir=source.out_dir,
    )  # fmt: skip
    for remark in remarks:
        print_line(console(), remark)
    yield encoder


def _runs_of(given: list[Path]) -> list[Path]:
    """Return the runs that were named, and the finished ones in folders such as a sweep's. Says which are left out."""
    from fastssl.common.files import expand_user
    from fastssl.common.terminal import console, print_line
    from fastssl.models.checkpoint import is_run_dir, runs_below

    runs = []
    for path in map(expand_user, given):
        below = [] if is_run_dir(path) else runs_below(path)
        finished = [run for run in below if (run / "encoder.safetensors").exists()]
        for run in below:
            if run not in finished:
                print_line(console(stderr=True), f"Note: {run} is not finished, and is left out.")
        if below and not finished:
            raise UserError(f"No run in {path} is finished", hint="name the run directories to evaluate")
        runs += finished or [path]
    return runs


def _evaluate(
    evaluate: "Callable[[RunEncoder, EvaluationData], EvaluationResult]",
    source: Source,
    view: View,
    device: str,
    train: Path | None,
    val: Path | None,
    out: Path | None,
    *,
    train_list: Path | None = None,
) -> None:
    """Evaluate every encoder on its training and validation data, and show the results."""
    from fastssl.evaluation import find_evaluation_data

    if source.weights and not (train and val):
        raise UserError(
            "--weights has no data of its own", hint="name images with --train FILE.beton and --val FILE.beton"
        )
    encoders = _encoders(source, view, device, train, val)
    _show([evaluate(encoder, find_evaluation_data(encoder, train, val, train_list)) for encoder in encoders], out)


def _name_and_path(text: str) -> tuple[str, Path]:
    name, equals, path = text.partition("=")
    if not (equals and name.replace("-", "").replace("_", "").isalnum() and path):
        raise UserError(f"--to {text} is not NAME=PATH", hint="write it like flowers102=data/flowers102")
    return name, Path(path)


def _show(
    results: "Sequence[Result]",
    out: Path | None,
    table_of_one: "Callable[[Result], RenderableType] | None" = None,
    table_of_several: "Callable[[list[SummaryRow]], RenderableType] | None" = None,
) -> None:
    """Print one result with its intervals, or several in one table with mean and standard deviation over seeds."""
    from fastssl.common.terminal import console, print_line
    from fastssl.evaluation import result_table, summarize_runs, summary_table, write_summary

    if len(results) == 1:
        console().print((table_of_one or result_table)(results[0]))
    else:
        console().print((table_of_several or summary_table)(summarize_runs(results)))
    if out:
        write_summary(out, summarize_runs(results))
        print_line(console(), f"{out} holds these results.")
