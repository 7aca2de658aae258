"""A profile as four figures: where the training time goes, how busy each resource is, the stages, and the threads."""

from typing import TYPE_CHECKING, NamedTuple

from fastssl.common.figures import BLUE, GRAY, GREEN, LIGHT_GRAY, SKY, SMALL, TEXT, VERMILLION, new_figure
from fastssl.profiling.profile import Profile, device_time, training_seconds
from fastssl.profiling.wording import (
    BELOW_NOISE,
    PART_NAMES,
    RESOURCE_NAMES,
    STAGE_NAMES,
    is_below_noise,
    percent,
    significant,
)

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

SIZE = (3.8, 2.9)  # inches: no wider than the page on a phone, where a text of 8 pt is thus one of 8 pt
TOO_FAR = 5  # ratio of rates above which a line is not drawn
TOO_LOW = 0.02  # share of an axis below which a line is not drawn, as it would be taken for the axis
ABOVE_ALL = 1.005  # share of the time from which on it is shown as more than 100 %
COMBINED = ("loader", "replay")  # stages that consist of others


class ProfileFigure(NamedTuple):
    name: str
    caption: str  # how to read it
    figure: "Figure"


def draw_profile(profile: Profile) -> list[ProfileFigure]:
    """Return the figures. Save them with `savefig(file, dpi="figure")`."""
    return [
        _draw_device_time(profile),
        _draw_resources(profile),
        _draw_stages(profile),
        _draw_scaling(profile),
    ]


def _draw_device_time(profile: Profile) -> ProfileFigure:
    """Draw a bar for each part of the training time."""
    figure, axes = _new_panel("Where the training time goes")
    training = training_seconds(profile)
    parts = device_time(profile)
    labels = [
        BELOW_NOISE
        if is_below_noise(name, seconds)
        else f"{significant(1000 * seconds)} ms, {percent(seconds / training)}"
        for name, seconds in parts.items()
    ]
    colors = [VERMILLION if name in ("wait for data", "communication") else SKY for name in parts]
    names = [PART_NAMES.get(name, name) for name in parts]
    _draw_bars(axes, names, [1000 * seconds for seconds in parts.values()], labels, colors)
    axes.set_xlabel("ms per image")
    axes.set_xlim(0, 1.8 * 1000 * max(parts.values()))  # room for the labels
    caption = f"Percentages are of the training time, {significant(1000 * training)} ms per image."
    if VERMILLION in colors:
        caption += " Orange: the device waits for data or for other devices."
    return ProfileFigure("time", caption, figure)


def _draw_resources(profile: Profile) -> ProfileFigure:
    """Draw how busy each resource is, as the cost model predicts it."""
    figure, axes = _new_panel("The busiest resource limits training")
    busy = {name: seconds for name, seconds in profile.prediction.resource_seconds.items() if seconds}
    # The resources of all processes together work on one image for this time.
    training = 1 / profile.prediction.measured_images_per_second
    shares = {name: seconds / training for name, seconds in busy.items()}
    busiest = max(shares, key=lambda name: shares[name])
    colors = [VERMILLION if name == busiest else SKY for name in shares]
    names = [RESOURCE_NAMES.get(name, name) for name in shares]
    percents = [100 * share for share in shares.values()]
    _draw_bars(axes, names, percents, [percent(share) for share in shares.values()], colors)
    axes.set_xlabel("% of the training time")
    axes.set_xlim(0, 1.25 * max(100.0, *percents))
    axes.axvline(100, color=GRAY, linestyle="--", linewidth=1)
    caption = (
        "Orange: the busiest resource, as predicted from the stages. Dashed line: a resource that is busy all the "
        "time. Loader threads read, decode, copy and crop images. The batch thread assembles batches. The device "
        "augments views and takes training steps; the main thread launches its kernels. All of them share the CPU "
        "cores."
    )
    if max(shares.values()) >= ABOVE_ALL:
        caption += (
            " More than 100 %: the stages, timed one by one, took longer than in training, by noise or because other "
            "processes ran."
        )
    return ProfileFigure("resources", caption, figure)


