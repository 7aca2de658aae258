"""A profile on a terminal: the verdict, the legs, the step's parts, what was not measured, remarks."""

import math
from typing import NamedTuple

from rich import box
from rich.console import Group, RenderableType
from rich.padding import Padding
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from fastssl.common.terminal import printable
from fastssl.profiling.result import RATE, figure, leg_of, limiting_leg, median, missing_legs, step_parts

HEALTHY = 0.9  # of the accelerator's utilisation: below, training is worth speeding up outside the model
MANY_PAGE_FAULTS = 5000  # of a step: a hundredth of a second
WORTH_SAYING = 1.01  # times as fast: what a leg twice as fast must give to be named


class LegRow(NamedTuple):
    """A leg in words."""

    leg: str
    rate: str  # images a second
    spread: str  # half the range of the windows, % of the median
    cpu: str  # CPU-ms an image, over all threads
    says: str
    is_limit: bool


def profile_table(profile: dict, width: int) -> RenderableType:
    """All that a profile says, for a terminal of so many columns."""
    parts = [
        Panel(Text(printable(profile["verdict"]["sentence"]), style="bold"), box=box.HEAVY, width=width),
        Text(subject(profile), style="dim"),
        Text(),
        _pairs(headline(profile)),
        *[legs_table(profile)] * bool(leg_rows(profile)),
        *step_table(profile),
    ]
    if missing := missing_legs(profile):
        lines = [(printable(leg), printable(why)) for leg, why in missing.items()]
        parts += [Text("Not measured", style="bold"), Padding(_pairs(lines), (0, 0, 1, 0))]
    parts += [Text(f"* {printable(remark)}") for remark in profile["remarks"]]
    return Group(*parts)


def subject(profile: dict) -> str:
    """What was profiled, on what."""
    machine, run = profile["machine"], profile["run"]
    processes = f", {machine['processes']} processes" if machine["processes"] > 1 else ""
    compiled = ", compiled" if run["compiled"] else ""
    return printable(
        f"{profile['name']} on {machine['device']} ({machine['cores']} cores{processes}): "
        f"{run['precision']}{compiled}, batch {run['batch_size']:,}, {run['workers']} workers, "
        f"{run['views']} views of {run['size']} px, {si(run['parameters'])} parameters; "
        f"{profile['data']['images']:,} images"
    )


def headline(profile: dict) -> list[tuple[str, str]]:
    """The figures that come first, each with its name."""
    verdict, limits = profile["verdict"], profile["limits"]
    lines = []
    if (share := verdict["accelerator_utilisation"]) is not None:
        lines.append(("accelerator utilisation", f"{percent(share)} (healthy from {percent(HEALTHY)})"))
    if measured := limits["measured_images_per_second"]:
        lines.append(("end to end", f"{significant(measured)} images/s measured"))
    if predicted := limits["predicted_images_per_second"]:
        error = "" if limits["error"] is None else f" ({100 * limits['error']:+.1f} %)"
        lines.append(("predicted from the legs", f"{significant(predicted)} images/s{error}"))
    if after := verdict["next"]:
        rate, then = significant(after["images_per_second"]), leg_of(printable(after["cause"]))
        lines.append(("with that limit lifted", f"{rate} images/s, then limited by {then}"))
    if predicted and verdict["twice_as_fast"]:
        ordered = sorted(verdict["twice_as_fast"].items(), key=lambda item: -item[1])
        gains = [
            f"{leg_of(cause)} {100 * (rate / predicted - 1):+.0f} %"
            for cause, rate in ordered
            if rate >= WORTH_SAYING * predicted
        ]
        lines.append(("one leg twice as fast", ", ".join(gains) or "none would give 1 % more"))
    return lines


def legs_table(profile: dict) -> Table:
    """Each leg alone, the limiting one marked."""
    table = Table("leg", box=box.SIMPLE, pad_edge=False)
    table.add_column("images/s", justify="right", overflow="fold")
    table.add_column("spread", justify="right", overflow="fold")
    table.add_column("CPU-ms\nan image", justify="right", overflow="fold")
    table.add_column("", overflow="fold")
    for row in leg_rows(profile):
        table.add_row(*map(Text, row[:5]), style="bold yellow" if row.is_limit else "")
    return table


def leg_rows(profile: dict) -> list[LegRow]:
    """The legs that were measured."""
    rows, limit = [], limiting_leg(profile)
    for name, leg in profile["legs"].items():
        if rate := leg.get(RATE):
            spread = f"± {50 * (rate['high'] - rate['low']) / rate['median']:.1f} %"
            cpu = median(profile, name, "cpu_seconds")
            says = ["the limit"] * (name == limit) + details(profile, name)
            cpu = "" if cpu is None else significant(1000 * cpu)
            rows.append(LegRow(name, significant(rate["median"]), spread, cpu, ", ".join(says), name == limit))
    return rows


