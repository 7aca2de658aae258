"""Do the tests detect mistakes? Each mistake is patched into the source, and the test named with it must then fail.

The mistakes are typical of this field: the other variance convention, a mean in place of a sum, swapped modes of a
prior, gradients of collectives without their factor.
"""

import inspect
import textwrap
from contextlib import contextmanager

import pytest
import test_gaussian
import test_objectives
import test_optim
import test_processes
import test_projector
import test_ssl_model
import test_total_loss
import torch

from fastssl.models import DiagonalGaussian, MixtureOfGaussians, SSLModel, StandardNormal, projector, sync_bn
from fastssl.objectives import byol_loss, metrics, sigreg, simclr_loss, visreg
from fastssl.objectives.barlow_twins import correlation_errors
from fastssl.objectives.batch import distance_from_mean_view, random_directions
from fastssl.objectives.vicreg import unweighted_terms
from fastssl.training.optim import LAMB, LARS

BARLOW = lambda unbiased: lambda: test_objectives.test_barlow_twins_equals_its_formula(5e-3, unbiased, 1e-5, (7, 4))  # noqa: E731
VICREG = lambda center: lambda: test_objectives.test_vicreg_equals_its_formula(2.0, 3.0, 5.0, 1.5, 0.0, center, (3, 7))  # noqa: E731
SIGREG = lambda: test_objectives.test_sigreg_equals_its_formula(0.7, 9, 5.0, (7, 4))  # noqa: E731
VISREG = lambda: test_objectives.test_visreg_equals_its_formula(0.4, (2.0, 3.0, 5.0), (7, 4))  # noqa: E731
DRAWS = lambda: test_projector.test_draws_equal_the_loop({}, 4)  # noqa: E731


def lars():
    test_optim.test_lars_and_lamb_equal_torch_optimizer(LARS, test_optim.torch_optimizer.LARS, dict(momentum=0.9), 0.05)


def lamb():
    test_optim.test_lars_and_lamb_equal_torch_optimizer(LAMB, test_optim.torch_optimizer.Lamb, dict(debias=True), 0.05)


