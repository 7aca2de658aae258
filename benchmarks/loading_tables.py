"""The tables of benchmarks/loading.py, as Markdown, from what its lines measured."""

import re
import statistics
from pathlib import Path
from typing import NamedTuple, NotRequired, TypedDict


class Row(TypedDict):
    """One measurement of one line, or why there is none: a line of the file of results."""

    run: str  # when the run began
    task: str
    line: str
    round: int
    versions: str  # of the run: machine, packages
    rate: NotRequired[float]  # and the others of `loading_shared.Measured`
    per_core_second: NotRequired[float]
    memory: NotRequired[float]
    output: NotRequired[str]
    error: NotRequired[str]


class Says(NamedTuple):
    """What a table says of a line in addition to its figures."""

    source: str
    flip: str = "yes"
    antialiased: str = "yes"
    ours: bool = False
    bound: bool = False  # not a loader: no peer


class TaskSays(NamedTuple):
    """What a table says of a task."""

    title: str
    lines: dict[str, Says]


def latest(rows: list[Row], task: str) -> dict[str, list[Row]]:
    """The rows of the last run that measured the task, by line."""
    of_task = [row for row in rows if row["task"] == task]
    run = max((row["run"] for row in of_task), default="")
    found: dict[str, list[Row]] = {}
    for row in of_task:
        if row["run"] == run:
            found.setdefault(row["line"], []).append(row)
    return found


def rates(rows: list[Row]) -> dict[int, float]:
    """Images per second by round."""
    return {row["round"]: row["rate"] for row in rows if "rate" in row}


def median_rate(rows: list[Row]) -> float:
    return statistics.median(rates(rows).values())


def best_peer(task: TaskSays, found: dict[str, list[Row]]) -> str | None:
    """The fastest line that is neither ours nor a bound, by the median."""
    peers = [
        name
        for name, says in task.lines.items()
        if not (says.ours or says.bound) and rates(found.get(name, []))
    ]  # fmt: skip
    return max(peers, key=lambda name: median_rate(found[name]), default=None)


def ratio(ours: list[Row], peer: list[Row]) -> float | None:
    """The median over the rounds that both have, None if there is no such round."""
    own, other = rates(ours), rates(peer)
    ratios = [own[number] / other[number] for number in own.keys() & other.keys()]
    return statistics.median(ratios) if ratios else None


def times(ours: list[Row], peer: list[Row], decimals: int) -> str:
    found = ratio(ours, peer)
    return "" if found is None else f"{found:.{decimals}f}x"


def our_lines(task: TaskSays, found: dict[str, list[Row]]) -> list[str]:
    return [name for name, says in task.lines.items() if says.ours and rates(found.get(name, []))]


def task_table(task: TaskSays, found: dict[str, list[Row]]) -> str:
    """All lines of a task, the fastest first; the best peer is bold."""
    best, ours = best_peer(task, found), our_lines(task, found)
    columns = ["", "from", "gives", "flipped", "antialiased", "images/s, median (range)", "per core-second"]
    columns += [f"{name} is" for name in ours] + ["memory, MB"]
    text = [f"| {' | '.join(columns)} |", "|---" * len(columns) + "|"]
    measured = {name: rows for name, rows in found.items() if name in task.lines and rates(rows)}
    for name, rows in sorted(measured.items(), key=lambda item: -median_rate(item[1])):
        says = task.lines[name]
        figures = [row for row in rows if "rate" in row]
        middle = {key: statistics.median(row[key] for row in figures) for key in ("per_core_second", "memory")}
        low, high = min(rates(rows).values()), max(rates(rows).values())
        cells = [
            f"**{name}**" if name == best else name,
            says.source,
            figures[0]["output"],
            says.flip,
            says.antialiased,
        ]
        cells += [f"{median_rate(rows):,.0f} ({low:,.0f} to {high:,.0f})", f"{middle['per_core_second']:,.0f}"]
        cells += ["" if name == own else times(found[own], rows, 2) for own in ours]
        cells.append(f"{middle['memory']:,.0f}")
        text.append(f"| {' | '.join(cells)} |")
    for name in task.lines:
        if name in found and name not in measured:
            text.append(f"| {name} | not measured: {found[name][0].get('error', '')} |" + " |" * (len(columns) - 2))
    anything = next(iter(found.values()))[0]
    rounds = sorted({len(rows) for rows in measured.values()})
    text += ["", f"{anything['versions']}; {' to '.join(map(str, rounds))} rounds; {anything['run']}."]
    return "\n".join(text) + "\n"


def summary_table(tasks: dict[str, TaskSays], rows: list[Row]) -> str:
    """A row for each task: ours, the best peer, and how many times its rate ours is."""
    text = ["| images per second | fastssl | best peer | fastssl is |", "|---|---|---|---|"]
    for key, task in tasks.items():
        found = latest(rows, key)
        best, ours = best_peer(task, found), our_lines(task, found)
        if not best or not ours:
            continue
        # With one line the name says nothing that the header does not say.
        names = [name.removeprefix("fastssl").strip(", ") if len(ours) > 1 else "" for name in ours]
        own = [f"{name} {median_rate(found[line]):,.0f}".strip() for name, line in zip(names, ours)]
        ahead = [f"{name} {times(found[line], found[best], 1)}".strip() for name, line in zip(names, ours)]
        text.append(
            f"| {task.title} | {', '.join(own)} | {median_rate(found[best]):,.0f} {best} | {', '.join(ahead)} |"
        )
    return "\n".join(text) + "\n"


def replace_block(path: Path, name: str, text: str) -> bool:
    """Put text between the two comments that name the block. False if the file has no such block."""
    begin, end = (f"<!-- {which} of benchmarks/loading.py, {name} -->\n" for which in ("begin", "end"))
    before = path.read_text()
    block = re.compile(re.escape(begin) + ".*?" + re.escape(end), re.DOTALL)
    if not block.search(before):
        return False
    path.write_text(block.sub(lambda _: begin + text + end, before))
    return True
