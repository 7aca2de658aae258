"""The tables of evaluations: every column at every width, units, sentences that follow from the figures."""

import numpy as np
import pytest
from table_widths import check_at_every_width, rendered

from fastssl.evaluation import SummaryRow, result_table, summary_table
from fastssl.evaluation.metric_info import metric_info
from fastssl.evaluation.metrics import accuracy_interval
from fastssl.evaluation.mutual_information import mi_summary_table, mi_table
from fastssl.evaluation.mutual_information.table import mi_verdict
from fastssl.evaluation.ood import LABEL_BASED, ood_summary, ood_summary_table, ood_table, save_ood_table
from fastssl.evaluation.ood.verdict import ood_verdict, recommended_detector
from fastssl.evaluation.ood.verdict import runs_verdict as ood_runs_verdict
from fastssl.evaluation.tables import MeanAndStd, interval_of_mean, runs_verdict
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
        "settings": {"jepa_images": 200, "jepa_exact": False, "jepa_directions": 64},
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
    """A row of two runs, or of a single one if `std` is None."""
    found = {key: MeanAndStd(value, std) for key, value in metrics.items()}
    if std is not None:
        values = {key: [value - std / 2**0.5, value + std / 2**0.5] for key, value in metrics.items()}
        fields.setdefault("intervals", {key: interval_of_mean(each, []) for key, each in values.items()})
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
            [
                row_of(f"run_{i}_zprob_vicreg_cifar10", ood_result()["metrics"], inverted={"sigma_std": ["a", "b"]})
                for i in range(runs)
            ]
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


def test_the_legend_of_ood_is_that_of_the_columns_shown():
    legends = {width: rendered(ood_table(ood_result()), width).split("AUROC: ")[-1] for width in (60, 90, 200)}
    assert {width: "FPR95:" in legend for width, legend in legends.items()} == {60: False, 90: False, 200: True}
    assert {width: "!:" in legend for width, legend in legends.items()} == {60: False, 90: False, 200: True}
    for width, legend in legends.items():
        text = " ".join(legend.split())
        assert "inverted: sets" in text and "docs/glossary.md" in text and "docs/ood.md" in text, width
    several = rendered(ood_summary_table([row_of("x", ood_result()["metrics"])]), 100)
    assert "docs/glossary.md" in several and "docs/ood.md" in several


def test_the_command_that_scores_own_images_is_shown():
    command = "fastssl embed RUN PHOTOS --out FILE --score "
    assert command + "kmeans_ssd" in rendered(ood_table(ood_result(FEATURES)), 80)
    assert recommended_detector(ood_result(FEATURES)) == "kmeans_ssd"
    for none_to_use in ((0.5, 0.5), (0.99, 0.3)):  # at chance; inverted
        result = ood_result({"knn_cosine": none_to_use, "vim": (0.9, 0.9)})
        assert "fastssl embed" not in rendered(ood_table(result), 80) and recommended_detector(result) is None


FEATURES = {"kmeans_ssd": (0.9, 0.9), "knn_cosine": (0.7, 0.7)}


def said(aurocs, **fields):
    """What is said about detectors with these AUROCs on one near and one far set."""
    inverted_on = fields.pop("inverted_on", None)
    result = ood_result(aurocs, near=("n",), far=("f",), **fields)
    if inverted_on:  # on a set whose group has a mean above chance
        result["detectors"][inverted_on]["sets"]["f"]["inverted"] = True
    return " ".join(ood_verdict(result))


def with_draws(near, far, **fields):
    return said({**FEATURES, "draws_disagreement": (near, far)}, **fields)


