"""The tables of evaluations: every column at every width, units, sentences that follow from the figures."""

import pytest
from table_widths import check_at_every_width, rendered

from fastssl.evaluation import SummaryRow, result_table, summary_table
from fastssl.evaluation.mutual_information import mi_summary_table, mi_table
from fastssl.evaluation.ood import LABEL_BASED, ood_summary, ood_summary_table, ood_table, save_ood_table
from fastssl.evaluation.ood.verdict import ood_verdict
from fastssl.evaluation.tables import MeanAndStd
from fastssl.evaluation.verdict import result_verdict

LONG = "a-set-with-a-very-long-name-of-tiny-imagenet_and_others"
IMAGES = {
    "path": "data/x/val.beton", "images": 1500, "subset": None, "layout": "canvas", "builder": "imagefolder",
    "source_formats": {"JPEG": 3}, "source_px": [64.0, 64.0], "own_bytes": 0.0,
}  # fmt: skip
COMMON = {
    "run": "runs/zprob_vicreg_with_a_long_name_of_a_run", "weights": "last.pt", "seed": 0, "train": IMAGES,
    "val": IMAGES, "layout": "canvas", "measured_at": "2026-11-30T01:10:30+00:00", "settings": {},
}  # fmt: skip
UNCERTAINTY = {
    "r_auroc": 0.61, "recall_at_1": 0.3, "accuracy": 0.4, "ece": 0.05, "ece_scaled": 0.04, "nll": 1.9,
    "nll_scaled": 1.8, "aurc": 0.51, "e_aurc": 0.3, "aurc_confidence": 0.4, "e_aurc_confidence": 0.2,
    "spearman_blur": -0.5, "spearman_noise": 0.2, "spearman_jpeg": 0.1, "spearman_crop": 0.3, "crop_larger": 0.6,
    **{f"crop_larger_{share}": 0.6 for share in (75, 50, 35, 20, 10)},
}  # fmt: skip


SOME_DETECTORS = (
    "sigma_mean", "sigma_std", "draws_disagreement", "posterior_bhattacharyya", "kmeans_ssd", "vim",
    "mahalanobis_relative",
)  # fmt: skip


def result_of(evaluation, metrics, **fields):
    intervals = {name: [value - 0.02, value + 0.02] for name, value in metrics.items()}
    return {"evaluation": evaluation, "metrics": metrics, "intervals": intervals, **COMMON, **fields}


def knn_result(accuracy=0.919, chance=0.125):
    names = [f"accuracy_k{k}_t{t}" for k in (20, 200) for t in (0.07, 0.1)]
    return result_of("knn", dict.fromkeys(names, accuracy), chance=dict.fromkeys(names, chance))


def linear_result(evaluation="linear-sweep", **fields):
    metrics = {"accuracy": 0.5, "accuracy_top5": 0.9, "accuracy_macro": 0.5, "ece": 0.1, "nll": 1.4}
    return result_of(evaluation, metrics, chance={"accuracy": 0.1, "nll": 2.3}, **fields)


def uncertainty_result(**metrics):
    fields = {"settings": {"score": "mean sigma of z"}, "uncertainty": {"mean": 0.9, "std": 0.01}}
    return result_of("uncertainty", {**UNCERTAINTY, **metrics}, **fields)


def ood_result(aurocs=None, near=(LONG, "b"), far=("textures", "noise"), width=0.02, norms=None):
    """aurocs: of the detectors, on near and on far sets."""
    aurocs = aurocs or {name: (0.4 if name == "sigma_std" else 0.8, 0.9) for name in SOME_DETECTORS}

    def found(auroc):
        bounds = {"auroc": [auroc - width, auroc + width]}
        return {
            "metrics": {"auroc": auroc, "fpr95_id_positive": 1 - auroc},
            "intervals": bounds,
            "inverted": auroc + width < 0.5,
        }

    detectors, metrics = {}, {}
    for name, (of_near, of_far) in aurocs.items():
        row = {"labels": name in LABEL_BASED, "norm_correlation": (norms or {}).get(name, -0.4)}
        row["sets"] = {each: found(of_near) for each in near} | {each: found(of_far) for each in far}
        for group, sets, auroc in (("near", near, of_near), ("far", far, of_far)):
            if sets:
                row[group] = found(auroc)
                metrics[f"{name} {group} auroc"] = auroc
        detectors[name] = row
    return {
        **COMMON, "evaluation": "ood", "near": dict.fromkeys(near, IMAGES), "far": dict.fromkeys(far, IMAGES),
        "detectors": detectors, "metrics": metrics, "skipped": {}, "scores": "ood-x.scores.npz",
    }  # fmt: skip


