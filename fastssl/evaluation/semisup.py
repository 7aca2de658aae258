"""Semi-supervised evaluation: fine-tune the whole encoder on 1 % or 10 % of the labels (SimCLR, arXiv 2002.05709)."""

from collections.abc import Sequence
from pathlib import Path

from fastssl.beton import read_index_list
from fastssl.evaluation.finetune import finetune, write_sample_list
from fastssl.evaluation.results import EvaluationResult
from fastssl.evaluation.runs import (
    BetonSubset,
    EvaluationData,
    RunEncoder,
    ids_sha256,
    read_required_labels,
    read_sample_ids,
)
from fastssl.evaluation.splits import stratified_share


def evaluate_semisup(
    encoder: RunEncoder,
    data: EvaluationData,
    *,
    percent: float = 1.0,
    list_file: Path | None = None,
    seed: int = 0,
    view: str | None = None,
    overrides: Sequence[str] = (),
) -> EvaluationResult:
    """Fine-tune on some images of data.train and test on data.val. Cached in RUN/eval/semisup-1percent-seed0.json.

    The list of the images is written next to the result.

    Args:
        data: the images. The subset and limit of data.train do not apply.
        percent: of the images of every class, drawn from `seed`: the same ones for every encoder.
        list_file: the images instead, one name or sample id per line, such as SimCLR's lists for ImageNet.
        view: evaluation transform of the test; None: the published one.
        overrides: KEY=VALUE of the fine-tuning recipe.
    """
    evaluation = f"semisup-{list_file.stem}" if list_file else f"semisup-{percent:g}percent"
    name = f"{evaluation}-seed{seed}{encoder.suffix}{f'-{view}' if view else ''}{data.suffix}"
    train = data.train.path
    if list_file:
        index_N, part = read_index_list(train, list_file), "a list"
    else:
        rows = stratified_share(read_required_labels(train), percent / 100, seed)
        index_N, part = read_sample_ids(train)[rows], f"{percent:g} % of every class, drawn with seed {seed}"
    description = data.describe()
    description["train"] |= {
        "images": len(index_N), "subset": None, "subset_sha256": None, "limit": None, "part": part,
        "list": str(list_file) if list_file else None, "list_sha256": ids_sha256(index_N),
    }  # fmt: skip
    sample_list = write_sample_list(encoder.run_dir, name, index_N, part)
    listed = EvaluationData(BetonSubset(train, str(sample_list)), data.val)
    request = {"evaluation": evaluation, **description}
    return finetune(encoder, name, listed, seed=seed, view=view, overrides=overrides, request=request)
