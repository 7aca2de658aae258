"""The self-supervised model: draws and their noise, chunks, BYOL's target, embeddings."""

import copy

import pytest
import torch
from small_models import recipe_of

from fastssl.common.randomness import NOISE_H, NOISE_Z, normals
from fastssl.models import ModelInput, SSLModel, VampPrior
from fastssl.objectives import TotalLoss

BARLOW = {"name": "barlow_twins"}
BYOL = {"name": "byol", "predictor_hidden": 16}
OBJECTIVES = [BARLOW, {"name": "vicreg"}, {"name": "simclr"}, BYOL, {"name": "sigreg"}, {"name": "visreg"}]
SPACES = ["none", "z", "h", "hz"]
B, S = 6, 3


def inputs(batch=B, dtype=torch.float64):
    """Two views of `batch` images; their first rows are the same for every batch size."""
    first, noise = torch.randn(2, 16, 3, 32, 32, generator=torch.Generator().manual_seed(0), dtype=dtype)[:, :batch]
    label = torch.full((batch,), -1)
    return ModelInput((first, first + 0.3 * noise), label, torch.arange(50, 50 + batch), torch.tensor(4))


def model_of(objective, embedding):
    torch.manual_seed(0)
    return SSLModel(recipe_of(objective, embedding)).double()


@pytest.mark.parametrize("objective", OBJECTIVES, ids=lambda o: o["name"])
@pytest.mark.parametrize("stochastic", SPACES)
def test_every_objective_and_embedding_gives_all_parameters_gradients(objective, stochastic):
    embedding = {"stochastic": stochastic, "prior": "mixture"}
    model = model_of(objective, embedding)
    views = model(inputs())
    for view in views:
        assert view.h.shape == (B, model.encoder.num_features) and model.mean_z(view.h).shape == (B, 8)
        assert view.z.shape == ((B, 8) if stochastic == "none" else (S, B, 8))
        assert list(view.draws) == [space for space in "hz" if space in stochastic and stochastic != "none"]
    terms = TotalLoss(recipe_of(objective, embedding))(views, model.priors, 0)
    terms["loss"].backward()
    learns = {name for name, p in model.named_parameters() if p.grad is not None and p.grad.abs().sum() > 0}
    still = {name for name, _ in model.named_parameters()} - learns
    assert still == {name for name, _ in model.named_parameters() if name.startswith("target.")}


def test_draws_are_mu_plus_sigma_times_counter_based_noise():
    """H-prob: each draw of h through the projector by itself, with its own batch statistics."""
    model, batch = model_of(BARLOW, {"stochastic": "h"}), inputs()
    loop = copy.deepcopy(model)
    view, _ = model(batch)
    q, h_SBD = view.draws["h"]
    assert torch.equal(h_SBD, q.mu + q.sigma * normals(0, batch.step, batch.index, 0, S, q.mu.shape[1], NOISE_H))
    torch.testing.assert_close(view.z, torch.stack([loop.projector(h) for h in h_SBD]))
    assert torch.equal(view.h, q.mu)


def test_each_draw_of_h_leads_to_one_draw_of_z():
    """hz: z_s ~ q(z | h_s), so the Gaussian of z has S * B rows, in the order of the draws."""
    model = model_of(BARLOW, {"stochastic": "hz"})
    plain = copy.deepcopy(model)
    view, _ = model(inputs())
    (_, h_SBD), (q_z, z) = view.draws["h"], view.draws["z"]
    assert q_z.mu.shape == (S * B, 8) and z.shape == (1, S * B, 8)
    for s in range(S):
        of_draw = plain.heads["z"](plain.projector(h_SBD[s]))
        torch.testing.assert_close(q_z.mu.view(S, B, 8)[s], of_draw.mu)
    assert torch.equal(view.z, z.view(S, B, 8))
    _, _, index, step = inputs()
    noise = normals(0, step, index, 0, S, 8, NOISE_Z)
    torch.testing.assert_close(((z - q_z.mu) / q_z.sigma).view(S, B, 8), noise.double())
    assert not torch.equal(noise, normals(0, step, index, 0, S, 8, NOISE_H))


@pytest.mark.parametrize("stochastic", ["z", "h", "hz"])
def test_noise_of_an_image_does_not_depend_on_the_batch(stochastic):
    """Standardized draws of the first four images, in a batch of four and of six, eager and compiled."""
    got = []
    for batch, compiled in ((6, False), (4, False), (4, True)):
        model = model_of(BARLOW, {"stochastic": stochastic})
        forward = torch.compile(model, fullgraph=True, dynamic=False, backend="aot_eager") if compiled else model
        view, _ = forward(inputs(batch))
        (q, x) = view.draws[stochastic[0]]
        got.append(((x - q.mu) / q.sigma)[:, :4])
    torch.testing.assert_close(got[0], got[1], rtol=0, atol=1e-12)
    torch.testing.assert_close(got[0], got[2], rtol=0, atol=1e-12)


