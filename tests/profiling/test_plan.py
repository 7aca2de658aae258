"""Planning another machine from a profile: what is read, the peaks it stands on, its arithmetic, its table."""

import copy
import io

import pytest
from rich.console import Console

from fastssl.common.errors import UserError
from fastssl.profiling.peaks import DEVICES, LINK_SHARE, STORAGE, find_device
from fastssl.profiling.planner import parse_machine, plan_table, plan_training

STEP_FLOPS = 2470 * 3 * 2 * 4.09e9 / 5000  # an A100 trains ResNet-50 at 2,470 images/s: this model at 5,000
VIEWS = 10 * 1e6 / (0.5 * 2.039e12)  # s an image on an A100: 1 MB, ten times, at half the bandwidth


def rate(value: float) -> dict:
    return {"median": value, "low": value, "high": value, "windows": [value]}


def leg(images_per_second: float | None = None, cpu_seconds: float | None = None, **more) -> dict:
    figures = {"images_per_second": images_per_second, "cpu_seconds": cpu_seconds}
    return {name: value and rate(value) for name, value in figures.items()} | {"missing": None} | more


def made_up(**changes: dict) -> dict:
    """A profile of a CPU: 1,000 images/s decoded by a core. changes: keys of its sections, by section."""
    profile = {
        "schema": 1,
        "recipe": {"name": "made_up", "train": {"epochs": 10, "batch_size": 256, "precision": "auto"}, "data": {}},
        "machine": {"device": "cpu", "kind": "cpu", "cores": 2, "processes": 1},
        "data": {
            "images": 1_300_000, "file_bytes": 140e9, "image_bytes": 100e3, "decoded_bytes": 196_608,
            "layout": "canvas", "crop": "gpu", "resident": False, "batches_per_epoch": 5_000,
        },
        "run": {"batch_size": 256, "workers": 2, "precision": "fp32", "compiled": False, "parameters": 12_000_000},
        "legs": {
            "storage": leg(), "decode": leg(1900, 1e-3), "copy": leg(1e6, 1e-7),
            "cpu_augment": leg(missing="The crops are cut on the device."),
            "views": leg(500, 2e-3, bytes_per_image=1e6), "step": leg(20, 0.1, flops=STEP_FLOPS),
        },
    }  # fmt: skip
    for section, values in changes.items():
        profile[section] |= values
    return profile


def on_gpu(device: str, **changes: dict) -> dict:
    profile = made_up(machine={"device": device, "kind": "cuda"}, run={"precision": "bf16"}, **changes)
    profile["legs"] |= {"views": leg(50_000, bytes_per_image=1e6), "step": leg(2_000, flops=STEP_FLOPS)}
    return profile


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


def test_a_plan_is_read_in_any_order():
    machine = parse_machine("8xA100, 64 cores, nvme")
    assert (machine.count, machine.device.name, machine.cores) == (8, "A100 SXM 80GB", 64)
    assert (machine.storage, machine.memory) == ("nvme", None)
    assert parse_machine("network,  256 GB, 16 vCPUs, NVIDIA GeForce RTX 4090") == parse_machine(
        "4090,256gb ram,16 cpus,nfs"
    )
    assert parse_machine("2 x H100 PCIe, 32 threads, 1.5 TB, sata")[2:] == (32, "ssd", 1.5e12)
    assert str(parse_machine("a100 40 GB, 8 cores, 64 GB, hdd")) == "1x A100 SXM 40GB, 8 cores, hdd, 64.0 GB"


@pytest.mark.parametrize(
    "text, says",
    [
        ("8xA1000, 64 cores", "did you mean 8xa100"),
        ("8xA100, 64 coers", "did you mean 64 cores?"),
        ("8xA100, 64 cores, nvm", "did you mean nvme?"),
        ("8xA100, 64 cores, floppy", "storage is nvme, ssd, hdd, nfs"),
        ("8xA100, nvme", "does not name the cores"),
        ("64 cores", "does not name the GPU"),
        ("", "does not name the GPU"),
        ("cpu, 64 cores", "a plan is for GPUs"),
        ("A100, H100, 64 cores", "names the GPU twice"),
        ("8xA100, 4 cores", "each GPU needs a core"),
        ("0xA100, 4 cores", "0 GPUs"),
    ],
)
def test_what_a_plan_lacks_is_said_in_one_sentence(text, says):
    with pytest.raises(UserError) as error:
        parse_machine(text)
    assert says in str(error.value) and str(error.value)[-1] in ".?" and "\n" not in str(error.value)


