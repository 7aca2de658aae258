"""Kernels and bytes of the code that torch.compile generates for a GPU, within 5 % of their budgets.

A change that costs or saves more than that fails here, without a GPU: `benchmarks/gpu_budget.py` counts, and
records/gpu-budget.md explains. After a change that is meant, or of the torch version, put the figures that the failure
prints into BUDGETS.
"""

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import pytest
import torch

ROOT = Path(__file__).parents[2]
PINNED = re.search(r"^torch==(\S+)$", (ROOT / "constraints.txt").read_text(), re.MULTILINE)[1]
SMALL = [
    "model.backbone=test_resnet", "model.projector={layers: 2, hidden: 64, out: 64}", "views.size=32",
    "embedding.samples=3", "train.batch_size=64",
]  # fmt: skip

pytestmark = pytest.mark.skipif(
    torch.__version__.split("+")[0] != PINNED,
    reason=f"the budgets are those of torch {PINNED}, which constraints.txt names; this is {torch.__version__}",
)


class Budget(NamedTuple):
    kernels: int  # Triton's and those of libraries
    megabytes: float  # that they move


BUDGETS = {
    ("zprob_barlow", *SMALL): {"step, forward": Budget(164, 45.4), "step, backward": Budget(153, 88.8)},
}


def count(tmp_path: Path, recipe: str, *arguments: str) -> list[dict]:
    """The parts that gpu_budget.py finds, in a process of its own."""
    out = tmp_path / "budget.json"
    command = [sys.executable, "benchmarks/gpu_budget.py", f"recipes/{recipe}.yaml", *arguments, "--json", str(out)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return json.loads(out.read_text())["parts"]


def check(parts: list[dict], budgets: dict[str, Budget]) -> None:
    """Within 5 %, in one graph, which is compiled once."""
    found = {part["part"]: Budget(part["triton_kernels"] + part["extern_kernels"], part["bytes"] / 1e6) for part in parts}
    assert found.keys() == budgets.keys()
    for part, budget in budgets.items():
        is_near = all(abs(value / wanted - 1) <= 0.05 for value, wanted in zip(found[part], budget))
        assert is_near, (
            f"{part}: {found[part].kernels} kernels move {found[part].megabytes:.1f} MB, the budget is {budget}. "
            f"If that is meant, put Budget({found[part].kernels}, {found[part].megabytes:.1f}) into BUDGETS."
        )
    assert [(part["graphs"], part["graph_breaks"], part["recompilations"]) for part in parts] == [(1, 0, 0)] * len(parts)
