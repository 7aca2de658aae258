"""The objectives against their formulas in NumPy loops, in float64."""

import inspect
import itertools

import numpy as np
import pytest
import scipy.stats
import torch

from fastssl.models import ViewOutput
from fastssl.objectives import (
    barlow_twins_loss,
    byol_loss,
    cross_entropy_loss,
    sigreg_loss,
    simclr_loss,
    vicreg_loss,
    visreg_loss,
)
from fastssl.objectives.batch import random_directions
from fastssl.objectives.total import TERMS
from fastssl.recipe import OBJECTIVES, BarlowTwinsConfig, SIGRegConfig, SlicedConfig, VICRegConfig, VISRegConfig
from fastssl.training.schedule import target_momentum

LOSSES = [barlow_twins_loss, vicreg_loss, simclr_loss, sigreg_loss, visreg_loss]
# float64 on both sides, a few hundred additions in another order: 1e-12 is 10^4 roundings.
CLOSE = dict(rtol=1e-12, atol=1e-12)


def two_views(*shape, seed=0, dtype=torch.float64):
    """Correlated views with unequal means and scales, so that every convention matters."""
    generator = torch.Generator().manual_seed(seed)
    first, noise = torch.randn((2, *shape), generator=generator, dtype=torch.float64)
    scale = torch.linspace(0.3, 2.0, shape[-1], dtype=torch.float64)
    return (scale * first + 1).to(dtype), (scale * (first + 0.5 * noise) - 2).to(dtype)


def barlow_twins_reference(z1, z2, lambd, unbiased, eps):
    B, D = z1.shape

    def normalized(z):
        out = np.empty_like(z)
        for d in range(D):
            mean = sum(z[:, d]) / B
            var = sum((z[:, d] - mean) ** 2) / (B - 1 if unbiased else B)
            out[:, d] = (z[:, d] - mean) / np.sqrt(var + eps)
        return out

    zn1, zn2 = normalized(z1), normalized(z2)
    loss = 0.0
    for i, j in itertools.product(range(D), range(D)):
        c = sum(zn1[b, i] * zn2[b, j] for b in range(B)) / B
        loss += (c - 1) ** 2 if i == j else lambd * c**2
    return loss


def vicreg_reference(z1, z2, inv, var, cov, gamma, eps, center):
    B, D = z1.shape
    c1, c2 = z1 - z1.mean(0), z2 - z2.mean(0)
    first, second = (c1, c2) if center else (z1, z2)
    invariance = sum(sum((first[b] - second[b]) ** 2) for b in range(B)) / (B * D)
    variance = covariance = 0.0
    for c in (c1, c2):
        C = sum(np.outer(c[b], c[b]) for b in range(B)) / (B - 1)
        variance += sum(max(0.0, gamma - np.sqrt(C[d, d] + eps)) for d in range(D)) / D / 2
        covariance += sum(C[i, j] ** 2 for i in range(D) for j in range(D) if i != j) / D
    return inv * invariance + var * variance + cov * covariance


def terms_of(config, *zs):
    """The weighted terms of an objective, from embeddings only, at the first step of a run with seed 0."""
    directions = [random_directions(0, 0, config.slices, zs[0])] if isinstance(config, SlicedConfig) else []
    return TERMS[config.name](tuple(ViewOutput(z, z, {}, None) for z in zs), config, *directions)


SHAPES = [(7, 4), (3, 7)]  # many samples for the dimensions and few: products of D x D or of B x B


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("unbiased", [False, True])
@pytest.mark.parametrize("eps", [0.0, 1e-5, 0.3])
@pytest.mark.parametrize("lambd", [5e-3, 0.7])
def test_barlow_twins_equals_its_formula(lambd, unbiased, eps, shape):
    z1, z2 = two_views(*shape)
    got = barlow_twins_loss(z1, z2, lambd=lambd, unbiased=unbiased, eps=eps)
    want = barlow_twins_reference(z1.numpy(), z2.numpy(), lambd, unbiased, eps)
    np.testing.assert_allclose(got.item(), want, **CLOSE)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("center", [False, True])
@pytest.mark.parametrize("gamma, eps", [(1.0, 1e-4), (1.5, 0.0), (0.7, 0.2)])
@pytest.mark.parametrize("inv, var, cov", [(25.0, 25.0, 1.0), (2.0, 3.0, 5.0), (0, 1, 0)])
def test_vicreg_equals_its_formula(inv, var, cov, gamma, eps, center, shape):
    z1, z2 = two_views(*shape)
    weights = dict(inv=inv, var=var, cov=cov, gamma=gamma, eps=eps, center=center)
    got = vicreg_loss(z1, z2, **weights)
    np.testing.assert_allclose(got.item(), vicreg_reference(z1.numpy(), z2.numpy(), **weights), **CLOSE)


