"""DiagonalGaussian, its head and the priors against torch.distributions and plain loops."""

import math

import pytest
import torch
from small_models import recipe_of
from torch import distributions as D

from fastssl.models import (
    DiagonalGaussian,
    GaussianHead,
    MixtureOfGaussians,
    StandardNormal,
    VampPrior,
    build_model,
)

# float64 on both sides, sums of a few dozen terms in another order.
CLOSE = dict(rtol=1e-12, atol=1e-12)
MODES = ["joint", "per_dim", "reference"]


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def gaussian(B=5, width=4, dtype=torch.float64):
    return DiagonalGaussian(torch.randn(B, width, dtype=dtype), torch.randn(B, width, dtype=dtype))


def oracle(q):
    return D.Independent(D.Normal(q.mu, q.sigma), 1)


def mixture(mode, components=3, width=4):
    prior = MixtureOfGaussians(components, width, mode).double()
    torch.nn.init.normal_(prior.logits)  # zeros would hide a missing or misplaced weight
    return prior


# --- The Gaussian ------------------------------------------------------------------------------


def test_clamps_raw_parameters():
    q = DiagonalGaussian(torch.tensor([[-99.0, 3.0, 99.0]]), torch.tensor([[-99.0, 0.5, 99.0]]))
    assert q.mu.tolist() == [[-20, 3, 20]]
    torch.testing.assert_close(q.sigma, torch.tensor([[0.01, math.exp(0.25), 5.0]]))


def test_no_gradient_outside_of_the_clamps():
    mu = torch.tensor([[-20.1, -19.9, 0.0, 19.9, 20.1]], requires_grad=True)
    log_var = torch.tensor([[-9.3, -9.2, 0.0, 3.2, 3.3]], requires_grad=True)
    q = DiagonalGaussian(mu, log_var)
    (q.mu.sum() + q.log_var.sum()).backward()
    assert mu.grad.tolist() == [[0, 1, 1, 1, 0]]
    assert log_var.grad.tolist() == [[0, 1, 1, 1, 0]]


def test_fields_are_fp32_unless_fp64():
    for given, expected in [
        (torch.bfloat16, torch.float32),
        (torch.float16, torch.float32),
        (torch.float64, torch.float64),
    ]:
        q = gaussian(dtype=given)
        draws = q.rsample(2)
        kl = q.kl_to(StandardNormal())
        assert {q.mu.dtype, q.log_var.dtype, q.sigma.dtype, draws.dtype, kl.dtype} == {expected}


def test_rsample_is_mu_plus_sigma_noise():
    q, noise = gaussian(), torch.randn(3, 5, 4, dtype=torch.float64)
    assert torch.equal(q.rsample(3, noise), q.mu + q.sigma * noise)
    draws = q.rsample(20_000)
    assert draws.shape == (20_000, 5, 4)
    # Standard errors: sigma / sqrt(S) of the mean, sigma / sqrt(2 S) of the deviation; 5 of each.
    assert ((draws.mean(0) - q.mu).abs() < 5 * q.sigma / math.sqrt(20_000)).all()
    assert ((draws.std(0) - q.sigma).abs() < 5 * q.sigma / math.sqrt(40_000)).all()


@pytest.mark.parametrize("shape", [(5, 4), (1, 5, 4), (3, 1, 4)])
def test_rsample_refuses_noise_that_would_broadcast(shape):
    with pytest.raises(ValueError, match=r"\(3, 5, 4\)"):
        gaussian().rsample(3, torch.randn(shape))


def test_log_prob_sums_over_dimensions():
    q = gaussian()
    for x in (torch.randn(5, 4).double(), torch.randn(3, 5, 4).double()):
        assert q.log_prob(x).shape == x.shape[:-1]
        torch.testing.assert_close(q.log_prob(x), oracle(q).log_prob(x), **CLOSE)


def test_closed_kl_is_exact_and_summed():
    q = gaussian()
    standard = D.Independent(D.Normal(torch.zeros(5, 4).double(), 1.0), 1)
    got = q.kl_to(StandardNormal())
    assert got.shape == (5,)
    torch.testing.assert_close(got, D.kl_divergence(oracle(q), standard), **CLOSE)


