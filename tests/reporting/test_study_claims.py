"""The readings of the paper's claims, from fabricated runs whose truth is known."""

import re
import shutil
import sys
from pathlib import Path

import pytest
from fabricated_runs import fabricate_run

from fastssl.reporting import make_report

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "scripts"))
from study_claims import read_claims, summary  # noqa: E402


def readings(folder, *, z_loses=0.0, h_loses=0.2, h_keeps_less=0.5, sigma=(0.7, 0.9), msp=(0.6, 0.8), seeds=3):
    for objective in ("barlow", "vicreg"):
        for name, loses, less in (("", 0, 0), ("zprob_", z_loses, 0), ("hprob_", h_loses, h_keeps_less)):
            for seed in range(seeds):
                fabricate_run(
                    folder / f"{name}{objective}" / f"seed={seed}", f"cifar10/{name}{objective}", seed,
                    accuracies={"linear-sweep": 0.6 - loses}, information=4 - less + seed / 100,
                    aurocs={
                        "sigma_mean": sigma, "msp": msp, "draws_disagreement": (0.5, 0.5), "energy": msp,
                        "mahalanobis": msp, "mahalanobis_unlabelled": (0.6, 0.9),
                    },
                )  # fmt: skip
    report = make_report([folder])
    return read_claims(report.values, report.variants)


@pytest.mark.parametrize(
    ("changes", "verdicts"),
    [
        ({}, ("supported", "supported", "supported")),
        ({"z_loses": 0.005}, ("supported", "supported", "supported")),  # within the margin of a point
        ({"z_loses": 0.1}, ("not supported", "supported", "supported")),
        ({"h_loses": 0.0}, ("supported", "not supported", "supported")),
        ({"h_loses": 0.005}, ("supported", "not supported", "supported")),
        ({"h_keeps_less": -0.5}, ("supported", "not supported", "supported")),
        ({"h_keeps_less": 0.0}, ("supported", "undecided", "supported")),
        ({"sigma": (0.7, 0.3)}, ("supported", "supported", "not supported")),
        ({"sigma": (0.6, 0.7), "msp": (0.8, 0.9)}, ("supported", "supported", "not supported")),
        ({"sigma": (0.6, 0.8)}, ("supported", "supported", "undecided")),  # above chance, and as good as MSP
        ({"seeds": 1}, ("undecided", "undecided", "undecided")),
    ],
)
def test_verdicts(tmp_path, changes, verdicts):
    assert tuple(each.verdict for each in readings(tmp_path, **changes)) == verdicts


def test_what_is_missing_leaves_a_claim_undecided(tmp_path):
    full = tmp_path / "full"
    readings(full)
    for number, name in enumerate(("vicreg", "zprob_vicreg", "barlow")):
        part = tmp_path / str(number)
        shutil.copytree(full, part)
        shutil.rmtree(part / name)
        report = make_report([part])
        verdicts = [each.verdict for each in read_claims(report.values, report.variants)]
        # Z-prob is in the first and the third claim, deterministic runs are in the first two.
        expected = (0, 2) if name == "zprob_vicreg" else (0, 1)
        assert verdicts == ["undecided" if claim in expected else "supported" for claim in range(3)]
    for file in full.rglob("eval/*"):
        file.unlink()
    report = make_report([full])
    assert {each.verdict for each in read_claims(report.values, report.variants)} == {"undecided"}


def test_figures(tmp_path):
    matches, loses, detects = readings(tmp_path, z_loses=0.1, h_loses=0.2)
    (linear,) = [row for row in matches.rows if row[0] == "linear sweep"]
    assert (
        linear[1:3] == ["60.0 ± 0.0", "50.0 ± 0.0"]
        and linear[3].startswith("-10.0 (-")
        and linear[3].endswith("; 3 seeds)")
    )
    information = loses.rows[-1]
    assert information[0] == "I(V;H) js" and information[1:4] == [
        "4.01 ± 0.01",
        "3.51 ± 0.01",
        "-0.50 (-0.50 to -0.50; 3 seeds)",
    ]
    assert [row[:2] for row in detects.rows[1:]] == [
        [f"{name} {objective}", where]
        for name in ("Z-prob", "H-prob") for objective in ("Barlow Twins", "VICReg") for where in ("near", "far")
    ]  # fmt: skip
    mean, low, high = map(float, re.findall(r"[+-][\d.]+", detects.rows[1][-2]))
    assert low < mean < high and mean == pytest.approx(20, abs=2)  # an AUROC of 70 % is 20 points above chance


def test_the_summary_marks_differences_beyond_the_noise(tmp_path):
    readings(tmp_path, h_loses=0.2)
    report = make_report([tmp_path])
    head, _, *rows = summary(report.values, report.variants)
    assert head == "| variant | linear | I(V;H) | OOD by sigma, near | far |"
    cells = {cell[0]: cell[1:] for cell in ([part.strip() for part in row.split("|")[1:-1]] for row in rows)}
    assert cells["Barlow Twins (3 seeds)"][0] == "60.0 ± 0.0" == cells["Z-prob Barlow Twins (3 seeds)"][0]
    assert cells["H-prob VICReg (3 seeds)"][0] == "**40.0 ± 0.0** ▼"
    assert [float(cell.split()[0]) for cell in cells["H-prob VICReg (3 seeds)"][2:]] == pytest.approx([70, 90], abs=1)


def test_the_readme_has_the_summary_of_the_recorded_runs():
    report = make_report([ROOT / "records/study/runs"])
    comments = [f"<!-- {which} of scripts/study_claims.py, summary -->" for which in ("begin", "end")]
    block = "\n".join([comments[0], *summary(report.values, report.variants), comments[1]])
    assert block in (ROOT / "README.md").read_text()
