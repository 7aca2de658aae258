"""Reports of fabricated runs: groups, figures, marks, what is missing, and files that are damaged."""

import csv
import json
import re
import shlex
import shutil
import statistics
from pathlib import Path
from typing import get_args

import numpy as np
import pytest
import torch
from command_lines import parse
from fabricated_runs import IMAGES, fabricate_run

from fastssl.common.errors import UserError
from fastssl.models import build_model
from fastssl.recipe import AnyObjective, EmbeddingConfig, load_recipe
from fastssl.reporting import make_report, write_report
from fastssl.reporting.charts import BOTTOM, HEIGHT, LEFT, RIGHT, TOP, WIDTH, curve_charts
from fastssl.reporting.runs import read_run
from fastssl.reporting.variants import OBJECTIVES, STOCHASTIC, start_of

BETTER = {"barlow": 0.60, "zprob_barlow": 0.70, "hprob_barlow": 0.60}


@pytest.fixture(scope="module")
def sweep(tmp_path_factory):
    """Three variants of three seeds: Z-prob is better than the deterministic one, H-prob as good."""
    folder = tmp_path_factory.mktemp("sweep")
    for name, accuracy in BETTER.items():
        for seed in range(3):
            fabricate_run(
                folder / name / f"seed={seed}", f"cifar10/{name}", seed,
                accuracies={"knn": accuracy + seed / 200, "linear-sweep": accuracy},
                aurocs={"knn_cosine": (0.6, 0.9 if name == "zprob_barlow" else 0.7), "vim": (0.6, 0.7)},
                r_auroc=None if name == "barlow" else 0.6 + seed / 100,
            )  # fmt: skip
    return folder


def table_named(report, title):
    return next(table for table in report.tables if table.title == title)


def test_seeds_are_grouped_and_compared_with_the_deterministic_variant(sweep):
    report = make_report([sweep])
    assert [variant.label for variant in report.variants] == [
        "Barlow Twins",
        "Z-prob Barlow Twins",
        "H-prob Barlow Twins",
    ]
    deterministic, z_prob, h_prob = report.variants
    assert [variant.baseline for variant in report.variants] == [None, deterministic, deterministic]
    assert [run.seed for run in z_prob.runs] == [0, 1, 2]
    assert report.remarks == []


def test_means_deviations_and_marks(sweep):
    table = table_named(make_report([sweep]), "Accuracy")
    assert table.columns == ["kNN k = 20, T = 0.07 ↑", "linear sweep ↑"]
    for name, (label, cells) in zip(BETTER, table.rows, strict=True):
        values = [
            json.loads((sweep / name / f"seed={seed}" / "eval" / "knn.json").read_text())["metrics"][
                "accuracy_k20_t0.07"
            ]
            for seed in range(3)
        ]
        assert cells[0].text == f"{100 * statistics.fmean(values):.1f} ± {100 * statistics.stdev(values):.1f}"
        assert [cell.mark for cell in cells] == (["better"] * 2 if name == "zprob_barlow" else ["", ""])
        assert label.endswith("(3 seeds)")
    measured = {(row[0], row[2]): row for row in table.differences}
    row = measured["Z-prob Barlow Twins", "kNN k = 20, T = 0.07"]
    assert row[3] == "+10.0" and float(row[5]) < 0.05 and row[6:] == ["3", "400"]


def test_ood_tables_have_a_row_for_each_detector(sweep):
    report = make_report([sweep])
    near, far = (table_named(report, f"OOD detection, {where}") for where in ("near", "far"))
    assert [name for name, _ in far.rows] == ["knn_cosine", "vim *"] and "(other)" in far.caption
    assert [[cell.mark for cell in cells] for _, cells in far.rows] == [["", "better", ""], ["", "", ""]]
    assert not any(cell.mark for _, cells in near.rows for cell in cells)
    images = next(row for row in far.differences if row[0].startswith("Z-prob"))[7]
    assert images == "800"  # ID and OOD


