"""Mutual information: estimators against Gaussians, whose value is known, and what they do at their limits."""

import math

import numpy as np
import pytest
import torch

from fastssl.evaluation.mutual_information import ESTIMATORS, estimate, estimators


def gaussians(count: int, dims: int, nats: float, seed: int = 0, turned: bool = True):
    """x and y of unit variance, every dimension of x correlated with one of y, I(X; Y) = nats; turned: linearly mixed,
    which keeps it."""
    generator = torch.Generator().manual_seed(seed)
    x, noise = torch.randn(2, count, dims, generator=generator, dtype=torch.float64)
    rho = math.sqrt(1 - math.exp(-2 * nats / dims))
    y = rho * x + math.sqrt(1 - rho**2) * noise
    if turned:
        x, y = (data @ torch.randn(dims, dims, generator=generator, dtype=torch.float64) for data in (x, y))
    return x, y


# d = 20, 4 nats from 10,000 samples: the log density ratio has sd 2.6, so the mean over them 0.026; critics cost 0.04.
@pytest.mark.slow
@pytest.mark.parametrize("name", ESTIMATORS)
def test_every_estimator_finds_four_nats(name):
    assert estimate(*gaussians(10_000, 20, 4.0), name).nats == pytest.approx(4.0, rel=0.07)


@pytest.mark.parametrize("name", ESTIMATORS)
def test_never_anything_but_a_number(name, monkeypatch):
    monkeypatch.setattr(estimators, "STEPS", 30)
    generator = np.random.default_rng(0)
    x = generator.normal(size=(100, 3))
    cases = {
        "identical": (x, x),
        "constant": (x, np.ones((100, 2))),
        "both constant": (np.zeros(100), np.ones(100)),
        "constant column": (np.hstack([x, np.full((100, 1), 7.0)]), x),
        "huge": (1e300 * x, -1e300 * x),
        "tiny": (1e-300 * x, x),
        "outlier": (np.vstack([x[:-1], np.full((1, 3), 1e30)]), x),
        "float16": ((x * 1000).astype(np.float16), torch.from_numpy(x).half()),
        "few": (x[:41], x[:41]),
        "fewer": (x[:3], x[:3]),
        "one": (x[:1], x[:1]),
        "integers": (np.arange(100), np.arange(100) % 2),
        "wide": (generator.normal(size=(60, 300)), x[:60]),
    }
    for case, (one, other) in cases.items():
        found = estimate(one, other, name)
        assert all(math.isfinite(number) for number in found[:5]), case
        assert all(math.isfinite(nats) for _, nats in found.curve), case
        assert found.nats <= found.ceiling, case
    for bad in (math.nan, math.inf):
        with pytest.raises(ValueError, match="not finite"):
            estimate(np.where(x > 2, bad, x), x, name)
