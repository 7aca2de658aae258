"""Compare two profiles: which trains faster, what changed beyond the noise, and what differs between the runs."""

import json
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from rich import box
from rich.console import Group
from rich.table import Table
from rich.text import Text

from fastssl.common.terminal import count_of
from fastssl.profiling.profile import (
    STAGES,
    Measurement,
    Profile,
    StageResult,
    accelerator_utilization,
    short_remarks,
    was_busy,
)
from fastssl.profiling.wording import PART_NAMES, STAGE_NAMES, capitalized, in_sentence, percent, si, significant, times

MIN_DIFFERENCE = 0.02  # of the medians, relative to A's
SECTIONS = ("recipe", "run", "data", "machine", "environment")  # of a profile; likely causes of a difference first
# Measured again each time, or different for every file:
LEFT_OUT = {"machine.peak_flops", "recipe.run.dir", "environment.command", "environment.slurm_job"}
# By key, another one that says the same:
SAME_FACT = {"data.path": "recipe.data.train", "run.batch_size": "recipe.train.batch_size"}
MAX_DIFFERENCES = 30  # shown
MAX_NAMED = 4  # stages in a sentence
CROPS_AND_VIEWS = f"{STAGE_NAMES['cpu_augment']} + {STAGE_NAMES['views']}"
RULE = (
    f"better or worse: the windows of time of A and B do not overlap, and their medians differ by more than "
    f"{percent(MIN_DIFFERENCE)}; else the change is noise. With three windows each, equal speeds do not overlap in one "
    "case of ten."
)
Unit = Literal["images/s", "ms per image", "B/s", "%"]
FORMATS: dict[Unit, Callable[[float], str]] = {
    "images/s": significant,
    # A phase takes no time only as the difference of two times.
    "ms per image": lambda seconds: significant(1000 * seconds) if seconds else "noise",
    "B/s": si, "%": percent,
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
    def difference(self) -> str:
        """Of b from a, as shown: a ratio, of two shares of time the percentage points; empty if one is missing."""
        if self.unit == "%" and self.a and self.b:
            return f"{100 * (self.b.median - self.a.median):+.1f} points"
        return "" if self.ratio is None else times(self.ratio)

    @property
    def word(self) -> str:
        """better, worse, noise (the change is within it), or where the quantity was measured."""
        if not self.a or not self.b:
            return "only in A" if self.a else "only in B"
        overlap = max(self.a.windows) >= min(self.b.windows) and max(self.b.windows) >= min(self.a.windows)
        if overlap or abs(self.b.median - self.a.median) <= MIN_DIFFERENCE * self.a.median:
            return "noise"
        is_lower_better = self.unit == "ms per image" or self.name == PART_NAMES["wait for data"]
        return "better" if (self.b.median < self.a.median) == is_lower_better else "worse"


def compare(a: Profile, b: Profile) -> list[Change]:
    """Return every quantity that at least one of the profiles has, in the order of the stages. The sum of crops and
    views is among them where another stage makes the crops."""
    counts = {count for p in (a, b) for stage in p.stages.by_name().values() for count in stage.workers or {}}
    in_a, in_b = (measurements(profile, sorted(counts)) for profile in (a, b))
    names = dict.fromkeys([*in_a, *in_b])
    changes = [Change(name, unit, in_a.get((name, unit)), in_b.get((name, unit))) for name, unit in names]
    changes = [change for change in changes if change.a or change.b]
    return [change for change in changes if change.name != CROPS_AND_VIEWS or a.data.crop != b.data.crop]


def measurements(profile: Profile, thread_counts: list[int]) -> dict[tuple[str, Unit], Measurement | None]:
    """Return every quantity by its name and the unit that it is shown in; None where it was not measured, so that
    the quantities of all profiles are in one order."""
    utilization = accelerator_utilization(profile.stages)
    found: dict[tuple[str, Unit], Measurement | None] = {}
    for key, stage in profile.stages.by_name().items():
        name = STAGE_NAMES[key]
        found[name, "images/s"] = stage.images_per_second
        if key == "views":
            found[CROPS_AND_VIEWS, "images/s"] = _one_after_the_other(profile.stages.cpu_augment, stage)
        if key == "storage":
            found[name, "B/s"] = stage.cold_bytes_per_second
            found["reading from page cache", "B/s"] = stage.warm_bytes_per_second
        if key in ("decode", "copy_images"):
            for count in thread_counts:
                found[f"{name}, {count_of(count, 'thread')}", "images/s"] = (stage.workers or {}).get(count)
        if key == "step":
            phases = stage.phases or {}
            for phase in dict.fromkeys([*PART_NAMES, *phases]):
                found[PART_NAMES.get(phase, phase), "ms per image"] = phases.get(phase)
        if stage.data_wait:
            found[PART_NAMES["wait for data"], "%"] = stage.data_wait
    found["accelerator utilization", "%"] = utilization
    return found


def _one_after_the_other(*stages: StageResult) -> Measurement | None:
    """Return the rate of those stages that were measured, if an image goes through one after the other."""
    rates = [stage.images_per_second.windows for stage in stages if stage.images_per_second]
    return Measurement.of([1 / sum(1 / rate for rate in window) for window in zip(*rates)]) if rates else None


def differences(a: Profile, b: Profile) -> list[tuple[str, str, str]]:
    """Return what differs in versions, machine, run, data and recipe: dotted key, value in a, value in b."""
    flat_a, flat_b = _conditions(a), _conditions(b)
    keys = [key for key in dict.fromkeys([*flat_a, *flat_b]) if flat_a.get(key) != flat_b.get(key)]
    rows = {key: (flat_a.get(key, "-"), flat_b.get(key, "-")) for key in keys}
    return [(key, *values) for key, values in rows.items() if rows.get(SAME_FACT.get(key, "")) != values]


def _conditions(profile: Profile) -> dict[str, str]:
    """Return what the measurements depend on, by dotted key."""
    sections = profile.model_dump()
    if (cached := profile.data.in_page_cache) is not None:
        sections["data"]["in_page_cache"] = f"about {10 * round(10 * cached)} %"
    flat = {key: value for name in SECTIONS for key, value in _flatten(sections[name], name).items()}
    flat["fastssl"] = profile.fastssl_version
    return {key: value for key, value in flat.items() if key not in LEFT_OUT}


def _flatten(value: object, key: str) -> dict[str, str]:
    if isinstance(value, dict) and value:
        return {inner: text for name, x in value.items() for inner, text in _flatten(x, f"{key}.{name}").items()}
    return {key: value if isinstance(value, str) else json.dumps(value)}


def compare_table(a_name: str, b_name: str, a: Profile, b: Profile) -> Group:
    """Return which trains faster, what changed, what makes this uncertain, all rates, and what differs, for a
    terminal."""
    changes = compare(a, b)
    busy = [name for name, profile in (("A", a), ("B", b)) if was_busy(profile)]
    remarks = {"A": short_remarks(a), "B": short_remarks(b)}
    reasons = []
    for name, in_a in a.stages.by_name().items():
        in_b = b.stages.by_name()[name]
        if bool(in_a.rate) != bool(in_b.rate):
            without, reason = ("B", in_b.reason) if in_a.rate else ("A", in_a.reason)
            reasons.append(Text(f"{capitalized(STAGE_NAMES[name])} is not in {without}: {reason}", style="dim"))
    return Group(
        Text(_verdict(changes, busy), style="bold"),
        *(Text(line) for line in (_bottlenecks(a, b), *_changed(changes, busy), *_moved_crops(a, b))),
        *(Text(f"Note on {name}: {text}", style="yellow") for name, text in remarks.items() if text),
        Text(f"\nA  {a_name}, {a.measured_at}\nB  {b_name}, {b.measured_at}", style="dim"),
        _rates_table(changes),
        Text(RULE, style="dim"),
        *reasons, Text(), *_differences_table(differences(a, b)),
    )  # fmt: skip


def _verdict(changes: list[Change], busy: list[str]) -> str:
    """Return which of the two trains faster. busy: in which of them something else may have run."""
    training = next(change for change in changes if change.name == STAGE_NAMES["end_to_end"])
    if not training.a or not training.b or not training.ratio:
        return "The speed of training was not measured in both profiles."
    a, b = significant(training.a.median), significant(training.b.median)
    if training.word == "noise":
        return f"A and B train equally fast, within the noise: {a} and {b} images/s."
    load = f", perhaps because of {_load_of(busy)}" if busy else ""
    if training.ratio > 1:
        return f"B trains {times(training.ratio)} faster{load}: {b} images/s instead of {a}."
    return f"B trains {times(1 / training.ratio)} slower{load}: {b} images/s instead of {a}."


def _load_of(busy: list[str]) -> str:
    return f"the load of the machine in {' and '.join(busy)}"


def _bottlenecks(a: Profile, b: Profile) -> str:
    in_a, in_b = (
        in_sentence(p.bottleneck.stage) if p.bottleneck.stage in STAGES else "no single stage" for p in (a, b)
    )
    if in_a == in_b:
        return f"The bottleneck is the same: {in_a}."
    return f"The bottleneck changed: {in_a} in A, {in_b} in B."


def _changed(changes: list[Change], busy: list[str]) -> list[str]:
    """Return one sentence for the stages that became faster, and one for those that became slower: the whole loader
    first, then the largest change of an image's time. Phases of the step and numbers of threads are in the table
    only."""
    loader = STAGE_NAMES["loader"]
    stages = set(STAGE_NAMES.values()) - {STAGE_NAMES["replay"], STAGE_NAMES["end_to_end"]}
    if any(change.name == CROPS_AND_VIEWS for change in changes):  # alone, the one that has lost the crops is faster
        stages = stages - {STAGE_NAMES["cpu_augment"], STAGE_NAMES["views"]} | {CROPS_AND_VIEWS}
    saved = {}  # what a sentence says of a stage -> ms per image
    for change in changes:
        is_stage = change.unit == "images/s" and change.name in stages
        if is_stage and change.a and change.b and change.ratio and change.word in ("better", "worse"):
            milliseconds = 1000 / change.a.median - 1000 / change.b.median
            speedup = times(max(change.ratio, 1 / change.ratio))
            less = "less" if milliseconds > 0 else "more"
            saved[f"{change.name} {speedup} ({significant(abs(milliseconds))} ms per image {less})"] = milliseconds
    largest_first = sorted(saved, key=lambda name: (not name.startswith(loader), -abs(saved[name])))
    faster = [name for name in largest_first if saved[name] > 0]
    slower = [name for name in largest_first if saved[name] < 0]
    if not saved:
        return ["No stage changed by more than the noise."]
    sentences = []
    cause = f"beyond the noise, or because of {_load_of(busy)}" if busy else "beyond the noise"
    for word, names in (("Faster", faster), ("Slower", slower)):
        more = f" and {len(names) - MAX_NAMED} more" if len(names) > MAX_NAMED else ""
        if names:
            sentences.append(f"{word} in B, {cause}: {', '.join(names[:MAX_NAMED])}{more}.")
    return sentences


def _moved_crops(a: Profile, b: Profile) -> list[str]:
    """Return a sentence where the stage that makes the crops is another one."""
    if a.data.crop == b.data.crop:
        return []
    stages = {"cpu": "cpu_augment", "gpu": "views"}
    made = [STAGE_NAMES.get(stages.get(profile.data.crop, ""), "another stage") for profile in (a, b)]
    return [f"The crops are a part of {made[0]} in A and of {made[1]} in B, so the sum of these two is compared, too."]


def _rates_table(changes: list[Change]) -> Table:
    """Return both values of each quantity, by unit."""
    table = Table("", box=box.SIMPLE, pad_edge=False)
    for head in ("A", "B", "B / A"):
        table.add_column(head, justify="right", no_wrap=True)
    table.add_column("change", no_wrap=True)
    for unit, show in FORMATS.items():
        table.add_section()
        table.add_row("share of the time" if unit == "%" else unit, style="bold")
        for change in [change for change in changes if change.unit == unit]:
            a_cell, b_cell = (show(x.median) if x else "" for x in (change.a, change.b))
            style = {"better": "green", "worse": "red"}.get(change.word)
            table.add_row(Text(f"  {change.name}"), a_cell, b_cell, change.difference, change.word, style=style)
    return table


def _differences_table(rows: list[tuple[str, str, str]]) -> list[Table | Text]:
    if not rows:
        return [Text("A and B do not differ in machine, versions, data or recipe.\n")]
    table = Table(box=box.SIMPLE, pad_edge=False)
    for head in ("what differs, and may be the cause", "A", "B"):
        table.add_column(head, overflow="fold", min_width=12)
    for row in rows[:MAX_DIFFERENCES]:
        table.add_row(*map(Text, row))
    more = len(rows) - MAX_DIFFERENCES
    return [table, Text(f"and {more} more\n")] if more > 0 else [table]
