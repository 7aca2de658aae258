"""One figure of a run: views, the most and the least certain images, scores of known and unseen images, and a map."""

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch

from fastssl.beton import read_header
from fastssl.common.errors import UserError
from fastssl.common.figures import (
    GRAY,
    LIGHT_GRAY,
    LINE_COLORS,
    MARKERS,
    SMALL,
    TEXT,
    WIDTH,
    line_style,
    new_figure,
    plain_label,
    save_figure,
    shortened,
    wrapped,
)
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
EXTREMES_PER_ROW = 7
EXTREMES = 2 * EXTREMES_PER_ROW  # most certain images, and as many least certain ones
MAPPED = 800  # points of the map per set, at most
BINS = 50
MAX_NAMED = 20  # classes; more names would cover the map
LONGEST_NAME = 2.0  # inches of a set's or class's name
CPU = torch.device("cpu")


def draw_ood_sheet(
    path: Path, encoder: RunEncoder, sets: OODSets, result: OODResult, names: Mapping[str, str] | None = None
) -> None:
    """Draw the sheet of a stochastic run, 1500 px wide, in about three seconds.

    Args:
        path: of the PNG file.
        encoder, sets, result: the arguments and the result of `evaluate_ood`.
        names: what the sets are called in the figure, by their names in `sets.ood` and "id"; others keep their names,
            and "id" is "ID images".

    Raises:
        UserError: if the file cannot be written, or the run is deterministic.
    """
    if OWN_UNCERTAINTY not in result["detectors"]:
        raise UserError(
            f"{encoder.run_dir} is deterministic, and the sheet shows {OWN_UNCERTAINTY}, which needs sigma",
            hint="choose a run with embedding.stochastic=z, h or hz",
        )
    called = {"id": "ID images"} | dict(names or {})
    names = {name: plain_label(shortened(called.get(name, name), LONGEST_NAME, SMALL)) for name in ("id", *sets.ood)}
    with np.load(encoder.run_dir / "eval" / result["scores"]) as file:
        scores = {name: file[f"{name}/{OWN_UNCERTAINTY}"] for name in names}
        id_index_N = file["id/index"]
    figure, body = new_figure(
        WIDTH,
        7.2,
        f"{encoder.recipe.name}, trained {_labels(encoder)}: good if unseen images are less certain than known ones",
        f"Uncertainty is {OWN_UNCERTAINTY}: how much draws of an image's embedding differ. AUROC, in %: how often "
        "an unseen image has a higher uncertainty than a known one; higher is better, 50 is chance. The end bins "
        "of the histogram hold all images beyond. Map: t-SNE of the directions of h, colored by class; neighbors "
        "are similar, distances mean nothing.",
    )
    (views_panel, extremes_panel), (histogram_panel, map_panel) = body.subplots(2, 2)
    _draw_pairs(views_panel, encoder, sets.fit)
    _draw_extremes(extremes_panel, encoder, sets.id, id_index_N, scores["id"])
    _draw_histograms(histogram_panel, scores, result, names)
    _draw_map(map_panel, encoder, sets, names)
    save_figure(path, figure)


def _labels(encoder: RunEncoder) -> str:
    return "with labels" if encoder.recipe.objective.needs_labels else "without labels"


