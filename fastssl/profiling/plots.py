"""A profile as one figure: the device's time, the scaling of decoding, the stages and the resources."""

from textwrap import fill
from typing import TYPE_CHECKING

from fastssl.profiling.bottleneck import RESOURCES
from fastssl.profiling.profile import Profile, device_time
from fastssl.profiling.tables import percent, significant

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# The colors of Okabe and Ito, which color-blind people can tell apart.
BLUE, ORANGE, GREEN, SKY, YELLOW, PINK, AMBER = (
    "#0072B2", "#D55E00", "#009E73", "#56B4E9", "#F0E442", "#CC79A7", "#E69F00",
)  # fmt: skip
GRAY, LIGHT = "0.45", "0.8"
PART_COLORS = {
    "wait for data": ORANGE, "views": SKY, "forward": BLUE, "draws": YELLOW, "objective": PINK, "kl": "#7B5EA7",
    "backward": GREEN, "optimizer": AMBER, "communication": "0.25", "step": BLUE, "rest of the step": LIGHT,
}  # fmt: skip
TOO_FAR = 5  # ratio of rates above which a line is not drawn
COMBINED = ("loader", "replay", "end_to_end")  # stages that consist of others


def draw_profile(profile: Profile) -> "Figure":
    """Return a figure of 1400 x 1000 px at its own dpi; save it with `savefig(file, dpi="figure")`."""
    # Imported here, as it takes half a second; without pyplot, no display is needed.
    from matplotlib.figure import Figure

    figure = Figure(figsize=(14, 10), dpi=100, layout="constrained")
    device_time_axes, scaling_axes, stages_axes, resources_axes = figure.subplots(2, 2).flat
    _draw_device_time(device_time_axes, profile)
    _draw_scaling(scaling_axes, profile)
    _draw_stages(stages_axes, profile)
    _draw_resources(resources_axes, profile)
    sentence = _wrapped(profile.bottleneck.sentence, width=120, lines=4)
    title = _wrapped(f"{profile.name} on {profile.machine.device}", width=120, lines=1)
    figure.suptitle(f"{sentence}\n{title}", fontsize=14, parse_math=False)
    return figure


def _draw_device_time(axes: "Axes", profile: Profile) -> None:
    """Draw one bar of the parts of the device's time, compared with the time of training."""
    parts = {name: 1000 * seconds for name, seconds in device_time(profile).items()}
    axes.set_title("What the device's time goes to", fontsize=12)
    axes.set_xlabel("ms per image")
    axes.set_yticks([])
    axes.spines[["top", "left", "right"]].set_visible(False)
    total, left = sum(parts.values()), 0.0
    for name, width in parts.items():
        label = f"{name}: {significant(width)} ms, {percent(width / total)}"
        axes.barh(0, width, left=left, color=PART_COLORS.get(name, LIGHT), edgecolor="white", label=label)
        left += width
    training = 1000 / profile.prediction.measured_images_per_second
    label = f"training, end to end: {significant(training)} ms"
    axes.plot([training] * 2, [-0.55, 0.55], color="black", ls="--", label=label)
    axes.set_xlim(0, 1.04 * max(total, training))
    axes.set_ylim(-2.1, 0.8)  # leaves room for the legend below the bar
    axes.legend(loc="lower center", ncols=2, frameon=False)


def _draw_scaling(axes: "Axes", profile: Profile) -> None:
    """Draw the rate of decoding or copying images by the number of threads, with the rate that the device needs."""
    copies = profile.stages.copy_images.rate is not None
    stage = profile.stages.copy_images if copies else profile.stages.decode
    axes.set_title(f"{'Copying images' if copies else 'Decoding'} by number of threads", fontsize=12)
    axes.set_xlabel("threads")
    axes.set_ylabel("images/s (median, lowest and highest)")
    workers = dict(sorted((stage.workers or {}).items()))
    if not workers:
        axes.text(0.5, 0.5, "not measured", ha="center", color=GRAY, transform=axes.transAxes)
        return
    counts, rates = list(workers), [rate.median for rate in workers.values()]
    errors = [[r.median - r.low for r in workers.values()], [r.high - r.median for r in workers.values()]]
    if 1 in workers:
        axes.plot(counts, [rates[0] * count for count in counts], color=GRAY, ls="--", label="linear scaling")
    axes.errorbar(counts, rates, yerr=errors, color=BLUE, marker="o", lw=2, capsize=5, label="measured")
    knee = stage.knee
    if knee in workers:
        label = f"knee: {knee} thread{'s' if knee > 1 else ''}"
        axes.plot(knee, workers[knee].median, "o", ms=16, mfc="none", mec=ORANGE, mew=2, label=label)
    if needed := profile.stages.replay.rate:
        # A line far above the others would squeeze them.
        shown, note = (float("nan"), " (far above)") if needed > TOO_FAR * max(rates) else (needed, "")
        axes.axhline(shown, color=GREEN, ls=":", label=f"views and step need {significant(needed)}{note}")
    axes.set_ylim(bottom=0)
    axes.yaxis.set_major_formatter(lambda rate, _: significant(rate))
    axes.set_xticks(counts)
    axes.grid(alpha=0.3)
    axes.legend(fontsize=9)


