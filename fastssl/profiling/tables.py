"""A profile as tables: the verdict with what changes its meaning, the speeds, the stages, where the time goes.

The rows are text, from which page.py makes the tables of the HTML page.
"""

from typing import NamedTuple

from rich import box
from rich.console import Group, RenderableType
from rich.padding import Padding
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from fastssl.profiling.bottleneck import training_speedup
from fastssl.profiling.profile import Profile, StageResult, device_time, training_seconds
from fastssl.profiling.wording import (
    BELOW_NOISE,
    PART_NAMES,
    STAGE_NAMES,
    capitalized,
    in_sentence,
    is_below_noise,
    percent,
    si,
    significant,
    times,
)

HEALTHY = 0.9  # accelerator utilization, below which training is worth speeding up outside the model
MANY_PAGE_FAULTS = 5000  # per step; they take a hundredth of a second
WORTH_SAYING = 1.01  # speedup that a stage twice as fast must give to be named
STAGES_CAPTION = (
    "images/s: each stage alone, the median of several windows of time, ± half the range from the "
    "slowest to the fastest. CPU ms: CPU time per image, over all threads."
)
MEANINGS = {  # of stages whose names do not say it all
    "transfer": "assembles batches of loaded images, and copies them to a GPU",
    "loader": "the stages above together, while nothing uses the batches",
    "launch": "the main thread's time to launch the GPU kernels of view augmentation and training step",
    "replay": "view augmentation and training step on batches on the device: the limit for any faster loading",
}


class StageRow(NamedTuple):
    stage: str
    rate: str  # images per second
    spread: str  # half the range of the windows, in % of the median
    cpu: str  # CPU-milliseconds per image, over all threads
    is_bottleneck: bool


class TimeRow(NamedTuple):
    part: str
    milliseconds: str  # per image
    share: str  # of the training time


def profile_table(profile: Profile, width: int) -> RenderableType:
    """Return everything that a profile says, for a terminal with `width` columns."""
    bottleneck = profile.bottleneck
    verdict = Text(bottleneck.sentence, style="bold")
    if bottleneck.advice:
        verdict.append("\n" + bottleneck.advice, style="not bold")
    return Group(
        Panel(verdict, box=box.HEAVY, width=width),
        *(Text(f"Note: {remark}", style="yellow") for remark in profile.remarks),
        Text(f"\n{subject(profile)}\n", style="dim"),
        _pairs(headline(profile)),
        _stage_table(profile),
        Text(STAGES_CAPTION if bottleneck.stage == "balanced" else f"* the bottleneck. {STAGES_CAPTION}", style="dim"),
        _time_table(profile),
        Text(time_caption(profile), style="dim"),
        Text("\nMore on each stage", style="bold"),
        Padding(_pairs(details(profile)), (0, 0, 1, 0)),
    )


def subject(profile: Profile) -> str:
    """Return one line that says what was profiled, on what machine."""
    machine, run = profile.machine, profile.run
    processes = f", {machine.processes} processes" if machine.processes > 1 else ""
    compiled = ", compiled" if run.compiled else ""
    return (
        f"{profile.name} on {machine.device} ({machine.cores} CPU cores{processes}): "
        f"{run.precision}{compiled}, batch size {run.batch_size:,}, {_count(run.workers, 'loader thread')}, "
        f"{_count(run.views, 'view')} of {run.size} px, {si(run.parameters)} parameters; {profile.data.images:,} images"
    )


