"""The code of docs/extend.md runs: a builder, an objective and a detector."""

import re
import shutil
import sys
import types
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from torch import Tensor, nn

import beton_builders
import fastssl.recipe
from fastssl.beton import build_beton, read_labels
from fastssl.evaluation.ood import Detector
from fastssl.models import ViewOutput
from fastssl.recipe import NonNegative, ObjectiveConfig

PAGE = (Path(__file__).parents[2] / "docs" / "extend.md").read_text()
BUILDER, CONFIG, OBJECTIVE, DETECTOR = re.findall(r"^```python\n(.*?)^```$", PAGE, re.DOTALL | re.MULTILINE)


def test_the_builder(photos, tmp_path, monkeypatch):
    (tmp_path / "scans.py").write_text(BUILDER)
    monkeypatch.setattr(beton_builders, "__path__", [*beton_builders.__path__, str(tmp_path)])
    source = shutil.copytree(photos / "val", tmp_path / "photos")
    files = sorted(source.rglob("*.jpg"))
    lines = [f"{file.relative_to(source)} {file.parent.name}" for file in files]
    (source / "scans.txt").write_text("\n".join(lines))
    build_beton("scans", source, tmp_path / "data", canvas=32, workers=1)
    del sys.modules["beton_builders.scans"]
    assert sorted(read_labels(tmp_path / "data" / "train.beton")) == sorted(int(f.parent.name[-1]) for f in files)


def test_the_objective(monkeypatch):
    names = {"ObjectiveConfig": ObjectiveConfig, "Literal": Literal, "NonNegative": NonNegative, "__name__": "recipe"}
    exec(CONFIG, names)
    monkeypatch.setattr(fastssl.recipe, "AlignmentConfig", names["AlignmentConfig"], raising=False)
    module = types.ModuleType("alignment")
    exec(OBJECTIVE, vars(module))
    torch.manual_seed(0)
    z = torch.randn(2, 3, 8, 4, requires_grad=True)
    terms = module.alignment_terms(tuple(ViewOutput(x, x, {}, None) for x in z), names["AlignmentConfig"]())
    assert set(terms) == {"alignment", "uniformity"}
    unit = nn.functional.normalize(z, dim=-1)
    torch.testing.assert_close(terms["alignment"], (unit[0] - unit[1]).norm(dim=-1).square().mean())
    distances = torch.cdist(unit, unit).square()
    torch.testing.assert_close(terms["uniformity"], (-2 * distances).exp().mean().log())
    (terms["alignment"] + terms["uniformity"]).backward()
    assert torch.isfinite(z.grad).all()


def test_the_detector():
    names = {"Detector": Detector, "Tensor": Tensor}
    exec(DETECTOR, names)
    known, strange = np.eye(5) * 2, np.full((3, 5), 7.0)
    fitted = names["FeatureLength"]().fit(known)
    np.testing.assert_allclose(fitted.score(known), 0, atol=1e-12)
    assert (fitted.score(strange) > 5).all()
