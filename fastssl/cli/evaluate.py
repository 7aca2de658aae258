"""`fastssl eval`: measure trained runs."""

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal, NamedTuple, TypeVar

from typer import Argument, Option, Typer

from fastssl.common.errors import UserError

if TYPE_CHECKING:
    from rich.console import RenderableType

    from fastssl.evaluation import EvaluationData, EvaluationResult, RunEncoder, SummaryRow

TEMPERATURES = [0.07, 0.1]

Result = TypeVar("Result", bound="EvaluationResult")

app = Typer(help="Measure a trained run.", no_args_is_help=True)

# Options that several commands share.
Runs = Annotated[
    list[Path] | None, Argument(help="run directories or checkpoints in them; of several, mean and sd are shown")
]
TrainData = Annotated[Path | None, Option("--train", help=".beton to fit on (default: the run's data.train)")]
ValData = Annotated[Path | None, Option("--val", help=".beton to test on (default: the run's data.val)")]
Weights = Annotated[Path | None, Option(help="in place of runs: a file of weights, of a --backbone")]
Backbone = Annotated[str | None, Option(help="of --weights: timm's name, such as vit_small_patch16_224")]
Stem = Annotated[Literal["imagenet", "small"] | None, Option(help="of --weights (default: imagenet)")]
Size = Annotated[int | None, Option(min=8, help="of images for --weights, in px (default: the backbone's)")]
OutDir = Annotated[Path | None, Option(help="for results of --weights (default: NAME_eval, next to the file)")]
Untrained = Annotated[bool, Option("--untrained", help="use the run's initial weights")]
View = Annotated[Literal["squash", "center"] | None, Option(help="transform (default: the run's views.eval)")]
Draws = Annotated[int | None, Option(min=0, help="stochastic h: draws to average (0: use mu; default: as published)")]
DType = Annotated[Literal["float32", "float16"], Option(help="data type of the cached features")]
Protocol = Annotated[Literal["sweep", "reference", "lbfgs"], Option(help="linear classifier (reference: as published)")]
Device = Annotated[Literal["auto", "cpu", "cuda"], Option(help="auto: a GPU if there is one")]
Seed = Annotated[int, Option(min=0, help="seed of every random choice of the evaluation")]
Settings = Annotated[list[str] | None, Option("--set", metavar="KEY=VALUE", help="fine-tuning recipe key; repeatable")]
Out = Annotated[Path | None, Option(help="JSON file for mean and standard deviation over the runs")]


