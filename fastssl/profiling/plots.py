"""A profile as one picture of four panels."""

from textwrap import wrap
from typing import TYPE_CHECKING

from fastssl.common.terminal import printable
from fastssl.profiling.resources import LINES
from fastssl.profiling.result import figure, leg_of, limiting_leg, median, missing_legs, step_parts
from fastssl.profiling.tables import percent, significant

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Okabe and Ito's colours, which the colour-blind can tell apart.
BLUE, ORANGE, GREEN, SKY, YELLOW, PINK, AMBER = (
    "#0072B2", "#D55E00", "#009E73", "#56B4E9", "#F0E442", "#CC79A7", "#E69F00",
)  # fmt: skip
GREY, LIGHT = "0.45", "0.8"
PARTS = {"wait for data": ORANGE, "views": SKY, "forward": BLUE, "draws": YELLOW, "objective": PINK, "kl": "#7B5EA7"}
PARTS |= {"backward": GREEN, "optimiser": AMBER, "communication": "0.25", "step": BLUE, "rest of the step": LIGHT}
WHOLES = ("loader", "replay", "end_to_end")  # legs that are made up of others
FAR = 20  # times: rates that differ more need a logarithmic axis
TOO_FAR = 1000  # times: a line that would squeeze everything else


def draw_profile(profile: dict) -> "Figure":
    """1400 x 1000 px at its own dpi; save it with `savefig(file, dpi="figure")` or evaluation's `save_figure`."""
    from matplotlib.figure import Figure  # here, as it takes half a second; without pyplot, no display is looked for

    drawing = Figure(figsize=(14, 10), dpi=100, layout="constrained")
    drawing.get_layout_engine().set(w_pad=0.12, h_pad=0.12)
    parts, scaling, legs, lines = drawing.subplots(2, 2).flat
    _draw_parts(parts, profile)
    _draw_scaling(scaling, profile)
    _draw_legs(legs, profile)
    _draw_lines(lines, profile)
    sentence = _wrapped(profile["verdict"]["sentence"], width=120, lines=4)
    title = _wrapped(f"{profile['name']} on {profile['machine']['device']}", width=120, lines=1)
    drawing.suptitle(f"{sentence}\n{title}", fontsize=14, parse_math=False)
    if missing := missing_legs(profile):
        text = "not measured: " + "; ".join(f"{leg} ({why.rstrip('.')})" for leg, why in missing.items())
        drawing.supxlabel(_wrapped(text, width=190, lines=4), fontsize=9, color=GREY, parse_math=False)
    return drawing


def _draw_parts(axes: "Axes", profile: dict) -> None:
    """One bar: what the device's time goes to."""
    parts = {name: 1000 * seconds for name, seconds in step_parts(profile).items()}
    axes.set_title("What the device's time goes to", fontsize=12)
    axes.set_xlabel("ms an image")
    axes.set_yticks([])
    axes.spines[["top", "left", "right"]].set_visible(False)
    total, left = sum(parts.values()), 0.0
    if total <= 0:
        return _say(axes, "not measured")
    for name, width in parts.items():
        label = f"{name}: {significant(width)} ms, {percent(width / total)}"
        axes.barh(0, width, left=left, color=PARTS.get(name, LIGHT), edgecolor="white", label=label)
        if width > 0.08 * total:
            axes.text(left + width / 2, 0.43, significant(width), ha="center", va="bottom", fontsize=9)
        left += width
    if pace := median(profile, "end_to_end"):
        label = f"end to end: {significant(1000 / pace)} ms"
        label += " (parts ran alone)" * (abs(1000 / pace - total) > 0.05 * total)
        axes.plot([1000 / pace] * 2, [-0.55, 0.55], color="black", ls="--", label=label)
    axes.set_xlim(0, 1.04 * max(total, 1000 / pace if pace else 0))
    axes.set_ylim(-2.1, 0.8)  # the legend goes below the bar
    note = figure(profile, "step", "phases_note")
    title = _wrapped(note, width=75, lines=2) if note else None
    legend = axes.legend(loc="lower center", ncols=2, frameon=False, title=title, title_fontsize=9)
    legend.get_title().set_parse_math(False)


