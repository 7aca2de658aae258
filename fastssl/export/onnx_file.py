"""The ONNX file: images to h, or to h, mu and sigma, at any batch size; compared with torch after it is written."""

import warnings
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from fastssl.common.errors import UserError
from fastssl.export.source import Source
from fastssl.models import Model, SSLModel

LARGEST = 2**31 - 1  # bytes: protobuf's limit for one file
TOLERANCE = 1e-4  # between onnxruntime and torch, relative to the largest output (absolute if that is below 1)
BATCHES_CHECKED = (1, 3)  # batch sizes; the graph is traced with 2


class EmbedTuple(nn.Module):
    """The model's `embed` with a tuple as its result, as ONNX needs it.

    Images (B, C, size, size) to h (B, D), and with `sigma` to mu and sigma (B, E).
    """

    def __init__(self, model: Model, sigma: bool):
        super().__init__()
        self.model = model
        self.output_names = ["h", "mu", "sigma"] if sigma else ["h"]

    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        embedding = self.model.embed(images)
        return tuple(getattr(embedding, name) for name in self.output_names)


def require_onnx() -> None:
    """Raise UserError if a package is missing that writes ONNX files."""
    try:
        import onnx  # noqa: F401
        import onnxscript  # noqa: F401
    except ImportError as error:
        raise UserError(
            f"--format onnx needs the package {error.name}",
            hint="run `pip install onnx onnxscript` (and onnxruntime, to check the file)",
        ) from None


def write_onnx(path: Path, source: Source, sigma: bool) -> float | None:
    """Write the file and run it. Returns the largest difference from torch; None if onnxruntime is missing.

    Raises UserError if the backbone has an operation that ONNX lacks, or if the file's outputs differ from torch's.
    """
    model, backbone = source.model, source.recipe.model.backbone
    shape = (source.recipe.model.in_chans, source.recipe.views.size, source.recipe.views.size)
    parts: list[nn.Module] = [model.encoder]
    if sigma:
        parts.append(model.heads)
    if sigma and source.spaces == "z" and isinstance(model, SSLModel):
        parts.append(model.projector)
    if sum(weight.nbytes for part in parts for weight in part.parameters()) > LARGEST:
        raise UserError(f"{backbone} is larger than the 2 GB of an ONNX file", hint="use --format safetensors")
    embed = EmbedTuple(model, sigma).eval()
    with warnings.catch_warnings():
        # torch.export warns about its own internals. The comparison below shows whether the file is right.
        warnings.simplefilter("ignore")
        try:
            program = torch.onnx.export(
                embed, (torch.zeros(2, *shape),), input_names=["images"], output_names=embed.output_names,
                dynamic_shapes={"images": {0: torch.export.Dim("batch")}}, dynamo=True, verbose=False,
            )  # fmt: skip
        except torch.onnx.OnnxExporterError as error:
            reason = " ".join(str(error.__cause__ or error).split())[:100]
            raise UserError(
                f"torch cannot write {backbone} as ONNX ({reason} ...)", hint="use --format timm or safetensors"
            ) from None
    assert program is not None  # only other options give None
    for node in program.model.graph.all_nodes():
        node.metadata_props.clear()  # stack traces, which hold paths of this machine
    program.model.metadata_props.update({**source.header, "outputs": " ".join(embed.output_names)})
    program.save(path, external_data=False)
    return compare_with_torch(path, embed, shape)


def compare_with_torch(path: Path, embed: EmbedTuple, shape: tuple[int, int, int]) -> float | None:
    """The largest difference between onnxruntime and torch over all outputs, on random images; None: no onnxruntime.

    Raises UserError above TOLERANCE.
    """
    try:
        import onnxruntime
    except ImportError:
        return None
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    generator = torch.Generator().manual_seed(0)
    largest = 0.0
    for batch in BATCHES_CHECKED:
        images = torch.randn(batch, *shape, generator=generator)
        for expected, found in zip(embed(images), session.run(None, {"images": images.numpy()})):
            difference = float(np.abs(found - expected.numpy()).max())
            # Written so that NaN is refused too.
            if not difference <= TOLERANCE * max(1.0, float(expected.abs().max())):
                raise UserError(
                    f"The ONNX file differs from torch by {difference:.2g}, so it was deleted",
                    hint="use --format timm or safetensors",
                )
            largest = max(largest, difference)
    return largest
