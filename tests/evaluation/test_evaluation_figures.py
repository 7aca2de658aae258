"""Every figure of the evaluations can be read, whatever it shows."""

import numpy as np
import pytest
from figure_checks import check_figure, saved, shown_texts  # noqa: F401

from fastssl.evaluation.ood.plots import BINS, TALLEST, draw_ood_plots
from fastssl.evaluation.ood.separation import compare
from fastssl.evaluation.ood.suites import OODSets

LONG = "images_of_a_laboratory_resized_to_thirty_two_pixels_without_antialiasing_v"


def draw_ood(folder, near, far, constant=False):
    """Draw five detectors: two good ones, an inverted one, one of a heavy tail, one with labels."""
    rng = np.random.default_rng(0)
    shifts = {"id": 0, **{name: 2 + i for i, name in enumerate((*near, *far))}}
    normal = {name: 0 * shift if constant else rng.normal(shift, 1, 60) for name, shift in shifts.items()}
    normal = {name: np.zeros(60) + score for name, score in normal.items()}
    scores = {
        "mahalanobis_unlabelled": normal,
        "posterior_bhattacharyya": {name: score * 1e-4 - 0.1262 for name, score in normal.items()},
        "sigma_std": {name: -score for name, score in normal.items()},
        "prior_kl": {name: np.exp(9 * score) for name, score in normal.items()},
        "mahalanobis_relative": {name: score * (score > 0.5) for name, score in normal.items()},
        "energy": normal,
    }
    compared = compare(scores, {"near": list(near), "far": list(far)}, np.arange(60.0), 0)
    sets = OODSets(None, None, dict.fromkeys(near), dict.fromkeys(far), "x")
    draw_ood_plots(folder, "x", scores, compared["detectors"], sets)
    return scores, compared["detectors"]


@pytest.mark.parametrize(
    ("near", "far", "constant"),
    [
        (["cifar100"], [], False),
        (["cifar100", "tinyimagenet"], ["mnist", "svhn"], False),
        ([], [f"{LONG}{i}" for i in range(7)], False),
        (["cifar100"], ["mnist"], True),
    ],
    ids=["one", "four", "seven long names", "constant"],
)
def test_ood_figures(tmp_path, saved, near, far, constant):  # noqa: F811
    scores, detectors = draw_ood(tmp_path, near, far, constant)
    assert len(saved) == 3
    for figure in saved:
        check_figure(figure)
    histograms, roc, auroc = saved
    for figure in (histograms, roc):
        panels = [axes for axes in figure.axes if axes.axison]
        assert len(panels) == len(detectors)
        for (detector, row), panel in zip(detectors.items(), panels):
            title = panel.get_title()
            assert title.startswith(detector) and ("*" in title) == row["labels"]
            for group in ("near", "far"):
                if group in row:
                    assert f"{100 * row[group]['metrics']['auroc']:.1f} {group}" in title
            inverted = any(each["inverted"] for each in row["sets"].values())
            assert ("inverted" in title) == inverted == (panel.get_facecolor() != (1, 1, 1, 1))
    lines = {(line.get_color(), str(line._unscaled_dash_pattern)) for line in roc.axes[0].lines[1:]}
    assert len(lines) == len(near) + len(far)
    for score, panel in zip(scores.values(), histograms.axes):
        bars, outlines = panel.patches[:BINS], panel.patches[BINS:]
        highest = max(patch.get_xy()[:, 1].max() for patch in outlines)
        assert highest <= panel.get_ylim()[1] <= TALLEST * highest + 1e-9
        # The last bin of ID images also holds those beyond it.
        beyond = np.sum(score["id"] >= bars[-1].get_x())
        assert bars[-1].get_height() * bars[-1].get_width() * 60 == pytest.approx(beyond, abs=1e-6)
    marked = [text.get_text() for text in shown_texts(auroc) if text.get_text().startswith("▼")]
    assert len(marked) == sum(each["inverted"] for row in detectors.values() for each in row["sets"].values())
    assert bool(marked) == (not constant)
