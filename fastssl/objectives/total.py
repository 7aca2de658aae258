"""The whole loss of arXiv 2310.18080: an objective on the draws plus beta times the KL to the prior."""

import operator
from collections.abc import Callable, Iterable
from functools import reduce
from typing import Literal, cast

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from fastssl.common.distributed import mean_over_ranks
from fastssl.models import Draws, ViewOutput
from fastssl.models.gaussian import Prior
from fastssl.objectives.barlow_twins import barlow_twins_terms
from fastssl.objectives.batch import random_directions
from fastssl.objectives.byol import byol_terms
from fastssl.objectives.metrics import accuracy, uncertainty_metrics
from fastssl.objectives.sigreg import sigreg_terms
from fastssl.objectives.simclr import simclr_terms
from fastssl.objectives.supervised import supervised_terms
from fastssl.objectives.vicreg import vicreg_terms
from fastssl.objectives.visreg import visreg_terms
from fastssl.recipe import Recipe, SlicedConfig

# The weighted terms of each objective, by objective.name. Each function takes the views' outputs and its own config
# class; those of a SlicedConfig also the directions (K, D).
TERMS: dict[str, Callable[..., dict[str, Tensor]]] = {
    "barlow_twins": barlow_twins_terms,
    "vicreg": vicreg_terms,
    "simclr": simclr_terms,
    "byol": byol_terms,
    "sigreg": sigreg_terms,
    "visreg": visreg_terms,
    "supervised": supervised_terms,
}


class TotalLoss(nn.Module):
    """The recipe's loss, as a module without parameters.

    Args:
        beta_warmup_steps: embedding.beta_warmup_epochs in steps, which depend on the size of the data set.
    """

    def __init__(self, recipe: Recipe, beta_warmup_steps: int = 0):
        super().__init__()
        self.objective, self.embedding, self.seed = recipe.objective, recipe.embedding, recipe.seed
        self.beta_warmup_steps = beta_warmup_steps
        has_closed_form = self.embedding.prior == "standard_normal"
        is_closed = self.embedding.kl == "closed" or (self.embedding.kl == "auto" and has_closed_form)
        self.kl_method: Literal["closed", "mc"] = "closed" if is_closed else "mc"

    def forward(self, views: tuple[ViewOutput, ...], priors: nn.ModuleDict, step: Tensor) -> dict[str, Tensor]:
        """The loss, its weighted terms, and metrics to log; all are scalars.

        Args:
            views: the model's outputs.
            priors: the model's priors by space; empty for a deterministic model.
            step: () the optimizer step, for the warm-up of beta and for random directions.

        Returns:
            `loss`; the weighted terms that sum to it; `accuracy` of the batch where the objective has labels; and for
            each stochastic space (suffix _h or _z) `kl`, the unweighted mean over views and batch in nats, without free
            bits, `kl_per_dim`, and `sigma`, `sigma_min`, `sigma_max`, the mean and the limits of the standard
            deviations, `sigma_clamped`, the share of them that is at a limit of their range.
        """
        terms = self.objective_terms(views, step)
        metrics: dict[str, Tensor] = {}
        if self.objective.needs_labels and views[0].target is not None:
            metrics["accuracy"] = accuracy(views[0].z, views[0].target, gather=self.objective.gather)

        spaces = list(views[0].draws)
        kl_penalties = []
        for space in spaces:
            draws_of_views = [view.draws[space] for view in views]
            kl_of_views = [self.kl_to_prior(draws, cast(Prior, priors[space])) for draws in draws_of_views]
            kl, penalty = mean_over_ranks(add(kl_of_views) / len(views), self.objective.gather)
            kl_penalties.append(penalty)
            for name, value in uncertainty_metrics(kl.detach(), draws_of_views).items():
                metrics[f"{name}_{space}"] = value
        if spaces:
            terms["beta_kl"] = self.beta_at(step) * add(kl_penalties)
        return {"loss": add(terms.values()), **terms, **metrics}

    def objective_terms(self, views: tuple[ViewOutput, ...], step: Tensor) -> dict[str, Tensor]:
        """The objective's weighted terms, embedding.chunk draws at a time, computed again in the backward pass.

        SimCLR needs a matrix of 2 B x 2 B for each draw; Barlow Twins and VICReg one of D x D, or smaller ones of
        B x B; SIGReg one of B x slices x knots for each view.
        """
        objective_terms, chunk, z = TERMS[self.objective.name], self.embedding.chunk, views[0].z
        directions: tuple[Tensor, ...] = ()
        if isinstance(self.objective, SlicedConfig):  # the same for all draws, so drawn once for all chunks
            directions = (random_directions(self.seed, step, self.objective.slices, z),)
        if chunk is None or z.ndim == 2 or chunk >= len(z):
            return objective_terms(views, self.objective, *directions)
        total: dict[str, Tensor] = {}
        for start in range(0, len(z), chunk):
            part = tuple(view._replace(z=view.z[start : start + chunk]) for view in views)
            share = len(part[0].z) / len(z)
            terms = checkpoint(
                objective_terms, part, self.objective, *directions, use_reentrant=False, preserve_rng_state=False
            )
            for name, value in terms.items():
                total[name] = total.get(name, 0.0) + share * value
        return total

    def kl_to_prior(self, draws: Draws, prior: Prior) -> Tensor:
        """(2,): KL(q || p) summed over dimensions, averaged over the batch (equation 5), to log and to minimize."""
        kl_B = draws.q.kl_to(prior, method=self.kl_method, samples=draws.x_SBD)
        # Free bits (arXiv 1606.04934, appendix C.8) with all dimensions of an image as one group: a mixture over whole
        # vectors has no KL of a single dimension.
        free_nats = self.embedding.free_bits * draws.q.mu.shape[-1]
        floored_B = kl_B.clamp_min(free_nats) if self.embedding.free_bits else kl_B
        return torch.stack((kl_B.detach().mean(), floored_B.mean()))

    def beta_at(self, step: Tensor) -> Tensor | float:
        """The weight of the KL: it grows linearly from 0 to embedding.beta during the warm-up."""
        if not self.beta_warmup_steps:
            return self.embedding.beta
        return self.embedding.beta * torch.as_tensor((step + 1) / self.beta_warmup_steps).clamp_max(1.0)


def add(values: Iterable[Tensor]) -> Tensor:
    """The sum of at least one tensor."""
    return reduce(operator.add, values)
