"""`fastssl demo`: train on real images in minutes, from images on disk to accuracies, OOD scores and a figure."""

import time
from pathlib import Path
from typing import NamedTuple

import torch
from rich.console import Console
from rich.table import Table

from fastssl.beton import build_beton
from fastssl.common.errors import UserError
from fastssl.evaluation import BetonSubset, Features, compute_features, knn_accuracy, load_run_encoder
from fastssl.evaluation.ood import draw_ood_sheet, evaluate_ood, find_sets, ood_summary, save_ood_table
from fastssl.evaluation.splits import balanced_subsets
from fastssl.models import Embedding, SSLModel, load_model
from fastssl.recipe import load_recipe
from fastssl.training import train

DATA = Path("data/mnist5k")
LABELS_PER_CLASS = 10
DRAWS = 5  # of the labels; accuracies are means over them
MIN_GAIN = 0.02  # of linear accuracy over the untrained encoder
SET_NAMES = {
    "id": "digits 0 to 7, held out",
    "mnist5k-ood": "digits 8 and 9",
    "mnist5k-photos": "photographs",
    "mnist5k-noise": "noise",
}


def run_demo(seed: int = 0) -> None:
    """Build .beton files, train, evaluate, detect unseen images, and show the results as tables and one figure.

    Raises UserError if training did not help.
    """
    console = Console()
    start = time.monotonic()
    console.print("[bold]1. Images to .beton files[/]: 5,000 handwritten digits, photographs, noise")
    for report in build_beton("mnist5k", None, DATA).splits:
        console.print(f"   {report.path}: {report.samples:,} images")

    console.print("\n[bold]2. Training[/] without labels: VICReg, stochastic embeddings, digits 0 to 7")
    recipe = load_recipe("recipes/demo.yaml", overrides=[f"seed={seed}"])
    run_dir = train(recipe)

    console.print("\n[bold]3. Accuracy on held-out digits[/]")
    torch.manual_seed(recipe.seed)  # gives the weights that training started from
    encoders = {
        "raw pixels": RawPixels(),
        "untrained encoder": SSLModel(recipe).eval(),
        "trained encoder": load_model(run_dir),
    }
    accuracies = {}
    for name, encoder in encoders.items():
        train_set, val_set = (
            compute_features(encoder, BetonSubset(DATA / f"{split}.beton"), recipe.views) for split in ("train", "val")
        )
        accuracies[name] = few_label_accuracy(train_set, val_set)
    table = Table("", "kNN %", "linear %", caption=f"{LABELS_PER_CLASS} labels per class, mean of {DRAWS} draws")
    for name, accuracy in accuracies.items():
        table.add_row(name, f"{100 * accuracy.knn:.1f}", f"{100 * accuracy.linear:.1f}")
    console.print(table)
    gain = accuracies["trained encoder"].linear - accuracies["untrained encoder"].linear
    if gain < MIN_GAIN:
        raise UserError(
            f"The trained encoder is {100 * gain:.1f} points above the untrained one and should be "
            f"{100 * MIN_GAIN:.0f} or more: something is broken here",
            hint="run `fastssl doctor`",
        )

    console.print("\n[bold]4. Unseen images[/]: digits 8 and 9 (near), photographs and noise (far)")
    run_encoder = load_run_encoder(run_dir)
    sets = find_sets(run_encoder, near=[DATA / "ood.beton"], far=[DATA / "photos.beton", DATA / "noise.beton"])
    result = evaluate_ood(run_encoder, sets)
    console.print(ood_summary(result, console.width))
    whole_table = save_ood_table(run_dir, result)
    sheet = run_dir / "demo.png"
    draw_ood_sheet(sheet, run_encoder, sets, result, SET_NAMES)

    console.print(
        f"\n[bold]Done in {time.monotonic() - start:.0f} seconds.[/] Look at [bold]{sheet}[/] first.\n"
        f"   {sheet}  views, the most and the least certain digits, scores, a map\n"
        f"   {whole_table}  all detectors\n"
        f"   {run_dir}/encoder.safetensors  the encoder, a timm resnet18\n"
        f"   {DATA}/*.beton  the images, in FFCV's format\n"
        "This checks the installation and is no result: few images, few epochs, easy data.\n"
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


def few_label_accuracy(train_set: Features, val_set: Features) -> FewLabelAccuracy:
    """Test kNN and logistic regression that are fitted on a few labels.

    Nothing is chosen, as so few labels are too few to choose anything on: LogisticRegression with its default C = 1, as
    in few-shot work (Tian et al., arXiv 2003.11539), on features standardized over all training images, which takes no
    labels. (With 10 labels of each of 8 digits, C from 0.1 to 100 moves the accuracy by up to 2 points on standardized
    features, and by up to 14 on features of length 1.) The labels are the same for every encoder.
    """
    # Imported here as they take 1.3 s.
    from sklearn.linear_model import LogisticRegression
    from sklearn.preprocessing import StandardScaler

    scaler = StandardScaler().fit(train_set.h)
    train_ND, val_ND = scaler.transform(train_set.h), scaler.transform(val_set.h)
    knn, linear = [], []
    for rows in balanced_subsets(train_set.label, LABELS_PER_CLASS, DRAWS, seed=0):
        label_R = train_set.label[rows]
        knn.append(knn_accuracy(train_set.h[rows], label_R, val_set.h, val_set.label))
        classifier = LogisticRegression(max_iter=1000).fit(train_ND[rows], label_R)
        linear.append(float(classifier.score(val_ND, val_set.label)))
    return FewLabelAccuracy(sum(knn) / DRAWS, sum(linear) / DRAWS)
