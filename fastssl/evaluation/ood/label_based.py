"""Detectors that use labels: through the logits of a linear classifier, or through the class means of the features.

A higher score always means more out-of-distribution (OOD). `logits` (N, C) are those of a linear classifier of the
features.

KL matching, ReAct and ODIN's perturbation come from pytorch-ood. The other scores of its version 0.4.0 are less exact:
it clips probabilities at 1e-7 (GEN, entropy) or rounds them to 1 (MSP), so confident images tie, and it computes
covariances in float32 with an absolute ridge (Mahalanobis, ViM) or does not divide them by N (relative Mahalanobis).
(In float64, its KL matching ties only where a probability is 0.)
"""

import importlib.metadata
import math
from collections.abc import Callable
from types import ModuleType

import torch
import torch.nn.functional as F
from torch import Tensor

from fastssl.common.errors import UserError
from fastssl.evaluation.ood.base import Detector, LinearHead
from fastssl.evaluation.ood.distances import fit_gaussian, kth_smallest
from fastssl.evaluation.ood.label_free import KnnCosine, LayerDetector

# The published settings.
GEN_GAMMA = 0.1
GEN_CLASSES = 100
REACT_PERCENTILE = 0.9
ODIN_TEMPERATURE = 1000.0
ODIN_STEP = 0.0014  # relative to the range of the pixels


class MSP(Detector):
    """log((1 - p) / p), p the largest softmax probability. Higher is OOD.

    It gives the same order as the usual 1 - p (Hendrycks and Gimpel, arXiv 1610.02136), also where p rounds to 1.
    """

    def _score(self, logits: Tensor) -> Tensor:
        largest_M, class_M = logits.max(dim=1)
        others_MC = logits.scatter(1, class_M[:, None], -math.inf)
        return others_MC.logsumexp(dim=1) - largest_M


class MaxLogit(Detector):
    """-max_c logit_c (Hendrycks et al., arXiv 1911.11132). Higher is OOD."""

    def _score(self, logits: Tensor) -> Tensor:
        return -logits.amax(dim=1)


class Energy(Detector):
    """-log sum_c exp(logit_c) (Liu et al., arXiv 2010.03759, temperature 1). Higher is OOD."""

    def _score(self, logits: Tensor) -> Tensor:
        return -logits.logsumexp(dim=1)


class SoftmaxEntropy(Detector):
    """-sum_c p_c log p_c in nats. Higher is OOD."""

    def _score(self, logits: Tensor) -> Tensor:
        log_p_MC = logits.log_softmax(dim=1)
        return -(log_p_MC.exp() * log_p_MC).sum(dim=1)


class GEN(Detector):
    """sum over the 100 largest p_c of (p_c (1 - p_c))^0.1 (Liu et al., CVPR 2023). Higher is OOD."""

    def _score(self, logits: Tensor) -> Tensor:
        log_p_MC = logits.log_softmax(dim=1).topk(min(GEN_CLASSES, logits.shape[1]), dim=1).values
        log_rest_MC = torch.log(-torch.expm1(log_p_MC))
        return (GEN_GAMMA * (log_p_MC + log_rest_MC)).exp().sum(dim=1)


class KLMatching(Detector):
    """min_k KL(p || d_k), d_k the mean p of the training images that are predicted as class k. Higher is OOD.

    Hendrycks et al., arXiv 1911.11132, as implemented in pytorch-ood.
    """

    needs_pytorch_ood = True

    def _fit(self, logits: Tensor) -> None:
        self.kl_matching = import_pytorch_ood("kl_matching").KLMatching(None).fit_logits(logits)

    def _score(self, logits: Tensor) -> Tensor:
        return self.kl_matching.predict_logits(logits)


class ODIN(Detector):
    """-max_c softmax(logit / 1000)_c of the perturbed image (Liang et al., arXiv 1706.02690). Higher is OOD.

    Its `logits` are those of images that `perturb_for_odin` moved towards their predicted class. With those of the
    original images only the temperature has an effect.
    """

    needs_pytorch_ood = True

    def _score(self, logits: Tensor) -> Tensor:
        return -(logits / ODIN_TEMPERATURE).softmax(dim=1).amax(dim=1)


class Mahalanobis(Detector):
    """Squared Mahalanobis distance to the nearest class, one covariance for all (Lee et al., arXiv 1807.03888).

    Higher is OOD. Computed on h only, without the paper's sum over layers and its input perturbation.
    """

    def _fit(self, features: Tensor, labels: Tensor) -> None:
        class_C, class_N = labels.unique(return_inverse=True)
        sum_CD = features.new_zeros(len(class_C), features.shape[1]).index_add_(0, class_N, features)
        mean_CD = sum_CD / class_N.bincount()[:, None]
        self.gaussian = fit_gaussian(features, features - mean_CD[class_N])
        self.mean_CD = self.gaussian.whiten(mean_CD)

    def _score(self, features: Tensor) -> Tensor:
        white_MD = self.gaussian.whiten(features)
        nearest_M = kth_smallest(-2 * white_MD, self.mean_CD, self.mean_CD.square().sum(dim=1), 1)
        return (nearest_M + white_MD.square().sum(dim=1)).clamp(min=0)