def test_the_sentence_on_the_best_detector_follows_from_the_figures():
    assert said(FEATURES).startswith("Use kmeans_ssd, the best detector without labels: near 90.0 (88.0-92.0), far")
    assert said(dict(reversed(FEATURES.items()))).startswith("Use kmeans_ssd")
    assert "overlap" not in said(FEATURES)
    # Overlapping intervals are not "as good": the detectors score the same images.
    close = said({**FEATURES, "knn_cosine": (0.89, 0.89), "pca_residual": (0.87, 0.2), "knn_euclidean": (0.6, 0.9)})
    assert "Its intervals overlap with those of knn_cosine." in close and "as good" not in close
    four = {name: (0.9 - i / 1000, 0.9) for i, name in enumerate(["kmeans_ssd", "a", "b", "c", "d"])}
    assert "overlap with those of a, b and 2 more." in said(four)

    at_chance = said({"knn_cosine": (0.51, 0.5)})
    assert at_chance.startswith("No detector without labels is above chance (50): the best is knn_cosine")
    assert "on near sets it is not above chance" in said({"knn_cosine": (0.51, 0.9)})
    inverted = said({"knn_cosine": (0.99, 0.3), "kmeans_ssd": (0.6, 0.6)})
    assert inverted.startswith("Use kmeans_ssd, the best detector without labels that is inverted on no set")
    worse_is_inverted = said({"knn_cosine": (0.4, 0.3), "kmeans_ssd": (0.6, 0.6)})
    assert worse_is_inverted.startswith("Use kmeans_ssd, the best detector without labels: ")
    only = said({"knn_cosine": (0.99, 0.3)})
    assert only.startswith("Every detector without labels is inverted on some set: use none of them.")


def test_detectors_with_labels_follow_the_same_rule():
    start = "The best detector with labels of the training images"
    assert f"{start} is vim: near 95.0" in said({**FEATURES, "vim": (0.95, 0.9), "msp": (0.8, 0.8)})
    found = said({**FEATURES, "vim": (0.99, 0.9), "msp": (0.8, 0.8)}, inverted_on="vim")
    assert f"{start} that is inverted on no set is msp" in found
    assert "Every detector with labels of the training images is inverted" in said({**FEATURES, "vim": (0.9, 0.3)})
    assert "No detector with labels of the training images is above chance" in said({**FEATURES, "vim": (0.5, 0.51)})


def test_the_sentence_on_sigma_follows_from_the_figures():
    worse = with_draws(0.8, 0.8)
    assert "Sigma does not help. The best detector with sigma is draws_disagreement: near 80.0" in worse
    assert "Compared with kmeans_ssd, the best without sigma: worse on near, worse on far." in worse
    better = with_draws(0.97, 0.97)
    assert "Sigma helps." in better and "better on near, better on far." in better
    one = with_draws(0.97, 0.9)
    assert "Sigma helps on near sets." in one and "better on near, intervals overlap on far." in one
    overlapping = with_draws(0.91, 0.91)
    assert "It is not shown that sigma helps." in overlapping
    assert "intervals overlap on near, intervals overlap on far" in overlapping
    mixed = with_draws(0.97, 0.8)
    assert "Sigma helps on near sets." in mixed and "better on near, worse on far" in mixed
    assert "length" not in worse and "-0.95" in with_draws(0.8, 0.8, norms={"draws_disagreement": -0.95})
    alone = said({**FEATURES, "draws_disagreement": (0.8, 0.8), "sigma_mean": (0.5, 0.3)})
    assert "sigma_mean alone: near 50.0 (48.0-52.0), at chance; far 30.0 (28.0-32.0), inverted." in alone
    # Wider intervals: nothing can be said.
    assert "It is not shown that sigma helps." in with_draws(0.97, 0.97, width=0.2)
    assert "worse" not in with_draws(0.8, 0.8, width=0.2)
    # Better than one without sigma, but not above chance.
    chance = said({"draws_disagreement": (0.5, 0.5), "knn_cosine": (0.46, 0.47)}, width=0.01)
    assert "Sigma does not help. The best detector with sigma" in chance
    low = said({"draws_disagreement": (0.5, 0.5), "knn_cosine": (0.485, 0.485)}, width=0.005)
    assert "Sigma does not help." in low and "not above chance (50)" in low

    deterministic = ood_result(FEATURES)
    deterministic["skipped"] = {"draws_disagreement": "the embedding is deterministic"}
    assert "There is no sigma to use: the embedding is deterministic." in ood_verdict(deterministic)