def simclr_reference(z1, z2, temperature):
    """(2B,): -log p of every anchor."""
    z = np.concatenate((z1, z2))
    B, losses = len(z1), []
    for a in range(2 * B):
        cosines = [z[a] @ z[k] / np.linalg.norm(z[a]) / np.linalg.norm(z[k]) for k in range(2 * B)]
        exps = np.exp(np.array(cosines) / temperature)
        losses.append(-np.log(exps[(a + B) % (2 * B)] / (exps.sum() - exps[a])))
    return np.array(losses)


@pytest.mark.parametrize("temperature", [0.1, 0.7])
def test_simclr_equals_its_formula(temperature):
    z1, z2 = two_views(7, 4)
    want = simclr_reference(z1.numpy(), z2.numpy(), temperature).mean()
    # The length has a floor of 1e-12 under the root, compared with squares of about 1.
    assert simclr_loss(z1, z2, temperature=temperature).item() == pytest.approx(want, rel=1e-10)


def test_mcinfonce_averages_probabilities_over_draws():
    z1, z2 = two_views(5, 7, 4)
    p = np.exp([-simclr_reference(a.numpy(), b.numpy(), 0.5) for a, b in zip(z1, z2, strict=True)])  # (S, 2B)
    got = simclr_loss(z1, z2, temperature=0.5, over_draws="log_mean_exp").item()
    assert got == pytest.approx(-np.log(p.mean(0)).mean(), rel=1e-10)
    assert got < simclr_loss(z1, z2, temperature=0.5).item() - 0.01  # Jensen


def test_byol_equals_its_formula():
    (p1, p2), (t1, t2) = two_views(7, 4), two_views(7, 4, seed=1)

    def one_way(p, t):
        return np.mean([2 - 2 * a @ b / np.linalg.norm(a) / np.linalg.norm(b) for a, b in zip(p, t, strict=True)])

    want = one_way(p1.numpy(), t2.numpy()) + one_way(p2.numpy(), t1.numpy())
    assert byol_loss(p1, p2, t1, t2).item() == pytest.approx(want, rel=1e-10)
    draws = torch.stack((p1, p2, t1))
    each = sum(byol_loss(p, p2, t1, t2).item() for p in draws) / 3
    assert byol_loss(draws, p2.expand(3, -1, -1), t1, t2).item() == pytest.approx(each, rel=1e-10)
    assert byol_loss(t2, t1, t1, t2).item() == pytest.approx(0, abs=1e-9)


def test_byol_gradients_against_finite_differences_and_only_into_predictions():
    (p1, p2), (t1, t2) = two_views(2, 5, 3), two_views(5, 3, seed=1)
    inputs = [p1.requires_grad_(), p2.requires_grad_()]
    assert torch.autograd.gradcheck(lambda a, b: byol_loss(a, b, t1, t2), inputs)


def test_byol_momentum_grows_from_its_start_to_one():
    assert target_momentum(0, 100, 0.99) == pytest.approx(0.99)
    assert target_momentum(50, 100, 0.99) == pytest.approx(0.995)
    assert target_momentum(100, 100, 0.99) == 1


def sigreg_reference(z1, z2, directions, lambd, knots, t_max):
    B, D = z1.shape
    center = (z1 + z2) / 2
    invariance = sum(((z[b] - center[b]) ** 2).sum() for z in (z1, z2) for b in range(B)) / (2 * B * D)
    statistics = []
    for z, direction in itertools.product((z1, z2), directions):
        x = [z[b] @ direction for b in range(B)]
        integrand = []
        for t in np.linspace(-t_max, t_max, 2 * knots - 1):
            empirical = sum(np.exp(1j * t * x[b]) for b in range(B)) / B
            integrand.append(abs(empirical - np.exp(-(t**2) / 2)) ** 2 * np.exp(-(t**2) / 2))
        width = t_max / (knots - 1)
        statistics.append(B * width * sum((a + b) / 2 for a, b in itertools.pairwise(integrand)))
    return (1 - lambd) * invariance + lambd * np.mean(statistics)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("knots, t_max", [(17, 3.0), (9, 5.0), (2, 1.0)])
