"""Detectors that need no label: of the stochastic embedding q = N(mu, diag sigma^2), and of the representation h.

Orientation is part of each definition: a higher score means more out-of-distribution.
"""

import math

import torch
import torch.nn.functional as F
from sklearn.cluster import KMeans
from torch import Tensor, nn

from fastssl.common.randomness import NOISE_EVALUATION, normals
from fastssl.evaluation.ood.base import Detector
from fastssl.evaluation.ood.gaussians import fit_gaussian
from fastssl.evaluation.ood.nearest import kth_bhattacharyya, kth_kl, kth_smallest
from fastssl.models import StandardNormal

K = 50  # nearest training images: of CIFAR-10 in Sun et al., arXiv 2204.06507
POSTERIORS, K_POSTERIORS = 1_000, 5  # a random part of the training posteriors: as near to it as the 50th of 10,000
DRAWS = 16
CLUSTERS = 10
VARIANCE_KEPT = 0.95
CHUNK_ELEMENTS = 1 << 22  # of draws that are held at a time: 32 MiB of float64, and a mixture ten times that


class SigmaMean(Detector):
    """mean_d sigma_d. Higher is OOD: the encoder is less sure of the embedding (arXiv 2310.18080)."""

    def _score(self, sigma: Tensor) -> Tensor:
        return sigma.mean(dim=1)


class SigmaStd(Detector):
    """Standard deviation over the dimensions of sigma_d (n - 1). Higher is OOD: the sureness is spread unevenly."""

    def _score(self, sigma: Tensor) -> Tensor:
        if sigma.shape[1] < 2:
            raise ValueError("An embedding of one dimension has no spread of sigma.")
        return sigma.std(dim=1)


class QEntropy(Detector):
    """Differential entropy of q in nats: sum_d 1/2 log(2 pi e sigma_d^2). Higher is OOD, as for sigma_mean.

    The log of the volume that q fills: dimensions with a small sigma weigh as much as those with a large one.
    """

    def _score(self, sigma: Tensor) -> Tensor:
        return sigma.log().sum(dim=1) + 0.5 * sigma.shape[1] * math.log(2 * math.pi * math.e)


class PriorLogDensity(Detector):
    """-log p(mu) in nats, p the prior that the run was trained with. Higher is OOD: an unlikely place."""

    def _score(self, mu: Tensor) -> Tensor:
        prior = self.prior or StandardNormal()
        return torch.cat([-mean_log_density(prior, mu_BE[None]) for mu_BE in mu.split(rows_of(1, mu))])


class PriorKL(Detector):
    """KL(q || p) in nats, p the run's prior. Higher is OOD: training pulls the embeddings of what it sees towards p.

    Closed for a standard normal, else the mean over 16 draws of log q - log p, the same noise for every image.
    """

    def _score(self, mu: Tensor, sigma: Tensor) -> Tensor:
        if self.prior is None or isinstance(self.prior, StandardNormal):
            return 0.5 * (mu**2 + sigma**2 - 1 - 2 * sigma.log()).sum(dim=1)
        noise_SE = common_noise(mu)
        log_q_S = -0.5 * (noise_SE**2 + math.log(2 * math.pi)).sum(dim=1)
        found = []
        for mu_BE, sigma_BE in zip(mu.split(rows_of(DRAWS, mu)), sigma.split(rows_of(DRAWS, mu))):
            x_SBE = mu_BE + sigma_BE * noise_SE[:, None]
            found.append(log_q_S.mean() - sigma_BE.log().sum(dim=1) - mean_log_density(self.prior, x_SBE))
        return torch.cat(found)


class PosteriorKL(Detector):
    """KL(q || q_n) to the 5th nearest of 1,000 random training posteriors q_n, in nats. Higher is OOD."""

    def _fit(self, mu: Tensor, sigma: Tensor) -> None:
        self.bank = some_posteriors(mu, sigma)

    def _score(self, mu: Tensor, sigma: Tensor) -> Tensor:
        return kth_kl(mu, sigma, *self.bank, K_POSTERIORS)


class PosteriorBhattacharyya(PosteriorKL):
    """Bhattacharyya distance -log integral sqrt(q q_n) in place of the KL. Higher is OOD."""

    def _score(self, mu: Tensor, sigma: Tensor) -> Tensor:
        return kth_bhattacharyya(mu, sigma, *self.bank, K_POSTERIORS)


class DrawsDisagreement(Detector):
    """1 - |mean of 16 draws from q, each of length 1|^2, from 0 to 1. Higher is OOD: the draws point apart.

    Where sigma_mean is on the scale of the embedding, this is sigma against the length of mu. Every image gets the same
    noise, so that scores differ by q alone.
    """

    def _score(self, mu: Tensor, sigma: Tensor) -> Tensor:
        noise_SE = common_noise(mu)
        found = []
        for mu_BE, sigma_BE in zip(mu.split(rows_of(DRAWS, mu)), sigma.split(rows_of(DRAWS, mu))):
            draw_SBE = F.normalize(mu_BE + sigma_BE * noise_SE[:, None], dim=2)
            found.append(1 - draw_SBE.mean(dim=0).square().sum(dim=1))
        return torch.cat(found)