def test_what_is_said_on_ood_has_no_contradictions():
    """Neither comparison counts a detector that is inverted on some set."""
    both = said({"knn_cosine": (0.2, 0.2), "sigma_mean": (0.4, 0.4)})
    assert "use none of them" in both and "Sigma does not help: every detector that uses it is inverted" in both
    assert "Sigma helps" not in both and "Compared" not in both

    draws = said({"draws_disagreement": (0.99, 0.7), "knn_cosine": (0.7, 0.6)}, inverted_on="draws_disagreement")
    assert draws.startswith("Use knn_cosine, the best detector without labels that is inverted on no set: ")
    assert "Sigma does not help: every detector that uses it is inverted" in draws and "Sigma helps" not in draws

    chance = said({"knn_cosine": (0.95, 0.65), "sigma_mean": (0.5, 0.5)}, inverted_on="knn_cosine")
    assert chance.startswith("No detector without labels that is inverted on no set is above chance (50): the best is")
    assert "Sigma does not help." in chance and "not above chance (50). There is no detector without sigma" in chance
    assert "worse" not in chance and "Sigma helps" not in chance

    only = said({"knn_cosine": (0.99, 0.72), "sigma_mean": (0.7, 0.7)}, inverted_on="knn_cosine")
    assert only.startswith("Use sigma_mean, the best detector without labels that is inverted on no set")
    assert "There is no detector without sigma, inverted on no set, to compare it with." in only
    assert "Sigma does not help" not in only and "Sigma helps" not in only and "worse" not in only

    three = {"knn_cosine": (0.99, 0.72), "kmeans_ssd": (0.6, 0.6), "sigma_mean": (0.7, 0.7)}
    found = said(three, inverted_on="knn_cosine")
    assert "Compared with kmeans_ssd, the best without sigma that is inverted on no set: better" in found


def said_of_runs(aurocs, inverted=None, std=0.01):
    metrics = ood_result(aurocs)["metrics"]
    return ood_runs_verdict([row_of("x", metrics, std=std, evaluation="ood", inverted=inverted or {})])


@pytest.mark.parametrize("order", [list, lambda items: list(reversed(items))])
def test_what_is_said_on_several_runs_follows_the_same_rule(order):
    def of(aurocs, **fields):
        return said_of_runs(dict(order(list(aurocs.items()))), **fields)

    three = {"sigma_mean": (0.6, 0.6), "kmeans_ssd": (0.9, 0.9), "knn_cosine": (0.7, 0.7)}
    assert of(three) == [
        "x and 1 more: Use kmeans_ssd, the best detector without labels: near 90.0 ± 1.0, far 90.0 ± 1.0."
    ]
    inverted = of({**three, "vim": (0.99, 0.9), "msp": (0.8, 0.8)}, inverted={"kmeans_ssd": ["f"], "vim": ["n"]})
    assert "Use knn_cosine, the best detector without labels that is inverted on no set" in inverted[0]
    assert "labels of the training images that is inverted on no set is msp" in inverted[1]
    (none,) = of({"knn_cosine": (0.3, 0.4)}, inverted={"knn_cosine": ["f"]})
    assert "Every detector without labels is inverted on some set: use none of them." in none
    assert "No detector without labels is above chance (50)" in of({"knn_cosine": (0.505, 0.505)})[0]
    assert "Use knn_cosine" in of({"knn_cosine": (0.505, 0.505)}, std=None)[0]


