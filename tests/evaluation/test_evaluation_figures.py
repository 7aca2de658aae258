"""Every figure of the evaluations can be read, whatever it shows."""

import numpy as np
import pytest
from figure_checks import check_figure, saved_figures, shown_texts
from matplotlib.legend import Legend

from fastssl.evaluation.metrics import ClassificationResult
from fastssl.evaluation.mutual_information.estimators import Estimate, PairEstimates
from fastssl.evaluation.mutual_information.plots import draw_learning_curves
from fastssl.evaluation.ood.plots import BINS, TALLEST, draw_ood_plots
from fastssl.evaluation.ood.separation import compare
from fastssl.evaluation.ood.suites import OODSets
from fastssl.evaluation.plots import draw_confusion
from fastssl.evaluation.uncertainty.corruptions import CORRUPTIONS
from fastssl.evaluation.uncertainty.plots import draw_corruptions, draw_risk_coverage

LONG = "images_of_a_laboratory_resized_to_thirty_two_pixels_without_antialiasing_v"


@pytest.fixture
def saved():
    with saved_figures() as figures:
        yield figures


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
def test_ood_figures(tmp_path, saved, near, far, constant):
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


@pytest.mark.parametrize(
    ("classes", "names"),
    [
        (2, ["cat", LONG]),
        (10, "airplane automobile bird cat deer dog frog horse ship truck".split()),
        (20, [f"{LONG}{i}" for i in range(20)]),
        (50, [f"{LONG}{i}" for i in range(50)]),
        (100, None),
        (1000, [f"{LONG}{i}" for i in range(1000)]),
    ],
)
def test_confusion_matrix(tmp_path, saved, classes, names):
    rng = np.random.default_rng(0)
    confusion = np.diag(rng.integers(20, 90, classes)) + rng.integers(0, 2, (classes, classes))
    result = ClassificationResult({"accuracy": 0.7}, {}, confusion, np.arange(classes), {}, np.ones(1, bool))
    draw_confusion(tmp_path / "x.png", result, names)
    check_figure(saved[0])
    axes = saved[0].axes[0]
    image = axes.images[0].get_array()
    assert max(image.shape) <= 100 and np.allclose(image.sum(axis=1), 100)
    numbers = {(round(text.get_position()[1]), round(text.get_position()[0])): text.get_text() for text in axes.texts}
    assert bool(numbers) == (classes <= 20)
    for (row, column), number in numbers.items():
        assert float(number) == pytest.approx(100 * confusion[row, column] / confusion[row].sum(), abs=0.5)
    if classes == 1000:
        assert image[3, 4] == pytest.approx(100 * confusion[30:40, 40:50].sum() / confusion[30:40].sum())


@pytest.mark.parametrize("run", ["demo", LONG])
@pytest.mark.parametrize("score", ["mean sigma of z", "cosine distance of h to training neighbor 48"])
@pytest.mark.parametrize("mean", [0.058, 0.0])
def test_uncertainty_figures(tmp_path, saved, run, score, mean):
    curve = np.linspace(0, 0.05, 100).tolist()
    curves = {
        "coverage": np.linspace(0.01, 1, 100).tolist(),
        "uncertainty": curve,
        "confidence": curve,
        "oracle": curve,
    }
    metrics = {"accuracy": 0.95, "aurc": 0.029, "e_aurc": 0.028, "aurc_confidence": 0.003}
    draw_risk_coverage(tmp_path / "x.png", run, curves, metrics, score)
    labels = " ".join(text.get_text() for text in saved[0].findobj(Legend)[0].get_texts())
    assert "uncertainty: AURC 2.9 %" in labels and "random order: AURC 5.0 %" in labels  # as in the table
    corruptions = {}
    for name, strengths in CORRUPTIONS.items():
        means = mean * (1 + 0.1 * np.arange(len(strengths) + 1))
        corruptions[name] = {"mean": means.tolist(), "intervals": np.stack([means * 0.9, means * 1.1], 1).tolist()}
    result = {
        "corruptions": corruptions,
        "corrupted_images": 1000,
        "metrics": {f"spearman_{name}": -0.053 for name in CORRUPTIONS},
        "intervals": {f"spearman_{name}": [-0.123, 0.004] for name in CORRUPTIONS},
    }
    draw_corruptions(tmp_path / "y.png", run, result, score)
    assert len(saved) == 2
    for figure in saved:
        check_figure(figure)


@pytest.mark.parametrize("quantities", [1, 4])
@pytest.mark.parametrize("nats", [0.0, 1.7, 6.7])
def test_learning_curves_of_critics(tmp_path, saved, quantities, nats):
    curve = [(step, nats - abs(step - 100) / 50) for step in range(0, 1000, 10)]
    estimates = PairEstimates(*[Estimate(nats, 0.1, 6.7, nats > 6, 1.0, curve)] * 4)
    draw_learning_curves(tmp_path / "x.png", {f"I(Z;Z{i})": estimates for i in range(quantities)})
    check_figure(saved[0])
    labels = [text.get_text() for text in saved[0].findobj(Legend)[0].get_texts()]
    assert {"js", "mine", "js on shuffled pairs"} <= set(labels)  # the names of the table
    assert ("ceiling" in labels) == (nats > 6), "the ceiling is named where a panel shows it"