def mi_result(failing=(), saturated=False, quantities=("I(V;H)", "I(H;Z)", "I(Z;Z')", "I(V;Z)")):
    each = {"nats": 5.2, "error": 0.03, "ceiling": 13.1, "saturated": saturated, "unseen": 0.0}
    checks = [
        *(f"{quantity}, shuffled pairs: 0" for quantity in quantities),
        *(f"{quantity} with an independent pair of 1 nat appended: the sum" for quantity in quantities),
        "I(V;Z) <= I(V;H)", "I(V;Z) <= I(X;Z) = I(H;Z), upper bound",
    ]  # fmt: skip
    return {
        **COMMON, "evaluation": "mi", "settings": {"side": 8}, "infinite": [],
        "quantities": {quantity: {"js": each, "mine": each} for quantity in quantities},
        "bounds": {"I(X;Z) = I(H;Z)": {"lower": 9.2, "upper": 99.5, "ceiling": 9.21, "saturated": True, "rate": 88.8}},
        "checks": [{"check": check, "found": "1.00, 2.00", "passed": check not in failing} for check in checks],
    }  # fmt: skip


def row_of(name, metrics, std=0.01, **fields):
    found = {key: MeanAndStd(value, std) for key, value in metrics.items()}
    return SummaryRow(fields.pop("evaluation", "knn"), [f"runs/{name}", "runs/b"], [0, 1], False, found, **fields)


RESULTS = {
    "knn": result_table(knn_result()),
    "linear": result_table(linear_result()),
    "semisup": result_table(linear_result("semisup-1", folder="semisup-1-ab")),
    "transfer": result_table(linear_result("transfer-flowers102-finetune", folder="x")),
    "uncertainty": result_table(uncertainty_result()),
    "of another version": result_table(result_of("linear-sweep", {"a_metric_of_another_version": 0.5})),
    "ood": ood_table(ood_result()),
    "ood, far alone": ood_table(ood_result(near=())),
    "ood, many sets": ood_table(ood_result(far=tuple(f"set-{i}" for i in range(12)))),
    "mi": mi_table(mi_result()),
    "mi verbose": mi_table(mi_result(["I(V;Z) <= I(V;H)"], saturated=True), verbose=True),
    **{
        f"{runs} runs of {len(metrics)} metrics": summary_table(
            [row_of(f"run_{i}_zprob_vicreg_cifar10", metrics, score="mean sigma of z") for i in range(runs)]
        )
        for runs in (1, 3, 12)
        for metrics in (UNCERTAINTY, {"accuracy": 0.4, "nll": 1.2})
    },
    **{
        f"ood of {runs} runs": ood_summary_table(
            [row_of(f"run_{i}_zprob_vicreg_cifar10", ood_result()["metrics"]) for i in range(runs)]
        )
        for runs in (1, 3, 8)
    },
    "mi of 5 runs": mi_summary_table([row_of(f"run_{i}", {"I(V;H) js": 5.0, "I(V;H) mine": 5.0}) for i in range(5)]),
}  # fmt: skip


@pytest.mark.parametrize("name", RESULTS)
def test_every_column_is_there_at_every_width(name):
    check_at_every_width(RESULTS[name])


def test_a_column_of_width_zero_or_a_cut_name_is_found():
    """The check itself: rich's own way to narrow a table that is too wide."""
    from rich.table import Table

    squeezed = Table("detector", "inverted")
    squeezed.columns[0].no_wrap = True
    squeezed.add_row("x" * 18, "all")
    squeezed.columns[0].min_width = 58
    with pytest.raises(AssertionError):
        check_at_every_width(squeezed)


def test_ood_summary_at_every_width():
    result = ood_result()
    for width in (60, 80, 120):
        text = rendered(ood_summary(result, width), width)
        assert "own uncertainty" in " ".join(text.split()) and "…" not in text


