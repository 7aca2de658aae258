"""Objective plus beta times KL: warm-up, free bits, both spaces, and logged metrics."""

import pytest
import torch
from small_models import recipe_of

from fastssl.common.errors import UserError
from fastssl.models import DiagonalGaussian, Draws, StandardNormal, ViewOutput
from fastssl.objectives import TotalLoss, barlow_twins_loss, sigreg_loss
from fastssl.recipe import Recipe, load_recipe

B, D, S = 5, 4, 3


def view(seed, spaces="z", log_var=None):
    generator = torch.Generator().manual_seed(seed)
    draws = {}
    for space in spaces:
        mu, raw = torch.randn(2, B, D, generator=generator, dtype=torch.float64)
        q = DiagonalGaussian(mu, raw if log_var is None else torch.full_like(raw, log_var))
        draws[space] = Draws(q, q.rsample(S, torch.randn(S, B, D, generator=generator, dtype=torch.float64)))
    z = draws[spaces[-1]].x_SBD
    return ViewOutput(h=z.mean(0), z=z, draws=draws, target=None)


def terms_of(first, second, step=0, beta_warmup_steps=0, **embedding) -> dict:
    recipe = recipe_of({"name": "barlow_twins"}, {"stochastic": "z", **embedding})
    priors = {space: StandardNormal() for space in first.draws}
    return TotalLoss(recipe, beta_warmup_steps)((first, second), priors, step)


def kl_reference(v, space="z"):
    q = v.draws[space].q
    return 0.5 * (q.mu**2 + q.sigma**2 - 1 - 2 * q.sigma.log()).sum(-1)


def test_loss_is_objective_plus_beta_times_the_mean_kl():
    first, second = view(0), view(1)
    terms = terms_of(first, second, beta=0.3)
    kl = (kl_reference(first).mean() + kl_reference(second).mean()) / 2
    want = barlow_twins_loss(first.z, second.z) + 0.3 * kl
    torch.testing.assert_close(terms["loss"], want)
    torch.testing.assert_close(terms["kl_z"], kl)
    torch.testing.assert_close(terms["kl_per_dim_z"], kl / D)
    torch.testing.assert_close(terms["loss"], terms["on_diagonal"] + terms["off_diagonal"] + terms["beta_kl"])


def test_kl_of_both_spaces_is_added():
    first, second = view(0, "hz"), view(1, "hz")
    terms = terms_of(first, second, stochastic="hz", beta=0.3)
    kls = [sum(kl_reference(v, space).mean() for v in (first, second)) / 2 for space in "hz"]
    torch.testing.assert_close(terms["beta_kl"], 0.3 * sum(kls))
    torch.testing.assert_close(torch.stack([terms["kl_h"], terms["kl_z"]]), torch.stack(kls))


def test_monte_carlo_kl_uses_the_draws_of_the_objective():
    first, second = view(0), view(1)
    terms = terms_of(first, second, kl="mc")
    want = 0.0
    for v in (first, second):
        q, x = v.draws["z"]
        normal = torch.distributions.Normal(q.mu, q.sigma)
        want = want + (normal.log_prob(x) - torch.distributions.Normal(0.0, 1.0).log_prob(x)).sum(-1).mean() / 2
    torch.testing.assert_close(terms["kl_z"], want)


@pytest.mark.parametrize("step, share", [(0, 0.05), (9, 0.5), (19, 1.0), (500, 1.0)])
def test_beta_grows_linearly_over_its_warm_up(step, share):
    first, second = view(0), view(1)
    full = terms_of(first, second)["beta_kl"]
    grown = terms_of(first, second, step=step, beta_warmup_steps=20)["beta_kl"]
    torch.testing.assert_close(grown, share * full)
    as_tensor = terms_of(first, second, step=torch.tensor(step), beta_warmup_steps=20)["beta_kl"]
    torch.testing.assert_close(as_tensor, grown)


