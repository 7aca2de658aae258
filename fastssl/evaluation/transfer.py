"""Transfer: the encoder of one data set on the classes of another, by a linear classifier or by fine-tuning."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

from fastssl.beton import beton_file, has_split
from fastssl.common.errors import UserError
from fastssl.common.files import expand_user
from fastssl.evaluation.features import DType, cached_features
from fastssl.evaluation.finetune import finetune, read_sample_ids, write_sample_list
from fastssl.evaluation.linear import PROTOCOLS, Protocol, fit_and_test, linear_settings
from fastssl.evaluation.results import RESULT, EvaluationResult, load_or_compute, save_classification
from fastssl.evaluation.runs import BetonSubset, EvaluationData, RunEncoder, check_labels
from fastssl.evaluation.splits import stratified_holdout

Method = Literal["linear", "finetune"]
TEST_SHARE, TEST_SEED = 0.5, 0  # of a data set without a test file: the same half for every encoder and seed


@dataclass(frozen=True)
class TransferTarget:
    """A data set to transfer to."""

    name: str
    train: Path
    test: Path
    train_rows: np.ndarray | None = None  # rows of one file that both parts come from; None: all
    test_rows: np.ndarray | None = None


def find_target(name: str, path: str | Path) -> TransferTarget:
    """The training and test images in a folder made by build-beton, or in one .beton.

    In a folder, train.beton is fitted on, and test.beton is tested on, or val.beton if there is no test.beton. A single
    file is split: half of every class is tested on.

    Raises:
        UserError: there is neither, or no labels.
    """
    path = expand_user(path)
    train = beton_file(path, "train")
    splits = [split for split in ("test", "val") if has_split(path, split)]
    test = beton_file(path, splits[0]) if splits else None
    fix = f"give --to {name}= labeled data"
    if test:
        check_labels(BetonSubset(train), BetonSubset(test), "a transfer", fix_train=fix, fix_val=fix)
        return TransferTarget(name, train, test)
    label_N = BetonSubset(train).labels("a transfer", fix, classes=2)
    train_rows, test_rows = stratified_holdout(label_N, TEST_SHARE, TEST_SEED)
    if len(np.unique(label_N[train_rows])) < 2 or len(test_rows) == 0:
        raise UserError(
            f"{train} cannot be split into halves to fit and to test on",
            hint=f"name data of two classes or more, with two images or more each, for {name}",
        )
    return TransferTarget(name, train, train, train_rows, test_rows)


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
    overrides: Sequence[str] = (),
) -> EvaluationResult:
    """Evaluate on one data set by one method. Cached in RUN/eval/.

    Args:
        method: "linear", a linear classifier on frozen features, or "finetune", as `evaluate_semisup` on all labels.
        protocol: of the linear classifier. The reference protocol uses the schedule that has the name of the target
            (sun397, flowers102), else that of ImageNet.
        draws: of the linear classifier, as in `linear_settings`.
        view: of fine-tuning: evaluation transform of the test.
        overrides: of fine-tuning: KEY=VALUE of its recipe.
    """
    encoder.check_channels(target.train, target.test)
    what = f"linear-{protocol}" if method == "linear" else "finetune"
    evaluation = f"transfer-{target.name}-{what}"
    name = f"{evaluation}-seed{seed}{'' if draws is None else f'-draws{draws}'}{encoder.suffix}"
    description = EvaluationData(BetonSubset(target.train), BetonSubset(target.test)).describe()
    if target.train_rows is not None and target.test_rows is not None:
        description["train"] |= {"images": len(target.train_rows), "part": "a half of every class"}
        description["val"] |= {"images": len(target.test_rows), "part": "the other half"}
    request: dict[str, Any] = {"evaluation": evaluation, "data": target.name, "method": what, **description}
    if method == "finetune":
        train_list = None
        if target.train_rows is not None:
            index_N = read_sample_ids(target.train)[target.train_rows]
            title = f"Half of every class of {target.train}"
            train_list = str(write_sample_list(encoder.run_dir, name, index_N, title))
        data = EvaluationData(BetonSubset(target.train, train_list), BetonSubset(target.test))
        return finetune(
            encoder, name, data, seed=seed, view=view, overrides=overrides, request=request, test_rows=target.test_rows
        )

    settings = linear_settings(encoder, protocol, draws, dtype, schedule=target.name)

    def compute() -> dict[str, Any]:
        train, test = (cached_features(encoder, BetonSubset(path), dtype) for path in (target.train, target.test))
        if target.train_rows is not None and target.test_rows is not None:
            train, test = train.select(target.train_rows), test.select(target.test_rows)
        result, choice = fit_and_test(encoder, train, test, protocol, settings, seed, target.train)
        return save_classification(encoder.run_dir, name, result, target.test) | choice

    request |= {"protocol": PROTOCOLS[protocol], "settings": settings, "seed": seed, **encoder.describe()}
    return load_or_compute(encoder.run_dir, name, request, compute, RESULT)