@pytest.mark.parametrize("lambd", [0.05, 0.7, 0.0, 1.0])
def test_sigreg_equals_its_formula(lambd, knots, t_max, shape):
    z1, z2 = two_views(*shape)
    directions = random_directions(3, 8, 5, z1).double()
    got = sigreg_loss(z1, z2, slices=5, lambd=lambd, knots=knots, t_max=t_max, seed=3, step=8)
    want = sigreg_reference(z1.numpy(), z2.numpy(), directions.numpy(), lambd, knots, t_max)
    np.testing.assert_allclose(got.item(), want, **CLOSE)


def test_sigreg_is_least_for_a_standard_normal():
    """Close to its expectation there: the mean of |phi_n - phi|^2 is (1 - phi^2) / n."""
    normal = torch.randn(2, 4096, 16, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    t = torch.linspace(-3, 3, 33, dtype=torch.float64)
    phi = (-t.square() / 2).exp()
    expected = torch.trapezoid((1 - phi.square()) * phi, t)
    value = sigreg_loss(*normal, lambd=1)
    torch.testing.assert_close(value, expected, rtol=0.1, atol=0)
    worse = [0.8 * normal, 1.25 * normal, normal + 0.2, normal.sign() * 1.0, normal[..., :1].expand_as(normal)]
    assert all(sigreg_loss(*z, lambd=1) > 2 * value for z in worse)


def visreg_reference(z1, z2, directions, lambd, scale, shape, center, stds=None):
    """stds: of both views, that the shape term divides by; None: those of the views."""
    B, D = z1.shape
    middle = (z1 + z2) / 2
    invariance = sum(((z[b] - middle[b]) ** 2).sum() for z in (z1, z2) for b in range(B)) / (2 * B * D)
    regularizer = 0.0
    for v, z in enumerate((z1, z2)):
        mean = z.sum(0) / B
        std = np.sqrt(((z - mean) ** 2).sum(0) / B)
        normalized = (z - mean) / (std if stds is None else stds[v])
        distances = []
        for direction in directions:
            x = sorted(normalized[b] @ direction for b in range(B))
            distances += [(x[i - 1] - scipy.stats.norm.ppf(i / (B + 1))) ** 2 for i in range(1, B + 1)]
        regularizer += scale * np.mean((std - 1) ** 2) + shape * np.mean(distances) + center * np.mean(mean**2)
    return (1 - lambd) * invariance + lambd * regularizer / 2


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("weights", [(1.0, 1.0, 1.0), (2.0, 3.0, 5.0), (0.0, 1.0, 0.0)])
@pytest.mark.parametrize("lambd", [0.9, 0.4, 0.0, 1.0])
def test_visreg_equals_its_formula(lambd, weights, shape):
    z1, z2 = two_views(*shape)
    directions = random_directions(3, 8, 5, z1).double()
    weights = dict(zip(("scale", "shape", "center"), weights, strict=True))
    got = visreg_loss(z1, z2, slices=5, lambd=lambd, **weights, seed=3, step=8)
    want = visreg_reference(z1.numpy(), z2.numpy(), directions.numpy(), lambd, **weights)
    np.testing.assert_allclose(got.item(), want, **CLOSE)


def test_visreg_gradients_against_finite_differences_with_fixed_deviations():
    """The shape term's gradient leaves out the deviations that it divides by."""
    z1, z2 = (z.requires_grad_() for z in two_views(5, 3))
    directions = random_directions(0, 0, 4, z1).double().numpy()
    a, b = z1.detach().numpy(), z2.detach().numpy()
    stds = [np.std(z, axis=0) for z in (a, b)]
    visreg_loss(z1, z2, slices=4, lambd=0.7).backward()
    for view, i, d in itertools.product(range(2), range(5), range(3)):
        values = []
        for delta in (1e-6, -1e-6):
            moved = [a.copy(), b.copy()]
            moved[view][i, d] += delta
            values.append(visreg_reference(*moved, directions, 0.7, 1.0, 1.0, 1.0, stds))
        slope = (values[0] - values[1]) / 2e-6
        assert (z1, z2)[view].grad[i, d].item() == pytest.approx(slope, rel=1e-6, abs=1e-8)


def test_visreg_pulls_collapsed_features_apart():
    """The gradient of its regularizer does not vanish as features shrink, unlike SIGReg's; the shape is kept."""
    z = two_views(64, 8)[0]
    shrunk = (1e-3 * (z - z.mean(0))).requires_grad_()
    gradients = [
        torch.autograd.grad(loss(shrunk, shrunk, lambd=1, slices=64), shrunk)[0].norm()
        for loss in (visreg_loss, sigreg_loss)
    ]
    assert gradients[0] > 10 * gradients[1]


@pytest.mark.parametrize("loss", [sigreg_loss, visreg_loss])
def test_the_directions_are_those_of_the_step(loss):
    z1, z2 = two_views(7, 4)
    values = {loss(z1, z2, slices=5, step=step).item() for step in range(4)}
    assert len(values) == 4


def test_directions_are_unit_vectors_by_counter():
    z = torch.zeros(2, 5)
    directions = random_directions(3, 8, 4000, z)
    torch.testing.assert_close(directions.norm(dim=1), torch.ones(4000))
    # Uniform on the sphere: mean 0 and covariance I / D, to 4 standard errors.
    assert directions.mean(0).abs().max() < 4 * (1 / 5 / 4000) ** 0.5
    assert (directions.T @ directions / 4000 - torch.eye(5) / 5).abs().max() < 4 * (0.2 / 4000) ** 0.5
    assert torch.equal(random_directions(3, torch.tensor(8), 10, z), directions[:10])  # whatever their number
    for seed, step in ((3, 9), (4, 8)):
        assert (random_directions(seed, step, 10, z) - directions[:10]).abs().max() > 0.1


def test_defaults_are_the_published_values():
    z1, z2 = two_views(7, 4)
    a, b = z1.numpy(), z2.numpy()
    want = barlow_twins_reference(a, b, 5e-3, False, 1e-5)
    np.testing.assert_allclose(barlow_twins_loss(z1, z2).item(), want, **CLOSE)
    want = vicreg_reference(a, b, 25, 25, 1, 1, 1e-4, False)
    np.testing.assert_allclose(vicreg_loss(z1, z2).item(), want, **CLOSE)
    assert simclr_loss(z1, z2).item() == pytest.approx(simclr_reference(a, b, 0.1).mean(), rel=1e-10)


def test_perfect_embeddings_have_loss_zero():
    # Orthogonal columns of mean 0 and biased variance 4, the same in both views.
    z = 2 * torch.tensor([[1, 1], [1, -1], [-1, 1], [-1, -1]], dtype=torch.float64)
    assert barlow_twins_loss(z, z, eps=0).item() == pytest.approx(0, abs=1e-15)
    assert vicreg_loss(z, z).item() == pytest.approx(0, abs=1e-15)


@pytest.mark.parametrize(
    "loss, config, names",
    [
        (barlow_twins_loss, BarlowTwinsConfig(), {"on_diagonal", "off_diagonal"}),
        (vicreg_loss, VICRegConfig(), {"invariance", "variance", "covariance"}),
        (sigreg_loss, SIGRegConfig(), {"invariance", "sigreg"}),
        (visreg_loss, VISRegConfig(), {"invariance", "scale", "shape", "center"}),
    ],
)
def test_terms_are_weighted_and_sum_to_the_loss(loss, config, names):
    z1, z2 = two_views(3, 7, 4)
    parts = terms_of(config, z1, z2)
    assert set(parts) == names
    torch.testing.assert_close(sum(parts.values()), loss(z1, z2), **CLOSE)
    if config.name == "vicreg":
        doubled = terms_of(VICRegConfig(inv=50.0, var=50.0, cov=2.0), z1, z2)
        assert all(doubled[name].item() == 2 * parts[name].item() for name in names)
    elif config.name == "visreg":
        doubled = terms_of(VISRegConfig(lambd=0.9, scale=2.0, shape=2.0, center=2.0), z1, z2)
        assert all(doubled[name].item() == 2 * parts[name].item() for name in names - {"invariance"})
        assert doubled["invariance"].item() == parts["invariance"].item()
    elif config.name == "sigreg":
        doubled = terms_of(SIGRegConfig(lambd=0.1), z1, z2)
        assert doubled["sigreg"].item() == 2 * parts["sigreg"].item()
        assert doubled["invariance"].item() == pytest.approx(0.9 / 0.95 * parts["invariance"].item(), rel=1e-12)
    else:
        doubled = terms_of(BarlowTwinsConfig(lambd=1e-2), z1, z2)
        assert doubled["off_diagonal"].item() == 2 * parts["off_diagonal"].item()
        assert doubled["on_diagonal"].item() == parts["on_diagonal"].item()


FUNCTIONS = {
    "barlow_twins": barlow_twins_loss, "vicreg": vicreg_loss, "simclr": simclr_loss, "byol": byol_loss,
    "sigreg": sigreg_loss, "visreg": visreg_loss, "supervised": cross_entropy_loss,
}  # fmt: skip


@pytest.mark.parametrize("name", OBJECTIVES)
def test_defaults_of_the_recipe_and_of_the_function_are_equal(name):
    """The function's gather is None, which means the same as True: over all processes. Seed and step are the run's."""
    assert TERMS.keys() == OBJECTIVES.keys() == FUNCTIONS.keys()
    fields = {key: field.default for key, field in OBJECTIVES[name].model_fields.items() if key != "name"}
    arguments = inspect.signature(FUNCTIONS[name]).parameters.values()
    defaults = {p.name: p.default for p in arguments if p.kind is p.KEYWORD_ONLY}
    assert fields.pop("gather") is True and defaults.pop("gather") is None
    assert (defaults.pop("seed", 0), defaults.pop("step", 0)) == (0, 0)
    of_the_model = {"momentum", "predictor_hidden", "classes"}
    assert {key: value for key, value in fields.items() if key not in of_the_model} == defaults


@pytest.mark.parametrize("loss", [barlow_twins_loss, vicreg_loss])
def test_no_matrix_of_dimensions_for_fewer_samples_than_dimensions(loss):
    sizes = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: sizes.append(t.numel()) or t, lambda t: t):
        loss(*(z.requires_grad_() for z in two_views(3, 8, 64)))
    assert max(sizes) <= 2 * 3 * 8 * 64  # both views' draws themselves; a matrix of 64 x 64 for each has 12,288


