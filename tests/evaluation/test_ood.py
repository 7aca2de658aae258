"""Detectors against their formulas in NumPy, one image at a time; the metrics against scikit-learn."""

import math
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy.stats import multivariate_normal, norm, spearmanr
from sklearn.cluster import KMeans
from sklearn.covariance import EmpiricalCovariance
from sklearn.decomposition import PCA
from sklearn.metrics import average_precision_score, roc_auc_score, roc_curve
from sklearn.neighbors import NearestNeighbors

from fastssl.common.randomness import NOISE_EVALUATION, normals
from fastssl.evaluation.ood import DETECTORS, LABEL_BASED, LinearHead, detector, distances, label_free, metrics
from fastssl.evaluation.ood.distances import fit_gaussian
from fastssl.evaluation.ood.label_based import minimum_norm_head, perturb_for_odin
from fastssl.evaluation.ood.label_free import DRAWS, K_POSTERIORS, K
from fastssl.evaluation.ood.separation import METRICS, RESAMPLES, bootstrap_metrics, resample
from fastssl.models import MixtureOfGaussians, StandardNormal

N, M, D, E, C = 600, 80, 12, 10, 4
POSTERIORS = 400  # instead of 1,000, fewer than the training images, so that they are sampled


@pytest.fixture(scope="module")
def data():
    """Training images of four classes, and test images at growing distances; float32, as cached features are."""
    rng = np.random.default_rng(0)
    centre_CD = rng.normal(0, 2, (C, D))
    scale_D = np.logspace(0, -1.5, D)
    label_N = rng.integers(C, size=N)
    fit_ND = centre_CD[label_N] + scale_D * rng.normal(size=(N, D)) + 3
    away_M1 = np.linspace(0, 3, M)[:, None]
    query_MD = centre_CD[rng.integers(C, size=M)] + scale_D * rng.normal(size=(M, D)) + 3 + away_M1 * rng.normal(size=D)
    weight_CD, bias_C = centre_CD / 3, rng.normal(size=C) - centre_CD @ np.full(D, 3) / 3

    def arrays(x_ND):
        mu_NE = (x_ND[:, :E] - 3) / 2
        sigma_NE = np.exp(rng.uniform(-2, 0.5, (len(x_ND), E)) + 0.1 * x_ND[:, -1:])
        x32 = x_ND.astype(np.float32)
        return {
            "features": x32, "logits": x32 @ weight_CD.T + bias_C,
            "mu": mu_NE.astype(np.float32), "sigma": sigma_NE.astype(np.float32),
            "layers": [np.tanh(x32[:, :5]) * 100, x32 @ weight_CD.T.astype(np.float32), x32],
        }  # fmt: skip

    return {**arrays(fit_ND), "labels": label_N}, arrays(query_MD), weight_CD


def exact(arrays: dict) -> dict:
    def convert(name, x):
        return np.asarray(x, np.int64 if name == "labels" else np.float64)

    return {
        name: [convert(name, each) for each in x] if name == "layers" else convert(name, x)
        for name, x in arrays.items()
    }


def image(arrays: dict, i: int) -> dict:
    return {name: [each[i] for each in x] if name == "layers" else x[i] for name, x in arrays.items()}


def unit(x):
    return x / np.linalg.norm(x, axis=-1, keepdims=True)


def softmax(x):
    e = np.exp(x - x.max())
    return e / e.sum()


def mahalanobis(x, sample, mean=None):
    covariance = EmpiricalCovariance(assume_centered=True).fit(sample).covariance_
    return (x - mean) @ np.linalg.inv(covariance) @ (x - mean)


def common_noise():
    return normals(0, 0, torch.zeros(1, dtype=torch.int64), 0, DRAWS, E, NOISE_EVALUATION)[:, 0].double().numpy()


def drawn_posteriors(fit):
    rows = torch.randperm(N, generator=torch.Generator().manual_seed(0))[:POSTERIORS].numpy()
    return fit["mu"][rows], fit["sigma"][rows]