def test_a_named_baseline_is_what_all_others_are_compared_with(sweep, tmp_path):
    report = make_report([sweep], sweep / "zprob_barlow" / "seed=1")
    deterministic, z_prob, h_prob = report.variants
    assert z_prob.baseline is None and deterministic.baseline is h_prob.baseline is z_prob
    rows = dict(table_named(report, "Accuracy").rows)
    assert [cell.mark for cell in rows["Barlow Twins (3 seeds)"]] == ["worse", "worse"]
    assert {tuple(row[:2]) for row in table_named(report, "Accuracy").differences} == {
        ("Barlow Twins", "Z-prob Barlow Twins"), ("H-prob Barlow Twins", "Z-prob Barlow Twins"),
    }  # fmt: skip
    with pytest.raises(UserError, match="--baseline .* is none of the runs: name a run directory that the report"):
        make_report([sweep], tmp_path)


def test_detectors_have_one_order_whichever_run_has_them(tmp_path):
    fabricate_run(tmp_path / "a", "cifar10/barlow", 0, aurocs={"vim": (0.6, 0.6), "knn_cosine": (0.6, 0.6)})
    fabricate_run(
        tmp_path / "b", "cifar10/zprob_barlow", 0, aurocs={"knn_cosine": (0.6, 0.6), "sigma_mean": (0.6, 0.6)}
    )
    far = table_named(make_report([tmp_path]), "OOD detection, far")
    assert [name for name, _ in far.rows] == ["sigma_mean", "knn_cosine", "vim *"]


def test_an_accuracy_without_single_images_is_said(tmp_path):
    for name in ("barlow", "zprob_barlow"):
        for seed in range(2):
            folder = tmp_path / f"{name}-{seed}"
            fabricate_run(
                folder, f"cifar10/{name}", seed, accuracies={"knn": 0.5 + seed / 10}, outcomes=name == "barlow"
            )
    report = make_report([tmp_path])
    assert [line for line in report.remarks if "does not tell which images are right" in line and "zprob" in line]
    assert table_named(report, "Accuracy").differences[0][7] == "–"
    assert report.findings[1].endswith("within the noise of 2 seeds.")


def test_what_untrained_encoders_reach_is_said(tmp_path):
    run = fabricate_run(tmp_path / "run", "cifar10/vicreg", 0, accuracies={"knn": 0.5, "linear-sweep": 0.6})
    assert not [line for line in make_report([run]).findings if "Untrained" in line]
    result = json.loads((run / "eval" / "knn.json").read_text())
    result |= {"weights": "untrained", "metrics": {"accuracy_k20_t0.07": 0.3}}
    (run / "eval" / "knn-untrained.json").write_text(json.dumps(result))
    # With other settings: the result of the defaults, which has the shorter name, counts.
    result |= {"metrics": {"accuracy_k20_t0.07": 0.1}, "settings": {"draws": 12}}
    (run / "eval" / "knn-draws12-untrained.json").write_text(json.dumps(result))
    report = make_report([run])
    assert "Untrained encoders reach: kNN k = 20, T = 0.07 30.0 % (1 encoder)." in report.findings
    assert any("knn-draws12-untrained.json: knn-untrained.json is shown in its place" in x for x in report.remarks)
    assert table_named(report, "Accuracy").rows[0][1][0].text == "50.0"


def add_untrained(run, accuracy):
    """A kNN result of the weights that the run started from."""
    result = json.loads((run / "eval" / "knn.json").read_text())
    correct = np.arange(IMAGES) < round(accuracy * IMAGES)
    np.savez(run / "eval" / "knn-untrained.correct.npz", **{"accuracy_k20_t0.07": correct})
    result |= {
        "weights": "untrained", "metrics": {"accuracy_k20_t0.07": accuracy}, "outcomes": "knn-untrained.correct.npz"
    }  # fmt: skip
    (run / "eval" / "knn-untrained.json").write_text(json.dumps(result))