@app.command()
def knn(
    runs: Runs = None,
    train: TrainData = None,
    val: ValData = None,
    k: Annotated[
        list[int] | None, Option(help="number of neighbors; repeatable (default: 20 and 200, or all images)")
    ] = None,
    temperature: Annotated[list[float], Option(min=1e-6, help="temperature of the votes; repeatable")] = TEMPERATURES,
    draws: Draws = 0,
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
    """Accuracy of a weighted k-nearest-neighbor classifier on frozen features."""
    from fastssl.evaluation import evaluate_knn

    source = Source(runs, untrained, weights, backbone, stem, size, out_dir)
    evaluate = partial(evaluate_knn, ks=k or None, temperatures=temperature, draws=draws or 0, dtype=dtype)
    _evaluate(evaluate, source, view, device, train, val, out)


@app.command()
def linear(
    runs: Runs = None,
    protocol: Protocol = "sweep",
    schedule: Annotated[
        Literal["imagenet", "sun397", "flowers102"], Option(help="schedule of --protocol reference")
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
    """Accuracy of a linear classifier on frozen features; hyperparameters are chosen on training images."""
    from fastssl.evaluation import evaluate_linear

    source = Source(runs, untrained, weights, backbone, stem, size, out_dir)
    evaluate = partial(evaluate_linear, protocol=protocol, schedule=schedule, draws=draws, dtype=dtype, seed=seed)
    _evaluate(evaluate, source, view, device, train, val, out)


@app.command()
def semisup(
    runs: Runs = None,
    percent: Annotated[float, Option(min=0.01, max=100, help="percentage of each class's labels to use")] = 1.0,
    list_: Annotated[Path | None, Option("--list", help="file of labeled images, a name per line, as SimCLR's")] = None,
    train: TrainData = None,
    val: ValData = None,
    untrained: Untrained = False,
    view: View = None,
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
    """Accuracy of the whole encoder, fine-tuned on few labels."""
    from fastssl.evaluation import evaluate_semisup

    source = Source(runs, untrained, weights, backbone, stem, size, out_dir)
    evaluate = partial(evaluate_semisup, percent=percent, list_file=list_, seed=seed, view=view, overrides=set_ or [])
    # `view` is the transform of the fine-tuning, so the encoder keeps the run's.
    _evaluate(evaluate, source, None, device, train, val, out, train_list=list_)


@app.command()
def transfer(
    to: Annotated[list[str], Option(metavar="NAME=PATH", help="a folder of build-beton, or a .beton file; repeatable")],
    runs: Runs = None,
    method: Annotated[
        Literal["linear", "finetune", "both"], Option(help="train a linear classifier, or the whole encoder")
    ] = "linear",
    protocol: Protocol = "sweep",
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
    set_: Settings = None,
    out: Out = None,
) -> None:
    """Accuracy on other data sets, in one table."""
    from fastssl.evaluation import evaluate_transfer, find_target

    targets = [find_target(*_name_and_path(text)) for text in to]
    if len({target.name for target in targets}) < len(targets):
        raise UserError("--to gives one name to two data sets: name them differently.")
    if set_ and method == "linear":
        raise UserError("--set is for fine-tuning: add --method finetune or both, or leave it out.")
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


@app.command()
def ood(
    runs: Runs = None,
    near: Annotated[list[Path] | None, Option(help=".beton of near out-of-distribution images; repeatable")] = None,
    far: Annotated[list[Path] | None, Option(help=".beton of far out-of-distribution images; repeatable")] = None,
    suite: Annotated[
        Literal["cifar10", "cifar100", "imagenet"] | None, Option(help="the data sets of OpenOOD v1.5, in --root")
    ] = None,
    root: Annotated[Path, Option(help="for --suite: the folder with cifar100/, svhn/ and so on")] = Path("data"),
    id_: Annotated[Path | None, Option("--id", help="in-distribution .beton (default: the run's data.val)")] = None,
    fit: Annotated[Path | None, Option(help=".beton to fit on (default: the run's data.train)")] = None,
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
    """Out-of-distribution detection: AUROC of every detector, with and without labels."""
    from fastssl.common.terminal import console
    from fastssl.evaluation.ood import evaluate_ood, find_sets, ood_summary_table, ood_table, save_ood_table

    if suite and (near or far):
        raise UserError("--suite names its own sets: leave out --near and --far, or leave out --suite.")
    source = Source(runs, untrained, weights, backbone, stem, size, out_dir)
    if weights and not (fit and id_):
        raise UserError("--weights has no data of its own: name images with --fit FILE.beton and --id FILE.beton.")
    results = []
    for encoder in _encoders(source, view, device, fit, id_):
        sets = find_sets(encoder, near=near or [], far=far or [], suite=suite, root=root, fit=fit, id=id_)
        results.append(evaluate_ood(encoder, sets, seed=seed))
        save_ood_table(encoder.run_dir, results[-1])
    _show(results, out, partial(ood_table, width=console().width), ood_summary_table)


@app.command()
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
    """Test whether sigma predicts errors of kNN and of a linear classifier, and corruptions of the images."""
    from fastssl.evaluation import evaluate_uncertainty

    source = Source(runs, untrained, weights, backbone, stem, size, out_dir)
    evaluate = partial(evaluate_uncertainty, dtype=dtype, seed=seed)
    _evaluate(evaluate, source, view, device, train, val, out)


@app.command()
def mi(
    runs: Runs = None,
    data: Annotated[Path | None, Option(help=".beton to measure on (default: the run's data.val)")] = None,
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
    """Mutual information of image, h, z and the z of two views, in nats (docs/mutual_information.md)."""
    from fastssl.beton import beton_file
    from fastssl.evaluation.mutual_information import evaluate_mi, mi_summary_table, mi_table

    source = Source(runs, untrained, weights, backbone, stem, size, out_dir)
    if weights and not data:
        raise UserError("--weights has no data of its own: name images with --data FILE.beton.")
    file = beton_file(data, "val") if data else None
    results = [evaluate_mi(encoder, file, seed=seed) for encoder in _encoders(source, view, device, file, file)]
    _show(results, out, mi_table, mi_summary_table)


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
            raise UserError("Name a run directory, or a file with --weights and its --backbone.")
        for option in ("backbone", "stem", "size", "out_dir"):
            if getattr(source, option) is not None:
                raise UserError(f"--{option.replace('_', '-')} is for --weights: leave it out.")
        for run in source.runs:
            yield load_run_encoder(run, untrained=source.untrained, view=view, device=device)
        return
    if source.runs or source.untrained:
        given = "a run" if source.runs else "--untrained"
        raise UserError(f"--weights takes the place of runs: leave out {given}, or --weights.")
    if source.backbone is None:
        raise UserError("--weights needs the name of its architecture: add --backbone NAME, such as resnet50.")
    assert train is not None
    encoder, remarks = load_foreign_encoder(
        source.weights, source.backbone, train=train, val=val, stem=source.stem or "imagenet", size=source.size,
        view=view, device=device, out_dir=source.out_dir,
    )  # fmt: skip
    for remark in remarks:
        print_line(console(), remark)
    yield encoder


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
        raise UserError("--weights has no data of its own: name images with --train FILE.beton and --val FILE.beton.")
    encoders = _encoders(source, view, device, train, val)
    _show([evaluate(encoder, find_evaluation_data(encoder, train, val, train_list)) for encoder in encoders], out)


def _name_and_path(text: str) -> tuple[str, Path]:
    name, equals, path = text.partition("=")
    if not (equals and name.replace("-", "").replace("_", "").isalnum() and path):
        raise UserError(f"--to {text} is not NAME=PATH, such as flowers102=data/flowers102.")
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