def _draw_scaling(axes: "Axes", profile: dict) -> None:
    """Decoding by the number of threads, with the rate that the step can take."""
    axes.set_title("Decoding: how much more threads give", fontsize=12)
    axes.set_xlabel("decoding threads")
    axes.set_ylabel("images/s (median, least and most)")
    workers = figure(profile, "decode", "workers") or {}
    if not workers:
        return _say(axes, "not measured")
    points = sorted((int(count), rate) for count, rate in workers.items())
    counts, rates = [count for count, _ in points], [rate["median"] for _, rate in points]
    bars = [[rate["median"] - rate["low"] for _, rate in points], [rate["high"] - rate["median"] for _, rate in points]]
    needed = median(profile, "replay")
    is_near = needed is not None and min(rates) / TOO_FAR < needed < TOO_FAR * max(rates)
    shown = [*rates, *[needed] * is_near]
    if "1" in workers:
        ideal = [rates[0] * count for count in counts]
        axes.plot(counts, ideal, color=GREY, ls="--", label="as many times as fast as one")
        shown += ideal
    axes.errorbar(counts, rates, yerr=bars, color=BLUE, marker="o", lw=2, capsize=5, label="measured")
    for count, rate in zip(counts, rates):
        axes.annotate(
            significant(rate), (count, rate), xytext=(8, -4), textcoords="offset points", va="top", fontsize=9
        )
    knee = figure(profile, "decode", "knee")
    if str(knee) in workers:
        rate = workers[str(knee)]["median"]
        label = f"knee: {knee}" + (", the most that was tried" if knee == counts[-1] else ", more give little")
        axes.plot(knee, rate, "o", ms=16, mfc="none", mec=ORANGE, mew=2, label=label)
    if needed:
        label = f"the step can take {significant(needed)}"
        label += "" if is_near else " (far above)" if needed > max(rates) else " (far below)"
        if is_near:
            axes.axhline(needed, color=GREEN, ls=":", lw=2, label=label)
        else:
            axes.plot([], [], color=GREEN, ls=":", lw=2, label=label)
    is_far = max(shown) > FAR * min(shown)
    if is_far:
        axes.set_yscale("log")
        axes.set_ylim(min(shown) / 2, max(shown) * 2)
    else:
        axes.set_ylim(0, 1.15 * max(shown))
        axes.yaxis.set_major_formatter(lambda rate, _: significant(rate))
    if is_far or max(counts) > FAR:
        axes.set_xscale("log")
        axes.set_xlim(min(counts) / 1.4, max(counts) * 2)
    else:
        axes.margins(x=0.15)
    axes.minorticks_off()
    axes.set_xticks(counts, counts)
    axes.grid(alpha=0.3)
    axes.legend(fontsize=9)