@pytest.mark.parametrize("loss", LOSSES)
def test_draws_are_averaged(loss):
    z1, z2 = two_views(5, 8, 3)
    one_by_one = torch.stack([loss(a, b) for a, b in zip(z1, z2, strict=True)])
    torch.testing.assert_close(loss(z1, z2), one_by_one.mean(), **CLOSE)
    assert one_by_one.std() > 0.01  # else any way to combine them would pass


@pytest.mark.parametrize("shape", [(5, 3), (3, 7), (2, 5, 3), (2, 3, 7)])
@pytest.mark.parametrize("loss", [loss for loss in LOSSES if loss is not visreg_loss])
def test_gradients_against_finite_differences(loss, shape):
    views = [z.requires_grad_() for z in two_views(*shape)]
    assert torch.autograd.gradcheck(loss, views)


@pytest.mark.parametrize("loss", LOSSES)
def test_fp32_under_autocast_and_for_half_inputs(loss):
    z1, z2 = two_views(2, 16, 8, dtype=torch.float32)
    outside = loss(z1, z2)
    with torch.autocast("cpu", torch.bfloat16):
        inside = loss(z1, z2)
    assert inside.dtype == torch.float32
    assert inside.item() == outside.item()  # the same operations, hence the same bits
    for half in (torch.bfloat16, torch.float16):
        h1, h2 = z1.to(half), z2.to(half)
        got = loss(h1, h2)
        assert got.dtype == torch.float32
        assert got.item() == loss(h1.float(), h2.float()).item()
    assert loss(z1.double(), z2.double()).dtype == torch.float64


