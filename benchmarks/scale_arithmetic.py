"""Bytes, hours, cores and network of sets from a million to a billion images, for docs/scaling.md.

    python benchmarks/scale_arithmetic.py IMAGES --out records/scale-arithmetic.md

IMAGES is a folder of images like those of the large set. Bytes and build hours are those of `fastssl build-beton
--dry-run --images N`; speeds of training are those of `fastssl profile --plan "..., N images"`, computed from the
profiles in records/. Nothing of the large sizes is measured.
"""

import argparse
import math
import statistics
import tempfile
from datetime import date
from pathlib import Path
from typing import NamedTuple

from fastssl.beton import BuildOptions, estimate_build
from fastssl.beton.format import bc4_bytes
from fastssl.common.system import available_cores, cpu_name
from fastssl.common.terminal import time_in_words
from fastssl.profiling import Profile, parse_machine, plan_training, read_profile
from fastssl.profiling.profile import Measurement, Rate, StageResult
from fastssl.profiling.wording import STAGE_NAMES
from fastssl.recipe import load_recipe

SIZES = {1_281_167: 1, 14_197_122: 1, 100_000_000: 8, 1_000_000_000: 64}  # images -> nodes that share their shards
FORMS = {
    "canvas 256, JPEG": {"canvas": 256, "codec": "jpeg"},
    "canvas 256, BC4": {"canvas": 256, "codec": "bc4"},
    "full, 500 px": {"max_side": 500},
}
PROFILES = {  # fastssl profile recipes/zprob_barlow.yaml train.device=cpu train.batch_size=16 data.train=...
    "canvas 256, JPEG": Path("records/profile-canvas.json"),
    "full, 500 px": Path("records/profile-full.json"),
}
# Loading canvases in blocks: images/s of two cores, and of the time of a core (records/loading.md).
BLOCKS_PER_SECOND, BLOCKS_PER_CORE_SECOND = 139_360, 95_474
NODE = "8xH100, 96 cores, 1 TB"  # and the storage
BUILD_CORES = 64  # of a node that builds
BATCH = 2048  # of all 8 GPUs of a node
SHARD_BYTES = 5e9  # at most
LINKS = {"10 Gbit/s": 1e9, "100 Gbit/s": 10e9}  # bytes per second of a copy; assumed: 80 % of the link
TRIALS = 5  # of a build; the least seconds count, as other work can only add to them
CHECKSUM_BYTES = 8  # hexadecimal digits of a sample's CRC-32 in a manifest


class Form(NamedTuple):
    """One way to store the images, with what the sample says about an image."""

    name: str
    bytes: float  # of the .beton, tables included
    text_bytes: float  # of the list of names and of the manifest
    core_seconds: float  # to build
    profile: Profile


