"""Semi-supervised evaluation: all of the encoder fine-tuned on 1 % or 10 % of the labels (SimCLR, arXiv 2002.05709)."""

from pathlib import Path

from fastssl.beton import read_index_list
from fastssl.evaluation.finetune import FinetuneData, finetune, write_sample_list
from fastssl.evaluation.results import EvaluationResult
from fastssl.evaluation.runs import EvaluationData, RunEncoder, ids_sha256, read_required_labels, read_sample_ids
from fastssl.evaluation.splits import stratified_share


def evaluate_semisup(
    encoder: RunEncoder,
    data: EvaluationData,
    *,
    percent: float = 1.0,
    list_file: Path | None = None,
    seed: int = 0,
    view: str | None = None,
    overrides: list[str] = (),
) -> EvaluationResult:
    """`fastssl eval semisup`: kept in RUN/eval/semisup-1percent-seed0.json; returns what that file holds.

    The images are those of list_file, one name or index a line, such as SimCLR's lists for ImageNet; without one, the
    same share of every class, drawn by `seed` alone, so all encoders get the same. They are drawn from all of the
    training file: data.limit does not apply. The list lies beside the result.
    """
    share = f"semisup-{list_file.stem}" if list_file else f"semisup-{percent:g}percent"
    name = f"{share}-seed{seed}{encoder.suffix}{f'-{view}' if view else ''}{data.suffix}"
    if list_file:
        index, what = read_index_list(data.train.path, list_file), "a list"
    else:
        rows = stratified_share(read_required_labels(data.train.path), percent / 100, seed)
        index = read_sample_ids(data.train.path)[rows]
        what = f"{percent:g} % of every class, drawn with seed {seed}"
    labelled = FinetuneData(
        data.train.path, write_sample_list(encoder.run_dir, name, index, what), len(index), data.val.path
    )
    about = data.describe()
    about["train"] |= {
        "images": len(index), "subset": None, "subset_sha256": None, "limit": None, "part": what,
        "list": list_file and str(list_file), "list_sha256": ids_sha256(index),
    }  # fmt: skip
    about = {"evaluation": share, **about}
    return finetune(encoder, name, labelled, seed=seed, view=view, overrides=list(overrides), about=about)