def test_monte_carlo_kl_tends_to_the_closed_one():
    q, prior = gaussian(), StandardNormal()
    x = q.rsample(20_000)
    ratios = q.log_prob(x) - prior.log_prob(x)
    error = (q.kl_to(prior, method="mc", samples=x) - q.kl_to(prior, method="closed")).abs()
    assert (error < 5 * ratios.std(0) / math.sqrt(20_000)).all()


@pytest.mark.parametrize("mode", MODES)
def test_monte_carlo_kl_to_a_mixture(mode):
    q, prior = gaussian(), mixture(mode)
    x = q.rsample(6)
    log_q = torch.stack([oracle(q).log_prob(draw) for draw in x]).mean(0)
    log_p = prior.log_prob(x)
    if mode != "reference":
        log_p = torch.stack([prior.log_prob(draw) for draw in x]).mean(0)
    got = q.kl_to(prior, method="mc", samples=x)
    assert got.shape == (5,)
    torch.testing.assert_close(got, log_q - log_p, **CLOSE)


def test_kl_refusals():
    q = gaussian()
    with pytest.raises(ValueError, match="no closed form"):
        q.kl_to(mixture("joint"))
    with pytest.raises(ValueError, match="'closed' or 'mc'"):
        q.kl_to(StandardNormal(), method="exact")
    for samples in (None, torch.randn(5, 4), torch.randn(2, 4, 4)):
        with pytest.raises(ValueError, match=r"\(S, B, D\)"):
            q.kl_to(StandardNormal(), method="mc", samples=samples)


def test_head_is_fp32_under_autocast():
    head, features = GaussianHead(6, 4), torch.randn(5, 6)
    outside = head(features)
    assert outside.mu.shape == outside.log_var.shape == (5, 4)
    assert torch.equal(outside.mu, features @ head.mu.weight.T + head.mu.bias)
    with torch.autocast("cpu", torch.bfloat16):
        inside = head(features)
        from_half = head(features.bfloat16())
    assert torch.equal(inside.mu, outside.mu) and torch.equal(inside.log_var, outside.log_var)
    assert from_half.log_var.dtype == torch.float32
    assert {name for name, _ in head.named_parameters()} == {
        "mu.weight", "mu.bias", "log_var.weight", "log_var.bias",
    }  # fmt: skip


# --- The priors --------------------------------------------------------------------------------


def test_sigma_of_normalized_features_does_not_depend_on_their_length():
    head, features = GaussianHead(6, 4, normalize_for_sigma=True), torch.randn(5, 6)
    q = head(features)
    unit = features / features.norm(dim=1, keepdim=True)
    torch.testing.assert_close(q.log_var, head.log_var(unit * math.sqrt(6)))
    assert torch.equal(q.mu, head.mu(features))
    torch.testing.assert_close(head(features * 7).sigma, q.sigma)
    torch.testing.assert_close(head(features * 7).mu, head.mu(features * 7))


@pytest.mark.parametrize("objective, stochastic", [({}, "z"), ({}, "h"), ({"name": "supervised", "classes": 3}, "h")])
@pytest.mark.parametrize("sigma_input", ["features", "normalized"])
def test_the_recipe_says_what_sigma_reads(objective, stochastic, sigma_input):
    recipe = recipe_of(objective or {"name": "vicreg"}, {"stochastic": stochastic, "sigma_input": sigma_input})
    head = build_model(recipe).heads[stochastic]
    features = torch.randn(5, head.mu.in_features)
    assert torch.allclose(head(features * 7).sigma, head(features).sigma) == (sigma_input == "normalized")


def test_standard_normal():
    x = torch.randn(3, 5, 4).double()
    torch.testing.assert_close(StandardNormal().log_prob(x), D.Normal(0.0, 1.0).log_prob(x).sum(-1), **CLOSE)
    assert not list(StandardNormal().parameters())


