"""What every detector shares: it is fitted on training images once, then scores others; higher means OOD."""

import inspect
from collections.abc import Callable
from typing import Self

import numpy as np
import torch
from numpy.typing import ArrayLike
from torch import Tensor, nn

from fastssl.evaluation.arrays import as_tensor


class Detector:
    """A score of an image; its direction is a part of its definition, never of test data.

    A subclass computes in `_fit` and `_score`, whose parameters are the arrays that it needs, given as float64 tensors
    on `device` (labels int64): features (N, D), labels (N,), logits (N, C), and mu and sigma (N, E) of the stochastic
    embedding q.
    """

    def __init__(
        self,
        prior: nn.Module | None = None,
        classifier: tuple[Tensor, Tensor] | None = None,
        device: torch.device | str = "cpu",
    ):
        """As `detector` takes them."""
        self.prior, self.classifier, self.device = prior, classifier, torch.device(device)
        self.fitted = False

    def _fit(self) -> None:
        """Nothing to learn."""

    def _score(self, **arrays: Tensor) -> Tensor:
        raise NotImplementedError

    @classmethod
    def fits_on(cls) -> set[str]:
        """The arrays that `fit` needs."""
        return _parameters(cls._fit)

    @classmethod
    def scores_on(cls) -> set[str]:
        """The arrays that `score` needs."""
        return _parameters(cls._score)

    @torch.no_grad()
    def fit(
        self,
        features: ArrayLike | Tensor,
        labels: ArrayLike | Tensor | None = None,
        logits: ArrayLike | Tensor | None = None,
        sigma: ArrayLike | Tensor | None = None,
        mu: ArrayLike | Tensor | None = None,
    ) -> Self:
        """Learn from N training images; ValueError where an array that it needs is missing or not finite."""
        given = {"features": features, "labels": labels, "logits": logits, "sigma": sigma, "mu": mu}
        self._fit(**self._needed(given, self.fits_on()))
        self.fitted = True
        return self

    @torch.no_grad()
    def score(
        self,
        features: ArrayLike | Tensor,
        logits: ArrayLike | Tensor | None = None,
        sigma: ArrayLike | Tensor | None = None,
        mu: ArrayLike | Tensor | None = None,
    ) -> np.ndarray:
        """(M,) float64, finite: of M images, the higher the more out-of-distribution.

        ValueError where an array that it needs is missing or not finite, or where the training images leave the score
        undefined.
        """
        if self.fits_on() and not self.fitted:
            raise ValueError(f"{type(self).__name__} has not been fitted.")
        given = {"features": features, "logits": logits, "sigma": sigma, "mu": mu}
        score_M = self._score(**self._needed(given, self.scores_on())).double().cpu().numpy()
        if np.isnan(score_M).any():
            raise ValueError(f"{type(self).__name__} is undefined for {np.isnan(score_M).sum()} images.")
        return np.nan_to_num(score_M)  # what overflows becomes the largest number

    def _needed(self, given: dict, names: set[str]) -> dict[str, Tensor]:
        arrays = {}
        for name in names:
            if given[name] is None:
                raise ValueError(f"{type(self).__name__} needs {name}.")
            array = as_tensor(given[name]).to(self.device)
            arrays[name] = array.long() if name == "labels" else array.double()
            if not torch.isfinite(arrays[name]).all():
                raise ValueError(f"{name} holds numbers that are not finite.")
        return arrays


def _parameters(method: Callable) -> set[str]:
    return set(inspect.signature(method).parameters) - {"self"}