class ViewsDisagreement(Detector):
    """1 - cosine of h of two augmented views, from 0 to 2. Higher is OOD: what training made alike differs.

    features (M, 2, D): h of both training views of each image.
    """

    def _score(self, features: Tensor) -> Tensor:
        return 1 - F.cosine_similarity(features[:, 0], features[:, 1], dim=1)


class KnnCosine(Detector):
    """1 - cosine of h to the 50th nearest training image. Higher is OOD.

    Deep nearest neighbours (Sun et al., arXiv 2204.06507): there the Euclidean distance of features of length 1, which
    orders the same.
    """

    def _fit(self, features: Tensor) -> None:
        self.bank_ND = F.normalize(features, dim=1)

    def _score(self, features: Tensor) -> Tensor:
        ones_N = self.bank_ND.new_ones(len(self.bank_ND))
        return kth_smallest(-F.normalize(features, dim=1), self.bank_ND, ones_N, K)


class KnnEuclidean(Detector):
    """Euclidean distance of h to the 50th nearest training image. Higher is OOD."""

    def _fit(self, features: Tensor) -> None:
        self.centre_D = features.mean(dim=0)  # distances stay, and less cancels
        self.bank_ND = features - self.centre_D

    def _score(self, features: Tensor) -> Tensor:
        query_MD = features - self.centre_D
        square_M = kth_smallest(-2 * query_MD, self.bank_ND, self.bank_ND.square().sum(dim=1), K)
        return (square_M + query_MD.square().sum(dim=1)).clamp(min=0).sqrt()


class MahalanobisUnlabelled(Detector):
    """Squared Mahalanobis distance of h to one Gaussian fitted to all training images. Higher is OOD.

    The background term of Ren et al., arXiv 2106.09022; SSD (below) with a single cluster.
    """

    def _fit(self, features: Tensor) -> None:
        self.gaussian = fit_gaussian(features)

    def _score(self, features: Tensor) -> Tensor:
        return self.gaussian.distance(features)


class KMeansSSD(Detector):
    """Squared Mahalanobis distance to the nearest of up to 10 clusters of h at length 1, each with its own covariance.

    Higher is OOD. SSD (Sehwag et al., arXiv 2103.12051): k-means on normalised features of an encoder trained without
    labels. There are fewer clusters where they would have fewer than 4 D images each.
    """

    def _fit(self, features: Tensor) -> None:
        unit_ND = F.normalize(features, dim=1)
        count = min(CLUSTERS, max(1, len(unit_ND) // (4 * unit_ND.shape[1])))
        cluster_N = KMeans(count, n_init=1, random_state=0).fit_predict(unit_ND.cpu().numpy())
        cluster_N = torch.from_numpy(cluster_N).to(unit_ND.device)
        parts = [unit_ND[cluster_N == cluster] for cluster in cluster_N.unique()]
        self.gaussians = [fit_gaussian(part) for part in parts if len(part) > 1]

    def _score(self, features: Tensor) -> Tensor:
        unit_MD = F.normalize(features, dim=1)
        return torch.stack([gaussian.distance(unit_MD) for gaussian in self.gaussians]).amin(dim=0)


class PCAResidual(Detector):
    """Length of what the principal components with 95 % of the training variance leave of h. Higher is OOD.

    The residual of ViM (Wang et al., arXiv 2203.10807) around the mean, without its logits.
    """

    def _fit(self, features: Tensor) -> None:
        self.mean_D = features.mean(dim=0)
        deviation_ND = features - self.mean_D
        variance_D, axes_DD = torch.linalg.eigh(deviation_ND.T @ deviation_ND / len(features))  # ascending
        share_D = variance_D.clamp(min=0).cumsum(dim=0) / variance_D.clamp(min=0).sum().clamp(min=1e-300)
        self.minor_DR = axes_DD[:, share_D <= 1 - VARIANCE_KEPT]

    def _score(self, features: Tensor) -> Tensor:
        return torch.linalg.vector_norm((features - self.mean_D) @ self.minor_DR, dim=1)


def common_noise(mu_ME: Tensor) -> Tensor:
    """(S, E) standard normal draws, the same for every image."""
    image_1 = torch.zeros(1, dtype=torch.int64, device=mu_ME.device)
    return normals(0, 0, image_1, 0, DRAWS, mu_ME.shape[1], NOISE_EVALUATION)[:, 0].double()


def rows_of(draws: int, mu_ME: Tensor) -> int:
    """Images whose draws are held at a time."""
    return max(1, CHUNK_ELEMENTS // (draws * mu_ME.shape[1]))


def mean_log_density(prior: nn.Module, x_SBE: Tensor) -> Tensor:
    """(B,): mean over draws of log p(x); a mixture in mode "reference" has taken it already."""
    log_p = prior.log_prob(x_SBE)
    return log_p.mean(dim=0) if log_p.ndim == 2 else log_p


def some_posteriors(mu_NE: Tensor, sigma_NE: Tensor) -> tuple[Tensor, Tensor]:
    """Of at most 1,000 training images, drawn with a fixed seed."""
    drawn = torch.randperm(len(mu_NE), generator=torch.Generator().manual_seed(0))[:POSTERIORS].to(mu_NE.device)
    return mu_NE[drawn], sigma_NE[drawn]
