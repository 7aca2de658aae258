"""The table of what sigma is worth, from fabricated runs."""

import sys
from pathlib import Path

from fabricated_runs import fabricate_run

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "scripts"))
import sigma_table  # noqa: E402


def test_a_row_has_the_means_over_seeds_and_dashes_for_what_is_missing(tmp_path, monkeypatch, capsys):
    for seed in (0, 1):
        fabricate_run(
            tmp_path / f"z{seed}", "cifar10/zprob_vicreg", seed, r_auroc=0.6 + seed / 10,
            aurocs={"sigma_mean": (0.3, 0.9), "layers_unlabelled": (0.6, 0.8)},
        )  # fmt: skip
    fabricate_run(tmp_path / "h", "cifar10/hprob_vicreg", 0)
    fabricate_run(tmp_path / "deterministic", "cifar10/vicreg", 0, aurocs={"layers_unlabelled": (0.6, 0.8)})
    monkeypatch.setattr(sys, "argv", ["sigma_table.py", str(tmp_path)])
    sigma_table.main()
    heads, _, z_prob, h_prob = [line for line in capsys.readouterr().out.splitlines() if line]
    names, values = ([cell.strip() for cell in row.strip("|").split("|")] for row in (heads, z_prob))
    found = dict(zip(names, values))
    near, far = (float(text.split()[0]) for text in found["sigma\\_mean"].split(" / "))
    assert abs(near - 30) < 5 and abs(far - 90) < 5 and found["rho"] == "0.10" and found["R-AUROC"] == "65.0 ± 7.1"
    assert found["draws\\_disagreement"] == "– / –" and found["variant"] == "Z-prob VICReg"
    assert h_prob.count("–") == 12 and "H-prob VICReg" in h_prob