def _draw_pairs(panel: "Axes", encoder: RunEncoder, data: BetonSubset) -> None:
    """Draw two augmented views of some training images."""
    views = encoder.recipe.views
    drawn = BetonSubset(data.path, data.subset, PAIRS)
    batch = next(iter(eval_loader(drawn, views, CPU, augmented=True, batch_size=PAIRS)))
    for i, pair in enumerate(augmented_input(views)(batch)[batch.valid]):
        for v, image in enumerate(_pixels(pair, views)):
            _place(panel, image, column=i % PAIRS_PER_ROW * 2.3 + v, row=i // PAIRS_PER_ROW * 1.15)
    if encoder.recipe.objective.needs_labels:
        _frame(panel, "Augmented views of training images")
    else:
        _frame(panel, "Training: two views of an image get similar embeddings")


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
        panel.text(0, top - 0.12, title, fontsize=SMALL, weight="bold")
        for i, n in enumerate(rows):
            column, row = i % EXTREMES_PER_ROW * 1.12, top + i // EXTREMES_PER_ROW * 1.4
            _place(panel, images[int(index_N[n])], column, row)
            panel.text(column + 0.5, row + 1.06, f"{score_N[n]:#.2g}", fontsize=SMALL, ha="center", va="top")
        top += 1.4 * -(-count // EXTREMES_PER_ROW) + 0.5
    _frame(panel, "Held-out images, with their uncertainty")


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
    _set_title(panel, title)


def _set_title(panel: "Axes", title: str) -> None:
    panel.set_title(wrapped(title, WIDTH / 2 - 0.4, TEXT, weight="bold"), fontsize=TEXT, weight="bold")


def _draw_histograms(
    panel: "Axes", scores: Mapping[str, np.ndarray], result: OODResult, names: Mapping[str, str]
) -> None:
    low, high = np.percentile(np.concatenate(list(scores.values())), (0.5, 99.5))
    edges = np.linspace(low, high if high > low else low + 1, BINS + 1).tolist()
    separation = result["detectors"][OWN_UNCERTAINTY]["sets"]
    for number, (name, score_N) in enumerate(scores.items()):
        values = np.clip(score_N, edges[0], edges[-1])
        if name == "id":
            panel.hist(values, edges, density=True, color=LIGHT_GRAY, label=names[name])
            continue
        label = f"{names[name]}: AUROC {percent(separation[name]['metrics']['auroc'])}"
        panel.hist(values, edges, density=True, histtype="step", lw=1.5, label=label, **line_style(number - 1))
    # Room for the legend above the bars.
    panel.set_ylim(top=panel.get_ylim()[1] * (1 + 0.11 * len(scores)))
    panel.legend(fontsize=SMALL, frameon=False, loc="upper right")
    panel.set_yticks([])
    panel.set_ylabel("density of the images", fontsize=TEXT)
    panel.set_xlabel("uncertainty: further right is less certain", fontsize=TEXT)
    panel.tick_params(labelsize=SMALL)
    panel.spines[["top", "right", "left"]].set_visible(False)
    _set_title(panel, "Good if unseen images lie to the right of the known ones (gray)")


def _draw_map(panel: "Axes", encoder: RunEncoder, sets: OODSets, names: Mapping[str, str]) -> None:
    """Draw the directions of h of known and of near images on a plane, where neighbors stay neighbors (t-SNE)."""
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
    near = "\n".join(names[name] for name in sets.near)
    panel.scatter(near_N2[:, 0], near_N2[:, 1], s=10, marker="x", lw=0.7, color=GRAY, label=near)
    classes = read_header(sets.id.path).classes
    labels = np.unique(label_N)
    for i, label in enumerate(labels):
        points_N2 = known_N2[label_N == label]
        color, marker = LINE_COLORS[i % len(LINE_COLORS)], MARKERS[i % len(MARKERS)]
        panel.scatter(points_N2[:, 0], points_N2[:, 1], s=8, color=color, marker=marker, lw=0)
    for label in labels if len(labels) <= MAX_NAMED else ():  # on top of all points
        x, y = np.median(known_N2[label_N == label], axis=0)
        name = classes[label] if classes and 0 <= label < len(classes) else str(label)
        box = {"facecolor": "white", "edgecolor": "none", "alpha": 0.8, "pad": 1}
        name = plain_label(shortened(name, LONGEST_NAME / 2, TEXT))
        panel.text(x, y, name, fontsize=TEXT, weight="bold", ha="center", va="center", bbox=box)
    if near:
        panel.legend(fontsize=SMALL, loc="best", markerscale=1.5)
    panel.set_xticks([])
    panel.set_yticks([])
    _set_title(panel, f"Map of the representations: trained {_labels(encoder)}")