MUTATIONS = [  # function, a part of its source, the mistake that replaces it, the test that must fail
    # Variance conventions.
    (correlation_errors, "(n - int(unbiased))", "(n - 1)", BARLOW(False)),
    (correlation_errors, "(n - int(unbiased))", "n", BARLOW(True)),
    (correlation_errors, "zn2, n, gather) / n**2", "zn2, n, gather) / (n * (n - 1))", BARLOW(False)),
    (correlation_errors, "(zn1 * zn2).sum(-2), gather) / n", "(zn1 * zn2).sum(-2), gather) / (n - 1)", BARLOW(False)),
    (correlation_errors, "(var + eps).sqrt()", "(var.sqrt() + eps)", BARLOW(False)),
    (unweighted_terms, "zc.square().sum(-2), gather) / (n - 1)", "zc.square().sum(-2), gather) / n", VICREG(False)),
    (unweighted_terms, "zc, n, gather) / (n - 1) ** 2", "zc, n, gather) / n**2", VICREG(False)),
    (unweighted_terms, "hinge.mean()", "hinge.sum(0).mean()", VICREG(False)),
    (unweighted_terms, "off_diagonal.sum(0).mean()", "off_diagonal.mean()", VICREG(False)),
    (unweighted_terms, "zc if center else z", "zc", VICREG(False)),
    (unweighted_terms, "zc if center else z", "z", VICREG(True)),
    # The other objectives.
    (simclr_loss, "one_hot, -torch.inf", "one_hot, 0.0", lambda: test_objectives.test_simclr_equals_its_formula(0.7)),
    (simclr_loss, "log_p.logsumexp(0) - math.log(len(log_p))", "log_p.mean(0)",
     test_objectives.test_mcinfonce_averages_probabilities_over_draws),
    (sigreg.sigreg_loss, "return (1 - lambd) * invariance", "return invariance", SIGREG),
    (distance_from_mean_view, "z.mean(0)", "z.flip(0)", SIGREG),
    (sigreg.unweighted_terms, "2 * n * torch", "2 * torch", SIGREG),
    (sigreg.unweighted_terms, "2 * n * torch", "n * torch", SIGREG),
    (sigreg.unweighted_terms, "distance * normal_T", "distance", SIGREG),
    (sigreg.unweighted_terms, "/ (knots - 1)", "/ knots", SIGREG),
    (sigreg.unweighted_terms, " + imaginary.square()", "", SIGREG),
    (visreg.visreg_loss, "return (1 - lambd) * invariance", "return invariance", VISREG),
    (visreg.unweighted_terms, "gather) / n\n        std", "gather) / (n - 1)\n        std", VISREG),
    (visreg.unweighted_terms, "mean.square().mean()", "mean.square().sum()", VISREG),
    (visreg.unweighted_terms, "zc / std.detach()", "z / std.detach()", VISREG),
    (visreg.unweighted_terms, "zc / std.detach()", "zc / std",
     test_objectives.test_visreg_gradients_against_finite_differences_with_fixed_deviations),
    (visreg.unweighted_terms, "/ (n + 1)", "/ n - 0.5 / n", VISREG),
    (visreg.unweighted_terms, ".sort(dim=-1).values", ".sort(dim=-2).values", VISREG),
    (random_directions, "unit(normals", "(normals", test_objectives.test_directions_are_unit_vectors_by_counter),
    (byol_loss, "stack_views(t2, t1)", "stack_views(t1, t2)", test_objectives.test_byol_equals_its_formula),
    # KL: a sum over dimensions, a mean over images, over the draws that the objective saw.
    (DiagonalGaussian.kl_to, "self.log_var).sum(-1)", "self.log_var).mean(-1)",
     test_gaussian.test_closed_kl_is_exact_and_summed),
    (DiagonalGaussian.kl_to, "self.mu.square() + ", "", test_gaussian.test_closed_kl_is_exact_and_summed),
    (DiagonalGaussian.kl_to, "prior.log_prob(samples)).mean(0)", "prior.log_prob(samples)).sum(0)",
     test_gaussian.test_monte_carlo_kl_tends_to_the_closed_one),
    (DiagonalGaussian.log_prob, "LOG_2PI).sum(-1)", "LOG_2PI).mean(-1)",
     test_gaussian.test_log_prob_sums_over_dimensions),
    (DiagonalGaussian.rsample, "self.sigma * noise", "self.log_var.exp() * noise",
     test_gaussian.test_rsample_is_mu_plus_sigma_noise),
    (StandardNormal.log_prob, "LOG_2PI).sum(-1)", "LOG_2PI).mean(-1)", test_gaussian.test_standard_normal),
    (metrics.uncertainty_metrics, "kl / sigma.shape[-1]", "kl / sigma.shape[-2]",
     test_total_loss.test_loss_is_objective_plus_beta_times_the_mean_kl),
    # The priors' modes.
    (MixtureOfGaussians.log_prob, 'self.mode == "joint"', 'self.mode == "per_dim"',
     lambda: test_gaussian.test_joint_is_a_mixture_over_vectors((3, 5, 4))),
    (MixtureOfGaussians.log_prob, 'self.mode == "per_dim"', 'self.mode == "reference"',
     lambda: test_gaussian.test_per_dim_is_a_mixture_in_every_dimension((3, 5, 4))),
    (MixtureOfGaussians.log_prob, "+ var_BD.unsqueeze(1)", "",
     test_gaussian.test_reference_averages_draws_before_mixing),
    (MixtureOfGaussians.log_prob, "+ log_w_K[:, None]", "",
     lambda: test_gaussian.test_per_dim_is_a_mixture_in_every_dimension((3, 5, 4))),
    # Batched draws.
    (projector._project, "h_SBD.transpose(0, 1).contiguous()", "h_SBD.contiguous()", DRAWS),
    (projector._batch_norm_draws, "p.repeat(S)", "p.repeat_interleave(S)", DRAWS),
    (sync_bn.update_running_statistics, "torch.arange(S - 1, -1, -1, ", "torch.arange(S, ",
     DRAWS),
    (SSLModel._draw_z, "noise_SBD.flatten(0, 1)[None]", "noise_SBD.transpose(0, 1).flatten(0, 1)[None]",
     test_ssl_model.test_each_draw_of_h_leads_to_one_draw_of_z),
    (SSLModel.update_target, "1 - momentum, skip", "momentum, skip",
     test_ssl_model.test_byol_target_starts_as_the_online_network_and_follows_it_slowly),
    # Optimisers.
    (LARS.step_group, "trust.masked_fill(~scaled, 1.0)", "trust", lars),
    (LAMB.step_group, "beta2**count", "beta1**count", lamb),
]  # fmt: skip


@contextmanager
def mutated(function, part: str, mistake: str):
    """A context in which the function has the mistake, in every module that imported it."""
    function = inspect.unwrap(function)  # from under torch.no_grad
    source = textwrap.dedent(inspect.getsource(function))
    if source.count(part) != 1:
        raise LookupError(f"{function.__qualname__} does not contain {part!r} once: update the mutation.")
    namespace = dict(function.__globals__)
    exec(compile(source.replace(part, mistake), "mutated", "exec"), namespace)
    correct, mistaken = function.__code__, inspect.unwrap(namespace[function.__name__]).__code__
    function.__code__ = mistaken
    try:
        yield
    finally:
        function.__code__ = correct


def names():
    return [f"{function.__qualname__}: {mistake or 'no ' + part}" for function, part, mistake, _ in MUTATIONS]


@pytest.mark.parametrize("function, part, mistake, test", MUTATIONS, ids=names())
def test_the_mistake_is_detected(function, part, mistake, test):
    torch.manual_seed(0)
    test()  # passes without the mistake
    torch.manual_seed(0)
    with mutated(function, part, mistake), pytest.raises(AssertionError):
        test()


@pytest.mark.parametrize("check", [test_processes.check_losses, test_processes.check_batch_norm])
def test_collectives_without_gradient_sums_are_detected(tmp_path, check):
    """As in the official Barlow Twins code: an all-reduce in the forward pass only."""
    with pytest.raises(torch.multiprocessing.ProcessRaisedException, match="AssertionError"):
        test_processes.spawn(test_processes.without_gradient_sums, 2, tmp_path, check)
