"""Differences between variants: intervals, p-values, and what single images contribute."""

import numpy as np
import pytest
from scipy.stats import ttest_rel
from sklearn.metrics import roc_auc_score

from fastssl.reporting.differences import holm, mean_difference, placements


def test_without_images_it_is_the_paired_t_test():
    values_S2 = np.random.default_rng(0).normal([0.6, 0.5], 0.05, (5, 2))
    found = mean_difference(values_S2, [])
    expected = ttest_rel(values_S2[:, 0], values_S2[:, 1])
    low, high = expected.confidence_interval(0.95)
    assert (found.mean, found.low, found.high) == pytest.approx(((values_S2[:, 0] - values_S2[:, 1]).mean(), low, high))
    assert found.p == pytest.approx(expected.pvalue) and (found.seeds, found.images) == (5, 0)


def test_a_single_seed_has_no_difference():
    assert mean_difference(np.array([[0.6, 0.5]]), [np.ones(100)]) is None


def test_equal_variants_do_not_differ():
    found = mean_difference(np.array([[0.5, 0.5], [0.6, 0.6]]), [np.zeros(10)])
    assert (found.mean, found.low, found.high, found.p) == (0, 0, 0, 1)


def test_the_noise_of_images_widens_the_interval():
    values_S2 = np.array([[0.61, 0.60], [0.62, 0.60], [0.615, 0.60]])
    of_seeds = mean_difference(values_S2, [])
    of_both = mean_difference(values_S2, [np.random.default_rng(0).choice([-1.0, 0.0, 1.0], 500) / 3])
    assert of_both.high - of_both.low > of_seeds.high - of_seeds.low and of_both.images == 500


@pytest.mark.parametrize(("sd_seeds", "sd_images"), [(1.0, 0.0), (0.3, 1.0), (0.0, 1.0)])
def test_equal_variants_are_called_different_in_about_five_percent(sd_seeds, sd_images):
    """Three seeds, 50 images, 2,000 repetitions: the share has a standard error of 0.5 %."""
    rng = np.random.default_rng(0)
    calls = 0
    for _ in range(2000):
        seed_S, image_M = rng.normal(0, sd_seeds, 3), rng.normal(0, sd_images, 50)
        difference_SM = seed_S[:, None] + image_M + rng.normal(0, 0.1, (3, 50))
        values_S2 = np.stack([difference_SM.mean(1), np.zeros(3)], axis=1)
        calls += mean_difference(values_S2, [difference_SM.mean(0)]).p < 0.05
    # Not exactly 5 %: the degrees of freedom of two kinds of noise are an approximation.
    assert 0.03 <= calls / 2000 <= 0.08


def test_holm_adjusts_as_published():
    # The example of Holm's procedure with four hypotheses: 4 x 0.005, 3 x 0.01, then never less than before.
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([]) == [] and holm([0.9, 0.8]) == [1.0, 1.0]


def test_placements_average_to_the_auroc_also_with_ties():
    rng = np.random.default_rng(0)
    id_N, ood_M = rng.integers(0, 8, 60).astype(float), rng.integers(2, 12, 40).astype(float)
    of_id, of_ood = placements(id_N, ood_M)
    expected = roc_auc_score(np.arange(100) >= 60, np.concatenate([id_N, ood_M]))
    assert of_id.mean() == pytest.approx(expected) and of_ood.mean() == pytest.approx(expected)
