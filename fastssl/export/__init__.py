"""A trained run as files for others: timm, safetensors or ONNX, with a model card.

`command.py` reads top to bottom: open the run (`source.py`), write the file (`models/exported.py`, `onnx_file.py`) and
the card beside it (`card.py`, from what `findings.py` finds in the run directory).
"""

from fastssl.export.run import Exported, export_run

__all__ = ["Exported", "export_run"]
