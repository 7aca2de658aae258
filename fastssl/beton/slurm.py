"""Build shards on a SLURM cluster through submitit: one job array, each of whose jobs builds one shard."""

import dataclasses
import hashlib
import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from fastssl.beton.build import BuildReport, build_files, check_build, files_to_build, list_images, run_build
from fastssl.beton.options import BuildOptions
from fastssl.common.errors import UserError
from fastssl.common.files import explain_write_errors, write_atomically
from fastssl.common.slurm import ids_in_queue, read_jobs, submit_array
from fastssl.common.terminal import console, count_of, listed, print_line, printable

if TYPE_CHECKING:
    import submitit  # an optional dependency: imported where it is used

JOBS_FOLDER = "slurm"  # in the folder of the shards
MOST_NAMED = 5  # jobs in a message
SIGNAL_DELAY = 120  # seconds between the requeue signal and the end of a job at its time limit


@dataclass
class ShardJob:
    """Builds one shard of each split. submitit pickles it and calls it on the node."""

    builder: str
    source: Path | None
    out: Path
    options: BuildOptions  # with `shard`

    def __call__(self) -> None:
        report = run_build(self.builder, self.source, self.out, self.options)
        for line in (report.account, report.problem):
            if line:
                print_line(console(), line)

    def checkpoint(self) -> "submitit.helpers.DelayedSubmission":
        """What submitit puts back into the queue at the time limit: the same job, as a build resumes by itself."""
        import submitit

        return submitit.helpers.DelayedSubmission(self)


class SlurmBuild(NamedTuple):
    """What `submit_build` found and did."""

    shards: int
    complete: int
    queued: int  # waiting or running already
    submitted: dict[int, str]  # shard -> id of its job, of those that were submitted now
    ended: dict[int, str]  # the same of those among them whose last job has ended before the shard was complete
    folder: Path  # of the jobs' logs
    report: BuildReport | None  # of all shards, if they are complete


def submit_build(
    builder: str,
    source: Path | None,
    out: Path,
    options: BuildOptions,
    *,
    parallel: int = 8,
    cpus: int = 8,
    minutes: int = 1440,
    partition: str | None = None,
) -> SlurmBuild:
    """Submit the shards that are missing or outdated and not in SLURM's queue. The source is listed here, once.

    Args:
        builder, source, out: see `build_beton`.
        options: with `shards`, and without `shard`.
        parallel: number of jobs at the same time.
        cpus: cores per job, and its worker processes unless `options.workers` is given.
        minutes: time limit of a job. It is then requeued, and resumes.

    Raises UserError where there is no SLURM, where SLURM refuses the jobs, where jobs of another build into `out` are
    queued or running, and as `build_beton`.
    """
    if options.shards is None:
        raise UserError("--executor slurm builds shards", hint="add --shards N, the number of files for each split")
    if options.shard is not None:
        raise UserError("--executor slurm submits all shards that are missing", hint="leave out --shard")
    in_queue = ids_in_queue()
    folder = (out / JOBS_FOLDER).absolute()
    names = _job_names(builder, source, options)
    last_ids = read_jobs(folder / "jobs.json")
    _refuse_other_jobs(out, {name: job_id for name, job_id in last_ids.items() if job_id in in_queue}, names)
    check_build(builder, source, out, options)
    with explain_write_errors(out):
        listing = list_images(builder, source, out, options, by_list=True)
        by_split = files_to_build(builder, source, out, options, listing)
        is_complete = [all(file.read_if_up_to_date() for file in of_shard) for of_shard in zip(*by_split, strict=True)]
        queued = {
            name: last_ids[name]
            for name, done in zip(names, is_complete)
            if not done and last_ids.get(name) in in_queue
        }
        missing = [number for number, done in enumerate(is_complete) if not done and names[number] not in queued]
        ids: list[str] = []
        if missing:
            of_jobs = dataclasses.replace(options, workers=options.workers or cpus, download=False)
            where = None if source is None else source.absolute()
            jobs = [
                ShardJob(builder, where, out.absolute(), dataclasses.replace(of_jobs, shard=number))
                for number in missing
            ]
            ids = submit_array(
                folder,
                jobs,
                name=f"build-{out.name}",
                timeout_min=minutes,
                cpus_per_task=cpus,
                slurm_partition=partition,
                slurm_array_parallelism=parallel,
                slurm_signal_delay_s=SIGNAL_DELAY,
            )
            submitted_ids = {names[number]: job_id for number, job_id in zip(missing, ids)}
            write_atomically(folder / "jobs.json", json.dumps({**queued, **submitted_ids}, indent=2) + "\n")
        report = build_files(builder, source, options, listing, by_split) if all(is_complete) else None
    return SlurmBuild(
        shards=options.shards,
        complete=sum(is_complete),
        queued=len(queued),
        submitted=dict(zip(missing, ids)),
        ended={number: last_ids[names[number]] for number in missing if names[number] in last_ids},
        folder=folder,
        report=report,
    )


def _job_names(builder: str, source: Path | None, options: BuildOptions) -> list[str]:
    """Return how jobs.json names the job of each shard: by all that its shard depends on, not by its number alone."""
    assert options.shards is not None
    # How a shard is built does not matter.
    of_shards = dataclasses.replace(options, workers=None, strict=False, allow_bad=None, download=False)
    build = repr((builder, None if source is None else os.path.abspath(source), of_shards))
    sha256 = hashlib.sha256(build.encode("utf-8", "backslashreplace")).hexdigest()
    return [f"{number} of {options.shards}, build {sha256[:12]}" for number in range(options.shards)]


def _refuse_other_jobs(out: Path, queued: dict[str, str], names: list[str]) -> None:
    """Raise UserError if jobs of other options are in the queue: they would replace what this build makes."""
    own = set(names)
    if ids := [job_id for name, job_id in queued.items() if name not in own]:
        named = listed([printable(each) for each in ids[:MOST_NAMED]], len(ids))
        raise UserError(
            f"{count_of(len(ids), 'job')} of a build with other options into {out} {'is' if len(ids) == 1 else 'are'} "
            f"queued or running: {named}",
            hint=f"wait for them, cancel them with `scancel {printable(ids[0]).split('_')[0]}`, or use another --out",
        )
