"""`fastssl train`, `fastssl sweep` and `fastssl profile`: one run, many runs, and what limits the speed of a run."""

import sys
from contextlib import suppress
from pathlib import Path
from typing import Annotated, Literal

from typer import Argument, Option

from fastssl.cli.help import SLURM_PANEL, Cpus, Partition, TimeLimit
from fastssl.common.errors import UserError
from fastssl.recipe import Recipe, find_recipe, load_recipe, make_recipe

RECIPE = "A YAML file, or the name of a recipe of `fastssl recipes ls`."
Overrides = Annotated[
    list[str] | None, Argument(metavar="KEY=VALUE", help="Recipe keys to change. `fastssl recipes keys` lists them.")
]


def train(
    recipe: Annotated[str | None, Argument(metavar="RECIPE", help=RECIPE)] = None,
    overrides: Overrides = None,
    resume: Annotated[
        str | None,
        Option(
            metavar="RUN", help="Resume or extend this run; auto: the run in run.dir, or a new one if there is none."
        ),
    ] = None,
) -> None:
    """Train a recipe. With --resume RUN, the recipe is the run's.

    Examples:
      fastssl train demo
      fastssl train zprob_barlow data.train=data/photos data.val=null
      fastssl train zprob_barlow train.epochs=50 train.batch_size=512 optim.lr=5e-4
      fastssl train --resume runs/zprob_barlow
      torchrun --nproc-per-node 8 -m fastssl train recipes/zprob_barlow.yaml
    """
    settings = _recipe_of(recipe, overrides or [], resume)
    from fastssl.evaluation.probe import probe_from_recipe
    from fastssl.profiling.bottleneck import explain_data_wait
    from fastssl.training import train

    run_dir = Path(resume) if resume and resume != "auto" else None
    probe = probe_from_recipe(settings)
    train(
        settings,
        resume="auto" if resume == "auto" else run_dir,
        probe=probe,
        diagnose=explain_data_wait,
        evaluation_command=_evaluation_command,
    )


def _recipe_of(recipe: str | None, overrides: list[str], resume: str | None) -> Recipe:
    """The recipe that the command line names, or that of the run to resume."""
    if recipe and "=" in recipe and not Path(recipe).is_file():
        overrides = [recipe, *overrides]
        recipe = None
    if recipe is None:
        if resume is None or resume == "auto":
            raise UserError(
                "train needs a recipe",
                hint="name one, such as recipes/zprob_barlow.yaml, or continue a run with --resume RUN",
            )
        from fastssl.models.checkpoint import find_run_dir

        recipe = str(find_run_dir(Path(resume)) / "recipe.yaml")
    return load_recipe(recipe, overrides)


def _evaluation_command(recipe: Recipe, run_dir: Path) -> str:
    """The command that evaluates the run: kNN accuracy; without images and labels for that, its unusual images."""
    from fastssl.beton import beton_file
    from fastssl.beton.shards import exists
    from fastssl.common.commands import command
    from fastssl.evaluation import BetonSubset
    from fastssl.evaluation.runs import check_labels

    data = recipe.data
    train_file = beton_file(data.train, "train")
    if data.val:
        with suppress(UserError, OSError):
            train_set = BetonSubset(train_file, data.subset, data.limit)
            check_labels(train_set, BetonSubset(beton_file(data.val, "val")), "kNN", fix_train="", fix_val="")
            return command("eval", "knn", run_dir)
    embeddings = ("--out", run_dir / "embeddings.npz")
    if not exists(train_file) or data.shards != "shared":
        return command("embed", run_dir, "IMAGES", *embeddings)
    score = ("--score", "layers_unlabelled", "--sheet", run_dir / "strangest.png")
    return command("embed", run_dir, train_file, *embeddings, *score)


