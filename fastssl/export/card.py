"""model_card.md: what a run tells about its model, and what it does not tell. Every value comes from the run."""

import html
import json
import re
from collections.abc import Iterator
from urllib.parse import quote

from huggingface_hub import ModelCard, ModelCardData
from torch import nn

from fastssl.common.geometry import CENTER
from fastssl.common.terminal import printable
from fastssl.export.card_results import card_legend, card_rows
from fastssl.export.source import Environment, Source
from fastssl.models.classifier import Classifier
from fastssl.models.encoder import has_fixed_size
from fastssl.models.exported import short_path, without_folders
from fastssl.models.gaussian import GaussianHead
from fastssl.recipe import Recipe

CARD = "model_card.md"
LIBRARY = {"timm": "timm", "safetensors": "fastssl", "onnx": "onnx"}
OBJECTIVES = {
    "barlow_twins": "Barlow Twins", "vicreg": "VICReg", "simclr": "SimCLR", "byol": "BYOL",
    "sigreg": "LeJEPA (SIGReg)", "visreg": "VISReg", "supervised": "cross-entropy",
}  # fmt: skip
UNKNOWN = "not recorded in the run"


def model_card(source: Source, file: str, format: str, sigma: bool, eval_folder: str | None = None) -> ModelCard:
    """Describe the exported file, as Hugging Face expects it. The license is left to the person who publishes.

    Args:
        file: name of the exported file, which is in the folder of the card.
        sigma: whether the file gives mu and sigma too.
        eval_folder: relative path from the card to RUN/eval/; None: the card is outside the run directory.
    """
    recipe, model, views = source.recipe, source.model, source.recipe.views
    objective = recipe.objective.name
    supervised = recipe.objective.needs_labels
    tags = ["image-feature-extraction", "fastssl"]
    tags += ["supervised-learning"] if supervised else ["self-supervised-learning", objective]
    tags += ["uncertainty"] if sigma else []
    tags += [LIBRARY[format]]
    data = ModelCardData(library_name=LIBRARY[format], pipeline_tag="image-feature-extraction", tags=tags)
    area = "the whole image, whatever its aspect ratio"
    if views.eval == "center":
        area = f"the central square of {CENTER} of the shorter side"
    epochs = "unknown number" if source.epochs_done is None else source.epochs_done
    rate, batch_size = recipe.optim.lr, recipe.train.batch_size
    environment = source.environment or Environment()
    packages = environment.packages
    known_limits = "\n".join(f"- {limit}" for limit in limits(source, format, sigma))
    return ModelCard(f"""\
---
{data.to_yaml()}
---

# {escape(recipe.name)}

A {recipe.model.backbone} image encoder that was trained {"with" if supervised else "without"} labels \
({OBJECTIVES[objective]}) and exported by fastssl. {code(file)} gives {describe_outputs(source, format, sigma)}.

## Use

{code_block(example_code(source, file, format, sigma), "python")}

## Input

| | |
|---|---|
| image | {kind_of_image(recipe)}; `views.eval: {views.eval}`: {area}, resized to a square |
| size | {views.size} x {views.size}, bilinear, antialiased where it shrinks |
| range | [0, 1], then minus mean, divided by std |
| mean | {list(views.mean)} |
| std | {list(views.std)} |

## Model

| | |
|---|---|
| backbone | {recipe.model.backbone} (timm) |
| stem | {"3x3 convolution, no max-pool" if recipe.model.stem == "small" else "as in timm"} |
| width of h | {model.encoder.num_features} |
| parameters of the backbone | {count_parameters(model.encoder):,} |
| stochastic | {" and ".join(source.spaces) or "no"} |
{sigma_rows(source) if sigma else ""}
## Training

| | |
|---|---|
| images | {UNKNOWN if source.train_images is None else f"{source.train_images:,}"} |
| epochs | {epochs} of {recipe.train.epochs} |
| steps | {source.step:,} |
| batch size | {batch_size} |
| peak learning rate | {rate * batch_size / 256:.4g} ({rate:g} at batch size 256) |

The recipe, with shortened paths:

{code_block(without_folders(recipe).to_yaml(), "yaml")}

## Results

{results_section(source, eval_folder)}

## Made with

| | |
|---|---|
| fastssl | {escape(packages.get("fastssl-trainer") or UNKNOWN)} |
| torch | {escape(packages.get("torch") or UNKNOWN)} |
| timm | {escape(packages.get("timm") or UNKNOWN)} |
| git state | {escape(environment.git or UNKNOWN)} |
| device | {escape(environment.device or UNKNOWN)} |
| checkpoint | {escape(source.checkpoint.name)} |
| sha256 of the checkpoint | {source.checkpoint_sha256} |

## Known limits

{known_limits}
""")