def test_wide_forms_have_more_columns_and_the_file_has_all(tmp_path):
    result = ood_result()
    (tmp_path / "eval").mkdir()
    whole = save_ood_table(tmp_path, result).read_text()
    narrow, wide = rendered(ood_table(result), 60), rendered(ood_table(result), 200)
    for text, has in ((narrow, False), (wide, True), (whole, True)):
        assert ("textures" in text.split("Use ")[0]) == has and "inverted" in text.split("Use ")[0]
    (line,) = [line for line in wide.splitlines() if line.strip().startswith("sigma_std")]
    assert line.split()[-1] == "4" or line.rstrip().endswith("2 of 4"), line
    assert line.count("!") == 2  # the two sets where it is inverted


FEATURES = {"kmeans_ssd": (0.9, 0.9), "knn_cosine": (0.7, 0.7)}


def test_the_sentence_on_ood_follows_from_the_figures():
    def said(aurocs, **fields):
        return " ".join(ood_verdict(ood_result(aurocs, near=("n",), far=("f",), **fields)))

    assert said(FEATURES).startswith("Use kmeans_ssd") and "as good" not in said(FEATURES)
    assert "Within the intervals, knn_cosine is as good" in said({**FEATURES, "knn_cosine": (0.89, 0.89)})
    assert "Use" not in said({"knn_cosine": (0.51, 0.5)}) and "above chance" in said({"knn_cosine": (0.51, 0.5)})
    inverted = said({"knn_cosine": (0.99, 0.3), "kmeans_ssd": (0.6, 0.6)})
    assert inverted.startswith("Use kmeans_ssd")  # the mean of the other is higher, but it is inverted on far sets
    assert "No score without labels is right on every set" in said({"knn_cosine": (0.99, 0.3)})
    assert "With labels of the training images, the best is vim" in said({**FEATURES, "vim": (0.95, 0.9)})

    def sigma(near, far, **fields):
        return said({**FEATURES, "draws_disagreement": (near, far)}, **fields)

    assert "Sigma does not help." in sigma(0.8, 0.8) and "worse than kmeans_ssd on both" in sigma(0.8, 0.8)
    assert "Sigma helps." in sigma(0.97, 0.97) and "better than kmeans_ssd on both" in sigma(0.97, 0.97)
    assert "Sigma helps." in sigma(0.97, 0.9)
    assert "Sigma does not help." in sigma(0.91, 0.91) and "as good within the intervals" in sigma(0.91, 0.91)
    mixed = sigma(0.97, 0.8)
    assert "Sigma helps on near sets only." in mixed
    assert "better than kmeans_ssd on near and worse than kmeans_ssd on far" in mixed
    assert "inverted on f" in sigma(0.97, 0.2)
    assert "length" not in sigma(0.8, 0.8) and "-0.95" in sigma(0.8, 0.8, norms={"draws_disagreement": -0.95})
    alone = said({**FEATURES, "draws_disagreement": (0.8, 0.8), "sigma_mean": (0.5, 0.3)})
    assert "sigma_mean alone: near 50.0 (48.0-52.0), at chance; far 30.0 (28.0-32.0), inverted." in alone
    # Wider intervals: nothing can be said.
    assert "Sigma does not help." in sigma(0.97, 0.97, width=0.2) and "worse" not in sigma(0.8, 0.8, width=0.2)

    deterministic = ood_result(FEATURES)
    deterministic["skipped"] = {"draws_disagreement": "the embedding is deterministic"}
    assert "There is no sigma to use: the embedding is deterministic." in ood_verdict(deterministic)