def kl(mu, sigma, mu2, sigma2):
    return 0.5 * np.sum((sigma**2 + (mu - mu2) ** 2) / sigma2**2 - 1 + 2 * np.log(sigma2 / sigma))


def bhattacharyya(mu, sigma, mu2, sigma2):
    s = sigma**2 + sigma2**2
    return np.sum(0.25 * (mu - mu2) ** 2 / s + 0.5 * np.log(s / (2 * sigma * sigma2)))


def kth_posterior(distance):
    def score(fit, x):
        return sorted(distance(x["mu"], x["sigma"], *other) for other in zip(*drawn_posteriors(fit)))[K_POSTERIORS - 1]

    return score


def disagreement(fit, x):
    return 1 - np.linalg.norm(np.mean([unit(x["mu"] + x["sigma"] * noise) for noise in common_noise()], axis=0)) ** 2


def kth_neighbor(metric):
    def score(fit, x):
        found = NearestNeighbors(n_neighbors=K, metric=metric, algorithm="brute").fit(fit["features"])
        return found.kneighbors(x["features"][None])[0][0, -1]

    return score


def class_mahalanobis(fit, x):
    classes = np.unique(fit["labels"])
    mean = {c: fit["features"][fit["labels"] == c].mean(axis=0) for c in classes}
    deviation = np.stack([f - mean[c] for f, c in zip(fit["features"], fit["labels"])])
    return min(mahalanobis(x["features"], deviation, mean[c]) for c in classes)


def background(fit, x):
    mean = fit["features"].mean(axis=0)
    return mahalanobis(x["features"], fit["features"] - mean, mean)


def of_layers(distance):
    """The mean over layers of the standardized distance, one image at a time."""

    def score(fit, x):
        key = id(fit), distance
        if key not in moments:
            moments[key] = [
                (np.mean(found), np.std(found, ddof=1))
                for layer in fit["layers"]
                for found in [[distance({**fit, "features": layer}, {"features": each}) for each in layer]]
            ]
        found = [
            (distance({**fit, "features": layer}, {"features": each}) - mean) / std
            for layer, each, (mean, std) in zip(fit["layers"], x["layers"], moments[key])
        ]
        return np.mean(found)

    moments: dict = {}
    return score