def test_the_table_of_several_runs_has_the_inverted_sets():
    metrics = ood_result(FEATURES)["metrics"]
    rows = [row_of("x", metrics, inverted={"knn_cosine": ["f", "n"]}), row_of("y", metrics)]
    for width in (60, 200):  # one row after the other, side by side
        text = rendered(ood_summary_table(rows), width)
        lines = [line for line in text.split("Use ")[0].splitlines() if line.strip().startswith("knn_cosine")]
        assert sum("2 sets" in line for line in lines) == 1 and "inverted" in text.split("Use ")[0]
        assert "inverted: sets" in text


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
    assert "not better than chance (12.5 %)" in result_verdict(knn_result(0.13))[0]
    assert "below chance (12.5 %)" in result_verdict(knn_result(0.05))[0]
    assert "chance" not in result_verdict({**knn_result(), "chance": {}})[0]
    assert "The fine-tuned encoder" in result_verdict(linear_result("semisup-1", folder="x"))[0]
    assert "untrained" in result_verdict(linear_result() | {"weights": "untrained"})[0]

    assert "predicts which" in result_verdict(uncertainty_result())[0]
    assert "does not predict" in result_verdict(uncertainty_result(r_auroc=0.51))[0]
    assert "is inverted" in result_verdict(uncertainty_result(r_auroc=0.4))[0]
    # By the interval of the difference: that of AURC alone, 58.0 to 62.0, includes the error of 60 %.
    below = result_verdict(uncertainty_result(aurc=0.6) | {"aurc_minus_error": [-0.044, -0.007]})[1]
    assert "60.0 % (58.0 to 62.0) (AURC), below that of a random order, 60.0 % (difference -4.4 to -0.7)" in below
    assert "errs on" not in below and "mean error of a linear classifier over all coverages" in below
    equal = result_verdict(uncertainty_result(aurc=0.5) | {"aurc_minus_error": [-0.01, 0.01]})[1]
    assert "not different from that of a random order, 60.0 %" in equal
    assert "above that" in result_verdict(uncertainty_result() | {"aurc_minus_error": [0.01, 0.02]})[1]
    older = result_verdict(uncertainty_result(aurc=0.2))[1]
    assert "not different" not in older and "below" not in older and "that of a random order 60.0 %" in older
    undefined = uncertainty_result()
    del undefined["metrics"]["r_auroc"]
    assert "not defined" in result_verdict(undefined)[0]


def single(name, value, low, high, metric="accuracy_k20_t0.07", **fields):
    """A row of one run."""
    return row_of(name, {metric: value}, std=None, intervals={metric: [low, high]}, **fields)


def test_the_best_row_is_named_only_beyond_noise():
    (said,) = runs_verdict([single("a", 0.919, 0.90, 0.936), single("b", 0.92, 0.90, 0.937)])
    assert "best" not in said and "no difference" in said and "beyond the 95 % intervals" in said
    assert "a and 1 more with 91.9 % (90.0 to 93.6) and b" in said and said.endswith("with 92.0 % (90.0 to 93.7).")
    (said,) = runs_verdict([row_of(f"run{i}", {"accuracy": 0.9}, std=None) for i in range(4)])
    assert "no difference" in said and "best" not in said and "2 more" in said
    rows = [single("a", 0.5, 0.48, 0.52), single("b", 0.92, 0.9, 0.94), single("c", 0.91, 0.89, 0.93)]
    (said,) = runs_verdict(rows)
    assert "no difference" in said and said.index("b (2 seeds) with") < said.index("c and") and "1 is worse" in said
    (said,) = runs_verdict(rows[:2])
    assert (
        "best is b (2 seeds) with top-1, k = 20, T = 0.07 92.0 % (90.0 to 94.0), beyond" in said
        and "beyond the 95 % intervals" in said
    )  # fails if the worst is chosen
    # Two seeds: the interval is 9 standard deviations wide on either side.
    (said,) = runs_verdict([row_of("a", {"accuracy": 0.5}, 0.002), row_of("b", {"accuracy": 0.47}, 0.002)])
    assert "no difference" in said and "beyond the 95 % intervals" in said
    (said,) = runs_verdict([row_of("a", {"accuracy": 0.5}, 0.001), row_of("b", {"accuracy": 0.47}, 0.001)])
    assert "best is a" in said and "beyond the 95 % intervals" in said
    (said,) = runs_verdict([row_of("a", {"nll": 1.0}, 0.01), row_of("b", {"nll": 2.0}, 0.01)])
    assert "best is a" in said  # lower is better
    (said,) = runs_verdict([row_of("a", {"x": 1.0}, 0.01), row_of("b", {"x": 2.0}, 0.01)])
    assert "best" not in said.replace("better", "") and "not known" in said


def test_runs_of_a_sweep_are_named_with_their_recipe():
    """All of them end in seed=0."""
    rows = [row_of(f"{name}/seed=0", {"accuracy": 0.5}) for name in ("zprob_vicreg", "vicreg")]
    assert [row.short_label() for row in rows] == ["zprob_vicreg/seed=0 and 1 more", "vicreg/seed=0 and 1 more"]


