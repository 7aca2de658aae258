"""What a recipe would do on another machine: `fastssl profile RECIPE --plan "8xA100, 64 cores, nvme"`.

Predicted from a profile that was measured here, by the arithmetic of limits.py; nothing is measured on that machine.
What has to be assumed stands in the constants below and, for the person who reads the prediction, in `assumptions`.
"""

import difflib
import math
import re
from dataclasses import replace
from typing import NamedTuple

from rich import box
from rich.table import Table
from rich.text import Text

from fastssl.common.errors import UserError
from fastssl.common.terminal import printable
from fastssl.loading.decoding import SMALL_BATCH
from fastssl.profiling.peaks import DEVICES, LINK_SHARE, STORAGE, STORAGE_NAMES, Device, find_device
from fastssl.profiling.resources import LINES, Cost, Costs
from fastssl.profiling.result import median, why_missing
from fastssl.profiling.tables import percent, si, significant

# ResNet-50 v1.5 trained on one GPU, images/s by precision: NVIDIA/DeepLearningExamples, PyTorch/Classification/
# ConvNets/resnet50v1.5/README.md, "Training performance" (A100 80 GB, V100 16 GB). An image takes torchvision's 4.09 G
# multiplications and additions forward, twice that backward: all in all 19 % of an A100's bf16 peak.
REFERENCE = {"bf16": ("a100", 2470), "fp16": ("a100", 2470), "tf32": ("a100", 938), "fp32": ("v100", 367)}
REFERENCE_FLOPS = 3 * 2 * 4.09e9
# Of a step's time that changes with the memory's bandwidth, such as normalisation; the rest changes with the peak.
# ResNet-50 is 2.06x as fast on an A100 as on a V100 (the README above): this says 2.4, the peaks alone 2.5. On an H100,
# 1.85x as on an A100 (MLPerf Training 3.0, https://silvertonconsulting.com/2023/07/12/mlperf-results-show-h100-v-a100-
# and-v-habana-gaudi2-gpus/): this says 2.2, the peaks alone 3.2.
BANDWIDTH_BOUND = 0.5
VIEW_PASSES, VIEW_SHARE = 10, 0.5  # assumed: times that views move their bytes, and their share of the bandwidth
BACKWARD = 2 / 3  # of a step: gradients are exchanged as they are made
MEMORY_A_CORE = 4e9  # bytes of the host, assumed where none are named
RESIDENT_SHARE = 1 / 8  # of the GPU's memory: data.resident=auto (training/setup.py)
READ_AROUND = 128e3  # bytes that Linux reads around a mapped page that is not there (read_ahead_kb)
PAGE = 8e6  # bytes that data.order=quasi_random reads at a time
EXAMPLE = '--plan "8xA100, 64 cores, nvme"'


class Machine(NamedTuple):
    """One that is planned."""

    count: int  # GPUs
    device: Device
    cores: int
    storage: str
    memory: float | None = None  # bytes of the host

    def __str__(self) -> str:
        memory = f", {si(self.memory, 'B')}" if self.memory else ""
        return f"{self.count}x {self.device.name}, {self.cores} cores, {self.storage}{memory}"


def parse_machine(text: str) -> Machine:
    """Raises UserError for a part that is not understood or missing. Storage is nvme where none is named."""
    found = {}
    for part in filter(None, (part.strip() for part in text.lower().split(","))):
        name, value = _read_part(part)
        if name in found:
            raise UserError(f"--plan names the {name} twice: describe one machine, such as {EXAMPLE}.")
        found[name] = value
    for name in ("GPU", "cores"):
        if name not in found:
            raise UserError(f"--plan does not name the {name} of the machine: write it like {EXAMPLE}.")
    (count, device), cores = found["GPU"], found["cores"]
    if not 1 <= count <= cores:
        raise UserError(f"--plan has {count} GPUs and {cores} cores: each GPU needs a core, as in {EXAMPLE}.")
    return Machine(count, device, cores, found.get("storage", "nvme"), found.get("memory"))