def headline(profile: Profile) -> dict[str, str]:
    """Return the most important numbers, by name."""
    bottleneck, prediction = profile.bottleneck, profile.prediction
    predicted = prediction.predicted_images_per_second
    lines = {
        "training speed": f"{significant(prediction.measured_images_per_second)} images/s",
        "predicted from the stages": f"{significant(predicted)} images/s ({100 * prediction.relative_error:+.1f} %)",
        "accelerator utilization": _utilization(profile),
    }
    if (after := bottleneck.next) and bottleneck.stage != "balanced":
        rate = significant(after.images_per_second)
        lines["next limit"] = f"{in_sentence(after.stage)} at {rate} images/s, without the bottleneck"
    # Of the longer of the measured and the predicted time, as in the verdict.
    seconds = 1 / min(predicted, prediction.measured_images_per_second)
    largest_first = sorted(bottleneck.twice_as_fast.items(), key=lambda item: -item[1])
    speedups = {stage: training_speedup(1 / predicted, 1 / rate, seconds) for stage, rate in largest_first}
    gains = [f"{times(x)} for {STAGE_NAMES.get(stage, stage)}" for stage, x in speedups.items() if x >= WORTH_SAYING]
    lines["speedup from halving a stage"] = ", ".join(gains) or "less than 1 % for each"
    return lines


def _utilization(profile: Profile) -> str:
    """Return the accelerator utilization and what takes the rest of the time."""
    utilization, training = profile.bottleneck.accelerator_utilization, profile.stages.end_to_end
    good = f"(good: {percent(HEALTHY)} or more)"
    if percent(utilization) == percent(1):
        return f"{percent(1)} {good}"
    # Loading takes time of the device where it waits for data, and where the loader uses cores that the step needs.
    waiting = training.data_wait.median if training.data_wait else 0.0
    cpu_seconds = profile.stages.loader.cpu_seconds
    cores_seconds = max(1, profile.machine.cores) * training_seconds(profile)
    cores_share = cpu_seconds.median / cores_seconds if cpu_seconds else 0.0
    if waiting + cores_share > 0.5 * (1 - utilization):
        return f"{percent(utilization)}; loading takes the rest {good}"
    return f"{percent(utilization)}; the rest: other processes, or noise {good}"


def stage_rows(profile: Profile) -> list[StageRow]:
    """Return the stages that were measured."""
    rows = []
    for name, stage in profile.stages.by_name().items():
        if rate := stage.images_per_second:
            spread = f"± {percent(rate.spread())}"
            cpu = significant(1000 * stage.cpu_seconds.median) if stage.cpu_seconds else ""
            is_bottleneck = name == profile.bottleneck.stage
            rows.append(StageRow(STAGE_NAMES[name], significant(rate.median), spread, cpu, is_bottleneck))
    return rows


def time_rows(profile: Profile) -> list[TimeRow]:
    """Return what the training time, which is the first row, is spent on."""
    whole = training_seconds(profile)
    rows = [TimeRow(STAGE_NAMES["end_to_end"], significant(1000 * whole), percent(1))]
    for part, seconds in device_time(profile).items():
        name = PART_NAMES.get(part, part)
        if is_below_noise(part, seconds):
            rows.append(TimeRow(name, BELOW_NOISE, ""))
        else:
            rows.append(TimeRow(name, significant(1000 * seconds), percent(seconds / whole)))
    return rows


def time_caption(profile: Profile) -> str:
    """Return what the shares are of, and why they may not add up."""
    caption = (
        "Shares of time are those of the training time, end to end. The parts are timed one by one, so they may not "
        "add up to it."
    )
    note = profile.stages.step.phases_note
    return f"{caption} {note}" if note else caption


def details(profile: Profile) -> dict[str, str]:
    """Return what else is known of each stage, or why it was not measured."""
    found = {}
    for name, stage in profile.stages.by_name().items():
        if stage.rate:
            meaning = [MEANINGS[name]] if name in MEANINGS else []
            found[STAGE_NAMES[name]] = "; ".join([*meaning, *_details(name, stage, profile)])
        else:
            found[STAGE_NAMES[name]] = f"not measured. {capitalized(stage.missing or '')}".strip()
    return {name: text for name, text in found.items() if text}