@pytest.mark.parametrize(("runs", "label"), [
    (["vicreg/seed=0"], "vicreg/seed=0"), (["vicreg/seed=0", "vicreg/seed=1"], "vicreg (2 seeds)"),
    (["z/beta=0.1,seed=0", "z/beta=0.1,seed=1"], "z/beta=0.1 (2 seeds)"),
    (["z/seed=0,beta=0.1", "z/seed=10,beta=0.1"], "z/beta=0.1 (2 seeds)"),
    (["a", "b"], "a and 1 more"), (["vicreg/seed=0", "other/seed=1"], "vicreg/seed=0 and 1 more"),
])  # fmt: skip
def test_runs_that_differ_in_their_seed_have_one_name(runs, label):
    made = [
        SummaryRow("knn", [f"runs/{run}" for run in runs], list(range(len(runs))), flag, {}) for flag in (False, True)
    ]
    assert made[0].short_label() == label
    assert "(untrained)" in made[1].short_label()


def test_a_mean_is_said_with_its_interval():
    (said,) = runs_verdict([row_of("a", {"accuracy": 0.5}, 0.001), row_of("b", {"accuracy": 0.47}, 0.001)])
    assert "50.0 ± 0.1 % (49.1 to 50.9), beyond the 95 % intervals" in said
    (said,) = runs_verdict([row_of("a", {"accuracy": 0.5}, None)])
    assert said.endswith("with top-1 accuracy 50.0 %.")  # an older result without intervals


def test_the_interval_of_a_mean_over_seeds_is_that_of_students_t():
    low, high = row_of("a", {"accuracy": 0.5}, 0.01).noise("accuracy")
    assert (low, high) == pytest.approx((0.5 - 12.706 * 0.01 / 2**0.5, 0.5 + 12.706 * 0.01 / 2**0.5), abs=1e-5)


def test_seeds_that_agree_by_chance_have_the_interval_of_their_images():
    """Two seeds with 123 of 245 images right each gave 50.2 to 50.2 %."""
    share = 123 / 245
    of_images = accuracy_interval(np.arange(245) < 123)
    assert interval_of_mean([share, share], [list(of_images)] * 2) == pytest.approx(of_images)
    assert of_images[1] - of_images[0] > 0.12
    # The reaches of seeds and images are added in squares, and more seeds leave the noise of the images.
    of_seeds = 12.706 * 0.01 / 2**0.5
    low, high = interval_of_mean([0.5 - 0.01 / 2**0.5, 0.5 + 0.01 / 2**0.5], [[0.4, 0.57], [0.42, 0.57]])
    assert (low, high) == pytest.approx((0.5 - np.hypot(of_seeds, 0.09), 0.5 + np.hypot(of_seeds, 0.07)), abs=1e-5)
    assert interval_of_mean([0.5] * 100, [[0.4, 0.6]] * 100) == pytest.approx([0.4, 0.6])
    # A single run has its own, also where its value is outside, as an ECE may be.
    assert interval_of_mean([0.3], [[0.31, 0.4]]) == [0.31, 0.4]


@pytest.mark.parametrize("of_seeds", [0.0, 0.3, 1.0])  # standard deviation in the logit; of images it is 1.5
def test_the_interval_of_a_mean_covers_the_truth(of_seeds):
    """The mean accuracy over all seeds and all images is 50 %, as the logits are symmetric."""
    rng = np.random.default_rng(0)
    covered = []
    for _ in range(1000):
        logit_SM = rng.normal(0, 1.5, 245) + rng.normal(0, of_seeds, (2, 1)) + rng.normal(0, 0.7, (2, 245))
        correct_SM = rng.random((2, 245)) < 1 / (1 + np.exp(-logit_SM))
        value_S = correct_SM.mean(axis=1)
        reach_S = 1.96 * np.sqrt(value_S * (1 - value_S) / 245)
        low, high = interval_of_mean(value_S.tolist(), np.stack([value_S - reach_S, value_S + reach_S], 1).tolist())
        covered.append(low <= 0.5 <= high)
    assert np.mean(covered) >= 0.95


