"""Planning another machine from a profile: its description, the peaks, the arithmetic, the table."""

import io
import re
from dataclasses import replace
from pathlib import Path

import pytest
from profiles import example_json
from rich.console import Console

from fastssl.common.errors import UserError
from fastssl.profiling import Profile
from fastssl.profiling.peaks import DEVICES, LINK_SHARE, STORAGE, find_device, slower_variants
from fastssl.profiling.planner import (
    PLANNED_FROM_CPU,
    PLANNED_KEYS,
    TrainingPlan,
    parse_machine,
    plan_table,
    plan_training,
)
from fastssl.profiling.wording import RESOURCE_NAMES
from fastssl.recipe import Recipe, load_recipe

STEP_FLOPS = 2470 * 3 * 2 * 4.09e9 / 5000  # an A100 trains ResNet-50 at 2,470 images/s: this model at 5,000
VIEWS = 2.5 * 1e6 / (0.5 * 2.039e12)  # s an image on an A100: 1 MB, moved 2.5 times, at half the bandwidth


def stage(images_per_second: float | None = None, cpu_seconds: float | None = None, **more) -> dict:
    windows = {"images_per_second": images_per_second, "cpu_seconds": cpu_seconds}
    return {
        name: value and {"median": value, "low": value, "high": value, "windows": [value]}
        for name, value in windows.items()
    } | more  # fmt: skip


def invented(**changes: dict) -> Profile:
    """A profile of a CPU: 1,000 images/s decoded per core. changes: keys of its sections, by section."""
    sections = {
        "machine": {"device": "cpu", "kind": "cpu", "cores": 2, "processes": 1},
        "data": {
            "images": 1_300_000, "file_bytes": 140e9, "image_bytes": 100e3, "decoded_bytes": 196_608,
            "layout": "canvas", "crop": "gpu", "resident": False, "batches_per_epoch": 5_000,
        },
        "run": {"batch_size": 256, "workers": 2, "precision": "fp32", "compiled": False, "parameters": 12_000_000},
        "stages": {
            "storage": stage(), "decode": stage(1900, 1e-3), "transfer": stage(1e6, 1e-7),
            "cpu_augment": stage(missing="The crops are made on the device."),
            "views": stage(500, 2e-3, bytes_per_image=1e6), "step": stage(20, 0.1, flops=STEP_FLOPS),
            "communication": stage(), "launch": stage(),
        },
    }  # fmt: skip
    profile = example_json()
    for section, values in sections.items():
        profile[section] |= values | changes.get(section, {})
    return Profile.model_validate(profile)


def on_gpu(device: str, stages: dict = {}, **machine) -> Profile:  # noqa: B006
    measured = {"views": stage(50_000, bytes_per_image=1e6), "step": stage(2_000, flops=STEP_FLOPS)}
    machine = {"device": device, "kind": "cuda", **machine}
    return invented(machine=machine, run={"precision": "bf16"}, stages=measured | stages)


def recipe(*overrides: str) -> Recipe:
    return load_recipe("recipes/barlow.yaml", ["name=invented", "train.epochs=10", "train.batch_size=256", *overrides])


def plan(profile: Profile, machine: str, *overrides: str) -> TrainingPlan:
    return plan_training(profile, recipe(*overrides), parse_machine(machine))


@pytest.mark.parametrize(
    "name, expected",
    [
        ("NVIDIA A100-SXM4-80GB", "A100 SXM 80GB"),
        ("NVIDIA A100-SXM4-40GB", "A100 SXM 40GB"),
        ("A100-PCIE-40GB", "A100 PCIe 40GB"),
        ("NVIDIA A100 80GB PCIe", "A100 PCIe 80GB"),
        ("a100 40 GB", "A100 SXM 40GB"),
        ("NVIDIA A10", "A10"),
        ("NVIDIA H100 80GB HBM3", "H100 SXM"),
        ("NVIDIA H100 PCIe", "H100 PCIe"),
        ("NVIDIA H200", "H200"),
        ("NVIDIA L4", "L4"),
        ("NVIDIA L40S", "L40S"),
        ("NVIDIA RTX A6000", "RTX A6000"),
        ("NVIDIA RTX 6000 Ada Generation", "RTX 6000 Ada"),
        ("Tesla V100-SXM2-16GB", "V100 SXM2"),
        ("Tesla V100-PCIE-32GB", "V100 PCIe"),
        ("Tesla T4", "T4"),
        ("NVIDIA GeForce RTX 4090", "RTX 4090"),
        ("rtx4090", "RTX 4090"),
        ("4090", "RTX 4090"),
    ],
)
def test_a_device_is_found_by_its_longest_name(name, expected):
    assert find_device(name).name == expected


