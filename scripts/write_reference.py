"""Write the pages that are made of the code: docs/cli.md, docs/api.md and docs/recipe.md.

A test compares them with the code: run this after changing an option, a recipe key or a public docstring.
"""

import importlib
import inspect
import operator
import re
import subprocess
import sys
import tempfile
import textwrap
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent

# The public names, in the order of the flow of data: title, module, names. Of a class, the methods that users call.
API: list[tuple[str, str, list[str]]] = [
    ("Recipes and trained models", "fastssl", ["load_recipe", "load_model", "load_encoder"]),
    ("Files of images", "fastssl.beton", ["Sample", "build_beton", "inspect_beton", "read_labels", "read_index_list"]),
    (
        "Loading",
        "fastssl.loading",
        [
            "BetonLoader", "BetonLoader.set_epoch", "BetonLoader.state_dict", "BetonLoader.load_state_dict", "Batch",
            "Batch.pixels", "SampleSelection",
        ],
    ),
    ("Views", "fastssl.views", ["PairedViews", "eval_transform"]),
    (
        "Models",
        "fastssl.models",
        [
            "SSLModel", "SSLModel.embed", "Classifier", "Classifier.logits", "Embedding", "DiagonalGaussian",
            "DiagonalGaussian.rsample", "DiagonalGaussian.log_prob", "DiagonalGaussian.kl_to", "GaussianHead",
            "StandardNormal", "MixtureOfGaussians", "VampPrior", "Projector", "project_draws", "build_model",
        ],
    ),
    (
        "Objectives",
        "fastssl.objectives",
        [
            "barlow_twins_loss", "vicreg_loss", "simclr_loss", "byol_loss", "sigreg_loss", "visreg_loss",
            "cross_entropy_loss", "TotalLoss", "TotalLoss.forward",
        ],
    ),
    ("Training", "fastssl.training", ["train"]),
    (
        "Evaluation",
        "fastssl.evaluation",
        [
            "load_run_encoder", "load_foreign_encoder", "cached_features", "knn_accuracy", "classification_metrics",
            "fit_sweep", "fit_lbfgs", "evaluate_knn", "evaluate_linear", "evaluate_semisup", "evaluate_transfer",
            "evaluate_uncertainty",
        ],
    ),
    (
        "OOD detection",
        "fastssl.evaluation.ood",
        ["detector", "Detector", "Detector.fit", "Detector.score", "metrics", "find_sets", "evaluate_ood"],
    ),
    ("Mutual information", "fastssl.evaluation.mutual_information", ["estimate", "posterior_bounds", "evaluate_mi"]),
    ("Embedding photographs", "fastssl.evaluation.embed", ["load_embedder", "embed_images"]),
    ("Profiling", "fastssl.profiling", ["profile_recipe", "plan_training"]),
    ("Reports", "fastssl.reporting", ["make_report", "write_report"]),
    ("Export", "fastssl.export", ["export_run"]),
]  # fmt: skip

SECTIONS = {"Args": "Arguments", "Returns": "Returns", "Yields": "Yields", "Raises": "Raises"}
HEADING = re.compile(r"(Args|Returns|Yields|Raises|Examples?)::?$")


def main() -> None:
    for page, text in {"cli.md": cli_page(), "api.md": api_page(), "recipe.md": recipe_page()}.items():
        (ROOT / "docs" / page).write_text(text)


def recipe_page() -> str:
    return run_module("fastssl.recipe_reference")


def cli_page() -> str:
    """The commands as typer documents them, with their examples as code."""
    with tempfile.TemporaryDirectory() as folder:
        page = Path(folder) / "cli.md"
        run_module(
            "typer", "fastssl.cli", "utils", "docs", "--name", "fastssl", "--title", "Commands", "--output", page
        )
        text = page.read_text()
    examples = re.compile(r"^Examples:\n((?:  .*\n)+)", re.MULTILINE)
    text = examples.sub(lambda found: f"```\n{textwrap.dedent(found[1])}```\n", text)
    note = "Written by `scripts/write_reference.py` from the command line itself: `fastssl COMMAND -h` shows the same."
    return text.replace("# Commands\n", f"# Commands\n\n{note}\n", 1)


def run_module(name: str, *arguments: object) -> str:
    command = [sys.executable, "-m", name, *map(str, arguments)]
    return subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, cwd=ROOT).stdout


def api_page() -> str:
    lines = [
        "# Python",
        "",
        "Written by `scripts/write_reference.py` from the docstrings. Letters in shapes: [glossary.md](glossary.md).",
        "Names that are not here may change without notice.",
        "",
    ]
    for title, module, names in API:
        lines += [f"## {title}", "", f"`from {module} import ...`", ""]
        for name in names:
            thing = operator.attrgetter(name)(importlib.import_module(module))
            lines += [f"### {name}", "", "```python", signature(name, thing), "```", ""]
            lines += docstring(inspect.getdoc(thing) or "")
    return "\n".join(lines)


def signature(name: str, thing: Any) -> str:
    """As in the code, but without the modules of types, and in several lines if it is long."""
    found = inspect.signature(thing)
    shown = [each for each in found.parameters.values() if each.name not in ("self", "args", "kwargs")]
    kinds = [each.kind for each in shown]
    parameters = [str(each.replace(default=_Ellipsis()) if is_long(each.default) else each) for each in shown]
    if inspect.Parameter.KEYWORD_ONLY in kinds:
        parameters.insert(kinds.index(inspect.Parameter.KEYWORD_ONLY), "*")
    result = "" if inspect.isclass(thing) else f" -> {inspect.formatannotation(found.return_annotation)}"
    short = without_modules(f"{name}({', '.join(parameters)}){result}")
    if len(short) <= 100:
        return short
    body = "".join(f"    {without_modules(parameter)},\n" for parameter in parameters)
    return f"{name}(\n{body}){without_modules(result)}"


class _Ellipsis:
    def __repr__(self) -> str:
        return "..."


def is_long(default: Any) -> bool:
    """Whether a default is a function, whose text is an address, or a list too long for a signature."""
    return inspect.isfunction(default) or (default is not inspect.Parameter.empty and len(repr(default)) > 80)


def without_modules(text: str) -> str:
    return re.sub(r"\b(?:[a-z_]\w*\.)+(?=[A-Za-z])", "", text)


def docstring(text: str) -> list[str]:
    """A docstring in Google's style as Markdown: arguments and errors as lists, examples as code."""
    lines: list[str] = []
    section = ""
    block: list[str] = []
    for line in [*text.splitlines(), "Returns:"]:  # the last one ends the last section
        found = HEADING.match(line)
        if found or (section and line and not line.startswith(" ")):
            lines += section_lines(section, textwrap.dedent("\n".join(block)).strip("\n"))
            section, block = (found[1], []) if found else ("", [line])
        else:
            block.append(line)
    return lines


def section_lines(section: str, body: str) -> list[str]:
    if not body:
        return []
    if section.startswith("Example"):
        return ["```python", body, "```", ""]
    if section not in SECTIONS:
        return [body, ""]
    items = re.sub(r"^(\w[\w., *]*): (?=\S)", r"* `\1`: ", body, flags=re.MULTILINE)
    if items != body:
        body = re.sub(r"^    ", "  ", items, flags=re.MULTILINE)
        body = re.sub(r"(?<=:)\n(?=\* )", "\n\n", body, count=1)  # a list needs an empty line before it
    return [f"**{SECTIONS[section]}**", "", body, ""]


if __name__ == "__main__":
    main()
