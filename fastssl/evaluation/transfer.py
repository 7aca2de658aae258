"""Transfer: the encoder of one data set on the classes of another, by a linear classifier or by fine-tuning."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np

from fastssl.common.errors import UserError
from fastssl.evaluation.features import DType, cached_features
from fastssl.evaluation.finetune import FinetuneData, finetune, write_sample_list
from fastssl.evaluation.linear import PROTOCOLS, Protocol, fit_and_test, linear_settings
from fastssl.evaluation.results import EvaluationResult, load_or_compute, save_classification
from fastssl.evaluation.runs import (
    BetonSubset,
    EvaluationData,
    EvaluationDataDescription,
    RunEncoder,
    check_labels,
    read_required_labels,
    read_sample_ids,
)
from fastssl.evaluation.splits import stratified_holdout

Method = Literal["linear", "finetune"]
HOLDOUT_SHARE, SEED = 0.5, 0  # of a data set without a test file: the same half for every encoder and seed


@dataclass(frozen=True)
class TransferTarget:
    """A data set to transfer to."""

    name: str
    train: Path
    test: Path
    train_rows: np.ndarray | None = None  # None: all; else both are parts of one file
    test_rows: np.ndarray | None = None

    def describe(self) -> EvaluationDataDescription:
        about = EvaluationData(BetonSubset(self.train), BetonSubset(self.test)).describe()
        if self.train_rows is not None:
            about["train"] |= {"images": len(self.train_rows), "part": "a half of every class"}
            about["val"] |= {"images": len(self.test_rows), "part": "the other half"}
        return about


def find_target(name: str, path: str | Path) -> TransferTarget:
    """A folder that build-beton made, or one .beton.

    Of a folder, train.beton is fitted on, and test.beton, else val.beton, is tested on. A single file is split: half of
    every class is tested on. Raises UserError where there is neither, or no labels.
    """
    path = Path(path)
    train = path / "train.beton" if path.is_dir() else path
    tests = [path / "test.beton", path / "val.beton"] if path.is_dir() else []
    test = next((file for file in tests if file.is_file()), None)
    if test:
        check_labels(train, test)
        return TransferTarget(name, train, test)
    label_N = read_required_labels(train)
    rows, held = stratified_holdout(label_N, HOLDOUT_SHARE, SEED)
    if len(np.unique(label_N[rows])) < 2 or len(held) == 0:
        raise UserError(
            f"{train} cannot be split into halves to fit and to test on: name data of two classes or more, with two "
            f"images or more each, for {name}."
        )
    return TransferTarget(name, train, train, rows, held)


def evaluate_transfer(
    encoder: RunEncoder,
    target: TransferTarget,
    method: Method = "linear",
    *,
    protocol: Protocol = "sweep",
    draws: int | None = None,
    dtype: DType = "float32",
    seed: int = 0,
    view: str | None = None,
    overrides: list[str] = (),
) -> EvaluationResult:
    """`fastssl eval transfer` for one data set and method, kept in RUN/eval/; returns what that file holds.

    Linear: as `fastssl eval linear` with that protocol; the reference protocol has schedules of its own for SUN397 and
    Flowers-102, taken where the target has such a name. Fine-tuning: as `fastssl eval semisup`, with all labels.
    """
    what = f"linear-{protocol}" if method == "linear" else "finetune"
    evaluation = f"transfer-{target.name}-{what}"
    name = f"{evaluation}-seed{seed}{'' if draws is None else f'-draws{draws}'}{encoder.suffix}"
    about = {"evaluation": evaluation, "data": target.name, "method": what, **target.describe()}
    if method == "finetune":
        return _finetune(encoder, target, name, about, seed, view, list(overrides))

    settings = linear_settings(encoder, protocol, draws, dtype, schedule=target.name)

    def measure() -> dict:
        of_train, of_test = (cached_features(encoder, BetonSubset(path), dtype) for path in (target.train, target.test))
        if target.train_rows is not None:
            of_train, of_test = of_train.select(target.train_rows), of_test.select(target.test_rows)
        fitted, scores = fit_and_test(encoder, of_train, of_test, protocol, settings, seed)
        return {**save_classification(encoder.run_dir, name, scores, target.test), **fitted}

    request = {**about, "protocol": PROTOCOLS[protocol], "settings": settings, "seed": seed, **encoder.describe()}
    return load_or_compute(encoder.run_dir, name, request, measure)


def _finetune(encoder, target, name, about, seed, view, overrides) -> EvaluationResult:
    train_list, images = None, about["train"]["images"]
    if target.train_rows is not None:
        index = read_sample_ids(target.train)[target.train_rows]
        train_list = write_sample_list(encoder.run_dir, name, index, f"Half of every class of {target.train}")
    labelled = FinetuneData(target.train, train_list, images, target.test, target.test_rows)
    return finetune(encoder, name, labelled, seed=seed, view=view, overrides=overrides, about=about)