def test_each_value_has_its_own_unit():
    text = rendered(result_table(linear_result()), 120)
    lines = {line.strip().split("  ")[0]: line for line in text.splitlines()}
    assert "1.40 nats" in lines["NLL"] and "%" not in lines["NLL"]
    assert lines["top-1 accuracy"].split()[-8:] == "50.0 % 48.0 to 52.0 up 10.0 %".split()
    assert "down" in lines["ECE"]
    uncertain = rendered(result_table(uncertainty_result()), 120)
    lines = {line.strip().split("  ")[0]: line for line in uncertain.splitlines()}
    assert lines["AURC by uncertainty"].split()[-2:] == ["60.0", "%"]  # 1 - accuracy
    assert lines["E-AURC by uncertainty"].split()[-2:] == ["39.0", "%"]  # 60 - (51 - 30)
    assert lines["R-AUROC"].split()[-2:] == ["50.0", "%"] and lines["crops of 75 %"].split()[-2:] == ["50.0", "%"]
    assert lines["correlation with blur"].split()[-1] == "0.00"
    # The same metric, of several runs.
    several = rendered(summary_table([row_of("x", {"accuracy": 0.4, "nll": 1.4}, chance={"accuracy": 0.1})]), 120)
    assert "1.40 ± 0.01 nats" in several and "40.0 ± 1.0 %" in several and "chance is" in several


def test_sentences_on_accuracy_and_uncertainty_follow_from_the_figures():
    (said,) = result_verdict(knn_result())
    assert "k = 20, T = 0.07" in said and "91.9 % (89.9 to 93.9)" in said and said.endswith("; chance is 12.5 %.")
    assert "not better than chance: 12.5 %" in result_verdict(knn_result(0.13))[0]
    assert "chance" not in result_verdict({**knn_result(), "chance": {}})[0]
    assert "The fine-tuned encoder" in result_verdict(linear_result("semisup-1", folder="x"))[0]
    assert "untrained" in result_verdict(linear_result() | {"weights": "untrained"})[0]

    assert "predicts which" in result_verdict(uncertainty_result())[0]
    assert "does not predict" in result_verdict(uncertainty_result(r_auroc=0.51))[0]
    assert "is inverted" in result_verdict(uncertainty_result(r_auroc=0.4))[0]
    assert "51.0 % (49.0 to 53.0) (AURC), below the 60.0 %" in result_verdict(uncertainty_result())[1]
    assert "not different from" in result_verdict(uncertainty_result(aurc=0.59))[1]
    assert "above" in result_verdict(uncertainty_result(aurc=0.7))[1]
    undefined = uncertainty_result()
    del undefined["metrics"]["r_auroc"]
    assert "not defined" in result_verdict(undefined)[0]


def line_of(text, quantity):
    return next(line for line in text.splitlines() if line.strip().startswith(quantity))


def test_failed_self_checks_mark_their_rows():
    sound = rendered(mi_table(mi_result()), 120)
    assert "10 of 10 self-checks hold." in sound and "UNRELIABLE" not in sound and "shuffled" not in sound
    assert "H holds at least 5.20 ± 0.03 nats" in sound
    failing = ["I(V;H), shuffled pairs: 0", "I(V;Z) <= I(X;Z) = I(H;Z), upper bound"]
    shown = rendered(mi_table(mi_result(failing)), 120)
    assert "8 of 10 self-checks hold, 2 fail." in shown and all(f"fails: {check}" in shown for check in failing)
    assert "UNRELIABLE" in line_of(shown, "I(V;H)") and "UNRELIABLE" in line_of(shown, "I(V;Z)")
    assert "UNRELIABLE" not in line_of(shown, "I(H;Z)") + line_of(shown, "I(Z;Z')")
    assert "H holds" not in shown and "Do not use these rows" in shown
    order = rendered(mi_table(mi_result(["I(V;Z) <= I(V;H)"])), 120)  # either may be wrong
    assert "UNRELIABLE" in line_of(order, "I(V;H)") and "UNRELIABLE" in line_of(order, "I(V;Z)")
    verbose = rendered(mi_table(mi_result(failing), verbose=True), 120)
    assert all(check["check"] in verbose for check in mi_result()["checks"]) and "FAILS" in verbose
    metrics = {"I(V;H) js": 5.0, "I(H;Z) js": 6.0, "I(H;Z) upper": 7.0}
    several = rendered(mi_summary_table([row_of("x", metrics, failed=failing, saturated=["I(H;Z) js"])]), 120)
    assert line_of(several, "I(V;H) js").rstrip().endswith("5.00 ± 0.01 ?")
    assert ">= 6.00 ± 0.01" in line_of(several, "I(H;Z) js") and "?" not in line_of(several, "I(H;Z) js")
