"""What a run directory says about a run: environment, results, the last probe. Files that are damaged are named."""

import json
from dataclasses import dataclass, field
from pathlib import Path

from fastssl.evaluation.runs import weights_sha256
from fastssl.export.source import Source
from fastssl.training.tracking import readable_lines


@dataclass(frozen=True)
class Result:
    """One file of eval/: its figures, shares from 0 to 1 where they are accuracies."""

    file: str
    name: str
    figures: dict[str, float]
    images: int | None  # that it was measured on
    data: str | None


@dataclass
class Findings:
    environment: dict = field(default_factory=dict)
    results: list[Result] = field(default_factory=list)
    probe: dict[str, float] | None = None  # figures of the last probe up to the exported step, and its `step`
    train_images: int | None = None
    stale: list[str] = field(default_factory=list)  # results of other weights than those exported
    damaged: list[str] = field(default_factory=list)


def look_into(source: Source) -> Findings:
    findings, run_dir = Findings(), source.run_dir
    if run_dir is None:
        return findings
    environment = run_dir / "environment.json"
    if environment.is_file():
        findings.environment = _json_object(environment, findings) or {}
    weights = weights_sha256(source.model)
    for path in sorted((run_dir / "eval").glob("*.json")):
        result = _json_object(path, findings)
        if result is None or result.get("weights") == "untrained":
            continue
        if result.get("encoder_sha256", weights) != weights:
            findings.stale.append(f"eval/{path.name}")
            continue
        val, train = _object(result.get("val")), _object(result.get("train"))
        findings.results.append(
            Result(
                f"eval/{path.name}",
                str(result.get("evaluation", path.stem)),
                _numbers(_object(result.get("metrics"))),
                val.get("images") if type(val.get("images")) is int else None,
                val.get("path") if isinstance(val.get("path"), str) else None,
            )
        )
        if train.get("path") == source.recipe.data.train and type(train.get("images")) is int:
            findings.train_images = train["images"]
    findings.probe = _last_probe(run_dir / "metrics.jsonl", source.step)
    return findings


def _last_probe(path: Path, exported_step: int | None) -> dict[str, float] | None:
    """The last line that is no training step's; torn and damaged lines are passed over."""
    if not path.is_file():
        return None
    last = None
    for entry in readable_lines(path.read_text(errors="replace").splitlines()):
        figures = _numbers(entry)
        if "loss" in entry or not figures.keys() - {"step", "epoch"}:
            continue
        if exported_step is None or figures["step"] <= exported_step:
            last = figures
    return last


def _json_object(path: Path, findings: Findings) -> dict | None:
    try:
        value = json.loads(path.read_text())
    except (OSError, ValueError, RecursionError):
        value = None
    if isinstance(value, dict):
        return value
    findings.damaged.append(str(path.relative_to(path.parents[1]) if path.parent.name == "eval" else path.name))
    return None


def _object(value: object) -> dict:
    return value if isinstance(value, dict) else {}


def _numbers(values: dict) -> dict[str, float]:
    """Every number in an object, and those in an object inside it under dotted names."""
    flat = {}
    for key, value in values.items():
        flat |= {f"{key}.{inner}": x for inner, x in value.items()} if isinstance(value, dict) else {key: value}
    return {key: x for key, x in flat.items() if type(x) is float or (type(x) is int and abs(x) < 2**63)}