@pytest.mark.parametrize("stochastic", ["z", "h", "hz"])
@pytest.mark.parametrize("objective", OBJECTIVES, ids=lambda o: o["name"])
def test_chunks_change_only_memory(objective, stochastic):
    """Loss, gradients and running statistics; three draws in chunks of two."""
    results = []
    for chunk in (None, 2):
        embedding = {"stochastic": stochastic, "chunk": chunk}
        model = model_of(objective, embedding)
        terms = TotalLoss(recipe_of(objective, embedding))(model(inputs()), model.priors, 0)
        terms["loss"].backward()
        gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
        results.append((terms, gradients, dict(model.named_buffers())))
    torch.testing.assert_close(results[0], results[1], rtol=1e-9, atol=1e-10)


def test_chunks_save_fewer_numbers_for_the_backward_pass():
    """Twelve draws in chunks of one save less than a third of the numbers of twelve in one pass, without the encoder.

    h and z of each draw are saved; the activations of projector and objective are not.
    """

    def count_saved(chunk):
        recipe, sizes = recipe_of(BARLOW, {"stochastic": "h", "samples": 12, "chunk": chunk}, hidden=64, out=64), []
        torch.manual_seed(0)
        model = SSLModel(recipe).double()
        model.encoder = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.AdaptiveAvgPool1d(model.encoder.num_features))
        with torch.autograd.graph.saved_tensors_hooks(lambda t: sizes.append(t.numel()) or t, lambda t: t):
            TotalLoss(recipe)(model(inputs()), model.priors, 0)
        return sum(sizes)

    assert count_saved(1) < count_saved(None) / 3


# --- BYOL ------------------------------------------------------------------------------------------


def test_byol_target_starts_as_the_online_network_and_follows_it_slowly():
    model = model_of(BYOL, {"stochastic": "z"})
    online = [p for part in (model.encoder, model.projector, model.heads) for p in part.parameters()]
    target = list(model.target.parameters())
    assert len(online) == len(target) and all(torch.equal(a, b) for a, b in zip(online, target))
    assert not any(p.requires_grad for p in target)
    with torch.no_grad():
        for p in online:
            p.add_(1.0)
    before = [p.clone() for p in target]
    model.update_target(0.9, skip=torch.tensor(True))  # a step that was left out
    assert all(torch.equal(old, now) for old, now in zip(before, target))
    model.update_target(0.9, skip=torch.tensor(False))
    for old, now in zip(before, target):
        torch.testing.assert_close(now, old + 0.1)


@pytest.mark.parametrize("stochastic", SPACES)
def test_byol_target_is_the_mean_embedding_of_each_view(stochastic):
    model, batch = model_of(BYOL, {"stochastic": stochastic}), inputs()
    reference = copy.deepcopy(model.target)
    view, other = model(batch)
    h = reference.encoder(batch.views[0])
    h = reference.heads["h"](h).mu if "h" in stochastic else h
    z = reference.projector(h)
    z = reference.heads["z"](z).mu if "z" in stochastic else z
    torch.testing.assert_close(view.target, z)
    assert not view.target.requires_grad and not torch.allclose(view.target, other.target)


@pytest.mark.parametrize("stochastic", SPACES)
@pytest.mark.parametrize("objective", [BARLOW, BYOL], ids=lambda o: o["name"])
def test_mean_z_shows_a_collapse_that_noise_hides(objective, stochastic):
    """The same h for every image and sigma 1: draws have full rank, z without noise has one row."""
    model = model_of(objective, {"stochastic": stochastic})
    model(inputs())  # running statistics
    h = torch.randn(1, model.encoder.num_features, dtype=torch.float64).expand(B, -1)
    before = copy.deepcopy(model.state_dict())
    z = model.mean_z(h)
    assert z.shape == (B, 8) and not z.requires_grad
    torch.testing.assert_close(z, z[:1].expand(B, -1))
    torch.testing.assert_close(dict(model.state_dict()), dict(before), rtol=0, atol=0)
    assert model.training and model.projector.training


# --- Embeddings for users ----------------------------------------------------------------------------


@pytest.mark.parametrize("stochastic", SPACES)
def test_embed_returns_the_mean_and_does_not_change_batch_statistics(stochastic):
    model = model_of(BYOL if stochastic == "hz" else BARLOW, {"stochastic": stochastic})
    before = copy.deepcopy(model.state_dict())
    embedding = model.embed(inputs().views[0])
    torch.testing.assert_close(dict(model.state_dict()), dict(before), rtol=0, atol=0)
    assert model.training and embedding.h.shape == (B, model.encoder.num_features)
    assert embedding.space == {"none": None, "z": "z", "h": "h", "hz": "h"}[stochastic]
    if stochastic != "none":
        assert embedding.mu.shape == embedding.sigma.shape and (embedding.sigma > 0).all()
        assert torch.equal(embedding.h, embedding.mu) == (embedding.space == "h")


def test_a_vamp_prior_shares_its_head_with_the_embedding():
    model = model_of(BARLOW, {"stochastic": "hz", "prior": "vamp", "mixture_components": 4})
    for space, prior in model.priors.items():
        assert isinstance(prior, VampPrior) and prior.head is model.heads[space] and prior.pseudo.shape[0] == 4
    copied = model_of(BARLOW, {"stochastic": "hz", "prior": "vamp", "mixture_components": 4})
    copied.load_state_dict(model.state_dict())
    assert copied.priors["z"].head is copied.heads["z"]
