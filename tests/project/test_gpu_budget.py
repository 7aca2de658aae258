"""Kernels and bytes of the code that torch.compile generates for a GPU, within 5 % of their budgets.

A change that costs or saves more than that fails here, without a GPU: `benchmarks/gpu_budget.py` counts, and
records/gpu-budget.md explains. After a change that is meant, or of the torch version, put the figures that the failure
prints into BUDGETS.
"""

import importlib
import json
import re
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import pytest
import torch

from fastssl.recipe import load_recipe

ROOT = Path(__file__).parents[2]
PINNED = re.search(r"^torch==(\S+)$", (ROOT / "constraints.txt").read_text(), re.MULTILINE)[1]
SMALL = [  # of zprob_barlow: fast enough for `make test`
    "model.backbone=test_resnet", "model.projector={layers: 2, hidden: 64, out: 64}", "views.size=32",
    "embedding.samples=3", "train.batch_size=64",
]  # fmt: skip

pytestmark = pytest.mark.skipif(
    torch.__version__.split("+")[0] != PINNED,
    reason=f"the budgets are those of torch {PINNED}, which constraints.txt names; this is torch {torch.__version__}",
)


class Budget(NamedTuple):
    """Of one part of a training step."""

    kernels: int  # Triton's and those of libraries
    megabytes: float  # that they move


FORWARD, BACKWARD = "step, forward", "step, backward"
BUDGETS = {  # per batch of 256; the small step's of 64
    "small": {FORWARD: Budget(162, 43.0), BACKWARD: Budget(153, 89.5)},
    "barlow": {FORWARD: Budget(239, 14_392), BACKWARD: Budget(251, 34_151)},
    "zprob_barlow": {FORWARD: Budget(262, 14_817), BACKWARD: Budget(265, 34_671)},
    "hprob_barlow": {FORWARD: Budget(263, 14_805), BACKWARD: Budget(261, 34_788)},
    "cifar10/barlow": {FORWARD: Budget(218, 3_521), BACKWARD: Budget(224, 7_423)},
    "cifar10/zprob_barlow": {FORWARD: Budget(241, 3_946), BACKWARD: Budget(238, 7_943)},
    "cifar10/hprob_barlow": {FORWARD: Budget(241, 3_869), BACKWARD: Budget(236, 7_977)},
    "cifar10/hprob_sigreg": {FORWARD: Budget(245, 3_881), BACKWARD: Budget(230, 7_789)},
    "cifar10/zprob_visreg": {FORWARD: Budget(245, 4_656), BACKWARD: Budget(233, 8_463)},
}
PARAMETERS = Budget(12, 1.43)
VIEWS = {  # by the further arguments
    (): {"views, Triton: parameters": PARAMETERS, "views, torch.compile": Budget(30, 12_746)},
    ("--in-blocks",): {"views, Triton: parameters": PARAMETERS, "views, torch.compile": Budget(36, 12_870)},
}


def test_a_small_step_stays_within_its_budget(tmp_path):
    check(count(tmp_path, "zprob_barlow", "--only", "step", *SMALL), BUDGETS["small"])


@pytest.mark.slow
@pytest.mark.parametrize("recipe", [name for name in BUDGETS if name != "small"])
def test_a_training_step_stays_within_its_budget(tmp_path, recipe):
    check(count(tmp_path, recipe, "--only", "step"), BUDGETS[recipe])


def test_the_views_by_triton_are_four_kernels_and_less_than_a_gigabyte(monkeypatch):
    """A batch of 256: 512 views of 224 px from canvases of 256 px. Counted from the tensors of each launch.

    From canvases in blocks the first kernel reads a quarter of the bytes.
    """
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    gpu_budget = importlib.import_module("gpu_budget")
    recipe = load_recipe(ROOT / "recipes" / "zprob_barlow.yaml")
    kernels = gpu_budget.pixel_kernels(recipe, stored=256)
    assert [kernel.name for kernel in kernels] == [
        "crop_kernel", "contrast_kernel", "blur_columns_kernel", "blur_rows_kernel",
    ]  # fmt: skip
    assert sum(kernel.bytes for kernel in kernels) == pytest.approx(0.852e9, rel=0.05)
    crop, *others = gpu_budget.pixel_kernels(recipe, stored=256, in_blocks=True)
    assert others == kernels[1:] and crop.name == "crop_kernel"
    assert kernels[0].bytes - crop.bytes == 256 * (3 * 256**2 - 3 * 256**2 // 4), "6 bits a pixel in place of 24"
    without_blur = load_recipe(ROOT / "recipes" / "cifar10" / "zprob_barlow.yaml")
    assert len(gpu_budget.pixel_kernels(without_blur, stored=32)) == 2


@pytest.mark.slow
@pytest.mark.parametrize("arguments", VIEWS)
def test_the_compiled_parts_of_the_views_stay_within_their_budgets(tmp_path, arguments):
    pixels, *compiled = count(tmp_path, "zprob_barlow", "--only", "views", *arguments)
    assert pixels["part"] == "views, Triton: pixels"
    check(compiled, VIEWS[arguments])


@pytest.mark.slow
def test_most_gradients_are_complete_before_the_last_graph(tmp_path):
    """4.8 MB of gradients of two processes: none as one graph, nine tenths in buckets of 1 MB, as over a network."""
    wider = [*SMALL, "model.projector={layers: 2, hidden: 512, out: 512}", "--processes", "2", "--bucket-mb", "0", "1"]
    found = run_benchmark(tmp_path, "ddp_overlap.py", "zprob_barlow", *wider)
    assert found["0"] == {"graphs": 2, "gradients": 4_841_280, "late": 4_841_280}
    assert found["1"] == {"graphs": 18, "gradients": 4_841_280, "late": 419_392}


def count(tmp_path: Path, recipe: str, *arguments: str) -> list[dict]:
    return run_benchmark(tmp_path, "gpu_budget.py", recipe, *arguments)["parts"]


def run_benchmark(tmp_path: Path, program: str, recipe: str, *arguments: str) -> dict:
    """Its figures. It runs in a process of its own, as it replaces functions of torch."""
    out = tmp_path / "figures.json"
    command = [sys.executable, f"benchmarks/{program}", f"recipes/{recipe}.yaml", *arguments, "--json", str(out)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return json.loads(out.read_text())


def check(parts: list[dict], budgets: dict[str, Budget]) -> None:
    """Within 5 % of the budgets, each part in one graph that is compiled once for all steps and epochs."""
    found = {
        part["part"]: Budget(part["triton_kernels"] + part["extern_kernels"], part["bytes"] / 1e6) for part in parts
    }
    is_near = found.keys() == budgets.keys() and all(
        abs(value / budget - 1) <= 0.05 for part in budgets for value, budget in zip(found[part], budgets[part])
    )
    assert is_near, f"If these figures are meant, put them into the table of budgets: {found}\nThe budgets: {budgets}"
    for part in parts:
        assert (part["graphs"], part["graph_breaks"], part["recompilations"]) == (1, 0, 0), part["part"]