def _read_part(part: str) -> tuple[str, object]:
    """What a part of a plan in lower case describes, and its value."""
    if match := re.fullmatch(r"(\d+) *(v?cpus?|(cpu )?cores?|threads?)", part):
        return "cores", int(match[1])
    if match := re.fullmatch(r"(\d+(?:\.\d+)?) *([gt])i?b(?: (?:of )?(?:ram|memory))?", part):
        return "memory", float(match[1]) * {"g": 1e9, "t": 1e12}[match[2]]
    if part in STORAGE_NAMES:
        return "storage", STORAGE_NAMES[part]
    number, name = re.fullmatch(r"((?:\d+ *[x×*] *|\d+ +)?)(.*)", part).groups()
    if device := find_device(name):
        return "GPU", (int(re.sub(r"\D", "", number) or 1), device)
    if "cpu" in name.split():
        raise UserError(f"--plan {part}: a plan is for GPUs, a CPU is measured where it is: name one, as in {EXAMPLE}.")
    names = [*(device.name.lower() for device in DEVICES.values()), *DEVICES, *STORAGE_NAMES, "cores", "gb"]
    near = difflib.get_close_matches(name, names, n=1, cutoff=0.6)
    known = ", ".join(device.name for device in DEVICES.values())
    hint = f"did you mean {number}{near[0]}?" if near else f"GPUs are {known}; storage is {', '.join(STORAGE)}."
    raise UserError(f"--plan: {part!r} is no GPU, number of cores, storage or memory: {hint}")


def check_batch_size(machine: Machine, batch: int, accumulate: int) -> None:
    """Raises UserError for a batch that the GPUs cannot share."""
    if batch % (machine.count * accumulate):
        shares = f"{machine.count} GPUs x train.accumulate={accumulate}"
        multiple = machine.count * accumulate
        raise UserError(f"train.batch_size={batch} does not divide by {shares}: set a multiple of {multiple}.")


def plan_training(profile: dict, machine: Machine) -> dict:
    """The prediction. Raises UserError where the recipe does not run there or the profile says too little."""
    costs, first_epoch, assumptions = _costs(profile, machine)
    rate, epochs = costs.images_per_second(), profile["recipe"]["train"]["epochs"]
    images = profile["data"]["batches_per_epoch"] * profile["run"]["batch_size"]
    seconds = images * (1 / first_epoch.images_per_second() + (epochs - 1) / rate)
    return {
        "recipe": profile["recipe"]["name"],
        "machine": str(machine),
        "images_per_second": rate,
        "epochs": epochs,
        "hours": seconds / 3600,
        "first_epoch_hours": images / first_epoch.images_per_second() / 3600,
        "cause": costs.cause(),
        "accelerator_utilisation": sum(costs.legs[leg].seconds for leg in ("views", "compute")) * rate / machine.count,
        "lines": {line: machine.count / took if took else None for line, took in costs.lines().items()},
        "advice": _advice(profile, machine, costs),
        "assumptions": assumptions,
    }


def _costs(profile: dict, machine: Machine) -> tuple[Costs, Costs, list[str]]:
    """Of one process, from the second epoch on and in the first; and what was assumed."""
    data, recipe, count = profile["data"], profile["recipe"], machine.count
    batch, shares = profile["run"]["batch_size"], count * recipe["train"].get("accumulate", 1)
    check_batch_size(machine, batch, recipe["train"].get("accumulate", 1))
    legs, said = _device_legs(profile, machine)
    cores = machine.cores // count
    if profile["machine"]["kind"] == "cuda" and (took := _seconds(profile, "launch")):
        took *= count / profile["machine"]["processes"]  # a launch takes as long for a smaller batch
        legs["launch"] = Cost(took, took)
    else:
        said.append("Launching kernels takes no time and no core: small batches and few cores may be slower.")
    if _is_resident(data, recipe["data"], machine.device):
        said.append("All images stay on the GPU (data.resident): decoding them once is not counted.")
        return (costs := Costs(legs, cores, processes=count)), costs, said

    said.append("Cores are as fast there as here, and all of them decode (data.workers=null).")
    is_raw = data["image_bytes"] >= data["decoded_bytes"]
    in_reader = is_raw and batch // shares * data["decoded_bytes"] <= SMALL_BATCH
    for leg in ("decode", "cpu_augment") if data["crop"] == "cpu" else ("decode",):
        if cpu := median(profile, leg, "cpu_seconds"):
            legs[leg] = Cost(cpu if in_reader else cpu / cores, cpu)
        else:
            said.append(f"{leg} is left out, as it was not measured: {why_missing(profile, leg).rstrip('.')}.")
    bus = data["decoded_bytes"] / (LINK_SHARE * machine.device.pcie)
    hand_over = _seconds(profile, "copy") or 0
    legs["copy"] = Cost(max(hand_over, bus), median(profile, "copy", "cpu_seconds") or 0)

    memory = machine.memory or MEMORY_A_CORE * machine.cores
    from_disk = max(0, 1 - memory / _read_bytes(data))
    unnamed = "" if machine.memory else f" ({si(MEMORY_A_CORE, 'B')} a core, as none is named)"
    held = f"hold {percent(1 - from_disk)} of {si(_read_bytes(data), 'B')}"
    said.append(f"After the first epoch, {si(memory, 'B')} of memory{unnamed} {held}.")
    kind = STORAGE[machine.storage]
    reads = f"{si(kind.bytes_per_second, 'B/s')}, {kind.reads_per_second:,.0f} reads/s"
    said.append(f"All GPUs share {machine.storage}: {reads} ({kind.source}).")
    piece = PAGE if recipe["data"].get("order") == "quasi_random" else max(READ_AROUND, data["image_bytes"])
    disk = count * kind.seconds(data["image_bytes"], piece)
    costs = Costs(legs | {"storage": Cost(disk * from_disk)}, cores, in_reader, count)
    return costs, replace(costs, legs=legs | {"storage": Cost(disk)}), said


