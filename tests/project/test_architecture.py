"""The import rule: folders stand in the order of the data's flow, and each imports only what comes before."""

import ast
import re
from pathlib import Path

ROOT = Path(__file__).parents[2]
FLOW = [
    "beton", "loading", "views", "models", "objectives", "training", "evaluation", "profiling", "reporting", "export",
]  # fmt: skip
COMMON = {"recipe", "common"}  # every folder may import these; recipe imports common
APPLICATION = {
    "cli",
    "demo",
    "recipe_reference",
    "sweep",
    "__main__",
    "__init__",
}  # these files and folders may import everything


def imports_of(path: Path) -> set[str]:
    """First name below `fastssl` of everything of ours that a file imports, at any depth of its code."""
    package = path.relative_to(ROOT).with_suffix("").parts[:-1]
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = ".".join(package[: len(package) - node.level + 1]) if node.level else ""
            module = ".".join(part for part in (base, node.module) if part)
            names = [f"{module}.{alias.name}" for alias in node.names]
        else:
            continue
        for name in names:
            parts = name.split(".")
            if parts[0] in ("fastssl", "beton_builders"):
                found.add(parts[1] if parts[0] == "fastssl" and len(parts) > 1 else parts[0])
    return found


def test_folders_import_themselves_earlier_folders_and_common():
    checked = 0
    for path in (ROOT / "fastssl").rglob("*.py"):
        place = path.relative_to(ROOT / "fastssl")
        folder = place.parts[0].removesuffix(".py")
        if folder in APPLICATION:
            continue
        if folder in COMMON or len(place.parts) == 1:
            assert imports_of(path) <= {"common"}, f"{place} must import nothing of ours but common"
            continue
        allowed = set(FLOW[: FLOW.index(folder) + 1]) | COMMON
        assert imports_of(path) <= allowed, f"{place} imports {imports_of(path) - allowed}"
        checked += 1
    assert checked > 20


def test_a_builder_imports_only_what_it_yields():
    for path in (ROOT / "beton_builders").glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("fastssl"):
                assert node.module == "fastssl.beton" and {a.name for a in node.names} <= {"Sample", "LeftOut"}, path
            if isinstance(node, ast.Import):
                assert not any(a.name.startswith("fastssl") for a in node.names), path


def test_torch_distributed_is_called_from_one_file():
    """Ranks and collectives are in common/distributed.py; DistributedDataParallel's hook for bf16 is in setup.py."""
    pattern = re.compile(r"import torch\.distributed|from torch import distributed|torch\.distributed\.(?!algorithms)")
    callers = {path.name for path in (ROOT / "fastssl").rglob("*.py") if pattern.search(path.read_text())}
    assert callers == {"distributed.py"}


def test_the_rule_sees_every_form_of_import(tmp_path):
    """The walk itself: relative, absolute and hidden in a function."""
    path = ROOT / "fastssl" / "views" / "paired.py"
    assert {"recipe", "views"} <= imports_of(path)
    assert "evaluation" in imports_of(ROOT / "fastssl" / "cli" / "evaluate.py")


def test_test_files_have_names_of_their_own():
    """Without packages, pytest imports them by their names alone."""
    names = [path.name for path in (ROOT / "tests").rglob("*.py") if path.name != "conftest.py"]
    assert len(names) == len(set(names))
