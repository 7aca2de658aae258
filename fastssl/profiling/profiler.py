"""`fastssl profile`: the order in which a run is measured, and the profile that is made of the measurements."""

import math
import os
import resource
import time
from contextlib import ExitStack, closing
from datetime import datetime
from importlib.metadata import version
from itertools import islice
from pathlib import Path

import torch

from fastssl.beton import read_header
from fastssl.common.distributed import (
    broadcast_from_main,
    is_main_process,
    joined_processes,
    main_progress,
    main_steps,
    world_size,
)
from fastssl.common.environment import describe_environment, device_name
from fastssl.common.errors import UserError
from fastssl.common.files import open_regular, part_of
from fastssl.common.system import available_cores, free_memory
from fastssl.profiling.bottleneck import RESOURCES, Cost, CostModel, describe_bottleneck, setup_of, suggest_fixes
from fastssl.profiling.device_stages import DeviceStages
from fastssl.profiling.end_to_end import EndToEndStage
from fastssl.profiling.loader_stages import LoaderStages, endless
from fastssl.profiling.page import write_page
from fastssl.profiling.peaks import copy_peak, peak_flops
from fastssl.profiling.profile import (
    OTHERS_RAN,
    RUN_AGAIN,
    STAGES,
    Bottleneck,
    NextBottleneck,
    Prediction,
    Profile,
    ProfiledData,
    ProfiledMachine,
    ProfiledRun,
    StageResult,
    Stages,
    accelerator_utilization,
    write_profile,
)
from fastssl.profiling.storage import StorageStage, mean_size
from fastssl.profiling.trace import write_trace
from fastssl.profiling.wording import STAGE_NAMES, percent, significant
from fastssl.recipe import Recipe
from fastssl.training.memory import explain_out_of_memory
from fastssl.training.schedule import image_size
from fastssl.training.setup import TrainingRun, choose_device, prepare

WINDOW = {"short": 0.3, "step": 1.0, "end_to_end": 1.5}  # seconds, by the kind of stage
REPLAYED = 3  # batches that stay on the device
ROUNDS = (3, 5)  # fewest and most windows of each stage
SECONDS = 40.0  # that rounds beyond the fewest may take
SHORT_EPOCH = 20  # batches, below which the loader's start in every epoch matters
ALWAYS_BUSY = 0.9  # share of the time from which on a GPU's kernels leave no gaps that faster launching could fill
OTHERS_SECONDS = 0.5  # for which other processes are observed
OTHERS_CORES = 0.1  # that other processes keep busy, from which on a remark says so
NOISY = 0.1  # spread of the windows of training, from which on a remark says so
DISAGREEMENT = 0.1  # between predicted and measured, from which on a remark says so
SMALL_WAIT = 0.05  # share of the time that the device waits for data, below which loading is not the bottleneck


def profile_recipe(recipe: Recipe, overrides: list[str] | None = None, trace: Path | None = None) -> Profile | None:
    """Measure the bottleneck of the recipe's training on this machine.

    It trains for a minute or two, on a CPU for several. The trained model is discarded, and no run directory is made.

    Args:
        overrides: the command line's, recorded in the profile.
        trace: file to write a trace of a few steps into.

    Returns:
        The profile in the main process, None in the others.

    Raises:
        UserError: as training does.
    """
    start = time.perf_counter()
    before = _machine_cpu_seconds()
    time.sleep(OTHERS_SECONDS)
    others = (_machine_cpu_seconds() - before) / OTHERS_SECONDS
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # torch's profiler would report on stderr that it starts and stops
    with ExitStack() as stack:
        device = stack.enter_context(joined_processes(choose_device(recipe.train.device)))
        stack.enter_context(explain_out_of_memory(recipe, device))
        run, remarks = prepare(recipe, device, None)
        profiler = Profiler(run, stack)
        profiler.measure()
        if trace:
            write_trace(trace, profiler.end_to_end.training, device)
        machine, data = profiler.machine(), profiler.data()
        stages = profiler.results(machine.peak_flops)
        costs = profiler.costs(stages, data)
        prediction = predict(costs, stages)
        bottleneck = profiler.bottleneck(costs, stages, data, prediction)
        profile = Profile(
            schema_version=2, measured_at=datetime.now().astimezone().isoformat(timespec="seconds"),
            seconds=time.perf_counter() - start, fastssl_version=version("fastssl-trainer"), name=recipe.name,
            recipe=recipe.model_dump(mode="json"), overrides=overrides or [], environment=describe_environment(device),
            machine=machine, data=data, run=profiler.training_run(), stages=stages, prediction=prediction,
            bottleneck=bottleneck, remarks=[*remarks_on(data, prediction, bottleneck.stage, stages, others), *remarks],
            trace=trace.name if trace else None,
        )  # fmt: skip
        return profile if is_main_process() else None


