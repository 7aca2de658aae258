"""A profile as tables: the bottleneck, the stages, the parts of the device's time, what was not measured, remarks."""

import math
from typing import NamedTuple

from rich import box
from rich.console import Group, RenderableType
from rich.padding import Padding
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from fastssl.profiling.profile import Profile, StageResult, device_time

HEALTHY = 0.9  # accelerator utilization, below which training is worth speeding up outside the model
MANY_PAGE_FAULTS = 5000  # per step; they take a hundredth of a second
WORTH_SAYING = 1.01  # speedup that a stage twice as fast must give to be named


class StageRow(NamedTuple):
    stage: str
    rate: str  # images per second
    spread: str  # half the range of the windows, in % of the median
    cpu: str  # CPU-milliseconds per image, over all threads
    details: str
    is_bottleneck: bool


def profile_table(profile: Profile, width: int) -> RenderableType:
    """Return everything that a profile says, for a terminal with `width` columns."""
    parts: list[RenderableType] = [
        Panel(Text(profile.bottleneck.sentence, style="bold"), box=box.HEAVY, width=width),
        Text(subject(profile), style="dim"),
        Text(),
        _pairs(headline(profile)),
        _stage_table(profile),
        _device_time_table(profile),
    ]
    if profile.stages.step.phases_note:
        parts.append(Padding(Text(profile.stages.step.phases_note, style="dim"), (0, 0, 1, 0)))
    if missing := {name: stage.reason for name, stage in profile.stages.by_name().items() if not stage.rate}:
        parts += [Text("Not measured", style="bold"), Padding(_pairs(missing), (0, 0, 1, 0))]
    parts += [Text(f"* {remark}") for remark in profile.remarks]
    return Group(*parts)


def subject(profile: Profile) -> str:
    """Return one line that says what was profiled, on what machine."""
    machine, run = profile.machine, profile.run
    processes = f", {machine.processes} processes" if machine.processes > 1 else ""
    compiled = ", compiled" if run.compiled else ""
    return (
        f"{profile.name} on {machine.device} ({machine.cores} cores{processes}): "
        f"{run.precision}{compiled}, batch {run.batch_size:,}, {run.workers} workers, "
        f"{run.views} views of {run.size} px, {si(run.parameters)} parameters; {profile.data.images:,} images"
    )


def headline(profile: Profile) -> dict[str, str]:
    """Return the most important numbers, by name."""
    bottleneck, prediction = profile.bottleneck, profile.prediction
    predicted = prediction.predicted_images_per_second
    lines = {
        "accelerator utilization": f"{percent(bottleneck.accelerator_utilization)} (healthy from {percent(HEALTHY)})",
        "end to end": f"{significant(prediction.measured_images_per_second)} images/s measured",
        "predicted from the stages": f"{significant(predicted)} images/s ({100 * prediction.relative_error:+.1f} %)",
    }
    if after := bottleneck.next:
        rate = significant(after.images_per_second)
        lines["without the bottleneck"] = f"{rate} images/s, then limited by {after.stage}"
    largest_first = sorted(bottleneck.twice_as_fast.items(), key=lambda item: -item[1])
    speedups = {stage: rate / predicted for stage, rate in largest_first if rate >= WORTH_SAYING * predicted}
    gains = [f"{stage} {100 * (speedup - 1):+.0f} %" for stage, speedup in speedups.items()]
    lines["one stage twice as fast"] = ", ".join(gains) or "no stage would give 1 % more"
    return lines


def _stage_table(profile: Profile) -> Table:
    table = Table("stage", box=box.SIMPLE, pad_edge=False)
    for head in ("images/s", "spread", "CPU-ms\nper image"):
        table.add_column(head, justify="right", overflow="fold")
    table.add_column("", overflow="fold")
    for row in stage_rows(profile):
        table.add_row(*map(Text, row[:5]), style="bold yellow" if row.is_bottleneck else "")
    return table


def stage_rows(profile: Profile) -> list[StageRow]:
    """Return the stages that were measured."""
    rows = []
    for name, stage in profile.stages.by_name().items():
        if rate := stage.images_per_second:
            is_bottleneck = name == profile.bottleneck.stage
            details = ["the bottleneck"] if is_bottleneck else []
            if name == "storage" and profile.data.in_page_cache is not None:
                details.append(f"{percent(profile.data.in_page_cache)} of the file in memory")
            details += _details(stage)
            spread = f"± {50 * (rate.high - rate.low) / rate.median:.1f} %"
            cpu = significant(1000 * stage.cpu_seconds.median) if stage.cpu_seconds else ""
            rows.append(StageRow(name, significant(rate.median), spread, cpu, ", ".join(details), is_bottleneck))
    return rows