def test_mixture_parameters_and_start():
    prior = MixtureOfGaussians(10, 1000)
    shapes = {name: tuple(p.shape) for name, p in prior.named_parameters()}
    assert shapes == {"means": (10, 1000), "log_vars": (10, 1000), "logits": (10,)}
    assert prior.logits.tolist() == [0] * 10
    for p in (prior.means, prior.log_vars):  # N(0, 1): 10,000 numbers, 5 standard errors
        assert abs(p.mean().item()) < 0.05 and abs(p.std().item() - 1) < 0.036


@pytest.mark.parametrize("shape", [(5, 4), (3, 5, 4)])
def test_joint_is_a_mixture_over_vectors(shape):
    prior, x = mixture("joint"), torch.randn(shape).double()
    components = D.Independent(D.Normal(prior.means, (0.5 * prior.log_vars).exp()), 1)
    want = D.MixtureSameFamily(D.Categorical(logits=prior.logits), components)
    torch.testing.assert_close(prior.log_prob(x), want.log_prob(x), **CLOSE)


@pytest.mark.parametrize("shape", [(5, 4), (3, 5, 4)])
def test_per_dim_is_a_mixture_in_every_dimension(shape):
    prior, x = mixture("per_dim"), torch.randn(shape).double()
    weights = D.Categorical(logits=prior.logits.expand(4, 3))
    components = D.Normal(prior.means.T, (0.5 * prior.log_vars).exp().T)
    want = D.MixtureSameFamily(weights, components)
    torch.testing.assert_close(prior.log_prob(x), want.log_prob(x).sum(-1), **CLOSE)


def test_reference_averages_draws_before_mixing():
    prior, x = mixture("reference"), torch.randn(3, 5, 4).double()
    weights = prior.logits.softmax(0)
    want = torch.zeros(5, dtype=torch.float64)
    for b in range(5):
        for d in range(4):
            terms = []
            for k in range(3):
                normal = D.Normal(prior.means[k, d], (0.5 * prior.log_vars[k, d]).exp())
                average = sum(normal.log_prob(x[s, b, d]) for s in range(3)) / 3
                terms.append(average + weights[k].log())
            want[b] += torch.stack(terms).logsumexp(0)
    got = prior.log_prob(x)
    assert got.shape == (5,)
    torch.testing.assert_close(got, want, **CLOSE)
    with pytest.raises(ValueError, match=r"\(S, B, D\)"):
        prior.log_prob(x[0])


def test_modes_differ_and_are_checked():
    x, values = torch.randn(3, 5, 4).double(), []
    for mode in MODES:
        torch.manual_seed(0)
        values.append(mixture(mode).log_prob(x).mean().item())
    joint, per_dim, reference = values
    assert abs(joint - per_dim) > 0.1
    assert reference < per_dim  # Jensen
    with pytest.raises(ValueError, match="joint"):
        MixtureOfGaussians(3, 4, "diagonal")


@pytest.mark.parametrize("mode", MODES)
def test_mixture_gradients_against_finite_differences(mode):
    prior = mixture(mode)
    x = torch.randn(2, 3, 4).double().requires_grad_()

    def log_prob(x, means, log_vars, logits):
        named = {"means": means, "log_vars": log_vars, "logits": logits}
        return torch.func.functional_call(prior, named, (x,))

    prior.forward = prior.log_prob  # functional_call goes through forward
    assert torch.autograd.gradcheck(log_prob, (x, prior.means, prior.log_vars, prior.logits))


def test_gaussian_gradients_against_finite_differences():
    noise = torch.randn(2, 3, 4).double()

    def kls(mu, log_var):
        q = DiagonalGaussian(mu, log_var)
        x = q.rsample(2, noise)
        return q.kl_to(StandardNormal()), q.kl_to(StandardNormal(), method="mc", samples=x)

    inputs = [torch.randn(3, 4).double().requires_grad_() for _ in range(2)]
    assert torch.autograd.gradcheck(kls, inputs)