def _seconds(profile: dict, leg: str) -> float | None:
    """That an image of its own took a process; rates are of all processes."""
    rate = median(profile, leg)
    return rate and profile["machine"]["processes"] / rate


def _busy_seconds(profile: dict, leg: str) -> float | None:
    """That a GPU works on an image: of a launch-bound leg less than it takes."""
    if busy := profile["legs"].get(leg, {}).get("busy_seconds"):
        return busy
    took = _seconds(profile, leg)
    return took and took - (_seconds(profile, "communication") or 0) * (leg == "step")


def _read_bytes(data: dict) -> float:
    """Of the file in an epoch."""
    return min(data["file_bytes"], data["images"] * data["image_bytes"])


def _is_resident(data: dict, asked: dict, device: Device) -> bool:
    if asked.get("resident", "auto") != "auto":
        return asked["resident"]
    return data["crop"] == "gpu" and data["images"] * data["decoded_bytes"] <= RESIDENT_SHARE * device.memory


def _device_legs(profile: dict, machine: Machine) -> tuple[dict[str, Cost], list[str]]:
    """views, compute and communication of one process, and what was assumed."""
    run, train, there, count = profile["run"], profile["recipe"]["train"], machine.device, machine.count
    on_gpu, said = profile["machine"]["kind"] == "cuda", []
    here = find_device(profile["machine"]["device"]) if on_gpu else None
    asked = run["precision"] if on_gpu else train.get("precision", "auto").replace("auto", "bf16")
    precision = asked if there.peak(asked) else {"bf16": "fp16", "tf32": "fp32"}[asked]
    if precision != asked:
        said.append(f"{there.name} has no {asked}: set train.precision={precision} there, as is taken here.")
    if here and here.peak(asked) and (took := _busy_seconds(profile, "step")):
        compute = took * _times(here, asked, there, precision)
        basis = f"Compute is what was measured on {here.name}"
    elif flops := profile["legs"].get("step", {}).get("flops"):
        words, reference_rate = REFERENCE[precision]
        reference = DEVICES[words]
        compute = flops / (reference_rate * REFERENCE_FLOPS) * _times(reference, precision, there, precision)
        share = percent(flops / compute / there.peak(precision))
        basis = f"Compute has {share} of the {precision} peak, from ResNet-50's {reference_rate:,} images/s on "
        basis += f"{reference.name} (NVIDIA/DeepLearningExamples)"
    else:
        raise UserError("The profile lacks a step's FLOPs, which a plan needs: profile the recipe again with all legs.")
    said.append(f"{basis}, scaled half with the peak, half with the memory's bandwidth.")
    if here and (took := _busy_seconds(profile, "views")):
        views = took * here.bandwidth / there.bandwidth
        said.append(f"Views are what was measured on {here.name}, scaled with the memory's bandwidth.")
    else:
        moved = VIEW_PASSES * (profile["legs"].get("views", {}).get("bytes_per_image") or 0)
        views = moved / (VIEW_SHARE * there.bandwidth)
        said.append(f"Views move their bytes {VIEW_PASSES} times at {percent(VIEW_SHARE)} of the memory's bandwidth.")
    legs = {"views": Cost(views), "compute": Cost(compute)}
    if count > 1:  # around a ring: every GPU sends all gradients but one GPU's share, twice
        link, images = LINK_SHARE * there.interconnect, run["batch_size"] / count
        gradients = run["parameters"] * (2 if train.get("compress_gradients") else 4)
        exchange = gradients * 2 * (count - 1) / count / link
        hidden = BACKWARD * compute * images / train.get("accumulate", 1)
        legs["communication"] = Cost(max(0, exchange - hidden) / images)
        said.append(f"Gradients are exchanged at {si(link, 'B/s')}, behind the backward pass, two thirds of the step.")
    return legs, said


