"""Job arrays on a SLURM cluster, submitted with submitit: what the sweeps and the builds of shards have in common."""

import getpass
import shutil
import subprocess
from collections.abc import Callable, Sequence
from pathlib import Path

from pydantic import TypeAdapter, ValidationError

from fastssl.common.errors import UserError
from fastssl.common.files import LARGEST_TEXT, read_bytes

REQUEUES = 1000  # how often a job may reach its time limit; submitit's default is 3


def read_jobs(path: Path) -> dict[str, str]:
    """Return the ids of the jobs that were submitted last, by the name of what each of them does."""
    if not path.exists():
        return {}
    try:
        return TypeAdapter(dict[str, str]).validate_json(read_bytes(path, LARGEST_TEXT))
    except (OSError, ValidationError):
        raise UserError(
            f"{path} cannot be read, so it is not known what is in SLURM's queue", hint="remove it when none is"
        ) from None


def submit_array(folder: Path, jobs: Sequence[Callable[[], object]], **parameters: object) -> list[str]:
    """Submit the jobs, which submitit pickles, as one array with its `parameters`. Returns their ids, in order."""
    try:
        import submitit
    except ModuleNotFoundError:
        raise UserError(
            "--executor slurm needs the package submitit", hint="run `pip install submitit`, or use --executor local"
        ) from None
    executor = submitit.AutoExecutor(folder / "%j", cluster="slurm", slurm_max_num_timeout=REQUEUES)
    executor.update_parameters(**parameters)
    try:
        with executor.batch():
            handles = [executor.submit(job) for job in jobs]
        return [handle.job_id for handle in handles]
    except (submitit.core.utils.FailedJobError, submitit.core.utils.FailedSubmissionError) as error:
        reason = [line.strip() for line in str(error).splitlines() if line.strip()][-1]
        raise UserError(
            f"SLURM refused the jobs ({reason})", hint="change --partition, --cpus or --time-limit"
        ) from None


def ids_in_queue() -> set[str]:
    """Return the ids of this user's waiting and running jobs, such as 17_3."""
    if not shutil.which("squeue") or not shutil.which("srun"):
        raise UserError(
            "There is no SLURM here (no srun and squeue)", hint="use --executor local, or log in to the cluster"
        )
    command = ["squeue", "--noheader", "--array", f"--user={getpass.getuser()}", "--format=%i"]
    answer = subprocess.run(command, capture_output=True, text=True)
    if answer.returncode:
        raise UserError(f"squeue does not answer ({answer.stderr.strip()})", hint="try again when SLURM is up")
    return set(answer.stdout.split())


def parse_time_limit(text: str) -> int:
    """Return the minutes of a time limit such as 90 (minutes) or 24:00 (hours and minutes)."""
    hours, colon, minutes = text.rpartition(":")
    if not minutes.isdecimal() or (colon and not hours.isdecimal()) or int(hours or 0) * 60 + int(minutes) == 0:
        raise UserError(f"--time-limit {text} is not a time", hint="write minutes, such as 90, or HH:MM, such as 24:00")
    return int(hours or 0) * 60 + int(minutes)
