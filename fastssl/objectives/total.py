"""The whole loss of arXiv 2310.18080: an objective on the draws plus beta times the KL to the prior."""

from collections.abc import Callable
from functools import partial

from torch import Tensor, nn

from fastssl.models import View
from fastssl.objectives.barlow_twins import barlow_twins_terms
from fastssl.objectives.vicreg import vicreg_terms
from fastssl.recipe import Recipe

TERMS = {"barlow_twins": barlow_twins_terms, "vicreg": vicreg_terms}


def total_loss(recipe: Recipe) -> Callable[[View, View, nn.Module | None], dict[str, Tensor]]:
    """The recipe's loss as a function of two views and the prior (None for deterministic embeddings).

    It gives `loss`, the weighted terms that sum to it, and for stochastic embeddings `kl`, the unweighted mean
    over both views and the batch in nats, and `sigma`, the mean standard deviation.
    """
    # Plain values: a compiled graph cannot look into a recipe's section.
    objective_terms = partial(TERMS[recipe.objective.name], **recipe.objective.model_dump(exclude={"name"}))
    embedding = recipe.embedding
    closed = embedding.kl == "closed" or (embedding.kl == "auto" and embedding.prior == "standard_normal")
    beta, method = embedding.beta, "closed" if closed else "mc"

    def kl_to_prior(view: View, prior: nn.Module) -> Tensor:
        """KL(q || p) summed over dimensions, averaged over the batch (equation 5)."""
        return view.q.kl_to(prior, method=method, samples=view.x_SBD).mean()

    def loss_terms(first: View, second: View, prior: nn.Module | None) -> dict[str, Tensor]:
        terms = objective_terms(first.z, second.z)
        watched = {}
        if first.q is not None:
            kl = (kl_to_prior(first, prior) + kl_to_prior(second, prior)) / 2
            terms["beta_kl"] = beta * kl
            watched = {"kl": kl, "sigma": (first.q.sigma.mean() + second.q.sigma.mean()) / 2}
        return {"loss": sum(terms.values()), **terms, **watched}

    return loss_terms