@pytest.mark.parametrize(
    "name",
    ["cpu", "", "NVIDIA A10G", "NVIDIA L40", "NVIDIA H100 NVL", "Quadro RTX 6000", "NVIDIA GH200 480GB"]
    + ["NVIDIA GeForce RTX 3090 Ti", "NVIDIA GeForce RTX 4090 Laptop GPU", "NVIDIA A100-SXM4-40GB MIG 1g.5gb"],
)
def test_another_chip_is_not_taken_for_a_known_one(name):
    assert find_device(name) is None


def test_peaks_are_dense_and_with_sums_in_fp32():
    expected = {"A100": 312e12, "H100": 989e12, "H100 PCIe": 756e12, "4090": 165.2e12, "L4": 121e12, "V100": None}
    assert {name: find_device(name).peak("bf16") for name in expected} == expected
    for device in DEVICES.values():
        assert 8e12 < device.fp32 < 1.1e14 and 1.9 * device.fp32 < device.fp16 < 2.3e15, device.name
        assert 0.2e12 < device.bandwidth < 1e13 and device.interconnect >= device.pcie
        assert device.memory >= 16 * 2**30 and "https://" in device.source
        if device.tf32:  # Ampere and later; tensor cores take half as long for 16 bits
            assert device.bf16 == device.fp16 == pytest.approx(2 * device.tf32, rel=0.02)
            assert device.tf32 >= device.fp32
        else:
            assert device.bf16 is None and device.name[:2] in ("V1", "T4")


def test_storage_reads_single_images_or_large_pieces():
    assert STORAGE["hdd"].seconds(12e6, piece=100e3) == pytest.approx(1)  # 120 seeks
    assert STORAGE["hdd"].seconds(200e6, piece=8e6) == pytest.approx(1)  # 200 MB/s
    single = [STORAGE[name].seconds(1e9) for name in ("nvme", "ssd", "hdd")]
    assert single == sorted(single)


def test_a_machine_is_described_in_any_order():
    machine = parse_machine("8xA100, 64 cores, nvme")
    assert (machine.gpus, machine.device.name, machine.cores) == (8, "A100 SXM 80GB", 64)
    assert (machine.storage, machine.memory) == ("nvme", None)
    assert parse_machine("network,  256 GB, 16 vCPUs, NVIDIA GeForce RTX 4090") == parse_machine(
        "4090,256gb ram,16 cpus,nfs"
    )
    machine = parse_machine("2 x H100 PCIe, 32 threads, 1.5 TB, sata")
    assert (machine.gpus, machine.cores, machine.storage, machine.memory) == (2, 32, "ssd", 1.5e12)
    machine = parse_machine("a100, 8 cores, network 1.5 GB/s")
    assert (machine.storage, machine.drive.bytes_per_second, machine.drive.reads_per_second) == ("nfs", 1.5e9, 5e3)
    assert str(machine) == "1x A100 SXM 80GB, 8 cores, nfs 1.50 GB/s"
    assert parse_machine("a100, 8 cores, nfs 200MB/s").drive.bytes_per_second == 200e6
    assert parse_machine("NVIDIA A100 Tensor Core GPU, 8 cores").device.name == "A100 SXM 80GB"
    assert str(parse_machine("a100 40 GB, 8 cores, 64 GB, hdd")) == "1x A100 SXM 40GB, 8 cores, hdd, 64.0 GB"


@pytest.mark.parametrize(
    "text, says",
    [
        ("8xA1000, 64 cores", "did you mean 8xa100"),
        ("8xA100, 64 coers", "did you mean 64 cores?"),
        ("8xA100, 64 cores, nvm", "did you mean nvme?"),
        ("8xA100, 64 cores, floppy", "storage is nvme, ssd, hdd, nfs"),
        ("8xA100, 64 cores, 200 MB/s", "such as nfs 200 MB/s"),
        ("8xA100, 64 cores, network drive", "such as nfs 200 MB/s"),
        ("8xA100, nvme", "does not name the cores"),
        ("64 cores", "does not name the GPUs"),
        ("", "does not name the GPUs"),
        ("cpu, 64 cores", "a plan is for GPUs"),
        ("A100, H100, 64 cores", "names the GPUs twice"),
        ("8xA100, 4 cores", "each GPU needs a core"),
        ("0xA100, 4 cores", "0 GPUs"),
        ("A100, 4 cores, 10M imags", "did you mean"),
        (
            "one A100 with 16 cores and NVMe",
            "'one a100 with 16 cores and nvme' could not be read as one part: separate",
        ),
        ("8 A100 64 cores", "separate the parts by commas"),
        ("A100, 16 cores nvme", "'16 cores nvme' could not be read as one part"),
        ("two A100, 16 cores", "write numbers in digits"),
        ("A100, 4 cores, 5 images, 6 images", "names the images twice"),
    ],
)
def test_an_incomplete_description_is_one_sentence(text, says):
    with pytest.raises(UserError) as error:
        parse_machine(text)
    assert says in str(error.value) and str(error.value)[-1] in ".?" and "\n" not in str(error.value)