def default_path(recipe: Recipe, file: Path) -> Path:
    """Return where the profile goes: into the run directory if `file` is its recipe.yaml, else profiles/NAME.json."""
    if file.name == "recipe.yaml" and (file.parent / "checkpoints").is_dir():
        return file.parent / "profile.json"
    return Path("profiles") / f"{recipe.name.replace('/', '_')}.json"


def trace_path(path: Path) -> Path:
    """Return the path of the trace next to the profile's. Raises UserError if files cannot be written there."""
    if path.suffix != ".json" or path.is_dir():
        raise UserError(
            f"--json {path} does not end in .json", hint="write a name that does; page and trace are written next to it"
        )
    trace = path.with_suffix(".trace.json.gz")
    existing = next(folder for folder in path.absolute().parents if folder.exists())
    probe = part_of(existing / trace.name)
    try:
        open_regular(probe, "xb").close()
        probe.unlink()
    except OSError as error:
        raise UserError(f"{path} cannot be written ({error.strerror})", hint="name another file with --json") from None
    return trace


def write_files(path: Path, profile: Profile) -> None:
    """Write the page, then profile.json."""
    write_page(path.with_suffix(".html"), profile)
    write_profile(path, profile)


class Profiler:
    """Measures all stages of a run in turns, and puts them together."""

    def __init__(self, run: TrainingRun, stack: ExitStack):
        self.run, self.recipe, self.loader = run, run.recipe, run.state.loader
        self.cores = available_cores()
        self.epoch = self.recipe.train.epochs - 1  # views.progressive_resize has reached its full size
        self.size = image_size(self.recipe.views, self.epoch)
        self.storage: StorageStage | None = None
        self.loader_stages: LoaderStages | None = None
        if not self.loader.resident:
            # Storage comes first: what another mapping of the file has read can no longer be evicted.
            self.storage = StorageStage(self.loader.samples, self.loader.rows, self.loader.workers)
            for _ in range(ROUNDS[0]):
                self.storage.measure()
            self.loader_stages = LoaderStages(self.recipe, self.loader, WINDOW["short"], self.cores, stack)
        with closing(endless(self.loader)) as batches:
            replayed = list(islice(batches, REPLAYED * self.recipe.train.accumulate))
        self.loader.set_epoch(0)
        self.device_stages = DeviceStages(run, replayed, self.epoch, WINDOW["short"], WINDOW["step"])
        self.end_to_end = EndToEndStage(run, self.epoch, self.cores, WINDOW["end_to_end"])
        stack.callback(self.end_to_end.training.close)

    def measure(self) -> None:
        """Time every stage: a warm-up, then rounds of one window each."""
        device, phases, training = self.run.device, self.device_stages.phases, self.end_to_end.timer
        alone = (self.loader_stages.timers() if self.loader_stages else {}) | self.device_stages.timers()
        to_warm_up = alone | {STAGE_NAMES["end_to_end"]: training}
        with main_steps("warming up", len(to_warm_up) + 1) as begin:
            for name, timer in to_warm_up.items():
                begin(name)
                timer.warm_up()
            begin(f"parts of the {STAGE_NAMES['step']}")
            start = time.perf_counter()
            phases.measure()
            phases_seconds = time.perf_counter() - start
            phases.windows.clear()
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
        in_turn = [(timer.measure, timer.expected) for timer in alone.values()]
        in_turn += [(phases.measure, phases_seconds), (self.end_to_end.measure, training.expected)]
        one_round = sum(seconds for _, seconds in in_turn)
        fewest, most = ROUNDS
        rounds = broadcast_from_main(lambda: min(most, max(fewest, int(SECONDS / one_round))))
        elapsed, shown = 0.0, 0  # expected seconds of the windows that are done, and their share in percent
        with main_progress("measuring", 100, "%") as advance:
            for measure, seconds in rounds * in_turn:
                measure()
                elapsed += seconds
                done = round(100 * elapsed / (rounds * one_round))
                advance(done - shown)
                shown = done
        self.peak_memory = 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        if device.type == "cuda":
            self.peak_memory = torch.cuda.max_memory_allocated(device)

    def results(self, peak: float) -> Stages:
        """Return every stage's result. peak: FLOP/s of the device."""
        resident = "All images stay on the device (data.resident): nothing is read, decoded or copied."
        stages = Stages(**{name: StageResult(missing=resident) for name in STAGES})
        if self.storage and self.loader_stages:
            stages.storage = self.storage.result()
            self.loader_stages.add_results(stages, copy_peak(self.run.device))
        self.device_stages.add_results(stages, peak)
        # What has to move at least for an image's views: the pixels in, the floats out.
        floats = self.recipe.objective.num_views * self.recipe.model.in_chans * self.size**2
        stages.views.bytes_per_image = self.loader.image_bytes + 4 * floats
        stages.step.peak_memory_bytes = self.peak_memory
        stages.end_to_end = self.end_to_end.result()
        return stages

    def machine(self) -> ProfiledMachine:
        device = self.run.device
        peak, source = peak_flops(device, self.run.precision)
        return ProfiledMachine(
            device=device_name(device), kind=device.type, cores=self.cores, processes=world_size(),
            peak_flops=peak, peak_source=source,
        )  # fmt: skip

    def data(self) -> ProfiledData:
        loader = self.loader
        info = read_header(loader.path, loader.own_files())
        file_bytes = info.file_bytes
        return ProfiledData(
            path=str(loader.path), images=len(loader.rows), file_bytes=file_bytes,
            image_bytes=mean_size(loader.samples, loader.rows), decoded_bytes=loader.image_bytes,
            layout=info.layout, storage=info.storage, resolution=list(info.resolution) if info.resolution else None,
            crop=loader.crop, resident=loader.resident, fits_into_memory=file_bytes <= free_memory(),
            in_page_cache=self.storage.cached_before if self.storage else None, batches_per_epoch=len(loader),
        )  # fmt: skip

    def training_run(self) -> ProfiledRun:
        return ProfiledRun(
            batch_size=self.recipe.train.batch_size, workers=self.loader.workers, precision=self.run.precision,
            compiled=self.run.compiled, views=self.recipe.objective.num_views, size=self.size,
            parameters=sum(p.numel() for p in self.run.state.model.parameters() if p.requires_grad),
        )  # fmt: skip

    def costs(self, stages: Stages, data: ProfiledData) -> CostModel:
        """Return what an image costs this process, by stage."""
        costs = {}
        results = stages.by_name() | {"step": self.device_stages.own_step.result()}
        for name in ("decode", "copy_images", "cpu_augment", "transfer", "views", "step", "communication", "launch"):
            rate, cpu_seconds = results[name].rate, results[name].cpu_seconds
            if rate and cpu_seconds:
                costs[name] = Cost(world_size() / rate, cpu_seconds.median)
        if stages.storage.rate and data.in_page_cache is not None:
            costs["storage"] = Cost(world_size() / stages.storage.rate * (1 - data.in_page_cache))
        # On a GPU, views and step cost what their kernels take, however late the main thread launches them.
        busy = {"views": stages.views.busy_seconds, "step": stages.step.busy_seconds}
        for name, seconds in busy.items():
            if seconds:
                costs[name] = Cost(seconds)
        # Where the kernels leave no gaps, launching costs nothing: a full queue only lets the thread wait.
        if stages.replay.rate and sum(filter(None, busy.values())) > ALWAYS_BUSY * world_size() / stages.replay.rate:
            costs.pop("launch", None)
        return CostModel(costs, self.cores, self.loader.decodes_in_reader, world_size())

    def bottleneck(self, costs: CostModel, stages: Stages, data: ProfiledData, prediction: Prediction) -> Bottleneck:
        phases = {name: phase.median for name, phase in (stages.step.phases or {}).items()}
        setup = setup_of(self.run, data.layout, phases)
        seconds = world_size() / prediction.measured_images_per_second
        utilization = accelerator_utilization(stages)
        stage = costs.bottleneck()
        without = costs.with_speedup(stage, math.inf)
        rate = without.images_per_second()
        named = "balanced" if costs.is_balanced() else stage
        doubt = "Uncertain, see the note. " if is_off(prediction) and not is_certain(named, prediction, stages) else ""
        return Bottleneck(
            stage=named,
            sentence=doubt + describe_bottleneck(costs, setup, seconds),
            advice=suggest_fixes(costs, setup, seconds),
            accelerator_utilization=utilization.median if utilization else 0.0,
            next=NextBottleneck(stage=without.bottleneck(), images_per_second=rate) if rate < math.inf else None,
            twice_as_fast={name: costs.with_speedup(name, 2).images_per_second() for name in costs.stages},
        )


