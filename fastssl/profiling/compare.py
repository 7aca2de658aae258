"""Two profiles beside each other: what differs between them, which rates moved, and whether that is more than noise.

A rate moved beyond noise where the windows of the two do not overlap and the medians differ by more than 2 %. Of three
windows each, all alike, those of one side lie all above or all below the other's in 2 of 20 orders: 1 in 10. So of
thirty rates, up to three may seem to have moved when nothing did, fewer with the 2 %.
"""

import json
from dataclasses import dataclass
from math import comb
from typing import Literal

from rich import box
from rich.console import Group
from rich.table import Table
from rich.text import Text

from fastssl.common.terminal import printable
from fastssl.profiling.result import RATE, figure, limiting_leg, why_missing
from fastssl.profiling.tables import percent, si, significant

LEAST_DIFFERENCE = 0.02  # of the medians, relative to a's
SECTIONS = ("environment", "machine", "run", "data", "recipe")  # of a profile: what a difference may come from
# Measured anew each time, or different for every file:
LEFT_OUT = {"machine.peak_flops", "data.in_page_cache", "recipe.run.dir"}
MOST_DIFFERENCES = 30  # shown
Unit = Literal["images/s", "ms an image", "B/s", "%"]


@dataclass(frozen=True)
class Change:
    """One figure of two profiles, in the units of the profile."""

    name: str  # for a person
    unit: Unit  # as it is shown
    a: dict | None  # its median and windows; None: not measured there. Without windows it cannot be judged
    b: dict | None
    higher_is_better: bool = True

    @property
    def ratio(self) -> float | None:
        """b / a; None where one is missing or a is 0."""
        return self.b["median"] / self.a["median"] if self.a and self.b and self.a["median"] > 0 else None

    @property
    def beyond_noise(self) -> bool | None:
        """None: cannot be judged."""
        if not (self.a and self.b and self.a["windows"] and self.b["windows"]):
            return None
        a, b = self.a["windows"], self.b["windows"]
        is_apart = max(a) < min(b) or max(b) < min(a)
        return is_apart and abs(self.b["median"] - self.a["median"]) > LEAST_DIFFERENCE * self.a["median"]

    @property
    def word(self) -> str:
        """What happened: better, worse, no (not beyond noise), or why that cannot be said."""
        if not self.a or not self.b:
            return f"not in {'A' if not self.a else 'B'}"
        if self.beyond_noise is None:
            return "not judged"
        if not self.beyond_noise:
            return "no"
        return "better" if (self.b["median"] > self.a["median"]) == self.higher_is_better else "worse"


def compare(a: dict, b: dict) -> list[Change]:
    """All rates that one of the two profiles has, in the order of the legs."""
    changes = [Change("accelerator utilisation", "%", _utilisation(a), _utilisation(b))]
    for leg in dict.fromkeys([*a["legs"], *b["legs"]]):
        changes.append(Change(leg, "images/s", figure(a, leg), figure(b, leg)))
        for name, key in (("cold", "cold_bytes_per_second"), ("from the page cache", "warm_bytes_per_second")):
            changes.append(Change(f"{leg}, {name}", "B/s", figure(a, leg, key), figure(b, leg, key)))
        workers_a, workers_b = (figure(x, leg, "workers") or {} for x in (a, b))
        for count in sorted({*workers_a, *workers_b}, key=int):
            name = f"{leg}, {count} worker{'s' * (count != '1')}"
            changes.append(Change(name, "images/s", workers_a.get(count), workers_b.get(count)))
        phases_a, phases_b = (figure(x, leg, "phases") or {} for x in (a, b))
        for phase in dict.fromkeys([*phases_a, *phases_b]):
            before, after = phases_a.get(phase), phases_b.get(phase)
            changes.append(Change(f"{leg}, {phase}", "ms an image", before, after, higher_is_better=False))
        waits = [figure(x, leg, "data_wait") for x in (a, b)]
        changes.append(Change(f"{leg}, waits for data", "%", *waits, higher_is_better=False))
    return [change for change in changes if change.a or change.b]


def _utilisation(profile: dict) -> dict | None:
    """With a window for each round of the measurement, in which the legs take turns."""
    if (share := profile["verdict"]["accelerator_utilisation"]) is None:
        return None
    end, ceiling = ((figure(profile, leg) or {"windows": []})["windows"] for leg in ("end_to_end", "replay"))
    windows = [min(1.0, a / b) for a, b in zip(end, ceiling)] if len(end) == len(ceiling) else []
    return {"median": share, "windows": windows}


def differences(a: dict, b: dict) -> list[tuple[str, str, str]]:
    """Dotted key, value in a, value in b: what differs in versions, machine, run, data and recipe."""
    flat_a, flat_b = _conditions(a), _conditions(b)
    keys = [key for key in dict.fromkeys([*flat_a, *flat_b]) if flat_a.get(key) != flat_b.get(key)]
    return [tuple(map(printable, (key, flat_a.get(key, "-"), flat_b.get(key, "-")))) for key in keys]