def test_a_variant_that_is_not_better_than_untrained_is_named(tmp_path):
    """Better counts beyond the noise of seeds and images; a single run has only its value."""
    trained = {"barlow": (0.5, 0.52, 0.51), "vicreg": (0.7, 0.72, 0.71), "zprob_vicreg": (0.4,), "simclr": (0.6,)}
    recipes = {name: f"beyond/{name}" if name == "simclr" else f"cifar10/{name}" for name in trained}
    for name, accuracies in trained.items():
        for seed, accuracy in enumerate(accuracies):
            run = fabricate_run(tmp_path / name / str(seed), recipes[name], seed, accuracies={"knn": accuracy})
            add_untrained(run, 0.5)
    named = [line for line in make_report([tmp_path]).findings if "not better than untrained" in line]
    assert len(named) == 2 and named[1] == (
        "Z-prob VICReg is not better than untrained in kNN k = 20, T = 0.07: -10.0."
    )
    assert re.fullmatch(
        r"Barlow Twins is not better than untrained in kNN k = 20, T = 0\.07 by more than the noise: "
        r"\+1\.0 \(-\d+\.\d to \d+\.\d\)\.", named[0],
    )  # fmt: skip


def test_variants_share_the_encoders_that_they_started_from(tmp_path):
    """One variant's untrained results serve the others, but for a stochastic h, which is a layer after the encoder."""
    made = {}
    for name in ("vicreg", "zprob_vicreg", "hprob_vicreg"):
        made[name] = [
            fabricate_run(tmp_path / name / str(seed), f"cifar10/{name}", seed, accuracies={"knn": 0.4 + seed / 100})
            for seed in range(2)
        ]
    for seed, run in enumerate(made["vicreg"]):
        add_untrained(run, 0.5 + seed / 50)
    findings = make_report([tmp_path]).findings
    assert "Untrained encoders reach: kNN k = 20, T = 0.07 51.0 % (2 encoders)." in findings
    named = [line.partition(" is not better")[0] for line in findings if "not better than untrained" in line]
    assert named == ["VICReg", "Z-prob VICReg"]
    for seed, run in enumerate(made["zprob_vicreg"]):
        add_untrained(run, 0.5 + seed / 50)
    assert make_report([tmp_path]).findings == findings
    for run in made["hprob_vicreg"]:
        add_untrained(run, 0.3)
    assert any("40.5 % (4 encoders)" in line for line in make_report([tmp_path]).findings)


def test_runs_that_start_equal_have_the_same_encoder():
    def started(name, *overrides):
        recipe = load_recipe(name, ["data.val=null", "seed=3", "model.backbone=resnet18", *overrides])
        torch.manual_seed(recipe.seed)
        weights = build_model(recipe).encoder.state_dict()
        return start_of(recipe), {key: weight.double().sum().item() for key, weight in weights.items()}

    start, weights = started("cifar10/vicreg")
    for other in ("zprob_vicreg", "barlow"):
        assert started(f"cifar10/{other}", "model.projector.out=64") == (start, weights)
    for override in ("seed=4", "model.stem=imagenet", "views.size=40", "data.limit=9", "embedding.stochastic=h"):
        assert started("cifar10/vicreg", override)[0] != start, override


def test_what_is_missing_is_a_command(sweep, tmp_path):
    report = make_report([sweep])
    (semisup,) = [command for command in report.missing if " semisup " in command]
    assert semisup == f"fastssl eval semisup {sweep}"
    for command in report.missing:
        assert parse(shlex.split(command)[1:])
    uncertainty = next(command for command in report.missing if " uncertainty " in command)
    assert uncertainty == f"fastssl eval uncertainty {sweep}/barlow"
    assert not any(command.startswith(("fastssl eval knn", "fastssl eval ood")) for command in report.missing)
    run = fabricate_run(tmp_path / "run", "cifar10/vicreg", 0, logged_epochs=3)
    report = make_report([run])
    assert report.missing == [f"fastssl train --resume {run}"] and report.remarks == [
        f"{run} is not finished: its results are those of its last checkpoint"
    ]