def predict(costs: CostModel, stages: Stages) -> Prediction:
    """Compare what the cost model predicts with what end_to_end measured."""
    measured, predicted = stages.end_to_end.rate, costs.images_per_second()
    assert measured
    return Prediction(
        resource_seconds={name: seconds / world_size() for name, seconds in costs.resource_seconds().items()},
        predicted_images_per_second=predicted, measured_images_per_second=measured,
        relative_error=predicted / measured - 1,
    )  # fmt: skip


def is_off(prediction: Prediction) -> bool:
    """Whether the stages predict another speed than was measured."""
    return abs(prediction.relative_error) > DISAGREEMENT


def is_certain(stage: str, prediction: Prediction, stages: Stages) -> bool:
    """Whether a stage is the bottleneck even if the prediction is off: it takes more than half of the measured time on
    the device, which hardly waits for data."""
    if stage not in RESOURCES["device"]:
        return False
    rate, waited = stages.by_name()[stage].rate, stages.end_to_end.data_wait
    is_long = rate is not None and prediction.measured_images_per_second > 0.5 * rate
    return is_long and waited is not None and waited.median < SMALL_WAIT


def remarks_on(data: ProfiledData, prediction: Prediction, bottleneck: str, stages: Stages, others: float) -> list[str]:
    """Return what changes the meaning of the verdict, the most important first.

    Args:
        bottleneck: a stage, or "balanced".
        others: cores that other processes keep busy.
    """
    remarks = []
    training, storage = stages.end_to_end.images_per_second, stages.storage.rate
    if is_off(prediction):
        rate, measured = prediction.predicted_images_per_second, prediction.measured_images_per_second
        more = "more" if rate > measured else "less"
        doubt = "the bottleneck is uncertain"
        if is_certain(bottleneck, prediction, stages) and (waited := stages.end_to_end.data_wait):
            doubt = (
                "speedup and next limit are uncertain. The bottleneck is not: training waits for data only "
                f"{percent(waited.median)} of the time"
            )
        remarks.append(
            f"The stages predict {significant(rate)} images/s, {percent(abs(prediction.relative_error))} {more} than "
            f"the {significant(measured)} measured, so {doubt}. {RUN_AGAIN}"
        )
    if storage and training and data.in_page_cache and storage < training.median:
        cached = percent(data.in_page_cache)
        remarks.append(
            f"{cached} of the file was in the page cache (memory). Where it has to be read from this disk, training is "
            f"limited to {significant(storage)} images/s."
        )
    if training and (spread := training.spread()) > NOISY:
        remarks.append(
            f"The speed of training varied by ± {percent(spread)} between windows: smaller differences are noise."
        )
    if others > OTHERS_CORES:
        remarks.append(f"{OTHERS_RAN} {others:.1f} CPU cores of this machine busy when the profile began.")
    if (batches := data.batches_per_epoch) < SHORT_EPOCH and not data.resident:
        remarks.append(
            f"An epoch has only {batches} {'batch' if batches == 1 else 'batches'}, and the loader starts again in "
            "each: with a larger data set, training would wait less."
        )
    return remarks


def _machine_cpu_seconds() -> float:
    """Return the CPU-seconds of the machine since it started, without idle time and waits for disks (proc(5))."""
    first_line = Path("/proc/stat").read_text().split("\n", 1)[0]
    user, nice, system, _, _, *interrupts = map(int, first_line.split()[1:8])
    return (user + nice + system + sum(interrupts)) / os.sysconf("SC_CLK_TCK")