def _conditions(profile: dict) -> dict[str, str]:
    """What the figures depend on, by dotted key; values as JSON, but words as they are."""
    flat = {"fastssl": profile["fastssl"]}
    for section in SECTIONS:
        flat |= _flatten(profile[section], section)
    flat = {key: value for key, value in flat.items() if key not in LEFT_OUT}
    if (cached := profile["data"].get("in_page_cache")) is not None:
        flat["data.in_page_cache"] = f"about {10 * round(10 * cached)} %"
    return flat


def _flatten(value: object, key: str) -> dict[str, str]:
    if isinstance(value, dict) and value:
        return {inner: text for name, x in value.items() for inner, text in _flatten(x, f"{key}.{name}").items()}
    return {key: value if isinstance(value, str) else json.dumps(value)}


def compare_table(a_name: str, b_name: str, a: dict, b: dict) -> Group:
    """What differs, then the rates of both, with what changed beyond noise."""
    parts = [Text(f"A  {printable(a_name)}, {printable(a['made'])}")]
    parts += [Text(f"B  {printable(b_name)}, {printable(b['made'])}"), Text()]
    parts += [_differences_table(differences(a, b)), Text(_verdicts(a, b), style="bold")]
    changes = compare(a, b)
    table = Table("", box=box.SIMPLE, pad_edge=False, caption=_caption(changes), caption_justify="left")
    for head in ("A", "B", "B / A"):
        table.add_column(head, justify="right", overflow="fold")
    table.add_column("unit")
    table.add_column("beyond noise", overflow="fold")
    for change in changes:
        ratio = "" if change.ratio is None else f"{significant(change.ratio)}x"
        cells = [change.name, _cell(change, change.a), _cell(change, change.b), ratio, change.unit, change.word]
        style = {"better": "green", "worse": "red"}.get(change.word, "")
        table.add_row(*map(Text, cells), style=style)
    reasons = [Text(f"{name}: {printable(why)}", style="dim") for name, why in _reasons(a, b).items()]
    return Group(*parts, table, *reasons)


def _verdicts(a: dict, b: dict) -> str:
    cause_a, cause_b = (printable(limiting_leg(x)) for x in (a, b))
    if cause_a == cause_b:
        return f"The limit is the same: {cause_a}."
    return f"The limit changed: {cause_a} in A, {cause_b} in B."


def _differences_table(rows: list[tuple[str, str, str]]) -> Text | Group:
    if not rows:
        return Text("The two do not differ in machine, versions, data or recipe.\n")
    table = Table("differs, and may be the cause", box=box.SIMPLE, pad_edge=False)
    table.columns[0].overflow = "fold"
    for head in ("A", "B"):
        table.add_column(head, overflow="fold")
    for row in rows[:MOST_DIFFERENCES]:
        table.add_row(*map(Text, row))
    more = len(rows) - MOST_DIFFERENCES
    return Group(table, Text(f"and {more} more\n")) if more > 0 else Group(table)


def _cell(change: Change, figure: dict | None) -> str:
    if figure is None:
        return ""
    value = figure["median"]
    shown = {"%": percent, "ms an image": lambda x: significant(1000 * x), "B/s": lambda x: si(x)}
    return shown.get(change.unit, significant)(value)


def _reasons(a: dict, b: dict) -> dict[str, str]:
    """Why a leg is in one profile alone."""
    reasons = {}
    for leg in dict.fromkeys([*a["legs"], *b["legs"]]):
        lacking = [name for name, x in (("A", a), ("B", b)) if figure(x, leg, RATE) is None]
        if len(lacking) == 1:
            reasons[f"{leg} is not in {lacking[0]}"] = why_missing(a if lacking == ["A"] else b, leg)
    return reasons


def _caption(changes: list[Change]) -> str:
    """How `beyond noise` was judged, and how often it errs."""
    rule = (
        "Beyond noise: the windows of A and B do not overlap, and their medians differ by more than "
        f"{100 * LEAST_DIFFERENCE:.0f} %."
    )
    counts = [(len(x.a["windows"]), len(x.b["windows"])) for x in changes if x.beyond_noise is not None]
    if not counts:
        return rule
    fewest_a, fewest_b = min(counts, key=lambda pair: comb(sum(pair), pair[0]))
    # Of all orders of n + m equal windows, in two those of A come first or last:
    orders = comb(fewest_a + fewest_b, fewest_a)
    if min(fewest_a, fewest_b) == 1:
        return f"{rule} With a single window this says little: windows of equal rates hardly ever overlap."
    windows = f"{fewest_a} windows each" if fewest_a == fewest_b else f"{fewest_a} and {fewest_b} windows"
    return (
        f"{rule} With {windows}, equal rates do not overlap by chance once in {orders / 2:.3g} times: of these "
        f"{len(counts)} rates, about {2 * len(counts) / orders:.1f}; fewer with the {100 * LEAST_DIFFERENCE:.0f} %."
    )
