"""The table of detectors by name."""

from fastssl.evaluation.arrays import Device
from fastssl.evaluation.ood import label_based, label_free
from fastssl.evaluation.ood.base import Detector, LinearHead
from fastssl.models.gaussian import Prior

LABEL_FREE: dict[str, type[Detector]] = {
    "sigma_mean": label_free.SigmaMean,
    "sigma_std": label_free.SigmaStd,
    "q_entropy": label_free.QEntropy,
    "prior_log_density": label_free.PriorLogDensity,
    "prior_kl": label_free.PriorKL,
    "posterior_kl": label_free.PosteriorKL,
    "posterior_bhattacharyya": label_free.PosteriorBhattacharyya,
    "draws_disagreement": label_free.DrawsDisagreement,
    "views_sigma": label_free.ViewsSigma,
    "views_disagreement": label_free.ViewsDisagreement,
    "knn_cosine": label_free.KnnCosine,
    "knn_euclidean": label_free.KnnEuclidean,
    "mahalanobis_unlabelled": label_free.MahalanobisUnlabelled,
    "layers_unlabelled": label_free.LayersUnlabelled,
    "kmeans_ssd": label_free.KMeansSSD,
    "pca_residual": label_free.PCAResidual,
    "jepa_score": label_free.JEPAScore,
    "jepa_score_mu": label_free.JEPAScoreMu,
}
LABEL_BASED: dict[str, type[Detector]] = {
    "msp": label_based.MSP,
    "max_logit": label_based.MaxLogit,
    "energy": label_based.Energy,
    "softmax_entropy": label_based.SoftmaxEntropy,
    "gen": label_based.GEN,
    "kl_matching": label_based.KLMatching,
    "odin": label_based.ODIN,
    "mahalanobis": label_based.Mahalanobis,
    "mahalanobis_relative": label_based.MahalanobisRelative,
    "layers_mahalanobis": label_based.LayersMahalanobis,
    "vim": label_based.ViM,
    "react_energy": label_based.ReActEnergy,
    "knn_supervised": label_based.KnnSupervised,
}
DETECTORS = LABEL_FREE | LABEL_BASED
# The uncertainty of the run itself, which summaries and figures show first: sigma relative to the length of mu. Sigma
# alone is at chance on sets where the relative one is not (docs/ood.md).
OWN_UNCERTAINTY = "draws_disagreement"


def detector(
    name: str, *, prior: Prior | None = None, classifier: LinearHead | None = None, device: Device = "cpu"
) -> Detector:
    """Create a detector of `DETECTORS` that has not been fitted yet.

    Args:
        name: a key of `DETECTORS`.
        prior: the prior of the stochastic embedding, None for a standard normal; for `prior_log_density`, `prior_kl`.
        classifier: the classifier that computed the logits; for `vim` and `react_energy`. If None, they compute the
            minimum-norm classifier that reproduces the logits of the training images, which may differ from it in
            dimensions that are constant on those images.
        device: where the scores are computed.

    Raises:
        ValueError: if there is no detector of this name.
    """
    if name not in DETECTORS:
        raise ValueError(f"There is no detector {name!r}: choose one of {', '.join(DETECTORS)}.")
    return DETECTORS[name](prior, classifier, device)
