"""The score of one OOD detector for images that are embedded, fitted to the run's training images."""

import difflib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from fastssl.common.errors import UserError
from fastssl.evaluation.features import Features, augmented_input, cached_features, embed_batches, eval_input
from fastssl.evaluation.ood import DETECTORS, LABEL_BASED, LinearHead
from fastssl.evaluation.ood.evaluate import (
    embedding_prior,
    linear_head,
    logits_after_odin,
    shared_arrays,
    unsupported_detectors,
)
from fastssl.evaluation.ood.jacobian import jacobian_values
from fastssl.evaluation.ood.layers import cached_layers, layers_of_batch
from fastssl.evaluation.ood.suites import find_fit_images
from fastssl.evaluation.runs import BetonSubset, RunEncoder
from fastssl.loading import Batch, SampleSelection


class Scorer:
    """One OOD detector for the images of a run. A higher score means more out-of-distribution.

    Args:
        name: a key of `fastssl.evaluation.ood.DETECTORS`.
        fit: file of training images; None: data.train of the run. At most 50,000 of its images are used.

    Raises:
        UserError: there is no such detector, the run does not support it, or the training images cannot be read.
    """

    def __init__(self, encoder: RunEncoder, name: str, fit: str | Path | None = None) -> None:
        if name not in DETECTORS:
            nearest = difflib.get_close_matches(name, DETECTORS, n=1, cutoff=0.0)[0]
            nearest = next((each for each in DETECTORS if each.startswith(name)), nearest)
            raise UserError(
                f"--score {name} is no detector",
                hint=f"did you mean {nearest}? The detectors are {', '.join(DETECTORS)}",
            )
        self.encoder = encoder
        self.name = name
        self.kind = DETECTORS[name]
        # The training images; None for a detector that does not need any.
        self.fit_data: BetonSubset | None = None
        label_N = np.empty(0, np.int64)
        if self.kind.learns() or name in LABEL_BASED:
            self.fit_data = find_fit_images(encoder, fit)
            label_N = SampleSelection(self.fit_data.subset, self.fit_data.limit).labels(self.fit_data.path)
        problems = unsupported_detectors(encoder.model, label_N)
        if name in problems:
            others = ", ".join(each for each in DETECTORS if each not in problems)
            raise UserError(f"--score {name}: {problems[name]}", hint=f"use one that this run supports: {others}")

    def fit(self) -> None:
        """Fit the detector, if it learns from training images, whose features are cached."""
        self.classifier: LinearHead | None = None
        arrays: dict[str, Any] = {}
        needed = self.kind.arrays()
        # Each takes a pass over the training images.
        if self.fit_data is not None and needed - {"layers"}:
            train = cached_features(self.encoder, self.fit_data)
            if "logits" in needed:
                self.classifier = linear_head(self.encoder, train, seed=0)
            arrays = shared_arrays(train, self.classifier)
            if self.name in LABEL_BASED:
                arrays["labels"] = train.label
        if self.fit_data is not None and "layers" in needed:
            arrays["layers"] = cached_layers(self.encoder, self.fit_data)
        prior = embedding_prior(self.encoder.model)
        self.detector = self.kind(prior, self.classifier, self.encoder.device)
        if self.kind.learns():
            with self._explained():
                self.detector.fit(**arrays)

    def score(self, features: Features, batch: Batch, augmented: Batch | None) -> np.ndarray:
        """The scores (B,) float64 of the valid images of a batch.

        Args:
            features: those of the batch.
            augmented: the same images with the crops of two training views; only detectors with `of_views` need them.
        """
        arrays = shared_arrays(features, self.classifier)
        views = self.encoder.recipe.views
        if self.kind.of_views:
            assert augmented is not None
            (pair,) = embed_batches(self.encoder.model, [augmented], augmented_input(views))
            arrays = shared_arrays(pair, None)
        elif self.name == "odin":
            assert self.classifier is not None
            arrays["logits"] = logits_after_odin(self.encoder, batch, eval_input(views), self.classifier)
        elif self.kind.jacobian_of:
            arrays["features"] = jacobian_values(self.encoder, batch, exact=False)[self.kind.jacobian_of]
        elif "layers" in self.kind.arrays():
            arrays["layers"] = layers_of_batch(self.encoder, batch)
        with self._explained():
            return self.detector.score(**arrays)

    @contextmanager
    def _explained(self) -> Iterator[None]:
        try:
            yield
        except ValueError as error:  # the detector is undefined on these images
            raise UserError(f"--score {self.name}: {error}", hint="choose another detector") from error
