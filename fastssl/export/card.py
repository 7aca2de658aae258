"""model_card.md: all that a run says about its model, and what it does not say. No figure comes from elsewhere."""

import json
from collections.abc import Iterable

import yaml
from torch import nn

from fastssl.common.geometry import CENTER
from fastssl.export.run_summary import Findings
from fastssl.export.source import Source
from fastssl.models.exported import short_path

CARD = "model_card.md"
LIBRARY = {"timm": "timm", "safetensors": "fastssl", "onnx": "onnx"}
OBJECTIVES = {
    "barlow_twins": "Barlow Twins",
    "vicreg": "VICReg",
    "simclr": "SimCLR",
    "byol": "BYOL",
    "supervised": "cross-entropy",
}


def model_card(source: Source, findings: Findings, file: str, format: str, sigma: bool) -> str:
    """Markdown with YAML front matter, as Hugging Face reads it. The licence is left to whoever publishes.

    file: the exported file's name; it lies beside the card.
    """
    recipe = source.recipe
    objective, supervised = OBJECTIVES[recipe.objective.name], recipe.objective.name == "supervised"
    kind = ["supervised-learning"] if supervised else ["self-supervised-learning", recipe.objective.name]
    tags = ["image-feature-extraction", *kind, "fastssl"]
    if format != "safetensors":
        tags.append(LIBRARY[format])
    if sigma:
        tags.append("uncertainty")
    front = {"library_name": LIBRARY[format], "pipeline_tag": "image-feature-extraction", "tags": tags}
    sections = [
        f"---\n{yaml.safe_dump(front, sort_keys=False)}---",
        f"# {plain(recipe.name)}",
        f"A {recipe.model.backbone} image encoder that learned {'from' if supervised else 'without'} labels "
        f"({objective}), trained and exported by fastssl. `{file}` gives {outputs_in_words(source, format, sigma)}.",
        "## Use",
        f"```python\n{code(source, file, format, sigma)}\n```",
        "## Input",
        table(input_rows(source)),
        "## Model",
        table(model_rows(source, format, sigma)),
        "## Training",
        table(training_rows(source, findings)),
        "## Results",
        results_section(findings),
        "## Made with",
        table(environment_rows(source, findings)),
        "## Known limits",
        "\n".join(f"- {limit}" for limit in limits(source, findings, format, sigma)),
    ]
    return "\n\n".join(sections) + "\n"


def outputs_in_words(source: Source, format: str, sigma: bool) -> str:
    h = "the representation h"
    if "h" in source.spaces:
        of_file = "the encoder's features, of which this run's h head makes the representation h"
        h = of_file if format != "onnx" and not sigma else "the representation h, the mean of a Gaussian"
    return h + (f", and mu and sigma of the stochastic embedding {space_of_sigma(source)}" if sigma else "")


def space_of_sigma(source: Source) -> str:
    """As the model's `embed`: where both are stochastic, h's."""
    return "h" if "h" in source.spaces else "z"


def code(source: Source, file: str, format: str, sigma: bool) -> str:
    """A program that reads the file and embeds photo.jpg; the clean view in Pillow and numpy."""
    views = source.recipe.views
    what, cut, box = "whole image", "", ""
    if views.eval == "center":
        what, box = "image's centre", ", box=box"
        cut = f"""\
    side = {CENTER} * min(image.size)
    left, top = (image.width - side) / 2, (image.height - side) / 2
    box = left, top, left + side, top + side
"""
    line = loading_line(source, file, format, sigma)
    if format == "onnx":
        imports = "import onnxruntime"
        outputs = "h, mu, sigma" if sigma else "(h,)"
        use = f'session = {line}\n{outputs} = session.run(None, {{"images": preprocess("photo.jpg")}})'
    else:
        imports = "import timm\nimport torch" if format == "timm" else "import fastssl\nimport torch"
        images = 'images = torch.from_numpy(preprocess("photo.jpg"))'
        if sigma:
            use = f"model = {line}\n{images}\nh, mu, sigma, space = model.embed(images)"
        else:
            use = f"encoder = {line}\n{images}\nwith torch.inference_mode():\n    h = encoder(images)"
    return f'''\
import numpy as np
{imports}
from PIL import Image, ImageOps

MEAN, STD = np.float32({list(views.mean)}), np.float32({list(views.std)})


def preprocess(path):
    """The {what} as a square of {views.size} pixels, normalised: (1, 3, {views.size}, {views.size}) float32."""
    image = ImageOps.exif_transpose(Image.open(path)).convert("RGB")
{cut}    pixels = np.asarray(image.resize(({views.size}, {views.size}), Image.BILINEAR{box}), np.float32) / 255
    return ((pixels - MEAN) / STD).transpose(2, 0, 1)[None]


{use}'''


