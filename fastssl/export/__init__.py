"""A trained run as one file for other programs (timm, safetensors or ONNX), with a model card.

`run.py` reads top to bottom: read the run (`source.py`), write the file (`models/exported.py`, `onnx_file.py`) and the
card next to it (`card.py`).
"""

from fastssl.export.run import Exported, export_run

__all__ = ["Exported", "export_run"]
