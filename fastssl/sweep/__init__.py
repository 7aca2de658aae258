"""Many runs from one file: `grid.py` expands it, `local.py` runs them here, `slurm.py` on a cluster."""

from fastssl.sweep.estimate import dry_run
from fastssl.sweep.grid import expand, load_sweep
from fastssl.sweep.run import run_locally, submit_to_slurm
from fastssl.sweep.slurm import in_minutes

__all__ = ["dry_run", "expand", "in_minutes", "load_sweep", "run_locally", "submit_to_slurm"]