def _draw_stages(profile: Profile) -> ProfileFigure:
    """Draw the rate of each stage alone, with those of training."""
    figure, axes = _new_panel("Speed of each stage alone: longer bars are better")
    stages = profile.stages.by_name().items()
    rates = {name: stage.rate for name, stage in stages if stage.rate and name != "end_to_end"}
    measured = profile.prediction.measured_images_per_second
    predicted = profile.prediction.predicted_images_per_second
    lowest, highest = min(measured, predicted, *rates.values()), max(measured, predicted, *rates.values())
    axes.set_xscale("log")
    # A logarithmic axis has no zero, so the bars begin below the lowest rate. Room to the right is for the numbers.
    axes.set_xlim(lowest / 4, highest * (4 * highest / lowest) ** 0.35)
    slowest = profile.bottleneck.stage
    colors = [VERMILLION if name == slowest else LIGHT_GRAY if name in COMBINED else SKY for name in rates]
    labels = [significant(rate) for rate in rates.values()]
    _draw_bars(axes, [STAGE_NAMES[name] for name in rates], list(rates.values()), labels, colors)
    axes.set_xlabel("images/s (logarithmic)")
    axes.axvline(measured, color="black", linewidth=1.2)
    axes.axvline(predicted, color=GREEN, linestyle="--", linewidth=1.2)
    caption = (
        f"Lines: training end to end, measured (black, {significant(measured)} images/s) and predicted from the stages "
        f"(green dashes, {significant(predicted)}). Training can be slower than each stage alone: the times "
        "of stages that share a resource, such as the device, add up."
    )
    if VERMILLION in colors:
        caption += " Orange: the bottleneck."
    if LIGHT_GRAY in colors:
        caption += " Gray: several stages together."
    return ProfileFigure("stages", caption, figure)


def _draw_scaling(profile: Profile) -> ProfileFigure:
    """Draw the rate of decoding or copying images by the number of threads, with the rate that the device needs."""
    copies = profile.stages.copy_images.rate is not None
    name = "copy_images" if copies else "decode"
    stage = profile.stages.copy_images if copies else profile.stages.decode
    figure, axes = _new_panel(f"{STAGE_NAMES[name].capitalize()}: speed by number of threads")
    workers = dict(sorted((stage.workers or {}).items()))
    if not workers:
        axes.text(0.5, 0.5, "not measured", ha="center", color=GRAY, size=TEXT, transform=axes.transAxes)
        axes.axis("off")
        return ProfileFigure("threads", "No images are loaded one by one, or the stage was not measured.", figure)
    counts, rates = list(workers), [rate.median for rate in workers.values()]
    errors = [[r.median - r.low for r in workers.values()], [r.high - r.median for r in workers.values()]]
    if 1 in workers:
        axes.plot(counts, [rates[0] * count for count in counts], color=GRAY, linestyle="--", label="linear scaling")
    axes.errorbar(counts, rates, yerr=errors, color=BLUE, marker="o", linewidth=2, capsize=4, label="measured")
    caption = "Bars through the points: from the slowest to the fastest window of time."
    needed = profile.stages.replay.rate
    if needed and needed > TOO_FAR * max(rates):  # a line far above the others would squeeze them
        caption += (
            f" View augmentation and training step need {significant(needed)} images/s, far above what is drawn here: "
            "more than these threads deliver."
        )
    elif needed and needed < TOO_LOW * axes.get_ylim()[1]:
        caption += (
            f" View augmentation and training step need only {significant(needed)} images/s, too few to be drawn here: "
            f"these threads deliver up to {significant(max(rates))}."
        )
    elif needed:
        axes.axhline(needed, color=GREEN, linestyle=":", linewidth=2, label=f"needed: {significant(needed)}")
        caption += (
            " Needed: the speed of view augmentation and training step. Good: the blue line reaches above the dotted "
            "green one."
        )
    axes.set_ylim(bottom=0)
    axes.set_xlabel("loader threads")
    axes.set_ylabel("images/s")
    axes.yaxis.set_major_formatter(lambda rate, _: significant(rate))
    axes.set_xticks(counts)
    axes.grid(alpha=0.3)
    axes.legend(fontsize=SMALL)
    return ProfileFigure("threads", caption, figure)


def _new_panel(title: str) -> tuple["Figure", "Axes"]:
    figure, body = new_figure(*SIZE, title)
    axes = body.subplots()
    axes.tick_params(labelsize=SMALL)
    axes.xaxis.label.set_fontsize(TEXT)
    axes.yaxis.label.set_fontsize(TEXT)
    axes.spines[["top", "right"]].set_visible(False)
    return figure, axes


def _draw_bars(axes: "Axes", names: list[str], values: list[float], labels: list[str], colors: list[str]) -> None:
    """Draw horizontal bars from top to bottom, each with its name and its label."""
    bars = axes.barh(names, values, color=colors)
    background = {"facecolor": "white", "edgecolor": "none", "pad": 1, "alpha": 0.8}
    axes.bar_label(bars, labels, padding=3, size=SMALL, bbox=background)
    axes.invert_yaxis()
    axes.grid(alpha=0.3, axis="x")
    axes.set_axisbelow(True)
