"""Semi-supervised evaluation: all of the encoder fine-tuned on 1 % or 10 % of the labels (SimCLR, arXiv 2002.05709)."""

import hashlib
from pathlib import Path

import numpy as np

from fastssl.beton import read_index_list
from fastssl.evaluation.finetune import Labelled, finetune, keep_list
from fastssl.evaluation.runs import Encoder, Split, indices_of, labels_of
from fastssl.evaluation.splits import stratified_share


def evaluate_semisup(
    encoder: Encoder,
    split: Split,
    *,
    percent: float = 1.0,
    list_file: Path | None = None,
    seed: int = 0,
    view: str | None = None,
    overrides: list[str] = (),
) -> dict:
    """`fastssl eval semisup`: kept in RUN/eval/semisup-1percent-seed0.json; returns what that file holds.

    The images are those of list_file, one name or index a line, such as SimCLR's lists for ImageNet; without one, the
    same share of every class, drawn by `seed` alone, so all encoders get the same. They are drawn from all of the
    training file: data.limit does not apply. The list lies beside the result.
    """
    share = f"semisup-{list_file.stem}" if list_file else f"semisup-{percent:g}percent"
    name = f"{share}-seed{seed}{encoder.suffix}{f'-{view}' if view else ''}{split.name}"
    if list_file:
        index, what = read_index_list(split.train.path, list_file), "a list"
    else:
        rows = stratified_share(labels_of(split.train.path), percent / 100, seed)
        index = indices_of(split.train.path)[rows]
        what = f"{percent:g} % of every class, drawn with seed {seed}"
    labelled = Labelled(split.train.path, keep_list(encoder.run_dir, name, index, what), len(index), split.val.path)
    about = split.about
    about["train"] |= {
        "images": len(index), "subset": None, "subset_sha256": None, "limit": None, "part": what,
        "list": list_file and str(list_file), "list_sha256": hashlib.sha256(np.sort(index).tobytes()).hexdigest(),
    }  # fmt: skip
    about = {"evaluation": share, **about}
    return finetune(encoder, name, labelled, seed=seed, view=view, overrides=list(overrides), about=about)