def kind_of_image(recipe: Recipe) -> str:
    """What the encoder takes, for a sentence."""
    channels = recipe.model.in_chans
    return {1: "gray, one channel", 3: "RGB"}.get(channels, f"{channels} channels")


def describe_outputs(source: Source, format: str, sigma: bool) -> str:
    if "h" not in source.spaces:
        h = "the representation h"
    elif format == "onnx" or sigma:
        h = "the representation h, the mean of a Gaussian"
    else:
        h = "the encoder's features, from which this run's h head computes the representation h"
    return h + (f", and mu and sigma of the stochastic embedding {source.spaces[0]}" if sigma else "")


def example_code(source: Source, file: str, format: str, sigma: bool) -> str:
    """A program that embeds one image with the exported file. Its evaluation transform needs only Pillow and numpy."""
    views, channels = source.recipe.views, source.recipe.model.in_chans
    file_embedded = "photo.jpg" if channels in (1, 3) else "image.npy"
    crop = box = ""
    if views.eval == "center":
        box = ", box=box"
        crop = f"""\
    side = {CENTER} * min(image.size)
    left, top = (image.width - side) / 2, (image.height - side) / 2
    box = left, top, left + side, top + side
"""
    area = "image's center" if crop else "whole image"
    resize = f"resize(({views.size}, {views.size}), Image.BILINEAR{box})"
    if channels in (1, 3):
        mode, each = ("RGB", "") if channels == 3 else ("L", "[..., None]")
        read = f'    image = ImageOps.exif_transpose(Image.open(path)).convert("{mode}")'
        pixels = f"pixels = np.asarray(image.{resize}, np.float32){each} / 255"
    else:
        read = f"""\
    bands = [Image.fromarray(band) for band in np.load(path)]  # uint8 ({channels}, H, W)
    image = bands[0]"""
        pixels = f"pixels = np.stack([np.float32(band.{resize}) for band in bands], 2) / 255"
    load = loading_code(source, file, format, sigma)
    if format == "onnx":
        imports = "import onnxruntime"
        outputs = "h, mu, sigma" if sigma else "(h,)"
        use = f'session = {load}\n{outputs} = session.run(None, {{"images": preprocess("{file_embedded}")}})'
    else:
        imports = f"import {LIBRARY[format]}\nimport torch"
        use = f'images = torch.from_numpy(preprocess("{file_embedded}"))\n'
        if sigma:
            use += f"model = {load}\nh, mu, sigma, space = model.embed(images)"
        else:
            use += f"encoder = {load}\nwith torch.inference_mode():\n    h = encoder(images)"
    return f'''\
import numpy as np
{imports}
from PIL import Image, ImageOps

MEAN, STD = np.float32({list(views.mean)}), np.float32({list(views.std)})


def preprocess(path):
    """The {area} as a square, normalized: (1, {channels}, {views.size}, {views.size}) float32."""
{read}
{crop}    {pixels}
    return ((pixels - MEAN) / STD).transpose(2, 0, 1)[None]


{use}'''


def loading_code(source: Source, file: str, format: str, sigma: bool) -> str:
    """A Python expression that loads the file."""
    name = printable(json.dumps(file, ensure_ascii=False))  # its escapes are those of Python
    if format == "timm":
        backbone = source.recipe.model.backbone
        # Position embeddings must fit the image size.
        size = f", img_size={source.recipe.views.size}" if has_fixed_size(backbone) else ""
        channels = source.recipe.model.in_chans
        size += f", in_chans={channels}" if channels != 3 else ""
        return f'timm.create_model("{backbone}", num_classes=0{size}, checkpoint_path={name}).eval()'
    if format == "onnx":
        return f"onnxruntime.InferenceSession({name})"
    return f"fastssl.load_model({name})" if sigma else f"fastssl.load_encoder({name})"


