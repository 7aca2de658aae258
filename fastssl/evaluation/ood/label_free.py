"""Detectors without labels: scores of the stochastic embedding q = N(mu, diag(sigma^2)) or of the representation h.

A higher score always means more out-of-distribution (OOD).
"""

import math
from collections.abc import Iterator
from typing import ClassVar, Literal

import torch
import torch.nn.functional as F
from sklearn.cluster import KMeans
from torch import Tensor

from fastssl.common.randomness import NOISE_EVALUATION, normals
from fastssl.evaluation.ood.base import Detector
from fastssl.evaluation.ood.distances import fit_gaussian, kth_smallest
from fastssl.models.gaussian import Prior, StandardNormal

K = 50  # nearest training image of the kNN detectors: the value of Sun et al. (arXiv 2204.06507) for CIFAR-10
# Training posteriors are sampled: the 5th nearest of 1,000 is about as near as the 50th of 10,000.
POSTERIORS = 1_000
K_POSTERIORS = 5
DRAWS = 16
CLUSTERS = 10
VARIANCE_KEPT = 0.95
SMALLEST_DEVIATION = 1e-3  # of a layer's distances, relative to their mean; of a Gaussian it is sqrt(2 / channels)
SMALLEST_SINGULAR_VALUE = 1e-6  # the published eps of JEPA-SCORE
CHUNK_ELEMENTS = 1 << 22  # draws held at a time: 32 MiB of float64; a mixture needs ten times that
FACTORS = 16
PAIR_ELEMENTS = 1 << 19  # (image, posterior, dimension) triples at a time: 4 MiB of float64, which fits into a cache


class SigmaMean(Detector):
    """Mean of sigma over dimensions. Higher is OOD: the embedding is more uncertain (arXiv 2310.18080)."""

    def _score(self, sigma: Tensor) -> Tensor:
        return sigma.mean(dim=1)


class SigmaStd(Detector):
    """Standard deviation (n - 1) of sigma over dimensions. Higher is OOD: the uncertainty varies between dimensions."""

    def _score(self, sigma: Tensor) -> Tensor:
        if sigma.shape[1] < 2:
            raise ValueError("An embedding of one dimension has no standard deviation of sigma.")
        return sigma.std(dim=1)


class QEntropy(Detector):
    """Differential entropy of q in nats: sum_d 1/2 log(2 pi e sigma_d^2). Higher is OOD, as for `sigma_mean`.

    Relative changes of sigma count equally in all dimensions, whether sigma is small or large there.
    """

    def _score(self, sigma: Tensor) -> Tensor:
        return sigma.log().sum(dim=1) + 0.5 * sigma.shape[1] * math.log(2 * math.pi * math.e)