def _draw_legs(axes: "Axes", profile: dict) -> None:
    """What each leg could carry alone."""
    axes.set_title("What each leg could carry alone: the lowest is the roof", fontsize=12)
    axes.set_xlabel("images/s")
    rates = {leg: rate for leg in profile["legs"] if leg != "end_to_end" and (rate := median(profile, leg))}
    if not rates:
        return _say(axes, "not measured")
    limit = limiting_leg(profile)
    colors = [ORANGE if leg == limit else LIGHT if leg in WHOLES else SKY for leg in rates]
    axes.barh(range(len(rates)), rates.values(), color=colors)
    axes.set_yticks(range(len(rates)), [f"{leg} (whole)" if leg in WHOLES else leg for leg in rates])
    axes.invert_yaxis()
    axes.set_xscale("log")
    limits = profile["limits"]
    ends = [("measured", "black", "-"), ("predicted", GREEN, "--")]
    paces = [limits[f"{name}_images_per_second"] for name, _, _ in ends]
    shown = [*rates.values(), *filter(None, paces)]
    # A bar has no zero on this axis: it begins below the least rate. Room to the right is for the figures.
    low, high = min(shown) / 4, max(shown)
    axes.set_xlim(low, high * (high / low) ** 0.25)
    for (name, color, style), pace in zip(ends, paces):
        if pace:
            axes.axvline(pace, color=color, ls=style, label=f"end to end, {name}: {significant(pace)}")
    for place, rate in enumerate(rates.values()):
        axes.annotate(
            significant(rate), (rate, place), xytext=(5, 0), textcoords="offset points", va="center", fontsize=9,
            bbox={"facecolor": "white", "edgecolor": "none", "pad": 1, "alpha": 0.8},
        )  # fmt: skip
    axes.grid(alpha=0.3, axis="x")
    axes.set_axisbelow(True)
    if any(paces):
        axes.legend(fontsize=9, loc="upper center", bbox_to_anchor=(0.5, -0.13), ncols=2, frameon=False)


def _draw_lines(axes: "Axes", profile: dict) -> None:
    """How long each resource is busy with one image: the predicted load."""
    axes.set_title("How long each resource is busy with one image", fontsize=12)
    axes.set_xlabel("ms, predicted from the legs: the longest sets the pace")
    loads = {line: 1000 * seconds for line, seconds in profile["limits"]["lines"].items() if seconds}
    if not loads:
        return _say(axes, "not measured")
    most = max(loads.values())
    colors = [ORANGE if load == most else SKY for load in loads.values()]
    axes.barh(range(len(loads)), loads.values(), color=colors)
    axes.set_yticks(range(len(loads)), [label_of(line, loads) for line in loads])
    axes.invert_yaxis()
    measured = profile["limits"]["measured_images_per_second"]
    shown = max(most, 1000 / measured if measured else 0) or 1
    axes.set_xlim(0, 1.2 * shown)
    if measured:
        axes.axvline(1000 / measured, color="black", label=f"measured end to end: {significant(1000 / measured)} ms")
        axes.legend(fontsize=9, loc="upper center", bbox_to_anchor=(0.5, -0.13), frameon=False)
    for place, load in enumerate(loads.values()):
        is_long = load > 0.7 * shown  # its figure goes inside, where the line at the end to end does not cross it
        axes.annotate(
            significant(load), (load, place), xytext=(-5 if is_long else 5, 0), textcoords="offset points", va="center",
            ha="right" if is_long else "left", color="white" if is_long else "black", fontsize=9,
        )  # fmt: skip
    axes.grid(alpha=0.3, axis="x")
    axes.set_axisbelow(True)


def _say(axes: "Axes", text: str) -> None:
    axes.text(0.5, 0.5, text, ha="center", color=GREY, transform=axes.transAxes)
    axes.set_xticks([])
    axes.set_yticks([])


def _wrapped(text: str, width: int, lines: int) -> str:
    """At most so many lines of so many characters, of characters that the font has (matplotlib warns of others)."""
    from matplotlib.font_manager import findfont, get_font

    known = get_font(findfont("DejaVu Sans")).get_charmap()
    drawable = "".join(c if ord(c) in known else "?" for c in printable(text))
    wrapped = wrap(drawable, width)
    if len(wrapped) > lines:
        wrapped = [*wrapped[: lines - 1], wrapped[lines - 1][: width - 4] + " ..."]
    return "\n".join(wrapped)


def label_of(line: str, loads: dict[str, float]) -> str:
    """A resource, and below it the legs that use it. Where no thread decodes, the reader does."""
    if line not in LINES:
        return "cores\nall CPU time" if line == "cores" else line
    legs = LINES[line] if line != "reader" or loads.get("threads") else LINES["threads"] + LINES["reader"]
    return f"{line}\n{', '.join(map(leg_of, legs))}"
