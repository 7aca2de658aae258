"""Many runs from one file: `grid.py` expands it, `local.py` runs them here, `slurm.py` on a cluster."""

from .command import run_locally, submit_to_slurm
from .forecast import dry_run
from .grid import expand, load_sweep
from .slurm import in_minutes

__all__ = ["dry_run", "expand", "in_minutes", "load_sweep", "run_locally", "submit_to_slurm"]