def _details(name: str, stage: StageResult, profile: Profile) -> list[str]:
    """Return what a stage has in addition to its rate."""
    found = []
    if stage.cold_bytes_per_second:
        found.append(f"{si(stage.cold_bytes_per_second.median, 'B/s')} from disk")
    if stage.warm_bytes_per_second:
        found.append(f"{si(stage.warm_bytes_per_second.median, 'B/s')} from the page cache (memory)")
    if name == "storage" and profile.data.in_page_cache is not None:
        found.append(f"{percent(profile.data.in_page_cache)} of the file was in the page cache")
    if stage.workers:
        found.append(_scaling(stage))
    if stage.bytes_per_second:
        peak = f" of {si(stage.peak_bytes_per_second, 'B/s')} possible" if stage.peak_bytes_per_second else ""
        found.append(si(stage.bytes_per_second.median, "B/s") + peak)
    if stage.kernels:
        found.append(f"{stage.kernels:,.0f} GPU kernels per batch")
    if stage.bytes_per_image:
        found.append(f"{si(stage.bytes_per_image, 'B')} read and written per image")
    if stage.flops_per_second:
        mfu = "" if stage.mfu is None else f", {percent(stage.mfu)} of the device's peak (MFU)"
        found.append(si(stage.flops_per_second, "FLOP/s") + mfu)
    if stage.peak_memory_bytes:
        found.append(f"{si(stage.peak_memory_bytes, 'B')} of memory at most")
    if stage.page_faults and stage.page_faults >= MANY_PAGE_FAULTS:
        found.append(f"{stage.page_faults:,.0f} page faults per step")
    return found + _load(stage)


def _scaling(stage: StageResult) -> str:
    """Return how much faster more loader threads are than one."""
    workers = stage.workers or {}
    most = max(workers)
    text = _count(most, "thread")
    if 1 in workers and most > 1:
        speedup = workers[most].median / workers[1].median
        text += f" are {times(speedup)} as fast as one"
        if speedup > most:
            text += f" (what is above {most}x is noise)"
    if stage.knee and stage.knee < most:
        text += f", more than {stage.knee} give less than 5 %"
    return text


def _load(stage: StageResult) -> list[str]:
    """Return how training waits for data, and how busy it keeps cores and GPU."""
    found = []
    if stage.data_wait:
        found.append(f"waits for data {percent(stage.data_wait.median)} of the time")
    if waits := stage.wait_seconds:
        p50, p99 = (significant(1000 * seconds, 2) for seconds in (waits.p50, waits.p99))
        found.append(f"waits {p50} ms for a batch (median; 99th percentile {p99} ms)")
    if stage.cores_busy is not None:
        found.append(f"CPU cores busy {percent(stage.cores_busy)} of the time")
    if gpu := stage.gpu:
        found.append(f"GPU busy {percent(gpu.utilization)} of the time (nvidia-smi)")
        found.append(f"{gpu.sm_clock_mhz:,.0f} of {gpu.max_sm_clock_mhz:,.0f} MHz, {gpu.power_w:,.0f} W")
    return found


def _count(number: int, unit: str) -> str:
    return f"{number:,} {unit}" if number == 1 else f"{number:,} {unit}s"


def _stage_table(profile: Profile) -> Table:
    table = Table("stage", box=box.SIMPLE, pad_edge=False)
    for head in ("images/s", "±", "CPU ms"):
        table.add_column(head, justify="right", no_wrap=True)
    for row in stage_rows(profile):
        name = f"{row.stage} *" if row.is_bottleneck else row.stage
        table.add_row(*map(Text, (name, *row[1:4])), style="bold yellow" if row.is_bottleneck else "")
    return table


def _time_table(profile: Profile) -> Table:
    table = Table("where the time goes", box=box.SIMPLE, pad_edge=False)
    for head in ("ms/image", "share"):
        table.add_column(head, justify="right", no_wrap=True)
    whole, *parts = time_rows(profile)
    table.add_row(*whole)
    for row in parts:
        table.add_row(f"  {row.part}", row.milliseconds, row.share)
    return table


def _pairs(lines: dict[str, str]) -> Table:
    table = Table(box=None, show_header=False, pad_edge=False)
    table.add_column(style="dim", overflow="fold")
    table.add_column(overflow="fold")
    for name, value in lines.items():
        table.add_row(name, Text(value))
    return table
