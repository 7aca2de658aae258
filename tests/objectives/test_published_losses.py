"""Our losses next to those of lightly, with the same random directions: `pip install --no-deps lightly==1.6.0`."""

import pytest
import torch

from fastssl.objectives import sigreg_loss, visreg_loss
from fastssl.objectives.batch import random_directions


def views_and_directions(monkeypatch, slices):
    """Two views of 64 embeddings; lightly, which calls torch.randn for its directions, then gets ours of step 4."""
    first, noise = torch.randn(2, 64, 16, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    directions = random_directions(0, 4, slices, first).double()
    monkeypatch.setattr(torch, "randn", lambda *shape, **_: directions.T.reshape(shape))
    return (2 * first + 0.3).requires_grad_(), (first + 0.5 * noise).requires_grad_()


def assert_equal_losses_and_gradients(ours, theirs, views):
    """To fp32, in which lightly computes its constants."""
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=0)
    for got, want in zip(torch.autograd.grad(ours, views), torch.autograd.grad(theirs, views), strict=True):
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-8)


def test_sigreg_is_lightlys(monkeypatch):
    """lightly needs small crops: here the two views again, which changes no mean."""
    lejepa_loss = pytest.importorskip("lightly.loss.lejepa_loss")
    views = views_and_directions(monkeypatch, slices=100)
    both = torch.stack(views)
    theirs = lejepa_loss.LeJEPALoss(sigreg_num_vectors=100)(local_proj=both, global_proj=both)
    assert_equal_losses_and_gradients(sigreg_loss(*views, slices=100, step=4), theirs, views)


def test_visreg_is_lightlys(monkeypatch):
    """lightly adds 1e-4 to the deviations, as the paper does; the authors' code and we do not."""
    visreg = pytest.importorskip("lightly.loss.visreg_loss")
    views = views_and_directions(monkeypatch, slices=100)
    both = torch.stack(views)
    theirs = visreg.VISRegLoss(num_slices=100, eps=1e-12)(local_proj=both, global_proj=both)
    assert_equal_losses_and_gradients(visreg_loss(*views, slices=100, step=4), theirs, views)
