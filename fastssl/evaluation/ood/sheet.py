"""One figure of a run: views, the most and the least certain images, scores of known and unseen images, and a map."""

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch

from fastssl.beton import read_header
from fastssl.common.errors import UserError
from fastssl.common.figures import plain_label, save_figure
from fastssl.evaluation.features import augmented_input, cached_features, eval_input, eval_loader
from fastssl.evaluation.ood.detectors import OWN_UNCERTAINTY
from fastssl.evaluation.ood.evaluate import OODResult
from fastssl.evaluation.ood.suites import OODSets
from fastssl.evaluation.ood.table import percent
from fastssl.evaluation.runs import BetonSubset, RunEncoder
from fastssl.recipe import ViewsConfig
from fastssl.views.operations import unnormalize

if TYPE_CHECKING:
    from matplotlib.axes import Axes

PAIRS_PER_ROW = 5
PAIRS = 6 * PAIRS_PER_ROW
EXTREMES_PER_ROW = 10
EXTREMES = 2 * EXTREMES_PER_ROW  # most certain images, and as many least certain ones
MAPPED = 800  # points of the map per set, at most
BINS = 50
CPU = torch.device("cpu")
# Okabe and Ito's colors, which color-blind readers can distinguish.
COLORS = ("#D55E00", "#0072B2", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")


def draw_ood_sheet(
    path: Path, encoder: RunEncoder, sets: OODSets, result: OODResult, names: Mapping[str, str] | None = None
) -> None:
    """Draw the sheet of a stochastic run, 1600 x 1000 px, in about three seconds.

    Args:
        path: of the PNG file.
        encoder, sets, result: the arguments and the result of `evaluate_ood`.
        names: what the sets are called in the figure, by their names in `sets.ood` and "id"; others keep their names.

    Raises:
        UserError: if the file cannot be written, or the run is deterministic.
    """
    # Imported here because it takes half a second. Unlike pyplot, Figure needs no display.
    from matplotlib.figure import Figure

    if OWN_UNCERTAINTY not in result["detectors"]:
        raise UserError(
            f"{encoder.run_dir} is deterministic, and the sheet shows {OWN_UNCERTAINTY}, which needs sigma",
            hint="leave out --sheet",
        )
    names = {name: plain_label((names or {}).get(name, name)) for name in ("id", *sets.ood)}
    with np.load(encoder.run_dir / "eval" / result["scores"]) as file:
        scores = {name: file[f"{name}/{OWN_UNCERTAINTY}"] for name in names}
        id_index_N = file["id/index"]
    figure = Figure(figsize=(16, 10), dpi=100, layout="constrained")
    figure.suptitle(plain_label(f"{encoder.recipe.name}, trained without labels"), fontsize=15, weight="bold")
    (views_panel, extremes_panel), (histogram_panel, map_panel) = figure.subplots(2, 2)
    _draw_pairs(views_panel, encoder, sets.fit)
    _draw_extremes(extremes_panel, encoder, sets.id, id_index_N, scores["id"])
    _draw_histograms(histogram_panel, scores, result, names)
    _draw_map(map_panel, encoder, sets, names)
    save_figure(path, figure)


def _draw_pairs(panel: "Axes", encoder: RunEncoder, data: BetonSubset) -> None:
    """Draw two augmented views of some training images."""
    views = encoder.recipe.views
    drawn = BetonSubset(data.path, data.subset, PAIRS)
    batch = next(iter(eval_loader(drawn, views, CPU, augmented=True, batch_size=PAIRS)))
    for i, pair in enumerate(augmented_input(views)(batch)[batch.valid]):
        for v, image in enumerate(_pixels(pair, views)):
            _place(panel, image, column=i % PAIRS_PER_ROW * 2.3 + v, row=i // PAIRS_PER_ROW * 1.15)
    _frame(panel, "What it learned from: two random views of an image should have similar embeddings")


def _draw_extremes(
    panel: "Axes", encoder: RunEncoder, data: BetonSubset, index_N: np.ndarray, score_N: np.ndarray
) -> None:
    """Draw the most and the least certain known images, each with its score."""
    views = encoder.recipe.views
    order_N = np.argsort(score_N, kind="stable")
    count = min(EXTREMES, len(order_N) // 2)
    groups = {"most certain": order_N[:count], "least certain": order_N[::-1][:count]}
    wanted = torch.as_tensor(index_N[np.concatenate(list(groups.values()))])
    images: dict[int, np.ndarray] = {}
    make_input = eval_input(views)
    for batch in eval_loader(data, views, CPU):
        found_B = torch.isin(batch.index, wanted) & batch.valid
        if found_B.any():
            images |= zip(batch.index[found_B].tolist(), _pixels(make_input(batch)[found_B], views))
    top = 0.0
    for title, rows in groups.items():
        panel.text(0, top - 0.12, title, fontsize=11, weight="bold")
        for i, n in enumerate(rows):
            column, row = i % EXTREMES_PER_ROW * 1.12, top + i // EXTREMES_PER_ROW * 1.4
            _place(panel, images[int(index_N[n])], column, row)
            panel.text(column + 0.5, row + 1.23, f"{score_N[n]:#.3g}", fontsize=8, ha="center")
        top += 1.4 * -(-count // EXTREMES_PER_ROW) + 0.5
    _frame(panel, f"Held-out images by the run's own uncertainty, {OWN_UNCERTAINTY}")


def _pixels(images_BCHW: torch.Tensor, views: ViewsConfig) -> np.ndarray:
    """Return (B, H, W, 3 or 1) from 0 to 1: of more than three channels the first three, of two the first."""
    channels = 3 if images_BCHW.shape[1] >= 3 else 1
    return unnormalize(images_BCHW, views)[:, :channels].permute(0, 2, 3, 1).numpy()


def _place(panel: "Axes", image: np.ndarray, column: float, row: float) -> None:
    """Draw an image with sides of 1 and its upper left corner at a position; rows count downwards."""
    panel.imshow(image, cmap="gray", vmin=0, vmax=1, extent=(column, column + 1, row + 1, row))


def _frame(panel: "Axes", title: str) -> None:
    """Show all that was placed: each imshow has set the limits to its own image."""
    right = max(image.get_extent()[1] for image in panel.images)
    bottom = max(image.get_extent()[2] for image in panel.images)
    panel.set_xlim(0, right)
    panel.set_ylim(bottom + 0.3, -0.4)
    panel.set_anchor("N")
    panel.set_axis_off()
    panel.set_title(title, fontsize=12)


def _draw_histograms(
    panel: "Axes", scores: Mapping[str, np.ndarray], result: OODResult, names: Mapping[str, str]
) -> None:
    low, high = np.percentile(np.concatenate(list(scores.values())), (0.5, 99.5))
    edges = np.linspace(low, high if high > low else low + 1, BINS + 1).tolist()
    separation = result["detectors"][OWN_UNCERTAINTY]["sets"]
    for number, (name, score_N) in enumerate(scores.items()):
        values = np.clip(score_N, edges[0], edges[-1])
        if name == "id":
            panel.hist(values, edges, density=True, color="0.8", label=names[name])
            continue
        label = f"{names[name]}: AUROC {percent(separation[name]['metrics']['auroc'])}"
        color = COLORS[(number - 1) % len(COLORS)]
        panel.hist(values, edges, density=True, histtype="step", lw=2, color=color, label=label)
    panel.legend(fontsize=10, frameon=False)
    panel.set_yticks([])
    panel.set_ylabel("share of the images")
    panel.set_xlabel(f"{OWN_UNCERTAINTY}; further right is less certain")
    panel.spines[["top", "right", "left"]].set_visible(False)
    panel.set_title("Is it less certain of images that are unlike those it was trained on?", fontsize=12)


def _draw_map(panel: "Axes", encoder: RunEncoder, sets: OODSets, names: Mapping[str, str]) -> None:
    """Draw the directions of h of known and of near images on a plane, where neighbors stay neighbors (t-SNE)."""
    from matplotlib import colormaps
    from sklearn.decomposition import PCA
    from sklearn.manifold import TSNE

    parts = {"id": sets.id, **sets.near}
    features = {name: cached_features(encoder, data) for name, data in parts.items()}
    rows = {name: np.arange(len(found.h))[:: -(-len(found.h) // MAPPED)] for name, found in features.items()}
    h_ND = np.concatenate([features[name].h[rows[name]] for name in parts]).astype(np.float64)
    # Directions: the lengths of h differ by more than its directions do, and hide them.
    h_ND /= np.linalg.norm(h_ND, axis=1, keepdims=True).clip(1e-12)
    # Principal components first: distances in fewer dimensions take a third of the time.
    h_ND = PCA(min(30, *h_ND.shape), random_state=0).fit_transform(h_ND)
    perplexity = min(30, (len(h_ND) - 1) / 3)
    plane_N2 = TSNE(2, perplexity=perplexity, max_iter=400, init="pca", random_state=0).fit_transform(h_ND)

    label_N = features["id"].label[rows["id"]]
    known_N2, near_N2 = np.split(plane_N2, [len(label_N)])
    near = ", ".join(names[name] for name in sets.near)
    panel.scatter(near_N2[:, 0], near_N2[:, 1], s=12, marker="x", lw=0.8, color="0.45", label=near)
    classes = read_header(sets.id.path).classes
    for i, label in enumerate(np.unique(label_N)):
        points_N2 = known_N2[label_N == label]
        color = colormaps["tab10"](i % 10)
        panel.scatter(points_N2[:, 0], points_N2[:, 1], s=12, color=color)
        x, y = np.median(points_N2, axis=0)
        name = classes[label] if classes and 0 <= label < len(classes) else str(label)
        box = {"facecolor": "white", "edgecolor": "none", "alpha": 0.7, "pad": 1}
        panel.text(x, y, plain_label(name), color=color, fontsize=16, weight="bold", bbox=box)
    if near:
        panel.legend(fontsize=10, frameon=False)
    panel.set_xticks([])
    panel.set_yticks([])
    panel.set_xlabel("t-SNE of the directions of h: neighbors have similar representations")
    panel.set_title("Held-out images on a map of the representations: no label was used in training", fontsize=12)
