"""The whole loss of arXiv 2310.18080: an objective on the draws plus beta times the KL to the prior."""

from torch import Tensor, nn

from fastssl.models import View
from fastssl.objectives.barlow_twins import barlow_twins_terms
from fastssl.objectives.vicreg import vicreg_terms
from fastssl.recipe import Embedding, Recipe

TERMS = {"barlow_twins": barlow_twins_terms, "vicreg": vicreg_terms}


def loss_terms(first: View, second: View, recipe: Recipe, prior: nn.Module | None) -> dict[str, Tensor]:
    """`loss`, the weighted terms that sum to it, and for stochastic embeddings `kl` and `sigma`.

    kl is the unweighted mean over both views and the batch, in nats; sigma the mean standard deviation.
    """
    settings = recipe.objective.model_dump(exclude={"name"})
    terms = TERMS[recipe.objective.name](first.z, second.z, **settings)
    watched = {}
    if first.q is not None:
        kl = (kl_to_prior(first, prior, recipe.embedding) + kl_to_prior(second, prior, recipe.embedding)) / 2
        terms["beta_kl"] = recipe.embedding.beta * kl
        watched = {"kl": kl, "sigma": (first.q.sigma.mean() + second.q.sigma.mean()) / 2}
    return {"loss": sum(terms.values()), **terms, **watched}


def kl_to_prior(view: View, prior: nn.Module, embedding: Embedding) -> Tensor:
    """KL(q || p) summed over dimensions, averaged over the batch (equation 5); Monte Carlo where asked."""
    method = embedding.kl
    if method == "auto":
        method = "closed" if embedding.prior == "standard_normal" else "mc"
    return view.q.kl_to(prior, method=method, samples=view.x_SBD).mean()