def loading_line(source: Source, file: str, format: str, sigma: bool) -> str:
    """One expression of Python that reads the file."""
    name = json.dumps(file, ensure_ascii=False)
    if format == "timm":
        options = "".join(f", {key}={value}" for key, value in source.timm_options.items())
        backbone = source.recipe.model.backbone
        return f'timm.create_model("{backbone}", num_classes=0{options}, checkpoint_path={name}).eval()'
    if format == "onnx":
        return f"onnxruntime.InferenceSession({name})"
    return f"fastssl.load_model({name})" if sigma else f"fastssl.load_encoder({name})"


def input_rows(source: Source) -> Iterable[tuple[str, object]]:
    views = source.recipe.views
    seen = "the whole image, whatever its aspect ratio"
    if views.eval == "center":
        seen = f"the central square of {CENTER} of the shorter side"
    yield "image", f"RGB; kind `{views.eval}`: {seen}, resized to a square"
    yield "size", f"{views.size} x {views.size}, bilinear, antialiased where it shrinks"
    yield "range", "[0, 1], then minus mean, divided by std"
    yield "mean", list(views.mean)
    yield "std", list(views.std)


def model_rows(source: Source, format: str, sigma: bool) -> Iterable[tuple[str, object]]:
    model, keys = source.model, source.recipe.model
    yield "backbone", f"{keys.backbone} (timm)"
    yield "stem", "3x3 convolution, no max-pool" if keys.stem == "small" else "as timm makes it"
    yield "width of h", model.encoder.num_features
    yield "parameters of the backbone", f"{count_parameters(model.encoder):,}"
    if source.spaces:
        embedding = source.recipe.embedding
        yield "stochastic", " and ".join(source.spaces)
        prior = embedding.prior.replace("_", " ")
        if embedding.prior != "standard_normal":
            prior += f", {embedding.mixture_components} components"
        yield "prior", prior
        yield "beta", embedding.beta
        yield "samples S", embedding.samples
    else:
        yield "stochastic", "no"
    if source.recipe.objective.name == "supervised":
        behind, top = "classifier", model.classifier
        yield "classifier in training", f"one linear layer, {top.out_features} classes"
    else:
        behind, top, projector = "projector", model.projector, keys.projector
        yield "projector in training", f"{projector.layers} layers, {projector.hidden} wide, {projector.out} out"
    if sigma:
        yield "width of mu and sigma", model.heads[space_of_sigma(source)].mu.out_features
        yield f"parameters of {behind} and heads", f"{count_parameters(top, model.heads):,}"


def training_rows(source: Source, findings: Findings) -> Iterable[tuple[str, object]]:
    recipe, optim, train = source.recipe, source.recipe.optim, source.recipe.train
    settings = recipe.objective.model_dump(exclude={"name", "gather"})
    yield "objective", f"{OBJECTIVES[recipe.objective.name]} ({', '.join(f'{k}={v}' for k, v in settings.items())})"
    yield "data", short_path(recipe.data.train)
    yield "images", f"{findings.train_images:,}" if findings.train_images else "the run does not say"
    if recipe.data.subset is not None:
        yield "subset", f"the images listed in {short_path(recipe.data.subset)}"
    yield "limit", f"a random subset of at most {recipe.data.limit:,}" if recipe.data.limit else "none"
    done = "unknown number" if source.epochs_done is None else source.epochs_done
    yield "epochs", f"{done} of {train.epochs}"
    yield "steps", "the checkpoint does not say" if source.step is None else f"{source.step:,}"
    yield "batch size", train.batch_size
    yield "optimiser", ", ".join([optim.name, *(f"{key}={value}" for key, value in optim.options.items())])
    yield "peak learning rate", f"{optim.lr * train.batch_size / 256:.4g} ({optim.lr:g} at batch 256)"
    yield "weight decay", f"{optim.weight_decay:g}"
    if train.ema is not None:
        yield "weights", f"their running average, decay {train.ema:g}"
    if recipe.model.init is not None:
        yield "started from", short_path(recipe.model.init)
    yield "seed", recipe.seed
    auto = "auto: bf16 on a GPU, else fp32"
    yield "precision", auto if train.precision == "auto" else train.precision