def test_few_cores_make_decoding_the_bottleneck():
    planned = plan(invented(), "8xA100, 16 cores, nvme, 256 GB")
    assert planned.bottleneck == "decode"
    assert planned.images_per_second == pytest.approx(16 * 1000, rel=1e-3)  # 1,000 per core
    assert planned.gpu_utilization == pytest.approx(2000 * (1 / 5000 + VIEWS), rel=1e-3)
    # A core takes 1 ms for what the GPU does in 0.20 ms: five cores per GPU, three more than there are.
    assert planned.cores_needed == 5
    assert "24 more CPU cores or a canvas file in blocks, which need no decoding" in planned.advice
    assert "the next limit is the training step at 39,5" in planned.sentence
    assert any("cores are as fast as here" in sentence for sentence in planned.assumptions)


def test_many_cores_make_the_step_the_bottleneck():
    planned = plan(invented(), "8xA100, 64 cores, nvme, 256 GB")
    assert planned.bottleneck == "step" and planned.gpu_utilization == pytest.approx(1)
    assert planned.images_per_second == pytest.approx(8 / (1 / 5000 + VIEWS))
    assert planned.hours == pytest.approx(10 * 5_000 * 256 / planned.images_per_second / 3600, rel=0.1)
    assert planned.resource_rates["threads"] == pytest.approx(64_000)
    assert "disk" not in planned.resource_rates and "main_thread" not in planned.resource_rates
    assert planned.cores_needed == 5
    assert any("19 % of the bf16 peak" in sentence for sentence in planned.assumptions)


def test_a_disk_is_the_bottleneck_of_a_file_that_does_not_fit_into_memory():
    machine = "A100, 16 cores, hdd, 65 GB"
    planned = plan(invented(), machine)
    assert planned.bottleneck == "storage" and "quasi_random" in planned.advice
    # A read takes 128 kB, 100 kB of them the image's; half of the 130 GB that an epoch reads are in memory.
    one_epoch = 5_000 * 256 / (120 * 1.28)
    assert planned.images_per_second == pytest.approx(2 * 120 * 1.28, rel=0.03)  # decoding is added to the disk's time
    first, later = one_epoch, 9 * one_epoch / 2
    assert planned.hours == pytest.approx((first + later) / 3600, rel=0.03)
    assert planned.first_epoch_hours == pytest.approx(first / 3600, rel=0.03)
    quasi_random = plan(invented(), machine, "data.order=quasi_random")
    assert quasi_random.resource_rates["disk"] == pytest.approx(2 * 2000)  # at 200 MB/s, few seeks
    assert quasi_random.bottleneck == "storage"
    default = plan(invented(), "A100, 16 cores, hdd").assumptions
    assert any("64.0 GB of memory (4.00 GB per core, as none is given)" in sentence for sentence in default)


def test_images_that_fit_on_the_gpu_are_decoded_once():
    data = {"images": 50_000, "image_bytes": 3072, "decoded_bytes": 3072, "file_bytes": 2e8}
    planned = plan(invented(data=data), "8xA100, 8 cores")
    assert planned.bottleneck == "step" and "threads" not in planned.resource_rates
    planned = plan(invented(data=data), "8xA100, 8 cores", "data.resident=false")
    # Batches this small are decoded by the reader.
    assert planned.resource_rates["reader"] == pytest.approx(8000, rel=1e-2)


IN_BLOCKS = {
    "images": 1_281_167, "image_bytes": 49_152, "decoded_bytes": 49_152, "file_bytes": 63.3e9, "storage": "bc4",
}  # fmt: skip