def _details(stage: StageResult) -> list[str]:
    """Return what a stage has in addition to its rate."""
    details = []
    if stage.cold_bytes_per_second:
        details.append(f"cold {si(stage.cold_bytes_per_second.median, 'B/s')}")
    if stage.warm_bytes_per_second:
        details.append(f"from the page cache {si(stage.warm_bytes_per_second.median, 'B/s')}")
    if stage.workers:
        most = max(stage.workers)
        details.append(f"{most} worker{'s' if most > 1 else ''}")
        if 1 in stage.workers and most > 1:
            details.append(f"{stage.workers[most].median / stage.workers[1].median:.2f}x of one")
    if stage.knee:
        details.append(f"knee at {stage.knee}")
    if stage.bytes_per_second:
        peak = f" of {si(stage.peak_bytes_per_second, 'B/s')}" if stage.peak_bytes_per_second else ""
        details.append(si(stage.bytes_per_second.median, "B/s") + peak)
    if stage.kernels:
        details.append(f"{stage.kernels:,.0f} kernels per batch")
    if stage.bytes_per_image:
        details.append(f"{si(stage.bytes_per_image, 'B')} per image")
    if stage.flops_per_second:
        details.append(si(stage.flops_per_second, "FLOP/s"))
    if stage.mfu is not None:
        details.append(f"{percent(stage.mfu)} of the peak (MFU)")
    if stage.peak_memory_bytes:
        details.append(f"{si(stage.peak_memory_bytes, 'B')} of memory")
    if stage.page_faults and stage.page_faults >= MANY_PAGE_FAULTS:
        details.append(f"{stage.page_faults:,.0f} page faults per step")
    if stage.data_wait:
        details.append(f"waits {percent(stage.data_wait.median)} of the time")
    if waits := stage.wait_seconds:
        milliseconds = "/".join(significant(1000 * seconds, 2) for seconds in (waits.p50, waits.p95, waits.p99))
        details.append(f"p50/p95/p99 {milliseconds} ms")
    if stage.cores_busy is not None:
        details.append(f"cores {percent(stage.cores_busy)} busy")
    if gpu := stage.gpu:
        details.append(f"GPU {percent(gpu.utilization)} busy")
        details.append(f"{gpu.sm_clock_mhz:,.0f} of {gpu.max_sm_clock_mhz:,.0f} MHz, {gpu.power_w:,.0f} W")
    return details


def _device_time_table(profile: Profile) -> Table:
    parts = device_time(profile)
    total = sum(parts.values()) or 1.0
    table = Table("the device's time", box=box.SIMPLE, pad_edge=False)
    table.add_column("ms per image", justify="right")
    table.add_column("share", justify="right")
    for name, seconds in parts.items():
        table.add_row(name, significant(1000 * seconds), percent(seconds / total))
    return table


def _pairs(lines: dict[str, str]) -> Table:
    table = Table(box=None, show_header=False, pad_edge=False)
    table.add_column(style="dim", overflow="fold")
    table.add_column(overflow="fold")
    for name, value in lines.items():
        table.add_row(name, Text(value))
    return table


def significant(value: float, digits: int = 3) -> str:
    """Format a number of at least 0 with this many significant digits (all digits of whole numbers), without an
    exponent."""
    if value <= 0:
        return "0"
    decimals = digits - 1 - math.floor(math.log10(value))
    return f"{value:,.{min(max(decimals, 0), 9)}f}"


def percent(share: float) -> str:
    """Format a share in whole percents, below 10 % with one decimal."""
    return f"{100 * share:.{0 if share >= 0.0995 else 1}f} %"


def si(value: float, unit: str = "") -> str:
    """Format with an SI prefix: 12.1 GB/s."""
    power = min(max(int(math.log10(value) / 3), 0), 5) if value > 0 else 0
    return f"{significant(value / 1000**power)} {['', 'k', 'M', 'G', 'T', 'P'][power]}{unit}".strip()
