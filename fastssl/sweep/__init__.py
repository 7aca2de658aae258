"""Many runs from one file.

`grid.py` expands the file into runs, `progress.py` reads the state of a run from its directory, `local.py` trains runs
on this machine with one process per run (`child.py`), `slurm.py` submits them to a cluster, `estimate.py` predicts
hours, `table.py` prints progress and results.
"""

from fastssl.sweep.estimate import dry_run
from fastssl.sweep.grid import expand, load_sweep
from fastssl.sweep.local import run_locally
from fastssl.sweep.slurm import submit_to_slurm

__all__ = ["dry_run", "expand", "load_sweep", "run_locally", "submit_to_slurm"]