def of_blocks(**data):
    stages = {"decode": stage(missing="The file holds blocks."), "copy_images": stage(200_000, 1e-5)}
    return invented(data=IN_BLOCKS | data, stages=stages)


def test_imagenet_in_blocks_stays_on_a_gpu_that_has_room_for_it():
    planned = plan(of_blocks(), "H200, 16 cores")
    assert planned.bottleneck == "step" and "threads" not in planned.resource_rates
    assert any("stay on each GPU (data.resident), 63.0 GB of 151 GB" in sentence for sentence in planned.assumptions)
    assert "threads" not in plan(of_blocks(), "A100, 16 cores").resource_rates
    # A step that is too large for the rest of it.
    assert "threads" in plan(of_blocks(), "A100, 16 cores", "train.batch_size=2048").resource_rates
    assert "threads" not in plan(of_blocks(), "8xA100, 16 cores", "train.batch_size=2048").resource_rates


def test_blocks_that_do_not_fit_are_copied_by_all_cores():
    planned = plan(of_blocks(), "A100 40GB, 4 cores, 256 GB")
    assert planned.resource_rates["threads"] == pytest.approx(4 / 1e-5)
    assert planned.bottleneck == "step" and planned.cores_needed == 1
    assert not any("left out" in sentence for sentence in planned.assumptions if "Cropping" not in sentence)


def test_a_plan_may_be_for_more_images_than_there_are():
    machine = "8xA100, 16 cores, nvme, 256 GB"
    few, many = plan(of_blocks(), machine), plan(of_blocks(), f"{machine}, 1.2B images")
    assert "disk" not in few.resource_rates and "disk" in many.resource_rates
    assert many.hours > 900 * few.hours and "1,200,000,000 images" in many.machine
    assert any("The 1,200,000,000 images are like the 1,281,167 profiled ones." in line for line in many.assumptions)
    # All but 256 GB of 59 TB come from the disk in every epoch.
    assert any("hold 0.4 % of 59.0 TB" in line for line in many.assumptions)
    for text in ("1281167 images", "1281.167k images", "1281.167 thousand images", "1.281167 million images"):
        assert plan(of_blocks(), f"{machine}, {text}").hours == pytest.approx(few.hours, rel=0.01)
    for text in ("0 images", "255 images"):
        with pytest.raises(UserError, match="fewer than a batch"):
            plan(of_blocks(), f"{machine}, {text}")


def test_a_cpu_may_be_profiled_with_smaller_batches_than_those_that_are_planned():
    """With 8 GPUs, a batch that suits a CPU would make the exchange of gradients the bottleneck."""
    machine, large = "8xA100, 64 cores, 256 GB", {"parameters": 200_000_000}
    small = invented(run=large | {"batch_size": 16})
    planned, expected = plan(small, machine), plan(invented(run=large), machine)
    assert planned.bottleneck == expected.bottleneck == "step"
    assert planned.resource_rates == pytest.approx(expected.resource_rates)
    assert planned.hours == pytest.approx(expected.hours, rel=0.02)  # of 5,078 batches, not of 5,000
    assert "batch size 256" in planned.views
    assert "An image takes as long in a batch of 256 images as in the profiled one of 16." in planned.assumptions
    assert plan(small, machine, "train.batch_size=16").bottleneck == "communication"
    with pytest.raises(UserError, match="fewer than a batch of 2,048: name more images, or lower train.batch_size"):
        plan(invented(data={"images": 1000}), "A100, 16 cores", "train.batch_size=2048")
    on_a_gpu = on_gpu("NVIDIA A100-SXM4-80GB")
    assert "batch size 256" in plan(on_a_gpu, machine, "train.batch_size=512").views  # it was measured with 256


def test_a_plan_first_repeats_the_remarks_on_its_profile():
    remarks = [
        "The stages predict 1.05 images/s, so the next limit is uncertain. Profile again.",
        "2.0 cores were busy.",
    ]
    noisy = invented().model_copy(update={"remarks": remarks})
    assert plan(noisy, "A100, 16 cores").assumptions[0] == (
        "What was measured is taken as it is, though the profile notes: The stages predict 1.05 images/s, so the next "
        "limit is uncertain. 2.0 cores were busy."
    )
    quiet = invented().model_copy(update={"remarks": []})
    assert not any("notes" in line for line in plan(quiet, "A100, 16 cores").assumptions)