def test_few_cores_make_decoding_the_limit():
    planned = plan_training(made_up(), parse_machine("8xA100, 16 cores, nvme, 256 GB"))
    assert planned["cause"] == "decode"
    assert planned["images_per_second"] == pytest.approx(16 * 1000, rel=1e-3)  # by a core
    assert planned["accelerator_utilisation"] == pytest.approx(2000 * (1 / 5000 + VIEWS), rel=1e-3)
    # 1 ms of a core for what the GPU does in 0.21 ms: five cores
    assert planned["advice"][0].startswith("3 more cores a GPU (40 in all) would make compute the limit, at 38,1")
    assert any("as fast there as here" in sentence for sentence in planned["assumptions"])


def test_many_cores_make_compute_the_limit():
    planned = plan_training(made_up(), parse_machine("8xA100, 64 cores, nvme, 256 GB"))
    assert planned["cause"] == "compute" and planned["accelerator_utilisation"] == pytest.approx(1)
    assert planned["images_per_second"] == pytest.approx(8 / (1 / 5000 + VIEWS))
    assert planned["hours"] == pytest.approx(10 * 5_000 * 256 / planned["images_per_second"] / 3600, rel=0.1)
    assert planned["lines"]["threads"] == pytest.approx(64_000)
    assert planned["lines"]["disk"] is None and planned["lines"]["host"] is None
    assert "5 of 8 cores a GPU are enough" in planned["advice"][1]
    assert any("19 % of the bf16 peak" in sentence for sentence in planned["assumptions"])


def test_a_disk_is_the_limit_of_a_file_that_memory_does_not_hold():
    machine = parse_machine("A100, 16 cores, hdd, 65 GB")
    planned = plan_training(made_up(), machine)
    assert planned["cause"] == "storage"
    # 128 kB a read, of which 100 kB are the image's; half of the 130 GB that are read are in memory.
    one_epoch = 5_000 * 256 / (120 * 1.28)
    assert planned["images_per_second"] == pytest.approx(2 * 120 * 1.28, rel=0.03)  # decoding comes on top of the disk
    first, later = one_epoch, 9 * one_epoch / 2
    assert planned["hours"] == pytest.approx((first + later) / 3600, rel=0.03)
    assert planned["first_epoch_hours"] == pytest.approx(first / 3600, rel=0.03)
    assert "compute the limit" in planned["advice"][0] and "quasi_random" in planned["advice"][1]
    profile = made_up()
    profile["recipe"]["data"] = {"order": "quasi_random"}
    assert plan_training(profile, machine)["lines"]["disk"] == pytest.approx(2 * 2000)  # at 200 MB/s, few seeks
    assert plan_training(profile, machine)["cause"] == "storage"
    assumed = plan_training(made_up(), machine._replace(memory=None))["assumptions"]
    assert any("64.0 GB of memory (4.00 GB a core, as none is named)" in sentence for sentence in assumed)


def test_images_that_fit_on_the_gpu_are_decoded_once():
    data = {"images": 50_000, "image_bytes": 3072, "decoded_bytes": 3072, "file_bytes": 2e8}
    planned = plan_training(made_up(data=data), parse_machine("8xA100, 8 cores"))
    assert planned["cause"] == "compute" and planned["lines"]["threads"] is None
    profile = made_up(data=data)
    profile["recipe"]["data"] = {"resident": False}
    planned = plan_training(profile, parse_machine("8xA100, 8 cores"))
    assert planned["lines"]["reader"] == pytest.approx(8000, rel=1e-2)  # batches this small are decoded by the reader


def test_a_measured_gpu_is_scaled_by_peak_and_bandwidth():
    same = plan_training(on_gpu("NVIDIA A100-SXM4-80GB"), parse_machine("A100, 64 cores, 256 GB"))
    assert same["images_per_second"] == pytest.approx(1 / (1 / 2000 + 1 / 50_000))
    faster = plan_training(on_gpu("NVIDIA A100-SXM4-80GB"), parse_machine("H100, 64 cores, 256 GB"))
    compute = (312 / 989 + 2039 / 3350) / 2 / 2000
    assert faster["images_per_second"] == pytest.approx(1 / (compute + 2039 / 3350 / 50_000))
    older = plan_training(on_gpu("NVIDIA A100-SXM4-80GB"), parse_machine("V100, 64 cores, 256 GB"))
    assert any("set train.precision=fp16" in sentence for sentence in older["assumptions"])
    unknown = plan_training(on_gpu("NVIDIA H100 NVL"), parse_machine("A100, 64 cores, 256 GB"))
    assert unknown["images_per_second"] == pytest.approx(1 / (1 / 5000 + VIEWS))


