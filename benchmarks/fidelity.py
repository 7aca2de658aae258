"""The effect of each choice of the published code on loss and gradient, for real images and a trained model.

    python benchmarks/fidelity.py runs/zprob_barlow runs/zprob_vicreg runs/zprob_barlow_mixture

For every run directory, it computes loss and gradient with the run's own recipe and weights on a few training batches,
in training mode, and then with one choice of the published code at a time, for the same weights, batches and noise. It
prints the relative change of the loss and, for the gradient of the encoder's weights, the relative distance |g' - g| /
|g| and the cosine, averaged over the batches. Local statistics: the batch in equal parts, one per process, whose losses
are averaged, after batch norms over the whole batch. Half precision: the objective alone under fp16 autocast, as in the
published code, with the gradient of z.
"""

import argparse
from pathlib import Path

import torch
from torch import Tensor

from fastssl.loading import BetonLoader, SampleSelection
from fastssl.models import DiagonalGaussian, Draws, ModelInput, SSLModel, ViewOutput
from fastssl.models.checkpoint import newest_checkpoint
from fastssl.objectives import TotalLoss
from fastssl.recipe import Recipe, load_recipe
from fastssl.views import PairedViews

BATCH, BATCHES = 256, 3
CHOICES = {  # by objective, then by the prior of stochastic runs
    "barlow_twins": {"unbiased deviation, no eps": ["objective.unbiased=true", "objective.eps=0"]},
    "vicreg": {
        "variance eps 1e-6": ["objective.eps=1e-6"],
        "views centered before the invariance": ["objective.center=true"],
    },
    "standard_normal": {"Monte Carlo KL": ["embedding.kl=mc"]},
    "mixture": {
        "mixture per dimension": ["embedding.mixture_mode=per_dim"],
        "mixture as published": ["embedding.mixture_mode=reference"],
    },
}


def batches_of(recipe: Recipe) -> list[ModelInput]:
    loader = BetonLoader(recipe.data.train, BATCH, seed=1, selection=SampleSelection(limit=BATCH * BATCHES))
    views, made = PairedViews(recipe.views, seed=recipe.seed), []
    for batch in loader:
        both = tuple(v.clone() for v in views(batch.image, batch.index, 0, batch.height, batch.width))
        made.append(ModelInput(both, batch.label.clone(), batch.index.clone(), torch.tensor(len(made))))
    return made


def rows_of(view: ViewOutput, rows: slice) -> ViewOutput:
    """One process's part of a view whose batch several processes share."""
    draws = {
        space: Draws(DiagonalGaussian(q.mu[rows], q.log_var[rows]), x[:, rows]) for space, (q, x) in view.draws.items()
    }
    return ViewOutput(view.h[rows], view.z[..., rows, :], draws, None)


def loss_in_parts(recipe: Recipe, model: SSLModel, inputs: ModelInput, parts: int) -> Tensor:
    """The mean loss of `parts` equal parts of the batch, whose batch norms see the whole batch."""
    views, total_loss, size = model(inputs), TotalLoss(recipe), BATCH // parts
    slices = [slice(start, start + size) for start in range(0, BATCH, size)]
    losses = [total_loss(tuple(rows_of(v, s) for v in views), model.priors, inputs.step)["loss"] for s in slices]
    return sum(losses) / parts


def losses_and_gradients(
    run: Path, overrides: list[str], batches: list[ModelInput], parts: int = 1
) -> list[tuple[float, Tensor]]:
    recipe = load_recipe(run / "recipe.yaml", overrides)
    model = SSLModel(recipe)
    model.load_state_dict(newest_checkpoint(run).saved["model"])
    found = []
    for inputs in batches:
        model.train()
        value = loss_in_parts(recipe, model, inputs, parts)
        gradient = torch.autograd.grad(value, list(model.encoder.parameters()))
        found.append((value.item(), torch.cat([g.flatten() for g in gradient])))
    return found


def half_precision(run: Path, batches: list[ModelInput]) -> tuple[list, list]:
    """The objective in fp32 and under fp16 autocast, the published form, with the gradient of the first view's z."""
    from objectives import NAIVE

    recipe = load_recipe(run / "recipe.yaml")
    model, naive = SSLModel(recipe), NAIVE[recipe.objective.name]
    model.load_state_dict(newest_checkpoint(run).saved["model"])
    found = [], []
    for inputs in batches:
        with torch.no_grad():
            first, second = (view.z if view.z.ndim == 2 else view.z[0] for view in model(inputs))
        for half, results in zip((False, True), found):
            z1 = first.clone().requires_grad_()
            with torch.autocast("cpu", torch.float16, enabled=half):
                # fp16 gradients below 6e-8 vanish: scaled as GradScaler would.
                value = naive(z1, second)
            results.append((value.item(), torch.autograd.grad(value.float() * 1024, z1)[0].flatten() / 1024))
    return found


def compare(name: str, run: Path, before: list, after: list) -> None:
    change = [after_loss / loss - 1 for (loss, _), (after_loss, _) in zip(before, after)]
    distance = [((b - a).norm() / a.norm()).item() for (_, a), (_, b) in zip(before, after)]
    cosine = [torch.cosine_similarity(a.double(), b.double(), dim=0).item() for (_, a), (_, b) in zip(before, after)]
    mean = [sum(values) / len(values) for values in (change, distance, cosine)]
    print(f"| {run.name} | {name} | {mean[0]:+.2%} | {mean[1]:.2%} | {mean[2]:.5f} |", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", type=Path)
    options = parser.parse_args()
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads, {BATCHES} batches of {BATCH}\n")
    print("| run | choice of the published code | loss | gradient: distance | cosine |\n|---|---|---|---|---|")
    for run in options.runs:
        recipe = load_recipe(run / "recipe.yaml")
        embedding = recipe.embedding
        if recipe.objective.name not in CHOICES or embedding.prior == "vamp" or embedding.stochastic == "hz":
            parser.error(f"{run} is not of a kind that the published code trains.")
        batches = batches_of(recipe)
        ours = losses_and_gradients(run, [], batches)
        kinds = [recipe.objective.name]
        kinds += [] if recipe.embedding.stochastic == "none" else [recipe.embedding.prior]
        for kind in kinds:
            for name, overrides in CHOICES[kind].items():
                compare(name, run, ours, losses_and_gradients(run, overrides, batches))
        for parts in (2, 8):
            name = f"local statistics, {parts} processes of {BATCH // parts}"
            compare(name, run, ours, losses_and_gradients(run, [], batches, parts))
        compare("objective in fp16 (gradient of z)", run, *half_precision(run, batches))


if __name__ == "__main__":
    main()