def ssd(fit, x):
    units = unit(fit["features"])
    clusters = KMeans(min(10, N // (4 * D)), n_init=1, random_state=0).fit_predict(units)
    parts = [units[clusters == c] for c in np.unique(clusters)]
    return min(mahalanobis(unit(x["features"]), part - part.mean(0), part.mean(0)) for part in parts)


def pca_residual(fit, x):
    pca = PCA(svd_solver="full").fit(fit["features"])
    kept = np.searchsorted(np.cumsum(pca.explained_variance_ratio_), 0.95) + 1
    return np.linalg.norm(pca.transform(x["features"][None])[0, kept:])


def affine(fit):
    one_more = np.c_[fit["features"], np.ones(N)]
    solution = np.linalg.lstsq(one_more, fit["logits"], rcond=None)[0]
    return solution[:-1].T, solution[-1]


def vim(fit, x):
    weight, bias = affine(fit)
    origin = -np.linalg.pinv(weight) @ bias
    axes = np.linalg.svd(fit["features"] - origin)[2][D // 2 :]
    residual = [np.linalg.norm(axes @ (f - origin)) for f in fit["features"]]
    alpha = fit["logits"].max(axis=1).mean() / np.mean(residual)
    return alpha * np.linalg.norm(axes @ (x["features"] - origin)) - np.log(np.exp(x["logits"]).sum())


def react(fit, x):
    weight, bias = affine(fit)
    cut = np.minimum(x["features"], np.percentile(fit["features"], 90))
    return -np.log(np.exp(weight @ cut + bias).sum())


def kl_matching(fit, x):
    p_N = np.stack([softmax(row) for row in fit["logits"]])
    p = softmax(x["logits"])
    typical = [p_N[p_N.argmax(axis=1) == c].mean(axis=0) for c in range(C)]
    return min(np.sum(p * np.log(p / d)) for d in typical)


ORACLES = {
    "sigma_mean": lambda fit, x: np.mean(x["sigma"]),
    "sigma_std": lambda fit, x: np.std(x["sigma"], ddof=1),
    "q_entropy": lambda fit, x: multivariate_normal(x["mu"], np.diag(x["sigma"] ** 2)).entropy(),
    "prior_log_density": lambda fit, x: -norm.logpdf(x["mu"]).sum(),
    "prior_kl": lambda fit, x: kl(x["mu"], x["sigma"], 0.0, np.ones(E)),
    "posterior_kl": kth_posterior(kl),
    "posterior_bhattacharyya": kth_posterior(bhattacharyya),
    "draws_disagreement": disagreement,
    "knn_cosine": kth_neighbor("cosine"),
    "knn_euclidean": kth_neighbor("euclidean"),
    "mahalanobis_unlabelled": background,
    "layers_unlabelled": of_layers(background),
    "kmeans_ssd": ssd,
    "pca_residual": pca_residual,
    "jepa_score": lambda fit, x: -np.sum(np.log(np.maximum(x["features"], 1e-6))),  # of singular values
    "jepa_score_mu": lambda fit, x: -np.sum(np.log(np.maximum(x["features"], 1e-6))),
    "msp": lambda fit, x: 1 - softmax(x["logits"]).max(),
    "max_logit": lambda fit, x: -x["logits"].max(),
    "energy": lambda fit, x: -np.log(np.exp(x["logits"]).sum()),
    "softmax_entropy": lambda fit, x: -np.sum(softmax(x["logits"]) * np.log(softmax(x["logits"]))),
    "gen": lambda fit, x: np.sum((softmax(x["logits"]) * (1 - softmax(x["logits"]))) ** 0.1),
    "kl_matching": kl_matching,
    "odin": lambda fit, x: -softmax(x["logits"] / 1000).max(),
    "mahalanobis": class_mahalanobis,
    "mahalanobis_relative": lambda fit, x: class_mahalanobis(fit, x) - background(fit, x),
    "layers_mahalanobis": of_layers(class_mahalanobis),
    "vim": vim,
    "react_energy": react,
    "knn_supervised": kth_neighbor("cosine"),
}
MONOTONE_ONLY = {"msp"}  # log odds of the formula, so that confident images do not tie


@pytest.mark.parametrize("name", ORACLES)
def test_detector_equals_its_formula(name, data, monkeypatch):
    fit, query, _ = data
    monkeypatch.setattr(label_free, "POSTERIORS", POSTERIORS)
    # Chunks of 13 images and a smaller last one.
    monkeypatch.setattr(distances, "CHUNK_ELEMENTS", 13 * N)
    monkeypatch.setattr(label_free, "CHUNK_ELEMENTS", 13 * DRAWS * E)
    monkeypatch.setattr(label_free, "PAIR_ELEMENTS", 13 * POSTERIORS * E)
    labels = {"labels": fit["labels"]} if name in LABEL_BASED else {}
    arrays = {key: x for key, x in fit.items() if key != "labels"} | labels
    found = detector(name).fit(**arrays).score(**query)
    fit64, query64 = exact(fit), exact(query)
    expected = np.array([ORACLES[name](fit64, image(query64, i)) for i in range(M)])
    assert found.dtype == np.float64 and found.shape == (M,)
    if name not in MONOTONE_ONLY:
        np.testing.assert_allclose(found, expected, rtol=1e-7, atol=1e-7 * np.abs(expected).mean())
    assert spearmanr(found, expected).statistic >= 0.9999


def test_every_detector_has_an_oracle_and_documents_its_direction():
    assert set(ORACLES) | {"views_sigma", "views_disagreement"} == set(DETECTORS)
    for name, kind in DETECTORS.items():
        assert "igher is OOD" in kind.__doc__, name
    with pytest.raises(ValueError, match="no detector 'sigma'"):
        detector("sigma")


def test_views_disagreement():
    pair_M2D = np.random.default_rng(0).normal(size=(M, 2, D))
    found = detector("views_disagreement").fit(pair_M2D).score(pair_M2D)
    np.testing.assert_allclose(found, [1 - unit(a) @ unit(b) for a, b in pair_M2D], atol=1e-12)


def test_views_sigma():
    sigma_M2E = np.random.default_rng(0).uniform(0.1, 1, (M, 2, E))
    found = detector("views_sigma").score(sigma_M2E, sigma=sigma_M2E)
    np.testing.assert_allclose(found, [(sum(a) + sum(b)) / (2 * E) for a, b in sigma_M2E], rtol=1e-12)


@pytest.mark.parametrize("mode", ["joint", "per_dim", "reference"])
def test_detectors_use_the_prior_of_the_run(mode, data):
    """A mixture: the KL is the Monte Carlo mean over the common noise; the log density is that at mu."""
    _, query, _ = data
    torch.manual_seed(0)
    prior = MixtureOfGaussians(3, E, mode=mode)
    mu, sigma = torch.tensor(query["mu"]).double(), torch.tensor(query["sigma"]).double()
    x_SME = torch.stack([mu + sigma * torch.tensor(noise) for noise in common_noise()])
    log_q_SM = torch.distributions.Normal(mu, sigma).log_prob(x_SME).sum(dim=-1)
    expected = (log_q_SM - prior.log_prob(x_SME)).mean(dim=0).detach().numpy()
    np.testing.assert_allclose(detector("prior_kl", prior=prior).score(**query), expected, rtol=1e-9)
    density = prior.log_prob(mu[None]).reshape(-1).detach().numpy()
    np.testing.assert_allclose(detector("prior_log_density", prior=prior).score(**query), -density, rtol=1e-9)
    plain = detector("prior_kl").score(**query)
    np.testing.assert_array_equal(detector("prior_kl", prior=StandardNormal()).score(**query), plain)


def test_mahalanobis_at_condition_1e11():
    """OOD images differ in the directions of least variance, which float32 or an absolute ridge would lose."""
    rng = np.random.default_rng(0)
    dims, count = 64, 4000
    scale_D = np.logspace(0, -5.5, dims)  # of the covariance: 1 to 1e-11
    rotation_DD = np.linalg.qr(rng.normal(size=(dims, dims)))[0]
    mean_CD = rng.normal(size=(C, dims)) * scale_D * 3

    def sample(count, stretched):
        label = rng.integers(C, size=count)
        x = mean_CD[label] + scale_D * rng.normal(size=(count, dims)) * stretched
        return x @ rotation_DD.T, label

    fit_ND, label_N = sample(count, 1)
    id_MD, _ = sample(1000, 1)
    ood_MD, _ = sample(1000, np.where(np.arange(dims) > dims - 8, 2, 1))
    assert 1e10 < np.linalg.cond(np.cov(fit_ND.T)) < 1e13
    # The distance is invariant under linear maps, so the oracle computes it where the covariance is near the identity.
    upright = {"fit": fit_ND, "id": id_MD, "ood": ood_MD}
    upright = {key: x @ rotation_DD / scale_D for key, x in upright.items()}
    parts = [upright["fit"][label_N == c] for c in range(C)]
    within_DD = np.linalg.inv(sum((part - part.mean(0)).T @ (part - part.mean(0)) for part in parts) / count)
    all_DD = np.linalg.inv(np.cov(upright["fit"].T, bias=True))

    def oracle(x):
        def distance(mean, precision):
            return np.einsum("md,md->m", (x - mean) @ precision, x - mean)

        near = np.min([distance(part.mean(0), within_DD) for part in parts], axis=0)
        far = distance(upright["fit"].mean(0), all_DD)
        return {"mahalanobis": near, "mahalanobis_unlabelled": far, "mahalanobis_relative": near - far}

    expected = {key: oracle(upright[key]) for key in ("id", "ood")}
    for name in expected["id"]:
        ours = detector(name).fit(fit_ND, labels=label_N)
        found = metrics(ours.score(id_MD), ours.score(ood_MD))["auroc"]
        exact_one = metrics(expected["id"][name], expected["ood"][name])["auroc"]
        assert abs(found - exact_one) < 0.002 and exact_one > 0.6, (name, found, exact_one)


@pytest.mark.parametrize("name", DETECTORS)
def test_scores_of_degenerate_features_are_finite(name):
    """Dead and duplicated dimensions, fewer images than dimensions, one image per class, huge logits."""
    rng = np.random.default_rng(0)
    features = np.maximum(rng.normal(size=(9, 16)), 0)
    features[:, 3] = 0
    features[:, 4] = features[:, 5]
    logits = np.vstack([np.eye(3) * 1e4, np.zeros((3, 3)), np.eye(3) * -1e4])
    layers = [features[:, :3], features]
    shape = (9, 4)
    if DETECTORS[name].of_views:
        features = np.stack([features, np.zeros_like(features)], axis=1)
        shape = (9, 2, 4)
    q = {"mu": np.full(shape, 20.0), "sigma": np.full(shape, 0.01), "layers": layers}
    fitted = detector(name).fit(features, labels=np.arange(9) % 5, logits=logits, **q)
    far = {"mu": q["mu"] * -1, "sigma": q["sigma"] * 500, "layers": [x * 1e3 + 1 for x in layers]}
    scores = np.r_[fitted.score(features, logits=logits, **q), fitted.score(features * 1e3 + 1, logits=logits, **far)]
    assert np.isfinite(scores).all()


def test_confident_images_do_not_tie():
    logits = np.array([[40.0, 0, 0], [60.0, 0, 0], [80.0, 0, 0]])
    for name in ("msp", "max_logit", "energy", "softmax_entropy", "odin"):
        score = detector(name).score(np.zeros((3, 1)), logits=logits)
        assert (np.diff(score) < 0).all(), name


def test_missing_and_non_finite_arrays_are_refused(data):
    fit, query, _ = data
    with pytest.raises(ValueError, match="needs labels"):
        detector("mahalanobis").fit(fit["features"])
    with pytest.raises(ValueError, match="needs layers"):
        detector("layers_unlabelled").fit(fit["features"])
    with pytest.raises(ValueError, match="layers contains values that are not finite"):
        detector("layers_unlabelled").fit(fit["features"], layers=[fit["features"], fit["features"] * np.inf])
    with pytest.raises(ValueError, match="needs sigma"):
        detector("sigma_mean").fit(fit["features"]).score(query["features"])
    broken = query["sigma"].copy()
    broken[3, 1] = np.nan
    with pytest.raises(ValueError, match="sigma contains values that are not finite"):
        detector("sigma_mean").score(query["features"], sigma=broken)
    for broken in (fit["features"].astype(np.float64) * 1e200, np.ones((5, 3)), np.ones((1, 3))):
        for name in ("mahalanobis_unlabelled", "mahalanobis_relative"):
            with pytest.raises(ValueError, match="constant or too large"):
                detector(name).fit(broken, labels=np.zeros(len(broken)))
    with pytest.raises(ValueError, match="KnnCosine has not been fitted"):
        detector("knn_cosine").score(query["features"])
    with pytest.raises(ValueError, match="one dimension"):
        detector("sigma_std").score(query["features"], sigma=query["sigma"][:, :1])


def test_no_layer_counts_more_for_its_channels_or_scale():
    """A layer with 20 channels and one with 2, scaled by 1e4: the same shift in deviations gives the same score."""
    rng = np.random.default_rng(0)
    wide, narrow = rng.normal(size=(4000, 20)), 1e4 * rng.normal(size=(4000, 2))
    fitted = detector("layers_unlabelled").fit(wide, layers=[wide, narrow])
    own = fitted.score(wide, layers=[wide, narrow])
    assert abs(own.mean()) < 1e-9
    assert own.std() == pytest.approx(math.sqrt(0.5), rel=0.05)  # the mean of two independent standardized distances
    # Constant layers have no covariance, and a layer of more channels than images has no spread of distances.
    with pytest.raises(ValueError, match="constant"):
        detector("layers_unlabelled").fit(wide, layers=[wide, np.ones((4000, 3))])
    few = [rng.normal(size=(9, 2)), rng.normal(size=(9, 30))]
    scores = detector("layers_unlabelled").fit(wide, layers=few).score(wide, layers=few)
    assert np.isfinite(scores).all() and np.abs(scores).max() < 10


def test_overflow_becomes_the_largest_float():
    near = np.random.default_rng(0).normal(size=(60, 3))
    scores = detector("knn_euclidean").fit(near).score(np.array([[1.0, 0, 0], [1e200, 0, 0]]))
    assert scores[0] < 10 and scores[1] == np.finfo(np.float64).max


@pytest.mark.parametrize(("dims", "removed"), [(40, 20), (768, 512), (2048, 1000)])
def test_vim_removes_as_many_directions_as_published(dims, removed):
    x = np.random.default_rng(0).normal(size=(20, dims))
    assert detector("vim").fit(x, logits=x[:, :3]).minor_DR.shape == (dims, dims - removed)


def test_gen_uses_the_100_largest_probabilities():
    logits = np.random.default_rng(0).normal(size=(7, 150))
    p = np.sort(np.exp(logits) / np.exp(logits).sum(1, keepdims=True), axis=1)[:, -100:]
    expected = ((p * (1 - p)) ** 0.1).sum(1)
    np.testing.assert_allclose(detector("gen").score(np.zeros((7, 1)), logits=logits), expected, rtol=1e-9)


def test_clusters_have_at_least_4_d_images_on_average():
    x = np.random.default_rng(0).normal(size=(330, 12))
    assert len(detector("kmeans_ssd").fit(x).gaussians) == 330 // 48
    assert len(detector("kmeans_ssd").fit(x[:20]).gaussians) == 1


def test_given_classifier_is_used_for_features_that_are_dead_in_training(data):
    """The weight of a feature that is 0 for all training images cannot be computed from their logits."""
    fit, query, weight_CD = data
    dead = np.c_[fit["features"], np.zeros(N)], np.c_[query["features"], np.linspace(0, 9, M)]
    weight = np.c_[weight_CD, np.array([3.0, -1, 0, 0])]
    logits = dead[0] @ weight.T
    given = LinearHead(torch.from_numpy(weight), torch.arange(C).double())
    fitted_head, react = (
        detector("react_energy", classifier=classifier).fit(dead[0], logits=logits).score(dead[1])
        for classifier in (None, given)
    )
    cut = np.minimum(dead[1], np.percentile(dead[0], 90))
    np.testing.assert_allclose(react, -np.log(np.exp(cut @ weight.T + np.arange(C)).sum(1)), rtol=1e-9)
    assert spearmanr(fitted_head, react).statistic < 0.999
    vim = detector("vim", classifier=given).fit(dead[0], logits=logits)
    np.testing.assert_allclose(vim.origin_D, -np.linalg.pinv(weight) @ np.arange(C), atol=1e-9)


def bhattacharyya_scores(mu, sigma, mu2, sigma2):
    fitted = detector("posterior_bhattacharyya").fit(mu2, mu=mu2, sigma=sigma2)
    return fitted.score(mu, mu=mu, sigma=sigma)


@pytest.mark.parametrize("k", [1, 7, 99])
def test_bhattacharyya_over_the_whole_range_of_sigma(k, monkeypatch):
    monkeypatch.setattr(label_free, "K_POSTERIORS", k)
    rng = np.random.default_rng(0)
    mu, mu2 = rng.normal(4, 3, (40, 64)), rng.normal(4, 3, (30, 64))
    sigma, sigma2 = (np.exp(rng.uniform(math.log(0.01), math.log(5), (n, 64))) for n in (40, 30))
    table = np.array([[bhattacharyya(*a, *b) for b in zip(mu2, sigma2)] for a in zip(mu, sigma)])
    found = bhattacharyya_scores(mu, sigma, mu2, sigma2)
    np.testing.assert_allclose(found, np.sort(table, axis=1)[:, min(k, 30) - 1], rtol=1e-9)


@pytest.mark.parametrize("dims", [128, 1024])
def test_bhattacharyya_where_sigma_is_small_compared_with_mu(dims):
    """50 tight clusters far from each other: with squares expanded in float32, distances would be off by 1 %."""
    rng = np.random.default_rng(0)
    center = rng.normal(0, 3, (50, dims))
    mu, mu2 = (center[rng.integers(50, size=n)] + 0.02 * rng.normal(size=(n, dims)) for n in (60, 400))
    sigma, sigma2 = (0.01 * np.exp(0.2 * rng.normal(size=(n, dims))) for n in (60, 400))
    expected = [sorted(bhattacharyya(*a, *b) for b in zip(mu2, sigma2))[4] for a in zip(mu, sigma)]
    np.testing.assert_allclose(bhattacharyya_scores(mu, sigma, mu2, sigma2), expected, rtol=1e-6)


def test_ridge_grows_only_where_needed():
    x = torch.from_numpy(np.random.default_rng(0).normal(size=(500, 5)))
    covariance = fit_gaussian(x).factor_DD @ fit_gaussian(x).factor_DD.T
    np.testing.assert_allclose(covariance, np.cov(x.T.numpy(), bias=True), rtol=1e-11, atol=1e-12)
    twice = torch.cat([x, x], dim=1)  # of rank 5 in 10 dimensions
    assert torch.isfinite(fit_gaussian(twice).distance(twice)).all()


def test_minimum_norm_head_reproduces_the_classifier(data):
    fit, _, weight_CD = data
    found_CD, bias_C = minimum_norm_head(torch.tensor(fit["features"]).double(), torch.tensor(fit["logits"]).double())
    np.testing.assert_allclose(found_CD, weight_CD, atol=1e-8)
    np.testing.assert_allclose(fit["features"] @ found_CD.numpy().T + bias_C.numpy(), fit["logits"], atol=1e-6)


def test_odin_moves_every_pixel_towards_the_predicted_class():
    torch.manual_seed(0)
    weight = torch.randn(3, 12)
    images, std = torch.randn(5, 3, 2, 2), (0.5, 0.25, 0.2)
    moved = perturb_for_odin(lambda x: x.flatten(1) @ weight.T, images, std)
    logits = images.flatten(1) @ weight.T / 1000
    slope = weight[logits.argmax(1)] - logits.softmax(1) @ weight  # gradient of log p(predicted class)
    step = 0.0014 * slope.sign().view(5, 3, 2, 2) / torch.tensor(std).view(3, 1, 1)
    torch.testing.assert_close(moved - images, step, atol=1e-6, rtol=1e-4)


# --- metrics -------------------------------------------------------------------------------------


def scores_with_ties(seed, n=300, m=170):
    rng = np.random.default_rng(seed)
    return np.round(rng.normal(0, 1, n), 1), np.round(rng.normal(0.7, 1.5, m), 1)


def sklearn_metrics(id_scores, ood_scores):
    y, s = np.r_[np.zeros(len(id_scores)), np.ones(len(ood_scores))], np.r_[id_scores, ood_scores]
    fpr, tpr, _ = roc_curve(y, s, drop_intermediate=False)
    fpr_in, tpr_in, _ = roc_curve(1 - y, -s, drop_intermediate=False)
    return {
        "auroc": roc_auc_score(y, s),
        "aupr_in": average_precision_score(1 - y, -s),
        "aupr_out": average_precision_score(y, s),
        "fpr95_ood_positive": min(f for f, t in zip(fpr, tpr) if t >= 0.95),
        "fpr95_id_positive": min(f for f, t in zip(fpr_in, tpr_in) if t >= 0.95),
    }


@pytest.mark.parametrize("seed", range(5))
def test_metrics_equal_scikit_learns_with_ties(seed):
    id_scores, ood_scores = scores_with_ties(seed)
    assert len(np.unique(id_scores)) < 100
    found = metrics(id_scores, ood_scores)
    assert found == pytest.approx(sklearn_metrics(id_scores, ood_scores), abs=1e-12)
    for rescaled in (lambda x: np.exp(x) * 1e-300, lambda x: 1e300 * x**3, lambda x: np.arctan(x)):
        assert metrics(rescaled(id_scores), rescaled(ood_scores)) == found  # digit for digit
    turned = metrics(-id_scores, -ood_scores)
    assert turned["auroc"] == pytest.approx(1 - found["auroc"], abs=1e-12)


def test_metrics_of_a_small_example():
    """Ten ID scores 0..9; OOD 9.5 twice and 4.5: detecting all three misclassifies five ID images as OOD."""
    found = metrics(torch.arange(10), [9.5, 9.5, 4.5])
    assert found["auroc"] == pytest.approx(25 / 30) and found["fpr95_ood_positive"] == 0.5
    assert found["fpr95_id_positive"] == pytest.approx(1 / 3)
    assert metrics([0, 1], [2, 3]) == {"auroc": 1, "aupr_in": 1, "aupr_out": 1, "fpr95_ood_positive": 0,
                                       "fpr95_id_positive": 0}  # fmt: skip
    assert metrics([1, 1], [1, 1])["auroc"] == 0.5
    assert metrics([-np.inf, 0], [np.inf, 1])["auroc"] == 1


@pytest.mark.parametrize("scores", [([0.0, np.nan], [1.0]), ([0.0], [np.nan]), ([], [1.0]), ([[0.0]], [1.0])])
def test_invalid_scores_are_refused(scores):
    with pytest.raises(ValueError, match="scores"):
        metrics(*scores)


def test_bootstrap_metrics_equal_metrics_of_each_resample():
    id_scores, ood_scores = scores_with_ties(0)
    id_rows, ood_rows = resample(len(id_scores), [0, 0]), resample(len(ood_scores), [0, 1])
    assert id_rows.shape == (RESAMPLES, 300) and not np.array_equal(id_rows[0], id_rows[1])
    assert not np.array_equal(id_rows, resample(300, [0, 1]))
    found = bootstrap_metrics(id_scores, ood_scores, id_rows, ood_rows)
    assert tuple(found) == METRICS
    for r in range(0, RESAMPLES, 100):
        expected = metrics(id_scores[id_rows[r]], ood_scores[ood_rows[r]])
        assert {name: values[r] for name, values in found.items()} == pytest.approx(expected, abs=1e-12)
    # The spread of AUROC over resamples is DeLong's standard error.
    pairs = (ood_scores[:, None] > id_scores) + 0.5 * (ood_scores[:, None] == id_scores)
    error = math.sqrt(pairs.mean(axis=0).var() / 300 + pairs.mean(axis=1).var() / 170)
    assert found["auroc"].std() == pytest.approx(error, rel=0.1)  # 1,000 draws: 2 % of the error itself


def test_bhattacharyya_distances_of_many_images_take_no_more_memory():
    """Each image once kept 6 MB: 17 GB for the images of an evaluation."""
    rng = np.random.default_rng(0)
    mu, sigma = rng.standard_normal((1000, 1024)), rng.uniform(0.05, 0.5, (1000, 1024))
    fitted = detector("posterior_bhattacharyya").fit(features=mu, mu=mu, sigma=sigma)

    def resident_bytes():
        return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGESIZE")

    fitted.score(features=mu[:4], mu=mu[:4], sigma=sigma[:4])
    before = resident_bytes()
    fitted.score(features=mu[:100], mu=mu[:100], sigma=sigma[:100])
    assert resident_bytes() - before < 100e6  # 560 MB before