@pytest.mark.parametrize("B, D", [(64, 256), (1024, 32)])
@pytest.mark.parametrize(
    "config", [BarlowTwinsConfig(), VICRegConfig(), SIGRegConfig(), VISRegConfig()], ids=lambda config: config.name
)
def test_fp32_is_precise_enough(config, B, D):
    z1, z2 = two_views(B, D)
    exact = terms_of(config, z1, z2)
    for name, term in terms_of(config, z1.float(), z2.float()).items():
        # Measured at most 1e-5: the on-diagonal loses digits in C_ii - 1, the off-diagonal in
        # subtracting the diagonal.
        assert term.item() == pytest.approx(exact[name].item(), rel=1e-4)


@pytest.mark.parametrize("loss", LOSSES)
def test_gradients_are_finite_at_collapse_and_batch_of_two(loss):
    for z in (torch.zeros(2, 3), torch.full((4, 3), 7.0), torch.randn(2, 3)):
        z.requires_grad_()
        loss(z, z.detach().clone()).backward()
        assert z.grad.isfinite().all()


@pytest.mark.parametrize("loss", LOSSES)
def test_wrong_shapes_are_refused(loss):
    with pytest.raises(ValueError, match="at least 2 samples"):
        loss(torch.randn(1, 4), torch.randn(1, 4))
    with pytest.raises(ValueError, match="at least 2 samples"):
        loss(torch.randn(3, 1, 4), torch.randn(3, 1, 4))
    with pytest.raises(ValueError, match="one shape"):
        loss(torch.randn(3, 4), torch.randn(4, 4))
    with pytest.raises(ValueError, match="one shape"):
        loss(torch.randn(4), torch.randn(4))


@pytest.mark.parametrize("loss", LOSSES)
def test_compiles_whole(loss):
    z1, z2 = two_views(2, 6, 3)
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(z1, z2), loss(z1, z2), **CLOSE)