def details(profile: dict, name: str) -> list[str]:
    """What a leg says beside its rate."""
    leg, says = profile["legs"][name], []
    if name == "storage" and (cached := profile["data"]["in_page_cache"]) is not None:
        says.append(f"{percent(cached)} of the file in memory")
    if cold := leg.get("cold_bytes_per_second"):
        says.append(f"cold {si(cold['median'], 'B/s')}")
    if warm := leg.get("warm_bytes_per_second"):
        says.append(f"from the page cache {si(warm['median'], 'B/s')}")
    if workers := leg.get("workers"):
        most = max(workers, key=int)
        times = f", {workers[most]['median'] / workers['1']['median']:.2f}x of one" if "1" in workers else ""
        says.append(f"{most} worker{'s' * (most != '1')}" + times * (most != "1"))
    if leg.get("knee"):
        says.append(f"knee at {leg['knee']}")
    if moved := leg.get("bytes_per_second"):
        peak = leg.get("peak_bytes_per_second")
        says.append(si(moved["median"], "B/s") + (f" of {si(peak, 'B/s')}" if peak else ""))
    if leg.get("kernels"):
        says.append(f"{leg['kernels']:,.0f} kernels a batch")
    if leg.get("bytes_per_image"):
        says.append(f"{si(leg['bytes_per_image'], 'B')} an image")
    if leg.get("flops_per_second"):
        says.append(si(leg["flops_per_second"], "FLOP/s"))
    if leg.get("mfu") is not None:
        says.append(f"{percent(leg['mfu'])} of the peak (MFU)")
    if leg.get("peak_memory_bytes"):
        says.append(f"{si(leg['peak_memory_bytes'], 'B')} of memory")
    if leg.get("page_faults", 0) >= MANY_PAGE_FAULTS:
        says.append(f"{leg['page_faults']:,.0f} page faults a step")
    if wait := leg.get("data_wait"):
        says.append(f"waits {percent(wait['median'])} of the time")
    if waits := leg.get("wait_seconds"):
        times = "/".join(significant(1000 * waits[p], 2) for p in ("p50", "p95", "p99"))
        says.append(f"p50/p95/p99 {times} ms")
    if leg.get("cores_busy") is not None:
        says.append(f"cores {percent(leg['cores_busy'])} busy")
    gpu = leg.get("gpu") or {}
    if gpu.get("utilisation") is not None:
        says.append(f"GPU {percent(gpu['utilisation'])} busy")
    if gpu.get("sm_clock_mhz"):
        most = f" of {gpu['max_sm_clock_mhz']:,.0f}" if gpu.get("max_sm_clock_mhz") else ""
        says.append(f"{gpu['sm_clock_mhz']:,.0f}{most} MHz")
    if gpu.get("power_w"):
        says.append(f"{gpu['power_w']:,.0f} W")
    return says


def step_table(profile: dict) -> list[RenderableType]:
    """What the device's time goes to, with a note; nothing where that is not known."""
    if not (rows := step_rows(profile)):
        return []
    note = figure(profile, "step", "phases_note")
    table = Table("the device's time", box=box.SIMPLE, pad_edge=False)
    table.add_column("ms an image", justify="right")
    table.add_column("share", justify="right")
    for row in rows:
        table.add_row(*map(Text, row))
    return [table, Padding(Text(printable(note), style="dim"), (0, 0, 1, 0))] if note else [table]


def step_rows(profile: dict) -> list[tuple[str, str, str]]:
    """Part, ms an image, share of all parts."""
    parts = step_parts(profile)
    total = sum(parts.values()) or 1.0
    return [(name, significant(1000 * seconds), percent(seconds / total)) for name, seconds in parts.items()]


def _pairs(lines: list[tuple[str, str]]) -> Table:
    table = Table(box=None, show_header=False, pad_edge=False)
    table.add_column(style="dim", overflow="fold")
    table.add_column(overflow="fold")
    for line in lines:
        table.add_row(*map(Text, line))
    return table


def significant(value: float, digits: int = 3) -> str:
    """A number of at least 0 with so many significant digits (of whole numbers all), without an exponent."""
    if value <= 0:
        return "0"
    decimals = digits - 1 - math.floor(math.log10(value))
    return f"{value:,.{min(max(decimals, 0), 9)}f}"


def percent(share: float) -> str:
    """Whole percents, with a decimal below 10 %."""
    return f"{100 * share:.{0 if share >= 0.0995 else 1}f} %"


def si(value: float, unit: str = "") -> str:
    """With a prefix: 12.1 GB/s."""
    power = min(max(int(math.log10(value) / 3), 0), 5) if value > 0 else 0
    return f"{significant(value / 1000**power)} {['', 'k', 'M', 'G', 'T', 'P'][power]}{unit}".strip()
