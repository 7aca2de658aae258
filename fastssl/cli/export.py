"""`fastssl export`: write a trained model for others."""

from pathlib import Path
from typing import Annotated, Literal

from typer import Argument, Option


def export(
    run: Annotated[Path, Argument(metavar="RUN", help="Run directory or checkpoint.")],
    format: Annotated[
        Literal["timm", "safetensors", "onnx"],
        Option(help="timm: for timm.create_model; safetensors: for fastssl; onnx: for any ONNX runtime."),
    ],
    out: Annotated[
        Path | None, Option(metavar="FILE", help="File to write.", show_default="RUN/export/FORMAT/NAME")
    ] = None,
    sigma: Annotated[
        bool, Option("--sigma", help="Include the heads of mu and sigma; for safetensors and onnx.")
    ] = False,
) -> None:
    """Write the encoder as one file for other programs, with a model card.

    Examples:
      fastssl export runs/demo --format timm
      fastssl export runs/demo --format onnx --sigma --out encoder.onnx
    """
    from fastssl.common.terminal import printable
    from fastssl.export import export_run

    exported = export_run(run, format, out, sigma)
    size = exported.path.stat().st_size / 1e6
    print(printable(f"{exported.path} holds {size:,.1f} MB; {exported.card} describes it."))
    print(printable(f"Load it with: {exported.load_with}"))
    if exported.difference is not None:
        print(f"On random images, onnxruntime differs from torch by {exported.difference:.1e} at most.")
    elif format == "onnx":
        print("Not checked against torch, as onnxruntime is missing: pip install 'onnxruntime'.")