def _times(here: Device, asked: str, there: Device, precision: str) -> float:
    """How many times as long a step takes there."""
    peaks, bandwidths = here.peak(asked) / there.peak(precision), here.bandwidth / there.bandwidth
    return (1 - BANDWIDTH_BOUND) * peaks + BANDWIDTH_BOUND * bandwidths


def _advice(profile: dict, machine: Machine, costs: Costs) -> list[str]:
    """What would make it faster, or would not."""
    lines, cause = costs.lines(), costs.cause()
    cpu_seconds = lines["cores"] * costs.cores
    if cause != "storage" and max(lines, key=lines.get) in ("threads", "cores"):
        enough = int(cpu_seconds / max(lines[line] for line in ("disk", "reader", "device", "host"))) + 1
        memory = machine.memory or MEMORY_A_CORE * machine.cores  # as much as now
        after, _, _ = _costs(profile, machine._replace(cores=enough * machine.count, memory=memory))
        missing = enough - costs.cores
        more = f"{missing} more core{'s' * (missing > 1)} a GPU ({enough * machine.count} in all)"
        return [f"{more} would make {_limit(after)}."]
    if cause == "storage":
        after = _limit(costs.faster(cause, math.inf))
        advice = [f"Memory for all of {si(_read_bytes(profile['data']), 'B')}, or faster storage, would make {after}."]
        is_quasi = profile["recipe"]["data"].get("order") == "quasi_random"
        return advice if is_quasi else [*advice, "data.order=quasi_random reads it in large pieces."]
    remedy = {
        "compute": "A faster GPU or a smaller model would help.",
        "views": "A faster GPU or fewer operations in views would help.",
        "communication": "A larger train.batch_size or train.compress_gradients=true would help.",
        "launch": "A larger train.batch_size or train.compile=true would help.",
    }.get(cause, "One thread makes up the batches: data.resident=true or a smaller canvas would help.")
    enough = max(1, math.ceil(cpu_seconds / max(lines.values())))
    return [remedy, f"More cores would not: {enough} of {costs.cores} cores a GPU are enough."]


def _limit(costs: Costs) -> str:
    return f"{costs.cause()} the limit, at {_about(costs.images_per_second())} images/s"


def _about(value: float) -> str:
    """Three digits: a prediction is not good for more."""
    return significant(float(f"{value:.3g}"))


def plan_table(planned: dict) -> Table:
    """For a terminal of 80 columns or more; text is wrapped, never cut."""
    title = printable(f"PREDICTION, not a measurement: {planned['recipe']} on {planned['machine']}")
    table = Table(title=Text(title, style="bold"), box=box.SIMPLE, show_header=False, expand=True)
    table.add_column(no_wrap=True)
    table.add_column(overflow="fold")
    rate = _about(planned["images_per_second"])
    unless = "" if planned["lines"]["host"] else " at most (launching is not counted)"
    table.add_row("images/s", rate + unless, style="bold")
    hours = _about(planned["hours"]) if planned["hours"] >= 0.01 else "less than 0.01"
    hours += f" for {planned['epochs']:,} epochs, without evaluation"
    if planned["first_epoch_hours"] > 2 * planned["hours"] / (planned["epochs"] + 1):
        hours += f"; {_about(planned['first_epoch_hours'])} of it for the first, whose images come from the disk"
    table.add_row("hours", hours)
    table.add_row("the limit", planned["cause"], style="bold yellow")
    table.add_row("GPUs busy", percent(planned["accelerator_utilisation"]), end_section=True)
    for line, rate in planned["lines"].items():
        if rate is not None:
            legs = ", ".join(LINES.get(line, ["all that the CPU does"]))
            table.add_row(f"{line} alone", f"{_about(rate)} images/s ({legs})")
    table.add_section()
    for heading, sentences in (("to change", planned["advice"]), ("assumed", planned["assumptions"])):
        for sentence in sentences:
            table.add_row(heading, Text(printable(sentence)))
    return table
