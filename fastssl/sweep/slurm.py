"""Runs on a SLURM cluster, through submitit: one array, whose jobs have one GPU each and take several runs on it."""

import getpass
import json
import shutil
import signal
import subprocess
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from fastssl.common.errors import UserError
from fastssl.common.files import write_atomically
from fastssl.sweep.grid import JOBS_FOLDER, Run, Sweep
from fastssl.sweep.local import GRACE, Task, run_here, tasks_of
from fastssl.sweep.table import SweepDisplay

if TYPE_CHECKING:
    import submitit  # an extra: imported where it is needed

REQUEUES = 1000  # times that a job may reach its time limit; submitit's own limit is 3
SIGNAL_DELAY = GRACE + 60  # seconds between the requeue signal and the end of a job at its time limit
PREEMPTION = 600  # seconds that a job, asked to end, waits to be requeued or killed


@dataclass
class Pack:
    """What one job does: runs, `per_gpu` at a time. submitit pickles it, and calls it where SLURM starts the job."""

    name: str
    runs: list[Run]
    per_gpu: int
    retries: int

    def __call__(self) -> None:
        import submitit

        requeue_signal = getattr(signal, f"SIG{submitit.JobEnvironment().USR_SIG}")
        requeue = signal.getsignal(requeue_signal)  # submitit's handler: puts the job back into the queue and exits
        tasks = tasks_of(self.runs)
        with SweepDisplay(self.name, tasks) as display:
            signals = run_here(
                tasks, display, per_gpu=self.per_gpu, retries=self.retries, stop_on=(signal.SIGTERM, requeue_signal)
            )
        if requeue_signal in signals:
            requeue(requeue_signal, None)
        if signals:  # SIGTERM announces preemption: the requeue signal follows, or SLURM kills and requeues by itself
            time.sleep(PREEMPTION)
        left = [task.run.name for task in tasks if task.state != "finished"]
        if left:
            raise RuntimeError(f"{len(left)} of {len(tasks)} runs are not finished: {', '.join(left)}")

    def checkpoint(self) -> "submitit.helpers.DelayedSubmission":
        """What submitit puts back into the queue: the same again, since finished runs are known by their files."""
        import submitit

        return submitit.helpers.DelayedSubmission(self)


@dataclass
class Submission:
    tasks: list[Task]
    queued: dict[str, str]  # the job id of each run that SLURM has already
    submitted: dict[str, str]  # and of each that it has now


def submit(
    sweep: Sweep,
    runs: list[Run],
    *,
    per_gpu: int = 1,
    retries: int = 2,
    parallel: int = 8,
    cpus: int = 8,
    minutes: int = 1440,
    partition: str | None = None,
) -> Submission:
    """Submit the runs that are neither finished nor in SLURM's queue, `per_gpu` a job.

    parallel: jobs at a time. cpus: of each job. minutes: after them a job is requeued, and its runs go on from their
    checkpoints. Raises UserError where there is no SLURM, or where it refuses.
    """
    tasks = tasks_of(runs)
    folder = (sweep.folder / JOBS_FOLDER).absolute()
    jobs_file = folder / "jobs.json"
    jobs = json.loads(jobs_file.read_text()) if jobs_file.exists() else {}
    in_queue = ids_in_queue()
    unfinished = [task.run for task in tasks if task.state == "waiting"]
    queued = {run.name: jobs[run.name] for run in unfinished if jobs.get(run.name) in in_queue}
    missing = [run for run in unfinished if run.name not in queued]
    submitted = {}
    if missing:
        packs = [Pack(sweep.name, missing[i : i + per_gpu], per_gpu, retries) for i in range(0, len(missing), per_gpu)]
        needs_gpu = any(run.recipe.train.device != "cpu" for run in missing)
        executor = make_executor(folder, sweep.name, parallel, cpus, minutes, partition, gpus=int(needs_gpu))
        for pack, job_id in zip(packs, submit_packs(executor, packs)):
            submitted |= {run.name: job_id for run in pack.runs}
        text = json.dumps({**queued, **submitted}, indent=2) + "\n"
        write_atomically(jobs_file, lambda path: path.write_text(text))
    return Submission(tasks, queued, submitted)


def make_executor(
    folder: Path, name: str, parallel: int, cpus: int, minutes: int, partition: str | None, gpus: int
) -> "submitit.AutoExecutor":
    try:
        import submitit
    except ModuleNotFoundError:
        raise UserError("--executor slurm needs submitit: pip install submitit, or use --executor local.") from None
    executor = submitit.AutoExecutor(folder / "%j", cluster="slurm", slurm_max_num_timeout=REQUEUES)
    executor.update_parameters(
        name=name,
        timeout_min=minutes,
        cpus_per_task=cpus,
        gpus_per_node=gpus or None,  # a cluster without GPUs refuses even 0
        slurm_partition=partition,
        slurm_array_parallelism=parallel,
        slurm_signal_delay_s=SIGNAL_DELAY,
    )
    return executor


def submit_packs(executor: "submitit.AutoExecutor", packs: list[Pack]) -> list[str]:
    """The job ids, in the packs' order."""
    import submitit

    try:
        with executor.batch():
            jobs = [executor.submit(pack) for pack in packs]
        return [job.job_id for job in jobs]
    except (submitit.core.utils.FailedJobError, submitit.core.utils.FailedSubmissionError) as error:
        reason = [line.strip() for line in str(error).splitlines() if line.strip()][-1]
        raise UserError(f"SLURM refused the jobs: {reason}") from None


def ids_in_queue() -> set[str]:
    """The ids of this user's jobs that wait or run, such as 17_3."""
    if not shutil.which("squeue") or not shutil.which("srun"):
        raise UserError("There is no SLURM here (no srun and squeue): use --executor local, or log in to the cluster.")
    command = ["squeue", "--noheader", "--array", f"--user={getpass.getuser()}", "--format=%i"]
    answer = subprocess.run(command, capture_output=True, text=True)
    if answer.returncode:
        raise UserError(f"squeue does not answer ({answer.stderr.strip()}): try again when SLURM is up.")
    return set(answer.stdout.split())


def in_minutes(text: str) -> int:
    """A time limit, in minutes (90) or hours and minutes (24:00)."""
    hours, colon, minutes = text.rpartition(":")
    if not minutes.isdecimal() or (colon and not hours.isdecimal()) or int(hours or 0) * 60 + int(minutes) == 0:
        raise UserError(f"--time-limit {text} is no time: write minutes, such as 90, or HH:MM, such as 24:00.")
    return int(hours or 0) * 60 + int(minutes)