def test_the_best_row_is_compared_with_chance():
    def said(value, std=0.002):
        return runs_verdict([row_of("a", {"accuracy": value}, std, chance={"accuracy": 0.1})])[0]

    assert said(0.05).endswith("; below chance (10.0 %).") and said(0.5).endswith("; chance is 10.0 %.")
    assert said(0.11).endswith("; not better than chance (10.0 %).")
    nll = runs_verdict([row_of("a", {"nll": 3.0}, 0.05, chance={"nll": 2.3})])[0]
    assert "above chance (2.30 nats)" in nll


def test_only_rows_that_can_be_compared_are():
    mnist, cifar = (
        single("mnist", 0.99, 0.98, 1.0, val={"checksum": "1"}),
        single("c", 0.5, 0.4, 0.6, val={"checksum": "2"}),
    )
    said = runs_verdict([mnist, cifar])
    assert not any("best" in sentence or "no difference" in sentence for sentence in said)
    assert len(said) == 3 and "are not compared" in said[2]
    undefined = row_of("x", {"recall_at_1": 0.9}, evaluation="uncertainty")
    said = runs_verdict([undefined, row_of("y", {"r_auroc": 0.6, "recall_at_1": 0.1}, evaluation="uncertainty")])
    assert not any("best" in sentence for sentence in said) and "recall@1 90.0" in said[0] and "R-AUROC 60.0" in said[1]


def test_value_better_and_chance_are_in_every_form():
    rows = [row_of(name, {"accuracy": 0.4}, chance={"accuracy": 0.1}) for name in "ab"]
    for width in (40, 60, 80, 120, 200):
        table = rendered(summary_table(rows), width).split("knn:")[0]
        assert "40.0 ± 1.0 %" in table and "up" in table and "10.0 %" in table, table
    assert "docs/glossary.md" in rendered(summary_table(rows), 120)
    # The chance of an AURC is the error, which differs between runs.
    rows = [row_of(str(chance), {"aurc": 0.2}, chance={"aurc": chance}) for chance in (0.3, 0.4)]
    assert all("30.0 to 40.0 %" in " ".join(rendered(summary_table(rows), width).split()) for width in (80, 120))


def test_nothing_is_said_about_what_is_not_shown():
    assert "chance:" in rendered(result_table(knn_result()), 120)
    older = {key: value for key, value in knn_result().items() if key != "chance"}
    assert "chance:" not in rendered(result_table(older), 120)
    assert "chance:" not in rendered(summary_table([row_of("x", {"accuracy": 0.4})]), 120)
    unknown = rendered(result_table(result_of("linear-sweep", {"a_metric_of_another_version": 0.5})), 120)
    assert " up" not in unknown and " down" not in unknown
    assert metric_info("a_metric_of_another_version").better == ""
    assert "(better: )" not in rendered(summary_table([row_of(str(i), {"x": 0.4}) for i in range(2)]), 120)


def line_of(text, quantity):
    return next(line for line in text.splitlines() if line.strip().startswith(quantity))


def test_the_sentence_on_mutual_information_follows_from_the_figures():
    def said(infinite=(), found=()):
        result = mi_result()
        result["infinite"] = list(infinite)
        for quantity, (value, error, saturated) in dict(found).items():
            each = {"nats": value, "error": error, "ceiling": 13.1, "saturated": saturated, "unseen": 0.0}
            result["quantities"][quantity] = {"js": each, "mine": each}
        return " ".join(mi_verdict(result))

    assert "h and z share at least 5.20 ± 0.03 nats" in said() and "no information" not in said()
    assert "h and z share" not in said(infinite=["I(H;Z)"])
    nothing = said(found={"I(Z;Z')": (-0.2, 0.1, False)})
    assert "at least -0.20" not in nothing
    assert "no information was found that the z of two views share (-0.20 ± 0.10 nats is not above 0)" in nothing
    assert "No information was found in h" in said(found={"I(V;H)": (0.1, 0.1, False)})
    assert "h holds at least 0.30" in said(found={"I(V;H)": (0.3, 0.1, False)}).replace("H holds", "h holds")
    for infinite in ([], ["I(H;Z)"]):
        limited = said(infinite=infinite, found={"I(H;Z)": (13.0, 0.1, True)})
        assert "not to be compared with anything: I(H;Z)." in limited


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