def sigma_rows(source: Source) -> str:
    """Table rows about what gives mu and sigma."""
    model = source.model
    head = model.heads[source.spaces[0]]  # that of h where both h and z are stochastic, as in the model's `embed`
    assert isinstance(head, GaussianHead)
    name = "classifier" if isinstance(model, Classifier) else "projector"
    count = count_parameters(model.get_submodule(name), model.heads)
    return f"| width of mu and sigma | {head.mu.out_features} |\n| parameters of {name} and heads | {count:,} |\n"


def results_section(source: Source, eval_folder: str | None) -> str:
    """The results in RUN/eval/, with links to their files if the card is in the run directory."""
    parts = []
    if source.results:
        lines = [
            "| evaluation | metric | value (95 % interval) | remark | measured on | file |",
            "|---|---|---|---|---|---|",
        ]
        for result in source.results:
            data = [short_path(result.data)] if result.data else []
            images = [f"{result.images:,} images"] if result.images else []
            file = escape(f"eval/{result.file}")
            if eval_folder is not None:
                file = f"[{escape(result.file)}]({quote(f'{eval_folder}/{result.file}')})"
            for row in card_rows(result):
                cells = [result.name, row.metric, row.value, row.remark, ", ".join(data + images)]
                lines.append(f"| {' | '.join(map(escape, cells))} | {file} |")
        parts.append("\n".join(lines))
        if legend := card_legend(source.results):
            parts.append(escape(legend))
    if source.probe:
        metrics = [f"{escape(key)} {value:.3g}" for key, value in source.probe.items() if key not in ("step", "epoch")]
        parts.append(f"The last probe during training, at step {source.probe['step']:.0f}: {', '.join(metrics)}.")
    return "\n\n".join(parts) or "The run holds no results."


def limits(source: Source, format: str, sigma: bool) -> Iterator[str]:
    """What a reader might take for granted and should not."""
    epochs = source.recipe.train.epochs
    if source.epochs_done is None:
        yield "The checkpoint does not tell how many epochs were trained."
    elif source.epochs_done < epochs:
        done = f"{source.epochs_done} of {epochs} epochs were done, at step {source.step:,}"
        yield f"Exported from an unfinished run: {done}."
    if not source.results:
        yield "No accuracy was measured on these weights" + (" except by the probe." if source.probe else ".")
    for file in source.stale:
        yield f"{code(file)} was measured on other weights of this run and is left out."
    for file in source.damaged:
        yield f"{code(file)} could not be read and is left out."
    if source.run_dir is None:
        yield "Made from a checkpoint file outside a run directory: environment and results are not known."
    elif source.environment is None:
        yield "The run directory holds no environment.json: the versions that trained it are not known."
    if "h" in source.spaces and not sigma and format != "onnx":
        yield (
            "The file holds the backbone alone. This run's representation is the mean that the h head computes from "
            "its features; `fastssl export --sigma` (safetensors or onnx) includes that head."
        )
    if sigma:
        yield "sigma was learned by the objective and its prior; an evaluation has to show how well it is calibrated."
    if format == "timm":
        yield (
            "timm's own settings for this name (`resolve_data_config`) belong to other weights: use the input settings "
            "of this card."
        )
    yield "No license is stated: the person who publishes this file states one."


def count_parameters(*modules: nn.Module) -> int:
    return sum(parameter.numel() for module in modules for parameter in module.parameters())


def escape(value: object) -> str:
    """The value as one line of Markdown that shows it as it is: no formatting, no link, no HTML, no second cell."""
    text = html.escape(printable(" ".join(str(value).split())), quote=False)
    # An underscore within a word, as in zprob_barlow, is no formatting.
    return re.sub(r"[\\`*\[\]|~$]|(?<![^\W_])_|_(?![^\W_])", r"\\\g<0>", text)


def code(value: object) -> str:
    """The value as code within a line."""
    text = printable(" ".join(str(value).split()))
    fence = _fence(text, 1)
    return f"{fence} {text} {fence}" if "`" in text else f"{fence}{text}{fence}"


def code_block(text: str, language: str) -> str:
    fence = _fence(text, 3)
    return f"{fence}{language}\n{text.rstrip()}\n{fence}"


def _fence(text: str, least: int) -> str:
    """More backticks than the text has in a row."""
    return "`" * max([least, *(len(run) + 1 for run in re.findall("`+", text))])