def results_section(findings: Findings) -> str:
    rows = [
        (result.name, name, f"{value:.4g}", on_words(result.data, result.images))
        for result in findings.results
        for name, value in result.figures.items()
    ]
    parts = []
    if rows:
        parts.append(table(rows, ("evaluation", "figure", "value", "measured on")))
    if findings.probe:
        probe = {key: value for key, value in findings.probe.items() if key not in ("step", "epoch")}
        figures = ", ".join(f"{plain(key)} {value:.4g}" for key, value in probe.items())
        parts.append(f"The last probe in training, at step {findings.probe['step']:.0f}: {figures}.")
    return "\n\n".join(parts) or "The run holds no result."


def on_words(data: str | None, images: int | None) -> str:
    return ", ".join([*([short_path(data)] if data else []), *([f"{images:,} images"] if images else [])])


def environment_rows(source: Source, findings: Findings) -> Iterable[tuple[str, object]]:
    environment = findings.environment
    packages = environment.get("packages")
    packages = packages if isinstance(packages, dict) else {}
    for shown, name in (("fastssl", "fastssl-trainer"), ("torch", "torch"), ("timm", "timm")):
        yield shown, packages.get(name) or "the run does not say"
    yield "git state", environment.get("git") or "the run does not say"
    yield "device", environment.get("device") or "the run does not say"
    yield "checkpoint", source.checkpoint.name
    yield "its sha256", source.checkpoint_sha256


def limits(source: Source, findings: Findings, format: str, sigma: bool) -> Iterable[str]:
    """What a reader may take for granted and should not, each with its cause in the run."""
    epochs = source.recipe.train.epochs
    if source.epochs_done is None:
        yield "The checkpoint does not say how far the training had come."
    elif source.epochs_done < epochs:
        steps = "" if source.step is None else f", at step {source.step:,}"
        yield f"Exported from an unfinished run: {source.epochs_done} of {epochs} epochs were done{steps}."
    if not findings.results:
        yield "No accuracy was measured on these weights" + (" but the probe's." if findings.probe else ".")
    for file in findings.stale:
        yield f"`{plain(file)}` was measured on other weights of this run, and is left out."
    for file in findings.damaged:
        yield f"`{plain(file)}` could not be read, and is left out."
    if source.run_dir is None:
        yield "Made from a checkpoint file outside a run directory: environment and results are not known."
    elif not findings.environment:
        yield "The run directory holds no environment.json: the versions that trained it are not known."
    if "h" in source.spaces and not sigma and format != "onnx":
        yield (
            "The file holds the backbone alone. This run's representation is the mean that the h head makes of its "
            "features; `fastssl export --sigma` (safetensors or onnx) keeps that head."
        )
    if sigma:
        yield "sigma was learned by the objective and its prior; how well it is calibrated is for an evaluation to say."
    if format == "timm":
        yield (
            "timm's own settings of this name (`resolve_data_config`) are those of other weights: take the input from "
            "this card."
        )
    yield "No licence is stated: whoever publishes this file states one."


def count_parameters(*modules: nn.Module) -> int:
    return sum(parameter.numel() for module in modules for parameter in module.parameters())


def table(rows: Iterable[tuple], head: tuple[str, ...] = ("", "")) -> str:
    lines = [head, ("---",) * len(head), *rows]
    return "\n".join("| " + " | ".join(plain(cell) for cell in line) + " |" for line in lines)


def plain(value: object) -> str:
    """One line that cannot leave its table cell, nor bring HTML in."""
    text = " ".join(str(value).split())
    return text.replace("|", "\\|").replace("<", "&lt;")
