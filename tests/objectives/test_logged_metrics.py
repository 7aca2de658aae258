"""Metrics that training logs: the effective rank of embeddings."""

import math

import numpy as np
import pytest
import torch

from fastssl.objectives.metrics import rankme


def test_rankme_equals_its_definition():
    z = torch.randn(20, 6, generator=torch.Generator().manual_seed(0))
    singular = np.linalg.svd(z.double().numpy(), compute_uv=False)
    shares = singular / singular.sum() + 1e-7
    want = np.exp(-(shares * np.log(shares)).sum())
    assert rankme(z) == pytest.approx(want, rel=1e-6) and rankme(z.T) == pytest.approx(want, rel=1e-6)


def test_rankme_counts_dimensions():
    """Orthogonal columns: as many as there are; the same vector for all images: one; noise on it: a little more."""
    generator = torch.Generator().manual_seed(0)
    orthogonal, _ = torch.linalg.qr(torch.randn(20, 6, generator=generator))
    assert rankme(orthogonal) == pytest.approx(6, abs=1e-3)
    collapsed = torch.randn(1, 6, generator=generator).expand(20, 6)
    assert rankme(collapsed) == pytest.approx(1, abs=1e-3)
    assert 1 < rankme(collapsed + 0.01 * torch.randn(20, 6, generator=generator)) < 1.5


def test_rankme_of_degenerate_embeddings():
    assert math.isnan(rankme(torch.full((4, 3), float("nan"))))
    assert math.isnan(rankme(torch.tensor([[float("inf"), 0.0], [1.0, 2.0]])))
    assert rankme(torch.zeros(4, 3)) == pytest.approx(1, abs=1e-3)  # total collapse