@pytest.mark.parametrize("mode", MODES)
def test_mixture_in_fp32_far_from_the_means(mode):
    # The joint density multiplies the square out. At |x| = 20 and variances down to e^-4 its parts
    # reach 1e7 and would lose all digits below 1 in fp32.
    prior = MixtureOfGaussians(10, 256, mode)
    x = 20 * torch.rand(4, 8, 256).sub(0.5).sign()
    got = prior.log_prob(x)
    assert got.dtype == torch.float32
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(prior.log_prob(x), got)
    # fp32 rounding of the parameters' exponentials, 1e-7 each, averages out over 256 dimensions.
    torch.testing.assert_close(got.double(), prior.double().log_prob(x.double()), rtol=1e-6, atol=0)


def test_joint_needs_no_tensor_over_components_and_dimensions():
    S, B, K, width = 4, 8, 10, 64
    sizes = []
    x = torch.randn(S, B, width, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: sizes.append(t.numel()) or t, lambda t: t):
        MixtureOfGaussians(K, width).log_prob(x)
    assert max(sizes) <= S * B * width


# --- The VampPrior -----------------------------------------------------------------------------


def vamp(components=3, in_dim=6, width=4):
    prior = VampPrior(components, GaussianHead(in_dim, width)).double()
    torch.nn.init.normal_(prior.logits)
    return prior


@pytest.mark.parametrize("shape", [(5, 4), (3, 5, 4)])
def test_vamp_is_a_mixture_of_head_outputs_for_its_pseudo_features(shape):
    prior, x = vamp(), torch.randn(shape).double()
    components = D.Independent(D.Normal(prior.head.mu(prior.pseudo), (0.5 * prior.head.log_var(prior.pseudo)).exp()), 1)
    want = D.MixtureSameFamily(D.Categorical(logits=prior.logits), components)
    torch.testing.assert_close(prior.log_prob(x), want.log_prob(x), **CLOSE)


def test_vamp_with_the_features_of_the_batch_is_the_aggregate_posterior():
    """The best prior for a batch is the mixture of its own q; then KL(q || p) is at most log B."""
    prior, features = vamp(components=5), torch.randn(5, 6).double()
    torch.nn.init.zeros_(prior.logits)
    prior.pseudo.data = features
    q = prior.head(features)
    x = q.rsample(4000)
    kl = q.kl_to(prior, method="mc", samples=x)
    # Each draw's ratio is below log 5 by construction: the mixture holds q itself with weight 1/5.
    assert (kl <= math.log(5) + 1e-9).all() and (kl > 0).all()


def test_vamp_gradients_against_finite_differences():
    prior, x = vamp(), torch.randn(2, 3, 4).double().requires_grad_()
    parameters = dict(prior.named_parameters())
    assert len(parameters) == 6  # pseudo-features, logits, and the head's two layers
    prior.forward = prior.log_prob

    def log_prob(x, *values):
        return torch.func.functional_call(prior, dict(zip(parameters, values)), (x,))

    assert torch.autograd.gradcheck(log_prob, (x, *parameters.values()))


# --- At the limits -----------------------------------------------------------------------------


@pytest.mark.parametrize("raw_log_var", [-99.0, 2 * math.log(0.01), 2 * math.log(5.0), 99.0])
@pytest.mark.parametrize("prior", [StandardNormal(), *(MixtureOfGaussians(3, 4, mode) for mode in MODES)], ids=str)
def test_values_and_gradients_are_finite_at_both_limits_of_sigma(prior, raw_log_var):
    mu = torch.full((5, 4), 20.0).requires_grad_()
    log_var = torch.full((5, 4), raw_log_var).requires_grad_()
    q = DiagonalGaussian(mu, log_var)
    x = q.rsample(3)
    kl = q.kl_to(prior, method="mc", samples=x).sum()
    if isinstance(prior, StandardNormal):
        kl = kl + q.kl_to(prior).sum()
    gradients = torch.autograd.grad(kl + x.square().sum(), (mu, log_var, *prior.parameters()))
    assert kl.isfinite() and all(g.isfinite().all() for g in gradients)
