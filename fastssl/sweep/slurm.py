"""Runs on a SLURM cluster through submitit: one job array, whose jobs train several runs on one GPU each."""

import json
import signal
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING

from fastssl.common.files import write_atomically
from fastssl.common.slurm import ids_in_queue, read_jobs, submit_array
from fastssl.common.terminal import console, print_line
from fastssl.sweep.grid import JOBS_FOLDER, Sweep, SweepRun
from fastssl.sweep.local import GRACE, run_tasks
from fastssl.sweep.progress import images_per_epoch, last_log_line, log_path, make_tasks
from fastssl.sweep.table import SweepDisplay, results_table

if TYPE_CHECKING:
    import submitit  # an optional dependency: imported where it is used

SIGNAL_DELAY = GRACE + 60  # seconds between the requeue signal and the end of a job at its time limit
PREEMPTION = 600  # seconds that a preempted job waits to be requeued or killed


@dataclass
class SlurmJob:
    """One job: some runs, `per_gpu` of them in parallel. submitit pickles it and calls it on the node."""

    name: str
    runs: list[SweepRun]
    per_gpu: int
    retries: int

    def __call__(self) -> None:
        import submitit

        requeue_signal = getattr(signal, f"SIG{submitit.JobEnvironment().USR_SIG}")
        requeue = signal.getsignal(requeue_signal)  # submitit's handler: puts the job back into the queue and exits
        tasks = make_tasks(self.runs)
        with SweepDisplay(self.name, tasks) as display:
            stop_on = (signal.SIGTERM, requeue_signal)
            signals = run_tasks(tasks, display, per_gpu=self.per_gpu, retries=self.retries, stop_on=stop_on)
        if requeue_signal in signals and callable(requeue):
            requeue(requeue_signal, None)
        if signals:
            # SIGTERM announces preemption. The requeue signal follows, or SLURM kills and requeues the job by itself.
            time.sleep(PREEMPTION)
        left = [task.run.name for task in tasks if task.state != "finished"]
        if left:
            raise RuntimeError(f"{len(left)} of {len(tasks)} runs are not finished: {', '.join(left)}")

    def checkpoint(self) -> "submitit.helpers.DelayedSubmission":
        """What submitit puts back into the queue: the same job, as finished runs are known by their files."""
        import submitit

        return submitit.helpers.DelayedSubmission(self)


def submit_to_slurm(
    sweep: Sweep,
    runs: list[SweepRun],
    *,
    per_gpu: int = 1,
    retries: int = 2,
    parallel: int = 8,
    cpus: int = 8,
    minutes: int = 1440,
    partition: str | None = None,
) -> int:
    """Submit the runs that are neither finished nor in SLURM's queue, and print the state of the sweep.

    Args:
        per_gpu: number of runs in a job.
        retries: how often a run that crashed is resumed within its job.
        parallel: number of jobs at the same time.
        cpus: cores per job.
        minutes: time limit of a job. It is then requeued, and its runs resume from their checkpoints.

    Returns the exit code, 0. Raises UserError where there is no SLURM, where SLURM refuses the jobs, or where a run's
    data is missing.
    """
    for run in runs:
        images_per_epoch(run.recipe)  # reports a missing file now, rather than in every job
    sweep.make_folder()
    tasks = make_tasks(runs)
    folder = (sweep.folder / JOBS_FOLDER).absolute()
    jobs_file = folder / "jobs.json"
    last_ids = read_jobs(jobs_file)
    in_queue = ids_in_queue()
    waiting = [task.run for task in tasks if task.state == "waiting"]
    queued = {run.name: last_ids[run.name] for run in waiting if last_ids.get(run.name) in in_queue}
    missing = [run for run in waiting if run.name not in queued]
    submitted: dict[str, str] = {}
    if missing:
        chunks = (missing[first : first + per_gpu] for first in range(0, len(missing), per_gpu))
        jobs = [SlurmJob(sweep.name, chunk, per_gpu, retries) for chunk in chunks]
        job_ids = submit_array(
            folder,
            jobs,
            name=sweep.name,
            timeout_min=minutes,
            cpus_per_task=cpus,
            # None where no run needs a GPU: a cluster without GPUs refuses even 0.
            gpus_per_node=1 if any(run.recipe.train.device != "cpu" for run in missing) else None,
            slurm_partition=partition,
            slurm_array_parallelism=parallel,
            slurm_signal_delay_s=SIGNAL_DELAY,
        )
        for job, job_id in zip(jobs, job_ids):
            submitted |= {run.name: job_id for run in job.runs}
        write_atomically(jobs_file, json.dumps({**queued, **submitted}, indent=2) + "\n")

    console().print(results_table(runs))
    finished = sum(task.state == "finished" for task in tasks)
    print(
        f"{finished} of {len(runs)} runs are finished, {len(queued)} were queued or running already, "
        f"{len(submitted)} are submitted now."
    )
    for run in missing:
        previous = f"  (its previous job ended with: {last_log_line(run)})" if log_path(run).exists() else ""
        print_line(console(), f"{submitted[run.name]}  {run.name}{previous}")
    if finished < len(runs):
        print(f"The jobs' logs are in {sweep.folder / JOBS_FOLDER}. The same command shows the progress.")
    return 0
