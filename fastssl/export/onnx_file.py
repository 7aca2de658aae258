"""The ONNX file: clean views to h, or to h, mu and sigma, at any batch size; checked against torch."""

import warnings
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from fastssl.common.errors import UserError
from fastssl.export.source import Source
from fastssl.models import Model

LARGEST = 2**31 - 1  # bytes: protobuf's limit for one file
TOLERANCE = 1e-4  # between onnxruntime and torch, as a share of the largest output (of 1, where all are smaller)
BATCHES_CHECKED = (1, 3)  # the graph is traced with 2


def output_names(sigma: bool) -> list[str]:
    return ["h", "mu", "sigma"] if sigma else ["h"]


class Embed(nn.Module):
    """The model's `embed` as a tuple: images (B, 3, size, size) to h (B, D), and with sigma mu and sigma (B, E)."""

    def __init__(self, model: Model, sigma: bool):
        super().__init__()
        self.model, self.sigma = model, sigma

    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        embedding = self.model.embed(images)
        return (embedding.h, embedding.mu, embedding.sigma) if self.sigma else (embedding.h,)


def require_onnx() -> None:
    """Raises UserError where a package lacks that makes ONNX files."""
    try:
        import onnx  # noqa: F401
        import onnxscript  # noqa: F401
    except ImportError as error:
        raise UserError(
            f"--format onnx needs the package {error.name}: pip install 'onnx' 'onnxscript' (and 'onnxruntime', "
            "with which the file is checked)."
        ) from None


def write_onnx(path: Path, source: Source, sigma: bool) -> float | None:
    """Write the file and run it. Returns the largest difference from torch; None where onnxruntime is missing.

    Raises UserError where the backbone has an operation that ONNX lacks, or the file does not do as torch does.
    """
    model, size, backbone = source.model, source.recipe.views.size, source.recipe.model.backbone
    parts = [model.encoder]
    if sigma:
        parts += [model.heads, model.projector] if source.spaces == "z" else [model.heads]
    if sum(weight.nbytes for part in parts for weight in part.parameters()) > LARGEST:
        raise UserError(f"{backbone} is larger than the 2 GB of an ONNX file: use --format safetensors.")
    embed = Embed(model, sigma).eval()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of torch.export about its own workings; the check below says what counts
        try:
            program = torch.onnx.export(
                embed,
                (torch.zeros(2, 3, size, size),),
                input_names=["images"],
                output_names=output_names(sigma),
                dynamic_shapes={"images": {0: torch.export.Dim("batch")}},
                dynamo=True,
                verbose=False,
            )
        except torch.onnx.OnnxExporterError as error:
            reason = " ".join(str(error.__cause__ or error).split())[:100]
            raise UserError(
                f"torch cannot write {backbone} as ONNX ({reason} ...): use --format timm or safetensors."
            ) from None
    for node in program.model.graph.all_nodes():
        node.metadata_props.clear()  # stack traces, with the paths of this machine
    program.model.metadata_props.update({**source.header, "outputs": " ".join(output_names(sigma))})
    program.save(path, external_data=False)
    return largest_difference(path, embed, size)


def largest_difference(path: Path, embed: Embed, size: int) -> float | None:
    """Between onnxruntime and torch on normal random images, over all outputs. Raises UserError above the tolerance."""
    try:
        import onnxruntime
    except ImportError:
        return None
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    generator, largest = torch.Generator().manual_seed(0), 0.0
    for batch in BATCHES_CHECKED:
        images = torch.randn(batch, 3, size, size, generator=generator)
        for expected, found in zip(embed(images), session.run(None, {"images": images.numpy()})):
            difference = float(np.abs(found - expected.numpy()).max())
            if not difference <= TOLERANCE * max(1.0, float(expected.abs().max())):
                raise UserError(
                    f"The ONNX file differs from torch by {difference:.2g}, so it was not kept: "
                    "use --format timm or safetensors."
                )
            largest = max(largest, difference)
    return largest