def test_a_plan_says_where_the_profile_changed_the_size_of_views():
    def says(*overrides: str) -> bool:
        profile = invented().model_copy(update={"overrides": list(overrides)})
        return any(
            "The views have 32 px, as the command line" in line for line in plan(profile, "A100, 16 cores").assumptions
        )

    assert says("views.size=32", "train.batch_size=16") and not says("train.batch_size=16")


def test_a_name_that_several_gpus_share_is_explained():
    said = "The GPU is A100 SXM 80GB; slower ones to name in --plan: A100 SXM 40GB, A100 PCIe 80GB, A100 PCIe 40GB."
    assert said in plan(invented(), "A100, 16 cores").assumptions
    assert not any("slower ones" in line for line in plan(invented(), "L4, 16 cores").assumptions)
    names = {device.name: device for device in DEVICES.values()}
    for device in DEVICES.values():
        for slower in (names[name] for name in slower_variants(device)):
            assert (slower.fp16, slower.bandwidth, slower.interconnect) < (
                device.fp16,
                device.bandwidth,
                device.interconnect,
            )
            assert find_device(slower.name) == slower


def test_the_documentation_names_the_keys_that_a_plan_may_change():
    text = " ".join(Path("docs/profiling.md").read_text().split())
    sentence = text[text.index("From a saved profile") :].split("; other keys need a new profile")[0]
    everywhere, from_cpu = sentence.split("measured on a CPU")
    assert set(re.findall(r"`([a-z_.]+)`", everywhere)) == set(PLANNED_KEYS)
    assert set(re.findall(r"`([a-z_.]+)`", from_cpu)) == set(PLANNED_FROM_CPU)


def test_a_measured_gpu_is_scaled_by_peak_and_bandwidth():
    same = plan(on_gpu("NVIDIA A100-SXM4-80GB"), "A100, 64 cores, 256 GB")
    assert same.images_per_second == pytest.approx(1 / (1 / 2000 + 1 / 50_000))
    faster = plan(on_gpu("NVIDIA A100-SXM4-80GB"), "H100, 64 cores, 256 GB")
    step = (312 / 989 + 2039 / 3350) / 2 / 2000
    assert faster.images_per_second == pytest.approx(1 / (step + 2039 / 3350 / 50_000))
    older = plan(on_gpu("NVIDIA A100-SXM4-80GB"), "V100, 64 cores, 256 GB")
    assert any("set train.precision=fp16" in sentence for sentence in older.assumptions)
    unknown = plan(on_gpu("NVIDIA H100 NVL"), "A100, 64 cores, 256 GB")
    assert unknown.images_per_second == pytest.approx(1 / (1 / 5000 + VIEWS))


def test_rates_of_several_measured_processes_are_those_of_all():
    machine = "8xA100, 256 cores, 256 GB"
    one = on_gpu("NVIDIA A100-SXM4-80GB", stages={"launch": stage(10_000, 1e-4)})
    of_two = {
        "views": stage(2 * 50_000), "step": stage(2 / (1 / 2000 + 1 / 500), flops=STEP_FLOPS),
        "communication": stage(2 * 500), "launch": stage(10_000, 2e-4), "transfer": stage(2e6, 1e-7),
    }  # fmt: skip
    two = on_gpu("NVIDIA A100-SXM4-80GB", stages=of_two, processes=2)
    assert plan(two, machine).resource_rates == pytest.approx(plan(one, machine).resource_rates)


def test_launching_takes_as_long_for_smaller_batches():
    profile = on_gpu("NVIDIA A100-SXM4-80GB", stages={"launch": stage(10_000, 1e-4)})
    assert plan(profile, "A100, 64 cores, 256 GB").bottleneck == "step"
    planned = plan(profile, "8xA100, 256 cores, 256 GB")
    assert planned.bottleneck == "launch" and planned.images_per_second == pytest.approx(10_000)


def test_an_exchange_counts_only_where_the_backward_pass_does_not_hide_it():
    machine = "8xA100, 64 cores, 256 GB"
    assert plan(invented(), machine).resource_rates["device"] == pytest.approx(8 / (1 / 5000 + VIEWS))
    planned = plan(invented(run={"parameters": 1_000_000_000}), machine)
    exchange = 4e9 * 2 * 7 / 8 / (LINK_SHARE * 300e9)  # seconds per step of 32 images per GPU
    excess = exchange / 32 - 2 / 3 / 5000
    assert planned.bottleneck == "communication"
    assert planned.images_per_second == pytest.approx(8 / (1 / 5000 + VIEWS + excess))


