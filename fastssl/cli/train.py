"""`fastssl train`, `fastssl sweep` and `fastssl profile`: one run, many runs, and what limits the speed of a run."""

import sys
from pathlib import Path
from typing import Annotated, Literal

from typer import Argument, Option

from fastssl.common.errors import UserError
from fastssl.recipe import Recipe, find_recipe, load_recipe

Overrides = Annotated[list[str] | None, Argument(metavar="KEY=VALUE", help="recipe keys to change: train.epochs=1 ...")]


def train(
    recipe: Annotated[
        str | None, Argument(help="a YAML file; recipes/x.yaml also means the shipped one; with --resume: the run's")
    ] = None,
    overrides: Overrides = None,
    resume: Annotated[str | None, Option(help="run to resume or extend; auto: the recipe's own, if it exists")] = None,
) -> None:
    """Train a recipe; on several GPUs: torchrun --nproc-per-node 8 -m fastssl train RECIPE."""
    settings = _recipe_of(recipe, overrides or [], resume)
    from fastssl.evaluation.probe import probe_from_recipe
    from fastssl.profiling.bottleneck import explain_data_wait
    from fastssl.training import train

    run_dir = Path(resume) if resume and resume != "auto" else None
    probe = probe_from_recipe(settings)
    train(settings, resume="auto" if resume == "auto" else run_dir, probe=probe, diagnose=explain_data_wait)


def _recipe_of(recipe: str | None, overrides: list[str], resume: str | None) -> Recipe:
    """The recipe that the command line names, or that of the run to resume."""
    if recipe and "=" in recipe and not Path(recipe).is_file():
        overrides = [recipe, *overrides]
        recipe = None
    if recipe is None:
        if resume is None or resume == "auto":
            raise UserError("train needs a recipe, such as recipes/zprob_barlow.yaml, or --resume RUN.")
        from fastssl.models.checkpoint import find_run_dir

        recipe = str(find_run_dir(Path(resume)) / "recipe.yaml")
    return load_recipe(recipe, overrides)


def sweep(
    file: Annotated[str, Argument(help="a YAML file; recipes/sweeps/x.yaml also means the shipped one")],
    overrides: Overrides = None,
    executor: Annotated[Literal["local", "slurm"], Option(help="this machine, or a SLURM cluster")] = "local",
    per_gpu: Annotated[int, Option(min=1, help="number of parallel runs per GPU, or on the CPU without a GPU")] = 1,
    retries: Annotated[int, Option(min=0, help="how often a run that crashed is resumed")] = 2,
    dry_run: Annotated[bool, Option("--dry-run", help="only list the runs and predict the hours")] = False,
    images_per_second: Annotated[float | None, Option(min=0.1, help="throughput of one run, for --dry-run")] = None,
    parallel: Annotated[int, Option(min=1, help="SLURM: number of parallel jobs, each with one GPU")] = 8,
    cpus: Annotated[int, Option(min=1, help="SLURM: cores per job")] = 8,
    time_limit: Annotated[str, Option(help="SLURM: time until a job is requeued; minutes or HH:MM")] = "24:00",
    partition: Annotated[str | None, Option(help="SLURM: partition (default: the cluster's)")] = None,
) -> None:
    """Train every run of a sweep. The same command skips finished runs and resumes the others."""
    from fastssl import sweep

    minutes = sweep.parse_time_limit(time_limit)
    chosen = sweep.load_sweep(file)
    runs = sweep.expand(chosen, overrides or [])
    if dry_run:
        jobs = parallel if executor == "slurm" else None
        sweep.dry_run(chosen, runs, per_gpu=per_gpu, jobs=jobs, images_per_second=images_per_second)
    elif executor == "slurm":
        code = sweep.submit_to_slurm(
            chosen, runs, per_gpu=per_gpu, retries=retries, parallel=parallel, cpus=cpus, minutes=minutes,
            partition=partition,
        )  # fmt: skip
        sys.exit(code)
    else:
        sys.exit(sweep.run_locally(chosen, runs, per_gpu=per_gpu, retries=retries))


def profile(
    recipe: Annotated[str | None, Argument(help="a YAML file; recipes/x.yaml also means the shipped one")] = None,
    overrides: Overrides = None,
    json: Annotated[Path | None, Option(help="file (page and trace next to it; default: profiles/NAME.json)")] = None,
    plan: Annotated[
        str | None, Option(metavar='"8xA100, 64 cores, nvme"', help="predict hours and bottleneck on a machine")
    ] = None,
    fail_under: Annotated[
        list[str] | None, Option(metavar="KEY=VALUE", help="exit 1 below, e.g. accelerator_utilization=0.9")
    ] = None,
    compare: Annotated[tuple[Path, Path] | None, Option(metavar="A.json B.json", help="compare two profiles")] = None,
) -> None:
    """Find the bottleneck of a run and what to change. Trains for about a minute and discards the result."""
    from fastssl import profiling
    from fastssl.common.terminal import console, print_error, print_line

    screen = console()
    if compare:
        if recipe or json or plan is not None or fail_under:
            raise UserError("--compare reads two profiles and measures nothing: leave out recipe and other options.")
        a, b = map(profiling.read_profile, compare)
        screen.print(profiling.compare_table(str(compare[0]), str(compare[1]), a, b))
        return
    if recipe is None:
        raise UserError("profile needs a recipe, or --compare A.json B.json.")
    settings = load_recipe(recipe, overrides or [])
    path = json or profiling.default_path(settings, find_recipe(Path(recipe)))
    # Wrong options are reported before the minute of measurement, not after it.
    thresholds = profiling.parse_thresholds(fail_under or [])
    machine = None if plan is None else profiling.parse_machine(plan)
    if machine:
        profiling.check_batch_size(machine, settings.train.batch_size, settings.train.accumulate)
    measured = profiling.profile_recipe(settings, overrides or [], profiling.trace_path(path))
    if measured is None:  # only the main process shows the result
        return
    screen.print(profiling.profile_table(measured, screen.width))
    profiling.write_files(path, measured)
    print_line(screen, f"{path} holds these values; {path.with_suffix('.html')} shows them.")
    print_line(screen, f"Open {measured.trace} in https://ui.perfetto.dev.")
    if machine:
        screen.print(profiling.plan_table(profiling.plan_training(measured, settings, machine)))
    if below := profiling.failed_thresholds(measured, thresholds):
        for line in below:
            print_error(line)
        sys.exit(1)
