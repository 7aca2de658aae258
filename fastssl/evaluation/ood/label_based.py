"""Detectors that need labels: of a linear classifier's logits, or of the classes' places among the features.

Orientation is part of each definition: a higher score means more out-of-distribution. logits (N, C) are those of a
linear classifier of the features, whose weights `vim` and `react_energy` need too.

KL matching, ReAct and ODIN's perturbation are pytorch-ood's. The others are not: its 0.4.0 clips probabilities at 1e-7
(GEN, entropy) or rounds them to 1 (MSP), so that sure images tie, and takes covariances in float32 with an absolute
ridge (Mahalanobis, ViM) or undivided by N (relative Mahalanobis). (In float64, KL matching ties no sooner than p is 0.)
"""

import importlib.metadata
import math

import torch
import torch.nn.functional as F
from torch import Tensor

from fastssl.common.errors import UserError
from fastssl.evaluation.ood.base import Detector
from fastssl.evaluation.ood.gaussians import fit_gaussian
from fastssl.evaluation.ood.label_free import KnnCosine
from fastssl.evaluation.ood.nearest import kth_smallest

GEN_GAMMA, GEN_CLASSES = 0.1, 100
REACT_SHARE = 0.9
ODIN_TEMPERATURE, ODIN_STEP = 1000.0, 0.0014  # the step in shares of the pixels' range
FROM_PYTORCH_OOD = ("kl_matching", "odin", "react_energy")


class MSP(Detector):
    """log((1 - p) / p), p the largest softmax probability. Higher is OOD.

    Orders as the usual 1 - p (Hendrycks and Gimpel, arXiv 1610.02136), also where p is 1 to rounding.
    """

    def _score(self, logits: Tensor) -> Tensor:
        top_M, guess_M = logits.max(dim=1)
        others_MC = logits.scatter(1, guess_M[:, None], -math.inf)
        return others_MC.logsumexp(dim=1) - top_M


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
    """min_k KL(p || d_k), d_k the mean p of training images that are guessed as class k. Higher is OOD.

    Hendrycks et al., arXiv 1911.11132, by pytorch-ood.
    """

    def _fit(self, logits: Tensor) -> None:
        self.theirs = pytorch_ood_detectors("kl_matching").KLMatching(None).fit_logits(logits)

    def _score(self, logits: Tensor) -> Tensor:
        return self.theirs.predict_logits(logits)


class ODIN(Detector):
    """-max_c softmax(logit / 1000)_c of the perturbed image (Liang et al., arXiv 1706.02690). Higher is OOD.

    logits: of images moved by `odin_images` towards their own guess; those of the images as they are give the
    temperature alone.
    """

    def _score(self, logits: Tensor) -> Tensor:
        return -(logits / ODIN_TEMPERATURE).softmax(dim=1).amax(dim=1)


class Mahalanobis(Detector):
    """Squared Mahalanobis distance to the nearest class, one covariance for all (Lee et al., arXiv 1807.03888).

    Higher is OOD. On h alone: without their sum over layers and input perturbation.
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
    """Mahalanobis less the distance to one Gaussian fitted to all (Ren et al., arXiv 2106.09022). Higher is OOD."""

    def _fit(self, features: Tensor, labels: Tensor) -> None:
        super()._fit(features, labels)
        self.background = fit_gaussian(features)

    def _score(self, features: Tensor) -> Tensor:
        return super()._score(features) - self.background.distance(features)


class ViM(Detector):
    """alpha |residual of h| - log sum_c exp(logit_c) (Wang et al., arXiv 2203.10807). Higher is OOD.

    The residual is what the first principal directions around the origin o = -W^+ b leave of h: 1,000 of them from
    2,048 dimensions on and 512 from 768 on, as theirs, and half of fewer, where theirs would leave nothing. alpha makes
    its mean length over the training images the mean largest logit.
    """

    def _fit(self, features: Tensor, logits: Tensor) -> None:
        weight_CD, bias_C = self.classifier or linear_map(features, logits)
        dims = features.shape[1]
        kept = 1000 if dims >= 2048 else 512 if dims >= 768 else dims // 2
        self.origin_D = -torch.linalg.pinv(weight_CD) @ bias_C
        centred_ND = features - self.origin_D
        axes_DD = torch.linalg.eigh(centred_ND.T @ centred_ND / len(features)).eigenvectors  # by ascending variance
        self.minor_DR = axes_DD[:, : dims - kept]
        residual_N = torch.linalg.vector_norm(centred_ND @ self.minor_DR, dim=1)
        self.alpha = logits.amax(dim=1).mean() / residual_N.mean().clamp(min=torch.finfo(features.dtype).tiny)

    def _score(self, features: Tensor, logits: Tensor) -> Tensor:
        residual_M = torch.linalg.vector_norm((features - self.origin_D) @ self.minor_DR, dim=1)
        return self.alpha * residual_M - logits.logsumexp(dim=1)


class ReActEnergy(Detector):
    """The energy of what the classifier makes of h, cut off above the 90th percentile of all training activations.

    Sun et al., arXiv 2111.12797, by pytorch-ood. Higher is OOD.
    """

    def _fit(self, features: Tensor, logits: Tensor) -> None:
        weight_CD, bias_C = self.classifier or linear_map(features, logits)
        react = pytorch_ood_detectors("react_energy").ReAct(
            backbone=None, head=lambda h_MD: F.linear(h_MD, weight_CD, bias_C), percentile=REACT_SHARE
        )
        self.theirs = react.fit_feature_maps(features, features.new_zeros(len(features)))

    def _score(self, features: Tensor) -> Tensor:
        return self.theirs.predict_feature_maps(features)


class KnnSupervised(KnnCosine):
    """knn_cosine of an encoder that was trained with labels, as in Sun et al., arXiv 2204.06507. Higher is OOD."""


def linear_map(features_ND: Tensor, logits_NC: Tensor) -> tuple[Tensor, Tensor]:
    """(weight (C, D), bias (C,)) with logits = weight @ features + bias: the smallest that fit best."""
    mean_D = features_ND.mean(dim=0)
    one_more = torch.cat([features_ND - mean_D, torch.ones_like(features_ND[:, :1])], dim=1)
    # gelsy finds the rank itself, so dead features do no harm; there is none on a GPU.
    solution = torch.linalg.lstsq(one_more.cpu(), logits_NC.cpu(), driver="gelsy").solution.to(features_ND.device)
    weight_CD, bias_C = solution[:-1].T, solution[-1]
    return weight_CD, bias_C - weight_CD @ mean_D


def odin_images(model, images: Tensor, std: tuple[float, ...]) -> Tensor:
    """ODIN's perturbed images, normalised (B, 3, size, size) as given: 0.0014 of the pixels' range towards the guess.

    model: images to logits, with gradients. By pytorch-ood.
    """
    return pytorch_ood_detectors("odin").odin.odin_preprocessing(
        model, images, eps=ODIN_STEP, temperature=ODIN_TEMPERATURE, norm_std=list(std)
    )


def pytorch_ood_version() -> str | None:
    """None where the package is missing."""
    try:
        return importlib.metadata.version("pytorch-ood")
    except importlib.metadata.PackageNotFoundError:
        return None


def pytorch_ood_detectors(name: str):
    """The module pytorch_ood.detector; UserError where the package is missing."""
    if pytorch_ood_version() is None:
        raise UserError(f"The detector {name} comes from the package pytorch-ood: pip install pytorch-ood")
    import pytorch_ood.detector  # here, as it takes a second

    return pytorch_ood.detector