def test_what_cannot_be_planned_is_refused():
    with pytest.raises(UserError, match="set train.batch_size to a multiple of 7"):
        plan(invented(), "7xA100, 64 cores")
    with pytest.raises(UserError, match="lacks the step's FLOPs"):
        plan(invented(stages={"step": stage(missing="Left out.")}), "A100, 64 cores")


def test_a_stage_that_was_not_measured_is_named():
    planned = plan(invented(data={"layout": "full", "crop": "cpu"}), "8xA100, 64 cores")
    missing = "Cropping on the CPU is left out, as it was not measured: The crops are made on the device."
    assert missing in planned.assumptions


def test_a_plan_rounds_its_rates_and_gives_its_time_in_words():
    planned = plan(invented(), "8xA100, 16 cores, nvme, 256 GB")
    assert planned.sentence.endswith("the next limit is the training step at 39,500 images/s.")
    short = replace(planned, hours=0.0129, epochs=100, first_epoch_hours=0.0001)
    assert "46 s for 100 epochs, without evaluation" in shown_plan(short, 120)
    slow_start = replace(planned, hours=2.5, epochs=10, first_epoch_hours=1.5)
    said = "2 h 30 min for 10 epochs, without evaluation; 1 h 30 min of it for the first"
    assert said in " ".join(shown_plan(slow_start, 200).split())


def shown_plan(planned: TrainingPlan, width: int) -> str:
    console = Console(file=io.StringIO(), width=width)
    console.print(plan_table(planned))
    return console.file.getvalue()


@pytest.mark.parametrize("width", [60, 80, 140])
@pytest.mark.parametrize("text", ["8xA100, 16 cores, hdd, 32 GB", "H100 PCIe, 64 cores", "2xV100, 8 cores, nfs"])
def test_the_table_says_that_it_predicts_and_fits(text, width):
    planned = replace(plan(invented(), text), recipe="a_recipe_with_a_name_that_is_[bold]longer_than_most_names_are")
    shown = shown_plan(planned, width)
    assert "PREDICTION, not a measurement" in shown and "…" not in shown
    assert max(map(len, shown.splitlines())) <= width
    words = " ".join(shown.split())
    assert "[bold]longer" in words and "What helps" in words and f"{planned.cores_needed} per GPU" in words
    assert planned.sentence in words and planned.advice in words
    for sentence in planned.assumptions:
        assert sentence in words
    names, rates = planned.resource_rates, words.split("Assumptions")[0]
    assert all(f"limit of the {RESOURCE_NAMES[name]}" in rates for name in names)


def test_a_saved_profile_is_planned_without_measuring(fastssl, tmp_path, monkeypatch):
    file = tmp_path / "saved.json"
    profile = invented()
    file.write_text(profile.model_copy(update={"recipe": recipe().model_dump(mode="json")}).model_dump_json())
    monkeypatch.setattr("fastssl.profiling.profile_recipe", None)
    code, said, _ = fastssl("profile", file, "--plan", "1xA100, 16 cores, nvme")
    assert (
        code == 0
        and "PREDICTION, not a measurement: invented (2 views of 32 px, batch size 256) on 1x A100"
        in " ".join(said.split())
    )
    code, more_epochs, _ = fastssl("profile", file, "train.epochs=20", "--plan", "1xA100, 16 cores, nvme")
    assert "for 10 epochs" in said and "for 20 epochs" in more_epochs
    for override in ("views.size=64", "embedding.samples=36", "embedding.chunk=4", "data.train=x"):
        code, _, err = fastssl("profile", file, override, "--plan", "1xA100, 16 cores, nvme")
        assert code == 2 and f"The profile was measured with another {override.partition('=')[0]}" in err
    for arguments in ([file], [file, "--plan", "1xA100, 16 cores, nvme", "--fail-under", "images_per_second=1"]):
        code, _, err = fastssl("profile", *arguments)
        assert code == 2 and "is a profile, from which --plan predicts" in " ".join(err.split())


def test_the_cores_that_are_advised_are_those_that_are_needed():
    """Threads that wait for the disk are no cores, and cores beyond the next limit help nothing."""
    profile = invented(
        data={"file_bytes": 1e12, "image_bytes": 1e5, "images": 10_000_000}, stages={"decode": stage(190, 1e-2)}
    )
    planned = plan(profile, "1xA100, 16 cores, nvme")
    assert planned.bottleneck == "decode" and planned.cores_needed > 16
    assert f"{planned.cores_needed - 16} more CPU cores" in planned.advice