def test_rates_of_several_measured_processes_are_those_of_all():
    machine = parse_machine("8xA100, 256 cores, 256 GB")
    one, two = on_gpu("NVIDIA A100-SXM4-80GB"), on_gpu("NVIDIA A100-SXM4-80GB")
    one["legs"]["launch"] = leg(10_000, 1e-4)
    two["machine"]["processes"] = 2
    two["legs"] |= {"views": leg(2 * 50_000), "step": leg(2 / (1 / 2000 + 1 / 500), flops=STEP_FLOPS)}
    two["legs"] |= {"communication": leg(2 * 500), "launch": leg(10_000, 2e-4), "copy": leg(2e6, 1e-7)}
    assert plan_training(two, machine)["lines"] == pytest.approx(plan_training(one, machine)["lines"])


def test_launches_of_smaller_batches_take_as_long():
    profile = on_gpu("NVIDIA A100-SXM4-80GB")
    profile["legs"]["launch"] = leg(10_000, 1e-4)
    assert plan_training(profile, parse_machine("A100, 64 cores, 256 GB"))["cause"] == "compute"
    planned = plan_training(profile, parse_machine("8xA100, 256 cores, 256 GB"))
    assert planned["cause"] == "launch" and planned["images_per_second"] == pytest.approx(10_000)


def test_only_what_the_backward_pass_does_not_hide_of_an_exchange_counts():
    assert plan_training(made_up(), parse_machine("8xA100, 64 cores, 256 GB"))["lines"]["device"] == pytest.approx(
        8 / (1 / 5000 + VIEWS)
    )
    profile = made_up(run={"parameters": 1_000_000_000})
    planned = plan_training(profile, parse_machine("8xA100, 64 cores, 256 GB"))
    exchange = 4e9 * 2 * 7 / 8 / (LINK_SHARE * 300e9)  # s a step, of 32 images a GPU
    excess = exchange / 32 - 2 / 3 / 5000
    assert planned["cause"] == "communication"
    assert planned["images_per_second"] == pytest.approx(8 / (1 / 5000 + VIEWS + excess))


def test_what_cannot_be_planned_is_refused():
    with pytest.raises(UserError, match="set a multiple of 7"):
        plan_training(made_up(), parse_machine("7xA100, 64 cores"))
    profile = made_up()
    profile["legs"]["step"] = leg(missing="Left out.", flops=None)
    with pytest.raises(UserError, match="lacks a step's FLOPs"):
        plan_training(profile, parse_machine("A100, 64 cores"))


def test_a_leg_that_was_not_measured_is_named():
    profile = made_up(data={"layout": "full", "crop": "cpu"})
    planned = plan_training(profile, parse_machine("8xA100, 64 cores"))
    missing = "cpu_augment is left out, as it was not measured: The crops are cut on the device."
    assert missing in planned["assumptions"]


def test_planning_leaves_the_profile_as_it_is():
    profile = made_up()
    before = copy.deepcopy(profile)
    plan_training(profile, parse_machine("8xA100, 64 cores"))
    assert profile == before


@pytest.mark.parametrize("text", ["8xA100, 16 cores, hdd, 32 GB", "H100 PCIe, 64 cores", "2xV100, 8 cores, nfs"])
def test_the_table_says_that_it_predicts_and_fits_80_columns(text):
    planned = plan_training(made_up(), parse_machine(text))
    planned["recipe"] = "a_recipe_with_a_name_that_is_[bold]longer_than_most_names_of_recipes"
    console = Console(file=io.StringIO(), width=80)
    console.print(plan_table(planned))
    shown = console.file.getvalue()
    assert "PREDICTION, not a measurement" in shown and "…" not in shown
    assert max(map(len, shown.splitlines())) <= 80
    words = " ".join(shown.split())
    assert "[bold]longer" in words and "the limit" in words and planned["cause"] in words
    joined = "".join(shown.split()).replace("assumed", "").replace("tochange", "")
    for sentence in planned["advice"] + planned["assumptions"]:
        assert "".join(sentence.split()).replace("assumed", "") in joined