class PriorLogDensity(Detector):
    """-log p(mu) in nats, p the prior of the run. Higher is OOD: mu lies in a low-density region of the prior."""

    def _score(self, mu: Tensor) -> Tensor:
        prior = self.prior or StandardNormal()
        rows = max(1, CHUNK_ELEMENTS // mu.shape[1])
        return torch.cat([-mean_log_density(prior, mu_BE[None]) for mu_BE in mu.split(rows)])


class PriorKL(Detector):
    """KL(q || p) in nats, p the prior of the run. Higher is OOD: training pulls training images, not others, towards p.

    In closed form for a standard normal prior, otherwise the mean of log q - log p over 16 draws, with the same noise
    for every image.
    """

    def _score(self, mu: Tensor, sigma: Tensor) -> Tensor:
        if self.prior is None or isinstance(self.prior, StandardNormal):
            return 0.5 * (mu**2 + sigma**2 - 1 - 2 * sigma.log()).sum(dim=1)
        log_q_S = -0.5 * (common_noise(mu) ** 2 + math.log(2 * math.pi)).sum(dim=1)
        log_p_M = torch.cat([mean_log_density(self.prior, x_SBE) for x_SBE in draws(mu, sigma)])
        return log_q_S.mean() - sigma.log().sum(dim=1) - log_p_M


class PosteriorKL(Detector):
    """KL(q || q_n) in nats to the 5th nearest of 1,000 random training posteriors q_n. Higher is OOD."""

    def _fit(self, mu: Tensor, sigma: Tensor) -> None:
        rows = torch.randperm(len(mu), generator=torch.Generator().manual_seed(0))[:POSTERIORS].to(mu.device)
        # KL and Bhattacharyya distance do not change when all means are shifted, and small means lose fewer digits.
        self.center_E = mu[rows].mean(dim=0)
        self.mu_NE = mu[rows] - self.center_E
        self.sigma_NE = sigma[rows]

    def _score(self, mu: Tensor, sigma: Tensor) -> Tensor:
        # sum((sigma^2 + (mu - mu_n)^2) / sigma_n^2 + log(sigma_n^2 / sigma^2) - 1) / 2, with the square expanded, so
        # that the terms which depend on both q and q_n become one matrix product.
        mu_ME = mu - self.center_E
        precision_NE = self.sigma_NE**-2
        query_MK = torch.cat([sigma**2 + mu_ME**2, mu_ME], dim=1)
        bank_NK = torch.cat([precision_NE, -2 * self.mu_NE * precision_NE], dim=1)
        offset_N = (self.mu_NE**2 * precision_NE).sum(dim=1) + 2 * self.sigma_NE.log().sum(dim=1)
        smallest_M = kth_smallest(query_MK, bank_NK, offset_N, K_POSTERIORS)
        return 0.5 * (smallest_M - 2 * sigma.log().sum(dim=1) - mu.shape[1])


class PosteriorBhattacharyya(PosteriorKL):
    """Bhattacharyya distance -log integral sqrt(q q_n) in place of the KL divergence. Higher is OOD."""

    def _score(self, mu: Tensor, sigma: Tensor) -> Tensor:
        # With s = sigma^2 + sigma_n^2: sum((mu - mu_n)^2 / (4 s) + log(s / (2 sigma sigma_n)) / 2). This is not a
        # matrix product, because the divisor depends on both q and q_n.
        posteriors, dimensions = self.mu_NE.shape
        variance_NE = self.sigma_NE**2
        log_sigma_N = self.sigma_NE.log().sum(dim=1)
        # The logarithm of a product of a few s takes less time than that of each; sigma is from 0.01 to 5, so it fits.
        factors = math.gcd(dimensions, FACTORS)
        centered_ME = mu - self.center_E
        score_M = mu.new_empty(len(mu))
        # Memory for all rounds. Allocated in each round, it grew to 17 GB: small results split what had been freed.
        rows = min(len(mu), max(1, PAIR_ELEMENTS // self.mu_NE.numel()))
        s_BNE, square_BNE = mu.new_empty(2, rows, posteriors, dimensions)
        for first in range(0, len(mu), rows):
            mu_BE, sigma_BE = (part[first : first + rows] for part in (centered_ME, sigma))
            s = torch.add(variance_NE, sigma_BE[:, None] ** 2, out=s_BNE[: len(mu_BE)])
            square = torch.sub(mu_BE[:, None], self.mu_NE, out=square_BNE[: len(mu_BE)]).square_()
            distance_BN = square.div_(s).sum(dim=2) / 4
            distance_BN += 0.5 * s.unflatten(2, (-1, factors)).prod(dim=3).log().sum(dim=2)
            distance_BN -= 0.5 * (dimensions * math.log(2) + sigma_BE.log().sum(dim=1)[:, None] + log_sigma_N)
            score_M[first : first + rows] = distance_BN.kthvalue(min(K_POSTERIORS, posteriors), dim=1).values
        return score_M


class DrawsDisagreement(Detector):
    """1 - |mean of 16 draws from q, each scaled to length 1|^2, 0 to 1. Higher is OOD: the directions differ more.

    Unlike `sigma_mean`, it measures sigma relative to the length of mu. The noise is the same for every image, so
    scores differ only because q does.
    """

    def _score(self, mu: Tensor, sigma: Tensor) -> Tensor:
        mean_ME = torch.cat([F.normalize(x_SBE, dim=2).mean(dim=0) for x_SBE in draws(mu, sigma)])
        return 1 - mean_ME.square().sum(dim=1)


class ViewsDisagreement(Detector):
    """1 - cosine similarity of h of two augmented views, 0 to 2. Higher is OOD: the encoder is not invariant there."""

    of_views = True

    def _score(self, features: Tensor) -> Tensor:
        return 1 - F.cosine_similarity(features[:, 0], features[:, 1], dim=1)


class ViewsSigma(Detector):
    """Mean of sigma over dimensions and two augmented views. Higher is OOD, as for `sigma_mean`, with less noise.

    Sigma is then that of the images that training has seen, which are augmented views.
    """

    of_views = True

    def _score(self, sigma: Tensor) -> Tensor:
        return sigma.mean(dim=(1, 2))


class KnnCosine(Detector):
    """1 - cosine similarity of h to the 50th nearest training image. Higher is OOD.

    Deep nearest neighbors (Sun et al., arXiv 2204.06507), who use the Euclidean distance of features of length 1, which
    gives the same order.
    """

    def _fit(self, features: Tensor) -> None:
        self.bank_ND = F.normalize(features, dim=1)

    def _score(self, features: Tensor) -> Tensor:
        ones_N = self.bank_ND.new_ones(len(self.bank_ND))
        return kth_smallest(-F.normalize(features, dim=1), self.bank_ND, ones_N, K)


class KnnEuclidean(Detector):
    """Euclidean distance of h to the 50th nearest training image. Higher is OOD."""

    def _fit(self, features: Tensor) -> None:
        # Centering does not change distances, and small features lose fewer digits when the square is expanded.
        self.center_D = features.mean(dim=0)
        self.bank_ND = features - self.center_D

    def _score(self, features: Tensor) -> Tensor:
        query_MD = features - self.center_D
        square_M = kth_smallest(-2 * query_MD, self.bank_ND, self.bank_ND.square().sum(dim=1), K)
        return (square_M + query_MD.square().sum(dim=1)).clamp(min=0).sqrt()


class MahalanobisUnlabelled(Detector):
    """Squared Mahalanobis distance of h to one Gaussian fitted to all training images. Higher is OOD.

    The background term of Ren et al., arXiv 2106.09022; `kmeans_ssd` with a single cluster.
    """

    def _fit(self, features: Tensor) -> None:
        self.gaussian = fit_gaussian(features)

    def _score(self, features: Tensor) -> Tensor:
        return self.gaussian.distance(features)


class LayerDetector(Detector):
    """Base class: a detector fitted to each of several layers of the encoder, each averaged over positions.

    The score is the mean over layers of (d - m) / s, d the detector's score of a layer, m and s its mean and standard
    deviation over the training images. So no layer counts more because it has more channels, and no OOD images are
    needed to weigh them, as the logistic regression of Lee et al. (arXiv 1807.03888) needs them. Anthony and Kamnitsas
    (arXiv 2309.01488) add the distances of several layers in this way.
    """

    of_layer: ClassVar[type[Detector]]

    def _fit_each(self, layers: list[Tensor], *labels: Tensor) -> None:
        self.parts = [self.of_layer(device=self.device) for _ in layers]
        self.scales = []
        for part, x_ND in zip(self.parts, layers):
            part._fit(x_ND, *labels)
            score_N = part._score(x_ND)
            # With fewer images than channels, all have the same distance, and its deviation would be rounding.
            smallest = SMALLEST_DEVIATION * score_N.mean()
            self.scales.append((score_N.mean(), score_N.std().clamp(min=smallest)))

    def _score(self, layers: list[Tensor]) -> Tensor:
        found = zip(self.parts, layers, self.scales)
        return torch.stack([(part._score(x_MD) - mean) / std for part, x_MD, (mean, std) in found]).mean(dim=0)


class LayersUnlabelled(LayerDetector):
    """`MahalanobisUnlabelled` of several layers, combined as in `LayerDetector`. Higher is OOD."""

    of_layer = MahalanobisUnlabelled

    def _fit(self, layers: list[Tensor]) -> None:
        self._fit_each(layers)


class KMeansSSD(Detector):
    """Squared Mahalanobis distance of h / |h| to the nearest of up to 10 clusters, each with its own covariance.

    Higher is OOD. SSD (Sehwag et al., arXiv 2103.12051): k-means on normalized features of an encoder trained without
    labels. The number of clusters is reduced so that they have at least 4 D images on average.
    """

    def _fit(self, features: Tensor) -> None:
        unit_ND = F.normalize(features, dim=1)
        count = min(CLUSTERS, max(1, len(unit_ND) // (4 * unit_ND.shape[1])))
        kmeans = KMeans(count, n_init=1, random_state=0)
        cluster_N = torch.from_numpy(kmeans.fit_predict(unit_ND.cpu().numpy())).to(unit_ND.device)
        parts = [unit_ND[cluster_N == cluster] for cluster in cluster_N.unique()]
        self.gaussians = [fit_gaussian(part) for part in parts if len(part) > 1]

    def _score(self, features: Tensor) -> Tensor:
        unit_MD = F.normalize(features, dim=1)
        return torch.stack([gaussian.distance(unit_MD) for gaussian in self.gaussians]).amin(dim=0)


class PCAResidual(Detector):
    """Length of h without the principal components that hold 95 % of the training variance. Higher is OOD.

    The residual of ViM (Wang et al., arXiv 2203.10807), but around the mean, and without the logits.
    """

    def _fit(self, features: Tensor) -> None:
        self.mean_D = features.mean(dim=0)
        deviation_ND = features - self.mean_D
        # eigh sorts by ascending variance.
        variance_D, axes_DD = torch.linalg.eigh(deviation_ND.T @ deviation_ND / len(features))
        share_D = variance_D.clamp(min=0).cumsum(dim=0) / variance_D.clamp(min=0).sum().clamp(min=1e-300)
        self.minor_DR = axes_DD[:, share_D <= 1 - VARIANCE_KEPT]

    def _score(self, features: Tensor) -> Tensor:
        return torch.linalg.vector_norm((features - self.mean_D) @ self.minor_DR, dim=1)


class JEPAScore(Detector):
    """-sum_k log max(s_k, 1e-6), s_k the singular values of the Jacobian of h at the image. Higher is OOD.

    Minus JEPA-SCORE (Balestriero et al., arXiv 2510.05949), the log-density of an image up to a constant, under an
    encoder whose embeddings of training images are Gaussian. Its `features` (M, K) are the s_k, of `jacobian.py`.
    """

    jacobian_of: ClassVar[Literal["h", "mu"] | None] = "h"

    def _score(self, features: Tensor) -> Tensor:
        return -features.clamp(min=SMALLEST_SINGULAR_VALUE).log().sum(dim=1)


class JEPAScoreMu(JEPAScore):
    """`JEPAScore` of the mean mu of a stochastic z, which the KL pulls towards a Gaussian. Higher is OOD."""

    jacobian_of = "mu"


def common_noise(mu_ME: Tensor) -> Tensor:
    """Return standard normal draws (S, E) that are shared by all images."""
    image_1 = torch.zeros(1, dtype=torch.int64, device=mu_ME.device)
    return normals(0, 0, image_1, 0, DRAWS, mu_ME.shape[1], NOISE_EVALUATION)[:, 0].double()


def draws(mu_ME: Tensor, sigma_ME: Tensor) -> Iterator[Tensor]:
    """Yield draws (S, B, E) from q of some images at a time."""
    noise_SE = common_noise(mu_ME)
    rows = max(1, CHUNK_ELEMENTS // (DRAWS * mu_ME.shape[1]))
    for mu_BE, sigma_BE in zip(mu_ME.split(rows), sigma_ME.split(rows)):
        yield mu_BE + sigma_BE * noise_SE[:, None]


def mean_log_density(prior: Prior, x_SBE: Tensor) -> Tensor:
    """Return the mean over draws of log p(x), (B,)."""
    log_p = prior.log_prob(x_SBE)
    # In the mixture's mode "reference", log_prob returns (B,): it averages over the draws itself.
    return log_p.mean(dim=0) if log_p.ndim == 2 else log_p
