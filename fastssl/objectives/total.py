"""The whole loss of arXiv 2310.18080: an objective on the draws plus beta times the KL to the prior."""

import math
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from fastssl.common.distributed import mean_over_ranks
from fastssl.models import Draws, View
from fastssl.models.gaussian import SIGMA_MAX, SIGMA_MIN
from fastssl.objectives.barlow_twins import barlow_twins_terms
from fastssl.objectives.byol import byol_loss
from fastssl.objectives.simclr import simclr_loss
from fastssl.objectives.supervised import accuracy, cross_entropy_loss
from fastssl.objectives.vicreg import vicreg_terms
from fastssl.recipe import ObjectiveConfig, Recipe

Terms = dict[str, Tensor]


def total_loss(recipe: Recipe, beta_warmup_steps: int = 0) -> Callable[..., Terms]:
    """The recipe's loss as a function of the views that its model gives, the priors by space, and the step.

    loss_terms(first, second, priors, step), or for a supervised recipe loss_terms(view, priors, step). The priors are
    empty for a deterministic model. It gives `loss`, the weighted terms that sum to it, for a supervised recipe the
    batch's `accuracy`, and for each stochastic space (suffix _h or _z): `kl`, the unweighted mean over the views and
    the batch in nats, free bits not applied; `kl_per_dim`; the mean, least and largest standard deviation `sigma`,
    `sigma_min`, `sigma_max`; and `sigma_clamped`, the share of them that stands at one of the two limits.

    beta_warmup_steps: what embedding.beta_warmup_epochs comes to in steps, which only the training loop knows.
    """
    # Plain values: a compiled graph cannot look into a recipe's section.
    embedding, gather = recipe.embedding, getattr(recipe.objective, "gather", True)
    has_labels = recipe.objective.name == "supervised"
    compare = in_chunks(objective_terms(recipe.objective), embedding.chunk)
    closed = embedding.kl == "closed" or (embedding.kl == "auto" and embedding.prior == "standard_normal")
    method, beta, free_bits = "closed" if closed else "mc", embedding.beta, embedding.free_bits

    def kl_to_prior(draws: Draws, prior: nn.Module) -> Tensor:
        """(2,): KL(q || p) summed over dimensions, averaged over the batch (equation 5), to log and to learn from."""
        kl_B = draws.q.kl_to(prior, method=method, samples=draws.x_SBD)
        # Free bits (arXiv 1606.04934, appendix C.8) with all dimensions of an image as one group: a mixture over whole
        # vectors has no KL of a single dimension.
        floored_B = kl_B.clamp_min(free_bits * draws.q.mu.shape[-1]) if free_bits else kl_B
        return torch.stack((kl_B.detach().mean(), floored_B.mean()))

    def loss_terms(*views_priors_step) -> Terms:
        *views, priors, step = views_priors_step
        terms, watched, kl_total = compare(*views), {}, 0.0
        if has_labels:
            watched["accuracy"] = accuracy(views[0].z, views[0].target)
        for space in views[0].draws:
            of_views = [view.draws[space] for view in views]
            over_views = sum(kl_to_prior(draws, priors[space]) for draws in of_views) / len(views)
            kl, penalty = mean_over_ranks(over_views, gather)
            kl_total = kl_total + penalty
            watched |= {f"{name}_{space}": value for name, value in spread(kl.detach(), *of_views).items()}
        if views[0].draws:
            grown = torch.as_tensor((step + 1) / beta_warmup_steps).clamp_max(1.0) if beta_warmup_steps else 1.0
            terms["beta_kl"] = beta * grown * kl_total
        return {"loss": sum(terms.values()), **terms, **watched}

    return loss_terms


def objective_terms(objective: ObjectiveConfig) -> Callable[..., Terms]:
    """The recipe's objective as a function of the views' z, then of their targets where they have one: its terms."""
    options = objective.model_dump(exclude={"name"})
    if objective.name == "supervised":
        smoothing = objective.label_smoothing
        return lambda z, label: {"cross_entropy": cross_entropy_loss(z, label, label_smoothing=smoothing)}
    if objective.name == "byol":
        return lambda *views: {"prediction": byol_loss(*views)}
    if objective.name == "simclr":
        return lambda z1, z2: {"nt_xent": simclr_loss(z1, z2, **options)}
    return partial({"barlow_twins": barlow_twins_terms, "vicreg": vicreg_terms}[objective.name], **options)


def in_chunks(terms: Callable[..., Terms], chunk: int | None) -> Callable[..., Terms]:
    """The terms of the views, taken over `chunk` draws at a time and computed again in the backward pass.

    SimCLR keeps a matrix of 2 B x 2 B for each draw; Barlow Twins and VICReg one of D x D, or smaller ones of B x B.
    """

    def of_views(*views: View) -> Terms:
        z_of_views = [view.z for view in views]
        targets = [view.target for view in views if view.target is not None]
        z = z_of_views[0]
        if chunk is None or z.ndim == 2 or chunk >= len(z):
            return terms(*z_of_views, *targets)
        total: Terms = {}
        for parts in zip(*(z.split(chunk) for z in z_of_views), strict=True):
            share = len(parts[0]) / len(z)
            part = checkpoint(terms, *parts, *targets, use_reentrant=False, preserve_rng_state=False)
            for name, value in part.items():
                total[name] = total.get(name, 0.0) + share * value
        return total

    return of_views


@torch.no_grad()
def spread(kl: Tensor, *of_views: Draws) -> Terms:
    """What shows whether an embedding's uncertainty collapses, explodes or does its work."""
    sigma = torch.stack([draws.q.sigma for draws in of_views])
    log_var = torch.stack([draws.q.log_var for draws in of_views])
    clamped = (log_var <= 2 * math.log(SIGMA_MIN)) | (log_var >= 2 * math.log(SIGMA_MAX))
    return {
        "kl": kl,
        "kl_per_dim": kl / sigma.shape[-1],
        "sigma": sigma.mean(),
        "sigma_min": sigma.min(),
        "sigma_max": sigma.max(),
        "sigma_clamped": clamped.float().mean(),
    }