def sweep(
    file: Annotated[
        str, Argument(metavar="SWEEP", help="A YAML file, or the name of a sweep of `fastssl recipes ls`.")
    ],
    overrides: Overrides = None,
    dry_run: Annotated[bool, Option("--dry-run", help="Show axes, number of runs, time and disk.")] = False,
    verbose: Annotated[bool, Option("--verbose", help="With --dry-run: list every run.")] = False,
    images_per_second: Annotated[
        float | None,
        Option(min=0.1, metavar="N", help="With --dry-run: throughput of one run.", show_default="logged or measured"),
    ] = None,
    executor: Annotated[Literal["local", "slurm"], Option(help="This machine, or a SLURM cluster.")] = "local",
    per_gpu: Annotated[
        int, Option(min=1, metavar="N", help="Parallel runs per GPU, or on the CPU where there is no GPU.")
    ] = 1,
    retries: Annotated[int, Option(min=0, metavar="N", help="How often a run that crashed is resumed.")] = 2,
    parallel: Annotated[
        int, Option(min=1, metavar="N", help="Parallel jobs, each with one GPU.", rich_help_panel=SLURM_PANEL)
    ] = 8,
    cpus: Cpus = 8,
    time_limit: TimeLimit = "24:00",
    partition: Partition = None,
) -> None:
    """Train every run of a sweep. The same command skips finished runs and resumes the others.

    Examples:
      fastssl sweep ablation_cifar10 --dry-run
      fastssl sweep ablation_cifar10 --per-gpu 2
      fastssl sweep ablation_cifar10 --executor slurm --partition gpu
    """
    from fastssl import sweep
    from fastssl.common.slurm import parse_time_limit

    minutes = parse_time_limit(time_limit)
    chosen = sweep.load_sweep(file)
    runs = sweep.expand(chosen, overrides or [])
    if dry_run:
        jobs = parallel if executor == "slurm" else None
        sweep.dry_run(chosen, runs, per_gpu=per_gpu, jobs=jobs, images_per_second=images_per_second, verbose=verbose)
    elif executor == "slurm":
        code = sweep.submit_to_slurm(
            chosen, runs, per_gpu=per_gpu, retries=retries, parallel=parallel, cpus=cpus, minutes=minutes,
            partition=partition,
        )  # fmt: skip
        sys.exit(code)
    else:
        sys.exit(sweep.run_locally(chosen, runs, per_gpu=per_gpu, retries=retries))


def profile(
    recipe: Annotated[
        str | None, Argument(metavar="RECIPE", help=f"{RECIPE} With --plan also a saved profile.json.")
    ] = None,
    overrides: Overrides = None,
    json: Annotated[
        Path | None,
        Option(
            metavar="FILE.json", help="File for the figures; a page and a trace are written next to it.",
            show_default="profiles/NAME.json, or RUN/profile.json",
        ),
    ] = None,
    compare: Annotated[
        tuple[Path, Path] | None, Option(metavar="A.json B.json", help="Compare two profiles, and measure nothing.")
    ] = None,
    plan: Annotated[
        str | None,
        Option(
            metavar="MACHINE",
            help="Predict hours and bottleneck on a machine: GPUs, cores, memory, storage (nvme, ssd, hdd or nfs, also "
            "with its speed), images. Such as '8xA100, 64 cores, 512 GB, nfs 300 MB/s, 100M images'.",
        ),
    ] = None,
    fail_under: Annotated[
        list[str] | None,
        Option(metavar="KEY=VALUE", help="Exit with code 1 if a figure is lower. May be repeated."),
    ] = None,
) -> None:  # fmt: skip
    """Find what limits the speed of a run, and what to change. Trains for one or two minutes, on a CPU for several,
    and discards the result.

    Examples:
      fastssl profile demo
      fastssl profile zprob_barlow data.train=data/photos train.batch_size=512
      fastssl profile demo --plan '8xA100, 64 cores, nvme'
      fastssl profile profiles/demo.json --plan '1xH100, 16 cores, nvme, 1M images'
      fastssl profile --compare profiles/before.json profiles/after.json
    """
    from fastssl import profiling
    from fastssl.common.terminal import console, print_error, print_line, time_in_words

    screen = console()
    if compare:
        if recipe or json or plan is not None or fail_under:
            raise UserError(
                "--compare reads two profiles and measures nothing", hint="leave out recipe and other options"
            )
        a, b = map(profiling.read_profile, compare)
        screen.print(profiling.compare_table(str(compare[0]), str(compare[1]), a, b))
        return
    if recipe is None:
        raise UserError(
            "profile needs a recipe",
            hint="name one, such as recipes/zprob_barlow.yaml, or compare two profiles with --compare A.json B.json",
        )
    if recipe.endswith(".json"):
        if plan is None or json or fail_under:
            raise UserError(
                f"{recipe} is a profile, from which --plan predicts without measuring",
                hint="add --plan MACHINE and no other option, or name a recipe",
            )
        saved = profiling.read_profile(Path(recipe))
        settings = make_recipe(saved.recipe, overrides or [])
        profiling.check_planned_recipe(saved, make_recipe(saved.recipe), settings)
        screen.print(profiling.plan_table(profiling.plan_training(saved, settings, profiling.parse_machine(plan))))
        return
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
    print_line(screen, f"Profiling took {time_in_words(measured.seconds)}.")
    print_line(screen, f"Saved {path}, and a page with figures: {path.with_suffix('.html')}")
    if measured.trace:
        print_line(screen, f"Trace of three steps, for https://ui.perfetto.dev: {path.with_name(measured.trace)}")
    if machine:
        screen.print()
        screen.print(profiling.plan_table(profiling.plan_training(measured, settings, machine)))
    if below := profiling.failed_thresholds(measured, thresholds):
        for line in below:
            print_error(line)
        sys.exit(1)
    if thresholds:
        print_line(screen, "No value is below its threshold (--fail-under).")
