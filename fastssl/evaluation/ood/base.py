"""The base class of all detectors."""

import inspect
from collections.abc import Callable, Sequence
from typing import Any, ClassVar, Literal, NamedTuple, Self, TypeVar

import numpy as np
import torch
from torch import Tensor

from fastssl.evaluation.arrays import Array, Device, as_labels, as_tensor
from fastssl.models.gaussian import Prior

Result = TypeVar("Result")


class LinearHead(NamedTuple):
    """A linear classifier of the features: logits = weight @ features + bias."""

    weight_CD: Tensor
    bias_C: Tensor


class Detector:
    """Base class of detectors: fitted to training images once, then gives every image a score, higher meaning OOD.

    A subclass implements `_score`, and `_fit` if it learns from the training images. As with pytest fixtures, the names
    of their parameters say which arrays they need: `features` (N, D), `labels` (N,), `logits` (N, C), `mu` and `sigma`
    (N, E) of the stochastic embedding, and `layers`, a list of intermediate layers, each (N, channels). They get them
    as float64 tensors (labels as int64) on `self.device`:

        class MaxLogit(Detector):
            def _score(self, logits: Tensor) -> Tensor:
                return -logits.amax(dim=1)

    `fastssl eval ood` reads the same names to leave out detectors whose arrays a run cannot provide.
    """

    # Whether the detector needs the optional package pytorch-ood, or makes sense for supervised encoders only.
    needs_pytorch_ood: ClassVar[bool] = False
    needs_supervised_encoder: ClassVar[bool] = False
    # Its arrays are those of two augmented views of each image, (N, 2, D) and (N, 2, E).
    of_views: ClassVar[bool] = False
    # Its `features` are the singular values of the Jacobian of this embedding; None: they are h.
    jacobian_of: ClassVar[Literal["h", "mu"] | None] = None

    def __init__(self, prior: Prior | None = None, classifier: LinearHead | None = None, device: Device = "cpu"):
        """See `detector` for the arguments."""
        self.prior = prior
        self.classifier = classifier
        self.device = torch.device(device)
        self.fitted = False

    # Any: subclasses replace these parameters by the arrays that they need.
    def _fit(self, *args: Any, **kwargs: Any) -> None:
        """Learn nothing, by default."""

    def _score(self, *args: Any, **kwargs: Any) -> Tensor:
        raise NotImplementedError

    @classmethod
    def arrays(cls) -> set[str]:
        """Return the names of the arrays that `fit` and `score` need."""
        return _parameter_names(cls._fit) | _parameter_names(cls._score)

    @classmethod
    def learns(cls) -> bool:
        """Whether `fit` learns anything from training images."""
        return bool(_parameter_names(cls._fit))

    @torch.no_grad()
    def fit(
        self,
        features: Array | None = None,
        labels: Array | None = None,
        logits: Array | None = None,
        sigma: Array | None = None,
        mu: Array | None = None,
        layers: Sequence[Array] | None = None,
    ) -> Self:
        """Fit the detector to N training images; arrays that it does not need are ignored.

        Raises:
            ValueError: if an array that it needs is missing or not finite, or a label is negative (no label).
        """
        self._call(self._fit, features=features, labels=labels, logits=logits, sigma=sigma, mu=mu, layers=layers)
        self.fitted = True
        return self

    @torch.no_grad()
    def score(
        self,
        features: Array | None = None,
        logits: Array | None = None,
        sigma: Array | None = None,
        mu: Array | None = None,
        layers: Sequence[Array] | None = None,
    ) -> np.ndarray:
        """Return the scores (M,) of M images: float64, finite, the higher the more out-of-distribution.

        Raises:
            ValueError: if an array that it needs is missing or not finite, or the score is undefined for an image.
        """
        if self.learns() and not self.fitted:
            raise ValueError(f"{type(self).__name__} has not been fitted: call fit first.")
        found_M = self._call(self._score, features=features, logits=logits, sigma=sigma, mu=mu, layers=layers)
        score_M = found_M.double().cpu().numpy()
        if np.isnan(score_M).any():
            raise ValueError(f"{type(self).__name__} is undefined for {np.isnan(score_M).sum()} images.")
        return np.nan_to_num(score_M)  # infinity becomes the largest float64

    def _call(self, method: Callable[..., Result], **given: Array | Sequence[Array] | None) -> Result:
        selected: dict[str, Tensor | list[Tensor]] = {}
        for name in _parameter_names(method):
            array = given[name]
            if array is None:
                raise ValueError(f"{type(self).__name__} needs {name}.")
            if isinstance(array, np.ndarray | Tensor):
                selected[name] = self._convert(name, array)
            else:
                selected[name] = [self._convert(name, each) for each in array]
        return method(**selected)

    def _convert(self, name: str, array: Array) -> Tensor:
        tensor = as_tensor(as_labels(array) if name == "labels" else array).to(self.device)
        tensor = tensor.long() if name == "labels" else tensor.double()
        if not torch.isfinite(tensor).all():
            raise ValueError(f"{name} contains values that are not finite.")
        return tensor


def _parameter_names(method: Callable[..., object]) -> set[str]:
    return set(inspect.signature(method).parameters) - {"self", "args", "kwargs"}
