"""Many runs from one file: `grid.py` expands it, `local.py` runs them here, `slurm.py` on a cluster."""

from .command import run_sweep
from .grid import expand, load_sweep

__all__ = ["expand", "load_sweep", "run_sweep"]