def _draw_stages(axes: "Axes", profile: Profile) -> None:
    """Draw the rate of each stage alone, with those of training."""
    axes.set_title("Each stage alone: the lowest rate limits training", fontsize=12)
    axes.set_xlabel("images/s")
    stages = profile.stages.by_name().items()
    rates = {name: stage.rate for name, stage in stages if stage.rate and name != "end_to_end"}
    measured = profile.prediction.measured_images_per_second
    predicted = profile.prediction.predicted_images_per_second
    lowest, highest = min(measured, predicted, *rates.values()), max(measured, predicted, *rates.values())
    axes.set_xscale("log")
    # A logarithmic axis has no zero, so the bars begin below the lowest rate. Room to the right is for the numbers.
    axes.set_xlim(lowest / 4, highest * (4 * highest / lowest) ** 0.25)
    labels = {name: f"{name} (combined)" if name in COMBINED else name for name in rates}
    _draw_bars(axes, {labels[name]: rate for name, rate in rates.items()}, labels.get(profile.bottleneck.stage))
    axes.axvline(measured, color="black", label=f"training, measured: {significant(measured)}")
    axes.axvline(predicted, color=GREEN, ls="--", label=f"training, predicted: {significant(predicted)}")
    axes.legend(fontsize=9, loc="upper center", bbox_to_anchor=(0.5, -0.13), ncols=2, frameon=False)


def _draw_resources(axes: "Axes", profile: Profile) -> None:
    """Draw how long each resource is busy with one image, as the cost model predicts it."""
    axes.set_title("How long each resource is busy with one image", fontsize=12)
    axes.set_xlabel("ms, predicted from the stages: the longest sets the pace")
    busy = {name: 1000 * seconds for name, seconds in profile.prediction.resource_seconds.items() if seconds}
    training = 1000 / profile.prediction.measured_images_per_second
    axes.set_xlim(0, 1.2 * max(*busy.values(), training))
    users = RESOURCES | {"cores": ("all CPU time",)}
    if "threads" not in busy:  # then the reader decodes
        users["reader"] = RESOURCES["threads"] + RESOURCES["reader"]
    labels = {name: f"{name}\n{', '.join(users.get(name, ()))}" for name in busy}
    longest = max(busy, key=lambda name: busy[name])
    _draw_bars(axes, {labels[name]: milliseconds for name, milliseconds in busy.items()}, labels[longest])
    axes.axvline(training, color="black", label=f"training, measured: {significant(training)} ms")
    axes.legend(fontsize=9, loc="upper center", bbox_to_anchor=(0.5, -0.13), frameon=False)


def _draw_bars(axes: "Axes", values: dict[str, float], highlighted: str | None) -> None:
    """Draw horizontal bars from top to bottom, each with its label and its number, one of them in orange."""
    colors = [ORANGE if label == highlighted else LIGHT if "(combined)" in label else SKY for label in values]
    bars = axes.barh(list(values), list(values.values()), color=colors)
    background = {"facecolor": "white", "edgecolor": "none", "pad": 1, "alpha": 0.8}
    axes.bar_label(bars, [significant(value) for value in values.values()], padding=5, fontsize=9, bbox=background)
    axes.invert_yaxis()
    axes.grid(alpha=0.3, axis="x")
    axes.set_axisbelow(True)


def _wrapped(text: str, width: int, lines: int) -> str:
    """Wrap a text to at most this many lines, in Latin-1, whose characters matplotlib's font has."""
    return fill(text.encode("latin-1", "replace").decode("latin-1"), width, max_lines=lines, placeholder=" ...")