def test_kl_of_an_image_below_free_bits_has_no_gradient():
    first, second = view(0), view(1)
    floor = kl_reference(first).median().item()  # one of the five images is at it, two are below
    mu = [v.draws["z"].q.mu.requires_grad_() for v in (first, second)]
    terms = terms_of(first, second, beta=1.0, free_bits=floor / D)
    want = sum(kl_reference(v).clamp_min(floor).mean() for v in (first, second)) / 2
    torch.testing.assert_close(terms["beta_kl"], want)
    torch.testing.assert_close(terms["kl_z"], sum(kl_reference(v).mean() for v in (first, second)).detach() / 2)
    (gradient,) = torch.autograd.grad(terms["beta_kl"], mu[:1])
    below = kl_reference(first) < floor - 1e-9
    assert (
        below.sum() == 2 and (gradient[below] == 0).all() and (gradient[kl_reference(first) > floor + 1e-9] != 0).all()
    )


def test_sigma_metrics():
    first, second = view(0, log_var=-99.0), view(1, log_var=0.0)
    terms = terms_of(first, second)
    logged = {name: terms[f"{name}_z"].item() for name in ("sigma", "sigma_min", "sigma_max", "sigma_clamped")}
    assert logged == pytest.approx({"sigma": 0.505, "sigma_min": 0.01, "sigma_max": 1.0, "sigma_clamped": 0.5})
    learned_from = {"loss", "on_diagonal", "off_diagonal", "beta_kl"}
    assert not any(terms[name].requires_grad for name in terms.keys() - learned_from)


@pytest.mark.parametrize("chunk", [None, 2])
def test_directions_are_those_of_seed_and_step_whatever_the_chunk(chunk):
    first, second = view(0), view(1)
    recipe = recipe_of({"name": "sigreg", "slices": 5}, {"stochastic": "z", "chunk": chunk})
    recipe = recipe.model_copy(update={"seed": 7})
    for step in (0, 9):
        terms = TotalLoss(recipe)((first, second), {"z": StandardNormal()}, torch.tensor(step))
        want = sigreg_loss(first.z, second.z, slices=5, seed=7, step=step)
        torch.testing.assert_close(terms["invariance"] + terms["sigreg"], want)


@pytest.mark.parametrize(
    "override, message",
    [
        ("objective={name: simclr, over_draws: log_mean_exp}", "needs draws"),
        ("embedding={stochastic: z, prior: vamp, kl: closed}", "set embedding.kl=mc"),
        ("probe.split=rest", "set data.limit"),
        ("embedding.stochastic=zh", "hz"),
        ("embedding={stochastic: z, prior: vamp, mixture_mode: per_dim}", "always joint"),
        ("embedding={stochastic: hz, prior: mixture, mixture_mode: reference}", "joint or per_dim"),
        (
            "objective={name: byol, lambd: 1}",
            "objective.lambd belongs to barlow_twins, sigreg or visreg: .* .objective={name: byol}",
        ),
        (
            "objective.name=simclr",
            "objective.lambd belongs to barlow_twins, sigreg or visreg: .* .objective={name: simclr}",
        ),
        ("objective={name: sigreg, lambd: 2}", "objective.lambd must be 1 or less, got 2"),
        ("objective={name: simclr, temprature: 1}", "objective.temprature: did you mean objective.temperature"),
        ("optim.options.foo=abc", "optim.options.foo must be a number, true, false or a list of numbers, got 'abc'"),
        ("objective={lambd: 1}", "barlow_twins, vicreg, simclr, byol, sigreg, visreg or supervised"),
    ],
)
def test_contradictory_keys_are_refused(override, message):
    with pytest.raises(UserError, match=message):
        load_recipe("recipes/barlow.yaml", [override])


def test_an_average_inside_the_logarithm_cannot_be_chunked():
    with pytest.raises(UserError, match="embedding.chunk cannot split the draws of objective.name=simclr"):
        mcinfonce = "objective={name: simclr, over_draws: log_mean_exp}"
        load_recipe("recipes/zprob_barlow.yaml", [mcinfonce, "embedding.chunk=4"])


def test_every_key_has_its_default_in_the_dump():
    recipe = Recipe.model_validate({"name": "x", "data": {"train": "x"}, "objective": {"name": "simclr"}})
    assert "over_draws: mean" in recipe.to_yaml() and "beta_warmup_epochs: 0" in recipe.to_yaml()