class MahalanobisRelative(Mahalanobis):
    """`Mahalanobis` minus the distance to one Gaussian of all images (Ren et al., arXiv 2106.09022). Higher is OOD."""

    def _fit(self, features: Tensor, labels: Tensor) -> None:
        super()._fit(features, labels)
        self.background = fit_gaussian(features)

    def _score(self, features: Tensor) -> Tensor:
        return super()._score(features) - self.background.distance(features)


class LayersMahalanobis(LayerDetector):
    """`Mahalanobis` of several layers, combined as in `LayerDetector`. Higher is OOD.

    Lee et al., arXiv 1807.03888, without its input perturbation, and without OOD images for the weights of the layers.
    """

    of_layer = Mahalanobis

    def _fit(self, layers: list[Tensor], labels: Tensor) -> None:
        self._fit_each(layers, labels)


class ViM(Detector):
    """alpha |residual of h| - log sum_c exp(logit_c) (Wang et al., arXiv 2203.10807). Higher is OOD.

    The residual is what remains of h without its first principal directions around the origin o = -W^+ b: 1,000 of them
    for D >= 2048 and 512 for D >= 768, as published; D / 2 below, where 512 would leave nothing. alpha scales the mean
    length of the residual to the mean largest logit, both over the training images.
    """

    def _fit(self, features: Tensor, logits: Tensor) -> None:
        weight_CD, bias_C = self.classifier or minimum_norm_head(features, logits)
        dims = features.shape[1]
        removed = 1000 if dims >= 2048 else 512 if dims >= 768 else dims // 2
        self.origin_D = -torch.linalg.pinv(weight_CD) @ bias_C
        centered_ND = features - self.origin_D
        # eigh sorts by ascending variance, so the principal directions are the last ones.
        axes_DD = torch.linalg.eigh(centered_ND.T @ centered_ND / len(features)).eigenvectors
        self.minor_DR = axes_DD[:, : dims - removed]
        residual_N = torch.linalg.vector_norm(centered_ND @ self.minor_DR, dim=1)
        self.alpha = logits.amax(dim=1).mean() / residual_N.mean().clamp(min=torch.finfo(features.dtype).tiny)

    def _score(self, features: Tensor, logits: Tensor) -> Tensor:
        residual_M = torch.linalg.vector_norm((features - self.origin_D) @ self.minor_DR, dim=1)
        return self.alpha * residual_M - logits.logsumexp(dim=1)


class ReActEnergy(Detector):
    """Energy of the logits after h is clipped at the 90th percentile of all training activations. Higher is OOD.

    Sun et al., arXiv 2111.12797, as implemented in pytorch-ood.
    """

    needs_pytorch_ood = True

    def _fit(self, features: Tensor, logits: Tensor) -> None:
        weight_CD, bias_C = self.classifier or minimum_norm_head(features, logits)
        react = import_pytorch_ood("react_energy").ReAct(
            backbone=None, head=lambda h_MD: F.linear(h_MD, weight_CD, bias_C), percentile=REACT_PERCENTILE
        )
        self.react = react.fit_feature_maps(features, features.new_zeros(len(features)))

    def _score(self, features: Tensor) -> Tensor:
        return self.react.predict_feature_maps(features)


class KnnSupervised(KnnCosine):
    """`knn_cosine` for an encoder that was trained with labels, as in Sun et al., arXiv 2204.06507. Higher is OOD."""

    needs_supervised_encoder = True


def minimum_norm_head(features_ND: Tensor, logits_NC: Tensor) -> LinearHead:
    """Return the minimum-norm least-squares solution of logits = weight @ features + bias."""
    mean_D = features_ND.mean(dim=0)
    with_ones = torch.cat([features_ND - mean_D, torch.ones_like(features_ND[:, :1])], dim=1)
    # The driver gelsy handles features of deficient rank (dead dimensions), but exists on the CPU only.
    solution = torch.linalg.lstsq(with_ones.cpu(), logits_NC.cpu(), driver="gelsy").solution.to(features_ND.device)
    weight_CD = solution[:-1].T
    return LinearHead(weight_CD, solution[-1] - weight_CD @ mean_D)


def perturb_for_odin(model: Callable[[Tensor], Tensor], images: Tensor, std: tuple[float, ...]) -> Tensor:
    """Move normalized images (B, C, size, size) by 0.0014 of the pixel range towards their predicted class.

    model: computes logits from images, with gradients. std: the standard deviations by which images were normalized.
    """
    return import_pytorch_ood("odin").odin.odin_preprocessing(
        model, images, eps=ODIN_STEP, temperature=ODIN_TEMPERATURE, norm_std=list(std)
    )


def pytorch_ood_version() -> str | None:
    """Return the version of pytorch-ood, or None if it is not installed."""
    try:
        return importlib.metadata.version("pytorch-ood")
    except importlib.metadata.PackageNotFoundError:
        return None


def import_pytorch_ood(detector_name: str) -> ModuleType:
    """Import and return pytorch_ood.detector. Raises UserError if it is not installed."""
    if pytorch_ood_version() is None:
        raise UserError(
            f"The detector {detector_name} needs the package pytorch-ood", hint="run `pip install pytorch-ood`"
        )
    # Imported here because it takes a second.
    import pytorch_ood.detector

    return pytorch_ood.detector