def test_commands_name_the_highest_folder_that_was_given_and_lacks_it_as_a_whole(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    for name in ("barlow", "zprob_barlow"):
        for seed in range(2):
            accuracies = {"linear-sweep": 0.5} | ({"knn": 0.5} if (name, seed) == ("barlow", 0) else {})
            fabricate_run(tmp_path / "runs" / name / f"seed={seed}", f"cifar10/{name}", seed, accuracies=accuracies)

    def knn(*paths):
        return next(command for command in make_report(paths).missing if " knn " in command)

    runs = tmp_path / "runs"
    assert knn(Path("~/runs")) == f"fastssl eval knn {runs}/barlow/seed=1 {runs}/zprob_barlow"
    some = knn(runs / "zprob_barlow" / "seed=0", runs / "barlow")
    assert some == f"fastssl eval knn {runs}/barlow/seed=1 {runs}/zprob_barlow/seed=0"
    monkeypatch.chdir(runs)
    assert knn(Path(".")) == "fastssl eval knn barlow/seed=1 zprob_barlow"
    assert knn(Path("zprob_barlow/../zprob_barlow")) == "fastssl eval knn zprob_barlow"


def test_an_unfinished_run_takes_no_folder_from_the_finished_ones(tmp_path):
    fabricate_run(tmp_path / "seed=0", "cifar10/vicreg", 0)
    fabricate_run(tmp_path / "seed=1", "cifar10/vicreg", 1, logged_epochs=3)
    assert f"fastssl eval knn {tmp_path}" in make_report([tmp_path]).missing


def test_the_table_of_runs_has_the_threads_of_each(sweep):
    """Not the cores of the machine, which runs at the same time share."""
    table = make_report([sweep]).runs
    assert {cells[table.columns.index("threads")].text for _, cells in table.rows} == {"1"}


def test_the_page_needs_nothing_and_escapes_all(sweep, tmp_path):
    out = tmp_path / "report.html"
    run = fabricate_run(tmp_path / "<script>alert(1)<!--", "cifar10/vicreg", 0, accuracies={"knn": 0.5})
    (run / "environment.json").write_text(json.dumps({"command": ["x", "</pre><script>"], "device": "<b>&"}))
    write_report([sweep, run], out)
    page = out.read_text()
    assert "<script" not in page and "</pre><" not in page.replace("</pre><h2>", "").replace("</pre>\n", "")
    assert not re.search(r"""(src|href|url)\s*[=(]\s*["']?(?!data:)[^"'>\s]""", page)
    assert "default-src 'none'" in page and "prefers-color-scheme: dark" in page
    assert page.count('class="better"') == 3 and len(out.read_bytes()) < 400_000
    # Everything that scrolls is reached by keys.
    assert page.count('class="scroll"') == page.count('class="scroll" tabindex="0"')


def test_the_table_of_runs_wraps_its_long_cells(sweep, tmp_path):
    """Paths break after a slash, devices and profiles between words, so that the table fits a window of 1,200 px."""
    write_report([sweep], tmp_path / "report.html")
    page = (tmp_path / "report.html").read_text()
    table = page.partition('<div class="runs">')[2].partition("</table>")[0]
    run = str(sweep / "barlow" / "seed=0").replace("/", "/<wbr>")
    assert f'<th scope="row">Barlow Twins: {run}</th>' in table and ".runs td { white-space: normal; }" in page


def luminance(color):
    """The relative luminance of WCAG 2 of a color such as #0072B2 or #fff, 0 to 1."""
    digits = color.lstrip("#")
    digits = "".join(2 * digit for digit in digits) if len(digits) == 3 else digits
    values = [int(digits[i : i + 2], 16) / 255 for i in (0, 2, 4)]
    linear = [x / 12.92 if x <= 0.03928 else ((x + 0.055) / 1.055) ** 2.4 for x in values]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def contrast(one, other):
    darker, lighter = sorted((luminance(one), luminance(other)))
    return (lighter + 0.05) / (darker + 0.05)


@pytest.mark.parametrize("mode", ["light", "dark"])
def test_contrast_and_keyboard_order(sweep, tmp_path, mode):
    """WCAG 2.1 AA: 4.5 for text and marks, 3 for lines of charts; the order of the keyboard is that of the page."""
    write_report([sweep], tmp_path / "report.html")
    page = (tmp_path / "report.html").read_text()
    style = page.partition("<style>")[2].partition("</style>")[0]
    blocks = re.split(r"(@media \(prefers-color-scheme: dark\) \{\n.*?\n\})", style, flags=re.DOTALL)
    rules = "".join(blocks[::2] + (blocks[1::2] if mode == "dark" else []))  # the last rule for a name counts
    variables = dict(re.findall(r"--(\w+): (#\w+)", rules))
    lines = dict(re.findall(r"\.(c\d) \{ stroke: (#\w+)", rules))
    marks = dict(re.findall(r"\.(better|worse)::after \{(?: content: \"[^\"]*\";)? color: (#\w+)", rules))
    assert (luminance(variables["page"]) < 0.1) == (mode == "dark")
    assert set(variables) >= {"text", "soft", "page", "area"} and len(lines) == 6 and set(marks) == {"better", "worse"}
    for background in (variables["page"], variables["area"]):
        text = [variables["text"], variables["soft"], *marks.values()]
        assert min(contrast(color, background) for color in text) >= 4.5
    assert min(contrast(color, variables["page"]) for color in [*lines.values(), variables["mark"]]) >= 3
    assert page.count('tabindex="0"') >= 3 and set(re.findall(r'tabindex="(-?\d+)"', page)) == {"0"}


def test_markdown_and_csv_hold_the_same_values(sweep, tmp_path):
    report = write_report([sweep], tmp_path / "report.md")
    text = (tmp_path / "report.md").read_text()
    for table in report.tables:
        for _, cells in table.rows:
            for cell in cells:
                assert (f"**{cell.text}** ▲" if cell.mark == "better" else cell.text) in text
    write_report([sweep], tmp_path / "report.csv")
    with open(tmp_path / "report.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 9 * (2 + 2 * 2) + 6
    knn = [
        float(row["value"]) for row in rows if row["variant"] == "Z-prob Barlow Twins" and row["evaluation"] == "knn"
    ]
    shown = dict(table_named(report, "Accuracy").rows)["Z-prob Barlow Twins (3 seeds)"][0].text
    assert shown == f"{100 * statistics.fmean(knn):.1f} ± {100 * statistics.stdev(knn):.1f}"


def test_variants_of_one_objective_are_named_by_what_differs_and_get_heat_maps(tmp_path):
    for beta in (1e-2, 1e-3):
        for samples in (1, 12):
            fabricate_run(
                tmp_path / f"{beta},{samples}", "cifar10/zprob_vicreg", 0, accuracies={"knn": 0.3 + 5 * beta * samples},
                overrides=[f"embedding.beta={beta}", f"embedding.samples={samples}"],
            )  # fmt: skip
    report = make_report([tmp_path])
    assert "Z-prob VICReg, samples=12, beta=0.001" in [variant.label for variant in report.variants]
    (heat_map,) = report.heat_maps
    assert heat_map.columns == ["beta 0.001", "beta 0.01"]
    assert [name for name, _ in heat_map.rows] == ["standard_normal, S = 1", "standard_normal, S = 12"]
    shares = [[cell.share for cell in cells] for _, cells in heat_map.rows]
    assert shares == [[0, pytest.approx(0.045 / 0.595)], [pytest.approx(0.055 / 0.595), 1]]


def test_lower_limits_and_doubtful_estimates_of_mutual_information_are_marked(tmp_path):
    fabricate_run(tmp_path, "cifar10/barlow", 0, accuracies={"mi": 0.5})
    file = tmp_path / "eval" / "mi.json"
    metrics = {"I(V;H) js": 4.5, "I(H;Z) js": 15.2, "I(H;Z) mine": 15.1}
    marks = {"saturated": ["I(H;Z) js"], "failed": ["I(V;H), shuffled pairs: 0"]}
    file.write_text(json.dumps(json.loads(file.read_text()) | {"metrics": metrics, "intervals": {}} | marks))
    rows = dict(table_named(make_report([tmp_path]), "Mutual information").rows)
    assert {name: cell.text for name, (cell,) in rows.items()} == {
        "I(V;H) js": "4.50 ?", "I(H;Z) js": "≥ 15.20", "I(H;Z) mine": "15.10"
    }  # fmt: skip


@pytest.mark.parametrize("evaluation, title", [
    ("linear-sweep", "linear sweep"), ("semisup-1percent", "1 % of the labels"), ("semisup-mine", "semisup mine"),
    ("transfer-dtd-linear-sweep", "dtd, linear sweep"), ("transfer-my-set-finetune", "my set, finetune"),
])  # fmt: skip
def test_titles_of_accuracies(tmp_path, evaluation, title):
    fabricate_run(tmp_path, "cifar10/barlow", 0, accuracies={evaluation: 0.5})
    assert table_named(make_report([tmp_path]), "Accuracy").columns == [f"{title} ↑"]


def test_curves_are_drawn_for_what_was_logged(sweep):
    charts = curve_charts(make_report([sweep]).variants)
    assert [chart.title for chart in charts] == [
        "loss by epoch", "kNN accuracy, % by epoch", "kNN accuracy, % by hours", "images/s by epoch"
    ]  # fmt: skip
    assert charts[0].svg.count('<path class="c') == 3


def fabricate_single_probe(folder, name, hours, accuracy):
    run = fabricate_run(folder, f"cifar10/{name}", 0)
    (*lines, probe) = (run / "metrics.jsonl").read_text().splitlines()
    probe = json.dumps(json.loads(probe) | {"seconds": 3600 * hours, "knn": accuracy})
    (run / "metrics.jsonl").write_text("\n".join([*lines, probe]) + "\n")


def test_single_points_and_tick_labels_are_inside_the_chart(tmp_path):
    """Runs shorter than probe.every probe once. The widest digit has 9 units."""
    fabricate_single_probe(tmp_path / "a", "barlow", 0.148, 0.502)
    fabricate_single_probe(tmp_path / "b", "zprob_barlow", 0.19, 0.461)
    charts = curve_charts(make_report([tmp_path]).variants)
    for chart in charts:
        for x, text in re.findall(r'<text x="([\d.]+)" y="238" text-anchor="middle">([^<]+)<', chart.svg):
            assert float(x) + 9 * len(text) / 2 <= WIDTH, (chart.title, text)
    (by_hours,) = [chart.svg for chart in charts if chart.title.endswith("by hours")]
    points = re.findall(r'<circle class="(c\d)" cx="([\d.]+)" cy="([\d.]+)" r="2"/>', by_hours)
    assert [color for color, _, _ in points] == ["c0", "c1"]
    for _, x, y in points:
        assert LEFT + 5 < float(x) < WIDTH - RIGHT - 5 and TOP + 5 < float(y) < HEIGHT - BOTTOM - 5
    write_report([tmp_path], tmp_path / "report.html")
    assert "svg path, svg circle { fill: none;" in (tmp_path / "report.html").read_text()  # so the stroke's color shows


def test_a_single_time_has_no_negative_hours_around_it(tmp_path):
    fabricate_single_probe(tmp_path, "barlow", 0.15, 0.5)
    (by_hours,) = [c.svg for c in curve_charts(make_report([tmp_path]).variants) if c.title.endswith("by hours")]
    assert not re.search(r'text-anchor="middle">-', by_hours)


@pytest.mark.parametrize(
    "damage",
    [
        ("eval/knn.json", b"{"), ("eval/knn.json", b'{"evaluation": "knn"}'), ("eval/knn.json", b"\xff\xfe"),
        ("environment.json", b"[]"),
        ("metrics.jsonl", b'{"step": "x"}\n\x00\n{"step": 1e400}\n{"step": 1, "epoch": -1, "loss": 2}\n'),
        ("eval/knn.correct.npz", b"PK\x03\x04"), ("profile.json", b"{}"), ("views.png", b"<svg>"),
    ],
)  # fmt: skip
def test_a_damaged_file_costs_its_own_figures(tmp_path, damage):
    file, content = damage
    for name in ("barlow", "zprob_barlow"):
        for seed in range(2):
            fabricate_run(
                tmp_path / f"{name}-{seed}", f"cifar10/{name}", seed, accuracies={"knn": 0.5, "linear-sweep": 0.6}
            )
    (tmp_path / "barlow-0" / file).write_bytes(content)
    report = make_report([tmp_path])
    write_report([tmp_path], tmp_path / "report.html")
    assert table_named(report, "Accuracy").rows[1][1][1].text == "60.0 ± 0.0"
    told = {"eval/knn.json", "environment.json", "profile.json", "metrics.jsonl"}  # the last: the run is not finished
    assert bool(report.remarks) == (file in told)


def test_pickles_are_not_read(tmp_path):
    run = fabricate_run(tmp_path / "run", "cifar10/barlow", 0, accuracies={"knn": 0.5})
    np.savez(run / "eval" / "knn.correct.npz", **{"accuracy_k20_t0.07": np.array([print], object)})
    assert read_run(run).array("knn.correct.npz", "accuracy_k20_t0.07") is None


def test_runs_are_found_but_not_those_within_runs(tmp_path):
    run = fabricate_run(tmp_path / "a" / "b" / "run", "cifar10/barlow", 0)
    fabricate_run(run / "eval" / "semisup-1-seed0-abc", "cifar10/supervised", 0)
    assert [variant.label for variant in make_report([tmp_path]).variants] == ["Barlow Twins"]
    copied = fabricate_run(tmp_path / "copy", "cifar10/barlow", 0)
    report = make_report([tmp_path])
    assert len(report.variants[0].runs) == 1 and any(
        str(copied) in line or "left out" in line for line in report.remarks
    )


@pytest.mark.parametrize(
    ("path", "out", "message"), [("none", "r.html", "holds no run"), (".", "r.pdf", "must end in")]
)
def test_mistakes_are_one_sentence(tmp_path, path, out, message):
    with pytest.raises(UserError, match=message):
        write_report([tmp_path / path], tmp_path / out)
    assert not (tmp_path / out).exists()


def test_the_command_says_what_was_found_and_what_is_missing(sweep, tmp_path, fastssl):
    out = tmp_path / "report.md"
    code, printed, _ = fastssl("report", str(sweep), "--out", str(out))
    assert code == 0 and out.exists()
    assert "Accuracy, 4 comparisons with the baselines: 2 better, 0 worse, 2 within the noise. " in printed
    assert f"{out} compares 3 variants, 9 runs." in printed
    assert f"Not measured yet:\n  fastssl eval semisup {sweep}\n" in printed and "  fastssl eval mi " in printed


def test_a_few_differences_are_findings_in_every_format(sweep, tmp_path, fastssl, monkeypatch):
    _, printed, _ = fastssl("report", str(sweep), "--out", str(tmp_path / "report.html"))
    write_report([sweep], tmp_path / "report.md")
    line = (
        r"Z-prob Barlow Twins against Barlow Twins, linear sweep: \+10\.0 points \(\d+\.\d to \d+\.\d\), "
        r"better by more than the noise of 3 seeds and 400 test images\."
    )
    page = (tmp_path / "report.html").read_text()
    assert re.search(f"^{line}$", printed, re.MULTILINE)
    assert re.search(line, page.partition("<h2>")[0])
    assert re.search(f"^- {line}$", (tmp_path / "report.md").read_text(), re.MULTILINE)
    assert "<summary>4 differences with p-values</summary>" in page
    monkeypatch.setattr("fastssl.reporting.tables.MOST_DIFFERENCES", 3)
    assert make_report([sweep]).findings[0] == (
        "Accuracy, 4 comparisons with the baselines: 2 better, 0 worse, 2 within the noise."
    )


def test_a_finding_says_that_a_correction_decides(tmp_path):
    """The interval is of one difference, so it may leave out 0 where the noise of all comparisons does not."""
    same = {f"semisup-{percent}percent": 0.5 for percent in range(1, 6)}
    for name, accuracy in {"barlow": 0.5, "zprob_barlow": 0.5075}.items():
        for seed in range(2):
            folder = tmp_path / name / str(seed)
            fabricate_run(folder, f"cifar10/{name}", seed, accuracies={"knn": accuracy} | same)
    (line,) = [line for line in make_report([tmp_path]).findings if "kNN" in line]
    assert "within the noise of 2 seeds and 400 test images after Holm's correction." in line


def test_a_command_with_many_runs_is_whole_in_the_file_alone(tmp_path, fastssl):
    runs = [fabricate_run(tmp_path / "runs" / f"seed={seed}", "cifar10/barlow", seed) for seed in range(30)]
    code, printed, _ = fastssl("report", *map(str, runs), "--out", str(tmp_path / "report.md"))
    assert code == 0 and max(map(len, printed.splitlines())) < 320
    assert "Not measured yet; the report has the whole commands:\n" in printed
    assert all(str(run) in (tmp_path / "report.md").read_text() for run in runs)


def test_every_objective_and_kind_of_embedding_has_a_name():
    """variants.py raises a KeyError for others."""
    objectives = {model.model_fields["name"].default for model in get_args(AnyObjective)}
    assert set(OBJECTIVES) == objectives
    assert set(STOCHASTIC) == set(get_args(EmbeddingConfig.model_fields["stochastic"].annotation))


def test_damaged_results_cost_their_own_figures(tmp_path):
    """They pass the schema, and lack what their evaluation has, or have arrays of another shape."""
    folders = []
    for name in ("barlow", "zprob_barlow"):
        for seed in range(2):
            folders.append(
                fabricate_run(
                    tmp_path / f"{name}{seed}", f"cifar10/{name}", seed, accuracies={"knn": 0.5, "linear-sweep": 0.6},
                    aurocs={"knn_cosine": (0.6, 0.7)},
                )
            )  # fmt: skip
    changes = {"knn": {"metrics": {}}, "linear-sweep": {"metrics": {"ece": 0.1}}, "ood": {"far": {}}}
    for name, change in changes.items():
        file = folders[0] / "eval" / f"{name}.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | change))
    np.savez(folders[2] / "eval" / "ood-similar.scores.npz", **{"id/knn_cosine": np.zeros((2, 2))})
    np.savez(folders[2] / "eval" / "knn.correct.npz", **{"accuracy_k20_t0.07": np.array(True)})
    report = make_report([tmp_path])
    lacking = [line for line in report.remarks if "lacks the metrics of its evaluation" in line]
    assert len(lacking) == 2 and all(str(folders[0]) in line for line in lacking)
    shown = dict(table_named(report, "Accuracy").rows)
    assert shown["Barlow Twins (2 seeds)"][0].text == "50.0"  # of the seed whose file is whole


def test_markdown_takes_names_and_commands_as_they_are(tmp_path):
    run = fabricate_run(tmp_path / "a\n\n<script>" / "b\udce9", "cifar10/vicreg", 0, accuracies={"knn": 0.5})
    (run / "environment.json").write_text(json.dumps({"command": ["x", "a\n\n<script>"], "device": "x"}))
    for name in ("report.md", "report.csv", "report.html"):
        write_report([run], tmp_path / name)
    lines = (tmp_path / "report.md").read_text().splitlines()
    assert any("<script>" in line for line in lines)
    assert all(line.startswith("    ") or "\\<script" in line for line in lines if "<script" in line)


def test_runs_that_differ_in_their_name_alone_are_one_variant(tmp_path):
    for seed, name in enumerate(("a", "b")):
        fabricate_run(tmp_path / name, "cifar10/vicreg", seed, accuracies={"knn": 0.5}, overrides=[f"name={name}"])
    (variant,) = make_report([tmp_path]).variants
    assert (variant.label, variant.seeds) == ("VICReg", [0, 1])


def test_a_baseline_may_be_a_run_that_counts_as_another(sweep, tmp_path, monkeypatch):
    """A copy of a run is left out, and names its variant all the same; ~ is the home folder."""
    monkeypatch.setenv("HOME", str(tmp_path))
    shutil.copytree(sweep / "zprob_barlow" / "seed=1", tmp_path / "copy")
    report = make_report([sweep, tmp_path / "copy"], Path("~/copy"))
    assert [variant.baseline and variant.baseline.label for variant in report.variants] == [
        "Z-prob Barlow Twins", None, "Z-prob Barlow Twins",
    ]  # fmt: skip