def main() -> None:
    """Print the tables, and write them to --out."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("images", type=Path)
    parser.add_argument("--out", type=Path, help="write the tables here as Markdown")
    arguments = parser.parse_args()
    files = sorted(path for path in arguments.images.rglob("*") if path.suffix.lower() in (".jpeg", ".jpg", ".png"))
    forms = [measure(name, arguments.images, files) for name in FORMS]
    source_bytes = statistics.mean(path.stat().st_size for path in files)
    lines = [
        *introduction(arguments.images.name, len(files), source_bytes),
        *bytes_table(forms),
        *build_table(forms, source_bytes),
        *network_table(forms),
        *training_table(forms),
    ]
    text = "\n".join(lines) + "\n"
    print(text)
    if arguments.out:
        arguments.out.write_text(text)


def measure(name: str, images: Path, files: list[Path]) -> Form:
    """Encode a part of the sample, as --dry-run does, and scale to a billion images; all is proportional to them."""
    many = max(SIZES)
    with tempfile.TemporaryDirectory() as out:
        build = BuildOptions(**FORMS[name], workers=1)  # so that its seconds are those of a core
        trials = [
            estimate_build("imagefolder", images, Path(out) / "out", build, many).splits[0] for _ in range(TRIALS)
        ]
    line_bytes = statistics.mean(len(f"{path.relative_to(images)}\n".encode()) for path in files)
    digits = len(str(many - 1)) + 1  # the index, and a tab
    return Form(
        name,
        trials[0].bytes / many,
        line_bytes + digits + CHECKSUM_BYTES,
        min(split.seconds for split in trials) / many,
        read_profile(PROFILES[name]) if name in PROFILES else profile_of_blocks(),
    )


def profile_of_blocks() -> Profile:
    """Return the recorded profile of JPEG canvases with what differs for canvases in blocks, also from the records."""
    profile = read_profile(PROFILES["canvas 256, JPEG"])
    size = float(bc4_bytes(256))
    data = profile.data.model_copy(update={"storage": "bc4", "image_bytes": size, "decoded_bytes": size})
    copying = StageResult(
        images_per_second=Rate.of([BLOCKS_PER_SECOND]), cpu_seconds=Measurement.of([1 / BLOCKS_PER_CORE_SECOND])
    )
    stages = profile.stages.model_copy(
        update={"decode": StageResult(missing="blocks need no decoding"), "copy_images": copying}
    )
    return profile.model_copy(update={"data": data, "stages": stages})


def introduction(folder: str, count: int, source_bytes: float) -> list[str]:
    return [
        "# Arithmetic for large sets",
        "",
        f"`python benchmarks/scale_arithmetic.py {folder}` ({date.today()}), {cpu_name()}, {available_cores()} cores.",
        "",
        f"Measured and counted on {count:,} full-size ImageNet JPEGs ({source_bytes / 1e3:.0f} KB in the mean); all "
        "else is arithmetic, by the code of `build-beton --dry-run --images N` and of `profile --plan`. *Counted*: "
        f"bytes. *Measured*: seconds of a core to build (the least of {TRIALS} trials), to decode and to copy. "
        "*Assumed*: networks, disks, GPUs, and that other images are like these. The profiles are those in records/ "
        "(`profile-canvas.json`, `profile-full.json`), and for blocks the rate in [loading.md](loading.md).",
        "",
    ]


def bytes_table(forms: list[Form]) -> list[str]:
    lines = [
        "## Bytes (counted)",
        "",
        "Names and manifests: the line of each image in the lists of names, and its checksum.",
        "",
        "| images | form | .beton | names and manifests | shards of at most 5 GB |",
        "|---|---|---|---|---|",
    ]
    for images in SIZES:
        for form in forms:
            size = images * form.bytes
            lines.append(
                f"| {images:,} | {form.name} | {in_bytes(size)} | {in_bytes(images * form.text_bytes)} "
                f"| {shards(size):,} |"
            )
    return [*lines, ""]


def build_table(forms: list[Form], source_bytes: float) -> list[str]:
    lines = [
        "## Building (seconds of a core measured, all else assumed)",
        "",
        f"A node has {BUILD_CORES} cores, as fast as these and all busy. Reading: all source files, once, over one "
        f"link of 10 Gbit/s (1 GB/s) for all nodes together.",
        "",
        "| images | form | core-hours | on one node | nodes for a day | to read the sources |",
        "|---|---|---|---|---|---|",
    ]
    for images in SIZES:
        for form in forms:
            core_hours = images * form.core_seconds / 3600
            hours = core_hours / BUILD_CORES
            reading = time_in_words(images * source_bytes / LINKS["10 Gbit/s"])
            lines.append(
                f"| {images:,} | {form.name} | {core_hours:,.1f} | {time_in_words(3600 * hours)} "
                f"| {max(1, math.ceil(hours / 24))} | {reading} |"
            )
    return [*lines, ""]


def network_table(forms: list[Form]) -> list[str]:
    lines = [
        "## Copying (assumed: 80 % of a link)",
        "",
        "Time to copy the set to one node, and to copy its part to each of the nodes that share it, all at once, each "
        "over its own link. The first epoch from a network disk moves the same bytes.",
        "",
        "| images | form | " + " | ".join(f"one node, {link}" for link in LINKS) + " | nodes | "
        + " | ".join(f"each part, {link}" for link in LINKS) + " |",
        "|---" * (3 + 2 * len(LINKS)) + "|",
    ]  # fmt: skip
    for images, nodes in SIZES.items():
        for form in forms:
            seconds = [images * form.bytes / rate for rate in LINKS.values()]
            whole = " | ".join(time_in_words(each) for each in seconds)
            parts = " | ".join(time_in_words(each / nodes) for each in seconds)
            lines.append(f"| {images:,} | {form.name} | {whole} | {nodes} | {parts} |")
    return [*lines, ""]


def training_table(forms: list[Form]) -> list[str]:
    lines = [
        "## Training (predicted by `profile --plan`)",
        "",
        f"`zprob_barlow` (ResNet-18), each node `{NODE}` with a batch of {BATCH:,}, bf16; images and shards are "
        "divided among the nodes. Gradients between nodes are not counted. The images of ResNet-18 are small work for "
        "an H100, so these are the most cores per GPU that loading takes: a larger encoder takes fewer images per "
        "second. In memory: the part of a node's images that its page cache holds after the first epoch.",
        "",
        "| images | nodes | form | disk, order | in memory | images/s per node | an epoch | the first one "
        "| bottleneck | cores per GPU |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for images, nodes in SIZES.items():
        for form in forms:
            for disk, order in (("nvme", "random"), ("nfs", "quasi_random")):
                lines.append(training_row(form, images, nodes, disk, order))
    return [*lines, ""]


def training_row(form: Form, images: int, nodes: int, disk: str, order: str) -> str:
    keys = [f"train.batch_size={BATCH}", f"data.order={order}", "train.epochs=2"]
    recipe = load_recipe("recipes/zprob_barlow.yaml", keys)
    machine = parse_machine(f"{NODE}, {disk}, {images // nodes} images")
    plan = plan_training(form.profile, recipe, machine)
    held = "all, on the GPUs" if "threads" not in plan.resource_rates else ""
    if not held:
        assert machine.memory
        held = f"{min(1, machine.memory / (images / nodes * form.profile.data.image_bytes)):.0%}"
    return (
        f"| {images:,} | {nodes} | {form.name} | {disk}, {order} | {held} | {plan.images_per_second:,.0f} "
        f"| {time_in_words(3600 * (plan.hours - plan.first_epoch_hours))} "
        f"| {time_in_words(3600 * plan.first_epoch_hours)} | {STAGE_NAMES[plan.bottleneck]} "
        f"| {plan.cores_needed} |"
    )


def shards(size: float) -> int:
    """Return the power of two that gives shards of at most SHARD_BYTES."""
    count = 1
    while size / count > SHARD_BYTES:
        count *= 2
    return count


def in_bytes(size: float) -> str:
    for unit, name in ((1e12, "TB"), (1e9, "GB")):
        if size >= unit:
            return f"{size / unit:.3g} {name}"
    return f"{size / 1e6:.3g} MB"


if __name__ == "__main__":
    main()
