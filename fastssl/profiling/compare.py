"""Compare two profiles: what differs between the runs, which rates changed, and whether a change exceeds the noise."""

import json
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from rich import box
from rich.console import Group
from rich.table import Table
from rich.text import Text

from fastssl.profiling.profile import Measurement, Profile, accelerator_utilization
from fastssl.profiling.wording import percent, si, significant

MIN_DIFFERENCE = 0.02  # of the medians, relative to A's
SECTIONS = ("environment", "machine", "run", "data", "recipe")  # of a profile, which may cause a difference
# Measured again each time, or different for every file:
LEFT_OUT = {"machine.peak_flops", "data.in_page_cache", "recipe.run.dir"}
MAX_DIFFERENCES = 30  # shown
Unit = Literal["images/s", "ms per image", "B/s", "%"]
FORMATS: dict[Unit, Callable[[float], str]] = {
    "images/s": significant, "ms per image": lambda seconds: significant(1000 * seconds), "B/s": si, "%": percent,
}  # fmt: skip


@dataclass(frozen=True)
class Change:
    """One quantity in two profiles, in the profile's units; None where it was not measured."""

    name: str
    unit: Unit  # as shown
    a: Measurement | None
    b: Measurement | None

    @property
    def ratio(self) -> float | None:
        """b / a; None if one is missing or a is 0."""
        return self.b.median / self.a.median if self.a and self.b and self.a.median > 0 else None

    @property
    def word(self) -> str:
        """better, worse, no (within the noise), or where the quantity is missing."""
        if not self.a or not self.b:
            return "not in B" if self.a else "not in A"
        overlap = max(self.a.windows) >= min(self.b.windows) and max(self.b.windows) >= min(self.a.windows)
        if overlap or abs(self.b.median - self.a.median) <= MIN_DIFFERENCE * self.a.median:
            return "no"
        is_lower_better = self.unit == "ms per image" or "waits" in self.name
        return "better" if (self.b.median < self.a.median) == is_lower_better else "worse"


def compare(a: Profile, b: Profile) -> list[Change]:
    """Return every quantity that at least one of the profiles has, in the order of the stages."""
    in_a, in_b = measurements(a), measurements(b)
    names = dict.fromkeys([*in_a, *in_b])
    return [Change(name, unit, in_a.get((name, unit)), in_b.get((name, unit))) for name, unit in names]


def measurements(profile: Profile) -> dict[tuple[str, Unit], Measurement]:
    """Return every measured quantity by its name and the unit that it is shown in."""
    utilization = accelerator_utilization(profile.stages)
    found: dict[tuple[str, Unit], Measurement | None] = {("accelerator utilization", "%"): utilization}
    for name, stage in profile.stages.by_name().items():
        found[name, "images/s"] = stage.images_per_second
        found[f"{name}, cold", "B/s"] = stage.cold_bytes_per_second
        found[f"{name}, from the page cache", "B/s"] = stage.warm_bytes_per_second
        for count, rate in sorted((stage.workers or {}).items()):
            found[f"{name}, {count} worker{'s' if count > 1 else ''}", "images/s"] = rate
        for phase, seconds in (stage.phases or {}).items():
            found[f"{name}, {phase}", "ms per image"] = seconds
        found[f"{name}, waits for data", "%"] = stage.data_wait
    return {key: measured for key, measured in found.items() if measured}


def differences(a: Profile, b: Profile) -> list[tuple[str, str, str]]:
    """Return what differs in versions, machine, run, data and recipe: dotted key, value in a, value in b."""
    flat_a, flat_b = _conditions(a), _conditions(b)
    keys = [key for key in dict.fromkeys([*flat_a, *flat_b]) if flat_a.get(key) != flat_b.get(key)]
    return [(key, flat_a.get(key, "-"), flat_b.get(key, "-")) for key in keys]


def _conditions(profile: Profile) -> dict[str, str]:
    """Return what the measurements depend on, by dotted key."""
    sections, flat = profile.model_dump(), {"fastssl": profile.fastssl_version}
    for name in SECTIONS:
        flat |= {key: value for key, value in _flatten(sections[name], name).items() if key not in LEFT_OUT}
    if (cached := profile.data.in_page_cache) is not None:
        flat["data.in_page_cache"] = f"about {10 * round(10 * cached)} %"
    return flat


def _flatten(value: object, key: str) -> dict[str, str]:
    if isinstance(value, dict) and value:
        return {inner: text for name, x in value.items() for inner, text in _flatten(x, f"{key}.{name}").items()}
    return {key: value if isinstance(value, str) else json.dumps(value)}


def compare_table(a_name: str, b_name: str, a: Profile, b: Profile) -> Group:
    """Return what differs, then the rates of both with what changed, for a terminal."""
    stage_a, stage_b = a.bottleneck.stage, b.bottleneck.stage
    changed = f"The bottleneck changed: {stage_a} in A, {stage_b} in B."
    bottleneck = f"The bottleneck is the same: {stage_a}." if stage_a == stage_b else changed
    rule = (
        "Beyond noise: the windows of A and B do not overlap, and their medians differ by more than "
        f"{percent(MIN_DIFFERENCE)}. With three windows each, equal rates do not overlap in one case of ten."
    )
    table = Table("", box=box.SIMPLE, pad_edge=False, caption=rule, caption_justify="left")
    for head in ("A", "B", "B / A"):
        table.add_column(head, justify="right", overflow="fold")
    table.add_column("unit")
    table.add_column("beyond noise", overflow="fold")
    for change in compare(a, b):
        ratio = "" if change.ratio is None else f"{significant(change.ratio)}x"
        a_cell, b_cell = (FORMATS[change.unit](x.median) if x else "" for x in (change.a, change.b))
        style = {"better": "green", "worse": "red"}.get(change.word)
        table.add_row(Text(change.name), a_cell, b_cell, ratio, change.unit, change.word, style=style)
    reasons = []
    for name, in_a in a.stages.by_name().items():
        in_b = b.stages.by_name()[name]
        if bool(in_a.rate) != bool(in_b.rate):
            missing = f"B: {in_b.reason}" if in_a.rate else f"A: {in_a.reason}"
            reasons.append(Text(f"{name} is not in {missing}", style="dim"))
    return Group(
        Text(f"A  {a_name}, {a.measured_at}\nB  {b_name}, {b.measured_at}\n"),
        *_differences_table(differences(a, b)), Text(bottleneck, style="bold"), table, *reasons,
    )  # fmt: skip


def _differences_table(rows: list[tuple[str, str, str]]) -> list[Table | Text]:
    if not rows:
        return [Text("The two do not differ in machine, versions, data or recipe.\n")]
    table = Table(box=box.SIMPLE, pad_edge=False)
    for head in ("differs, and may be the cause", "A", "B"):
        table.add_column(head, overflow="fold")
    for row in rows[:MAX_DIFFERENCES]:
        table.add_row(*map(Text, row))
    more = len(rows) - MAX_DIFFERENCES
    return [table, Text(f"and {more} more\n")] if more > 0 else [table]
